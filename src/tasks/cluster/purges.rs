//! Purges reach every node by the stream of orders, and the one that was asked hears who has them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use redis::RedisResult;
use redis::aio::MultiplexedConnection;
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::Cluster;
use super::orders::{Event, KEPT};
use crate::cache::purge::{Purge, What, millis};
use crate::state::State;

/// A node that was not seen for so long is away.
const AWAY: Duration = Duration::from_secs(3);
/// Whoever purges hears of nodes that have it within this time; others get it all the same.
const HEARD: Duration = Duration::from_secs(2);
/// Until it is in the stream.
const TOLD: Duration = Duration::from_secs(1);
/// How often it is looked who has it.
const LOOK: Duration = Duration::from_millis(20);
/// So far may nodes' clocks be apart. What was asked for so shortly after a purge is purged with it on a node that
/// was away.
const APART: Duration = Duration::from_secs(5);
/// Purges that wait for Redis to come back; the oldest of more become one of everything.
const WAITING: usize = 1_000;

/// Where an entry stands in the stream.
pub(super) type Id = (u64, u64);

/// An entry's id: milliseconds and a number.
pub(super) fn id(text: &str) -> Option<Id> {
    let (ms, number) = text.split_once('-')?;
    Some((ms.parse().ok()?, number.parse().ok()?))
}

/// Purges in one entry, where many are told again.
const TOGETHER: usize = 100;

/// What purges of this and other nodes are at.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// The last entry that holds here.
    applied: Option<Id>,
    /// The same when it was last looked whether Redis forgot.
    seen: Option<Id>,
    /// What was not told yet.
    waiting: VecDeque<Waiting>,
    /// How many waited so far.
    numbered: u64,
}

/// What is to be told.
#[derive(Debug)]
struct Waiting {
    number: u64,
    purges: Vec<Purge>,
    /// It was told before, and Redis lost it.
    again: bool,
    /// Who wants to know where it stands.
    told: Option<oneshot::Sender<String>>,
}

impl Told {
    fn add(&mut self, purges: Vec<Purge>, again: bool, told: Option<oneshot::Sender<String>>) {
        if self.waiting.len() >= WAITING {
            let at = self.waiting.iter().flat_map(|waiting| &waiting.purges).map(|purge| purge.at).max().unwrap_or_default();
            self.waiting.clear();
            self.add(vec![Purge { what: What::Everything, soft: false, at }], again, None);
        }
        self.numbered += 1;
        self.waiting.push_back(Waiting { number: self.numbered, purges, again, told });
    }
}

/// Purges as they stand in the stream.
#[derive(Debug)]
pub(super) struct Entry {
    /// Where.
    pub id: String,
    /// The node where they were asked for.
    pub node: String,
    /// What.
    pub purges: Vec<Purge>,
    /// They were told before.
    pub again: bool,
}

/// A node, and whether it has a purge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Heard {
    /// The node's name, for as long as its process lives.
    pub node: String,
    /// It has it.
    pub applied: bool,
}

impl Cluster {
    fn nodes_key(&self) -> String {
        format!("{}:nodes", self.name)
    }

    fn heard_key(&self, id: &str) -> String {
        format!("{}:purged:{id}", self.name)
    }

    /// Tells other nodes of purges; which of them have them. `None`: Redis cannot be reached, they will be told later.
    pub async fn purge(&self, purges: Vec<Purge>) -> Option<Vec<Heard>> {
        let (told, id) = oneshot::channel();
        self.purges.lock().add(purges, false, Some(told));
        self.purged.notify(usize::MAX);
        let id = timeout(TOLD, id).await.ok()?.ok()?;
        let mut connection = (*self.strict.load_full()?).clone();
        let mut heard = Vec::new();
        let all = async {
            loop {
                heard = self.heard(&mut connection, &id).await?;
                if heard.iter().all(|one| one.applied) {
                    return Ok::<_, redis::RedisError>(());
                }
                sleep(LOOK).await;
            }
        };
        // Who has not said so by then is told of as such.
        let _ = timeout(HEARD, all).await;
        Some(heard)
    }

    async fn heard(&self, connection: &mut MultiplexedConnection, id: &str) -> RedisResult<Vec<Heard>> {
        let since = millis(SystemTime::now()).saturating_sub(AWAY.as_millis() as u64);
        let (nodes, have): (Vec<String>, Vec<String>) = redis::pipe()
            .zrangebyscore(self.nodes_key(), since, "+inf")
            .smembers(self.heard_key(id))
            .query_async(connection)
            .await?;
        Ok(nodes.into_iter().map(|node| Heard { applied: have.contains(&node), node }).collect())
    }

    /// This node is there.
    pub(super) async fn show(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let now = millis(SystemTime::now());
        let long_ago = now.saturating_sub(AWAY.as_millis() as u64 * 100);
        redis::pipe()
            .zadd(self.nodes_key(), &self.node, now)
            .ignore()
            .zrembyscore(self.nodes_key(), "-inf", long_ago)
            .ignore()
            .query_async(connection)
            .await
    }

