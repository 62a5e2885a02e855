//! Routes and their steering, from what was typed to what can run.

use http::HeaderValue;

use super::Compiler;
use crate::config::problem::KeyPath;
use crate::config::units::{HostPattern, Name};
use crate::config::{self, OneOrMany, Problem};
use crate::key_path;
use crate::regions::RegionId;
use crate::regions::steering::{Geo, Policy, Steering, Writes};
use crate::routes::budget::Allowance;
use crate::routes::compression::{Coding, Compression};
use crate::routes::{Retry, Route, RouteId, Router, Timeouts};
use crate::rules::Phase;

impl Compiler<'_> {
    pub(super) fn routes(&mut self, routes: &[config::Route]) -> (Box<[Route]>, Router) {
        let mut router = Router::default();
        let names: Vec<String> = routes
            .iter()
            .enumerate()
            .map(|(i, r)| r.name.as_ref().map_or_else(|| format!("route-{}", i + 1), |n| n.0.clone()))
            .collect();
        let built = routes
            .iter()
            .enumerate()
            .map(|(i, route)| {
                let path = key_path!["routes", i];
                let name = names.get(i).cloned().unwrap_or_default();
                if names.iter().take(i).any(|n| *n == name) {
                    self.error(path.join("name"), format!("another route is called `{name}` too"));
                }
                self.paths(&path, i, route, &names, &mut router);
                self.route(&path, name, route)
            })
            .collect();
        (built, router)
    }

    fn paths(&mut self, path: &KeyPath, i: usize, route: &config::Route, names: &[String], router: &mut Router) {
        let id = RouteId(u32::try_from(i).unwrap_or(u32::MAX));
        let any_host = [HostPattern::Any];
        let hosts: &[HostPattern] = if route.hosts.is_empty() { &any_host } else { &route.hosts };
        let mut paths: Vec<&str> = route.paths.iter().map(|p| p.0.as_str()).collect();
        if paths.is_empty() {
            paths.push("");
        }
        for host in hosts {
            for prefix in &paths {
                // "/" and "any path" say the same, so they must not both win.
                let prefix = if *prefix == "/" { "" } else { prefix };
                if let Err(taken) = router.add(host, prefix, id, route.matches.is_some()) {
                    let taken = names.get(taken.0 as usize).map_or("", String::as_str);
                    let shown = if prefix.is_empty() { "/" } else { prefix };
                    self.problems.push(
                        Problem::error(
                            path.clone(),
                            format!("host {} with path `{shown}` is taken by route `{taken}`", shown_host(host)),
                        )
                        .hint("routes are chosen by host and path, so each pair may stand once"),
                    );
                }
            }
        }
    }

    fn route(&mut self, path: &KeyPath, name: String, route: &config::Route) -> Route {
        let config::Route {
            name: _,
            hosts: _,
            paths: _,
            matches,
            steering,
            max_requests,
            redirect,
            rewrite,
            max_body,
            cache,
            compression,
            grpc_web,
            https,
            timeouts,
            retry,
            streaming,
            region_header,
            replay,
            client_regions,
        } = route;
        let config::Timeouts { connect, first_byte, idle, total } = timeouts;
        for (key, value) in [("connect", connect), ("first_byte", first_byte), ("idle", idle), ("total", total)] {
            if value.0.is_zero() {
                self.error(path.join("timeouts").join(key), format!("`{key}` must be longer than nothing"));
            }
        }
        let config::Retry { attempts, statuses, non_idempotent, budget } = retry;
        let config::RetryBudget { percent, min_per_second } = *budget;
        let filter = matches.as_ref().and_then(|m| self.filter(&path.join("match"), m, Phase::Request));
        let conditional = filter.is_some();
        Route {
            filter,
            steering: self.steering(&path.join("steering"), &name, steering),
            bound: max_requests.map(|most| (self.memory.route(&name), most)),
            redirect: redirect.as_ref().and_then(|to| self.location(&path.join("redirect"), to)),
            rewrite: self.rewrite(&path.join("rewrite"), rewrite),
            max_body: max_body.map(|size| size.0),
            cache: self.route_cache(&path.join("cache"), *cache, conditional),
            compression: self.compression(&path.join("compression"), compression),
            grpc_web: *grpc_web,
            https: https.redirect.then_some(https.port),
            hsts: https.hsts.map(hsts),
            timeouts: Timeouts { connect: connect.0, first_byte: first_byte.0, idle: idle.0, total: total.0 },
            retry: Retry {
                attempts: attempts.and_then(|a| u8::try_from(a).ok()),
                statuses: statuses.iter().copied().collect(),
                non_idempotent: *non_idempotent,
                allowance: Allowance { percent, min_per_second },
                budget: self.memory.budget(&name),
            },
            streaming: *streaming,
            region_header: *region_header,
            replay: *replay,
            client_regions: *client_regions,
            name: name.into(),
        }
    }

    fn compression(&mut self, at: &KeyPath, compression: &config::Compression) -> Option<Compression> {
        let config::Compression { enabled, codings, min_length, types } = compression;
        for (i, one) in types.iter().enumerate() {
            let rest = one.strip_suffix('*').unwrap_or(one);
            let token = |c: char| c.is_ascii_alphanumeric() || "/+-.".contains(c);
            if rest.is_empty() || !rest.chars().all(token) || !(one.contains('/') || one.starts_with('+')) {
                let problem = Problem::error(at.join("types").join(i), format!("`{one}` is no media type"));
                self.problems.push(problem.hint("for example `text/html`, `text/*` or `+json`"));
            }
        }
        if *enabled && (codings.is_empty() || types.is_empty()) {
            self.error(at.clone(), "there is nothing to compress, or nothing to compress with");
        }
        let coding = |coding: &config::Coding| match coding {
            config::Coding::Zstd => Coding::Zstd,
            config::Coding::Br => Coding::Brotli,
            config::Coding::Gzip => Coding::Gzip,
        };
        enabled.then(|| Compression {
            codings: codings.iter().map(coding).collect(),
            min_length: min_length.0,
            types: types.iter().map(|one| one.to_ascii_lowercase().into()).collect(),
        })
    }

    fn steering(&mut self, at: &KeyPath, route: &str, steering: &config::Steering) -> Steering {
        // Exhaustive, so that a new key must be handled here.
        let config::Steering {
            policy,
            countries,
            continents,
            default,
            failover,
            only,
            weights,
            sticky,
            writes,
            writes_failover,
            read_your_writes,
        } = steering;
        let only = only.as_ref().map(|names| self.named(&at.join("only"), names));
        let areas = countries.iter().map(|(area, names)| {
            let at = at.join("countries").join(area);
            if !area.country.is_assigned() {
                let problem = Problem::warning(at.clone(), format!("no country has the code `{}`", area.country));
                self.problems.push(problem.hint("see ISO 3166-1"));
            }
            if area.subdivision.is_some() && self.resources.databases.cities.is_none() {
                let problem = Problem::warning(at.clone(), "subdivisions are in a city database, and there is none");
                self.problems.push(problem.hint("set `client.city_database`"));
            }
            (*area, self.within(&at, names, only.as_deref()))
        });
        let areas = areas.collect();
        let continents = continents.iter().map(|(continent, names)| {
            let at = at.join("continents").join(continent);
            (*continent, self.within(&at, names, only.as_deref()))
        });
        let continents = continents.collect();
        let default = match (default, &only) {
            (Some(names), _) => self.within(&at.join("default"), names, only.as_deref()),
            (None, _) if steering.policy == config::Policy::Weighted => Vec::new(),
            (None, Some(only)) => only.first().copied().into_iter().collect(),
            (None, None) => vec![RegionId(0)],
        };
        let failover = self.within(&at.join("failover"), &OneOrMany::Many(failover.clone()), only.as_deref());
        let writes = self.writes(at, writes.as_ref(), writes_failover, *read_your_writes, only.as_deref());
        let geo = Geo::new(areas, continents, default);
        // Dynamic policies order what the route names, or else every region.
        let named = steering.default.is_some() || !steering.countries.is_empty() || !steering.continents.is_empty();
        let mut pool: Vec<RegionId> = match (&only, named) {
            (Some(only), _) => only.clone(),
            (None, true) => geo.named().chain(failover.iter().copied()).collect(),
            (None, false) if !failover.is_empty() => failover.clone(),
            (None, false) => (0..self.names.len()).filter_map(|i| u16::try_from(i).ok().map(RegionId)).collect(),
        };
        pool.sort_unstable();
        pool.dedup();
        let policy = match policy {
            config::Policy::Geo => Policy::Geo,
            config::Policy::Weighted => {
                let (names, weights): (Vec<Name>, Vec<u32>) =
                    weights.iter().map(|(name, weight)| (name.clone(), *weight)).unzip();
                if names.is_empty() {
                    let problem = Problem::error(at.join("policy"), "`policy: weighted` needs `weights`");
                    self.problems.push(problem.hint("for example `weights: { us_east: 3, eu_west: 1 }`"));
                }
                for (name, weight) in names.iter().zip(&weights) {
                    if !(1..=1000).contains(weight) {
                        self.error(at.join("weights").join(name), "expected a weight from 1 to 1000");
                    }
                }
                let named = names.iter().map(|name| self.inside(&at.join("weights").join(name), name, only.as_deref()));
                let named: Vec<Option<RegionId>> = named.collect();
                let known = named.iter().zip(&weights).filter_map(|(region, weight)| Some(((*region)?, *weight)));
                let (regions, weights) = known.unzip();
                pool = regions;
                Policy::Weighted { weights, sticky: *sticky }
            }
            config::Policy::Proximity => {
                for region in &pool {
                    if !self.located.get(usize::from(region.0)).copied().unwrap_or(true) {
                        let name = self.names.get(usize::from(region.0)).map(ToString::to_string).unwrap_or_default();
                        let message = format!("`policy: proximity` needs `location` of region `{name}`");
                        let problem = Problem::error(at.join("policy"), message);
                        self.problems.push(problem.hint("for example `location: { latitude: 51.5, longitude: -0.1 }`"));
                    }
                }
                Policy::Proximity
            }
            config::Policy::Latency => {
                Policy::Latency { learned: self.memory.latency.clone(), route: crate::request::hash(route.as_bytes()) }
            }
        };
        self.idle_keys(at, steering);
        Steering { policy, geo, pool, failover, only, writes }
    }

    /// Keys that the policy does not read are errors: what is typed should do something.
    fn idle_keys(&mut self, at: &KeyPath, steering: &config::Steering) {
        let weighted = steering.policy == config::Policy::Weighted;
        let idle = [
            ("weights", !weighted && !steering.weights.is_empty()),
            ("sticky", !weighted && steering.sticky),
            ("countries", weighted && !steering.countries.is_empty()),
            ("continents", weighted && !steering.continents.is_empty()),
            ("default", weighted && steering.default.is_some()),
        ];
        for (key, _) in idle.iter().filter(|(_, idle)| *idle) {
            let hint = if weighted { "`policy: weighted` reads `weights`" } else { "it belongs to `policy: weighted`" };
            self.problems.push(Problem::error(at.join(*key), format!("`{key}` has no effect here")).hint(hint));
        }
    }

    fn writes(
        &mut self,
        at: &KeyPath,
        primary: Option<&Name>,
        failover: &[Name],
        read_your_writes: Option<config::units::Span>,
        only: Option<&[RegionId]>,
    ) -> Option<Writes> {
        let Some(primary) = primary else {
            for (key, idle) in [("writes_failover", !failover.is_empty()), ("read_your_writes", read_your_writes.is_some())] {
                if idle {
                    let problem = Problem::error(at.join(key), format!("`{key}` has no effect here"));
                    self.problems.push(problem.hint("set `writes` to the region that takes them"));
                }
            }
            return None;
        };
        Some(Writes {
            primary: self.inside(&at.join("writes"), primary, only)?,
            failover: self.within(&at.join("writes_failover"), &OneOrMany::Many(failover.to_vec()), only),
            read_your_writes: read_your_writes.map(|span| span.0).filter(|span| !span.is_zero()),
        })
    }

    fn inside(&mut self, path: &KeyPath, name: &Name, only: Option<&[RegionId]>) -> Option<RegionId> {
        self.within(path, &OneOrMany::One(name.clone()), only).first().copied()
    }

    /// The regions by name; one that `only` does not have is an error.
    fn within(&mut self, path: &KeyPath, names: &OneOrMany, only: Option<&[RegionId]>) -> Vec<RegionId> {
        let found = self.named(path, names.as_slice());
        for (i, region) in found.iter().enumerate() {
            if only.is_some_and(|only| !only.contains(region)) {
                let name = self.names.get(usize::from(region.0)).map(ToString::to_string).unwrap_or_default();
                let problem = Problem::error(path.join(i), format!("region `{name}` is not in `only`"));
                self.problems.push(problem.hint("add it to `only`, or take it out here"));
            }
        }
        found
    }
}

fn shown_host(host: &HostPattern) -> String {
    match host {
        HostPattern::Any => "`*`".to_owned(),
        HostPattern::Exact(name) => format!("`{name}`"),
        HostPattern::Below(name) => format!("`*.{name}`"),
    }
}

/// RFC 6797, section 6.1.
fn hsts(said: config::Hsts) -> HeaderValue {
    let config::Hsts { max_age, include_subdomains, preload } = said;
    let mut value = format!("max-age={}", max_age.0.as_secs());
    value.push_str(if include_subdomains { "; includeSubDomains" } else { "" });
    value.push_str(if preload { "; preload" } else { "" });
    HeaderValue::try_from(value).unwrap_or(HeaderValue::from_static("max-age=0"))
}
