//! `/status.json`: what an operator asks first.

use std::sync::atomic::Ordering::Relaxed;
use std::time::SystemTime;

use serde::Serialize;

use crate::config::problem::ProblemJson;
use crate::orders::Kept;
use crate::proxy::store::Held;
use crate::regions::endpoint::{Endpoint, describe};
use crate::regions::{Region, Upstream};
use crate::request::Moment;
use crate::state::State;

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
}

impl Status {
    /// The state at `now`.
    pub fn now(state: &State, now: Moment) -> Self {
        let live = state.live.load();
        let snapshot = &live.snapshot;
        let reload = state.reload.lock().clone();
        let orders = state.orders.list(state);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            started: time(state.started),
            uptime_seconds: state.started.elapsed().unwrap_or_default().as_secs(),
            connections: state.metrics.connections.get(),
            cache: state.store.held(),
            cluster_connected: state.cluster.as_ref().map(|cluster| cluster.is_connected()),
            config: ConfigStatus {
                generation: reload.generation,
                last_reload_successful: reload.successful,
                last_reload: time(reload.at),
                last_reload_trigger: reload.trigger,
                problems: reload.problems,
            },
            country_database: snapshot.databases.source().map(|d| DatabaseStatus {
                kind: d.kind.to_owned(),
                path: d.path.display().to_string(),
                built: time(d.built),
            }),
            regions: snapshot.regions.iter().map(|region| RegionStatus::of(region, &orders, now)).collect(),
            routes: snapshot
                .routes
                .iter()
                .map(|route| {
                    let (requests_10s, retries_10s) = route.retry.budget.counts(now);
                    RouteStatus { name: route.name.to_string(), requests_10s, retries_10s }
                })
                .collect(),
            learned_areas: state.memory.latency.areas(),
        }
    }
}

fn time(t: SystemTime) -> String {
    humantime::format_rfc3339_seconds(t).to_string()
}

impl RegionStatus {
    fn of(region: &Region, orders: &[Kept], now: Moment) -> Self {
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
