//! Counts of clients, in memory that never grows.
//!
//! ```text
//!  set ─┬─ line 0: lock, 15 tags
//!       └─ lines 1 to 15: one client each        a decision waits for one line of the processor's cache, mostly
//! ```
//!
//! A key's hash says which set, and is kept whole (64 bits), so that two clients share a counter once in 2^60. The
//! hash is keyed: nobody outside can choose addresses that fall into one set. Where a set is full, what is over
//! goes first, then who used the smallest share of what it may; who is refused goes last of these, and who is refused for a
//! time after all others.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use super::quota::Count;
use crate::request::Moment;

/// Clients of one set.
const WAYS: usize = 15;
/// Parts of a second in which the end of a penalty is kept: 2^32 of them are 8 years.
const TICKS: u64 = 16;
/// One of them.
pub const TICK: Duration = Duration::from_nanos(1_000_000_000 / TICKS);
/// Where less is allowed than this, it is a share of this that counts when room is needed.
const FEW: u32 = 8;

/// Stands for a client under a limit: a keyed hash of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(pub u64);

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Handle {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

/// What is known of a client under a limit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entry {
    /// What it used.
    pub count: Count,
    /// The other half of the hash.
    upper: u32,
    /// With `PENALTY` when that ends, else when it was last refused; in ticks.
    at: u32,
    /// The limit, by its number.
    pub limit: u16,
    flags: u8,
    /// How much of what it may it had used when it was last counted: 1 to 255, and 255 where it was refused.
    share: u8,
}

/// It is refused until `at`.
const PENALTY: u8 = 1;
/// It was refused, and nothing has passed since.
const OVER: u8 = 2;
/// The penalty is one of a dry run.
const DRY: u8 = 4;
/// Its name is in the book.
const NAMED: u8 = 8;
/// Other nodes shall hear of it, and it waits to be told.
const TOLD: u8 = 16;
/// How often it was let begin anew, modulo four.
const GENERATION: u8 = 32 | 64;
const GENERATIONS: u8 = 32;

impl Entry {
    /// Until when it is refused. `dry`: is the limit only tried out?
    pub fn penalty(&self, dry: bool, now: Moment) -> Option<Moment> {
        let until = moment(self.at);
        (self.flags & PENALTY != 0 && until > now && (self.flags & DRY != 0) == dry).then_some(until)
    }

    /// Refuses it until `until`.
    pub fn punish(&mut self, until: Moment, dry: bool) {
        self.flags = self.flags & !DRY | PENALTY | if dry { DRY } else { 0 };
        self.at = ticks(until);
    }

    /// It is refused; is this the first time since something passed?
    pub fn refuse(&mut self, now: Moment) -> bool {
        let first = self.flags & OVER == 0;
        self.flags |= OVER;
        self.share = u8::MAX;
        if first && self.flags & PENALTY == 0 {
            self.at = ticks(now);
        }
        first
    }

    /// It passed.
    pub fn pass(&mut self) {
        self.flags &= !(OVER | PENALTY | DRY);
    }

    /// Remembers how much of `most` is left. Where that is very little, the first request is not much yet: it is what every
    /// invented client has.
    pub fn weigh(&mut self, left: u32, most: u32) {
        let used = u64::from(most.saturating_sub(left)) * 254 / u64::from(most.max(FEW));
        self.share = u8::try_from(used).unwrap_or(u8::MAX).max(1);
    }

    /// Tells one time that it began anew from another: a challenge that was made before does not count after.
    pub fn generation(&self) -> u8 {
        (self.flags & GENERATION) / GENERATIONS
    }

    /// When it was first refused, `timeout` being the length of a penalty.
    pub fn refused_at(&self, timeout: Duration) -> Option<Moment> {
        let at = moment(self.at);
        match (self.flags & PENALTY != 0, self.flags & OVER != 0) {
            (true, _) => Some(Moment(at.0.saturating_sub(timeout))),
            (false, true) => Some(at),
            (false, false) => None,
        }
    }

