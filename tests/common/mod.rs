//! What several test programs share.

use std::path::Path;
use std::sync::Arc;

use portolan::config::problem::Source;
use portolan::config::tree::{Node, Value};

/// A file of a table, read as JSON.
pub fn table(file: &Path) -> serde_json::Value {
    let source = Source { path: file.to_owned(), text: std::fs::read_to_string(file).unwrap() };
    json(&Node::parse(&Arc::new(source)).unwrap())
}

/// A table as JSON, to be read by serde.
fn json(node: &Node) -> serde_json::Value {
    use serde_json::Value as Json;
    match &node.value {
        Value::Null => Json::Null,
        Value::Bool(value) => Json::Bool(*value),
        Value::Number(number) => Json::Number(number.clone()),
        Value::Text(text) => Json::String(text.value.clone()),
        Value::List(items) => items.iter().map(json).collect(),
        Value::Map(entries) => entries.iter().map(|e| (e.key.clone(), json(&e.node))).collect(),
    }
}
