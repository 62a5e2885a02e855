//! What a client sends, on its way to the engine: read by [`crate::connections`] first, and held to its deadlines.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::stream::PREFACE;
use crate::connections::{Code, Fault, Frames, Gate, Kind, Part, Patience, Policy, Sent};

/// As much as waits of what came after a request for another protocol, before that has its answer.
const ASKED: usize = 4 << 10;
/// A timer that nobody looks at for this long after its time was not waited for.
const MISSED: Duration = Duration::from_secs(1);
/// Read at once of a head that comes in pieces.
const PIECE: usize = 4 << 10;

/// Who reads along.
#[derive(Debug)]
enum Reader {
    Gate(Gate),
    Frames(Frames),
}

/// What comes in.
#[derive(Debug)]
pub struct Door {
    reader: Reader,
    /// What came and was not handed on.
    held: BytesMut,
    /// So much at its beginning may be.
    passed: usize,
    /// Something is wrong with what comes behind what was handed on.
    wrong: Option<Fault>,
    /// Something is wrong, and nothing is read any more.
    over: bool,
    /// And is to be said, over HTTP/2.
    farewell: Option<[u8; 17]>,
    /// What was said over HTTP/2 so far.
    sent: Sent,
    /// When the head that is under way began.
    began: Option<Instant>,
    /// Some of the body under way has come.
    body: bool,
    waits: Waits,
    /// Whoever waits for a request for another protocol to be answered.
    asked: Option<Waker>,
    opened: Instant,
}

/// Waiting for the other end, at a rate.
#[derive(Debug, Default)]
pub struct Waits {
    patience: Patience,
    since: Option<Instant>,
    timer: Timer,
}

/// One timer, made when it is needed first.
#[derive(Debug, Default)]
struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    fn poll(&mut self, at: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if sleep.deadline() != at {
            sleep.as_mut().reset(at);
        }
        sleep.as_mut().poll(cx)
    }
}

impl Waits {
    /// The other end moves nothing: ready once that is too slow. Without a rate it never is.
    pub fn poll(&mut self, rate: Option<u32>, cx: &mut Context<'_>) -> Poll<()> {
        if rate.is_none() {
            return Poll::Pending;
        }
        let now = Instant::now();
        let due = self.since.map(|since| since + self.patience.left());
        // Long after its time nobody was waiting: whoever is, is woken.
        if due.is_none_or(|due| now > due + MISSED) {
            self.since = Some(now);
        }
        self.timer.poll(self.since.unwrap_or(now) + self.patience.left(), cx)
    }

    /// Every body has a patience of its own.
    fn anew(&mut self) {
        (self.patience, self.since) = (Patience::default(), None);
    }

    /// It moved.
    pub fn moved(&mut self, bytes: usize, rate: Option<u32>) {
        let waited = self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        self.patience.moved(waited, bytes, rate.unwrap_or(u32::MAX));
    }
}

impl Door {
    /// For a connection that begins with `came`.
    pub fn new(came: BytesMut, http_2: bool, policy: Arc<Policy>) -> Self {
        let opened = Instant::now();
        let mut passed = 0;
        let (reader, inside) = match http_2 {
            false => (Reader::Gate(Gate::new(policy)), !came.is_empty()),
            true => {
                passed = came.len();
                let mut frames = Frames::new(policy);
                // So few that they cannot be too many.
                let _ = frames.feed(came.get(PREFACE.len()..).unwrap_or_default(), 0.0);
                let inside = frames.is_inside();
                (Reader::Frames(frames), inside)
            }
        };
        Self {
            reader,
            held: came,
            passed,
            wrong: None,
            over: false,
            farewell: None,
            sent: Sent::default(),
            began: inside.then_some(opened),
            body: false,
            waits: Waits::default(),
            asked: None,
            opened,
        }
    }

    /// The rules.
    pub fn policy(&self) -> &Policy {
        match &self.reader {
            Reader::Gate(gate) => gate.policy(),
            Reader::Frames(frames) => frames.policy(),
        }
    }

