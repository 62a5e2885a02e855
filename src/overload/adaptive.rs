//! How many requests a region can answer at once, found out from how long they take.
//!
//! Little's law: what is at once is what comes in a second times what each takes. Up to what the region can do at once
//! more of them take no longer; beyond it they only wait for each other. So every window the limit is multiplied by the
//! ratio of how long a request takes when nothing waits to how long it takes now, and is given some headroom on top
//! (the gradient of Netflix's concurrency-limits). Envoy finds "when nothing waits" by holding a region to three
//! requests at once every minute; here it is the least that was seen. It goes up where what takes longer cannot be
//! waiting: while the limit does not bind, or is the least that may be, and where a lower limit did not make answers
//! come sooner.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::time::Duration;

use parking_lot::Mutex;

use crate::request::Moment;

/// A window lasts at least this long, and twice as long as an answer takes: what it sees began under its own limit;
const WINDOW: Duration = Duration::from_millis(200);
/// and until it has seen so many answers, unless it takes [`LONGEST`].
const ENOUGH: u32 = 20;
/// What happens seldom is not waited for for ever.
const LONGEST: Duration = Duration::from_secs(2);
/// However long an answer takes, this is learned from at least so often.
const SLOWEST: Duration = Duration::from_secs(10);
/// So much longer than without waiting is as it should be.
const TOLERANCE: f64 = 1.5;
/// A window changes the limit by at most this factor downwards.
const STEEPEST: f64 = 0.5;
/// What is new weighs so much against what was.
const SMOOTHING: f64 = 0.5;
/// The base goes up by this part of the difference in each window in which the limit does not bind,
const DRIFT: f64 = 0.1;
/// and by this part where a lower limit was of no use.
const LEAP: f64 = 0.5;
/// A limit is lower, or higher, from this ratio on.
const LOWER: f64 = 0.8;
/// Answers are counted by their time, four counters for each doubling, from 16 µs to an hour.
const STEPS: usize = 4 * 28;
const FIRST: u32 = 4;

/// Between what the limit moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Never fewer.
    pub min: u32,
    /// Never more.
    pub max: u32,
}

/// What is known of one region. It outlives reloads.
#[derive(Debug)]
pub struct Adaptive {
    /// The limit; 0 before there is one.
    limit: AtomicU32,
    learned: Mutex<Learned>,
    times: [AtomicU32; STEPS],
    seen: AtomicU32,
    /// The most at once in this window.
    peak: AtomicU32,
    /// Somebody found no room in this window.
    bound: AtomicBool,
    /// When the window began, and how long it lasts at least, in milliseconds.
    began: AtomicU64,
    lasts: AtomicU64,
}

/// What windows taught so far. Times are in microseconds; 0 is unknown.
#[derive(Debug, Default)]
struct Learned {
    /// Without waiting.
    base: f64,
    /// The limit under which the present window was measured.
    limit: f64,
    /// A limit that was in force a while ago, and how long answers took under it.
    mark: (f64, f64),
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            limit: AtomicU32::new(0),
            learned: Mutex::default(),
            times: std::array::from_fn(|_| AtomicU32::new(0)),
            seen: AtomicU32::new(0),
            peak: AtomicU32::new(0),
            bound: AtomicBool::new(false),
            began: AtomicU64::new(0),
            lasts: AtomicU64::new(0),
        }
    }
}

/// Where the limit begins.
const INITIAL: u32 = 32;

impl Adaptive {
    /// The limit at the moment.
    pub fn limit(&self, bounds: Bounds) -> u32 {
        match self.limit.load(Relaxed) {
            0 => INITIAL.clamp(bounds.min, bounds.max),
            limit => limit.clamp(bounds.min, bounds.max),
        }
    }

    /// How long a request takes when nothing waits.
    pub fn base(&self) -> Option<Duration> {
        Some(self.learned.lock().base as u64).filter(|us| *us > 0).map(Duration::from_micros)
    }

    /// Somebody found no room.
    pub fn pressed(&self) {
        if !self.bound.load(Relaxed) {
            self.bound.store(true, Relaxed);
        }
    }

