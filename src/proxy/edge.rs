//! Pingora's hooks. Each is a translation: what to do is decided in `decide` and `upstream::Plan`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderValue, Version, header};
use pingora::cache::key::{CacheKey, HashBinary};
use pingora::cache::storage::HitHandler;
use pingora::cache::{CacheMeta, ForcedFreshness, RespCacheable};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, Result};

use super::answer::answer;
use super::body::{self, Inspection};
use super::caching::{self, Caching};
use super::facts::host;
use super::patient::HeaderDeadline;
use super::peer::{Prepared, connect_failure};
use super::shaper::Shapers;
use super::tunnel::Frames;
use super::{clock, failing, headers, introduced, journey, peer as peers, queue, shaper, stream};
use crate::cache::purge::What;
use crate::cache::status::Status;
use crate::config::ProxyVersion;
use crate::decide::{Decision, Next};
use crate::observe::trace::Trace;
use crate::observe::{CLIENT_CLOSED_REQUEST, RequestDone};
use crate::request::Moment;
use crate::respond::Refusal;
use crate::routes::{Patience, Route};
use crate::state::{Live, State};
use crate::upstream::plan::upstream;
use crate::upstream::replay::Replay;
use crate::upstream::{Backends, Failure, Outcome, Plan, Sent, Verdict};

/// A request's name, in its logs and those of its origin.
pub const REQUEST_ID: &str = "X-Request-Id";
/// An upstream asks for a request to be sent elsewhere; Fly's name second.
const REPLAY: [&str; 2] = ["portolan-replay", "fly-replay"];

/// The proxy.
#[derive(Debug)]
pub struct Edge {
    state: Arc<State>,
    prepared: Prepared,
}

impl Edge {
    /// A proxy over `state`.
    pub fn new(state: Arc<State>) -> Self {
        Self { state, prepared: Prepared::default() }
    }

    /// Purges the URL of a request.
    async fn purge(&self, session: &Session, ctx: &Context) -> Refusal {
        let url = caching::purged_url(session, ctx);
        tracing::info!(audit = true, url, request_id = ctx.request_id.to_str().unwrap_or("-"), "purged");
        match self.state.purge(vec![What::Url(url)], false).await {
            Ok(_) => Refusal::Purged,
            Err(error) => {
                tracing::error!(%error, "a purge cannot be kept");
                Refusal::Internal
            }
        }
    }
}

/// What a request carries from hook to hook.
#[derive(Debug)]
pub struct Context {
    /// When its header was there.
    pub started: Moment,
    /// Pinned once: a reload in mid-request changes nothing for it.
    pub live: Arc<Live>,
    /// What was decided.
    pub decision: Option<Decision>,
    /// `X-Request-Id`.
    pub request_id: HeaderValue,
    /// A random number, the request's own.
    pub chance: u64,
    /// Its place in a trace, if there is tracing.
    pub trace: Option<Box<Trace>>,
    /// The body was read before an upstream was chosen.
    pub body_read: bool,
    /// The body is looked at on its way.
    pub inspection: Inspection,
    /// A rule refused it on the way.
    pub stopped: Option<Refusal>,
    /// An answer of ours was sent, or is about to be.
    pub refusal: Option<Refusal>,
    /// A response is being given up for another attempt.
    pub giving_up: bool,
    /// The attempt under way is silent by nature, and its header has to come until then.
    pub header_deadline: Option<Arc<HeaderDeadline>>,
    /// Its way through the cache, if it takes one.
    pub caching: Option<Box<Caching>>,
    /// What the cache did, as its client was told.
    pub cached: Option<Status>,
    /// The response is a tunnel: where its frames end.
    pub tunnel: Option<(Frames, Arc<HeaderDeadline>)>,
}

impl Context {
    /// What it is played against, and its plan: apart, so that the one can be read while the other is changed.
    pub fn parts(&mut self) -> Option<(Backends<'_>, &Route, &mut Plan)> {
        let Decision { route, next: Next::Forward(plan), .. } = self.decision.as_mut()? else { return None };
        let route = self.live.snapshot.route((*route)?.route)?;
        Some((Backends { regions: &self.live.snapshot.regions, retry: &route.retry }, route, plan))
    }

