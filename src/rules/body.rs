//! Bodies that rules ask about: forms, multipart and JSON, read only then.

use std::borrow::Cow;

use memchr::memmem;

use super::normalise::url_decode;
use super::value::Pair;

/// One part of a multipart body (RFC 7578).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Part<'b> {
    /// Its field name.
    pub name: Cow<'b, [u8]>,
    /// Its content.
    pub value: Cow<'b, [u8]>,
    /// `filename` and `filename*`, if it is a file.
    pub filenames: Vec<Cow<'b, [u8]>>,
    /// `Content-Type`.
    pub content_type: Cow<'b, [u8]>,
    /// `Content-Disposition`.
    pub disposition: Cow<'b, [u8]>,
    /// `Content-Transfer-Encoding`.
    pub encoding: Cow<'b, [u8]>,
}

/// A media type without its parameters, in lower case. Readers differ in what they take for the end of it.
pub fn media_type(header: &str) -> String {
    header.trim().split([';', ',', ' ', '\t']).next().unwrap_or_default().to_ascii_lowercase()
}

/// How files begin, by the media type that they are (WHATWG MIME Sniffing, section 6).
const MAGIC: [(&[u8], &str); 19] = [
    (b"GIF8", "image/gif"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"BM", "image/bmp"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"%PDF-", "application/pdf"),
    (b"%!PS-Adobe-", "application/postscript"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"7z\xbc\xaf\x27\x1c", "application/x-7z-compressed"),
    (b"Rar!\x1a\x07", "application/vnd.rar"),
    (b"\x7fELF", "application/x-executable"),
    (b"MZ", "application/vnd.microsoft.portable-executable"),
    (b"OggS", "application/ogg"),
    (b"ID3", "audio/mpeg"),
    (b"fLaC", "audio/flac"),
    (b"\x1a\x45\xdf\xa3", "video/webm"),
    (b"wOF2", "font/woff2"),
];

/// The media type that a body shows by how it begins; nothing if it could be anything.
pub fn sniff(body: &[u8]) -> Option<&'static str> {
    let riff = body.starts_with(b"RIFF").then(|| body.get(8..12)).flatten();
    match riff {
        Some(b"WEBP") => return Some("image/webp"),
        Some(b"WAVE") => return Some("audio/wav"),
        Some(b"AVI ") => return Some("video/x-msvideo"),
        _ => {}
    }
    if body.get(4..8) == Some(b"ftyp") {
        return Some(if body.get(8..12) == Some(b"avif") { "image/avif" } else { "video/mp4" });
    }
    MAGIC.iter().find(|(magic, _)| body.starts_with(magic)).map(|(_, kind)| *kind)
}

/// `name=value&…`, nothing decoded. A name without `=` has an empty value.
pub fn form(text: &[u8]) -> Vec<Pair<'_>> {
    let pairs = text.split(|b| *b == b'&').filter(|pair| !pair.is_empty());
    let split = |pair| match memchr::memchr(b'=', pair) {
        Some(at) => (pair.get(..at).unwrap_or_default(), pair.get(at + 1..).unwrap_or_default()),
        None => (pair, &[][..]),
    };
    pairs.map(split).map(|(name, value)| (Cow::Borrowed(name), Cow::Borrowed(value))).collect()
}

