//! The smallest tuned proxy that Pingora makes: it forwards every request to one origin and does nothing
//! else. It is the yardstick of `benches/load.rs`: what Portolan costs above this is Portolan's doing,
//! what this costs above nginx is Pingora's.
//!
//! ```text
//! bare LISTEN_ADDRESS ORIGIN_ADDRESS
//! ```

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use async_trait::async_trait;
use pingora::Result;
use pingora::modules::http::HttpModules;
use pingora::proxy::{ProxyHttp, Session, http_proxy_service};
use pingora::server::Server;
use pingora::server::configuration::ServerConf;
use pingora::upstreams::peer::HttpPeer;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Bare {
    origin: SocketAddr,
}

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    fn init_downstream_modules(&self, _modules: &mut HttpModules) {
        // Pingora would add a compression module to every request, switched off.
    }

    async fn early_request_filter(&self, session: &mut Session, _ctx: &mut ()) -> Result<()> {
        // `None` is the client's wish to close.
        if session.get_keepalive().is_some() {
            session.set_keepalive(Some(60));
        }
        Ok(())
    }

    async fn upstream_peer(&self, _session: &mut Session, _ctx: &mut ()) -> Result<Box<HttpPeer>> {
        let mut peer = Box::new(HttpPeer::new(self.origin, false, String::new()));
        let options = &mut peer.options;
        options.connection_timeout = Some(Duration::from_secs(1));
        options.total_connection_timeout = Some(Duration::from_secs(1));
        options.read_timeout = Some(Duration::from_secs(5));
        options.write_timeout = Some(Duration::from_secs(5));
        options.idle_timeout = Some(Duration::from_secs(4));
        Ok(peer)
    }
}

/// As Portolan sets Pingora up.
fn conf() -> ServerConf {
    ServerConf {
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        work_stealing: false,
        upstream_keepalive_pool_size: 512,
        ..ServerConf::default()
    }
}

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args().skip(1).map(|a| a.parse::<SocketAddr>()).collect();
    let [Ok(listen), Ok(origin)] = args.as_slice() else {
        eprintln!("usage: bare LISTEN_ADDRESS ORIGIN_ADDRESS (each an IP address with a port)");
        return ExitCode::FAILURE;
    };
    let mut server = Server::new_with_opt_and_conf(None, conf());
    server.bootstrap();
    let mut service = http_proxy_service(&server.configuration, Bare { origin: *origin });
    service.add_tcp(&listen.to_string());
    server.add_service(service);
    server.run_forever()
}
