//! Files of a folder, as an upstream: a connection to it is one to a small server in this process, over memory. So what
//! steers, fails over, caches and compresses treats it as any other.

use std::convert::Infallible;
use std::io;

use async_trait::async_trait;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use pingora::Result;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tower_http::services::ServeDir;
use tower_http::services::fs::ServeFileSystemResponseBody;

use crate::regions::Files;
use crate::rules::normalise::url_decode;

/// Bytes on their way from a file to a request.
const BUFFER: usize = 64 << 10;

/// "Connects" to a folder.
#[derive(Debug)]
pub struct FilesConnect(pub Files);

#[async_trait]
impl Connect for FilesConnect {
    async fn connect(&self, _address: &SocketAddr) -> Result<Stream> {
        let (near, far) = tokio::io::duplex(BUFFER);
        let Files { root, index } = &self.0;
        let folder = ServeDir::new(root)
            .append_index_html_on_directories(*index)
            .with_buf_chunk_size(BUFFER)
            .precompressed_zstd()
            .precompressed_br()
            .precompressed_gzip();
        tokio::spawn(async move {
            let answers = service_fn(move |request| answer(folder.clone(), request));
            if let Err(error) = http1::Builder::new().serve_connection(TokioIo::new(far), answers).await {
                tracing::debug!(%error, "files were not read to their end");
            }
        });
        Ok(VirtualSocketStream::new(Box::new(InMemory(near))).into())
    }
}

async fn answer(
    mut folder: ServeDir,
    mut request: Request<Incoming>,
) -> std::result::Result<Response<ServeFileSystemResponseBody>, Infallible> {
    let hidden = is_hidden(request.uri().path());
    let folder_of = request.uri().path().rsplit('/').next().map(|name| format!("{name}/"));
    let served = async {
        if let Some(known) = request.headers_mut().remove(header::IF_RANGE) {
            // RFC 9110, section 13.1.5: a part, but only of what the client has the rest of.
            let mut question = Request::new(());
            *question.method_mut() = Method::HEAD;
            *question.uri_mut() = request.uri().clone();
            if let Some(accepted) = request.headers().get(header::ACCEPT_ENCODING) {
                question.headers_mut().insert(header::ACCEPT_ENCODING, accepted.clone());
            }
            let now = folder.try_call(question).await?;
            if !is_current(known.as_bytes(), now.headers()) {
                request.headers_mut().remove(header::RANGE);
            }
        }
        folder.try_call(request).await
    };
    let status = match hidden {
        true => StatusCode::NOT_FOUND,
        false => match served.await {
            Ok(mut response) => {
                // Relative: what its client calls the folder may be rewritten on the way.
                let place = response.headers_mut().get_mut(header::LOCATION);
                if let (Some(place), Some(Ok(name))) = (place, folder_of.map(|name| HeaderValue::try_from(format!("./{name}")))) {
                    *place = name;
                }
                return Ok(response);
            }
            Err(error) if is_not_there(&error) => StatusCode::NOT_FOUND,
            Err(error) => {
                tracing::warn!(%error, "a file cannot be read");
                StatusCode::INTERNAL_SERVER_ERROR
            }
        },
    };
    let mut response = Response::new(ServeFileSystemResponseBody::default());
    *response.status_mut() = status;
    Ok(response)
}

/// Is it what a client knows? (A date is one only if it is the same.)
fn is_current(known: &[u8], now: &HeaderMap) -> bool {
    let weak = known.starts_with(b"W/");
    !weak && [header::ETAG, header::LAST_MODIFIED].iter().any(|name| now.get(name).is_some_and(|value| value.as_bytes() == known))
}

/// What nobody may read, or what cannot be a name, is not there either.
fn is_not_there(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | NotADirectory | IsADirectory | PermissionDenied | InvalidInput | InvalidFilename)
}

/// Does a name on the way begin with a dot? Nobody meant it to be seen (`.git`, `.env`); RFC 8615 means one. Nor may a name have
/// a slash in it: to rules and routes it is one name, and to the system it would be two.
fn is_hidden(path: &str) -> bool {
    let slash = |w: &[u8]| w.eq_ignore_ascii_case(b"%2f") || w.eq_ignore_ascii_case(b"%5c");
    if path.as_bytes().windows(3).any(slash) {
        return true;
    }
    let decoded = url_decode(path.as_bytes(), false);
    let mut names = decoded.split(|b| matches!(b, b'/' | b'\\'));
    names.any(|name| name.starts_with(b".") && name != b".well-known")
}

/// An end of a pipe in memory.
#[derive(Debug)]
struct InMemory(DuplexStream);

impl AsyncRead for InMemory {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for InMemory {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl VirtualSocket for InMemory {
    fn set_socket_option(&self, _option: VirtualSockOpt) -> io::Result<()> {
        // There is none.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_names() {
        for path in [
            "/.git/config",
            "/a/.env",
            "/%2egit",
            "/a/%2Egit/x",
            "/..",
            "/a/../b",
            "/a/%2e%2e/b",
            "/a\\.env",
            "/a%5c.env",
            "/a%2f.env",
            "/private%2Fx.html",
            "/a%5Cb",
        ] {
            assert!(is_hidden(path), "{path}");
        }
        for path in ["/", "/a.html", "/a/b.c/d", "/.well-known/acme", "/%252egit"] {
            assert!(!is_hidden(path), "{path}");
        }
    }

    #[test]
    fn what_a_client_knows() {
        let now: HeaderMap = [("etag", "\"a\""), ("last-modified", "Sat, 28 Nov 2026 00:00:00 GMT")]
            .map(|(name, value)| (header::HeaderName::from_static(name), header::HeaderValue::from_static(value)))
            .into_iter()
            .collect();
        for (known, current) in [
            ("\"a\"", true),
            ("W/\"a\"", false),
            ("\"b\"", false),
            ("Sat, 28 Nov 2026 00:00:00 GMT", true),
            ("Sat, 28 Nov 2026 00:00:01 GMT", false),
        ] {
            assert_eq!(is_current(known.as_bytes(), &now), current, "{known}");
        }
    }
}
