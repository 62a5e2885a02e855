//! What can run: a [`Config`] made whole and immutable, or every problem at once.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::client::address::Trust;
use crate::client::country::CountryDatabase;
use crate::config::problem::{KeyPath, nearest};
use crate::config::units::{HostPattern, Name, Scheme, UpstreamUrl};
use crate::config::{self, Config, Problem};
use crate::key_path;
use crate::regions::health::UpstreamState;
use crate::regions::steering::Steering;
use crate::regions::{Region, RegionId, Tls, Upstream};
use crate::routes::{Retry, Route, RouteId, Router, Timeouts};

/// Files that were read for the configuration, for the pure step that follows.
#[derive(Debug, Default)]
pub struct Resources {
    /// The country database, read and verified.
    pub countries: Option<Arc<CountryDatabase>>,
    /// Authorities in DER by the path that names them.
    pub authorities: HashMap<PathBuf, Arc<[Vec<u8>]>>,
}

/// Everything a decision reads. Each request holds on to one for its whole life.
#[derive(Debug)]
pub struct Snapshot {
    /// Whom to believe about the client.
    pub trust: Trust,
    /// Addresses to countries.
    pub countries: Option<Arc<CountryDatabase>>,
    /// The regions; [`RegionId`] is a position here.
    pub regions: Box<[Region]>,
    /// The routes; [`RouteId`] is a position here.
    pub routes: Box<[Route]>,
    /// Requests to routes.
    pub router: Router,
    /// Where the access log goes.
    pub access_log: PathBuf,
    /// How long requests in flight may go on after SIGTERM.
    pub grace: Duration,
}

impl Snapshot {
    /// A route by its id.
    pub fn route(&self, id: RouteId) -> Option<&Route> {
        self.routes.get(id.0 as usize)
    }

    /// A region by its id.
    pub fn region(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(usize::from(id.0))
    }

    /// A region by its name.
    pub fn region_named(&self, name: &str) -> Option<RegionId> {
        let position = self.regions.iter().position(|r| *r.name == *name)?;
        u16::try_from(position).ok().map(RegionId)
    }

    /// Every upstream with its region.
    pub fn upstreams(&self) -> impl Iterator<Item = (&Region, &Upstream)> {
        self.regions.iter().flat_map(|r| r.upstreams.iter().map(move |u| (r, u)))
    }
}

/// Builds a snapshot. `state_of` gives what is known of an upstream already. Warnings come with
/// success; errors, all of them, in place of it.
pub fn compile(
    config: &Config,
    resources: &Resources,
    state_of: &mut dyn FnMut(&UpstreamUrl) -> Arc<UpstreamState>,
) -> Result<(Snapshot, Vec<Problem>), Vec<Problem>> {
    // Exhaustive, so that a new key must be handled here.
    let Config { listeners: _, admin, client, regions, routes, access_log, shutdown } = config;
    let mut compiler = Compiler { names: regions.keys().collect(), problems: Vec::new() };

    if !admin.address.0.ip().is_loopback() && admin.token.is_none() {
        compiler.problems.push(
            Problem::error(key_path!["admin"], "the admin address is not loopback, so `admin.token` is needed")
                .hint("set `token: \"${file:admin.token}\"`, or listen on 127.0.0.1"),
        );
    }
    if admin.token.as_ref().is_some_and(|t| t.reveal().is_empty()) {
        compiler.error(key_path!["admin", "token"], "the admin token is empty");
    }
    if config.listeners.is_empty() {
        compiler.error(key_path!["listeners"], "there is no listener");
    }
    for (i, listener) in config.listeners.iter().enumerate() {
        let taken = config.listeners.iter().take(i).any(|l| l.address == listener.address);
        if taken || listener.address == admin.address {
            let other = if taken { "another listener" } else { "`admin`" };
            compiler.error(key_path!["listeners", i, "address"], format!("{} has this address too", other));
        }
    }
    if regions.is_empty() {
        compiler.error(key_path!["regions"], "there is no region");
    }
    if routes.is_empty() {
        compiler.error(key_path!["routes"], "there is no route");
    }
    if client.country_database.is_none() {
        compiler.problems.push(
            Problem::warning(
                key_path!["client", "country_database"],
                "without `client.country_database` every client's country is `XX`",
            )
            .hint("set it to a database in MaxMind's format, such as the shipped geoip/country.mmdb"),
        );
    }
    let grace = shutdown.grace.0;

    let regions: Box<[Region]> = regions
        .iter()
        .map(|(name, region)| {
            let upstreams = region.upstreams.iter().enumerate();
            let upstreams = upstreams
                .map(|(i, upstream)| {
                    compiler.upstream(&key_path!["regions", name, "upstreams", i], upstream, resources, state_of)
                })
                .collect();
            Region::new(name.0.as_str().into(), upstreams)
        })
        .collect();
    let (routes, router) = compiler.routes(routes);

    if compiler.problems.iter().any(Problem::is_error) {
        return Err(compiler.problems);
    }
    let snapshot = Snapshot {
        trust: Trust { proxies: client.trusted_proxies.iter().map(|n| n.0).collect(), header: client.ip_header.0.clone() },
        countries: resources.countries.clone(),
        regions,
        routes,
        router,
        access_log: access_log.path.clone(),
        grace,
    };
    Ok((snapshot, compiler.problems))
}