    /// The plan, if the request was forwarded.
    pub fn planned(&self) -> Option<&Plan> {
        match self.decision.as_ref().map(|d| &d.next) {
            Some(Next::Forward(plan)) => Some(plan),
            Some(Next::Refuse(_) | Next::NeedBody | Next::Lookup | Next::NeedShared(_)) | None => None,
        }
    }

    /// The route, if one matched.
    pub fn route(&self) -> Option<&Route> {
        self.live.snapshot.route(self.decision.as_ref()?.route?.route)
    }

    /// What `policy: latency` learns from the request's answers.
    fn learn(&self) {
        let Some(areas) = self.decision.as_ref().and_then(|d| d.learns) else { return };
        let (Some(route), Some(plan)) = (self.route(), self.planned()) else { return };
        for attempt in &plan.tries {
            if let (Outcome::Answered(..500), Some(region)) = (attempt.outcome, self.live.snapshot.region(attempt.region)) {
                route.steering.learn(areas, region, attempt.ended.since(attempt.started));
            }
        }
    }

    /// The region of the last attempt, as a header says it.
    pub fn region(&self) -> Option<&HeaderValue> {
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
            chance: fastrand::u64(..),
            trace: None,
            body_read: false,
            inspection: Inspection::None,
            stopped: None,
            refusal: None,
            giving_up: false,
            header_deadline: None,
            caching: None,
            cached: None,
            tunnel: None,
        }
    }

    fn init_downstream_modules(&self, modules: &mut HttpModules) {
        modules.add_module(Box::new(Shapers));
    }

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<()> {
        let policy = &ctx.live.snapshot.connections;
        let last = stream::begins(session) >= policy.requests;
        // `None` is the client's wish to close, or ours while draining.
        if session.get_keepalive().is_some() {
            session.set_keepalive((!last).then_some(policy.keepalive.as_secs()));
        }
        session.as_downstream_mut().set_pipelining_enabled(true);
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        let decision = journey::decided(session, ctx, &self.state).await?;
        let refusal = match &decision.next {
            Next::Refuse(refusal) => Some(*refusal),
            Next::Forward(_) | Next::Lookup => None,
            // It was given, so it is not asked for again.
            Next::NeedBody | Next::NeedShared(_) => Some(Refusal::Internal),
        };
        if decision.later.is_some() {
            ctx.inspection = Inspection::Holding { held: Vec::new(), calls: headers::is_grpc(session.req_header()) };
        }
        if let Some(settings) = ctx.live.snapshot.tracing.as_ref().filter(|_| session.subrequest_ctx.is_none()) {
            let (headers, trusted) = (&session.req_header().headers, decision.client.trusted_peer);
            ctx.trace = Some(Box::new(Trace::begin(settings, headers, trusted, ctx.chance, clock::now())));
        }
        ctx.decision = Some(decision);
        shaper::bridge(session, ctx);
        if let Some(route) = ctx.route() {
            let idle = Some(route.timeouts.idle);
            session.as_downstream_mut().set_read_timeout(idle);
            session.as_downstream_mut().set_write_timeout(idle);
        }
        let refusal = match refusal {
            Some(Refusal::Purged) => Some(self.purge(session, ctx).await),
            refusal => refusal,
        };
        match refusal {
            Some(refusal) => {
                answer(session, ctx, refusal).await?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    fn request_cache_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<()> {
        caching::begin(session, ctx, self.state.store);
        Ok(())
    }

    fn cache_key_callback(&self, _session: &Session, ctx: &mut Context) -> Result<CacheKey> {
        caching::key(ctx)
    }

    fn cache_vary_filter(&self, meta: &CacheMeta, ctx: &mut Context, request: &RequestHeader) -> Option<HashBinary> {
        caching::variant(meta, ctx, request)
    }

    async fn cache_hit_filter(
        &self,
        session: &mut Session,
        meta: &CacheMeta,
        hit: &mut HitHandler,
        fresh: bool,
        ctx: &mut Context,
    ) -> Result<Option<ForcedFreshness>> {
        Ok(caching::hit(meta, hit, fresh, session, ctx))
    }

    fn cache_not_modified_filter(&self, session: &Session, response: &ResponseHeader, _ctx: &mut Context) -> Result<bool> {
        Ok(caching::not_modified(session, response))
    }

    fn response_cache_filter(&self, session: &Session, response: &ResponseHeader, ctx: &mut Context) -> Result<RespCacheable> {
        caching::store(session, response, ctx, self.state.store)
    }

    fn should_serve_stale(&self, session: &mut Session, ctx: &mut Context, error: Option<&Error>) -> bool {
        caching::may_be_stale(session, ctx, error)
    }

    async fn proxy_upstream_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        if !caching::undecided(ctx) {
            return Ok(true);
        }
        if let Some(trace) = &mut ctx.trace {
            trace.missed = Some(clock::now());
        }
        if caching::only_if_cached(ctx) {
            answer(session, ctx, Refusal::NotCached).await?;
            return Ok(false);
        }
        let decision = journey::missed(session, ctx, &self.state).await;
        let refusal = match &decision.next {
            Next::Refuse(refusal) => Some(*refusal),
            Next::Forward(_) => None,
            Next::Lookup | Next::NeedBody | Next::NeedShared(_) => Some(Refusal::Internal),
        };
        ctx.decision = Some(decision);
        match refusal {
            Some(refusal) => {
                answer(session, ctx, refusal).await?;
                Ok(false)
            }
            None => Ok(true),
        }
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Context) -> Result<Box<HttpPeer>> {
        ctx.header_deadline = None;
        if let Inspection::Holding { held, .. } = &mut ctx.inspection {
            // What an attempt that failed had got so far comes again.
            held.clear();
        }
        let client = ctx.decision.as_ref().map(|decision| decision.client.ip);
        let Some((backends, _, plan)) = ctx.parts() else { return Err(Error::new(ErrorType::InternalError)) };
        loop {
            // The plan knows why there is none, and `fail_to_proxy` asks it.
            let Some(attempt) = queue::next(plan, backends).await else { return Err(failing::exhausted()) };
            if !attempt.delay.is_zero() {
                tokio::time::sleep(attempt.delay).await;
            }
            let chosen = upstream(backends.regions, attempt.region, attempt.upstream);
            let (Some(chosen), Some(endpoint)) = (chosen, &attempt.endpoint) else {
                match plan.failed(backends, Failure::Unresolved, Sent::default(), clock::now()) {
                    Verdict::Again => continue,
                    Verdict::Final(_) => return Err(failing::exhausted()),
                }
            };
            let region = backends.regions.get(usize::from(attempt.region.0)).map(|r| r.state.clone()).unwrap_or_default();
            // gRPC shares HTTP/2 connections, and a connection of its own would cost each call a handshake.
            let deadline =
                attempt.header.filter(|_| !headers::is_grpc(session.req_header())).map(|wait| HeaderDeadline::new(wait, region));
            let introduction = chosen.introduces.and_then(|version| introduction(session, version, client));
            let peer = peers::peer(&attempt, chosen, endpoint, &self.prepared, deadline.clone(), introduction)?;
            ctx.header_deadline = deadline;
            return Ok(peer);
        }
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        ctx: &mut Context,
    ) -> Result<()> {
        body::measure(session, ctx)?;
        body::pass(session, body, end, ctx)?;
        if let Some(deadline) = &ctx.header_deadline {
            deadline.start_again();
        }
        Ok(())
    }

    fn fail_to_connect(&self, _session: &mut Session, _peer: &HttpPeer, ctx: &mut Context, mut e: Box<Error>) -> Box<Error> {
        let failure = connect_failure(&e);
        let verdict = ctx.parts().map(|(backends, _, plan)| plan.failed(backends, failure, Sent::default(), clock::now()));
        e.set_retry(verdict == Some(Verdict::Again));
        e
    }

    async fn upstream_request_filter(&self, session: &mut Session, request: &mut RequestHeader, ctx: &mut Context) -> Result<()> {
        if let Some(caching) = &mut ctx.caching {
            caching.sent(session.cache.bypassing());
        }
        headers::to_origin(session, request, ctx)
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Context,
    ) -> Result<()> {
        headers::frame(session, response)?;
        let status = response.status.as_u16();
        let now = clock::now();
        let sent = failing::sent(session, false);
        let interim = response.status.is_informational() && status != 101;
        let deadline = if interim { None } else { ctx.header_deadline.take() };
        let known = |name: &str| ctx.live.snapshot.region_named(name);
        let asked = REPLAY.iter().find_map(|name| response.headers.get(*name)).filter(|_| !interim);
        let replay = asked.map(|value| Replay::parse(value.to_str().unwrap_or_default(), known));
        let Some((backends, route, plan)) = ctx.parts() else { return Ok(()) };
        // Interim responses (RFC 9110, section 15.2) decide nothing, but an origin may not live on them.
        if interim {
            let late = plan.patience == Patience::FirstByte && plan.deadline.since(now).is_zero();
            if late {
                return Err(Error::new(ErrorType::ReadTimedout).into_up());
            }
            // A client that waits to send its body has none for what is stored.
            return match ctx.caching.is_some() && status != 100 {
                true => caching::interim(session, response).await,
                false => Ok(()),
            };
        }
        if let Some(deadline) = &deadline {
            deadline.lift(status == 101);
        }
        let verdict = match replay.filter(|_| route.replay && status != 101) {
            Some(replay) => Some(plan.replay(backends, &route.steering, replay, status, sent, now)),
            None => match plan.answered(backends, status, retry_after(response), sent, now) {
                Verdict::Again => Some(Verdict::Again),
                // The response is passed on.
                Verdict::Final(_) => None,
            },
        };
        if let Some(verdict) = verdict {
            ctx.giving_up = true;
            let mut error = Error::new(ErrorType::HTTPStatus(status)).into_up();
            error.set_retry(verdict == Verdict::Again);
            return Err(error);
        }
        if status >= 500 && session.cache.can_serve_stale_error() {
            // Every candidate failed: what is stale is better than this.
            ctx.giving_up = true;
            if let Some(caching) = &mut ctx.caching {
                caching.fails = true;
            }
            let mut error = Error::new(ErrorType::HTTPStatus(status)).into_up();
            error.set_retry(false);
            return Err(error);
        }
        if status == 304 {
            caching::validated(ctx, response);
        }
        caching::invalidate(session, ctx, response, self.state.store);
        if status == 101 {
            ctx.tunnel = deadline.map(|deadline| (Frames::default(), deadline));
        }
        headers::strip_hop_by_hop(response);
        Ok(())
    }

    async fn response_filter(&self, session: &mut Session, response: &mut ResponseHeader, ctx: &mut Context) -> Result<()> {
        if response.status.is_informational() && response.status.as_u16() != 101 {
            return Ok(());
        }
        // After an error the engine closes the connection, whatever it was answered with.
        if session.is_process_shutting_down()
            || self.state.leaving.now()
            || ctx.caching.as_ref().is_some_and(|caching| caching.fails)
        {
            session.set_keepalive(None);
        }
        response.insert_header(REQUEST_ID, &ctx.request_id)?;
        if ctx.route().is_some_and(|r| r.region_header)
            && let Some(region) = ctx.region()
        {
            response.insert_header("Portolan-Region", region)?;
        }
        caching::tell(session, response, ctx)?;
        headers::set_cookies(session, response, ctx)?;
        headers::hsts(session, response, ctx)?;
        headers::to_client(session, response, ctx)?;
        shaper::compress(session, response, ctx)?;
        stream::tell(session, response, ctx.caching.as_ref().is_some_and(|caching| caching.partial));
        Ok(())
    }

    fn response_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        _end: bool,
        ctx: &mut Context,
    ) -> Result<Option<std::time::Duration>> {
        if ctx.caching.is_some() {
            caching::pace(session);
        }
        if let (Some((frames, _)), Some(bytes)) = (&mut ctx.tunnel, body) {
            frames.pass(bytes);
        }
        Ok(None)
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        e: Box<Error>,
        ctx: &mut Context,
        reused: bool,
    ) -> Box<Error> {
        failing::again(session, e, ctx, reused)
    }

    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, ctx: &mut Context) -> FailToProxy {
        failing::told(session, e, ctx).await
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Context) {
        let now = clock::now();
        if let Some((backends, _, plan)) = ctx.parts() {
            plan.close(backends.regions, now);
        }
        ctx.learn();
        let Some(decision) = &ctx.decision else { return };
        if session.subrequest_ctx.is_some() {
            // What is fetched for later is no request of anybody's; its attempts were counted as they were made.
            if let Some(plan) = ctx.planned() {
                self.state.metrics.attempted(&ctx.live, plan);
            }
            return;
        }
        let request = session.req_header();
        let written = session.response_written().map(|r| r.status.as_u16()).filter(|status| *status >= 200 || *status == 101);
        let status = written.unwrap_or(CLIENT_CLOSED_REQUEST);
        // Whoever left, or was stopped, before it was decided what becomes of the request has a trace all the same.
        let settings = ctx.live.snapshot.tracing.as_ref().filter(|_| ctx.trace.is_none());
        let late =
            settings.map(|settings| Trace::begin(settings, &request.headers, decision.client.trusted_peer, ctx.chance, now));
        let http_2 = session.as_downstream().is_http2();
        // What was answered has its reason already; only where something broke there may be one that nobody was told.
        let fault =
            error.and_then(|_| stream::fault(session, &ctx.live.snapshot.connections)).map(|fault| Refusal::Faulty { fault });
        let left = error.is_some_and(|error| *error.esource() == ErrorSource::Downstream);
        let done = RequestDone {
            live: &ctx.live,
            at: SystemTime::now(),
            request_id: ctx.request_id.to_str().unwrap_or("-"),
            client: decision.client.ip,
            country: decision.place.country,
            lookup: decision.place.lookup,
            method: &request.method,
            host: host(session),
            path: request.uri.path(),
            query: request.uri.query(),
            // The cache has its own idea of the version of what it fetches again.
            version: if http_2 { Version::HTTP_2 } else { request.version },
            secured: stream::secured(session).is_some(),
            headers: &request.headers,
            chance: ctx.chance,
            status,
            bytes: session.as_downstream().body_bytes_sent(),
            route: decision.route.map(|m| m.route),
            matched: decision.route.map(|m| m.host),
            refusal: ctx.refusal.or(ctx.stopped).or(fault),
            aborted: left || (ctx.caching.is_some() && cut_short(session)),
            trace: ctx.trace.as_deref().or(late.as_ref()),
            matches: &decision.matches,
            limits: &decision.limits.seen,
            class: decision.class,
            shed: ctx.refusal.and_then(Refusal::shed),
            cache: ctx.cached.or_else(|| caching::status(session, ctx)),
            plan: ctx.planned(),
            started: ctx.started,
            total: now.since(ctx.started),
        };
        self.state.record(&done, now);
    }

    fn suppress_proxy_warn_log(&self, _session: &Session, _ctx: &Context, _error: &Error, _context: ProxyWarnLogContext) -> bool {
        // The access log tells every attempt and how it ended.
        true
    }

    fn suppress_error_log(&self, _session: &Session, ctx: &Context, _error: &Error) -> bool {
        ctx.refusal != Some(Refusal::Internal)
    }
}

