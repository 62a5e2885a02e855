//! Takes spans to a collector: OTLP over HTTP, as protobuf (OpenTelemetry Protocol 1.x). What finds the queue full, or a
//! collector that stays away, is dropped and counted; no request waits.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message;
use tokio::sync::{Mutex, mpsc};

use crate::config::Tracing;
use crate::observe::trace::text;
use crate::state::State;

/// Requests whose spans wait.
const QUEUE: usize = 4_096;
/// Spans in one batch.
const BATCH: usize = 512;
/// Spans are gathered for so long.
const GATHER: Duration = Duration::from_secs(1);
/// A batch is tried so often, with a pause that doubles.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);
/// The last spans have this long.
const FLUSH: Duration = Duration::from_secs(2);
/// Each try.
const PATIENCE: Duration = Duration::from_secs(10);

type Http = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Where requests leave their spans.
#[derive(Debug)]
pub struct Outlet {
    sender: mpsc::Sender<Vec<Span>>,
    /// Of whoever takes spans to the collector at the moment.
    receiver: Mutex<mpsc::Receiver<Vec<Span>>>,
    /// The batch under way. Here, so that whoever flushes finds what an exporter that was ended had in hand.
    batch: parking_lot::Mutex<Vec<Span>>,
}

impl Default for Outlet {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        Self { sender, receiver: Mutex::new(receiver), batch: parking_lot::Mutex::default() }
    }
}

/// Room for the spans of a request.
pub struct Place<'a>(mpsc::Permit<'a, Vec<Span>>);

impl Place<'_> {
    /// Leaves them.
    pub fn send(self, spans: Vec<Span>) {
        self.0.send(spans);
    }
}

impl Outlet {
    /// Room for the spans of a request, if there is any.
    pub fn place(&self) -> Option<Place<'_>> {
        self.sender.try_reserve().ok().map(Place)
    }
}

/// What became of a batch.
enum Ended {
    Taken,
    Refused(anyhow::Error),
    Later(anyhow::Error),
}

/// Takes spans to the collector, for ever.
pub async fn run(state: Arc<State>) {
    let mut receiver = state.spans.receiver.lock().await;
    let mut http = None;
    let mut failing = false;
    loop {
        let Some(first) = receiver.recv().await else { return };
        state.spans.batch.lock().extend(first);
        let gathering = tokio::time::sleep(GATHER);
        tokio::pin!(gathering);
        while state.spans.batch.lock().len() < BATCH {
            tokio::select! {
                more = receiver.recv() => match more {
                    Some(more) => state.spans.batch.lock().extend(more),
                    None => break,
                },
                () = &mut gathering => break,
            }
        }
        // Whoever never traces never reads the system's authorities.
        let http = http.get_or_insert_with(client);
        match export(http, &state).await {
            Ok(()) if failing => {
                failing = false;
                tracing::info!("traces are taken again");
            }
            Ok(()) => {}
            Err(error) => {
                // One line, not one a second.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(error = format!("{error:#}"), "traces cannot be taken to the collector");
                }
            }
        }
    }
}

/// Takes what is left to the collector, once nothing is left of the runtime that [`run`] was on. Blocks for [`FLUSH`] at most.
pub fn flush(state: &State) {
    let left = async {
        let mut receiver = state.spans.receiver.lock().await;
        while let Ok(more) = receiver.try_recv() {
            state.spans.batch.lock().extend(more);
        }
        if !state.spans.batch.lock().is_empty()
            && let Err(error) = tokio::time::timeout(FLUSH, export(&client(), state)).await.unwrap_or(Ok(()))
        {
            tracing::warn!(error = format!("{error:#}"), "the last traces cannot be taken to the collector");
        }
    };
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(left),
        Err(error) => tracing::warn!(%error, "the last traces are lost"),
    }
}

