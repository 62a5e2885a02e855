//! Why a filter did or did not match: its operands with their values.

use super::View;
use super::check::Filter;

/// A value that a filter compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// As the expression writes it.
    pub operand: String,
    /// What it was; nothing if it was missing.
    pub value: Option<String>,
}

impl Filter {
    /// Every operand with its value. `in_log`: what may be private is told by its length only.
    pub fn operands(&self, view: &View<'_>, in_log: bool) -> Vec<Seen> {
        let seen = |operand: &super::check::Operand| {
            let value = operand.node.value(view, None);
            let value = match in_log && operand.private {
                true => value.map(|v| match v {
                    super::value::Value::Bytes(bytes) => format!("({} bytes)", bytes.len()),
                    super::value::Value::Array(array) => format!("({} elements)", array.len()),
                    super::value::Value::Map(_) => "(a map)".to_owned(),
                    other => other.to_string(),
                }),
                // A log has quotes of its own.
                false if in_log => value.map(|v| v.to_string().trim_matches('"').to_owned()),
                false => value.map(|v| v.to_string()),
            };
            Seen { operand: operand.text.to_string(), value }
        };
        self.operands.iter().map(seen).collect()
    }
}
