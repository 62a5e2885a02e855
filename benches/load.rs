//! CPU time per proxied request: Portolan, bare Pingora (`examples/bare.rs`) and nginx, side by side.
//!
//! ```text
//! cargo build --profile bench --example bare && cargo bench --bench load
//! ```
//!
//! Portolan and nginx do the same job: country by `X-Forwarded-For`, the country's region with the others
//! behind it for failover, the same headers, an access log in JSON. The three take turns within one run,
//! because on a shared machine the same program measures up to a tenth apart from one hour to the next;
//! only the ratios travel. `PORTOLAN_BENCH_ROUNDS` (5) and `PORTOLAN_BENCH_SECONDS` (4, per subject and
//! round) change how long it takes. Needs Debian's nginx, libnginx-mod-http-geoip2 and wrk.

#![expect(clippy::print_stdout, reason = "a bench reports to a terminal")]

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

const NGINX: &str = "/usr/sbin/nginx";
const WRK: &str = "/usr/bin/wrk";
const GEOIP2: &str = "/usr/lib/nginx/modules/ngx_http_geoip2_module.so";
const PACKAGES: [(&str, &str); 3] = [(NGINX, "nginx"), (WRK, "wrk"), (GEOIP2, "libnginx-mod-http-geoip2")];
const DATABASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/geoip/country.mmdb");

const REGIONS: [&str; 5] = ["us_east", "eu_west", "ap_northeast", "ap_southeast", "sa_east"];
/// One client for each of `REGIONS`: from the US, Germany, Japan, Australia, Brazil.
const CLIENTS: [&str; 5] = ["8.8.8.8", "91.0.0.1", "202.32.115.1", "139.130.4.5", "200.160.2.3"];
const BODY: usize = 1024;
const WARM_UP: u64 = 2;
/// For a start, an answer, or wrk's end beyond its duration: what takes longer has hung.
const PATIENCE: Duration = Duration::from_secs(10);
/// A subject that comes this near to what wrk gets from the origin itself is not what limited the run.
const LIMIT: f64 = 0.85;

