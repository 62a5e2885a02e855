//! What limits remember, whatever the configuration says of them.

use std::sync::atomic::AtomicBool;

use event_listener::Event;
use parking_lot::Mutex;
use siphasher::sip::SipHasher13;

use super::book::{Ban, Book};
use super::quota::{Count, Quota};
use super::table::{Entry, Handle, Table};
use crate::request::Moment;
use crate::signing::Key;

/// What limits remember.
#[derive(Debug)]
pub struct Ledger {
    /// What this process counted.
    pub table: Table,
    /// What other nodes counted, where there are others.
    pub others: Option<Table>,
    /// Names.
    pub book: Book,
    /// What other nodes shall hear.
    pub outbox: Outbox,
    /// Other nodes can be reached.
    pub connected: AtomicBool,
    pub(super) hasher: SipHasher13,
    numbers: Mutex<Vec<Box<str>>>,
}

/// What other nodes shall hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// A client used something of a limit.
    Count(Handle, u16),
    /// A penalty began.
    Ban(Handle, Ban),
    /// A client begins anew.
    Reset(Handle),
}

/// What other nodes shall hear of, in order. Bounded: what finds no room is told later, or ends by itself.
#[derive(Debug, Default)]
pub struct Outbox {
    news: Mutex<Vec<News>>,
    /// There is something.
    pub filled: Event,
    /// There is something that cannot wait.
    pub urgent: Event,
}

/// News that wait.
const OUTBOX: usize = 64 << 10;

impl Outbox {
    pub(super) fn put(&self, news: News, urgent: bool) -> bool {
        let mut all = self.news.lock();
        // Penalties and new beginnings find room where counts do not: those are told with the next request.
        let most = if matches!(news, News::Count(..)) { OUTBOX } else { OUTBOX * 2 };
        if all.len() >= most {
            return false;
        }
        all.push(news);
        drop(all);
        self.filled.notify(usize::MAX);
        if urgent {
            self.urgent.notify(usize::MAX);
        }
        true
    }

    /// Everything so far.
    pub fn take(&self) -> Vec<News> {
        std::mem::take(&mut self.news.lock())
    }

    /// Is there nothing?
    pub fn is_empty(&self) -> bool {
        self.news.lock().is_empty()
    }

    /// Puts back what could not be told, before what came meanwhile; what finds no room is returned.
    fn put_back(&self, mut untold: Vec<News>) -> Vec<News> {
        let mut all = self.news.lock();
        untold.append(&mut all);
        let excess = untold.len().saturating_sub(OUTBOX);
        let mut dropped = Vec::new();
        untold.retain(|news| {
            let goes = dropped.len() < excess && matches!(news, News::Count(..));
            if goes {
                dropped.push(news.clone());
            }
            !goes
        });
        *all = untold;
        dropped
    }
}

impl Ledger {
    /// An empty one of at most `memory` bytes. Where there are other nodes a quarter of it is theirs. The same `key`
    /// gives the same hashes, in every process.
    pub fn new(memory: u64, key: &Key, shared: bool) -> Self {
        let half = |purpose: &str| u64::from_str_radix(key.tag("limits", purpose).get(..16).unwrap_or_default(), 16).unwrap_or(0);
        let theirs = if shared { memory / 4 } else { 0 };
        Self {
            table: Table::new(memory - theirs),
            others: shared.then(|| Table::new(theirs)),
            book: Book::default(),
            outbox: Outbox::default(),
            connected: AtomicBool::new(false),
            hasher: SipHasher13::new_with_keys(half("a"), half("b")),
            numbers: Mutex::default(),
        }
    }

    /// Stands for a limit's name in the table. There are as many as were ever configured.
    pub fn number(&self, id: &str) -> u16 {
        let mut numbers = self.numbers.lock();
        let known = numbers.iter().position(|known| **known == *id);
        let number = known.unwrap_or_else(|| {
            numbers.push(id.into());
            numbers.len() - 1
        });
        u16::try_from(number).unwrap_or(u16::MAX)
    }

    /// The name that a number stands for.
    pub fn id(&self, number: u16) -> Option<Box<str>> {
        self.numbers.lock().get(usize::from(number)).cloned()
    }

    /// Refuses a client until `until`, unless it is refused for longer.
    pub fn ban(&self, handle: Handle, number: u16, ban: Ban, now: Moment) {
        if ban.until <= now {
            return;
        }
        self.table.with(handle, number, now, |entry| {
            if entry.penalty(false, now).is_none_or(|until| until < ban.until) {
                entry.punish(ban.until, false);
            }
        });
        self.book.ban(handle, ban);
    }

    /// Forgets what is known of a client; `tell`: other nodes shall do the same.
    pub fn reset(&self, handle: Handle, tell: bool) -> bool {
        let known = self.table.change(handle, Entry::clear).is_some();
        self.reset_elsewhere(handle, tell) || known
    }

    /// The same, but for what this node counted itself.
    pub(super) fn reset_elsewhere(&self, handle: Handle, tell: bool) -> bool {
        let known = self.others.as_ref().and_then(|others| others.change(handle, Entry::clear)).is_some();
        self.book.forget(handle);
        if tell && self.others.is_some() {
            self.outbox.put(News::Reset(handle), true);
        }
        known
    }

    /// Takes back what could not be told. What finds no room is told when more is counted.
    pub fn untold(&self, untold: Vec<News>) {
        for news in self.outbox.put_back(untold) {
            if let News::Count(handle, _) = news {
                self.table.change(handle, Entry::told);
            }
        }
    }

    /// What other nodes counted of a client.
    pub(super) fn elsewhere(&self, handle: Handle) -> Option<Count> {
        self.others.as_ref()?.get(handle).map(|entry| entry.count)
    }

    /// A penalty begins here: it is listed, and told.
    pub(super) fn begin(&self, handle: Handle, ban: Ban) {
        self.book.ban(handle, ban.clone());
        if self.others.is_some() {
            self.outbox.put(News::Ban(handle, ban), true);
        }
    }

    /// Tells other nodes of what was counted, where it is enough to be of interest: a client that is far from its
    /// limit is no news.
    pub(super) fn tell(&self, entry: &mut Entry, handle: Handle, number: u16, quota: &Quota, left: u32) {
        let used = quota.most().saturating_sub(left);
        let share = |part: u32| quota.most().div_ceil(part);
        if self.others.is_some() && used >= share(10).min(quota.most()) && entry.tell() {
            let urgent = used >= share(2);
            if !self.outbox.put(News::Count(handle, number), urgent) {
                entry.told();
            }
        }
    }
}
