//! Who connects, where a proxy in front says so before the connection's first byte: the PROXY protocol, versions 1 and 2
//! (HAProxy, <https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>).

use std::io;
use std::net::{IpAddr, SocketAddr};

use ppp::{v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::config::ProxyVersion;

/// How version 2 begins.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version, family, and how much follows.
const FIXED: usize = 16;
/// What follows is never so long: addresses, and some values that nobody here reads.
const LONGEST: u16 = 4096;
/// A line of version 1 is never so long, its end included.
const LINE: usize = 107;

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Reads the header, and not a byte more. The client's address; `None`: the proxy speaks for itself, or does not know.
pub async fn introduced(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    let mut header = vec![0; SIGNATURE.len()];
    stream.read_exact(&mut header).await?;
    if header == SIGNATURE {
        header.resize(FIXED, 0);
        stream.read_exact(header.get_mut(SIGNATURE.len()..).unwrap_or_default()).await?;
        let length = header.last_chunk().map_or(0, |length| u16::from_be_bytes(*length));
        if length > LONGEST {
            return Err(wrong("it is too long"));
        }
        header.resize(FIXED + usize::from(length), 0);
        stream.read_exact(header.get_mut(FIXED..).unwrap_or_default()).await?;
        return second(&header);
    }
    // Byte by byte: what comes after the line is TLS's or HTTP's.
    while header.last() != Some(&b'\n') {
        if header.len() >= LINE || !header.starts_with(b"PROXY ") {
            return Err(wrong("it is no PROXY header"));
        }
        header.push(stream.read_u8().await?);
    }
    first(&header)
}

/// A line of version 1.
fn first(line: &[u8]) -> io::Result<Option<SocketAddr>> {
    let header = v1::Header::try_from(line).map_err(|error| wrong(error.to_string()))?;
    Ok(match header.addresses {
        v1::Addresses::Tcp4(v1::IPv4 { source_address, source_port, .. }) => Some((source_address, source_port).into()),
        v1::Addresses::Tcp6(v1::IPv6 { source_address, source_port, .. }) => Some((source_address, source_port).into()),
        v1::Addresses::Unknown => None,
    })
}

/// A header of version 2.
fn second(header: &[u8]) -> io::Result<Option<SocketAddr>> {
    let header = v2::Header::try_from(header).map_err(|error| wrong(error.to_string()))?;
    Ok(match (header.command, header.addresses) {
        // A health check of the proxy's own.
        (v2::Command::Local, _) => None,
        (_, v2::Addresses::IPv4(v2::IPv4 { source_address, source_port, .. })) => Some((source_address, source_port).into()),
        (_, v2::Addresses::IPv6(v2::IPv6 { source_address, source_port, .. })) => Some((source_address, source_port).into()),
        (_, v2::Addresses::Unspecified | v2::Addresses::Unix(_)) => None,
    })
}

/// The header that introduces a client, who connected to `to`.
pub fn introduction(version: ProxyVersion, from: SocketAddr, to: SocketAddr) -> io::Result<Vec<u8>> {
    // Of two families there is no header: then all of it is said in the wider one.
    let wide = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let (from_port, to_port) = (from.port(), to.port());
    match (version, from.ip().to_canonical(), to.ip().to_canonical()) {
        (ProxyVersion::V1, IpAddr::V4(from), IpAddr::V4(to)) => {
            Ok(v1::Addresses::new_tcp4(from, to, from_port, to_port).to_string().into_bytes())
        }
        (ProxyVersion::V1, from, to) => {
            Ok(v1::Addresses::new_tcp6(wide(from), wide(to), from_port, to_port).to_string().into_bytes())
        }
        (ProxyVersion::V2, IpAddr::V4(from), IpAddr::V4(to)) => binary(v2::IPv4::new(from, to, from_port, to_port)),
        (ProxyVersion::V2, from, to) => binary(v2::IPv6::new(wide(from), wide(to), from_port, to_port)),
    }
}

/// The header of who speaks for nobody else.
pub fn ourselves(version: ProxyVersion) -> &'static [u8] {
    match version {
        ProxyVersion::V1 => b"PROXY UNKNOWN\r\n",
        ProxyVersion::V2 => b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
    }
}

