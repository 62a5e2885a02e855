//! The journey of a request, once, in order. Deterministic; it neither waits nor writes.

mod target;
mod verdict;

use std::cell::OnceCell;

use http::{HeaderValue, Method};
use smallvec::SmallVec;

use crate::cache::key::Key;
use crate::cache::{self, Bypass, Lookup};
use crate::client::address::ClientAddress;
use crate::client::place::Place;
use crate::limits::{Asked as LimitsAsked, Question, Stage};
use crate::overload::Places;
use crate::regions::balance::{Balance, Field};
use crate::regions::latency::Areas;
use crate::regions::spill;
use crate::regions::steering::{Asked, Candidate, Order, Why};
use crate::regions::{Region, RegionId};
use crate::request::{Facts, Moment, announced, hash, hash_ip, unit};
use crate::respond::Refusal;
use crate::routes::{Matched, Patience, Route};
use crate::rules::View;
use crate::rules::view::{Asker, Response, Target};
use crate::snapshot::Snapshot;
use crate::transforms::Change;
use crate::upstream::plan::{Mode, Moved};
use crate::upstream::{Plan, Start};
use crate::waf::{Findings, Later, Matches, Ruling, challenge};
pub use target::rewritten;
use target::{over_tls, own_target, secured};
pub use verdict::inspect;
use verdict::{Limited, answered, judge, limit, stop};

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
    /// Rules that applied, in order.
    pub matches: Matches,
    /// Limits that applied, in order.
    pub limits: LimitsAsked,
    /// How important it is: a position in `overload.classes`.
    pub class: u8,
    /// The places that it takes as long as it lasts.
    pub places: Places,
    /// The path that routes and rules saw, where that is not what was sent.
    pub path: Option<Box<str>>,
    /// What transforms change, if anything.
    pub changes: Option<Box<Changes>>,
    /// What the store may be asked for.
    pub cache: Option<Box<Lookup>>,
    /// Why it is not.
    pub bypass: Option<Bypass>,
    /// It was, and had nothing.
    pub missed: bool,
    /// What waits for the body: see [`inspect`].
    pub later: Option<Later>,
    /// A header for an answer of ours: where to go, or a cookie; or what it proves.
    pub header: Option<HeaderValue>,
    /// What happens now.
    pub next: Next,
}

/// What transforms change.
#[derive(Debug, Default)]
pub struct Changes {
    /// Path and query for the origin.
    pub target: Option<String>,
    /// Headers for the origin.
    pub headers: Vec<Change>,
}

/// What happens to a request.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly every request is forwarded, and a box would be its only allocation")]
pub enum Next {
    /// It is answered here.
    Refuse(Refusal),
    /// It is asked again once its body is there.
    NeedBody,
    /// The store is asked; if that has nothing it is decided again.
    Lookup,
    /// It is asked again once all nodes together have answered this.
    NeedShared(Question),
    /// It goes to an upstream.
    Forward(Plan),
}

/// What a request has already that is asked about again.
#[derive(Debug, Default)]
pub struct Earlier {
    /// What limits said.
    pub limits: LimitsAsked,
    /// Its places.
    pub places: Places,
    /// The store had nothing.
    pub missed: bool,
}

impl Earlier {
    /// Of a request that asks for itself what somebody who passed has been given stale.
    pub fn background() -> Self {
        let mut limits = LimitsAsked::default();
        limits.skip();
        Self { limits, places: Places::default(), missed: true }
    }

    /// Takes it out of an earlier decision.
    pub fn of(decision: &mut Decision) -> Self {
        let (limits, places) = (std::mem::take(&mut decision.limits), std::mem::take(&mut decision.places));
        Self { limits, places, missed: decision.missed }
    }
}

/// Decides about one request.
pub fn decide(snapshot: &Snapshot, facts: &Facts<'_>, now: Moment, mode: Mode) -> Decision {
    resume(snapshot, facts, now, mode, None)
}

