//! May it pass: the firewall's rules, the limits, and what the client gets that one of them stopped.

use http::HeaderValue;

use super::{Decision, asker, rewritten};
use crate::client::address::ClientAddress;
use crate::client::standing::Deed;
use crate::limits::{self, Asked, Decision as Said, Solved, Stage, Verdict};
use crate::request::{Facts, Moment, argument};
use crate::respond::Refusal;
use crate::rules::View;
use crate::rules::view::Target;
use crate::snapshot::Snapshot;
use crate::upstream::plan::Mode;
use crate::waf::challenge::{self, Clearance, Client, Kind, Level};
use crate::waf::{Action, Findings, Matches, Ruling};

/// Asks the operator's rules.
pub(super) fn judge(snapshot: &Snapshot, view: &View<'_>, findings: &mut Findings) -> Ruling {
    snapshot.waf.judge(view, |kind| cleared(snapshot, view, kind).is_some(), findings)
}

/// What the client's clearance says, if it counts for challenges of this kind.
fn cleared(snapshot: &Snapshot, view: &View<'_>, kind: Kind) -> Option<Clearance> {
    let cookie = view.facts.cookie(challenge::cookie_name(view.facts.tls))?;
    let clearance = challenge::cleared(cookie, &snapshot.key, asking(view), view.facts.time, snapshot.waf.challenge)?;
    kind.accepts(clearance.level).then_some(clearance)
}

/// Asks the limits of a stage. A refusal, if there is one; or what all nodes have to be asked.
pub(super) fn limit(snapshot: &Snapshot, view: &View<'_>, stage: Stage, mode: Mode, asked: &mut Asked) -> Result<(), Limited> {
    let solved = |kind| {
        let Clearance { level: _, rule, made } = cleared(snapshot, view, kind)?;
        let ago = view.facts.time.saturating_sub(made);
        Some(Solved { tag: rule, made: Moment(view.asker.now.0.saturating_sub(ago)) })
    };
    let first = match snapshot.limits.judge(view, stage, mode == Mode::Peek, solved, asked) {
        Verdict::Pass => return Ok(()),
        Verdict::Ask(question) => return Err(Limited::Ask(question)),
        Verdict::Stop { first } => first,
    };
    let Some((seen, limit)) = asked.seen.last().and_then(|seen| Some((seen, snapshot.limits.rule(seen)?))) else {
        return Ok(());
    };
    // Once for each time that a client goes too far; and not by a limit that asks for the score itself.
    let standing = limit.filter.as_ref().is_some_and(|f| f.uses().standing());
    if mode == Mode::Commit && first && !standing && seen.decision != Said::Unavailable {
        snapshot.standing.note(view.asker.ip, Deed::OverLimit, view.asker.now);
    }
    let over = Refusal::OverLimit {
        limit: seen.limit,
        status: match &limit.action {
            limits::Action::Block(answer) => answer.status,
            limits::Action::Challenge(_) | limits::Action::Log => 429,
        },
        retry_after: seen.wait,
    };
    Err(Limited::Refused(match (&limit.action, seen.decision) {
        (_, Said::Unavailable) => (Refusal::LimitUnavailable, None),
        (limits::Action::Challenge(kind), _) => challenged(snapshot, view, *kind, limit.tag | u32::from(seen.generation), mode),
        (limits::Action::Block(_) | limits::Action::Log, _) => (over, None),
    }))
}

/// What limits made of a request.
pub(super) enum Limited {
    /// It is answered here.
    Refused((Refusal, Option<HeaderValue>)),
    /// All nodes have to be asked first.
    Ask(limits::Question),
}

/// Whom a challenge is for.
fn asking<'a>(view: &View<'a>) -> Client<'a> {
    Client { ip: view.asker.ip, agent: view.header(&http::header::USER_AGENT) }
}

/// Looks at a body that was too long to wait for, on its way: `facts` has it now. A refusal, if there is one.
pub fn inspect(snapshot: &Snapshot, facts: &Facts<'_>, decision: &mut Decision, now: Moment) -> Option<Refusal> {
    let place = decision.place;
    let asker = asker(snapshot, &decision.client, &place, now);
    let (target, _) = rewritten(snapshot, facts, asker, Target::new(facts));
    let mut view = View::new(facts, &target, asker);
    view.route = decision.route.and_then(|m| snapshot.route(m.route)).map(|r| &*r.name);
    let mut findings = Findings { later: decision.later, ..Findings::default() };
    let ruling = match judge(snapshot, &view, &mut findings) {
        Ruling::Pass => snapshot.waf.judge_managed(&view, &mut findings),
        other => other,
    };
    let known = |m: &crate::waf::Match| decision.matches.iter().any(|k| k.rule == m.rule);
    let new: Matches = findings.matches.into_iter().filter(|m| !known(m)).collect();
    decision.matches.extend(new);
    match ruling {
        Ruling::Pass | Ruling::NeedBody => None,
        stopped => {
            let (refusal, header) = stop(snapshot, &view, stopped, Mode::Commit);
            decision.header = header;
            Some(refusal)
        }
    }
}

