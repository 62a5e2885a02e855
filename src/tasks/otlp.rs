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
use tokio::sync::mpsc;

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
/// Each try.
const PATIENCE: Duration = Duration::from_secs(10);

type Http = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Where requests leave their spans.
#[derive(Debug)]
pub struct Outlet {
    sender: mpsc::Sender<Vec<Span>>,
    receiver: parking_lot::Mutex<Option<mpsc::Receiver<Vec<Span>>>>,
}

impl Default for Outlet {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        Self { sender, receiver: parking_lot::Mutex::new(Some(receiver)) }
    }
}

impl Outlet {
    /// Leaves the spans of a request; false if there is no room.
    pub fn leave(&self, spans: Vec<Span>) -> bool {
        self.sender.try_send(spans).is_ok()
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
    let Some(mut receiver) = state.spans.receiver.lock().take() else { return };
    let http = client();
    let mut failing = false;
    loop {
        let Some(mut spans) = receiver.recv().await else { return };
        let gathering = tokio::time::sleep(GATHER);
        tokio::pin!(gathering);
        while spans.len() < BATCH {
            tokio::select! {
                more = receiver.recv() => match more {
                    Some(more) => spans.extend(more),
                    None => break,
                },
                () = &mut gathering => break,
            }
        }
        let live = state.live.load_full();
        let count = spans.len() as u64;
        // Tracing was turned off meanwhile.
        let Some(settings) = &live.snapshot.tracing else { continue };
        match export(&http, settings, spans).await {
            Ok(()) => {
                state.metrics.tracing.exported(count);
                if std::mem::take(&mut failing) {
                    tracing::info!("traces are taken again");
                }
            }
            Err(error) => {
                state.metrics.tracing.failed(count);
                // One line, not one a second.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(error = format!("{error:#}"), "traces cannot be taken to the collector");
                }
            }
        }
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

async fn export(http: &Http, settings: &Tracing, spans: Vec<Span>) -> anyhow::Result<()> {
    let scope = InstrumentationScope {
        name: env!("CARGO_PKG_NAME").to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let attributes = vec![text("service.name", &settings.service), text("service.version", env!("CARGO_PKG_VERSION"))];
    let resource = Resource { attributes, ..Resource::default() };
    let spans = ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() };
    let all = ResourceSpans { resource: Some(resource), scope_spans: vec![spans], ..ResourceSpans::default() };
    let body = Bytes::from(ExportTraceServiceRequest { resource_spans: vec![all] }.encode_to_vec());
    let mut pause = PAUSE;
    for again in (0..TRIES).rev() {
        let error = match send(http, settings, body.clone()).await {
            Ended::Taken => return Ok(()),
            Ended::Refused(error) => return Err(error),
            Ended::Later(error) => error,
        };
        if again == 0 {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    Ok(())
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
