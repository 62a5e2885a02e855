//! Scripted origins, the proxy in this process, and a client that shows every byte.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use portolan::boot::{Booted, boot};
use portolan::config::Paths;
use portolan::proxy::{listen, server};
use portolan::reload::Reloader;
use portolan::state::State;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Longer than anything here takes; a test that meets it has hung.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What an origin does with one request.
#[derive(Debug, Clone)]
pub enum Act {
    /// Reads the request whole and sends these bytes; the connection stays open.
    Send(Vec<u8>),
    /// Reads the request whole, sends these bytes, and closes.
    SendAndClose(Vec<u8>),
    /// Reads the request whole and closes.
    Close,
    /// Reads the request's header and resets the connection.
    Reset,
    /// Reads the request whole and never answers.
    Hang,
}

/// 200 with this body.
pub fn ok(body: &str) -> Act {
    status(200, body)
}

/// A status with this body.
pub fn status(code: u16, body: &str) -> Act {
    Act::Send(format!("HTTP/1.1 {code} Scripted\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes())
}

/// A request as an origin received it.
#[derive(Debug, Clone)]
pub struct Received {
    pub head: String,
    pub body: Vec<u8>,
}

impl Received {
    /// All values of a header.
    pub fn all(&self, name: &str) -> Vec<&str> {
        self.head
            .lines()
            .filter_map(|l| l.split_once(": "))
            .filter(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v)
            .collect()
    }

    /// The one value of a header.
    pub fn one(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() <= 1, "{name} stands several times: {all:?}");
        all.first().copied()
    }
}

/// An origin that follows a script, one act for each request, and must use it up.
pub struct Origin {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    script: Mutex<VecDeque<Act>>,
    forever: Mutex<Option<Act>>,
    received: Mutex<Vec<Received>>,
    connections: AtomicUsize,
    changed: Notify,
}

impl Origin {
    /// Follows the script; a request beyond it is an error.
    pub async fn scripted(script: Vec<Act>) -> Self {
        Self::start(script, None).await
    }

    /// Does the same for every request.
    pub async fn always(act: Act) -> Self {
        Self::start(Vec::new(), Some(act)).await
    }

    /// Follows the script, then does the same for every request.
    pub async fn start(script: Vec<Act>, forever: Option<Act>) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), script, forever).await
    }

    pub async fn at(address: SocketAddr, script: Vec<Act>, forever: Option<Act>) -> Self {
        let listener = TcpListener::from_std(listen::bind(address).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            script: Mutex::new(script.into()),
            forever: Mutex::new(forever),
            received: Mutex::default(),
            connections: AtomicUsize::new(0),
            changed: Notify::new(),
        });
        let theirs = shared.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                theirs.connections.fetch_add(1, Ordering::SeqCst);
                connections.spawn(serve(stream, theirs.clone()));
            }
        });
        Self { address, shared, task }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on does this for every request.
    pub fn becomes(&self, act: Act) {
        *self.shared.forever.lock() = Some(act);
    }

    /// What came so far.
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.lock().clone()
    }

    pub fn count(&self) -> usize {
        self.shared.received.lock().len()
    }

    /// How many connections were made to it.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Waits until this many requests came.
    pub async fn came(&self, count: usize) {
        let wait = async {
            loop {
                let changed = self.shared.changed.notified();
                if self.count() >= count {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("the requests never came");
    }

    /// The script must have been used up.
    pub fn done(&self) {
        let left = self.shared.script.lock();
        assert!(left.is_empty(), "the script was not used up: {left:?}");
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    let mut buffer = Vec::new();
    while let Some(head) = read_head(&mut stream, &mut buffer).await {
        let act = shared.script.lock().pop_front().or_else(|| shared.forever.lock().clone());
        let act = act.unwrap_or_else(|| panic!("a request beyond the script: {head}"));
        let whole = !matches!(act, Act::Reset);
        let body = if whole { read_body(&head, &mut stream, &mut buffer).await } else { Some(Vec::new()) };
        shared.received.lock().push(Received { head, body: body.clone().unwrap_or_default() });
        shared.changed.notify_waiters();
        if body.is_none() {
            return;
        }
        match act {
            Act::Send(bytes) => {
                if stream.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            Act::SendAndClose(bytes) => {
                let _ = stream.write_all(&bytes).await;
                return;
            }
            Act::Close => return,
            Act::Reset => {
                let socket = socket2::SockRef::from(&stream);
                socket.set_linger(Some(Duration::ZERO)).unwrap();
                return;
            }
            Act::Hang => {
                // Until the proxy gives up.
                let _ = stream.read(&mut [0; 1]).await;
                return;
            }
        }
    }
}

/// Reads up to the end of a header block; `None` at the end of the connection.
pub async fn read_head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            let rest = buffer.split_off(end + 4);
            let head = std::mem::replace(buffer, rest);
            return Some(String::from_utf8_lossy(&head).into_owned());
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

/// Reads a body as its header frames it; `None` if the connection ends inside it.
pub async fn read_body(head: &str, stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Vec<u8>> {
    let value = |name: &str| {
        head.lines()
            .filter_map(|l| l.split_once(':'))
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v.trim().to_owned())
    };
    if value("transfer-encoding").is_some() {
        let mut body = Vec::new();
        loop {
            while !buffer.windows(2).any(|w| w == b"\r\n") {
                if stream.read_buf(buffer).await.ok()? == 0 {
                    return None;
                }
            }
            let end = buffer.windows(2).position(|w| w == b"\r\n")?;
            let size = usize::from_str_radix(std::str::from_utf8(&buffer[..end]).ok()?.split(';').next()?.trim(), 16).ok()?;
            while buffer.len() < end + 2 + size + 2 {
                if stream.read_buf(buffer).await.ok()? == 0 {
                    return None;
                }
            }
            body.extend_from_slice(&buffer[end + 2..end + 2 + size]);
            buffer.drain(..end + 2 + size + 2);
            if size == 0 {
                return Some(body);
            }
        }
    }
    let length: usize = value("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let rest = buffer.split_off(length);
    Some(std::mem::replace(buffer, rest))
}

/// An origin that speaks nothing but HTTP/2, and does this with every request.
pub async fn http2_origin(act: fn(http::Request<h2::RecvStream>, h2::server::SendResponse<bytes::Bytes>)) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, respond))) = connection.accept().await {
                    act(request, respond);
                }
            });
        }
    });
    address
}

