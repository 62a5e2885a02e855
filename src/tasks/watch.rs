//! Reloads when an input changes.
//!
//! Folders are watched rather than files: editors replace files, and a Kubernetes ConfigMap swaps a
//! link beside them. What an event means is settled by looking: fingerprints follow links, so every way
//! of replacing a file shows. They are also looked at every [`POLL`], for file systems without events.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::config::{Fingerprint, Input};
use crate::reload::{FILE, Reloader};

/// A change is acted upon when nothing more has changed for this long: a file may be written in pieces.
const SETTLE: Duration = Duration::from_millis(200);
/// How often files are looked at without an event.
const POLL: Duration = Duration::from_secs(5);

/// Watches for ever.
pub async fn watch(reloader: Arc<Reloader>) {
    let (tell, mut events) = mpsc::channel::<()>(1);
    let mut watcher = notify::recommended_watcher(move |_: notify::Result<notify::Event>| {
        // One word is enough: a full channel already says "look".
        let _ = tell.try_send(());
    })
    .inspect_err(|error| tracing::warn!(%error, "no file events; files are looked at every {POLL:?}"))
    .ok();
    let mut folders = BTreeSet::new();
    loop {
        let inputs = reloader.inputs();
        follow(&mut watcher, &mut folders, &inputs);
        let changed = inputs.iter().any(Input::changed);
        if changed || reloader.expired() {
            if changed {
                settle(&inputs).await;
            }
            // The reloader itself reports how it went.
            let _ = reloader.reload(FILE).await;
            continue;
        }
        match timeout(POLL, events.recv()).await {
            // Whatever it was, it may go on (a log that grows in the same folder): once per `SETTLE` is enough.
            Ok(Some(())) => tokio::time::sleep(SETTLE).await,
            Err(_) => {}
            // Without a watcher nobody sends: only the poll is left.
            Ok(None) => tokio::time::sleep(POLL).await,
        }
    }
}

/// Waits until two looks, [`SETTLE`] apart, see the same.
async fn settle(inputs: &[Input]) {
    let look = || inputs.iter().map(|i| Fingerprint::of(&i.path)).collect::<Vec<_>>();
    let mut before = look();
    loop {
        tokio::time::sleep(SETTLE).await;
        let now = look();
        if now == before {
            return;
        }
        before = now;
    }
}

/// Watches the folders of all inputs, and of what they link to.
fn follow(watcher: &mut Option<RecommendedWatcher>, folders: &mut BTreeSet<PathBuf>, inputs: &[Input]) {
    let Some(watcher) = watcher else { return };
    let folder = |path: &Path| match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let wanted: BTreeSet<_> =
        inputs.iter().flat_map(|i| [Some(folder(&i.path)), i.path.canonicalize().ok().map(|p| folder(&p))]).flatten().collect();
    for gone in folders.difference(&wanted) {
        // It may be gone from the disk as well.
        let _ = watcher.unwatch(gone);
    }
    let mut watched = BTreeSet::new();
    for path in wanted {
        // A folder that was deleted and made again is a new one, so each is asked for every time.
        match watcher.watch(&path, RecursiveMode::NonRecursive) {
            Ok(()) => {
                watched.insert(path);
            }
            Err(error) => tracing::debug!(%error, folder = %path.display(), "no events from this folder"),
        }
    }
    *folders = watched;
}
