//! Between the engine's hooks and what `cache` decides: keys in, leases out, and what the client is told of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use http::{HeaderName, HeaderValue, Version, header};
use pingora::cache::key::{CacheKey, HashBinary};
use pingora::cache::lock::CacheKeyLockImpl;
use pingora::cache::storage::HitHandler;
use pingora::cache::{CacheMeta, CacheOptionOverrides, CachePhase, ForcedFreshness, NoCacheReason, RespCacheable};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::ServerSession as HttpSession;
use pingora::proxy::Session;
use pingora::{Error, ErrorSource, ErrorType, Result};
use smallvec::SmallVec;

use super::answer::CACHE_STATUS;
use super::clock;
use super::edge::Context;
use super::facts::{Given, facts, host};
use super::store::{Hit, Noted, Store, engine_key};
use crate::cache::freshness::{Exchange, WhyNot, judge};
use crate::cache::key::{Key, variance};
use crate::cache::purge::{Purged, millis};
use crate::cache::reuse::{self, Held, Use};
use crate::cache::status::{Status, Told, seconds_until};
use crate::cache::{Bypass, Cookies, Lookup, TAG_FIELDS, same_host_target, tags_of, vary};
use crate::decide::{self, Next};
use crate::request::{Facts, Seen, is_safe};
use crate::respond::Refusal;
use crate::respond::headers::{Pass, pass};

/// What tells of a message and its connection, and not of the response (RFC 9111, section 3.1).
const CONNECTION: [HeaderName; 5] = [header::CONNECTION, header::TE, header::TRAILER, header::TRANSFER_ENCODING, header::UPGRADE];

/// A request that waits gives up a moment after everything that it waits for has given up.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// What a request carries of its way through the cache.
#[derive(Debug)]
pub struct Caching {
    /// When it came, in milliseconds since 1970.
    arrived: u64,
    /// When its last attempt was sent.
    asked: SystemTime,
    /// It waits, or may have to.
    waiting: Option<Waiting>,
    /// Something is stored, if for other requests.
    found: bool,
    /// What it is answered with is still coming.
    pub partial: bool,
    /// Its response is on its way into the store.
    filling: bool,
    /// It was not looked up: its response was not stored the last time.
    bypassed: bool,
    /// What is stored is not fresh enough for this request.
    too_old: bool,
    /// The 304 that says that what is stored still holds.
    validated: Option<Box<ResponseHeader>>,
    /// Fields for the client that caused the response, and nobody else.
    own: Vec<(HeaderName, HeaderValue)>,
    /// Why the response was not stored.
    why: Option<WhyNot>,
    /// The origin failed, and what is stale is served.
    pub fails: bool,
}

