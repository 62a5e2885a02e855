//! Visitors of the demo: requests from all over the world, so that there is something to see.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::time::{MissedTickBehavior, interval};

use crate::client::address::is_special;

/// What they ask for, some of it more than once.
const PATHS: [&str; 8] = ["/", "/", "/", "/shop", "/shop/maps", "/shop/compasses", "/about", "/api/search"];
/// Requests at once; whoever comes while there are so many stays away.
const AT_ONCE: usize = 64;

/// Sends `per_second` requests a second to `proxy`, each as somebody else, for ever. The proxy has to believe
/// `X-Forwarded-For` of this machine.
pub async fn visit(proxy: SocketAddr, per_second: u32) {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let mut turns = interval(Duration::from_secs(1) / per_second.max(1));
    turns.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let places = std::sync::Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    loop {
        turns.tick().await;
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let path = fastrand::choice(PATHS).unwrap_or("/");
        let request = Request::get(format!("http://{proxy}{path}")).header("X-Forwarded-For", somebody().to_string());
        let Ok(request) = request.body(Empty::new()) else { continue };
        let answer = client.request(request);
        tokio::spawn(async move {
            // Visitors do not mind; whatever went wrong is on the page.
            if let Ok(answer) = answer.await {
                let _ = answer.into_body().collect().await;
            }
            drop(place);
        });
    }
}

/// An address that may be anybody's.
fn somebody() -> IpAddr {
    loop {
        let ip = Ipv4Addr::from_bits(fastrand::u32(..));
        let is_unicast = ip.octets() < [224, 0, 0, 0];
        let ip = IpAddr::from(ip);
        if is_unicast && !is_special(ip) {
            return ip;
        }
    }
}
