//! Attempts as Pingora's peers, and Pingora's errors as failures.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::RwLock;
use pingora::protocols::tls::CaType;
use pingora::upstreams::peer::HttpPeer;
use pingora::utils::tls::{CertKey, WrappedX509, parse_x509};
use pingora::{Error, ErrorType, Result};

use super::files::FilesConnect;
use super::introduced::ourselves;
use super::patient::{HeaderDeadline, IntroducingConnect, PatientConnect};
use crate::config::units::Scheme;
use crate::regions::endpoint::{Address, Endpoint};
use crate::regions::{Tls, Upstream};
use crate::upstream::{Attempt, Failure};

/// How long a connection to an upstream may idle in the pool. Node's and uvicorn's servers close after
/// 5 s; staying under that keeps requests from meeting a connection that is just being closed.
const POOL_IDLE: Duration = Duration::from_secs(4);
/// Streams on one HTTP/2 connection; RFC 9113 (section 6.5.2) recommends that servers allow at least this.
const H2_STREAMS: usize = 100;

/// TLS policies that are kept parsed.
const POLICIES: usize = 256;

/// Pool keys of connections that are not shared; each is used once.
static OWN: AtomicU64 = AtomicU64::new(1 << 63);

/// A pool key that no other connection has.
pub fn own_pool() -> u64 {
    OWN.fetch_add(1, Ordering::Relaxed)
}

/// Certificates in Pingora's form, by pool key: parsed once, not for every connection.
#[derive(Default)]
pub struct Prepared(RwLock<HashMap<u64, Policy>>);

#[derive(Clone)]
struct Policy {
    authorities: Option<Arc<CaType>>,
    identity: Option<Arc<CertKey>>,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Prepared")
    }
}

impl Prepared {
    fn of(&self, pool: u64, tls: &Tls) -> Policy {
        if let Some(known) = self.0.read().get(&pool) {
            return known.clone();
        }
        // The configuration was refused if one of these did not parse (see `reload`).
        let parsed = |der: &[Vec<u8>]| der.iter().map(|raw| WrappedX509::new(raw.clone(), parse_x509)).collect::<Arc<CaType>>();
        let policy = Policy {
            authorities: tls.authorities.as_deref().map(parsed),
            identity: tls.identity.as_ref().map(|own| Arc::new(CertKey::new(own.chain.clone(), own.key.clone()))),
        };
        let mut known = self.0.write();
        if known.len() >= POLICIES {
            // Those of files that were replaced since; the ones in use are parsed again.
            known.clear();
        }
        known.insert(pool, policy.clone());
        policy
    }
}

/// Can these be shown to an upstream? Pingora panics at certificates that it cannot parse.
pub fn check_identity(chain: &[Vec<u8>], key: &[u8]) -> std::result::Result<(), String> {
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.to_vec())?;
    let chain = chain.iter().map(|der| der.clone().into()).collect();
    rustls::sign::CertifiedKey::from_der(chain, key, &rustls::crypto::ring::default_provider())
        .map(drop)
        .map_err(|error| format!("certificate and key cannot be used together: {error}"))
}

/// The peer for an attempt. `deadline` is for the header of an exchange that is silent by nature: it speaks
/// HTTP/1.1, as event streams and upgrades do, on a connection of its own.
pub fn peer(
    attempt: &Attempt,
    upstream: &Upstream,
    endpoint: &Endpoint,
    prepared: &Prepared,
    deadline: Option<Arc<HeaderDeadline>>,
    introduction: Option<Bytes>,
) -> Result<Box<HttpPeer>> {
    let mut peer = plain(upstream, endpoint, prepared)?;
    let options = &mut peer.options;
    options.connection_timeout = Some(attempt.connect);
    options.total_connection_timeout = Some(attempt.connect);
    options.read_timeout = Some(attempt.silence);
    options.write_timeout = Some(attempt.silence);
    if upstream.files.is_none() {
        options.idle_timeout = Some(POOL_IDLE);
    }
    if attempt.fresh {
        // Under a key of its own there is none in the pool, and this one is not kept.
        options.idle_timeout = Some(Duration::ZERO);
        peer.group_key = own_pool();
    }
    if let Some(introduction) = &introduction {
        // Whoever has another one has another connection.
        // (Keyed: nobody can make one that hashes as another's does.)
        static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        peer.group_key ^= KEY.hash_one(introduction);
        peer.options.custom_l4 = Some(Arc::new(IntroducingConnect(introduction.clone())));
    }
    let options = &mut peer.options;
    if let (Scheme::Http | Scheme::Https, Some(deadline)) = (upstream.url.scheme, deadline) {
        options.set_http_version(1, 1);
        options.custom_l4 = Some(Arc::new(PatientConnect { deadline, introduction }));
        // No connection of the pool is taken, and none is given to it.
        options.idle_timeout = Some(Duration::ZERO);
        peer.group_key = own_pool();
    }
    Ok(peer)
}

/// How an endpoint is connected to and verified, without any patience yet.
pub fn plain(upstream: &Upstream, endpoint: &Endpoint, prepared: &Prepared) -> Result<Box<HttpPeer>> {
    if let Some(files) = &upstream.files {
        // Nothing is connected to: the address is nobody's.
        let mut peer = Box::new(HttpPeer::new(std::net::SocketAddr::from(([127, 0, 0, 1], 1)), false, String::new()));
        peer.options.custom_l4 = Some(Arc::new(FilesConnect(files.clone())));
        peer.options.idle_timeout = Some(Duration::ZERO);
        peer.group_key = own_pool();
        return Ok(peer);
    }
    let sni = upstream.tls.as_ref().map(|t| t.sni.clone()).unwrap_or_default();
    let mut peer = Box::new(match &endpoint.address {
        Address::Inet(address) => HttpPeer::new(*address, upstream.tls.is_some(), sni),
        Address::Unix(path) => HttpPeer::new_uds(path, upstream.tls.is_some(), sni)?,
    });
    if let Some(version) = upstream.introduces {
        // Who asks for itself, as health checks do.
        peer.options.custom_l4 = Some(Arc::new(IntroducingConnect(Bytes::from_static(ourselves(version)))));
    }
    // Pingora keeps connections apart by address and name, but not by what they were verified with.
    peer.group_key = upstream.pool;
    peer.options.max_h2_streams = H2_STREAMS;
    match upstream.url.scheme {
        Scheme::Http | Scheme::Files => {}
        Scheme::Https => peer.options.set_http_version(2, 1),
        Scheme::H2c => peer.options.set_http_version(2, 2),
    }
    if let Some(tls) = &upstream.tls {
        let Policy { authorities, identity } = prepared.of(upstream.pool, tls);
        peer.options.ca = authorities;
        peer.client_cert_key = identity;
    }
    Ok(peer)
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