    /// An answer took this long, with so many at once; or there was none for so long. Is there more room now?
    pub fn measured(&self, took: Duration, in_flight: u32, bounds: Bounds, now: Moment) -> bool {
        if let Some(count) = self.times.get(step(took)) {
            count.fetch_add(1, Relaxed);
        }
        let seen = self.seen.fetch_add(1, Relaxed) + 1;
        if self.peak.load(Relaxed) < in_flight {
            self.peak.fetch_max(in_flight, Relaxed);
        }
        let began = self.began.load(Relaxed);
        let lasts = now.since(Moment(Duration::from_millis(began)));
        if lasts < WINDOW.max(Duration::from_millis(self.lasts.load(Relaxed))) || (seen < ENOUGH && lasts < LONGEST) {
            return false;
        }
        // One of those who see its end closes the window.
        let before = self.limit(bounds);
        let closes = self.began.compare_exchange(began, now.millis(), Relaxed, Relaxed).is_ok();
        if closes {
            self.close(bounds);
        }
        closes && self.limit(bounds) > before
    }

    /// Learns from a window.
    fn close(&self, bounds: Bounds) {
        let counts: [u32; STEPS] = std::array::from_fn(|i| self.times.get(i).map_or(0, |count| count.swap(0, Relaxed)));
        self.seen.store(0, Relaxed);
        let peak = self.peak.swap(0, Relaxed);
        let bound = self.bound.swap(false, Relaxed);
        let all: u64 = counts.iter().map(|c| u64::from(*c)).sum();
        let (mut below, mut median) = (0, 0.0);
        for (i, count) in counts.iter().enumerate() {
            below += u64::from(*count);
            if below * 2 >= all && all > 0 {
                median = micros(i);
                break;
            }
        }
        if median <= 0.0 {
            return;
        }
        self.lasts.store(((median * 2.0 / 1_000.0) as u64).min(SLOWEST.as_millis() as u64), Relaxed);
        let limit = f64::from(self.limit(bounds));
        let mut learned = self.learned.lock();
        // What was measured now was let in under the limit of the window before.
        let under = std::mem::replace(&mut learned.limit, limit);
        // What the least that may be is held to does not wait because of too many.
        let base = learned.base(median, under, bound && under > f64::from(bounds.min));
        drop(learned);
        let gradient = (base * TOLERANCE / median).clamp(STEEPEST, 1.0);
        // What is not used says nothing about more of it.
        if gradient >= 1.0 && !bound && f64::from(peak) * 2.0 < limit {
            return;
        }
        let wanted = limit * gradient + limit.sqrt();
        let next = (limit + (wanted - limit) * SMOOTHING).clamp(bounds.min.into(), bounds.max.into());
        self.limit.store(next.round() as u32, Relaxed);
    }
}

impl Learned {
    /// The time without waiting, after a window with this median.
    fn base(&mut self, median: f64, under: f64, bound: bool) -> f64 {
        let ratio = if self.mark.0 > 0.0 { under / self.mark.0 } else { 0.0 };
        // If they had waited for each other, fewer would have waited less, in proportion.
        let of_no_use = ratio > 0.0 && ratio <= LOWER && median > self.mark.1 * (1.0 + ratio) / 2.0;
        if ratio <= LOWER || ratio >= 1.0 / LOWER {
            self.mark = (under, median);
        }
        self.base = match self.base {
            base if base <= 0.0 || median <= base => median,
            base if of_no_use => base + (median - base) * LEAP,
            base if !bound => base + (median - base) * DRIFT,
            base => base,
        };
        self.base
    }
}

/// Which counter.
fn step(took: Duration) -> usize {
    let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1 << FIRST);
    let octave = us.ilog2();
    let quarter = (us >> (octave - 2)) & 3;
    (((octave - FIRST) * 4) as usize + quarter as usize).min(STEPS - 1)
}

/// The middle of what a counter counts.
fn micros(step: usize) -> f64 {
    let octave = (1u64 << (step / 4 + FIRST as usize)) as f64;
    octave * (1.125 + 0.25 * (step % 4) as f64)
}

#[cfg(test)]
mod tests {
    use std::collections::BinaryHeap;

    use super::*;

    const BOUNDS: Bounds = Bounds { min: 4, max: 1_000 };

    /// A region with so many workers, each busy for `service` with a request; what finds none waits in its own queue,
    /// first come, first served. Requests come at an even pace.
    struct Region {
        free: BinaryHeap<std::cmp::Reverse<u64>>,
        service: u64,
    }

    /// What came of it: answers per second, and the median time of the last second, in milliseconds.
    struct Seen {
        rate: f64,
        median: u64,
        limit: u32,
    }

    impl Region {
        fn new(workers: usize, service: u64) -> Self {
            Self { free: (0..workers).map(|_| std::cmp::Reverse(0)).collect(), service }
        }

