//! Failover as a value: which upstream next, and what a failure means. It never dials, sleeps or logs.

use std::time::Duration;

use smallvec::SmallVec;

use super::failure::{Failure, Stop};
use crate::regions::health::Standing;
use crate::regions::steering::{Candidate, Order};
use crate::regions::{Region, RegionId, Upstream};
use crate::request::Moment;
use crate::routes::{Patience, Retry, Timeouts};

/// At most this many attempts go to one region while another candidate is left.
const PER_REGION: usize = 2;

/// Traffic takes turns and trials; `explain` only looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Traffic.
    Commit,
    /// `explain`.
    Peek,
}

/// A request's attempts, past and to come, under one deadline.
#[derive(Debug)]
pub struct Plan {
    /// Candidate regions in order.
    pub order: Order,
    /// When `timeouts.total` is over.
    pub deadline: Moment,
    /// Attempts so far, in order.
    pub tries: SmallVec<[Try; 4]>,
    /// Why it ended, once a failure was final.
    pub stopped: Option<Stop>,
    /// Which of first byte and idle bounds the wait for the upstream.
    pub patience: Patience,
    timeouts: Timeouts,
    max_tries: usize,
    may_repeat: bool,
    mode: Mode,
}

/// One attempt as it is remembered.
#[derive(Debug, Clone)]
pub struct Try {
    /// The region.
    pub region: RegionId,
    /// The upstream, by position in the region.
    pub upstream: u16,
    /// When it began.
    pub started: Moment,
    /// When it ended, as far as the choice of an upstream goes: with a response header or a failure.
    pub ended: Moment,
    /// How it ended.
    pub outcome: Outcome,
    /// Its time to connect was cut by the deadline of the whole request.
    connect_cut: bool,
    /// Its time to answer was.
    answer_cut: bool,
    /// It is the one trial of an ejected upstream.
    trial: bool,
    /// It failed on a pooled connection that the upstream had already closed.
    stale: bool,
    /// It was answered well; its upstream is told so at the end of the body.
    well: bool,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is under way, or its client left.
    Pending,
    /// A response header came and was passed on.
    Answered(u16),
    /// It failed.
    Failed(Failure),
    /// It answered, but broke off inside the body.
    Truncated(u16),
}

impl Outcome {
    /// The label in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Pending => "abandoned",
            Self::Answered(_) => "ok",
            Self::Failed(failure) => failure.label(),
            Self::Truncated(_) => "truncated",
        }
    }

    /// What went wrong, if something did before the response.
    pub fn failure(self) -> Option<Failure> {
        match self {
            Self::Failed(failure) => Some(failure),
            Self::Pending | Self::Answered(_) | Self::Truncated(_) => None,
        }
    }

    /// The status of the response, if there was one.
    pub fn status(self) -> Option<u16> {
        match self {
            Self::Answered(status) | Self::Truncated(status) | Self::Failed(Failure::Status(status)) => Some(status),
            Self::Pending | Self::Failed(_) => None,
        }
    }
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// The region.
    pub region: RegionId,
    /// The upstream, by position in the region.
    pub upstream: u16,
    /// For TCP and TLS.
    pub connect: Duration,
    /// For silence of the upstream, before the header and inside the body.
    pub silence: Duration,
    /// For the header alone, where that differs: the rest of `timeouts.total`.
    pub header: Option<Duration>,
}

/// Why there is no next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exhausted(pub Stop);

/// What is known of a failed attempt's request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// More of the body was sent than can be sent again.
    pub body_lost: bool,
    /// The connection came from the pool.
    pub reused: bool,
    /// The client was still sending its body.
    pub body_incomplete: bool,
}

/// What a failure means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Ask [`Plan::next`] again.
    Again,
    /// This was the last attempt.
    Final(Stop),
}

impl Plan {
    /// A plan with nothing tried yet. `may_repeat`: the method is idempotent, or the route says it may be repeated.
    pub fn new(
        order: Order,
        timeouts: Timeouts,
        retry: &Retry,
        may_repeat: bool,
        patience: Patience,
        now: Moment,
        mode: Mode,
    ) -> Self {
        let max_tries = retry.attempts.map_or(order.len() + 1, usize::from);
        Self {
            order,
            deadline: now.after(timeouts.total),
            tries: SmallVec::new(),
            stopped: None,
            patience,
            timeouts,
            max_tries,
            may_repeat,
            mode,
        }
    }

    /// The next attempt, remembered as begun at `now`.
    pub fn next(&mut self, regions: &[Region], now: Moment) -> Result<Attempt, Exhausted> {
        self.stopped = None;
        let attempt = self.start(regions, now);
        if let Err(Exhausted(stop)) = attempt {
            self.stopped = Some(stop);
        }
        attempt
    }

