//! Runs the tables in tests/decisions: a configuration, and questions with what must come of them.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::net::IpAddr;
use std::path::Path;

use portolan::config::Paths;
use portolan::explain::{Question, explain};
use portolan::memory::Memory;
use portolan::reload::{Known, build};
use portolan::request::Moment;
use portolan::signing::Key;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    config: serde_json::Value,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    ip: IpAddr,
    #[serde(default)]
    method: Option<String>,
    url: String,
    #[serde(default)]
    headers: Vec<(String, String)>,
    #[serde(default)]
    down: Vec<String>,
    client: Option<IpAddr>,
    country: Option<String>,
    route: Option<String>,
    order: Option<Vec<String>>,
    attempts: Option<Vec<String>>,
    answer: Option<String>,
    status: Option<u16>,
}

#[test]
fn tables() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/decisions");
    let mut cases = 0;
    for file in std::fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path()) {
        cases += run(&file, &dir);
    }
    assert!(cases > 10);
}

fn run(file: &Path, dir: &Path) -> usize {
    let table: Table = serde_json::from_value(common::table(file)).unwrap();
    let config = tempfile::NamedTempFile::new_in(dir.parent().unwrap().join("config")).unwrap();
    std::fs::write(config.path(), table.config.to_string()).unwrap();
    let paths = Paths { file: config.path().to_owned(), environment: None };
    let built = build(&paths, &Known::default(), &Memory::new(Key::new(b"test"))).unwrap();
    for case in &table.cases {
        let question = Question {
            ip: case.ip,
            method: case.method.clone().unwrap_or("GET".to_owned()),
            url: case.url.clone(),
            headers: case.headers.clone(),
            body: None,
            down: case.down.clone(),
            response: None,
        };
        let got = explain(&built.snapshot, &question, Moment::default()).unwrap();
        let name = &case.name;
        if let Some(client) = case.client {
            assert_eq!(got.client.ip, client, "{name}");
        }
        if let Some(country) = &case.country {
            assert_eq!(got.country.code, *country, "{name}");
        }
        if let Some(route) = &case.route {
            assert_eq!(got.route.as_ref().map(|r| &r.name), Some(route), "{name}");
        }
        if let Some(order) = &case.order {
            assert_eq!(got.regions.iter().map(|r| r.name.clone()).collect::<Vec<_>>(), *order, "{name}");
        }
        if let Some(attempts) = &case.attempts {
            let seen: Vec<_> = got.attempts.iter().map(|a| format!("{} {}", a.region, a.outcome)).collect();
            assert_eq!(seen, *attempts, "{name}");
        }
        if case.answer.is_some() || case.status.is_some() {
            assert_eq!((&got.answer.region, got.answer.status), (&case.answer, case.status), "{name}");
        }
    }
    table.cases.len()
}

mod common;
