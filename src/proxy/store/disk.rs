//! The second tier: a file per object, and a thread of its own that writes, so that no request does.

use std::fs::{self, File};
use std::hash::BuildHasherDefault;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use quick_cache::sync::Cache;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter};
use rustc_hash::FxHashMap;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::Counts;
use super::file::Stored;
use super::fill::Fill;
use super::object::{Head, Object};
use super::writer::Job;

/// What waits to be written, in KiB: who writes more waits.
const QUEUE: u32 = 32 << 10;
/// How long it may take to be asked, or to make room in the queue, before a request goes on without it.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How long a file may take to get its place, everything that is queued before it written.
const COMMIT: Duration = Duration::from_secs(30);
/// So many files may wait to be deleted.
const DELETES: usize = 100_000;
/// How long a process that ends waits for what is still to be written.
const FAREWELL: Duration = Duration::from_secs(20);
/// A disk that failed is tried again after this long.
const REST: Duration = Duration::from_secs(10);
/// Files are as long as blocks make them.
pub const BLOCK: u64 = 4096;
/// Room for a file on its way is taken in steps.
pub const STEP: u64 = 4 << 20;

/// Slots are hashes already.
#[derive(Debug, Default, Clone, Copy)]
pub struct SlotHasher(u64);

impl std::hash::Hasher for SlotHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        self.0 = crate::request::hash(bytes);
    }
    fn write_u128(&mut self, slot: u128) {
        // Truncation is what is wanted.
        self.0 = slot as u64;
    }
}

/// How hashes of slots are made.
pub type SlotHash = BuildHasherDefault<SlotHasher>;

/// A file in the index.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// As long as blocks make it.
    pub bytes: u64,
    /// It is on its way, and cannot be put out.
    pub writing: bool,
}

#[derive(Debug, Clone)]
pub struct Bytewise;

impl Weighter<u128, Entry> for Bytewise {
    fn weight(&self, _slot: &u128, entry: &Entry) -> u64 {
        entry.bytes
    }
}

/// Whose files have to go.
#[derive(Debug, Clone)]
pub struct Evicted;

impl Lifecycle<u128, Entry> for Evicted {
    type RequestState = Vec<u128>;
    fn is_pinned(&self, _slot: &u128, entry: &Entry) -> bool {
        entry.writing
    }
    fn on_evict(&self, state: &mut Vec<u128>, slot: u128, _entry: Entry) {
        state.push(slot);
    }
}

/// The second tier.
#[derive(Debug)]
pub struct Disk {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) index: Cache<u128, Entry, Bytewise, SlotHash, Evicted>,
    jobs: Sender<Job>,
    queue: Arc<Semaphore>,
    pub(super) counts: Arc<Counts>,
    /// Bytes of files on their way.
    pub(super) writing: AtomicU64,
    /// Files that will be there once the thread has come to them.
    queued: Mutex<FxHashMap<u128, Queued>>,
    /// How many files wait to be deleted.
    pub(super) deletes: AtomicUsize,
    /// Every file is in the index.
    pub(super) known: AtomicBool,
    /// The folder is another's.
    pub(super) closed: AtomicBool,
    failed: Mutex<Option<Instant>>,
    /// Held as long as the folder is ours.
    _lock: File,
}

/// Files of one object that wait to be written.
#[derive(Debug, Default)]
struct Queued {
    count: usize,
    /// The last of them will be deleted.
    doomed: bool,
}

/// Where an object is.
pub fn place(folder: &Path, slot: u128) -> PathBuf {
    let name = format!("{slot:032x}");
    let (first, rest) = name.split_at_checked(2).unwrap_or((&name, ""));
    let second = rest.get(..2).unwrap_or_default();
    folder.join(first).join(second).join(&name)
}

