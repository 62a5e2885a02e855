//! Requests as they happen, for those who watch: the page's list and `portolan top`. Without watchers a request looks at one
//! number; each watcher has a filter, a bounded queue, and sees at most [`PER_SECOND`] requests a second.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use arc_swap::ArcSwap;
use event_listener::{Event, EventListener};
use parking_lot::Mutex;
use serde::Serialize;

use super::RequestDone;
use super::why::Why;
use crate::request::Moment;

/// Watchers at once.
const WATCHERS: usize = 16;
/// Requests that one of them is shown in a second; of more it learns how many there were.
const PER_SECOND: u64 = 50;
/// Lines that wait for a slow watcher.
const QUEUE: usize = 200;
/// Characters of a path that are shown.
const PATH: usize = 300;

/// Everybody who watches.
#[derive(Debug, Default)]
pub struct Tail {
    count: AtomicUsize,
    watchers: ArcSwap<Vec<Arc<Watcher>>>,
    /// One change of the list at a time.
    turn: Mutex<()>,
}

/// What a watcher wants to see; what is left out does not matter.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    /// `503`, or a class such as `5xx`.
    pub status: Option<String>,
    /// A country's code.
    pub country: Option<String>,
    /// The region that answered, or was tried last.
    pub region: Option<String>,
    /// A route.
    pub route: Option<String>,
    /// A part of host and path.
    pub text: Option<String>,
    /// The client's address.
    pub ip: Option<IpAddr>,
    /// A reason ([`Why`]), or `any` for whatever was no success.
    pub why: Option<String>,
}

/// Somebody who watches.
#[derive(Debug)]
pub struct Watcher {
    wanted: Wanted,
    lines: Mutex<VecDeque<Line>>,
    /// The second in the upper half, what was shown in it in the lower.
    shown: AtomicU64,
    skipped: AtomicU64,
    filled: Event,
}

/// A request, as it is shown.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// When it was over, in milliseconds since 1970.
    pub at: u64,
    /// Who asked.
    pub client: IpAddr,
    /// Where from.
    pub country: String,
    /// The method.
    pub method: String,
    /// The host.
    pub host: String,
    /// The path, without the query.
    pub path: String,
    /// The status.
    pub status: u16,
    /// The route.
    pub route: Option<Arc<str>>,
    /// The region of the last attempt.
    pub region: Option<Arc<str>>,
    /// How many attempts there were.
    pub attempts: usize,
    /// What the cache did.
    pub cache: Option<&'static str>,
    /// Why it was no success.
    pub why: Option<&'static str>,
    /// Rules and limits that applied.
    pub rules: Vec<Arc<str>>,
    /// How long it took.
    pub ms: f64,
    /// `X-Request-Id`.
    pub request_id: String,
}

impl Wanted {
    fn suits(&self, done: &RequestDone<'_>) -> bool {
        let Self { status, country, region, route, text, ip, why } = self;
        let snapshot = &done.live.snapshot;
        let status_suits = |wanted: &String| match wanted.strip_suffix("xx") {
            Some(class) => class == (done.status / 100).to_string(),
            None => *wanted == done.status.to_string(),
        };
        let is_region = |wanted: &String| done.region().is_some_and(|region| **region == **wanted);
        let is_route =
            |wanted: &String| done.route.and_then(|id| snapshot.route(id)).is_some_and(|route| *route.name == **wanted);
        let is_why = |wanted: &String| Why::of(done).is_some_and(|why| *wanted == "any" || why.label() == wanted);
        status.as_ref().is_none_or(status_suits)
            && country.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(done.country.as_str()))
            && ip.is_none_or(|ip| ip == done.client)
            && region.as_ref().is_none_or(is_region)
            && route.as_ref().is_none_or(is_route)
            && text.as_ref().is_none_or(|text| done.path.contains(text.as_str()) || done.host.contains(text.as_str()))
            && why.as_ref().is_none_or(is_why)
    }
}

