//! Regions and upstreams, from what was typed to what can run.

use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

use super::Compiler;
use crate::client::atlas::Point;
use crate::config::problem::KeyPath;
use crate::config::units::{HostPattern, Name, Scheme, UpstreamUrl};
use crate::config::{self, Problem};
use crate::key_path;
use crate::regions::balance::{Balance, Field};
use crate::regions::{Affinity, Check, Files, Limits, Region, Tls, Upstream, schedule};

impl<'a> Compiler<'a> {
    pub(super) fn region(&mut self, name: &'a Name, region: &config::Region) -> Region {
        let path = key_path!["regions", name];
        // Exhaustive, so that a new key must be handled here.
        let config::Region {
            upstreams,
            location,
            health_check,
            balance,
            affinity,
            max_requests,
            soft_limit,
            adaptive,
            queue,
            slow_start,
        } = region;
        let check = health_check.as_ref().map(|config| self.check(&path.join("health_check"), config));
        let upstreams: Box<[Upstream]> = upstreams
            .iter()
            .enumerate()
            .map(|(i, upstream)| {
                let path = path.join("upstreams").join(i);
                let upstream = self.upstream(&path, upstream);
                self.one_check(&path, name, &upstream, check.as_deref());
                upstream
            })
            .collect();
        if upstreams.iter().all(|u| u.backup) && !upstreams.is_empty() {
            self.error(path.join("upstreams"), "every upstream of this region is a backup");
        }
        let limits = self.bounds(&path, *max_requests, *soft_limit);
        let adaptive = self.adaptive(&path, *adaptive);
        let bounded = adaptive.is_some() || limits.hard.is_some() || upstreams.iter().any(|u| u.limits.hard.is_some());
        if *queue != config::Queue::default() && !bounded {
            let problem = Problem::error(path.join("queue"), "`queue` has no effect here");
            self.problems.push(problem.hint("set `adaptive`, or `max_requests` for the region or for its upstreams"));
        }
        Region {
            name: name.0.as_str().into(),
            id: crate::request::hash(name.0.as_bytes()),
            schedule: schedule(&upstreams.iter().map(|u| u.weight).collect::<Vec<_>>()),
            upstreams,
            location: location.map(|l| Point::new(l.latitude, l.longitude)),
            balance: self.balance(&path.join("balance"), balance),
            affinity: affinity.as_ref().map(compiled_affinity),
            limits,
            adaptive,
            queue: (queue.size, queue.timeout.0),
            slow_start: slow_start.0,
            check,
            state: self.memory.region(&name.0),
        }
    }

    fn check(&mut self, path: &KeyPath, config: &config::HealthCheck) -> Arc<Check> {
        for (key, value) in [("interval", config.interval), ("timeout", config.timeout)] {
            if value.0.is_zero() {
                self.error(path.join(key), format!("`{key}` must be longer than nothing"));
            }
        }
        if !config.path.starts_with('/') || config.path.parse::<http::uri::PathAndQuery>().is_err() {
            self.error(path.join("path"), "expected a path, such as `/healthz`");
        }
        for (name, value) in &config.headers.0 {
            if http::HeaderValue::from_str(value).is_err() {
                self.error(path.join("headers").join(&name.0), "this value cannot be sent in a header");
            }
        }
        use config::CheckKind::{Grpc, Http, Tcp};
        let default = |key| match key {
            "path" => config.path == "/",
            "method" => config.method == config::CheckMethod::Get,
            "host" => config.host.is_none(),
            "body" => config.body.is_none(),
            "service" => config.service.is_empty(),
            _ => config.headers.0.is_empty(),
        };
        let idle: &[&str] = match config.kind {
            Http => &["service"],
            Tcp => &["path", "method", "host", "body", "service", "headers"],
            Grpc => &["path", "method", "body"],
        };
        for key in idle.iter().filter(|key| !default(key)) {
            self.error(path.join(*key), format!("`{key}` has no effect with this `type`"));
        }
        if config.body.is_some() && config.method == config::CheckMethod::Head {
            self.error(path.join("body"), "an answer to HEAD has no body");
        }
        let mut hasher = rustc_hash::FxHasher::default();
        config.hash(&mut hasher);
        Arc::new(Check { config: config.clone(), digest: hasher.finish().max(1) })
    }

    /// Health is known by the upstream, so it can only be checked in one way.
    fn one_check(&mut self, path: &KeyPath, name: &'a Name, upstream: &Upstream, check: Option<&Check>) {
        let digest = check.map_or(0, |c| c.digest);
        match self.checks.get(&upstream.url) {
            Some((other, region)) if *other != digest => {
                let message = format!("`{}` is checked differently in region `{region}`", upstream.url);
                self.problems.push(Problem::error(path.clone(), message).hint("give both regions the same `health_check`"));
            }
            Some(_) => {}
            None => drop(self.checks.insert(upstream.url.clone(), (digest, name))),
        }
    }

