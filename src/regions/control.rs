//! What an operator says of a region, and what the region has to do at the moment. Both outlive reloads.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use event_listener::Event;
use serde::{Deserialize, Serialize};

use crate::overload::adaptive::Adaptive;
use crate::request::Moment;

/// What was asked for a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Its traffic goes elsewhere until a set time.
    Evacuated,
    /// It takes no new clients; those with affinity may stay for a while.
    Drained,
}

impl Kind {
    /// In words.
    pub fn label(self) -> &'static str {
        match self {
            Self::Evacuated => "evacuated",
            Self::Drained => "drained",
        }
    }
}

/// An order for a region.
#[derive(Debug, Clone, PartialEq)]
pub struct Control {
    /// What was asked for.
    pub kind: Kind,
    /// When it began.
    pub from: Moment,
    /// How long traffic takes to leave an evacuated region, and to come back; how long clients may stay in a
    /// drained one.
    pub ramp: Duration,
    /// When it ends; a drained region has no end.
    pub until: Option<Moment>,
    /// Why, as the operator put it.
    pub reason: String,
}

impl Control {
    /// The part of its traffic that the region keeps, from 1 to 0 and back.
    pub fn share(&self, now: Moment) -> f32 {
        if self.kind == Kind::Drained {
            return if self.until.is_some_and(|until| now >= until) { 1.0 } else { 0.0 };
        }
        let part = |passed: Duration| if self.ramp.is_zero() { 1.0 } else { passed.as_secs_f32() / self.ramp.as_secs_f32() };
        let leaving = (1.0 - part(now.since(self.from))).clamp(0.0, 1.0);
        let coming = match self.until {
            Some(until) if now >= until => part(now.since(until)).clamp(0.0, 1.0),
            Some(_) | None => 0.0,
        };
        leaving.max(coming)
    }

    /// Is there nothing left of it?
    pub fn is_over(&self, now: Moment) -> bool {
        let after = if self.kind == Kind::Evacuated { self.ramp } else { Duration::ZERO };
        self.until.is_some_and(|until| now >= until.after(after))
    }

    /// The same, but going on from `share`, which an order before it left: what has gone does not come back first.
    pub fn from_share(self, share: f32) -> Self {
        match self.kind {
            Kind::Drained => self,
            Kind::Evacuated => {
                let gone = self.ramp.mul_f32((1.0 - share).clamp(0.0, 1.0));
                Self { from: Moment(self.from.0.saturating_sub(gone)), ..self }
            }
        }
    }

    /// The same, ending at `now`: traffic comes back from the share that it has.
    pub fn ended(&self, now: Moment) -> Self {
        if self.kind == Kind::Drained {
            return Self { until: Some(now), ..self.clone() };
        }
        let begun = Duration::from_secs_f32(self.ramp.as_secs_f32() * self.share(now));
        let until = Moment(now.0.saturating_sub(begun));
        Self { from: until.min(self.from), until: Some(until), ..self.clone() }
    }
}

/// What outlives a reload of one region.
#[derive(Debug, Default)]
pub struct RegionState {
    /// An operator's order, if there is one.
    pub control: ArcSwapOption<Control>,
    /// Whose turn it is (`round_robin`).
    cursor: AtomicUsize,
    /// Requests that it is answering.
    pub(super) in_flight: AtomicU32,
    /// Requests that wait for a place, in the queue of this region.
    waiting: AtomicU32,
    /// Since when somebody waits, in milliseconds; 0 if nobody does.
    busy_since: AtomicU64,
    /// How many requests at once it can answer.
    pub adaptive: Adaptive,
    /// Where all regions tell that a place became free: a request may wait for several.
    pub room: Arc<Room>,
    /// Tunnels into the region have to close: its grace after `drain` is over.
    pub close: Event,
    /// Time to first byte of health checks in microseconds, smoothed; 0 if there was none.
    checked: AtomicU32,
}

/// Where it is told that a place became free somewhere.
#[derive(Debug, Default)]
pub struct Room {
    /// Requests that want to hear of it.
    waiting: AtomicU32,
    /// It became free.
    pub freed: Event,
}

/// A request's place in the queue. Dropping it gives it back.
#[derive(Debug)]
pub struct Waiting<'a>(&'a RegionState);

impl RegionState {
    /// Nothing is known yet; a place that becomes free is told in `room`.
    pub fn new(room: Arc<Room>) -> Self {
        Self { room, ..Self::default() }
    }

    /// The part of its traffic that an operator leaves it.
    pub fn share(&self, now: Moment) -> f32 {
        self.control.load().as_ref().map_or(1.0, |control| control.share(now))
    }

    /// Has an operator taken it out entirely?
    pub fn is_away(&self, now: Moment) -> bool {
        self.share(now) <= 0.0
    }

    /// May clients that have affinity to it stay, although it takes no others?
    pub fn keeps_clients(&self, now: Moment) -> bool {
        let control = self.control.load();
        let drained = control.as_ref().filter(|c| c.kind == Kind::Drained);
        drained.is_some_and(|c| now < c.from.after(c.ramp))
    }

