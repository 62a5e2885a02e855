//! Bad files, and what is said of them; the shipped files, and that they are good and current.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::Path;
use std::process::{Command, Output};

fn portolan(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_portolan"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("PORTOLAN_TEST_SECRET", "hunter2")
        .env_remove("PORTOLAN_NOT_SET")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn bad_files_are_told_all_at_once() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config");
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.ends_with(".yaml"))
        .collect();
    names.sort();
    for name in names {
        let output = portolan(&["check", "--config", &format!("tests/config/{name}")]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert_eq!(text(&output.stdout), "", "{name}");
        let said = text(&output.stderr);
        assert!(!said.contains("hunter2"), "a secret was printed: {said}");
        insta::assert_snapshot!(name, said);
    }
}

#[test]
fn shipped_files_are_good() {
    for file in ["config/portolan.yaml", "config/demo.yaml"] {
        let output = portolan(&["check", "--strict", "--config", file]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout).lines().count(), 1, "one line on success");
        assert_eq!(text(&output.stderr), "");
    }
}

/// `config/portolan.yaml` shows every key: a key of the schema that it lacks was forgotten there.
#[test]
fn the_annotated_file_shows_every_key() {
    let annotated = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/portolan.yaml")).unwrap();
    let schema = portolan::config::schema();
    let mut keys = Vec::new();
    collect(&schema, &mut keys);
    assert!(keys.len() > 25, "{keys:?}");
    for key in keys {
        assert!(annotated.contains(&format!("{key}:")), "config/portolan.yaml does not show `{key}`");
    }
}

fn collect(schema: &serde_json::Value, keys: &mut Vec<String>) {
    if let Some(properties) = schema.get("properties").and_then(|p| p.as_object()) {
        keys.extend(properties.keys().cloned());
    }
    for child in schema.as_object().into_iter().flat_map(|o| o.values()) {
        collect(child, keys);
    }
}

#[test]
fn the_shipped_schema_is_current() {
    let shipped = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/portolan.schema.json")).unwrap();
    let current = text(&portolan(&["schema"]).stdout);
    assert!(shipped == current, "run `cargo run -- schema > config/portolan.schema.json`");
}

#[test]
fn warnings_pass_unless_strict() {
    let dir = tempfile::TempDir::new().unwrap();
    let file = dir.path().join("p.yaml");
    std::fs::write(&file, "regions: { a: { upstreams: [http://127.0.0.1:1] } }\nroutes: [{}]\n").unwrap();
    let file = file.display().to_string();
    let lenient = portolan(&["check", "--config", &file]);
    assert_eq!(lenient.status.code(), Some(0));
    assert!(text(&lenient.stderr).contains("every client's country is `XX`"));
    assert_eq!(portolan(&["check", "--strict", "--config", &file]).status.code(), Some(1));
}

#[test]
fn an_overlay_is_merged_over_the_file() {
    let dir = tempfile::TempDir::new().unwrap();
    let base = "client: { country_database: GEO }
regions: { a: { upstreams: [http://127.0.0.1:1] }, b: { upstreams: [http://127.0.0.1:2] } }
routes: [{ name: base, steering: { default: a } }]
";
    let geo = format!("{}/geoip/country.mmdb", env!("CARGO_MANIFEST_DIR"));
    let file = dir.path().join("portolan.yaml");
    std::fs::write(&file, base.replace("GEO", &geo)).unwrap();
    std::fs::write(
        dir.path().join("portolan.production.yaml"),
        "regions: { a: { upstreams: [http://127.0.0.9:9] }, b: null }\nclient: { trusted_proxies: [10.0.0.0/8] }\n",
    )
    .unwrap();
    std::fs::write(dir.path().join("portolan.broken.yaml"), "regions: { a: { upstream: [] } }\n").unwrap();
    let file = file.display().to_string();
    let explain = |env: &[&str]| {
        let mut arguments =
            vec!["explain", "--config", &file, "--ip", "10.1.2.3", "-H", "X-Forwarded-For: 81.2.69.160", "--json"];
        arguments.extend(env);
        arguments.push("http://x/");
        let output = portolan(&arguments);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)))
    };
    let plain = explain(&[]);
    assert_eq!(
        (plain["regions"][0]["upstreams"][0]["url"].as_str(), plain["client"]["ip"].as_str()),
        (Some("http://127.0.0.1:1"), Some("10.1.2.3"))
    );
    let production = explain(&["--env", "production"]);
    assert_eq!(
        (
            production["regions"][0]["upstreams"][0]["url"].as_str(),
            production["client"]["ip"].as_str(),
            production["country"]["code"].as_str()
        ),
        (Some("http://127.0.0.9:9"), Some("81.2.69.160"), Some("GB")),
        "what the overlay does not say stays"
    );
    let broken = portolan(&["check", "--config", &file, "--env", "broken"]);
    assert!(text(&broken.stderr).contains("portolan.broken.yaml:1:17"), "{}", text(&broken.stderr));
    let missing = portolan(&["check", "--config", &file, "--env", "nowhere"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).contains("portolan.nowhere.yaml"), "{}", text(&missing.stderr));
}

