//! `portolan top`: a running process, live, in a terminal.

use std::io::IsTerminal;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Row, Sparkline, Table};
use ratatui::{DefaultTerminal, Frame};
use serde_json::Value;

use super::client::AdminArgs;
use super::figures::{bytes, list, ms, number, percent, rate, span, text};
use super::{Exit, UserError};

/// After a connection was lost.
const AGAIN: Duration = Duration::from_secs(1);
/// Seconds that the curves show at most.
const POINTS: usize = 300;

#[derive(Debug, Args)]
pub struct Top {
    #[command(flatten)]
    admin: AdminArgs,
}

/// What there is to react to.
enum News {
    Curve(Value),
    Now(Value),
    Lost(String),
    /// The process refuses to tell.
    Refused(anyhow::Error),
    Leave,
    Redraw,
}

/// What is shown.
#[derive(Debug, Default)]
struct Shown {
    points: Vec<Value>,
    now: Value,
    lost: Option<String>,
}

impl Top {
    pub fn run(self) -> anyhow::Result<Exit> {
        if !std::io::stdout().is_terminal() {
            return Err(UserError("`portolan top` needs a terminal; `portolan status` does not".to_owned()).into());
        }
        let (tell, told) = sync_channel(16);
        let keys = tell.clone();
        let admin = self.admin;
        // Neither thread is waited for: both end with the process.
        std::thread::Builder::new().name("events".into()).spawn(move || listen(&admin, &tell))?;
        std::thread::Builder::new().name("keys".into()).spawn(move || watch_keys(&keys))?;
        let terminal = ratatui::try_init()?;
        let ended = show(terminal, &told);
        ratatui::restore();
        ended.map(|()| Exit::Done)
    }
}

/// Hands on what the process tells, for as long as somebody listens.
fn listen(admin: &AdminArgs, tell: &SyncSender<News>) {
    loop {
        let ended = admin.events("/events", |name, data| {
            let Ok(data) = serde_json::from_str(data) else { return true };
            match name {
                "curve" => tell.send(News::Curve(data)).is_ok(),
                "now" => tell.send(News::Now(data)).is_ok(),
                _ => true,
            }
        });
        let news = match ended {
            Ok(()) => News::Lost("the connection was closed".to_owned()),
            Err(error) if error.is::<UserError>() => News::Refused(error),
            Err(error) => News::Lost(format!("{error:#}")),
        };
        if tell.send(news).is_err() {
            return;
        }
        std::thread::sleep(AGAIN);
    }
}

fn watch_keys(tell: &SyncSender<News>) {
    while let Ok(event) = event::read() {
        let news = match event {
            Event::Key(key) if key.kind == KeyEventKind::Press => match (key.code, key.modifiers) {
                (KeyCode::Char('q') | KeyCode::Esc, _) => News::Leave,
                (KeyCode::Char('c'), KeyModifiers::CONTROL) => News::Leave,
                _ => continue,
            },
            Event::Resize(..) => News::Redraw,
            _ => continue,
        };
        if tell.send(news).is_err() {
            return;
        }
    }
}

