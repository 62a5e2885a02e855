//! The cache beside nginx's and Varnish's: CPU time per hit, the cost of a miss, memory per object, a purge by tag.
//!
//! ```text
//! cargo bench --bench cache
//! ```
//!
//! All answer the same object from memory (nginx: from the page cache), with an access log in Portolan and nginx; they
//! take turns within one run, because on a shared machine only ratios travel. `PORTOLAN_BENCH_ROUNDS` (3) and
//! `PORTOLAN_BENCH_SECONDS` (3) change how long it takes. Needs Debian's nginx and wrk; Varnish is left out where it is
//! not installed.

#![expect(clippy::print_stdout, reason = "a bench reports to a terminal")]

mod lab;

use std::fmt::Display;
use std::fs;
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    NGINX, PATIENCE, Process, Run, WRK, family, free_ports, median, setting, start_nginx, ticks_per_second, used, write, wrk,
};
use portolan::cache::purge::{Purge, Purges, What};

const VARNISH: &str = "/usr/sbin/varnishd";
const ORIGIN: &str = r#"
worker_processes 1;
events { worker_connections 4096; }
http {
    @temp@
    access_log off;
    keepalive_requests 100000000;
    server {
        listen 127.0.0.1:@port@;
        add_header Cache-Control "max-age=3600";
        location /1k { return 200 @small@; }
        location /64k { alias @dir@/64k; }
        location /2m { alias @dir@/2m; }
    }
}"#;
const NGINX_CONF: &str = r#"
worker_processes @workers@;
events { worker_connections 4096; }
http {
    @temp@
    sendfile on;
    access_log nginx.access.log combined buffer=64k flush=1s;
    keepalive_requests 100000000;
    proxy_cache_path @dir@/nginx-cache levels=1:2 keys_zone=c:64m max_size=1g;
    upstream o { server 127.0.0.1:@origin@; keepalive 64; keepalive_requests 100000000; }
    server {
        listen 127.0.0.1:@port@;
        location / {
            proxy_cache c; proxy_cache_key $scheme$host$request_uri; proxy_cache_lock on;
            proxy_http_version 1.1; proxy_set_header Connection ""; proxy_pass http://o;
            add_header X-Cache $upstream_cache_status;
        }
    }
}"#;
const PORTOLAN: &str = r#"
listeners: [{ address: "127.0.0.1:@port@" }]
admin: { address: "127.0.0.1:@admin@" }
regions: { o: { upstreams: ["http://127.0.0.1:@origin@"] } }
routes: [{ name: all, cache: { enabled: @enabled@ } }]
cache: { memory: 1GiB, disk: { path: "@dir@/portolan-cache-@port@", size: 1GiB } }
access_log: { path: "@dir@/portolan.access.log" }
"#;
/// `@target@` is an expression of Lua's that gives the path of a request.
const SCRIPT: &str = r#"
local n = 0
function request()
    n = n + 1
    return wrk.format("GET", @target@)
end
function done(summary, latency, _)
    local e = summary.errors
    io.write(string.format(
        'TOTALS {"requests":%d,"us":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d,"status":%d,"p50":%d,"p99":%d}\n',
        summary.requests, summary.duration, e.connect, e.read, e.write, e.timeout, e.status,
        latency:percentile(50), latency:percentile(99)))
end
"#;

