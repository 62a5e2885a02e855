//! `portolan run`: serve until a signal.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;

use super::{Exit, print_problems};
use crate::admin::Admin;
use crate::config::Paths;
use crate::observe::access_log::AccessLog;
use crate::observe::metrics::Metrics;
use crate::proxy::{listen, server};
use crate::reload::{Reloader, build, start};
use crate::state::{Live, State, Upstreams};
use crate::tasks::{dns, signals, watch};

/// What the demo adds to a plain run.
#[derive(Default)]
pub struct Extra {
    /// Routes on the admin side.
    pub admin: axum::Router,
    /// Work beside the control plane's own.
    pub work: Option<Box<dyn FnOnce() -> tokio::task::JoinHandle<()> + Send + Sync>>,
    /// Called once everything listens.
    pub ready: Option<fn(listeners: &[SocketAddr], admin: SocketAddr)>,
}

pub fn run(paths: Paths, extra: Extra) -> anyhow::Result<Exit> {
    log_to_stderr();
    let upstreams = Upstreams::default();
    let built = match build(&paths, None, &mut |url| upstreams.of(url)) {
        Ok(built) => built,
        Err(failed) => {
            print_problems(&failed.problems);
            return Ok(Exit::User);
        }
    };
    print_problems(&built.warnings);

    // Everything that can be refused is asked for before anything starts.
    let config = built.config.clone();
    let mut listeners = Vec::new();
    for listener in &config.listeners {
        match listen::bind(listener.address.0) {
            Ok(listener) => listeners.push(listener),
            Err(error) => {
                eprintln!("error: cannot listen on {}: {error}", listener.address.0);
                return Ok(Exit::User);
            }
        }
    }
    let admin_listener = match listen::bind(config.admin.address.0) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("error: cannot listen on {} (admin): {error}", config.admin.address.0);
            return Ok(Exit::User);
        }
    };
    let metrics = Metrics::new()?;
    let access_log = match AccessLog::open(&built.snapshot.access_log, metrics.log_lines_dropped.clone()) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("error: the access log `{}` cannot be opened: {error}", built.snapshot.access_log.display());
            return Ok(Exit::User);
        }
    };

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
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(dns::resolve_new(&state.upstreams.all()));

    let addresses: Vec<_> = listeners.iter().filter_map(|l| l.local_addr().ok()).collect();
    let admin_address = admin_listener.local_addr()?;
    tracing::info!(listeners = ?addresses, admin = %admin_address, "serving");
    let admin = Admin::new(state.clone(), reloader.clone(), config.admin);
    let background = state.clone();
    server::run(state, listeners, move || control(background, reloader, admin, admin_listener, extra, addresses));
    Ok(Exit::Done)
}

/// The work in the background, until the runtime ends it.
async fn control(
    state: Arc<State>,
    reloader: Arc<Reloader>,
    admin: Admin,
    listener: std::net::TcpListener,
    extra: Extra,
    listeners: Vec<SocketAddr>,
) {
    tokio::spawn(dns::refresh(state));
    tokio::spawn(signals::reload_on_hangup(reloader.clone()));
    tokio::spawn(watch::watch(reloader));
    let _work = extra.work.map(|work| work());
    let served = async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        if let (Some(ready), Ok(address)) = (extra.ready, listener.local_addr()) {
            ready(&listeners, address);
        }
        axum::serve(listener, admin.router(extra.admin)).await
    };
    if let Err(error) = served.await {
        tracing::error!(%error, "the admin address is lost");
    }
}

/// Logs go to standard error; standard output belongs to the access log. `PORTOLAN_LOG` sets the filter.
fn log_to_stderr() {
    // Pingora reports every client that hangs up as an error; what matters of it is in the access log.
    const FILTER: &str = "info,pingora_proxy=off,pingora_core=off,pingora_pool=off";
    let filter = EnvFilter::try_from_env("PORTOLAN_LOG").unwrap_or_else(|_| EnvFilter::new(FILTER));
    // A second start in one process (the demo has none, tests may) finds the log in place already.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).try_init();
}
