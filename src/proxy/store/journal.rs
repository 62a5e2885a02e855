//! The log of purges as a file: a line each, and on disk before anybody is told that it holds.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::cache::purge::Purge;
use crate::kept;

/// Its name.
const NAME: &str = "purges";
/// After so many lines the file is written anew.
const LINES: usize = 10_000;

/// The file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    writing: Mutex<(File, usize)>,
}

impl Journal {
    /// Opens the one in this folder, and reads what it has. A last line that is torn was never promised to anybody.
    pub fn open(path: &Path) -> io::Result<(Self, Vec<Purge>)> {
        let text = match std::fs::read_to_string(path.join(NAME)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        let purges: Vec<Purge> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let file = Self::anew(path, &purges)?;
        let writing = Mutex::new((file, purges.len()));
        Ok((Self { path: path.to_owned(), writing }, purges))
    }

    fn anew(path: &Path, purges: &[Purge]) -> io::Result<File> {
        kept::replace(path, NAME, lines(purges)?.as_bytes(), 0o600)?;
        OpenOptions::new().append(true).open(path.join(NAME))
    }

    /// Appends; what there is `all` in all, should the file be written anew. On disk on return.
    pub fn add(&self, purges: &[Purge], all: impl FnOnce() -> Vec<Purge>) -> io::Result<()> {
        let mut writing = self.writing.lock();
        let (file, count) = &mut *writing;
        if *count + purges.len() > LINES {
            let all = all();
            *file = Self::anew(&self.path, &all)?;
            // If there are more than that, so be it: the next time comes after as many again.
            *count = 0;
            return Ok(());
        }
        file.write_all(lines(purges)?.as_bytes())?;
        *count += purges.len();
        file.sync_data()
    }
}

fn lines(purges: &[Purge]) -> io::Result<String> {
    let lines: Result<Vec<String>, _> = purges.iter().map(serde_json::to_string).collect();
    let mut text = lines?.join("\n");
    if !text.is_empty() {
        text.push('\n');
    }
    Ok(text)
}