/// What the client gets that a rule stopped.
pub(super) fn stop(snapshot: &Snapshot, view: &View<'_>, ruling: Ruling, mode: Mode) -> (Refusal, Option<HeaderValue>) {
    let commit = mode == Mode::Commit;
    let blocked = |rule: Option<u16>, status| {
        // What a client was blocked for because of its score would keep that score up for ever.
        let by = rule.and_then(|n| snapshot.waf.rules.get(usize::from(n)));
        if commit && by.is_none_or(|rule| !rule.filter.uses().standing()) {
            snapshot.standing.note(view.asker.ip, Deed::Blocked, view.asker.now);
        }
        (Refusal::Blocked { rule, status }, None)
    };
    let Ruling::Stop(position) = ruling else { return blocked(None, 403) };
    let Some(rule) = snapshot.waf.rules.get(usize::from(position)) else { return blocked(None, 403) };
    match &rule.action {
        Action::Block(answer) => blocked(Some(position), answer.status),
        Action::Redirect(location) => match location.render(view) {
            Some(header) => (Refusal::Redirected { status: location.status }, Some(header)),
            // A place that cannot be told is no place to go on from.
            None => blocked(None, 403),
        },
        Action::Challenge(kind) => challenged(snapshot, view, *kind, rule.tag, mode),
        // These stop nothing.
        Action::Log | Action::Skip(_) => blocked(None, 403),
    }
}

/// A challenge of this kind, for the rule or limit that `tag` stands for.
fn challenged(snapshot: &Snapshot, view: &View<'_>, kind: Kind, tag: u32, mode: Mode) -> (Refusal, Option<HeaderValue>) {
    let score = view.threat_score();
    let bits = snapshot.challenges.bits(snapshot.waf.challenge, kind, score, view.asker.now);
    let token = challenge::Token {
        made: view.facts.time,
        bits,
        rule: tag,
        nonce: crate::request::mix(view.facts.chance),
        waits: kind.waits(score),
    };
    if mode == Mode::Commit {
        snapshot.challenges.count(view.asker.now);
    }
    let signed = token.sign(&snapshot.key, asking(view));
    (Refusal::Challenged { bits, waits: token.waits }, HeaderValue::from_str(&signed).ok())
}

/// An answer to a challenge, and the cookie that it earns.
pub(super) fn answered(
    snapshot: &Snapshot,
    facts: &Facts<'_>,
    client: &ClientAddress,
    now: Moment,
    mode: Mode,
) -> (Refusal, Option<HeaderValue>) {
    let asking = Client { ip: client.ip, agent: facts.headers.get(http::header::USER_AGENT).map_or(&b""[..], |v| v.as_bytes()) };
    let commit = mode == Mode::Commit;
    // Whoever is led here by another site's link or picture did nothing: only what a page of ours sends counts.
    let solved = facts.method == http::Method::POST;
    let waited = facts.method == http::Method::GET;
    let token = match (solved, waited) {
        (true, _) => facts.header(challenge::TOKEN),
        (_, true) => argument(facts.query, "t"),
        (false, false) => None,
    };
    let solution = if solved { Some(facts.header(challenge::SOLUTION).unwrap_or_default()) } else { None };
    let answer = challenge::Answer { token: token.unwrap_or_default(), solution };
    let known = |tag| snapshot.waf.challenged_by(tag).is_some() || snapshot.limits.challenged_by(tag);
    match answer.check(&snapshot.key, asking, &snapshot.challenges, facts.time, known, commit) {
        Ok((level, token)) => {
            if commit && level == Level::Computed {
                snapshot.standing.note(client.ip, Deed::ChallengeSolved, now);
            }
            let cookie =
                challenge::clearance(level, &token, &snapshot.key, asking, facts.time, snapshot.waf.challenge, facts.tls);
            (Refusal::ChallengePassed { waited: level == Level::Waited }, HeaderValue::from_str(&cookie).ok())
        }
        Err(wrong) => {
            use challenge::Wrong::{Forged, Spent, Unsolved};
            // Who is late, or comes back to an old page, did nothing bad.
            if commit && solved && matches!(wrong, Forged | Unsolved | Spent) {
                snapshot.standing.note(client.ip, Deed::ChallengeFailed, now);
            }
            (Refusal::ChallengeFailed { wrong }, None)
        }
    }
}
