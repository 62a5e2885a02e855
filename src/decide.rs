//! The journey of a request, once, in order. Deterministic; it neither waits nor writes.

use smallvec::SmallVec;

use crate::client::address::ClientAddress;
use crate::client::place::Place;
use crate::regions::balance::{Balance, Field};
use crate::regions::latency::Areas;
use crate::regions::spill;
use crate::regions::steering::{Asked, Candidate, Order, Why};
use crate::regions::{Region, RegionId};
use crate::request::{Facts, Moment, hash, hash_ip, unit};
use crate::respond::Refusal;
use crate::routes::{Matched, Patience, Route};
use crate::snapshot::Snapshot;
use crate::upstream::plan::{Mode, Moved};
use crate::upstream::{Plan, Start};

/// The cookie of `steering.read_your_writes`: until when, signed.
pub const WROTE: &str = "portolan-wrote";
/// What clients call the regions that they prefer, and those that they insist on; Fly's names second.
const PREFER: [&str; 2] = ["portolan-prefer-region", "fly-prefer-region"];
const FORCE: [&str; 2] = ["portolan-force-region", "fly-force-region"];

/// What was decided, and the trail of how: explain, the access log and headers read the same.
#[derive(Debug)]
pub struct Decision {
    /// Who asks.
    pub client: ClientAddress,
    /// Where from.
    pub place: Place,
    /// The route, if one matches.
    pub route: Option<Matched>,
    /// Under which keys the request learns (`policy: latency`).
    pub learns: Option<Areas>,
    /// What happens now.
    pub next: Next,
}

/// What happens to a request.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly every request is forwarded, and a box would be its only allocation")]
pub enum Next {
    /// It is answered here.
    Refuse(Refusal),
    /// It goes to an upstream.
    Forward(Plan),
}

/// Decides about one request.
pub fn decide(snapshot: &Snapshot, facts: &Facts<'_>, now: Moment, mode: Mode) -> Decision {
    // Who is asking, and from where.
    let client = snapshot.trust.resolve(facts.peer, facts.headers);
    let place = snapshot.databases.lookup(client.ip);

    // Which service.
    let matched = snapshot.router.find(facts.host, facts.path);
    let route = matched.and_then(|m| snapshot.route(m.route));
    let Some(route) = route else {
        return Decision { client, place, route: None, learns: None, next: Next::Refuse(Refusal::NoRoute) };
    };

    // Where to, in which order.
    let patience = if route.streaming || facts.is_patient() { Patience::Idle } else { Patience::FirstByte };
    let explore = mode == Mode::Commit && facts.is_safe() && !facts.has_body && patience == Patience::FirstByte;
    let chosen = if route.client_regions { Chosen::new(snapshot, route, facts) } else { Chosen::default() };
    let asked = Asked {
        ip: client.ip,
        place: &place,
        safe: facts.is_safe(),
        explore,
        wrote: wrote(snapshot, route, facts),
        prefer: &chosen.prefer,
        force: chosen.force.as_deref(),
        chance: facts.chance,
    };
    let regions = &snapshot.regions;
    let mut order = route.steering.order(regions, &asked);
    // With a body it is the client's upload that is measured.
    let learns = route.steering.areas(client.ip, place.country).filter(|_| patience == Patience::FirstByte && !facts.has_body);
    if order.is_empty() {
        let refusal = Refusal::AllRegionsUnavailable { retry_after: std::time::Duration::from_secs(1), failure: None };
        return Decision { client, place, route: matched, learns: None, next: Next::Refuse(refusal) };
    }
    let pin = pinned(regions, &mut order, facts, now);
    let moved = spread(regions, &mut order, pin, facts, &client, now);
    let pin = pin.filter(|_| moved.is_none()).map(|(_, endpoint)| endpoint);

    // And how patiently.
    let start = Start {
        keys: keys(regions, &order, facts, &client),
        order,
        moved,
        pin,
        may_repeat: facts.is_idempotent() || route.retry.non_idempotent,
        patience,
        measures: patience == Patience::FirstByte && !facts.has_body,
        chance: facts.chance,
        mode,
    };
    let plan = Plan::new(start, route.timeouts, &route.retry, now);
    Decision { client, place, route: matched, learns, next: Next::Forward(plan) }
}

/// What a client says of regions.
#[derive(Debug, Default)]
struct Chosen {
    prefer: SmallVec<[RegionId; 4]>,
    force: Option<SmallVec<[RegionId; 4]>>,
}

impl Chosen {
    fn new(snapshot: &Snapshot, route: &Route, facts: &Facts<'_>) -> Self {
        let list = |names: [&str; 2]| {
            let text = names.iter().find_map(|name| facts.header(name))?;
            let mut list: SmallVec<[RegionId; 4]> = SmallVec::new();
            // One that the route does not name is no preference; insisting on it leaves nothing.
            for name in text.split(',').take(snapshot.regions.len()) {
                let region = snapshot.region_named(name.trim()).filter(|id| route.steering.reach().any(|r| r == *id));
                list.extend(region.filter(|id| !list.contains(id)));
            }
            Some(list)
        };
        Self { prefer: list(PREFER).unwrap_or_default(), force: list(FORCE) }
    }
}

