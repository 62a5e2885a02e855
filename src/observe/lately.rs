//! What happened lately: who hits which rule, where traffic fails over, what became of regions and configurations. Found by
//! looking at counters and states once a second, so that no request pays for it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::core::Collector;
use serde::Serialize;

use crate::kept::Now;
use crate::orders::Kept;
use crate::regions::endpoint::describe;
use crate::request::Moment;
use crate::state::{Live, State};

/// Happenings that are kept.
const EVENTS: usize = 200;
/// Seconds that counts are compared over.
const MINUTE: usize = 60;
/// Failovers after a pause of this many milliseconds are told anew.
const PAUSE: u64 = 60_000;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Event {
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// `failover`, `unhealthy`, `healthy`, `evacuated`, `drained` or `restored`.
    pub kind: &'static str,
    /// The region.
    pub region: Arc<str>,
    /// Where its requests went (failover).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<Arc<str>>,
    /// Why.
    pub because: String,
    /// How many requests (failover).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// When the last of them moved, or when an order ends, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
}

/// Counts under labels.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hits {
    /// The labels, in the order of the metric.
    #[serde(skip)]
    pub labels: Vec<String>,
    /// Since the start.
    pub total: u64,
    /// In the last minute.
    pub minute: u64,
}

/// The counts of one metric over the last minute.
#[derive(Debug, Default)]
struct Minute(BTreeMap<Vec<String>, VecDeque<u64>>);

impl Minute {
    /// Takes the counts of this second; how much each grew.
    fn push(&mut self, counts: Vec<(Vec<String>, u64)>) -> Vec<(Vec<String>, u64)> {
        let mut grown = Vec::new();
        let mut kept = BTreeMap::new();
        for (labels, count) in counts {
            let mut past = self.0.remove(&labels).unwrap_or_else(|| VecDeque::from([0]));
            let grew = count.saturating_sub(past.back().copied().unwrap_or_default());
            if past.len() > MINUTE {
                past.pop_front();
            }
            past.push_back(count);
            if grew > 0 {
                grown.push((labels.clone(), grew));
            }
            kept.insert(labels, past);
        }
        // What is not counted any more belongs to a configuration that is gone.
        self.0 = kept;
        grown
    }

    fn hits(&self) -> Vec<Hits> {
        let hits = |(labels, past): (&Vec<String>, &VecDeque<u64>)| {
            let (first, last) = (past.front().copied().unwrap_or_default(), past.back().copied().unwrap_or_default());
            Hits { labels: labels.clone(), total: last, minute: last.saturating_sub(first) }
        };
        self.0.iter().map(hits).collect()
    }
}

/// What is known of a region since the last second.
#[derive(Debug)]
struct Known {
    healthy: bool,
    order: Option<Kept>,
}

/// What happened lately.
#[derive(Debug, Default)]
pub struct Lately(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    failovers: Minute,
    rules: Minute,
    limits: Minute,
    cache: Minute,
    reasons: Minute,
    regions: BTreeMap<Arc<str>, Known>,
    events: VecDeque<Event>,
}

/// Everything of it at one moment.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// By region that was left, region that took over, and reason.
    pub failovers: Vec<Hits>,
    /// By rule and action.
    pub rules: Vec<Hits>,
    /// By limit and decision.
    pub limits: Vec<Hits>,
    /// By what the cache did.
    pub cache: Vec<Hits>,
    /// By why a request was no success.
    pub reasons: Vec<Hits>,
    /// The newest first.
    pub events: Vec<Event>,
}

/// The counts of a vector of counters by their labels' values, in the order of `names`.
fn counts(vector: &impl Collector, names: &[&str]) -> Vec<(Vec<String>, u64)> {
    let families = vector.collect();
    let metrics = families.iter().flat_map(|family| family.get_metric());
    let one = |metric: &prometheus::proto::Metric| {
        let value = |name: &&str| metric.get_label().iter().find(|l| l.name() == *name).map(|l| l.value().to_owned());
        let labels = names.iter().map(|name| value(name).unwrap_or_default()).collect();
        (labels, metric.get_counter().get_value() as u64)
    };
    metrics.map(one).collect()
}

