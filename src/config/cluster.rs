//! Other nodes.

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{Name, Secret};

/// Several Portolans that know of each other, through Redis or Valkey.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// `redis://[user:password@]host[:port][/db]`, or `rediss://` for TLS.
    pub redis: Secret,
    /// Nodes of the same name belong together; it begins every key in Redis.
    #[serde(default = "default_name")]
    pub name: Name,
}

fn default_name() -> Name {
    Name("portolan".to_owned())
}
