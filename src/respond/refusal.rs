//! Every answer that Portolan makes itself: one enum, read for status, body and headers.

use std::time::Duration;

use crate::connections::{Fault, Kind};
use crate::limits::seconds;
use crate::overload::Shed;
use crate::upstream::{Failure, Plan, Stop};
use crate::waf::challenge::Wrong;

/// Why Portolan answers in place of an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No route matches.
    NoRoute,
    /// The request cannot be understood (RFC 9110, section 15.5.1).
    BadRequest,
    /// What came is no request, or none that is served here.
    Faulty {
        /// What is wrong with it.
        fault: Fault,
    },
    /// Its body is longer than its route's `max_body` (RFC 9110, section 15.5.14).
    BodyTooLarge,
    /// Its connection was made for other names (RFC 9110, section 15.5.20).
    Misdirected,
    /// The client stopped sending its request (RFC 9110, section 15.5.9).
    RequestTimeout,
    /// No candidate gave a response.
    AllRegionsUnavailable {
        /// When to ask again.
        retry_after: Duration,
        /// What went wrong last.
        failure: Option<Failure>,
    },
    /// `timeouts.total` ran out.
    DeadlineExceeded {
        /// What went wrong last.
        failure: Option<Failure>,
    },
    /// A response was given up for another attempt, and nothing better followed.
    GivenUp {
        /// Its status.
        status: u16,
        /// When it said to ask again.
        retry_after: Option<Duration>,
    },
    /// The attempt failed and must not be repeated.
    NotRepeated {
        /// What went wrong.
        failure: Failure,
    },
    /// Every upstream that might answer is at its limit, and the queue is full or too slow.
    Overloaded,
    /// There is too much at once.
    Shed {
        /// Of what.
        reason: Shed,
    },
    /// An upstream asked for a replay that cannot be done.
    ReplayRefused {
        /// Why.
        why: &'static str,
    },
    /// A rule refuses it: its position, or the managed ruleset.
    Blocked {
        /// The rule, by its position under `waf.rules`.
        rule: Option<u16>,
        /// The status.
        status: u16,
    },
    /// It came too often.
    OverLimit {
        /// The limit, by its position.
        limit: u16,
        /// The status.
        status: u16,
        /// When there is room again.
        retry_after: Duration,
    },
    /// Nobody can tell whether it came too often, and the limit lets nobody pass then.
    LimitUnavailable,
    /// The client has to do something first.
    Challenged {
        /// Zero bits that its hash has to begin with.
        bits: u8,
        /// It may wait in place of computing.
        waits: bool,
    },
    /// It did.
    ChallengePassed {
        /// It waited, and is sent back.
        waited: bool,
    },
    /// It did not.
    ChallengeFailed {
        /// What was wrong.
        wrong: Wrong,
    },
    /// It is sent elsewhere.
    Redirected {
        /// The status.
        status: u16,
    },
    /// It should be answered from the cache, and there is nothing (RFC 9111, section 5.2.1.7).
    NotCached,
    /// An authority asked whether a name is ours (RFC 8555, section 8.3).
    Proof,
    /// A URL was purged.
    Purged,
    /// Whoever wants to purge has no token.
    PurgeRefused,
    /// A mistake of ours.
    Internal,
}

impl Refusal {
    /// What to answer once `plan` has ended without a response.
    pub fn after(plan: &Plan, retry_after: Duration) -> Self {
        let failure = plan.last_failure();
        match (plan.stopped, failure, plan.given_up()) {
            (Some(Stop::Deadline), failure, _) => Self::DeadlineExceeded { failure },
            (Some(Stop::Replay), ..) => {
                Self::ReplayRefused { why: plan.replays.as_ref().and_then(|r| r.refused).unwrap_or_default() }
            }
            (_, _, Some(status)) => Self::GivenUp { status, retry_after: plan.asked_to_wait() },
            (Some(Stop::Busy), ..) => Self::Overloaded,
            // Somebody did answer, in words that nobody understands.
            (_, Some(failure @ Failure::Invalid), None) => Self::NotRepeated { failure },
            (Some(Stop::NotIdempotent | Stop::BodyTooLarge), Some(failure), None) => Self::NotRepeated { failure },
            (_, failure, None) => Self::AllRegionsUnavailable { retry_after, failure },
        }
    }

    /// Was it let go because there was too much at once?
    pub fn shed(self) -> Option<Shed> {
        match self {
            Self::Shed { reason } => Some(reason),
            Self::Overloaded => Some(Shed::Region),
            _ => None,
        }
    }

    /// The status code.
    pub fn status(self) -> u16 {
        match self {
            Self::NoRoute => 404,
            Self::BadRequest => 400,
            Self::Faulty { fault } => fault.kind.status(),
            Self::BodyTooLarge => 413,
            Self::Misdirected => 421,
            Self::RequestTimeout => 408,
            Self::AllRegionsUnavailable { .. } => 503,
            Self::DeadlineExceeded { .. } => 504,
            Self::GivenUp { status, retry_after: _ } => status,
            Self::Overloaded | Self::Shed { .. } => 503,
            Self::ReplayRefused { .. } => 502,
            Self::NotRepeated { failure } if failure.is_timeout() => 504,
            Self::NotRepeated { .. } => 502,
            Self::Blocked { status, .. } | Self::Redirected { status } | Self::OverLimit { status, .. } => status,
            Self::LimitUnavailable => 503,
            Self::Challenged { .. } | Self::ChallengeFailed { .. } => 403,
            Self::ChallengePassed { waited: true } => 303,
            Self::ChallengePassed { waited: false } => 204,
            Self::NotCached => 504,
            Self::Proof | Self::Purged => 200,
            Self::PurgeRefused => 403,
            Self::Internal => 500,
        }
    }

