//! Steering, spilling, balancing, limits, affinity and the retry budget, seen from outside.

use std::collections::BTreeMap;

use crate::harness::*;
use crate::mmdb;

/// Asks `n` times and counts who answered.
async fn ask(edge: &Portolan, n: usize, path: &str, headers: &[(&str, &str)]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for _ in 0..n {
        let answer = edge.get(path, headers).await;
        assert_eq!(answer.status, 200, "{}", answer.head);
        *counts.entry(answer.text()).or_insert(0) += 1;
    }
    counts
}

/// Origins that answer with their names.
async fn named<const N: usize>(names: [&str; N]) -> [Origin; N] {
    let mut origins = Vec::new();
    for name in names {
        origins.push(Origin::always(ok(name)).await);
    }
    origins.try_into().unwrap_or_else(|_| unreachable!("as many as names"))
}

#[tokio::test(flavor = "multi_thread")]
async fn subdivision_then_country_then_continent_then_default() {
    let [west, east, eu, rest] = named(["west", "east", "eu", "rest"]).await;
    let dir = tempfile::TempDir::new().unwrap();
    let database = dir.path().join("city.mmdb");
    let yaml = format!(
        "client: {{ trusted_proxies: [127.0.0.0/8], city_database: {} }}
regions: {{ rest: {{ upstreams: [\"{}\"] }}, west: {{ upstreams: [\"{}\"] }}, east: {{ upstreams: [\"{}\"] }}, eu: {{ upstreams: [\"{}\"] }} }}
routes: [{{ steering: {{ countries: {{ US-CA: west, US: east }}, continents: {{ EU: eu }} }} }}]\n",
        database.display(),
        rest.url(),
        west.url(),
        east.url(),
        eu.url()
    );
    for (country, subdivision, region) in
        [("US", "CA", "west"), ("US", "NY", "east"), ("FR", "IDF", "eu"), ("JP", "13", "rest"), ("GB", "CA", "eu")]
    {
        std::fs::write(&database, mmdb::city(country, subdivision, 0.0, 0.0)).unwrap();
        let edge = Portolan::start(&yaml).await;
        let client = [("X-Forwarded-For", "192.0.3.7")];
        assert_eq!(edge.get("/", &client).await.text(), region, "{country}-{subdivision}");
        let said = edge
            .explain(serde_json::json!({ "ip": "127.0.0.1", "url": "/", "headers": [["X-Forwarded-For", "192.0.3.7"]] }))
            .await;
        assert_eq!(said["country"]["subdivision"], format!("{country}-{subdivision}"));
        assert_eq!(said["answer"]["region"], region);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nearest_region_by_coordinates() {
    let [london, tokyo] = named(["london", "tokyo"]).await;
    let dir = tempfile::TempDir::new().unwrap();
    let database = dir.path().join("city.mmdb");
    let yaml = |client: &str| {
        format!(
            "client: {{ trusted_proxies: [127.0.0.0/8], {client} }}
regions:
  london: {{ upstreams: [\"{}\"], location: {{ latitude: 51.5, longitude: -0.1 }} }}
  tokyo: {{ upstreams: [\"{}\"], location: {{ latitude: 35.7, longitude: 139.7 }} }}
routes: [{{ steering: {{ policy: proximity }} }}]\n",
            london.url(),
            tokyo.url()
        )
    };
    for (latitude, longitude, region) in [(48.9, 2.4, "london"), (37.6, 127.0, "tokyo"), (-33.9, 151.2, "tokyo")] {
        std::fs::write(&database, mmdb::city("US", "CA", latitude, longitude)).unwrap();
        let edge = Portolan::start(&yaml(&format!("city_database: {}", database.display()))).await;
        assert_eq!(edge.get("/", &[("X-Forwarded-For", "192.0.3.7")]).await.text(), region, "{latitude} {longitude}");
    }
    // Without coordinates the centre of the country.
    let edge = Portolan::start(&yaml(&format!("country_database: {}", crate::harness::database()))).await;
    for (client, region) in [("81.2.69.160", "london"), ("202.32.115.1", "tokyo"), ("139.130.4.5", "tokyo")] {
        assert_eq!(edge.get("/", &[("X-Forwarded-For", client)]).await.text(), region, "{client}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_are_kept_and_sticky_clients_stay() {
    let [a, b] = named(["a", "b"]).await;
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }}, b: {{ upstreams: [\"{}\"] }} }}
routes:
  - {{ paths: [/drawn], steering: {{ policy: weighted, weights: {{ a: 3, b: 1 }} }} }}
  - {{ paths: [/sticky], steering: {{ policy: weighted, weights: {{ a: 1, b: 1 }}, sticky: true }} }}\n",
        a.url(),
        b.url()
    ))
    .await;
    let counts = ask(&edge, 400, "/drawn", &[]).await;
    assert!((240..360).contains(&counts["a"]), "{counts:?}");
    let mut clients = BTreeMap::new();
    for i in 0..40 {
        let client = format!("192.0.3.{i}");
        let counts = ask(&edge, 5, "/sticky", &[("X-Forwarded-For", &client)]).await;
        assert_eq!(counts.len(), 1, "{client} moved: {counts:?}");
        *clients.entry(counts.into_keys().next().unwrap()).or_insert(0) += 1;
    }
    assert_eq!(clients.len(), 2, "{clients:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_teaches_which_region_is_fastest() {
    let [slow, fast] = named(["slow", "fast"]).await;
    // A relay that waits makes a region far away.
    let far = delayed(slow.address, std::time::Duration::from_millis(30)).await;
    let edge = Portolan::start(&format!(
        "regions: {{ far: {{ upstreams: [\"http://{far}\"] }}, near: {{ upstreams: [\"{}\"] }} }}
routes: [{{ steering: {{ policy: latency, default: far, failover: [near] }} }}]\n",
        fast.url()
    ))
    .await;
    let first = ask(&edge, 1, "/", &[]).await;
    assert_eq!(first["slow"], 1, "before anything is known it is the order of the file");
    ask(&edge, 300, "/", &[]).await;
    let learned = ask(&edge, 99, "/", &[]).await;
    assert!(learned["fast"] >= 98, "{learned:?}");
    assert!(edge.metric("portolan_latency_areas").await >= 1.0);
    let said = edge.explain(serde_json::json!({ "ip": "127.0.0.1", "url": "/" })).await;
    assert_eq!(said["regions"][0]["name"], "near");
    assert!(said["regions"][0]["because"].as_str().unwrap().contains("learned"), "{said:#}");
}

/// Passes bytes on to `to`, each answer `delay` later.
async fn delayed(to: std::net::SocketAddr, delay: std::time::Duration) -> std::net::SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut back) = client.into_split();
                let (mut answers, mut there) = tokio::net::TcpStream::connect(to).await.unwrap().into_split();
                tokio::spawn(async move { tokio::io::copy(&mut from, &mut there).await });
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = answers.read(&mut buffer).await {
                    tokio::time::sleep(delay).await;
                    if back.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn residency_is_503_rather_than_a_leak() {
    let other = Origin::scripted(vec![]).await;
    let dead = refused();
    let edge = Portolan::start(&format!(
        "regions: {{ us: {{ upstreams: [\"{}\"] }}, eu: {{ upstreams: [\"http://{dead}\"] }} }}
routes: [{{ client_regions: true, steering: {{ only: [eu] }} }}]\n",
        other.url()
    ))
    .await;
    for headers in
        [vec![], vec![("Portolan-Prefer-Region", "us")], vec![("Portolan-Force-Region", "us")], vec![("fly-force-region", "us")]]
    {
        for method in ["GET", "POST"] {
            let answer = edge.request(method, "/", &headers, b"").await;
            assert_eq!((answer.status, answer.text().as_str()), (503, "All regions unavailable"), "{method} {headers:?}");
        }
    }
    assert_eq!(other.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_choose_only_where_the_route_lets_them() {
    let [us, eu] = named(["us", "eu"]).await;
    let edge = Portolan::start(&format!(
        "regions: {{ us: {{ upstreams: [\"{}\"] }}, eu: {{ upstreams: [\"{}\"] }} }}
routes:
  - {{ paths: [/open], client_regions: true, steering: {{ default: us, failover: [eu] }} }}
  - {{ paths: [/closed], steering: {{ default: us, failover: [eu] }} }}
  - {{ paths: [/own], client_regions: true, steering: {{ default: us }} }}\n",
        us.url(),
        eu.url()
    ))
    .await;
    for name in ["Portolan-Prefer-Region", "Portolan-Force-Region", "fly-prefer-region", "fly-force-region"] {
        assert_eq!(edge.get("/open", &[(name, "eu")]).await.text(), "eu", "{name}");
        assert_eq!(edge.get("/closed", &[(name, "eu")]).await.text(), "us", "{name}");
        let prefers = name.to_lowercase().contains("prefer");
        let own = edge.get("/own", &[(name, "eu")]).await;
        assert_eq!(own.status, if prefers { 200 } else { 503 }, "the route does not name it: {name}");
    }
    assert_eq!(edge.get("/open", &[("fly-prefer-region", "mars")]).await.text(), "us");
    assert_eq!(edge.get("/open", &[("fly-force-region", "mars")]).await.status, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_stay_in_the_primary_and_reads_follow_them() {
    let [primary, near] = named(["primary", "near"]).await;
    let yaml = |more: &str| {
        format!(
            "regions: {{ near: {{ upstreams: [\"{}\"] }}, primary: {{ upstreams: [\"{}\"] }} }}
routes: [{{ steering: {{ default: near, failover: [primary], writes: primary, read_your_writes: 30s{more} }} }}]\n",
            near.url(),
            primary.url()
        )
    };
    let edge = Portolan::start(&yaml("")).await;
    assert_eq!(edge.get("/", &[]).await.text(), "near");
    let mut wrote = String::new();
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        let answer = edge.request(method, "/", &[], b"x").await;
        assert_eq!(answer.text(), "primary", "{method}");
        let cookie = answer.header("set-cookie").unwrap();
        assert!(cookie.contains("HttpOnly") && cookie.contains("Max-Age=31"), "{cookie}");
        wrote = cookie.split(';').next().unwrap().to_owned();
    }
    assert_eq!(edge.get("/", &[("Cookie", &wrote)]).await.text(), "primary");
    // Nobody else can write such a cookie, and an old one is nothing.
    for forged in ["portolan-wrote=99999999999.0", &wrote.replacen('1', "2", 1), "portolan-wrote="] {
        assert_eq!(edge.get("/", &[("Cookie", forged)]).await.text(), "near", "{forged}");
    }
    // The primary fails: reads move on, writes do not.
    primary.becomes(Act::Close);
    assert_eq!(edge.get("/", &[("Cookie", &wrote)]).await.text(), "near");
    let answer = edge.request("PUT", "/", &[], b"x").await;
    assert_eq!((answer.status, answer.header("set-cookie")), (503, None));
    drop(edge);
    let edge = Portolan::start(&yaml(", writes_failover: [near]")).await;
    assert_eq!(edge.request("PUT", "/", &[], b"x").await.text(), "near", "unless the route says so");
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_region_keeps_its_share_and_the_rest_spills() {
    let [a, b, next] = named(["home", "home", "next"]).await;
    let edge = Portolan::start(&format!(
        "regions: {{ home: {{ upstreams: [\"{}\", \"{}\"], slow_start: 0s, health_check: {{ type: tcp, interval: 50ms, fall: 1 }} }}, next: {{ upstreams: [\"{}\"] }} }}
routes: [{{ steering: {{ default: home, failover: [next] }} }}]\n",
        a.url(),
        b.url(),
        next.url()
    ))
    .await;
    assert_eq!(ask(&edge, 50, "/", &[]).await.len(), 1);
    drop(b);
    edge.until("half of it is down", |s| {
        (s.live.load().snapshot.regions[0].capacity(portolan::proxy::clock::now()).usable - 0.5).abs() < 0.01
    })
    .await;
    let counts = ask(&edge, 600, "/", &[]).await;
    // 1.4 × 50 %, as Envoy has it.
    assert!((370..470).contains(&counts["home"]), "{counts:?}");
    assert!(edge.metric("portolan_failovers_total{from=\"home\",reason=\"spill\",to=\"next\"}").await > 100.0);
    assert_eq!(edge.metric("portolan_region_usable_ratio{region=\"home\"}").await, 0.5);
    let said = edge.explain(serde_json::json!({ "ip": "127.0.0.1", "url": "/" })).await;
    let shares: Vec<_> = said["regions"].as_array().unwrap().iter().map(|r| r["share"].as_f64().unwrap()).collect();
    assert!((shares.iter().sum::<f64>() - 1.0).abs() < 0.001, "{shares:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hashing_keeps_a_key_at_its_upstream() {
    let [a, b, c] = named(["a", "b", "c"]).await;
    let region =
        |balance: &str| format!("{{ upstreams: [\"{}\", \"{}\", \"{}\"], balance: {balance} }}", a.url(), b.url(), c.url());
    let edge = Portolan::start(&format!(
        "regions: {{ ip: {}, cookie: {}, header: {} }}
routes:
  - {{ paths: [/ip], steering: {{ default: ip }} }}
  - {{ paths: [/cookie], steering: {{ default: cookie }} }}
  - {{ paths: [/header], steering: {{ default: header }} }}\n",
        region("hash"),
        region("{ hash: { cookie: user } }"),
        region("{ hash: { header: X-User } }")
    ))
    .await;
    for path in ["/ip", "/cookie", "/header"] {
        let mut used = BTreeMap::new();
        for user in 0..30 {
            let (address, cookie, header) = (format!("192.0.3.{user}"), format!("user={user}"), user.to_string());
            let headers = match path {
                "/ip" => [("X-Forwarded-For", address.as_str())],
                "/cookie" => [("Cookie", cookie.as_str())],
                _ => [("X-User", header.as_str())],
            };
            let counts = ask(&edge, 4, path, &headers).await;
            assert_eq!(counts.len(), 1, "{path} {user}: {counts:?}");
            *used.entry(counts.into_keys().next().unwrap()).or_insert(0) += 1;
        }
        assert_eq!(used.len(), 3, "{path}: {used:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn affinity_survives_failure_temporarily_or_moves_for_good() {
    for (failover, back) in [("temporary", true), ("permanent", false)] {
        let [a, b, other] = named(["a", "b", "other"]).await;
        let edge = Portolan::start(&format!(
            "regions:
  home: {{ upstreams: [\"{}\", \"{}\"], slow_start: 0s, affinity: {{ cookie: stay, failover: {failover} }} }}
  next: {{ upstreams: [\"{}\"] }}
routes: [{{ steering: {{ default: home, failover: [next] }} }}]\n",
            a.url(),
            b.url(),
            other.url()
        ))
        .await;
        let first = edge.get("/", &[]).await;
        let cookie = first.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
        let (name, value) = cookie.split_once('=').unwrap();
        assert_eq!((name, value.len()), ("stay", 32));
        let own = if first.text() == "a" { &a } else { &b };
        assert!(
            value.bytes().all(|b| b.is_ascii_hexdigit()) && !value.contains(&own.address.port().to_string()),
            "it reveals the address"
        );
        let mut headers = vec![("Cookie", cookie.as_str())];
        let again = edge.get("/", &headers).await;
        assert_eq!((again.text(), again.header("set-cookie")), (first.text(), None));
        assert_eq!(ask(&edge, 30, "/", &headers).await.len(), 1);
        // Its upstream fails, one request at a time; the client is served by the other.
        own.becomes(Act::Close);
        let elsewhere = edge.get("/", &headers).await;
        assert_eq!((elsewhere.status, elsewhere.text() != first.text()), (200, true), "{failover}");
        let moved = elsewhere.header("set-cookie").map(|c| c.split(';').next().unwrap().to_owned());
        assert_eq!(moved.is_none(), back, "{failover}: {moved:?}");
        own.becomes(ok(&first.text()));
        if let Some(moved) = &moved {
            headers = vec![("Cookie", moved)];
        }
        let counts = ask(&edge, 20, "/", &headers).await;
        assert_eq!(counts.contains_key(&first.text()), back, "{failover}: {counts:?}");
        assert_eq!(counts.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_spill_then_queue_then_refuse() {
    // Origins that keep every request until they are told.
    let [home, next] = [Origin::always(Act::Hang).await, Origin::always(Act::Hang).await];
    let edge = Portolan::start(&format!(
        "regions:
  home: {{ upstreams: [\"{}\"], max_requests: 2, queue: {{ size: 1, timeout: 60s }} }}
  next: {{ upstreams: [{{ url: \"{}\", max_requests: 1 }}] }}
routes: [{{ steering: {{ default: home, failover: [next] }}, timeouts: {{ first_byte: 60s, total: 120s }} }}]\n",
        home.url(),
        next.url()
    ))
    .await;
    let address = edge.address;
    let request = || tokio::spawn(async move { send(address, "GET", "/", &[], b"").await });
    let held = [request(), request()];
    home.came(2).await;
    let spilled = request();
    next.came(1).await;
    let queued = request();
    edge.until("one waits", |s| s.live.load().snapshot.regions[0].state.waiting() == 1).await;
    assert_eq!(edge.metric("portolan_region_queue_length{region=\"home\"}").await, 1.0);
    // The queue is full.
    let refused = edge.get("/", &[]).await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert!(refused.header("proxy-status").unwrap().contains("connection_limit_reached"));
    assert_eq!(edge.metric("portolan_retries_skipped_total{reason=\"busy\"}").await, 1.0);
    // A client leaves, be it in the other region: its place goes to the one that waits.
    next.becomes(ok("at last"));
    spilled.abort();
    assert_eq!(queued.await.unwrap().text(), "at last");
    for held in held {
        held.abort();
    }
    edge.until("every place is given back", |s| s.live.load().snapshot.regions.iter().all(|r| r.state.in_flight() == 0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_every_region_failing_retries_stay_in_their_budget() {
    let mut origins = Vec::new();
    for _ in 0..3 {
        origins.push(Origin::always(status(503, "no")).await);
    }
    let [a, b, c] = [0, 1, 2].map(|i: usize| origins[i].url());
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{a}\"] }}, b: {{ upstreams: [\"{b}\"] }}, c: {{ upstreams: [\"{c}\"] }} }}
routes: [{{ steering: {{ default: a, failover: [b, c] }} }}]\n"
    ))
    .await;
    const REQUESTS: usize = 400;
    for _ in 0..REQUESTS {
        assert_eq!(edge.get("/", &[]).await.status, 503);
    }
    let attempts: usize = origins.iter().map(Origin::count).sum();
    assert!(attempts >= REQUESTS && attempts * 10 < REQUESTS * 12, "{attempts} attempts for {REQUESTS} requests");
    // Regions that refuse connections would each be tried by each request, for nothing is lost by it.
    drop(edge);
    let [a, b, c] = [refused(), refused(), refused()];
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"http://{a}\"] }}, b: {{ upstreams: [\"http://{b}\"] }}, c: {{ upstreams: [\"http://{c}\"] }} }}
routes: [{{ steering: {{ default: a, failover: [b, c] }} }}]\n"
    ))
    .await;
    for _ in 0..REQUESTS {
        assert_eq!(edge.get("/", &[]).await.status, 503);
    }
    let mut attempts = 0.0;
    for region in ["a", "b", "c"] {
        let line = format!("portolan_upstream_attempts_total{{outcome=\"connect_refused\",region=\"{region}\"}}");
        attempts += edge.metric(&line).await;
    }
    assert!(attempts < 1.2 * REQUESTS as f64, "{attempts} attempts for {REQUESTS} requests");
    assert!(edge.metric("portolan_retries_skipped_total{reason=\"budget\"}").await > 100.0);
    let status = edge.status().await;
    assert!(status["routes"][0]["retries_10s"].as_u64().unwrap() <= 80, "{}", status["routes"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn unix_sockets_are_upstreams_too() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("app.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let app = axum::Router::new().fallback(|headers: axum::http::HeaderMap| async move {
        // A health check comes without.
        format!("unix {}", headers.get("portolan-region").map_or("check", |r| r.to_str().unwrap()))
    });
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    let edge = Portolan::start(&format!(
        "regions: {{ local: {{ upstreams: [\"unix:{}\"], health_check: {{ interval: 50ms }} }}, gone: {{ upstreams: [\"unix:/nowhere/app.sock\"] }} }}
routes: [{{ steering: {{ default: gone, failover: [local] }} }}]\n",
        path.display()
    ))
    .await;
    assert_eq!(edge.get("/", &[]).await.text(), "unix local");
    // Also where the connection is not shared, as for event streams.
    assert_eq!(edge.get("/", &[("Accept", "text/event-stream")]).await.text(), "unix local");
    edge.until("a health check went through it", |s| {
        s.live.load().snapshot.regions[0].upstreams[0].state.endpoints()[0].active.verdict()
            == portolan::regions::active::Verdict::Up
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_with_one_secret_know_each_others_cookies() {
    let [a, b] = named(["a", "b"]).await;
    let yaml = |secret: &str| {
        format!(
            "secret: {secret}
regions: {{ r: {{ upstreams: [\"{}\", \"{}\"], affinity: {{ cookie: stay, max_age: 2h }} }} }}
routes: [{{}}]\n",
            a.url(),
            b.url()
        )
    };
    let shared = "correct-horse-battery";
    let (one, two, other) = (
        Portolan::start(&yaml(shared)).await,
        Portolan::start(&yaml(shared)).await,
        Portolan::start(&yaml("another-secret-of-mine")).await,
    );
    let first = one.get("/", &[]).await;
    let cookie = first.header("set-cookie").unwrap();
    assert!(cookie.ends_with("; Path=/; HttpOnly; SameSite=Lax; Max-Age=7200"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap();
    for _ in 0..10 {
        let answer = two.get("/", &[("Cookie", cookie)]).await;
        assert_eq!((answer.text(), answer.header("set-cookie")), (first.text(), None));
    }
    assert!(other.get("/", &[("Cookie", cookie)]).await.header("set-cookie").is_some(), "without it, it is nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_has_an_end_and_a_soft_limit_spills() {
    let [home, next] = [Origin::always(Act::Hang).await, Origin::always(ok("next")).await];
    let edge = Portolan::start(&format!(
        "regions:
  soft: {{ upstreams: [{{ url: \"{home}\", soft_limit: 1 }}] }}
  hard: {{ upstreams: [\"{home}\"], max_requests: 1, queue: {{ size: 5, timeout: 50ms }} }}
  next: {{ upstreams: [\"{}\"] }}
routes:
  - {{ paths: [/soft], steering: {{ default: soft, failover: [next] }} }}
  - {{ paths: [/hard], steering: {{ default: hard }}, timeouts: {{ first_byte: 60s, total: 90s }} }}\n",
        next.url(),
        home = home.url()
    ))
    .await;
    let address = edge.address;
    let hold = |path| tokio::spawn(async move { send(address, "GET", path, &[], b"").await });
    let held = hold("/hard");
    home.came(1).await;
    let refused = edge.get("/hard", &[]).await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "its time in the queue is over");
    // The upstream is the same, so its one request counts here too.
    assert_eq!(edge.get("/soft", &[]).await.text(), "next");
    held.abort();
    edge.until("it is over", |s| s.live.load().snapshot.regions[1].state.in_flight() == 0).await;
    home.becomes(ok("home"));
    assert_eq!((edge.get("/soft", &[]).await.text(), edge.get("/hard", &[]).await.text()), ("home".into(), "home".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_serves_only_while_the_others_are_out() {
    let [main, backup] = named(["main", "backup"]).await;
    let edge = Portolan::start(&format!(
        "regions: {{ r: {{ upstreams: [{{ url: \"{}\", backup: true }}, \"{}\"], slow_start: 0s, health_check: {{ type: tcp, interval: 40ms, fall: 1, rise: 1 }} }} }}
routes: [{{}}]\n",
        backup.url(),
        main.url()
    ))
    .await;
    assert_eq!(ask(&edge, 20, "/", &[]).await.len(), 1);
    assert_eq!(backup.count(), 0);
    let address = main.address;
    drop(main);
    // What is open when an origin ends may serve one more.
    let wait = async { while edge.get("/", &[]).await.text() != "backup" {} };
    tokio::time::timeout(PATIENCE, wait).await.expect("the backup never answered");
    assert_eq!(ask(&edge, 20, "/", &[]).await["backup"], 20);
    let _main = Origin::at(address, vec![], Some(ok("main"))).await;
    let wait = async { while edge.get("/", &[]).await.text() != "main" {} };
    tokio::time::timeout(PATIENCE, wait).await.expect("the main one never came back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_without_a_budget_retries_nothing_that_was_answered() {
    let [a, b] = [Origin::always(status(503, "a")).await, Origin::always(ok("b")).await];
    for (budget, code) in [("{ percent: 0, min_per_second: 0 }", 503), ("{ percent: 0, min_per_second: 1 }", 200)] {
        let edge = Portolan::start(&format!(
            "regions: {{ a: {{ upstreams: [\"{}\"] }}, b: {{ upstreams: [\"{}\"] }} }}
routes: [{{ steering: {{ default: a, failover: [b] }}, retry: {{ budget: {budget} }} }}]\n",
            a.url(),
            b.url()
        ))
        .await;
        let answer = edge.get("/", &[]).await;
        assert_eq!(answer.status, code, "{budget}");
        let skipped = edge.metric("portolan_retries_skipped_total{reason=\"budget\"}").await;
        assert_eq!(skipped, f64::from(u8::from(code == 503)), "{budget}");
    }
}

/// A cookie says where a client belongs, and that does not change because something had to go elsewhere once.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_does_not_move_a_clients_affinity() {
    let [near, primary] = named(["near", "primary"]).await;
    let edge = Portolan::start(&format!(
        "regions:
  near: {{ upstreams: [\"{}\"], affinity: {{ cookie: stay }} }}
  primary: {{ upstreams: [\"{}\"], affinity: {{ cookie: stay }} }}
routes: [{{ steering: {{ default: near, failover: [primary], writes: primary }} }}]\n",
        near.url(),
        primary.url()
    ))
    .await;
    let cookie = edge.get("/", &[]).await.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    let wrote = edge.request("POST", "/", &[("Cookie", &cookie)], b"x").await;
    assert_eq!((wrote.text().as_str(), wrote.header("set-cookie")), ("primary", None));
    assert_eq!(edge.request("POST", "/", &[], b"x").await.header("set-cookie"), None, "nor does it make one");
    assert_eq!(edge.get("/", &[("Cookie", &cookie)]).await.text(), "near");
}

/// A stale keep-alive connection is a race that nobody can win, so the client must never see it.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_races_with_an_origin_that_closes_idle_connections() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(1..) = stream.read(&mut buffer).await {
                    if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.is_err() {
                        return;
                    }
                    // It closes about when the next request comes.
                    let patience = std::time::Duration::from_micros(fastrand::u64(0..400));
                    match tokio::time::timeout(patience, stream.readable()).await {
                        Ok(_) if fastrand::bool() => {}
                        Ok(_) | Err(_) => return,
                    }
                }
            });
        }
    });
    let edge = Portolan::start(&format!("regions: {{ a: {{ upstreams: [\"http://{address}\"] }} }}\nroutes: [{{}}]\n")).await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let to = edge.address;
        clients.spawn(async move {
            let mut stream = tokio::net::TcpStream::connect(to).await.unwrap();
            let mut buffer = Vec::new();
            for i in 0..1_250 {
                stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
                let head = read_head(&mut stream, &mut buffer).await.unwrap();
                read_body(&head, &mut stream, &mut buffer).await.unwrap();
                assert!(head.starts_with("HTTP/1.1 200"), "request {i}: {head}");
                if i % 7 == 0 {
                    tokio::time::sleep(std::time::Duration::from_micros(fastrand::u64(0..600))).await;
                }
            }
        });
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
    let races = edge.metric("portolan_upstream_attempts_total{outcome=\"closed\",region=\"a\"}").await;
    assert!(races > 0.0, "there was no race, so nothing was shown");
}
