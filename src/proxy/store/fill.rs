//! A response on its way into the store: one writes, any number reads along.
//!
//! What is short stays in memory until it is whole. What is longer goes to disk as it comes; the last of it stays
//! in memory for those who read along. If there is no disk, or no room, the response is *lost*: it passes through
//! a window to those who read it already, hardly faster than they take it, and nobody else finds it.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::object::Head;

/// This much of a body stays in memory for those who read along.
const WINDOW: u64 = 1 << 20;
/// Of what is lost this much at most: who is further behind has lost it.
const MOST: u64 = 16 * WINDOW;
/// How long the first wait for a reader who is more than a window behind is; for each window more it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(20);
/// How often it doubles.
const DOUBLINGS: u64 = 9;
/// So much is read from disk at once.
const READ: u64 = 256 << 10;

/// A response on its way.
#[derive(Debug)]
pub struct Fill {
    /// Its number.
    pub id: u64,
    /// Where it will stand.
    pub slot: u128,
    /// Everything but its body.
    pub head: Head,
    progress: Mutex<Progress>,
    /// There is more, or it is over.
    changed: Notify,
    /// A reader went on, or left.
    room: Notify,
    /// Bytes of all fills in memory.
    held: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Progress {
    chunks: VecDeque<Bytes>,
    /// Where the first chunk begins.
    first: u64,
    /// How much came.
    len: u64,
    outcome: Option<Outcome>,
    spool: Option<Spool>,
    lost: bool,
    /// The chunks are a stored object's, and counted there.
    stored: bool,
    /// Where readers are, by their number.
    readers: Vec<(u64, u64)>,
    next_reader: u64,
}

/// The file that takes it.
#[derive(Debug)]
struct Spool {
    file: Arc<File>,
    /// Where its body begins.
    start: u64,
    /// How much of the body it has.
    written: u64,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is whole.
    Whole,
    /// It is not, and will not be.
    Failed,
}

/// What a reader gets.
enum Step {
    Chunk(Bytes),
    File(Arc<File>, u64, usize),
    Wait,
    End,
    Fail,
}

impl Fill {
    /// Nothing came yet.
    pub fn new(id: u64, slot: u128, head: Head, held: Arc<AtomicU64>) -> Self {
        Self { id, slot, head, progress: Mutex::default(), changed: Notify::new(), room: Notify::new(), held }
    }

    /// More came; how much it is by now.
    pub fn push(&self, bytes: Bytes) -> u64 {
        let mut progress = self.progress.lock();
        let len = bytes.len() as u64;
        progress.len += len;
        if len > 0 {
            progress.chunks.push_back(bytes);
            self.held.fetch_add(len, Ordering::Relaxed);
        }
        if progress.lost {
            self.trim(&mut progress);
        }
        let all = progress.len;
        drop(progress);
        self.changed.notify_waiters();
        all
    }

    /// What came so far. Whoever lets a file take it asks before more comes, for of that the file hears apart.
    pub fn so_far(&self) -> Vec<Bytes> {
        self.progress.lock().chunks.iter().cloned().collect()
    }

    /// `file` takes it; its body begins at `start`.
    pub fn spool(&self, file: File, start: u64) {
        self.progress.lock().spool = Some(Spool { file: Arc::new(file), start, written: 0 });
    }

    /// The file has it up to here.
    pub fn written(&self, upto: u64) {
        let mut progress = self.progress.lock();
        if let Some(spool) = &mut progress.spool {
            spool.written = upto;
        }
        self.trim(&mut progress);
    }

    /// It is not stored: whoever reads it already goes on.
    pub fn lose(&self) {
        let mut progress = self.progress.lock();
        progress.lost = true;
        self.trim(&mut progress);
    }

    /// Is it lost?
    pub fn is_lost(&self) -> bool {
        self.progress.lock().lost
    }

    /// Lets go of what nobody needs in memory any more.
    fn trim(&self, progress: &mut Progress) {
        let slowest = progress.readers.iter().map(|(_, at)| *at).min();
        let written = progress.spool.as_ref().map(|spool| spool.written);
        let needed = slowest.unwrap_or(progress.len).max(progress.len.saturating_sub(MOST));
        let upto = match (written, progress.lost) {
            // Who is behind the file reads the file.
            (Some(written), false) if progress.outcome.is_some() => written,
            (Some(written), false) => written.min(progress.len.saturating_sub(WINDOW)),
            (Some(written), true) => written.max(needed),
            (None, true) => needed,
            (None, false) => return,
        };
        while let Some(chunk) = progress.chunks.front()
            && progress.first + chunk.len() as u64 <= upto
        {
            let len = chunk.len() as u64;
            progress.first += len;
            self.held.fetch_sub(len, Ordering::Relaxed);
            progress.chunks.pop_front();
        }
    }

    /// How far the slowest reader is behind, where that matters.
    fn behind(&self) -> u64 {
        let progress = self.progress.lock();
        let waiting = progress.len - progress.first;
        if !progress.lost || progress.readers.is_empty() { 0 } else { waiting }
    }

    /// Whoever writes what is lost must not outrun the slowest reader by much, and waits, the longer the further it is
    /// ahead. But never for ever: the task that writes may be the one that reads, and reads nothing meanwhile.
    pub async fn wait_for_room(&self) {
        let doublings = match self.behind() / WINDOW {
            0 => return,
            windows => (windows - 1).min(DOUBLINGS),
        };
        let until = Instant::now() + FIRST_WAIT * (1 << doublings);
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.behind() < WINDOW || timeout_at(until, room).await.is_err() {
                return;
            }
        }
    }

