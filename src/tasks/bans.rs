//! Penalties survive a restart: who is refused for a day must not come back by a crash of ours.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::kept::{Now, replace};
use crate::limits::Ledger;
use crate::limits::book::Ban;
use crate::limits::table::Handle;
use crate::proxy::clock;
use crate::state::State;

const FILE: &str = "bans.json";
const VERSION: u32 = 1;
/// Penalties are written so long after the first that is new; more often, an attack would keep the disk busy.
const PAUSE: Duration = Duration::from_secs(1);
/// Writing takes at most a part of the time in so many.
const SHARE: u32 = 20;
/// How often it is looked what is over.
const TIDY: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u32,
    bans: Vec<Kept>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    limit: String,
    key: String,
    /// In hexadecimal.
    handle: String,
    /// Milliseconds since 1970.
    until: u64,
}

/// Puts penalties in force that an earlier process kept in `dir`. Blocks on disk.
pub fn restore(dir: &Path, ledger: &Ledger) -> io::Result<usize> {
    let text = match std::fs::read_to_string(dir.join(FILE)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let saved = serde_json::from_str::<Saved>(&text).map_err(|error| error.to_string());
    let saved = match saved.and_then(|saved| if saved.version == VERSION { Ok(saved) } else { Err("another version".to_owned()) })
    {
        Ok(saved) => saved,
        Err(error) => {
            let aside = dir.join(format!("{FILE}.bad"));
            tracing::error!(error, file = %aside.display(), "penalties cannot be read and are forgotten");
            std::fs::rename(dir.join(FILE), aside)?;
            return Ok(0);
        }
    };
    let now = Now::new();
    let mut restored = 0;
    for Kept { limit, key, handle, until } in saved.bans {
        let (Ok(handle), until) = (handle.parse::<Handle>(), now.moment(until)) else { continue };
        if until > now.moment {
            let ban = Ban { limit: limit.as_str().into(), key: key.into(), until };
            ledger.ban(handle, ledger.number(&limit), ban, now.moment);
            restored += 1;
        }
    }
    Ok(restored)
}

/// Writes penalties down as they come and go, for ever. `restored`: those of an earlier process are in force.
pub async fn run(state: Arc<State>, dir: Option<std::path::PathBuf>, mut restored: bool) {
    let mut failed = false;
    loop {
        if state.leaving.now() {
            // They are somebody else's now.
            return;
        }
        let Some(ledger) = state.memory.known_ledger() else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        // First listen, then look.
        let changed = ledger.book.changed.listen();
        let began = Instant::now();
        if let Some(dir) = dir.clone() {
            let theirs = ledger.clone();
            // The first limit may come with a reload: what is on disk is older than all that it knows.
            let first = !restored;
            let saved = tokio::task::spawn_blocking(move || {
                if first {
                    restore(&dir, &theirs)?;
                }
                save(&dir, &theirs)
            });
            let error = saved.await.map_err(io::Error::other).and_then(|saved| saved).err();
            if let Some(error) = error.as_ref().filter(|_| !failed) {
                tracing::error!(%error, "penalties cannot be written to state_dir, and would not survive a restart");
            }
            failed = error.is_some();
            restored |= !failed;
        }
        tokio::time::sleep(PAUSE.max(began.elapsed() * SHARE)).await;
        // Wakes without a change only to tidy up.
        let _ = tokio::time::timeout(TIDY, changed).await;
        let now = clock::now();
        let known = |handle| {
            let keep = ledger.table.change(handle, |entry| {
                let keep = !entry.is_over(now);
                if !keep {
                    entry.unname();
                }
                keep
            });
            keep == Some(true)
        };
        ledger.book.tidy(known, now);
    }
}

/// Writes all of them. Blocks on disk.
pub fn save(dir: &Path, ledger: &Ledger) -> io::Result<()> {
    // The last one, when the process ends, may meet another.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock();
    let now = Now::new();
    let kept = |(handle, ban): (Handle, Ban)| Kept {
        limit: ban.limit.to_string(),
        key: ban.key.to_string(),
        handle: handle.to_string(),
        until: now.unix(ban.until),
    };
    let bans: Vec<_> = ledger.book.bans(now.moment).into_iter().map(kept).collect();
    if bans.is_empty() && !dir.join(FILE).exists() {
        return Ok(());
    }
    replace(dir, FILE, &serde_json::to_vec(&Saved { version: VERSION, bans })?, 0o600)
}
