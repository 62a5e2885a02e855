//! Functions that make texts of texts.

use std::borrow::Cow;

use memchr::memmem;

use super::{
    ANY_NUMBER, ANY_TEXT, BASE, From, Function, LITERAL, NUMBER, Prepared, Returns, TEXT, bytes, flags, int, owned, parameter,
    take,
};
use crate::rules::normalise::url_decode;
use crate::rules::pattern::{Regex, Replacement, Wildcard};
use crate::rules::value::Type::{self, Bool, Bytes, Int, Ip};
use crate::rules::value::{Array, TEXT_LISTS, TEXTS, TRUTHS, Value};

/// All of them.
pub static FUNCTIONS: [Function; 15] = [
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
        name: "ends_with",
        parameters: &[TEXT, ANY_TEXT],
        least: 2,
        returns: Returns::Type(Bool),
        run: |args, _, _| Some(Value::Bool(bytes(args, 0)?.ends_with(bytes(args, 1)?))),
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
        parameters: &[parameter(&[Bytes, TEXTS, Type::Array(&Int), Type::Array(&Ip), TRUTHS, TEXT_LISTS], From::Field)],
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
    Function { name: "upper", parameters: &[TEXT], run: |args, _, _| Some(owned(bytes(args, 0)?.to_ascii_uppercase())), ..BASE },
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
