//! What is told of requests: metrics, `/status.json`, the access log, and the streams of the page.

use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;
use crate::process::Program;

const LONDON: (&str, &str) = ("X-Forwarded-For", "81.2.69.160");
const TOKYO: (&str, &str) = ("X-Forwarded-For", "202.32.115.1");

fn two(a: &Origin, b: &str, more: &str) -> String {
    format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }}, b: {{ upstreams: [\"{b}\"] }} }}
routes:
  - name: shop
    hosts: [shop.example, \"*.shop.example\"]
    steering: {{ countries: {{ GB: a, JP: b }}, default: a, failover: [a, b] }}
  - {{ name: rest }}
waf: {{ rules: [{{ id: office, expression: 'http.request.uri.path contains \"/admin\" and ip.src ne 1.1.1.1', action: block }}] }}
limits: [{{ id: few, expression: 'http.request.uri.path eq \"/few\"', requests: 2, period: 60s }}]
{more}",
        a.url()
    )
}

const HOST: (&str, &str) = ("Host", "shop.example");

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_as_prometheus_wants_them() {
    let a = Origin::always(ok("a")).await;
    let edge = Portolan::start(&two(
        &a,
        &format!("http://{}", refused()),
        "cache: { rules: [{ id: all, expression: 'http.host ne \"\"', edge_ttl: { default: 1h } }] }\n",
    ))
    .await;
    for path in ["/", "/admin", "/few", "/few", "/few", "/cached"] {
        edge.get(path, &[HOST, LONDON]).await;
    }
    assert_eq!(edge.get("/", &[HOST, TOKYO]).await.region(), "a");
    edge.request("POST", "/", &[("Host", "www.SHOP.example"), TOKYO], b"").await;
    edge.get("/", &[("Host", "stranger.example")]).await;
    let text = edge.admin("GET", "/metrics").await.text();
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is missing: run `make test-deps`");
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let said = promtool.wait_with_output().unwrap();
    let complaints = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success() && complaints.is_empty(), "{complaints}");
    for line in text.lines().filter(|line| line.starts_with("# TYPE portolan_")) {
        let name = line.split(' ').nth(2).unwrap();
        let kind = line.split(' ').nth(3).unwrap();
        assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help");
    }
    for (metric, value) in [
        ("portolan_host_requests_total{class=\"2xx\",host=\"*.shop.example\"}", 1.0),
        ("portolan_host_requests_total{class=\"2xx\",host=\"_other\"}", 1.0),
        ("portolan_requests_unsuccessful_total{why=\"rule_blocked\"}", 1.0),
        ("portolan_requests_unsuccessful_total{why=\"over_limit\"}", 1.0),
        ("portolan_retry_budget_left{route=\"rest\"}", 30.0),
        ("portolan_region_spill_ratio{region=\"a\"}", 0.0),
        ("portolan_limit_table_entries", 1.0),
    ] {
        let found = text.lines().find_map(|l| l.strip_prefix(metric)).and_then(|v| v.trim().parse().ok()).unwrap_or(0.0);
        assert!(found >= value, "{metric} is {found}");
    }
    let digest = |text: &str| {
        let all: Vec<_> = text.lines().filter(|l| l.starts_with("portolan_config_info{digest=")).map(str::to_owned).collect();
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    };
    let before = digest(&text);
    // What the next configuration does not have is forgotten, and does not come back with a request that outlives it.
    let slow = edge.state.live.load_full();
    edge.replace(&two(&a, &a.url(), "").replace("shop.example, ", "other.example, ").replace("id: office", "id: bureau"));
    edge.reloader.reload("test").await.unwrap();
    let text = edge.admin("GET", "/metrics").await.text();
    assert_ne!(digest(&text), before);
    let old = ["host=\"shop.example\"", "rule=\"office\""];
    assert!(old.iter().all(|label| !text.contains(label)) && text.contains("host=\"other.example\""));
    edge.state.metrics.hosts(&slow.snapshot);
    drop(slow);
    edge.beat();
    let text = edge.admin("GET", "/metrics").await.text();
    assert!(old.iter().all(|label| !text.contains(label)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ejection_is_counted_once() {
    let a = Origin::always(ok("a")).await;
    let edge = Portolan::start(&two(&a, &format!("http://{}", refused()), "")).await;
    for _ in 0..6 {
        edge.get("/", &[HOST, TOKYO]).await;
    }
    let url = edge.status().await["regions"][1]["upstreams"][0]["url"].as_str().unwrap().to_owned();
    for _ in 0..2 {
        let line = format!("portolan_upstream_ejections_total{{region=\"b\",upstream=\"{url}\"}}");
        assert_eq!(edge.metric(&line).await, 1.0);
    }
    assert_eq!(edge.metric("portolan_region_spill_ratio{region=\"b\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn label_values_are_bounded() {
    let a = Origin::always(ok("a")).await;
    let routes: String = (0..1_010).map(|n| format!("  - {{ name: r{n}, hosts: [h{n}.example] }}\n")).collect();
    let edge = Portolan::start(&format!("regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes:\n{routes}", a.url())).await;
    for n in [0, 999, 1_000, 1_009] {
        edge.get("/", &[("Host", &format!("h{n}.example"))]).await;
    }
    for (line, count) in [
        ("portolan_requests_total{code=\"200\",method=\"GET\",route=\"r999\"}", 1.0),
        ("portolan_requests_total{code=\"200\",method=\"GET\",route=\"_other\"}", 2.0),
        ("portolan_host_requests_total{class=\"2xx\",host=\"h0.example\"}", 1.0),
        ("portolan_host_requests_total{class=\"2xx\",host=\"_other\"}", 3.0),
    ] {
        assert_eq!(edge.metric(line).await, count, "{line}");
    }
    let text = edge.admin("GET", "/metrics").await.text();
    assert!(!text.contains("h999.example") && !text.contains("\"r1000\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_tells_of_the_last_minutes() {
    let a = Origin::always(ok("a")).await;
    let edge = Portolan::start(&two(&a, &format!("http://{}", refused()), "")).await;
    edge.beat();
    for _ in 0..5 {
        edge.get("/", &[HOST, LONDON]).await;
    }
    for _ in 0..4 {
        edge.get("/", &[HOST, TOKYO]).await;
    }
    edge.get("/admin", &[HOST, LONDON]).await;
    a.becomes(status(500, "no"));
    edge.get("/", &[HOST, LONDON]).await;
    edge.beat();
    let status = edge.status().await;
    let all = &status["traffic"]["10s"];
    assert_eq!((&all["requests"], &all["failed"], &all["per_second"]), (&11.into(), &1.into(), &5.5.into()), "{all}");
    assert!(all["p50_ms"].as_f64() <= all["p99_ms"].as_f64() && all["p50_ms"].as_f64() > Some(0.0));
    assert_eq!(status["traffic"]["5m"]["requests"], 11);
    let of = |list: &str, key: &str, name: &str| {
        let found = status[list].as_array().unwrap().iter().find(|one| one[key] == name);
        found.unwrap_or_else(|| panic!("{list} has no {name}: {status:#}")).clone()
    };
    assert_eq!(of("routes", "name", "shop")["traffic"]["1m"]["requests"], 11);
    assert_eq!(of("countries", "country", "JP")["traffic"]["1m"]["requests"], 4);
    assert_eq!(of("regions", "name", "b")["traffic"]["1m"]["failed"], 3, "until it was ejected");
    assert_eq!(of("rules", "rule", "office")["minute"], 1);
    assert_eq!(of("unsuccessful", "why", "origin_5xx")["minute"], 1);
    assert_eq!(of("failovers", "reason", "connect_refused")["minute"], 3);
    let kinds: Vec<_> = status["events"].as_array().unwrap().iter().map(|e| e["kind"].as_str().unwrap()).collect();
    assert!(kinds.contains(&"failover") && kinds.contains(&"unhealthy"), "{kinds:?}");
    let unhealthy = of("events", "kind", "unhealthy");
    assert!(unhealthy["region"] == "b" && unhealthy["because"].as_str().unwrap().contains("ejection number 1"), "{unhealthy}");
    assert!(
        status["process"]["resident_bytes"].as_u64() > Some(1 << 20) && status["process"]["cpu_seconds"].as_f64() > Some(0.0)
    );
    assert_eq!(edge.order("/regions/b/evacuate", r#"{ "for": "45m", "reason": "power work" }"#).await.status, 200);
    edge.beat();
    edge.beat();
    let events = edge.status().await["events"].clone();
    assert_eq!((&events[0]["kind"], &events[0]["because"]), (&"evacuated".into(), &"power work".into()));
    assert_ne!(events[1]["kind"], "evacuated", "once");
    assert_eq!(edge.order("/regions/b/restore", "").await.status, 200);
    edge.beat();
    assert_eq!(edge.status().await["events"][0]["kind"], "restored");
}

/// What a log has once its writer is done.
fn lines(edge: &Portolan, file: &str) -> Vec<String> {
    edge.state.access_log.close();
    std::fs::read_to_string(edge.path(file)).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_as_json_with_reasons() {
    let a = Origin::always(ok("a")).await;
    let edge = Portolan::start(&two(
        &a,
        &a.url(),
        "access_log: { path: access.log, query: redact, cookies: redact, addresses: truncate, sample: { 2xx: 0 } }\n",
    ))
    .await;
    let given =
        [HOST, LONDON, ("Cookie", "sid=secret; b=2"), ("Referer", "http://x/y?token=secret"), ("User-Agent", "curl \"8\"")];
    edge.get("/", &given).await;
    edge.get("/admin?key=secret", &given).await;
    edge.get("/few", &[HOST]).await;
    edge.get("/few", &[HOST]).await;
    edge.get("/few", &[HOST]).await;
    a.becomes(status(404, "no"));
    edge.get("/gone", &[HOST]).await;
    // The engine would refuse it without a word to anybody.
    edge.get("/\"><script>", &[HOST]).await;
    a.becomes(Act::SendAndClose(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal".to_vec()));
    edge.get("/half", &[HOST]).await;
    let said: Vec<serde_json::Value> = lines(&edge, "access.log").iter().map(|l| serde_json::from_str(l).unwrap()).collect();
    let told: Vec<_> = said.iter().map(|line| (line["status"].as_u64().unwrap(), line["why"].as_str().unwrap_or("-"))).collect();
    let expected = [(403, "rule_blocked"), (429, "over_limit"), (404, "origin_4xx"), (400, "malformed")];
    assert_eq!(told, expected, "what went well is not logged");
    let line = &said[0];
    assert_eq!(line["client"], "81.2.69.0");
    assert_eq!((&line["query"], &line["cookies"]), (&"key=REDACTED".into(), &"sid=REDACTED; b=REDACTED".into()));
    assert_eq!((&line["referer"], &line["user_agent"]), (&"http://x/y?token=REDACTED".into(), &"curl \"8\"".into()));
    assert!(!format!("{said:?}").contains("secret"));
    assert_eq!(line["waf"][0]["saw"]["ip.src"], "81.2.69.0", "neither here");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_no_success_even_while_its_response_is_stored() {
    // More than the system would keep for a client that reads nothing.
    let body = "x".repeat(7 << 20);
    let head = format!("HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: {}\r\n\r\n", body.len());
    let a = Origin::always(Act::Send(format!("{head}{body}").into_bytes())).await;
    let yaml = format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all, cache: {{ enabled: true }} }}]\naccess_log: {{ path: access.log }}\n",
        a.url()
    );
    let edge = Portolan::start(&yaml).await;
    let client = tokio::net::TcpSocket::new_v4().unwrap();
    client.set_recv_buffer_size(4_096).unwrap();
    let mut client = client.connect(edge.address).await.unwrap();
    client.write_all(b"GET /big HTTP/1.1\r\nHost: shop.example\r\n\r\n").await.unwrap();
    client.read_exact(&mut [0; 1_000]).await.unwrap();
    drop(client);
    let counted = async {
        while edge.metric("portolan_requests_unsuccessful_total{why=\"client_aborted\"}").await < 1.0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.expect("nobody noticed");
    assert!(edge.get("/big", &[HOST]).await.complete);
    let told: Vec<serde_json::Value> = lines(&edge, "access.log").iter().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!((&told[0]["why"], &told[0]["status"]), (&"client_aborted".into(), &200.into()), "{}", told[0]);
    assert_eq!((told[1].get("why"), &told[1]["cache"]), (None, &"hit".into()), "{}", told[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_as_text() {
    let a = Origin::always(ok("abc")).await;
    let log = |format: &str| format!("access_log: {{ path: access.log, format: '{format}', query: keep }}\n");
    for (format, expected) in [
        ("common", r#"81.2.69.160 - - [DATE] "GET /x?a=1 HTTP/1.1" 200 3"#),
        ("combined", r#"81.2.69.160 - - [DATE] "GET /x?a=1 HTTP/1.1" 200 3 "-" "a\x22b""#),
        (
            "{client} {country} {status} {why} {route} {region} {attempts} {method} {host}{path} {cache} {{}}",
            "81.2.69.160 GB 200 - shop a 1 GET shop.example/x - {}",
        ),
    ] {
        let edge = Portolan::start(&two(&a, &a.url(), &log(format))).await;
        edge.get("/x?a=1", &[HOST, LONDON, ("User-Agent", "a\"b")]).await;
        let said = lines(&edge, "access.log");
        assert_eq!(said.len(), 1);
        let (open, close) = (said[0].find('['), said[0].find(']'));
        let line = match (open, close) {
            (Some(open), Some(close)) => {
                let date = &said[0][open + 1..close];
                assert!(date.len() == 26 && date.ends_with(" +0000") && date.matches('/').count() == 2, "{date}");
                said[0].replace(date, "DATE")
            }
            _ => said[0].clone(),
        };
        assert_eq!(line, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_to_a_system_log() {
    let a = Origin::always(ok("abc")).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let socket = UnixDatagram::bind(&path).unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    udp.set_read_timeout(Some(PATIENCE)).unwrap();
    let to =
        |place: &str| two(&a, &a.url(), &format!("access_log: {{ path: \"syslog:{place}\", format: '{{status}} {{path}}' }}\n"));
    let edge = Portolan::start(&to(path.to_str().unwrap())).await;
    edge.get("/one", &[HOST]).await;
    let mut buffer = [0; 9_000];
    let read = socket.recv(&mut buffer).unwrap();
    let message = String::from_utf8_lossy(&buffer[..read]).into_owned();
    let process = format!(" portolan[{}]: 200 /one", std::process::id());
    assert!(message.starts_with("<190>") && message.ends_with(&process) && message.len() == 5 + 15 + process.len(), "{message}");
    // Whoever listened is started anew, and a line that is longer than a message is cut.
    drop(socket);
    std::fs::remove_file(&path).unwrap();
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    edge.get(&format!("/{}", "x".repeat(10_000)), &[HOST]).await;
    assert_eq!(socket.recv(&mut buffer).unwrap(), 8_192);
    edge.replace(&to(&udp.local_addr().unwrap().to_string()));
    edge.reloader.reload("test").await.unwrap();
    edge.get("/two", &[HOST]).await;
    let read = udp.recv(&mut buffer).unwrap();
    let message = String::from_utf8_lossy(&buffer[..read]).into_owned();
    let parts: Vec<_> = message.splitn(8, ' ').collect();
    assert_eq!(
        (parts[0], parts[3], parts[5], parts[6], parts[7]),
        ("<190>1", "portolan", "access", "-", "200 /two"),
        "{message}"
    );
    for wrong in ["", "loghost", "127.0.0.1:port"] {
        edge.replace(&to(wrong));
        let problems = edge.reloader.reload("test").await.unwrap_err();
        assert!(problems[0].message.contains("no place of a system log"), "{wrong}: {problems:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigusr1_opens_the_log_again() {
    let a = Origin::always(ok("a")).await;
    let program = Program::run(&two(&a, &a.url(), "access_log: { path: access.log, format: '{path}' }\n")).await;
    let (log, old) = (program.dir.path().join("access.log"), program.dir.path().join("access.log.1"));
    let has = async |path: &std::path::Path, text: &str| {
        let wait = async {
            while !std::fs::read_to_string(path).unwrap_or_default().contains(text) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{text} never came"));
    };
    send(program.address, "GET", "/before", &[HOST], b"").await;
    has(&log, "/before").await;
    std::fs::rename(&log, &old).unwrap();
    program.signal("USR1");
    let reopened = async {
        while !log.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reopened).await.unwrap();
    send(program.address, "GET", "/after", &[HOST], b"").await;
    has(&log, "/after").await;
    assert_eq!(std::fs::read_to_string(&old).unwrap(), "/before\n");
}

/// A stream of events, read as it comes.
struct Events {
    stream: TcpStream,
    buffer: String,
}

impl Events {
    async fn open(edge: &Portolan, path: &str) -> Self {
        let mut stream = TcpStream::connect(edge.admin).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", edge.admin).as_bytes()).await.unwrap();
        let mut events = Self { stream, buffer: String::new() };
        let head = events.until("\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.0 200") && head.contains("text/event-stream"), "{head}");
        events
    }

    async fn until(&mut self, end: &str) -> String {
        let read = async {
            loop {
                if let Some(at) = self.buffer.find(end) {
                    let rest = self.buffer.split_off(at + end.len());
                    return std::mem::replace(&mut self.buffer, rest);
                }
                let mut chunk = [0; 65_536];
                let read = self.stream.read(&mut chunk).await.unwrap();
                assert!(read > 0, "it ended: {}", self.buffer);
                self.buffer.push_str(&String::from_utf8_lossy(&chunk[..read]));
            }
        };
        tokio::time::timeout(PATIENCE, read).await.expect("nothing more came")
    }

    /// The next event of this name.
    async fn next(&mut self, name: &str) -> serde_json::Value {
        loop {
            let event = self.until("\n\n").await;
            let field =
                |field: &str| event.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default().trim().to_owned();
            if field("event:") == name {
                return serde_json::from_str(&field("data:")).unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_told_who_serves_whom() {
    let (a, b) = (Origin::always(ok("a")).await, Origin::always(ok("b")).await);
    let edge = Portolan::start(&two(&a, &b.url(), "")).await;
    edge.get("/", &[HOST, TOKYO]).await;
    edge.beat();
    let mut events = Events::open(&edge, "/events").await;
    assert_eq!(events.next("curve").await[0]["requests"], 1);
    let now = events.next("now").await;
    assert_eq!((&now["countries"]["GB"]["region"], &now["countries"]["JP"]["region"]), (&"a".into(), &"b".into()));
    assert_eq!((&now["map_route"], &now["countries"]["JP"]["traffic"]["requests"]), (&"shop".into(), &1.into()));
    assert!(now["regions"][1]["spot"]["longitude"].as_f64() > Some(120.0), "b is where Japan is: {}", now["regions"][1]["spot"]);
    // Its region fails, and the map with it.
    b.becomes(Act::Close);
    for _ in 0..10 {
        edge.get("/", &[HOST, TOKYO]).await;
    }
    edge.beat();
    let now = events.next("now").await;
    let japan = &now["countries"]["JP"];
    assert_eq!((&japan["region"], &japan["home"]), (&"a".into(), &"b".into()), "{japan}");
    assert!(now["failovers"].as_array().unwrap().iter().any(|f| f["from"] == "b" && f["to"] == "a"), "{}", now["failovers"]);
    // Another route, and one that is not.
    let mut other = Events::open(&edge, "/events?map=rest").await;
    assert_eq!(other.next("now").await["map_route"], "rest");
    let mut gone = Events::open(&edge, "/events?map=mars").await;
    assert_eq!(gone.next("now").await["map_route"], "shop");
    assert_eq!(edge.admin("GET", "/events?nonsense=1").await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_shown_to_whoever_wants_them() {
    let a = Origin::always(ok("a")).await;
    let edge = Portolan::start(&two(&a, &a.url(), "")).await;
    let mut refused = Events::open(&edge, "/events?tail=true&status=4xx&why=rule_blocked&country=gb&route=shop&text=adm").await;
    let mut all = Events::open(&edge, "/events?tail=true&status=&ip=").await;
    for _ in 0..200 {
        edge.get("/", &[HOST, LONDON]).await;
    }
    edge.get("/admin", &[HOST, TOKYO]).await;
    edge.get("/admin", &[HOST, LONDON]).await;
    let seen = refused.next("requests").await;
    assert_eq!((seen["lines"].as_array().unwrap().len(), &seen["skipped"]), (1, &0.into()), "{seen}");
    let line = &seen["lines"][0];
    assert_eq!((&line["why"], &line["rules"][0], &line["country"]), (&"rule_blocked".into(), &"office".into(), &"GB".into()));
    let (mut lines, mut skipped, mut seconds) = (0, 0, std::collections::HashSet::new());
    while lines + skipped < 202 {
        let seen = all.next("requests").await;
        for line in seen["lines"].as_array().unwrap() {
            lines += 1;
            seconds.insert(line["at"].as_u64().unwrap() / 1_000);
        }
        skipped += seen["skipped"].as_u64().unwrap();
    }
    assert_eq!(lines + skipped, 202, "none is told twice");
    // Seconds of two clocks: one of them may be in two of the other's.
    assert!(lines <= 50 * (seconds.len() as u64 + 1), "{lines} in {seconds:?}");
    for wrong in ["ip=81.2", "status=6xx", "why=nonsense", "region=mars", "route=mars", "country=G"] {
        assert_eq!(edge.admin("GET", &format!("/events?tail=true&{wrong}")).await.status, 400, "{wrong}");
    }
    let mut watchers = Vec::new();
    for _ in 0..14 {
        watchers.push(Events::open(&edge, "/events?tail=true").await);
    }
    assert_eq!(edge.admin("GET", "/events?tail=true").await.status, 503, "too many");
    drop((refused, all, watchers));
    // Whoever leaves makes room, once the process sees it.
    edge.until("nobody watches", |state| {
        portolan::tasks::seconds::beat(state, Duration::from_secs(1));
        !state.tail.is_watched()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_whole_and_guarded() {
    let a = Origin::always(ok("a")).await;
    let edge = Portolan::start(&to(&a)).await;
    let page = edge.admin("GET", "/").await;
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self';") && !policy.contains("unsafe"),
        "{policy}"
    );
    assert!(!page.text().contains("style=") && !page.text().contains("<style") && !page.text().contains("onclick"));
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/admin/page");
    for file in std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).filter(|f| f.is_file()) {
        let name = file.file_name().unwrap().to_str().unwrap();
        let path = if name == "index.html" { "/".to_owned() } else { format!("/page/{name}") };
        let got = edge.admin("GET", &path).await;
        assert_eq!((got.status, got.text()), (200, std::fs::read_to_string(&file).unwrap()), "{name}");
        // What it asks for is there.
        for part in got.text().split(['"', '\'']).filter_map(|text| text.strip_prefix("/page/").or(text.strip_prefix("./"))) {
            assert_eq!(edge.admin("GET", &format!("/page/{part}")).await.status, 200, "{name} needs {part}");
        }
    }
    assert_eq!(edge.admin("GET", "/page/nothing").await.status, 404);
    let stranger = send(edge.admin, "GET", "/events", &[("Host", "evil.example")], b"").await;
    assert_eq!(stranger.status, 421);
    let host = edge.admin.to_string();
    let foreign = send(edge.admin, "GET", "/events", &[("Host", &host), ("Sec-Fetch-Site", "cross-site")], b"").await;
    assert_eq!(foreign.status, 403, "it would take a place");

    let dir = tempfile::TempDir::new().unwrap();
    let guarded = whole(&to(&a)).replacen("admin: { address", "admin: { token: open-sesame, address", 1);
    std::fs::write(dir.path().join("portolan.yaml"), guarded).unwrap();
    let edge = Portolan::in_dir(dir).await;
    let refused = edge.admin("GET", "/").await;
    assert!(refused.status == 401 && refused.head.contains("Bearer") && refused.head.contains("Basic realm"), "{}", refused.head);
    // `me:open-sesame`
    for (path, status) in [("/", 200), ("/page/main.js", 200), ("/status.json", 200)] {
        let got = send(edge.admin, "GET", path, &[("Authorization", "Basic bWU6b3Blbi1zZXNhbWU=")], b"").await;
        assert_eq!(got.status, status, "{path}");
    }
    assert_eq!(edge.admin("GET", "/events").await.status, 401);
}

fn to(origin: &Origin) -> String {
    format!("regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\n", origin.url())
}
