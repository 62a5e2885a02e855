//! The cache: what is answered without the origin, and what is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Barrier, Semaphore};

use crate::harness::*;
use crate::process::Program;

/// A response with these headers and this body.
pub fn with(headers: &str, body: &str) -> Act {
    let headers: String = headers.split('|').filter(|h| !h.is_empty()).map(|h| format!("{}\r\n", h.trim())).collect();
    Act::Send(format!("HTTP/1.1 200 OK\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes())
}

/// One route with the cache on; `more` stands below.
pub fn cached(origins: &[&Origin], more: &str) -> String {
    let regions: Vec<String> =
        origins.iter().enumerate().map(|(i, origin)| format!("r{i}: {{ upstreams: [\"{}\"] }}", origin.url())).collect();
    let failover: Vec<String> = (1..origins.len()).map(|i| format!("r{i}")).collect();
    format!(
        "regions: {{ {} }}\nroutes: [{{ steering: {{ default: r0, failover: [{}] }}, cache: {{ enabled: true }} }}]\n{more}\n",
        regions.join(", "),
        failover.join(", ")
    )
}

pub fn said(response: &Response) -> &str {
    response.header("cache-status").unwrap_or("")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hit_is_told_as_one() {
    let origin =
        Origin::scripted(vec![with("Cache-Control: max-age=60|Cache-Tag: one,two|Surrogate-Key: three|X-Own: 1", "hello")]).await;
    let edge = Portolan::start(&cached(&[&origin], "")).await;
    let first = edge.get("/a?b=1", &[]).await;
    assert_eq!(said(&first), "portolan; fwd=uri-miss; stored; ttl=59", "{}", first.head);
    assert_eq!(first.region(), "r0");
    let second = edge.get("/a?b=1", &[]).await;
    assert!(said(&second).starts_with("portolan; hit; ttl=5"), "{}", second.head);
    assert_eq!((second.text().as_str(), second.header("x-own")), ("hello", Some("1")));
    assert!(second.header("age").is_some());
    for hidden in ["cache-tag", "surrogate-key"] {
        assert_eq!((first.header(hidden), second.header(hidden)), (None, None), "tags are not for clients");
    }
    assert_ne!(first.header("x-request-id"), second.header("x-request-id"));
    let head = edge.request("HEAD", "/a?b=1", &[], b"").await;
    assert_eq!((head.header("content-length"), head.body.len()), (Some("5"), 0));
    let same = edge.get("/a?b=1", &[("Host", "LOCALHOST")]).await;
    assert!(said(&same).contains("hit"), "hosts have no case");
    assert_eq!(edge.metric("portolan_cache_requests_total{status=\"hit\"}").await, 3.0);
    assert_eq!(edge.metric("portolan_cache_requests_total{status=\"miss\"}").await, 1.0);
    assert!(edge.metric("portolan_cache_bytes{tier=\"memory\"}").await > 500.0);
    let why = edge.explain(json!({ "ip": "192.0.2.1", "url": "http://localhost/a?b=1" })).await;
    assert_eq!(why["cache"]["key"], "localhost/a?b=1");
    assert!(why["cache"]["stored"][0].as_str().unwrap().starts_with("a response with status 200, 5 bytes, on memory"), "{why}");
    origin.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_to_be_shared_is_not() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&cached(&[&origin], "")).await;
    for (headers, request, detail) in [
        ("Cache-Control: no-store", "GET", "no-store"),
        ("Cache-Control: private, max-age=60", "GET", "private"),
        ("Cache-Control: max-age=60|Set-Cookie: id=1", "GET", "set-cookie"),
        ("Cache-Control: max-age=60|Vary: *", "GET", "vary-all"),
        ("", "GET", "not-fresh"),
    ] {
        origin.becomes(with(headers, "x"));
        let path = format!("/{detail}");
        let (first, second) = (edge.request(request, &path, &[], b"").await, edge.request(request, &path, &[], b"").await);
        assert!(said(&first).ends_with(&format!("detail={detail}")), "{}", first.head);
        assert!(said(&second).starts_with("portolan; fwd=bypass") && !said(&second).contains("stored"), "{}", second.head);
    }
    origin.becomes(with("Cache-Control: max-age=60", "x"));
    edge.get("/own", &[("Authorization", "Basic eDp5")]).await;
    let other = edge.get("/own", &[]).await;
    assert!(said(&other).contains("uri-miss"), "what was asked for with a password is not for others: {}", other.head);
    let post = edge.request("POST", "/own", &[], b"x").await;
    assert_eq!(said(&post), "portolan; fwd=method");
    assert!(said(&edge.get("/own", &[]).await).contains("uri-miss"), "what it changed is not what was stored");
}

/// An origin that sends a header and half of a body, and the rest once it may.
pub async fn halves(length: usize) -> (std::net::SocketAddr, Arc<Semaphore>, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (go, count) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let (theirs, counted) = (go.clone(), count.clone());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (go, count) = (theirs.clone(), counted.clone());
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while read_head(&mut stream, &mut buffer).await.is_some() {
                    count.fetch_add(1, Ordering::SeqCst);
                    let head = format!("HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: {length}\r\n\r\n");
                    stream.write_all(head.as_bytes()).await.unwrap();
                    stream.write_all(&vec![b'a'; length / 2]).await.unwrap();
                    go.acquire().await.unwrap().forget();
                    if stream.write_all(&vec![b'b'; length - length / 2]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, go, count)
}

/// Asks, and reads until the header and half of the body are there.
pub async fn half(edge: std::net::SocketAddr, path: &str, half: usize) -> (TcpStream, Vec<u8>) {
    let mut stream = TcpStream::connect(edge).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a.do\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut got = Vec::new();
    let read = async {
        loop {
            if let Some(end) = got.windows(4).position(|w| w == b"\r\n\r\n")
                && got.len() >= end + 4 + half
            {
                return;
            }
            assert!(stream.read_buf(&mut got).await.unwrap() > 0, "{}", String::from_utf8_lossy(&got));
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("half of it never came");
    (stream, got)
}

pub fn at(address: std::net::SocketAddr, more: &str) -> String {
    format!(
        "regions: {{ a: {{ upstreams: [\"http://{address}\"] }} }}\nroutes: [{{ cache: {{ enabled: true }}, timeouts: {{ first_byte: 50s, total: 55s }} }}]\n{more}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clients_are_one_fetch() {
    const CLIENTS: usize = 1000;
    let (origin, go, count) = halves(20_000).await;
    let edge = Portolan::start(&at(origin, "")).await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(half(edge.address, "/big", 10_000));
    }
    // Every one of them has the first half before the second exists.
    let mut streams = Vec::new();
    while let Some(done) = clients.join_next().await {
        streams.push(done.unwrap());
    }
    assert_eq!(count.load(Ordering::SeqCst), 1);
    // The first of them leaves, and another one reads nothing more for now.
    streams.truncate(CLIENTS - 1);
    let slow = streams.pop().unwrap();
    go.add_permits(1);
    for (mut stream, mut got) in streams {
        stream.read_to_end(&mut got).await.unwrap();
        let response = parse(&got, false);
        assert!(response.complete, "{} {}", response.head, response.body.len());
        let (a, b) = response.body.split_at(10_000);
        assert!(a.iter().all(|x| *x == b'a') && b.iter().all(|x| *x == b'b'));
    }
    drop(slow);
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert!(said(&edge.get("/big", &[("Host", "a.do")]).await).contains("hit"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_caused_it_may_leave() {
    let (origin, go, count) = halves(20_000).await;
    let edge = Portolan::start(&at(origin, "")).await;
    let (stream, _) = half(edge.address, "/left", 10_000).await;
    drop(stream);
    go.add_permits(1);
    let whole = edge.get("/left", &[("Host", "a.do")]).await;
    assert!(whole.complete && whole.body.len() == 20_000, "{} {} {}", whole.head, whole.body.len(), whole.complete);
    assert_eq!(count.load(Ordering::SeqCst), 1, "{}", whole.head);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ends_early_ends_early_for_all_and_is_not_stored() {
    let chunked = "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    let short = "Content-Length: 10\r\n\r\nhello";
    for framing in [chunked, short] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let go = Arc::new(Semaphore::new(0));
        let theirs = go.clone();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_head(&mut stream, &mut Vec::new()).await;
            stream.write_all(format!("HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\n{framing}").as_bytes()).await.unwrap();
            theirs.acquire().await.unwrap().forget();
            drop(stream);
            let (mut stream, _) = listener.accept().await.unwrap();
            read_head(&mut stream, &mut Vec::new()).await;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole").await.unwrap();
            let _ = stream.read(&mut [0; 1]).await;
        });
        let edge = Portolan::start(&at(address, "")).await;
        let mut readers = [half(edge.address, "/", 5).await, half(edge.address, "/", 5).await];
        go.add_permits(1);
        for (stream, got) in &mut readers {
            // It may be reset as well.
            let _ = stream.read_to_end(got).await;
            assert!(!parse(got, false).complete, "{}", String::from_utf8_lossy(got));
        }
        let next = edge.get("/", &[("Host", "a.do")]).await;
        assert_eq!((next.text().as_str(), next.complete), ("whole", true));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_breaks_before_anybody_saw_it_is_tried_elsewhere() {
    let broken = "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 10\r\n\r\n";
    let first = Origin::scripted(vec![Act::SendAndClose(broken.into())]).await;
    let other = Origin::scripted(vec![with("Cache-Control: max-age=60", "whole")]).await;
    let edge = Portolan::start(&cached(&[&first, &other], "")).await;
    let response = edge.get("/", &[]).await;
    // Whether the client had the header already is a matter of a moment; what it gets is never a mixture.
    match response.complete {
        true => assert_eq!(response.text(), "whole"),
        false => assert_eq!(response.text(), ""),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_stored_makes_nobody_wait() {
    const AT_ONCE: usize = 50;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let together = Arc::new(Barrier::new(AT_ONCE));
    let first = Arc::new(AtomicUsize::new(0));
    let (barrier, count) = (together.clone(), first.clone());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (barrier, count) = (barrier.clone(), count.clone());
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while read_head(&mut stream, &mut buffer).await.is_some() {
                    // All but the first answer only when all of them are here.
                    if count.fetch_add(1, Ordering::SeqCst) > 0 {
                        barrier.wait().await;
                    }
                    stream.write_all(b"HTTP/1.1 200 OK\r\nCache-Control: private\r\nContent-Length: 2\r\n\r\nme").await.unwrap();
                }
            });
        }
    });
    let edge = Portolan::start(&at(address, "")).await;
    assert!(said(&edge.get("/", &[]).await).contains("detail=private"));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..AT_ONCE {
        let edge = edge.address;
        clients.spawn(async move { send(edge, "GET", "/", &[], b"").await.status });
    }
    while let Some(status) = clients.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_first_and_one_fetch_behind_it() {
    let origin = Origin::scripted(vec![
        with("Cache-Control: max-age=0, stale-while-revalidate=600|ETag: \"1\"", "old"),
        with("Cache-Control: max-age=600", "new"),
    ])
    .await;
    let edge =
        Portolan::start(&cached(&[&origin], "limits: [{ id: few, by: [], requests: 9, period: 600s, only_misses: true }]")).await;
    assert_eq!(edge.get("/", &[]).await.text(), "old");
    let stale = edge.get("/", &[]).await;
    assert_eq!(stale.text(), "old");
    assert!(
        said(&stale).starts_with("portolan; hit; ttl=") && said(&stale).ends_with("detail=stale-while-revalidate"),
        "{}",
        stale.head
    );
    origin.came(2).await;
    edge.until("the new one is there", |_| true).await;
    loop {
        let fresh = edge.get("/", &[]).await;
        if fresh.text() == "new" {
            break;
        }
        tokio::task::yield_now().await;
    }
    origin.done();
    // What was fetched behind it is nobody's request.
    assert_eq!(edge.metric("portolan_limit_decisions_total{decision=\"allowed\",limit=\"few\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_once_every_region_has_failed() {
    for failure in [Act::Close, status(503, "down"), status(500, "broken")] {
        let stored = with("Cache-Control: max-age=0|ETag: \"1\"", "good");
        let first = Origin::start(vec![stored], Some(failure.clone())).await;
        let other = Origin::scripted(vec![with("Cache-Control: max-age=0|ETag: \"2\"", "from the other")]).await;
        let edge = Portolan::start(&cached(&[&first, &other], "")).await;
        assert_eq!(edge.get("/", &[]).await.text(), "good");
        let retried = !matches!(&failure, Act::Send(bytes) if bytes.starts_with(b"HTTP/1.1 500"));
        if retried {
            let second = edge.get("/", &[]).await;
            assert_eq!((second.text().as_str(), second.region()), ("from the other", "r1"), "a region that works comes first");
            other.done();
        }
        other.becomes(failure.clone());
        let stale = edge.get("/", &[]).await;
        assert_eq!(
            (stale.status, stale.text().as_str()),
            (200, if retried { "from the other" } else { "good" }),
            "{}",
            stale.head
        );
        assert!(
            said(&stale).starts_with("portolan; fwd=stale") && said(&stale).ends_with("detail=stale-if-error"),
            "{}",
            stale.head
        );
        assert_eq!(edge.metric("portolan_cache_requests_total{status=\"stale_error\"}").await, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_not_be_stale_is_not() {
    for forbidden in ["must-revalidate", "proxy-revalidate", "no-cache", "s-maxage=0", "stale-if-error=0"] {
        let stored = with(&format!("Cache-Control: max-age=0, {forbidden}|ETag: \"1\""), "good");
        let origin = Origin::start(vec![stored], Some(status(503, "down"))).await;
        let edge = Portolan::start(&cached(&[&origin], "")).await;
        edge.get("/", &[]).await;
        let failed = edge.get("/", &[]).await;
        assert_eq!(failed.status, 503, "{forbidden}: {}", failed.head);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_304_says_that_it_still_holds() {
    let origin = Origin::scripted(vec![
        with("Cache-Control: no-cache|ETag: \"1\"|X-Old: 1|X-New: a", "body"),
        Act::Send(b"HTTP/1.1 304 Not Modified\r\nETag: \"1\"\r\nCache-Control: max-age=60\r\nX-New: b\r\n\r\n".to_vec()),
    ])
    .await;
    let edge = Portolan::start(&cached(&[&origin], "")).await;
    edge.get("/", &[]).await;
    let validated = edge.get("/", &[]).await;
    assert_eq!((validated.status, validated.text().as_str()), (200, "body"));
    assert!(said(&validated).starts_with("portolan; fwd=stale; fwd-status=304; stored"), "{}", validated.head);
    assert_eq!((validated.header("x-old"), validated.header("x-new")), (Some("1"), Some("b")));
    assert_eq!(origin.received()[1].one("if-none-match"), Some("\"1\""));
    let hit = edge.get("/", &[("If-None-Match", "W/\"1\"")]).await;
    assert_eq!((hit.status, hit.header("x-new")), (304, Some("b")), "{}", hit.head);
    origin.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_come_from_the_whole() {
    let chunked = b"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nETag: \"1\"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n";
    let origin = Origin::scripted(vec![Act::Send(chunked.to_vec()), with("Cache-Control: max-age=60", "again")]).await;
    let edge = Portolan::start(&cached(&[&origin], "")).await;
    let first = edge.get("/", &[("Range", "bytes=2-4")]).await;
    assert!(origin.received()[0].all("range").is_empty(), "the whole is fetched");
    assert_eq!(first.text(), "0123456789");
    for (range, if_range, status, body) in [
        ("bytes=2-4", "", 206, "234"),
        ("bytes=-3", "", 206, "789"),
        ("bytes=8-", "\"1\"", 206, "89"),
        ("bytes=8-", "\"2\"", 200, "0123456789"),
        ("bytes=20-", "", 416, ""),
    ] {
        let response =
            edge.get("/", &[("Range", range), ("If-Range", if_range)][..if if_range.is_empty() { 1 } else { 2 }]).await;
        assert_eq!((response.status, response.text().as_str()), (status, body), "{range} {if_range}: {}", response.head);
    }
    let parts = edge.get("/", &[("Range", "bytes=0-1,5-6")]).await;
    assert_eq!(parts.status, 206);
    assert!(parts.text().contains("bytes 0-1/10") && parts.text().contains("bytes 5-6/10"), "{}", parts.text());
    // A part that nobody asked for is not the whole.
    let stray = Origin::scripted(vec![
        Act::Send(b"HTTP/1.1 206 Partial Content\r\nCache-Control: max-age=60\r\nContent-Range: bytes 0-1/10\r\nContent-Length: 2\r\n\r\n01".to_vec()),
        with("Cache-Control: max-age=60", "whole"),
    ])
    .await;
    let edge = Portolan::start(&cached(&[&stray], "")).await;
    edge.get("/", &[]).await;
    assert_eq!(edge.get("/", &[]).await.text(), "whole");
}

#[tokio::test(flavor = "multi_thread")]
async fn variants_are_of_what_the_origin_sees() {
    let origin =
        Origin::always(with("Cache-Control: max-age=60|Vary: Portolan-Country, X-Forwarded-Host, Accept-Encoding", "x")).await;
    let edge = Portolan::start(&cached(&[&origin], "client: { trusted_proxies: [], country_database: \"\" }").replace(
        "client: { trusted_proxies: [], country_database: \"\" }",
        &format!("client: {{ trusted_proxies: [], country_database: {} }}", database()),
    ))
    .await;
    edge.get("/", &[("Accept-Encoding", "gzip, br")]).await;
    // What a stranger says of itself reaches no origin, and makes no variant.
    let forged =
        edge.get("/", &[("Portolan-Country", "GB"), ("X-Forwarded-Host", "evil"), ("Accept-Encoding", "br;q=0.5,gzip")]).await;
    assert!(said(&forged).contains("hit"), "{}", forged.head);
    let other = edge.get("/", &[("Accept-Encoding", "identity")]).await;
    assert!(said(&other).starts_with("portolan; fwd=vary-miss"), "{}", other.head);
    assert!(said(&edge.get("/", &[]).await).contains("vary-miss"), "who says nothing takes anything");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_unkeyed_reaches_the_origin() {
    let origin = Origin::always(with("Cache-Control: max-age=60", "x")).await;
    let edge = Portolan::start(&cached(&[&origin], "")).await;
    let poison = [
        ("X-Original-URL", "/admin"),
        ("X-Rewrite-URL", "/admin"),
        ("X-HTTP-Method-Override", "DELETE"),
        ("X-Forwarded-Scheme", "nothttps"),
        ("X-Host", "evil"),
        ("X-Forwarded-Server", "evil"),
        ("X-Forwarded-Prefix", "/evil"),
    ];
    edge.get("/poisoned", &poison).await;
    let head = origin.received()[0].head.to_ascii_lowercase();
    for (name, _) in poison {
        assert!(!head.contains(&format!("{}:", name.to_ascii_lowercase())), "{name}: {head}");
    }
    // A trusted proxy's words reach it, and so are part of the key.
    let told = edge.get("/poisoned", &[("X-Forwarded-For", "192.0.2.1"), ("X-Forwarded-Host", "other.do")]).await;
    assert!(said(&told).contains("uri-miss"), "{}", told.head);
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_say_what_the_origin_does_not() {
    let origin = Origin::always(with("Cache-Control: no-store|Set-Cookie: id=1", "x")).await;
    let rules = r#"
cache:
  rules:
    - { id: off, expression: 'starts_with(http.request.uri.path, "/off")', cache: false }
    - id: static
      expression: 'http.request.uri.path.extension in {"css" "js"}'
      edge_ttl: { mode: override, default: 1h, status: { "404": 1m } }
      browser_ttl: 5m
      key: { query: { exclude: [utm_source], sort: true }, cookies: [group], device: true }
      set_cookie: strip
      tags: [assets]
    - { id: same, expression: 'http.request.uri.path eq "/same"', edge_ttl: { mode: override, default: 1h }, set_cookie: share }"#;
    let edge = Portolan::start(&cached(&[&origin], rules)).await;
    assert_eq!(said(&edge.get("/off", &[]).await), "portolan; fwd=bypass");
    let first = edge.get("/a.css?b=2&a=1&utm_source=x", &[("Cookie", "group=a")]).await;
    assert_eq!(
        (first.header("cache-control"), first.header("set-cookie")),
        (Some("max-age=300"), Some("id=1")),
        "{}",
        first.head
    );
    let second = edge.get("/a.css?a=1&b=2", &[("Cookie", "group=a; id=9")]).await;
    assert!(said(&second).contains("hit"), "{}", second.head);
    assert_eq!(second.header("set-cookie"), None, "another one's cookie");
    for headers in [[("Cookie", "group=b"), ("User-Agent", "x")], [("Cookie", "group=a"), ("User-Agent", "iPhone Mobile")]] {
        assert!(said(&edge.get("/a.css?a=1&b=2", &headers).await).contains("uri-miss"), "{headers:?}");
    }
    edge.get("/same", &[]).await;
    assert_eq!(edge.get("/same", &[]).await.header("set-cookie"), Some("id=1"));
    let purged = edge.order("/cache/purge", r#"{ "tags": ["assets"] }"#).await;
    assert_eq!(purged.status, 200, "{}", purged.text());
    assert!(said(&edge.get("/a.css?a=1&b=2", &[("Cookie", "group=a")]).await).contains("uri-miss"));
    let why = edge
        .explain(json!({ "ip": "192.0.2.1", "url": "http://localhost/x.js", "response": { "headers": [["Set-Cookie", "a=b"]] } }))
        .await;
    assert_eq!(why["cache"]["rules"], json!(["static"]));
    assert!(why["cache"]["response"][0].as_str().unwrap().starts_with("stored: fresh for 3600 s"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_a_say_where_the_route_lets_it() {
    let origin = Origin::always(with("Cache-Control: max-age=60|ETag: \"1\"", "x")).await;
    let edge = Portolan::start(&cached(&[&origin], "").replace("enabled: true", "enabled: true, request_directives: true")).await;
    let none = edge.get("/", &[("Cache-Control", "only-if-cached")]).await;
    assert_eq!((none.status, origin.count()), (504, 0), "{}", none.head);
    edge.get("/", &[]).await;
    for (directive, count) in [("max-age=30", 1), ("no-cache", 2), ("max-age=0", 3), ("min-fresh=100", 4), ("no-store", 5)] {
        edge.get("/", &[("Cache-Control", directive)]).await;
        assert_eq!(origin.count(), count, "{directive}");
    }
    edge.get("/", &[("Pragma", "no-cache")]).await;
    assert_eq!(origin.count(), 6);
    let edge = Portolan::start(&cached(&[&origin], "")).await;
    edge.get("/", &[]).await;
    let ignored = edge.get("/", &[("Cache-Control", "no-cache"), ("Pragma", "no-cache")]).await;
    assert!(said(&ignored).contains("hit"), "a stranger's lever: {}", ignored.head);
}

#[tokio::test(flavor = "multi_thread")]
async fn purged_is_purged() {
    let origin = Origin::always(with("Cache-Control: max-age=60|Cache-Tag: news, sport|Vary: X-Kind", "x")).await;
    let edge = Portolan::start(&cached(&[&origin], "cache: { purge_token: sesame }")).await;
    let (a, b) = ([("X-Kind", "a")], [("X-Kind", "b")]);
    for (order, gone) in [
        (json!({ "urls": ["https://localhost/img/1?x=1"] }), true),
        (json!({ "urls": ["localhost/img/1"] }), false),
        (json!({ "prefixes": ["http://localhost/im"] }), true),
        (json!({ "prefixes": ["localhost/img/2"] }), false),
        (json!({ "hosts": ["LOCALHOST"] }), true),
        (json!({ "hosts": ["other.do"] }), false),
        (json!({ "tags": ["sport"] }), true),
        (json!({ "tags": ["spor"] }), false),
        (json!({ "everything": true }), true),
    ] {
        for kind in [&a, &b] {
            edge.get("/img/1?x=1", kind).await;
            assert!(said(&edge.get("/img/1?x=1", kind).await).contains("hit"));
        }
        let answer = edge.order("/cache/purge", &order.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        for kind in [&a, &b] {
            assert_eq!(!said(&edge.get("/img/1?x=1", kind).await).contains("hit"), gone, "{order} {kind:?}");
        }
    }
    // Softly: it stays as stale, and where the origin fails it is served.
    edge.get("/img/1?x=1", &a).await;
    edge.order("/cache/purge", r#"{ "tags": ["news"], "soft": true }"#).await;
    origin.becomes(Act::Close);
    let stale = edge.get("/img/1?x=1", &a).await;
    assert_eq!((stale.status, said(&stale).ends_with("detail=stale-if-error")), (200, true), "{}", stale.head);
    for bad in ["{}", r#"{ "urls": ["/path"] }"#, r#"{ "tag": "x" }"#, r#"{ "tags": ["a b"] }"#] {
        assert_eq!(edge.order("/cache/purge", bad).await.status, 400, "{bad}");
    }
    origin.becomes(with("Cache-Control: max-age=60", "y"));
    edge.get("/p", &[]).await;
    for (token, status) in [("Bearer wrong", 403), ("sesame", 403), ("Bearer sesame", 200)] {
        assert_eq!(edge.request("PURGE", "/p", &[("Authorization", token)], b"").await.status, status, "{token}");
    }
    assert!(said(&edge.get("/p", &[]).await).contains("uri-miss"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_reaches_what_is_still_coming() {
    let (origin, go, count) = halves(20_000).await;
    let edge = Portolan::start(&at(origin, "")).await;
    let (mut stream, mut got) = half(edge.address, "/late", 10_000).await;
    assert_eq!(edge.order("/cache/purge", r#"{ "urls": ["http://a.do/late"] }"#).await.status, 200);
    go.add_permits(2);
    stream.read_to_end(&mut got).await.unwrap();
    assert!(parse(&got, false).complete, "who had it already reads it to its end");
    let again = edge.get("/late", &[("Host", "a.do")]).await;
    assert!(said(&again).contains("uri-miss"), "{}", again.head);
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_it_makes_it_invalid() {
    let origin = Origin::always(with("Cache-Control: max-age=60|ETag: \"1\"", "x")).await;
    let edge = Portolan::start(&cached(&[&origin], "")).await;
    for path in ["/a", "/b", "/c"] {
        edge.get(path, &[]).await;
    }
    origin.becomes(Act::Send(
        b"HTTP/1.1 201 Created\r\nLocation: /b\r\nContent-Location: http://other.do/c\r\nContent-Length: 0\r\n\r\n".to_vec(),
    ));
    edge.request("PUT", "/a", &[], b"new").await;
    origin.becomes(with("Cache-Control: max-age=60|ETag: \"1\"", "x"));
    for (path, gone) in [("/a", true), ("/b", true), ("/c", false)] {
        assert_eq!(!said(&edge.get(path, &[]).await).contains("hit"), gone, "{path}");
    }
    origin.becomes(status(403, "no"));
    edge.request("DELETE", "/b", &[], b"").await;
    assert!(said(&edge.get("/b", &[]).await).contains("hit"), "what failed changed nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_disk_what_is_long_only_passes() {
    let long = "x".repeat(3 << 20);
    let origin = Origin::always(with("Cache-Control: max-age=60", &long)).await;
    let chunked = format!(
        "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{long}\r\n0\r\n\r\n",
        long.len()
    );
    let edge = Portolan::start(&cached(&[&origin], "cache: { memory: 16MiB }")).await;
    let known = edge.get("/known", &[]).await;
    assert_eq!((known.body.len(), said(&known).ends_with("detail=too-large")), (long.len(), true), "{}", known.head);
    origin.becomes(Act::Send(chunked.into_bytes()));
    for _ in 0..2 {
        let unknown = edge.get("/unknown", &[]).await;
        assert_eq!((unknown.complete, unknown.body.len()), (true, long.len()), "{}", unknown.head);
    }
    assert_eq!(origin.count(), 3);
    edge.until("nothing of it is kept", |state| state.store.held().memory_bytes < 10_000).await;
}

pub fn on_disk(origin: &Origin, size: &str) -> String {
    cached(&[origin], &format!("cache: {{ memory: 16MiB, disk: {{ path: cache, size: {size} }} }}"))
}

/// The same folder, and another process.
async fn again(edge: Portolan) -> Portolan {
    let state = edge.state.clone();
    tokio::task::spawn_blocking(move || state.store.close()).await.unwrap();
    let dir = tempfile::TempDir::new().unwrap();
    for name in ["portolan.yaml", "cache"] {
        std::fs::rename(edge.path(name), dir.path().join(name)).unwrap();
    }
    Portolan::in_dir(dir).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_finds_it_warm() {
    let long: String = (0..3 << 20).map(|i| char::from(b'a' + (i / 1000 % 26) as u8)).collect();
    let origin = Origin::scripted(vec![
        with("Cache-Control: max-age=600|ETag: \"1\"|Cache-Tag: t", "short"),
        with("Cache-Control: max-age=600", "once"),
        with("Cache-Control: max-age=600", &long),
        with("Cache-Control: max-age=600", "once again"),
    ])
    .await;
    let edge = Portolan::start(&on_disk(&origin, "64MiB")).await;
    for path in ["/short", "/once", "/long", "/short"] {
        edge.get(path, &[]).await;
    }
    let ranged = edge.get("/long", &[("Range", "bytes=1000000-1000009")]).await;
    assert_eq!((ranged.status, ranged.text().as_bytes()), (206, &long.as_bytes()[1_000_000..1_000_010]), "{}", ranged.head);
    let edge = again(edge).await;
    edge.until("the files are known", |state| state.store.held().disk_objects == 2).await;
    let short = edge.get("/short", &[]).await;
    assert_eq!(
        (short.text().as_str(), short.header("etag"), said(&short).contains("hit")),
        ("short", Some("\"1\""), true),
        "{}",
        short.head
    );
    let whole = edge.get("/long", &[]).await;
    assert!(said(&whole).contains("hit") && whole.complete, "{} {}", whole.head, whole.body.len());
    assert!(whole.body == long.as_bytes());
    assert_eq!(edge.get("/once", &[]).await.text(), "once again", "what was asked for once is not worth a write");
    origin.done();
    // What is purged stays purged.
    edge.order("/cache/purge", r#"{ "tags": ["t"] }"#).await;
    let edge = again(edge).await;
    edge.until("the files are known", |state| state.store.held().disk_objects >= 2).await;
    let origin_gone = edge.explain(json!({ "ip": "192.0.2.1", "url": "http://localhost/short" })).await;
    assert!(origin_gone["cache"]["stored"].to_string().contains("purged"), "{origin_gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_files_are_misses() {
    let body = "y".repeat(600_000);
    let origin = Origin::always(with("Cache-Control: max-age=600", &body)).await;
    type Harm = fn(&std::path::Path, Vec<u8>);
    let harms: [(&str, Harm); 5] = [
        ("cut", |path, bytes| std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap()),
        ("empty", |path, _| std::fs::write(path, b"").unwrap()),
        ("a bit of the body", |path, mut bytes| {
            let at = bytes.len() - 1000;
            bytes[at] ^= 1;
            std::fs::write(path, bytes).unwrap();
        }),
        ("a bit of the head", |path, mut bytes| {
            bytes[40] ^= 1;
            std::fs::write(path, bytes).unwrap();
        }),
        ("a bit of the end", |path, mut bytes| {
            let at = bytes.len() - 15;
            bytes[at] ^= 1;
            std::fs::write(path, bytes).unwrap();
        }),
    ];
    for (name, harm) in harms {
        let edge = Portolan::start(&on_disk(&origin, "64MiB")).await;
        edge.get("/", &[]).await;
        edge.get("/", &[]).await;
        let state = edge.state.clone();
        tokio::task::spawn_blocking(move || state.store.flush()).await.unwrap();
        let files: Vec<_> = walk(&edge.path("cache")).into_iter().filter(|path| path.file_name().unwrap().len() == 32).collect();
        assert_eq!(files.len(), 1);
        harm(&files[0], std::fs::read(&files[0]).unwrap());
        let before = origin.count();
        let edge = again(edge).await;
        let response = edge.get("/", &[]).await;
        assert!(response.complete && response.text() == body, "{name} {} {}", response.head, response.body.len());
        assert_eq!(origin.count(), before + 1, "{name}: {}", response.head);
    }
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(walk(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_keeps_its_size() {
    let origin = Origin::always(with("Cache-Control: max-age=600", &"z".repeat(2 << 20))).await;
    let edge = Portolan::start(&on_disk(&origin, "16MiB")).await;
    for i in 0..20 {
        let response = edge.get(&format!("/{i}"), &[]).await;
        assert!(response.complete);
        let state = edge.state.clone();
        tokio::task::spawn_blocking(move || state.store.flush()).await.unwrap();
        let held = edge.state.store.held();
        assert!(held.disk_bytes <= 16 << 20, "{held:?}");
    }
    let bytes: u64 = walk(&edge.path("cache")).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(bytes <= 17 << 20, "{bytes}");
    let evicted = edge.metric("portolan_cache_evicted_files_total").await;
    let errors = edge.metric("portolan_cache_disk_errors_total").await;
    assert!(evicted > 0.0 && errors == 0.0, "{evicted} evicted, {errors} errors, {:?}", edge.state.store.held());
}

/// An origin whose bodies tell which path and which fetch they are of, from their first byte to their last.
async fn telling() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let serial = Arc::new(AtomicUsize::new(0));
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let serial = serial.clone();
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while let Some(head) = read_head(&mut stream, &mut buffer).await {
                    let path = head.split(' ').nth(1).unwrap().to_owned();
                    let n: usize = path.trim_start_matches('/').parse().unwrap();
                    let word = format!("{path}#{};", serial.fetch_add(1, Ordering::SeqCst));
                    // From some bytes to some megabytes.
                    let body = word.repeat((100 << (n % 16)) / word.len() + 1);
                    let head = match n % 3 {
                        0 => format!("Transfer-Encoding: chunked\r\n\r\n{:x}\r\n", body.len()),
                        _ => format!("Content-Length: {}\r\n\r\n", body.len()),
                    };
                    let end = if n.is_multiple_of(3) { "\r\n0\r\n\r\n" } else { "" };
                    let answer = format!("HTTP/1.1 200 OK\r\nCache-Control: max-age=600\r\n{head}{body}{end}");
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Is it whole, of this path, and of one fetch?
fn is_of_one(path: &str, response: &Response) -> bool {
    let text = response.text();
    let Some(word) = text.split_inclusive(';').next().filter(|word| word.starts_with(&format!("{path}#"))) else { return false };
    response.complete && text.len().is_multiple_of(word.len()) && text == word.repeat(text.len() / word.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_middle_of_writes() {
    const PATHS: usize = 48;
    // More of them when it is tried for longer: PORTOLAN_KILLS=200 cargo test killed_in.
    let kills: usize = std::env::var("PORTOLAN_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(8);
    let origin = telling().await;
    let yaml = at(origin, "cache: { memory: 16MiB, disk: { path: cache, size: 64MiB } }");
    let mut program = Program::run(&yaml).await;
    let mut hits = 0;
    for _ in 0..kills {
        let address = program.address;
        let load: Vec<_> = (0..4)
            .map(|_| {
                tokio::spawn(async move {
                    loop {
                        let path = format!("/{}", fastrand::usize(..PATHS));
                        // The last answers end with the process.
                        let Ok(mut stream) = TcpStream::connect(address).await else { return };
                        let request = format!("GET {path} HTTP/1.1\r\nHost: a.do\r\nConnection: close\r\n\r\n");
                        let mut bytes = Vec::new();
                        if stream.write_all(request.as_bytes()).await.is_err() || stream.read_to_end(&mut bytes).await.is_err() {
                            return;
                        }
                        let response = parse(&bytes, false);
                        assert!(!response.complete || response.status == 0 || is_of_one(&path, &response), "{path}");
                    }
                })
            })
            .collect();
        tokio::time::sleep(std::time::Duration::from_millis(fastrand::u64(50..400))).await;
        program.child.kill().unwrap();
        program.child.wait().unwrap();
        for task in load {
            task.await.unwrap();
        }
        let dir = std::mem::replace(&mut program.dir, tempfile::TempDir::new().unwrap());
        program = Program::start("run", dir, "portolan.yaml").await;
        for n in 0..PATHS {
            let path = format!("/{n}");
            let response = send(program.address, "GET", &path, &[("Host", "a.do")], b"").await;
            assert!(is_of_one(&path, &response), "{path}: {} {}", response.head, response.body.len());
            hits += usize::from(said(&response).contains("hit"));
        }
    }
    assert!(hits > 0, "what was whole survives");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_no_error() {
    let long = "w".repeat(3 << 20);
    let origin = Origin::always(with("Cache-Control: max-age=600", &long)).await;
    let dir = tempfile::TempDir::new().unwrap();
    let small = Mounted::tmpfs(&dir.path().join("cache"), "2m");
    std::fs::write(dir.path().join("portolan.yaml"), whole(&on_disk(&origin, "64MiB"))).unwrap();
    let edge = Portolan::in_dir(dir).await;
    for path in ["/1", "/2", "/1"] {
        let response = edge.get(path, &[]).await;
        assert!(response.complete && response.body.len() == long.len(), "{}", response.head);
    }
    assert!(edge.metric("portolan_cache_disk_errors_total").await > 0.0);
    // Memory alone goes on.
    origin.becomes(with("Cache-Control: max-age=600", "short"));
    edge.get("/short", &[]).await;
    assert!(said(&edge.get("/short", &[]).await).contains("hit"));
    let state = edge.state.clone();
    tokio::task::spawn_blocking(move || state.store.close()).await.unwrap();
    drop((edge, small));
}

/// A file system of a given size; dropping it takes it away.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(path: &std::path::Path, size: &str) -> Self {
        std::fs::create_dir_all(path).unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(path)
            .status()
            .unwrap();
        assert!(mounted.success(), "mounting needs root, as the tests with network namespaces do");
        Self(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Files may still be open.
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