/// An address where nobody listens. It stays taken, so that no other test listens there by chance, but who wants
/// this very address may have it.
pub fn refused() -> SocketAddr {
    static TAKEN: Mutex<Vec<socket2::Socket>> = Mutex::new(Vec::new());
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    TAKEN.lock().push(socket);
    address
}

/// Waits until somebody listens there.
pub async fn listening(address: SocketAddr) {
    let wait = async {
        while TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the server does not listen");
}

/// The proxy, in this process.
pub struct Portolan {
    pub address: SocketAddr,

    pub admin: SocketAddr,
    pub state: Arc<State>,
    pub reloader: Arc<Reloader>,
    pub dir: TempDir,
    tasks: Vec<JoinHandle<()>>,
}

/// Where the shipped database is.
pub fn database() -> String {
    format!("{}/geoip/country.mmdb", env!("CARGO_MANIFEST_DIR"))
}

impl Portolan {
    /// Starts it with `regions`, `routes` and what else stands in `yaml`. 127.0.0.0/8 is trusted, so that a
    /// test can say whom it speaks for, and the shipped database is used, unless `yaml` has a `client`.
    pub async fn start(yaml: &str) -> Self {
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("portolan.yaml"), whole(yaml)).unwrap();
        Self::in_dir(dir).await
    }

    /// Starts it with the portolan.yaml of `dir`.
    pub async fn in_dir(dir: TempDir) -> Self {
        let paths = Paths { file: dir.path().join("portolan.yaml"), environment: None };
        let booted = tokio::task::spawn_blocking(move || boot(paths, false)).await.unwrap();
        let Booted { state, reloader, admin, listeners, admin_listener, .. } = match booted {
            Ok(booted) => booted,
            Err(portolan::boot::Refused::Problems(problems)) => {
                panic!("{}", problems.iter().map(|p| p.render(false)).collect::<Vec<_>>().join("\n"))
            }
            Err(other) => panic!("{other}"),
        };
        state.resolver.resolve_new(&state.memory.upstreams()).await;
        let connections = listen::Connections::new(state.clone());
        let app = server::app(state.clone());
        let mut tasks = Vec::new();
        let mut address = None;

        for (nth, listener) in listeners.into_iter().enumerate() {
            address = address.or(listener.local_addr().ok());
            let listener = TcpListener::from_std(listener).unwrap();
            tasks.push(tokio::spawn(listen::accept(listener, nth, app.clone(), connections.clone())));
        }
        let admin_address = admin_listener.local_addr().unwrap();
        let listener = TcpListener::from_std(admin_listener).unwrap();
        let router = admin.router(axum::Router::new());
        tasks.push(tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }));
        tasks.push(tokio::spawn(portolan::tasks::watch::watch(reloader.clone())));
        tasks.push(tokio::spawn(state.resolver.clone().refresh(state.clone())));
        tasks.push(tokio::spawn(portolan::tasks::probe::run(state.clone())));
        tasks.push(tokio::spawn(portolan::tasks::orders::run(state.clone())));
        tasks.push(tokio::spawn(portolan::tasks::otlp::run(state.clone())));
        if let Some(cluster) = state.cluster.clone() {
            tasks.push(tokio::spawn(cluster.run(state.clone())));
        }
        Self { address: address.unwrap(), admin: admin_address, state, reloader, dir, tasks }
    }

    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// Replaces the configuration as editors do: a new file takes the old one's place.
    pub fn replace(&self, yaml: &str) {
        replace(&self.path("portolan.yaml"), &whole(yaml));
    }

    pub async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Response {
        self.request("GET", path, headers, b"").await
    }

    pub async fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        send(self.address, method, path, headers, body).await
    }

    pub async fn admin(&self, method: &str, path: &str) -> Response {
        send(self.admin, method, path, &[], b"").await
    }

    /// `/status.json`.
    pub async fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.admin("GET", "/status.json").await.text()).unwrap()
    }

    /// Orders something for a region.
    pub async fn order(&self, path: &str, body: &str) -> Response {
        send(self.admin, "POST", path, &[("Content-Type", "application/json")], body.as_bytes()).await
    }

    /// `POST /explain`.
    pub async fn explain(&self, question: serde_json::Value) -> serde_json::Value {
        let answer = self.order("/explain", &question.to_string()).await;
        serde_json::from_str(&answer.text()).unwrap()
    }

    /// The value of one line of `/metrics`, 0 where it is absent.
    pub async fn metric(&self, line: &str) -> f64 {
        let text = self.admin("GET", "/metrics").await.text();
        text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok()).unwrap_or(0.0)
    }

    /// A second is over: what happens once a second happens now.
    pub fn beat(&self) {
        portolan::tasks::seconds::beat(&self.state, Duration::from_secs(1));
    }

    /// Waits until the next attempt to reload after `generation_or_trouble` is over, whatever its outcome.
    pub async fn until(&self, what: &str, mut condition: impl FnMut(&State) -> bool) {
        let wait = async {
            while !condition(&self.state) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("it never came to this: {what}"));
    }
}

