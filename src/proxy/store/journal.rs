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
    writing: Mutex<Writing>,
}

#[derive(Debug)]
struct Writing {
    file: File,
    /// Lines that were written since the file was written anew.
    lines: usize,
    /// The last write failed, and may have left a part of a line.
    torn: bool,
}

impl Journal {
    /// Opens the one in this folder, and reads what it has. A line that is torn was never promised to anybody.
    pub fn open(path: &Path) -> io::Result<(Self, Vec<Purge>)> {
        let text = match std::fs::read(path.join(NAME)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            text => text?,
        };
        let purges: Vec<Purge> = text.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        let writing = Writing { file: Self::anew(path, &purges)?, lines: purges.len(), torn: false };
        Ok((Self { path: path.to_owned(), writing: Mutex::new(writing) }, purges))
    }

    fn anew(path: &Path, purges: &[Purge]) -> io::Result<File> {
        kept::replace(path, NAME, lines(purges)?.as_bytes(), 0o600)?;
        OpenOptions::new().append(true).open(path.join(NAME))
    }

    /// Appends; what there is `all` in all, should the file be written anew. On disk on return.
    pub fn add(&self, purges: &[Purge], all: impl FnOnce() -> Vec<Purge>) -> io::Result<()> {
        let mut writing = self.writing.lock();
        if writing.lines + purges.len() > LINES {
            let file = Self::anew(&self.path, &all())?;
            // If there are more than that, so be it: the next time comes after as many again.
            *writing = Writing { file, lines: 0, torn: false };
            return Ok(());
        }
        let mut text = lines(purges)?;
        if writing.torn {
            text.insert(0, '\n');
        }
        writing.torn = true;
        writing.file.write_all(text.as_bytes())?;
        writing.file.sync_data()?;
        writing.lines += purges.len();
        writing.torn = false;
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::purge::What;

    fn host(name: &str) -> Purge {
        Purge { what: What::Host(name.to_owned()), soft: false, at: 7 }
    }

    #[test]
    fn a_torn_line_costs_no_other() {
        let dir = tempfile::TempDir::new().unwrap();
        let nothing = || panic!("it is short");
        let (journal, _) = Journal::open(dir.path()).unwrap();
        journal.add(&[host("a"), host("b")], nothing).unwrap();
        // A write that failed in its middle, in the middle of a character.
        let mut file = OpenOptions::new().append(true).open(dir.path().join(NAME)).unwrap();
        file.write_all("{\"what\":{\"host\":\"ü".as_bytes().split_last().unwrap().1).unwrap();
        journal.writing.lock().torn = true;
        journal.add(&[host("c")], nothing).unwrap();
        let (journal, purges) = Journal::open(dir.path()).unwrap();
        assert_eq!(purges, [host("a"), host("b"), host("c")]);
        // And one whose process ended there.
        file = OpenOptions::new().append(true).open(dir.path().join(NAME)).unwrap();
        file.write_all(b"{\"what\":{\"ho\xff").unwrap();
        drop(journal);
        let (journal, purges) = Journal::open(dir.path()).unwrap();
        journal.add(&[host("d")], nothing).unwrap();
        assert_eq!(purges.len(), 3);
        assert_eq!(Journal::open(dir.path()).unwrap().1.last(), Some(&host("d")));
    }
}
