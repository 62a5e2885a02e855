//! What would happen to a request, step by step and why. It asks the same [`decide`] and the same
//! [`Plan`](crate::upstream::Plan) as traffic does, only with [`Mode::Peek`]: nothing is counted or spent.

use std::fmt::{self, Write};
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use serde::{Deserialize, Serialize};

use crate::client::address::{ClientAddress, Source};
use crate::client::place::Place;
use crate::decide::{Next, decide};
use crate::regions::balance::{Balance, Field};
use crate::regions::endpoint::{Address, Endpoint};
use crate::regions::spill;
use crate::regions::steering::Why;
use crate::regions::{Region, RegionId};
use crate::request::{Facts, Moment, hash_ip};
use crate::respond::Refusal;
use crate::routes::{HostMatch, Matched, Patience, Router};
use crate::snapshot::Snapshot;
use crate::upstream::plan::{Mode, Moved, upstream};
use crate::upstream::{Backends, Failure, Outcome, Plan, Sent, Verdict};

/// The request to explain; also the body of `POST /explain`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// The address that connects: the client, or a proxy in front.
    pub ip: IpAddr,
    /// The method.
    #[serde(default = "get")]
    pub method: String,
    /// `http://host/path`, or a path.
    pub url: String,
    /// Headers as name and value.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
    /// Regions to take for unreachable.
    #[serde(default)]
    pub down: Vec<String>,
}

fn get() -> String {
    "GET".to_owned()
}

/// The journey of a request.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// What was asked.
    pub request: RequestSeen,
    /// Who asks.
    pub client: Client,
    /// Where from.
    pub country: Country,
    /// The route, if one matches.
    pub route: Option<Route>,
    /// Candidate regions in order, each with the reason for its place.
    pub regions: Vec<RegionPlace>,
    /// The region that steering put first, and why the order begins with another.
    pub moved: Option<MovedFrom>,
    /// How long is waited for what, and how often is tried.
    pub limits: Option<Limits>,
    /// The attempts that would follow.
    pub attempts: Vec<AttemptSeen>,
    /// What the client would get.
    pub answer: Answer,
}

/// The request as it is understood.
#[derive(Debug, Serialize)]
pub struct RequestSeen {
    /// The method.
    pub method: String,
    /// The host that routes are matched by.
    pub host: String,
    /// The path that routes are matched by.
    pub path: String,
}

/// The client's address and how it was found.
#[derive(Debug, Serialize)]
pub struct Client {
    /// The address.
    pub ip: IpAddr,
    /// The address that connects.
    pub peer: IpAddr,
    /// How it was found.
    pub because: String,
}

/// The client's country and how it was found.
#[derive(Debug, Serialize)]
pub struct Country {
    /// The code.
    pub code: String,
    /// The subdivision (ISO 3166-2), where the city database has it.
    pub subdivision: Option<String>,
    /// Where the coordinates are from: `city`, `centroid` of the country, or nowhere.
    pub coordinates: Option<&'static str>,
    /// `found`, `unknown`, `no_database` or `error`.
    pub result: &'static str,
    /// The database's kind and file.
    pub database: Option<String>,
    /// When the database was built, as RFC 3339.
    pub database_built: Option<String>,
}

/// The route that matches.
#[derive(Debug, Serialize)]
pub struct Route {
    /// Its name.
    pub name: String,
    /// What it matched by.
    pub because: String,
    /// Others that match, the next best first, and why they lost.
    pub beat: Vec<Beaten>,
}

/// A route that matches, but not best.
#[derive(Debug, Serialize)]
pub struct Beaten {
    /// Its name.
    pub name: String,
    /// Why it lost.
    pub because: String,
}

/// A candidate region.
#[derive(Debug, Serialize)]
pub struct RegionPlace {
    /// Its name.
    pub name: String,
    /// Why it stands here.
    pub because: String,
    /// The part of such requests that begins here at the moment.
    pub share: f32,
    /// How it balances, limits and keeps its clients.
    pub inside: String,
    /// Its upstreams and how they are.
    pub upstreams: Vec<UpstreamSeen>,
}

/// The region that steering put first, although the request does not begin there.
#[derive(Debug, Serialize)]
pub struct MovedFrom {
    /// Its name.
    pub region: String,
    /// Why not there.
    pub because: String,
}

/// An upstream and how it is.
#[derive(Debug, Serialize)]
pub struct UpstreamSeen {
    /// Where it listens.
    pub url: String,
    /// How it is, and why; `down (assumed)` where the question says so.
    pub state: String,
}

