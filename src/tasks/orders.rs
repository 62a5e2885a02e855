//! Ends orders for regions when their time is over.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::state::State;

/// At least so often, for an order may come at any time.
const LOOK: Duration = Duration::from_millis(500);

/// Looks after them, for ever.
pub async fn run(state: Arc<State>) {
    // Whoever serves in this process's place has them from then on.
    while !state.leaving.now() {
        let theirs = state.clone();
        let next = tokio::task::spawn_blocking(move || theirs.orders.tick(&theirs)).await.ok().flatten();
        sleep(next.map_or(LOOK, |next| next.clamp(Duration::from_millis(1), LOOK))).await;
    }
}
