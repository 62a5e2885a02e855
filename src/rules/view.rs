//! A request as rules see it. What is not there as it stands is made when a rule asks for it, once.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::net::IpAddr;

use http::{HeaderMap, HeaderName, Version, header};
use serde_json::Value as Json;

use super::body::{self, Part};
use super::fields::Field;
use super::normalise::{self, url_decode};
use super::value::{Array, Map, Pair, Pairs, Value, text};
use crate::client::place::{Databases, Place};
use crate::client::standing::{Standing, is_static, looks_automated};
use crate::lists::Lists;
use crate::request::{Body, Facts, Moment, Seen, host_name, mix};

/// The path and query: as rules see them, and as the client sent them.
#[derive(Debug, Clone)]
pub struct Target<'a> {
    /// The path, normalised or rewritten.
    pub path: Cow<'a, str>,
    /// The query, normalised or rewritten; empty if there is none.
    pub query: Cow<'a, str>,
    /// The path as it was sent.
    pub raw_path: &'a str,
    /// The query as it was sent.
    pub raw_query: Option<&'a str>,
    /// Were path and query rewritten by transforms? Then the origin gets them, else what was sent.
    pub rewritten: (bool, bool),
}

impl<'a> Target<'a> {
    /// Of a request.
    pub fn new(facts: &Facts<'a>) -> Self {
        Self {
            path: normalise::path(facts.path),
            query: facts.query.map_or(Cow::Borrowed(""), normalise::query),
            raw_path: facts.path,
            raw_query: facts.query,
            rewritten: (false, false),
        }
    }

    /// Takes on a new path, a new query.
    pub fn rewrite(&mut self, path: Option<String>, query: Option<String>) {
        self.rewritten = (self.rewritten.0 || path.is_some(), self.rewritten.1 || query.is_some());
        if let Some(path) = path {
            self.path = Cow::Owned(normalise::path(&path).into_owned());
        }
        if let Some(query) = query {
            self.query = Cow::Owned(query);
        }
    }

    /// Takes a beginning off the path (`/api` off `/api/x`, but not off `/apis`). What is left goes on as it was sent, if it
    /// was sent so.
    pub fn strip(&mut self, prefix: &str) {
        let rest = |path: &str| {
            let rest = path.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with('/'))?;
            Some(if rest.is_empty() { "/".to_owned() } else { rest.to_owned() })
        };
        let Some(known) = rest(&self.path) else { return };
        // Byte for byte, but only where that is the same to whoever resolves it: dots may climb over what is taken off.
        let sent = if self.rewritten.0 { None } else { rest(self.raw_path) };
        let sent = sent.filter(|sent| !sent.starts_with("//") && normalise::path(sent) == known);
        self.path = Cow::Owned(sent.unwrap_or(known));
        self.rewritten.0 = true;
    }

    /// What the origin gets in place of what was sent, if that was rewritten.
    pub fn to_origin(&self) -> Option<String> {
        let (path, query) = self.rewritten;
        if !path && !query {
            return None;
        }
        let mut target = if path { self.path.to_string() } else { self.raw_path.to_owned() };
        let query = if query { Some(&*self.query).filter(|q| !q.is_empty()) } else { self.raw_query };
        if let Some(query) = query {
            target.push('?');
            target.push_str(query);
        }
        Some(target)
    }
}

/// Who asks, and what is known of them.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    /// The client's address.
    pub ip: IpAddr,
    /// The peer is a trusted proxy, whose request id counts.
    pub trusted_peer: bool,
    /// Where the client is.
    pub place: &'a Place,
    /// Where more is known of places.
    pub databases: &'a Databases,
    /// Lists, of robots and of ill repute.
    pub lists: &'a Lists,
    /// What clients did lately.
    pub standing: &'a Standing,
    /// When that is asked for.
    pub now: Moment,
}

/// A response's header.
#[derive(Debug, Clone, Copy)]
pub struct Response<'a> {
    /// The status.
    pub status: u16,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// The region that it came from.
    pub region: &'a str,
}

