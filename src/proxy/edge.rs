//! Pingora's hooks. Each is a translation: what to do is decided in `decide` and `upstream::Plan`.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, Result, RetryType};
use smallvec::SmallVec;

use super::facts::{facts, host, peer};
use super::patient::HeaderDeadline;
use super::peer::{Authorities, connect_failure, exchange_failure};
use super::{clock, peer as peers};
use crate::decide::{Decision, Next, decide};
use crate::observe::RequestDone;
use crate::request::Moment;
use crate::respond::Refusal;
use crate::respond::headers::{Pass, RESPONSE_HOP_BY_HOP, is_request_id, pass};
use crate::routes::{Patience, Route};
use crate::state::{Live, State};
use crate::upstream::plan::{Mode, upstream};
use crate::upstream::{Failure, Plan, Sent, Verdict};

/// Idle keep-alive to clients, in seconds. Pingora's own default is to wait for ever.
const CLIENT_KEEPALIVE: u64 = 60;
/// A client that left before its answer; nginx's code for it, seen in logs and metrics only.
const CLIENT_CLOSED_REQUEST: u16 = 499;

const REQUEST_ID: &str = "X-Request-Id";

/// The proxy.
#[derive(Debug)]
pub struct Edge {
    state: Arc<State>,
    authorities: Authorities,
}

impl Edge {
    /// A proxy over `state`.
    pub fn new(state: Arc<State>) -> Self {
        Self { state, authorities: Authorities::default() }
    }
}

/// What a request carries from hook to hook.
#[derive(Debug)]
pub struct Context {
    started: Moment,
    /// Pinned once: a reload in mid-request changes nothing for it.
    live: Arc<Live>,
    decision: Option<Decision>,
    request_id: HeaderValue,
    /// An answer of ours was sent, or is about to be.
    refusal: Option<Refusal>,
    /// A response is being given up for another attempt.
    giving_up: bool,
    /// The attempt under way is silent by nature, and its header has to come until then.
    header_deadline: Option<Arc<HeaderDeadline>>,
}

impl Context {
    /// What it runs under, and its plan: apart, so that the one can be read while the other is changed.
    fn parts(&mut self) -> (&Live, Option<&mut Plan>) {
        let plan = match self.decision.as_mut().map(|d| &mut d.next) {
            Some(Next::Forward(plan)) => Some(plan),
            Some(Next::Refuse(_)) | None => None,
        };
        (&self.live, plan)
    }

    fn planned(&self) -> Option<&Plan> {
        match self.decision.as_ref().map(|d| &d.next) {
            Some(Next::Forward(plan)) => Some(plan),
            Some(Next::Refuse(_)) | None => None,
        }
    }

    fn route(&self) -> Option<&Route> {
        self.live.snapshot.route(self.decision.as_ref()?.route?.route)
    }

    /// The region of the last attempt, as a header says it.
    fn region(&self) -> Option<&HeaderValue> {
        let id = self.planned()?.tries.last()?.region;
        self.live.region_headers.get(usize::from(id.0))
    }
}