/// Limits on a connection's requests are out of the way: Pingora has none.
const ORIGIN_CONF: &str = r#"
worker_processes 1;
events { worker_connections 4096; }
http {
    @temp@
    access_log off;
    keepalive_requests 100000000;
    @servers@
}"#;
const NGINX_CONF: &str = r#"
load_module "@module@";
worker_processes @workers@;
events { worker_connections 4096; }
http {
    @temp@
    geoip2 "@database@" { $country default=XX source=$http_x_forwarded_for country_code; }
    map $country $pool { default us_east; US us_east; CA us_east; GB eu_west; FR eu_west; DE eu_west;
        JP ap_northeast; CN ap_northeast; AU ap_southeast; BR sa_east; }
    @upstreams@
    log_format lines escape=json '{"time":"$time_iso8601","request_id":"$request_id","client":"$http_x_forwarded_for",'
        '"country":"$country","method":"$request_method","host":"$host","path":"$uri","status":$status,'
        '"bytes":$body_bytes_sent,"route":"everything","region":"$pool","attempts":[{"region":"$pool",'
        '"upstream":"$upstream_addr","status":"$upstream_status","s":"$upstream_response_time"}],"total_s":$request_time}';
    access_log nginx.access.log lines buffer=64k flush=1s;
    keepalive_requests 100000000;
    proxy_http_version 1.1; proxy_set_header Connection "";
    proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Host $http_host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Request-Id $request_id; proxy_set_header CF-Connecting-IP $http_x_forwarded_for;
    proxy_set_header CF-IPCountry $country; proxy_set_header Portolan-Country $country;
    proxy_set_header Portolan-Region $pool;
    proxy_connect_timeout 1s; proxy_send_timeout 5s; proxy_read_timeout 5s;
    proxy_next_upstream error timeout http_502 http_503 http_504;
    add_header X-Request-Id $request_id; add_header Portolan-Region $pool;
    server { listen 127.0.0.1:@port@; location / { proxy_pass http://$pool; } }
}"#;
/// As `config/demo.yaml`, with the access log on.
const PORTOLAN_CONF: &str = r#"
listeners: [{ address: "127.0.0.1:@port@" }]
admin: { address: "127.0.0.1:@admin@" }
client: { trusted_proxies: [127.0.0.0/8], country_database: "@database@" }
regions:
  us_east: { upstreams: ["http://127.0.0.1:@us_east@"] }
  eu_west: { upstreams: ["http://127.0.0.1:@eu_west@"] }
  ap_northeast: { upstreams: ["http://127.0.0.1:@ap_northeast@"] }
  ap_southeast: { upstreams: ["http://127.0.0.1:@ap_southeast@"] }
  sa_east: { upstreams: ["http://127.0.0.1:@sa_east@"] }
routes:
  - name: everything
    steering:
      countries: { US: us_east, CA: us_east, GB: eu_west, FR: eu_west, DE: eu_west,
        JP: ap_northeast, CN: ap_northeast, AU: ap_southeast, BR: sa_east }
      default: us_east
      failover: [us_east, eu_west, ap_northeast, ap_southeast, sa_east]
access_log: { path: "@dir@/portolan.access.log" }
"#;
/// wrk counts a status from 400 on as an error; nothing here answers with one from 300 to 399.
const SCRIPT: &str = r#"
local requests, turn = {}, 0
function init(args)
    for i, ip in ipairs({ @clients@ }) do
        requests[i] = wrk.format("GET", "/", { ["X-Forwarded-For"] = ip })
    end
end
function request()
    turn = turn % #requests + 1
    return requests[turn]
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
        println!("skipped: a debug build says nothing about speed; use `cargo bench --bench load`");
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
    let rounds = setting("PORTOLAN_BENCH_ROUNDS", 5)?;
    let seconds = setting("PORTOLAN_BENCH_SECONDS", 4)?;
    let dir = tempfile::tempdir()?;
    let lab = Lab::new(dir.path())?;
    let [o1, o2, o3, o4, o5, portolan, admin, bare, nginx] = free_ports()?;
    let origins = [o1, o2, o3, o4, o5];
    let _origin = lab.origin(origins)?;
    let subjects = [
        Subject { name: "portolan", port: portolan, geo: true, process: lab.portolan(portolan, admin, origins)? },
        Subject { name: "bare pingora", port: bare, geo: false, process: lab.bare(bare, o1)? },
        Subject { name: "nginx", port: nginx, geo: true, process: lab.nginx(nginx, origins)? },
    ];
    for subject in &subjects {
        subject.verify()?;
        lab.wrk(subject.port, WARM_UP)?;
    }
    let direct = lab.wrk(o1, seconds)?;
    let mut samples = [(); 3].map(|()| Vec::new());
    for round in 1..=rounds {
        print!("round {round} of {rounds}, CPU us per request:");
        for (subject, samples) in subjects.iter().zip(&mut samples) {
            let sample = lab.measure(subject, seconds)?;
            print!("  {} {:.1}", subject.name, sample.cpu_us);
            samples.push(sample);
        }
        println!();
    }
    report(&subjects, &samples, &direct)
}

/// Prints the table; an error where it would say nothing.
fn report(subjects: &[Subject; 3], samples: &[Vec<Sample>; 3], direct: &Run) -> Result<()> {
    let [.., nginx] = samples;
    let base = median(nginx, |s| s.cpu_us);
    let mut fastest: f64 = 0.0;
    println!("\nmedians     CPU us/request    min-max  x nginx  requests/s  p50 ms  p99 ms   cores  wrk cores");
    for (subject, samples) in subjects.iter().zip(samples) {
        let of = |value: fn(&Sample) -> f64| median(samples, value);
        let (cpu, cores, rate) = (of(|s| s.cpu_us), of(|s| s.cpu_us * s.run.rate / 1e6), of(|s| s.run.rate));
        let (p50, p99, wrk) = (of(|s| s.run.p50_ms), of(|s| s.run.p99_ms), of(|s| s.run.wrk_cores));
        let min = samples.iter().map(|s| s.cpu_us).fold(f64::INFINITY, f64::min);
        let max = samples.iter().map(|s| s.cpu_us).fold(0.0, f64::max);
        let (name, span, ratio) = (subject.name, format!("{min:.1}-{max:.1}"), cpu / base);
        println!("{name:<12}{cpu:>14.1}{span:>11}{ratio:>9.2}{rate:>12.0}{p50:>8.2}{p99:>8.2}{cores:>8.2}{wrk:>11.2}");
        fastest = fastest.max(rate);
    }
    let Run { rate, p50_ms, p99_ms, wrk_cores, .. } = direct;
    println!("{:<46}{rate:>12.0}{p50_ms:>8.2}{p99_ms:>8.2}{:>8}{wrk_cores:>11.2}", "origin alone", "");
    // A subject that waits for work polls for fewer events at a time and pays more for each, so CPU time per
    // request compares only subjects that were kept busy. wrk against the origin alone is the most that the
    // rest of the chain can do.
    let share = fastest / rate;
    println!("the fastest reached {:.0} % of the origin's own requests/s; valid up to {:.0} %", share * 100.0, LIMIT * 100.0);
    ensure!(share <= LIMIT, "VOID: wrk or the origin was the limit, not the subjects");
    Ok(())
}

fn median(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<_> = samples.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    let middle = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    (middle((values.len().max(1) - 1) / 2) + middle(values.len() / 2)) / 2.0
}

/// What one run of wrk saw.
struct Run {
    requests: f64,
    rate: f64,
    p50_ms: f64,
    p99_ms: f64,
    wrk_cores: f64,
}

struct Sample {
    cpu_us: f64,
    run: Run,
}

struct Subject {
    name: &'static str,
    port: u16,
    /// Chooses the region; otherwise everything goes to the first one.
    geo: bool,
    process: Process,
}

impl Subject {
    /// Does it do the job that is about to be measured?
    fn verify(&self) -> Result<()> {
        for (client, region) in CLIENTS.into_iter().zip(REGIONS) {
            let region = if self.geo { region } else { REGIONS[0] };
            let answer = get(self.port, client).with_context(|| format!("VOID: {} does not answer {client}", self.name))?;
            let has = |name: &str| answer.contains(&format!("\r\n{name}: {region}\r\n"));
            let whole = answer.starts_with("http/1.1 200 ") && answer.ends_with(&"x".repeat(BODY));
            let right = has("x-origin-region") && (!self.geo || has("portolan-region"));
            ensure!(whole && right, "VOID: {} should send {client} to {region}:\n{answer}", self.name);
        }
        Ok(())
    }
}

/// Where everything is, and how it is started.
struct Lab<'a> {
    dir: &'a Path,
    bare: PathBuf,
    script: PathBuf,
    ticks_per_second: f64,
}

