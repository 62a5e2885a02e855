//! Bodies, upgrades and protocols.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::*;

fn to(url: &str) -> String {
    format!("regions: {{ a: {{ upstreams: [\"{url}\"] }} }}\nroutes: [{{ name: all, timeouts: {{ first_byte: 5s }} }}]\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn bodiless_answers_stay_bodiless() {
    let origin = Origin::scripted(vec![
        Act::Send(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()),
        Act::Send(b"HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\nContent-Length: 10\r\n\r\n".to_vec()),
        Act::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n".to_vec()),
    ])
    .await;
    let edge = Portolan::start(&to(&origin.url())).await;
    for (method, status, length) in [("GET", 204, None), ("GET", 304, Some("10")), ("HEAD", 200, Some("10"))] {
        let answer = edge.request(method, "/", &[], b"").await;
        assert_eq!((answer.status, answer.header("content-length"), answer.body.len()), (status, length, 0), "{method}");
    }
    assert_eq!(origin.connections(), 1, "each leaves the connection fit for the next");
}

#[tokio::test(flavor = "multi_thread")]
async fn chunked_both_ways() {
    let origin =
        Origin::always(Act::Send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec())).await;
    let edge = Portolan::start(&to(&origin.url())).await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    let request =
        "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    let answer = parse(&bytes, false);
    assert_eq!((answer.text().as_str(), answer.complete), ("hello", true));
    assert_eq!(origin.received()[0].body, b"abcdefg");
}

#[tokio::test(flavor = "multi_thread")]
async fn keep_alive_to_clients() {
    let origin = Origin::always(ok("x")).await;
    let edge = Portolan::start(&to(&origin.url())).await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    let mut buffer = Vec::new();
    for _ in 0..5 {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let head = read_head(&mut stream, &mut buffer).await.unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert_eq!(read_body(&head, &mut stream, &mut buffer).await.unwrap(), b"x");
    }
    // A request may be shorter than HTTP/2's preface; nobody waits for the rest.
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(parse(&bytes, false).text(), "x");
}

#[tokio::test(flavor = "multi_thread")]
async fn expect_continue_is_answered_by_the_origin() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let origin = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = Vec::new();
        let head = read_head(&mut stream, &mut buffer).await.unwrap();
        assert!(head.to_ascii_lowercase().contains("expect: 100-continue"), "{head}");
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        let body = read_body(&head, &mut stream, &mut buffer).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        (stream, body)
    });
    let edge = Portolan::start(&to(&url)).await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await.unwrap();
    let mut buffer = Vec::new();
    let head = read_head(&mut stream, &mut buffer).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 100"), "{head}");
    stream.write_all(b"hello").await.unwrap();
    let head = read_head(&mut stream, &mut buffer).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert_eq!(origin.await.unwrap().1, b"hello");
}

