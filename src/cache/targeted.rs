//! Fields targeted at caches like this one (RFC 9213): dictionaries of RFC 8941, read strictly.

use http::{HeaderMap, HeaderName};

use super::fields::{Directives, FOREVER};

/// What the first of the fields `names` says that is there, valid and not empty; it takes the place of
/// `Cache-Control` and `Expires` (section 2.2).
pub fn directives(headers: &HeaderMap, names: &[HeaderName]) -> Option<(HeaderName, Directives)> {
    names.iter().find_map(|name| {
        let mut lines = headers.get_all(name).iter().peekable();
        lines.peek()?;
        let lines: Option<Vec<&str>> = lines.map(|line| line.to_str().ok()).collect();
        let members = dictionary(&lines?.join(","))?;
        (!members.is_empty()).then(|| (name.clone(), from(&members)))
    })
}

/// A bare item's value, as far as caching asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Item {
    Integer(i64),
    Text(String),
    Bool(bool),
    /// A decimal, a token, bytes or an inner list: right, but of no meaning here.
    Other,
}

fn from(members: &[(String, Item)]) -> Directives {
    let mut found = Directives::default();
    // A value of another type than the directive has makes no directive of it (section 2.1).
    let number = |item: &Item| match item {
        // Less than nothing is stale, and leaves nothing to guess (RFC 9111, section 4.2.1).
        Item::Integer(n) => Some(u64::try_from(*n).unwrap_or(0).min(FOREVER)),
        Item::Text(_) | Item::Bool(_) | Item::Other => None,
    };
    for (name, item) in members {
        let on = *item == Item::Bool(true);
        let names: Vec<HeaderName> = match item {
            Item::Text(text) => text.split(',').filter_map(|name| name.trim().parse().ok()).collect(),
            Item::Integer(_) | Item::Bool(_) | Item::Other => Vec::new(),
        };
        // Names of fields that are none mean all of it.
        let on = on || (matches!(item, Item::Text(_)) && names.is_empty());
        match name.as_str() {
            "max-age" => found.max_age = number(item),
            "s-maxage" => found.s_maxage = number(item),
            "stale-while-revalidate" => found.stale_while_revalidate = number(item),
            "stale-if-error" => found.stale_if_error = number(item),
            "no-store" => found.no_store = on,
            "no-cache" => found.no_cache = on,
            "private" => found.private = on,
            "public" => found.public = on,
            "must-revalidate" => found.must_revalidate = on,
            "proxy-revalidate" => found.proxy_revalidate = on,
            "must-understand" => found.must_understand = on,
            _ => {}
        }
        if matches!(name.as_str(), "no-cache" | "private") {
            found.unstored.extend(names);
        }
    }
    found
}

/// Parses a dictionary (RFC 8941, section 4.2.2); `None` if any of it is wrong. The last of a key's values counts.
fn dictionary(text: &str) -> Option<Vec<(String, Item)>> {
    let mut parser = Parser { rest: text.trim_matches(' ') };
    let mut members: Vec<(String, Item)> = Vec::new();
    while !parser.rest.is_empty() {
        let key = parser.key()?;
        let item = if parser.take('=') { parser.item_or_inner_list()? } else { Item::Bool(true) };
        parser.parameters()?;
        members.retain(|(known, _)| *known != key);
        members.push((key, item));
        parser.skip_blanks();
        if parser.rest.is_empty() {
            break;
        }
        if !parser.take(',') {
            return None;
        }
        parser.skip_blanks();
        // A comma at the end is wrong.
        if parser.rest.is_empty() {
            return None;
        }
    }
    Some(members)
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn take(&mut self, wanted: char) -> bool {
        let stripped = self.rest.strip_prefix(wanted);
        self.rest = stripped.unwrap_or(self.rest);
        stripped.is_some()
    }

    fn skip_blanks(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
    }

    /// The characters at the front for which `fits` is true.
    fn run(&mut self, fits: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !fits(c)).unwrap_or(self.rest.len());
        let (run, rest) = self.rest.split_at_checked(end).unwrap_or((self.rest, ""));
        self.rest = rest;
        run
    }

    fn key(&mut self) -> Option<String> {
        if !self.rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '*') {
            return None;
        }
        let key = self.run(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-' | '.' | '*'));
        Some(key.to_owned())
    }

    fn parameters(&mut self) -> Option<()> {
        while self.take(';') {
            self.rest = self.rest.trim_start_matches(' ');
            self.key()?;
            if self.take('=') {
                self.item()?;
            }
        }
        Some(())
    }

    fn item_or_inner_list(&mut self) -> Option<Item> {
        if !self.take('(') {
            return self.item();
        }
        loop {
            self.rest = self.rest.trim_start_matches(' ');
            if self.take(')') {
                return Some(Item::Other);
            }
            self.item()?;
            self.parameters()?;
            if !self.rest.starts_with([' ', ')']) {
                return None;
            }
        }
    }

    fn item(&mut self) -> Option<Item> {
        let first = self.rest.chars().next()?;
        match first {
            '-' | '0'..='9' => {
                let negative = self.take('-');
                let digits = self.run(|c| c.is_ascii_digit() || c == '.');
                let mut parts = digits.split('.');
                let (whole, fraction, more) = (parts.next()?, parts.next(), parts.next());
                let fits = match fraction {
                    Some(fraction) => (1..=3).contains(&fraction.len()) && (1..=12).contains(&whole.len()),
                    None => (1..=15).contains(&whole.len()),
                };
                let number: i64 = whole.parse().ok().filter(|_| fits && more.is_none())?;
                Some(if fraction.is_some() { Item::Other } else { Item::Integer(if negative { -number } else { number }) })
            }
            '"' => {
                self.take('"');
                let mut text = String::new();
                loop {
                    let plain = self.run(|c| matches!(c, ' '..='~') && c != '"' && c != '\\');
                    text.push_str(plain);
                    if self.take('"') {
                        return Some(Item::Text(text));
                    }
                    if !self.take('\\') {
                        return None;
                    }
                    let escaped = ['"', '\\'].into_iter().find(|c| self.take(*c))?;
                    text.push(escaped);
                }
            }
            ':' => {
                self.take(':');
                self.run(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '='));
                self.take(':').then_some(Item::Other)
            }
            '?' => {
                self.take('?');
                match (self.take('1'), self.take('0')) {
                    (true, _) => Some(Item::Bool(true)),
                    (_, true) => Some(Item::Bool(false)),
                    (false, false) => None,
                }
            }
            c if c.is_ascii_alphabetic() || c == '*' => {
                self.run(|c| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~:/".contains(c));
                Some(Item::Other)
            }
            _ => None,
        }
    }
}
