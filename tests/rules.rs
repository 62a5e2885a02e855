//! Runs the tables in tests/rules: expressions, requests, and what must come of them.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends where it cannot go on")]

use std::path::Path;

use portolan::lists::Lists;
use portolan::rules::{ExprError, Filter, Limits, Phase, Scope};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
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

fn holds(filter: &Filter, request: serde_json::Map<String, serde_json::Value>) -> bool {
    view::with_view(request, "http://example.com/", |view| filter.matches(view))
}

#[test]
fn tables() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rules");
    let (mut cases, mut wrong) = (0, Vec::new());
    for file in std::fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path()) {
        let table = common::table(&file);
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
                _ => unreachable!("{place}: either `is` or `error`"),
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {cases}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(cases > 400);
}

/// Whatever is written, it is compiled or refused with a place in it, and never more than that.
#[test]
fn nothing_breaks_the_compiler() {
    let seeds = seeds();
    let mut runner = TestRunner::deterministic();
    let piece = prop_oneof![
        prop::sample::select(seeds.clone()),
        "\\PC{0,12}",
        prop::sample::select(vec![
            "(", ")", "not ", " and ", "[*]", "\"", "\\", "{", "}", "..", "r#\"", "$", "\u{0}", "é", "/", "in ", "\n"
        ])
        .prop_map(str::to_owned),
    ];
    let cut = (piece.clone(), piece.clone(), piece, 0usize..200, 0usize..200);
    for _ in 0..3_000 {
        let (a, b, c, from, to) = cut.new_tree(&mut runner).unwrap().current();
        let mut text = a;
        let (from, to) = (text.floor_char_boundary(from.min(to)), text.floor_char_boundary(from.max(to)));
        text.replace_range(from.min(text.len())..to.min(text.len()), &b);
        text.push_str(&c);
        match compile(&text) {
            Ok(filter) => drop(holds(&filter, serde_json::Map::new())),
            Err(error) => {
                assert!(error.span.start <= text.len(), "{text:?}: {error:?}");
                assert!(!error.draw(&text).is_empty());
            }
        }
    }
    // Neither does what is long or deep.
    for text in [
        "(".repeat(4_000),
        "!".repeat(4_000),
        "ssl and ".repeat(500),
        "lower(".repeat(600),
        format!("ssl{}", "[0]".repeat(1_300)),
    ] {
        assert!(compile(&text).is_err());
    }
}

/// Every expression of the tables.
fn seeds() -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rules");
    let files = std::fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path());
    let tables = files.map(|file| common::table(&file));
    tables.flat_map(|t| t.as_array().unwrap().clone()).map(|case| case["expression"].as_str().unwrap().to_owned()).collect()
}

mod common;
mod reference;
#[path = "common/view.rs"]
mod view;