    /// What waits to be handed on.
    pub fn held(&self) -> &[u8] {
        &self.held
    }

    /// There may be more to come of what was begun: a close would tell its client of an error.
    pub fn is_inside(&self) -> bool {
        match &self.reader {
            Reader::Gate(gate) => self.over || !self.held.is_empty() || gate.part() == Part::Body,
            Reader::Frames(_) => self.over,
        }
    }

    /// `bytes` are about to go to the client, in answer to its `nth` request. Nothing passes behind a request for another
    /// protocol, so the first bytes in answer to it are its answer's head.
    pub fn writes(&mut self, bytes: &[u8], nth: u32) {
        let Reader::Gate(gate) = &mut self.reader else { return };
        if gate.part() != Part::Answer || gate.requests() != nth {
            return;
        }
        // RFC 9110, section 15.2: interim answers are none, but for the one that grants it.
        let Some([b'H', b'T', b'T', b'P', b'/', b'1', b'.', _, b' ', status @ ..]) = bytes.get(..12) else { return };
        if !status.starts_with(b"1") || status == b"101" {
            gate.answered(status == b"101");
            // What waits had to.
            self.began = self.began.map(|_| Instant::now());
            if let Some(reader) = self.asked.take() {
                reader.wake();
            }
        }
    }

    /// What some of `bytes`, which are about to go to the client, should be instead, and where: the engine calls every fault
    /// of HTTP/2 by one name.
    pub fn instead(&self, bytes: &[u8]) -> Option<(usize, [u8; 4])> {
        let Reader::Frames(frames) = &self.reader else { return None };
        let place = self.sent.clone().feed(bytes).1.filter(|_| frames.cannot_unpack())?;
        Some((place, (Code::Compression as u32).to_be_bytes()))
    }

    /// `bytes` were taken for the client.
    pub fn wrote(&mut self, bytes: &[u8]) {
        if let Reader::Frames(frames) = &mut self.reader {
            let (answers, _) = self.sent.feed(bytes);
            frames.wrote(bytes.len(), answers);
        }
    }

