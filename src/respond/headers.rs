//! Which headers pass, and which only Portolan may write.

/// Headers that tell the origin who asks and through what. An untrusted client's copies are dropped.
///
/// Names that other proxies and clouds use for the same are here too: an origin that still listens to
/// one of them must not hear a stranger. Sorted, lower case.
const IDENTITY: [&str; 20] = [
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "cf-ipcountry",
    "cf-pseudo-ipv4",
    "cf-ray",
    "cf-visitor",
    "client-ip",
    "fastly-client-ip",
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

/// May a client's header `name` (lower case, as `http` keeps names) go on to the origin?
///
/// Servers that build variables from names (CGI, WSGI, PHP) read `X_Forwarded_For` as
/// `X-Forwarded-For`, so an underscore counts as a dash.
pub fn pass(name: &str, trusted_peer: bool) -> Pass {
    // The names of Portolan's own headers are nobody else's, trusted or not.
    if is_ours(name) {
        return Pass::Drop;
    }
    if trusted_peer && !name.contains('_') {
        return Pass::Keep;
    }
    match is_identity(name) {
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
    let same = |known: &str| {
        known.len() == name.len() && known.bytes().zip(name.bytes()).all(|(k, n)| k == n || (k == b'-' && n == b'_'))
    };
    IDENTITY.iter().any(|known| same(known))
}

/// Is this request id fit to be passed on and logged: 1 to 128 visible ASCII characters?
pub fn is_request_id(value: &[u8]) -> bool {
    (1..=128).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic)
}

/// Response headers that speak of one connection only (RFC 9110, section 7.6.1). `Connection`,
/// `Transfer-Encoding` and `Upgrade` frame the message and stay in Pingora's hands.
pub const RESPONSE_HOP_BY_HOP: [&str; 4] = ["keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_forged_passes() {
        for name in IDENTITY {
            assert_eq!(pass(name, false), Pass::Drop, "{name}");
            assert_eq!(pass(&name.replace('-', "_"), false), Pass::Drop, "{name}");
            if name.contains('-') {
                assert_eq!(pass(&name.replace('-', "_"), true), Pass::Drop, "a trusted proxy writes dashes: {name}");
            }
            assert_eq!(pass(name, true), Pass::Keep, "{name}");
        }
        for name in ["portolan-country", "portolan-region", "portolan_country", "portolan-anything"] {
            assert_eq!([pass(name, false), pass(name, true)], [Pass::Drop, Pass::Drop], "{name}");
        }
        for name in ["accept", "cookie", "x-api-key", "x-custom", "content-type", "portolano"] {
            assert_eq!(pass(name, false), Pass::Keep, "{name}");
        }
    }

    #[test]
    fn request_ids() {
        assert!(is_request_id(b"abc-123"));
        assert!(!is_request_id(b"") && !is_request_id(b"a b") && !is_request_id(&[b'a'; 129]) && !is_request_id(b"\xff"));
    }
}
