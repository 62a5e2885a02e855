//! One line per request, written by a thread of its own.
//!
//! A request appends its line to one of a few buffers, so that threads do not wait for each other; the
//! writer collects them every [`BATCH`]. A buffer that is full drops the line and counts it.

mod line;
mod target;
mod text;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use prometheus::IntCounter;

use super::RequestDone;
use crate::config;
use crate::config::units::LogFormat;
use crate::request::{mix, unit};
use line::Line;
pub use target::resolve;
use target::{Lost, Target};
pub use text::address;

/// How long lines are gathered before they are written.
const BATCH: Duration = Duration::from_millis(50);
/// The last lines have this long to be written.
const CLOSE: Duration = Duration::from_secs(2);
/// A buffer holds this many bytes while the writer is busy.
const BUFFER: usize = 4 << 20;
/// More threads than this share buffers.
const BUFFERS: usize = 16;

/// The log. Dropping it writes what is left.
#[derive(Debug)]
pub struct AccessLog {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    off: AtomicBool,
    buffers: [Mutex<Vec<u8>>; BUFFERS],
    signal: Mutex<Signal>,
    wake: Condvar,
    closed: Condvar,
    dropped: IntCounter,
}

#[derive(Debug, Default)]
struct Signal {
    lines: bool,
    closing: bool,
    closed: bool,
    /// The oldest first.
    retarget: Vec<Retarget>,
}

/// A new target, and the lines of requests that were over before: those belong to the old one.
#[derive(Debug)]
struct Retarget {
    before: Vec<u8>,
    target: Target,
}

impl AccessLog {
    /// A log that writes to `path` (`stdout`, `off`, or a file that is appended to).
    pub fn open(path: &Path, dropped: IntCounter) -> io::Result<Self> {
        let target = Target::open(path)?;
        let shared = Arc::new(Shared::new(matches!(target, Target::Off), dropped));
        let theirs = shared.clone();
        let writer = std::thread::Builder::new().name("access-log".into()).spawn(move || {
            theirs.write(target);
            theirs.signal.lock().closed = true;
            theirs.closed.notify_all();
        })?;
        Ok(Self { shared, writer: Mutex::new(Some(writer)) })
    }

    /// From now on writes to `path`; on an error it goes on as before. Blocks on disk, or on the name of a server.
    pub fn retarget(&self, path: &Path) -> io::Result<()> {
        let target = Target::open(path)?;
        self.shared.off.store(matches!(target, Target::Off), Ordering::Relaxed);
        let mut signal = self.shared.signal.lock();
        signal.retarget.push(Retarget { before: self.shared.take_lines(), target });
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Writes what is left and ends the writer.
    pub fn close(&self) {
        self.shared.signal.lock().closing = true;
        self.shared.wake.notify_one();
        let Some(writer) = self.writer.lock().take() else { return };
        // A pipe that nobody reads would hold the process for ever.
        let mut signal = self.shared.signal.lock();
        let late = self.shared.closed.wait_while_for(&mut signal, |s| !s.closed, CLOSE).timed_out();
        drop(signal);
        if !late {
            // A panic of the writer was reported where it happened.
            let _ = writer.join();
        }
    }

    /// Appends the line of a request that is over.
    pub fn record(&self, done: &RequestDone<'_>) {
        let shared = &self.shared;
        let settings = &done.live.snapshot.access_log;
        if shared.off.load(Ordering::Relaxed) || !is_sampled(settings, done) {
            return;
        }
        let was_empty = {
            let mut buffer = shared.buffer().lock();
            if buffer.len() >= BUFFER {
                shared.dropped.inc();
                return;
            }
            let was_empty = buffer.is_empty();
            match &settings.format {
                // Writing JSON to memory cannot fail.
                LogFormat::Json => drop(serde_json::to_writer(&mut *buffer, &Line::new(done))),
                LogFormat::Text(pieces) => text::write(&mut buffer, pieces, done),
            }
            buffer.push(b'\n');
            was_empty
        };
        if was_empty {
            shared.signal.lock().lines = true;
            shared.wake.notify_one();
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.close();
    }
}

/// Is it one of those that are logged?
fn is_sampled(settings: &config::AccessLog, done: &RequestDone<'_>) -> bool {
    let part = settings.sample.iter().find(|(statuses, _)| (statuses.0..=statuses.1).contains(&done.status));
    // Other draws of the request must not decide this one.
    part.is_none_or(|(_, part)| f64::from(unit(mix(done.chance ^ 0x6c_6f67))) < part.0)
}

/// Which buffer is this thread's.
fn thread_slot() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SLOT: usize = NEXT.fetch_add(1, Ordering::Relaxed) % BUFFERS;
    }
    SLOT.with(|slot| *slot)
}

impl Shared {
    fn new(off: bool, dropped: IntCounter) -> Self {
        Self {
            off: AtomicBool::new(off),
            buffers: std::array::from_fn(|_| Mutex::default()),
            signal: Mutex::default(),
            wake: Condvar::new(),
            closed: Condvar::new(),
            dropped,
        }
    }

    /// This thread's buffer.
    fn buffer(&self) -> &Mutex<Vec<u8>> {
        let [first, ..] = &self.buffers;
        self.buffers.get(thread_slot()).unwrap_or(first)
    }

    /// Takes every line that waits.
    fn take_lines(&self) -> Vec<u8> {
        let mut all = Vec::new();
        self.buffers.iter().for_each(|buffer| all.append(&mut buffer.lock()));
        all
    }

    /// Writes lines; those that cannot be written are counted.
    fn put(&self, target: &mut Target, batch: &[u8]) {
        if !batch.is_empty()
            && let Err(Lost { lines, error }) = target.write(batch)
        {
            self.dropped.inc_by(lines as u64);
            tracing::warn!(%error, lines, "the access log cannot be written");
        }
    }

    fn write(&self, mut target: Target) {
        let mut batch = Vec::new();
        let mut closing = false;
        while !closing {
            let retarget = {
                let mut signal = self.signal.lock();
                self.wake.wait_while(&mut signal, |s| !s.lines && !s.closing && s.retarget.is_empty());
                if !signal.closing && signal.retarget.is_empty() {
                    // Lines are coming: let them gather, unless something more urgent comes.
                    self.wake.wait_while_for(&mut signal, |s| !s.closing && s.retarget.is_empty(), BATCH);
                }
                signal.lines = false;
                closing = signal.closing;
                std::mem::take(&mut signal.retarget)
            };
            for Retarget { before, target: new } in retarget {
                self.put(&mut target, &before);
                target = new;
            }
            for buffer in &self.buffers {
                batch.clear();
                std::mem::swap(&mut *buffer.lock(), &mut batch);
                self.put(&mut target, &batch);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_where_the_log_was_when_its_request_was_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let log =
            AccessLog { shared: Arc::new(Shared::new(false, IntCounter::new("x", "x").unwrap())), writer: Mutex::default() };
        let say = |line: &[u8]| log.shared.buffer().lock().extend_from_slice(line);
        say(b"before\n");
        log.retarget(&path("new")).unwrap();
        say(b"after\n");
        // The writer comes to it only now.
        log.shared.signal.lock().closing = true;
        log.shared.write(Target::open(&path("old")).unwrap());
        assert_eq!(std::fs::read_to_string(path("old")).unwrap(), "before\n");
        assert_eq!(std::fs::read_to_string(path("new")).unwrap(), "after\n");
    }
}
