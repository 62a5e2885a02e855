//! Clients' connections as metrics: handshakes, certificates, the word of proxies, and what is wrong with what comes.

use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::add;
use crate::connections::Kind;
use crate::listeners::Listener;

/// What happens on clients' connections.
#[derive(Debug)]
pub struct ConnectionMetrics {
    /// By their outcome.
    handshakes: IntCounterVec,
    expiry: IntGaugeVec,
    /// Connections that did not begin with who the client is, where they have to.
    pub unintroduced: IntCounter,
    faults: [IntCounter; Kind::ALL.len()],
    orders: [IntCounter; 2],
}

/// How a handshake ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handshake {
    /// Both sides agreed.
    Done,
    /// They did not.
    Failed,
    /// It took too long.
    TimedOut,
}

impl Handshake {
    /// All, so that each is there from the beginning.
    pub const ALL: [Self; 3] = [Self::Done, Self::Failed, Self::TimedOut];

    /// In metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::Failed => "failed",
            Self::TimedOut => "timeout",
        }
    }
}

impl ConnectionMetrics {
    /// All at zero.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str, label: &str| add(registry, IntCounterVec::new(Opts::new(name, help), &[label]));
        let handshakes = counters("portolan_tls_handshakes_total", "TLS handshakes with clients, by how they ended.", "result")?;
        for one in Handshake::ALL {
            handshakes.with_label_values(&[one.label()]);
        }
        let expiry =
            Opts::new("portolan_tls_certificate_expiry_timestamp_seconds", "When a certificate that clients are shown expires.");
        let expiry = add(registry, IntGaugeVec::new(expiry, &["certificate"]))?;
        let unintroduced = IntCounter::new(
            "portolan_proxy_protocol_refused_total",
            "Connections without a PROXY header, or with a wrong one, or from somebody who is not trusted to send one.",
        );
        let unintroduced = add(registry, unintroduced)?;
        let faults = counters(
            "portolan_connection_faults_total",
            "Connections that ended for what their clients sent, or did not, by what was wrong.",
            "fault",
        )?;
        let faults = Kind::ALL.map(|kind| faults.with_label_values(&[kind.label()]));
        let orders = counters(
            "portolan_acme_orders_total",
            "Certificates that were asked for by themselves, by what became of it.",
            "result",
        )?;
        let orders = ["failed", "ok"].map(|result| orders.with_label_values(&[result]));
        Ok(Self { handshakes, expiry, unintroduced, faults, orders })
    }

    /// Counts a certificate that was asked for.
    pub fn ordered(&self, got: bool) {
        let [failed, ok] = &self.orders;
        if got { ok.inc() } else { failed.inc() }
    }

    /// Counts a fault.
    pub fn fault(&self, kind: Kind) {
        // Positions in `ALL` are those of the enumeration; a test holds them together.
        if let Some(counter) = self.faults.get(kind as usize) {
            counter.inc();
        }
    }

    /// Counts a handshake.
    pub fn handshake(&self, how: Handshake) {
        self.handshakes.with_label_values(&[how.label()]).inc();
    }

    /// What is only known at this moment.
    pub fn refresh(&self, listeners: &[Listener]) {
        self.expiry.reset();
        for certificate in listeners.iter().filter_map(|listener| listener.tls.as_ref()).flat_map(|tls| &tls.certificates.all) {
            let expires = i64::try_from(certificate.expires.as_secs()).unwrap_or(i64::MAX);
            self.expiry.with_label_values(&[&certificate.path.display().to_string()]).set(expires);
        }
    }
}
