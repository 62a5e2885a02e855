//! The reload machine: read -> same digest, stop -> compile -> boot settings differ, refuse -> resolve
//! new names -> one swap -> drop what is gone. A failure before the swap changes nothing.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex as SyncMutex;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::client::city::CityDatabase;
use crate::client::country::CountryDatabase;
use crate::client::place::Databases;
use crate::config::load::Failed;
use crate::config::problem::KeyPath;
use crate::config::{self, Config, Fingerprint, Input, Paths, Problem};
use crate::key_path;
use crate::memory::Memory;
use crate::observe::access_log;
use crate::regions::Identity;
use crate::snapshot::{Resources, Snapshot, compile};
use crate::state::{Live, ReloadStatus, State};

/// A database and the file it was read from.
type Read<T> = Option<(Fingerprint, Arc<T>)>;

/// Databases and the files they were read from: one that has not changed is not read again.
#[derive(Debug, Clone, Default)]
pub struct Known {
    countries: Read<CountryDatabase>,
    cities: Read<CityDatabase>,
}

/// A configuration that could be put in force.
#[derive(Debug)]
pub struct Build {
    /// What was typed.
    pub config: Config,
    /// What can run.
    pub snapshot: Snapshot,
    /// Warnings.
    pub warnings: Vec<Problem>,
    /// Every file it was made from.
    pub inputs: Vec<Input>,
    /// A digest of all of them.
    pub digest: u64,
    known: Known,
}

/// Reads and compiles everything, without touching what is in force. `known` spares reading a database
/// that has not changed. Blocks on disk.
pub fn build(paths: &Paths, known: &Known, memory: &Memory) -> Result<Build, Failed> {
    let mut loaded = config::load(paths)?;
    let mut gathered =
        Gathered { resources: Resources::default(), inputs: Vec::new(), problems: Vec::new(), hasher: DefaultHasher::new() };
    let client = &loaded.config.client;
    let (at, key) = (paths, key_path!["client", "country_database"]);
    let countries = gathered.database(
        at,
        client.country_database.as_ref(),
        key,
        "country",
        &known.countries,
        |db| &db.path,
        CountryDatabase::new,
    );
    let key = key_path!["client", "city_database"];
    let cities =
        gathered.database(at, client.city_database.as_ref(), key, "city", &known.cities, |db| &db.path, CityDatabase::new);
    gathered.resources.databases =
        Databases { countries: countries.as_ref().map(|(_, db)| db.clone()), cities: cities.as_ref().map(|(_, db)| db.clone()), systems: None };
    let known = Known { countries, cities };
    gathered.certificates(paths, &loaded.config);
    if let Some(dir) = &mut loaded.config.state_dir {
        *dir = paths.resolve(dir);
    }
    let log = &mut loaded.config.access_log.path;
    *log = access_log::resolve(log, |p| paths.resolve(p));
    let Gathered { resources, inputs, mut problems, mut hasher } = gathered;
    let inputs = [std::mem::take(&mut loaded.inputs), inputs].concat();
    let (snapshot, more) = match compile(&loaded.config, &resources, memory) {
        Ok((snapshot, warnings)) => (Some(snapshot), warnings),
        Err(problems) => (None, problems),
    };
    problems.extend(more);
    let problems = loaded.problems(problems);
    match snapshot {
        Some(snapshot) if !problems.iter().any(Problem::is_error) => {
            loaded.digest.hash(&mut hasher);
            Ok(Build { config: loaded.config, snapshot, warnings: problems, inputs, digest: hasher.finish(), known })
        }
        _ => Err(Failed { problems, inputs }),
    }
}

struct Gathered {
    resources: Resources,
    inputs: Vec<Input>,
    problems: Vec<Problem>,
    hasher: DefaultHasher,
}

