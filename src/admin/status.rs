//! `/status.json`: what an operator asks first.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::SystemTime;

use serde::Serialize;

use crate::config::problem::ProblemJson;
use crate::observe::lately::{Event, Hits, Seen};
use crate::observe::sketch::Windows;
use crate::orders::Kept;
use crate::proxy::store::Held;
use crate::regions::endpoint::{Endpoint, describe};
use crate::regions::{Region, Upstream};
use crate::request::Moment;
use crate::routes::Route;
use crate::snapshot::Snapshot;
use crate::state::{Reload, ReloadStatus, State};
use crate::tasks::seconds::Usage;

/// The state of the process.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Portolan's version.
    pub version: &'static str,
    /// When it started, as RFC 3339.
    pub started: String,
    /// For how many seconds it has been up.
    pub uptime_seconds: u64,
    /// Open client connections.
    pub connections: i64,
    /// What the cache holds.
    pub cache: Held,
    /// The cluster's Redis can be reached; nothing without a cluster.
    pub cluster_connected: Option<bool>,
    /// The configuration in force and how the last reload went.
    pub config: ConfigStatus,
    /// The country database, if there is one.
    pub country_database: Option<DatabaseStatus>,
    /// The regions.
    pub regions: Vec<RegionStatus>,
    /// The routes.
    pub routes: Vec<RouteStatus>,
    /// Areas of which something was learned (`policy: latency`).
    pub learned_areas: usize,
    /// What the process uses.
    pub process: Usage,
    /// The table of limits; nothing without limits.
    pub limit_table: Option<LimitTable>,
    /// All requests of the last minutes.
    pub traffic: Windows,
    /// Those of each country that asked for something in the last five minutes.
    pub countries: Vec<CountryStatus>,
    /// How often rules, limits and the cache did what, and how often requests moved or were no success.
    #[serde(flatten)]
    pub hits: HitsStatus,
    /// What became of regions, and where traffic failed over; the newest first.
    pub events: Vec<Event>,
    /// Reloads; the newest first.
    pub reloads: Vec<Reload>,
}

/// What limits remember.
#[derive(Debug, Serialize)]
pub struct LimitTable {
    /// Places that are used.
    pub entries: u64,
    /// Places that there are.
    pub capacity: u64,
    /// Clients that had to make room.
    pub evicted: u64,
    /// Clients that are refused for a time, as far as they are listed.
    pub banned: usize,
}

/// Requests of a country.
#[derive(Debug, Serialize)]
pub struct CountryStatus {
    /// Its code.
    pub country: String,
    /// Its requests of the last minutes.
    pub traffic: Windows,
}

/// How often what happened, since the start and in the last minute.
#[derive(Debug, Serialize)]
pub struct HitsStatus {
    /// By rule and action.
    pub rules: Vec<Hit>,
    /// By limit and decision.
    pub limits: Vec<Hit>,
    /// By what the cache did.
    pub cache_requests: Vec<Hit>,
    /// By reason.
    pub unsuccessful: Vec<Hit>,
    /// By the region that was left, the one that took over, and why.
    pub failovers: Vec<Hit>,
}

/// How often something happened.
#[derive(Debug, Serialize)]
pub struct Hit {
    /// What it is called.
    #[serde(flatten)]
    pub labels: BTreeMap<&'static str, String>,
    /// Since the start.
    pub total: u64,
    /// In the last minute.
    pub minute: u64,
}

