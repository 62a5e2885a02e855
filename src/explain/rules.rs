//! What rules and transforms made of the request, each with the values that it compared.

use serde::Serialize;

use crate::decide::{Decision, Next, asker, rewritten};
use crate::limits::{Decision as Said, Limit, Seen, Stage};
use crate::request::{Facts, Moment};
use crate::respond::Refusal;
use crate::rules::view::Target;
use crate::rules::{Filter, View};
use crate::snapshot::Snapshot;
use crate::transforms::{Change, Rewritten};
use crate::waf::{Action, CLEARED};

/// What the firewall made of the request.
#[derive(Debug, Default, Serialize)]
pub struct Firewall {
    /// The client's threat score, 0 to 100, if there are rules.
    pub threat_score: Option<u8>,
    /// Every rule of the operator's, in order.
    pub rules: Vec<RuleSeen>,
    /// What the managed ruleset found, if it is on: nothing, or a rule and where.
    pub managed: Option<String>,
}

/// A rule, and what became of it.
#[derive(Debug, Serialize)]
pub struct RuleSeen {
    /// Its name.
    pub id: String,
    /// What it would do.
    pub action: &'static str,
    /// What it did: its action, `log`, `cleared`, `no match` or `not reached`.
    pub outcome: String,
    /// Its expression.
    pub expression: String,
    /// What the expression compares, with the values of this request.
    pub operands: Vec<OperandSeen>,
}

/// What an expression compares.
#[derive(Debug, Serialize)]
pub struct OperandSeen {
    /// As the expression writes it.
    pub operand: String,
    /// Its value; nothing if it is missing.
    pub value: Option<String>,
}

/// The conditions of redirects and transforms, in order, with the values that they compared.
pub(super) fn conditions(snapshot: &Snapshot, facts: &Facts<'_>, decision: &Decision, now: Moment) -> Vec<RuleSeen> {
    let asker = asker(snapshot, &decision.client, &decision.place, now);
    let mut target = Target::new(facts);
    let view = View::new(facts, &target, asker);
    let mut all = Vec::new();
    for (n, redirect) in snapshot.transforms.redirects.iter().enumerate() {
        all.extend(redirect.filter.as_ref().map(|f| condition(format!("redirects.{n}"), "redirect", f, &view)));
    }
    for (n, transform) in snapshot.transforms.transforms.iter().enumerate().filter(|(_, t)| !t.after) {
        let view = View::new(facts, &target, asker);
        all.extend(transform.filter.as_ref().map(|f| condition(format!("transforms.{n}"), "transform", f, &view)));
        if let Some(Rewritten { path, query }) = snapshot.transforms.rewrite(n, &view) {
            drop(view);
            target.rewrite(path, query);
        }
    }
    all
}

fn condition(id: String, action: &'static str, filter: &Filter, view: &View<'_>) -> RuleSeen {
    let operands = filter.operands(view, false).into_iter();
    RuleSeen {
        id,
        action,
        outcome: if filter.matches(view) { "matches" } else { "no match" }.to_owned(),
        expression: filter.source().to_owned(),
        operands: operands.map(|seen| OperandSeen { operand: seen.operand, value: seen.value }).collect(),
    }
}

/// What transforms change.
#[derive(Debug, Serialize)]
pub struct Transformed {
    /// Path and query for the origin, if they are rewritten.
    pub target: Option<String>,
    /// Headers for the origin, as `set NAME: VALUE` or `remove NAME`.
    pub headers: Vec<String>,
}