impl Drop for Portolan {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// A process that is ended when it is dropped.
pub struct Helper(pub std::process::Child);

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A whole configuration on ports of the system's choice.
pub fn whole(yaml: &str) -> String {
    let mut text = String::from("listeners: [{ address: 127.0.0.1:0 }]\nadmin: { address: 127.0.0.1:0 }\n");
    if !yaml.contains("access_log:") {
        text.push_str("access_log: { path: \"off\" }\n");
    }
    if !yaml.lines().any(|line| line.starts_with("client:")) {
        text.push_str(&format!("client: {{ trusted_proxies: [127.0.0.0/8], country_database: {} }}\n", database()));
    }
    text.push_str(yaml);
    // Two listeners may not share an address, and port 0 would be shared.
    text.replacen("admin: { address: 127.0.0.1:0 }", "admin: { address: \"127.0.0.2:0\" }", 1)
}

pub fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(&new, path).unwrap();
}

/// An answer as the client received it.
#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    /// The body is as long as its framing says.
    pub complete: bool,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().filter_map(|l| l.split_once(": ")).find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn region(&self) -> &str {
        self.header("portolan-region").unwrap_or("")
    }
}

/// One request on a connection of its own.
pub async fn send(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("host")) {
        head.push_str("Host: localhost\r\n");
    }
    if !body.is_empty() {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let (mut read, mut write) = stream.into_split();
        // An early answer may end the upload; that is no mistake of the client's.
        let upload = async { write.write_all(body).await.ok() };
        let mut bytes = Vec::new();
        let download = async { read.read_to_end(&mut bytes).await.ok() };
        let (_, _) = tokio::join!(upload, download);
        bytes
    };
    let bytes = tokio::time::timeout(PATIENCE, exchange).await.expect("no answer");
    parse(&bytes, method == "HEAD")
}

/// Reads an answer, past interim ones.
pub fn parse(bytes: &[u8], no_body: bool) -> Response {
    let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
        return Response { status: 0, head: String::from_utf8_lossy(bytes).into_owned(), body: Vec::new(), complete: false };
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status: u16 = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let rest = &bytes[end + 4..];
    if (100..200).contains(&status) && status != 101 {
        return parse(rest, no_body);
    }
    let mut response = Response { status, head, body: rest.to_vec(), complete: true };
    if no_body || status == 204 || status == 304 {
        return response;
    }
    if response.header("transfer-encoding").is_some() {
        (response.body, response.complete) = dechunk(rest);
    } else if let Some(length) = response.header("content-length").and_then(|l| l.parse::<usize>().ok()) {
        response.complete = response.body.len() == length;
    }
    response
}

fn dechunk(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|w| w == b"\r\n") else { return (body, false) };
        let Some(size) = std::str::from_utf8(&rest[..end]).ok().and_then(|s| usize::from_str_radix(s.trim(), 16).ok()) else {
            return (body, false);
        };
        if size == 0 {
            return (body, true);
        }
        let Some(chunk) = rest.get(end + 2..end + 2 + size) else { return (body, false) };
        body.extend_from_slice(chunk);
        rest = rest.get(end + 2 + size + 2..).unwrap_or_default();
    }
}
