//! Prometheus metrics. What a request touches is looked up when a configuration is built, so that the
//! request path only adds to atomics.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::UNIX_EPOCH;

use parking_lot::Mutex;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use super::RequestDone;
use super::cache::CacheMetrics;
use super::connections::ConnectionMetrics;
use crate::client::country::LookupResult;
use crate::limits::Decision;
use crate::overload::Shed;
use crate::proxy::store::Store;
use crate::request::Moment;
use crate::state::Live;
use crate::upstream::plan::Moved;
use crate::upstream::{Failure, Outcome, Plan, Stop};
use crate::waf::ACTIONS;

/// Upper bounds in seconds: dense where proxied requests are, so that P50, P95 and P99 can be read from
/// 0.5 ms to 60 s.
const BUCKETS: [f64; 17] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0];

/// Methods that have a label of their own; a stranger's inventions share `other`.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "other"];

/// Statuses that have a counter at hand; others are looked up.
const CODES: [u16; 26] = [
    101, 200, 201, 202, 204, 206, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 405, 409, 410, 413, 422, 429, 500, 502, 503,
    504,
];

/// Why a request did not begin in its first region, where only the moment of the attempt knows.
const PASSED_OVER: &str = "passed_over";

/// A connection has no class yet.
const NO_CLASS: &str = "none";

const OUTCOMES: usize = Failure::ALL.len() + 4;

/// Every metric of the process.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    duration: HistogramVec,
    attempts: IntCounterVec,
    upstream_duration: HistogramVec,
    failovers: IntCounterVec,
    waf_matches: IntCounterVec,
    limit_decisions: IntCounterVec,
    limit_table: [IntGauge; 3],
    limit_evictions: [IntCounter; 2],
    /// One at a time: counters are brought up to what tables counted.
    turn: Mutex<()>,
    shed: IntCounterVec,
    region_bound: IntGaugeVec,
    not_retried: [IntCounter; Stop::ALL.len()],
    lookups: [IntCounter; LookupResult::ALL.len()],
    region_healthy: IntGaugeVec,
    region_usable: GaugeVec,
    region_granted: GaugeVec,
    region_in_flight: IntGaugeVec,
    region_waiting: IntGaugeVec,
    upstream_usable: IntGaugeVec,
    upstream_in_flight: IntGaugeVec,
    dns_stale: IntGaugeVec,
    panics: IntCounter,
    learned_areas: IntGauge,
    database_built: IntGauge,
    generation: IntGauge,
    reload_successful: IntGauge,
    /// What the cache does.
    pub cache: CacheMetrics,
    /// What happens on clients' connections.
    pub connection: ConnectionMetrics,
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

/// One route's metrics, looked up once.
pub struct RouteMetrics {
    name: Arc<str>,
    codes: Box<[OnceLock<IntCounter>]>,
    duration: Histogram,
}

/// One region's metrics, looked up once.
pub struct RegionMetrics {
    outcomes: [IntCounter; OUTCOMES],
    duration: Histogram,
}

impl std::fmt::Debug for RouteMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RouteMetrics")
    }
}

impl std::fmt::Debug for RegionMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegionMetrics")
    }
}

