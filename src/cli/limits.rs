//! `portolan limits`: who is near a limit, who is refused, and to let somebody begin anew.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::AdminArgs;
use super::{Exit, print};
use crate::kept::rfc3339;

#[derive(Debug, Args)]
pub struct LimitsCommand {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the clients that used most of what they may
    Top {
        /// How many
        #[arg(short, value_name = "N", default_value_t = 20)]
        n: usize,
        #[command(flatten)]
        common: Listing,
    },
    /// Show the clients that are refused for a time (mitigation_timeout)
    Banned {
        #[command(flatten)]
        common: Listing,
    },
    /// Let a client begin anew: its counts and its penalty are forgotten
    Reset(Whom),
    /// End a client's penalty; its counts are forgotten too
    Unban(Whom),
}

#[derive(Debug, Args)]
struct Listing {
    /// Of this limit only
    #[arg(long, value_name = "ID")]
    limit: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Debug, Args)]
struct Whom {
    /// The client as `top` and `banned` show it, such as 203.0.113.9 or #9f86d081884c7d65
    key: String,
    /// Under this limit only
    #[arg(long, value_name = "ID")]
    limit: Option<String>,
    #[command(flatten)]
    admin: AdminArgs,
}

impl LimitsCommand {
    pub fn run(self) -> anyhow::Result<Exit> {
        match self.command {
            Command::Top { n, common } => {
                let found = list(&common, &format!("/limits/top?n={n}"))?;
                if common.json {
                    return Ok(Exit::Done);
                }
                for one in &found {
                    let number = |key: &str| one.get(key).and_then(Value::as_u64);
                    let banned = number("banned_seconds").map(|s| format!(", refused for another {s} s")).unwrap_or_default();
                    let used = format!("{} of {}", number("used").unwrap_or_default(), number("most").unwrap_or_default());
                    print(&format!("{:<16} {:<40} {used:>20}{banned}", text(one, "limit"), name(one)));
                }
                told(&found, "nothing is counted")
            }
            Command::Banned { common } => {
                let found = list(&common, "/limits/banned?")?;
                if common.json {
                    return Ok(Exit::Done);
                }
                for one in &found {
                    let until = one.get("until").and_then(Value::as_u64).map(rfc3339).unwrap_or_default();
                    print(&format!("{:<16} {:<40} until {until}", text(one, "limit"), name(one)));
                }
                told(&found, "nobody is refused for a time")
            }
            Command::Reset(whom) | Command::Unban(whom) => reset(&whom),
        }
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// The client's name, or its hash where nobody wrote the name down.
fn name(value: &Value) -> &str {
    Some(text(value, "key")).filter(|key| !key.is_empty()).unwrap_or(text(value, "handle"))
}

fn told(found: &[Value], nothing: &str) -> anyhow::Result<Exit> {
    if found.is_empty() {
        print(nothing);
    }
    Ok(Exit::Done)
}

fn list(common: &Listing, path: &str) -> anyhow::Result<Vec<Value>> {
    let limit = common.limit.as_ref().map(|id| {
        let id: String = url::form_urlencoded::byte_serialize(id.as_bytes()).collect();
        format!("&limit={id}")
    });
    let answer = common.admin.request("GET", &format!("{path}{}", limit.unwrap_or_default()))?;
    if answer.status != 200 {
        anyhow::bail!("status {}: {}", answer.status, answer.body.trim());
    }
    let found: Vec<Value> = serde_json::from_str(&answer.body)?;
    if common.json {
        print(&serde_json::to_string_pretty(&found)?);
    }
    Ok(found)
}

fn reset(whom: &Whom) -> anyhow::Result<Exit> {
    let body = json!({ "key": whom.key, "limit": whom.limit }).to_string();
    let answer = whom.admin.send("POST", "/limits/reset", &body)?;
    let said: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    if answer.status != 200 {
        eprintln!("error: {}", said.get("error").and_then(Value::as_str).unwrap_or(answer.body.trim()));
        return Ok(if answer.status < 500 { Exit::User } else { Exit::Ours });
    }
    let counters = said.get("counters").and_then(Value::as_u64).unwrap_or_default();
    print(&format!("{} begins anew ({counters} {})", whom.key, if counters == 1 { "counter" } else { "counters" }));
    Ok(Exit::Done)
}
