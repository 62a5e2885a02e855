//! Wildcards and regular expressions.

use regex_automata::Input;
use regex_automata::meta::Regex as Meta;
use regex_automata::util::{captures::Captures, syntax};

/// Bytes that a regular expression's lazy automaton may keep, each time it runs on another thread.
const CACHE: usize = 256 << 10;

/// A regular expression of linear time; bytes, without Unicode classes unless `(?u)` asks for them.
#[derive(Debug, Clone)]
pub struct Regex(Meta);

impl Regex {
    /// Compiles. The error says what is wrong, or that it is larger than `limit` bytes.
    pub fn new(pattern: &str, limit: usize) -> Result<Self, String> {
        let config = Meta::config().nfa_size_limit(Some(limit)).hybrid_cache_capacity(CACHE);
        let syntax = syntax::Config::new().unicode(false).utf8(false).nest_limit(64);
        let built = Meta::builder().configure(config).syntax(syntax).build(pattern);
        built.map(Self).map_err(|error| match (error.size_limit(), error.syntax_error()) {
            (Some(limit), _) => format!("it is larger than {limit} bytes once compiled"),
            // The last line of its drawing is the reason.
            (None, Some(error)) => {
                let text = error.to_string();
                let last = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or_default();
                last.trim_start_matches("error: ").to_owned()
            }
            (None, None) => error.to_string(),
        })
    }

    /// Does it match anywhere?
    pub fn matches(&self, text: &[u8]) -> bool {
        self.0.is_match(text)
    }

    /// `text` with the first match replaced; nothing if there is none.
    pub fn replace(&self, text: &[u8], replacement: &Replacement) -> Option<Vec<u8>> {
        let mut captures: Captures = self.0.create_captures();
        self.0.captures(Input::new(text), &mut captures);
        let whole = captures.get_match()?;
        let group = |n: usize| captures.get_group(n).and_then(|span| text.get(span.range())).unwrap_or_default();
        let mut result = text.get(..whole.start())?.to_vec();
        replacement.write(&mut result, group);
        result.extend_from_slice(text.get(whole.end()..)?);
        Some(result)
    }
}

/// A text with `${1}` to `${8}` in it; `$$` is a dollar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(Vec<u8>),
    Group(usize),
}

impl Replacement {
    /// Parses it. What is no reference stays as it is.
    pub fn new(text: &[u8]) -> Self {
        let mut pieces = Vec::new();
        let mut plain = Vec::new();
        let mut rest = text;
        while let [first, tail @ ..] = rest {
            rest = match tail {
                [b'{', digit @ b'1'..=b'8', b'}', after @ ..] if *first == b'$' => {
                    pieces.push(Piece::Text(std::mem::take(&mut plain)));
                    pieces.push(Piece::Group(usize::from(digit - b'0')));
                    after
                }
                [b'$', after @ ..] if *first == b'$' => {
                    plain.push(b'$');
                    after
                }
                _ => {
                    plain.push(*first);
                    tail
                }
            };
        }
        pieces.push(Piece::Text(plain));
        Self(pieces)
    }

    fn write<'t>(&self, to: &mut Vec<u8>, group: impl Fn(usize) -> &'t [u8]) {
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => to.extend_from_slice(text),
                Piece::Group(n) => to.extend_from_slice(group(*n)),
            }
        }
    }
}

/// A pattern with `*` for any bytes; it has to match the whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wildcard {
    /// What stands between the stars: one more than there are stars.
    parts: Vec<Vec<u8>>,
    strict: bool,
}

/// More stars than this are refused: each may scan the text once more.
const STARS: usize = 16;

