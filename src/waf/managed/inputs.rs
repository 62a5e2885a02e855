//! What a request brings, cut into pieces that an application would take for one.

use std::borrow::Cow;

use super::{Targets, json};
use crate::rules::View;
use crate::rules::normalise::{percent_decode, url_decode};
use crate::rules::view::FORM;

/// The name of a body that is XML.
const DOCUMENT: &str = "http.request.body.raw (XML)";
/// What is shorter holds no word of any signature.
const SHORTEST: usize = 3;

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

/// Headers that are looked at elsewhere, or are numbers.
const LEFT_OUT: [&str; 5] = ["cookie", "user-agent", "referer", "content-length", "host"];

/// Calls `each` with every piece until it says `false`.
pub fn inputs(view: &View<'_>, each: &mut dyn FnMut(&Input<'_>) -> bool) {
    let mut give = |name: &'static str, target: Targets, text: Cow<'_, [u8]>| {
        let document = name == DOCUMENT;
        text.len() < SHORTEST || each(&Input { document, ..Input::new(name, target, text) })
    };
    let going = path(view, &mut give) && query(view, &mut give) && headers(view, &mut give);
    if going && let Some(body) = view.body() {
        self::body(view, body.bytes, &mut give);
    }
}

fn path(view: &View<'_>, give: Give<'_>) -> bool {
    let target = view.target;
    // A `+` is a plus in a path.
    let decoded = |text: &str| percent_decode(text.as_bytes()).into_owned();
    let (normal, raw, sent) = (decoded(&target.path), decoded(target.raw_path), target.raw_path.as_bytes());
    let (differ, encoded) = (normal != raw, *raw != *sent);
    give("http.request.uri.path", Targets::PATH, Cow::Owned(normal))
        && (!differ || give("raw.http.request.uri.path", Targets::PATH, Cow::Owned(raw)))
        // What hides by how it is encoded shows before it is decoded.
        && (!encoded || give("raw.http.request.uri.path", Targets::PATH, Cow::Borrowed(sent)))
}

fn query(view: &View<'_>, give: Give<'_>) -> bool {
    const NAME: &str = "http.request.uri.args";
    let args = view.raw_args();
    args.iter().all(|(name, value)| give(NAME, Targets::QUERY, twice(name)) && give(NAME, Targets::QUERY, twice(value)))
}

fn headers(view: &View<'_>, give: Give<'_>) -> bool {
    let headers = &view.facts.headers;
    let cookies = headers.get_all(http::header::COOKIE).iter().flat_map(|v| v.as_bytes().split(|b| *b == b';'));
    const NAME: &str = "http.request.cookies";
    let going = cookies.map(<[u8]>::trim_ascii).all(|pair| {
        let (name, value) = pair.split_at(memchr::memchr(b'=', pair).unwrap_or(pair.len()));
        give(NAME, Targets::COOKIE, twice(name)) && give(NAME, Targets::COOKIE, twice(value.get(1..).unwrap_or_default()))
    });
    let others = headers.iter().filter(|(name, _)| !LEFT_OUT.contains(&name.as_str()));
    going
        && give("http.user_agent", Targets::AGENT, Cow::Borrowed(view.user_agent()))
        && give("http.referer", Targets::REFERER, twice(view.referer()))
        && others.map(|(_, v)| v.as_bytes()).all(|v| give("http.request.headers", Targets::HEADER, Cow::Borrowed(v)))
}

fn body(view: &View<'_>, bytes: &[u8], give: Give<'_>) {
    const BODY: Targets = Targets::BODY;
    const RAW: &str = "http.request.body.raw";
    let mime = view.mime();
    if mime == FORM {
        let mut piece = |text| give("http.request.body.form", BODY, twice(text));
        view.form().iter().all(|(name, value)| piece(name) && piece(value));
        return;
    }
    let mut parts = view.multipart().peekable();
    if parts.peek().is_some() {
        let mut piece = |text| give("http.request.body.multipart", BODY, Cow::Borrowed(text));
        parts.all(|(name, value, files)| piece(name) && files.iter().all(|f| piece(f)) && piece(value));
        return;
    }
    if mime.ends_with("json") && json::walk(bytes, &mut |text| give(RAW, BODY, Cow::Borrowed(text))) {
        return;
    }
    // Whatever it is, some reader may decode it.
    let decoded = twice(bytes);
    let differs = *decoded != *bytes;
    let name = if mime.ends_with("xml") || mime.ends_with("plist") { DOCUMENT } else { RAW };
    let _ = give(name, BODY, Cow::Borrowed(bytes)) && (!differs || give(name, BODY, decoded));
}

/// Decoded, and once more: what was encoded twice was encoded to hide.
fn twice(text: &[u8]) -> Cow<'_, [u8]> {
    match url_decode(text, false) {
        Cow::Borrowed(text) => Cow::Borrowed(text),
        Cow::Owned(once) if once.contains(&b'%') => {
            // A plus that was encoded is a plus.
            Cow::Owned(percent_decode(&once).into_owned())
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