impl Disk {
    /// Takes the folder; the files in it are found while it serves already.
    pub fn open(path: &Path, size: u64, counts: Arc<Counts>) -> io::Result<Arc<Self>> {
        fs::create_dir_all(path)?;
        let lock = File::create(path.join("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| io::Error::new(io::ErrorKind::AddrInUse, "another process uses it"))?;
        let unfinished = path.join("tmp");
        // What was on its way when the last process ended will never be whole.
        match fs::remove_dir_all(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir_all(&unfinished)?,
        }
        let options = OptionsBuilder::new()
            .shards(1)
            .estimated_items_capacity(usize::try_from(size / (64 << 10)).unwrap_or(usize::MAX).clamp(64, 1 << 20))
            .weight_capacity(size)
            .build()
            .map_err(|error| io::Error::other(error.to_string()))?;
        let index = Cache::with_options(options, Bytewise, SlotHash::default(), Evicted);
        let (jobs, work) = channel();
        let disk = Arc::new(Self {
            path: path.to_owned(),
            size,
            index,
            jobs,
            queue: Arc::new(Semaphore::new(QUEUE as usize)),
            counts,
            writing: AtomicU64::new(0),
            queued: Mutex::default(),
            deletes: AtomicUsize::new(0),
            known: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            failed: Mutex::default(),
            _lock: lock,
        });
        let theirs = disk.clone();
        std::thread::Builder::new().name("cache-disk".into()).spawn(move || theirs.work(&work))?;
        let theirs = disk.clone();
        std::thread::Builder::new().name("cache-scan".into()).spawn(move || theirs.scan())?;
        Ok(disk)
    }

    /// Is it worth trying? Of a disk that failed one asks now and then whether it works again.
    pub fn works(&self) -> bool {
        let mut failed = self.failed.lock();
        match &mut *failed {
            Some(at) if at.elapsed() < REST => false,
            Some(at) => {
                *at = Instant::now();
                true
            }
            None => true,
        }
    }

    /// The same, asked without being the one who tries.
    pub fn may_work(&self) -> bool {
        self.failed.lock().is_none_or(|at| at.elapsed() >= REST)
    }

    /// Asks the disk; one that hangs is no reason for a request to hang.
    pub async fn ask<T: Send + 'static>(
        disk: &Arc<Self>,
        question: impl FnOnce(&Self) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        if !disk.works() {
            return None;
        }
        let theirs = disk.clone();
        match timeout(PATIENCE, spawn_blocking(move || question(&theirs))).await {
            Ok(answer) => answer.ok()?,
            Err(_) => {
                disk.fail("reading", &io::ErrorKind::TimedOut.into());
                None
            }
        }
    }

    /// Bytes of files.
    pub fn bytes(&self) -> u64 {
        self.index.weight()
    }

    /// Objects.
    pub fn objects(&self) -> usize {
        self.index.len()
    }

    /// Every file that was there is in the index.
    pub fn is_known(&self) -> bool {
        self.known.load(Ordering::Acquire)
    }

    pub(super) fn fail(&self, doing: &str, error: &io::Error) {
        self.counts.disk_errors.fetch_add(1, Ordering::Relaxed);
        let first = self.failed.lock().replace(Instant::now()).is_none();
        if first {
            tracing::error!(%error, path = %self.path.display(), "the cache's disk fails while {doing}; memory alone is used for a while");
        }
    }

    /// It did as it was told.
    pub(super) fn recovered(&self) {
        if self.failed.lock().take().is_some() {
            tracing::info!(path = %self.path.display(), "the cache's disk works again");
        }
    }

    /// Opens what is there; a broken file is deleted. Blocks.
    pub fn get(&self, slot: u128) -> Option<(Head, Stored)> {
        // Another process may have the folder, and purge what is in it.
        if self.closed.load(Ordering::Acquire) || (self.index.get(&slot).is_none() && self.is_known()) {
            return None;
        }
        let opened = Stored::open(&place(&self.path, slot));
        if opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            self.index.remove(&slot);
        }
        self.opened(slot, opened)
    }

    /// The body of what is there and was made then, where its head is known. Blocks.
    pub fn body(&self, slot: u128, born: u64) -> Option<Stored> {
        self.index.get(&slot);
        self.opened(slot, Stored::body_of(&place(&self.path, slot), born))
    }

    fn opened<T>(&self, slot: u128, opened: io::Result<T>) -> Option<T> {
        match opened {
            Ok(found) => {
                self.recovered();
                Some(found)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                self.broken(slot, &error);
                None
            }
        }
    }

