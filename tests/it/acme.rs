//! Certificates by themselves, from Pebble: the server that Let's Encrypt tests its own clients with.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rcgen::{CertificateParams, KeyPair};
use tokio::net::TcpStream;

use crate::harness::*;
use crate::tls::{BOTH, shown_at};

/// An authority, and the names that it believes in: all of them are 127.0.0.1. Dropping it ends both.
struct Pebble {
    children: Vec<Helper>,
    directory: String,
    ca: PathBuf,
    dir: tempfile::TempDir,
    port: u16,
}

/// An address that nobody has for now.
fn free() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl Pebble {
    /// Not started yet, for whoever wants to be asked has to know it first.
    fn new() -> Self {
        let dir = tempfile::TempDir::new().unwrap();
        let port = free().port();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.is_ca = rcgen::IsCa::ExplicitNoCa;
        let own = params.self_signed(&key).unwrap();
        let ca = dir.path().join("pebble.pem");
        std::fs::write(&ca, own.pem()).unwrap();
        std::fs::write(dir.path().join("pebble.key"), key.serialize_pem()).unwrap();
        Self { children: Vec::new(), directory: format!("https://localhost:{port}/dir"), ca, dir, port }
    }

    /// Asks at these ports.
    async fn start(&mut self, http: u16, tls: u16) {
        let (dns, management) = (free(), free());
        let root = self.dir.path().display();
        let config = format!(
            r#"{{"pebble": {{"listenAddress": "127.0.0.1:{}", "managementListenAddress": "{management}",
            "certificate": "{root}/pebble.pem", "privateKey": "{root}/pebble.key", "httpPort": {http}, "tlsPort": {tls},
            "ocspResponderURL": "", "externalAccountBindingRequired": false}}}}"#,
            self.port
        );
        let file = self.dir.path().join("config.json");
        std::fs::write(&file, config).unwrap();
        let mut names = Command::new("pebble-challtestsrv");
        names.args(["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv6", "", "-dns01"]).arg(dns.to_string());
        names.arg("-management").arg(free().to_string());
        let mut pebble = Command::new("pebble");
        pebble.arg("-config").arg(&file).arg("-dnsserver").arg(dns.to_string()).env("PEBBLE_VA_NOSLEEP", "1");
        for command in [names, pebble].iter_mut() {
            let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
            self.children.push(Helper(child.expect("pebble is missing: run `make test-deps`")));
        }
        listening(SocketAddr::from(([127, 0, 0, 1], self.port))).await;
    }
}

/// A node that gets its certificates of `pebble`. Where it listens with TLS, if also without.
async fn node(pebble: &Pebble, storage: &Path, plain: bool) -> (Portolan, SocketAddr) {
    let dir = tempfile::TempDir::new().unwrap();
    let secured = free();
    let listeners = if plain { "{ address: \"127.0.0.1:0\" }, " } else { "" };
    let acme = format!(
        "{{ email: ops@one.example, directory: \"{}\", ca: {}, storage: {} }}",
        pebble.directory,
        pebble.ca.display(),
        storage.display()
    );
    let yaml = format!(
        "listeners: [{listeners}{{ address: \"{secured}\", tls: {{ acme: {acme} }} }}]\nadmin: {{ address: \"127.0.0.2:0\" }}\n\
         regions: {{ a: {{ upstreams: [\"http://{}\"] }} }}\nroutes: [{{ name: one, hosts: [one.example, \"*.two.example\"] }}]\n\
         access_log: {{ path: \"off\" }}\n",
        refused()
    );
    std::fs::write(dir.path().join("portolan.yaml"), yaml).unwrap();
    (Portolan::in_dir(dir).await, secured)
}

