//! Rules against real requests: what they stop, what they only say, and what the origin never gets.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

async fn edge(origin: &Origin, waf: &str) -> Portolan {
    Portolan::start(&format!("regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\n{waf}", origin.url())).await
}

fn from(ip: &str) -> (&str, &str) {
    ("X-Forwarded-For", ip)
}

/// The two rules that the product was asked for, as they were written.
#[tokio::test(flavor = "multi_thread")]
async fn the_rules_of_the_mission() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "waf:
  rules:
    - id: admin-office-only
      expression: (http.request.uri.path contains \"/admin\" and not ip.src in {192.0.2.0/24})
      action: block
    - { id: medium-threat, expression: (cf.threat_score gt 14), action: challenge }
lists: { shady: { ip: [203.0.113.0/24], reputation: 15 } }
",
    )
    .await;
    let refused = edge.get("/admin/users", &[from("198.51.100.7")]).await;
    assert_eq!((refused.status, refused.text().as_str()), (403, "Forbidden\n"));
    assert_eq!(refused.header("proxy-status"), Some("portolan; error=http_request_denied"));
    assert_eq!(edge.get("/admin/users", &[from("192.0.2.77")]).await.text(), "served");
    assert_eq!(edge.get("/", &[from("198.51.100.8")]).await.text(), "served");
    let challenged = edge.get("/", &[from("203.0.113.9")]).await;
    assert_eq!((challenged.status, challenged.header("cf-mitigated")), (403, Some("challenge")));
    assert_eq!(edge.metric("portolan_waf_matches_total{action=\"block\",rule=\"admin-office-only\"}").await, 1.0);
    assert_eq!(edge.metric("portolan_waf_matches_total{action=\"challenge\",rule=\"medium-threat\"}").await, 1.0);
    assert_eq!(edge.metric("portolan_requests_total{code=\"403\",method=\"GET\",route=\"all\"}").await, 2.0);
    // Who was blocked is watched: 25 points are more than 14.
    assert_eq!(edge.get("/", &[from("198.51.100.7")]).await.status, 403);
    assert_eq!(origin.count(), 2);
}

