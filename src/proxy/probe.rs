//! One question to one endpoint, over the same protocol and TLS as traffic, on a connection of its own.

use bytes::{BufMut, Bytes, BytesMut};
use http::header;
use pingora::connectors::TransportConnector;
use pingora::connectors::http::Connector;
use pingora::http::RequestHeader;
use pingora::protocols::http::client::HttpSession;
use pingora::upstreams::peer::HttpPeer;

use super::peer::{Prepared, own_pool, plain};
use crate::config::{CheckKind, CheckMethod, HealthCheck};
use crate::regions::Upstream;
use crate::regions::endpoint::Endpoint;

/// Of a body that is searched, no more than this is read.
const BODY: usize = 64 << 10;
const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// Asks endpoints how they are.
pub struct Prober {
    http: Connector,
    transport: TransportConnector,
    prepared: Prepared,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Prober")
    }
}

impl Default for Prober {
    fn default() -> Self {
        Self { http: Connector::new(None), transport: TransportConnector::new(None), prepared: Prepared::default() }
    }
}

impl Prober {
    /// Asks once; what it says in words, good or bad. The caller bounds the time.
    pub async fn ask(&self, check: &HealthCheck, upstream: &Upstream, endpoint: &Endpoint) -> Result<String, String> {
        let mut peer = plain(upstream, endpoint, &self.prepared).map_err(told)?;
        // An old connection may live on where a new one is refused.
        peer.group_key = own_pool();
        let timeout = Some(check.timeout.0);
        peer.options.connection_timeout = timeout;
        peer.options.total_connection_timeout = timeout;
        peer.options.read_timeout = timeout;
        peer.options.write_timeout = timeout;
        // With room for more than one stream Pingora would keep the connection for others, for ever.
        peer.options.max_h2_streams = 1;
        match check.kind {
            CheckKind::Tcp => self.transport.get_stream(&*peer).await.map(|_| "connected".to_owned()).map_err(told),
            CheckKind::Http => self.http(check, upstream, &peer).await,
            CheckKind::Grpc => {
                peer.options.set_http_version(2, 2);
                self.grpc(check, upstream, &peer).await
            }
        }
    }

    async fn http(&self, check: &HealthCheck, upstream: &Upstream, peer: &HttpPeer) -> Result<String, String> {
        let method = match check.method {
            CheckMethod::Get => "GET",
            CheckMethod::Head => "HEAD",
            CheckMethod::Options => "OPTIONS",
        };
        let request = request(method, &check.path, check, upstream)?;
        let (mut session, _) = self.http.get_http_session(peer).await.map_err(told)?;
        session.write_request_header(Box::new(request)).await.map_err(told)?;
        session.finish_request_body().await.map_err(told)?;
        let status = status(&mut session).await?;
        if !check.statuses.iter().any(|s| s.contains(status)) {
            return Err(format!("status {status}"));
        }
        if let Some(text) = &check.body {
            let body = body(&mut session).await?;
            if !body.windows(text.len().max(1)).any(|w| w == text.as_bytes()) {
                return Err(format!("status {status}, but the body lacks the text"));
            }
        }
        session.shutdown().await;
        Ok(format!("status {status}"))
    }

    /// The protocol of grpc.health.v1: a message with one field each way.
    async fn grpc(&self, check: &HealthCheck, upstream: &Upstream, peer: &HttpPeer) -> Result<String, String> {
        let mut request = request("POST", HEALTH, check, upstream)?;
        request.insert_header(header::CONTENT_TYPE, "application/grpc").map_err(told)?;
        request.insert_header(header::TE, "trailers").map_err(told)?;
        let (mut session, _) = self.http.get_http_session(peer).await.map_err(told)?;
        session.write_request_header(Box::new(request)).await.map_err(told)?;
        session.write_request_body(message(&check.service), true).await.map_err(told)?;
        session.finish_request_body().await.map_err(told)?;
        let status = status(&mut session).await?;
        if status != 200 {
            return Err(format!("status {status}"));
        }
        let code = session.response_header().and_then(|r| r.headers.get("grpc-status")).and_then(|v| v.to_str().ok());
        if let Some(code) = code.filter(|code| *code != "0") {
            return Err(format!("grpc-status {code}"));
        }
        match serving(&body(&mut session).await?) {
            Some(1) => Ok("SERVING".to_owned()),
            Some(2) => Err("NOT_SERVING".to_owned()),
            Some(3) => Err("SERVICE_UNKNOWN".to_owned()),
            _ => Err("the answer is no HealthCheckResponse".to_owned()),
        }
    }
}

