//! How much is allowed in how long, and what is remembered of one client: arithmetic, nothing else.
//!
//! `sliding` keeps a ring of [`BUCKETS`] counters, each for a ninth of the period. What it adds up covers the
//! period and up to a ninth more, so no window of the length of the period ever has more than was allowed, and
//! nobody waits longer than a ninth of the period too long. (Two counters, interpolated, let half as much again
//! through; a token bucket nearly twice as much. An exact log needs memory for each request.)

use std::time::Duration;

use crate::request::Moment;

/// Counters of the ring: nine ninths, and one that time is about to leave. With more of them a client would not fit into
/// one line of the processor's cache.
pub const BUCKETS: usize = 10;
/// Into so many parts a period is divided.
const PARTS: u64 = BUCKETS as u64 - 1;

/// How it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// Never more than `requests` in any window of `period`.
    Sliding,
    /// `burst` at once, and `requests` evenly spread over each `period` (GCRA, ITU-T I.371).
    TokenBucket {
        /// How many at once.
        burst: u32,
    },
    /// `requests` in each `period`; up to twice as many around its end.
    Fixed,
}

/// How much is allowed in how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// How it is counted.
    pub algorithm: Algorithm,
    /// So much,
    pub requests: u32,
    /// in so long, from a second to 7 days.
    pub period: Duration,
}

/// What is remembered of one client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// `sliding`: the ring. `token_bucket`: the first two are the theoretical arrival time in nanoseconds.
    /// `fixed`: the first is what was used.
    counts: [u32; BUCKETS],
    /// The number of the newest bucket or window.
    newest: u32,
    /// Which algorithm wrote this, and above it the milliseconds of a bucket or window.
    form: Form,
}

/// An algorithm and the milliseconds of its bucket or window, in 32 bits; 0 where nothing was counted yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Form(u32);

/// Bits of the algorithm in a [`Form`].
const SLIDING: u32 = 1;
const TOKEN_BUCKET: u32 = 2;
const FIXED: u32 = 3;

impl Form {
    fn new(kind: u32, width: u64) -> Self {
        // Periods are at most 7 days, which is less than 2^30 ms.
        Self(kind | u32::try_from(width).unwrap_or(u32::MAX) << 2)
    }

    fn kind(self) -> u32 {
        self.0 & 3
    }

    fn width(self) -> u64 {
        u64::from(self.0 >> 2)
    }

    /// The number of the bucket that `now` is in.
    fn number(self, now: Moment) -> u32 {
        u32::try_from(now.millis() / self.width().max(1)).unwrap_or(u32::MAX)
    }
}

/// What a client has used up, and when it gets some of it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// There is room for what was asked.
    pub fits: bool,
    /// What is left, before what was asked is taken.
    pub left: u32,
    /// Until there is room for what was asked; zero if there is.
    pub wait: Duration,
    /// Until everything is back.
    pub reset: Duration,
}

fn nanos(now: Moment) -> u64 {
    u64::try_from(now.0.as_nanos()).unwrap_or(u64::MAX)
}

impl Quota {
    /// A period that cannot be divided has slightly longer buckets.
    fn form(&self) -> Form {
        let period = u64::try_from(self.period.as_millis()).unwrap_or(u64::MAX);
        match self.algorithm {
            Algorithm::Sliding => Form::new(SLIDING, period.div_ceil(PARTS)),
            Algorithm::TokenBucket { .. } => Form::new(TOKEN_BUCKET, 0),
            Algorithm::Fixed => Form::new(FIXED, period),
        }
    }

    /// Nanoseconds between two requests of a token bucket that is empty.
    fn interval(&self) -> u64 {
        let period = u64::try_from(self.period.as_nanos()).unwrap_or(u64::MAX);
        period.div_ceil(u64::from(self.requests.max(1)))
    }

    /// The length of a bucket of the ring.
    pub fn bucket(&self) -> Duration {
        Duration::from_millis(self.form().width())
    }

    /// The most that can be used at once.
    pub fn most(&self) -> u32 {
        match self.algorithm {
            Algorithm::TokenBucket { burst } => burst,
            Algorithm::Sliding | Algorithm::Fixed => self.requests,
        }
    }
}

impl Count {
    /// What is used up by `now`, if `cost` more is asked for. A quota that differs from the one under which this
    /// was counted counts at once.
    pub fn used(&self, quota: &Quota, cost: u32, now: Moment) -> Used {
        let mut present = *self;
        present.adopt(quota, now);
        present.present(quota, cost, now)
    }

    /// Counts `cost`, room or not.
    pub fn add(&mut self, quota: &Quota, cost: u32, now: Moment) {
        self.keep_form(quota, now);
        self.put(quota, cost, now);
    }

