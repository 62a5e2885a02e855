//! The store as the engine knows it.

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use pingora::cache::CacheMeta;
use pingora::cache::key::{CacheHashKey, CacheKey};
use pingora::cache::lock::{CacheKeyLock, LockStatus, Locked, WritePermit};
use pingora::cache::storage::{
    HandleHit, HandleMiss, HitHandler, MissFinishType, MissHandler, PurgeOutcome, PurgeTarget, PurgeType, Storage,
};
use pingora::cache::trace::SpanHandle;
use pingora::http::ResponseHeader;
use pingora::{Error, ErrorType, Result};
use quick_cache::sync::{EntryAction, EntryResult};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::disk::{Disk, PATIENCE};
use super::file::Stored;
use super::fill::{Along, Cut, Fill, Outcome};
use super::object::{Body, Head, Object, born};
use super::{SHORT, Store};
use crate::cache::key::variant;
use crate::cache::purge::Purged;

/// Where a key's object stands.
fn slot(key: &impl CacheHashKey) -> u128 {
    let primary = u128::from_be_bytes(key.primary_bin());
    key.variance_bin().map_or(primary, |variance| variant(primary, &variance))
}

impl Store {
    /// What is stored in memory, or on its way there, or on disk.
    async fn find(&'static self, slot: u128, key: &CacheKey) -> Option<(CacheMeta, HitHandler)> {
        let own = |head: &Head| *head.primary == *key.primary_key();
        if let Some(fill) = self.on_its_way(slot).filter(|fill| own(&fill.head))
            && let Some(along) = fill.join(false)
        {
            return Some((fill.head.meta().ok()?, Box::new(Hit::new(Source::Along(along)))));
        }
        match self.memory.get(&slot) {
            Some(object) if own(&object.head) => self.hit(slot, object).await,
            Some(_) => None,
            None => {
                let disk = self.disk.as_ref().filter(|disk| disk.may_have(slot))?;
                // One reads it, and whoever wants it as well waits for that.
                let object = match self.memory.get_value_or_guard_async(&slot).await {
                    Ok(object) => object,
                    Err(place) => {
                        let object = Arc::new(self.load(disk, slot).await?);
                        // It was stored anew, or removed, in the meantime.
                        place.insert(object.clone()).ok().map(|()| object).or_else(|| self.memory.get(&slot))?
                    }
                };
                match own(&object.head) {
                    true => self.hit(slot, object).await,
                    false => None,
                }
            }
        }
    }

    async fn hit(&'static self, slot: u128, object: Arc<Object>) -> Option<(CacheMeta, HitHandler)> {
        if object.used() {
            self.keep(slot, &object);
        }
        let source = match &object.body {
            Body::Memory(_) => Source::Memory(object.clone()),
            Body::Disk(_) => {
                let (disk, born) = (self.disk.clone()?, object.head.born());
                let stored = Disk::ask(&disk, move |disk| disk.body(slot, born)).await.or_else(|| {
                    self.memory.remove_if(&slot, |now| Arc::ptr_eq(now, &object));
                    None
                })?;
                Source::Disk { store: self, slot, object: object.clone(), stored: Arc::new(stored) }
            }
        };
        let meta = object.head.meta().ok()?;
        Some((meta, Box::new(Hit::new(source))))
    }

    /// An object is due on disk.
    fn keep(&self, slot: u128, object: &Arc<Object>) {
        let Some(disk) = &self.disk else { return };
        if !disk.keep(slot, object) {
            // Another time.
            object.kept.store(false, Ordering::Relaxed);
            return;
        }
        // Whoever took its place meanwhile has had older files deleted before this one was in the queue.
        let now = self.memory.peek(&slot);
        if now.as_ref().is_none_or(|now| !Arc::ptr_eq(now, object)) {
            disk.remove(slot, now.map(|now| now.head.born()));
        }
    }

    /// What is on disk, for memory: whole, if it is short.
    async fn load(&self, disk: &Arc<Disk>, slot: u128) -> Option<Object> {
        let short = self.longest().min(SHORT);
        let load = move |disk: &Disk| {
            let (mut head, stored) = disk.get(slot)?;
            head.complete(stored.len).ok()?;
            if stored.len > short {
                return Some(Object::new(head, Body::Disk(stored.len), true));
            }
            let body = stored.body().inspect_err(|error| disk.broken(slot, error)).ok()?;
            Some(Object::new(head, Body::Memory(body), true))
        };
        Disk::ask(disk, load).await
    }

    /// A body of it turned out to be broken.
    fn rotten(&self, slot: u128, object: &Arc<Object>, error: &io::Error) {
        self.memory.remove_if(&slot, |now| Arc::ptr_eq(now, object));
        if let Some(disk) = &self.disk {
            disk.broken(slot, error);
        }
    }
}

#[async_trait]
impl Storage for Store {
    async fn lookup(&'static self, key: &CacheKey, _trace: &SpanHandle) -> Result<Option<(CacheMeta, HitHandler)>> {
        Ok(self.find(slot(key), key).await)
    }

