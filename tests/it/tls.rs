//! Listeners that speak TLS.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, HandshakeKind, ProtocolVersion, SignatureScheme, SupportedProtocolVersion,
};

use crate::harness::*;

/// An authority that signs whatever a test wants.
struct Authority {
    params: CertificateParams,
    key: KeyPair,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { params, key, pem }
    }

    /// A certificate for these names, with this key.
    fn sign(&self, names: &[&str], key: &KeyPair, days: i64) -> rcgen::Certificate {
        let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        params.not_after =
            std::time::SystemTime::now().checked_add(std::time::Duration::from_secs(days as u64 * 86_400)).unwrap().into();
        let issuer = Issuer::from_params(&self.params, &self.key);
        params.signed_by(key, &issuer).unwrap()
    }

    /// The same in two files of a folder.
    fn write(&self, dir: &Path, file: &str, names: &[&str]) -> CertificateDer<'static> {
        let key = KeyPair::generate().unwrap();
        let certificate = self.sign(names, &key, 90);
        std::fs::write(dir.join(format!("{file}.pem")), certificate.pem()).unwrap();
        std::fs::write(dir.join(format!("{file}.key")), key.serialize_pem()).unwrap();
        certificate.der().clone()
    }
}

/// Believes every certificate, and remembers what it saw.
#[derive(Debug)]
struct Credulous {
    schemes: Vec<SignatureScheme>,
    seen: Mutex<(Vec<u8>, Vec<u8>)>,
}

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.seen.lock().unwrap() = (end_entity.to_vec(), ocsp.to_vec());
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &default_provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &default_provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

pub const BOTH: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

fn verifier(schemes: &[SignatureScheme]) -> Arc<Credulous> {
    let all = default_provider().signature_verification_algorithms.supported_schemes();
    let schemes = if schemes.is_empty() { all } else { schemes.to_vec() };
    Arc::new(Credulous { schemes, seen: Mutex::default() })
}

fn client(
    verifier: &Arc<Credulous>,
    versions: &[&'static SupportedProtocolVersion],
    own: Option<(&rcgen::Certificate, &KeyPair)>,
) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider())).with_protocol_versions(versions).unwrap();
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier.clone());
    match own {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            builder.with_client_auth_cert(vec![certificate.der().clone()], key).unwrap()
        }
    }
}

async fn connect(edge: &Portolan, config: &Arc<ClientConfig>, name: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(edge.address).await.unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    tokio_rustls::TlsConnector::from(config.clone()).connect(name, stream).await
}

