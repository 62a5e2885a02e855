//! Attempts: as they are made, and as they are remembered.

use std::sync::Arc;
use std::time::Duration;

use super::failure::{Failure, Stop};
use crate::regions::RegionId;
use crate::regions::endpoint::Endpoint;
use crate::request::Moment;

/// One attempt as it is remembered.
#[derive(Debug, Clone)]
pub struct Try {
    /// The region.
    pub region: RegionId,
    /// The upstream, by position in the region.
    pub upstream: u16,
    /// The address; nothing if its name has none.
    pub endpoint: Option<Arc<Endpoint>>,
    /// When it began.
    pub started: Moment,
    /// When it ended, as far as the choice of an upstream goes: with a response header or a failure.
    pub ended: Moment,
    /// How it ended.
    pub outcome: Outcome,
    /// Its time to connect was cut by the deadline of the whole request.
    pub(super) connect_cut: bool,
    /// Its time to answer was.
    pub(super) answer_cut: bool,
    /// It is the one trial of an ejected upstream.
    pub(super) trial: bool,
    /// It failed on a pooled connection that the upstream had already closed.
    pub(super) stale: bool,
    /// It was answered well; its upstream is told so at the end of the body.
    pub(super) well: bool,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is under way, or its client left.
    Pending,
    /// A response header came and was passed on.
    Answered(u16),
    /// It failed.
    Failed(Failure),
    /// It answered, but broke off inside the body.
    Truncated(u16),
    /// It asked for the request to be sent elsewhere.
    Replayed(u16),
}

impl Outcome {
    /// The label in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Pending => "abandoned",
            Self::Answered(_) => "ok",
            Self::Failed(failure) => failure.label(),
            Self::Truncated(_) => "truncated",
            Self::Replayed(_) => "replayed",
        }
    }

    /// What went wrong, if something did before the response.
    pub fn failure(self) -> Option<Failure> {
        match self {
            Self::Failed(failure) => Some(failure),
            Self::Pending | Self::Answered(_) | Self::Truncated(_) | Self::Replayed(_) => None,
        }
    }

    /// Did it fail, as metrics and traces count it? A client that left, or a replay, is no failure of the upstream.
    pub fn is_bad(self) -> bool {
        match self {
            Self::Answered(status) => status >= 500,
            Self::Failed(_) | Self::Truncated(_) => true,
            Self::Pending | Self::Replayed(_) => false,
        }
    }

    /// The status of the response, if there was one.
    pub fn status(self) -> Option<u16> {
        match self {
            Self::Answered(status) | Self::Truncated(status) | Self::Replayed(status) | Self::Failed(Failure::Status(status)) => {
                Some(status)
            }
            Self::Pending | Self::Failed(_) => None,
        }
    }
}

/// What to do now.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The region.
    pub region: RegionId,
    /// The upstream, by position in the region.
    pub upstream: u16,
    /// The address; nothing if its name has none.
    pub endpoint: Option<Arc<Endpoint>>,
    /// Not over a pooled connection: one of these broke already.
    pub fresh: bool,
    /// Before anything else wait this long.
    pub delay: Duration,
    /// For TCP and TLS.
    pub connect: Duration,
    /// For silence of the upstream, before the header and inside the body.
    pub silence: Duration,
    /// For the header alone, where that differs: the rest of `timeouts.total`.
    pub header: Option<Duration>,
}

/// Why there is no next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exhausted(pub Stop);

/// What is known of a failed attempt's request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// More of the body was sent than can be sent again.
    pub body_lost: bool,
    /// The connection came from the pool.
    pub reused: bool,
    /// The client was still sending its body.
    pub body_incomplete: bool,
}

/// What a failure means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Ask [`Plan::next`] again.
    Again,
    /// This was the last attempt.
    Final(Stop),
}

/// Did the deadline of the whole request end this attempt, rather than the attempt's own time?
pub(super) fn cut(attempt: &Try, failure: Failure) -> bool {
    match failure {
        Failure::ConnectTimeout => attempt.connect_cut,
        Failure::FirstByteTimeout => attempt.answer_cut,
        Failure::Unresolved
        | Failure::ConnectRefused
        | Failure::ConnectFailed
        | Failure::Tls
        | Failure::Closed
        | Failure::Invalid
        | Failure::Status(_) => false,
    }
}
