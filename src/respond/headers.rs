//! Which headers pass, and which only Portolan may write.

use crate::request::same_header;

/// Headers that tell the origin who asks and through what. An untrusted client's copies are dropped.
///
/// Names that other proxies and clouds use for the same are here too: an origin that still listens to
/// one of them must not hear a stranger. Sorted, lower case.
const IDENTITY: [&str; 25] = [
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "cf-ipcountry",
    "cf-pseudo-ipv4",
    "cf-ray",
    "cf-visitor",
    "client-cert",
    "client-cert-chain",
    "client-ip",
    "fastly-client-ip",
    "fly-client-ip",
    "fly-replay-failed",
    "fly-replay-src",
    "forwarded",
    "true-client-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-original-forwarded-for",
    "x-real-ip",
    "x-request-id",
];

/// What to do with a request header of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// It goes on as it is.
    Keep,
    /// The origin does not see it.
    Drop,
}

/// Identity headers that a trusted proxy may speak through; other names for the same would be a stranger's
/// way around it, for proxies pass on what they do not know.
const TRUSTED: [&str; 5] = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto", "x-request-id"];

/// May a client's header `name` (lower case, as `http` keeps names) go on to the origin? `ip_header` is the
/// one that trusted proxies name the client in.
///
/// Servers that build variables from names (CGI, WSGI, PHP) read `X_Forwarded_For` as
/// `X-Forwarded-For`, so an underscore counts as a dash, and nobody is trusted to write one.
pub fn pass(name: &str, ip_header: &str, trusted_peer: bool) -> Pass {
    // The names of Portolan's own headers are nobody else's, trusted or not.
    if is_ours(name) {
        return Pass::Drop;
    }
    if trusted_peer && (name == ip_header || TRUSTED.contains(&name)) {
        return Pass::Keep;
    }
    match is_identity(name) || same_header(ip_header, name) {
        true => Pass::Drop,
        false => Pass::Keep,
    }
}

fn is_ours(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() > 8 && bytes.starts_with(b"portolan") && matches!(bytes.get(8), Some(b'-' | b'_'))
}

fn is_identity(name: &str) -> bool {
    // Most headers begin with another letter: one comparison settles them.
    if !matches!(name.as_bytes().first(), Some(b'c' | b'f' | b't' | b'x')) {
        return false;
    }
    IDENTITY.iter().any(|known| same_header(known, name))
}

/// Response headers that speak of one connection only (RFC 9110, section 7.6.1). `Connection`,
/// `Transfer-Encoding` and `Upgrade` frame the message and stay in Pingora's hands.
pub const RESPONSE_HOP_BY_HOP: [&str; 5] = ["keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_forged_passes() {
        let pass = |name: &str, trusted| super::pass(name, "x-edge-client", trusted);
        for name in IDENTITY {
            assert_eq!(pass(name, false), Pass::Drop, "{name}");
            assert_eq!(pass(&name.replace('-', "_"), false), Pass::Drop, "{name}");
            if name.contains('-') {
                assert_eq!(pass(&name.replace('-', "_"), true), Pass::Drop, "a trusted proxy writes dashes: {name}");
            }
            let kept = if TRUSTED.contains(&name) { Pass::Keep } else { Pass::Drop };
            assert_eq!(pass(name, true), kept, "{name}");
        }
        for name in ["portolan-country", "portolan-region", "portolan_country", "portolan-anything", "x_edge_client"] {
            assert_eq!([pass(name, false), pass(name, true)], [Pass::Drop, Pass::Drop], "{name}");
        }
        assert_eq!([pass("x-edge-client", false), pass("x-edge-client", true)], [Pass::Drop, Pass::Keep]);
        for name in ["accept", "cookie", "x-api-key", "x-custom", "content-type", "portolano"] {
            assert_eq!(pass(name, false), Pass::Keep, "{name}");
        }
    }
}