/// One request more that waits.
#[derive(Debug)]
struct Waiting(Arc<AtomicU32>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Caching {
    /// Nothing was asked yet.
    pub fn new() -> Self {
        let now = SystemTime::now();
        Self {
            arrived: millis(now),
            asked: now,
            waiting: None,
            found: false,
            partial: false,
            filling: false,
            bypassed: false,
            too_old: false,
            validated: None,
            own: Vec::new(),
            why: None,
            fails: false,
        }
    }

    /// An attempt is sent. `bypassed`: its response was not stored the last time, so nobody waited for it.
    pub fn sent(&mut self, bypassed: bool) {
        self.bypassed |= bypassed;
        self.asked = SystemTime::now();
        self.waiting = None;
    }
}

/// What may be looked up.
fn lookup(ctx: &Context) -> Option<&Lookup> {
    ctx.decision.as_ref()?.cache.as_deref()
}

/// Is the cache in force for the request, whether it is looked up or not?
fn in_force(ctx: &Context) -> bool {
    ctx.decision.as_ref().is_some_and(|decision| decision.cache.is_some() || decision.bypass.is_some())
}

/// Lets the engine look the request up, if it may be.
pub fn begin(session: &mut Session, ctx: &mut Context, store: &'static Store) {
    let Some(lookup) = lookup(ctx) else { return };
    if lookup.no_store || !ctx.live.snapshot.cache.known.ready.load(Ordering::Relaxed) {
        return;
    }
    let total = ctx.route().map_or(LAST_WAIT, |route| route.timeouts.total) + LAST_WAIT;
    let most = ctx.live.snapshot.cache.waiters;
    let mut caching = Caching::new();
    let waiting = &store.waiting;
    let before = waiting.fetch_add(1, Ordering::Relaxed);
    caching.waiting = Some(Waiting(waiting.clone()));
    let lock: Option<&'static CacheKeyLockImpl> = if before < most { Some(store) } else { None };
    ctx.caching = Some(Box::new(caching));
    let mut overrides = CacheOptionOverrides::default();
    overrides.wait_timeout = Some(total);
    session.cache.enable(store, None, Some(&store.predictor), lock, Some(overrides));
    // A response comes into the store no slower because whoever caused it reads slowly.
    session.set_proxy_tasks_enabled(true);
}

/// What turned out not to be stored comes as fast as its client takes it: nothing would hold the rest.
pub fn pace(session: &mut Session) {
    if !session.as_downstream().supports_proxy_task_api() {
        return;
    }
    let reader = session.cache.miss_body_reader().and_then(|reader| reader.as_any().downcast_ref::<Hit>());
    if reader.is_some_and(Hit::is_lost) {
        session.set_proxy_tasks_enabled(false);
    }
}

/// The key, as the engine wants it.
pub fn key(ctx: &Context) -> Result<CacheKey> {
    let Some(lookup) = lookup(ctx) else { return Error::e_explain(ErrorType::InternalError, "there is no key") };
    Ok(engine_key(&lookup.key))
}

/// Which variant the request is for, if the response has several.
pub fn variant(meta: &CacheMeta, ctx: &mut Context, request: &RequestHeader) -> Option<HashBinary> {
    if let Some(caching) = &mut ctx.caching {
        // Once the request is sent it is its own response that is looked at.
        caching.found |= caching.waiting.is_some();
    }
    let fields = vary::fields(meta.headers());
    if fields.is_empty() {
        return None;
    }
    let decision = ctx.decision.as_ref()?;
    let trusted = decision.client.trusted_peer;
    let ip_header = ctx.live.snapshot.trust.header.as_str();
    let changes = decision.changes.as_ref().map(|changes| &*changes.headers).unwrap_or_default();
    // What the origin sees, not what the client sent: the two differ where we speak ourselves.
    let value = |name: &HeaderName| {
        if let Some(change) = changes.iter().rev().find(|change| change.name() == name) {
            return change.value().map(|value| [b"=", value.as_bytes()].concat()).unwrap_or_default();
        }
        match name.as_str() {
            "portolan-country" | "cf-ipcountry" => decision.place.country.as_str().as_bytes().to_vec(),
            "cf-connecting-ip" | "x-forwarded-for" => decision.client.ip.to_string().into_bytes(),
            other if pass(other, ip_header, trusted) == Pass::Drop => Vec::new(),
            _ => vary::value(name, &request.headers),
        }
    };
    Some(variance(fields.iter().map(|name| (name.as_str(), value(name)))))
}

/// May what was found be used?
pub fn hit(meta: &CacheMeta, handler: &HitHandler, fresh: bool, session: &Session, ctx: &mut Context) -> Option<ForcedFreshness> {
    let hit = handler.as_any().downcast_ref::<Hit>()?;
    if let Some(caching) = &mut ctx.caching {
        caching.partial = hit.is_partial();
    }
    let head = hit.head();
    let asked = head.noted.asked;
    let known = &ctx.live.snapshot.cache.known;
    match known.purges.check(head.url(), head.tags(), asked) {
        Some(Purged::Gone) => {
            if let Some(caching) = &mut ctx.caching {
                caching.found = false;
            }
            return Some(ForcedFreshness::ForceMiss);
        }
        Some(Purged::Stale(since)) if since < meta.fresh_until() => {
            return Some(ForcedFreshness::ForceExpiredServeStale { expired_at: Some(since) });
        }
        Some(Purged::Stale(_)) | None => {}
    }
    if known.invalidated.check(head.url(), asked) {
        return Some(ForcedFreshness::ForceExpired);
    }
    let directives = ctx.route().is_some_and(|route| route.cache.request_directives);
    let now = SystemTime::now();
    let caching = ctx.caching.as_mut()?;
    if directives {
        let since = |later: SystemTime, earlier: SystemTime| later.duration_since(earlier).unwrap_or_default();
        let held = Held { age: meta.age(), fresh_for: since(meta.fresh_until(), now), stale_for: since(now, meta.fresh_until()) };
        let targeted = &ctx.live.snapshot.cache.targeted;
        match reuse::ruled(&reuse::wanted(&session.req_header().headers), held, meta.headers(), targeted) {
            Use::AsStored => {}
            // What was asked for since this request came is as fresh as anything can be.
            Use::Validate if asked > caching.arrived => {}
            Use::Validate => {
                caching.too_old = true;
                return Some(ForcedFreshness::ForceExpired);
            }
            Use::Stale => return Some(ForcedFreshness::ForceFresh),
        }
    }
    // The request waited for another one's answer, which was asked for after it came: it need not ask once more.
    (!fresh && asked > caching.arrived).then_some(ForcedFreshness::ForceFresh)
}

/// What the origin says of what is stored: it still holds.
pub fn validated(ctx: &mut Context, response: &ResponseHeader) {
    if let Some(caching) = &mut ctx.caching {
        caching.validated = Some(Box::new(response.clone()));
    }
}

/// May the response be stored, and how?
pub fn store(session: &Session, response: &ResponseHeader, ctx: &mut Context, store: &Store) -> Result<RespCacheable> {
    let Some(caching) = &mut ctx.caching else { return Ok(not(WhyNot::Rule)) };
    let Some(lookup) = ctx.decision.as_ref().and_then(|d| d.cache.as_deref()) else { return Ok(not(WhyNot::Rule)) };
    let cache = &ctx.live.snapshot.cache;
    let policy = cache.policy(&lookup.applied);
    let mut header = response.clone();
    if let Some(validated) = caching.validated.take() {
        freshen(&mut header, &validated)?;
    }
    let status = header.status.as_u16();
    let now = SystemTime::now();
    let exchange = Exchange {
        asked: caching.asked,
        now,
        authorized: session.req_header().headers.contains_key(header::AUTHORIZATION),
        status,
        headers: &header.headers,
    };
    let stored = session.cache.phase() == CachePhase::Stale;
    let better = stored && session.cache.maybe_cache_meta().is_some_and(|old| !old.response_header().status.is_server_error());
    let length: Option<u64> = header.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    let lease = match judge(exchange, policy.terms(status)) {
        // An error takes the place of nothing that is right.
        Ok(_) if status >= 500 && better => Err(WhyNot::Error),
        Ok(_) if length.is_some_and(|length| !store.takes(length)) => Err(WhyNot::TooLarge),
        Err(WhyNot::NotFresh) if status >= 500 => Err(WhyNot::Error),
        lease => lease,
    };
    let lease = match lease {
        Ok(lease) => lease,
        Err(why) => {
            caching.why = Some(why);
            return Ok(not(why));
        }
    };
    caching.own.clear();
    let mut own = |header: &mut ResponseHeader, name: &HeaderName| {
        caching.own.extend(header.headers.get_all(name).iter().map(|value| (name.clone(), value.clone())));
        header.remove_header(name);
    };
    for name in CONNECTION {
        header.remove_header(&name);
    }
    for name in &lease.unstored {
        own(&mut header, name);
    }
    // Of a response that was just validated `Age` says nothing any more.
    own(&mut header, &header::AGE);
    if policy.cookies == Some(Cookies::Strip) {
        own(&mut header, &header::SET_COOKIE);
    }
    let mut tags = String::new();
    for tag in tags_of(&header.headers).chain(cache.tags(&lookup.applied)) {
        tags.push_str(tag);
        tags.push('\n');
    }
    let seconds = |span: Duration| u32::try_from(span.as_secs()).unwrap_or(u32::MAX);
    let noted = Noted { asked: millis(caching.asked), tags: tags.into() };
    let mut meta = CacheMeta::new(lease.fresh_until, now, seconds(lease.while_revalidate), seconds(lease.if_error), header);
    meta.set_epoch_override(lease.epoch);
    meta.extensions_mut().insert(noted);
    caching.filling = true;
    Ok(RespCacheable::Cacheable(meta))
}

fn not(why: WhyNot) -> RespCacheable {
    RespCacheable::Uncacheable(match why {
        // The next of those who wait tries, and not all of them at once.
        WhyNot::Error => NoCacheReason::UpstreamError,
        why => NoCacheReason::Custom(why.label()),
    })
}

/// Is it of no use to remember that a response was not stored for this reason?
pub fn passes(label: &'static str) -> bool {
    WhyNot::ALL.iter().find(|why| why.label() == label).is_none_or(|why| !why.lasts())
}

/// What a 304 says takes the place of what was stored.
fn freshen(header: &mut ResponseHeader, validated: &ResponseHeader) -> Result<()> {
    for name in validated.headers.keys().filter(|name| reuse::freshens(name)) {
        header.remove_header(name);
        for value in validated.headers.get_all(name) {
            header.append_header(name.clone(), value.clone())?;
        }
    }
    Ok(())
}

/// May what is stale be served: while it is fetched again, or, with an error, since that was all?
pub fn may_be_stale(session: &mut Session, ctx: &mut Context, error: Option<&Error>) -> bool {
    let Some(error) = error else {
        as_first(session);
        return true;
    };
    if ctx.stopped.is_some() || *error.esource() == ErrorSource::Downstream {
        return false;
    }
    let Some(caching) = &mut ctx.caching else { return false };
    // The engine asks as soon as it sees a 5xx; but then there may be other regions left.
    if matches!(error.etype(), ErrorType::HTTPStatus(_)) && !caching.fails {
        return false;
    }
    caching.fails = true;
    true
}

/// The engine makes its own request of this one to fetch it again, and writes it down as HTTP/1.1 has it.
fn as_first(session: &mut Session) {
    let host = session.req_header().uri.authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok());
    if session.as_downstream().is_http2()
        && let Some(host) = host
    {
        let request = session.req_header_mut();
        request.set_version(Version::HTTP_11);
        if let Err(error) = request.insert_header(header::HOST, host) {
            tracing::debug!(%error, "what is stale is not fetched again");
        }
    }
}

