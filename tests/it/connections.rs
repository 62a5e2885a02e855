//! What a client's connection may carry, and what an upstream's.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

fn to(url: &str, more: &str) -> String {
    format!("regions: {{ a: {{ upstreams: [\"{url}\"] }} }}\nroutes: [{{ name: all }}]\n{more}")
}

/// Everything that comes back for these bytes.
async fn exchange(edge: &Portolan, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    all(&mut stream).await
}

async fn all(stream: &mut TcpStream) -> Vec<u8> {
    let mut back = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut back)).await.expect("the connection stays open").unwrap();
    back
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_is_refused_with_a_reason() {
    let origin = Origin::scripted(vec![]).await;
    let edge = Portolan::start(&to(&origin.url(), "")).await;
    let long = |n| "x".repeat(n);
    let many: String = (0..101).map(|i| format!("X-{i}: y\r\n")).collect();
    let cases = [
        ("GET / HTTP/1.1\nHost: a\n\n".to_owned(), 400, "malformed", "without a carriage return"),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n".to_owned(), 400, "malformed", "control characters"),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n folded\r\n\r\n".to_owned(), 400, "malformed", "folded"),
        ("GET / HTTP/1.1\r\nHost: a\r\nX : a\r\n\r\n".to_owned(), 400, "malformed", "followed by a space"),
        ("GET /#x HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), 400, "malformed", "target"),
        ("GET / HTTP/1.1\r\n\r\n".to_owned(), 400, "host", "no Host header"),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n".to_owned(), 400, "host", "several"),
        ("GET / HTTP/1.1\r\nHost: a@b\r\n\r\n".to_owned(), 400, "host", "names no host"),
        ("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), 400, "host", "two hosts"),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na".to_owned(), 400, "framing", "several"),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
            400,
            "framing",
            "and a",
        ),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n".to_owned(), 400, "framing", "chunked last"),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n".to_owned(),
            501,
            "unimplemented",
            "transfer coding",
        ),
        ("CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n".to_owned(), 501, "unimplemented", "CONNECT"),
        ("GET / HTTP/3.0\r\nHost: a\r\n\r\n".to_owned(), 505, "version", "version"),
        ("GET / HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\n\r\n".to_owned(), 417, "expectation", "expects"),
        (format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", long(17 << 10)), 414, "target_too_long", "too long"),
        (format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", long(33 << 10)), 431, "headers_too_large", "too long"),
        (format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n"), 431, "headers_too_large", "too many"),
    ];
    for (request, status, fault, why) in cases {
        let line = format!("portolan_connection_faults_total{{fault=\"{fault}\"}}");
        let before = edge.metric(&line).await;
        let answer = parse(&exchange(&edge, request.as_bytes()).await, false);
        let shown: String = request.chars().take(80).collect();
        assert_eq!((answer.status, answer.complete), (status, true), "{shown:?}");
        assert!(answer.header("proxy-status").unwrap().contains(why), "{shown:?}: {}", answer.head);
        assert_eq!(answer.header("connection"), Some("close"), "{shown:?}");
        assert_eq!(edge.metric(&line).await, before + 1.0, "{shown:?}");
    }
    assert_eq!(origin.connections(), 0);
    assert_eq!(edge.metric("portolan_requests_total{code=\"431\",method=\"GET\",route=\"_none\"}").await, 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_after_the_other_on_one_connection() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&to(&origin.url(), "")).await;
    let good = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
                PUT /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nX: trailer\r\n\r\n";
    let bad = format!("{good}DELETE /4 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\nGET /5 HTTP/1.1\r\nHost: a\r\n\r\n");
    let back = String::from_utf8(exchange(&edge, bad.as_bytes()).await).unwrap();
    let statuses: Vec<&str> = back.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
    assert_eq!(statuses, ["200", "200", "200", "400"], "{back}");
    let received = origin.received();
    let bodies: Vec<(&str, &[u8])> = received.iter().map(|r| (r.head.split(' ').nth(1).unwrap(), &r.body[..])).collect();
    assert_eq!(bodies, [("/1", &b""[..]), ("/2", b"abc"), ("/3", b"ab")]);
    assert!(received.iter().all(|r| r.one("x").is_none()), "trailers never become headers");

    // However it is cut.
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in format!("{good}GET /4 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes() {
        stream.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let back = String::from_utf8(all(&mut stream).await).unwrap();
    assert_eq!(back.matches("HTTP/1.1 200").count(), 4, "{back}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_have_an_end() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&to(&origin.url(), "connections: { max_requests: 2, header_timeout: 1s, keepalive: 1s }\n")).await;
    let two = "GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(3);
    let back = String::from_utf8(exchange(&edge, two.as_bytes()).await).unwrap();
    assert_eq!((back.matches("HTTP/1.1 200").count(), back.matches("Connection: close").count()), (2, 1), "{back}");
    // A head that never ends.
    let answer = parse(&exchange(&edge, b"GET / HTTP/1.1\r\nHost: a\r\nX: ").await, false);
    assert_eq!((answer.status, answer.text().as_str()), (408, "The request took too long\n"));
    assert_eq!(edge.metric("portolan_connection_faults_total{fault=\"header_timeout\"}").await, 1.0);
    // Nothing more at all.
    let back = exchange(&edge, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(parse(&back, false).text(), "x");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_have_an_end() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&to(&origin.url(), "").replace("name: all", "name: all, max_body: 10B")).await;
    assert_eq!(edge.request("POST", "/", &[], b"0123456789").await.status, 200);
    let answer = edge.request("POST", "/", &[], b"0123456789a").await;
    assert_eq!((answer.status, answer.text().as_str()), (413, "The body is too large\n"));
    assert_eq!(origin.connections(), 1, "nobody has to see what is too long from the beginning");
    let chunked =
        |body: &str| format!("POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
    let answer = exchange(&edge, chunked("6\r\n012345\r\n4\r\n6789\r\n0\r\n\r\n").as_bytes()).await;
    assert_eq!(parse(&answer, false).status, 200);
    let answer = exchange(&edge, chunked("6\r\n012345\r\n5\r\n6789a\r\n0\r\n\r\n").as_bytes()).await;
    assert_eq!(parse(&answer, false).status, 413);
    // What is wrong in the middle of a body.
    let answer = parse(&exchange(&edge, chunked("6\r\n012345\r\n5\n6789a\r\n0\r\n\r\n").as_bytes()).await, false);
    assert_eq!(answer.status, 400, "{}", answer.head);
    assert!(answer.header("proxy-status").unwrap().contains("the size of a chunk"), "{}", answer.head);
}

/// A fault in a later request is that one's alone.
#[tokio::test(flavor = "multi_thread")]
async fn what_came_before_a_fault_is_answered() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&to(&origin.url(), "")).await;
    let good = "POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n";
    let bad = "POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n";
    // In one piece, and on a connection that waits.
    let back = String::from_utf8(exchange(&edge, format!("{good}{bad}").as_bytes()).await).unwrap();
    let statuses: Vec<&str> = back.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
    assert_eq!(statuses, ["200", "400"], "{back}");
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    let mut buffer = Vec::new();
    for _ in 0..2 {
        stream.write_all(good.as_bytes()).await.unwrap();
        let head = read_head(&mut stream, &mut buffer).await.unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        read_body(&head, &mut stream, &mut buffer).await.unwrap();
    }
    stream.write_all(bad.as_bytes()).await.unwrap();
    let back = String::from_utf8(all(&mut stream).await).unwrap();
    assert!(back.starts_with("HTTP/1.1 400") && back.contains("the size of a chunk"), "{back}");
}

/// What goes through a tunnel is no body.
#[tokio::test(flavor = "multi_thread")]
async fn tunnels_have_no_longest_body() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_head(&mut stream, &mut Vec::new()).await.unwrap();
        stream.write_all(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n").await.unwrap();
        let mut all = vec![0; 5_000];
        stream.read_exact(&mut all).await.unwrap();
        stream.write_all(b"all of it").await.unwrap();
    });
    let edge = Portolan::start(&to(&url, "").replace("name: all", "name: all, max_body: 10B")).await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").await.unwrap();
    read_head(&mut stream, &mut Vec::new()).await.unwrap();
    for _ in 0..50 {
        stream.write_all(&[b'x'; 100]).await.unwrap();
    }
    let back = all(&mut stream).await;
    assert!(back.ends_with(b"all of it"), "{back:?}");
}

