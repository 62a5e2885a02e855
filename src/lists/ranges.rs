//! Sets of addresses as sorted ranges: small, exact, and searched by halving.

use std::cmp::Ordering;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// An inclusive range of addresses of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpRange {
    /// IPv4.
    V4(Ipv4Addr, Ipv4Addr),
    /// IPv6.
    V6(Ipv6Addr, Ipv6Addr),
}

impl IpRange {
    /// From two addresses; nothing if they are of two families or the wrong way round.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        match (first, last) {
            (IpAddr::V4(a), IpAddr::V4(b)) if a <= b => Some(Self::V4(a, b)),
            (IpAddr::V6(a), IpAddr::V6(b)) if a <= b => Some(Self::V6(a, b)),
            _ => None,
        }
    }
}

impl From<IpNet> for IpRange {
    fn from(net: IpNet) -> Self {
        match net {
            IpNet::V4(net) => Self::V4(net.network(), net.broadcast()),
            IpNet::V6(net) => Self::V6(net.network(), net.broadcast()),
        }
    }
}

impl From<IpAddr> for IpRange {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::V4(ip, ip),
            IpAddr::V6(ip) => Self::V6(ip, ip),
        }
    }
}

/// A set of addresses. IPv4 and IPv6 are apart: a mapped address has to be unmapped before it is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IpSet {
    v4: Sorted<u32>,
    v6: Sorted<u128>,
}

impl FromIterator<IpRange> for IpSet {
    fn from_iter<I: IntoIterator<Item = IpRange>>(ranges: I) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for range in ranges {
            match range {
                IpRange::V4(a, b) => v4.push((a.to_bits(), b.to_bits())),
                IpRange::V6(a, b) => v6.push((a.to_bits(), b.to_bits())),
            }
        }
        Self { v4: Sorted::new(v4), v6: Sorted::new(v6) }
    }
}

impl IpSet {
    /// Is the address in it?
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.contains(ip.to_bits()),
            IpAddr::V6(ip) => self.v6.contains(ip.to_bits()),
        }
    }

    /// How many ranges are left after those that touch were joined.
    pub fn len(&self) -> usize {
        self.v4.0.len() + self.v6.0.len()
    }

    /// Is nothing in it?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A whole number that ranges are made of.
pub trait Bound: Copy + Ord {
    /// The greatest.
    const MAX: Self;
    /// The next one; nothing after the greatest.
    fn next(self) -> Option<Self>;
    /// The one before; nothing before the least.
    fn previous(self) -> Option<Self>;
}

macro_rules! bound {
    ($($type:ty),*) => { $(impl Bound for $type {
        const MAX: Self = <$type>::MAX;
        fn next(self) -> Option<Self> {
            self.checked_add(1)
        }
        fn previous(self) -> Option<Self> {
            self.checked_sub(1)
        }
    })* };
}
bound!(u32, u128, i64);

/// Inclusive ranges in order; none touches another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sorted<T>(Box<[(T, T)]>);

impl<T: Bound> Sorted<T> {
    /// Sorts and joins.
    pub fn new(mut ranges: Vec<(T, T)>) -> Self {
        ranges.sort_unstable();
        let mut joined: Vec<(T, T)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match joined.last_mut() {
                Some((_, end)) if end.next().is_none_or(|next| first <= next) => *end = (*end).max(last),
                _ => joined.push((first, last)),
            }
        }
        Self(joined.into())
    }

    /// Is it in one of them?
    pub fn contains(&self, value: T) -> bool {
        find(&self.0, value, |(first, last)| (*first, *last)).is_some()
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn find<T: Ord, R>(ranges: &[R], value: T, of: impl Fn(&R) -> (T, T)) -> Option<&R> {
    let found = ranges.binary_search_by(|range| match of(range) {
        (_, last) if last < value => Ordering::Less,
        (first, _) if first > value => Ordering::Greater,
        _ => Ordering::Equal,
    });
    ranges.get(found.ok()?)
}

/// Addresses with a score each, 1 to 100; where ranges overlap the greatest counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scores {
    v4: Box<[(u32, u32, u8)]>,
    v6: Box<[(u128, u128, u8)]>,
}

impl FromIterator<(IpRange, u8)> for Scores {
    fn from_iter<I: IntoIterator<Item = (IpRange, u8)>>(ranges: I) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (range, score) in ranges {
            match range {
                IpRange::V4(a, b) => v4.push((a.to_bits(), b.to_bits(), score)),
                IpRange::V6(a, b) => v6.push((a.to_bits(), b.to_bits(), score)),
            }
        }
        Self { v4: flatten(v4), v6: flatten(v6) }
    }
}

