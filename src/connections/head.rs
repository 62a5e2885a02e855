//! The head of a request (RFC 9112, sections 2 to 6), line by line as it comes.

use std::ops::Range;

use http::{HeaderMap, HeaderValue, header};
use memchr::memchr;

use super::Policy;
use super::fault::{Fault, Kind};

/// Empty lines before a request that are read over (RFC 9112, section 2.2: at least one).
const EMPTY_LINES: u8 = 2;

/// A head, as far as it came. Positions are those of its first byte and onwards.
#[derive(Debug, Default)]
pub struct Head {
    /// Where the line that is looked at begins, and from where its end is looked for.
    line: usize,
    searched: usize,
    empty: u8,
    /// The first line, once it is there.
    pub first: Option<Range<usize>>,
    http_1_0: bool,
    /// What an absolute target names.
    authority: Option<Range<usize>>,
    host: Option<Range<usize>>,
    headers: usize,
    header_bytes: usize,
    length: Option<u64>,
    coding: Option<Coding>,
    upgrade: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Chunked,
    Another,
}

/// A whole head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whole {
    /// Its length in bytes.
    pub length: usize,
    /// What follows.
    pub body: Body,
    /// It asks to speak something else from then on.
    pub upgrade: bool,
}

/// What follows a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// So many bytes.
    Length(u64),
    /// Chunks.
    Chunked,
}

/// RFC 9110, section 5.6.2.
pub(super) fn is_token(byte: u8) -> bool {
    let marks = matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~');
    byte.is_ascii_alphanumeric() || marks
}

/// What a header's value may have (RFC 9110, section 5.5): no control characters but tabs.
pub(super) fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

impl Head {
    /// Reads what is new of `bytes`, which begin with the head. `None`: there is more to come.
    pub fn feed(&mut self, bytes: &[u8], policy: &Policy) -> Result<Option<Whole>, Fault> {
        while let Some(found) = memchr(b'\n', bytes.get(self.searched..).unwrap_or_default()) {
            let end = self.searched + found;
            let line = bytes.get(self.line..end).unwrap_or_default();
            let Some(line) = line.strip_suffix(b"\r") else {
                return Err(Kind::Malformed.because("a line ends without a carriage return"));
            };
            let at = self.line;
            (self.line, self.searched) = (end + 1, end + 1);
            match (&self.first, line) {
                (None, []) if self.empty < EMPTY_LINES => self.empty += 1,
                (None, _) => self.request(line, at, policy)?,
                (Some(_), []) => return self.whole(bytes, end + 1).map(Some),
                (Some(_), _) => self.header(line, at, policy)?,
            }
        }
        self.searched = bytes.len();
        let waiting = bytes.len() - self.line;
        match self.first {
            // The method and the version are a few bytes more.
            None if waiting > policy.target_bytes + 64 => Err(Kind::Target.because("the first line is too long")),
            Some(_) if self.header_bytes + waiting > policy.header_bytes => {
                Err(Kind::Headers.because("the headers are too long"))
            }
            _ => Ok(None),
        }
    }

    fn request(&mut self, line: &[u8], at: usize, policy: &Policy) -> Result<(), Fault> {
        let malformed = |why| Err(Kind::Malformed.because(why));
        let mut parts = line.split(|b| *b == b' ');
        let (Some(method), Some(target), Some(version), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return malformed("the first line is not a method, a target and a version");
        };
        if method.is_empty() || !method.iter().copied().all(is_token) {
            return malformed("the method is no token");
        }
        if target.len() > policy.target_bytes {
            return Err(Kind::Target.because("the target is too long"));
        }
        // A fragment is no part of a target, and readers disagree about what follows a `#`.
        let odd = |b: &u8| *b <= b' ' || *b == 0x7f || *b == b'#';
        if target.is_empty() || target.iter().any(odd) || std::str::from_utf8(target).is_err() {
            return malformed("the target has bytes that no target may have");
        }
        // Rare, and read by the engine as it reads them: what it would refuse is refused here, where it is told of.
        let strange = |b: &u8| matches!(b, b'"' | b'<' | b'>' | b'`' | b'\\' | b'^' | b'{' | b'|' | b'}' | 0x80..);
        if target.iter().any(strange) && http::Uri::try_from(target).is_err() {
            return malformed("the target has characters that have to be encoded");
        }
        self.http_1_0 = match version {
            b"HTTP/1.1" => false,
            b"HTTP/1.0" => true,
            [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
                return Err(Kind::Version.because("this version of HTTP is not spoken here"));
            }
            _ => return malformed("the version is no version"),
        };
        self.first = Some(at..at + line.len());
        let start = at + method.len() + 1;
        match target {
            _ if method == b"CONNECT" => return Err(Kind::Unimplemented.because("this is no proxy for CONNECT")),
            [b'/', ..] => {}
            b"*" if method == b"OPTIONS" => {}
            _ => {
                let schemes = [&b"http://"[..], b"https://"];
                let known = schemes
                    .iter()
                    .find(|scheme| target.get(..scheme.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(scheme)));
                let Some(scheme) = known else { return malformed("the target is neither a path nor a URL") };
                let rest = target.get(scheme.len()..).unwrap_or_default();
                let end = rest.iter().position(|b| matches!(b, b'/' | b'?')).unwrap_or(rest.len());
                let authority = rest.get(..end).unwrap_or_default();
                if authority.is_empty() || !is_authority(authority) {
                    return Err(Kind::Host.because("the target names no host"));
                }
                let start = start + scheme.len();
                self.authority = Some(start..start + end);
            }
        }
        Ok(())
    }

