//! What rules cost: nanoseconds (criterion), allocations (counted), and microseconds of the managed ruleset.
//!
//! `cargo bench --bench rules`

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a bench reports to a terminal, and ends where it cannot go on")]

use std::alloc::System;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use criterion::{Criterion, criterion_group, criterion_main};
use portolan::client::place::Databases;
use portolan::client::standing::Standing;
use portolan::config::waf::Sensitivity;
use portolan::explain::{Asked, Question};
use portolan::lists::Lists;
use portolan::lists::ranges::{IpRange, IpSet};
use portolan::request::{Moment, mix};
use portolan::rules::view::{Asker, Target};
use portolan::rules::{Filter, Limits, Phase, Scope, View};
use portolan::waf::managed::Managed;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn compile(expression: &str) -> Filter {
    let lists = Lists::default();
    Filter::new(expression, Scope { phase: Phase::Body, lists: &lists, limits: Limits::default() }).unwrap()
}

/// Rules as a zone has them: most compare paths, hosts and addresses, some look into headers, one in ten has a
/// regular expression. None of them matches the request.
fn mixed(n: usize) -> String {
    match n % 10 {
        0 => format!("http.request.uri.path contains \"/private-{n}\" and not ip.src in {{192.0.2.{}/32}}", n % 256),
        1 => format!("http.host eq \"h{n}.example.com\" and http.request.method in {{\"PUT\" \"DELETE\"}}"),
        2 => format!("ip.src in {{10.{}.0.0/16 172.16.{}.0/24 2001:db8:{n:x}::/48}}", n % 256, n % 256),
        3 => format!("starts_with(http.request.uri.path, \"/api/v{n}/\") or ends_with(http.request.uri.path, \".bak{n}\")"),
        4 => format!("http.user_agent contains \"BadBot/{n}\""),
        5 => format!("http.request.uri.path matches \"^/wp-(login|admin)/{n}\""),
        6 => format!("http.request.headers[\"x-key\"][0] eq \"key-{n}\""),
        7 => format!("ip.src.country in {{\"KP\" \"IR\"}} and len(http.request.uri.query) gt {}", 1_000 + n),
        8 => format!("http.request.uri.path wildcard \"/admin-{n}/*/edit\""),
        _ => format!("not http.request.version in {{\"HTTP/1.1\" \"HTTP/2\"}} and http.referer contains \"spam{n}\""),
    }
}

fn question(method: &str, url: &str, headers: &[(&str, &str)], body: Option<&str>) -> Question {
    Question {
        ip: "81.2.69.160".parse().unwrap(),
        method: method.to_owned(),
        url: url.to_owned(),
        headers: headers.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        body: body.map(str::to_owned),
        down: Vec::new(),
        response: None,
    }
}

const BROWSER: [(&str, &str); 6] = [
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/130.0 Safari/537.36"),
    ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"),
    ("accept-language", "en-GB,en;q=0.9"),
    ("accept-encoding", "gzip, deflate, br"),
    ("cookie", "session=0123456789abcdef0123456789abcdef; _ga=GA1.2.1234567890.1700000000; theme=dark"),
    ("referer", "https://shop.example.com/search?q=boots"),
];

/// Calls `run` with a request as rules see it.
fn with_view<R>(question: &Question, run: impl FnOnce(&dyn Fn() -> View<'static>, &View<'_>) -> R) -> R {
    // Leaked, so that views can be made anew without rebuilding what they borrow.
    let asked: &'static Asked = Box::leak(Box::new(Asked::new(question).unwrap()));
    let facts = Box::leak(Box::new(asked.facts(question.ip, 64 << 10)));
    let (databases, lists, standing) =
        (Box::leak(Box::<Databases>::default()), Box::leak(Box::<Lists>::default()), Box::leak(Box::<Standing>::default()));
    let place = Box::leak(Box::new(databases.lookup(question.ip)));
    let asker = Asker { ip: question.ip, trusted_peer: false, place, databases, lists, standing, now: Moment::default() };
    let target = Box::leak(Box::new(Target::new(facts)));
    let fresh = || View::new(facts, target, asker);
    let view = fresh();
    run(&fresh, &view)
}

