//! Connections for exchanges that are silent by nature.
//!
//! Pingora has one timer for an upstream's silence, before the header and inside the body. Here the two
//! differ: an event stream may be silent for `timeouts.idle`, but its header has to come before
//! `timeouts.total` is over. So such a request gets a socket of its own (it is not pooled), which fails
//! reads once the header is late.

use std::future::Future;
use std::io;
use std::net::SocketAddr as InetAddress;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use event_listener::EventListener;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use pingora::{Error, ErrorType, Result};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Sleep};

use super::clock;
use crate::regions::control::RegionState;
use crate::request::Moment;

/// When a response header has to be there, and whether the region has let go of the connection.
#[derive(Debug)]
pub struct HeaderDeadline {
    /// Milliseconds of [`clock`]; [`Self::NONE`] once the header came.
    at: AtomicU64,
    wait: Duration,
    region: Arc<RegionState>,
    tunnel: AtomicBool,
    closed: AtomicBool,
}

impl HeaderDeadline {
    const NONE: u64 = u64::MAX;

    /// `wait` from now, for a connection into `region`.
    pub fn new(wait: Duration, region: Arc<RegionState>) -> Arc<Self> {
        let deadline =
            Self { at: AtomicU64::new(0), wait, region, tunnel: AtomicBool::new(false), closed: AtomicBool::new(false) };
        deadline.start_again();
        Arc::new(deadline)
    }

    /// The client sent more of its body: the wait begins anew.
    pub fn start_again(&self) {
        self.at.store(clock::now().after(self.wait).millis(), Ordering::Relaxed);
    }

    /// The header came. A tunnel ends when its region is drained; any other response gets to its end.
    pub fn lift(&self, is_tunnel: bool) {
        self.at.store(Self::NONE, Ordering::Relaxed);
        self.tunnel.store(is_tunnel, Ordering::Relaxed);
    }

    /// Was the connection closed because its region is drained?
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Is the header late?
    pub fn is_over(&self) -> bool {
        self.left().is_some_and(|left| left.is_zero())
    }

    fn left(&self) -> Option<Duration> {
        match self.at.load(Ordering::Relaxed) {
            Self::NONE => None,
            at => Some(Moment(Duration::from_millis(at)).since(clock::now())),
        }
    }
}

/// Connects sockets that obey a [`HeaderDeadline`]. They begin with `introduction`.
#[derive(Debug)]
pub struct PatientConnect {
    /// What they obey.
    pub deadline: Arc<HeaderDeadline>,
    /// Who the client is, if the upstream is told.
    pub introduction: Option<Bytes>,
}

/// Connects sockets that begin with who the client is.
#[derive(Debug)]
pub struct IntroducingConnect(pub Bytes);

#[async_trait]
impl Connect for IntroducingConnect {
    async fn connect(&self, address: &SocketAddr) -> Result<Stream> {
        Ok(match connected(address, Some(&self.0)).await? {
            Socket::Tcp(tcp) => tcp.into(),
            Socket::Unix(unix) => unix.into(),
        })
    }
}

async fn connected(address: &SocketAddr, introduction: Option<&Bytes>) -> Result<Socket> {
    let connect = async {
        let mut socket = match address {
            SocketAddr::Inet(address) => tcp(address).await?,
            SocketAddr::Unix(address) => match address.as_pathname() {
                Some(path) => Socket::Unix(UnixStream::connect(path).await?),
                None => return Err(io::ErrorKind::AddrNotAvailable.into()),
            },
        };
        if let Some(introduction) = introduction {
            match &mut socket {
                Socket::Tcp(tcp) => tcp.write_all(introduction).await?,
                Socket::Unix(unix) => unix.write_all(introduction).await?,
            }
        }
        Ok(socket)
    };
    connect.await.map_err(|e: io::Error| {
        let kind = match e.kind() {
            io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
            io::ErrorKind::TimedOut => ErrorType::ConnectTimedout,
            _ => ErrorType::ConnectError,
        };
        Error::because(kind, "connecting", e)
    })
}

#[async_trait]
impl Connect for PatientConnect {
    async fn connect(&self, address: &SocketAddr) -> Result<Stream> {
        // Before anything else, so that nothing said meanwhile is missed.
        let close = Some(self.deadline.region.close.listen());
        let stream = connected(address, self.introduction.as_ref()).await?;
        let socket = PatientSocket { stream, deadline: self.deadline.clone(), sleep: None, close };
        Ok(VirtualSocketStream::new(Box::new(socket)).into())
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

async fn tcp(address: &InetAddress) -> io::Result<Socket> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    Ok(Socket::Tcp(tcp))
}

#[derive(Debug)]
struct PatientSocket {
    stream: Socket,
    deadline: Arc<HeaderDeadline>,
    sleep: Option<Pin<Box<Sleep>>>,
    /// Told when the region lets go of its tunnels.
    close: Option<EventListener>,
}

/// Calls a method of whichever socket it is.
macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match &mut $self.stream {
            Socket::Tcp(socket) => {
                let $stream = Pin::new(socket);
                $call
            }
            Socket::Unix(socket) => {
                let $stream = Pin::new(socket);
                $call
            }
        }
    };
}

impl PatientSocket {
    /// Ready once the header is late.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // The deadline may have moved while the timer ran: then wait for the rest.
        while let Some(left) = self.deadline.left() {
            if left.is_zero() {
                return Poll::Ready(());
            }
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(left)));
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            sleep.as_mut().reset(Instant::now() + left.max(Duration::from_millis(1)));
        }
        Poll::Pending
    }
}

impl AsyncRead for PatientSocket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // The deadline first: a header that drips in byte by byte is late all the same.
        if self.poll_late(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if let ready @ Poll::Ready(_) = either!(self, stream => stream.poll_read(cx, buf)) {
            return ready;
        }
        // Nothing to read: a good moment to look whether to stay.
        if self.deadline.tunnel.load(Ordering::Relaxed)
            && let Some(close) = &mut self.close
            && Pin::new(close).poll(cx).is_ready()
        {
            // A listener that was told must not be asked again.
            self.close = None;
            self.deadline.closed.store(true, Ordering::Relaxed);
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Poll::Pending
    }
}

impl AsyncWrite for PatientSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(cx, buf))
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(cx))
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(cx))
    }
}

impl VirtualSocket for PatientSocket {
    fn set_socket_option(&self, option: VirtualSockOpt) -> io::Result<()> {
        match (option, &self.stream) {
            (VirtualSockOpt::NoDelay, Socket::Tcp(tcp)) => tcp.set_nodelay(true),
            // Keep-alive probes are not asked for on these connections.
            _ => Ok(()),
        }
    }
}
