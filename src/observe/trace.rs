//! Traces: which request has one, what its origins are told (W3C Trace Context, Level 1), and the spans of a request that is
//! over. Spans are made from what is remembered of a request anyway: nothing is recorded on its way.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue};
use opentelemetry_proto::tonic::common::v1::{AnyValue, ArrayValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::span::{Event, Link, SpanKind};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, Status};

use super::RequestDone;
use super::access_log::address;
use super::why::Why;
use crate::config::Tracing;
use crate::request::{Moment, mix};
use crate::upstream::{Try, plan};

/// The request belongs to this trace, and this is its place in it.
pub const TRACEPARENT: &str = "traceparent";
/// What vendors add to it.
pub const TRACESTATE: &str = "tracestate";

/// A place in a trace, as `traceparent` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    /// The trace.
    pub trace: u128,
    /// The span.
    pub span: u64,
    /// It is recorded.
    pub sampled: bool,
}

impl Parent {
    /// Reads `traceparent` (section 3.2). Later versions may say more, after another dash.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let dash = |at| bytes.get(at) == Some(&b'-');
        let hex = |from: usize, to: usize| {
            let part = text.get(from..to)?;
            part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')).then_some(part)
        };
        let version = hex(0, 2)?;
        let ends = if version == "00" { bytes.len() == 55 } else { bytes.len() == 55 || dash(55) };
        if version == "ff" || !ends || ![2, 35, 52].into_iter().all(dash) {
            return None;
        }
        let trace = u128::from_str_radix(hex(3, 35)?, 16).ok()?;
        let span = u64::from_str_radix(hex(36, 52)?, 16).ok()?;
        let flags = u8::from_str_radix(hex(53, 55)?, 16).ok()?;
        (trace != 0 && span != 0).then_some(Self { trace, span, sampled: flags & 1 == 1 })
    }
}

/// A request's place in a trace.
#[derive(Debug)]
pub struct Trace {
    /// The trace.
    pub id: u128,
    /// The request's own span.
    span: u64,
    /// Who caused it.
    parent: Option<Parent>,
    /// What an untrusted client named.
    link: Option<Parent>,
    /// It is sent, whatever becomes of it.
    sampled: bool,
    /// When it was decided what becomes of the request.
    decided: Moment,
    /// When the cache had nothing.
    pub missed: Option<Moment>,
}

impl Trace {
    /// A place for a request that was decided at `decided`. `chance` is the request's own random number.
    pub fn begin(settings: &Tracing, headers: &HeaderMap, trusted: bool, chance: u64, decided: Moment) -> Self {
        let mut given = headers.get_all(TRACEPARENT).iter();
        // Twice is as good as never (section 3.2).
        let named = match (given.next(), given.next()) {
            (Some(one), None) => one.to_str().ok().and_then(Parent::parse),
            _ => None,
        };
        let (parent, link) = match trusted || settings.trust_clients {
            true => (named, None),
            false => (None, named),
        };
        // Other draws of the request must not be those of its trace.
        let (high, low) = (mix(chance ^ 0x74_7261_6365), mix(chance ^ 0x6964));
        let id = parent.map_or(u128::from(high) << 64 | u128::from(low), |parent| parent.trace).max(1);
        let sampled = match parent {
            Some(parent) => parent.sampled,
            // As OpenTelemetry's TraceIdRatioBased does, so that all nodes agree: by the trace's lower half.
            None => ((id as u64) >> 11) as f64 / (1u64 << 53) as f64 <= settings.sample.0 && settings.sample.0 > 0.0,
        };
        Self { id, span: mix(chance ^ 0x7370_616e).max(1), parent, link, sampled, decided, missed: None }
    }

    /// The trace, as everybody writes it.
    pub fn name(&self) -> String {
        format!("{:032x}", self.id)
    }

    /// The request's own span in the trace, and those of its parts, without storing any.
    fn part(&self, nth: u64) -> u64 {
        mix(self.span.wrapping_add(nth)).max(1)
    }

    /// What the origin of an attempt is told: `nth` from 0.
    pub fn parent_of(&self, nth: usize) -> HeaderValue {
        let flags = u8::from(self.sampled);
        let text = format!("00-{:032x}-{:016x}-{flags:02x}", self.id, self.part(nth as u64 + 1));
        HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static(""))
    }

    /// What came with it in `tracestate` still means something.
    pub fn is_continued(&self) -> bool {
        self.parent.is_some()
    }

    /// Is it sent? Whatever failed is.
    pub fn is_sent(&self, done: &RequestDone<'_>) -> bool {
        self.sampled || failed(done)
    }
}

/// It ended in 500 or more, or broke off.
fn failed(done: &RequestDone<'_>) -> bool {
    done.status >= 500 || Why::of(done) == Some(Why::UpstreamTruncated)
}

/// How many spans there are to tell of it.
pub fn count(done: &RequestDone<'_>) -> u64 {
    2 + u64::from(done.cache.is_some()) + done.plan.map_or(0, |plan| plan.tries.len() as u64)
}

