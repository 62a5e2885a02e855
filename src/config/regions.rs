//! Where the backends are, and how each is treated.

use std::path::PathBuf;
use std::time::Duration;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{Authority, CookieName, HeaderName, Span, StatusClass, UpstreamUrl};

/// One region.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Its upstreams.
    #[schemars(length(min = 1))]
    pub upstreams: Vec<Upstream>,
    /// Where it is; `policy: proximity` needs it.
    #[serde(default)]
    pub location: Option<Location>,
    /// Asks every upstream again and again how it is. Off by default; what traffic tells always counts.
    #[serde(default)]
    pub health_check: Option<HealthCheck>,
    /// How requests are spread over the upstreams.
    #[serde(default)]
    pub balance: Balance,
    /// Keeps a client at one upstream by a cookie.
    #[serde(default)]
    pub affinity: Option<Affinity>,
    /// Never more requests than this at once, over all upstreams.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub max_requests: Option<u32>,
    /// From this many requests at once on, other regions with room come first.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub soft_limit: Option<u32>,
    /// Find out from how long answers take how many requests at once it can answer, and never send it more. Off unless
    /// given; `{}` turns it on.
    #[serde(default)]
    pub adaptive: Option<super::Adaptive>,
    /// Where requests wait when `max_requests` is reached everywhere.
    #[serde(default)]
    pub queue: Queue,
    /// An upstream that comes back gets its full share only after this long.
    #[serde(default = "default_slow_start")]
    pub slow_start: Span,
}

fn default_slow_start() -> Span {
    Span(Duration::from_secs(10))
}

/// A point on the globe, in degrees.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Location {
    /// North is positive.
    #[schemars(range(min = -90, max = 90))]
    pub latitude: f64,
    /// East is positive.
    #[schemars(range(min = -180, max = 180))]
    pub longitude: f64,
}

/// One backend, as a URL or with options.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Upstream {
    /// Just where it listens.
    Url(UpstreamUrl),
    /// With options.
    Options(Box<UpstreamOptions>),
}

/// One backend with options.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UpstreamOptions {
    /// `http://`, `https://` or `h2c://`, a host and a port; or `unix:/path`. Names are resolved again as their
    /// TTL says; a name that begins with `_` is a service (SRV).
    #[serde(default)]
    pub url: Option<UpstreamUrl>,
    /// In place of `url`: files of a folder of this machine.
    #[serde(default)]
    pub files: Option<Files>,
    /// Connections to it begin with who the client is (PROXY protocol). They are not shared between clients then. It does
    /// not, by default.
    #[serde(default)]
    pub proxy_protocol: Option<ProxyVersion>,
    /// Its share of the region's requests.
    #[serde(default = "default_weight")]
    #[schemars(range(min = 1, max = 100))]
    pub weight: u32,
    /// Used only while none of the others is usable.
    #[serde(default)]
    pub backup: bool,
    /// Sent as `Host` in place of the client's.
    #[serde(default)]
    pub host: Option<Authority>,
    /// Never more requests than this at once, at each of its addresses.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub max_requests: Option<u32>,
    /// From this many requests at once on, upstreams with room come first.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub soft_limit: Option<u32>,
    /// How an `https://` upstream is verified.
    #[serde(default)]
    pub tls: UpstreamTls,
}

/// A folder whose files are served: with ETag, Last-Modified and ranges, and compressed where `page.html.zst`, `.br` or `.gz`
/// stands beside `page.html`. Names that begin with a dot are not there, but for `.well-known`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The folder.
    pub root: PathBuf,
    /// `index.html` of a folder is served in its place.
    #[serde(default = "yes")]
    pub index: bool,
}

fn yes() -> bool {
    true
}

/// A version of the PROXY protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProxyVersion {
    /// Text.
    V1,
    /// Binary.
    V2,
}

fn default_weight() -> u32 {
    1
}

/// How an upstream's certificate is verified. It always is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UpstreamTls {
    /// The name to ask for and to verify; by default the URL's host. Needed where that is an address.
    #[serde(default)]
    pub sni: Option<String>,
    /// A PEM file of authorities to trust in place of the system's.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// A PEM file with the certificate, and its chain, that we show to the upstream.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    /// A PEM file with that certificate's private key.
    #[serde(default)]
    pub key: Option<PathBuf>,
}

impl Upstream {
    /// The same with every option filled in.
    pub fn options(&self) -> UpstreamOptions {
        match self {
            Self::Url(url) => UpstreamOptions {
                url: Some(url.clone()),
                files: None,
                proxy_protocol: None,
                weight: default_weight(),
                backup: false,
                host: None,
                max_requests: None,
                soft_limit: None,
                tls: UpstreamTls::default(),
            },
            Self::Options(options) => (**options).clone(),
        }
    }
}

