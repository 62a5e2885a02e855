//! What is remembered of a request: one event, read by metrics and access log.

pub mod access_log;
pub mod cache;
pub mod connections;
pub mod metrics;

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use crate::cache::status::Status;
use crate::client::country::LookupResult;
use crate::config::units::Country;
use crate::limits::Seen;
use crate::overload::Shed;
use crate::routes::RouteId;
use crate::state::Live;
use crate::upstream::Plan;
use crate::waf::Match;

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
    /// The path, without the query: it may hold secrets.
    pub path: &'a str,
    /// The status the client saw; 0 if it left before.
    pub status: u16,
    /// Body bytes to the client.
    pub bytes: usize,
    /// The route, if one matched.
    pub route: Option<RouteId>,
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
    /// From the request's header to its end.
    pub total: Duration,
}
