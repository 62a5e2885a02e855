//! How long requests take, over the last ten seconds, minute and five minutes, without a lock on their way.
//!
//! A request adds 1 to one of [`BUCKETS`] counters that only grow: 16 for each doubling, so a quantile is off by at
//! most 1/32 of itself (the layout of HdrHistogram; with such buckets sketches are merged by adding, as DDSketch's are). Once a
//! second what came since is set aside, only where something came, and windows are sums of that.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;

/// Counters for each doubling.
const PER_DOUBLING: u64 = 16;
/// From 1 µs to 268 s; what is longer counts as that.
const BUCKETS: usize = 400;
/// Single seconds that are kept.
const SECONDS: usize = 60;
/// Tens of seconds that are kept, the one under way apart.
const TENS: usize = 29;

/// The counter for a time in microseconds.
fn bucket(us: u64) -> usize {
    if us < PER_DOUBLING {
        return us as usize;
    }
    let doubling = u64::from(us.ilog2()) - 4;
    let within = (us >> doubling) - PER_DOUBLING;
    usize::try_from((doubling + 1) * PER_DOUBLING + within).unwrap_or(usize::MAX).min(BUCKETS - 1)
}

/// The middle of a counter's range, in milliseconds.
fn middle(bucket: usize) -> f64 {
    let bucket = bucket as u64;
    let us = match bucket / PER_DOUBLING {
        0 => bucket as f64,
        doubling => {
            let width = (1u64 << (doubling - 1)) as f64;
            (PER_DOUBLING + bucket % PER_DOUBLING) as f64 * width + width / 2.0
        }
    };
    us / 1_000.0
}

/// Requests of one kind: how many, how many failed, and how long they took. At most 90 parts of 400 counters are kept; in
/// practice a few kilobytes.
#[derive(Debug)]
pub struct Series {
    counts: Box<[AtomicU32]>,
    failed: AtomicU32,
    past: Mutex<Past>,
}

/// What came in one second, or in ten.
#[derive(Debug, Clone, Default)]
pub struct Part {
    /// How long it was.
    length: Duration,
    failed: u32,
    /// By counter, in order; only those where something came.
    counts: Box<[(u16, u32)]>,
}

/// What came in the last five minutes.
#[derive(Debug, Default)]
pub struct History {
    seconds: VecDeque<Part>,
    tens: VecDeque<Part>,
    /// Seconds since the last ten.
    since: usize,
}

/// What was counted when it was looked at last, and the history.
#[derive(Debug)]
struct Past {
    counts: Box<[u32]>,
    failed: u32,
    history: History,
}

/// How long the windows are by now: less than their names say in a young process, more after a pause of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lengths {
    ten_seconds: Duration,
    minute: Duration,
    five_minutes: Duration,
}

/// What a window says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Requests.
    pub requests: u64,
    /// A second.
    pub per_second: f64,
    /// Those that failed: answered with 500 or more.
    pub failed: u64,
    /// The part of all that failed, from 0 to 1.
    pub error_ratio: f64,
    /// Half of them took at most this long, in milliseconds; nothing without requests.
    pub p50_ms: Option<f64>,
    /// 95 of 100.
    pub p95_ms: Option<f64>,
    /// 99 of 100.
    pub p99_ms: Option<f64>,
}

/// The windows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Windows {
    /// The last ten seconds.
    #[serde(rename = "10s")]
    pub ten_seconds: Summary,
    /// The last minute.
    #[serde(rename = "1m")]
    pub minute: Summary,
    /// The last five minutes.
    #[serde(rename = "5m")]
    pub five_minutes: Summary,
}

impl Default for Series {
    fn default() -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect(),
            failed: AtomicU32::new(0),
            past: Mutex::new(Past { counts: vec![0; BUCKETS].into(), failed: 0, history: History::default() }),
        }
    }
}

