//! The command line: one file per command, each a call into the library.

mod cache;
mod check;
mod client;
mod demo;
mod explain;
mod figures;
mod limits;
mod region;
mod reload;
mod rules;
mod run;
mod status;
mod top;
mod visitors;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Paths, Problem};

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done,
    /// The user's fault: bad configuration, bad usage.
    User,
    /// Ours, or the machine's.
    Ours,
}

/// An error that the user can mend; [`main`] turns it into [`Exit::User`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UserError(String);

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::User => 1,
            Exit::Ours => 2,
        })
    }
}

/// A self-hosted edge: puts people before the right regional backend, and keeps them served when regions fail.
#[derive(Debug, Parser)]
#[command(name = "portolan", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM; SIGHUP reloads, SIGQUIT hands the sockets to the next process
    Run(Run),
    /// Start five small regional origins and a proxy before them, and say what to try
    Demo(demo::Demo),
    /// Say every problem of a configuration, each with its place and a hint
    Check(check::Check),
    /// Say what would happen to a request, step by step and why; nothing is sent
    Explain(explain::Explain),
    /// Try rules out
    Rules(rules::RulesCommand),
    /// Print the JSON Schema of the configuration
    Schema,
    /// Show the state of a running process
    Status(status::StatusCommand),
    /// Show a running process live: regions, rates, latency, failovers, countries, rules
    Top(top::Top),
    /// Make a running process read its configuration again
    Reload(client::AdminArgs),
    /// Take a region out of a running process, and bring it back
    Region(region::RegionCommand),
    /// Purge what a running process has stored
    Cache(cache::CacheCommand),
    /// Show who is near a limit or refused for a time, and let somebody begin anew
    Limits(limits::LimitsCommand),
}

/// Where the configuration is.
#[derive(Debug, Args)]
struct ConfigArgs {
    /// The configuration file
    #[arg(long, short, value_name = "FILE", default_value = "config/portolan.yaml")]
    config: PathBuf,
    /// Lay FILE.NAME.yaml, beside the file, over it
    #[arg(long, value_name = "NAME")]
    env: Option<String>,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    config: ConfigArgs,
    /// Take the sockets of the running process: wait at `upgrade_socket` until it gets SIGQUIT
    #[arg(long)]
    upgrade: bool,
}

impl ConfigArgs {
    fn paths(self) -> Paths {
        Paths { file: self.config, environment: self.env }
    }
}

/// Parses the command line and runs the command. An error is ours, or the machine's.
pub fn main() -> anyhow::Result<Exit> {
    match command() {
        Err(error) if error.is::<UserError>() => {
            eprintln!("error: {error}");
            Ok(Exit::User)
        }
        result => result,
    }
}

fn command() -> anyhow::Result<Exit> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not mistakes.
            let exit = if error.use_stderr() { Exit::User } else { Exit::Done };
            error.print()?;
            return Ok(exit);
        }
    };
    match cli.command {
        Command::Run(run) => run::run(run.config.paths(), run.upgrade, run::Extra::default()),
        Command::Demo(demo) => demo.run(),
        Command::Check(check) => check.run(),
        Command::Explain(explain) => explain.run(),
        Command::Rules(rules) => rules.run(),
        Command::Schema => {
            print(&format!("{:#}", crate::config::schema()));
            Ok(Exit::Done)
        }
        Command::Status(status) => status.run(),
        Command::Top(top) => top.run(),
        Command::Reload(admin) => reload::run(&admin),
        Command::Region(region) => region.run(),
        Command::Cache(cache) => cache.run(),
        Command::Limits(limits) => limits.run(),
    }
}

/// Prints to standard output. A reader that left (`| head`) is no error.
fn print(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints problems to standard error, in colour where a person reads them.
fn print_problems(problems: &[Problem]) {
    let color = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    for problem in problems {
        eprintln!("{}\n", problem.render(color));
    }
    let errors = problems.iter().filter(|p| p.is_error()).count();
    let warnings = problems.len() - errors;
    let plural = |n: usize, word: &str| if n == 1 { format!("1 {word}") } else { format!("{n} {word}s") };
    let parts: Vec<_> =
        [(errors, "error"), (warnings, "warning")].iter().filter(|(n, _)| *n > 0).map(|(n, w)| plural(*n, w)).collect();
    if !parts.is_empty() {
        eprintln!("{}", parts.join(", "));
    }
}
