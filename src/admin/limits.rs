//! `GET /limits/top`, `GET /limits/banned`, `POST /limits/reset`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Admin;
use crate::kept::Now;
use crate::limits::seconds;
use crate::proxy::clock;

/// Which clients.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Which {
    /// How many; 20 by default.
    n: Option<usize>,
    /// Of this limit only.
    limit: Option<String>,
}

/// Most that are listed.
const MOST: usize = 10_000;

/// Clients that used most of what they may.
pub async fn top(Extract(admin): Extract<Admin>, Query(which): Query<Which>) -> Response {
    let live = admin.state.live.load_full();
    let n = which.n.unwrap_or(20).min(MOST);
    // The whole table is looked at.
    let found = tokio::task::spawn_blocking(move || live.snapshot.limits.top(n, which.limit.as_deref(), clock::now())).await;
    match found {
        Ok(found) => Json(found).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({ "error": "the table cannot be read" }))).into_response(),
    }
}

/// A client that is refused for a time.
#[derive(Debug, Serialize)]
struct Banned {
    limit: String,
    key: String,
    handle: String,
    /// Milliseconds since 1970.
    until: u64,
    seconds: u64,
}

/// Clients that are refused for a time.
pub async fn banned(Extract(admin): Extract<Admin>, Query(which): Query<Which>) -> Response {
    let now = Now::new();
    let bans = admin.state.memory.known_ledger().map(|ledger| ledger.book.bans(now.moment)).unwrap_or_default();
    let wanted = bans.into_iter().filter(|(_, ban)| which.limit.as_ref().is_none_or(|id| *ban.limit == **id));
    let told = wanted.take(which.n.unwrap_or(MOST).min(MOST)).map(|(handle, ban)| Banned {
        limit: ban.limit.to_string(),
        key: ban.key.to_string(),
        handle: format!("#{handle}"),
        until: now.unix(ban.until),
        seconds: seconds(ban.until.since(now.moment)),
    });
    Json(told.collect::<Vec<_>>()).into_response()
}

/// Whom to let begin anew.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Whom {
    /// A client as `top` and `banned` name it.
    key: String,
    /// Under this limit only.
    #[serde(default)]
    limit: Option<String>,
}

/// Lets a client begin anew: its counts and its penalty are forgotten, here and on other nodes.
pub async fn reset(Extract(admin): Extract<Admin>, body: Bytes) -> Response {
    let whom: Whom = match serde_json::from_slice(&body) {
        Ok(whom) => whom,
        Err(error) => {
            return (StatusCode::BAD_REQUEST, Json(json!({ "ok": false, "error": error.to_string() }))).into_response();
        }
    };
    let live = admin.state.live.load_full();
    let limits = &live.snapshot.limits;
    if let Some(id) = whom.limit.as_ref().filter(|id| limits.rules.iter().all(|limit| *limit.id != ***id)) {
        let known = limits.rules.iter().map(|limit| &*limit.id).collect::<Vec<_>>().join(", ");
        let error = format!("limit `{id}` is not defined; defined: {known}");
        return (StatusCode::NOT_FOUND, Json(json!({ "ok": false, "error": error }))).into_response();
    }
    let ledger = limits.ledger.as_ref();
    let found = limits.find(&whom.key, whom.limit.as_deref());
    let reset = found.iter().filter(|handle| ledger.is_some_and(|ledger| ledger.reset(**handle, true))).count();
    if reset == 0 {
        let elsewhere = if admin.state.cluster.is_some() { " here; other nodes were told" } else { "" };
        let error = format!("nothing is counted of `{}`{elsewhere}", whom.key);
        return (StatusCode::NOT_FOUND, Json(json!({ "ok": false, "error": error }))).into_response();
    }
    tracing::info!(audit = true, key = whom.key, counters = reset, "limits reset");
    Json(json!({ "ok": true, "counters": reset })).into_response()
}
