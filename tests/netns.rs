//! Three regions in network namespaces of their own, and what clients see while one of them is killed, vanishes,
//! resets, loses its link, stalls, flaps or moves.
//!
//! It needs `ip` and the right to make namespaces, and says so where it has not. What is asserted are outcomes, counts
//! and their order, never times: a machine may be busy. Times are printed (`--nocapture`) as `figure: …`.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test ends where it cannot go on, and reports what it measured"
)]

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

/// Longer than anything here takes; a test that meets it has hung.
const PATIENCE: Duration = Duration::from_secs(60);
/// Tells a copy of this program to be an origin, and how it begins.
const ORIGIN: &str = "PORTOLAN_NETNS_ORIGIN";
const PORT: u16 = 9000;
/// The length of a body that drips.
const LONG: usize = 100_000;

/// One test at a time: they share addresses and names of namespaces, and two cores.
static TURN: Mutex<()> = Mutex::new(());

// --- The origin: this very program, started again inside a namespace. ---

/// How an origin behaves; `/_set` changes it while it runs.
#[derive(Debug)]
struct Manner {
    region: String,
    delay_ms: AtomicU64,
    resets: AtomicBool,
}

impl Manner {
    /// Takes `key=value` pairs.
    fn set<'a>(&self, pairs: impl Iterator<Item = &'a str>) {
        for (key, value) in pairs.filter_map(|pair| pair.split_once('=')) {
            match key {
                "delay_ms" => self.delay_ms.store(value.parse().unwrap(), SeqCst),
                "resets" => self.resets.store(value == "1", SeqCst),
                _ => {}
            }
        }
    }
}

/// No test, but what the others start inside a namespace.
#[test]
fn origin() {
    let Ok(region) = std::env::var(ORIGIN) else { return };
    // Who started this holds the other end of standard input. When that one ends, however it ends, so does this.
    thread::spawn(|| {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    let manner = Arc::new(Manner { region, delay_ms: AtomicU64::new(0), resets: AtomicBool::new(false) });
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
    for stream in listener.incoming().map_while(Result::ok) {
        let manner = manner.clone();
        // A client that leaves is no concern of an origin's.
        thread::spawn(move || serve(stream, &manner).ok());
    }
}

/// Answers the requests of one connection.
fn serve(mut stream: TcpStream, manner: &Manner) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(first) = head(&mut reader)?.first() {
        let path = first.split(' ').nth(1).unwrap_or("/").to_owned();
        let (path, query) = path.split_once('?').unwrap_or((&path, ""));
        if path == "/_set" {
            manner.set(query.split('&'));
        } else if manner.resets.load(SeqCst) {
            // Without lingering a close is a reset.
            return socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        } else {
            thread::sleep(Duration::from_millis(manner.delay_ms.load(SeqCst)));
        }
        if path == "/drip" {
            drip(&mut stream, &manner.region)?;
        } else {
            let region = &manner.region;
            stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{region}", region.len()).as_bytes())?;
        }
    }
    Ok(())
}

/// The region's name again and again, little by little: about five seconds.
fn drip(stream: &mut TcpStream, region: &str) -> io::Result<()> {
    stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {LONG}\r\n\r\n").as_bytes())?;
    for _ in 0..LONG / 1_000 {
        stream.write_all(region.repeat(1_000).as_bytes())?;
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The lines of a message's header; none where the connection ended.
fn head(reader: &mut impl BufRead) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(Vec::new());
        }
        match line.trim_end() {
            "" => return Ok(lines),
            line => lines.push(line.to_owned()),
        }
    }
}

// --- The regions. ---

