//! `GET /events`: what the page and `portolan top` show, as it happens (Server-Sent Events).
//!
//! Once at the beginning `curve`, the last five minutes; then `now` every second, and `requests` for those who ask for them.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{Stream, unfold};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;

use super::Admin;
use super::status::{ConfigStatus, HitsStatus, RegionStatus, RouteStatus};
use crate::explain::coverage::{Served, Spot, coverage, spot};
use crate::observe::lately::Event;
use crate::observe::sketch::{Summary, Windows};
use crate::observe::tail::{Wanted, Watching};
use crate::observe::traffic::Point;
use crate::proxy::clock;
use crate::proxy::store::Held;
use crate::regions::RegionId;
use crate::request::Moment;
use crate::state::State;
use crate::tasks::seconds::Usage;

/// Requests are gathered for so long before they are told.
const GATHER: Duration = Duration::from_millis(250);
/// Routes, rules, reasons and the like that are told: the busiest.
const MOST: usize = 25;
/// Happenings that are told.
const EVENTS: usize = 40;

/// What somebody wants to be told.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Asked {
    /// Requests, too.
    tail: bool,
    /// The route whose steering colours the map; by default the busiest.
    map: Option<String>,
    status: Option<String>,
    country: Option<String>,
    region: Option<String>,
    route: Option<String>,
    text: Option<String>,
    ip: Option<String>,
    why: Option<String>,
}

/// Everything that is told once a second.
#[derive(Debug, Serialize)]
struct Now {
    version: &'static str,
    uptime_seconds: u64,
    connections: i64,
    config: ConfigStatus,
    database_built: Option<String>,
    process: Usage,
    point: Option<Point>,
    traffic: Windows,
    /// The route that `map` shows.
    map_route: Option<String>,
    /// Every route's name, the busiest first.
    route_names: Vec<String>,
    routes: Vec<RouteStatus>,
    regions: Vec<RegionNow>,
    /// By country's code.
    countries: BTreeMap<String, CountryNow>,
    cache: Held,
    #[serde(flatten)]
    hits: HitsStatus,
    events: Vec<Event>,
}

#[derive(Debug, Serialize)]
struct RegionNow {
    #[serde(flatten)]
    status: RegionStatus,
    spot: Option<Spot>,
}

/// A country, and who serves it.
#[derive(Debug, Default, Serialize)]
struct CountryNow {
    /// The region that serves it now.
    region: Option<Arc<str>>,
    /// The region that it belongs to, where that is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    home: Option<Arc<str>>,
    /// Its requests of the last minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    traffic: Option<Summary>,
}

/// Who is told.
struct Listener {
    admin: Admin,
    map: Option<String>,
    pulse: watch::Receiver<u64>,
    watching: Option<Watching>,
    step: Step,
}

#[derive(Clone, Copy)]
enum Step {
    Curve,
    First,
    Later,
}

/// Tells for as long as somebody listens.
pub async fn events(Extract(admin): Extract<Admin>, Query(asked): Query<Asked>) -> Response {
    let Asked { tail, map, status, country, region, route, text, ip, why } = asked;
    // An empty field of a form is one that was left alone.
    let given = |field: Option<String>| field.filter(|text| !text.is_empty());
    let ip = match given(ip).map(|ip| ip.parse::<IpAddr>().map_err(|_| ip)).transpose() {
        Ok(ip) => ip,
        Err(text) => return (StatusCode::BAD_REQUEST, format!("`{text}` is no address\n")).into_response(),
    };
    let wanted = Wanted {
        status: given(status),
        country: given(country),
        region: given(region),
        route: given(route),
        text: given(text),
        ip,
        why: given(why),
    };
    let watching = if tail { admin.state.tail.watch(wanted) } else { None };
    if tail && watching.is_none() {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many watch already\n").into_response();
    }
    let pulse = admin.state.pulse.listen();
    let listener = Listener { admin, map: given(map), pulse, watching, step: Step::Curve };
    Sse::new(told(listener)).keep_alive(KeepAlive::default()).into_response()
}