/// Which certificate is shown for a name on this connection.
pub async fn shown_at(stream: TcpStream, name: &str, versions: &[&'static SupportedProtocolVersion]) -> std::io::Result<Vec<u8>> {
    let verifier = verifier(&[]);
    let config = Arc::new(client(&verifier, versions, None));
    tokio_rustls::TlsConnector::from(config).connect(ServerName::try_from(name.to_owned()).unwrap(), stream).await?;
    Ok(verifier.seen.lock().unwrap().0.clone())
}

/// One request, and all of the answer.
async fn ask(stream: &mut TlsStream<TcpStream>, host: &str, headers: &str) -> Response {
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.unwrap().unwrap();
    parse(&bytes, false)
}

/// Which certificate is shown for a name.
async fn shown(
    edge: &Portolan,
    name: &str,
    schemes: &[SignatureScheme],
    versions: &[&'static SupportedProtocolVersion],
) -> Vec<u8> {
    let verifier = verifier(schemes);
    connect(edge, &Arc::new(client(&verifier, versions, None)), name).await.unwrap();
    verifier.seen.lock().unwrap().0.clone()
}

/// So many handshakes ended so. The client is done with one before the server is.
async fn counted(edge: &Portolan, result: &str, count: f64) {
    let line = format!("portolan_tls_handshakes_total{{result=\"{result}\"}}");
    let wait = async {
        while edge.metric(&line).await != count {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never {count} times {result}"));
}

/// A process with one route to `origin`, and a listener with this TLS.
async fn edge(dir: tempfile::TempDir, origin: &Origin, tls: &str) -> Portolan {
    std::fs::write(dir.path().join("portolan.yaml"), yaml(origin, tls, "")).unwrap();
    Portolan::in_dir(dir).await
}

fn yaml(origin: &Origin, tls: &str, more: &str) -> String {
    format!(
        "listeners: [{{ address: \"127.0.0.1:0\", tls: {tls} }}]\nadmin: {{ address: \"127.0.0.2:0\" }}\nregions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\naccess_log: {{ path: \"off\" }}\n{more}",
        origin.url()
    )
}

fn files(names: &[&str]) -> String {
    let each: Vec<String> = names.iter().map(|name| format!("{{ cert: {name}.pem, key: {name}.key }}")).collect();
    format!("[{}]", each.join(", "))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_name_has_its_certificate() {
    let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
    let one = authority.write(dir.path(), "one", &["one.example", "WWW.one.example"]);
    let wild = authority.write(dir.path(), "wild", &["*.wild.example"]);
    let exact = authority.write(dir.path(), "exact", &["exact.wild.example"]);
    // The same names, and another algorithm.
    let rsa = KeyPair::from_pem(include_str!("rsa.key")).unwrap();
    let rsa_of_one = authority.sign(&["one.example", "www.one.example"], &rsa, 90);
    std::fs::write(dir.path().join("rsa.pem"), rsa_of_one.pem()).unwrap();
    std::fs::write(dir.path().join("rsa.key"), include_str!("rsa.key")).unwrap();
    let origin = Origin::always(ok("x")).await;
    let edge = edge(dir, &origin, &format!("{{ certificates: {} }}", files(&["rsa", "one", "wild", "exact"]))).await;
    let old = [SignatureScheme::RSA_PSS_SHA256, SignatureScheme::RSA_PKCS1_SHA256];
    for (name, schemes, expected) in [
        ("one.example", &[][..], &one),
        ("www.one.example", &[], &one),
        ("one.example", &old, rsa_of_one.der()),
        ("a.wild.example", &[], &wild),
        ("EXACT.wild.example", &[], &exact),
        ("wild.example", &[], &one),
        ("a.b.wild.example", &[], &one),
        ("unknown.example", &old, rsa_of_one.der()),
        ("127.0.0.1", &[], &one),
    ] {
        for versions in [BOTH, &[&rustls::version::TLS12]] {
            assert!(shown(&edge, name, schemes, versions).await == **expected, "{name} {schemes:?}");
        }
    }
    counted(&edge, "ok", 18.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_spoken_inside_is_agreed_on() {
    let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path(), "one", &["one.example"]);
    let origin = Origin::always(ok("served")).await;
    let edge = edge(dir, &origin, &format!("{{ certificates: {} }}", files(&["one"]))).await;
    let mut config = client(&verifier(&[]), BOTH, None);
    let mut stream = connect(&edge, &Arc::new(config.clone()), "one.example").await.unwrap();
    let answer = ask(&mut stream, "one.example", "X-Forwarded-Proto: gopher\r\n").await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "served"), "{}", answer.head);
    assert_eq!(origin.received()[0].all("x-forwarded-proto"), ["https"]);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let mut stream = connect(&edge, &Arc::new(config.clone()), "one.example").await.unwrap();
    assert_eq!(ask(&mut stream, "one.example", "").await.status, 200);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let stream = connect(&edge, &Arc::new(config.clone()), "one.example").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let get = |host: &str| http::Request::get(format!("https://{host}/")).body(()).unwrap();
    for (host, status) in [("one.example", 200), ("one.example:8443", 200), ("other.example", 421)] {
        let (answer, _) = client.send_request(get(host), true).unwrap();
        assert_eq!(answer.await.unwrap().status(), status, "{host}");
    }
    config.alpn_protocols = vec![b"gopher".to_vec()];
    assert!(connect(&edge, &Arc::new(config), "one.example").await.is_err());
    counted(&edge, "failed", 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_for_the_names_of_its_certificate() {
    let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path(), "one", &["one.example", "*.one.example"]);
    authority.write(dir.path(), "two", &["two.example"]);
    let origin = Origin::always(ok("served")).await;
    let edge = edge(dir, &origin, &format!("{{ certificates: {} }}", files(&["one", "two"]))).await;
    let config = Arc::new(client(&verifier(&[]), BOTH, None));
    for (name, host, status) in [
        ("one.example", "one.example", 200),
        ("one.example", "ONE.example.:443", 200),
        ("one.example", "a.one.example", 200),
        ("one.example", "two.example", 421),
        ("two.example", "one.example", 421),
        ("two.example", "two.example", 200),
        // Whoever asked for no name, or for one that is not here, is shown the first.
        ("127.0.0.1", "two.example", 200),
        ("unknown.example", "unknown.example", 200),
        ("unknown.example", "one.example", 200),
        ("unknown.example", "two.example", 421),
    ] {
        let mut stream = connect(&edge, &config, name).await.unwrap();
        let answer = ask(&mut stream, host, "").await;
        assert_eq!(answer.status, status, "{name} {host}: {}", answer.head);
    }
    assert_eq!(edge.metric("portolan_requests_total{code=\"421\",method=\"GET\",route=\"_none\"}").await, 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn modern_is_tls_13_alone() {
    for (profile, old, versions) in [("intermediate", true, 2), ("modern", false, 1)] {
        let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
        authority.write(dir.path(), "one", &["one.example"]);
        let origin = Origin::always(ok("x")).await;
        let edge = edge(dir, &origin, &format!("{{ certificates: {}, profile: {profile} }}", files(&["one"]))).await;
        let mut spoken = BTreeSet::new();
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let stream = connect(&edge, &Arc::new(client(&verifier(&[]), &[version], None)), "one.example").await;
            if let Ok(stream) = stream {
                spoken.insert(stream.get_ref().1.protocol_version().unwrap() == ProtocolVersion::TLSv1_2);
            }
        }
        assert_eq!((spoken.contains(&true), spoken.len()), (old, versions), "{profile}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_outlive_a_reload() {
    for version in BOTH {
        let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
        authority.write(dir.path(), "one", &["one.example"]);
        let origin = Origin::always(ok("x")).await;
        let tls = format!("{{ certificates: {} }}", files(&["one"]));
        let edge = edge(dir, &origin, &tls).await;
        let config = Arc::new(client(&verifier(&[]), &[version], None));
        let mut kinds = Vec::new();
        for round in 0..3 {
            if round == 2 {
                replace(&edge.path("portolan.yaml"), &yaml(&origin, &tls, "cache: { grace: 1h }\n"));
                edge.reloader.reload("test").await.unwrap();
                assert_eq!(edge.state.reload.lock().generation, 2);
            }
            let mut stream = connect(&edge, &config, "one.example").await.unwrap();
            assert_eq!(ask(&mut stream, "one.example", "").await.status, 200);
            kinds.push(stream.get_ref().1.handshake_kind());
        }
        let (full, resumed) = (Some(HandshakeKind::Full), Some(HandshakeKind::Resumed));
        assert_eq!(kinds, [full, resumed, resumed], "{version:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_certificate_is_shown_and_a_broken_one_is_not() {
    let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
    let first = authority.write(dir.path(), "one", &["one.example"]);
    let origin = Origin::always(ok("x")).await;
    let edge = edge(dir, &origin, &format!("{{ certificates: {} }}", files(&["one"]))).await;
    assert!(shown(&edge, "one.example", &[], BOTH).await == *first);
    let until_shown = async |expected: &CertificateDer<'_>| {
        let wait = async {
            while shown(&edge, "one.example", &[], BOTH).await != **expected {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("it is never shown");
    };
    let second = authority.write(&edge.path(""), "one", &["one.example"]);
    until_shown(&second).await;
    // Half of a pair, and then no certificate at all: what was good goes on, and is told of.
    let other = KeyPair::generate().unwrap();
    for (file, text) in [("one.key", other.serialize_pem()), ("one.pem", "nothing".to_owned())] {
        std::fs::write(edge.path(file), text).unwrap();
        edge.until("the broken one was seen", |state| {
            state.reload.lock().problems.iter().any(|p| p.message.contains("the last good one is shown"))
        })
        .await;
        assert!(shown(&edge, "one.example", &[], BOTH).await == *second, "{file}");
        assert!(edge.state.reload.lock().successful);
    }
    // One that will expire soon says so.
    let key = KeyPair::generate().unwrap();
    let soon = authority.sign(&["one.example"], &key, 10);
    std::fs::write(edge.path("one.key"), key.serialize_pem()).unwrap();
    std::fs::write(edge.path("one.pem"), soon.pem()).unwrap();
    until_shown(soon.der()).await;
    edge.until("it is told of", |state| state.reload.lock().problems.iter().any(|p| p.message.contains("expires in 9 days")))
        .await;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let expires = edge.metric("portolan_tls_certificate_expiry_timestamp_seconds{certificate=\"one.pem\"}").await;
    assert!((9.0..=10.1).contains(&((expires - now) / 86_400.0)), "{expires}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ocsp_response_is_stapled() {
    let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path(), "one", &["one.example"]);
    let response = vec![0x30, 0x03, 0x0a, 0x01, 0x00];
    std::fs::write(dir.path().join("one.ocsp"), &response).unwrap();
    let origin = Origin::always(ok("x")).await;
    let edge = edge(dir, &origin, "{ certificates: [{ cert: one.pem, key: one.key, ocsp: one.ocsp }] }").await;
    for version in BOTH {
        let verifier = verifier(&[]);
        connect(&edge, &Arc::new(client(&verifier, &[version], None)), "one.example").await.unwrap();
        assert_eq!(verifier.seen.lock().unwrap().1, response, "{version:?}");
    }
    // What says that there is none is not shown, and keeps no new certificate from being shown.
    std::fs::write(edge.path("one.ocsp"), [0x30, 0x03, 0x0a, 0x01, 0x06]).unwrap();
    let second = authority.write(&edge.path(""), "one", &["one.example"]);
    edge.until("it is told of", |state| state.reload.lock().problems.iter().any(|p| p.message.contains("shown without"))).await;
    let verifier = verifier(&[]);
    let wait = async {
        while verifier.seen.lock().unwrap().0 != *second {
            connect(&edge, &Arc::new(client(&verifier, BOTH, None)), "one.example").await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the new one is never shown");
    assert!(verifier.seen.lock().unwrap().1.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_show_certificates() {
    let (authority, theirs, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let (key, strange_key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let own = theirs.sign(&["client.example"], &key, 90);
    let strange = strangers.sign(&["client.example"], &strange_key, 90);
    for optional in [false, true] {
        let dir = tempfile::TempDir::new().unwrap();
        authority.write(dir.path(), "one", &["one.example"]);
        std::fs::write(dir.path().join("clients.pem"), &theirs.pem).unwrap();
        let origin = Origin::always(ok("served")).await;
        let tls = format!("{{ certificates: {}, client_auth: {{ ca: clients.pem, optional: {optional} }} }}", files(&["one"]));
        let edge = edge(dir, &origin, &tls).await;
        for (shows, passes) in [(Some((&own, &key)), true), (None, optional), (Some((&strange, &strange_key)), false)] {
            let config = Arc::new(client(&verifier(&[]), BOTH, shows));
            let before = origin.count();
            let outcome = async {
                let mut stream = connect(&edge, &config, "one.example").await.ok()?;
                // With TLS 1.3 a client hears only afterwards that it is refused.
                stream
                    .write_all(b"GET / HTTP/1.1\r\nHost: one.example\r\nConnection: close\r\nClient-Cert: :Zm9yZ2Vk:\r\n\r\n")
                    .await
                    .ok()?;
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).await.ok()?;
                Some(parse(&bytes, false).status)
            }
            .await;
            assert_eq!(outcome == Some(200), passes, "optional: {optional}, {outcome:?}");
            assert_eq!(origin.count(), before + usize::from(passes));
            if passes {
                let told = origin.received()[before].all("client-cert").join("|");
                let expected = shows.map(|(certificate, _)| {
                    use base64::prelude::{BASE64_STANDARD, Engine};
                    format!(":{}:", BASE64_STANDARD.encode(certificate.der()))
                });
                assert_eq!(told, expected.unwrap_or_default());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_for_a_certificate_is_for_nobody_else() {
    let (authority, theirs) = (Authority::new(), Authority::new());
    let key = KeyPair::generate().unwrap();
    let own = theirs.sign(&["client.example"], &key, 90);
    let dir = tempfile::TempDir::new().unwrap();
    authority.write(dir.path(), "one", &["one.example"]);
    std::fs::write(dir.path().join("clients.pem"), &theirs.pem).unwrap();
    let stored = b"HTTP/1.1 200 OK\r\nCache-Control: public, max-age=60\r\nContent-Length: 2\r\n\r\n".to_vec();
    let origin = Origin::always(Act::Send([&stored[..], b"me"].concat())).await;
    let tls = format!("{{ certificates: {}, client_auth: {{ ca: clients.pem, optional: true }} }}", files(&["one"]));
    let text = yaml(&origin, &tls, "").replace("{ name: all }", "{ name: all, cache: { enabled: true } }");
    std::fs::write(dir.path().join("portolan.yaml"), text).unwrap();
    let edge = Portolan::in_dir(dir).await;
    let known = Arc::new(client(&verifier(&[]), BOTH, Some((&own, &key))));
    let anonymous = Arc::new(client(&verifier(&[]), BOTH, None));
    let mut kinds = Vec::new();
    for (config, status) in [(&known, "fwd=bypass"), (&anonymous, "fwd=uri-miss"), (&anonymous, "hit"), (&known, "fwd=bypass")] {
        let mut stream = connect(&edge, config, "one.example").await.unwrap();
        let answer = ask(&mut stream, "one.example", "").await;
        assert!(answer.header("cache-status").unwrap().contains(status), "{status}: {}", answer.head);
        kinds.push(stream.get_ref().1.handshake_kind());
    }
    // A certificate is asked for each time: one that was taken back or expired goes on in no session.
    assert!(kinds.iter().all(|kind| *kind == Some(HandshakeKind::Full)), "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_in_tls_is_sent_while_the_origin_pauses() {
    let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path(), "one", &["one.example"]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                let head = read_head(&mut stream, &mut buffer).await.unwrap();
                let length: usize = head.split([' ', '/']).nth(2).unwrap().parse().unwrap();
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", length + 1);
                stream.write_all(head.as_bytes()).await.unwrap();
                let _ = stream.write_all(&vec![b'x'; length]).await;
                // The last byte never comes: the client leaves once it has all the others.
                let _ = stream.read(&mut [0; 1]).await;
            });
        }
    });
    let yaml = format!(
        "listeners: [{{ address: \"127.0.0.1:0\", tls: {{ certificates: {} }} }}]\nadmin: {{ address: \"127.0.0.2:0\" }}\nregions: {{ a: {{ upstreams: [\"http://{address}\"] }} }}\nroutes: [{{ name: all, timeouts: {{ first_byte: 50s, total: 55s }} }}]\naccess_log: {{ path: \"off\" }}\n",
        files(&["one"])
    );
    std::fs::write(dir.path().join("portolan.yaml"), yaml).unwrap();
    let edge = Portolan::in_dir(dir).await;
    let config = Arc::new(client(&verifier(&[]), BOTH, None));
    // Where the last of it finds the socket full depends on sizes that nobody knows: many are tried.
    for length in (0..64).map(|nth| (2 << 20) + nth * 50_000) {
        let mut stream = connect(&edge, &config, "one.example").await.unwrap();
        stream.write_all(format!("GET /{length} HTTP/1.1\r\nHost: one.example\r\n\r\n").as_bytes()).await.unwrap();
        // Nothing is read until nothing more can be written.
        for _ in 0..20_000 {
            tokio::task::yield_now().await;
        }
        let (mut read, mut buffer) = (0, vec![0; 1 << 16]);
        while read < length {
            let some = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await;
            read += some.unwrap_or_else(|_| panic!("{} of {length} wait for what will not come", length - read)).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn browsers_come_with_tls() {
    let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path(), "one", &["one.example"]);
    let origin = Origin::always(ok("served")).await;
    let https = "https: { redirect: true, hsts: { max_age: 365d, include_subdomains: true } }";
    let tls = format!("{{ certificates: {} }}", files(&["one"]));
    let route = |https: &str| format!("routes: [{{ name: all, {https} }}]");
    std::fs::write(
        dir.path().join("portolan.yaml"),
        yaml(&origin, &tls, "client: { trusted_proxies: [] }\n").replace("routes: [{ name: all }]", &route(https)),
    )
    .unwrap();
    let edge = Portolan::in_dir(dir).await;
    let config = Arc::new(client(&verifier(&[]), BOTH, None));
    let mut stream = connect(&edge, &config, "one.example").await.unwrap();
    let answer = ask(&mut stream, "one.example", "").await;
    let hsts = Some("max-age=31536000; includeSubDomains");
    assert_eq!((answer.status, answer.header("strict-transport-security")), (200, hsts), "{}", answer.head);
    // The same listener without TLS, and a port of its own.
    for (https, trusted, location) in [
        (https, "[]", "https://one.example/a%20b?c=%41"),
        ("https: { redirect: true, port: 8443 }", "[]", "https://one.example:8443/a%20b?c=%41"),
        (https, "[127.0.0.0/8]", ""),
    ] {
        let text = format!(
            "regions: {{ a: {{ upstreams: [\"{}\"] }} }}\n{}\nclient: {{ trusted_proxies: {trusted} }}\n",
            origin.url(),
            route(https)
        );
        let plain = Portolan::start(&text).await;
        let headers = [("Host", "one.example:8080"), ("X-Forwarded-Proto", "https")];
        let answer = plain.get("/a%20b?c=%41", &headers).await;
        match location {
            "" => assert_eq!(answer.status, 200, "a trusted proxy says that it came over TLS: {}", answer.head),
            to => assert_eq!((answer.status, answer.header("location")), (308, Some(to)), "{}", answer.head),
        }
        assert_eq!(answer.header("strict-transport-security"), None, "nobody would believe it");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_tls_is_whole() {
    // Longer than buffers and records, and over a connection that goes on.
    let body: String = (0..3_000_000).map(|i| char::from(b'a' + (i / 1009 % 26) as u8)).collect();
    let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path(), "one", &["one.example"]);
    let origin = Origin::always(ok(&body)).await;
    let edge = edge(dir, &origin, &format!("{{ certificates: {} }}", files(&["one"]))).await;
    let mut stream = connect(&edge, &Arc::new(client(&verifier(&[]), BOTH, None)), "one.example").await.unwrap();
    for _ in 0..2 {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: one.example\r\n\r\n").await.unwrap();
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        while !bytes.ends_with(&body.as_bytes()[body.len() - 1009..]) || bytes.len() < body.len() {
            let n = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await.unwrap().unwrap();
            assert!(n > 0);
            bytes.extend_from_slice(&buffer[..n]);
        }
        assert!(bytes.ends_with(body.as_bytes()));
    }
    assert_eq!(ask(&mut stream, "one.example", "").await.body, body.as_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_says_who_connects() {
    let (dir, authority) = (tempfile::TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path(), "one", &["one.example"]);
    let origin = Origin::always(ok("served")).await;
    let text = |trusted: &str, tls: &str| {
        let client = format!("client: {{ trusted_proxies: {trusted} }}\noverload: {{ max_connections_per_client: 1 }}\n");
        yaml(&origin, &format!("{{ certificates: {} }}, proxy_protocol: true", files(&["one"])), &client)
            .replace("tls: { certificates: [{ cert: one.pem, key: one.key }] }", tls)
    };
    std::fs::write(dir.path().join("portolan.yaml"), text("[127.0.0.0/8]", "tls: null")).unwrap();
    let plain = Portolan::in_dir(dir).await;
    const HEADER: &str = "PROXY TCP4 198.51.100.7 192.0.2.1 4711 443\r\n";
    let say = async |edge: &Portolan, header: &str| {
        let mut stream = TcpStream::connect(edge.address).await.unwrap();
        let request = format!("{header}GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 203.0.113.1\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        // Who is refused may be reset.
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.unwrap();
        parse(&bytes, false).status
    };
    assert_eq!(say(&plain, HEADER).await, 200);
    assert_eq!(say(&plain, "PROXY UNKNOWN\r\n").await, 200);
    assert_eq!([say(&plain, "").await, say(&plain, "PROXY TCP4 nobody\r\n").await], [0, 0]);
    let told: Vec<_> = origin.received().iter().map(|request| request.one("cf-connecting-ip").map(str::to_owned)).collect();
    // The proxy's word for the client, whose own word then counts for nothing; without one the proxy's, whom it trusts.
    assert_eq!(told, [Some("198.51.100.7".to_owned()), Some("203.0.113.1".to_owned())]);
    assert_eq!(plain.metric("portolan_proxy_protocol_refused_total").await, 2.0);
    // Connections are the client's, not the proxy's.
    let mut held = TcpStream::connect(plain.address).await.unwrap();
    held.write_all(HEADER.as_bytes()).await.unwrap();
    held.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    assert!(held.read(&mut [0; 4096]).await.unwrap() > 0);
    assert_eq!(say(&plain, HEADER).await, 0);
    assert_eq!(say(&plain, &HEADER.replace("100.7", "100.8")).await, 200);
    // Before TLS.
    let dir = tempfile::TempDir::new().unwrap();
    authority.write(dir.path(), "one", &["one.example"]);
    std::fs::write(
        dir.path().join("portolan.yaml"),
        text("[127.0.0.0/8]", "tls: { certificates: [{ cert: one.pem, key: one.key }] }"),
    )
    .unwrap();
    let secured = Portolan::in_dir(dir).await;
    let mut stream = TcpStream::connect(secured.address).await.unwrap();
    stream.write_all(HEADER.as_bytes()).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client(&verifier(&[]), BOTH, None)));
    let mut stream = connector.connect(ServerName::try_from("one.example").unwrap(), stream).await.unwrap();
    assert_eq!(ask(&mut stream, "one.example", "").await.status, 200);
    assert_eq!(origin.received().last().unwrap().one("cf-connecting-ip"), Some("198.51.100.7"));
    // A stranger's word is none.
    let dir = tempfile::TempDir::new().unwrap();
    std::fs::write(dir.path().join("portolan.yaml"), text("[192.0.2.0/24]", "tls: null")).unwrap();
    let strict = Portolan::in_dir(dir).await;
    assert_eq!(say(&strict, HEADER).await, 0);
}

#[test]
fn what_cannot_be_used_is_told_at_its_place() {
    let authority = Authority::new();
    for (tls, break_it, at) in [
        ("{ certificates: [{ cert: none.pem, key: one.key }] }", "", "certificates[0].cert"),
        ("{ certificates: [{ cert: one.pem, key: two.key }] }", "", "certificates[0].key"),
        ("{ certificates: [{ cert: one.pem, key: one.key, ocsp: one.pem }] }", "", "certificates[0].ocsp"),
        ("{ certificates: [{ cert: one.pem, key: one.key }], client_auth: { ca: none.pem } }", "", "client_auth.ca"),
        ("{ certificates: [] }", "", "certificates"),
        ("{ certificates: [{ cert: one.pem, key: one.key }] }, proxy_protocol: true", "", "proxy_protocol"),
        ("{ certificates: [{ cert: one.pem, key: one.key }], acme: {} }", "", "acme"),
        ("{ certificates: [{ cert: one.pem, key: one.key }] }", "one.pem", "certificates[0].cert"),
    ] {
        let dir = tempfile::TempDir::new().unwrap();
        authority.write(dir.path(), "one", &["one.example"]);
        authority.write(dir.path(), "two", &["two.example"]);
        if !break_it.is_empty() {
            std::fs::write(dir.path().join(break_it), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        }
        let yaml = format!(
            "listeners: [{{ address: \"127.0.0.1:0\", tls: {tls} }}]\nregions: {{ a: {{ upstreams: [\"http://127.0.0.1:1\"] }} }}\nroutes: [{{ name: all }}]\n"
        );
        std::fs::write(dir.path().join("portolan.yaml"), yaml).unwrap();
        let paths = portolan::config::Paths { file: dir.path().join("portolan.yaml"), environment: None };
        match portolan::boot::boot(paths, false) {
            Err(portolan::boot::Refused::Problems(problems)) => {
                let errors: Vec<String> = problems.iter().filter(|p| p.is_error()).map(|p| p.render(false)).collect();
                assert!(errors.len() == 1 && errors[0].contains(at.rsplit('.').next().unwrap()), "{tls} {errors:?}");
            }
            other => panic!("{tls}: {other:?}"),
        }
    }
}
