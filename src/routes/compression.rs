//! Which responses are compressed for which client. Off unless the route turns it on: where a secret stands beside what a
//! client chose, the length of a compressed response tells of both (BREACH, CVE-2013-3587).

use http::{HeaderMap, HeaderValue, header};

use crate::request::accepted;

/// What a route compresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compression {
    /// The better first.
    pub codings: Box<[Coding]>,
    /// Bytes below which it is not worth it.
    pub min_length: u64,
    /// Media types in lower case: `text/html`, all of a kind (`text/*`), or all of a syntax (`+json`).
    pub types: Box<[Box<str>]>,
}

/// A content coding (RFC 9110, section 8.4.1; RFC 7932; RFC 8878).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// Zstandard.
    Zstd,
    /// Brotli.
    Brotli,
    /// gzip.
    Gzip,
}

impl Coding {
    /// Its name in headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Brotli => "br",
            Self::Gzip => "gzip",
        }
    }
}

impl Compression {
    /// What a response is compressed with: `None` if it is no matter of the client's (it must not be, or is not worth it),
    /// `Some(None)` if this client takes none of what is offered.
    pub fn choose(&self, request: &HeaderMap, status: u16, response: &HeaderMap) -> Option<Option<Coding>> {
        let text = |name| response.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let has = |name| response.contains_key(name);
        // A part of something would not be the same part of the compressed whole.
        if !matches!(status, 200 | 201 | 203 | 400..=599) || has(header::CONTENT_ENCODING) || has(header::CONTENT_RANGE) {
            return None;
        }
        let length = text(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
        if length.is_some_and(|length| length < self.min_length) {
            return None;
        }
        // RFC 9110, section 7.7.
        let keeps = |value: &HeaderValue| value.as_bytes().windows(12).any(|w| w.eq_ignore_ascii_case(b"no-transform"));
        if response.get_all(header::CACHE_CONTROL).iter().any(keeps) || !self.covers(text(header::CONTENT_TYPE)?) {
            return None;
        }
        let all = request.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
        let mut best: Option<(u16, Coding)> = None;
        for (name, weight) in accepted(all) {
            let known = self.codings.iter().find(|coding| coding.name().eq_ignore_ascii_case(name));
            let Some(coding) = known else { continue };
            let place = |coding: Coding| self.codings.iter().position(|one| *one == coding);
            // The client's wish first, then ours.
            if best.is_none_or(|(most, chosen)| weight > most || (weight == most && place(*coding) < place(chosen))) {
                best = Some((weight, *coding));
            }
        }
        Some(best.map(|(_, coding)| coding))
    }

    fn covers(&self, media_type: &str) -> bool {
        let name = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        // An event has to come when it comes, and not when a block is full.
        if name == "text/event-stream" || name.starts_with("application/grpc") {
            return false;
        }
        self.types.iter().any(|one| match (one.strip_suffix('*'), one.starts_with('+')) {
            (Some(kind), _) => name.starts_with(kind),
            (None, true) => name.ends_with(&**one),
            (None, false) => name == **one,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(headers: &[(&'static str, &str)]) -> HeaderMap {
        headers.iter().map(|(name, value)| (header::HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    #[test]
    fn choices() {
        use Coding::*;
        let compression = Compression {
            codings: [Zstd, Brotli, Gzip].into(),
            min_length: 100,
            types: ["text/*", "application/json", "+json"].map(Into::into).into(),
        };
        let html = ("content-type", "text/html; charset=utf-8");
        for (accept, status, response, expected) in [
            ("gzip, deflate, br, zstd", 200, &[html][..], Some(Some(Zstd))),
            ("gzip, br", 200, &[html], Some(Some(Brotli))),
            ("gzip;q=1, br;q=0.5", 200, &[html], Some(Some(Gzip))),
            ("GZIP", 200, &[html], Some(Some(Gzip))),
            ("br;q=0, gzip;q=0", 200, &[html], Some(None)),
            ("identity", 200, &[html], Some(None)),
            ("", 200, &[html], Some(None)),
            ("gzip", 404, &[html], Some(Some(Gzip))),
            ("gzip", 206, &[html], None),
            ("gzip", 304, &[html], None),
            ("gzip", 200, &[("content-type", "application/problem+json")], Some(Some(Gzip))),
            ("gzip", 200, &[("content-type", "APPLICATION/JSON")], Some(Some(Gzip))),
            ("gzip", 200, &[("content-type", "image/png")], None),
            ("gzip", 200, &[("content-type", "text/event-stream")], None),
            ("gzip", 200, &[], None),
            ("gzip", 200, &[html, ("content-encoding", "br")], None),
            ("gzip", 200, &[html, ("content-encoding", "identity")], None),
            ("gzip", 200, &[html, ("content-length", "99")], None),
            ("gzip", 200, &[html, ("content-length", "100")], Some(Some(Gzip))),
            ("gzip", 200, &[html, ("content-range", "bytes 0-1/2")], None),
            ("gzip", 200, &[html, ("cache-control", "public, No-Transform")], None),
        ] {
            assert_eq!(
                compression.choose(&map(&[("accept-encoding", accept)]), status, &map(response)),
                expected,
                "{accept} {status} {response:?}"
            );
        }
    }
}
