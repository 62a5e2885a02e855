//! Failover as a value: which upstream next, and what a failure means. It never dials, sleeps or logs.

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::attempt::{Attempt, Exhausted, Outcome, Sent, Try, Verdict, cut};
use super::choice::{Choice, Shape, others_usable};
use super::failure::{Failure, Stop};
use super::replay::{Failed, Fallback, MAX_REPLAYS, Replay};
use crate::overload::Share;
use crate::regions::balance::Balance;
use crate::regions::endpoint::{Endpoint, Slot, Standing};
use crate::regions::steering::{Candidate, Order, Steering, Why};
use crate::regions::{Region, RegionId, Upstream};
use crate::request::{Moment, mix, unit};
use crate::routes::{Patience, Retry, Timeouts};

/// At most this many attempts go to one region while another candidate is left.
pub(super) const PER_REGION: usize = 2;
/// Attempts of one request, replays and all.
pub const MAX_TRIES: usize = 30;
/// Before the same upstream is tried again: exponential backoff from here, with full jitter (Brooker, AWS, 2015).
const BACKOFF: Duration = Duration::from_millis(25);
/// And never longer than this.
const LONGEST_BACKOFF: Duration = Duration::from_millis(250);

/// Traffic takes turns and trials; `explain` only looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Traffic.
    Commit,
    /// `explain`.
    Peek,
}

/// What a plan is played against.
#[derive(Debug, Clone, Copy)]
pub struct Backends<'a> {
    /// The regions of the snapshot.
    pub regions: &'a [Region],
    /// What the route says of retries.
    pub retry: &'a Retry,
}

/// How a plan begins.
#[derive(Debug)]
pub struct Start {
    /// Candidate regions in order.
    pub order: Order,
    /// The region that steering put first, and why the order begins with another.
    pub moved: Option<(RegionId, Moved)>,
    /// The endpoint that the client's cookie names, by its id.
    pub pin: Option<u64>,
    /// Hashes for regions that balance by one.
    pub keys: SmallVec<[(RegionId, u64); 2]>,
    /// The method is idempotent, or the route says that it may be repeated.
    pub may_repeat: bool,
    /// Which of first byte and idle bounds the wait for the upstream.
    pub patience: Patience,
    /// Its time to first byte tells something of the upstream.
    pub measures: bool,
    /// The part of bounds that such requests may fill.
    pub share: Share,
    /// A random number.
    pub chance: u64,
    /// Traffic or `explain`.
    pub mode: Mode,
}

/// Why a request begins in another region than steering put first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// A part of its upstreams is out, so a part of the requests moves.
    Spill,
    /// It just came back, and has enough requests at once for now.
    SlowStart,
    /// An operator evacuates or drains it.
    Away,
    /// None of its upstreams is usable.
    Ejected,
}

impl Moved {
    /// The label in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Spill => "spill",
            Self::SlowStart => "slow_start",
            Self::Away => "away",
            Self::Ejected => "ejected",
        }
    }
}

/// A request's attempts, past and to come, under one deadline.
#[derive(Debug)]
pub struct Plan {
    /// Candidate regions in order.
    pub order: Order,
    /// The region that steering put first, and why the order begins with another.
    pub moved: Option<(RegionId, Moved)>,
    /// When `timeouts.total` is over.
    pub deadline: Moment,
    /// Attempts so far, in order.
    pub tries: SmallVec<[Try; 4]>,
    /// Why it ended, once a failure was final.
    pub stopped: Option<Stop>,
    /// Which of first byte and idle bounds the wait for the upstream.
    pub patience: Patience,
    /// Nothing was usable, so something was tried all the same.
    pub panic: bool,
    /// The replays that upstreams asked for.
    pub replays: Option<Box<Replays>>,
    pub(super) pin: Option<u64>,
    /// No other endpoint will do.
    pub(super) pinned_only: bool,
    pub(super) keys: SmallVec<[(RegionId, u64); 2]>,
    /// Attempts before a replay do not count.
    pub(super) counts_from: usize,
    /// The part of bounds that such requests may fill.
    pub share: Share,
    pub(super) chance: u64,
    pub(super) mode: Mode,
    measures: bool,
    timeouts: Timeouts,
    attempts: Option<u8>,
    may_repeat: bool,
    /// The place that the attempt under way takes.
    slot: Option<Slot>,
    /// The upstream said in `Retry-After` when to ask again.
    asked_to_wait: Option<Duration>,
}

/// The replays of one request.
#[derive(Debug, Default)]
pub struct Replays {
    /// How often an upstream asked for one, with the region of each.
    pub by: SmallVec<[RegionId; 4]>,
    /// When the present one began, and what it asked for.
    pub began: Moment,
    /// What it asked for.
    pub replay: Replay,
    /// Who asked for it.
    pub source: Option<(RegionId, u16)>,
    /// It fell back to who asked for it, and why.
    pub failed: Option<Failed>,
    /// Why it cannot be done.
    pub refused: Option<&'static str>,
    source_endpoint: Option<u64>,
}

