//! The page for people: what `/status.json` says, readable.

use std::fmt::Write;

use super::Status;
use crate::kept::rfc3339;

/// No script, nothing from elsewhere; the style's hash is not needed because there is one place for it.
pub const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'";

const HEAD: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\
<meta http-equiv=refresh content=5><title>Portolan</title><style>\
:root{color-scheme:light dark;--line:#8884;--good:#1a7f4b;--bad:#c0392b}\
@media(prefers-color-scheme:dark){:root{--good:#4cc38a;--bad:#ff8b7e}}\
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.4rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}\
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.4rem .8rem .4rem 0;border-bottom:1px solid var(--line);vertical-align:top}\
.good{color:var(--good)}.bad{color:var(--bad)}code{font-size:.9em}.banner{border:1px solid var(--bad);padding:.5rem 1rem;margin:1rem 0}\
</style>";

/// The page for `status`.
pub fn render(status: &Status) -> String {
    let mut page = HEAD.to_owned();
    // Writing to a string cannot fail.
    let _ = body(&mut page, status);
    page
}

fn body(page: &mut String, status: &Status) -> std::fmt::Result {
    let config = &status.config;
    write!(
        page,
        "<h1>Portolan {}</h1><p>Up since {}, {} client connections. ",
        status.version, status.started, status.connections
    )?;
    write!(page, "Configuration {} in force. ", config.generation)?;
    match &status.country_database {
        Some(database) => write!(page, "Countries from {}, built {}.", text(&database.kind), database.built)?,
        None => page.push_str("No country database: everybody is <code>XX</code>."),
    }
    if !config.last_reload_successful {
        let last = text(&config.last_reload);
        write!(
            page,
            "<div class=banner role=alert><strong class=bad>The configuration read at {last} was refused.</strong> The last good one goes on."
        )?;
    }
    if !config.problems.is_empty() {
        page.push_str("<ul>");
        for problem in &config.problems {
            let place = match (&problem.file, problem.line, problem.column) {
                (Some(file), Some(line), Some(column)) => format!("{file}:{line}:{column}: "),
                _ => String::new(),
            };
            write!(page, "<li><code>{}</code>{}", text(&place), text(&problem.message))?;
            if let Some(hint) = &problem.hint {
                write!(page, " ({})", text(hint))?;
            }
        }
        page.push_str("</ul>");
    }
    if !config.last_reload_successful {
        page.push_str("</div>");
    }
    page.push_str("<h2>Regions</h2><table><tr><th>Region<th>Upstream<th>State<th>At once<th>First byte<th>Why");
    for region in &status.regions {
        for (i, upstream) in region.upstreams.iter().enumerate() {
            let name = if i == 0 { text(&region.name) } else { String::new() };
            let class = if upstream.state == "usable" { "good" } else { "bad" };
            let (url, because) = (text(&upstream.url), text(&upstream.because));
            let first_byte = upstream.first_byte_ms.map_or("–".to_owned(), |ms| format!("{ms:.1} ms"));
            write!(page, "<tr><td>{name}<td><code>{url}</code>")?;
            match &upstream.address {
                Some(address) if !upstream.url.contains(address.as_str()) => {
                    write!(page, "<br><small>{}</small>", text(address))?
                }
                _ => {}
            }
            let word = upstream.state.replace('_', " ");
            write!(page, "<td class={class}>{word}<td>{}<td>{first_byte}<td>{because}", upstream.in_flight)?;
            if let Some(check) = &upstream.check {
                write!(page, "<br><small>Health check {}</small>", text(check))?;
            }
        }
        if let Some(order) = &region.order {
            let until = order.until.map(|until| format!(" until {}", rfc3339(until))).unwrap_or_default();
            let share = (region.granted * 100.0).round();
            let reason = if order.reason.is_empty() { "no reason given".to_owned() } else { text(&order.reason) };
            let kind = order.kind.label();
            write!(page, "<tr><td><td colspan=5 class=bad>{kind}{until}: {reason}. It keeps {share} % of its traffic.")?;
        }
    }
    page.push_str("</table><h2>Routes</h2><table><tr><th>Route<th>Requests in 10 s<th>Retries in 10 s");
    for route in &status.routes {
        write!(page, "<tr><td>{}<td>{}<td>{}", text(&route.name), route.requests_10s, route.retries_10s)?;
    }
    page.push_str("</table><p><a href=/metrics>Metrics</a> · <a href=/status.json>Status as JSON</a>");
    Ok(())
}

/// Text that cannot be taken for markup.
fn text(raw: &str) -> String {
    raw.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
