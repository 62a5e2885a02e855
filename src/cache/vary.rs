//! Which of a resource's variants a request is for (RFC 9111, section 4.1).

use http::{HeaderMap, HeaderName, header};

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
    // The lines of `Cookie` that HTTP/2 makes of one are one again (RFC 9113, section 8.2.3).
    let between: &[u8] = if *name == header::COOKIE { b"; " } else { b"," };
    let lines: Vec<&[u8]> = lines.map(|line| line.as_bytes()).collect();
    let joined = lines.join(between);
    let mut value = vec![b'='];
    match *name {
        header::COOKIE => value.extend_from_slice(&joined),
        header::ACCEPT_ENCODING => value.extend_from_slice(&codings(&joined)),
        header::ACCEPT_LANGUAGE => value.extend_from_slice(&by_weight(&joined.to_ascii_lowercase())),
        // Spaces around commas mean nothing in a list, and hardly anything elsewhere.
        _ => value.extend_from_slice(&split(&joined).map(<[u8]>::trim_ascii).collect::<Vec<_>>().join(&b","[..])),
    }
    value
}

/// The parts between commas that stand in no quotes.
fn split(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(move |byte| {
        let was = std::mem::take(&mut escaped);
        match byte {
            _ if was => {}
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ => {}
        }
        *byte == b',' && !quoted
    })
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

fn members_of(text: &[u8]) -> impl Iterator<Item = (&[u8], u16)> {
    split(text).map(<[u8]>::trim_ascii).filter(|member| !member.is_empty()).map(weighed)
}

/// The codings that the client takes, and those that it does not, sorted: which of them an origin picks does not hang
/// on their order, nor, as it is, on their weights.
fn codings(text: &[u8]) -> Vec<u8> {
    let text = text.to_ascii_lowercase();
    // Older names (RFC 9110, section 8.4.1).
    let known = |name: &[u8]| match name {
        b"x-gzip" => b"gzip".to_vec(),
        b"x-compress" => b"compress".to_vec(),
        name => name.to_vec(),
    };
    let members: Vec<(Vec<u8>, u16)> = members_of(&text).map(|(name, weight)| (known(name), weight)).collect();
    let weight_of = |wanted: &[u8]| members.iter().find(|(name, _)| name == wanted).map(|(_, weight)| *weight);
    let any = weight_of(b"*");
    // Everybody takes what is not encoded, unless they say otherwise.
    let plain = weight_of(b"identity").or(any).is_none_or(|weight| weight > 0);
    let mut all: Vec<Vec<u8>> = if plain { Vec::new() } else { vec![b"!identity".to_vec()] };
    for (name, weight) in members.iter().filter(|(name, _)| name != b"identity") {
        match *weight {
            // What is not named is refused already, unless all is taken.
            0 if any.is_some_and(|any| any > 0) => all.push([b"!", &**name].concat()),
            0 => {}
            _ => all.push(name.clone()),
        }
    }
    all.sort_unstable();
    all.dedup();
    all.join(&b","[..])
}

/// By weight, the heaviest first, and by name where that is the same, for then no one of them is wanted more.
fn by_weight(text: &[u8]) -> Vec<u8> {
    let mut all: Vec<(&[u8], u16)> = members_of(text).collect();
    all.sort_by_key(|(name, weight)| (std::cmp::Reverse(*weight), *name));
    all.dedup();
    let mut value = Vec::new();
    let mut before = None;
    for (name, weight) in all {
        match before.replace(weight) {
            Some(before) if before == weight => value.push(b','),
            Some(_) => value.push(b';'),
            None => {}
        }
        // What is refused is not what is not named.
        if weight == 0 {
            value.push(b'!');
        }
        value.extend_from_slice(name);
    }
    value
}