impl Plan {
    /// A plan with nothing tried yet.
    pub fn new(start: Start, timeouts: Timeouts, retry: &Retry, now: Moment) -> Self {
        let Start { order, moved, pin, keys, may_repeat, patience, measures, share, chance, mode } = start;
        if mode == Mode::Commit {
            retry.budget.request(now);
        }
        Self {
            order,
            moved,
            deadline: now.after(timeouts.total),
            tries: SmallVec::new(),
            stopped: None,
            patience,
            panic: false,
            replays: None,
            pin,
            pinned_only: false,
            keys,
            counts_from: 0,
            share,
            chance,
            mode,
            measures,
            timeouts,
            attempts: retry.attempts,
            may_repeat,
            slot: None,
            asked_to_wait: None,
        }
    }

    /// The next attempt, remembered as begun at `now`.
    pub fn next(&mut self, backends: Backends<'_>, now: Moment) -> Result<Attempt, Exhausted> {
        self.stopped = None;
        self.slot = None;
        let mut attempt = self.start(backends, now);
        if let Err(Exhausted(stop)) = attempt
            && self.fall_back(stop, now)
        {
            attempt = self.start(backends, now);
        }
        if let Err(Exhausted(stop)) = attempt {
            self.stopped = Some(stop);
        }
        attempt
    }

    fn start(&mut self, backends: Backends<'_>, now: Moment) -> Result<Attempt, Exhausted> {
        if self.spent() >= self.max_tries() || self.tries.len() >= MAX_TRIES {
            return Err(Exhausted(Stop::Attempts));
        }
        let left = self.until().since(now);
        if left.is_zero() {
            return Err(Exhausted(Stop::Deadline));
        }
        let again = self.spent() > 0 && !self.tries.last().is_some_and(|t| t.stale);
        if again
            && !self.choose(backends.regions, now, true).map_err(Exhausted)?.is_in_budget(self.failure(), backends.retry, now)
        {
            return Err(Exhausted(Stop::Budget));
        }
        let choice = self.take(backends, now).map_err(Exhausted)?;
        if again && self.mode == Mode::Commit {
            backends.retry.budget.retry(now);
        }
        self.panic |= self.tries.is_empty() && choice.shape >= Shape::Away;
        let Choice { region, upstream, endpoint, trial, shape: _ } = choice;
        let delay = self.backoff(endpoint.as_ref()).min(left);
        let same = |t: &Try| t.endpoint.as_ref().zip(endpoint.as_ref()).is_some_and(|(a, b)| Arc::ptr_eq(a, b));
        let fresh = self.counted().iter().any(same);
        let (silence, header) = match self.patience {
            Patience::FirstByte => (self.timeouts.first_byte.min(left), None),
            Patience::Idle => (self.timeouts.idle, Some(left)),
        };
        self.tries.push(Try {
            region,
            upstream,
            endpoint: endpoint.clone(),
            // The pause is not the upstream's.
            started: now.after(delay),
            ended: now.after(delay),
            outcome: Outcome::Pending,
            connect_cut: left <= self.timeouts.connect,
            answer_cut: left <= silence,
            trial,
            stale: false,
            well: false,
        });
        Ok(Attempt { region, upstream, endpoint, fresh, delay, connect: self.timeouts.connect.min(left), silence, header })
    }

    /// Chooses, and takes the turn, the trial and the place that the choice stands for.
    fn take(&mut self, backends: Backends<'_>, now: Moment) -> Result<Choice, Stop> {
        let mut choice = self.choose(backends.regions, now, true)?;
        if self.mode == Mode::Peek {
            return Ok(choice);
        }
        // Another request may be faster at each of these; what it took counts in the next round.
        for _ in 0..4 {
            let Some(region) = backends.regions.get(usize::from(choice.region.0)) else { break };
            let limit = region.upstreams.get(usize::from(choice.upstream)).and_then(|u| u.limits.shared(self.share).hard);
            let Some(endpoint) = &choice.endpoint else { break };
            let claimed = !choice.trial || endpoint.health.claim_trial(now);
            if claimed {
                self.slot = Slot::take(endpoint, limit, &region.state, region.bounds(self.share).hard);
                if self.slot.is_some() {
                    if region.balance == Balance::RoundRobin {
                        region.state.turn();
                    }
                    return Ok(choice);
                }
                if choice.trial {
                    endpoint.health.trial_abandoned();
                }
            }
            choice = self.choose(backends.regions, now, true)?;
        }
        match choice.endpoint.is_none() {
            true => Ok(choice),
            false => Err(Stop::Busy),
        }
    }

    /// Time to wait before `endpoint`, which is none unless it was tried before.
    fn backoff(&self, endpoint: Option<&Arc<Endpoint>>) -> Duration {
        let same = |t: &&Try| !t.stale && t.endpoint.as_ref().zip(endpoint).is_some_and(|(a, b)| Arc::ptr_eq(a, b));
        let before = self.counted().iter().filter(same).count();
        let Some(doublings) = before.checked_sub(1) else { return Duration::ZERO };
        let most = BACKOFF.saturating_mul(1 << doublings.min(8)).min(LONGEST_BACKOFF);
        most.mul_f32(unit(mix(self.chance ^ self.tries.len() as u64)))
    }