/// Waits until a certificate is shown for the name.
async fn comes(address: SocketAddr, name: &str, but: &[u8]) -> Vec<u8> {
    let wait = async {
        loop {
            match shown_at(TcpStream::connect(address).await.unwrap(), name, BOTH).await {
                Ok(shown) if shown != but => return shown,
                _ => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("no certificate comes")
}

fn work(edge: &Portolan) -> tokio::task::JoinHandle<()> {
    tokio::spawn(portolan::tasks::acme::run(edge.state.clone()))
}

fn names(der: &[u8]) -> String {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).unwrap();
    format!("{:?}", certificate.subject_alternative_name().unwrap().unwrap().value.general_names)
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http() {
    let (mut pebble, storage) = (Pebble::new(), tempfile::TempDir::new().unwrap());
    let (edge, secured) = node(&pebble, storage.path(), true).await;
    assert!(shown_at(TcpStream::connect(secured).await.unwrap(), "one.example", BOTH).await.is_err(), "there is none yet");
    pebble.start(edge.address.port(), refused().port()).await;
    let task = work(&edge);
    let shown = comes(secured, "one.example", &[]).await;
    assert_eq!(names(&shown), "[DNSName(\"one.example\")]");
    assert_eq!(edge.metric("portolan_acme_orders_total{result=\"ok\"}").await, 1.0);
    // What was proven is proven no more, and nobody but its owner reads the key.
    let folder = std::fs::read_dir(storage.path()).unwrap().next().unwrap().unwrap().path();
    assert_eq!(std::fs::read_dir(folder.join("challenges")).unwrap().count(), 0);
    for file in ["account.json", "certificates/one.example.pem"] {
        assert_eq!(std::fs::metadata(folder.join(file)).unwrap().permissions().mode() & 0o777, 0o600, "{file}");
    }
    task.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls() {
    let (mut pebble, storage) = (Pebble::new(), tempfile::TempDir::new().unwrap());
    let (edge, secured) = node(&pebble, storage.path(), false).await;
    pebble.start(refused().port(), secured.port()).await;
    let task = work(&edge);
    comes(secured, "one.example", &[]).await;
    task.abort();
}

/// The authority asks another node than the one that asked it.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_share_a_folder() {
    let (mut pebble, storage) = (Pebble::new(), tempfile::TempDir::new().unwrap());
    let (one, _) = node(&pebble, storage.path(), true).await;
    let (other, secured) = node(&pebble, storage.path(), true).await;
    // One of both holds the lock; neither is asked by the authority alone.
    pebble.start(other.address.port(), refused().port()).await;
    let tasks = [work(&one), work(&other)];
    let shown = comes(secured, "one.example", &[]).await;
    let orders = "portolan_acme_orders_total{result=\"ok\"}";
    assert_eq!(one.metric(orders).await + other.metric(orders).await, 1.0, "one order for both");
    one.until("it shows the same", |state| {
        let tls = state.live.load().snapshot.listeners[1].tls.as_ref().unwrap().certificates.clone();
        tls.all.first().is_some_and(|certificate| certificate.key.cert[0].as_ref() == shown)
    })
    .await;
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Old ones are shown until new ones are there; broken ones are as good as none.
#[tokio::test(flavor = "multi_thread")]
async fn two_thirds_of_a_life_are_enough() {
    for broken in [false, true] {
        let (mut pebble, storage) = (Pebble::new(), tempfile::TempDir::new().unwrap());
        let folder = portolan::listeners::acme::Acme::folder(storage.path().into(), &pebble.directory).join("certificates");
        std::fs::create_dir_all(&folder).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["one.example".to_owned()]).unwrap();
        let now = std::time::SystemTime::now();
        let days = |n: u64| std::time::Duration::from_secs(n * 86_400);
        (params.not_before, params.not_after) = ((now - days(61)).into(), (now + days(29)).into());
        let old = params.self_signed(&key).unwrap();
        let text = if broken { "rotten".to_owned() } else { format!("{}{}", key.serialize_pem(), old.pem()) };
        std::fs::write(folder.join("one.example.pem"), text).unwrap();
        let (edge, secured) = node(&pebble, storage.path(), true).await;
        if !broken {
            let shown = shown_at(TcpStream::connect(secured).await.unwrap(), "one.example", BOTH).await.unwrap();
            assert_eq!(shown, old.der().as_ref());
        }
        pebble.start(edge.address.port(), refused().port()).await;
        let task = work(&edge);
        comes(secured, "one.example", old.der()).await;
        task.abort();
    }
}

/// What the authority says is told, and what is shown stays.
#[tokio::test(flavor = "multi_thread")]
async fn failures_are_counted() {
    let (mut pebble, storage) = (Pebble::new(), tempfile::TempDir::new().unwrap());
    let (edge, _) = node(&pebble, storage.path(), true).await;
    pebble.start(refused().port(), refused().port()).await;
    let task = work(&edge);
    let wait = async {
        while edge.metric("portolan_acme_orders_total{result=\"failed\"}").await < 1.0 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it never failed");
    task.abort();
    // No name, no folder.
    for (acme, expected) in [
        ("{ storage: s }", "no name to get a certificate for"),
        ("{ names: [a.example] }", "no folder for what is got"),
        ("{ names: [a.example], storage: s, directory: \"http://a/\" }", "begins with `https://`"),
    ] {
        let dir = tempfile::TempDir::new().unwrap();
        let yaml = format!(
            "listeners: [{{ address: \"127.0.0.1:0\", tls: {{ acme: {acme} }} }}]\nregions: {{ a: {{ upstreams: [\"http://127.0.0.1:1\"] }} }}\nroutes: [{{ name: all }}]\n"
        );
        std::fs::write(dir.path().join("portolan.yaml"), yaml).unwrap();
        let check = Command::new(env!("CARGO_BIN_EXE_portolan"))
            .arg("check")
            .arg("--config")
            .arg(dir.path().join("portolan.yaml"))
            .output();
        let check = check.unwrap();
        assert!(!check.status.success() && String::from_utf8_lossy(&check.stderr).contains(expected), "{acme}: {check:?}");
    }
}
