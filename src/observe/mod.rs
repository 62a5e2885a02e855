//! What is remembered of a request: one event, read by metrics and access log.

pub mod access_log;
pub mod lately;
pub mod metrics;
pub mod sketch;
pub mod tail;
pub mod trace;
pub mod traffic;
pub mod why;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, Version};

use crate::cache::status::Status;
use crate::client::country::LookupResult;
use crate::config::units::Country;
use crate::limits::Seen;
use crate::overload::Shed;
use crate::request::Moment;
use crate::respond::Refusal;
use crate::routes::{HostMatch, Patience, RouteId};
use crate::state::Live;
use crate::upstream::{Outcome, Plan};
use crate::waf::Match;
use trace::Trace;

/// A client that left before its answer; nginx's code for it, seen in logs and metrics only.
pub const CLIENT_CLOSED_REQUEST: u16 = 499;

/// A request that is over.
#[derive(Debug)]
pub struct RequestDone<'a> {
    /// What it ran under.
    pub live: &'a Live,
    /// When it ended.
    pub at: SystemTime,
    /// `X-Request-Id`.
    pub request_id: &'a str,
    /// Who asked.
    pub client: IpAddr,
    /// Where from.
    pub country: Country,
    /// How the country was found.
    pub lookup: LookupResult,
    /// The method.
    pub method: &'a http::Method,
    /// The authority.
    pub host: &'a str,
    /// The path, without the query.
    pub path: &'a str,
    /// The query: it may hold secrets.
    pub query: Option<&'a str>,
    /// The version of HTTP.
    pub version: Version,
    /// It came over TLS.
    pub secured: bool,
    /// The request's headers.
    pub headers: &'a HeaderMap,
    /// A random number, the request's own.
    pub chance: u64,
    /// The status the client saw; 0 if it left before.
    pub status: u16,
    /// Body bytes to the client.
    pub bytes: usize,
    /// The route, if one matched.
    pub route: Option<RouteId>,
    /// What its host matched by.
    pub matched: Option<HostMatch>,
    /// The answer of ours that was sent, if one was.
    pub refusal: Option<Refusal>,
    /// The client left inside the answer.
    pub aborted: bool,
    /// Its place in a trace, if there is tracing.
    pub trace: Option<&'a Trace>,
    /// Rules that applied.
    pub matches: &'a [Match],
    /// Limits that applied.
    pub limits: &'a [Seen],
    /// How important it was: a position in `overload.classes`.
    pub class: u8,
    /// Why it was let go, if there was too much at once.
    pub shed: Option<Shed>,
    /// What the cache did, if it was asked.
    pub cache: Option<Status>,
    /// The attempts, if it was forwarded.
    pub plan: Option<&'a Plan>,
    /// When it began.
    pub started: Moment,
    /// From the request's header to its end.
    pub total: Duration,
}

impl<'a> RequestDone<'a> {
    /// The region of the last attempt.
    pub fn region(&self) -> Option<&'a Arc<str>> {
        let last = self.plan.and_then(|plan| plan.tries.last())?;
        self.live.snapshot.region(last.region).map(|region| &region.name)
    }

    /// How long its client waited: until its end, or, for tunnels and the like, until the response's header.
    pub fn took(&self) -> Duration {
        let last = self.plan.filter(|plan| plan.patience == Patience::Idle).and_then(|plan| plan.tries.last());
        match last.map(|attempt| (attempt.outcome, attempt.ended)) {
            Some((Outcome::Answered(_) | Outcome::Truncated(_), ended)) => ended.since(self.started),
            _ => self.total,
        }
    }

    /// A header of the request, if it is text.
    pub fn header(&self, name: &HeaderName) -> Option<&'a str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        if self.secured { "https" } else { "http" }
    }

    /// As logs write it.
    pub fn protocol(&self) -> &'static str {
        match self.version {
            Version::HTTP_09 => "HTTP/0.9",
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2.0",
            Version::HTTP_3 => "HTTP/3.0",
            _ => "HTTP/1.1",
        }
    }
}