    fn start(&mut self, regions: &[Region], now: Moment) -> Result<Attempt, Exhausted> {
        if self.spent() >= self.max_tries {
            return Err(Exhausted(Stop::Attempts));
        }
        let left = self.deadline.since(now);
        if left.is_zero() {
            return Err(Exhausted(Stop::Deadline));
        }
        let choice = self.take(regions, now).ok_or(Exhausted(Stop::NoCandidate))?;
        let (silence, header) = match self.patience {
            Patience::FirstByte => (self.timeouts.first_byte.min(left), None),
            Patience::Idle => (self.timeouts.idle, Some(left)),
        };
        self.tries.push(Try {
            region: choice.region,
            upstream: choice.upstream,
            started: now,
            ended: now,
            outcome: Outcome::Pending,
            connect_cut: left <= self.timeouts.connect,
            answer_cut: left <= silence,
            trial: choice.trial,
            stale: false,
            well: false,
        });
        Ok(Attempt {
            region: choice.region,
            upstream: choice.upstream,
            connect: self.timeouts.connect.min(left),
            silence,
            header,
        })
    }

    /// A response header came: is this status passed on, or given up for another attempt? It must be
    /// asked before giving one up, for a given-up response is lost.
    pub fn answered(&mut self, regions: &[Region], retry: &Retry, status: u16, sent: Sent, now: Moment) -> Verdict {
        if retry.statuses.contains(&status) {
            let failure = Failure::Status(status);
            let verdict = self.verdict(regions, failure, sent, now);
            let outcome = match verdict {
                Verdict::Again => Outcome::Failed(failure),
                Verdict::Final(stop) => {
                    self.stopped = Some(stop);
                    Outcome::Answered(status)
                }
            };
            // A route may move on from a 404 as well, but that is no sign of ill health.
            self.finish(regions, outcome, (status >= 500).then_some(false), now);
            return verdict;
        }
        // An upstream that comes back is told at once; otherwise the body's end decides.
        let on_trial = self.tries.last().is_some_and(|t| t.trial);
        self.finish(regions, Outcome::Answered(status), on_trial.then_some(true), now);
        if let Some(last) = self.tries.last_mut() {
            last.well = true;
        }
        Verdict::Final(Stop::NoCandidate)
    }

    /// The attempt failed without a response.
    pub fn failed(&mut self, regions: &[Region], failure: Failure, sent: Sent, now: Moment) -> Verdict {
        // An upstream may close an idle connection while we send on it; that is no sign of ill health, once.
        let stale = failure == Failure::Closed && sent.reused && self.tries.iter().all(|t| !t.stale);
        // Nor is a timeout while the client itself was slow to send, or one that the deadline made short.
        let slow_client = failure == Failure::FirstByteTimeout && sent.body_incomplete;
        let cut = self.tries.last().is_some_and(|t| cut(t, failure));
        if let Some(last) = self.tries.last_mut() {
            last.stale = stale;
        }
        let innocent = stale || slow_client || cut;
        self.finish(regions, Outcome::Failed(failure), (!innocent).then_some(false), now);
        let verdict = self.verdict(regions, failure, sent, now);
        if let Verdict::Final(stop) = verdict {
            self.stopped = Some(stop);
        }
        verdict
    }

    /// The body that the client already sees broke off; `blame` is for the upstream, not for silence that
    /// is natural.
    pub fn truncated(&mut self, regions: &[Region], status: u16, blame: bool, now: Moment) {
        let ended = self.tries.last().map(|t| t.ended);
        self.finish(regions, Outcome::Truncated(status), blame.then_some(false), now);
        if let (Some(last), Some(ended)) = (self.tries.last_mut(), ended) {
            last.ended = ended;
            last.well = false;
        }
    }

    /// The request is over: an upstream that answered well is told so, and a trial without a verdict is
    /// given back.
    pub fn close(&mut self, regions: &[Region], now: Moment) {
        let Some(last) = self.tries.last() else { return };
        match last.outcome {
            Outcome::Pending => self.finish(regions, Outcome::Pending, None, now),
            Outcome::Answered(_) if last.well && self.mode == Mode::Commit => {
                if let Some(upstream) = upstream(regions, last.region, last.upstream) {
                    upstream.state.health.success(now);
                }
            }
            Outcome::Answered(_) | Outcome::Failed(_) | Outcome::Truncated(_) => {}
        }
    }