/// Patience, as durations in words.
#[derive(Debug, Serialize)]
pub struct Limits {
    /// TCP and TLS of one attempt.
    pub connect: String,
    /// Silence of the upstream, and which of the timeouts that is.
    pub silence: String,
    /// All attempts together.
    pub total: String,
    /// All tries.
    pub attempts: usize,
    /// May a request that was sent be sent again?
    pub repeat: String,
    /// What the route's retry budget still allows.
    pub budget: String,
}

/// An attempt that would be made.
#[derive(Debug, Serialize)]
pub struct AttemptSeen {
    /// The region.
    pub region: String,
    /// The upstream.
    pub upstream: String,
    /// How it would end.
    pub outcome: String,
}

/// What the client would get.
#[derive(Debug, Serialize)]
pub struct Answer {
    /// The region that answers, if one does.
    pub region: Option<String>,
    /// The status of an answer of ours.
    pub status: Option<u16>,
    /// In words.
    pub text: String,
}

/// Explains `question`; an error says what of it cannot be understood.
pub fn explain(snapshot: &Snapshot, question: &Question, now: Moment) -> Result<Explanation, String> {
    let parsed = Parsed::new(question)?;
    let mut down = Vec::new();
    for name in &question.down {
        let id = snapshot.region_named(name).ok_or_else(|| {
            let defined: Vec<_> = snapshot.regions.iter().map(|r| &*r.name).collect();
            format!("region `{name}` is not defined; defined: {}", defined.join(", "))
        })?;
        down.push(id);
    }
    let facts = parsed.facts(question.ip);
    let decision = decide(snapshot, &facts, now, Mode::Peek);
    let database = snapshot.databases.source();
    let client = Client { ip: decision.client.ip, peer: question.ip, because: client_because(snapshot, &decision.client) };
    let country = Country {
        code: decision.place.country.to_string(),
        subdivision: decision.place.subdivision.map(|_| decision.place.area().to_string()),
        coordinates: match (decision.place.city, decision.place.point()) {
            (Some(_), _) => Some("city"),
            (None, Some(_)) => Some("centroid"),
            (None, None) => None,
        },
        result: decision.place.lookup.label(),
        database: database.map(|d| format!("{} ({})", d.kind, d.path.display())),
        database_built: database.map(|d| humantime::format_rfc3339_seconds(d.built).to_string()),
    };
    let request = RequestSeen { method: parsed.method.to_string(), host: facts.host.to_owned(), path: facts.path.to_owned() };
    let route = decision.route.and_then(|matched| route(snapshot, &facts, matched));
    let explanation = match decision.next {
        Next::Refuse(refusal) => Explanation {
            request,
            client,
            country,
            route,
            regions: Vec::new(),
            moved: None,
            limits: None,
            attempts: Vec::new(),
            answer: refused(refusal),
        },
        Next::Forward(mut plan) => Explanation {
            regions: regions(snapshot, &plan, &decision.place, &down, now, &|region| {
                let route = decision.route.and_then(|m| snapshot.route(m.route))?;
                // The areas do not depend on whether the request itself may teach.
                route.steering.learned(route.steering.areas(decision.client.ip, decision.place.country)?, region)
            }),
            moved: plan.moved.map(|(region, why)| moved(snapshot, region, why)),
            limits: decision.route.and_then(|m| snapshot.route(m.route)).map(|r| limits(r, &plan, &facts, now)),
            answer: match decision.route.and_then(|m| snapshot.route(m.route)) {
                Some(route) => play(snapshot, route, &mut plan, &down, now),
                None => refused(Refusal::NoRoute),
            },
            attempts: plan.tries.iter().map(|t| attempt(snapshot, t)).collect(),
            request,
            client,
            country,
            route,
        },
    };
    Ok(explanation)
}

struct Parsed {
    method: Method,
    host: String,
    path: String,
    headers: HeaderMap,
}

impl Parsed {
    fn new(question: &Question) -> Result<Self, String> {
        let method = question.method.parse::<Method>().map_err(|_| format!("`{}` is no method", question.method))?;
        let uri = question.url.parse::<http::Uri>().map_err(|e| format!("`{}` is no URL: {e}", question.url))?;
        let mut headers = HeaderMap::new();
        for (name, value) in &question.headers {
            let name: HeaderName = name.parse().map_err(|_| format!("`{name}` is no header name"))?;
            let value = HeaderValue::from_str(value).map_err(|_| format!("the value of `{name}` cannot be sent"))?;
            headers.append(name, value);
        }
        let host = match (uri.authority(), headers.get(http::header::HOST)) {
            (_, Some(host)) => host.to_str().unwrap_or_default().to_owned(),
            (Some(authority), None) => authority.to_string(),
            (None, None) => String::new(),
        };
        let path = if uri.path().is_empty() { "/".to_owned() } else { uri.path().to_owned() };
        Ok(Self { method, host, path, headers })
    }

