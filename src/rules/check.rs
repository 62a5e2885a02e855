//! From [`Expr`] to what can run: names are resolved, types agree, patterns are compiled, what is always the
//! same is settled.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderName;
use ipnet::IpNet;
use memchr::memmem::Finder;

use super::Limits;
use super::error::ExprError;
use super::fields::{self, Field, Phase, needs};
use super::functions::{self, From, Function, Prepared, Returns};
use super::pattern::{Regex, Wildcard};
use super::program::{Each, IntTest, IpTest, Node, Order, Test, TextTest};
use super::syntax;
use super::tree::{Access, Argument, Base, Comparison, Expr, Literal, Logic, Op, Right, Span, Step};
use super::value::{TRUTHS, Type, Value, integer};
use super::view::View;
use crate::config::problem::nearest;
use crate::lists::ranges::{IpRange, Sorted};
use crate::lists::{Entries, Lists};

type Result<T> = std::result::Result<T, ExprError>;

/// Sets of at most this many texts are searched one after the other; that is faster than hashing.
const FEW: usize = 8;

/// What an expression may refer to.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// When it runs.
    pub phase: Phase,
    /// Named lists.
    pub lists: &'a Lists,
    /// How much is allowed.
    pub limits: Limits,
}

/// What an expression needs beyond the request's header: bits of [`needs`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Uses(pub u8);

impl Uses {
    /// The request's body?
    pub fn body(self) -> bool {
        self.0 & needs::BODY != 0
    }

    /// What the client did lately?
    pub fn standing(self) -> bool {
        self.0 & needs::STANDING != 0
    }
}

/// A value that a filter compares, kept for explanations.
#[derive(Debug)]
pub(super) struct Operand {
    /// As it was written.
    pub text: Box<str>,
    /// What gives it.
    pub node: Node,
    /// It may hold what no log should: cookies, headers, queries, bodies.
    pub private: bool,
}

/// An expression that is true or false.
#[derive(Debug)]
pub struct Filter {
    source: Arc<str>,
    pub(super) test: Test,
    pub(super) operands: Box<[Operand]>,
    uses: Uses,
    notes: Vec<ExprError>,
}

impl Filter {
    /// Compiles `source`.
    pub fn new(source: &str, scope: Scope<'_>) -> Result<Self> {
        let trimmed = source.trim();
        let offset = source.len() - source.trim_start().len();
        let shift = |mut error: ExprError| {
            error.span = error.span.start + offset..error.span.end + offset;
            error
        };
        let expr = syntax::parse(trimmed, &scope.limits).map_err(shift)?;
        let mut checker = Checker { source: trimmed, scope, uses: 0, operands: Vec::new(), notes: Vec::new() };
        let test = checker.truth(&expr, &(0..trimmed.len())).map_err(shift)?;
        let Checker { uses, operands, notes, .. } = checker;
        let notes = notes.into_iter().map(shift).collect();
        Ok(Self { source: trimmed.into(), test, operands: operands.into(), uses: Uses(uses), notes })
    }

    /// As it was written, without what was hidden.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Hides what nobody may see wherever the expression is shown.
    pub fn hide(&mut self, secrets: &[String]) {
        for secret in secrets.iter().filter(|s| !s.is_empty()) {
            self.source = self.source.replace(secret.as_str(), "…").into();
            for operand in &mut self.operands {
                operand.text = operand.text.replace(secret.as_str(), "…").into();
            }
        }
    }

    /// What it needs.
    pub fn uses(&self) -> Uses {
        self.uses
    }

    /// What can run, but is hardly meant.
    pub fn notes(&self) -> &[ExprError] {
        &self.notes
    }

    /// Is it so for this request?
    pub fn matches(&self, view: &super::View<'_>) -> bool {
        self.test.holds(view, None)
    }
}

/// An expression that gives a text.
#[derive(Debug)]
pub struct Template {
    node: Node,
    uses: Uses,
}

