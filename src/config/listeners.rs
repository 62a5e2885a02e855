//! Sockets and files of the process itself.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{Address, HostPattern, Secret, Span};

/// One address that clients connect to. HTTP/1.1, and HTTP/2 by prior knowledge or, over TLS, by ALPN.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// IP address and port.
    pub address: Address,
    /// Clients speak TLS.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// Every connection comes from one of `client.trusted_proxies`, and begins with who the client is (PROXY protocol,
    /// version 1 or 2).
    #[serde(default)]
    pub proxy_protocol: bool,
}

/// What clients are shown, and what they have to show.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The one for a client's name is shown to it; the first one to whoever asks for another name, or for none.
    #[serde(default)]
    pub certificates: Vec<Certificate>,
    /// Certificates that are got and renewed by themselves (ACME, RFC 8555), beside these. Whoever sets it agrees to the
    /// terms of service of the authority.
    #[serde(default)]
    pub acme: Option<Acme>,
    /// Which versions and ciphers: Mozilla's `intermediate` (TLS 1.2 and 1.3), or `modern` (TLS 1.3 alone).
    #[serde(default)]
    pub profile: Profile,
    /// Clients show certificates, too.
    #[serde(default)]
    pub client_auth: Option<ClientAuth>,
}

/// A certificate with its key. Changed files are used from the next handshake on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// A PEM file with the certificate, and the chain to its authority. Its names are those of its subject alternative names.
    pub cert: PathBuf,
    /// A PEM file with its private key.
    pub key: PathBuf,
    /// A file with the authority's OCSP response, in DER, that is shown with it (stapled).
    #[serde(default)]
    pub ocsp: Option<PathBuf>,
}

/// Certificates from an authority that speaks ACME.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Acme {
    /// Whom the authority may write to.
    #[serde(default)]
    pub email: Option<String>,
    /// The URL of the authority's directory.
    #[serde(default = "default_directory")]
    pub directory: String,
    /// A PEM file with the authority of the directory's own certificate. Those that the system knows by default.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Each gets a certificate. All `hosts` of routes by default, but for wildcards.
    #[serde(default)]
    pub names: Vec<HostPattern>,
    /// A folder for accounts, keys and certificates. Nodes that share it share them. `acme` in `state_dir` by default.
    #[serde(default)]
    pub storage: Option<PathBuf>,
}

fn default_directory() -> String {
    "https://acme-v02.api.letsencrypt.org/directory".to_owned()
}

/// Versions and ciphers, by Mozilla's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// TLS 1.2 with forward secrecy and authenticated encryption, and TLS 1.3.
    #[default]
    Intermediate,
    /// TLS 1.3 alone.
    Modern,
}

/// Which clients' certificates are accepted.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClientAuth {
    /// A PEM file of the authorities that sign clients' certificates.
    pub ca: PathBuf,
    /// Clients without one are let in as well.
    #[serde(default)]
    pub optional: bool,
}

pub(super) fn default_listeners() -> Vec<Listener> {
    vec![Listener { address: Address(([127, 0, 0, 1], 8080).into()), tls: None, proxy_protocol: false }]
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