    fn header(&mut self, line: &[u8], at: usize, policy: &Policy) -> Result<(), Fault> {
        let malformed = |why| Err(Kind::Malformed.because(why));
        self.headers += 1;
        self.header_bytes += line.len() + 2;
        if self.headers > policy.headers {
            return Err(Kind::Headers.because("there are too many headers"));
        }
        if self.header_bytes > policy.header_bytes {
            return Err(Kind::Headers.because("the headers are too long"));
        }
        let name = line.iter().position(|b| !is_token(*b)).unwrap_or(line.len());
        match (name, line.get(name)) {
            (0, Some(b' ' | b'\t')) => return malformed("a header is folded"),
            (0, _) => return malformed("a header has no name"),
            (_, Some(b':')) => {}
            (_, Some(b' ' | b'\t')) => return malformed("a header's name is followed by a space"),
            (_, Some(_)) => return malformed("a header's name is no token"),
            (_, None) => return malformed("a header has no colon"),
        }
        let value = line.get(name + 1..).unwrap_or_default();
        if !value.iter().copied().all(is_text) {
            return malformed("a header's value has control characters");
        }
        let name = line.get(..name).unwrap_or_default();
        // Those that decide where a request ends and whom it is for are known by their length.
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => self.host(line, at, value),
            6 if name.eq_ignore_ascii_case(b"expect") => match value.trim_ascii().eq_ignore_ascii_case(b"100-continue") {
                true => Ok(()),
                false => Err(Kind::Expectation.because("nobody here does what it expects")),
            },
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                // The engine passes no other on, so no other is granted.
                self.upgrade |= !self.http_1_0 && value.trim_ascii().eq_ignore_ascii_case(b"websocket");
                Ok(())
            }
            14 if same(name, b"content-length") => self.length(name, value.trim_ascii()),
            17 if same(name, b"transfer-encoding") => self.coding(name, value.trim_ascii()),
            _ => Ok(()),
        }
    }

    fn host(&mut self, line: &[u8], at: usize, value: &[u8]) -> Result<(), Fault> {
        let host = value.trim_ascii();
        if self.host.is_some() {
            return Err(Kind::Host.because("there are several Host headers"));
        }
        if host.is_empty() || !is_authority(host) {
            return Err(Kind::Host.because("the Host header names no host"));
        }
        let start = at + line.len() - value.trim_ascii_start().len();
        self.host = Some(start..start + host.len());
        Ok(())
    }

    fn length(&mut self, name: &[u8], value: &[u8]) -> Result<(), Fault> {
        let framing = |why| Err(Kind::Framing.because(why));
        if name.contains(&b'_') {
            return framing("a Content-Length is written with an underscore");
        }
        if self.length.is_some() {
            return framing("there are several Content-Length headers");
        }
        if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
            return framing("the Content-Length is no number");
        }
        let digits = value.iter().fold(0u64, |sum, digit| sum * 10 + u64::from(digit - b'0'));
        self.length = Some(digits);
        Ok(())
    }

    fn coding(&mut self, name: &[u8], value: &[u8]) -> Result<(), Fault> {
        let framing = |why| Err(Kind::Framing.because(why));
        if name.contains(&b'_') {
            return framing("a Transfer-Encoding is written with an underscore");
        }
        if self.coding.is_some() {
            return framing("there are several Transfer-Encoding headers");
        }
        let chunked = |coding: &[u8]| coding.trim_ascii().eq_ignore_ascii_case(b"chunked");
        let (mut all, last) = (value.split(|b| *b == b','), value.rsplit(|b| *b == b',').next().unwrap_or_default());
        self.coding = Some(match (chunked(value), chunked(last), all.clone().filter(|one| chunked(one)).count()) {
            (true, ..) => Coding::Chunked,
            (_, true, 1) if all.all(|one| !one.trim_ascii().is_empty()) => Coding::Another,
            _ => return framing("the body is not chunked last, and once"),
        });
        Ok(())
    }

    fn whole(&self, bytes: &[u8], length: usize) -> Result<Whole, Fault> {
        let part = |range: &Range<usize>| bytes.get(range.clone()).unwrap_or_default();
        let host = self.host.as_ref().map(part);
        match (host, &self.authority) {
            (None, _) if !self.http_1_0 => return Err(Kind::Host.because("there is no Host header")),
            // To the letter, as the engine has it.
            (Some(host), Some(authority)) if host != part(authority) => {
                return Err(Kind::Host.because("the target and the Host header name two hosts"));
            }
            _ => {}
        }
        let body = match (self.coding, self.length) {
            (Some(_), Some(_)) => return Err(Kind::Framing.because("it has a Content-Length and a Transfer-Encoding")),
            (Some(_), _) if self.http_1_0 => return Err(Kind::Framing.because("HTTP/1.0 has no Transfer-Encoding")),
            (Some(Coding::Another), _) => return Err(Kind::Unimplemented.because("a transfer coding is not known here")),
            (Some(Coding::Chunked), _) => Body::Chunked,
            (None, length) => Body::Length(length.unwrap_or_default()),
        };
        if self.upgrade && body != Body::Length(0) {
            return Err(Kind::Framing.because("another protocol is asked for with a body"));
        }
        Ok(Whole { length, body, upgrade: self.upgrade })
    }
}