impl Template {
    /// Compiles `source`.
    pub fn new(source: &str, scope: Scope<'_>) -> Result<Self> {
        let argument = syntax::parse_argument(source, &scope.limits)?;
        let mut checker = Checker { source, scope, uses: 0, operands: Vec::new(), notes: Vec::new() };
        let (node, of) = match &argument {
            Argument::Literal(Literal::Text(bytes), _) => (literal(bytes.clone()), Type::Bytes),
            Argument::Literal(Literal::Word(word), span) => {
                return Err(ExprError::new(span.clone(), format!("expected a text, found `{word}`")));
            }
            Argument::Expr(expr, span) => checker.expr(expr, span)?,
        };
        if of != Type::Bytes {
            let error = ExprError::new(0..source.len(), format!("this is of type {of}, and a text is needed"));
            return Err(error.hint("`to_string()` makes texts of numbers, addresses and truths"));
        }
        Ok(Self { node, uses: Uses(checker.uses) })
    }

    /// A text that is always the same.
    pub fn fixed(text: &str) -> Self {
        Self { node: literal(text.as_bytes().to_vec()), uses: Uses::default() }
    }

    /// What it needs.
    pub fn uses(&self) -> Uses {
        self.uses
    }

    /// The text for this request; nothing if a part of it is missing.
    pub fn render<'v>(&'v self, view: &'v super::View<'_>) -> Option<Cow<'v, [u8]>> {
        match self.node.value(view, None)? {
            Value::Bytes(text) => Some(text),
            _ => None,
        }
    }
}

fn literal(bytes: Vec<u8>) -> Node {
    Node::Literal(Value::Bytes(Cow::Owned(bytes)))
}

/// A comparison whose left side is still to come.
enum Compare {
    Int(IntTest),
    Ip(IpTest),
    Text(TextTest),
}

impl Compare {
    fn test(self, node: Node) -> Test {
        match self {
            Self::Int(IntTest::In(set)) if set.is_empty() => Test::Const(false),
            Self::Ip(IpTest::In(set)) if set.is_empty() => Test::Const(false),
            Self::Text(TextTest::Few(texts)) if texts.is_empty() => Test::Const(false),
            Self::Int(test) => Test::Int(node, test),
            Self::Ip(test) => Test::Ip(node, test),
            Self::Text(test) => Test::Text(node, test),
        }
    }
}

/// What an access came to: one value, or something for each element of an array.
enum Reached {
    One(Node, Type),
    Each { source: Node, body: Node, of: Type },
}

struct Checker<'a> {
    source: &'a str,
    scope: Scope<'a>,
    uses: u8,
    operands: Vec<Operand>,
    notes: Vec<ExprError>,
}

