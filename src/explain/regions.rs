//! The regions of an explanation: in which order, why, and how their upstreams are.

use std::fmt::Write;

use super::{MovedFrom, RegionPlace, UpstreamSeen};
use crate::client::place::Place;
use crate::regions::balance::{Balance, Field};
use crate::regions::endpoint::{Address, Endpoint};
use crate::regions::spill;
use crate::regions::steering::Why;
use crate::regions::{Region, RegionId};
use crate::request::Moment;
use crate::snapshot::Snapshot;
use crate::upstream::Plan;
use crate::upstream::plan::Moved;

pub(super) fn regions(
    snapshot: &Snapshot,
    plan: &Plan,
    place: &Place,
    down: &[RegionId],
    now: Moment,
    learned: &dyn Fn(&Region) -> Option<f32>,
) -> Vec<RegionPlace> {
    let country = place.country;
    let because = |i: usize, why: Why, region: &Region| {
        let nth = plan.order.iter().take(i).filter(|c| c.why == why).count() + 1;
        match why {
            Why::Subdivision => format!("steering.countries.{} names it, place {nth}", place.area()),
            Why::Country => format!("steering.countries.{country} names it, place {nth}"),
            Why::Continent => format!("steering.continents names it for {country}'s continent, place {nth}"),
            Why::Default => format!("steering.default names it, place {nth}, and {country} is not listed"),
            Why::Weighted => format!("drawn by steering.weights, place {nth}"),
            Why::Proximity => {
                let far =
                    place.point().zip(region.location).map(|(client, region)| format!(", {:.0} km", client.distance(region)));
                format!("by distance from the client, place {nth}{}", far.unwrap_or_default())
            }
            Why::Latency => {
                let checks =
                    || region.state.check_time().map(|t| format!(", {:.1} ms in health checks", t.as_secs_f64() * 1_000.0));
                let ms = learned(region).map(|ms| format!(", {ms:.1} ms")).or_else(checks);
                format!("by the time to first byte that was learned, place {nth}{}", ms.unwrap_or(", nothing yet".to_owned()))
            }
            Why::Exploration => "tried out, so that something is learned".to_owned(),
            Why::Failover => format!("steering.failover, place {nth} of those not named above"),
            Why::Writes => "steering.writes: the method is unsafe".to_owned(),
            Why::WritesFailover => format!("steering.writes_failover, place {nth}"),
            Why::ReadYourWrites => "steering.writes: the client wrote just now".to_owned(),
            Why::Preferred => format!("the client prefers it, place {nth}"),
            Why::Forced => format!("the client insists on it, place {nth}"),
            Why::Affinity => "the client's affinity cookie names an upstream in it".to_owned(),
            Why::Replay => "an upstream asked for it".to_owned(),
        }
    };
    let state = |id: RegionId, endpoint: &Endpoint| match down.contains(&id) {
        true => "down (assumed)".to_owned(),
        false => {
            let (word, why) = crate::regions::endpoint::describe(endpoint, now);
            let fine = word == "usable" && endpoint.health.counts().0 == 0;
            if fine { word.to_owned() } else { format!("{word}: {why}") }
        }
    };
    let shares = spill::shares(plan.candidates(&snapshot.regions).map(|(_, region)| region.capacity(now)));
    let seen = |(i, (id, region)): (usize, (RegionId, &Region))| {
        let mut upstreams = Vec::new();
        for upstream in &region.upstreams {
            let endpoints = upstream.state.endpoints();
            let url = |address: &Address| match upstream.url.needs_dns() {
                true => format!("{} ({address})", upstream.url),
                false => upstream.url.to_string(),
            };
            if endpoints.is_empty() {
                upstreams.push(UpstreamSeen { url: upstream.url.to_string(), state: "unresolved".to_owned() });
            }
            upstreams.extend(endpoints.iter().map(|e| UpstreamSeen { url: url(&e.address), state: state(id, e) }));
        }
        RegionPlace {
            name: region.name.to_string(),
            because: plan.order.get(i).map(|c| because(i, c.why, region)).unwrap_or_default(),
            share: shares.get(i).copied().unwrap_or_default(),
            inside: inside(region, now),
            upstreams,
        }
    };
    plan.candidates(&snapshot.regions).enumerate().map(seen).collect()
}

/// How a region treats the requests that it gets.
fn inside(region: &Region, now: Moment) -> String {
    let mut text = match &region.balance {
        Balance::LeastRequests => "least_requests".to_owned(),
        Balance::RoundRobin => "round_robin".to_owned(),
        Balance::Hash(Field::Ip) => "hash by ip".to_owned(),
        Balance::Hash(Field::Cookie(name)) => format!("hash by cookie {name}"),
        Balance::Hash(Field::Header(name)) => format!("hash by header {name}"),
    };
    if let Some(affinity) = &region.affinity {
        let _ = write!(text, ", affinity by cookie {}", affinity.cookie);
    }
    if let Some(hard) = region.limits.hard {
        let _ = write!(text, ", {} of at most {hard} requests at once", region.state.in_flight());
    }
    if let Some(bounds) = region.adaptive {
        let (limit, base) = (region.state.adaptive.limit(bounds), region.state.adaptive.base());
        let base = base.map(|base| format!(", {:.1} ms when nothing waits", base.as_secs_f64() * 1e3)).unwrap_or_default();
        let _ = write!(text, ", adaptive, now {limit} at once{base}");
    }
    if let Some(control) = region.state.control.load().as_ref() {
        let share = control.share(now) * 100.0;
        let _ = write!(text, ", {}: keeps {share:.0} % of its traffic ({})", control.kind.label(), control.reason);
    }
    text
}

pub(super) fn moved(snapshot: &Snapshot, region: RegionId, why: Moved) -> MovedFrom {
    let because = match why {
        Moved::Spill => "a part of its upstreams is out, so a part of its requests moves on, this one included",
        Moved::SlowStart => "it just came back, and has enough requests at once for now",
        Moved::Away => "an operator evacuates or drains it",
        Moved::Ejected => "none of its upstreams is usable",
    };
    let region = snapshot.region(region).map(|r| r.name.to_string()).unwrap_or_default();
    MovedFrom { region, because: because.to_owned() }
}
