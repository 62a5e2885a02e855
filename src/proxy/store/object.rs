//! A stored response: its head, and where its body is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use http::header;
use pingora::Result;
use pingora::cache::CacheMeta;
use pingora::cache::key::HashBinary;

use super::lines::Lines;

use crate::cache::key::Key;
use crate::cache::status::{StoredNow, seconds_until};
use crate::cache::vary;

/// What an object costs beside its header and its body: the structures themselves, their places in maps, and what the
/// allocator rounds up.
const OVERHEAD: usize = 520;

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
    /// The header, with the body's length once that is known.
    lines: Lines,
    times: Times,
    /// The engine's times as it writes them, where they are more than `times`.
    internal: Option<Box<[u8]>>,
}

/// What the engine's meta is made of again.
#[derive(Debug, Clone, Copy)]
struct Times {
    fresh_until: SystemTime,
    created: SystemTime,
    epoch: Option<SystemTime>,
    variance: Option<HashBinary>,
    while_revalidate: u32,
    if_error: u32,
}

impl Head {
    /// Of what the engine stores.
    pub fn new(primary: &[u8], meta: &CacheMeta) -> Result<Self> {
        let noted = meta.extensions().get::<Noted>().cloned().unwrap_or_default();
        Self::read(primary, noted, meta)
    }

    /// The same from a meta that was read.
    pub fn read(primary: &[u8], noted: Noted, meta: &CacheMeta) -> Result<Self> {
        let times = Times {
            fresh_until: meta.fresh_until(),
            created: meta.created(),
            epoch: meta.epoch_override(),
            variance: meta.variance(),
            while_revalidate: meta.stale_while_revalidate_sec(),
            if_error: meta.stale_if_error_sec(),
        };
        // Where something is from, if that is not when it was made, the engine tells in its own encoding alone.
        let more = meta.provenance() != meta.created();
        let internal = if more { Some(meta.serialize()?.0.into()) } else { None };
        Ok(Self { primary: primary.into(), noted, lines: Lines::of(meta.response_header())?, times, internal })
    }

    /// For the engine.
    pub fn meta(&self) -> Result<CacheMeta> {
        let header = self.lines.header()?;
        if let Some(internal) = &self.internal {
            let mut meta = CacheMeta::deserialize(internal, &super::EMPTY)?;
            *meta.response_header_mut() = header;
            return Ok(meta);
        }
        let Times { fresh_until, created, epoch, variance, while_revalidate, if_error } = self.times;
        let mut meta = CacheMeta::new(fresh_until, created, while_revalidate, if_error, header);
        if let Some(epoch) = epoch {
            meta.set_epoch_override(epoch);
        }
        if let Some(variance) = variance {
            meta.set_variance(variance);
        }
        Ok(meta)
    }

    /// The length of the body, as the header says it.
    pub fn length(&self) -> Option<u64> {
        std::str::from_utf8(&self.lines.get("content-length")?).ok()?.parse().ok()
    }

    /// Now that the body is whole its length is known: ranges of it can be served.
    pub fn complete(&mut self, length: u64) -> Result<()> {
        // 204 and the like have no body, and say nothing of its length.
        if length > 0 && self.length().is_none() {
            let mut header = self.lines.header()?;
            header.insert_header(header::CONTENT_LENGTH, length)?;
            self.lines = Lines::of(&header)?;
        }
        Ok(())
    }

    /// When the body was made, in nanoseconds since 1970: a 304 changes the head and not this.
    pub fn born(&self) -> u64 {
        born(self.times.created)
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
        let meta = self.meta().ok()?;
        Some(StoredNow {
            tier,
            status: meta.response_header().status.as_u16(),
            bytes,
            age: meta.age().as_secs(),
            fresh_for: seconds_until(meta.fresh_until(), SystemTime::now()),
            while_revalidate: meta.stale_while_revalidate_sec().into(),
            if_error: meta.stale_if_error_sec().into(),
            asked: self.noted.asked,
            tags: self.tags().map(str::to_owned).collect(),
            vary: vary::fields(meta.headers()).iter().map(ToString::to_string).collect(),
        })
    }

    /// Bytes of memory.
    pub fn weight(&self) -> usize {
        let internal = self.internal.as_ref().map_or(0, |internal| internal.len());
        OVERHEAD + self.primary.len() + internal + self.noted.tags.len() + self.lines.weight()
    }
}

/// See [`Head::born`].
pub fn born(created: SystemTime) -> u64 {
    created.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// A stored response. It never changes; a newer one takes its place.
#[derive(Debug)]
pub struct Object {
    /// Everything but the body.
    pub head: Head,
    /// The body.
    pub body: Body,
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
        Self { head, body, kept: AtomicBool::new(kept) }
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
        !self.kept.load(Ordering::Relaxed) && !self.kept.swap(true, Ordering::Relaxed)
    }
}
