//! What is too much at once, from what was typed to what can run.

use super::Compiler;
use crate::config;
use crate::config::problem::{KeyPath, Problem};
use crate::key_path;
use crate::limits::Prefixes;
use crate::overload::adaptive::Bounds;
use crate::overload::{Class, Overload, Share};
use crate::rules::Phase;

/// The share of the class at this position, unless it says another.
fn default_share(position: usize) -> u8 {
    u8::try_from(position).map_or(50, |position| 100u8.saturating_sub(position.saturating_mul(10)).max(50))
}

impl Compiler<'_> {
    pub(super) fn overload(&mut self, overload: &config::Overload, prefixes: Prefixes) -> Overload {
        let config::Overload { max_requests_per_client, max_requests, max_connections, max_connections_per_client, classes } =
            overload;
        let mut compiled: Vec<Class> = Vec::new();
        let mut other = None;
        for (i, class) in classes.iter().enumerate() {
            let at = key_path!["overload", "classes", i];
            if classes.iter().take(i).any(|c| c.name == class.name) {
                self.error(at.join("name"), format!("another class is called `{}` too", class.name));
            }
            if class.name.0 == "none" {
                self.error(at.join("name"), "`none` is what metrics call connections, which have no class yet");
            }
            let filter = match &class.expression {
                Some(source) => self.filter(&at.join("expression"), source, Phase::Routed),
                None if other.is_some() => {
                    let problem = Problem::error(at.clone(), "another class takes all others, too");
                    self.problems.push(problem.hint("give one of the two an `expression`"));
                    None
                }
                None => {
                    other = u8::try_from(i).ok();
                    None
                }
            };
            let share = Share(class.share.unwrap_or(default_share(i)));
            compiled.push(Class { name: class.name.0.as_str().into(), filter, share });
        }
        if classes.len() > 50 {
            self.error(key_path!["overload", "classes"], "expected at most 50 classes");
        }
        // What no class takes is less important than all that have a name.
        if let Some(i) = classes.iter().position(|class| class.name.0 == "default" && class.expression.is_some()) {
            let problem = Problem::error(key_path!["overload", "classes", i, "name"], "`default` is what no other class takes");
            self.problems.push(problem.hint("give it another name, or leave its `expression` out"));
        }
        let other = other.unwrap_or_else(|| {
            let share = Share(default_share(compiled.len()));
            compiled.push(Class { name: "default".into(), filter: None, share });
            u8::try_from(compiled.len() - 1).unwrap_or(u8::MAX)
        });
        Overload {
            classes: compiled.into(),
            other,
            per_client: *max_requests_per_client,
            total: *max_requests,
            connections: *max_connections,
            connections_per_client: *max_connections_per_client,
            prefixes,
            load: self.memory.load.clone(),
        }
    }

    pub(super) fn adaptive(&mut self, at: &KeyPath, adaptive: Option<config::Adaptive>) -> Option<Bounds> {
        let config::Adaptive { min, max } = adaptive?;
        if min > max {
            self.error(at.join("adaptive").join("min"), format!("`min` is more than `max`, which is {max}"));
        }
        Some(Bounds { min, max: max.max(min) })
    }
}
