//! What the cache makes of a request, and of a response to it.

use std::time::UNIX_EPOCH;

use http::{HeaderMap, header};
use serde::Serialize;

use super::Asked;
use crate::cache::freshness::{Exchange, Lease, WhyNot, judge};
use crate::cache::key::Key;
use crate::cache::purge::Purged;
use crate::cache::status::StoredNow;
use crate::cache::{Bypass, Cookies, EdgeTtl, Lookup, Policy};
use crate::decide::Decision;
use crate::request::Facts;
use crate::snapshot::Snapshot;

/// What the cache makes of a request.
#[derive(Debug, Serialize)]
pub struct CacheSeen {
    /// Is it looked up, and why not?
    pub outcome: String,
    /// Under which URL, and what else the key is made of.
    pub key: Option<String>,
    /// Rules that apply.
    pub rules: Vec<String>,
    /// What becomes of its response: of the one that was told, or in general.
    pub response: Vec<String>,
    /// What is stored, if a running process was asked.
    pub stored: Vec<String>,
    /// The key itself.
    #[serde(skip)]
    pub lookup: Option<Box<Lookup>>,
}

/// What the cache makes of it; nothing, where no rule and no route speaks of it.
pub(super) fn cache(snapshot: &Snapshot, facts: &Facts<'_>, asked: &Asked, decision: &Decision) -> Option<CacheSeen> {
    let rule = |at: &u16| snapshot.cache.rules.get(usize::from(*at)).map(|rule| rule.id.to_string());
    let mut seen = CacheSeen {
        outcome: String::new(),
        key: None,
        rules: Vec::new(),
        response: Vec::new(),
        stored: Vec::new(),
        lookup: decision.cache.clone(),
    };
    seen.outcome = match (decision.bypass, &decision.cache) {
        (Some(Bypass::Method), _) => {
            "not looked up: only GET and HEAD are; what it changes is removed once it succeeds".to_owned()
        }
        (Some(Bypass::Request), _) => {
            "not looked up: it has a body, asks for another protocol, wants one region's answer and no other, or comes with a certificate".to_owned()
        }
        (Some(Bypass::Rule(at)), _) => format!("not looked up: rule {} says so", rule(&at).unwrap_or_default()),
        (None, Some(lookup)) if lookup.no_store => "not looked up: the request says no-store".to_owned(),
        (None, Some(lookup)) if lookup.only_if_cached => "looked up; if it is not there: 504, as the request says".to_owned(),
        (None, Some(_)) => "looked up".to_owned(),
        (None, None) => return None,
    };
    let Some(lookup) = &decision.cache else { return Some(seen) };
    let policy = snapshot.cache.policy(&lookup.applied);
    seen.rules = lookup.applied.iter().filter_map(rule).collect();
    seen.key = Some(key(lookup, &policy));
    let authorized = facts.headers.contains_key(header::AUTHORIZATION);
    seen.response = match &asked.response {
        Some((status, headers)) => {
            let now = UNIX_EPOCH + facts.time;
            let exchange = Exchange { asked: now, now, authorized, status: *status, headers };
            vec![judged(judge(exchange, policy.terms(*status)), headers)]
        }
        None => general(&policy, authorized),
    };
    Some(seen)
}

fn key(lookup: &Lookup, policy: &Policy<'_>) -> String {
    let mut text = Key::url(&lookup.key.primary).to_owned();
    let Some(parts) = policy.key else { return text };
    let more = parts.headers.iter().map(|name| format!("header {name}"));
    let more = more.chain(parts.cookies.iter().map(|name| format!("cookie {name}")));
    let more = more.chain(parts.country.then(|| "country".to_owned())).chain(parts.device.then(|| "device".to_owned()));
    let more: Vec<String> = more.collect();
    if !more.is_empty() {
        text.push_str(&format!(", with {}", more.join(", ")));
    }
    text
}

/// What holds for any response.
fn general(policy: &Policy<'_>, authorized: bool) -> Vec<String> {
    let span = |span: std::time::Duration| humantime::format_duration(span).to_string();
    let mut all = Vec::new();
    all.push(match policy.edge {
        Some(EdgeTtl { overrides: true, .. }) => "its freshness is the rule's, whatever the origin says".to_owned(),
        Some(EdgeTtl { overrides: false, .. }) => "its freshness is what the origin says, or else the rule's".to_owned(),
        None => "its freshness is what the origin says".to_owned(),
    });
    if !policy.if_error.is_zero() {
        all.push(format!("stale, it may be served for {} where the origin fails, unless it forbids it", span(policy.if_error)));
    }
    if !policy.while_revalidate.is_zero() {
        all.push(format!("stale, it may be served for {} while it is fetched again", span(policy.while_revalidate)));
    }
    all.push(match policy.cookies {
        None => "if it sets a cookie it is not stored".to_owned(),
        Some(Cookies::Share) => "if it sets a cookie everybody gets the same".to_owned(),
        Some(Cookies::Strip) => "if it sets a cookie it is stored without it".to_owned(),
    });
    if authorized {
        all.push("the request is authorized: it is stored only if it says public, s-maxage or must-revalidate".to_owned());
    }
    if let Some(browser) = policy.browser {
        all.push(format!("browsers may keep it for {}", span(browser)));
    }
    all
}

