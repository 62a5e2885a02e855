//! May it pass: the operator's rules in order, and the managed ruleset.

pub mod challenge;
pub mod managed;

use std::sync::Arc;

use smallvec::SmallVec;

use crate::request::{Seen, hash};
use crate::rules::trace;
use crate::rules::{Filter, View};
use crate::transforms::Location;
use challenge::Kind;
use managed::{Category, Managed};

/// The web application firewall of a configuration.
#[derive(Debug, Default)]
pub struct Waf {
    /// Rules in order.
    pub rules: Box<[Rule]>,
    /// The managed ruleset, if it is on.
    pub managed: Option<Managed>,
    /// How much of a body is looked at, in bytes.
    pub body_limit: usize,
    /// How challenges are made.
    pub challenge: challenge::Settings,
}

/// A rule.
#[derive(Debug)]
pub struct Rule {
    /// Its name.
    pub id: Arc<str>,
    /// When it applies.
    pub filter: Filter,
    /// What it does.
    pub action: Action,
    /// It only says what it would do.
    pub log_only: bool,
    /// Stands for name and expression in challenges.
    pub tag: u32,
}

/// What a rule does.
#[derive(Debug)]
pub enum Action {
    /// Refuses.
    Block(Answer),
    /// Has the browser do something first.
    Challenge(Kind),
    /// Nothing.
    Log,
    /// Leaves out what follows.
    Skip(Skips),
    /// Sends the client elsewhere.
    Redirect(Location),
}

impl Action {
    /// The metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Block(_) => "block",
            Self::Challenge(kind) => kind.label(),
            Self::Log => LOG,
            Self::Skip(_) => "skip",
            Self::Redirect(_) => "redirect",
        }
    }
}

/// The label of a match without effect.
pub const LOG: &str = "log";
/// The label of a challenge that the client had passed before.
pub const CLEARED: &str = "cleared";

/// Every label of what a rule did.
pub const ACTIONS: [&str; 8] = ["block", "challenge", "js_challenge", "managed_challenge", LOG, "skip", "redirect", CLEARED];

/// What a blocked client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// `Content-Type`.
    pub content_type: Arc<str>,
    /// The body; of our own if it is empty.
    pub body: bytes::Bytes,
}

/// What is left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Skips {
    /// The rules that follow.
    pub rest: bool,
    /// Every limit.
    pub limits: bool,
    /// Categories of the managed ruleset, as bits of [`Category`].
    pub categories: u16,
}

/// A rule that applied.
#[derive(Debug, Clone)]
pub struct Match {
    /// Its name.
    pub rule: Arc<str>,
    /// What it did: a metric label.
    pub action: &'static str,
    /// What it saw.
    pub seen: Vec<trace::Seen>,
}

/// The rules that applied; mostly none.
pub type Matches = SmallVec<[Match; 1]>;

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ruling {
    /// It may pass.
    Pass,
    /// A rule has to see the body first.
    NeedBody,
    /// A rule refuses, challenges or redirects it: its position.
    Stop(u16),
    /// The managed ruleset refuses it.
    Managed,
}

/// What was found so far, over all parts of the firewall.
#[derive(Debug, Default)]
pub struct Findings {
    /// Rules that applied.
    pub matches: Matches,
    /// Limits are left out.
    pub unlimited: bool,
    /// Categories of the managed ruleset that are left out.
    pub skipped: u16,
    /// Categories that a rule may leave out which waits for the body.
    pub awaited: u16,
    /// What waits for the body, which is looked at on its way.
    pub later: Option<Later>,
    /// Nobody but the asker sees what is found: what may be private is shown, too.
    pub open: bool,
}

/// What is asked once the body is there: rules that look at it, and whatever one of them might have skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Later {
    /// Behind this rule every one is asked.
    from: usize,
    /// Up to this one: those behind it were skipped.
    until: usize,
    /// Categories of the managed ruleset that were left out.
    skipped: u16,
}

