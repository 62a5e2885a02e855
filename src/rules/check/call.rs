//! Calls of functions: their arguments, what is prepared of them, and what is settled before any request.

use super::{Checker, Reached, Result, literal};
use crate::config::problem::nearest;
use crate::rules::error::ExprError;
use crate::rules::fields;
use crate::rules::functions::{self, From, Function, Prepared, Returns};
use crate::rules::program::{Each, Node, Test, TextTest};
use crate::rules::tree::{Access, Argument, Base, Expr, Literal, Span};
use crate::rules::value::{Type, Value, integer};
use crate::rules::view::View;

impl Checker<'_> {
    pub(super) fn call(&mut self, name: &str, span: &Span, arguments: &[Argument]) -> Result<Reached> {
        let Some(function) = functions::find(name) else {
            let error = ExprError::new(span.clone(), format!("unknown function `{name}`"));
            let names = functions::all().map(|f| f.name);
            return Err(match nearest(name, names) {
                _ if fields::find(name).is_some() => error.hint("this is a field, and takes no arguments"),
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error,
            });
        };
        let most = if function.variadic { usize::MAX } else { function.parameters.len() };
        if arguments.len() < function.least || arguments.len() > most {
            let message = match (function.least, most) {
                (least, usize::MAX) => format!("arguments: `{name}` takes at least {least}, found {}", arguments.len()),
                (least, most) if least == most => format!("arguments: `{name}` takes {least}, found {}", arguments.len()),
                (least, most) => format!("arguments: `{name}` takes {least} to {most}, found {}", arguments.len()),
            };
            return Err(ExprError::new(span.clone(), message));
        }
        let mut nodes = Vec::with_capacity(arguments.len());
        let mut mapped = None;
        let mut first_type = Type::Bytes;
        for (n, argument) in arguments.iter().enumerate() {
            let Some(parameter) = function.parameters.get(n).or(function.parameters.last()) else { continue };
            let (node, of, span) = self.argument(argument, n == 0, &mut mapped, parameter.types)?;
            let is_literal = matches!(argument, Argument::Literal(..));
            let misplaced = match parameter.from {
                From::Field => is_literal.then_some("a field or a function"),
                From::Literal => (!is_literal).then_some("a literal"),
                From::Either => None,
            };
            if let Some(wanted) = misplaced {
                return Err(ExprError::new(span, format!("arguments: `{name}` needs {wanted} here")));
            }
            // What one argument has to be may depend on the first.
            let like_first = match (n, function.name, first_type) {
                (0, ..) => None,
                (_, "has_value", Type::Array(element)) => Some(*element),
                (..) => Some(first_type).filter(|_| function.returns == Returns::First),
            };
            if !parameter.types.contains(&of) || like_first.is_some_and(|wanted| wanted != of) {
                let wanted: Vec<_> = match like_first {
                    None => parameter.types.iter().map(ToString::to_string).collect(),
                    Some(wanted) => vec![wanted.to_string()],
                };
                let error = ExprError::new(span, format!("arguments: `{name}` needs {} here, found {of}", wanted.join(" or ")));
                return Err(match of {
                    Type::Int | Type::Bool | Type::Ip if wanted.iter().any(|w| w == "String") => {
                        error.hint("`to_string()` makes a text of it")
                    }
                    _ => error,
                });
            }
            if n == 0 {
                first_type = of;
            }
            nodes.push(node);
        }
        if name == "is_timed_hmac_valid_v0"
            && let Some(Argument::Literal(_, key)) = arguments.first()
            && !self.hidden.contains(key)
        {
            self.hidden.push(key.clone());
            self.hidden.sort_by_key(|key| key.start);
        }
        self.particular(function, arguments, span)?;
        let of = match function.returns {
            Returns::Type(of) => of,
            Returns::First => first_type,
        };
        let prepared = self.prepare(function, &nodes, arguments)?;
        let mut nodes = nodes;
        if function.name == "any" || function.name == "all" {
            let Some(array) = nodes.pop() else { return Err(ExprError::new(span.clone(), "arguments: one is needed")) };
            let test = if function.name == "any" { Test::Any(array) } else { Test::All(array) };
            return Ok(Reached::One(Node::Truth(Box::new(test)), Type::Bool));
        }
        let constant = nodes.iter().all(|n| known(n).is_some());
        if constant {
            let mut values: Vec<_> = nodes.iter().map(known).collect();
            if let Some(Value::Bytes(text)) = (function.run)(&mut values, &prepared, None) {
                return Ok(Reached::One(literal(text.into_owned()), of));
            }
        }
        let call = simpler(function.name, &mut nodes).unwrap_or_else(|| Node::Call(function, nodes.into(), prepared));
        match mapped {
            None => Ok(Reached::One(call, of)),
            Some(source) => match of.array() {
                Some(array) => Ok(Reached::One(Node::Each(Box::new(Each { source, body: call, empty: false })), array)),
                None => Err(ExprError::new(span.clone(), format!("type: there are no arrays of {of}"))),
            },
        }
    }

    /// One argument: what gives it, its type, and where it stands. The first may be taken of each element.
    fn argument(
        &mut self,
        argument: &Argument,
        first: bool,
        mapped: &mut Option<Node>,
        types: &[Type],
    ) -> Result<(Node, Type, Span)> {
        match argument {
            Argument::Literal(Literal::Text(bytes), span) => Ok((literal(bytes.clone()), Type::Bytes, span.clone())),
            Argument::Literal(Literal::Word(word), span) => match integer(word) {
                Some(number) => Ok((Node::Literal(Value::Int(number)), Type::Int, span.clone())),
                None => Err(ExprError::new(span.clone(), format!("expected a number or a string, found `{word}`"))),
            },
            Argument::Expr(Expr::Test(access, None), span) => {
                let reached = self.access(access)?;
                self.keep_operand(access);
                match reached {
                    Reached::One(node, of) => Ok((node, of, span.clone())),
                    Reached::Each { source, body, of } if types.contains(&of) && first => {
                        *mapped = Some(source);
                        Ok((body, of, span.clone()))
                    }
                    Reached::Each { .. } if !first => {
                        Err(ExprError::new(span.clone(), "arguments: `[*]` may stand in the first one only"))
                    }
                    Reached::Each { body, of, .. } => Ok((body, of, span.clone())),
                }
            }
            Argument::Expr(expr, span) => {
                let (node, of) = self.expr(expr, span)?;
                Ok((node, of, span.clone()))
            }
        }
    }

    /// What no table of parameters can say.
    fn particular(&self, function: &Function, arguments: &[Argument], span: &Span) -> Result<()> {
        if function.name == "remove_query_args" {
            let query = |access: &Access| {
                access.steps.is_empty()
                    && matches!(&access.base, Base::Field(name, _) if name.ends_with("http.request.uri.query"))
            };
            if !matches!(arguments.first(), Some(Argument::Expr(Expr::Test(access, None), _)) if query(access)) {
                let error = ExprError::new(span.clone(), "arguments: `remove_query_args` takes a query first");
                return Err(error.hint("`http.request.uri.query` or `raw.http.request.uri.query`"));
            }
        }
        Ok(())
    }

    fn prepare(&self, function: &Function, nodes: &[Node], arguments: &[Argument]) -> Result<Prepared> {
        let literals: Vec<_> = nodes.iter().map(known).collect();
        (function.prepare)(&literals, self.scope.limits.regex).map_err(|(n, message)| {
            let span = match arguments.get(n) {
                Some(Argument::Literal(_, span) | Argument::Expr(_, span)) => span.clone(),
                None => 0..0,
            };
            ExprError::new(span, format!("arguments: {message}"))
        })
    }
}

/// What a node is known to be before there is a request.
fn known(node: &Node) -> Option<Value<'static>> {
    match node {
        Node::Literal(value) => Some(value.clone()),
        _ => None,
    }
}

/// The same as a call, where there is something quicker.
fn simpler(name: &str, nodes: &mut Vec<Node>) -> Option<Node> {
    match (name, nodes.as_slice()) {
        ("lower", [Node::Field(field)]) if View::has_lower(*field) => Some(Node::Lower(*field)),
        ("starts_with" | "ends_with", [_, Node::Literal(Value::Bytes(text))]) => {
            let text = text.to_vec().into();
            let test = if name == "starts_with" { TextTest::Prefix(text) } else { TextTest::Suffix(text) };
            let node = nodes.drain(..).next()?;
            Some(Node::Truth(Box::new(Test::Text(node, test))))
        }
        _ => None,
    }
}