fn told(listener: Listener) -> impl Stream<Item = Result<Sent, Infallible>> {
    unfold(listener, async |mut listener| {
        let event = match listener.step {
            Step::Curve => {
                listener.step = Step::First;
                event("curve", &listener.admin.state.traffic.points())
            }
            Step::First => {
                listener.step = Step::Later;
                event("now", &now(&listener.admin.state, listener.map.as_deref(), clock::now()))
            }
            Step::Later => listener.next().await?,
        };
        Some((Ok(event), listener))
    })
}

fn event(name: &str, data: &impl Serialize) -> Sent {
    // Nothing of it has keys that are no text, so it can be written.
    Sent::default().event(name).json_data(data).unwrap_or_default()
}

impl Listener {
    async fn next(&mut self) -> Option<Sent> {
        let filled = self.watching.as_ref().map(|watching| (watching.filled(), watching.take()));
        let requests = |(lines, skipped)| event("requests", &json!({ "lines": lines, "skipped": skipped }));
        let more = async {
            match filled {
                Some((_, waiting @ (_, skipped))) if !waiting.0.is_empty() || skipped > 0 => waiting,
                Some((filled, _)) => {
                    filled.await;
                    (Vec::new(), 0)
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = self.pulse.changed() => {
                changed.ok()?;
                Some(event("now", &now(&self.admin.state, self.map.as_deref(), clock::now())))
            }
            (mut lines, mut skipped) = more => {
                tokio::time::sleep(GATHER).await;
                if let Some(watching) = &self.watching {
                    let (later, left_out) = watching.take();
                    lines.extend(later);
                    skipped += left_out;
                }
                Some(requests((lines, skipped)))
            }
        }
    }
}

fn now(state: &State, map: Option<&str>, moment: Moment) -> Now {
    let live = state.live.load();
    let snapshot = &live.snapshot;
    let seen = state.lately.seen();
    let mut hits = HitsStatus::of(&seen);
    for all in [&mut hits.rules, &mut hits.limits, &mut hits.unsuccessful, &mut hits.failovers] {
        all.truncate(MOST);
    }
    let mut routes = RouteStatus::all(state, snapshot, moment);
    routes.sort_by_key(|route| std::cmp::Reverse(route.traffic.minute.requests));
    let route_names: Vec<_> = routes.iter().map(|route| route.name.clone()).collect();
    routes.truncate(MOST);
    let wanted = map.or(route_names.first().map(String::as_str));
    let route = snapshot.routes.iter().find(|route| Some(&*route.name) == wanted);
    let served = route.map(|route| coverage(snapshot, route, moment)).unwrap_or_default();
    let regions = RegionStatus::all(state, snapshot, moment).into_iter().enumerate();
    let regions = regions.map(|(nth, status)| {
        let id = u16::try_from(nth).map(RegionId).ok();
        RegionNow { status, spot: id.and_then(|id| spot(snapshot, id, &served)) }
    });
    Now {
        version: env!("CARGO_PKG_VERSION"),
        uptime_seconds: state.started.elapsed().unwrap_or_default().as_secs(),
        connections: state.metrics.connections.get(),
        config: ConfigStatus::of(&state.reload.lock().clone()),
        database_built: snapshot.databases.source().map(|d| humantime::format_rfc3339_seconds(d.built).to_string()),
        process: state.pulse.usage(),
        point: state.traffic.latest(),
        traffic: state.traffic.all.windows(),
        map_route: route.map(|route| route.name.to_string()),
        regions: regions.collect(),
        countries: countries(state, &served),
        route_names,
        routes,
        cache: state.store.held(),
        hits,
        events: seen.events.into_iter().take(EVENTS).collect(),
    }
}

/// Who serves each country now, and its requests of the last minute.
fn countries(state: &State, served: &[Served]) -> BTreeMap<String, CountryNow> {
    let live = state.live.load();
    let name = |id| live.snapshot.region(id).map(|region| region.name.clone());
    let one = |served: &Served| {
        let home = if served.by == Some(served.home) { None } else { name(served.home) };
        (served.country.to_string(), CountryNow { region: served.by.and_then(name), home, traffic: None })
    };
    let mut all: BTreeMap<_, _> = served.iter().map(one).collect();
    for (country, windows) in state.traffic.countries() {
        all.entry(country.to_string()).or_default().traffic = Some(windows.minute);
    }
    all
}
