//! A stored response as a file: two places for its head, its body, and at last the checksums that say it is whole.
//!
//! ```text
//!  "PTLNOBJ2" | slot size | born | head A | head B | body … | CRC of each 256 KiB | body length | CRC | "PTLNEND1"
//! ```
//!
//! `born` tells bodies apart: a head belongs to the one that was made when it was.
//! A new head goes to the place of the older one, so that a torn one leaves the other. What is not whole has no
//! end, or one that does not fit: whoever opens it finds nothing.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use pingora::cache::CacheMeta;
use rustix::io::{ReadWriteFlags, preadv2};

use super::object::{Head, Noted};

const MAGIC: &[u8; 8] = b"PTLNOBJ2";
const END: &[u8; 8] = b"PTLNEND1";
/// Magic, the size of a slot, and when the body was made.
const PREFIX: u64 = 24;
/// Sequence number, length and checksum of a head.
const SLOT_PREFIX: usize = 16;
/// Body length, checksum and magic.
const TRAILER: u64 = 20;
/// A checksum is for this much of a body.
pub const CHUNK: u64 = 256 << 10;
/// Heads are never so long: who says so is no file of ours.
const LONGEST_HEAD: u64 = 4 << 20;

/// What is wrong with a file.
pub type Broken = io::Error;

fn broken(what: &str) -> Broken {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A file that is being written.
#[derive(Debug)]
pub struct Writing {
    file: File,
    start: u64,
    len: u64,
    checksums: Vec<u32>,
    running: crc32fast::Hasher,
}

impl Writing {
    /// Begins a file with its head.
    pub fn begin(path: &Path, head: &Head) -> io::Result<Self> {
        let payload = encode(head).map_err(|e| io::Error::other(e.to_string()))?;
        // Room for a head that grows a little when it is refreshed.
        let slot = (payload.len() + payload.len() / 4 + 256).next_multiple_of(512) as u64;
        let mut file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(path)?;
        let mut begin = Vec::with_capacity(PREFIX as usize + slot as usize * 2);
        begin.extend_from_slice(MAGIC);
        begin.extend_from_slice(&slot.to_be_bytes());
        begin.extend_from_slice(&head.born().to_be_bytes());
        begin.extend_from_slice(&slot_of(1, &payload));
        begin.resize((PREFIX + slot * 2) as usize, 0);
        file.write_all(&begin)?;
        let running = crc32fast::Hasher::new();
        Ok(Self { file, start: PREFIX + slot * 2, len: 0, checksums: Vec::new(), running })
    }

    /// Appends to the body.
    pub fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        while !bytes.is_empty() {
            let left = CHUNK - self.len % CHUNK;
            let take = bytes.len().min(left as usize);
            let (now, later) = bytes.split_at_checked(take).unwrap_or((bytes, b""));
            self.running.update(now);
            self.len += now.len() as u64;
            if self.len.is_multiple_of(CHUNK) {
                self.checksums.push(std::mem::take(&mut self.running).finalize());
            }
            bytes = later;
        }
        Ok(())
    }

    /// Ends it; how many bytes the file has.
    pub fn end(&mut self) -> io::Result<u64> {
        if !self.len.is_multiple_of(CHUNK) {
            self.checksums.push(std::mem::take(&mut self.running).finalize());
        }
        let mut end: Vec<u8> = self.checksums.iter().flat_map(|crc| crc.to_be_bytes()).collect();
        end.extend_from_slice(&self.len.to_be_bytes());
        let crc = crc32fast::hash(&end);
        end.extend_from_slice(&crc.to_be_bytes());
        end.extend_from_slice(END);
        self.file.write_all(&end)?;
        Ok(self.start + self.len + end.len() as u64)
    }

    /// Another hold on the file, to read what was written.
    pub fn reader(&self) -> io::Result<(File, u64)> {
        Ok((self.file.try_clone()?, self.start))
    }
}

/// A whole file.
#[derive(Debug)]
pub struct Stored {
    file: File,
    start: u64,
    /// Bytes of the body.
    pub len: u64,
    checksums: Box<[u32]>,
}

