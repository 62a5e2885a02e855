//! Our own accept loop: connections are counted, and draining ends as soon as none is left.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pingora::apps::ServerApp;
use pingora::server::ShutdownWatch;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;

use super::introduced::introduced;
use super::stream::ClientStream;
use crate::connections::Kind;
use crate::listeners::acme::PROTOCOL;
use crate::observe::metrics::Handshake;
use crate::state::{Live, State};

/// Connections that wait to be accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// When accepting fails for want of descriptors, trying again at once would only burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A client that connects and says nothing is let go after this long.
const FIRST_BYTE: Duration = Duration::from_secs(60);

/// How long idle connections are kept for clients that do not know yet that another process serves.
const LAST_CALL: Duration = Duration::from_secs(5);

/// Files that are neither a client's nor an upstream's connection: logs, databases, the admin side.
const OTHER_FILES: u64 = 128;

/// How many connections are open, and whether new ones are welcome.
#[derive(Debug, Clone)]
pub struct Connections {
    state: Arc<State>,
    open: Arc<watch::Sender<usize>>,
    drain: watch::Sender<bool>,
    /// Those that wait for their next request have nothing to wait for.
    close: watch::Sender<bool>,
    /// Where `overload.max_connections` is not set.
    most: usize,
}

/// One open connection; dropping it closes the account.
#[derive(Debug)]
pub struct Open {
    connections: Connections,
    /// The client, if connections are counted for it.
    client: Option<IpAddr>,
}

/// Lets the process open as many files as the system allows it; how many these are.
fn files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let (Some(soft), Some(hard)) = (limit.current, limit.maximum) else { return u64::MAX };
    match soft < hard && setrlimit(Resource::Nofile, Rlimit { current: Some(hard), maximum: Some(hard) }).is_ok() {
        true => hard,
        false => soft,
    }
}

impl Connections {
    /// None yet.
    pub fn new(state: Arc<State>) -> Self {
        // A client's connection needs another one, to an upstream.
        let most = usize::try_from(files().saturating_sub(OTHER_FILES) / 2).unwrap_or(usize::MAX).max(1);
        Self {
            state,
            open: Arc::new(watch::Sender::new(0)),
            drain: watch::Sender::new(false),
            close: watch::Sender::new(false),
            most,
        }
    }

    /// One more, unless there are too many. Each thread accepts for itself: in a rush a few more may get in.
    fn open(&self, peer: IpAddr) -> Option<Open> {
        let live = self.state.live.load();
        let overload = &live.snapshot.overload;
        let most = overload.connections.map_or(self.most, |most| usize::try_from(most).unwrap_or(usize::MAX));
        if self.count() >= most {
            self.state.metrics.connection_shed();
            return None;
        }
        self.open.send_modify(|n| *n += 1);
        self.state.metrics.connections.inc();
        let mut open = Open { connections: self.clone(), client: None };
        open.is_for(peer).then_some(open)
    }

    /// No new connections from now on; open ones end after their request, and idle ones at once.
    pub fn drain(&self) {
        self.drain.send_replace(true);
        self.close.send_replace(true);
    }

    /// No new connections from now on, for somebody else takes them. Idle ones have some time left for a last request:
    /// a client may be about to send it.
    pub async fn hand_over(&self) {
        self.state.leaving.begin();
        self.drain.send_replace(true);
        let _ = tokio::time::timeout(LAST_CALL, self.idle()).await;
        self.close.send_replace(true);
    }

    /// Returns once idle connections are closed.
    pub async fn closing(&self) {
        // The sender lives as long as self, so the wait ends only with true.
        let _ = self.close.subscribe().wait_for(|closes| *closes).await;
    }

    /// A watch that turns true when draining begins.
    pub fn draining(&self) -> ShutdownWatch {
        self.drain.subscribe()
    }

    /// How many are open.
    pub fn count(&self) -> usize {
        *self.open.borrow()
    }

    /// Returns once none is open.
    pub async fn idle(&self) {
        // The sender lives as long as self, so the wait cannot fail.
        let _ = self.open.subscribe().wait_for(|n| *n == 0).await;
    }
}

impl Open {
    /// It is this client's, if it may have one more. Those of trusted proxies are many clients'.
    fn is_for(&mut self, client: IpAddr) -> bool {
        let state = &self.connections.state;
        let live = state.live.load();
        let overload = &live.snapshot.overload;
        let client = client.to_canonical();
        let Some(most) = overload.connections_per_client.filter(|_| !live.snapshot.trust.trusts(client)) else { return true };
        let network = overload.prefixes.network(client);
        let room = overload.load.peers.take(network, most);
        if room {
            self.client = Some(network);
        } else {
            state.metrics.connection_shed();
        }
        room
    }
}

