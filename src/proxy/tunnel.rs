//! WebSocket frames, as far as one has to know them to say goodbye between two of them (RFC 6455, section 5.2).

/// A close frame with status 1012, "service restart": connect again.
pub const CLOSE_RESTART: [u8; 4] = [0x88, 0x02, 0x03, 0xf4];

/// Follows the frames that an origin sends.
#[derive(Debug, Default)]
pub struct Frames {
    /// The header of the frame under way, as far as it came.
    header: smallvec::SmallVec<[u8; 14]>,
    /// Bytes of its payload that are still to come.
    payload: u64,
}

impl Frames {
    /// These bytes went to the client.
    pub fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let skip = usize::try_from(self.payload).unwrap_or(usize::MAX).min(bytes.len());
            self.payload -= skip as u64;
            bytes = bytes.get(skip..).unwrap_or_default();
            let Some((first, rest)) = bytes.split_first() else { return };
            self.header.push(*first);
            bytes = rest;
            if let Some(payload) = self.length() {
                self.payload = payload;
                self.header.clear();
            }
        }
    }

    /// The length of the payload, once the header is whole.
    fn length(&self) -> Option<u64> {
        let second = *self.header.get(1)?;
        let (extended, mask) = (
            match second & 0x7f {
                126 => 2,
                127 => 8,
                _ => 0,
            },
            if second & 0x80 == 0 { 0 } else { 4 },
        );
        if self.header.len() < 2 + extended + mask {
            return None;
        }
        let bytes = self.header.get(2..2 + extended)?;
        Some(match extended {
            0 => u64::from(second & 0x7f),
            _ => bytes.iter().fold(0, |length, byte| length << 8 | u64::from(*byte)),
        })
    }

    /// Is no frame under way?
    pub fn at_boundary(&self) -> bool {
        self.payload == 0 && self.header.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_end_where_they_end() {
        let mut long = vec![0x82, 126, 1, 0];
        long.extend([7; 256]);
        let mut longer = vec![0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0];
        longer.extend(vec![7; 65_536]);
        let masked = vec![0x81, 0x82, 1, 2, 3, 4, 5, 6];
        for frame in [vec![0x81, 0], vec![0x81, 3, 1, 2, 3], masked, CLOSE_RESTART.to_vec(), long, longer] {
            for step in [1, 2, 3, 1_000, frame.len()] {
                let mut frames = Frames::default();
                let (last, head) = frame.split_last().unwrap();
                for chunk in head.chunks(step) {
                    frames.pass(chunk);
                    assert!(!frames.at_boundary(), "{} bytes in steps of {step}", frame.len());
                }
                frames.pass(&[*last]);
                assert!(frames.at_boundary());
                // And the next one right behind it.
                frames.pass(&[0x81, 1]);
                assert!(!frames.at_boundary());
                frames.pass(&[9, 0x81, 0]);
                assert!(frames.at_boundary());
            }
        }
    }
}
