//! What is made of a response's body on its last steps to a client: compressed, or gRPC-Web out of gRPC.

use std::any::Any;
use std::io::{self, Write};

use async_trait::async_trait;
use brotli::CompressorWriter;
use bytes::Bytes;
use flate2::write::GzEncoder;
use http::{HeaderMap, HeaderValue, Method, Version, header};
use pingora::http::ResponseHeader;
use pingora::modules::http::{HttpModule, HttpModuleBuilder, Module};
use pingora::protocols::http::bridge::grpc_web::GrpcWebCtx;
use pingora::proxy::Session;
use pingora::{Error, ErrorType, Result};

use super::edge::Context;
use crate::routes::compression::Coding;

/// Shapes the responses of one request. Nothing, unless it is told to.
#[derive(Default)]
pub struct Shaper {
    encoder: Option<Encoder>,
    grpc_web: GrpcWebCtx,
}

/// Makes one for every request.
pub struct Shapers;

impl HttpModuleBuilder for Shapers {
    fn init(&self) -> Module {
        Box::new(Shaper::default())
    }
}

/// A compressed body in the making.
enum Encoder {
    Gzip(GzEncoder<Vec<u8>>),
    Brotli(Box<CompressorWriter<Vec<u8>>>),
    Zstd(zstd::stream::write::Encoder<'static, Vec<u8>>),
}

/// How hard each tries: about as fast as each other, and as nginx and Caddy have it.
const GZIP_LEVEL: u32 = 6;
const BROTLI_LEVEL: u32 = 4;
const ZSTD_LEVEL: i32 = 3;
/// Brotli's window: 512 KiB, for it is kept for every response under way.
const BROTLI_WINDOW: u32 = 19;
/// A response that comes in smaller pieces than this is read as it comes.
const PIECE: usize = 4 << 10;

impl Encoder {
    fn new(coding: Coding) -> io::Result<Self> {
        Ok(match coding {
            Coding::Gzip => Self::Gzip(GzEncoder::new(Vec::new(), flate2::Compression::new(GZIP_LEVEL))),
            Coding::Brotli => Self::Brotli(Box::new(CompressorWriter::new(Vec::new(), PIECE, BROTLI_LEVEL, BROTLI_WINDOW))),
            Coding::Zstd => Self::Zstd(zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL)?),
        })
    }

    fn encode(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let soon = bytes.len() < PIECE;
        fn all(to: &mut impl Write, bytes: &[u8], soon: bool) -> io::Result<()> {
            to.write_all(bytes)?;
            if soon { to.flush() } else { Ok(()) }
        }
        match self {
            Self::Gzip(to) => all(to, bytes, soon).map(|()| std::mem::take(to.get_mut())),
            Self::Brotli(to) => all(to, bytes, soon).map(|()| std::mem::take(to.get_mut())),
            Self::Zstd(to) => all(to, bytes, soon).map(|()| std::mem::take(to.get_mut())),
        }
    }

    fn finish(self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Gzip(mut to) => to.write_all(bytes).and_then(|()| to.finish()),
            Self::Brotli(mut to) => to.write_all(bytes).map(|()| to.into_inner()),
            Self::Zstd(mut to) => to.write_all(bytes).and_then(|()| to.finish()),
        }
    }
}

impl Shaper {
    /// What becomes of a piece of the body; nothing, if it is left as it is.
    fn shape(&mut self, body: Option<&Bytes>, end: bool) -> Result<Option<Bytes>> {
        let bytes = body.map(|body| &**body).unwrap_or_default();
        let encoded = match &mut self.encoder {
            None => return Ok(None),
            Some(_) if !end && bytes.is_empty() => return Ok(None),
            Some(encoder) if !end => encoder.encode(bytes),
            Some(_) => match self.encoder.take() {
                Some(encoder) => encoder.finish(bytes),
                None => return Ok(None),
            },
        };
        match encoded {
            Ok(encoded) => Ok(Some(encoded.into())),
            Err(error) => Err(Error::because(ErrorType::InternalError, "compressing", error)),
        }
    }
}

