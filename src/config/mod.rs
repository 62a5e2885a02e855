//! What the operator writes. Types only; one file per stage, with the stage's name.
//!
//! YAML -> [`tree`] (every node knows its place) -> overlay merged -> [`check`]ed against the schema of
//! these types, collecting every [`Problem`] -> [`Config`]. [`load`] does these steps in order.

pub mod access_log;
mod cache;
pub mod check;
mod client;
mod cluster;
mod connections;
pub mod limits;
mod listeners;
mod lists;
pub mod load;
mod overload;
pub mod problem;
mod regions;
mod routes;
mod tracing;
mod transforms;
pub mod tree;
pub mod units;
pub mod waf;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;

pub use access_log::AccessLog;
pub use cache::{Cache, CacheKey, CacheQuery, CacheRule, Disk, EdgeMode, EdgeTtl, RouteCache, SetCookie};
pub use client::Client;
pub use cluster::Cluster;
pub use connections::Connections;
pub use limits::Limits;
pub use listeners::{Acme, Admin, Certificate, ClientAuth, Listener, Profile, Resolver, Shutdown, Tls};
pub use lists::{List, Source};
pub use load::{Failed, Fingerprint, Input, Loaded, Paths, load};
pub use overload::{Adaptive, Class, Overload};
pub use problem::{Problem, Severity};
pub use regions::{
    Affinity, AffinityFailover, Balance, BalancePolicy, CheckKind, CheckMethod, Files, HashBy, HashField, HealthCheck, Location,
    ProxyVersion, Queue, Region, Upstream, UpstreamOptions, UpstreamTls,
};
pub use routes::{Coding, Compression, Hsts, Https, OneOrMany, Policy, Retry, RetryBudget, Rewrite, Route, Steering, Timeouts};
pub use tracing::Tracing;
pub use transforms::{HeaderEdits, Redirect, Transform};
use units::Name;
pub use waf::Waf;

/// The whole configuration file.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Portolan configuration")]
pub struct Config {
    /// Where clients connect. A change needs a restart.
    #[serde(default = "listeners::default_listeners")]
    pub listeners: Vec<Listener>,
    /// What clients' connections are held to.
    #[serde(default)]
    pub connections: Connections,
    /// Where operators and Prometheus connect. A change needs a restart.
    #[serde(default)]
    pub admin: Admin,
    /// How the client's address and country are found.
    #[serde(default)]
    pub client: Client,
    /// The regions, each with its upstreams.
    #[schemars(extend("propertyNames" = { "format": "label" }))]
    pub regions: IndexMap<Name, Region>,
    /// Which requests go where. The most specific host, then the longest path wins; order never matters.
    pub routes: Vec<Route>,
    /// Lists that expressions ask (`ip.src in $office`).
    #[serde(default)]
    #[schemars(extend("propertyNames" = { "format": "label" }))]
    pub lists: IndexMap<Name, List>,
    /// Clients that are sent elsewhere before anything else is asked; the first that matches counts.
    #[serde(default)]
    pub redirects: Vec<Redirect>,
    /// What is rewritten on the way; every one that matches, in order.
    #[serde(default)]
    pub transforms: Vec<Transform>,
    /// What may pass.
    #[serde(default)]
    pub waf: Waf,
    /// How often.
    #[serde(default)]
    pub limits: Limits,
    /// How much at once.
    #[serde(default)]
    pub overload: Overload,
    /// What is answered without the origin.
    #[serde(default)]
    pub cache: Cache,
    /// Other nodes: limits hold for all together, and orders for regions reach every one. A change needs a restart.
    #[serde(default)]
    pub cluster: Option<Cluster>,
    /// One line per request.
    #[serde(default)]
    pub access_log: AccessLog,
    /// Traces of requests, for a collector that speaks OpenTelemetry. Off unless given.
    #[serde(default)]
    pub tracing: Option<Tracing>,
    /// How the process stops.
    #[serde(default)]
    pub shutdown: Shutdown,
    /// How names of upstreams are resolved. A change needs a restart.
    #[serde(default)]
    pub resolver: Resolver,
    /// A folder of Portolan's own: drained and evacuated regions survive a restart there. A change needs a restart.
    #[serde(default)]
    pub state_dir: Option<std::path::PathBuf>,
    /// Where `portolan run --upgrade` waits for the sockets of the running process. A change needs a restart.
    #[serde(default)]
    pub upgrade_socket: Option<std::path::PathBuf>,
    /// Signs cookies. By default made at random, and kept in `state_dir` where there is one. A change needs a restart.
    #[serde(default)]
    pub secret: Option<units::Secret>,
}

/// The JSON Schema of [`Config`]: what `portolan schema` prints and what files are checked against.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Config).to_value()
}
