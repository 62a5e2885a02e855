//! What a client did lately, as points that decay, and what its headers say of it.
//!
//! The points are half of `cf.threat_score`; lists with a `reputation` are the other. A table of fixed size:
//! when it is full, the address with the fewest points is forgotten.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::request::Moment;

/// After this time points count half.
pub const HALF_LIFE: Duration = Duration::from_secs(600);
/// Addresses in one set of the table.
const WAYS: usize = 4;
/// Sets: 65,536 addresses in 1 MiB.
const SETS: usize = 16 << 10;

/// Something a client did, and what it is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// A rule blocked it.
    Blocked,
    /// It answered a challenge wrongly, or with what was not its own.
    ChallengeFailed,
    /// It went over a limit.
    OverLimit,
    /// It answered a challenge.
    ChallengeSolved,
}

impl Deed {
    fn points(self) -> f32 {
        match self {
            Self::Blocked => 25.0,
            Self::ChallengeFailed => 20.0,
            Self::OverLimit => 15.0,
            Self::ChallengeSolved => -30.0,
        }
    }
}

/// What clients did lately.
pub struct Standing {
    hasher: RandomState,
    /// A tag of the address, never 0, and beside it its points and when they were counted.
    slots: Box<[(AtomicU64, AtomicU64)]>,
}

impl std::fmt::Debug for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Standing")
    }
}

impl Default for Standing {
    fn default() -> Self {
        let slots = (0..SETS * WAYS).map(|_| (AtomicU64::new(0), AtomicU64::new(0))).collect();
        Self { hasher: RandomState::new(), slots }
    }
}

/// Points at a moment, in one word: they are read and written as one.
fn pack(points: f32, at: Moment) -> u64 {
    let seconds = u32::try_from(at.0.as_secs()).unwrap_or(u32::MAX);
    u64::from(points.to_bits()) << 32 | u64::from(seconds)
}

fn points_at(packed: u64, now: Moment) -> f32 {
    let points = f32::from_bits((packed >> 32) as u32);
    let then = Moment(Duration::from_secs(packed & u64::from(u32::MAX)));
    let halvings = now.since(then).as_secs_f32() / HALF_LIFE.as_secs_f32();
    points * (-halvings).exp2()
}

impl Standing {
    /// The points of a client, 0 to 100.
    pub fn points(&self, ip: IpAddr, now: Moment) -> u8 {
        let (tag, set) = self.place(ip);
        let found = set.iter().find(|(key, _)| key.load(Relaxed) == tag);
        // A float that is out of range becomes the nearest number.
        found.map_or(0, |(_, points)| points_at(points.load(Relaxed), now).clamp(0.0, 100.0).round() as u8)
    }

    /// Remembers a deed. Two at the very same time may count as one.
    pub fn note(&self, ip: IpAddr, deed: Deed, now: Moment) {
        let (tag, set) = self.place(ip);
        let known = set.iter().find(|(key, _)| key.load(Relaxed) == tag);
        if known.is_none() && deed.points() <= 0.0 {
            return;
        }
        let weight = |slot: &&(AtomicU64, AtomicU64)| points_at(slot.1.load(Relaxed), now);
        let Some((key, points)) = known.or_else(|| set.iter().min_by(|a, b| weight(a).total_cmp(&weight(b)))) else { return };
        let before = if known.is_some() { points_at(points.load(Relaxed), now) } else { 0.0 };
        points.store(pack((before + deed.points()).clamp(0.0, 100.0), now), Relaxed);
        key.store(tag, Relaxed);
    }

    fn place(&self, ip: IpAddr) -> (u64, &[(AtomicU64, AtomicU64)]) {
        let hash = self.hasher.hash_one(prefix(ip));
        let set = (hash as usize % SETS) * WAYS;
        (hash | 1, self.slots.get(set..set + WAYS).unwrap_or_default())
    }
}

/// Whom an address stands for: itself, or with IPv6 its /64, which one host has for itself (RFC 6177).
pub fn prefix(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() >> 64 << 64).into()),
    }
}

/// Words in the user agents of programs that say what they are.
const AUTOMATED: [&[u8]; 14] = [
    b"bot",
    b"crawl",
    b"spider",
    b"curl/",
    b"wget/",
    b"python",
    b"go-http",
    b"java/",
    b"okhttp",
    b"libwww",
    b"axios",
    b"headless",
    b"scrapy",
    b"node-fetch",
];

/// Does this user agent say that it is a program?
pub fn looks_automated(agent: &[u8]) -> bool {
    let lower = agent.to_ascii_lowercase();
    AUTOMATED.iter().any(|word| memchr::memmem::find(&lower, word).is_some())
}

/// Extensions of what is the same for everybody.
const STATIC: [&str; 28] = [
    "avif", "bmp", "css", "csv", "eot", "gif", "gz", "ico", "jpeg", "jpg", "js", "mjs", "mp3", "mp4", "ogg", "otf", "pdf", "png",
    "svg", "tif", "tiff", "ttf", "txt", "webm", "webp", "woff", "woff2", "zip",
];

/// Is this the extension of something that is the same for everybody?
pub fn is_static(extension: &str) -> bool {
    STATIC.binary_search(&extension).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_decay() {
        let standing = Standing::default();
        let at = |seconds| Moment(Duration::from_secs(seconds));
        let ip: IpAddr = "192.0.2.1".parse().unwrap();
        assert_eq!(standing.points(ip, at(0)), 0);
        standing.note(ip, Deed::ChallengeSolved, at(0));
        assert_eq!(standing.points(ip, at(0)), 0, "nobody has credit");
        standing.note(ip, Deed::Blocked, at(0));
        standing.note(ip, Deed::Blocked, at(0));
        assert_eq!([at(0), at(600), at(1200)].map(|t| standing.points(ip, t)), [50, 25, 13]);
        standing.note(ip, Deed::ChallengeSolved, at(600));
        assert_eq!(standing.points(ip, at(600)), 0);
        for _ in 0..9 {
            standing.note(ip, Deed::ChallengeFailed, at(600));
        }
        assert_eq!(standing.points(ip, at(600)), 100, "and no more");
        let six = |text: &str| text.parse::<IpAddr>().unwrap();
        standing.note(six("2001:db8::1"), Deed::Blocked, at(0));
        assert_eq!(standing.points(six("2001:db8::2"), at(0)), 25, "one /64 is one client");
        assert_eq!(standing.points(six("2001:db8:0:1::1"), at(0)), 0);
    }

    #[test]
    fn the_table_is_bounded() {
        let standing = Standing::default();
        let bad: IpAddr = "203.0.113.9".parse().unwrap();
        for _ in 0..4 {
            standing.note(bad, Deed::Blocked, Moment::default());
        }
        for n in 0..300_000u32 {
            standing.note(IpAddr::V4(n.into()), Deed::ChallengeFailed, Moment::default());
        }
        assert_eq!(standing.points(bad, Moment::default()), 100, "a flood of others does not clear its name");
    }

    #[test]
    fn tables_are_sorted() {
        assert!(STATIC.is_sorted());
        assert!(looks_automated(b"Mozilla/5.0 (compatible; Googlebot/2.1)") && !looks_automated(b"Mozilla/5.0 (X11)"));
    }
}
