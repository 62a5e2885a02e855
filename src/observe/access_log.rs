//! One JSON line per request, written by a thread of its own.
//!
//! A request appends its line to one of a few buffers, so that threads do not wait for each other; the
//! writer collects them every [`BATCH`]. A buffer that is full drops the line and counts it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use prometheus::IntCounter;
use serde::{Serialize, Serializer};

use super::RequestDone;
use crate::cache::status::Status;
use crate::limits::{Decision, Limit};
use crate::overload::Shed;
use crate::state::Live;
use crate::upstream::{Plan, Try, plan};
use crate::waf::Match;

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
    retarget: Option<Retarget>,
}

/// A new target, and the lines of requests that were over before: those belong to the old one.
#[derive(Debug)]
struct Retarget {
    before: Vec<u8>,
    target: Target,
}

#[derive(Debug)]
enum Target {
    Off,
    Stdout,
    File(File),
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

    /// From now on writes to `path`; on an error it goes on as before.
    pub fn retarget(&self, path: &Path) -> io::Result<()> {
        let target = Target::open(path)?;
        self.shared.off.store(matches!(target, Target::Off), Ordering::Relaxed);
        let mut signal = self.shared.signal.lock();
        match &mut signal.retarget {
            Some(waiting) => waiting.target = target,
            none => *none = Some(Retarget { before: self.shared.take_lines(), target }),
        }
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
        if shared.off.load(Ordering::Relaxed) {
            return;
        }
        let was_empty = {
            let mut buffer = shared.buffer().lock();
            if buffer.len() >= BUFFER {
                shared.dropped.inc();
                return;
            }
            let was_empty = buffer.is_empty();
            // Writing JSON to memory cannot fail.
            let _ = serde_json::to_writer(&mut *buffer, &Line::new(done));
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
            && let Err(error) = target.write(batch)
        {
            let lines = batch.iter().filter(|b| **b == b'\n').count();
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
                self.wake.wait_while(&mut signal, |s| !s.lines && !s.closing && s.retarget.is_none());
                if !signal.closing && signal.retarget.is_none() {
                    // Lines are coming: let them gather, unless something more urgent comes.
                    self.wake.wait_while_for(&mut signal, |s| !s.closing && s.retarget.is_none(), BATCH);
                }
                signal.lines = false;
                closing = signal.closing;
                signal.retarget.take()
            };
            if let Some(Retarget { before, target: new }) = retarget {
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

impl Target {
    fn open(path: &Path) -> io::Result<Self> {
        match path.to_str() {
            Some("off") => Ok(Self::Off),
            Some("stdout") => Ok(Self::Stdout),
            _ => OpenOptions::new().create(true).append(true).open(path).map(Self::File),
        }
    }

    fn write(&mut self, batch: &[u8]) -> io::Result<()> {
        match self {
            Self::Off => Ok(()),
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(batch)?;
                stdout.flush()
            }
            Self::File(file) => file.write_all(batch),
        }
    }
}

/// A log's path as the configuration means it: only a file is relative to something.
pub fn resolve(path: &Path, beside: impl FnOnce(&Path) -> PathBuf) -> PathBuf {
    match path.to_str() {
        Some("off" | "stdout") => path.to_owned(),
        _ => beside(path),
    }
}

/// The fields of a line, in their order.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(serialize_with = "display")]
    time: humantime::Rfc3339Timestamp,
    request_id: &'a str,
    client: std::net::IpAddr,
    country: &'a str,
    method: &'a str,
    host: &'a str,
    path: &'a str,
    status: u16,
    bytes: usize,
    route: Option<&'a str>,
    region: Option<&'a str>,
    /// The region that steering put first, and why the request did not begin there.
    #[serde(skip_serializing_if = "Option::is_none")]
    moved: Option<MovedLine<'a>>,
    /// Nothing was usable.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    panic: bool,
    /// Rules that applied, and what they saw.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    waf: Vec<MatchLine<'a>>,
    /// What the cache did, if it was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<&'static str>,
    /// Why it was let go, if there was too much at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    shed: Option<&'static str>,
    /// Limits that did not just allow it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    limits: Vec<LimitLine<'a>>,
    attempts: Attempts<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_retried: Option<&'static str>,
    total_ms: Millis,
}

impl<'a> Line<'a> {
    fn new(done: &'a RequestDone<'a>) -> Self {
        let last = done.plan.and_then(|p| p.tries.last());
        Self {
            time: humantime::format_rfc3339_millis(done.at),
            request_id: done.request_id,
            client: done.client,
            country: done.country.as_str(),
            method: done.method.as_str(),
            host: done.host,
            path: done.path,
            status: done.status,
            bytes: done.bytes,
            route: done.route.and_then(|id| done.live.snapshot.route(id)).map(|r| &*r.name),
            region: last.and_then(|t| done.live.snapshot.region(t.region)).map(|r| &*r.name),
            moved: done
                .plan
                .and_then(|p| p.moved)
                .and_then(|(from, why)| Some(MovedLine { from: &done.live.snapshot.region(from)?.name, because: why.label() })),
            panic: done.plan.is_some_and(|p| p.panic),
            waf: done.matches.iter().map(MatchLine::new).collect(),
            cache: done.cache.map(Status::label),
            shed: done.shed.map(Shed::label),
            limits: LimitLine::all(done),
            attempts: Attempts { live: done.live, plan: done.plan },
            not_retried: done.plan.and_then(|p| p.stopped).map(|s| s.label()),
            total_ms: Millis(done.total),
        }
    }
}

fn display<T: std::fmt::Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

struct Attempts<'a> {
    live: &'a Live,
    plan: Option<&'a Plan>,
}

#[derive(Serialize)]
struct MovedLine<'a> {
    from: &'a str,
    because: &'static str,
}