impl<'a> Lab<'a> {
    fn new(dir: &'a Path) -> Result<Self> {
        for (file, package) in PACKAGES {
            ensure!(Path::new(file).exists(), "{file} is missing: install Debian's package `{package}`");
        }
        let bare = Path::new(env!("CARGO_BIN_EXE_portolan")).with_file_name("examples").join("bare");
        ensure!(bare.exists(), "the example `bare` is missing: run `cargo build --profile bench --example bare`");
        let ticks = Command::new("getconf").arg("CLK_TCK").output().context("getconf cannot be run")?;
        let clients = CLIENTS.map(|ip| format!("\"{ip}\"")).join(", ");
        let script = write(dir, "load.lua", SCRIPT, &[("clients", &clients)])?;
        Ok(Self { dir, bare, script, ticks_per_second: String::from_utf8(ticks.stdout)?.trim().parse()? })
    }

    fn origin(&self, ports: [u16; 5]) -> Result<Process> {
        let body = "x".repeat(BODY);
        let server = |(region, port): (&str, u16)| {
            format!(
                "server {{ listen 127.0.0.1:{port}; location / {{ add_header X-Origin-Region {region}; return 200 {body}; }} }}\n"
            )
        };
        let servers: String = REGIONS.into_iter().zip(ports).map(server).collect();
        self.start_nginx("origin", ORIGIN_CONF, &[("servers", &servers)])?.listening(&ports)
    }

    fn portolan(&self, port: u16, admin: u16, origins: [u16; 5]) -> Result<Process> {
        let [o1, o2, o3, o4, o5] = &origins;
        let own: &[(&str, &dyn Display)] =
            &[("port", &port), ("admin", &admin), ("database", &DATABASE), ("dir", &self.dir.display())];
        let regions: [(&str, &dyn Display); 5] =
            [("us_east", o1), ("eu_west", o2), ("ap_northeast", o3), ("ap_southeast", o4), ("sa_east", o5)];
        let file = write(self.dir, "portolan.yaml", PORTOLAN_CONF, &[own, &regions[..]].concat())?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_portolan"));
        command.args(["run", "--config"]).arg(file);
        Process::start("portolan", command, self.dir)?.listening(&[port])
    }

    fn bare(&self, port: u16, origin: u16) -> Result<Process> {
        let mut command = Command::new(&self.bare);
        command.args([port, origin].map(|port| format!("127.0.0.1:{port}")));
        Process::start("bare", command, self.dir)?.listening(&[port])
    }