/// A WebSocket is a tunnel after 101; a reload in between leaves it open.
#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_survives_a_reload() {
    use tokio_tungstenite::tungstenite::Message;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
        use futures_util::{SinkExt, StreamExt};
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() {
                socket.send(Message::text(format!("echo {}", message.to_text().unwrap()))).await.unwrap();
            }
        }
    });
    use futures_util::{SinkExt, StreamExt};
    let edge = Portolan::start(&to(&url)).await;
    let (mut socket, answer) = tokio_tungstenite::connect_async(format!("ws://{}/chat", edge.address)).await.unwrap();
    assert_eq!(answer.status(), 101);
    assert_eq!(answer.headers()["portolan-region"], "a");
    socket.send(Message::text("one")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().to_text().unwrap(), "echo one");
    edge.replace(&to(&url).replace("first_byte: 5s", "first_byte: 4s"));
    edge.reloader.reload("test").await.unwrap();
    assert_eq!(edge.state.reload.lock().generation, 2);
    socket.send(Message::text("two")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().to_text().unwrap(), "echo two");
    socket.close(None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn server_sent_events_arrive_as_they_are_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (next, mut sent) = tokio::sync::mpsc::channel::<()>(1);
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = Vec::new();
        read_head(&mut stream, &mut buffer).await.unwrap();
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            .await
            .unwrap();
        for i in 0..3 {
            stream.write_all(format!("9\r\ndata: {i}\n\n\r\n").as_bytes()).await.unwrap();
            // The next event waits until the client has seen this one: nothing may be held back.
            sent.recv().await;
        }
        stream.write_all(b"0\r\n\r\n").await.unwrap();
    });
    let edge = Portolan::start(&to(&url)).await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n").await.unwrap();
    let mut seen = Vec::new();
    for i in 0..3 {
        let event = format!("data: {i}\n\n");
        let wait = async {
            while !String::from_utf8_lossy(&seen).contains(&event) {
                assert_ne!(stream.read_buf(&mut seen).await.unwrap(), 0);
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap();
        next.send(()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_by_prior_knowledge_to_clients_and_to_origins() {
    let address = http2_origin(|request, mut respond| {
        let told = request.headers().get("portolan-country").unwrap().to_str().unwrap().to_owned();
        let answer =
            http::Response::builder().header("x-told", told).header("x-authority", request.uri().authority().unwrap().as_str());
        let mut body = respond.send_response(answer.body(()).unwrap(), false).unwrap();
        body.send_data("over h2".into(), true).unwrap();
    })
    .await;
    let other = format!(
        "regions: {{ a: {{ upstreams: [{{ url: \"h2c://{address}\", host: origin.example.com }}] }} }}\nroutes: [{{ name: all }}]\n"
    );
    let edge = Portolan::start(&other).await;
    assert_eq!(edge.get("/", &[]).await.header("x-authority"), Some("origin.example.com"));
    let edge = Portolan::start(&to(&format!("h2c://{address}"))).await;
    assert_eq!(edge.get("/", &[("X-Forwarded-For", "81.2.69.160")]).await.header("x-told"), Some("GB"));

    let stream = TcpStream::connect(edge.address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..3 {
        let request = http::Request::get("http://shop.example/x").header("x-forwarded-for", "202.32.115.1").body(()).unwrap();
        let (answer, _) = client.send_request(request, true).unwrap();
        let answer = answer.await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["x-told"], "JP");
        assert_eq!(answer.headers()["x-authority"], "shop.example");
        let mut body = answer.into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "over h2");
    }
}

/// A certificate authority, and a server's certificate for `name` that it signed.
fn certificates(name: &str) -> (rcgen::Certificate, rcgen::Certificate, rcgen::KeyPair) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let issuer = Issuer::from_params(&params, ca_key);
    let leaf = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    (ca, leaf, key)
}

/// An origin that answers everything with `body`, over TLS.
async fn tls_origin(config: tokio_rustls::rustls::ServerConfig, body: &'static str) -> std::net::SocketAddr {
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                    let mut buffer = [0; 4096];
                    while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {
                        let _ = stream.write_all(answer.as_bytes()).await;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_upstreams_are_verified() {
    use std::sync::Arc;
    use tokio_rustls::rustls::{self, pki_types};
    let (ca, leaf, key) = certificates("origin.example.com");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    let address = tls_origin(config, "tls").await;
    let dir = tempfile::TempDir::new().unwrap();
    std::fs::write(dir.path().join("ca.pem"), ca.pem()).unwrap();
    let (other, ..) = certificates("origin.example.com");
    std::fs::write(dir.path().join("other.pem"), other.pem()).unwrap();
    let ca = |file: &str| dir.path().join(file).display().to_string();
    for (tls, status) in [
        (format!("{{ sni: origin.example.com, ca: {} }}", ca("ca.pem")), 200),
        (format!("{{ sni: wrong.example.com, ca: {} }}", ca("ca.pem")), 503),
        (format!("{{ sni: origin.example.com, ca: {} }}", ca("other.pem")), 503),
        ("{ sni: origin.example.com }".to_owned(), 503),
    ] {
        let yaml = format!(
            "regions: {{ a: {{ upstreams: [{{ url: \"https://{address}\", tls: {tls} }}] }} }}\nroutes: [{{ name: all }}]\n"
        );
        let edge = Portolan::start(&yaml).await;
        let answer = edge.get("/", &[]).await;
        assert_eq!(answer.status, status, "{tls}: {}", answer.head);
        let failures = edge.metric("portolan_upstream_attempts_total{outcome=\"tls\",region=\"a\"}").await;
        assert_eq!(failures, f64::from(u8::from(status != 200)), "{tls}");
    }
}

/// An upstream that asks for a certificate gets ours, and serves nobody without one.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_shown_to_upstreams_that_ask_for_one() {
    use std::sync::Arc;
    use tokio_rustls::rustls::{self, pki_types};
    let (ca, leaf, key) = certificates("origin.example.com");
    let (client_ca, client, client_key) = certificates("portolan.example.com");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(client_ca.der().clone()).unwrap();
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build().unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![leaf.der().clone()], pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    let address = tls_origin(config, "mtls").await;
    let dir = tempfile::TempDir::new().unwrap();
    let file = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let ca = file("ca.pem", ca.pem());
    let cert = file("own.pem", client.pem());
    let own = file("own.key", client_key.serialize_pem());
    let (_, _, stranger) = certificates("portolan.example.com");
    let wrong = file("wrong.key", stranger.serialize_pem());
    let yaml = |tls: &str| {
        format!(
            "regions: {{ a: {{ upstreams: [{{ url: \"https://{address}\", tls: {{ sni: origin.example.com, ca: {ca}{tls} }} }}], \
             health_check: {{ interval: 40ms }} }} }}\nroutes: [{{ name: all }}]\n"
        )
    };
    let edge = Portolan::start(&yaml(&format!(", cert: {cert}, key: {own}"))).await;
    assert_eq!(edge.get("/", &[]).await.text(), "mtls");
    edge.until("health checks show it too", |s| {
        s.live.load().snapshot.regions[0].upstreams[0].state.endpoints()[0].active.verdict()
            == portolan::regions::active::Verdict::Up
    })
    .await;
    // A key of another certificate is told before anything is put in force.
    edge.replace(&yaml(&format!(", cert: {cert}, key: {wrong}")));
    let problems = edge.reloader.reload("test").await.unwrap_err();
    assert!(problems[0].to_string().contains("cannot be used together"), "{problems:?}");
    assert_eq!(edge.get("/", &[]).await.text(), "mtls");
    let without = Portolan::start(&yaml("")).await;
    assert_eq!(without.get("/", &[]).await.status, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_upload_is_no_timeout() {
    let origin = Origin::always(ok("got it")).await;
    let yaml = to(&origin.url()).replace("first_byte: 5s", "first_byte: 150ms, idle: 20s, total: 300ms");
    let edge = Portolan::start(&yaml).await;
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
    for _ in 0..5 {
        stream.write_all(b"3\r\nabc\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(parse(&bytes, false).text(), "got it");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_malformed_reaches_an_origin() {
    let origin = Origin::scripted(vec![]).await;
    let edge = Portolan::start(&to(&origin.url())).await;
    for request in [
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        "nonsense\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(edge.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.unwrap();
        let answer = parse(&bytes, false);
        assert!(answer.status == 0 || (400..=505).contains(&answer.status), "{request:?}: {}", answer.head);
    }
    assert_eq!(origin.count(), 0);
}

/// `idle` bounds silence, `total` the wait for the header: each does its own.
#[tokio::test(flavor = "multi_thread")]
async fn silence_by_nature_has_two_bounds() {
    let events = [("Accept", "text/event-stream")];
    let timeouts = "first_byte: 100ms, idle: 20s, total: 300ms";
    // No header: `total`.
    let hanging = Origin::always(Act::Hang).await;
    let edge = Portolan::start(&to(&hanging.url()).replace("first_byte: 5s", timeouts)).await;
    let late = edge.get("/", &events).await;
    assert_eq!((late.status, late.text().as_str()), (504, "The origin took too long\n"));
    let large = edge.request("POST", "/", &[], &vec![b'x'; 100_000]).await;
    assert_eq!(large.status, 504, "an upload that is over waits no longer");
    // A header, and then silence for longer than `total`.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_head(&mut stream, &mut Vec::new()).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(900)).await;
        stream.write_all(b"late").await.unwrap();
    });
    let edge = Portolan::start(&to(&url).replace("first_byte: 5s", timeouts)).await;
    assert_eq!(edge.get("/", &events).await.text(), "late");
}
