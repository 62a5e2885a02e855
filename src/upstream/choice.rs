//! Which endpoint a plan tries next.

use std::sync::Arc;

use super::failure::{Failure, Stop};
use super::plan::{Mode, PER_REGION, Plan};
use crate::overload::Share;
use crate::regions::balance::{Member, Members};
use crate::regions::endpoint::{Endpoint, Standing};
use crate::regions::steering::{Order, Why};
use crate::regions::{Region, RegionId, Room, Upstream};
use crate::request::{Moment, mix};
use crate::routes::Retry;

/// In what shape an endpoint is for this request. The order is the order of preference; from
/// [`Shape::Away`] on only while nothing else is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    /// Nothing speaks against it.
    Usable,
    /// It, or its region, has reached its soft limit.
    Busy,
    /// It asked to be left alone.
    Resting,
    /// An operator took its region out.
    Away,
    /// Traffic or health checks say no, or its name has no address.
    Ejected,
    /// It broke a connection of this very request.
    BrokeBefore,
}

/// What is better; the least wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    shape: Shape,
    /// Its region had its share of attempts.
    share_used: bool,
    /// The region's place in the order.
    place: usize,
    /// It is not the one that the client's cookie names.
    unpinned: bool,
    /// It is a backup.
    backup: bool,
}

/// The endpoint to try.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    pub region: RegionId,
    pub upstream: u16,
    pub endpoint: Option<Arc<Endpoint>>,
    pub trial: bool,
    pub shape: Shape,
}

impl Choice {
    /// May it be tried after another failed with `failure`? One that shows no failure always, where nobody answered:
    /// then the request fails over, and adds no load that the endpoint would not have had. After an answer, or where
    /// the endpoint fails as well, only within the budget.
    pub(super) fn is_in_budget(&self, failure: Option<Failure>, retry: &Retry, now: Moment) -> bool {
        let answered = matches!(failure, Some(Failure::Status(_)));
        let is_well = |e: &Arc<Endpoint>| self.shape < Shape::Away && e.health.counts().0 == 0;
        !answered && self.endpoint.as_ref().is_some_and(is_well) || retry.budget.allows(retry.allowance, now)
    }
}

impl Plan {
    /// The best endpoint to try now; of equals its region's balance picks one.
    ///
    /// `last_resort` admits endpoints that are out or broke a connection of this very request: if nothing
    /// else is left, trying beats giving up, unless a real response would be given up for it.
    pub(super) fn choose(&self, regions: &[Region], now: Moment, last_resort: bool) -> Result<Choice, Stop> {
        if let Some(choice) = self.stale_again() {
            return Ok(choice);
        }
        let mut best: Option<(Rank, RegionId)> = None;
        let mut members = Members::new();
        let mut full = false;
        let together = self.order.first().is_some_and(|c| matches!(c.why, Why::Writes | Why::ReadYourWrites));
        for (place, (id, region)) in self.candidates(regions).enumerate() {
            let share_used = self.counted().iter().filter(|t| t.region == id && !t.stale).count() >= PER_REGION;
            let mut consider = |shape: Shape, upstream: &Upstream, member: Member, backup: bool| {
                let unpinned = self.pin.is_some_and(|pin| pin != member.id);
                if unpinned && self.pinned_only {
                    return;
                }
                let rank = Rank { shape, share_used, place, unpinned, backup: backup || upstream.backup };
                if shape >= Shape::Away && !last_resort || best.is_some_and(|(least, _)| least < rank) {
                    return;
                }
                if best.is_none_or(|(least, _)| rank < least) {
                    best = Some((rank, id));
                    members.clear();
                }
                members.push(member);
            };
            for (position, upstream) in region.upstreams.iter().enumerate() {
                let position = u16::try_from(position).unwrap_or(u16::MAX);
                let endpoints = upstream.state.endpoints();
                if endpoints.is_empty() && self.counted().iter().all(|t| t.region != id || t.upstream != position) {
                    consider(Shape::Ejected, upstream, nowhere(position), upstream.backup);
                }
                for (i, endpoint) in endpoints.iter().enumerate() {
                    let Some((shape, trial)) = self.shape(region, upstream, endpoint, now, &mut full) else { continue };
                    // Writes have one place as long as it lives, be it busy.
                    let shape = if together && place == 0 && shape < Shape::Away { Shape::Usable } else { shape };
                    let ramp = endpoint.ramp(region.slow_start, now);
                    let member = Member {
                        upstream: position,
                        endpoint: u16::try_from(i).ok(),
                        trial,
                        weight: upstream.weight.saturating_mul(endpoint.weight()) as f32 * ramp,
                        ramp,
                        in_flight: endpoint.in_flight(),
                        first_byte: endpoint.first_byte(now),
                        id: endpoint.id,
                    };
                    consider(shape, upstream, member, endpoint.backup());
                }
            }
            if together && place == 0 && full && best.is_none_or(|(rank, _)| rank.shape >= Shape::Away) {
                return Err(Stop::Busy);
            }
            // Regions come in the order of `place`, so nothing later beats a usable one.
            if best.is_some_and(|(rank, _)| rank.shape == Shape::Usable && !rank.share_used) {
                break;
            }
        }
        let none = if full { Stop::Busy } else { Stop::NoCandidate };
        let (rank, id) = best.ok_or(none)?;
        // A last resort is no match for a short wait, where waiting is possible.
        if full && rank.shape >= Shape::Away && self.tries.is_empty() {
            return Err(Stop::Busy);
        }
        let region = regions.get(usize::from(id.0)).ok_or(none)?;
        let key = self.keys.iter().find(|(of, _)| *of == id).map(|(_, key)| *key);
        let chance = mix(self.chance.wrapping_add(self.tries.len() as u64 + 1));
        let picked = region.balance.pick(&members, &region.schedule, region.state.peek_turn(), key, chance).ok_or(none)?;
        let endpoints = region.upstreams.get(usize::from(picked.upstream)).map(|u| u.state.endpoints());
        // DNS may have changed between the two looks; any address of the upstream is as good.
        let endpoint = picked.endpoint.and_then(|i| {
            let endpoints = endpoints.as_ref()?;
            endpoints.get(usize::from(i)).or_else(|| endpoints.first()).cloned()
        });
        Ok(Choice { region: id, upstream: picked.upstream, endpoint, trial: picked.trial, shape: rank.shape })
    }

