//! Which of a resource's variants a request is for (RFC 9111, section 4.1).

use http::{HeaderMap, HeaderName, header};

/// Encodings that bodies come in; others say nothing of which body it is.
const CODINGS: [&str; 5] = ["br", "deflate", "gzip", "identity", "zstd"];

/// Does `Vary` say that no other request may have this?
pub fn is_all(headers: &HeaderMap) -> bool {
    members(headers).any(|member| member == b"*")
}

/// The fields that `Vary` names, in order, each once, without those that cannot be.
pub fn fields(headers: &HeaderMap) -> Vec<HeaderName> {
    let mut names: Vec<HeaderName> = members(headers).filter_map(|name| HeaderName::from_bytes(name).ok()).collect();
    names.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    names.dedup();
    names
}

fn members(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all(header::VARY).iter();
    lines.flat_map(|line| line.as_bytes().split(|b| *b == b',')).map(<[u8]>::trim_ascii).filter(|m| !m.is_empty())
}

/// A request's value of a field, so that two that mean the same are the same. A field that is not there differs
/// from one that is empty.
pub fn value(name: &HeaderName, headers: &HeaderMap) -> Vec<u8> {
    let mut lines = headers.get_all(name).iter().peekable();
    if lines.peek().is_none() {
        return Vec::new();
    }
    let mut joined = Vec::new();
    for line in lines {
        joined.push(b',');
        joined.extend_from_slice(line.as_bytes());
    }
    match *name {
        header::ACCEPT_ENCODING => codings(&joined),
        header::ACCEPT_LANGUAGE => by_quality(&joined.to_ascii_lowercase()),
        // Spaces around commas mean nothing in a list, and hardly anything elsewhere.
        _ => rejoined(members_of(&joined)),
    }
}

fn members_of(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|m| !m.is_empty())
}

/// Every value that is there begins with a comma.
fn rejoined<'a>(members: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut all = Vec::new();
    for member in members {
        all.push(b',');
        all.extend(member.iter().copied());
    }
    if all.is_empty() { vec![b','] } else { all }
}

/// The name of a member, and its weight in thousandths (RFC 9110, section 12.4.2).
fn weighed(member: &[u8]) -> (&[u8], u16) {
    let mut parts = member.split(|b| *b == b';').map(<[u8]>::trim_ascii);
    let name = parts.next().unwrap_or_default();
    let weight = parts.find_map(|part| part.strip_prefix(b"q=").or_else(|| part.strip_prefix(b"Q=")));
    let weight = weight.and_then(|text| std::str::from_utf8(text).ok()?.parse::<f32>().ok());
    // At most 1, so at most 1,000.
    (name, weight.map_or(1000, |w| (w.clamp(0.0, 1.0) * 1000.0) as u16))
}

/// The known codings that the client takes, sorted: which of them an origin picks does not hang on their order.
fn codings(text: &[u8]) -> Vec<u8> {
    let text = text.to_ascii_lowercase();
    let weighed: Vec<(&[u8], u16)> = members_of(&text).map(weighed).collect();
    let any = weighed.iter().find(|(name, _)| *name == b"*").map(|(_, weight)| *weight);
    let taken = CODINGS.iter().map(|coding| coding.as_bytes()).filter(|coding| {
        let named = weighed.iter().find(|(name, _)| name == coding || (*name == b"x-gzip" && *coding == b"gzip"));
        let otherwise = any.unwrap_or(if *coding == b"identity" { 1000 } else { 0 });
        named.map_or(otherwise, |(_, weight)| *weight) > 0
    });
    rejoined(taken)
}

/// By weight, the heaviest first; by name where that is the same, for then no one of them is wanted more.
fn by_quality(text: &[u8]) -> Vec<u8> {
    let mut all: Vec<(&[u8], u16)> = members_of(text).map(weighed).filter(|(_, weight)| *weight > 0).collect();
    all.sort_by_key(|(name, weight)| (std::cmp::Reverse(*weight), *name));
    rejoined(all.into_iter().map(|(name, _)| name))
}
