//! One address that can be connected to, and everything that is known of it.
//!
//! Passive and active health are separate inputs. The one rule that combines them:
//!
//! 1. Health checks say "down": it is not used, whatever traffic says.
//! 2. Traffic ejected it: it is not used until that time is over, whatever health checks say.
//! 3. The time is over: with a health check a good answer to the next check brings it back, without
//!    risking a request; without one, one request tries it.
//! 4. What comes back gets its share by and by (`slow_start`).
//!
//! The last usable endpoint of a request's last usable region is never ejected, and if nothing is usable
//! everything is tried (panic): see `upstream::plan`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::active::{Active, Verdict};
use super::health::{self, Health};
use crate::config::units::UpstreamUrl;
use crate::request::Moment;
use crate::signing::{Key, same};

/// Addresses of one name that are used; the rest of a longer answer is not.
pub const MAX_ADDRESSES: usize = 256;
/// A time to first byte that was not measured for this long is not known any more.
const FORGET: Duration = Duration::from_secs(10);
/// From so many measurements on it is known: the first may be slow for many reasons.
const MEASUREMENTS: u32 = 10;
/// The share with which a slow start begins.
const SLOW_START_FROM: f32 = 0.1;
/// The longest `Retry-After` that is honoured by leaving an upstream alone.
const LONGEST_REST: Duration = Duration::from_secs(30);

/// Where an endpoint listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// TCP.
    Inet(SocketAddr),
    /// A Unix socket.
    Unix(Arc<str>),
}

impl Address {
    /// The IP address, if it is one.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Inet(address) => Some(address.ip()),
            Self::Unix(_) => None,
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// An answer of DNS: where, and how preferred it is there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Resolved {
    /// The address.
    pub address: SocketAddr,
    /// Its share among the addresses of the name (SRV); 1 otherwise.
    pub weight: u32,
    /// Only while the others fail (SRV, a higher priority value).
    pub backup: bool,
}

/// One address that can be connected to.
#[derive(Debug)]
pub struct Endpoint {
    /// Where it listens.
    pub address: Address,
    /// Its share among the addresses of its name.
    weight: AtomicU32,
    /// DNS says to use it only while others fail.
    backup: AtomicBool,
    /// Stands for it in hashes, the same in every process.
    pub id: u64,
    /// Stands for it in cookies: a keyed hash, so that it reveals nothing.
    pub tag: String,
    /// What traffic says of it.
    pub health: Health,
    /// What health checks say of it.
    pub active: Active,
    /// When it came back last, in milliseconds; 0 if it never was away.
    returned: AtomicU64,
    /// Asked to be left alone until then.
    rest: AtomicU64,
    /// Requests that it is answering.
    in_flight: AtomicU32,
    /// Its time to first byte, smoothed, in microseconds, and when that was.
    first_byte: AtomicU64,
    first_byte_at: AtomicU64,
    /// How often it was measured without a long pause.
    measurements: AtomicU32,
}

/// May an endpoint be chosen?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Yes.
    Usable,
    /// Yes, but it asked to be left alone until then (503 with `Retry-After`).
    Resting {
        /// The end of its rest.
        until: Moment,
    },
    /// Its ejection is over: one request may try it.
    TrialDue,
    /// Ejected by traffic, until then or until the trial or check that follows.
    Ejected {
        /// The end of the ejection.
        until: Moment,
    },
    /// Health checks say that it is down.
    Down,
}

impl Endpoint {
    fn new(url: &UpstreamUrl, address: Address, (weight, backup): (u32, bool), key: &Key, ejections: &Arc<AtomicU64>) -> Self {
        let name = format!("{url} {address}");
        Self {
            id: crate::request::hash(name.as_bytes()),
            tag: key.tag("affinity", &name),
            address,
            weight: AtomicU32::new(weight),
            backup: AtomicBool::new(backup),
            health: Health::counting(ejections.clone()),
            active: Active::default(),
            returned: AtomicU64::new(0),
            rest: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
            first_byte: AtomicU64::new(0),
            first_byte_at: AtomicU64::new(0),
            measurements: AtomicU32::new(0),
        }
    }

