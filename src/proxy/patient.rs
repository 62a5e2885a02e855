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
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use pingora::{Error, ErrorType, OrErr, Result};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::clock;
use crate::request::Moment;

/// When a response header has to be there.
#[derive(Debug)]
pub struct HeaderDeadline {
    /// Milliseconds of [`clock`]; [`Self::NONE`] once the header came.
    at: AtomicU64,
    wait: Duration,
}

impl HeaderDeadline {
    const NONE: u64 = u64::MAX;

    /// `wait` from now.
    pub fn new(wait: Duration) -> Arc<Self> {
        let deadline = Self { at: AtomicU64::new(0), wait };
        deadline.start_again();
        Arc::new(deadline)
    }

    /// The client sent more of its body: the wait begins anew.
    pub fn start_again(&self) {
        self.at.store(clock::now().after(self.wait).millis(), Ordering::Relaxed);
    }

    /// The header came.
    pub fn lift(&self) {
        self.at.store(Self::NONE, Ordering::Relaxed);
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

/// Connects sockets that obey a [`HeaderDeadline`].
#[derive(Debug)]
pub struct PatientConnect(pub Arc<HeaderDeadline>);

#[async_trait]
impl Connect for PatientConnect {
    async fn connect(&self, address: &SocketAddr) -> Result<Stream> {
        let address: &InetAddress = address.as_inet().ok_or_else(|| Error::new(ErrorType::ConnectError))?;
        let tcp = TcpStream::connect(address).await.map_err(|e| {
            let kind = match e.kind() {
                io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
                io::ErrorKind::TimedOut => ErrorType::ConnectTimedout,
                _ => ErrorType::ConnectError,
            };
            Error::because(kind, "connecting", e)
        })?;
        tcp.set_nodelay(true).or_err(ErrorType::ConnectError, "setting nodelay")?;
        let socket = PatientSocket { tcp, deadline: self.0.clone(), sleep: None };
        Ok(VirtualSocketStream::new(Box::new(socket)).into())
    }
}

#[derive(Debug)]
struct PatientSocket {
    tcp: TcpStream,
    deadline: Arc<HeaderDeadline>,
    sleep: Option<Pin<Box<Sleep>>>,
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
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for PatientSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

impl VirtualSocket for PatientSocket {
    fn set_socket_option(&self, option: VirtualSockOpt) -> io::Result<()> {
        match option {
            VirtualSockOpt::NoDelay => self.tcp.set_nodelay(true),
            // Keep-alive probes are not asked for on these connections.
            _ => Ok(()),
        }
    }
}
