//! What nodes tell each other of limits: differences of rings, penalties, and who begins anew.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use redis::RedisResult;
use redis::aio::MultiplexedConnection;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::Cluster;
use crate::limits::book::{BANS, Ban, LONGEST};
use crate::limits::ledger::News;
use crate::limits::quota::BUCKETS;
use crate::limits::table::Handle;
use crate::limits::{Ledger, Limit};
use crate::proxy::clock;
use crate::request::Moment;
use crate::state::State;

/// News wait for each other for so long;
const CALM: Duration = Duration::from_millis(50);
/// where somebody used half of what it may, or a penalty began, so long.
const URGENT: Duration = Duration::from_millis(10);
/// Clients in one message.
const CHUNK: usize = 1_000;
/// Clients of whom is remembered what others were told.
const TOLD: usize = 64 << 10;
/// How often it is looked which of them are over.
const PRUNE: Duration = Duration::from_secs(10);
/// No name is longer than is ever shown.
const NAME: usize = 1_024;
/// As long as there is no limit, it is looked for one so often.
const NO_LIMITS: Duration = Duration::from_millis(500);

/// What others were told of one client: its ring at that time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    limit: u16,
    ages: [u32; BUCKETS],
    /// The number of the newest bucket.
    bucket: u64,
    width: u64,
}

/// What one node tells others.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Message {
    /// The node.
    from: String,
    /// It does not know where the receiver is, and asks. Whoever answers repeats the number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hello: Option<u64>,
    /// This is a part of an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    answer: Option<Answer>,
    /// By limit: what was counted more.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    counts: BTreeMap<String, Counts>,
    /// Penalties.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    bans: Vec<Penalty>,
    /// Clients that begin anew.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    resets: Vec<Id>,
}

/// A part of an answer to a hello.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Answer {
    /// To this one.
    to: u64,
    /// The answer's own number.
    id: u64,
    /// There is no more: from here on the node is known.
    last: bool,
}

/// What was counted more under one limit.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Counts {
    /// Milliseconds of a bucket.
    width: u64,
    /// By client: counts by age in buckets.
    clients: Vec<(Id, Vec<u32>)>,
}

/// A handle as text.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Id(Handle);

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.0.to_string()
    }
}

impl TryFrom<String> for Id {
    type Error = std::num::ParseIntError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Penalty {
    limit: String,
    key: String,
    handle: Id,
    /// Milliseconds until it ends: no two clocks have to agree.
    left: u64,
}

impl Penalty {
    fn new(handle: Handle, ban: &Ban, now: Moment) -> Self {
        let left = ban.until.since(now).as_millis();
        let left = u64::try_from(left).unwrap_or(u64::MAX);
        Self { limit: ban.limit.to_string(), key: ban.key.to_string(), handle: Id(handle), left }
    }
}

/// What `ring` has more than others were told, each bucket by its age.
fn difference(ring: &Told, before: Option<&Told>) -> Vec<u32> {
    let mut more = ring.ages.to_vec();
    if let Some(before) = before.filter(|before| before.width == ring.width) {
        let passed = usize::try_from(ring.bucket.saturating_sub(before.bucket)).unwrap_or(usize::MAX);
        for (now, then) in more.iter_mut().skip(passed).zip(&before.ages) {
            *now = now.saturating_sub(*then);
        }
    }
    while more.last() == Some(&0) {
        more.pop();
    }
    more
}

/// What could not be told goes back, however it ends.
struct Untold<'a> {
    ledger: &'a Ledger,
    news: VecDeque<News>,
}

impl Drop for Untold<'_> {
    fn drop(&mut self) {
        if !self.news.is_empty() {
            self.ledger.untold(std::mem::take(&mut self.news).into());
        }
    }
}