/// A part of a multipart body: name, value, file names.
type NamedPart<'v, 'a> = (&'v [u8], &'v [u8], &'v [Cow<'a, [u8]>]);

/// Names and values that borrow from the request.
type OwnPairs<'a> = Vec<Pair<'a>>;

/// The media type of a form.
pub(crate) const FORM: &str = "application/x-www-form-urlencoded";

/// Fields that rules like to have in lower case.
const LOWERED: [Field; 4] = [Field::Path, Field::UserAgent, Field::Host, Field::Query];

/// A request as rules see it.
#[derive(Debug)]
pub struct View<'a> {
    /// The request as it came.
    pub facts: &'a Facts<'a>,
    /// Its path and query.
    pub target: &'a Target<'a>,
    /// Who asks.
    pub asker: Asker<'a>,
    /// The name of its route.
    pub route: Option<&'a str>,
    /// The response, in the phase that has one.
    pub response: Option<Response<'a>>,
    host: OnceCell<Cow<'a, [u8]>>,
    user_agent: OnceCell<Cow<'a, [u8]>>,
    referer: OnceCell<Cow<'a, [u8]>>,
    lowered: [OnceCell<Vec<u8>>; LOWERED.len()],
    cookie: OnceCell<Cow<'a, [u8]>>,
    forwarded: OnceCell<Cow<'a, [u8]>>,
    uri: OnceCell<Vec<u8>>,
    full_uri: OnceCell<Vec<u8>>,
    raw_uri: OnceCell<Vec<u8>>,
    raw_full_uri: OnceCell<Vec<u8>>,
    extension: OnceCell<String>,
    raw_extension: OnceCell<String>,
    args: OnceCell<OwnPairs<'a>>,
    raw_args: OnceCell<OwnPairs<'a>>,
    cookies: OnceCell<OwnPairs<'a>>,
    languages: OnceCell<Vec<Cow<'a, [u8]>>>,
    place: OnceCell<String>,
    threat: OnceCell<u8>,
    mime: OnceCell<String>,
    media_type: OnceCell<String>,
    form: OnceCell<OwnPairs<'a>>,
    json: OnceCell<Option<Json>>,
    parts: OnceCell<Parts<'a>>,
    seed: OnceCell<[u8; 32]>,
}

/// A multipart body, part by part, as the fields have it.
#[derive(Debug, Default)]
struct Parts<'a> {
    pairs: OwnPairs<'a>,
    names: Vec<Cow<'a, [u8]>>,
    files: Vec<Vec<Cow<'a, [u8]>>>,
    types: Vec<Cow<'a, [u8]>>,
    dispositions: Vec<Cow<'a, [u8]>>,
    encodings: Vec<Cow<'a, [u8]>>,
}

impl<'a> View<'a> {
    /// Nothing is computed yet.
    pub fn new(facts: &'a Facts<'a>, target: &'a Target<'a>, asker: Asker<'a>) -> Self {
        Self {
            facts,
            target,
            asker,
            route: None,
            response: None,
            host: OnceCell::new(),
            user_agent: OnceCell::new(),
            referer: OnceCell::new(),
            lowered: Default::default(),
            cookie: OnceCell::new(),
            forwarded: OnceCell::new(),
            uri: OnceCell::new(),
            full_uri: OnceCell::new(),
            raw_uri: OnceCell::new(),
            raw_full_uri: OnceCell::new(),
            extension: OnceCell::new(),
            raw_extension: OnceCell::new(),
            args: OnceCell::new(),
            raw_args: OnceCell::new(),
            cookies: OnceCell::new(),
            languages: OnceCell::new(),
            place: OnceCell::new(),
            threat: OnceCell::new(),
            mime: OnceCell::new(),
            media_type: OnceCell::new(),
            form: OnceCell::new(),
            json: OnceCell::new(),
            parts: OnceCell::new(),
            seed: OnceCell::new(),
        }
    }

