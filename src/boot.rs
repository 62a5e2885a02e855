//! From a configuration to a process that is ready to serve: everything that can be refused is asked
//! for before anything starts.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::admin::Admin;
use crate::config::{Paths, Problem};
use crate::observe::access_log::AccessLog;
use crate::observe::metrics::Metrics;
use crate::proxy::listen;
use crate::reload::{Reloader, build, start};
use crate::state::{Live, State, Upstreams};

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
    /// Two metrics share a name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// Reads the configuration, binds every address and opens the access log. Blocks on disk.
pub fn boot(paths: Paths) -> Result<Booted, Refused> {
    let upstreams = Upstreams::default();
    let built = build(&paths, None, &mut |url| upstreams.of(url)).map_err(|f| Refused::Problems(f.problems))?;
    let bind = |address| listen::bind(address).map_err(|error| Refused::Listen { address, error });
    let listeners = built.config.listeners.iter().map(|l| bind(l.address.0)).collect::<Result<_, _>>()?;
    let settings = built.config.admin.clone();
    let admin_listener = bind(settings.address.0)?;
    let metrics = Metrics::new()?;
    let access_log = AccessLog::open(&built.snapshot.access_log, metrics.log_lines_dropped.clone())
        .map_err(|error| Refused::AccessLog { path: built.snapshot.access_log.display().to_string(), error })?;
    let warnings = built.warnings.clone();
    let (snapshot, first, status) = start(built);
    metrics.reloaded(status.generation, status.successful);
    let state = Arc::new(State {
        live: ArcSwap::from_pointee(Live::new(snapshot, &metrics)),
        upstreams,
        metrics,
        access_log,
        reload: Mutex::new(status),
        started: SystemTime::now(),
    });
    let reloader = Reloader::new(paths, state.clone(), first);
    let admin = Admin::new(state.clone(), reloader.clone(), settings);
    Ok(Booted { state, reloader, admin, listeners, admin_listener, warnings })
}
