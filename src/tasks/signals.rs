//! SIGHUP reloads, SIGQUIT is kept from killing. SIGTERM and SIGINT belong to `proxy::server`.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::reload::Reloader;

/// Signals whose default is to end the process, caught. They are caught before the process says that it
/// serves: whoever has read that may send one.
#[derive(Debug)]
pub struct Caught {
    hangup: Signal,
    quit: Signal,
}

/// Catches them. Needs a runtime; the catching outlives it, the receiving does not.
pub fn catch() -> std::io::Result<Caught> {
    Ok(Caught { hangup: signal(SignalKind::hangup())?, quit: signal(SignalKind::quit())? })
}

/// Reloads at every SIGHUP, for ever.
pub async fn act(reloader: Arc<Reloader>) {
    let mut caught = match catch() {
        Ok(caught) => caught,
        Err(error) => {
            tracing::error!(%error, "signals cannot be received");
            return;
        }
    };
    loop {
        tokio::select! {
            Some(()) = caught.hangup.recv() => {
                // The reloader itself reports how it went.
                let _ = reloader.reload("signal").await;
            }
            Some(()) = caught.quit.recv() => {
                tracing::warn!("handing the sockets to another process (SIGQUIT) is not in this version; going on");
            }
        }
    }
}
