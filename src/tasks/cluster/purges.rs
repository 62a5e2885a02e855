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

/// What purges of this and other nodes are at.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// The last entry that holds here.
    applied: Option<Id>,
    /// What was not told yet, and who wants to know where it stands.
    waiting: VecDeque<(Vec<Purge>, Option<oneshot::Sender<String>>)>,
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
        {
            let mut state = self.purges.lock();
            if state.waiting.len() >= WAITING {
                let at = state.waiting.iter().flat_map(|(all, _)| all).map(|purge| purge.at).max().unwrap_or_default();
                state.waiting.clear();
                state.waiting.push_back((vec![Purge { what: What::Everything, soft: false, at }], None));
            }
            state.waiting.push_back((purges, Some(told)));
        }
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
            while let Some(purges) = self.untold() {
                let event = Event::Purges { node: self.node.clone(), purges };
                let id = self.add(&mut connection, &event).await?;
                let told = self.purges.lock().waiting.pop_front();
                if let Some((_, Some(told))) = told {
                    // Whoever asked may have gone.
                    let _ = told.send(id);
                }
            }
            more.await;
        }
    }

    fn untold(&self) -> Option<Vec<Purge>> {
        self.purges.lock().waiting.front().map(|(purges, _)| purges.clone())
    }

    /// Carries out what other nodes purged.
    pub(super) async fn purged(
        &self,
        state: &Arc<State>,
        connection: &mut MultiplexedConnection,
        entries: Vec<(String, String, Vec<Purge>)>,
    ) -> RedisResult<()> {
        for (text, node, mut purges) in entries {
            let applied = self.purges.lock().applied;
            let Some(id) = id(&text).filter(|id| applied.is_none_or(|applied| applied < *id)) else { continue };
            if node != self.node {
                let now = millis(SystemTime::now());
                let began = !state.memory.cache.ready.load(Relaxed);
                for purge in &mut purges {
                    // Whatever the other's clock says: what is here now is older than what was asked for.
                    purge.at = if began { purge.at.saturating_add(APART.as_millis() as u64) } else { now };
                }
                self.carry_out(state, purges).await;
            }
            self.purges.lock().applied = Some(id);
            let key = self.heard_key(&text);
            redis::pipe().sadd(&key, &self.node).ignore().expire(&key, 60).ignore().query_async::<()>(connection).await?;
        }
        Ok(())
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
        self.carry_out(state, vec![Purge { what: What::Everything, soft: false, at }]).await;
    }

    async fn carry_out(&self, state: &Arc<State>, purges: Vec<Purge>) {
        state.metrics.cache.purges.inc_by(purges.len() as u64);
        let store = state.store;
        match tokio::task::spawn_blocking(move || store.purge(&purges)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "a purge of another node is in force, but will not survive a restart"),
            Err(error) => tracing::error!(%error, "a purge of another node was not carried out"),
        }
    }
}
