//! Runs the tables in tests/cache: what RFC 9110, 9111, 5861 and 9213 demand of a shared cache, case by case; and what
//! random input may do to the pure parts of it: nothing.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends where it cannot go on")]

mod common;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use portolan::cache::fields::{Directives, date, seconds};
use portolan::cache::freshness::{Edge, Exchange, Terms, judge};
use portolan::cache::key::{Key, Parts, Query, Wanted};
use portolan::cache::purge::{Purge, Purged, Purges, What};
use portolan::cache::reuse::{self, Held, Use};
use portolan::cache::{same_host_target, vary};
use proptest::prelude::*;
use serde::Deserialize;

/// 2026-11-24T12:00:00Z: the moment at which every response arrives.
const NOW: u64 = 1_795_521_600;

fn table<T: serde::de::DeserializeOwned>(name: &str) -> Vec<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/cache/{name}.yaml"));
    serde_json::from_value(common::table(&path)).unwrap()
}

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW)
}

/// A date in the form that RFC 9110, section 5.6.7, prefers.
fn imf(at: u64) -> String {
    let text = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(at)).to_string();
    let (day, time) = text.trim_end_matches('Z').split_once('T').unwrap();
    let mut parts = day.split('-');
    let (year, month, day) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
    let month =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"][month.parse::<usize>().unwrap() - 1];
    let weekday = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"][(at / 86_400 % 7) as usize];
    format!("{weekday}, {day} {month} {year} {time} GMT")
}

/// `{T}`, `{T-100}`, `{T+50}` are dates.
fn dated(text: &str) -> String {
    let mut text = text.to_owned();
    while let Some(begin) = text.find("{T") {
        let end = begin + text[begin..].find('}').unwrap();
        let shift: i64 = text[begin + 2..end].parse().unwrap_or(0);
        text.replace_range(begin..=end, &imf(NOW.checked_add_signed(shift).unwrap()));
    }
    text
}

