//! From an address to a subdivision and coordinates, by a city database in MaxMind's format.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::SystemTime;

use maxminddb::PathElement::{Index, Key};
use maxminddb::{MaxMindDbError, Reader};

use super::address::{canonical, is_special};
use super::atlas::Point;
use super::country::{LookupResult, every_record};
use crate::config::units::{Country, Subdivision};

/// A city database, whole in memory.
pub struct CityDatabase {
    reader: Reader<Vec<u8>>,
    /// The file.
    pub path: PathBuf,
    /// When its makers built it.
    pub built: SystemTime,
    /// What its makers call it.
    pub kind: String,
}

/// What a city database says of an address.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct City {
    /// The country.
    pub country: Option<Country>,
    /// The first subdivision: a state, a province, a nation of the United Kingdom.
    pub subdivision: Option<Subdivision>,
    /// About where.
    pub point: Option<Point>,
}

impl std::fmt::Debug for CityDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CityDatabase").field("path", &self.path).field("kind", &self.kind).finish_non_exhaustive()
    }
}

type Record<'a> = maxminddb::LookupResult<'a, Vec<u8>>;

impl CityDatabase {
    /// Reads a database that is already in memory, and makes sure that every record of it can be read.
    pub fn new(path: PathBuf, bytes: Vec<u8>) -> Result<Self, String> {
        let reader = Reader::from_source(bytes).map_err(|e| e.to_string())?;
        let built = reader.metadata().build_time().map_err(|e| e.to_string())?;
        let kind = reader.metadata().database_type.clone();
        let mut located = false;
        every_record(&reader, |record| {
            let city = read(record)?;
            located |= city.point.is_some() || city.subdivision.is_some();
            Ok(())
        })?;
        match located {
            true => Ok(Self { reader, path, built, kind }),
            false => Err(format!("`{kind}` has neither location.latitude nor subdivisions")),
        }
    }

    /// What is known of `ip`; private addresses have nothing.
    pub fn lookup(&self, ip: IpAddr) -> (City, LookupResult) {
        let ip = canonical(ip);
        if is_special(ip) {
            return (City::default(), LookupResult::Unknown);
        }
        // An IPv4-only database says `Err` to an IPv6 address; it simply does not know it.
        let Ok(record) = self.reader.lookup(ip) else { return (City::default(), LookupResult::Unknown) };
        match read(&record) {
            Ok(city) if city.country.is_some() => (city, LookupResult::Found),
            Ok(city) => (city, LookupResult::Unknown),
            Err(_) => (City::default(), LookupResult::Error),
        }
    }
}

impl CityDatabase {
    /// A text of the record of `ip`; steps that are numbers are positions. Nothing if it is not there.
    pub fn text(&self, ip: IpAddr, path: &[&str]) -> Option<&str> {
        let steps: Vec<_> = path.iter().map(|step| step.parse().map_or(Key(step), Index)).collect();
        self.record(ip)?.decode_path(&steps).ok()?
    }

    /// A number of the `location` of `ip`. Nothing if it is not there.
    pub fn number(&self, ip: IpAddr, name: &str) -> Option<f64> {
        let path = [Key("location"), Key(name)];
        let record = self.record(ip)?;
        // Databases keep whole numbers as such.
        record.decode_path::<f64>(&path).ok().flatten().or_else(|| record.decode_path::<u16>(&path).ok()?.map(f64::from))
    }

    fn record(&self, ip: IpAddr) -> Option<Record<'_>> {
        let ip = canonical(ip);
        if is_special(ip) { None } else { self.reader.lookup(ip).ok() }
    }
}

fn read(record: &Record<'_>) -> Result<City, MaxMindDbError> {
    let country = record.decode_path::<&str>(&[Key("country"), Key("iso_code")])?;
    let subdivision = record.decode_path::<&str>(&[Key("subdivisions"), Index(0), Key("iso_code")])?;
    let latitude = record.decode_path::<f64>(&[Key("location"), Key("latitude")])?;
    let longitude = record.decode_path::<f64>(&[Key("location"), Key("longitude")])?;
    Ok(City {
        country: country.and_then(Country::from_database),
        subdivision: subdivision.and_then(Subdivision::from_database),
        point: latitude.zip(longitude).map(|(latitude, longitude)| Point::new(latitude, longitude)),
    })
}
