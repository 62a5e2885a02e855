//! Lists, transforms and the firewall, from what was typed to what can run.

use std::sync::Arc;

use indexmap::IndexMap;

use super::Compiler;
use crate::config::problem::{KeyPath, nearest};
use crate::config::units::Name;
use crate::config::waf::{self as typed, Mode, Skip, Text};
use crate::config::{self, Problem};
use crate::key_path;
use crate::lists::{List, Lists};
use crate::respond::headers::{Pass, pass};
use crate::rules::{ExprError, Filter, Limits, Phase, Scope, Template};
use crate::transforms::{Edits, Location, Redirect, Rewrite, Transform, Transforms, is_fixed};
use crate::waf::challenge::{Kind, Settings};
use crate::waf::managed::{self, Category, Managed};
use crate::waf::{Action, Answer, Rule, Skips, Waf};

/// The most of a body that rules may see.
const MAX_BODY: u64 = 1 << 20;

impl Compiler<'_> {
    pub(super) fn lists(&mut self, lists: &IndexMap<Name, config::List>) -> Lists {
        let mut all = Vec::new();
        for (name, list) in lists {
            let at = key_path!["lists", name];
            let config::List { ip, country, asn, host, reputation, verified_bot } = list;
            let kinds = [ip.is_some(), country.is_some(), asn.is_some(), host.is_some()];
            if kinds.iter().filter(|k| **k).count() != 1 {
                let problem = Problem::error(at.clone(), format!("list `{name}` needs one of `ip`, `country`, `asn` and `host`"));
                self.problems.push(problem.hint("make two lists of it, or remove what is too much"));
                continue;
            }
            if ip.is_none() && (reputation.is_some() || verified_bot.is_some()) {
                let key = if reputation.is_some() { "reputation" } else { "verified_bot" };
                self.error(at.join(key), format!("`{key}` is about addresses, and this list has none"));
            }
            // What could not be read was said where it was read.
            let Some(told) = self.resources.lists.get(&name.0) else { continue };
            all.push(Arc::new(List {
                name: name.0.as_str().into(),
                entries: told.entries(),
                reputation: reputation.map(|weight| told.scores(weight)),
                verified_bot: verified_bot.as_deref().map(Into::into),
            }));
        }
        Lists(all)
    }

    /// An expression that is true or false.
    pub(super) fn filter(&mut self, at: &KeyPath, source: &str, phase: Phase) -> Option<Filter> {
        let scope = Scope { phase, lists: &self.lists, limits: Limits::default() };
        match Filter::new(source, scope) {
            Ok(mut filter) => {
                filter.hide(&self.resources.secrets);
                let notes =
                    filter.notes().iter().map(|note| expression(Problem::warning(at.clone(), &*note.message), source, note));
                self.problems.extend(notes);
                Some(filter)
            }
            Err(error) => {
                self.problems.push(expression(Problem::error(at.clone(), &*error.message), source, &error));
                None
            }
        }
    }

    fn template(&mut self, at: &KeyPath, text: &Text, phase: Phase) -> Option<Template> {
        let scope = Scope { phase, lists: &self.lists, limits: Limits::default() };
        match text {
            Text::Fixed(text) => Some(Template::fixed(text)),
            Text::Dynamic(dynamic) => match Template::new(&dynamic.expression, scope) {
                Ok(template) => Some(template),
                Err(error) => {
                    let problem = Problem::error(at.join("expression"), &*error.message);
                    self.problems.push(expression(problem, &dynamic.expression, &error));
                    None
                }
            },
        }
    }

    pub(super) fn transforms(&mut self, redirects: &[config::Redirect], transforms: &[config::Transform]) -> Transforms {
        let redirects: Vec<Redirect> = redirects
            .iter()
            .enumerate()
            .filter_map(|(i, redirect)| {
                let at = key_path!["redirects", i];
                let config::Redirect { expression, to, status, preserve_query } = redirect;
                let filter = self.optional(&at, expression.as_deref(), Phase::Request)?;
                let to = self.template(&at.join("to"), to, Phase::Request)?;
                Some(Redirect { filter, location: Location { to, status: status.code(), preserve_query: *preserve_query } })
            })
            .collect();
        let transforms: Vec<Transform> =
            transforms.iter().enumerate().filter_map(|(i, t)| self.transform(&key_path!["transforms", i], t)).collect();
        Transforms { redirects: redirects.into(), transforms: transforms.into() }
    }

    pub(super) fn optional(&mut self, at: &KeyPath, source: Option<&str>, phase: Phase) -> Option<Option<Filter>> {
        match source {
            None => Some(None),
            Some(source) => self.filter(&at.join("expression"), source, phase).map(Some),
        }
    }

    fn transform(&mut self, at: &KeyPath, transform: &config::Transform) -> Option<Transform> {
        let config::Transform { expression, path, query, request, response } = transform;
        let edits_none = |e: &config::HeaderEdits| e.set.is_empty() && e.remove.is_empty();
        if path.is_none() && query.is_none() && edits_none(request) && edits_none(response) {
            let problem = Problem::error(at.clone(), "this transform changes nothing");
            self.problems.push(problem.hint("give it a `path`, a `query`, or headers under `request` or `response`"));
        }
        let after = path.is_none() && query.is_none() && edits_none(request);
        let filter = self.optional(at, expression.as_deref(), if after { Phase::Response } else { Phase::Request })?;
        let path = path.as_ref().and_then(|p| self.template(&at.join("path"), p, Phase::Request));
        let query = query.as_ref().and_then(|q| self.template(&at.join("query"), q, Phase::Request));
        for name in request.set.keys().filter(|name| pass(name.0.as_str(), "", false) == Pass::Drop && !is_fixed(&name.0)) {
            let at = at.join("request").join("set").join(&name.0);
            let problem = Problem::error(at, format!("`{}` tells the origin who asks, and is Portolan's own to set", name.0));
            self.problems.push(problem.hint("give it another name, or `remove` it"));
        }
        let request = self.edits(&at.join("request"), request, Phase::Routed);
        let response = self.edits(&at.join("response"), response, Phase::Response);
        Some(Transform { filter, after, path, query, request, response })
    }

    /// What a route rewrites, and where it sends its clients.
    pub(super) fn rewrite(&mut self, at: &KeyPath, rewrite: &config::Rewrite) -> Option<Box<Rewrite>> {
        let config::Rewrite { strip_prefix, path, query, request, response } = rewrite.clone();
        let edits_none = |e: &config::HeaderEdits| e.set.is_empty() && e.remove.is_empty();
        let prefix = strip_prefix.map(|prefix| prefix.0.trim_end_matches('/').into());
        if prefix.is_some() && path.is_some() {
            self.error(at.join("strip_prefix"), "`strip_prefix` has no effect beside `path`");
        }
        if prefix.is_none() && path.is_none() && query.is_none() && edits_none(&request) && edits_none(&response) {
            return None;
        }
        // Without any of it that is left, a transform would be told to change nothing.
        let changes = path.is_some() || query.is_some() || !edits_none(&request) || !edits_none(&response);
        let transform = match changes {
            true => self.transform(at, &config::Transform { expression: None, path, query, request, response })?,
            false => Transform::default(),
        };
        Some(Box::new(Rewrite { strip_prefix: prefix, transform }))
    }

    /// Where clients are sent, once their route is known.
    pub(super) fn location(&mut self, at: &KeyPath, redirection: &typed::Redirection) -> Option<Location> {
        let typed::Redirection { to, status, preserve_query } = redirection;
        let to = self.template(&at.join("to"), to, Phase::Routed)?;
        Some(Location { to, status: status.code(), preserve_query: *preserve_query })
    }

    fn edits(&mut self, at: &KeyPath, edits: &config::HeaderEdits, phase: Phase) -> Edits {
        let config::HeaderEdits { set, remove } = edits;
        let mut all = Vec::new();
        for (name, text) in set {
            let at = at.join("set").join(&name.0);
            self.fixed(&at, name);
            if let Text::Fixed(value) = text
                && http::HeaderValue::from_str(value).is_err()
            {
                self.error(at.clone(), "no header can carry this value");
            }
            all.extend(self.template(&at, text, phase).map(|template| (name.0.clone(), template)));
        }
        for (i, name) in remove.iter().enumerate() {
            self.fixed(&at.join("remove").join(i), name);
        }
        Edits { set: all.into(), remove: remove.iter().map(|n| n.0.clone()).collect() }
    }

    fn fixed(&mut self, at: &KeyPath, name: &config::units::HeaderName) {
        if is_fixed(&name.0) {
            let problem = Problem::error(at.clone(), format!("`{}` is Portolan's own to set", name.0));
            self.problems.push(problem.hint("headers that frame a message or name the request are not transformed"));
        }
    }

    pub(super) fn waf(&mut self, waf: &config::Waf) -> Waf {
        let config::Waf { mode, body_limit, rules, managed, challenge } = waf;
        if !(1..=MAX_BODY).contains(&body_limit.0) {
            self.error(key_path!["waf", "body_limit"], "expected a size from `1B` to `1MiB`");
        }
        let mut ids: Vec<&Name> = Vec::new();
        let mut compiled = Vec::new();
        for (i, rule) in rules.iter().enumerate() {
            let at = key_path!["waf", "rules", i];
            if ids.contains(&&rule.id) {
                self.error(at.join("id"), format!("another rule is called `{}` too", rule.id));
            }
            if managed::all().any(|s| s.id == rule.id.0) {
                self.error(at.join("id"), format!("a rule of the managed ruleset is called `{}`", rule.id));
            }
            ids.push(&rule.id);
            compiled.extend(self.rule(&at, rule, *mode == Mode::Log));
        }
        let typed::Challenge { difficulty, clearance } = *challenge;
        if clearance.0.as_secs() == 0 {
            self.error(key_path!["waf", "challenge", "clearance"], "expected at least `1s`");
        }
        Waf {
            rules: compiled.into(),
            managed: self.managed(managed, *mode == Mode::Log),
            body_limit: usize::try_from(body_limit.0).unwrap_or(usize::MAX),
            challenge: Settings { difficulty, clearance: clearance.0 },
        }
    }

    fn rule(&mut self, at: &KeyPath, rule: &typed::Rule, all_log: bool) -> Option<Rule> {
        let typed::Rule { id, expression, action, mode, response, skip, redirect } = rule;
        for (key, given, of) in [
            ("response", response.is_some(), typed::Action::Block),
            ("skip", skip.is_some(), typed::Action::Skip),
            ("redirect", redirect.is_some(), typed::Action::Redirect),
        ] {
            if given && of != *action {
                self.error(at.join(key), format!("`{key}` belongs to another action"));
            }
        }
        let filter = self.filter(&at.join("expression"), expression, Phase::Body);
        let action = match action {
            typed::Action::Block => {
                let own = response.as_ref().map(|r| (r.status, r.content_type.as_str(), r.body.as_str()));
                Action::Block(self.answer(at, 403, own))
            }
            typed::Action::Challenge => Action::Challenge(Kind::Challenge),
            typed::Action::JsChallenge => Action::Challenge(Kind::Js),
            typed::Action::ManagedChallenge => Action::Challenge(Kind::Managed),
            typed::Action::Log => Action::Log,
            typed::Action::Skip => Action::Skip(skips(skip.as_deref().unwrap_or(&[Skip::Rest]))),
            typed::Action::Redirect => {
                let Some(redirection) = redirect else {
                    let problem = Problem::error(at.join("action"), "`redirect` needs to know where to");
                    self.problems.push(problem.hint("add `redirect: { to: … }`"));
                    return None;
                };
                Action::Redirect(self.location(&at.join("redirect"), redirection)?)
            }
        };
        let tag = Rule::tag(&id.0, expression);
        Some(Rule { id: id.0.as_str().into(), filter: filter?, action, log_only: all_log || *mode == Mode::Log, tag })
    }

    /// What a refused client gets: what `response` says (status, `Content-Type`, body), or this status.
    pub(super) fn answer(&mut self, at: &KeyPath, status: u16, response: Option<(u16, &str, &str)>) -> Answer {
        let Some((status, content_type, body)) = response else {
            return Answer { status, content_type: "text/plain; charset=utf-8".into(), body: bytes::Bytes::new() };
        };
        if http::HeaderValue::from_str(content_type).is_err() {
            self.error(at.join("response").join("content_type"), "no header can carry this value");
        }
        Answer { status, content_type: content_type.into(), body: body.to_owned().into() }
    }

    fn managed(&mut self, managed: &typed::Managed, all_log: bool) -> Option<Managed> {
        let typed::Managed { enabled, mode, sensitivity, except } = managed;
        for (i, id) in except.iter().enumerate() {
            if !managed::all().any(|s| s.id == id.0) {
                let at = key_path!["waf", "managed", "except", i];
                let problem = Problem::error(at, format!("the managed ruleset has no rule `{id}`"));
                self.problems.push(match nearest(&id.0, managed::all().map(|s| s.id)) {
                    Some(near) => problem.hint(format!("did you mean `{near}`?")),
                    None => problem,
                });
            }
        }
        if !enabled {
            return None;
        }
        let except: Vec<&str> = except.iter().map(|n| n.0.as_str()).collect();
        match Managed::new(*sensitivity, &except, all_log || *mode == Mode::Log) {
            Ok(managed) => Some(managed),
            Err(error) => {
                self.error(key_path!["waf", "managed"], error);
                None
            }
        }
    }
}