/// Runs `ip`; an error is what it said.
fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output().map_err(|e| e.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// A namespace with an origin in it, and a link to it. Dropping it takes all of that away.
#[derive(Debug)]
struct Region {
    name: char,
    namespace: String,
    /// Our end of the link. The other is `far`.
    link: String,
    /// Of our end.
    near: Ipv4Addr,
    address: SocketAddr,
    /// How long its origin takes, in milliseconds.
    delay: u64,
    origin: Option<(Child, Option<ChildStdin>)>,
}

impl Region {
    fn new(name: char, place: u32, delay: u64) -> Result<Self, String> {
        let id = std::process::id();
        // Sixteen addresses of 198.18.0.0/15, which is for tests like these, for each process.
        let network = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (id % 8_192) * 16 + place * 4;
        let [near, far] = [1, 2].map(|host| Ipv4Addr::from(network + host));
        let (namespace, link) = (format!("pt-{id}-{name}"), format!("pt{id}{name}"));
        ip(&format!("netns add {namespace}"))?;
        let region = Self { name, namespace, link, near, address: (far, PORT).into(), delay, origin: None };
        let (namespace, link) = (&region.namespace, &region.link);
        ip(&format!("link add {link} type veth peer name far netns {namespace} address 02:00:00:00:00:02"))?;
        ip(&format!("addr add {near}/30 dev {link}"))?;
        ip(&format!("link set {link} up"))?;
        // What vanishes must vanish for good: without this the kernel asks for the address, and then says "unreachable".
        ip(&format!("neigh replace {far} lladdr 02:00:00:00:00:02 nud permanent dev {link}"))?;
        ip(&format!("-n {namespace} addr add {far}/30 dev far"))?;
        region.link(true);
        Ok(region)
    }

    /// Starts its origin, and waits until it answers as it should.
    fn start(&mut self) {
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.namespace])
            .arg(std::env::current_exe().unwrap())
            .args(["origin", "--exact", "--nocapture"])
            .env(ORIGIN, self.name.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        self.origin = Some((child, stdin));
        let address = self.address;
        until("an origin listens", || TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok());
        self.set(&format!("delay_ms={}", self.delay));
    }

    /// kill -9.
    fn kill(&mut self) {
        if let Some((mut child, _)) = self.origin.take() {
            // `ip` has become the origin: it is the same process.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Changes how its origin behaves.
    fn set(&self, what: &str) {
        assert_eq!(Client::new(self.address).get(&format!("/_set?{what}")).unwrap().status, 200);
    }

    /// Plugs the link in, or pulls it.
    fn link(&self, up: bool) {
        ip(&format!("-n {} link set far {}", self.namespace, if up { "up" } else { "down" })).unwrap();
    }

    /// A black hole: what comes from us gets no answer, not even a refusal. Or the end of it. Returns when that began.
    fn vanish(&self, gone: bool) -> SystemTime {
        let began = SystemTime::now();
        let verb = if gone { "add" } else { "del" };
        ip(&format!("-n {} route {verb} blackhole {}/32", self.namespace, self.near)).unwrap();
        let seen = TcpStream::connect_timeout(&self.address, Duration::from_millis(500)).map_err(|e| e.kind()).err();
        assert_eq!(seen, gone.then_some(ErrorKind::TimedOut));
        began
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.kill();
        // The link goes with its namespace, but not at once.
        let _ = ip(&format!("link del {}", self.link));
        let _ = ip(&format!("netns del {}", self.namespace));
    }
}

/// Regions a, b and c, and this test's turn.
struct World {
    a: Region,
    b: Region,
    c: Region,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    /// Three regions whose origins take so many milliseconds; nothing where that is not permitted.
    fn start(delays: [u64; 3]) -> Option<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        sweep();
        let regions: Result<Vec<_>, _> = ['a', 'b', 'c']
            .into_iter()
            .zip(0..)
            .zip(delays)
            .map(|((name, place), delay)| Region::new(name, place, delay))
            .collect();
        let mut regions = match regions {
            Ok(regions) => regions,
            Err(why) => {
                println!("skipped: network namespaces are not permitted here ({})", why.trim());
                return None;
            }
        };
        regions.iter_mut().for_each(Region::start);
        let [a, b, c] = regions.try_into().unwrap();
        Some(Self { a, b, c, _turn: turn })
    }

    /// The three regions, each with `more`, and these routes.
    fn config(&self, more: &str, routes: &str) -> String {
        let region = |r: &Region| format!("  {}: {{ upstreams: [\"http://{}\"], slow_start: 2s, {more} }}\n", r.name, r.address);
        format!("regions:\n{}{}{}routes:\n{routes}", region(&self.a), region(&self.b), region(&self.c))
    }
}

/// Takes away what processes that were killed have left.
fn sweep() {
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix("pt-").and_then(|n| n.split('-').next());
        if owner.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

// --- The proxy. ---

const CHECKED: &str = "health_check: { path: /, interval: 500ms, timeout: 300ms }";
const TIMEOUTS: &str = "timeouts: { connect: 300ms, first_byte: 1s, idle: 2s, total: 10s }";

/// With health checks and without, for people.
const BOTH: [(&str, &str); 2] = [("", "without health checks"), (CHECKED, "with health checks")];

/// One route: a, then b, then c.
fn a_then_b_then_c() -> String {
    format!("  - {{ name: all, steering: {{ default: a, failover: [b, c] }}, {TIMEOUTS} }}\n")
}

/// A running `portolan`; dropping it kills it.
struct Edge {
    child: Child,
    address: SocketAddr,
    admin: SocketAddr,
    dir: tempfile::TempDir,
    log: Option<JoinHandle<String>>,
}

impl Edge {
    fn start(yaml: &str) -> Self {
        let dir = tempfile::TempDir::new().unwrap();
        let access = "access_log: { path: access.log }\n";
        let ports = "listeners: [{ address: \"127.0.0.1:0\" }]\nadmin: { address: \"127.0.0.2:0\" }\n";
        std::fs::write(dir.path().join("portolan.yaml"), format!("{ports}{access}{yaml}")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_portolan"))
            .args(["run", "--config"])
            .arg(dir.path().join("portolan.yaml"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (tell, told) = mpsc::channel();
        let log = thread::spawn(move || {
            let mut log = String::new();
            for line in stderr.lines().map_while(Result::ok) {
                log.push_str(&format!("{line}\n"));
                if line.contains("serving") {
                    tell.send(line).unwrap();
                }
            }
            log
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut edge = Self { child, address: nowhere, admin: nowhere, dir, log: Some(log) };
        let line = told.recv_timeout(PATIENCE).unwrap();
        let after = |key: &str| line.split(key).nth(1).unwrap().split([']', ' ']).next().unwrap().parse().unwrap();
        (edge.address, edge.admin) = (after("listeners=["), after("admin="));
        edge
    }

    fn client(&self) -> Client {
        Client::new(self.address)
    }

    /// The sum of the lines of `/metrics` in which all of this stands.
    fn metric(&self, parts: &[&str]) -> f64 {
        let text = Client::new(self.admin).get("/metrics").unwrap().text();
        let lines = text.lines().filter(|l| !l.starts_with('#') && parts.iter().all(|p| l.contains(p)));
        lines.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Attempts in a region so far.
    fn attempts(&self, region: char) -> f64 {
        self.metric(&["portolan_upstream_attempts_total{", &format!("region=\"{region}\"")])
    }

    fn healthy(&self, region: char) -> bool {
        self.metric(&["portolan_region_healthy{", &format!("region=\"{region}\"")]) == 1.0
    }

    /// Requests that failed in `region` before they were served, from the access log: when each was over, and how long
    /// it had waited there.
    fn waited(&self, region: char) -> Vec<(SystemTime, Duration)> {
        // The log is written in batches.
        thread::sleep(Duration::from_millis(300));
        let log = std::fs::read_to_string(self.dir.path().join("access.log")).unwrap();
        let mut waited = Vec::new();
        // Of the last line a part may be written yet.
        for line in log.rsplit_once('\n').unwrap_or_default().0.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let attempts = line["attempts"].as_array().unwrap();
            let failed = attempts.iter().filter(|t| t["region"] == region.to_string() && t["outcome"] != "ok");
            let ms: Vec<f64> = failed.map(|t| t["ms"].as_f64().unwrap()).collect();
            if !ms.is_empty() {
                let over = humantime::parse_rfc3339(line["time"].as_str().unwrap()).unwrap();
                waited.push((over, Duration::from_secs_f64(ms.iter().sum::<f64>() / 1_000.0)));
            }
        }
        waited.sort_unstable();
        waited
    }

    /// Sends requests until at least 95 % of 200 in a row were answered by `region`; how long after `since` the first of
    /// these was sent.
    fn until_normal(&self, region: char, since: Instant) -> Duration {
        let mut client = self.client();
        let mut last = VecDeque::new();
        until("shares are normal", || {
            let began = Instant::now();
            last.push_back((began, client.region().unwrap() == region));
            if last.len() > 200 {
                last.pop_front();
            }
            last.len() == 200 && last.iter().filter(|(_, there)| *there).count() >= 190
        });
        last[0].0.saturating_duration_since(since)
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(Ok(log)) = self.log.take().map(JoinHandle::join)
            && thread::panicking()
        {
            println!("{log}");
        }
    }
}

// --- Clients. ---

/// A client that keeps its connection.
struct Client {
    address: SocketAddr,
    host: &'static str,
    stream: Option<BufReader<TcpStream>>,
}

#[derive(Debug)]
struct Reply {
    status: u16,
    body: Vec<u8>,
    /// The body is as long as its header said.
    complete: bool,
}

impl Reply {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    fn new(address: SocketAddr) -> Self {
        Self { address, host: "localhost", stream: None }
    }

    /// From now on asks for this host.
    fn host(mut self, host: &'static str) -> Self {
        self.host = host;
        self
    }

    fn get(&mut self, path: &str) -> io::Result<Reply> {
        self.send("GET", path, || {})
    }

    /// The region that answers `GET /`; anything but a whole 200 is an error.
    fn region(&mut self) -> Result<char, String> {
        let reply = self.get("/").map_err(|e| e.to_string())?;
        match (reply.status, reply.complete, reply.text().chars().next()) {
            (200, true, Some(region)) => Ok(region),
            _ => Err(format!("{reply:?}")),
        }
    }

    /// Sends a request and reads the answer; `midway` is called when the first bytes of its body are there. A connection
    /// that hangs is an error, one that ends in the midst of a body is not.
    fn send(&mut self, method: &str, path: &str, midway: impl FnOnce()) -> io::Result<Reply> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => BufReader::new(TcpStream::connect_timeout(&self.address, PATIENCE)?),
        };
        stream.get_ref().set_read_timeout(Some(PATIENCE / 2))?;
        stream.get_ref().set_nodelay(true)?;
        let host = self.host;
        let length = if method == "POST" { "Content-Length: 0\r\n" } else { "" };
        stream.get_mut().write_all(format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{length}\r\n").as_bytes())?;
        let lines = head(&mut stream)?;
        let first = lines.first().ok_or(ErrorKind::UnexpectedEof)?;
        let status = first.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or(ErrorKind::InvalidData)?;
        let length = lines.iter().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse::<u64>().ok());
        let length = length.ok_or(ErrorKind::InvalidData)?;
        if length > 0 {
            stream.fill_buf()?;
        }
        midway();
        let mut body = Vec::new();
        let complete = match (&mut stream).take(length).read_to_end(&mut body) {
            Ok(read) => read as u64 == length,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Err(e),
            Err(_) => false,
        };
        let goes_on = complete && !lines.iter().any(|l| l.eq_ignore_ascii_case("connection: close"));
        self.stream = goes_on.then_some(stream);
        Ok(Reply { status, body, complete })
    }
}

/// Clients that ask one request after the other.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<Sample>>>,
}

/// What one request met, and how long it took.
type Sample = (Result<char, String>, Duration);

impl Load {
    fn start(clients: usize, client: impl Fn() -> Client) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let run = |(mut client, stop): (Client, Arc<AtomicBool>)| {
            move || {
                let mut samples = Vec::new();
                while !stop.load(SeqCst) {
                    let began = Instant::now();
                    samples.push((client.region(), began.elapsed()));
                }
                samples
            }
        };
        let clients = (0..clients).map(|_| thread::spawn(run((client(), stop.clone())))).collect();
        Self { stop, clients }
    }

    /// Every answer, which must be one of these regions', as often as each gave one; and the longest wait.
    fn finish(mut self, regions: &str) -> (BTreeMap<char, usize>, Duration) {
        self.stop.store(true, SeqCst);
        let samples: Vec<Sample> = std::mem::take(&mut self.clients).into_iter().flat_map(|c| c.join().unwrap()).collect();
        let errors: Vec<_> = samples.iter().filter_map(|(answer, _)| answer.as_ref().err()).collect();
        assert!(errors.is_empty(), "{} of {} requests: {:?}", errors.len(), samples.len(), errors.first());
        let mut counts = BTreeMap::new();
        for region in samples.iter().filter_map(|(answer, _)| answer.as_ref().ok()) {
            *counts.entry(*region).or_insert(0) += 1;
        }
        assert!(counts.keys().all(|region| regions.contains(*region)), "{counts:?}");
        (counts, samples.iter().map(|(_, took)| *took).max().unwrap_or_default())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // A test that failed must not leave clients behind.
        self.stop.store(true, SeqCst);
    }
}

// --- Small things. ---

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "it never came to this: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn seconds(seconds: f32) {
    thread::sleep(Duration::from_secs_f32(seconds));
}

fn figure(what: &str, value: impl std::fmt::Display) {
    println!("figure: {what}: {value}");
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1_000.0)
}

/// Says who waited for the region that died at `death`.
fn tell_who_waited(case: &str, edge: &Edge, region: char, death: SystemTime) {
    let waited = edge.waited(region);
    let longest = waited.iter().map(|(_, wait)| *wait).max().unwrap_or_default();
    let last = waited.last().map_or(Duration::ZERO, |(over, _)| over.duration_since(death).unwrap_or_default());
    let (count, longest, last) = (waited.len(), ms(longest), ms(last));
    figure(
        &format!("{case}, requests that waited for the dead region"),
        format!("{count}, up to {longest}, the last was over after {last}"),
    );
}

// --- The tests. ---

#[test]
fn killing_the_primary_under_load_shows_no_client_an_error() {
    let Some(mut world) = World::start([5, 15, 30]) else { return };
    for (checks, how) in BOTH {
        let case = format!("kill -9, {how}");
        let edge = Edge::start(&world.config(checks, &a_then_b_then_c()));
        let load = Load::start(8, || edge.client());
        seconds(1.0);
        let death = SystemTime::now();
        world.a.kill();
        seconds(3.0);
        tell_who_waited(&case, &edge, 'a', death);
        world.a.start();
        let normal = edge.until_normal('a', Instant::now());
        let (counts, longest) = load.finish("ab");
        assert!(counts.len() == 2, "both served: {counts:?}");
        figure(&format!("{case}, answers, without an error"), format!("{counts:?}, the longest took {}", ms(longest)));
        figure(&format!("{case}, back to normal shares after the restart"), ms(normal));
    }
}

#[test]
fn a_black_hole_costs_little_once_it_is_known() {
    const PAIRS: usize = 600;
    let Some(world) = World::start([5, 5, 5]) else { return };
    let routes = format!(
        "  - {{ name: with, hosts: [with.test, localhost], steering: {{ default: a, failover: [b] }}, {TIMEOUTS} }}
  - {{ name: without, hosts: [without.test], steering: {{ default: b }}, {TIMEOUTS} }}\n"
    );
    for (checks, how) in BOTH {
        let case = format!("black hole, {how}");
        let edge = Edge::start(&world.config(checks, &routes));
        let load = Load::start(8, || edge.client());
        seconds(0.5);
        let death = world.a.vanish(true);
        until("the black hole is known", || !edge.healthy('a'));
        seconds(0.5);
        let (counts, longest) = load.finish("ab");
        tell_who_waited(&case, &edge, 'a', death);
        figure(&format!("{case}, answers, without an error"), format!("{counts:?}, the longest took {}", ms(longest)));

        // The same requests with the black hole in front and without it, by turns; for longer than an ejection lasts.
        let mut sides = ["with.test", "without.test"].map(|host| (edge.client().host(host), Vec::new()));
        let before = edge.attempts('a');
        for _ in 0..PAIRS {
            for (client, took) in &mut sides {
                let began = Instant::now();
                assert_eq!(client.region().unwrap(), 'b');
                took.push(began.elapsed());
            }
        }
        let tried = edge.attempts('a') - before;
        // Without health checks now and then a request has to try it; with them none ever does.
        assert!(tried <= if checks.is_empty() { 5.0 } else { 0.0 }, "{tried} of {PAIRS} requests tried the black hole");
        sides.iter_mut().for_each(|(_, took)| took.sort_unstable());
        let at = |side: usize, part: usize| sides[side].1[(PAIRS - 1) * part / 100].as_secs_f64() * 1_000.0;
        let added = [50, 95, 100].map(|part| format!("{:+.2} ms at P{part}", at(0, part) - at(1, part))).join(", ");
        figure(&format!("{case}, added once ejected"), format!("{added}; {tried} of {PAIRS} requests tried it"));

        world.a.vanish(false);
        let normal = edge.until_normal('a', Instant::now());
        figure(&format!("{case}, back to normal shares after its end"), ms(normal));
    }
}

#[test]
fn a_reset_moves_on_unless_the_request_must_not_be_repeated() {
    let Some(world) = World::start([0, 0, 0]) else { return };
    let edge = Edge::start(&world.config("", &a_then_b_then_c()));
    let mut client = edge.client();
    assert_eq!(client.region().unwrap(), 'a');
    world.a.set("resets=1");
    // On a connection that was used before, and on a new one.
    for _ in 0..2 {
        let reply = client.send("POST", "/", || {}).unwrap();
        assert_eq!(reply.status, 502, "it may have had an effect: {reply:?}");
    }
    let answers: String = (0..50).map(|_| client.region().unwrap()).collect();
    assert_eq!(answers, "b".repeat(50));
    let tried = edge.attempts('a');
    figure("reset, attempts in the region until and after its ejection, for 53 requests", tried);
    assert!(tried <= 10.0, "an ejected region is left alone");
    assert_eq!(client.send("POST", "/", || {}).unwrap().text(), "b", "it is not even tried where it is known to fail");
    world.a.set("resets=0");
    figure("reset, back to normal shares after its end", ms(edge.until_normal('a', Instant::now())));
}

#[test]
fn a_link_that_goes_down_inside_a_body_truncates_it_and_nothing_else() {
    let Some(world) = World::start([0, 0, 0]) else { return };
    let patient = "timeouts: { connect: 300ms, first_byte: 10s, total: 30s }";
    let routes =
        format!("{}  - {{ name: patient, hosts: [patient.test], steering: {{ default: a }}, {patient} }}\n", a_then_b_then_c());
    let edge = Edge::start(&world.config("", &routes));
    let only_a = |reply: &Reply| reply.status == 200 && reply.body.iter().all(|byte| *byte == b'a');

    // Who waits long enough does not notice that a link was gone for a moment.
    let reply = edge.client().host("patient.test").send("GET", "/drip", || {
        world.a.link(false);
        seconds(0.5);
        world.a.link(true);
    });
    let reply = reply.unwrap();
    assert!(reply.complete && only_a(&reply), "{} of {LONG}", reply.body.len());

    let mut cut = Instant::now();
    let mut client = edge.client();
    let reply = client.send("GET", "/drip", || {
        world.a.link(false);
        cut = Instant::now();
    });
    let reply = reply.unwrap();
    figure("link down inside a body, the client's connection is closed after", ms(cut.elapsed()));
    assert!(!reply.complete && !reply.body.is_empty() && reply.body.len() < LONG, "{} of {LONG}", reply.body.len());
    assert!(only_a(&reply), "nothing else was put behind it");
    assert_eq!(
        edge.metric(&["attempts_total{", "region=\"b\""]),
        0.0,
        "what the client has seen the beginning of is not repeated"
    );
    // Others are served meanwhile.
    assert_eq!(client.region().unwrap(), 'b');
}

#[test]
fn a_slow_region_is_left_behind() {
    let Some(world) = World::start([0, 0, 0]) else { return };
    for (checks, how) in BOTH {
        let edge = Edge::start(&world.config(checks, &a_then_b_then_c()));
        let mut client = edge.client();
        assert_eq!(client.region().unwrap(), 'a');
        world.a.set("delay_ms=3000");
        let mut took = Vec::new();
        for _ in 0..20 {
            let began = Instant::now();
            assert_eq!(client.region().unwrap(), 'b');
            took.push(began.elapsed());
        }
        assert!(!edge.healthy('a'));
        let late = edge.metric(&["attempts_total{", "first_byte_timeout", "region=\"a\""]);
        assert!((1.0..=5.0).contains(&late), "{late} waited for it");
        let sum: Duration = took.iter().sum();
        figure(&format!("slow region, {how}"), format!("{late} of 20 requests waited, {} in all", ms(sum)));
        world.a.set("delay_ms=0");
        let normal = edge.until_normal('a', Instant::now());
        figure(&format!("slow region, {how}, back to normal shares after its end"), ms(normal));
    }
}

#[test]
fn a_flapping_region_shows_no_client_an_error() {
    const FLAPS: usize = 4;
    let Some(mut world) = World::start([5, 5, 5]) else { return };
    for (checks, how) in BOTH {
        let edge = Edge::start(&world.config(checks, &a_then_b_then_c()));
        let load = Load::start(4, || edge.client());
        let over = AtomicBool::new(false);
        let changes = thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut seen = vec![true];
                let began = Instant::now();
                while !over.load(SeqCst) && began.elapsed() < PATIENCE {
                    let now = edge.healthy('a');
                    if seen.last() != Some(&now) {
                        seen.push(now);
                    }
                    seconds(0.02);
                }
                seen.len() - 1
            });
            for _ in 0..FLAPS {
                seconds(0.5);
                world.a.kill();
                seconds(0.5);
                world.a.start();
            }
            over.store(true, SeqCst);
            watch.join().unwrap()
        });
        let normal = edge.until_normal('a', Instant::now());
        let (counts, longest) = load.finish("ab");
        assert!(changes <= 2 * FLAPS, "its health changed {changes} times");
        figure(
            &format!("flapping, {how}"),
            format!("{changes} changes of health in {FLAPS} flaps, answers {counts:?}, the longest took {}", ms(longest)),
        );
        figure(&format!("flapping, {how}, back to normal shares after its end"), ms(normal));
    }
}

