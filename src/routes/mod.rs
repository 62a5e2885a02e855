//! Which route a request takes: the most specific host, then the longest path. Order never matters.

pub mod budget;
pub mod compression;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use http::HeaderValue;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use crate::cache::RouteCache;
use crate::config::units::HostPattern;
use crate::regions::steering::Steering;
use crate::request::host_name;
use crate::rules::Filter;
use crate::transforms::{Location, Rewrite};
use budget::{Allowance, Budget};
use compression::Compression;

/// A route by its position in the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RouteId(pub u32);

/// A route that can run.
#[derive(Debug)]
pub struct Route {
    /// Its name.
    pub name: Arc<str>,
    /// Only requests for which this is true.
    pub filter: Option<Filter>,
    /// Clients to regions.
    pub steering: Steering,
    /// Requests at once, and how many there may be.
    pub bound: Option<(Arc<AtomicU32>, u32)>,
    /// Where its clients are sent, all of them.
    pub redirect: Option<Location>,
    /// What origin and client see changed.
    pub rewrite: Option<Box<Rewrite>>,
    /// Bytes that a request's body may have.
    pub max_body: Option<u64>,
    /// What of it may be answered without the origin.
    pub cache: RouteCache,
    /// What is compressed for clients.
    pub compression: Option<Compression>,
    /// Calls of gRPC-Web go on as gRPC.
    pub grpc_web: bool,
    /// Whoever comes without TLS is sent to this port with it.
    pub https: Option<u16>,
    /// `Strict-Transport-Security`, for those who come with it.
    pub hsts: Option<HeaderValue>,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// What is tried again.
    pub retry: Retry,
    /// Every response may be silent for `timeouts.idle`.
    pub streaming: bool,
    /// Tell the client the region.
    pub region_header: bool,
    /// Upstreams may have a request sent elsewhere.
    pub replay: bool,
    /// Clients may choose their region.
    pub client_regions: bool,
}

/// How long to wait for what; none is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP and TLS of one attempt.
    pub connect: Duration,
    /// For a response header, and the longest silence in a response body.
    pub first_byte: Duration,
    /// In its place for exchanges that are silent by nature.
    pub idle: Duration,
    /// All attempts together, until a response header is passed on.
    pub total: Duration,
}

/// Which of two timeouts bounds an upstream's silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// `timeouts.first_byte`.
    FirstByte,
    /// `timeouts.idle`.
    Idle,
}

/// What is tried again.
#[derive(Debug, Clone, Default)]
pub struct Retry {
    /// All tries; `None`: one more than there are candidates.
    pub attempts: Option<u8>,
    /// Statuses that move a request on.
    pub statuses: SmallVec<[u16; 8]>,
    /// Repeat what may have had an effect.
    pub non_idempotent: bool,
    /// How much retries may add.
    pub allowance: Allowance,
    /// What they did add.
    pub budget: Arc<Budget>,
}

/// Finds the route of a request.
#[derive(Debug, Default)]
pub struct Router {
    exact: FxHashMap<Box<str>, Paths>,
    below: FxHashMap<Box<str>, Paths>,
    any: Paths,
    longest_below: usize,
    /// Host patterns in the order of the file.
    hosts: Vec<Box<str>>,
}

/// The paths of one host pattern.
#[derive(Debug, Default)]
struct Paths {
    by_prefix: FxHashMap<Box<str>, Places>,
    longest: usize,
}

/// The routes of one host pattern and path: those with a condition in the order of the file, and the one without.
#[derive(Debug, Default)]
struct Places {
    conditional: Box<[RouteId]>,
    plain: Option<RouteId>,
}

/// What a host pattern matched by; the order is the order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostMatch {
    /// The host itself.
    Exact,
    /// A `*.` wildcard of this many bytes; longer ones come first.
    Below(std::cmp::Reverse<usize>),
    /// Any host.
    Any,
}

/// A route that matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matched {
    /// The route.
    pub route: RouteId,
    /// What its host matched by.
    pub host: HostMatch,
    /// The length of its path prefix in bytes.
    pub path: usize,
}

