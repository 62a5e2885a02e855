//! What a client's connection may carry: how a request has to look before anybody reads it, how long its parts may
//! take, and how much else may come beside it.
//!
//! HTTP/1 is read here once before the engine reads it, and strictly: what two readers could understand in two ways
//! passes neither of them (RFC 9112, section 11.2). HTTP/2 frames are only counted.

mod chunks;
mod fault;
mod frames;
mod gate;
mod head;
mod hpack;
mod patience;

use std::time::Duration;

use crate::config;
use crate::config::units::Size;

pub use fault::{Fault, Kind};
pub use frames::{Code, Frames, Sent, Wrong};
pub use gate::{Gate, Part};
pub use head::faulty;
pub use patience::Patience;

/// The rules for connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// How long the head of a request may take, from its first byte to its last.
    pub header_timeout: Duration,
    /// Bytes of a request's header lines together, and of the trailers after a chunked body.
    pub header_bytes: usize,
    /// Header lines of a request.
    pub headers: usize,
    /// Bytes of the line with method, target and version.
    pub target_bytes: usize,
    /// How long a connection may wait for its next request.
    pub keepalive: Duration,
    /// Requests that it may bring over HTTP/1, one after the other.
    pub requests: u32,
    /// Bytes per second that a body has to come with at least.
    pub receive_rate: Option<u32>,
    /// Bytes per second that a client has to take at least.
    pub send_rate: Option<u32>,
    /// HTTP/2 streams at once.
    pub streams: u32,
    /// HTTP/2 frames beside requests and their bodies that may come at once.
    pub control_frames: u32,
}

impl From<&config::Connections> for Policy {
    fn from(typed: &config::Connections) -> Self {
        // Exhaustive, so that a new key must be handled here.
        let config::Connections {
            header_timeout,
            max_header_bytes,
            max_headers,
            max_target,
            keepalive,
            max_requests,
            min_receive_rate,
            min_send_rate,
            max_streams,
            max_control_frames,
        } = typed;
        let bytes = |size: &Size| usize::try_from(size.0).unwrap_or(usize::MAX);
        let rate = |size: &Size| u32::try_from(size.0).ok().filter(|rate| *rate > 0);
        Self {
            header_timeout: header_timeout.0,
            header_bytes: bytes(max_header_bytes),
            headers: usize::try_from(*max_headers).unwrap_or(usize::MAX),
            target_bytes: bytes(max_target),
            keepalive: keepalive.0,
            requests: *max_requests,
            receive_rate: rate(min_receive_rate),
            send_rate: rate(min_send_rate),
            streams: *max_streams,
            control_frames: *max_control_frames,
        }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::from(&config::Connections::default())
    }
}
