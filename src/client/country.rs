//! From an address to a country, by a database in MaxMind's format (MaxMind DB 2.0).

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::SystemTime;

use maxminddb::{PathElement, Reader, WithinOptions};
use rustc_hash::FxHashSet;

use super::address::{canonical, is_special};
use crate::config::units::Country;

/// Where a database keeps the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// `country.iso_code`, else `registered_country.iso_code`: MaxMind, DB-IP.
    MaxMind,
    /// `country_code`: iptoasn and other flat layouts.
    CountryCode,
    /// `country`, a text: IPinfo and other flat layouts.
    Country,
}

const LAYOUTS: [Layout; 3] = [Layout::MaxMind, Layout::CountryCode, Layout::Country];

/// How a lookup ended; a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupResult {
    /// The database knows the country.
    Found,
    /// It does not, or the address is private.
    Unknown,
    /// There is no database.
    NoDatabase,
    /// The database could not be read at this address.
    Error,
}

impl LookupResult {
    /// Every result, in the order of their labels.
    pub const ALL: [Self; 4] = [Self::Found, Self::Unknown, Self::NoDatabase, Self::Error];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::Unknown => "unknown",
            Self::NoDatabase => "no_database",
            Self::Error => "error",
        }
    }
}

/// A country database, whole in memory.
pub struct CountryDatabase {
    reader: Reader<Vec<u8>>,
    layout: Layout,
    /// The file.
    pub path: PathBuf,
    /// When its makers built it.
    pub built: SystemTime,
    /// What its makers call it.
    pub kind: String,
}

impl std::fmt::Debug for CountryDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CountryDatabase").field("path", &self.path).field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl CountryDatabase {
    /// Reads a database that is already in memory, and makes sure that every record of it can be read.
    pub fn new(path: PathBuf, bytes: Vec<u8>) -> Result<Self, String> {
        let reader = Reader::from_source(bytes).map_err(|e| e.to_string())?;
        let metadata = reader.metadata();
        let built = metadata.build_time().map_err(|e| e.to_string())?;
        let kind = metadata.database_type.clone();
        let layout = verify(&reader)?
            .ok_or_else(|| format!("`{kind}` has no country: looked for country.iso_code, country_code and country"))?;
        Ok(Self { reader, layout, path, built, kind })
    }

    /// The country of `ip`; private addresses have none.
    pub fn lookup(&self, ip: IpAddr) -> (Country, LookupResult) {
        let ip = canonical(ip);
        if is_special(ip) {
            return (Country::UNKNOWN, LookupResult::Unknown);
        }
        // An IPv4-only database says `Err` to an IPv6 address; it simply does not know it.
        let Ok(record) = self.reader.lookup(ip) else {
            return (Country::UNKNOWN, LookupResult::Unknown);
        };
        match read(&record, self.layout) {
            Ok(Some(country)) => (country, LookupResult::Found),
            Ok(None) => (Country::UNKNOWN, LookupResult::Unknown),
            Err(_) => (Country::UNKNOWN, LookupResult::Error),
        }
    }
}

type Record<'a> = maxminddb::LookupResult<'a, Vec<u8>>;

fn read(record: &Record<'_>, layout: Layout) -> Result<Option<Country>, maxminddb::MaxMindDbError> {
    let at = |path: &[PathElement<'_>]| record.decode_path::<&str>(path);
    let code = match layout {
        Layout::MaxMind => match at(&[PathElement::Key("country"), PathElement::Key("iso_code")])? {
            Some(code) => Some(code),
            None => at(&[PathElement::Key("registered_country"), PathElement::Key("iso_code")])?,
        },
        Layout::CountryCode => at(&[PathElement::Key("country_code")])?,
        Layout::Country => at(&[PathElement::Key("country")])?,
    };
    Ok(code.and_then(Country::from_database))
}

/// Reads every record once and returns the layout of those that have a country.
fn verify(reader: &Reader<Vec<u8>>) -> Result<Option<Layout>, String> {
    let mut layout = None;
    every_record(reader, |record| match layout {
        None => {
            layout = LAYOUTS.into_iter().find(|layout| matches!(read(record, *layout), Ok(Some(_))));
            Ok(())
        }
        Some(layout) => read(record, layout).map(drop),
    })?;
    Ok(layout)
}

/// Calls `each` with every record once, and makes sure that the tree is one. (The reader's own `verify`
/// refuses files without a description, which real ones lack.)
pub(super) fn every_record(
    reader: &Reader<Vec<u8>>,
    mut each: impl FnMut(&Record<'_>) -> Result<(), maxminddb::MaxMindDbError>,
) -> Result<(), String> {
    // A sound tree of n nodes has at most n + 1 leaves; a cycle would go on for ever.
    let limit = usize::try_from(reader.metadata().node_count).unwrap_or(usize::MAX).saturating_add(1);
    let mut seen = FxHashSet::default();
    for (i, record) in reader.networks(WithinOptions::default()).map_err(|e| e.to_string())?.enumerate() {
        let record = record.map_err(|e| e.to_string())?;
        if i > limit {
            return Err("its search tree is not a tree".to_owned());
        }
        if record.offset().is_some_and(|offset| seen.insert(offset)) {
            each(&record).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}