    /// Shall its name be written down? Says so once.
    pub fn name(&mut self) -> bool {
        let new = self.flags & NAMED == 0;
        self.flags |= NAMED;
        new
    }

    /// Shall others hear of it? Says so once, until [`Self::told`].
    pub fn tell(&mut self) -> bool {
        let new = self.flags & TOLD == 0;
        self.flags |= TOLD;
        new
    }

    /// Its name was forgotten.
    pub fn unname(&mut self) {
        self.flags &= !NAMED;
    }

    /// They heard.
    pub fn told(&mut self) {
        self.flags &= !TOLD;
    }

    /// Forgets what was counted, and any penalty.
    pub fn clear(&mut self) {
        self.count = Count::default();
        self.pass();
        self.flags &= !(NAMED | TOLD);
        let next = (self.flags & GENERATION).wrapping_add(GENERATIONS) & GENERATION;
        self.flags = self.flags & !GENERATION | next;
    }

    /// Worth keeping: the least goes first. Of limits of every kind the share that was used is comparable.
    fn worth(&self, now: Moment) -> (bool, u8) {
        (self.penalty(false, now).is_some(), if self.count.is_over(now) { 0 } else { self.share.max(1) })
    }

    /// Is there nothing to remember of it?
    pub fn is_over(&self, now: Moment) -> bool {
        self.count.is_over(now) && (self.flags & PENALTY == 0 || moment(self.at) <= now)
    }
}

/// Rounded down: nobody waits longer than was said.
fn ticks(at: Moment) -> u32 {
    let nanos = 1_000_000_000 / TICKS;
    u32::try_from(at.0.as_nanos() / u128::from(nanos)).unwrap_or(u32::MAX)
}

fn moment(ticks: u32) -> Moment {
    Moment(Duration::from_nanos(u64::from(ticks) * (1_000_000_000 / TICKS)))
}

/// A line of the processor's cache for all tags, and one for each client.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Set {
    /// Whoever has this lock has the set.
    tags: Mutex<[u32; WAYS]>,
    entries: [Line; WAYS],
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Line(Mutex<Entry>);

impl Set {
    /// The place where a client stands if it can: it is where one looks first.
    fn preferred(tag: u32) -> usize {
        tag as usize % WAYS
    }

    /// Locks the set. What is likely to be needed is fetched at the same time: taking a lock waits for the line that it
    /// is in, and a line that is asked for only then is waited for once more.
    fn lock(&self, tag: u32) -> MutexGuard<'_, [u32; WAYS]> {
        let likely = self.entries.get(Self::preferred(tag)).map(|line| line.0.is_locked());
        std::hint::black_box((self.tags.is_locked(), likely));
        self.tags.lock()
    }

    /// A client's entry, if it has one. `tags` are the set's.
    fn find(&self, tags: &[u32; WAYS], tag: u32, upper: u32) -> Option<MutexGuard<'_, Entry>> {
        let at = |way: usize| {
            let entry = self.entries.get(way).filter(|_| tags.get(way) == Some(&tag))?.0.lock();
            (entry.upper == upper).then_some(entry)
        };
        // Most stand there: a branch that can be foreseen lets the processor begin with what follows.
        at(Self::preferred(tag)).or_else(|| (0..WAYS).find_map(at))
    }
}

/// The table.
#[derive(Debug)]
pub struct Table {
    sets: Box<[Set]>,
    entries: AtomicU64,
    evicted: [AtomicU64; 2],
}

/// How full the table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// Places that were ever used.
    pub entries: u64,
    /// Places.
    pub capacity: u64,
    /// Clients that had to go while something was counted of them.
    pub evicted: u64,
    /// Clients that had to go in the middle of a penalty.
    pub pardoned: u64,
}

impl Table {
    /// A table of at most `memory` bytes, and at least one set.
    pub fn new(memory: u64) -> Self {
        let sets = usize::try_from(memory).unwrap_or(usize::MAX) / size_of::<Set>();
        let sets = (0..sets.max(1)).map(|_| Set::default()).collect();
        Self { sets, entries: AtomicU64::new(0), evicted: Default::default() }
    }

