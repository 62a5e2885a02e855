//! Expressions that give one value, of which only the sameness counts: what limits count by.

use std::hash::Hasher;
use std::net::IpAddr;

use super::{Checker, Result, Scope, is_private_expr, literal};
use crate::rules::View;
use crate::rules::error::ExprError;
use crate::rules::program::Node;
use crate::rules::syntax;
use crate::rules::tree::{Argument, Literal};
use crate::rules::value::{Type, Value};

/// An expression that gives one value: a text, a number, an address or a truth.
#[derive(Debug)]
pub struct Scalar {
    node: Node,
    of: Type,
    private: bool,
}

impl Scalar {
    /// Compiles `source`.
    pub fn new(source: &str, scope: Scope<'_>) -> Result<Self> {
        let argument = syntax::parse_argument(source, &scope.limits)?;
        let mut checker = Checker::new(source, scope);
        let (node, of, private) = match &argument {
            Argument::Literal(Literal::Text(bytes), _) => (literal(bytes.clone()), Type::Bytes, false),
            Argument::Literal(Literal::Word(word), span) => {
                return Err(ExprError::new(span.clone(), format!("expected a field or function, found `{word}`")));
            }
            Argument::Expr(expr, span) => {
                let (node, of) = checker.expr(expr, span)?;
                (node, of, is_private_expr(expr))
            }
        };
        if matches!(of, Type::Array(_) | Type::Map(_)) {
            let error = ExprError::new(0..source.len(), format!("this is of type {of}, and one value is needed"));
            return Err(error.hint("take one of it, as in `http.request.headers[\"x-api-key\"][0]`"));
        }
        Ok(Self { node, of, private })
    }

    /// May its value be something that no log should hold?
    pub fn is_private(&self) -> bool {
        self.private
    }

    /// Does the request have it?
    pub fn is_there(&self, view: &View<'_>) -> bool {
        self.node.value(view, None).is_some()
    }

    /// Feeds the value of this request to a hasher, addresses as what `network` makes of them. A missing value is
    /// another than an empty one.
    pub fn feed(&self, view: &View<'_>, network: impl Fn(IpAddr) -> IpAddr, hasher: &mut impl Hasher) {
        match self.node.value(view, None) {
            Some(value) => feed(&value, network, hasher),
            None => hasher.write_u8(0),
        }
    }

    /// The same for a value written as [`Self::shown`] writes it; `None` if none of its type is written so.
    pub fn feed_text(&self, text: &str, network: impl Fn(IpAddr) -> IpAddr, hasher: &mut impl Hasher) -> Option<()> {
        let value = match self.of {
            _ if text == MISSING => {
                hasher.write_u8(0);
                return Some(());
            }
            Type::Ip => Value::Ip(text.split_once('/').map_or(text, |(ip, _)| ip).parse().ok()?),
            Type::Int => Value::Int(text.parse().ok()?),
            Type::Bool => Value::Bool(text.parse().ok()?),
            Type::Bytes | Type::Array(_) | Type::Map(_) => crate::rules::value::text(text.as_bytes()),
        };
        feed(&value, network, hasher);
        Some(())
    }

    /// The value of this request in words, addresses as `network` writes them.
    pub fn shown(&self, view: &View<'_>, network: impl Fn(IpAddr) -> String) -> String {
        match self.node.value(view, None) {
            None => MISSING.to_owned(),
            Some(Value::Ip(ip)) => network(ip),
            // Long enough to be told from others, short enough for a line.
            Some(Value::Bytes(text)) => text.escape_ascii().map(char::from).take(200).collect(),
            Some(other) => other.to_string(),
        }
    }
}

/// How a value that is missing is written.
const MISSING: &str = "-";

fn feed(value: &Value<'_>, network: impl Fn(IpAddr) -> IpAddr, hasher: &mut impl Hasher) {
    match value {
        Value::Ip(ip) => match network(*ip) {
            IpAddr::V4(ip) => {
                hasher.write_u8(4);
                hasher.write_u32(ip.to_bits());
            }
            IpAddr::V6(ip) => {
                hasher.write_u8(6);
                hasher.write_u128(ip.to_bits());
            }
        },
        Value::Bytes(text) => {
            hasher.write_u8(1);
            hasher.write(text);
            // With its length two texts cannot be cut elsewhere and be the same.
            hasher.write_u64(text.len() as u64);
        }
        Value::Int(number) => {
            hasher.write_u8(2);
            hasher.write_i64(*number);
        }
        Value::Bool(truth) => hasher.write_u8(if *truth { 8 } else { 7 }),
        // The checker lets none of these be one value.
        Value::Array(_) | Value::Map(_) => hasher.write_u8(0),
    }
}
