//! Challenges: a small toll for the browser, paid once and shown by a cookie. It prices access for programs;
//! it does not prove that somebody is human.
//!
//! ```text
//!  rule matches, no clearance ─► page with a token ─► the browser finds n: SHA-256(token.n) begins with b zero bits
//!        ▲                                                  │ POST /.portolan/challenge (or waits, without JavaScript)
//!        └── reload with the clearance cookie ◄── token is ours, fresh, unspent, for this client; n is right
//! ```
//!
//! Nothing is kept of a challenge that was only made: the token carries it, signed, and bound to the client's
//! address (IPv6: its /64), its user agent and the rule. Once answered, its nonce is spent.

pub mod page;
mod spent;

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use ring::digest;

use crate::client::standing::prefix;
use crate::request::{Moment, mix};
use crate::signing::{Key, same};
use spent::{Spending, Spent};

/// Where answers go.
pub const PATH: &str = "/.portolan/challenge";
/// The token, in the request that answers.
pub const TOKEN: &str = "portolan-challenge";
/// The answer.
pub const SOLUTION: &str = "portolan-solution";
/// A token is good for this long.
pub const FRESH: Duration = Duration::from_secs(120);
/// Who has no JavaScript waits for this long.
pub const WAIT: Duration = Duration::from_secs(5);
/// The most zero bits that are ever asked for: a minute of a laptop.
const MOST: u8 = 24;

/// How challenges are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Zero bits.
    pub difficulty: u8,
    /// How long it counts that one was passed.
    pub clearance: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { difficulty: 16, clearance: Duration::from_secs(1_800) }
    }
}

/// What kind of challenge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A computation, or without JavaScript a wait.
    Challenge,
    /// A computation.
    Js,
    /// A short computation or a wait for whom nothing speaks against, a computation for others.
    Managed,
}

/// Below this threat score nothing speaks against a client.
const CALM: u8 = 25;
/// From this threat score on nobody gets away with waiting.
const SUSPECT: u8 = 50;
/// Clocks of several Portolans may differ by this much.
const SKEW: Duration = Duration::from_secs(5);

impl Kind {
    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Challenge => "challenge",
            Self::Js => "js_challenge",
            Self::Managed => "managed_challenge",
        }
    }

    /// May the client wait in place of computing?
    pub fn waits(self, score: u8) -> bool {
        match self {
            Self::Challenge => score < SUSPECT,
            Self::Js => false,
            Self::Managed => score < CALM,
        }
    }

    /// Is this clearance enough?
    pub fn accepts(self, level: Level) -> bool {
        level == Level::Computed || self != Self::Js
    }
}

/// What a client did for its clearance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// It waited.
    Waited,
    /// It computed.
    Computed,
}

/// Whom a token or cookie is for.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// The address.
    pub ip: IpAddr,
    /// The user agent.
    pub agent: &'a [u8],
}

impl Client<'_> {
    /// As a part of what is signed.
    fn bind(&self, text: &str) -> String {
        format!("{text}|{}|{:016x}", prefix(self.ip), crate::request::hash(self.agent))
    }
}

/// A challenge, as its token tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// When it was made, since 1970, in whole milliseconds.
    pub made: Duration,
    /// Zero bits.
    pub bits: u8,
    /// The rule.
    pub rule: u32,
    /// Makes it the only one.
    pub nonce: u64,
    /// May the client wait?
    pub waits: bool,
}

/// Why an answer is not accepted: a word for logs and programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// There is no token, or it is not of the form of one.
    Malformed,
    /// It was not signed here, or for another client.
    Forged,
    /// It is too old.
    Expired,
    /// Its rule is not in force any more.
    Outdated,
    /// The answer does not solve it.
    Unsolved,
    /// The client did not wait, or may not.
    Impatient,
    /// It was used before.
    Spent,
    /// Too many were used lately to tell.
    Busy,
}

impl Wrong {
    /// The word.
    pub fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Forged => "forged",
            Self::Expired => "expired",
            Self::Outdated => "outdated",
            Self::Unsolved => "unsolved",
            Self::Impatient => "impatient",
            Self::Spent => "spent",
            Self::Busy => "busy",
        }
    }
}

