//! Asks [`decide`](crate::decide) about a request, and fetches what it is missing: a body, an answer of all nodes.

use std::time::Duration;

use pingora::Result;
use pingora::proxy::Session;

use super::answer::{fresh_id, given_id};
use super::edge::Context;
use super::facts::{Given, facts, misdirected};
use super::{body, clock, stream};
use crate::decide::{Decision, Earlier, Next, decide, resume};
use crate::request::{Body, Facts, Seen};
use crate::snapshot::Snapshot;
use crate::state::State;
use crate::upstream::plan::Mode;

/// How long a body may take that is asked for before a route is known.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(60);

/// What becomes of the request. An error: its client left, or never sent its body.
pub async fn decided(session: &mut Session, ctx: &mut Context, state: &State) -> Result<Decision> {
    let has_body = !session.as_downstream_mut().is_body_empty();
    let fresh = fresh_id();
    let request_id = fresh.to_str().unwrap_or("-");
    let live = ctx.live.clone();
    let snapshot = &live.snapshot;
    let seen = if has_body { Seen::Unread } else { Seen::Read(Body::default()) };
    let mut given = Given { has_body, body: seen, request_id, chance: ctx.chance };
    let read;
    let (misdirected, fault) = (misdirected(session, snapshot), stream::fault(session, &snapshot.connections));
    let first = &Facts { misdirected, fault, ..facts(session, given) };
    let mut decision = match session.subrequest_ctx {
        None => decide(snapshot, first, ctx.started, Mode::Commit),
        // What is fetched anew in the background was asked for by somebody who passed.
        Some(_) => resume(snapshot, first, ctx.started, Mode::Commit, Some(Earlier::background())),
    };
    loop {
        match decision.next {
            Next::NeedBody if matches!(given.body, Seen::Unread) => {
                let route = decision.route.and_then(|m| snapshot.route(m.route));
                let patience = route.map_or(DEFAULT_PATIENCE, |r| r.timeouts.idle);
                // Should the body never come, the log knows whose it was.
                ctx.request_id = given_id(session, decision.client.trusted_peer).unwrap_or(fresh.clone());
                let earlier = Earlier::of(&mut decision);
                ctx.decision = Some(decision);
                read = body::read(session, snapshot.waf.body_limit, patience).await?;
                ctx.body_read = read.is_some();
                given.body = match &read {
                    Some(bytes) => Seen::Read(Body { bytes, truncated: false, size: bytes.len() as u64 }),
                    None => Seen::Later,
                };
                // The client's time is not the origin's: `timeouts.total` begins here.
                decision = resume(snapshot, &facts(session, given), clock::now(), Mode::Commit, Some(earlier));
                break;
            }
            Next::NeedShared(_) => decision = shared(session, snapshot, given, state, decision).await,
            Next::NeedBody | Next::Lookup | Next::Refuse(_) | Next::Forward(_) => break,
        }
    }
    while let Next::NeedShared(_) = decision.next {
        decision = shared(session, snapshot, given, state, decision).await;
    }
    ctx.request_id = given_id(session, decision.client.trusted_peer).unwrap_or(fresh);
    Ok(decision)
}

/// What becomes of a request for which the store had nothing. It has no body, or it would not have been looked up.
pub async fn missed(session: &Session, ctx: &mut Context, state: &State) -> Decision {
    let live = ctx.live.clone();
    let request_id = ctx.request_id.clone();
    let request_id = request_id.to_str().unwrap_or("-");
    let given = Given { has_body: false, body: Seen::Read(Body::default()), request_id, chance: ctx.chance };
    let earlier = ctx.decision.as_mut().map(|decision| Earlier { missed: true, ..Earlier::of(decision) });
    // Whoever waited for another one's answer has all of `timeouts.total` from here.
    let mut decision = resume(&live.snapshot, &facts(session, given), clock::now(), Mode::Commit, earlier);
    while let Next::NeedShared(_) = decision.next {
        decision = shared(session, &live.snapshot, given, state, decision).await;
    }
    decision
}

/// Goes on with what all nodes together say.
async fn shared(session: &Session, snapshot: &Snapshot, given: Given<'_>, state: &State, mut decision: Decision) -> Decision {
    let mut earlier = Earlier::of(&mut decision);
    if let Next::NeedShared(question) = decision.next {
        earlier.limits.answer = Some(state.ask(question).await);
    }
    resume(snapshot, &facts(session, given), clock::now(), Mode::Commit, Some(earlier))
}
