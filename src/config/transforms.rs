//! What is rewritten on the way, and who is sent elsewhere.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;

use super::units::HeaderName;
use super::waf::{RedirectStatus, Text};

/// Sends clients elsewhere before anything else is asked.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    /// When; always by default.
    #[serde(default)]
    pub expression: Option<String>,
    /// The address: a text, or an expression that gives one.
    pub to: Text,
    /// The status.
    #[serde(default)]
    pub status: RedirectStatus,
    /// Append the request's query.
    #[serde(default)]
    pub preserve_query: bool,
}

/// Changes a request before its route is chosen, and the headers of both directions.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Transform {
    /// When; always by default.
    #[serde(default)]
    pub expression: Option<String>,
    /// The new path. Routes, rules that follow and the origin see it.
    #[serde(default)]
    pub path: Option<Text>,
    /// The new query, without its `?`; an empty one removes it.
    #[serde(default)]
    pub query: Option<Text>,
    /// Headers that the origin gets.
    #[serde(default)]
    pub request: HeaderEdits,
    /// Headers that the client gets.
    #[serde(default)]
    pub response: HeaderEdits,
}

/// Changes of headers.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderEdits {
    /// Set to these values, whatever was there.
    #[serde(default)]
    #[schemars(extend("propertyNames" = { "format": "header-name" }))]
    pub set: IndexMap<HeaderName, Text>,
    /// Removed.
    #[serde(default)]
    pub remove: Vec<HeaderName>,
}
