//! Gets certificates and renews them (ACME, RFC 8555), one name at a time.
//!
//! Everything is in files, each replaced whole: an account, a certificate with its key for every name, what is asked for
//! now. A reload shows what came, as it does with any other certificate. Nodes that share the folder share all of it: who
//! holds a name's lock asks for it, and every node answers the authority.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, Identifier, NewAccount, NewOrder, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use rustc_hash::FxHashMap;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::kept;
use crate::listeners::acme::Acme;
use crate::state::State;

/// How often certificates are looked at.
const LOOK: Duration = Duration::from_secs(10);
/// How often nodes look for what an authority may ask them.
const SHARE: Duration = Duration::from_secs(1);
/// After a failure; doubled by each that follows. Let's Encrypt refuses whoever fails five times in an hour.
const AGAIN: Duration = Duration::from_secs(5 * 60);
/// How long to wait for another node that makes the account.
const ACCOUNT_WAIT: Duration = Duration::from_secs(30);
/// As long as it gets.
const LONGEST: Duration = Duration::from_secs(6 * 60 * 60);
/// For all steps of one order together.
const PATIENCE: Duration = Duration::from_secs(180);
/// What was asked for this long ago was left behind.
const FORGOTTEN: Duration = Duration::from_secs(60 * 60);

const ACCOUNT: &str = "account.json";

/// What an authority asks for now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Asked {
    name: Box<str>,
    token: Box<str>,
    authorization: Box<str>,
}

/// How an order ended, but for errors.
enum Ended {
    Got,
    /// Somebody else has it, or asks for it.
    Elsewhere,
}

/// Failures in a row, and when to try again.
struct Failures {
    count: u32,
    next: Instant,
}

