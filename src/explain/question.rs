//! A request that is asked about, and not sent.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use serde::{Deserialize, Serialize};

use crate::request::{Body, Facts, Seen, hash_ip};

/// The request to explain; also the body of `POST /explain`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// The address that connects: the client, or a proxy in front.
    pub ip: IpAddr,
    /// The method.
    #[serde(default = "get")]
    pub method: String,
    /// `http://host/path`, or a path.
    pub url: String,
    /// Headers as name and value.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
    /// The body.
    #[serde(default)]
    pub body: Option<String>,
    /// Regions to take for unreachable.
    #[serde(default)]
    pub down: Vec<String>,
    /// What the origin would answer: may it be stored?
    #[serde(default)]
    pub response: Option<ResponseAsked>,
}

/// A response that is asked about.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResponseAsked {
    /// The status.
    #[serde(default = "ok")]
    pub status: u16,
    /// Headers as name and value.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
}

fn ok() -> u16 {
    200
}

fn get() -> String {
    "GET".to_owned()
}

/// A request that was understood.
#[derive(Debug)]
pub struct Asked {
    /// The method.
    pub method: Method,
    host: String,
    path: String,
    query: Option<String>,
    tls: bool,
    headers: HeaderMap,
    body: Option<Vec<u8>>,
    /// A response to it: status and headers.
    pub response: Option<(u16, HeaderMap)>,
}

fn headers(all: &[(String, String)]) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in all {
        let name: HeaderName = name.parse().map_err(|_| format!("`{name}` is no header name"))?;
        let value = HeaderValue::from_bytes(value.as_bytes()).map_err(|_| format!("the value of `{name}` cannot be sent"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

impl Asked {
    /// Understands `question`; the error says what of it cannot be.
    pub fn new(question: &Question) -> Result<Self, String> {
        let method = question.method.parse::<Method>().map_err(|_| format!("`{}` is no method", question.method))?;
        let url = question.url.split('#').next().unwrap_or_default();
        let uri = url.parse::<http::Uri>().map_err(|e| format!("`{}` is no URL: {e}", question.url))?;
        let response = question.response.as_ref().map(|r| Ok::<_, String>((r.status, self::headers(&r.headers)?))).transpose()?;
        let mut headers = headers(&question.headers)?;
        let host = match (uri.authority(), headers.get(http::header::HOST)) {
            (_, Some(host)) => host.to_str().unwrap_or_default().to_owned(),
            (Some(authority), None) => authority.to_string(),
            (None, None) => String::new(),
        };
        let path = if uri.path().is_empty() { "/".to_owned() } else { uri.path().to_owned() };
        let body = question.body.as_ref().map(|body| body.clone().into_bytes());
        if let Some(body) = &body {
            headers.entry(http::header::CONTENT_LENGTH).or_insert(HeaderValue::from(body.len()));
        }
        let query = uri.query().map(str::to_owned);
        Ok(Self { method, host, path, query, tls: uri.scheme_str() == Some("https"), headers, body, response })
    }

    /// As decisions read it. Of the body at most `limit` bytes.
    pub fn facts(&self, peer: IpAddr, limit: usize) -> Facts<'_> {
        let has_body = self.headers.get(http::header::CONTENT_LENGTH).is_some_and(|l| l != "0")
            || self.headers.contains_key(http::header::TRANSFER_ENCODING);
        let body = self.body.as_deref().unwrap_or_default();
        let seen = body.get(..limit).unwrap_or(body);
        Facts {
            peer,
            method: &self.method,
            host: &self.host,
            path: &self.path,
            query: self.query.as_deref(),
            version: Version::HTTP_11,
            tls: self.tls,
            misdirected: false,
            fault: None,
            certified: false,
            headers: &self.headers,
            has_body,
            body: Seen::Read(Body { bytes: seen, truncated: seen.len() < body.len(), size: body.len() as u64 }),
            request_id: "explained",
            time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            // The same question has the same answer: the client's draw is made of its address.
            chance: hash_ip(peer),
        }
    }
}