impl Tail {
    /// Shows requests to somebody until it is dropped; nothing if too many watch already.
    pub fn watch(self: &Arc<Self>, wanted: Wanted) -> Option<Watching> {
        let _turn = self.turn.lock();
        let mut all = self.watchers.load_full().to_vec();
        if all.len() >= WATCHERS {
            return None;
        }
        let watcher = Arc::new(Watcher {
            wanted,
            lines: Mutex::default(),
            shown: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            filled: Event::new(),
        });
        all.push(watcher.clone());
        self.count.store(all.len(), Relaxed);
        self.watchers.store(Arc::new(all));
        Some(Watching { tail: self.clone(), watcher })
    }

    /// Does anybody watch?
    pub fn is_watched(&self) -> bool {
        self.count.load(Relaxed) > 0
    }

    /// A request is over.
    pub fn record(&self, done: &RequestDone<'_>, now: Moment) {
        if !self.is_watched() {
            return;
        }
        for watcher in self.watchers.load().iter().filter(|watcher| watcher.wanted.suits(done)) {
            watcher.show(done, now);
        }
    }
}

impl Watcher {
    fn show(&self, done: &RequestDone<'_>, now: Moment) {
        let second = now.0.as_secs();
        let step = |old: u64| match old >> 32 == second {
            true => (old & 0xffff_ffff < PER_SECOND).then_some(old + 1),
            false => Some(second << 32 | 1),
        };
        if self.shown.fetch_update(Relaxed, Relaxed, step).is_err() {
            // The first of them is worth a word.
            if self.skipped.fetch_add(1, Relaxed) == 0 {
                self.filled.notify(1);
            }
            return;
        }
        let line = Line::new(done);
        let mut lines = self.lines.lock();
        if lines.len() == QUEUE {
            lines.pop_front();
            self.skipped.fetch_add(1, Relaxed);
        }
        lines.push_back(line);
        drop(lines);
        self.filled.notify(1);
    }
}

impl Line {
    fn new(done: &RequestDone<'_>) -> Self {
        let snapshot = &done.live.snapshot;
        let limits = done.limits.iter().filter(|seen| seen.decision != crate::limits::Decision::Allowed);
        let limits = limits.filter_map(|seen| snapshot.limits.rule(seen)).map(|limit| limit.id.clone());
        let at = done.at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self {
            at: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
            client: done.client,
            country: done.country.to_string(),
            method: done.method.as_str().chars().take(20).collect(),
            host: done.host.chars().take(100).collect(),
            path: done.path.chars().take(PATH).collect(),
            status: done.status,
            route: done.route.and_then(|id| snapshot.route(id)).map(|route| route.name.clone()),
            region: done.region().cloned(),
            attempts: done.plan.map_or(0, |plan| plan.tries.len()),
            cache: done.cache.map(|status| status.label()),
            why: Why::of(done).map(Why::label),
            rules: done.matches.iter().map(|m| m.rule.clone()).chain(limits).take(8).collect(),
            ms: done.total.as_micros() as f64 / 1_000.0,
            request_id: done.request_id.to_owned(),
        }
    }
}

/// Somebody watches for as long as this lives.
#[derive(Debug)]
pub struct Watching {
    tail: Arc<Tail>,
    watcher: Arc<Watcher>,
}

impl Watching {
    /// What waits, the oldest first, and how many more there were that suit.
    pub fn take(&self) -> (Vec<Line>, u64) {
        (self.watcher.lines.lock().drain(..).collect(), self.watcher.skipped.swap(0, Relaxed))
    }

    /// Does something wait?
    pub fn waits(&self) -> bool {
        !self.watcher.lines.lock().is_empty() || self.watcher.skipped.load(Relaxed) > 0
    }

    /// Something will wait. Listen first, then look.
    pub fn filled(&self) -> EventListener {
        self.watcher.filled.listen()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _turn = self.tail.turn.lock();
        let mut all = self.tail.watchers.load_full().to_vec();
        all.retain(|watcher| !Arc::ptr_eq(watcher, &self.watcher));
        self.tail.count.store(all.len(), Relaxed);
        self.tail.watchers.store(Arc::new(all));
    }
}