/// Ways around a rule on a path, and what the origin gets of those that pass.
#[tokio::test(flavor = "multi_thread")]
async fn ways_around_a_rule() {
    let origin = Origin::always(ok("served")).await;
    let rules = "waf:
  rules:
    - { id: admin, expression: 'lower(http.request.uri.path) contains \"/admin\"', action: block }
    - { id: raw, expression: 'raw.http.request.uri.path contains \"%7e\"', action: block }
";
    let edge = edge(&origin, rules).await;
    for way in [
        "/admin",
        "/%61dmin",
        "/%41DMIN",
        "//admin",
        "/.//admin",
        "/x/../admin",
        "/x/%2e%2e/admin",
        "/x/%2E%2e/./admin",
        "\\admin",
        "/x\\..\\admin",
        "/ADMIN",
        "/admin;x=1",
        "/a/b/../../admin?x",
        "/%7eadmin",
    ] {
        // Each as another client: who was blocked once is not asked here about what came before.
        assert_eq!(edge.get(&format!("/{}", way.trim_start_matches('/')), &[]).await.status, 403, "{way}");
        if way.starts_with("//") {
            assert_eq!(edge.get(way, &[]).await.status, 403, "{way}");
        }
    }
    assert_eq!(origin.count(), 0);
    for (way, path) in [("/x/..//%62?q=%61", "/x/..//%62?q=%61"), ("/%2561dmin", "/%2561dmin"), ("/adm%69x", "/adm%69x")] {
        assert_eq!(edge.get(way, &[]).await.status, 200, "{way}");
        let got = origin.received().pop().unwrap();
        assert!(got.head.starts_with(&format!("GET {path} HTTP/1.1")), "the origin gets what was sent: {}", got.head);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_in_order() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "access_log: { path: access.log }
waf:
  rules:
    - { id: seen, expression: 'http.request.uri.query contains \"token\"', action: log }
    - { id: trusted, expression: 'http.request.headers[\"x-key\"][0] eq \"sesame\"', action: skip }
    - { id: would, expression: 'http.request.uri.path eq \"/would\"', action: block, mode: log }
    - id: own-answer
      expression: 'http.request.uri.path eq \"/teapot\"'
      action: block
      response: { status: 418, content_type: application/json, body: '{\"short\": \"stout\"}' }
    - id: moved
      expression: 'starts_with(http.request.uri.path, \"/old/\")'
      action: redirect
      redirect: { to: { expression: 'concat(\"/new\", substring(http.request.uri.path, 4))' }, status: 308, preserve_query: true }
    - { id: all-posts, expression: 'http.request.method eq \"POST\"', action: block }
",
    )
    .await;
    assert_eq!(edge.get("/?token=hush", &[]).await.status, 200);
    assert_eq!(edge.get("/would", &[]).await.status, 200);
    let own = edge.get("/teapot", &[]).await;
    assert_eq!(
        (own.status, own.header("content-type"), own.text().as_str()),
        (418, Some("application/json"), "{\"short\": \"stout\"}")
    );
    let head = edge.request("HEAD", "/teapot", &[], b"").await;
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (418, Some("18"), 0));
    let moved = edge.get("/old/a%20b?c=%22", &[]).await;
    assert_eq!((moved.status, moved.header("location")), (308, Some("/new/a%20b?c=%22")));
    assert_eq!(edge.request("POST", "/x", &[], b"").await.status, 403);
    assert_eq!(edge.request("POST", "/x", &[("X-Key", "sesame")], b"").await.status, 200);
    for (rule, action, times) in [
        ("seen", "log", 1.0),
        ("would", "log", 1.0),
        ("trusted", "skip", 1.0),
        ("moved", "redirect", 1.0),
        ("own-answer", "block", 2.0),
    ] {
        let line = format!("portolan_waf_matches_total{{action=\"{action}\",rule=\"{rule}\"}}");
        assert_eq!(edge.metric(&line).await, times, "{rule}");
    }
    edge.state.access_log.close();
    let log = std::fs::read_to_string(edge.path("access.log")).unwrap();
    let seen: serde_json::Value = serde_json::from_str(log.lines().find(|l| l.contains("\"seen\"")).unwrap()).unwrap();
    assert_eq!(
        seen["waf"][0],
        serde_json::json!({ "rule": "seen", "action": "log", "saw": { "http.request.uri.query": "(10 bytes)" } })
    );
    assert!(!log.contains("hush") && !log.contains("sesame"), "what may be secret is not logged");
    let would: serde_json::Value = serde_json::from_str(log.lines().find(|l| l.contains("\"would\"")).unwrap()).unwrap();
    assert_eq!(would["waf"][0]["saw"]["http.request.uri.path"], "/would");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_it_in_log_mode() {
    let origin = Origin::always(ok("served")).await;
    let waf = "waf: { mode: log, rules: [{ id: everything, expression: 'http.host ne \"\"', action: block }], managed: { enabled: true } }\n";
    let edge = edge(&origin, waf).await;
    assert_eq!(edge.get("/?q=1%27%20or%20%271%27=%271", &[]).await.status, 200);
    assert_eq!(edge.metric("portolan_waf_matches_total{action=\"log\",rule=\"everything\"}").await, 1.0);
    assert_eq!(edge.metric("portolan_waf_matches_total{action=\"log\",rule=\"sqli-libinjection\"}").await, 1.0);
}

const BODY_RULES: &str = "waf:
  body_limit: 4KiB
  rules:
    - { id: evil, expression: 'http.request.body.raw contains \"evil\"', action: block }
    - { id: long, expression: 'http.request.body.truncated and http.request.headers[\"x-strict\"][0] eq \"1\"', action: block }
    - { id: field, expression: 'any(http.request.body.form[\"role\"][*] eq \"admin\")', action: block }
    - { id: json, expression: 'lookup_json_string(http.request.body.raw, \"user\", \"role\") eq \"admin\"', action: block }
    - { id: file, expression: 'any(ends_with(http.request.body.multipart.filenames[*][0], \".php\"))', action: block }
