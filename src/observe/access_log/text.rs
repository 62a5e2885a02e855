//! A line as text, by a template; and what of a request may be told.

use std::borrow::Cow;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::UNIX_EPOCH;

use http::header;

use crate::config::access_log::{Addresses, Field, Piece, Privacy};
use crate::observe::RequestDone;
use crate::observe::why::Why;
use crate::upstream::plan;

/// In place of a value.
const REDACTED: &str = "REDACTED";

/// The client's address, as far as it may be told.
pub fn address(done: &RequestDone<'_>) -> IpAddr {
    match done.live.snapshot.access_log.addresses {
        Addresses::Keep => done.client,
        Addresses::Truncate => truncated(done.client),
    }
}

/// The network of an address.
pub(super) fn truncated(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() & (u32::MAX << 8)).into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 80)).into(),
    }
}

/// The query, as far as it may be told.
pub(super) fn query<'a>(done: &RequestDone<'a>) -> Option<Cow<'a, str>> {
    done.query.and_then(|query| private(query, done.live.snapshot.access_log.query, '&'))
}

/// `Cookie`, as far as it may be told.
pub(super) fn cookies<'a>(done: &RequestDone<'a>) -> Option<Cow<'a, str>> {
    let how = done.live.snapshot.access_log.cookies;
    match how {
        Privacy::Omit => None,
        Privacy::Redact | Privacy::Keep => {
            // HTTP/2 sends each on its own (RFC 9113, section 8.2.3).
            let mut all = done.headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
            match (all.next()?, all.next()) {
                (only, None) => private(only, how, ';'),
                (first, Some(second)) => {
                    let joined = [first, second].into_iter().chain(all).collect::<Vec<_>>().join("; ");
                    private(&joined, how, ';').map(|told| told.into_owned().into())
                }
            }
        }
    }
}

/// `Referer`, with its query as far as that may be told.
pub(super) fn referer<'a>(done: &RequestDone<'a>) -> Option<Cow<'a, str>> {
    let all = done.header(&header::REFERER)?;
    let Some((before, query)) = all.split_once('?') else { return Some(all.into()) };
    Some(match private(query, done.live.snapshot.access_log.query, '&') {
        Some(query) => format!("{before}?{query}").into(),
        None => before.into(),
    })
}

/// Pairs that may be secret.
fn private(pairs: &str, how: Privacy, between: char) -> Option<Cow<'_, str>> {
    match how {
        Privacy::Omit => None,
        Privacy::Keep => Some(pairs.into()),
        Privacy::Redact => {
            // What has no name may be a secret itself.
            let one = |pair: &str| match pair.split_once('=') {
                Some((name, _)) => format!("{name}={REDACTED}"),
                None if pair.trim().is_empty() => pair.to_owned(),
                None => REDACTED.to_owned(),
            };
            let all: Vec<_> = pairs.split(between).map(one).collect();
            Some(all.join(between.encode_utf8(&mut [0; 4])).into())
        }
    }
}

/// A line without its end.
pub(super) fn write(to: &mut Vec<u8>, pieces: &[Piece], done: &RequestDone<'_>) {
    for piece in pieces {
        match piece {
            Piece::Text(text) => to.extend_from_slice(text.as_bytes()),
            Piece::Field(name) => field(to, *name, done),
        }
    }
}

fn field(to: &mut Vec<u8>, field: Field, done: &RequestDone<'_>) {
    let snapshot = &done.live.snapshot;
    let last = || done.plan.and_then(|plan| plan.tries.last());
    // Writing to memory cannot fail.
    let mut put = |value: std::fmt::Arguments<'_>| drop(to.write_fmt(value));
    let text: Option<Cow<'_, str>> = match field {
        Field::Time => return put(format_args!("{}", humantime::format_rfc3339_millis(done.at))),
        Field::TimeCommon => return put(format_args!("{}", common_time(done))),
        Field::Client => return put(format_args!("{}", address(done))),
        Field::Status => return put(format_args!("{}", done.status)),
        Field::Bytes => return put(format_args!("{}", done.bytes)),
        Field::Attempts => return put(format_args!("{}", done.plan.map_or(0, |plan| plan.tries.len()))),
        Field::TotalMs => return put(format_args!("{:.3}", done.total.as_micros() as f64 / 1_000.0)),
        // Nothing in place of a dash: it stands behind the path.
        Field::Query => return query(done).into_iter().for_each(|query| escaped(to, &format!("?{query}"))),
        Field::RequestId => Some(done.request_id.into()),
        Field::TraceId => done.trace.map(|trace| trace.name().into()),
        Field::Country => Some(done.country.as_str().to_owned().into()),
        Field::Method => Some(done.method.as_str().into()),
        Field::Host => Some(done.host.into()),
        Field::Path => Some(done.path.into()),
        Field::Protocol => Some(done.protocol().into()),
        Field::Referer => referer(done),
        Field::UserAgent => done.header(&header::USER_AGENT).map(Cow::from),
        Field::Cookies => cookies(done),
        Field::Route => done.route.and_then(|id| snapshot.route(id)).map(|route| (&*route.name).into()),
        Field::Region => done.region().map(|region| (&**region).into()),
        Field::Upstream => last()
            .and_then(|attempt| plan::upstream(&snapshot.regions, attempt.region, attempt.upstream))
            .map(|upstream| upstream.url.to_string().into()),
        Field::Cache => done.cache.map(|status| status.label().into()),
        Field::Why => Why::of(done).map(|why| why.label().into()),
    };
    escaped(to, text.as_deref().filter(|text| !text.is_empty()).unwrap_or("-"));
}

/// As nginx writes what clients sent: quotes, backslashes and what cannot be printed as `\xHH`, so that nobody can
/// forge a line.
fn escaped(to: &mut Vec<u8>, text: &str) {
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' | 0..=0x1f | 0x7f.. => drop(write!(to, "\\x{byte:02X}")),
            _ => to.push(byte),
        }
    }
}

/// The month of a time after RFC 3339.
pub(super) fn month(time: &str) -> &'static str {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let number = time.get(5..7).and_then(|month| month.parse::<usize>().ok());
    number.and_then(|month| MONTHS.get(month.checked_sub(1)?)).unwrap_or(&"Jan")
}

/// `10/Oct/2000:13:55:36 +0000`; always UTC.
fn common_time(done: &RequestDone<'_>) -> String {
    let at = done.at.max(UNIX_EPOCH);
    let text = humantime::format_rfc3339_seconds(at).to_string();
    let part = |from, to| text.get(from..to).unwrap_or_default();
    format!("{}/{}/{}:{} +0000", part(8, 10), month(&text), part(0, 4), part(11, 19))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_told_of_pairs() {
        for (pairs, how, between, told) in [
            ("a=1&b=2&token", Privacy::Keep, '&', Some("a=1&b=2&token")),
            ("a=1&b=2&token&", Privacy::Redact, '&', Some("a=REDACTED&b=REDACTED&REDACTED&")),
            ("sid=abc=d; x=1", Privacy::Redact, ';', Some("sid=REDACTED; x=REDACTED")),
            ("a=1", Privacy::Omit, '&', None),
        ] {
            assert_eq!(private(pairs, how, between).as_deref(), told, "{pairs}");
        }
    }

    #[test]
    fn nobody_forges_a_line() {
        let mut line = Vec::new();
        escaped(&mut line, "a\"b\\c\n\u{1}é");
        assert_eq!(String::from_utf8(line).unwrap(), "a\\x22b\\x5Cc\\x0A\\x01\\xC3\\xA9");
    }
}