    /// Brings it to `now`. What counts late may come under an older quota than what was counted meanwhile: the ring
    /// that is there stays.
    fn keep_form(&mut self, quota: &Quota, now: Moment) {
        if self.form.kind() == quota.form().kind() { self.advance(now) } else { self.adopt(quota, now) }
    }

    /// Gives `cost` back that was taken at `then`, if it still counts: to nobody else's debit.
    pub fn give_back(&mut self, quota: &Quota, cost: u32, then: Moment, now: Moment) {
        self.keep_form(quota, now);
        let counted = match self.form.kind() {
            SLIDING => {
                let bucket = self.form.number(then);
                ((self.newest.saturating_sub(bucket) as usize) < BUCKETS).then(|| slot(bucket))
            }
            FIXED => (self.form.number(then) == self.newest).then_some(0),
            _ => {
                // Tokens that have come back by themselves do not come back twice.
                let taken = quota.interval().saturating_mul(cost.into());
                if now.since(then) < Duration::from_nanos(taken) {
                    self.set_arrival(self.arrival().saturating_sub(taken));
                }
                None
            }
        };
        if let Some(count) = counted.and_then(|slot| self.counts.get_mut(slot)) {
            *count = count.saturating_sub(cost);
        }
    }

    /// The same and what `other` counted, together: for one answer from both.
    pub fn with(&self, other: &Self, quota: &Quota, now: Moment) -> Self {
        let (mut sum, mut other) = (*self, *other);
        sum.adopt(quota, now);
        other.adopt(quota, now);
        for (count, more) in sum.counts.iter_mut().zip(other.counts) {
            *count = count.saturating_add(more);
        }
        sum
    }

    /// Is nothing of it left by `now`?
    pub fn is_over(&self, now: Moment) -> bool {
        let passed = || self.form.number(now).saturating_sub(self.newest) as usize;
        match self.form.kind() {
            TOKEN_BUCKET => self.arrival() <= nanos(now),
            SLIDING => passed() >= BUCKETS || self.sum() == 0,
            FIXED => passed() >= 1 || self.sum() == 0,
            _ => true,
        }
    }

    /// What a ring holds, by age in buckets, the newest first: what other nodes are told.
    pub fn ages(&self, quota: &Quota, now: Moment) -> [u32; BUCKETS] {
        let mut present = *self;
        present.adopt(quota, now);
        let newest = present.newest;
        std::array::from_fn(|age| present.counts.get(slot(newest.saturating_sub(age as u32))).copied().unwrap_or(0))
    }

    /// Counts in a ring what was counted `age` buckets ago.
    pub fn add_aged(&mut self, quota: &Quota, cost: u32, age: u32, now: Moment) {
        if quota.algorithm != Algorithm::Sliding {
            return;
        }
        self.adopt(quota, now);
        let bucket = self.newest.saturating_sub(age);
        match self.counts.get_mut(slot(bucket)) {
            Some(count) if (age as usize) < BUCKETS => *count = count.saturating_add(cost),
            _ => {}
        }
    }

    fn present(&self, quota: &Quota, cost: u32, now: Moment) -> Used {
        match quota.algorithm {
            Algorithm::Sliding => {
                let sum = self.sum();
                let most = u64::from(quota.requests);
                let fits = sum + u64::from(cost) <= most;
                // The oldest buckets go first; the last of those that have to go says when.
                let mut excess = (sum + u64::from(cost)).saturating_sub(most);
                let (mut wait, mut reset) = (Duration::ZERO, Duration::ZERO);
                for age in (0..BUCKETS as u32).rev() {
                    let number = self.newest.saturating_sub(age);
                    let count = u64::from(self.counts.get(slot(number)).copied().unwrap_or(0));
                    if count == 0 || age > self.newest {
                        continue;
                    }
                    let leaves = u64::from(number + BUCKETS as u32) * self.form.width();
                    reset = Duration::from_millis(leaves).saturating_sub(now.0);
                    if excess > 0 {
                        wait = reset;
                        excess = excess.saturating_sub(count);
                    }
                }
                if !fits && wait.is_zero() {
                    // It costs more than is ever allowed.
                    wait = quota.period;
                }
                Used { fits, left: u32::try_from(most.saturating_sub(sum)).unwrap_or(u32::MAX), wait, reset }
            }
            Algorithm::Fixed => {
                let used = self.counts.first().copied().unwrap_or(0);
                let end = (u64::from(self.newest) + 1) * self.form.width();
                let reset = Duration::from_millis(end).saturating_sub(now.0);
                let fits = u64::from(used) + u64::from(cost) <= u64::from(quota.requests);
                Used {
                    fits,
                    left: quota.requests.saturating_sub(used),
                    wait: if fits { Duration::ZERO } else { reset },
                    reset: if used == 0 { Duration::ZERO } else { reset },
                }
            }
            Algorithm::TokenBucket { burst } => {
                let interval = quota.interval();
                let room = interval.saturating_mul(burst.into());
                let debt = self.arrival().saturating_sub(nanos(now));
                let wanted = debt.saturating_add(interval.saturating_mul(cost.into()));
                let left = room.saturating_sub(debt) / interval.max(1);
                Used {
                    fits: wanted <= room,
                    left: u32::try_from(left).unwrap_or(u32::MAX),
                    wait: Duration::from_nanos(wanted.saturating_sub(room)),
                    reset: Duration::from_nanos(debt),
                }
            }
        }
    }

