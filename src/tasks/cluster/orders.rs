//! Orders for regions, and purges, reach every node: by a stream, so that one that was away reads what it missed.
//!
//! Every order carries the time at which it was given, and the latest for a region holds, however often and in which
//! order they arrive. A node that knows a later one than the stream (it was cut off, or Redis forgot) tells it again.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Value};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{Cluster, purges};
use crate::cache::purge::Purge;
use crate::orders::{Given, Stamped};
use crate::state::State;

/// A read waits for so long.
pub(super) const BLOCK: Duration = Duration::from_secs(2);
/// Entries that the stream keeps, about.
pub(super) const KEPT: usize = 10_000;
/// After so many entries an order is told again, before it falls out of the stream.
const AGAIN: u64 = KEPT as u64 / 2;
/// How often it is looked whether Redis forgot them.
const LOOK: Duration = Duration::from_secs(5);

/// Up to where the stream was read, since the connection began.
#[derive(Debug, Default)]
pub(super) struct Read {
    last: Option<String>,
    /// Entries that were read.
    entries: u64,
    /// The last order for each region that stands in it, and as which entry.
    given: HashMap<String, (Given, u64)>,
    /// The regions that this node had when it began to read.
    regions: Vec<Arc<str>>,
}

/// What stands in the stream. What is unknown is left to nodes that know it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Event {
    /// An order for a region.
    Region(Stamped),
    /// Purges.
    Purges {
        /// Where they were asked for.
        node: String,
        /// What.
        purges: Vec<Purge>,
        /// They were told before, and Redis lost them.
        #[serde(default)]
        again: bool,
    },
}

/// What was read.
#[derive(Debug, Default)]
struct Batch {
    orders: Vec<Stamped>,
    purges: Vec<purges::Entry>,
    /// Nothing was there.
    empty: bool,
    /// The first entry.
    first: Option<String>,
}

/// An entry as Redis has it: its id, then names and values in turn.
type Entry = (String, Vec<Value>);

impl Cluster {
    fn stream(&self) -> String {
        format!("{}:orders", self.name)
    }

    /// Reads everything that is there. Only the last order for each region is carried out.
    pub(super) async fn catch_up(&self, state: &Arc<State>, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let regions = state.live.load().snapshot.regions.iter().map(|region| region.name.clone()).collect();
        *self.read.lock() = Read { regions, ..Read::default() };
        let mut last: HashMap<String, Stamped> = HashMap::new();
        let len: usize = redis::cmd("XLEN").arg(self.stream()).query_async(connection).await?;
        let mut begun = false;
        loop {
            let Batch { orders, purges, empty, first } = self.read(connection, None).await?;
            if empty {
                if !begun {
                    self.tell_purges_again(state);
                }
                break;
            }
            if !std::mem::replace(&mut begun, true)
                && let Some(first) = first.as_deref().and_then(purges::id)
            {
                self.begins(state, first, len).await;
            }
            self.purged(state, connection, purges).await?;
            for order in orders {
                self.note(&order);
                match last.get_mut(&order.region) {
                    Some(known) if known.given >= order.given => {}
                    Some(known) => *known = order,
                    None if self.is_ours(&order.region) => drop(last.insert(order.region.clone(), order)),
                    None => {}
                }
            }
        }
        self.apply(state, last.into_values().collect()).await;
        Ok(())
    }

    /// Reads on as orders come, until the connection ends.
    pub(super) async fn follow(&self, state: &Arc<State>, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        loop {
            let Batch { orders, purges, .. } = self.read(&mut connection, Some(BLOCK)).await?;
            self.purged(state, &mut connection, purges).await?;
            self.apply(state, orders).await;
            // A region that came with a reload may have had an order long ago.
            let now: Vec<_> = state.live.load().snapshot.regions.iter().map(|region| region.name.clone()).collect();
            if self.read.lock().regions != now {
                self.catch_up(state, &mut connection).await?;
            }
        }
    }

    fn is_ours(&self, region: &str) -> bool {
        self.read.lock().regions.iter().any(|known| **known == *region)
    }

    /// The stream has this order.
    fn note(&self, order: &Stamped) {
        let mut read = self.read.lock();
        if read.given.len() < KEPT * 2 || read.given.contains_key(&order.region) {
            let entries = read.entries;
            let known = read.given.entry(order.region.clone()).or_default();
            *known = known.clone().max((order.given.clone(), entries));
        }
    }