fn binary(addresses: impl Into<v2::Addresses>) -> io::Result<Vec<u8>> {
    v2::Builder::with_addresses(v2::Version::Two | v2::Command::Proxy, v2::Protocol::Stream, addresses).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read() {
        for version in [ProxyVersion::V1, ProxyVersion::V2] {
            assert_eq!(read(ourselves(version)).await, (Ok(None), 0), "{version:?}");
            for (from, to, read_as) in [
                ("192.0.2.1:4711", "127.0.0.1:80", "192.0.2.1:4711"),
                ("[2001:db8::1]:4711", "[::1]:80", "[2001:db8::1]:4711"),
                ("[2001:db8::1]:0", "127.0.0.1:80", "[2001:db8::1]:0"),
                ("192.0.2.1:4711", "[::1]:80", "[::ffff:192.0.2.1]:4711"),
                ("[::ffff:192.0.2.1]:4711", "127.0.0.1:80", "192.0.2.1:4711"),
            ] {
                let header = introduction(version, from.parse().unwrap(), to.parse().unwrap()).unwrap();
                assert_eq!(read(&header).await, (Ok(Some(read_as.to_owned())), 0), "{version:?} {from} {to}");
            }
        }
    }

    /// What is read of bytes, and what is left of them.
    async fn read(bytes: &[u8]) -> (Result<Option<String>, ()>, usize) {
        let mut rest = bytes;
        let found = introduced(&mut rest).await;
        (found.map(|address| address.map(|address| address.to_string())).map_err(drop), rest.len())
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, body].concat()
    }

    #[tokio::test]
    async fn both_versions() {
        let four = [192, 0, 2, 1, 198, 51, 100, 1, 0x30, 0x39, 0x01, 0xbb];
        let mut six = [0; 36];
        (six[0], six[1], six[15], six[32], six[33]) = (0x20, 0x01, 9, 0x30, 0x39);
        let with_values = [&four[..], &[0x04, 0, 3, 1, 2, 3]].concat();
        let some = |address: &str| Ok(Some(address.to_owned()));
        for (bytes, expected) in [
            (b"PROXY TCP4 192.0.2.1 198.51.100.1 12345 443\r\n".to_vec(), some("192.0.2.1:12345")),
            (b"PROXY TCP6 2001:db8::9 2001:db8::1 12345 443\r\n".to_vec(), some("[2001:db8::9]:12345")),
            (b"PROXY UNKNOWN\r\n".to_vec(), Ok(None)),
            (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n".to_vec(), Ok(None)),
            (v2(0x21, 0x11, &four), some("192.0.2.1:12345")),
            (v2(0x21, 0x11, &with_values), some("192.0.2.1:12345")),
            (v2(0x21, 0x21, &six), some("[2001::9]:12345")),
            (v2(0x20, 0x00, &[]), Ok(None)),
            (v2(0x20, 0x11, &four), Ok(None)),
            (v2(0x21, 0x31, &[b'x'; 216]), Ok(None)),
            (b"PROXY TCP4 192.0.2.1 198.51.100.1 12345\r\n".to_vec(), Err(())),
            (b"PROXY TCP4 192.0.2.1 198.51.100.1 99999 443\r\n".to_vec(), Err(())),
            (b"PROXY TCP4 192.0.2.01 198.51.100.1 1 443\r\n".to_vec(), Err(())),
            (b"PROXY TCP4 2001:db8::9 198.51.100.1 1 443\r\n".to_vec(), Err(())),
            (b"PROXY TCP4 192.0.2.1 198.51.100.1 12345 443\n".to_vec(), Err(())),
            (b"proxy TCP4 192.0.2.1 198.51.100.1 12345 443\r\n".to_vec(), Err(())),
            (v2(0x11, 0x11, &four), Err(())),
            (v2(0x22, 0x11, &four), Err(())),
            (v2(0x21, 0x11, &four[..11]), Err(())),
            (v2(0x21, 0x11, &[0; 5000]), Err(())),
            (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), Err(())),
            ([&b"PROXY TCP4 "[..], &[b'1'; 200]].concat(), Err(())),
        ] {
            let (found, _) = read(&bytes).await;
            assert_eq!(found, expected, "{}", String::from_utf8_lossy(&bytes));
            if expected.is_ok() {
                // What follows is left for whoever comes next, and what is missing is missed.
                assert_eq!(read(&[&bytes[..], b"GET"].concat()).await, (expected, 3));
                for cut in 0..bytes.len() {
                    assert_eq!(read(&bytes[..cut]).await.0, Err(()), "{cut} of {}", String::from_utf8_lossy(&bytes));
                }
            }
        }
    }

    #[tokio::test]
    async fn noise() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let mut bytes: Vec<u8> = (0..random.usize(0..300)).map(|_| random.u8(..)).collect();
            match random.u8(0..3) {
                0 => drop(bytes.splice(0..0, SIGNATURE)),
                1 => drop(bytes.splice(0..0, *b"PROXY TCP4 192.0.2.1 ")),
                _ => {}
            }
            // Whatever it is, it is read or refused.
            let _ = introduced(&mut &bytes[..]).await;
        }
    }
}
