//! The header fields that speak of caching, read as leniently as their RFCs allow and no further.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName};

/// The most that a number of seconds may say; more is this (RFC 9111, section 1.2.2).
pub const FOREVER: u64 = 1 << 31;

/// `Cache-Control`, or a field targeted at caches like this one (RFC 9111, section 5.2; RFC 9213).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directives {
    /// `max-age` in seconds.
    pub max_age: Option<u64>,
    /// `s-maxage` in seconds.
    pub s_maxage: Option<u64>,
    /// `stale-while-revalidate` in seconds (RFC 5861).
    pub stale_while_revalidate: Option<u64>,
    /// `stale-if-error` in seconds (RFC 5861).
    pub stale_if_error: Option<u64>,
    /// `max-stale` of a request: any staleness, or so many seconds.
    pub max_stale: Option<u64>,
    /// `min-fresh` of a request, in seconds.
    pub min_fresh: Option<u64>,
    /// `no-store`.
    pub no_store: bool,
    /// `no-cache` for the whole response.
    pub no_cache: bool,
    /// `private` for the whole response.
    pub private: bool,
    /// `public`.
    pub public: bool,
    /// `must-revalidate`.
    pub must_revalidate: bool,
    /// `proxy-revalidate`.
    pub proxy_revalidate: bool,
    /// `must-understand`.
    pub must_understand: bool,
    /// `only-if-cached` of a request.
    pub only_if_cached: bool,
    /// Fields that `no-cache` and `private` name: they are not stored.
    pub unstored: Vec<HeaderName>,
}

impl Directives {
    /// Of every `Cache-Control` line. A number that is none is 0: better stale than wrong (section 4.2.1).
    pub fn of(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        for line in headers.get_all(http::header::CACHE_CONTROL) {
            for (name, value) in List(line.as_bytes()) {
                found.add(&name, value.as_deref());
            }
        }
        found
    }

    fn add(&mut self, name: &str, value: Option<&str>) {
        let number = || Some(value.and_then(seconds).unwrap_or(0));
        // Where a directive stands twice the first one counts (section 4.2.1).
        let first = |known: &mut Option<u64>| *known = known.or_else(number);
        match name {
            "max-age" => first(&mut self.max_age),
            "s-maxage" => first(&mut self.s_maxage),
            "stale-while-revalidate" => first(&mut self.stale_while_revalidate),
            "stale-if-error" => first(&mut self.stale_if_error),
            "min-fresh" => first(&mut self.min_fresh),
            "max-stale" => self.max_stale = self.max_stale.or(Some(value.map_or(FOREVER, |v| seconds(v).unwrap_or(0)))),
            "no-store" => self.no_store = true,
            "no-cache" => self.no_cache |= !self.named(value),
            "private" => self.private |= !self.named(value),
            "public" => self.public = true,
            "must-revalidate" => self.must_revalidate = true,
            "proxy-revalidate" => self.proxy_revalidate = true,
            "must-understand" => self.must_understand = true,
            "only-if-cached" => self.only_if_cached = true,
            // Others are somebody else's (section 5.2.3), `immutable` (RFC 8246) a browser's.
            _ => {}
        }
    }

    /// Does the directive name fields, and only fields? They are noted then.
    fn named(&mut self, value: Option<&str>) -> bool {
        let names = value.unwrap_or_default().split(',').map(str::trim).filter(|name| !name.is_empty());
        let names: Result<Vec<HeaderName>, _> = names.map(str::parse).collect();
        match names {
            Ok(names) if !names.is_empty() => {
                self.unstored.extend(names);
                true
            }
            _ => false,
        }
    }
}

/// The members of a list of directives: names in lower case, and values without their quotes.
struct List<'a>(&'a [u8]);

impl Iterator for List<'_> {
    type Item = (String, Option<String>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.0.is_empty() {
                return None;
            }
            let (member, rest) = cut(self.0);
            self.0 = rest;
            let member = member.trim_ascii();
            let equals = member.iter().position(|b| *b == b'=');
            let (name, value) = match equals.and_then(|at| member.split_at_checked(at)) {
                Some((name, value)) => (name, value.get(1..)),
                None => (member, None),
            };
            // A space before `=` makes another name of it (RFC 9110, section 5.6.2).
            if name.is_empty() || name.iter().any(u8::is_ascii_whitespace) {
                continue;
            }
            let name = String::from_utf8_lossy(name).to_ascii_lowercase();
            return Some((name, value.map(unquoted)));
        }
    }
}

