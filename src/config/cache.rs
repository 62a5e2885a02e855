//! What is answered without the origin.

use std::path::PathBuf;
use std::time::Duration;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{HeaderName, Name, Secret, Size, Span};

/// The cache. It does nothing until a route or a rule enables it.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// For what is kept in memory, headers included.
    #[serde(default = "default_memory")]
    pub memory: Size,
    /// A second tier, which survives a restart. None by default. A change needs a restart.
    #[serde(default)]
    pub disk: Option<Disk>,
    /// For how long what is stale may be served where the origin fails, unless the response forbids it.
    #[serde(default = "default_grace")]
    pub grace: Span,
    /// A response that says nothing of freshness is fresh for a tenth of the time since it was modified, at most a day.
    #[serde(default = "yes")]
    pub heuristic_freshness: bool,
    /// Fields that take the place of `Cache-Control` for this cache (RFC 9213), the first that is there.
    #[serde(default = "default_targeted")]
    pub targeted_fields: Vec<HeaderName>,
    /// Never more requests than this wait for others' responses; those beyond ask the origin themselves.
    #[serde(default = "default_waiters")]
    pub max_waiters: u32,
    /// Whoever sends this as `Authorization: Bearer …` may `PURGE` URLs. Nobody by default.
    #[serde(default)]
    pub purge_token: Option<Secret>,
    /// Rules, in order. All that match apply; of what two of them say the later counts.
    #[serde(default)]
    pub rules: Vec<CacheRule>,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            memory: default_memory(),
            disk: None,
            grace: default_grace(),
            heuristic_freshness: true,
            targeted_fields: default_targeted(),
            max_waiters: default_waiters(),
            purge_token: None,
            rules: Vec::new(),
        }
    }
}

fn default_memory() -> Size {
    Size(256 << 20)
}

fn default_grace() -> Span {
    Span(Duration::from_secs(86_400))
}

fn default_waiters() -> u32 {
    10_000
}

fn yes() -> bool {
    true
}

fn default_targeted() -> Vec<HeaderName> {
    ["portolan-cache-control", "cdn-cache-control"].map(|name| HeaderName(http::HeaderName::from_static(name))).to_vec()
}

/// The second tier.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// A folder of the cache's own.
    pub path: PathBuf,
    /// How much of the disk it may take.
    pub size: Size,
}

/// What a route says of the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RouteCache {
    /// Its responses may be stored, unless a rule says otherwise.
    #[serde(default)]
    pub enabled: bool,
    /// Requests may say `no-cache`, `max-age` and the like. A stranger's way to have every request reach the origin.
    #[serde(default)]
    pub request_directives: bool,
}

/// One rule.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CacheRule {
    /// Its name in explanations.
    pub id: Name,
    /// When it applies.
    pub expression: String,
    /// May responses be stored? What the route says, by default.
    #[serde(default)]
    pub cache: Option<bool>,
    /// For how long they are fresh.
    #[serde(default)]
    pub edge_ttl: Option<EdgeTtl>,
    /// For how long browsers may keep them, in place of what the origin says.
    #[serde(default)]
    pub browser_ttl: Option<Span>,
    /// What the key is made of, beside scheme, host and path.
    #[serde(default)]
    pub key: Option<CacheKey>,
    /// What may be done with what is stale, where the origin does not say it.
    #[serde(default)]
    pub serve_stale: Option<ServeStale>,
    /// What becomes of responses that set cookies. By default they are not stored.
    #[serde(default)]
    pub set_cookie: Option<SetCookie>,
    /// Tags to purge by, beside those that the origin names.
    #[serde(default)]
    pub tags: Vec<String>,
}

/// For how long responses are fresh.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EdgeTtl {
    /// Does the origin have a say?
    #[serde(default)]
    pub mode: EdgeMode,
    /// Of statuses below 400 that `status` does not name.
    #[serde(default)]
    pub default: Option<Span>,
    /// By status: `200`, `4xx`, `500-504`. `0s`: it is not stored.
    #[serde(default)]
    pub status: IndexMap<String, Span>,
}

/// Does the origin have a say?
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EdgeMode {
    /// What the origin says counts; this, where it says nothing.
    #[default]
    Respect,
    /// This counts, whatever the origin says, `no-store` and `private` included.
    Override,
}

/// What a key is made of, beside scheme, host and path.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CacheKey {
    /// Which arguments of the query; all by default.
    #[serde(default)]
    pub query: CacheQuery,
    /// Headers of the request.
    #[serde(default)]
    pub headers: Vec<HeaderName>,
    /// Cookies, by name.
    #[serde(default)]
    pub cookies: Vec<String>,
    /// The client's country.
    #[serde(default)]
    pub country: bool,
    /// `mobile`, `tablet` or `desktop`.
    #[serde(default)]
    pub device: bool,
}

/// Which arguments of the query are part of the key.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CacheQuery {
    /// Only these; none, if it is empty.
    #[serde(default)]
    pub include: Option<Vec<String>>,
    /// All but these.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Their order means nothing.
    #[serde(default)]
    pub sort: bool,
}

/// What may be done with what is stale, where the origin does not say it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServeStale {
    /// For so long it is served while another is fetched. Not at all by default.
    #[serde(default)]
    pub while_revalidate: Option<Span>,
    /// For so long it is served where the origin fails; `cache.grace` by default.
    #[serde(default)]
    pub if_error: Option<Span>,
}

/// What becomes of responses that set cookies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SetCookie {
    /// They are stored as they are: everybody gets the same cookies.
    Share,
    /// They are stored without their cookies, which only the client gets that caused them.
    Strip,
}