/// Did this client write just now, as its cookie says?
fn wrote(snapshot: &Snapshot, route: &Route, facts: &Facts<'_>) -> bool {
    let Some(writes) = route.steering.writes.as_ref().filter(|w| w.read_your_writes.is_some()) else { return false };
    let until = facts.cookie(WROTE).and_then(|signed| snapshot.key.open(WROTE, signed)).and_then(|text| text.parse::<u64>().ok());
    // A cookie from before a shorter `read_your_writes` came into force does not outlive it.
    let longest = writes.read_your_writes.map_or(0, |span| span.as_secs() + 2);
    until.is_some_and(|until| until > facts.time.as_secs() && until - facts.time.as_secs() <= longest)
}

/// The endpoint that the client's cookie names, if it may be used; its region comes first then.
fn pinned(regions: &[Region], order: &mut Order, facts: &Facts<'_>, now: Moment) -> Option<(RegionId, u64)> {
    let named = |candidate: &Candidate| {
        let region = regions.get(usize::from(candidate.region.0))?;
        let cookie = facts.cookie(&region.affinity.as_ref()?.cookie)?;
        let found = region.upstreams.iter().find_map(|u| u.state.tagged(cookie));
        let open = !region.state.is_away(now) || region.state.keeps_clients(now);
        found.filter(|e| open && e.is_usable(now)).map(|e| (candidate.region, e.id))
    };
    let pin = order.iter().find_map(named)?;
    let why = order.first().map(|c| c.why);
    // Writes and the like have one place, whatever a cookie says.
    if !matches!(why, Some(Why::Writes | Why::Forced | Why::ReadYourWrites)) {
        let at = order.iter().position(|c| c.region == pin.0).unwrap_or(0);
        if at > 0 {
            order.remove(at);
            order.insert(0, Candidate { region: pin.0, why: Why::Affinity });
        }
    }
    Some(pin)
}

/// Moves a part of the requests on where the first region lost a part of its upstreams, or an operator takes
/// it out. A pinned client moves once, with its part.
fn spread(
    regions: &[Region],
    order: &mut Order,
    pin: Option<(RegionId, u64)>,
    facts: &Facts<'_>,
    client: &ClientAddress,
    now: Moment,
) -> Option<(RegionId, Moved)> {
    let first = *order.first()?;
    let region = |c: &Candidate| regions.get(usize::from(c.region.0));
    // Two regions that take writes at the same time would be two truths, and another one does not know the last.
    if order.len() < 2 || matches!(first.why, Why::Writes | Why::Forced | Why::ReadYourWrites) {
        return None;
    }
    let own = region(&first)?;
    let pinned = pin.is_some_and(|(region, _)| region == first.region);
    if pinned && (own.state.keeps_clients(now) || own.state.share(now) >= 1.0) {
        return None;
    }
    let capacity = own.capacity(now);
    let others = order.iter().skip(1).filter_map(|c| Some(region(c)?.capacity(now)));
    let shares = spill::shares(std::iter::once(capacity).chain(others));
    let chance = if pinned { hash_ip(client.ip) } else { facts.chance };
    let drawn = spill::draw(&shares, unit(chance)).unwrap_or(0);
    let rush = || {
        let all = order.iter().filter_map(region).map(|r| r.state.in_flight()).sum();
        capacity.ramp > 0.0 && !spill::takes_one_more(capacity.ramp, own.state.in_flight(), all)
    };
    let (to, why) = match drawn {
        // What is in slow start hands a rush on to the next that is fit.
        0 if capacity.ramp < 1.0 && rush() => {
            let fit = |c: &Candidate| region(c).is_some_and(|r| r.capacity(now).ramp >= 1.0 && !r.state.is_away(now));
            (order.iter().position(fit)?, Moved::SlowStart)
        }
        0 => return None,
        to if capacity.granted < 1.0 => (to, Moved::Away),
        to if capacity.usable > 0.0 => (to, Moved::Spill),
        to => (to, Moved::Ejected),
    };
    let moved = order.remove(to);
    order.insert(0, moved);
    Some((first.region, why))
}

/// Hashes for the candidates that balance by one.
fn keys(regions: &[Region], order: &Order, facts: &Facts<'_>, client: &ClientAddress) -> SmallVec<[(RegionId, u64); 2]> {
    let key = |candidate: &Candidate| {
        let Balance::Hash(field) = &regions.get(usize::from(candidate.region.0))?.balance else { return None };
        let key = match field {
            Field::Ip => Some(hash_ip(client.ip)),
            Field::Cookie(name) => facts.cookie(name).map(|value| hash(value.as_bytes())),
            Field::Header(name) => facts.headers.get(name).map(|value| hash(value.as_bytes())),
        };
        Some((candidate.region, key?))
    };
    order.iter().filter_map(key).collect()
}
