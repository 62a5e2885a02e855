//! `portolan run`: serve until a signal.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::Arc;

use tracing_subscriber::EnvFilter;

use super::{Exit, print_problems};
use crate::admin::Admin;
use crate::boot::{Booted, Refused, boot, save_bans};
use crate::config::Paths;
use crate::proxy::server;
use crate::reload::Reloader;
use crate::state::State;
use crate::tasks::upgrade::Taken;
use crate::tasks::{acme, bans, certificates, orders, otlp, probe, seconds, signals, watch};

/// Work that knows where clients connect.
pub type Work = Box<dyn FnOnce(&[SocketAddr]) + Send + Sync>;

/// What the demo adds to a plain run.
#[derive(Default)]
pub struct Extra {
    /// Routes on the admin side.
    pub admin: axum::Router,
    /// Begins work beside the control plane's own, before these listeners.
    pub work: Option<Work>,
    /// Called once everything listens.
    pub ready: Option<fn(listeners: &[SocketAddr], admin: SocketAddr)>,
}

/// Serves until a signal. `upgrade`: with the sockets of the process that runs already.
pub fn run(paths: Paths, upgrade: bool, extra: Extra) -> anyhow::Result<Exit> {
    log_to_stderr();
    let booted = match boot(paths, upgrade) {
        Ok(booted) => booted,
        Err(Refused::Problems(problems)) => {
            print_problems(&problems);
            return Ok(Exit::User);
        }
        Err(refused @ Refused::Metrics(_)) => return Err(refused.into()),
        Err(
            refused @ (Refused::Listen { .. }
            | Refused::AccessLog { .. }
            | Refused::StateDir { .. }
            | Refused::CacheDisk { .. }
            | Refused::Upgrade(_)
            | Refused::Cluster(_)),
        ) => {
            eprintln!("error: {refused}");
            return Ok(Exit::User);
        }
    };
    let Booted { state, reloader, admin, listeners, admin_listener, sockets, taken, warnings } = booted;
    print_problems(&warnings);
    let stops = signals::stops()?;
    let resolving = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    resolving.block_on(async {
        // Caught it stays, whoever listens.
        drop(signals::catch()?);
        state.resolver.resolve_new(&state.memory.upstreams()).await;
        Ok::<_, std::io::Error>(())
    })?;
    // A slow name is resolved again in the background of the server.
    resolving.shutdown_background();

    let addresses: Vec<_> = listeners.iter().filter_map(|l| l.local_addr().ok()).collect();
    let admin_address = admin_listener.local_addr()?;
    tracing::info!(listeners = ?addresses, admin = %admin_address, "serving");
    if let Some(ready) = extra.ready {
        ready(&addresses, admin_address);
    }
    let background = state.clone();
    let ended = state.clone();
    // Everything listens: from here on connections wait for this process, and the one before it accepts none.
    if let Some(Err(error)) = taken.map(Taken::serving) {
        eprintln!("error: the process before this one goes on, for it did not wait: {error}");
        return Ok(Exit::Ours);
    }
    server::run(state, listeners, stops, sockets, move || {
        control(background, reloader, admin, admin_listener, extra, addresses)
    })?;
    // What began in the last second; what another process has is its own.
    if !ended.leaving.now() {
        save_bans(&ended);
    }
    Ok(Exit::Done)
}

/// The work in the background, until the runtime ends it.
async fn control(
    state: Arc<State>,
    reloader: Arc<Reloader>,
    admin: Admin,
    listener: std::net::TcpListener,
    extra: Extra,
    addresses: Vec<SocketAddr>,
) {
    tokio::spawn(state.resolver.clone().refresh(state.clone()));
    tokio::spawn(probe::run(state.clone()));
    tokio::spawn(certificates::run(state.clone()));
    tokio::spawn(seconds::run(state.clone()));
    tokio::spawn(otlp::run(state.clone()));
    state.metrics.process.watch_runtime("control");
    tokio::spawn(acme::run(state.clone()));
    tokio::spawn(bans::run(state.clone(), state.orders.dir().map(Into::into), state.memory.known_ledger().is_some()));
    if let Some(cluster) = state.cluster.clone() {
        tokio::spawn(cluster.run(state.clone()));
    }
    let leaving = state.clone();
    tokio::spawn(orders::run(state));
    tokio::spawn(signals::act(reloader.clone()));
    tokio::spawn(watch::watch(reloader));
    if let Some(begin) = extra.work {
        begin(&addresses);
    }
    let left = async move { leaving.leaving.begun().await };
    let served = async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        axum::serve(listener, admin.router(extra.admin)).with_graceful_shutdown(left).await
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
    let color = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(color).with_target(false).init();
}