impl Router {
    /// Adds a route's host and path; the error is the route that has them already. Several may have them under
    /// a condition of their own.
    pub fn add(&mut self, host: &HostPattern, path: &str, route: RouteId, conditional: bool) -> Result<(), RouteId> {
        let pattern = match host {
            HostPattern::Any => None,
            HostPattern::Exact(name) => Some((name.clone(), !self.exact.contains_key(name.as_str()))),
            HostPattern::Below(name) => Some((format!("*.{name}"), !self.below.contains_key(name.as_str()))),
        };
        self.hosts.extend(pattern.filter(|(_, is_new)| *is_new).map(|(pattern, _)| pattern.into()));
        let paths = match host {
            HostPattern::Any => &mut self.any,
            HostPattern::Exact(name) => self.exact.entry(name.as_str().into()).or_default(),
            HostPattern::Below(name) => {
                self.longest_below = self.longest_below.max(name.len());
                self.below.entry(name.as_str().into()).or_default()
            }
        };
        paths.longest = paths.longest.max(path.len());
        let places = paths.by_prefix.entry(path.into()).or_default();
        match (conditional, places.plain) {
            (true, _) => places.conditional = places.conditional.iter().copied().chain([route]).collect(),
            (false, Some(taken)) => return Err(taken),
            (false, None) => places.plain = Some(route),
        }
        Ok(())
    }

    /// Host patterns, each once, in the order of the file: `a.example.com`, `*.example.com`.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().map(|host| &**host)
    }

    /// The route for this authority and path, of those that `suits`.
    pub fn find(&self, authority: &str, path: &str, suits: impl Fn(&Matched) -> bool) -> Option<Matched> {
        self.visit(authority, path, |matched| Some(matched).filter(&suits))
    }

    /// Every route that matches, the best first: what the winner was better than.
    pub fn find_all(&self, authority: &str, path: &str) -> Vec<Matched> {
        let mut all = Vec::new();
        self.visit(authority, path, |matched| {
            all.push(matched);
            None
        });
        all
    }

    /// Calls `each` with every match, the best first, until it returns something.
    fn visit(&self, authority: &str, path: &str, mut each: impl FnMut(Matched) -> Option<Matched>) -> Option<Matched> {
        let host = host_name(authority);
        // A DNS name has 253 bytes at most (RFC 1035): a longer one matches no pattern but `*`.
        let mut buffer = [0u8; 253];
        let host = match buffer.get_mut(..host.len()) {
            Some(lower) => {
                lower.copy_from_slice(host.as_bytes());
                lower.make_ascii_lowercase();
                std::str::from_utf8(lower).unwrap_or_default()
            }
            None => "",
        };
        if let Some(found) = self.exact.get(host).and_then(|p| p.visit(path, HostMatch::Exact, &mut each)) {
            return Some(found);
        }
        if !self.below.is_empty() {
            let dots = host.bytes().enumerate().filter(|(_, b)| *b == b'.').map(|(i, _)| i + 1);
            for start in dots {
                let suffix = host.get(start..).unwrap_or_default();
                if suffix.len() <= self.longest_below
                    && let Some(paths) = self.below.get(suffix)
                    && let Some(found) = paths.visit(path, HostMatch::Below(std::cmp::Reverse(suffix.len())), &mut each)
                {
                    return Some(found);
                }
            }
        }
        self.any.visit(path, HostMatch::Any, &mut each)
    }
}