impl Stored {
    /// Opens a file: its head, and what reads its body.
    pub fn open(path: &Path) -> Result<(Head, Self), Broken> {
        let stored = Self::read(File::open(path)?)?;
        Ok((decode(&newest(&stored.file)?.payload)?, stored))
    }

    /// The same where the head is known. A file with another's body counts as none.
    pub fn body_of(path: &Path, born: u64) -> Result<Self, Broken> {
        let file = File::open(path)?;
        match prefix(&file)?.born == born {
            true => Self::read(file),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn read(file: File) -> Result<Self, Broken> {
        let size = file.metadata()?.len();
        let start = PREFIX + prefix(&file)?.slot * 2;
        let fixed = read(&file, size.checked_sub(TRAILER).ok_or_else(|| broken("it is too short"))?, TRAILER as usize)?;
        let mut fixed = Reader(&fixed);
        let (len, crc, end) = (fixed.u64()?, fixed.u32()?, fixed.take(8)?);
        if end != END {
            return Err(broken("it has no end"));
        }
        let chunks = len.div_ceil(CHUNK);
        let whole = chunks.checked_mul(4).and_then(|n| n.checked_add(start)?.checked_add(len)?.checked_add(TRAILER));
        if whole != Some(size) {
            return Err(broken("its length does not fit"));
        }
        let mut table = read(&file, start + len, chunks as usize * 4)?;
        let checksums: Box<[u32]> =
            table.chunks_exact(4).filter_map(|four| four.try_into().ok().map(u32::from_be_bytes)).collect();
        table.extend_from_slice(&len.to_be_bytes());
        if crc32fast::hash(&table) != crc {
            return Err(broken("its end does not fit"));
        }
        Ok(Self { file, start, len, checksums })
    }

    /// The chunk of the body in which `at` is, and where it begins. Checked.
    pub fn chunk(&self, at: u64) -> Result<(u64, Bytes), Broken> {
        let begin = at / CHUNK * CHUNK;
        self.checked(begin, read(&self.file, self.start + begin, self.length_of(begin))?)
    }

    /// The same without waiting for the disk: `None` if it is not in the page cache.
    pub fn chunk_at_hand(&self, at: u64) -> Option<Result<(u64, Bytes), Broken>> {
        let begin = at / CHUNK * CHUNK;
        let mut bytes = vec![0; self.length_of(begin)];
        let mut all = [io::IoSliceMut::new(&mut bytes)];
        let read = preadv2(&self.file, &mut all, self.start + begin, ReadWriteFlags::NOWAIT);
        (read == Ok(bytes.len())).then(|| self.checked(begin, bytes))
    }

    fn length_of(&self, begin: u64) -> usize {
        CHUNK.min(self.len.saturating_sub(begin)) as usize
    }

    fn checked(&self, begin: u64, bytes: Vec<u8>) -> Result<(u64, Bytes), Broken> {
        let nth = begin / CHUNK;
        let expected = usize::try_from(nth).ok().and_then(|nth| self.checksums.get(nth));
        match expected {
            Some(crc) if *crc == crc32fast::hash(&bytes) => Ok((begin, bytes.into())),
            _ => Err(broken("a part of its body does not fit")),
        }
    }

    /// The whole body.
    pub fn body(&self) -> Result<Box<[Bytes]>, Broken> {
        (0..self.checksums.len() as u64).map(|nth| self.chunk(nth * CHUNK).map(|(_, bytes)| bytes)).collect()
    }
}

/// When the body in a file was made, if there is one.
pub fn born(path: &Path) -> Option<u64> {
    Some(prefix(&File::open(path).ok()?).ok()?.born)
}

/// Writes a newer head over the older of the two that a file has; false if it does not fit, or is of another body.
pub fn refresh(path: &Path, head: &Head) -> io::Result<bool> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    if prefix(&file)?.born != head.born() {
        return Ok(false);
    }
    let Newest { slot, payload: _, sequence, place } = newest(&file)?;
    let payload = encode(head).map_err(|e| io::Error::other(e.to_string()))?;
    if (payload.len() + SLOT_PREFIX) as u64 > slot {
        return Ok(false);
    }
    file.write_all_at(&slot_of(sequence + 1, &payload), PREFIX + (1 - place) * slot)?;
    Ok(true)
}

/// Is it a file of ours, by the look of it? Its body is not read.
pub fn looks_whole(path: &Path) -> bool {
    let end = || -> io::Result<bool> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        Ok(read(&file, size.saturating_sub(8), 8)? == END && read(&file, 0, 8)? == MAGIC)
    };
    end().unwrap_or(false)
}

