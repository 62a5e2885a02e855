//! Where the backends are.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{Authority, UpstreamUrl};

/// One region.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Its upstreams; requests are spread over them by weight.
    #[schemars(length(min = 1))]
    pub upstreams: Vec<Upstream>,
}

/// One backend, as a URL or with options.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Upstream {
    /// Just where it listens.
    Url(UpstreamUrl),
    /// With options.
    Options(UpstreamOptions),
}

/// One backend with options.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UpstreamOptions {
    /// `http://`, `https://` or `h2c://`, a host and a port. Names are resolved again in the background.
    pub url: UpstreamUrl,
    /// Its share of the region's requests.
    #[serde(default = "default_weight")]
    #[schemars(range(min = 1, max = 100))]
    pub weight: u32,
    /// Sent as `Host` in place of the client's.
    #[serde(default)]
    pub host: Option<Authority>,
    /// How an `https://` upstream is verified.
    #[serde(default)]
    pub tls: UpstreamTls,
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
}

impl Upstream {
    /// The same with every option filled in.
    pub fn options(&self) -> UpstreamOptions {
        match self {
            Self::Url(url) => {
                UpstreamOptions { url: url.clone(), weight: default_weight(), host: None, tls: UpstreamTls::default() }
            }
            Self::Options(options) => options.clone(),
        }
    }
}
