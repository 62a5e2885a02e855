//! Why a request was not a success, in one word for the log, metrics and the page. Envoy has response flags for this
//! (`%RESPONSE_FLAGS%`), HAProxy its termination state.

use super::RequestDone;
use crate::connections::Kind;
use crate::overload::Shed;
use crate::respond::Refusal;
use crate::upstream::Outcome;

/// Why a request was not a success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// What the client sent is faulty.
    Fault(Kind),
    /// There was too much at once.
    Shed(Shed),
    /// No route matches.
    NoRoute,
    /// The request cannot be understood.
    BadRequest,
    /// Its body is longer than `max_body`.
    BodyTooLarge,
    /// The connection's certificate does not cover its host.
    Misdirected,
    /// Its body did not come in time.
    RequestTimeout,
    /// No candidate gave a response.
    AllRegionsUnavailable,
    /// `timeouts.total` ran out.
    Deadline,
    /// A response was given up for another attempt, and nothing better followed.
    ResponseGivenUp,
    /// An attempt failed, and could not be repeated.
    NotRepeated,
    /// A replay cannot be done.
    ReplayRefused,
    /// A rule blocked it.
    RuleBlocked,
    /// The managed ruleset blocked it.
    ManagedBlocked,
    /// It came too often.
    OverLimit,
    /// Nobody could tell whether it came too often.
    LimitUnavailable,
    /// A challenge has to be passed first.
    Challenged,
    /// A challenge was not passed.
    ChallengeFailed,
    /// `Cache-Control: only-if-cached`, and nothing is stored.
    NotCached,
    /// Purging needs a token.
    PurgeRefused,
    /// A mistake of Portolan's.
    Internal,
    /// The client left before the answer.
    ClientClosed,
    /// The client left inside the answer.
    ClientAborted,
    /// The upstream broke off inside its response.
    UpstreamTruncated,
    /// The origin's own answer, 400 to 499.
    Origin4xx,
    /// The origin's own answer, 500 and above.
    Origin5xx,
}

impl Why {
    /// Every reason, in the order of the documentation.
    pub fn all() -> impl Iterator<Item = Self> {
        const PLAIN: [Why; 24] = [
            Why::NoRoute,
            Why::BadRequest,
            Why::BodyTooLarge,
            Why::Misdirected,
            Why::RequestTimeout,
            Why::AllRegionsUnavailable,
            Why::Deadline,
            Why::ResponseGivenUp,
            Why::NotRepeated,
            Why::ReplayRefused,
            Why::RuleBlocked,
            Why::ManagedBlocked,
            Why::OverLimit,
            Why::LimitUnavailable,
            Why::Challenged,
            Why::ChallengeFailed,
            Why::NotCached,
            Why::PurgeRefused,
            Why::Internal,
            Why::ClientClosed,
            Why::ClientAborted,
            Why::UpstreamTruncated,
            Why::Origin4xx,
            Why::Origin5xx,
        ];
        // Connections that are let go have no request.
        let shed = Shed::ALL.into_iter().filter(|shed| *shed != Shed::Connections);
        PLAIN.into_iter().chain(shed.map(Why::Shed)).chain(Kind::ALL.into_iter().map(Why::Fault))
    }

    /// Its place in [`Why::all`].
    pub fn index(self) -> usize {
        Self::all().position(|why| why == self).unwrap_or(usize::MAX)
    }

