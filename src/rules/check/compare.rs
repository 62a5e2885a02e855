//! What stands to the right of a value: literals, sets, lists and patterns.

use std::net::IpAddr;

use ipnet::IpNet;
use memchr::memmem::Finder;

use super::{Checker, Result};
use crate::config::problem::nearest;
use crate::lists::Entries;
use crate::lists::ranges::{IpRange, Sorted};
use crate::rules::error::ExprError;
use crate::rules::fields;
use crate::rules::pattern::{Regex, Wildcard};
use crate::rules::program::{IntTest, IpTest, Node, Test, TextTest};
use crate::rules::tree::{Access, Comparison, Literal, Op, Right, Span};
use crate::rules::value::{Type, integer};

/// Sets of at most this many texts are searched one after the other; that is faster than hashing.
const FEW: usize = 8;

/// A comparison whose left side is still to come.
pub(super) enum Compare {
    Int(IntTest),
    Ip(IpTest),
    Text(TextTest),
}

impl Compare {
    pub(super) fn test(self, node: Node) -> Test {
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

impl Checker<'_> {
    pub(super) fn compare(&mut self, access: &Access, of: Type, comparison: &Comparison) -> Result<Compare> {
        let Comparison { op, op_span, right, right_span } = comparison;
        let written = || self.source.get(op_span.clone()).unwrap_or_default();
        match (of, op, right) {
            (Type::Int, Op::In, Right::Set(items)) => self.ints(items).map(IntTest::In).map(Compare::Int),
            (Type::Ip, Op::In, Right::Set(items)) => self.ips(items),
            (Type::Bytes, Op::In, Right::Set(items)) => self.texts(items),
            (Type::Int | Type::Ip | Type::Bytes, Op::In, Right::List(name)) => self.list(of, name, right_span),
            (Type::Int, Op::BitwiseAnd, Right::One(literal)) => {
                self.int(literal, right_span).map(IntTest::Bits).map(Compare::Int)
            }
            (Type::Int, Op::Order(order), Right::One(literal)) => {
                Ok(Compare::Int(IntTest::Order(*order, self.int(literal, right_span)?)))
            }
            (Type::Ip, Op::Order(order), Right::One(literal)) => {
                Ok(Compare::Ip(IpTest::Order(*order, self.ip(literal, right_span)?)))
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
                wildcard
                    .map(|w| Compare::Text(TextTest::Wildcard(w)))
                    .map_err(|m| ExprError::new(right_span.clone(), format!("wildcard: {m}")))
            }
            (Type::Bytes, Op::Matches | Op::Wildcard | Op::StrictWildcard, Right::One(_)) => {
                Err(ExprError::new(right_span.clone(), "expected a string in quotes"))
            }
            (Type::Bytes, Op::Order(order), Right::One(literal)) => {
                Ok(Compare::Text(TextTest::Order(*order, self.bytes(literal, right_span)?.into())))
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
            Literal::Word(word) => integer(word)
                .ok_or_else(|| ExprError::new(span.clone(), format!("type: expected an Integer of 64 bits, found `{word}`"))),
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
