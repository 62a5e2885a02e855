//! Pingora's session as the plain values that decisions read.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{SystemTime, UNIX_EPOCH};

use http::header;
use pingora::proxy::Session;

use crate::request::{Body, Facts};

/// The facts of a request. An address that the socket does not tell is 0.0.0.0, which nobody trusts.
pub fn facts<'a>(session: &'a Session, has_body: bool, body: Option<Body<'a>>, request_id: &'a str) -> Facts<'a> {
    let request = session.req_header();
    Facts {
        peer: peer(session),
        method: &request.method,
        host: host(session),
        path: request.uri.path(),
        query: request.uri.query(),
        version: request.version,
        // Listeners with TLS do not exist yet.
        tls: false,
        headers: &request.headers,
        has_body,
        body,
        request_id,
        time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        chance: fastrand::u64(..),
    }
}

/// The address of the connection's other end.
pub fn peer(session: &Session) -> IpAddr {
    let address = session.client_addr().and_then(|a| a.as_inet());
    address.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |a| a.ip())
}

/// The authority: HTTP/2 keeps it in the URI, HTTP/1.1 in `Host`, unless the target is in absolute form.
pub fn host(session: &Session) -> &str {
    let request = session.req_header();
    match request.uri.authority() {
        Some(authority) => authority.as_str(),
        None => request.headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default(),
    }
}

/// The value of a cookie of the client's.
pub fn cookie<'a>(session: &'a Session, name: &str) -> Option<&'a str> {
    let all = session.req_header().headers.get_all(header::COOKIE).iter();
    crate::request::cookie(all, name)
}