/// Whom this node knows since it connected, and who wants to know it.
#[derive(Debug)]
pub(super) struct Acquaintances {
    /// What this node calls its question.
    hello: u64,
    /// They told where they are: what they tell from then on is more.
    known: HashSet<String>,
    /// They are telling, in several messages: the answer's number, and what came of it.
    telling: HashMap<String, (u64, Vec<Message>)>,
    /// They were asked, and when.
    asked: HashMap<String, Moment>,
    /// They ask, and what they call their question.
    asking: BTreeMap<String, u64>,
    /// They shall be asked.
    unknown: BTreeSet<String>,
}

/// Nodes that are remembered, of each kind: a process that was started again is another.
const NODES: usize = 16 << 10;
/// A node that does not answer is asked again after this long,
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// and forgotten after this long.
const FORGET: Duration = Duration::from_secs(60);
/// Messages of one answer.
const PARTS: usize = (TOLD + BANS) / CHUNK + 4;

impl Default for Acquaintances {
    fn default() -> Self {
        Self {
            hello: fastrand::u64(..),
            known: HashSet::new(),
            telling: HashMap::new(),
            asked: HashMap::new(),
            asking: BTreeMap::new(),
            unknown: BTreeSet::new(),
        }
    }
}

impl Acquaintances {
    /// Is what this node tells more than what is known of it? If not, it shall be asked.
    fn knows(&mut self, node: &str, now: Moment) -> bool {
        if self.known.contains(node) {
            return true;
        }
        if self.asked.len() >= NODES {
            self.asked.retain(|_, then| now.since(*then) < FORGET);
        }
        let due = self.asked.get(node).is_none_or(|then| now.since(*then) >= ASK_AGAIN);
        if due && self.asked.len() < NODES && self.unknown.len() < NODES {
            self.asked.insert(node.to_owned(), now);
            self.unknown.insert(node.to_owned());
        }
        false
    }

    /// Keeps a part of an answer; all of them once the last is there. What answers another question is nothing.
    fn told(&mut self, answer: Answer, message: Message) -> Option<Vec<Message>> {
        let node = message.from.clone();
        if answer.to != self.hello || self.known.contains(&node) || self.known.len() >= NODES {
            return None;
        }
        let (id, parts) = self.telling.entry(node.clone()).or_default();
        if *id != answer.id {
            (*id, *parts) = (answer.id, Vec::new());
        }
        if parts.len() < PARTS {
            parts.push(message);
        }
        if !answer.last {
            return None;
        }
        self.asked.remove(&node);
        let (_, parts) = self.telling.remove(&node)?;
        self.known.insert(node);
        Some(parts)
    }
}

impl Cluster {
    /// Tells others what is new, and who asks everything, until the connection ends.
    pub(super) async fn publish(&self, state: &State, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        let ledger = loop {
            match state.memory.known_ledger() {
                Some(ledger) => break ledger,
                None => sleep(NO_LIMITS).await,
            }
        };
        let mut shared = None;
        loop {
            // Where other limits are shared now, what others counted under them is asked for.
            let now = shared_limits(state);
            if shared.as_ref() != Some(&now) {
                if shared.replace(now).is_some() {
                    self.meet_again(state);
                }
                self.send(&mut connection, &self.everybody(), &self.hello()).await?;
            }
            // First listen, then look.
            let (filled, urgent, met) = (ledger.outbox.filled.listen(), ledger.outbox.urgent.listen(), self.met.listen());
            let (asking, unknown) = {
                let mut nodes = self.nodes.lock();
                (std::mem::take(&mut nodes.asking), std::mem::take(&mut nodes.unknown))
            };
            for (node, question) in asking {
                self.tell_all(state, &ledger, &mut connection, &node, question).await?;
            }
            for node in unknown {
                self.send(&mut connection, &self.only(&node), &self.hello()).await?;
            }
            if ledger.outbox.is_empty() {
                tokio::select! {
                    () = filled => {}
                    () = met => continue,
                    // A reload may have changed what is shared.
                    () = sleep(NO_LIMITS) => continue,
                }
            }
            tokio::select! {
                () = sleep(CALM) => {}
                () = urgent => sleep(URGENT).await,
            }
            let mut untold = Untold { ledger: &ledger, news: ledger.outbox.take().into() };
            while !untold.news.is_empty() {
                self.tell(state, &mut untold, &mut connection).await?;
            }
        }
    }

