//! One process takes the place of another, and nobody notices.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;
use crate::process::Program;

fn yaml(origin: &str, socket: &std::path::Path, state: &std::path::Path, more: &str) -> String {
    format!(
        "regions: {{ a: {{ upstreams: [\"{origin}\"] }} }}\nroutes: [{{ name: all, timeouts: {{ first_byte: 50s, total: 55s }} }}]\n\
         upgrade_socket: {}\nstate_dir: {}\n{more}",
        socket.display(),
        state.display()
    )
}

fn folder(yaml: &str) -> tempfile::TempDir {
    let dir = tempfile::TempDir::new().unwrap();
    std::fs::write(dir.path().join("portolan.yaml"), whole(yaml)).unwrap();
    dir
}

/// Requests without end; each has to be answered.
struct Load {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn new() -> Self {
        Self { stop: Arc::default(), count: Arc::default(), tasks: Vec::new() }
    }

    /// A connection for each request.
    fn without_keep_alive(&mut self, address: SocketAddr) {
        let (stop, count) = (self.stop.clone(), self.count.clone());
        self.tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let answer = send(address, "GET", "/", &[], b"").await;
                assert_eq!((answer.status, answer.text().as_str()), (200, "x"), "without keep-alive: {}", answer.head);
                count.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }

    /// One connection for as long as the server likes.
    fn with_keep_alive(&mut self, address: SocketAddr) {
        let (stop, count) = (self.stop.clone(), self.count.clone());
        self.tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let mut stream = TcpStream::connect(address).await.unwrap();
                let mut buffer = Vec::new();
                loop {
                    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
                    let head = read_head(&mut stream, &mut buffer).await.expect("a connection ends under a request");
                    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
                    assert_eq!(read_body(&head, &mut stream, &mut buffer).await.unwrap(), b"x");
                    count.fetch_add(1, Ordering::Relaxed);
                    if stop.load(Ordering::Relaxed) || head.contains("Connection: close") {
                        break;
                    }
                }
            }
        }));
    }

    /// HTTP/2: a connection that says that it goes away takes no more requests, and answers those it has.
    fn over_http_2(&mut self, address: SocketAddr) {
        let (stop, count) = (self.stop.clone(), self.count.clone());
        self.tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let stream = TcpStream::connect(address).await.unwrap();
                let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
                tokio::spawn(connection);
                while let Ok(ready) = client.ready().await {
                    client = ready;
                    let request = http::Request::get("http://a/").body(()).unwrap();
                    let Ok((answer, _)) = client.send_request(request, true) else { break };
                    match answer.await {
                        Ok(answer) => assert_eq!(answer.status(), 200),
                        // Those it did not take it names, and they may be sent again (RFC 9113, section 6.8).
                        Err(error) => {
                            assert!(error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM), "{error}");
                            break;
                        }
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            }
        }));
    }

    /// Waits for so many answers more.
    async fn more(&self, answers: usize) {
        let until = self.count.load(Ordering::Relaxed) + answers;
        let wait = async {
            while self.count.load(Ordering::Relaxed) < until && self.tasks.iter().all(|task| !task.is_finished()) {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("nothing goes on");
    }

    async fn ends(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.count.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_fails() {
    let origin = Origin::start(Vec::new(), Some(ok("x"))).await;
    // A slow response and a tunnel go through the old process all the while.
    let slow = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let shared = tempfile::TempDir::new().unwrap();
    let (socket, state) = (shared.path().join("upgrade"), shared.path().join("state"));
    let two = format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }}, slow: {{ upstreams: [\"http://{}\"] }} }}\nroutes:\n- {{ name: all, timeouts: {{ first_byte: 50s, total: 55s }} }}\n- {{ name: slow, paths: [/slow], steering: {{ default: slow }} }}\nupgrade_socket: {}\nstate_dir: {}\ncache: {{ disk: {{ path: {}, size: 16MiB }} }}\n",
        origin.url(),
        slow.local_addr().unwrap(),
        socket.display(),
        state.display(),
        shared.path().join("cache").display(),
    );
    let mut old = Program::start("run", folder(&two), "portolan.yaml").await;
    let mut in_flight = TcpStream::connect(old.address).await.unwrap();
    in_flight.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
    let (mut slow_one, _) = slow.accept().await.unwrap();
    read_head(&mut slow_one, &mut Vec::new()).await.unwrap();
    slow_one.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nha").await.unwrap();
    let mut tunnel = TcpStream::connect(old.address).await.unwrap();
    tunnel.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").await.unwrap();
    let (mut far, _) = slow.accept().await.unwrap();
    read_head(&mut far, &mut Vec::new()).await.unwrap();
    far.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").await.unwrap();
    read_head(&mut tunnel, &mut Vec::new()).await.unwrap();

    let mut load = Load::new();
    for _ in 0..2 {
        load.without_keep_alive(old.address);
        load.with_keep_alive(old.address);
        load.over_http_2(old.address);
    }
    load.more(200).await;
    let new = Program::begin(&["run", "--upgrade"], folder(&two), "portolan.yaml").await;
    old.signal("QUIT");
    let new = new.serving().await;
    assert_eq!((new.address, new.admin), (old.address, old.admin), "the same sockets");
    old.said("draining").await;
    load.more(200).await;
    // In the old process, which has two left.
    slow_one.write_all(b"ha").await.unwrap();
    let mut bytes = Vec::new();
    in_flight.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(parse(&bytes, false).text(), "haha");
    tunnel.write_all(b"ping").await.unwrap();
    let mut four = [0; 4];
    far.read_exact(&mut four).await.unwrap();
    far.write_all(b"pong").await.unwrap();
    tunnel.read_exact(&mut four).await.unwrap();
    assert_eq!(&four, b"pong");
    assert!(old.child.try_wait().unwrap().is_none(), "it waits for its last connection");
    drop(tunnel);
    assert!(old.ended().await.success());
    load.more(200).await;
    let answers = load.ends().await;
    assert!(answers >= 600, "{answers}");
    let metrics = send(new.admin, "GET", "/metrics", &[], b"").await.text();
    assert!(metrics.contains("portolan_requests_total"), "the new process answers operators");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_begin_leaves_the_old_one_in_place() {
    let origin = Origin::always(ok("x")).await;
    let shared = tempfile::TempDir::new().unwrap();
    let (socket, state) = (shared.path().join("upgrade"), shared.path().join("state"));
    let good = yaml(&origin.url(), &socket, &state, "");
    let mut old = Program::start("run", folder(&good), "portolan.yaml").await;
    // It is refused before it asks for anything.
    let mut new = Program::begin(&["run", "--upgrade"], folder(&good.replace("routes", "rooutes")), "portolan.yaml").await;
    assert_eq!(new.ended().await.code(), Some(1));
    // It fails with the sockets in its hands.
    let late = format!("{good}access_log: {{ path: /nowhere/at/all }}\n");
    let mut new = Program::begin(&["run", "--upgrade"], folder(&late), "portolan.yaml").await;
    old.signal("QUIT");
    assert_eq!(new.ended().await.code(), Some(1));
    old.said("the sockets were not handed over").await;
    assert_eq!(send(old.address, "GET", "/", &[], b"").await.status, 200);
    // Nobody says where.
    let mut new = Program::begin(
        &["run", "--upgrade"],
        folder("regions: { a: { upstreams: [\"http://127.0.0.1:1\"] } }\nroutes: [{ name: all }]\n"),
        "portolan.yaml",
    )
    .await;
    assert_eq!(new.ended().await.code(), Some(1));
    new.said("set `upgrade_socket`").await;
    // And then it works.
    let new = Program::begin(&["run", "--upgrade"], folder(&good), "portolan.yaml").await;
    old.signal("QUIT");
    let new = new.serving().await;
    assert!(old.ended().await.success());
    assert_eq!(send(new.address, "GET", "/", &[], b"").await.status, 200);
}