impl Gathered {
    /// Reads a database, unless the known one is of the same file.
    #[expect(clippy::too_many_arguments, reason = "two kinds of databases are read in the same way")]
    fn database<T>(
        &mut self,
        paths: &Paths,
        path: Option<&PathBuf>,
        key: KeyPath,
        kind: &str,
        known: &Read<T>,
        path_of: impl FnOnce(&T) -> &PathBuf,
        new: impl FnOnce(PathBuf, Vec<u8>) -> Result<T, String>,
    ) -> Read<T> {
        let path = paths.resolve(path?);
        let input = Input::now(path.clone());
        let fingerprint = input.seen;
        self.inputs.push(input);
        let database = match known.as_ref().filter(|(of, db)| Some(*of) == fingerprint && *path_of(db) == path) {
            Some((_, known)) => Ok(known.clone()),
            None => std::fs::read(&path).map_err(|e| e.to_string()).and_then(|bytes| new(path.clone(), bytes)).map(Arc::new),
        };
        match (database, fingerprint) {
            (Ok(database), Some(fingerprint)) => {
                fingerprint.hash(&mut self.hasher);
                Some((fingerprint, database))
            }
            (Ok(_), None) => None,
            (Err(error), _) => {
                let message = format!("the {kind} database `{}` cannot be used: {error}", path.display());
                self.problems.push(Problem::error(key, message).label("this file"));
                None
            }
        }
    }

    /// Authorities, and certificates of ours, of every upstream.
    fn certificates(&mut self, paths: &Paths, config: &Config) {
        for (name, region) in &config.regions {
            for (i, upstream) in region.upstreams.iter().enumerate() {
                let at = key_path!["regions", name, "upstreams", i, "tls"];
                let config::UpstreamTls { sni: _, ca, cert, key } = upstream.options().tls;
                if let Some(ca) = ca
                    && let Some(der) = self.pem(paths, &ca, &at.join("ca"), "authorities", certificates)
                {
                    self.resources.authorities.insert(ca, der.into());
                }
                if let (Some(cert), Some(key)) = (cert, key) {
                    let chain = self.pem(paths, &cert, &at.join("cert"), "certificate", certificates);
                    let private = self.pem(paths, &key, &at.join("key"), "key", private_key);
                    if let (Some(chain), Some(private)) = (chain, private) {
                        match identity(chain, private) {
                            Ok(identity) => drop(self.resources.identities.insert((cert, key), Arc::new(identity))),
                            Err(error) => self.problems.push(Problem::error(at.join("key"), error).label("this file")),
                        }
                    }
                }
            }
        }
    }

    fn pem<T: Hash>(
        &mut self,
        paths: &Paths,
        path: &Path,
        at: &KeyPath,
        what: &str,
        read: impl FnOnce(&Path) -> Result<T, String>,
    ) -> Option<T> {
        let path = paths.resolve(path);
        self.inputs.push(Input::now(path.clone()));
        match read(&path) {
            Ok(found) => {
                found.hash(&mut self.hasher);
                Some(found)
            }
            Err(error) => {
                let message = format!("the {what} in `{}` cannot be used: {error}", path.display());
                self.problems.push(Problem::error(at.clone(), message).label("this file"));
                None
            }
        }
    }
}

/// The certificates of a PEM file, each known to parse.
fn certificates(path: &Path) -> Result<Vec<Vec<u8>>, String> {
    let all = CertificateDer::pem_file_iter(path).map_err(|e| e.to_string())?;
    let all: Vec<Vec<u8>> = all.map(|c| c.map(|c| c.to_vec())).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
    if all.is_empty() {
        return Err("there is no certificate in it".to_owned());
    }
    for der in &all {
        x509_parser::parse_x509_certificate(der).map_err(|e| e.to_string())?;
    }
    Ok(all)
}

/// The private key of a PEM file, in DER.
fn private_key(path: &Path) -> Result<Vec<u8>, String> {
    let key = PrivateKeyDer::from_pem_file(path).map_err(|e| e.to_string())?;
    Ok(key.secret_der().to_vec())
}

/// A certificate and its key, known to belong together.
fn identity(chain: Vec<Vec<u8>>, key: Vec<u8>) -> Result<Identity, String> {
    crate::proxy::check_identity(&chain, &key)?;
    Ok(Identity { chain, key })
}

