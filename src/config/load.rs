//! From files to a [`Config`], or to every problem at once.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::check::check;
use super::problem::{KeyPath, Problem, Source};
use super::tree::{MAX_FILE, Node, Secrets};
use super::{Config, schema};

/// Which files make the configuration.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The file.
    pub file: PathBuf,
    /// `--env NAME`: `FILE.NAME.yaml` beside it is laid over it.
    pub environment: Option<String>,
}

impl Paths {
    /// The file and, if there is one, the overlay.
    fn files(&self) -> Vec<PathBuf> {
        let mut files = vec![self.file.clone()];
        if let Some(environment) = &self.environment {
            let stem = self.file.file_stem().unwrap_or_default().to_string_lossy();
            let extension = self.file.extension().map_or_else(|| "yaml".into(), |e| e.to_string_lossy());
            files.push(self.file.with_file_name(format!("{stem}.{environment}.{extension}")));
        }
        files
    }

    /// `path` as the configuration means it: relative to its folder.
    pub fn resolve(&self, path: &Path) -> PathBuf {
        super::tree::beside(&self.file, path)
    }
}

/// A file's identity on disk: enough to see that it was written or replaced, without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Fingerprint {
    /// Of the file that `path` leads to, through links; `None` if there is none.
    pub fn of(path: &Path) -> Option<Self> {
        let meta = std::fs::metadata(path).ok()?;
        Some(Self { device: meta.dev(), inode: meta.ino(), size: meta.size(), modified: (meta.mtime(), meta.mtime_nsec()) })
    }
}

/// A file that the configuration is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Where it is.
    pub path: PathBuf,
    /// What it was just before it was read: a change in mid-reading shows as a change since.
    pub seen: Option<Fingerprint>,
}

impl Input {
    /// The file as it is now, to be read next.
    pub fn now(path: PathBuf) -> Self {
        Self { seen: Fingerprint::of(&path), path }
    }

    /// Is it another one than was read?
    pub fn changed(&self) -> bool {
        Fingerprint::of(&self.path) != self.seen
    }
}

/// A configuration that was read; whether it makes sense is the snapshot's question.
#[derive(Debug)]
pub struct Loaded {
    /// What was typed, with stand-ins where `problems` say so.
    pub config: Config,
    /// Everything that is not well formed. If there is any, `config` must not be used, only questioned.
    pub problems: Vec<Problem>,
    /// Where everything stands.
    pub tree: Node,
    /// Every file that was read so far.
    pub inputs: Vec<Input>,
    /// What was expanded into texts: nobody may see it.
    pub secrets: Secrets,
    /// A digest of all that was read and expanded.
    pub digest: u64,
}

/// Problems, and the files whose change may mend them.
#[derive(Debug)]
pub struct Failed {
    /// Every problem, in the order of the files.
    pub problems: Vec<Problem>,
    /// The files that were read, or should have been.
    pub inputs: Vec<Input>,
}

impl Loaded {
    /// All problems, those found since by asking `config` included, each at its place and in the order
    /// of the file. A question about a stand-in is not the operator's.
    pub fn problems(&self, since: Vec<Problem>) -> Vec<Problem> {
        let stands_in = |p: &Problem| self.problems.iter().any(|own| !own.path.0.is_empty() && p.path.0.starts_with(&own.path.0));
        let since = since.into_iter().filter(|p| !stands_in(p)).map(|p| self.tree.locate(p));
        let mut all: Vec<_> = self.problems.iter().cloned().chain(since).collect();
        all.sort_by_key(|p| p.place.as_ref().map(|place| (place.source.path.clone(), place.span.start)));
        all
    }
}

/// Reads, merges, expands and checks.
pub fn load(paths: &Paths) -> Result<Loaded, Failed> {
    let mut inputs: Vec<_> = paths.files().into_iter().map(Input::now).collect();
    let mut problems = Vec::new();
    let mut tree: Option<Node> = None;
    for file in paths.files() {
        match read(&file).and_then(|source| Node::parse(&source)) {
            Ok(node) => match &mut tree {
                None => tree = Some(node),
                Some(base) => base.merge(node),
            },
            Err(problem) => problems.push(problem),
        }
    }
    let (Some(mut tree), true) = (tree, problems.is_empty()) else {
        return Err(Failed { problems, inputs });
    };
    let super::tree::Expanded { files, secrets } = tree.expand(&mut problems);
    inputs.extend(files);
    let (malformed, json) = check(&tree, &schema());
    // What could not be expanded cannot fit either; saying so twice helps nobody.
    let told: Vec<_> = problems.iter().map(|p| p.path.clone()).collect();
    problems.extend(malformed.into_iter().filter(|p| !told.contains(&p.path)));
    let mut digest = DefaultHasher::new();
    json.to_string().hash(&mut digest);
    match Config::deserialize(&json) {
        Ok(config) => Ok(Loaded { config, problems, tree, inputs, secrets, digest: digest.finish() }),
        Err(error) => {
            if problems.is_empty() {
                problems.push(tree.locate(Problem::error(KeyPath::default(), error.to_string())));
            }
            Err(Failed { problems, inputs })
        }
    }
}

fn read(file: &Path) -> Result<Arc<Source>, Problem> {
    let unreadable =
        |e: &dyn std::fmt::Display| Problem::error(KeyPath::default(), format!("cannot read `{}`: {e}", file.display()));
    let size = std::fs::metadata(file).map_err(|e| unreadable(&e))?.len();
    if size > MAX_FILE {
        return Err(unreadable(&format!("larger than {} MiB", MAX_FILE >> 20)));
    }
    let bytes = std::fs::read(file).map_err(|e| unreadable(&e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes().iter().take(e.utf8_error().valid_up_to()).filter(|b| **b == b'\n').count() + 1;
        unreadable(&format!("line {line} is not UTF-8"))
    })?;
    Ok(Arc::new(Source { path: file.to_owned(), text: text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text) }))
}
