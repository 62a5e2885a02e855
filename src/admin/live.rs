//! `GET /events`: what the page and `portolan top` show, as it happens (Server-Sent Events).
//!
//! Once at the beginning `curve`, the last five minutes, and then `now` every second; or, for those who ask for them, `requests`
//! and nothing else.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use super::Admin;
use super::status::{ConfigStatus, HitsStatus, RegionStatus, RouteStatus};
use crate::config::units::Country;
use crate::explain::coverage::{Served, Spot, coverage, spot};
use crate::observe::lately::Event;
use crate::observe::sketch::{Summary, Windows};
use crate::observe::tail::{Wanted, Watching};
use crate::observe::traffic::Point;
use crate::observe::why::Why;
use crate::proxy::clock;
use crate::proxy::store::Held;
use crate::regions::RegionId;
use crate::request::Moment;
use crate::snapshot::Snapshot;
use crate::state::State;
use crate::tasks::seconds::Usage;

/// So many may listen at once.
pub const LISTENERS: usize = 32;
/// Somebody who takes nothing for so long does not read any more.
const PATIENCE: Duration = Duration::from_secs(30);
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
    /// Requests, in place of all else.
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
    state: Arc<State>,
    map: Option<String>,
    pulse: watch::Receiver<u64>,
    watching: Option<Watching>,
    tell: mpsc::Sender<Sent>,
    /// Its place among those who may listen at once.
    _place: OwnedSemaphorePermit,
}

/// Tells for as long as somebody listens.
pub async fn events(Extract(admin): Extract<Admin>, Query(asked): Query<Asked>) -> Response {
    let refused = |status, text: &str| (status, format!("{text}\n")).into_response();
    let (tail, map, wanted) = match asked.wanted(&admin.state) {
        Ok(wanted) => wanted,
        Err(text) => return refused(StatusCode::BAD_REQUEST, &text),
    };
    let many = || refused(StatusCode::SERVICE_UNAVAILABLE, "too many watch already");
    let Ok(place) = admin.listeners.clone().try_acquire_owned() else { return many() };
    let watching = if tail { admin.state.tail.watch(wanted) } else { None };
    if tail && watching.is_none() {
        return many();
    }
    let pulse = admin.state.pulse.listen();
    let (tell, told) = mpsc::channel(4);
    tokio::spawn(Listener { state: admin.state.clone(), map, pulse, watching, tell, _place: place }.run());
    let told = unfold(told, async |mut told| Some((Ok::<_, Infallible>(told.recv().await?), told)));
    Sse::new(told).keep_alive(KeepAlive::default()).into_response()
}

impl Asked {
    /// Whether requests are asked for, the map's route, and which requests; or what of it cannot be.
    fn wanted(self, state: &State) -> Result<(bool, Option<String>, Wanted), String> {
        let Self { tail, map, status, country, region, route, text, ip, why } = self;
        // An empty field of a form is one that was left alone.
        let given = |field: Option<String>| field.filter(|text| !text.is_empty());
        let check = |field: Option<String>, fits: &dyn Fn(&str) -> bool, what: &str| match given(field) {
            Some(text) if !fits(&text) => Err(format!("`{text}` is no {what}")),
            field => Ok(field),
        };
        let is_status = |text: &str| match text.strip_suffix("xx") {
            Some(class) => matches!(class, "1" | "2" | "3" | "4" | "5"),
            None => text.parse().is_ok_and(|status: u16| (100..=599).contains(&status)),
        };
        let live = state.live.load();
        let is_route = |name: &str| live.snapshot.routes.iter().any(|route| *route.name == *name);
        let wanted = Wanted {
            status: check(status, &is_status, "status, such as 503 or 5xx")?,
            country: check(country, &|text| Country::from_database(text).is_some(), "country, such as GB")?,
            region: check(region, &|name| live.snapshot.region_named(name).is_some(), "region")?,
            route: check(route, &is_route, "route")?,
            text: given(text),
            ip: given(ip).map(|ip| ip.parse::<IpAddr>().map_err(|_| format!("`{ip}` is no address"))).transpose()?,
            why: check(why, &|text| text == "any" || Why::all().any(|why| why.label() == text), "reason")?,
        };
        Ok((tail, given(map), wanted))
    }
}

fn event(name: &str, data: &impl Serialize) -> Sent {
    // Nothing of it has keys that are no text, so it can be written.
    Sent::default().event(name).json_data(data).unwrap_or_default()
}

impl Listener {
    async fn run(mut self) {
        let state = self.state.clone();
        let told = async {
            if self.watching.is_none() {
                self.tell(event("curve", &self.state.traffic.points())).await?;
                self.tell(event("now", &self.now())).await?;
            }
            loop {
                let event = self.next().await?;
                self.tell(event).await?;
            }
        };
        // Another process has the sockets: whoever comes again comes to that one.
        tokio::select! {
            None::<()> = told => {}
            () = state.leaving.begun() => {}
        }
    }

    /// Nothing if nobody reads any more: who sleeps must not keep a place from others.
    async fn tell(&self, event: Sent) -> Option<()> {
        tokio::time::timeout(PATIENCE, self.tell.send(event)).await.ok()?.ok()
    }

    fn now(&self) -> Now {
        now(&self.state, self.map.as_deref(), clock::now())
    }

    /// Nothing once there is nobody to tell.
    async fn next(&mut self) -> Option<Sent> {
        let waits = async {
            let Some(watching) = &self.watching else { return std::future::pending().await };
            let filled = watching.filled();
            if !watching.waits() {
                filled.await;
            }
        };
        tokio::select! {
            () = self.tell.closed() => None,
            changed = self.pulse.changed(), if self.watching.is_none() => {
                changed.ok()?;
                Some(event("now", &self.now()))
            }
            () = waits => {
                tokio::time::sleep(GATHER).await;
                let (lines, skipped) = self.watching.as_ref().map(Watching::take).unwrap_or_default();
                Some(event("requests", &json!({ "lines": lines, "skipped": skipped })))
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
    // A route that is gone, in a reload since, is shown no longer.
    let named = |name: &str| snapshot.routes.iter().find(|route| *route.name == *name);
    let route = map.and_then(named).or_else(|| named(route_names.first()?));
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
        traffic: state.traffic.windows(),
        map_route: route.map(|route| route.name.to_string()),
        regions: regions.collect(),
        countries: countries(state, snapshot, &served),
        route_names,
        routes,
        cache: state.store.held(),
        hits,
        events: seen.events.into_iter().take(EVENTS).collect(),
    }
}

/// Who serves each country now, and its requests of the last minute.
fn countries(state: &State, snapshot: &Snapshot, served: &[Served]) -> BTreeMap<String, CountryNow> {
    let name = |id| snapshot.region(id).map(|region| region.name.clone());
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