    /// Tries that count: one more is free where a pooled connection was closed under us.
    fn spent(&self) -> usize {
        self.tries.iter().filter(|t| !t.stale).count()
    }

    /// All tries, the first included.
    pub fn max_tries(&self) -> usize {
        self.max_tries
    }

    /// For `explain`: the attempt under way gets an answer, whatever it would be.
    pub fn assume_answered(&mut self, now: Moment) {
        self.finish(&[], Outcome::Answered(200), None, now);
    }

    /// The status of a response that was given up, if there was one.
    pub fn given_up(&self) -> Option<u16> {
        self.tries.iter().rev().find_map(|t| match t.outcome {
            Outcome::Failed(Failure::Status(status)) => Some(status),
            Outcome::Pending | Outcome::Answered(_) | Outcome::Failed(_) | Outcome::Truncated(_) => None,
        })
    }

    /// The failure of the last attempt that failed.
    pub fn last_failure(&self) -> Option<Failure> {
        self.tries.iter().rev().find_map(|t| t.outcome.failure())
    }

    /// When the first of the candidates may be worth asking again; at least a second.
    pub fn retry_after(&self, regions: &[Region], now: Moment) -> Duration {
        let ends = self.candidates(regions).flat_map(|(_, region)| region.upstreams.iter()).map(|u| {
            match u.state.health.standing(now) {
                Standing::Ejected { until } => until.since(now),
                Standing::Usable | Standing::TrialDue => Duration::ZERO,
            }
        });
        ends.min().unwrap_or_default().max(Duration::from_secs(1))
    }

    fn finish(&mut self, regions: &[Region], outcome: Outcome, healthy: Option<bool>, now: Moment) {
        let Some(last) = self.tries.last_mut() else { return };
        last.outcome = outcome;
        last.ended = now;
        if self.mode == Mode::Peek {
            return;
        }
        let Some(health) = upstream(regions, last.region, last.upstream).map(|u| &u.state.health) else { return };
        match healthy {
            Some(true) => health.success(now),
            Some(false) => {
                health.failure(now);
            }
            None if last.trial => health.trial_abandoned(),
            None => {}
        }
    }

    fn verdict(&self, regions: &[Region], failure: Failure, sent: Sent, now: Moment) -> Verdict {
        let out_of_time = self.deadline.since(now).is_zero() || self.tries.last().is_some_and(|t| cut(t, failure));
        let stop = if out_of_time {
            Some(Stop::Deadline)
        } else if !failure.nothing_was_sent() && !self.may_repeat {
            Some(Stop::NotIdempotent)
        } else if !failure.nothing_was_sent() && sent.body_lost {
            Some(Stop::BodyTooLarge)
        } else if self.spent() >= self.max_tries {
            Some(Stop::Attempts)
        } else if self.choose(regions, now, !matches!(failure, Failure::Status(_))).is_none() {
            Some(Stop::NoCandidate)
        } else {
            None
        };
        stop.map_or(Verdict::Again, Verdict::Final)
    }

    /// Chooses, and takes the turn and the trial that the choice stands for.
    fn take(&self, regions: &[Region], now: Moment) -> Option<Choice> {
        let mut choice = self.choose(regions, now, true)?;
        if self.mode == Mode::Peek {
            return Some(choice);
        }
        while let Some(upstream) = upstream(regions, choice.region, choice.upstream)
            && choice.trial
            && !upstream.state.health.claim_trial(now)
        {
            // Another request was faster, so the upstream now counts as ejected: the loop ends.
            choice = self.choose(regions, now, true)?;
        }
        if let Some(region) = regions.get(usize::from(choice.region.0)) {
            region.turn();
        }
        Some(choice)
    }

    /// The best upstream to try now. Its rank is a tuple, and the least wins: in what shape it is, then
    /// whether its region had its share, then the region's place, then the turn inside the region.
    ///
    /// `last_resort` admits upstreams that are ejected or broke a connection of this very request: if
    /// nothing else is left, trying beats giving up, unless a real response would be given up for it.
    fn choose(&self, regions: &[Region], now: Moment, last_resort: bool) -> Option<Choice> {
        if let Some(choice) = self.stale_again(regions) {
            return Some(choice);
        }
        let mut best: Option<(Rank, Choice)> = None;
        for (place, (id, region)) in self.candidates(regions).enumerate() {
            let share_used = self.tries.iter().filter(|t| t.region == id).count() >= PER_REGION;
            // A turn is only taken in the region that is chosen.
            for (position, upstream) in region.from_turn(region.peek_turn()) {
                let Some((shape, trial)) = self.shape(id, position, upstream, now) else { continue };
                let rank = Rank { shape, share_used, place };
                if (shape > Shape::Usable && !last_resort) || best.as_ref().is_some_and(|(least, _)| *least <= rank) {
                    continue;
                }
                best = Some((rank, Choice { region: id, upstream: position, trial }));
                if shape == Shape::Usable {
                    break;
                }
            }
            // Regions come in the order of `place`, so nothing later beats a usable one.
            if best.as_ref().is_some_and(|(rank, _)| rank.shape == Shape::Usable && !rank.share_used) {
                break;
            }
        }
        let (_, choice) = best?;
        Some(choice)
    }

