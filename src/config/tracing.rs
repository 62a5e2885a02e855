//! Traces of requests, for a collector that speaks OpenTelemetry.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;

use super::access_log::Part;
use super::units::{HeaderName, Secret};

/// Traces: where they go, and which requests have one.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tracing {
    /// The collector's address for OTLP over HTTP: `http://127.0.0.1:4318`. Without a path `/v1/traces` is added.
    pub endpoint: String,
    /// Sent with every batch, for collectors that ask who sends.
    #[serde(default)]
    #[schemars(extend("propertyNames" = { "format": "header-name" }))]
    pub headers: IndexMap<HeaderName, Secret>,
    /// Which part of requests is traced, from 0 to 1. Those that end in 500 or more always are.
    #[serde(default = "default_sample")]
    pub sample: Part,
    /// `service.name` of the spans.
    #[serde(default = "default_service")]
    pub service: String,
    /// `traceparent` of anybody is believed: the request belongs to that trace, and is traced if it says so. By default
    /// that of `client.trusted_proxies` alone is; others' are remembered as a link.
    #[serde(default)]
    pub trust_clients: bool,
}

fn default_sample() -> Part {
    Part(0.01)
}

fn default_service() -> String {
    "portolan".to_owned()
}
