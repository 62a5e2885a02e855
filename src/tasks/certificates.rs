//! Tells of certificates that expire soon, for as long as they do.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::listeners::{Certificate, SOON};
use crate::state::State;

/// How often it is said.
const AGAIN: Duration = Duration::from_secs(24 * 60 * 60);

/// Looks once a day, for ever. What a reload finds it says itself, so the first look comes after a day.
pub async fn run(state: Arc<State>) {
    loop {
        tokio::time::sleep(AGAIN).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for certificate in soon(&state, now) {
            let days = certificate.expires.saturating_sub(now).as_secs() / (24 * 60 * 60);
            tracing::warn!(certificate = %certificate.path.display(), days, "a certificate expires soon");
        }
    }
}

/// Those that expire soon, or did.
fn soon(state: &State, now: Duration) -> Vec<Arc<Certificate>> {
    let live = state.live.load();
    let tls = live.snapshot.listeners.iter().filter_map(|listener| listener.tls.as_ref());
    tls.flat_map(|tls| &tls.certificates.all).filter(|one| one.expires.saturating_sub(now) < SOON).cloned().collect()
}
