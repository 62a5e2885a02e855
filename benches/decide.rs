//! What a decision costs: nanoseconds (criterion) and allocations (counted).
//!
//! `cargo bench --bench decide`

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a bench reports to a terminal, and ends where it cannot go on")]

use std::alloc::System;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, Method, Version};
use portolan::client::country::CountryDatabase;
use portolan::config::Paths;
use portolan::decide::{Next, decide};
use portolan::memory::Memory;
use portolan::reload::{Known, build};
use portolan::request::{Facts, Moment, Seen};
use portolan::signing::Key;
use portolan::snapshot::Snapshot;
use portolan::upstream::Backends;
use portolan::upstream::plan::Mode;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Nine countries, five regions, a thousand routes, and one for each dynamic policy.
fn snapshot() -> Snapshot {
    let mut yaml = format!(
        "client: {{ trusted_proxies: [127.0.0.0/8, 10.0.0.0/8], country_database: {}/geoip/country.mmdb }}\nregions:\n",
        env!("CARGO_MANIFEST_DIR")
    );
    for (i, region) in ["us_east", "eu_west", "ap_northeast", "ap_southeast", "sa_east"].iter().enumerate() {
        let location = format!("{{ latitude: {}, longitude: {} }}", 10 * i, 30 * i);
        yaml.push_str(&format!("  {region}: {{ upstreams: [http://127.0.0.1:{}], location: {location} }}\n", 9101 + i));
    }
    yaml.push_str("routes:\n");
    let steering = "steering: { countries: { US: us_east, CA: us_east, GB: eu_west, FR: eu_west, DE: eu_west, JP: ap_northeast, CN: ap_northeast, \
                    AU: ap_southeast, BR: sa_east }, default: us_east, failover: [us_east, eu_west, ap_northeast] }";
    for i in 0..1_000 {
        yaml.push_str(&format!(
            "  - {{ name: r{i}, hosts: [h{}.example.com, \"*.w{i}.example.com\"], paths: [/api/{i}/], {steering} }}\n",
            i % 100
        ));
    }
    for policy in ["proximity", "latency"] {
        yaml.push_str(&format!("  - {{ name: {policy}, hosts: [{policy}.example.com], steering: {{ policy: {policy} }} }}\n"));
    }
    let weights = "{ us_east: 5, eu_west: 3, ap_northeast: 1 }";
    yaml.push_str(&format!("  - {{ hosts: [weighted.example.com], steering: {{ policy: weighted, weights: {weights} }} }}\n"));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), yaml).unwrap();
    let paths = Paths { file: file.path().to_owned(), environment: None };
    build(&paths, &Known::default(), &Memory::new(Key::new(b"bench"))).unwrap().snapshot
}

/// One decision and its first attempt, as a request makes them.
fn journey(snapshot: &Snapshot, facts: &Facts<'_>) {
    let now = Moment::default();
    let decision = decide(black_box(snapshot), black_box(facts), now, Mode::Commit);
    let Next::Forward(mut plan) = decision.next else { unreachable!("every request of this bench has a route") };
    let matched = decision.route.and_then(|m| snapshot.route(m.route));
    let retry = &matched.unwrap().retry;
    black_box(plan.next(Backends { regions: &snapshot.regions, retry }, now)).unwrap();
    black_box(plan);
}

fn benches(criterion: &mut Criterion) {
    let snapshot = snapshot();
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("x-forwarded-for", "81.2.69.160, 10.1.2.3"),
        ("accept", "text/html,application/xhtml+xml"),
        ("user-agent", "Mozilla/5.0"),
        ("accept-encoding", "gzip, br"),
        ("cookie", "session=0123456789abcdef"),
    ] {
        headers.insert(name, value.parse().unwrap());
    }
    let facts = |host, path| Facts {
        peer: IpAddr::from([127, 0, 0, 1]),
        method: &Method::GET,
        host,
        path,
        query: None,
        version: Version::HTTP_11,
        tls: false,
        misdirected: false,
        fault: None,
        certified: false,
        headers: &headers,
        has_body: false,
        body: Seen::Unread,
        request_id: "0123456789abcdef0123456789abcdef",
        time: Duration::ZERO,
        chance: 7,
    };
    let exact = facts("h42.example.com", "/api/742/orders/17");
    let wildcard = facts("a.b.w742.example.com:8080", "/api/742/orders/17");
    criterion.bench_function("decide/exact host, 1000 routes", |b| b.iter(|| journey(&snapshot, &exact)));
    criterion.bench_function("decide/wildcard host, 1000 routes", |b| b.iter(|| journey(&snapshot, &wildcard)));

    let hosts = ["weighted.example.com", "proximity.example.com", "latency.example.com"];
    // Something has to be learned before it can be looked up.
    for _ in 0..100 {
        let decision = decide(&snapshot, &facts(hosts[2], "/"), Moment::default(), Mode::Commit);
        let route = decision.route.and_then(|m| snapshot.route(m.route)).unwrap();
        for region in &snapshot.regions {
            route.steering.learn(decision.learns.unwrap(), region, std::time::Duration::from_millis(20));
        }
    }
    for host in hosts {
        criterion.bench_function(&format!("decide/{host}"), |b| b.iter(|| journey(&snapshot, &facts(host, "/"))));
    }

    let region = Region::new(ALLOCATOR);
    for _ in 0..1_000 {
        journey(&snapshot, &exact);
        journey(&snapshot, &wildcard);
        hosts.iter().for_each(|host| journey(&snapshot, &facts(host, "/")));
    }
    println!("decide: {} allocations in 5000 decisions", region.change().allocations);

    let mut random = fastrand::Rng::with_seed(7);
    let addresses: Vec<IpAddr> = (0..10_000)
        .map(|i| {
            if i % 4 == 0 {
                Ipv6Addr::from(0x2000 << 112 | random.u128(..) >> 4).into()
            } else {
                Ipv4Addr::from(random.u32(..)).into()
            }
        })
        .collect();
    let database: &CountryDatabase = snapshot.databases.countries.as_deref().unwrap();
    let mut next = addresses.iter().cycle();
    criterion.bench_function("country/10000 random addresses", |b| b.iter(|| black_box(database.lookup(*next.next().unwrap()))));
    let region = Region::new(ALLOCATOR);
    for address in &addresses {
        black_box(database.lookup(*address));
    }
    println!("country: {} allocations in 10000 lookups", region.change().allocations);
}

criterion_group!(group, benches);
criterion_main!(group);
