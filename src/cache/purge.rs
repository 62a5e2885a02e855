//! What was purged: a log of times, against which every hit is held. To purge a million objects is to write one
//! line; none of them can come back, from disk or out of a fetch that began before.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// So many lines are kept; the oldest of more become one for everything that is as old as they are.
const LINES: usize = 100_000;

/// What is purged.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// Everything.
    Everything,
    /// One URL, with all its variants: host, path and query, without a scheme.
    Url(String),
    /// Every URL that begins so: host and the beginning of a path.
    Prefix(String),
    /// Every URL of a host.
    Host(String),
    /// Everything that carries this tag.
    Tag(String),
}

/// An order to purge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purge {
    /// What.
    pub what: What,
    /// It stays, as stale: it may be served while it is fetched again, and where that fails.
    #[serde(default)]
    pub soft: bool,
    /// When, in milliseconds since 1970: what was asked for until then is purged.
    pub at: u64,
}

/// What a purge says of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purged {
    /// It is as if it had never been.
    Gone,
    /// It is stale since then.
    Stale(SystemTime),
}

/// The last times at which something was purged, in milliseconds since 1970; 0: never.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Mark {
    hard: u64,
    soft: u64,
}

impl Mark {
    fn add(&mut self, soft: bool, at: u64) {
        let time = if soft { &mut self.soft } else { &mut self.hard };
        *time = (*time).max(at);
    }

    fn latest(self) -> u64 {
        self.hard.max(self.soft)
    }

    fn and(self, other: Self) -> Self {
        Self { hard: self.hard.max(other.hard), soft: self.soft.max(other.soft) }
    }
}

/// Every purge that may still matter.
#[derive(Debug, Clone, Default)]
struct Log {
    all: Mark,
    urls: HashMap<Box<str>, Mark>,
    hosts: HashMap<Box<str>, Mark>,
    tags: HashMap<Box<str>, Mark>,
    prefixes: BTreeMap<Box<str>, Mark>,
}

impl Log {
    fn add(&mut self, purge: &Purge) {
        let Purge { what, soft, at } = purge;
        let mark = match what {
            What::Everything => &mut self.all,
            What::Url(url) => self.urls.entry(url.as_str().into()).or_default(),
            What::Prefix(prefix) => self.prefixes.entry(prefix.as_str().into()).or_default(),
            What::Host(host) => self.hosts.entry(host.as_str().into()).or_default(),
            What::Tag(tag) => self.tags.entry(tag.as_str().into()).or_default(),
        };
        mark.add(*soft, *at);
    }

    fn lines(&self) -> usize {
        self.urls.len() + self.hosts.len() + self.tags.len() + self.prefixes.len()
    }

    /// Makes one line of the older half.
    fn shorten(&mut self) {
        let maps = [&self.urls, &self.hosts, &self.tags];
        let marks = maps.into_iter().flat_map(HashMap::values).chain(self.prefixes.values());
        let mut times: Vec<u64> = marks.map(|mark| mark.latest()).collect();
        let middle = times.len() / 2;
        let (_, until, _) = times.select_nth_unstable(middle);
        let until = *until;
        self.all.add(false, until);
        for map in [&mut self.urls, &mut self.hosts, &mut self.tags] {
            map.retain(|_, mark| mark.latest() > until);
        }
        self.prefixes.retain(|_, mark| mark.latest() > until);
    }

    fn mark<'t>(&self, url: &str, tags: impl Iterator<Item = &'t str>) -> Mark {
        let mut mark = self.all;
        if !self.urls.is_empty() {
            mark = mark.and(self.urls.get(url).copied().unwrap_or_default());
        }
        if !self.hosts.is_empty() {
            mark = mark.and(self.hosts.get(host_of(url)).copied().unwrap_or_default());
        }
        if !self.tags.is_empty() {
            mark = tags.fold(mark, |mark, tag| mark.and(self.tags.get(tag).copied().unwrap_or_default()));
        }
        // Every prefix of `url` stands before it; each step skips what cannot be one.
        let mut upto = url;
        while let Some((prefix, found)) = self.prefixes.range::<str, _>((Bound::Unbounded, Bound::Included(upto))).next_back() {
            if url.starts_with(&**prefix) {
                mark = mark.and(*found);
                match prefix.char_indices().next_back().and_then(|(last, _)| prefix.get(..last)) {
                    Some(shorter) if !shorter.is_empty() => upto = shorter,
                    _ => break,
                }
            } else {
                let common = url.char_indices().zip(prefix.chars()).find(|((_, a), b)| a != b).map_or(0, |((at, _), _)| at);
                // Where there is no difference `prefix` is longer than `url`, which cannot be: it stands before it.
                match url.get(..common) {
                    Some(shorter) if !shorter.is_empty() && shorter.len() < upto.len() => upto = shorter,
                    _ => break,
                }
            }
        }
        mark
    }

    fn purges(&self) -> Vec<Purge> {
        let mut all = Vec::new();
        let mut add = |what: What, mark: &Mark| {
            for (soft, at) in [(false, mark.hard), (true, mark.soft)] {
                if at > 0 {
                    all.push(Purge { what: what.clone(), soft, at });
                }
            }
        };
        add(What::Everything, &self.all);
        self.urls.iter().for_each(|(url, mark)| add(What::Url(url.to_string()), mark));
        self.hosts.iter().for_each(|(host, mark)| add(What::Host(host.to_string()), mark));
        self.tags.iter().for_each(|(tag, mark)| add(What::Tag(tag.to_string()), mark));
        self.prefixes.iter().for_each(|(prefix, mark)| add(What::Prefix(prefix.to_string()), mark));
        all
    }
}