fn rules(criterion: &mut Criterion) {
    let get = question("GET", "http://shop.example.com/products/42/boots?colour=brown&size=43&sort=price", &BROWSER, None);
    with_view(&get, |fresh, view| {
        for (name, expression) in [
            ("mission 1: path and address", "(http.request.uri.path contains \"/admin\" and not ip.src in {192.0.2.0/24})"),
            ("mission 1, path matches", "(http.request.uri.path contains \"/products\" and not ip.src in {192.0.2.0/24})"),
            ("mission 2: threat score", "(cf.threat_score gt 14)"),
            ("host eq", "http.host eq \"shop.example.org\""),
            ("path matches", "http.request.uri.path matches \"^/wp-(login|admin)\""),
            ("strict wildcard", "http.request.uri.path strict wildcard \"/api/*/profile\""),
            ("lower(user agent) contains", "lower(http.user_agent) contains \"bot\""),
            ("any header", "any(http.request.headers[\"accept\"][*] contains \"json\")"),
            ("any argument", "any(http.request.uri.args[\"q\"][*] contains \"x\")"),
        ] {
            let filter = compile(expression);
            criterion.bench_function(&format!("rule/{name}"), |b| b.iter(|| black_box(&filter).matches(black_box(view))));
            let region = Region::new(ALLOCATOR);
            for _ in 0..1_000 {
                black_box(filter.matches(view));
            }
            println!("rule/{name}: {} allocations in 1,000 evaluations", region.change().allocations);
        }
        let thousand: Vec<_> = (0..1_000).map(|n| compile(&mixed(n))).collect();
        assert!(!thousand.iter().any(|f| f.matches(view)), "each is asked");
        criterion.bench_function("rules/1,000 mixed, one request", |b| {
            b.iter(|| {
                let view = fresh();
                black_box(thousand.iter().any(|f| f.matches(&view)))
            });
        });
        criterion.bench_function("rules/view of a request", |b| b.iter(|| black_box(fresh())));
    });
    let mut group = criterion.benchmark_group("slow");
    group.sample_size(10);
    let texts: Vec<String> = (0..1_000).map(mixed).collect();
    group.bench_function("compile 1,000 rules", |b| b.iter(|| black_box(texts.iter().map(|t| compile(t)).collect::<Vec<_>>())));
    group.finish();

    // 200,000 networks of random sizes, asked about random addresses.
    let random = |n: u64| mix(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)) as u32;
    let network = |n: u64| ipnet::Ipv4Net::new(random(n).into(), 20 + (n % 13) as u8).unwrap().trunc();
    let set: IpSet = (0..200_000).map(|n| IpRange::from(ipnet::IpNet::V4(network(n)))).collect();
    let addresses: Vec<IpAddr> = (0..1 << 16).map(|n| IpAddr::V4(Ipv4Addr::from(random(n + 1_000_000)))).collect();
    let mut next = addresses.iter().cycle();
    println!("{} ranges after joining", set.len());
    criterion.bench_function("list/200,000 networks, one lookup", |b| b.iter(|| set.contains(*next.next().unwrap())));
}

fn managed(criterion: &mut Criterion) {
    let form = "title=Winter+boots&text=They%27re+warm+%26+dry%2C+and+I%27d+buy+them+again.+5%2F5&rating=5&from=a%40example.com";
    let json =
        r#"{"cart":[{"sku":"B-42","qty":1},{"sku":"S-7","qty":2}],"note":"Please don't ring; the baby's asleep.","coupon":""}"#;
    let page = "x".repeat(32_000);
    let requests = [
        ("GET", question("GET", "http://shop.example.com/products/42/boots?colour=brown&size=43&sort=price", &BROWSER, None)),
        (
            "form",
            question(
                "POST",
                "http://a/",
                &[&BROWSER[..], &[("content-type", "application/x-www-form-urlencoded")]].concat(),
                Some(form),
            ),
        ),
        ("JSON", question("POST", "http://a/", &[&BROWSER[..], &[("content-type", "application/json")]].concat(), Some(json))),
        (
            "32 KB of text",
            question("POST", "http://a/", &[&BROWSER[..], &[("content-type", "text/plain")]].concat(), Some(&page)),
        ),
    ];
    for level in [Sensitivity::Low, Sensitivity::Medium, Sensitivity::High] {
        let managed = Managed::new(level, &[], false).unwrap();
        for (name, question) in &requests {
            with_view(question, |fresh, view| {
                assert_eq!(managed.find(view, 0), None, "{name}");
                criterion.bench_function(&format!("managed/{level:?}/{name}"), |b| {
                    b.iter(|| {
                        let view = fresh();
                        black_box(managed.find(&view, 0).is_some())
                    });
                });
            });
        }
    }
}

criterion_group!(benches, rules, managed);
criterion_main!(benches);