fn main() -> ExitCode {
    if cfg!(debug_assertions) {
        println!("skipped: a debug build says nothing about speed; use `cargo bench --bench cache`");
        return ExitCode::SUCCESS;
    }
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    for (file, package) in [(NGINX, "nginx"), (WRK, "wrk")] {
        ensure!(Path::new(file).exists(), "{file} is missing: install Debian's package `{package}`");
    }
    purges();
    let rounds = setting("PORTOLAN_BENCH_ROUNDS", 3)?;
    let seconds = setting("PORTOLAN_BENCH_SECONDS", 3)?;
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let [origin, portolan, admin, off, off_admin, nginx, varnish] = free_ports()?;
    for (name, size) in [("64k", 64 << 10), ("2m", 2 << 20)] {
        fs::write(dir.join(name), "x".repeat(size))?;
    }
    let small = "x".repeat(1024);
    let shown = dir.display();
    let _origin =
        start_nginx(dir, "origin", ORIGIN, &[("port", &origin), ("small", &small), ("dir", &shown)])?.listening(&[origin])?;
    let mut subjects = vec![
        Subject { name: "portolan", port: portolan, process: start(dir, portolan, admin, origin, true)? },
        Subject { name: "nginx", port: nginx, process: cache_of_nginx(dir, nginx, origin)? },
    ];
    match Path::new(VARNISH).exists() {
        true => subjects.push(Subject { name: "varnish", port: varnish, process: cache_of_varnish(dir, varnish, origin)? }),
        false => println!("Varnish is not installed: it is left out"),
    }
    let disk = "what is on disk: 2 MiB";
    for (what, target) in [("a hit of 1 KiB", "/1k"), ("a hit of 64 KiB", "/64k"), (disk, "/2m")] {
        let script = write(dir, "hit.lua", SCRIPT, &[("target", &format!("\"{target}\""))])?;
        for subject in &subjects {
            subject.warm(target)?;
        }
        compare(what, dir, &script, &subjects, rounds, seconds)?;
    }
    // Every path is another: nothing is found.
    let without = Subject { name: "cache off", port: off, process: start(dir, off, off_admin, origin, false)? };
    let with = subjects.swap_remove(0);
    let target = format!("string.format(\"/1k/{}/%d\", n)", std::process::id());
    let script = write(dir, "miss.lua", SCRIPT, &[("target", &target)])?;
    compare("a miss of 1 KiB", dir, &script, &[with, without], rounds, seconds)?;
    memory(dir, origin)
}

struct Subject {
    name: &'static str,
    port: u16,
    process: Process,
}

impl Subject {
    /// The object is stored, and answered from there.
    fn warm(&self, target: &str) -> Result<()> {
        for _ in 0..20 {
            get(self.port, target)?;
        }
        let head = get(self.port, target)?;
        // nginx says HIT, Varnish gives two numbers, that of the request and that of the one that stored it.
        let hit = head.contains("portolan; hit") || head.contains("x-cache: hit") || head.lines().any(two_numbers);
        ensure!(hit, "VOID: {} does not answer {target} from its cache:\n{head}", self.name);
        Ok(())
    }
}

fn two_numbers(line: &str) -> bool {
    line.strip_prefix("x-varnish: ").is_some_and(|numbers| numbers.split(' ').count() == 2)
}

fn start(dir: &Path, port: u16, admin: u16, origin: u16, enabled: bool) -> Result<Process> {
    let values: &[(&str, &dyn Display)] =
        &[("port", &port), ("admin", &admin), ("origin", &origin), ("enabled", &enabled), ("dir", &dir.display())];
    let file = write(dir, &format!("portolan-{port}.yaml"), PORTOLAN, values)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_portolan"));
    command.args(["run", "--config"]).arg(file);
    Process::start(if enabled { "portolan" } else { "portolan-off" }, command, dir)?.listening(&[port])
}

fn cache_of_nginx(dir: &Path, port: u16, origin: u16) -> Result<Process> {
    let workers = available_parallelism()?;
    let values: &[(&str, &dyn Display)] = &[("workers", &workers), ("port", &port), ("origin", &origin), ("dir", &dir.display())];
    start_nginx(dir, "nginx", NGINX_CONF, values)?.listening(&[port])
}

fn cache_of_varnish(dir: &Path, port: u16, origin: u16) -> Result<Process> {
    let mut command = Command::new(VARNISH);
    command.args(["-F", "-n"]).arg(dir.join("varnish")).args(["-a", &format!("127.0.0.1:{port}")]);
    command.args(["-b", &format!("127.0.0.1:{origin}"), "-s", "malloc,1G", "-j", "none"]);
    Process::start("varnish", command, dir)?.listening(&[port])
}

