//! Throws mutated expressions at the compiler, and what compiles at a request, for as long as it is told to.
//! It ends with a panic, or with what it tried.
//!
//! ```text
//! cargo run --release --example fuzz_rules -- SECONDS
//! ```

use std::net::IpAddr;
use std::time::{Duration, Instant};

use portolan::client::place::Databases;
use portolan::client::standing::Standing;
use portolan::explain::{Asked, Question};
use portolan::lists::Lists;
use portolan::request::Moment;
use portolan::rules::view::{Asker, Target};
use portolan::rules::{Filter, Limits, Phase, Scope, View};

/// Expressions and pieces of them.
const SEEDS: [&str; 24] = [
    "(http.request.uri.path contains \"/admin\" and not ip.src in {192.0.2.0/24})",
    "any(lower(http.request.headers[\"accept\"][*])[*] matches \"a[\\\"']b\") xor ssl",
    "lookup_json_string(http.request.body.raw, \"a\", 1, \"b\") eq r##\"x\"##",
    "is_timed_hmac_valid_v0(\"k\", http.request.uri, 10, http.request.timestamp.sec, 3, \"s\")",
    "regex_replace(http.host, \"(a+)(b)?\", \"${1}$$\") wildcard \"*\\\\*x\"",
    "all((http.request.uri.args[\"q\"][*] eq \"1\" or http.request.uri.args.values[*] gt \"2\"))",
    "http.request.body.multipart.filenames[0][0] in {\"a\" 61:62 r\"c\"}",
    "split(http.cookie, \";\", 9)[1] ne concat(http.host, \"x\", http.referer)",
    "len(http.request.cookies[\"a\"]) & 0x10 == -1",
    "cidr(ip.src, 24, 64) in {10/8 ::1 1.2.3.4..1.2.3.9}",
    "url_decode(http.request.uri.query, \"ru\") strict wildcard \"*=*&*\"",
    "substring(http.user_agent, -5, 3) ~ \"(?i)x{1,3}$\"",
    "not ",
    " and ",
    " || ",
    "(",
    ")",
    "[*]",
    "\"",
    "\\",
    "{",
    "}",
    "..",
    "\u{0}é",
];

fn main() {
    let seconds = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(60);
    let question = Question {
        ip: IpAddr::from([192, 0, 2, 1]),
        method: "POST".to_owned(),
        url: "http://a.example/x/%2e./y.PHP?q=1&q=%32&r".to_owned(),
        headers: vec![
            ("accept".to_owned(), "a\"b, text/html".to_owned()),
            ("cookie".to_owned(), "a=1; b=%20; c".to_owned()),
            ("content-type".to_owned(), "multipart/form-data; boundary=b".to_owned()),
        ],
        body: Some("--b\r\nContent-Disposition: form-data; name=\"f\"; filename=\"x\"\r\n\r\nv\r\n--b--".to_owned()),
        down: Vec::new(),
        response: None,
    };
    let asked = match Asked::new(&question) {
        Ok(asked) => asked,
        Err(error) => return eprintln!("{error}"),
    };
    let facts = asked.facts(question.ip, 64 << 10);
    let (databases, lists, standing) = (Databases::default(), Lists::default(), Standing::default());
    let place = databases.lookup(question.ip);
    let (ip, now) = (question.ip, Moment::default());
    let asker = Asker { ip, trusted_peer: false, place: &place, databases: &databases, lists: &lists, standing: &standing, now };
    let target = Target::new(&facts);
    let scope = Scope { phase: Phase::Body, lists: &lists, limits: Limits::default() };
    // What compiled is worth mutating further.
    let mut corpus: Vec<String> = SEEDS.map(str::to_owned).to_vec();
    let (mut tried, mut compiled) = (0u64, 0u64);
    let (started, mut slowest) = (Instant::now(), (Duration::ZERO, String::new()));
    while started.elapsed() < Duration::from_secs(seconds) {
        let text = mutated(&corpus);
        let before = Instant::now();
        if let Ok(filter) = Filter::new(&text, scope) {
            let view = View::new(&facts, &target, asker);
            filter.matches(&view);
            filter.operands(&view, false);
            compiled += 1;
            if corpus.len() < 5_000 && text.len() < 1_000 {
                corpus.push(text.clone());
            }
        }
        if before.elapsed() > slowest.0 {
            slowest = (before.elapsed(), text);
        }
        tried += 1;
    }
    eprintln!("{tried} expressions tried, {compiled} compiled and run; the slowest took {:?}: {}", slowest.0, slowest.1);
}

fn mutated(corpus: &[String]) -> String {
    let pick = || corpus.get(fastrand::usize(..corpus.len())).cloned().unwrap_or_default();
    let mut text = pick();
    for _ in 0..fastrand::usize(1..5) {
        let at = |text: &str| text.floor_char_boundary(fastrand::usize(..=text.len()));
        let (a, b) = (at(&text), at(&text));
        let (a, b) = (a.min(b), a.max(b));
        match fastrand::u8(..5) {
            0 => text.replace_range(a..b, ""),
            1 => text.insert_str(a, &pick()),
            2 => text.replace_range(a..b, &pick()),
            3 => text.insert(a, char::from(fastrand::u8(32..127))),
            _ => {
                let piece = text.get(a..b).unwrap_or_default().to_owned();
                text.insert_str(a, &piece);
            }
        }
    }
    text
}
