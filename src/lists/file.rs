//! Files of lists, in the forms in which others publish them.
//!
//! - text: one entry a line; `#` and `;` begin a comment (FireHOL's `.netset`, Spamhaus's `drop.txt`).
//!   An address may be followed by a score, a category and an expiry: `192.0.2.0/24,60,scanner,2027-01-31T00:00:00Z`;
//! - JSON lines with `cidr` (Spamhaus's `drop_v4.json`);
//! - one JSON object with `prefixes` of `ipv4Prefix` or `ipv6Prefix` (Google's and Bing's crawlers).

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use serde_json::Value as Json;

use super::ranges::IpRange;

/// More than this in a file is a mistake; 64 MiB hold four million networks.
pub const MAX_FILE: u64 = 64 << 20;

/// A file is garbled if more than one line in this many cannot be read.
const GARBLED: usize = 20;

/// An address range as a file tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The addresses.
    pub range: IpRange,
    /// Its own score, 1 to 100.
    pub score: Option<u8>,
    /// Until when it counts, since 1970.
    pub expires: Option<Duration>,
}

/// Lines of a file: what could be read, and what could not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lines<T> {
    /// What could be read.
    pub entries: Vec<T>,
    /// Lines that could not be read; there are few of them.
    pub skipped: usize,
}

/// Reads addresses. The error says what is wrong with the whole.
pub fn addresses(text: &str) -> Result<Lines<Entry>, String> {
    let trimmed = text.trim_start();
    if trimmed.starts_with('{')
        && let Ok(json) = serde_json::from_str::<Json>(trimmed)
        && let Some(prefixes) = json.get("prefixes").and_then(Json::as_array)
    {
        let network = |p: &Json| ["ipv4Prefix", "ipv6Prefix"].iter().find_map(|key| p.get(key)?.as_str().map(str::to_owned));
        return collect(prefixes.iter().map(|p| network(p).unwrap_or_else(|| p.to_string())), |text| Some(plain(range(text)?)));
    }
    lines(text, address)
}

/// Reads entries of another kind, one a line.
pub fn lines<T>(text: &str, parse: impl Fn(&str) -> Option<T>) -> Result<Lines<T>, String> {
    let content = text.lines().map(|line| line.trim_start_matches('\u{feff}').trim());
    let content = content.filter(|line| !line.is_empty() && !line.starts_with(['#', ';']) && !is_metadata(line));
    collect(content.map(str::to_owned), |line| parse(line))
}

fn collect<T>(lines: impl Iterator<Item = String>, parse: impl Fn(&str) -> Option<T>) -> Result<Lines<T>, String> {
    let mut all = Lines { entries: Vec::new(), skipped: 0 };
    let mut first = None;
    for line in lines {
        match parse(&line) {
            Some(entry) => all.entries.push(entry),
            None => {
                all.skipped += 1;
                first.get_or_insert(line);
            }
        }
    }
    let total = all.entries.len() + all.skipped;
    match first {
        Some(line) if all.skipped * GARBLED > total => {
            let shown: String = line.chars().take(60).collect();
            Err(format!("{} of its {total} lines cannot be read; the first is `{}`", all.skipped, shown.escape_debug()))
        }
        _ => Ok(all),
    }
}

/// Spamhaus ends its JSON lines with one about the file.
fn is_metadata(line: &str) -> bool {
    line.starts_with('{')
        && serde_json::from_str::<Json>(line).is_ok_and(|json| json.get("type").is_some_and(|t| t == "metadata"))
}

fn plain(range: IpRange) -> Entry {
    Entry { range, score: None, expires: None }
}

