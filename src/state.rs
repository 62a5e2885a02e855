//! Everything that outlives a reload, in one place.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use event_listener::Event;
use http::HeaderValue;
use parking_lot::Mutex;
use prometheus::IntCounter;
use serde::Serialize;

use crate::cache::purge::{Purge, What, millis};
use crate::config::problem::ProblemJson;
use crate::limits::{self, Question, Shared};
use crate::memory::Memory;
use crate::observe::RequestDone;
use crate::observe::access_log::AccessLog;
use crate::observe::lately::Lately;
use crate::observe::metrics::{HostMetrics, Metrics, RegionMetrics, RouteMetrics};
use crate::observe::tail::Tail;
use crate::observe::trace::{count as spans_of, spans};
use crate::observe::traffic::Traffic;
use crate::orders::Orders;
use crate::proxy::store::Store;
use crate::request::Moment;
use crate::snapshot::Snapshot;
use crate::tasks::cluster::Cluster;
use crate::tasks::cluster::purges::Heard;
use crate::tasks::dns::Resolver;
use crate::tasks::otlp::Outlet;
use crate::tasks::seconds::Pulse;

/// A snapshot in force, with the metrics of its routes and regions at hand.
#[derive(Debug)]
pub struct Live {
    /// What decisions read.
    pub snapshot: Snapshot,
    /// By [`crate::routes::RouteId`].
    pub routes: Box<[Arc<RouteMetrics>]>,
    /// By [`crate::regions::RegionId`].
    pub regions: Box<[Arc<RegionMetrics>]>,
    /// By the hosts that routes name.
    pub hosts: HostMetrics,
    /// What its limits said so far, by their position.
    pub limits: Box<[Arc<[IntCounter; limits::Decision::ALL.len()]>]>,
    /// The regions' names as header values, made once: cloning one allocates nothing.
    pub region_headers: Box<[HeaderValue]>,
}

impl Live {
    /// Looks the metrics up.
    pub fn new(snapshot: Snapshot, metrics: &Metrics, traffic: &Traffic) -> Self {
        let routes = snapshot.routes.iter().enumerate();
        let routes = routes.map(|(nth, r)| metrics.route(&r.name, nth, traffic.route(&r.name))).collect();
        let regions = snapshot.regions.iter().map(|r| metrics.region(&r.name, traffic.region(&r.name))).collect();
        let hosts = metrics.hosts(&snapshot);
        let limits = snapshot.limits.rules.iter().map(|limit| metrics.limit(&limit.id)).collect();
        // A region's name is made of letters, digits, `_`, `-` and `.`, so each is a header value.
        let header = |name: &str| HeaderValue::from_str(name).unwrap_or(HeaderValue::from_static("-"));
        let region_headers = snapshot.regions.iter().map(|r| header(&r.name)).collect();
        Self { snapshot, routes, regions, hosts, limits, region_headers }
    }
}

/// How the last reload went.
#[derive(Debug, Clone)]
pub struct ReloadStatus {
    /// How many configurations have been in force.
    pub generation: u64,
    /// When the last one was tried.
    pub at: SystemTime,
    /// What asked for it: `start`, `file`, `signal` or `admin`.
    pub trigger: &'static str,
    /// It is in force.
    pub successful: bool,
    /// Its problems, warnings included.
    pub problems: Vec<ProblemJson>,
    /// Those before it and it, the last one last.
    pub history: VecDeque<Reload>,
}

/// A reload that is over.
#[derive(Debug, Clone, Serialize)]
pub struct Reload {
    /// When it was tried, as RFC 3339.
    pub at: String,
    /// What asked for it.
    pub trigger: &'static str,
    /// It is in force.
    pub successful: bool,
    /// How many configurations have been in force.
    pub generation: u64,
    /// The first of its problems, and how many there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// How many problems there are.
    pub problems: usize,
}

/// Reloads that are remembered.
const RELOADS: usize = 20;

impl ReloadStatus {
    /// Adds this one to those that are remembered.
    pub fn remember(mut self) -> Self {
        if self.history.len() == RELOADS {
            self.history.pop_front();
        }
        let place = |p: &ProblemJson| match (&p.file, p.line) {
            (Some(file), Some(line)) => format!("{file}:{line}: {}", p.message),
            _ => p.message.clone(),
        };
        self.history.push_back(Reload {
            at: humantime::format_rfc3339_seconds(self.at).to_string(),
            trigger: self.trigger,
            successful: self.successful,
            generation: self.generation,
            problem: self.problems.first().map(place),
            problems: self.problems.len(),
        });
        self
    }
}

