//! The journey of a request, once, in order. Deterministic; it neither waits nor writes.

use crate::client::address::ClientAddress;
use crate::client::country::LookupResult;
use crate::config::units::Country;
use crate::request::{Facts, Moment};
use crate::respond::Refusal;
use crate::routes::{Matched, Patience};
use crate::snapshot::Snapshot;
use crate::upstream::Plan;
use crate::upstream::plan::Mode;

/// What was decided, and the trail of how: explain, the access log and headers read the same.
#[derive(Debug)]
pub struct Decision {
    /// Who asks.
    pub client: ClientAddress,
    /// Where from.
    pub country: Country,
    /// How the country was found.
    pub lookup: LookupResult,
    /// The route, if one matches.
    pub route: Option<Matched>,
    /// What happens now.
    pub next: Next,
}

/// What happens to a request.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly every request is forwarded, and a box would be its only allocation")]
pub enum Next {
    /// It is answered here.
    Refuse(Refusal),
    /// It goes to an upstream.
    Forward(Plan),
}

/// Decides about one request.
pub fn decide(snapshot: &Snapshot, facts: &Facts<'_>, now: Moment, mode: Mode) -> Decision {
    // Who is asking.
    let client = snapshot.trust.resolve(facts.peer, facts.headers);
    let (country, lookup) = match &snapshot.countries {
        Some(database) => database.lookup(client.ip),
        None => (Country::UNKNOWN, LookupResult::NoDatabase),
    };

    // Which service.
    let matched = snapshot.router.find(facts.host, facts.path);
    let route = matched.and_then(|m| snapshot.route(m.route));
    let Some(route) = route else {
        return Decision { client, country, lookup, route: None, next: Next::Refuse(Refusal::NoRoute) };
    };

    // Where to, in which order, and how patiently.
    let order = route.steering.order(country).clone();
    let patience = if route.streaming || facts.is_patient() { Patience::Idle } else { Patience::FirstByte };
    let may_repeat = facts.is_idempotent() || route.retry.non_idempotent;
    let plan = Plan::new(order, route.timeouts, &route.retry, may_repeat, patience, now, mode);
    Decision { client, country, lookup, route: matched, next: Next::Forward(plan) }
}