    /// Bytes that it takes.
    pub fn memory(&self) -> u64 {
        (self.sets.len() * size_of::<Set>()) as u64
    }

    /// How full it is.
    pub fn fill(&self) -> Fill {
        let [evicted, pardoned] = &self.evicted;
        Fill {
            entries: self.entries.load(Relaxed),
            capacity: (self.sets.len() * WAYS) as u64,
            evicted: evicted.load(Relaxed),
            pardoned: pardoned.load(Relaxed),
        }
    }

    fn place(&self, handle: Handle) -> (Option<&Set>, u32, u32) {
        let (upper, tag) = ((handle.0 >> 32) as u32, (handle.0 as u32).max(1));
        let set = (u64::from(upper) * self.sets.len() as u64) >> 32;
        (self.sets.get(set as usize), upper, tag)
    }

    /// What is known of a client, changed by `change`; a place is made for it if there is none.
    pub fn with<T>(&self, handle: Handle, limit: u16, now: Moment, change: impl FnOnce(&mut Entry) -> T) -> T {
        let (Some(set), upper, tag) = self.place(handle) else { return change(&mut Entry::default()) };
        let mut tags = set.lock(tag);
        if let Some(mut entry) = set.find(&tags, tag, upper) {
            return change(&mut entry);
        }
        // Empty, over, least used; of equals where it is looked for first.
        let first = Set::preferred(tag);
        let worth = |way: usize| {
            let used = tags.get(way).is_some_and(|tag| *tag != 0);
            let worth = set.entries.get(way).filter(|_| used).map(|line| line.0.lock().worth(now));
            (worth.is_some_and(|(penalised, _)| penalised), worth.map_or(0, |(_, weight)| weight), way != first)
        };
        let (way, (penalised, weight, _)) =
            (0..WAYS).map(|way| (way, worth(way))).min_by_key(|(_, worth)| *worth).unwrap_or_default();
        let (Some(known), Some(line)) = (tags.get_mut(way), set.entries.get(way)) else { return change(&mut Entry::default()) };
        if *known == 0 {
            self.entries.fetch_add(1, Relaxed);
        } else if penalised || weight > 0 {
            let [evicted, pardoned] = &self.evicted;
            if penalised { pardoned } else { evicted }.fetch_add(1, Relaxed);
        }
        *known = tag;
        let mut entry = line.0.lock();
        *entry = Entry { upper, limit, ..Entry::default() };
        change(&mut entry)
    }

    /// What is known of a client, if anything.
    pub fn get(&self, handle: Handle) -> Option<Entry> {
        self.change(handle, |entry| *entry)
    }

    /// Changes what is known of a client, if anything.
    pub fn change<T>(&self, handle: Handle, change: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let (set, upper, tag) = self.place(handle);
        let set = set?;
        let tags = set.lock(tag);
        let mut entry = set.find(&tags, tag, upper)?;
        Some(change(&mut entry))
    }