/// The part before the next comma that stands in no quotes, and what follows it.
fn cut(text: &[u8]) -> (&[u8], &[u8]) {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b',' if !quoted => {
                return (text.get(..at).unwrap_or_default(), text.get(at + 1..).unwrap_or_default());
            }
            _ => {}
        }
    }
    // A quote that never ends ends the list.
    (text, b"")
}

fn unquoted(value: &[u8]) -> String {
    let Some(inner) = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")) else {
        return String::from_utf8_lossy(value).into_owned();
    };
    let mut escaped = false;
    let plain = inner.iter().copied().filter(|byte| {
        escaped = !escaped && *byte == b'\\';
        !escaped
    });
    String::from_utf8_lossy(&plain.collect::<Vec<u8>>()).into_owned()
}

/// `delta-seconds`: digits and nothing else (RFC 9111, section 1.2.2).
pub fn seconds(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // So many digits that they do not fit are more than for ever.
    Some(text.parse().map_or(FOREVER, |n: u64| n.min(FOREVER)))
}

/// `Age` in seconds, if there is one that can be read. Of several the first counts (RFC 9111, section 5.1).
pub fn age(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(http::header::AGE)?.to_str().ok()?;
    seconds(value.split(',').next()?.trim())
}

/// The date in a field that may stand once. `None`: there is none. `Some(None)`: it is no date, or there are two.
pub fn date_field(headers: &HeaderMap, name: &HeaderName) -> Option<Option<SystemTime>> {
    let mut all = headers.get_all(name).iter();
    let first = all.next()?;
    let more = all.next().is_some();
    Some(first.to_str().ok().filter(|_| !more).and_then(date))
}

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: [&str; 7] = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];

/// An HTTP date in one of its three forms (RFC 9110, section 5.6.7), in any case.
pub fn date(text: &str) -> Option<SystemTime> {
    let lower = text.trim().to_ascii_lowercase();
    let words: Vec<&str> = lower.split(' ').collect();
    let (day, month, year, time) = match words[..] {
        // Sun, 06 Nov 1994 08:49:37 GMT
        [name, day, month, year, time, "gmt"] if short_day(name.strip_suffix(',')?) => {
            (fixed(day, 2)?, month, fixed(year, 4)?, time)
        }
        // Sunday, 06-Nov-94 08:49:37 GMT
        [name, date, time, "gmt"] if DAYS.contains(&name.strip_suffix(',')?) => {
            let mut parts = date.splitn(3, '-');
            let (day, month, year) = (parts.next()?, parts.next()?, fixed(parts.next()?, 2)?);
            // What would be more than 50 years ahead is in the past (the same section); nobody writes of 1970 any more.
            (fixed(day, 2)?, month, if year < 70 { year + 2000 } else { year + 1900 }, time)
        }
        // Sun Nov  6 08:49:37 1994
        [name, month, "", day, time, year] if short_day(name) => (fixed(day, 1)?, month, fixed(year, 4)?, time),
        [name, month, day, time, year] if short_day(name) => (fixed(day, 2)?, month, fixed(year, 4)?, time),
        _ => return None,
    };
    let month = MONTHS.iter().position(|m| *m == month)? as u64;
    let mut parts = time.splitn(3, ':');
    let (hour, minute, second) = (fixed(parts.next()?, 2)?, fixed(parts.next()?, 2)?, fixed(parts.next()?, 2)?);
    if hour > 23 || minute > 59 || second > 60 || day == 0 || day > days_of(month, year) || year < 1970 {
        return None;
    }
    let days = days_before(year) + (0..month).map(|m| days_of(m, year)).sum::<u64>() + day - 1;
    UNIX_EPOCH.checked_add(Duration::from_secs(days * 86_400 + hour * 3600 + minute * 60 + second))
}

fn short_day(name: &str) -> bool {
    DAYS.iter().any(|day| day.get(..3) == Some(name))
}

fn fixed(text: &str, digits: usize) -> Option<u64> {
    (text.len() == digits).then(|| seconds(text)).flatten()
}

fn is_leap(year: u64) -> bool {
    (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400)
}

fn days_of(month: u64, year: u64) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

/// Days from 1970 to the first of `year`.
fn days_before(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}
