//! The retry budget of a route: retries may add so much to the load of upstreams that fail, and no more. (Moving
//! on to an upstream that shows no failure is counted, but never refused: see `upstream::choice`.)
//!
//! Counted over a sliding window of ten seconds, as linkerd does, not over requests under way, as Envoy does:
//! those vanish just when everything fails fast.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::request::Moment;

/// The window in seconds.
const WINDOW: u64 = 10;

/// What a budget allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Allowance {
    /// Retries for every hundred requests of the window.
    pub percent: u32,
    /// Retries a second that are always allowed: so many times ten in a window.
    pub min_per_second: u32,
}

/// What was spent. Outlives reloads.
#[derive(Debug, Default)]
pub struct Budget {
    requests: Window,
    retries: Window,
}

/// Ten counters, one a second: the second in the upper half, the count in the lower.
#[derive(Debug, Default)]
struct Window([AtomicU64; WINDOW as usize]);

impl Window {
    fn add(&self, second: u64) {
        let Some(bucket) = self.0.get((second % WINDOW) as usize) else { return };
        let step = |old: u64| if old >> 32 == second { old.saturating_add(1) } else { second << 32 | 1 };
        // The closure never declines, so neither does the update.
        let _ = bucket.fetch_update(Relaxed, Relaxed, |old| Some(step(old)));
    }

    fn sum(&self, second: u64) -> u64 {
        let counts = self.0.iter().map(|b| b.load(Relaxed));
        counts.filter(|b| b >> 32 > second.saturating_sub(WINDOW) || b >> 32 == second).map(|b| b & 0xffff_ffff).sum()
    }
}

/// Seconds of the process, counted from 1 so that an unused bucket is never current.
fn second(now: Moment) -> u64 {
    now.0.as_secs() + WINDOW
}

impl Budget {
    /// A request came.
    pub fn request(&self, now: Moment) {
        self.requests.add(second(now));
    }

    /// Is there room for one more retry?
    pub fn allows(&self, allowance: Allowance, now: Moment) -> bool {
        let retries = self.retries.sum(second(now));
        retries < u64::from(allowance.min_per_second) * WINDOW
            || (retries + 1) * 100 < self.requests.sum(second(now)) * u64::from(allowance.percent)
    }

    /// How many more it allows at the moment.
    pub fn left(&self, allowance: Allowance, now: Moment) -> u64 {
        let (requests, retries) = self.counts(now);
        let always = u64::from(allowance.min_per_second) * WINDOW;
        // The last one that `allows` lets through leaves them just below the part.
        let part = (requests * u64::from(allowance.percent)).div_ceil(100).saturating_sub(1);
        always.max(part).saturating_sub(retries)
    }

    /// A retry begins.
    pub fn retry(&self, now: Moment) {
        self.retries.add(second(now));
    }

    /// Requests and retries of the last ten seconds.
    pub fn counts(&self, now: Moment) -> (u64, u64) {
        (self.requests.sum(second(now)), self.retries.sum(second(now)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const USUAL: Allowance = Allowance { percent: 20, min_per_second: 3 };

    /// A hundred requests a second, each of which fails and would like three retries.
    fn attempts_per_request(seconds: u64, allowance: Allowance) -> f64 {
        let budget = Budget::default();
        let (mut requests, mut attempts) = (0u32, 0u32);
        for ms in (0..seconds * 1_000).step_by(10) {
            let now = Moment(Duration::from_millis(ms));
            budget.request(now);
            (requests, attempts) = (requests + 1, attempts + 1);
            for _ in 0..3 {
                if budget.allows(allowance, now) {
                    budget.retry(now);
                    attempts += 1;
                }
            }
        }
        f64::from(attempts) / f64::from(requests)
    }

    #[test]
    fn with_everything_failing_attempts_stay_under_a_fifth_more() {
        for seconds in [2, 10, 60] {
            let ratio = attempts_per_request(seconds, USUAL);
            assert!(ratio < 1.2, "{ratio} in {seconds} s");
        }
        assert!(attempts_per_request(10, Allowance { percent: 1_000, min_per_second: 0 }) > 3.9);
        assert!(attempts_per_request(10, Allowance { percent: 0, min_per_second: 0 }) == 1.0);
    }

    #[test]
    fn what_is_left_is_what_is_allowed() {
        for requests in [0u32, 1, 99, 100, 151, 400] {
            let budget = Budget::default();
            let now = Moment(Duration::from_secs(5));
            (0..requests).for_each(|_| budget.request(now));
            let mut left = budget.left(USUAL, now);
            while budget.allows(USUAL, now) {
                assert!(left > 0, "{requests}");
                budget.retry(now);
                assert_eq!(budget.left(USUAL, now), left - 1);
                left -= 1;
            }
            assert_eq!(left, 0, "{requests}");
        }
    }

    #[test]
    fn little_traffic_may_always_retry_and_the_window_slides() {
        let budget = Budget::default();
        let at = |s| Moment(Duration::from_secs(s));
        for _ in 0..30 {
            assert!(budget.allows(USUAL, at(0)));
            budget.retry(at(0));
        }
        assert!(!budget.allows(USUAL, at(0)) && !budget.allows(USUAL, at(9)));
        assert!(budget.allows(USUAL, at(10)));
        assert_eq!(budget.counts(at(10)), (0, 0));
    }
}
