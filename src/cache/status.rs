//! What the cache did, in the words of `Cache-Status` (RFC 9211), of metrics and of explanations.

use std::time::{Duration, SystemTime};

use super::freshness::WhyNot;

/// What the cache did with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Answered from the store.
    Hit,
    /// Answered from the store with what is stale, while it is fetched again.
    Stale,
    /// Answered from the store with what is stale, for the origin fails.
    StaleError,
    /// The origin was asked whether what is stored still holds, and it does.
    Revalidated,
    /// There was nothing.
    Miss,
    /// There was something, but for other requests.
    VaryMiss,
    /// What there was is stale, and the origin sent another.
    Expired,
    /// The request asked for something fresher.
    Request,
    /// It is not looked up: a rule, or it was not stored the last time.
    Bypass,
    /// It is not looked up: its method.
    Method,
    /// It should be answered from the store, and there is nothing.
    OnlyIfCached,
}

impl Status {
    /// All, for tables of metrics.
    pub const ALL: [Self; 11] = [
        Self::Hit,
        Self::Stale,
        Self::StaleError,
        Self::Revalidated,
        Self::Miss,
        Self::VaryMiss,
        Self::Expired,
        Self::Request,
        Self::Bypass,
        Self::Method,
        Self::OnlyIfCached,
    ];

    /// In metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Stale => "stale",
            Self::StaleError => "stale_error",
            Self::Revalidated => "revalidated",
            Self::Miss => "miss",
            Self::VaryMiss => "vary_miss",
            Self::Expired => "expired",
            Self::Request => "request",
            Self::Bypass => "bypass",
            Self::Method => "method",
            Self::OnlyIfCached => "only_if_cached",
        }
    }

    /// The reason for which it went on (section 2.2); none: it did not.
    fn forward(self) -> Option<&'static str> {
        match self {
            Self::Hit | Self::Stale | Self::OnlyIfCached => None,
            Self::StaleError | Self::Revalidated | Self::Expired => Some("stale"),
            Self::Miss => Some("uri-miss"),
            Self::VaryMiss => Some("vary-miss"),
            Self::Request => Some("request"),
            Self::Bypass => Some("bypass"),
            Self::Method => Some("method"),
        }
    }
}

/// What there is to tell of it.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    /// What the cache did.
    pub status: Status,
    /// The origin's status, if it is not the client's.
    pub forward_status: Option<u16>,
    /// For how many seconds it is still fresh; less than nothing: stale.
    pub ttl: Option<i64>,
    /// The response was stored.
    pub stored: bool,
    /// Another request's response was waited for.
    pub collapsed: bool,
    /// Why it was not stored.
    pub why: Option<WhyNot>,
}

impl Told {
    /// A member of `Cache-Status`.
    pub fn field(&self) -> String {
        let Self { status, forward_status, ttl, stored, collapsed, why } = self;
        let mut field = String::with_capacity(64);
        field.push_str("portolan");
        let mut add = |parameter: std::fmt::Arguments<'_>| {
            // Writing to memory cannot fail.
            let _ = std::fmt::Write::write_fmt(&mut field, format_args!("; {parameter}"));
        };
        match status.forward() {
            None if *status == Status::OnlyIfCached => {}
            None => add(format_args!("hit")),
            Some(reason) => add(format_args!("fwd={reason}")),
        }
        if let Some(forward_status) = forward_status {
            add(format_args!("fwd-status={forward_status}"));
        }
        if *stored {
            add(format_args!("stored"));
        }
        if *collapsed {
            add(format_args!("collapsed"));
        }
        if let Some(ttl) = ttl {
            add(format_args!("ttl={ttl}"));
        }
        let detail = match (status, why) {
            (_, Some(why)) => Some(why.label()),
            (Status::Stale, None) => Some("stale-while-revalidate"),
            (Status::StaleError, None) => Some("stale-if-error"),
            (Status::OnlyIfCached, None) => Some("only-if-cached"),
            (_, None) => None,
        };
        if let Some(detail) = detail {
            add(format_args!("detail={detail}"));
        }
        field
    }
}

/// Seconds from `now` until `then`; less than nothing: it is over.
pub fn seconds_until(then: SystemTime, now: SystemTime) -> i64 {
    let seconds = |span: Duration| i64::try_from(span.as_secs()).unwrap_or(i64::MAX);
    then.duration_since(now).map_or_else(|over| -seconds(over.duration()), seconds)
}

/// A stored response, as it is at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredNow {
    /// `memory` or `disk`.
    pub tier: &'static str,
    /// Its status.
    pub status: u16,
    /// Bytes of its body.
    pub bytes: u64,
    /// How old it is, in seconds.
    pub age: u64,
    /// For how many seconds it is still fresh; less than nothing: for how many it has been stale.
    pub fresh_for: i64,
    /// For how many seconds after that it may be served while it is fetched again.
    pub while_revalidate: u64,
    /// For how many seconds after that it may be served where the origin fails.
    pub if_error: u64,
    /// When it was asked for, in milliseconds since 1970.
    pub asked: u64,
    /// Its tags.
    pub tags: Vec<String>,
    /// Fields of requests by which there may be others.
    pub vary: Vec<String>,
}
