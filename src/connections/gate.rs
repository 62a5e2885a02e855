//! The gate that HTTP/1 comes through: it tells how much of what came may be read by others.

use std::sync::Arc;

use super::Policy;
use super::chunks::Chunks;
use super::fault::Fault;
use super::head::{Body, Head};

/// Reads one connection's requests, one after the other.
#[derive(Debug)]
pub struct Gate {
    policy: Arc<Policy>,
    at: At,
    requests: u32,
}

#[derive(Debug)]
enum At {
    Head(Head),
    Length(u64),
    Chunks(Chunks),
    /// A request to speak something else waits for its answer: what comes now is of one language or the other.
    Asked,
    /// It is granted: whatever comes may pass.
    Open,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The head of a request.
    Head,
    /// Its body.
    Body,
    /// Nothing, before the request has its answer.
    Answer,
    /// What is no HTTP any more.
    Open,
}

impl Gate {
    /// Before the first request.
    pub fn new(policy: Arc<Policy>) -> Self {
        Self { policy, at: At::Head(Head::default()), requests: 0 }
    }

    /// The rules.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// How many requests have come.
    pub fn requests(&self) -> u32 {
        self.requests
    }

    /// What comes next.
    pub fn part(&self) -> Part {
        match self.at {
            At::Head(_) => Part::Head,
            At::Length(_) | At::Chunks(_) => Part::Body,
            At::Asked => Part::Answer,
            At::Open => Part::Open,
        }
    }

    /// How many of `bytes` may pass; what may not has to come again, with more behind it. A head passes as a whole.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let (passed, over) = match &mut self.at {
            At::Head(head) => {
                let Some(whole) = head.feed(bytes, &self.policy)? else { return Ok(0) };
                self.requests = self.requests.saturating_add(1);
                self.at = match whole.body {
                    // Nothing but a head asks for another protocol.
                    Body::Length(0) if whole.upgrade => At::Asked,
                    Body::Length(0) => At::Head(Head::default()),
                    Body::Length(length) => At::Length(length),
                    Body::Chunked => At::Chunks(Chunks::new(self.policy.header_bytes)),
                };
                return Ok(whole.length);
            }
            At::Length(left) => {
                let take = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left = left.saturating_sub(take as u64);
                (take, *left == 0)
            }
            At::Chunks(chunks) => {
                let taken = chunks.feed(bytes)?;
                (taken, chunks.is_done())
            }
            At::Asked => (0, false),
            At::Open => (bytes.len(), false),
        };
        if over {
            self.at = At::Head(Head::default());
        }
        Ok(passed)
    }

    /// A request that asked to speak something else got its answer.
    pub fn answered(&mut self, granted: bool) {
        if matches!(self.at, At::Asked) {
            self.at = if granted { At::Open } else { At::Head(Head::default()) };
        }
    }

    /// A request that stands for the faulty one in `bytes`, without a body and the last of its connection: its answer
    /// tells what is wrong, and whoever logs it knows what was asked for.
    pub fn stand_in(&self, bytes: &[u8]) -> Vec<u8> {
        const PLAIN: &[u8] = b"GET / HTTP/1.1";
        let first = match &self.at {
            At::Head(head) => head.first.clone(),
            _ => None,
        };
        let first = first.and_then(|first| bytes.get(first)).filter(|line| line.ends_with(b"HTTP/1.1"));
        // Paths only: what another form of target names may be what is wrong.
        let first = first.filter(|line| line.split(|b| *b == b' ').nth(1).is_some_and(|target| target.starts_with(b"/")));
        [first.unwrap_or(PLAIN), b"\r\nHost: -\r\nConnection: close\r\n\r\n"].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fault::Kind;
    use super::*;

    /// What passes of a connection on which this comes, and what is wrong in the end.
    fn pass(gate: &mut Gate, bytes: &[u8], step: usize) -> (Vec<u8>, Option<Kind>) {
        let (mut passed, mut waiting) = (Vec::new(), Vec::new());
        for part in bytes.chunks(step) {
            waiting.extend_from_slice(part);
            loop {
                match gate.feed(&waiting) {
                    Ok(0) => break,
                    Ok(n) => passed.extend(waiting.drain(..n)),
                    Err(fault) => {
                        let stand_in = gate.stand_in(&waiting);
                        passed.extend_from_slice(&stand_in);
                        return (passed, Some(fault.kind));
                    }
                }
            }
        }
        (passed, None)
    }

    #[test]
    fn one_request_after_the_other() {
        const GOOD: &str = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET /2 HTTP/1.1\r\nHost: a\r\n\r\nPUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n";
        for step in [1, 2, 5, 1_000] {
            let mut gate = Gate::new(Arc::default());
            assert_eq!(pass(&mut gate, GOOD.as_bytes(), step), (GOOD.into(), None), "{step}");
            assert_eq!((gate.requests(), gate.part()), (3, Part::Head));
            let bad = format!("{GOOD}DELETE /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n");
            let stands = format!("{GOOD}DELETE /x HTTP/1.1\r\nHost: -\r\nConnection: close\r\n\r\n");
            let mut gate = Gate::new(Arc::default());
            assert_eq!(pass(&mut gate, bad.as_bytes(), step), (stands.into(), Some(Kind::Framing)), "{step}");
        }
    }

    #[test]
    fn an_upgrade_waits_for_its_answer() {
        const ASKED: &str = "GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n";
        for granted in [true, false] {
            let mut gate = Gate::new(Arc::default());
            assert_eq!(pass(&mut gate, ASKED.as_bytes(), 9), (ASKED.into(), None));
            assert_eq!((gate.part(), gate.feed(b"\x81\x00")), (Part::Answer, Ok(0)));
            gate.answered(granted);
            let (part, passed) = if granted { (Part::Open, Ok(2)) } else { (Part::Head, Ok(0)) };
            assert_eq!((gate.part(), gate.feed(b"\x81\x00")), (part, passed));
        }
        let mut gate = Gate::new(Arc::default());
        gate.answered(true);
        assert_eq!(gate.part(), Part::Head, "nobody asked");
    }
}
