//! Orders for regions reach every node: by a stream, so that one that was away reads what it missed.
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

use super::Cluster;
use crate::orders::Stamped;
use crate::state::State;

/// A read waits for so long.
pub(super) const BLOCK: Duration = Duration::from_secs(2);
/// Orders that the stream keeps, about.
const KEPT: usize = 1_000;
/// How often it is looked whether Redis forgot them.
const LOOK: Duration = Duration::from_secs(5);

/// Up to where the stream was read.
#[derive(Debug, Default)]
pub(super) struct Read {
    last: Option<String>,
    /// The time of the last order for each region that stands in it.
    stamps: HashMap<String, u64>,
}

/// What stands in the stream. What is unknown is left to nodes that know it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Event {
    /// An order for a region.
    Region(Stamped),
}

impl Cluster {
    fn stream(&self) -> String {
        format!("{}:orders", self.name)
    }

    /// Reads everything that is there.
    pub(super) async fn catch_up(&self, state: &Arc<State>, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        while self.read(state, connection, None).await? > 0 {}
        Ok(())
    }

    /// Reads on as orders come, until the connection ends.
    pub(super) async fn follow(&self, state: &Arc<State>, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        loop {
            self.read(state, &mut connection, Some(BLOCK)).await?;
        }
    }

    /// Reads the next orders; how many there were.
    async fn read(&self, state: &Arc<State>, connection: &mut MultiplexedConnection, block: Option<Duration>) -> RedisResult<usize> {
        let last = self.read.lock().last.clone().unwrap_or_else(|| "0".to_owned());
        let mut read = redis::cmd("XREAD");
        read.arg("COUNT").arg(100);
        if let Some(block) = block {
            read.arg("BLOCK").arg(u64::try_from(block.as_millis()).unwrap_or(u64::MAX));
        }
        read.arg("STREAMS").arg(self.stream()).arg(last);
        // [[stream, [[id, [field, value, …]], …]]], or nothing.
        let answer: Option<Vec<(String, Vec<(String, Vec<Value>)>)>> = read.query_async(connection).await?;
        let entries: Vec<_> = answer.into_iter().flatten().flat_map(|(_, entries)| entries).collect();
        let found = entries.len();
        for (id, fields) in entries {
            let text = fields.chunks(2).find_map(|pair| match pair {
                [Value::BulkString(name), Value::BulkString(value)] if name == b"event" => Some(value.clone()),
                _ => None,
            });
            match text.as_deref().map(serde_json::from_slice::<Event>) {
                Some(Ok(Event::Region(order))) => {
                    let stamp = (order.region.clone(), order.at);
                    let theirs = state.clone();
                    // It is written down before the next is read.
                    let applied = tokio::task::spawn_blocking(move || theirs.orders.apply(&theirs, order)).await;
                    if let Err(error) = applied {
                        tracing::error!(%error, "an order of another node was not carried out");
                    }
                    let mut read = self.read.lock();
                    let known = read.stamps.entry(stamp.0).or_default();
                    *known = (*known).max(stamp.1);
                }
                Some(Err(error)) => tracing::debug!(%error, id, "an event of the cluster is not understood"),
                None => tracing::debug!(id, "an event of the cluster is empty"),
            }
            self.read.lock().last = Some(id);
        }
        Ok(found)
    }

    /// Tells others of orders that the stream does not have, until the connection ends.
    pub(super) async fn tell_orders(&self, state: &State, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        loop {
            // First listen, then look.
            let changed = state.orders.changed.listen();
            let exists: bool = redis::cmd("EXISTS").arg(self.stream()).query_async(&mut connection).await?;
            if !exists {
                self.read.lock().stamps.clear();
            }
            for order in state.orders.stamped(state) {
                if self.read.lock().stamps.get(&order.region).is_some_and(|told| *told >= order.at) {
                    continue;
                }
                let (region, at) = (order.region.clone(), order.at);
                let event = serde_json::to_string(&Event::Region(order)).map_err(std::io::Error::other)?;
                let mut add = redis::cmd("XADD");
                add.arg(self.stream()).arg("MAXLEN").arg("~").arg(KEPT).arg("*").arg("node").arg(&self.node);
                add.arg("event").arg(event).query_async::<()>(&mut connection).await?;
                self.read.lock().stamps.insert(region, at);
            }
            // Wakes without a change only to look whether Redis forgot.
            let _ = timeout(LOOK, changed).await;
        }
    }
}
