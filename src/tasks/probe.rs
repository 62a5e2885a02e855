//! Health checks: when each endpoint is asked. What a question is, `proxy::probe` knows.
//!
//! Each endpoint is asked by itself, never twice at a time, an interval (give or take a tenth) after its last
//! answer; while its verdict is in doubt five times as often.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::proxy::{clock, probe};
use crate::regions::active::Last;
use crate::regions::endpoint::Endpoint;
use crate::state::{Live, State};

/// How often it is looked whether somebody is due.
const LOOK: Duration = Duration::from_millis(20);
/// While in doubt an endpoint is asked this many times as often,
const IN_DOUBT: u32 = 5;
/// but not more often than this, unless its interval is shorter.
const SHORTEST: Duration = Duration::from_millis(200);

/// Asks, for ever.
pub async fn run(state: Arc<State>) {
    let prober = Arc::new(probe::Prober::default());
    loop {
        let live = state.live.load_full();
        let now = clock::now();
        for (r, region) in live.snapshot.regions.iter().enumerate() {
            let digest = region.check.as_ref().map_or(0, |c| c.digest);
            for (u, upstream) in region.upstreams.iter().enumerate() {
                for endpoint in upstream.state.endpoints().iter() {
                    endpoint.active.switch(digest);
                    let Some(check) = &region.check else { continue };
                    // A failure seen by traffic is reason enough to ask soon.
                    let hurry = endpoint.health.counts().0 > 0 && !endpoint.active.in_doubt();
                    let soon = now.after(pause(check.config.interval.0, true));
                    if hurry && endpoint.active.due() > soon {
                        endpoint.active.set_due(soon);
                    }
                    if endpoint.active.due() <= now && !endpoint.active.asking.swap(true, Relaxed) {
                        tokio::spawn(ask(prober.clone(), live.clone(), r, u, endpoint.clone()));
                    }
                }
            }
        }
        drop(live);
        sleep(LOOK).await;
    }
}

fn pause(interval: Duration, in_doubt: bool) -> Duration {
    let base = if in_doubt { (interval / IN_DOUBT).max(SHORTEST.min(interval)) } else { interval };
    base.mul_f32(0.9 + 0.2 * fastrand::f32())
}

async fn ask(prober: Arc<probe::Prober>, live: Arc<Live>, region: usize, upstream: usize, endpoint: Arc<Endpoint>) {
    let _asking = Asking(endpoint.clone());
    let found = live.snapshot.regions.get(region).and_then(|r| Some((r, r.check.as_ref()?, r.upstreams.get(upstream)?)));
    if let Some((region, check, upstream)) = found {
        let began = Instant::now();
        let outcome = match tokio::time::timeout(check.config.timeout.0, prober.ask(&check.config, upstream, &endpoint)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(format!("no answer within {}", check.config.timeout)),
        };
        let took = began.elapsed();
        let (good, text) = match outcome {
            Ok(text) => (true, text),
            Err(text) => (false, text),
        };
        // The check may have been replaced while this question was under way.
        if endpoint.active.is(check.digest) {
            if good {
                region.state.checked(took);
            }
            if endpoint.checked(good, check.config.fall, check.config.rise, clock::now()) {
                let (region, url, address) = (&*region.name, upstream.url.to_string(), endpoint.address.to_string());
                match good {
                    true => tracing::info!(region, url, address, "health checks: up"),
                    false => tracing::warn!(region, url, address, why = text, "health checks: down"),
                }
            }
            *endpoint.active.last.lock() = Some(Last { good, text, took });
            endpoint.active.set_due(clock::now().after(pause(check.config.interval.0, endpoint.active.in_doubt())));
        }
    }
}

/// The question is over, however it ended.
struct Asking(Arc<Endpoint>);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.active.asking.store(false, Relaxed);
    }
}
