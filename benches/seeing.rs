//! What seeing costs: the part of a request that is over, and a scrape, `/status.json` and the beat of every second with a
//! thousand routes.
//!
//! `cargo bench --bench seeing`

#![expect(clippy::unwrap_used, reason = "a bench ends where it cannot go on")]

use std::hint::black_box;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, Method, Version};
use portolan::admin::Status;
use portolan::boot::boot;
use portolan::client::country::LookupResult;
use portolan::config::Paths;
use portolan::config::units::Country;
use portolan::observe::RequestDone;
use portolan::observe::tail::Wanted;
use portolan::observe::trace::{Trace, spans};
use portolan::proxy::clock;
use portolan::routes::{HostMatch, RouteId};
use portolan::state::State;
use portolan::tasks::seconds::beat;

const ROUTES: usize = 1_000;

fn state(more: &str) -> (Arc<State>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let routes: String = (0..ROUTES).map(|n| format!("  - {{ name: r{n}, hosts: [h{n}.example] }}\n")).collect();
    let yaml = format!(
        "listeners: [{{ address: 127.0.0.1:0 }}]\nadmin: {{ address: 127.0.0.2:0 }}\nregions: {{ a: {{ upstreams: [http://127.0.0.1:1] }} }}\n{more}\nroutes:\n{routes}"
    );
    std::fs::write(dir.path().join("portolan.yaml"), yaml).unwrap();
    let paths = Paths { file: dir.path().join("portolan.yaml"), environment: None };
    (boot(paths, false).unwrap().state, dir)
}

/// Calls `each` with a request to a route that is over.
fn done(state: &State, route: usize, status: u16, country: &str, trace: Option<&Trace>, each: impl FnOnce(&RequestDone<'_>)) {
    let live = state.live.load_full();
    let mut headers = HeaderMap::new();
    headers.insert("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:141.0) Gecko/20100101 Firefox/141.0".parse().unwrap());
    each(&RequestDone {
        live: &live,
        at: SystemTime::now(),
        request_id: "0123456789abcdef0123456789abcdef",
        client: IpAddr::from([81, 2, 69, 160]),
        country: country.parse::<Country>().unwrap(),
        lookup: LookupResult::Found,
        method: &Method::GET,
        host: &format!("h{route}.example"),
        path: "/shop/compasses",
        query: None,
        version: Version::HTTP_11,
        secured: true,
        headers: &headers,
        chance: fastrand::u64(..),
        status,
        bytes: 1_024,
        route: Some(RouteId(route as u32)),
        matched: Some(HostMatch::Exact),
        refusal: None,
        aborted: false,
        trace,
        matches: &[],
        limits: &[],
        class: 0,
        shed: None,
        cache: None,
        plan: None,
        started: clock::now(),
        total: Duration::from_micros(fastrand::u64(500..50_000)),
    });
}

fn benches(criterion: &mut Criterion) {
    let mut record = |name: &str, watched: bool| {
        let (state, _dir) = state("access_log: { path: \"off\" }");
        let watching = watched.then(|| state.tail.watch(Wanted { status: Some("5xx".to_owned()), ..Wanted::default() }));
        done(&state, 7, 200, "GB", None, |done| {
            criterion.bench_function(name, |b| b.iter(|| state.record(black_box(done), clock::now())));
        });
        drop(watching);
    };
    record("record/nobody watches", false);
    record("record/somebody watches", true);

    let (state, _dir) = state("access_log: { path: \"off\" }\ntracing: { endpoint: http://127.0.0.1:1, sample: 1 }");
    let live = state.live.load_full();
    let settings = live.snapshot.tracing.as_ref().unwrap();
    criterion.bench_function("trace/begin", |b| {
        b.iter(|| Trace::begin(settings, black_box(&HeaderMap::new()), true, fastrand::u64(..), clock::now()))
    });
    let trace = Trace::begin(settings, &HeaderMap::new(), true, 7, clock::now());
    done(&state, 7, 200, "GB", Some(&trace), |done| {
        criterion.bench_function("trace/spans of a request", |b| b.iter(|| black_box(spans(&trace, done, clock::now()))));
    });

    // Five minutes of traffic: every route, many countries, some errors.
    let countries = ["GB", "FR", "DE", "US", "CA", "JP", "CN", "AU", "BR", "IN", "ZA", "NG", "AR", "MX", "IT", "ES"];
    for second in 0..300 {
        for route in 0..ROUTES {
            let status = if route % 50 == 0 { 503 } else { 200 };
            let country = countries.get((second + route) % countries.len()).copied().unwrap_or("XX");
            done(&state, route, status, country, None, |done| state.record(done, clock::now()));
        }
        beat(&state, Duration::from_secs(1));
    }
    let render = || state.metrics.render(&live, state.store, 0, clock::now()).unwrap();
    let mut group = criterion.benchmark_group(format!("{ROUTES} routes"));
    group.sample_size(20);
    group.bench_function("scrape", |b| b.iter(|| black_box(render())));
    group
        .bench_function("status.json", |b| b.iter(|| black_box(serde_json::to_vec(&Status::now(&state, clock::now())).unwrap())));
    group.bench_function("a beat", |b| b.iter(|| beat(&state, Duration::from_secs(1))));
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
