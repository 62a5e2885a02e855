//! Too much at once: how many requests a client, a route and the process may have at the same time, which kinds of them
//! are let go first, and how many a region can answer ([`adaptive`]).
//!
//! Classes stand in the order of their importance. Each may fill a part of every bound: the first all of it, the next
//! less. Where there is too much the last finds no room first, and what it leaves is the others'.

pub mod adaptive;

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use parking_lot::{Mutex, MutexGuard};
use rustc_hash::FxHashMap;

use crate::limits::Prefixes;
use crate::rules::{Filter, View};

/// What is too much, by the configuration.
#[derive(Debug)]
pub struct Overload {
    /// Kinds of requests, the most important first; there is always one.
    pub classes: Box<[Class]>,
    /// The class of what no expression names.
    pub other: u8,
    /// Requests at once of one client.
    pub per_client: Option<u32>,
    /// Requests at once of all.
    pub total: Option<u32>,
    /// Connections at once of all.
    pub connections: Option<u32>,
    /// Connections at once from one address that is no trusted proxy.
    pub connections_per_client: Option<u32>,
    /// How much of an address is one client.
    pub prefixes: Prefixes,
    /// What is at once now; it outlives reloads.
    pub load: Arc<Load>,
}

/// A kind of requests.
#[derive(Debug)]
pub struct Class {
    /// Its name.
    pub name: Arc<str>,
    /// Which requests are of it; none: those that no other names.
    pub filter: Option<Filter>,
    /// The part that it may fill of every bound of regions, upstreams, routes and the process, in percent.
    pub share: Share,
}

/// A part in percent, 1 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(pub u8);

impl Share {
    /// All of it.
    pub const ALL: Self = Self(100);

    /// This part of `bound`; of something always something.
    pub fn of(self, bound: u32) -> u32 {
        let part = u64::from(bound) * u64::from(self.0) / 100;
        u32::try_from(part).unwrap_or(u32::MAX).max(bound.min(1))
    }
}

/// Why a request is let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shed {
    /// Its client has too many at once.
    Client,
    /// So has its route.
    Route,
    /// So has the process.
    Total,
    /// No region that could answer it has room, and the queue is full or too slow.
    Region,
    /// Its client, or everybody together, has too many connections.
    Connections,
}

impl Shed {
    /// Every reason.
    pub const ALL: [Self; 5] = [Self::Client, Self::Route, Self::Total, Self::Region, Self::Connections];

    /// In words.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Client => "its client has too many at once",
            Self::Route => "its route has too many at once",
            Self::Total => "all together have too many at once",
            Self::Region => "no region has room",
            Self::Connections => "there are too many connections",
        }
    }

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Route => "route",
            Self::Total => "total",
            Self::Region => "region",
            Self::Connections => "connections",
        }
    }
}

/// What is at once now.
#[derive(Debug, Default)]
pub struct Load {
    requests: Arc<AtomicU32>,
    clients: Clients,
    /// Connections by client.
    pub peers: Clients,
}

impl Load {
    /// Requests at once of all.
    pub fn requests(&self) -> u32 {
        self.requests.load(Relaxed)
    }
}

/// How many things clients have at once. As long as it has none there is nothing of a client here: the table is as
/// large as what is at once.
#[derive(Debug)]
pub struct Clients {
    hasher: RandomState,
    shards: Box<[Mutex<Shard>]>,
}

/// Counts by a client and its hash.
type Shard = FxHashMap<(u64, IpAddr), u32>;

/// Parts of the table, each with a lock of its own.
const SHARDS: usize = 64;

impl Default for Clients {
    fn default() -> Self {
        Self { hasher: RandomState::new(), shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }
}

impl Clients {
    /// A client's part of the table, and its key there. The hash is a part of that: the map's own hash is one that
    /// strangers could make collide.
    fn shard(&self, client: IpAddr) -> Option<(MutexGuard<'_, Shard>, (u64, IpAddr))> {
        let hash = self.hasher.hash_one(client);
        Some((self.shards.get(hash as usize % SHARDS)?.lock(), (hash, client)))
    }

    /// Takes one more for a client, unless it has `most` already.
    pub fn take(&self, client: IpAddr, most: u32) -> bool {
        let Some((mut shard, key)) = self.shard(client) else { return false };
        let count = shard.entry(key).or_default();
        if *count >= most {
            // It is not zero, unless nothing is allowed.
            return false;
        }
        *count += 1;
        true
    }

    /// How many a client has.
    pub fn has(&self, client: IpAddr) -> u32 {
        self.shard(client).and_then(|(shard, key)| shard.get(&key).copied()).unwrap_or(0)
    }

    /// Gives one back.
    pub fn give_back(&self, client: IpAddr) {
        let Some((mut shard, key)) = self.shard(client) else { return };
        if let Some(count) = shard.get_mut(&key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                shard.remove(&key);
            }
        }
    }

