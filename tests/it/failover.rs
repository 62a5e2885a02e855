//! What moves a request on, what never does, and what the client gets at the end.

use std::time::Duration;

use crate::harness::*;

/// Two regions, tried in this order, with timeouts short enough for a test.
fn two(first: &str, second: &str, more: &str) -> String {
    format!(
        "regions:
  us_east: {{ upstreams: [\"{first}\"], balance: round_robin, slow_start: 0s }}
  eu_west: {{ upstreams: [\"{second}\"] }}
routes:
  - name: all
    steering: {{ default: us_east, failover: [eu_west] }}
    timeouts: {{ connect: 500ms, first_byte: 300ms, total: 10s }}
    {more}
"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_refused_moves_on() {
    let eu = Origin::scripted(vec![ok("eu")]).await;
    let edge = Portolan::start(&two(&format!("http://{}", refused()), &eu.url(), "")).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.status, answer.region(), answer.text().as_str()), (200, "eu_west", "eu"));
    assert_eq!(edge.metric("portolan_failovers_total{from=\"us_east\",reason=\"connect_refused\",to=\"eu_west\"}").await, 1.0);
    assert_eq!(edge.metric("portolan_upstream_attempts_total{outcome=\"connect_refused\",region=\"us_east\"}").await, 1.0);
    assert_eq!(edge.metric("portolan_upstream_attempts_total{outcome=\"ok\",region=\"eu_west\"}").await, 1.0);
    eu.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fault_before_a_response_moves_a_get_on() {
    for fault in [
        Act::Close,
        Act::Reset,
        Act::Hang,
        status(502, ""),
        status(503, "busy"),
        status(504, ""),
        Act::SendAndClose(b"HTTP/1.1 200 OK\r\nContent-".to_vec()),
        Act::SendAndClose(b"nonsense\r\n\r\n".to_vec()),
    ] {
        let us = Origin::scripted(vec![fault.clone()]).await;
        let eu = Origin::scripted(vec![ok("eu")]).await;
        let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
        let answer = edge.get("/", &[]).await;
        assert_eq!((answer.status, answer.region(), answer.text().as_str()), (200, "eu_west", "eu"), "{fault:?}");
        us.done();
        eu.done();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn inside_a_region_the_next_upstream_comes_before_the_next_region() {
    let (a, b) = (Origin::scripted(vec![status(503, "")]).await, Origin::scripted(vec![ok("b")]).await);
    let eu = Origin::scripted(vec![]).await;
    let edge = Portolan::start(&two(&format!("{}\", \"{}", a.url(), b.url()), &eu.url(), "")).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.region(), answer.text().as_str()), ("us_east", "b"));
    a.done();
    b.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_gets_two_attempts_while_another_is_left() {
    let us = [status(503, ""), status(503, ""), ok("never")].map(|act| Origin::start(vec![], Some(act)));
    let mut upstreams = Vec::new();
    for origin in us {
        upstreams.push(origin.await);
    }
    let eu = Origin::scripted(vec![ok("eu")]).await;
    let list = upstreams.iter().map(Origin::url).collect::<Vec<_>>().join("\", \"");
    let edge = Portolan::start(&two(&list, &eu.url(), "")).await;
    assert_eq!(edge.get("/", &[]).await.region(), "eu_west");
    assert_eq!(upstreams.iter().map(Origin::count).collect::<Vec<_>>(), [1, 1, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_final_attempts_response_passes_untouched() {
    let us = Origin::scripted(vec![status(503, "us is busy")]).await;
    let last = b"HTTP/1.1 503 Scripted\r\nContent-Length: 10\r\nX-Own: kept\r\nRetry-After: 7\r\n\r\neu is busy".to_vec();
    let eu = Origin::scripted(vec![Act::Send(last)]).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.status, answer.text().as_str(), answer.region()), (503, "eu is busy", "eu_west"));
    assert_eq!(
        (answer.header("x-own"), answer.header("retry-after"), answer.header("proxy-status")),
        (Some("kept"), Some("7"), None)
    );
    us.done();
    eu.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_given_up_in_vain_keeps_its_status() {
    let us = Origin::scripted(vec![status(502, "lost")]).await;
    let eu = Origin::scripted(vec![Act::Hang]).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.status, answer.text().as_str()), (502, "The origin failed\n"));
    let proxy_status = answer.header("proxy-status").unwrap();
    assert!(proxy_status.contains("received-status=502"), "{proxy_status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_response_at_all_is_503() {
    let edge = Portolan::start(&two(&format!("http://{}", refused()), &format!("http://{}", refused()), "")).await;
    for method in ["GET", "POST"] {
        let answer = edge.request(method, "/", &[], b"").await;
        assert_eq!((answer.status, answer.text().as_str()), (503, "All regions unavailable"), "{method}");
        assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
        assert!(answer.header("proxy-status").unwrap().starts_with("portolan; error=connection_refused"));
        assert!(answer.header("x-request-id").is_some());
    }
    let head = edge.request("HEAD", "/", &[], b"").await;
    assert_eq!((head.status, head.body.len(), head.header("content-length")), (503, 0, Some("23")));
}

#[tokio::test(flavor = "multi_thread")]
async fn when_total_runs_out_it_is_504() {
    let us = Origin::always(Act::Hang).await;
    let eu = Origin::always(Act::Hang).await;
    let yaml = two(&us.url(), &eu.url(), "").replace("first_byte: 300ms, total: 10s", "first_byte: 10s, total: 400ms");
    let edge = Portolan::start(&yaml).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!(answer.status, 504);
    assert_eq!((us.count(), eu.count()), (1, 0), "the deadline is for all attempts together");
    assert_eq!(edge.metric("portolan_retries_skipped_total{reason=\"deadline\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_are_all_tries() {
    let us = Origin::scripted(vec![status(503, "us")]).await;
    let eu = Origin::scripted(vec![]).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "retry: { attempts: 1 }")).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.status, answer.text().as_str()), (503, "us"));
    us.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_listed_statuses_move_on() {
    let us = Origin::scripted(vec![status(503, "us"), status(429, "slow")]).await;
    let eu = Origin::scripted(vec![ok("eu")]).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "retry: { statuses: [429] }")).await;
    assert_eq!(edge.get("/", &[]).await.text(), "us");
    assert_eq!(edge.get("/", &[]).await.text(), "eu");
    us.done();
    eu.done();
}

/// A POST is executed at most once, whatever goes wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_post_is_executed_at_most_once() {
    let body = vec![b'x'; 10_000];
    for (fault, expected) in [
        (Act::Close, 502),
        (Act::Reset, 502),
        (Act::Hang, 504),
        (status(502, "own"), 502),
        (status(503, "own"), 503),
        (status(504, "own"), 504),
        (Act::SendAndClose(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec()), 200),
        (Act::SendAndClose(b"HTTP/1.1 200 OK\r\nConte".to_vec()), 502),
    ] {
        for method in ["POST", "PATCH", "UNKNOWN"] {
            let us = Origin::scripted(vec![fault.clone()]).await;
            let eu = Origin::scripted(vec![]).await;
            let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
            let answer = edge.request(method, "/", &[], &body).await;
            assert_eq!(answer.status, expected, "{method} {fault:?}");
            assert_eq!((us.count(), eu.count()), (1, 0), "{method} {fault:?}");
            if matches!(fault, Act::Send(_)) {
                assert_eq!(answer.text(), "own", "the origin's own response passes");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_post_moves_on_with_its_whole_body_whatever_its_size() {
    for size in [0, 10, 64 << 10, (64 << 10) + 1, 3 << 20] {
        let body: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let eu = Origin::scripted(vec![ok("eu")]).await;
        let edge = Portolan::start(&two(&format!("http://{}", refused()), &eu.url(), "")).await;
        let answer = edge.request("POST", "/", &[], &body).await;
        assert_eq!((answer.status, answer.region()), (200, "eu_west"), "{size}");
        assert!(eu.received()[0].body == body, "{size} bytes arrive whole");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotent_body_is_sent_again_while_it_fits() {
    for (size, fault, expected) in [
        (10 << 10, status(503, "us"), (200, "eu_west")),
        (64 << 10, Act::Close, (200, "eu_west")),
        // Beyond the buffer the answer is given as it is.
        (200 << 10, status(503, "us"), (503, "us_east")),
        (200 << 10, Act::Close, (502, "")),
    ] {
        let body: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let us = Origin::scripted(vec![fault.clone()]).await;
        let eu = Origin::start(vec![], Some(ok("eu"))).await;
        let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
        let answer = edge.request("PUT", "/", &[], &body).await;
        assert_eq!((answer.status, answer.region()), expected, "{size} {fault:?}");
        let too_large = edge.metric("portolan_retries_skipped_total{reason=\"body_too_large\"}").await;
        assert_eq!(too_large, f64::from(u8::from(expected.1 != "eu_west")), "{size} {fault:?}");
        for received in eu.received() {
            assert!(received.body == body, "{size} bytes arrive whole");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_may_opt_into_repeating_posts() {
    let us = Origin::scripted(vec![status(503, "us")]).await;
    let eu = Origin::scripted(vec![ok("eu")]).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "retry: { non_idempotent: true }")).await;
    assert_eq!(edge.request("POST", "/", &[], b"hello").await.text(), "eu");
    assert_eq!(eu.received()[0].body, b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn never_after_a_response_byte() {
    for half in [
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        let us = Origin::scripted(vec![Act::SendAndClose(half.into())]).await;
        let eu = Origin::scripted(vec![]).await;
        let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
        let answer = edge.get("/", &[]).await;
        assert_eq!((answer.status, answer.text().as_str(), answer.complete), (200, "half", false), "a cut body shows as cut");
        assert_eq!(edge.metric("portolan_upstream_attempts_total{outcome=\"truncated\",region=\"us_east\"}").await, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_inside_a_body_is_bounded() {
    let half = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf".to_vec();
    let us = Origin::scripted(vec![Act::Send(half)]).await;
    let eu = Origin::scripted(vec![]).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.status, answer.complete), (200, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_takes_first_bytes_place_where_silence_is_natural() {
    let us = Origin::always(Act::Hang).await;
    let eu = Origin::always(ok("eu")).await;
    let yaml = two(&us.url(), &eu.url(), "").replace("first_byte: 300ms", "first_byte: 20s, idle: 200ms");
    let edge = Portolan::start(&yaml).await;
    // With a first byte of 20 s these would meet `total`, 10 s, and its 504.
    assert_eq!(edge.get("/", &[("Accept", "text/event-stream")]).await.region(), "eu_west");
    let yaml = yaml.replace("timeouts:", "streaming: true\n    timeouts:");
    edge.replace(&yaml);
    edge.reloader.reload("test").await.unwrap();
    assert_eq!(edge.get("/", &[]).await.region(), "eu_west");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_region_is_skipped_and_comes_back_by_one_trial() {
    let dead = refused();
    let eu = Origin::always(ok("eu")).await;
    let edge = Portolan::start(&two(&format!("http://{dead}"), &eu.url(), "")).await;
    for _ in 0..10 {
        assert_eq!(edge.get("/", &[]).await.region(), "eu_west");
    }
    let tried = "portolan_upstream_attempts_total{outcome=\"connect_refused\",region=\"us_east\"}";
    assert_eq!(edge.metric(tried).await, 3.0, "after three failures it is skipped");
    assert_eq!(edge.metric("portolan_region_healthy{region=\"us_east\"}").await, 0.0);

    // What is known of it outlives a reload.
    edge.replace(&two(&format!("http://{dead}"), &eu.url(), "streaming: true"));
    edge.reloader.reload("test").await.unwrap();
    assert_eq!(edge.get("/", &[]).await.region(), "eu_west");
    assert_eq!(edge.metric(tried).await, 3.0);

    let us = Origin::at(dead, vec![], Some(ok("us"))).await;
    edge.until("us_east had its trial", |_| {
        us.count() > 0 || {
            let (address, runtime) = (edge.address, tokio::runtime::Handle::current());
            runtime.spawn(async move { send(address, "GET", "/", &[], b"").await });
            false
        }
    })
    .await;
    edge.until("us_east is healthy again", |s| {
        let live = s.live.load();
        let now = portolan::proxy::clock::now();
        live.snapshot.regions[0].upstreams[0].state.endpoints()[0].is_usable(now)
    })
    .await;
    assert_eq!(edge.get("/", &[]).await.region(), "us_east");
}

#[tokio::test(flavor = "multi_thread")]
async fn if_all_are_ejected_all_are_tried() {
    let (us, eu) = (refused(), refused());
    let edge = Portolan::start(&two(&format!("http://{us}"), &format!("http://{eu}"), "")).await;
    for _ in 0..4 {
        assert_eq!(edge.get("/", &[]).await.status, 503);
    }
    let _eu = Origin::at(eu, vec![], Some(ok("eu"))).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.status, answer.region()), (200, "eu_west"), "although both are ejected");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_pooled_connection_costs_the_client_nothing() {
    // The origin answers once on each connection and closes it without a word.
    let us = Origin::always(Act::SendAndClose(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nus".to_vec())).await;
    let eu = Origin::scripted(vec![]).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
    for _ in 0..300 {
        let answer = edge.get("/", &[]).await;
        assert_eq!((answer.status, answer.region()), (200, "us_east"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_origins_are_pooled() {
    let us = Origin::always(ok("us")).await;
    let eu = Origin::scripted(vec![]).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
    for _ in 0..20 {
        edge.get("/", &[]).await;
    }
    assert_eq!((us.count(), us.connections()), (20, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_not_the_upstreams_fault() {
    let us = Origin::always(Act::Hang).await;
    let eu = Origin::always(ok("eu")).await;
    let yaml = two(&us.url(), &eu.url(), "").replace("first_byte: 300ms", "first_byte: 9s");
    let edge = Portolan::start(&yaml).await;
    for i in 0..5 {
        let address = edge.address;
        let leaving = tokio::spawn(async move { send(address, "GET", "/", &[], b"").await });
        us.came(i + 1).await;
        leaving.abort();
    }
    edge.until("all five left", |s| s.metrics.connections.get() == 0).await;
    assert_eq!(edge.metric("portolan_upstream_attempts_total{outcome=\"abandoned\",region=\"us_east\"}").await, 5.0);
    assert_eq!(edge.metric("portolan_region_healthy{region=\"us_east\"}").await, 1.0);
    assert_eq!(eu.count(), 0, "nobody waits for an answer any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_spread_requests_inside_a_region() {
    let (a, b) = (Origin::always(ok("a")).await, Origin::always(ok("b")).await);
    let yaml = format!(
        "regions: {{ us: {{ upstreams: [{{ url: \"{}\", weight: 3 }}, \"{}\"], balance: round_robin }} }}\nroutes: [{{}}]\n",
        a.url(),
        b.url()
    );
    let edge = Portolan::start(&yaml).await;
    for _ in 0..40 {
        assert_eq!(edge.get("/", &[]).await.status, 200);
    }
    assert_eq!((a.count(), b.count()), (30, 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn interim_responses_pass_and_decide_nothing() {
    let early = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nus".to_vec();
    let us = Origin::scripted(vec![Act::Send(early)]).await;
    let eu = Origin::scripted(vec![]).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "us"));
    // One that lives on them meets the deadline.
    let hints = "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(3);
    let us = Origin::always(Act::Send(hints.into_bytes())).await;
    let yaml = two(&us.url(), &eu.url(), "").replace("total: 10s", "total: 250ms");
    let edge = Portolan::start(&yaml).await;
    tokio::time::timeout(Duration::from_secs(30), async {
        assert_eq!(edge.get("/", &[]).await.status, 504);
    })
    .await
    .unwrap();
}

/// An address that takes no connection: its queue is full, so the kernel answers nothing.
struct BlackHole {
    listener: socket2::Socket,
    _waiting: Vec<socket2::Socket>,
}

impl BlackHole {
    fn new() -> Self {
        use socket2::{Domain, Socket, Type};
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let waiting = (0..4)
            .map(|_| {
                let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                client.set_nonblocking(true).unwrap();
                // Under way for as long as the queue is full.
                let _ = client.connect(&address);
                client
            })
            .collect();
        Self { listener, _waiting: waiting }
    }

    fn url(&self) -> String {
        format!("http://{}", self.listener.local_addr().unwrap().as_socket().unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connect_timeout_moves_on_while_there_is_time() {
    let hole = BlackHole::new();
    for timeouts in [
        "connect: 200ms, first_byte: 5s, total: 10s",
        // Whatever the answer may take, connecting has a bound of its own.
        "connect: 200ms, first_byte: 5s, total: 4s",
    ] {
        for headers in [&[][..], &[("Accept", "text/event-stream")]] {
            let eu = Origin::scripted(vec![ok("eu")]).await;
            let yaml = two(&hole.url(), &eu.url(), "").replace("connect: 500ms, first_byte: 300ms, total: 10s", timeouts);
            let edge = Portolan::start(&yaml).await;
            let answer = edge.get("/", headers).await;
            assert_eq!((answer.status, answer.region()), (200, "eu_west"), "{timeouts} {headers:?}");
            let timeouts = edge.metric("portolan_upstream_attempts_total{outcome=\"connect_timeout\",region=\"us_east\"}").await;
            assert_eq!(timeouts, 1.0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_break_off_eject_although_their_headers_were_fine() {
    let half = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf".to_vec();
    let us = Origin::always(Act::SendAndClose(half)).await;
    let eu = Origin::always(ok("eu")).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "")).await;
    for _ in 0..3 {
        assert!(!edge.get("/", &[]).await.complete);
    }
    assert_eq!(edge.get("/", &[]).await.text(), "eu");
    assert_eq!(us.count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_stream_that_falls_silent_is_nobodys_fault() {
    let quiet = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    let us = Origin::always(Act::Send(quiet)).await;
    let eu = Origin::scripted(vec![]).await;
    let yaml = two(&us.url(), &eu.url(), "").replace("first_byte: 300ms", "first_byte: 5s, idle: 50ms");
    let edge = Portolan::start(&yaml).await;
    for _ in 0..5 {
        assert_eq!(edge.get("/", &[("Accept", "text/event-stream")]).await.region(), "us_east");
    }
    assert_eq!(edge.metric("portolan_region_healthy{region=\"us_east\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listed_404_moves_on_but_ejects_nobody() {
    let us = Origin::always(status(404, "")).await;
    let eu = Origin::always(ok("eu")).await;
    let edge = Portolan::start(&two(&us.url(), &eu.url(), "retry: { statuses: [404] }")).await;
    for _ in 0..5 {
        assert_eq!(edge.get("/", &[]).await.text(), "eu");
    }
    assert_eq!(us.count(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_sending_gets_408() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let us = Origin::always(ok("us")).await;
    let eu = Origin::scripted(vec![]).await;
    let yaml = two(&us.url(), &eu.url(), "").replace("first_byte: 300ms", "first_byte: 5s, idle: 100ms");
    let edge = Portolan::start(&yaml).await;
    let mut stream = tokio::net::TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf").await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(parse(&bytes, false).status, 408);
    assert_eq!(edge.metric("portolan_region_healthy{region=\"us_east\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_origin_that_resets_streams_is_left_and_ejected() {
    let address = http2_origin(|_, mut respond| respond.send_reset(h2::Reason::INTERNAL_ERROR)).await;
    let eu = Origin::always(ok("eu")).await;
    let edge = Portolan::start(&two(&format!("h2c://{address}"), &eu.url(), "")).await;
    for _ in 0..5 {
        assert_eq!(edge.get("/", &[]).await.region(), "eu_west");
    }
    assert_eq!(edge.metric("portolan_region_healthy{region=\"us_east\"}").await, 0.0);
}

/// The retry budget is for what fails as well: a burst that meets a dead region before anybody knows moves on.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_into_a_dead_region_is_served() {
    let eu = Origin::always(ok("eu")).await;
    let edge = Portolan::start(&two(&format!("http://{}", refused()), &eu.url(), "")).await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let to = edge.address;
        clients.spawn(async move { send(to, "GET", "/", &[], b"").await });
    }
    while let Some(answer) = clients.join_next().await {
        let answer = answer.unwrap();
        assert_eq!((answer.status, answer.region()), (200, "eu_west"), "{}", answer.head);
    }
}
