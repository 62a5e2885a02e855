//! The functions: what they take, what they give, and how.

mod data;
mod text;

use std::borrow::Cow;
use std::fmt;

use ring::hmac;

use super::pattern::{Regex, Replacement, Wildcard};
use super::value::Type::{self, Bytes, Int};
use super::value::Value;
use super::view::View;

/// A function.
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// Its parameters; the last stands for any that follow if `variadic`.
    pub parameters: &'static [Parameter],
    /// How many arguments it needs.
    pub least: usize,
    /// May the last parameter be repeated?
    pub variadic: bool,
    /// What it gives.
    pub returns: Returns,
    /// Does it do without arguments that are missing? Else it is missing with them.
    pub skips_missing: bool,
    /// Does it always give something if nothing is missing?
    pub total: bool,
    /// Makes of literal arguments what would take time for each request.
    pub prepare: fn(&[Argument<'static>], usize) -> Result<Prepared, Misfit>,
    /// Runs it.
    pub run: for<'v> fn(&mut [Argument<'v>], &'v Prepared, Option<&'v View<'_>>) -> Option<Value<'v>>,
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// An argument that does not fit, by its position, and why.
pub type Misfit = (usize, String);

/// An argument; `None` is missing.
pub type Argument<'v> = Option<Value<'v>>;

/// What a function gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Returns {
    /// This type.
    Type(Type),
    /// The type of its first argument.
    First,
}

/// A parameter.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Types it may have.
    pub types: &'static [Type],
    /// Where it may come from.
    pub from: From,
}

/// Where an argument may come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// A field or a function.
    Field,
    /// It has to be written out.
    Literal,
    /// Either.
    Either,
}

/// What was made of literal arguments.
#[derive(Debug)]
pub enum Prepared {
    /// Nothing.
    Nothing,
    /// A regular expression and what replaces it.
    Regex(Regex, Replacement),
    /// A pattern and what replaces it.
    Wildcard(Wildcard, Replacement),
    /// A key.
    Hmac(Box<hmac::Key>),
}

const fn parameter(types: &'static [Type], from: From) -> Parameter {
    Parameter { types, from }
}

const TEXT: Parameter = parameter(&[Bytes], From::Field);
const ANY_TEXT: Parameter = parameter(&[Bytes], From::Either);
const LITERAL: Parameter = parameter(&[Bytes], From::Literal);
const NUMBER: Parameter = parameter(&[Int], From::Literal);
const ANY_NUMBER: Parameter = parameter(&[Int], From::Either);

fn nothing(_: &[Option<Value<'static>>], _: usize) -> Result<Prepared, (usize, String)> {
    Ok(Prepared::Nothing)
}

const BASE: Function = Function {
    name: "",
    parameters: &[],
    least: 1,
    variadic: false,
    returns: Returns::Type(Bytes),
    skips_missing: false,
    total: true,
    prepare: nothing,
    run: |_, _, _| None,
};

/// Every function.
pub fn all() -> impl Iterator<Item = &'static Function> {
    text::FUNCTIONS.iter().chain(&data::FUNCTIONS)
}

/// A function by its name. `any` and `all` are the checker's.
pub fn find(name: &str) -> Option<&'static Function> {
    all().find(|f| f.name == name)
}

fn owned(bytes: Vec<u8>) -> Value<'static> {
    Value::Bytes(Cow::Owned(bytes))
}

fn bytes<'a>(args: &'a [Option<Value<'_>>], at: usize) -> Option<&'a [u8]> {
    match args.get(at)? {
        Some(Value::Bytes(text)) => Some(text),
        _ => None,
    }
}

fn int(args: &[Option<Value<'_>>], at: usize) -> Option<i64> {
    match args.get(at)? {
        Some(Value::Int(number)) => Some(*number),
        _ => None,
    }
}

fn take<'v>(args: &mut [Option<Value<'v>>], at: usize) -> Option<Cow<'v, [u8]>> {
    match args.get_mut(at)?.take()? {
        Value::Bytes(text) => Some(text),
        _ => None,
    }
}

fn flags(args: &[Option<Value<'_>>], at: usize, known: &[u8]) -> Result<Prepared, (usize, String)> {
    match bytes(args, at) {
        Some(flags) if !flags.iter().all(|f| known.contains(f)) => {
            let known: Vec<_> = known.iter().map(|f| format!("`{}`", char::from(*f))).collect();
            Err((at, format!("the flags are {}", known.join(" and "))))
        }
        _ => Ok(Prepared::Nothing),
    }
}