/// The configuration in force, and how to replace it.
#[derive(Debug)]
pub struct Reloader {
    paths: Paths,
    state: Arc<State>,
    /// Boot settings, which a reload cannot change.
    boot: Boot,
    current: SyncMutex<Current>,
    /// One reload at a time.
    turn: tokio::sync::Mutex<()>,
}

/// Settings of the process itself. Changing one needs a restart.
#[derive(Debug, Clone, PartialEq)]
pub struct Boot {
    /// Where clients connect.
    pub listeners: Vec<config::Listener>,
    /// Where operators connect.
    pub admin: config::Admin,
    /// How names are resolved.
    pub resolver: config::Resolver,
    /// Where orders for regions survive.
    pub state_dir: Option<PathBuf>,
    /// Signs cookies.
    pub secret: Option<config::units::Secret>,
}

#[derive(Debug)]
struct Current {
    digest: u64,
    inputs: Vec<Input>,
    known: Known,
}

/// The trigger of a reload that nobody asked for: a file changed.
pub const FILE: &str = "file";

/// What a reload did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reloaded {
    /// A new configuration is in force.
    Swapped,
    /// Nothing had changed.
    Unchanged,
}

impl Boot {
    fn of(config: &Config) -> Self {
        Self {
            listeners: config.listeners.clone(),
            admin: config.admin.clone(),
            resolver: config.resolver.clone(),
            state_dir: config.state_dir.clone(),
            secret: config.secret.clone(),
        }
    }
}

impl Reloader {
    /// Puts the first configuration in force: `state` was made from `first`.
    pub fn new(paths: Paths, state: Arc<State>, first: First) -> Arc<Self> {
        let First { boot, digest, inputs, known } = first;
        let current = SyncMutex::new(Current { digest, inputs, known });
        Arc::new(Self { paths, state, boot, current, turn: tokio::sync::Mutex::new(()) })
    }

    /// The files whose change calls for a reload, as they were when they were read.
    pub fn inputs(&self) -> Vec<Input> {
        self.current.lock().inputs.clone()
    }

    /// Reads everything again and puts it in force, or says every problem and changes nothing.
    pub async fn reload(self: &Arc<Self>, trigger: &'static str) -> Result<Reloaded, Vec<Problem>> {
        let _turn = self.turn.lock().await;
        let this = self.clone();
        let result = match tokio::task::spawn_blocking(move || this.build()).await {
            Ok(Ok(build)) => self.apply(build).await,
            Ok(Err(failed)) => {
                self.also_watch(failed.inputs);
                Err(failed.problems)
            }
            Err(error) => Err(vec![Problem::error(key_path![], format!("the reload itself failed: {error}"))]),
        };
        if result.is_ok() && trigger != FILE {
            // Whoever rotates logs asks for a reload to have the new file opened.
            let path = self.state.live.load().snapshot.access_log.clone();
            if let Err(error) = self.state.access_log.retarget(&path) {
                tracing::error!(%error, path = %path.display(), "the access log cannot be opened again; the old file goes on");
            }
        }
        self.report(trigger, &result);
        result.map(|(reloaded, _)| reloaded)
    }

    fn build(&self) -> Result<Build, Failed> {
        let known = self.current.lock().known.clone();
        let built = build(&self.paths, &known, &self.state.memory);
        self.state.memory.tidy();
        built
    }

