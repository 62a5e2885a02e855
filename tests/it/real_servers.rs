//! Against servers that others wrote: Debian's nginx as regional origins, and Node.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

/// A server of somebody else's; dropping it kills it.
struct Server {
    _child: Helper,
    dir: tempfile::TempDir,
}

/// nginx as the origin of one region.
async fn nginx(address: SocketAddr, region: &str) -> Server {
    let dir = tempfile::TempDir::new().unwrap();
    let root = dir.path().display();
    let user = if Command::new("id").arg("-u").output().unwrap().stdout == b"0\n" { "user root;" } else { "" };
    let config = format!(
        "daemon off; master_process off; pid {root}/pid; error_log {root}/error.log; {user}
events {{}}
http {{
  access_log off; client_body_temp_path {root}/body; proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/f; uwsgi_temp_path {root}/u; scgi_temp_path {root}/s;
  client_max_body_size 0;
  server {{
    listen {address};
    location / {{ add_header X-Nginx {region}; return 200 \"{region} $http_portolan_country $http_cf_connecting_ip $request_method\\n\"; }}
    location /files/ {{ alias {root}/; }}
    location /upload {{ proxy_pass http://{address}/sink; }}
    location /sink {{ add_header X-Length $http_content_length; return 204; }}
    location /broken {{ return 503; }}
  }}
}}
"
    );
    std::fs::write(dir.path().join("nginx.conf"), config).unwrap();
    let child = Command::new("nginx")
        .args(["-e", "stderr", "-p"])
        .arg(dir.path())
        .arg("-c")
        .arg(dir.path().join("nginx.conf"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("nginx is missing: run `make test-deps`");
    listening(address).await;
    Server { _child: Helper(child), dir }
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_regions_fail_and_come_back() {
    let (us, eu) = (refused(), refused());
    let _us = nginx(us, "us_east").await;
    let first = nginx(eu, "eu_west").await;
    let edge = Portolan::start(&format!(
        "regions: {{ us_east: {{ upstreams: [\"http://{us}\"] }}, eu_west: {{ upstreams: [\"http://{eu}\"] }} }}
routes: [{{ name: all, steering: {{ countries: {{ GB: eu_west }}, default: us_east, failover: [us_east, eu_west] }} }}]\n"
    ))
    .await;
    let london = [("X-Forwarded-For", "81.2.69.160")];
    let answer = edge.get("/", &london).await;
    assert_eq!(
        (answer.text().as_str(), answer.region(), answer.header("x-nginx")),
        ("eu_west GB 81.2.69.160 GET\n", "eu_west", Some("eu_west"))
    );
    assert_eq!(edge.get("/", &[("X-Forwarded-For", "8.8.8.8")]).await.region(), "us_east");
    assert_eq!(edge.get("/broken", &london).await.status, 503, "both say so");

    // Range and conditional requests pass as they are.
    std::fs::write(first.dir.path().join("file"), vec![b'z'; 300_000]).unwrap();
    let whole = edge.get("/files/file", &london).await;
    assert_eq!((whole.status, whole.body.len(), whole.complete), (200, 300_000, true));
    let part = edge.get("/files/file", &[london[0], ("Range", "bytes=10-19")]).await;
    assert_eq!((part.status, part.text().as_str()), (206, "zzzzzzzzzz"));
    let same = edge.get("/files/file", &[london[0], ("If-None-Match", whole.header("etag").unwrap())]).await;
    assert_eq!((same.status, same.body.len()), (304, 0));
    let head = edge.request("HEAD", "/files/file", &london, b"").await;
    assert_eq!((head.status, head.header("content-length")), (200, Some("300000")));
    let upload = edge.request("POST", "/upload", &london, &vec![b'x'; 2 << 20]).await;
    assert_eq!((upload.status, upload.header("x-length")), (204, Some("2097152")));

    drop(first);
    for _ in 0..10 {
        let answer = edge.get("/", &london).await;
        assert_eq!((answer.status, answer.region()), (200, "us_east"));
    }
    let _second = nginx(eu, "eu_west").await;
    let wait = async { while edge.get("/", &london).await.region() != "eu_west" {} };
    tokio::time::timeout(PATIENCE, wait).await.expect("eu_west never came back");
}

const NODE: &str = r#"
const http = require('http'), crypto = require('crypto');
const server = http.createServer((req, res) => {
  if (req.url === '/events') {
    res.writeHead(200, { 'content-type': 'text/event-stream' });
    let i = 0;
    const timer = setInterval(() => { res.write(`data: ${i}\n\n`); if (++i === 3) { clearInterval(timer); res.end(); } }, 20);
    return;
  }
  const hash = crypto.createHash('sha256');
  let size = 0;
  req.on('data', (c) => { hash.update(c); size += c.length; });
  req.on('end', () => res.end(`${req.method} ${size} ${hash.digest('hex')} ${req.headers['portolan-country']}`));
});
server.on('checkContinue', (req, res) => { res.writeContinue(); server.emit('request', req, res); });
server.on('upgrade', (req, socket) => {
  const key = crypto.createHash('sha1').update(req.headers['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest('base64');
  socket.write(`HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ${key}\r\n\r\n`);
  socket.write(Buffer.from([0x81, 5, ...Buffer.from('hello')]));
  socket.on('data', () => socket.end());
});
server.keepAliveTimeout = 50;
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
"#;

async fn node() -> (Server, SocketAddr) {
    let dir = tempfile::TempDir::new().unwrap();
    std::fs::write(dir.path().join("server.js"), NODE).unwrap();
    let mut child = Command::new("node")
        .arg(dir.path().join("server.js"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("node is missing: run `make test-deps`");
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], line.trim().parse().unwrap()));
    (Server { _child: Helper(child), dir }, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn node_as_an_origin() {
    let (_server, address) = node().await;
    let edge =
        Portolan::start(&format!("regions: {{ a: {{ upstreams: [\"http://{address}\"] }} }}\nroutes: [{{ name: all }}]\n")).await;
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    assert_eq!(edge.get("/", &[("X-Forwarded-For", "81.2.69.160")]).await.text(), format!("GET 0 {empty} GB"));
    let answer = edge.request("PUT", "/", &[("Expect", "100-continue")], b"hello").await;
    assert_eq!(answer.text(), "PUT 5 2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824 XX");
    let events = edge.get("/events", &[("Accept", "text/event-stream")]).await;
    assert_eq!((events.text().as_str(), events.complete), ("data: 0\n\ndata: 1\n\ndata: 2\n\n", true));

    let mut socket = TcpStream::connect(edge.address).await.unwrap();
    let upgrade = "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    socket.write_all(upgrade.as_bytes()).await.unwrap();
    let mut buffer = Vec::new();
    let head = read_head(&mut socket, &mut buffer).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 101") && head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    while buffer.len() < 7 {
        assert_ne!(socket.read_buf(&mut buffer).await.unwrap(), 0);
    }
    assert_eq!(&buffer[2..], b"hello");

    // Node closes idle connections after 50 ms here: whoever meets one that is closing sees nothing of it.
    for i in 0..200 {
        let answer = edge.get("/", &[]).await;
        assert_eq!(answer.status, 200, "request {i}: {}", answer.head);
        if i % 4 == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(45 + i % 13)).await;
        }
    }
}

/// The memory of this process does not grow with the bodies that pass through it.
#[tokio::test(flavor = "multi_thread")]
async fn a_gigabyte_streams_both_ways_in_bounded_memory() {
    const SIZE: usize = 1 << 30;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while let Some(head) = read_head(&mut stream, &mut buffer).await {
                    let chunk = vec![b'x'; 64 << 10];
                    if head.starts_with("GET") {
                        stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n").as_bytes()).await.unwrap();
                        for _ in 0..SIZE / chunk.len() {
                            stream.write_all(&chunk).await.unwrap();
                        }
                    } else {
                        let mut left = SIZE - std::mem::take(&mut buffer).len();
                        let mut chunk = chunk;
                        while left > 0 {
                            left -= stream.read(&mut chunk).await.unwrap();
                        }
                        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
                    }
                }
            });
        }
    });
    let program = crate::process::Program::run(&format!(
        "regions: {{ a: {{ upstreams: [\"http://{origin}\"] }} }}\nroutes: [{{ name: all }}]\n"
    ))
    .await;
    let memory = async || {
        let text = send(program.admin, "GET", "/metrics", &[], b"").await.text();
        text.lines().find_map(|l| l.strip_prefix("process_resident_memory_bytes ")?.parse::<f64>().ok()).unwrap()
    };
    let before = memory().await;
    let mut most = before;

    let mut stream = TcpStream::connect(program.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut buffer = Vec::new();
    read_head(&mut stream, &mut buffer).await.unwrap();
    let mut received = buffer.len();
    let mut chunk = vec![0; 1 << 20];
    let mut seen = 0;
    while received < SIZE {
        received += stream.read(&mut chunk).await.unwrap();
        if received / (SIZE / 8) > seen {
            seen = received / (SIZE / 8);
            most = most.max(memory().await);
        }
    }
    assert_eq!(received, SIZE);

    let mut stream = TcpStream::connect(program.address).await.unwrap();
    stream.write_all(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {SIZE}\r\n\r\n").as_bytes()).await.unwrap();
    for i in 0..SIZE / chunk.len() {
        stream.write_all(&chunk).await.unwrap();
        if i % 128 == 127 {
            most = most.max(memory().await);
        }
    }
    let mut buffer = Vec::new();
    assert!(read_head(&mut stream, &mut buffer).await.unwrap().starts_with("HTTP/1.1 200"));
    let growth = (most - before) / f64::from(1 << 20);
    assert!(growth < 64.0, "grew by {growth} MiB");
}
