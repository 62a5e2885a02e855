//! How often.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{HeaderName, Name, Size, Span};
use super::waf;

/// Rate limits: a list of them, or a mapping with that list under `rules`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Limits {
    /// The rules alone.
    Rules(Vec<Limit>),
    /// With settings for all.
    Settings(LimitSettings),
}

impl Default for Limits {
    fn default() -> Self {
        Self::Rules(Vec::new())
    }
}

impl Limits {
    /// The settings, defaults filled in.
    pub fn settings(&self) -> LimitSettings {
        match self {
            Self::Rules(rules) => LimitSettings { rules: rules.clone(), ..LimitSettings::default() },
            Self::Settings(settings) => settings.clone(),
        }
    }

    /// Do the rules stand under a key of their own?
    pub fn has_settings(&self) -> bool {
        matches!(self, Self::Settings(_))
    }
}

/// Rate limits with settings for all.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitSettings {
    /// For all counters together, from 1MiB to 16GiB: 64MiB hold 983,040 of them. A change needs a restart.
    #[serde(default = "default_memory")]
    pub memory: Size,
    /// How many bits of an IPv4 address are one client.
    #[serde(default = "default_ipv4")]
    #[schemars(range(min = 8, max = 32))]
    pub ipv4_prefix: u8,
    /// How many bits of an IPv6 address are one client.
    #[serde(default = "default_ipv6")]
    #[schemars(range(min = 16, max = 128))]
    pub ipv6_prefix: u8,
    /// The limits, in order.
    #[serde(default)]
    pub rules: Vec<Limit>,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self { memory: default_memory(), ipv4_prefix: default_ipv4(), ipv6_prefix: default_ipv6(), rules: Vec::new() }
    }
}

fn default_memory() -> Size {
    Size(64 << 20)
}

fn default_ipv4() -> u8 {
    32
}

fn default_ipv6() -> u8 {
    64
}

/// One limit.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Its name in logs, metrics and headers. Counters belong to it: under another name they begin anew.
    pub id: Name,
    /// To which requests it applies; to every one by default.
    #[serde(default)]
    pub expression: Option<String>,
    /// What is counted apart: each value has a counter of its own.
    #[serde(default = "default_by")]
    pub by: Vec<By>,
    /// So many,
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub requests: u32,
    /// in so long: from 1s to 7d.
    pub period: Span,
    /// How it is counted.
    #[serde(default)]
    pub algorithm: Algorithm,
    /// `token_bucket`: how many at once; by default `requests`.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub burst: Option<u32>,
    /// Which of them count, by default all. It may look at the response: then a request counts once that is there.
    #[serde(default)]
    pub counting_expression: Option<String>,
    /// Only what reaches the origin counts, and only that is refused.
    #[serde(default)]
    pub only_misses: bool,
    /// The response header in which the origin says how much the request counted, 0 to 1,000,000; without it nothing.
    #[serde(default)]
    pub cost_header: Option<HeaderName>,
    /// How long an offender stays refused; 0s: until there is room again.
    #[serde(default = "zero")]
    pub mitigation_timeout: Span,
    /// What becomes of what is too much.
    #[serde(default)]
    pub action: LimitAction,
    /// `block`: what the client gets; 429 and a line of text by default.
    #[serde(default)]
    pub response: Option<LimitResponse>,
    /// It counts and says what it would do, and refuses nobody.
    #[serde(default)]
    pub dry_run: bool,
    /// Tell clients in `RateLimit` and `RateLimit-Policy` how much is left.
    #[serde(default)]
    pub headers: bool,
    /// With a `cluster`: who is asked.
    #[serde(default)]
    pub consistency: Consistency,
    /// With a `cluster`: what happens while Redis cannot be reached.
    #[serde(default)]
    pub failure_mode: FailureMode,
}

fn default_by() -> Vec<By> {
    vec![By::Expression("ip.src".to_owned())]
}

fn zero() -> Span {
    Span(Duration::ZERO)
}

/// What a counter is for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum By {
    /// An expression that gives one value, such as `ip.src`; or `country`, `asn`, `host` or `path`.
    Expression(String),
    /// A header, a cookie or an argument of the query: its first value.
    Part(ByPart),
}

/// One of the three.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ByPart {
    /// A header of the request.
    #[serde(default)]
    pub header: Option<HeaderName>,
    /// A cookie.
    #[serde(default)]
    pub cookie: Option<String>,
    /// An argument of the query.
    #[serde(default)]
    pub query: Option<String>,
}

/// How it is counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Never more than `requests` in any window of `period`.
    #[default]
    Sliding,
    /// `burst` at once, and `requests` spread evenly over each `period`.
    TokenBucket,
    /// `requests` in each `period`, counted from zero in the next.
    Fixed,
}

/// What becomes of what is too much.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LimitAction {
    /// 429 with `Retry-After`.
    #[default]
    Block,
    /// As in `waf.rules`; whoever passes begins anew.
    Challenge,
    /// As in `waf.rules`; whoever passes begins anew.
    JsChallenge,
    /// As in `waf.rules`; whoever passes begins anew.
    ManagedChallenge,
    /// Nothing: it is counted and logged.
    Log,
}

/// What a client gets that asked too often.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitResponse {
    /// The status.
    #[serde(default = "default_status")]
    #[schemars(range(min = 400, max = 599))]
    pub status: u16,
    /// `Content-Type` of the body.
    #[serde(default = "waf::default_content_type")]
    pub content_type: String,
    /// The body.
    #[serde(default)]
    pub body: String,
}

fn default_status() -> u16 {
    429
}

/// Who is asked whether there is room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// This node, which hears from the others within 50 ms.
    #[default]
    Eventual,
    /// Redis, for every request, within 5 ms.
    Strict,
}

/// What happens while Redis cannot be reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureMode {
    /// Each node counts for itself.
    #[default]
    Local,
    /// Nobody passes: 503.
    Deny,
}
