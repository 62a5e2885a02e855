//! Where the client is, by the databases that there are.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use super::asn::AsnDatabase;
use super::atlas::{self, Point};
use super::city::CityDatabase;
use super::country::{CountryDatabase, LookupResult};
use crate::config::units::{Area, Country, Subdivision};

/// The databases.
#[derive(Debug, Clone, Default)]
pub struct Databases {
    /// Addresses to countries.
    pub countries: Option<Arc<CountryDatabase>>,
    /// Addresses to subdivisions and coordinates, and to countries where there is no other.
    pub cities: Option<Arc<CityDatabase>>,
    /// Addresses to autonomous systems.
    pub systems: Option<Arc<AsnDatabase>>,
}

/// Where a client is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// The country; `XX` if it is not known.
    pub country: Country,
    /// How it was found.
    pub lookup: LookupResult,
    /// The subdivision of the country.
    pub subdivision: Option<Subdivision>,
    /// The coordinates in the city database.
    pub city: Option<Point>,
}

/// The database that countries come from.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// What its makers call it.
    pub kind: &'a str,
    /// The file.
    pub path: &'a Path,
    /// When its makers built it.
    pub built: SystemTime,
}

impl Databases {
    /// The database that countries come from, if there is one.
    pub fn source(&self) -> Option<Source<'_>> {
        match (&self.countries, &self.cities) {
            (Some(db), _) => Some(Source { kind: &db.kind, path: &db.path, built: db.built }),
            (None, Some(db)) => Some(Source { kind: &db.kind, path: &db.path, built: db.built }),
            (None, None) => None,
        }
    }

    /// The number of the autonomous system that `ip` belongs to.
    pub fn asn(&self, ip: IpAddr) -> Option<u32> {
        self.systems.as_ref()?.lookup(ip)
    }

    /// A text of the city database, such as `["city", "names", "en"]`.
    pub fn city_text(&self, ip: IpAddr, path: &[&str]) -> Option<&str> {
        self.cities.as_ref()?.text(ip, path)
    }

    /// A number of the city database's `location`.
    pub fn city_number(&self, ip: IpAddr, name: &str) -> Option<f64> {
        self.cities.as_ref()?.number(ip, name)
    }

    /// Where `ip` is.
    pub fn lookup(&self, ip: IpAddr) -> Place {
        let city = self.cities.as_ref().map(|db| db.lookup(ip));
        let (country, lookup) = match (&self.countries, city) {
            (Some(db), _) => db.lookup(ip),
            (None, Some((city, result))) => (city.country.unwrap_or(Country::UNKNOWN), result),
            (None, None) => (Country::UNKNOWN, LookupResult::NoDatabase),
        };
        let city = city.map(|(city, _)| city).unwrap_or_default();
        // Two databases may not agree; a subdivision of another country would be nonsense.
        let subdivision = city.subdivision.filter(|_| city.country == Some(country));
        Place { country, lookup, subdivision, city: city.point }
    }
}

impl Place {
    /// As an area: the most that is known.
    pub fn area(&self) -> Area {
        Area { country: self.country, subdivision: self.subdivision }
    }

    /// The coordinates, or else the centre of the country.
    pub fn point(&self) -> Option<Point> {
        self.city.or_else(|| atlas::centre(self.country))
    }
}