    /// Calls `each` with every client that something is known of, one set at a time.
    pub fn each(&self, now: Moment, mut each: impl FnMut(Handle, &Entry)) {
        for set in &self.sets {
            let tags = set.tags.lock();
            for (tag, line) in tags.iter().zip(&set.entries).filter(|(tag, _)| **tag != 0) {
                let entry = line.0.lock();
                if !entry.is_over(now) {
                    each(Handle(u64::from(entry.upper) << 32 | u64::from(*tag)), &entry);
                }
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for set in &self.sets {
            *set.tags.lock() = [0; WAYS];
        }
        self.entries.store(0, Relaxed);
    }
}

/// What was meant by lines and sets.
const _: () = assert!(size_of::<Line>() == 64 && size_of::<Set>() == 1024);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::quota::{Algorithm, Quota};

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    const QUOTA: Quota = Quota { algorithm: Algorithm::Sliding, requests: 1_000, period: Duration::from_secs(60) };

    fn handle(n: u64) -> Handle {
        Handle(crate::request::mix(n + 1) | 1)
    }

    fn take(table: &Table, n: u64, now: Moment) -> bool {
        table.with(handle(n), 0, now, |entry| {
            let used = entry.count.used(&QUOTA, 1, now);
            if used.fits {
                entry.count.add(&QUOTA, 1, now);
            }
            entry.weigh(used.left.saturating_sub(1), QUOTA.requests);
            used.fits
        })
    }

    #[test]
    fn a_flood_of_others_frees_no_heavy_hitter() {
        let table = Table::new(1 << 20);
        let before = table.memory();
        assert!(before <= 1 << 20);
        let hitter = u64::MAX / 2;
        let mut passed = 0;
        // Ten times as many others as there are places, and as many requests of one.
        for n in 0..150_000 {
            take(&table, n, at(1));
            passed += u32::from(take(&table, hitter, at(1)));
        }
        assert_eq!(passed, 1_000);
        let fill = table.fill();
        assert_eq!((table.memory(), fill.entries), (before, fill.capacity));
        assert!(fill.evicted > 100_000 && fill.pardoned == 0, "{fill:?}");
    }

    #[test]
    fn penalties_outlast_everything_but_each_other() {
        let table = Table::new(1 << 20);
        let now = at(1);
        table.with(handle(7), 0, now, |entry| entry.punish(at(100), false));
        for n in 1_000..100_000 {
            for _ in 0..3 {
                take(&table, n, now);
            }
        }
        let entry = table.get(handle(7)).unwrap();
        assert_eq!(entry.penalty(false, now), Some(at(100)));
        assert_eq!((entry.penalty(true, now), entry.penalty(false, at(100))), (None, None));
        for n in 200_000..300_000 {
            table.with(handle(n), 0, now, |entry| entry.punish(at(50), false));
        }
        assert!(table.fill().pardoned > 0);
    }

    #[test]
    fn shares_count_whatever_the_limit() {
        let table = Table::new(1 << 20);
        let logins = Quota { requests: 5, ..QUOTA };
        let bucket = Quota { algorithm: Algorithm::TokenBucket { burst: 50 }, requests: 1, ..QUOTA };
        let count = |n: u64, quota: &Quota, times: u32| {
            for _ in 0..times {
                table.with(handle(n), 0, at(1), |entry| {
                    let used = entry.count.used(quota, 1, at(1));
                    entry.count.add(quota, 1, at(1));
                    entry.weigh(used.left.saturating_sub(1), quota.most());
                });
            }
        };
        count(7, &logins, 4);
        for n in 1_000..50_000 {
            count(n, &QUOTA, 6);
            count(n + 1_000_000, &bucket, 1);
        }
        assert!(table.get(handle(7)).is_some(), "four of five are more than six of a thousand, or an hour's token of fifty");
    }

    #[test]
    fn what_is_over_makes_room_without_a_word() {
        let table = Table::new(1);
        for n in 0..15 {
            take(&table, n, at(1));
        }
        for n in 15..30 {
            take(&table, n, at(100));
        }
        assert_eq!(table.fill().evicted, 0);
        assert!(table.get(handle(3)).is_none() && table.get(handle(20)).is_some());
        let mut seen = 0;
        table.each(at(100), |_, entry| seen += usize::from(entry.limit == 0));
        assert_eq!(seen, 15);
        table.clear();
        assert_eq!(table.fill().entries, 0);
    }

    #[test]
    fn refusals_begin_once() {
        let mut entry = Entry::default();
        assert!(entry.refuse(at(5)) && !entry.refuse(at(6)));
        assert_eq!(entry.refused_at(Duration::ZERO), Some(at(5)));
        entry.pass();
        assert_eq!(entry.refused_at(Duration::ZERO), None);
        assert!(entry.refuse(at(7)));
        entry.punish(at(67), false);
        assert_eq!(entry.refused_at(Duration::from_secs(60)), Some(at(7)));
        assert!(entry.name() && !entry.name() && entry.tell() && !entry.tell());
        entry.told();
        assert!(entry.tell());
        entry.clear();
        assert!(entry.is_over(at(8)) && entry.penalty(false, at(8)).is_none());
        assert_eq!(entry.generation(), 1, "what was made before does not clear it again");
    }
}
