//! The reload machine: read -> same digest, stop -> compile -> boot settings differ, refuse -> resolve
//! new names -> one swap -> drop what is gone. A failure before the swap changes nothing.

mod certificates;
mod gather;

use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use crate::config::load::Failed;
use crate::config::problem::KeyPath;
use crate::config::{self, Config, Input, Paths, Problem};
use crate::key_path;
use crate::memory::Memory;
use crate::observe::access_log;
use crate::snapshot::{Snapshot, compile};
use crate::state::{Live, ReloadStatus, State};
use gather::Gathered;
pub use gather::Known;
use parking_lot::Mutex as SyncMutex;

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
    let mut gathered = Gathered::default();
    gathered.resources.secrets = std::mem::take(&mut loaded.secrets);
    let known = gathered.everything(paths, &loaded.config, known);
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
    /// Other nodes.
    pub cluster: Option<config::Cluster>,
    /// `limits.memory`.
    pub limits_memory: config::units::Size,
    /// `cache.disk`.
    pub cache_disk: Option<config::Disk>,
    /// Where the next process waits.
    pub upgrade_socket: Option<PathBuf>,
    /// `connections.max_streams`.
    pub max_streams: u32,
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
            cluster: config.cluster.clone(),
            limits_memory: config.limits.settings().memory,
            cache_disk: config.cache.disk.clone(),
            upgrade_socket: config.upgrade_socket.clone(),
            max_streams: config.connections.max_streams,
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

    /// Is an entry of a list out of date? Says so once: what follows may fail for other reasons.
    pub fn expired(&self) -> bool {
        self.current.lock().known.expires.take_if(|at| *at <= SystemTime::now()).is_some()
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
            self.reopen_log().await;
        }
        self.report(trigger, &result);
        result.map(|(reloaded, _)| reloaded)
    }

    /// Opens the access log again: its file was renamed.
    pub async fn reopen_log(&self) {
        let path = self.state.live.load().snapshot.access_log.path.clone();
        if let Err(error) = self.retarget(path.clone()).await {
            tracing::error!(%error, path = %path.display(), "the access log cannot be opened again; the old file goes on");
        }
    }

    async fn retarget(&self, path: PathBuf) -> std::io::Result<()> {
        let state = self.state.clone();
        let opened = tokio::task::spawn_blocking(move || state.access_log.retarget(&path)).await;
        opened.map_err(std::io::Error::other).and_then(|opened| opened)
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
            let mut current = self.current.lock();
            (current.inputs, current.known) = (build.inputs, build.known);
            return Ok((Reloaded::Unchanged, build.warnings));
        }
        self.state.resolver.resolve_new(&self.state.memory.upstreams()).await;
        let old = self.state.live.load_full();
        if build.snapshot.access_log.path != old.snapshot.access_log.path {
            let log = &build.snapshot.access_log.path;
            if let Err(error) = self.retarget(log.clone()).await {
                let message = format!("the access log `{}` cannot be opened: {error}", log.display());
                self.also_watch(build.inputs);
                drop(build.snapshot);
                self.state.memory.tidy();
                return Err(vec![Problem::error(key_path!["access_log", "path"], message)]);
            }
        }
        let live = Arc::new(Live::new(build.snapshot, &self.state.metrics, &self.state.traffic));
        self.state.live.store(live.clone());
        self.state.store.resize(build.config.cache.memory.0);
        // From here on nothing can fail.
        self.state.retired.lock().push(Arc::downgrade(&old));
        self.state.metrics.process.configured(build.digest);
        drop(old);
        self.state.memory.tidy();
        self.state.sweep(&live);
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
        let Boot {
            listeners,
            admin,
            resolver,
            state_dir,
            secret,
            cluster,
            limits_memory,
            cache_disk,
            upgrade_socket,
            max_streams,
        } = &self.boot;
        let mut refused = Vec::new();
        for (key, same) in [
            ("listeners", *listeners == config.listeners),
            ("admin", *admin == config.admin),
            ("resolver", *resolver == config.resolver),
            ("state_dir", *state_dir == config.state_dir),
            ("secret", *secret == config.secret),
            ("cluster", *cluster == config.cluster),
            ("limits.memory", *limits_memory == config.limits.settings().memory),
            ("cache.disk", *cache_disk == config.cache.disk),
            ("upgrade_socket", *upgrade_socket == config.upgrade_socket),
            ("connections.max_streams", *max_streams == config.connections.max_streams),
        ] {
            if !same {
                let at = KeyPath(key.split('.').map(str::to_owned).collect());
                let problem = Problem::error(at, format!("`{key}` changed: restart needed"));
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
        *status = status.clone().remember();
        self.state.metrics.reloaded(status.generation, status.successful);
    }
}

/// What a [`Reloader`] has to know of the configuration that the process starts with.
#[derive(Debug)]
pub struct First {
    /// Boot settings.
    pub boot: Boot,
    /// Stands for all files.
    pub digest: u64,
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
        history: VecDeque::new(),
    };
    (snapshot, First { boot: Boot::of(&config), digest, inputs, known }, status.remember())
}
