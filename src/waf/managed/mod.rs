//! The managed ruleset: signatures of attacks, and libinjection for SQL and HTML.
//!
//! Everything that a request brings is cut into inputs ([`inputs`]). One automaton finds every word of every
//! signature in one pass; only what it finds is confirmed by the signature's pattern. libinjection reads the
//! inputs that an application could put into a query or a page.

mod inputs;
mod json;
mod signatures;
mod signatures_more;

use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};

pub use crate::config::waf::Sensitivity;
use crate::rules::View;
use inputs::{Input, inputs};

/// What kind of attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Category {
    /// Files outside their folder.
    Traversal,
    /// Code and commands.
    Rce,
    /// Templates.
    Ssti,
    /// Lookups of Log4j.
    Log4shell,
    /// Tools that look for holes.
    Scanner,
    /// SQL.
    Sqli,
    /// Scripts in pages.
    Xss,
    /// Requests to inner addresses.
    Ssrf,
    /// Headers and line ends.
    Protocol,
    /// Programs that are uploaded.
    Upload,
    /// External XML entities.
    Xxe,
    /// Operators of document databases.
    Nosql,
}

impl Category {
    /// Every category, as bits.
    pub const ALL: u16 = 0xfff;

    /// Its bit.
    pub fn bit(self) -> u16 {
        1 << self as u16
    }
}

/// Parts of a request that a signature is looked for in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Targets(u8);

impl Targets {
    /// The path.
    pub const PATH: Self = Self(1);
    /// Arguments, names and values.
    pub const QUERY: Self = Self(2);
    /// Cookies.
    pub const COOKIE: Self = Self(4);
    /// The body: fields of forms and JSON, parts and file names, or all of it.
    pub const BODY: Self = Self(8);
    /// `User-Agent`.
    pub const AGENT: Self = Self(16);
    /// `Referer`.
    pub const REFERER: Self = Self(32);
    /// Any other header.
    pub const HEADER: Self = Self(64);
    /// All of it.
    pub const ALL: Self = Self(127);

    /// These and `other`.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Is one of `other` among these?
    pub fn any(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// A signature: words that make an input suspicious, and a pattern that settles it.
#[derive(Debug, Clone, Copy)]
pub struct Signature {
    /// Its name.
    pub id: &'static str,
    /// What kind of attack it is.
    pub category: Category,
    /// From which sensitivity on it is asked.
    pub level: Sensitivity,
    /// What it tells, in a sentence.
    pub reason: &'static str,
    /// Where it is looked for.
    pub targets: Targets,
    /// Words, in lower case; one has to be there.
    pub words: &'static [&'static str],
    /// What has to match then.
    pub confirm: Option<&'static str>,
}

/// What libinjection decides, as signatures without words.
///
/// libinjection takes some prose, search syntax and arithmetic for SQL; an attack that ends a string or hides the
/// rest of a statement has quotes or comments, and those are asked for at the lowest level.
const LIBINJECTION: [Signature; 4] = [
    Signature {
        id: SQLI,
        category: Category::Sqli,
        level: Sensitivity::Low,
        reason: "A value breaks out of a string of an SQL statement, as libinjection reads it (CWE-89)",
        targets: Targets::QUERY.and(Targets::COOKIE).and(Targets::BODY),
        words: &[],
        confirm: None,
    },
    Signature {
        id: SQLI_ANY,
        category: Category::Sqli,
        level: Sensitivity::Medium,
        reason: "A value is a part of an SQL statement, as libinjection reads it (CWE-89)",
        targets: Targets::QUERY.and(Targets::COOKIE).and(Targets::BODY),
        words: &[],
        confirm: None,
    },
    Signature {
        id: XSS,
        category: Category::Xss,
        level: Sensitivity::Low,
        reason: "An argument or cookie brings a script into a page, as libinjection reads it (CWE-79)",
        targets: Targets::QUERY.and(Targets::COOKIE),
        words: &[],
        confirm: None,
    },
    Signature {
        id: XSS_BODY,
        category: Category::Xss,
        level: Sensitivity::Medium,
        reason: "A field of the body brings a script into a page, as libinjection reads it (CWE-79)",
        targets: Targets::BODY,
        words: &[],
        confirm: None,
    },
];

const SQLI: &str = "sqli-libinjection";
const SQLI_ANY: &str = "sqli-libinjection-any";
const XSS: &str = "xss-libinjection";
const XSS_BODY: &str = "xss-libinjection-body";
/// At the lowest level a field of a body has to be this short, in bytes: what is longer is mostly prose.
const SHORT: usize = 64;

/// Every signature there is.
pub fn all() -> impl Iterator<Item = &'static Signature> {
    signatures::SIGNATURES.iter().chain(signatures_more::MORE).chain(&LIBINJECTION)
}

/// What a rule tells, in a sentence.
pub fn reason(id: &str) -> &'static str {
    all().find(|s| s.id == id).map_or("", |s| s.reason)
}

/// The ruleset as it is configured.
pub struct Managed {
    /// It only says what it would do.
    pub log_only: bool,
    rules: Box<[Active]>,
    /// All words; each belongs to the rule at its place in `owners`.
    words: AhoCorasick,
    owners: Box<[u16]>,
    /// Which of libinjection's rules are asked.
    sqli: bool,
    sqli_any: bool,
    xss: Targets,
}

struct Active {
    id: Arc<str>,
    category: Category,
    targets: Targets,
    confirm: Option<crate::rules::Regex>,
}