impl Checker<'_> {
    fn truth(&mut self, expr: &Expr, span: &Span) -> Result<Test> {
        let (node, of) = self.expr(expr, span)?;
        match of {
            Type::Bool => Ok(test(node)),
            Type::Array(Type::Bool) => {
                let error = ExprError::new(span.clone(), "this is one truth for each element, and one truth is needed");
                Err(error.hint("put it into `any(…)` or `all(…)`"))
            }
            _ => match expr {
                Expr::Test(access, None) => {
                    let message = format!("expected an operator behind this value of type {of}");
                    Err(ExprError::new(access.span.clone(), message).hint("such as `eq`, `contains` or `in`"))
                }
                _ => Err(ExprError::new(span.clone(), format!("expected a truth, and this is of type {of}"))),
            },
        }
    }

    /// Its value and type; truths are of type Boolean, or arrays of it.
    fn expr(&mut self, expr: &Expr, span: &Span) -> Result<(Node, Type)> {
        match expr {
            Expr::Logic(logic, items) => {
                let mut checked = Vec::with_capacity(items.len());
                for item in items {
                    let span = span_of(item).unwrap_or(span.clone());
                    let (node, of) = self.expr(item, &span)?;
                    if !matches!(of, Type::Bool | Type::Array(Type::Bool)) {
                        self.truth(item, &span)?;
                    }
                    if let Some((_, first)) = checked.first().filter(|(_, first)| *first != of) {
                        let message = format!("type: this is of type {of}, and what it is joined with of type {first}");
                        return Err(ExprError::new(span, message).hint("`any(…)` and `all(…)` make one truth of an array"));
                    }
                    checked.push((node, of));
                }
                let of = checked.first().map_or(Type::Bool, |(_, of)| *of);
                let nodes = checked.into_iter().map(|(node, _)| node);
                Ok(match of {
                    Type::Bool => (Node::Truth(Box::new(joined(*logic, nodes.map(test).collect()))), of),
                    _ => (Node::Zip(*logic, nodes.collect()), of),
                })
            }
            Expr::Not(inner) => {
                let span = span_of(inner).unwrap_or(span.clone());
                let (node, of) = self.expr(inner, &span)?;
                match of {
                    Type::Array(Type::Bool) => Ok((Node::Opposites(Box::new(node)), of)),
                    _ => Ok((
                        Node::Truth(Box::new(match if of == Type::Bool { test(node) } else { self.truth(inner, &span)? } {
                            Test::Const(value) => Test::Const(!value),
                            Test::Not(inner) => *inner,
                            other => Test::Not(Box::new(other)),
                        })),
                        Type::Bool,
                    )),
                }
            }
            Expr::Test(access, comparison) => self.comparison(access, comparison.as_ref()),
        }
    }

    fn comparison(&mut self, access: &Access, comparison: Option<&Comparison>) -> Result<(Node, Type)> {
        let reached = self.access(access)?;
        self.keep_operand(access);
        let Some(comparison) = comparison else {
            return match reached {
                Reached::One(node, of) => Ok((node, of)),
                Reached::Each { source, body, of } => match of.array() {
                    Some(array) => Ok((Node::Each(Box::new(Each { source, body, empty: true })), array)),
                    None => Err(ExprError::new(access.span.clone(), format!("there are no arrays of {of}"))),
                },
            };
        };
        match reached {
            Reached::One(node, of) => {
                let compare = self.compare(access, of, comparison)?;
                Ok((Node::Truth(Box::new(compare.test(node))), Type::Bool))
            }
            Reached::Each { source, body, of } => {
                let compare = self.compare(access, of, comparison)?;
                let body = Node::Truth(Box::new(compare.test(body)));
                Ok((Node::Each(Box::new(Each { source, body, empty: true })), TRUTHS))
            }
        }
    }

    /// A second copy of what is compared, without the last step to each element, for whoever asks why.
    fn keep_operand(&mut self, access: &Access) {
        // Their arguments were kept when they were checked.
        if matches!(&access.base, Base::Call(name, ..) if name == "any" || name == "all") {
            return;
        }
        let mut whole = access.clone();
        while matches!(whole.steps.last(), Some((Step::Each, _))) {
            whole.steps.pop();
        }
        let end = whole.steps.last().map_or_else(
            || match &whole.base {
                Base::Field(_, span) => span.end,
                Base::Call(..) if access.steps.is_empty() => access.span.end,
                Base::Call(..) => access.steps.first().map_or(access.span.end, |(_, span)| span.start),
            },
            |(_, span)| span.end,
        );
        let mut quiet = Checker { source: self.source, scope: self.scope, uses: 0, operands: Vec::new(), notes: Vec::new() };
        let Ok(Reached::One(node, _)) = quiet.access(&whole) else { return };
        let mut text = self.source.get(access.span.start..end).unwrap_or_default().to_owned();
        if let Base::Call(name, _, arguments) = &whole.base
            && name == "is_timed_hmac_valid_v0"
            && let Some(Argument::Literal(_, key)) = arguments.first()
        {
            // The key is a secret.
            let key = key.start.saturating_sub(access.span.start)..key.end.saturating_sub(access.span.start);
            if text.is_char_boundary(key.start) && text.is_char_boundary(key.end) && key.end <= text.len() {
                text.replace_range(key, "…");
            }
        }
        if self.operands.iter().all(|o| *o.text != *text) {
            let private = is_private(&whole);
            self.operands.push(Operand { text: text.into(), node, private });
        }
    }

    fn access(&mut self, access: &Access) -> Result<Reached> {
        let mut reached = match &access.base {
            Base::Field(name, span) => {
                let (field, of) = self.field(name, span)?;
                Reached::One(Node::Field(field), of)
            }
            Base::Call(name, span, arguments) => self.call(name, span, arguments)?,
        };
        for (step, span) in &access.steps {
            let (node, of, source) = match reached {
                Reached::One(node, of) => (node, of, None),
                Reached::Each { source, body, of } => (body, of, Some(source)),
            };
            let wrong = |what: &str| Err(ExprError::new(span.clone(), format!("type: {what} is taken of an array or map, and this is of type {of}")));
            let (node, of) = match (step, of) {
                (Step::Index(index), Type::Array(of)) => match node {
                    Node::Header(name) if *index == 0 => (Node::FirstHeader(name), *of),
                    node => (Node::Index(Box::new(node), *index), *of),
                },
                (Step::Key(key), Type::Map(of)) => (self.key(node, key, span), *of),
                (Step::Each, Type::Array(of)) => {
                    reached = each(node, *of, source);
                    continue;
                }
                (Step::Each, Type::Map(of)) => {
                    reached = each(Node::Arrays(Box::new(node)), *of, source);
                    continue;
                }
                (Step::Index(_), Type::Map(_)) => return wrong("a number is taken of an array; a key"),
                (Step::Key(_), Type::Array(_)) => return wrong("a key is taken of a map; a number"),
                (Step::Index(_), _) => return wrong("an element"),
                (Step::Key(_), _) => return wrong("a key"),
                (Step::Each, _) => return wrong("`[*]`"),
            };
            reached = match source {
                None => Reached::One(node, of),
                Some(source) => Reached::Each { source, body: node, of },
            };
        }
        Ok(reached)
    }

    fn key(&mut self, of: Node, key: &[u8], span: &Span) -> Node {
        if let Node::Field(Field::Headers | Field::ResponseHeaders) = of
            && key.iter().any(u8::is_ascii_uppercase)
        {
            let note = ExprError::new(span.clone(), "names of headers are in lower case here, so this is never there");
            self.notes.push(note.hint(format!("write \"{}\"", String::from_utf8_lossy(key).to_ascii_lowercase())));
        } else if let Node::Field(Field::Headers) = of
            && let Ok(name) = HeaderName::from_bytes(key)
        {
            return Node::Header(name);
        }
        Node::Key(Box::new(of), key.into())
    }

    fn field(&mut self, name: &str, span: &Span) -> Result<(Field, Type)> {
        let Some((field, of, phase, needs)) = fields::find(name) else {
            let error = ExprError::new(span.clone(), format!("unknown field `{name}`"));
            return Err(match name {
                "true" | "false" => error.hint("there are no such words: write the field alone, or `not` before it"),
                _ if functions::find(name).is_some() => error.hint(format!("`{name}` is a function: its arguments stand in `()`")),
                _ if fields::is_elsewhere(name) => error.hint("this field of Cloudflare's is not in this version"),
                _ => match nearest(name, fields::names()) {
                    Some(near) => error.hint(format!("did you mean `{near}`?")),
                    None => error,
                },
            });
        };
        if phase > self.scope.phase {
            let known = match phase {
                Phase::Request => "from the beginning",
                Phase::Routed => "only once the route is chosen",
                Phase::Body => "only to the rules of `waf`",
                Phase::Response => "only once there is a response",
            };
            let message = format!("`{name}` is known {known}, and this runs before");
            return Err(ExprError::new(span.clone(), message));
        }
        if needs & needs::BODY != 0 && self.scope.phase > Phase::Body {
            return Err(ExprError::new(span.clone(), format!("`{name}` is gone by the time there is a response")));
        }
        self.uses |= needs;
        Ok((field, of))
    }

    fn call(&mut self, name: &str, span: &Span, arguments: &[Argument]) -> Result<Reached> {
        let Some(function) = functions::find(name) else {
            let error = ExprError::new(span.clone(), format!("unknown function `{name}`"));
            let names = functions::FUNCTIONS.iter().map(|f| f.name);
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
                    Type::Int | Type::Bool | Type::Ip if wanted.iter().any(|w| w == "String") => error.hint("`to_string()` makes a text of it"),
                    _ => error,
                });
            }
            if n == 0 {
                first_type = of;
            }
            nodes.push(node);
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
                access.steps.is_empty() && matches!(&access.base, Base::Field(name, _) if name.ends_with("http.request.uri.query"))
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

    fn compare(&mut self, access: &Access, of: Type, comparison: &Comparison) -> Result<Compare> {
        let Comparison { op, op_span, right, right_span } = comparison;
        let order = match op {
            Op::Equal => Some(Order::Equal),
            Op::NotEqual => Some(Order::NotEqual),
            Op::Less => Some(Order::Less),
            Op::LessEqual => Some(Order::LessEqual),
            Op::Greater => Some(Order::Greater),
            Op::GreaterEqual => Some(Order::GreaterEqual),
            Op::Contains | Op::Matches | Op::Wildcard | Op::StrictWildcard | Op::In | Op::BitwiseAnd => None,
        };
        let written = || self.source.get(op_span.clone()).unwrap_or_default();
        match (of, op, right) {
            (Type::Int, Op::In, Right::Set(items)) => self.ints(items).map(IntTest::In).map(Compare::Int),
            (Type::Ip, Op::In, Right::Set(items)) => self.ips(items),
            (Type::Bytes, Op::In, Right::Set(items)) => self.texts(items),
            (Type::Int | Type::Ip | Type::Bytes, Op::In, Right::List(name)) => self.list(of, name, right_span),
            (Type::Int, Op::BitwiseAnd, Right::One(literal)) => self.int(literal, right_span).map(IntTest::Bits).map(Compare::Int),
            (Type::Int, _, Right::One(literal)) if order.is_some() => {
                Ok(Compare::Int(IntTest::Order(order.unwrap_or(Order::Equal), self.int(literal, right_span)?)))
            }
            (Type::Ip, _, Right::One(literal)) if order.is_some() => {
                Ok(Compare::Ip(IpTest::Order(order.unwrap_or(Order::Equal), self.ip(literal, right_span)?)))
            }
            (Type::Bytes, Op::Contains, Right::One(literal)) => {
                let bytes = self.bytes(literal, right_span)?;
                Ok(Compare::Text(TextTest::Contains(Box::new(Finder::new(&bytes).into_owned()))))
            }
            (Type::Bytes, Op::Matches, Right::One(Literal::Text(bytes))) => {
                let wrong = |message: String| ExprError::new(right_span.clone(), format!("regular expression: {message}"));
                let text = std::str::from_utf8(bytes).map_err(|_| wrong("it is not UTF-8".to_owned()))?;
                Regex::new(text, self.scope.limits.regex).map(|r| Compare::Text(TextTest::Matches(r))).map_err(wrong)
            }
            (Type::Bytes, Op::Wildcard | Op::StrictWildcard, Right::One(Literal::Text(bytes))) => {
                let wildcard = Wildcard::new(bytes, *op == Op::StrictWildcard);
                wildcard.map(|w| Compare::Text(TextTest::Wildcard(w))).map_err(|m| ExprError::new(right_span.clone(), format!("wildcard: {m}")))
            }
            (Type::Bytes, Op::Matches | Op::Wildcard | Op::StrictWildcard, Right::One(_)) => {
                Err(ExprError::new(right_span.clone(), "expected a string in quotes"))
            }
            (Type::Bytes, _, Right::One(literal)) if order.is_some() => {
                Ok(Compare::Text(TextTest::Order(order.unwrap_or(Order::Equal), self.bytes(literal, right_span)?.into())))
            }
            (Type::Bool, ..) => {
                let error = ExprError::new(op_span.clone(), "type: a truth is compared with nothing");
                let name = self.source.get(access.span.clone()).unwrap_or_default();
                Err(error.hint(format!("write `{name}` or `not {name}`")))
            }
            (Type::Array(_) | Type::Map(_), ..) => {
                let error = ExprError::new(access.span.clone(), format!("type: this is of type {of}, and one value is needed"));
                Err(error.hint("take one by `[0]` or `[\"key\"]`, or ask `any(…[*] …)`"))
            }
            _ => Err(ExprError::new(op_span.clone(), format!("type: `{}` does not go with {of}", written()))),
        }
    }

    fn int(&self, literal: &Literal, span: &Span) -> Result<i64> {
        match literal {
            Literal::Word(word) => integer(word).ok_or_else(|| {
                ExprError::new(span.clone(), format!("type: expected an Integer of 64 bits, found `{word}`"))
            }),
            Literal::Text(_) => Err(ExprError::new(span.clone(), "type: expected an Integer, found a string")),
        }
    }

    fn ip(&self, literal: &Literal, span: &Span) -> Result<IpAddr> {
        match literal {
            Literal::Word(word) => word.parse().map_err(|_| {
                let error = ExprError::new(span.clone(), format!("type: expected an IP address, found `{word}`"));
                match word.contains('/') {
                    true => error.hint(format!("networks stand in a set: `in {{{word}}}`")),
                    false => error,
                }
            }),
            Literal::Text(_) => {
                let error = ExprError::new(span.clone(), "type: expected an IP address, found a string");
                Err(error.hint("addresses are not quoted"))
            }
        }
    }

    fn bytes(&self, literal: &Literal, span: &Span) -> Result<Vec<u8>> {
        match literal {
            Literal::Text(bytes) => Ok(bytes.clone()),
            Literal::Word(word) => byte_string(word).ok_or_else(|| {
                let error = ExprError::new(span.clone(), format!("type: expected a String, found `{word}`"));
                match fields::find(word).is_some() {
                    true => error.hint("a field is compared with what is written out, not with another field"),
                    false => error.hint("strings are quoted by `\"`"),
                }
            }),
        }
    }

    fn ints(&self, items: &[(Literal, Span)]) -> Result<Sorted<i64>> {
        let mut ranges = Vec::with_capacity(items.len());
        for (literal, span) in items {
            let range = match literal {
                Literal::Word(word) => word.split_once(".."),
                Literal::Text(_) => None,
            };
            ranges.push(match range {
                Some((first, last)) => {
                    let bound = |text: &str| self.int(&Literal::Word(text.to_owned()), span);
                    let (first, last) = (bound(first)?, bound(last)?);
                    if first > last {
                        return Err(ExprError::new(span.clone(), "range: it ends before it begins"));
                    }
                    (first, last)
                }
                None => {
                    let number = self.int(literal, span)?;
                    (number, number)
                }
            });
        }
        Ok(Sorted::new(ranges))
    }

    fn ips(&self, items: &[(Literal, Span)]) -> Result<Compare> {
        let mut ranges = Vec::with_capacity(items.len());
        for (literal, span) in items {
            let word = match literal {
                Literal::Word(word) => word.as_str(),
                Literal::Text(_) => "",
            };
            let wrong = |message: &str| ExprError::new(span.clone(), message);
            ranges.push(match (word.split_once(".."), word.contains('/')) {
                (Some((first, last)), _) => {
                    let bound = |text: &str| self.ip(&Literal::Word(text.to_owned()), span);
                    let (first, last) = (bound(first)?, bound(last)?);
                    IpRange::new(first, last).ok_or_else(|| match first.is_ipv4() == last.is_ipv4() {
                        true => wrong("range: it ends before it begins"),
                        false => wrong("range: its ends are of two families"),
                    })?
                }
                (None, true) => {
                    let net = network(word).ok_or_else(|| wrong("type: expected an IP network such as `192.0.2.0/24`"))?;
                    if net.trunc() != net {
                        return Err(wrong("host bits are set in this network").hint(format!("write `{}`", net.trunc())));
                    }
                    net.into()
                }
                (None, false) => self.ip(literal, span)?.into(),
            });
        }
        Ok(Compare::Ip(IpTest::In(ranges.into_iter().collect())))
    }

    fn texts(&self, items: &[(Literal, Span)]) -> Result<Compare> {
        let mut texts = Vec::with_capacity(items.len());
        for (literal, span) in items {
            texts.push(self.bytes(literal, span)?.into_boxed_slice());
        }
        Ok(match texts.len() {
            ..=FEW => Compare::Text(TextTest::Few(texts.into())),
            _ => Compare::Text(TextTest::Many(texts.into_iter().collect())),
        })
    }

    fn list(&self, of: Type, name: &str, span: &Span) -> Result<Compare> {
        let Some(list) = self.scope.lists.get(name) else {
            let error = ExprError::new(span.clone(), format!("unknown list `${name}`"));
            let names = || self.scope.lists.0.iter().map(|l| &*l.name);
            return Err(match nearest(name, names()) {
                Some(near) => error.hint(format!("did you mean `${near}`?")),
                None => error.hint("lists are defined under `lists`"),
            });
        };
        match (&list.entries, of) {
            (Entries::Ip(_), Type::Ip) => Ok(Compare::Ip(IpTest::List(list.clone()))),
            (Entries::Asn(_), Type::Int) => Ok(Compare::Int(IntTest::List(list.clone()))),
            (Entries::Country(_) | Entries::Host(_), Type::Bytes) => Ok(Compare::Text(TextTest::List(list.clone()))),
            (entries, _) => {
                let message = format!("type: `${name}` is a list of {}, and this is of type {of}", entries.kind());
                Err(ExprError::new(span.clone(), message))
            }
        }
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

/// `[*]` of a node that has elements of type `of`.
fn each(node: Node, of: Type, source: Option<Node>) -> Reached {
    match (node, source) {
        // The elements of an array that is made from another are made one by one, if none can be missing.
        (Node::Each(inner), None) if matches!(&inner.body, Node::Call(function, ..) if function.total && !function.skips_missing) => {
            let Each { source, body, empty: _ } = *inner;
            Reached::Each { source, body, of }
        }
        (node, None) => Reached::Each { source: node, body: Node::Item, of },
        // Arrays in arrays are one array.
        (body, Some(source)) => {
            let arrays = Node::Each(Box::new(Each { source, body, empty: true }));
            Reached::Each { source: Node::Flat(Box::new(arrays)), body: Node::Item, of }
        }
    }
}

fn test(node: Node) -> Test {
    match node {
        Node::Truth(test) => *test,
        other => Test::Is(other),
    }
}

/// Joins truths; what is always the same is settled.
fn joined(logic: Logic, tests: Vec<Test>) -> Test {
    let settled = |test: &Test, value: bool| matches!(test, Test::Const(v) if *v == value);
    match logic {
        Logic::And if tests.iter().any(|t| settled(t, false)) => Test::Const(false),
        Logic::Or if tests.iter().any(|t| settled(t, true)) => Test::Const(true),
        Logic::And => Test::And(tests.into_iter().filter(|t| !settled(t, true)).collect()),
        Logic::Or => Test::Or(tests.into_iter().filter(|t| !settled(t, false)).collect()),
        Logic::Xor => Test::Xor(tests.into()),
    }
}

/// A network; of IPv4 the octets that are all zero may be left out (`10/8`).
fn network(word: &str) -> Option<IpNet> {
    let (address, bits) = word.split_once('/')?;
    let octets = address.split('.').count();
    match address.contains(':') || octets > 4 {
        true => word.parse().ok(),
        false => format!("{address}{}/{bits}", ".0".repeat(4 - octets)).parse().ok(),
    }
}

/// Two hexadecimal digits a byte, at least two bytes, between them `:`, `-` or `.`.
fn byte_string(word: &str) -> Option<Vec<u8>> {
    let parts: Vec<&str> = word.split([':', '-', '.']).collect();
    let byte = |part: &&str| match part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => u8::from_str_radix(part, 16).ok(),
        false => None,
    };
    (parts.len() > 1).then(|| parts.iter().map(byte).collect())?
}

