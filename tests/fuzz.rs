//! Every parser of ours, fed with what nobody would write: none may panic, and none may hang.
//!
//! The inputs under `tests/fuzz/TARGET` are mutated: bytes change, go, come, and parts of other inputs take their place. Each
//! run tries a few of them. For more: `PORTOLAN_FUZZ_SECONDS=600 cargo test --test fuzz`, for each target. An input that
//! breaks one is written beside the others, where it is tried first from then on.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test ends where it cannot go on")]
#![expect(clippy::print_stdout, reason = "a fuzzer reports to a terminal")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue};
use portolan::config::Paths;
use portolan::connections::{Frames, Gate, Policy};
use portolan::lists::Lists;
use portolan::memory::Memory;
use portolan::reload::{Known, build};
use portolan::rules::{Filter, Limits, Phase, Scope};
use portolan::signing::Key;

/// How many mutations are tried where nobody asks for more.
const FEW: usize = 2_000;

fn corpus(target: &str) -> (PathBuf, Vec<Vec<u8>>) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz").join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let inputs: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    assert!(!inputs.is_empty(), "{target} has nothing to begin with");
    (folder, inputs)
}

/// One more input, made of what there is.
fn mutated(inputs: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    const ODD: [&[u8]; 16] = [
        b"\r\n",
        b"\0",
        b"\xff\xff\xff\xff",
        b"-1",
        b"99999999999999999999",
        b"%2e%2e%2f",
        b"${env:X}",
        b"{{",
        b"\"",
        b"\\",
        b"*",
        b"\xc3\x28",
        b",,,",
        b"((((((((",
        b"not not ",
        b":",
    ];
    let pick = |random: &mut fastrand::Rng| inputs[random.usize(..inputs.len())].clone();
    let mut input = pick(random);
    for _ in 0..random.usize(1..6) {
        let at = random.usize(..=input.len());
        let until = (at + random.usize(..24)).min(input.len());
        match random.u8(..6) {
            0 if at < input.len() => input[at] ^= 1 << random.u8(..8),
            1 if at < input.len() => input[at] = random.u8(..),
            2 => drop(input.drain(at..until)),
            3 => drop(input.splice(at..at, ODD[random.usize(..ODD.len())].iter().copied())),
            4 => {
                let other = pick(random);
                let from = random.usize(..=other.len());
                let to = (from + random.usize(..64)).min(other.len());
                input.splice(at..until, other[from..to].iter().copied());
            }
            _ => {
                let again = input[at..until].to_vec();
                input.splice(at..at, again);
            }
        }
        input.truncate(64 << 10);
    }
    input
}

fn fuzz(target: &str, try_it: impl Fn(&[u8]) + std::panic::RefUnwindSafe) {
    let (folder, inputs) = corpus(target);
    let seconds = std::env::var("PORTOLAN_FUZZ_SECONDS").ok().map(|text| text.parse::<u64>().unwrap());
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut random = fastrand::Rng::with_seed(seconds.map_or(7, |_| fastrand::u64(..)));
    let attempt = |input: &[u8]| {
        if std::panic::catch_unwind(|| try_it(input)).is_err() {
            let file = folder.join(format!("broken-{:016x}", fastrand::u64(..)));
            std::fs::write(&file, input).unwrap();
            panic!("{target} breaks at {}", file.display());
        }
    };
    inputs.iter().for_each(|input| attempt(input));
    let mut tried = 0;
    while until.map_or(tried < FEW, |until| Instant::now() < until) {
        attempt(&mutated(&inputs, &mut random));
        tried += 1;
    }
    println!("{target}: {tried} inputs");
}

/// One part of an input, line by line, as headers of this name.
fn headers(name: &'static str, input: &[u8]) -> HeaderMap {
    let values = input.split(|b| *b == b'\n').filter_map(|line| HeaderValue::from_bytes(line).ok());
    values.map(|value| (http::HeaderName::from_static(name), value)).collect()
}

#[test]
fn configurations() {
    let dir = tempfile::TempDir::new().unwrap();
    let (file, memory) = (dir.path().join("portolan.yaml"), Memory::new(Key::new(b"a key of the fuzzer's")));
    let (file, memory) = (&file, std::panic::AssertUnwindSafe(&memory));
    fuzz("config", |input| {
        std::fs::write(file, input).unwrap();
        let paths = Paths { file: file.clone(), environment: None };
        if let Err(failed) = build(&paths, &Known::default(), *memory) {
            assert!(!failed.problems.is_empty());
            failed.problems.iter().for_each(|problem| drop(problem.render(false)));
        }
    });
}

