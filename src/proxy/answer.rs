//! Answers of our own.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::proxy::Session;
use serde_json::json;

use super::edge::{Context, REQUEST_ID};
use super::facts::host;
use super::headers;
use crate::cache::status::{Status, Told};
use crate::limits;
use crate::request::{argument, is_request_id};
use crate::respond::Refusal;
use crate::waf::challenge::page::{Page, back, policy};
use crate::waf::{Action, Answer};

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");

/// What the cache did (RFC 9211).
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// What the client gets beside status, `Proxy-Status` and the like.
struct Content {
    kind: HeaderValue,
    body: Bytes,
    more: Vec<(HeaderName, HeaderValue)>,
}

/// Sends an answer of ours.
pub async fn answer(session: &mut Session, ctx: &mut Context, refusal: Refusal) -> Result<()> {
    ctx.refusal = Some(refusal);
    let Content { kind, body, more } = content(session, ctx, refusal);
    // A browser that failed is sent back to where it came from.
    let back = matches!(refusal, Refusal::ChallengeFailed { .. }) && more.iter().any(|(name, _)| *name == header::LOCATION);
    let status = if back { 303 } else { refusal.status() };
    let mut response = ResponseHeader::build(status, Some(8))?;
    // RFC 9110, section 15.3.5: 204 has no content, and says nothing of any.
    if refusal.status() != 204 {
        response.insert_header(header::CONTENT_TYPE, kind)?;
        response.insert_header(header::CONTENT_LENGTH, body.len())?;
    }
    response.insert_header(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))?;
    response.insert_header("Proxy-Status", refusal.proxy_status(ctx.region().and_then(|r| r.to_str().ok())))?;
    response.insert_header(REQUEST_ID, &ctx.request_id)?;
    if let Some(seconds) = refusal.retry_after() {
        response.insert_header("Retry-After", seconds)?;
    }
    for (name, value) in more {
        response.insert_header(name, value)?;
    }
    headers::hsts(session, &mut response, ctx)?;
    if let Some((policy, state)) = ctx.decision.as_ref().and_then(|d| ctx.live.snapshot.limits.headers(&d.limits)) {
        response.insert_header(headers::RATE_LIMIT_POLICY, policy)?;
        response.insert_header(headers::RATE_LIMIT, state)?;
    }
    let empty = body.is_empty() || session.req_header().method == Method::HEAD;
    // Whoever cannot be written to has left.
    session.write_response_header(Box::new(response), empty).await.map_err(|error| error.into_down())?;
    if !empty {
        session.write_response_body(Some(body), true).await.map_err(|error| error.into_down())?;
    }
    drain(session).await;
    Ok(())
}

/// An HTTP/2 stream that is dropped in the middle of an upload is reset, and many clients then show nothing of
/// the answer: what is still coming is read, within bounds. (Over HTTP/1.1 the connection is closed.)
async fn drain(session: &mut Session) {
    const MOST: usize = 1 << 20;
    const PATIENCE: Duration = Duration::from_secs(1);
    let downstream = session.as_downstream_mut();
    if !downstream.is_http2() || downstream.is_body_done() {
        return;
    }
    let read = async {
        let mut left = MOST;
        while let Ok(Some(chunk)) = downstream.read_request_body().await {
            left = left.saturating_sub(chunk.len());
            if left == 0 {
                break;
            }
        }
    };
    // Whether it was all or not, it is over.
    let _ = tokio::time::timeout(PATIENCE, read).await;
}

