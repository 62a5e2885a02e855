//! What a request brings, cut into pieces that an application would take for one.

use std::borrow::Cow;

use http::HeaderName;
use serde_json::Value as Json;

use super::Targets;
use crate::rules::View;
use crate::rules::normalise::url_decode;

/// The name of a body that is XML.
const DOCUMENT: &str = "http.request.body.raw (XML)";
/// Pieces beyond this many are not looked at.
const MOST: usize = 1_000;

/// One piece.
#[derive(Debug)]
pub struct Input<'a> {
    /// Where it is from, as the language calls it.
    pub name: &'static str,
    /// Which kind of part that is.
    pub target: Targets,
    /// Decoded.
    pub text: Cow<'a, [u8]>,
    /// And in lower case.
    pub lower: Cow<'a, [u8]>,
    /// And without entities of HTML, `%uXXXX` and zero bytes, where there were any.
    pub plain: Option<Vec<u8>>,
    /// It is a document of its own: nobody puts it as a whole into a page.
    pub document: bool,
}

impl<'a> Input<'a> {
    fn new(name: &'static str, target: Targets, text: Cow<'a, [u8]>) -> Self {
        let lower = match text.iter().any(u8::is_ascii_uppercase) {
            true => Cow::Owned(text.to_ascii_lowercase()),
            false => text.clone(),
        };
        let plain = plain(&lower);
        Self { name, target, text, lower, plain, document: false }
    }
}

/// Takes a piece; `false`: no more.
type Give<'g> = &'g mut dyn FnMut(&'static str, Targets, Cow<'_, [u8]>) -> bool;

/// Headers that hold nothing of an application's, or what may look like anything.
const LEFT_OUT: [&str; 7] = ["cookie", "user-agent", "referer", "content-length", "host", "if-none-match", "sec-websocket-key"];

/// Calls `each` with every piece until it says `false`.
pub fn inputs(view: &View<'_>, each: &mut dyn FnMut(&Input<'_>) -> bool) {
    let mut left = MOST;
    let mut give = |name: &'static str, target: Targets, text: Cow<'_, [u8]>| {
        left = left.saturating_sub(1);
        let document = name == DOCUMENT;
        left > 0 && (text.is_empty() || each(&Input { document, ..Input::new(name, target, text) }))
    };
    let target = view.target;
    // A `+` is a plus in a path.
    let path = |text: &str| match text.contains('%') {
        true => Cow::Owned(url_decode(text.replace('+', "%2B").as_bytes(), false).into_owned()),
        false => Cow::Owned(text.as_bytes().to_vec()),
    };
    let normal = path(&target.path);
    let raw = path(target.raw_path);
    let sent = target.raw_path.as_bytes();
    let (decoded, differ) = (*raw != *sent, normal != raw);
    let mut going = give("http.request.uri.path", Targets::PATH, normal);
    going = going && (!differ || give("raw.http.request.uri.path", Targets::PATH, raw));
    // What hides by how it is encoded shows before it is decoded.
    going = going && (!decoded || give("raw.http.request.uri.path", Targets::PATH, Cow::Borrowed(sent)));
    for (name, value) in view.raw_args().iter() {
        going = going && give("http.request.uri.args", Targets::QUERY, twice(name));
        going = going && give("http.request.uri.args", Targets::QUERY, twice(value));
    }
    for (_, value) in view.cookies().iter() {
        going = going && give("http.request.cookies", Targets::COOKIE, twice(value));
    }
    going = going && give("http.user_agent", Targets::AGENT, Cow::Borrowed(view.header(&http::header::USER_AGENT)));
    going = going && give("http.referer", Targets::REFERER, twice(view.header(&http::header::REFERER)));
    let others = |name: &HeaderName| !LEFT_OUT.contains(&name.as_str());
    for (_, value) in view.facts.headers.iter().filter(|(name, _)| others(name)) {
        going = going && give("http.request.headers", Targets::HEADER, Cow::Borrowed(value.as_bytes()));
    }
    if going && let Some(body) = view.body() {
        self::body(view, body.bytes, &mut give);
    }
}

fn body(view: &View<'_>, bytes: &[u8], give: Give<'_>) {
    const BODY: Targets = Targets::BODY;
    let mime = view.mime();
    if mime == "application/x-www-form-urlencoded" {
        for (name, value) in view.form() {
            if !give("http.request.body.form", BODY, twice(name)) || !give("http.request.body.form", BODY, twice(value)) {
                return;
            }
        }
    } else if mime.starts_with("multipart/") {
        for (name, value, file) in view.multipart() {
            for piece in [name, file, value] {
                if !give("http.request.body.multipart", BODY, Cow::Borrowed(piece)) {
                    return;
                }
            }
        }
    } else if mime.ends_with("json")
        && let Some(json) = view.json(bytes)
    {
        walk(json, &mut |text| give("http.request.body.raw", BODY, Cow::Borrowed(text.as_bytes())));
    } else {
        give(
            if mime.ends_with("xml") || mime.ends_with("plist") { DOCUMENT } else { "http.request.body.raw" },
            BODY,
            Cow::Borrowed(bytes),
        );
    }
}