    /// Carries orders out, one after the other.
    async fn apply(&self, state: &Arc<State>, orders: Vec<Stamped>) {
        for order in orders {
            self.note(&order);
            if !self.is_ours(&order.region) {
                continue;
            }
            let theirs = state.clone();
            // It is written down before the next.
            if let Err(error) = tokio::task::spawn_blocking(move || theirs.orders.apply(&theirs, order)).await {
                tracing::error!(%error, "an order of another node was not carried out");
            }
        }
    }

    /// Reads what comes next.
    async fn read(&self, connection: &mut MultiplexedConnection, block: Option<Duration>) -> RedisResult<Batch> {
        let last = self.read.lock().last.clone().unwrap_or_else(|| "0".to_owned());
        let mut read = redis::cmd("XREAD");
        read.arg("COUNT").arg(100);
        if let Some(block) = block {
            read.arg("BLOCK").arg(u64::try_from(block.as_millis()).unwrap_or(u64::MAX));
        }
        read.arg("STREAMS").arg(self.stream()).arg(last);
        let answer: Option<Vec<(String, Vec<Entry>)>> = read.query_async(connection).await?;
        let mut batch = Batch { empty: true, ..Batch::default() };
        for (id, fields) in answer.into_iter().flatten().flat_map(|(_, entries)| entries) {
            let text = fields.chunks(2).find_map(|pair| match pair {
                [Value::BulkString(name), Value::BulkString(value)] if name == b"event" => Some(value),
                _ => None,
            });
            batch.empty = false;
            batch.first.get_or_insert_with(|| id.clone());
            match text.map(|text| serde_json::from_slice::<Event>(text)) {
                // It would hold for ever against all that follow.
                Some(Ok(Event::Region(order))) if order.given.is_ahead() => {
                    tracing::warn!(region = order.region, "an order of another node is from the future, and is not carried out");
                }
                Some(Ok(Event::Region(order))) => batch.orders.push(order),
                Some(Ok(Event::Purges { node, purges, again })) => {
                    batch.purges.push(purges::Entry { id: id.clone(), node, purges, again });
                }
                Some(Err(error)) => tracing::debug!(%error, id, "an event of the cluster is not understood"),
                None => {}
            }
            let mut read = self.read.lock();
            read.last = Some(id);
            read.entries += 1;
        }
        Ok(batch)
    }

    /// Tells others of orders that the stream does not have, until the connection ends.
    pub(super) async fn tell_orders(&self, state: &Arc<State>, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        loop {
            // First listen, then look.
            let changed = state.orders.changed.listen();
            let mut first = redis::cmd("XRANGE");
            first.arg(self.stream()).arg("-").arg("+").arg("COUNT").arg(1);
            let first: Vec<Entry> = first.query_async(&mut connection).await?;
            if self.is_forgotten(first.first().map(|(id, _)| &**id)) {
                self.read.lock().given.clear();
                self.tell_purges_again(state);
            }
            let theirs = state.clone();
            let orders = tokio::task::spawn_blocking(move || theirs.orders.stamped(&theirs)).await.unwrap_or_default();
            for order in orders {
                {
                    let read = self.read.lock();
                    let told = read.given.get(&order.region);
                    if told.is_some_and(|(told, at)| *told >= order.given && read.entries - at < AGAIN) {
                        continue;
                    }
                }
                let (region, given) = (order.region.clone(), order.given.clone());
                self.add(&mut connection, &Event::Region(order)).await?;
                let mut read = self.read.lock();
                let entries = read.entries;
                read.given.insert(region, (given, entries));
            }
            // Wakes without a change only to look whether Redis forgot.
            let _ = timeout(LOOK, changed).await;
        }
    }

    /// Adds to the stream; where it stands there.
    pub(super) async fn add(&self, connection: &mut MultiplexedConnection, event: &Event) -> RedisResult<String> {
        let event = serde_json::to_string(event).map_err(std::io::Error::other)?;
        let mut add = redis::cmd("XADD");
        add.arg(self.stream()).arg("MAXLEN").arg("~").arg(KEPT).arg("*").arg("node").arg(&self.node);
        add.arg("event").arg(event).query_async(connection).await
    }
}
