//! What real traffic has learned: the time to first byte by client area, route and region.
//!
//! An area is a client's prefix (/20 for IPv4, /44 for IPv6) once it was seen often enough, else its country.
//! Estimates decay with the area's requests: one request in a row moves an estimate by a tenth, one after a
//! long silence by most of the way, so that a rare exploration tells as much as many requests. The best region
//! is only left for one that is 15 % better, so that a tie does not flap.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::time::Duration;

use parking_lot::Mutex;
use rustc_hash::FxBuildHasher;
use smallvec::SmallVec;

use crate::config::units::Country;
use crate::request::{hash, mix};

/// Another region has to be this much better.
const HYSTERESIS: f32 = 0.15;
/// One request of this many explores: 1 %.
const EXPLORE: u32 = 100;
/// How far one request moves an estimate.
const STEP: f32 = 0.1;
/// How far it moves one that nothing was learned of for long.
const LONGEST_STEP: f32 = 0.5;
/// "For long", in requests of the area.
const LONG: u32 = 20;
/// Two samples that differ so much from the estimate are no noise.
const SURPRISE: f32 = 0.3;
/// A prefix speaks for itself from this many requests on.
const MATURE: u32 = 50;
/// Areas that are remembered, over all shards.
const AREAS: usize = 1 << 16;
const SHARDS: usize = 64;

/// The keys under which a request learns: its prefix and its country, each with its route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Areas {
    prefix: u64,
    country: Option<u64>,
}

impl Areas {
    /// Of a client.
    pub fn new(route: u64, ip: IpAddr, country: Country) -> Self {
        let prefix = match ip {
            IpAddr::V4(ip) => u128::from(u32::from(ip) >> 12),
            IpAddr::V6(ip) => 1 << 64 | u128::from(ip) >> 84,
        };
        let prefix = mix(route ^ hash(&prefix.to_be_bytes()));
        let known = country != Country::UNKNOWN;
        Self { prefix, country: known.then(|| mix(route.rotate_left(7) ^ hash(country.as_str().as_bytes()))) }
    }
}

/// What is known of a region before anything was learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prior {
    /// Stands for the region, across reloads.
    pub region: u64,
    /// Time to first byte of its health checks, if there are any.
    pub check_time: Option<Duration>,
}

#[derive(Debug, Default)]
struct Area {
    /// Answers so far.
    count: u32,
    /// Requests so far that might explore.
    asked: u32,
    /// The region that is best, with hysteresis.
    best: u64,
    estimates: SmallVec<[Estimate; 4]>,
}

#[derive(Debug, Clone, Copy)]
struct Estimate {
    region: u64,
    ms: f32,
    /// The last sample.
    last: f32,
    /// The area's count when it was learned last.
    at: u32,
}

/// The order of regions, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// Positions in the list of priors, with the estimate in ms where there is one.
    pub order: SmallVec<[(u16, Option<f32>); 8]>,
    /// The first is not the best, but explored.
    pub explores: bool,
}

/// Everything that was learned. Outlives reloads; at most [`AREAS`] areas.
#[derive(Debug)]
pub struct Latency {
    shards: Box<[Mutex<HashMap<u64, Area, FxBuildHasher>>]>,
}

impl Default for Latency {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }
}

impl Latency {
    fn shard(&self, key: u64) -> Option<&Mutex<HashMap<u64, Area, FxBuildHasher>>> {
        self.shards.get((key % SHARDS as u64) as usize)
    }

    /// The order for a client. `explore`: the request may be used for exploring, and counts. Without a single
    /// estimate or prior the order is the one that came in.
    pub fn rank(&self, areas: Areas, priors: &[Prior], explore: bool) -> Ranking {
        let prefix = self.with(areas.prefix, |area| (area.count >= MATURE).then(|| area.rank(priors, explore))).flatten();
        let country = || areas.country.and_then(|key| self.with(key, |area| area.rank(priors, explore)));
        let own = || self.with(areas.prefix, |area| area.rank(priors, explore));
        let ranking = prefix.or_else(country).or_else(|| if areas.country.is_none() { own() } else { None });
        ranking.unwrap_or_else(|| Area::default().rank(priors, false))
    }

    /// What was learned of `region` for these areas, in ms: by the prefix if it knows, else by the country.
    pub fn estimate(&self, areas: Areas, region: u64) -> Option<f32> {
        let of = |area: &mut Area| area.estimates.iter().find(|e| e.region == region).map(|e| e.ms);
        let mature = self.with(areas.prefix, |area| if area.count >= MATURE { of(area) } else { None }).flatten();
        mature.or_else(|| self.with(areas.country.unwrap_or(areas.prefix), of).flatten())
    }