/// The parts of a multipart body with this `Content-Type`.
pub fn multipart<'b>(content_type: &str, body: &'b [u8]) -> Vec<Part<'b>> {
    // Some readers take a comma or a space for the semicolon.
    let boundary = parameter(content_type.as_bytes(), b"boundary").or_else(|| {
        let at = memmem::find(content_type.as_bytes(), b"boundary=")?;
        parameter(&[b";", content_type.as_bytes().get(at..)?].concat(), b"boundary").map(|b| Cow::Owned(b.into_owned()))
    });
    let Some(boundary) = boundary.filter(|b| !b.is_empty()) else { return Vec::new() };
    let delimiter = [b"--", &*boundary].concat();
    let finder = memmem::Finder::new(&delimiter);
    // A delimiter is a whole line (RFC 2046, section 5.1.1).
    let is_line = |at: &usize| {
        let begins = *at == 0 || at.checked_sub(1).and_then(|i| body.get(i)) == Some(&b'\n');
        let behind = body.get(at + delimiter.len()..).unwrap_or_default();
        let behind = without_blanks(behind.strip_prefix(b"--").unwrap_or(behind));
        begins && (behind.is_empty() || behind.starts_with(b"\n") || behind.starts_with(b"\r\n"))
    };
    let mut starts = finder.find_iter(body).filter(is_line);
    let mut parts = Vec::new();
    let Some(mut at) = starts.next() else { return parts };
    // The last part may be cut where the body is.
    for end in starts.map(Some).chain([None]) {
        let inside = body.get(at + delimiter.len()..end.unwrap_or(body.len())).unwrap_or_default();
        if inside.starts_with(b"--") {
            break;
        }
        parts.extend(part(inside));
        let Some(end) = end else { break };
        at = end;
    }
    parts
}

/// Without spaces and tabs at its beginning.
fn without_blanks(text: &[u8]) -> &[u8] {
    let blanks = text.iter().take_while(|b| matches!(b, b' ' | b'\t')).count();
    text.get(blanks..).unwrap_or_default()
}

fn part(text: &[u8]) -> Option<Part<'_>> {
    // Behind the delimiter's line end come headers, an empty line, and the content with a line end.
    let start = memchr::memchr(b'\n', text)? + 1;
    let text = text.get(start..)?;
    let (head, value) = match (
        text.strip_prefix(b"\r\n").or(text.strip_prefix(b"\n")),
        memmem::find(text, b"\n\r\n"),
        memmem::find(text, b"\n\n"),
    ) {
        (Some(value), ..) => (&[][..], value),
        (None, Some(at), other) if other.is_none_or(|o| at < o) => (text.get(..at)?, text.get(at + 3..)?),
        (None, _, Some(at)) => (text.get(..at)?, text.get(at + 2..)?),
        (None, ..) => (text, &[][..]),
    };
    let value = value.strip_suffix(b"\n").unwrap_or(value);
    let mut part = Part { value: Cow::Borrowed(value.strip_suffix(b"\r").unwrap_or(value)), ..Part::default() };
    for line in unfolded(head) {
        let Some(colon) = memchr::memchr(b':', &line) else { continue };
        let content = line.get(colon + 1..).unwrap_or_default().trim_ascii();
        let owned = || Cow::Owned(content.to_vec());
        match line.get(..colon).unwrap_or_default().trim_ascii().to_ascii_lowercase().as_slice() {
            b"content-type" => part.content_type = owned(),
            b"content-transfer-encoding" => part.encoding = owned(),
            b"content-disposition" => {
                let value = |name: &[u8]| parameter(content, name).map(|v| Cow::Owned(v.into_owned()));
                part.name = value(b"name").unwrap_or_default();
                // RFC 5987: a charset and a language come first, and it is percent-encoded.
                let plain = |v: Cow<'_, [u8]>| {
                    let name = v.rsplit(|b| *b == b'\'').next().unwrap_or_default();
                    Cow::Owned(url_decode(name, false).into_owned())
                };
                part.filenames = value(b"filename").into_iter().chain(value(b"filename*").map(plain)).collect();
                part.disposition = owned();
            }
            _ => {}
        }
    }
    Some(part)
}

/// Lines of a header, those that begin with a blank joined to the one before (RFC 822, section 3.1.1).
fn unfolded(head: &[u8]) -> Vec<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = Vec::new();
    for line in head.split(|b| *b == b'\n') {
        match (lines.last_mut(), line.first()) {
            (Some(before), Some(b' ' | b'\t')) => {
                while before.last() == Some(&b'\r') {
                    before.pop();
                }
                before.extend_from_slice(line);
            }
            _ => lines.push(line.to_vec()),
        }
    }
    lines
}

