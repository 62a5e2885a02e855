//! Traces: spans at a collector, and what origins are told.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use parking_lot::Mutex;
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::harness::*;
use crate::process::Program;

/// A collector that remembers; the first answers are those of its script.
#[derive(Default)]
struct Collector {
    script: Mutex<Vec<u16>>,
    spans: Mutex<Vec<Span>>,
    services: Mutex<Vec<String>>,
    authorization: Mutex<Option<String>>,
    came: Notify,
}

async fn take(State(collector): State<Arc<Collector>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let next = collector.script.lock().pop();
    if let Some(status) = next {
        return StatusCode::from_u16(status).unwrap();
    }
    assert_eq!(headers["content-type"], "application/x-protobuf");
    *collector.authorization.lock() = headers.get("authorization").map(|v| v.to_str().unwrap().to_owned());
    for resource in ExportTraceServiceRequest::decode(body).unwrap().resource_spans {
        let service =
            resource.resource.unwrap().attributes.iter().find(|a| a.key == "service.name").map(|a| format!("{:?}", a.value));
        collector.services.lock().extend(service);
        collector.spans.lock().extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
    }
    collector.came.notify_one();
    StatusCode::OK
}

impl Collector {
    async fn start(script: &[u16]) -> (Arc<Self>, String) {
        let collector = Arc::new(Self::default());
        *collector.script.lock() = script.to_vec();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().route("/v1/traces", post(take)).with_state(collector.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        (collector, format!("http://{address}"))
    }

    /// Waits for so many spans.
    async fn spans(&self, count: usize) -> Vec<Span> {
        let wait = async {
            while self.spans.lock().len() < count {
                self.came.notified().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .unwrap_or_else(|_| panic!("{count} spans never came: {:?}", self.spans.lock()));
        self.spans.lock().clone()
    }
}

fn attributes(span: &Span) -> HashMap<&str, String> {
    let text = |value: &Value| match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    };
    let value = |a: &opentelemetry_proto::tonic::common::v1::KeyValue| a.value.as_ref().and_then(|v| v.value.as_ref()).map(text);
    span.attributes.iter().filter_map(|a| Some((a.key.as_str(), value(a)?))).collect()
}

fn yaml(tracing: &str, a: &str, b: &str) -> String {
    format!(
        "tracing: {{ {tracing} }}
regions: {{ a: {{ upstreams: [\"{a}\"] }}, b: {{ upstreams: [\"{b}\"] }} }}
routes: [{{ name: shop, cache: {{ enabled: true }}, steering: {{ default: a, failover: [b] }} }}]
waf: {{ rules: [{{ id: watch, expression: 'http.request.uri.path eq \"/\"', action: log }}] }}
"
    )
}

const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_its_rules_the_cache_and_each_attempt_have_a_span() {
    // A collector that is busy is asked again.
    let (collector, endpoint) = Collector::start(&[503, 429]).await;
    let b = Origin::always(ok("b")).await;
    let settings =
        format!("endpoint: \"{endpoint}\", sample: 0, service: edge, headers: {{ Authorization: \"Bearer ${{env:PATH}}\" }}");
    let edge = Portolan::start(&yaml(&settings, &format!("http://{}", refused()), &b.url())).await;
    // This machine is trusted, and says that it is recorded.
    let got = edge.get("/?secret=1", &[("traceparent", GIVEN), ("tracestate", "vendor=1"), ("X-Request-Id", "me")]).await;
    assert_eq!(got.region(), "b");
    let spans = collector.spans(5).await;
    assert_eq!(spans.len(), 5, "{spans:#?}");
    assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE && span.start_time_unix_nano <= span.end_time_unix_nano));
    let [root, rules, cache, first, second] = spans.as_slice() else { unreachable!() };
    assert_eq!(hex(&root.parent_span_id), "00f067aa0ba902b7");
    assert!(spans[1..].iter().all(|span| span.parent_span_id == root.span_id));
    let names: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["GET shop", "rules", "cache", "GET a", "GET b"]);
    let seen = attributes(root);
    for (key, value) in [
        ("http.request.method", "GET"),
        ("url.path", "/"),
        ("http.response.status_code", "200"),
        ("portolan.route", "shop"),
        ("portolan.region", "b"),
        ("portolan.request_id", "me"),
        ("network.protocol.version", "1.1"),
    ] {
        assert_eq!(seen.get(key).map(String::as_str), Some(value), "{key}");
    }
    assert!(!format!("{spans:?}").contains("secret"));
    assert!(attributes(rules)["portolan.rules"].contains("watch: log"));
    assert_eq!(attributes(cache)["portolan.cache.status"], "miss");
    assert_eq!((attributes(first)["portolan.outcome"].as_str(), first.status.as_ref().unwrap().code), ("connect_refused", 2));
    assert_eq!(attributes(second)["http.request.resend_count"], "1");
    // The origin belongs to the attempt.
    let told = b.received()[0].clone();
    assert_eq!(told.one("traceparent"), Some(format!("00-{TRACE}-{}-01", hex(&second.span_id)).as_str()));
    assert_eq!(told.one("tracestate"), Some("vendor=1"));
    assert!(collector.services.lock()[0].contains("edge"));
    assert!(collector.authorization.lock().as_ref().unwrap().starts_with("Bearer /"));
    // It is counted once the collector's answer is there.
    let counted = async {
        while edge.metric("portolan_trace_spans_total{result=\"exported\"}").await < 5.0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.expect("they were never counted");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_always_sent_and_strangers_decide_nothing() {
    let (collector, endpoint) = Collector::start(&[]).await;
    let a = Origin::always(ok("a")).await;
    let client = format!("client: {{ country_database: {} }}\naccess_log: {{ path: access.log }}\n", database());
    let edge =
        Portolan::start(&format!("{}{client}", yaml(&format!("endpoint: \"{endpoint}\", sample: 0"), &a.url(), &a.url()))).await;
    edge.get("/fine", &[("traceparent", GIVEN), ("tracestate", "vendor=1")]).await;
    let told = a.received()[0].clone();
    let parent = told.one("traceparent").unwrap().to_owned();
    assert!(!parent.contains(TRACE) && parent.ends_with("-00") && told.one("tracestate").is_none(), "{}", told.head);
    a.becomes(status(500, "no"));
    edge.get("/broken", &[("traceparent", GIVEN)]).await;
    let spans = collector.spans(4).await;
    assert_eq!(attributes(&spans[0])["portolan.why"], "origin_5xx", "the first was not sent");
    assert_eq!((spans[0].status.as_ref().unwrap().code, hex(&spans[0].links[0].trace_id).as_str()), (2, TRACE));
    edge.state.access_log.close();
    let log = std::fs::read_to_string(edge.path("access.log")).unwrap();
    assert!(log.contains(&format!("\"trace_id\":\"{}\"", hex(&spans[0].trace_id))), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_tracing_the_header_passes_as_it_came() {
    let a = Origin::always(ok("a")).await;
    let edge =
        Portolan::start(&format!("regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\n", a.url())).await;
    edge.get("/", &[("traceparent", GIVEN)]).await;
    edge.get("/", &[]).await;
    let told = a.received();
    assert_eq!((told[0].one("traceparent"), told[1].one("traceparent")), (Some(GIVEN), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_spans_are_taken_before_the_process_ends() {
    let (collector, endpoint) = Collector::start(&[]).await;
    let a = Origin::always(ok("a")).await;
    let mut program = Program::run(&yaml(&format!("endpoint: \"{endpoint}\", sample: 1"), &a.url(), &a.url())).await;
    send(program.address, "GET", "/", &[], b"").await;
    program.signal("TERM");
    assert!(program.ended().await.success());
    assert_eq!(collector.spans.lock().len(), 4, "a request, its rules, the cache, an attempt");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_stays_away_costs_spans_and_nothing_else() {
    let a = Origin::always(ok("a")).await;
    let edge = Portolan::start(&yaml(&format!("endpoint: \"http://{}\", sample: 1", refused()), &a.url(), &a.url())).await;
    assert_eq!(edge.get("/", &[]).await.text(), "a");
    let failed = async {
        while edge.metric("portolan_trace_spans_total{result=\"failed\"}").await < 4.0 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, failed).await.expect("they were never given up");
}

/// A collector of others: rotel, which PyPI has.
fn rotel() -> (Helper, String, BufReader<std::process::ChildStdout>) {
    let program = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/rotel/rotel/rotel-agent");
    let (http, grpc) = (refused(), refused());
    let mut child = Command::new(program)
        .args(["start", "--exporter", "blackhole", "--debug-log", "traces", "--debug-log-verbosity", "detailed"])
        .args(["--otlp-http-endpoint", &http.to_string(), "--otlp-grpc-endpoint", &grpc.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("rotel is missing: run `make test-deps`");
    let out = BufReader::new(child.stdout.take().unwrap());
    (Helper(child), format!("http://{http}"), out)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_of_others_understands_them() {
    let (_rotel, endpoint, out) = rotel();
    let address = endpoint.trim_start_matches("http://").parse().unwrap();
    listening(address).await;
    let a = Origin::always(ok("a")).await;
    let edge = Portolan::start(&yaml(&format!("endpoint: \"{endpoint}\", sample: 1"), &a.url(), &a.url())).await;
    edge.get("/", &[("traceparent", GIVEN)]).await;
    let read = tokio::task::spawn_blocking(move || {
        let mut said = String::new();
        for line in out.lines().map_while(Result::ok) {
            said.push_str(&line);
            said.push('\n');
            if said.contains("GET shop") && said.contains("GET a") && said.contains(TRACE) && said.contains("portolan.region") {
                return said;
            }
        }
        panic!("it ended: {said}")
    });
    tokio::time::timeout(PATIENCE, read).await.expect("the spans never came").unwrap();
    assert_eq!(edge.metric("portolan_trace_spans_total{result=\"failed\"}").await, 0.0);
}
