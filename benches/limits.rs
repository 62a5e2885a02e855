//! What a limit's decision costs: with a million clients, with several threads, in the middle of a flood. Beside it
//! `pingora-limits`, whose counts are estimates.
//!
//! `cargo bench --bench limits`

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a bench reports to a terminal, and ends where it cannot go on")]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, Method, Version};
use pingora_limits::rate::Rate;
use portolan::config::Paths;
use portolan::decide::asker;
use portolan::limits::quota::{Algorithm, Quota};
use portolan::limits::table::{Handle, Table};
use portolan::limits::{Asked, Stage, Verdict};
use portolan::memory::Memory;
use portolan::reload::{Known, build};
use portolan::request::{Facts, Moment, Seen, mix};
use portolan::rules::View;
use portolan::rules::view::Target;
use portolan::signing::Key;
use portolan::snapshot::Snapshot;

const QUOTA: Quota = Quota { algorithm: Algorithm::Sliding, requests: 1_000, period: Duration::from_secs(60) };
const CLIENTS: u64 = 1_000_000;

fn snapshot() -> Snapshot {
    let yaml = "client: { trusted_proxies: [127.0.0.0/8] }
regions: { a: { upstreams: [http://127.0.0.1:9101] } }
routes: [{ name: all }]
limits: [{ id: api, requests: 1000, period: 60s }]
";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), yaml).unwrap();
    let paths = Paths { file: file.path().to_owned(), environment: None };
    build(&paths, &Known::default(), &Memory::new(Key::new(b"bench"))).unwrap().snapshot
}

/// The `n`th client's number, in an order without a pattern.
fn client(n: u64) -> u64 {
    mix(n % CLIENTS + 1)
}

fn take(table: &Table, n: u64) -> bool {
    table.with(Handle(client(n) | 1), 0, Moment::default(), |entry| {
        entry.count.adopt(&QUOTA, Moment::default());
        let used = entry.count.used(&QUOTA, 1, Moment::default());
        if used.fits {
            entry.count.add(&QUOTA, 1, Moment::default());
            entry.weigh(used.left, QUOTA.requests);
        }
        used.fits
    })
}

/// As a request asks: expression, key, table.
fn ask(snapshot: &Snapshot, n: u64, headers: &HeaderMap, now: Moment) -> bool {
    let ip = IpAddr::V4(Ipv4Addr::from_bits(client(n) as u32));
    let facts = Facts {
        peer: ip,
        method: &Method::GET,
        host: "api.example.do",
        path: "/",
        query: None,
        version: Version::HTTP_11,
        tls: false,
        misdirected: false,
        fault: None,
        certified: false,
        headers,
        has_body: false,
        body: Seen::Unread,
        request_id: "",
        time: Duration::ZERO,
        chance: 7,
    };
    let client = snapshot.trust.resolve(ip, headers);
    let place = snapshot.databases.lookup(client.ip);
    let target = Target::new(&facts);
    let view = View::new(&facts, &target, asker(snapshot, &client, &place, now));
    let mut asked = Asked::default();
    snapshot.limits.judge(&view, Stage::Arrival, false, |_| None, &mut asked) == Verdict::Pass
}

/// `threads` threads share `iterations`; the time until the last is done.
fn together(threads: u64, iterations: u64, work: impl Fn(u64) + Sync) -> Duration {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let work = &work;
            scope.spawn(move || (0..iterations / threads).for_each(|n| work(n * threads + thread)));
        }
    });
    began.elapsed()
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Nanoseconds of single decisions, sorted.
fn sample(snapshot: &Snapshot, headers: &HeaderMap, now: Moment, known: impl Fn(u64) -> u64) -> Vec<u64> {
    let one = |n| {
        let began = Instant::now();
        black_box(ask(snapshot, known(n), headers, now));
        u64::try_from(began.elapsed().as_nanos()).unwrap()
    };
    let mut all: Vec<u64> = (0..200_000).map(one).collect();
    all.sort_unstable();
    all
}

fn benches(criterion: &mut Criterion) {
    for (name, memory) in [("64 MiB", 64 << 20), ("128 MiB", 128 << 20)] {
        let table = Table::new(memory);
        (0..CLIENTS).for_each(|n| _ = take(&table, n));
        for threads in [1, 2] {
            criterion.bench_function(&format!("table/1,000,000 clients, {name}, {threads} threads"), |b| {
                b.iter_custom(|n| together(threads, n, |n| _ = black_box(take(&table, n))));
            });
        }
        for threads in [1, 2] {
            criterion.bench_function(&format!("table/one client, {name}, {threads} threads"), |b| {
                b.iter_custom(|n| together(threads, n, |_| _ = black_box(take(&table, 0))));
            });
        }
    }
    let rate = Arc::new(Rate::new_with_estimator_config(Duration::from_secs(60), 4, 1 << 20));
    (0..CLIENTS).for_each(|n| _ = rate.observe(&client(n), 1));
    for threads in [1, 2] {
        criterion.bench_function(&format!("pingora-limits, 4 x 1 M/1,000,000 clients, {threads} threads"), |b| {
            b.iter_custom(|n| together(threads, n, |n| _ = black_box(rate.observe(&client(n), 1))));
        });
    }
    let snapshot = snapshot();
    let headers = HeaderMap::new();
    let now = Moment::default();
    for threads in [1, 2] {
        criterion.bench_function(&format!("judge/1,000,000 clients, {threads} threads"), |b| {
            b.iter_custom(|n| together(threads, n, |n| _ = black_box(ask(&snapshot, n, &headers, now))));
        });
    }

    // A million clients that were never seen before, in what would be a minute; before and while they come.
    let snapshot = self::snapshot();
    let (low, high) = (Moment(Duration::from_secs(60)), Moment(Duration::from_secs(61)));
    let at = |all: &[u64], part: f64| all.get((all.len() as f64 * part) as usize).copied().unwrap_or(0);
    (0..50_000).for_each(|n| _ = ask(&snapshot, n, &headers, low));
    let (before, quiet) = (resident(), sample(&snapshot, &headers, low, |n| n % 50_000));
    (0..CLIENTS).for_each(|n| _ = ask(&snapshot, n, &headers, high));
    let flood = sample(&snapshot, &headers, high, |n| if n % 2 == 0 { n % 50_000 } else { n + CLIENTS / 2 });
    let after = resident();
    let fill = snapshot.limits.ledger.as_ref().unwrap().table.fill();
    println!(
        "a million clients in a minute: resident {before} KiB before, {after} KiB after; a decision {} / {} ns before, {} / {} ns in the flood (p50 / p99); {fill:?}",
        at(&quiet, 0.5),
        at(&quiet, 0.99),
        at(&flood, 0.5),
        at(&flood, 0.99),
    );
}

criterion_group!(all, benches);
criterion_main!(all);
