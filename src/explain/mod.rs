//! What would happen to a request, step by step and why. It asks the same [`decide`] and the same
//! [`Plan`](crate::upstream::Plan) as traffic does, only with [`Mode::Peek`]: nothing is counted or spent.

mod cache;
pub mod coverage;
mod question;
mod regions;
mod rules;
mod text;

use std::net::IpAddr;

use serde::Serialize;

pub use cache::{CacheSeen, stored};
pub use question::{Asked, Question, ResponseAsked};
use regions::{moved, regions};
pub use rules::{Firewall, LimitSeen, OperandSeen, RuleSeen, Transformed};
use rules::{conditions, firewall, limits, transformed};

use crate::client::address::{ClientAddress, Source};
use crate::decide::{Next, decide};
use crate::regions::RegionId;
use crate::request::{Facts, Moment};
use crate::respond::Refusal;
use crate::routes::{HostMatch, Matched, Patience, Router};
use crate::snapshot::Snapshot;
use crate::upstream::plan::{Mode, upstream};
use crate::upstream::{Backends, Failure, Outcome, Plan, Sent, Verdict};

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
    /// The conditions of redirects and transforms.
    pub conditions: Vec<RuleSeen>,
    /// How important it is, where there are classes.
    pub class: Option<String>,
    /// What rules made of it.
    pub firewall: Firewall,
    /// What limits made of it; nothing is spent by asking.
    pub limits: Vec<LimitSeen>,
    /// What the cache makes of it, if it is asked.
    pub cache: Option<CacheSeen>,
    /// What transforms change, if anything.
    pub transforms: Option<Transformed>,
    /// Candidate regions in order, each with the reason for its place.
    pub regions: Vec<RegionPlace>,
    /// The region that steering put first, and why the order begins with another.
    pub moved: Option<MovedFrom>,
    /// How long is waited for what, and how often is tried.
    pub patience: Option<PatienceSeen>,
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
    /// The path as it was sent.
    pub path: String,
    /// The path that routes and rules see, where that is another.
    pub seen_as: Option<String>,
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
pub struct PatienceSeen {
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
    let parsed = Asked::new(question)?;
    let mut down = Vec::new();
    for name in &question.down {
        let id = snapshot.region_named(name).ok_or_else(|| {
            let defined: Vec<_> = snapshot.regions.iter().map(|r| &*r.name).collect();
            format!("region `{name}` is not defined; defined: {}", defined.join(", "))
        })?;
        down.push(id);
    }
    let facts = parsed.facts(question.ip, snapshot.waf.body_limit);
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
    let request = RequestSeen {
        method: parsed.method.to_string(),
        host: facts.host.to_owned(),
        path: facts.path.to_owned(),
        seen_as: decision.path.as_deref().map(str::to_owned),
    };
    let seen_path = decision.path.as_deref().unwrap_or(facts.path);
    let route = decision.route.and_then(|matched| route(snapshot, &facts, seen_path, matched));
    let conditions = conditions(snapshot, &facts, &decision, now);
    let firewall = firewall(snapshot, &facts, &decision, now);
    let limits = limits(snapshot, &facts, &decision, now);
    let cache = cache::cache(snapshot, &facts, &parsed, &decision);
    let transforms = transformed(snapshot, &decision);
    let elsewhere = decision.header.as_ref().and_then(|h| h.to_str().ok()).map(|to| snapshot.secrets.hide(to));
    let elsewhere = elsewhere.as_deref();
    let mut explanation = Explanation {
        request,
        client,
        country,
        route,
        conditions,
        class: decision.route.and_then(|_| class(snapshot, decision.class)),
        firewall,
        limits,
        cache,
        transforms,
        regions: Vec::new(),
        moved: None,
        patience: None,
        attempts: Vec::new(),
        answer: match &decision.next {
            Next::Refuse(refusal) => refused(*refusal, elsewhere),
            // A question comes with its body, and who is forwarded has a route.
            Next::NeedBody | Next::Lookup | Next::NeedShared(_) | Next::Forward(_) => refused(Refusal::Internal, None),
        },
    };
    let route = decision.route.and_then(|m| snapshot.route(m.route));
    if let (Next::Forward(mut plan), Some(route)) = (decision.next, route) {
        explanation.regions = regions(snapshot, &plan, &decision.place, &down, now, &|region| {
            // The areas do not depend on whether the request itself may teach.
            route.steering.learned(route.steering.areas(decision.client.ip, decision.place.country)?, region)
        });
        explanation.moved = plan.moved.map(|(region, why)| moved(snapshot, region, why));
        explanation.patience = Some(patience(route, &plan, &facts, now));
        explanation.answer = play(snapshot, route, &mut plan, &down, now);
        explanation.attempts = plan.tries.iter().map(|t| attempt(snapshot, t)).collect();
    }
    Ok(explanation)
}

