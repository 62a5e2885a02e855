//! Certificates for clients, read from their files.

use std::collections::HashMap;
use std::hash::Hash;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::gather::{Gathered, KnownCertificates, certificates_of};
use crate::config::problem::KeyPath;
use crate::config::units::HostPattern;
use crate::config::{self, Config, Input, Paths, Problem, Severity};
use crate::key_path;
use crate::listeners::acme::Acme;
use crate::listeners::{Certificate, Names, SOON};

impl Gathered {
    /// Certificates for clients, and the authorities of theirs.
    pub(super) fn listeners(&mut self, paths: &Paths, config: &Config, known: &KnownCertificates) -> KnownCertificates {
        let mut read = HashMap::new();
        for (i, listener) in config.listeners.iter().enumerate() {
            let Some(config::Tls { certificates, acme, profile: _, client_auth }) = &listener.tls else { continue };
            let at = key_path!["listeners", i, "tls"];
            for (j, certificate) in certificates.iter().enumerate() {
                let at = at.join("certificates").join(j);
                if let Some(shown) = self.certificate(paths, &at, certificate, known) {
                    read.insert(certificate.clone(), shown.clone());
                    self.resources.certificates.insert(certificate.clone(), shown);
                }
            }
            if let Some(acme) = acme.as_ref().and_then(|acme| got(paths, config, acme)) {
                for name in &acme.names {
                    let certificate = acme.certificate(name);
                    if let Some(shown) = self.got(paths, &at.join("acme"), &certificate, known) {
                        read.insert(certificate.clone(), shown.clone());
                        self.resources.certificates.insert(certificate, shown);
                    }
                }
                acme.hash(&mut self.hasher);
                self.resources.acme.insert(i, Arc::new(acme));
            }
            if let Some(config::ClientAuth { ca, optional: _ }) = client_auth
                && let Some(der) = self.pem(paths, ca, &at.join("client_auth").join("ca"), "authorities", certificates_of)
            {
                self.resources.authorities.insert(ca.clone(), der.into());
            }
        }
        read
    }

    /// A certificate that was got. One that has not come yet, or is broken, is no reason not to begin: another will come.
    fn got(
        &mut self,
        paths: &Paths,
        at: &KeyPath,
        files: &config::Certificate,
        known: &KnownCertificates,
    ) -> Option<Arc<Certificate>> {
        if !files.cert.exists() && !known.contains_key(files) {
            self.inputs.push(Input::now(files.cert.clone()));
            return None;
        }
        let told = self.problems.len();
        let certificate = self.certificate(paths, at, files, known);
        for problem in self.problems.iter_mut().skip(told) {
            problem.severity = Severity::Warning;
            problem.path = at.clone();
        }
        certificate
    }

    /// A certificate for clients. One that cannot be used, or is half written, leaves the one that is shown now.
    fn certificate(
        &mut self,
        paths: &Paths,
        at: &KeyPath,
        files: &config::Certificate,
        known: &KnownCertificates,
    ) -> Option<Arc<Certificate>> {
        let config::Certificate { cert, key, ocsp } = files;
        let resolved = config::Certificate {
            cert: paths.resolve(cert),
            key: paths.resolve(key),
            ocsp: ocsp.as_ref().map(|ocsp| paths.resolve(ocsp)),
        };
        for path in [Some(&resolved.cert), Some(&resolved.key), resolved.ocsp.as_ref()].into_iter().flatten() {
            self.inputs.push(Input::now(path.clone()));
        }
        let shown = match (self.stapled(at, &resolved, known.contains_key(files)), known.get(files)) {
            (Ok(shown), _) => Arc::new(Certificate { path: cert.clone(), ..shown }),
            (Err((step, error)), None) => {
                self.problems.push(Problem::error(at.join(step), error).label("this file"));
                return None;
            }
            (Err((step, error)), Some(before)) => {
                tracing::error!(path = %resolved.cert.display(), error, "a certificate cannot be used; the last good one is shown");
                let message = format!("{error}; the last good one is shown");
                self.problems.push(Problem::warning(at.join(step), message).label("this file"));
                before.clone()
            }
        };
        shown.key.cert.hash(&mut self.hasher);
        shown.key.ocsp.hash(&mut self.hasher);
        let left = (UNIX_EPOCH + shown.expires).duration_since(SystemTime::now());
        let days = |left: Duration| left.as_secs() / (24 * 60 * 60);
        let message = match left {
            Err(_) => Some("this certificate has expired: browsers warn of it".to_owned()),
            Ok(left) if left < SOON => Some(format!("this certificate expires in {} days", days(left))),
            Ok(_) => None,
        };
        self.problems.extend(message.map(|message| Problem::warning(at.join("cert"), message)));
        Some(shown)
    }

