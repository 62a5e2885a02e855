//! The dashboard and the alert rules: promtool likes them, and a real Prometheus that scrapes Portolan answers them.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::harness::*;

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboards")
}

fn promtool(arguments: &[&str]) -> Output {
    Command::new("promtool").args(arguments).current_dir(folder()).output().expect("promtool is missing: run `make test-deps`")
}

#[test]
fn alert_rules_fire_when_they_should_and_not_else() {
    let mut tests = BTreeSet::new();
    for file in std::fs::read_dir(folder()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()) {
        if file.ends_with(".test.yaml") {
            tests.insert(file);
        }
    }
    assert!(!tests.is_empty());
    let checked = promtool(&["check", "rules", "portolan-alerts.yaml"]);
    assert!(checked.status.success(), "{}{}", String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    for test in tests {
        let tested = promtool(&["test", "rules", &test]);
        assert!(
            tested.status.success(),
            "{test}: {}{}",
            String::from_utf8_lossy(&tested.stdout),
            String::from_utf8_lossy(&tested.stderr)
        );
    }
}

/// Every expression of the dashboard, with its panel's title; variables stand for everything.
fn expressions(value: &Value, title: &str, all: &mut Vec<(String, String)>) {
    let title = value.get("title").and_then(Value::as_str).unwrap_or(title);
    if let Some(expression) = value.get("expr").and_then(Value::as_str) {
        let mut expression = expression.to_owned();
        for (variable, stands_for) in [
            ("$__rate_interval", "5s"),
            ("$__interval", "5s"),
            ("$__range", "1m"),
            ("$job", ".*"),
            ("$instance", ".*"),
            ("$route", ".*"),
        ] {
            expression = expression.replace(variable, stands_for);
        }
        assert!(!expression.contains('$'), "{title}: a variable that this test does not know: {expression}");
        all.push((title.to_owned(), expression));
    }
    let children: Vec<&Value> = match value {
        Value::Object(object) => object.values().collect(),
        Value::Array(array) => array.iter().collect(),
        _ => Vec::new(),
    };
    children.into_iter().for_each(|child| expressions(child, title, all));
}

struct Prometheus {
    _running: Helper,
    address: std::net::SocketAddr,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    async fn start(edge: &Portolan) -> Self {
        let (dir, address) = (tempfile::tempdir().unwrap(), refused());
        let rules = folder().join("portolan-alerts.yaml");
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [\"{}\"]\nscrape_configs: [{{ job_name: portolan, static_configs: [{{ targets: [\"{}\"] }}] }}]\n",
            rules.display(),
            edge.admin
        );
        std::fs::write(dir.path().join("prometheus.yml"), config).unwrap();
        let running = Command::new("prometheus")
            .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus is missing: run `make test-deps`");
        listening(address).await;
        Self { _running: Helper(running), address, _dir: dir }
    }

    async fn get(&self, path: &str) -> Value {
        let got = send(self.address, "GET", path, &[], b"").await;
        serde_json::from_str(&got.text()).unwrap_or(Value::Null)
    }

    async fn query(&self, expression: &str) -> Value {
        let expression: String = url::form_urlencoded::byte_serialize(expression.as_bytes()).collect();
        self.get(&format!("/api/v1/query?query={expression}")).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_loads_and_answers_them() {
    let text = std::fs::read_to_string(folder().join("portolan.json")).unwrap();
    let mut all = Vec::new();
    expressions(&serde_json::from_str(&text).unwrap(), "", &mut all);
    assert!(all.len() > 40, "{}", all.len());

    let (a, bad) = (Origin::always(ok("a")).await, refused());
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }}, b: {{ upstreams: [\"http://{bad}\"] }} }}
routes: [{{ name: all, hosts: [shop.example], cache: {{ enabled: true }}, steering: {{ default: b, failover: [a] }} }}]
waf: {{ rules: [{{ id: no, expression: 'http.request.uri.path eq \"/no\"', action: block }}] }}
limits: [{{ id: few, requests: 1000, period: 60s }}]
",
        a.url()
    ))
    .await;
    let prometheus = Prometheus::start(&edge).await;
    let load = async {
        loop {
            for path in ["/", "/no"] {
                edge.get(path, &[("Host", "shop.example")]).await;
            }
            // A rate needs two scrapes in which there was something.
            let found = prometheus.query("sum(rate(portolan_requests_total[5s])) > 0").await;
            if found.pointer("/data/result/0").is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(PATIENCE, load).await.expect("Prometheus never had a rate");

    let mut silent = Vec::new();
    for (title, expression) in &all {
        let answer = prometheus.query(expression).await;
        assert_eq!(answer["status"], "success", "{title}: {expression}: {answer}");
        if answer.pointer("/data/result/0").is_none() && answer.pointer("/data/resultType") != Some(&"scalar".into()) {
            silent.push(title.clone());
        }
    }
    // What has no occasion here: TLS, DNS, a cluster and the like.
    assert!(silent.len() * 3 < all.len(), "{} of {} panels are empty: {silent:?}", silent.len(), all.len());

    let rules = async {
        loop {
            let told = prometheus.get("/api/v1/rules").await;
            let rules: Vec<_> = told["data"]["groups"]
                .as_array()
                .into_iter()
                .flatten()
                .flat_map(|g| g["rules"].as_array().unwrap())
                .cloned()
                .collect();
            if !rules.is_empty() && rules.iter().all(|rule| rule["health"] == "ok") {
                return rules;
            }
            assert!(rules.iter().all(|rule| rule["health"] != "err"), "{rules:#?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let rules = tokio::time::timeout(PATIENCE, rules).await.expect("the rules were never evaluated");
    let unhealthy = rules.iter().find(|rule| rule["name"] == "PortolanRegionUnhealthy").unwrap();
    assert_ne!(unhealthy["state"], "inactive", "b does not answer: {unhealthy}");
}