";

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_seen_and_what_is_blocked_stays_here() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(&origin, BODY_RULES).await;
    let form = ("Content-Type", "application/x-www-form-urlencoded");
    let multipart = ("Content-Type", "multipart/form-data; boundary=b");
    let json = ("Content-Type", "application/json");
    let upload = b"--b\r\nContent-Disposition: form-data; name=\"f\"; filename=\"x.php\"\r\n\r\n<?\r\n--b--\r\n";
    for (kind, body) in
        [(form, &b"an evil thing"[..]), (form, b"a=b&role=admin"), (json, br#"{"user": {"role": "admin"}}"#), (multipart, upload)]
    {
        let refused = edge.request("POST", "/", &[kind], body).await;
        assert_eq!(refused.status, 403, "{}", String::from_utf8_lossy(body));
    }
    assert_eq!(origin.count(), 0, "not even their headers were sent");
    for (kind, body) in [(form, &b"a=b&role=guest"[..]), (json, br#"{"user": {"role": "guest"}}"#), (json, b"{not json")] {
        assert_eq!(edge.request("POST", "/", &[kind], body).await.status, 200);
        assert_eq!(origin.received().pop().unwrap().body, body);
    }
}

/// Longer than is waited for: the body is held back until enough of it is there.
#[tokio::test(flavor = "multi_thread")]
async fn long_bodies_are_looked_at_on_their_way() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(&origin, BODY_RULES).await;
    let long = |start: &str, len: usize| [start.as_bytes(), &vec![b'x'; len]].concat();
    for len in [5_000, 70_000, 300_000] {
        let refused = edge.request("POST", "/", &[], &long("evil", len)).await;
        assert_eq!(refused.status, 403, "{len}");
        // What is longer than the limit is seen in part, and passes whole.
        let body = long("good", len);
        assert_eq!(edge.request("POST", "/", &[], &body).await.status, 200, "{len}");
        assert_eq!(origin.received().pop().unwrap().body, body, "{len}");
        let hidden = [long("good", len), b"evil".to_vec()].concat();
        assert_eq!(edge.request("POST", "/", &[], &hidden).await.status, 200, "{len}");
        assert_eq!(edge.request("POST", "/", &[("X-Strict", "1")], &hidden).await.status, 403, "{len}");
    }
    // Whatever was blocked, its body never arrived.
    assert!(origin.received().iter().all(|r| !r.body.starts_with(b"evil")));
    // Of unknown length, short and long.
    for (body, status) in
        [(long("evil", 10), 403), (long("evil", 9_000), 403), (long("good", 10), 200), (long("good", 9_000), 200)]
    {
        let mut stream = TcpStream::connect(edge.address).await.unwrap();
        let mut request =
            b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        for chunk in body.chunks(1_000) {
            request.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            request.extend_from_slice(chunk);
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"0\r\n\r\n");
        stream.write_all(&request).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(parse(&answer, false).status, status, "{}", body.len());
        if status == 200 {
            assert_eq!(origin.received().pop().unwrap().body, body);
        }
    }
}

/// A body that was read for rules goes to another upstream like any other.
#[tokio::test(flavor = "multi_thread")]
async fn failover_after_a_look() {
    let (bad, good) = (Origin::always(Act::Close).await, Origin::always(ok("served")).await);
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }}, b: {{ upstreams: [\"{}\"] }}, c: {{ upstreams: [\"http://{}\"] }} }}
routes:
  - {{ name: all, steering: {{ default: a, failover: [b] }} }}
  - {{ name: refused, paths: [/refused], steering: {{ default: c, failover: [b] }} }}
{BODY_RULES}",
        bad.url(),
        good.url(),
        refused()
    ))
    .await;
    for len in [100, 5_000, 60_000] {
        let body = vec![b'x'; len];
        let got = edge.request("PUT", "/", &[], &body).await;
        assert_eq!((got.status, got.region()), (200, "b"), "{len}");
        assert_eq!(good.received().pop().unwrap().body, body, "{len}");
    }
    for len in [100, 5_000, 60_000, 300_000] {
        let body = vec![b'x'; len];
        assert_eq!(edge.request("POST", "/refused", &[], &body).await.status, 200, "{len}");
        assert_eq!(good.received().pop().unwrap().body, body, "{len}");
    }
    let evil = [&b"evil"[..], &[b'x'; 9_000]].concat();
    assert_eq!(edge.request("PUT", "/", &[], &evil).await.status, 403);
    assert!(good.received().iter().chain(&bad.received()).all(|r| !r.body.starts_with(b"evil")));
}