    /// Tells others of the first news, which are gone then.
    async fn tell(&self, state: &State, untold: &mut Untold<'_>, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let (ledger, live, now) = (untold.ledger, state.live.load_full(), clock::now());
        let limits = &live.snapshot.limits.rules;
        let mut message = Message { from: self.node.clone(), ..Message::default() };
        let (mut told, mut resets, mut count) = (Vec::new(), Vec::new(), 0);
        self.prune(ledger, now);
        self.anew.lock().clear();
        for news in untold.news.iter().take(CHUNK) {
            count += 1;
            match news {
                News::Count(handle, number) => {
                    let entry = ledger.table.change(*handle, |entry| {
                        entry.told();
                        *entry
                    });
                    let limit = limits.iter().find(|limit| limit.number == *number && limit.is_shared());
                    let (Some(entry), Some(limit)) = (entry, limit) else { continue };
                    let ring = ring(limit, &entry.count, now);
                    let known = self.told.lock();
                    // Of whom it is not remembered what was told nothing is told: it would be told again and again.
                    if known.len() + told.len() >= TOLD && !known.contains_key(handle) {
                        continue;
                    }
                    let more = difference(&ring, known.get(handle));
                    if !more.is_empty() {
                        let counts = message.counts.entry(limit.id.to_string()).or_default();
                        counts.width = ring.width;
                        counts.clients.push((Id(*handle), more));
                    }
                    told.push((*handle, ring));
                }
                News::Ban(handle, ban) => message.bans.push(Penalty::new(*handle, ban, now)),
                News::Reset(handle) => {
                    // What is counted from here on is more than nothing. Others forget first, whatever the order here.
                    self.told.lock().remove(handle);
                    told.retain(|(known, _)| known != handle);
                    message.counts.values_mut().for_each(|counts| counts.clients.retain(|(Id(known), _)| known != handle));
                    message.bans.retain(|penalty| penalty.handle.0 != *handle);
                    message.resets.push(Id(*handle));
                    resets.extend(limits.iter().filter(|limit| limit.strict).map(|limit| self.counter(*handle, &limit.quota)));
                }
            }
        }
        if !resets.is_empty() {
            redis::cmd("DEL").arg(resets).query_async::<()>(connection).await?;
        }
        self.send(connection, &self.everybody(), &message).await?;
        // Only what was sent was told, and of who began anew meanwhile nothing was.
        untold.news.drain(..count);
        let anew = self.anew.lock();
        self.told.lock().extend(told.into_iter().filter(|(handle, _)| !anew.contains(handle)));
        Ok(())
    }

    fn hello(&self) -> Message {
        Message { from: self.node.clone(), hello: Some(self.nodes.lock().hello), ..Message::default() }
    }

    /// Forgets what others were told of clients of whom nothing is counted any more, now and then.
    fn prune(&self, ledger: &Ledger, now: Moment) {
        let mut told = self.told.lock();
        let pruned = Moment(Duration::from_millis(self.pruned.load(Relaxed)));
        if told.len() < TOLD / 2 || now.since(pruned) < PRUNE {
            return;
        }
        self.pruned.store(now.millis(), Relaxed);
        told.retain(|handle, _| ledger.table.get(*handle).is_some_and(|entry| !entry.is_over(now)));
    }