    fn facts(&self, peer: IpAddr) -> Facts<'_> {
        let has_body = self.headers.get(http::header::CONTENT_LENGTH).is_some_and(|l| l != "0")
            || self.headers.contains_key(http::header::TRANSFER_ENCODING);
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // The same question has the same answer: the client's draw is made of its address.
        let chance = hash_ip(peer);
        Facts { peer, method: &self.method, host: &self.host, path: &self.path, headers: &self.headers, has_body, unix, chance }
    }
}

fn client_because(snapshot: &Snapshot, client: &ClientAddress) -> String {
    let header = &snapshot.trust.header;
    let hops = |n: u32| if n == 1 { "1 trusted hop".to_owned() } else { format!("{n} trusted hops") };
    match client.source {
        Source::Peer => format!("the peer is not in client.trusted_proxies, so it is the client; {header} is not read"),
        Source::Header { hops: n } => format!("from {header}, read right to left past {}", hops(n)),
        Source::NoHeader { .. } => format!("the peer is trusted, but sent no {header}, so it is the client"),
        Source::Garbage { hops: n } => format!("{header} holds no address after {}: the last of them is the client", hops(n)),
    }
}

fn route(snapshot: &Snapshot, facts: &Facts<'_>, matched: Matched) -> Option<Route> {
    let name = |m: Matched| snapshot.route(m.route).map(|r| r.name.to_string());
    let others = Router::find_all(&snapshot.router, facts.host, facts.path);
    let beat = others.into_iter().filter(|m| *m != matched).filter_map(|other| {
        let because = if other.host == matched.host { "its path is shorter" } else { "its host is less specific" };
        Some(Beaten { name: name(other)?, because: format!("{because} ({})", shown(facts, other)) })
    });
    Some(Route { name: name(matched)?, because: shown(facts, matched), beat: beat.collect() })
}

fn shown(facts: &Facts<'_>, matched: Matched) -> String {
    let host = match matched.host {
        HostMatch::Exact => "this very host".to_owned(),
        HostMatch::Below(std::cmp::Reverse(len)) => {
            let host = crate::request::host_name(facts.host);
            let suffix = host.len().checked_sub(len).and_then(|at| host.get(at..)).unwrap_or_default();
            format!("host *.{suffix}")
        }
        HostMatch::Any => "any host".to_owned(),
    };
    match facts.path.get(..matched.path) {
        None | Some("") => format!("{host}, any path"),
        Some(prefix) => format!("{host}, path prefix {prefix}"),
    }
}

fn regions(
    snapshot: &Snapshot,
    plan: &Plan,
    place: &Place,
    down: &[RegionId],
    now: Moment,
    learned: &dyn Fn(&Region) -> Option<f32>,
) -> Vec<RegionPlace> {
    let country = place.country;
    let because = |i: usize, why: Why, region: &Region| {
        let nth = plan.order.iter().take(i).filter(|c| c.why == why).count() + 1;
        match why {
            Why::Subdivision => format!("steering.countries.{} names it, place {nth}", place.area()),
            Why::Country => format!("steering.countries.{country} names it, place {nth}"),
            Why::Continent => format!("steering.continents names it for {country}'s continent, place {nth}"),
            Why::Default => format!("steering.default names it, place {nth}, and {country} is not listed"),
            Why::Weighted => format!("drawn by steering.weights, place {nth}"),
            Why::Proximity => {
                let far =
                    place.point().zip(region.location).map(|(client, region)| format!(", {:.0} km", client.distance(region)));
                format!("by distance from the client, place {nth}{}", far.unwrap_or_default())
            }
            Why::Latency => {
                let checks =
                    || region.state.check_time().map(|t| format!(", {:.1} ms in health checks", t.as_secs_f64() * 1_000.0));
                let ms = learned(region).map(|ms| format!(", {ms:.1} ms")).or_else(checks);
                format!("by the time to first byte that was learned, place {nth}{}", ms.unwrap_or(", nothing yet".to_owned()))
            }
            Why::Exploration => "tried out, so that something is learned".to_owned(),
            Why::Failover => format!("steering.failover, place {nth} of those not named above"),
            Why::Writes => "steering.writes: the method is unsafe".to_owned(),
            Why::WritesFailover => format!("steering.writes_failover, place {nth}"),
            Why::ReadYourWrites => "steering.writes: the client wrote just now".to_owned(),
            Why::Preferred => format!("the client prefers it, place {nth}"),
            Why::Forced => format!("the client insists on it, place {nth}"),
            Why::Affinity => "the client's affinity cookie names an upstream in it".to_owned(),
            Why::Replay => "an upstream asked for it".to_owned(),
        }
    };
    let state = |id: RegionId, endpoint: &Endpoint| match down.contains(&id) {
        true => "down (assumed)".to_owned(),
        false => {
            let (word, why) = crate::regions::endpoint::describe(endpoint, now);
            let fine = word == "usable" && endpoint.health.counts().0 == 0;
            if fine { word.to_owned() } else { format!("{word}: {why}") }
        }
    };
    let shares = spill::shares(plan.candidates(&snapshot.regions).map(|(_, region)| region.capacity(now)));
    let seen = |(i, (id, region)): (usize, (RegionId, &Region))| {
        let mut upstreams = Vec::new();
        for upstream in &region.upstreams {
            let endpoints = upstream.state.endpoints();
            let url = |address: &Address| match upstream.url.needs_dns() {
                true => format!("{} ({address})", upstream.url),
                false => upstream.url.to_string(),
            };
            if endpoints.is_empty() {
                upstreams.push(UpstreamSeen { url: upstream.url.to_string(), state: "unresolved".to_owned() });
            }
            upstreams.extend(endpoints.iter().map(|e| UpstreamSeen { url: url(&e.address), state: state(id, e) }));
        }
        RegionPlace {
            name: region.name.to_string(),
            because: plan.order.get(i).map(|c| because(i, c.why, region)).unwrap_or_default(),
            share: shares.get(i).copied().unwrap_or_default(),
            inside: inside(region, now),
            upstreams,
        }
    };
    plan.candidates(&snapshot.regions).enumerate().map(seen).collect()
}

