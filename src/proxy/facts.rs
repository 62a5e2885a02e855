//! Pingora's session as the plain values that decisions read.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{SystemTime, UNIX_EPOCH};

use http::header;
use pingora::proxy::Session;

use super::stream;
use crate::request::{Facts, Seen};
use crate::snapshot::Snapshot;

/// What is known of a request beside its header.
#[derive(Debug, Clone, Copy)]
pub struct Given<'a> {
    /// It has a body, or may have one.
    pub has_body: bool,
    /// The body, as far as it was read.
    pub body: Seen<'a>,
    /// The name it gets, unless a trusted proxy gave it one.
    pub request_id: &'a str,
    /// A random number, the request's own.
    pub chance: u64,
}

/// Did the request come by a connection that is for other names (RFC 9110, section 7.4)?
pub fn misdirected(session: &Session, snapshot: &Snapshot) -> bool {
    let Some(secured) = stream::secured(session) else { return false };
    let tls = snapshot.listeners.get(secured.listener).and_then(|listener| listener.tls.as_ref());
    tls.is_some_and(|tls| !tls.certificates.may_serve(secured.name.as_deref(), host(session)))
}

/// The facts of a request. An address that the socket does not tell is 0.0.0.0, which nobody trusts.
pub fn facts<'a>(session: &'a Session, given: Given<'a>) -> Facts<'a> {
    let Given { has_body, body, request_id, chance } = given;
    let request = session.req_header();
    let secured = stream::secured(session);
    Facts {
        peer: peer(session),
        method: &request.method,
        host: host(session),
        path: request.uri.path(),
        query: request.uri.query(),
        version: request.version,
        tls: secured.is_some(),
        certified: secured.is_some_and(|secured| !secured.client.is_empty()),
        // Whoever decides first asks for it, and then it is over.
        misdirected: false,
        fault: None,
        headers: &request.headers,
        has_body,
        body,
        request_id,
        time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        chance,
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
