//! What may be answered without the origin: may a response be stored, for how long is it fresh, under which key.
//!
//! ```text
//!  request ─► look (rules, key) ─► the store ─► purge, reuse ─► answer
//!                                     │ miss
//!                                     └► origin ─► freshness::judge ─► the store
//! ```
//!
//! Everything here is a pure function of what it is given, each rule with its section of RFC 9111; the store
//! itself, which has files and sockets to wait for, is `proxy::store`.

pub mod fields;
pub mod freshness;
pub mod key;
pub mod purge;
pub mod reuse;
pub mod status;
mod targeted;
pub mod vary;

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use http::{HeaderName, Method, header};
use smallvec::SmallVec;

use crate::config::units::Secret;
use crate::request::same_header;
use crate::rules::{Filter, View};
use freshness::{Edge, Terms};
use key::{Key, Parts, Wanted};
use purge::{Invalidated, Purges};

/// What of the cache outlives reloads and is no store.
#[derive(Debug)]
pub struct Known {
    /// What other nodes purged is known: before that nothing is answered from what was stored.
    pub ready: AtomicBool,
    /// What was purged.
    pub purges: Purges,
    /// What unsafe requests made invalid.
    pub invalidated: Invalidated,
}

impl Default for Known {
    fn default() -> Self {
        Self { ready: AtomicBool::new(true), purges: Purges::default(), invalidated: Invalidated::default() }
    }
}

/// What the operator wants of the cache.
#[derive(Debug, Default)]
pub struct Cache {
    /// A route or a rule has something stored.
    pub is_used: bool,
    /// Rules, in order; of those that match the last word of each setting counts.
    pub rules: Box<[Rule]>,
    /// How long what is stale may be served where the origin fails.
    pub grace: Duration,
    /// Fields that take the place of `Cache-Control`.
    pub targeted: Box<[HeaderName]>,
    /// A response may be fresh for a part of its age.
    pub heuristic: bool,
    /// Who may `PURGE`.
    pub purge_token: Option<Secret>,
    /// So many requests may wait for others' responses.
    pub waiters: u32,
    /// What was purged.
    pub known: Arc<Known>,
}

/// A route's own settings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RouteCache {
    /// Its responses may be stored, unless a rule says otherwise.
    pub enabled: bool,
    /// Clients may ask for what is fresher, or not to be stored.
    pub request_directives: bool,
    /// More than the URL decides whether a request is the route's: what it answers is nobody else's.
    pub conditional: bool,
}

/// A rule that can run.
#[derive(Debug)]
pub struct Rule {
    /// Its name.
    pub id: Box<str>,
    /// When it applies.
    pub filter: Filter,
    /// What it says.
    pub settings: Settings,
}

/// What a rule says; what it does not, others may.
#[derive(Debug, Default)]
pub struct Settings {
    /// May responses be stored?
    pub cache: Option<bool>,
    /// For how long they are fresh.
    pub edge: Option<EdgeTtl>,
    /// For how long browsers may keep them.
    pub browser: Option<Duration>,
    /// What the key is made of.
    pub key: Option<Parts>,
    /// `stale-while-revalidate` where the origin says nothing.
    pub while_revalidate: Option<Duration>,
    /// `stale-if-error` where the origin says nothing.
    pub if_error: Option<Duration>,
    /// Responses that set cookies: are they stored, without these?
    pub cookies: Option<Cookies>,
    /// Tags to purge by.
    pub tags: Vec<Box<str>>,
}

/// What becomes of a response that sets cookies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cookies {
    /// It is stored with them: everybody gets the same.
    Share,
    /// It is stored without them: only who caused it gets them.
    Strip,
}

/// For how long responses are fresh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EdgeTtl {
    /// Whatever the origin says.
    pub overrides: bool,
    /// Of any status.
    pub default: Option<Duration>,
    /// Of these; the first that fits.
    pub statuses: Vec<(RangeInclusive<u16>, Duration)>,
}

impl EdgeTtl {
    /// Of a status.
    fn of(&self, status: u16) -> Option<Edge> {
        let own = self.statuses.iter().find(|(range, _)| range.contains(&status)).map(|(_, ttl)| *ttl);
        // What fails is not kept unless its status is named.
        let ttl = own.or(self.default.filter(|_| status < 400))?;
        Some(Edge { ttl, overrides: self.overrides })
    }
}

/// Positions of rules that apply.
pub type Applied = SmallVec<[u16; 4]>;

