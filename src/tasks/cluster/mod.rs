//! Other nodes, through Redis or Valkey. Requests are decided on what this node knows; the rest happens here.
//!
//! ```text
//!  limits ─ outbox ─► after 10 to 50 ms, what is new ─► PUBLISH ─► other nodes: `Ledger::others`
//!  orders for regions ──────────────────────────────► XADD ────► other nodes, also those that were away
//!  a limit with `consistency: strict` ─ 5 ms ────────► one script, and a breaker before it
//! ```
//!
//! Redis keeps nothing that cannot be lost: counts are each node's own, and each node knows the last order for every
//! region. While it is away every node counts for itself; when it comes back nodes tell each other where they are.

mod counts;
mod orders;
pub mod purges;

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use event_listener::Event;
use futures_util::StreamExt;
use parking_lot::Mutex;
use redis::aio::{MultiplexedConnection, PubSubSink, PubSubStream};
use redis::{AsyncConnectionConfig, Client, RedisResult, Script};
use tokio::time::{sleep, timeout};

use crate::config;
use crate::limits::quota::{Quota, Used};
use crate::limits::table::Handle;
use crate::limits::{Question, Shared};
use crate::proxy::clock;
use crate::request::Moment;
use crate::state::State;

/// A request waits for Redis for at most this long, and only under `consistency: strict`.
const STRICT: Duration = Duration::from_millis(5);
/// So many answers in a row that did not come in time open the breaker,
const FAILURES: u32 = 5;
/// and it stays open for this long.
const OPEN: Duration = Duration::from_secs(1);
/// For connecting, and for every answer that no request waits for.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is asked whether Redis is there.
const PING: Duration = Duration::from_millis(500);
/// A process that begins does not answer from its cache before it knows what other nodes purged, unless nobody can
/// tell it for so long.
const UNPURGED: Duration = Duration::from_secs(10);
/// Pauses before connecting again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// The other nodes.
pub struct Cluster {
    client: Client,
    /// Begins every key.
    name: String,
    /// This node, for as long as the process lives.
    node: String,
    strict: ArcSwapOption<MultiplexedConnection>,
    script: Script,
    breaker: Breaker,
    connected: AtomicBool,
    /// What others were told of this node's counts.
    told: Mutex<HashMap<Handle, counts::Told>>,
    /// When it was last looked which of these are over, in milliseconds.
    pruned: AtomicU64,
    nodes: Mutex<counts::Acquaintances>,
    /// Clients that began anew while something was being told.
    anew: Mutex<HashSet<Handle>>,
    /// A node asks, or is to be asked.
    met: Event,
    /// Up to where orders were read.
    read: Mutex<orders::Read>,
    /// Purges of this node and of others.
    purges: Mutex<purges::Told>,
    /// Something was purged here.
    purged: Event,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("name", &self.name).field("node", &self.node).finish_non_exhaustive()
    }
}

/// Opens after several failures in a row, so that not every request waits in vain.
#[derive(Debug, Default)]
struct Breaker {
    failures: AtomicU32,
    /// Milliseconds of the process's clock.
    until: AtomicU64,
}

impl Breaker {
    fn is_open(&self) -> bool {
        clock::now().millis() < self.until.load(Relaxed)
    }

    fn record(&self, good: bool) {
        if good {
            self.failures.store(0, Relaxed);
        } else if self.failures.fetch_add(1, Relaxed) + 1 >= FAILURES {
            self.failures.store(0, Relaxed);
            self.until.store(clock::now().after(OPEN).millis(), Relaxed);
        }
    }
}

impl Cluster {
    /// Nothing is connected yet. The URL was checked with the configuration.
    pub fn new(config: &config::Cluster) -> RedisResult<Self> {
        Ok(Self {
            client: Client::open(config.redis.reveal())?,
            name: config.name.0.clone(),
            node: format!("{:016x}", fastrand::u64(..)),
            strict: ArcSwapOption::empty(),
            script: Script::new(include_str!("limit.lua")),
            breaker: Breaker::default(),
            connected: AtomicBool::new(false),
            told: Mutex::default(),
            pruned: AtomicU64::new(0),
            nodes: Mutex::default(),
            anew: Mutex::default(),
            met: Event::new(),
            read: Mutex::default(),
            purges: Mutex::default(),
            purged: Event::new(),
        })
    }

    /// Is Redis there?
    pub fn is_connected(&self) -> bool {
        self.connected.load(Relaxed)
    }

    /// What was used of a limit on all nodes together; what fits is taken.
    pub async fn ask(&self, question: Question) -> Shared {
        let Some(connection) = self.strict.load_full().filter(|_| !self.breaker.is_open()) else { return Shared::Unreachable };
        let mut connection = (*connection).clone();
        let bucket = u64::try_from(question.quota.bucket().as_millis()).unwrap_or(u64::MAX);
        let mut call = self.script.key(self.counter(question.handle, &question.quota));
        let call = call.arg(question.quota.requests).arg(bucket);
        let answer = timeout(STRICT, call.invoke_async::<(u8, u32, u64, u64)>(&mut connection)).await;
        self.breaker.record(matches!(answer, Ok(Ok(_))));
        match answer {
            Ok(Ok((fits, left, wait, reset))) => Shared::Used(Used {
                fits: fits == 1,
                left,
                wait: Duration::from_millis(wait),
                reset: Duration::from_millis(reset),
            }),
            Ok(Err(error)) => {
                tracing::debug!(%error, "Redis does not answer");
                Shared::Unreachable
            }
            Err(_) => Shared::Unreachable,
        }
    }

