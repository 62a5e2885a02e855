//! Attempts as Pingora's peers, and Pingora's errors as failures.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use pingora::protocols::tls::CaType;
use pingora::upstreams::peer::HttpPeer;
use pingora::utils::tls::{WrappedX509, parse_x509};
use pingora::{Error, ErrorType};

use super::patient::{HeaderDeadline, PatientConnect};
use crate::config::units::Scheme;
use crate::regions::Upstream;
use crate::upstream::{Attempt, Failure};

/// How long a connection to an upstream may idle in the pool. Node's and uvicorn's servers close after
/// 5 s; staying under that keeps requests from meeting a connection that is just being closed.
const POOL_IDLE: Duration = Duration::from_secs(4);
/// Streams on one HTTP/2 connection; RFC 9113 (section 6.5.2) recommends that servers allow at least this.
const H2_STREAMS: usize = 100;

/// Authorities that are kept parsed.
const AUTHORITIES: usize = 256;

/// Pool keys of connections that are not shared; each is used once.
static PATIENT: AtomicU64 = AtomicU64::new(1 << 63);

/// Certificate authorities in Pingora's form, by pool key: parsed once, not for every connection.
#[derive(Debug, Default)]
pub struct Authorities(RwLock<HashMap<u64, Arc<CaType>>>);

impl Authorities {
    fn of(&self, pool: u64, der: &[Vec<u8>]) -> Arc<CaType> {
        if let Some(known) = self.0.read().get(&pool) {
            return known.clone();
        }
        // The configuration was refused if one of these did not parse (see `reload::resources`).
        let parsed: Arc<CaType> = der.iter().map(|raw| WrappedX509::new(raw.clone(), parse_x509)).collect();
        let mut known = self.0.write();
        if known.len() >= AUTHORITIES {
            // Those of files that were replaced since; the ones in use are parsed again.
            known.clear();
        }
        known.insert(pool, parsed.clone());
        parsed
    }
}

/// The peer for an attempt. `deadline` is for the header of an exchange that is silent by nature: it speaks
/// HTTP/1.1, as event streams and upgrades do, on a connection of its own.
pub fn peer(
    attempt: &Attempt,
    upstream: &Upstream,
    address: SocketAddr,
    authorities: &Authorities,
    deadline: Option<Arc<HeaderDeadline>>,
) -> Box<HttpPeer> {
    let sni = upstream.tls.as_ref().map(|t| t.sni.clone()).unwrap_or_default();
    let mut peer = Box::new(HttpPeer::new(address, upstream.tls.is_some(), sni));
    // Pingora keeps connections apart by address and name, but not by what they were verified with.
    peer.group_key = upstream.pool;
    let options = &mut peer.options;
    options.connection_timeout = Some(attempt.connect);
    options.total_connection_timeout = Some(attempt.connect);
    options.read_timeout = Some(attempt.silence);
    options.write_timeout = Some(attempt.silence);
    options.idle_timeout = Some(POOL_IDLE);
    options.max_h2_streams = H2_STREAMS;
    match (upstream.url.scheme, deadline) {
        (Scheme::Http | Scheme::Https, Some(deadline)) => {
            options.custom_l4 = Some(Arc::new(PatientConnect(deadline)));
            // No connection of the pool is taken, and none is given to it.
            peer.group_key = PATIENT.fetch_add(1, Ordering::Relaxed);
            options.idle_timeout = Some(Duration::ZERO);
        }
        (Scheme::Http, None) => {}
        (Scheme::Https, None) => options.set_http_version(2, 1),
        (Scheme::H2c, _) => options.set_http_version(2, 2),
    }
    if let Some(der) = upstream.tls.as_ref().and_then(|t| t.authorities.as_deref()) {
        options.ca = Some(authorities.of(upstream.pool, der));
    }
    peer
}

/// What kept a connection from being made.
pub fn connect_failure(error: &Error) -> Failure {
    match error.etype() {
        ErrorType::ConnectTimedout | ErrorType::TLSHandshakeTimedout => Failure::ConnectTimeout,
        ErrorType::ConnectRefused => Failure::ConnectRefused,
        ErrorType::TLSHandshakeFailure | ErrorType::InvalidCert | ErrorType::HandshakeError | ErrorType::TLSWantX509Lookup => {
            Failure::Tls
        }
        _ => Failure::ConnectFailed,
    }
}

/// What went wrong on a connection before a response.
pub fn exchange_failure(error: &Error) -> Failure {
    match error.etype() {
        ErrorType::ReadTimedout | ErrorType::WriteTimedout => Failure::FirstByteTimeout,
        ErrorType::InvalidHTTPHeader | ErrorType::InvalidH2 => Failure::Invalid,
        _ => Failure::Closed,
    }
}