/// An answer is not lost because its client is still sending.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_on_hears_why_it_should_not() {
    for length in ["Content-Length: 500000", "Transfer-Encoding: chunked"] {
        let origin = Origin::always(Act::Hang).await;
        let edge = Portolan::start(&to(&origin.url(), "").replace("name: all", "name: all, max_body: 10B")).await;
        let mut stream = TcpStream::connect(edge.address).await.unwrap();
        let chunk = if length.starts_with('T') { "7a120\r\n" } else { "" };
        stream.write_all(format!("POST / HTTP/1.1\r\nHost: a\r\n{length}\r\n\r\n{chunk}").as_bytes()).await.unwrap();
        let (mut read, mut write) = stream.split();
        let body = vec![b'x'; 500_000];
        let mut back = Vec::new();
        let (written, read) = tokio::join!(write.write_all(&body), read.read_to_end(&mut back));
        assert!(written.is_ok() && read.is_ok(), "{length}: {written:?} {read:?}");
        assert_eq!(parse(&back, false).status, 413, "{length}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_that_could_end_in_two_places_are_none() {
    let cases: [(&str, u16, &[&str], &[&str]); 20] = [
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi!", 502, &[], &[]),
        ("HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nhi", 502, &[], &[]),
        ("HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nhi", 502, &[], &[]),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhi", 502, &[], &[]),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nhi", 502, &[], &[]),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", 502, &[], &[]),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            502,
            &[],
            &[],
        ),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", 502, &[], &[]),
        ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", 502, &[], &[]),
        ("HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nhi", 502, &[], &[]),
        ("HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\nhi", 502, &[], &[]),
        ("HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\nhi", 502, &[], &[]),
        ("HTTP/1.1 200 OK\r\nX\r\nContent-Length: 2\r\n\r\nhi", 502, &[], &[]),
        ("HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", 502, &[], &[]),
        ("hi", 502, &[], &[]),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", 200, &["Content-Length: 2\r\n"], &["2, 2"]),
        ("HTTP/1.1 200 OK\r\nX: a\r\n b\r\nY : c\r\nContent-Length: 2\r\n\r\nhi", 200, &["X: a b\r\n", "Y: c\r\n"], &[]),
        ("HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 204, &[], &["Transfer", "Length"]),
        ("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", 200, &["HTTP/1.1 200"], &[]),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: X-Hop, Content-Length\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nUpgrade: h2c\r\nTE: a\r\n\r\nhi",
            200,
            &["Content-Length: 2\r\n"],
            &["X-Hop", "Keep-Alive:", "Upgrade", "TE:"],
        ),
    ];
    for (response, status, with, without) in cases {
        let origin = Origin::scripted(vec![Act::SendAndClose(response.into())]).await;
        let edge = Portolan::start(&to(&origin.url(), "").replace("name: all", "name: all, retry: { attempts: 1 }")).await;
        let answer = edge.get("/", &[]).await;
        assert_eq!(answer.status, status, "{response:?}: {}", answer.head);
        let head = format!("{}\r\n", answer.head);
        assert!(with.iter().all(|part| head.contains(part)), "{response:?}: {head}");
        assert!(without.iter().all(|part| !head.contains(part)), "{response:?}: {head}");
        assert!(answer.complete);
    }
}