/// A response that was on its way into the store is given up for another: the engine takes only one.
pub fn give_up(session: &mut Session, ctx: &mut Context) {
    if ctx.caching.as_mut().is_some_and(|caching| std::mem::take(&mut caching.filling)) && session.cache.enabled() {
        session.cache.disable(NoCacheReason::UpstreamError);
    }
}

/// After an unsafe request what it changed is not what is stored any more (RFC 9111, section 4.4).
pub fn invalidate(session: &Session, ctx: &Context, response: &ResponseHeader, store: &Store) {
    let request = session.req_header();
    let succeeded = response.status.is_success() || response.status.is_redirection();
    if is_safe(&request.method) || !ctx.live.snapshot.cache.is_used || !succeeded {
        return;
    }
    let host = host(session);
    let (path, query) = (request.uri.path(), request.uri.query());
    let mut keys: SmallVec<[Key; 3]> = stored_under(session, ctx, path, query).into_iter().collect();
    for name in [header::LOCATION, header::CONTENT_LOCATION] {
        let location = response.headers.get(name).and_then(|value| value.to_str().ok());
        let Some(target) = location.and_then(|location| same_host_target(location, host, path)) else { continue };
        let (path, query) = target.split_once('?').map_or((&*target, None), |(path, query)| (path, Some(query)));
        keys.extend(stored_under(session, ctx, path, query));
    }
    let now = millis(SystemTime::now());
    for key in keys {
        ctx.live.snapshot.cache.known.invalidated.add(Key::url(&key.primary), now);
        store.remove(key.hash);
    }
}

