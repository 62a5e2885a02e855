//! Once a second: what came since is set aside, what changed is found, and those who watch are told.

use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use procfs::WithCurrentSystemInfo;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::kept::Now;
use crate::state::{Live, State};

const SECOND: Duration = Duration::from_secs(1);

/// What is told once a second.
#[derive(Debug)]
pub struct Pulse {
    seconds: watch::Sender<u64>,
    usage: Mutex<Usage>,
}

/// What the process uses. Nothing where the system does not tell.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Usage {
    /// Seconds of CPU since the start.
    pub cpu_seconds: Option<f64>,
    /// CPUs in use, over the last second.
    pub cpus: Option<f64>,
    /// CPUs that there are.
    pub cpus_available: usize,
    /// Bytes of memory.
    pub resident_bytes: Option<u64>,
    /// Threads.
    pub threads: Option<i64>,
    /// Files and sockets that are open.
    pub open_files: Option<usize>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { seconds: watch::Sender::new(0), usage: Mutex::new(usage()) }
    }
}

impl Pulse {
    /// Told of every second that is over: how many there were.
    pub fn listen(&self) -> watch::Receiver<u64> {
        self.seconds.subscribe()
    }

    /// What the process used in the last second.
    pub fn usage(&self) -> Usage {
        // Counting files takes longer the more there are: only where somebody asks.
        let open_files = procfs::process::Process::myself().and_then(|process| process.fd_count()).ok();
        Usage { open_files, ..*self.usage.lock() }
    }
}

/// Beats for ever.
pub async fn run(state: Arc<State>) {
    let mut seconds = interval(SECOND);
    // After a pause one beat is enough: counts are of what came, not of beats.
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    seconds.tick().await;
    let mut last = Instant::now();
    loop {
        seconds.tick().await;
        beat(&state, last.elapsed());
        last = Instant::now();
    }
}

/// A second is over.
pub fn beat(state: &State, took: Duration) {
    let now = Now::new();
    state.traffic.tick(now.unix / 1_000, took);
    let live = state.live.load();
    state.lately.tick(state, &live, now);
    if over(&state.retired) {
        state.sweep(&live);
    }
    let mut usage = usage();
    {
        let mut before = state.pulse.usage.lock();
        usage.cpus = match (before.cpu_seconds, usage.cpu_seconds) {
            (Some(before), Some(now)) => Some((now - before).max(0.0) / took.as_secs_f64().max(0.001)),
            _ => None,
        };
        *before = usage;
    }
    state.pulse.seconds.send_modify(|seconds| *seconds += 1);
}

/// Has the last request of a configuration that was replaced come to its end?
fn over(retired: &Mutex<Vec<Weak<Live>>>) -> bool {
    let mut retired = retired.lock();
    let before = retired.len();
    retired.retain(|live| live.strong_count() > 0);
    retired.len() < before
}

fn usage() -> Usage {
    let cpus_available = std::thread::available_parallelism().map_or(1, usize::from);
    let Ok(process) = procfs::process::Process::myself() else { return Usage { cpus_available, ..Usage::default() } };
    let stat = process.stat().ok();
    Usage {
        cpu_seconds: stat.as_ref().map(|stat| (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64),
        cpus: None,
        cpus_available,
        resident_bytes: stat.as_ref().map(|stat| stat.rss_bytes().get()),
        threads: stat.as_ref().map(|stat| stat.num_threads),
        open_files: None,
    }
}
