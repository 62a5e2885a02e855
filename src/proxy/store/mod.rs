//! The store: responses in memory, and on disk those that were asked for twice. Both tiers have a size in bytes
//! and keep it; what goes first is decided as S3-FIFO does (Yang et al., SOSP 2023): what was asked for once.
//!
//! ```text
//!  origin ─► Fill ─► memory ─► (second use) ─► disk
//!             │ └─► (long) ─────────────────────► disk
//!             └► readers, while it comes
//! ```
//!
//! The store never fails a request: without room, or on a disk that fails, a response is not kept.

mod disk;
mod file;
mod fill;
mod handlers;
mod journal;
mod lines;
mod object;
mod writer;

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use parking_lot::Mutex;
use pingora::cache::lock::CacheLock;
use pingora::cache::predictor::{CacheablePredictor, Predictor};
use pingora::cache::{CacheKey, CacheMeta, set_compression_dict_content};
use pingora::http::ResponseHeader;
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};
use rustc_hash::FxHashMap;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::caching;
use crate::cache::Known;
use crate::cache::key::Key;
use crate::cache::purge::Purge;
use crate::cache::status::StoredNow;
use disk::{Disk, SlotHash};
use fill::{Fill, Outcome};
pub use handlers::Hit;
use journal::Journal;
pub use object::Noted;
use object::{Body, Head, Object};

/// What headers in files are made of, mostly. Another one would make every file unreadable.
const DICTIONARY: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Encoding: gzip\r\nVary: Accept-Encoding\r\n\
Cache-Control: public, max-age=3600, s-maxage=86400, stale-while-revalidate=60, stale-if-error=86400, must-revalidate\r\n\
Content-Type: application/json\r\nContent-Type: application/javascript\r\nContent-Type: image/webp\r\nContent-Type: text/css\r\n\
Strict-Transport-Security: max-age=31536000; includeSubDomains\r\nX-Content-Type-Options: nosniff\r\nX-Frame-Options: SAMEORIGIN\r\n\
Access-Control-Allow-Origin: *\r\nServer: nginx\r\nAccept-Ranges: bytes\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n\
Expires: Tue, 02 Jan 2024 00:00:00 GMT\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nETag: \"0\"\r\nContent-Length: 1024\r\n";
/// Whoever fetches for others is given up on after this long.
const LONGEST_FETCH: Duration = Duration::from_secs(300);
/// So many keys, in each of 16 parts, are remembered as not stored.
const UNCACHEABLE: usize = 4096;
/// Parts of the table of responses on their way.
const SHARDS: usize = 16;
/// How long a purge may take to be on disk.
const PURGE: Duration = Duration::from_secs(5);
/// Where there is a disk, longer bodies live there.
const SHORT: u64 = 1 << 20;

/// The engine's encoding of a header without fields: it wants one where a meta is read.
static EMPTY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let header = ResponseHeader::build(200, None).ok();
    let meta = header.map(|header| CacheMeta::new(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH, 0, 0, header));
    meta.and_then(|meta| meta.serialize().ok()).map(|(_, header)| header).unwrap_or_default()
});

/// What happened to the store.
#[derive(Debug, Default)]
pub struct Counts {
    /// Files that were broken.
    pub broken: AtomicU64,
    /// Times at which the disk failed.
    pub disk_errors: AtomicU64,
    /// Files that made room for others.
    pub evicted: AtomicU64,
}

/// Sizes and places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of memory.
    pub memory: u64,
    /// A folder, and bytes of it.
    pub disk: Option<(PathBuf, u64)>,
}

#[derive(Debug, Clone)]
struct Bytewise;

impl Weighter<u128, Arc<Object>> for Bytewise {
    fn weight(&self, _slot: &u128, object: &Arc<Object>) -> u64 {
        object.weight()
    }
}

type Memory = Cache<u128, Arc<Object>, Bytewise, SlotHash, DefaultLifecycle<u128, Arc<Object>>>;
type Fills = FxHashMap<u128, Vec<Arc<Fill>>>;

