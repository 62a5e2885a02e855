//! How often: rate limits, each with its own key, quota and action.
//!
//! ```text
//!  request ─► expression? ─► by: which counter ─► table: room? ─► take ─► pass
//!                                                    └ none ─► action; with mitigation_timeout a penalty
//! ```
//!
//! Limits are asked in the order of the file; the first that refuses ends it, and what those before it took here is given
//! back. What counts only once there is a response ([`Limit::waits`]) is looked at on arrival, and counted then.

pub mod book;
pub mod ledger;
pub mod quota;
pub mod report;
pub mod table;

use std::fmt::Write;
use std::hash::Hasher;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use siphasher::sip::SipHasher13;
use smallvec::SmallVec;

use crate::request::{Moment, hash};
use crate::rules::{Filter, Scalar, View};
use crate::waf::Answer;
use crate::waf::challenge::Kind;
use book::Ban;
pub use ledger::Ledger;
use quota::{Algorithm, Count, Quota, Used};
use table::{Entry, Handle, TICK};

/// The limits of a configuration.
#[derive(Debug, Default)]
pub struct Limits {
    /// In order.
    pub rules: Box<[Limit]>,
    /// How much of an address counts.
    pub prefixes: Prefixes,
    /// What outlives a reload; there if a limit is.
    pub ledger: Option<Arc<Ledger>>,
}

/// How many bits of an address stand for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefixes {
    /// Of IPv4.
    pub ipv4: u8,
    /// Of IPv6: one host has a /64 for itself (RFC 6177).
    pub ipv6: u8,
}

impl Default for Prefixes {
    fn default() -> Self {
        Self { ipv4: 32, ipv6: 64 }
    }
}

impl Prefixes {
    /// The network that stands for an address.
    pub fn network(self, ip: IpAddr) -> IpAddr {
        match ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.ipv4.min(32))).unwrap_or(0);
                IpAddr::V4((ip.to_bits() & mask).into())
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.ipv6.min(128))).unwrap_or(0);
                IpAddr::V6((ip.to_bits() & mask).into())
            }
        }
    }

    /// The same as text: an address, or a network.
    pub fn shown(self, ip: IpAddr) -> String {
        let (bits, all) = if ip.is_ipv4() { (self.ipv4, 32) } else { (self.ipv6, 128) };
        let network = self.network(ip);
        if bits >= all { network.to_string() } else { format!("{network}/{bits}") }
    }
}

/// A limit.
#[derive(Debug)]
pub struct Limit {
    /// Its name.
    pub id: Arc<str>,
    /// Stands for the name in the table, for as long as the process lives.
    pub number: u16,
    /// To which requests it applies; to all without.
    pub filter: Option<Filter>,
    /// What is counted apart.
    pub by: Box<[Scalar]>,
    /// How much.
    pub quota: Quota,
    /// Which of them count; all without.
    pub counting: Option<Counting>,
    /// Only what reaches the origin.
    pub only_misses: bool,
    /// The origin says in this header how much a request counted.
    pub cost_header: Option<HeaderName>,
    /// How long an offender stays refused.
    pub timeout: Duration,
    /// What becomes of what is too much.
    pub action: Action,
    /// It only says what it would do.
    pub dry_run: bool,
    /// Clients are told how much is left.
    pub headers: bool,
    /// Asked of all nodes together.
    pub strict: bool,
    /// Without the other nodes nobody passes.
    pub deny: bool,
    /// Stands for it in challenges; the bits of [`TAG_GENERATION`] are left for those of the client.
    pub tag: u32,
}

/// Bits of a challenge's tag in which it says how often its client had begun anew.
pub const TAG_GENERATION: u32 = 3;

/// A challenge that a client passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Solved {
    /// Whose it was: [`Limit::tag`] with [`Seen::generation`], or a rule's.
    pub tag: u32,
    /// When it was made.
    pub made: Moment,
}