impl Scores {
    /// The score of an address; 0 if it is not listed.
    pub fn of(&self, ip: IpAddr) -> u8 {
        let found = match ip {
            IpAddr::V4(ip) => find(&self.v4, ip.to_bits(), |(a, b, _)| (*a, *b)).map(|r| r.2),
            IpAddr::V6(ip) => find(&self.v6, ip.to_bits(), |(a, b, _)| (*a, *b)).map(|r| r.2),
        };
        found.unwrap_or(0)
    }
}

/// Ranges that overlap, as ranges that do not: each stretch has the greatest score of those that cover it.
fn flatten<T: Bound>(ranges: Vec<(T, T, u8)>) -> Box<[(T, T, u8)]> {
    // What begins or ends where. A range to the very end of the family never ends.
    let begins = ranges.iter().map(|(first, _, score)| (*first, true, *score));
    let ends = ranges.iter().filter_map(|(_, last, score)| Some((last.next()?, false, *score)));
    let mut events: Vec<_> = begins.chain(ends).collect();
    events.sort_unstable();
    let mut open = [0usize; 256];
    let mut flat: Vec<(T, T, u8)> = Vec::new();
    let mut running: Option<(T, u8)> = None;
    let mut events = events.into_iter().peekable();
    let score_of = |open: &[usize; 256]| open.iter().rposition(|n| *n > 0).and_then(|s| u8::try_from(s).ok()).unwrap_or(0);
    while let Some((at, begins, score)) = events.next() {
        if let Some(n) = open.get_mut(usize::from(score)) {
            *n = if begins { *n + 1 } else { n.saturating_sub(1) };
        }
        if events.peek().is_some_and(|(next, ..)| *next == at) {
            continue;
        }
        let now = score_of(&open);
        let before = running.map_or(0, |(_, score)| score);
        if now != before {
            if let (Some((first, score)), Some(last)) = (running.filter(|(_, s)| *s > 0), at.previous()) {
                flat.push((first, last, score));
            }
            running = Some((at, now));
        }
    }
    if let Some((first, score)) = running.filter(|(_, score)| *score > 0) {
        flat.push((first, T::MAX, score));
    }
    flat.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn net(text: &str) -> IpRange {
        IpRange::from(text.parse::<IpNet>().unwrap())
    }

    #[test]
    fn membership() {
        let set: IpSet = [net("192.0.2.0/24"), net("192.0.3.0/24"), net("2001:db8::/32"), IpRange::from(ip("10.0.0.1"))]
            .into_iter()
            .chain(IpRange::new(ip("198.51.100.4"), ip("198.51.100.9")))
            .collect();
        assert_eq!(set.len(), 4, "neighbours are joined");
        for inside in ["192.0.2.0", "192.0.3.255", "2001:db8::1", "10.0.0.1", "198.51.100.4", "198.51.100.9"] {
            assert!(set.contains(ip(inside)), "{inside}");
        }
        for outside in ["192.0.1.255", "192.0.4.0", "2001:db9::", "10.0.0.2", "198.51.100.3", "198.51.100.10", "::1", "0.0.0.0"] {
            assert!(!set.contains(ip(outside)), "{outside}");
        }
        let all: IpSet = [net("0.0.0.0/0"), net("::/0"), net("1.0.0.0/8")].into_iter().collect();
        assert!(all.contains(ip("255.255.255.255")) && all.contains(ip("ffff::")) && all.len() == 2);
        assert!(IpRange::new(ip("10.0.0.2"), ip("10.0.0.1")).is_none() && IpRange::new(ip("10.0.0.2"), ip("::1")).is_none());
    }

    proptest! {
        #[test]
        fn scores_are_the_greatest_of_what_covers(ranges in prop::collection::vec((0u8..40, 0u8..12, 1u8..=100), 0..12)) {
            let address = |n: u32| Ipv4Addr::from_bits(u32::MAX - 50 + n);
            let ranges: Vec<_> = ranges.iter().map(|(a, len, s)| (u32::from(*a), u32::from(*a + *len).min(50), *s)).collect();
            let scores: Scores = ranges.iter().map(|(a, b, s)| (IpRange::V4(address(*a), address(*b)), *s)).collect();
            for n in 0..=50 {
                let expected = ranges.iter().filter(|(a, b, _)| (*a..=*b).contains(&n)).map(|r| r.2).max().unwrap_or(0);
                prop_assert_eq!(scores.of(address(n).into()), expected, "{}", n);
            }
            let set: IpSet = ranges.iter().map(|(a, b, _)| IpRange::V4(address(*a), address(*b))).collect();
            for n in 0..=50 {
                prop_assert_eq!(set.contains(address(n).into()), scores.of(address(n).into()) > 0);
            }
        }
    }
}