/// What outlives reloads: which answers were used, and how many challenges are made at the moment.
#[derive(Debug, Default)]
pub struct Challenges {
    spent: Spent,
    /// Of those that waited: they cost nothing, and must not fill the table of those that did.
    waited: Spent,
    /// The number of the window of ten seconds, and how many were made in it.
    made: AtomicU64,
}

/// Challenges in ten seconds from which on they get harder, a bit with each doubling, up to four.
const BUSY: u64 = 200;

impl Challenges {
    /// Counts one that was made.
    pub fn count(&self, now: Moment) {
        let window = now.0.as_secs() / 10;
        // A lost race loses one of many.
        let made = self.made.load(Relaxed);
        let next = if made >> 32 == window & 0xffff_ffff { made + 1 } else { (window & 0xffff_ffff) << 32 | 1 };
        self.made.store(next, Relaxed);
    }

    /// Bits on top, by how many are made at the moment.
    fn load(&self, now: Moment) -> u8 {
        let (window, made) = ((now.0.as_secs() / 10) & 0xffff_ffff, self.made.load(Relaxed));
        let made = if made >> 32 == window { made & 0xffff_ffff } else { 0 };
        u8::try_from((made / BUSY).checked_ilog2().map_or(0, |log| log + 1).min(4)).unwrap_or(4)
    }

    /// How hard it is for a client with this threat score, now.
    pub fn bits(&self, settings: Settings, kind: Kind, score: u8, now: Moment) -> u8 {
        let by_score = match score {
            80.. => 4,
            50.. => 2,
            _ => 0,
        };
        let calm = if kind == Kind::Managed && score < CALM { 2 } else { 0 };
        (settings.difficulty + by_score + self.load(now)).saturating_sub(calm).clamp(1, MOST)
    }
}

impl Token {
    /// As it goes out.
    pub fn sign(&self, key: &Key, client: Client<'_>) -> String {
        let Self { made, bits, rule, nonce, waits } = self;
        let text = format!("{:x}.{bits}.{rule:08x}.{nonce:016x}.{}", made.as_millis(), u8::from(*waits));
        let tag = key.tag(TOKEN, &client.bind(&text));
        format!("{text}.{tag}")
    }

    /// As it comes back.
    pub fn open(signed: &str, key: &Key, client: Client<'_>) -> Result<Self, Wrong> {
        let (text, tag) = signed.rsplit_once('.').filter(|_| signed.len() < 128).ok_or(Wrong::Malformed)?;
        let mut fields = text.split('.');
        let mut field = || fields.next().ok_or(Wrong::Malformed);
        let (made, bits, rule, nonce, waits) = (field()?, field()?, field()?, field()?, field()?);
        let hex = |text| u64::from_str_radix(text, 16).map_err(|_| Wrong::Malformed);
        if !same(&key.tag(TOKEN, &client.bind(text)), tag) {
            return Err(Wrong::Forged);
        }
        Ok(Self {
            made: Duration::from_millis(hex(made)?),
            bits: bits.parse().map_err(|_| Wrong::Malformed)?,
            rule: u32::from_str_radix(rule, 16).map_err(|_| Wrong::Malformed)?,
            nonce: hex(nonce)?,
            waits: waits == "1",
        })
    }

    /// Does `n` solve it? `signed` is the token as it was sent.
    fn solved(&self, signed: &str, solution: &str) -> bool {
        let digits = (1..=20).contains(&solution.len()) && solution.bytes().all(|b| b.is_ascii_digit());
        digits
            && zero_bits(digest::digest(&digest::SHA256, format!("{signed}.{solution}").as_bytes()).as_ref())
                >= u32::from(self.bits)
    }
}

fn zero_bits(hash: &[u8]) -> u32 {
    let zeros = hash.iter().take_while(|b| **b == 0).count();
    let next = hash.get(zeros).map_or(0, |b| b.leading_zeros());
    u32::try_from(zeros).unwrap_or(u32::MAX) * 8 + next
}

/// An answer to a challenge.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The token.
    pub token: &'a str,
    /// The number found; nothing from whom only waited.
    pub solution: Option<&'a str>,
}

