//! How regions and their upstreams are, at the moment of a scrape.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;

use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::{add, keep};
use crate::regions::spill::OVERPROVISIONING;
use crate::regions::{Region, Upstream};
use crate::request::Moment;

/// Regions and their upstreams.
#[derive(Debug)]
pub struct RegionGauges {
    healthy: IntGaugeVec,
    usable: GaugeVec,
    granted: GaugeVec,
    spill: GaugeVec,
    in_flight: IntGaugeVec,
    bound: IntGaugeVec,
    waiting: IntGaugeVec,
    upstream_usable: IntGaugeVec,
    upstream_in_flight: IntGaugeVec,
    upstream_ejections: IntCounterVec,
    dns_stale: IntGaugeVec,
}

impl RegionGauges {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let (region, upstream) = (&["region"], &["region", "upstream"]);
        let ratio = |name: &str, help: &str| add(registry, GaugeVec::new(Opts::new(name, help), region));
        let of_region = |name: &str, help: &str| add(registry, IntGaugeVec::new(Opts::new(name, help), region));
        let of_upstream = |name: &str, help: &str| add(registry, IntGaugeVec::new(Opts::new(name, help), upstream));
        let ejections = Opts::new("portolan_upstream_ejections_total", "How often an address of the upstream was ejected.");
        Ok(Self {
            healthy: of_region("portolan_region_healthy", "1 if at least one upstream of the region is in good health.")?,
            usable: ratio("portolan_region_usable_ratio", "The share of the region's upstreams that is usable.")?,
            granted: ratio("portolan_region_granted_ratio", "The share of its traffic that an operator leaves the region.")?,
            spill: ratio("portolan_region_spill_ratio", "The share of its requests that the region leaves to the next one.")?,
            in_flight: of_region("portolan_region_requests_in_flight", "Requests that the region is answering.")?,
            bound: of_region(
                "portolan_region_adaptive_limit",
                "How many requests at once the region is found to be able to answer.",
            )?,
            waiting: of_region("portolan_region_queue_length", "Requests that wait for a place.")?,
            upstream_usable: of_upstream("portolan_upstream_usable", "How many addresses of the upstream are usable.")?,
            upstream_in_flight: of_upstream("portolan_upstream_requests_in_flight", "Requests that the upstream is answering.")?,
            upstream_ejections: add(registry, IntCounterVec::new(ejections, upstream))?,
            dns_stale: of_upstream(
                "portolan_dns_stale",
                "1 if the upstream's name could not be resolved again when it should have been.",
            )?,
        })
    }

    /// Those of the present only: whatever was removed is gone from here at once.
    pub(super) fn refresh(&self, regions: &[Region], now: Moment) {
        let Self {
            healthy,
            usable,
            granted,
            spill,
            in_flight,
            bound,
            waiting,
            upstream_usable,
            upstream_in_flight,
            upstream_ejections: _,
            dns_stale,
        } = self;
        for gauges in [healthy, in_flight, bound, waiting, upstream_usable, upstream_in_flight, dns_stale] {
            gauges.reset();
        }
        for gauges in [usable, granted, spill] {
            gauges.reset();
        }
        for region in regions {
            let name = &[&*region.name];
            let capacity = region.capacity(now);
            healthy.with_label_values(name).set(i64::from(region.is_healthy(now)));
            usable.with_label_values(name).set(capacity.usable.into());
            granted.with_label_values(name).set(capacity.granted.into());
            let keeps = (OVERPROVISIONING * capacity.usable).min(1.0) * capacity.granted;
            spill.with_label_values(name).set((1.0 - keeps).into());
            in_flight.with_label_values(name).set(region.state.in_flight().into());
            waiting.with_label_values(name).set(region.state.waiting().into());
            if let Some(bounds) = region.adaptive {
                bound.with_label_values(name).set(region.state.adaptive.limit(bounds).into());
            }
            region.upstreams.iter().for_each(|upstream| self.upstream(&region.name, upstream, now));
        }
    }

    fn upstream(&self, region: &str, upstream: &Upstream, now: Moment) {
        let url = upstream.url.to_string();
        let labels = [region, url.as_str()];
        let endpoints = upstream.state.endpoints();
        let usable = endpoints.iter().filter(|e| e.is_usable(now)).count();
        self.upstream_usable.with_label_values(&labels).set(i64::try_from(usable).unwrap_or(i64::MAX));
        let in_flight = endpoints.iter().map(|e| i64::from(e.in_flight())).sum();
        self.upstream_in_flight.with_label_values(&labels).set(in_flight);
        let ejections = upstream.state.ejections.load(Relaxed);
        let counter = self.upstream_ejections.with_label_values(&labels);
        counter.inc_by(ejections.saturating_sub(counter.get()));
        if upstream.url.needs_dns() {
            self.dns_stale.with_label_values(&labels).set(upstream.state.dns.stale.load(Relaxed).into());
        }
    }

    /// Forgets what was counted of upstreams that are gone.
    pub(super) fn sweep(&self, regions: &[Region]) {
        let names = |region: &Region| -> Vec<_> {
            region.upstreams.iter().map(|upstream| (region.name.to_string(), upstream.url.to_string())).collect()
        };
        let known: HashSet<_> = regions.iter().flat_map(names).collect();
        keep(&self.upstream_ejections, &["region", "upstream"], |labels| match labels {
            [region, upstream] => known.contains(&(region.clone(), upstream.clone())),
            _ => false,
        });
    }
}
