//! The short queue of requests for which every upstream is at its limit.
//!
//! A queue takes up bursts. One that never empties only makes everybody wait: after CoDel (RFC 8289, and Facebook's
//! "Fail at Scale", 2015) whoever joins a queue in which somebody has waited for longer than its patience all the time
//! gets a fraction of that patience.

use std::time::Duration;

use tokio::time::timeout;

use super::clock;
use crate::upstream::{Attempt, Backends, Exhausted, Plan, Stop};

/// In a queue that never empties, this part of the patience is left.
const STANDING: u32 = 20;

/// The next attempt; waits for a place if only limits speak against it, in the queue of the first region,
/// but for a place in any of them.
pub async fn next(plan: &mut Plan, backends: Backends<'_>) -> Option<Attempt> {
    let began = clock::now();
    match plan.next(backends, began) {
        Ok(attempt) => return Some(attempt),
        Err(Exhausted(Stop::Busy)) => {}
        Err(Exhausted(_)) => return None,
    }
    let (_, region) = plan.candidates(backends.regions).next()?;
    let (size, longest) = region.queue;
    let longest = patience(longest, region.state.busy(began));
    // Where not all can wait, those wait who matter most.
    let _place = region.state.wait(plan.share.of(size), began)?;
    let until = began.after(longest).min(plan.deadline);
    loop {
        // First listen, then look: a place that becomes free in between is not missed.
        let freed = region.state.room.freed.listen();
        match plan.next(backends, clock::now()) {
            Ok(attempt) => return Some(attempt),
            Err(Exhausted(Stop::Busy)) => {}
            Err(Exhausted(_)) => return None,
        }
        let left = until.since(clock::now());
        if left.is_zero() {
            return None;
        }
        // When the time is over it looks once more.
        let _ = timeout(left, freed).await;
    }
}

/// How long a request may wait in a queue in which somebody has always waited for as long as `busy`.
fn patience(longest: Duration, busy: Duration) -> Duration {
    if busy > longest { longest / STANDING } else { longest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_never_empties_is_left_soon() {
        let second = Duration::from_secs(1);
        assert_eq!(patience(second, Duration::ZERO), second);
        assert_eq!(patience(second, second), second, "a burst may take all of it");
        assert_eq!(patience(second, second * 2), Duration::from_millis(50));
    }
}
