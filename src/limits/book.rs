//! Names for what the table knows by a hash only: clients that came near a limit, and those that are refused for a
//! time. Requests come here seldom: once when a client has used half of what it may, once when its penalty begins.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use event_listener::Event;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::table::Handle;
use crate::request::Moment;

/// Clients near a limit whose names are kept.
const NAMES: usize = 16 << 10;
/// Penalties that are kept.
pub const BANS: usize = 64 << 10;
/// The longest that an offender is refused.
pub const LONGEST: Duration = Duration::from_secs(30 * 86_400);

/// A client that is refused for a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ban {
    /// The limit.
    pub limit: Arc<str>,
    /// The client, as [`super::Limit::describe`] puts it.
    pub key: Arc<str>,
    /// Until when.
    pub until: Moment,
}

/// The names.
#[derive(Debug, Default)]
pub struct Book {
    names: Mutex<FxHashMap<Handle, Arc<str>>>,
    bans: Mutex<FxHashMap<Handle, Ban>>,
    /// There is no room for names at the moment.
    full: AtomicBool,
    /// A penalty began or ended before its time.
    pub changed: Event,
}

impl Book {
    /// Is there room for names?
    pub fn has_room(&self) -> bool {
        !self.full.load(Relaxed)
    }

    /// Writes a client's name down, if there is room.
    pub fn note(&self, handle: Handle, key: Arc<str>) {
        let mut names = self.names.lock();
        if names.len() < NAMES || names.contains_key(&handle) {
            names.insert(handle, key);
        } else {
            self.full.store(true, Relaxed);
        }
    }

    /// A client's name, if it was written down.
    pub fn name(&self, handle: Handle) -> Option<Arc<str>> {
        let banned = || self.bans.lock().get(&handle).map(|ban| ban.key.clone());
        self.names.lock().get(&handle).cloned().or_else(banned)
    }

    /// Remembers a penalty, if there is room.
    pub fn ban(&self, handle: Handle, ban: Ban) {
        let mut bans = self.bans.lock();
        let longer = bans.get(&handle).is_none_or(|known| known.until < ban.until);
        if longer && (bans.len() < BANS || bans.contains_key(&handle)) {
            bans.insert(handle, ban);
            drop(bans);
            self.changed.notify(usize::MAX);
        }
    }

    /// Forgets a client.
    pub fn forget(&self, handle: Handle) {
        self.names.lock().remove(&handle);
        if self.bans.lock().remove(&handle).is_some() {
            self.changed.notify(usize::MAX);
        }
    }

    /// Penalties that have not ended, the one that ends last first.
    pub fn bans(&self, now: Moment) -> Vec<(Handle, Ban)> {
        let mut bans: Vec<_> = self.bans.lock().iter().map(|(handle, ban)| (*handle, ban.clone())).collect();
        bans.retain(|(_, ban)| ban.until > now);
        bans.sort_by(|(a, x), (b, y)| y.until.cmp(&x.until).then(a.cmp(b)));
        bans
    }

    /// How many penalties have not ended.
    pub fn banned(&self, now: Moment) -> usize {
        self.bans.lock().values().filter(|ban| ban.until > now).count()
    }

    /// Clients of this name.
    pub fn find(&self, key: &str) -> Vec<Handle> {
        let mut found: Vec<_> = self.names.lock().iter().filter(|(_, name)| ***name == *key).map(|(handle, _)| *handle).collect();
        found.extend(self.bans.lock().iter().filter(|(_, ban)| *ban.key == *key).map(|(handle, _)| *handle));
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Forgets penalties that ended, and the names of those that `known` does not know any more.
    pub fn tidy(&self, known: impl Fn(Handle) -> bool, now: Moment) {
        self.bans.lock().retain(|_, ban| ban.until > now);
        let named: Vec<_> = self.names.lock().keys().copied().collect();
        for handle in named.into_iter().filter(|handle| !known(*handle)) {
            self.names.lock().remove(&handle);
            self.full.store(false, Relaxed);
        }
    }
}
