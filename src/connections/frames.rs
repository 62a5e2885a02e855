//! HTTP/2 frames (RFC 9113, section 4.1), counted: those that ask for nothing cost something.

use std::sync::Arc;

use super::Policy;
use super::fault::{Fault, Kind};

/// Frames that may come per second in the long run, beside what answers cause.
const PER_SECOND: f64 = 10.0;
/// Written bytes for which one frame more may come: a client that reads sends updates of its window.
const BYTES_PER_FRAME: f64 = 1024.0;

const HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Reads the frames that a client sends.
#[derive(Debug)]
pub struct Frames {
    policy: Arc<Policy>,
    header: [u8; HEADER],
    have: usize,
    /// Bytes of the payload that have not come yet.
    payload: usize,
    /// A header block has begun and not ended.
    block: bool,
    credit: f64,
    /// Seconds at which `credit` was true.
    at: f64,
}

impl Frames {
    /// Behind the preface.
    pub fn new(policy: Arc<Policy>) -> Self {
        let credit = f64::from(policy.control_frames);
        Self { policy, header: [0; HEADER], have: 0, payload: 0, block: false, credit, at: 0.0 }
    }

    /// The rules.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// A frame, or a block of headers, has begun and not ended.
    pub fn is_inside(&self) -> bool {
        let [_, _, _, kind, ..] = self.header;
        self.block || self.have > 0 || (self.payload > 0 && matches!(kind, HEADERS | CONTINUATION))
    }

    /// The client is sent so many bytes.
    pub fn wrote(&mut self, bytes: usize) {
        self.earn(bytes as f64 / BYTES_PER_FRAME);
    }

    fn earn(&mut self, frames: f64) {
        self.credit = (self.credit + frames).min(f64::from(self.policy.control_frames));
    }

    /// Counts what came at `now`, in seconds since the connection began.
    pub fn feed(&mut self, mut bytes: &[u8], now: f64) -> Result<(), Fault> {
        self.earn((now - self.at).max(0.0) * PER_SECOND);
        self.at = now;
        while !bytes.is_empty() {
            if self.payload > 0 {
                let take = bytes.len().min(self.payload);
                self.payload -= take;
                bytes = bytes.get(take..).unwrap_or_default();
                continue;
            }
            let take = bytes.len().min(HEADER - self.have);
            let (new, rest) = bytes.split_at(take);
            if let Some(place) = self.header.get_mut(self.have..self.have + take) {
                place.copy_from_slice(new);
            }
            self.have += take;
            bytes = rest;
            if self.have == HEADER {
                self.have = 0;
                self.frame()?;
            }
        }
        Ok(())
    }

    fn frame(&mut self) -> Result<(), Fault> {
        let [a, b, c, kind, flags, ..] = self.header;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        self.payload = length;
        let asks = match kind {
            HEADERS => true,
            DATA => length > 0 || flags & END_STREAM != 0,
            _ => false,
        };
        if matches!(kind, HEADERS | CONTINUATION) {
            self.block = flags & END_HEADERS == 0;
        }
        if !asks {
            self.credit -= 1.0;
            if self.credit < 0.0 {
                return Err(Kind::Flood.because("too many frames that ask for nothing"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        frame.resize(HEADER + usize::from(length), 0xff);
        frame
    }

    fn frames() -> Frames {
        Frames::new(Arc::new(Policy { control_frames: 20, ..Policy::default() }))
    }

    #[test]
    fn what_asks_for_nothing_runs_out() {
        const REST: [(u8, u8, u8); 7] = [(0, 0, 0), (2, 0, 5), (3, 0, 4), (4, 0, 0), (6, 0, 8), (8, 0, 4), (9, 0, 3)];
        for (kind, flags, length) in REST {
            let mut frames = frames();
            let passed = (0..).take_while(|_| frames.feed(&frame(kind, flags, length), 0.0).is_ok()).count();
            assert_eq!(passed, 20, "frame {kind}");
            assert!(frames.feed(&frame(kind, flags, length), 1.0).is_ok(), "some time later there is room for some more");
        }
        for (kind, flags, length) in [(1, 5, 30), (0, 0, 9), (0, 1, 0)] {
            let mut frames = frames();
            assert!((0..1_000).all(|_| frames.feed(&frame(kind, flags, length), 0.0).is_ok()), "frame {kind}");
        }
        let mut reader = frames();
        for _ in 0..1_000 {
            reader.wrote(16 << 10);
            assert!(reader.feed(&[frame(8, 0, 4), frame(8, 0, 4)].concat(), 0.0).is_ok(), "it reads what it is sent");
        }
    }

    #[test]
    fn blocks_end() {
        let mut frames = frames();
        for (bytes, inside) in [
            (frame(1, 0, 3), true),
            (frame(9, 0, 3), true),
            (frame(9, 4, 3), false),
            (vec![0, 0, 1, 1, 4, 0, 0, 0, 3], true),
            (vec![0], false),
            (vec![0], true),
        ] {
            frames.feed(&bytes, 0.0).unwrap();
            assert_eq!(frames.is_inside(), inside);
        }
    }

    proptest! {
        #[test]
        fn cuts_make_no_difference(kinds in prop::collection::vec((0u8..12, any::<u8>(), 0u8..40), 0..60), step in 1usize..30) {
            let bytes: Vec<u8> = kinds.iter().flat_map(|(kind, flags, length)| frame(*kind, *flags, *length)).collect();
            let (mut whole, mut cut) = (frames(), frames());
            let one = whole.feed(&bytes, 0.0);
            let other = bytes.chunks(step).try_for_each(|part| cut.feed(part, 0.0));
            prop_assert_eq!(one, other);
        }
    }
}
