//! A client's connection as Pingora wants it: a TCP stream with a write buffer, counted while it is open.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter, ReadBuf};
use tokio::net::TcpStream;

use super::listen::Open;

/// Header and body of a small response leave in one system call.
const WRITE_BUFFER: usize = 32 << 10;

/// How an HTTP/2 connection begins (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A client's connection.
#[derive(Debug)]
pub struct ClientStream {
    io: BufWriter<TcpStream>,
    /// Read ahead by [`Peek`], not yet by HTTP.
    peeked: BytesMut,
    socket: Arc<SocketDigest>,
    established: SystemTime,
    /// Counts this connection as open.
    _open: Open,
}

impl ClientStream {
    /// Wraps an accepted connection.
    pub fn new(tcp: TcpStream, peer: SocketAddr, open: Open) -> Self {
        let socket = SocketDigest::from_raw_fd(tcp.as_raw_fd());
        // Setting a fresh cell cannot fail.
        let _ = socket.peer_addr.set(Some(peer.into()));
        Self {
            io: BufWriter::with_capacity(WRITE_BUFFER, tcp),
            peeked: BytesMut::new(),
            socket: Arc::new(socket),
            established: SystemTime::now(),
            _open: open,
        }
    }

    /// Waits until it is clear whether HTTP/2's preface comes, so that [`Peek`] need not wait; false if the
    /// client leaves before. May be cancelled.
    pub async fn began(&mut self) -> bool {
        while self.peeked.len() < PREFACE.len() && PREFACE.starts_with(&self.peeked) {
            match self.io.get_mut().read_buf(&mut self.peeked).await {
                Ok(n) if n > 0 => {}
                _ => return !self.peeked.is_empty(),
            }
        }
        true
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.peeked.is_empty() {
            return Pin::new(self.io.get_mut()).poll_read(cx, buf);
        }
        let take = self.peeked.len().min(buf.remaining());
        buf.put_slice(&self.peeked.split_to(take));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[async_trait]
impl Peek for ClientStream {
    /// Shows what [`ClientStream::began`] has read: a request may be shorter than HTTP/2's preface, and its
    /// client waits for an answer.
    async fn try_peek(&mut self, buf: &mut [u8]) -> io::Result<bool> {
        let seen = self.peeked.chunk();
        let len = seen.len().min(buf.len());
        buf.fill(0);
        if let (Some(to), Some(from)) = (buf.get_mut(..len), seen.get(..len)) {
            to.copy_from_slice(from);
        }
        Ok(true)
    }
}

#[async_trait]
impl Shutdown for ClientStream {
    async fn shutdown(&mut self) {
        // The other end may be gone already; then there is nobody to tell.
        let _ = AsyncWriteExt::shutdown(&mut self.io).await;
    }
}

impl UniqueID for ClientStream {
    fn id(&self) -> UniqueIDType {
        self.io.get_ref().as_raw_fd()
    }
}

impl Ssl for ClientStream {}

impl GetTimingDigest for ClientStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        vec![Some(TimingDigest { established_ts: self.established, ..TimingDigest::default() })]
    }
}

impl GetProxyDigest for ClientStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for ClientStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        Some(self.socket.clone())
    }
}

impl Drop for ClientStream {
    fn drop(&mut self) {
        // Pingora may drop a connection with its last answer still in the buffer. One try, without waiting.
        let mut cx = Context::from_waker(Waker::noop());
        let _ = Pin::new(&mut self.io).poll_flush(&mut cx);
    }
}
