//! What an expression is compiled to, and how it runs: no step waits, and the common ones allocate nothing.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderName;
use memchr::memmem::Finder;
use rustc_hash::FxHashSet;
use smallvec::SmallVec;

use super::fields::Field;
use super::functions::{Function, Prepared};
use super::pattern::{Regex, Wildcard};
use super::tree::Logic;
use super::value::{Array, Value};
use super::view::View;
use crate::lists::ranges::{IpSet, Sorted};
use crate::lists::{Entries, List};

/// What gives a value.
#[derive(Debug)]
pub enum Node {
    /// A field.
    Field(Field),
    /// A header of the request, by its name.
    Header(HeaderName),
    /// What was written.
    Literal(Value<'static>),
    /// The element that the nearest [`Node::Each`] is at.
    Item,
    /// One element of an array.
    Index(Box<Node>, usize),
    /// What stands under a key of a map.
    Key(Box<Node>, Box<[u8]>),
    /// The arrays of a map.
    Arrays(Box<Node>),
    /// The elements of an array's arrays, one after the other.
    Flat(Box<Node>),
    /// A function's result.
    Call(&'static Function, Box<[Node]>, Prepared),
    /// An array of `body` for each element of `source`.
    Each(Box<Each>),
    /// A truth.
    Truth(Box<Test>),
    /// Arrays of truths joined element by element, as long as the shortest.
    Zip(Logic, Box<[Node]>),
    /// An array of truths, each turned round.
    Opposites(Box<Node>),
}

/// An array made from another.
#[derive(Debug)]
pub struct Each {
    /// The other.
    pub source: Node,
    /// What is made of each of its elements; what is missing is left out.
    pub body: Node,
    /// Is it empty if there is no other? Else it is missing too.
    pub empty: bool,
}

/// What is true or false.
#[derive(Debug)]
pub enum Test {
    /// Always the same.
    Const(bool),
    /// A value of type Boolean; missing is false.
    Is(Node),
    /// The opposite.
    Not(Box<Test>),
    /// Every.
    And(Box<[Test]>),
    /// At least one.
    Or(Box<[Test]>),
    /// An odd number.
    Xor(Box<[Test]>),
    /// A value compared; missing is false.
    Compare(Node, Compare),
    /// At least one truth of an array.
    Any(Node),
    /// Every truth of an array, if there is one.
    All(Node),
}

/// With what a value is compared, and how.
#[derive(Debug)]
pub enum Compare {
    /// A number.
    Int(Order, i64),
    /// Bits in common.
    Bits(i64),
    /// Numbers.
    Ints(Sorted<i64>),
    /// An address.
    Ip(Order, IpAddr),
    /// Addresses.
    Ips(IpSet),
    /// A text.
    Bytes(Order, Box<[u8]>),
    /// A part of a text.
    Contains(Box<Finder<'static>>),
    /// A regular expression.
    Matches(Regex),
    /// A pattern with stars.
    Wildcard(Wildcard),
    /// A few texts, one after the other.
    Few(Box<[Box<[u8]>]>),
    /// Many texts.
    Many(FxHashSet<Box<[u8]>>),
    /// A named list.
    List(Arc<List>),
}

/// Which way two values have to be ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The same.
    Equal,
    /// Not the same.
    NotEqual,
    /// The left one is less.
    Less,
    /// It is not greater.
    LessEqual,
    /// It is greater.
    Greater,
    /// It is not less.
    GreaterEqual,
}

impl Order {
    fn fits(self, ordering: Ordering) -> bool {
        match self {
            Self::Equal => ordering.is_eq(),
            Self::NotEqual => ordering.is_ne(),
            Self::Less => ordering.is_lt(),
            Self::LessEqual => ordering.is_le(),
            Self::Greater => ordering.is_gt(),
            Self::GreaterEqual => ordering.is_ge(),
        }
    }
}

type Item<'i, 'v> = Option<&'i Value<'v>>;

impl Test {
    /// Is it so?
    pub fn holds<'v>(&'v self, view: &'v View<'_>, item: Item<'_, 'v>) -> bool {
        match self {
            Self::Const(value) => *value,
            Self::Is(node) => matches!(node.value(view, item), Some(Value::Bool(true))),
            Self::Not(test) => !test.holds(view, item),
            Self::And(tests) => tests.iter().all(|t| t.holds(view, item)),
            Self::Or(tests) => tests.iter().any(|t| t.holds(view, item)),
            Self::Xor(tests) => tests.iter().fold(false, |odd, t| odd != t.holds(view, item)),
            Self::Compare(node, compare) => match node {
                // A field's value needs no place of its own.
                Node::Field(field) => view.field(*field).is_some_and(|value| compare.fits(&value)),
                other => other.value(view, item).is_some_and(|value| compare.fits(&value)),
            },
            Self::Any(node) => node.truths(view, item, false) == Some(true),
            Self::All(node) => node.truths(view, item, true) == Some(true),
        }
    }
}

impl Compare {
    fn fits(&self, value: &Value<'_>) -> bool {
        match (self, value) {
            (Self::Int(order, other), Value::Int(value)) => order.fits(value.cmp(other)),
            (Self::Bits(mask), Value::Int(value)) => value & mask != 0,
            (Self::Ints(set), Value::Int(value)) => set.contains(*value),
            (Self::Ip(order, other), Value::Ip(value)) => match value.is_ipv4() == other.is_ipv4() {
                true => order.fits(value.cmp(other)),
                false => *order == Order::NotEqual,
            },
            (Self::Ips(set), Value::Ip(value)) => set.contains(*value),
            (Self::Bytes(order, other), Value::Bytes(value)) => match order {
                Order::Equal => **value == **other,
                Order::NotEqual => **value != **other,
                _ => order.fits((**value).cmp(other)),
            },
            (Self::Contains(finder), Value::Bytes(value)) => finder.find(value).is_some(),
            (Self::Matches(regex), Value::Bytes(value)) => regex.matches(value),
            (Self::Wildcard(wildcard), Value::Bytes(value)) => wildcard.matches(value),
            (Self::Few(texts), Value::Bytes(value)) => texts.iter().any(|text| **text == **value),
            (Self::Many(texts), Value::Bytes(value)) => texts.contains(&**value),
            (Self::List(list), value) => match (&list.entries, value) {
                (Entries::Ip(set), Value::Ip(ip)) => set.contains(*ip),
                (Entries::Asn(set), Value::Int(number)) => set.contains(*number),
                (Entries::Country(set), Value::Bytes(code)) => set.contains(&**code),
                (Entries::Host(hosts), Value::Bytes(host)) => {
                    let name = crate::request::host_name(std::str::from_utf8(host).unwrap_or_default());
                    hosts.contains(&lower(name.as_bytes()))
                }
                _ => false,
            },
            // The checker lets no other pair through.
            _ => false,
        }
    }
}

/// In ASCII lower case; borrowed if it is already.
pub fn lower(bytes: &[u8]) -> Cow<'_, [u8]> {
    match bytes.iter().any(u8::is_ascii_uppercase) {
        true => Cow::Owned(bytes.to_ascii_lowercase()),
        false => Cow::Borrowed(bytes),
    }
}

