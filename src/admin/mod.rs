//! The admin address: metrics, status, reload and explain. It is a listener of its own and never
//! reachable through a data port.

mod cache;
mod guard;
mod limits;
mod live;
mod page;
mod regions;
mod status;

use std::sync::Arc;

use axum::extract::State as Extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde_json::json;
use tokio::sync::Semaphore;

use crate::config::{self, Problem};
use crate::explain::{Question, explain, stored};
use crate::proxy::clock;
use crate::reload::{Reloaded, Reloader};
use crate::state::State;

pub use status::Status;

/// What the admin side works on.
#[derive(Debug, Clone)]
pub struct Admin {
    state: Arc<State>,
    reloader: Arc<Reloader>,
    settings: Arc<config::Admin>,
    /// Places for those who listen to events.
    listeners: Arc<Semaphore>,
}

impl Admin {
    /// An admin side over `state`.
    pub fn new(state: Arc<State>, reloader: Arc<Reloader>, settings: config::Admin) -> Self {
        Self { state, reloader, settings: Arc::new(settings), listeners: Arc::new(Semaphore::new(live::LISTENERS)) }
    }

    /// All routes behind their guard; `more` is guarded too.
    pub fn router(self, more: Router) -> Router {
        Router::new()
            .route("/", get(page::front))
            .route("/page/{name}", get(page::part))
            .route("/events", get(live::events))
            .route("/metrics", get(metrics))
            .route("/status.json", get(status_json))
            .route("/reload", post(reload))
            .route("/explain", post(explained))
            .route("/regions/{name}/{action}", post(regions::order))
            .route("/cache/purge", post(cache::purge))
            .route("/limits/top", get(limits::top))
            .route("/limits/banned", get(limits::banned))
            .route("/limits/reset", post(limits::reset))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .with_state(self.clone())
            .merge(more)
            .layer(middleware::from_fn_with_state(self, guard::guard))
    }
}

async fn metrics(Extract(admin): Extract<Admin>) -> Response {
    match admin.state.metrics.render(
        &admin.state.live.load(),
        admin.state.store,
        admin.state.memory.latency.areas(),
        clock::now(),
    ) {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn status_json(Extract(admin): Extract<Admin>) -> Json<Status> {
    Json(Status::now(&admin.state, clock::now()))
}

async fn readyz(Extract(admin): Extract<Admin>) -> Response {
    let (live, now) = (admin.state.live.load(), clock::now());
    match live.snapshot.regions.iter().any(|region| region.is_healthy(now) && !region.state.is_away(now)) {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "no region is usable\n").into_response(),
    }
}

async fn reload(Extract(admin): Extract<Admin>) -> Response {
    // A task of its own: a client that leaves must not leave half a reload behind.
    let reloader = admin.reloader.clone();
    let Ok(result) = tokio::spawn(async move { reloader.reload("admin").await }).await else {
        return (StatusCode::INTERNAL_SERVER_ERROR, "the reload failed\n").into_response();
    };
    let status = admin.state.reload.lock().clone();
    // The problems of this very reload, and not of one that came after it.
    let problems = match &result {
        Ok(_) => status.problems,
        Err(problems) => problems.iter().map(Problem::to_json).collect(),
    };
    let code = if result.is_ok() { StatusCode::OK } else { StatusCode::UNPROCESSABLE_ENTITY };
    let body = json!({
        "ok": result.is_ok(),
        "changed": matches!(result, Ok(Reloaded::Swapped)),
        "generation": status.generation,
        "problems": problems,
    });
    (code, Json(body)).into_response()
}

async fn explained(Extract(admin): Extract<Admin>, Json(question): Json<Question>) -> Response {
    let live = admin.state.live.load_full();
    match explain(&live.snapshot, &question, clock::now()) {
        Ok(mut explanation) => {
            if let Some(seen) = &mut explanation.cache
                && let Some(lookup) = seen.lookup.clone()
            {
                // What is only on disk is read from there.
                let store = admin.state.store;
                let theirs = lookup.clone();
                let found = tokio::task::spawn_blocking(move || store.peek(&theirs.key)).await.ok().flatten();
                let unstored = store.unstored(&lookup.key);
                seen.stored = stored(&live.snapshot, &lookup, found.as_ref(), unstored);
            }
            Json(explanation).into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, Json(json!({ "error": error }))).into_response(),
    }
}
