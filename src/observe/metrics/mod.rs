//! Prometheus metrics. What a request touches is looked up when a configuration is built, so that the
//! request path only adds to atomics.

mod cache;
mod connections;
mod named;
mod process;
mod regions;
mod tracing;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use parking_lot::Mutex;
use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::RequestDone;
use super::sketch::Series;
use super::why::Why;
use crate::client::country::LookupResult;
use crate::limits::Decision;
use crate::overload::Shed;
use crate::proxy::store::Store;
use crate::request::Moment;
use crate::snapshot::Snapshot;
use crate::state::Live;
use crate::upstream::{Plan, Stop};
use crate::waf::managed;
pub use cache::CacheMetrics;
pub use connections::{ConnectionMetrics, Handshake};
pub use named::{HostMetrics, METHODS, RegionMetrics, RouteMetrics};
use named::{OTHER, ROUTES};
use process::ProcessMetrics;
use regions::RegionGauges;
use tracing::TracingMetrics;

/// Upper bounds in seconds: dense where proxied requests are, so that P50, P95 and P99 can be read from
/// 0.5 ms to 60 s.
const BUCKETS: [f64; 17] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0];

/// Why a request did not begin in its first region, where only the moment of the attempt knows.
const PASSED_OVER: &str = "passed_over";

/// A connection has no class yet.
const NO_CLASS: &str = "none";