/// A request that may be answered from the store.
#[derive(Debug, Clone)]
pub struct Lookup {
    /// Under which key.
    pub key: Key,
    /// Rules that apply.
    pub applied: Applied,
    /// It may not be stored: the request says so.
    pub no_store: bool,
    /// It is answered from the store or not at all: the request says so.
    pub only_if_cached: bool,
}

/// Why a request is not looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bypass {
    /// Its method is neither GET nor HEAD.
    Method,
    /// It has a body, asks for another protocol, wants the answer of one region and no other, or its client showed a
    /// certificate.
    Request,
    /// A rule says so.
    Rule(u16),
}

/// What the cache makes of a request.
#[derive(Debug)]
pub enum Asked {
    /// Nothing: no rule and no route speaks of it.
    Off,
    /// It goes to the origin.
    Bypass(Bypass),
    /// It may be stored.
    Lookup(Box<Lookup>),
}

/// What rules and the route together want of one request and its response.
#[derive(Debug)]
pub struct Policy<'a> {
    /// For how long it is fresh.
    pub edge: Option<&'a EdgeTtl>,
    /// For how long browsers may keep it.
    pub browser: Option<Duration>,
    /// What the key is made of.
    pub key: Option<&'a Parts>,
    /// `stale-while-revalidate` where the origin says nothing.
    pub while_revalidate: Duration,
    /// `stale-if-error` where the origin says nothing.
    pub if_error: Duration,
    /// What becomes of cookies.
    pub cookies: Option<Cookies>,
    cache: &'a Cache,
}

impl Policy<'_> {
    /// What it means for a response with this status.
    pub fn terms(&self, status: u16) -> Terms<'_> {
        Terms {
            targeted: &self.cache.targeted,
            heuristic: self.cache.heuristic,
            cookies: self.cookies.is_some(),
            edge: self.edge.and_then(|edge| edge.of(status)),
            while_revalidate: self.while_revalidate,
            if_error: self.if_error,
        }
    }
}

impl Cache {
    /// What becomes of a request of a route.
    pub fn look<'v, 'a: 'v>(&self, route: RouteCache, rewritten: Option<&str>, view: impl FnOnce() -> &'v View<'a>) -> Asked {
        if !route.enabled && self.rules.is_empty() {
            return Asked::Off;
        }
        let view = view();
        let mut applied = Applied::new();
        let mut enabled = route.enabled;
        let mut by = None;
        for (position, rule) in (0u16..).zip(&self.rules) {
            if rule.filter.matches(view) {
                applied.push(position);
                if let Some(cache) = rule.settings.cache {
                    (enabled, by) = (cache, Some(position));
                }
            }
        }
        let facts = view.facts;
        match (enabled, by) {
            (true, _) => {}
            (false, Some(rule)) => return Asked::Bypass(Bypass::Rule(rule)),
            (false, None) => return Asked::Off,
        }
        if !matches!(*facts.method, Method::GET | Method::HEAD) {
            return Asked::Bypass(Bypass::Method);
        }
        if facts.has_body || facts.headers.contains_key(header::UPGRADE) {
            return Asked::Bypass(Bypass::Request);
        }
        let directives = if route.request_directives { reuse::wanted(facts.headers) } else { fields::Directives::default() };
        let key = Key::new(&Wanted { rewritten, ..wanted(view, route) }, self.policy(&applied).key);
        let (no_store, only_if_cached) = (directives.no_store, directives.only_if_cached);
        Asked::Lookup(Box::new(Lookup { key, applied, no_store, only_if_cached }))
    }

    /// What rules say together.
    pub fn policy(&self, applied: &[u16]) -> Policy<'_> {
        let mut policy = Policy {
            edge: None,
            browser: None,
            key: None,
            while_revalidate: Duration::ZERO,
            if_error: self.grace,
            cookies: None,
            cache: self,
        };
        for rule in applied.iter().filter_map(|at| self.rules.get(usize::from(*at))) {
            let Settings { cache: _, edge, browser, key, while_revalidate, if_error, cookies, tags: _ } = &rule.settings;
            policy.edge = edge.as_ref().or(policy.edge);
            policy.browser = browser.or(policy.browser);
            policy.key = key.as_ref().or(policy.key);
            policy.while_revalidate = while_revalidate.unwrap_or(policy.while_revalidate);
            policy.if_error = if_error.unwrap_or(policy.if_error);
            policy.cookies = cookies.or(policy.cookies);
        }
        policy
    }

    /// Tags that rules give.
    pub fn tags<'a>(&'a self, applied: &'a [u16]) -> impl Iterator<Item = &'a str> {
        let rules = applied.iter().filter_map(|at| self.rules.get(usize::from(*at)));
        rules.flat_map(|rule| rule.settings.tags.iter().map(|tag| &**tag))
    }
}