struct Compiler<'a> {
    names: Vec<&'a Name>,
    problems: Vec<Problem>,
}

impl Compiler<'_> {
    fn error(&mut self, path: KeyPath, message: impl Into<String>) {
        self.problems.push(Problem::error(path, message));
    }

    fn upstream(
        &mut self,
        path: &KeyPath,
        upstream: &config::Upstream,
        resources: &Resources,
        state_of: &mut dyn FnMut(&UpstreamUrl) -> Arc<UpstreamState>,
    ) -> Upstream {
        let config::UpstreamOptions { url, weight, host, tls } = upstream.options();
        let config::UpstreamTls { sni, ca } = &tls;
        let tls = match (url.scheme, sni) {
            (Scheme::Https, Some(sni)) if !is_dns_name(sni) => {
                self.error(path.join("tls").join("sni"), format!("`{sni}` is no DNS name"));
                None
            }
            (Scheme::Https, None) if url.ip().is_some() => {
                self.problems.push(
                    Problem::error(path.clone(), "a TLS upstream needs a name to verify, and this is an address")
                        .hint("set `tls: { sni: origin.example.com }`, or use the name in the URL"),
                );
                None
            }
            (Scheme::Https, sni) => Some(Tls {
                sni: sni.clone().unwrap_or_else(|| url.host.clone()),
                authorities: ca.as_ref().and_then(|path| resources.authorities.get(path).cloned()),
            }),
            (Scheme::Http | Scheme::H2c, _) => {
                if sni.is_some() || ca.is_some() {
                    self.problems.push(
                        Problem::error(path.join("tls"), "`tls` has no effect here").hint("the URL must begin with https://"),
                    );
                }
                None
            }
        };
        let host = host.and_then(|h| http::HeaderValue::from_str(&h.0).ok());
        let pool = rustc_hash::FxBuildHasher.hash_one(&tls);
        Upstream { state: state_of(&url), url, weight, host, tls, pool }
    }

    fn routes(&mut self, routes: &[config::Route]) -> (Box<[Route]>, Router) {
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
                if let Err(taken) = router.add(host, prefix, id) {
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
        let config::Route { name: _, hosts: _, paths: _, steering, timeouts, retry, streaming, region_header } = route;
        let config::Steering { policy: config::Policy::Geo, countries, default, failover } = steering;
        let at = path.join("steering");
        let countries = countries
            .iter()
            .map(|(country, names)| {
                let at = at.join("countries").join(country);
                if !country.is_assigned() {
                    self.problems.push(
                        Problem::warning(at.clone(), format!("no country has the code `{country}`")).hint("see ISO 3166-1"),
                    );
                }
                (*country, self.regions(&at, names.as_slice()))
            })
            .collect();
        let default = match default {
            Some(names) => self.regions(&at.join("default"), names.as_slice()),
            None => vec![RegionId(0)],
        };
        let failover = self.regions(&at.join("failover"), failover);
        let config::Timeouts { connect, first_byte, idle, total } = timeouts;
        for (key, value) in [("connect", connect), ("first_byte", first_byte), ("idle", idle), ("total", total)] {
            if value.0.is_zero() {
                self.error(path.join("timeouts").join(key), format!("`{key}` must be longer than nothing"));
            }
        }
        Route {
            name: name.into(),
            steering: Steering::new(countries, &default, &failover),
            timeouts: Timeouts { connect: connect.0, first_byte: first_byte.0, idle: idle.0, total: total.0 },
            retry: Retry {
                attempts: retry.attempts.and_then(|a| u8::try_from(a).ok()),
                statuses: retry.statuses.iter().copied().collect(),
                non_idempotent: retry.non_idempotent,
            },
            streaming: *streaming,
            region_header: *region_header,
        }
    }

    fn regions(&mut self, path: &KeyPath, names: &[Name]) -> Vec<RegionId> {
        let mut found = Vec::new();
        for (i, name) in names.iter().enumerate() {
            let position = self.names.iter().position(|n| *n == name);
            match position.and_then(|p| u16::try_from(p).ok()) {
                Some(id) => found.push(RegionId(id)),
                None => {
                    let known = || self.names.iter().map(|n| n.0.as_str());
                    let defined = known().collect::<Vec<_>>().join(", ");
                    let hint = match nearest(&name.0, known()) {
                        Some(near) => format!("did you mean `{near}`? defined: {defined}"),
                        None => format!("defined: {defined}"),
                    };
                    // A single name is its own node; in a list each has a place of its own.
                    let problem = Problem::error(path.join(i), format!("region `{name}` is not defined"));
                    self.problems.push(problem.label("not under `regions`").hint(hint));
                }
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

fn is_dns_name(text: &str) -> bool {
    matches!(text.parse::<HostPattern>(), Ok(HostPattern::Exact(name)) if name.parse::<std::net::IpAddr>().is_err())
}
