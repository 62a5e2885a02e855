//! `portolan check`: every problem at once.

use clap::Args;

use super::{ConfigArgs, Exit, print, print_problems};
use crate::memory::Memory;
use crate::reload::{Known, build};
use crate::signing::Key;

#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    config: ConfigArgs,
    /// Warnings count as errors
    #[arg(long)]
    strict: bool,
}

impl Check {
    pub fn run(self) -> anyhow::Result<Exit> {
        let paths = self.config.paths();
        match build(&paths, &Known::default(), &Memory::new(Key::new(b"check"))) {
            Ok(built) => {
                print_problems(&built.warnings);
                if self.strict && !built.warnings.is_empty() {
                    return Ok(Exit::User);
                }
                let snapshot = &built.snapshot;
                let upstreams = snapshot.upstreams().count();
                print(&format!(
                    "{}: ok, {} regions, {upstreams} upstreams, {} routes, {} rules",
                    paths.file.display(),
                    snapshot.regions.len(),
                    snapshot.routes.len(),
                    snapshot.waf.rules.len()
                ));
                Ok(Exit::Done)
            }
            Err(failed) => {
                print_problems(&failed.problems);
                Ok(Exit::User)
            }
        }
    }
}
