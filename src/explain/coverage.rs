//! Which region serves whom: for a map.

use std::net::Ipv4Addr;

use serde::Serialize;

use crate::client::atlas::{self, Point};
use crate::client::country::LookupResult;
use crate::client::place::Place;
use crate::config::units::Country;
use crate::regions::steering::{Asked, Why};
use crate::regions::{RegionId, spill};
use crate::request::Moment;
use crate::routes::Route;
use crate::snapshot::Snapshot;

/// A country, and who serves its people.
#[derive(Debug, Clone, Copy)]
pub struct Served {
    /// The country.
    pub country: Country,
    /// The region that steering puts first, and why.
    pub home: RegionId,
    /// Why it stands there.
    pub why: Why,
    /// The region that most of its requests begin in now; nothing while none is usable.
    pub by: Option<RegionId>,
}

/// Where a region is drawn.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spot {
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
    /// It says so itself; or else it is in the middle of those whom it is there for.
    pub known: bool,
}

/// Who serves each country, by the steering of `route`.
pub fn coverage(snapshot: &Snapshot, route: &Route, now: Moment) -> Vec<Served> {
    let serve = |country| {
        let place = Place { country, lookup: LookupResult::Found, subdivision: None, city: None };
        let asked = Asked {
            ip: Ipv4Addr::UNSPECIFIED.into(),
            place: &place,
            safe: true,
            explore: false,
            wrote: false,
            prefer: &[],
            force: None,
            chance: 0,
        };
        let order = route.steering.order(&snapshot.regions, &asked);
        let first = order.first()?;
        let regions = order.iter().filter_map(|candidate| snapshot.region(candidate.region));
        let shares = spill::shares(regions.map(|region| region.capacity(now)));
        let most =
            shares.iter().enumerate().filter(|(_, share)| **share > 0.0).max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
        let by = most.and_then(|(place, _)| order.get(place)).map(|candidate| candidate.region);
        Some(Served { country, home: first.region, why: first.why, by })
    };
    atlas::countries().chain([Country::UNKNOWN]).filter_map(serve).collect()
}

/// Where a region is, or where those are whom it is there for.
pub fn spot(snapshot: &Snapshot, region: RegionId, coverage: &[Served]) -> Option<Spot> {
    let at = |point: Point, known| Spot { latitude: point.latitude(), longitude: point.longitude(), known };
    if let Some(location) = snapshot.region(region)?.location {
        return Some(at(location, true));
    }
    // Whoever has no region of its own says little about where the default one is.
    let own = |served: &&Served| served.home == region && served.why != Why::Default;
    let centres = coverage.iter().filter(own).filter_map(|served| atlas::centre(served.country));
    Point::middle(centres).map(|middle| at(middle, false))
}