/// What is wrong with a request that came over HTTP/2, where the engine reads it first.
pub fn faulty(authority: &str, target: usize, headers: &HeaderMap, policy: &Policy) -> Option<Fault> {
    if !is_authority(authority.as_bytes()) {
        return Some(Kind::Host.because("the authority names no host"));
    }
    // RFC 9113, section 8.3.1.
    if headers.get_all(header::HOST).iter().any(|host| !host.as_bytes().eq_ignore_ascii_case(authority.as_bytes())) {
        return Some(Kind::Host.because("the authority and the Host header name two hosts"));
    }
    if target > policy.target_bytes {
        return Some(Kind::Target.because("the target is too long"));
    }
    // Cookies come in crumbs (RFC 9113, section 8.2.3): together they are one.
    let crumbs = headers.get_all(header::COOKIE).iter().count().saturating_sub(1);
    if headers.len().saturating_sub(crumbs) > policy.headers {
        return Some(Kind::Headers.because("there are too many headers"));
    }
    let expects = headers.get(header::EXPECT).map(HeaderValue::as_bytes);
    if expects.is_some_and(|what| !what.eq_ignore_ascii_case(b"100-continue")) {
        return Some(Kind::Expectation.because("nobody here does what it expects"));
    }
    None
}

/// Is it this name, for servers too that take an underscore for a dash?
fn same(name: &[u8], known: &[u8]) -> bool {
    name.iter().zip(known).all(|(n, k)| n.eq_ignore_ascii_case(k) || (*n == b'_' && *k == b'-'))
}