/// CPU per request of each in turn.
fn compare(what: &str, dir: &Path, script: &Path, subjects: &[Subject], rounds: u64, seconds: u64) -> Result<()> {
    let mut samples: Vec<Vec<(f64, Run)>> = subjects.iter().map(|_| Vec::new()).collect();
    for subject in subjects {
        wrk(dir, script, subject.port, 1)?;
    }
    for _ in 0..rounds {
        for (subject, samples) in subjects.iter().zip(&mut samples) {
            let pids = family(subject.process.child.id())?;
            let before = used(&pids)?;
            let run = wrk(dir, script, subject.port, seconds)?;
            let cpu = (used(&pids)? - before) as f64 / ticks_per_second()?;
            samples.push((cpu * 1e6 / run.requests, run));
        }
    }
    println!("\n{what}: CPU us/request   min-max  requests/s  p50 ms  p99 ms");
    for (subject, samples) in subjects.iter().zip(&samples) {
        let of = |value: fn(&(f64, Run)) -> f64| median(samples, value);
        let min = samples.iter().map(|s| s.0).fold(f64::INFINITY, f64::min);
        let max = samples.iter().map(|s| s.0).fold(0.0, f64::max);
        let (name, cpu, rate) = (subject.name, of(|s| s.0), of(|s| s.1.rate));
        let (p50, p99, wrk) = (of(|s| s.1.p50_ms), of(|s| s.1.p99_ms), of(|s| s.1.wrk_cores));
        println!(
            "  {name:<12}{cpu:>10.1} {:>14} {rate:>10.0} {p50:>7.2} {p99:>7.2}   (wrk {wrk:.2} cores)",
            format!("{min:.1}-{max:.1}")
        );
    }
    Ok(())
}

/// What an object of 1 KiB costs beside its body: resident memory before and after many.
fn memory(dir: &Path, origin: u16) -> Result<()> {
    const OBJECTS: u64 = 100_000;
    let [port, admin] = free_ports()?;
    let process = start(dir, port, admin, origin, true)?;
    let resident = || -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/statm", process.child.id()))?;
        let pages: u64 = text.split(' ').nth(1).and_then(|n| n.parse().ok()).context("statm cannot be understood")?;
        Ok(pages * 4096)
    };
    get(port, "/1k/first")?;
    let before = resident()?;
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = vec![0; 64 << 10];
    for n in 0..OBJECTS {
        stream.write_all(format!("GET /1k/{n} HTTP/1.1\r\nHost: bench.example\r\n\r\n").as_bytes())?;
        let mut got = Vec::new();
        // The body is the only place with so many of the letter in a row.
        while !got.ends_with(&[b'x'; 64]) || got.len() < 1024 + 100 {
            let read = stream.read(&mut buffer)?;
            ensure!(read > 0, "VOID: the connection ended");
            got.extend_from_slice(buffer.get(..read).unwrap_or_default());
        }
    }
    let each = (resident()? - before) as f64 / OBJECTS as f64;
    println!("\nmemory: {each:.0} bytes an object of 1,024, {:.0} beside its body", each - 1024.0);
    Ok(())
}

/// Purging 10,000 tags, of which each of a million objects may carry one, and what it costs each hit afterwards.
fn purges() {
    let purges = Purges::default();
    let at = 1_000;
    let tags: Vec<Purge> = (0..10_000).map(|n| Purge { what: What::Tag(format!("tag-{n}")), soft: false, at }).collect();
    let began = Instant::now();
    purges.apply(&tags);
    let applied = began.elapsed();
    const HITS: u32 = 1_000_000;
    let began = Instant::now();
    let mut gone = 0u32;
    for n in 0..HITS {
        let tag = format!("tag-{}", n % 1_000_000);
        gone += u32::from(purges.check("shop.example/a/path", [tag.as_str()].into_iter(), 999).is_some());
    }
    let each: Duration = began.elapsed() / HITS;
    println!(
        "purge: 10,000 tags at once {applied:.1?}; then each hit is held against them in {each:.0?} ({gone} of a million are gone)"
    );
    black_box(gone);
}

/// One response's head, in lower case.
fn get(port: u16, target: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").context("VOID: no answer")?;
    Ok(String::from_utf8_lossy(answer.get(..end).unwrap_or_default()).to_ascii_lowercase())
}
