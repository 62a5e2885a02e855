//! What becomes of a request when something breaks: whether it is tried again, and what its client hears.

use bytes::Bytes;
use pingora::proxy::{FailToProxy, Session};
use pingora::{Error, ErrorSource, ErrorType, RetryType};

use super::answer::answer;
use super::edge::Context;
use super::peer::exchange_failure;
use super::tunnel::CLOSE_RESTART;
use super::{caching, clock, stream};
use crate::respond::Refusal;
use crate::routes::Patience;
use crate::upstream::{Failure, Sent, Verdict};

/// The error that ends Pingora's loop of attempts; [`told`] reads the plan for what to say.
pub fn exhausted() -> Box<Error> {
    Error::new(ErrorType::ConnectProxyFailure).into_up()
}

/// What the upstream has of the request already.
pub fn sent(session: &mut Session, reused: bool) -> Sent {
    let downstream = session.as_downstream_mut();
    Sent { body_lost: downstream.retry_buffer_truncated(), reused, body_incomplete: !downstream.is_body_done() }
}

/// An exchange with an upstream broke: decides whether there is another attempt.
pub fn again(session: &mut Session, mut e: Box<Error>, ctx: &mut Context, reused: bool) -> Box<Error> {
    if std::mem::take(&mut ctx.giving_up) {
        return e;
    }
    let now = clock::now();
    // A header that waits to be written is as good as written: there is no way to take it back.
    let waits = session.has_pending_downstream_tasks().then(|| session.cache.maybe_cache_meta());
    let waits = waits.flatten().map(|meta| meta.response_header().status.as_u16());
    let written = session.response_written().map(|r| r.status.as_u16()).filter(|s| *s >= 200 || *s == 101).or(waits);
    // Pingora marks what happens to a connection that was closing while we used it.
    let closing = matches!(e.retry, RetryType::ReusedOnly | RetryType::Decided(true));
    let sent = sent(session, reused && closing);
    let from_upstream = *e.esource() == ErrorSource::Upstream;
    let late = ctx.header_deadline.take().is_some_and(|d| d.is_over());
    let closed = ctx.tunnel.as_ref().is_some_and(|(_, deadline)| deadline.is_closed());
    let again = match (ctx.parts(), from_upstream, written) {
        (Some((backends, _, plan)), true, Some(status)) => {
            // A tunnel or event stream that was silent for `timeouts.idle` simply ends, and so does one whose
            // region is drained.
            let natural = plan.patience == Patience::Idle && *e.etype() == ErrorType::ReadTimedout;
            plan.truncated(backends.regions, status, !natural && !closed, now);
            false
        }
        (Some((backends, _, plan)), true, None) => {
            let failure = if late { Failure::FirstByteTimeout } else { exchange_failure(&e) };
            // An upstream that does not read is slow itself, whatever is left of the client's body.
            let stuck = *e.etype() == ErrorType::WriteTimedout;
            let sent = Sent { body_incomplete: sent.body_incomplete && !stuck, ..sent };
            plan.failed(backends, failure, sent, now) == Verdict::Again
        }
        (_, false, _) | (None, _, _) => false,
    };
    if again {
        caching::give_up(session, ctx);
    }
    e.set_retry(again);
    e
}

/// Tells the client that there will be no response, unless one has begun.
pub async fn told(session: &mut Session, e: &Error, ctx: &mut Context) -> FailToProxy {
    let nothing = |error_code| FailToProxy { error_code, can_reuse_downstream: false };
    if let Some((frames, deadline)) = &ctx.tunnel
        && deadline.is_closed()
        && frames.at_boundary()
    {
        // The region is drained: the client may connect anew, and lands elsewhere (RFC 6455, section 7.4.1).
        let farewell = Bytes::from_static(&CLOSE_RESTART);
        if let Err(error) = session.write_response_body(Some(farewell), true).await {
            tracing::debug!(%error, "a client left before its tunnel was closed");
        }
        session.as_downstream_mut().shutdown().await;
    }
    let written = session.response_written().is_some_and(|r| !r.status.is_informational() || r.status.as_u16() == 101);
    if written || session.has_pending_downstream_tasks() {
        return nothing(0);
    }
    let fault = stream::fault(session, &ctx.live.snapshot.connections);
    let refusal = match e.esource() {
        _ if ctx.stopped.is_some() => ctx.stopped.unwrap_or(Refusal::Internal),
        ErrorSource::Downstream => match (fault, e.etype()) {
            (Some(fault), _) => Refusal::Faulty { fault },
            (None, ErrorType::WriteError | ErrorType::ReadError | ErrorType::ConnectionClosed | ErrorType::WriteTimedout) => {
                return nothing(0);
            }
            (None, ErrorType::ReadTimedout) => Refusal::RequestTimeout,
            (None, _) => Refusal::BadRequest,
        },
        ErrorSource::Upstream | ErrorSource::Internal | ErrorSource::Unset => match ctx.planned() {
            Some(plan) if plan.stopped.is_some() => {
                Refusal::after(plan, plan.retry_after(&ctx.live.snapshot.regions, clock::now()))
            }
            _ => Refusal::Internal,
        },
    };
    // Whatever is left of the request's body must not be read as the next request.
    session.set_keepalive(None);
    match answer(session, ctx, refusal).await {
        Ok(()) => {
            let downstream = session.as_downstream_mut();
            if !downstream.is_http2() && !downstream.is_body_done() {
                // The engine drops the connection: what its client is still sending would have the system take the answer back.
                downstream.shutdown().await;
            }
            nothing(refusal.status())
        }
        Err(error) => {
            tracing::debug!(%error, "the client left before its answer");
            nothing(0)
        }
    }
}
