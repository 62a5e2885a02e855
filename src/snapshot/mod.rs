//! What can run: a [`Config`] made whole and immutable, or every problem at once.

mod cache;
mod limits;
mod listeners;
mod overload;
mod regions;
mod routes;
mod rules;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cache::Cache;
use crate::client::address::Trust;
use crate::client::place::Databases;
use crate::client::standing::Standing;
use crate::config::problem::{KeyPath, nearest};
use crate::config::tree::Secrets;
use crate::config::units::{Name, UpstreamUrl};
use crate::config::{self, Config, Problem};
use crate::connections::Policy;
use crate::key_path;
use crate::limits::Limits;
use crate::listeners::acme::Acme;
use crate::listeners::{Certificate, Listener};
use crate::lists::{Lists, Told};
use crate::memory::Memory;
use crate::overload::Overload;
use crate::regions::{Identity, Region, RegionId, Upstream};
use crate::routes::{Route, RouteId, Router};
use crate::signing::Key;
use crate::transforms::Transforms;
use crate::waf::Waf;
use crate::waf::challenge::Challenges;

/// Files that were read for the configuration, for the pure step that follows.
#[derive(Debug, Default)]
pub struct Resources {
    /// The databases, read and verified.
    pub databases: Databases,
    /// Authorities in DER by the path that names them.
    pub authorities: HashMap<PathBuf, Arc<[Vec<u8>]>>,
    /// Certificates of ours by the paths of certificate and key.
    pub identities: HashMap<(PathBuf, PathBuf), Arc<Identity>>,
    /// Folders of files by what the configuration calls them.
    pub roots: HashMap<PathBuf, PathBuf>,
    /// What was expanded into texts: no explanation may show it.
    pub secrets: Secrets,
    /// What lists tell, by their names.
    pub lists: HashMap<String, Arc<Told>>,
    /// What is got by itself, by the listener's position.
    pub acme: HashMap<usize, Arc<Acme>>,
    /// Certificates for clients.
    pub certificates: HashMap<config::Certificate, Arc<Certificate>>,
}

