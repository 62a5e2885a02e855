//! A header in as few bytes as it has: the engine's own maps take four times as much, and hold on to the buffer that
//! the origin's response was read into.

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderName, HeaderValue, StatusCode};
use pingora::http::{HeaderNameVariant, ResponseHeader};
use pingora::{Error, ErrorType, Result};

/// Names and values, one after the other.
#[derive(Debug, Clone)]
pub struct Lines {
    status: StatusCode,
    /// Names are as the origin wrote them.
    cased: bool,
    text: Bytes,
    /// How long each name is, and its value.
    lengths: Box<[(u32, u32)]>,
}

impl Lines {
    /// Of a header.
    pub fn of(header: &ResponseHeader) -> Result<Self> {
        let mut text = BytesMut::new();
        let mut lengths = Vec::with_capacity(header.headers.len());
        let length = |part: &[u8]| u32::try_from(part.len()).unwrap_or(u32::MAX);
        header.map(|name, value| {
            let name = match &name {
                HeaderNameVariant::Case(name) => name.as_slice(),
                HeaderNameVariant::Titled(name) => name.as_bytes(),
            };
            text.put_slice(name);
            text.put_slice(value.as_bytes());
            lengths.push((length(name), length(value.as_bytes())));
            Ok(())
        })?;
        // Frozen as it is it would keep the room that it grew into.
        let text = Bytes::copy_from_slice(&text);
        Ok(Self { status: header.status, cased: header.has_case(), text, lengths: lengths.into() })
    }

    fn lines(&self) -> impl Iterator<Item = (Bytes, Bytes)> {
        let mut at = 0;
        self.lengths.iter().map(move |(name, value)| {
            let (middle, end) = (at + *name as usize, at + *name as usize + *value as usize);
            let line = (self.text.slice(at..middle), self.text.slice(middle..end));
            at = end;
            line
        })
    }

    /// As the engine wants it.
    pub fn header(&self) -> Result<ResponseHeader> {
        let build = if self.cased { ResponseHeader::build } else { ResponseHeader::build_no_case };
        let mut header = build(self.status, Some(self.lengths.len()))?;
        let wrong = |_| Error::explain(ErrorType::InvalidHTTPHeader, "a stored header cannot be read");
        for (name, value) in self.lines() {
            let value = HeaderValue::from_maybe_shared(value).map_err(|_| wrong(()))?;
            match self.cased {
                true => header.append_header(name, value)?,
                false => header.append_header(HeaderName::from_bytes(&name).map_err(|_| wrong(()))?, value)?,
            };
        }
        Ok(header)
    }

    /// The first value of a field.
    pub fn get(&self, wanted: &str) -> Option<Bytes> {
        self.lines().find(|(name, _)| name.eq_ignore_ascii_case(wanted.as_bytes())).map(|(_, value)| value)
    }

    /// Bytes of memory.
    pub fn weight(&self) -> usize {
        self.text.len() + self.lengths.len() * size_of::<(u32, u32)>()
    }
}