/// Which requests count.
#[derive(Debug)]
pub enum Counting {
    /// Known on arrival.
    Request(Filter),
    /// Known from the response.
    Response(Filter),
}

/// What becomes of a request that is too much.
#[derive(Debug)]
pub enum Action {
    /// It is refused.
    Block(Answer),
    /// The browser has to do something first; then it begins anew.
    Challenge(Kind),
    /// It passes.
    Log,
}

/// What a limit said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// There was room.
    Allowed,
    /// There was none.
    Blocked,
    /// A penalty is not over.
    Banned,
    /// There was none, and the client was challenged.
    Challenged,
    /// There was none, and the limit only says so.
    Logged,
    /// Nobody could be asked, and the limit lets nobody pass then.
    Unavailable,
}

impl Decision {
    /// Every decision.
    pub const ALL: [Self; 6] = [Self::Allowed, Self::Blocked, Self::Banned, Self::Challenged, Self::Logged, Self::Unavailable];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Blocked => "blocked",
            Self::Banned => "banned",
            Self::Challenged => "challenged",
            Self::Logged => "logged",
            Self::Unavailable => "unavailable",
        }
    }
}

/// A limit that applied.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Its position.
    pub limit: u16,
    /// The client.
    pub handle: Handle,
    /// What it said.
    pub decision: Decision,
    /// What is left.
    pub left: u32,
    /// Until there is room again.
    pub wait: Duration,
    /// Until everything is back.
    pub reset: Duration,
    /// How often the client began anew, modulo four.
    pub generation: u8,
    /// What was taken, and when.
    taken: u32,
    at: Moment,
}

/// The limits that applied so far; it is carried along where a request is decided in several steps.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// In order.
    pub seen: SmallVec<[Seen; 1]>,
    /// Positions up to here are done, of the stage that is being asked.
    next: usize,
    /// Stages that are done: [`Stage::Arrival`], [`Stage::Origin`].
    done: [bool; 2],
    /// What all nodes together said to the limit at `next`.
    pub answer: Option<Shared>,
}

/// What all nodes together say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// What was used.
    Used(Used),
    /// Nobody answered in time.
    Unreachable,
}

/// What is asked of all nodes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// The client.
    pub handle: Handle,
    /// How much is allowed.
    pub quota: Quota,
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It may pass.
    Pass,
    /// The last limit seen refuses or challenges it; `first`: this client passed it the last time.
    Stop {
        /// A new offence.
        first: bool,
    },
    /// All nodes have to be asked.
    Ask(Question),
}

/// Which limits are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Those of every request.
    Arrival,
    /// Those of requests that the origin gets (`only_misses`).
    Origin,
}

impl Asked {
    /// A rule leaves them all out.
    pub fn skip(&mut self) {
        self.done = [true; 2];
    }

    /// Was every limit of this stage asked?
    pub fn is_done(&self, stage: Stage) -> bool {
        self.done.get(stage as usize).is_none_or(|done| *done)
    }
}

impl Limits {
    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Does one challenge anybody?
    pub fn challenges(&self) -> bool {
        self.rules.iter().any(|rule| matches!(rule.action, Action::Challenge(_)))
    }

    /// Is a challenge of this tag one of theirs?
    pub fn challenged_by(&self, tag: u32) -> bool {
        self.rules.iter().any(|rule| rule.tag == tag & !TAG_GENERATION && matches!(rule.action, Action::Challenge(_)))
    }

    /// Does a limit ask of [`Stage::Origin`]?
    pub fn at_origin(&self) -> bool {
        self.rules.iter().any(|rule| rule.only_misses)
    }

    /// The limit of what was seen.
    pub fn rule(&self, seen: &Seen) -> Option<&Limit> {
        self.rules.get(usize::from(seen.limit))
    }

