//! What went wrong with an attempt, and why a request is not tried again.

/// What went wrong with an attempt, before a response byte went to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Failure {
    /// The upstream's name was never resolved.
    Unresolved,
    /// Nobody listens.
    ConnectRefused,
    /// No connection within `timeouts.connect`.
    ConnectTimeout,
    /// No connection for another reason (unreachable network, no free port).
    ConnectFailed,
    /// The TLS handshake failed, or the certificate is not good for the name.
    Tls,
    /// No response header within `timeouts.first_byte`.
    FirstByteTimeout,
    /// The connection was closed or reset before a response.
    Closed,
    /// What came is no HTTP response.
    Invalid,
    /// A status listed in `retry.statuses`.
    Status(u16),
}

impl Failure {
    /// Every kind, for tables of metrics; the status stands for all.
    pub const ALL: [Self; 9] = [
        Self::Unresolved,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::ConnectFailed,
        Self::Tls,
        Self::FirstByteTimeout,
        Self::Closed,
        Self::Invalid,
        Self::Status(0),
    ];

    /// The label in metrics, logs and `explain`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unresolved => "unresolved",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectFailed => "connect_failed",
            Self::Tls => "tls",
            Self::FirstByteTimeout => "first_byte_timeout",
            Self::Closed => "closed",
            Self::Invalid => "invalid_response",
            Self::Status(_) => "status",
        }
    }

    /// The error type in `Proxy-Status` (RFC 9209, section 2.3).
    pub fn proxy_status(self) -> &'static str {
        match self {
            Self::Unresolved => "dns_error",
            Self::ConnectRefused => "connection_refused",
            Self::ConnectTimeout => "connection_timeout",
            Self::ConnectFailed => "destination_ip_unroutable",
            Self::Tls => "tls_protocol_error",
            Self::FirstByteTimeout => "http_response_timeout",
            Self::Closed => "connection_terminated",
            Self::Invalid => "http_protocol_error",
            Self::Status(_) => "http_request_error",
        }
    }

    /// No byte of the request can have reached the upstream, so anything may be sent elsewhere.
    pub fn nothing_was_sent(self) -> bool {
        match self {
            Self::Unresolved | Self::ConnectRefused | Self::ConnectTimeout | Self::ConnectFailed | Self::Tls => true,
            Self::FirstByteTimeout | Self::Closed | Self::Invalid | Self::Status(_) => false,
        }
    }

    /// Asking the same upstream again at once can help: the connection broke, but nobody answered
    /// "no" and nobody kept us waiting.
    pub fn may_be_a_blip(self) -> bool {
        match self {
            Self::ConnectRefused | Self::ConnectFailed | Self::Closed => true,
            Self::Unresolved | Self::ConnectTimeout | Self::Tls | Self::FirstByteTimeout | Self::Invalid | Self::Status(_) => {
                false
            }
        }
    }

    /// It was a matter of time (504 rather than 502).
    pub fn is_timeout(self) -> bool {
        matches!(self, Self::ConnectTimeout | Self::FirstByteTimeout)
    }
}

/// Why a failed request is not tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stop {
    /// It may have had an effect, and its method is not idempotent.
    NotIdempotent,
    /// More of its body was sent than can be sent again.
    BodyTooLarge,
    /// `retry.attempts` are used up.
    Attempts,
    /// `timeouts.total` ran out.
    Deadline,
    /// Every candidate was tried.
    NoCandidate,
    /// The route's retry budget is spent.
    Budget,
    /// Every upstream that is left is at its limit, and waiting was in vain.
    Busy,
    /// An upstream asked for a replay that cannot be done.
    Replay,
}

impl Stop {
    /// Every reason, for tables of metrics.
    pub const ALL: [Self; 8] = [
        Self::NotIdempotent,
        Self::BodyTooLarge,
        Self::Attempts,
        Self::Deadline,
        Self::NoCandidate,
        Self::Budget,
        Self::Busy,
        Self::Replay,
    ];

    /// The label in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotIdempotent => "not_idempotent",
            Self::BodyTooLarge => "body_too_large",
            Self::Attempts => "attempts",
            Self::Deadline => "deadline",
            Self::NoCandidate => "no_candidate",
            Self::Budget => "budget",
            Self::Busy => "busy",
            Self::Replay => "replay",
        }
    }
}