impl Node {
    /// Its value; `None` if it is missing.
    pub fn value<'v>(&'v self, view: &'v View<'_>, item: Item<'_, 'v>) -> Option<Value<'v>> {
        match self {
            Self::Field(field) => view.field(*field),
            Self::Header(name) => {
                let headers = view.facts.headers;
                headers.contains_key(name).then(|| Value::Array(Array::Header(headers, name.as_str())))
            }
            Self::Literal(value) => Some(borrowed(value)),
            Self::Item => item.cloned(),
            Self::Index(of, index) => match of.value(view, item)? {
                Value::Array(array) => array.get(*index),
                _ => None,
            },
            Self::Key(of, key) => match of.value(view, item)? {
                Value::Map(map) => map.get(key).map(Value::Array),
                _ => None,
            },
            Self::Arrays(of) => match of.value(view, item)? {
                Value::Map(map) => Some(Value::Array(map.arrays())),
                _ => None,
            },
            Self::Flat(of) => match of.value(view, item)? {
                Value::Array(array) => Some(Value::Array(flat(&array))),
                _ => None,
            },
            Self::Call(function, arguments, prepared) => {
                let mut values: SmallVec<[Option<Value<'v>>; 3]> = SmallVec::new();
                for argument in arguments {
                    let value = argument.value(view, item);
                    if value.is_none() && !function.skips_missing {
                        return None;
                    }
                    values.push(value);
                }
                (function.run)(&mut values, prepared, Some(view))
            }
            Self::Each(each) => {
                let Some(source) = each.source.value(view, item) else {
                    return each.empty.then_some(Value::Array(Array::Values(Vec::new())));
                };
                let Value::Array(source) = source else { return None };
                let mut values = Vec::with_capacity(source.len());
                source.all(|item| {
                    values.extend(each.body.value(view, Some(&item)));
                    true
                });
                Some(Value::Array(Array::Values(values)))
            }
            Self::Truth(test) => Some(Value::Bool(test.holds(view, item))),
            Self::Zip(logic, arrays) => {
                let mut joined: Option<Vec<bool>> = None;
                for array in arrays {
                    let truths = array.truth_list(view, item)?;
                    joined = Some(match joined {
                        None => truths,
                        Some(before) => before.into_iter().zip(truths).map(|(a, b)| join(*logic, a, b)).collect(),
                    });
                }
                Some(Value::Array(Array::Values(joined?.into_iter().map(Value::Bool).collect())))
            }
            Self::Opposites(array) => {
                let truths = array.truth_list(view, item)?;
                Some(Value::Array(Array::Values(truths.into_iter().map(|t| Value::Bool(!t)).collect())))
            }
        }
    }

    /// Are all truths of this array `all`, or is one that is not? `None` if the array is missing.
    fn truths<'v>(&'v self, view: &'v View<'_>, item: Item<'_, 'v>, all: bool) -> Option<bool> {
        if let Self::Each(each) = self
            && let Self::Truth(test) = &each.body
        {
            let Some(Value::Array(source)) = each.source.value(view, item) else { return each.empty.then_some(all) };
            let same = source.all(|item| test.holds(view, Some(&item)) == all);
            return Some(same == all);
        }
        let truths = self.truth_list(view, item)?;
        Some(truths.iter().all(|t| *t == all) == all)
    }

    fn truth_list<'v>(&'v self, view: &'v View<'_>, item: Item<'_, 'v>) -> Option<Vec<bool>> {
        let Value::Array(array) = self.value(view, item)? else { return None };
        let mut truths = Vec::with_capacity(array.len());
        array.all(|value| {
            truths.push(matches!(value, Value::Bool(true)));
            true
        });
        Some(truths)
    }
}

fn join(logic: Logic, a: bool, b: bool) -> bool {
    match logic {
        Logic::And => a && b,
        Logic::Or => a || b,
        Logic::Xor => a != b,
    }
}

fn borrowed<'v>(value: &'v Value<'static>) -> Value<'v> {
    match value {
        Value::Bytes(bytes) => Value::Bytes(Cow::Borrowed(bytes)),
        other => other.clone(),
    }
}

/// The elements of an array's arrays.
fn flat<'v>(array: &Array<'v>) -> Array<'v> {
    let mut all = Vec::new();
    array.all(|inner| {
        if let Value::Array(inner) = inner {
            all.extend(inner.to_vec());
        }
        true
    });
    Array::Values(all)
}
