//! Names of upstreams, as a scripted DNS server tells them.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::net::UdpSocket;

use crate::harness::*;

/// What the server says of a name.
#[derive(Clone)]
enum Says {
    A(Vec<Ipv4Addr>),
    /// Priority, weight, port, target.
    Srv(Vec<(u16, u16, u16, &'static str)>),
    /// SERVFAIL.
    Fails,
}

/// A DNS server with a table. TTLs are one second.
#[derive(Clone)]
struct Dns {
    address: SocketAddr,
    table: Arc<Mutex<HashMap<String, Says>>>,
}

impl Dns {
    async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let dns = Self { address: socket.local_addr().unwrap(), table: Arc::default() };
        let table = dns.table.clone();
        tokio::spawn(async move {
            let mut packet = [0; 512];
            while let Ok((n, from)) = socket.recv_from(&mut packet).await {
                let answer = answer(&packet[..n], &table.lock());
                socket.send_to(&answer, from).await.unwrap();
            }
        });
        dns
    }

    fn says(&self, name: &str, says: Says) {
        self.table.lock().insert(name.to_owned(), says);
    }
}

fn labels(name: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> = name.split('.').flat_map(|l| std::iter::once(l.len() as u8).chain(l.bytes())).collect();
    bytes.push(0);
    bytes
}

/// RFC 1035, section 4: header, the question again, answers that point to its name.
fn answer(query: &[u8], table: &HashMap<String, Says>) -> Vec<u8> {
    let mut name = Vec::new();
    let mut at = 12;
    while query[at] != 0 {
        let len = usize::from(query[at]);
        name.push(String::from_utf8_lossy(&query[at + 1..at + 1 + len]).to_lowercase());
        at += 1 + len;
    }
    let kind = u16::from_be_bytes([query[at + 1], query[at + 2]]);
    let question = &query[12..at + 5];
    let records: Vec<Vec<u8>> = match (table.get(&name.join(".")), kind) {
        (Some(Says::A(addresses)), 1) => addresses.iter().map(|a| a.octets().to_vec()).collect(),
        (Some(Says::Srv(services)), 33) => services
            .iter()
            .map(|(priority, weight, port, target)| {
                [priority, weight, port].iter().flat_map(|n| n.to_be_bytes()).chain(labels(target)).collect()
            })
            .collect(),
        _ => Vec::new(),
    };
    let code = if matches!(table.get(&name.join(".")), Some(Says::Fails)) { 2 } else { 0 };
    let mut bytes = [&query[..2], &[0x85, 0x80 | code, 0, 1, 0, records.len() as u8, 0, 0, 0, 0], question].concat();
    for record in records {
        bytes.extend([0xc0, 12]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1, 0, 0, 0, 1]);
        bytes.extend((record.len() as u16).to_be_bytes());
        bytes.extend(record);
    }
    bytes
}

fn yaml(dns: &Dns, url: &str, more: &str) -> String {
    format!(
        "resolver: {{ servers: [\"{}\"] }}
regions: {{ a: {{ upstreams: [{url}], balance: round_robin, slow_start: 0s }}{more} }}
routes: [{{ steering: {{ default: a }} }}]\n",
        dns.address
    )
}

async fn wait_for(edge: &Portolan, text: &str) {
    let wait = async { while edge.get("/", &[]).await.text() != text {} };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{text} never answered"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_moves_is_followed_and_a_failure_keeps_the_last_answer() {
    let dns = Dns::start().await;
    let old = Origin::at("127.0.0.11:0".parse().unwrap(), vec![], Some(ok("old"))).await;
    let port = old.address.port();
    let new = Origin::at(format!("127.0.0.12:{port}").parse().unwrap(), vec![], Some(ok("new"))).await;
    dns.says("origin.test", Says::A(vec!["127.0.0.11".parse().unwrap()]));
    let url = format!("\"http://origin.test:{port}\"");
    let edge = Portolan::start(&yaml(&dns, &url, "")).await;
    assert_eq!(edge.get("/", &[]).await.text(), "old");
    let stale = format!("portolan_dns_stale{{region=\"a\",upstream=\"http://origin.test:{port}\"}}");
    assert_eq!(edge.metric(&stale).await, 0.0);

    dns.says("origin.test", Says::Fails);
    edge.until("the failure is seen", |s| {
        s.live.load().snapshot.regions[0].upstreams[0].state.dns.stale.load(std::sync::atomic::Ordering::Relaxed)
    })
    .await;
    assert_eq!(edge.metric(&stale).await, 1.0);
    assert_eq!(edge.get("/", &[]).await.text(), "old", "the last good answer stays");
    assert_eq!(edge.status().await["regions"][0]["upstreams"][0]["stale"], true);

    dns.says("origin.test", Says::A(vec!["127.0.0.12".parse().unwrap()]));
    wait_for(&edge, "new").await;
    assert_eq!(edge.metric(&stale).await, 0.0);
    assert!(new.count() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_address_of_a_name_has_a_health_of_its_own() {
    let dns = Dns::start().await;
    let well = Origin::at("127.0.0.13:0".parse().unwrap(), vec![], Some(ok("well"))).await;
    let port = well.address.port();
    dns.says("origin.test", Says::A(vec!["127.0.0.13".parse().unwrap(), "127.0.0.14".parse().unwrap()]));
    let edge = Portolan::start(&yaml(&dns, &format!("\"http://origin.test:{port}\""), "")).await;
    for _ in 0..20 {
        assert_eq!(edge.get("/", &[]).await.text(), "well");
    }
    let tried = edge.metric("portolan_upstream_attempts_total{outcome=\"connect_refused\",region=\"a\"}").await;
    assert_eq!(tried, 3.0, "the dead address is ejected by itself");
    let status = edge.status().await;
    let states: Vec<_> =
        status["regions"][0]["upstreams"].as_array().unwrap().iter().map(|u| u["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["usable", "ejected"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn services_tell_ports_weights_and_backups() {
    let dns = Dns::start().await;
    let (heavy, light, backup) =
        (Origin::always(ok("heavy")).await, Origin::always(ok("light")).await, Origin::always(ok("backup")).await);
    dns.says("host.test", Says::A(vec!["127.0.0.1".parse().unwrap()]));
    let services = vec![
        (10, 3, heavy.address.port(), "host.test"),
        (10, 1, light.address.port(), "host.test"),
        (20, 1, backup.address.port(), "host.test"),
        (10, 1, 9, "gone.test"),
    ];
    dns.says("_api._tcp.example.test", Says::Srv(services));
    let yaml = yaml(&dns, "\"http://_api._tcp.example.test\"", "").replace("balance: round_robin", "balance: least_requests");
    let edge = Portolan::start(&yaml).await;
    let mut count = 0;
    for _ in 0..200 {
        count += usize::from(edge.get("/", &[]).await.text() == "heavy");
    }
    assert!((120..180).contains(&count), "{count} of 200");
    assert_eq!(backup.count(), 0);
    drop((heavy, light));
    wait_for(&edge, "backup").await;
}
