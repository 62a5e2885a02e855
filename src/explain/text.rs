//! An explanation as people read it.

use std::fmt::{self, Write};

use super::{
    AttemptSeen, CacheSeen, Explanation, Firewall, LimitSeen, MovedFrom, OperandSeen, PatienceSeen, RequestSeen, RuleSeen,
    Transformed,
};

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |label: &str, text: &str, because: &str| {
            let mut line = format!("{label:<9} {text}");
            if !because.is_empty() {
                let _ = write!(line, "\n{:<9}   {because}", "");
            }
            writeln!(f, "{line}")
        };
        let RequestSeen { method, host, path, seen_as } = &self.request;
        let seen_as = seen_as.as_ref().map(|path| format!("routes and rules see the path {path}")).unwrap_or_default();
        row("request", &format!("{method} {host}{path}"), &seen_as)?;
        row("client", &self.client.ip.to_string(), &self.client.because)?;
        let database = match (&self.country.database, &self.country.database_built) {
            (Some(database), Some(built)) => format!("{} in {database}, built {built}", self.country.result),
            _ => "client.country_database is not set".to_owned(),
        };
        let mut country = self.country.subdivision.clone().unwrap_or(self.country.code.clone());
        if let Some(coordinates) = self.country.coordinates {
            let _ = write!(country, ", coordinates of its {}", if coordinates == "city" { "city" } else { "centre" });
        }
        row("country", &country, &database)?;
        match &self.route {
            Some(route) => {
                row("route", &route.name, &route.because)?;
                for beaten in &route.beat {
                    row("", &format!("  beats {}: {}", beaten.name, beaten.because), "")?;
                }
            }
            None => row("route", "none", "no route matches this host and path")?,
        }
        if let Some(class) = &self.class {
            row("class", class, "")?;
        }
        let Firewall { threat_score, rules, managed } = &self.firewall;
        let (before, custom) = (self.conditions.iter().enumerate(), rules.iter().enumerate());
        for (label, (i, rule)) in before.map(|r| ("asked", r)).chain(custom.map(|r| ("rules", r))) {
            let RuleSeen { id, action, outcome, expression, operands } = rule;
            row(if i == 0 { label } else { "" }, &format!("{id} ({action}): {outcome}"), expression)?;
            for OperandSeen { operand, value } in operands {
                row("", &format!("  {operand} is {}", value.as_deref().unwrap_or("missing")), "")?;
            }
        }
        if let Some(score) = threat_score {
            row("threat", &format!("score {score} of 100"), "")?;
        }
        for (i, limit) in self.limits.iter().enumerate() {
            let LimitSeen { id, action, quota, key, outcome, left: _ } = limit;
            let of = key.as_ref().map(|key| format!(" for {key}")).unwrap_or_default();
            row(if i == 0 { "limits" } else { "" }, &format!("{id} ({action}): {outcome}"), &format!("{quota}{of}"))?;
        }
        if let Some(found) = managed {
            row("managed", found, "")?;
        }
        if let Some(CacheSeen { outcome, key, rules, response, stored, lookup: _ }) = &self.cache {
            let key = key.as_ref().map(|key| format!("key {key}")).unwrap_or_default();
            row("cache", outcome, &key)?;
            if !rules.is_empty() {
                row("", &format!("  rules that apply: {}", rules.join(", ")), "")?;
            }
            for (label, lines) in [("response", response), ("stored", stored)] {
                for (i, line) in lines.iter().enumerate() {
                    row(if i == 0 { label } else { "" }, line, "")?;
                }
            }
        }
        if let Some(Transformed { target, headers }) = &self.transforms {
            let target = target.as_ref().map(|t| format!("the origin gets {t}"));
            for (i, line) in target.iter().chain(headers).enumerate() {
                row(if i == 0 { "changes" } else { "" }, line, "")?;
            }
        }
        for (i, region) in self.regions.iter().enumerate() {
            let label = if i == 0 { "regions" } else { "" };
            row(label, &format!("{}. {}", i + 1, region.name), &region.because)?;
            row("", &format!("  {:.0} % of such requests begin here; inside {}", region.share * 100.0, region.inside), "")?;
            for upstream in &region.upstreams {
                row("", &format!("  {} {}", upstream.url, upstream.state), "")?;
            }
        }
        if let Some(MovedFrom { region, because }) = &self.moved {
            row("moved", &format!("not to {region}"), because)?;
        }
        if let Some(patience) = &self.patience {
            let PatienceSeen { connect, silence, total, attempts, repeat, budget } = patience;
            row("patience", &format!("connect {connect}, silence {silence}, total {total}, at most {attempts} attempts"), "")?;
            row("", &format!("sent again? {repeat}"), "")?;
            row("", &format!("retry budget {budget}"), "")?;
        }
        for (i, attempt) in self.attempts.iter().enumerate() {
            let label = if i == 0 { "attempts" } else { "" };
            let AttemptSeen { region, upstream, outcome } = attempt;
            row(label, &format!("{}. {region} {upstream}: {outcome}", i + 1), "")?;
        }
        row("answer", &self.answer.text, "")
    }
}