#[test]
fn usage_errors_are_the_users() {
    for (arguments, code) in [
        (&["--help"][..], 0),
        (&["--version"], 0),
        (&[], 1),
        (&["nonsense"], 1),
        (&["explain", "--ip", "not-an-ip", "/"], 1),
        (&["explain", "--config", "config/demo.yaml", "--ip", "8.8.8.8", "--down", "mars", "/"], 1),
        (&["explain", "--config", "config/demo.yaml", "--ip", "8.8.8.8", "-H", "no colon", "/"], 1),
        (&["run", "--config", "no-such-file.yaml"], 1),
    ] {
        assert_eq!(portolan(arguments).status.code(), Some(code), "{arguments:?}");
    }
}

/// A dry run of rules, from JSON lines and from a browser's archive.
#[test]
fn rules_are_tried_out() {
    let dir = tempfile::TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let config = write(
        "p.yaml",
        "regions: { a: { upstreams: [http://127.0.0.1:1] } }
routes: [{ hosts: [a.example] }]
redirects: [{ expression: 'http.request.uri.path eq \"/old\"', to: /new, status: 301 }]
waf:
  rules:
    - { id: office, expression: 'http.request.uri.path contains \"/admin\" and not ip.src in {192.0.2.0/24}', action: block }
    - { id: secret, expression: 'http.request.body.raw contains \"evil\"', action: js_challenge }
  managed: { enabled: true }
",
    );
    let lines = write(
        "requests.jsonl",
        "{\"url\": \"http://a.example/x/../admin\", \"ip\": \"198.51.100.1\"}
{\"url\": \"http://a.example/admin\"}

{\"url\": \"http://a.example/\", \"method\": \"POST\", \"body\": \"an evil thing\"}
{\"url\": \"http://a.example/old\"}
{\"url\": \"http://b.example/\"}
{\"url\": \"http://a.example/?f=../../etc/passwd\"}
",
    );
    let test =
        |file: &str, more: &[&str]| portolan(&[&["rules", "test", "--config", &config, "--requests", file], more].concat());
    let output = test(&lines, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    insta::assert_snapshot!("rules_test", text(&output.stdout));
    let har = write(
        "a.har",
        r#"{"log": {"entries": [
            {"request": {"method": "POST", "url": "http://a.example/", "headers": [{"name": ":path", "value": "/"}, {"name": "Accept", "value": "*/*"}],
                         "postData": {"text": "evil"}}},
            {"request": {"method": "GET", "url": "http://a.example/admin", "headers": []}}]}}"#,
    );
    let output = test(&har, &["--json", "--ip", "198.51.100.7"]);
    let said: Vec<serde_json::Value> = text(&output.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let outcomes: Vec<_> = said.iter().map(|l| l["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["js_challenge 403", "block 403"]);
    assert_eq!(said[1]["matches"][0]["saw"]["ip.src"], "198.51.100.7");
    let broken = write("broken.jsonl", "{\"url\": \"/\"}\n{\"url\": 7}\n");
    let output = test(&broken, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("broken.jsonl:2:"), "{}", text(&output.stderr));
    assert_eq!(test("no-such-file", &[]).status.code(), Some(1));
    let list = portolan(&["rules", "list"]);
    assert!(text(&list.stdout).lines().count() > 80 && text(&list.stdout).contains("sqli-libinjection"));
}

/// What was expanded into rules and transforms is in no explanation.
#[test]
fn explanations_keep_secrets() {
    let dir = tempfile::TempDir::new().unwrap();
    let config = dir.path().join("p.yaml");
    std::fs::write(
        &config,
        "regions: { a: { upstreams: [http://127.0.0.1:1] } }
routes: [{ match: 'http.host ne \"${env:PORTOLAN_TEST_SECRET}\"' }]
redirects: [{ expression: 'http.request.uri.path eq \"/r\"', to: '/${env:PORTOLAN_TEST_SECRET}' }]
transforms:
  - request: { set: { X-Auth: '${env:PORTOLAN_TEST_SECRET}', X-Bearer: { expression: 'concat(\"Bearer \", \"${env:PORTOLAN_TEST_SECRET}\")' } } }
waf:
  rules:
    - { id: key, action: log, expression: 'not http.request.headers[\"x-key\"][0] eq \"${env:PORTOLAN_TEST_SECRET}\"' }
    - { id: hmac, action: log, expression: 'to_string(is_timed_hmac_valid_v0(\"inlinekey\", http.request.uri, 10, 5)) eq \"false\"' }
",
    )
    .unwrap();
    let config = config.display().to_string();
    for (path, json) in [("/", &[][..]), ("/", &["--json"]), ("/r", &[])] {
        let output = portolan(&[&["explain", "--config", &config, "--ip", "192.0.2.1", path], json].concat());
        let said = text(&output.stdout);
        assert!(output.status.success() && said.contains('…'), "{said}{}", text(&output.stderr));
        assert!(!said.contains("hunter2") && !said.contains("inlinekey"), "{said}");
    }
    let requests = dir.path().join("r.jsonl");
    std::fs::write(&requests, "{\"url\": \"/\"}\n").unwrap();
    let output = portolan(&["rules", "test", "--config", &config, "--requests", &requests.display().to_string()]);
    assert!(!text(&output.stdout).contains("hunter2") && !text(&output.stdout).contains("inlinekey"), "{}", text(&output.stdout));
}