    fn nginx(&self, port: u16, origins: [u16; 5]) -> Result<Process> {
        // A region's own origin first; the others are what Portolan's failover list is.
        let upstream = |region: &str| {
            let backup = |other: &str| if other == region { "" } else { " backup" };
            let server = |(other, port): (&str, u16)| format!("server 127.0.0.1:{port}{}; ", backup(other));
            let servers: String = REGIONS.into_iter().zip(origins).map(server).collect();
            format!("upstream {region} {{ {servers} keepalive 64; keepalive_requests 100000000; }}\n")
        };
        let (workers, upstreams) = (available_parallelism()?, REGIONS.map(upstream).concat());
        let values: &[(&str, &dyn Display)] =
            &[("module", &GEOIP2), ("workers", &workers), ("database", &DATABASE), ("upstreams", &upstreams), ("port", &port)];
        self.start_nginx("nginx", NGINX_CONF, values)?.listening(&[port])
    }

    fn start_nginx(&self, name: &'static str, template: &str, values: &[(&str, &dyn Display)]) -> Result<Process> {
        // Workers of root's nginx would become `nobody`, who cannot enter the temporary folder.
        let user = if fs::metadata("/proc/self")?.uid() == 0 { "user root;" } else { "" };
        let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|kind| format!("{kind}_temp_path {kind};")).concat();
        let mut values = values.to_vec();
        values.push(("temp", &temp));
        let file = write(self.dir, &format!("{name}.conf"), template, &values)?;
        let global = format!("daemon off; {user} pid {name}.pid; error_log {name}.log; worker_rlimit_nofile 8192;");
        let mut command = Command::new(NGINX);
        command.arg("-c").arg(file).arg("-p").arg(self.dir).arg("-g").arg(global);
        Process::start(name, command, self.dir)
    }

    /// Loads `port`. Any error, of a socket or of HTTP, ends the benchmark.
    fn wrk(&self, port: u16, seconds: u64) -> Result<Run> {
        let mut command = Command::new(WRK);
        command.args(["-t1", "-c64", &format!("-d{seconds}s"), "-s"]).arg(&self.script).arg(format!("http://127.0.0.1:{port}/"));
        let before = ticks("self", WAITED_FOR)?;
        let output = Process::start("wrk", command, self.dir)?.finish(Duration::from_secs(seconds) + PATIENCE)?;
        let wrk = (ticks("self", WAITED_FOR)? - before) as f64 / self.ticks_per_second;
        let line = output.lines().find_map(|l| l.strip_prefix("TOTALS ")).context("VOID: wrk told no totals")?;
        let totals: HashMap<&str, f64> = serde_json::from_str(line)?;
        let total = |name: &str| totals.get(name).copied().with_context(|| format!("wrk told no `{name}`"));
        for kind in ["connect", "read", "write", "timeout", "status"] {
            ensure!(total(kind)? == 0.0, "VOID: {} errors of kind `{kind}` at port {port}", total(kind)?);
        }
        let (requests, elapsed) = (total("requests")?, total("us")? / 1e6);
        ensure!(requests > 0.0 && elapsed > 0.0, "VOID: no requests at port {port}");
        let (p50_ms, p99_ms) = (total("p50")? / 1e3, total("p99")? / 1e3);
        Ok(Run { requests, rate: requests / elapsed, p50_ms, p99_ms, wrk_cores: wrk / elapsed })
    }

    fn measure(&self, subject: &Subject, seconds: u64) -> Result<Sample> {
        let main = subject.process.child.id();
        let pids = family(main)?;
        let used = || pids.iter().map(|pid| ticks(pid, OWN)).sum::<Result<u64>>().context("VOID: a process is gone");
        let before = used()?;
        let run = self.wrk(subject.port, seconds)?;
        let cpu = (used()? - before) as f64 / self.ticks_per_second;
        ensure!(pids == family(main)?, "VOID: the processes of {} changed", subject.name);
        Ok(Sample { cpu_us: cpu * 1e6 / run.requests, run })
    }
}

/// A process of ours that ends with us.
struct Process {
    name: &'static str,
    child: Child,
    output: PathBuf,
}

