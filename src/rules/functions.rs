//! The functions: what they take, what they give, and how.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use memchr::memmem;
use ring::{digest, hmac};
use serde_json::Value as Json;
use subtle::ConstantTimeEq;

use super::normalise::url_decode;
use super::pattern::{Regex, Replacement, Wildcard};
use super::value::Type::{self, Bool, Bytes, Int, Ip};
use super::value::{Array, TEXT_MAP, TEXTS, TRUTHS, Value};
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
    pub prepare: fn(&[Option<Value<'static>>], usize) -> Result<Prepared, (usize, String)>,
    /// Runs it.
    pub run: for<'v> fn(&mut [Option<Value<'v>>], &'v Prepared, Option<&'v View<'_>>) -> Option<Value<'v>>,
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

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

/// A function by its name. `any` and `all` are the checker's.
pub fn find(name: &str) -> Option<&'static Function> {
    FUNCTIONS.iter().find(|f| f.name == name)
}

/// Every function.
pub static FUNCTIONS: [Function; 28] = [
    Function {
        name: "any",
        parameters: &[parameter(&[TRUTHS], From::Field)],
        returns: Returns::Type(Bool),
        ..BASE
    },
    Function {
        name: "all",
        parameters: &[parameter(&[TRUTHS], From::Field)],
        returns: Returns::Type(Bool),
        ..BASE
    },
    Function {
        name: "cidr",
        parameters: &[parameter(&[Ip], From::Field), NUMBER, NUMBER],
        least: 3,
        returns: Returns::Type(Ip),
        prepare: |args, _| bits(args, 1, 32).and(bits(args, 2, 128)),
        run: |args, _, _| match args {
            [Some(Value::Ip(ip)), Some(Value::Int(four)), Some(Value::Int(six))] => mask(*ip, *four, *six),
            _ => None,
        },
        ..BASE
    },
    Function {
        name: "cidr6",
        parameters: &[parameter(&[Ip], From::Field), NUMBER],
        least: 2,
        returns: Returns::Type(Ip),
        prepare: |args, _| bits(args, 1, 128),
        run: |args, _, _| match args {
            [Some(Value::Ip(ip)), Some(Value::Int(six))] => mask(*ip, 32, *six),
            _ => None,
        },
        ..BASE
    },
    Function {
        name: "concat",
        parameters: &[parameter(&[Bytes, TEXTS], From::Either), parameter(&[Bytes, TEXTS], From::Either)],
        least: 2,
        variadic: true,
        returns: Returns::First,
        skips_missing: true,
        run: |args, _, _| concat(args),
        ..BASE
    },
    Function {
        name: "decode_base64",
        parameters: &[TEXT],
        total: false,
        run: |args, _, _| {
            let text = bytes(args, 0)?;
            let text = text.trim_ascii();
            STANDARD.decode(text).or_else(|_| STANDARD_NO_PAD.decode(text)).ok().map(owned)
        },
        ..BASE
    },
    Function {
        name: "encode_base64",
        parameters: &[ANY_TEXT, LITERAL],
        prepare: |args, _| flags(args, 1, b"up"),
        run: |args, _, _| {
            let flag = |f: u8| bytes(args, 1).is_some_and(|flags| flags.contains(&f));
            let engine = match (flag(b'u'), flag(b'p')) {
                (true, true) => &URL_SAFE,
                (true, false) => &URL_SAFE_NO_PAD,
                (false, true) => &STANDARD,
                (false, false) => &STANDARD_NO_PAD,
            };
            Some(owned(engine.encode(bytes(args, 0)?).into_bytes()))
        },
        ..BASE
    },
    Function {
        name: "ends_with",
        parameters: &[TEXT, ANY_TEXT],
        least: 2,
        returns: Returns::Type(Bool),
        run: |args, _, _| Some(Value::Bool(bytes(args, 0)?.ends_with(bytes(args, 1)?))),
        ..BASE
    },
    Function {
        name: "has_key",
        parameters: &[parameter(&[TEXT_MAP], From::Field), ANY_TEXT],
        least: 2,
        returns: Returns::Type(Bool),
        run: |args, _, _| match args.first() {
            Some(Some(Value::Map(map))) => Some(Value::Bool(map.has(bytes(args, 1)?))),
            _ => None,
        },
        ..BASE
    },
    Function {
        name: "has_value",
        parameters: &[
            parameter(&[TEXTS, Type::Array(&Int), Type::Array(&Ip), TRUTHS], From::Field),
            parameter(&[Bytes, Int, Ip, Bool], From::Either),
        ],
        least: 2,
        returns: Returns::Type(Bool),
        run: |args, _, _| match args {
            [Some(Value::Array(array)), Some(value)] => Some(Value::Bool(!array.all(|element| !equal(&element, value)))),
            _ => None,
        },
        ..BASE
    },
    Function {
        name: "is_timed_hmac_valid_v0",
        parameters: &[LITERAL, TEXT, NUMBER, ANY_NUMBER, NUMBER, LITERAL],
        least: 4,
        returns: Returns::Type(Bool),
        prepare: |args, _| {
            flags(args, 5, b"s")?;
            if int(args, 4).is_some_and(|len| !(0..=255).contains(&len)) {
                return Err((4, "expected 0 to 255".to_owned()));
            }
            let key = hmac::Key::new(hmac::HMAC_SHA256, bytes(args, 0).unwrap_or_default());
            Ok(Prepared::Hmac(Box::new(key)))
        },
        run: |args, prepared, _| {
            let Prepared::Hmac(key) = prepared else { return None };
            let separator = int(args, 4).unwrap_or(0);
            let url_safe = bytes(args, 5).is_some_and(|flags| flags.contains(&b's'));
            let valid = timed_hmac(key, bytes(args, 1)?, int(args, 2)?, int(args, 3)?, separator, url_safe);
            Some(Value::Bool(valid == Some(true)))
        },
        ..BASE
    },
    Function {
        name: "join",
        parameters: &[parameter(&[TEXTS], From::Field), LITERAL],
        least: 2,
        run: |args, _, _| {
            let Some(Some(Value::Array(array))) = args.first() else { return None };
            let between = bytes(args, 1)?;
            let mut joined = Vec::new();
            let mut first = true;
            array.all(|element| {
                if let Value::Bytes(text) = element {
                    joined.extend_from_slice(if first { b"" } else { between });
                    joined.extend_from_slice(&text);
                    first = false;
                }
                true
            });
            Some(owned(joined))
        },
        ..BASE
    },
    Function {
        name: "len",
        parameters: &[parameter(&[Bytes, TEXTS, Type::Array(&Int), Type::Array(&Ip), TRUTHS, super::value::TEXT_LISTS], From::Field)],
        returns: Returns::Type(Int),
        run: |args, _, _| {
            let len = match args.first()? {
                Some(Value::Bytes(text)) => text.len(),
                Some(Value::Array(array)) => array.len(),
                _ => return None,
            };
            Some(Value::Int(i64::try_from(len).unwrap_or(i64::MAX)))
        },
        ..BASE
    },
    Function {
        name: "lookup_json_integer",
        parameters: &[TEXT, parameter(&[Bytes, Int], From::Literal)],
        least: 2,
        variadic: true,
        returns: Returns::Type(Int),
        total: false,
        run: |args, _, view| lookup(args, view, |json| json.as_i64().map(Value::Int)),
        ..BASE
    },
    Function {
        name: "lookup_json_string",
        parameters: &[TEXT, parameter(&[Bytes, Int], From::Literal)],
        least: 2,
        variadic: true,
        total: false,
        run: |args, _, view| lookup(args, view, |json| json.as_str().map(|s| owned(s.as_bytes().to_vec()))),
        ..BASE
    },
    Function {
        name: "lower",
        parameters: &[TEXT],
        run: |args, _, _| {
            let text = take(args, 0)?;
            Some(match text.iter().any(u8::is_ascii_uppercase) {
                true => owned(text.to_ascii_lowercase()),
                false => Value::Bytes(text),
            })
        },
        ..BASE
    },
    Function {
        name: "regex_replace",
        parameters: &[ANY_TEXT, LITERAL, LITERAL],
        least: 3,
        prepare: |args, limit| {
            let pattern = std::str::from_utf8(bytes(args, 1).unwrap_or_default());
            let pattern = pattern.map_err(|_| (1, "a regular expression is UTF-8".to_owned()))?;
            let regex = Regex::new(pattern, limit).map_err(|error| (1, format!("regular expression: {error}")))?;
            Ok(Prepared::Regex(regex, Replacement::new(bytes(args, 2).unwrap_or_default())))
        },
        run: |args, prepared, _| {
            let Prepared::Regex(regex, replacement) = prepared else { return None };
            let text = take(args, 0)?;
            Some(Value::Bytes(regex.replace(&text, replacement).map_or(text, Cow::Owned)))
        },
        ..BASE
    },
    Function {
        name: "remove_bytes",
        parameters: &[TEXT, LITERAL],
        least: 2,
        run: |args, _, _| {
            let text = take(args, 0)?;
            let set = bytes(args, 1)?;
            Some(match text.iter().any(|b| set.contains(b)) {
                true => owned(text.iter().copied().filter(|b| !set.contains(b)).collect()),
                false => Value::Bytes(text),
            })
        },
        ..BASE
    },
    Function {
        name: "remove_query_args",
        parameters: &[TEXT, LITERAL],
        least: 2,
        variadic: true,
        run: |args, _, _| {
            let query = bytes(args, 0)?;
            let name = |pair: &[u8]| pair.split(|b| *b == b'=').next().unwrap_or_default().to_vec();
            let removed = |pair: &&[u8]| !args.iter().skip(1).any(|a| matches!(a, Some(Value::Bytes(n)) if **n == *name(pair)));
            let kept: Vec<&[u8]> = query.split(|b| *b == b'&').filter(removed).collect();
            Some(owned(kept.join(&b'&')))
        },
        ..BASE
    },
    Function {
        name: "sha256",
        parameters: &[ANY_TEXT],
        run: |args, _, _| Some(owned(digest::digest(&digest::SHA256, bytes(args, 0)?).as_ref().to_vec())),
        ..BASE
    },
    Function {
        name: "split",
        parameters: &[TEXT, LITERAL, NUMBER],
        least: 3,
        returns: Returns::Type(TEXTS),
        prepare: |args, _| {
            if bytes(args, 1).is_some_and(<[u8]>::is_empty) {
                return Err((1, "the separator is empty".to_owned()));
            }
            match int(args, 2) {
                Some(1..=128) => Ok(Prepared::Nothing),
                _ => Err((2, "expected a limit from 1 to 128".to_owned())),
            }
        },
        run: |args, _, _| {
            let limit = usize::try_from(int(args, 2)?).unwrap_or(1);
            let between = bytes(args, 1)?.to_vec();
            let mut rest = take(args, 0)?;
            let mut parts = Vec::new();
            while parts.len() + 1 < limit
                && let Some(at) = memmem::find(&rest, &between)
            {
                let (part, tail) = cut(rest, at, between.len());
                parts.push(Value::Bytes(part));
                rest = tail;
            }
            parts.push(Value::Bytes(rest));
            Some(Value::Array(Array::Values(parts)))
        },
        ..BASE
    },
    Function {
        name: "starts_with",
        parameters: &[TEXT, ANY_TEXT],
        least: 2,
        returns: Returns::Type(Bool),
        run: |args, _, _| Some(Value::Bool(bytes(args, 0)?.starts_with(bytes(args, 1)?))),
        ..BASE
    },
    Function {
        name: "substring",
        parameters: &[TEXT, ANY_NUMBER, ANY_NUMBER],
        least: 2,
        run: |args, _, _| {
            let len = i64::try_from(bytes(args, 0)?.len()).unwrap_or(i64::MAX);
            let at = |n: i64| usize::try_from(if n < 0 { n.saturating_add(len) } else { n }.clamp(0, len)).unwrap_or(0);
            let start = at(int(args, 1)?);
            let end = int(args, 2).map_or(at(len), at);
            let text = take(args, 0)?;
            Some(match text {
                Cow::Borrowed(text) => Value::Bytes(Cow::Borrowed(text.get(start..end).unwrap_or_default())),
                Cow::Owned(text) => owned(text.get(start..end).unwrap_or_default().to_vec()),
            })
        },
        ..BASE
    },
    Function {
        name: "to_string",
        parameters: &[parameter(&[Int, Bool, Ip], From::Field)],
        run: |args, _, _| match args.first()? {
            Some(value @ (Value::Int(_) | Value::Bool(_) | Value::Ip(_))) => Some(owned(value.to_string().into_bytes())),
            _ => None,
        },
        ..BASE
    },
    Function {
        name: "upper",
        parameters: &[TEXT],
        run: |args, _, _| Some(owned(bytes(args, 0)?.to_ascii_uppercase())),
        ..BASE
    },
    Function {
        name: "url_decode",
        parameters: &[TEXT, LITERAL],
        prepare: |args, _| flags(args, 1, b"ru"),
        run: |args, _, _| {
            let flag = |f: u8| bytes(args, 1).is_some_and(|flags| flags.contains(&f));
            let (again, wide) = (flag(b'r'), flag(b'u'));
            let mut text = take(args, 0)?;
            // Each round makes it shorter; a text that was wrapped oftener than this is no text.
            for _ in 0..if again { ROUNDS } else { 1 } {
                let decoded = url_decode(&text, wide).into_owned();
                if *decoded == *text {
                    break;
                }
                text = Cow::Owned(decoded);
            }
            Some(Value::Bytes(text))
        },
        ..BASE
    },
    Function {
        name: "uuidv4",
        parameters: &[TEXT],
        run: |args, _, _| {
            let hash = digest::digest(&digest::SHA256, bytes(args, 0)?);
            let mut id = [0u8; 16];
            id.iter_mut().zip(hash.as_ref()).for_each(|(to, from)| *to = *from);
            // RFC 9562, section 5.4: version and variant.
            let [.., version, _, variant, _, _, _, _, _, _, _] = &mut id;
            *version = *version & 0x0f | 0x40;
            *variant = *variant & 0x3f | 0x80;
            let mut text = String::new();
            for (n, byte) in id.iter().enumerate() {
                text.push_str(if matches!(n, 4 | 6 | 8 | 10) { "-" } else { "" });
                text.push_str(&format!("{byte:02x}"));
            }
            Some(owned(text.into_bytes()))
        },
        ..BASE
    },
    Function {
        name: "wildcard_replace",
        parameters: &[TEXT, LITERAL, LITERAL, LITERAL],
        least: 3,
        prepare: |args, _| {
            flags(args, 3, b"s")?;
            let strict = bytes(args, 3).is_some_and(|flags| flags.contains(&b's'));
            let wildcard = Wildcard::new(bytes(args, 1).unwrap_or_default(), strict).map_err(|e| (1, e.to_owned()))?;
            Ok(Prepared::Wildcard(wildcard, Replacement::new(bytes(args, 2).unwrap_or_default())))
        },
        run: |args, prepared, _| {
            let Prepared::Wildcard(wildcard, replacement) = prepared else { return None };
            let text = take(args, 0)?;
            Some(Value::Bytes(wildcard.replace(&text, replacement).map_or(text, Cow::Owned)))
        },
        ..BASE
    },
];