fn show(mut terminal: DefaultTerminal, told: &Receiver<News>) -> anyhow::Result<()> {
    let mut shown = Shown::default();
    loop {
        terminal.draw(|frame| shown.draw(frame))?;
        match told.recv_timeout(Duration::from_secs(5)) {
            Ok(News::Curve(Value::Array(points))) => shown.points = points,
            Ok(News::Now(now)) => shown.hear(now),
            Ok(News::Lost(why)) => shown.lost = Some(why),
            Ok(News::Refused(error)) => return Err(error),
            Ok(News::Leave) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Ok(News::Redraw | News::Curve(_)) | Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

impl Shown {
    fn hear(&mut self, now: Value) {
        self.lost = None;
        if let Some(point) = now.get("point").filter(|point| !point.is_null())
            && self.points.last() != Some(point)
        {
            self.points.push(point.clone());
            let over = self.points.len().saturating_sub(POINTS);
            self.points.drain(..over);
        }
        self.now = now;
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let regions = u16::try_from(list(&self.now, "/regions").len()).unwrap_or(u16::MAX).min(12);
        let [head, curves, middle, below, foot] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(5),
            Constraint::Length(regions.saturating_add(3).max(4)),
            Constraint::Min(6),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        self.head(frame, head);
        self.curves(frame, curves);
        self.regions(frame, middle);
        let [left, centre, right] =
            Layout::horizontal([Constraint::Percentage(28), Constraint::Percentage(32), Constraint::Min(20)]).areas(below);
        self.countries(frame, left);
        let [rules, why] = Layout::vertical([Constraint::Fill(1); 2]).areas(centre);
        self.hits(frame, rules, "Rules and limits", &[("/rules", "rule", "action"), ("/limits", "limit", "decision")]);
        self.hits(frame, why, "No success, and why", &[("/unsuccessful", "why", "")]);
        let [failovers, events] = Layout::vertical([Constraint::Fill(1), Constraint::Fill(2)]).areas(right);
        self.failovers(frame, failovers);
        self.events(frame, events);
        let line = match &self.lost {
            Some(why) => Line::from(format!(" connection lost: {why}")).red(),
            None => Line::from(" q leaves · rates of the last minute unless said otherwise").dim(),
        };
        frame.render_widget(Paragraph::new(line), foot);
    }

    fn head(&self, frame: &mut Frame<'_>, area: Rect) {
        let now = &self.now;
        let process = format!(
            "{} of {} CPUs, {}",
            number(now, "/process/cpus").map_or("?".to_owned(), |cpus| format!("{cpus:.2}")),
            text(now, "/process/cpus_available"),
            number(now, "/process/resident_bytes").map_or("?".to_owned(), bytes),
        );
        let first = Line::from(vec![
            Span::from(" Portolan ").bold(),
            Span::from(format!(
                "{}  up {}  {} connections  {process}",
                text(now, "/version"),
                span(number(now, "/uptime_seconds").unwrap_or_default()),
                text(now, "/connections"),
            )),
        ]);
        let refused = now.pointer("/config/last_reload_successful") == Some(&Value::Bool(false));
        let second = match refused {
            true => Line::from(format!(
                " configuration {} in force; the one read at {} was REFUSED: {}",
                text(now, "/config/generation"),
                text(now, "/config/last_reload"),
                text(now, "/config/problems/0/message"),
            ))
            .red()
            .bold(),
            false => Line::from(format!(
                " configuration {} in force since {}",
                text(now, "/config/generation"),
                text(now, "/config/last_reload")
            ))
            .dim(),
        };
        frame.render_widget(Paragraph::new(vec![first, second]), area);
    }

    fn curves(&self, frame: &mut Frame<'_>, area: Rect) {
        let ten = |key: &str| number(&self.now, &format!("/traffic/10s/{key}"));
        let titles = [
            format!(" {} requests/s ", ten("per_second").map_or("–".to_owned(), rate)),
            format!(" {} errors ", ten("error_ratio").map_or("–".to_owned(), percent)),
            format!(" P50 {}  P95 {}  P99 {} ", ms(ten("p50_ms")), ms(ten("p95_ms")), ms(ten("p99_ms"))),
        ];
        let keys =
            [("/per_second", 100.0, Color::Cyan), ("/error_ratio", 10_000.0, Color::Red), ("/p95_ms", 1_000.0, Color::Yellow)];
        let areas: [Rect; 3] = Layout::horizontal([Constraint::Fill(1); 3]).areas(area);
        for ((area, title), (key, scale, color)) in areas.into_iter().zip(titles).zip(keys) {
            let width = usize::from(area.width.saturating_sub(2));
            let latest = self.points.iter().rev().take(width).rev();
            let data: Vec<u64> = latest.map(|point| (number(point, key).unwrap_or_default() * scale) as u64).collect();
            let curve = Sparkline::default().block(Block::bordered().title(title)).data(&data).style(Style::new().fg(color));
            frame.render_widget(curve, area);
        }
    }

    fn regions(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = list(&self.now, "/regions").iter().map(|region| {
            let state = state(region);
            let color = if state == "healthy" { Color::Green } else { Color::Red };
            let of = |key: &str| number(region, &format!("/traffic/1m/{key}"));
            let why = list(region, "/upstreams")
                .iter()
                .map(|u| format!("{} {}", text(u, "/url"), text(u, "/state")))
                .collect::<Vec<_>>();
            Row::new([
                Span::from(text(region, "/name")).bold(),
                Span::from(state).fg(color),
                Span::from(of("per_second").map_or(String::new(), rate)),
                Span::from(of("error_ratio").map_or(String::new(), percent)),
                Span::from(ms(of("p95_ms"))),
                Span::from(text(region, "/in_flight")),
                Span::from(percent(number(region, "/granted").unwrap_or(1.0))),
                Span::from(why.join(", ")),
            ])
        });
        let widths = [16, 10, 11, 8, 9, 8, 7].map(Constraint::Length).into_iter().chain([Constraint::Fill(1)]);
        let head = Row::new(["REGION", "STATE", "ATTEMPTS/S", "ERRORS", "P95", "AT ONCE", "KEEPS", "UPSTREAMS"]);
        table(frame, area, " Regions ", head, rows, widths);
    }

    fn countries(&self, frame: &mut Frame<'_>, area: Rect) {
        let all = self.now.get("countries").and_then(Value::as_object);
        let mut all: Vec<_> = all
            .into_iter()
            .flatten()
            .filter_map(|(code, seen)| Some((number(seen, "/traffic/per_second")?, code, seen)))
            .collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let rows = all.into_iter().map(|(per_second, code, seen)| {
            let region = seen.get("region").and_then(Value::as_str).unwrap_or("nobody");
            Row::new([code.clone(), region.to_owned(), rate(per_second), ms(number(seen, "/traffic/p95_ms"))])
        });
        let widths = [Constraint::Length(7), Constraint::Fill(1), Constraint::Length(7), Constraint::Length(8)];
        table(frame, area, " Countries ", Row::new(["COUNTRY", "BY", "REQ/S", "P95"]), rows, widths);
    }

    /// Counts of the last minute, of one list or of several.
    fn hits(&self, frame: &mut Frame<'_>, area: Rect, title: &str, lists: &[(&str, &str, &str)]) {
        let mut hits: Vec<_> = lists
            .iter()
            .flat_map(|(pointer, name, what)| {
                list(&self.now, pointer).iter().map(move |hit| {
                    let label = format!("{} {}", text(hit, &format!("/{name}")), text(hit, &format!("/{what}")));
                    (number(hit, "/minute").unwrap_or_default(), [label, text(hit, "/minute"), text(hit, "/total")])
                })
            })
            .collect();
        hits.sort_by(|a, b| b.0.total_cmp(&a.0));
        let rows = hits.into_iter().map(|(_, cells)| Row::new(cells));
        let widths = [Constraint::Fill(1), Constraint::Length(8), Constraint::Length(9)];
        table(frame, area, &format!(" {title} "), Row::new(["", "MINUTE", "IN ALL"]), rows, widths);
    }

    fn failovers(&self, frame: &mut Frame<'_>, area: Rect) {
        let lately = list(&self.now, "/failovers").iter().filter(|f| number(f, "/minute").is_some_and(|n| n > 0.0));
        let rows = lately.map(|f| Row::new([text(f, "/from"), text(f, "/to"), text(f, "/reason"), text(f, "/minute")]));
        let widths = [Constraint::Length(13), Constraint::Length(13), Constraint::Fill(1), Constraint::Length(7)];
        table(frame, area, " Failovers ", Row::new(["FROM", "TO", "WHY", "MINUTE"]), rows, widths);
    }

    fn events(&self, frame: &mut Frame<'_>, area: Rect) {
        let line = |event: &Value| {
            let at = crate::kept::rfc3339(event.get("at").and_then(Value::as_u64).unwrap_or_default());
            let to = event.get("to").and_then(Value::as_str).map(|to| format!(" to {to}")).unwrap_or_default();
            let time = at.get(11..19).unwrap_or_default().to_owned();
            Line::from(vec![
                Span::from(time).dim(),
                Span::from(format!(" {} {}{to}", text(event, "/region"), text(event, "/kind"))).add_modifier(Modifier::BOLD),
                Span::from(format!(" {}", text(event, "/because"))),
            ])
        };
        let lines: Vec<_> = list(&self.now, "/events").iter().map(line).collect();
        frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" What happened (UTC) ")), area);
    }
}

