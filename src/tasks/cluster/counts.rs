//! What nodes tell each other of limits: differences of rings, penalties, and who begins anew.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use redis::RedisResult;
use redis::aio::MultiplexedConnection;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
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
#[serde(deny_unknown_fields)]
struct Message {
    /// The node.
    from: String,
    /// It is new, and wants to know where everybody is.
    #[serde(default, skip_serializing_if = "is_false")]
    hello: bool,
    /// By limit and client: what was counted more, by age in buckets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    counts: BTreeMap<String, Vec<(String, Vec<u32>)>>,
    /// Penalties.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    bans: Vec<Penalty>,
    /// Clients that begin anew.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    resets: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Penalty {
    limit: String,
    key: String,
    handle: String,
    /// Milliseconds until it ends: no two clocks have to agree.
    left: u64,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn hex(handle: Handle) -> String {
    format!("{:016x}", handle.0)
}

fn handle(hex: &str) -> Option<Handle> {
    u64::from_str_radix(hex, 16).ok().map(Handle)
}

impl Penalty {
    fn new(handle: Handle, ban: &Ban, now: Moment) -> Self {
        let left = ban.until.since(now).as_millis();
        let left = u64::try_from(left).unwrap_or(u64::MAX);
        Self { limit: ban.limit.to_string(), key: ban.key.to_string(), handle: hex(handle), left }
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

impl Cluster {
    /// Tells others what is new, and newcomers everything, until the connection ends.
    pub(super) async fn publish(
        &self,
        state: &State,
        mut connection: MultiplexedConnection,
        mut greeted: mpsc::Receiver<String>,
    ) -> RedisResult<Infallible> {
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
            let (filled, urgent) = (ledger.outbox.filled.listen(), ledger.outbox.urgent.listen());
            let mut news = ledger.outbox.take();
            if news.is_empty() {
                tokio::select! {
                    () = filled => {}
                    Some(newcomer) = greeted.recv() => {
                        self.tell_all(&ledger, &mut connection, &newcomer).await?;
                        continue;
                    }
                }
                tokio::select! {
                    () = sleep(CALM) => {}
                    () = urgent => sleep(URGENT).await,
                }
                news = ledger.outbox.take();
            }
            for chunk in news.chunks(CHUNK) {
                self.tell(state, &ledger, chunk, &mut connection).await?;
            }
        }
    }

    /// Tells others of `news`.
    async fn tell(
        &self,
        state: &State,
        ledger: &Ledger,
        news: &[News],
        connection: &mut MultiplexedConnection,
    ) -> RedisResult<()> {
        let live = state.live.load_full();
        let now = clock::now();
        let mut message = Message { from: self.node.clone(), ..Message::default() };
        let mut told = Vec::new();
        for news in news {
            match news {
                News::Count(handle, number) => {
                    let entry = ledger.table.change(*handle, |entry| {
                        entry.told();
                        *entry
                    });
                    let limit = live.snapshot.limits.rules.iter().find(|limit| limit.number == *number);
                    let (Some(entry), Some(limit)) = (entry, limit) else { continue };
                    let ring = ring(limit, &entry.count, now);
                    let more = difference(&ring, self.told.lock().get(handle));
                    if !more.is_empty() {
                        message.counts.entry(limit.id.to_string()).or_default().push((hex(*handle), more));
                    }
                    told.push((*handle, ring));
                }
                News::Ban(handle, ban) => message.bans.push(Penalty::new(*handle, ban, now)),
                News::Reset(handle) => {
                    self.told.lock().remove(handle);
                    message.resets.push(hex(*handle));
                }
            }
        }
        self.send(connection, &self.everybody(), &message).await?;
        // Only what was sent was told.
        let mut all = self.told.lock();
        for (handle, ring) in told {
            all.insert(handle, ring);
        }
        if all.len() > TOLD {
            all.retain(|handle, _| ledger.table.get(*handle).is_some_and(|entry| !entry.is_over(now)));
        }
        Ok(())
    }

    /// Tells a newcomer what everybody else knows.
    async fn tell_all(&self, ledger: &Ledger, connection: &mut MultiplexedConnection, newcomer: &str) -> RedisResult<()> {
        let now = clock::now();
        let mut messages = vec![Message::default()];
        let told: Vec<_> = self.told.lock().iter().map(|(handle, told)| (*handle, *told)).collect();
        for chunk in told.chunks(CHUNK) {
            let mut message = Message::default();
            for (handle, told) in chunk {
                let Some(id) = ledger.id(told.limit) else { continue };
                // What has aged out since is not told.
                let passed = now.millis() / told.width.max(1) - told.bucket;
                let mut ages = vec![0; usize::try_from(passed).unwrap_or(BUCKETS).min(BUCKETS)];
                ages.extend(told.ages.iter().take(BUCKETS - ages.len()));
                if ages.iter().any(|count| *count > 0) {
                    message.counts.entry(id.into()).or_default().push((hex(*handle), ages));
                }
            }
            messages.push(message);
        }
        for chunk in ledger.book.bans(now).chunks(CHUNK) {
            let bans = chunk.iter().map(|(handle, ban)| Penalty::new(*handle, ban, now)).collect();
            messages.push(Message { bans, ..Message::default() });
        }
        for message in messages.into_iter().filter(|m| !m.counts.is_empty() || !m.bans.is_empty()) {
            self.send(connection, &self.only(newcomer), &Message { from: self.node.clone(), ..message }).await?;
        }
        Ok(())
    }

    async fn send(&self, connection: &mut MultiplexedConnection, channel: &str, message: &Message) -> RedisResult<()> {
        let text = serde_json::to_vec(message).map_err(std::io::Error::other)?;
        redis::cmd("PUBLISH").arg(channel).arg(text).query_async(connection).await
    }

    /// Takes in what another node tells; a newcomer's name, if it is one.
    pub(super) fn received(&self, state: &State, payload: &[u8]) -> Option<String> {
        let message = match serde_json::from_slice::<Message>(payload) {
            Ok(message) if message.from == self.node => return None,
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%error, "a message of the cluster is not understood");
                return None;
            }
        };
        if let Some(ledger) = state.memory.known_ledger() {
            self.take_in(state, &ledger, &message);
        }
        message.hello.then_some(message.from)
    }

