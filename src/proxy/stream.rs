//! A client's connection as Pingora wants it: TCP, or TLS over it, with a write buffer, counted while it is open.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use http::header;
use parking_lot::Mutex;
use pingora::http::ResponseHeader;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    UniqueIDType,
};
use pingora::proxy::Session;
use rustls::ServerConnection;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::door::{Door, Waits};
use super::facts::host;
use super::listen::Open;
use crate::connections::{Fault, Kind, Policy, faulty};
use crate::listeners::asked;

/// Header and body of a small response leave in one system call.
const WRITE_BUFFER: usize = 32 << 10;

/// How long a client may take to hear that its connection ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// What is read of a client that is still sending when its connection ends, so that it gets to read why.
const FORGOTTEN: usize = 1 << 20;

/// How an HTTP/2 connection begins (RFC 9113, section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What carries a connection.
#[derive(Debug)]
enum Io {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A client's connection.
#[derive(Debug)]
pub struct ClientStream {
    io: Io,
    /// Written, and not sent yet.
    buffer: BytesMut,
    /// What came before it was clear whether it is HTTP/2.
    peeked: BytesMut,
    /// What comes, from then on.
    door: Option<Door>,
    sends: Waits,
    socket: Arc<SocketDigest>,
    established: SystemTime,
    between: Arc<Between>,
    /// Tells the hooks of `between`.
    proxied: Option<Arc<ProxyDigest>>,
    /// The date to be written, and where in what is written next it begins, or began.
    date: Option<(isize, Date)>,
    patched: Vec<u8>,
    /// The last word was said.
    said: bool,
    /// Counts this connection as open.
    open: Open,
}

/// A date as responses have it (RFC 9110, section 5.6.7): as long as every other.
type Date = [u8; 29];

/// What hooks and connection tell each other.
#[derive(Debug, Default)]
struct Between {
    /// What was agreed on, if it is TLS.
    secured: Option<Secured>,
    /// Of the response that is written next: its `Date`. Pingora would write the time at which it passes through, but it is the origin's, and a stored response
    /// keeps the one it was made at (RFC 9110, section 6.6.1; RFC 9111, section 5.1).
    date: Mutex<Option<Date>>,
    /// Nothing of it waits in the buffer: there may be a while before the next of it comes.
    eager: AtomicBool,
    /// Requests that hooks have seen over HTTP/1.
    requests: AtomicU32,
    /// Which of them is faulty, and how.
    fault: OnceLock<(u32, Fault)>,
}

/// What client and listener agreed on.
#[derive(Debug, Default)]
pub struct Secured {
    /// The name that the client asked for, in lower case.
    pub name: Option<Box<str>>,
    /// The client's certificate and its chain, verified.
    pub client: Box<[CertificateDer<'static>]>,
    /// The listener, by its position.
    pub listener: usize,
}

impl Secured {
    /// Of a handshake on a listener.
    pub fn of(connection: &ServerConnection, listener: usize) -> Self {
        let name = connection.server_name().map(|name| asked(name).into());
        let client = connection.peer_certificates().unwrap_or_default();
        Self { name, client: client.iter().map(|one| one.clone().into_owned()).collect(), listener }
    }
}

fn between(session: &Session) -> Option<&Arc<Between>> {
    let digest = session.digest().and_then(|digest| digest.proxy_digest.as_ref());
    digest.and_then(|digest| digest.user_data.as_ref()?.downcast_ref::<Arc<Between>>())
}

/// What was agreed on, if the client came over TLS.
pub fn secured(session: &Session) -> Option<&Secured> {
    between(session)?.secured.as_ref()
}

/// A request begins. How many have come by its connection, it included; over HTTP/2 none are counted.
pub fn begins(session: &Session) -> u32 {
    match between(session).filter(|_| !session.as_downstream().is_http2() && session.subrequest_ctx.is_none()) {
        Some(between) => between.requests.fetch_add(1, Ordering::Relaxed) + 1,
        None => 0,
    }
}

/// What is wrong with the request.
pub fn fault(session: &Session, policy: &Policy) -> Option<Fault> {
    let between = between(session).filter(|_| session.subrequest_ctx.is_none())?;
    if session.as_downstream().is_http2() {
        let request = session.req_header();
        return faulty(host(session), request.raw_path().len(), &request.headers, policy);
    }
    let (which, fault) = between.fault.get()?;
    (*which == between.requests.load(Ordering::Relaxed)).then_some(*fault)
}

/// Tells the connection of a response: it keeps its date, and `eager` ones are not buffered. HTTP/2 has its own buffers,
/// and no way to keep the date.
pub fn tell(session: &Session, response: &ResponseHeader, eager: bool) {
    // What is fetched in the background has its client's digest, and none of its responses reaches that one.
    if session.as_downstream().is_http2() || session.subrequest_ctx.is_some() {
        return;
    }
    let Some(between) = between(session) else { return };
    between.eager.store(eager, Ordering::Relaxed);
    let date = response.headers.get(header::DATE).and_then(|date| Date::try_from(date.as_bytes()).ok());
    // In another form, or none: it gets a new one.
    *between.date.lock() = date.filter(|date| date.ends_with(b" GMT"));
}

/// Where the value of `Date` begins in a response's head.
fn place_of_date(head: &[u8]) -> Option<isize> {
    const NAME: &[u8] = b"\r\ndate: ";
    if !head.starts_with(b"HTTP/1.") || head.get(9) == Some(&b'1') {
        return None;
    }
    let end = head.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or(head.len());
    let head = head.get(..end).unwrap_or_default();
    head.windows(NAME.len()).position(|w| w.eq_ignore_ascii_case(NAME)).and_then(|at| (at + NAME.len()).try_into().ok())
}

impl ClientStream {
    /// Wraps an accepted connection.
    pub fn plain(tcp: TcpStream, peer: SocketAddr, open: Open) -> Self {
        Self::new(Io::Tcp(tcp), None, peer, open)
    }