impl Process {
    fn start(name: &'static str, mut command: Command, dir: &Path) -> Result<Self> {
        let output = dir.join(format!("{name}.output"));
        let file = File::create(&output)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("{name} cannot be started"))?;
        Ok(Self { name, child, output })
    }

    /// Returns once it listens on all of `ports`.
    fn listening(mut self, ports: &[u16]) -> Result<Self> {
        let until = Instant::now() + PATIENCE;
        while !ports.iter().all(|port| TcpStream::connect(("127.0.0.1", *port)).is_ok()) {
            let status = self.ended(Duration::from_millis(20));
            if status.is_some() || Instant::now() > until {
                bail!("{} does not listen ({status:?}):\n{}", self.name, fs::read_to_string(&self.output)?);
            }
        }
        Ok(self)
    }

    /// Its exit status, if it ends in time.
    fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + within;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < until => sleep(Duration::from_millis(20)),
                status => return status.ok().flatten(),
            }
        }
    }

    /// Waits for its end and returns what it printed.
    fn finish(&mut self, within: Duration) -> Result<String> {
        let status = self.ended(within).with_context(|| format!("VOID: {} does not end", self.name))?;
        let output = fs::read_to_string(&self.output)?;
        ensure!(status.success(), "VOID: {} ended with {status}:\n{output}", self.name);
        Ok(output)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that was waited for has given its id back: it may be somebody else's by now.
        if self.ended(Duration::ZERO).is_some() {
            return;
        }
        // The standard library only knows SIGKILL, and killing nginx's master would leave its workers behind:
        // ask first, by the shell's own `kill`. SIGINT is "at once" to all of ours.
        let signal = |name: &str, pids: Vec<u32>| {
            let pids = pids.iter().map(u32::to_string);
            Command::new("sh").args(["-c", "kill -s \"$0\" \"$@\"", name]).args(pids).stderr(Stdio::null()).status()
        };
        // Whether a signal arrived shows in whether the process ends.
        let pid = self.child.id();
        let _ = signal("INT", vec![pid]);
        if self.ended(Duration::from_secs(3)).is_none() {
            let _ = signal("KILL", family(pid).unwrap_or_else(|_| vec![pid]));
            let _ = self.ended(PATIENCE);
        }
    }
}

/// Positions in [`stat`]: the parent; user and system time of its own; the same of children waited for.
const PARENT: usize = 1;
const OWN: usize = 11;
const WAITED_FOR: usize = 13;

/// `/proc/PID/stat` from field 3 of proc(5) on; what is no number is 0.
fn stat(pid: impl Display) -> Result<Vec<u64>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Field 2, the name, may hold blanks and brackets.
    let (_, fields) = text.rsplit_once(')').context("/proc/*/stat cannot be understood")?;
    Ok(fields.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect())
}

fn ticks(pid: impl Display, which: usize) -> Result<u64> {
    Ok(stat(pid)?.iter().skip(which).take(2).sum())
}

/// A process and its children, sorted.
fn family(main: u32) -> Result<Vec<u32>> {
    let mut pids = vec![main];
    for entry in fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        // One that ends while it is looked at is nobody's child.
        let is_child = |pid: &u32| stat(pid).is_ok_and(|s| s.get(PARENT) == Some(&u64::from(main)));
        pids.extend(pid.filter(is_child));
    }
    pids.sort_unstable();
    Ok(pids)
}

/// One response, whole and in lower case: headers may be written either way.
fn get(port: u16, client: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = format!("GET / HTTP/1.1\r\nHost: bench.example\r\nX-Forwarded-For: {client}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.to_ascii_lowercase())
}

/// Writes a file in which `@name@` is replaced by the value of that name.
fn write(dir: &Path, name: &str, template: &str, values: &[(&str, &dyn Display)]) -> Result<PathBuf> {
    let fill = |text: String, (key, value): &(&str, &dyn Display)| text.replace(&format!("@{key}@"), &value.to_string());
    let file = dir.join(name);
    fs::write(&file, values.iter().fold(template.to_owned(), fill))?;
    Ok(file)
}

/// Ports that nobody has; all bound at once, so that they differ.
fn free_ports() -> Result<[u16; 9]> {
    let mut ports = [0; 9];
    for (port, listener) in ports.iter_mut().zip([(); 9].map(|()| TcpListener::bind("127.0.0.1:0"))) {
        *port = listener?.local_addr()?.port();
    }
    Ok(ports)
}

fn setting(name: &str, default: u64) -> Result<u64> {
    let Ok(text) = std::env::var(name) else { return Ok(default) };
    let value = text.parse().ok().filter(|value| (1..=60).contains(value));
    value.with_context(|| format!("{name} must be a whole number from 1 to 60"))
}
