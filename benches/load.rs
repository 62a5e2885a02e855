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

mod lab;

use std::fmt::Display;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread::available_parallelism;

use anyhow::{Context, Result, ensure};
use lab::{
    NGINX, PATIENCE, Process, Run, WRK, family, free_ports, median, setting, start_nginx, ticks_per_second, used, write, wrk,
};

const GEOIP2: &str = "/usr/lib/nginx/modules/ngx_http_geoip2_module.so";
const PACKAGES: [(&str, &str); 3] = [(NGINX, "nginx"), (WRK, "wrk"), (GEOIP2, "libnginx-mod-http-geoip2")];
const DATABASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/geoip/country.mmdb");

const REGIONS: [&str; 5] = ["us_east", "eu_west", "ap_northeast", "ap_southeast", "sa_east"];
/// One client for each of `REGIONS`: from the US, Germany, Japan, Australia, Brazil.
const CLIENTS: [&str; 5] = ["8.8.8.8", "91.0.0.1", "202.32.115.1", "139.130.4.5", "200.160.2.3"];
const BODY: usize = 1024;
const WARM_UP: u64 = 2;
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
        wrk(lab.dir, &lab.script, subject.port, WARM_UP)?;
    }
    let direct = wrk(lab.dir, &lab.script, o1, seconds)?;
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
}

impl<'a> Lab<'a> {
    fn new(dir: &'a Path) -> Result<Self> {
        for (file, package) in PACKAGES {
            ensure!(Path::new(file).exists(), "{file} is missing: install Debian's package `{package}`");
        }
        let bare = Path::new(env!("CARGO_BIN_EXE_portolan")).with_file_name("examples").join("bare");
        ensure!(bare.exists(), "the example `bare` is missing: run `cargo build --profile bench --example bare`");
        let clients = CLIENTS.map(|ip| format!("\"{ip}\"")).join(", ");
        let script = write(dir, "load.lua", SCRIPT, &[("clients", &clients)])?;
        Ok(Self { dir, bare, script })
    }

    fn origin(&self, ports: [u16; 5]) -> Result<Process> {
        let body = "x".repeat(BODY);
        let server = |(region, port): (&str, u16)| {
            format!(
                "server {{ listen 127.0.0.1:{port}; location / {{ add_header X-Origin-Region {region}; return 200 {body}; }} }}\n"
            )
        };
        let servers: String = REGIONS.into_iter().zip(ports).map(server).collect();
        start_nginx(self.dir, "origin", ORIGIN_CONF, &[("servers", &servers)])?.listening(&ports)
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
        start_nginx(self.dir, "nginx", NGINX_CONF, values)?.listening(&[port])
    }

    fn measure(&self, subject: &Subject, seconds: u64) -> Result<Sample> {
        let main = subject.process.child.id();
        let pids = family(main)?;
        let before = used(&pids)?;
        let run = wrk(self.dir, &self.script, subject.port, seconds)?;
        let cpu = (used(&pids)? - before) as f64 / ticks_per_second()?;
        ensure!(pids == family(main)?, "VOID: the processes of {} changed", subject.name);
        Ok(Sample { cpu_us: cpu * 1e6 / run.requests, run })
    }
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
