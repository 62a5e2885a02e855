//! SIGHUP reloads. SIGTERM and SIGINT belong to `proxy::server`.

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use crate::reload::Reloader;

/// Reloads at every SIGHUP, for ever.
pub async fn reload_on_hangup(reloader: Arc<Reloader>) {
    let mut hangups = match signal(SignalKind::hangup()) {
        Ok(hangups) => hangups,
        Err(error) => {
            tracing::error!(%error, "SIGHUP cannot be received");
            return;
        }
    };
    while hangups.recv().await.is_some() {
        // The reloader itself reports how it went.
        let _ = reloader.reload("signal").await;
    }
}