    /// It cannot be believed, or not be read: it goes.
    pub fn broken(&self, slot: u128, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                self.counts.broken.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, path = %place(&self.path, slot).display(), "a file of the cache is broken, and deleted");
                self.remove(slot, None);
            }
            _ => {
                self.fail("reading", error);
                // Of others, as too many open files, the file is not to blame.
                if error.raw_os_error() == Some(Errno::IO.raw_os_error()) {
                    self.remove(slot, None);
                }
            }
        }
    }

    /// Is it there, as far as is known?
    pub fn may_have(&self, slot: u128) -> bool {
        !self.is_known() || self.index.contains_key(&slot)
    }

    /// Forgets an object, and deletes its file, unless it has the body that was made at `except`.
    pub fn remove(&self, slot: u128, except: Option<u64>) {
        let there = self.index.remove(&slot).is_some();
        // One that is on its way in the queue is followed by its end.
        let coming = self.queued.lock().get_mut(&slot).is_some_and(|queued| {
            let doomed = queued.doomed;
            queued.doomed |= except.is_none();
            !doomed
        });
        if !there && !coming && self.is_known() {
            return;
        }
        if self.deletes.fetch_add(1, Ordering::Relaxed) < DELETES {
            self.send(Job::Delete(slot, except));
        } else {
            self.deletes.fetch_sub(1, Ordering::Relaxed);
            self.fail("deleting", &io::ErrorKind::TimedOut.into());
        }
    }

    /// Something is about to be written for it.
    fn queue(&self, slot: u128) {
        let mut all = self.queued.lock();
        let queued = all.entry(slot).or_default();
        *queued = Queued { count: queued.count + 1, doomed: false };
    }

    /// It is.
    pub(super) fn unqueue(&self, slot: u128) {
        let mut all = self.queued.lock();
        if let Some(queued) = all.get_mut(&slot) {
            queued.count -= 1;
            if queued.count == 0 {
                all.remove(&slot);
            }
        }
    }

    /// Writes an object that is in memory; false: not now.
    pub fn keep(&self, slot: u128, object: &Arc<Object>) -> bool {
        let kib = u32::try_from(object.body.len() / 1024 + 1).unwrap_or(QUEUE);
        if !self.takes(object.body.len()) {
            return false;
        }
        match self.queue.clone().try_acquire_many_owned(kib.min(QUEUE)) {
            Ok(permit) if self.works() => {
                self.queue(slot);
                self.send(Job::Keep(slot, object.clone(), permit))
            }
            Ok(_) | Err(_) => false,
        }
    }

    /// From now on the file takes what comes of a response.
    pub fn begin(&self, fill: &Arc<Fill>) -> bool {
        let so_far = fill.so_far();
        let kib = so_far.iter().map(Bytes::len).sum::<usize>() / 1024 + 1;
        let kib = u32::try_from(kib).unwrap_or(QUEUE).min(QUEUE);
        match self.queue.clone().try_acquire_many_owned(kib) {
            Ok(permit) => self.works() && self.send(Job::Begin(fill.clone(), so_far, permit)),
            Err(_) => false,
        }
    }

    /// More of a response; waits while too much waits to be written, but not for ever. False: it is not.
    pub async fn append(&self, fill: &Arc<Fill>, bytes: Bytes) -> bool {
        let kib = u32::try_from(bytes.len() / 1024 + 1).unwrap_or(QUEUE).min(QUEUE);
        match timeout(PATIENCE, self.queue.clone().acquire_many_owned(kib)).await {
            Ok(Ok(permit)) => self.send(Job::Append(fill.clone(), bytes, permit)),
            // It is never closed.
            Ok(Err(_)) => false,
            Err(_) => {
                self.fail("writing", &io::ErrorKind::TimedOut.into());
                false
            }
        }
    }

    /// A response is whole. False: its file is not.
    pub async fn commit(&self, fill: &Arc<Fill>, head: Head) -> bool {
        let (done, heard) = oneshot::channel();
        self.queue(fill.slot);
        self.send(Job::Commit(fill.clone(), Box::new(head), done));
        match timeout(COMMIT, heard).await {
            Ok(done) => done.is_ok(),
            Err(_) => {
                self.fail("writing", &io::ErrorKind::TimedOut.into());
                false
            }
        }
    }

    /// Is there room for a body of this length?
    pub fn takes(&self, length: u64) -> bool {
        length.saturating_add(STEP) < self.size / 2
    }

    /// A response never will be.
    pub fn abandon(&self, fill: &Fill) {
        self.send(Job::Abandon(fill.id));
    }

    /// A newer head of what is there. If too much waits it stays as it is: after a restart the origin is asked again.
    pub fn refresh(&self, slot: u128, object: &Arc<Object>) {
        if self.may_have(slot)
            && let Ok(permit) = self.queue.clone().try_acquire_owned()
        {
            self.send(Job::Refresh(slot, object.clone(), permit));
        }
    }

    fn send(&self, job: Job) -> bool {
        self.jobs.send(job).is_ok()
    }

    /// Returns when everything is done that was asked for before. Blocks.
    pub fn flush(&self) {
        let done = Arc::new((Mutex::new(false), Condvar::new()));
        if self.send(Job::Flush(done.clone())) {
            let (lock, wake) = &*done;
            if wake.wait_while_for(&mut lock.lock(), |done| !*done, FAREWELL).timed_out() {
                tracing::error!(path = %self.path.display(), "the cache's disk hangs: what is to be written is not waited for");
            }
        }
    }

    /// Ends the thread, everything that was asked for done. Blocks.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.flush();
        self.send(Job::Close);
        // Another process may have the folder now.
        if let Err(error) = flock(&self._lock, FlockOperation::Unlock) {
            tracing::warn!(%error, "the cache's folder stays locked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use pingora::cache::CacheMeta;
    use pingora::http::ResponseHeader;

    use super::super::object::Body;
    use super::*;

    fn object(born: u64, body: &'static [u8]) -> Arc<Object> {
        let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(born);
        let meta = CacheMeta::new(at, at, 0, 0, ResponseHeader::build(200, None).unwrap());
        let head = Head::new(b"key", &meta).unwrap();
        Arc::new(Object::new(head, Body::Memory([Bytes::from_static(body)].into()), false))
    }

    #[test]
    fn what_is_removed_while_it_waits_to_be_written_is_not_there_afterwards() {
        let dir = tempfile::TempDir::new().unwrap();
        let disk = Disk::open(dir.path(), 64 << 20, Arc::default()).unwrap();
        for slot in 0..200 {
            assert!(disk.keep(slot, &object(1, b"old")));
            disk.remove(slot, None);
        }
        disk.flush();
        assert_eq!((disk.objects(), (0..200).filter(|slot| place(dir.path(), *slot).exists()).count()), (0, 0));
    }

    #[test]
    fn what_takes_its_place_stays() {
        let dir = tempfile::TempDir::new().unwrap();
        let disk = Disk::open(dir.path(), 64 << 20, Arc::default()).unwrap();
        for slot in 0..200 {
            assert!(disk.keep(slot, &object(1, b"old")) && disk.keep(slot, &object(2, b"new")));
            disk.remove(slot, Some(2));
        }
        disk.flush();
        assert_eq!(disk.objects(), 200);
        // A head of what is not there any more is not put on what is, nor is its body read under it.
        disk.refresh(7, &object(1, b"old"));
        disk.flush();
        let (head, stored) = disk.get(7).unwrap();
        assert_eq!((head.born(), &*stored.body().unwrap()[0]), (2, &b"new"[..]));
        assert!(disk.body(7, 1).is_none() && disk.body(7, 2).is_some());
    }

    #[test]
    fn a_disk_that_failed_is_asked_by_one_at_a_time() {
        let dir = tempfile::TempDir::new().unwrap();
        let disk = Disk::open(dir.path(), 64 << 20, Arc::default()).unwrap();
        disk.fail("reading", &io::ErrorKind::TimedOut.into());
        assert!(!disk.works() && !disk.may_work());
        let Some(long_ago) = Instant::now().checked_sub(REST) else { return };
        *disk.failed.lock() = Some(long_ago);
        assert!(disk.may_work(), "who only wants to know does not try");
        assert_eq!([disk.works(), disk.works()], [true, false]);
        disk.recovered();
        assert!(disk.works());
    }
}