/// How a region treats the requests that it gets.
fn inside(region: &Region, now: Moment) -> String {
    let mut text = match &region.balance {
        Balance::LeastRequests => "least_requests".to_owned(),
        Balance::RoundRobin => "round_robin".to_owned(),
        Balance::Hash(Field::Ip) => "hash by ip".to_owned(),
        Balance::Hash(Field::Cookie(name)) => format!("hash by cookie {name}"),
        Balance::Hash(Field::Header(name)) => format!("hash by header {name}"),
    };
    if let Some(affinity) = &region.affinity {
        let _ = write!(text, ", affinity by cookie {}", affinity.cookie);
    }
    if let Some(hard) = region.limits.hard {
        let _ = write!(text, ", {} of at most {hard} requests at once", region.state.in_flight());
    }
    if let Some(control) = region.state.control.load().as_ref() {
        let share = control.share(now) * 100.0;
        let _ = write!(text, ", {}: keeps {share:.0} % of its traffic ({})", control.kind.label(), control.reason);
    }
    text
}

fn moved(snapshot: &Snapshot, region: RegionId, why: Moved) -> MovedFrom {
    let because = match why {
        Moved::Spill => "a part of its upstreams is out, so a part of its requests moves on, this one included",
        Moved::SlowStart => "it just came back, and has enough requests at once for now",
        Moved::Away => "an operator evacuates or drains it",
        Moved::Ejected => "none of its upstreams is usable",
    };
    let region = snapshot.region(region).map(|r| r.name.to_string()).unwrap_or_default();
    MovedFrom { region, because: because.to_owned() }
}

fn limits(route: &crate::routes::Route, plan: &Plan, facts: &Facts<'_>, now: Moment) -> Limits {
    let (requests, retries) = route.retry.budget.counts(now);
    let allowed = if route.retry.budget.allows(route.retry.allowance, now) { "allows more" } else { "is spent" };
    let silence = match plan.patience {
        Patience::FirstByte => format!("{} (timeouts.first_byte)", seconds(route.timeouts.first_byte)),
        Patience::Idle => format!("{} (timeouts.idle: silent by nature)", seconds(route.timeouts.idle)),
    };
    let repeat = match (facts.is_idempotent(), route.retry.non_idempotent) {
        (true, _) => format!("yes, {} is idempotent", facts.method),
        (false, true) => "yes, retry.non_idempotent is set".to_owned(),
        (false, false) => format!("only if nothing was sent: {} is not idempotent", facts.method),
    };
    Limits {
        connect: seconds(route.timeouts.connect),
        silence,
        total: seconds(route.timeouts.total),
        attempts: plan.max_tries(),
        repeat,
        budget: format!("{allowed}: {retries} retries for {requests} requests in the last 10 s"),
    }
}

