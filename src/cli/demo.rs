//! `portolan demo`: the main job on a bare machine.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::routing::any;
use axum::{Json, Router};
use clap::Args;
use parking_lot::Mutex;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{ConfigArgs, Exit, print, print_problems, run, visitors};
use crate::config;
use crate::config::units::UpstreamUrl;
use crate::proxy::listen;

#[derive(Debug, Args)]
pub struct Demo {
    /// The configuration file; its regions' upstreams must be on loopback
    #[arg(long, short, value_name = "FILE", default_value = "config/demo.yaml")]
    config: PathBuf,
    /// Send so many requests a second from all over the world
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=10_000))]
    visitors: u32,
}

impl Demo {
    pub fn run(self) -> anyhow::Result<Exit> {
        let paths = ConfigArgs { config: self.config, env: None }.paths();
        let loaded = match config::load(&paths) {
            Ok(loaded) if loaded.problems.is_empty() => loaded,
            Ok(config::Loaded { problems, .. }) | Err(config::Failed { problems, .. }) => {
                print_problems(&problems);
                return Ok(Exit::User);
            }
        };
        let mut regions = HashMap::new();
        for (name, region) in &loaded.config.regions {
            let url = region.upstreams.first().and_then(|u| u.options().url).context("a region has no upstream")?;
            let address = loopback(&url)?;
            // A port that is taken is told before anything starts.
            let Ok(listener) = listen::bind(address) else {
                eprintln!("error: the demo's origin for {name} cannot listen on {address}: is another demo running?");
                return Ok(Exit::User);
            };
            regions.insert(name.to_string(), Origin { address, bound: Some(listener), running: None });
        }
        let origins = Arc::new(Origins(Mutex::new(regions)));
        let admin = Router::new()
            .route("/_demo/fail/{region}", any(fail))
            .route("/_demo/restore/{region}", any(restore))
            .with_state(origins.clone());
        let visitors = self.visitors;
        let work = move |listeners: &[SocketAddr]| {
            origins.start_all();
            if let Some(proxy) = listeners.first().filter(|_| visitors > 0) {
                tokio::spawn(visitors::visit(*proxy, visitors));
            }
        };
        run::run(paths, false, run::Extra { admin, work: Some(Box::new(work)), ready: Some(welcome) })
    }
}

fn loopback(url: &UpstreamUrl) -> anyhow::Result<SocketAddr> {
    let ip = url
        .ip()
        .filter(|ip| ip.is_loopback())
        .with_context(|| format!("the demo starts its origins on loopback, and {url} is not"))?;
    Ok(SocketAddr::new(ip, url.port))
}

/// The demo's regional origins, each of which can be failed and restored.
struct Origins(Mutex<HashMap<String, Origin>>);

struct Origin {
    address: SocketAddr,
    /// Bound at the start, until it runs.
    bound: Option<std::net::TcpListener>,
    running: Option<Running>,
}

/// Dropping `stop` closes the listener and the connections.
struct Running {
    stop: oneshot::Sender<()>,
    ended: JoinHandle<()>,
}

impl Origins {
    fn start_all(&self) {
        let mut origins = self.0.lock();
        for (name, origin) in origins.iter_mut() {
            if let Err(error) = origin.start(name) {
                tracing::error!(%error, region = name, address = %origin.address, "the demo's origin cannot listen");
            }
        }
    }
}

impl Origin {
    fn start(&mut self, region: &str) -> std::io::Result<()> {
        if self.running.is_none() {
            let listener = self.bound.take().map_or_else(|| listen::bind(self.address), Ok)?;
            self.running = Some(Running::start(region, TcpListener::from_std(listener)?));
        }
        Ok(())
    }
}

impl Running {
    fn start(region: &str, listener: TcpListener) -> Self {
        let region = region.to_owned();
        let app = Router::new().fallback(move |uri: Uri, headers: HeaderMap| hello(region.clone(), uri, headers));
        let (stop, stopped) = oneshot::channel::<()>();
        let ended = tokio::spawn(async move {
            let serving = axum::serve(listener, app).with_graceful_shutdown(async {
                // Either word or silence: both mean stop.
                let _ = stopped.await;
            });
            if let Err(error) = serving.await {
                tracing::error!(%error, "a demo origin ended");
            }
        });
        Self { stop, ended }
    }
}

/// What an origin of the demo answers: which region it is, and what it was told of the client.
async fn hello(region: String, uri: Uri, headers: HeaderMap) -> String {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("?").to_owned();
    let (country, client) = (text("portolan-country"), text("cf-connecting-ip"));
    format!("Hello from {region}! You are {client} in {country}, and asked for {}.\n", uri.path())
}

async fn fail(State(origins): State<Arc<Origins>>, Path(region): Path<String>) -> (StatusCode, Json<serde_json::Value>) {
    let running = match origins.0.lock().get_mut(&region) {
        Some(origin) => origin.running.take(),
        None => return unknown(&region),
    };
    if let Some(Running { stop, ended }) = running {
        drop(stop);
        // Once this ends nobody listens on the region's port.
        let _ = ended.await;
    }
    (StatusCode::OK, Json(json!({ "region": region, "state": "down" })))
}

async fn restore(State(origins): State<Arc<Origins>>, Path(region): Path<String>) -> (StatusCode, Json<serde_json::Value>) {
    let mut origins = origins.0.lock();
    let Some(origin) = origins.get_mut(&region) else { return unknown(&region) };
    if let Err(error) = origin.start(&region) {
        return (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({ "error": error.to_string() })));
    }
    (StatusCode::OK, Json(json!({ "region": region, "state": "up" })))
}

fn unknown(region: &str) -> (StatusCode, Json<serde_json::Value>) {
    (StatusCode::NOT_FOUND, Json(json!({ "error": format!("there is no region {region}") })))
}

/// What to try.
fn welcome(listeners: &[SocketAddr], admin: SocketAddr) {
    let color = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (bold, dim, off) = if color { ("\x1b[1m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
    let data = listeners.first().map(ToString::to_string).unwrap_or_default();
    let step = |what: &str, command: &str| format!("  {dim}{what}{off}\n    {command}\n");
    let from = |ip: &str| format!("curl -H 'X-Forwarded-For: {ip}' http://{data}/");
    let explained = format!(
        "{} explain --config config/demo.yaml --ip 127.0.0.1 -H 'X-Forwarded-For: 81.2.69.160' --down eu_west /",
        program()
    );
    let steps = [
        step("A reader in London is served by eu_west:", &from("81.2.69.160")),
        step("One in Tokyo by ap_northeast:", &from("202.32.115.1")),
        step("eu_west fails ...", &format!("curl -X POST http://{admin}/_demo/fail/eu_west")),
        step("... and London is served by the next region:", &from("81.2.69.160")),
        step(
            "It comes back, and so does London once it was given a try (5 s after it failed):",
            &format!("curl -X POST http://{admin}/_demo/restore/eu_west"),
        ),
        step("Why was that?", &explained),
    ];
    print(&format!("\n{bold}Portolan{off} is serving http://{data}/, before five regions on this machine.\n"));
    print(&steps.join("\n"));
    print(&format!(
        "  {dim}The page{off} http://{admin}/   {dim}Metrics{off} http://{admin}/metrics   {dim}Stop with{off} Ctrl-C\n"
    ));
}

/// This program, as it would be typed here.
fn program() -> String {
    let (program, here) = (std::env::current_exe().unwrap_or_default(), std::env::current_dir().unwrap_or_default());
    match program.strip_prefix(&here) {
        Ok(below) => format!("./{}", below.display()),
        Err(_) => "portolan".to_owned(),
    }
}