    /// It is over. The chunks, if all of it is in memory.
    pub fn end(&self, outcome: Outcome) -> Option<Vec<Bytes>> {
        let mut progress = self.progress.lock();
        if progress.outcome.is_none() {
            progress.outcome = Some(outcome);
        }
        let whole = (progress.first == 0 && progress.spool.is_none() && !progress.lost)
            .then(|| progress.chunks.iter().cloned().collect());
        self.trim(&mut progress);
        drop(progress);
        self.changed.notify_waiters();
        whole
    }

    /// It is an object now, and whoever still reads it reads that one's chunks.
    pub fn settle(&self, chunks: &[Bytes]) {
        let mut progress = self.progress.lock();
        let held = progress.chunks.iter().map(|chunk| chunk.len() as u64).sum();
        self.held.fetch_sub(held, Ordering::Relaxed);
        (progress.first, progress.stored) = (0, true);
        progress.chunks = chunks.iter().cloned().collect();
    }

    /// How it ended, if it did.
    pub fn outcome(&self) -> Option<Outcome> {
        self.progress.lock().outcome
    }

    /// One more reads along, from the start; `None`: the start is gone.
    pub fn join(self: &Arc<Self>) -> Option<Along> {
        let mut progress = self.progress.lock();
        if progress.first > 0 && progress.spool.is_none() {
            return None;
        }
        let number = progress.next_reader;
        progress.next_reader += 1;
        progress.readers.push((number, 0));
        Some(Along { fill: self.clone(), number, at: 0, end: None })
    }

    fn step(&self, number: u64, at: u64, end: Option<u64>) -> Step {
        let mut progress = self.progress.lock();
        if let Some((_, here)) = progress.readers.iter_mut().find(|(n, _)| *n == number) {
            *here = at;
        }
        if progress.lost {
            self.trim(&mut progress);
        }
        if end.is_some_and(|end| at >= end) {
            return Step::End;
        }
        if at < progress.first {
            return match &progress.spool {
                Some(spool) if at < spool.written => {
                    let upto = spool.written.min(end.unwrap_or(u64::MAX));
                    Step::File(spool.file.clone(), spool.start + at, (upto - at).min(READ) as usize)
                }
                _ => Step::Fail,
            };
        }
        let mut begin = progress.first;
        for chunk in &progress.chunks {
            let after = begin + chunk.len() as u64;
            if at < after {
                let to = end.map_or(after, |end| after.min(end));
                // What is lost comes no slower than it goes: all of it at once.
                if progress.lost && progress.chunks.len() > 1 && end.is_none() {
                    return Step::Chunk(joined(&progress.chunks, at - progress.first));
                }
                return Step::Chunk(chunk.slice((at - begin) as usize..(to - begin) as usize));
            }
            begin = after;
        }
        match progress.outcome {
            Some(Outcome::Whole) => Step::End,
            Some(Outcome::Failed) => Step::Fail,
            None => Step::Wait,
        }
    }
}

/// All chunks in one, but for as many bytes at their beginning.
fn joined(chunks: &VecDeque<Bytes>, mut skip: u64) -> Bytes {
    let mut all = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
    for chunk in chunks {
        let skipped = skip.min(chunk.len() as u64);
        all.extend_from_slice(chunk.get(skipped as usize..).unwrap_or_default());
        skip -= skipped;
    }
    all.freeze()
}

impl Drop for Fill {
    fn drop(&mut self) {
        let progress = self.progress.get_mut();
        if progress.stored {
            return;
        }
        let held = progress.chunks.iter().map(|chunk| chunk.len() as u64).sum();
        self.held.fetch_sub(held, Ordering::Relaxed);
    }
}

/// Somebody who reads along.
#[derive(Debug)]
pub struct Along {
    fill: Arc<Fill>,
    number: u64,
    at: u64,
    end: Option<u64>,
}

/// The response ended before it was whole, or what was kept of it cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut;

impl Along {
    /// What is read.
    pub fn fill(&self) -> &Fill {
        &self.fill
    }

    /// Goes to another place of the body, which has a known length.
    pub fn seek(&mut self, from: u64, to: Option<u64>) {
        (self.at, self.end) = (from, to);
    }

    /// What comes next; `None`: it is over. May be cancelled.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Cut> {
        loop {
            let changed = self.fill.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let step = self.fill.step(self.number, self.at, self.end);
            self.fill.room.notify_waiters();
            match step {
                Step::Chunk(bytes) => {
                    self.at += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                Step::File(file, at, len) => {
                    let read = tokio::task::spawn_blocking(move || {
                        let mut bytes = vec![0; len];
                        file.read_exact_at(&mut bytes, at).map(|()| Bytes::from(bytes))
                    });
                    let bytes = read.await.map_err(|_| Cut)?.map_err(|_| Cut)?;
                    self.at += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                Step::Wait => changed.await,
                Step::End => return Ok(None),
                Step::Fail => return Err(Cut),
            }
        }
    }
}

impl Drop for Along {
    fn drop(&mut self) {
        let mut progress = self.fill.progress.lock();
        progress.readers.retain(|(number, _)| *number != self.number);
        if progress.lost {
            self.fill.trim(&mut progress);
        }
        drop(progress);
        self.fill.room.notify_waiters();
    }
}