/// The host in `host/path?query`.
pub fn host_of(url: &str) -> &str {
    url.split('/').next().unwrap_or_default()
}

/// Milliseconds since 1970.
pub fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// The log. Hits read it without a lock.
#[derive(Debug, Default)]
pub struct Purges {
    log: ArcSwap<Log>,
    /// Held by whoever writes.
    writing: Mutex<()>,
}

impl Purges {
    /// Purges, from now on.
    pub fn apply(&self, purges: &[Purge]) {
        let _writing = self.writing.lock();
        let mut log = Log::clone(&self.log.load());
        purges.iter().for_each(|purge| log.add(purge));
        if log.lines() > LINES {
            log.shorten();
        }
        self.log.store(Arc::new(log));
    }

    /// Is an object purged that was asked for at `asked` (milliseconds since 1970)?
    pub fn check<'t>(&self, url: &str, tags: impl Iterator<Item = &'t str>, asked: u64) -> Option<Purged> {
        let mark = self.log.load().mark(url, tags);
        match () {
            _ if mark.hard >= asked && mark.hard > 0 => Some(Purged::Gone),
            _ if mark.soft >= asked && mark.soft > 0 => Some(Purged::Stale(UNIX_EPOCH + Duration::from_millis(mark.soft))),
            _ => None,
        }
    }

    /// The whole log.
    pub fn all(&self) -> Vec<Purge> {
        self.log.load().purges()
    }

    /// How many lines it has.
    pub fn lines(&self) -> usize {
        self.log.load().lines()
    }
}

/// URLs that an unsafe request made invalid (RFC 9111, section 4.4), by their hash: the last time of each. What is
/// forgotten counts as invalid until then.
#[derive(Debug)]
pub struct Invalidated {
    shards: [Shard; 64],
}

#[derive(Debug, Default)]
struct Shard {
    /// The last time of all. Whoever hits what is newer, as nearly everybody does, takes no lock.
    last: AtomicU64,
    times: Mutex<Times>,
}

#[derive(Debug, Default)]
struct Times {
    of: HashMap<u64, u64>,
    /// What was asked for until then is invalid, whatever it is.
    forgotten: u64,
}

/// URLs in one shard.
const URLS: usize = 4096;

impl Default for Invalidated {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Shard::default()) }
    }
}

impl Invalidated {
    fn shard(&self, hash: u64) -> &Shard {
        let [first, ..] = &self.shards;
        self.shards.get((hash % 64) as usize).unwrap_or(first)
    }

    /// What was asked for until `at` is invalid.
    pub fn add(&self, url: &str, at: u64) {
        let hash = crate::request::hash(url.as_bytes());
        let shard = self.shard(hash);
        let mut times = shard.times.lock();
        if times.of.len() >= URLS && !times.of.contains_key(&hash) {
            times.forgotten = times.of.values().copied().max().unwrap_or_default();
            times.of.clear();
        }
        times.of.insert(hash, at);
        shard.last.fetch_max(at, Relaxed);
    }

    /// Is it invalid, having been asked for at `asked`?
    pub fn check(&self, url: &str, asked: u64) -> bool {
        let hash = crate::request::hash(url.as_bytes());
        let shard = self.shard(hash);
        if shard.last.load(Relaxed) < asked {
            return false;
        }
        let times = shard.times.lock();
        times.forgotten >= asked || times.of.get(&hash).is_some_and(|at| *at >= asked)
    }
}
