//! A request as plain borrowed values, and the time at which it is looked at.

use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderMap, Method, Version, header};

use crate::connections::Fault;

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
    /// The query as the client sent it, without the `?`.
    pub query: Option<&'a str>,
    /// The version of HTTP.
    pub version: Version,
    /// The client came over TLS.
    pub tls: bool,
    /// And asked for another name there than it does here, one that its connection is not for.
    pub misdirected: bool,
    /// It stands for one that is not served, and for what reason.
    pub fault: Option<Fault>,
    /// And showed a certificate of its own.
    pub certified: bool,
    /// The headers as the client sent them.
    pub headers: &'a HeaderMap,
    /// The request has a body, or may have one.
    pub has_body: bool,
    /// The body, as far as it was read.
    pub body: Seen<'a>,
    /// The name that this request gets, unless a trusted proxy gave it one.
    pub request_id: &'a str,
    /// The time of day, since 1970: cookies carry it, for their readers may be other processes.
    pub time: Duration,
    /// A random number, the request's own. With it everything that follows is settled.
    pub chance: u64,
}

/// What is known of a body.
#[derive(Debug, Clone, Copy)]
pub enum Seen<'a> {
    /// Nobody has asked for it yet.
    Unread,
    /// It is too long to wait for: it is looked at on its way to the upstream.
    Later,
    /// It was read, or there is none.
    Read(Body<'a>),
}

/// A body, as far as it was read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Body<'a> {
    /// Its beginning.
    pub bytes: &'a [u8],
    /// There is more.
    pub truncated: bool,
    /// How long it is as a whole, in bytes; if nobody said so, how much was read.
    pub size: u64,
}

impl Facts<'_> {
    /// Methods whose repetition does no harm (RFC 9110, section 9.2.2).
    pub fn is_idempotent(&self) -> bool {
        matches!(*self.method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
    }

    /// Does the request's method change nothing?
    pub fn is_safe(&self) -> bool {
        is_safe(self.method)
    }

    /// The value of a cookie; the first if there are several.
    pub fn cookie(&self, name: &str) -> Option<&str> {
        cookie(self.headers.get_all(header::COOKIE).iter(), name)
    }

    /// The text of a header; the first if there are several.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
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
        self.has_body && announced(self.headers).is_none_or(|length| length > REPLAYABLE_BODY)
    }
}

/// How long a body is said to be, in bytes.
pub fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Methods that change nothing (RFC 9110, section 9.2.1).
pub fn is_safe(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE)
}

/// The value of the first cookie of this name in the `Cookie` headers `all`.
pub fn cookie<'a>(all: impl Iterator<Item = &'a header::HeaderValue>, name: &str) -> Option<&'a str> {
    let mut pairs = all.filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(n, _)| *n == name).map(|(_, value)| value.trim_matches('"'))
}

/// Is this request id fit to be passed on and logged: 1 to 128 visible ASCII characters?
pub fn is_request_id(value: &[u8]) -> bool {
    (1..=128).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic)
}

/// What a header of preferences (RFC 9110, section 12.5) accepts, the best first, each with its weight in
/// thousandths. `*`, and what weighs nothing, is left out.
pub fn accepted<'h>(all: impl Iterator<Item = &'h str>) -> impl Iterator<Item = (&'h str, u16)> {
    let one = |item: &'h str| {
        let mut parts = item.split(';').map(str::trim);
        let name = parts.next().filter(|n| !n.is_empty() && *n != "*")?;
        let weight = parts.find_map(|p| p.strip_prefix("q=").or_else(|| p.strip_prefix("Q=")));
        let weight = weight.map_or(Some(1.0), |q| q.trim().parse::<f32>().ok()).filter(|q| (0.0..=1.0).contains(q))?;
        Some((name, (weight * 1_000.0) as u16)).filter(|(_, weight)| *weight > 0)
    };
    let mut accepted: Vec<_> = all.flat_map(|v| v.split(',')).filter_map(one).collect();
    accepted.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
    accepted.into_iter()
}

/// The value of an argument of a query, as it was sent; the first if there are several.
pub fn argument<'a>(query: Option<&'a str>, name: &str) -> Option<&'a str> {
    let mut pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs.find(|(n, _)| *n == name).map(|(_, value)| value)
}

/// A hash that is the same in every process: FNV-1a, then mixed.
pub fn hash(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3));
    mix(fnv)
}

/// Spreads every bit over all others (the finalizer of SplitMix64).
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A hash of an address.
pub fn hash_ip(ip: IpAddr) -> u64 {
    match ip {
        IpAddr::V4(ip) => hash(&ip.octets()),
        IpAddr::V6(ip) => hash(&ip.octets()),
    }
}

/// `hash` as a number from 0 to 1, 1 excluded.
pub fn unit(hash: u64) -> f32 {
    (hash >> 40) as f32 / (1u64 << 24) as f32
}

/// Is a header's `name` the same as `known` (both lower case) to servers that take an underscore for a dash?
pub fn same_header(known: &str, name: &str) -> bool {
    known.len() == name.len() && known.bytes().zip(name.bytes()).all(|(k, n)| k == n || (k == b'-' && n == b'_'))
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

    fn facts<'a>(method: &'a Method, headers: &'a HeaderMap, has_body: bool) -> Facts<'a> {
        Facts {
            peer: IpAddr::from([127, 0, 0, 1]),
            method,
            host: "",
            path: "/",
            query: None,
            version: Version::HTTP_11,
            tls: false,
            misdirected: false,
            fault: None,
            certified: false,
            headers,
            has_body,
            body: Seen::Unread,
            request_id: "",
            time: Duration::ZERO,
            chance: 0,
        }
    }

    #[test]
    fn preferences() {
        let all = |header| accepted(std::iter::once(header)).map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(all("da, en-GB;q=0.8, *;q=0.1, en ;q=0.9, xx;q=0"), ["da", "en", "en-GB"]);
        assert_eq!(all("fr;q=nonsense,, de;q=2, it;Q=1"), ["it"]);
    }

    #[test]
    fn request_ids() {
        assert!(is_request_id(b"abc-123"));
        assert!(!is_request_id(b"") && !is_request_id(b"a b") && !is_request_id(&[b'a'; 129]) && !is_request_id(b"\xff"));
    }

    #[test]
    fn cookies() {
        let headers: HeaderMap = [("cookie", "a=1; b=2"), ("cookie", "c=\"x=y\";a=3")]
            .map(|(k, v)| (http::HeaderName::from_static(k), header::HeaderValue::from_static(v)))
            .into_iter()
            .collect();
        let facts = facts(&Method::GET, &headers, false);
        for (name, value) in [("a", Some("1")), ("b", Some("2")), ("c", Some("x=y")), ("d", None), ("", None)] {
            assert_eq!(facts.cookie(name), value, "{name}");
        }
    }

    #[test]
    fn patience() {
        let case = |method: Method, headers: &[(&'static str, &str)], has_body: bool| {
            let headers = headers
                .iter()
                .map(|(k, v)| (header::HeaderName::from_static(k), v.parse().unwrap_or(header::HeaderValue::from_static(""))))
                .collect();
            facts(&method, &headers, has_body).is_patient()
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
