//! Limits, from what was typed to what can run.

use std::time::Duration;

use super::Compiler;
use crate::config::limits as typed;
use crate::config::problem::{KeyPath, Problem};
use crate::config::units::Name;
use crate::key_path;
use crate::limits::book::LONGEST;
use crate::limits::quota::{Algorithm, Quota};
use crate::limits::{Action, Counting, Limit, Limits, Prefixes};
use crate::rules::{self, Filter, Phase, Scalar, Scope};
use crate::waf::challenge::Kind;

/// The shortest period, and the longest.
const PERIODS: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(7 * 86_400);
/// The least memory.
const LEAST: u64 = 1 << 20;
/// The most.
const MOST: u64 = 16 << 30;

/// What many clients have in common.
const SHARED: [&str; 4] = ["country", "asn", "host", "path"];

impl Compiler<'_> {
    pub(super) fn limits(&mut self, limits: &typed::Limits, cluster: bool) -> Limits {
        let at = if limits.has_settings() { key_path!["limits", "rules"] } else { key_path!["limits"] };
        let typed::LimitSettings { memory, ipv4_prefix, ipv6_prefix, rules } = limits.settings();
        if memory.0 < LEAST {
            self.error(key_path!["limits", "memory"], "expected at least `1MiB`");
        }
        if memory.0 > MOST {
            self.error(key_path!["limits", "memory"], "expected at most `16GiB`");
        }
        let prefixes = Prefixes { ipv4: ipv4_prefix, ipv6: ipv6_prefix };
        // The first configuration settles it: another is refused as a change that needs a restart.
        self.memory.settle(memory.0.clamp(LEAST, MOST), cluster);
        if rules.is_empty() {
            return Limits { prefixes, ..Limits::default() };
        }
        let ledger = self.memory.ledger();
        let mut ids: Vec<&Name> = Vec::new();
        let mut compiled = Vec::new();
        for (i, rule) in rules.iter().enumerate() {
            let at = at.join(i);
            if ids.contains(&&rule.id) {
                self.error(at.join("id"), format!("another limit is called `{}` too", rule.id));
            }
            ids.push(&rule.id);
            compiled.extend(self.limit(&at, rule, cluster, ledger.number(&rule.id.0)));
        }
        Limits { rules: compiled.into(), prefixes, ledger: Some(ledger) }
    }

    fn limit(&mut self, at: &KeyPath, limit: &typed::Limit, cluster: bool, number: u16) -> Option<Limit> {
        let typed::Limit {
            id,
            expression,
            by,
            requests,
            period,
            algorithm,
            burst,
            counting_expression,
            only_misses,
            cost_header,
            mitigation_timeout,
            action,
            response,
            dry_run,
            headers,
            consistency,
            failure_mode,
        } = limit;
        if !PERIODS.contains(&period.0) {
            self.error(at.join("period"), "expected a duration from `1s` to `7d`");
        }
        if mitigation_timeout.0 > LONGEST {
            self.error(at.join("mitigation_timeout"), "expected at most `30d`");
        }
        if burst.is_some() && *algorithm != typed::Algorithm::TokenBucket {
            self.error(at.join("burst"), "`burst` belongs to `algorithm: token_bucket`");
        }
        if response.is_some() && *action != typed::LimitAction::Block {
            self.error(at.join("response"), "`response` belongs to another action");
        }
        let algorithm = match algorithm {
            typed::Algorithm::Sliding => Algorithm::Sliding,
            typed::Algorithm::TokenBucket => Algorithm::TokenBucket { burst: burst.unwrap_or(*requests) },
            typed::Algorithm::Fixed => Algorithm::Fixed,
        };
        let filter = self.optional(at, expression.as_deref(), Phase::Routed);
        let counting = match counting_expression {
            None => Some(None),
            Some(source) => self.counting(&at.join("counting_expression"), source).map(Some),
        };
        // Every one is looked at, also after one that is wrong.
        let by: Vec<Option<Scalar>> = by.iter().enumerate().map(|(i, by)| self.by(&at.join("by").join(i), by)).collect();
        let late = cost_header.is_some() || matches!(counting, Some(Some(Counting::Response(_))));
        if *only_misses && late {
            let problem = Problem::error(at.join("only_misses"), "what the cache answers has no response of the origin's");
            self.problems.push(problem.hint("what counts by the response counts only what reached the origin: leave this out"));
        }
        let strict = *consistency == typed::Consistency::Strict;
        self.together(at, limit, cluster, late);
        let challenges = !matches!(action, typed::LimitAction::Block | typed::LimitAction::Log);
        let shared = |by: &typed::By| matches!(by, typed::By::Expression(text) if SHARED.contains(&text.as_str()));
        if challenges && limit.by.iter().all(shared) {
            let problem = Problem::warning(
                at.join("by"),
                "one client that passes the challenge lets all begin anew that are counted with it",
            );
            self.problems.push(problem.hint("count by `ip.src` as well, or use `action: block`"));
        }
        let action = match action {
            typed::LimitAction::Block => {
                let own = response.as_ref().map(|r| (r.status, r.content_type.as_str(), r.body.as_str()));
                Action::Block(self.answer(at, 429, own))
            }
            typed::LimitAction::Challenge => Action::Challenge(Kind::Challenge),
            typed::LimitAction::JsChallenge => Action::Challenge(Kind::Js),
            typed::LimitAction::ManagedChallenge => Action::Challenge(Kind::Managed),
            typed::LimitAction::Log => Action::Log,
        };
        Some(Limit {
            id: id.0.as_str().into(),
            number,
            filter: filter?,
            by: by.into_iter().collect::<Option<_>>()?,
            quota: Quota { algorithm, requests: *requests, period: period.0 },
            counting: counting?,
            only_misses: *only_misses,
            cost_header: cost_header.as_ref().map(|name| name.0.clone()),
            timeout: mitigation_timeout.0,
            action,
            dry_run: *dry_run,
            headers: *headers,
            strict: strict && cluster,
            deny: *failure_mode == typed::FailureMode::Deny,
            tag: Limit::tag(&id.0),
        })
    }

    /// What only makes sense with other nodes.
    fn together(&mut self, at: &KeyPath, limit: &typed::Limit, cluster: bool, late: bool) {
        let strict = limit.consistency == typed::Consistency::Strict;
        let sliding = limit.algorithm == typed::Algorithm::Sliding;
        let deny = limit.failure_mode == typed::FailureMode::Deny;
        for (key, given) in [("consistency", strict), ("failure_mode", deny)] {
            if given && !cluster {
                let problem = Problem::error(at.join(key), format!("`{key}` is about other nodes, and there are none"));
                self.problems.push(problem.hint("add `cluster: { redis: redis://… }`"));
            }
        }
        if deny && !sliding {
            self.error(at.join("failure_mode"), "only `algorithm: sliding` is shared with other nodes");
        }
        if strict && late {
            self.error(at.join("consistency"), "what counts by the response cannot be asked about before it");
        }
        if strict && !sliding {
            self.error(at.join("consistency"), "only `algorithm: sliding` can be asked of all nodes");
        }
        if cluster && !sliding && !strict {
            let problem = Problem::warning(at.join("algorithm"), "each node counts this limit for itself");
            self.problems.push(problem.hint("only `algorithm: sliding` holds for all nodes together"));
        }
    }

    /// It may look at the response; whether it does says when it is asked.
    fn counting(&mut self, at: &KeyPath, source: &str) -> Option<Counting> {
        let scope = Scope { phase: Phase::Routed, lists: &self.lists, limits: rules::Limits::default() };
        match Filter::new(source, scope) {
            Ok(_) => self.filter(at, source, Phase::Routed).map(Counting::Request),
            Err(_) => self.filter(at, source, Phase::Response).map(Counting::Response),
        }
    }

    fn by(&mut self, at: &KeyPath, by: &typed::By) -> Option<Scalar> {
        let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        let (source, written) = match by {
            typed::By::Expression(text) => match text.as_str() {
                "country" => ("ip.src.country".to_owned(), false),
                "asn" => ("ip.src.asnum".to_owned(), false),
                "host" => ("http.host".to_owned(), false),
                "path" => ("http.request.uri.path".to_owned(), false),
                "ja4" => {
                    let problem = Problem::error(at.clone(), "`ja4` is not in this version");
                    self.problems.push(problem.hint("it is a fingerprint of TLS handshakes, which is not taken yet"));
                    return None;
                }
                other => (other.to_owned(), true),
            },
            typed::By::Part(typed::ByPart { header, cookie, query }) => {
                let sources = [
                    header.as_ref().map(|name| format!("http.request.headers[{}][0]", quoted(name.0.as_str()))),
                    cookie.as_ref().map(|name| format!("http.request.cookies[{}][0]", quoted(name))),
                    query.as_ref().map(|name| format!("http.request.uri.args[{}][0]", quoted(name))),
                ];
                let mut sources = sources.into_iter().flatten();
                match (sources.next(), sources.next()) {
                    (Some(source), None) => (source, false),
                    _ => {
                        self.error(at.clone(), "expected one of `header`, `cookie` and `query`");
                        return None;
                    }
                }
            }
        };
        let scope = Scope { phase: Phase::Routed, lists: &self.lists, limits: rules::Limits::default() };
        match Scalar::new(&source, scope) {
            Ok(scalar) => Some(scalar),
            Err(error) => {
                let problem = Problem::error(at.clone(), &*error.message);
                let problem = match written {
                    true => super::rules::expression(problem, &source, &error),
                    false => problem,
                };
                self.problems.push(problem);
                None
            }
        }
    }
}