    /// In what shape an upstream is for this request, and whether choosing it is a trial; `None` if it
    /// is out of the question.
    fn shape(&self, id: RegionId, position: u16, upstream: &Upstream, now: Moment) -> Option<(Shape, bool)> {
        let earlier = || self.tries.iter().filter(|t| t.region == id && t.upstream == position && !t.stale);
        let count = earlier().count();
        if count > 0 {
            let all = |of: fn(Failure) -> bool| earlier().all(|t| t.outcome.failure().is_some_and(of));
            // A name may have several addresses, and each of them is worth a connection.
            if all(Failure::nothing_was_sent) && count < upstream.state.addresses().len() {
                return Some((Shape::Usable, false));
            }
            return all(Failure::may_be_a_blip).then_some((Shape::BrokeBefore, false));
        }
        Some(match upstream.state.health.standing(now) {
            _ if !upstream.state.is_resolved() => (Shape::Ejected, false),
            Standing::Usable => (Shape::Usable, false),
            Standing::TrialDue => (Shape::Usable, true),
            Standing::Ejected { until: _ } => (Shape::Ejected, false),
        })
    }

    /// After a pooled connection turned out to be closed, the same upstream again, once.
    fn stale_again(&self, regions: &[Region]) -> Option<Choice> {
        let last = self.tries.last().filter(|t| t.stale)?;
        upstream(regions, last.region, last.upstream)?;
        Some(Choice { region: last.region, upstream: last.upstream, trial: false })
    }

    /// The candidates that exist.
    pub fn candidates<'a>(&self, regions: &'a [Region]) -> impl Iterator<Item = (RegionId, &'a Region)> {
        self.order.iter().filter_map(|Candidate { region, why: _ }| Some((*region, regions.get(usize::from(region.0))?)))
    }
}

/// Did the deadline of the whole request end this attempt, rather than the attempt's own time?
fn cut(attempt: &Try, failure: Failure) -> bool {
    match failure {
        Failure::ConnectTimeout => attempt.connect_cut,
        Failure::FirstByteTimeout => attempt.answer_cut,
        Failure::Unresolved
        | Failure::ConnectRefused
        | Failure::ConnectFailed
        | Failure::Tls
        | Failure::Closed
        | Failure::Invalid
        | Failure::Status(_) => false,
    }
}

/// An upstream by region and position.
pub fn upstream(regions: &[Region], region: RegionId, position: u16) -> Option<&Upstream> {
    regions.get(usize::from(region.0))?.upstreams.get(usize::from(position))
}

