//! Where a request may go: steering to regions in order, and how each region and upstream is doing.

pub mod active;
pub mod balance;
pub mod control;
pub mod endpoint;
pub mod health;
pub mod latency;
pub mod spill;
pub mod steering;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::client::atlas::Point;
use crate::config::HealthCheck;
use crate::config::ProxyVersion;
use crate::config::units::UpstreamUrl;
use crate::overload::Share;
use crate::overload::adaptive::Bounds;
use crate::request::Moment;
use balance::Balance;
use control::RegionState;
use endpoint::{Standing, UpstreamState};
use spill::Capacity;

/// A region by its position in the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u16);

/// A region that can run.
#[derive(Debug)]
pub struct Region {
    /// Its name.
    pub name: Arc<str>,
    /// Stands for it in hashes and in what was learned, across reloads.
    pub id: u64,
    /// Its upstreams.
    pub upstreams: Box<[Upstream]>,
    /// Where it is.
    pub location: Option<Point>,
    /// How requests are spread over its upstreams.
    pub balance: Balance,
    /// Keeps clients at one upstream.
    pub affinity: Option<Affinity>,
    /// Bounds of the requests at once.
    pub limits: Limits,
    /// Between what the bound moves that is found out.
    pub adaptive: Option<Bounds>,
    /// Requests that may wait for a place, and how long.
    pub queue: (u32, Duration),
    /// What comes back gets its full share after this long.
    pub slow_start: Duration,
    /// How its upstreams are asked how they are.
    pub check: Option<Arc<Check>>,
    /// What outlives a reload.
    pub state: Arc<RegionState>,
    /// One turn of the smooth weighted round robin, as positions in `upstreams`.
    pub schedule: Box<[u16]>,
}

/// A health check, and how it is told from others.
#[derive(Debug)]
pub struct Check {
    /// What was configured.
    pub config: HealthCheck,
    /// Never 0.
    pub digest: u64,
}

/// Bounds of the requests at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Never more.
    pub hard: Option<u32>,
    /// From here on others with room come first.
    pub soft: Option<u32>,
}

/// How much room is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Room {
    /// Enough.
    Enough,
    /// The soft limit is reached.
    Little,
    /// The hard limit is reached.
    None,
}

impl Limits {
    /// What requests may fill that may fill this part.
    pub fn shared(self, share: Share) -> Self {
        Self { hard: self.hard.map(|hard| share.of(hard)), soft: self.soft.map(|soft| share.of(soft)) }
    }

    /// The room that `in_flight` requests leave.
    pub fn room(self, in_flight: u32) -> Room {
        match (self.hard, self.soft) {
            (Some(hard), _) if in_flight >= hard => Room::None,
            (_, Some(soft)) if in_flight >= soft => Room::Little,
            _ => Room::Enough,
        }
    }
}

/// Keeps clients at one upstream by a cookie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Affinity {
    /// The cookie's name.
    pub cookie: String,
    /// A client whose upstream failed stays where it went.
    pub permanent: bool,
    /// What follows the value in `Set-Cookie`.
    pub attributes: String,
}

/// An upstream that can run.
#[derive(Debug)]
pub struct Upstream {
    /// Where it listens.
    pub url: UpstreamUrl,
    /// Its share.
    pub weight: u32,
    /// Used only while none of the others is usable.
    pub backup: bool,
    /// Bounds of the requests at once, for each of its addresses.
    pub limits: Limits,
    /// `Host` to send in place of the client's.
    pub host: Option<http::HeaderValue>,
    /// How its certificate is verified; `None` without TLS.
    pub tls: Option<Tls>,
    /// It is a folder of files.
    pub files: Option<Files>,
    /// Connections begin with who the client is.
    pub introduces: Option<ProxyVersion>,
    /// Connections are shared between upstreams with this in common: what they verify with.
    pub pool: u64,
    /// Health and addresses; they outlive a reload.
    pub state: Arc<UpstreamState>,
}

/// A folder of files.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Files {
    /// Its whole name.
    pub root: PathBuf,
    /// `index.html` of a folder is served in its place.
    pub index: bool,
}

/// How an upstream's certificate is verified, and what is shown to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tls {
    /// The name to ask for and to verify.
    pub sni: String,
    /// Authorities in DER to trust in place of the system's.
    pub authorities: Option<Arc<[Vec<u8>]>>,
    /// Our certificate.
    pub identity: Option<Arc<Identity>>,
}

/// A certificate of ours, and its key.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The certificate and its chain, in DER.
    pub chain: Vec<Vec<u8>>,
    /// The private key, in DER.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity([redacted])")
    }
}

impl Region {
    /// Its bounds at the moment, for requests that may fill this part of them.
    pub fn bounds(&self, share: Share) -> Limits {
        let found = self.adaptive.map(|bounds| self.state.adaptive.limit(bounds));
        let hard = match (self.limits.hard, found) {
            (Some(hard), Some(found)) => Some(hard.min(found)),
            (hard, found) => hard.or(found),
        };
        Limits { hard, soft: self.limits.soft }.shared(share)
    }

