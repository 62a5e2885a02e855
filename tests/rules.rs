//! Runs the tables in tests/rules: expressions, requests, and what must come of them.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where it cannot go on")]

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use portolan::client::place::Databases;
use portolan::client::standing::Standing;
use portolan::config::tree::Node;
use portolan::explain::{Asked as Request, Question};
use portolan::lists::Lists;
use portolan::request::Moment;
use portolan::rules::view::{Asker, Target};
use portolan::rules::{ExprError, Filter, Limits, Phase, Scope, View};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    expression: String,
    #[serde(default)]
    request: serde_json::Map<String, serde_json::Value>,
    is: Option<bool>,
    error: Option<String>,
}

fn compile(expression: &str) -> Result<Filter, ExprError> {
    Filter::new(expression, Scope { phase: Phase::Body, lists: &Lists::default(), limits: Limits::default() })
}

fn holds(filter: &Filter, mut request: serde_json::Map<String, serde_json::Value>) -> bool {
    request.entry("ip").or_insert("192.0.2.1".into());
    request.entry("url").or_insert("http://example.com/".into());
    let question: Question = serde_json::from_value(request.into()).unwrap();
    let ip: IpAddr = question.ip;
    let asked = Request::new(&question).unwrap();
    let facts = asked.facts(ip, 64 << 10);
    let (databases, lists, standing) = (Databases::default(), Lists::default(), Standing::default());
    let place = databases.lookup(ip);
    let asker = Asker {
        ip,
        trusted_peer: false,
        place: &place,
        databases: &databases,
        lists: &lists,
        standing: &standing,
        now: Moment::default(),
    };
    let target = Target::new(&facts);
    filter.matches(&View::new(&facts, &target, asker))
}

#[test]
fn tables() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rules");
    let (mut cases, mut wrong) = (0, Vec::new());
    for file in std::fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path()) {
        let text = std::fs::read_to_string(&file).unwrap();
        let source = portolan::config::problem::Source { path: file.clone(), text };
        let table = common::json(&Node::parse(&Arc::new(source)).unwrap());
        for (n, case) in table.as_array().unwrap().iter().enumerate() {
            let Case { expression, request, is, error } = serde_json::from_value(case.clone()).unwrap();
            let place = format!("{} #{n}: {expression}", file.file_name().unwrap().to_string_lossy());
            cases += 1;
            match (compile(&expression), is, error) {
                (Ok(filter), Some(is), None) => {
                    let got = std::panic::catch_unwind(|| holds(&filter, request));
                    if got.as_ref().ok() != Some(&is) {
                        wrong.push(format!("{place}\n    is {is}, got {got:?}"));
                    }
                }
                (Err(error), None, Some(hint)) => {
                    if !error.draw(&expression).contains(&hint) {
                        wrong.push(format!("{place}\n    error {hint}, got {}", error.draw(&expression)));
                    }
                }
                (Ok(_), None, Some(hint)) => wrong.push(format!("{place}\n    must be refused: {hint}")),
                (Err(error), Some(_), None) => wrong.push(format!("{place}\n    {}", error.draw(&expression))),
                _ => panic!("{place}: either `is` or `error`"),
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {cases}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(cases > 400);
}

mod common;