/// Rounds of `url_decode` with `r`.
const ROUNDS: usize = 16;

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

/// The part before `at`, and the one `gap` bytes behind it.
fn cut(text: Cow<'_, [u8]>, at: usize, gap: usize) -> (Cow<'_, [u8]>, Cow<'_, [u8]>) {
    match text {
        Cow::Borrowed(text) => {
            (Cow::Borrowed(text.get(..at).unwrap_or_default()), Cow::Borrowed(text.get(at + gap..).unwrap_or_default()))
        }
        Cow::Owned(mut text) => {
            let rest = text.get(at + gap..).unwrap_or_default().to_vec();
            text.truncate(at);
            (Cow::Owned(text), Cow::Owned(rest))
        }
    }
}

fn bits(args: &[Option<Value<'_>>], at: usize, most: i64) -> Result<Prepared, (usize, String)> {
    match int(args, at) {
        Some(bits) if (1..=most).contains(&bits) => Ok(Prepared::Nothing),
        _ => Err((at, format!("expected 1 to {most} bits"))),
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

fn mask(ip: IpAddr, four: i64, six: i64) -> Option<Value<'static>> {
    let bits = if ip.is_ipv4() { four } else { six };
    let net = ipnet::IpNet::new(ip, u8::try_from(bits).ok()?).ok()?;
    Some(Value::Ip(net.network()))
}

fn concat<'v>(args: &mut [Option<Value<'v>>]) -> Option<Value<'v>> {
    let present = || args.iter().flatten();
    match present().next()? {
        Value::Array(_) => {
            let mut all = Vec::new();
            for value in present() {
                if let Value::Array(array) = value {
                    all.extend(array.to_vec());
                }
            }
            Some(Value::Array(Array::Values(all)))
        }
        _ => {
            let mut text = Vec::new();
            for value in present() {
                if let Value::Bytes(part) = value {
                    text.extend_from_slice(part);
                }
            }
            Some(owned(text))
        }
    }
}