    /// What the attempt under way tells of how many requests its region can answer.
    pub(super) fn learn(&self, regions: &[Region], now: Moment) {
        let Some(last) = self.tries.last().filter(|_| self.mode == Mode::Commit) else { return };
        let Some(region) = regions.get(usize::from(last.region.0)) else { return };
        if let Some(bounds) = region.adaptive
            && region.state.adaptive.measured(now.since(last.started), region.state.in_flight(), bounds, now)
        {
            // There is more room: whoever waits for some may look.
            region.state.room.freed.notify(usize::MAX);
        }
    }

    /// In what shape an endpoint is, and whether choosing it is a trial; nothing if it is out of the question.
    /// `full` becomes true where only a limit speaks against it.
    fn shape(
        &self,
        region: &Region,
        upstream: &Upstream,
        endpoint: &Arc<Endpoint>,
        now: Moment,
        full: &mut bool,
    ) -> Option<(Shape, bool)> {
        let earlier =
            || self.counted().iter().filter(|t| !t.stale && t.endpoint.as_ref().is_some_and(|e| Arc::ptr_eq(e, endpoint)));
        if earlier().next().is_some() {
            let blip = earlier().all(|t| t.outcome.failure().is_some_and(Failure::may_be_a_blip));
            return blip.then_some((Shape::BrokeBefore, false));
        }
        let stays = self.pin == Some(endpoint.id) && region.state.keeps_clients(now);
        let operator = if region.state.is_away(now) && !stays { Shape::Away } else { Shape::Usable };
        let (own, trial) = match endpoint.standing(now) {
            Standing::Usable => (Shape::Usable, false),
            Standing::TrialDue => (Shape::Usable, true),
            Standing::Resting { until: _ } => (Shape::Resting, false),
            Standing::Ejected { until: _ } | Standing::Down => (Shape::Ejected, false),
        };
        let in_flight = region.state.in_flight();
        let of_region = region.bounds(self.share).room(in_flight);
        if of_region == Room::None && self.mode == Mode::Commit && region.bounds(Share::ALL).room(in_flight) == Room::None {
            region.state.adaptive.pressed();
        }
        let room = match of_region.max(upstream.limits.shared(self.share).room(endpoint.in_flight())) {
            Room::Enough => Shape::Usable,
            Room::Little => Shape::Busy,
            Room::None => {
                *full |= own < Shape::Away && operator < Shape::Away;
                return None;
            }
        };
        Some((own.max(room).max(operator), trial))
    }

    /// After a pooled connection turned out to be closed, the same endpoint again, once.
    fn stale_again(&self) -> Option<Choice> {
        let last = self.counted().last().filter(|t| t.stale)?;
        Some(Choice {
            region: last.region,
            upstream: last.upstream,
            endpoint: last.endpoint.clone(),
            trial: false,
            shape: Shape::Usable,
        })
    }
}

/// Is anything but `endpoint` usable among the candidates?
pub(super) fn others_usable(regions: &[Region], order: &Order, endpoint: &Arc<Endpoint>, now: Moment) -> bool {
    order.iter().filter_map(|c| regions.get(usize::from(c.region.0))).any(|region| {
        let other = |u: &Upstream| u.state.endpoints().iter().any(|e| !Arc::ptr_eq(e, endpoint) && e.is_usable(now));
        !region.state.is_away(now) && region.upstreams.iter().any(other)
    })
}

/// An upstream whose name has no address: trying it fails at once, but says why.
fn nowhere(upstream: u16) -> Member {
    Member { upstream, endpoint: None, trial: false, weight: 1.0, ramp: 1.0, in_flight: 0, first_byte: None, id: 0 }
}