    fn put(&mut self, quota: &Quota, cost: u32, now: Moment) {
        match quota.algorithm {
            Algorithm::Sliding => {
                if let Some(count) = self.counts.get_mut(slot(self.newest)) {
                    *count = count.saturating_add(cost);
                }
            }
            Algorithm::Fixed => {
                if let Some(count) = self.counts.first_mut() {
                    *count = count.saturating_add(cost);
                }
            }
            Algorithm::TokenBucket { .. } => {
                let from = self.arrival().max(nanos(now));
                self.set_arrival(from.saturating_add(quota.interval().saturating_mul(cost.into())));
            }
        }
    }

    /// Brings it to `now`, and under `quota` if it was counted under another: from here on that holds. (Of a token
    /// bucket only a time is known, which says nothing to other algorithms: they begin anew.)
    pub fn adopt(&mut self, quota: &Quota, now: Moment) {
        let form = quota.form();
        if self.form == form {
            return self.advance(now);
        }
        let mut old = std::mem::replace(self, Self { counts: [0; BUCKETS], newest: form.number(now), form });
        let window = old.form.kind() == FIXED;
        if old.is_over(now) || old.form.kind() == TOKEN_BUCKET {
            return;
        }
        old.advance(now);
        for age in 0..=(BUCKETS as u32 - 1).min(old.newest) {
            let bucket = old.newest - age;
            let count = old.counts.get(if window { age as usize } else { slot(bucket) }).copied().unwrap_or(0);
            if count == 0 {
                continue;
            }
            // As if all of it came at the bucket's end: rather too late than too early.
            let end = Moment(Duration::from_millis((u64::from(bucket) + 1) * old.form.width())).min(now);
            match quota.algorithm {
                Algorithm::Sliding => {
                    let age = self.newest.saturating_sub(form.number(end));
                    self.add_aged(quota, count, age, now);
                }
                Algorithm::Fixed | Algorithm::TokenBucket { .. } => self.put(quota, count, now),
            }
        }
    }

    fn advance(&mut self, now: Moment) {
        let present = self.form.number(now);
        let passed = present.saturating_sub(self.newest);
        match self.form.kind() {
            SLIDING | FIXED if passed == 0 => return,
            SLIDING if (passed as usize) < BUCKETS => {
                for entered in self.newest + 1..=present {
                    if let Some(count) = self.counts.get_mut(slot(entered)) {
                        *count = 0;
                    }
                }
            }
            SLIDING | FIXED => self.counts = [0; BUCKETS],
            _ => return,
        }
        self.newest = present;
    }

    fn sum(&self) -> u64 {
        self.counts.iter().map(|c| u64::from(*c)).sum()
    }

    fn arrival(&self) -> u64 {
        let [low, high, ..] = self.counts;
        u64::from(high) << 32 | u64::from(low)
    }

    fn set_arrival(&mut self, nanos: u64) {
        let [low, high, ..] = &mut self.counts;
        (*low, *high) = (nanos as u32, (nanos >> 32) as u32);
    }
}

