//! The second tier: a file per object, and a thread of its own that writes, so that no request does.

use std::collections::HashMap;
use std::fs::{self, File};
use std::hash::BuildHasherDefault;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use quick_cache::sync::Cache;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter};
use rustc_hash::FxHashMap;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::Counts;
use super::file::{self, Stored, Writing};
use super::fill::Fill;
use super::object::{Head, Object};

/// What waits to be written, in KiB: who writes more waits.
const QUEUE: u32 = 32 << 10;
/// How long it may take to be asked, or to make room in the queue, before a request goes on without it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a process that ends waits for what is still to be written.
const FAREWELL: Duration = Duration::from_secs(20);
/// A disk that failed is tried again after this long.
const REST: Duration = Duration::from_secs(10);
/// Files are as long as blocks make them.
const BLOCK: u64 = 4096;
/// Room for a file on its way is taken in steps.
const STEP: u64 = 4 << 20;

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
struct Entry {
    bytes: u64,
    /// It is on its way, and cannot be put out.
    writing: bool,
}

#[derive(Debug, Clone)]
struct Bytewise;

impl Weighter<u128, Entry> for Bytewise {
    fn weight(&self, _slot: &u128, entry: &Entry) -> u64 {
        entry.bytes
    }
}

/// Whose files have to go.
#[derive(Debug, Clone)]
struct Evicted;

impl Lifecycle<u128, Entry> for Evicted {
    type RequestState = Vec<u128>;
    fn is_pinned(&self, _slot: &u128, entry: &Entry) -> bool {
        entry.writing
    }
    fn on_evict(&self, state: &mut Vec<u128>, slot: u128, _entry: Entry) {
        state.push(slot);
    }
}

/// What the thread does.
enum Job {
    /// Writes a whole object.
    Keep(u128, Arc<Object>, OwnedSemaphorePermit),
    /// Begins the file of a response on its way, with what came of it so far.
    Begin(Arc<Fill>, Vec<Bytes>),
    /// Appends to it.
    Append(Arc<Fill>, Bytes, OwnedSemaphorePermit),
    /// It is whole: the file gets its place, and somebody hears of it.
    Commit(Arc<Fill>, Box<Head>, oneshot::Sender<()>),
    /// It is not, or not wanted any more.
    Abandon(u64),
    /// A newer head.
    Refresh(u128, Arc<Object>, OwnedSemaphorePermit),
    /// The file goes, unless it has the body that was made then.
    Delete(u128, Option<u64>),
    /// Everything before this is done.
    Flush(Arc<(Mutex<bool>, Condvar)>),
    /// The thread ends.
    Close,
}