    /// What is shown, if need be without an OCSP response that cannot be used: the certificate is what counts. Who begins
    /// so hears of it.
    fn stapled(&mut self, at: &KeyPath, files: &config::Certificate, began: bool) -> Result<Certificate, (&'static str, String)> {
        match shown(files) {
            Err(("ocsp", error)) if began => {
                tracing::error!(path = %files.cert.display(), error, "an OCSP response cannot be used; the certificate is shown without");
                let message = format!("{error}; the certificate is shown without");
                self.problems.push(Problem::warning(at.join("ocsp"), message).label("this file"));
                shown(&config::Certificate { ocsp: None, ..files.clone() })
            }
            shown => shown,
        }
    }
}

/// What is got by itself; nothing where it could not be kept.
fn got(paths: &Paths, config: &Config, acme: &config::Acme) -> Option<Acme> {
    let config::Acme { email, directory, ca, names, storage } = acme;
    let storage = match (storage, &config.state_dir) {
        (Some(storage), _) => paths.resolve(storage),
        (None, Some(dir)) => paths.resolve(dir).join("acme"),
        (None, None) => return None,
    };
    let hosts = || config.routes.iter().flat_map(|route| &route.hosts);
    let asked: Vec<&HostPattern> = if names.is_empty() { hosts().collect() } else { names.iter().collect() };
    let exact = |host: &&HostPattern| match host {
        HostPattern::Exact(name) => Some(name.as_str().into()),
        HostPattern::Any | HostPattern::Below(_) => None,
    };
    let mut names: Vec<Box<str>> = asked.iter().filter_map(exact).collect();
    names.sort_unstable();
    names.dedup();
    Some(Acme {
        email: email.clone(),
        directory: directory.clone(),
        ca: ca.as_ref().map(|ca| paths.resolve(ca)),
        storage: Acme::folder(storage, directory),
        names: names.into(),
    })
}

/// What clients are shown; an error with the key that it is about.
fn shown(files: &config::Certificate) -> Result<Certificate, (&'static str, String)> {
    let config::Certificate { cert, key, ocsp } = files;
    let unusable = |what: &str, path: &Path, error: String| format!("the {what} in `{}` cannot be used: {error}", path.display());
    let chain = certificates_of(cert).map_err(|error| ("cert", unusable("certificate", cert, error)))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| ("key", unusable("key", key, error.to_string())))?;
    let (names, expires) = names_of(&chain).map_err(|error| ("cert", unusable("certificate", cert, error)))?;
    let chain = chain.into_iter().map(CertificateDer::from).collect();
    let mut pair = rustls::sign::CertifiedKey::from_der(chain, private, &rustls::crypto::ring::default_provider())
        .map_err(|error| ("key", format!("certificate and key cannot be used together: {error}")))?;
    if let Some(ocsp) = ocsp {
        let response = std::fs::read(ocsp).map_err(|error| ("ocsp", unusable("OCSP response", ocsp, error.to_string())))?;
        if !is_successful(&response) {
            return Err((
                "ocsp",
                unusable("OCSP response", ocsp, "it is no response in DER, or says that there is none".to_owned()),
            ));
        }
        pair.ocsp = Some(response);
    }
    Ok(Certificate { path: cert.clone(), key: Arc::new(pair), names, expires })
}

/// RFC 6960, section 4.2.1: a sequence, and the first in it says whether it is a response at all (0).
fn is_successful(response: &[u8]) -> bool {
    let rest = match response {
        [0x30, short @ ..=0x7f, rest @ ..] if usize::from(*short) == rest.len() => rest,
        [0x30, 0x81, length, rest @ ..] if usize::from(*length) == rest.len() => rest,
        [0x30, 0x82, high, low, rest @ ..] if usize::from(u16::from_be_bytes([*high, *low])) == rest.len() => rest,
        _ => return false,
    };
    rest.starts_with(&[0x0a, 0x01, 0x00])
}

/// The names that the first of these is for, and when it expires, since 1970.
fn names_of(chain: &[Vec<u8>]) -> Result<(Names, Duration), String> {
    let leaf = chain.first().ok_or("there is no certificate in it")?;
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf).map_err(|error| error.to_string())?;
    let names = leaf.subject_alternative_name().map_err(|error| error.to_string())?;
    let all = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        x509_parser::extensions::GeneralName::DNSName(name) => Some(name.to_ascii_lowercase().into()),
        _ => None,
    });
    let expires = u64::try_from(leaf.validity().not_after.timestamp()).unwrap_or_default();
    let mut names: Vec<Box<str>> = all.collect();
    names.sort_unstable();
    Ok((names.into(), Duration::from_secs(expires)))
}
