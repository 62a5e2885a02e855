//! The process around the proxy: runtimes, listeners, signals.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use pingora::apps::{HttpServerApp, HttpServerOptions};
use pingora::protocols::http::v2::server::default_h2_options;
use pingora::proxy::{HttpProxy, http_proxy};
use pingora::server::configuration::ServerConf;
use pingora::server::{ListenFds, RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::Service;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::Edge;
use super::listen::{Connections, accept};
use crate::state::State;
use crate::tasks::signals::Stops;
use crate::tasks::{otlp, upgrade};
use crate::upstream::plan::MAX_TRIES;

/// Tries of one request that Pingora may loop through; the plan stops earlier.
const TRIES: usize = MAX_TRIES + 2;
/// Idle connections to upstreams that are kept, per thread.
const POOL: usize = 512;

/// Pingora's settings for one thread of the data side.
fn conf() -> ServerConf {
    ServerConf {
        threads: 1,
        work_stealing: false,
        max_retries: TRIES,
        upstream_keepalive_pool_size: POOL,
        ..ServerConf::default()
    }
}

/// The proxy as an application for [`accept`].
pub fn app(state: Arc<State>) -> Arc<HttpProxy<Edge>> {
    let policy = state.live.load().snapshot.connections.clone();
    let mut proxy = http_proxy(&Arc::new(conf()), Edge::new(state));
    let mut options = HttpServerOptions::default();
    options.h2c = true;
    options.h2_idle_timeout = Some(policy.keepalive);
    proxy.server_options = Some(options);
    let mut http_2 = default_h2_options();
    http_2.max_concurrent_streams(policy.streams);
    http_2.max_header_list_size(u32::try_from(policy.header_bytes).unwrap_or(u32::MAX));
    proxy.h2_options = Some(http_2);
    Arc::new(proxy)
}

/// One thread of the data side: accepts on every listener until draining begins.
///
/// A thread shares nothing with the others but the state: a client's connection, the pool its requests take
/// upstream connections from, and the events of both stay where they are. (With one pool for all threads
/// every request would cost two wake-ups of another thread.)
struct DataPlane {
    state: Arc<State>,
    listeners: Vec<std::net::TcpListener>,
    app: Arc<HttpProxy<Edge>>,
    connections: Connections,
}

#[async_trait]
impl Service for DataPlane {
    async fn start_service(&mut self, _fds: Option<ListenFds>, _shutdown: ShutdownWatch, _listeners_per_fd: usize) {
        self.state.metrics.process.watch_runtime("data");
        let mut loops = Vec::new();
        for (nth, listener) in self.listeners.drain(..).enumerate() {
            match TcpListener::from_std(listener) {
                Ok(listener) => loops.push(tokio::spawn(accept(listener, nth, self.app.clone(), self.connections.clone()))),
                Err(error) => tracing::error!(%error, "a listener cannot be used"),
            }
        }
        for accepting in loops {
            // Accept loops end by draining; a panic in one was reported where it happened.
            let _ = accepting.await;
        }
        self.connections.closing().await;
        self.app.http_cleanup().await;
    }

    fn name(&self) -> &str {
        "data"
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }
}

/// The work in the background, on one thread of its own, so that requests never wait for it.
struct ControlPlane<F>(Option<F>);

#[async_trait]
impl<F, W> Service for ControlPlane<F>
where
    F: FnOnce() -> W + Send + Sync,
    W: Future<Output = ()> + Send,
{
    async fn start_service(&mut self, _fds: Option<ListenFds>, _shutdown: ShutdownWatch, _listeners_per_fd: usize) {
        if let Some(work) = self.0.take() {
            work().await;
        }
    }

    fn name(&self) -> &str {
        "control"
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }
}

/// SIGTERM and SIGINT drain and stop: at once when idle, at the latest after `shutdown.grace`; a second
/// SIGINT stops without waiting. SIGQUIT does the same once another process serves.
struct Stop {
    state: Arc<State>,
    connections: Connections,
    stops: watch::Receiver<Stops>,
    sockets: Arc<Sockets>,
}

/// What may be handed to another process.
#[derive(Debug)]
pub struct Sockets {
    /// Where that waits.
    pub path: Option<PathBuf>,
    /// Those of listeners and of the admin side, by the address that the configuration has.
    pub all: Vec<(String, std::net::TcpListener)>,
    /// Called before they are handed over: what only one process may have is let go of.
    pub let_go: fn(&State),
}

impl Stop {
    /// Hands the sockets over; whether another process serves now.
    async fn hand_over(&self) -> bool {
        let (sockets, state) = (self.sockets.clone(), self.state.clone());
        let given = tokio::task::spawn_blocking(move || {
            let Some(path) = &sockets.path else { return Err(std::io::Error::other("there is no `upgrade_socket`")) };
            let all: Vec<_> = sockets.all.iter().map(|(address, socket)| (address.clone(), socket.as_fd())).collect();
            upgrade::give(path, &all, || (sockets.let_go)(&state))
        });
        match given.await.map_err(std::io::Error::other).and_then(|given| given) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "the sockets were not handed over; going on");
                false
            }
        }
    }
}