/// The class of a request, and what it may fill.
fn class(snapshot: &Snapshot, position: u8) -> Option<String> {
    let classes = &snapshot.overload.classes;
    let class = classes.get(usize::from(position)).filter(|_| classes.len() > 1)?;
    Some(format!(
        "{}: may fill {} % of what regions, upstreams, routes and the process may have at once",
        class.name, class.share.0
    ))
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

fn route(snapshot: &Snapshot, facts: &Facts<'_>, path: &str, matched: Matched) -> Option<Route> {
    let name = |m: Matched| snapshot.route(m.route).map(|r| r.name.to_string());
    let others = Router::find_all(&snapshot.router, facts.host, path);
    let winner = others.iter().position(|m| *m == matched).unwrap_or(0);
    let beat = others.into_iter().enumerate().filter(|(_, m)| *m != matched).filter_map(|(n, other)| {
        let because = match (other.host == matched.host, other.path == matched.path) {
            // Better ones are only left for their condition.
            _ if n < winner => "its condition is not met",
            (true, true) => "it comes later, or has no condition",
            (true, false) => "its path is shorter",
            (false, _) => "its host is less specific",
        };
        Some(Beaten { name: name(other)?, because: format!("{because} ({})", shown(snapshot, facts, path, other)) })
    });
    Some(Route { name: name(matched)?, because: shown(snapshot, facts, path, matched), beat: beat.collect() })
}

fn shown(snapshot: &Snapshot, facts: &Facts<'_>, path: &str, matched: Matched) -> String {
    let host = match matched.host {
        HostMatch::Exact => "this very host".to_owned(),
        HostMatch::Below(std::cmp::Reverse(len)) => {
            let host = crate::request::host_name(facts.host);
            let suffix = host.len().checked_sub(len).and_then(|at| host.get(at..)).unwrap_or_default();
            format!("host *.{suffix}")
        }
        HostMatch::Any => "any host".to_owned(),
    };
    let filter = snapshot.route(matched.route).and_then(|r| r.filter.as_ref());
    let condition = filter.map(|f| format!(", match {}", f.source())).unwrap_or_default();
    match path.get(..matched.path) {
        None | Some("") => format!("{host}, any path{condition}"),
        Some(prefix) => format!("{host}, path prefix {prefix}{condition}"),
    }
}

fn patience(route: &crate::routes::Route, plan: &Plan, facts: &Facts<'_>, now: Moment) -> PatienceSeen {
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
    PatienceSeen {
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
    refused(Refusal::after(plan, plan.retry_after(&snapshot.regions, now)), None)
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

fn refused(refusal: Refusal, elsewhere: Option<&str>) -> Answer {
    let status = refusal.status();
    let text = match (refusal, elsewhere) {
        (Refusal::Redirected { .. }, Some(to)) => format!("{status}, to {to}"),
        (Refusal::Challenged { bits, waits }, _) => {
            let or = if waits { ", or to wait without JavaScript" } else { "" };
            format!("{status} with a challenge: {bits} bits to compute{or}")
        }
        (Refusal::Shed { reason }, _) => format!("{status} {} ({})", refusal.body().trim_end(), reason.in_words()),
        _ => format!("{status} {}", refusal.body().trim_end()),
    };
    Answer { region: None, status: Some(status), text }
}

fn seconds(duration: std::time::Duration) -> String {
    let ms = duration.as_millis();
    if ms.is_multiple_of(1_000) { format!("{}s", ms / 1_000) } else { format!("{ms}ms") }
}