#[test]
fn the_nearest_of_three_regions_is_found() {
    let Some(world) = World::start([80, 5, 40]) else { return };
    for (checks, how) in BOTH {
        let routes = format!("  - {{ name: all, steering: {{ policy: latency }}, {TIMEOUTS} }}\n");
        let edge = Edge::start(&world.config(checks, &routes));
        if !checks.is_empty() {
            // They tell how far each is before any request does.
            until("every region was checked", || {
                Client::new(edge.admin).get("/status.json").unwrap().text().matches("good: status 200").count() == 3
            });
        }
        let mut client = edge.client();
        let answers: Vec<char> = (0..300).map(|_| client.region().unwrap()).collect();
        let best = answers[250..].iter().filter(|region| **region == 'b').count();
        assert!(best >= 48, "{best} of the last 50: {}", answers.iter().collect::<String>());
        let first = answers.iter().position(|region| *region == 'b').unwrap();
        figure(
            &format!("latency policy, {how}"),
            format!("requests before the first to the nearest: {first}; {best} of the last 50"),
        );
    }
}

/// A name server that knows one address; without one it fails. Any name will do.
fn name_server(address: Arc<Mutex<Option<Ipv4Addr>>>) -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let here = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 1_500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            if let Some(answer) = answer(&buffer[..length], *address.lock().unwrap()) {
                // Who asked may be gone.
                let _ = socket.send_to(&answer, from);
            }
        }
    });
    here
}

