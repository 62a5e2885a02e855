//! `POST /cache/purge`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use super::Admin;
use crate::cache::purge::What;

/// What to purge.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Wanted {
    /// URLs, with all their variants.
    urls: Vec<String>,
    /// Beginnings of URLs.
    prefixes: Vec<String>,
    /// Hosts.
    hosts: Vec<String>,
    /// Tags.
    tags: Vec<String>,
    /// Everything there is.
    everything: bool,
    /// It stays, as stale.
    soft: bool,
}

/// So many at once.
const MOST: usize = 10_000;

impl Wanted {
    fn what(&self) -> Result<Vec<What>, String> {
        let mut all = Vec::new();
        for url in &self.urls {
            all.push(What::Url(located(url)?));
        }
        for prefix in &self.prefixes {
            all.push(What::Prefix(located(prefix)?));
        }
        for host in &self.hosts {
            let host = host.trim().to_ascii_lowercase();
            if host.is_empty() || host.contains(['/', ' ']) {
                return Err(format!("`{host}` is no host"));
            }
            all.push(What::Host(host));
        }
        for tag in &self.tags {
            if tag.trim().is_empty() || tag.contains([',', ' ', '\n']) {
                return Err(format!("`{tag}` is no tag"));
            }
            all.push(What::Tag(tag.trim().to_owned()));
        }
        if self.everything {
            all.push(What::Everything);
        }
        match all.len() {
            0 => Err("nothing to purge: expected urls, prefixes, hosts, tags or everything".to_owned()),
            n if n > MOST => Err(format!("{n} at once are too many: at most {MOST}")),
            _ => Ok(all),
        }
    }
}

/// Host and path of a URL, as keys have them; its scheme does not matter.
fn located(url: &str) -> Result<String, String> {
    let url = url.trim();
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://")).unwrap_or(url);
    let rest = rest.split('#').next().unwrap_or_default();
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (host, target) = rest.split_at_checked(end).unwrap_or((rest, ""));
    if host.is_empty() || host.contains(' ') {
        return Err(format!("`{url}` has no host: expected https://host/path"));
    }
    let slash = if target.starts_with('/') { "" } else { "/" };
    Ok(format!("{}{slash}{target}", host.to_ascii_lowercase()))
}

/// Purges, here and on other nodes.
pub async fn purge(Extract(admin): Extract<Admin>, body: Bytes) -> Response {
    let refused = |error: String| (StatusCode::BAD_REQUEST, Json(json!({ "ok": false, "error": error }))).into_response();
    let wanted: Wanted = match serde_json::from_slice(&body) {
        Ok(wanted) => wanted,
        Err(error) => return refused(error.to_string()),
    };
    let what = match wanted.what() {
        Ok(what) => what,
        Err(error) => return refused(error),
    };
    let (count, soft) = (what.len(), wanted.soft);
    // A task of its own: a client that leaves must not leave it half done.
    let state = admin.state.clone();
    let done = tokio::spawn(async move { state.purge(what, soft).await }).await;
    match done.unwrap_or_else(|lost| Err(std::io::Error::other(lost))) {
        Ok(nodes) => {
            tracing::info!(audit = true, count, soft, "purged");
            let cluster = admin.state.cluster.is_some();
            let reached = !cluster || nodes.is_some();
            Json(json!({ "ok": true, "purged": count, "soft": soft, "nodes": nodes.unwrap_or_default(), "told_others": reached }))
                .into_response()
        }
        Err(error) => {
            let error = format!("it is purged, but will not be after a restart: {error}");
            (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({ "ok": false, "error": error }))).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_what_keys_have() {
        for (url, expected) in [
            ("https://Shop.example/a?b=1#c", Some("shop.example/a?b=1")),
            ("shop.example:8443/A", Some("shop.example:8443/A")),
            ("http://shop.example", Some("shop.example/")),
            ("shop.example?x", Some("shop.example/?x")),
            ("/only/a/path", None),
            ("", None),
        ] {
            assert_eq!(located(url).ok().as_deref(), expected, "{url}");
        }
    }
}
