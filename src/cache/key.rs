//! Which requests are for the same response.

use std::borrow::Cow;
use std::hash::Hasher;

use http::{HeaderMap, HeaderName};
use siphasher::sip128::{Hasher128, SipHasher13};

use super::vary;
use crate::rules::normalise::url_decode;

/// A cache key: what it is made of, and the hash of that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Scheme, host, path and query, and what rules add; each part with its length, so that no two requests run
    /// together.
    pub primary: Vec<u8>,
    /// Of `primary`. Who finds two with the same hash finds a miss: `primary` is compared as well.
    pub hash: u128,
}

/// What rules make of a key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    /// Which arguments of the query.
    pub query: Query,
    /// Their order means nothing.
    pub sort: bool,
    /// Headers.
    pub headers: Vec<HeaderName>,
    /// Cookies, by name.
    pub cookies: Vec<String>,
    /// The client's country.
    pub country: bool,
    /// The kind of the client's device.
    pub device: bool,
}

/// Which arguments of a query are part of a key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Query {
    /// All.
    #[default]
    All,
    /// Those with these names.
    Only(Vec<String>),
    /// All but those with these names.
    Except(Vec<String>),
}

/// What is asked for, and by whom.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Over TLS.
    pub tls: bool,
    /// The route, where more than the URL decides which it is.
    pub route: Option<&'a str>,
    /// The authority as it was sent.
    pub host: &'a str,
    /// Path and query as the origin would get them.
    pub path: &'a str,
    /// The same.
    pub query: Option<&'a str>,
    /// What the route makes of them for the origin, if it does.
    pub rewritten: Option<&'a str>,
    /// The request's headers.
    pub headers: &'a HeaderMap,
    /// The client's country.
    pub country: &'a str,
    /// What a trusted proxy says of the request reaches the origin, so it is part of the key.
    pub trusted_peer: bool,
}

/// What trusted proxies say of a request, and the origin may make its links of.
const FORWARDED: [&str; 3] = ["x-forwarded-host", "x-forwarded-port", "x-forwarded-proto"];

impl Key {
    /// The key of a request.
    pub fn new(wanted: &Wanted<'_>, parts: Option<&Parts>) -> Self {
        let url = url(wanted, parts);
        let mut primary = Vec::with_capacity(url.len() + 16);
        primary.push(if wanted.tls { b's' } else { b'p' });
        part(&mut primary, url.as_bytes());
        // Where the host ends, whatever a path may begin with.
        part(&mut primary, &wanted.host.len().to_be_bytes());
        if let Some(route) = wanted.route {
            // No header is called so.
            part(&mut primary, b":route");
            part(&mut primary, route.as_bytes());
        }
        if let Some(rewritten) = wanted.rewritten {
            part(&mut primary, b":rewritten");
            part(&mut primary, rewritten.as_bytes());
        }
        if wanted.trusted_peer {
            for name in FORWARDED {
                for value in wanted.headers.get_all(name) {
                    part(&mut primary, name.as_bytes());
                    part(&mut primary, value.as_bytes());
                }
            }
        }
        if let Some(Parts { query: _, sort: _, headers, cookies, country, device }) = parts {
            for name in headers {
                part(&mut primary, name.as_str().as_bytes());
                part(&mut primary, &vary::value(name, wanted.headers));
            }
            for name in cookies {
                // All that have the name, as they came: which of them the origin takes is its own affair.
                part(&mut primary, name.as_bytes());
                for pair in cookies_of(wanted.headers).filter(|pair| is_called(pair, name)) {
                    part(&mut primary, pair);
                }
                part(&mut primary, b"");
            }
            if *country {
                part(&mut primary, wanted.country.as_bytes());
            }
            if *device {
                part(&mut primary, device_of(wanted.headers).as_bytes());
            }
        }
        let hash = hash(&primary);
        Self { primary, hash }
    }

    /// The URL in a key, without its scheme: host, path and query.
    pub fn url(primary: &[u8]) -> &str {
        let length = primary.get(1..5).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes);
        let end = 5usize.saturating_add(length as usize);
        primary.get(5..end).and_then(|url| std::str::from_utf8(url).ok()).unwrap_or_default()
    }
}

/// The hash of a key, the same in every process: files are named by it.
pub fn hash(primary: &[u8]) -> u128 {
    let mut hasher = SipHasher13::new();
    hasher.write(primary);
    hasher.finish128().as_u128()
}

/// The hash of a variant of a key.
pub fn variant(primary: u128, variance: &[u8; 16]) -> u128 {
    let mut hasher = SipHasher13::new();
    hasher.write(&primary.to_be_bytes());
    hasher.write(variance);
    hasher.finish128().as_u128()
}

/// What `Vary` makes of a request's fields, in few bytes.
pub fn variance<'a>(fields: impl Iterator<Item = (&'a str, Vec<u8>)>) -> [u8; 16] {
    let mut all = Vec::new();
    for (name, value) in fields {
        part(&mut all, name.as_bytes());
        part(&mut all, &value);
    }
    hash(&all).to_be_bytes()
}

fn part(to: &mut Vec<u8>, part: &[u8]) {
    to.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
    to.extend_from_slice(part);
}

fn url(wanted: &Wanted<'_>, parts: Option<&Parts>) -> String {
    let mut url = wanted.host.to_ascii_lowercase();
    url.push_str(wanted.path);
    let query = match parts {
        None => wanted.query.map(Cow::Borrowed),
        Some(parts) => wanted.query.and_then(|query| kept(query, parts)),
    };
    if let Some(query) = query {
        url.push('?');
        url.push_str(&query);
    }
    url
}

/// What is left of a query.
fn kept<'a>(query: &'a str, parts: &Parts) -> Option<Cow<'a, str>> {
    if parts.query == Query::All && !parts.sort {
        return Some(Cow::Borrowed(query));
    }
    // As origins read it: an encoded name is the same name.
    let name = |argument: &&str| {
        let name = argument.split('=').next().unwrap_or_default();
        String::from_utf8_lossy(&url_decode(name.as_bytes(), true)).into_owned()
    };
    let mut arguments: Vec<&str> = query
        .split('&')
        .filter(|argument| match &parts.query {
            Query::All => true,
            Query::Only(names) => names.contains(&name(argument)),
            Query::Except(names) => !names.contains(&name(argument)),
        })
        .collect();
    if parts.sort {
        // The order of arguments with the same name may mean something.
        arguments.sort_by_key(name);
    }
    (!arguments.is_empty()).then(|| Cow::Owned(arguments.join("&")))
}

fn cookies_of(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all(http::header::COOKIE).iter();
    lines.flat_map(|line| line.as_bytes().split(|b| *b == b';')).map(<[u8]>::trim_ascii)
}

fn is_called(pair: &[u8], name: &str) -> bool {
    pair.split(|b| *b == b'=').next().map(<[u8]>::trim_ascii) == Some(name.as_bytes())
}

/// `mobile`, `tablet` or `desktop`, as `User-Agent` has it.
pub fn device_of(headers: &HeaderMap) -> &'static str {
    let agent = headers.get(http::header::USER_AGENT).map_or(&b""[..], |v| v.as_bytes());
    let has = |word: &[u8]| agent.windows(word.len()).any(|w| w == word);
    match () {
        _ if has(b"iPad") || has(b"Tablet") || (has(b"Android") && !has(b"Mobile")) => "tablet",
        _ if has(b"Mobi") || has(b"iPhone") => "mobile",
        _ => "desktop",
    }
}
