//! Certificates by themselves (ACME, RFC 8555): what for, and what is shown to whoever asks whether a name is ours.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;
use rustc_hash::FxHashMap;
use rustls::sign::CertifiedKey;

use crate::config;

/// Where a name is proven over HTTP (RFC 8555, section 8.3).
pub const PATH: &str = "/.well-known/acme-challenge/";
/// What is spoken where a name is proven over TLS (RFC 8737, section 3).
pub const PROTOCOL: &[u8] = b"acme-tls/1";

/// Which certificates a listener gets by itself, from whom.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Acme {
    /// Whom the authority may write to.
    pub email: Option<String>,
    /// Its directory, a URL.
    pub directory: String,
    /// Who signed the directory's own certificate, where that is nobody whom everybody knows.
    pub ca: Option<PathBuf>,
    /// A folder for all of this authority; several nodes may share it.
    pub storage: PathBuf,
    /// Each gets a certificate.
    pub names: Box<[Box<str>]>,
}

impl Acme {
    /// The folder of an authority's certificates under `storage`.
    pub fn folder(storage: PathBuf, directory: &str) -> PathBuf {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        let name = directory.split_once("://").map_or(directory, |(_, rest)| rest);
        storage.join(name.chars().map(plain).collect::<String>())
    }

    /// The same, as the configuration would have it.
    pub fn certificate(&self, name: &str) -> config::Certificate {
        let file = self.file(name);
        config::Certificate { cert: file.clone(), key: file, ocsp: None }
    }

    /// A name's certificate and key, in one file, so that they are never of two orders.
    pub fn file(&self, name: &str) -> PathBuf {
        self.storage.join("certificates").join(format!("{name}.pem"))
    }
}

/// What proves that names are ours, while an authority asks.
#[derive(Debug, Default)]
pub struct Challenges {
    tokens: RwLock<FxHashMap<Box<str>, Box<str>>>,
    certificates: RwLock<FxHashMap<Box<str>, Arc<CertifiedKey>>>,
}

impl Challenges {
    /// What is answered at this path.
    pub fn answer(&self, path: &str) -> Option<Box<str>> {
        let token = path.strip_prefix(PATH)?;
        self.tokens.read().get(token).cloned()
    }

    /// What is shown for a name to whoever speaks [`PROTOCOL`].
    pub fn certificate(&self, name: &str) -> Option<Arc<CertifiedKey>> {
        self.certificates.read().get(name).cloned()
    }

    /// These are all that is asked for now.
    pub fn replace(&self, tokens: FxHashMap<Box<str>, Box<str>>, certificates: FxHashMap<Box<str>, Arc<CertifiedKey>>) {
        *self.tokens.write() = tokens;
        *self.certificates.write() = certificates;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_authority_has_a_folder() {
        let folder = Acme::folder("/s".into(), "https://acme.example:14000/dir?a=../x");
        assert_eq!(folder, PathBuf::from("/s/acme.example-14000-dir-a-..-x"));
    }

    #[test]
    fn tokens_answer_at_their_path_alone() {
        let challenges = Challenges::default();
        challenges.replace([("abc".into(), "abc.thumb".into())].into_iter().collect(), FxHashMap::default());
        assert_eq!(challenges.answer("/.well-known/acme-challenge/abc").as_deref(), Some("abc.thumb"));
        for path in ["/.well-known/acme-challenge/", "/.well-known/acme-challenge/abcd", "/abc", "abc"] {
            assert_eq!(challenges.answer(path), None, "{path}");
        }
    }
}