    /// A request of these areas got its first byte from `region` after `took`.
    pub fn learn(&self, areas: Areas, region: u64, took: Duration) {
        for key in [Some(areas.prefix), areas.country].into_iter().flatten() {
            let Some(shard) = self.shard(key) else { continue };
            let mut shard = shard.lock();
            let full = shard.len() >= AREAS / SHARDS;
            match shard.entry(key) {
                Entry::Occupied(mut area) => area.get_mut().learn(region, took),
                Entry::Vacant(_) if full => {
                    // Of a few, the one that was seen least makes room.
                    let least = shard.iter().take(8).min_by_key(|(_, area)| area.count).map(|(key, _)| *key);
                    if let Some(least) = least {
                        shard.remove(&least);
                    }
                    shard.entry(key).or_default().learn(region, took);
                }
                Entry::Vacant(free) => free.insert(Area::default()).learn(region, took),
            }
        }
    }

    fn with<T>(&self, key: u64, f: impl FnOnce(&mut Area) -> T) -> Option<T> {
        Some(f(self.shard(key)?.lock().get_mut(&key)?))
    }

    /// How many areas are remembered.
    pub fn areas(&self) -> usize {
        self.shards.iter().map(|s| s.lock().len()).sum()
    }
}

impl Area {
    fn learn(&mut self, region: u64, took: Duration) {
        self.count = self.count.saturating_add(1);
        let ms = took.as_secs_f32() * 1_000.0;
        let count = self.count;
        match self.estimates.iter_mut().find(|e| e.region == region) {
            Some(known) => {
                let silence = count.saturating_sub(known.at).max(1);
                let step = (1.0 - (1.0 - STEP).powi(silence.min(1_000) as i32)).min(LONGEST_STEP);
                let surprising = |sample: f32| sample < known.ms * (1.0 - SURPRISE) || sample > known.ms * (1.0 + SURPRISE);
                known.ms = match silence >= LONG && surprising(ms) && surprising(known.last) {
                    true => f32::midpoint(ms, known.last),
                    false => known.ms + (ms - known.ms) * step,
                };
                (known.last, known.at) = (ms, count);
            }
            None => {
                // Regions of configurations long gone make room.
                if self.estimates.len() >= 32
                    && let Some(oldest) = self.estimates.iter().enumerate().min_by_key(|(_, e)| e.at).map(|(i, _)| i)
                {
                    self.estimates.swap_remove(oldest);
                }
                self.estimates.push(Estimate { region, ms, last: ms, at: count });
            }
        }
        let cost = |e: &Estimate| e.ms * self.bonus(e.region);
        self.best = self.estimates.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).map_or(0, |e| e.region);
    }

    /// The best so far counts as 15 % faster than it is.
    fn bonus(&self, region: u64) -> f32 {
        if region == self.best { 1.0 - HYSTERESIS } else { 1.0 }
    }

    fn rank(&mut self, priors: &[Prior], explore: bool) -> Ranking {
        let estimate = |prior: &Prior| {
            let learned = self.estimates.iter().find(|e| e.region == prior.region).map(|e| e.ms);
            learned.or(prior.check_time.map(|t| t.as_secs_f32() * 1_000.0))
        };
        let mut order: SmallVec<[(u16, Option<f32>); 8]> =
            priors.iter().enumerate().map(|(i, prior)| (u16::try_from(i).unwrap_or(u16::MAX), estimate(prior))).collect();
        let region = |i: u16| priors.get(usize::from(i)).map_or(0, |p| p.region);
        // What nothing is known of stays behind, in its order.
        let cost = |(i, ms): &(u16, Option<f32>)| ms.map_or(f32::INFINITY, |ms| ms * self.bonus(region(*i)));
        // The very first order, that of distance or country, is only left for something that is known.
        let first_unknown = order.first().is_some_and(|(_, ms)| ms.is_none());
        if !first_unknown {
            order.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
        }
        if explore {
            self.asked = self.asked.wrapping_add(1);
        }
        let explores = explore && order.len() > 1 && self.asked.is_multiple_of(EXPLORE);
        if explores {
            // One whose last sample was better than the best, or else the one of which was heard least lately.
            let best = order.first().and_then(|(_, ms)| *ms).unwrap_or(0.0);
            let heard = |i: u16| match self.estimates.iter().find(|e| e.region == region(i)) {
                Some(known) if known.last < best * (1.0 - HYSTERESIS) => 0,
                Some(known) => known.at,
                None => 1,
            };
            if let Some(stalest) = (1..order.len()).min_by_key(|at| order.get(*at).map_or(u32::MAX, |(i, _)| heard(*i))) {
                let explored = order.remove(stalest);
                order.insert(0, explored);
            }
        }
        Ranking { order, explores }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests of one country with a matrix of delays, and what came of it.
    struct Simulator {
        latency: Latency,
        areas: Areas,
        priors: Vec<Prior>,
        random: fastrand::Rng,
        explored: usize,
        requests: usize,
    }

    impl Simulator {
        fn new(regions: u64) -> Self {
            let priors = (1..=regions).map(|region| Prior { region, check_time: None }).collect();
            let areas = Areas::new(1, "192.0.2.1".parse().unwrap(), "GB".parse().unwrap());
            Self { latency: Latency::default(), areas, priors, random: fastrand::Rng::with_seed(7), explored: 0, requests: 0 }
        }

        /// Serves `n` requests with these delays, give or take a fifth, and returns where each went.
        fn run(&mut self, n: usize, delays: &[f32]) -> Vec<u16> {
            let mut went = Vec::new();
            for _ in 0..n {
                let ranking = self.latency.rank(self.areas, &self.priors, true);
                let region = ranking.order[0].0;
                self.requests += 1;
                self.explored += usize::from(ranking.explores);
                if !ranking.explores {
                    went.push(region);
                }
                let noise = 0.8 + 0.4 * self.random.f32();
                let took = Duration::from_secs_f32(delays[usize::from(region)] * noise / 1_000.0);
                self.latency.learn(self.areas, self.priors[usize::from(region)].region, took);
            }
            went
        }
    }

    fn switches(went: &[u16]) -> usize {
        went.windows(2).filter(|w| w[0] != w[1]).count()
    }

    #[test]
    fn it_converges_within_300_requests_and_again_when_the_matrix_flips() {
        let mut simulator = Simulator::new(3);
        let settled = |went: &[u16], best| went.iter().all(|r| *r == best);
        simulator.run(300, &[200.0, 100.0, 20.0]);
        assert!(settled(&simulator.run(300, &[200.0, 100.0, 20.0]), 2));
        simulator.run(300, &[20.0, 100.0, 200.0]);
        assert!(settled(&simulator.run(300, &[20.0, 100.0, 200.0]), 0));
        // The best stays, but another becomes better: only exploring can tell.
        simulator.run(300, &[20.0, 100.0, 5.0]);
        assert!(settled(&simulator.run(300, &[20.0, 100.0, 5.0]), 2));
        assert!(simulator.explored * 100 <= simulator.requests, "{} of {}", simulator.explored, simulator.requests);
    }

    #[test]
    fn ties_do_not_flap() {
        let mut simulator = Simulator::new(3);
        simulator.run(300, &[50.0, 50.0, 50.0]);
        let went = simulator.run(3_000, &[50.0, 52.0, 48.0]);
        assert!(switches(&went) <= 1, "{} switches", switches(&went));
    }

    #[test]
    fn health_checks_are_the_prior_and_the_given_order_is_the_last_word() {
        let mut simulator = Simulator::new(3);
        let order = |s: &Simulator| s.latency.rank(s.areas, &s.priors, false).order.iter().map(|(i, _)| *i).collect::<Vec<_>>();
        assert_eq!(order(&simulator), [0, 1, 2]);
        for (prior, ms) in simulator.priors.iter_mut().zip([90, 30, 60]) {
            prior.check_time = Some(Duration::from_millis(ms));
        }
        assert_eq!(order(&simulator), [1, 2, 0]);
        // What was learned beats the prior.
        simulator.latency.learn(simulator.areas, 2, Duration::from_millis(500));
        assert_eq!(order(&simulator), [2, 0, 1]);
    }

    #[test]
    fn the_table_is_bounded_and_looking_changes_nothing() {
        let latency = Latency::default();
        for i in 0..100_000u32 {
            let areas = Areas::new(1, IpAddr::from((i << 12).to_be_bytes()), Country::UNKNOWN);
            latency.learn(areas, 1, Duration::from_millis(5));
        }
        assert!(latency.areas() <= AREAS);
        let simulator = Simulator::new(2);
        let before = simulator.latency.areas();
        simulator.latency.rank(simulator.areas, &simulator.priors, true);
        assert_eq!(simulator.latency.areas(), before);
    }
}