fn content(session: &Session, ctx: &Context, refusal: Refusal) -> Content {
    let text = || Content { kind: TEXT, body: Bytes::from_static(refusal.body().as_bytes()), more: Vec::new() };
    let own = |answer: Option<&Answer>| match answer.filter(|answer| !answer.body.is_empty()) {
        Some(Answer { content_type, body, .. }) => {
            let kind = HeaderValue::from_str(content_type).unwrap_or(TEXT);
            Content { kind, body: body.clone(), more: Vec::new() }
        }
        None => text(),
    };
    let earned = || ctx.decision.as_ref().and_then(|d| d.header.clone());
    match refusal {
        Refusal::Blocked { rule: Some(rule), .. } => {
            match ctx.live.snapshot.waf.rules.get(usize::from(rule)).map(|r| &r.action) {
                Some(Action::Block(answer)) => own(Some(answer)),
                _ => own(None),
            }
        }
        Refusal::OverLimit { limit, .. } => match ctx.live.snapshot.limits.rules.get(usize::from(limit)).map(|l| &l.action) {
            Some(limits::Action::Block(answer)) => own(Some(answer)),
            _ => own(None),
        },
        Refusal::Challenged { bits, waits } => challenge(session, ctx, refusal, bits, waits),
        Refusal::ChallengePassed { waited } => {
            let mut more: Vec<_> = earned().map(|cookie| (header::SET_COOKIE, cookie)).into_iter().collect();
            if waited {
                more.push((header::LOCATION, came_from(session.req_header())));
            }
            Content { more, ..text() }
        }
        // Whoever comes from the page without JavaScript gets another one.
        Refusal::ChallengeFailed { .. } if is_browser(session.req_header()) => {
            Content { more: vec![(header::LOCATION, came_from(session.req_header()))], ..text() }
        }
        Refusal::ChallengeFailed { wrong } => {
            let body = json!({ "error": "challenge_failed", "reason": wrong.label(), "request_id": ctx.request_id.to_str().unwrap_or("-") });
            Content { kind: JSON, body: format!("{body}\n").into(), more: Vec::new() }
        }
        Refusal::Redirected { .. } => Content { more: earned().map(|to| (header::LOCATION, to)).into_iter().collect(), ..text() },
        Refusal::Proof => {
            Content { body: earned().map(|proof| Bytes::copy_from_slice(proof.as_bytes())).unwrap_or_default(), ..text() }
        }
        Refusal::NotCached => {
            let told = Told {
                status: Status::OnlyIfCached,
                forward_status: None,
                ttl: None,
                stored: false,
                collapsed: false,
                why: None,
            };
            let field = HeaderValue::from_str(&told.field()).ok();
            Content { more: field.map(|field| (CACHE_STATUS, field)).into_iter().collect(), ..text() }
        }
        Refusal::NoRoute
        | Refusal::BadRequest
        | Refusal::Faulty { .. }
        | Refusal::BodyTooLarge
        | Refusal::Misdirected
        | Refusal::RequestTimeout
        | Refusal::AllRegionsUnavailable { .. }
        | Refusal::DeadlineExceeded { .. }
        | Refusal::GivenUp { .. }
        | Refusal::NotRepeated { .. }
        | Refusal::Overloaded
        | Refusal::Shed { .. }
        | Refusal::ReplayRefused { .. }
        | Refusal::LimitUnavailable
        | Refusal::Purged
        | Refusal::PurgeRefused
        | Refusal::Blocked { rule: None, .. }
        | Refusal::Internal => text(),
    }
}

/// A page for browsers, a few words for programs.
fn challenge(session: &Session, ctx: &Context, refusal: Refusal, bits: u8, waits: bool) -> Content {
    let request = session.req_header();
    let token = ctx.decision.as_ref().and_then(|d| d.header.as_ref()).and_then(|t| t.to_str().ok()).unwrap_or_default();
    let request_id = ctx.request_id.to_str().unwrap_or("-");
    // What others call it: monitors of Cloudflare's customers look for this header.
    let mut more = vec![(HeaderName::from_static("cf-mitigated"), HeaderValue::from_static("challenge"))];
    if !is_browser(request) {
        let body = json!({
            "error": "challenge_required",
            "message": refusal.body().trim_end(),
            "request_id": request_id,
        });
        return Content { kind: JSON, body: format!("{body}\n").into(), more };
    }
    let languages: Vec<&str> = request.headers.get_all(header::ACCEPT_LANGUAGE).iter().filter_map(|v| v.to_str().ok()).collect();
    let target = request.uri.path_and_query().map_or("/", |t| t.as_str());
    let nonce = format!("{:032x}", fastrand::u128(..));
    let page = Page {
        languages: &languages,
        host: host(session),
        request_id,
        token,
        bits,
        back: waits.then_some(target),
        nonce: &nonce,
    };
    if let Ok(policy) = HeaderValue::from_str(&policy(&nonce)) {
        more.push((header::CONTENT_SECURITY_POLICY, policy));
    }
    more.push((header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")));
    more.push((header::REFERRER_POLICY, HeaderValue::from_static("same-origin")));
    Content { kind: HTML, body: page.render().into(), more }
}

/// Could it show a page, and come back by itself?
fn is_browser(request: &RequestHeader) -> bool {
    let html = |accept: &HeaderValue| accept.as_bytes().windows(9).any(|w| w.eq_ignore_ascii_case(b"text/html"));
    matches!(request.method, Method::GET | Method::HEAD) && request.headers.get_all(header::ACCEPT).iter().any(html)
}

/// Where somebody who waited came from, as the page's link tells.
fn came_from(request: &RequestHeader) -> HeaderValue {
    let to = argument(request.uri.query(), "to").unwrap_or_default();
    let to = crate::rules::normalise::url_decode(to.as_bytes(), false);
    let to = std::str::from_utf8(&to).map_or("/", back);
    HeaderValue::from_str(to).unwrap_or(HeaderValue::from_static("/"))
}

/// A name for a request: 128 random bits.
pub fn fresh_id() -> HeaderValue {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut random = fastrand::u128(..);
    let id: [u8; 32] = std::array::from_fn(|_| {
        let digit = DIGITS.get((random & 15) as usize).copied().unwrap_or(b'0');
        random >>= 4;
        digit
    });
    HeaderValue::from_bytes(&id).unwrap_or(HeaderValue::from_static("-"))
}

/// The name that a trusted proxy gave.
pub fn given_id(session: &Session, trusted_peer: bool) -> Option<HeaderValue> {
    session.req_header().headers.get(REQUEST_ID).filter(|id| trusted_peer && is_request_id(id.as_bytes())).cloned()
}