/// Decides about a request of which something was missing before: the places that it has, and what limits gave it
/// then, are not taken again.
pub fn resume(snapshot: &Snapshot, facts: &Facts<'_>, now: Moment, mode: Mode, earlier: Option<Earlier>) -> Decision {
    // Who is asking, and from where.
    let client = snapshot.trust.resolve(facts.peer, facts.headers);
    let place = snapshot.databases.lookup(client.ip);
    let asker = asker(snapshot, &client, &place, now);
    let mut trail = Trail {
        client,
        place,
        route: None,
        learns: None,
        matches: Matches::new(),
        limits: LimitsAsked::default(),
        class: 0,
        places: Places::default(),
        path: None,
        changes: None,
        cache: None,
        bypass: None,
        missed: earlier.as_ref().is_some_and(|e| e.missed),
        later: None,
    };
    if let Some(fault) = facts.fault {
        return trail.refuse(Refusal::Faulty { fault }, None);
    }
    if let Some(proof) = snapshot.acme.answer(facts.path) {
        return trail.refuse(Refusal::Proof, HeaderValue::from_str(&proof).ok());
    }
    if facts.misdirected {
        return trail.refuse(Refusal::Misdirected, None);
    }
    if facts.path == challenge::PATH && (snapshot.waf.challenges() || snapshot.limits.challenges()) {
        let (refusal, header) = answered(snapshot, facts, &client, now, mode);
        return trail.refuse(refusal, header);
    }

    // What it asks for, as everybody understands it; perhaps elsewhere, perhaps under another name.
    let target = Target::new(facts);
    if !snapshot.transforms.redirects.is_empty()
        && let Some((status, location)) = snapshot.transforms.redirect(&View::new(facts, &target, asker))
    {
        return trail.refuse(Refusal::Redirected { status }, Some(location));
    }
    let (target, applied) = rewritten(snapshot, facts, asker, target);
    trail.path = (*target.path != *facts.path).then(|| (*target.path).into());

    // Which service.
    let matched = routed(snapshot, facts, &target, asker);
    let route = matched.and_then(|m| snapshot.route(m.route));
    let Some(route) = route else { return trail.refuse(Refusal::NoRoute, None) };
    trail.route = matched;
    if let Some(port) = route.https
        && !over_tls(facts, &client)
    {
        let to = secured(facts, port);
        return trail.refuse(if to.is_some() { Refusal::Redirected { status: 308 } } else { Refusal::BadRequest }, to);
    }

    if route.max_body.is_some_and(|most| announced(facts.headers).is_some_and(|length| length > most)) {
        return trail.refuse(Refusal::BodyTooLarge, None);
    }

    // How much at once. (Whoever has its places keeps them.)
    let routed = OnceCell::new();
    let view = || {
        routed.get_or_init(|| {
            let mut view = View::new(facts, &target, asker);
            view.route = Some(&route.name);
            view
        })
    };
    if let Some(elsewhere) = &route.redirect {
        let to = elsewhere.render(view());
        // Where a part of the address is missing there is nowhere to go, and nobody else to ask.
        let refusal = if to.is_some() { Refusal::Redirected { status: elsewhere.status } } else { Refusal::BadRequest };
        return trail.refuse(refusal, to);
    }
    trail.class = snapshot.overload.class(view);
    match earlier {
        Some(Earlier { limits, places, missed: _ }) => (trail.limits, trail.places) = (limits, places),
        None => {
            let bound = route.bound.as_ref().map(|(count, most)| (count, *most));
            // A question is no request.
            let admitted = match mode {
                Mode::Commit => snapshot.overload.admit(client.ip, trail.class, bound),
                Mode::Peek => snapshot.overload.would_admit(client.ip, trail.class, bound).map(|()| Places::default()),
            };
            match admitted {
                Ok(places) => trail.places = places,
                Err(reason) => return trail.refuse(Refusal::Shed { reason }, None),
            }
        }
    }

    // May it pass.
    if !snapshot.waf.is_empty() || !snapshot.limits.is_empty() {
        let view = view();
        let mut findings = Findings { open: mode == Mode::Peek, ..Findings::default() };
        let mut ruling = judge(snapshot, view, &mut findings);
        // How often. The managed ruleset reads no body of who asked too often.
        if findings.unlimited {
            trail.limits.skip();
        }
        if ruling == Ruling::Pass {
            match limit(snapshot, view, Stage::Arrival, mode, &mut trail.limits) {
                Ok(()) => {}
                Err(limited) => {
                    trail.matches = findings.matches;
                    return trail.limited(limited);
                }
            }
        }
        if ruling == Ruling::Pass {
            ruling = snapshot.waf.judge_managed(view, &mut findings);
        }
        trail.matches = findings.matches;
        trail.later = findings.later;
        match ruling {
            Ruling::Pass => {}
            Ruling::NeedBody => return trail.end(Next::NeedBody, None),
            stopped => {
                let (refusal, header) = stop(snapshot, view, stopped, mode);
                return trail.refuse(refusal, header);
            }
        }
    }

    // Whoever purges is a client like any other up to here.
    if let Some(token) = &snapshot.cache.purge_token
        && facts.method.as_str() == cache::PURGE
    {
        let may = cache::may_purge(token, facts.headers);
        return trail.refuse(if may { Refusal::Purged } else { Refusal::PurgeRefused }, None);
    }

    // What the origin would see, for that is what the answer is of.
    let mut own = None;
    if !applied.is_empty() || route.rewrite.is_some() {
        let mut changes = Changes { target: target.to_origin(), headers: snapshot.transforms.request(view(), &applied) };
        if let Some(rewrite) = &route.rewrite {
            own = own_target(route, view(), &target);
            changes.target = own.clone().or(changes.target);
            rewrite.transform.request.changes(view(), &mut changes.headers);
        }
        trail.changes = (changes.target.is_some() || !changes.headers.is_empty()).then(|| Box::new(changes));
    }

    // Is the answer here already?
    match snapshot.cache.look(route.cache, own.as_deref(), view) {
        cache::Asked::Off => {}
        cache::Asked::Bypass(bypass) => trail.bypass = Some(bypass),
        // One region's answer is wanted, and that of no other; or the origin hears of a certificate, and may answer to that.
        cache::Asked::Lookup(_) if facts.certified || insists(route, facts) || wrote(snapshot, route, facts) => {
            trail.bypass = Some(Bypass::Request);
        }
        cache::Asked::Lookup(lookup) => {
            trail.cache = Some(lookup);
            if !trail.missed && mode == Mode::Commit {
                return trail.end(Next::Lookup, None);
            }
        }
    }
    if snapshot.limits.at_origin()
        && let Err(limited) = limit(snapshot, view(), Stage::Origin, mode, &mut trail.limits)
    {
        return trail.limited(limited);
    }

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
    if order.is_empty() {
        let refusal = Refusal::AllRegionsUnavailable { retry_after: std::time::Duration::from_secs(1), failure: None };
        return trail.refuse(refusal, None);
    }
    // With a body it is the client's upload that is measured.
    trail.learns = route.steering.areas(client.ip, place.country).filter(|_| patience == Patience::FirstByte && !facts.has_body);
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
        share: snapshot.overload.share(trail.class),
        chance: facts.chance,
        mode,
    };
    trail.end(Next::Forward(Plan::new(start, route.timeouts, &route.retry, now)), None)
}