fn skips(skip: &[Skip]) -> Skips {
    let mut skips = Skips::default();
    for skip in skip {
        skips.categories |= match skip {
            Skip::Rest => {
                skips.rest = true;
                0
            }
            Skip::Limits => {
                skips.limits = true;
                0
            }
            Skip::Managed => Category::ALL,
            Skip::Traversal => Category::Traversal.bit(),
            Skip::Rce => Category::Rce.bit(),
            Skip::Ssti => Category::Ssti.bit(),
            Skip::Log4shell => Category::Log4shell.bit(),
            Skip::Scanner => Category::Scanner.bit(),
            Skip::Sqli => Category::Sqli.bit(),
            Skip::Xss => Category::Xss.bit(),
            Skip::Ssrf => Category::Ssrf.bit(),
            Skip::Protocol => Category::Protocol.bit(),
            Skip::Upload => Category::Upload.bit(),
            Skip::Xxe => Category::Xxe.bit(),
            Skip::Nosql => Category::Nosql.bit(),
        };
    }
    skips
}

/// A problem with an expression, at the very place in it where that can be told.
pub(super) fn expression(problem: Problem, source: &str, error: &ExprError) -> Problem {
    let problem = problem.within(source, error.span.clone());
    match &error.hint {
        Some(hint) => problem.hint(&**hint),
        None => problem,
    }
}
