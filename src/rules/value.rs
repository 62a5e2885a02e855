//! Values of the language: what fields hold and functions return.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use http::HeaderMap;
use rustc_hash::FxHashMap;

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// Yes or no.
    Bool,
    /// 64 bits, signed.
    Int,
    /// An address.
    Ip,
    /// Text or bytes.
    Bytes,
    /// An array of one type.
    Array(&'static Type),
    /// A map from text to one type.
    Map(&'static Type),
}

/// Texts by name, several under one name: arguments, cookies, forms.
pub const TEXTS: Type = Type::Array(&Type::Bytes);
/// An array of arrays of text.
pub const TEXT_LISTS: Type = Type::Array(&TEXTS);
/// A map of arrays of text.
pub const TEXT_MAP: Type = Type::Map(&TEXTS);
/// Truths, one for each element.
pub const TRUTHS: Type = Type::Array(&Type::Bool);

impl Type {
    /// The type of an array of this; nothing for arrays of arrays of arrays and of maps.
    pub fn array(self) -> Option<Self> {
        Some(match self {
            Self::Bool => TRUTHS,
            Self::Int => Self::Array(&Self::Int),
            Self::Ip => Self::Array(&Self::Ip),
            Self::Bytes => TEXTS,
            Self::Array(Self::Bytes) => TEXT_LISTS,
            Self::Array(_) | Self::Map(_) => return None,
        })
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool => f.write_str("Boolean"),
            Self::Int => f.write_str("Integer"),
            Self::Ip => f.write_str("IP address"),
            Self::Bytes => f.write_str("String"),
            Self::Array(of) => write!(f, "Array<{of}>"),
            Self::Map(of) => write!(f, "Map<{of}>"),
        }
    }
}

/// Names and values, borrowed where they stand in the request as they are meant.
pub type Pairs<'v> = [Pair<'v>];
/// One of them.
pub type Pair<'v> = (Cow<'v, [u8]>, Cow<'v, [u8]>);

/// A value.
#[derive(Debug, Clone)]
pub enum Value<'v> {
    /// Yes or no.
    Bool(bool),
    /// A number.
    Int(i64),
    /// An address.
    Ip(IpAddr),
    /// Text.
    Bytes(Cow<'v, [u8]>),
    /// An array.
    Array(Array<'v>),
    /// A map.
    Map(Map<'v>),
}

/// An array; most are views of what stands elsewhere.
#[derive(Debug, Clone)]
pub enum Array<'v> {
    /// Its elements.
    Values(Vec<Value<'v>>),
    /// Texts.
    Texts(&'v [Cow<'v, [u8]>]),
    /// Arrays of one text each, or of none where it is empty.
    Singles(&'v [Cow<'v, [u8]>]),
    /// Arrays of some texts each.
    Lists(&'v [Vec<Cow<'v, [u8]>>]),
    /// The names of pairs.
    Names(&'v Pairs<'v>),
    /// The values of pairs.
    Seconds(&'v Pairs<'v>),
    /// The values of pairs with this name.
    Keyed(&'v Pairs<'v>, &'v [u8]),
    /// Every header's name.
    HeaderNames(&'v HeaderMap),
    /// Every header's value.
    HeaderValues(&'v HeaderMap),
    /// The values of one header.
    Header(&'v HeaderMap, &'v str),
}

/// A map of arrays of text.
#[derive(Debug, Clone, Copy)]
pub enum Map<'v> {
    /// Headers.
    Headers(&'v HeaderMap),
    /// Pairs.
    Pairs(&'v Pairs<'v>),
}

/// Text that borrows.
pub fn text(bytes: &[u8]) -> Value<'_> {
    Value::Bytes(Cow::Borrowed(bytes))
}

impl<'v> Array<'v> {
    /// Calls `each` with every element until it says `false`; was it never said?
    pub fn all(&self, mut each: impl FnMut(Value<'v>) -> bool) -> bool {
        match self {
            Self::Values(values) => values.iter().all(|v| each(v.clone())),
            Self::Texts(texts) => texts.iter().all(|t| each(text(t))),
            Self::Singles(texts) => texts.iter().all(|t| {
                let single = if t.is_empty() { Vec::new() } else { vec![text(t)] };
                each(Value::Array(Self::Values(single)))
            }),
            Self::Lists(lists) => lists.iter().all(|list| each(Value::Array(Self::Texts(list)))),
            Self::Names(pairs) => pairs.iter().all(|(name, _)| each(text(name))),
            Self::Seconds(pairs) => pairs.iter().all(|(_, value)| each(text(value))),
            Self::Keyed(pairs, key) => pairs.iter().filter(|(name, _)| name == key).all(|(_, value)| each(text(value))),
            Self::HeaderNames(headers) => headers.iter().all(|(name, _)| each(text(name.as_str().as_bytes()))),
            Self::HeaderValues(headers) => headers.values().all(|value| each(text(value.as_bytes()))),
            Self::Header(headers, name) => headers.get_all(*name).iter().all(|value| each(text(value.as_bytes()))),
        }
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Values(values) => values.len(),
            Self::Texts(texts) | Self::Singles(texts) => texts.len(),
            Self::Lists(lists) => lists.len(),
            Self::Names(pairs) | Self::Seconds(pairs) => pairs.len(),
            Self::HeaderNames(headers) | Self::HeaderValues(headers) => headers.len(),
            Self::Keyed(..) | Self::Header(..) => {
                let mut n = 0;
                self.all(|_| {
                    n += 1;
                    true
                });
                n
            }
        }
    }

    /// One element.
    pub fn get(&self, index: usize) -> Option<Value<'v>> {
        let (mut found, mut at) = (None, 0);
        self.all(|value| {
            if at == index {
                found = Some(value);
            }
            at += 1;
            found.is_none()
        });
        found
    }

    /// Every element.
    pub fn to_vec(&self) -> Vec<Value<'v>> {
        let mut all = Vec::new();
        self.all(|value| {
            all.push(value);
            true
        });
        all
    }
}

