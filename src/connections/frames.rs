//! HTTP/2 frames (RFC 9113, section 4), read along: those that ask for nothing cost something, and what breaks a rule of
//! frames and streams ends the connection with the code that the rule names.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use super::fault::{Fault, Kind};
use super::{Policy, hpack};

/// Frames that may come per second in the long run, beside what answers cause.
const PER_SECOND: f64 = 10.0;
/// Written bytes for which one frame more may come: a client that reads sends updates of its window.
const BYTES_PER_FRAME: f64 = 1024.0;
/// So many more may come for every frame of an answer: gRPC's clients answer each with an update and a ping of their own.
const PER_ANSWER: f64 = 3.0;

const HEADER: usize = 9;
/// What the engine says that a frame may have (RFC 9113, section 6.5.2: the default).
const LARGEST: usize = 16_384;
/// Streams that a client has not ended, or has: of so many of each it is known.
const KNOWN: usize = 1_024;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
/// Of DATA and HEADERS; of SETTINGS and PING it says that they are an answer.
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const WITH_PRIORITY: u8 = 32;
const INITIAL_WINDOW_SIZE: u16 = 4;
/// Bytes of packed headers that are looked at.
const KEPT: usize = 64 << 10;

/// Why a connection ends (RFC 9113, section 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// A rule was broken.
    Protocol = 1,
    /// More was asked for than can be counted.
    FlowControl = 3,
    /// Something came for a stream that its client has ended.
    StreamClosed = 5,
    /// A frame has a length that it cannot have.
    FrameSize = 6,
    /// Headers cannot be unpacked.
    Compression = 9,
    /// It is too much.
    EnhanceYourCalm = 11,
}

/// What of a frame with headers is none of them.
#[derive(Debug, Clone, Copy, Default)]
struct Aside {
    /// There is padding, and how much, once that is known.
    padding: Option<Option<usize>>,
    /// Bytes before the headers that have not come yet.
    front: usize,
}

/// What is wrong, and how that is called.
pub type Wrong = (Fault, Code);

/// Reads the frames that a client sends.
#[derive(Debug)]
pub struct Frames {
    policy: Arc<Policy>,
    header: [u8; HEADER],
    have: usize,
    /// Bytes of the payload that have not come yet.
    payload: usize,
    /// A header block of this stream has begun and not ended.
    block: Option<u32>,
    /// It is one of trailers.
    trailer: bool,
    /// What came of it, or of the last one; so much of the payload under way is none of it.
    packed: Vec<u8>,
    aside: Aside,
    /// Headers that blocks added to the client's table.
    added: u64,
    /// The last frame ended one.
    unpacks: bool,
    /// A setting, as far as it came.
    setting: VecDeque<u8>,
    /// The highest stream that there was.
    highest: u32,
    /// Streams that their client has not ended, and those that it has.
    open: BTreeSet<u32>,
    ended: VecDeque<u32>,
    credit: f64,
    /// Seconds at which `credit` was true.
    at: f64,
}

impl Frames {
    /// Behind the preface.
    pub fn new(policy: Arc<Policy>) -> Self {
        let credit = f64::from(policy.control_frames);
        Self {
            policy,
            header: [0; HEADER],
            have: 0,
            payload: 0,
            block: None,
            trailer: false,
            packed: Vec::new(),
            aside: Aside::default(),
            added: 0,
            unpacks: false,
            setting: VecDeque::new(),
            highest: 0,
            open: BTreeSet::new(),
            ended: VecDeque::new(),
            credit,
            at: 0.0,
        }
    }

    /// The rules.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// A frame, or a block of headers, has begun and not ended.
    pub fn is_inside(&self) -> bool {
        let [_, _, _, kind, ..] = self.header;
        self.block.is_some() || self.have > 0 || (self.payload > 0 && matches!(kind, HEADERS | CONTINUATION))
    }

    /// The last frame was the end of headers, and these cannot be unpacked: what the engine finds fault with now is that.
    pub fn cannot_unpack(&self) -> bool {
        self.unpacks && !hpack::strings_unpack(&self.packed)
    }