/// A host with or without a port (RFC 9110, section 7.2), and without anybody's name before it.
fn is_authority(text: &[u8]) -> bool {
    let (host, port) = match text {
        [b'[', rest @ ..] => {
            let Some(end) = rest.iter().position(|b| *b == b']') else { return false };
            let inside = rest.get(..end).unwrap_or_default();
            if inside.is_empty() || !inside.iter().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.')) {
                return false;
            }
            (&b"v6"[..], rest.get(end + 1..).unwrap_or_default())
        }
        _ => text.split_at(text.iter().position(|b| *b == b':').unwrap_or(text.len())),
    };
    // RFC 3986, section 3.2.2; what of it a name needs.
    let named = |b: &u8| {
        b.is_ascii_alphanumeric()
            || matches!(
                b,
                b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'='
            )
    };
    let ported = match port {
        [] | [b':'] => true,
        [b':', digits @ ..] => digits.len() <= 5 && digits.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    !host.is_empty() && host.iter().all(named) && ported
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8], step: usize) -> Result<Option<Whole>, Fault> {
        let (mut head, policy) =
            (Head::default(), Policy { target_bytes: 40, header_bytes: 120, headers: 4, ..Policy::default() });
        for end in (1..=bytes.len()).filter(|end| end % step == 0 || *end == bytes.len()) {
            if let Some(whole) = head.feed(&bytes[..end], &policy)? {
                return Ok(Some(whole));
            }
        }
        Ok(None)
    }

    #[test]
    fn requests() {
        let get = |more: &str| format!("GET / HTTP/1.1\r\nHost: a\r\n{more}\r\n");
        let post = |more: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{more}\r\n");
        let none = Ok(Body::Length(0));
        use Kind::*;
        for (request, expected) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), none),
            ("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), none),
            ("GET / HTTP/1.0\r\n\r\n".to_owned(), none),
            ("GET http://a:80/x HTTP/1.1\r\nHost: a:80\r\n\r\n".to_owned(), none),
            ("GET http://a/x HTTP/1.1\r\nHost: a:80\r\n\r\n".to_owned(), Err(Host)),
            ("GET / HTTP/1.1\r\nHost: a%41\r\n\r\n".to_owned(), Err(Host)),
            (get("Upgrade: h2c\r\n"), none),
            (post("Upgrade: websocket\r\nContent-Length: 1\r\n"), Err(Framing)),
            ("GET http://a?x HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), none),
            ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), none),
            ("GET /\u{e9}|\"^{}\\?\u{e9}|^`{}\\ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), none),
            ("GET /< HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET /`a HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET /?\">< HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n".to_owned(), none),
            (get("Expect: 100-Continue\r\n"), none),
            (get("X: \t \r\nY:\r\n"), none),
            (post("Content-Length: 012\r\n"), Ok(Body::Length(12))),
            (post("Transfer-Encoding: \tChunked \r\n"), Ok(Body::Chunked)),
            ("\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET / HTTP/1.1\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET / HTTP/1.1\r\nHost: a\n\r\n".to_owned(), Err(Malformed)),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n".to_owned(), Err(Malformed)),
            ("GET / HTTP/1.1\r\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            (" GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("G(T / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET /\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET a HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET * HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET /#a HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET / http/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET / HTTP/11\r\nHost: a\r\n\r\n".to_owned(), Err(Malformed)),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n".to_owned(), Err(Version)),
            ("GET / HTTP/1.2\r\nHost: a\r\n\r\n".to_owned(), Err(Version)),
            ("CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Unimplemented)),
            (format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(40)), Err(Target)),
            ("x".repeat(500), Err(Target)),
            ("GET / HTTP/1.1\r\n\r\n".to_owned(), Err(Host)),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n".to_owned(), Err(Host)),
            (get("Host: a\r\n"), Err(Host)),
            (get("host: b\r\n"), Err(Host)),
            ("GET / HTTP/1.1\r\nHost: a@b\r\n\r\n".to_owned(), Err(Host)),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".to_owned(), Err(Host)),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n".to_owned(), Err(Host)),
            ("GET / HTTP/1.1\r\nHost: a:b\r\n\r\n".to_owned(), Err(Host)),
            ("GET / HTTP/1.1\r\nHost: [a\r\n\r\n".to_owned(), Err(Host)),
            ("GET / HTTP/1.1\r\nHost: a,b c\r\n\r\n".to_owned(), Err(Host)),
            ("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Host)),
            ("GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Host)),
            ("GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Err(Host)),
            (get(" X: folded\r\n"), Err(Malformed)),
            (get("\tX: folded\r\n"), Err(Malformed)),
            (get("X : y\r\n"), Err(Malformed)),
            (get("X\r\n"), Err(Malformed)),
            (get(": y\r\n"), Err(Malformed)),
            (get("X\0: y\r\n"), Err(Malformed)),
            (get("X: y\0\r\n"), Err(Malformed)),
            (get("X: y\rz\r\n"), Err(Malformed)),
            (get("X: y\u{7f}\r\n"), Err(Malformed)),
            (get("Expect: 200-ok\r\n"), Err(Expectation)),
            (get("A: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\n"), Err(Headers)),
            (get(&format!("A: {}\r\n", "x".repeat(120))), Err(Headers)),
            (get(&"x".repeat(150)), Err(Headers)),
            (post("Content-Length: 1\r\nContent-Length: 1\r\n"), Err(Framing)),
            (post("Content-Length: 1, 1\r\n"), Err(Framing)),
            (post("Content-Length: +1\r\n"), Err(Framing)),
            (post("Content-Length: -1\r\n"), Err(Framing)),
            (post("Content-Length: 0x1\r\n"), Err(Framing)),
            (post("Content-Length:\r\n"), Err(Framing)),
            (post("Content-Length: 99999999999999999999\r\n"), Err(Framing)),
            (post("Content_Length: 5\r\n"), Err(Framing)),
            (post("Transfer_Encoding: chunked\r\n"), Err(Framing)),
            (post("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"), Err(Framing)),
            (post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), Err(Framing)),
            (post("Transfer-Encoding: chunked, chunked\r\n"), Err(Framing)),
            (post("Transfer-Encoding: chunked, gzip\r\n"), Err(Framing)),
            (post("Transfer-Encoding: identity\r\n"), Err(Framing)),
            (post("Transfer-Encoding: xchunked\r\n"), Err(Framing)),
            (post("Transfer-Encoding: ,chunked\r\n"), Err(Framing)),
            (post("Transfer-Encoding:\r\n"), Err(Framing)),
            (post("Transfer-Encoding: gzip, chunked\r\n"), Err(Unimplemented)),
            ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(), Err(Framing)),
        ] {
            for step in [1, 2, 3, 7, 10_000] {
                let read = read(request.as_bytes(), step).map(|whole| whole.map(|whole| (whole.length, whole.body)));
                let expected = expected.map(|body| Some((request.len(), body)));
                assert_eq!(read.map_err(|fault| fault.kind), expected, "{request:?} by {step}");
            }
        }
    }

    #[test]
    fn over_http_2() {
        let policy = Policy { target_bytes: 40, headers: 4, ..Policy::default() };
        let (few, mut many, mut odd, mut other) = (HeaderMap::new(), HeaderMap::new(), HeaderMap::new(), HeaderMap::new());
        other.insert("host", HeaderValue::from_static("A:80"));
        for _ in 0..5 {
            many.append("x", HeaderValue::from_static("y"));
        }
        let mut crumbs = HeaderMap::new();
        for _ in 0..50 {
            crumbs.append("cookie", HeaderValue::from_static("a=b"));
        }
        odd.insert("expect", HeaderValue::from_static("miracles"));
        for (authority, target, headers, expected) in [
            ("a:80", 40, &few, None),
            ("", 1, &few, Some(Kind::Host)),
            ("u@a", 1, &few, Some(Kind::Host)),
            ("a:80", 1, &other, None),
            ("b:80", 1, &other, Some(Kind::Host)),
            ("a", 41, &few, Some(Kind::Target)),
            ("a", 1, &many, Some(Kind::Headers)),
            ("a", 1, &odd, Some(Kind::Expectation)),
            ("a", 1, &crumbs, None),
        ] {
            assert_eq!(faulty(authority, target, headers, &policy).map(|fault| fault.kind), expected);
        }
    }

    proptest! {
        #[test]
        fn anything_is_an_answer(bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b':')], 0..200)) {
            let begun = [b"GET / HTTP/1.1\r\n", &bytes[..]].concat();
            for bytes in [&bytes, &begun] {
                prop_assert_eq!(read(bytes, 1).is_err(), read(bytes, 10_000).is_err());
            }
        }

        #[test]
        fn what_passes_is_read_alike_by_another_parser(
            name in "[ -~]{1,8}", value in "[\t -~\u{80}\r\n]{0,12}", target in "[!-~ ]{1,12}",
        ) {
            let request = format!("GET {target} HTTP/1.1\r\nHost: a\r\n{name}: {value}\r\n\r\n");
            let Ok(Some(whole)) = read(request.as_bytes(), 10_000) else { return Ok(()) };
            let mut headers = [httparse::EMPTY_HEADER; 8];
            let mut other = httparse::Request::new(&mut headers);
            let parsed = other.parse(request.as_bytes());
            prop_assert!(matches!(parsed, Ok(httparse::Status::Complete(n)) if n == whole.length), "{parsed:?}");
            prop_assert!(other.headers.iter().all(|h| !h.name.is_empty()));
        }
    }
}