/// How a region is, in a word.
pub(super) fn state(region: &Value) -> String {
    match region.pointer("/order/kind").and_then(Value::as_str) {
        Some(kind) => kind.to_owned(),
        None if region.get("healthy") != Some(&Value::Bool(true)) => "unhealthy".to_owned(),
        None if number(region, "/usable").is_some_and(|usable| usable < 1.0) => "degraded".to_owned(),
        None => "healthy".to_owned(),
    }
}

fn table<'a>(
    frame: &mut Frame<'_>,
    area: Rect,
    title: &str,
    head: Row<'a>,
    rows: impl Iterator<Item = Row<'a>>,
    widths: impl IntoIterator<Item = Constraint>,
) {
    let table = Table::new(rows, widths).header(head.dim()).block(Block::bordered().title(title.to_owned()));
    frame.render_widget(table, area);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::json;

    use super::*;

    fn drawn(shown: &Shown, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| shown.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn what_is_known_is_shown_at_any_size() {
        let mut shown = Shown::default();
        let windows = json!({ "per_second": 12.5, "error_ratio": 0.05, "p50_ms": 1.5, "p95_ms": 20.0, "p99_ms": 2_000.0 });
        shown.hear(json!({
            "version": "1.2.3", "uptime_seconds": 3_700, "connections": 7,
            "config": { "generation": 3, "last_reload": "2026-01-01T00:00:00Z", "last_reload_successful": false, "problems": [{ "message": "no such region" }] },
            "process": { "cpus": 0.5, "cpus_available": 4, "resident_bytes": 1_048_576 },
            "point": { "at": 1, "per_second": 12.5, "error_ratio": 0.0, "p95_ms": 20.0 },
            "traffic": { "10s": windows },
            "regions": [{ "name": "eu_west", "healthy": true, "usable": 1.0, "granted": 0.25, "in_flight": 3, "order": { "kind": "evacuated" }, "traffic": { "1m": windows }, "upstreams": [{ "url": "http://a", "state": "usable" }] }],
            "countries": { "GB": { "region": "us_east", "traffic": windows }, "FR": { "region": null } },
            "rules": [{ "rule": "office", "action": "block", "minute": 4, "total": 40 }],
            "limits": [], "unsuccessful": [{ "why": "rule_blocked", "minute": 4, "total": 40 }],
            "failovers": [{ "from": "eu_west", "to": "us_east", "reason": "away", "minute": 9, "total": 9 }],
            "events": [{ "at": 0, "kind": "evacuated", "region": "eu_west", "because": "power work" }],
        }));
        let text = drawn(&shown, 140, 40);
        for expected in [
            "1.2.3",
            "1 h 1 min",
            "REFUSED: no such region",
            "12 requests/s",
            "5.0 % errors",
            "P99 2.0 s",
            "eu_west",
            "evacuated",
            "25 %",
            "GB",
            "us_east",
            "office block",
            "rule_blocked",
            "away",
            "power work",
            "00:00:00",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
            drawn(&shown, width, height);
            drawn(&Shown::default(), width, height);
        }
        shown.lost = Some("nobody there".to_owned());
        assert!(drawn(&shown, 100, 30).contains("nobody there"));
    }
}