    /// The frame that ends the connection (RFC 9113, section 6.8).
    pub fn farewell(&self, code: Code) -> [u8; 17] {
        let mut frame = [0; 17];
        let parts = [&[0, 0, 8, GOAWAY, 0, 0, 0, 0, 0][..], &self.highest.to_be_bytes(), &(code as u32).to_be_bytes()].concat();
        frame.copy_from_slice(&parts);
        frame
    }

    /// The client is sent so many bytes, and so many frames of answers in them.
    pub fn wrote(&mut self, bytes: usize, answers: usize) {
        self.earn(bytes as f64 / BYTES_PER_FRAME + answers as f64 * PER_ANSWER);
    }

    fn earn(&mut self, frames: f64) {
        self.credit = (self.credit + frames).min(f64::from(self.policy.control_frames));
    }

    /// Reads what came at `now`, in seconds since the connection began.
    pub fn feed(&mut self, mut bytes: &[u8], now: f64) -> Result<(), Wrong> {
        self.earn((now - self.at).max(0.0) * PER_SECOND);
        self.at = now;
        while !bytes.is_empty() {
            if self.payload > 0 {
                let (part, rest) = bytes.split_at(bytes.len().min(self.payload));
                self.payload -= part.len();
                bytes = rest;
                let [_, _, _, kind, ..] = self.header;
                match kind {
                    SETTINGS => self.settings(part)?,
                    HEADERS | CONTINUATION => self.headers(part)?,
                    _ => {}
                }
                continue;
            }
            let (new, rest) = bytes.split_at(bytes.len().min(HEADER - self.have));
            if let Some(place) = self.header.get_mut(self.have..self.have + new.len()) {
                place.copy_from_slice(new);
            }
            self.have += new.len();
            bytes = rest;
            if self.have == HEADER {
                self.have = 0;
                self.frame()?;
            }
        }
        Ok(())
    }

    fn frame(&mut self) -> Result<(), Wrong> {
        let [a, b, c, kind, flags, d, e, f, g] = self.header;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        let stream = u32::from_be_bytes([d & 0x7f, e, f, g]);
        self.payload = length;
        self.unpacks = false;
        if length > LARGEST {
            return size("a frame is too long");
        }
        if let Some(of) = self.block
            && (kind, stream) != (CONTINUATION, of)
        {
            return protocol("headers are interrupted by another frame");
        }
        let flag = |one: u8| flags & one != 0;
        match kind {
            DATA | HEADERS | PRIORITY | RST_STREAM | CONTINUATION if stream == 0 => {
                return protocol("a stream's frame has no stream");
            }
            SETTINGS | PING | GOAWAY if stream != 0 => return protocol("a connection's frame has a stream"),
            DATA | RST_STREAM | WINDOW_UPDATE if stream > self.highest => {
                return protocol("a frame is of a stream that never began");
            }
            PRIORITY if length != 5 => return size("a priority has another length"),
            RST_STREAM | WINDOW_UPDATE if length != 4 => return size("a frame of four bytes has another length"),
            PING if length != 8 => return size("a ping has another length"),
            SETTINGS if length % 6 != 0 || (flag(END_STREAM) && length > 0) => return size("settings have another length"),
            PUSH_PROMISE => return protocol("clients promise nothing"),
            CONTINUATION if self.block.is_none() => return protocol("headers go on that never began"),
            DATA | HEADERS if self.ended.contains(&stream) => {
                return Err((Kind::Malformed.because("something came for a stream after its end"), Code::StreamClosed));
            }
            HEADERS => {
                self.trailer = stream <= self.highest;
                if !self.trailer {
                    self.begins(stream)?;
                }
            }
            _ => {}
        }
        if kind == HEADERS {
            self.packed.clear();
            self.aside = Aside { padding: flag(PADDED).then_some(None), front: if flag(WITH_PRIORITY) { 5 } else { 0 } };
        }
        if kind == CONTINUATION {
            self.aside = Aside::default();
        }
        if matches!(kind, HEADERS | CONTINUATION) {
            self.block = (!flag(END_HEADERS)).then_some(stream);
            if length == 0 {
                self.unpack()?;
            }
        }
        if kind == RST_STREAM || (matches!(kind, DATA | HEADERS) && flag(END_STREAM)) {
            self.ends(stream);
        }
        let asks = kind == HEADERS || (kind == DATA && (length > 0 || flag(END_STREAM)));
        if !asks {
            self.credit -= 1.0;
            if self.credit < 0.0 {
                return Err((Kind::Flood.because("too many frames that ask for nothing"), Code::EnhanceYourCalm));
            }
        }
        Ok(())
    }