/// What becomes of this very response.
fn judged(verdict: Result<Lease, WhyNot>, headers: &HeaderMap) -> String {
    let lease = match verdict {
        Ok(lease) => lease,
        Err(why) => return format!("not stored: {}", because(why)),
    };
    let lifetime = lease.fresh_until.duration_since(lease.epoch).unwrap_or_default().as_secs();
    let stale = |what: &str, span: std::time::Duration| match span.as_secs() {
        0 => format!("not {what}"),
        seconds => format!("for {seconds} s {what}"),
    };
    let vary: Vec<String> = crate::cache::vary::fields(headers).iter().map(ToString::to_string).collect();
    let vary = if vary.is_empty() { String::new() } else { format!("; one for each {}", vary.join(", ")) };
    format!(
        "stored: fresh for {lifetime} s from when it was made, by {}; stale, it may be served {}, and {}{vary}",
        lease.source.label(),
        stale("while it is fetched again", lease.while_revalidate),
        stale("where the origin fails", lease.if_error),
    )
}

fn because(why: WhyNot) -> &'static str {
    match why {
        WhyNot::Status => "no cache may keep its status (206 is a part, 304 no response of its own)",
        WhyNot::NoStore => "it says no-store",
        WhyNot::Private => "it says private",
        WhyNot::Authorization => "the request is authorized, and it says none of public, s-maxage, must-revalidate",
        WhyNot::SetCookie => "it sets a cookie, and no rule says `set_cookie`",
        WhyNot::VaryAll => "Vary: * matches no other request",
        WhyNot::NotFresh => "it is not fresh, and has neither ETag nor Last-Modified to ask by",
        WhyNot::NotUnderstood => "it says must-understand, and its status is not understood",
        WhyNot::Rule => "a rule gives it 0 s",
        WhyNot::Request => "the request says no-store",
        WhyNot::Error => "it is an error, and says nothing of freshness",
        WhyNot::TooLarge => "there is no room for it",
    }
}

/// What is stored under a key. `unstored`: why the last response was not.
pub fn stored(snapshot: &Snapshot, lookup: &Lookup, found: Option<&StoredNow>, unstored: Option<&str>) -> Vec<String> {
    let mut all = Vec::new();
    let Some(now) = found else {
        all.push(match unstored {
            Some(why) => format!("nothing, and the last response was not stored: {why}"),
            None => "nothing".to_owned(),
        });
        return all;
    };
    let StoredNow { tier, status, bytes, age, fresh_for, while_revalidate, if_error, asked, tags, vary } = now;
    all.push(format!("a response with status {status}, {bytes} bytes, on {tier}, {age} s old"));
    let stale = u64::try_from(-fresh_for).unwrap_or_default();
    let left = |window: u64, what: &str| match window.checked_sub(stale) {
        Some(left) if window > 0 => format!("it may be served for another {left} s {what}"),
        _ if window == 0 => format!("it may not be served {what}: the response, or the operator, does not allow it"),
        _ => format!("it may not be served {what} any more: that was allowed for {window} s"),
    };
    match *fresh_for {
        fresh @ 1.. => all.push(format!("fresh for another {fresh} s")),
        _ => {
            all.push(format!("stale for {stale} s"));
            all.push(left(*while_revalidate, "while it is fetched again"));
            all.push(left(*if_error, "where the origin fails"));
        }
    }
    let known = &snapshot.cache.known;
    let url = Key::url(&lookup.key.primary);
    match known.purges.check(url, tags.iter().map(String::as_str), *asked) {
        Some(Purged::Gone) => all.push("purged: it is as if it were not there".to_owned()),
        Some(Purged::Stale(_)) => all.push("purged softly: it counts as stale".to_owned()),
        None if known.invalidated.check(url, *asked) => {
            all.push("made invalid by a request that changed it: it is asked for again before it is used".to_owned());
        }
        None => {}
    }
    if !vary.is_empty() {
        all.push(format!("one for each {}: which of them is not looked at here", vary.join(", ")));
    }
    if !tags.is_empty() {
        all.push(format!("tags {}", tags.join(", ")));
    }
    all
}
