//! `portolan check`: every problem at once.

use std::sync::Arc;

use clap::Args;

use super::{ConfigArgs, Exit, print, print_problems};
use crate::regions::health::UpstreamState;
use crate::reload::build;

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
        match build(&paths, None, &mut |url| Arc::new(UpstreamState::new(url.clone()))) {
            Ok(built) => {
                print_problems(&built.warnings);
                if self.strict && !built.warnings.is_empty() {
                    return Ok(Exit::User);
                }
                let snapshot = &built.snapshot;
                let upstreams = snapshot.upstreams().count();
                print(&format!(
                    "{}: ok, {} regions, {upstreams} upstreams, {} routes",
                    paths.file.display(),
                    snapshot.regions.len(),
                    snapshot.routes.len()
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
