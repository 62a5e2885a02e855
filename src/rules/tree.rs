//! An expression as it was written.

use std::ops::Range;

/// Bytes of the source.
pub type Span = Range<usize>;

/// A logical expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// `a and b and …`, in one of three kinds.
    Logic(Logic, Vec<Expr>),
    /// `not a`.
    Not(Box<Expr>),
    /// A value, or a value compared.
    Test(Access, Option<Comparison>),
}

/// How truths are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logic {
    /// Every.
    And,
    /// An odd number.
    Xor,
    /// At least one.
    Or,
}

/// A field or a function's result, and which part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// What is accessed.
    pub base: Base,
    /// Which part.
    pub steps: Vec<(Step, Span)>,
    /// Where it stands.
    pub span: Span,
}

/// What is accessed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// A field.
    Field(String, Span),
    /// A function's result.
    Call(String, Span, Vec<Argument>),
}

/// One step into an array or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// `[0]`.
    Index(usize),
    /// `["key"]`.
    Key(Vec<u8>),
    /// `[*]`: each element.
    Each,
}

/// An argument of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument {
    /// A literal.
    Literal(Literal, Span),
    /// Anything else.
    Expr(Expr, Span),
}

/// `op literal`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// How it is compared.
    pub op: Op,
    /// Where that stands.
    pub op_span: Span,
    /// What with.
    pub right: Right,
    /// Where that stands.
    pub right_span: Span,
}

/// How a value is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// By their order.
    Order(Order),
    /// `contains`
    Contains,
    /// `matches`, `~`
    Matches,
    /// `wildcard`
    Wildcard,
    /// `strict wildcard`
    StrictWildcard,
    /// `in`
    In,
    /// `bitwise_and`, `&`
    BitwiseAnd,
}

/// Which way two values have to be ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `eq`, `==`
    Equal,
    /// `ne`, `!=`
    NotEqual,
    /// `lt`, `<`
    Less,
    /// `le`, `<=`
    LessEqual,
    /// `gt`, `>`
    Greater,
    /// `ge`, `>=`
    GreaterEqual,
}

/// What a value is compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Right {
    /// One literal.
    One(Literal),
    /// `{…}`.
    Set(Vec<(Literal, Span)>),
    /// `$name`.
    List(String),
}

/// A literal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Literal {
    /// A quoted or raw string.
    Text(Vec<u8>),
    /// Anything else: a number, an address, a range, bytes; what it is depends on what it is compared with.
    Word(String),
}
