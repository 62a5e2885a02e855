//! What the cache does, as metrics.

use std::sync::atomic::Ordering;

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::add;
use crate::cache::status::Status;
use crate::proxy::store::Store;

/// What the cache does.
#[derive(Debug)]
pub struct CacheMetrics {
    /// Requests that the cache was asked for, by what it did.
    pub asked: IntCounterVec,
    requests: [IntCounter; Status::ALL.len()],
    bytes: [IntGauge; 2],
    objects: [IntGauge; 2],
    /// URLs, hosts, tags and the like that were purged.
    pub purges: IntCounter,
    purge_log: IntGauge,
    waiting: IntGauge,
    broken: IntCounter,
    disk_errors: IntCounter,
    evicted: IntCounter,
}

impl CacheMetrics {
    /// All at zero.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| add(registry, IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| add(registry, IntGauge::new(name, help));
        let tiers = |name: &str, help: &str| {
            let vec = add(registry, IntGaugeVec::new(Opts::new(name, help), &["tier"]))?;
            Ok::<_, prometheus::Error>(["memory", "disk"].map(|tier| vec.with_label_values(&[tier])))
        };
        let requests = Opts::new("portolan_cache_requests_total", "Requests that the cache was asked for, by what it did.");
        let requests = add(registry, IntCounterVec::new(requests, &["status"]))?;
        Ok(Self {
            asked: requests.clone(),
            requests: Status::ALL.map(|status| requests.with_label_values(&[status.label()])),
            bytes: tiers("portolan_cache_bytes", "Bytes of stored responses, headers included.")?,
            objects: tiers("portolan_cache_objects", "Stored responses.")?,
            purges: counter("portolan_cache_purges_total", "URLs, prefixes, hosts, tags that were purged.")?,
            purge_log: gauge("portolan_cache_purge_log_entries", "Purges that hits are held against.")?,
            waiting: gauge("portolan_cache_requests_waiting", "Requests that wait for a response, their own or another's.")?,
            broken: counter("portolan_cache_broken_files_total", "Files of the cache that were torn or rotten, and deleted.")?,
            disk_errors: counter("portolan_cache_disk_errors_total", "Times at which the cache's disk failed.")?,
            evicted: counter("portolan_cache_evicted_files_total", "Files of the cache that made room for others.")?,
        })
    }

    /// Counts a request.
    pub fn request(&self, status: Status) {
        if let Some(counter) = self.requests.get(status as usize) {
            counter.inc();
        }
    }

    /// What is only known at this moment.
    pub fn refresh(&self, store: &Store, purge_log: usize) {
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let held = store.held();
        for (to, value) in self.bytes.iter().zip([held.memory_bytes, held.disk_bytes]) {
            to.set(gauge(value));
        }
        for (to, value) in self.objects.iter().zip([held.memory_objects, held.disk_objects]) {
            to.set(gauge(value as u64));
        }
        self.purge_log.set(gauge(purge_log as u64));
        self.waiting.set(store.waiting.load(Ordering::Relaxed).into());
        let counts = &store.counts;
        let counters =
            [(&self.broken, &counts.broken), (&self.disk_errors, &counts.disk_errors), (&self.evicted, &counts.evicted)];
        for (counter, value) in counters {
            counter.inc_by(value.load(Ordering::Relaxed).saturating_sub(counter.get()));
        }
    }
}