    /// Asks the limits of a stage in order, and takes what they allow, unless `peek`. `solved`: the challenge of this kind
    /// that the client passed last.
    pub fn judge(
        &self,
        view: &View<'_>,
        stage: Stage,
        peek: bool,
        solved: impl Fn(Kind) -> Option<Solved>,
        asked: &mut Asked,
    ) -> Verdict {
        let Some(ledger) = self.ledger.as_ref().filter(|_| !asked.is_done(stage)) else { return Verdict::Pass };
        let now = view.asker.now;
        for (position, limit) in self.rules.iter().enumerate().skip(asked.next) {
            let answer = asked.answer.take();
            if limit.stage() != stage || limit.filter.as_ref().is_some_and(|f| !f.matches(view)) {
                continue;
            }
            let handle = limit.handle(ledger, self.prefixes, view);
            let mut settled = false;
            if let Action::Challenge(kind) = limit.action
                && let Some(solved) = solved(kind).filter(|solved| solved.tag & !TAG_GENERATION == limit.tag)
                && !peek
                && ledger.table.change(handle, |entry| limit.settle(entry, solved)) == Some(true)
            {
                // Whoever passed the challenge of its last refusal begins anew, on every node.
                ledger.reset_elsewhere(handle, true);
                settled = true;
            }
            let counts = match &limit.counting {
                None => !limit.waits(),
                Some(Counting::Request(filter)) => !limit.waits() && filter.matches(view),
                Some(Counting::Response(_)) => false,
            };
            let others = if limit.is_shared() { ledger.elsewhere(handle) } else { None };
            let unreachable = limit.deny && !limit.strict && !ledger.connected.load(Relaxed);
            let answer = if unreachable { Some(Shared::Unreachable) } else { answer };
            let ask = Ask { limit, others, answer, counts, named: ledger.book.has_room(), now };
            // Redis may not have heard of a new beginning yet.
            if limit.strict && answer.is_none() && counts && !peek && !settled && ask.is_open(ledger.table.get(handle)) {
                asked.next = position;
                return Verdict::Ask(Question { handle, quota: limit.quota });
            }
            let Said { mut seen, named, offence } = match peek {
                true => ask.of(&mut ledger.table.get(handle).unwrap_or_default()),
                false => ledger.table.with(handle, limit.number, now, |entry| {
                    let said = ask.of(entry);
                    if said.seen.taken > 0 && limit.is_shared() {
                        ledger.tell(entry, handle, limit.number, &limit.quota, said.seen.left);
                    }
                    said
                }),
            };
            seen.limit = u16::try_from(position).unwrap_or(u16::MAX);
            seen.handle = handle;
            asked.seen.push(seen);
            let ban = offence.ban.filter(|_| !limit.is_quiet());
            if (named || ban.is_some()) && !peek {
                let key = limit.describe(self.prefixes, ledger, view);
                if named {
                    ledger.book.note(handle, key.clone());
                }
                if let Some(until) = ban {
                    ledger.begin(handle, Ban { limit: limit.id.clone(), key, until });
                }
            }
            if !matches!(seen.decision, Decision::Allowed | Decision::Logged) {
                self.give_back(ledger, asked, now, peek);
                return Verdict::Stop { first: offence.first };
            }
        }
        asked.next = 0;
        if let Some(done) = asked.done.get_mut(stage as usize) {
            *done = true;
        }
        Verdict::Pass
    }

    /// Gives back what was taken of a request that does not pass. (Redis keeps what a strict limit took.)
    fn give_back(&self, ledger: &Ledger, asked: &mut Asked, now: Moment, peek: bool) {
        for seen in asked.seen.iter_mut().filter(|seen| seen.taken > 0) {
            let taken = std::mem::take(&mut seen.taken);
            seen.left = seen.left.saturating_add(taken);
            if let Some(limit) = self.rules.get(usize::from(seen.limit)).filter(|_| !peek) {
                ledger.table.change(seen.handle, |entry| entry.count.give_back(&limit.quota, taken, seen.at, now));
            }
        }
    }