    /// The text of a plain field ([`Field::is_plain`]).
    pub fn text(&self, field: Field) -> Option<&[u8]> {
        Some(match field {
            Field::Path => self.target.path.as_bytes(),
            Field::Host => self.host(),
            Field::UserAgent => self.user_agent(),
            Field::Method => self.facts.method.as_str().as_bytes(),
            Field::Query => self.target.query.as_bytes(),
            Field::Referer => self.referer(),
            Field::Country => self.asker.place.country.as_str().as_bytes(),
            Field::Version => version(self.facts.version).as_bytes(),
            Field::RawPath => self.target.raw_path.as_bytes(),
            _ => return None,
        })
    }

    /// The text of a field that can be kept in lower case ([`Self::has_lower`]).
    pub fn lower(&self, field: Field) -> Option<&[u8]> {
        let at = LOWERED.iter().position(|f| *f == field)?;
        let text = self.text(field)?;
        if !text.iter().any(u8::is_ascii_uppercase) {
            return Some(text);
        }
        Some(self.lowered.get(at)?.get_or_init(|| text.to_ascii_lowercase()))
    }

    /// Can it be kept in lower case?
    pub fn has_lower(field: Field) -> bool {
        LOWERED.contains(&field)
    }

    /// What a field holds; `None` if the request lacks it.
    pub fn field(&self, field: Field) -> Option<Value<'_>> {
        let facts = self.facts;
        let headers = facts.headers;
        let target = self.target;
        let country = self.asker.place.country;
        Some(match field {
            Field::Host => text(self.host()),
            Field::Path => text(target.path.as_bytes()),
            Field::Query => text(target.query.as_bytes()),
            Field::Method => text(facts.method.as_str().as_bytes()),
            Field::UserAgent => text(self.user_agent()),
            Field::Client => Value::Ip(self.asker.ip),
            Field::ThreatScore => Value::Int(i64::from(self.threat_score())),
            Field::Country => text(self.asker.place.country.as_str().as_bytes()),
            Field::Cookie => text(self.cookie.get_or_init(|| joined(headers, &header::COOKIE, b"; "))),
            Field::Referer => text(self.referer()),
            Field::ForwardedFor => {
                let name = HeaderName::from_static("x-forwarded-for");
                text(self.forwarded.get_or_init(|| joined(headers, &name, b", ")))
            }
            Field::Languages => Value::Array(Array::Texts(self.languages.get_or_init(|| languages(headers)))),
            Field::Cookies => Value::Map(Map::Pairs(self.cookies())),
            Field::Uri => text(self.uri.get_or_init(|| uri(b"", &target.path, Some(&*target.query).filter(|q| !q.is_empty())))),
            Field::RawUri => text(self.raw_uri.get_or_init(|| uri(b"", target.raw_path, target.raw_query))),
            Field::FullUri => text(
                self.full_uri.get_or_init(|| uri(&self.origin(), &target.path, Some(&*target.query).filter(|q| !q.is_empty()))),
            ),
            Field::RawFullUri => text(self.raw_full_uri.get_or_init(|| uri(&self.origin(), target.raw_path, target.raw_query))),
            Field::Headers => Value::Map(Map::Headers(headers)),
            Field::HeaderNames => Value::Array(Array::HeaderNames(headers)),
            Field::HeaderValues => Value::Array(Array::HeaderValues(headers)),
            // Too many headers are refused as a whole, so none is ever cut.
            Field::HeadersTruncated => Value::Bool(false),
            Field::Seconds => Value::Int(i64::try_from(facts.time.as_secs()).unwrap_or(i64::MAX)),
            Field::Milliseconds => Value::Int(i64::from(facts.time.subsec_millis())),
            Field::Version => text(version(facts.version).as_bytes()),
            Field::Args => Value::Map(Map::Pairs(self.args())),
            Field::ArgNames => Value::Array(Array::Names(self.args())),
            Field::ArgValues => Value::Array(Array::Seconds(self.args())),
            Field::Extension => text(self.extension.get_or_init(|| extension(&target.path)).as_bytes()),
            Field::RawPath => text(target.raw_path.as_bytes()),
            Field::RawQuery => text(target.raw_query.unwrap_or_default().as_bytes()),
            Field::RawArgs => Value::Map(Map::Pairs(self.raw_args())),
            Field::RawArgNames => Value::Array(Array::Names(self.raw_args())),
            Field::RawArgValues => Value::Array(Array::Seconds(self.raw_args())),
            Field::RawExtension => text(self.raw_extension.get_or_init(|| extension(target.raw_path)).as_bytes()),
            Field::Body => text(self.body()?.bytes),
            Field::BodySize => Value::Int(i64::try_from(self.body()?.size).unwrap_or(i64::MAX)),
            Field::BodyTruncated => Value::Bool(self.body()?.truncated),
            Field::BodyMime => text(body::sniff(self.body()?.bytes).unwrap_or(self.mime()).as_bytes()),
            Field::Form => Value::Map(Map::Pairs(self.form())),
            Field::FormNames => Value::Array(Array::Names(self.form())),
            Field::FormValues => Value::Array(Array::Seconds(self.form())),
            Field::Multipart => Value::Map(Map::Pairs(&self.parts().pairs)),
            Field::MultipartNames => Value::Array(Array::Singles(&self.parts().names)),
            Field::MultipartValues => Value::Array(Array::Seconds(&self.parts().pairs)),
            Field::MultipartTypes => Value::Array(Array::Singles(&self.parts().types)),
            Field::MultipartDispositions => Value::Array(Array::Singles(&self.parts().dispositions)),
            Field::MultipartEncodings => Value::Array(Array::Singles(&self.parts().encodings)),
            Field::MultipartFiles => Value::Array(Array::Lists(&self.parts().files)),
            Field::Asn => Value::Int(i64::from(self.asker.databases.asn(self.asker.ip)?)),
            Field::Continent => text(crate::client::atlas::continent(country)?.as_str().as_bytes()),
            Field::EuropeanUnion => Value::Bool(crate::client::atlas::is_in_european_union(country)),
            Field::Subdivision1 => {
                self.asker.place.subdivision?;
                text(self.place.get_or_init(|| self.asker.place.area().to_string()).as_bytes())
            }
            Field::RegionCode => text(self.asker.place.subdivision.as_ref()?.as_str().as_bytes()),
            Field::City => self.city(&["city", "names", "en"])?,
            Field::Region => self.city(&["subdivisions", "0", "names", "en"])?,
            Field::Subdivision2 => self.city(&["subdivisions", "1", "iso_code"])?,
            Field::PostalCode => self.city(&["postal", "code"])?,
            Field::TimeZone => self.city(&["location", "time_zone"])?,
            Field::MetroCode => self.city_number("metro_code", 0)?,
            Field::Latitude => self.city_number("latitude", 5)?,
            Field::Longitude => self.city_number("longitude", 5)?,
            Field::Tls => Value::Bool(facts.tls),
            Field::BotScore => Value::Int(self.bot_score()),
            Field::VerifiedBot | Field::ClientBot => Value::Bool(self.asker.lists.verified_bot(self.asker.ip).is_some()),
            Field::BotCategory => text(self.asker.lists.verified_bot(self.asker.ip).unwrap_or_default().as_bytes()),
            Field::StaticResource => Value::Bool(is_static(self.extension.get_or_init(|| extension(&target.path)))),
            Field::RayId => text(self.request_id().as_bytes()),
            Field::RandomSeed => text(self.seed.get_or_init(|| seed(facts.chance))),
            Field::PortolanRoute => text(self.route?.as_bytes()),
            Field::PortolanRegion => text(self.response.as_ref()?.region.as_bytes()),
            Field::Status => Value::Int(i64::from(self.response.as_ref()?.status)),
            Field::ResponseHeaders => Value::Map(Map::Headers(self.response.as_ref()?.headers)),
            Field::ResponseHeaderNames => Value::Array(Array::HeaderNames(self.response.as_ref()?.headers)),
            Field::ResponseHeaderValues => Value::Array(Array::HeaderValues(self.response.as_ref()?.headers)),
            Field::MediaType => {
                let kind = self.response.as_ref()?.headers.get(header::CONTENT_TYPE);
                let kind = kind.and_then(|k| k.to_str().ok()).unwrap_or_default();
                text(self.media_type.get_or_init(|| body::media_type(kind)).as_bytes())
            }
        })
    }

    /// The score of threat, 0 to 100.
    pub fn threat_score(&self) -> u8 {
        *self.threat.get_or_init(|| {
            let listed = self.asker.lists.reputation(self.asker.ip);
            listed.saturating_add(self.asker.standing.points(self.asker.ip, self.asker.now)).min(100)
        })
    }

    /// How likely it is a person, 1 (a robot for sure) to 99.
    fn bot_score(&self) -> i64 {
        let agent = self.user_agent();
        let has = |name: HeaderName| self.facts.headers.contains_key(name);
        if self.asker.lists.verified_bot(self.asker.ip).is_some() || agent.is_empty() {
            return 1;
        }
        if looks_automated(agent) {
            return 2;
        }
        // Every browser of the last ten years sends these two.
        let browser = agent.starts_with(b"Mozilla/") && has(header::ACCEPT_LANGUAGE) && has(header::ACCEPT_ENCODING);
        let calm = i64::from(100 - self.threat_score());
        (if browser { 90 } else { 25 }) * calm.max(10) / 100
    }

    /// The request's name in logs.
    fn request_id(&self) -> &str {
        let given = self.facts.header("x-request-id").filter(|_| self.asker.trusted_peer);
        given.filter(|id| crate::request::is_request_id(id.as_bytes())).unwrap_or(self.facts.request_id)
    }

    /// The body as JSON, parsed once; `Some(None)` if it is none. `None` for text that is not the body.
    pub(crate) fn json(&self, text: &[u8]) -> Option<Option<&Json>> {
        let body = self.body()?.bytes;
        std::ptr::eq(body, text).then(|| self.json.get_or_init(|| serde_json::from_slice(body).ok()).as_ref())
    }

    /// A header of the request; empty if it is absent.
    pub(crate) fn header(&self, name: &HeaderName) -> &'a [u8] {
        self.facts.headers.get(name).map(|v| v.as_bytes()).unwrap_or_default()
    }

    /// The body, as far as it was read.
    pub(crate) fn body(&self) -> Option<Body<'a>> {
        match self.facts.body {
            Seen::Read(body) => Some(body),
            Seen::Unread | Seen::Later => None,
        }
    }

    pub(crate) fn user_agent(&self) -> &[u8] {
        self.user_agent.get_or_init(|| joined(self.facts.headers, &header::USER_AGENT, b", "))
    }

    pub(crate) fn referer(&self) -> &[u8] {
        self.referer.get_or_init(|| joined(self.facts.headers, &header::REFERER, b", "))
    }

    /// The host as routes see it: without its port and trailing dot, in lower case.
    fn host(&self) -> &[u8] {
        self.host.get_or_init(|| super::program::lower(host_name(self.facts.host).as_bytes()))
    }

    fn origin(&self) -> Vec<u8> {
        let scheme: &[u8] = if self.facts.tls { b"https://" } else { b"http://" };
        [scheme, &self.facts.host.as_bytes().to_ascii_lowercase()].concat()
    }

    fn args(&self) -> &OwnPairs<'a> {
        self.args.get_or_init(|| body::form(self.target.query.as_bytes()))
    }

    /// The arguments as they were sent.
    pub(crate) fn raw_args(&self) -> &OwnPairs<'a> {
        self.raw_args.get_or_init(|| body::form(self.target.raw_query.unwrap_or_default().as_bytes()))
    }

    /// The media type that the request says its body is of.
    pub(crate) fn mime(&self) -> &str {
        self.mime.get_or_init(|| {
            // Of several, an origin may take any: the one that says most of how to read the body.
            let all = self.facts.headers.get_all(header::CONTENT_TYPE).iter().filter_map(|v| v.to_str().ok());
            let all: Vec<String> = all.map(body::media_type).collect();
            let telling = |kind: &&String| *kind == FORM || kind.starts_with("multipart/") || kind.ends_with("json");
            all.iter().find(telling).or(all.first()).cloned().unwrap_or_default()
        })
    }

    /// The body as a form, if it is one.
    pub(crate) fn form(&self) -> &Pairs<'a> {
        let body = self.body().map(|b| b.bytes).filter(|_| self.mime() == FORM);
        self.form.get_or_init(|| body::form(body.unwrap_or_default()))
    }

    /// The cookies.
    pub(crate) fn cookies(&self) -> &OwnPairs<'a> {
        self.cookies.get_or_init(|| cookies(self.facts.headers))
    }

    /// The parts of a multipart body: name, value, file names.
    pub(crate) fn multipart(&self) -> impl Iterator<Item = NamedPart<'_, 'a>> {
        let parts = self.parts();
        parts.pairs.iter().zip(&parts.files).map(|((name, value), files)| (&**name, &**value, &**files))
    }

    fn parts(&self) -> &Parts<'a> {
        self.parts.get_or_init(|| {
            let all = self.facts.headers.get_all(header::CONTENT_TYPE).iter().filter_map(|v| v.to_str().ok());
            let kind = all.into_iter().find(|k| body::media_type(k).starts_with("multipart/"));
            let (Some(kind), Some(body)) = (kind, self.body()) else { return Parts::default() };
            let mut parts = Parts::default();
            for Part { name, value, filenames, content_type, disposition, encoding } in body::multipart(kind, body.bytes) {
                parts.names.push(name.clone());
                parts.files.push(filenames);
                parts.types.push(content_type);
                parts.dispositions.push(disposition);
                parts.encodings.push(encoding);
                parts.pairs.push((name, value));
            }
            parts
        })
    }

    fn city(&self, path: &[&str]) -> Option<Value<'_>> {
        self.asker.databases.city_text(self.asker.ip, path).map(|t| text(t.as_bytes()))
    }

    fn city_number(&self, name: &str, decimals: usize) -> Option<Value<'_>> {
        let number = self.asker.databases.city_number(self.asker.ip, name)?;
        Some(Value::Bytes(Cow::Owned(format!("{number:.decimals$}").into_bytes())))
    }
}

