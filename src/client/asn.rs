//! From an address to the autonomous system that it belongs to, by a database in MaxMind's format.

use std::net::IpAddr;
use std::path::PathBuf;

use maxminddb::PathElement::Key;
use maxminddb::{MaxMindDbError, Reader};

use super::address::{canonical, is_special};
use super::country::every_record;

/// A database of autonomous systems, whole in memory.
pub struct AsnDatabase {
    reader: Reader<Vec<u8>>,
    /// The file.
    pub path: PathBuf,
}

impl std::fmt::Debug for AsnDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AsnDatabase").field("path", &self.path).finish_non_exhaustive()
    }
}

impl AsnDatabase {
    /// Reads a database that is already in memory, and makes sure that every record of it can be read.
    pub fn new(path: PathBuf, bytes: Vec<u8>) -> Result<Self, String> {
        let reader = Reader::from_source(bytes).map_err(|e| e.to_string())?;
        let kind = reader.metadata().database_type.clone();
        let mut known = false;
        every_record(&reader, |record| {
            known |= read(record)?.is_some();
            Ok(())
        })?;
        match known {
            true => Ok(Self { reader, path }),
            false => Err(format!("`{kind}` has neither autonomous_system_number nor asn")),
        }
    }

    /// The number of the system that `ip` belongs to; private addresses have none.
    pub fn lookup(&self, ip: IpAddr) -> Option<u32> {
        let ip = canonical(ip);
        if is_special(ip) {
            return None;
        }
        read(&self.reader.lookup(ip).ok()?).ok()?
    }
}

/// MaxMind and DB-IP have `autonomous_system_number`, flat layouts `asn`, as a number or as `AS64496`.
fn read(record: &maxminddb::LookupResult<'_, Vec<u8>>) -> Result<Option<u32>, MaxMindDbError> {
    if let Some(number) = record.decode_path::<u32>(&[Key("autonomous_system_number")])? {
        return Ok(Some(number));
    }
    if let Ok(number) = record.decode_path::<u32>(&[Key("asn")]) {
        return Ok(number);
    }
    let text = record.decode_path::<&str>(&[Key("asn")])?;
    Ok(text.and_then(|text| text.trim_start_matches("AS").parse().ok()))
}