    /// Reads what may be read; the client's `served`th request is being served. An error: what is wrong, with a request whose
    /// head has passed; of one whose head is wrong a stand-in comes.
    pub fn poll_read<R: AsyncRead + Unpin>(
        &mut self,
        io: &mut R,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        served: u32,
        told: &mut impl FnMut(u32, Fault),
    ) -> Poll<io::Result<()>> {
        loop {
            if self.passed > 0 {
                let take = self.passed.min(buf.remaining());
                buf.put_slice(&self.held.split_to(take));
                self.passed -= take;
                return Poll::Ready(Ok(()));
            }
            if self.over {
                return Poll::Pending;
            }
            if let Some(fault) = self.wrong {
                // In the body of a request that is not served yet: until it is, the one before it has its answer to wait for.
                if let Reader::Gate(gate) = &self.reader
                    && gate.part() != Part::Head
                    && gate.requests() > served
                {
                    return Poll::Pending;
                }
                self.fail(fault, told)?;
                continue;
            }
            match &mut self.reader {
                Reader::Frames(_) => return self.poll_frames(io, cx, buf, told),
                Reader::Gate(gate) => match (gate.part() == Part::Body, gate.feed(&self.held)) {
                    (_, Ok(0)) => {}
                    (body, Ok(n)) => {
                        if !body {
                            self.waits.anew();
                        }
                        self.passed = n;
                        self.began = (self.held.len() > n).then(Instant::now);
                        self.body = body;
                        continue;
                    }
                    (_, Err(fault)) => {
                        self.wrong = Some(fault);
                        continue;
                    }
                },
            }
            let before = buf.filled().len();
            // What comes whole is handed on where it is; what waits for more is kept aside.
            let came = if self.held.is_empty() {
                match Pin::new(&mut *io).poll_read(cx, buf) {
                    Poll::Ready(read) => Poll::Ready(read.map(|()| buf.filled().len() - before)),
                    Poll::Pending => Poll::Pending,
                }
            } else {
                self.poll_more(io, cx)
            };
            match came {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.wrong = self.late(cx);
                    if self.wrong.is_none() {
                        return Poll::Pending;
                    }
                    continue;
                }
            }
            let new = buf.filled().get(before..).unwrap_or_default();
            if new.is_empty() {
                self.began = self.began.or_else(|| Some(Instant::now()));
                continue;
            }
            let Reader::Gate(gate) = &mut self.reader else { continue };
            let mut at = 0;
            let mut wrong = None;
            while let Some(rest) = new.get(at..).filter(|rest| !rest.is_empty()) {
                let body = gate.part() == Part::Body;
                match gate.feed(rest) {
                    Ok(0) => break,
                    Ok(n) => {
                        at += n;
                        let rate = gate.policy().receive_rate;
                        match body {
                            true => self.waits.moved(n, rate),
                            false => self.waits.anew(),
                        }
                        self.body = body;
                    }
                    Err(fault) => {
                        wrong = Some(fault);
                        break;
                    }
                }
            }
            self.held.extend_from_slice(new.get(at..).unwrap_or_default());
            buf.set_filled(before + at);
            // Empty lines between requests are nothing that has begun.
            if self.held.iter().any(|b| !matches!(b, b'\r' | b'\n')) {
                self.began = Some(Instant::now());
            }
            // What came before it is good, and may be all of another request.
            self.wrong = wrong;
            if at > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Reads more to what waits.
    fn poll_more<R: AsyncRead + Unpin>(&mut self, io: &mut R, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let Reader::Gate(gate) = &self.reader
            && gate.part() == Part::Answer
        {
            self.asked = Some(cx.waker().clone());
            if self.held.len() >= ASKED {
                return Poll::Pending;
            }
        }
        let mut piece = [std::mem::MaybeUninit::uninit(); PIECE];
        let mut piece = ReadBuf::uninit(&mut piece);
        ready!(Pin::new(io).poll_read(cx, &mut piece))?;
        self.held.extend_from_slice(piece.filled());
        Poll::Ready(Ok(piece.filled().len()))
    }

    /// Is what is under way too slow?
    fn late(&mut self, cx: &mut Context<'_>) -> Option<Fault> {
        let Reader::Gate(gate) = &self.reader else { return None };
        let policy = gate.policy();
        match (gate.part(), self.began) {
            (Part::Head, Some(began)) => {
                let at = began + policy.header_timeout;
                self.waits
                    .timer
                    .poll(at, cx)
                    .is_ready()
                    .then_some(Fault { kind: Kind::HeaderTimeout, why: "its head took too long" })
            }
            // Before it begins its client may wait for somebody to tell it to go on.
            (Part::Body, _) if self.body => {
                let rate = policy.receive_rate;
                self.waits.poll(rate, cx).is_ready().then_some(Fault { kind: Kind::SlowBody, why: "its body comes too slowly" })
            }
            (Part::Answer, _) => {
                self.asked = Some(cx.waker().clone());
                None
            }
            (Part::Head | Part::Body | Part::Open, _) => None,
        }
    }

    /// Nothing that comes is read any more. An error, if what came before was handed on already.
    fn fail(&mut self, fault: Fault, told: &mut impl FnMut(u32, Fault)) -> io::Result<()> {
        self.over = true;
        self.wrong = None;
        let Reader::Gate(gate) = &self.reader else { return Err(io::ErrorKind::InvalidData.into()) };
        if gate.part() != Part::Head {
            told(gate.requests(), fault);
            return Err(io::Error::new(io::ErrorKind::InvalidData, fault.why));
        }
        told(gate.requests().saturating_add(1), fault);
        let stand_in = gate.stand_in(&self.held);
        self.held.clear();
        self.held.extend_from_slice(&stand_in);
        self.passed = self.held.len();
        Ok(())
    }

    fn poll_frames<R: AsyncRead + Unpin>(
        &mut self,
        io: &mut R,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        told: &mut impl FnMut(u32, Fault),
    ) -> Poll<io::Result<()>> {
        let Reader::Frames(frames) = &mut self.reader else { return Poll::Pending };
        let before = buf.filled().len();
        let read = Pin::new(io).poll_read(cx, buf);
        let (fault, code) = match read {
            Poll::Ready(Ok(())) => {
                let new = buf.filled().get(before..).unwrap_or_default();
                let fed = frames.feed(new, self.opened.elapsed().as_secs_f64());
                self.began = frames.is_inside().then(|| self.began.unwrap_or_else(Instant::now));
                match fed {
                    Ok(()) => return Poll::Ready(Ok(())),
                    Err(wrong) => wrong,
                }
            }
            Poll::Pending => match self.began {
                Some(began) if self.waits.timer.poll(began + frames.policy().header_timeout, cx).is_ready() => {
                    (Fault { kind: Kind::HeaderTimeout, why: "its head took too long" }, Code::EnhanceYourCalm)
                }
                _ => return Poll::Pending,
            },
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
        };
        self.farewell = Some(frames.farewell(code));
        told(0, fault);
        self.over = true;
        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, fault.why)))
    }

    /// How an HTTP/2 connection is ended whose client broke a rule. It is for the place between two frames; behind it
    /// nothing is sent.
    pub fn farewell(&mut self) -> Option<[u8; 17]> {
        self.farewell.take().filter(|_| self.sent.is_between())
    }

    /// Reads and forgets, until there is nothing more or `most` bytes came: what a client has on its way would make its
    /// system throw our answer away.
    pub fn poll_forget<R: AsyncRead + Unpin>(io: &mut R, cx: &mut Context<'_>, most: &mut usize) -> Poll<io::Result<()>> {
        while *most > 0 {
            let mut piece = [std::mem::MaybeUninit::uninit(); PIECE];
            let mut piece = ReadBuf::uninit(&mut piece);
            ready!(Pin::new(&mut *io).poll_read(cx, &mut piece))?;
            if piece.filled().is_empty() {
                break;
            }
            *most = most.saturating_sub(piece.filled().len());
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    struct Client {
        far: DuplexStream,
        near: DuplexStream,
        door: Door,
        told: Vec<(u32, Kind)>,
        /// The request that is served.
        served: u32,
    }

    impl Client {
        fn new(came: &[u8], http_2: bool) -> Self {
            let (far, near) = duplex(1 << 16);
            Self { far, near, door: Door::new(came.into(), http_2, Arc::default()), told: Vec::new(), served: 1 }
        }

        async fn read(&mut self) -> io::Result<String> {
            let mut space = [0; 1024];
            let mut buf = ReadBuf::new(&mut space);
            let told = &mut self.told;
            std::future::poll_fn(|cx| {
                self.door.poll_read(&mut self.near, cx, &mut buf, self.served, &mut |which, fault: Fault| {
                    told.push((which, fault.kind))
                })
            })
            .await?;
            Ok(String::from_utf8_lossy(buf.filled()).into_owned())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_its_time() {
        const HEAD: &str = "GET /a HTTP/1.1\r\nHost: a\r\n";
        for came in [&HEAD[..0], &HEAD[..7], HEAD] {
            let mut client = Client::new(came.as_bytes(), false);
            client.far.write_all(&HEAD.as_bytes()[came.len()..]).await.unwrap();
            let (before, read) = (Instant::now(), client.read().await.unwrap());
            assert!(read.starts_with("GET /a HTTP/1.1\r\nHost: -\r\nConnection: close"), "{came}: {read}");
            assert_eq!((client.told, before.elapsed().as_secs()), (vec![(1, Kind::HeaderTimeout)], 10));
        }
        // A drip is no progress.
        let mut client = Client::new(b"", false);
        let before = Instant::now();
        let (mut far, near) = duplex(64);
        client.near = near;
        let drip = tokio::spawn(async move {
            for byte in HEAD.bytes().chain(std::iter::repeat(b'x')) {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if far.write_all(&[byte]).await.is_err() {
                    break;
                }
            }
        });
        client.read().await.unwrap();
        assert_eq!((client.told, before.elapsed().as_secs()), (vec![(1, Kind::HeaderTimeout)], 11));
        drip.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_its_pace() {
        let mut client = Client::new(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n", false);
        assert!(client.read().await.unwrap().ends_with("\r\n\r\n"));
        // Nobody knows yet whether it waits to be told to go on.
        let wait = tokio::time::timeout(Duration::from_secs(300), client.read()).await;
        assert!(wait.is_err());
        client.far.write_all(&[b'x'; 1_000]).await.unwrap();
        client.read().await.unwrap();
        let before = Instant::now();
        assert_eq!(client.read().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        // 20 seconds to begin with, and 4 for what came.
        assert_eq!((client.told, before.elapsed().as_secs()), (vec![(1, Kind::SlowBody)], 24));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_good_before_a_fault_is_handed_on() {
        const GOOD: &str = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n";
        const BAD: &str = "POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
        let mut client = Client::new(b"", false);
        client.far.write_all(format!("{GOOD}{BAD}").as_bytes()).await.unwrap();
        let (head, _) = BAD.split_at(BAD.len() - 4);
        assert_eq!(client.read().await.unwrap(), format!("{GOOD}{head}"));
        let waits = tokio::time::timeout(Duration::from_secs(5), client.read()).await;
        assert!(waits.is_err(), "the first has its answer to wait for");
        client.served = 2;
        assert!(client.read().await.is_err());
        assert_eq!(client.told, [(2, Kind::Framing)]);
        let mut client = Client::new(b"", false);
        client.far.write_all(format!("{GOOD}GET / HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
        assert_eq!(client.read().await.unwrap(), GOOD);
        assert!(client.read().await.unwrap().contains("Host: -"));
        assert_eq!(client.told, [(2, Kind::Host)]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_line_is_no_head() {
        let mut client = Client::new(b"", false);
        client.far.write_all(b"\r\n").await.unwrap();
        assert!(tokio::time::timeout(Duration::from_secs(300), client.read()).await.is_err());
        client.far.write_all(b"GET").await.unwrap();
        let before = Instant::now();
        client.read().await.unwrap();
        assert_eq!((client.told, before.elapsed().as_secs()), (vec![(1, Kind::HeaderTimeout)], 10));
    }

    /// Bytes that look like a head are no answer to another request.
    #[tokio::test(start_paused = true)]
    async fn only_its_own_answer_grants_a_request() {
        const TWO: &[u8] = b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n";
        let mut client = Client::new(b"", false);
        client.far.write_all(TWO).await.unwrap();
        client.read().await.unwrap();
        client.far.write_all(b"\x81\x00").await.unwrap();
        client.door.writes(b"HTTP/1.1 200 OK\r\n\r\n", 1);
        client.door.writes(b"HTTP/1.1 101 in a body", 1);
        assert!(tokio::time::timeout(Duration::from_secs(5), client.read()).await.is_err());
        client.door.writes(b"HTTP/1.1 100 Continue\r\n\r\n", 2);
        assert!(tokio::time::timeout(Duration::from_secs(5), client.read()).await.is_err());
        client.door.writes(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 2);
        assert_eq!(client.read().await.unwrap().len(), 4, "the replacement character has three bytes");
    }

    #[tokio::test(start_paused = true)]
    async fn http_2_is_passed_on_as_it_is() {
        let mut begun = PREFACE.to_vec();
        begun.extend_from_slice(&[0, 0, 9, 1, 0, 0, 0, 0, 1]);
        let mut client = Client::new(&begun, true);
        assert_eq!(client.read().await.unwrap().len(), begun.len());
        client.far.write_all(b"123").await.unwrap();
        assert_eq!(client.read().await.unwrap(), "123");
        assert!(client.read().await.is_err());
        assert_eq!(client.told, [(0, Kind::HeaderTimeout)]);
    }
}
