//! Chunked bodies (RFC 9112, section 7.1), byte by byte.

use super::fault::{Fault, Kind};
use super::head::{is_text, is_token};

/// Bytes of all chunk extensions of a body together. Nobody has been seen to use them but attackers (CVE-2023-39326).
const EXTENSIONS: usize = 4 << 10;
/// Digits of a chunk's size: more than this many cannot be counted.
const DIGITS: u8 = 15;

/// Where in a chunked body the reader is.
#[derive(Debug)]
pub struct Chunks {
    at: At,
    extensions: usize,
    trailers: usize,
    most_trailers: usize,
}

#[derive(Debug, Clone, Copy)]
enum At {
    /// In the size of a chunk: how many digits came, and what they say.
    Size(u8, u64),
    /// Behind the size: white space or an extension.
    Extension(u64),
    /// The line ends.
    SizeEnd(u64),
    /// Inside a chunk: so much is left.
    Data(u64),
    DataCr,
    DataLf,
    /// A line of the trailer begins, or the last one.
    Trailer,
    TrailerName,
    TrailerValue,
    TrailerLf,
    LastLf,
    Done,
}

impl Chunks {
    /// At its beginning; its trailer may have so many bytes.
    pub fn new(most_trailers: usize) -> Self {
        Self { at: At::Size(0, 0), extensions: 0, trailers: 0, most_trailers }
    }

    /// Has the body ended?
    pub fn is_done(&self) -> bool {
        matches!(self.at, At::Done)
    }