/// Everything that outlives a reload.
#[derive(Debug)]
pub struct State {
    /// The snapshot in force.
    pub live: ArcSwap<Live>,
    /// What decisions read: health, addresses, budgets, what was learned.
    pub memory: Arc<Memory>,
    /// How names are resolved.
    pub resolver: Resolver,
    /// Metrics.
    pub metrics: Metrics,
    /// The access log.
    pub access_log: AccessLog,
    /// Requests of the last minutes.
    pub traffic: Traffic,
    /// What happened lately.
    pub lately: Lately,
    /// Requests for those who watch.
    pub tail: Arc<Tail>,
    /// Spans for the collector.
    pub spans: Outlet,
    /// What is told once a second.
    pub pulse: Pulse,
    /// Configurations that were in force, for as long as a request holds on to them.
    pub retired: Mutex<Vec<Weak<Live>>>,
    /// How the last reload went.
    pub reload: Mutex<ReloadStatus>,
    /// When the process started.
    pub started: SystemTime,
    /// Orders for regions, and the file where they survive a restart.
    pub orders: Orders,
    /// What is stored of responses.
    pub store: &'static Store,
    /// Other nodes, if there may be any.
    pub cluster: Option<Arc<Cluster>>,
    /// Somebody else serves from now on.
    pub leaving: Leaving,
}

/// Another process has taken this one's sockets.
#[derive(Debug, Default)]
pub struct Leaving {
    flag: AtomicBool,
    told: Event,
}

impl Leaving {
    /// Does somebody else serve new connections?
    pub fn now(&self) -> bool {
        self.flag.load(Relaxed)
    }

    /// From here on.
    pub fn begin(&self) {
        self.flag.store(true, Relaxed);
        self.told.notify(usize::MAX);
    }

    /// Waits until then.
    pub async fn begun(&self) {
        let told = self.told.listen();
        if !self.now() {
            told.await;
        }
    }
}

impl State {
    /// Asks all nodes together.
    pub async fn ask(&self, question: Question) -> Shared {
        match &self.cluster {
            Some(cluster) => cluster.ask(question).await,
            None => Shared::Unreachable,
        }
    }

    /// Purges, here and on other nodes; here it is on disk on return, if the cache has one. Which nodes have it:
    /// `None` if there are none, or if they cannot be reached and will be told later.
    pub async fn purge(&self, what: Vec<What>, soft: bool) -> io::Result<Option<Vec<Heard>>> {
        let at = millis(SystemTime::now());
        let purges: Vec<Purge> = what.into_iter().map(|what| Purge { what, soft, at }).collect();
        self.metrics.cache.purges.inc_by(purges.len() as u64);
        let (store, ours) = (self.store, purges.clone());
        // It holds here, whether it can be written or not, and others have disks of their own.
        let told = async {
            match &self.cluster {
                Some(cluster) => cluster.purge(purges).await,
                None => None,
            }
        };
        let (kept, heard) = tokio::join!(store.purge_and_keep(ours), told);
        kept.map(|()| heard)
    }

    /// Forgets what metrics and traffic know of what `live` does not have.
    pub fn sweep(&self, live: &Live) {
        self.traffic.tidy();
        self.metrics.sweep(live);
    }

    /// Remembers a request that is over.
    pub fn record(&self, done: &RequestDone<'_>, now: Moment) {
        self.metrics.record(done);
        self.access_log.record(done);
        let failed = done.status >= 500;
        if done.route.is_none() {
            self.traffic.unrouted.add(done.took(), failed);
        }
        if let Some(country) = self.traffic.country(done.country) {
            country.add(done.took(), failed);
        }
        self.tail.record(done, now);
        if let Some(trace) = done.trace.filter(|trace| trace.is_sent(done)) {
            match self.spans.place() {
                Some(place) => place.send(spans(trace, done, now)),
                // What they would have been is not worth finding out.
                None => self.metrics.tracing.dropped(spans_of(done)),
            }
        }
    }
}
