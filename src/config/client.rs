//! Who is asking.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{HeaderName, Network};

/// How the client's address and country are found.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// Networks whose word about the client is taken. Nobody by default: the peer is the client.
    #[serde(default)]
    pub trusted_proxies: Vec<Network>,
    /// The header to read, right to left, past trusted hops; only when the peer is trusted.
    #[serde(default = "default_ip_header")]
    pub ip_header: HeaderName,
    /// A country database in MaxMind's format. Without one everybody is `XX`.
    #[serde(default)]
    pub country_database: Option<PathBuf>,
    /// A city database in MaxMind's format: subdivisions, coordinates, and countries where `country_database` is not set.
    #[serde(default)]
    pub city_database: Option<PathBuf>,
    /// A database of autonomous systems in MaxMind's format: `ip.src.asnum` in rules.
    #[serde(default)]
    pub asn_database: Option<PathBuf>,
}

fn default_ip_header() -> HeaderName {
    HeaderName(http::HeaderName::from_static("x-forwarded-for"))
}

impl Default for Client {
    fn default() -> Self {
        Self {
            trusted_proxies: Vec::new(),
            ip_header: default_ip_header(),
            country_database: None,
            city_database: None,
            asn_database: None,
        }
    }
}
