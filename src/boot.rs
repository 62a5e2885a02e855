//! From a configuration to a process that is ready to serve: everything that can be refused is asked
//! for before anything starts.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::admin::Admin;
use crate::config::{self, Paths, Problem};
use crate::memory::Memory;
use crate::observe::access_log::AccessLog;
use crate::observe::lately::Lately;
use crate::observe::metrics::Metrics;
use crate::observe::traffic::Traffic;
use crate::orders::{self, Orders};
use crate::proxy::listen;
use crate::proxy::server::Sockets;
use crate::proxy::store::{self, Store};
use crate::reload::{Known, Reloader, build, start};
use crate::signing::Key;
use crate::state::{Leaving, Live, State};
use crate::tasks::bans;
use crate::tasks::cluster::Cluster;
use crate::tasks::dns::Resolver;
use crate::tasks::otlp::Outlet;
use crate::tasks::seconds::Pulse;
use crate::tasks::upgrade::{self, Taken};

/// A process that is ready to serve.
#[derive(Debug)]
pub struct Booted {
    /// What outlives reloads.
    pub state: Arc<State>,
    /// How to reload.
    pub reloader: Arc<Reloader>,
    /// The admin side.
    pub admin: Admin,
    /// Bound, in the order of the configuration.
    pub listeners: Vec<std::net::TcpListener>,
    /// Bound.
    pub admin_listener: std::net::TcpListener,
    /// What may be handed to the next process.
    pub sockets: Sockets,
    /// Of the process before this one, which waits to hear that this one serves.
    pub taken: Option<Taken>,
    /// Warnings of the configuration.
    pub warnings: Vec<Problem>,
}

