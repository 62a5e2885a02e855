//! A request as plain borrowed values, and the time at which it is looked at.

use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderMap, Method, header};

/// Bodies up to this many bytes can be sent again; it is Pingora's buffer.
pub const REPLAYABLE_BODY: u64 = 64 << 10;

/// A moment of the process's monotonic clock: the time since it started. A value, so that a decision
/// can be made for any moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Moment(pub Duration);

impl Moment {
    /// From here on, `by` later.
    pub fn after(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by))
    }

    /// The time from `earlier` to here; zero if it is later.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Whole milliseconds, for atomics.
    pub fn millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

/// What a decision may know of a request.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The address of the connection's other end.
    pub peer: IpAddr,
    /// The method.
    pub method: &'a Method,
    /// The authority as the client sent it, with its port if it has one.
    pub host: &'a str,
    /// The path as the client sent it, without the query.
    pub path: &'a str,
    /// The headers as the client sent them.
    pub headers: &'a HeaderMap,
    /// The request has a body, or may have one.
    pub has_body: bool,
}

impl Facts<'_> {
    /// Methods whose repetition does no harm (RFC 9110, section 9.2.2).
    pub fn is_idempotent(&self) -> bool {
        matches!(*self.method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
    }

    /// Exchanges that are silent by nature: upgrades, event streams, and uploads that are large or of
    /// unknown length. They get `timeouts.idle` in place of `first_byte`.
    pub fn is_patient(&self) -> bool {
        // Pingora passes no other upgrade on, so no other makes a tunnel.
        let websocket = |v: &header::HeaderValue| v.as_bytes().eq_ignore_ascii_case(b"websocket");
        if self.headers.get_all(header::UPGRADE).iter().any(websocket) {
            return true;
        }
        let events = |v: &header::HeaderValue| v.as_bytes().windows(17).any(|w| w.eq_ignore_ascii_case(b"text/event-stream"));
        if self.headers.get_all(header::ACCEPT).iter().any(events) {
            return true;
        }
        self.has_body
            && match self.headers.get(header::CONTENT_LENGTH) {
                Some(length) => length.to_str().ok().and_then(|l| l.parse::<u64>().ok()).is_none_or(|l| l > REPLAYABLE_BODY),
                None => true,
            }
    }
}

/// A host without its port and trailing dot. Case is kept; compare without it.
pub fn host_name(authority: &str) -> &str {
    let host = if authority.starts_with('[') {
        authority.split_inclusive(']').next().unwrap_or(authority)
    } else {
        authority.split(':').next().unwrap_or(authority)
    };
    host.strip_suffix('.').unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_lose_their_port() {
        for (authority, host) in [
            ("a.com", "a.com"),
            ("a.com:80", "a.com"),
            ("a.com.:80", "a.com"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("", ""),
        ] {
            assert_eq!(host_name(authority), host);
        }
    }

    #[test]
    fn patience() {
        let case = |method: Method, headers: &[(&'static str, &str)], has_body: bool| {
            let headers = headers
                .iter()
                .map(|(k, v)| (header::HeaderName::from_static(k), v.parse().unwrap_or(header::HeaderValue::from_static(""))))
                .collect();
            Facts { peer: IpAddr::from([127, 0, 0, 1]), method: &method, host: "", path: "/", headers: &headers, has_body }
                .is_patient()
        };
        assert!(!case(Method::GET, &[], false));
        assert!(case(Method::GET, &[("upgrade", "WebSocket")], false));
        assert!(!case(Method::GET, &[("upgrade", "h2c")], false));
        assert!(case(Method::GET, &[("accept", "text/html, Text/Event-Stream")], false));
        assert!(!case(Method::POST, &[("content-length", "65536")], true));
        assert!(case(Method::POST, &[("content-length", "65537")], true));
        assert!(case(Method::POST, &[("transfer-encoding", "chunked")], true));
    }
}
