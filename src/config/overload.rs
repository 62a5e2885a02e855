//! Too much at once.

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::Name;

/// How much may be at once, and what is let go first where it is too much.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Overload {
    /// Requests at once of one client (IPv6: of one /64, as under `limits`). Any by default.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub max_requests_per_client: Option<u32>,
    /// Requests at once of all clients. Any by default.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub max_requests: Option<u32>,
    /// Connections at once of all clients. By default what the process may open, less what it needs for upstreams.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub max_connections: Option<u32>,
    /// Connections at once from one address, trusted proxies apart. Any by default.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub max_connections_per_client: Option<u32>,
    /// Kinds of requests, the most important first. Where there is too much the last are let go first.
    #[serde(default)]
    pub classes: Vec<Class>,
}

/// A kind of requests.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Its name in metrics.
    pub name: Name,
    /// Which requests are of it: the first class that matches. One class may leave this out: it takes all others.
    #[serde(default)]
    pub expression: Option<String>,
    /// The part that it may fill of every bound of regions, upstreams, routes and the process, in percent; by default 100 for the first, and 10 less for each that
    /// follows, but not less than 50.
    #[serde(default)]
    #[schemars(range(min = 1, max = 100))]
    pub share: Option<u8>,
}

/// The bound of a region's requests at once, found out from how long they take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Adaptive {
    /// Never fewer than this.
    #[serde(default = "default_min")]
    #[schemars(range(min = 1))]
    pub min: u32,
    /// Never more than this.
    #[serde(default = "default_max")]
    #[schemars(range(min = 1))]
    pub max: u32,
}

fn default_min() -> u32 {
    4
}

fn default_max() -> u32 {
    1_000
}