/// What is known of a request so far.
struct Trail {
    client: ClientAddress,
    place: Place,
    route: Option<Matched>,
    learns: Option<Areas>,
    matches: Matches,
    limits: LimitsAsked,
    class: u8,
    places: Places,
    path: Option<Box<str>>,
    changes: Option<Box<Changes>>,
    cache: Option<Box<Lookup>>,
    bypass: Option<Bypass>,
    missed: bool,
    later: Option<Later>,
}

impl Trail {
    #[inline]
    fn end(self, next: Next, header: Option<HeaderValue>) -> Decision {
        // Exhaustive, so that nothing is lost on the way.
        let Self { client, place, route, learns, matches, limits, class, places, path, changes, cache, bypass, missed, later } =
            self;
        Decision {
            client,
            place,
            route,
            learns,
            matches,
            limits,
            class,
            places,
            path,
            changes,
            cache,
            bypass,
            missed,
            later,
            header,
            next,
        }
    }

    fn limited(self, limited: Limited) -> Decision {
        match limited {
            Limited::Ask(question) => self.end(Next::NeedShared(question), None),
            Limited::Refused((refusal, header)) => self.refuse(refusal, header),
        }
    }

    fn refuse(self, refusal: Refusal, header: Option<HeaderValue>) -> Decision {
        self.end(Next::Refuse(refusal), header)
    }
}