/// Every key and text of a document.
fn walk(json: &Json, each: &mut dyn FnMut(&str) -> bool) -> bool {
    match json {
        Json::String(text) => each(text),
        Json::Array(all) => all.iter().all(|inner| walk(inner, each)),
        Json::Object(map) => map.iter().all(|(key, inner)| each(key) && walk(inner, each)),
        Json::Null | Json::Bool(_) | Json::Number(_) => true,
    }
}

/// Decoded, and once more: what was encoded twice was encoded to hide.
fn twice(text: &[u8]) -> Cow<'_, [u8]> {
    match url_decode(text, false) {
        Cow::Borrowed(text) => Cow::Borrowed(text),
        Cow::Owned(once) if once.contains(&b'%') => {
            // A plus that was encoded is a plus.
            let kept: Vec<u8> =
                once.iter().flat_map(|b| if *b == b'+' { &b"%2B"[..] } else { std::slice::from_ref(b) }).copied().collect();
            Cow::Owned(url_decode(&kept, false).into_owned())
        }
        Cow::Owned(once) => Cow::Owned(once),
    }
}

/// Without zero bytes, and with entities of HTML and `%uXXXX` resolved; nothing if there are none.
fn plain(text: &[u8]) -> Option<Vec<u8>> {
    const NAMED: [(&[u8], u8); 9] = [
        (b"lt;", b'<'),
        (b"gt;", b'>'),
        (b"quot;", b'"'),
        (b"amp;", b'&'),
        (b"apos;", b'\''),
        (b"colon;", b':'),
        (b"tab;", b'\t'),
        (b"newline;", b'\n'),
        (b"lpar;", b'('),
    ];
    let entity = |at: &[u8]| -> Option<(u8, usize)> {
        if let Some((name, byte)) = NAMED.iter().find(|(name, _)| at.starts_with(name)) {
            return Some((*byte, name.len()));
        }
        let digits = at.strip_prefix(b"#")?;
        let (radix, skip) = if digits.starts_with(b"x") { (16, 1) } else { (10, 0) };
        let digits = digits.get(skip..)?;
        let len = digits.iter().take(8).take_while(|b| char::from(**b).is_digit(radix)).count();
        let value = u32::from_str_radix(std::str::from_utf8(digits.get(..len)?).ok()?, radix).ok()?;
        let semicolon = usize::from(digits.get(len) == Some(&b';'));
        // Letters in upper case hide behind entities, too.
        u8::try_from(value).ok().map(|b| (b.to_ascii_lowercase(), 1 + skip + len + semicolon))
    };
    let wide = memchr::memmem::find(text, b"%u").map(|_| url_decode(text, true));
    if wide.is_none() && !text.iter().any(|b| *b == 0 || *b == b'&') {
        return None;
    }
    let (mut plain, mut changed) = (Vec::with_capacity(text.len()), wide.is_some());
    let mut rest = wide.as_deref().unwrap_or(text);
    while let [first, tail @ ..] = rest {
        rest = tail;
        match (first, if *first == b'&' { entity(tail) } else { None }) {
            (0, _) => changed = true,
            (_, Some((byte, len))) => {
                plain.push(byte);
                changed = true;
                rest = tail.get(len..).unwrap_or_default();
            }
            (other, None) => plain.push(*other),
        }
    }
    changed.then_some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hides_is_found() {
        for (text, shown) in [
            (&b"&#60;script&#x3E;"[..], &b"<script>"[..]),
            (b"java&#115cript&colon;", b"javascript:"),
            (b"/etc/pass\0wd", b"/etc/passwd"),
            (b"&#83;", b"s"),
            (b"%u003cscript", b"<script"),
        ] {
            assert_eq!(plain(text).as_deref(), Some(shown));
        }
        assert_eq!(plain(b"AT&T & b&unknown;"), None);
        for (text, shown) in [("%253Cscript", "<script"), ("a%2Bb", "a+b"), ("a%252Bb", "a+b"), ("%", "%"), ("a+b", "a b")] {
            assert_eq!(twice(text.as_bytes()), shown.as_bytes());
        }
    }
}