impl Lately {
    /// A second is over: looks at what it brought.
    pub fn tick(&self, state: &State, live: &Live, now: Now) {
        let orders = state.orders.list(state);
        let metrics = &state.metrics;
        let inner = &mut *self.0.lock();
        inner.rules.push(counts(&metrics.waf_matches, &["rule", "action"]));
        inner.limits.push(counts(&metrics.limit_decisions, &["limit", "decision"]));
        inner.cache.push(counts(&metrics.cache.asked, &["status"]));
        inner.reasons.push(counts(&metrics.unsuccessful, &["why"]));
        for (labels, grew) in inner.failovers.push(counts(&metrics.failovers, &["from", "to", "reason"])) {
            if let [from, to, reason] = labels.as_slice() {
                inner.failed_over(from, to, reason, grew, now.unix);
            }
        }
        let mut known = BTreeMap::new();
        for region in &live.snapshot.regions {
            let order = orders.iter().find(|kept| kept.region == *region.name).cloned();
            let seen = Known { healthy: region.is_healthy(now.moment), order };
            let before = inner.regions.remove(&region.name);
            let event = |kind, because, until| Event {
                at: now.unix,
                kind,
                region: region.name.clone(),
                to: None,
                because,
                requests: None,
                until,
            };
            let (was_healthy, had_order) = before.map_or((true, None), |known| (known.healthy, known.order));
            match (was_healthy, seen.healthy) {
                (true, false) => inner.tell(event("unhealthy", reasons(region, now.moment), None)),
                (false, true) => inner.tell(event("healthy", "an upstream answers again".to_owned(), None)),
                (true, true) | (false, false) => {}
            }
            match (&had_order, &seen.order) {
                (before, Some(order)) if !before.as_ref().is_some_and(|before| is_same(before, order)) => {
                    inner.tell(event(order.kind.label(), order.reason.clone(), order.until));
                }
                (Some(order), None) => inner.tell(event("restored", format!("was {}", order.kind.label()), None)),
                (_, Some(_)) | (None, None) => {}
            }
            known.insert(region.name.clone(), seen);
        }
        inner.regions = known;
    }

    /// Everything of it now.
    pub fn seen(&self) -> Seen {
        let inner = self.0.lock();
        Seen {
            failovers: inner.failovers.hits(),
            rules: inner.rules.hits(),
            limits: inner.limits.hits(),
            cache: inner.cache.hits(),
            reasons: inner.reasons.hits(),
            events: inner.events.iter().rev().cloned().collect(),
        }
    }
}

/// Is it still the same order? Its end is told by two clocks, and so not to the millisecond.
fn is_same(a: &Kept, b: &Kept) -> bool {
    let apart = a.until.unwrap_or_default().abs_diff(b.until.unwrap_or_default());
    a.kind == b.kind && a.reason == b.reason && apart < 2_000
}

/// Why nothing of a region is in good health.
fn reasons(region: &crate::regions::Region, now: Moment) -> String {
    let one = |upstream: &crate::regions::Upstream| {
        let endpoints = upstream.state.endpoints();
        let how = endpoints.first().map_or_else(|| "unresolved".to_owned(), |endpoint| describe(endpoint, now).1);
        format!("{}: {how}", upstream.url)
    };
    region.upstreams.iter().take(3).map(one).collect::<Vec<_>>().join("; ")
}

impl Inner {
    fn tell(&mut self, event: Event) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// What goes on is one event that grows.
    fn failed_over(&mut self, from: &str, to: &str, reason: &str, requests: u64, now: u64) {
        let same = |event: &&mut Event| {
            event.kind == "failover" && *event.region == *from && event.to.as_deref() == Some(to) && event.because == reason
        };
        let last = self.events.iter_mut().rev().find(same);
        match last.filter(|event| now.saturating_sub(event.until.unwrap_or(event.at)) < PAUSE) {
            Some(event) => {
                event.requests = Some(event.requests.unwrap_or_default() + requests);
                event.until = Some(now);
            }
            None => self.tell(Event {
                at: now,
                kind: "failover",
                region: from.into(),
                to: Some(to.into()),
                because: reason.to_owned(),
                requests: Some(requests),
                until: Some(now),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_of_counts() {
        let mut minute = Minute::default();
        let count = |n| vec![(vec!["rule".to_owned()], n)];
        for second in 1..=100u64 {
            let grown = minute.push(count(second * 2));
            assert_eq!(grown, [(vec!["rule".to_owned()], 2)]);
            let hits = minute.hits();
            assert_eq!((hits[0].total, hits[0].minute), (second * 2, (second * 2).min(120)));
        }
        assert!(minute.push(count(200)).is_empty());
        minute.push(Vec::new());
        assert!(minute.hits().is_empty());
    }

    #[test]
    fn a_failover_that_goes_on_is_one_event() {
        let mut inner = Inner::default();
        inner.failed_over("a", "b", "closed", 3, 1_000);
        inner.failed_over("a", "b", "closed", 4, 2_000);
        inner.failed_over("a", "c", "closed", 1, 3_000);
        inner.failed_over("a", "b", "closed", 1, 62_000);
        let told: Vec<_> = inner.events.iter().map(|e| (e.at, e.requests, e.until)).collect();
        assert_eq!(told, [(1_000, Some(7), Some(2_000)), (3_000, Some(1), Some(3_000)), (62_000, Some(1), Some(62_000))]);
        for n in 0..500u64 {
            inner.failed_over("a", "b", "closed", 1, n * PAUSE * 2);
        }
        assert_eq!(inner.events.len(), EVENTS);
    }
}