    /// A response header came: is this status passed on, or given up for another attempt? It must be
    /// asked before giving one up, for a given-up response is lost. `retry_after`: it says when to ask again.
    pub fn answered(
        &mut self,
        backends: Backends<'_>,
        status: u16,
        retry_after: Option<Duration>,
        sent: Sent,
        now: Moment,
    ) -> Verdict {
        let first_byte = self.tries.last().map(|t| now.since(t.started));
        if status == 503
            && let Some((wait, endpoint)) = retry_after.zip(self.endpoint())
            && self.mode == Mode::Commit
        {
            endpoint.rest(wait, now);
        }
        if backends.retry.statuses.contains(&status) {
            let failure = Failure::Status(status);
            let verdict = self.verdict(backends, failure, sent, now);
            let outcome = match verdict {
                Verdict::Again => {
                    self.asked_to_wait = self.asked_to_wait.max(retry_after);
                    Outcome::Failed(failure)
                }
                Verdict::Final(stop) => {
                    self.stopped = Some(stop);
                    Outcome::Answered(status)
                }
            };
            // A route may move on from a 404 as well, but that is no sign of ill health.
            self.finish(backends.regions, outcome, (status >= 500).then_some(false), now);
            return verdict;
        }
        if self.measures
            && self.mode == Mode::Commit
            && let Some((took, endpoint)) = first_byte.zip(self.endpoint())
        {
            endpoint.measured(took, now);
            // Errors may be quick, and say nothing of how much is too much.
            if status < 500 {
                self.learn(backends.regions, now);
            }
        }
        // An upstream that comes back is told at once; otherwise the body's end decides.
        let on_trial = self.tries.last().is_some_and(|t| t.trial);
        self.finish(backends.regions, Outcome::Answered(status), on_trial.then_some(true), now);
        if let Some(last) = self.tries.last_mut() {
            last.well = true;
        }
        Verdict::Final(Stop::NoCandidate)
    }

    /// The attempt failed without a response.
    pub fn failed(&mut self, backends: Backends<'_>, failure: Failure, sent: Sent, now: Moment) -> Verdict {
        self.slot = None;
        // An upstream may close an idle connection while we send on it; that is no sign of ill health, once.
        let stale = failure == Failure::Closed && sent.reused && self.tries.iter().all(|t| !t.stale);
        // Nor is a timeout while the client itself was slow to send, or one that the deadline made short.
        let slow_client = failure == Failure::FirstByteTimeout && sent.body_incomplete;
        let cut = self.tries.last().is_some_and(|t| cut(t, failure));
        if let Some(last) = self.tries.last_mut() {
            last.stale = stale;
        }
        let innocent = stale || slow_client || cut;
        if failure.is_timeout() && !innocent && self.measures {
            self.learn(backends.regions, now);
        }
        self.finish(backends.regions, Outcome::Failed(failure), (!innocent).then_some(false), now);
        let verdict = self.verdict(backends, failure, sent, now);
        if let Verdict::Final(stop) = verdict {
            self.stopped = Some(stop);
        }
        verdict
    }

    /// The body that the client already sees broke off; `blame` is for the upstream, not for silence that
    /// is natural: such a body is over.
    pub fn truncated(&mut self, regions: &[Region], status: u16, blame: bool, now: Moment) {
        let ended = self.tries.last().map(|t| t.ended);
        let outcome = if blame { Outcome::Truncated(status) } else { Outcome::Answered(status) };
        self.finish(regions, outcome, blame.then_some(false), now);
        if let (Some(last), Some(ended)) = (self.tries.last_mut(), ended) {
            last.ended = ended;
            last.well = false;
        }
    }

    /// The upstream asks for the request to be sent elsewhere. Afterwards [`Plan::next`] says where to, unless
    /// it cannot be done; then [`Replays::refused`] says why.
    pub fn replay(
        &mut self,
        backends: Backends<'_>,
        steering: &Steering,
        replay: Result<Replay, &'static str>,
        status: u16,
        sent: Sent,
        now: Moment,
    ) -> Verdict {
        let Some((source, endpoint)) = self.tries.last().map(|t| ((t.region, t.upstream), t.endpoint.clone())) else {
            return Verdict::Final(Stop::Replay);
        };
        self.finish(backends.regions, Outcome::Replayed(status), Some(true), now);
        let mut replays = self.replays.take().unwrap_or_default();
        let order = replay.and_then(|replay| {
            let order = self.replay_order(&replays, &replay, steering, source.0, sent)?;
            Ok((replay, order))
        });
        let verdict = match order {
            Ok((replay, order)) => {
                replays.by.push(source.0);
                replays.began = now;
                replays.source = Some(source);
                replays.source_endpoint = endpoint.map(|e| e.id);
                replays.replay = replay;
                self.order = order;
                self.pin = None;
                self.counts_from = self.tries.len();
                Verdict::Again
            }
            Err(refused) => {
                replays.refused = Some(refused);
                self.stopped = Some(Stop::Replay);
                Verdict::Final(Stop::Replay)
            }
        };
        self.replays = Some(replays);
        verdict
    }