    /// Wraps an accepted connection whose handshake, on this listener, is over.
    pub fn secured(tls: TlsStream<TcpStream>, listener: usize, peer: SocketAddr, open: Open) -> Self {
        let secured = Secured::of(tls.get_ref().1, listener);
        Self::new(Io::Tls(Box::new(tls)), Some(secured), peer, open)
    }

    fn new(io: Io, secured: Option<Secured>, peer: SocketAddr, open: Open) -> Self {
        let socket = SocketDigest::from_raw_fd(io.tcp().as_raw_fd());
        // Setting a fresh cell cannot fail.
        let _ = socket.peer_addr.set(Some(peer.into()));
        let between = Arc::new(Between { secured, ..Between::default() });
        // It is the one digest that carries something of ours; the response in it is nobody's.
        let nothing = ResponseHeader::build_no_case(200, Some(0)).ok();
        let proxied = nothing.map(|nothing| Arc::new(ProxyDigest::new(Box::new(nothing), Some(Box::new(between.clone())))));
        Self {
            io,
            buffer: BytesMut::new(),
            peeked: BytesMut::new(),
            door: None,
            sends: Waits::default(),
            socket: Arc::new(socket),
            established: SystemTime::now(),
            between,
            proxied,
            date: None,
            patched: Vec::new(),
            said: false,
            open,
        }
    }

    /// Waits until it is clear whether HTTP/2's preface comes, so that [`Peek`] need not wait; false if the
    /// client leaves before. What comes from then on is held to `policy`. May be cancelled.
    pub async fn began(&mut self, policy: Arc<Policy>) -> bool {
        while self.peeked.len() < PREFACE.len() && PREFACE.starts_with(&self.peeked) {
            match self.io.read_buf(&mut self.peeked).await {
                Ok(n) if n > 0 => {}
                _ if self.peeked.is_empty() => return false,
                _ => break,
            }
        }
        let http_2 = match self.selected_alpn_proto() {
            Some(agreed) => agreed == ALPN::H2,
            None => self.peeked.starts_with(PREFACE),
        };
        self.door = Some(Door::new(std::mem::take(&mut self.peeked), http_2, policy));
        true
    }

    /// An end to waiting for a client that takes too little.
    fn unless_slow<T>(
        &mut self,
        cx: &mut Context<'_>,
        sent: Poll<io::Result<T>>,
        bytes: impl Fn(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        let rate = self.door.as_ref().and_then(|door| door.policy().send_rate);
        match &sent {
            Poll::Ready(Ok(moved)) => self.sends.moved(bytes(moved), rate),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => {
                ready!(self.sends.poll(rate, cx));
                self.open.faulty(Kind::SlowReader);
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        sent
    }

    /// Sends what waits in the buffer.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.buffer.is_empty() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, &self.buffer))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.buffer.advance(sent),
            }
        }
        // TLS has records that wait for the socket.
        Pin::new(&mut self.io).poll_flush(cx)
    }

