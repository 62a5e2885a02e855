//! Every key and text of a JSON document, those under a key that stands twice included: readers differ in which
//! of them they take.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

/// Calls `each` with every key and text until it says `false`. Was it a document, read to its end or to there?
pub fn walk(bytes: &[u8], each: &mut dyn FnMut(&[u8]) -> bool) -> bool {
    let mut going = true;
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let read = Walk { each, going: &mut going }.deserialize(&mut reader).is_ok() && reader.end().is_ok();
    read || !going
}

struct Walk<'w> {
    each: &'w mut dyn FnMut(&[u8]) -> bool,
    going: &'w mut bool,
}

impl Walk<'_> {
    fn inner(&mut self) -> Walk<'_> {
        Walk { each: self.each, going: self.going }
    }

    fn text<E: serde::de::Error>(&mut self, text: &str) -> Result<(), E> {
        *self.going = *self.going && (self.each)(text.as_bytes());
        // An error is the way out of a document.
        if *self.going { Ok(()) } else { Err(E::custom("enough")) }
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E: serde::de::Error>(mut self, text: &str) -> Result<(), E> {
        self.text(text)
    }
    fn visit_seq<A: SeqAccess<'de>>(mut self, mut all: A) -> Result<(), A::Error> {
        while all.next_element_seed(self.inner())?.is_some() {}
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(mut self, mut all: A) -> Result<(), A::Error> {
        while all.next_key_seed(self.inner())?.is_some() {
            all.next_value_seed(self.inner())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(json: &str, most: usize) -> (Vec<String>, bool) {
        let mut texts = Vec::new();
        let read = walk(json.as_bytes(), &mut |text| {
            texts.push(String::from_utf8_lossy(text).into_owned());
            texts.len() < most
        });
        (texts, read)
    }

    #[test]
    fn every_text_is_seen() {
        let (all, read) = texts(r#"{"a": "1", "a": ["2", {"b": null, "c": -1.5e3}], "d": true}"#, 99);
        assert_eq!((all.join(" ").as_str(), read), ("a 1 a 2 b c d", true));
        assert_eq!(texts(r#"["1", "2", "3"]"#, 2), (vec!["1".to_owned(), "2".to_owned()], true), "told to stop");
        assert!(!texts("{\"a\": \"1\"", 99).1 && !texts("[1] x", 99).1 && !texts("", 99).1);
        assert!(!texts(&"[".repeat(100_000), 99).1, "no deeper than the reader goes");
    }
}