fn equal(a: &Value<'_>, b: &Value<'_>) -> bool {
    match (a, b) {
        (Value::Bytes(a), Value::Bytes(b)) => a == b,
        (Value::Int(a), Value::Int(b)) => a == b,
        (Value::Ip(a), Value::Ip(b)) => a == b,
        (Value::Bool(a), Value::Bool(b)) => a == b,
        _ => false,
    }
}

fn lookup<'v>(
    args: &[Option<Value<'v>>],
    view: Option<&View<'_>>,
    read: impl Fn(&Json) -> Option<Value<'static>>,
) -> Option<Value<'v>> {
    let text = bytes(args, 0)?;
    let parsed;
    let document = match view.and_then(|view| view.json(text)) {
        Some(json) => json,
        None => {
            parsed = serde_json::from_slice::<Json>(text).ok()?;
            &parsed
        }
    };
    let mut at = document;
    for key in args.iter().skip(1) {
        at = match key.as_ref()? {
            Value::Bytes(key) => at.as_object()?.get(std::str::from_utf8(key).ok()?)?,
            Value::Int(index) => at.as_array()?.get(usize::try_from(*index).ok()?)?,
            _ => return None,
        };
    }
    read(at)
}

/// `message`, a separator, ten digits of a time, `-`, and the MAC of message and time.
fn timed_hmac(key: &hmac::Key, text: &[u8], ttl: i64, now: i64, separator: i64, url_safe: bool) -> Option<bool> {
    let separator = usize::try_from(separator).ok()?;
    // The MAC has 43 characters, or 44 with its `=`, or more if it is percent-encoded; it holds no `-` but
    // in its URL-safe form. So the time is found from the left of a `-` behind ten digits, the last such.
    let dashes = memchr::memchr_iter(b'-', text).rev().filter(|at| {
        let digits = at.checked_sub(10).and_then(|start| text.get(start..*at));
        digits.is_some_and(|d| d.iter().all(u8::is_ascii_digit)) && text.len() - at > 43
    });
    for dash in dashes {
        let time = text.get(dash - 10..dash)?;
        let Some(end) = (dash - 10).checked_sub(separator) else { continue };
        let message = text.get(..end)?;
        let mac = text.get(dash + 1..)?;
        let mac = match url_safe {
            true => URL_SAFE_NO_PAD.decode(mac),
            // A `+` is a `+` here, not a space.
            false => {
                let plain = url_decode(&mac.iter().flat_map(|b| if *b == b'+' { &b"%2B"[..] } else { std::slice::from_ref(b) }.iter().copied()).collect::<Vec<_>>(), false).into_owned();
                STANDARD.decode(&plain).or_else(|_| STANDARD_NO_PAD.decode(&plain))
            }
        };
        let Ok(mac) = mac else { continue };
        let mut context = hmac::Context::with_key(key);
        context.update(message);
        context.update(time);
        if bool::from(context.sign().as_ref().ct_eq(&mac)) {
            let issued: i64 = std::str::from_utf8(time).ok()?.parse().ok()?;
            return Some(now < issued.saturating_add(ttl));
        }
    }
    None
}