impl<'v> Map<'v> {
    /// What stands under `key`; nothing if there is none.
    pub fn get(self, key: &'v [u8]) -> Option<Array<'v>> {
        match self {
            // Their names are in lower case, and so has a key to be.
            Self::Headers(headers) => {
                let name = std::str::from_utf8(key).ok().filter(|k| k.bytes().all(|b| !b.is_ascii_uppercase()))?;
                headers.contains_key(name).then_some(Array::Header(headers, name))
            }
            Self::Pairs(pairs) => pairs.iter().any(|(name, _)| *name == key).then_some(Array::Keyed(pairs, key)),
        }
    }

    /// Is there something under `key`?
    pub fn has(self, key: &[u8]) -> bool {
        match self {
            Self::Headers(headers) => {
                std::str::from_utf8(key).is_ok_and(|k| k.bytes().all(|b| !b.is_ascii_uppercase()) && headers.contains_key(k))
            }
            Self::Pairs(pairs) => pairs.iter().any(|(name, _)| *name == key),
        }
    }

    /// What stands under each key, in the order in which the keys first came.
    pub fn arrays(self) -> Array<'v> {
        let arrays = match self {
            Self::Headers(headers) => headers.keys().map(|name| Value::Array(Array::Header(headers, name.as_str()))).collect(),
            Self::Pairs(pairs) => {
                let mut places: FxHashMap<&[u8], usize> = FxHashMap::default();
                let mut groups: Vec<Vec<Value<'v>>> = Vec::new();
                for (name, value) in pairs {
                    let at = *places.entry(name).or_insert(groups.len());
                    match groups.get_mut(at) {
                        Some(group) => group.push(text(value)),
                        None => groups.push(vec![text(value)]),
                    }
                }
                groups.into_iter().map(|group| Value::Array(Array::Values(group))).collect()
            }
        };
        Array::Values(arrays)
    }
}

/// At most this much of a value is shown.
const SHOWN: usize = 80;

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Ip(value) => write!(f, "{value}"),
            Self::Bytes(bytes) => {
                let cut = bytes.get(..SHOWN).unwrap_or(bytes);
                let more = if bytes.len() > SHOWN { "…" } else { "" };
                write!(f, "\"{}{more}\"", cut.escape_ascii())
            }
            Self::Array(array) => {
                let mut list = f.debug_list();
                let mut left = 8;
                array.all(|value| {
                    list.entry(&format_args!("{value}"));
                    left -= 1;
                    left > 0
                });
                list.finish()
            }
            Self::Map(Map::Headers(headers)) => write!(f, "{} headers", headers.len()),
            Self::Map(Map::Pairs(pairs)) => {
                let show = |bytes: &Cow<'_, [u8]>| bytes.escape_ascii().to_string();
                f.debug_map().entries(pairs.iter().take(8).map(|(k, v)| (show(k), show(v)))).finish()
            }
        }
    }
}

/// A number as the language writes it: decimal, `0x` hexadecimal, or octal with a leading `0`.
pub fn integer(word: &str) -> Option<i64> {
    let (negative, digits) = match word.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, word),
    };
    if !digits.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let value = match (digits.strip_prefix("0x"), digits) {
        (Some(hex), _) if !negative => i128::from_str_radix(hex, 16),
        (Some(_), _) => return None,
        (None, "0") => Ok(0),
        (None, _) => match digits.strip_prefix('0') {
            Some(octal) => i128::from_str_radix(octal, 8),
            None => digits.parse(),
        },
    };
    let value = value.ok()?;
    i64::try_from(if negative { -value } else { value }).ok()
}
