//! The client's address, from the peer and from what trusted proxies say.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;
use serde::Serialize;

/// Whom to believe.
#[derive(Debug, Clone)]
pub struct Trust {
    /// Networks whose word is taken.
    pub proxies: Box<[IpNet]>,
    /// The header they speak through.
    pub header: HeaderName,
}

/// Where a client's address came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The peer is not trusted, so it is the client.
    Peer,
    /// The header, past this many trusted hops (the peer included).
    Header {
        /// Trusted hops passed.
        hops: u32,
    },
    /// The peer is trusted, but the header is missing: the last trusted hop is the client.
    NoHeader {
        /// Trusted hops passed.
        hops: u32,
    },
    /// An entry of the header is no address: the hop that sent it is the client.
    Garbage {
        /// Trusted hops passed.
        hops: u32,
    },
}

/// A client's address and its origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ClientAddress {
    /// The address; IPv4-mapped IPv6 is IPv4.
    pub ip: IpAddr,
    /// Where it came from.
    pub source: Source,
    /// The peer is a trusted proxy, so what it says of the request is kept.
    pub trusted_peer: bool,
}

impl Trust {
    /// Is `ip` one of the trusted proxies?
    pub fn trusts(&self, ip: IpAddr) -> bool {
        self.proxies.iter().any(|net| net.contains(&ip))
    }

    /// Walks from the peer through the header, right to left, as long as the hop is trusted: an
    /// attacker can only write left of what the first trusted proxy appended.
    pub fn resolve(&self, peer: IpAddr, headers: &HeaderMap) -> ClientAddress {
        let mut ip = canonical(peer);
        if !self.trusts(ip) {
            return ClientAddress { ip, source: Source::Peer, trusted_peer: false };
        }
        let values = headers.get_all(&self.header).iter().rev();
        let mut entries = values.flat_map(|v| v.as_bytes().rsplit(|b| *b == b','));
        let mut hops = 1;
        let source = loop {
            match entries.next().map(parse) {
                None if hops == 1 => break Source::NoHeader { hops },
                // Every hop is trusted: the farthest one is the best we know.
                None => break Source::Header { hops: hops - 1 },
                Some(None) => break Source::Garbage { hops },
                Some(Some(next)) => {
                    ip = next;
                    if !self.trusts(ip) {
                        break Source::Header { hops };
                    }
                    hops += 1;
                }
            }
        };
        ClientAddress { ip, source, trusted_peer: true }
    }
}

/// One entry: an address, which some proxies write with a port or in brackets.
fn parse(entry: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(entry).ok()?.trim_matches([' ', '\t']);
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    let ip = bare.parse::<IpAddr>().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|a| a.ip()))?;
    Some(canonical(ip))
}

/// IPv4-mapped IPv6 addresses (RFC 4291, section 2.5.5.2) are IPv4.
pub fn canonical(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// Addresses that no country has: private, loopback, link-local, shared (RFC 6598), documentation and the like.
pub fn is_special(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let shared = u32::from(ip) >> 22 == u32::from(Ipv4Addr::new(100, 64, 0, 0)) >> 22;
            ip.is_private() || ip.is_loopback() || ip.is_link_local() || ip.is_unspecified() || ip.is_documentation() || shared
        }
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unspecified() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use proptest::prelude::*;

    fn trust() -> Trust {
        Trust {
            proxies: ["10.0.0.0/8", "2001:db8::/32"].iter().filter_map(|n| n.parse().ok()).collect(),
            header: HeaderName::from_static("x-forwarded-for"),
        }
    }

    fn resolve(peer: &str, lines: &[&str]) -> (String, Source) {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append("x-forwarded-for", HeaderValue::from_bytes(line.as_bytes()).unwrap());
        }
        let found = trust().resolve(peer.parse().unwrap(), &headers);
        (found.ip.to_string(), found.source)
    }

    #[test]
    fn right_to_left_past_trusted_hops() {
        use Source::*;
        for (peer, lines, ip, source) in [
            ("192.0.2.1", &["1.2.3.4"][..], "192.0.2.1", Peer),
            ("10.0.0.1", &[], "10.0.0.1", NoHeader { hops: 1 }),
            ("10.0.0.1", &["1.2.3.4"], "1.2.3.4", Header { hops: 1 }),
            ("10.0.0.1", &["6.6.6.6, 1.2.3.4"], "1.2.3.4", Header { hops: 1 }),
            ("10.0.0.1", &["6.6.6.6, 1.2.3.4, 10.1.1.1"], "1.2.3.4", Header { hops: 2 }),
            ("10.0.0.1", &["6.6.6.6, 1.2.3.4", "10.1.1.1"], "1.2.3.4", Header { hops: 2 }),
            ("10.0.0.1", &["10.2.2.2,10.1.1.1"], "10.2.2.2", Header { hops: 2 }),
            ("10.0.0.1", &["1.2.3.4, nonsense"], "10.0.0.1", Garbage { hops: 1 }),
            ("10.0.0.1", &["nonsense, 10.1.1.1"], "10.1.1.1", Garbage { hops: 2 }),
            ("10.0.0.1", &[""], "10.0.0.1", Garbage { hops: 1 }),
            ("10.0.0.1", &["1.2.3.4,"], "10.0.0.1", Garbage { hops: 1 }),
            ("10.0.0.1", &["1.2.3.4:5678"], "1.2.3.4", Header { hops: 1 }),
            ("10.0.0.1", &["[2a00::1]:443"], "2a00::1", Header { hops: 1 }),
            ("10.0.0.1", &["[2a00::1]"], "2a00::1", Header { hops: 1 }),
            ("::ffff:10.0.0.1", &["::ffff:1.2.3.4"], "1.2.3.4", Header { hops: 1 }),
            ("2001:db8::1", &["2a00::1"], "2a00::1", Header { hops: 1 }),
        ] {
            assert_eq!(resolve(peer, lines), (ip.to_owned(), source), "{peer} {lines:?}");
        }
    }

    proptest! {
        /// Whatever stands in the header, an untrusted peer is the client, and a trusted one gives an
        /// address that stands in the header or is its own.
        #[test]
        fn nothing_forged_wins(line in "[ -~]{0,60}", trusted: bool) {
            let peer = if trusted { "10.0.0.1" } else { "192.0.2.1" };
            let (ip, source) = resolve(peer, &[&line]);
            if !trusted {
                prop_assert_eq!(ip, peer);
            } else if !matches!(source, Source::Header { .. }) {
                prop_assert!(ip == peer || line.contains(&ip));
            }
        }
    }
}
