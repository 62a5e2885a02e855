//! SIGHUP reloads, SIGQUIT is kept from killing. SIGTERM and SIGINT are told to `proxy::server`.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::reload::Reloader;

/// What SIGTERM and SIGINT asked for so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stops {
    /// To drain and stop.
    pub asked: bool,
    /// And then not to wait any longer.
    pub at_once: bool,
}

/// Receives SIGTERM and SIGINT from now on, on a thread of its own: whoever has read that the process serves may
/// send one, before the server is there to wait for it.
pub fn stops() -> std::io::Result<watch::Receiver<Stops>> {
    let (tell, told) = watch::channel(Stops::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut term, mut int) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async move {
            loop {
                let interrupt = tokio::select! {
                    Some(()) = term.recv() => false,
                    Some(()) = int.recv() => true,
                    else => return,
                };
                tell.send_modify(|stops| {
                    stops.at_once |= stops.asked && interrupt;
                    stops.asked = true;
                });
            }
        });
    })?;
    Ok(told)
}

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