    /// The word.
    pub fn label(self) -> &'static str {
        match self {
            Self::Fault(Kind::Host) => "bad_host",
            Self::Fault(Kind::Version) => "unknown_version",
            Self::Fault(kind) => kind.label(),
            Self::Shed(Shed::Client) => "shed_client",
            Self::Shed(Shed::Route) => "shed_route",
            Self::Shed(Shed::Total) => "shed_total",
            Self::Shed(Shed::Region) => "shed_region",
            Self::Shed(Shed::Connections) => "shed_connections",
            Self::NoRoute => "no_route",
            Self::BadRequest => "bad_request",
            Self::BodyTooLarge => "body_too_large",
            Self::Misdirected => "misdirected",
            Self::RequestTimeout => "request_timeout",
            Self::AllRegionsUnavailable => "all_regions_unavailable",
            Self::Deadline => "deadline",
            Self::ResponseGivenUp => "response_given_up",
            Self::NotRepeated => "not_repeated",
            Self::ReplayRefused => "replay_refused",
            Self::RuleBlocked => "rule_blocked",
            Self::ManagedBlocked => "managed_blocked",
            Self::OverLimit => "over_limit",
            Self::LimitUnavailable => "limit_unavailable",
            Self::Challenged => "challenged",
            Self::ChallengeFailed => "challenge_failed",
            Self::NotCached => "not_cached",
            Self::PurgeRefused => "purge_refused",
            Self::Internal => "internal",
            Self::ClientClosed => "client_closed",
            Self::ClientAborted => "client_aborted",
            Self::UpstreamTruncated => "upstream_truncated",
            Self::Origin4xx => "origin_4xx",
            Self::Origin5xx => "origin_5xx",
        }
    }

    /// Why `done` was no success; nothing if it was one.
    pub fn of(done: &RequestDone<'_>) -> Option<Self> {
        if let Some(refusal) = done.refusal {
            return Self::refused(refusal);
        }
        let last = done.plan.and_then(|plan| plan.tries.last());
        match (last.map(|attempt| attempt.outcome), done.status) {
            (_, super::CLIENT_CLOSED_REQUEST) => Some(Self::ClientClosed),
            (Some(Outcome::Truncated(_)), _) => Some(Self::UpstreamTruncated),
            (_, 400..=499) => Some(Self::Origin4xx),
            // Without an attempt, and not out of the store, it is nobody's but ours.
            (None, 500..) if done.cache.is_none() => Some(Self::Internal),
            (_, 500..) => Some(Self::Origin5xx),
            _ if done.aborted => Some(Self::ClientAborted),
            _ => None,
        }
    }

    fn refused(refusal: Refusal) -> Option<Self> {
        Some(match refusal {
            Refusal::NoRoute => Self::NoRoute,
            Refusal::BadRequest => Self::BadRequest,
            Refusal::Faulty { fault } => Self::Fault(fault.kind),
            Refusal::BodyTooLarge => Self::BodyTooLarge,
            Refusal::Misdirected => Self::Misdirected,
            Refusal::RequestTimeout => Self::RequestTimeout,
            Refusal::AllRegionsUnavailable { .. } => Self::AllRegionsUnavailable,
            Refusal::DeadlineExceeded { .. } => Self::Deadline,
            Refusal::GivenUp { .. } => Self::ResponseGivenUp,
            Refusal::NotRepeated { .. } => Self::NotRepeated,
            Refusal::Overloaded => Self::Shed(Shed::Region),
            Refusal::Shed { reason } => Self::Shed(reason),
            Refusal::ReplayRefused { .. } => Self::ReplayRefused,
            Refusal::Blocked { rule: Some(_), .. } => Self::RuleBlocked,
            Refusal::Blocked { rule: None, .. } => Self::ManagedBlocked,
            Refusal::OverLimit { .. } => Self::OverLimit,
            Refusal::LimitUnavailable => Self::LimitUnavailable,
            Refusal::Challenged { .. } => Self::Challenged,
            Refusal::ChallengeFailed { .. } => Self::ChallengeFailed,
            Refusal::NotCached => Self::NotCached,
            Refusal::PurgeRefused => Self::PurgeRefused,
            Refusal::Internal => Self::Internal,
            Refusal::ChallengePassed { .. } | Refusal::Redirected { .. } | Refusal::Proof | Refusal::Purged => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_word_of_its_own_and_stands_in_the_documentation() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/seeing.md")).unwrap();
        let mut words: Vec<_> = Why::all().map(Why::label).collect();
        for word in &words {
            assert!(text.contains(&format!("| `{word}` |")), "docs/seeing.md does not tell of `{word}`");
        }
        let all = words.len();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), all);
    }
}
