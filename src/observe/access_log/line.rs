//! A line as JSON.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::text::{address, cookies, query, referer, truncated};
use crate::cache::status::Status;
use crate::config::access_log::Addresses;
use crate::limits::{Decision, Limit};
use crate::observe::RequestDone;
use crate::observe::trace::Trace;
use crate::observe::why::Why;
use crate::overload::Shed;
use crate::state::Live;
use crate::upstream::{Plan, Try, plan};
use crate::waf::Match;

/// The fields of a line, in their order.
#[derive(Serialize)]
pub(super) struct Line<'a> {
    #[serde(serialize_with = "display")]
    time: humantime::Rfc3339Timestamp,
    request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    client: std::net::IpAddr,
    country: &'a str,
    method: &'a str,
    host: &'a str,
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    query: Option<Cow<'a, str>>,
    protocol: &'static str,
    status: u16,
    /// Why it was no success.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<&'static str>,
    bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    referer: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_agent: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cookies: Option<Cow<'a, str>>,
    route: Option<&'a str>,
    region: Option<&'a str>,
    /// The region that steering put first, and why the request did not begin there.
    #[serde(skip_serializing_if = "Option::is_none")]
    moved: Option<MovedLine<'a>>,
    /// Nothing was usable.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    panic: bool,
    /// Rules that applied, and what they saw.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    waf: Vec<MatchLine<'a>>,
    /// What the cache did, if it was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<&'static str>,
    /// Why it was let go, if there was too much at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    shed: Option<&'static str>,
    /// Limits that did not just allow it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    limits: Vec<LimitLine<'a>>,
    attempts: Attempts<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_retried: Option<&'static str>,
    total_ms: Millis,
}

impl<'a> Line<'a> {
    pub(super) fn new(done: &'a RequestDone<'a>) -> Self {
        Self {
            time: humantime::format_rfc3339_millis(done.at),
            request_id: done.request_id,
            trace_id: done.trace.map(Trace::name),
            client: address(done),
            country: done.country.as_str(),
            method: done.method.as_str(),
            host: done.host,
            path: done.path,
            query: query(done),
            protocol: done.protocol(),
            status: done.status,
            why: Why::of(done).map(Why::label),
            bytes: done.bytes,
            referer: referer(done),
            user_agent: done.header(&http::header::USER_AGENT),
            cookies: cookies(done),
            route: done.route.and_then(|id| done.live.snapshot.route(id)).map(|r| &*r.name),
            region: done.region().map(|name| &**name),
            moved: done
                .plan
                .and_then(|p| p.moved)
                .and_then(|(from, why)| Some(MovedLine { from: &done.live.snapshot.region(from)?.name, because: why.label() })),
            panic: done.plan.is_some_and(|p| p.panic),
            waf: done.matches.iter().map(|m| MatchLine::new(m, done.live.snapshot.access_log.addresses)).collect(),
            cache: done.cache.map(Status::label),
            shed: done.shed.map(Shed::label),
            limits: LimitLine::all(done),
            attempts: Attempts { live: done.live, plan: done.plan },
            not_retried: done.plan.and_then(|p| p.stopped).map(|s| s.label()),
            total_ms: Millis(done.total),
        }
    }
}

fn display<T: std::fmt::Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

struct Attempts<'a> {
    live: &'a Live,
    plan: Option<&'a Plan>,
}

#[derive(Serialize)]
struct MovedLine<'a> {
    from: &'a str,
    because: &'static str,
}

/// A rule that applied.
#[derive(Serialize)]
struct MatchLine<'a> {
    rule: &'a str,
    action: &'static str,
    /// By operand; `null` is missing.
    saw: std::collections::BTreeMap<&'a str, Option<Cow<'a, str>>>,
}

impl<'a> MatchLine<'a> {
    fn new(m: &'a Match, addresses: Addresses) -> Self {
        let told = |value: &'a str| match (addresses, value.parse()) {
            (Addresses::Truncate, Ok(ip)) => truncated(ip).to_string().into(),
            (Addresses::Truncate | Addresses::Keep, _) => Cow::from(value),
        };
        let saw = m.seen.iter().map(|seen| (seen.operand.as_str(), seen.value.as_deref().map(told))).collect();
        Self { rule: &m.rule, action: m.action, saw }
    }
}

/// A limit that did not just allow it.
#[derive(Serialize)]
struct LimitLine<'a> {
    limit: &'a str,
    decision: &'static str,
}

impl<'a> LimitLine<'a> {
    fn all(done: &RequestDone<'a>) -> Vec<Self> {
        let seen = done.limits.iter().filter(|seen| seen.decision != Decision::Allowed);
        let line = |seen| {
            let limit: &Limit = done.live.snapshot.limits.rule(seen)?;
            Some(Self { limit: &limit.id, decision: seen.decision.label() })
        };
        seen.filter_map(line).collect()
    }
}

/// One attempt.
#[derive(Serialize)]
struct AttemptLine<'a> {
    region: &'a str,
    #[serde(serialize_with = "display_upstream")]
    upstream: Option<&'a crate::config::units::UpstreamUrl>,
    /// Which of the addresses of its name.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "display_address")]
    address: Option<&'a crate::regions::endpoint::Address>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    ms: Millis,
}

fn display_upstream<S: Serializer>(value: &Option<&crate::config::units::UpstreamUrl>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(url) => to.collect_str(url),
        None => to.serialize_none(),
    }
}

fn display_address<S: Serializer>(value: &Option<&crate::regions::endpoint::Address>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(address) => to.collect_str(address),
        None => to.serialize_none(),
    }
}

impl Serialize for Attempts<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let tries = self.plan.map(|p| p.tries.as_slice()).unwrap_or_default();
        let url = |t: &Try| plan::upstream(&self.live.snapshot.regions, t.region, t.upstream).map(|u| &u.url);
        to.collect_seq(tries.iter().map(|t| AttemptLine {
            region: self.live.snapshot.region(t.region).map_or("", |r| &r.name),
            upstream: url(t),
            address: t.endpoint.as_ref().filter(|_| url(t).is_some_and(|u| u.needs_dns())).map(|e| &e.address),
            outcome: t.outcome.label(),
            status: t.outcome.status(),
            ms: Millis(t.ended.since(t.started)),
        }))
    }
}

/// Milliseconds with three decimals.
struct Millis(Duration);

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(self.0.as_micros() as f64 / 1_000.0)
    }
}