impl Metrics {
    /// All metrics, at zero. An error means that two share a name.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let vec = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(vec.clone()))?;
            Ok::<_, prometheus::Error>(vec)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let histograms = |name: &str, help: &str, label: &str| {
            let vec = HistogramVec::new(HistogramOpts::new(name, help).buckets(BUCKETS.to_vec()), &[label])?;
            registry.register(Box::new(vec.clone()))?;
            Ok::<_, prometheus::Error>(vec)
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
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let vec = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(vec.clone()))?;
            Ok::<_, prometheus::Error>(vec)
        };
        let fractions = |name: &str, help: &str| {
            let vec = GaugeVec::new(Opts::new(name, help), &["region"])?;
            registry.register(Box::new(vec.clone()))?;
            Ok::<_, prometheus::Error>(vec)
        };
        let region_healthy =
            gauges("portolan_region_healthy", "1 if at least one upstream of the region is in good health.", &["region"])?;
        let region_usable = fractions("portolan_region_usable_ratio", "The share of the region's upstreams that is usable.")?;
        let region_granted =
            fractions("portolan_region_granted_ratio", "The share of its traffic that an operator leaves the region.")?;
        let region_in_flight =
            gauges("portolan_region_requests_in_flight", "Requests that the region is answering.", &["region"])?;
        let region_bound = gauges(
            "portolan_region_adaptive_limit",
            "How many requests at once the region is found to be able to answer.",
            &["region"],
        )?;
        let region_waiting = gauges("portolan_region_queue_length", "Requests that wait for a place.", &["region"])?;
        let upstream = &["region", "upstream"];
        let upstream_usable = gauges("portolan_upstream_usable", "How many addresses of the upstream are usable.", upstream)?;
        let upstream_in_flight =
            gauges("portolan_upstream_requests_in_flight", "Requests that the upstream is answering.", upstream)?;
        let dns_stale = gauges(
            "portolan_dns_stale",
            "1 if the upstream's name could not be resolved again when it should have been.",
            upstream,
        )?;
        let panics = IntCounter::new(
            "portolan_panic_requests_total",
            "Requests for which nothing was usable, so that something was tried all the same.",
        )?;
        registry.register(Box::new(panics.clone()))?;
        let build = IntGaugeVec::new(Opts::new("portolan_build_info", "Always 1; the version is a label."), &["version"])?;
        registry.register(Box::new(build.clone()))?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let log_lines_dropped =
            IntCounter::new("portolan_access_log_dropped_total", "Access log lines dropped because the log was slow.")?;
        registry.register(Box::new(log_lines_dropped.clone()))?;
        let unrouted = Arc::new(RouteMetrics::new("_none".into(), &duration));
        Ok(Self {
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
            registry,
            requests,
            duration,
            attempts,
            upstream_duration,
            failovers,
            waf_matches,
            limit_decisions,
            limit_table,
            turn: Mutex::new(()),
            shed,
            region_bound,
            limit_evictions: ["counted", "penalised"].map(|kind| limit_evictions.with_label_values(&[kind])),
            region_healthy,
            region_usable,
            region_granted,
            region_in_flight,
            region_waiting,
            upstream_usable,
            upstream_in_flight,
            dns_stale,
            panics,
            log_lines_dropped,
            unrouted,
        })
    }

    /// The metrics of a route.
    pub fn route(&self, name: &Arc<str>) -> Arc<RouteMetrics> {
        Arc::new(RouteMetrics::new(name.clone(), &self.duration))
    }

    /// The metrics of a region.
    pub fn region(&self, name: &str) -> Arc<RegionMetrics> {
        let counter = |label: &str| self.attempts.with_label_values(&[name, label]);
        let outcomes = std::array::from_fn(|i| counter(outcome_label(i)));
        Arc::new(RegionMetrics { outcomes, duration: self.upstream_duration.with_label_values(&[name]) })
    }

    /// The counters of a limit, by [`Decision::ALL`].
    pub fn limit(&self, id: &str) -> Arc<[IntCounter; Decision::ALL.len()]> {
        Arc::new(Decision::ALL.map(|decision| self.limit_decisions.with_label_values(&[id, decision.label()])))
    }

    /// Forgets the labels of routes and regions that are in `old` but not in `new`.
    pub fn tidy(&self, old: &Live, new: &Live) {
        for route in &old.snapshot.routes {
            if new.snapshot.routes.iter().all(|r| r.name != route.name) {
                // Absent labels are the usual case here: not every pair was ever counted.
                let _ = self.duration.remove_label_values(&[&route.name]);
                for method in METHODS {
                    for code in 100..=599 {
                        let _ = self.requests.remove_label_values(&[&route.name, method, &code.to_string()]);
                    }
                }
            }
        }
        for rule in &old.snapshot.waf.rules {
            if new.snapshot.waf.rules.iter().all(|r| r.id != rule.id) {
                for action in ACTIONS {
                    let _ = self.waf_matches.remove_label_values(&[&*rule.id, action]);
                }
            }
        }
        for limit in &old.snapshot.limits.rules {
            if new.snapshot.limits.rules.iter().all(|l| l.id != limit.id) {
                for decision in Decision::ALL {
                    let _ = self.limit_decisions.remove_label_values(&[&*limit.id, decision.label()]);
                }
            }
        }
        for class in &old.snapshot.overload.classes {
            if new.snapshot.overload.classes.iter().all(|c| c.name != class.name) {
                for reason in Shed::ALL {
                    let _ = self.shed.remove_label_values(&[reason.label(), &class.name]);
                }
            }
        }
        for region in &old.snapshot.regions {
            if new.snapshot.region_named(&region.name).is_none() {
                let _ = self.upstream_duration.remove_label_values(&[&region.name]);
                for gauges in [&self.region_healthy, &self.region_in_flight, &self.region_waiting] {
                    let _ = gauges.remove_label_values(&[&region.name]);
                }
                let _ = self.region_usable.remove_label_values(&[&region.name]);
                let _ = self.region_granted.remove_label_values(&[&region.name]);
                for i in 0..OUTCOMES {
                    let _ = self.attempts.remove_label_values(&[&region.name, outcome_label(i)]);
                }
                let moved = [Moved::Spill, Moved::SlowStart, Moved::Away, Moved::Ejected].map(Moved::label);
                let reasons = || (0..OUTCOMES).map(outcome_label).chain(moved).chain([PASSED_OVER]);
                for other in old.snapshot.regions.iter().chain(&new.snapshot.regions) {
                    for reason in reasons() {
                        let _ = self.failovers.remove_label_values(&[&region.name, &other.name, reason]);
                        let _ = self.failovers.remove_label_values(&[&other.name, &region.name, reason]);
                    }
                }
            }
        }
    }

    /// Counts a request that is over.
    pub fn record(&self, done: &RequestDone<'_>) {
        let route = done.route.and_then(|id| done.live.routes.get(id.0 as usize)).unwrap_or(&self.unrouted);
        route.count(&self.requests, done.method, done.status);
        route.duration.observe(done.total.as_secs_f64());
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
                if let Some(counter) = region.outcomes.get(outcome_index(attempt.outcome)) {
                    counter.inc();
                }
                region.duration.observe(attempt.ended.since(attempt.started).as_secs_f64());
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
        // Upstreams of the present only: whatever was removed is gone from here at once.
        for gauges in [&self.upstream_usable, &self.upstream_in_flight, &self.dns_stale, &self.region_bound] {
            gauges.reset();
        }
        for region in &live.snapshot.regions {
            let name = &*region.name;
            let capacity = region.capacity(now);
            self.region_healthy.with_label_values(&[name]).set(i64::from(region.is_healthy(now)));
            self.region_usable.with_label_values(&[name]).set(capacity.usable.into());
            self.region_granted.with_label_values(&[name]).set(capacity.granted.into());
            self.region_in_flight.with_label_values(&[name]).set(region.state.in_flight().into());
            self.region_waiting.with_label_values(&[name]).set(region.state.waiting().into());
            if let Some(bounds) = region.adaptive {
                let limit = region.state.adaptive.limit(bounds);
                self.region_bound.with_label_values(&[name]).set(limit.into());
            }
            for upstream in &region.upstreams {
                let url = upstream.url.to_string();
                let labels = [name, url.as_str()];
                let endpoints = upstream.state.endpoints();
                let usable = endpoints.iter().filter(|e| e.is_usable(now)).count();
                self.upstream_usable.with_label_values(&labels).set(i64::try_from(usable).unwrap_or(i64::MAX));
                let in_flight = endpoints.iter().map(|e| i64::from(e.in_flight())).sum();
                self.upstream_in_flight.with_label_values(&labels).set(in_flight);
                if upstream.url.needs_dns() {
                    self.dns_stale.with_label_values(&labels).set(upstream.state.dns.stale.load(Relaxed).into());
                }
            }
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

impl RouteMetrics {
    fn new(name: Arc<str>, duration: &HistogramVec) -> Self {
        let codes = (0..METHODS.len() * CODES.len()).map(|_| OnceLock::new()).collect();
        Self { duration: duration.with_label_values(&[&name]), name, codes }
    }

    /// Counts a request.
    fn count(&self, all: &IntCounterVec, method: &http::Method, status: u16) {
        let method = METHODS.iter().position(|m| *m == method.as_str()).unwrap_or(METHODS.len() - 1);
        let label = METHODS.get(method).copied().unwrap_or("other");
        let code = if (100..=599).contains(&status) { status } else { 0 };
        let lookup = || all.with_label_values(&[&*self.name, label, code.to_string().as_str()]);
        let at_hand = CODES.iter().position(|c| *c == code).and_then(|c| self.codes.get(method * CODES.len() + c));
        match at_hand {
            Some(cell) => cell.get_or_init(lookup).inc(),
            None => lookup().inc(),
        }
    }
}

fn outcome_index(outcome: Outcome) -> usize {
    match outcome {
        Outcome::Answered(_) => 0,
        Outcome::Truncated(_) => 1,
        Outcome::Pending => 2,
        Outcome::Replayed(_) => 3,
        Outcome::Failed(failure) => 4 + Failure::ALL.iter().position(|f| f.label() == failure.label()).unwrap_or(0),
    }
}

fn outcome_label(index: usize) -> &'static str {
    match index {
        0 => Outcome::Answered(0).label(),
        1 => Outcome::Truncated(0).label(),
        2 => Outcome::Pending.label(),
        3 => Outcome::Replayed(0).label(),
        _ => Failure::ALL.get(index - 4).map_or("", |f| f.label()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_label() {
        let mut labels: Vec<_> = (0..OUTCOMES).map(outcome_label).collect();
        for failure in Failure::ALL {
            assert_eq!(outcome_label(outcome_index(Outcome::Failed(failure))), failure.label());
        }
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), OUTCOMES);
    }
}