    /// How much of it is usable, and how much of that an operator leaves it. Backups count once nothing else
    /// is usable.
    pub fn capacity(&self, now: Moment) -> Capacity {
        let mut primary = Sums::default();
        let mut backup = Sums::default();
        for upstream in &self.upstreams {
            let weight = upstream.weight as f32;
            let endpoints = upstream.state.endpoints();
            if endpoints.is_empty() && !upstream.backup {
                primary.all += weight;
            }
            for endpoint in endpoints.iter() {
                let weight = weight * endpoint.weight() as f32;
                let (usable, ramp) = match endpoint.standing(now) {
                    Standing::Usable | Standing::Resting { until: _ } => (weight, endpoint.ramp(self.slow_start, now)),
                    // Somebody has to come near enough to try it.
                    Standing::TrialDue => (weight, 1.0),
                    Standing::Ejected { until: _ } | Standing::Down => (0.0, 0.0),
                };
                let sums = if upstream.backup || endpoint.backup() { &mut backup } else { &mut primary };
                sums.all += weight;
                sums.usable += usable;
                sums.ramped += usable * ramp;
            }
        }
        let sums = if primary.usable > 0.0 { primary } else { backup };
        let part = |of: f32, all: f32| if all > 0.0 { of / all } else { 0.0 };
        Capacity { usable: part(sums.usable, sums.all), ramp: part(sums.ramped, sums.usable), granted: self.state.share(now) }
    }

    /// Is at least one of its upstreams in good health?
    pub fn is_healthy(&self, now: Moment) -> bool {
        let healthy = |u: &Upstream| u.state.endpoints().iter().any(|e| e.is_healthy(now));
        self.upstreams.iter().any(healthy)
    }
}

/// The position at which weights, added up, exceed `point`; the last one that weighs anything if none does.
fn draw(weights: impl Iterator<Item = f32>, point: f32) -> Option<usize> {
    let mut left = point;
    let mut last = None;
    for (i, weight) in weights.enumerate().filter(|(_, weight)| *weight > 0.0) {
        last = Some(i);
        if left < weight {
            break;
        }
        left -= weight;
    }
    last
}

/// Weights, added up.
#[derive(Default)]
struct Sums {
    all: f32,
    usable: f32,
    ramped: f32,
}

/// Smooth weighted round robin, as nginx does it: in each step everybody gains its weight, the
/// greatest goes and pays the sum. Weights 5, 1, 1 give a a b a c a a.
pub fn schedule(weights: &[u32]) -> Box<[u16]> {
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    let weights: Vec<i64> = weights.iter().map(|w| i64::from(w / divisor)).collect();
    let sum: i64 = weights.iter().sum();
    let mut current = vec![0i64; weights.len()];
    (0..sum)
        .map(|_| {
            for (gained, weight) in current.iter_mut().zip(&weights) {
                *gained += weight;
            }
            // Of equals the first: `max_by_key` would take the last.
            let best = current.iter().enumerate().rev().max_by_key(|(_, gained)| **gained).map_or(0, |(i, _)| i);
            if let Some(paid) = current.get_mut(best) {
                *paid -= sum;
            }
            u16::try_from(best).unwrap_or(0)
        })
        .collect()
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Regions for the tests of this crate.
#[cfg(test)]
pub(crate) mod fixtures {
    use super::*;
    use crate::signing::Key;

    /// A region of these upstreams, in turn, without slow start.
    pub(crate) fn region(name: &str, urls: &[&str]) -> Region {
        let upstream = |url: &&str| {
            let url: UpstreamUrl = url.parse().unwrap();
            let state = Arc::new(UpstreamState::new(url.clone(), Arc::new(Key::new(b"test"))));
            let (limits, host, tls, files, introduces) = (Limits::default(), None, None, None, None);
            Upstream { url, weight: 1, backup: false, limits, host, tls, files, introduces, pool: 0, state }
        };
        Region {
            name: name.into(),
            id: crate::request::hash(name.as_bytes()),
            upstreams: urls.iter().map(upstream).collect(),
            location: None,
            balance: Balance::RoundRobin,
            affinity: None,
            adaptive: None,
            limits: Limits::default(),
            queue: (0, Duration::ZERO),
            slow_start: Duration::ZERO,
            check: None,
            state: Arc::default(),
            schedule: schedule(&vec![1; urls.len()]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Limits, Room, schedule};

    #[test]
    fn weights_are_spread_smoothly() {
        assert_eq!(*schedule(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(*schedule(&[10, 10]), [0, 1]);
        assert_eq!(*schedule(&[100]), [0]);
        for weights in [[3u32, 2, 7], [100, 99, 1]] {
            let turn = schedule(&weights);
            for (i, weight) in weights.iter().enumerate() {
                assert_eq!(turn.iter().filter(|t| usize::from(**t) == i).count(), *weight as usize);
            }
        }
    }

    #[test]
    fn room() {
        let limits = Limits { hard: Some(4), soft: Some(2) };
        assert_eq!([1, 2, 3, 4, 5].map(|n| limits.room(n)), [Room::Enough, Room::Little, Room::Little, Room::None, Room::None]);
        assert_eq!(Limits::default().room(u32::MAX), Room::Enough);
    }
}