    /// Tells others of purges that were asked for here, until the connection ends.
    pub(super) async fn tell_purges(&self, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        loop {
            // First listen, then look.
            let more = self.purged.listen();
            while let Some((number, event)) = self.untold() {
                let id = self.add(&mut connection, &event).await?;
                let told = {
                    let waiting = &mut self.purges.lock().waiting;
                    // Too many may have come meanwhile, and made one of all that waited.
                    let same = waiting.front().is_some_and(|first| first.number == number);
                    if same { waiting.pop_front().and_then(|first| first.told) } else { None }
                };
                if let Some(told) = told {
                    // Whoever asked may have gone.
                    let _ = told.send(id);
                }
            }
            more.await;
        }
    }

    /// Does the stream begin after everything that this node had seen of it when it was asked last? Then it is another.
    pub(super) fn is_forgotten(&self, first: Option<&str>) -> bool {
        let mut told = self.purges.lock();
        let (before, now) = (told.seen, told.applied);
        told.seen = now;
        match (first.and_then(id), before) {
            (None, _) => true,
            (Some(first), Some(before)) => before < first,
            (Some(_), None) => false,
        }
    }

    fn untold(&self) -> Option<(u64, Event)> {
        let state = self.purges.lock();
        let Waiting { number, purges, again, told: _ } = state.waiting.front()?;
        Some((*number, Event::Purges { node: self.node.clone(), purges: purges.clone(), again: *again }))
    }

    /// Redis forgot what it was told: a node that begins now has to hear of it all the same.
    pub(super) fn tell_purges_again(&self, state: &State) {
        let mut all = state.memory.cache.purges.all();
        all.sort_unstable_by_key(|purge| std::cmp::Reverse(purge.at));
        if let Some(older) = all.get(KEPT).map(|purge| purge.at) {
            all.truncate(KEPT);
            all.push(Purge { what: What::Everything, soft: false, at: older });
        }
        let mut told = self.purges.lock();
        // Should Redis take nothing yet, once is enough.
        told.waiting.retain(|waiting| !waiting.again);
        for some in all.chunks(TOGETHER) {
            told.add(some.to_vec(), true, None);
        }
        drop(told);
        self.purged.notify(usize::MAX);
    }

    /// Carries out what other nodes purged, all of it at once: to be told of is to be on disk.
    pub(super) async fn purged(
        &self,
        state: &Arc<State>,
        connection: &mut MultiplexedConnection,
        entries: Vec<Entry>,
    ) -> RedisResult<()> {
        let applied = self.purges.lock().applied;
        let is_new = |entry: &Entry| applied.is_none_or(|applied| id(&entry.id).is_some_and(|id| applied < id));
        let entries: Vec<Entry> = entries.into_iter().filter(is_new).collect();
        let Some(last) = entries.last().and_then(|entry| id(&entry.id)) else { return Ok(()) };
        let now = millis(SystemTime::now());
        let began = !state.memory.cache.ready.load(Relaxed);
        let mut theirs = Vec::new();
        let mut heard = redis::pipe();
        for Entry { id, node, mut purges, again } in entries {
            let key = self.heard_key(&id);
            heard.sadd(&key, &self.node).ignore().expire(&key, 60).ignore();
            if node == self.node {
                continue;
            }
            for purge in &mut purges {
                // Whatever the other's clock says: what is here now is older than what was asked for.
                purge.at = if began || again { purge.at.saturating_add(APART.as_millis() as u64) } else { now };
            }
            theirs.append(&mut purges);
        }
        if !theirs.is_empty() {
            self.carry_out(state, theirs).await;
        }
        self.purges.lock().applied = Some(last);
        heard.query_async(connection).await
    }

    /// The stream begins at `first`, and has `len` entries. What stood before that may have been purges that this node
    /// does not know.
    pub(super) async fn begins(&self, state: &Arc<State>, first: Id, len: usize) {
        let applied = self.purges.lock().applied;
        let at = match applied {
            Some(applied) if applied < first => millis(SystemTime::now()),
            Some(_) => return,
            None if len >= KEPT => first.0,
            None => return,
        };
        tracing::warn!("purges of other nodes may have been missed: everything older is purged");
        if applied.is_some() {
            // Or Redis has forgotten, and somebody else began anew.
            self.tell_purges_again(state);
        }
        self.carry_out(state, vec![Purge { what: What::Everything, soft: false, at }]).await;
    }

    async fn carry_out(&self, state: &Arc<State>, purges: Vec<Purge>) {
        state.metrics.cache.purges.inc_by(purges.len() as u64);
        if let Err(error) = state.store.purge_and_keep(purges).await {
            tracing::error!(%error, "a purge of another node is in force, but will not survive a restart");
        }
    }
}