fn address(line: &str) -> Option<Entry> {
    if line.starts_with('{') {
        return range(serde_json::from_str::<Json>(line).ok()?.get("cidr")?.as_str()?).map(plain);
    }
    let line = line.split(['#', ';']).next().unwrap_or_default();
    let mut fields = line.split(',').map(str::trim);
    let mut entry = plain(range(fields.next()?)?);
    if let Some(score) = fields.next().filter(|s| !s.is_empty()) {
        entry.score = Some(score.parse().ok().filter(|s| (1..=100).contains(s))?);
    }
    // The category is for people.
    let _category = fields.next();
    if let Some(expires) = fields.next().filter(|e| !e.is_empty()) {
        entry.expires = Some(time(expires)?);
    }
    fields.next().is_none().then_some(entry)
}

/// A network, an address, or `first-last`.
pub fn range(text: &str) -> Option<IpRange> {
    if let Ok(net) = text.parse::<IpNet>() {
        // Host bits are forgiven, but not of what is rather a longer prefix cut short.
        let short = if net.addr().is_ipv4() { 8 } else { 16 };
        return (net.trunc() == net || net.prefix_len() >= short).then(|| net.trunc().into());
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(ip.into());
    }
    let (first, last) = text.split_once('-')?;
    IpRange::new(first.trim().parse().ok()?, last.trim().parse().ok()?)
}

/// Seconds since 1970, a day, or a time as RFC 3339 has it.
fn time(text: &str) -> Option<Duration> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok().map(Duration::from_secs);
    }
    let time = humantime::parse_rfc3339_weak(text).or_else(|_| humantime::parse_rfc3339(&format!("{text}T00:00:00Z")));
    time.ok()?.duration_since(UNIX_EPOCH).ok()
}

/// Is the entry in force at `now`?
pub fn in_force(entry: &Entry, now: SystemTime) -> bool {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    entry.expires.is_none_or(|expires| expires > now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Entry {
        let lines = addresses(text).unwrap();
        assert_eq!((lines.entries.len(), lines.skipped), (1, 0), "{text}");
        lines.entries[0]
    }

    #[test]
    fn forms() {
        let net = |text: &str| range(text).unwrap();
        assert_eq!(one("# FireHOL\n#\n192.0.2.0/24\n").range, net("192.0.2.0/24"));
        assert_eq!(one("; Spamhaus DROP List\n192.0.2.0/24 ; SBL1\n").range, net("192.0.2.0/24"));
        let drop = "{\"cidr\":\"192.0.2.0/24\",\"sblid\":\"SBL1\",\"rir\":\"apnic\"}\n{\"type\":\"metadata\",\"records\":1}\n";
        assert_eq!(one(drop).range, net("192.0.2.0/24"));
        let google =
            r#"{"creationTime": "2026-01-01", "prefixes": [{"ipv6Prefix": "2001:db8::/64"}, {"ipv4Prefix": "192.0.2.0/27"}]}"#;
        assert_eq!(addresses(google).unwrap().entries.len(), 2);
        assert_eq!(one("192.0.2.7,60,scanner,2027-01-31").expires, Some(Duration::from_secs(1_801_353_600)));
        assert_eq!(one("192.0.2.7, 60").score, Some(60));
        assert_eq!(one("192.0.2.1-192.0.2.9").range, net("192.0.2.1-192.0.2.9"));
        assert_eq!(one("192.0.2.9/24").range, net("192.0.2.0/24"), "files are forgiven their host bits");
        assert!(range("203.0.113.0/2").is_none() && range("0.0.0.0/1").is_some(), "a line that is cut short");
        assert_eq!(addresses("").unwrap().entries, []);
    }

    #[test]
    fn garbled() {
        assert!(addresses("<html>\n<body>502 Bad Gateway</body>").unwrap_err().contains("2 of its 2 lines"));
        let mostly = format!("{}nonsense\n", "192.0.2.1\n".repeat(40));
        assert_eq!(addresses(&mostly).unwrap().skipped, 1);
        for bad in ["192.0.2.1,0", "192.0.2.1,101", "192.0.2.1,5,x,never", "192.0.2.1,5,x,1,1", "10.0.0.2-10.0.0.1"] {
            assert!(addresses(bad).is_err(), "{bad}");
        }
    }
}