    fn replay_order(
        &self,
        before: &Replays,
        replay: &Replay,
        steering: &Steering,
        source: RegionId,
        sent: Sent,
    ) -> Result<Order, &'static str> {
        if sent.body_lost {
            return Err("the request's body is too large to be sent again (64 KiB)");
        }
        if before.failed.is_some() {
            return Err("a request that fell back cannot be replayed again");
        }
        if before.by.len() >= MAX_REPLAYS {
            return Err("the request was replayed three times already");
        }
        let wanted: Order = match replay.regions.is_empty() {
            false => replay.regions.iter().map(|region| Candidate { region: *region, why: Why::Replay }).collect(),
            true => {
                let reach = steering.reach().map(|region| Candidate { region, why: Why::Replay });
                self.order.iter().copied().chain(reach).collect()
            }
        };
        let mut order = Order::new();
        for candidate in wanted {
            let own = replay.elsewhere && candidate.region == source;
            let looped = before.by.contains(&candidate.region);
            let known = order.iter().any(|c: &Candidate| c.region == candidate.region);
            if steering.allows(candidate.region) && !own && !looped && !known {
                order.push(candidate);
            }
        }
        match order.is_empty() {
            true => Err("the replay leads to no region, or back to one that asked for it"),
            false => Ok(order),
        }
    }

    /// Nobody took a replayed request: may who asked for it have it back?
    fn fall_back(&mut self, stop: Stop, now: Moment) -> bool {
        let timed_out = stop == Stop::Deadline;
        let Some(replays) = self.replays.as_mut().filter(|r| r.failed.is_none()) else { return false };
        let (Some(fallback), Some((region, _))) = (replays.replay.fallback, replays.source) else { return false };
        if self.deadline.since(now).is_zero() || matches!(stop, Stop::NotIdempotent | Stop::BodyTooLarge) {
            return false;
        }
        let tried = self.tries.len() > self.counts_from;
        replays.failed = Some(match (timed_out, tried) {
            (true, _) => Failed::Timeout,
            (false, true) => Failed::RetriesExhausted,
            (false, false) => Failed::NoCandidate,
        });
        self.order = [Candidate { region, why: Why::Replay }].into_iter().collect();
        self.pin = replays.source_endpoint;
        self.pinned_only = fallback == Fallback::ForceSelf;
        self.counts_from = self.tries.len();
        true
    }

    /// The request is over: an upstream that answered well is told so, and a trial without a verdict is
    /// given back.
    pub fn close(&mut self, regions: &[Region], now: Moment) {
        self.slot = None;
        let Some(last) = self.tries.last() else { return };
        match last.outcome {
            Outcome::Pending => self.finish(regions, Outcome::Pending, None, now),
            Outcome::Answered(_) if last.well && self.mode == Mode::Commit => {
                if let Some(endpoint) = &last.endpoint {
                    endpoint.success(last.started, now);
                }
            }
            Outcome::Answered(_) | Outcome::Failed(_) | Outcome::Truncated(_) | Outcome::Replayed(_) => {}
        }
    }

    /// Tries since the last replay.
    pub(super) fn counted(&self) -> &[Try] {
        self.tries.get(self.counts_from..).unwrap_or_default()
    }

    /// Tries that count: one more is free where a pooled connection was closed under us.
    fn spent(&self) -> usize {
        self.counted().iter().filter(|t| !t.stale).count()
    }

    /// All tries, the first included.
    pub fn max_tries(&self) -> usize {
        self.attempts.map_or(self.order.len() + 1, usize::from)
    }

    /// The end of all attempts, or of those that a replay's timeout allows.
    fn until(&self) -> Moment {
        let replay = self.replays.as_ref().filter(|r| r.failed.is_none()).and_then(|r| Some(r.began.after(r.replay.timeout?)));
        replay.map_or(self.deadline, |end| end.min(self.deadline))
    }

    /// What went wrong with the last attempt.
    fn failure(&self) -> Option<Failure> {
        self.tries.last().and_then(|t| t.outcome.failure())
    }

    /// The endpoint of the attempt under way.
    pub fn endpoint(&self) -> Option<&Arc<Endpoint>> {
        self.tries.last()?.endpoint.as_ref()
    }

    /// For `explain`: the attempt under way gets an answer, whatever it would be.
    pub fn assume_answered(&mut self, now: Moment) {
        self.finish(&[], Outcome::Answered(200), None, now);
    }

    /// The status of a response that was given up, if there was one.
    pub fn given_up(&self) -> Option<u16> {
        self.tries.iter().rev().find_map(|t| match t.outcome {
            Outcome::Failed(Failure::Status(status)) => Some(status),
            Outcome::Pending | Outcome::Answered(_) | Outcome::Failed(_) | Outcome::Truncated(_) | Outcome::Replayed(_) => None,
        })
    }

    /// The failure of the last attempt that failed.
    pub fn last_failure(&self) -> Option<Failure> {
        self.tries.iter().rev().find_map(|t| t.outcome.failure())
    }

    /// When an upstream that was given up said to ask again.
    pub fn asked_to_wait(&self) -> Option<Duration> {
        self.asked_to_wait
    }

    /// When the first of the candidates may be worth asking again; at least a second.
    pub fn retry_after(&self, regions: &[Region], now: Moment) -> Duration {
        let mut least: Option<Duration> = None;
        for (_, region) in self.candidates(regions) {
            for upstream in &region.upstreams {
                for endpoint in upstream.state.endpoints().iter() {
                    let wait = match endpoint.standing(now) {
                        Standing::Ejected { until } | Standing::Resting { until } => until.since(now),
                        Standing::Usable | Standing::TrialDue | Standing::Down => Duration::ZERO,
                    };
                    least = Some(least.map_or(wait, |l| l.min(wait)));
                }
            }
        }
        least.unwrap_or_default().max(Duration::from_secs(1))
    }

    fn finish(&mut self, regions: &[Region], outcome: Outcome, healthy: Option<bool>, now: Moment) {
        let Some(last) = self.tries.last_mut() else { return };
        last.outcome = outcome;
        last.ended = now;
        let (Mode::Commit, Some(endpoint)) = (self.mode, &last.endpoint) else { return };
        match healthy {
            Some(true) => endpoint.success(last.started, now),
            Some(false) => {
                let (endpoint, order) = (endpoint.clone(), &self.order);
                endpoint.health.failure(now, || !others_usable(regions, order, &endpoint, now));
            }
            None if last.trial => endpoint.health.trial_abandoned(),
            None => {}
        }
    }

    fn verdict(&self, backends: Backends<'_>, failure: Failure, sent: Sent, now: Moment) -> Verdict {
        let cut = self.tries.last().is_some_and(|t| cut(t, failure));
        let out_of_time = self.deadline.since(now).is_zero() || (cut && !self.may_fall_back());
        let stop = if out_of_time {
            Some(Stop::Deadline)
        } else if !failure.nothing_was_sent() && !self.may_repeat {
            Some(Stop::NotIdempotent)
        } else if !failure.nothing_was_sent() && sent.body_lost {
            Some(Stop::BodyTooLarge)
        } else if self.may_fall_back() {
            None
        } else if self.spent() >= self.max_tries() {
            Some(Stop::Attempts)
        } else {
            match self.choose(backends.regions, now, !matches!(failure, Failure::Status(_))) {
                Err(Stop::Busy) if !matches!(failure, Failure::Status(_)) => None,
                Err(stop) => Some(stop),
                // A stale connection's second try is free.
                Ok(_) if self.tries.last().is_some_and(|t| t.stale) => None,
                Ok(next) if !next.is_in_budget(Some(failure), backends.retry, now) => Some(Stop::Budget),
                Ok(_) => None,
            }
        };
        stop.map_or(Verdict::Again, Verdict::Final)
    }

    fn may_fall_back(&self) -> bool {
        self.replays.as_ref().is_some_and(|r| r.failed.is_none() && r.replay.fallback.is_some())
    }

    /// The candidates that exist.
    pub fn candidates<'a>(&self, regions: &'a [Region]) -> impl Iterator<Item = (RegionId, &'a Region)> {
        self.order.iter().filter_map(|Candidate { region, why: _ }| Some((*region, regions.get(usize::from(region.0))?)))
    }
}

