//! From a country to regions in order, each with the reason for its place.

use std::sync::Arc;

use serde::Serialize;

use super::RegionId;
use crate::config::units::Country;

/// Why a region stands where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// `steering.countries` names it for the client's country.
    Country,
    /// `steering.default` names it.
    Default,
    /// `steering.failover` names it.
    Failover,
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
pub type Order = Arc<[Candidate]>;

/// A route's steering, ready to be asked.
#[derive(Debug)]
pub struct Steering {
    /// By country, sorted for binary search.
    countries: Box<[(Country, Order)]>,
    default: Order,
}

impl Steering {
    /// Puts `failover` behind each list and drops repeats.
    pub fn new(countries: Vec<(Country, Vec<RegionId>)>, default: &[RegionId], failover: &[RegionId]) -> Self {
        let order = |first: &[RegionId], why| {
            let first = first.iter().map(|region| Candidate { region: *region, why });
            let after = failover.iter().map(|region| Candidate { region: *region, why: Why::Failover });
            let mut order: Vec<Candidate> = Vec::new();
            for candidate in first.chain(after) {
                if order.iter().all(|c| c.region != candidate.region) {
                    order.push(candidate);
                }
            }
            Order::from(order)
        };
        let mut countries: Vec<_> =
            countries.into_iter().map(|(country, regions)| (country, order(&regions, Why::Country))).collect();
        countries.sort_by_key(|(country, _)| *country);
        Self { countries: countries.into(), default: order(default, Why::Default) }
    }

    /// The regions for `country`.
    pub fn order(&self, country: Country) -> &Order {
        self.countries
            .binary_search_by_key(&country, |(country, _)| *country)
            .ok()
            .and_then(|i| self.countries.get(i))
            .map_or(&self.default, |(_, order)| order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn country_then_failover_without_repeats() {
        let r = RegionId;
        let steering = Steering::new(
            vec![("GB".parse().unwrap(), vec![r(1), r(0)]), ("AU".parse().unwrap(), vec![r(3)])],
            &[r(0)],
            &[r(0), r(1), r(2)],
        );
        let order = |c: &str| steering.order(c.parse().unwrap()).iter().map(|c| (c.region.0, c.why)).collect::<Vec<_>>();
        use Why::*;
        assert_eq!(order("GB"), [(1, Country), (0, Country), (2, Failover)]);
        assert_eq!(order("AU"), [(3, Country), (0, Failover), (1, Failover), (2, Failover)]);
        assert_eq!(order("XX"), [(0, Default), (1, Failover), (2, Failover)]);
    }
}
