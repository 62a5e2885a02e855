//! What a client's connection may carry.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{Size, Span};

/// What clients' connections are held to. A change is for connections that are made from then on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Connections {
    /// How long the head of a request may take, from its first byte to its last (408).
    pub header_timeout: Span,
    /// How long all headers of a request may be together (431), and all trailers.
    pub max_header_bytes: Size,
    /// How many headers a request may have (431).
    #[schemars(range(min = 1, max = 200))]
    pub max_headers: u32,
    /// How long the target of a request may be (414).
    pub max_target: Size,
    /// How long a connection may wait for its next request.
    pub keepalive: Span,
    /// How many requests a connection may bring over HTTP/1, one after the other.
    #[schemars(range(min = 1))]
    pub max_requests: u32,
    /// So much of a body has to come per second over HTTP/1, on an average in which a pause of up to a minute has its place (408). `0B`: any.
    pub min_receive_rate: Size,
    /// So much has to be taken per second by a client, on the same average. `0B`: any.
    pub min_send_rate: Size,
    /// How many HTTP/2 streams may be open at once. A change needs a restart.
    #[schemars(range(min = 1))]
    pub max_streams: u32,
    /// How many HTTP/2 frames that ask for nothing (resets, pings, settings, empty ones) may come at once; ten more may every second, and one more for every KiB that is
    /// sent.
    #[schemars(range(min = 10))]
    pub max_control_frames: u32,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            header_timeout: Span(Duration::from_secs(10)),
            max_header_bytes: Size(32 << 10),
            max_headers: 100,
            max_target: Size(16 << 10),
            keepalive: Span(Duration::from_secs(60)),
            max_requests: 10_000,
            min_receive_rate: Size(240),
            min_send_rate: Size(240),
            max_streams: 128,
            max_control_frames: 1_000,
        }
    }
}