/// Why a process cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The configuration has problems.
    #[error("the configuration cannot be used")]
    Problems(Vec<Problem>),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// The access log cannot be opened.
    #[error("the access log `{path}` cannot be opened: {error}")]
    AccessLog {
        /// The file.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// The state directory cannot be used.
    #[error("state_dir `{path}` cannot be used: {error}")]
    StateDir {
        /// The folder.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// The cache's folder cannot be used.
    #[error("cache.disk `{path}` cannot be used: {error}")]
    CacheDisk {
        /// The folder.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// The running process did not hand its sockets over.
    #[error("there is no upgrade: {0}")]
    Upgrade(io::Error),
    /// The cluster's Redis cannot even be named.
    #[error("cluster.redis: {0}")]
    Cluster(redis::RedisError),
    /// Two metrics share a name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// Reads the configuration, binds every address and opens the access log. Blocks on disk. With `upgrade` the running
/// process is waited for, and its sockets are taken.
pub fn boot(paths: Paths, upgrade: bool) -> Result<Booted, Refused> {
    // The key comes from the configuration that is read on top of it, so the file is read first of all.
    let early = config::load(&paths).map_err(|f| Refused::Problems(f.problems))?;
    // A file with problems is refused below; until then nothing of it is believed.
    let sound = Some(&early.config).filter(|_| early.problems.is_empty());
    let dir = sound.and_then(|config| config.state_dir.as_deref()).map(|dir| paths.resolve(dir));
    let kept = |error| Refused::StateDir { path: dir.as_ref().map(|d| d.display().to_string()).unwrap_or_default(), error };
    let secret = sound.and_then(|config| config.secret.as_ref()).map(|secret| secret.reveal());
    let secret = orders::secret(secret, dir.as_deref()).map_err(kept)?;
    let memory = Arc::new(Memory::new(Key::new(&secret)));
    let built = build(&paths, &Known::default(), &memory).map_err(|f| Refused::Problems(f.problems))?;
    let path = built.config.upgrade_socket.as_deref().map(|path| paths.resolve(path));
    // From here on that process has let go of what only one may have.
    let mut taken = match (upgrade, &path) {
        (false, _) => None,
        (true, None) => {
            return Err(Refused::Upgrade(io::Error::other("set `upgrade_socket`, for this process and the running one")));
        }
        (true, Some(path)) => Some(upgrade::take(path).map_err(Refused::Upgrade)?),
    };
    let orders = Orders::open(dir.clone(), &memory).map_err(kept)?;
    if let (Some(dir), Some(ledger)) = (&dir, memory.known_ledger()) {
        let restored = bans::restore(dir, &ledger).map_err(kept)?;
        if restored > 0 {
            tracing::info!(restored, "penalties of limits go on after the restart");
        }
    }
    let resolver = Resolver::new(built.config.resolver.servers.iter().map(|a| a.0).collect());
    let cluster = built.config.cluster.as_ref().map(Cluster::new).transpose().map_err(Refused::Cluster)?.map(Arc::new);
    let mut all = Vec::new();
    let mut bind = |address: SocketAddr| {
        let refused = |error| Refused::Listen { address, error };
        let given = taken.as_mut().and_then(|taken| taken.socket(&address.to_string()));
        let listener = given.map_or_else(|| listen::bind(address), Ok).map_err(refused)?;
        all.push((address.to_string(), listener.try_clone().map_err(refused)?));
        Ok::<_, Refused>(listener)
    };
    let listeners = built.config.listeners.iter().map(|l| bind(l.address.0)).collect::<Result<_, _>>()?;
    let settings = built.config.admin.clone();
    let admin_listener = bind(settings.address.0)?;
    let sockets = Sockets { path, all, let_go };
    let metrics = Metrics::new()?;
    let config::Cache { memory: cache_memory, disk, .. } = &built.config.cache;
    let disk = disk.as_ref().map(|disk| (paths.resolve(&disk.path), disk.size.0));
    let path = disk.as_ref().map(|(path, _)| path.display().to_string()).unwrap_or_default();
    let store = Store::open(&store::Settings { memory: cache_memory.0, disk }, memory.cache.clone())
        .map_err(|error| Refused::CacheDisk { path, error })?;
    memory.cache.ready.store(cluster.is_none(), Relaxed);
    // The engine asks for a store that lives as long as the process, and so it does.
    let store: &'static Store = Box::leak(Box::new(store));
    let log = &built.snapshot.access_log.path;
    let access_log = AccessLog::open(log, metrics.log_lines_dropped.clone())
        .map_err(|error| Refused::AccessLog { path: log.display().to_string(), error })?;
    let warnings = built.warnings.clone();
    let (snapshot, first, status) = start(built);
    metrics.reloaded(status.generation, status.successful);
    metrics.process.configured(first.digest);
    let traffic = Traffic::default();
    let state = Arc::new(State {
        live: ArcSwap::from_pointee(Live::new(snapshot, &metrics, &traffic)),
        memory,
        resolver,
        metrics,
        access_log,
        traffic,
        lately: Lately::default(),
        tail: Arc::default(),
        spans: Outlet::default(),
        pulse: Pulse::default(),
        retired: Mutex::default(),
        reload: Mutex::new(status),
        started: SystemTime::now(),
        orders,
        store,
        cluster,
        leaving: Leaving::default(),
    });
    let reloader = Reloader::new(paths, state.clone(), first);
    let admin = Admin::new(state.clone(), reloader.clone(), settings);
    Ok(Booted { state, reloader, admin, listeners, admin_listener, sockets, taken, warnings })
}

/// What only one process may have: files in `state_dir`, and the cache's folder. Blocks.
fn let_go(state: &State) {
    save_bans(state);
    state.store.close();
}

/// Writes down who is refused for a while. Blocks.
pub fn save_bans(state: &State) {
    if let (Some(dir), Some(ledger)) = (state.orders.dir(), state.memory.known_ledger())
        && let Err(error) = bans::save(dir, &ledger)
    {
        tracing::error!(%error, "penalties cannot be written to state_dir");
    }
}
