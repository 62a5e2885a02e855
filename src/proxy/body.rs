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
use crate::request::{Body, REPLAYABLE_BODY, Seen, announced};
use crate::respond::Refusal;

/// A body that is looked at on its way to the upstream.
#[derive(Debug, Default)]
pub enum Inspection {
    /// Nobody asks for it.
    #[default]
    None,
    /// What came so far and the upstream has not got. `calls`: message by message, for a call may wait for an
    /// answer before it goes on.
    Holding { held: Vec<u8>, calls: bool },
    /// It may pass.
    Passed,
}

/// Reads the whole body, if it is short enough for that; Pingora keeps it for the upstream and for another
/// attempt. A longer one would be lost there, so it has to be looked at on its way.
pub async fn read(session: &mut Session, limit: usize, patience: Duration) -> Result<Option<Bytes>> {
    if announced(&session.req_header().headers).is_none_or(|length| length > REPLAYABLE_BODY.min(limit as u64)) {
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

/// A body whose length nobody knew before has an end, too.
pub fn measure(session: &Session, ctx: &mut Context) -> Result<()> {
    // What goes through a tunnel is no body.
    let most = ctx.route().and_then(|route| route.max_body).filter(|_| !session.as_downstream().was_upgraded());
    if most.is_some_and(|most| session.as_downstream().body_bytes_read() as u64 > most) {
        ctx.stopped = Some(Refusal::BodyTooLarge);
        return Err(Error::new(ErrorType::HTTPStatus(Refusal::BodyTooLarge.status())).into_down());
    }
    Ok(())
}

/// A chunk of the body on its way: held back while more is needed, then judged, and let go as a whole.
pub fn pass(session: &Session, chunk: &mut Option<Bytes>, end: bool, ctx: &mut Context) -> Result<()> {
    let Inspection::Holding { held, calls } = &mut ctx.inspection else { return Ok(()) };
    held.extend_from_slice(&chunk.take().unwrap_or_default());
    let limit = ctx.live.snapshot.waf.body_limit;
    let enough = end || held.len() >= limit;
    let messages = if *calls && !enough { complete(held) } else { 0 };
    if !enough && messages == 0 {
        // `None` would be the end.
        *chunk = Some(Bytes::new());
        return Ok(());
    }
    let held = if enough { std::mem::take(held) } else { held.drain(..messages).collect() };
    if enough {
        ctx.inspection = Inspection::Passed;
    }
    let seen = held.get(..limit).unwrap_or(&held);
    let size = announced(&session.req_header().headers).unwrap_or(held.len() as u64);
    let body = Body { bytes: seen, truncated: !end || seen.len() < held.len(), size };
    let given =
        Given { has_body: true, body: Seen::Read(body), request_id: ctx.request_id.to_str().unwrap_or("-"), chance: ctx.chance };
    let facts = facts(session, given);
    let Some(decision) = &mut ctx.decision else { return Ok(()) };
    if let Some(refusal) = inspect(&ctx.live.snapshot, &facts, decision, ctx.started) {
        ctx.stopped = Some(refusal);
        // Any other source is an upstream's fault to Pingora, which over HTTP/2 goes on to wait for its answer.
        return Err(Error::new(ErrorType::HTTPStatus(refusal.status())).into_down());
    }
    *chunk = if end && held.is_empty() { None } else { Some(Bytes::from(held)) };
    Ok(())
}

/// How many bytes at the beginning are whole messages of gRPC: a flag, four bytes of length, and so much. What
/// does not look like that is none.
fn complete(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    while let [0 | 1, a, b, c, d, behind @ ..] = rest {
        let length = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).unwrap_or(usize::MAX);
        match behind.get(length..) {
            Some(next) => rest = next,
            None => break,
        }
    }
    bytes.len() - rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages() {
        for (bytes, whole) in [
            (&b""[..], 0),
            (b"\0\0\0\0\x02ab", 7),
            (b"\0\0\0\0\x02a", 0),
            (b"\x01\0\0\0\x01a\0\0\0\0\0\0\0", 11),
            (b"q=1&r=2", 0),
            (b"\0\xff\xff\xff\xff", 0),
        ] {
            assert_eq!(complete(bytes), whole, "{bytes:?}");
        }
    }
}