    /// Is something counted once the response is there?
    pub fn waits(&self, asked: &Asked) -> bool {
        asked.seen.iter().filter_map(|seen| self.rule(seen)).any(Limit::waits)
    }

    /// Counts what had to wait for the response, which `view` has.
    pub fn settle(&self, asked: &Asked, view: &View<'_>) {
        let (Some(ledger), Some(response)) = (&self.ledger, &view.response) else { return };
        let now = view.asker.now;
        for seen in &asked.seen {
            let Some(limit) = self.rule(seen).filter(|limit| limit.waits()) else { continue };
            let counts = match &limit.counting {
                Some(Counting::Request(filter) | Counting::Response(filter)) => filter.matches(view),
                None => true,
            };
            let cost = match &limit.cost_header {
                Some(name) => response.headers.get(name).and_then(cost).unwrap_or(0),
                None => 1,
            };
            if counts && cost > 0 {
                let named = ledger.table.with(seen.handle, limit.number, now, |entry| {
                    entry.count.add(&limit.quota, cost, now);
                    let left = entry.count.used(&limit.quota, 1, now).left;
                    entry.weigh(left, limit.quota.most());
                    if limit.is_shared() {
                        ledger.tell(entry, seen.handle, limit.number, &limit.quota, left);
                    }
                    ledger.book.has_room() && left.saturating_mul(2) < limit.quota.most() && entry.name()
                });
                if named {
                    ledger.book.note(seen.handle, limit.describe(self.prefixes, ledger, view));
                }
            }
        }
    }

    /// `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10), where a limit wants them.
    pub fn headers(&self, asked: &Asked) -> Option<(HeaderValue, HeaderValue)> {
        let (mut policy, mut state) = (String::new(), String::new());
        for seen in &asked.seen {
            let Some(limit) = self.rule(seen).filter(|limit| limit.headers) else { continue };
            let comma = if policy.is_empty() { "" } else { ", " };
            let (id, quota, window) = (&limit.id, limit.quota.most(), limit.quota.period.as_secs());
            let (left, reset) = (seen.left, seconds(seen.wait.max(seen.reset)));
            let _ = write!(policy, "{comma}\"{id}\";q={quota};w={window}");
            let _ = write!(state, "{comma}\"{id}\";r={left};t={reset}");
        }
        Some((HeaderValue::try_from(policy).ok().filter(|p| !p.is_empty())?, HeaderValue::try_from(state).ok()?))
    }

    /// Clients of this name, as [`Limit::describe`] puts them; of one limit, or of all.
    pub fn find(&self, key: &str, of: Option<&str>) -> Vec<Handle> {
        let Some(ledger) = &self.ledger else { return Vec::new() };
        let mut found = ledger.book.find(key);
        if let Some(handle) = key.strip_prefix('#').and_then(|hex| hex.parse::<Handle>().ok()) {
            found.push(handle);
        }
        // What never came near a limit has no name in the book, but the name says which it is.
        let named = self.rules.iter().filter_map(|limit| limit.parse(ledger, self.prefixes, key));
        found.extend(named);
        let wanted = of.map(|id| ledger.number(id));
        found.sort_unstable();
        found.dedup();
        let others = |handle| ledger.others.as_ref().and_then(|others| others.get(handle));
        let of = |handle: &Handle| ledger.table.get(*handle).or_else(|| others(*handle)).map(|entry| entry.limit);
        found.retain(|handle| wanted.is_none() || of(handle) == wanted);
        found
    }
}

/// Whole seconds, rounded up: who comes back then is not too early.
pub fn seconds(span: Duration) -> u64 {
    span.as_secs() + u64::from(span.subsec_nanos() > 0)
}

/// What a response's header says that the request cost.
fn cost(value: &HeaderValue) -> Option<u32> {
    value.to_str().ok()?.trim().parse::<u32>().ok().map(|cost| cost.min(1_000_000))
}

