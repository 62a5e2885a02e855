//! Named lists of addresses, countries, networks' numbers and hosts: `ip.src in $office`.

pub mod file;
pub mod ranges;

use std::sync::Arc;

use rustc_hash::FxHashSet;

use crate::config::units::HostPattern;
use ranges::{IpRange, IpSet, Scores, Sorted};

/// A list that can be asked.
#[derive(Debug)]
pub struct List {
    /// Its name, without the `$`.
    pub name: Box<str>,
    /// What is in it.
    pub entries: Entries,
    /// What its addresses weigh in `cf.threat_score`.
    pub reputation: Option<Scores>,
    /// Its addresses are of robots whose owners say so: their category.
    pub verified_bot: Option<Box<str>>,
}

/// What a list holds.
#[derive(Debug)]
pub enum Entries {
    /// Addresses.
    Ip(IpSet),
    /// Countries by their codes.
    Country(FxHashSet<Box<[u8]>>),
    /// Numbers of autonomous systems.
    Asn(Sorted<i64>),
    /// Hosts.
    Host(Hosts),
}

impl Entries {
    /// What it holds, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Ip(_) => "addresses",
            Self::Country(_) => "countries",
            Self::Asn(_) => "AS numbers",
            Self::Host(_) => "hosts",
        }
    }

    /// Is nothing in it?
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Ip(set) => set.is_empty(),
            Self::Country(set) => set.is_empty(),
            Self::Asn(set) => set.is_empty(),
            Self::Host(hosts) => hosts.exact.is_empty() && hosts.below.is_empty() && !hosts.any,
        }
    }
}

/// Hosts, exact or everything below one.
#[derive(Debug, Default)]
pub struct Hosts {
    exact: FxHashSet<Box<[u8]>>,
    below: FxHashSet<Box<[u8]>>,
    any: bool,
}

impl FromIterator<HostPattern> for Hosts {
    fn from_iter<I: IntoIterator<Item = HostPattern>>(patterns: I) -> Self {
        let mut hosts = Self::default();
        for pattern in patterns {
            match pattern {
                HostPattern::Any => hosts.any = true,
                HostPattern::Exact(name) => drop(hosts.exact.insert(name.into_bytes().into())),
                HostPattern::Below(name) => drop(hosts.below.insert(name.into_bytes().into())),
            }
        }
        hosts
    }
}

impl Hosts {
    /// Is this host, in lower case, one of them?
    pub fn contains(&self, host: &[u8]) -> bool {
        let dots = || host.iter().enumerate().filter(|(_, b)| **b == b'.').map(|(i, _)| i + 1);
        self.any
            || self.exact.contains(host)
            || (!self.below.is_empty() && dots().any(|start| host.get(start..).is_some_and(|s| self.below.contains(s))))
    }
}

/// Every list of a configuration.
#[derive(Debug, Clone, Default)]
pub struct Lists(pub Vec<Arc<List>>);

impl Lists {
    /// A list by its name.
    pub fn get(&self, name: &str) -> Option<&Arc<List>> {
        self.0.iter().find(|list| *list.name == *name)
    }

    /// The greatest weight of an address over all lists with a reputation.
    pub fn reputation(&self, ip: std::net::IpAddr) -> u8 {
        self.0.iter().filter_map(|list| list.reputation.as_ref()).map(|scores| scores.of(ip)).max().unwrap_or(0)
    }

    /// The category of the robot that this address is known to be.
    pub fn verified_bot(&self, ip: std::net::IpAddr) -> Option<&str> {
        self.0.iter().find_map(|list| match (&list.verified_bot, &list.entries) {
            (Some(category), Entries::Ip(set)) if set.contains(ip) => Some(&**category),
            _ => None,
        })
    }
}

/// What a file or an inline list told, before it is made into a [`List`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Addresses, with scores where they have their own.
    Ip(Vec<(IpRange, Option<u8>)>),
    /// Codes of countries.
    Country(Vec<String>),
    /// Numbers.
    Asn(Vec<i64>),
    /// Hosts.
    Host(Vec<HostPattern>),
}

impl Told {
    /// How much it told.
    pub fn len(&self) -> usize {
        match self {
            Self::Ip(all) => all.len(),
            Self::Country(all) => all.len(),
            Self::Asn(all) => all.len(),
            Self::Host(all) => all.len(),
        }
    }

    /// Did it tell nothing?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// As entries to ask.
    pub fn entries(&self) -> Entries {
        match self {
            Self::Ip(all) => Entries::Ip(all.iter().map(|(range, _)| *range).collect()),
            Self::Country(all) => Entries::Country(all.iter().map(|c| c.as_bytes().into()).collect()),
            Self::Asn(all) => Entries::Asn(Sorted::new(all.iter().map(|n| (*n, *n)).collect())),
            Self::Host(all) => Entries::Host(all.iter().cloned().collect()),
        }
    }

    /// The weights of its addresses; `default` for those without one of their own.
    pub fn scores(&self, default: u8) -> Scores {
        match self {
            Self::Ip(all) => all.iter().map(|(range, score)| (*range, score.unwrap_or(default))).collect(),
            Self::Country(_) | Self::Asn(_) | Self::Host(_) => Scores::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let hosts: Hosts = ["a.example", "*.b.example"].iter().map(|h| h.parse().unwrap()).collect();
        for (host, inside) in
            [("a.example", true), ("x.a.example", false), ("b.example", false), ("x.b.example", true), ("x.y.b.example", true)]
        {
            assert_eq!(hosts.contains(host.as_bytes()), inside, "{host}");
        }
        assert!(Hosts::from_iter([HostPattern::Any]).contains(b"anything"));
    }
}
