//! From a client and its request to regions in order, each with the reason for its place.
//!
//! The order is made in steps, each of which may put regions in front:
//!
//! 1. the policy: geo, weighted, proximity or latency; then `failover`, without repeats;
//! 2. `writes` and `read_your_writes`;
//! 3. what the client asks for, where the route allows it, among the regions that the route names;
//! 4. `only` at last: whatever the steps before said, nothing else is left.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use serde::Serialize;
use smallvec::SmallVec;

use super::balance::score;
use super::latency::{Areas, Latency, Prior};
use super::{Region, RegionId};
use crate::client::atlas::{self, Point};
use crate::client::place::Place;
use crate::config::units::{Area, Continent, Country};
use crate::request::hash_ip;

/// Why a region stands where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// `steering.countries` names it for the client's subdivision.
    Subdivision,
    /// `steering.countries` names it for the client's country.
    Country,
    /// `steering.continents` names it for the client's continent.
    Continent,
    /// `steering.default` names it.
    Default,
    /// Its weight, and a draw.
    Weighted,
    /// Its distance from the client.
    Proximity,
    /// What was learned of its time to first byte.
    Latency,
    /// It is tried out, so that something is learned.
    Exploration,
    /// `steering.failover` names it.
    Failover,
    /// `steering.writes` names it, and the method is unsafe.
    Writes,
    /// `steering.writes_failover` names it, and the method is unsafe.
    WritesFailover,
    /// `steering.writes` names it, and the client wrote just now.
    ReadYourWrites,
    /// The client prefers it.
    Preferred,
    /// The client insists on it.
    Forced,
    /// The client's cookie names an upstream in it.
    Affinity,
    /// An upstream asked for it.
    Replay,
}

/// A region that may serve the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// The region.
    pub region: RegionId,
    /// Why it stands here.
    pub why: Why,
}

/// Regions in the order in which they are tried, without repeats.
pub type Order = SmallVec<[Candidate; 8]>;

/// What steering has to know of a request.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Who asks.
    pub ip: IpAddr,
    /// Where the client is.
    pub place: &'a Place,
    /// Its method changes nothing.
    pub safe: bool,
    /// It may be used to learn, and counts.
    pub explore: bool,
    /// The client wrote just now (`read_your_writes`).
    pub wrote: bool,
    /// Regions that the client prefers.
    pub prefer: &'a [RegionId],
    /// The only regions that the client accepts; any, if there is no list.
    pub force: Option<&'a [RegionId]>,
    /// A random number.
    pub chance: u64,
}

/// A route's steering, ready to be asked.
#[derive(Debug, Default)]
pub struct Steering {
    /// How regions are ordered.
    pub policy: Policy,
    /// Orders by the client's area.
    pub geo: Geo,
    /// Regions that dynamic policies order.
    pub pool: Vec<RegionId>,
    /// Tried after all that.
    pub failover: Vec<RegionId>,
    /// No other region is ever tried.
    pub only: Option<Vec<RegionId>>,
    /// What is special about writes.
    pub writes: Option<Writes>,
}

/// How regions are ordered.
#[derive(Debug, Clone, Default)]
pub enum Policy {
    /// By area.
    #[default]
    Geo,
    /// By weight; a sticky draw is the client's own.
    Weighted {
        /// In the order of the pool.
        weights: Vec<u32>,
        /// Draw by the client's address.
        sticky: bool,
    },
    /// By distance.
    Proximity,
    /// By what was learned.
    Latency {
        /// Everything that was learned.
        learned: Arc<Latency>,
        /// Stands for the route.
        route: u64,
    },
}

/// Regions by area.
#[derive(Debug, Default)]
pub struct Geo {
    subdivisions: FxHashMap<Area, Vec<RegionId>>,
    countries: FxHashMap<Country, (Vec<RegionId>, Why)>,
    default: Vec<RegionId>,
}

/// Where writes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writes {
    /// The primary region.
    pub primary: RegionId,
    /// And if it fails.
    pub failover: Vec<RegionId>,
    /// For how long a client's reads follow its writes.
    pub read_your_writes: Option<Duration>,
}

