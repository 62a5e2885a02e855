//! Headers: what the origin is told of the client, and what the client gets beside the response.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::prelude::{BASE64_STANDARD, Engine};
use http::{HeaderName, HeaderValue, Version, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::proxy::Session;
use pingora::{Error, ErrorType, Result};
use rustls::pki_types::CertificateDer;
use smallvec::SmallVec;

use super::edge::{Context, REQUEST_ID};
use super::facts::{Given, cookie, facts, host, peer};
use super::{clock, stream};
use crate::cache::is_unkeyed;
use crate::decide::{Changes, WROTE, responded};
use crate::observe::trace::{TRACEPARENT, TRACESTATE};
use crate::regions::Affinity;
use crate::regions::steering::Why;
use crate::request::{Seen, is_safe};
use crate::respond::headers::{Pass, RESPONSE_HOP_BY_HOP, pass};
use crate::routes::Route;
use crate::rules::view::Response;
use crate::signing::same;
use crate::transforms::Change;
use crate::upstream::plan::upstream;
use crate::upstream::{Plan, replay};

/// Limits and what is left of them (draft-ietf-httpapi-ratelimit-headers).
pub const RATE_LIMIT_POLICY: &str = "RateLimit-Policy";
/// What is left of them.
pub const RATE_LIMIT: &str = "RateLimit";

/// Replaces what the client says of itself by what is known, and adds what the origin wants to know.
pub fn to_origin(session: &mut Session, request: &mut RequestHeader, ctx: &Context) -> Result<()> {
    let Some(decision) = &ctx.decision else { return Ok(()) };
    let trusted = decision.client.trusted_peer;
    let header = &ctx.live.snapshot.trust.header;
    let lookup = decision.cache.as_deref();
    let keyed = lookup.and_then(|lookup| Some(&*ctx.live.snapshot.cache.policy(&lookup.applied).key?.headers));
    let unkeyed = |name: &HeaderName| lookup.is_some() && is_unkeyed(name.as_str(), keyed.unwrap_or_default());
    let drops = |name: &&HeaderName| pass(name.as_str(), header.as_str(), trusted) == Pass::Drop || unkeyed(name);
    let dropped: SmallVec<[HeaderName; 8]> = request.headers.keys().filter(drops).cloned().collect();
    for name in &dropped {
        request.remove_header(name);
    }

    let secured = stream::secured(session);
    if let Some([own, chain @ ..]) = secured.map(|secured| &*secured.client) {
        // RFC 9440, section 2: bytes as RFC 8941 writes them, and the chain without the certificate itself.
        let bytes = |der: &CertificateDer<'_>| format!(":{}:", BASE64_STANDARD.encode(der));
        request.insert_header("Client-Cert", bytes(own))?;
        if !chain.is_empty() {
            let chain: Vec<String> = chain.iter().map(bytes).collect();
            request.insert_header("Client-Cert-Chain", chain.join(", "))?;
        }
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
        let scheme = if secured.is_some() { "https" } else { "http" };
        request.insert_header("X-Forwarded-Proto", HeaderValue::from_static(scheme))?;
    }
    if !request.headers.contains_key("x-forwarded-host") {
        request.insert_header("X-Forwarded-Host", host(session))?;
    }
    request.insert_header(REQUEST_ID, &ctx.request_id)?;
    let mut client = SmallVec::<[u8; 64]>::new();
    write(&mut client, decision.client.ip);
    request.insert_header("CF-Connecting-IP", client.as_slice())?;
    request.insert_header("CF-IPCountry", decision.place.country.as_str())?;
    request.insert_header("Portolan-Country", decision.place.country.as_str())?;
    if let Some(region) = ctx.region() {
        request.insert_header("Portolan-Region", region)?;
    }

    if let Some((trace, plan)) = ctx.trace.as_ref().zip(ctx.planned()) {
        request.insert_header(TRACEPARENT, trace.parent_of(plan.tries.len().saturating_sub(1)))?;
        if !trace.is_continued() {
            request.remove_header(TRACESTATE);
        }
    } else if ctx.live.snapshot.tracing.is_some() {
        // What is fetched in the background belongs to no trace of anybody's.
        request.remove_header(TRACEPARENT);
        request.remove_header(TRACESTATE);
    }

    let attempt = ctx.planned().and_then(|p| p.tries.last());
    let chosen = attempt.and_then(|t| upstream(&ctx.live.snapshot.regions, t.region, t.upstream));
    if let Some(host) = chosen.and_then(|u| u.host.as_ref()) {
        request.insert_header(header::HOST, host)?;
    }
    if ctx.body_read {
        // The client was told to go on already.
        request.remove_header(&header::EXPECT);
    }
    if ctx.route().is_some_and(|route| route.grpc_web) && is_grpc(request) {
        // Calls need it, and the engine keeps it only for clients that speak HTTP/2.
        request.insert_header(header::TE, "trailers")?;
    }
    replayed(request, ctx)?;
    match &decision.changes {
        Some(changes) => transformed(request, changes),
        None => Ok(()),
    }
}

/// Is it a call?
pub fn is_grpc(request: &RequestHeader) -> bool {
    request.headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// What transforms change for the origin.
fn transformed(request: &mut RequestHeader, changes: &Changes) -> Result<()> {
    for change in &changes.headers {
        match change {
            Change::Set(name, value) => request.insert_header(name, value)?,
            Change::Remove(name) => drop(request.remove_header(name)),
        }
    }
    let Some(target) = &changes.target else { return Ok(()) };
    let mut parts = request.uri.clone().into_parts();
    let (has_authority, parsed) = (parts.authority.is_some(), target.parse());
    match (has_authority, parsed) {
        (true, Ok(target)) => {
            parts.path_and_query = Some(target);
            if let Ok(uri) = http::Uri::from_parts(parts) {
                request.set_uri(uri);
            }
            Ok(())
        }
        _ => request.set_raw_path(target.as_bytes()),
    }
}

/// Browsers come over TLS from now on (RFC 6797, section 7.2: said over TLS alone, or else it is not believed).
pub fn hsts(session: &Session, response: &mut ResponseHeader, ctx: &Context) -> Result<()> {
    match ctx.route().and_then(|route| route.hsts.as_ref()).filter(|_| stream::secured(session).is_some()) {
        Some(value) => response.insert_header(header::STRICT_TRANSPORT_SECURITY, value),
        None => Ok(()),
    }
}

/// What transforms change for the client.
pub fn to_client(session: &Session, response: &mut ResponseHeader, ctx: &Context) -> Result<()> {
    let snapshot = &ctx.live.snapshot;
    let Some(decision) = &ctx.decision else { return Ok(()) };
    if let Some((policy, state)) = snapshot.limits.headers(&decision.limits) {
        response.insert_header(RATE_LIMIT_POLICY, policy)?;
        response.insert_header(RATE_LIMIT, state)?;
    }
    let edits = snapshot.transforms.edits_responses() || ctx.route().is_some_and(|route| route.rewrite.is_some());
    if !edits && !snapshot.limits.waits(&decision.limits) {
        return Ok(());
    }
    let given =
        Given { has_body: false, body: Seen::Unread, request_id: ctx.request_id.to_str().unwrap_or("-"), chance: ctx.chance };
    let facts = facts(session, given);
    let region = ctx.region().and_then(|r| r.to_str().ok()).unwrap_or_default();
    let seen = Response { status: response.status.as_u16(), headers: &response.headers, region };
    let changes = responded(snapshot, &facts, decision, seen, clock::now());
    for change in changes {
        match change {
            Change::Set(name, value) => response.insert_header(name, value)?,
            Change::Remove(name) => drop(response.remove_header(&name)),
        }
    }
    Ok(())
}

/// Who sent a replayed request here, and what became of it.
fn replayed(request: &mut RequestHeader, ctx: &Context) -> Result<()> {
    let Some(replays) = ctx.planned().and_then(|plan| plan.replays.as_ref()) else { return Ok(()) };
    let Some((region, position)) = replays.source else { return Ok(()) };
    let region = ctx.live.snapshot.region(region).map_or("", |r| &*r.name);
    let instance = format!("{region}-{position}");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let elapsed = clock::now().since(replays.began);
    let mut set = |name: &'static str, value: String| match HeaderValue::from_str(&value) {
        Ok(value) => request.insert_header(name, value),
        // A state with bytes that no header may carry came in a header, so it cannot be.
        Err(_) => Ok(()),
    };
    if let Some(failed) = replays.failed {
        return set(
            "fly-replay-failed",
            format!("instance={instance};region={region};reason={};elapsed_ms={}", failed.label(), elapsed.as_millis()),
        );
    }
    let source = replay::source(&instance, region, now.saturating_sub(elapsed), &replays.replay.state);
    set("portolan-replay-src", source.clone())?;
    set("fly-replay-src", source)
}

/// Cookies of affinity and of `read_your_writes`, where the response calls for one.
pub fn set_cookies(session: &Session, response: &mut ResponseHeader, ctx: &Context) -> Result<()> {
    let (Some(route), Some(plan)) = (ctx.route(), ctx.planned()) else { return Ok(()) };
    let mut set = |cookie: String| match HeaderValue::from_str(&cookie) {
        Ok(value) => response.append_header(header::SET_COOKIE, value).map(drop),
        Err(_) => Ok(()),
    };
    if let Some(cookie) = wrote(session, plan, route, ctx) {
        set(cookie)?;
    }
    if let Some(cookie) = affinity(session, plan, ctx) {
        set(cookie)?;
    }
    Ok(())
}

/// After a write that may have had an effect, a client's reads follow it for a while.
fn wrote(session: &Session, plan: &Plan, route: &Route, ctx: &Context) -> Option<String> {
    let span = route.steering.writes.as_ref()?.read_your_writes?;
    let written = plan.tries.last()?.outcome.status().is_some_and(|status| status < 400);
    if is_safe(&session.req_header().method) || !written {
        return None;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Whole seconds, rounded up: rather too long than too short.
    let until = now.saturating_add(span).as_secs() + 1;
    let signed = ctx.live.snapshot.key.sign(WROTE, &until.to_string());
    Some(format!("{WROTE}={signed}; Path=/; Max-Age={}; HttpOnly; SameSite=Lax", span.as_secs() + 1))
}

/// The client is told which upstream it belongs to from now on, if that changed.
fn affinity(session: &Session, plan: &Plan, ctx: &Context) -> Option<String> {
    let last = plan.tries.last()?;
    let region = ctx.live.snapshot.region(last.region)?;
    let Affinity { cookie: name, permanent, attributes } = region.affinity.as_ref()?;
    let endpoint = last.endpoint.as_ref()?;
    let has = cookie(session, name).unwrap_or_default();
    if same(&endpoint.tag, has) || region.state.is_away(clock::now()) {
        return None;
    }
    // Where a request had to go there, that says nothing of where its client belongs.
    let why = plan.order.iter().find(|c| c.region == last.region).map(|c| c.why);
    use Why::{Exploration, Forced, ReadYourWrites, Replay, Writes, WritesFailover};
    if matches!(why, None | Some(Writes | WritesFailover | ReadYourWrites | Forced | Replay | Exploration)) {
        return None;
    }
    // Its own upstream may only be away for a while, or in a region that is not asked this time.
    let mut upstreams = ctx.live.snapshot.upstreams().map(|(_, upstream)| upstream);
    let known = !has.is_empty() && upstreams.any(|u| u.state.tagged(has).is_some());
    (*permanent || !known).then(|| format!("{name}={}{attributes}", endpoint.tag))
}

/// Makes sure that every reader of an upstream's response agrees where it ends (RFC 9112, section 6.3), and what it is in.
/// What the engine's parser repairs by itself (folded lines, spaces before a colon) has been repaired before.
pub fn frame(session: &Session, response: &mut ResponseHeader) -> Result<()> {
    let wrong = |why| Err(Error::explain(ErrorType::InvalidHTTPHeader, why).into_up());
    let request = session.req_header();
    let status = response.status.as_u16();
    let is_websocket = |headers: &http::HeaderMap| {
        headers.get_all(header::UPGRADE).iter().any(|v| v.as_bytes().eq_ignore_ascii_case(b"websocket"))
    };
    if status == 101 && !(is_websocket(&request.headers) && is_websocket(&response.headers)) {
        return wrong("nobody asked for another protocol");
    }
    let mut codings = response.headers.get_all(header::TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next() {
        let chunked = coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
        if !chunked || codings.next().is_some() || response.version < Version::HTTP_11 {
            return wrong("a transfer coding that is not known here");
        }
    }
    if status < 200 || status == 204 {
        // RFC 9110, section 8.6; RFC 9112, section 6.1.
        response.remove_header(&header::CONTENT_LENGTH);
        response.remove_header(&header::TRANSFER_ENCODING);
    }
    let lengths = response.headers.get_all(header::CONTENT_LENGTH);
    // The engine has made sure that all say the same.
    if let Some(first) = lengths.iter().next().filter(|first| lengths.iter().count() > 1 || first.as_bytes().contains(&b',')) {
        let one = first.as_bytes().split(|b| *b == b',').next().unwrap_or_default().trim_ascii().to_vec();
        response.insert_header(header::CONTENT_LENGTH, one)?;
    }
    if response.version < Version::HTTP_11 {
        // RFC 9112, section 2.3: a proxy speaks for itself.
        response.set_version(Version::HTTP_11);
    }
    Ok(())
}

/// RFC 9110, section 7.6.1: what speaks of the origin's connection is not for the client.
pub fn strip_hop_by_hop(response: &mut ResponseHeader) {
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
    // It offers what nobody here speaks, unless it is the answer itself (RFC 9110, section 15.5.22).
    if !matches!(response.status.as_u16(), 101 | 426) {
        response.remove_header(&header::UPGRADE);
    }
}

fn write(to: &mut SmallVec<[u8; 64]>, value: impl std::fmt::Display) {
    // Writing to memory cannot fail.
    let _ = std::io::Write::write_fmt(to, format_args!("{value}"));
}
