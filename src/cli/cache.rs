//! `portolan cache purge`.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::AdminArgs;
use super::{Exit, UserError, print};

#[derive(Debug, Args)]
pub struct CacheCommand {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Purge URLs (all their variants), or what begins so, is of a host, or carries a tag
    Purge(Purge),
}

#[derive(Debug, Args)]
struct Purge {
    /// URLs, such as https://shop.example/logo.svg
    urls: Vec<String>,
    /// Everything that begins so, such as https://shop.example/img/
    #[arg(long, value_name = "URL")]
    prefix: Vec<String>,
    /// Everything of a host
    #[arg(long, value_name = "HOST")]
    host: Vec<String>,
    /// Everything that carries a tag (Cache-Tag, Surrogate-Key)
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// Everything
    #[arg(long)]
    all: bool,
    /// Leave it as stale: it may be served while it is fetched again, and where that fails
    #[arg(long)]
    soft: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

impl CacheCommand {
    pub fn run(self) -> anyhow::Result<Exit> {
        let Command::Purge(purge) = self.command;
        let Purge { urls, prefix, host, tag, all, soft, json, admin } = purge;
        if urls.is_empty() && prefix.is_empty() && host.is_empty() && tag.is_empty() && !all {
            return Err(UserError("nothing to purge: name a URL, or use --prefix, --host, --tag or --all".to_owned()).into());
        }
        let body = json!({ "urls": urls, "prefixes": prefix, "hosts": host, "tags": tag, "everything": all, "soft": soft });
        let answer = admin.send("POST", "/cache/purge", &body.to_string())?;
        let said: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        if answer.status != 200 {
            eprintln!("error: {}", said.get("error").and_then(Value::as_str).unwrap_or(answer.body.trim()));
            return Ok(if answer.status < 500 { Exit::User } else { Exit::Ours });
        }
        if json {
            print(&serde_json::to_string_pretty(&said)?);
            return Ok(Exit::Done);
        }
        print(if soft { "purged: what there was is stale" } else { "purged" });
        for node in said.get("nodes").and_then(Value::as_array).into_iter().flatten() {
            let name = node.get("node").and_then(Value::as_str).unwrap_or_default();
            let applied = node.get("applied").and_then(Value::as_bool) == Some(true);
            print(&format!("  node {name}: {}", if applied { "done" } else { "has not said so yet" }));
        }
        if said.get("told_others").and_then(Value::as_bool) == Some(false) {
            print("  the cluster's Redis cannot be reached: other nodes will be told when it can");
        }
        Ok(Exit::Done)
    }
}