/// Looks for ever.
pub async fn run(state: Arc<State>) {
    tokio::spawn(share(state.clone()));
    let mut failures: HashMap<PathBuf, Failures> = HashMap::new();
    loop {
        for (acme, over_http) in wanted(&state) {
            for name in &acme.names {
                let file = acme.file(name);
                let failed = failures.get(&file);
                if failed.is_some_and(|failed| failed.next > Instant::now()) || !is_due(&file) {
                    continue;
                }
                // A share that is away for a while is no reason to ask for all of it anew.
                if !acme.storage.exists() && is_shown(&state, &file) {
                    continue;
                }
                let count = failed.map_or(0, |failed| failed.count);
                // One way may be closed: the other is tried next.
                let way = if over_http && count.is_multiple_of(2) { ChallengeType::Http01 } else { ChallengeType::TlsAlpn01 };
                let got = tokio::time::timeout(PATIENCE, get(&acme, name, way)).await;
                match got.unwrap_or_else(|_| Err(anyhow::anyhow!("it took longer than {PATIENCE:?}"))) {
                    Ok(Ended::Got) => {
                        failures.remove(&file);
                        tracing::info!(name, directory = acme.directory, "got a certificate");
                        state.metrics.connection.ordered(true);
                    }
                    Ok(Ended::Elsewhere) => {}
                    Err(error) => {
                        let wait = AGAIN.saturating_mul(1 << count.min(10)).min(LONGEST).mul_f64(0.8 + 0.4 * fastrand::f64());
                        tracing::error!(name, directory = acme.directory, error = %format!("{error:#}"), ?wait, "no certificate");
                        failures.insert(file, Failures { count: count.saturating_add(1), next: Instant::now() + wait });
                        state.metrics.connection.ordered(false);
                    }
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Which certificates are wanted, and whether names can be proven over HTTP.
fn wanted(state: &State) -> Vec<(Arc<Acme>, bool)> {
    let live = state.live.load();
    let listeners = &live.snapshot.listeners;
    let over_http = listeners.iter().any(|listener| listener.tls.is_none());
    let all = listeners.iter().filter_map(|listener| listener.tls.as_ref()?.acme.clone());
    all.map(|acme| (acme, over_http)).collect()
}

/// Is a certificate of this file shown to clients?
fn is_shown(state: &State, file: &Path) -> bool {
    let live = state.live.load();
    let mut tls = live.snapshot.listeners.iter().filter_map(|listener| listener.tls.as_ref());
    tls.any(|tls| tls.certificates.all.iter().any(|certificate| certificate.path == file))
}

/// A certificate is renewed once two thirds of its life are over; one that is broken is none.
fn is_due(file: &Path) -> bool {
    let pem = match fs::read(file) {
        Ok(pem) => pem,
        // What cannot be read now may be good.
        Err(error) => return error.kind() == io::ErrorKind::NotFound,
    };
    let due = || {
        let der = CertificateDer::from_pem_slice(&pem).ok()?;
        let (_, certificate) = x509_parser::parse_x509_certificate(&der).ok()?;
        let at = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or_default();
        let (from, to) = (at(certificate.validity().not_before), at(certificate.validity().not_after));
        Some(UNIX_EPOCH + Duration::from_secs(from + to.saturating_sub(from) / 3 * 2))
    };
    due().is_none_or(|due| due <= SystemTime::now())
}

/// Asks for a name's certificate.
async fn get(acme: &Acme, name: &str, way: ChallengeType) -> anyhow::Result<Ended> {
    for folder in ["certificates", "challenges", "locks"] {
        let folder = acme.storage.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("`{}` cannot be made", folder.display()))?;
    }
    let Some(_lock) = locked(acme, name).context("no lock")? else { return Ok(Ended::Elsewhere) };
    if !is_due(&acme.file(name)) {
        return Ok(Ended::Elsewhere);
    }
    let account = account(acme).await.context("no account")?;
    let mut order = account.new_order(&NewOrder::new(&[Identifier::Dns(name.to_owned())])).await.context("no order")?;
    let mut asked = None;
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        match authorization.status {
            AuthorizationStatus::Valid => continue,
            AuthorizationStatus::Pending => {}
            other => bail!("the authorization is {other:?}"),
        }
        let mut challenge = authorization.challenge(way.clone()).with_context(|| format!("{way:?} is not offered"))?;
        let published = Published::new(
            acme,
            Asked {
                name: name.into(),
                token: challenge.token.as_str().into(),
                authorization: challenge.key_authorization().as_str().into(),
            },
        )?;
        asked = Some(published);
        // Every node looks once in a while.
        tokio::time::sleep(SHARE * 2).await;
        challenge.set_ready().await?;
    }
    let retries = RetryPolicy::new().timeout(PATIENCE);
    let status = order.poll_ready(&retries).await?;
    if status != OrderStatus::Ready {
        bail!("the authority did not see what it asked for ({})", why(&mut order).await);
    }
    drop(asked);
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.distinguished_name = DistinguishedName::new();
    order.finalize_csr(params.serialize_request(&key)?.der()).await?;
    let chain = order.poll_certificate(&retries).await?;
    let both = format!("{}{chain}", key.serialize_pem());
    usable(&both, name)?;
    kept::replace(&acme.storage.join("certificates"), &format!("{name}.pem"), both.as_bytes(), 0o600)?;
    Ok(Ended::Got)
}

/// What the authority says of the challenge that failed.
async fn why(order: &mut instant_acme::Order) -> String {
    let mut authorizations = order.authorizations();
    while let Some(Ok(authorization)) = authorizations.next().await {
        if let Some(error) = authorization.challenges.iter().find_map(|challenge| challenge.error.as_ref()) {
            return error.to_string();
        }
    }
    "it does not say why".to_owned()
}

/// Is it what was asked for? What is shown to clients is replaced by nothing less.
fn usable(pem: &str, name: &str) -> anyhow::Result<()> {
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes())?;
    let pair = CertifiedKey::from_der(chain, key, &default_provider())?;
    let server = rustls::pki_types::ServerName::try_from(name)?;
    let leaf = rustls::server::ParsedCertificate::try_from(pair.end_entity_cert()?)?;
    rustls::client::verify_server_name(&leaf, &server).context("it is for another name")
}

/// The account here, or a new one.
async fn account(acme: &Acme) -> anyhow::Result<Account> {
    let builder = || match &acme.ca {
        Some(ca) => Account::builder_with_root(ca),
        None => Account::builder(),
    };
    // One account for all nodes: whoever makes it makes it alone.
    let until = Instant::now() + ACCOUNT_WAIT;
    let lock = loop {
        match locked(acme, "account")? {
            Some(lock) => break lock,
            None if Instant::now() < until => tokio::time::sleep(SHARE).await,
            None => bail!("another node makes one, and does not come to an end"),
        }
    };
    match fs::read(acme.storage.join(ACCOUNT)) {
        Ok(bytes) => {
            drop(lock);
            let credentials: AccountCredentials = serde_json::from_slice(&bytes).with_context(|| format!("`{ACCOUNT}`"))?;
            return Ok(builder()?.from_credentials(credentials).await?);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let contact = acme.email.as_ref().map(|email| format!("mailto:{email}"));
    let contact: Vec<&str> = contact.iter().map(String::as_str).collect();
    let new = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
    let (account, credentials) = builder()?.create(&new, acme.directory.clone(), None).await?;
    kept::replace(&acme.storage, ACCOUNT, &serde_json::to_vec(&credentials)?, 0o600)?;
    Ok(account)
}

/// The lock of a name, if nobody has it. Dropping the file gives it back, and so does the end of a process.
fn locked(acme: &Acme, name: &str) -> io::Result<Option<File>> {
    let file = File::create(acme.storage.join("locks").join(name))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A file that tells all nodes what an authority may ask; dropping it takes it back.
struct Published(PathBuf);

impl Published {
    fn new(acme: &Acme, asked: Asked) -> anyhow::Result<Self> {
        let (dir, file) = (acme.storage.join("challenges"), format!("{}.json", asked.name));
        kept::replace(&dir, &file, &serde_json::to_vec(&asked)?, 0o600)?;
        Ok(Self(dir.join(file)))
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "what an authority asked for cannot be removed");
        }
    }
}

/// Answers what any node is asked.
async fn share(state: Arc<State>) {
    let mut known = Vec::new();
    loop {
        tokio::time::sleep(SHARE).await;
        let asked: Vec<Asked> = wanted(&state).iter().flat_map(|(acme, _)| asked(&acme.storage.join("challenges"))).collect();
        if asked == known {
            continue;
        }
        let certificates = asked.iter().filter_map(|asked| {
            let certificate = proof(asked).inspect_err(|error| tracing::error!(%error, name = %asked.name, "no proof over TLS"));
            Some((asked.name.clone(), Arc::new(certificate.ok()?)))
        });
        let tokens: FxHashMap<_, _> = asked.iter().map(|asked| (asked.token.clone(), asked.authorization.clone())).collect();
        state.memory.acme.replace(tokens, certificates.collect());
        known = asked;
    }
}

/// What is asked for in a folder.
fn asked(folder: &Path) -> Vec<Asked> {
    let Ok(files) = fs::read_dir(folder) else { return Vec::new() };
    let recent =
        |file: &fs::DirEntry| file.metadata().and_then(|meta| meta.modified()).is_ok_and(|at| at + FORGOTTEN > SystemTime::now());
    let files = files.flatten().filter(|file| file.path().extension().is_some_and(|e| e == "json") && recent(file));
    let mut asked: Vec<Asked> = files.filter_map(|file| serde_json::from_slice(&fs::read(file.path()).ok()?).ok()).collect();
    asked.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    asked
}

/// What proves a name over TLS (RFC 8737, section 3): a certificate of our own with a digest in it.
fn proof(asked: &Asked) -> anyhow::Result<CertifiedKey> {
    let digest = ring::digest::digest(&ring::digest::SHA256, asked.authorization.as_bytes());
    let mut params = CertificateParams::new(vec![asked.name.to_string()])?;
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest.as_ref())];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    let private = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let private = default_provider().key_provider.load_private_key(private)?;
    Ok(CertifiedKey::new(vec![certificate.der().clone()], private))
}