/// A rule that applied.
#[derive(Serialize)]
struct MatchLine<'a> {
    rule: &'a str,
    action: &'static str,
    /// By operand; `null` is missing.
    saw: std::collections::BTreeMap<&'a str, Option<&'a str>>,
}

impl<'a> MatchLine<'a> {
    fn new(m: &'a Match) -> Self {
        let saw = m.seen.iter().map(|seen| (seen.operand.as_str(), seen.value.as_deref())).collect();
        Self { rule: &m.rule, action: m.action, saw }
    }
}

/// A limit that did not just allow it.
#[derive(Serialize)]
struct LimitLine<'a> {
    limit: &'a str,
    decision: &'static str,
}

impl<'a> LimitLine<'a> {
    fn all(done: &RequestDone<'a>) -> Vec<Self> {
        let seen = done.limits.iter().filter(|seen| seen.decision != Decision::Allowed);
        let line = |seen| {
            let limit: &Limit = done.live.snapshot.limits.rule(seen)?;
            Some(Self { limit: &limit.id, decision: seen.decision.label() })
        };
        seen.filter_map(line).collect()
    }
}

/// One attempt.
#[derive(Serialize)]
struct AttemptLine<'a> {
    region: &'a str,
    #[serde(serialize_with = "display_upstream")]
    upstream: Option<&'a crate::config::units::UpstreamUrl>,
    /// Which of the addresses of its name.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "display_address")]
    address: Option<&'a crate::regions::endpoint::Address>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    ms: Millis,
}

fn display_upstream<S: Serializer>(value: &Option<&crate::config::units::UpstreamUrl>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(url) => to.collect_str(url),
        None => to.serialize_none(),
    }
}

fn display_address<S: Serializer>(value: &Option<&crate::regions::endpoint::Address>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(address) => to.collect_str(address),
        None => to.serialize_none(),
    }
}

impl Serialize for Attempts<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let tries = self.plan.map(|p| p.tries.as_slice()).unwrap_or_default();
        let url = |t: &Try| plan::upstream(&self.live.snapshot.regions, t.region, t.upstream).map(|u| &u.url);
        to.collect_seq(tries.iter().map(|t| AttemptLine {
            region: self.live.snapshot.region(t.region).map_or("", |r| &r.name),
            upstream: url(t),
            address: t.endpoint.as_ref().filter(|_| url(t).is_some_and(|u| u.needs_dns())).map(|e| &e.address),
            outcome: t.outcome.label(),
            status: t.outcome.status(),
            ms: Millis(t.ended.since(t.started)),
        }))
    }
}

/// Milliseconds with three decimals.
struct Millis(Duration);

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(self.0.as_micros() as f64 / 1_000.0)
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