    fn take_in(&self, state: &State, ledger: &Ledger, message: &Message) {
        let live = state.live.load_full();
        let now = clock::now();
        let known = |id: &str| live.snapshot.limits.rules.iter().find(|limit| *limit.id == *id);
        for (id, clients) in &message.counts {
            let (Some(limit), Some(others)) = (known(id), &ledger.others) else { continue };
            for (hex, ages) in clients {
                let Some(handle) = handle(hex) else { continue };
                others.with(handle, limit.number, now, |entry| {
                    for (age, count) in (0..).zip(ages).filter(|(_, count)| **count > 0) {
                        entry.count.add_aged(&limit.quota, *count, age, now);
                    }
                });
            }
        }
        for penalty in &message.bans {
            let (Some(limit), Some(handle)) = (known(&penalty.limit), handle(&penalty.handle)) else { continue };
            let until = now.after(Duration::from_millis(penalty.left));
            let ban = Ban { limit: limit.id.clone(), key: penalty.key.as_str().into(), until };
            ledger.ban(handle, limit.number, ban, now);
        }
        for handle in message.resets.iter().filter_map(|hex| handle(hex)) {
            self.told.lock().remove(&handle);
            ledger.reset(handle, false);
        }
    }
}

fn ring(limit: &Limit, count: &crate::limits::quota::Count, now: Moment) -> Told {
    let width = u64::try_from(limit.quota.bucket().as_millis()).unwrap_or(u64::MAX).max(1);
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