    /// Clients that have something.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Has nobody anything?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The places that a request takes. Dropping it gives them back.
#[derive(Debug, Default)]
pub struct Places {
    client: Option<(Arc<Load>, IpAddr)>,
    counts: [Option<Arc<AtomicU32>>; 2],
}

impl Drop for Places {
    fn drop(&mut self) {
        if let Some((load, ip)) = self.client.take() {
            load.clients.give_back(ip);
        }
        for count in self.counts.iter().flatten() {
            count.fetch_sub(1, Relaxed);
        }
    }
}

/// Takes a place, if there is one.
fn take(count: &AtomicU32, most: u32) -> bool {
    count.fetch_update(Relaxed, Relaxed, |n| (n < most).then_some(n + 1)).is_ok()
}

impl Overload {
    /// The class of a request, as a position. `view` is made only where an expression asks for it.
    pub fn class<'v, 'a: 'v>(&self, view: impl FnOnce() -> &'v View<'a>) -> u8 {
        if self.classes.iter().all(|class| class.filter.is_none()) {
            return self.other;
        }
        let view = view();
        let named = self.classes.iter().position(|class| class.filter.as_ref().is_some_and(|filter| filter.matches(view)));
        named.and_then(|at| u8::try_from(at).ok()).unwrap_or(self.other)
    }

    /// The part of every bound that a class may fill.
    pub fn share(&self, class: u8) -> Share {
        self.classes.get(usize::from(class)).map_or(Share::ALL, |class| class.share)
    }

    /// Takes the places that a request needs, or says which there is not. `route`: what its route has at once, and may.
    pub fn admit(&self, ip: IpAddr, class: u8, route: Option<(&Arc<AtomicU32>, u32)>) -> Result<Places, Shed> {
        let share = self.share(class);
        let mut places = Places::default();
        let [total, own] = &mut places.counts;
        if let Some(most) = self.total {
            if !take(&self.load.requests, share.of(most)) {
                return Err(Shed::Total);
            }
            *total = Some(self.load.requests.clone());
        }
        if let Some((count, most)) = route {
            if !take(count, share.of(most)) {
                return Err(Shed::Route);
            }
            *own = Some(count.clone());
        }
        if let Some(most) = self.per_client {
            let client = self.prefixes.network(ip);
            if !self.load.clients.take(client, most) {
                return Err(Shed::Client);
            }
            places.client = Some((self.load.clone(), client));
        }
        Ok(places)
    }

    /// Would it be admitted now? Nothing is taken.
    pub fn would_admit(&self, ip: IpAddr, class: u8, route: Option<(&Arc<AtomicU32>, u32)>) -> Result<(), Shed> {
        let share = self.share(class);
        let full = |count: &AtomicU32, most: u32| count.load(Relaxed) >= share.of(most);
        let client = self.prefixes.network(ip);
        match (self.total, route, self.per_client) {
            (Some(most), ..) if full(&self.load.requests, most) => Err(Shed::Total),
            (_, Some((count, most)), _) if full(count, most) => Err(Shed::Route),
            (.., Some(most)) if self.load.clients.has(client) >= most => Err(Shed::Client),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overload(classes: &[u8], per_client: Option<u32>, total: Option<u32>) -> Overload {
        let class = |share: &u8| Class { name: "c".into(), filter: None, share: Share(*share) };
        Overload {
            classes: classes.iter().map(class).collect(),
            other: 0,
            per_client,
            total,
            connections: None,
            connections_per_client: None,
            prefixes: Prefixes::default(),
            load: Arc::default(),
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_last_class_finds_no_room_first() {
        let overload = overload(&[100, 50], None, Some(10));
        let admit = |class| overload.admit(ip("192.0.2.1"), class, None);
        let low: Vec<_> = (0..5).map(|_| admit(1).unwrap()).collect();
        assert_eq!(admit(1).err(), Some(Shed::Total));
        let high: Vec<_> = (0..5).map(|_| admit(0).unwrap()).collect();
        assert_eq!(admit(0).err(), Some(Shed::Total));
        drop(low);
        assert_eq!(admit(1).err(), Some(Shed::Total), "five of ten are taken, whoever has them");
        assert_eq!(overload.would_admit(ip("192.0.2.1"), 1, None), Err(Shed::Total));
        assert_eq!(overload.would_admit(ip("192.0.2.1"), 0, None), Ok(()));
        drop(high);
        assert!(admit(1).is_ok() && overload.load.requests() == 0);
    }

    #[test]
    fn clients_and_routes_have_bounds_of_their_own() {
        let overload = overload(&[100], Some(2), None);
        let count = Arc::new(AtomicU32::new(0));
        let admit = |client| overload.admit(ip(client), 0, Some((&count, 3)));
        let places = [admit("192.0.2.1").unwrap(), admit("192.0.2.1").unwrap()];
        assert_eq!(admit("192.0.2.1").err(), Some(Shed::Client));
        assert_eq!(count.load(Relaxed), 2, "what was taken before is given back");
        let third = admit("2001:db8::1").unwrap();
        assert_eq!(admit("192.0.2.2").err(), Some(Shed::Route));
        assert_eq!(overload.load.clients.len(), 2);
        drop((places, third));
        assert!(overload.load.clients.is_empty() && count.load(Relaxed) == 0, "nothing is left of anybody");
        let v6 = [admit("2001:db8::1").unwrap(), admit("2001:db8::2").unwrap()];
        assert_eq!(admit("2001:db8::3").err(), Some(Shed::Client), "one /64 is one client");
        drop(v6);
    }

    #[test]
    fn shares() {
        assert_eq!([1, 2, 10, 1_000].map(|n| Share(50).of(n)), [1, 1, 5, 500]);
        assert_eq!((Share(1).of(5), Share(1).of(0), Share::ALL.of(u32::MAX)), (1, 0, u32::MAX));
    }
}