    /// Buffers what is short. What is long is sent together with what waits: a header and its body are one system call.
    fn poll_put(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let eager = self.between.eager.load(Ordering::Relaxed);
        if self.buffer.len() + bytes.len() <= WRITE_BUFFER && !eager {
            self.buffer.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        loop {
            let both = [io::IoSlice::new(&self.buffer), io::IoSlice::new(bytes)];
            let sent = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, &both))?;
            let waited = sent.min(self.buffer.len());
            self.buffer.advance(waited);
            match sent - waited {
                0 if sent == 0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                0 => {}
                taken => return Poll::Ready(Ok(taken)),
            }
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // Whoever listens has said what there is to say for now: the client gets it. (Of a response that comes out of the
        // store while it goes into it Pingora leaves that to the end.)
        if !self.buffer.is_empty() || self.io.wants_write() {
            // An error is told to whoever writes next.
            let _ = self.poll_send(cx);
        }
        let Self { io, door, between, open, .. } = &mut *self;
        let Some(door) = door else { return Poll::Ready(Ok(())) };
        let served = between.requests.load(Ordering::Relaxed);
        let read = door.poll_read(io, cx, buf, served, &mut |which, fault| {
            open.faulty(fault.kind);
            // There is one at most: nothing is read behind it.
            let _ = between.fault.set((which, fault));
        });
        if let Some(farewell) = door.farewell() {
            self.buffer.extend_from_slice(&farewell);
            self.said = true;
            // Whoever drops the connection tries again.
            let _ = self.poll_send(cx);
        }
        read
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.said {
            return Poll::Ready(Ok(buf.len()));
        }
        if let Some(door) = &mut this.door {
            door.writes(buf, this.between.requests.load(Ordering::Relaxed));
            if let Some((place, instead)) = door.instead(buf) {
                let mut patched = buf.to_vec();
                if let Some(code) = patched.get_mut(place..place + instead.len()) {
                    code.copy_from_slice(&instead);
                }
                // It is the last frame, and a short one.
                this.buffer.extend_from_slice(&patched);
                return Poll::Ready(Ok(buf.len()));
            }
        }
        if this.date.is_none() && buf.starts_with(b"HTTP/1.") {
            let place = place_of_date(buf);
            this.date = place.and_then(|place| Some((place, this.between.date.lock().take()?)));
        }
        let Some((place, date)) = this.date else {
            let written = this.poll_put(cx, buf);
            let written = ready!(this.unless_slow(cx, written, |sent| *sent))?;
            if let (Some(door), Some(taken)) = (&mut this.door, buf.get(..written)) {
                door.wrote(taken);
            }
            return Poll::Ready(Ok(written));
        };
        let mut patched = std::mem::take(&mut this.patched);
        patched.clear();
        patched.extend_from_slice(buf);
        for (at, byte) in (place..).zip(date) {
            if let Some(to) = usize::try_from(at).ok().and_then(|at| patched.get_mut(at)) {
                *to = byte;
            }
        }
        let written = this.poll_put(cx, &patched);
        this.patched = patched;
        let written = ready!(this.unless_slow(cx, written, |sent| *sent))?;
        // Should it not all have been taken, the rest of the date comes with the rest of the head.
        let place = place.saturating_sub_unsigned(written);
        this.date = (place.saturating_add_unsigned(date.len()) > 0).then_some((place, date));
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let waited = self.buffer.len();
        let sent = self.poll_send(cx);
        self.unless_slow(cx, sent, |()| waited)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[async_trait]
impl Peek for ClientStream {
    /// Shows what [`ClientStream::began`] has read: a request may be shorter than HTTP/2's preface, and its
    /// client waits for an answer.
    async fn try_peek(&mut self, buf: &mut [u8]) -> io::Result<bool> {
        // Who agreed on HTTP/1.1 speaks that.
        let agreed = self.selected_alpn_proto() == Some(ALPN::H1);
        let seen = if agreed { &[] } else { self.door.as_ref().map_or(&[][..], Door::held) };
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
        let inside = self.door.as_ref().is_some_and(Door::is_inside);
        let farewell = async {
            AsyncWriteExt::shutdown(&mut *self).await?;
            let mut most = if inside { FORGOTTEN } else { 0 };
            std::future::poll_fn(|cx| Door::poll_forget(&mut self.io, cx, &mut most)).await
        };
        // The other end may be gone already, or read nothing; then there is nobody to tell.
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}

impl UniqueID for ClientStream {
    fn id(&self) -> UniqueIDType {
        self.io.tcp().as_raw_fd()
    }
}

impl Ssl for ClientStream {
    fn selected_alpn_proto(&self) -> Option<ALPN> {
        let Io::Tls(tls) = &self.io else { return None };
        tls.get_ref().1.alpn_protocol().map(|protocol| if protocol == b"h2" { ALPN::H2 } else { ALPN::H1 })
    }
}

impl Io {
    /// TLS has taken what it could not send yet, and sends nothing by itself.
    fn wants_write(&self) -> bool {
        matches!(self, Self::Tls(tls) if tls.get_ref().1.wants_write())
    }

    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Tcp(tcp) => tcp,
            Self::Tls(tls) => tls.get_ref().0,
        }
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Self::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, bufs),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}

impl GetTimingDigest for ClientStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        vec![Some(TimingDigest { established_ts: self.established, ..TimingDigest::default() })]
    }
}

impl GetProxyDigest for ClientStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.proxied.clone()
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
        let _ = self.poll_send(&mut cx);
    }
}