/// Plays the attempts: regions assumed down refuse connections, every other upstream answers.
fn play(snapshot: &Snapshot, route: &crate::routes::Route, plan: &mut Plan, down: &[RegionId], now: Moment) -> Answer {
    let backends = Backends { regions: &snapshot.regions, retry: &route.retry };
    while let Ok(next) = plan.next(backends, now) {
        let failure = match (next.endpoint.is_some(), down.contains(&next.region)) {
            (false, _) => Failure::Unresolved,
            (true, true) => Failure::ConnectRefused,
            (true, false) => {
                plan.assume_answered(now);
                let name = snapshot.region(next.region).map(|r| r.name.to_string());
                let panic = if plan.panic { " (nothing is usable, so everything is tried)" } else { "" };
                let text = format!("served by {}{panic}", name.as_deref().unwrap_or_default());
                return Answer { region: name, status: None, text };
            }
        };
        if plan.failed(backends, failure, Sent::default(), now) != Verdict::Again {
            break;
        }
    }
    refused(Refusal::after(plan, plan.retry_after(&snapshot.regions, now)))
}

fn attempt(snapshot: &Snapshot, t: &crate::upstream::Try) -> AttemptSeen {
    let outcome = match t.outcome {
        Outcome::Answered(_) => "answers".to_owned(),
        Outcome::Failed(failure) => failure.label().to_owned(),
        Outcome::Pending | Outcome::Truncated(_) | Outcome::Replayed(_) => t.outcome.label().to_owned(),
    };
    AttemptSeen {
        region: snapshot.region(t.region).map(|r| r.name.to_string()).unwrap_or_default(),
        upstream: upstream(&snapshot.regions, t.region, t.upstream).map(|u| u.url.to_string()).unwrap_or_default(),
        outcome,
    }
}

fn refused(refusal: Refusal) -> Answer {
    let status = refusal.status();
    Answer { region: None, status: Some(status), text: format!("{status} {}", refusal.body().trim_end()) }
}

fn seconds(duration: std::time::Duration) -> String {
    let ms = duration.as_millis();
    if ms.is_multiple_of(1_000) { format!("{}s", ms / 1_000) } else { format!("{ms}ms") }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |label: &str, text: &str, because: &str| {
            let mut line = format!("{label:<9} {text}");
            if !because.is_empty() {
                let _ = write!(line, "\n{:<9}   {because}", "");
            }
            writeln!(f, "{line}")
        };
        let RequestSeen { method, host, path } = &self.request;
        row("request", &format!("{method} {host}{path}"), "")?;
        row("client", &self.client.ip.to_string(), &self.client.because)?;
        let database = match (&self.country.database, &self.country.database_built) {
            (Some(database), Some(built)) => format!("{} in {database}, built {built}", self.country.result),
            _ => "client.country_database is not set".to_owned(),
        };
        let mut country = self.country.subdivision.clone().unwrap_or(self.country.code.clone());
        if let Some(coordinates) = self.country.coordinates {
            let _ = write!(country, ", coordinates of its {}", if coordinates == "city" { "city" } else { "centre" });
        }
        row("country", &country, &database)?;
        match &self.route {
            Some(route) => {
                row("route", &route.name, &route.because)?;
                for beaten in &route.beat {
                    row("", &format!("  beats {}: {}", beaten.name, beaten.because), "")?;
                }
            }
            None => row("route", "none", "no route matches this host and path")?,
        }
        for (i, region) in self.regions.iter().enumerate() {
            let label = if i == 0 { "regions" } else { "" };
            row(label, &format!("{}. {}", i + 1, region.name), &region.because)?;
            row("", &format!("  {:.0} % of such requests begin here; inside {}", region.share * 100.0, region.inside), "")?;
            for upstream in &region.upstreams {
                row("", &format!("  {} {}", upstream.url, upstream.state), "")?;
            }
        }
        if let Some(MovedFrom { region, because }) = &self.moved {
            row("moved", &format!("not to {region}"), because)?;
        }
        if let Some(limits) = &self.limits {
            let Limits { connect, silence, total, attempts, repeat, budget } = limits;
            row("limits", &format!("connect {connect}, silence {silence}, total {total}, at most {attempts} attempts"), "")?;
            row("", &format!("sent again? {repeat}"), "")?;
            row("", &format!("retry budget {budget}"), "")?;
        }
        for (i, attempt) in self.attempts.iter().enumerate() {
            let label = if i == 0 { "attempts" } else { "" };
            let AttemptSeen { region, upstream, outcome } = attempt;
            row(label, &format!("{}. {region} {upstream}: {outcome}", i + 1), "")?;
        }
        row("answer", &self.answer.text, "")
    }
}