fn span_of(expr: &Expr) -> Option<Span> {
    match expr {
        Expr::Test(access, comparison) => {
            Some(access.span.start..comparison.as_ref().map_or(access.span.end, |c| c.right_span.end))
        }
        Expr::Not(inner) => span_of(inner),
        Expr::Logic(_, items) => Some(span_of(items.first()?)?.start..span_of(items.last()?)?.end),
    }
}

/// May what this accesses hold what no log should?
fn is_private(access: &Access) -> bool {
    const OPEN: [&str; 8] = [
        "http.host",
        "http.request.method",
        "http.request.version",
        "http.request.uri.path",
        "http.request.uri.path.extension",
        "http.user_agent",
        "http.request.accepted_languages",
        "http.request.body.size",
    ];
    match &access.base {
        Base::Field(name, _) => !OPEN.contains(&name.as_str()) && ["http.", "raw."].iter().any(|p| name.starts_with(p)),
        Base::Call(_, _, arguments) => arguments.iter().any(|argument| match argument {
            Argument::Literal(..) => false,
            Argument::Expr(expr, _) => is_private_expr(expr),
        }),
    }
}

fn is_private_expr(expr: &Expr) -> bool {
    match expr {
        Expr::Test(access, _) => is_private(access),
        Expr::Not(inner) => is_private_expr(inner),
        Expr::Logic(_, items) => items.iter().any(is_private_expr),
    }
}