/// Every metric of the process.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    duration: HistogramVec,
    hosts: IntCounterVec,
    /// Why requests were no success.
    pub(super) unsuccessful: IntCounterVec,
    /// The same, by [`Why::index`].
    by_reason: Box<[IntCounter]>,
    attempts: IntCounterVec,
    upstream_duration: HistogramVec,
    pub(super) failovers: IntCounterVec,
    pub(super) waf_matches: IntCounterVec,
    pub(super) limit_decisions: IntCounterVec,
    limit_table: [IntGauge; 3],
    limit_evictions: [IntCounter; 2],
    /// One at a time: counters are brought up to what tables counted.
    turn: Mutex<()>,
    shed: IntCounterVec,
    regions: RegionGauges,
    budget: IntGaugeVec,
    not_retried: [IntCounter; Stop::ALL.len()],
    lookups: [IntCounter; LookupResult::ALL.len()],
    panics: IntCounter,
    learned_areas: IntGauge,
    database_built: IntGauge,
    generation: IntGauge,
    reload_successful: IntGauge,
    /// What the cache does.
    pub cache: CacheMetrics,
    /// What happens on clients' connections.
    pub connection: ConnectionMetrics,
    /// The process itself.
    pub process: ProcessMetrics,
    /// What becomes of spans.
    pub tracing: TracingMetrics,
    /// Client connections that are open.
    pub connections: IntGauge,
    /// Without labels, and not there before a cluster says something: there may be none.
    cluster_connected: IntGaugeVec,
    /// Access log lines that found their buffer full.
    pub log_lines_dropped: IntCounter,
    unrouted: Arc<RouteMetrics>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// All metrics, at zero. An error means that two share a name.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counters =
            |name: &str, help: &str, labels: &[&str]| add(&registry, IntCounterVec::new(Opts::new(name, help), labels));
        let counter = |name: &str, help: &str| add(&registry, IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| add(&registry, IntGauge::new(name, help));
        let gauges = |name: &str, help: &str, labels: &[&str]| add(&registry, IntGaugeVec::new(Opts::new(name, help), labels));
        let histograms = |name: &str, help: &str, label: &str| {
            add(&registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(BUCKETS.to_vec()), &[label]))
        };
        let requests =
            counters("portolan_requests_total", "Requests by route, method and status.", &["route", "method", "code"])?;
        let duration = histograms("portolan_request_duration_seconds", "From a request's header to its end.", "route")?;
        let attempts =
            counters("portolan_upstream_attempts_total", "Attempts by region and how they ended.", &["region", "outcome"])?;
        let upstream_duration = histograms(
            "portolan_upstream_duration_seconds",
            "From an attempt's start to its response header or failure.",
            "region",
        )?;
        let waf_matches = counters("portolan_waf_matches_total", "Rules that applied, by what they did.", &["rule", "action"])?;
        let limit_decisions = counters(
            "portolan_limit_decisions_total",
            "What limits said of the requests that they apply to.",
            &["limit", "decision"],
        )?;
        let limit_evictions = counters(
            "portolan_limit_evictions_total",
            "Clients that had to make room in the table of counters: while something was counted of them, or in a penalty.",
            &["kind"],
        )?;
        let shed = counters(
            "portolan_shed_total",
            "Requests, and connections, that were let go because there was too much at once.",
            &["reason", "class"],
        )?;
        let limit_table = [
            gauge("portolan_limit_table_entries", "Places of the table of counters that were used so far.")?,
            gauge("portolan_limit_table_capacity", "Places of the table of counters.")?,
            gauge("portolan_limit_banned", "Clients that are refused for a time, as far as they are listed.")?,
        ];
        let failovers = counters(
            "portolan_failovers_total",
            "Requests that moved from one region to another, and why.",
            &["from", "to", "reason"],
        )?;
        let not_retried = counters(
            "portolan_retries_skipped_total",
            "Failed attempts that were not followed by another, and why.",
            &["reason"],
        )?;
        let lookups = counters("portolan_geoip_lookups_total", "Country lookups by result.", &["result"])?;
        let budget = gauges("portolan_retry_budget_left", "Retries that the route's budget allows at the moment.", &["route"])?;
        let panics = counter(
            "portolan_panic_requests_total",
            "Requests for which nothing was usable, so that something was tried all the same.",
        )?;
        let log_lines_dropped =
            counter("portolan_access_log_dropped_total", "Access log lines dropped because the log was slow.")?;
        let unrouted = Arc::new(RouteMetrics::new("_none".into(), &duration, None));
        let hosts = counters(
            "portolan_host_requests_total",
            "Requests by the host pattern of their route, and by the class of their status.",
            &["host", "class"],
        )?;
        let unsuccessful = counters(
            "portolan_requests_unsuccessful_total",
            "Requests that were no success, by why (see docs/seeing.md).",
            &["why"],
        )?;
        Ok(Self {
            // There from the beginning: a rate does not see a counter that begins with 1.
            by_reason: Why::all().map(|why| unsuccessful.with_label_values(&[why.label()])).collect(),
            not_retried: Stop::ALL.map(|stop| not_retried.with_label_values(&[stop.label()])),
            lookups: LookupResult::ALL.map(|result| lookups.with_label_values(&[result.label()])),
            database_built: gauge(
                "portolan_geoip_database_build_timestamp_seconds",
                "When the country database was built; 0 without one.",
            )?,
            generation: gauge("portolan_config_generation", "How many configurations have been in force.")?,
            reload_successful: gauge(
                "portolan_config_last_reload_successful",
                "1 if the last configuration read was put in force.",
            )?,
            learned_areas: gauge("portolan_latency_areas", "Client areas of which `policy: latency` learned something.")?,
            cluster_connected: gauges("portolan_cluster_connected", "1 while the cluster's Redis can be reached.", &[])?,
            connections: gauge("portolan_connections", "Client connections that are open.")?,
            cache: CacheMetrics::new(&registry)?,
            connection: ConnectionMetrics::new(&registry)?,
            process: ProcessMetrics::new(&registry)?,
            tracing: TracingMetrics::new(&registry)?,
            regions: RegionGauges::new(&registry)?,
            registry,
            requests,
            duration,
            hosts,
            unsuccessful,
            attempts,
            upstream_duration,
            failovers,
            waf_matches,
            limit_decisions,
            limit_table,
            turn: Mutex::new(()),
            shed,
            budget,
            limit_evictions: ["counted", "penalised"].map(|kind| limit_evictions.with_label_values(&[kind])),
            panics,
            log_lines_dropped,
            unrouted,
        })
    }

    /// The metrics of the route at this position; far down the file many share a label.
    pub fn route(&self, name: &Arc<str>, position: usize, series: Arc<Series>) -> Arc<RouteMetrics> {
        let label = if position < ROUTES { name.clone() } else { OTHER.into() };
        Arc::new(RouteMetrics::new(label, &self.duration, Some(series)))
    }

    /// The metrics of a region.
    pub fn region(&self, name: &str, series: Arc<Series>) -> Arc<RegionMetrics> {
        Arc::new(RegionMetrics::new(name, &self.attempts, &self.upstream_duration, series))
    }

    /// The metrics of the hosts that routes name.
    pub fn hosts(&self, snapshot: &Snapshot) -> HostMetrics {
        HostMetrics::new(&self.hosts, snapshot)
    }

    /// The counters of a limit, by [`Decision::ALL`].
    pub fn limit(&self, id: &str) -> Arc<[IntCounter; Decision::ALL.len()]> {
        Arc::new(Decision::ALL.map(|decision| self.limit_decisions.with_label_values(&[id, decision.label()])))
    }

    /// Forgets labels of what `live` does not have. A request that was under way while the configuration changed may bring
    /// one back, so this is done again once the last of them is over.
    pub fn sweep(&self, live: &Live) {
        let snapshot = &live.snapshot;
        fn names<'a>(all: impl Iterator<Item = &'a str>) -> HashSet<String> {
            all.map(str::to_owned).collect()
        }
        let routes = names(snapshot.routes.iter().take(ROUTES).map(|r| &*r.name).chain(["_none", OTHER]));
        let hosts = names(snapshot.router.hosts().take(named::HOSTS).chain([OTHER]));
        let mut rules = names(snapshot.waf.rules.iter().map(|r| &*r.id));
        rules.extend(managed::ids().map(str::to_owned));
        let limits = names(snapshot.limits.rules.iter().map(|l| &*l.id));
        let classes = names(snapshot.overload.classes.iter().map(|c| &*c.name).chain([NO_CLASS]));
        let regions = names(snapshot.regions.iter().map(|r| &*r.name));
        let first = |known: &HashSet<String>| {
            let known = known.clone();
            move |labels: &[String]| labels.first().is_some_and(|label| known.contains(label))
        };
        keep(&self.requests, &["route", "method", "code"], first(&routes));
        keep(&self.duration, &["route"], first(&routes));
        keep(&self.hosts, &["host", "class"], first(&hosts));
        keep(&self.waf_matches, &["rule", "action"], first(&rules));
        keep(&self.limit_decisions, &["limit", "decision"], first(&limits));
        keep(&self.shed, &["reason", "class"], |labels| labels.get(1).is_some_and(|class| classes.contains(class)));
        keep(&self.attempts, &["region", "outcome"], first(&regions));
        keep(&self.upstream_duration, &["region"], first(&regions));
        keep(&self.failovers, &["from", "to", "reason"], |labels| labels.iter().take(2).all(|region| regions.contains(region)));
        self.regions.sweep(&snapshot.regions);
    }

    /// Counts a request that is over.
    pub fn record(&self, done: &RequestDone<'_>) {
        let route = done.route.and_then(|id| done.live.routes.get(id.0 as usize)).unwrap_or(&self.unrouted);
        route.count(&self.requests, done);
        done.live.hosts.count(done.host, done.matched, done.status);
        if let Some(counter) = Why::of(done).and_then(|why| self.by_reason.get(why.index())) {
            counter.inc();
        }
        if let Some(counter) = self.lookups.get(done.lookup as usize) {
            counter.inc();
        }
        for found in done.matches {
            self.waf_matches.with_label_values(&[&*found.rule, found.action]).inc();
        }
        for seen in done.limits {
            let counters = done.live.limits.get(usize::from(seen.limit));
            if let Some(counter) = counters.and_then(|all| all.get(seen.decision as usize)) {
                counter.inc();
            }
        }
        if let Some(reason) = done.shed {
            let class = done.live.snapshot.overload.classes.get(usize::from(done.class));
            self.shed(reason, class.map_or(NO_CLASS, |class| &class.name));
        }
        if let Some(status) = done.cache {
            self.cache.request(status);
        }
        if let Some(plan) = done.plan {
            self.attempted(done.live, plan);
        }
    }

    /// Counts what became of a plan.
    pub fn attempted(&self, live: &Live, plan: &Plan) {
        for attempt in &plan.tries {
            if let Some(region) = live.regions.get(usize::from(attempt.region.0)) {
                region.count(attempt);
            }
        }
        if let Some(stop) = plan.stopped
            && let Some(counter) = Stop::ALL.iter().position(|s| *s == stop).and_then(|i| self.not_retried.get(i))
        {
            counter.inc();
        }
        if plan.panic {
            self.panics.inc();
        }
        self.failovers(live, plan);
    }

    /// Counts what was let go.
    fn shed(&self, reason: Shed, class: &str) {
        self.shed.with_label_values(&[reason.label(), class]).inc();
    }

    /// Can the cluster's Redis be reached?
    pub fn cluster(&self, connected: bool) {
        self.cluster_connected.with_label_values::<&str>(&[]).set(connected.into());
    }

    /// Counts a connection that was let go.
    pub fn connection_shed(&self) {
        self.shed(Shed::Connections, NO_CLASS);
    }

    /// A region was passed over because of how it is, or because an attempt in it failed.
    fn failovers(&self, live: &Live, plan: &Plan) {
        let name = |id| live.snapshot.region(id).map_or("", |r| &r.name);
        // Where a replay replaced the order, its first region is not where the request began.
        let first = plan.order.first().filter(|_| plan.replays.is_none());
        let mut from = plan.moved.map(|(region, why)| (region, why.label())).or(first.map(|c| (c.region, PASSED_OVER)));
        for attempt in &plan.tries {
            if let Some((region, reason)) = from.filter(|(region, _)| *region != attempt.region) {
                self.failovers.with_label_values(&[name(region), name(attempt.region), reason]).inc();
            }
            from = Some((attempt.region, attempt.outcome.label()));
        }
    }

    /// The outcome of the last reload.
    pub fn reloaded(&self, generation: u64, successful: bool) {
        self.generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
        self.reload_successful.set(i64::from(successful));
    }

    /// All metrics in the text format, with what is only known at this moment.
    pub fn render(&self, live: &Live, store: &Store, learned_areas: usize, now: Moment) -> Result<Vec<u8>, prometheus::Error> {
        let _turn = self.turn.lock();
        self.regions.refresh(&live.snapshot.regions, now);
        self.process.refresh();
        self.budget.reset();
        for route in live.snapshot.routes.iter().take(ROUTES) {
            let left = route.retry.budget.left(route.retry.allowance, now);
            self.budget.with_label_values(&[&*route.name]).set(i64::try_from(left).unwrap_or(i64::MAX));
        }
        if let Some(ledger) = &live.snapshot.limits.ledger {
            let fill = ledger.table.fill();
            let banned = ledger.book.banned(now) as u64;
            let values = [fill.entries, fill.capacity, banned];
            for (gauge, value) in self.limit_table.iter().zip(values) {
                gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            }
            for (counter, value) in self.limit_evictions.iter().zip([fill.evicted, fill.pardoned]) {
                counter.inc_by(value.saturating_sub(counter.get()));
            }
        }
        self.cache.refresh(store, live.snapshot.cache.known.purges.lines());
        self.connection.refresh(&live.snapshot.listeners);
        self.learned_areas.set(i64::try_from(learned_areas).unwrap_or(i64::MAX));
        let built = live.snapshot.databases.source().and_then(|d| d.built.duration_since(UNIX_EPOCH).ok());
        self.database_built.set(built.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0)));
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// Registers a metric that was made.
fn add<C: Collector + Clone + 'static>(registry: &Registry, made: Result<C, prometheus::Error>) -> Result<C, prometheus::Error> {
    let metric = made?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// Forgets the label values that are not `known`; `names` are the labels in the order of the metric.
fn keep<B: MetricVecBuilder>(all: &MetricVec<B>, names: &[&str], known: impl Fn(&[String]) -> bool)
where
    MetricVec<B>: Collector,
{
    for family in all.collect() {
        for metric in family.get_metric() {
            let value =
                |name: &&str| metric.get_label().iter().find(|label| label.name() == *name).map(|label| label.value().to_owned());
            let labels: Vec<String> = names.iter().filter_map(value).collect();
            if !known(&labels) {
                // Somebody else may have been faster.
                let _ = all.remove_label_values(&labels);
            }
        }
    }
}