    async fn lookup_streaming_write(
        &'static self,
        key: &CacheKey,
        tag: Option<&[u8]>,
        _trace: &SpanHandle,
    ) -> Result<Option<(CacheMeta, HitHandler)>> {
        let id = tag.and_then(|tag| tag.try_into().ok()).map(u64::from_be_bytes);
        let slot = slot(key);
        let fill = self.fills(slot).lock().get(&slot).and_then(|all| all.iter().find(|fill| Some(fill.id) == id).cloned());
        let Some(along) = fill.as_ref().and_then(|fill| fill.join(true)) else { return Ok(None) };
        // The engine knows the meta, and passes this one over.
        let (long_ago, nothing) = (SystemTime::UNIX_EPOCH, ResponseHeader::build_no_case(200, Some(0))?);
        let meta = CacheMeta::new(long_ago, long_ago, 0, 0, nothing);
        Ok(Some((meta, Box::new(Hit::new(Source::Along(along))))))
    }

    async fn get_miss_handler(&'static self, key: &CacheKey, meta: &CacheMeta, _trace: &SpanHandle) -> Result<MissHandler> {
        let fill = self.begin(slot(key), Head::new(key.primary_key(), meta)?);
        let tag = fill.id.to_be_bytes();
        Ok(Box::new(Miss { store: self, fill: Some(fill), tag, len: 0, spooling: false }))
    }

    async fn purge(&'static self, target: PurgeTarget<'_>, _type: PurgeType, _trace: &SpanHandle) -> Result<PurgeOutcome> {
        self.remove(slot(target.key()));
        Ok(PurgeOutcome::Purged(None))
    }

    async fn update_meta(&'static self, key: &CacheKey, meta: &CacheMeta, _trace: &SpanHandle) -> Result<bool> {
        let slot = slot(key);
        // What was found to hold may have been replaced meanwhile: then this head is not of what is stored.
        let same = |old: &Arc<Object>| *old.head.primary == *key.primary_key() && old.head.born() == born(meta.created());
        let Some(old) = self.memory.peek(&slot).filter(same) else { return Ok(false) };
        let mut head = Head::new(key.primary_key(), meta)?;
        head.complete(old.body.len())?;
        let object = Arc::new(Object::new(head, old.body.clone(), old.kept.load(Ordering::Relaxed)));
        // It was used: an object that is validated over and over is worth keeping.
        let due = object.used();
        let replaced = self.memory.entry(&slot, Some(Duration::ZERO), |_, now| {
            let same = Arc::ptr_eq(now, &old);
            if same {
                *now = object.clone();
            }
            EntryAction::Retain(same)
        });
        if !matches!(replaced, EntryResult::Retained(true)) {
            return Ok(false);
        }
        match (due, &self.disk) {
            (true, _) => self.keep(slot, &object),
            (false, Some(disk)) => disk.refresh(slot, &object),
            (false, None) => {}
        }
        Ok(true)
    }

    fn support_streaming_partial_write(&self) -> bool {
        true
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync + 'static) {
        self
    }
}

impl Store {
    /// Would whoever looks now find something? The engine looks first and locks then: in between another one's response
    /// may have begun to come, and given its lock back.
    fn has(&self, slot: u128, key: &CacheKey) -> bool {
        let usable = |head: &Head| {
            let known = *head.primary == *key.primary_key();
            known && self.known.purges.check(head.url(), head.tags(), head.noted.asked) != Some(Purged::Gone)
        };
        // A stored variant may be older than what its resource was stored as last, and then the engine passes it over.
        let whole = key.variance_bin().is_none();
        self.on_its_way(slot).is_some_and(|fill| usable(&fill.head))
            || (whole && self.memory.peek(&slot).is_some_and(|object| usable(&object.head)))
    }
}

impl CacheKeyLock for Store {
    fn lock(&self, key: &CacheKey, stale_writer: bool) -> Locked {
        let locked = self.lock.lock(key, stale_writer);
        let Locked::Write(permit) = locked else { return locked };
        if stale_writer || !self.has(slot(key), key) {
            return Locked::Write(permit);
        }
        // It waits for nothing, and looks again.
        let again = self.lock.lock(key, stale_writer);
        self.lock.release(key, permit, LockStatus::Done);
        again
    }

    fn release(&self, key: &CacheKey, permit: WritePermit, reason: LockStatus) {
        self.lock.release(key, permit, reason);
    }
}

/// A response that is being read.
pub struct Hit {
    source: Source,
    at: u64,
    end: Option<u64>,
}

enum Source {
    Memory(Arc<Object>),
    Disk { store: &'static Store, slot: u128, object: Arc<Object>, stored: Arc<Stored> },
    Along(Along),
}

impl Hit {
    fn new(source: Source) -> Self {
        Self { source, at: 0, end: None }
    }

    /// What is known of it.
    pub fn head(&self) -> &Head {
        match &self.source {
            Source::Memory(object) | Source::Disk { object, .. } => &object.head,
            Source::Along(along) => &along.fill().head,
        }
    }

