//! `portolan region`: what operators order, over the admin API and the command line, through reload and restart.

use std::process::{Command, Output};

use crate::harness::*;
use crate::process::Program;

fn yaml(a: &Origin, b: &Origin, more: &str) -> String {
    format!(
        "{more}regions: {{ a: {{ upstreams: [\"{}\"], affinity: {{ cookie: stay }} }}, b: {{ upstreams: [\"{}\"] }} }}
routes: [{{ name: all, steering: {{ default: a, failover: [b] }} }}]\n",
        a.url(),
        b.url()
    )
}

async fn two() -> (Origin, Origin) {
    (Origin::always(ok("a")).await, Origin::always(ok("b")).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evacuated_region_gets_nothing_until_it_is_restored() {
    let (a, b) = two().await;
    let edge = Portolan::start(&yaml(&a, &b, "")).await;
    let first = edge.get("/", &[]).await;
    let cookie = first.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    let answer = edge.order("/regions/a/evacuate", r#"{ "for": "45m", "reason": "maintenance" }"#).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    for _ in 0..20 {
        assert_eq!(edge.get("/", &[("Cookie", &cookie)]).await.text(), "b", "affinity does not hold it");
    }
    assert_eq!(a.count(), 1);
    assert_eq!(edge.metric("portolan_region_granted_ratio{region=\"a\"}").await, 0.0);
    assert!(edge.metric("portolan_failovers_total{from=\"a\",reason=\"away\",to=\"b\"}").await >= 20.0);
    let status = edge.status().await;
    assert_eq!(
        (status["regions"][0]["order"]["kind"].as_str(), status["regions"][0]["away"].as_bool()),
        (Some("evacuated"), Some(true))
    );
    let said = edge.explain(serde_json::json!({ "ip": "127.0.0.1", "url": "/" })).await;
    assert!(said["moved"]["because"].as_str().unwrap().contains("operator"), "{said:#}");
    assert!(said.to_string().contains("maintenance"));
    // A reload does not bring it back.
    edge.replace(&yaml(&a, &b, "# changed\n"));
    edge.reloader.reload("test").await.unwrap();
    assert_eq!(edge.get("/", &[]).await.text(), "b");
    // If everything else fails it is better than nothing.
    b.becomes(Act::Close);
    assert_eq!(edge.get("/", &[]).await.text(), "a");
    b.becomes(ok("b"));
    assert_eq!(edge.order("/regions/a/restore", "").await.status, 200);
    assert_eq!(edge.get("/", &[]).await.text(), "a");
    assert_eq!(edge.order("/regions/a/restore", "").await.status, 400, "there is nothing to restore");
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_make_no_sense_or_hurt_are_refused() {
    let (a, b) = two().await;
    let edge = Portolan::start(&yaml(&a, &b, "")).await;
    for (path, body, status, word) in [
        ("/regions/mars/evacuate", r#"{ "for": "45m" }"#, 404, "defined: a, b"),
        ("/regions/a/explode", "{}", 404, "expected"),
        ("/regions/a/evacuate", "{}", 400, "`for` is missing"),
        ("/regions/a/evacuate", r#"{ "for": "59s" }"#, 400, "from 1m to 72h"),
        ("/regions/a/evacuate", r#"{ "for": "73h" }"#, 400, "from 1m to 72h"),
        ("/regions/a/evacuate", r#"{ "for": "soon" }"#, 400, "duration"),
        ("/regions/a/evacuate", r#"{ "for": "1m", "ramp": "2m" }"#, 400, "ramp"),
        ("/regions/a/evacuate", r#"{ "until": "later" }"#, 400, "unknown field"),
        ("/regions/a/drain", r#"{ "for": "1m" }"#, 400, "until it is restored"),
    ] {
        let answer = edge.order(path, body).await;
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.text());
        assert!(answer.text().contains(word), "{path} {body}: {}", answer.text());
    }
    // b is the only other one: without it nothing would be left.
    b.becomes(status(503, ""));
    for _ in 0..3 {
        edge.request("GET", "/", &[("Portolan-Force-Region", "b")], b"").await;
    }
    assert_eq!(edge.order("/regions/b/evacuate", r#"{ "for": "1m" }"#).await.status, 200);
    let refused = edge.order("/regions/a/drain", "{}").await;
    assert_eq!(refused.status, 409);
    assert!(refused.text().contains("no healthy region would be left for clients of route all"), "{}", refused.text());
    assert_eq!(edge.get("/", &[]).await.text(), "a");
    assert_eq!(edge.order("/regions/a/drain", r#"{ "force": true }"#).await.status, 200);
    // A browser of a stranger's page orders nothing.
    let forged = [("Origin", "http://evil.example"), ("X-Portolan-Action", "1")];
    assert_eq!(send(edge.admin, "POST", "/regions/a/restore", &forged, b"").await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ramp_moves_traffic_by_and_by() {
    let (a, b) = two().await;
    let edge = Portolan::start(&yaml(&a, &b, "")).await;
    assert_eq!(edge.order("/regions/a/evacuate", r#"{ "for": "2h", "ramp": "1h" }"#).await.status, 200);
    // Hardly anything has left yet.
    for _ in 0..20 {
        assert_eq!(edge.get("/", &[]).await.text(), "a");
    }
    let granted = edge.status().await["regions"][0]["granted"].as_f64().unwrap();
    assert!(granted < 1.0 && granted > 0.9, "{granted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_region_keeps_its_clients_for_a_while_and_takes_no_new_ones() {
    let (a, b) = two().await;
    let edge = Portolan::start(&yaml(&a, &b, "")).await;
    let cookie = edge.get("/", &[]).await.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    assert_eq!(edge.order("/regions/a/drain", r#"{ "grace": "1h" }"#).await.status, 200);
    let new = edge.get("/", &[]).await;
    assert_eq!(new.text(), "b");
    let old = edge.get("/", &[("Cookie", &cookie)]).await;
    assert_eq!((old.text().as_str(), old.header("set-cookie")), ("a", None));
    // Its grace ends.
    assert_eq!(edge.order("/regions/a/drain", r#"{ "grace": "0s" }"#).await.status, 200);
    assert_eq!(edge.get("/", &[("Cookie", &cookie)]).await.text(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_into_a_drained_region_are_told_to_come_again() {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::{Message, protocol::frame::coding::CloseCode};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_text() && socket.send(message).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    let b = Origin::always(ok("b")).await;
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{url}\"] }}, b: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ steering: {{ default: a, failover: [b] }} }}]\n",
        b.url()
    ))
    .await;
    let (mut socket, _) = tokio_tungstenite::connect_async(format!("ws://{}/chat", edge.address)).await.unwrap();
    socket.send(Message::text("one")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().to_text().unwrap(), "one");
    assert_eq!(edge.order("/regions/a/drain", r#"{ "grace": "300ms" }"#).await.status, 200);
    // Within the grace it goes on.
    socket.send(Message::text("two")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().to_text().unwrap(), "two");
    let goodbye = tokio::time::timeout(PATIENCE, socket.next()).await.expect("it stays open").unwrap().unwrap();
    let Message::Close(Some(frame)) = goodbye else { panic!("{goodbye:?}") };
    assert_eq!(frame.code, CloseCode::Restart);
    let endpoint = edge.state.live.load().snapshot.regions[0].upstreams[0].state.endpoints()[0].clone();
    assert_eq!(endpoint.health.counts().0, 0, "that is nobody's failure");
}

fn portolan(program: &Program, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_portolan"))
        .args(arguments)
        .args(["--admin", &format!("http://{}", program.admin)])
        .env_remove("PORTOLAN_ADMIN_TOKEN")
        .output()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_survive_a_restart_and_end_by_themselves() {
    let (a, b) = two().await;
    let state = tempfile::TempDir::new().unwrap();
    let more = format!("state_dir: {}\n", state.path().join("portolan").display());
    let mut program = Program::run(&yaml(&a, &b, &more)).await;
    let get = async |program: &Program| send(program.address, "GET", "/", &[], b"").await;
    let cookie = get(&program).await.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();

    let output = portolan(&program, &["region", "evacuate", "a", "--for", "45m", "--reason", "flood in the hall"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.starts_with("a is evacuated until 20"), "{said}");
    assert!(output.stderr.is_empty(), "it survives a restart, so there is no warning");
    program.said("flood in the hall").await;
    let list = String::from_utf8(portolan(&program, &["region", "list"]).stdout).unwrap();
    assert!(
        list.contains("a                evacuated")
            && list.contains("flood in the hall")
            && list.contains("b                healthy"),
        "{list}"
    );
    for (arguments, code) in [
        (&["region", "evacuate", "a"][..], 1),
        (&["region", "evacuate", "mars", "--for", "5m"], 1),
        (&["region", "drain", "b"], 1),
        (&["region", "restore", "b"], 1),
        (&["region", "list", "--json"], 0),
    ] {
        assert_eq!(portolan(&program, arguments).status.code(), Some(code), "{arguments:?}");
    }
    assert_eq!(get(&program).await.text(), "b");

    program.signal("TERM");
    assert!(program.ended().await.success());
    let mut program = Program::run(&yaml(&a, &b, &more)).await;
    program.said("still in force after a restart").await;
    assert_eq!(get(&program).await.text(), "b");
    let restored = portolan(&program, &["region", "restore", "a", "--reason", "dry again"]);
    assert_eq!(String::from_utf8(restored.stdout).unwrap(), "a is restored\n");
    program.said("dry again").await;
    // The secret survived too: the cookie of the first process is understood.
    let answer = send(program.address, "GET", "/", &[("Cookie", &cookie)], b"").await;
    assert_eq!((answer.text().as_str(), answer.header("set-cookie")), ("a", None));

    // An order whose time is over ends by itself, also if nobody was there to see it.
    program.signal("TERM");
    assert!(program.ended().await.success());
    let file = state.path().join("portolan/regions.json");
    let ending = |until: u64| {
        format!(
            r#"{{"version":1,"regions":[{{"region":"a","kind":"evacuated","from":1000,"ramp":0,"until":{until},"reason":"x"}}]}}"#
        )
    };
    std::fs::write(&file, ending(2_000)).unwrap();
    let mut program = Program::run(&yaml(&a, &b, &more)).await;
    assert_eq!(get(&program).await.text(), "a");
    program.signal("TERM");
    assert!(program.ended().await.success());
    let soon = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64 + 1_500;
    std::fs::write(&file, ending(soon)).unwrap();
    let mut program = Program::run(&yaml(&a, &b, &more)).await;
    assert_eq!(get(&program).await.text(), "b");
    program.said("order=\"ended\"").await;
    assert_eq!(get(&program).await.text(), "a");
    assert!(!std::fs::read_to_string(&file).unwrap().contains("evacuated"));
    // A file that cannot be read is said and put aside; not to start would be worse.
    program.signal("TERM");
    assert!(program.ended().await.success());
    std::fs::write(&file, "nonsense").unwrap();
    let mut program = Program::run(&yaml(&a, &b, &more)).await;
    program.said("cannot be read and are forgotten").await;
    assert_eq!(std::fs::read_to_string(file.with_extension("json.bad")).unwrap(), "nonsense");
}

/// What is left for each kind of client counts, not what is left for all together.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_forgotten_when_a_region_goes() {
    let (a, b) = two().await;
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }}, b: {{ upstreams: [\"{}\"] }}, c: {{ upstreams: [\"{}\"] }} }}
routes:
  - {{ name: british, paths: [/b], steering: {{ countries: {{ GB: b }}, default: a, failover: [c] }} }}
  - {{ name: lonely, paths: [/l], steering: {{ countries: {{ GB: b }}, default: a }} }}
  - {{ name: writes, paths: [/w], steering: {{ default: a, failover: [c], writes: c }} }}\n",
        a.url(),
        b.url(),
        a.url()
    ))
    .await;
    let order = async |region: &str| {
        let answer = edge.order(&format!("/regions/{region}/evacuate"), r#"{ "for": "2h", "ramp": "1h" }"#).await;
        (answer.status, answer.text())
    };
    let (status, text) = order("b").await;
    assert!(status == 409 && text.contains("route lonely;"), "{text}");
    let (status, text) = order("c").await;
    assert!(status == 409 && text.contains("route writes;"), "{text}");
    // One that is still leaving does not count as there.
    assert_eq!(edge.order("/regions/c/evacuate", r#"{ "for": "2h", "ramp": "1h", "force": true }"#).await.status, 200);
    let (status, text) = order("a").await;
    assert!(status == 409 && text.contains("british") && text.contains("lonely"), "{text}");
}