    fn bounds(&mut self, path: &KeyPath, hard: Option<u32>, soft: Option<u32>) -> Limits {
        if soft.zip(hard).is_some_and(|(soft, hard)| soft > hard) {
            self.error(path.join("soft_limit"), "`soft_limit` is greater than `max_requests`");
        }
        Limits { hard, soft }
    }

    fn balance(&mut self, path: &KeyPath, balance: &config::Balance) -> Balance {
        use config::BalancePolicy::{Hash, LeastRequests, RoundRobin};
        match balance {
            config::Balance::Policy(LeastRequests) => Balance::LeastRequests,
            config::Balance::Policy(RoundRobin) => Balance::RoundRobin,
            config::Balance::Policy(Hash) => Balance::Hash(Field::Ip),
            config::Balance::Hash(by) => match &by.hash {
                config::HashBy::Client(_) => Balance::Hash(Field::Ip),
                config::HashBy::Field(config::HashField { cookie: Some(cookie), header: None }) => {
                    Balance::Hash(Field::Cookie(cookie.0.clone()))
                }
                config::HashBy::Field(config::HashField { cookie: None, header: Some(header) }) => {
                    Balance::Hash(Field::Header(header.0.clone()))
                }
                config::HashBy::Field(_) => {
                    let problem = Problem::error(path.join("hash"), "expected either `cookie` or `header`");
                    self.problems.push(problem.hint("or `hash: ip`"));
                    Balance::LeastRequests
                }
            },
        }
    }

    fn upstream(&mut self, path: &KeyPath, upstream: &config::Upstream) -> Upstream {
        let config::UpstreamOptions { url, files, proxy_protocol, weight, backup, host, max_requests, soft_limit, tls } =
            upstream.options();
        let files = files
            .map(|files| Files { root: self.resources.roots.get(&files.root).cloned().unwrap_or_default(), index: files.index });
        if url.is_some() == files.is_some() {
            self.error(path.clone(), "expected either `url` or `files`");
        }
        let url = match &files {
            Some(files) => UpstreamUrl { scheme: Scheme::Files, host: files.root.display().to_string(), port: 0 },
            // Where there is neither it was told of.
            None => url.unwrap_or(UpstreamUrl { scheme: Scheme::Http, host: "localhost".to_owned(), port: 80 }),
        };
        if proxy_protocol.is_some() && files.is_some() {
            self.error(path.join("proxy_protocol"), "`proxy_protocol` has no effect on files");
        }
        let config::UpstreamTls { sni, ca, cert, key } = &tls;
        let at = path.join("tls");
        let identity = match (cert, key) {
            (Some(cert), Some(key)) => self.resources.identities.get(&(cert.clone(), key.clone())).cloned(),
            (None, None) => None,
            _ => {
                self.error(at.clone(), "`cert` and `key` belong together");
                None
            }
        };
        let tls = match (url.scheme, sni) {
            (Scheme::Https, Some(sni)) if !is_dns_name(sni) => {
                self.error(at.join("sni"), format!("`{sni}` is no DNS name"));
                None
            }
            (Scheme::Https, None) if url.ip().is_some() => {
                self.problems.push(
                    Problem::error(path.clone(), "a TLS upstream needs a name to verify, and this is an address")
                        .hint("set `tls: { sni: origin.example.com }`, or use the name in the URL"),
                );
                None
            }
            (Scheme::Https, None) if url.is_service() => {
                let problem = Problem::error(path.clone(), "a TLS upstream needs a name to verify, and this is a service");
                self.problems.push(problem.hint("set `tls: { sni: origin.example.com }`"));
                None
            }
            (Scheme::Https, sni) => Some(Tls {
                sni: sni.clone().unwrap_or_else(|| url.host.clone()),
                authorities: ca.as_ref().and_then(|path| self.resources.authorities.get(path).cloned()),
                identity,
            }),
            (Scheme::Http | Scheme::H2c | Scheme::Files, _) => {
                if tls != config::UpstreamTls::default() {
                    self.problems.push(Problem::error(at, "`tls` has no effect here").hint("the URL must begin with https://"));
                }
                None
            }
        };
        let limits = self.bounds(path, max_requests, soft_limit);
        let host = host.and_then(|h| http::HeaderValue::from_str(&h.0).ok());
        let pool = rustc_hash::FxBuildHasher.hash_one(&tls);
        Upstream {
            state: self.memory.upstream(&url),
            url,
            weight,
            backup,
            limits,
            host,
            tls,
            files,
            introduces: proxy_protocol,
            pool,
        }
    }
}

fn compiled_affinity(affinity: &config::Affinity) -> Affinity {
    let config::Affinity { cookie, failover, max_age } = affinity;
    let age = max_age.map(|age| format!("; Max-Age={}", age.0.as_secs())).unwrap_or_default();
    Affinity {
        cookie: cookie.0.clone(),
        permanent: *failover == config::AffinityFailover::Permanent,
        attributes: format!("; Path=/; HttpOnly; SameSite=Lax{age}"),
    }
}

fn is_dns_name(text: &str) -> bool {
    matches!(text.parse::<HostPattern>(), Ok(HostPattern::Exact(name)) if name.parse::<std::net::IpAddr>().is_err())
}
