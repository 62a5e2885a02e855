//! A stored response: its head, and where its body is.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use http::header;
use pingora::Result;
use pingora::cache::CacheMeta;
use pingora::http::ResponseHeader;

use crate::cache::key::Key;
use crate::cache::status::StoredNow;
use crate::cache::vary;

/// What an object costs beside its headers and its body: the structures themselves.
const OVERHEAD: usize = 600;
/// What a header costs beside its name and its value: two maps know it.
const PER_HEADER: usize = 120;

/// What the proxy notes of a response beside what the engine does. It travels in the engine's extensions.
#[derive(Debug, Clone, Default)]
pub struct Noted {
    /// When the request was sent whose response this is, or the one that found it still valid; in milliseconds
    /// since 1970. Purges are held against it.
    pub asked: u64,
    /// Tags, a line each.
    pub tags: Box<str>,
}

/// What is known of a stored response beside its body.
#[derive(Debug, Clone)]
pub struct Head {
    /// The key.
    pub primary: Box<[u8]>,
    /// What the proxy noted.
    pub noted: Noted,
    /// The engine's times, as it writes them.
    pub internal: Box<[u8]>,
    /// The header, with the body's length once that is known.
    pub header: ResponseHeader,
    times: Times,
}

/// What the engine's meta is made of again; if it has more it is read from `internal`.
#[derive(Debug, Clone, Copy)]
struct Times {
    plain: bool,
    fresh_until: SystemTime,
    created: SystemTime,
    epoch: Option<SystemTime>,
    while_revalidate: u32,
    if_error: u32,
}

impl Head {
    /// Of what the engine stores.
    pub fn new(primary: &[u8], meta: &CacheMeta) -> Result<Self> {
        let noted = meta.extensions().get::<Noted>().cloned().unwrap_or_default();
        let (internal, _) = meta.serialize()?;
        Ok(Self::read(primary, noted, &internal, meta))
    }

    /// The same from a meta that was read.
    pub fn read(primary: &[u8], noted: Noted, internal: &[u8], meta: &CacheMeta) -> Self {
        let times = Times {
            // A variant's provenance is told by `internal` only.
            plain: meta.variance().is_none() && meta.provenance() == meta.created(),
            fresh_until: meta.fresh_until(),
            created: meta.created(),
            epoch: meta.epoch_override(),
            while_revalidate: meta.stale_while_revalidate_sec(),
            if_error: meta.stale_if_error_sec(),
        };
        Self { primary: primary.into(), noted, internal: internal.into(), header: meta.response_header_copy(), times }
    }

    /// For the engine.
    pub fn meta(&self, empty: &[u8]) -> Result<CacheMeta> {
        let Times { plain, fresh_until, created, epoch, while_revalidate, if_error } = self.times;
        if !plain {
            let mut meta = CacheMeta::deserialize(&self.internal, empty)?;
            *meta.response_header_mut() = self.header.clone();
            return Ok(meta);
        }
        let mut meta = CacheMeta::new(fresh_until, created, while_revalidate, if_error, self.header.clone());
        if let Some(epoch) = epoch {
            meta.set_epoch_override(epoch);
        }
        Ok(meta)
    }

    /// The length of the body, as the header says it.
    pub fn length(&self) -> Option<u64> {
        self.header.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
    }

    /// Now that the body is whole its length is known: ranges of it can be served.
    pub fn complete(&mut self, length: u64) {
        // 204 and the like have no body, and say nothing of its length.
        if length > 0 && self.length().is_none() {
            // A number is a value that a header can have.
            let _ = self.header.insert_header(header::CONTENT_LENGTH, length);
        }
    }

    /// URL, without its scheme.
    pub fn url(&self) -> &str {
        Key::url(&self.primary)
    }

    /// Tags.
    pub fn tags(&self) -> impl Iterator<Item = &str> {
        self.noted.tags.lines()
    }

    /// What it is at this moment.
    pub fn now(&self, tier: &'static str, bytes: u64) -> Option<StoredNow> {
        let meta = self.meta(&super::EMPTY).ok()?;
        let now = SystemTime::now();
        let seconds = |span: std::time::Duration| i64::try_from(span.as_secs()).unwrap_or(i64::MAX);
        Some(StoredNow {
            tier,
            status: meta.response_header().status.as_u16(),
            bytes,
            age: meta.age().as_secs(),
            fresh_for: match meta.fresh_until().duration_since(now) {
                Ok(left) => seconds(left),
                Err(over) => -seconds(over.duration()),
            },
            while_revalidate: meta.stale_while_revalidate_sec().into(),
            if_error: meta.stale_if_error_sec().into(),
            asked: self.noted.asked,
            tags: self.tags().map(str::to_owned).collect(),
            vary: vary::fields(meta.headers()).iter().map(ToString::to_string).collect(),
        })
    }

    /// Bytes of memory.
    pub fn weight(&self) -> usize {
        let lines = self.header.headers.iter().map(|(name, value)| name.as_str().len() * 2 + value.len() + PER_HEADER);
        OVERHEAD + self.primary.len() + self.internal.len() + self.noted.tags.len() + lines.sum::<usize>()
    }
}

/// A stored response. It never changes; a newer one takes its place.
#[derive(Debug)]
pub struct Object {
    /// Everything but the body.
    pub head: Head,
    /// The body.
    pub body: Body,
    /// How often it was used, up to a few times.
    uses: AtomicU8,
    /// It is on disk, or on its way there.
    pub kept: AtomicBool,
}

/// Where a body is.
#[derive(Debug, Clone)]
pub enum Body {
    /// In memory.
    Memory(Box<[Bytes]>),
    /// On disk only; so many bytes.
    Disk(u64),
}

impl Body {
    /// Bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Memory(chunks) => chunks.iter().map(|chunk| chunk.len() as u64).sum(),
            Self::Disk(len) => *len,
        }
    }
}

impl Object {
    /// A response.
    pub fn new(head: Head, body: Body, kept: bool) -> Self {
        Self { head, body, uses: AtomicU8::new(0), kept: AtomicBool::new(kept) }
    }

    /// Bytes of memory.
    pub fn weight(&self) -> u64 {
        let body = match &self.body {
            Body::Memory(chunks) => chunks.iter().map(|chunk| chunk.len() + size_of::<Bytes>() + 32).sum(),
            Body::Disk(_) => 0,
        };
        (self.head.weight() + body) as u64
    }

    /// Used once more. Is it due on disk, and nobody else says so?
    pub fn used(&self) -> bool {
        // Whoever comes later need not write to memory that all share.
        if self.uses.load(Ordering::Relaxed) < 2 {
            self.uses.fetch_add(1, Ordering::Relaxed);
        }
        !self.kept.load(Ordering::Relaxed) && !self.kept.swap(true, Ordering::Relaxed)
    }
}