/// Everything a decision reads. Each request holds on to one for its whole life.
#[derive(Debug)]
pub struct Snapshot {
    /// Where clients connect, in the order of the configuration.
    pub listeners: Box<[Listener]>,
    /// What clients' connections are held to.
    pub connections: Arc<Policy>,
    /// Whom to believe about the client.
    pub trust: Trust,
    /// Addresses to places.
    pub databases: Databases,
    /// Opens and signs cookies.
    pub key: Arc<Key>,
    /// What was expanded into texts of the configuration.
    pub secrets: Secrets,
    /// Named lists.
    pub lists: Lists,
    /// What clients did lately.
    pub standing: Arc<Standing>,
    /// What proves names to authorities that speak ACME.
    pub acme: Arc<crate::listeners::acme::Challenges>,
    /// Challenges that were made and answered.
    pub challenges: Arc<Challenges>,
    /// What is rewritten, and who is sent elsewhere.
    pub transforms: Transforms,
    /// What may pass.
    pub waf: Waf,
    /// How often.
    pub limits: Limits,
    /// How much at once.
    pub overload: Overload,
    /// What is answered without the origin.
    pub cache: Cache,
    /// The regions; [`RegionId`] is a position here.
    pub regions: Box<[Region]>,
    /// The routes; [`RouteId`] is a position here.
    pub routes: Box<[Route]>,
    /// Requests to routes.
    pub router: Router,
    /// Where the access log goes, and what is in it.
    pub access_log: config::AccessLog,
    /// Where traces go, if anywhere.
    pub tracing: Option<config::Tracing>,
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

/// Builds a snapshot on what `memory` knows already. Warnings come with success; errors, all of them, in
/// place of it.
pub fn compile(config: &Config, resources: &Resources, memory: &Memory) -> Result<(Snapshot, Vec<Problem>), Vec<Problem>> {
    // Exhaustive, so that a new key must be handled here.
    let Config {
        listeners,
        connections,
        admin,
        client,
        regions,
        routes,
        lists,
        redirects,
        transforms,
        waf,
        limits,
        overload,
        cache,
        cluster,
        access_log,
        tracing,
        shutdown,
        resolver: _,
        state_dir: _,
        upgrade_socket: _,
        secret,
    } = config;
    let mut compiler = Compiler {
        names: regions.keys().collect(),
        located: regions.values().map(|r| r.location.is_some()).collect(),
        checks: HashMap::new(),
        resources,
        memory,
        lists: Lists::default(),
        problems: Vec::new(),
    };

    if !admin.address.0.ip().is_loopback() && admin.token.is_none() {
        compiler.problems.push(
            Problem::error(key_path!["admin"], "the admin address is not loopback, so `admin.token` is needed")
                .hint("set `token: \"${file:admin.token}\"`, or listen on 127.0.0.1"),
        );
    }
    if admin.token.as_ref().is_some_and(|t| t.reveal().is_empty()) {
        compiler.error(key_path!["admin", "token"], "the admin token is empty");
    }
    if let Some(cluster) = cluster {
        if let Err(error) = redis::Client::open(cluster.redis.reveal()) {
            let problem = Problem::error(key_path!["cluster", "redis"], format!("this is no address of a Redis: {error}"));
            compiler.problems.push(problem.hint("expected `redis://host:6379`, or `rediss://` for TLS"));
        }
        if secret.is_none() {
            let problem = Problem::error(key_path!["cluster"], "nodes of a cluster need a `secret`, and all the same");
            compiler.problems.push(problem.hint("set `secret: \"${file:cookie.secret}\"`"));
        }
    }
    if listeners.is_empty() {
        compiler.error(key_path!["listeners"], "there is no listener");
    }
    for (i, listener) in listeners.iter().enumerate() {
        let taken = listeners.iter().take(i).any(|l| l.address == listener.address);
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
    if secret.as_ref().is_some_and(|s| s.reveal().len() < 16) {
        compiler.error(key_path!["secret"], "the secret is shorter than 16 bytes");
    }
    if client.country_database.is_none() && client.city_database.is_none() {
        compiler.problems.push(
            Problem::warning(
                key_path!["client", "country_database"],
                "without `client.country_database` every client's country is `XX`",
            )
            .hint("set it to a database in MaxMind's format, such as the shipped geoip/country.mmdb"),
        );
    }
    if connections.max_header_bytes.0 > 256 << 10 || connections.max_target.0 > 32 << 10 {
        // The engine takes up to 1 MiB of both, and targets of up to 64 KiB.
        compiler.error(key_path!["connections"], "expected at most `256KiB` of headers, and `32KiB` for a target");
    }
    for (key, value) in [("header_timeout", connections.header_timeout), ("keepalive", connections.keepalive)] {
        if value.0 < Duration::from_secs(1) {
            compiler.error(key_path!["connections", key], "expected at least `1s`");
        }
    }
    if connections.keepalive < connections.header_timeout {
        // The engine's wait for a next request ends with all of its head.
        compiler.error(key_path!["connections", "keepalive"], "expected at least `header_timeout`");
    }
    let grace = shutdown.grace.0;

    compiler.lists = compiler.lists(lists);
    let listeners = compiler.listeners(listeners, &client.trusted_proxies);
    let regions: Box<[Region]> = regions.iter().map(|(name, region)| compiler.region(name, region)).collect();
    let (routes, router) = compiler.routes(routes);
    let transforms = compiler.transforms(redirects, transforms);
    let waf = compiler.waf(waf);
    let limits = compiler.limits(limits, cluster.is_some());
    let overload = compiler.overload(overload, limits.prefixes);
    let cache = compiler.cache(cache, &routes);
    if access_log.is_misplaced() {
        let problem = Problem::error(key_path!["access_log", "path"], "this is no place of a system log");
        compiler.problems.push(problem.hint("expected `syslog:/dev/log`, or a server's host and port: `syslog:127.0.0.1:514`"));
    }
    let tracing = tracing.as_ref().map(|tracing| compiler.tracing(tracing));

    if compiler.problems.iter().any(Problem::is_error) {
        return Err(compiler.problems);
    }
    let snapshot = Snapshot {
        listeners,
        connections: Arc::new(Policy::from(connections)),
        trust: Trust { proxies: client.trusted_proxies.iter().map(|n| n.0).collect(), header: client.ip_header.0.clone() },
        databases: resources.databases.clone(),
        key: memory.key.clone(),
        secrets: resources.secrets.clone(),
        lists: compiler.lists,
        standing: memory.standing.clone(),
        acme: memory.acme.clone(),
        challenges: memory.challenges.clone(),
        transforms,
        waf,
        limits,
        overload,
        cache,
        regions,
        routes,
        router,
        access_log: access_log.clone(),
        tracing,
        grace,
    };
    Ok((snapshot, compiler.problems))
}

struct Compiler<'a> {
    names: Vec<&'a Name>,
    /// By position of the region: does it say where it is?
    located: Vec<bool>,
    /// The health check of each upstream seen so far.
    checks: HashMap<UpstreamUrl, (u64, &'a Name)>,
    resources: &'a Resources,
    memory: &'a Memory,
    lists: Lists,
    problems: Vec<Problem>,
}

impl<'a> Compiler<'a> {
    fn error(&mut self, path: KeyPath, message: impl Into<String>) {
        self.problems.push(Problem::error(path, message));
    }

    /// The collector's whole address.
    fn tracing(&mut self, tracing: &config::Tracing) -> config::Tracing {
        let mut whole = tracing.clone();
        match tracing.endpoint.parse::<http::Uri>() {
            Ok(uri) if matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some() => {
                if uri.path() == "/" && uri.query().is_none() {
                    whole.endpoint = format!("{}/v1/traces", tracing.endpoint.trim_end_matches('/'));
                }
            }
            _ => {
                let problem = Problem::error(key_path!["tracing", "endpoint"], "this is no address of a collector");
                self.problems.push(problem.hint("expected OTLP over HTTP, such as `http://127.0.0.1:4318`"));
            }
        }
        for (name, value) in &tracing.headers {
            if http::HeaderValue::from_str(value.reveal()).is_err() {
                self.error(key_path!["tracing", "headers", name.0.as_str()], "this cannot be the value of a header");
            }
        }
        whole
    }

    fn named(&mut self, path: &KeyPath, names: &[Name]) -> Vec<RegionId> {
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