/// The request, with `Host` as traffic would have it.
fn request(method: &str, path: &str, check: &HealthCheck, upstream: &Upstream) -> Result<RequestHeader, String> {
    let mut request = RequestHeader::build(method, path.as_bytes(), Some(8)).map_err(told)?;
    let url = &upstream.url;
    let host = match (&check.host, &upstream.host) {
        (Some(host), _) => host.0.clone(),
        (None, Some(host)) => host.to_str().unwrap_or_default().to_owned(),
        (None, None) if url.socket().is_some() => "localhost".to_owned(),
        (None, None) => url.to_string().split_once("://").map(|(_, authority)| authority.to_owned()).unwrap_or_default(),
    };
    request.insert_header(header::HOST, host).map_err(told)?;
    request
        .insert_header(header::USER_AGENT, concat!("portolan/", env!("CARGO_PKG_VERSION"), " (health check)"))
        .map_err(told)?;
    for (name, value) in &check.headers.0 {
        request.insert_header(name.0.clone(), value.as_str()).map_err(told)?;
    }
    Ok(request)
}

async fn status(session: &mut HttpSession) -> Result<u16, String> {
    loop {
        session.read_response_header().await.map_err(told)?;
        let status = session.response_header().map_or(0, |r| r.status.as_u16());
        // Interim responses (RFC 9110, section 15.2); HTTP/2 sessions do not show theirs.
        if status == 101 || !(100..200).contains(&status) {
            return Ok(status);
        }
    }
}

async fn body(session: &mut HttpSession) -> Result<BytesMut, String> {
    let mut body = BytesMut::new();
    while body.len() < BODY
        && let Some(chunk) = session.read_response_body().await.map_err(told)?
    {
        body.extend_from_slice(&chunk);
    }
    body.truncate(BODY);
    Ok(body)
}

/// HealthCheckRequest { string service = 1; } behind gRPC's prefix: not compressed, length.
fn message(service: &str) -> Bytes {
    let mut inner = BytesMut::new();
    if !service.is_empty() {
        inner.put_u8(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            inner.put_u8(length as u8 | 0x80);
            length >>= 7;
        }
        inner.put_u8(length as u8);
        inner.put_slice(service.as_bytes());
    }
    let mut message = BytesMut::new();
    message.put_u8(0);
    message.put_u32(u32::try_from(inner.len()).unwrap_or(u32::MAX));
    message.put_slice(&inner);
    message.freeze()
}

/// HealthCheckResponse { ServingStatus status = 1; }; 0 is the default and is not sent.
fn serving(message: &[u8]) -> Option<u8> {
    match message {
        [0, 0, 0, 0, 0] => Some(0),
        [0, 0, 0, 0, 2, 0x08, status, ..] => Some(*status),
        _ => None,
    }
}

/// The words of an error, without its chain of sources' types.
#[expect(clippy::boxed_local, reason = "Pingora's errors are boxed")]
fn told(error: pingora::BError) -> String {
    match &error.cause {
        Some(cause) => format!("{}: {cause}", error.etype().as_str()),
        None => error.etype().as_str().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_messages() {
        assert_eq!(*message(""), [0, 0, 0, 0, 0]);
        assert_eq!(*message("a.B"), [0, 0, 0, 0, 5, 0x0a, 3, b'a', b'.', b'B']);
        let long = message(&"x".repeat(300));
        assert_eq!((long.len(), long[4], &long[5..8]), (5 + 3 + 300, 47, &[0x0a, 0xac, 2][..]));
        assert_eq!(serving(&[0, 0, 0, 0, 2, 8, 1]), Some(1));
        assert_eq!(serving(&[0, 0, 0, 0, 2, 8, 2]), Some(2));
        for bad in [&[][..], &[1, 0, 0, 0, 2, 8, 1], &[0, 0, 0, 0, 2, 8], b"HTTP/1.1"] {
            assert_eq!(serving(bad), None);
        }
    }
}
