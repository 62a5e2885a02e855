//! The shape of packed headers (RFC 7541): whether they can be unpacked, without doing it. The engine does it, but calls
//! every fault by one name.

/// Entries that everybody knows (RFC 7541, appendix A), and how many of them, the first, are pseudo-headers.
const STATIC: u64 = 61;
const PSEUDO: u64 = 14;
/// The most that a table may hold: the default, which the engine leaves as it is.
const TABLE: u64 = 4_096;

/// What a block of headers is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shape {
    /// Headers that it adds to the table.
    pub added: u64,
    /// There is a name with a colon in it.
    pub pseudo: bool,
}

/// A string as it is packed.
struct Packed<'a> {
    huffman: bool,
    bytes: &'a [u8],
}

/// Reads a block of somebody who has added `known` headers before. `None`: it cannot be unpacked.
pub fn shape(block: &[u8], known: u64) -> Option<Shape> {
    let mut shape = Shape::default();
    walk(block, known, |field| match field {
        Field::Name(name) => shape.pseudo |= name <= PSEUDO,
        Field::Added => shape.added += 1,
        // 1011100 is a colon.
        Field::Text(Packed { huffman, bytes }, true) => {
            shape.pseudo |= bytes.first().is_some_and(|first| if huffman { first >> 1 == 0x5c } else { *first == b':' });
        }
        Field::Text(_, false) => {}
    })?;
    Some(shape)
}

/// Are all strings of a block packed as they may be?
pub fn strings_unpack(block: &[u8]) -> bool {
    let mut good = true;
    let read = walk(block, u64::MAX / 2, |field| {
        if let Field::Text(Packed { huffman: true, bytes }, _) = field {
            let mut text = Vec::new();
            let padded = httlib_huffman::decode(bytes, &mut text, httlib_huffman::DecoderSpeed::FourBits).is_ok();
            // Packed again it is the same: no more padding than there has to be, and of ones (RFC 7541, section 5.2).
            let mut again = Vec::new();
            good &= padded && httlib_huffman::encode(&text, &mut again).is_ok() && again == bytes;
        }
    });
    read.is_some() && good
}

enum Field<'a> {
    /// A name by its place.
    Name(u64),
    /// A string; is it a name?
    Text(Packed<'a>, bool),
    /// It is added to the table.
    Added,
}

fn walk<'a>(mut rest: &'a [u8], mut known: u64, mut tell: impl FnMut(Field<'a>)) -> Option<()> {
    let mut begins = true;
    while let Some(first) = rest.first().copied() {
        let (place, added) = match first {
            0x80.. => (number(&mut rest, 7)?, None),
            0x40.. => (number(&mut rest, 6)?, Some(true)),
            0x20.. => {
                if !begins || number(&mut rest, 5)? > TABLE {
                    return None;
                }
                continue;
            }
            _ => (number(&mut rest, 4)?, Some(false)),
        };
        begins = false;
        if place > STATIC.saturating_add(known) || (place == 0 && added.is_none()) {
            return None;
        }
        if place > 0 {
            tell(Field::Name(place));
        }
        let Some(added) = added else { continue };
        if place == 0 {
            tell(Field::Text(text(&mut rest)?, true));
        }
        tell(Field::Text(text(&mut rest)?, false));
        if added {
            known = known.saturating_add(1);
            tell(Field::Added);
        }
    }
    Some(())
}

/// RFC 7541, section 5.1.
fn number(rest: &mut &[u8], bits: u32) -> Option<u64> {
    let (first, mut behind) = rest.split_first()?;
    let most = (1u64 << bits) - 1;
    let mut value = u64::from(*first) & most;
    let mut shift = 0;
    if value == most {
        loop {
            let (next, after) = behind.split_first()?;
            behind = after;
            value = value.checked_add(u64::from(next & 0x7f).checked_shl(shift)?)?;
            shift += 7;
            if next & 0x80 == 0 {
                break;
            }
            if shift > 28 {
                return None;
            }
        }
    }
    *rest = behind;
    Some(value)
}

/// RFC 7541, section 5.2.
fn text<'a>(rest: &mut &'a [u8]) -> Option<Packed<'a>> {
    let huffman = rest.first()? & 0x80 != 0;
    let length = usize::try_from(number(rest, 7)?).ok()?;
    let (bytes, behind) = rest.split_at_checked(length)?;
    *rest = behind;
    Some(Packed { huffman, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn blocks() {
        let shape_of = |added, pseudo| Some(Shape { added, pseudo });
        for (block, known, expected) in [
            (&b""[..], 0, shape_of(0, false)),
            (&[0x82, 0x86, 0x84], 0, shape_of(0, true)),
            (b"\x41\x01a", 0, shape_of(1, true)),
            (b"\x40\x01x\x01y\xbe", 0, shape_of(1, false)),
            (b"\xbe", 0, None),
            (b"\xbe", 1, shape_of(0, false)),
            (b"\x00\x02:x\x01y", 0, shape_of(0, true)),
            (b"\x10\x01x\x01y", 0, shape_of(0, false)),
            (&[0x00, 0x81, 0xb9, 0x01, b'y'], 0, shape_of(0, true)),
            (b"\x3f\xe1\x1f\x82", 0, shape_of(0, true)),
            (b"\x3f\xe2\x1f\x82", 0, None),
            (b"\x82\x20", 0, None),
            (b"\x80", 0, None),
            (b"\xc6", 0, None),
            (b"\x40", 0, None),
            (b"\x40\x05x", 0, None),
            (b"\x40\x01x", 0, None),
            (b"\x40\x01x\x05y", 0, None),
            (b"\xff", 0, None),
            (b"\xff\xff\xff\xff\xff\xff\xff", 0, None),
        ] {
            assert_eq!(shape(block, known), expected, "{block:?}");
        }
    }

    #[test]
    fn strings() {
        // "a" is 00011, and then ones.
        for (block, good) in [
            (&[0x00, 0x81, 0x1f, 0x00][..], true),
            (&[0x00, 0x01, b'a', 0x00], true),
            (&[0x00, 0x81, 0x18, 0x00], false),
            (&[0x00, 0x82, 0x1f, 0xff, 0x00], false),
            (&[0x00, 0x84, 0xff, 0xff, 0xff, 0xff, 0x00], false),
        ] {
            assert_eq!(strings_unpack(block), good, "{block:?}");
        }
    }

    proptest! {
        #[test]
        fn anything_is_an_answer(block in prop::collection::vec(any::<u8>(), 0..60), known in any::<u64>()) {
            let _ = (shape(&block, known), strings_unpack(&block));
        }
    }
}
