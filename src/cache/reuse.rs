//! May a stored response answer this request: what the request itself says of caching (RFC 9111, section 5.2.1),
//! and whether the client has the same already (RFC 9110, section 13).

use std::time::Duration;

use http::{HeaderMap, HeaderName, Method, header};

use super::fields::{Directives, date_field};
use super::targeted;

/// A stored response, at the moment it is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    /// How old it is.
    pub age: Duration,
    /// How long it is still fresh.
    pub fresh_for: Duration,
    /// How long it has been stale.
    pub stale_for: Duration,
}

/// What becomes of a stored response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// What its freshness says.
    AsStored,
    /// The origin is asked whether it still holds.
    Validate,
    /// It is used although it is stale: the client says so.
    Stale,
}

/// What a request says of caching; `Pragma` counts only where there is no `Cache-Control` (RFC 9111, section 5.4).
pub fn wanted(headers: &HeaderMap) -> Directives {
    let mut wanted = Directives::of(headers);
    if !headers.contains_key(header::CACHE_CONTROL) {
        let no_cache = |value: &http::HeaderValue| value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"no-cache");
        wanted.no_cache = headers.get_all(header::PRAGMA).iter().any(no_cache);
    }
    wanted
}

/// What the request's directives make of a stored response.
pub fn ruled(wanted: &Directives, held: Held, stored: &HeaderMap, targeted: &[HeaderName]) -> Use {
    if wanted.no_cache {
        return Use::Validate;
    }
    let seconds = |n: Option<u64>| n.map(Duration::from_secs);
    let too_old = seconds(wanted.max_age).map(|most| held.age.saturating_sub(most)).unwrap_or_default();
    let lacking = seconds(wanted.min_fresh).is_some_and(|least| held.fresh_for < least);
    if lacking {
        return Use::Validate;
    }
    let beyond = too_old.max(held.stale_for);
    if beyond.is_zero() {
        return Use::AsStored;
    }
    let said = targeted::directives(stored, targeted).map_or_else(|| Directives::of(stored), |(_, said)| said);
    let never_stale = said.must_revalidate || said.proxy_revalidate || said.no_cache || said.s_maxage.is_some();
    match seconds(wanted.max_stale) {
        Some(most) if beyond <= most && !never_stale => Use::Stale,
        // Section 5.2.1.1: who says how old it may be wants nothing stale.
        _ if too_old.is_zero() && wanted.max_age.is_none() => Use::AsStored,
        _ => Use::Validate,
    }
}

/// Does the client have this response already (RFC 9110, section 13.2.2)?
pub fn not_modified(method: &Method, request: &HeaderMap, status: u16, stored: &HeaderMap) -> bool {
    if status != 200 || !matches!(*method, Method::GET | Method::HEAD) {
        return false;
    }
    if request.contains_key(header::IF_NONE_MATCH) {
        let mut lines = request.get_all(header::IF_NONE_MATCH).iter();
        let tag = stored.get(header::ETAG).map(|tag| opaque(tag.as_bytes()));
        return lines.any(|line| {
            let line = line.as_bytes().trim_ascii();
            line == b"*" || tag.is_some_and(|tag| Tags(line).any(|one| opaque(one) == tag))
        });
    }
    let Some(Some(since)) = date_field(request, &header::IF_MODIFIED_SINCE) else { return false };
    // Section 13.1.3 speaks of when it was modified, RFC 9111 (section 4.3.2) of `Date` where that is not known.
    let modified = date_field(stored, &header::LAST_MODIFIED).or_else(|| date_field(stored, &header::DATE));
    modified.flatten().is_some_and(|modified| modified <= since)
}

/// What is compared weakly: without the mark of weakness (RFC 9110, section 8.8.3.2).
fn opaque(tag: &[u8]) -> &[u8] {
    tag.trim_ascii().strip_prefix(b"W/").unwrap_or(tag.trim_ascii())
}

/// The entity tags of a list: a comma may stand inside of quotes.
struct Tags<'a>(&'a [u8]);

impl<'a> Iterator for Tags<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        while !self.0.is_empty() {
            let mut quoted = false;
            let end = self.0.iter().position(|byte| {
                quoted ^= *byte == b'"';
                *byte == b',' && !quoted
            });
            let (tag, rest) = match end {
                Some(at) => (self.0.get(..at).unwrap_or_default(), self.0.get(at + 1..).unwrap_or_default()),
                None => (self.0, &b""[..]),
            };
            self.0 = rest;
            if !tag.trim_ascii().is_empty() {
                return Some(tag);
            }
        }
        None
    }
}

/// What a 304 says of a stored response takes the place of what was stored, except what tells of its body
/// (RFC 9111, sections 3.2 and 4.3.4).
pub fn freshens(name: &HeaderName) -> bool {
    const BODY: [&str; 8] = [
        "content-encoding",
        "content-length",
        "content-md5",
        "content-range",
        "content-digest",
        "repr-digest",
        "transfer-encoding",
        "etag",
    ];
    !BODY.contains(&name.as_str())
}
