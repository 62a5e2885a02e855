//! The compiled language against a naive reading of the same: random expressions, written out in either notation
//! and with as few parentheses as precedence allows, on random requests.

use std::net::Ipv4Addr;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// An expression, as this file understands it.
#[derive(Debug, Clone)]
enum Expr {
    And(Vec<Expr>),
    Xor(Vec<Expr>),
    Or(Vec<Expr>),
    Not(Box<Expr>),
    Text(Field, TextOp),
    /// `len(FIELD)` and a number.
    Len(Field, &'static str, i64),
    Ip(IpOp),
    /// `any` or `all` of the values of an argument.
    Args(bool, String, TextOp),
    /// `any` or `all` of two comparisons of the same array, joined element by element.
    Zip(bool, &'static str, TextOp, TextOp),
}

#[derive(Debug, Clone, Copy)]
enum Field {
    Host,
    Path,
    LowerHost,
    /// The first value of a header that may be missing.
    Header,
    /// The path behind its first character.
    Tail,
    /// The host and the path, one after the other.
    Both,
}

#[derive(Debug, Clone)]
enum TextOp {
    Order(&'static str, String),
    Contains(String),
    In(Vec<String>),
    Prefix(String),
    Wildcard(String),
}

#[derive(Debug, Clone)]
enum IpOp {
    Eq(u8),
    Net(u8),
    Range(u8, u8),
}

/// A request, as this file understands it.
#[derive(Debug, Clone)]
struct Request {
    host: String,
    path: String,
    header: Option<String>,
    args: Vec<(String, String)>,
    last_octet: u8,
}

impl Expr {
    fn level(&self) -> u8 {
        match self {
            Self::Or(_) => 0,
            Self::Xor(_) => 1,
            Self::And(_) => 2,
            _ => 3,
        }
    }

    /// As text; `style` chooses the notation.
    fn write(&self, style: &mut impl FnMut() -> bool) -> String {
        let join = |all: &[Expr], level: u8, words: [&str; 2], style: &mut dyn FnMut() -> bool| {
            let mut text = String::new();
            for (n, expr) in all.iter().enumerate() {
                if n > 0 {
                    text.push_str(&format!(" {} ", words[usize::from(style())]));
                }
                let mut style = || style();
                let inner = expr.write_dyn(&mut style);
                // What binds tighter needs none.
                text.push_str(&if expr.level() > level { inner } else { format!("({inner})") });
            }
            text
        };
        match self {
            Self::Or(all) => join(all, 0, ["or", "||"], style),
            Self::Xor(all) => join(all, 1, ["xor", "^^"], style),
            Self::And(all) => join(all, 2, ["and", "&&"], style),
            Self::Not(inner) => {
                let not = if style() { "not " } else { "!" };
                let text = inner.write_dyn(style);
                if inner.level() == 3 { format!("{not}{text}") } else { format!("{not}({text})") }
            }
            Self::Text(field, op) => op.write(field.name()),
            Self::Len(field, op, n) => format!("len({}) {op} {n}", field.name()),
            Self::Ip(IpOp::Eq(n)) => format!("ip.src eq 192.0.2.{n}"),
            Self::Ip(IpOp::Net(n)) => format!("ip.src in {{ 10.0.0.0/8 192.0.2.{}/28 }}", n & 0xf0),
            Self::Ip(IpOp::Range(a, b)) => format!("ip.src in {{192.0.2.{a}..192.0.2.{b}}}"),
            Self::Args(any, key, op) => {
                let function = if *any { "any" } else { "all" };
                format!("{function}({})", op.write_mapped(&format!("http.request.uri.args[\"{key}\"]")))
            }
            Self::Zip(any, word, a, b) => {
                let function = if *any { "any" } else { "all" };
                let values = "http.request.uri.args.values";
                format!("{function}(({} {word} {}))", a.write_mapped(values), b.write_mapped(values))
            }
        }
    }

    fn write_dyn(&self, style: &mut dyn FnMut() -> bool) -> String {
        self.write(&mut || style())
    }

    fn holds(&self, request: &Request) -> bool {
        match self {
            Self::And(all) => all.iter().all(|e| e.holds(request)),
            Self::Or(all) => all.iter().any(|e| e.holds(request)),
            Self::Xor(all) => all.iter().filter(|e| e.holds(request)).count() % 2 == 1,
            Self::Not(inner) => !inner.holds(request),
            Self::Text(field, op) => field.of(request).is_some_and(|text| op.holds(&text)),
            Self::Len(field, op, n) => field.of(request).is_some_and(|text| order(op, &i64::try_from(text.len()).unwrap(), n)),
            Self::Ip(IpOp::Eq(n)) => request.last_octet == *n,
            Self::Ip(IpOp::Net(n)) => request.last_octet & 0xf0 == n & 0xf0,
            Self::Ip(IpOp::Range(a, b)) => (*a..=*b).contains(&request.last_octet),
            Self::Args(any, key, op) => {
                let values: Vec<bool> = request.args.iter().filter(|(k, _)| k == key).map(|(_, v)| op.holds(v)).collect();
                if *any { values.contains(&true) } else { !values.contains(&false) }
            }
            Self::Zip(any, word, a, b) => {
                let joined = |v: &String| match *word {
                    "and" => a.holds(v) && b.holds(v),
                    "or" => a.holds(v) || b.holds(v),
                    _ => a.holds(v) != b.holds(v),
                };
                let mut values = request.args.iter().map(|(_, v)| joined(v));
                if *any { values.any(|v| v) } else { values.all(|v| v) }
            }
        }
    }
}

impl Field {
    fn name(self) -> &'static str {
        match self {
            Self::Host => "http.host",
            Self::Path => "http.request.uri.path",
            Self::LowerHost => "lower(http.host)",
            Self::Header => "http.request.headers[\"x-a\"][0]",
            Self::Tail => "substring(http.request.uri.path, 1)",
            Self::Both => "concat(http.host, http.request.uri.path)",
        }
    }

    fn of(self, request: &Request) -> Option<String> {
        match self {
            Self::Host => Some(request.host.clone()),
            Self::Path => Some(request.path.clone()),
            Self::LowerHost => Some(request.host.to_lowercase()),
            Self::Header => request.header.clone(),
            Self::Tail => Some(request.path[1..].to_owned()),
            Self::Both => Some(format!("{}{}", request.host, request.path)),
        }
    }
}

impl TextOp {
    fn write(&self, left: &str) -> String {
        match self {
            Self::Order(op, text) => format!("{left} {op} \"{text}\""),
            Self::Contains(text) => format!("{left} contains r#\"{text}\"#"),
            Self::In(all) => format!("{left} in {{{}}}", all.iter().map(|t| format!("\"{t}\"")).collect::<Vec<_>>().join(" ")),
            Self::Prefix(text) => format!("starts_with({left}, \"{text}\")"),
            Self::Wildcard(text) => format!("{left} wildcard r\"{text}\""),
        }
    }

    /// Of each element of an array.
    fn write_mapped(&self, array: &str) -> String {
        self.write(&format!("{array}[*]"))
    }

    fn holds(&self, text: &str) -> bool {
        match self {
            Self::Order(op, other) => order(op, &text, &other.as_str()),
            Self::Contains(part) => text.contains(part.as_str()),
            Self::In(all) => all.iter().any(|t| t == text),
            Self::Prefix(prefix) => text.starts_with(prefix.as_str()),
            Self::Wildcard(pattern) => wildcard(&pattern.to_lowercase(), &text.to_lowercase()),
        }
    }
}

/// By trying everything that a star could stand for.
fn wildcard(pattern: &str, text: &str) -> bool {
    match pattern.chars().next() {
        None => text.is_empty(),
        Some('*') => (0..=text.len()).any(|at| wildcard(&pattern[1..], &text[at..])),
        Some(c) => text.starts_with(c) && wildcard(&pattern[1..], &text[1..]),
    }
}

fn order<T: PartialOrd>(op: &str, a: &T, b: &T) -> bool {
    match op {
        "eq" | "==" => a == b,
        "ne" | "!=" => a != b,
        "lt" | "<" => a < b,
        "le" | "<=" => a <= b,
        "gt" | ">" => a > b,
        _ => a >= b,
    }
}

fn short() -> impl Strategy<Value = String> {
    "[ab]{0,3}"
}

fn text_op(mapped: bool) -> BoxedStrategy<TextOp> {
    let ops = prop::sample::select(vec!["eq", "==", "ne", "!=", "lt", "<", "le", ">", "ge", ">="]);
    let plain = prop_oneof![
        (ops, short()).prop_map(|(op, text)| TextOp::Order(op, text)),
        short().prop_map(TextOp::Contains),
        prop::collection::vec(short(), 0..12).prop_map(TextOp::In),
        "\\*?[ab]{0,2}(\\*[ab]{1,2}){0,2}\\*?".prop_filter("no double stars", |t| !t.contains("**")).prop_map(TextOp::Wildcard),
    ];
    // A function over an array that is missing is missing itself, which is another matter than an empty one.
    if mapped { plain.boxed() } else { prop_oneof![3 => plain, 1 => short().prop_map(TextOp::Prefix)].boxed() }
}

fn expr() -> impl Strategy<Value = Expr> {
    let field = prop::sample::select(vec![Field::Host, Field::Path, Field::LowerHost, Field::Header, Field::Tail, Field::Both]);
    let octet = 0u8..40;
    let ip = prop_oneof![
        octet.clone().prop_map(IpOp::Eq),
        octet.clone().prop_map(IpOp::Net),
        (octet.clone(), octet).prop_map(|(a, b)| IpOp::Range(a.min(b), a.max(b))),
    ];
    let words = prop::sample::select(vec!["and", "or", "xor"]);
    let ops = prop::sample::select(vec!["eq", "ne", "<", "<=", ">", "ge"]);
    let leaf = prop_oneof![
        4 => (field.clone(), text_op(false)).prop_map(|(f, op)| Expr::Text(f, op)),
        1 => (field, ops, 0i64..8).prop_map(|(f, op, n)| Expr::Len(f, op, n)),
        1 => ip.prop_map(Expr::Ip),
        2 => (any::<bool>(), "[ab]", text_op(true)).prop_map(|(any, key, op)| Expr::Args(any, key, op)),
        1 => (any::<bool>(), words, text_op(true), text_op(true)).prop_map(|(any, w, a, b)| Expr::Zip(any, w, a, b)),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let several = prop::collection::vec(inner.clone(), 2..4);
        prop_oneof![
            several.clone().prop_map(Expr::And),
            several.clone().prop_map(Expr::Or),
            several.prop_map(Expr::Xor),
            inner.prop_map(|e| Expr::Not(Box::new(e))),
        ]
    })
}

fn request() -> impl Strategy<Value = Request> {
    let args = prop::collection::vec(("[ab]", short()), 0..4);
    ("[ab]{1,3}", "/[ab]{0,3}", prop::option::of(short()), args, 0u8..40)
        .prop_map(|(host, path, header, args, last_octet)| Request { host, path, header, args, last_octet })
}

#[test]
fn the_compiled_language_is_the_naive_one() {
    let mut runner = TestRunner::deterministic();
    let cases = (expr(), request(), request(), any::<u64>());
    let (mut yes, mut no) = (0, 0);
    for _ in 0..4_000 {
        let (expr, first, second, mut bits) = cases.new_tree(&mut runner).unwrap().current();
        let text = expr.write(&mut || {
            bits = bits.rotate_left(1);
            bits & 1 == 1
        });
        let filter = super::compile(&text).unwrap_or_else(|e| panic!("{}", e.draw(&text)));
        for request in [first, second] {
            let query: Vec<_> = request.args.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let headers: Vec<_> = request.header.iter().map(|v| ("x-a", v)).collect();
            let asked = serde_json::json!({
                "url": format!("http://{}{}?{}", request.host, request.path, query.join("&")),
                "headers": headers,
                "ip": Ipv4Addr::new(192, 0, 2, request.last_octet),
            });
            let expected = expr.holds(&request);
            assert_eq!(super::holds(&filter, asked.as_object().unwrap().clone()), expected, "{text}\n{request:?}");
            *(if expected { &mut yes } else { &mut no }) += 1;
        }
    }
    assert!(yes > 1_000 && no > 1_000, "{yes} {no}: both have to be tried");
}
