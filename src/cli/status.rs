//! `portolan status`: the state of a running process.

use clap::Args;
use serde_json::Value;

use super::client::AdminArgs;
use super::{Exit, print};

#[derive(Debug, Args)]
pub struct StatusCommand {
    #[command(flatten)]
    admin: AdminArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Only ask whether it is alive, which needs no token
    #[arg(long)]
    alive: bool,
}

impl StatusCommand {
    pub fn run(self) -> anyhow::Result<Exit> {
        if self.alive {
            let answer = self.admin.request("GET", "/healthz")?;
            return Ok(if answer.status == 200 { Exit::Done } else { Exit::Ours });
        }
        let answer = self.admin.request("GET", "/status.json")?;
        if answer.status != 200 {
            anyhow::bail!("status {}: {}", answer.status, answer.body.trim());
        }
        if self.json {
            print(answer.body.trim());
            return Ok(Exit::Done);
        }
        let status: Value = serde_json::from_str(&answer.body)?;
        let text = |pointer: &str| match status.pointer(pointer) {
            Some(Value::String(s)) => s.clone(),
            Some(other) => other.to_string(),
            None => String::new(),
        };
        print(&format!("portolan {}, up {} s, {} connections", text("/version"), text("/uptime_seconds"), text("/connections")));
        let outcome =
            if text("/config/last_reload_successful") == "true" { "in force" } else { "REFUSED, the last good one goes on" };
        print(&format!("configuration {}, last read {}: {outcome}", text("/config/generation"), text("/config/last_reload")));
        for problem in status.pointer("/config/problems").and_then(Value::as_array).into_iter().flatten() {
            let field = |key: &str| problem.get(key).and_then(Value::as_str).unwrap_or_default();
            print(&format!("  {}: {}:{}: {}", field("severity"), field("file"), problem["line"], field("message")));
        }
        for region in status.pointer("/regions").and_then(Value::as_array).into_iter().flatten() {
            let name = region.get("name").and_then(Value::as_str).unwrap_or_default();
            if let Some(kind) = region.pointer("/order/kind").and_then(Value::as_str) {
                let share = region.get("granted").and_then(Value::as_f64).unwrap_or_default() * 100.0;
                print(&format!("{name:<16} {kind}, keeps {share:.0} % of its traffic"));
            }
            for upstream in region.get("upstreams").and_then(Value::as_array).into_iter().flatten() {
                let field = |key: &str| upstream.get(key).and_then(Value::as_str).unwrap_or_default();
                // A name with several addresses comes several times.
                let address = field("address");
                let place = match field("url").contains(address) {
                    true => field("url").to_owned(),
                    false => format!("{} ({address})", field("url")),
                };
                print(&format!("{name:<16} {place:<32} {:<10} {}", field("state"), field("because")));
            }
        }
        Ok(Exit::Done)
    }
}
