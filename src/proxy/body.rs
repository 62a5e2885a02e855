//! Bodies that rules want to see: short ones are read before an upstream is chosen, the others are held back
//! until enough of them is there.

use std::time::Duration;

use bytes::Bytes;
use http::{Version, header};
use pingora::proxy::Session;
use pingora::{Error, ErrorType, Result};

use super::edge::Context;
use super::facts::{Given, facts};
use crate::decide::inspect;
use crate::request::{Body, REPLAYABLE_BODY, Seen};

/// A body that is looked at on its way to the upstream.
#[derive(Debug, Default)]
pub enum Inspection {
    /// Nobody asks for it.
    #[default]
    None,
    /// What came so far; the upstream has got none of it.
    Holding(Vec<u8>),
    /// It may pass.
    Passed,
}

/// The length that the client announced.
fn announced(session: &Session) -> Option<u64> {
    session.req_header().headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads the whole body, if it is short enough for that; Pingora keeps it for the upstream and for another
/// attempt. A longer one would be lost there, so it has to be looked at on its way.
pub async fn read(session: &mut Session, limit: usize, patience: Duration) -> Result<Option<Bytes>> {
    if announced(session).is_none_or(|length| length > REPLAYABLE_BODY.min(limit as u64)) {
        return Ok(None);
    }
    let expects = session.req_header().headers.get(header::EXPECT);
    // HTTP/1.0 knows no interim responses (RFC 9110, section 10.1.1).
    let knows = session.req_header().version >= Version::HTTP_11;
    if knows && expects.is_some_and(|e| e.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        session.as_downstream_mut().write_continue_response().await?;
    }
    let downstream = session.as_downstream_mut();
    downstream.enable_retry_buffering();
    let read = async {
        while downstream.read_request_body().await?.is_some() {}
        Ok(())
    };
    match tokio::time::timeout(patience, read).await {
        Ok(result) => result.map_err(|e: Box<Error>| e.into_down())?,
        Err(_) => return Err(Error::new(ErrorType::ReadTimedout).into_down()),
    }
    Ok(Some(session.as_downstream().get_retry_buffer().unwrap_or_default()))
}

/// A chunk of the body on its way: held back while more is needed, then judged, and let go as a whole.
pub fn pass(session: &Session, chunk: &mut Option<Bytes>, end: bool, ctx: &mut Context) -> Result<()> {
    let Inspection::Holding(held) = &mut ctx.inspection else { return Ok(()) };
    held.extend_from_slice(&chunk.take().unwrap_or_default());
    let limit = ctx.live.snapshot.waf.body_limit;
    if !end && held.len() < limit {
        // `None` would be the end.
        *chunk = Some(Bytes::new());
        return Ok(());
    }
    let held = std::mem::take(held);
    ctx.inspection = Inspection::Passed;
    let seen = held.get(..limit).unwrap_or(&held);
    let size = announced(session).unwrap_or(held.len() as u64);
    let body = Body { bytes: seen, truncated: !end || seen.len() < held.len(), size };
    let given =
        Given { has_body: true, body: Seen::Read(body), request_id: ctx.request_id.to_str().unwrap_or("-"), chance: ctx.chance };
    let facts = facts(session, given);
    let Some(decision) = &mut ctx.decision else { return Ok(()) };
    if let Some(refusal) = inspect(&ctx.live.snapshot, &facts, decision, ctx.started) {
        ctx.stopped = Some(refusal);
        return Err(Error::new(ErrorType::HTTPStatus(refusal.status())));
    }
    *chunk = if end && held.is_empty() { None } else { Some(Bytes::from(held)) };
    Ok(())
}