/// The client is told to go on once, and the origin is not asked again.
#[tokio::test(flavor = "multi_thread")]
async fn expect_continue() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(&origin, BODY_RULES).await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    let head = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n";
    stream.write_all(head).await.unwrap();
    let mut interim = [0; 25];
    stream.read_exact(&mut interim).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"hello").await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    let got = origin.received().pop().unwrap();
    assert_eq!((got.one("expect"), got.body.as_slice()), (None, &b"hello"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_managed_ruleset_and_what_is_skipped() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "waf:
  rules:
    - { id: editors, expression: 'http.host eq \"editor.example\"', action: skip, skip: [sqli, xss] }
    - { id: internal, expression: 'http.host eq \"internal.example\"', action: skip, skip: [managed, rest] }
    - { id: never, expression: 'http.host eq \"internal.example\"', action: block }
  managed: { enabled: true, sensitivity: medium }
",
    )
    .await;
    let attack = "/?q=1%27%20or%20%271%27=%271%27--";
    let traversal = "/?f=../../../../etc/passwd";
    for (host, path, status) in [
        ("shop.example", attack, 403),
        ("shop.example", traversal, 403),
        ("shop.example", "/?q=O%27Reilly", 200),
        ("editor.example", attack, 200),
        ("editor.example", traversal, 403),
        ("internal.example", attack, 200),
        ("internal.example", traversal, 200),
    ] {
        assert_eq!(edge.get(path, &[("Host", host)]).await.status, status, "{host}{path}");
    }
    assert_eq!(edge.request("POST", "/", &[], b"q=1' or '1'='1'--").await.status, 403, "in a body too");
    assert_eq!(edge.metric("portolan_waf_matches_total{action=\"block\",rule=\"sqli-libinjection\"}").await, 1.0);
    assert_eq!(origin.count(), 4);
}

/// Who sends its body byte by byte, or none of what it announced, gets an answer, and no upstream waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_comes() {
    let origin = Origin::always(ok("served")).await;
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all, timeouts: {{ idle: 300ms }} }}]\n{BODY_RULES}",
        origin.url()
    ))
    .await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\nhalf").await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(parse(&answer, false).status, 408, "{}", String::from_utf8_lossy(&answer));
    assert_eq!(origin.connections(), 0);
}

/// A request without a body has one that is empty, and is judged before anybody hears of it.
#[tokio::test(flavor = "multi_thread")]
async fn no_body_is_no_way_around() {
    let origin = Origin::always(ok("served")).await;
    let rules = "waf:
  rules:
    - { id: mixed, expression: 'http.request.uri.path contains \"/admin\" or http.request.body.raw contains \"evil\"', action: block }
    - { id: empty, expression: 'http.request.uri.path eq \"/upload\" and http.request.body.size eq 0', action: block }
";
    let edge = edge(&origin, rules).await;
    for (method, path) in [("DELETE", "/admin/x"), ("GET", "/admin"), ("HEAD", "/admin"), ("POST", "/upload")] {
        assert_eq!(edge.request(method, path, &[], b"").await.status, 403, "{method} {path}");
    }
    assert_eq!(origin.count(), 0);
    assert_eq!(edge.request("DELETE", "/x", &[], b"").await.status, 200);
}

/// The host of a rule is the host of a route.
#[tokio::test(flavor = "multi_thread")]
async fn ways_around_a_rule_on_hosts_and_headers() {
    let origin = Origin::always(ok("served")).await;
    let rules = "waf:
  rules:
    - { id: host, expression: 'http.host eq \"admin.example\"', action: block }
    - { id: agent, expression: 'http.user_agent contains \"sqlmap\"', action: block }
";
    let edge = edge(&origin, rules).await;
    for host in ["admin.example", "ADMIN.example", "admin.example:8080", "admin.example.", "Admin.Example.:80"] {
        assert_eq!(edge.get("/", &[("Host", host)]).await.status, 403, "{host}");
    }
    assert_eq!(edge.get("/", &[("User-Agent", "Mozilla/5.0"), ("User-Agent", "sqlmap/1.8")]).await.status, 403);
    assert_eq!(edge.get("/", &[("Host", "www.admin.example")]).await.status, 200);
}

