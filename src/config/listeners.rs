//! Sockets and files of the process itself.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{Address, Secret, Span};

/// One address that clients connect to. HTTP/1.1, and HTTP/2 by prior knowledge.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// IP address and port.
    pub address: Address,
}

pub(super) fn default_listeners() -> Vec<Listener> {
    vec![Listener { address: Address(([127, 0, 0, 1], 8080).into()) }]
}

/// The admin address: metrics, status, reload. Never a data port.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// IP address and port.
    #[serde(default = "default_admin_address")]
    pub address: Address,
    /// Asked for as `Authorization: Bearer …`; required where the address is not loopback.
    #[serde(default)]
    pub token: Option<Secret>,
}

fn default_admin_address() -> Address {
    Address(([127, 0, 0, 1], 9901).into())
}

impl Default for Admin {
    fn default() -> Self {
        Self { address: default_admin_address(), token: None }
    }
}

/// Where the access log goes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AccessLog {
    /// `stdout`, `off`, or a file's path.
    #[serde(default = "default_log_path")]
    pub path: PathBuf,
}

fn default_log_path() -> PathBuf {
    "stdout".into()
}

impl Default for AccessLog {
    fn default() -> Self {
        Self { path: default_log_path() }
    }
}

/// How the process stops.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Shutdown {
    /// How long requests in flight may go on after SIGTERM; it ends as soon as none is left.
    #[serde(default = "default_grace")]
    pub grace: Span,
}

fn default_grace() -> Span {
    Span(Duration::from_secs(30))
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { grace: default_grace() }
    }
}

/// How names are resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resolver {
    /// DNS servers to ask in place of the system's.
    #[serde(default)]
    pub servers: Vec<Address>,
}