#[async_trait]
impl ProxyHttp for Edge {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        Context {
            started: clock::now(),
            live: self.state.live.load_full(),
            decision: None,
            request_id: HeaderValue::from_static("-"),
            refusal: None,
            giving_up: false,
            header_deadline: None,
        }
    }

    fn init_downstream_modules(&self, _modules: &mut HttpModules) {
        // Pingora would add a compression module to every request, switched off.
    }

    async fn early_request_filter(&self, session: &mut Session, _ctx: &mut Context) -> Result<()> {
        // `None` is the client's wish to close, or ours while draining.
        if session.get_keepalive().is_some() {
            session.set_keepalive(Some(CLIENT_KEEPALIVE));
        }
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        let has_body = !session.as_downstream_mut().is_body_empty();
        let decision = decide(&ctx.live.snapshot, &facts(session, has_body), ctx.started, Mode::Commit);
        ctx.request_id = request_id(session, decision.client.trusted_peer);
        let refusal = match &decision.next {
            Next::Refuse(refusal) => Some(*refusal),
            Next::Forward(_) => None,
        };
        ctx.decision = Some(decision);
        if let Some(route) = ctx.route() {
            let idle = Some(route.timeouts.idle);
            session.as_downstream_mut().set_read_timeout(idle);
            session.as_downstream_mut().set_write_timeout(idle);
        }
        match refusal {
            Some(refusal) => {
                answer(session, ctx, refusal).await?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Context) -> Result<Box<HttpPeer>> {
        ctx.header_deadline = None;
        let (live, plan) = ctx.parts();
        let regions = &live.snapshot.regions;
        let plan = plan.ok_or_else(|| Error::new(ErrorType::InternalError))?;
        loop {
            let attempt = plan.next(regions, clock::now()).map_err(|_| exhausted())?;
            let chosen =
                upstream(regions, attempt.region, attempt.upstream).ok_or_else(|| Error::new(ErrorType::InternalError))?;
            let Some(address) = chosen.state.address() else {
                match plan.failed(regions, Failure::Unresolved, Sent::default(), clock::now()) {
                    Verdict::Again => continue,
                    Verdict::Final(_) => return Err(exhausted()),
                }
            };
            // gRPC shares HTTP/2 connections, and a connection of its own would cost each call a handshake.
            let deadline = attempt.header.filter(|_| !is_grpc(session)).map(HeaderDeadline::new);
            let peer = peers::peer(&attempt, chosen, address, &self.authorities, deadline.clone());
            ctx.header_deadline = deadline;
            return Ok(peer);
        }
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        _body: &mut Option<Bytes>,
        _end: bool,
        ctx: &mut Context,
    ) -> Result<()> {
        if let Some(deadline) = &ctx.header_deadline {
            deadline.start_again();
        }
        Ok(())
    }

    fn fail_to_connect(&self, _session: &mut Session, _peer: &HttpPeer, ctx: &mut Context, mut e: Box<Error>) -> Box<Error> {
        let failure = connect_failure(&e);
        let (live, plan) = ctx.parts();
        let verdict = plan.map(|plan| plan.failed(&live.snapshot.regions, failure, Sent::default(), clock::now()));
        e.set_retry(verdict == Some(Verdict::Again));
        e
    }

    async fn upstream_request_filter(&self, session: &mut Session, request: &mut RequestHeader, ctx: &mut Context) -> Result<()> {
        let Some(decision) = &ctx.decision else { return Ok(()) };
        let trusted = decision.client.trusted_peer;
        let header = &ctx.live.snapshot.trust.header;
        let dropped: SmallVec<[HeaderName; 8]> =
            request.headers.keys().filter(|name| pass(name.as_str(), header.as_str(), trusted) == Pass::Drop).cloned().collect();
        for name in &dropped {
            request.remove_header(name);
        }

        let peer = peer(session).to_canonical();
        let mut forwarded_for = SmallVec::<[u8; 64]>::new();
        if trusted {
            for value in session.req_header().headers.get_all("x-forwarded-for") {
                forwarded_for.extend_from_slice(value.as_bytes());
                forwarded_for.extend_from_slice(b", ");
            }
        }
        write(&mut forwarded_for, peer);
        let forwarded_for = HeaderValue::from_bytes(&forwarded_for).unwrap_or(HeaderValue::from_static("unknown"));
        request.insert_header("X-Forwarded-For", forwarded_for)?;
        if !request.headers.contains_key("x-forwarded-proto") {
            request.insert_header("X-Forwarded-Proto", HeaderValue::from_static("http"))?;
        }
        if !request.headers.contains_key("x-forwarded-host") {
            request.insert_header("X-Forwarded-Host", host(session))?;
        }
        request.insert_header(REQUEST_ID, &ctx.request_id)?;
        let mut client = SmallVec::<[u8; 64]>::new();
        write(&mut client, decision.client.ip);
        request.insert_header("CF-Connecting-IP", client.as_slice())?;
        request.insert_header("CF-IPCountry", decision.country.as_str())?;
        request.insert_header("Portolan-Country", decision.country.as_str())?;
        if let Some(region) = ctx.region() {
            request.insert_header("Portolan-Region", region)?;
        }

        let attempt = ctx.planned().and_then(|p| p.tries.last());
        let chosen = attempt.and_then(|t| upstream(&ctx.live.snapshot.regions, t.region, t.upstream));
        if let Some(host) = chosen.and_then(|u| u.host.as_ref()) {
            request.insert_header(header::HOST, host)?;
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Context,
    ) -> Result<()> {
        let status = response.status.as_u16();
        let now = clock::now();
        let sent = sent(session, false);
        let interim = response.status.is_informational() && status != 101;
        let deadline = if interim { None } else { ctx.header_deadline.take() };
        let matched = ctx.decision.as_ref().and_then(|d| d.route);
        let (live, Some(plan)) = ctx.parts() else { return Ok(()) };
        let Some(route) = matched.and_then(|m| live.snapshot.route(m.route)) else { return Ok(()) };
        // Interim responses (RFC 9110, section 15.2) decide nothing, but an origin may not live on them.
        if interim {
            let late = plan.patience == Patience::FirstByte && plan.deadline.since(now).is_zero();
            return match late {
                true => Err(Error::new(ErrorType::ReadTimedout).into_up()),
                false => Ok(()),
            };
        }
        if let Some(deadline) = deadline {
            deadline.lift();
        }
        if plan.answered(&live.snapshot.regions, &route.retry, status, sent, now) == Verdict::Again {
            ctx.giving_up = true;
            let mut error = Error::new(ErrorType::HTTPStatus(status)).into_up();
            error.set_retry(true);
            return Err(error);
        }
        strip_hop_by_hop(response);
        Ok(())
    }

    async fn response_filter(&self, session: &mut Session, response: &mut ResponseHeader, ctx: &mut Context) -> Result<()> {
        if response.status.is_informational() && response.status.as_u16() != 101 {
            return Ok(());
        }
        if session.is_process_shutting_down() {
            session.set_keepalive(None);
        }
        response.insert_header(REQUEST_ID, &ctx.request_id)?;
        if ctx.route().is_some_and(|r| r.region_header)
            && let Some(region) = ctx.region()
        {
            response.insert_header("Portolan-Region", region)?;
        }
        Ok(())
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut e: Box<Error>,
        ctx: &mut Context,
        reused: bool,
    ) -> Box<Error> {
        if std::mem::take(&mut ctx.giving_up) {
            return e;
        }
        let now = clock::now();
        let written = session.response_written().map(|r| r.status.as_u16()).filter(|s| *s >= 200 || *s == 101);
        // Pingora marks what happens to a connection that was closing while we used it.
        let closing = matches!(e.retry, RetryType::ReusedOnly | RetryType::Decided(true));
        let sent = sent(session, reused && closing);
        let from_upstream = *e.esource() == ErrorSource::Upstream;
        let late = ctx.header_deadline.take().is_some_and(|d| d.is_over());
        let (live, plan) = ctx.parts();
        let regions = &live.snapshot.regions;
        let again = match (plan, from_upstream, written) {
            (Some(plan), true, Some(status)) => {
                // A tunnel or event stream that was silent for `timeouts.idle` simply ends.
                let natural = plan.patience == Patience::Idle && *e.etype() == ErrorType::ReadTimedout;
                plan.truncated(regions, status, !natural, now);
                false
            }
            (Some(plan), true, None) => {
                let failure = if late { Failure::FirstByteTimeout } else { exchange_failure(&e) };
                plan.failed(regions, failure, sent, now) == Verdict::Again
            }
            (_, false, _) | (None, _, _) => false,
        };
        e.set_retry(again);
        e
    }

    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, ctx: &mut Context) -> FailToProxy {
        let nothing = |error_code| FailToProxy { error_code, can_reuse_downstream: false };
        if session.response_written().is_some_and(|r| !r.status.is_informational() || r.status.as_u16() == 101) {
            return nothing(0);
        }
        let refusal = match e.esource() {
            ErrorSource::Downstream => match e.etype() {
                ErrorType::WriteError | ErrorType::ReadError | ErrorType::ConnectionClosed | ErrorType::WriteTimedout => {
                    return nothing(0);
                }
                ErrorType::ReadTimedout => Refusal::RequestTimeout,
                _ => Refusal::BadRequest,
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
            Ok(()) => nothing(refusal.status()),
            Err(error) => {
                tracing::debug!(%error, "the client left before its answer");
                nothing(0)
            }
        }
    }

    async fn logging(&self, session: &mut Session, _e: Option<&Error>, ctx: &mut Context) {
        let now = clock::now();
        if let (live, Some(plan)) = ctx.parts() {
            plan.close(&live.snapshot.regions, now);
        }
        let Some(decision) = &ctx.decision else { return };
        let request = session.req_header();
        let status = session.response_written().map_or(CLIENT_CLOSED_REQUEST, |r| r.status.as_u16());
        self.state.record(&RequestDone {
            live: &ctx.live,
            at: SystemTime::now(),
            request_id: ctx.request_id.to_str().unwrap_or("-"),
            client: decision.client.ip,
            country: decision.country,
            lookup: decision.lookup,
            method: &request.method,
            host: host(session),
            path: request.uri.path(),
            status,
            bytes: session.as_downstream().body_bytes_sent(),
            route: decision.route.map(|m| m.route),
            plan: ctx.planned(),
            total: now.since(ctx.started),
        });
    }

    fn suppress_proxy_warn_log(&self, _session: &Session, _ctx: &Context, _error: &Error, _context: ProxyWarnLogContext) -> bool {
        // The access log tells every attempt and how it ended.
        true
    }

    fn suppress_error_log(&self, _session: &Session, ctx: &Context, _error: &Error) -> bool {
        ctx.refusal != Some(Refusal::Internal)
    }
}

fn is_grpc(session: &Session) -> bool {
    let kind = session.req_header().headers.get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// The error that ends Pingora's loop of attempts; `fail_to_proxy` reads the plan for what to say.
fn exhausted() -> Box<Error> {
    Error::new(ErrorType::ConnectProxyFailure).into_up()
}

fn sent(session: &mut Session, reused: bool) -> Sent {
    let downstream = session.as_downstream_mut();
    Sent { body_lost: downstream.retry_buffer_truncated(), reused, body_incomplete: !downstream.is_body_done() }
}

/// Sends an answer of ours.
async fn answer(session: &mut Session, ctx: &mut Context, refusal: Refusal) -> Result<()> {
    ctx.refusal = Some(refusal);
    let body = refusal.body();
    let mut response = ResponseHeader::build(refusal.status(), Some(8))?;
    response.insert_header(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"))?;
    response.insert_header(header::CONTENT_LENGTH, body.len())?;
    response.insert_header(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))?;
    response.insert_header("Proxy-Status", refusal.proxy_status(ctx.region().and_then(|r| r.to_str().ok())))?;
    response.insert_header(REQUEST_ID, &ctx.request_id)?;
    if let Some(seconds) = refusal.retry_after() {
        response.insert_header(header::RETRY_AFTER, seconds)?;
    }
    let head = session.req_header().method == http::Method::HEAD;
    session.write_response_header(Box::new(response), head).await?;
    if !head {
        session.write_response_body(Some(Bytes::from_static(body.as_bytes())), true).await?;
    }
    Ok(())
}

/// A trusted proxy's request id is kept; anybody else gets a new one of 128 random bits.
fn request_id(session: &Session, trusted_peer: bool) -> HeaderValue {
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

/// RFC 9110, section 7.6.1: what speaks of the origin's connection is not for the client.
fn strip_hop_by_hop(response: &mut ResponseHeader) {
    let named: SmallVec<[HeaderName; 4]> = response
        .headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| ![header::CONNECTION, header::TRANSFER_ENCODING, header::CONTENT_LENGTH, header::UPGRADE].contains(name))
        .collect();
    for name in &named {
        response.remove_header(name);
    }
    for name in RESPONSE_HOP_BY_HOP {
        response.remove_header(name);
    }
}

fn write(to: &mut SmallVec<[u8; 64]>, value: impl std::fmt::Display) {
    // Writing to memory cannot fail.
    let _ = std::io::Write::write_fmt(to, format_args!("{value}"));
}