fn headers(lines: &[String]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for line in lines {
        let line = dated(line);
        let (name, value) = line.split_once(':').unwrap();
        let name: HeaderName = name.trim().parse().unwrap();
        map.append(name, HeaderValue::from_bytes(value.trim().as_bytes()).unwrap());
    }
    map
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Freshness {
    section: String,
    name: String,
    #[serde(default)]
    asked: u64,
    #[serde(default)]
    authorized: bool,
    #[serde(default = "ok")]
    status: u16,
    #[serde(default)]
    headers: Vec<String>,
    #[serde(default)]
    terms: TermsSaid,
    expect: Expected,
}

fn ok() -> u16 {
    200
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TermsSaid {
    heuristic: bool,
    cookies: bool,
    targeted: Vec<String>,
    edge: Option<EdgeSaid>,
    while_revalidate: u64,
    if_error: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EdgeSaid {
    ttl: u64,
    overrides: bool,
}

impl Default for TermsSaid {
    fn default() -> Self {
        let targeted = ["portolan-cache-control", "cdn-cache-control"].map(str::to_owned).to_vec();
        Self { heuristic: true, cookies: false, targeted, edge: None, while_revalidate: 0, if_error: 86_400 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    not: Option<String>,
    fresh_for: Option<i64>,
    age: Option<u64>,
    while_revalidate: Option<u64>,
    if_error: Option<u64>,
    source: Option<String>,
    unstored: Option<Vec<String>>,
}

#[test]
fn freshness() {
    let cases: Vec<Freshness> = table("freshness");
    assert!(cases.len() > 100);
    let mut wrong = Vec::new();
    for case in &cases {
        let Freshness { section, name, asked, authorized, status, headers: lines, terms, expect } = case;
        let headers = headers(lines);
        let targeted: Vec<HeaderName> = terms.targeted.iter().map(|name| name.parse().unwrap()).collect();
        let terms = Terms {
            targeted: &targeted,
            heuristic: terms.heuristic,
            cookies: terms.cookies,
            edge: terms.edge.as_ref().map(|edge| Edge { ttl: Duration::from_secs(edge.ttl), overrides: edge.overrides }),
            while_revalidate: Duration::from_secs(terms.while_revalidate),
            if_error: Duration::from_secs(terms.if_error),
        };
        let asked = now() - Duration::from_secs(*asked);
        let verdict = judge(Exchange { asked, now: now(), authorized: *authorized, status: *status, headers: &headers }, terms);
        let Expected { not, fresh_for, age, while_revalidate, if_error, source, unstored } = expect;
        let right = match (&verdict, not) {
            (Err(why), Some(not)) => why.label() == not,
            (Ok(lease), None) => {
                let left = match lease.fresh_until.duration_since(now()) {
                    Ok(left) => left.as_secs() as i64,
                    Err(over) => -(over.duration().as_secs() as i64),
                };
                let same = |wanted: &Option<u64>, is: Duration| wanted.is_none_or(|wanted| wanted == is.as_secs());
                fresh_for.is_none_or(|wanted| wanted == left)
                    && same(age, now().duration_since(lease.epoch).unwrap())
                    && same(while_revalidate, lease.while_revalidate)
                    && same(if_error, lease.if_error)
                    && source.as_ref().is_none_or(|source| *source == lease.source.label())
                    && unstored
                        .as_ref()
                        .is_none_or(|names| names.iter().map(String::as_str).eq(lease.unstored.iter().map(HeaderName::as_str)))
            }
            (Ok(_), Some(_)) | (Err(_), None) => false,
        };
        if !right {
            wrong.push(format!("{section}: {name}: {lines:?} gives {verdict:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reuse {
    section: String,
    name: String,
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    request: Vec<String>,
    #[serde(default)]
    stored: Vec<String>,
    #[serde(default = "ok")]
    status: u16,
    #[serde(default)]
    age: u64,
    #[serde(default)]
    fresh_for: u64,
    #[serde(default)]
    stale_for: u64,
    expect: Option<String>,
    not_modified: Option<bool>,
}

#[test]
fn reuse() {
    let cases: Vec<Reuse> = table("reuse");
    assert!(cases.len() > 40);
    let mut wrong = Vec::new();
    for case in &cases {
        let (request, stored) = (headers(&case.request), headers(&case.stored));
        let targeted = ["portolan-cache-control", "cdn-cache-control"].map(HeaderName::from_static);
        if let Some(expect) = &case.expect {
            let seconds = Duration::from_secs;
            let held = Held { age: seconds(case.age), fresh_for: seconds(case.fresh_for), stale_for: seconds(case.stale_for) };
            let is = match reuse::ruled(&reuse::wanted(&request), held, &stored, &targeted) {
                Use::AsStored => "as-stored",
                Use::Validate => "validate",
                Use::Stale => "stale",
            };
            if is != expect {
                wrong.push(format!("{}: {}: {is} for {expect}", case.section, case.name));
            }
        }
        if let Some(expect) = case.not_modified {
            let method: Method = case.method.as_deref().unwrap_or("GET").parse().unwrap();
            if reuse::not_modified(&method, &request, case.status, &stored) != expect {
                wrong.push(format!("{}: {}: not_modified is not {expect}", case.section, case.name));
            }
        }
        assert!(case.expect.is_some() || case.not_modified.is_some(), "{} expects nothing", case.name);
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vary {
    #[serde(default)]
    section: String,
    name: String,
    vary: Vec<String>,
    #[serde(default)]
    a: Vec<String>,
    #[serde(default)]
    b: Vec<String>,
    same: Option<bool>,
    all: Option<bool>,
}

#[test]
fn variants() {
    let cases: Vec<Vary> = table("vary");
    assert!(cases.len() > 20);
    let mut wrong = Vec::new();
    for case in &cases {
        let response = headers(&case.vary);
        let values = |lines: &[String]| {
            let request = headers(lines);
            vary::fields(&response).iter().map(|name| vary::value(name, &request)).collect::<Vec<_>>()
        };
        let is = case.same.map(|same| same == (values(&case.a) == values(&case.b)));
        let all = case.all.map(|all| all == vary::is_all(&response));
        assert!(is.is_some() || all.is_some(), "{} expects nothing", case.name);
        if is == Some(false) || all == Some(false) {
            wrong.push(format!("{}: {}: {:?} {:?}", case.section, case.name, values(&case.a), values(&case.b)));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyCase {
    name: String,
    #[serde(default)]
    a: Asking,
    #[serde(default)]
    b: Asking,
    parts: Option<PartsSaid>,
    same: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Asking {
    host: String,
    path: String,
    query: Option<String>,
    headers: Vec<String>,
    country: String,
    trusted: bool,
    tls: bool,
    route: Option<String>,
}

impl Default for Asking {
    fn default() -> Self {
        let (host, path, country) = ("a.do".to_owned(), "/".to_owned(), "XX".to_owned());
        Self { host, path, query: None, headers: Vec::new(), country, trusted: false, tls: false, route: None }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct PartsSaid {
    query: QuerySaid,
    sort: bool,
    headers: Vec<String>,
    cookies: Vec<String>,
    country: bool,
    device: bool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct QuerySaid {
    only: Option<Vec<String>>,
    except: Option<Vec<String>>,
}

impl Asking {
    fn key(&self, parts: Option<&Parts>) -> Key {
        let headers = headers(&self.headers);
        let wanted = Wanted {
            tls: self.tls,
            route: self.route.as_deref(),
            host: &self.host,
            path: &self.path,
            query: self.query.as_deref(),
            rewritten: None,
            headers: &headers,
            country: &self.country,
            trusted_peer: self.trusted,
        };
        Key::new(&wanted, parts)
    }
}

#[test]
fn keys() {
    let cases: Vec<KeyCase> = table("keys");
    assert!(cases.len() > 20);
    let mut wrong = Vec::new();
    for case in &cases {
        let parts = case.parts.as_ref().map(|said| Parts {
            query: match (&said.query.only, &said.query.except) {
                (Some(only), _) => Query::Only(only.clone()),
                (None, Some(except)) => Query::Except(except.clone()),
                (None, None) => Query::All,
            },
            sort: said.sort,
            headers: said.headers.iter().map(|name| name.parse().unwrap()).collect(),
            cookies: said.cookies.clone(),
            country: said.country,
            device: said.device,
        });
        let (a, b) = (case.a.key(parts.as_ref()), case.b.key(parts.as_ref()));
        assert_eq!(a.primary == b.primary, a.hash == b.hash);
        if (a == b) != case.same {
            wrong.push(case.name.clone());
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn locations_of_the_same_host() {
    for (location, expected) in [
        ("/a?b#c", Some("/a?b")),
        ("http://a.do/x", Some("/x")),
        ("HTTPS://A.do/x", None),
        ("https://A.do/x", Some("/x")),
        ("//a.do", Some("/")),
        ("http://b.do/x", None),
        ("http://a.do.evil/x", None),
        ("other", Some("/dir/other")),
        ("?q", Some("/dir/page?q")),
        ("mailto:x", None),
        ("", None),
    ] {
        assert_eq!(same_host_target(location, "a.do", "/dir/page").as_deref(), expected, "{location}");
    }
}

/// Strings of what such fields are made of.
fn field() -> impl Strategy<Value = String> {
    let words = prop::sample::select(vec![
        "max-age",
        "s-maxage",
        "no-cache",
        "private",
        "=",
        "\"",
        "\\",
        ",",
        ";",
        " ",
        "\t",
        "1",
        "99999999999999999999",
        "-1",
        "1.5",
        "a",
        "*",
        "W/",
        "?1",
        "(",
        ")",
        ":",
        "Sun",
        "06",
        "Nov",
        "1994",
        "08:49:37",
        "GMT",
        "é",
    ]);
    prop::collection::vec(words, 0..24).prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn no_field_is_too_strange(a in field(), b in field(), status in 100u16..600) {
        let mut map = HeaderMap::new();
        for (name, text) in [("cache-control", &a), ("cdn-cache-control", &b), ("age", &b), ("expires", &a), ("date", &b),
            ("last-modified", &a), ("vary", &b), ("etag", &a), ("if-none-match", &b), ("accept-language", &a), ("accept-encoding", &b)] {
            if let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) {
                map.append(name, value);
            }
        }
        let targeted = [HeaderName::from_static("cdn-cache-control")];
        let terms = Terms { targeted: &targeted, heuristic: true, cookies: true, edge: None,
            while_revalidate: Duration::ZERO, if_error: Duration::from_secs(60) };
        let verdict = judge(Exchange { asked: now(), now: now(), authorized: false, status, headers: &map }, terms);
        if let Ok(lease) = verdict {
            // Never fresher than for 68 years.
            prop_assert!(lease.fresh_until <= now() + Duration::from_secs(1 << 31));
            prop_assert!(lease.epoch <= now());
        }
        let held = Held { age: Duration::from_secs(5), fresh_for: Duration::from_secs(5), stale_for: Duration::ZERO };
        reuse::ruled(&reuse::wanted(&map), held, &map, &targeted);
        reuse::not_modified(&Method::GET, &map, status, &map);
        for name in map.keys() {
            vary::value(name, &map);
        }
        let _ = (Directives::of(&map), date(&a), seconds(&b));
    }

    #[test]
    fn a_date_is_what_it_was_written_from(at in 0u64..253_402_300_799) {
        prop_assert_eq!(date(&imf(at)), Some(UNIX_EPOCH + Duration::from_secs(at)));
    }

    /// Purges are held against a log; a list of all of them, looked through from one end to the other, says the same.
    #[test]
    fn a_purge_is_of_what_it_says(
        purges in prop::collection::vec((0usize..5, "[ab/]{1,4}", any::<bool>(), 1u64..20), 0..40),
        url in "[ab]{1,2}/[ab/]{0,5}", tag in "[ab]{1,2}", asked in 1u64..20,
    ) {
        let what = |kind: usize, text: &String| match kind {
            0 => What::Url(text.clone()),
            1 => What::Prefix(text.clone()),
            2 => What::Host(text.clone()),
            3 => What::Tag(text.clone()),
            _ => What::Everything,
        };
        let purges: Vec<Purge> = purges.iter().map(|(kind, text, soft, at)| Purge { what: what(*kind, text), soft: *soft, at: *at })
            // Of everything only rarely, or nothing else would be seen.
            .filter(|purge| purge.what != What::Everything || purge.at < 3).collect();
        let host = url.split('/').next().unwrap();
        let is_of = |purge: &&Purge| purge.at >= asked && match &purge.what {
            What::Everything => true,
            What::Url(other) => *other == url,
            What::Prefix(prefix) => url.starts_with(prefix.as_str()),
            What::Host(other) => other == host,
            What::Tag(other) => *other == tag,
        };
        let found: Vec<&Purge> = purges.iter().filter(is_of).collect();
        let expected = if found.iter().any(|purge| !purge.soft) {
            Some(Purged::Gone)
        } else {
            found.iter().map(|purge| purge.at).max().map(|at| Purged::Stale(UNIX_EPOCH + Duration::from_millis(at)))
        };
        let log = Purges::default();
        for some in purges.chunks(7) {
            log.apply(some);
        }
        prop_assert_eq!(log.check(&url, [tag.as_str()].into_iter(), asked), expected);
        // What is written down says the same.
        let again = Purges::default();
        again.apply(&log.all());
        prop_assert_eq!(again.check(&url, [tag.as_str()].into_iter(), asked), expected);
    }
}