impl Answer<'_> {
    /// What the client earned by it, and the token. `known`: is this rule in force? Only with `spend` is the token used up.
    pub fn check(
        &self,
        key: &Key,
        client: Client<'_>,
        challenges: &Challenges,
        time: Duration,
        known: impl Fn(u32) -> bool,
        spend: bool,
    ) -> Result<(Level, Token), Wrong> {
        let token = Token::open(self.token, key, client)?;
        let age = time.saturating_sub(token.made);
        if age > FRESH || token.made > time.saturating_add(SKEW) {
            return Err(Wrong::Expired);
        }
        if !known(token.rule) {
            return Err(Wrong::Outdated);
        }
        let level = match self.solution {
            Some(solution) if token.solved(self.token, solution) => Level::Computed,
            Some(_) => return Err(Wrong::Unsolved),
            None if token.waits && age >= WAIT => Level::Waited,
            None => return Err(Wrong::Impatient),
        };
        let spent = if level == Level::Computed { &challenges.spent } else { &challenges.waited };
        match spent.spend(mix(token.nonce), time.as_secs(), spend) {
            Spending::Fresh => Ok((level, token)),
            Spending::Before => Err(Wrong::Spent),
            Spending::Full => Err(Wrong::Busy),
        }
    }
}

/// The name of the clearance cookie. Browsers take `__Host-` over TLS only.
pub fn cookie_name(tls: bool) -> &'static str {
    if tls { "__Host-portolan_clearance" } else { "portolan_clearance" }
}

/// What a clearance says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clearance {
    /// What the client did.
    pub level: Level,
    /// The rule whose challenge it was.
    pub rule: u32,
    /// When that was made, since 1970.
    pub made: Duration,
}

/// The cookie that says what a client earned by the challenge of `token`.
pub fn clearance(
    level: Level,
    token: &Token,
    key: &Key,
    client: Client<'_>,
    time: Duration,
    settings: Settings,
    tls: bool,
) -> String {
    let seconds = settings.clearance.as_secs();
    let until = time.saturating_add(settings.clearance).as_millis();
    let (made, rule, did) = (token.made.as_millis(), token.rule, if level == Level::Computed { 2 } else { 1 });
    let text = format!("{until:x}.{did}.{made:x}.{rule:08x}");
    let tag = key.tag(cookie_name(false), &client.bind(&text));
    let secure = if tls { "; Secure" } else { "" };
    format!("{}={text}.{tag}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}", cookie_name(tls))
}

