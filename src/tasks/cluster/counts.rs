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
use crate::limits::book::Ban;
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
/// No penalty of another node lasts longer than one of this node may, and no name is longer than is ever shown.
const LONGEST: Duration = Duration::from_secs(30 * 86_400);
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
    /// It does not know where the receiver is, and asks.
    #[serde(default, skip_serializing_if = "is_false")]
    hello: bool,
    /// The answer: from here on it is known.
    #[serde(default, skip_serializing_if = "is_false")]
    known: bool,
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

fn is_false(value: &bool) -> bool {
    !value
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
            self.ledger.outbox.put_back(std::mem::take(&mut self.news).into());
        }
    }
}

/// Whom this node knows since it connected, and who wants to know it.
#[derive(Debug, Default)]
pub(super) struct Acquaintances {
    /// They told where they are: what they tell from then on is more.
    known: HashSet<String>,
    /// They were asked, and when.
    asked: HashMap<String, Moment>,
    /// They ask.
    asking: BTreeSet<String>,
    /// They shall be asked.
    unknown: BTreeSet<String>,
}

/// Nodes that are remembered, of each kind: a process that was started again is another.
const NODES: usize = 16 << 10;
/// A node that does not answer is asked again after this long.
const ASK_AGAIN: Duration = Duration::from_secs(1);

impl Acquaintances {
    /// Is what this node tells more than what is known of it? If not, it shall be asked.
    fn knows(&mut self, node: &str, now: Moment) -> bool {
        if self.known.contains(node) {
            return true;
        }
        let due = self.asked.get(node).is_none_or(|then| now.since(*then) >= ASK_AGAIN);
        if due && self.asked.len() < NODES && self.unknown.len() < NODES {
            self.asked.insert(node.to_owned(), now);
            self.unknown.insert(node.to_owned());
        }
        false
    }
}

impl Cluster {
    /// Tells others what is new, and who asks everything, until the connection ends.
    pub(super) async fn publish(&self, state: &State, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        let hello = Message { from: self.node.clone(), hello: true, ..Message::default() };
        self.send(&mut connection, &self.everybody(), &hello).await?;
        let ledger = loop {
            match state.memory.known_ledger() {
                Some(ledger) => break ledger,
                None => sleep(NO_LIMITS).await,
            }
        };
        loop {
            // First listen, then look.
            let (filled, urgent, met) = (ledger.outbox.filled.listen(), ledger.outbox.urgent.listen(), self.met.listen());
            let (asking, unknown) = {
                let mut nodes = self.nodes.lock();
                (std::mem::take(&mut nodes.asking), std::mem::take(&mut nodes.unknown))
            };
            for node in asking {
                self.tell_all(&ledger, &mut connection, &node).await?;
            }
            for node in unknown {
                self.send(&mut connection, &self.only(&node), &hello).await?;
            }
            if ledger.outbox.is_empty() {
                tokio::select! {
                    () = filled => {}
                    () = met => continue,
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
                    // What is counted from here on is more than nothing.
                    self.told.lock().remove(handle);
                    told.retain(|(known, _)| known != handle);
                    message.resets.push(Id(*handle));
                    resets.extend(limits.iter().filter(|limit| limit.strict).map(|limit| self.counter(*handle, &limit.quota)));
                }
            }
        }
        self.send(connection, &self.everybody(), &message).await?;
        for key in resets {
            redis::cmd("DEL").arg(key).query_async::<()>(connection).await?;
        }
        // Only what was sent was told.
        untold.news.drain(..count);
        self.told.lock().extend(told);
        Ok(())
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
    async fn tell_all(&self, ledger: &Ledger, connection: &mut MultiplexedConnection, node: &str) -> RedisResult<()> {
        let now = clock::now();
        let mut messages = Vec::new();
        let told: Vec<_> = self.told.lock().iter().map(|(handle, told)| (*handle, *told)).collect();
        for chunk in told.chunks(CHUNK) {
            let mut message = Message::default();
            for (handle, told) in chunk {
                let Some(id) = ledger.id(told.limit) else { continue };
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
        // With this it knows everything.
        messages.push(Message { known: true, ..Message::default() });
        for message in messages {
            self.send(connection, &self.only(node), &Message { from: self.node.clone(), ..message }).await?;
        }
        Ok(())
    }

    async fn send(&self, connection: &mut MultiplexedConnection, channel: &str, message: &Message) -> RedisResult<()> {
        let text = serde_json::to_vec(message).map_err(std::io::Error::other)?;
        redis::cmd("PUBLISH").arg(channel).arg(text).query_async(connection).await
    }

    /// Takes in what another node tells; `own`: it tells this node alone.
    pub(super) fn received(&self, state: &State, payload: &[u8], own: bool) {
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
        if message.hello && nodes.asking.len() < NODES {
            nodes.asking.insert(message.from.clone());
        }
        // Differences of one whose beginning was missed say nothing; the answer that is on its way has them. A second
        // answer says nothing new.
        let counts = if own { !nodes.known.contains(&message.from) } else { nodes.knows(&message.from, now) };
        if message.known && nodes.known.len() < NODES {
            nodes.known.insert(message.from.clone());
            nodes.asked.remove(&message.from);
        }
        let wakes = !nodes.asking.is_empty() || !nodes.unknown.is_empty();
        drop(nodes);
        if wakes {
            self.met.notify(usize::MAX);
        }
        if let Some(ledger) = state.memory.known_ledger() {
            self.take_in(state, &ledger, &message, counts, now);
        }
    }

    fn take_in(&self, state: &State, ledger: &Ledger, message: &Message, counts: bool, now: Moment) {
        let live = state.live.load_full();
        let known = |id: &str| live.snapshot.limits.rules.iter().find(|limit| *limit.id == *id);
        for (id, Counts { width, clients }) in message.counts.iter().filter(|_| counts) {
            let (Some(limit), Some(others)) = (known(id).filter(|limit| limit.is_shared()), &ledger.others) else { continue };
            // A node in the middle of a reload counts in other buckets.
            if *width != self::width(limit) {
                continue;
            }
            for (Id(handle), ages) in clients {
                others.with(*handle, limit.number, now, |entry| {
                    for (age, count) in (0..).zip(ages).take(BUCKETS).filter(|(_, count)| **count > 0) {
                        entry.count.add_aged(&limit.quota, *count, age, now);
                    }
                    entry.weigh(entry.count.used(&limit.quota, 1, now).left, limit.quota.most());
                });
            }
        }
        for penalty in &message.bans {
            let Some(limit) = known(&penalty.limit) else { continue };
            let until = now.after(Duration::from_millis(penalty.left).min(LONGEST));
            let key: String = penalty.key.chars().filter(|c| !c.is_control()).take(NAME).collect();
            let ban = Ban { limit: limit.id.clone(), key: key.into(), until };
            ledger.ban(penalty.handle.0, limit.number, ban, now);
        }
        for Id(handle) in &message.resets {
            self.told.lock().remove(handle);
            ledger.reset(*handle, false);
        }
    }
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