/// A request as keys see it: path and query as the origin gets them.
fn wanted<'a>(view: &'a View<'_>, route: RouteCache) -> Wanted<'a> {
    let (path, query) = view.target.rewritten;
    Wanted {
        tls: view.facts.tls,
        route: view.route.filter(|_| route.conditional),
        host: view.facts.host,
        path: if path { &view.target.path } else { view.target.raw_path },
        query: if query { Some(&*view.target.query).filter(|q| !q.is_empty()) } else { view.target.raw_query },
        rewritten: None,
        headers: view.facts.headers,
        country: view.asker.place.country.as_str(),
        trusted_peer: view.asker.trusted_peer,
    }
}

/// Headers that frameworks make something of, and no client needs: what is stored for all must not hang on them.
/// (Kettle, Practical Web Cache Poisoning, 2018.)
const UNKEYED: [&str; 14] = [
    "x-forwarded-path",
    "x-forwarded-prefix",
    "x-forwarded-scheme",
    "x-forwarded-server",
    "x-forwarded-ssl",
    "x-host",
    "x-http-host-override",
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
    "x-original-host",
    "x-original-url",
    "x-rewrite-url",
    "x-url-scheme",
];

/// Must a request header (lower case) be dropped from what may be stored, since it is part of no key? Servers that make
/// variables of names take an underscore for a dash, and so `keyed` has only the dashed one.
pub fn is_unkeyed(name: &str, keyed: &[HeaderName]) -> bool {
    name.starts_with('x') && UNKEYED.iter().any(|known| same_header(known, name)) && keyed.iter().all(|keyed| keyed != name)
}

/// The method that purges a URL, as Varnish and Squid have it.
pub const PURGE: &str = "PURGE";

/// May whoever sends this purge (`Authorization: Bearer …`)?
pub fn may_purge(token: &Secret, headers: &http::HeaderMap) -> bool {
    let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let given = given.and_then(|value| value.strip_prefix(b"Bearer ")).unwrap_or_default();
    crate::signing::same(token.reveal(), std::str::from_utf8(given).unwrap_or_default().trim())
}

/// Fields in which origins name a response's tags; they are not for clients.
pub const TAG_FIELDS: [&str; 2] = ["cache-tag", "surrogate-key"];

/// A response's tags, as its origin names them: `Cache-Tag` with commas, `Surrogate-Key` with spaces between.
pub fn tags_of(headers: &http::HeaderMap) -> impl Iterator<Item = &str> {
    let of = |name, by: char| {
        let lines = headers.get_all(name).iter().filter_map(|line| line.to_str().ok());
        lines.flat_map(move |line| line.split(by)).map(str::trim).filter(|tag| !tag.is_empty())
    };
    let [commas, spaces] = TAG_FIELDS;
    of(commas, ',').chain(of(spaces, ' '))
}

/// Which path and query `Location` and `Content-Location` mean, if they are of the same host (RFC 9111, section 4.4).
pub fn same_host_target<'a>(location: &'a str, host: &str, path: &str) -> Option<std::borrow::Cow<'a, str>> {
    use std::borrow::Cow;
    let location = location.split('#').next().unwrap_or_default();
    let schemes = ["http://", "https://", "//"];
    let rest = schemes.into_iter().find_map(|scheme| location.strip_prefix(scheme));
    let local = match rest {
        Some(rest) => {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            let (authority, target) = rest.split_at_checked(end)?;
            if !authority.eq_ignore_ascii_case(host) {
                return None;
            }
            target
        }
        None => location,
    };
    match local.as_bytes().first() {
        None if rest.is_some() => Some(Cow::Borrowed("/")),
        None => None,
        Some(b'/') => Some(Cow::Borrowed(local)),
        Some(b'?') if rest.is_some() => Some(Cow::Owned(format!("/{local}"))),
        Some(b'?') => Some(Cow::Owned(format!("{path}{local}"))),
        // Another scheme is another host.
        Some(_) if local.split('/').next().is_some_and(|first| first.contains(':')) => None,
        Some(_) => {
            let folder = path.rfind('/').and_then(|at| path.get(..=at)).unwrap_or("/");
            Some(Cow::Owned(format!("{folder}{local}")))
        }
    }
}
