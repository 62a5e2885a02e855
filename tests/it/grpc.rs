//! gRPC with a client and a server of others (grpcio), and gRPC-Web.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/grpc_calls.py");

/// A server with every kind of call; dropping it ends it.
struct Server {
    _child: Helper,
    port: u16,
}

fn python() -> Command {
    // Debian's own: another one may come first, without grpcio.
    let python = if std::path::Path::new("/usr/bin/python3").exists() { "/usr/bin/python3" } else { "python3" };
    let mut command = Command::new(python);
    command.arg(SCRIPT);
    command
}

fn serve() -> Server {
    let mut child = python().arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let port = line.trim().parse().expect("grpcio is missing: run `make test-deps`");
    Server { _child: Helper(child), port }
}

fn yaml(port: u16) -> String {
    format!(
        "regions: {{ a: {{ upstreams: [\"h2c://127.0.0.1:{port}\"] }} }}\nroutes: [{{ name: all, grpc_web: true, timeouts: {{ first_byte: 50s, total: 55s }} }}]\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_call() {
    let server = serve();
    let edge = Portolan::start(&yaml(server.port)).await;
    let asked = python().arg("ask").arg(edge.address.to_string()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let asked = tokio::task::spawn_blocking(move || asked.wait_with_output()).await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(asked.status.success() && asked.stdout == b"all of it\n", "{errors}");
}

/// A message as both kinds of gRPC frame it.
fn message(flag: u8, bytes: &[u8]) -> Vec<u8> {
    [&[flag][..], &(bytes.len() as u32).to_be_bytes(), bytes].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_web_is_answered_in_its_own_words() {
    let server = serve();
    let edge = Portolan::start(&yaml(server.port)).await;
    for (method, body, expected) in [
        ("Echo", message(0, b"hello"), vec![message(0, b"echo hello")]),
        ("Count", message(0, b"3"), vec![message(0, b"0"), message(0, b"1"), message(0, b"2")]),
    ] {
        let kind = [("Content-Type", "application/grpc-web+proto"), ("X-Grpc-Web", "1"), ("X-Say", "again")];
        let answer = edge.request("POST", &format!("/test.Test/{method}"), &kind, &body).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/grpc-web")), "{}", answer.head);
        assert!(answer.complete);
        let rest = answer.body.strip_prefix(&expected.concat()[..]).unwrap_or_else(|| panic!("{:?}", answer.body));
        assert_eq!(rest[0], 0x80, "trailers come as a message of their own");
        let trailers = String::from_utf8_lossy(&rest[5..]);
        assert!(trailers.contains("grpc-status:0\r\n"), "{trailers}");
    }
    // What fails at once has its status in the header.
    let kind = [("Content-Type", "application/grpc-web")];
    let answer = edge.request("POST", "/test.Test/Fail", &kind, &message(0, b"")).await;
    let status = answer.header("grpc-status").map_or_else(|| answer.text(), |status| format!("grpc-status:{status}"));
    assert!(status.contains("grpc-status:3"), "{}", answer.head);
    // Nobody else is touched.
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"POST /test.Test/Echo HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).await.unwrap();
    assert!(!String::from_utf8_lossy(&back).contains("grpc-web"));
}
