//! Functions over addresses, arrays, maps, documents and signatures.

use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use ring::{digest, hmac};
use serde_json::Value as Json;
use subtle::ConstantTimeEq;

use super::{
    ANY_NUMBER, ANY_TEXT, BASE, From, Function, LITERAL, NUMBER, Prepared, Returns, TEXT, bytes, flags, int, owned, parameter,
};
use crate::rules::normalise::percent_decode;
use crate::rules::value::Type::{self, Bool, Bytes, Int, Ip};
use crate::rules::value::{TEXT_MAP, TEXTS, TRUTHS, Value};
use crate::rules::view::View;

/// All of them.
pub static FUNCTIONS: [Function; 13] = [
    Function { name: "any", parameters: &[parameter(&[TRUTHS], From::Field)], returns: Returns::Type(Bool), ..BASE },
    Function { name: "all", parameters: &[parameter(&[TRUTHS], From::Field)], returns: Returns::Type(Bool), ..BASE },
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
        name: "sha256",
        parameters: &[ANY_TEXT],
        run: |args, _, _| Some(owned(digest::digest(&digest::SHA256, bytes(args, 0)?).as_ref().to_vec())),
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
];

fn bits(args: &[Option<Value<'_>>], at: usize, most: i64) -> Result<Prepared, (usize, String)> {
    match int(args, at) {
        Some(bits) if (1..=most).contains(&bits) => Ok(Prepared::Nothing),
        _ => Err((at, format!("expected 1 to {most} bits"))),
    }
}

fn mask(ip: IpAddr, four: i64, six: i64) -> Option<Value<'static>> {
    let bits = if ip.is_ipv4() { four } else { six };
    let net = ipnet::IpNet::new(ip, u8::try_from(bits).ok()?).ok()?;
    Some(Value::Ip(net.network()))
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
        Some(json) => json?,
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
        digits.is_some_and(|d| d.iter().all(u8::is_ascii_digit)) && (44..=133).contains(&(text.len() - at))
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
                let plain = percent_decode(mac);
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
