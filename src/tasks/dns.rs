//! Upstream names to addresses: at start, for new names before a reload, and then as their TTL says.
//!
//! A name that begins with `_` is a service: its SRV records (RFC 2782) tell targets, ports, weights and, by
//! priority, backups. When a name cannot be resolved the last good answer stays, and is called stale.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{Name, RData};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::proxy::clock;
use crate::regions::endpoint::{MAX_ADDRESSES, Resolved, UpstreamState};
use crate::state::State;

/// An answer is used for at least this long, for some servers say 0.
const SHORTEST_TTL: Duration = Duration::from_secs(1);
/// And asked for again after this long, for a hosts file says for ever.
const LONGEST_TTL: Duration = Duration::from_secs(300);
/// After a failure.
const RETRY: Duration = Duration::from_secs(2);
/// A start or reload waits this long for new names; a slow one is left to the background.
const PATIENCE: Duration = Duration::from_secs(3);
/// For one question to one server; it is asked twice, so that a start still waits for the second answer.
const TIMEOUT: Duration = Duration::from_millis(1_400);
/// How often it is looked whether a name is due.
const LOOK: Duration = Duration::from_millis(250);

/// How names are resolved.
#[derive(Debug, Clone, Default)]
pub struct Resolver {
    /// In place of the system's.
    servers: Vec<SocketAddr>,
}

impl Resolver {
    /// By these servers; by the system's if there are none.
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers }
    }

    /// Made for each round of questions: `/etc/resolv.conf` and `/etc/hosts` may have changed since, and its
    /// sockets belong to the runtime that asks.
    fn client(&self) -> Result<TokioResolver, NetError> {
        let mut builder = match self.servers.is_empty() {
            true => TokioResolver::builder_tokio()?,
            false => {
                let config = ResolverConfig::from_name_servers(self.servers.iter().map(server).collect());
                TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            }
        };
        let options = builder.options_mut();
        options.cache_size = 0;
        // Retries, the first time not included.
        (options.timeout, options.attempts) = (TIMEOUT, 1);
        builder.build()
    }

    /// Resolves the names among `upstreams` that never were, and waits for the answers, but not for long.
    pub async fn resolve_new(&self, upstreams: &[Arc<UpstreamState>]) {
        let mut lookups = self.ask(upstreams.iter().filter(|u| !u.is_resolved()).cloned());
        // Late answers are taken when they come: the tasks go on by themselves.
        if timeout(PATIENCE, async { while lookups.join_next().await.is_some() {} }).await.is_err() {
            tracing::warn!(names = lookups.len(), "names are slow to resolve; going on without them");
        }
        lookups.detach_all();
    }

    /// Keeps every name fresh, for ever.
    pub async fn refresh(self, state: Arc<State>) {
        loop {
            tokio::time::sleep(LOOK).await;
            let now = clock::now();
            let due = state.memory.upstreams().into_iter().filter(|u| *u.dns.due.lock() <= now);
            self.ask(due).detach_all();
        }
    }

    fn ask(&self, upstreams: impl Iterator<Item = Arc<UpstreamState>>) -> JoinSet<()> {
        let mut lookups = JoinSet::new();
        let mut client = None;
        // A resolver that hangs must not collect a lookup every time.
        for upstream in upstreams.filter(|u| u.url.needs_dns() && !u.dns.asking.swap(true, Relaxed)) {
            let client = client.get_or_insert_with(|| self.client()).clone();
            lookups.spawn(async move {
                let answer = match client {
                    Ok(client) => lookup(&client, &upstream).await,
                    Err(error) => Err(error),
                };
                let wait = match answer {
                    Ok((addresses, ttl)) => {
                        upstream.resolved(addresses);
                        if upstream.dns.stale.swap(false, Relaxed) {
                            tracing::info!(upstream = %upstream.url, "the name can be resolved again");
                        }
                        ttl.clamp(SHORTEST_TTL, LONGEST_TTL)
                    }
                    Err(error) => {
                        if !upstream.dns.stale.swap(true, Relaxed) {
                            let kept = upstream.is_resolved();
                            tracing::warn!(upstream = %upstream.url, %error, kept_last_answer = kept, "the name cannot be resolved");
                        }
                        RETRY
                    }
                };
                *upstream.dns.due.lock() = clock::now().after(wait);
                upstream.dns.asking.store(false, Relaxed);
            });
        }
        lookups
    }
}

fn server(address: &SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
        connection.port = address.port();
        connection
    });
    NameServerConfig::new(address.ip(), true, connections.to_vec())
}

/// The addresses of an upstream, and for how long they are good.
async fn lookup(client: &TokioResolver, upstream: &UpstreamState) -> Result<(Vec<Resolved>, Duration), NetError> {
    let left = |until: Instant| until.saturating_duration_since(Instant::now());
    if !upstream.url.is_service() {
        let known = upstream.endpoints().iter().filter_map(|e| e.address.ip()).collect::<Vec<_>>();
        let (found, until) = addresses(client, Name::from_str_relaxed(&upstream.url.host)?, &known).await?;
        let resolved = |ip| Resolved { address: SocketAddr::new(ip, upstream.url.port), weight: 1, backup: false };
        return Ok((found.into_iter().map(resolved).collect(), left(until)));
    }
    let found = client.srv_lookup(Name::from_str_relaxed(&upstream.url.host)?).await?;
    let mut ttl = left(found.valid_until());
    let services: Vec<_> = found
        .answers()
        .iter()
        .filter_map(|record| match &record.data {
            RData::SRV(service) => Some(service.clone()),
            _ => None,
        })
        .take(MAX_ADDRESSES)
        .collect();
    let first = services.iter().map(|s| s.priority).min();
    let mut resolved = Vec::new();
    let mut failure = None;
    for service in services {
        match addresses(client, service.target.clone(), &[]).await {
            Ok((found, until)) => {
                ttl = ttl.min(left(until));
                resolved.extend(found.into_iter().map(|ip| Resolved {
                    address: SocketAddr::new(ip, service.port),
                    // RFC 2782: 0 is "hardly ever"; ours begin at 1.
                    weight: u32::from(service.weight).max(1),
                    backup: Some(service.priority) != first,
                }));
            }
            // One target that is gone must not take the others along.
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) if resolved.is_empty() => Err(error),
        _ => Ok((resolved, ttl)),
    }
}

/// A and AAAA. Where one of them cannot be had, what is `known` of its kind stays: there are servers that never
/// answer for AAAA.
async fn addresses(client: &TokioResolver, name: Name, known: &[IpAddr]) -> Result<(Vec<IpAddr>, Instant), NetError> {
    let (mut found, mut until, mut error) = (Vec::new(), None::<Instant>, None);
    let (v4, v6) = tokio::join!(client.ipv4_lookup(name.clone()), client.ipv6_lookup(name));
    for (answer, is_v4) in [(v4, true), (v6, false)] {
        match answer {
            Ok(answer) => {
                found.extend(answer.answers().iter().filter_map(|record| record.data.ip_addr()));
                until = Some(until.map_or(answer.valid_until(), |until| until.min(answer.valid_until())));
            }
            Err(none) if none.is_no_records_found() => error = error.or(Some(none)),
            Err(failed) => {
                found.extend(known.iter().filter(|ip| ip.is_ipv4() == is_v4));
                error = Some(failed);
            }
        }
    }
    match (until, error) {
        (Some(until), _) => Ok((found, until)),
        (None, Some(error)) => Err(error),
        (None, None) => Ok((found, Instant::now())),
    }
}
