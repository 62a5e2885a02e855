//! Where clients connect, and which certificate they are shown.

pub mod acme;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CipherSuite, ServerConfig, SignatureAlgorithm};
use smallvec::SmallVec;

use crate::request::host_name;
use acme::{Acme, Challenges, PROTOCOL};

/// This long before a certificate expires the operator is told.
pub const SOON: Duration = Duration::from_secs(21 * 24 * 60 * 60);

/// A listener that can run.
#[derive(Debug, Default)]
pub struct Listener {
    /// Clients speak TLS.
    pub tls: Option<Tls>,
    /// A proxy says first who the client is.
    pub introduced: bool,
}

/// What its handshakes are made with.
#[derive(Debug)]
pub struct Tls {
    /// Versions, ciphers, tickets, who has to show what.
    pub config: Arc<ServerConfig>,
    /// What is shown to whom.
    pub certificates: Arc<Certificates>,
    /// Which of these are got by themselves.
    pub acme: Option<Arc<Acme>>,
}

/// Names that a certificate is for.
pub type Names = Box<[Box<str>]>;

/// A certificate with its key.
#[derive(Debug)]
pub struct Certificate {
    /// Its file, as the configuration names it.
    pub path: PathBuf,
    /// What is shown, and signs.
    pub key: Arc<CertifiedKey>,
    /// Names that it is for, in lower case; `*.` stands for one label.
    pub names: Names,
    /// When it expires, since 1970.
    pub expires: Duration,
}

/// Certificates by name, several of a name by their algorithm.
#[derive(Debug)]
pub struct Certificates {
    /// All, in the order of the configuration.
    pub all: Box<[Arc<Certificate>]>,
    by_name: FxHashMap<Box<str>, Group>,
    /// For clients that ask for no name, or for one that is not here.
    default: Group,
    /// For authorities that ask whether a name is ours.
    challenges: Option<Arc<Challenges>>,
}

/// For one name: those that more clients can verify quickly (ECDSA, Ed25519) first.
type Group = SmallVec<[Arc<Certificate>; 2]>;

impl Certificate {
    /// Is it for this name (lower case, without port)? RFC 6125, section 6.4: a wildcard stands for the first label alone.
    pub fn covers(&self, name: &str) -> bool {
        let below = name.split_once('.').map(|(_, below)| below);
        self.names.iter().any(|own| **own == *name || (below.is_some() && own.strip_prefix("*.") == below))
    }

    /// Can this client verify what it signs?
    fn suits(&self, hello: &ClientHello<'_>) -> bool {
        let modern = hello.cipher_suites().iter().any(|suite| suite.as_str().is_some_and(|name| name.starts_with("TLS13_")));
        // Before TLS 1.3 the cipher suite names the algorithm as well (RFC 8422, section 2).
        let suite = match self.key.key.algorithm() {
            SignatureAlgorithm::RSA => hello.cipher_suites().iter().any(|suite| is_of(*suite, "_ECDHE_RSA_")),
            _ => hello.cipher_suites().iter().any(|suite| is_of(*suite, "_ECDHE_ECDSA_")),
        };
        (modern || suite) && self.key.key.choose_scheme(hello.signature_schemes()).is_some()
    }
}

fn is_of(suite: CipherSuite, kind: &str) -> bool {
    suite.as_str().is_some_and(|name| name.contains(kind))
}

/// A name as clients ask for it, made as certificates have it: in lower case, without a dot at its end.
pub fn asked(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

impl Certificates {
    /// By the names of each; the first of `all` is the default, with those of the same names.
    pub fn new(all: Vec<Arc<Certificate>>, challenges: Option<Arc<Challenges>>) -> Self {
        let mut by_name: FxHashMap<Box<str>, Group> = HashMap::default();
        let mut default = Group::new();
        let same = |first: &Arc<Certificate>, one: &Arc<Certificate>| {
            Arc::ptr_eq(first, one) || (!first.names.is_empty() && first.names == one.names)
        };
        for certificate in &all {
            for name in &certificate.names {
                by_name.entry(name.clone()).or_default().push(certificate.clone());
            }
            default.extend(all.first().filter(|first| same(first, certificate)).map(|_| certificate.clone()));
        }
        for group in by_name.values_mut().chain([&mut default]) {
            group.sort_by_key(|certificate| certificate.key.key.algorithm() == SignatureAlgorithm::RSA);
        }
        Self { all: all.into(), by_name, default, challenges }
    }

    /// Those for a name: the name itself before a wildcard, and the default for all others.
    fn group(&self, name: Option<&str>) -> &Group {
        let Some(name) = name else { return &self.default };
        let exact = self.by_name.get(name);
        let below = || self.by_name.get(&*format!("*.{}", name.split_once('.')?.1));
        exact.or_else(below).unwrap_or(&self.default)
    }

    /// May a request for `authority` come by a connection that was made for `name`? Where no name was asked for, or it is
    /// the same; and where the certificate that was shown is for both, for then clients share connections (RFC 9113,
    /// section 9.1.1).
    pub fn may_serve(&self, name: Option<&str>, authority: &str) -> bool {
        let Some(name) = name else { return true };
        let host = host_name(authority).to_ascii_lowercase();
        // Who names no host (HTTP/1.0) asks for what it was let in for.
        host.is_empty() || host == *name || self.group(Some(name)).iter().any(|certificate| certificate.covers(&host))
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(asked);
        if let Some(challenges) = &self.challenges
            && hello.alpn().is_some_and(|mut protocols| protocols.any(|protocol| protocol == PROTOCOL))
        {
            return challenges.certificate(name.as_deref()?);
        }
        let group = self.group(name.as_deref());
        // If none suits the handshake fails, and says so in its own words.
        let chosen = group.iter().find(|certificate| certificate.suits(&hello)).or(group.first());
        chosen.map(|certificate| certificate.key.clone())
    }
}