/// The answer to a question (RFC 1035, section 4). Whatever else is in it, as EDNS, is not understood.
fn answer(query: &[u8], address: Option<Ipv4Addr>) -> Option<Vec<u8>> {
    let name = query.get(12..)?.iter().position(|byte| *byte == 0)?;
    let question = query.get(12..12 + name + 5)?;
    let is_a = question[name + 1..] == [0, 1, 0, 1];
    let found = address.filter(|_| is_a);
    let code = if address.is_none() { 2 } else { 0 };
    let mut answer = query[..2].to_vec();
    // A response, recursion available; one question, and perhaps an answer.
    answer.extend([0x81, 0x80 | code, 0, 1, 0, found.is_some().into(), 0, 0, 0, 0]);
    answer.extend(question);
    if let Some(address) = found {
        // The name of the question, A, IN, for a second, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

#[test]
fn a_name_that_moves_is_followed() {
    let Some(world) = World::start([1, 1, 1]) else { return };
    let [a, b] = [&world.a, &world.b].map(|region| match region.address {
        SocketAddr::V4(address) => *address.ip(),
        SocketAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
    });
    let address = Arc::new(Mutex::new(Some(a)));
    let server = name_server(address.clone());
    let edge = Edge::start(&format!(
        "resolver: {{ servers: [\"{server}\"] }}
regions: {{ moves: {{ upstreams: [\"http://origin.test:{PORT}\"] }} }}
routes: [{{ name: all, {TIMEOUTS} }}]\n"
    ));
    let mut client = edge.client();
    assert_eq!(client.region().unwrap(), 'a');
    *address.lock().unwrap() = Some(b);
    let moved = Instant::now();
    // Any error on the way would end this.
    until("the name's new address is used", || client.region().unwrap() == 'b');
    figure("a name with a TTL of 1 s moves, followed after", ms(moved.elapsed()));
    let answers: String = (0..50).map(|_| client.region().unwrap()).collect();
    assert_eq!(answers, "b".repeat(50), "and nobody goes back");

    // A name server that fails takes nothing away.
    *address.lock().unwrap() = None;
    let stale = || edge.metric(&["portolan_dns_stale{"]) == 1.0;
    until("the name is called stale", || client.region().unwrap() == 'b' && stale());
    *address.lock().unwrap() = Some(a);
    until("it is followed again", || client.region().unwrap() == 'a');
    assert!(!stale());
}
