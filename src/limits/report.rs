//! What limits know, for those who ask.

use std::collections::BinaryHeap;
use std::time::Duration;

use serde::Serialize;

use super::quota::Algorithm;
use super::table::Handle;
use super::{Action, Decision, Limit, Limits, Seen, seconds};
use crate::request::Moment;

/// A client that used something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Top {
    /// The limit.
    pub limit: String,
    /// The client, if its name is known: those near the limit have one.
    pub key: Option<String>,
    /// Stands for it: `#` and a hash.
    pub handle: String,
    /// What it used.
    pub used: u32,
    /// What it may use.
    pub most: u32,
    /// Seconds until its penalty ends, if it has one.
    pub banned_seconds: Option<u64>,
}

impl Limits {
    /// The clients that used most of what they may, `n` at most; of one limit, or of all.
    pub fn top(&self, n: usize, of: Option<&str>, now: Moment) -> Vec<Top> {
        let Some(ledger) = &self.ledger else { return Vec::new() };
        let limits: Vec<_> = self.rules.iter().filter(|limit| of.is_none_or(|id| *limit.id == *id)).collect();
        // The least of them on top, to be replaced.
        let mut best: BinaryHeap<std::cmp::Reverse<(bool, u64, Handle)>> = BinaryHeap::new();
        ledger.table.each(now, |handle, entry| {
            let Some(limit) = limits.iter().find(|limit| limit.number == entry.limit) else { return };
            let most = limit.quota.most();
            let used = most - entry.count.used(&limit.quota, 1, now).left.min(most);
            let banned = entry.penalty(false, now).is_some();
            if used == 0 && !banned {
                return;
            }
            best.push(std::cmp::Reverse((banned, u64::from(used) * 1_000_000 / u64::from(most.max(1)), handle)));
            if best.len() > n {
                best.pop();
            }
        });
        let told = |std::cmp::Reverse((_, _, handle)): std::cmp::Reverse<(bool, u64, Handle)>| {
            let entry = ledger.table.get(handle)?;
            let limit = limits.iter().find(|limit| limit.number == entry.limit)?;
            let most = limit.quota.most();
            Some(Top {
                limit: limit.id.to_string(),
                key: ledger.book.name(handle).map(|key| key.to_string()),
                handle: format!("#{handle}"),
                used: most - entry.count.used(&limit.quota, 1, now).left.min(most),
                most,
                banned_seconds: entry.penalty(false, now).map(|until| seconds(until.since(now))),
            })
        };
        // The largest first: what is wrapped is turned round.
        best.into_sorted_vec().into_iter().filter_map(told).collect()
    }
}

impl Limit {
    /// What it allows, in words.
    pub fn quota_in_words(&self) -> String {
        let period = humantime::format_duration(self.quota.period).to_string().replace(' ', "");
        let requests = self.quota.requests;
        let what = if self.cost_header.is_some() { "points" } else { "requests" };
        match self.quota.algorithm {
            Algorithm::Sliding => format!("{requests} {what} in any {period}"),
            Algorithm::TokenBucket { burst } => format!("{requests} {what} in {period}, {burst} at once"),
            Algorithm::Fixed => format!("{requests} {what} in each {period}"),
        }
    }

    /// What it does, in words.
    pub fn action_in_words(&self) -> &'static str {
        match &self.action {
            _ if self.dry_run => "dry run",
            Action::Block(_) => "block",
            Action::Challenge(kind) => kind.label(),
            Action::Log => "log",
        }
    }

    /// What it said, in words.
    pub fn said(&self, seen: &Seen) -> String {
        let (left, wait) = (seen.left, in_seconds(seen.wait));
        match seen.decision {
            Decision::Allowed if self.strict => {
                format!("passes as far as this node knows, then {left} left; Redis has the last word")
            }
            Decision::Allowed if self.waits() => format!("passes, {left} left; it counts once there is a response"),
            Decision::Allowed => format!("passes, then {left} left"),
            Decision::Blocked => format!("refused, room again in {wait}"),
            Decision::Banned => format!("refused for another {wait}"),
            Decision::Challenged => format!("challenged; without it room again in {wait}"),
            Decision::Logged => format!("too much, which is only logged; room again in {wait}"),
            Decision::Unavailable => "refused: other nodes cannot be asked".to_owned(),
        }
    }
}

fn in_seconds(span: Duration) -> String {
    format!("{} s", seconds(span))
}