#[test]
fn expressions() {
    let lists = std::panic::AssertUnwindSafe(Lists::default());
    fuzz("expression", |input| {
        let Ok(source) = std::str::from_utf8(input) else { return };
        if let Err(error) = Filter::new(source, Scope { phase: Phase::Body, lists: &lists.0, limits: Limits::default() }) {
            drop(error.draw(source));
        }
    });
}

#[test]
fn requests() {
    fuzz("http1", |input| {
        let policy = Arc::new(Policy::default());
        // However it is cut, the same passes.
        let read = |step: usize| {
            let (mut gate, mut waits, mut passed) = (Gate::new(policy.clone()), Vec::new(), Vec::new());
            for part in input.chunks(step) {
                waits.extend_from_slice(part);
                loop {
                    match gate.feed(&waits) {
                        Ok(0) => break,
                        Ok(n) => passed.extend(waits.drain(..n)),
                        Err(fault) => return (passed, gate.stand_in(&waits), Some(fault.kind)),
                    }
                }
            }
            (passed, Vec::new(), None)
        };
        let (whole, _, fault) = read(input.len().max(1));
        let (cut, _, cut_fault) = read(7);
        assert_eq!(fault, cut_fault);
        assert!(whole.starts_with(&cut) || cut.starts_with(&whole));
    });
}

#[test]
fn frames() {
    fuzz("http2", |input| {
        let read = |step: usize| {
            let mut frames = Frames::new(Arc::new(Policy::default()));
            let read = input.chunks(step).try_for_each(|part| frames.feed(part, 0.0));
            let _ = (frames.is_inside(), frames.cannot_unpack());
            read
        };
        assert_eq!(read(input.len().max(1)), read(5));
    });
}

#[test]
fn proxy_headers() {
    let runtime = std::panic::AssertUnwindSafe(tokio::runtime::Builder::new_current_thread().build().unwrap());
    fuzz("proxy", |input| {
        let mut rest = input;
        let read = runtime.block_on(portolan::proxy::introduced::introduced(&mut rest));
        assert!(read.is_err() || rest.len() < input.len());
    });
}

#[test]
fn replays() {
    fuzz("replay", |input| {
        let known = |name: &str| (name == "eu").then_some(portolan::regions::RegionId(0));
        let _ = portolan::upstream::replay::Replay::parse(&String::from_utf8_lossy(input), known);
    });
}

#[test]
fn cache_headers() {
    fuzz("cache-control", |input| {
        let _ = portolan::cache::fields::Directives::of(&headers("cache-control", input));
        for text in String::from_utf8_lossy(input).lines() {
            let _ = (portolan::cache::fields::seconds(text), portolan::cache::fields::date(text));
        }
        let _ = (portolan::cache::vary::fields(&headers("vary", input)), portolan::cache::fields::age(&headers("age", input)));
    });
}

#[test]
fn cookies_and_preferences() {
    fuzz("cookie", |input| {
        let cookies = headers("cookie", input);
        for name in ["stay", "", "a"] {
            let _ = portolan::request::cookie(cookies.values(), name);
        }
        let text = String::from_utf8_lossy(input);
        let _ = portolan::request::accepted(text.lines()).count();
        let _ = (portolan::rules::normalise::path(&text), portolan::rules::normalise::query(&text));
        let _ = portolan::request::argument(Some(&text), "to");
    });
}

#[test]
fn databases() {
    let shipped = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/geoip/country.mmdb")).unwrap();
    let shipped = &shipped;
    // An input says what is changed in the shipped database: places (four bytes each) and bytes.
    let few = AtomicUsize::new(0);
    fuzz("mmdb", |input| {
        // Each is 8 MB to read.
        if few.fetch_add(1, Ordering::Relaxed) > 60 && std::env::var_os("PORTOLAN_FUZZ_SECONDS").is_none() {
            return;
        }
        let mut bytes = shipped.clone();
        for change in input.chunks_exact(5) {
            let at = u32::from_be_bytes([change[0], change[1], change[2], change[3]]) as usize;
            // From either end: the tree is at the beginning, the rest of what is read first at the end.
            let at = if at.is_multiple_of(2) { at % bytes.len() } else { bytes.len() - 1 - at % bytes.len().min(4_096) };
            bytes[at] = change[4];
        }
        if let Ok(database) = portolan::client::country::CountryDatabase::new("changed".into(), bytes) {
            for ip in ["81.2.69.160", "8.8.8.8", "2001:4860::1", "0.0.0.0", "255.255.255.255"] {
                let _ = database.lookup(ip.parse().unwrap());
            }
        }
    });
}

#[test]
fn lists() {
    fuzz("list", |input| {
        let Ok(text) = std::str::from_utf8(input) else { return };
        let _ = portolan::lists::file::addresses(text);
        let _ = portolan::lists::file::lines(text, |line| line.parse::<u32>().ok());
    });
}
