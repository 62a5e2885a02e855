//! `POST /regions/NAME/{evacuate,drain,restore}`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State as Extract};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::Admin;
use crate::orders::{Order, Refused};

/// Carries an order out, or says why not. Without a body every default holds.
pub async fn order(Extract(admin): Extract<Admin>, Path((name, action)): Path<(String, String)>, body: Bytes) -> Response {
    let order = match body.is_empty() {
        true => Ok(Order::default()),
        false => serde_json::from_slice(&body),
    };
    let order = match order {
        Ok(order) => order,
        Err(error) => return told(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let state = admin.state.clone();
    let carried_out = tokio::task::spawn_blocking(move || {
        let survives = state.orders.survive();
        let result = match action.as_str() {
            "evacuate" => state.orders.evacuate(&state, &name, &order).map(Some),
            "drain" => state.orders.drain(&state, &name, &order).map(Some),
            "restore" => state.orders.restore(&state, &name, &order).map(|()| None),
            _ => return None,
        };
        Some((result, survives))
    });
    match carried_out.await {
        Ok(Some((Ok(kept), survives))) => {
            Json(json!({ "ok": true, "order": kept, "survives_restart": survives })).into_response()
        }
        Ok(Some((Err(refused), _))) => {
            let status = match refused {
                Refused::Unknown { .. } => StatusCode::NOT_FOUND,
                Refused::Invalid(_) => StatusCode::BAD_REQUEST,
                Refused::Harmful(_) => StatusCode::CONFLICT,
                Refused::Disk(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            told(status, &refused.to_string())
        }
        Ok(None) => told(StatusCode::NOT_FOUND, "expected evacuate, drain or restore"),
        Err(_) => told(StatusCode::INTERNAL_SERVER_ERROR, "the order failed"),
    }
}

fn told(status: StatusCode, error: &str) -> Response {
    (status, Json(json!({ "ok": false, "error": error }))).into_response()
}
