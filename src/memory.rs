//! What decisions read and a reload must not lose: health, addresses, budgets, what was learned. Snapshots
//! hold on to their parts of it, so no request looks anything up here.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustls::crypto::ring::Ticketer;
use rustls::server::{ProducesTickets, ServerSessionMemoryCache, StoresServerSessions};

use crate::cache;
use crate::client::standing::Standing;
use crate::config::units::UpstreamUrl;
use crate::limits::Ledger;
use crate::listeners::acme;
use crate::overload::Load;
use crate::regions::control::{RegionState, Room};
use crate::regions::endpoint::UpstreamState;
use crate::regions::latency::Latency;
use crate::routes::budget::Budget;
use crate::signing::Key;
use crate::waf::challenge::Challenges;

/// Everything that is remembered, by what it is about.
#[derive(Debug)]
pub struct Memory {
    /// Signs cookies.
    pub key: Arc<Key>,
    /// What was learned for `policy: latency`.
    pub latency: Arc<Latency>,
    /// What clients did lately.
    pub standing: Arc<Standing>,
    /// Challenges that were made and answered.
    pub challenges: Arc<Challenges>,
    /// What is at once now.
    pub load: Arc<Load>,
    /// What proves names to authorities.
    pub acme: Arc<acme::Challenges>,
    /// What was purged of the cache.
    pub cache: Arc<cache::Known>,
    /// What limits remember; there once there is a limit.
    ledger: OnceLock<Arc<Ledger>>,
    settled: OnceLock<(u64, bool)>,
    room: Arc<Room>,
    upstreams: Mutex<HashMap<UpstreamUrl, Arc<UpstreamState>>>,
    regions: Mutex<HashMap<Box<str>, Arc<RegionState>>>,
    budgets: Mutex<HashMap<Box<str>, Arc<Budget>>>,
    routes: Mutex<HashMap<Box<str>, Arc<AtomicU32>>>,
    tickets: Mutex<HashMap<Box<str>, Arc<Tickets>>>,
}

/// How TLS sessions are taken up again, also by another thread or under another configuration.
#[derive(Debug)]
pub struct Tickets {
    /// Seals what clients keep; it changes its key by itself. None: the system had no random numbers for it.
    pub ticketer: Option<Arc<dyn ProducesTickets>>,
    /// What is kept here for clients that know no tickets.
    pub sessions: Arc<dyn StoresServerSessions>,
}

/// So many sessions of clients that know no tickets are kept, for each listener.
const SESSIONS: usize = 4096;

impl Memory {
    /// Nothing is known yet.
    pub fn new(key: Key) -> Self {
        Self {
            key: Arc::new(key),
            latency: Arc::default(),
            standing: Arc::default(),
            challenges: Arc::default(),
            load: Arc::default(),
            acme: Arc::default(),
            cache: Arc::default(),
            ledger: OnceLock::new(),
            settled: OnceLock::new(),
            room: Arc::default(),
            upstreams: Mutex::default(),
            regions: Mutex::default(),
            budgets: Mutex::default(),
            routes: Mutex::default(),
            tickets: Mutex::default(),
        }
    }

    /// Limits remember in at most `memory` bytes; `shared`: there are other nodes. The first who says so settles it.
    pub fn settle(&self, memory: u64, shared: bool) {
        self.settled.get_or_init(|| (memory, shared));
    }

    /// What limits remember. The memory is taken now, unless it was before.
    pub fn ledger(&self) -> Arc<Ledger> {
        let (memory, shared) = self.settled.get().copied().unwrap_or_default();
        self.ledger.get_or_init(|| Arc::new(Ledger::new(memory, &self.key, shared))).clone()
    }

    /// The same, if a limit was ever configured.
    pub fn known_ledger(&self) -> Option<Arc<Ledger>> {
        self.ledger.get().cloned()
    }

    /// What is known of an upstream.
    pub fn upstream(&self, url: &UpstreamUrl) -> Arc<UpstreamState> {
        known(&self.upstreams, url.clone(), || Arc::new(UpstreamState::new(url.clone(), self.key.clone())))
    }

    /// What is known of a region.
    pub fn region(&self, name: &str) -> Arc<RegionState> {
        known(&self.regions, name.into(), || Arc::new(RegionState::new(self.room.clone())))
    }

    /// What a route's retries spent.
    pub fn budget(&self, route: &str) -> Arc<Budget> {
        known(&self.budgets, route.into(), Arc::default)
    }

    /// How many requests of a route are at once.
    pub fn route(&self, route: &str) -> Arc<AtomicU32> {
        known(&self.routes, route.into(), Arc::default)
    }

    /// How sessions of a listener (by its address, which a reload cannot change) are taken up again.
    pub fn tickets(&self, listener: &str) -> Arc<Tickets> {
        known(&self.tickets, listener.into(), || {
            let ticketer = Ticketer::new().ok();
            Arc::new(Tickets { ticketer, sessions: ServerSessionMemoryCache::new(SESSIONS) })
        })
    }

    /// Every upstream.
    pub fn upstreams(&self) -> Vec<Arc<UpstreamState>> {
        self.upstreams.lock().values().cloned().collect()
    }

    /// Every region that there ever was, by name.
    pub fn regions(&self) -> Vec<(String, Arc<RegionState>)> {
        self.regions.lock().iter().map(|(name, state)| (name.to_string(), state.clone())).collect()
    }

    /// Forgets what nobody holds on to any more. Regions stay: an operator's order for one that is away for a
    /// reload must be there when it comes back; there are as many as were ever configured.
    pub fn tidy(&self) {
        self.upstreams.lock().retain(|_, state| Arc::strong_count(state) > 1);
        self.budgets.lock().retain(|_, budget| Arc::strong_count(budget) > 1);
        self.routes.lock().retain(|_, count| Arc::strong_count(count) > 1);
    }
}

fn known<K: Hash + Eq, V: Clone>(all: &Mutex<HashMap<K, V>>, key: K, new: impl FnOnce() -> V) -> V {
    all.lock().entry(key).or_insert_with(new).clone()
}
