//! What real traffic says of each upstream. Always on; it needs no configuration.
//!
//! Three failures in a row eject an upstream for 5 s, each further ejection for twice as long, up to
//! 5 min (the doubling of Envoy's outlier detection, with a count fit for regions of one or two
//! upstreams). When the time is over one request may try it: success brings it back, failure ejects it again.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::config::units::UpstreamUrl;
use crate::request::Moment;

/// Failures in a row before an ejection.
pub const FAILURES: u32 = 3;
/// The first ejection.
pub const FIRST_EJECTION: Duration = Duration::from_secs(5);
/// The longest ejection.
pub const LONGEST_EJECTION: Duration = Duration::from_secs(300);
/// A trial whose end was never told (its task panicked) is forgotten after this long.
const LOST_TRIAL: Duration = Duration::from_secs(120);

/// What is known of an upstream, across reloads.
#[derive(Debug)]
pub struct UpstreamState {
    /// Whom it is about.
    pub url: UpstreamUrl,
    /// What traffic says of it.
    pub health: Health,
    /// Where its name points; empty until it was resolved.
    addresses: ArcSwap<Vec<SocketAddr>>,
    next: AtomicUsize,
    /// Its name is being asked for.
    pub resolving: AtomicBool,
}

impl UpstreamState {
    /// Nothing is known yet; an address needs no resolving.
    pub fn new(url: UpstreamUrl) -> Self {
        let addresses = url.ip().map(|ip| SocketAddr::new(ip, url.port)).into_iter().collect();
        Self {
            url,
            health: Health::default(),
            addresses: ArcSwap::from_pointee(addresses),
            next: AtomicUsize::new(0),
            resolving: AtomicBool::new(false),
        }
    }

    /// The next address in turn, if the name is resolved.
    pub fn address(&self) -> Option<SocketAddr> {
        let addresses = self.addresses.load();
        // Taking turns is for names with several addresses; the usual single one costs no shared write.
        match addresses.as_slice() {
            [] => None,
            [one] => Some(*one),
            several => several.get(self.next.fetch_add(1, Relaxed) % several.len()).copied(),
        }
    }

    /// Is there an address to connect to?
    pub fn is_resolved(&self) -> bool {
        !self.addresses.load().is_empty()
    }

    /// Would a request be sent to it without further ado?
    pub fn is_usable(&self, now: Moment) -> bool {
        self.is_resolved() && self.health.standing(now) == Standing::Usable
    }

    /// Takes a fresh answer; an empty one is none, and the last good one stays.
    pub fn resolved(&self, mut addresses: Vec<SocketAddr>) {
        addresses.sort_unstable();
        addresses.dedup();
        if !addresses.is_empty() && **self.addresses.load() != addresses {
            self.addresses.store(addresses.into());
        }
    }

    /// All addresses.
    pub fn addresses(&self) -> std::sync::Arc<Vec<SocketAddr>> {
        self.addresses.load_full()
    }
}

/// Passive health of one upstream: a few atomics, so that no request waits for another.
#[derive(Debug, Default)]
pub struct Health {
    /// Failures since the last success.
    failures: AtomicU32,
    /// Ejections so far; the next lasts twice as long.
    ejections: AtomicU32,
    /// Ejected until this millisecond; 0 when it is not.
    until: AtomicU64,
    /// The trial that began in this millisecond is under way; 0 when none is.
    trial: AtomicU64,
}

/// May an upstream be chosen?
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

    /// It answered well.
    pub fn success(&self, now: Moment) {
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
    }

    /// It failed. Returns true when this ejects it.
    pub fn failure(&self, now: Moment) -> bool {
        let until = self.until.load(Relaxed);
        // A request that was under way when the ejection began tells nothing new.
        if until != 0 && now.millis() < until {
            return false;
        }
        let failures = self.failures.fetch_add(1, Relaxed) + 1;
        // A trial that fails ejects at once.
        if until == 0 && failures < FAILURES {
            return false;
        }
        let doublings = self.ejections.load(Relaxed).min(16);
        let length = FIRST_EJECTION.saturating_mul(1 << doublings).min(LONGEST_EJECTION);
        // Several requests may come here together; it is one ejection all the same.
        if self.until.compare_exchange(until, now.after(length).millis().max(1), Relaxed, Relaxed).is_err() {
            return false;
        }
        self.ejections.fetch_add(1, Relaxed);
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
        assert!(!health.failure(at(1)) && !health.failure(at(2)));
        health.success(at(3));
        assert!(!health.failure(at(4)) && !health.failure(at(5)));
        assert_eq!(health.standing(at(5)), Standing::Usable);
        assert!(health.failure(at(6)));
        assert_eq!(health.standing(at(6)), Standing::Ejected { until: at(5_006) });
        assert_eq!(health.standing(at(5_006)), Standing::TrialDue);
        assert!(health.claim_trial(at(5_006)));
        assert!(!health.claim_trial(at(5_007)), "one trial at a time");
        assert!(matches!(health.standing(at(5_007)), Standing::Ejected { .. }));
        health.success(at(5_010));
        assert_eq!(health.standing(at(5_010)), Standing::Usable);
    }

    #[test]
    fn ejections_double_up_to_five_minutes() {
        let health = Health::default();
        let mut now = 1;
        for _ in 0..FAILURES {
            health.failure(at(now));
        }
        for seconds in [5, 10, 20, 40, 80, 160, 300, 300] {
            now += seconds * 1_000;
            assert_eq!(health.standing(at(now)), Standing::TrialDue, "after {seconds} s");
            assert!(matches!(health.standing(at(now - 1)), Standing::Ejected { .. }));
            assert!(health.claim_trial(at(now)));
            assert!(health.failure(at(now)), "one failed trial is enough");
        }
    }

    #[test]
    fn a_trial_without_verdict_is_given_to_the_next() {
        let health = Health::default();
        for _ in 0..FAILURES {
            health.failure(at(1));
        }
        assert!(health.claim_trial(at(6_000)));
        health.trial_abandoned();
        assert!(health.claim_trial(at(6_001)));
        // A lost one is forgotten.
        assert!(health.claim_trial(at(6_001 + 120_000)));
    }

    #[test]
    fn the_last_good_answer_stays() {
        let state = UpstreamState::new("http://origin.example.com:80".parse().unwrap());
        assert!(!state.is_resolved() && state.address().is_none());
        let a: SocketAddr = "192.0.2.1:80".parse().unwrap();
        let b: SocketAddr = "192.0.2.2:80".parse().unwrap();
        state.resolved(vec![b, a, a]);
        state.resolved(vec![]);
        assert_eq!([state.address(), state.address(), state.address()], [Some(a), Some(b), Some(a)]);
    }
}