impl Paths {
    /// A prefix ends at a segment boundary: at the path's end, before a `/`, or behind one.
    fn visit(&self, path: &str, host: HostMatch, each: &mut impl FnMut(Matched) -> Option<Matched>) -> Option<Matched> {
        let bytes = path.as_bytes();
        let longest = self.longest.min(bytes.len());
        for end in (1..=longest).rev() {
            let boundary = end == bytes.len() || bytes.get(end) == Some(&b'/') || bytes.get(end - 1) == Some(&b'/');
            if boundary
                && let Some(prefix) = path.get(..end)
                && let Some(places) = self.by_prefix.get(prefix)
                && let Some(found) = places.routes().find_map(|route| each(Matched { route, host, path: end }))
            {
                return Some(found);
            }
        }
        // "Any path" is the prefix of length zero: it also matches `*`, the target of OPTIONS.
        self.by_prefix.get("")?.routes().find_map(|route| each(Matched { route, host, path: 0 }))
    }
}

impl Places {
    fn routes(&self) -> impl Iterator<Item = RouteId> {
        self.conditional.iter().copied().chain(self.plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router(routes: &[(&str, &str)]) -> Router {
        let mut router = Router::default();
        for (i, (host, path)) in routes.iter().enumerate() {
            router.add(&host.parse().unwrap(), path, RouteId(i as u32), false).unwrap();
        }
        router
    }

    #[test]
    fn most_specific_host_then_longest_path() {
        let routes = [
            ("*", ""),
            ("*", "/api"),
            ("*", "/api/v2/"),
            ("*.example.com", ""),
            ("*.eu.example.com", ""),
            ("a.example.com", "/api"),
            ("[::1]", ""),
        ];
        let router = router(&routes);
        for (host, path, expected) in [
            ("other.org", "/", 0),
            ("other.org", "/api", 1),
            ("other.org", "/api/x", 1),
            ("other.org", "/apix", 0),
            ("other.org", "/api/v2", 1),
            ("other.org", "/api/v2/", 2),
            ("other.org", "/api/v2/x?y", 2),
            ("b.example.com", "/api", 3),
            ("B.EXAMPLE.com:8080", "/", 3),
            ("x.y.example.com.", "/", 3),
            ("x.eu.example.com", "/", 4),
            ("example.com", "/", 0),
            ("a.example.com", "/api/x", 5),
            // The exact host has no such path: the next best host serves it.
            ("a.example.com", "/other", 3),
            ("[::1]:8080", "/", 6),
            ("", "*", 0),
        ] {
            assert_eq!(router.find(host, path, |_| true).map(|m| m.route.0), Some(expected), "{host} {path}");
        }
        assert_eq!(router.find(&"x".repeat(300), "/", |_| true).map(|m| m.route.0), Some(0));
        let all: Vec<_> = router.find_all("a.example.com", "/api/v2/x").iter().map(|m| m.route.0).collect();
        assert_eq!(all, [5, 3, 2, 1, 0]);
    }

    #[test]
    fn order_never_matters_and_repeats_are_told() {
        let mut router = router(&[("*", "/a"), ("*", "/a/b")]);
        assert_eq!(router.find("", "/a/b", |_| true).map(|m| m.route.0), Some(1));
        assert_eq!(router.add(&HostPattern::Any, "/a", RouteId(9), false), Err(RouteId(0)));
        assert_eq!(router.find("", "/zzz", |_| true), None);
    }

    #[test]
    fn conditions_come_first_and_fall_through() {
        let mut router = router(&[("*", ""), ("*", "/a")]);
        router.add(&HostPattern::Any, "/a", RouteId(2), true).unwrap();
        router.add(&HostPattern::Any, "/a", RouteId(3), true).unwrap();
        router.add(&HostPattern::Any, "/a/b", RouteId(4), true).unwrap();
        let find = |path, suiting: &[u32]| router.find("", path, |m| suiting.contains(&m.route.0)).map(|m| m.route.0);
        assert_eq!(find("/a", &[0, 1, 2, 3]), Some(2), "the first in the file");
        assert_eq!(find("/a", &[0, 1, 3]), Some(3));
        assert_eq!(find("/a", &[0, 1]), Some(1), "the one without a condition");
        assert_eq!(find("/a/b", &[0, 1]), Some(1), "a shorter path, if no condition is met");
        assert_eq!(find("/a/b", &[0, 4]), Some(4));
        assert_eq!(find("/a/b", &[]), None);
    }
}