/// What an origin sent too much or too little of does not become another answer.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_ends_where_it_ends() {
    let truncated =
        ["HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nhi", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"];
    for response in truncated {
        let origin = Origin::scripted(vec![Act::SendAndClose(response.into())]).await;
        let edge = Portolan::start(&to(&origin.url(), "")).await;
        let answer = edge.get("/", &[]).await;
        assert_eq!((answer.status, answer.complete), (200, false), "{}", answer.head);
    }
    let evil = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    let origin =
        Origin::scripted(vec![Act::Send(format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi{evil}").into()), ok("good")])
            .await;
    let edge = Portolan::start(&to(&origin.url(), "")).await;
    let back =
        exchange(&edge, "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".as_bytes())
            .await;
    let back = String::from_utf8(back).unwrap();
    assert!(!back.contains("evil") && back.contains("hi") && back.ends_with("good"), "{back}");
    assert_eq!(origin.connections(), 2);
}

/// Bytes of one language or the other: they wait until it is clear which.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_before_another_protocol_is_granted_waits() {
    let asks = "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    let next = "GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    // Refused: it is the next request.
    let origin = Origin::scripted(vec![ok("no"), ok("next")]).await;
    let edge = Portolan::start(&to(&origin.url(), "")).await;
    let back = String::from_utf8(exchange(&edge, format!("{asks}{next}").as_bytes()).await).unwrap();
    assert!(back.contains("no") && back.ends_with("next"), "{back}");
    // Granted: it is the origin's, as it is.
    let origin = Origin::scripted(vec![
        Act::Send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n".to_vec()),
        Act::SendAndClose(b"through the tunnel".to_vec()),
    ])
    .await;
    let edge = Portolan::start(&to(&origin.url(), "")).await;
    let back = String::from_utf8(exchange(&edge, format!("{asks}{next}").as_bytes()).await).unwrap();
    assert!(back.ends_with("through the tunnel"), "{back}");
    assert_eq!(origin.received()[1].head, next);
    assert_eq!(edge.metric("portolan_connection_faults_total{fault=\"malformed\"}").await, 0.0);
}

async fn http_2(edge: &Portolan) -> h2::client::SendRequest<Bytes> {
    let stream = TcpStream::connect(edge.address).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    send.ready().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn http_2_has_the_same_bounds() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&to(&origin.url(), "").replace("name: all", "name: all, max_body: 10B")).await;
    let get = |path: &str| http::Request::get(format!("http://a{path}"));
    let many = (0..101).fold(get("/"), |request, i| request.header(format!("x-{i}"), "y"));
    let requests = [
        (get("/"), "", 200),
        (get(&format!("/{}", "x".repeat(17 << 10))), "", 414),
        (many, "", 431),
        (get("/").header("expect", "miracles"), "", 417),
        (http::Request::post("http://a/"), "0123456789", 200),
        (http::Request::post("http://a/"), "0123456789a", 413),
    ];
    for (request, body, status) in requests {
        let mut send = http_2(&edge).await;
        let (answer, mut stream) = send.send_request(request.body(()).unwrap(), body.is_empty()).unwrap();
        if !body.is_empty() {
            stream.send_data(Bytes::from_static(body.as_bytes()), true).unwrap();
        }
        assert_eq!(tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap().status(), status);
    }
}

/// A frame by hand.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_end() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&to(&origin.url(), "connections: { max_control_frames: 50, header_timeout: 1s }\n")).await;
    // GET http://a/ as HPACK has it.
    let get = [0x82, 0x86, 0x84, 0x41, 0x01, b'a'];
    let reset: fn(u32) -> Vec<u8> = |stream| frame(3, 0, stream, &8u32.to_be_bytes());
    type Flood = Box<dyn Fn(u32) -> Vec<u8>>;
    let floods: [(&str, Flood); 6] = [
        ("settings", Box::new(|_| frame(4, 0, 0, &[]))),
        ("ping", Box::new(|_| frame(6, 0, 0, &[0; 8]))),
        ("window", Box::new(|_| frame(8, 0, 0, &1u32.to_be_bytes()))),
        ("priority", Box::new(|i| frame(2, 0, 2 * i + 1, &[0, 0, 0, 0, 1]))),
        ("rapid reset", Box::new(move |i| [frame(1, 5, 2 * i + 1, &get), reset(2 * i + 1)].concat())),
        ("continuation", Box::new(move |i| if i == 0 { frame(1, 1, 1, &get) } else { frame(9, 0, 1, &[]) })),
    ];
    for (what, flood) in floods {
        let mut stream = TcpStream::connect(edge.address).await.unwrap();
        let (mut read, mut write) = stream.split();
        let begin = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, &[])].concat();
        write.write_all(&begin).await.unwrap();
        let burst: Vec<u8> = (0..1_000).flat_map(flood).collect();
        // It may be cut off in the middle.
        let send = async { write.write_all(&burst).await.ok() };
        let mut back = Vec::new();
        let receive = async { tokio::time::timeout(PATIENCE, read.read_to_end(&mut back)).await.map(drop) };
        let (_, ended) = tokio::join!(send, receive);
        assert!(ended.is_ok(), "{what} goes on");
    }
    // A block of headers that does not end.
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    let begun = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, &[]), frame(1, 1, 1, &get)].concat();
    stream.write_all(&begun).await.unwrap();
    all(&mut stream).await;
    let faults = edge.metric("portolan_connection_faults_total{fault=\"header_timeout\"}").await;
    assert_eq!(faults, 1.0);
    assert!(edge.metric("portolan_connection_faults_total{fault=\"flood\"}").await >= 4.0);
    // Whoever behaves is served.
    let mut send = http_2(&edge).await;
    let (answer, _) = send.send_request(http::Request::get("http://a/").body(()).unwrap(), true).unwrap();
    assert_eq!(answer.await.unwrap().status(), 200);
    // As many as there may be.
    let settings = tokio::time::timeout(Duration::from_secs(60), async {
        while send.current_max_send_streams() != 128 {
            send = send.ready().await.unwrap();
            tokio::task::yield_now().await;
        }
    });
    settings.await.expect("128 streams are offered");
}