impl HitsStatus {
    /// What happened, the most of the last minute first; without what never happened.
    pub fn of(seen: &Seen) -> Self {
        fn hits(all: &[Hits], names: &[&'static str]) -> Vec<Hit> {
            let mut all: Vec<_> = all.iter().filter(|hits| hits.total > 0).collect();
            all.sort_by_key(|hits| std::cmp::Reverse((hits.minute, hits.total)));
            let hit = |hits: &Hits| Hit {
                labels: names.iter().copied().zip(hits.labels.iter().cloned()).collect(),
                total: hits.total,
                minute: hits.minute,
            };
            all.into_iter().map(hit).collect()
        }
        Self {
            rules: hits(&seen.rules, &["rule", "action"]),
            limits: hits(&seen.limits, &["limit", "decision"]),
            cache_requests: hits(&seen.cache, &["status"]),
            unsuccessful: hits(&seen.reasons, &["why"]),
            failovers: hits(&seen.failovers, &["from", "to", "reason"]),
        }
    }
}

/// The configuration in force.
#[derive(Debug, Serialize)]
pub struct ConfigStatus {
    /// How many have been in force.
    pub generation: u64,
    /// The last one read is in force.
    pub last_reload_successful: bool,
    /// When the last one was read, as RFC 3339.
    pub last_reload: String,
    /// `start`, `file`, `signal` or `admin`.
    pub last_reload_trigger: &'static str,
    /// Its problems, warnings included.
    pub problems: Vec<ProblemJson>,
}

/// The country database.
#[derive(Debug, Serialize)]
pub struct DatabaseStatus {
    /// Its kind.
    pub kind: String,
    /// Its file.
    pub path: String,
    /// When it was built, as RFC 3339.
    pub built: String,
}

/// A region.
#[derive(Debug, Serialize)]
pub struct RegionStatus {
    /// Its name.
    pub name: String,
    /// At least one upstream is in good health.
    pub healthy: bool,
    /// An operator took it out entirely.
    pub away: bool,
    /// The share of its upstreams that is usable.
    pub usable: f32,
    /// The share of its traffic that an operator leaves it.
    pub granted: f32,
    /// The order in force, if there is one.
    pub order: Option<Kept>,
    /// Requests that it is answering.
    pub in_flight: u32,
    /// Requests that wait for a place.
    pub waiting: u32,
    /// Time to first byte of its health checks.
    pub check_ms: Option<f64>,
    /// The attempts in it of the last minutes.
    pub traffic: Windows,
    /// Its upstreams; one with several addresses comes several times.
    pub upstreams: Vec<UpstreamStatus>,
}

/// An upstream at one of its addresses.
#[derive(Debug, Serialize)]
pub struct UpstreamStatus {
    /// Where it listens.
    pub url: String,
    /// The address, if it is known.
    pub address: Option<String>,
    /// `usable`, `failing`, `resting`, `trial_due`, `ejected`, `down` or `unresolved`.
    pub state: &'static str,
    /// Why.
    pub because: String,
    /// What the last health check said, if there is one.
    pub check: Option<String>,
    /// Used only while the others fail.
    pub backup: bool,
    /// The part of its share that it gets, below 1 in slow start.
    pub ramp: f32,
    /// Requests that it is answering.
    pub in_flight: u32,
    /// Its time to first byte, smoothed.
    pub first_byte_ms: Option<f64>,
    /// Its name could not be resolved again: the address may be out of date.
    pub stale: bool,
}

/// A route.
#[derive(Debug, Serialize)]
pub struct RouteStatus {
    /// Its name.
    pub name: String,
    /// Requests of the last ten seconds.
    pub requests_10s: u64,
    /// Retries of the last ten seconds.
    pub retries_10s: u64,
    /// Retries that its budget allows at the moment.
    pub retries_left: u64,
    /// Its requests of the last minutes.
    pub traffic: Windows,
}

impl Status {
    /// The state at `now`.
    pub fn now(state: &State, now: Moment) -> Self {
        let live = state.live.load();
        let snapshot = &live.snapshot;
        let reload = state.reload.lock().clone();
        let seen = state.lately.seen();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            started: time(state.started),
            uptime_seconds: state.started.elapsed().unwrap_or_default().as_secs(),
            connections: state.metrics.connections.get(),
            cache: state.store.held(),
            cluster_connected: state.cluster.as_ref().map(|cluster| cluster.is_connected()),
            config: ConfigStatus::of(&reload),
            country_database: snapshot.databases.source().map(|d| DatabaseStatus {
                kind: d.kind.to_owned(),
                path: d.path.display().to_string(),
                built: time(d.built),
            }),
            regions: RegionStatus::all(state, snapshot, now),
            routes: RouteStatus::all(state, snapshot, now),
            learned_areas: state.memory.latency.areas(),
            process: state.pulse.usage(),
            limit_table: snapshot.limits.ledger.as_ref().map(|ledger| {
                let fill = ledger.table.fill();
                let banned = ledger.book.banned(now);
                LimitTable { entries: fill.entries, capacity: fill.capacity, evicted: fill.evicted, banned }
            }),
            traffic: state.traffic.windows(),
            countries: state
                .traffic
                .countries()
                .into_iter()
                .map(|(country, traffic)| CountryStatus { country: country.to_string(), traffic })
                .collect(),
            hits: HitsStatus::of(&seen),
            events: seen.events,
            reloads: reload.history.into_iter().rev().collect(),
        }
    }
}

