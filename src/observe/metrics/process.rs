//! The process itself: what it was built from, what it runs with, and its runtimes.

use std::time::Duration;

use parking_lot::Mutex;
use prometheus::{Counter, CounterVec, IntGaugeVec, Opts, Registry};
use tokio::runtime::Handle;

use super::add;

/// The process.
#[derive(Debug)]
pub struct ProcessMetrics {
    config: IntGaugeVec,
    digest: Mutex<String>,
    tasks: IntGaugeVec,
    queue: IntGaugeVec,
    busy: CounterVec,
    /// Runtimes by the label they got.
    runtimes: Mutex<Vec<(String, Handle, Counter)>>,
}

impl ProcessMetrics {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauges = |name: &str, help: &str, label: &str| add(registry, IntGaugeVec::new(Opts::new(name, help), &[label]));
        let build = gauges("portolan_build_info", "Always 1; the version is a label.", "version")?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let busy = Opts::new("portolan_runtime_busy_seconds_total", "How long a runtime's thread was at work.");
        let busy = add(registry, CounterVec::new(busy, &["runtime"]))?;
        Ok(Self {
            digest: Mutex::default(),
            config: gauges(
                "portolan_config_info",
                "Always 1; the label stands for all files of the configuration in force, so that nodes can be compared.",
                "digest",
            )?,
            tasks: gauges("portolan_runtime_tasks", "Tasks that a runtime has.", "runtime")?,
            queue: gauges("portolan_runtime_queue_length", "Tasks from elsewhere that wait for a runtime's thread.", "runtime")?,
            busy,
            runtimes: Mutex::default(),
        })
    }

    /// The runtime that this is called on is watched from now on.
    pub fn watch_runtime(&self, name: &str) {
        let mut all = self.runtimes.lock();
        let taken = all.iter().filter(|(label, ..)| label.starts_with(name)).count();
        let label = format!("{name}-{taken}");
        let busy = self.busy.with_label_values(&[label.as_str()]);
        all.push((label, Handle::current(), busy));
    }

    /// The configuration in force.
    pub fn configured(&self, digest: u64) {
        let label = format!("{digest:016x}");
        let before = std::mem::replace(&mut *self.digest.lock(), label.clone());
        self.config.with_label_values(&[label.as_str()]).set(1);
        if before != label {
            // There was none at the start.
            let _ = self.config.remove_label_values(&[before]);
        }
    }

    pub(super) fn refresh(&self) {
        for (label, runtime, busy) in &*self.runtimes.lock() {
            let metrics = runtime.metrics();
            let gauge = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
            self.tasks.with_label_values(&[label.as_str()]).set(gauge(metrics.num_alive_tasks()));
            self.queue.with_label_values(&[label.as_str()]).set(gauge(metrics.global_queue_depth()));
            let worked: Duration = (0..metrics.num_workers()).map(|n| metrics.worker_total_busy_duration(n)).sum();
            busy.inc_by((worked.as_secs_f64() - busy.get()).max(0.0));
        }
    }
}
