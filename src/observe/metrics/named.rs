//! Metrics of routes, regions and hosts, looked up once for each configuration.

use std::sync::{Arc, OnceLock};

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec};
use rustc_hash::FxHashMap;

use crate::observe::RequestDone;
use crate::observe::sketch::Series;
use crate::request::host_name;
use crate::routes::HostMatch;
use crate::snapshot::Snapshot;
use crate::upstream::{Failure, Outcome, Try};

/// Methods that have a label of their own; a stranger's inventions share `other`.
pub const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "other"];

/// Statuses that have a counter at hand; others are looked up.
const CODES: [u16; 29] = [
    101, 200, 201, 202, 204, 206, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 405, 408, 409, 410, 413, 422, 429, 431, 499,
    500, 502, 503, 504,
];

/// What shares a label because there are so many, or because nobody named it.
pub(super) const OTHER: &str = "_other";
/// Routes with a label of their own, from the top of the file.
pub(super) const ROUTES: usize = 1_000;
/// Hosts with a label of their own, from the top of the file.
pub(super) const HOSTS: usize = 200;
/// The first digit of a status; 0 for none.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

const OUTCOMES: usize = Failure::ALL.len() + 4;

/// One route's metrics.
pub struct RouteMetrics {
    name: Arc<str>,
    codes: Box<[OnceLock<IntCounter>]>,
    duration: Histogram,
    series: Option<Arc<Series>>,
}

/// One region's metrics.
pub struct RegionMetrics {
    outcomes: [IntCounter; OUTCOMES],
    duration: Histogram,
    series: Arc<Series>,
}

/// Requests by the host that the configuration names.
#[derive(Debug)]
pub struct HostMetrics {
    named: FxHashMap<Box<str>, [IntCounter; CLASSES.len()]>,
    other: [IntCounter; CLASSES.len()],
}

impl std::fmt::Debug for RouteMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RouteMetrics")
    }
}

impl std::fmt::Debug for RegionMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegionMetrics")
    }
}

impl RouteMetrics {
    pub(super) fn new(name: Arc<str>, duration: &HistogramVec, series: Option<Arc<Series>>) -> Self {
        let codes = (0..METHODS.len() * CODES.len()).map(|_| OnceLock::new()).collect();
        Self { duration: duration.with_label_values(&[&name]), name, codes, series }
    }

    /// Counts a request.
    pub(super) fn count(&self, all: &IntCounterVec, done: &RequestDone<'_>) {
        let (method, status) = (done.method, done.status);
        let method = METHODS.iter().position(|m| *m == method.as_str()).unwrap_or(METHODS.len() - 1);
        let label = METHODS.get(method).copied().unwrap_or("other");
        let code = if (100..=599).contains(&status) { status } else { 0 };
        let lookup = || all.with_label_values(&[&*self.name, label, code.to_string().as_str()]);
        let at_hand = CODES.iter().position(|c| *c == code).and_then(|c| self.codes.get(method * CODES.len() + c));
        match at_hand {
            Some(cell) => cell.get_or_init(lookup).inc(),
            None => lookup().inc(),
        }
        self.duration.observe(done.total.as_secs_f64());
        if let Some(series) = &self.series {
            series.add(done.took(), status >= 500);
        }
    }
}

impl RegionMetrics {
    pub(super) fn new(name: &str, attempts: &IntCounterVec, duration: &HistogramVec, series: Arc<Series>) -> Self {
        let counter = |label: &str| attempts.with_label_values(&[name, label]);
        let outcomes = std::array::from_fn(|i| counter(outcome_label(i)));
        Self { outcomes, duration: duration.with_label_values(&[name]), series }
    }

    /// Counts an attempt.
    pub(super) fn count(&self, attempt: &Try) {
        if let Some(counter) = self.outcomes.get(outcome_index(attempt.outcome)) {
            counter.inc();
        }
        let took = attempt.ended.since(attempt.started);
        self.duration.observe(took.as_secs_f64());
        self.series.add(took, attempt.outcome.is_bad());
    }
}

impl HostMetrics {
    pub(super) fn new(all: &IntCounterVec, snapshot: &Snapshot) -> Self {
        let counters = |host: &str| CLASSES.map(|class| all.with_label_values(&[host, class]));
        let named = snapshot.router.hosts().take(HOSTS);
        Self { named: named.map(|host| (host.trim_start_matches('*').into(), counters(host))).collect(), other: counters(OTHER) }
    }

    /// Counts a request, under the host pattern that its route matched by.
    pub(super) fn count(&self, authority: &str, matched: Option<HostMatch>, status: u16) {
        let host = host_name(authority);
        let pattern = match matched {
            Some(HostMatch::Exact) => Some(host),
            // With the dot before it, which tells it from a host.
            Some(HostMatch::Below(length)) => host.len().checked_sub(length.0 + 1).and_then(|from| host.get(from..)),
            Some(HostMatch::Any) | None => None,
        };
        let counters = pattern.and_then(|pattern| match pattern.bytes().any(|b| b.is_ascii_uppercase()) {
            false => self.named.get(pattern),
            true => self.named.get(pattern.to_ascii_lowercase().as_str()),
        });
        let class = usize::from(status / 100);
        if let Some(counter) = counters.unwrap_or(&self.other).get(class).or(self.other.first()) {
            counter.inc();
        }
    }
}

fn outcome_index(outcome: Outcome) -> usize {
    match outcome {
        Outcome::Answered(_) => 0,
        Outcome::Truncated(_) => 1,
        Outcome::Pending => 2,
        Outcome::Replayed(_) => 3,
        Outcome::Failed(failure) => 4 + Failure::ALL.iter().position(|f| f.label() == failure.label()).unwrap_or(0),
    }
}

fn outcome_label(index: usize) -> &'static str {
    match index {
        0 => Outcome::Answered(0).label(),
        1 => Outcome::Truncated(0).label(),
        2 => Outcome::Pending.label(),
        3 => Outcome::Replayed(0).label(),
        _ => Failure::ALL.get(index - 4).map_or("", |f| f.label()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_label() {
        let mut labels: Vec<_> = (0..OUTCOMES).map(outcome_label).collect();
        for failure in Failure::ALL {
            assert_eq!(outcome_label(outcome_index(Outcome::Failed(failure))), failure.label());
        }
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), OUTCOMES);
    }
}
