//! One line per request: where it goes, how it looks, and what is left out.

use std::path::PathBuf;
use std::str::FromStr;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{LogFormat, StatusClass};

/// Where the access log goes, and what is in it.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AccessLog {
    /// `stdout`, `off`, a file's path, or `syslog:` with a socket's path or with host and port of a server that takes
    /// UDP (`syslog:/dev/log`, `syslog:127.0.0.1:514`; RFC 5424).
    #[serde(default = "default_path")]
    pub path: PathBuf,
    /// `json`, `common`, `combined`, or a text with fields in braces: `{client} {status} {why}`.
    #[serde(default)]
    pub format: LogFormat,
    /// Which part of requests is logged, by status, from 0 to 1; the first that suits counts, and what none suits is
    /// logged. What failed (`5xx`) is best left out of this.
    #[serde(default)]
    #[schemars(extend("propertyNames" = { "format": "status-class" }))]
    pub sample: IndexMap<StatusClass, Part>,
    /// The query of the URL and of `Referer`: left out, logged with its values replaced, or as it is.
    #[serde(default)]
    pub query: Privacy,
    /// The `Cookie` header: left out, logged with its values replaced, or as it is.
    #[serde(default)]
    pub cookies: Privacy,
    /// Addresses of clients: as they are, or cut to networks (/24 of IPv4, /48 of IPv6). Holds for traces, too.
    #[serde(default)]
    pub addresses: Addresses,
}

/// A part of something, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct Part(#[schemars(range(min = 0, max = 1))] pub f64);

/// How much of something that may be secret is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Privacy {
    /// Nothing.
    #[default]
    Omit,
    /// Names, without their values.
    Redact,
    /// All.
    Keep,
}

/// How addresses of clients are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Addresses {
    /// As they are.
    #[default]
    Keep,
    /// As the network: /24 of IPv4, /48 of IPv6.
    Truncate,
}

/// What begins a place that is no file but a system log.
pub const SYSLOG: &str = "syslog:";

impl AccessLog {
    /// What stands behind `syslog:` can be no place: neither a socket's path nor host and port.
    pub fn is_misplaced(&self) -> bool {
        let Some(place) = self.path.to_str().and_then(|text| text.strip_prefix(SYSLOG)) else { return false };
        let port = place.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
        !place.starts_with('/') && port.is_none()
    }
}

fn default_path() -> PathBuf {
    "stdout".into()
}

impl Default for AccessLog {
    fn default() -> Self {
        Self {
            path: default_path(),
            format: LogFormat::default(),
            sample: IndexMap::new(),
            query: Privacy::default(),
            cookies: Privacy::default(),
            addresses: Addresses::default(),
        }
    }
}

/// A piece of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// As it stands.
    Text(String),
    /// What is known of the request.
    Field(Field),
}

macro_rules! fields {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// What a template can tell.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Field {
            $($(#[doc = $doc])+ $variant,)+
        }
        impl Field {
            /// Every field with its name.
            pub const ALL: &'static [(Self, &'static str)] = &[$((Self::$variant, $name)),+];
        }
    };
}

fields! {
    /// The end of the request, RFC 3339 with milliseconds.
    Time = "time",
    /// The end of the request as the Common Log Format writes it.
    TimeCommon = "time_common",
    /// `X-Request-Id`.
    RequestId = "request_id",
    /// The trace that it belongs to.
    TraceId = "trace_id",
    /// The client's address.
    Client = "client",
    /// The client's country.
    Country = "country",
    /// The method.
    Method = "method",
    /// The host.
    Host = "host",
    /// The path.
    Path = "path",
    /// The query with its `?`, as far as `query` lets it be told.
    Query = "query",
    /// `HTTP/1.1`, `HTTP/2.0`.
    Protocol = "protocol",
    /// The status; 499 if the client left before.
    Status = "status",
    /// Bytes of the body.
    Bytes = "bytes",
    /// `Referer`.
    Referer = "referer",
    /// `User-Agent`.
    UserAgent = "user_agent",
    /// `Cookie`, as far as `cookies` lets it be told.
    Cookies = "cookies",
    /// The route.
    Route = "route",
    /// The region of the last attempt.
    Region = "region",
    /// The upstream of the last attempt.
    Upstream = "upstream",
    /// How many attempts there were.
    Attempts = "attempts",
    /// What the cache did.
    Cache = "cache",
    /// Why it was no success.
    Why = "why",
    /// How long it took, in milliseconds.
    TotalMs = "total_ms",
}

/// The pieces of a template.
pub(super) fn pieces(text: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = text;
    let mut plain = String::new();
    while let Some(at) = rest.find(['{', '}']) {
        let (before, after) = rest.split_at(at);
        plain.push_str(before);
        if let Some(doubled) = after.strip_prefix("{{").or_else(|| after.strip_prefix("}}")) {
            plain.push_str(after.get(..1).unwrap_or_default());
            rest = doubled;
            continue;
        }
        let inside = after.strip_prefix('{').and_then(|inside| inside.split_once('}'));
        let Some((name, then)) = inside else {
            return Err("a brace stands alone: fields are `{name}`, and `{{` is a brace itself".to_owned());
        };
        let Some((field, _)) = Field::ALL.iter().find(|(_, known)| *known == name) else {
            let known: Vec<_> = Field::ALL.iter().map(|(_, name)| *name).collect();
            return Err(format!("`{name}` is no field; there are {}", known.join(", ")));
        };
        if !plain.is_empty() {
            pieces.push(Piece::Text(std::mem::take(&mut plain)));
        }
        pieces.push(Piece::Field(*field));
        rest = then;
    }
    plain.push_str(rest);
    if !plain.is_empty() {
        pieces.push(Piece::Text(plain));
    }
    Ok(pieces)
}

/// Apache's formats, as templates.
const COMMON: &str = r#"{client} - - [{time_common}] "{method} {path}{query} {protocol}" {status} {bytes}"#;
const COMBINED: &str =
    r#"{client} - - [{time_common}] "{method} {path}{query} {protocol}" {status} {bytes} "{referer}" "{user_agent}""#;

impl FromStr for LogFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "json" => Ok(Self::Json),
            "common" => pieces(COMMON).map(Self::Text),
            "combined" => pieces(COMBINED).map(Self::Text),
            text if text.contains('{') && !text.contains(['\n', '\r']) => pieces(text).map(Self::Text),
            _ => Err("expected `json`, `common`, `combined`, or one line with fields such as `{client} {status}`".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        for text in ["json", "common", "combined", "{client} {{x}} {status}"] {
            assert!(text.parse::<LogFormat>().is_ok(), "{text}");
        }
        for (text, wrong) in [
            ("", "expected `json`"),
            ("plain", "expected `json`"),
            ("{clint}", "`clint` is no field; there are time, time_common"),
            ("{client} {", "stands alone"),
            ("{client} }", "stands alone"),
            ("{client}\n", "one line"),
        ] {
            let said = text.parse::<LogFormat>().unwrap_err();
            assert!(said.contains(wrong), "{text}: {said}");
        }
        let pieces = pieces("a{{b}}c{status}").unwrap();
        assert_eq!(pieces, [Piece::Text("a{b}c".to_owned()), Piece::Field(Field::Status)]);
    }
}