    /// Takes the next turn. Any number may come, wrapping around.
    pub fn turn(&self) -> usize {
        self.cursor.fetch_add(1, Relaxed)
    }

    /// The turn that comes next, without taking it.
    pub fn peek_turn(&self) -> usize {
        self.cursor.load(Relaxed)
    }

    /// Requests that it is answering.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Requests that wait for a place.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(SeqCst)
    }

    /// Joins the queue; nothing if `size` requests wait already.
    pub fn wait(&self, size: u32, now: Moment) -> Option<Waiting<'_>> {
        let before = self.waiting.fetch_update(SeqCst, SeqCst, |n| (n < size).then_some(n + 1)).ok()?;
        if before == 0 {
            self.busy_since.store(now.millis().max(1), Relaxed);
        }
        self.room.waiting.fetch_add(1, SeqCst);
        Some(Waiting(self))
    }

    /// For how long there has always been somebody who waits.
    pub fn busy(&self, now: Moment) -> Duration {
        match self.busy_since.load(Relaxed) {
            0 => Duration::ZERO,
            since => now.since(Moment(Duration::from_millis(since))),
        }
    }

    /// A request left.
    pub(super) fn left(&self) {
        // Sequentially consistent with who joins the queue and looks once more: one of the two sees the other.
        self.in_flight.fetch_sub(1, SeqCst);
        if self.room.waiting.load(SeqCst) > 0 {
            // Everybody, for not everybody can use it; there are no more of them than queues have places.
            self.room.freed.notify(usize::MAX);
        }
    }

    /// A health check took this long to its first byte.
    pub fn checked(&self, took: Duration) {
        let new = u32::try_from(took.as_micros()).unwrap_or(u32::MAX).max(1);
        let old = self.checked.load(Relaxed);
        self.checked.store(if old == 0 { new } else { old - old / 4 + new / 4 }, Relaxed);
    }

    /// Time to first byte of health checks, if there are any.
    pub fn check_time(&self) -> Option<Duration> {
        Some(self.checked.load(Relaxed)).filter(|us| *us > 0).map(|us| Duration::from_micros(us.into()))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.0.waiting.fetch_sub(1, SeqCst) == 1 {
            self.0.busy_since.store(0, Relaxed);
        }
        self.0.room.waiting.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: u64) -> Moment {
        Moment(Duration::from_secs(s))
    }

    fn evacuated(ramp: u64) -> Control {
        Control {
            kind: Kind::Evacuated,
            from: at(100),
            ramp: Duration::from_secs(ramp),
            until: Some(at(1_000)),
            reason: String::new(),
        }
    }

    #[test]
    fn traffic_leaves_and_comes_back_by_and_by() {
        let control = evacuated(100);
        let shares = [100, 150, 200, 999, 1_000, 1_025, 1_100, 5_000].map(|s| control.share(at(s)));
        assert_eq!(shares, [1.0, 0.5, 0.0, 0.0, 0.0, 0.25, 1.0, 1.0]);
        assert_eq!([1_099, 1_100].map(|s| control.is_over(at(s))), [false, true]);
        let sudden = evacuated(0);
        assert_eq!([100, 999, 1_000].map(|s| sudden.share(at(s))), [0.0, 0.0, 1.0]);
    }

    #[test]
    fn an_early_end_goes_on_from_the_share_there_is() {
        let ended = evacuated(100).ended(at(160));
        assert!((ended.share(at(160)) - 0.4).abs() < 0.01, "{}", ended.share(at(160)));
        assert!((ended.share(at(190)) - 0.7).abs() < 0.01);
        assert_eq!(ended.share(at(220)), 1.0);
        let ended = evacuated(100).ended(at(500));
        assert_eq!([500, 550, 600].map(|s| ended.share(at(s))), [0.0, 0.5, 1.0]);
    }

    #[test]
    fn an_extended_order_goes_on_from_the_share_there_is() {
        for share in [1.0, 0.4, 0.0] {
            let extended = evacuated(100).from_share(share);
            assert!((extended.share(at(100)) - share).abs() < 0.01, "{share}");
        }
    }

    #[test]
    fn drained_regions_keep_clients_for_a_while() {
        let state = RegionState::default();
        assert!(!state.is_away(at(0)) && !state.keeps_clients(at(0)));
        let grace = Duration::from_secs(30);
        let drained = Control { kind: Kind::Drained, from: at(100), ramp: grace, until: None, reason: String::new() };
        assert_eq!(drained.share(at(100)), 0.0);
        let restored = drained.ended(at(110));
        assert_eq!((restored.share(at(110)), restored.is_over(at(110))), (1.0, true));
        state.control.store(Some(drained.into()));
        assert!(state.keeps_clients(at(129)) && !state.keeps_clients(at(130)));
    }

    #[test]
    fn the_queue_is_bounded() {
        let state = RegionState::default();
        let first = state.wait(1, at(5));
        assert!(first.is_some() && state.wait(1, at(6)).is_none() && state.wait(0, at(6)).is_none());
        assert_eq!(state.busy(at(7)), Duration::from_secs(2));
        drop(first);
        assert_eq!(state.busy(at(8)), Duration::ZERO);
        assert!(state.wait(1, at(9)).is_some());
    }
}
