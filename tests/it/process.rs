//! The program itself: signals, exit codes, and the commands that talk to it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

/// A running `portolan`; dropping it kills it.
pub struct Program {
    pub child: Child,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    pub dir: tempfile::TempDir,
    log: std::sync::Arc<parking_lot::Mutex<String>>,
    /// Reads the log to its end.
    reader: std::thread::JoinHandle<()>,
}

impl Program {
    pub async fn run(yaml: &str) -> Self {
        let dir = tempfile::TempDir::new().unwrap();
        std::fs::write(dir.path().join("portolan.yaml"), whole(yaml)).unwrap();
        Self::start("run", dir, "portolan.yaml").await
    }

    /// Starts `portolan COMMAND` with the file of `dir`.
    pub async fn start(command: &str, dir: tempfile::TempDir, file: &str) -> Self {
        Self::begin(&[command], dir, file).await.serving().await
    }

    /// The same, and returns before it serves.
    pub async fn begin(command: &[&str], dir: tempfile::TempDir, file: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_portolan"))
            .args(command)
            .arg("--config")
            .arg(dir.path().join(file))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = std::sync::Arc::new(parking_lot::Mutex::new(String::new()));
        let (theirs, stderr) = (log.clone(), child.stderr.take().unwrap());
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                theirs.lock().push_str(&format!("{line}\n"));
            }
        });
        Self { child, address: "0.0.0.0:0".parse().unwrap(), admin: "0.0.0.0:0".parse().unwrap(), dir, log, reader }
    }

    /// Waits until it serves.
    pub async fn serving(mut self) -> Self {
        let program = &mut self;
        program.said("serving").await;
        let line = program.log.lock().lines().find(|l| l.contains("serving")).unwrap().to_owned();
        let after = |key: &str| line.split(key).nth(1).unwrap().split([']', ' ']).next().unwrap().parse().unwrap();
        (program.address, program.admin) = (after("listeners=["), after("admin="));
        self
    }

    /// Waits until the log says `text`.
    pub async fn said(&mut self, text: &str) {
        let wait = async {
            loop {
                // In this order: what was said before the end is in the log once its reader is done.
                let over = self.reader.is_finished();
                if self.log.lock().contains(text) {
                    return;
                }
                assert!(!over, "it ended: {}", self.log.lock());
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("it never said {text}"));
    }

    pub fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status().unwrap().success());
    }

    pub async fn ended(&mut self) -> ExitStatus {
        let wait = async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("it does not end")
    }

    pub fn command(&self, arguments: &[&str], token: Option<&str>) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_portolan"));
        command.args(arguments).args(["--admin", &format!("http://{}", self.admin)]);
        command.env_remove("PORTOLAN_ADMIN_TOKEN");
        if let Some(token) = token {
            command.env("PORTOLAN_ADMIN_TOKEN", token);
        }
        command.output().unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn to(url: &str) -> String {
    format!("regions: {{ a: {{ upstreams: [\"{url}\"] }} }}\nroutes: [{{ name: all, timeouts: {{ first_byte: 30s }} }}]\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_requests_finish_and_ends_as_soon_as_none_is_left() {
    // The grace of an hour would be noticed.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut program = Program::run(&format!("shutdown: {{ grace: 1h }}\n{}", to(&url))).await;
    // One connection that idles, one that may yet become HTTP/2, and one whose answer is under way.
    let mut early = TcpStream::connect(program.address).await.unwrap();
    early.write_all(b"PRI * HT").await.unwrap();
    let mut idle = TcpStream::connect(program.address).await.unwrap();
    let mut busy = TcpStream::connect(program.address).await.unwrap();
    busy.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let (mut origin, _) = listener.accept().await.unwrap();
    read_head(&mut origin, &mut Vec::new()).await.unwrap();
    program.signal("TERM");
    program.said("draining").await;
    for waiting in [&mut idle, &mut early] {
        // Closed with or without a reset: what matters is that it does not linger.
        let read = tokio::time::timeout(PATIENCE, waiting.read(&mut [0; 1])).await.expect("it lingers");
        assert!(matches!(read, Ok(0) | Err(_)), "a connection that waits is closed");
    }
    origin.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate").await.unwrap();
    let mut bytes = Vec::new();
    busy.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(parse(&bytes, false).text(), "late");
    assert!(program.ended().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_grace_period_ends_and_a_second_sigint_does_not_wait() {
    let origin = Origin::always(Act::Hang).await;
    for (grace, signals) in [("100ms", &["TERM"][..]), ("1h", &["INT", "INT"])] {
        let mut program = Program::run(&format!("shutdown: {{ grace: {grace} }}\n{}", to(&origin.url()))).await;
        let before = origin.count();
        let mut client = TcpStream::connect(program.address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        origin.came(before + 1).await;
        for signal in signals {
            program.signal(signal);
            program.said("draining").await;
        }
        assert!(program.ended().await.success());
    }
}

/// A signal that comes as soon as the process says that it serves is not the end of it without a word.
#[tokio::test(flavor = "multi_thread")]
async fn an_early_sigterm_drains_as_well() {
    let origin = Origin::always(ok("x")).await;
    for _ in 0..5 {
        let mut program = Program::run(&to(&origin.url())).await;
        program.signal("TERM");
        program.said("draining").await;
        assert!(program.ended().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reloads() {
    let (one, two) = (Origin::always(ok("one")).await, Origin::always(ok("two")).await);
    let mut program = Program::run(&to(&one.url())).await;
    assert_eq!(send(program.address, "GET", "/", &[], b"").await.text(), "one");
    replace(&program.dir.path().join("portolan.yaml"), &whole(&to(&two.url())));
    // Without a process that waits for its sockets SIGQUIT does no harm.
    program.signal("QUIT");
    program.signal("HUP");
    program.said("configuration reloaded").await;
    assert_eq!(send(program.address, "GET", "/", &[], b"").await.text(), "two");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_and_reload_talk_to_it() {
    let origin = Origin::always(ok("x")).await;
    let program = Program::run(&to(&origin.url())).await;
    let status = program.command(&["status"], None);
    let said = String::from_utf8(status.stdout).unwrap();
    assert!(status.status.success() && said.contains(&origin.url()) && said.contains("in force"), "{said}");
    let json = program.command(&["status", "--json"], None);
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&json.stdout).unwrap()["regions"][0]["name"], "a");
    let reload = program.command(&["reload"], None);
    assert_eq!(
        (reload.status.code(), String::from_utf8(reload.stdout).unwrap().as_str()),
        (Some(0), "nothing changed, configuration 1 in force\n")
    );
    replace(&program.dir.path().join("portolan.yaml"), "regions: {}\n");
    let reload = program.command(&["reload"], None);
    let said = String::from_utf8(reload.stderr).unwrap();
    assert_eq!(reload.status.code(), Some(1));
    assert!(said.contains("portolan.yaml:1:1: `routes` is missing") && said.contains("configuration 1 goes on"), "{said}");
    let nobody = Command::new(env!("CARGO_BIN_EXE_portolan"))
        .args(["status", "--admin", &format!("http://{}", refused())])
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_token_is_asked_for() {
    let origin = Origin::always(ok("x")).await;
    let dir = tempfile::TempDir::new().unwrap();
    let token = dir.path().join("admin.token");
    std::fs::write(&token, "s3cret\n").unwrap();
    let yaml = whole(&to(&origin.url()))
        .replace("\"127.0.0.2:0\"", &format!("\"127.0.0.2:0\", token: \"${{file:{}}}\"", token.display()));
    std::fs::write(dir.path().join("portolan.yaml"), yaml).unwrap();
    let edge = Portolan::in_dir(dir).await;
    for (path, status) in
        [("/healthz", 200), ("/readyz", 200), ("/metrics", 401), ("/status.json", 401), ("/", 401), ("/reload", 401)]
    {
        assert_eq!(edge.admin("GET", path).await.status, status, "{path}");
    }
    for (header, status) in [("Bearer s3cret", 200), ("Bearer wrong", 401), ("Basic s3cret", 401)] {
        let answer = send(edge.admin, "GET", "/metrics", &[("Authorization", header)], b"").await;
        assert_eq!(answer.status, status, "{header}");
        assert!(!answer.text().contains("s3cret"));
    }
    assert!(!format!("{:?}", edge.reloader).contains("s3cret"));
    // Who has the token may call us by any name, as Prometheus in a container network does.
    let named = [("Host", "portolan:9901"), ("Authorization", "Bearer s3cret")];
    assert_eq!(send(edge.admin, "GET", "/metrics", &named, b"").await.status, 200);
    for (token, code) in [(None, 1), (Some("wrong"), 1), (Some("s3cret"), 0)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_portolan"));
        command.args(["status", "--admin", &format!("http://{}", edge.admin)]).env_remove("PORTOLAN_ADMIN_TOKEN");
        command.envs(token.map(|t| ("PORTOLAN_ADMIN_TOKEN", t)));
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        assert_eq!(output.status.code(), Some(code), "{token:?}");
    }
    let mut alive = Command::new(env!("CARGO_BIN_EXE_portolan"));
    alive.args(["status", "--alive", "--admin", &format!("http://{}", edge.admin)]);
    assert!(tokio::task::spawn_blocking(move || alive.status().unwrap()).await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_side_is_not_on_the_data_port_and_not_for_strangers() {
    let origin = Origin::always(ok("from the origin")).await;
    let edge = Portolan::start(&to(&origin.url())).await;
    for path in ["/metrics", "/status.json", "/reload", "/healthz"] {
        assert_eq!(edge.get(path, &[]).await.text(), "from the origin", "{path}");
    }
    assert_eq!(send(edge.admin, "GET", "/metrics", &[("Host", "rebound.example")], b"").await.status, 421);
    let host = edge.admin.to_string();
    let origin = format!("http://{host}");
    for (headers, status) in [
        (vec![("Host", host.as_str()), ("Origin", "http://evil.example"), ("X-Portolan-Action", "reload")], 403),
        (vec![("Host", &host), ("Sec-Fetch-Site", "cross-site"), ("X-Portolan-Action", "reload")], 403),
        (vec![("Host", &host), ("Origin", &origin)], 403),
        (vec![("Host", &host), ("Origin", &origin), ("Sec-Fetch-Site", "same-origin"), ("X-Portolan-Action", "reload")], 200),
        (vec![("Host", &host)], 200),
    ] {
        assert_eq!(send(edge.admin, "POST", "/reload", &headers, b"").await.status, status, "{headers:?}");
    }
    let question = r#"{"ip":"127.0.0.1","url":"http://x/","headers":[["X-Forwarded-For","81.2.69.160"]],"down":["a"]}"#;
    let explained = send(edge.admin, "POST", "/explain", &[("Content-Type", "application/json")], question.as_bytes()).await;
    let explained: serde_json::Value = serde_json::from_str(&explained.text()).unwrap();
    assert_eq!((explained["country"]["code"].as_str(), explained["answer"]["status"].as_u64()), (Some("GB"), Some(503)));
}

#[tokio::test(flavor = "multi_thread")]
async fn readyz_needs_a_usable_region() {
    let edge = Portolan::start(&to(&format!("http://{}", refused()))).await;
    assert_eq!(edge.admin("GET", "/readyz").await.status, 200);
    for _ in 0..3 {
        edge.get("/", &[]).await;
    }
    assert_eq!(edge.admin("GET", "/readyz").await.status, 503);
    assert_eq!(edge.admin("GET", "/healthz").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_told_before_anything_starts() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = tempfile::TempDir::new().unwrap();
    let yaml = whole(&to("http://127.0.0.1:1")).replacen("127.0.0.1:0", &taken.local_addr().unwrap().to_string(), 1);
    std::fs::write(dir.path().join("portolan.yaml"), yaml).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_portolan"))
        .args(["run", "--config"])
        .arg(dir.path().join("portolan.yaml"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot listen on 127.0.0.1:"));
}

/// A terminal of its own for a command, and what was typed into it.
fn in_a_terminal(command: &str, typed: &str) -> Output {
    let mut script =
        Command::new("script").args(["-qec", command, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = script.stdin.take().unwrap();
    let (typed, mut shown) = (typed.to_owned(), script.stdout.take().unwrap());
    // It is typed once something is shown that tells of a region.
    let mut seen = Vec::new();
    let mut chunk = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains("healthy") {
        let read = std::io::Read::read(&mut shown, &mut chunk).unwrap();
        assert!(read > 0, "it ended: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&chunk[..read]);
    }
    std::io::Write::write_all(&mut stdin, typed.as_bytes()).unwrap();
    std::io::Read::read_to_end(&mut shown, &mut seen).unwrap();
    let status = script.wait().unwrap();
    Output { status, stdout: seen, stderr: Vec::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn top_needs_a_terminal_and_leaves_it_as_it_was() {
    let origin = Origin::always(ok("x")).await;
    let program = Program::run(&to(&origin.url())).await;
    let piped = program.command(&["top"], None);
    assert_eq!(piped.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&piped.stderr).contains("needs a terminal"));
    let command = format!("stty cols 140 rows 40; {} top --admin http://{}", env!("CARGO_BIN_EXE_portolan"), program.admin);
    let shown = tokio::task::spawn_blocking(move || in_a_terminal(&command, "q")).await.unwrap();
    assert!(shown.status.success());
    // The alternate screen is left (DECRST 1049).
    assert!(String::from_utf8_lossy(&shown.stdout).contains("\u{1b}[?1049l"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_shows_a_region_that_fails_and_comes_back() {
    let [us, eu] = [refused(), refused()];
    let dir = tempfile::TempDir::new().unwrap();
    let yaml = whole(&format!(
        "regions: {{ us_east: {{ upstreams: [\"http://{us}\"] }}, eu_west: {{ upstreams: [\"http://{eu}\"] }} }}
routes: [{{ steering: {{ countries: {{ GB: eu_west }}, default: us_east, failover: [us_east, eu_west] }} }}]\n"
    ));
    std::fs::write(dir.path().join("demo.yaml"), yaml).unwrap();
    let mut program = Program::start("demo", dir, "demo.yaml").await;
    listening(us).await;
    let london = async || send(program.address, "GET", "/", &[("X-Forwarded-For", "81.2.69.160")], b"").await.text();
    assert_eq!(london().await, "Hello from eu_west! You are 81.2.69.160 in GB, and asked for /.\n");
    assert_eq!(send(program.admin, "POST", "/_demo/fail/eu_west", &[], b"").await.status, 200);
    assert!(london().await.contains("us_east"));
    assert_eq!(send(program.admin, "POST", "/_demo/restore/eu_west", &[], b"").await.status, 200);
    let back = async { while !london().await.contains("eu_west") {} };
    tokio::time::timeout(PATIENCE, back).await.expect("eu_west never came back");
    assert_eq!(send(program.admin, "POST", "/_demo/fail/mars", &[], b"").await.status, 404);
    // A page of somebody else's cannot fail a region, whatever the method.
    let forged = [("Sec-Fetch-Site", "cross-site")];
    assert_eq!(send(program.admin, "GET", "/_demo/fail/eu_west", &forged, b"").await.status, 403);
    program.signal("TERM");
    assert!(program.ended().await.success());
}
