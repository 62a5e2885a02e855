//! `portolan rules test`: what every rule would do to requests from a file, before it is deployed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::Value as Json;

use super::{ConfigArgs, Exit, UserError, print, print_problems};
use crate::decide::{Decision, Next, decide};
use crate::explain::{Asked, Question};
use crate::memory::Memory;
use crate::reload::{Known, build};
use crate::request::Moment;
use crate::respond::Refusal;
use crate::signing::Key;
use crate::upstream::plan::Mode;
use crate::waf::managed::{self, Signature};

#[derive(Debug, Args)]
pub struct RulesCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Run requests against redirects, transforms and rules, and say what each would do; nothing is sent
    Test(Test),
    /// Print the managed ruleset: each rule's name, category, lowest sensitivity, and what it tells
    List,
}

#[derive(Debug, Args)]
struct Test {
    #[command(flatten)]
    config: ConfigArgs,
    /// Requests: JSON lines as `portolan explain` takes them (ip, method, url, headers, body), or a HAR file
    #[arg(long, value_name = "FILE")]
    requests: PathBuf,
    /// The address that connects, where a request tells none
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)))]
    ip: IpAddr,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
}

impl RulesCommand {
    pub fn run(self) -> anyhow::Result<Exit> {
        match self.action {
            Action::Test(test) => test.run(),
            Action::List => {
                for Signature { id, category, level, reason, .. } in managed::all() {
                    let (category, level) = (format!("{category:?}").to_lowercase(), format!("{level:?}").to_lowercase());
                    print(&format!("{id:<28} {category:<10} {level:<7} {reason}"));
                }
                Ok(Exit::Done)
            }
        }
    }
}

impl Test {
    fn run(self) -> anyhow::Result<Exit> {
        let paths = self.config.paths();
        let memory = Memory::new(Key::new(b"rules test"));
        let built = match build(&paths, &Known::default(), &memory) {
            Ok(built) => built,
            Err(failed) => {
                print_problems(&failed.problems);
                return Ok(Exit::User);
            }
        };
        let questions = read(&self.requests, self.ip)?;
        let mut totals: BTreeMap<String, usize> = BTreeMap::new();
        for (n, question) in questions.iter().enumerate() {
            let asked = match Asked::new(question) {
                Ok(asked) => asked,
                Err(error) => {
                    eprintln!("error: request {}: {error}", n + 1);
                    return Ok(Exit::User);
                }
            };
            let facts = asked.facts(question.ip, built.snapshot.waf.body_limit);
            // Each is judged as the first of its client: nothing is remembered.
            let decision = decide(&built.snapshot, &facts, Moment::default(), Mode::Peek);
            let outcome = outcome(&decision);
            *totals.entry(outcome.clone()).or_default() += 1;
            match self.json {
                true => print(&line(question, &decision, &outcome).to_string()),
                false => print(&text(question, &decision, &outcome)),
            }
        }
        if !self.json {
            let totals: Vec<_> = totals.iter().map(|(outcome, n)| format!("{outcome} × {n}")).collect();
            print(&format!("{} requests: {}", questions.len(), totals.join(", ")));
        }
        Ok(Exit::Done)
    }
}

/// How it ends, in a word or two.
fn outcome(decision: &Decision) -> String {
    let refusal = match &decision.next {
        Next::Forward(_) | Next::NeedBody | Next::Lookup | Next::NeedShared(_) => return "pass".to_owned(),
        Next::Refuse(refusal) => refusal,
    };
    let acted = decision.matches.iter().rev().find(|m| m.action != crate::waf::LOG).map(|m| m.action);
    let word = match refusal {
        Refusal::NoRoute => "no route",
        Refusal::Redirected { .. } => "redirect",
        _ => acted.unwrap_or("refused"),
    };
    format!("{word} {}", refusal.status())
}

fn text(question: &Question, decision: &Decision, outcome: &str) -> String {
    let mut text = format!("{outcome:<16} {} {} from {}", question.method, question.url, question.ip);
    if let Some(path) = &decision.path {
        text.push_str(&format!("\n{:16}   seen as {path}", ""));
    }
    for found in &decision.matches {
        let saw: Vec<_> =
            found.seen.iter().map(|s| format!("{} is {}", s.operand, s.value.as_deref().unwrap_or("missing"))).collect();
        text.push_str(&format!("\n{:16}   {} ({}): {}", "", found.rule, found.action, saw.join(", ")));
    }
    text
}

fn line(question: &Question, decision: &Decision, outcome: &str) -> Json {
    let matches = decision.matches.iter().map(|m| {
        let saw: BTreeMap<_, _> = m.seen.iter().map(|s| (&s.operand, &s.value)).collect();
        serde_json::json!({ "rule": *m.rule, "action": m.action, "saw": saw })
    });
    let matches: Vec<_> = matches.collect();
    serde_json::json!({
        "method": question.method,
        "url": question.url,
        "ip": question.ip,
        "outcome": outcome,
        "seen_as": decision.path,
        "matches": matches,
    })
}

/// The requests of a file: HAR if it is one JSON object with `log`, else one request a line.
fn read(file: &Path, ip: IpAddr) -> anyhow::Result<Vec<Question>> {
    let text = std::fs::read_to_string(file)
        .map_err(|e| anyhow::anyhow!(UserError(format!("cannot read `{}`: {e}", file.display()))))?;
    let wrong = |line: usize, error: &dyn std::fmt::Display| UserError(format!("{}:{line}: {error}", file.display()));
    if let Ok(har) = serde_json::from_str::<Json>(&text)
        && let Some(entries) = har.pointer("/log/entries").and_then(Json::as_array)
    {
        let questions: Vec<_> = entries.iter().filter_map(|entry| from_har(entry, ip)).collect();
        if questions.len() < entries.len() {
            eprintln!("{} entries are no HTTP requests, and are left out", entries.len() - questions.len());
        }
        return Ok(questions);
    }
    let mut questions = Vec::new();
    for (n, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let mut json: Json = serde_json::from_str(line).map_err(|e| wrong(n + 1, &e))?;
        if let Some(map) = json.as_object_mut() {
            map.entry("ip").or_insert_with(|| ip.to_string().into());
        }
        questions.push(serde_json::from_value(json).map_err(|e| wrong(n + 1, &e))?);
    }
    Ok(questions)
}

/// One entry of a HAR file (HTTP Archive 1.2).
fn from_har(entry: &Json, ip: IpAddr) -> Option<Question> {
    let request = entry.get("request")?;
    let text = |value: &Json, key: &str| value.get(key).and_then(Json::as_str).map(str::to_owned);
    let headers = request.get("headers").and_then(Json::as_array).into_iter().flatten();
    // Browsers write down HTTP/2's pseudo-headers, too.
    let headers = headers.filter_map(|h| Some((text(h, "name")?, text(h, "value")?))).filter(|(name, _)| !name.starts_with(':'));
    Some(Question {
        ip,
        method: text(request, "method").unwrap_or("GET".to_owned()),
        // Browsers write down `data:` and `blob:` as well.
        url: text(request, "url").filter(|url| url.starts_with("http://") || url.starts_with("https://"))?,
        headers: headers.collect(),
        body: request.get("postData").and_then(|p| text(p, "text")),
        down: Vec::new(),
        response: None,
    })
}