fn client() -> Http {
    let https = hyper_rustls::HttpsConnectorBuilder::new();
    // Without any authority of the system's, plain HTTP is all there is.
    let connector = match https.with_native_roots() {
        Ok(https) => https.https_or_http().enable_http1().build(),
        Err(error) => {
            tracing::warn!(%error, "the system's certificate authorities cannot be read");
            let none = rustls::RootCertStore::empty();
            let config = rustls::ClientConfig::builder().with_root_certificates(none).with_no_client_auth();
            hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(config).https_or_http().enable_http1().build()
        }
    };
    Client::builder(TokioExecutor::new()).pool_idle_timeout(Duration::from_secs(30)).build(connector)
}

/// Takes the batch to the collector, or gives it up. The settings are read anew for each try.
async fn export(http: &Http, state: &State) -> anyhow::Result<()> {
    let spans = state.spans.batch.lock().clone();
    let count = spans.len() as u64;
    let settings = || state.live.load().snapshot.tracing.clone();
    let ended = match settings() {
        Some(first) => {
            let body = Bytes::from(request(&first, spans).encode_to_vec());
            deliver(http, settings, body).await
        }
        None => Ok(false),
    };
    state.spans.batch.lock().clear();
    match ended {
        Ok(true) => state.metrics.tracing.exported(count),
        // Tracing was turned off meanwhile.
        Ok(false) => state.metrics.tracing.dropped(count),
        Err(_) => state.metrics.tracing.failed(count),
    }
    ended.map(drop)
}

fn request(settings: &Tracing, spans: Vec<Span>) -> ExportTraceServiceRequest {
    let scope = InstrumentationScope {
        name: env!("CARGO_PKG_NAME").to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let attributes = vec![text("service.name", &settings.service), text("service.version", env!("CARGO_PKG_VERSION"))];
    let resource = Resource { attributes, ..Resource::default() };
    let spans = ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() };
    let all = ResourceSpans { resource: Some(resource), scope_spans: vec![spans], ..ResourceSpans::default() };
    ExportTraceServiceRequest { resource_spans: vec![all] }
}

/// Whether there was still somebody to take it to.
async fn deliver(http: &Http, settings: impl Fn() -> Option<Tracing>, body: Bytes) -> anyhow::Result<bool> {
    let mut pause = PAUSE;
    for again in (0..TRIES).rev() {
        let Some(settings) = settings() else { return Ok(false) };
        let error = match send(http, &settings, body.clone()).await {
            Ended::Taken => return Ok(true),
            Ended::Refused(error) => return Err(error),
            Ended::Later(error) => error,
        };
        if again == 0 {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    Ok(false)
}

async fn send(http: &Http, settings: &Tracing, body: Bytes) -> Ended {
    let exchange = async {
        let mut request = http::Request::post(&settings.endpoint).header(http::header::CONTENT_TYPE, "application/x-protobuf");
        for (name, value) in &settings.headers {
            let mut value = http::HeaderValue::from_str(value.reveal())?;
            value.set_sensitive(true);
            request = request.header(&name.0, value);
        }
        let answer = http.request(request.body(Full::new(body))?).await.context("it cannot be reached")?;
        let status = answer.status();
        // The connection is used again only if the answer was read.
        let said = Limited::new(answer.into_body(), 64 << 10).collect().await;
        if said.is_err() {
            bail!("its answer cannot be read");
        }
        Ok(status)
    };
    match tokio::time::timeout(PATIENCE, exchange).await {
        Ok(Ok(status)) if status.is_success() => Ended::Taken,
        // Those that the protocol names as worth another try.
        Ok(Ok(status)) if matches!(status.as_u16(), 429 | 502 | 503 | 504) => {
            Ended::Later(anyhow::anyhow!("it answered {status}"))
        }
        Ok(Ok(status)) => Ended::Refused(anyhow::anyhow!("it answered {status}")),
        Ok(Err(error)) => Ended::Later(error),
        Err(_) => Ended::Later(anyhow::anyhow!("it does not answer")),
    }
}