/// An origin that is introduced to clients: each has connections of its own.
#[tokio::test(flavor = "multi_thread")]
async fn upstreams_are_told_who_connects() {
    for version in ["v1", "v2"] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let seen = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
        let theirs = seen.clone();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let seen = theirs.clone();
                tokio::spawn(async move {
                    let mut begin = vec![0; 12];
                    stream.read_exact(&mut begin).await.unwrap();
                    let said = if begin.starts_with(b"PROXY") {
                        while !begin.ends_with(b"\r\n") {
                            begin.push(stream.read_u8().await.unwrap());
                        }
                        String::from_utf8(begin).unwrap().split(' ').nth(2).unwrap().to_owned()
                    } else {
                        let mut rest = [0; 16];
                        stream.read_exact(&mut rest).await.unwrap();
                        std::net::Ipv4Addr::new(rest[4], rest[5], rest[6], rest[7]).to_string()
                    };
                    seen.lock().push(said);
                    let mut buffer = Vec::new();
                    while let Some(head) = read_head(&mut stream, &mut buffer).await {
                        let upgrade = head.to_ascii_lowercase().contains("text/event-stream");
                        let answer = if upgrade {
                            "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nevents"
                        } else {
                            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"
                        };
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        let yaml = to("", "").replace("\"\"", &format!("{{ url: \"http://{at}\", proxy_protocol: {version} }}"));
        let edge = Portolan::start(&yaml).await;
        // Two requests of one connection, of a client that a trusted proxy speaks for; then another client's.
        let request =
            |client: &str, close: &str| format!("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {client}\r\n{close}\r\n");
        let two = request("192.0.2.1", "") + &request("192.0.2.1", "Connection: close\r\n");
        let back = String::from_utf8(exchange(&edge, two.as_bytes()).await).unwrap();
        assert_eq!(back.matches("HTTP/1.1 200").count(), 2, "{back}");
        assert_eq!(seen.lock().concat(), "192.0.2.1", "one connection for both");
        assert_eq!(edge.get("/", &[("X-Forwarded-For", "192.0.2.2")]).await.text(), "x");
        assert_eq!(edge.get("/", &[]).await.text(), "x");
        let events = edge.get("/", &[("Accept", "text/event-stream"), ("X-Forwarded-For", "192.0.2.3")]).await;
        assert_eq!(events.text(), "events");
        assert_eq!(*seen.lock(), ["192.0.2.1", "192.0.2.2", "127.0.0.1", "192.0.2.3"], "{version}");
    }
}

/// A health check speaks for nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn health_checks_introduce_themselves() {
    for (version, begin) in [("v1", &b"PROXY UNKNOWN\r\n"[..]), ("v2", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut said = vec![0; begin.len()];
                if stream.read_exact(&mut said).await.is_ok() && said == begin {
                    read_head(&mut stream, &mut Vec::new()).await.unwrap();
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
                }
            }
        });
        let yaml = format!(
            "regions: {{ a: {{ upstreams: [{{ url: \"http://{at}\", proxy_protocol: {version} }}], health_check: {{ interval: 1s }} }} }}\nroutes: [{{ name: all }}]\n"
        );
        let edge = Portolan::start(&yaml).await;
        let wait = async {
            while !edge.status().await.to_string().contains("status 200") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{version}: it is never healthy"));
    }
}

