//! The page for people: files that are a part of the binary, so that it works offline and nothing has to be built for it.

use axum::extract::Path;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};

/// Everything comes from here, and nothing of it is inline (W3C Content Security Policy, Level 3).
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const JSON: &str = "application/json";
const SVG: &str = "image/svg+xml";

/// `GET /`.
pub async fn front() -> Response {
    file(HTML, include_str!("page/index.html"))
}

/// `GET /page/NAME`.
pub async fn part(Path(name): Path<String>) -> Response {
    match name.as_str() {
        "main.js" => file(SCRIPT, include_str!("page/main.js")),
        "dom.js" => file(SCRIPT, include_str!("page/dom.js")),
        "stream.js" => file(SCRIPT, include_str!("page/stream.js")),
        "map.js" => file(SCRIPT, include_str!("page/map.js")),
        "charts.js" => file(SCRIPT, include_str!("page/charts.js")),
        "tables.js" => file(SCRIPT, include_str!("page/tables.js")),
        "orders.js" => file(SCRIPT, include_str!("page/orders.js")),
        "tail.js" => file(SCRIPT, include_str!("page/tail.js")),
        "explain.js" => file(SCRIPT, include_str!("page/explain.js")),
        "style.css" => file(STYLE, include_str!("page/style.css")),
        "icon.svg" => file(SVG, include_str!("page/icon.svg")),
        "world.json" => file(JSON, include_str!("page/map/world.json")),
        _ => (StatusCode::NOT_FOUND, "the page has no such part\n").into_response(),
    }
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Another version may be asked next.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}