/// The second tier.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    size: u64,
    index: Cache<u128, Entry, Bytewise, SlotHash, Evicted>,
    jobs: Sender<Job>,
    queue: Arc<Semaphore>,
    counts: Arc<Counts>,
    /// Bytes of files on their way.
    writing: AtomicU64,
    /// Files that will be there once the thread has come to them.
    queued: Mutex<FxHashMap<u128, Queued>>,
    /// Every file is in the index.
    known: AtomicBool,
    /// The folder is another's.
    closed: AtomicBool,
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
fn place(folder: &Path, slot: u128) -> PathBuf {
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

    fn fail(&self, doing: &str, error: &io::Error) {
        self.counts.disk_errors.fetch_add(1, Ordering::Relaxed);
        let first = self.failed.lock().replace(Instant::now()).is_none();
        if first {
            tracing::error!(%error, path = %self.path.display(), "the cache's disk fails while {doing}; memory alone is used for a while");
        }
    }

    /// It did as it was told.
    fn recovered(&self) {
        if self.failed.lock().take().is_some() {
            tracing::info!(path = %self.path.display(), "the cache's disk works again");
        }
    }

    /// Opens what is there; a broken file is deleted. Blocks.
    pub fn get(&self, slot: u128) -> Option<(Head, Stored)> {
        if self.index.get(&slot).is_none() && self.is_known() {
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
        if there || coming || !self.is_known() {
            self.send(Job::Delete(slot, except));
        }
    }

    /// Something is about to be written for it.
    fn queue(&self, slot: u128) {
        let mut all = self.queued.lock();
        let queued = all.entry(slot).or_default();
        *queued = Queued { count: queued.count + 1, doomed: false };
    }

    /// It is.
    fn unqueue(&self, slot: u128) {
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
        if !self.takes(object.body.len()) || !self.works() {
            return false;
        }
        match self.queue.clone().try_acquire_many_owned(kib.min(QUEUE)) {
            Ok(permit) => {
                self.queue(slot);
                self.send(Job::Keep(slot, object.clone(), permit))
            }
            Err(_) => false,
        }
    }

    /// From now on the file takes what comes of a response.
    pub fn begin(&self, fill: &Arc<Fill>) -> bool {
        self.works() && self.send(Job::Begin(fill.clone(), fill.so_far()))
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

    /// A response is whole.
    pub fn commit(&self, fill: &Arc<Fill>, head: Head) -> oneshot::Receiver<()> {
        let (done, heard) = oneshot::channel();
        self.queue(fill.slot);
        self.send(Job::Commit(fill.clone(), Box::new(head), done));
        heard
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

    /// Takes room for a file on its way; false if there is none.
    fn hold(&self, id: u64, before: u64, now: u64) -> bool {
        let writing = self.writing.fetch_add(now - before, Ordering::Relaxed) + now - before;
        if writing > self.size / 2 {
            self.writing.fetch_sub(now - before, Ordering::Relaxed);
            return false;
        }
        self.admit(held(id), Entry { bytes: now, writing: true });
        true
    }

    fn let_go(&self, id: u64, bytes: u64) {
        if bytes > 0 {
            self.index.remove(&held(id));
            self.writing.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// It is there; others go for it.
    fn admit(&self, slot: u128, entry: Entry) {
        let mut evicted = Vec::new();
        self.index.insert_with_lifecycle(slot, entry, &mut evicted);
        let evictions = evicted.len() as u64;
        self.counts.evicted.fetch_add(evictions, Ordering::Relaxed);
        for slot in evicted {
            self.unlink(slot);
        }
    }

    fn unlink(&self, slot: u128) {
        match fs::remove_file(place(&self.path, slot)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => self.fail("deleting", &error),
            _ => {}
        }
    }

    /// The thread that writes.
    fn work(&self, jobs: &Receiver<Job>) {
        let mut open: HashMap<u64, Spooling> = HashMap::new();
        while let Ok(job) = jobs.recv() {
            match job {
                Job::Keep(slot, object, permit) => {
                    match self.write(slot, &object) {
                        Ok(()) => self.recovered(),
                        Err(error) => {
                            object.kept.store(false, Ordering::Relaxed);
                            self.fail("writing", &error);
                        }
                    }
                    self.unqueue(slot);
                    drop(permit);
                }
                Job::Begin(fill, so_far) => match self.start(&fill, &so_far) {
                    Ok(spooling) => drop(open.insert(fill.id, spooling)),
                    Err(error) => self.lost(&fill, &error),
                },
                Job::Append(fill, bytes, permit) => {
                    if let Some(spooling) = open.get_mut(&fill.id)
                        && let Err(error) = self.more(spooling, &fill, &bytes)
                    {
                        self.give_up(fill.id, open.remove(&fill.id));
                        self.lost(&fill, &error);
                    }
                    drop(permit);
                }
                Job::Commit(fill, head, done) => {
                    match open.remove(&fill.id).map(|spooling| self.finish(spooling, &fill, &head)) {
                        Some(Ok(())) => {
                            self.recovered();
                            // Whoever waited for it may have gone.
                            let _ = done.send(());
                        }
                        Some(Err(error)) => self.fail("writing", &error),
                        None => {}
                    }
                    self.unqueue(fill.slot);
                }
                Job::Abandon(id) => self.give_up(id, open.remove(&id)),
                Job::Refresh(slot, object, permit) => {
                    match file::refresh(&place(&self.path, slot), &object.head) {
                        // Where it does not fit the old head asks the origin again after a restart, no more.
                        Ok(true | false) => {}
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => self.broken(slot, &error),
                    }
                    drop(permit);
                }
                Job::Delete(slot, except) => self.delete(slot, except),
                Job::Flush(done) => {
                    let (lock, wake) = &*done;
                    *lock.lock() = true;
                    wake.notify_all();
                }
                Job::Close => return,
            }
        }
    }

    fn delete(&self, slot: u128, except: Option<u64>) {
        let path = place(&self.path, slot);
        let spared = except.is_some_and(|except| file::born(&path) == Some(except));
        match path.metadata() {
            Ok(meta) if spared => self.admit(slot, Entry { bytes: meta.len().next_multiple_of(BLOCK), writing: false }),
            _ => {
                self.index.remove(&slot);
                self.unlink(slot);
            }
        }
    }

    fn unfinished(&self, id: &str) -> PathBuf {
        self.path.join("tmp").join(id)
    }

    fn write(&self, slot: u128, object: &Object) -> io::Result<()> {
        let super::object::Body::Memory(chunks) = &object.body else { return Ok(()) };
        let expected = (object.body.len() + object.weight()).next_multiple_of(BLOCK);
        // Fills are numbered from 1.
        if !self.hold(0, 0, expected) {
            object.kept.store(false, Ordering::Relaxed);
            return Ok(());
        }
        let path = self.unfinished(&format!("{slot:032x}"));
        let written = || -> io::Result<u64> {
            let mut writing = Writing::begin(&path, &object.head)?;
            chunks.iter().try_for_each(|chunk| writing.append(chunk))?;
            writing.end()
        };
        let written = written();
        self.let_go(0, expected);
        let result = written.and_then(|bytes| self.rename(&path, slot, bytes));
        result.inspect_err(|_| drop(fs::remove_file(&path)))
    }

    fn rename(&self, from: &Path, slot: u128, bytes: u64) -> io::Result<()> {
        let to = place(&self.path, slot);
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::rename(from, &to)?;
        self.admit(slot, Entry { bytes: bytes.next_multiple_of(BLOCK), writing: false });
        Ok(())
    }

    fn start(&self, fill: &Arc<Fill>, so_far: &[Bytes]) -> io::Result<Spooling> {
        let path = self.unfinished(&format!("fill-{}", fill.id));
        let writing = Writing::begin(&path, &fill.head)?;
        let (file, start) = writing.reader()?;
        let mut spooling = Spooling { writing, path, held: 0, written: 0 };
        fill.spool(file, start);
        for chunk in so_far {
            if let Err(error) = self.more(&mut spooling, fill, chunk) {
                self.give_up(fill.id, Some(spooling));
                return Err(error);
            }
        }
        Ok(spooling)
    }

    fn more(&self, spooling: &mut Spooling, fill: &Fill, bytes: &Bytes) -> io::Result<()> {
        let needed = spooling.written + bytes.len() as u64;
        if needed > spooling.held {
            // All that was promised at once, or else in steps.
            let promised = fill.head.length().filter(|length| *length >= needed);
            let held = promised.unwrap_or_else(|| needed.next_multiple_of(STEP)).next_multiple_of(BLOCK);
            if !self.hold(fill.id, spooling.held, held) {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "there is no room for it"));
            }
            spooling.held = held;
        }
        spooling.writing.append(bytes)?;
        spooling.written = needed;
        fill.written(needed);
        Ok(())
    }

    /// It did not work out; that there is no room under `size` is no failure of the disk.
    fn lost(&self, fill: &Fill, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::StorageFull if error.raw_os_error().is_none() => {}
            _ => self.fail("writing", error),
        }
        fill.lose();
    }

    fn give_up(&self, id: u64, spooling: Option<Spooling>) {
        let Some(Spooling { path, held, .. }) = spooling else { return };
        self.let_go(id, held);
        // Whoever reads it has it open.
        if let Err(error) = fs::remove_file(path) {
            self.fail("deleting", &error);
        }
    }

    fn finish(&self, mut spooling: Spooling, fill: &Fill, head: &Head) -> io::Result<()> {
        let written = spooling.writing.end().and_then(|bytes| {
            if head.length() != fill.head.length() {
                // Its length was not known when it began.
                file::refresh(&spooling.path, head)?;
            }
            Ok(bytes)
        });
        self.let_go(fill.id, spooling.held);
        let result = written.and_then(|bytes| self.rename(&spooling.path, fill.slot, bytes));
        result.inspect_err(|_| drop(fs::remove_file(&spooling.path)))
    }

    /// Finds every file that is there.
    fn scan(&self) {
        let mut found: Vec<(std::time::SystemTime, u128, u64)> = Vec::new();
        let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
        for first in entries(&self.path).filter(|e| e.file_name().len() == 2) {
            for second in entries(&first.path()) {
                for file in entries(&second.path()) {
                    if self.closed.load(Ordering::Acquire) {
                        return;
                    }
                    let slot = file.file_name().to_str().and_then(|name| u128::from_str_radix(name, 16).ok());
                    let (Some(slot), Ok(meta)) = (slot, file.metadata()) else { continue };
                    if !file::looks_whole(&file.path()) {
                        self.counts.broken.fetch_add(1, Ordering::Relaxed);
                        self.unlink(slot);
                        continue;
                    }
                    found.push((meta.modified().unwrap_or(std::time::UNIX_EPOCH), slot, meta.len().next_multiple_of(BLOCK)));
                }
            }
        }
        // The newest last: if there are too many, the oldest go.
        found.sort_unstable();
        let objects = found.len();
        for (_, slot, bytes) in found {
            if !self.index.contains_key(&slot) {
                self.admit(slot, Entry { bytes, writing: false });
            }
        }
        self.known.store(true, Ordering::Release);
        if objects > 0 {
            tracing::info!(objects, bytes = self.index.weight(), "the cache's files are known");
        }
    }
}

/// A response on its way to disk.
struct Spooling {
    writing: Writing,
    path: PathBuf,
    held: u64,
    written: u64,
}

/// Where room for a file on its way stands in the index.
fn held(id: u64) -> u128 {
    u128::MAX - u128::from(id)
}