    /// Its share among the addresses of its name.
    pub fn weight(&self) -> u32 {
        self.weight.load(Relaxed)
    }

    /// DNS says to use it only while others fail.
    pub fn backup(&self) -> bool {
        self.backup.load(Relaxed)
    }

    /// How it stands at `now`, by the rule above.
    pub fn standing(&self, now: Moment) -> Standing {
        if self.active.verdict() == Verdict::Down {
            return Standing::Down;
        }
        match self.health.standing(now) {
            health::Standing::Usable => {
                let rest = self.rest.load(Relaxed);
                match now.millis() < rest {
                    true => Standing::Resting { until: Moment(Duration::from_millis(rest)) },
                    false => Standing::Usable,
                }
            }
            health::Standing::TrialDue if self.active.is_on() => Standing::Ejected { until: now },
            health::Standing::TrialDue => Standing::TrialDue,
            health::Standing::Ejected { until } => Standing::Ejected { until },
        }
    }

    /// Would a request be sent to it without further ado, and is there no doubt that it should?
    pub fn is_healthy(&self, now: Moment) -> bool {
        matches!(self.standing(now), Standing::Usable | Standing::Resting { .. }) && !self.health.is_failing()
    }

    /// Would a request be sent to it without further ado?
    pub fn is_usable(&self, now: Moment) -> bool {
        matches!(self.standing(now), Standing::Usable | Standing::Resting { .. })
    }

    /// It answered a request well that began at `began`.
    pub fn success(&self, began: Moment, now: Moment) {
        if self.health.success(began, now) {
            self.returned.store(now.millis().max(1), Relaxed);
        }
    }

    /// It answered a health check; `true` if that changed what health checks say of it.
    pub fn checked(&self, good: bool, fall: u32, rise: u32, now: Moment) -> bool {
        let before = self.active.verdict();
        let after = self.active.record(good, fall, rise);
        if good && after == Verdict::Up {
            let due = self.health.standing(now) == health::Standing::TrialDue;
            let back = due && self.health.success(now, now);
            if back || before == Verdict::Down {
                self.returned.store(now.millis().max(1), Relaxed);
            }
        }
        before != after
    }

    /// It said "not now" for this long.
    pub fn rest(&self, length: Duration, now: Moment) {
        self.rest.store(now.after(length.min(LONGEST_REST)).millis(), Relaxed);
    }

    /// The part of its share that it gets at `now`, from 0.1 to 1 within `slow_start` of its return. One that
    /// was never away gets all of it.
    pub fn ramp(&self, slow_start: Duration, now: Moment) -> f32 {
        let returned = self.returned.load(Relaxed);
        let passed = now.millis().saturating_sub(returned) as f32;
        if returned == 0 || slow_start.is_zero() {
            return 1.0;
        }
        (passed / slow_start.as_millis() as f32).clamp(SLOW_START_FROM, 1.0)
    }

    /// Requests that it is answering.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Its time to first byte in microseconds, if it was measured lately and often enough.
    pub fn first_byte(&self, now: Moment) -> Option<u64> {
        let at = Moment(Duration::from_millis(self.first_byte_at.load(Relaxed)));
        let known = self.measurements.load(Relaxed) >= MEASUREMENTS && now.since(at) < FORGET;
        known.then(|| self.first_byte.load(Relaxed))
    }

    /// It took this long to its first byte. An exponentially weighted moving average: a twentieth of each, and more
    /// of the first ones.
    pub fn measured(&self, first_byte: Duration, now: Moment) {
        let new = u64::try_from(first_byte.as_micros()).unwrap_or(u64::MAX).max(1);
        let at = Moment(Duration::from_millis(self.first_byte_at.load(Relaxed)));
        let before = if now.since(at) < FORGET { self.measurements.load(Relaxed) } else { 0 };
        let part = u64::from(before.saturating_add(1).min(20));
        let old = self.first_byte.load(Relaxed);
        // Two writers may cross; an average does not mind.
        self.first_byte.store((old - old / part + new / part).max(1), Relaxed);
        self.first_byte_at.store(now.millis(), Relaxed);
        self.measurements.store(before.saturating_add(1), Relaxed);
    }
}