    fn begins(&mut self, stream: u32) -> Result<(), Wrong> {
        if stream.is_multiple_of(2) {
            return protocol("a client's stream has an even number");
        }
        self.highest = stream;
        self.open.insert(stream);
        if self.open.len() > KNOWN {
            self.open.pop_first();
        }
        Ok(())
    }

    fn ends(&mut self, stream: u32) {
        // Of others it is not known that they were open: nothing is said of them.
        if self.open.remove(&stream) {
            self.ended.push_back(stream);
            if self.ended.len() > KNOWN {
                self.ended.pop_front();
            }
        }
    }

    /// A part of packed headers.
    fn headers(&mut self, part: &[u8]) -> Result<(), Wrong> {
        let mut part = part;
        if self.aside.padding == Some(None)
            && let Some((padding, rest)) = part.split_first()
        {
            self.aside.padding = Some(Some(usize::from(*padding)));
            part = rest;
        }
        let front = part.len().min(self.aside.front);
        self.aside.front -= front;
        let part = part.get(front..).unwrap_or_default();
        // What is longer than may be unpacked is not kept: the engine refuses it.
        if self.packed.len() < KEPT {
            self.packed.extend_from_slice(part);
        }
        if self.payload > 0 {
            return Ok(());
        }
        let padding = self.aside.padding.flatten().unwrap_or_default();
        if padding > self.packed.len() {
            return protocol("there is more padding than there is room");
        }
        self.packed.truncate(self.packed.len() - padding);
        self.unpack()
    }

    /// A block has ended, perhaps.
    fn unpack(&mut self) -> Result<(), Wrong> {
        if self.block.is_some() {
            return Ok(());
        }
        self.unpacks = true;
        if self.packed.len() >= KEPT {
            // Nobody knows any more how many there are.
            self.added = u64::MAX / 2;
            return Ok(());
        }
        let Some(hpack::Shape { added, pseudo }) = hpack::shape(&self.packed, self.added) else {
            return Err((Kind::Malformed.because("headers cannot be unpacked"), Code::Compression));
        };
        self.added = self.added.saturating_add(added);
        if pseudo && self.trailer {
            return protocol("a trailer has what only a request begins with");
        }
        Ok(())
    }

    fn settings(&mut self, part: &[u8]) -> Result<(), Wrong> {
        self.setting.extend(part);
        while let [Some(a), Some(b), Some(c), ..] = [self.setting.front(), self.setting.get(1), self.setting.get(2)]
            && self.setting.len() >= 6
        {
            if u16::from_be_bytes([*a, *b]) == INITIAL_WINDOW_SIZE && *c & 0x80 != 0 {
                return Err((Kind::Malformed.because("a window is larger than it can be"), Code::FlowControl));
            }
            self.setting.drain(..6);
        }
        Ok(())
    }
}

fn protocol(why: &'static str) -> Result<(), Wrong> {
    Err((Kind::Malformed.because(why), Code::Protocol))
}

fn size(why: &'static str) -> Result<(), Wrong> {
    Err((Kind::Malformed.because(why), Code::FrameSize))
}

/// Follows the frames that a client is sent, to know where one may be put between.
#[derive(Debug, Clone, Default)]
pub struct Sent {
    header: [u8; HEADER],
    have: usize,
    payload: usize,
}