/// What the rules made of it.
pub(super) fn firewall(snapshot: &Snapshot, facts: &Facts<'_>, decision: &Decision, now: Moment) -> Firewall {
    let Some(route) = decision.route.and_then(|m| snapshot.route(m.route)).filter(|_| !snapshot.waf.is_empty()) else {
        return Firewall::default();
    };
    let asker = asker(snapshot, &decision.client, &decision.place, now);
    let (target, _) = rewritten(snapshot, facts, asker, Target::new(facts));
    let mut view = View::new(facts, &target, asker);
    view.route = Some(&route.name);
    // Rules that follow, and the managed ones: skipping the rest leaves the latter.
    // What is too much at once is let go before.
    let shed = matches!(decision.next, Next::Refuse(Refusal::Shed { .. }));
    let (mut rest, mut reached) = (!shed, !shed);
    let rule = |rule: &crate::waf::Rule| {
        let operands = rule.filter.operands(&view, false).into_iter();
        let operands = operands.map(|seen| OperandSeen { operand: seen.operand, value: seen.value }).collect();
        let done = decision.matches.iter().find(|m| m.rule == rule.id);
        let outcome = match (rest, done) {
            (false, _) => "not reached",
            (true, Some(done)) => done.action,
            (true, None) => "no match",
        };
        let stops = match &rule.action {
            Action::Log => false,
            Action::Skip(skips) => skips.rest,
            Action::Block(_) | Action::Challenge(_) | Action::Redirect(_) => true,
        };
        let ended = stops && done.is_some_and(|d| d.action != CLEARED) && !rule.log_only;
        rest = rest && !ended;
        reached = reached && (!ended || matches!(rule.action, Action::Skip(_)));
        RuleSeen {
            id: rule.id.to_string(),
            action: rule.action.label(),
            outcome: outcome.to_owned(),
            expression: rule.filter.source().to_owned(),
            operands,
        }
    };
    let rules: Vec<_> = snapshot.waf.rules.iter().map(rule).collect();
    let stops = |seen: &Seen| !matches!(seen.decision, Said::Allowed | Said::Logged);
    // Those of what the origin gets are asked behind the managed ruleset.
    let early = |seen: &Seen| snapshot.limits.rule(seen).is_some_and(|limit| limit.stage() == Stage::Arrival);
    let limited = decision.limits.seen.last().is_some_and(|seen| stops(seen) && early(seen));
    let managed = snapshot.waf.managed.as_ref().map(|_| {
        let known = |id: &str| snapshot.waf.rules.iter().any(|r| *r.id == *id);
        match decision.matches.iter().find(|m| !known(&m.rule)) {
            Some(m) => {
                let input = m.seen.first().and_then(|s| s.value.as_deref()).unwrap_or_default();
                format!("{} ({}): {} in {input}", m.rule, m.action, crate::waf::managed::reason(&m.rule))
            }
            None if !reached || limited => "not reached".to_owned(),
            None => "nothing found".to_owned(),
        }
    });
    Firewall { threat_score: Some(view.threat_score()), rules, managed }
}

/// A limit, and what it makes of the request.
#[derive(Debug, Serialize)]
pub struct LimitSeen {
    /// Its name.
    pub id: String,
    /// What it does with what is too much.
    pub action: &'static str,
    /// What it allows.
    pub quota: String,
    /// What is counted apart, for this request; nothing if the limit was not asked.
    pub key: Option<String>,
    /// What it says: what is left, `does not apply` or `not reached`.
    pub outcome: String,
    /// What is left, if it was asked.
    pub left: Option<u32>,
}

/// What the limits made of it.
pub(super) fn limits(snapshot: &Snapshot, facts: &Facts<'_>, decision: &Decision, now: Moment) -> Vec<LimitSeen> {
    let (Some(route), Some(ledger)) = (decision.route.and_then(|m| snapshot.route(m.route)), &snapshot.limits.ledger) else {
        return Vec::new();
    };
    let asker = asker(snapshot, &decision.client, &decision.place, now);
    let (target, _) = rewritten(snapshot, facts, asker, Target::new(facts));
    let mut view = View::new(facts, &target, asker);
    view.route = Some(&route.name);
    let seen_last = decision.limits.seen.last().map(|seen| usize::from(seen.limit));
    let limit = |(n, limit): (usize, &Limit)| {
        let seen = decision.limits.seen.iter().find(|seen| usize::from(seen.limit) == n);
        let outcome = match seen {
            Some(seen) => limit.said(seen),
            None if decision.limits.is_done(limit.stage()) => "does not apply".to_owned(),
            None if seen_last
                .is_some_and(|last| n < last && snapshot.limits.rules.get(last).is_some_and(|l| l.stage() == limit.stage())) =>
            {
                "does not apply".to_owned()
            }
            None => "not reached".to_owned(),
        };
        LimitSeen {
            id: limit.id.to_string(),
            action: limit.action_in_words(),
            quota: limit.quota_in_words(),
            key: seen.map(|_| limit.describe(snapshot.limits.prefixes, ledger, &view).to_string()),
            outcome,
            left: seen.map(|seen| seen.left),
        }
    };
    snapshot.limits.rules.iter().enumerate().map(limit).collect()
}

/// What transforms change of it.
pub(super) fn transformed(snapshot: &Snapshot, decision: &Decision) -> Option<Transformed> {
    let changes = decision.changes.as_ref()?;
    let shown = |change: &Change| match change {
        Change::Set(name, value) => format!("set {name}: {}", value.as_bytes().escape_ascii()),
        Change::Remove(name) => format!("remove {name}"),
    };
    let hidden = |text: String| snapshot.secrets.hide(&text);
    let target = changes.target.clone().map(hidden);
    Some(Transformed { target, headers: changes.headers.iter().map(shown).map(hidden).collect() })
}
