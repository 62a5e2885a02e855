//! `portolan region`: take a region out of a running process, and bring it back.

use clap::{Args, Subcommand};
use serde_json::Value;

use super::client::AdminArgs;
use super::{Exit, print};
use crate::kept::rfc3339;
use crate::orders::Order;

#[derive(Debug, Args)]
pub struct RegionCommand {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Send a region's traffic elsewhere for a set time; it comes back by itself
    Evacuate {
        /// The region
        name: String,
        /// For how long, from 1m to 72h
        #[arg(long = "for", value_name = "DURATION")]
        lasts: String,
        /// How long traffic takes to leave, and to come back
        #[arg(long, value_name = "DURATION", default_value = "0s")]
        ramp: String,
        #[command(flatten)]
        common: Common,
    },
    /// Let a region take no new clients until it is restored
    Drain {
        /// The region
        name: String,
        /// How long clients with affinity and WebSockets may stay; by default shutdown.grace
        #[arg(long, value_name = "DURATION")]
        grace: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// End an evacuation or a drain
    Restore {
        /// The region
        name: String,
        /// Why, for the log
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Show every region, and the order in force for it
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        admin: AdminArgs,
    },
}

#[derive(Debug, Args)]
struct Common {
    /// Why, for those who ask later
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Also where it would leave a route without a healthy region
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

impl RegionCommand {
    pub fn run(self) -> anyhow::Result<Exit> {
        match self.command {
            Command::Evacuate { name, lasts, ramp, common: Common { reason, force, admin } } => {
                let order = Order { lasts: Some(lasts), ramp: Some(ramp), reason, force, ..Order::default() };
                carry_out(&admin, &name, "evacuate", &order)
            }
            Command::Drain { name, grace, common: Common { reason, force, admin } } => {
                carry_out(&admin, &name, "drain", &Order { grace, reason, force, ..Order::default() })
            }
            Command::Restore { name, reason, admin } => {
                carry_out(&admin, &name, "restore", &Order { reason, ..Order::default() })
            }
            Command::List { json, admin } => list(&admin, json),
        }
    }
}

fn carry_out(admin: &AdminArgs, name: &str, action: &str, order: &Order) -> anyhow::Result<Exit> {
    // A name is letters, digits, `_`, `-` and `.`; anything else is no region, and must not become another path.
    let name: String = url::form_urlencoded::byte_serialize(name.as_bytes()).collect();
    let answer = admin.send("POST", &format!("/regions/{name}/{action}"), &serde_json::to_string(order)?)?;
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    if answer.status != 200 {
        let said = body.get("error").and_then(Value::as_str).unwrap_or(answer.body.trim());
        eprintln!("error: {said}");
        return Ok(if answer.status < 500 { Exit::User } else { Exit::Ours });
    }
    match body.get("order").filter(|order| !order.is_null()) {
        Some(order) => {
            let until = order.get("until").and_then(Value::as_u64).map(|until| format!(" until {}", rfc3339(until)));
            let kind = order.get("kind").and_then(Value::as_str).unwrap_or_default();
            print(&format!("{name} is {kind}{}", until.unwrap_or_default()));
            if body.get("survives_restart") == Some(&Value::Bool(false)) {
                eprintln!("warning: without `state_dir` a restart forgets this");
            }
        }
        None => print(&format!("{name} is restored")),
    }
    Ok(Exit::Done)
}

fn list(admin: &AdminArgs, json: bool) -> anyhow::Result<Exit> {
    let answer = admin.request("GET", "/status.json")?;
    if answer.status != 200 {
        anyhow::bail!("status {}: {}", answer.status, answer.body.trim());
    }
    let status: Value = serde_json::from_str(&answer.body)?;
    let regions = status.get("regions").and_then(Value::as_array).cloned().unwrap_or_default();
    if json {
        print(&serde_json::to_string_pretty(&regions)?);
        return Ok(Exit::Done);
    }
    for region in &regions {
        let text = |key: &str| region.get(key).and_then(Value::as_str).unwrap_or_default();
        let percent = |key: &str| region.get(key).and_then(Value::as_f64).unwrap_or_default() * 100.0;
        let order = region.get("order").filter(|order| !order.is_null());
        let healthy = region.get("healthy") == Some(&Value::Bool(true));
        let state = match order.and_then(|o| o.get("kind")).and_then(Value::as_str) {
            Some(kind) => kind,
            None if healthy => "healthy",
            None => "unhealthy",
        };
        let mut line =
            format!("{:<16} {state:<10} usable {:>3.0} %, keeps {:>3.0} %", text("name"), percent("usable"), percent("granted"));
        if let Some(order) = order {
            if let Some(until) = order.get("until").and_then(Value::as_u64) {
                line.push_str(&format!(", until {}", rfc3339(until)));
            }
            if let Some(reason) = order.get("reason").and_then(Value::as_str).filter(|r| !r.is_empty()) {
                line.push_str(&format!(" ({reason})"));
            }
        }
        print(&line);
    }
    Ok(Exit::Done)
}