    /// How many of these bytes belong to the body: all of them, unless it ends.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
        let mut rest = bytes;
        while let Some((byte, behind)) = rest.split_first().filter(|_| !self.is_done()) {
            if let At::Data(left) = self.at {
                let take = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                rest = rest.get(take..).unwrap_or_default();
                let left = left.saturating_sub(take as u64);
                self.at = if left == 0 { At::DataCr } else { At::Data(left) };
                continue;
            }
            self.at = self.step(*byte)?;
            rest = behind;
        }
        Ok(bytes.len() - rest.len())
    }

    fn step(&mut self, byte: u8) -> Result<At, Fault> {
        let framing = |why| Err(Kind::Framing.because(why));
        Ok(match (self.at, byte) {
            (At::Size(digits, size), b) if b.is_ascii_hexdigit() => {
                if digits >= DIGITS {
                    return framing("the size of a chunk is too long");
                }
                let digit = char::from(b).to_digit(16).unwrap_or_default();
                At::Size(digits + 1, size << 4 | u64::from(digit))
            }
            (At::Size(0, _), _) => return framing("a chunk has no size"),
            (At::Size(_, size), b'\r') => At::SizeEnd(size),
            (At::Size(_, size), b';' | b' ' | b'\t') => {
                At::Extension(if byte == b';' { size } else { return framing("a chunk's size is followed by a space") })
            }
            (At::Size(..), _) => return framing("the size of a chunk is no number"),
            (At::Extension(size), b'\r') => At::SizeEnd(size),
            (At::Extension(size), b) if is_text(b) => {
                self.extensions += 1;
                if self.extensions > EXTENSIONS {
                    return framing("chunk extensions are too long");
                }
                At::Extension(size)
            }
            (At::Extension(_), _) => return framing("a chunk extension has a control character"),
            (At::SizeEnd(0), b'\n') => At::Trailer,
            (At::SizeEnd(size), b'\n') => At::Data(size),
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Size(0, 0),
            (At::SizeEnd(_) | At::DataCr | At::DataLf, _) => return framing("a chunk does not end as its size says"),
            (At::Trailer, b'\r') => At::LastLf,
            (At::LastLf, b'\n') => At::Done,
            (At::Trailer | At::TrailerName, b) if is_token(b) => self.trailer(At::TrailerName)?,
            (At::TrailerName, b':') => self.trailer(At::TrailerValue)?,
            (At::TrailerValue, b'\r') => At::TrailerLf,
            (At::TrailerValue, b) if is_text(b) => self.trailer(At::TrailerValue)?,
            (At::TrailerLf, b'\n') => At::Trailer,
            (At::Trailer | At::TrailerName | At::TrailerValue | At::TrailerLf | At::LastLf, _) => {
                return Err(Kind::Malformed.because("a trailer is no header line"));
            }
            (At::Data(_) | At::Done, _) => self.at,
        })
    }

    fn trailer(&mut self, next: At) -> Result<At, Fault> {
        self.trailers += 1;
        if self.trailers > self.most_trailers {
            return Err(Kind::Headers.because("the trailer is too long"));
        }
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8], step: usize) -> Result<(usize, bool), Fault> {
        let mut chunks = Chunks::new(64);
        let mut taken = 0;
        for part in bytes.chunks(step) {
            let n = chunks.feed(part)?;
            taken += n;
            if n < part.len() {
                break;
            }
        }
        Ok((taken, chunks.is_done()))
    }

    #[test]
    fn bodies() {
        let long = format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(EXTENSIONS + 1));
        let trailer = format!("0\r\na: {}\r\n\r\n", "x".repeat(80));
        for (body, whole) in [
            ("0\r\n\r\n", Ok(true)),
            ("3\r\nabc\r\n0\r\n\r\n", Ok(true)),
            ("A\r\n0123456789\r\n000\r\n\r\n", Ok(true)),
            ("1;a=b;c=\"d e\"\r\nx\r\n0;z\r\n\r\n", Ok(true)),
            ("0\r\nA: b\r\nc:d\r\n\r\n", Ok(true)),
            ("3\r\nab", Ok(false)),
            ("", Ok(false)),
            ("\r\n", Err(Kind::Framing)),
            (";a\r\n", Err(Kind::Framing)),
            ("-1\r\n", Err(Kind::Framing)),
            ("+1\r\na\r\n", Err(Kind::Framing)),
            ("0x1\r\na\r\n", Err(Kind::Framing)),
            ("1 \r\na\r\n", Err(Kind::Framing)),
            (" 1\r\na\r\n", Err(Kind::Framing)),
            ("1\na\r\n0\r\n\r\n", Err(Kind::Framing)),
            ("1\r\na\n0\r\n\r\n", Err(Kind::Framing)),
            ("1\r\nab\r\n0\r\n\r\n", Err(Kind::Framing)),
            ("1\rX\na\r\n", Err(Kind::Framing)),
            ("1;a\nb\r\n", Err(Kind::Framing)),
            ("1;a\0\r\n", Err(Kind::Framing)),
            ("fffffffffffffffff\r\n", Err(Kind::Framing)),
            ("0\r\n a: b\r\n\r\n", Err(Kind::Malformed)),
            ("0\r\na : b\r\n\r\n", Err(Kind::Malformed)),
            ("0\r\na: b\n\r\n", Err(Kind::Malformed)),
            ("0\r\na: b\0\r\n\r\n", Err(Kind::Malformed)),
            ("0\r\n\n", Err(Kind::Malformed)),
            (long.as_str(), Err(Kind::Framing)),
            (trailer.as_str(), Err(Kind::Headers)),
        ] {
            for step in [1, 2, 3, 7, 10_000] {
                let read = read(body.as_bytes(), step).map_err(|fault| fault.kind);
                assert_eq!(read.map(|(_, done)| done), whole, "{body:?} by {step}");
            }
        }
    }

    proptest! {
        #[test]
        fn what_was_chunked_ends_where_it_ends(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8), step in 1usize..50) {
            let mut body = Vec::new();
            for part in &parts {
                body.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
                body.extend_from_slice(part);
                body.extend_from_slice(b"\r\n");
            }
            body.extend_from_slice(b"0\r\n\r\n");
            let end = body.len();
            body.extend_from_slice(b"GET / HTTP/1.1");
            prop_assert_eq!(read(&body, step), Ok((end, true)));
        }

        #[test]
        fn anything_is_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200), step in 1usize..50) {
            let whole = read(&bytes, bytes.len().max(1));
            prop_assert_eq!(read(&bytes, step), whole, "how it is cut makes no difference");
        }
    }
}