impl std::fmt::Debug for Managed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Managed").field("rules", &self.rules.len()).finish_non_exhaustive()
    }
}

/// What it found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The rule.
    pub rule: Arc<str>,
    /// Where: a part of the request, by its name in the language.
    pub input: &'static str,
}

/// The names of all rules that there are.
pub fn ids() -> impl Iterator<Item = &'static str> {
    all().map(|signature| signature.id)
}

impl Managed {
    /// The rules up to `sensitivity`, without those in `except`.
    pub fn new(sensitivity: Sensitivity, except: &[&str], log_only: bool) -> Result<Self, String> {
        let chosen = || all().filter(|s| s.level <= sensitivity && !except.contains(&s.id));
        let (mut rules, mut owners) = (Vec::new(), Vec::new());
        let mut words: Vec<&str> = Vec::new();
        for signature in chosen().filter(|s| !s.words.is_empty()) {
            let owner = u16::try_from(rules.len()).map_err(|_| "too many rules")?;
            words.extend(signature.words);
            owners.extend(signature.words.iter().map(|_| owner));
            let confirm = signature.confirm.map(|pattern| crate::rules::Regex::new(pattern, 10 << 20)).transpose()?;
            rules.push(Active { id: signature.id.into(), category: signature.category, targets: signature.targets, confirm });
        }
        let words = AhoCorasick::builder().match_kind(MatchKind::Standard).build(words).map_err(|e| e.to_string())?;
        let asked = |id| chosen().any(|s| s.id == id);
        let targets = |id, targets| if asked(id) { targets } else { Targets(0) };
        let xss = targets(XSS, Targets::QUERY.and(Targets::COOKIE)).and(targets(XSS_BODY, Targets::BODY));
        let (sqli, sqli_any) = (asked(SQLI), asked(SQLI_ANY));
        Ok(Self { log_only, rules: rules.into(), words, owners: owners.into(), sqli, sqli_any, xss })
    }

    /// The first rule that finds something; categories in `skipped` are left out.
    pub fn find(&self, view: &View<'_>, skipped: u16) -> Option<Found> {
        let mut found = None;
        inputs(view, &mut |input| {
            found = self.look(input, skipped).map(|rule| Found { rule, input: input.name });
            found.is_none()
        });
        found
    }

    fn look(&self, input: &Input<'_>, skipped: u16) -> Option<Arc<str>> {
        for text in [Some(&*input.lower), input.plain.as_deref()].into_iter().flatten() {
            if let Some(rule) = self.signature(text, input.target, skipped) {
                return Some(rule);
            }
        }
        // Words and numbers are neither SQL nor HTML.
        let harmless = input.text.iter().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(b));
        if harmless {
            return None;
        }
        let asked = |category: Category| skipped & category.bit() == 0;
        if asked(Category::Sqli)
            && let Some(rule) = self.sqli_rule(input)
            && sqli(&input.text)
        {
            return Some(rule.into());
        }
        let page = self.xss.any(input.target) && !input.document;
        if asked(Category::Xss) && page && libinjectionrs::detect_xss(&input.text).is_injection() {
            return Some(if input.target == Targets::BODY { XSS_BODY } else { XSS }.into());
        }
        None
    }

    /// The rule that an input is asked about, whether libinjection takes it for SQL.
    fn sqli_rule(&self, input: &Input<'_>) -> Option<&'static str> {
        let value = Targets::QUERY.and(Targets::COOKIE).and(Targets::BODY).any(input.target);
        let text: &[u8] = &input.text;
        let short = input.target != Targets::BODY || text.len() <= SHORT;
        let breaks_out = || {
            let comment = ["--", "/*", "#"].iter().any(|c| memchr::memmem::find(text, c.as_bytes()).is_some());
            comment || text.iter().any(|b| b"'\"`;".contains(b))
        };
        match (value, self.sqli, self.sqli_any) {
            (true, true, _) if short && breaks_out() => Some(SQLI),
            (true, _, true) => Some(SQLI_ANY),
            _ => None,
        }
    }

    fn signature(&self, text: &[u8], target: Targets, skipped: u16) -> Option<Arc<str>> {
        // Rules whose pattern was asked already, and said no.
        let mut settled = [0u64; 4];
        for word in self.words.find_overlapping_iter(text) {
            let Some(&owner) = self.owners.get(word.pattern().as_usize()) else { continue };
            let (slot, bit) = (settled.get_mut(usize::from(owner) / 64), 1u64 << (owner % 64));
            match slot {
                Some(slot) if *slot & bit != 0 => continue,
                Some(slot) => *slot |= bit,
                None => {}
            }
            let Some(rule) = self.rules.get(usize::from(owner)) else { continue };
            let asked = rule.targets.any(target) && skipped & rule.category.bit() == 0;
            if asked && rule.confirm.as_ref().is_none_or(|pattern| pattern.matches(text)) {
                return Some(rule.id.clone());
            }
        }
        None
    }
}

/// libinjection reads a text of SQL from its beginning, and of backticks in quadratic time: it gets a text in
/// pieces that overlap, so long as there are not too many.
fn sqli(text: &[u8]) -> bool {
    const PIECE: usize = 2_048;
    const STEP: usize = 1_792;
    const PIECES: usize = 40;
    let text = text.trim_ascii_start();
    let starts = (0..text.len()).step_by(STEP).take(PIECES);
    let piece = |start: usize| text.get(start..text.len().min(start + PIECE)).unwrap_or_default();
    starts.map(piece).any(|piece| libinjectionrs::detect_sqli(piece).is_injection())
}
