//! `/status.json`: what an operator asks first.

use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::config::problem::ProblemJson;
use crate::regions::health::Standing;
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
    /// The configuration in force and how the last reload went.
    pub config: ConfigStatus,
    /// The country database, if there is one.
    pub country_database: Option<DatabaseStatus>,
    /// The regions.
    pub regions: Vec<RegionStatus>,
    /// The names of the routes.
    pub routes: Vec<String>,
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
    /// At least one upstream is usable.
    pub healthy: bool,
    /// Its upstreams.
    pub upstreams: Vec<UpstreamStatus>,
}

/// An upstream.
#[derive(Debug, Serialize)]
pub struct UpstreamStatus {
    /// Where it listens.
    pub url: String,
    /// `usable`, `ejected`, `trial_due` or `unresolved`.
    pub state: &'static str,
    /// Why, in words.
    pub because: String,
    /// The addresses its name points to.
    pub addresses: Vec<String>,
}

impl Status {
    /// The state at `now`.
    pub fn now(state: &State, now: Moment) -> Self {
        let live = state.live.load();
        let snapshot = &live.snapshot;
        let reload = state.reload.lock().clone();
        let time = |t: SystemTime| humantime::format_rfc3339_seconds(t).to_string();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            started: time(state.started),
            uptime_seconds: state.started.elapsed().unwrap_or_default().as_secs(),
            connections: state.metrics.connections.get(),
            config: ConfigStatus {
                generation: reload.generation,
                last_reload_successful: reload.successful,
                last_reload: time(reload.at),
                last_reload_trigger: reload.trigger,
                problems: reload.problems,
            },
            country_database: snapshot.countries.as_ref().map(|d| DatabaseStatus {
                kind: d.kind.clone(),
                path: d.path.display().to_string(),
                built: time(d.built),
            }),
            regions: snapshot
                .regions
                .iter()
                .map(|region| {
                    let upstreams: Vec<_> = region.upstreams.iter().map(|u| UpstreamStatus::of(&u.state, now)).collect();
                    RegionStatus {
                        name: region.name.to_string(),
                        healthy: region.upstreams.iter().any(|u| u.state.is_usable(now)),
                        upstreams,
                    }
                })
                .collect(),
            routes: snapshot.routes.iter().map(|r| r.name.to_string()).collect(),
        }
    }
}

impl UpstreamStatus {
    fn of(upstream: &crate::regions::health::UpstreamState, now: Moment) -> Self {
        let (failures, ejections) = upstream.health.counts();
        let (state, because) = match upstream.health.standing(now) {
            _ if !upstream.is_resolved() => ("unresolved", "its name has no address yet".to_owned()),
            Standing::Usable if failures == 0 => ("usable", "no failure since the last success".to_owned()),
            Standing::Usable => ("usable", format!("{failures} failures in a row")),
            Standing::TrialDue => ("trial_due", "its ejection is over; one request may try it".to_owned()),
            Standing::Ejected { until } => {
                let left = Duration::from_millis(until.since(now).as_millis() as u64);
                ("ejected", format!("ejection number {ejections}, for another {}", humantime::format_duration(left)))
            }
        };
        Self {
            url: upstream.url.to_string(),
            state,
            because,
            addresses: upstream.addresses().iter().map(ToString::to_string).collect(),
        }
    }
}
