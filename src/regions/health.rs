//! What real traffic says of each endpoint. Always on; it needs no configuration.
//!
//! Three failures in a row eject an upstream for 5 s, each further ejection for twice as long, up to
//! 5 min (the doubling of Envoy's outlier detection, with a count fit for regions of one or two
//! upstreams). When the time is over one request may try it: success brings it back, failure ejects it again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::request::Moment;

/// Failures in a row before an ejection.
pub const FAILURES: u32 = 3;
/// The first ejection.
pub const FIRST_EJECTION: Duration = Duration::from_secs(5);
/// The longest ejection.
pub const LONGEST_EJECTION: Duration = Duration::from_secs(300);
/// A trial whose end was never told (its task panicked) is forgotten after this long.
const LOST_TRIAL: Duration = Duration::from_secs(120);

/// Passive health of one endpoint: a few atomics, so that no request waits for another.
#[derive(Debug, Default)]
pub struct Health {
    /// Failures since the last success.
    failures: AtomicU32,
    /// Ejections so far; the next lasts twice as long.
    ejections: AtomicU32,
    /// All ejections of the upstream, whichever of its addresses; shared by those.
    total: Arc<AtomicU64>,
    /// Ejected until this millisecond; 0 when it is not.
    until: AtomicU64,
    /// Since this one.
    ejected: AtomicU64,
    /// The trial that began in this millisecond is under way; 0 when none is.
    trial: AtomicU64,
}

/// What traffic alone says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Yes.
    Usable,
    /// Its ejection is over: one request may try it.
    TrialDue,
    /// Not until then, or until the trial under way has ended.
    Ejected {
        /// The end of the ejection.
        until: Moment,
    },
}

impl Health {
    /// One that counts ejections in `total`, too.
    pub fn counting(total: Arc<AtomicU64>) -> Self {
        Self { total, ..Self::default() }
    }

    /// How it stands at `now`.
    pub fn standing(&self, now: Moment) -> Standing {
        let until = self.until.load(Relaxed);
        if until == 0 {
            return Standing::Usable;
        }
        let trial = self.trial.load(Relaxed);
        let on_trial = trial != 0 && now.millis() < trial.saturating_add(LOST_TRIAL.as_millis() as u64);
        if now.millis() < until || on_trial {
            Standing::Ejected { until: Moment(Duration::from_millis(until)) }
        } else {
            Standing::TrialDue
        }
    }

    /// Takes the one trial that is due; false if somebody else was faster.
    pub fn claim_trial(&self, now: Moment) -> bool {
        let seen = self.trial.load(Relaxed);
        let lost = seen == 0 || now.millis() >= seen.saturating_add(LOST_TRIAL.as_millis() as u64);
        lost && self.trial.compare_exchange(seen, now.millis().max(1), Relaxed, Relaxed).is_ok()
    }

