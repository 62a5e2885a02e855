//! Health checks against real sockets, and how they and traffic are combined.

use portolan::proxy::clock;
use portolan::regions::active::Verdict;

use crate::harness::*;

/// One region with this check, one behind it.
fn yaml(url: &str, check: &str, next: &Origin) -> String {
    format!(
        "regions:
  a: {{ upstreams: [{url}], slow_start: 0s, health_check: {check} }}
  b: {{ upstreams: [\"{}\"] }}
routes: [{{ steering: {{ default: a, failover: [b] }} }}]\n",
        next.url()
    )
}

async fn until_verdict(edge: &Portolan, verdict: Verdict) {
    edge.until(&format!("{verdict:?}"), |s| {
        let live = s.live.load();
        let endpoints = live.snapshot.regions[0].upstreams[0].state.endpoints();
        endpoints[0].active.verdict() == verdict
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_checks_take_out_and_bring_back() {
    let (a, b) = (Origin::always(ok("a")).await, Origin::always(ok("b")).await);
    let check = "{ path: /healthz, method: GET, host: check.example.com, headers: { X-Check: \"1\" }, statuses: [200, 3xx], body: fine, \
                 interval: 40ms, fall: 2, rise: 2 }";
    a.becomes(ok("all is fine here"));
    let edge = Portolan::start(&yaml(&format!("\"{}\"", a.url()), check, &b)).await;
    until_verdict(&edge, Verdict::Up).await;
    let asked = &a.received()[0];
    assert!(asked.head.starts_with("GET /healthz HTTP/1.1"), "{}", asked.head);
    assert_eq!((asked.one("host"), asked.one("x-check")), (Some("check.example.com"), Some("1")));
    assert!(asked.one("user-agent").unwrap().contains("health check"));
    for (bad, word) in [
        (status(500, "fine"), "status 500"),
        (status(201, "fine"), "status 201"),
        (ok("not well"), "lacks the text"),
        (Act::Close, "ConnectionClosed"),
        (Act::Hang, "no answer within"),
    ] {
        a.becomes(bad);
        until_verdict(&edge, Verdict::Down).await;
        // No request is risked.
        assert_eq!(edge.get("/", &[]).await.text(), "b", "{word}");
        let status = edge.status().await;
        let upstream = &status["regions"][0]["upstreams"][0];
        assert_eq!((upstream["state"].as_str(), status["regions"][0]["healthy"].as_bool()), (Some("down"), Some(false)));
        assert!(upstream["check"].as_str().unwrap().contains(word), "{upstream}");
        assert_eq!(edge.metric("portolan_region_healthy{region=\"a\"}").await, 0.0);
        let said = edge.explain(serde_json::json!({ "ip": "127.0.0.1", "url": "/" })).await;
        assert!(said.to_string().contains("down: health checks say so"), "{said:#}");
        a.becomes(ok("fine again"));
        until_verdict(&edge, Verdict::Up).await;
        assert_eq!(edge.get("/", &[]).await.text(), "fine again", "{word}");
    }
    // Without the check in the configuration its verdict is forgotten.
    a.becomes(Act::Close);
    until_verdict(&edge, Verdict::Down).await;
    edge.replace(&yaml(&format!("\"{}\"", a.url()), "null", &b));
    edge.reloader.reload("test").await.unwrap();
    until_verdict(&edge, Verdict::Unknown).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn never_two_questions_at_a_time() {
    let (silent, other) = (Origin::always(Act::Hang).await, Origin::always(ok("b")).await);
    let check = "{ interval: 10ms, timeout: 60s }";
    let _edge = Portolan::start(&format!(
        "regions:
  a: {{ upstreams: [\"{}\"], health_check: {check} }}
  b: {{ upstreams: [\"{}\"], health_check: {check} }}
routes: [{{}}]\n",
        silent.url(),
        other.url()
    ))
    .await;
    // The other one is the clock: it is asked again and again meanwhile.
    silent.came(1).await;
    other.came(other.count() + 20).await;
    assert_eq!(silent.count(), 1, "a second question while the first is open");
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_checks_only_connect() {
    let (a, b) = (Origin::always(Act::Close).await, Origin::always(ok("b")).await);
    let edge = Portolan::start(&yaml(&format!("\"{}\"", a.url()), "{ type: tcp, interval: 40ms, fall: 1 }", &b)).await;
    until_verdict(&edge, Verdict::Up).await;
    assert_eq!(a.count(), 0, "nothing is sent");
    drop(a);
    until_verdict(&edge, Verdict::Down).await;
    assert_eq!(edge.get("/", &[]).await.text(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_checks_ask_the_service() {
    use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
    // What grpc.health.v1 answers: the status is the last byte.
    static SERVING: AtomicU8 = AtomicU8::new(1);
    let address = http2_origin(|request, mut respond| {
        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
        assert_eq!(request.headers()["content-type"], "application/grpc");
        tokio::spawn(async move {
            let mut body = request.into_body();
            let mut message = Vec::new();
            while let Some(Ok(chunk)) = body.data().await {
                message.extend(chunk);
            }
            assert_eq!(message, [&[0, 0, 0, 0, 9, 0x0a, 7][..], b"the.Svc"].concat());
            let response = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
            let mut stream = respond.send_response(response, false).unwrap();
            stream.send_data(vec![0, 0, 0, 0, 2, 8, SERVING.load(SeqCst)].into(), false).unwrap();
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            stream.send_trailers(trailers).unwrap();
        });
    })
    .await;
    let b = Origin::always(ok("b")).await;
    let check = "{ type: grpc, service: the.Svc, interval: 40ms, fall: 1, rise: 1 }";
    let edge = Portolan::start(&yaml(&format!("\"h2c://{address}\""), check, &b)).await;
    until_verdict(&edge, Verdict::Up).await;
    SERVING.store(2, SeqCst);
    until_verdict(&edge, Verdict::Down).await;
    let status = edge.status().await;
    assert!(status["regions"][0]["upstreams"][0]["check"].as_str().unwrap().contains("NOT_SERVING"));
    SERVING.store(1, SeqCst);
    until_verdict(&edge, Verdict::Up).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_traffic_ejected_a_check_brings_back_without_risking_a_request() {
    // The check is content, traffic is not.
    let a = Origin::always(status(503, "no")).await;
    let b = Origin::always(ok("b")).await;
    let edge = Portolan::start(&yaml(&format!("\"{}\"", a.url()), "{ interval: 50ms, statuses: [2xx, 503] }", &b)).await;
    until_verdict(&edge, Verdict::Up).await;
    for _ in 0..3 {
        assert_eq!(edge.get("/", &[]).await.text(), "b");
    }
    let endpoint = edge.state.live.load().snapshot.regions[0].upstreams[0].state.endpoints()[0].clone();
    assert!(!endpoint.is_usable(clock::now()), "traffic ejects it, whatever checks say");
    assert_eq!(endpoint.active.verdict(), Verdict::Up);
    let requests = || a.received().iter().filter(|r| !r.head.contains("health check")).count();
    let before = requests();
    edge.until("the ejection is over", |_| endpoint.is_usable(clock::now())).await;
    assert_eq!(requests(), before, "no request was needed");
}

#[tokio::test(flavor = "multi_thread")]
async fn panic_is_said() {
    let (a, b) = (Origin::always(ok("a")).await, Origin::always(ok("b")).await);
    let check = "{ statuses: [299], interval: 30ms, fall: 1 }";
    let edge = Portolan::start(&format!(
        "regions:
  a: {{ upstreams: [\"{}\"], health_check: {check} }}
  b: {{ upstreams: [\"{}\"], health_check: {check} }}
routes: [{{ steering: {{ default: a, failover: [b] }} }}]\n",
        a.url(),
        b.url()
    ))
    .await;
    edge.until("nothing is usable", |s| s.live.load().snapshot.regions.iter().all(|r| r.capacity(clock::now()).usable == 0.0))
        .await;
    assert_eq!(edge.admin("GET", "/readyz").await.status, 503);
    assert_eq!(edge.get("/", &[]).await.text(), "a", "everything is tried");
    assert_eq!(edge.metric("portolan_panic_requests_total").await, 1.0);
    let said = edge.explain(serde_json::json!({ "ip": "127.0.0.1", "url": "/" })).await;
    assert!(said["answer"]["text"].as_str().unwrap().contains("nothing is usable"), "{said:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_back_is_kept_from_a_rush() {
    let (a, b) = (Origin::always(ok("a")).await, Origin::always(ok("b")).await);
    let check = "{ type: tcp, interval: 40ms, fall: 1, rise: 1 }";
    let slow = yaml(&format!("\"{}\"", a.url()), check, &b).replace("slow_start: 0s", "slow_start: 1h");
    let edge = Portolan::start(&slow).await;
    until_verdict(&edge, Verdict::Up).await;
    let address = a.address;
    drop(a);
    until_verdict(&edge, Verdict::Down).await;
    let a = Origin::at(address, vec![], Some(ok("a"))).await;
    until_verdict(&edge, Verdict::Up).await;
    let status = edge.status().await;
    assert!(status["regions"][0]["upstreams"][0]["because"].as_str().unwrap().contains("slow start"), "{status:#}");
    for _ in 0..20 {
        assert_eq!(edge.get("/", &[]).await.text(), "a", "one at a time is no rush");
    }
    // Now they stay: of forty at once it gets a tenth, times 1.4.
    let before = a.count();
    a.becomes(Act::Hang);
    b.becomes(Act::Hang);
    let mut clients = tokio::task::JoinSet::new();
    for i in 0..40 {
        let to = edge.address;
        clients.spawn(async move { send(to, "GET", "/", &[], b"").await });
        edge.until("the request is under way", |s| {
            s.live.load().snapshot.regions.iter().map(|r| r.state.in_flight()).sum::<u32>() > i
        })
        .await;
    }
    b.came(30).await;
    assert!((4..=7).contains(&(a.count() - before)), "{}", a.count() - before);
    clients.abort_all();
    while clients.join_next().await.is_some() {}
    edge.until("they are over", |s| s.live.load().snapshot.regions.iter().all(|r| r.state.in_flight() == 0)).await;
    assert!(edge.metric("portolan_failovers_total{from=\"a\",reason=\"slow_start\",to=\"b\"}").await >= 30.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_503_with_retry_after_is_left_alone_for_so_long() {
    let busy = Act::Send(b"HTTP/1.1 503 Busy\r\nRetry-After: 20\r\nContent-Length: 0\r\n\r\n".to_vec());
    let a = Origin::start(vec![busy.clone()], Some(ok("a"))).await;
    let b = Origin::start(vec![ok("b"), ok("b"), busy], Some(ok("b"))).await;
    let edge = Portolan::start(&yaml(&format!("\"{}\"", a.url()), "null", &b)).await;
    for _ in 0..2 {
        assert_eq!(edge.get("/", &[]).await.text(), "b");
    }
    assert_eq!(a.count(), 1);
    // If the other asks for a rest as well, the first is better than nothing.
    assert_eq!(edge.get("/", &[]).await.text(), "a");
    let status = edge.status().await;
    assert_eq!(status["regions"][0]["upstreams"][0]["state"], "resting");
}
