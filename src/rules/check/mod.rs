//! From [`Expr`] to what can run: names are resolved, types agree, patterns are compiled, what is always the
//! same is settled.

mod call;
mod compare;
mod scalar;

use std::borrow::Cow;
use std::sync::Arc;

use http::HeaderName;

use super::Limits;
use super::error::ExprError;
use super::fields::{self, Field, Phase, needs};
use super::functions;
use super::program::{Each, Node, Test};
use super::syntax;
use super::tree::{Access, Argument, Base, Comparison, Expr, Literal, Logic, Span, Step};
use super::value::{TRUTHS, Type, Value};
use crate::config::problem::nearest;
use crate::config::tree::Secrets;
use crate::lists::Lists;

pub use scalar::Scalar;

type Result<T> = std::result::Result<T, ExprError>;

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
        let mut checker = Checker::new(trimmed, scope);
        let test = checker.truth(&expr, &(0..trimmed.len())).map_err(shift)?;
        let source = checker.shown(0..trimmed.len()).into();
        let Checker { uses, operands, notes, .. } = checker;
        let notes = notes.into_iter().map(shift).collect();
        Ok(Self { source, test, operands: operands.into(), uses: Uses(uses), notes })
    }

    /// As it was written, without what was hidden.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Hides what nobody may see wherever the expression is shown.
    pub fn hide(&mut self, secrets: &Secrets) {
        self.source = secrets.hide(&self.source).into();
        for operand in &mut self.operands {
            operand.text = secrets.hide(&operand.text).into();
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
        let mut checker = Checker::new(source, scope);
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
    /// Keys that stand in the source.
    hidden: Vec<Span>,
    /// Operands are not kept: this is about one of them.
    quiet: bool,
}

impl<'a> Checker<'a> {
    fn new(source: &'a str, scope: Scope<'a>) -> Self {
        Self { source, scope, uses: 0, operands: Vec::new(), notes: Vec::new(), hidden: Vec::new(), quiet: false }
    }

    /// A part of the source, without the keys in it.
    fn shown(&self, span: Span) -> String {
        let mut text = String::new();
        let mut at = span.start;
        for key in self.hidden.iter().filter(|key| span.start <= key.start && key.end <= span.end) {
            text.push_str(self.source.get(at..key.start).unwrap_or_default());
            text.push('…');
            at = key.end;
        }
        text.push_str(self.source.get(at..span.end).unwrap_or_default());
        text
    }
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
        if self.quiet || matches!(&access.base, Base::Call(name, ..) if name == "any" || name == "all") {
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
        let mut quiet = Checker { quiet: true, ..Checker::new(self.source, self.scope) };
        let Ok(Reached::One(node, _)) = quiet.access(&whole) else { return };
        let text = self.shown(access.span.start..end);
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
            let wrong = |what: &str| {
                Err(ExprError::new(span.clone(), format!("type: {what} is taken of an array or map, and this is of type {of}")))
            };
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
                _ if functions::find(name).is_some() => {
                    error.hint(format!("`{name}` is a function: its arguments stand in `()`"))
                }
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
}

/// `[*]` of a node that has elements of type `of`.
fn each(node: Node, of: Type, source: Option<Node>) -> Reached {
    match (node, source) {
        // The elements of an array that is made from another are made one by one, if none can be missing.
        (Node::Each(inner), None)
            if matches!(&inner.body, Node::Call(function, arguments, _)
                if function.total && arguments.iter().all(|a| matches!(a, Node::Item | Node::Literal(_)))) =>
        {
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