impl Series {
    /// A request is over.
    pub fn add(&self, took: Duration, failed: bool) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if let Some(counter) = self.counts.get(bucket(us)) {
            counter.fetch_add(1, Relaxed);
        }
        if failed {
            self.failed.fetch_add(1, Relaxed);
        }
    }

    /// A second is over, or however long it `took`: sets aside what came in it, and hands it on.
    pub fn tick(&self, took: Duration) -> Part {
        let past = &mut *self.past.lock();
        // In this order: whatever failed is counted, too.
        let failed = self.failed.load(Relaxed);
        let mut counts = Vec::new();
        for (i, (now, before)) in self.counts.iter().zip(&mut past.counts).enumerate() {
            let now = now.load(Relaxed);
            if now != *before {
                counts.push((i as u16, now.wrapping_sub(*before)));
                *before = now;
            }
        }
        let part = Part { length: took, failed: failed.wrapping_sub(past.failed), counts: counts.into() };
        past.failed = failed;
        past.history.push(part.clone());
        part
    }

    /// What the windows say, which are so long.
    pub fn windows(&self, lengths: Lengths) -> Windows {
        self.past.lock().history.windows(lengths)
    }
}

impl Part {
    /// All of them together; as long as the longest.
    pub fn merged(parts: &[Self]) -> Self {
        let length = parts.iter().map(|part| part.length).max().unwrap_or_default();
        Self { length, ..merged(parts.iter()) }
    }
}

impl History {
    /// A part more; the oldest goes.
    pub fn push(&mut self, part: Part) {
        self.since += 1;
        if self.seconds.len() == SECONDS {
            self.seconds.pop_front();
        }
        self.seconds.push_back(part);
        if self.since == 10 {
            self.since = 0;
            let ten = merged(self.latest(10));
            if self.tens.len() == TENS {
                self.tens.pop_front();
            }
            self.tens.push_back(ten);
        }
    }

    fn latest(&self, n: usize) -> impl Iterator<Item = &Part> + Clone {
        self.seconds.iter().rev().take(n)
    }

    fn five_minutes(&self) -> impl Iterator<Item = &Part> {
        self.tens.iter().chain(self.latest(self.since))
    }

    /// How long the windows are by now.
    pub fn lengths(&self) -> Lengths {
        fn sum<'a>(parts: impl Iterator<Item = &'a Part>) -> Duration {
            parts.map(|part| part.length).sum()
        }
        let [ten_seconds, minute] = [10, SECONDS].map(|n| sum(self.latest(n)));
        Lengths { ten_seconds, minute, five_minutes: sum(self.five_minutes()) }
    }

    /// What the windows say, which are so long.
    pub fn windows(&self, lengths: Lengths) -> Windows {
        Windows {
            ten_seconds: summary(self.latest(10), lengths.ten_seconds),
            minute: summary(self.latest(SECONDS), lengths.minute),
            five_minutes: summary(self.five_minutes(), lengths.five_minutes),
        }
    }

    /// The last part alone.
    pub fn last(&self) -> Summary {
        let last = self.seconds.back();
        summary(last.into_iter(), last.map(|part| part.length).unwrap_or_default())
    }
}

fn sums<'a>(parts: impl Iterator<Item = &'a Part>) -> (Vec<u64>, u64) {
    let mut all = vec![0u64; BUCKETS];
    let mut failed = 0u64;
    for part in parts {
        failed += u64::from(part.failed);
        for (bucket, count) in &part.counts {
            if let Some(sum) = all.get_mut(usize::from(*bucket)) {
                *sum += u64::from(*count);
            }
        }
    }
    (all, failed)
}

/// One after the other.
fn merged<'a>(parts: impl Iterator<Item = &'a Part> + Clone) -> Part {
    let length = parts.clone().map(|part| part.length).sum();
    let (all, failed) = sums(parts);
    let kept = all.into_iter().enumerate().filter(|(_, count)| *count > 0);
    let counts = kept.map(|(i, count)| (i as u16, u32::try_from(count).unwrap_or(u32::MAX))).collect();
    Part { length, failed: u32::try_from(failed).unwrap_or(u32::MAX), counts }
}