/// Who asks, as rules see it.
pub fn asker<'a>(snapshot: &'a Snapshot, client: &ClientAddress, place: &'a Place, now: Moment) -> Asker<'a> {
    Asker {
        ip: client.ip,
        trusted_peer: client.trusted_peer,
        place,
        databases: &snapshot.databases,
        lists: &snapshot.lists,
        standing: &snapshot.standing,
        now,
    }
}

/// What transforms change of a response's headers. Limits that wait for the response count it.
pub fn responded(
    snapshot: &Snapshot,
    facts: &Facts<'_>,
    decision: &Decision,
    response: Response<'_>,
    now: Moment,
) -> Vec<Change> {
    let asker = asker(snapshot, &decision.client, &decision.place, now);
    let (target, applied) = rewritten(snapshot, facts, asker, Target::new(facts));
    let mut view = View::new(facts, &target, asker);
    view.route = decision.route.and_then(|m| snapshot.route(m.route)).map(|r| &*r.name);
    view.response = Some(response);
    if snapshot.limits.waits(&decision.limits) {
        snapshot.limits.settle(&decision.limits, &view);
    }
    let mut changes = match snapshot.transforms.edits_responses() {
        true => snapshot.transforms.response(&view, &applied),
        false => Vec::new(),
    };
    if let Some(rewrite) = decision.route.and_then(|m| snapshot.route(m.route)?.rewrite.as_ref()) {
        rewrite.transform.response.changes(&view, &mut changes);
    }
    changes
}

/// Which route a request takes.
fn routed(snapshot: &Snapshot, facts: &Facts<'_>, target: &Target<'_>, asker: Asker<'_>) -> Option<Matched> {
    let seen = OnceCell::new();
    let view = || seen.get_or_init(|| View::new(facts, target, asker));
    let suits =
        |route: &Matched| snapshot.route(route.route).is_some_and(|r| r.filter.as_ref().is_none_or(|f| f.matches(view())));
    snapshot.router.find(facts.host, &target.path, suits)
}

/// Under which key the response to a GET of the same target is stored, if it may be.
pub fn stored_under(snapshot: &Snapshot, facts: &Facts<'_>, decision: &Decision, now: Moment) -> Option<Key> {
    let facts = &Facts { method: &Method::GET, has_body: false, ..*facts };
    let asker = asker(snapshot, &decision.client, &decision.place, now);
    let (target, _) = rewritten(snapshot, facts, asker, Target::new(facts));
    let route = snapshot.route(routed(snapshot, facts, &target, asker)?.route)?;
    let mut view = View::new(facts, &target, asker);
    view.route = Some(&route.name);
    match snapshot.cache.look(route.cache, own_target(route, &view, &target).as_deref(), || &view) {
        cache::Asked::Lookup(lookup) => Some(lookup.key),
        cache::Asked::Off | cache::Asked::Bypass(_) => None,
    }
}

/// Does the client insist on a region?
fn insists(route: &Route, facts: &Facts<'_>) -> bool {
    route.client_regions && FORCE.iter().any(|name| facts.headers.contains_key(*name))
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