/// How an endpoint is, in a word, and why.
pub fn describe(endpoint: &Endpoint, now: Moment) -> (&'static str, String) {
    let (failures, ejections) = endpoint.health.counts();
    let left = |until: Moment| format!("{:.1}s", until.since(now).as_secs_f64());
    match endpoint.standing(now) {
        Standing::Usable if endpoint.health.is_failing() => {
            ("failing", format!("{failures} failures in a row, but it is the last one, so it is still tried"))
        }
        Standing::Usable if failures == 0 => ("usable", "no failure since the last success".to_owned()),
        Standing::Usable => ("usable", format!("{failures} failures in a row")),
        Standing::Resting { until } => ("resting", format!("asked to be left alone for another {}", left(until))),
        Standing::TrialDue => ("trial_due", "its ejection is over; one request may try it".to_owned()),
        Standing::Ejected { until } if until <= now => (
            "ejected",
            format!("ejection number {ejections} is over; the next good health check, or the trial under way, brings it back"),
        ),
        Standing::Ejected { until } => ("ejected", format!("ejection number {ejections}, for another {}", left(until))),
        Standing::Down => ("down", "health checks say so".to_owned()),
    }
}

/// Takes one of `limit` places of `counter`; false if none is left.
fn take(counter: &AtomicU32, limit: Option<u32>) -> bool {
    match limit {
        None => {
            counter.fetch_add(1, SeqCst);
            true
        }
        Some(limit) => counter.fetch_update(SeqCst, SeqCst, |n| (n < limit).then_some(n + 1)).is_ok(),
    }
}

/// A request's place at an endpoint and in its region. Dropping it gives it back, and wakes who waits for it.
#[derive(Debug)]
pub struct Slot {
    endpoint: Arc<Endpoint>,
    region: Arc<super::control::RegionState>,
}