        /// `per_second` requests for so many seconds; times are in microseconds.
        fn play(&mut self, adaptive: &Adaptive, from: u64, seconds: u64, per_second: u64) -> Seen {
            let mut in_flight: BinaryHeap<std::cmp::Reverse<(u64, u64)>> = BinaryHeap::new();
            let (mut answered, mut times) = (0u64, Vec::new());
            for n in 0..seconds * per_second {
                let now = from + n * 1_000_000 / per_second;
                while let Some(std::cmp::Reverse((end, began))) = in_flight.peek().copied().filter(|r| r.0.0 <= now) {
                    let at_once = in_flight.len() as u32;
                    in_flight.pop();
                    adaptive.measured(Duration::from_micros(end - began), at_once, BOUNDS, Moment(Duration::from_micros(end)));
                    answered += 1;
                    if end > from + (seconds - 1) * 1_000_000 {
                        times.push((end - began) / 1_000);
                    }
                }
                if in_flight.len() as u32 >= adaptive.limit(BOUNDS) {
                    adaptive.pressed();
                    continue;
                }
                let std::cmp::Reverse(free) = self.free.pop().unwrap();
                let end = free.max(now) + self.service;
                self.free.push(std::cmp::Reverse(end));
                in_flight.push(std::cmp::Reverse((end, now)));
            }
            times.sort_unstable();
            let median = times.get(times.len() / 2).copied().unwrap_or(0);
            Seen { rate: answered as f64 / seconds as f64, median, limit: adaptive.limit(BOUNDS) }
        }
    }

    #[test]
    fn a_region_under_ten_times_its_load_answers_what_it_can_and_does_not_slow_down() {
        // 20 workers of 20 ms: 1,000 a second.
        let (adaptive, mut region) = (Adaptive::default(), Region::new(20, 20_000));
        let calm = region.play(&adaptive, 0, 10, 500);
        assert!(calm.rate > 495.0 && calm.median <= 20, "{} {}", calm.rate, calm.median);
        let storm = region.play(&adaptive, 10_000_000, 120, 10_000);
        assert!(storm.rate > 950.0, "answers what it can: {}", storm.rate);
        assert!(storm.median <= 50, "and waits little: {} ms with {} at once", storm.median, storm.limit);
        let after = region.play(&adaptive, 130_000_000, 20, 500);
        assert!(after.rate > 495.0 && after.median <= 20, "recovers by itself: {} {}", after.rate, after.median);
    }

    #[test]
    fn what_really_takes_longer_is_believed() {
        let (adaptive, mut region) = (Adaptive::default(), Region::new(50, 10_000));
        region.play(&adaptive, 0, 10, 1_000);
        // Three times as long for each, which is no queue: 50 workers carry 1,666 a second.
        region.service = 30_000;
        region.play(&adaptive, 10_000_000, 20, 1_000);
        let later = region.play(&adaptive, 30_000_000, 10, 1_000);
        assert!(later.rate > 995.0 && later.median <= 30, "{} {} {}", later.rate, later.median, later.limit);
        assert!(adaptive.base().is_some_and(|base| base >= Duration::from_millis(20)));
    }

    #[test]
    fn it_keeps_its_bounds() {
        let (adaptive, mut region) = (Adaptive::default(), Region::new(1, 1_000_000));
        region.play(&adaptive, 0, 60, 100);
        assert!(adaptive.limit(BOUNDS) >= 4 && adaptive.limit(Bounds { min: 50, max: 60 }) == 50);
        let (adaptive, mut region) = (Adaptive::default(), Region::new(5_000, 100_000));
        region.play(&adaptive, 0, 40, 20_000);
        assert_eq!(adaptive.limit(BOUNDS), 1_000);
    }

    #[test]
    fn quick_errors_at_first_do_not_hold_it_down_for_ever() {
        let bounds = Bounds { min: 40, max: 200 };
        let adaptive = Adaptive::default();
        let answers = |from: u64, windows: u64, took: u64| {
            for window in from..from + windows {
                for n in 0..30 {
                    adaptive.pressed();
                    let at = Moment(Duration::from_millis(window * 500 + n));
                    adaptive.measured(Duration::from_millis(took), 40, bounds, at);
                }
            }
        };
        answers(1, 5, 1);
        answers(6, 100, 50);
        assert!(adaptive.limit(bounds) > 40, "{} with {:?}", adaptive.limit(bounds), adaptive.base());
    }

    #[test]
    fn steps_are_a_quarter_of_a_doubling() {
        for us in [16u64, 17, 100, 999, 1_000, 20_000, 1_000_000, 60_000_000] {
            let middle = micros(step(Duration::from_micros(us)));
            assert!((middle / us as f64 - 1.0).abs() < 0.13, "{us}: {middle}");
        }
        assert!(step(Duration::ZERO) == 0 && step(Duration::MAX) == STEPS - 1);
    }
}
