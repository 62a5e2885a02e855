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
use tokio::time::{Instant, timeout, timeout_at};

use super::disk::PATIENCE;
use super::object::Head;

/// This much of a body stays in memory for those who read along.
const WINDOW: u64 = 1 << 20;
/// Of what is lost this much at most, unless there was more already: who is further behind has lost it.
const MOST: u64 = 16 * WINDOW;
/// How long the first wait for a reader who is more than a window behind is; for each window more it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(20);
/// How often it doubles.
const DOUBLINGS: u64 = 6;
/// Who takes nothing for so long, where others wait for it, is waited for no longer.
const STALLED: Duration = Duration::from_secs(60);
/// Whoever writes what is lost reads this much of it at once: more than comes in the meantime.
const CATCH_UP: usize = 512 << 10;
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
    /// Of what is lost so much is kept.
    keep: u64,
    /// The chunks are a stored object's, and counted there.
    stored: bool,
    readers: Vec<Reader>,
    next_reader: u64,
}

/// Somebody who reads along.
#[derive(Debug)]
struct Reader {
    number: u64,
    /// Where it is.
    at: u64,
    /// Since when it is more than a window behind, and takes nothing.
    late: Option<Instant>,
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
        if !std::mem::replace(&mut progress.lost, true) {
            // What was kept so far for the slowest is not taken from it.
            let slowest = progress.readers.iter().map(|reader| reader.at).min();
            progress.keep = MOST.max(progress.len.saturating_sub(slowest.unwrap_or(progress.len)));
        }
        self.trim(&mut progress);
    }

    /// Is it lost?
    pub fn is_lost(&self) -> bool {
        self.progress.lock().lost
    }

    /// Lets go of what nobody needs in memory any more.
    fn trim(&self, progress: &mut Progress) {
        if progress.stored {
            return;
        }
        let slowest = progress.readers.iter().map(|reader| reader.at).min();
        let written = progress.spool.as_ref().map(|spool| spool.written);
        let needed = slowest.unwrap_or(progress.len).max(progress.len.saturating_sub(progress.keep));
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

    /// How far the slowest reader is behind, where that matters. `None`: there is nobody whom it is for.
    fn behind(&self) -> Option<u64> {
        let mut progress = self.progress.lock();
        if !progress.lost {
            return Some(0);
        }
        let (first, len) = (progress.first, progress.len);
        for reader in &mut progress.readers {
            reader.late = if len.saturating_sub(reader.at) < WINDOW { None } else { reader.late.or(Some(Instant::now())) };
        }
        // Who is behind what is kept has lost it; who takes nothing of so much is gone.
        let gone = |reader: &Reader| reader.at < first || reader.late.is_some_and(|late| late.elapsed() > STALLED);
        progress.readers.retain(|reader| !gone(reader));
        self.trim(&mut progress);
        let slowest = progress.readers.iter().map(|reader| reader.at).min()?;
        Some(len.saturating_sub(slowest))
    }

    /// Whoever writes what is lost must not outrun the slowest reader by much, and waits, the longer the further it is
    /// ahead. But never for ever: the task that writes may be the one that reads, and reads nothing meanwhile. False:
    /// there is nobody left whom it is for.
    pub async fn wait_for_room(&self) -> bool {
        let Some(behind) = self.behind() else { return false };
        let doublings = match behind / WINDOW {
            0 => return true,
            windows => (windows - 1).min(DOUBLINGS),
        };
        let until = Instant::now() + FIRST_WAIT * (1 << doublings);
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            match self.behind() {
                None => return false,
                Some(behind) if behind < WINDOW => return true,
                Some(_) if timeout_at(until, room).await.is_err() => return true,
                Some(_) => {}
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

    /// One more reads along, from the start; `None`: the start is gone. `own`: it is the one who writes.
    pub fn join(self: &Arc<Self>, own: bool) -> Option<Along> {
        let mut progress = self.progress.lock();
        if progress.first > 0 && progress.spool.is_none() {
            return None;
        }
        let number = progress.next_reader;
        progress.next_reader += 1;
        progress.readers.push(Reader { number, at: 0, late: None });
        Some(Along { fill: self.clone(), own, number, at: 0, end: None })
    }

    fn step(&self, &Along { own, number, at, end, .. }: &Along) -> Step {
        let mut progress = self.progress.lock();
        if let Some(reader) = progress.readers.iter_mut().find(|reader| reader.number == number && reader.at != at) {
            (reader.at, reader.late) = (at, None);
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
                if progress.lost && own && end.is_none() && after < progress.len {
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

/// What follows so many bytes, in one.
fn joined(chunks: &VecDeque<Bytes>, mut skip: u64) -> Bytes {
    let mut all = BytesMut::with_capacity(CATCH_UP);
    for chunk in chunks {
        let skipped = skip.min(chunk.len() as u64);
        skip -= skipped;
        let rest = chunk.get(skipped as usize..).unwrap_or_default();
        let room = CATCH_UP - all.len();
        all.extend_from_slice(rest.get(..room).unwrap_or(rest));
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
    /// It is read by whoever writes it.
    own: bool,
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
            let step = self.fill.step(self);
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
                    let read = timeout(PATIENCE, read).await.map_err(|_| Cut)?;
                    let bytes = read.map_err(|_| Cut)?.map_err(|_| Cut)?;
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
        progress.readers.retain(|reader| reader.number != self.number);
        if progress.lost {
            self.fill.trim(&mut progress);
        }
        drop(progress);
        self.fill.room.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use pingora::cache::CacheMeta;
    use pingora::http::ResponseHeader;

    use super::*;

    const CHUNK: u64 = 64 << 10;

    fn fill(held: &Arc<AtomicU64>) -> Arc<Fill> {
        let now = SystemTime::now();
        let meta = CacheMeta::new(now, now, 0, 0, ResponseHeader::build(200, None).unwrap());
        Arc::new(Fill::new(1, 1, Head::new(b"key", &meta).unwrap(), held.clone()))
    }

    fn push(fill: &Fill, chunks: u64) {
        for _ in 0..chunks {
            fill.push(Bytes::from_static(&[b'x'; CHUNK as usize]));
        }
    }

    async fn rest(reader: &mut Along) -> u64 {
        let mut read = 0;
        while let Some(bytes) = reader.next().await.unwrap() {
            read += bytes.len() as u64;
        }
        read
    }

    #[tokio::test]
    async fn what_is_held_is_counted_once() {
        let held = Arc::<AtomicU64>::default();
        for lost in [false, true] {
            let fill = fill(&held);
            let mut reader = fill.join(false).unwrap();
            push(&fill, 10);
            let chunks = fill.end(Outcome::Whole).unwrap();
            if lost {
                // An unsafe request came just now.
                fill.lose();
            }
            fill.settle(&chunks);
            assert_eq!((rest(&mut reader).await, held.load(Ordering::Relaxed)), (10 * CHUNK, 0));
            drop((reader, fill));
            assert_eq!(held.load(Ordering::Relaxed), 0);
        }
    }

    #[tokio::test]
    async fn what_somebody_still_needs_is_not_taken_when_it_is_lost() {
        let fill = fill(&Arc::default());
        let mut slow = fill.join(true).unwrap();
        push(&fill, 2 * MOST / CHUNK);
        fill.lose();
        fill.end(Outcome::Whole);
        assert_eq!(rest(&mut slow).await, 2 * MOST);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let held = Arc::<AtomicU64>::default();
        let fill = fill(&held);
        let gone = fill.join(true).unwrap();
        fill.lose();
        let (mut most, mut chunks) = (0, 0);
        let began = Instant::now();
        loop {
            push(&fill, 1);
            chunks += 1;
            most = most.max(held.load(Ordering::Relaxed));
            if !fill.wait_for_room().await {
                break;
            }
        }
        let waited = began.elapsed();
        assert!(most <= MOST && waited < STALLED * 2, "{chunks} chunks, {most} bytes, {waited:?}");
        assert_eq!((held.load(Ordering::Relaxed), fill.join(false).is_none()), (0, true));
        drop(gone);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_was_at_the_end_is_not_gone_after_a_silence() {
        let fill = fill(&Arc::default());
        let mut reader = fill.join(true).unwrap();
        fill.lose();
        push(&fill, 1);
        assert!(reader.next().await.unwrap().is_some());
        tokio::time::advance(STALLED * 5).await;
        push(&fill, 2 * WINDOW / CHUNK);
        assert!(fill.wait_for_room().await);
        fill.end(Outcome::Whole);
        assert_eq!(rest(&mut reader).await, 2 * WINDOW);
    }
}