    /// A request that began at `began` was answered well. Returns true when this brings it back.
    pub fn success(&self, began: Moment, now: Moment) -> bool {
        // What was under way when the ejection began tells nothing of the time since.
        if self.until.load(Relaxed) != 0 && began.millis() < self.ejected.load(Relaxed) {
            return false;
        }
        // The usual case writes nothing: no cache line is fought over.
        if self.failures.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
        }
        let until = self.until.load(Relaxed);
        if until != 0 {
            // An upstream that was well for long starts again at the shortest ejection.
            if now.millis() >= until.saturating_add(LONGEST_EJECTION.as_millis() as u64) {
                self.ejections.store(0, Relaxed);
            }
            self.until.store(0, Relaxed);
            self.trial.store(0, Relaxed);
        }
        until != 0
    }

    /// Is it due to be ejected, and only spared because it is the last?
    pub fn is_failing(&self) -> bool {
        self.failures.load(Relaxed) >= FAILURES
    }

    /// It failed. Returns true when this ejects it; `spare` says, if it comes to that, that it must not.
    pub fn failure(&self, now: Moment, spare: impl FnOnce() -> bool) -> bool {
        let until = self.until.load(Relaxed);
        // A request that was under way when the ejection began tells nothing new.
        if until != 0 && now.millis() < until {
            return false;
        }
        let failures = self.failures.fetch_add(1, Relaxed).saturating_add(1);
        // A trial that fails ejects at once.
        if until == 0 && (failures < FAILURES || spare()) {
            return false;
        }
        let doublings = self.ejections.load(Relaxed).min(16);
        let length = FIRST_EJECTION.saturating_mul(1 << doublings).min(LONGEST_EJECTION);
        // Several requests may come here together; it is one ejection all the same.
        if self.until.compare_exchange(until, now.after(length).millis().max(1), Relaxed, Relaxed).is_err() {
            return false;
        }
        self.ejected.store(now.millis(), Relaxed);
        self.ejections.fetch_add(1, Relaxed);
        self.total.fetch_add(1, Relaxed);
        self.failures.store(0, Relaxed);
        self.trial.store(0, Relaxed);
        true
    }

    /// A trial ended without a verdict: the client left.
    pub fn trial_abandoned(&self) {
        self.trial.store(0, Relaxed);
    }

    /// Failures since the last success, and ejections so far.
    pub fn counts(&self) -> (u32, u32) {
        (self.failures.load(Relaxed), self.ejections.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    #[test]
    fn three_in_a_row_eject_and_one_trial_brings_back() {
        let health = Health::default();
        assert!(!health.failure(at(1), || false) && !health.failure(at(2), || false));
        health.success(at(3), at(3));
        assert!(!health.failure(at(4), || false) && !health.failure(at(5), || false));
        assert_eq!(health.standing(at(5)), Standing::Usable);
        assert!(health.failure(at(6), || false));
        assert_eq!(health.standing(at(6)), Standing::Ejected { until: at(5_006) });
        assert_eq!(health.standing(at(5_006)), Standing::TrialDue);
        assert!(!health.success(at(5), at(5_006)), "a long answer that began before tells nothing");
        assert_eq!(health.standing(at(5_006)), Standing::TrialDue);
        assert!(health.claim_trial(at(5_006)));
        assert!(!health.claim_trial(at(5_007)), "one trial at a time");
        assert!(matches!(health.standing(at(5_007)), Standing::Ejected { .. }));
        health.success(at(5_010), at(5_010));
        assert_eq!(health.standing(at(5_010)), Standing::Usable);
    }

    #[test]
    fn ejections_double_up_to_five_minutes() {
        let health = Health::default();
        let mut now = 1;
        for _ in 0..FAILURES {
            health.failure(at(now), || false);
        }
        for seconds in [5, 10, 20, 40, 80, 160, 300, 300] {
            now += seconds * 1_000;
            assert_eq!(health.standing(at(now)), Standing::TrialDue, "after {seconds} s");
            assert!(matches!(health.standing(at(now - 1)), Standing::Ejected { .. }));
            assert!(health.claim_trial(at(now)));
            assert!(health.failure(at(now), || false), "one failed trial is enough");
        }
    }

    #[test]
    fn a_trial_without_verdict_is_given_to_the_next() {
        let health = Health::default();
        for _ in 0..FAILURES {
            health.failure(at(1), || false);
        }
        assert!(health.claim_trial(at(6_000)));
        health.trial_abandoned();
        assert!(health.claim_trial(at(6_001)));
        // A lost one is forgotten.
        assert!(health.claim_trial(at(6_001 + 120_000)));
    }

    #[test]
    fn the_last_one_is_spared_until_another_is_there() {
        let health = Health::default();
        for i in 0..10 {
            assert!(!health.failure(at(i), || true));
        }
        assert_eq!((health.standing(at(10)), health.is_failing()), (Standing::Usable, true));
        assert!(health.failure(at(11), || false), "the next failure ejects it");
        health.success(at(6_000), at(6_000));
        assert!(!health.is_failing());
    }
}
