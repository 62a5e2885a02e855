//! What connections cost: bytes of memory for one that waits for its next request, with and without TLS, and CPU time for a
//! TLS handshake; Portolan and nginx side by side.
//!
//! ```text
//! cargo bench --bench connections
//! ```
//!
//! Every connection has made one request before it waits. `PORTOLAN_BENCH_SECONDS` (4) is how long handshakes go on for each.
//! Both need as many files as there are connections: with fewer allowed, fewer are made, and that is said.

#![expect(clippy::print_stdout, reason = "a bench reports to a terminal")]

#[expect(dead_code, reason = "wrk and its totals are for other benches")]
mod lab;

use std::fmt::Display;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{NGINX, Process, family, free_ports, setting, start_nginx, ticks_per_second, used, write};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const CONNECTIONS: usize = 10_000;

const NGINX_CONF: &str = r#"
worker_processes auto;
events { worker_connections 15000; }
http {
    @temp@
    access_log off;
    keepalive_timeout 600;
    ssl_certificate own.pem; ssl_certificate_key own.key; ssl_session_cache shared:s:10m;
    server { listen 127.0.0.1:@origin@; location / { return 200 "hello"; } }
    server { listen 127.0.0.1:@plain@; listen 127.0.0.1:@tls@ ssl; location / { proxy_pass http://127.0.0.1:@origin@; } }
}"#;
const PORTOLAN_CONF: &str = r#"
listeners: [{ address: "127.0.0.1:@plain@" }, { address: "127.0.0.1:@tls@", tls: { certificates: [{ cert: own.pem, key: own.key }] } }]
admin: { address: "127.0.0.1:@admin@" }
connections: { keepalive: 10m }
access_log: { path: "off" }
regions: { a: { upstreams: ["http://127.0.0.1:@origin@"] } }
routes: [{ name: all }]
"#;

struct Subject {
    name: &'static str,
    process: Process,
    plain: u16,
    tls: u16,
}

/// Resident memory of a process and its children, in bytes.
fn resident(main: u32) -> Result<u64> {
    let pids = family(main)?;
    let of = |pid: &u32| -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    };
    pids.iter().map(of).sum()
}

async fn ask(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"hello") {
        ensure!(stream.read_buf(&mut answer).await? > 0, "VOID: a connection ended");
    }
    Ok(())
}

/// Bytes for each of so many connections that wait.
async fn idle(main: u32, port: u16, count: usize, tls: Option<&TlsConnector>) -> Result<u64> {
    let before = resident(main)?;
    let (mut plain, mut secured) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        match tls {
            None => {
                ask(&mut stream).await?;
                plain.push(stream);
            }
            Some(tls) => {
                let mut stream = tls.connect(ServerName::try_from("localhost")?, stream).await?;
                ask(&mut stream).await?;
                secured.push(stream);
            }
        }
    }
    let after = resident(main)?;
    Ok(after.saturating_sub(before) / count as u64)
}

/// Microseconds of CPU for a full handshake, with the connection before it.
async fn handshakes(main: u32, port: u16, seconds: u64, tls: &TlsConnector) -> Result<(f64, u64)> {
    let pids = family(main)?;
    let (before, until) = (used(&pids)?, Instant::now() + Duration::from_secs(seconds));
    let mut count = 0u64;
    while Instant::now() < until {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let mut stream = tls.connect(ServerName::try_from("localhost")?, stream).await?;
        stream.shutdown().await?;
        count += 1;
    }
    let ticks = used(&pids)? - before;
    Ok((ticks as f64 / ticks_per_second()? * 1e6 / count as f64, count))
}

fn start(dir: &Path) -> Result<(Process, Vec<Subject>, TlsConnector)> {
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&key)?;
    std::fs::write(dir.join("own.pem"), certificate.pem())?;
    std::fs::write(dir.join("own.key"), key.serialize_pem())?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(certificate.der().to_vec()))?;
    let mut client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    // Each is a whole one.
    client.resumption = rustls::client::Resumption::disabled();

    let [origin, nginx_plain, nginx_tls, plain, tls, admin, unused, unused_too] = free_ports()?;
    let values: &[(&str, &dyn Display)] = &[("origin", &origin), ("plain", &unused), ("tls", &unused_too)];
    let behind = start_nginx(dir, "origin", NGINX_CONF, values)?.listening(&[origin])?;
    let [own] = free_ports()?;
    let values: &[(&str, &dyn Display)] = &[("origin", &own), ("plain", &nginx_plain), ("tls", &nginx_tls)];
    let nginx = start_nginx(dir, "nginx", NGINX_CONF, values)?.listening(&[nginx_plain, nginx_tls])?;
    let values: &[(&str, &dyn Display)] = &[("origin", &origin), ("plain", &plain), ("tls", &tls), ("admin", &admin)];
    let file = write(dir, "portolan.yaml", PORTOLAN_CONF, values)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_portolan"));
    command.args(["run", "--config"]).arg(file);
    let portolan = Process::start("portolan", command, dir)?.listening(&[plain, tls])?;
    let subjects = vec![
        Subject { name: "portolan", process: portolan, plain, tls },
        Subject { name: "nginx", process: nginx, plain: nginx_plain, tls: nginx_tls },
    ];
    Ok((behind, subjects, TlsConnector::from(Arc::new(client))))
}

fn run() -> Result<()> {
    ensure!(Path::new(NGINX).exists(), "nginx is missing: run `make test-deps`");
    // The engine of TLS has to be named where more than one is built in.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let seconds = setting("PORTOLAN_BENCH_SECONDS", 4)?;
    let files = Command::new("sh").args(["-c", "ulimit -n"]).output()?.stdout;
    let files: usize = String::from_utf8(files)?.trim().parse().unwrap_or(CONNECTIONS * 2);
    let count = CONNECTIONS.min(files.saturating_sub(500) / 2);
    let dir = tempfile::TempDir::new()?;
    let (_origin, subjects, tls) = start(dir.path())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!("{count} connections that wait, bytes of memory each; handshakes, us of CPU each");
    for Subject { name, process, plain, tls: secured } in &subjects {
        let main = process.child.id();
        runtime.block_on(async {
            let bytes = idle(main, *plain, count, None).await?;
            println!("{name:10} plain {bytes:>7} B");
            let (us, n) = handshakes(main, *secured, seconds, &tls).await?;
            println!("{name:10} handshake {us:>7.0} us ({n})");
            let bytes = idle(main, *secured, count, Some(&tls)).await?;
            println!("{name:10} TLS   {bytes:>7} B");
            Ok::<_, anyhow::Error>(())
        })?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