impl Rule {
    /// What stands for a rule in a challenge: another expression is another rule.
    pub fn tag(id: &str, expression: &str) -> u32 {
        let hash = hash(format!("{id}\n{expression}").as_bytes());
        u32::try_from(hash >> 32).unwrap_or_default()
    }
}

impl Waf {
    /// Does nothing ever look?
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.managed.is_none()
    }

    /// Does it challenge anybody?
    pub fn challenges(&self) -> bool {
        self.rules.iter().any(|r| matches!(r.action, Action::Challenge(_)))
    }

    /// Asks the rules in order. `cleared`: did the client pass a challenge of this kind?
    pub fn judge(&self, view: &View<'_>, cleared: impl Fn(Kind) -> bool, findings: &mut Findings) -> Ruling {
        let waited = findings.later.take();
        let mut until = waited.map_or(self.rules.len(), |later| later.until);
        let mut later = None;
        for (n, rule) in self.rules.iter().enumerate() {
            if n >= until {
                break;
            }
            let body = rule.filter.uses().body();
            // What was answered before the body was there is not asked again.
            if waited.is_some_and(|waited| !body && n <= waited.from) {
                continue;
            }
            if body {
                match view.facts.body {
                    Seen::Read(_) => {}
                    Seen::Unread => return Ruling::NeedBody,
                    Seen::Later => {
                        let from = later.get_or_insert(usize::MAX);
                        if let Action::Skip(skips) = rule.action {
                            findings.awaited |= skips.categories;
                            if skips.rest {
                                *from = n;
                                break;
                            }
                        }
                        continue;
                    }
                }
            }
            if !rule.filter.matches(view) {
                continue;
            }
            let passed = matches!(rule.action, Action::Challenge(kind) if cleared(kind));
            let action = match (rule.log_only, passed) {
                (true, _) => LOG,
                (false, true) => CLEARED,
                (false, false) => rule.action.label(),
            };
            findings.matches.push(Match { rule: rule.id.clone(), action, seen: rule.filter.operands(view, !findings.open) });
            if rule.log_only || passed {
                continue;
            }
            match &rule.action {
                Action::Log => {}
                Action::Skip(skips) => {
                    findings.skipped |= skips.categories;
                    findings.unlimited |= skips.limits;
                    if skips.rest {
                        until = n + 1;
                    }
                }
                Action::Block(_) | Action::Challenge(_) | Action::Redirect(_) => {
                    return Ruling::Stop(u16::try_from(n).unwrap_or(u16::MAX));
                }
            }
        }
        let skipped = findings.skipped | waited.map_or(0, |waited| waited.skipped);
        findings.skipped = skipped;
        findings.later = later.map(|from| Later { from, until, skipped });
        Ruling::Pass
    }

    /// Asks the managed ruleset.
    pub fn judge_managed(&self, view: &View<'_>, findings: &mut Findings) -> Ruling {
        let Some(managed) = &self.managed else { return Ruling::Pass };
        let skipped = findings.skipped | findings.awaited;
        if findings.skipped == Category::ALL {
            return Ruling::Pass;
        }
        match view.facts.body {
            Seen::Unread => return Ruling::NeedBody,
            Seen::Later => {
                let all = Later { from: usize::MAX, until: self.rules.len(), skipped: findings.skipped };
                findings.later.get_or_insert(all);
            }
            Seen::Read(_) => {}
        }
        let Some(found) = managed.find(view, skipped) else { return Ruling::Pass };
        let action = if managed.log_only { LOG } else { "block" };
        let seen = trace::Seen { operand: "input".to_owned(), value: Some(found.input.to_owned()) };
        findings.matches.push(Match { rule: found.rule, action, seen: vec![seen] });
        if managed.log_only { Ruling::Pass } else { Ruling::Managed }
    }

    /// The rule of a challenge.
    pub fn challenged_by(&self, tag: u32) -> Option<(&Rule, Kind)> {
        self.rules.iter().find_map(|rule| match rule.action {
            Action::Challenge(kind) if rule.tag == tag && !rule.log_only => Some((rule, kind)),
            _ => None,
        })
    }
}
