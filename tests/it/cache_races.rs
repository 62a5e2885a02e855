//! The cache where two things happen at once: a slow client and a fast origin, a newer response and an older answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::cache::{at, cached, on_disk, said, with};
use crate::harness::*;

/// An origin that answers every request by what `act` makes of its head.
async fn answering(act: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let act = Arc::new(act);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let act = act.clone();
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while let Some(head) = read_head(&mut stream, &mut buffer).await {
                    if stream.write_all(&act(&head)).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// A body whose every part is known by where it stands.
fn body(length: usize) -> Vec<u8> {
    (0..length).map(|i| b'a' + (i / 1009 % 26) as u8).collect()
}

/// Sends a request, and reads nothing of its answer.
async fn ask(edge: std::net::SocketAddr, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(edge).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
    stream
}

async fn rest(mut stream: TcpStream) -> Response {
    let mut bytes = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the rest never came").unwrap();
    parse(&bytes, false)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_first_client_slows_nobody() {
    let long = body(24 << 20);
    let origin = Origin::scripted(vec![with("Cache-Control: max-age=60", std::str::from_utf8(&long).unwrap())]).await;
    let edge = Portolan::start(&on_disk(&origin, "128MiB")).await;
    let first = ask(edge.address, "/long").await;
    origin.came(1).await;
    let second = edge.get("/long", &[("Host", "localhost")]).await;
    assert!(second.complete && second.body == long, "{} {}", second.head, second.body.len());
    // Nobody has read for the first client yet, and nothing of it was lost.
    let first = rest(first).await;
    assert!(first.complete && first.body == long, "{} {}", first.head, first.body.len());
    origin.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_stored_waits_for_its_client() {
    const LENGTH: usize = 48 << 20;
    let long = Arc::new(body(LENGTH));
    let theirs = long.clone();
    let origin = answering(move |_| {
        let mut answer = b"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        for chunk in theirs.chunks(100_000) {
            answer.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            answer.extend_from_slice(chunk);
            answer.extend_from_slice(b"\r\n");
        }
        answer.extend_from_slice(b"0\r\n\r\n");
        answer
    })
    .await;
    let edge = Portolan::start(&at(origin, "cache: { memory: 16MiB }")).await;
    let mut slow = ask(edge.address, "/long").await;
    let (mut got, mut most, mut before) = (Vec::new(), 0, usize::MAX);
    while std::mem::replace(&mut before, got.len()) != got.len() {
        // All that the others can do meanwhile they have done.
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        most = most.max(edge.state.store.held().memory_bytes);
        tokio::time::timeout(PATIENCE, (&mut slow).take(1 << 20).read_to_end(&mut got)).await.expect("it hangs").unwrap();
    }
    let slow = parse(&got, false);
    assert!(slow.complete && slow.body == *long, "{} {}", slow.head, slow.body.len());
    assert!(most < 20 << 20, "{most} bytes of it are in memory");
    edge.until("nothing of it is kept", |state| state.store.held().memory_bytes < 10_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_holds_no_second_copy() {
    let long = body(12 << 20);
    let origin = Origin::scripted(vec![with("Cache-Control: max-age=60", std::str::from_utf8(&long).unwrap())]).await;
    let edge = Portolan::start(&cached(&[&origin], "cache: { memory: 250MiB }")).await;
    let slow = ask(edge.address, "/long").await;
    origin.came(1).await;
    let quick = edge.get("/long", &[("Host", "localhost")]).await;
    assert!(quick.complete, "{}", quick.head);
    edge.until("it is stored", |state| state.store.held().memory_objects == 1).await;
    edge.until("there is one of it", |state| state.store.held().memory_bytes < 13 << 20).await;
    let slow = rest(slow).await;
    assert!(slow.complete && slow.body == long, "{} {}", slow.head, slow.body.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_answer_does_not_change_what_is_newer() {
    let (go, asked) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (theirs, counted) = (go.clone(), asked.clone());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (go, asked) = (theirs.clone(), counted.clone());
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while read_head(&mut stream, &mut buffer).await.is_some() {
                    let answer: &[u8] = match asked.fetch_add(1, Ordering::SeqCst) {
                        0 => b"HTTP/1.1 200 OK\r\nCache-Control: max-age=0\r\nETag: \"1\"\r\nContent-Length: 3\r\n\r\nold",
                        1 => {
                            go.acquire().await.unwrap().forget();
                            b"HTTP/1.1 304 Not Modified\r\nCache-Control: max-age=60\r\nETag: \"1\"\r\nX-Of: old\r\n\r\n"
                        }
                        _ => b"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nETag: \"2\"\r\nX-Of: new\r\nContent-Length: 3\r\n\r\nnew",
                    };
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    // Nobody waits for another's response, so that two are under way.
    let edge = Portolan::start(&at(address, "cache: { max_waiters: 0 }")).await;
    edge.get("/", &[("Host", "localhost")]).await;
    let late = ask(edge.address, "/").await;
    while asked.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(edge.get("/", &[("Host", "localhost")]).await.text(), "new");
    go.add_permits(1);
    assert_eq!(rest(late).await.text(), "old", "it holds, as was said of it");
    let now = edge.get("/", &[("Host", "localhost")]).await;
    assert_eq!(
        (now.text().as_str(), now.header("x-of"), now.header("etag")),
        ("new", Some("new"), Some("\"2\"")),
        "{}",
        now.head
    );
    assert!(said(&now).contains("hit"), "{}", now.head);
}

/// Asks by HTTP/2.
async fn over_http2(edge: std::net::SocketAddr, path: &str) -> (http::response::Parts, Vec<u8>) {
    let stream = TcpStream::connect(edge).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let request = http::Request::get(format!("http://localhost{path}")).body(()).unwrap();
    let (answer, _) = client.send_request(request, true).unwrap();
    let (head, mut body) = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap().into_parts();
    let mut bytes = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        bytes.extend_from_slice(&chunk);
    }
    (head, bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_is_fetched_again_for_http2_too() {
    let origin = Origin::scripted(vec![
        with("Cache-Control: max-age=0, stale-while-revalidate=600", "old"),
        with("Cache-Control: max-age=600", "new"),
    ])
    .await;
    let edge = Portolan::start(&cached(&[&origin], "")).await;
    assert_eq!(over_http2(edge.address, "/a?b=1").await.1, b"old");
    let (head, stale) = over_http2(edge.address, "/a?b=1").await;
    assert_eq!((stale.as_slice(), head.version), (&b"old"[..], http::Version::HTTP_2));
    origin.came(2).await;
    while over_http2(edge.address, "/a?b=1").await.1 != b"new" {
        tokio::task::yield_now().await;
    }
    let again = &origin.received()[1];
    assert_eq!(
        (again.one("host"), again.head.lines().next()),
        (Some("localhost"), Some("GET /a?b=1 HTTP/1.1")),
        "{}",
        again.head
    );
    origin.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_background_fetch_leaves_its_client_alone() {
    // Whoever has the stale one goes on with the same connection; the date of what was fetched behind it is another's.
    let dated = |date: &str, more: &str, body: &str| with(&format!("Date: {date}|{more}"), body);
    let origin = Origin::scripted(vec![
        dated("Sat, 01 Jan 2000 00:00:00 GMT", "Cache-Control: max-age=0, stale-while-revalidate=999999999", "old"),
        dated("Sun, 02 Jan 2000 00:00:00 GMT", "Cache-Control: max-age=999999999", "new"),
    ])
    .await;
    let edge = Portolan::start(&cached(&[&origin], "")).await;
    edge.get("/", &[]).await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    let mut buffer = Vec::new();
    for (path, date) in [("/", Some("Sat, 01 Jan 2000 00:00:00 GMT")), ("/nothing", None)] {
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await.unwrap();
        let head = read_head(&mut stream, &mut buffer).await.unwrap();
        let head = format!("{head}\r\n\r\n");
        let response = parse(head.as_bytes(), true);
        read_body(&head, &mut stream, &mut buffer).await;
        match date {
            Some(date) => {
                assert_eq!(response.header("date"), Some(date), "{head}");
                origin.came(2).await;
                origin.becomes(ok("another"));
            }
            None => assert_ne!(response.header("date"), Some("Sun, 02 Jan 2000 00:00:00 GMT"), "{head}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_with_conditions_answer_for_themselves() {
    let (beta, all) = (
        Origin::always(with("Cache-Control: max-age=60", "beta")).await,
        Origin::always(with("Cache-Control: max-age=60", "all")).await,
    );
    let yaml = format!(
        "regions: {{ beta: {{ upstreams: [\"{}\"] }}, all: {{ upstreams: [\"{}\"] }} }}\nroutes:\n  - {{ name: beta, match: 'http.cookie contains \"beta=1\"', steering: {{ default: beta }}, cache: {{ enabled: true }} }}\n  - {{ name: all, steering: {{ default: all }}, cache: {{ enabled: true }} }}\n",
        beta.url(),
        all.url()
    );
    let edge = Portolan::start(&yaml).await;
    for _ in 0..2 {
        assert_eq!(edge.get("/", &[("Cookie", "beta=1")]).await.text(), "beta");
        assert_eq!(edge.get("/", &[]).await.text(), "all");
    }
    assert_eq!((beta.count(), all.count()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_by_another_route_is_a_change() {
    let origin = Origin::always(with("Cache-Control: max-age=60", "x")).await;
    let yaml = format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes:\n  - {{ name: write, match: 'http.request.method eq \"POST\"' }}\n  - {{ name: read, cache: {{ enabled: true }} }}\n",
        origin.url()
    );
    let edge = Portolan::start(&yaml).await;
    edge.get("/", &[]).await;
    assert!(said(&edge.get("/", &[]).await).contains("hit"));
    edge.request("POST", "/", &[], b"x").await;
    assert!(said(&edge.get("/", &[]).await).contains("uri-miss"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_insists_on_a_region_gets_its_answer() {
    let (a, b) = (
        Origin::always(with("Cache-Control: max-age=60", "a")).await,
        Origin::always(with("Cache-Control: max-age=60", "b")).await,
    );
    let edge = Portolan::start(&cached(&[&a, &b], "").replace("cache: {", "client_regions: true, cache: {")).await;
    assert_eq!(edge.get("/", &[]).await.text(), "a");
    let forced = edge.get("/", &[("Portolan-Force-Region", "r1")]).await;
    assert_eq!((forced.text().as_str(), said(&forced)), ("b", "portolan; fwd=bypass"));
    let after = edge.get("/", &[]).await;
    assert_eq!((after.text().as_str(), said(&after).contains("hit")), ("a", true), "nobody else gets it");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_key_leaves_out_a_purge_and_a_change_leave_out() {
    let origin = Origin::always(with("Cache-Control: max-age=60", "x")).await;
    let rules = r#"
cache:
  purge_token: sesame
  rules: [{ id: short, expression: 'http.request.uri.path in {"/a" "/b"}', key: { query: { exclude: [utm_source] } } }]
waf: { rules: [{ id: inside, expression: 'http.request.method eq "PURGE" and http.request.uri.path eq "/closed"', action: block }] }
limits: [{ id: few, expression: 'http.request.uri.path eq "/few"', requests: 1, period: 600s }]"#;
    let edge = Portolan::start(&cached(&[&origin], rules)).await;
    let token = [("Authorization", "Bearer sesame")];
    for (change, path) in [("PURGE", "/a"), ("POST", "/b")] {
        edge.get(&format!("{path}?x=1&utm_source=a"), &[]).await;
        assert!(said(&edge.get(&format!("{path}?x=1"), &[]).await).contains("hit"));
        assert_eq!(edge.request(change, &format!("{path}?utm_source=b&x=1"), &token, b"").await.status, 200);
        let after = edge.get(&format!("{path}?x=1"), &[]).await;
        assert!(said(&after).contains("uri-miss"), "{change}: {}", after.head);
    }
    // A purge is a request like any other: under rules and limits, and in the log.
    assert_eq!(edge.request("PURGE", "/closed", &token, b"").await.status, 403);
    let few = [edge.request("PURGE", "/few", &token, b"").await.status, edge.request("PURGE", "/few", &token, b"").await.status];
    assert_eq!(few, [200, 429]);
    assert_eq!(edge.metric(r#"portolan_requests_total{code="200",method="other",route="route-1"}"#).await, 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_looked_up_is_counted_as_such() {
    let origin = Origin::always(with("Cache-Control: max-age=60|Cache-Tag: t", "x")).await;
    let rules = r#"cache: { rules: [{ id: off, expression: 'http.request.uri.path eq "/off"', cache: false }] }"#;
    let edge =
        Portolan::start(&cached(&[&origin], rules).replace("enabled: true", "enabled: true, request_directives: true")).await;
    let off = edge.get("/off", &[]).await;
    assert_eq!(off.header("cache-tag"), None, "tags are not for clients");
    edge.request("POST", "/", &[], b"x").await;
    let none = edge.get("/none", &[("Cache-Control", "only-if-cached")]).await;
    assert_eq!((none.status, said(&none)), (504, "portolan; detail=only-if-cached"), "{}", none.head);
    for (status, count) in [("bypass", 1.0), ("method", 1.0), ("only_if_cached", 1.0), ("miss", 0.0)] {
        assert_eq!(edge.metric(&format!("portolan_cache_requests_total{{status=\"{status}\"}}")).await, count, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_somebodys_own_stays_so_in_browsers() {
    let origin = Origin::always(with("Cache-Control: private", "mine")).await;
    let rules = r#"cache: { rules: [{ id: all, expression: 'http.host ne ""', browser_ttl: 1h }] }"#;
    let edge = Portolan::start(&cached(&[&origin], rules)).await;
    assert_eq!(edge.get("/", &[]).await.header("cache-control"), Some("private"));
    origin.becomes(with("Cache-Control: max-age=60", "everybody's"));
    for _ in 0..2 {
        assert_eq!(edge.get("/all", &[]).await.header("cache-control"), Some("max-age=3600"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_somebodys_own_is_so_in_browsers() {
    let origin = Origin::scripted(vec![
        with("Cache-Control: max-age=0|ETag: \"1\"", "everybody's"),
        Act::Send(b"HTTP/1.1 304 Not Modified\r\nETag: \"1\"\r\nCache-Control: private, max-age=0\r\n\r\n".to_vec()),
    ])
    .await;
    let rules = r#"cache: { rules: [{ id: all, expression: 'http.host ne ""', browser_ttl: 1h }] }"#;
    let edge = Portolan::start(&cached(&[&origin], rules)).await;
    assert_eq!(edge.get("/", &[]).await.header("cache-control"), Some("max-age=3600"));
    let now = edge.get("/", &[]).await;
    assert_eq!(now.header("cache-control"), Some("private, max-age=0"), "{}", now.head);
    origin.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn underscores_are_no_way_around() {
    let origin = Origin::always(with("Cache-Control: max-age=60", "x")).await;
    let rules = r#"cache: { rules: [{ id: keyed, expression: 'http.request.uri.path eq "/keyed"', key: { headers: [X-Original-Host] } }] }"#;
    let edge = Portolan::start(&cached(&[&origin], rules)).await;
    let poison = [("X_Original_URL", "/admin"), ("X-Original_Host", "evil"), ("X-Original-Host", "told")];
    for path in ["/", "/keyed"] {
        edge.get(path, &poison).await;
    }
    let [plain, keyed] = [0, 1].map(|i| origin.received()[i].head.to_ascii_lowercase());
    assert!(!plain.contains("original"), "{plain}");
    assert!(keyed.contains("x-original-host: told") && !keyed.contains("original_"), "{keyed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_says_why_it_is_not_looked_up() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&cached(&[&origin], "").replace("cache: {", "client_regions: true, cache: {")).await;
    let why = edge
        .explain(json!({ "ip": "192.0.2.1", "url": "http://localhost/", "headers": [["Portolan-Force-Region", "r0"]] }))
        .await;
    assert!(why["cache"]["outcome"].as_str().unwrap().contains("one region's answer"), "{why}");
}