/// Under which key the response to a GET of a target is stored.
fn stored_under(session: &Session, ctx: &Context, path: &str, query: Option<&str>) -> Option<Key> {
    let request_id = ctx.request_id.to_str().unwrap_or("-");
    let given = Given { has_body: false, body: Seen::Unread, request_id, chance: ctx.chance };
    let facts = Facts { path, query, ..facts(session, given) };
    decide::stored_under(&ctx.live.snapshot, &facts, ctx.decision.as_ref()?, clock::now())
}

/// What the cache did with the request.
pub fn status(session: &Session, ctx: &Context) -> Option<Status> {
    if ctx.refusal == Some(Refusal::NotCached) {
        return Some(Status::OnlyIfCached);
    }
    let decision = ctx.decision.as_ref()?;
    match decision.bypass {
        Some(Bypass::Method) => return Some(Status::Method),
        Some(Bypass::Rule(_) | Bypass::Request) => return Some(Status::Bypass),
        None => {}
    }
    let lookup = decision.cache.as_deref()?;
    if lookup.no_store {
        return Some(Status::Request);
    }
    let caching = ctx.caching.as_ref()?;
    Some(match session.cache.phase() {
        CachePhase::Hit => Status::Hit,
        CachePhase::StaleUpdating => Status::Stale,
        CachePhase::Stale => Status::StaleError,
        _ if caching.too_old => Status::Request,
        CachePhase::Revalidated | CachePhase::RevalidatedNoCache(_) => Status::Revalidated,
        CachePhase::Expired => Status::Expired,
        _ if caching.bypassed => Status::Bypass,
        _ if caching.found => Status::VaryMiss,
        CachePhase::Miss | CachePhase::Bypass | CachePhase::Disabled(_) | CachePhase::Uninit | CachePhase::CacheKey => {
            Status::Miss
        }
    })
}