/// The value of a parameter of a header field, without its quotes.
fn parameter<'b>(header: &'b [u8], name: &[u8]) -> Option<Cow<'b, [u8]>> {
    let mut rest = header;
    loop {
        rest = rest.get(memchr::memchr(b';', rest)? + 1..)?.trim_ascii_start();
        let equals = memchr::memchr(b'=', rest)?;
        // A parameter without a value ends at the next semicolon.
        if memchr::memchr(b';', rest).is_some_and(|semicolon| semicolon < equals) {
            continue;
        }
        let found = rest.get(..equals)?.trim_ascii().eq_ignore_ascii_case(name);
        rest = rest.get(equals + 1..)?.trim_ascii_start();
        let mut value = Vec::new();
        if let Some(quoted) = rest.strip_prefix(b"\"") {
            let mut used = 0;
            let mut bytes = quoted.iter();
            while let Some(byte) = bytes.next() {
                used += 1;
                match byte {
                    b'"' => break,
                    b'\\' => {
                        used += 1;
                        value.extend(bytes.next());
                    }
                    other => value.push(*other),
                }
            }
            rest = quoted.get(used..).unwrap_or_default();
        } else {
            let end = memchr::memchr(b';', rest).unwrap_or(rest.len());
            value.extend_from_slice(rest.get(..end)?.trim_ascii_end());
        }
        if found {
            return Some(Cow::Owned(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let pairs = form(b"a=1&b&&c=x=y&=z");
        let shown: Vec<_> = pairs.iter().map(|(n, v)| (&**n, &**v)).collect();
        let expected: [(&[u8], &[u8]); 4] = [(b"a", b"1"), (b"b", b""), (b"c", b"x=y"), (b"", b"z")];
        assert_eq!(shown, expected);
    }

    #[test]
    fn parts() {
        let body = b"preamble\r\n--X y\r\nContent-Disposition: form-data; name=\"a;\\\"b\"\r\n\r\none\r\n--X y\r\n\
            content-disposition: form-data; filename=\"x.php\"; name=f\r\nContent-Type: text/plain\r\n\r\n--Xtwo\r\n\r\n--X y--\r\nrest";
        let parts = multipart("multipart/form-data; charset=utf-8; boundary=\"X y\"", body);
        assert_eq!(parts.len(), 2);
        assert_eq!((&*parts[0].name, &*parts[0].value), (&b"a;\"b"[..], &b"one"[..]));
        assert_eq!((&*parts[1].name, &*parts[1].filenames[0], &*parts[1].value), (&b"f"[..], &b"x.php"[..], &b"--Xtwo\r\n"[..]));
        assert_eq!(&*parts[1].content_type, b"text/plain");
        assert_eq!(multipart("multipart/form-data; boundary=b", b"--b\n\nx\n--b--")[0].value, &b"x"[..]);
        assert_eq!(multipart("multipart/form-data; boundary=b", b"--b\r\nContent-Dis")[0].value, &b""[..]);
        let names = |disposition: &str| {
            let body = format!("--b\r\nContent-Disposition: {disposition}\r\n\r\nx\r\n--b--");
            let parts = multipart("multipart/form-data; boundary=b", body.as_bytes());
            parts[0].filenames.iter().map(|n| String::from_utf8_lossy(n).into_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names("form-data; name=\"f\"; x; filename=\"shell.php\""), ["shell.php"]);
        assert_eq!(names("form-data; filename=\"a.jpg\"; filename*=UTF-8''shell%2Ephp"), ["a.jpg", "shell.php"]);
        assert_eq!(names("form-data; name=\"f\";\r\n filename=\"shell.php\""), ["shell.php"]);
        let decoy = b"--b--junk\r\n--b\r\n\r\nx\r\n--b--";
        for kind in ["multipart/form-data; boundary=b", "multipart/form-data, boundary=b", "multipart/form-data boundary=b"] {
            assert_eq!(multipart(kind, decoy)[0].value, &b"x"[..], "{kind}");
        }
        for odd in ["multipart/form-data", "multipart/form-data; boundary", "x; y=\"", "x; boundary="] {
            multipart(odd, b"----b\r\n\r\n--");
        }
    }
}