    /// Keeps in touch, for ever.
    pub async fn run(self: Arc<Self>, state: Arc<State>) {
        let mut pause = PAUSES.0;
        let mut said = false;
        loop {
            let began = clock::now();
            let Err(error) = self.session(&state).await;
            self.set_connected(&state, false);
            self.strict.store(None);
            // A session that lasted is a new beginning.
            if clock::now().since(began) > PATIENCE * 2 {
                (pause, said) = (PAUSES.0, false);
            }
            if !std::mem::replace(&mut said, true) {
                tracing::warn!(%error, "the cluster's Redis cannot be reached; this node counts for itself until it can");
            }
            if clock::now().since(Moment::default()) > UNPURGED && !state.memory.cache.ready.swap(true, Relaxed) {
                tracing::warn!("the cache serves what it has, without knowing what other nodes purged while this one was away");
            }
            sleep(pause.mul_f32(0.5 + fastrand::f32())).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    fn set_connected(&self, state: &State, connected: bool) {
        self.connected.store(connected, Relaxed);
        state.metrics.cluster(connected);
        if let Some(ledger) = state.memory.known_ledger() {
            ledger.connected.store(connected, Relaxed);
        }
    }

    /// From one connection to its end.
    async fn session(&self, state: &Arc<State>) -> RedisResult<Infallible> {
        let config = AsyncConnectionConfig::new().set_connection_timeout(Some(PATIENCE)).set_response_timeout(Some(PATIENCE));
        let connect = || self.client.get_multiplexed_async_connection_with_config(&config);
        let connection = connect().await?;
        let mut blocking = connect().await?;
        blocking.set_response_timeout(orders::BLOCK + PATIENCE);
        let mut heard = timeout(PATIENCE, self.client.get_async_pubsub()).await.map_err(std::io::Error::from)??;
        heard.subscribe(&[self.everybody(), self.only(&self.node)]).await?;
        self.meet_again(state);
        self.catch_up(state, &mut blocking).await?;
        state.memory.cache.ready.store(true, Relaxed);
        let strict = connect().await?;
        self.strict.store(Some(Arc::new(strict.clone())));
        let (sink, heard) = heard.split();
        self.set_connected(state, true);
        tracing::info!(name = self.name, node = self.node, "connected to the cluster's Redis");
        tokio::select! {
            ended = self.publish(state, connection.clone()) => ended,
            ended = self.listen(state, heard) => ended,
            ended = self.follow(state, blocking) => ended,
            ended = self.tell_orders(state, connection.clone()) => ended,
            ended = self.tell_purges(connection.clone()) => ended,
            ended = self.watch(state, [connection, strict], sink) => ended,
        }
    }

    /// What others counted is told anew by each of them: what was missed is in it, and nothing twice.
    fn meet_again(&self, state: &State) {
        let mut nodes = self.nodes.lock();
        *nodes = counts::Acquaintances::default();
        if let Some(others) = state.memory.known_ledger().as_ref().and_then(|ledger| ledger.others.as_ref()) {
            others.clear();
        }
    }

    /// Where Redis counts for a strict limit. Other buckets are another counter.
    fn counter(&self, handle: Handle, quota: &Quota) -> String {
        format!("{}:limit:{handle}:{}", self.name, quota.bucket().as_millis())
    }

    /// Where every node listens.
    fn everybody(&self) -> String {
        format!("{}:limits", self.name)
    }

    /// Where only one does.
    fn only(&self, node: &str) -> String {
        format!("{}:limits:{node}", self.name)
    }

    async fn listen(&self, state: &State, mut messages: PubSubStream) -> RedisResult<Infallible> {
        while let Some(message) = messages.next().await {
            self.received(state, message.get_payload_bytes());
        }
        Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset).into())
    }

    /// Asks now and then on every connection whether Redis is there, and whether limits exist by now that have to know.
    async fn watch(
        &self,
        state: &State,
        mut connections: [MultiplexedConnection; 2],
        mut heard: PubSubSink,
    ) -> RedisResult<Infallible> {
        loop {
            for connection in &mut connections {
                redis::cmd("PING").query_async::<()>(connection).await?;
            }
            let [connection, _] = &mut connections;
            self.show(connection).await?;
            timeout(PATIENCE, heard.ping::<redis::Value>()).await.map_err(std::io::Error::from)??;
            self.set_connected(state, true);
            sleep(PING).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_breaker_opens_after_failures_in_a_row() {
        let breaker = Breaker::default();
        for good in [false, false, false, false, true, false, false, false, false] {
            breaker.record(good);
            assert!(!breaker.is_open());
        }
        breaker.record(false);
        assert!(breaker.is_open());
    }
}