/// What is asked of one entry.
struct Ask<'a> {
    limit: &'a Limit,
    /// What other nodes counted.
    others: Option<Count>,
    /// What all nodes together say.
    answer: Option<Shared>,
    /// The request counts.
    counts: bool,
    /// There is room for names.
    named: bool,
    now: Moment,
}

/// What one entry says.
struct Said {
    seen: Seen,
    /// The client's name is worth writing down.
    named: bool,
    offence: Offence,
}

/// A refusal that is new.
#[derive(Default)]
struct Offence {
    first: bool,
    ban: Option<Moment>,
}

impl Ask<'_> {
    /// What was used here and elsewhere.
    fn used(&self, entry: &Entry) -> Used {
        let quota = &self.limit.quota;
        match &self.others {
            Some(others) => entry.count.with(others, quota, self.now).used(quota, 1, self.now),
            None => entry.count.used(quota, 1, self.now),
        }
    }

    /// Could it pass, as far as is known here?
    fn is_open(&self, entry: Option<Entry>) -> bool {
        let entry = entry.unwrap_or_default();
        entry.penalty(self.limit.is_quiet(), self.now).is_none() && self.used(&entry).fits
    }

    /// What the limit says.
    fn of(&self, entry: &mut Entry) -> Said {
        let Self { limit, others: _, answer, counts, named, now } = *self;
        let (quota, quiet) = (&limit.quota, limit.is_quiet());
        let said = |decision, used: Used, taken, wait, named, generation, offence| Said {
            seen: Seen {
                limit: 0,
                handle: Handle(0),
                decision,
                left: used.left.saturating_sub(taken),
                wait,
                reset: used.reset,
                generation,
                taken,
                at: now,
            },
            named,
            offence,
        };
        let over = |banned: bool| match &limit.action {
            _ if limit.dry_run => Decision::Logged,
            Action::Log => Decision::Logged,
            Action::Challenge(_) => Decision::Challenged,
            Action::Block(_) if banned => Decision::Banned,
            Action::Block(_) => Decision::Blocked,
        };
        entry.count.adopt(quota, now);
        let mut used = self.used(entry);
        if let Some(until) = entry.penalty(quiet, now) {
            let first = entry.refuse(now);
            let used = Used { left: 0, ..used };
            return said(over(true), used, 0, until.since(now), false, entry.generation(), Offence { first, ban: None });
        }
        if answer == Some(Shared::Unreachable) && limit.deny && !quiet {
            let again = Duration::from_secs(1);
            return said(Decision::Unavailable, used, 0, again, false, entry.generation(), Offence::default());
        }
        // What all together said holds, and so does what is known here: Redis may have forgotten everything.
        if let Some(Shared::Used(shared)) = answer
            && used.fits
        {
            used = shared;
        }
        if used.fits {
            let taken = u32::from(counts);
            if counts {
                // It is counted here under `strict`, too, for the time when nobody answers.
                entry.count.add(quota, taken, now);
                used.reset = used.reset.max(entry.count.used(quota, 1, now).reset);
            }
            entry.pass();
            let left = used.left.saturating_sub(taken);
            entry.weigh(left, quota.most());
            let named = named && left.saturating_mul(2) < quota.most() && entry.name();
            return said(Decision::Allowed, used, taken, Duration::ZERO, named, entry.generation(), Offence::default());
        }
        let first = entry.refuse(now);
        let ban = (!limit.timeout.is_zero()).then(|| now.after(limit.timeout));
        if let Some(until) = ban {
            entry.punish(until, quiet);
        }
        let wait = ban.map_or(used.wait.max(Duration::from_millis(1)), |_| limit.timeout);
        let named = named && entry.name();
        said(over(false), Used { left: 0, ..used }, 0, wait, named, entry.generation(), Offence { first, ban })
    }
}