/// A client that reads nothing, and one that sends nothing, hold a stream only for so long.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_stand_still_end() {
    let origin = Origin::always(ok(&"x".repeat(300_000))).await;
    let yaml = to(&origin.url(), "").replace("name: all", "name: all, timeouts: { idle: 1s }");
    let edge = Portolan::start(&yaml).await;
    let mut send = http_2(&edge).await;
    let (answer, _) = send.send_request(http::Request::get("http://a/").body(()).unwrap(), true).unwrap();
    let mut body = answer.await.unwrap().into_body();
    let read = async {
        let mut bytes = 0;
        // Nothing is given back of the window.
        while let Some(part) = body.data().await {
            match part {
                Ok(part) => bytes += part.len(),
                Err(_) => return (bytes, true),
            }
        }
        (bytes, false)
    };
    let (bytes, failed) = tokio::time::timeout(PATIENCE, read).await.expect("the window stays shut for ever");
    assert!(bytes < 300_000 && failed, "{bytes}");
    // It has begun to upload.
    let (answer, mut upload) = send.send_request(http::Request::post("http://a/").body(()).unwrap(), false).unwrap();
    upload.send_data(Bytes::from_static(b"some"), false).unwrap();
    let answer = tokio::time::timeout(PATIENCE, answer).await.expect("the upload is waited for for ever");
    assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status().is_client_error() || answer.status().is_server_error()));
}

