//! Which requests go where, and how patiently.

use std::time::Duration;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;

use super::cache::RouteCache;
use super::transforms::HeaderEdits;
use super::units::{Area, Continent, HostPattern, Name, PathPrefix, Size, Span};
use super::waf::{Redirection, Text};

/// One route.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Its name in metrics, logs and `explain`; by default `route-1` and so on, by position.
    #[serde(default)]
    pub name: Option<Name>,
    /// Hosts it serves; any by default.
    #[serde(default)]
    pub hosts: Vec<HostPattern>,
    /// Path prefixes it serves; any by default. `/api` matches `/api` and `/api/x`, `/api/` only what is below.
    #[serde(default)]
    pub paths: Vec<PathPrefix>,
    /// Only requests for which this expression is true. Routes with one come before those of the same host and path
    /// without; among themselves the first in the file wins.
    #[serde(default, rename = "match")]
    pub matches: Option<String>,
    /// Which regions, in which order.
    #[serde(default)]
    pub steering: Steering,
    /// Never more requests of this route than this at once. Any by default.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub max_requests: Option<u32>,
    /// Every request of this route is sent elsewhere: to another address, by its client.
    #[serde(default)]
    pub redirect: Option<Redirection>,
    /// What of it the origin and the client see changed. Rules, limits and other routes do not see it.
    #[serde(default)]
    pub rewrite: Rewrite,
    /// How long a request's body may be (413). Any by default.
    #[serde(default)]
    pub max_body: Option<Size>,
    /// What of it may be answered without the origin. Nothing by default.
    #[serde(default)]
    pub cache: RouteCache,
    /// What is compressed for clients. Nothing by default: where a secret stands beside what a client chose, the length of a
    /// compressed response tells of both.
    #[serde(default)]
    pub compression: Compression,
    /// Calls of gRPC-Web (`application/grpc-web`) go on as gRPC; upstreams have to be `h2c://` or `https://`.
    #[serde(default)]
    pub grpc_web: bool,
    /// Clients come over TLS. They may come without, by default.
    #[serde(default)]
    pub https: Https,
    /// How long to wait for what.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// What is tried again.
    #[serde(default)]
    pub retry: Retry,
    /// Responses may pause for up to `timeouts.idle`, from the header on (long polling, event streams).
    #[serde(default)]
    pub streaming: bool,
    /// Tell the client the region that answered, as `Portolan-Region`.
    #[serde(default = "yes")]
    pub region_header: bool,
    /// An upstream may answer `fly-replay` or `Portolan-Replay` to have the request sent elsewhere.
    #[serde(default = "yes")]
    pub replay: bool,
    /// Clients may choose with `Portolan-Prefer-Region` and `Portolan-Force-Region`, or Fly's names for the same.
    #[serde(default)]
    pub client_regions: bool,
}

/// What a route rewrites.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rewrite {
    /// The origin does not see this beginning of the path: with `/api`, `/api/x` becomes `/x`.
    #[serde(default)]
    pub strip_prefix: Option<PathPrefix>,
    /// The origin sees this path.
    #[serde(default)]
    pub path: Option<Text>,
    /// The origin sees this query, without its `?`; an empty one removes it.
    #[serde(default)]
    pub query: Option<Text>,
    /// Headers that the origin gets.
    #[serde(default)]
    pub request: HeaderEdits,
    /// Headers that the client gets.
    #[serde(default)]
    pub response: HeaderEdits,
}

/// Which responses are compressed, unless they come compressed, are parts of something, or say `no-transform`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Compression {
    /// Whether any is.
    pub enabled: bool,
    /// What with, the better first.
    pub codings: Vec<Coding>,
    /// From this length on, where it is known.
    pub min_length: Size,
    /// Media types: one (`text/html`), all of a kind (`text/*`), or all of a syntax (`+json`).
    pub types: Vec<String>,
}

/// A content coding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Coding {
    /// Zstandard.
    Zstd,
    /// Brotli.
    Br,
    /// gzip.
    Gzip,
}

impl Default for Compression {
    fn default() -> Self {
        const TYPES: [&str; 10] = [
            "text/*",
            "application/json",
            "application/javascript",
            "application/xml",
            "application/wasm",
            "application/manifest+json",
            "image/svg+xml",
            "font/ttf",
            "+json",
            "+xml",
        ];
        Self {
            enabled: false,
            codings: vec![Coding::Zstd, Coding::Br, Coding::Gzip],
            min_length: Size(1 << 10),
            types: TYPES.map(str::to_owned).to_vec(),
        }
    }
}

/// What becomes of clients that come without TLS, and whether browsers remember to come with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Https {
    /// Whoever comes without TLS is sent to the same address with it (308).
    #[serde(default)]
    pub redirect: bool,
    /// The port that they are sent to.
    #[serde(default = "https_port")]
    #[schemars(range(min = 1))]
    pub port: u16,
    /// `Strict-Transport-Security`, on what goes out over TLS. None by default.
    #[serde(default)]
    pub hsts: Option<Hsts>,
}