fn uri(origin: &[u8], path: &str, query: Option<&str>) -> Vec<u8> {
    let mut uri = [origin, path.as_bytes()].concat();
    if let Some(query) = query {
        uri.push(b'?');
        uri.extend_from_slice(query.as_bytes());
    }
    uri
}

/// All values of a header as one.
fn joined<'h>(headers: &'h HeaderMap, name: &HeaderName, between: &[u8]) -> Cow<'h, [u8]> {
    let mut all = headers.get_all(name).iter();
    let first = all.next().map(|v| v.as_bytes()).unwrap_or_default();
    let Some(second) = all.next() else { return Cow::Borrowed(first) };
    let mut text = first.to_vec();
    for value in std::iter::once(second).chain(all) {
        text.extend_from_slice(between);
        text.extend_from_slice(value.as_bytes());
    }
    Cow::Owned(text)
}

fn cookies(headers: &HeaderMap) -> OwnPairs<'_> {
    let all = headers.get_all(header::COOKIE).iter().flat_map(|v| v.as_bytes().split(|b| *b == b';'));
    all.filter_map(|text| {
        let text = text.trim_ascii();
        let at = memchr::memchr(b'=', text)?;
        Some((url_decode(text.get(..at)?, false), Cow::Borrowed(text.get(at + 1..)?)))
    })
    .collect()
}

/// Languages as the client prefers them; `*` says nothing.
fn languages(headers: &HeaderMap) -> Vec<Cow<'_, [u8]>> {
    let all = headers.get_all(header::ACCEPT_LANGUAGE).iter().filter_map(|v| v.to_str().ok());
    crate::request::accepted(all).map(|(tag, _)| Cow::Borrowed(tag.as_bytes())).collect()
}

/// What stands behind the last dot of the last segment, in lower case.
fn extension(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or_default();
    match name.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() => extension.to_ascii_lowercase(),
        _ => String::new(),
    }
}

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_09 => "HTTP/0.9",
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_3 => "HTTP/3",
        _ => "HTTP/1.1",
    }
}

/// 32 bytes of the request's own chance.
fn seed(chance: u64) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (n, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&mix(chance.wrapping_add((n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))).to_be_bytes());
    }
    bytes
}