/// What there is to tell of a request that is over.
pub fn spans(trace: &Trace, done: &RequestDone<'_>, now: Moment) -> Vec<Span> {
    let at = |moment: Moment| nanos(done.at - now.since(moment));
    let snapshot = &done.live.snapshot;
    let why = Why::of(done);
    let route = done.route.and_then(|id| snapshot.route(id)).map(|route| &*route.name);

    let mut root = span(trace, trace.span, trace.parent.map(|parent| parent.span), at(done.started), nanos(done.at));
    // A method that nobody knows is no name (semantic conventions for HTTP spans).
    root.name = match route {
        Some(route) => format!("{} {route}", method(done.method)),
        None => method(done.method).to_owned(),
    };
    root.kind = SpanKind::Server.into();
    root.attributes = vec![
        text("http.request.method", method(done.method)),
        text("url.scheme", done.scheme()),
        text("url.path", done.path),
        text("server.address", crate::request::host_name(done.host)),
        text("client.address", &address(done).to_string()),
        text("network.protocol.version", done.protocol().trim_start_matches("HTTP/").trim_end_matches(".0")),
        number("http.response.status_code", done.status.into()),
        number("http.response.body.size", i64::try_from(done.bytes).unwrap_or(i64::MAX)),
        text("portolan.country", done.country.as_str()),
        text("portolan.request_id", done.request_id),
    ];
    root.attributes.extend(route.map(|route| text("portolan.route", route)));
    root.attributes.extend(done.region().map(|region| text("portolan.region", region)));
    root.attributes.extend(why.map(|why| text("portolan.why", why.label())));
    if let Some((from, moved)) = done.plan.and_then(|plan| plan.moved)
        && let Some(from) = snapshot.region(from)
    {
        let attributes = vec![text("portolan.region", &from.name), text("portolan.reason", moved.label())];
        root.events.push(Event { time_unix_nano: at(trace.decided), name: "moved".to_owned(), attributes, ..Event::default() });
    }
    if failed(done) {
        let message = why.map(|why| why.label().to_owned()).unwrap_or_default();
        root.status = Some(Status { message, code: StatusCode::Error.into() });
        root.attributes.extend(why.map(|why| text("error.type", why.label())));
    }
    root.links.extend(trace.link.map(|link| Link {
        trace_id: link.trace.to_be_bytes().to_vec(),
        span_id: link.span.to_be_bytes().to_vec(),
        ..Link::default()
    }));

    let mut rules = span(trace, trace.part(101), Some(trace.span), at(done.started), at(trace.decided));
    rules.name = "rules".to_owned();
    let limits = done.limits.iter().filter_map(|seen| Some((snapshot.limits.rule(seen)?, seen.decision)));
    let limits = limits.map(|(limit, decision)| format!("{}: {}", limit.id, decision.label()));
    rules.attributes.push(list("portolan.rules", done.matches.iter().map(|m| format!("{}: {}", m.rule, m.action))));
    rules.attributes.push(list("portolan.limits", limits));
    rules.attributes.extend(done.shed.map(|shed| text("portolan.shed", shed.label())));
    let mut all = vec![root, rules];

    if let Some(status) = done.cache {
        let first = done.plan.and_then(|plan| plan.tries.first());
        let end = trace.missed.or(first.map(|attempt| attempt.started)).unwrap_or(now);
        let mut cache = span(trace, trace.part(102), Some(trace.span), at(trace.decided), at(end));
        cache.name = "cache".to_owned();
        cache.attributes.push(text("portolan.cache.status", status.label()));
        all.push(cache);
    }
    let tries = done.plan.map(|plan| plan.tries.as_slice()).unwrap_or_default();
    all.extend(tries.iter().enumerate().map(|(nth, attempt)| {
        let own = span(trace, trace.part(nth as u64 + 1), Some(trace.span), at(attempt.started), at(attempt.ended));
        attempted(own, nth, attempt, done)
    }));
    all
}

fn attempted(mut own: Span, nth: usize, attempt: &Try, done: &RequestDone<'_>) -> Span {
    let snapshot = &done.live.snapshot;
    let region = snapshot.region(attempt.region).map(|region| &*region.name).unwrap_or_default();
    own.name = format!("{} {region}", method(done.method));
    own.kind = SpanKind::Client.into();
    own.attributes = vec![
        text("http.request.method", method(done.method)),
        text("portolan.region", region),
        text("portolan.outcome", attempt.outcome.label()),
    ];
    if let Some(upstream) = plan::upstream(&snapshot.regions, attempt.region, attempt.upstream) {
        own.attributes.push(text("portolan.upstream", &upstream.url.to_string()));
    }
    own.attributes.extend(attempt.endpoint.as_ref().map(|e| text("network.peer.address", &e.address.to_string())));
    own.attributes.extend(attempt.outcome.status().map(|status| number("http.response.status_code", status.into())));
    if nth > 0 {
        own.attributes.push(number("http.request.resend_count", nth as i64));
    }
    if attempt.outcome.is_bad() {
        own.status = Some(Status { message: attempt.outcome.label().to_owned(), code: StatusCode::Error.into() });
        own.attributes.push(text("error.type", attempt.outcome.label()));
    }
    own
}