/// How upstreams are asked how they are. Never more than one question at a time to each.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// What is asked.
    #[serde(default, rename = "type")]
    pub kind: CheckKind,
    /// `http`: the path.
    #[serde(default = "default_check_path")]
    pub path: String,
    /// `http`: the method.
    #[serde(default = "default_check_method")]
    pub method: CheckMethod,
    /// `http`: `Host`; by default the upstream's `host`, else the URL's.
    #[serde(default)]
    pub host: Option<Authority>,
    /// `http` and `grpc`: more headers.
    #[serde(default)]
    #[schemars(extend("propertyNames" = { "format": "header-name" }))]
    pub headers: Headers,
    /// `http`: statuses that are good.
    #[serde(default = "default_check_statuses")]
    #[schemars(length(min = 1))]
    pub statuses: Vec<Statuses>,
    /// `http`: the body has to contain this text, within its first 64 KiB.
    #[serde(default)]
    pub body: Option<String>,
    /// `grpc`: the service to ask about; by default the server as a whole.
    #[serde(default)]
    pub service: String,
    /// From the end of one check to the next, give or take a tenth. While in doubt five times as often.
    #[serde(default = "default_check_interval")]
    pub interval: Span,
    /// For connecting and answering together.
    #[serde(default = "default_check_timeout")]
    pub timeout: Span,
    /// Bad answers in a row that take it out.
    #[serde(default = "default_fall")]
    #[schemars(range(min = 1, max = 100))]
    pub fall: u32,
    /// Good answers in a row that bring it back.
    #[serde(default = "default_rise")]
    #[schemars(range(min = 1, max = 100))]
    pub rise: u32,
}

/// Headers by name, hashable, for a check is known by its digest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct Headers(pub IndexMap<HeaderName, String>);

impl std::hash::Hash for Headers {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.iter().for_each(|header| header.hash(state));
    }
}

fn default_check_path() -> String {
    "/".to_owned()
}

fn default_check_method() -> CheckMethod {
    CheckMethod::Get
}

fn default_check_statuses() -> Vec<Statuses> {
    vec![Statuses::Class(StatusClass(200, 299))]
}

fn default_check_interval() -> Span {
    Span(Duration::from_secs(5))
}

fn default_check_timeout() -> Span {
    Span(Duration::from_secs(1))
}

fn default_fall() -> u32 {
    3
}

fn default_rise() -> u32 {
    2
}

/// What a health check asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckKind {
    /// An HTTP request, over the same protocol and TLS as traffic.
    #[default]
    Http,
    /// A connection, nothing more.
    Tcp,
    /// `grpc.health.v1.Health/Check` over HTTP/2.
    Grpc,
}

/// The method of an HTTP health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum CheckMethod {
    /// With a body in the answer.
    Get,
    /// Without.
    Head,
    /// For servers that keep it cheap.
    Options,
}

/// One status, or a class or range of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Statuses {
    /// One.
    One(#[schemars(range(min = 100, max = 599))] u16),
    /// `2xx`, or `200-399`.
    Class(StatusClass),
}

impl Statuses {
    /// Is `status` among them?
    pub fn contains(self, status: u16) -> bool {
        match self {
            Self::One(one) => one == status,
            Self::Class(StatusClass(low, high)) => (low..=high).contains(&status),
        }
    }
}

/// How requests are spread over a region's upstreams.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Balance {
    /// By name.
    Policy(BalancePolicy),
    /// By a hash of something.
    Hash(HashBalance),
}

/// A way of balancing that needs no options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BalancePolicy {
    /// Of two at random the one with fewer requests at once, or the much faster one.
    LeastRequests,
    /// In turn.
    RoundRobin,
    /// By a hash of the client's address.
    Hash,
}

impl Default for Balance {
    fn default() -> Self {
        Self::Policy(BalancePolicy::LeastRequests)
    }
}

/// Balancing by a hash.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HashBalance {
    /// Of what.
    pub hash: HashBy,
}

/// What is hashed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum HashBy {
    /// By name.
    Client(HashClient),
    /// A cookie or a header. Without it the request is balanced by `least_requests`.
    Field(HashField),
}

/// A property of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HashClient {
    /// Its address.
    Ip,
}

/// Either of the two.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HashField {
    /// A cookie's value.
    #[serde(default)]
    pub cookie: Option<CookieName>,
    /// A header's value.
    #[serde(default)]
    pub header: Option<HeaderName>,
}

/// Keeps a client at one upstream.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Affinity {
    /// The cookie. Its value is a keyed hash, and reveals no address.
    pub cookie: CookieName,
    /// When its upstream fails: does the client go back to it later, or stay where it went?
    #[serde(default)]
    pub failover: AffinityFailover,
    /// How long the browser keeps the cookie; by default until it closes.
    #[serde(default)]
    pub max_age: Option<Span>,
}

/// What failover means for affinity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AffinityFailover {
    /// The cookie stays, so the client goes back once its upstream is well.
    #[default]
    Temporary,
    /// The cookie changes to the upstream that answered.
    Permanent,
}

/// A short queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// Requests that may wait; 0 refuses at once.
    #[serde(default = "default_queue_size")]
    #[schemars(range(max = 100_000))]
    pub size: u32,
    /// How long each may wait; then 503 with `Retry-After`.
    #[serde(default = "default_queue_timeout")]
    pub timeout: Span,
}

fn default_queue_size() -> u32 {
    64
}

fn default_queue_timeout() -> Span {
    Span(Duration::from_secs(1))
}

impl Default for Queue {
    fn default() -> Self {
        Self { size: default_queue_size(), timeout: default_queue_timeout() }
    }
}