/// What a clearance cookie says, if it is ours, for this client, and still counts.
pub fn cleared(cookie: &str, key: &Key, client: Client<'_>, time: Duration, settings: Settings) -> Option<Clearance> {
    let (text, tag) = cookie.rsplit_once('.').filter(|_| cookie.len() < 96)?;
    let mut fields = text.split('.');
    let (until, level, made, rule) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let left = Duration::from_millis(u64::from_str_radix(until, 16).ok()?).checked_sub(time)?;
    // A cookie from before a shorter clearance came into force does not outlive it.
    let counts = !left.is_zero() && left <= settings.clearance;
    let ours = same(&key.tag(cookie_name(false), &client.bind(text)), tag);
    let level = if level == "2" { Level::Computed } else { Level::Waited };
    let made = Duration::from_millis(u64::from_str_radix(made, 16).ok()?);
    let rule = u32::from_str_radix(rule, 16).ok()?;
    (counts && ours).then_some(Clearance { level, rule, made })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn solve(token: &str, bits: u8) -> String {
        let found = (0u64..).map(|n| n.to_string());
        let solves = |n: &String| {
            zero_bits(digest::digest(&digest::SHA256, format!("{token}.{n}").as_bytes()).as_ref()) >= u32::from(bits)
        };
        found.filter(solves).take(1).collect()
    }

    const CLIENT: Client<'_> = Client { ip: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), agent: b"Mozilla/5.0" };

    #[test]
    fn only_the_right_answer_counts() {
        let (key, challenges) = (Key::new(b"k"), Challenges::default());
        let token = Token { made: Duration::from_secs(1_000), bits: 8, rule: 7, nonce: 42, waits: true };
        let signed = token.sign(&key, CLIENT);
        assert!((signed.len() + 1) % 64 <= 46, "{}: the browser hashes one block for each try", signed.len());
        let solution = solve(&signed, 8);
        let check = |token: &str, solution: Option<&str>, client, unix, known: bool| {
            let time = Duration::from_secs(unix);
            Answer { token, solution }
                .check(&key, client, &challenges, time, |rule| known && rule == 7, true)
                .map(|(level, _)| level)
        };
        let good = Some(solution.as_str());
        for (wrong, got) in [
            (Wrong::Malformed, check("", good, CLIENT, 1_001, true)),
            (Wrong::Malformed, check("a.b", good, CLIENT, 1_001, true)),
            (Wrong::Forged, check(&signed.replace(".8.", ".1."), good, CLIENT, 1_001, true)),
            (Wrong::Forged, check(&signed, good, Client { ip: "127.0.0.2".parse().unwrap(), ..CLIENT }, 1_001, true)),
            (Wrong::Forged, check(&signed, good, Client { agent: b"curl", ..CLIENT }, 1_001, true)),
            (Wrong::Expired, check(&signed, good, CLIENT, 1_121, true)),
            (Wrong::Expired, check(&signed, good, CLIENT, 994, true)),
            (Wrong::Outdated, check(&signed, good, CLIENT, 1_001, false)),
            (Wrong::Unsolved, check(&signed, Some("x"), CLIENT, 1_001, true)),
            (Wrong::Unsolved, check(&signed, Some(&format!("{solution}0")), CLIENT, 1_001, true)),
            (Wrong::Impatient, check(&signed, None, CLIENT, 1_004, true)),
        ] {
            assert_eq!(got, Err(wrong));
        }
        assert_eq!(check(&signed, good, CLIENT, 1_001, true), Ok(Level::Computed));
        assert_eq!(check(&signed, good, CLIENT, 1_001, true), Err(Wrong::Spent));
        let other = Token { nonce: 43, ..token };
        assert_eq!(check(&other.sign(&key, CLIENT), None, CLIENT, 1_005, true), Ok(Level::Waited));
        let strict = Token { nonce: 44, waits: false, ..token };
        assert_eq!(check(&strict.sign(&key, CLIENT), None, CLIENT, 1_005, true), Err(Wrong::Impatient));
    }

    #[test]
    fn clearances() {
        let at = Duration::from_secs;
        let key = Key::new(b"k");
        let settings = Settings::default();
        let token = Token { made: at(990), bits: 8, rule: 7, nonce: 42, waits: true };
        let cookie = clearance(Level::Waited, &token, &key, CLIENT, at(1_000), settings, false);
        assert!(cookie.starts_with("portolan_clearance=") && !cookie.contains("Secure"));
        let value = cookie.split(['=', ';']).nth(1).unwrap();
        assert_eq!(
            cleared(value, &key, CLIENT, at(1_000), settings),
            Some(Clearance { level: Level::Waited, rule: 7, made: at(990) })
        );
        assert_eq!(cleared(value, &key, CLIENT, at(2_800), settings), None, "over");
        assert_eq!(cleared(value, &key, Client { agent: b"", ..CLIENT }, at(1_000), settings), None);
        assert_eq!(cleared(&value.replace(".1.", ".2."), &key, CLIENT, at(1_000), settings), None);
        assert_eq!(cleared("", &key, CLIENT, at(1_000), settings), None);
        let shorter = Settings { clearance: Duration::from_secs(60), ..settings };
        assert_eq!(cleared(value, &key, CLIENT, at(1_000), shorter), None);
        assert!(
            clearance(Level::Computed, &token, &key, CLIENT, at(0), settings, true)
                .contains("__Host-portolan_clearance=1b7740.2.")
        );
        assert!(Kind::Managed.accepts(Level::Waited) && !Kind::Js.accepts(Level::Waited) && Kind::Js.accepts(Level::Computed));
    }

    #[test]
    fn harder_for_the_suspicious_and_under_load() {
        let challenges = Challenges::default();
        let settings = Settings::default();
        let at = |seconds| Moment(Duration::from_secs(seconds));
        let bits = |kind, score| challenges.bits(settings, kind, score, at(5));
        assert_eq!([bits(Kind::Challenge, 0), bits(Kind::Challenge, 50), bits(Kind::Js, 100)], [16, 18, 20]);
        assert_eq!([bits(Kind::Managed, 0), bits(Kind::Managed, 30)], [14, 16]);
        for _ in 0..800 {
            challenges.count(at(5));
        }
        assert_eq!(bits(Kind::Challenge, 0), 19);
        assert_eq!(challenges.bits(settings, Kind::Challenge, 0, at(10)), 16, "another ten seconds");
        assert_eq!(challenges.bits(Settings { difficulty: 24, ..settings }, Kind::Js, 100, at(5)), 24);
    }
}
