//! A new configuration takes over without anybody noticing, and a bad one changes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::harness::*;

fn to(origin: &Origin) -> String {
    format!("regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\n", origin.url())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_file_takes_effect() {
    let (one, two) = (Origin::always(ok("one")).await, Origin::always(ok("two")).await);
    let edge = Portolan::start(&to(&one)).await;
    assert_eq!(edge.get("/", &[]).await.text(), "one");
    edge.replace(&to(&two));
    edge.until("the second configuration", |s| s.reload.lock().generation == 2).await;
    assert_eq!(edge.get("/", &[]).await.text(), "two");
    // Written in place, too.
    std::fs::write(edge.path("portolan.yaml"), whole(&to(&one))).unwrap();
    edge.until("the third configuration", |s| s.reload.lock().generation == 3).await;
    assert_eq!(edge.get("/", &[]).await.text(), "one");
    assert_eq!(edge.metric("portolan_config_generation").await, 3.0);
}

/// Kubernetes mounts a ConfigMap as links through `..data`, and swaps that one.
#[tokio::test(flavor = "multi_thread")]
async fn a_config_map_swap_takes_effect() {
    use std::os::unix::fs::symlink;
    let (one, two) = (Origin::always(ok("one")).await, Origin::always(ok("two")).await);
    let dir = tempfile::TempDir::new().unwrap();
    for (version, origin) in [("..v1", &one), ("..v2", &two)] {
        std::fs::create_dir(dir.path().join(version)).unwrap();
        std::fs::write(dir.path().join(version).join("portolan.yaml"), whole(&to(origin))).unwrap();
    }
    symlink("..v1", dir.path().join("..data")).unwrap();
    symlink("..data/portolan.yaml", dir.path().join("portolan.yaml")).unwrap();
    let edge = Portolan::in_dir(dir).await;
    assert_eq!(edge.get("/", &[]).await.text(), "one");
    symlink("..v2", edge.path("..data_tmp")).unwrap();
    std::fs::rename(edge.path("..data_tmp"), edge.path("..data")).unwrap();
    edge.until("the second configuration", |s| s.reload.lock().generation == 2).await;
    assert_eq!(edge.get("/", &[]).await.text(), "two");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_keeps_the_last_good_one_loudly() {
    let (one, two) = (Origin::always(ok("one")).await, Origin::always(ok("two")).await);
    let edge = Portolan::start(&to(&one)).await;
    // Half of a file that is being written.
    let good = whole(&to(&two));
    std::fs::write(edge.path("portolan.yaml"), &good[..good.len() - 20]).unwrap();
    edge.until("the half is refused", |s| !s.reload.lock().successful).await;
    assert_eq!(edge.get("/", &[]).await.text(), "one");
    assert_eq!(edge.metric("portolan_config_last_reload_successful").await, 0.0);
    assert_eq!(edge.metric("portolan_config_generation").await, 1.0);
    let status: serde_json::Value = serde_json::from_str(&edge.admin("GET", "/status.json").await.text()).unwrap();
    assert_eq!(status["config"]["last_reload_successful"], false);
    assert!(!status["config"]["problems"].as_array().unwrap().is_empty());
    let reloads = status["reloads"].as_array().unwrap();
    assert_eq!((reloads.len(), &reloads[0]["successful"], &reloads[1]["trigger"]), (2, &false.into(), &"start".into()));
    // The other half arrives.
    std::fs::write(edge.path("portolan.yaml"), &good).unwrap();
    edge.until("the whole is in force", |s| s.reload.lock().generation == 2).await;
    assert_eq!(edge.get("/", &[]).await.text(), "two");
    assert_eq!(edge.metric("portolan_config_last_reload_successful").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_side_says_every_problem() {
    let one = Origin::always(ok("one")).await;
    let edge = Portolan::start(&to(&one)).await;
    let unchanged = edge.admin("POST", "/reload").await;
    assert_eq!(unchanged.status, 200);
    assert!(unchanged.text().contains("\"changed\":false"), "{}", unchanged.text());
    edge.replace("regions: { a: { upstreams: [] } }\nroutes: [{ steering: { default: b, failover: [c] }, typo: 1 }]\n");
    let refused = edge.admin("POST", "/reload").await;
    assert_eq!(refused.status, 422);
    let body: serde_json::Value = serde_json::from_str(&refused.text()).unwrap();
    let problems = body["problems"].as_array().unwrap();
    assert_eq!(problems.len(), 4, "{body:#}");
    assert!(problems.iter().all(|p| p["line"].as_u64() > Some(0) && p["file"].as_str().is_some()), "{body:#}");
    assert_eq!(edge.get("/", &[]).await.text(), "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_and_admin_need_a_restart() {
    let one = Origin::always(ok("one")).await;
    let edge = Portolan::start(&to(&one)).await;
    let text = std::fs::read_to_string(edge.path("portolan.yaml")).unwrap();
    let text = text.replace("127.0.0.1:0", "127.0.0.3:0").replace("127.0.0.2:0", "127.0.0.4:0");
    replace(&edge.path("portolan.yaml"), &text);
    let refused = edge.admin("POST", "/reload").await;
    assert_eq!(refused.status, 422);
    for key in ["`listeners` changed: restart needed", "`admin` changed: restart needed"] {
        assert!(refused.text().contains(key), "{}", refused.text());
    }
    assert_eq!(edge.get("/", &[]).await.text(), "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_reloads_under_load_fail_nobody() {
    let (one, two) = (Origin::always(ok("one")).await, Origin::always(ok("two")).await);
    let edge = Portolan::start(&to(&one)).await;
    let stop = Arc::new(AtomicBool::new(false));
    let served = Arc::new(AtomicUsize::new(0));
    let mut clients = Vec::new();
    for client in 0..8 {
        let (address, stop, served) = (edge.address, stop.clone(), served.clone());
        clients.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let body = vec![b'x'; client * 1_000];
                let method = if client % 2 == 0 { "GET" } else { "POST" };
                let answer = send(address, method, "/", &[], &body).await;
                assert_eq!(answer.status, 200, "{}", answer.head);
                assert!(answer.complete && ["one", "two"].contains(&answer.text().as_str()));
                served.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    for i in 0..100 {
        let before = served.load(Ordering::Relaxed);
        edge.replace(&to(if i % 2 == 0 { &two } else { &one }));
        edge.reloader.reload("test").await.unwrap();
        edge.until("load goes on", |_| served.load(Ordering::Relaxed) > before).await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(edge.state.reload.lock().generation, 101);
    assert!(one.count() > 0 && two.count() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_country_database_is_watched() {
    let origin = Origin::always(ok("")).await;
    let dir = tempfile::TempDir::new().unwrap();
    let shipped = std::fs::read(database()).unwrap();
    std::fs::write(dir.path().join("country.mmdb"), crate::mmdb::flat("country", "JP")).unwrap();
    std::fs::write(
        dir.path().join("portolan.yaml"),
        whole(&format!("client: {{ trusted_proxies: [127.0.0.0/8], country_database: country.mmdb }}\n{}", to(&origin))),
    )
    .unwrap();
    let edge = Portolan::in_dir(dir).await;
    let country = async || {
        edge.get("/", &[("X-Forwarded-For", "81.2.69.160")]).await;
        origin.received().last().unwrap().one("portolan-country").unwrap().to_owned()
    };
    assert_eq!(country().await, "JP");
    std::fs::write(edge.path("country.mmdb"), &shipped).unwrap();
    edge.until("the new database", |s| s.reload.lock().generation == 2).await;
    assert_eq!(country().await, "GB");
    // Truncated, garbled, absent: nothing changes.
    let mut garbled = shipped.clone();
    for byte in garbled.iter_mut().skip(1_000).take(400_000) {
        *byte ^= 0x55;
    }
    for (i, bad) in [shipped[..shipped.len() / 2].to_vec(), garbled, b"no database".to_vec()].into_iter().enumerate() {
        let before = edge.state.reload.lock().at;
        std::fs::write(edge.path("country.mmdb"), bad).unwrap();
        edge.until("the bad database is refused", |s| s.reload.lock().at > before && !s.reload.lock().successful).await;
        assert_eq!(country().await, "GB", "bad database {i}");
        let problem = edge.state.reload.lock().problems[0].message.clone();
        assert!(problem.contains("country.mmdb") && problem.contains("cannot be used"), "{problem}");
    }
    std::fs::remove_file(edge.path("country.mmdb")).unwrap();
    edge.reloader.reload("test").await.unwrap_err();
    assert_eq!(country().await, "GB");
    std::fs::write(edge.path("country.mmdb"), &shipped).unwrap();
    edge.until("it is well again", |s| s.reload.lock().successful).await;
    assert_eq!(edge.metric("portolan_geoip_lookups_total{result=\"error\"}").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_can_move() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&format!("access_log: {{ path: first.log }}\n{}", to(&origin))).await;
    edge.get("/a?secret=1", &[("X-Forwarded-For", "81.2.69.160")]).await;
    let lines = |name: &str| std::fs::read_to_string(edge.path(name)).unwrap_or_default();
    edge.until("the first line", |_| lines("first.log").contains('\n')).await;
    let line: serde_json::Value = serde_json::from_str(lines("first.log").trim()).unwrap();
    for (key, value) in [
        ("client", "81.2.69.160"),
        ("country", "GB"),
        ("method", "GET"),
        ("host", "localhost"),
        ("path", "/a"),
        ("route", "all"),
        ("region", "a"),
    ] {
        assert_eq!(line[key], value, "{key}");
    }
    assert_eq!((line["status"].as_u64(), line["bytes"].as_u64()), (Some(200), Some(1)));
    assert_eq!(line["attempts"][0]["outcome"], "ok");
    assert_eq!(line["attempts"][0]["region"], "a");
    assert_eq!(line["attempts"][0]["upstream"], origin.url());
    assert!(line["attempts"][0]["ms"].as_f64().unwrap() <= line["total_ms"].as_f64().unwrap());
    assert!(humantime::parse_rfc3339(line["time"].as_str().unwrap()).is_ok());
    assert_eq!(line["request_id"].as_str().unwrap().len(), 32);
    edge.replace(&format!("access_log: {{ path: second.log }}\n{}", to(&origin)));
    edge.until("the second configuration", |s| s.reload.lock().generation == 2).await;
    edge.get("/b", &[]).await;
    edge.until("the second file", |_| lines("second.log").contains("/b")).await;
    assert!(!lines("first.log").contains("/b"));
    // Whoever rotates the log renames it and asks for a reload.
    std::fs::rename(edge.path("second.log"), edge.path("second.log.1")).unwrap();
    assert_eq!(edge.admin("POST", "/reload").await.status, 200);
    edge.get("/c", &[]).await;
    edge.until("the new file", |_| lines("second.log").contains("/c")).await;
    // A place that cannot be opened is refused before anything changes.
    edge.replace(&format!("access_log: {{ path: nowhere/third.log }}\n{}", to(&origin)));
    edge.reloader.reload("test").await.unwrap_err();
    assert_eq!(edge.state.reload.lock().generation, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_resolved() {
    let origin = Origin::always(ok("named")).await;
    let port = origin.address.port();
    let edge = Portolan::start(&format!(
        "regions: {{ gone: {{ upstreams: [\"http://no-such-host.invalid:80\"] }}, here: {{ upstreams: [\"http://localhost:{port}\"] }} }}
routes: [{{ steering: {{ default: gone, failover: [here] }} }}]\n"
    ))
    .await;
    // `localhost` may have two addresses, of which only one listens.
    for _ in 0..10 {
        let answer = edge.get("/", &[]).await;
        assert_eq!((answer.text().as_str(), answer.region()), ("named", "here"), "an unresolved region is skipped");
    }
}