    /// Tells a node where this one is.
    async fn tell_all(
        &self,
        state: &State,
        ledger: &Ledger,
        connection: &mut MultiplexedConnection,
        node: &str,
        question: u64,
    ) -> RedisResult<()> {
        let now = clock::now();
        let shared = shared_limits(state);
        let mut messages = Vec::new();
        let told: Vec<_> = self.told.lock().iter().map(|(handle, told)| (*handle, *told)).collect();
        for chunk in told.chunks(CHUNK) {
            let mut message = Message::default();
            for (handle, told) in chunk {
                // Rings of before a reload mean nothing now.
                let Some(id) = ledger.id(told.limit).filter(|id| shared.contains(&(id.to_string(), told.width))) else {
                    continue;
                };
                // What has aged out since is not told.
                let passed = (now.millis() / told.width.max(1)).saturating_sub(told.bucket);
                let mut ages = vec![0; usize::try_from(passed).unwrap_or(BUCKETS).min(BUCKETS)];
                ages.extend(told.ages.iter().take(BUCKETS - ages.len()));
                if ages.iter().any(|count| *count > 0) {
                    let counts = message.counts.entry(id.into()).or_default();
                    counts.width = told.width;
                    counts.clients.push((Id(*handle), ages));
                }
            }
            messages.push(message);
        }
        for chunk in ledger.book.bans(now).chunks(CHUNK) {
            let bans = chunk.iter().map(|(handle, ban)| Penalty::new(*handle, ban, now)).collect();
            messages.push(Message { bans, ..Message::default() });
        }
        // There is always a last one.
        messages.push(Message::default());
        let (id, parts) = (fastrand::u64(..), messages.len());
        for (n, message) in messages.into_iter().enumerate() {
            let answer = Some(Answer { to: question, id, last: n + 1 == parts });
            self.send(connection, &self.only(node), &Message { from: self.node.clone(), answer, ..message }).await?;
        }
        Ok(())
    }

    async fn send(&self, connection: &mut MultiplexedConnection, channel: &str, message: &Message) -> RedisResult<()> {
        let text = serde_json::to_vec(message).map_err(std::io::Error::other)?;
        redis::cmd("PUBLISH").arg(channel).arg(text).query_async(connection).await
    }

    /// Takes in what another node tells.
    pub(super) fn received(&self, state: &State, payload: &[u8]) {
        let message = match serde_json::from_slice::<Message>(payload) {
            Ok(message) if message.from == self.node || message.from.len() > 64 => return,
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%error, "a message of the cluster is not understood");
                return;
            }
        };
        let now = clock::now();
        let mut nodes = self.nodes.lock();
        if let Some(question) = message.hello.filter(|_| nodes.asking.len() < NODES) {
            nodes.asking.insert(message.from.clone(), question);
        }
        // Differences of one whose beginning was missed say nothing; the answer that is on its way has them.
        let (counts, messages) = match message.answer {
            Some(answer) => (true, nodes.told(answer, message).unwrap_or_default()),
            None => (nodes.knows(&message.from, now), vec![message]),
        };
        let wakes = !nodes.asking.is_empty() || !nodes.unknown.is_empty();
        // Under the lock: what is cleared when nodes meet again is not filled by what was told before.
        if let Some(ledger) = state.memory.known_ledger() {
            messages.iter().for_each(|message| self.take_in(state, &ledger, message, counts, now));
        }
        drop(nodes);
        if wakes {
            self.met.notify(usize::MAX);
        }
    }

    fn take_in(&self, state: &State, ledger: &Ledger, message: &Message, counts: bool, now: Moment) {
        let live = state.live.load_full();
        let known = |id: &str| live.snapshot.limits.rules.iter().find(|limit| *limit.id == *id);
        for Id(handle) in &message.resets {
            self.anew.lock().insert(*handle);
            self.told.lock().remove(handle);
            ledger.reset(*handle, false);
        }
        for (id, Counts { width, clients }) in message.counts.iter().filter(|_| counts) {
            let (Some(limit), Some(others)) = (known(id).filter(|limit| limit.is_shared()), &ledger.others) else { continue };
            // A node in the middle of a reload counts in other buckets.
            if *width != self::width(limit) {
                continue;
            }
            for (Id(handle), ages) in clients {
                others.with(*handle, limit.number, now, |entry| {
                    for (age, count) in (0u32..).zip(ages).take(BUCKETS).filter(|(_, count)| **count > 0) {
                        // Their buckets begin at other times: rather a bucket too long than a moment too short.
                        entry.count.add_aged(&limit.quota, *count, age.saturating_sub(1), now);
                    }
                    entry.weigh(entry.count.used(&limit.quota, 1, now).left, limit.quota.most());
                });
            }
        }
        for penalty in &message.bans {
            let Some(limit) = known(&penalty.limit) else { continue };
            // No penalty of another node lasts longer than one of this node may.
            let until = now.after(Duration::from_millis(penalty.left).min(LONGEST));
            let key: String = penalty.key.chars().filter(|c| !c.is_control()).take(NAME).collect();
            let ban = Ban { limit: limit.id.clone(), key: key.into(), until };
            ledger.ban(penalty.handle.0, limit.number, ban, now);
        }
    }
}

