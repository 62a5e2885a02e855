//! The thread that writes files, and the one that finds them when a process begins.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::disk::{BLOCK, Disk, Entry, STEP, place};
use super::file::{self, Writing};
use super::fill::Fill;
use super::object::{Body, Head, Object};

/// What the thread does.
pub enum Job {
    /// Writes a whole object.
    Keep(u128, Arc<Object>, OwnedSemaphorePermit),
    /// Begins the file of a response on its way, with what came of it so far.
    Begin(Arc<Fill>, Vec<Bytes>, OwnedSemaphorePermit),
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

impl Disk {
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
        // An entry whose place is taken counts as evicted, and its file would go with it: it is the new one's.
        self.index.remove(&slot);
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
    pub fn work(&self, jobs: &Receiver<Job>) {
        let mut open: HashMap<u64, Spooling> = HashMap::new();
        while let Ok(job) = jobs.recv() {
            match job {
                Job::Keep(slot, object, permit) => {
                    match self.write(slot, &object) {
                        Ok(true) => self.recovered(),
                        // There is no room for it now.
                        Ok(false) => object.kept.store(false, Ordering::Relaxed),
                        Err(error) => {
                            object.kept.store(false, Ordering::Relaxed);
                            self.fail("writing", &error);
                        }
                    }
                    self.unqueue(slot);
                    drop(permit);
                }
                Job::Begin(fill, so_far, permit) => {
                    match self.start(&fill, &so_far) {
                        Ok(spooling) => drop(open.insert(fill.id, spooling)),
                        Err(error) => self.lost(&fill, &error),
                    }
                    drop(permit);
                }
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
                Job::Delete(slot, except) => {
                    self.delete(slot, except);
                    self.deletes.fetch_sub(1, Ordering::Relaxed);
                }
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

    fn write(&self, slot: u128, object: &Object) -> io::Result<bool> {
        let Body::Memory(chunks) = &object.body else { return Ok(false) };
        let expected = (object.body.len() + object.weight()).next_multiple_of(BLOCK);
        // Fills are numbered from 1.
        if !self.hold(0, 0, expected) {
            return Ok(false);
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
        result.map(|()| true).inspect_err(|_| drop(fs::remove_file(&path)))
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
    pub fn scan(&self) {
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
                // It may have been deleted since it was found; who deletes it from here on takes it out of the index, too.
                if !place(&self.path, slot).exists() {
                    self.index.remove(&slot);
                }
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