/// The order of these is the order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Shape {
    Usable,
    Ejected,
    BrokeBefore,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    shape: Shape,
    share_used: bool,
    place: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Choice {
    region: RegionId,
    upstream: u16,
    trial: bool,
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::regions::health::UpstreamState;
    use crate::regions::steering::Why;

    /// Regions of these many upstreams.
    fn regions(sizes: &[usize]) -> Vec<Region> {
        let upstream = |region: usize, i: usize| {
            let url: crate::config::units::UpstreamUrl = format!("http://127.0.{region}.{i}:80").parse().unwrap();
            let state = Arc::new(UpstreamState::new(url.clone()));
            Upstream { url, weight: 1, host: None, tls: None, pool: 0, state }
        };
        let region = |(r, size): (usize, &usize)| Region::new("r".into(), (0..*size).map(|i| upstream(r, i)).collect());
        sizes.iter().enumerate().map(region).collect()
    }

    fn plan(regions: &[Region], attempts: Option<u8>, may_repeat: bool) -> Plan {
        let order = (0..regions.len()).map(|i| Candidate { region: RegionId(i as u16), why: Why::Default }).collect();
        let second = Duration::from_secs(1);
        let timeouts = Timeouts { connect: second, first_byte: second * 5, idle: second * 60, total: second * 30 };
        let retry = Retry { attempts, statuses: [502, 503].into_iter().collect(), non_idempotent: false };
        Plan::new(order, timeouts, &retry, may_repeat, Patience::FirstByte, Moment::default(), Mode::Commit)
    }

    fn at(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    #[test]
    fn each_attempt_is_cut_to_what_is_left() {
        let regions = regions(&[1, 1, 1]);
        let mut plan = plan(&regions, Some(5), true);
        let first = plan.next(&regions, at(0)).unwrap();
        assert_eq!((first.connect, first.silence), (Duration::from_secs(1), Duration::from_secs(5)));
        assert_eq!(plan.failed(&regions, Failure::FirstByteTimeout, Sent::default(), at(5_000)), Verdict::Again);
        let second = plan.next(&regions, at(27_000)).unwrap();
        assert_eq!((second.connect, second.silence), (Duration::from_secs(1), Duration::from_secs(3)));
        assert_eq!(plan.failed(&regions, Failure::FirstByteTimeout, Sent::default(), at(29_990)), Verdict::Final(Stop::Deadline));
        assert_eq!(plan.next(&regions, at(30_000)), Err(Exhausted(Stop::Deadline)));
    }

    #[test]
    fn a_stale_connection_is_free_once() {
        let regions = regions(&[1, 1]);
        let mut plan = plan(&regions, Some(1), true);
        let stale = Sent { reused: true, ..Sent::default() };
        plan.next(&regions, at(0)).unwrap();
        assert_eq!(plan.failed(&regions, Failure::Closed, stale, at(0)), Verdict::Again);
        assert_eq!(plan.next(&regions, at(0)).unwrap().region, RegionId(0), "the same upstream again");
        assert_eq!(plan.failed(&regions, Failure::Closed, stale, at(0)), Verdict::Final(Stop::Attempts));
        let health = &regions[0].upstreams[0].state.health;
        assert_eq!(health.counts().0, 1, "only the second counts against it");
    }

    #[test]
    fn a_real_response_is_not_given_up_for_an_ejected_region() {
        let regions = regions(&[1, 1]);
        for _ in 0..3 {
            regions[1].upstreams[0].state.health.failure(at(1));
        }
        let mut plan = plan(&regions, None, true);
        plan.next(&regions, at(10)).unwrap();
        let retry = Retry { attempts: None, statuses: [503].into_iter().collect(), non_idempotent: false };
        assert_eq!(plan.answered(&regions, &retry, 503, Sent::default(), at(10)), Verdict::Final(Stop::NoCandidate));
        // Without a response there is nothing to lose.
        let mut plan = super::tests::plan(&regions, None, true);
        plan.next(&regions, at(10)).unwrap();
        assert_eq!(plan.failed(&regions, Failure::Closed, Sent::default(), at(10)), Verdict::Again);
        assert_eq!(plan.next(&regions, at(10)).unwrap().region, RegionId(1));
    }

    proptest! {
        /// Whatever goes wrong, in whatever order.
        #[test]
        fn plans_end_and_keep_their_promises(
            sizes in prop::collection::vec(1usize..4, 1..5),
            attempts in prop::option::of(1u8..8),
            may_repeat: bool,
            faults in prop::collection::vec((0usize..Failure::ALL.len(), any::<bool>(), any::<bool>(), 0u64..8_000), 20),
        ) {
            let regions = regions(&sizes);
            let mut plan = plan(&regions, attempts, may_repeat);
            let limit = attempts.map_or(sizes.len() + 1, usize::from);
            let mut now = at(0);
            let mut sent = 0;
            for (kind, reused, body_lost, passed) in faults {
                if plan.next(&regions, now).is_err() {
                    break;
                }
                let failure = Failure::ALL[kind];
                sent += usize::from(!failure.nothing_was_sent());
                now = now.after(Duration::from_millis(passed));
                let verdict = plan.failed(&regions, failure, Sent { body_lost, reused, body_incomplete: false }, now);
                if !failure.nothing_was_sent() && (body_lost || !may_repeat) {
                    prop_assert!(matches!(verdict, Verdict::Final(_)), "{failure:?}");
                }
                if matches!(verdict, Verdict::Final(_)) {
                    break;
                }
            }
            prop_assert!(plan.spent() <= limit && plan.tries.len() <= limit + 1);
            prop_assert!(may_repeat || sent <= 1, "sent {sent} times");
            for (i, t) in plan.tries.iter().enumerate() {
                let before = &plan.tries[..i];
                let others_left = (0..regions.len() as u16).any(|r| before.iter().all(|b| b.region.0 != r) && t.region.0 != r);
                let here = before.iter().filter(|b| b.region == t.region && !b.stale).count();
                prop_assert!(here < 2 || !others_left, "a third attempt while a region is left");
            }
        }
    }
}