impl Slot {
    /// Takes a place; nothing if one of the limits is reached.
    pub fn take(
        endpoint: &Arc<Endpoint>,
        limit: Option<u32>,
        region: &Arc<super::control::RegionState>,
        region_limit: Option<u32>,
    ) -> Option<Self> {
        if !take(&region.in_flight, region_limit) {
            return None;
        }
        if !take(&endpoint.in_flight, limit) {
            region.left();
            return None;
        }
        Some(Self { endpoint: endpoint.clone(), region: region.clone() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.endpoint.in_flight.fetch_sub(1, SeqCst);
        self.region.left();
    }
}

/// What is known of an upstream, across reloads.
#[derive(Debug)]
pub struct UpstreamState {
    /// Whom it is about.
    pub url: UpstreamUrl,
    /// How often one of its addresses was ejected.
    pub ejections: Arc<AtomicU64>,
    /// Where it listens; empty until its name was resolved.
    endpoints: ArcSwap<Vec<Arc<Endpoint>>>,
    /// Those that DNS told earlier: a name may tell a few of many, in turn, and what is known of one must not be
    /// lost until it is told again.
    earlier: Mutex<Vec<Arc<Endpoint>>>,
    /// What DNS said last.
    pub dns: Dns,
    key: Arc<Key>,
}

/// The state of an upstream's name.
#[derive(Debug, Default)]
pub struct Dns {
    /// The name is being asked for.
    pub asking: AtomicBool,
    /// The last answer is older than it allowed: what is used now may be out of date.
    pub stale: AtomicBool,
    /// When to ask again.
    pub due: Mutex<Moment>,
}

impl UpstreamState {
    /// Nothing is known yet; an address needs no resolving.
    pub fn new(url: UpstreamUrl, key: Arc<Key>) -> Self {
        let address = match (url.ip(), url.socket()) {
            (Some(ip), _) => Some(Address::Inet(SocketAddr::new(ip, url.port))),
            (None, Some(path)) => Some(Address::Unix(path.into())),
            (None, None) => None,
        };
        let ejections = Arc::default();
        let endpoints = address.map(|address| Arc::new(Endpoint::new(&url, address, (1, false), &key, &ejections)));
        Self {
            ejections,
            url,
            endpoints: ArcSwap::from_pointee(endpoints.into_iter().collect()),
            earlier: Mutex::default(),
            dns: Dns::default(),
            key,
        }
    }

    /// Where it listens.
    pub fn endpoints(&self) -> arc_swap::Guard<Arc<Vec<Arc<Endpoint>>>> {
        self.endpoints.load()
    }

    /// The endpoint that a cookie stands for.
    pub fn tagged(&self, tag: &str) -> Option<Arc<Endpoint>> {
        self.endpoints.load().iter().find(|e| same(&e.tag, tag)).cloned()
    }

    /// Is there an address to connect to?
    pub fn is_resolved(&self) -> bool {
        !self.endpoints.load().is_empty()
    }

    /// Takes a fresh answer; an empty one is none, and the last good one stays. What is known of an address
    /// that is still in it is kept.
    pub fn resolved(&self, mut answer: Vec<Resolved>) {
        answer.sort_unstable();
        answer.dedup_by(|a, b| a.address == b.address);
        answer.truncate(MAX_ADDRESSES);
        if answer.is_empty() {
            return;
        }
        let old = self.endpoints.load_full();
        let mut earlier = self.earlier.lock();
        let endpoint = |r: &Resolved| {
            let address = Address::Inet(r.address);
            let Some(known) = old.iter().chain(earlier.iter()).find(|e| e.address == address) else {
                return Arc::new(Endpoint::new(&self.url, address, (r.weight, r.backup), &self.key, &self.ejections));
            };
            known.weight.store(r.weight, Relaxed);
            known.backup.store(r.backup, Relaxed);
            known.clone()
        };
        let new: Vec<_> = answer.iter().map(endpoint).collect();
        earlier.extend(old.iter().cloned());
        earlier.retain(|e| new.iter().all(|n| !Arc::ptr_eq(n, e)));
        let surplus = earlier.len().saturating_sub(MAX_ADDRESSES);
        earlier.drain(..surplus);
        self.endpoints.store(Arc::new(new));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    fn state(url: &str) -> UpstreamState {
        UpstreamState::new(url.parse().unwrap(), Arc::new(Key::new(b"k")))
    }

    fn resolved(address: &str) -> Resolved {
        Resolved { address: address.parse().unwrap(), weight: 1, backup: false }
    }

    #[test]
    fn the_last_good_answer_stays_and_known_addresses_keep_their_health() {
        let state = state("http://origin.example.com:80");
        assert!(!state.is_resolved());
        state.resolved(vec![resolved("192.0.2.2:80"), resolved("192.0.2.1:80"), resolved("192.0.2.1:80")]);
        state.resolved(vec![]);
        let before = state.endpoints().clone();
        assert_eq!(before.iter().map(|e| e.address.to_string()).collect::<Vec<_>>(), ["192.0.2.1:80", "192.0.2.2:80"]);
        state.resolved(vec![resolved("192.0.2.3:80"), resolved("192.0.2.2:80")]);
        let after = state.endpoints().clone();
        assert!(Arc::ptr_eq(&before[1], &after[0]) && after.len() == 2);
        assert_ne!(after[0].tag, after[1].tag);
        // A weight that changes is no new endpoint, and one that comes back is known.
        state.resolved(vec![Resolved { weight: 7, ..resolved("192.0.2.1:80") }]);
        let back = state.endpoints().clone();
        assert!(Arc::ptr_eq(&before[0], &back[0]) && back[0].weight() == 7);
    }

    #[test]
    fn checks_and_traffic_are_combined_by_one_rule() {
        let state = state("http://127.0.0.1:80");
        let endpoint = state.endpoints()[0].clone();
        let fail = |now| {
            for _ in 0..health::FAILURES {
                endpoint.health.failure(at(now), || false);
            }
        };
        // 1. Down by checks, whatever traffic says.
        endpoint.active.switch(1);
        for _ in 0..3 {
            endpoint.checked(false, 3, 2, at(1));
        }
        endpoint.success(at(2), at(2));
        assert_eq!(endpoint.standing(at(2)), Standing::Down);
        endpoint.checked(true, 3, 2, at(3));
        assert_eq!(endpoint.standing(at(3)), Standing::Down, "rise: 2");
        endpoint.checked(true, 3, 2, at(4));
        assert_eq!(endpoint.standing(at(4)), Standing::Usable);
        // 2. Ejected by traffic, whatever checks say.
        fail(10);
        endpoint.checked(true, 3, 2, at(11));
        assert!(matches!(endpoint.standing(at(11)), Standing::Ejected { .. }));
        // 3. With checks no request is risked; a check brings it back.
        assert!(matches!(endpoint.standing(at(5_010)), Standing::Ejected { .. }));
        endpoint.checked(false, 3, 2, at(5_011));
        assert!(matches!(endpoint.standing(at(5_011)), Standing::Ejected { .. }), "a bad answer does not");
        endpoint.checked(true, 3, 2, at(5_012));
        assert_eq!(endpoint.standing(at(5_012)), Standing::Usable);
        // 4. By and by.
        let slow = Duration::from_secs(10);
        assert_eq!(
            [endpoint.ramp(slow, at(5_012)), endpoint.ramp(slow, at(10_012)), endpoint.ramp(slow, at(20_000))],
            [0.1, 0.5, 1.0]
        );
        assert_eq!(endpoint.ramp(Duration::ZERO, at(5_012)), 1.0);
        // Without checks one request tries it.
        endpoint.active.switch(0);
        fail(30_000);
        assert_eq!(endpoint.standing(at(45_000)), Standing::TrialDue);
    }

    #[test]
    fn a_time_to_first_byte_is_known_after_a_while_and_forgotten_after_a_pause() {
        let state = state("http://127.0.0.1:80");
        let endpoint = &state.endpoints()[0];
        let ms = Duration::from_millis;
        endpoint.measured(ms(500), at(1));
        assert_eq!(endpoint.first_byte(at(1)), None, "once is not enough");
        (2..200).for_each(|i| endpoint.measured(ms(10), at(i)));
        assert!(
            endpoint.first_byte(at(200)).is_some_and(|us| (9_900..11_000).contains(&us)),
            "{:?}",
            endpoint.first_byte(at(200))
        );
        assert_eq!(endpoint.first_byte(at(10_200)), None);
        endpoint.measured(ms(80), at(20_000));
        assert_eq!(endpoint.first_byte(at(20_000)), None, "it begins anew");
    }

    #[test]
    fn a_rest_ends() {
        let state = state("http://127.0.0.1:80");
        let endpoint = &state.endpoints()[0];
        endpoint.rest(Duration::from_secs(3600), at(0));
        assert_eq!(endpoint.standing(at(1)), Standing::Resting { until: at(30_000) });
        assert_eq!(endpoint.standing(at(30_000)), Standing::Usable);
    }

    #[test]
    fn slots_are_counted_and_given_back() {
        let state = state("http://127.0.0.1:80");
        let endpoint = state.endpoints()[0].clone();
        let region = Arc::new(super::super::control::RegionState::default());
        let take = |limit, region_limit| Slot::take(&endpoint, limit, &region, region_limit);
        let (a, b) = (take(Some(2), Some(3)), take(Some(2), Some(3)));
        assert!(a.is_some() && b.is_some());
        assert!(take(Some(2), Some(3)).is_none() && take(None, Some(2)).is_none());
        assert_eq!((endpoint.in_flight(), region.in_flight()), (2, 2));
        drop((a, b));
        assert_eq!((endpoint.in_flight(), region.in_flight()), (0, 0));
    }
}