/// Did the client get less than it was promised? While a response is being stored the engine does not mind that its client
/// has left, and says nothing of it.
fn cut_short(session: &Session) -> bool {
    let length = |response: &ResponseHeader| response.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok();
    let promised: Option<usize> = session.response_written().filter(|r| !matches!(r.status.as_u16(), 204 | 304)).and_then(length);
    let body = session.req_header().method != http::Method::HEAD;
    body && promised.is_some_and(|promised| session.as_downstream().body_bytes_sent() < promised)
}

/// Who an upstream is told that the client is: the one that decisions were made for.
fn introduction(session: &Session, version: ProxyVersion, client: Option<IpAddr>) -> Option<Bytes> {
    let inet = |address: Option<&pingora::protocols::l4::socket::SocketAddr>| address.and_then(|a| a.as_inet().copied());
    let peer = inet(session.client_addr())?;
    let from = match client.unwrap_or(peer.ip()) {
        ip if ip == peer.ip().to_canonical() => peer,
        // A proxy's word tells no port.
        ip => (ip, 0).into(),
    };
    let to = inet(session.server_addr())?;
    introduced::introduction(version, from, to).ok().map(Bytes::from)
}

/// `Retry-After` in seconds (RFC 9110, section 10.2.3); a date is not read.
fn retry_after(response: &ResponseHeader) -> Option<std::time::Duration> {
    let text = response.headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(std::time::Duration::from_secs)
}
