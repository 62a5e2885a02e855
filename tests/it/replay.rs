//! Origin-directed replay: `fly-replay` and `Portolan-Replay`.

use crate::harness::*;

/// 200 with a header that asks for a replay.
fn replay(header: &str, value: &str) -> Act {
    Act::Send(format!("HTTP/1.1 200 OK\r\n{header}: {value}\r\nContent-Length: 5\r\n\r\nnever").into_bytes())
}

fn yaml(us: &Origin, eu: &str, more: &str) -> String {
    format!(
        "regions: {{ us: {{ upstreams: [\"{}\"] }}, eu: {{ upstreams: [\"{eu}\"] }} }}
routes: [{{ name: all, steering: {{ default: us, failover: [eu] }}{more} }}]\n",
        us.url()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_where_its_origin_sends_it() {
    for (header, value) in [
        ("fly-replay", "region=eu;state=captain's log"),
        ("Portolan-Replay", "region=eu; state=captain's log"),
        ("fly-replay", "elsewhere=true;state=captain's log"),
        ("fly-replay", "region=\"eu,us\";state=captain's log"),
    ] {
        for (method, body) in [("GET", &b""[..]), ("POST", b"a body")] {
            let us = Origin::scripted(vec![replay(header, value)]).await;
            let eu = Origin::scripted(vec![ok("eu")]).await;
            let edge = Portolan::start(&yaml(&us, &eu.url(), "")).await;
            let forged = [("fly-replay-src", "instance=forged"), ("Portolan-Replay-Src", "forged")];
            let answer = edge.request(method, "/", &forged, body).await;
            assert_eq!((answer.status, answer.text().as_str(), answer.region()), (200, "eu", "eu"), "{value}");
            assert_eq!(answer.header(header), None);
            let received = &eu.received()[0];
            assert_eq!(received.body, body);
            let source = received.one("fly-replay-src").unwrap();
            assert!(source.starts_with("instance=us-0;region=us;t=1") && source.ends_with(";state=captain's log"), "{source}");
            assert_eq!(received.one("portolan-replay-src"), Some(source));
            assert_eq!(us.received()[0].one("fly-replay-src"), None, "a client's own is dropped");
            assert_eq!(edge.metric("portolan_upstream_attempts_total{outcome=\"replayed\",region=\"us\"}").await, 1.0);
            us.done();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn loops_and_nonsense_are_refused_clearly() {
    let us = Origin::always(replay("fly-replay", "region=eu")).await;
    let eu = Origin::always(replay("fly-replay", "region=us")).await;
    let edge = Portolan::start(&yaml(&us, &eu.url(), "")).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.status, us.count(), eu.count()), (502, 1, 1));
    assert!(answer.header("proxy-status").unwrap().contains("back to one that asked"), "{}", answer.head);
    for (value, why) in [
        ("region=mars", "not defined"),
        ("state=x", "neither a region nor elsewhere"),
        ("app=other", "instance or app"),
        ("elsewhere=true;timeout=soon", "no duration"),
    ] {
        us.becomes(replay("fly-replay", value));
        let answer = edge.get("/", &[]).await;
        assert_eq!(answer.status, 502, "{value}");
        assert!(answer.header("proxy-status").unwrap().contains(why), "{value}: {}", answer.head);
    }
    assert_eq!(edge.metric("portolan_retries_skipped_total{reason=\"replay\"}").await, 5.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_cannot_be_sent_again_is_a_clear_error() {
    let us = Origin::always(replay("fly-replay", "region=eu")).await;
    let eu = Origin::always(ok("eu")).await;
    let edge = Portolan::start(&yaml(&us, &eu.url(), "")).await;
    let fits = edge.request("POST", "/", &[], &[b'x'; 60_000]).await;
    assert_eq!((fits.text().as_str(), eu.received()[0].body.len()), ("eu", 60_000));
    let large = edge.request("POST", "/", &[], &[b'x'; 200_000]).await;
    assert_eq!(large.status, 502);
    assert!(large.header("proxy-status").unwrap().contains("too large to be sent again (64 KiB)"), "{}", large.head);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_nobody_takes_falls_back_to_who_asked() {
    for fallback in ["force_self", "prefer_self"] {
        let us =
            Origin::scripted(vec![replay("fly-replay", &format!("region=eu;fallback={fallback}")), ok("us after all")]).await;
        let edge = Portolan::start(&yaml(&us, &format!("http://{}", refused()), "")).await;
        let answer = edge.get("/", &[]).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "us after all"), "{fallback}: {}", answer.head);
        let failed = us.received()[1].one("fly-replay-failed").unwrap().to_owned();
        assert!(failed.starts_with("instance=us-0;region=us;reason=retries_exhausted;elapsed_ms="), "{failed}");
    }
    // Without a fallback it fails as any request does.
    let us = Origin::scripted(vec![replay("fly-replay", "region=eu")]).await;
    let edge = Portolan::start(&yaml(&us, &format!("http://{}", refused()), "")).await;
    assert_eq!(edge.get("/", &[]).await.status, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_has_its_own_timeout() {
    let us = Origin::scripted(vec![replay("fly-replay", "region=eu;timeout=200ms;fallback=force_self"), ok("back")]).await;
    let eu = Origin::always(Act::Hang).await;
    let edge = Portolan::start(&yaml(&us, &eu.url(), ", timeouts: { first_byte: 50s, total: 60s }")).await;
    assert_eq!(edge.get("/", &[]).await.text(), "back");
    assert!(us.received()[1].one("fly-replay-failed").unwrap().contains("reason=timeout"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_may_have_no_replay() {
    let us = Origin::always(replay("fly-replay", "region=eu")).await;
    let edge = Portolan::start(&yaml(&us, &format!("http://{}", refused()), ", replay: false")).await;
    let answer = edge.get("/", &[]).await;
    assert_eq!((answer.text().as_str(), answer.header("fly-replay")), ("never", Some("region=eu")));
}
