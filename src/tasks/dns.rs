//! Upstream names to addresses: at start, for new names before a reload, and again and again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use crate::regions::health::UpstreamState;
use crate::state::State;

/// How often every name is asked for again.
const REFRESH: Duration = Duration::from_secs(30);
/// How often a name that never had an answer is asked for.
const RETRY: Duration = Duration::from_secs(2);
/// A start or reload waits this long for new names; a slow one is left to the background.
const PATIENCE: Duration = Duration::from_secs(3);

/// Resolves the names among `upstreams` that never were, and waits for the answers, but not for long.
pub async fn resolve_new(upstreams: &[Arc<UpstreamState>]) {
    resolve(upstreams.iter().filter(|u| !u.is_resolved()).cloned()).await;
}

async fn resolve(upstreams: impl Iterator<Item = Arc<UpstreamState>>) {
    let mut lookups = JoinSet::new();
    for upstream in upstreams.filter(|u| u.url.ip().is_none()) {
        // A resolver that hangs must not collect a lookup every few seconds.
        if upstream.resolving.swap(true, Ordering::Relaxed) {
            continue;
        }
        lookups.spawn(async move {
            let name = (upstream.url.host.as_str(), upstream.url.port);
            match tokio::net::lookup_host(name).await {
                Ok(addresses) => upstream.resolved(addresses.collect()),
                Err(error) => {
                    let kept = upstream.is_resolved();
                    tracing::warn!(upstream = %upstream.url, %error, kept_last_answer = kept, "the name cannot be resolved");
                }
            }
            upstream.resolving.store(false, Ordering::Relaxed);
        });
    }
    // Late answers are taken when they come: the tasks go on by themselves.
    if timeout(PATIENCE, async { while lookups.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!(names = lookups.len(), "names are slow to resolve; going on without them");
        lookups.detach_all();
    }
}

/// Keeps every name fresh, for ever.
pub async fn refresh(state: Arc<State>) {
    let mut all = interval_at(Instant::now() + REFRESH, REFRESH);
    let mut new = interval_at(Instant::now() + RETRY, RETRY);
    all.set_missed_tick_behavior(MissedTickBehavior::Delay);
    new.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = all.tick() => resolve(state.upstreams.all().into_iter()).await,
            _ = new.tick() => resolve_new(&state.upstreams.all()).await,
        }
    }
}
