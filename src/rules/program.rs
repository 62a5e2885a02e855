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
use super::tree::{Logic, Order};
use super::value::{Array, Value};
use super::view::View;
use crate::lists::ranges::{IpSet, Sorted};
use crate::lists::{Entries, List};

/// What gives a value.
#[derive(Debug)]
pub enum Node {
    /// A field.
    Field(Field),
    /// A field in lower case.
    Lower(Field),
    /// A header of the request, by its name.
    Header(HeaderName),
    /// The first value of a header of the request.
    FirstHeader(HeaderName),
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
    /// A text compared; missing is false.
    Text(Node, TextTest),
    /// An address compared; missing is false.
    Ip(Node, IpTest),
    /// A number compared; missing is false.
    Int(Node, IntTest),
    /// At least one truth of an array.
    Any(Node),
    /// Every truth of an array, if there is one.
    All(Node),
}

/// With what a number is compared, and how.
#[derive(Debug)]
pub enum IntTest {
    /// With another.
    Order(Order, i64),
    /// Has it bits of this in common?
    Bits(i64),
    /// Is it one of these?
    In(Sorted<i64>),
    /// Is it in this list?
    List(Arc<List>),
}

/// With what an address is compared, and how.
#[derive(Debug)]
pub enum IpTest {
    /// With another.
    Order(Order, IpAddr),
    /// Is it one of these?
    In(IpSet),
    /// Is it in this list?
    List(Arc<List>),
}

/// With what a text is compared, and how.
#[derive(Debug)]
pub enum TextTest {
    /// With another, byte by byte.
    Order(Order, Box<[u8]>),
    /// Does it begin so?
    Prefix(Box<[u8]>),
    /// Does it end so?
    Suffix(Box<[u8]>),
    /// Is this a part of it?
    Contains(Box<Finder<'static>>),
    /// Does this match somewhere?
    Matches(Regex),
    /// Does this match the whole?
    Wildcard(Wildcard),
    /// Is it one of these few?
    Few(Box<[Box<[u8]>]>),
    /// Is it one of these many?
    Many(FxHashSet<Box<[u8]>>),
    /// Is it in this list?
    List(Arc<List>),
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
            // What is text or an address as it stands needs no value around it.
            Self::Text(node, compare) => match node {
                Node::Field(field) if field.is_plain() => view.text(*field).is_some_and(|text| compare.fits(text)),
                Node::Lower(field) => view.lower(*field).is_some_and(|text| compare.fits(text)),
                Node::FirstHeader(name) => view.facts.headers.get(name).is_some_and(|v| compare.fits(v.as_bytes())),
                other => matches!(other.value(view, item), Some(Value::Bytes(text)) if compare.fits(&text)),
            },
            Self::Ip(node, compare) => match node {
                Node::Field(Field::Client) => compare.fits(view.asker.ip),
                other => matches!(other.value(view, item), Some(Value::Ip(ip)) if compare.fits(ip)),
            },
            Self::Int(node, compare) => matches!(node.value(view, item), Some(Value::Int(number)) if compare.fits(number)),
            Self::Any(node) => node.truths(view, item, false) == Some(true),
            Self::All(node) => node.truths(view, item, true) == Some(true),
        }
    }
}

impl IntTest {
    fn fits(&self, number: i64) -> bool {
        match self {
            Self::Order(order, other) => order.fits(number.cmp(other)),
            Self::Bits(mask) => number & mask != 0,
            Self::In(set) => set.contains(number),
            Self::List(list) => matches!(&list.entries, Entries::Asn(set) if set.contains(number)),
        }
    }
}

impl IpTest {
    fn fits(&self, ip: IpAddr) -> bool {
        match self {
            // Of two families none is less or greater.
            Self::Order(order, other) if ip.is_ipv4() != other.is_ipv4() => *order == Order::NotEqual,
            Self::Order(order, other) => order.fits(ip.cmp(other)),
            Self::In(set) => set.contains(ip),
            Self::List(list) => matches!(&list.entries, Entries::Ip(set) if set.contains(ip)),
        }
    }
}

impl TextTest {
    fn fits(&self, text: &[u8]) -> bool {
        match self {
            Self::Order(Order::Equal, other) => text == &**other,
            Self::Order(Order::NotEqual, other) => text != &**other,
            Self::Order(order, other) => order.fits(text.cmp(other)),
            Self::Prefix(prefix) => text.starts_with(prefix),
            Self::Suffix(suffix) => text.ends_with(suffix),
            Self::Contains(finder) => finder.find(text).is_some(),
            Self::Matches(regex) => regex.matches(text),
            Self::Wildcard(wildcard) => wildcard.matches(text),
            Self::Few(texts) => texts.iter().any(|other| **other == *text),
            Self::Many(texts) => texts.contains(text),
            Self::List(list) => match &list.entries {
                Entries::Country(set) => set.contains(text),
                Entries::Host(hosts) => {
                    let name = crate::request::host_name(std::str::from_utf8(text).unwrap_or_default());
                    hosts.contains(&lower(name.as_bytes()))
                }
                Entries::Ip(_) | Entries::Asn(_) => false,
            },
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
            Self::Lower(field) => view.lower(*field).map(super::value::text),
            Self::FirstHeader(name) => view.facts.headers.get(name).map(|v| super::value::text(v.as_bytes())),
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
