//! SIGHUP reloads, SIGUSR1 opens the access log again. SIGTERM, SIGINT and SIGQUIT are told to `proxy::server`.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::reload::Reloader;

/// What SIGTERM, SIGINT and SIGQUIT asked for so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stops {
    /// To drain and stop.
    pub asked: bool,
    /// And then not to wait any longer.
    pub at_once: bool,
    /// So many times to hand the sockets to another process.
    pub handovers: u32,
}

/// Receives SIGTERM, SIGINT and SIGQUIT from now on, on a thread of its own: whoever has read that the process serves may
/// send one, before the server is there to wait for it.
pub fn stops() -> std::io::Result<watch::Receiver<Stops>> {
    let (tell, told) = watch::channel(Stops::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut term, mut int, mut quit) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::quit())?)
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async move {
            loop {
                let interrupt = tokio::select! {
                    Some(()) = term.recv() => false,
                    Some(()) = int.recv() => true,
                    Some(()) = quit.recv() => {
                        tell.send_modify(|stops| stops.handovers = stops.handovers.wrapping_add(1));
                        continue;
                    }
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

/// What [`catch`] catches.
#[derive(Debug)]
pub struct Caught {
    hangup: Signal,
    reopen: Signal,
}

/// Catches SIGHUP and SIGUSR1, whose default is to end the process: before it says that it serves, for whoever has read that
/// may send one. Needs a runtime; the catching outlives it, the receiving does not.
pub fn catch() -> std::io::Result<Caught> {
    Ok(Caught { hangup: signal(SignalKind::hangup())?, reopen: signal(SignalKind::user_defined1())? })
}

/// Reloads at every SIGHUP and opens the access log again at every SIGUSR1, for ever.
pub async fn act(reloader: Arc<Reloader>) {
    let Caught { mut hangup, mut reopen } = match catch() {
        Ok(caught) => caught,
        Err(error) => {
            tracing::error!(%error, "signals cannot be received");
            return;
        }
    };
    loop {
        tokio::select! {
            Some(()) = hangup.recv() => {
                // The reloader itself reports how it went.
                let _ = reloader.reload("signal").await;
            }
            Some(()) = reopen.recv() => reloader.reopen_log().await,
            else => return,
        }
    }
}