/// Every bound is a key.
#[tokio::test(flavor = "multi_thread")]
async fn bounds_are_what_is_typed() {
    let origin = Origin::always(ok("x")).await;
    let bounds = "connections: { max_headers: 5, max_header_bytes: 1KiB, max_target: 64B, max_streams: 3, min_receive_rate: 0B, min_send_rate: 1KiB }\n";
    let edge = Portolan::start(&to(&origin.url(), bounds)).await;
    let get = |target: &str, more: &str| format!("GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{more}\r\n");
    for (request, status) in [
        (get("/", &"X: y\r\n".repeat(3)), 200),
        (get("/", &"X: y\r\n".repeat(4)), 431),
        (get("/", &format!("X: {}\r\n", "y".repeat(1_024))), 431),
        (get(&format!("/{}", "x".repeat(63)), ""), 200),
        (get(&format!("/{}", "x".repeat(64)), ""), 414),
    ] {
        assert_eq!(parse(&exchange(&edge, request.as_bytes()).await, false).status, status, "{request}");
    }
    let policy = edge.state.live.load().snapshot.connections.clone();
    assert_eq!((policy.receive_rate, policy.send_rate), (None, Some(1_024)), "no rate is any rate");
    let mut send = http_2(&edge).await;
    let settings = async {
        while send.current_max_send_streams() != 3 {
            send = send.ready().await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, settings).await.expect("3 streams are offered");
}