/// An upstream by region and position.
pub fn upstream(regions: &[Region], region: RegionId, position: u16) -> Option<&Upstream> {
    regions.get(usize::from(region.0))?.upstreams.get(usize::from(position))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::regions::fixtures::region;
    use crate::regions::{Limits, RegionId};
    use crate::routes::budget::Allowance;

    /// Regions of these many upstreams.
    fn regions(sizes: &[usize]) -> Vec<Region> {
        let of = |(r, size): (usize, &usize)| {
            let urls: Vec<String> = (0..*size).map(|i| format!("http://127.0.{r}.{i}:80")).collect();
            region(&format!("r{r}"), &urls.iter().map(String::as_str).collect::<Vec<_>>())
        };
        sizes.iter().enumerate().map(of).collect()
    }

    fn endpoint(regions: &[Region], region: usize, upstream: usize) -> Arc<Endpoint> {
        regions[region].upstreams[upstream].state.endpoints()[0].clone()
    }

    fn eject(endpoint: &Endpoint, now: Moment) {
        for _ in 0..3 {
            endpoint.health.failure(now, || false);
        }
    }

    fn retry(attempts: Option<u8>) -> Retry {
        Retry {
            attempts,
            statuses: [502, 503].into_iter().collect(),
            non_idempotent: false,
            allowance: Allowance { percent: 20, min_per_second: 3 },
            budget: Arc::default(),
        }
    }

    fn start(count: usize) -> Start {
        Start {
            order: (0..count).map(|i| Candidate { region: RegionId(i as u16), why: Why::Default }).collect(),
            moved: None,
            pin: None,
            keys: SmallVec::new(),
            may_repeat: true,
            patience: Patience::FirstByte,
            measures: true,
            share: Share::ALL,
            chance: 7,
            mode: Mode::Commit,
        }
    }

    fn timeouts() -> Timeouts {
        let second = Duration::from_secs(1);
        Timeouts { connect: second, first_byte: second * 5, idle: second * 60, total: second * 30 }
    }

    fn plan(backends: Backends<'_>, may_repeat: bool) -> Plan {
        let start = Start { may_repeat, ..start(backends.regions.len()) };
        Plan::new(start, timeouts(), backends.retry, Moment::default())
    }

    fn at(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    #[test]
    fn each_attempt_is_cut_to_what_is_left() {
        let (regions, retry) = (regions(&[1, 1, 1]), retry(Some(5)));
        let backends = Backends { regions: &regions, retry: &retry };
        let mut plan = plan(backends, true);
        let first = plan.next(backends, at(0)).unwrap();
        assert_eq!((first.connect, first.silence), (Duration::from_secs(1), Duration::from_secs(5)));
        assert_eq!(plan.failed(backends, Failure::FirstByteTimeout, Sent::default(), at(5_000)), Verdict::Again);
        let second = plan.next(backends, at(27_000)).unwrap();
        assert_eq!((second.connect, second.silence), (Duration::from_secs(1), Duration::from_secs(3)));
        assert_eq!(plan.failed(backends, Failure::FirstByteTimeout, Sent::default(), at(29_990)), Verdict::Final(Stop::Deadline));
        assert_eq!(plan.next(backends, at(30_000)).map(drop), Err(Exhausted(Stop::Deadline)));
    }

    #[test]
    fn a_stale_connection_is_free_once() {
        let (regions, retry) = (regions(&[1, 1]), retry(Some(1)));
        let backends = Backends { regions: &regions, retry: &retry };
        let mut plan = plan(backends, true);
        let stale = Sent { reused: true, ..Sent::default() };
        plan.next(backends, at(0)).unwrap();
        assert_eq!(plan.failed(backends, Failure::Closed, stale, at(0)), Verdict::Again);
        assert_eq!(plan.next(backends, at(0)).unwrap().region, RegionId(0), "the same upstream again");
        assert_eq!(plan.failed(backends, Failure::Closed, stale, at(0)), Verdict::Final(Stop::Attempts));
        assert_eq!(endpoint(&regions, 0, 0).health.counts().0, 1, "only the second counts against it");
        assert_eq!(retry.budget.counts(at(0)), (1, 0), "and it is no retry");
    }

    #[test]
    fn a_real_response_is_not_given_up_for_an_ejected_region() {
        let (regions, retry) = (regions(&[1, 1]), retry(None));
        let backends = Backends { regions: &regions, retry: &retry };
        eject(&endpoint(&regions, 1, 0), at(1));
        let mut first = plan(backends, true);
        first.next(backends, at(10)).unwrap();
        assert_eq!(first.answered(backends, 503, None, Sent::default(), at(10)), Verdict::Final(Stop::NoCandidate));
        // Without a response there is nothing to lose.
        let mut second = plan(backends, true);
        second.next(backends, at(10)).unwrap();
        assert_eq!(second.failed(backends, Failure::Closed, Sent::default(), at(10)), Verdict::Again);
        assert_eq!(second.next(backends, at(10)).unwrap().region, RegionId(1));
        assert!(!second.panic);
    }

    #[test]
    fn the_last_usable_one_is_never_ejected() {
        let (regions, retry) = (regions(&[1, 1]), retry(Some(1)));
        let backends = Backends { regions: &regions, retry: &retry };
        let fail = |times: usize, now: u64| {
            for _ in 0..times {
                let mut plan = plan(backends, true);
                plan.next(backends, at(now)).unwrap();
                plan.failed(backends, Failure::ConnectRefused, Sent::default(), at(now));
            }
        };
        fail(3, 1);
        assert!(!endpoint(&regions, 0, 0).is_usable(at(1)), "another region is left");
        fail(10, 2);
        assert!(endpoint(&regions, 1, 0).is_usable(at(2)) && !endpoint(&regions, 1, 0).is_healthy(at(2)));
        // Once another is back the failing one goes.
        endpoint(&regions, 0, 0).success(at(3), at(3));
        let mut plan = plan(backends, true);
        plan.order.reverse();
        plan.next(backends, at(3)).unwrap();
        plan.failed(backends, Failure::ConnectRefused, Sent::default(), at(3));
        assert!(!endpoint(&regions, 1, 0).is_usable(at(3)));
    }

    #[test]
    fn if_nothing_is_usable_everything_is_tried_and_said() {
        let (regions, retry) = (regions(&[1, 1]), retry(None));
        let backends = Backends { regions: &regions, retry: &retry };
        for i in 0..2 {
            eject(&endpoint(&regions, i, 0), at(1));
        }
        let mut plan = plan(backends, true);
        assert_eq!(plan.next(backends, at(2)).unwrap().region, RegionId(0));
        assert!(plan.panic);
    }

    #[test]
    fn limits_spill_before_they_queue() {
        let retry = retry(None);
        let mut regions = regions(&[1, 1]);
        regions[0].limits = Limits { hard: Some(2), soft: Some(1) };
        regions[1].upstreams[0].limits = Limits { hard: Some(1), soft: None };
        let backends = Backends { regions: &regions, retry: &retry };
        let mut plans: Vec<Plan> = (0..4).map(|_| plan(backends, true)).collect();
        let took: Vec<_> = plans.iter_mut().map(|p| p.next(backends, at(0)).map(|a| a.region.0)).collect();
        // Below soft at home, then the other region, then up to hard at home, then nothing.
        assert_eq!(took, [Ok(0), Ok(1), Ok(0), Err(Exhausted(Stop::Busy))]);
        plans.remove(1).close(&regions, at(1));
        assert_eq!(plans[2].next(backends, at(1)).map(|a| a.region.0), Ok(1), "a place became free");
        drop(plans);
        assert_eq!(regions[0].state.in_flight(), 0);
    }

    #[test]
    fn writes_keep_together_while_their_region_lives() {
        let retry = retry(None);
        let mut regions = regions(&[1, 1]);
        regions[0].limits = Limits { hard: Some(2), soft: Some(1) };
        let backends = Backends { regions: &regions, retry: &retry };
        let write = || {
            let mut start = start(2);
            start.order[0].why = Why::Writes;
            Plan::new(start, timeouts(), &retry, at(0))
        };
        let mut plans: Vec<Plan> = (0..3).map(|_| write()).collect();
        let took: Vec<_> = plans.iter_mut().map(|p| p.next(backends, at(0)).map(|a| a.region.0)).collect();
        assert_eq!(took, [Ok(0), Ok(0), Err(Exhausted(Stop::Busy))], "busy is no reason to go elsewhere");
        drop(plans);
        endpoint(&regions, 0, 0).rest(Duration::from_secs(9), at(0));
        assert_eq!(write().next(backends, at(1)).unwrap().region, RegionId(0));
        eject(&endpoint(&regions, 0, 0), at(2));
        assert_eq!(write().next(backends, at(3)).unwrap().region, RegionId(1), "but death is");
    }

    #[test]
    fn an_evacuated_region_is_no_overflow() {
        use crate::regions::control::{Control, Kind};
        let retry = retry(None);
        let mut regions = regions(&[1, 1]);
        regions[1].limits.hard = Some(1);
        let until = Some(at(60_000));
        let control = Control { kind: Kind::Evacuated, from: at(0), ramp: Duration::ZERO, until, reason: String::new() };
        regions[0].state.control.store(Some(Arc::new(control)));
        let backends = Backends { regions: &regions, retry: &retry };
        let mut first = plan(backends, true);
        assert_eq!(first.next(backends, at(1)).unwrap().region, RegionId(1));
        assert_eq!(plan(backends, true).next(backends, at(1)).map(drop), Err(Exhausted(Stop::Busy)));
    }

    #[test]
    fn backups_wait_until_the_others_are_out() {
        let retry = retry(None);
        let mut regions = regions(&[2, 1]);
        regions[0].upstreams[1].backup = true;
        let backends = Backends { regions: &regions, retry: &retry };
        let first = |now| plan(backends, true).next(backends, at(now)).map(|a| (a.region.0, a.upstream)).unwrap();
        assert!((0..10).all(|_| first(0) == (0, 0)));
        eject(&endpoint(&regions, 0, 0), at(1));
        assert_eq!(first(2), (0, 1));
        eject(&endpoint(&regions, 0, 1), at(2));
        assert_eq!(first(3), (1, 0));
    }

    #[test]
    fn an_upstream_that_says_when_to_ask_again_is_left_alone() {
        let (regions, retry) = (regions(&[1, 1]), retry(None));
        let backends = Backends { regions: &regions, retry: &retry };
        let mut busy = plan(backends, true);
        busy.next(backends, at(0)).unwrap();
        let wait = Some(Duration::from_secs(3));
        assert_eq!(busy.answered(backends, 503, wait, Sent::default(), at(0)), Verdict::Again);
        assert_eq!((busy.asked_to_wait(), busy.next(backends, at(0)).unwrap().region), (wait, RegionId(1)));
        let region = |now| plan(backends, true).next(backends, at(now)).unwrap().region;
        assert_eq!([region(1), region(2_999), region(3_000)], [RegionId(1), RegionId(1), RegionId(0)]);
        // But it comes before one that is ejected.
        let mut again = plan(backends, true);
        endpoint(&regions, 0, 0).rest(Duration::from_secs(3), at(4_000));
        eject(&endpoint(&regions, 1, 0), at(4_000));
        assert_eq!(again.next(backends, at(4_001)).unwrap().region, RegionId(0));
    }

    #[test]
    fn a_spent_budget_ends_retries_but_not_failover() {
        let (regions, mut retry) = (regions(&[1, 1]), retry(None));
        retry.allowance = Allowance { percent: 0, min_per_second: 0 };
        let backends = Backends { regions: &regions, retry: &retry };
        let fail = |expected| {
            let mut plan = plan(backends, true);
            plan.next(backends, at(0)).unwrap();
            assert_eq!(plan.failed(backends, Failure::ConnectRefused, Sent::default(), at(0)), expected);
            plan.next(backends, at(0)).map(|a| a.region)
        };
        assert_eq!(fail(Verdict::Again), Ok(RegionId(1)), "the other region shows no failure");
        assert_eq!(retry.budget.counts(at(0)).1, 1, "it counts all the same");
        endpoint(&regions, 1, 0).health.failure(at(0), || true);
        assert_eq!(fail(Verdict::Final(Stop::Budget)), Err(Exhausted(Stop::Budget)));
    }

    #[test]
    fn the_same_upstream_only_after_a_pause() {
        let (regions, mut retry) = (regions(&[1]), retry(Some(4)));
        retry.allowance.min_per_second = 100;
        let backends = Backends { regions: &regions, retry: &retry };
        let mut delays = Vec::new();
        for chance in 0..50 {
            let mut plan = Plan::new(Start { chance, ..start(1) }, timeouts(), &retry, at(0));
            assert_eq!(plan.next(backends, at(0)).unwrap().delay, Duration::ZERO);
            assert_eq!(plan.failed(backends, Failure::ConnectRefused, Sent::default(), at(0)), Verdict::Again);
            delays.push(plan.next(backends, at(0)).unwrap().delay);
        }
        assert!(delays.iter().all(|d| *d < BACKOFF) && delays.iter().any(|d| *d > BACKOFF / 2), "{delays:?}");
    }

    #[test]
    fn replays_go_where_they_are_sent_and_no_further() {
        let (regions, retry) = (regions(&[1, 1, 1]), retry(None));
        let backends = Backends { regions: &regions, retry: &retry };
        let steering = Steering { pool: vec![RegionId(0), RegionId(1), RegionId(2)], ..Steering::default() };
        let to = |region: u16| Ok(Replay { regions: [RegionId(region)].into_iter().collect(), ..Replay::default() });
        let mut plan = plan(backends, false);
        assert_eq!(plan.next(backends, at(0)).unwrap().region, RegionId(0));
        assert_eq!(plan.replay(backends, &steering, to(2), 200, Sent::default(), at(0)), Verdict::Again);
        assert_eq!(plan.next(backends, at(0)).unwrap().region, RegionId(2), "a POST too: nobody has executed it");
        assert_eq!(plan.replay(backends, &steering, to(0), 200, Sent::default(), at(0)), Verdict::Final(Stop::Replay));
        assert!(plan.replays.as_ref().unwrap().refused.unwrap().contains("back to one that asked"));
        // Residency holds, and a body that is gone cannot be sent again.
        let only = Steering { only: Some(vec![RegionId(0), RegionId(1)]), ..Steering::default() };
        for (steering, replay, sent) in [
            (&only, to(2), Sent::default()),
            (&steering, to(1), Sent { body_lost: true, ..Sent::default() }),
            (&steering, Err("nonsense"), Sent::default()),
        ] {
            let mut plan = super::tests::plan(backends, true);
            plan.next(backends, at(0)).unwrap();
            assert_eq!(plan.replay(backends, steering, replay, 200, sent, at(0)), Verdict::Final(Stop::Replay));
        }
    }

    #[test]
    fn a_replay_that_nobody_takes_falls_back() {
        let (regions, retry) = (regions(&[2, 1]), retry(None));
        let backends = Backends { regions: &regions, retry: &retry };
        let steering = Steering { pool: vec![RegionId(0), RegionId(1)], ..Steering::default() };
        for fallback in [None, Some(Fallback::ForceSelf), Some(Fallback::PreferSelf)] {
            let replay = Replay { regions: [RegionId(1)].into_iter().collect(), fallback, ..Replay::default() };
            let mut plan = plan(backends, true);
            let asked = plan.next(backends, at(0)).unwrap();
            plan.replay(backends, &steering, Ok(replay.clone()), 200, Sent::default(), at(0));
            plan.next(backends, at(0)).unwrap();
            let mut verdict = plan.failed(backends, Failure::ConnectRefused, Sent::default(), at(0));
            let mut next = plan.next(backends, at(0));
            // A connection that broke may be tried once more.
            while fallback.is_some() && next.as_ref().is_ok_and(|a| a.region == RegionId(1)) {
                verdict = plan.failed(backends, Failure::Tls, Sent::default(), at(0));
                next = plan.next(backends, at(0));
            }
            match fallback {
                None => assert!(verdict == Verdict::Again && plan.replays.as_ref().unwrap().failed.is_none()),
                Some(_) => {
                    let back = next.unwrap();
                    assert_eq!((back.region, back.upstream), (asked.region, asked.upstream));
                    assert_eq!(plan.replays.as_ref().unwrap().failed, Some(Failed::RetriesExhausted));
                    let again = plan.replay(backends, &steering, Ok(replay), 200, Sent::default(), at(0));
                    assert_eq!(again, Verdict::Final(Stop::Replay), "no replay after a fallback");
                }
            }
        }
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
            let (regions, retry) = (regions(&sizes), retry(attempts));
            let backends = Backends { regions: &regions, retry: &retry };
            let mut plan = plan(backends, may_repeat);
            let limit = attempts.map_or(sizes.len() + 1, usize::from);
            let mut now = at(0);
            let mut sent = 0;
            for (kind, reused, body_lost, passed) in faults {
                if plan.next(backends, now).is_err() {
                    break;
                }
                let failure = Failure::ALL[kind];
                sent += usize::from(!failure.nothing_was_sent());
                now = now.after(Duration::from_millis(passed));
                let verdict = plan.failed(backends, failure, Sent { body_lost, reused, body_incomplete: false }, now);
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
