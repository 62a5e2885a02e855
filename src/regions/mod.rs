//! Where a request may go: countries to regions in order, and how each upstream is doing.

pub mod health;
pub mod steering;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::config::units::UpstreamUrl;
use health::UpstreamState;

/// A region by its position in the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u16);

/// A region that can run.
#[derive(Debug)]
pub struct Region {
    /// Its name.
    pub name: Arc<str>,
    /// Its upstreams.
    pub upstreams: Box<[Upstream]>,
    /// One turn of the smooth weighted round robin, as positions in `upstreams`.
    schedule: Box<[u16]>,
    cursor: AtomicUsize,
}

/// An upstream that can run.
#[derive(Debug)]
pub struct Upstream {
    /// Where it listens.
    pub url: UpstreamUrl,
    /// Its share.
    pub weight: u32,
    /// `Host` to send in place of the client's.
    pub host: Option<http::HeaderValue>,
    /// How its certificate is verified; `None` without TLS.
    pub tls: Option<Tls>,
    /// Connections are shared between upstreams with this in common: what they verify with.
    pub pool: u64,
    /// Health and addresses; they outlive a reload.
    pub state: Arc<UpstreamState>,
}

/// How an upstream's certificate is verified.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tls {
    /// The name to ask for and to verify.
    pub sni: String,
    /// Authorities in DER to trust in place of the system's.
    pub authorities: Option<Arc<[Vec<u8>]>>,
}

impl Region {
    /// A region of at least one upstream.
    pub fn new(name: Arc<str>, upstreams: Box<[Upstream]>) -> Self {
        let schedule = schedule(&upstreams.iter().map(|u| u.weight).collect::<Vec<_>>());
        Self { name, upstreams, schedule, cursor: AtomicUsize::new(0) }
    }

    /// Takes this region's next turn. Any number may come, wrapping around.
    pub fn turn(&self) -> usize {
        self.cursor.fetch_add(1, Ordering::Relaxed)
    }

    /// The turn that comes next, without taking it.
    pub fn peek_turn(&self) -> usize {
        self.cursor.load(Ordering::Relaxed)
    }

    /// The upstreams in the order in which turn number `turn` would try them; some come several times.
    pub fn from_turn(&self, turn: usize) -> impl Iterator<Item = (u16, &Upstream)> {
        let len = self.schedule.len().max(1);
        let (head, tail) = self.schedule.split_at((turn % len).min(self.schedule.len()));
        tail.iter().chain(head).filter_map(|i| Some((*i, self.upstreams.get(usize::from(*i))?)))
    }
}

/// Smooth weighted round robin, as nginx does it: in each step everybody gains its weight, the
/// greatest goes and pays the sum. Weights 5, 1, 1 give a a b a c a a.
fn schedule(weights: &[u32]) -> Box<[u16]> {
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

#[cfg(test)]
mod tests {
    use super::schedule;

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
}