/// Limits that nodes tell each other of, and the width of their buckets.
fn shared_limits(state: &State) -> BTreeSet<(String, u64)> {
    let live = state.live.load();
    let shared = live.snapshot.limits.rules.iter().filter(|limit| limit.is_shared());
    shared.map(|limit| (limit.id.to_string(), width(limit))).collect()
}

fn width(limit: &Limit) -> u64 {
    u64::try_from(limit.quota.bucket().as_millis()).unwrap_or(u64::MAX).max(1)
}

fn ring(limit: &Limit, count: &crate::limits::quota::Count, now: Moment) -> Told {
    let width = width(limit);
    Told { limit: limit.number, ages: count.ages(&limit.quota, now), bucket: now.millis() / width, width }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(ages: &[u32], bucket: u64) -> Told {
        let mut all = [0; BUCKETS];
        all[..ages.len()].copy_from_slice(ages);
        Told { limit: 0, ages: all, bucket, width: 1_000 }
    }

    #[test]
    fn answers_count_as_a_whole_and_once() {
        let mut nodes = Acquaintances::default();
        let now = Moment::default();
        assert!(!nodes.knows("b", now) && nodes.unknown.contains("b"));
        nodes.unknown.clear();
        assert!(!nodes.knows("b", now) && nodes.unknown.is_empty(), "it is asked once");
        assert!(!nodes.knows("b", now.after(ASK_AGAIN)) && nodes.unknown.contains("b"), "and again if it does not answer");
        let part = |to, id, last| (Answer { to, id, last }, Message { from: "b".to_owned(), ..Message::default() });
        let mut hear = |to, id, last| {
            let (answer, message) = part(to, id, last);
            nodes.told(answer, message).map(|parts| parts.len())
        };
        let hello = Acquaintances::default().hello;
        assert_eq!(hear(hello, 1, true), None, "that is the answer to another's question");
        let hello = nodes.hello;
        let mut hear = |id, last| {
            let (answer, message) = part(hello, id, last);
            nodes.told(answer, message).map(|parts| parts.len())
        };
        assert_eq!(hear(1, false), None);
        assert_eq!(hear(2, false), None, "it began anew");
        assert_eq!(hear(2, true), Some(2));
        assert_eq!(hear(3, true), None, "it is known already");
        assert!(nodes.knows("b", now));
    }

    #[test]
    fn only_what_is_new_is_told() {
        let before = told(&[3, 2], 100);
        for (now, more) in [
            (told(&[3, 2], 100), vec![]),
            (told(&[5, 2], 100), vec![2]),
            // One bucket later what was the newest is the second.
            (told(&[1, 4, 2], 101), vec![1, 1]),
            (told(&[7], 150), vec![7]),
            // What was given back is not told, nor is anything else because of it.
            (told(&[2, 2], 100), vec![]),
        ] {
            assert_eq!(difference(&now, Some(&before)), more, "{now:?}");
        }
        assert_eq!(difference(&before, None), [3, 2]);
        let wider = Told { width: 2_000, ..before };
        assert_eq!(difference(&before, Some(&wider)), [3, 2], "another quota is told anew");
    }
}