/// How a file begins.
struct Prefix {
    /// How long each of the two places for a head is.
    slot: u64,
    /// When the body was made.
    born: u64,
}

fn prefix(file: &File) -> Result<Prefix, Broken> {
    let prefix = read(file, 0, PREFIX as usize)?;
    let mut prefix = Reader(&prefix);
    if prefix.take(8)? != MAGIC {
        return Err(broken("it is no object"));
    }
    let (slot, born) = (prefix.u64()?, prefix.u64()?);
    if slot > LONGEST_HEAD {
        return Err(broken("its head is too long"));
    }
    Ok(Prefix { slot, born })
}

/// The newest head of a file.
struct Newest {
    /// How long each place is.
    slot: u64,
    payload: Vec<u8>,
    sequence: u64,
    /// In which of the two it is.
    place: u64,
}

/// Finds it.
fn newest(file: &File) -> Result<Newest, Broken> {
    let Prefix { slot, born: _ } = prefix(file)?;
    let found = (0..2u64).filter_map(|place| {
        let bytes = read(file, PREFIX + place * slot, slot as usize).ok()?;
        let mut reader = Reader(&bytes);
        let (sequence, len, crc) = (reader.u64().ok()?, reader.u32().ok()?, reader.u32().ok()?);
        let payload = reader.take(len as usize).ok()?;
        let fits = sequence > 0 && checksum(sequence, payload) == crc;
        fits.then(|| Newest { slot, payload: payload.to_vec(), sequence, place })
    });
    found.max_by_key(|head| head.sequence).ok_or_else(|| broken("neither of its heads fits"))
}

fn checksum(sequence: u64, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&sequence.to_be_bytes());
    hasher.update(payload);
    hasher.finalize()
}

fn slot_of(sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut slot = Vec::with_capacity(payload.len() + SLOT_PREFIX);
    slot.extend_from_slice(&sequence.to_be_bytes());
    slot.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    slot.extend_from_slice(&checksum(sequence, payload).to_be_bytes());
    slot.extend_from_slice(payload);
    slot
}

fn encode(head: &Head) -> pingora::Result<Vec<u8>> {
    let (internal, header) = head.meta()?.serialize()?;
    let mut all = Vec::with_capacity(internal.len() + header.len() + head.primary.len() + 64);
    all.extend_from_slice(&head.noted.asked.to_be_bytes());
    for part in [&*head.primary, head.noted.tags.as_bytes(), &internal, &header] {
        all.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
        all.extend_from_slice(part);
    }
    Ok(all)
}

fn decode(payload: &[u8]) -> Result<Head, Broken> {
    let mut reader = Reader(payload);
    let asked = reader.u64()?;
    let (primary, tags, internal, header) = (reader.part()?, reader.part()?, reader.part()?, reader.part()?);
    let meta = CacheMeta::deserialize(internal, header).map_err(|e| broken(&e.to_string()))?;
    let tags = std::str::from_utf8(tags).map_err(|_| broken("its tags are no text"))?;
    Head::read(primary, Noted { asked, tags: tags.into() }, &meta).map_err(|e| broken(&e.to_string()))
}

fn read(file: &File, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Broken> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(|| broken("it is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, Broken> {
        Ok(self.take(4)?.try_into().map_or(0, u32::from_be_bytes))
    }

    fn u64(&mut self) -> Result<u64, Broken> {
        Ok(self.take(8)?.try_into().map_or(0, u64::from_be_bytes))
    }

    fn part(&mut self) -> Result<&'a [u8], Broken> {
        let len = self.u32()?;
        self.take(len as usize)
    }
}
