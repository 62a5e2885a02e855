//! What becomes of spans.

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

use super::add;

/// What becomes of spans.
#[derive(Debug)]
pub struct TracingMetrics {
    exported: IntCounter,
    failed: IntCounter,
    dropped: IntCounter,
}

impl TracingMetrics {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let all = Opts::new(
            "portolan_trace_spans_total",
            "Spans by what became of them: exported, failed (the collector did not take them) or dropped (the queue was full).",
        );
        let all = add(registry, IntCounterVec::new(all, &["result"]))?;
        let [exported, failed, dropped] = ["exported", "failed", "dropped"].map(|result| all.with_label_values(&[result]));
        Ok(Self { exported, failed, dropped })
    }

    /// The collector took them.
    pub fn exported(&self, spans: u64) {
        self.exported.inc_by(spans);
    }

    /// It did not.
    pub fn failed(&self, spans: u64) {
        self.failed.inc_by(spans);
    }

    /// They found no room.
    pub fn dropped(&self, spans: u64) {
        self.dropped.inc_by(spans);
    }
}