impl Limit {
    /// Stands for a limit in challenges.
    pub fn tag(id: &str) -> u32 {
        (hash(format!("limit\n{id}").as_bytes()) >> 32) as u32 & !TAG_GENERATION
    }

    /// Was this challenge the one of the entry's last refusal? It counts once: the client begins anew.
    ///
    /// The time of a refusal is known to a tick. Within it challenges of an earlier refusal are told by their
    /// generation, which is this node's own.
    fn settle(&self, entry: &mut Entry, solved: Solved) -> bool {
        // A challenge tells its time in whole milliseconds.
        let made = solved.made.after(Duration::from_millis(1));
        let same = solved.tag & TAG_GENERATION == u32::from(entry.generation());
        let counts = entry.refused_at(self.timeout).is_some_and(|at| made >= at && (same || made >= at.after(TICK)));
        if counts {
            entry.clear();
        }
        counts
    }

    /// When it is asked.
    pub fn stage(&self) -> Stage {
        if self.only_misses { Stage::Origin } else { Stage::Arrival }
    }

    /// Does it count only once there is a response?
    pub fn waits(&self) -> bool {
        self.cost_header.is_some() || matches!(self.counting, Some(Counting::Response(_)))
    }

    /// Do nodes tell each other what they counted? Of a strict one too: Redis may fail, or be late.
    pub fn is_shared(&self) -> bool {
        self.quota.algorithm == Algorithm::Sliding
    }

    /// Does it refuse nobody?
    pub fn is_quiet(&self) -> bool {
        self.dry_run || matches!(self.action, Action::Log)
    }

    fn hasher(&self, ledger: &Ledger) -> SipHasher13 {
        let mut hasher = ledger.hasher;
        hasher.write(self.id.as_bytes());
        hasher.write_u8(0xff);
        hasher
    }

    /// The client's counter under this limit. What is missing is a value of its own, and no other.
    fn handle(&self, ledger: &Ledger, prefixes: Prefixes, view: &View<'_>) -> Handle {
        let mut hasher = self.hasher(ledger);
        for part in &self.by {
            part.feed(view, |ip| prefixes.network(ip), &mut hasher);
        }
        finish(&hasher)
    }

    /// The client in words: its values, separated by commas. What may be secret is shown as a hash.
    pub fn describe(&self, prefixes: Prefixes, ledger: &Ledger, view: &View<'_>) -> Arc<str> {
        let mut text = String::new();
        for (i, part) in self.by.iter().enumerate() {
            if i > 0 {
                text.push_str(", ");
            }
            if part.is_private() && part.is_there(view) {
                let mut hasher = ledger.hasher;
                part.feed(view, |ip| ip, &mut hasher);
                let _ = write!(text, "#{}", finish(&hasher));
            } else {
                text.push_str(&part.shown(view, |ip| prefixes.shown(ip)));
            }
        }
        if self.by.is_empty() {
            text.push_str("everybody");
        }
        text.into()
    }

    /// The counter of who is described so, if that can be told: hashes cannot.
    fn parse(&self, ledger: &Ledger, prefixes: Prefixes, key: &str) -> Option<Handle> {
        let mut hasher = self.hasher(ledger);
        if self.by.is_empty() {
            return (key == "everybody").then(|| finish(&hasher));
        }
        let parts: Vec<_> = if self.by.len() == 1 { vec![key] } else { key.split(", ").collect() };
        if parts.len() != self.by.len() {
            return None;
        }
        for (part, text) in self.by.iter().zip(parts) {
            part.feed_text(text, |ip| prefixes.network(ip), &mut hasher)?;
        }
        Some(finish(&hasher))
    }
}

fn finish(hasher: &SipHasher13) -> Handle {
    // The lower half is a tag in the table, where 0 is nobody.
    let hash = hasher.finish();
    Handle(if hash as u32 == 0 { hash | 1 } else { hash })
}