impl Wildcard {
    /// Parses it: `\*` is a star and `\\` a backslash. Not `strict`: case does not matter (ASCII).
    pub fn new(pattern: &[u8], strict: bool) -> Result<Self, &'static str> {
        let mut parts = vec![Vec::new()];
        let mut bytes = pattern.iter().copied().peekable();
        while let Some(byte) = bytes.next() {
            let byte = match byte {
                b'*' if bytes.peek() == Some(&b'*') => return Err("`**` is no wildcard"),
                b'*' if parts.len() > STARS => return Err("more than 16 `*`"),
                b'*' => {
                    parts.push(Vec::new());
                    continue;
                }
                b'\\' => match bytes.next() {
                    Some(escaped @ (b'*' | b'\\')) => escaped,
                    _ => return Err("a backslash stands before `*` or another backslash only"),
                },
                other => other,
            };
            if let Some(part) = parts.last_mut() {
                part.push(if strict { byte } else { byte.to_ascii_lowercase() });
            }
        }
        Ok(Self { parts, strict })
    }

    /// Does it match the whole of `text`?
    pub fn matches(&self, text: &[u8]) -> bool {
        self.stars(text, |_, _| ())
    }

    /// Calls `star` with what each `*` stands for, as short as can be. Does it match?
    fn stars(&self, text: &[u8], mut star: impl FnMut(usize, &[u8])) -> bool {
        let Some((first, rest)) = self.parts.split_first() else { return false };
        let Some((last, middle)) = rest.split_last() else { return self.same(text, first) };
        let fits = text.len() >= first.len() + last.len();
        let (Some(head), Some(tail)) =
            (text.get(..first.len()), text.len().checked_sub(last.len()).and_then(|at| text.get(at..)))
        else {
            return false;
        };
        if !fits || !self.same(head, first) || !self.same(tail, last) {
            return false;
        }
        let mut between = text.get(first.len()..text.len() - last.len()).unwrap_or_default();
        for (n, part) in middle.iter().enumerate() {
            let Some(at) = self.find(between, part) else { return false };
            star(n, between.get(..at).unwrap_or_default());
            between = between.get(at + part.len()..).unwrap_or_default();
        }
        star(middle.len(), between);
        true
    }

    /// `text` replaced as a whole, if it matches.
    pub fn replace(&self, text: &[u8], replacement: &Replacement) -> Option<Vec<u8>> {
        let mut groups: Vec<Vec<u8>> = Vec::new();
        if !self.stars(text, |_, found| groups.push(found.to_vec())) {
            return None;
        }
        let mut result = Vec::new();
        replacement.write(&mut result, |n| n.checked_sub(1).and_then(|n| groups.get(n)).map_or(&[][..], Vec::as_slice));
        Some(result)
    }

    fn same(&self, text: &[u8], part: &[u8]) -> bool {
        match self.strict {
            true => text == part,
            false => text.eq_ignore_ascii_case(part),
        }
    }

    fn find(&self, text: &[u8], part: &[u8]) -> Option<usize> {
        if self.strict {
            return memchr::memmem::find(text, part);
        }
        match part.first() {
            None => Some(0),
            Some(_) => text.windows(part.len()).position(|window| window.eq_ignore_ascii_case(part)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards() {
        for (pattern, text, matches) in [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a*b*c", "a--B--c", true),
            ("a*b*c", "a--c--b", false),
            ("ab*ba", "aba", false),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("/API/*/Profile", "/api/7/profile", true),
        ] {
            assert_eq!(Wildcard::new(pattern.as_bytes(), false).unwrap().matches(text.as_bytes()), matches, "{pattern} {text}");
        }
        assert!(!Wildcard::new(b"/API/*", true).unwrap().matches(b"/api/x"));
        for wrong in ["**", "a\\b", "a\\", &"*a".repeat(17)] {
            assert!(Wildcard::new(wrong.as_bytes(), false).is_err(), "{wrong}");
        }
        let wildcard = Wildcard::new(b"https://*.example.com/*", false).unwrap();
        let to = Replacement::new(b"/${1}/${2}$${3}$x");
        assert_eq!(wildcard.replace(b"https://a.Example.com/b/c", &to).unwrap(), b"/a/b/c${3}$x");
    }

    #[test]
    fn regexes() {
        let regex = Regex::new("^/(a+)(b)?", 1 << 20).unwrap();
        assert_eq!(regex.replace(b"/aac", &Replacement::new(b"<${1}|${2}>")).unwrap(), b"<aa|>c");
        assert!(Regex::new("a{1000}{1000}", 10 << 20).unwrap_err().contains("larger"));
        assert!(Regex::new("(?=a)", 1 << 20).unwrap_err().contains("look-around"));
        assert!(Regex::new("(?-u)\\xff", 1 << 20).unwrap().matches(b"\xff"));
    }
}