fn span(trace: &Trace, id: u64, parent: Option<u64>, from: u64, to: u64) -> Span {
    Span {
        trace_id: trace.id.to_be_bytes().to_vec(),
        span_id: id.to_be_bytes().to_vec(),
        parent_span_id: parent.map(|parent| parent.to_be_bytes().to_vec()).unwrap_or_default(),
        kind: SpanKind::Internal.into(),
        flags: trace.sampled.into(),
        start_time_unix_nano: from,
        end_time_unix_nano: to.max(from),
        ..Span::default()
    }
}

fn method(method: &http::Method) -> &str {
    match super::metrics::METHODS.contains(&method.as_str()) {
        true => method.as_str(),
        false => "_OTHER",
    }
}

fn nanos(at: SystemTime) -> u64 {
    let since: Duration = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn attribute(key: &str, value: any_value::Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

/// An attribute that is a text.
pub fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, any_value::Value::StringValue(value.to_owned()))
}

fn number(key: &str, value: i64) -> KeyValue {
    attribute(key, any_value::Value::IntValue(value))
}

fn list(key: &str, values: impl Iterator<Item = String>) -> KeyValue {
    let values = values.map(|value| AnyValue { value: Some(any_value::Value::StringValue(value)) }).collect();
    attribute(key, any_value::Value::ArrayValue(ArrayValue { values }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn settings(sample: f64, trust_clients: bool) -> Tracing {
        let text = format!("endpoint: http://c, sample: {sample}, trust_clients: {trust_clients}");
        let (endpoint, service) = (text, String::new());
        Tracing { endpoint, headers: Default::default(), sample: config::access_log::Part(sample), service, trust_clients }
    }

    #[test]
    fn parents_as_the_recommendation_writes_them() {
        let parent = Parent::parse(GIVEN).unwrap();
        assert_eq!(
            (parent.trace, parent.span, parent.sampled),
            (0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, 0xf0_67aa_0ba9_02b7, true)
        );
        assert!(!Parent::parse(&GIVEN.replace("-01", "-00")).unwrap().sampled);
        assert!(Parent::parse(&format!("cc{}-what", &GIVEN[2..])).is_some(), "a later version");
        for wrong in [
            "",
            "00",
            &GIVEN.replace("00-4", "ff-4"),
            &GIVEN.to_uppercase(),
            &GIVEN.replace("4bf92f3577b34da6a3ce929d0e0e4736", "00000000000000000000000000000000"),
            &GIVEN.replace("00f067aa0ba902b7", "0000000000000000"),
            &GIVEN.replace('-', "_"),
            &format!("{GIVEN}-more"),
            &format!("cc{}x", &GIVEN[2..]),
            "00-4bf92f3577b34da6a3ce929d0e0e473é-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Parent::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn who_is_believed() {
        let headers = |all: &[&str]| {
            all.iter().map(|v| (http::HeaderName::from_static(TRACEPARENT), v.parse().unwrap())).collect::<HeaderMap>()
        };
        let begin = |settings, given: &[&str], trusted| Trace::begin(&settings, &headers(given), trusted, 7, Moment::default());
        let given = Parent::parse(GIVEN).unwrap();
        let trusted = begin(settings(0.0, false), &[GIVEN], true);
        assert!(trusted.id == given.trace && trusted.sampled && trusted.is_continued());
        let stranger = begin(settings(0.0, false), &[GIVEN], false);
        assert!(stranger.id != given.trace && !stranger.sampled && stranger.link == Some(given));
        assert_eq!(begin(settings(0.0, true), &[GIVEN], false).id, given.trace);
        assert!(!begin(settings(1.0, false), &[&GIVEN.replace("-01", "-00")], true).sampled, "somebody decided already");
        assert!(!begin(settings(1.0, false), &[GIVEN, GIVEN], true).is_continued(), "twice");
        assert!(begin(settings(1.0, false), &["nonsense"], true).sampled);
    }

    #[test]
    fn a_part_is_traced() {
        let sampled = |sample| {
            let settings = settings(sample, false);
            let trace = |chance| Trace::begin(&settings, &HeaderMap::new(), false, mix(chance), Moment::default());
            (0..10_000).filter(|chance| trace(*chance).sampled).count()
        };
        assert_eq!((sampled(0.0), sampled(1.0)), (0, 10_000));
        assert!((800..1_200).contains(&sampled(0.1)));
        let trace = Trace::begin(&settings(1.0, false), &HeaderMap::new(), false, 1, Moment::default());
        let told = Parent::parse(trace.parent_of(0).to_str().unwrap()).unwrap();
        assert!(told.trace == trace.id && told.sampled && told.span != trace.span);
        assert_ne!(trace.parent_of(0), trace.parent_of(1));
    }
}