/// The answer to an upload that is not over reaches an HTTP/2 client, and so does what a rule says of its body.
#[tokio::test(flavor = "multi_thread")]
async fn over_http2() {
    let origin = Origin::always(ok("served")).await;
    let rules = BODY_RULES.replace(
        "  rules:\n",
        "  rules:\n    - { id: early, expression: 'http.request.uri.path eq \"/early\"', action: block }\n",
    );
    let edge = edge(&origin, &rules).await;
    let stream = TcpStream::connect(edge.address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let evil = [&b"evil"[..], &[b'x'; 200_000]].concat();
    for (path, body, status) in [
        ("/", b"an evil thing".to_vec(), 403),
        ("/", b"a good thing".to_vec(), 200),
        ("/", evil.clone(), 403),
        ("/early", vec![b'x'; 200_000], 403),
        ("/", vec![b'x'; 200_000], 200),
    ] {
        let request = http::Request::post(format!("http://a.example{path}")).body(()).unwrap();
        let (answer, mut upload) = client.send_request(request, false).unwrap();
        let length = body.len();
        let sending = tokio::spawn(async move {
            for chunk in body.chunks(10_000) {
                upload.reserve_capacity(chunk.len());
                let mut left = bytes::Bytes::copy_from_slice(chunk);
                while !left.is_empty() {
                    // An early answer may end the upload; that is no mistake of the client's.
                    let Some(Ok(room)) = std::future::poll_fn(|cx| upload.poll_capacity(cx)).await else { return };
                    if upload.send_data(left.split_to(room.min(left.len())), false).is_err() {
                        return;
                    }
                }
            }
            let _ = upload.send_data(bytes::Bytes::new(), true);
        });
        let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), status, "{path} {length}");
        sending.await.unwrap();
    }
    assert!(origin.received().iter().all(|r| !r.body.starts_with(b"evil")));
}

/// What a rule skips that waits for the body, waits as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_skip_that_waits_for_the_body() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "waf:
  body_limit: 1KiB
  rules:
    - { id: signed, expression: 'http.request.body.raw contains \"sesame\"', action: skip, skip: [rest, managed] }
    - { id: closed, expression: 'http.request.uri.path eq \"/closed\"', action: block }
  managed: { enabled: true }
",
    )
    .await;
    let long = |start: &str| [start.as_bytes(), &[b'x'; 5_000]].concat();
    for (path, body, status) in [
        ("/closed", b"sesame".to_vec(), 200),
        ("/closed", b"other".to_vec(), 403),
        ("/closed", long("sesame"), 200),
        ("/closed", long("other"), 403),
        ("/?f=../../etc/passwd", long("sesame"), 200),
        ("/?f=../../etc/passwd", long("other"), 403),
        ("/open", long("other"), 200),
    ] {
        assert_eq!(edge.request("POST", path, &[], &body).await.status, status, "{path} {}", body.len());
    }
    assert!(origin.received().iter().all(|r| !r.body.starts_with(b"other") || r.head.contains("/open")));
}