/// Tells the client what the cache did, and gives it what is its own.
pub fn tell(session: &Session, response: &mut ResponseHeader, ctx: &mut Context) -> Result<()> {
    if in_force(ctx) {
        for name in TAG_FIELDS {
            response.remove_header(name);
        }
    }
    let Some(status) = status(session, ctx) else { return Ok(()) };
    ctx.cached = Some(status);
    let phase = session.cache.phase();
    let meta = session.cache.maybe_cache_meta();
    let filled = matches!(phase, CachePhase::Miss | CachePhase::Expired) && meta.is_some();
    let used = matches!(status, Status::Hit | Status::Stale | Status::StaleError)
        || matches!(phase, CachePhase::Revalidated | CachePhase::RevalidatedNoCache(_));
    let last = ctx.planned().and_then(|plan| plan.tries.last()).and_then(|last| last.outcome.status());
    let told = Told {
        status,
        forward_status: last.filter(|last| *last != response.status.as_u16()),
        ttl: meta.filter(|_| filled || used).map(|meta| seconds_until(meta.fresh_until(), SystemTime::now())),
        stored: filled || matches!(phase, CachePhase::Revalidated),
        collapsed: session.cache.lock_duration().is_some(),
        why: ctx.caching.as_ref().and_then(|caching| caching.why),
    };
    if used && let Some(meta) = meta {
        response.insert_header(header::AGE, meta.age().as_secs())?;
    }
    if let Some(caching) = &mut ctx.caching {
        caching.waiting = None;
        if filled {
            for (name, value) in caching.own.drain(..) {
                response.append_header(name, value)?;
            }
        }
    }
    // Of what is not stored the origin's word stands: it may be somebody's own.
    let policy = lookup(ctx).map(|lookup| ctx.live.snapshot.cache.policy(&lookup.applied));
    let stored = told.stored || matches!(status, Status::Hit | Status::Stale | Status::StaleError);
    let browser = policy.and_then(|policy| policy.browser).filter(|_| stored);
    if let Some(ttl) = browser.filter(|_| response.status.is_success() || response.status.as_u16() == 304) {
        response.insert_header(header::CACHE_CONTROL, format!("max-age={}", ttl.as_secs()))?;
        response.remove_header(&header::EXPIRES);
    }
    response.append_header(CACHE_STATUS, told.field())?;
    Ok(())
}

/// Passes an interim response on (RFC 9110, section 15.2): the engine loses those of what it stores. Over HTTP/2 it has
/// no way for them.
pub async fn interim(session: &mut Session, response: &ResponseHeader) -> Result<()> {
    let HttpSession::H1(downstream) = session.as_downstream_mut() else { return Ok(()) };
    downstream.set_ignore_info_resp(false);
    let written = downstream.write_response_header(Box::new(response.clone())).await;
    // What the engine keeps of it is not sent a second time.
    downstream.set_ignore_info_resp(true);
    written.map_err(|error| error.into_down())
}

/// Does the client have it already?
pub fn not_modified(session: &Session, response: &ResponseHeader) -> bool {
    let request = session.req_header();
    reuse::not_modified(&request.method, &request.headers, response.status.as_u16(), &response.headers)
}

/// Is it answered from the store or not at all?
pub fn only_if_cached(ctx: &Context) -> bool {
    lookup(ctx).is_some_and(|lookup| lookup.only_if_cached)
}

/// Is the store still to be asked, or was it asked for nothing?
pub fn undecided(ctx: &Context) -> bool {
    matches!(ctx.decision.as_ref().map(|d| &d.next), Some(Next::Lookup))
}

/// The URL that a `PURGE` request purges, as the key of what is stored has it.
pub fn purged_url(session: &Session, ctx: &Context) -> String {
    let uri = &session.req_header().uri;
    match stored_under(session, ctx, uri.path(), uri.query()) {
        Some(key) => Key::url(&key.primary).to_owned(),
        // Nothing is stored for it now; there may be what was stored by another config.
        None => format!("{}{}", host(session).to_ascii_lowercase(), uri.path_and_query().map_or("/", |target| target.as_str())),
    }
}