impl Geo {
    /// Tables by area; a continent stands for its countries that are not named themselves.
    pub fn new(areas: Vec<(Area, Vec<RegionId>)>, continents: Vec<(Continent, Vec<RegionId>)>, default: Vec<RegionId>) -> Self {
        let mut geo = Self { default, ..Self::default() };
        for (area, regions) in areas {
            match area.subdivision {
                Some(_) => drop(geo.subdivisions.insert(area, regions)),
                None => drop(geo.countries.insert(area.country, (regions, Why::Country))),
            }
        }
        for (continent, regions) in continents {
            for country in atlas::countries_of(continent) {
                geo.countries.entry(country).or_insert_with(|| (regions.clone(), Why::Continent));
            }
        }
        geo
    }

    /// The most specific: subdivision, country, continent, default.
    fn of(&self, place: &Place) -> (&[RegionId], Why) {
        if place.subdivision.is_some()
            && let Some(regions) = self.subdivisions.get(&place.area())
        {
            return (regions, Why::Subdivision);
        }
        match self.countries.get(&place.country) {
            Some((regions, why)) => (regions, *why),
            None => (&self.default, Why::Default),
        }
    }

    /// Every list.
    fn lists(&self) -> impl Iterator<Item = &[RegionId]> {
        let countries = self.countries.values().map(|(regions, _)| regions);
        self.subdivisions.values().chain(countries).chain([&self.default]).map(Vec::as_slice)
    }

    /// Every region that is named.
    pub fn named(&self) -> impl Iterator<Item = RegionId> {
        self.lists().flatten().copied()
    }
}

impl Steering {
    /// The regions for a request.
    pub fn order(&self, regions: &[Region], asked: &Asked<'_>) -> Order {
        let mut order = Order::new();
        let mut add = |region: RegionId, why: Why| {
            if order.iter().all(|c: &Candidate| c.region != region) {
                order.push(Candidate { region, why });
            }
        };
        match &self.writes {
            Some(writes) if !asked.safe => {
                add(writes.primary, Why::Writes);
                writes.failover.iter().for_each(|region| add(*region, Why::WritesFailover));
                // What a client prefers is about being near; writes have one place. Insisting can only refuse it.
                order.retain(|c| self.allows(c.region) && asked.force.is_none_or(|force| force.contains(&c.region)));
                return order;
            }
            Some(writes) if asked.wrote => add(writes.primary, Why::ReadYourWrites),
            Some(_) | None => {}
        }
        asked.prefer.iter().for_each(|region| add(*region, Why::Preferred));
        match &self.policy {
            Policy::Geo => self.by_area(asked, &mut add),
            Policy::Weighted { weights, sticky } => self.by_weight(regions, weights, *sticky, asked, &mut add),
            Policy::Proximity => self.by_distance(regions, asked, &mut add),
            Policy::Latency { learned, route } => self.by_latency(regions, learned, *route, asked, &mut add),
        }
        self.failover.iter().for_each(|region| add(*region, Why::Failover));
        self.allowed(order, asked.force)
    }

    /// Leaves what `only` and the client allow. The lists of a client have no repeats, and only regions that the
    /// route reaches.
    fn allowed(&self, mut order: Order, force: Option<&[RegionId]>) -> Order {
        if let Some(force) = force {
            order = force.iter().map(|region| Candidate { region: *region, why: Why::Forced }).collect();
        }
        order.retain(|c| self.allows(c.region));
        order
    }

