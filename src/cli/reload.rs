//! `portolan reload`: make a running process read its configuration again.

use serde_json::Value;

use super::client::AdminArgs;
use super::{Exit, print};

pub fn run(admin: &AdminArgs) -> anyhow::Result<Exit> {
    let answer = admin.request("POST", "/reload")?;
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    for problem in body.get("problems").and_then(Value::as_array).into_iter().flatten() {
        let text = |key: &str| problem.get(key).and_then(Value::as_str).unwrap_or_default();
        let number = |key: &str| problem.get(key).and_then(Value::as_u64).unwrap_or_default();
        let place = format!("{}:{}:{}", text("file"), number("line"), number("column"));
        let hint = problem.get("hint").and_then(Value::as_str).map(|h| format!(" ({h})")).unwrap_or_default();
        eprintln!("{}: {place}: {}{hint}", text("severity"), text("message"));
    }
    let generation = body.get("generation").and_then(Value::as_u64).unwrap_or_default();
    if answer.status != 200 {
        eprintln!("refused; configuration {generation} goes on");
        return Ok(Exit::User);
    }
    let changed = body.get("changed").and_then(Value::as_bool).unwrap_or_default();
    print(&if changed {
        format!("configuration {generation} in force")
    } else {
        format!("nothing changed, configuration {generation} in force")
    });
    Ok(Exit::Done)
}
