//! Ten times what a region can answer, from a thousand addresses, against a hundred good clients: what these still get,
//! what it costs the proxy, and what is left of it afterwards.
//!
//! `cargo bench --bench overload`
//!
//! The region answers 1,000 requests a second: 20 at once, 20 ms each, first come, first served. Attackers ask 10,000
//! times a second. A good client's request counts if it is answered with 200 within a second.
//! `PORTOLAN_BENCH_SECONDS` (20) is how long the attack lasts.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a bench reports to a terminal, and ends where it cannot go on")]

use std::net::{SocketAddr, TcpListener as StdListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

const AT_ONCE: usize = 20;
const SERVICE: Duration = Duration::from_millis(20);
const GOOD: u32 = 100;
const ATTACKERS: u32 = 1_000;
/// Of each attacker; what is not answered by then takes another connection.
const ATTACK: Duration = Duration::from_millis(100);
/// Connections of one attacker.
const CONNECTIONS: usize = 8;
/// Of each good client.
const CALM: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(1);

/// How the proxy defends itself.
const DEFENCES: [(&str, &str, &str); 3] = [
    ("nothing", "", ""),
    (
        "adaptive bound, signed-in people before anonymous ones",
        "adaptive: {}, queue: { size: 64, timeout: 100ms }",
        "overload:
  max_requests_per_client: 20
  classes: [{ name: signed-in, expression: 'has_key(http.request.cookies, \"session\")' }, { name: anonymous, share: 70 }]
",
    ),
    (
        "adaptive bound, 30 requests in 10 s for each address, then a minute of nothing",
        "adaptive: {}, queue: { size: 64, timeout: 100ms }",
        "limits: [{ id: flood, requests: 30, period: 10s, mitigation_timeout: 60s }]\n",
    ),
];

struct Proxy {
    child: Child,
    address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    async fn start(origin: SocketAddr, region: &str, more: &str) -> Self {
        let dir = tempfile::TempDir::new().unwrap();
        let [address, admin] = [0, 1].map(|_| StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        let yaml = format!(
            "listeners: [{{ address: \"{address}\" }}]
admin: {{ address: \"{admin}\" }}
client: {{ trusted_proxies: [127.0.0.0/8], country_database: {}/geoip/country.mmdb }}
regions: {{ a: {{ upstreams: [\"http://{origin}\"], {region} }} }}
routes: [{{ name: all }}]
access_log: {{ path: \"off\" }}
{more}",
            env!("CARGO_MANIFEST_DIR")
        );
        let file = dir.path().join("portolan.yaml");
        std::fs::write(&file, yaml).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_portolan"))
            .args(["run", "--config"])
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while TcpStream::connect(address).await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
        Self { child, address, _dir: dir }
    }

    /// Resident memory in MiB, open files.
    fn size(&self) -> (u64, usize) {
        let proc = format!("/proc/{}", self.child.id());
        let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        let resident: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        (resident >> 10, std::fs::read_dir(format!("{proc}/fd")).unwrap().count())
    }
}

/// Answers as it can.
async fn origin() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let workers = Arc::new(Semaphore::new(AT_ONCE));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let workers = workers.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0; 8 << 10];
                while matches!(stream.read(&mut buffer).await, Ok(n) if n > 0) {
                    let worker = workers.acquire().await.unwrap();
                    sleep(SERVICE).await;
                    drop(worker);
                    if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Asks once on a connection; the status, if it is answered.
async fn ask(stream: &mut TcpStream, ip: &str, cookie: &str) -> Option<u16> {
    let request = format!("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {ip}\r\n{cookie}\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = [0; 4 << 10];
    let n = stream.read(&mut answer).await.ok().filter(|n| *n > 0)?;
    std::str::from_utf8(answer.get(9..12).filter(|_| n > 12)?).ok()?.parse().ok()
}

#[derive(Default)]
struct Counts {
    good: AtomicU64,
    asked: AtomicU64,
    attacks: AtomicU64,
    over: AtomicBool,
}

async fn good(address: SocketAddr, n: u32, counts: Arc<Counts>) {
    let ip = format!("203.0.{}.{}", 113 + n / 250, n % 250);
    sleep(CALM.mul_f64(f64::from(n) / f64::from(GOOD))).await;
    let mut every = interval(CALM);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stream = None;
    while !counts.over.load(Relaxed) {
        every.tick().await;
        counts.asked.fetch_add(1, Relaxed);
        let answer = async {
            let mut open = match stream.take() {
                Some(stream) => stream,
                None => TcpStream::connect(address).await.ok()?,
            };
            let status = ask(&mut open, &ip, "Cookie: session=abc\r\n").await?;
            Some((status, open))
        };
        if let Ok(Some((status, open))) = timeout(PATIENCE, answer).await {
            stream = Some(open);
            counts.good.fetch_add(u64::from(status == 200), Relaxed);
        }
    }
}

async fn attacker(address: SocketAddr, n: u32, counts: Arc<Counts>, until: Instant) {
    let ip: Arc<str> = format!("10.{}.{}.7", n / 256, n % 256).into();
    sleep(ATTACK.mul_f64(f64::from(n) / f64::from(ATTACKERS))).await;
    let idle = Arc::new(parking_lot::Mutex::new(Vec::<TcpStream>::new()));
    let open = Arc::new(Semaphore::new(CONNECTIONS));
    let mut every = interval(ATTACK);
    while Instant::now() < until {
        every.tick().await;
        let Ok(permit) = open.clone().try_acquire_owned() else { continue };
        let (idle, ip, counts) = (idle.clone(), ip.clone(), counts.clone());
        tokio::spawn(async move {
            let kept = idle.lock().pop();
            let stream = match kept {
                Some(stream) => Some(stream),
                None => TcpStream::connect(address).await.ok(),
            };
            counts.attacks.fetch_add(1, Relaxed);
            if let Some(mut stream) = stream
                && let Ok(Some(_)) = timeout(Duration::from_secs(5), ask(&mut stream, &ip, "")).await
            {
                idle.lock().push(stream);
            }
            drop(permit);
        });
    }
}

/// What good clients got in so many seconds, in percent, and the largest the proxy was.
async fn phase(proxy: &Proxy, counts: &Counts, seconds: u64) -> (f64, u64, usize) {
    counts.good.store(0, Relaxed);
    counts.asked.store(0, Relaxed);
    let (mut memory, mut files) = (0, 0);
    for _ in 0..seconds * 2 {
        sleep(Duration::from_millis(500)).await;
        let (m, f) = proxy.size();
        (memory, files) = (memory.max(m), files.max(f));
    }
    let asked = counts.asked.load(Relaxed).max(1);
    (counts.good.load(Relaxed) as f64 * 100.0 / asked as f64, memory, files)
}

async fn play(seconds: u64) {
    for (name, region, more) in DEFENCES {
        let proxy = Proxy::start(origin().await, region, more).await;
        let counts = Arc::new(Counts::default());
        for n in 0..GOOD {
            tokio::spawn(good(proxy.address, n, counts.clone()));
        }
        sleep(Duration::from_secs(2)).await;
        let before = phase(&proxy, &counts, 5).await;
        let until = Instant::now() + Duration::from_secs(seconds);
        for n in 0..ATTACKERS {
            tokio::spawn(attacker(proxy.address, n, counts.clone(), until));
        }
        let first = phase(&proxy, &counts, 5).await;
        counts.attacks.store(0, Relaxed);
        let during = phase(&proxy, &counts, seconds.saturating_sub(5)).await;
        let rate = counts.attacks.load(Relaxed) / seconds.saturating_sub(5).max(1);
        // Five seconds for what is under way to end.
        let settling = phase(&proxy, &counts, 5).await;
        let after = phase(&proxy, &counts, 5).await;
        println!("{name}: {rate} attacks a second");
        for (what, (goodput, memory, files)) in
            [("before", before), ("the first 5 s", first), ("then", during), ("the 5 s after", settling), ("later", after)]
        {
            println!("  {what:<14} good clients get {goodput:>5.1} %, {memory} MiB, {files} open files");
        }
        counts.over.store(true, Relaxed);
    }
}

fn main() {
    if cfg!(debug_assertions) {
        println!("skipped: a debug build says nothing about load; use `cargo bench --bench overload`");
        return;
    }
    let seconds = std::env::var("PORTOLAN_BENCH_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(play(seconds));
}