    /// May a request of this route ever go there?
    pub fn allows(&self, region: RegionId) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&region))
    }

    /// Every region that a request may go to.
    pub fn reach(&self) -> impl Iterator<Item = RegionId> {
        let writes = self.writes.iter().flat_map(|w| std::iter::once(&w.primary).chain(&w.failover)).copied();
        let pool = self.pool.iter().chain(&self.failover).copied();
        pool.chain(self.geo.named()).chain(writes).filter(|region| self.allows(*region))
    }

    /// Every order there is: what is left of each when a region goes?
    pub fn orders(&self) -> Vec<Vec<RegionId>> {
        let with_failover = |regions: &[RegionId]| regions.iter().chain(&self.failover).copied().collect::<Vec<_>>();
        let mut orders: Vec<Vec<RegionId>> = match self.policy {
            Policy::Weighted { .. } => vec![with_failover(&self.pool)],
            Policy::Geo | Policy::Proximity | Policy::Latency { .. } => self.geo.lists().map(with_failover).collect(),
        };
        if let Policy::Proximity | Policy::Latency { .. } = self.policy {
            orders.push(with_failover(&self.pool));
        }
        if let Some(writes) = &self.writes {
            orders.push(std::iter::once(writes.primary).chain(writes.failover.iter().copied()).collect());
        }
        orders.iter_mut().for_each(|order| order.retain(|region| self.allows(*region)));
        orders
    }

    /// The keys under which a request learns, if it does.
    pub fn areas(&self, ip: IpAddr, country: Country) -> Option<Areas> {
        match &self.policy {
            Policy::Latency { learned: _, route } => Some(Areas::new(*route, ip, country)),
            Policy::Geo | Policy::Weighted { .. } | Policy::Proximity => None,
        }
    }

    /// What was learned of `region`, in ms.
    pub fn learned(&self, areas: Areas, region: &Region) -> Option<f32> {
        match &self.policy {
            Policy::Latency { learned, route: _ } => learned.estimate(areas, region.id),
            Policy::Geo | Policy::Weighted { .. } | Policy::Proximity => None,
        }
    }

    /// A request got its first byte from `region` after `took`.
    pub fn learn(&self, areas: Areas, region: &Region, took: Duration) {
        if let Policy::Latency { learned, route: _ } = &self.policy {
            learned.learn(areas, region.id, took);
        }
    }

    fn by_area(&self, asked: &Asked<'_>, add: &mut impl FnMut(RegionId, Why)) {
        let (regions, why) = self.geo.of(asked.place);
        regions.iter().for_each(|region| add(*region, why));
    }

    fn by_weight(
        &self,
        regions: &[Region],
        weights: &[u32],
        sticky: bool,
        asked: &Asked<'_>,
        add: &mut impl FnMut(RegionId, Why),
    ) {
        let key = if sticky { hash_ip(asked.ip) } else { asked.chance };
        let score = |(region, weight): (&RegionId, &u32)| {
            let id = regions.get(usize::from(region.0)).map_or(0, |r| r.id);
            (score(key, id, *weight as f32), *region)
        };
        let mut drawn: SmallVec<[(f64, RegionId); 8]> = self.pool.iter().zip(weights).map(score).collect();
        drawn.sort_by(|a, b| b.0.total_cmp(&a.0));
        drawn.iter().for_each(|(_, region)| add(*region, Why::Weighted));
    }

    /// The pool by distance; without the client's coordinates by area.
    fn by_distance(&self, regions: &[Region], asked: &Asked<'_>, add: &mut impl FnMut(RegionId, Why)) {
        let Some(client) = asked.place.point() else {
            self.by_area(asked, add);
            return;
        };
        self.near(regions, client).into_iter().for_each(|region| add(region, Why::Proximity));
    }

    fn near(&self, regions: &[Region], client: Point) -> SmallVec<[RegionId; 8]> {
        let location = |region: &RegionId| regions.get(usize::from(region.0))?.location;
        let mut near: SmallVec<[(f64, RegionId); 8]> =
            self.pool.iter().filter_map(|region| Some((client.distance(location(region)?), *region))).collect();
        near.sort_by(|a, b| a.0.total_cmp(&b.0));
        near.into_iter().map(|(_, region)| region).collect()
    }

    /// The pool by what was learned; what nothing is known of comes by distance, then by area.
    fn by_latency(
        &self,
        regions: &[Region],
        learned: &Latency,
        route: u64,
        asked: &Asked<'_>,
        add: &mut impl FnMut(RegionId, Why),
    ) {
        let mut base: SmallVec<[(RegionId, Why); 8]> = SmallVec::new();
        let mut put = |region: RegionId, why| {
            if base.iter().all(|(known, _)| *known != region) {
                base.push((region, why));
            }
        };
        if let Some(client) = asked.place.point() {
            self.near(regions, client).into_iter().for_each(|region| put(region, Why::Proximity));
        }
        self.by_area(asked, &mut put);
        self.pool.iter().for_each(|region| put(*region, Why::Latency));
        base.retain(|(region, _)| self.pool.contains(region));
        let prior = |(region, _): &(RegionId, Why)| {
            let region = regions.get(usize::from(region.0));
            Prior { region: region.map_or(0, |r| r.id), check_time: region.and_then(|r| r.state.check_time()) }
        };
        let priors: SmallVec<[Prior; 8]> = base.iter().map(prior).collect();
        let ranking = learned.rank(Areas::new(route, asked.ip, asked.place.country), &priors, asked.explore);
        for (i, (at, estimate)) in ranking.order.iter().enumerate() {
            let Some((region, why)) = base.get(usize::from(*at)).copied() else { continue };
            let why = match estimate {
                _ if i == 0 && ranking.explores => Why::Exploration,
                Some(_) => Why::Latency,
                None => why,
            };
            add(region, why);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::client::country::LookupResult;

    const R: [RegionId; 4] = [RegionId(0), RegionId(1), RegionId(2), RegionId(3)];

    fn place(area: &str) -> Place {
        let area: Area = area.parse().unwrap();
        Place { country: area.country, lookup: LookupResult::Found, subdivision: area.subdivision, city: None }
    }

    fn asked(place: &Place) -> Asked<'_> {
        let ip = "192.0.2.1".parse().unwrap();
        Asked { ip, place, safe: true, explore: false, wrote: false, prefer: &[], force: None, chance: 0 }
    }

    /// London, Virginia, Tokyo, and nowhere.
    fn regions() -> Vec<Region> {
        let locations = [Some((51.5, -0.1)), Some((39.0, -77.5)), Some((35.7, 139.7)), None];
        let region = |(i, location): (usize, Option<(f64, f64)>)| Region {
            location: location.map(|(latitude, longitude)| Point::new(latitude, longitude)),
            ..crate::regions::fixtures::region(&format!("r{i}"), &[])
        };
        locations.into_iter().enumerate().map(region).collect()
    }

    fn seen(order: &Order) -> Vec<(u16, Why)> {
        order.iter().map(|c| (c.region.0, c.why)).collect()
    }

    fn geo() -> Geo {
        let area = |text: &str, regions: &[RegionId]| (text.parse().unwrap(), regions.to_vec());
        Geo::new(vec![area("GB", &[R[1], R[0]]), area("US-CA", &[R[3]])], vec![(Continent::EU, vec![R[2]])], vec![R[0]])
    }

    #[test]
    fn the_most_specific_then_failover_without_repeats() {
        let steering = Steering { geo: geo(), failover: vec![R[0], R[1], R[2]], ..Steering::default() };
        let order = |area: &str| seen(&steering.order(&[], &asked(&place(area))));
        use Why::*;
        assert_eq!(order("GB"), [(1, Country), (0, Country), (2, Failover)]);
        assert_eq!(order("FR"), [(2, Continent), (0, Failover), (1, Failover)]);
        assert_eq!(order("US-CA"), [(3, Subdivision), (0, Failover), (1, Failover), (2, Failover)]);
        assert_eq!(order("US-NY"), [(0, Default), (1, Failover), (2, Failover)]);
        assert_eq!(order("XX"), [(0, Default), (1, Failover), (2, Failover)]);
    }

    #[test]
    fn nearest_first_and_by_area_without_coordinates() {
        let steering = Steering { policy: Policy::Proximity, geo: geo(), pool: R.to_vec(), ..Steering::default() };
        let order = |area: &str| steering.order(&regions(), &asked(&place(area))).iter().map(|c| c.region.0).collect::<Vec<_>>();
        assert_eq!(order("FR"), [0, 1, 2]);
        assert_eq!(order("KR"), [2, 0, 1]);
        assert_eq!(order("CU"), [1, 0, 2]);
        assert_eq!(order("XX"), [0]);
        let cuba = Place { city: Some(Point::new(35.0, 135.0)), ..place("CU") };
        assert_eq!(steering.order(&regions(), &asked(&cuba))[0].region.0, 2, "coordinates beat the centroid");
    }

    #[test]
    fn weights_are_kept_and_sticky_clients_stay() {
        let policy = |sticky| Policy::Weighted { weights: vec![3, 1], sticky };
        let mut steering = Steering { policy: policy(false), pool: R[..2].to_vec(), ..Steering::default() };
        let (place, regions) = (place("GB"), regions());
        let mut random = fastrand::Rng::with_seed(7);
        let mut first = |steering: &Steering, ip: IpAddr| {
            let order = steering.order(&regions, &Asked { ip, chance: random.u64(..), ..asked(&place) });
            assert_eq!(order.len(), 2);
            order[0].region
        };
        let same = "192.0.2.1".parse().unwrap();
        let count = (0..10_000).filter(|_| first(&steering, same) == R[0]).count();
        assert!((7_300..7_700).contains(&count), "{count}");
        steering.policy = policy(true);
        let stays = first(&steering, same);
        assert!((0..100).all(|_| first(&steering, same) == stays));
        let count = (0..10_000u32).filter(|i| first(&steering, IpAddr::from(i.to_be_bytes())) == R[0]).count();
        assert!((7_300..7_700).contains(&count), "{count}");
    }

    #[test]
    fn writes_have_one_place() {
        let writes = Writes { primary: R[3], failover: vec![], read_your_writes: None };
        let mut steering = Steering { geo: geo(), failover: vec![R[0]], writes: Some(writes), ..Steering::default() };
        let (gb, prefer) = (place("GB"), [R[2]]);
        let write = |steering: &Steering| seen(&steering.order(&[], &Asked { safe: false, prefer: &prefer, ..asked(&gb) }));
        assert_eq!(write(&steering), [(3, Why::Writes)]);
        let read = Asked { wrote: true, ..asked(&gb) };
        assert_eq!(seen(&steering.order(&[], &read))[..2], [(3, Why::ReadYourWrites), (1, Why::Country)]);
        if let Some(writes) = &mut steering.writes {
            writes.failover = vec![R[1], R[3]];
        }
        assert_eq!(write(&steering), [(3, Why::Writes), (1, Why::WritesFailover)]);
    }

    #[test]
    fn clients_choose_where_they_may() {
        let steering = Steering { geo: geo(), failover: vec![R[0]], only: Some(vec![R[0], R[1]]), ..Steering::default() };
        let gb = place("GB");
        let prefer = Asked { prefer: &[R[0], R[2]], ..asked(&gb) };
        assert_eq!(seen(&steering.order(&[], &prefer)), [(0, Why::Preferred), (1, Why::Country)]);
        let force = Asked { force: Some(&[R[3], R[0]]), ..asked(&gb) };
        assert_eq!(seen(&steering.order(&[], &force)), [(0, Why::Forced)]);
        let writes = Writes { primary: R[0], failover: vec![R[1]], read_your_writes: None };
        let steering = Steering { writes: Some(writes), ..steering };
        assert_eq!(seen(&steering.order(&[], &Asked { safe: false, ..force })), [(0, Why::Writes)]);
        let elsewhere = Asked { safe: false, force: Some(&[R[3]]), ..asked(&gb) };
        assert_eq!(seen(&steering.order(&[], &elsewhere)), [], "insisting moves no write");
    }

    fn some_regions() -> impl Strategy<Value = Vec<RegionId>> {
        prop::collection::vec((0u16..4).prop_map(RegionId), 0..4)
    }

    proptest! {
        /// Residency: whatever else is configured or asked for, `only` holds.
        #[test]
        fn no_request_leaves_only(
            only in prop::collection::vec((0u16..4).prop_map(RegionId), 1..3),
            (default, failover, pool, prefer) in (some_regions(), some_regions(), some_regions(), some_regions()),
            force in prop::option::of(some_regions()),
            writes in prop::option::of((0u16..4, some_regions())),
            policy in 0usize..4,
            (safe, wrote, explore, chance) in (any::<bool>(), any::<bool>(), any::<bool>(), any::<u64>()),
            area in prop::sample::select(vec!["GB", "US-CA", "XX", "JP", "FR"]),
        ) {
            let learned = Arc::new(Latency::default());
            let policies = [
                Policy::Geo,
                Policy::Weighted { weights: vec![1; pool.len()], sticky: chance % 2 == 0 },
                Policy::Proximity,
                Policy::Latency { learned, route: 1 },
            ];
            let steering = Steering {
                policy: policies[policy].clone(),
                geo: Geo::new(vec![("GB".parse().unwrap(), failover.clone())], vec![(Continent::EU, pool.clone())], default),
                pool,
                failover,
                only: Some(only.clone()),
                writes: writes.map(|(primary, failover)| Writes { primary: RegionId(primary), failover, read_your_writes: None }),
            };
            let place = place(area);
            let asked = Asked { safe, wrote, explore, chance, prefer: &prefer, force: force.as_deref(), ..asked(&place) };
            let order = steering.order(&regions(), &asked);
            prop_assert!(order.iter().all(|c| only.contains(&c.region)), "{order:?} leaves {only:?}");
            prop_assert!(steering.reach().all(|region| only.contains(&region)));
        }
    }
}
