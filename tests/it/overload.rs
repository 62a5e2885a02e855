//! Too much at once, seen by clients: who is let go, who is not, and that it ends when it ends.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::harness::*;

/// An origin that answers when it is told to.
struct Gate {
    address: std::net::SocketAddr,
    open: Arc<Semaphore>,
    came: Arc<tokio::sync::watch::Sender<usize>>,
}

impl Gate {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let open = Arc::new(Semaphore::new(0));
        let came = Arc::new(tokio::sync::watch::Sender::new(0));
        let (gate, counter) = (open.clone(), came.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (gate, counter) = (gate.clone(), counter.clone());
                tokio::spawn(async move {
                    let mut buffer = Vec::new();
                    while read_head(&mut stream, &mut buffer).await.is_some() {
                        counter.send_modify(|n| *n += 1);
                        gate.acquire().await.unwrap().forget();
                        if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone").await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, open, came }
    }

    fn yaml(&self, region: &str, route: &str, more: &str) -> String {
        format!(
            "regions: {{ a: {{ upstreams: [\"http://{}\"], {region} }} }}\nroutes: [{{ name: all, {route} }}]\n{more}",
            self.address
        )
    }

    /// Waits until the origin has had so many requests.
    async fn had(&self, count: usize) {
        tokio::time::timeout(PATIENCE, self.came.subscribe().wait_for(|n| *n >= count)).await.expect("they never came").unwrap();
    }
}

/// Asks in the background.
fn ask(edge: &Portolan, ip: &str, path: &str) -> tokio::task::JoinHandle<Response> {
    let (address, ip, path) = (edge.address, ip.to_owned(), path.to_owned());
    tokio::spawn(async move { send(address, "GET", &path, &[("X-Forwarded-For", &ip)], b"").await })
}

/// Asks until it is served: a place is free a moment after its answer was.
async fn served_again(edge: &Portolan, path: &str, headers: &[(&str, &str)]) {
    let ask = async {
        while edge.get(path, headers).await.status != 200 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ask).await.expect("its place is never free again");
}

async fn shed(edge: &Portolan, reason: &str, class: &str) -> f64 {
    edge.metric(&format!("portolan_shed_total{{class=\"{class}\",reason=\"{reason}\"}}")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_has_so_many_at_once() {
    let gate = Gate::start().await;
    let edge = Portolan::start(&gate.yaml("", "", "overload: { max_requests_per_client: 2 }\n")).await;
    let first = [ask(&edge, "198.51.100.1", "/"), ask(&edge, "198.51.100.1", "/")];
    gate.had(2).await;
    let refused = edge.get("/", &[("X-Forwarded-For", "198.51.100.1")]).await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert_eq!(refused.header("proxy-status"), Some("portolan; error=connection_limit_reached"));
    let other = ask(&edge, "198.51.100.2", "/");
    gate.had(3).await;
    let said = edge
        .explain(serde_json::json!({ "ip": "127.0.0.1", "url": "/", "headers": [["X-Forwarded-For", "198.51.100.1"]] }))
        .await;
    assert_eq!(said["answer"]["status"], 503, "{said}");
    gate.open.add_permits(10);
    for answer in first.into_iter().chain([other]) {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    assert_eq!(shed(&edge, "client", "default").await, 1.0);
    served_again(&edge, "/", &[("X-Forwarded-For", "198.51.100.1")]).await;
    // A client that leaves leaves its place.
    edge.until("every place is free", |state| state.memory.load.requests() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_least_important_go_first() {
    let gate = Gate::start().await;
    let classes = "overload:
  max_requests: 100
  classes:
    - { name: health, expression: http.request.uri.path eq \"/healthz\" }
    - { name: anonymous }
    - { name: bots, expression: http.request.uri.path eq \"/bot\", share: 25 }
";
    let edge = Portolan::start(&gate.yaml("", "max_requests: 4", classes)).await;
    let mut under_way = vec![ask(&edge, "198.51.100.1", "/bot")];
    gate.had(1).await;
    // A quarter of four is one.
    assert_eq!(edge.get("/bot", &[]).await.status, 503);
    for n in 2..=3 {
        under_way.push(ask(&edge, "198.51.100.1", "/"));
        gate.had(n).await;
    }
    // 90 % of four are three; the last place is for who matters most.
    assert_eq!(edge.get("/", &[]).await.status, 503);
    under_way.push(ask(&edge, "198.51.100.1", "/healthz"));
    gate.had(4).await;
    assert_eq!(edge.get("/healthz", &[]).await.status, 503);
    for class in ["bots", "anonymous", "health"] {
        assert_eq!(shed(&edge, "route", class).await, 1.0, "{class}");
    }
    gate.open.add_permits(10);
    for answer in under_way {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    served_again(&edge, "/bot", &[]).await;
}

/// An upstream's bound is shared out as well, and a client that leaves in the middle leaves its places.
#[tokio::test(flavor = "multi_thread")]
async fn places_of_upstreams_and_of_clients_that_leave() {
    let gate = Gate::start().await;
    let yaml = format!(
        "regions: {{ a: {{ upstreams: [{{ url: \"http://{}\", max_requests: 2 }}], queue: {{ size: 0 }} }} }}
routes: [{{ name: all, max_requests: 10 }}]
overload:
  max_requests: 10
  max_requests_per_client: 10
  classes: [{{ name: people, expression: http.request.uri.path ne \"/bot\" }}, {{ name: bots, share: 50 }}]
waf: {{ managed: {{ enabled: true }} }}\n",
        gate.address
    );
    let edge = Portolan::start(&yaml).await;
    let first = ask(&edge, "198.51.100.1", "/bot");
    gate.had(1).await;
    assert_eq!(edge.get("/bot", &[]).await.status, 503);
    assert_eq!(shed(&edge, "region", "bots").await, 1.0);
    let second = ask(&edge, "198.51.100.1", "/");
    gate.had(2).await;
    // One leaves while it waits for its answer, one in the middle of its body, which rules want to see.
    first.abort();
    let mut upload = TcpStream::connect(edge.address).await.unwrap();
    upload.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc").await.unwrap();
    edge.until("its place", |state| state.memory.load.requests() == 2).await;
    drop(upload);
    edge.until("one place", |state| state.memory.load.requests() == 1).await;
    gate.open.add_permits(10);
    assert_eq!(second.await.unwrap().status, 200);
    edge.until("no place", |state| state.memory.load.requests() == 0).await;
    assert_eq!(edge.state.memory.route("all").load(std::sync::atomic::Ordering::Relaxed), 0);
}

/// A region's bound: what finds no room waits a little, and is let go.
#[tokio::test(flavor = "multi_thread")]
async fn a_region_gets_no_more_than_it_can_answer() {
    let gate = Gate::start().await;
    let region = "adaptive: { min: 2, max: 2 }, queue: { size: 1, timeout: 100ms }";
    let edge = Portolan::start(&gate.yaml(region, "", "")).await;
    let first = [ask(&edge, "198.51.100.1", "/"), ask(&edge, "198.51.100.2", "/")];
    gate.had(2).await;
    let refused = edge.get("/", &[]).await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "it waited in vain");
    assert_eq!(shed(&edge, "region", "default").await, 1.0);
    assert_eq!(edge.metric("portolan_region_adaptive_limit{region=\"a\"}").await, 2.0);
    gate.open.add_permits(10);
    for answer in first {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    served_again(&edge, "/", &[]).await;
}

/// What does not answer holds no more than its bound, and a bound that was found out is kept by a reload.
#[tokio::test(flavor = "multi_thread")]
async fn a_bound_is_found_out() {
    let origin = Origin::always(ok("fast")).await;
    let yaml = format!("regions: {{ a: {{ upstreams: [\"{}\"], adaptive: {{}} }} }}\nroutes: [{{ name: all }}]\n", origin.url());
    let edge = Portolan::start(&yaml).await;
    let region = edge.state.memory.region("a");
    let ask = async {
        while region.adaptive.base().is_none() {
            assert_eq!(edge.get("/", &[]).await.status, 200);
        }
    };
    tokio::time::timeout(PATIENCE, ask).await.expect("nothing is ever learned");
    edge.replace(&format!("# changed\n{yaml}"));
    edge.reloader.reload("test").await.unwrap();
    assert!(edge.state.memory.region("a").adaptive.base().is_some());
    let said = edge.explain(serde_json::json!({ "ip": "127.0.0.1", "url": "/" })).await;
    assert!(said["regions"][0]["inside"].as_str().unwrap().contains("adaptive, now"), "{said:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded() {
    let origin = Origin::always(ok("served")).await;
    let yaml = |overload: &str| {
        format!(
            "client: {{ trusted_proxies: [127.0.0.9/32] }}\nregions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\noverload: {overload}\n",
            origin.url()
        )
    };
    let edge = Portolan::start(&yaml("{ max_connections_per_client: 2 }")).await;
    let served = async |stream: &mut TcpStream| {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut answer = [0; 4_096];
        let read = stream.read(&mut answer).await.unwrap_or(0);
        answer[..read].starts_with(b"HTTP/1.1 200")
    };
    let connect = async || TcpStream::connect(edge.address).await.unwrap();
    let (mut a, mut b, mut c) = (connect().await, connect().await, connect().await);
    assert!(served(&mut a).await && served(&mut b).await && !served(&mut c).await);
    drop(a);
    edge.until("the connection is gone", |state| state.metrics.connections.get() == 1).await;
    assert!(served(&mut connect().await).await);
    assert_eq!(shed(&edge, "connections", "none").await, 1.0);
    edge.replace(&yaml("{ max_connections: 1 }"));
    edge.reloader.reload("test").await.unwrap();
    assert!(!served(&mut connect().await).await, "a reload counts for new connections");
    assert!(served(&mut b).await, "and ends none");
}
