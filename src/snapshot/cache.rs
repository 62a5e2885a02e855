//! What is answered without the origin, from what was typed to what can run.

use std::ops::RangeInclusive;

use super::Compiler;
use crate::cache::key::{Parts, Query};
use crate::cache::{Cache, Cookies, EdgeTtl, RouteCache, Rule, Settings};
use crate::config;
use crate::config::problem::{KeyPath, Problem};
use crate::config::units::Name;
use crate::key_path;
use crate::routes::Route;
use crate::rules::Phase;

/// The least that is of any use.
const LEAST_MEMORY: u64 = 1 << 20;
/// The same for the disk.
const LEAST_DISK: u64 = 16 << 20;

impl Compiler<'_> {
    pub(super) fn cache(&mut self, cache: &config::Cache, routes: &[Route]) -> Cache {
        let config::Cache { memory, disk, grace, heuristic_freshness, targeted_fields, max_waiters, purge_token, rules } = cache;
        if memory.0 < LEAST_MEMORY {
            self.error(key_path!["cache", "memory"], "expected at least `1MiB`");
        }
        if disk.as_ref().is_some_and(|disk| disk.size.0 < LEAST_DISK) {
            self.error(key_path!["cache", "disk", "size"], "expected at least `16MiB`");
        }
        if purge_token.as_ref().is_some_and(|token| token.reveal().is_empty()) {
            self.error(key_path!["cache", "purge_token"], "the token is empty");
        }
        let mut ids: Vec<&Name> = Vec::new();
        let mut compiled = Vec::new();
        for (i, rule) in rules.iter().enumerate() {
            let at = key_path!["cache", "rules", i];
            if ids.contains(&&rule.id) {
                self.error(at.join("id"), format!("another rule is called `{}` too", rule.id));
            }
            ids.push(&rule.id);
            compiled.extend(self.cache_rule(&at, rule));
        }
        Cache {
            is_used: !rules.is_empty() || routes.iter().any(|route| route.cache.enabled),
            rules: compiled.into(),
            grace: grace.0,
            targeted: targeted_fields.iter().map(|name| name.0.clone()).collect(),
            heuristic: *heuristic_freshness,
            purge_token: purge_token.clone(),
            waiters: *max_waiters,
            known: self.memory.cache.clone(),
        }
    }

    fn cache_rule(&mut self, at: &KeyPath, rule: &config::CacheRule) -> Option<Rule> {
        let config::CacheRule { id, expression, cache, edge_ttl, browser_ttl, key, serve_stale, set_cookie, tags } = rule;
        let nothing = edge_ttl.is_none() && browser_ttl.is_none() && key.is_none() && serve_stale.is_none();
        if cache.is_none() && nothing && set_cookie.is_none() && tags.is_empty() {
            let problem = Problem::error(at.clone(), "this rule says nothing");
            self.problems.push(problem.hint("for example `cache: true` or `edge_ttl: { default: 1h }`"));
        }
        for (i, tag) in tags.iter().enumerate() {
            if tag.trim().is_empty() || tag.contains([',', ' ']) {
                self.error(at.join("tags").join(i), "expected a tag without commas and spaces");
            }
        }
        let edge = edge_ttl.as_ref().map(|edge| self.edge_ttl(&at.join("edge_ttl"), edge));
        let filter = self.filter(&at.join("expression"), expression, Phase::Routed);
        let settings = Settings {
            cache: *cache,
            edge,
            browser: browser_ttl.map(|ttl| ttl.0),
            key: key.as_ref().map(|key| self.cache_key(&at.join("key"), key)),
            while_revalidate: serve_stale.and_then(|stale| stale.while_revalidate).map(|span| span.0),
            if_error: serve_stale.and_then(|stale| stale.if_error).map(|span| span.0),
            cookies: set_cookie.map(|cookies| match cookies {
                config::SetCookie::Share => Cookies::Share,
                config::SetCookie::Strip => Cookies::Strip,
            }),
            tags: tags.iter().map(|tag| tag.trim().into()).collect(),
        };
        Some(Rule { id: id.0.as_str().into(), filter: filter?, settings })
    }

    fn edge_ttl(&mut self, at: &KeyPath, edge: &config::EdgeTtl) -> EdgeTtl {
        let config::EdgeTtl { mode, default, status } = edge;
        if default.is_none() && status.is_empty() {
            let problem = Problem::error(at.clone(), "this says nothing");
            self.problems.push(problem.hint("for example `default: 1h` or `status: { 404: 1m }`"));
        }
        let mut statuses = Vec::new();
        for (text, ttl) in status {
            match statuses_of(text) {
                Some(range) => statuses.push((range, ttl.0)),
                None => {
                    let problem = Problem::error(at.join("status").join(text), format!("`{text}` names no statuses"));
                    self.problems.push(problem.hint("expected `404`, `4xx` or `500-504`"));
                }
            }
        }
        EdgeTtl { overrides: *mode == config::EdgeMode::Override, default: default.map(|ttl| ttl.0), statuses }
    }

    fn cache_key(&mut self, at: &KeyPath, key: &config::CacheKey) -> Parts {
        let config::CacheKey { query, headers, cookies, country, device } = key;
        let config::CacheQuery { include, exclude, sort } = query;
        if include.is_some() && !exclude.is_empty() {
            self.error(at.join("query").join("exclude"), "`include` says already what is part of the key");
        }
        let query = match include {
            Some(names) => Query::Only(names.clone()),
            None if !exclude.is_empty() => Query::Except(exclude.clone()),
            None => Query::All,
        };
        Parts {
            query,
            sort: *sort,
            headers: headers.iter().map(|name| name.0.clone()).collect(),
            cookies: cookies.clone(),
            country: *country,
            device: *device,
        }
    }

    pub(super) fn route_cache(&mut self, at: &KeyPath, cache: config::RouteCache, conditional: bool) -> RouteCache {
        let config::RouteCache { enabled, request_directives } = cache;
        if request_directives && !enabled {
            let problem = Problem::warning(at.join("request_directives"), "the cache of this route is not enabled");
            self.problems.push(problem.hint("only what a rule makes cacheable is meant then"));
        }
        RouteCache { enabled, request_directives, conditional }
    }
}

/// `404`, `4xx`, `500-504`.
fn statuses_of(text: &str) -> Option<RangeInclusive<u16>> {
    let one = |text: &str| text.parse().ok().filter(|status| (100..=999).contains(status));
    if let Some(class) = text.strip_suffix("xx") {
        let class: u16 = class.parse().ok().filter(|class| (1..=9).contains(class))?;
        return Some(class * 100..=class * 100 + 99);
    }
    match text.split_once('-') {
        Some((first, last)) => Some(one(first)?..=one(last)?).filter(|range| !range.is_empty()),
        None => one(text).map(|status| status..=status),
    }
}
