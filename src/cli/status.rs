//! `portolan status`: the state of a running process.

use clap::Args;
use serde_json::Value;

use super::client::AdminArgs;
use super::figures::{self, bytes, list, ms, number, percent, rate, span, text};
use super::top::state;
use super::{Exit, print};
use crate::kept::rfc3339;

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
        let text = |pointer: &str| text(&status, pointer);
        let number = |pointer: &str| number(&status, pointer);
        let minute = |key: &str| number(&format!("/traffic/1m/{key}"));
        let uptime = span(number("/uptime_seconds").unwrap_or_default());
        print(&format!("portolan {}, up {uptime}, {} connections", text("/version"), text("/connections")));
        print(&format!(
            "last minute {} requests/s, {} errors, P50 {}, P95 {}, P99 {}; {} of {} CPUs, {} of memory",
            rate(minute("per_second").unwrap_or_default()),
            percent(minute("error_ratio").unwrap_or_default()),
            ms(minute("p50_ms")),
            ms(minute("p95_ms")),
            ms(minute("p99_ms")),
            number("/process/cpus").map_or("?".to_owned(), |cpus| format!("{cpus:.2}")),
            text("/process/cpus_available"),
            number("/process/resident_bytes").map_or("?".to_owned(), bytes),
        ));
        let outcome =
            if text("/config/last_reload_successful") == "true" { "in force" } else { "REFUSED, the last good one goes on" };
        print(&format!("configuration {}, last read {}: {outcome}", text("/config/generation"), text("/config/last_reload")));
        for problem in list(&status, "/config/problems") {
            let field = |key: &str| problem.get(key).and_then(Value::as_str).unwrap_or_default();
            print(&format!("  {}: {}:{}: {}", field("severity"), field("file"), problem["line"], field("message")));
        }
        print(&format!(
            "\n{:<16} {:<10} {:>10} {:>8} {:>8} {:>8} {:>6}",
            "REGION", "STATE", "ATTEMPTS/S", "ERRORS", "P95", "AT ONCE", "KEEPS"
        ));
        for region in list(&status, "/regions") {
            print(&row(region));
        }
        print(&format!("\n{:<16} {:<32} {:<10} {}", "REGION", "UPSTREAM", "STATE", "WHY"));
        for region in list(&status, "/regions") {
            for upstream in list(region, "/upstreams") {
                print(&place(&figures::text(region, "/name"), upstream));
            }
        }
        for event in list(&status, "/events").iter().take(5) {
            let at = rfc3339(event.get("at").and_then(Value::as_u64).unwrap_or_default());
            let of = |pointer: &str| figures::text(event, pointer);
            let to = Some(of("/to")).filter(|to| !to.is_empty()).map(|to| format!(" to {to}, {} requests", of("/requests")));
            print(&format!("{at} {} {}{}: {}", of("/region"), of("/kind"), to.unwrap_or_default(), of("/because")));
        }
        Ok(Exit::Done)
    }
}

/// A region's figures of the last minute.
fn row(region: &Value) -> String {
    let minute = |key: &str| number(region, &format!("/traffic/1m/{key}"));
    let order = region.get("order").filter(|order| !order.is_null());
    let reason = order.map(|order| figures::text(order, "/reason")).filter(|reason| !reason.is_empty());
    format!(
        "{:<16} {:<10} {:>10} {:>8} {:>8} {:>8} {:>6}{}",
        text(region, "/name"),
        state(region),
        rate(minute("per_second").unwrap_or_default()),
        percent(minute("error_ratio").unwrap_or_default()),
        ms(minute("p95_ms")),
        text(region, "/in_flight"),
        percent(number(region, "/granted").unwrap_or(1.0)),
        reason.map(|reason| format!("  {reason}")).unwrap_or_default(),
    )
}

/// An upstream; one whose name has several addresses comes several times.
fn place(region: &str, upstream: &Value) -> String {
    let field = |key: &str| upstream.get(key).and_then(Value::as_str).unwrap_or_default();
    let address = field("address");
    let place = match field("url").contains(address) {
        true => field("url").to_owned(),
        false => format!("{} ({address})", field("url")),
    };
    format!("{region:<16} {place:<32} {:<10} {}", field("state"), field("because"))
}