    async fn apply(&self, build: Build) -> Result<(Reloaded, Vec<Problem>), Vec<Problem>> {
        let refused = self.refused(&build.config);
        if !refused.is_empty() {
            self.also_watch(build.inputs);
            drop(build.snapshot);
            self.state.memory.tidy();
            return Err(refused);
        }
        if build.digest == self.current.lock().digest {
            self.current.lock().inputs = build.inputs;
            return Ok((Reloaded::Unchanged, build.warnings));
        }
        self.state.resolver.resolve_new(&self.state.memory.upstreams()).await;
        let old = self.state.live.load_full();
        if build.snapshot.access_log != old.snapshot.access_log {
            let log = &build.snapshot.access_log;
            if let Err(error) = self.state.access_log.retarget(log) {
                let message = format!("the access log `{}` cannot be opened: {error}", log.display());
                self.also_watch(build.inputs);
                drop(build.snapshot);
                self.state.memory.tidy();
                return Err(vec![Problem::error(key_path!["access_log", "path"], message)]);
            }
        }
        let live = Arc::new(Live::new(build.snapshot, &self.state.metrics));
        self.state.live.store(live.clone());
        // From here on nothing can fail.
        self.state.metrics.tidy(&old, &live);
        drop(old);
        self.state.memory.tidy();
        *self.current.lock() = Current { digest: build.digest, inputs: build.inputs, known: build.known };
        Ok((Reloaded::Swapped, build.warnings))
    }

    /// After a failure: the files that were read now, and those of the configuration in force, for in one
    /// of them the mending will happen. All are taken as seen, so that only a change tries again.
    fn also_watch(&self, read: Vec<Input>) {
        let mut current = self.current.lock();
        let missed = current.inputs.iter().filter(|old| read.iter().all(|new| new.path != old.path));
        let missed: Vec<_> = missed.map(|old| Input::now(old.path.clone())).collect();
        current.inputs = [read, missed].concat();
    }

    /// Boot settings that differ from those the process runs with.
    fn refused(&self, config: &Config) -> Vec<Problem> {
        let Boot { listeners, admin, resolver, state_dir, secret } = &self.boot;
        let mut refused = Vec::new();
        for (key, same) in [
            ("listeners", *listeners == config.listeners),
            ("admin", *admin == config.admin),
            ("resolver", *resolver == config.resolver),
            ("state_dir", *state_dir == config.state_dir),
            ("secret", *secret == config.secret),
        ] {
            if !same {
                let problem = Problem::error(key_path![key], format!("`{key}` changed: restart needed"));
                refused.push(problem.hint("restart the process, or put the old value back"));
            }
        }
        refused
    }

    fn report(&self, trigger: &'static str, result: &Result<(Reloaded, Vec<Problem>), Vec<Problem>>) {
        let mut status = self.state.reload.lock();
        let problems = match result {
            Ok((reloaded, warnings)) => {
                if *reloaded == Reloaded::Swapped {
                    status.generation += 1;
                }
                tracing::info!(
                    trigger,
                    generation = status.generation,
                    changed = *reloaded == Reloaded::Swapped,
                    "configuration reloaded"
                );
                warnings
            }
            Err(problems) => {
                tracing::error!(
                    trigger,
                    problems = problems.len(),
                    "the new configuration is refused; the last good one goes on"
                );
                problems
            }
        };
        for problem in problems {
            match problem.is_error() {
                true => tracing::error!("{problem}"),
                false => tracing::warn!("{problem}"),
            }
        }
        status.at = SystemTime::now();
        status.trigger = trigger;
        status.successful = result.is_ok();
        status.problems = problems.iter().map(Problem::to_json).collect();
        self.state.metrics.reloaded(status.generation, status.successful);
    }
}

/// What a [`Reloader`] has to know of the configuration that the process starts with.
#[derive(Debug)]
pub struct First {
    /// Boot settings.
    pub boot: Boot,
    digest: u64,
    inputs: Vec<Input>,
    known: Known,
}

/// Takes a build apart: the snapshot goes into the state, the rest to the reloader.
pub fn start(build: Build) -> (Snapshot, First, ReloadStatus) {
    let Build { config, snapshot, warnings, inputs, digest, known } = build;
    let status = ReloadStatus {
        generation: 1,
        at: SystemTime::now(),
        trigger: "start",
        successful: true,
        problems: warnings.iter().map(Problem::to_json).collect(),
    };
    (snapshot, First { boot: Boot::of(&config), digest, inputs, known }, status)
}