fn time(t: SystemTime) -> String {
    humantime::format_rfc3339_seconds(t).to_string()
}

impl ConfigStatus {
    /// As the last reload left it.
    pub fn of(reload: &ReloadStatus) -> Self {
        Self {
            generation: reload.generation,
            last_reload_successful: reload.successful,
            last_reload: time(reload.at),
            last_reload_trigger: reload.trigger,
            problems: reload.problems.clone(),
        }
    }
}

impl RouteStatus {
    /// All of them.
    pub fn all(state: &State, snapshot: &Snapshot, now: Moment) -> Vec<Self> {
        let traffic = state.traffic.routes();
        let one = |route: &Route| {
            let (requests_10s, retries_10s) = route.retry.budget.counts(now);
            Self {
                name: route.name.to_string(),
                requests_10s,
                retries_10s,
                retries_left: route.retry.budget.left(route.retry.allowance, now),
                traffic: traffic.get(&route.name).copied().unwrap_or_default(),
            }
        };
        snapshot.routes.iter().map(one).collect()
    }
}

impl RegionStatus {
    /// All of them.
    pub fn all(state: &State, snapshot: &Snapshot, now: Moment) -> Vec<Self> {
        let (orders, traffic) = (state.orders.list(state), state.traffic.regions());
        snapshot.regions.iter().map(|region| Self::of(region, &orders, &traffic, now)).collect()
    }

    fn of(region: &Region, orders: &[Kept], traffic: &BTreeMap<Arc<str>, Windows>, now: Moment) -> Self {
        let capacity = region.capacity(now);
        let mut upstreams = Vec::new();
        for upstream in &region.upstreams {
            let endpoints = upstream.state.endpoints();
            match endpoints.is_empty() {
                true => upstreams.push(UpstreamStatus::unresolved(upstream)),
                false => upstreams.extend(endpoints.iter().map(|e| UpstreamStatus::of(region, upstream, e, now))),
            }
        }
        Self {
            name: region.name.to_string(),
            healthy: region.is_healthy(now),
            away: region.state.is_away(now),
            usable: capacity.usable,
            granted: capacity.granted,
            order: orders.iter().find(|kept| kept.region == *region.name).cloned(),
            in_flight: region.state.in_flight(),
            waiting: region.state.waiting(),
            check_ms: region.state.check_time().map(|t| t.as_secs_f64() * 1_000.0),
            traffic: traffic.get(&region.name).copied().unwrap_or_default(),
            upstreams,
        }
    }
}

impl UpstreamStatus {
    fn unresolved(upstream: &Upstream) -> Self {
        Self {
            url: upstream.url.to_string(),
            address: None,
            state: "unresolved",
            because: "its name has no address yet".to_owned(),
            check: None,
            backup: upstream.backup,
            ramp: 1.0,
            in_flight: 0,
            first_byte_ms: None,
            stale: true,
        }
    }

    fn of(region: &Region, upstream: &Upstream, endpoint: &Endpoint, now: Moment) -> Self {
        let (state, because) = describe(endpoint, now);
        let ramp = endpoint.ramp(region.slow_start, now);
        let check = endpoint.active.last.lock().as_ref().map(|last| {
            let word = if last.good { "good" } else { "bad" };
            format!("{word}: {} in {:.1} ms", last.text, last.took.as_secs_f64() * 1_000.0)
        });
        Self {
            url: upstream.url.to_string(),
            address: Some(endpoint.address.to_string()),
            state,
            because: if ramp < 1.0 { format!("{because}; slow start, {:.0} % of its share", ramp * 100.0) } else { because },
            check,
            backup: upstream.backup || endpoint.backup(),
            ramp,
            in_flight: endpoint.in_flight(),
            first_byte_ms: endpoint.first_byte(now).map(|us| us as f64 / 1_000.0),
            stale: upstream.state.dns.stale.load(Relaxed),
        }
    }
}