    /// Does it pass without being stored?
    pub fn is_lost(&self) -> bool {
        matches!(&self.source, Source::Along(along) if along.fill().is_lost())
    }

    /// Is it still coming?
    pub fn is_partial(&self) -> bool {
        matches!(self.source, Source::Along(_))
    }

    fn length(&self) -> Option<u64> {
        match &self.source {
            Source::Memory(object) | Source::Disk { object, .. } => Some(object.body.len()),
            Source::Along(along) => along.fill().head.length(),
        }
    }

    /// What comes next of a body in memory.
    fn next_in_memory(&mut self) -> Option<Bytes> {
        let Source::Memory(object) = &self.source else { return None };
        let Body::Memory(chunks) = &object.body else { return None };
        let mut begin = 0;
        for chunk in chunks {
            let after = begin + chunk.len() as u64;
            if self.at < after {
                let to = self.end.map_or(after, |end| after.min(end));
                if to <= self.at {
                    return None;
                }
                let bytes = chunk.slice((self.at - begin) as usize..(to - begin) as usize);
                self.at = to;
                return Some(bytes);
            }
            begin = after;
        }
        None
    }

    async fn next_on_disk(&mut self) -> Result<Option<Bytes>> {
        let Source::Disk { store, slot, object, stored } = &self.source else { return Ok(None) };
        let end = self.end.unwrap_or(stored.len).min(stored.len);
        let at = self.at;
        if at >= end {
            return Ok(None);
        }
        let read = match stored.chunk_at_hand(at) {
            Some(read) => read,
            None => {
                let theirs = stored.clone();
                match timeout(PATIENCE, spawn_blocking(move || theirs.chunk(at))).await {
                    Ok(read) => read.unwrap_or_else(|lost| Err(io::Error::other(lost))),
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                }
            }
        };
        match read {
            Ok((begin, chunk)) => {
                let to = (begin + chunk.len() as u64).min(end);
                self.at = to;
                Ok(Some(chunk.slice((at - begin) as usize..(to - begin) as usize)))
            }
            Err(error) => {
                store.rotten(*slot, object, &error);
                Err(Error::because(ErrorType::ReadError, "the cache's file is broken", error))
            }
        }
    }
}

#[async_trait]
impl HandleHit for Hit {
    async fn read_body(&mut self) -> Result<Option<Bytes>> {
        match &mut self.source {
            Source::Memory(_) => Ok(self.next_in_memory()),
            Source::Disk { .. } => self.next_on_disk().await,
            Source::Along(along) => {
                let cut = |_: Cut| Error::explain(ErrorType::ReadError, "the response ended before it was whole");
                along.next().await.map_err(cut)
            }
        }
    }

    async fn finish(
        self: Box<Self>,
        _storage: &'static (dyn Storage + Sync),
        _key: &CacheKey,
        _trace: &SpanHandle,
    ) -> Result<()> {
        Ok(())
    }

    fn can_seek(&self) -> bool {
        self.length().is_some()
    }

    fn seek(&mut self, start: usize, end: Option<usize>) -> Result<()> {
        let length = self.length().unwrap_or(u64::MAX);
        let (start, end) = (start as u64, end.map(|end| (end as u64).min(length)));
        if start >= length {
            return Error::e_explain(ErrorType::InternalError, "a range begins behind its end");
        }
        (self.at, self.end) = (start, end);
        if let Source::Along(along) = &mut self.source {
            along.seek(start, end);
        }
        Ok(())
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }

    fn as_any_mut(&mut self) -> &mut (dyn Any + Send + Sync) {
        self
    }
}

/// A response that is being written. Dropped before it is whole it has failed, and those who read along hear it.
struct Miss {
    store: &'static Store,
    fill: Option<Arc<Fill>>,
    tag: [u8; 8],
    len: u64,
    spooling: bool,
}

#[async_trait]
impl HandleMiss for Miss {
    async fn write_body(&mut self, data: Bytes, _eof: bool) -> Result<()> {
        self.len += data.len() as u64;
        match &self.fill {
            Some(fill) if !self.store.more(fill, data, &mut self.spooling).await => {
                Error::e_explain(ErrorType::WriteError, "it is not stored, and nobody reads it")
            }
            _ => Ok(()),
        }
    }

    async fn finish(mut self: Box<Self>) -> Result<MissFinishType> {
        let len = self.len;
        if let Some(fill) = self.fill.take() {
            self.store.end(fill, Outcome::Whole, len, self.spooling);
        }
        Ok(MissFinishType::Created(usize::try_from(len).unwrap_or(usize::MAX)))
    }

    fn streaming_write_tag(&self) -> Option<&[u8]> {
        Some(&self.tag)
    }
}

impl Drop for Miss {
    fn drop(&mut self) {
        if let Some(fill) = self.fill.take() {
            self.store.end(fill, Outcome::Failed, self.len, self.spooling);
        }
    }
}
