//! Answers of our own.

use bytes::Bytes;
use http::{HeaderValue, header};
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora::proxy::Session;

use super::edge::{Context, REQUEST_ID};
use crate::respond::Refusal;
use crate::request::is_request_id;

/// Sends an answer of ours.
pub async fn answer(session: &mut Session, ctx: &mut Context, refusal: Refusal) -> Result<()> {
    ctx.refusal = Some(refusal);
    let body = refusal.body();
    let mut response = ResponseHeader::build(refusal.status(), Some(8))?;
    response.insert_header(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"))?;
    response.insert_header(header::CONTENT_LENGTH, body.len())?;
    response.insert_header(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))?;
    response.insert_header("Proxy-Status", refusal.proxy_status(ctx.region().and_then(|r| r.to_str().ok())))?;
    response.insert_header(REQUEST_ID, &ctx.request_id)?;
    if let Some(seconds) = refusal.retry_after() {
        response.insert_header("Retry-After", seconds)?;
    }
    let head = session.req_header().method == http::Method::HEAD;
    session.write_response_header(Box::new(response), head).await?;
    if !head {
        session.write_response_body(Some(Bytes::from_static(body.as_bytes())), true).await?;
    }
    Ok(())
}

/// A trusted proxy's request id is kept; anybody else gets a new one of 128 random bits.
pub fn request_id(session: &Session, trusted_peer: bool) -> HeaderValue {
    let given = session.req_header().headers.get(REQUEST_ID).filter(|id| trusted_peer && is_request_id(id.as_bytes()));
    if let Some(id) = given {
        return id.clone();
    }
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut random = fastrand::u128(..);
    let id: [u8; 32] = std::array::from_fn(|_| {
        let digit = DIGITS.get((random & 15) as usize).copied().unwrap_or(b'0');
        random >>= 4;
        digit
    });
    HeaderValue::from_bytes(&id).unwrap_or(HeaderValue::from_static("-"))
}
