//! What survives a restart: files that are whole or not there, and times that another process understands.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::proxy::clock;
use crate::request::Moment;

/// Both clocks at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// The process's own.
    pub moment: Moment,
    /// Milliseconds since 1970.
    pub unix: u64,
}

impl Now {
    /// This moment.
    pub fn new() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { moment: clock::now(), unix: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX) }
    }

    /// The time of day of `moment`.
    pub fn unix(self, moment: Moment) -> u64 {
        let (later, earlier) = (moment.since(self.moment), self.moment.since(moment));
        self.unix.saturating_add(later.as_millis() as u64).saturating_sub(earlier.as_millis() as u64)
    }

    /// The moment of a time of day.
    pub fn moment(self, unix: u64) -> Moment {
        let later = Duration::from_millis(unix.saturating_sub(self.unix));
        let earlier = Duration::from_millis(self.unix.saturating_sub(unix));
        Moment(self.moment.after(later).0.saturating_sub(earlier))
    }
}

impl Default for Now {
    fn default() -> Self {
        Self::new()
    }
}

/// Writes a file whole or not at all: beside it, to disk, then in its place.
pub fn replace(dir: &Path, name: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let new = dir.join(format!("{name}.new"));
    let mut file = std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&new, dir.join(name))?;
    std::fs::File::open(dir)?.sync_all()
}

/// The last moment that has a date of four digits: 9999-12-31T23:59:59Z.
const LAST: u64 = 253_402_300_799_000;

/// Milliseconds since 1970 as a date.
pub fn rfc3339(unix: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(unix.min(LAST))).to_string()
}