impl Open {
    /// Something is wrong with what its client does.
    pub fn faulty(&self, kind: Kind) {
        self.connections.state.metrics.connection.fault(kind);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(client) = self.client {
            self.connections.state.memory.load.peers.give_back(client);
        }
        self.connections.open.send_modify(|n| *n = n.saturating_sub(1));
        self.connections.state.metrics.connections.dec();
    }
}

/// Binds without accepting yet, so that a taken port is known before anything else starts.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A restart must not wait for the last process's connections to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Accepts until draining begins, each connection in a task of its own. `nth`: which listener it is.
pub async fn accept<A>(listener: TcpListener, nth: usize, app: Arc<A>, connections: Connections)
where
    A: ServerApp + Send + Sync + 'static,
{
    let mut draining = connections.draining();
    loop {
        let accepted = tokio::select! {
            biased;
            // The sender lives in `connections`, so the wait ends only with true.
            _ = draining.wait_for(|d| *d) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => serve(tcp, peer, nth, &app, &connections),
            Err(error) if is_about_one_connection(&error) => {
                tracing::debug!(%error, "a connection was lost before it was accepted")
            }
            Err(error) => {
                tracing::error!(%error, "connections cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Who the client of a trusted proxy is.
async fn client(tcp: &mut TcpStream, peer: SocketAddr, live: &Live) -> io::Result<SocketAddr> {
    if !live.snapshot.trust.trusts(peer.ip().to_canonical()) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "nobody trusts it to say who that is"));
    }
    Ok(introduced(tcp).await?.unwrap_or(peer))
}

fn serve<A>(mut tcp: TcpStream, mut peer: SocketAddr, nth: usize, app: &Arc<A>, connections: &Connections)
where
    A: ServerApp + Send + Sync + 'static,
{
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%error, "a connection was lost after it was accepted");
        return;
    }
    // Whoever finds no room is told at once: a connection that nobody answers would wait for nothing.
    let Some(mut open) = connections.open(peer.ip()) else { return };
    let (app, state) = (app.clone(), connections.state.clone());
    let draining = connections.draining();
    // Who was accepted is served, until idle connections are closed.
    let mut closing = connections.close.subscribe();
    pingora_runtime::current_handle().spawn(async move {
        // The certificates of now: a reload brings others.
        let live = state.live.load_full();
        let listener = live.snapshot.listeners.get(nth);
        let introduced = listener.is_some_and(|listener| listener.introduced);
        let tls = listener.and_then(|listener| Some(listener.tls.as_ref()?.config.clone()));
        let policy = live.snapshot.connections.clone();
        let deadline = Instant::now() + HANDSHAKE;
        if introduced {
            let known = tokio::select! {
                biased;
                known = timeout_at(deadline, client(&mut tcp, peer, &live)) => known,
                _ = closing.wait_for(|d| *d) => return,
            };
            drop(live);
            match known {
                Ok(Ok(client)) => peer = client,
                Ok(Err(error)) => {
                    tracing::debug!(%error, %peer, "a connection does not begin with its client");
                    return state.metrics.connection.unintroduced.inc();
                }
                Err(_) => return state.metrics.connection.unintroduced.inc(),
            }
            if !open.is_for(peer.ip()) {
                return;
            }
        }
        let mut stream = match tls {
            None => ClientStream::plain(tcp, peer, open),
            Some(config) => {
                let shaken = tokio::select! {
                    biased;
                    shaken = timeout_at(deadline, TlsAcceptor::from(config).accept(tcp)) => shaken,
                    _ = closing.wait_for(|d| *d) => return,
                };
                state.metrics.connection.handshake(match &shaken {
                    Ok(Ok(_)) => Handshake::Done,
                    Ok(Err(error)) => {
                        tracing::debug!(%error, %peer, "a TLS handshake failed");
                        Handshake::Failed
                    }
                    Err(_) => Handshake::TimedOut,
                });
                let Ok(Ok(stream)) = shaken else { return };
                if stream.get_ref().1.alpn_protocol() == Some(PROTOCOL) {
                    // An authority has seen what it came for (RFC 8737, section 3).
                    return;
                }
                ClientStream::secured(stream, nth, peer, open)
            }
        };
        // Pingora does not look at `draining` before a connection's first byte.
        let begins = tokio::select! {
            biased;
            began = stream.began(policy) => began,
            _ = closing.wait_for(|d| *d) => false,
            _ = tokio::time::sleep(FIRST_BYTE) => false,
        };
        if begins {
            app.process_new(Box::new(stream), &draining).await;
        }
    });
}

/// Errors of accept(2) that belong to the connection, not to the listener.
fn is_about_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}