impl Sent {
    /// `bytes` go out. How many frames of answers begin in them; and where a farewell with [`Code::Protocol`] has its code,
    /// if all of it is here.
    pub fn feed(&mut self, bytes: &[u8]) -> (usize, Option<usize>) {
        let mut at = 0;
        let (mut answers, mut found) = (0, None);
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            if self.payload > 0 {
                let part = rest.len().min(self.payload);
                (self.payload, at) = (self.payload - part, at + part);
                continue;
            }
            let part = rest.len().min(HEADER - self.have);
            if let (Some(place), Some(new)) = (self.header.get_mut(self.have..self.have + part), rest.get(..part)) {
                place.copy_from_slice(new);
            }
            (self.have, at) = (self.have + part, at + part);
            if self.have == HEADER {
                self.have = 0;
                let [a, b, c, kind, ..] = self.header;
                self.payload = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                // What answers a ping or settings earns nothing: they would pay for themselves.
                answers += usize::from(matches!(kind, DATA | HEADERS));
                let code = bytes.get(at + 4..at + 8);
                if kind == GOAWAY && code == Some(&(Code::Protocol as u32).to_be_bytes()) {
                    found = Some(at + 4);
                }
            }
        }
        (answers, found)
    }

    /// Is no frame under way?
    pub fn is_between(&self) -> bool {
        self.have == 0 && self.payload == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let stream = if matches!(kind, 4 | 6) { 0 } else { 1 };
        let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, stream];
        // Indexed headers, for whoever unpacks them.
        frame.resize(HEADER + usize::from(length), if matches!(kind, 1 | 9) { 0x8f } else { 0x7f });
        frame
    }

    fn frames() -> Frames {
        Frames::new(Arc::new(Policy { control_frames: 20, ..Policy::default() }))
    }

    fn of(stream: u8, kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        [&[0, 0, payload.len() as u8, kind, flags, 0, 0, 0, stream][..], payload].concat()
    }

    #[test]
    fn what_asks_for_nothing_runs_out() {
        const REST: [(u8, u8, u8); 6] = [(0, 0, 0), (2, 0, 5), (3, 0, 4), (4, 0, 0), (6, 0, 8), (8, 0, 4)];
        for (kind, flags, length) in REST {
            let mut frames = frames();
            frames.feed(&frame(1, 4, 3), 0.0).unwrap();
            let passed = (0..).take_while(|_| frames.feed(&frame(kind, flags, length), 0.0).is_ok()).count();
            assert_eq!(passed, 20, "frame {kind}");
            // Where a frame has more to it, that is lost with the rest of the connection.
            if length == 0 {
                assert!(frames.feed(&frame(kind, flags, length), 1.0).is_ok(), "some time later there is room for some more");
            }
        }
        let mut frames_of_one = frames();
        frames_of_one.feed(&frame(1, 0, 3), 0.0).unwrap();
        assert_eq!((0..).take_while(|_| frames_of_one.feed(&frame(9, 0, 3), 0.0).is_ok()).count(), 20, "headers that go on");
        let mut calls = frames();
        assert!((0..100).all(|i| calls.feed(&of(2 * i + 1, 1, 5, &[0x82; 30]), 0.0).is_ok()), "requests");
        let mut body = frames();
        body.feed(&frame(1, 4, 3), 0.0).unwrap();
        assert!((0..1_000).all(|_| body.feed(&frame(0, 0, 9), 0.0).is_ok()), "a body");
        let mut caller = frames();
        assert!(
            (0..120).all(|i| {
                caller.wrote(100, 2);
                caller.feed(&[of(2 * i + 1, 1, 5, &[0x82]), frame(8, 0, 4), frame(6, 0, 8)].concat(), 0.0).is_ok()
            }),
            "an update and a ping for every answer"
        );
        let mut reader = frames();
        reader.feed(&frame(1, 4, 3), 0.0).unwrap();
        for _ in 0..1_000 {
            reader.wrote(16 << 10, 0);
            assert!(reader.feed(&[frame(8, 0, 4), frame(8, 0, 4)].concat(), 0.0).is_ok(), "it reads what it is sent");
        }
    }

    #[test]
    fn rules_have_their_codes() {
        let begun = || of(1, 1, 4, &[0x82]);
        let over = || of(1, 1, 5, &[0x82]);
        for (frames_sent, expected) in [
            (vec![of(0, 4, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]), of(0, 4, 1, b""), of(0, 0x16, 0, b"what"), begun()], None),
            (vec![begun(), of(1, 0, 0, b"body"), of(1, 1, 5, &[]), of(3, 1, 5, &[0x82]), of(1, 8, 0, &[0; 4])], None),
            (vec![vec![0, 0x40, 1, 0, 0, 0, 0, 0, 1]], Some(Code::FrameSize)),
            (vec![of(0, 0, 0, b"x")], Some(Code::Protocol)),
            (vec![of(0, 1, 5, &[0x82])], Some(Code::Protocol)),
            (vec![of(1, 4, 0, b"")], Some(Code::Protocol)),
            (vec![of(1, 6, 0, &[0; 8])], Some(Code::Protocol)),
            (vec![of(1, 7, 0, &[0; 8])], Some(Code::Protocol)),
            (vec![of(2, 1, 5, &[0x82])], Some(Code::Protocol)),
            (vec![of(1, 0, 0, b"x")], Some(Code::Protocol)),
            (vec![of(1, 3, 0, &[0; 4])], Some(Code::Protocol)),
            (vec![of(1, 8, 0, &[0; 4])], Some(Code::Protocol)),
            (vec![of(1, 9, 4, &[0x82])], Some(Code::Protocol)),
            (vec![of(1, 5, 4, &[0x82])], Some(Code::Protocol)),
            (vec![of(1, 1, 1, &[0x82]), of(1, 0, 0, b"x")], Some(Code::Protocol)),
            (vec![of(1, 1, 1, &[0x82]), of(3, 9, 4, b"x")], Some(Code::Protocol)),
            (vec![begun(), of(1, 2, 0, &[0; 4])], Some(Code::FrameSize)),
            (vec![begun(), of(1, 3, 0, &[0; 3])], Some(Code::FrameSize)),
            (vec![of(0, 4, 0, &[0; 5])], Some(Code::FrameSize)),
            (vec![of(0, 4, 1, &[0; 6])], Some(Code::FrameSize)),
            (vec![of(0, 6, 0, &[0; 6])], Some(Code::FrameSize)),
            (vec![of(0, 8, 0, &[0; 3])], Some(Code::FrameSize)),
            (vec![of(0, 4, 0, &[0, 4, 0x80, 0, 0, 0])], Some(Code::FlowControl)),
            (vec![of(1, 1, 5, &[0x40])], Some(Code::Compression)),
            (vec![of(1, 1, 5, &[0xc6])], Some(Code::Compression)),
            (vec![begun(), of(1, 1, 5, &[0x82])], Some(Code::Protocol)),
            (vec![of(1, 1, 13, &[9, 0x82, 0, 0])], Some(Code::Protocol)),
            (vec![of(1, 1, 45, &[2, 0, 0, 0, 0, 1, 0x82, 0x40, 0x40])], None),
            (vec![of(1, 1, 1, &[0x40]), of(1, 9, 0, &[]), of(1, 9, 4, &[1, b'x', 1, b'y'])], None),
            (vec![over(), of(1, 0, 1, b"x")], Some(Code::StreamClosed)),
            (vec![over(), over()], Some(Code::StreamClosed)),
            (vec![begun(), of(1, 3, 0, &[0; 4]), of(1, 0, 1, b"x")], Some(Code::StreamClosed)),
            (vec![begun(), of(1, 0, 1, b"x"), of(1, 0, 1, b"x")], Some(Code::StreamClosed)),
        ] {
            let bytes = frames_sent.concat();
            for step in [1, 4, 1_000] {
                let mut frames = frames();
                let read = bytes.chunks(step).try_for_each(|part| frames.feed(part, 0.0));
                assert_eq!(read.err().map(|(_, code)| code), expected, "{bytes:?}");
            }
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
            (vec![0x8f], false),
            (vec![0], true),
        ] {
            frames.feed(&bytes, 0.0).unwrap();
            assert_eq!(frames.is_inside(), inside);
        }
        assert_eq!(frames.farewell(Code::FrameSize), [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 6]);
    }

    #[test]
    fn what_is_sent_has_its_places() {
        let goaway = of(0, 7, 0, &[0, 0, 0, 0, 0, 0, 0, 1]);
        let mut sent = Sent::default();
        assert_eq!((sent.feed(&of(1, 0, 0, b"body")), sent.is_between()), ((1, None), true));
        assert_eq!((sent.feed(&[of(1, 0, 0, b"b"), goaway.clone()].concat()), sent.is_between()), ((1, Some(23)), true));
        assert_eq!((sent.feed(&of(0, 7, 0, &[0; 8])), sent.is_between()), ((0, None), true));
        assert_eq!((sent.feed(&goaway[..5]), sent.is_between()), ((0, None), false));
        assert_eq!((sent.feed(&goaway[5..]), sent.is_between()), ((0, Some(8)), true));
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