    /// The body: safe to show to anybody.
    pub fn body(self) -> &'static str {
        match self {
            Self::NoRoute => "No such route\n",
            Self::BadRequest => "Bad request\n",
            Self::Faulty { fault } => match fault.kind {
                Kind::Malformed | Kind::Framing | Kind::Host | Kind::Flood => "Bad request\n",
                Kind::HeaderTimeout | Kind::SlowBody | Kind::SlowReader => "The request took too long\n",
                Kind::Target => "The target is too long\n",
                Kind::Expectation => "The expectation cannot be met\n",
                Kind::Headers => "The headers are too large\n",
                Kind::Unimplemented => "Not implemented\n",
                Kind::Version => "HTTP version not supported\n",
            },
            Self::BodyTooLarge => "The body is too large\n",
            Self::Misdirected => "Misdirected request\n",
            Self::RequestTimeout => "The request took too long\n",
            Self::AllRegionsUnavailable { .. } => "All regions unavailable",
            Self::DeadlineExceeded { .. } => "The origin took too long\n",
            Self::GivenUp { .. } => "The origin failed\n",
            Self::NotRepeated { failure } if failure.is_timeout() => "The origin took too long\n",
            Self::NotRepeated { .. } => "The origin failed\n",
            Self::Overloaded | Self::Shed { .. } => "Too many requests are being served\n",
            Self::ReplayRefused { .. } => "The origin's replay cannot be done\n",
            Self::Blocked { .. } => "Forbidden\n",
            Self::OverLimit { .. } => "Rate limit exceeded",
            Self::LimitUnavailable => "Try again in a moment\n",
            Self::Challenged { .. } => "A challenge has to be passed first\n",
            Self::ChallengeFailed { .. } => "The challenge was not passed\n",
            Self::ChallengePassed { .. } | Self::Redirected { .. } | Self::Proof => "",
            Self::NotCached => "It is not in the cache\n",
            Self::Purged => "Purged\n",
            Self::PurgeRefused => "Purging needs a token\n",
            Self::Internal => "Internal error\n",
        }
    }

    /// `Retry-After` in whole seconds, rounded up.
    pub fn retry_after(self) -> Option<u64> {
        match self {
            Self::Overloaded | Self::Shed { .. } | Self::LimitUnavailable => Some(1),
            Self::AllRegionsUnavailable { retry_after, .. }
            | Self::OverLimit { retry_after, .. }
            | Self::GivenUp { retry_after: Some(retry_after), .. } => Some(seconds(retry_after)),
            Self::NoRoute
            | Self::BadRequest
            | Self::Faulty { .. }
            | Self::BodyTooLarge
            | Self::Misdirected
            | Self::RequestTimeout
            | Self::DeadlineExceeded { .. }
            | Self::GivenUp { retry_after: None, .. }
            | Self::ReplayRefused { .. }
            | Self::NotRepeated { .. }
            | Self::Blocked { .. }
            | Self::Challenged { .. }
            | Self::ChallengePassed { .. }
            | Self::ChallengeFailed { .. }
            | Self::Redirected { .. }
            | Self::NotCached
            | Self::Proof
            | Self::Purged
            | Self::PurgeRefused
            | Self::Internal => None,
        }
    }

    /// `Proxy-Status` (RFC 9209): the error, and the region it is about.
    pub fn proxy_status(self, region: Option<&str>) -> String {
        let failure = |failure: Option<Failure>, other| failure.map_or(other, Failure::proxy_status);
        let error = match self {
            Self::NoRoute => "destination_not_found",
            Self::BadRequest | Self::Faulty { .. } | Self::BodyTooLarge | Self::Misdirected | Self::RequestTimeout => {
                "http_request_error"
            }
            Self::AllRegionsUnavailable { failure: f, .. } => failure(f, "destination_unavailable"),
            Self::DeadlineExceeded { failure: f } => failure(f, "http_response_timeout"),
            Self::GivenUp { .. } => "destination_unavailable",
            Self::NotRepeated { failure } => failure.proxy_status(),
            Self::Overloaded | Self::Shed { .. } => "connection_limit_reached",
            Self::ReplayRefused { .. } => "http_protocol_error",
            Self::Blocked { .. } | Self::Challenged { .. } | Self::ChallengeFailed { .. } | Self::OverLimit { .. } => {
                "http_request_denied"
            }
            Self::LimitUnavailable => "proxy_internal_response",
            // Answers of ours, and no errors.
            Self::ChallengePassed { .. } | Self::Redirected { .. } | Self::NotCached | Self::Proof | Self::Purged => {
                return "portolan".to_owned();
            }
            Self::PurgeRefused => "http_request_denied",
            Self::Internal => "proxy_internal_error",
        };
        let mut value = format!("portolan; error={error}");
        if let Self::GivenUp { status, retry_after: _ } = self {
            value.push_str(&format!("; received-status={status}"));
        }
        if let Self::ReplayRefused { why } | Self::Faulty { fault: Fault { kind: _, why } } = self {
            value.push_str(&format!("; details=\"{why}\""));
        }
        if let Some(region) = region {
            value.push_str(&format!("; next-hop=\"{region}\""));
        }
        value
    }
}