#[async_trait]
impl HttpModule for Shaper {
    async fn response_header_filter(&mut self, response: &mut ResponseHeader, end: bool) -> Result<()> {
        if end {
            self.encoder = None;
        }
        self.grpc_web.response_header_filter(response);
        Ok(())
    }

    fn response_body_filter(&mut self, body: &mut Option<Bytes>, end: bool) -> Result<()> {
        if let Some(shaped) = self.shape(body.as_ref(), end)? {
            *body = Some(shaped);
        }
        Ok(())
    }

    fn response_trailer_filter(&mut self, trailers: &mut Option<Box<HeaderMap>>) -> Result<Option<Bytes>> {
        // What waits to be compressed comes before them, and the engine takes one or the other.
        if let Some(rest) = self.shape(None, true)? {
            return Ok(Some(rest));
        }
        match trailers {
            Some(trailers) => self.grpc_web.response_trailer_filter(trailers),
            None => Ok(None),
        }
    }

    fn response_done_filter(&mut self) -> Result<Option<Bytes>> {
        self.shape(None, true)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Compresses the response, if its route does that and its client can read it. Either way caches are told that the answer
/// depends on what clients can read.
pub fn compress(session: &mut Session, response: &mut ResponseHeader, ctx: &Context) -> Result<()> {
    let Some(compression) = ctx.route().and_then(|route| route.compression.as_ref()) else { return Ok(()) };
    let request = session.req_header();
    let chosen = compression.choose(&request.headers, response.status.as_u16(), &response.headers);
    let Some(chosen) = chosen else { return Ok(()) };
    let varies = |value: &HeaderValue| {
        let text = value.to_str().unwrap_or_default();
        text.split(',').any(|name| name.trim() == "*" || name.trim().eq_ignore_ascii_case("accept-encoding"))
    };
    if !response.headers.get_all(header::VARY).iter().any(varies) {
        response.append_header(header::VARY, "Accept-Encoding")?;
    }
    // HTTP/1.0 has no way to send what has no length, and go on.
    let (Some(coding), true) = (chosen, request.version >= Version::HTTP_11) else { return Ok(()) };
    let (http_1, is_head) = (request.version == Version::HTTP_11, request.method == Method::HEAD);
    if let Some(shaper) = session.downstream_modules_ctx.get_mut::<Shaper>().filter(|_| !is_head) {
        let encoder = Encoder::new(coding).map_err(|error| Error::because(ErrorType::InternalError, "compressing", error))?;
        shaper.encoder = Some(encoder);
    }
    response.insert_header(header::CONTENT_ENCODING, coding.name())?;
    // What is left of these would be of another representation (RFC 9110, section 8.8.3).
    response.remove_header(&header::CONTENT_LENGTH);
    response.remove_header(&header::ACCEPT_RANGES);
    for digest in ["content-digest", "repr-digest", "digest", "content-md5"] {
        response.remove_header(digest);
    }
    if http_1 {
        response.insert_header(header::TRANSFER_ENCODING, "chunked")?;
    }
    let tag = response.headers.get(header::ETAG).map(HeaderValue::as_bytes).filter(|tag| !tag.starts_with(b"W/"));
    if let Some(weak) = tag.map(|tag| [b"W/", tag].concat()) {
        response.insert_header(header::ETAG, weak)?;
    }
    Ok(())
}

/// A call of gRPC-Web becomes one of gRPC, if its route does that; its answer is made gRPC-Web again.
pub fn bridge(session: &mut Session, ctx: &Context) {
    if !ctx.route().is_some_and(|route| route.grpc_web) {
        return;
    }
    let mut bridge = GrpcWebCtx::default();
    bridge.init();
    bridge.request_header_filter(session.req_header_mut());
    if let Some(shaper) = session.downstream_modules_ctx.get_mut::<Shaper>() {
        shaper.grpc_web = bridge;
    }
}