/// The store.
pub struct Store {
    memory: Memory,
    room: AtomicU64,
    disk: Option<Arc<Disk>>,
    fills: [Mutex<Fills>; SHARDS],
    /// Bytes of responses on their way that are in memory.
    held: Arc<AtomicU64>,
    next: AtomicU64,
    journal: Option<Journal>,
    known: Arc<Known>,
    /// What happened.
    pub counts: Arc<Counts>,
    /// Who fetches what others wait for. Its own patience is longer than anybody's who waits.
    lock: CacheLock,
    /// What was not stored the last time: nobody waits for that.
    pub predictor: Predictor<16>,
    /// How many wait, or may have to.
    pub waiting: Arc<AtomicU32>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("held", &self.held()).finish_non_exhaustive()
    }
}

/// How much is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Held {
    /// Bytes in memory, headers and responses on their way included.
    pub memory_bytes: u64,
    /// Objects in memory.
    pub memory_objects: usize,
    /// Bytes of files.
    pub disk_bytes: u64,
    /// Files.
    pub disk_objects: usize,
}

impl Store {
    /// Takes the folder, if there is one, and what was purged when it was used last. Blocks.
    pub fn open(settings: &Settings, known: Arc<Known>) -> io::Result<Self> {
        // Only the first of a process's stores sets it, and they are all the same.
        set_compression_dict_content(Cow::Borrowed(DICTIONARY));
        let counts = Arc::new(Counts::default());
        let mut journal = None;
        let mut disk = None;
        if let Some((path, size)) = &settings.disk {
            disk = Some(Disk::open(path, *size, counts.clone())?);
            let (opened, purges) = Journal::open(path)?;
            known.purges.apply(&purges);
            journal = Some(opened);
        }
        let parts = parts(settings.memory);
        let options = OptionsBuilder::new()
            .shards(parts)
            .estimated_items_capacity(
                usize::try_from(settings.memory / (8 << 10)).unwrap_or(usize::MAX).clamp(32 * parts, 1 << 20),
            )
            .weight_capacity(for_objects(settings.memory))
            .build()
            .map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self {
            memory: Cache::with_options(options, Bytewise, SlotHash::default(), DefaultLifecycle::default()),
            room: AtomicU64::new(settings.memory),
            disk,
            fills: std::array::from_fn(|_| Mutex::default()),
            held: Arc::default(),
            next: AtomicU64::new(1),
            journal,
            known,
            counts,
            lock: CacheLock::new(LONGEST_FETCH),
            predictor: Predictor::new(UNCACHEABLE, Some(caching::passes)),
            waiting: Arc::default(),
        })
    }

    /// Memory has another size from now on.
    pub fn resize(&self, memory: u64) {
        if self.room.swap(memory, Ordering::Relaxed) != memory {
            self.memory.set_capacity(for_objects(memory));
        }
    }

    /// How much is stored.
    pub fn held(&self) -> Held {
        Held {
            memory_bytes: self.memory.weight() + self.held.load(Ordering::Relaxed),
            memory_objects: self.memory.len(),
            disk_bytes: self.disk.as_ref().map_or(0, |disk| disk.bytes()),
            disk_objects: self.disk.as_ref().map_or(0, |disk| disk.objects()),
        }
    }

    /// Purges; on return it will hold after a restart, too. An error: it holds, but only until then.
    pub async fn purge_and_keep(&'static self, purges: Vec<Purge>) -> io::Result<()> {
        // First in force, then written: what is written and not in force would be a lie for a moment.
        self.known.purges.apply(&purges);
        let Some(journal) = &self.journal else { return Ok(()) };
        let kept = spawn_blocking(move || journal.add(&purges, || self.known.purges.all()));
        match timeout(PURGE, kept).await {
            Ok(kept) => kept.unwrap_or_else(|lost| Err(io::Error::other(lost))),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the cache's disk hangs")),
        }
    }

    /// Ends what works in the background, everything written. Blocks.
    pub fn close(&self) {
        if let Some(disk) = &self.disk {
            disk.close();
        }
    }

    /// Returns when everything that is due on disk is there. Blocks.
    pub fn flush(&self) {
        if let Some(disk) = &self.disk {
            disk.flush();
        }
    }

    /// Forgets an object with its variants.
    pub fn remove(&self, slot: u128) {
        // Whoever writes them takes them out: the engine wants to find what it has just begun.
        for fill in self.fills(slot).lock().get(&slot).into_iter().flatten() {
            fill.lose();
        }
        self.memory.remove(&slot);
        if let Some(disk) = &self.disk {
            disk.remove(slot, None);
        }
    }

    /// What is stored under a key; a question that changes nothing. Of several variants one. May block on disk.
    pub fn peek(&self, key: &Key) -> Option<StoredNow> {
        let own = |head: &Head| *head.primary == *key.primary;
        let in_memory = self.memory.peek(&key.hash).filter(|object| own(&object.head));
        match in_memory {
            Some(object) => {
                let tier = if matches!(object.body, Body::Disk(_)) { "disk" } else { "memory" };
                object.head.now(tier, object.body.len())
            }
            None => {
                let (head, stored) = self.disk.as_ref()?.get(key.hash)?;
                head.now("disk", stored.len).filter(|_| own(&head))
            }
        }
    }

    /// Why the last response under a key was not stored, if it was not.
    pub fn unstored(&self, key: &Key) -> Option<&'static str> {
        self.predictor.predicted_uncacheable_reason(&engine_key(key)).map(|reason| reason.as_str())
    }

    fn fills(&self, slot: u128) -> &Mutex<Fills> {
        let [first, ..] = &self.fills;
        self.fills.get((slot >> 64) as usize % SHARDS).unwrap_or(first)
    }

    /// The longest body that stays in memory.
    fn longest(&self) -> u64 {
        let room = self.room.load(Ordering::Relaxed);
        // A part must hold it, and more than it alone.
        let part = for_objects(room) / self.memory.num_shards() as u64 / 2;
        if self.disk.is_some() { SHORT.min(part) } else { part }
    }

    /// Would a body of this length be kept at all?
    pub fn takes(&self, length: u64) -> bool {
        length <= self.longest() || self.disk.as_ref().is_some_and(|disk| disk.may_work() && disk.takes(length))
    }

    /// A response is on its way.
    fn begin(&self, slot: u128, head: Head) -> Arc<Fill> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let fill = Arc::new(Fill::new(id, slot, head, self.held.clone()));
        self.fills(slot).lock().entry(slot).or_default().push(fill.clone());
        fill
    }

    /// A response on its way, if its start is still there.
    fn on_its_way(&self, slot: u128) -> Option<Arc<Fill>> {
        let fills = self.fills(slot).lock();
        fills.get(&slot)?.iter().rev().find(|fill| fill.outcome() != Some(Outcome::Failed) && !fill.is_lost()).cloned()
    }

    /// Nobody finds it any more.
    fn hide(&self, fill: &Fill) {
        let mut fills = self.fills(fill.slot).lock();
        if let Some(all) = fills.get_mut(&fill.slot) {
            all.retain(|one| one.id != fill.id);
            if all.is_empty() {
                fills.remove(&fill.slot);
            }
        }
    }

    /// More of a response came. False: there is nobody left whom it is for.
    async fn more(&self, fill: &Arc<Fill>, bytes: Bytes, spooling: &mut bool) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let len = fill.push(bytes.clone());
        if fill.is_lost() {
            if *spooling {
                *spooling = false;
                self.abandon(fill);
            }
            self.hide(fill);
            return fill.wait_for_room().await;
        }
        if *spooling {
            if let Some(disk) = &self.disk
                && !disk.append(fill, bytes).await
            {
                fill.lose();
            }
            return true;
        }
        let full = self.held.load(Ordering::Relaxed) > for_fills(self.room.load(Ordering::Relaxed));
        if len > self.longest() || full {
            *spooling = self.disk.as_ref().is_some_and(|disk| disk.begin(fill));
            if !*spooling {
                fill.lose();
                self.hide(fill);
                return fill.wait_for_room().await;
            }
        }
        true
    }

    fn abandon(&self, fill: &Fill) {
        if let Some(disk) = &self.disk {
            disk.abandon(fill);
        }
    }

    /// It is over.
    fn end(&'static self, fill: Arc<Fill>, outcome: Outcome, len: u64, spooling: bool) {
        let lost = fill.is_lost();
        // Its length is what was promised, or it is not whole, whatever the connection said.
        let fits = fill.head.length().is_none_or(|length| length == len);
        let outcome = if fits { outcome } else { Outcome::Failed };
        // What a file takes is not kept in memory as well, even if the file has not begun yet.
        let chunks = fill.end(outcome).filter(|_| !spooling);
        if outcome == Outcome::Whole && !lost {
            let mut head = fill.head.clone();
            if let Err(error) = head.complete(len) {
                tracing::debug!(%error, "a stored header cannot be read");
            }
            match chunks {
                Some(chunks) => {
                    let chunks = compact(&chunks);
                    fill.settle(&chunks);
                    let born = head.born();
                    self.put(fill.slot, Object::new(head, Body::Memory(chunks), self.disk.is_none()));
                    // An older one must not come back.
                    if let Some(disk) = &self.disk {
                        disk.remove(fill.slot, Some(born));
                    }
                }
                None => {
                    // Until the file has its place whoever comes reads along.
                    tokio::spawn(async move {
                        let disk = self.disk.as_ref();
                        let committed = match disk {
                            Some(disk) => disk.commit(&fill, head.clone()).await,
                            None => false,
                        };
                        // An older one must not come back.
                        let except = committed.then(|| head.born());
                        match committed {
                            true => self.put(fill.slot, Object::new(head, Body::Disk(len), true)),
                            false => drop(self.memory.remove(&fill.slot)),
                        }
                        if let Some(disk) = disk {
                            disk.remove(fill.slot, except);
                        }
                        self.hide(&fill);
                    });
                    return;
                }
            }
        } else if spooling {
            self.abandon(&fill);
        }
        self.hide(&fill);
    }

    fn put(&self, slot: u128, object: Object) {
        self.memory.insert(slot, Arc::new(object));
    }
}