fn summary<'a>(parts: impl Iterator<Item = &'a Part>, length: Duration) -> Summary {
    let (all, failed) = sums(parts);
    let requests: u64 = all.iter().sum();
    if requests == 0 {
        return Summary::default();
    }
    let quantile = |q: f64| {
        let rank = ((requests as f64 * q).ceil() as u64).max(1);
        let mut seen = 0;
        let found = all.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        found.map(middle)
    };
    Summary {
        requests,
        per_second: requests as f64 / length.as_secs_f64().max(0.001),
        failed,
        error_ratio: failed as f64 / requests as f64,
        p50_ms: quantile(0.50),
        p95_ms: quantile(0.95),
        p99_ms: quantile(0.99),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn windows_slide() {
        let series = Series::default();
        let mut clock = History::default();
        let ms = Duration::from_millis;
        for second in 0..400u64 {
            for request in 0..100 {
                series.add(ms(if request < 95 { 10 } else { 1_000 }), second == 0);
            }
            clock.push(series.tick(SECOND));
            let windows = series.windows(clock.lengths());
            let expected = |seconds: u64| 100 * (second + 1).min(seconds);
            assert_eq!(windows.ten_seconds.requests, expected(10), "{second}");
            assert_eq!(windows.minute.requests, expected(60), "{second}");
            // The oldest ten seconds go at once.
            let five = 10 * ((second + 1) / 10).min(29) + (second + 1) % 10;
            assert_eq!(windows.five_minutes.requests, 100 * five, "{second}");
            assert_eq!(windows.ten_seconds.per_second, 100.0);
            assert_eq!(windows.five_minutes.per_second, 100.0);
            assert_eq!(windows.ten_seconds.failed, if second < 10 { 100 } else { 0 });
        }
        let Summary { p50_ms, p95_ms, p99_ms, .. } = series.windows(clock.lengths()).minute;
        for (seen, exact) in [(p50_ms, 10.0), (p95_ms, 10.0), (p99_ms, 1_000.0)] {
            assert!((seen.unwrap() - exact).abs() <= exact / 32.0, "{seen:?} for {exact}");
        }
        // One that came late is measured by the same clock.
        let late = Series::default();
        late.add(ms(1), false);
        late.tick(SECOND);
        assert_eq!(late.windows(clock.lengths()).minute.per_second, 1.0 / 60.0);
        for _ in 0..300 {
            clock.push(series.tick(SECOND));
        }
        assert_eq!(series.windows(clock.lengths()), Windows::default());
    }

    #[test]
    fn a_pause_of_the_process_is_no_rush() {
        let (series, mut clock) = (Series::default(), History::default());
        (0..100).for_each(|_| series.add(SECOND, false));
        clock.push(series.tick(SECOND * 5));
        assert_eq!(clock.last().per_second, 20.0);
        assert_eq!(series.windows(clock.lengths()).minute.per_second, 20.0);
        let together = Part::merged(&[series.tick(SECOND), Part { length: SECOND, failed: 2, counts: [(3, 4)].into() }]);
        assert_eq!((together.length, together.failed, &*together.counts), (SECOND, 2, &[(3, 4)][..]));
    }

    proptest! {
        #[test]
        fn a_quantile_is_off_by_a_thirty_second_at_most(mut all in proptest::collection::vec(100u64..100_000_000, 1..300)) {
            let series = Series::default();
            all.iter().for_each(|us| series.add(Duration::from_micros(*us), false));
            let mut history = History::default();
            history.push(series.tick(SECOND));
            all.sort_unstable();
            let summary = history.last();
            for (q, seen) in [(0.5, summary.p50_ms), (0.95, summary.p95_ms), (0.99, summary.p99_ms)] {
                let exact = all[((all.len() as f64 * q).ceil() as usize).max(1) - 1] as f64 / 1_000.0;
                prop_assert!((seen.unwrap() - exact).abs() <= exact / 32.0 + 0.001, "{seen:?} for {exact}");
            }
        }

        #[test]
        fn counters_are_in_order(a in 0u64..u64::MAX, b in 0u64..u64::MAX) {
            prop_assert_eq!(bucket(a.min(b)) <= bucket(a.max(b)), true);
        }
    }
}
