//! Our own accept loop: connections are counted, and draining ends as soon as none is left.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pingora::apps::ServerApp;
use pingora::server::ShutdownWatch;
use prometheus::IntGauge;
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::stream::ClientStream;

/// Connections that wait to be accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// When accepting fails for want of descriptors, trying again at once would only burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A client that connects and says nothing is let go after this long.
const FIRST_BYTE: Duration = Duration::from_secs(60);

/// How many connections are open, and whether new ones are welcome.
#[derive(Debug, Clone)]
pub struct Connections {
    open: Arc<watch::Sender<usize>>,
    gauge: IntGauge,
    drain: watch::Sender<bool>,
}

/// One open connection; dropping it closes the account.
#[derive(Debug)]
pub struct Open(Connections);

impl Connections {
    /// None yet. `gauge` shows them.
    pub fn new(gauge: IntGauge) -> Self {
        Self { open: Arc::new(watch::Sender::new(0)), gauge, drain: watch::Sender::new(false) }
    }

    fn open(&self) -> Open {
        self.open.send_modify(|n| *n += 1);
        self.gauge.inc();
        Open(self.clone())
    }

    /// No new connections from now on; open ones end after their request.
    pub fn drain(&self) {
        self.drain.send_replace(true);
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

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.send_modify(|n| *n = n.saturating_sub(1));
        self.0.gauge.dec();
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

/// Accepts until draining begins, each connection in a task of its own.
pub async fn accept<A>(listener: TcpListener, app: Arc<A>, connections: Connections)
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
            Ok((tcp, peer)) => serve(tcp, peer, &app, &connections),
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

fn serve<A>(tcp: TcpStream, peer: SocketAddr, app: &Arc<A>, connections: &Connections)
where
    A: ServerApp + Send + Sync + 'static,
{
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%error, "a connection was lost after it was accepted");
        return;
    }
    let mut stream = ClientStream::new(tcp, peer, connections.open());
    let app = app.clone();
    let mut draining = connections.draining();
    pingora_runtime::current_handle().spawn(async move {
        // Pingora does not look at `draining` before a connection's first byte.
        let begins = tokio::select! {
            biased;
            began = stream.began() => began,
            _ = draining.wait_for(|d| *d) => false,
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
