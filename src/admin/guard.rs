//! Who may ask the admin side for what.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{AppendHeaders, IntoResponse, Response};
use base64::prelude::{BASE64_STANDARD, Engine};
use subtle::ConstantTimeEq;

use super::Admin;

/// Where GET changes something, because a newcomer types it by hand.
const CHANGING: &str = "/_demo/";

/// Lets a request pass, or says why not.
pub async fn guard(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let known = admin.settings.token.as_ref().is_some_and(|token| bears(headers, token.reveal()));
    let path = request.uri().path();
    // Probes have no token, and learn nothing but "up" and "ready".
    let open = matches!(path, "/healthz" | "/readyz");
    // Who has the token need not be told apart by the name it calls us by; and who comes without is asked for it.
    let asked = admin.settings.token.is_some() && !open;
    if !known && !asked && !host_is_ours(headers, request.uri().authority().map(|a| a.as_str())) {
        return refuse(StatusCode::MISDIRECTED_REQUEST, "this host is not the admin address\n");
    }
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS) || path.starts_with(CHANGING);
    if changes && is_browser(headers) && !is_own_page(headers) {
        return refuse(StatusCode::FORBIDDEN, "a page of another origin may not change anything\n");
    }
    // Nobody else's page can read them, but it could take all the places of those who may.
    if path == "/events" && is_foreign(headers) {
        return refuse(StatusCode::FORBIDDEN, "a page of another origin may not watch\n");
    }
    if asked && !known {
        // Browsers ask people for a password: the token, under any name.
        let challenges =
            [(header::WWW_AUTHENTICATE, "Bearer"), (header::WWW_AUTHENTICATE, "Basic realm=\"Portolan\", charset=\"UTF-8\"")];
        let challenges = AppendHeaders(challenges);
        return (StatusCode::UNAUTHORIZED, challenges, "the admin token is needed\n").into_response();
    }
    next.run(request).await
}

fn refuse(status: StatusCode, text: &'static str) -> Response {
    (status, text).into_response()
}

/// Against DNS rebinding: a name that an attacker points at us is not ours. Addresses cannot be rebound,
/// and `localhost` is not theirs to point anywhere.
fn host_is_ours(headers: &HeaderMap, authority: Option<&str>) -> bool {
    let host = authority.or_else(|| headers.get(header::HOST)?.to_str().ok());
    let Some(host) = host.map(crate::request::host_name) else { return false };
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

fn is_browser(headers: &HeaderMap) -> bool {
    headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site")
}

/// A page of another origin asks. Over plain HTTP to another machine browsers tell only `Origin`.
fn is_foreign(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site").is_none_or(|site| site == "same-origin" || site == "none");
    !site || !is_own_origin(headers)
}

/// Same origin, and the header that no foreign form or image can send.
fn is_own_page(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site").is_none_or(|site| site == "same-origin");
    site && is_own_origin(headers) && headers.contains_key("x-portolan-action")
}

fn is_own_origin(headers: &HeaderMap) -> bool {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    match (text("origin"), text("host")) {
        (Some(origin), Some(host)) => origin.split_once("://").is_some_and(|(_, o)| o.eq_ignore_ascii_case(host)),
        (Some(_), None) => false,
        (None, _) => true,
    }
}

/// The token itself, or, from browsers, as the password of anybody (RFC 7617).
fn bears(headers: &HeaderMap, token: &str) -> bool {
    let Some(given) = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()) else { return false };
    let Some((scheme, given)) = given.split_once(' ') else { return false };
    if scheme.eq_ignore_ascii_case("bearer") {
        return given.as_bytes().ct_eq(token.as_bytes()).into();
    }
    let decoded = BASE64_STANDARD.decode(given.trim()).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"));
    let Some(decoded) = decoded else { return false };
    let password = decoded.iter().position(|b| *b == b':').and_then(|colon| decoded.get(colon + 1..));
    password.is_some_and(|password| password.ct_eq(token.as_bytes()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        list.iter().map(|(k, v)| (header::HeaderName::from_static(k), header::HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn hosts() {
        for host in ["localhost:9901", "127.0.0.1:9901", "[::1]:9901", "10.1.2.3", "LOCALHOST"] {
            assert!(host_is_ours(&headers(&[("host", host)]), None), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:9901", "127.0.0.1.nip.io", ""] {
            assert!(!host_is_ours(&headers(&[("host", host)]), None), "{host}");
        }
        assert!(!host_is_ours(&headers(&[]), None));
    }

    #[test]
    fn pages_of_others_change_nothing() {
        let own = [
            ("host", "127.0.0.1:9901"),
            ("origin", "http://127.0.0.1:9901"),
            ("sec-fetch-site", "same-origin"),
            ("x-portolan-action", "1"),
        ];
        assert!(is_browser(&headers(&own)) && is_own_page(&headers(&own)));
        assert!(!is_own_page(&headers(&own[..3])), "a simple form lacks the header");
        for (k, v) in
            [("origin", "http://evil.example"), ("origin", "null"), ("sec-fetch-site", "cross-site"), ("sec-fetch-site", "none")]
        {
            let mut forged = headers(&own);
            forged.insert(header::HeaderName::from_static(k), header::HeaderValue::from_static(v));
            assert!(!is_own_page(&forged), "{k}: {v}");
        }
        assert!(!is_browser(&headers(&[("host", "localhost")])), "curl is no browser");
    }

    #[test]
    fn tokens() {
        assert!(bears(&headers(&[("authorization", "Bearer secret")]), "secret"));
        assert!(bears(&headers(&[("authorization", "bearer secret")]), "secret"));
        // `anybody:secret`, `:secret`
        for value in ["Basic YW55Ym9keTpzZWNyZXQ=", "basic OnNlY3JldA=="] {
            assert!(bears(&headers(&[("authorization", value)]), "secret"), "{value}");
        }
        // Also `secret`, `secret:`, `a:b:secret`.
        for value in [
            "Bearer secre",
            "Bearer secrets",
            "Basic secret",
            "Basic c2VjcmV0",
            "Basic c2VjcmV0Og==",
            "Basic YTpiOnNlY3JldA==",
            "secret",
            "Bearer",
            "",
        ] {
            assert!(!bears(&headers(&[("authorization", value)]), "secret"), "{value}");
        }
        assert!(!bears(&headers(&[]), "secret"));
    }
}
