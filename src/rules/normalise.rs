//! The path and query that rules and routes see: what origins commonly take for the same is the same.
//!
//! As Cloudflare's own normalisation: unreserved `%XX` are decoded, once (RFC 3986, section 6.2.2.2), other
//! `%xx` get upper-case digits, `\` counts as `/`, `//` as `/`, and dot segments are resolved (section 5.2.4).
//! What the origin gets is what the client sent.

use std::borrow::Cow;

/// The path as rules see it. Borrowed if there is nothing to do.
pub fn path(raw: &str) -> Cow<'_, str> {
    let mut before = 0;
    let plain = raw.bytes().all(|byte| {
        let segment = std::mem::replace(&mut before, byte) == b'/';
        byte != b'%' && byte != b'\\' && !(segment && (byte == b'/' || byte == b'.'))
    });
    if plain {
        return Cow::Borrowed(raw);
    }
    let decoded = unescape(raw).replace('\\', "/");
    let Some(rest) = decoded.strip_prefix('/') else { return Cow::Owned(decoded) };
    let mut segments: Vec<&str> = Vec::new();
    let mut folder = false;
    for segment in rest.split('/') {
        folder = matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            name => segments.push(name),
        }
    }
    let mut path = String::with_capacity(decoded.len());
    for segment in &segments {
        path.push('/');
        path.push_str(segment);
    }
    if folder || path.is_empty() {
        path.push('/');
    }
    Cow::Owned(path)
}

/// The query as rules see it. Borrowed if there is nothing to do.
pub fn query(raw: &str) -> Cow<'_, str> {
    match raw.contains('%') {
        true => Cow::Owned(unescape(raw)),
        false => Cow::Borrowed(raw),
    }
}

/// Decodes `%XX` of unreserved characters (RFC 3986, section 2.3), and writes the others in upper case.
fn unescape(raw: &str) -> String {
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(at) = rest.find('%') {
        let (before, escape) = rest.split_at(at);
        text.push_str(before);
        rest = match hex(escape.as_bytes()) {
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => {
                text.push(char::from(byte));
                escape.get(3..).unwrap_or_default()
            }
            Some(_) => {
                text.push_str(&escape.get(..3).unwrap_or_default().to_ascii_uppercase());
                escape.get(3..).unwrap_or_default()
            }
            None => {
                text.push('%');
                escape.get(1..).unwrap_or_default()
            }
        };
    }
    text.push_str(rest);
    text
}

/// The byte that `%XX` at the beginning of `text` means.
fn hex(text: &[u8]) -> Option<u8> {
    let [b'%', high, low, ..] = text else { return None };
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    Some(digit(*high)? << 4 | digit(*low)?)
}

/// Decodes every `%XX`, and `+` as a space; what is no escape stays. With `wide`, `%uXXXX` too, to UTF-8.
pub fn url_decode(text: &[u8], wide: bool) -> Cow<'_, [u8]> {
    decode(text, b' ', wide)
}

/// Decodes every `%XX`; what is no escape stays, `+` too.
pub fn percent_decode(text: &[u8]) -> Cow<'_, [u8]> {
    decode(text, b'+', false)
}

fn decode(text: &[u8], plus: u8, wide: bool) -> Cow<'_, [u8]> {
    if !text.iter().any(|b| *b == b'%' || *b == b'+') {
        return Cow::Borrowed(text);
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let (escaped, wide) = (hex(rest), wide.then(|| unicode(tail)).flatten());
        rest = tail;
        match (first, escaped, wide) {
            (b'+', ..) => decoded.push(plus),
            (b'%', Some(byte), _) => {
                decoded.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            (b'%', None, Some((c, len))) => {
                decoded.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                rest = tail.get(len..).unwrap_or_default();
            }
            (other, ..) => decoded.push(*other),
        }
    }
    Cow::Owned(decoded)
}

/// The character that `uXXXX` means, surrogates in pairs, and the length of what meant it.
fn unicode(text: &[u8]) -> Option<(char, usize)> {
    let unit = |at: usize, sign: &[u8]| {
        let digits = text.get(at..)?.strip_prefix(sign)?.get(..4)?;
        digits.iter().all(u8::is_ascii_hexdigit).then(|| u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok())?
    };
    let first = unit(0, b"u")?;
    if let Some(c) = char::from_u32(u32::from(first)) {
        return Some((c, 5));
    }
    let both = char::decode_utf16([first, unit(5, b"%u")?]).next()?.ok()?;
    Some((both, 11))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        for (raw, normal) in [
            ("/", "/"),
            ("/admin", "/admin"),
            ("/%61dmin", "/admin"),
            ("/%41%64min", "/Admin"),
            ("//admin", "/admin"),
            ("/./admin", "/admin"),
            ("/x/../admin", "/admin"),
            ("/x/%2e%2e/admin", "/admin"),
            ("/x/%2E./admin", "/admin"),
            ("/x/..%2fadmin", "/x/..%2Fadmin"),
            ("\\admin", "/admin"),
            ("/x\\..\\admin", "/admin"),
            ("/admin/..", "/"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/a//", "/a/"),
            ("/../../x", "/x"),
            ("/.../x", "/.../x"),
            ("/.hidden/..x", "/.hidden/..x"),
            ("/%2561dmin", "/%2561dmin"),
            ("/%zz%", "/%zz%"),
            ("/caf%c3%a9", "/caf%C3%A9"),
            ("*", "*"),
            ("", ""),
        ] {
            assert_eq!(path(raw), normal, "{raw}");
            assert_eq!(path(&path(raw)), path(raw).into_owned(), "{raw}: once is enough");
        }
        assert!(matches!(path("/plain/path.html"), Cow::Borrowed(_)));
        assert_eq!(query("a=%62&c=%2f+"), "a=b&c=%2F+");
    }

    #[test]
    fn decoding() {
        for (text, decoded, wide) in [
            ("a+b%20c", "a b c", false),
            ("%", "%", false),
            ("%4", "%4", false),
            ("%zz%41", "%zzA", false),
            ("%u0041", "%u0041", false),
            ("%u0041%u20aC", "A€", true),
            ("%ud83d%ude00!", "😀!", true),
            ("%ud83d!", "%ud83d!", true),
        ] {
            assert_eq!(url_decode(text.as_bytes(), wide), decoded.as_bytes(), "{text}");
        }
    }
}