/// HTTP Strict Transport Security (RFC 6797).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hsts {
    /// For so long a browser comes with TLS only; `0s` takes it back.
    pub max_age: Span,
    /// So it does to every host below.
    #[serde(default)]
    pub include_subdomains: bool,
    /// Browsers may ship it: hard to take back.
    #[serde(default)]
    pub preload: bool,
}

fn https_port() -> u16 {
    443
}

impl Default for Https {
    fn default() -> Self {
        Self { redirect: false, port: https_port(), hsts: None }
    }
}

fn yes() -> bool {
    true
}

/// Which regions serve a client, in which order.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Steering {
    /// How regions are ordered.
    #[serde(default)]
    pub policy: Policy,
    /// The region of a country, or of a subdivision (`US-CA`), or several in order.
    #[serde(default)]
    #[schemars(extend("propertyNames" = { "format": "area" }))]
    pub countries: IndexMap<Area, OneOrMany>,
    /// The same for continents; a country comes before its continent.
    #[serde(default)]
    #[schemars(extend("propertyNames" = { "format": "continent" }))]
    pub continents: IndexMap<Continent, OneOrMany>,
    /// For an unknown country, or one not listed. The first region of the file by default.
    #[serde(default)]
    pub default: Option<OneOrMany>,
    /// Tried after the above, in order, without repeats. None by default.
    #[serde(default)]
    pub failover: Vec<Name>,
    /// Residency: no request of this route ever leaves these regions. Any region by default.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub only: Option<Vec<Name>>,
    /// `policy: weighted`: each region's share.
    #[serde(default)]
    #[schemars(extend("propertyNames" = { "format": "label" }))]
    pub weights: IndexMap<Name, u32>,
    /// `policy: weighted`: a client stays in its region.
    #[serde(default)]
    pub sticky: bool,
    /// Requests with unsafe methods go to this region and do not leave it.
    #[serde(default)]
    pub writes: Option<Name>,
    /// Unless it fails: then to these, in order. None by default.
    #[serde(default)]
    pub writes_failover: Vec<Name>,
    /// After a write a client's reads go to `writes` too, for this long. Kept in a signed cookie.
    #[serde(default)]
    pub read_your_writes: Option<Span>,
}

/// How regions are ordered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// By the client's subdivision, country, continent.
    #[default]
    Geo,
    /// By `weights`.
    Weighted,
    /// By distance from the client to each region's `location`.
    Proximity,
    /// By the time to first byte that this route's real traffic has lately seen.
    Latency,
}

/// One region, or an ordered list.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(Name),
    /// Several, in order.
    Many(#[schemars(length(min = 1))] Vec<Name>),
}

impl OneOrMany {
    /// As a list.
    pub fn as_slice(&self) -> &[Name] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        }
    }
}

/// How long to wait for what.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// TCP and TLS of one attempt.
    #[serde(default = "seconds::<1>")]
    pub connect: Span,
    /// For a response header; also the longest silence inside a response body.
    #[serde(default = "seconds::<5>")]
    pub first_byte: Span,
    /// In place of `first_byte` for upgrades, event streams, large or unbounded request bodies and `streaming` routes.
    #[serde(default = "seconds::<60>")]
    pub idle: Span,
    /// All attempts together, until a response header is passed to the client.
    #[serde(default = "seconds::<30>")]
    pub total: Span,
}

fn seconds<const N: u64>() -> Span {
    Span(Duration::from_secs(N))
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: seconds::<1>(), first_byte: seconds::<5>(), idle: seconds::<60>(), total: seconds::<30>() }
    }
}

/// What is tried again.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Retry {
    /// All tries, the first included. By default one more than there are candidate regions.
    #[serde(default)]
    #[schemars(range(min = 1, max = 16))]
    pub attempts: Option<u32>,
    /// Statuses that move a request on.
    #[serde(default = "default_statuses")]
    #[schemars(inner(range(min = 400, max = 599)))]
    pub statuses: Vec<u16>,
    /// Also repeat requests that may have had an effect (POST, PATCH). Never by default.
    #[serde(default)]
    pub non_idempotent: bool,
    /// Bounds what retries add to the load of upstreams that fail.
    #[serde(default)]
    pub budget: RetryBudget,
}

/// A route's retry budget, over a sliding window of 10 s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetryBudget {
    /// Retries for every hundred requests.
    #[serde(default = "default_percent")]
    #[schemars(range(max = 1500))]
    pub percent: u32,
    /// Retries a second that are always allowed.
    #[serde(default = "default_min_per_second")]
    #[schemars(range(max = 10_000))]
    pub min_per_second: u32,
}

fn default_percent() -> u32 {
    20
}

fn default_min_per_second() -> u32 {
    3
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { percent: default_percent(), min_per_second: default_min_per_second() }
    }
}

fn default_statuses() -> Vec<u16> {
    vec![502, 503, 504]
}

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: None, statuses: default_statuses(), non_idempotent: false, budget: RetryBudget::default() }
    }
}