/// The client's time is not the origin's, and a body that never came is known by name.
#[tokio::test(flavor = "multi_thread")]
async fn slow_bodies_have_their_own_time() {
    let origin = Origin::always(ok("served")).await;
    let edge = Portolan::start(&format!(
        "access_log: {{ path: access.log }}
regions: {{ a: {{ upstreams: [\"{}\"] }} }}
routes: [{{ name: all, timeouts: {{ total: 2s, idle: 4s }} }}]
{BODY_RULES}",
        origin.url()
    ))
    .await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream
        .write_all(b"POST /slow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhe")
        .await
        .unwrap();
    // A client that takes longer over its body than the origin may take over all.
    tokio::time::sleep(std::time::Duration::from_millis(2_500)).await;
    stream.write_all(b"llo").await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(parse(&answer, false).status, 200, "{}", String::from_utf8_lossy(&answer));
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"POST /never HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhe").await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = parse(&answer, false);
    assert_eq!(answer.status, 408);
    edge.state.access_log.close();
    let log = std::fs::read_to_string(edge.path("access.log")).unwrap();
    let line = log.lines().find(|l| l.contains("/never")).expect("its line");
    assert!(line.contains(answer.header("x-request-id").unwrap()) && line.contains("\"status\":408"), "{line}");
}

/// Rules of the managed set can be left out one by one.
#[tokio::test(flavor = "multi_thread")]
async fn managed_exceptions() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(&origin, "waf: { managed: { enabled: true, except: [sqli-libinjection, traversal-target] } }\n").await;
    assert_eq!(edge.get("/?q=1%27%20or%20%271%27=%271%27--", &[]).await.status, 200);
    assert_eq!(edge.get("/?q=%3Cscript%3Ealert(1)%3C/script%3E", &[]).await.status, 403);
    // And it may only say what it would do.
    let quiet = self::edge(&origin, "waf: { managed: { enabled: true, mode: log } }\n").await;
    assert_eq!(quiet.get("/?q=%3Cscript%3Ealert(1)%3C/script%3E", &[]).await.status, 200);
    assert_eq!(quiet.metric("portolan_waf_matches_total{action=\"log\",rule=\"xss-libinjection\"}").await, 1.0);
}

/// What is blocked on its way to an HTTP/2 upstream is answered at once, too.
#[tokio::test(flavor = "multi_thread")]
async fn long_bodies_on_their_way_to_http2() {
    let address = http2_origin(|request, mut respond| {
        tokio::spawn(async move {
            let mut body = request.into_body();
            while let Some(Ok(chunk)) = body.data().await {
                let _ = body.flow_control().release_capacity(chunk.len());
            }
            let _ = respond.send_response(http::Response::new(()), true);
        });
    })
    .await;
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"h2c://{address}\"] }} }}\nroutes: [{{ name: all }}]\n{BODY_RULES}"
    ))
    .await;
    for (start, status) in [("evil", 403), ("good", 200)] {
        let body = [start.as_bytes(), &[b'x'; 100_000]].concat();
        assert_eq!(edge.request("POST", "/", &[], &body).await.status, status, "{start}");
    }
    assert_eq!(edge.metric("portolan_upstream_attempts_total{outcome=\"ok\",region=\"a\"}").await, 1.0);
    assert_eq!(edge.metric("portolan_region_healthy{region=\"a\"}").await, 1.0);
}

/// A call may wait for an answer before it goes on: its messages are looked at one by one.
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_wait_for_answers() {
    let address = http2_origin(|request, mut respond| {
        tokio::spawn(async move {
            let response = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
            let mut answer = respond.send_response(response, false).unwrap();
            let mut body = request.into_body();
            while let Some(Ok(chunk)) = body.data().await {
                let _ = body.flow_control().release_capacity(chunk.len());
                if answer.send_data(chunk, false).is_err() {
                    return;
                }
            }
            let _ = answer.send_data(bytes::Bytes::new(), true);
        });
    })
    .await;
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"h2c://{address}\"] }} }}\nroutes: [{{ name: all }}]\n{BODY_RULES}"
    ))
    .await;
    let stream = TcpStream::connect(edge.address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let message = |text: &str| bytes::Bytes::from([&[0, 0, 0, 0, text.len() as u8][..], text.as_bytes()].concat());
    let request =
        http::Request::post("http://a.example/echo").header("content-type", "application/grpc").header("te", "trailers");
    let (answer, mut upload) = client.send_request(request.body(()).unwrap(), false).unwrap();
    upload.send_data(message("one"), false).unwrap();
    let conversation = async {
        let mut echo = answer.await.unwrap().into_body();
        assert_eq!(echo.data().await.unwrap().unwrap(), message("one"));
        // A message that comes in two pieces.
        let two = message("number two");
        upload.send_data(two.slice(..8), false).unwrap();
        upload.send_data(two.slice(8..), false).unwrap();
        let mut came = Vec::new();
        while came.len() < two.len() {
            came.extend(echo.data().await.unwrap().unwrap());
        }
        assert_eq!(came, two);
        upload.send_data(message("an evil one"), false).unwrap();
        // Nothing of it comes back: the call is over.
        assert!(echo.data().await.is_none_or(|chunk| chunk.is_err()));
    };
    tokio::time::timeout(PATIENCE, conversation).await.expect("nobody waits for ever");
    assert_eq!(edge.metric("portolan_waf_matches_total{action=\"block\",rule=\"evil\"}").await, 1.0);
}