/// A key, as the engine wants it.
pub fn engine_key(key: &Key) -> CacheKey {
    let mut engine = CacheKey::new(key.primary.clone(), "");
    engine.set_primary_bin_override(key.hash.to_be_bytes());
    engine
}

/// Into how many parts memory is divided, each with a lock of its own; a small one into fewer, for no object is longer
/// than its part.
fn parts(memory: u64) -> usize {
    if memory < 256 << 20 { 4 } else { 16 }
}

/// What of the memory is for objects; the rest is for responses on their way.
fn for_objects(memory: u64) -> u64 {
    memory - for_fills(memory)
}

fn for_fills(memory: u64) -> u64 {
    memory / 8
}

/// As few chunks as there can be, none of which keeps more memory than it shows.
fn compact(chunks: &[Bytes]) -> Box<[Bytes]> {
    const MOST: usize = 256 << 10;
    let mut left: usize = chunks.iter().map(Bytes::len).sum();
    let mut all = Vec::with_capacity(left.div_ceil(MOST));
    let mut current = Vec::with_capacity(left.min(MOST));
    for mut bytes in chunks.iter().map(|chunk| &chunk[..]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at_checked(MOST - current.len()).unwrap_or((bytes, b""));
            current.extend_from_slice(now);
            left -= now.len();
            bytes = later;
            if current.len() == MOST {
                all.push(Bytes::from(std::mem::replace(&mut current, Vec::with_capacity(left.min(MOST)))));
            }
        }
    }
    if !current.is_empty() {
        all.push(current.into());
    }
    all.into()
}