/// Where the ring keeps a bucket.
fn slot(number: u32) -> usize {
    number as usize % BUCKETS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(ms: u64) -> Moment {
        // A multiple of 1 s and 10 s.
        Moment(Duration::from_millis(2_592_000_000 + ms))
    }

    fn quota(algorithm: Algorithm, requests: u32, seconds: u64) -> Quota {
        Quota { algorithm, requests, period: Duration::from_secs(seconds) }
    }

    /// As a limit does: what it may is settled by the present quota, then it is counted.
    fn take(count: &mut Count, quota: &Quota, cost: u32, now: Moment) -> Used {
        count.adopt(quota, now);
        let used = count.used(quota, cost, now);
        if used.fits {
            count.add(quota, cost, now);
        }
        used
    }

    /// Requests by their times: when each came, and whether it passed.
    fn play(quota: &Quota, times: &[u64]) -> Vec<(u64, Used)> {
        let mut count = Count::default();
        times.iter().map(|ms| (*ms, take(&mut count, quota, 1, at(*ms)))).collect()
    }

    fn passed(played: &[(u64, Used)]) -> Vec<u64> {
        played.iter().filter(|(_, used)| used.fits).map(|(ms, _)| *ms).collect()
    }

    /// The most that passed in any window of this length; one that ends just before its length is over.
    fn most(passed: &[u64], window: u64) -> usize {
        let within = |from: &u64| passed.iter().filter(|ms| **ms >= *from && **ms < *from + window).count();
        passed.iter().map(within).max().unwrap_or(0)
    }

    proptest! {
        /// Against an exact log of every request that passed.
        #[test]
        fn sliding_is_never_over_and_never_late_by_more_than_a_bucket(
            requests in 1u32..60,
            seconds in prop::sample::select(vec![1u64, 7, 10, 60, 61]),
            gaps in prop::collection::vec(prop_oneof![4 => 0u64..50, 2 => 50u64..2_000, 1 => 2_000u64..70_000], 1..400),
        ) {
            let quota = quota(Algorithm::Sliding, requests, seconds);
            // All buckets together: the period and one more, each rounded up to whole milliseconds.
            let (period, ring) = (seconds * 1_000, quota.bucket().as_millis() as u64 * BUCKETS as u64);
            let times: Vec<u64> = gaps.iter().scan(0, |now, gap| { *now += gap; Some(*now) }).collect();
            let played = play(&quota, &times);
            let passed = passed(&played);
            prop_assert!(most(&passed, period) <= requests as usize, "{} in a window", most(&passed, period));
            for (ms, used) in &played {
                let before: Vec<u64> = passed.iter().copied().filter(|p| p < ms).collect();
                let same = passed.iter().filter(|p| *p == ms).count() as u32;
                // Whoever was refused would be refused by an exact log too, or less than a bucket ago.
                let lately = before.iter().filter(|p| **p + ring > *ms).count() as u32 + same;
                if !used.fits {
                    prop_assert!(lately >= requests, "refused at {ms} after {lately} of {requests}");
                    prop_assert!(!used.wait.is_zero() && used.wait <= Duration::from_millis(ring));
                }
            }
        }

        /// `wait` is exact: then there is room, and just before there is none.
        #[test]
        fn waiting_as_told_is_enough(
            requests in 1u32..30,
            algorithm in prop::sample::select(vec![Algorithm::Sliding, Algorithm::Fixed, Algorithm::TokenBucket { burst: 5 }]),
            gaps in prop::collection::vec(0u64..900, 1..200),
            cost in 1u32..4,
        ) {
            let quota = quota(algorithm, requests, 10);
            let mut count = Count::default();
            let mut now = 0;
            for gap in gaps {
                now += gap;
                let used = take(&mut count, &quota, cost, at(now));
                if !used.fits && cost <= quota.most() {
                    let then = Moment(at(now).0 + used.wait);
                    prop_assert!(count.used(&quota, cost, then).fits);
                    let before = Moment(then.0 - Duration::from_millis(1));
                    prop_assert!(!count.used(&quota, cost, before).fits);
                }
                let reset = count.used(&quota, 1, at(now)).reset;
                prop_assert_eq!(count.used(&quota, 1, Moment(at(now).0 + reset)).left, quota.most());
            }
        }

        /// Under another quota from one request to the next nobody gets more than the present one allows.
        #[test]
        fn a_changed_quota_holds_at_once(
            steps in prop::collection::vec((0u64..3_000, 1u32..20, prop::sample::select(vec![1u64, 10, 60])), 1..200),
        ) {
            let mut count = Count::default();
            let mut passed = Vec::new();
            let mut now = 0;
            for (gap, requests, seconds) in steps {
                now += gap;
                let quota = quota(Algorithm::Sliding, requests, seconds);
                if take(&mut count, &quota, 1, at(now)).fits {
                    passed.push(now);
                    // What an earlier, shorter period had let go is not remembered.
                    let known = passed.iter().rev().take_while(|p| **p + 1_000 > now).count();
                    prop_assert!(known <= requests as usize, "{known} within a second");
                }
            }
        }
    }

    #[test]
    fn a_longer_period_counts_from_the_first_request() {
        let mut count = Count::default();
        let (short, long) = (quota(Algorithm::Sliding, 10, 1), quota(Algorithm::Sliding, 10, 3_600));
        for _ in 0..10 {
            assert!(take(&mut count, &short, 1, at(0)).fits);
        }
        let passed = (2_000..600_000).step_by(100).filter(|ms| take(&mut count, &long, 1, at(*ms)).fits).count();
        assert_eq!(passed, 10);
        // And what comes late from under the older quota does not bring that back.
        count.add(&short, 1, at(600_000));
        assert!(!take(&mut count, &long, 1, at(700_000)).fits);
    }

    #[test]
    fn a_ring_in_detail() {
        let quota = quota(Algorithm::Sliding, 3, 9);
        let played = play(&quota, &[500, 1_500, 1_600, 1_700, 9_900, 10_000, 10_001, 11_000]);
        let said: Vec<_> = played.iter().map(|(_, u)| (u.fits, u.left, u.wait.as_millis() as u64)).collect();
        // A bucket lasts 1 s, and leaves 10 s after it began.
        assert_eq!(
            said,
            [
                (true, 3, 0),
                (true, 2, 0),
                (true, 1, 0),
                (false, 0, 8_300),
                (false, 0, 100),
                (true, 1, 0),
                (false, 0, 999),
                (true, 2, 0),
            ]
        );
    }

    #[test]
    fn token_buckets_and_fixed_windows() {
        let bucket = quota(Algorithm::TokenBucket { burst: 2 }, 10, 10);
        let played = play(&bucket, &[0, 0, 0, 999, 1_000, 1_000, 5_000, 5_000, 5_000]);
        let fits: Vec<_> = played.iter().map(|(_, u)| u.fits).collect();
        assert_eq!(fits, [true, true, false, false, true, false, true, true, false]);
        let fixed = quota(Algorithm::Fixed, 2, 10);
        let played = play(&fixed, &[9_000, 9_999, 9_999, 10_000, 10_001, 10_002]);
        let fits: Vec<_> = played.iter().map(|(_, u)| u.fits).collect();
        assert_eq!(fits, [true, true, false, true, true, false], "twice as many around the end");
        assert_eq!(played[2].1.wait, Duration::from_millis(1));
    }

    #[test]
    fn what_is_given_back_was_never_taken() {
        for algorithm in [Algorithm::Sliding, Algorithm::Fixed, Algorithm::TokenBucket { burst: 3 }] {
            let quota = quota(algorithm, 3, 10);
            let mut count = Count::default();
            for _ in 0..20 {
                assert!(take(&mut count, &quota, 1, at(0)).fits);
                count.give_back(&quota, 1, at(0), at(0));
            }
            assert_eq!(count.used(&quota, 1, at(0)).left, 3, "{algorithm:?}");
            // What was taken long ago is back already: giving it back takes nothing from what was taken since.
            take(&mut count, &quota, 1, at(0));
            for _ in 0..3 {
                take(&mut count, &quota, 1, at(20_000));
            }
            count.give_back(&quota, 1, at(0), at(20_000));
            assert_eq!(count.used(&quota, 1, at(20_000)).left, 0, "{algorithm:?}");
        }
    }

    #[test]
    fn another_algorithm_goes_on_from_what_was_counted() {
        let sliding = quota(Algorithm::Sliding, 5, 10);
        let mut count = Count::default();
        for _ in 0..4 {
            take(&mut count, &sliding, 1, at(0));
        }
        assert_eq!(count.used(&quota(Algorithm::Fixed, 5, 10), 1, at(1)).left, 1);
        assert_eq!(count.used(&quota(Algorithm::TokenBucket { burst: 5 }, 5, 10), 1, at(1)).left, 1);
        assert_eq!(count.used(&quota(Algorithm::Sliding, 5, 60), 1, at(1)).left, 1);
        assert!(!count.is_over(at(10_000)) && count.is_over(at(11_200)));
    }

    #[test]
    fn what_others_counted_ages_with_the_rest() {
        let quota = quota(Algorithm::Sliding, 100, 9);
        let mut count = Count::default();
        for (ms, cost) in [(0, 5), (1_000, 7), (9_500, 1)] {
            count.add(&quota, cost, at(ms));
        }
        assert_eq!(count.ages(&quota, at(9_500)), [1, 0, 0, 0, 0, 0, 0, 0, 7, 5]);
        let mut theirs = Count::default();
        for (age, cost) in [(0, 1), (8, 7), (9, 5), (10, 1_000)] {
            theirs.add_aged(&quota, cost, age, at(9_500));
        }
        assert_eq!([9_500, 10_000, 11_000].map(|ms| theirs.used(&quota, 1, at(ms)).left), [87, 92, 99]);
    }
}