#[async_trait]
impl ShutdownSignalWatch for Stop {
    async fn recv(&self) -> ShutdownSignal {
        let mut stops = self.stops.clone();
        let mut handed = 0;
        let over = loop {
            match stops.wait_for(|stops| stops.asked || stops.handovers != handed).await.map(|stops| *stops) {
                Ok(stops) if stops.asked => break false,
                Ok(stops) => handed = stops.handovers,
                Err(_) => {
                    tracing::error!("signals cannot be received any more");
                    return ShutdownSignal::FastShutdown;
                }
            }
            let mut meanwhile = stops.clone();
            tokio::select! {
                over = self.hand_over() => if over { break true },
                _ = meanwhile.wait_for(|stops| stops.asked) => break false,
            }
        };
        let grace = self.state.live.load().snapshot.grace;
        tracing::info!(connections = self.connections.count(), ?grace, handed_over = over, "draining");
        let drained = async {
            match over {
                true => self.connections.hand_over().await,
                false => self.connections.drain(),
            }
            self.connections.idle().await
        };
        tokio::select! {
            _ = drained => tracing::info!("every request is done"),
            _ = tokio::time::sleep(grace) => {
                tracing::warn!(connections = self.connections.count(), "the grace period is over");
            }
            _ = stops.wait_for(|stops| stops.at_once) => tracing::warn!("stopped at once"),
        }
        ShutdownSignal::FastShutdown
    }
}

/// Serves until `stops` ends it. What `control` begins runs on a thread of its own.
pub fn run<W>(
    state: Arc<State>,
    listeners: Vec<std::net::TcpListener>,
    stops: watch::Receiver<Stops>,
    sockets: Sockets,
    control: impl FnOnce() -> W + Send + Sync + 'static,
) -> std::io::Result<()>
where
    W: Future<Output = ()> + Send + 'static,
{
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let connections = Connections::new(state.clone());
    let mut server = Server::new_with_opt_and_conf(None, conf());
    server.bootstrap();
    for _ in 0..threads {
        // The same socket for every thread: who has time takes the next connection.
        let listeners = listeners.iter().map(std::net::TcpListener::try_clone).collect::<Result<_, _>>()?;
        let (app, connections) = (app(state.clone()), connections.clone());
        server.add_service(DataPlane { state: state.clone(), listeners, app, connections });
    }
    drop(listeners);
    server.add_service(ControlPlane(Some(control)));
    let stop = Stop { state: state.clone(), connections, stops, sockets: Arc::new(sockets) };
    server.run(RunArgs { shutdown_signal: Box::new(stop) });
    state.store.close();
    // Runtimes are gone; what their last requests logged and left is not.
    state.access_log.close();
    otlp::flush(&state);
    Ok(())
}
