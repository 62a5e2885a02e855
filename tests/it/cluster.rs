//! Several nodes and a real Redis, which is stopped, killed and flushed while requests come.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use portolan::limits::quota::{Algorithm, Quota};
use portolan::proxy::clock;
use serde_json::json;

use crate::harness::*;

/// A `redis-server` of ours; dropping it kills it.
struct Redis {
    child: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Redis {
    async fn start() -> Self {
        // A port that is free now may be another's a moment later; then the next one is tried.
        for _ in 0..20 {
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let dir = tempfile::TempDir::new().unwrap();
            let mut child = Self::spawn(port, &dir);
            if Self::is_there(port, &mut child).await {
                return Self { child, port, dir };
            }
        }
        panic!("redis-server does not start");
    }

    fn spawn(port: u16, dir: &tempfile::TempDir) -> Child {
        Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .arg("--dir")
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is needed: `make test-deps`")
    }

    async fn is_there(port: u16, child: &mut Child) -> bool {
        let wait = async {
            while child.try_wait().unwrap().is_none() {
                let said = Self::tell(port, &["PING"]).await;
                if said.contains("PONG") {
                    return true;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            false
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or(false)
    }

    /// What Redis answers to a command.
    async fn tell(port: u16, words: &[&str]) -> String {
        let client = redis::Client::open(format!("redis://127.0.0.1:{port}")).unwrap();
        let Ok(mut connection) = client.get_multiplexed_async_connection().await else { return String::new() };
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        command.query_async::<redis::Value>(&mut connection).await.map_or(String::new(), |value| format!("{value:?}"))
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status().unwrap().success());
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    async fn again(&mut self) {
        self.child = Self::spawn(self.port, &self.dir);
        assert!(Self::is_there(self.port, &mut self.child).await, "redis-server does not start again");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn yaml(origin: &Origin, redis: &Redis, limits: &str) -> String {
    format!(
        "regions: {{ a: {{ upstreams: [\"{0}\"] }}, b: {{ upstreams: [\"{0}\"] }} }}
routes: [{{ name: all, steering: {{ default: a, failover: [b] }} }}]
secret: the same on every node
cluster: {{ redis: redis://127.0.0.1:{1}, name: test }}
limits: {{ memory: 4MiB, rules: {limits} }}\n",
        origin.url(),
        redis.port
    )
}

async fn node(origin: &Origin, redis: &Redis, limits: &str) -> Portolan {
    let node = Portolan::start(&yaml(origin, redis, limits)).await;
    connected(&node, true).await;
    node
}

async fn connected(node: &Portolan, wanted: bool) {
    node.until("the connection to Redis", |state| state.cluster.as_ref().unwrap().is_connected() == wanted).await;
}

const API: &str = "[{ id: api, requests: 100, period: 1h, mitigation_timeout: 0s }]";
const QUOTA: Quota = Quota { algorithm: Algorithm::Sliding, requests: 100, period: std::time::Duration::from_secs(3_600) };

/// How many of `times` requests pass.
async fn pass(node: &Portolan, ip: &str, times: usize) -> usize {
    let mut passed = 0;
    for _ in 0..times {
        passed += usize::from(node.get("/", &[("X-Forwarded-For", ip)]).await.status == 200);
    }
    passed
}

/// Waits until a node knows that others counted so much of a client.
async fn knows(node: &Portolan, ip: &str, used: u32) {
    node.until(&format!("{used} requests of {ip} elsewhere"), |state| {
        let live = state.live.load();
        let ledger = live.snapshot.limits.ledger.as_ref().unwrap();
        let others = ledger.others.as_ref().unwrap();
        let now = clock::now();
        let known = live.snapshot.limits.find(ip, None).into_iter().filter_map(|handle| others.get(handle));
        known.map(|entry| 100 - entry.count.used(&QUOTA, 1, now).left).sum::<u32>() == used
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_holds_for_all_nodes_together() {
    let (origin, redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let nodes = [node(&origin, &redis, API).await, node(&origin, &redis, API).await, node(&origin, &redis, API).await];
    let [a, b, c] = &nodes;
    let ip = "198.51.100.1";
    // A client that is far from its limit is no news; from a tenth on it is.
    assert_eq!(pass(a, ip, 40).await, 40);
    knows(b, ip, 40).await;
    knows(c, ip, 40).await;
    assert_eq!(pass(b, ip, 40).await, 40);
    knows(a, ip, 40).await;
    knows(c, ip, 80).await;
    assert_eq!(pass(c, ip, 50).await, 20);
    knows(a, ip, 60).await;
    knows(b, ip, 60).await;
    for node in &nodes {
        assert_eq!(pass(node, ip, 5).await, 0);
        let said = node.explain(json!({ "ip": ip, "url": "/" })).await;
        assert_eq!((said["answer"]["status"].as_u64(), said["limits"][0]["left"].as_u64()), (Some(429), Some(0)));
    }
    assert_eq!(pass(b, "198.51.100.2", 5).await, 5, "others are others");
    // One that comes later is told what everybody knows.
    let late = node(&origin, &redis, API).await;
    knows(&late, ip, 100).await;
    assert_eq!(pass(&late, ip, 3).await, 0);
    // Whoever begins anew does so everywhere.
    assert_eq!(b.order("/limits/reset", &json!({ "key": ip }).to_string()).await.status, 200);
    knows(a, ip, 0).await;
    knows(c, ip, 0).await;
    assert_eq!(pass(a, ip, 10).await, 10);
    assert_eq!(a.metric("portolan_cluster_connected").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn penalties_hold_everywhere_at_once() {
    let (origin, redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let limits = "[{ id: api, requests: 3, period: 1h, mitigation_timeout: 1d }]";
    let (a, b) = (node(&origin, &redis, limits).await, node(&origin, &redis, limits).await);
    let ip = "198.51.100.1";
    assert_eq!(pass(&a, ip, 4).await, 3);
    let banned = async |node: &Portolan, count: usize| {
        node.until("the penalty", |state| state.memory.known_ledger().unwrap().book.bans(clock::now()).len() == count).await;
    };
    banned(&b, 1).await;
    let refused = b.get("/", &[("X-Forwarded-For", ip)]).await;
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!(refused.status == 429 && wait > 86_300, "{wait}");
    assert!(b.admin("GET", "/limits/banned").await.text().contains(ip));
    assert_eq!(b.metric("portolan_limit_decisions_total{decision=\"banned\",limit=\"api\"}").await, 1.0);
    let late = node(&origin, &redis, limits).await;
    banned(&late, 1).await;
    assert_eq!(pass(&late, ip, 1).await, 0);
    assert_eq!(b.order("/limits/reset", &json!({ "key": ip }).to_string()).await.status, 200);
    banned(&a, 0).await;
    assert_eq!(pass(&a, ip, 1).await, 1);
}

/// Redis is stopped (it accepts, and says nothing), killed, started again and flushed, and nobody notices but the
/// limits that ask it for every request.
#[tokio::test(flavor = "multi_thread")]
async fn redis_in_trouble_under_load() {
    let (origin, mut redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let limits = "[{ id: api, requests: 30, period: 1h },
  { id: logins, expression: 'http.request.uri.path eq \"/login\"', requests: 20, period: 1h, consistency: strict, failure_mode: deny },
  { id: posts, expression: 'http.request.uri.path eq \"/post\"', requests: 20, period: 1h, consistency: strict }]";
    let nodes: Vec<Arc<Portolan>> = vec![
        node(&origin, &redis, limits).await.into(),
        node(&origin, &redis, limits).await.into(),
        node(&origin, &redis, limits).await.into(),
    ];
    let over = Arc::new(AtomicBool::new(false));
    let load = |nth: usize| {
        let (node, over) = (nodes[nth].clone(), over.clone());
        tokio::spawn(async move {
            // Each client asks 33 times; of these 30 pass, on this one node, whatever Redis does.
            let (mut client, mut wrong) = (0u32, Vec::new());
            while !over.load(Relaxed) {
                client += 1;
                let passed = pass(&node, &format!("10.{nth}.{}.{}", client / 256, client % 256), 33).await;
                if passed != 30 {
                    wrong.push((client, passed));
                }
            }
            (client, wrong)
        })
    };
    let loads: Vec<_> = (0..3).map(load).collect();
    let ask = async |node: &Portolan, path: &str, ip: &str| node.get(path, &[("X-Forwarded-For", ip)]).await.status;

    redis.signal("STOP");
    for node in &nodes {
        connected(node, false).await;
    }
    assert_eq!(ask(&nodes[0], "/login", "198.51.100.1").await, 503, "nobody logs in unseen");
    assert_eq!(ask(&nodes[0], "/post", "198.51.100.1").await, 200, "counted here alone");
    redis.signal("CONT");
    for node in &nodes {
        connected(node, true).await;
    }
    redis.kill();
    for node in &nodes {
        connected(node, false).await;
    }
    let mut alone = Vec::new();
    for _ in 0..22 {
        alone.push(ask(&nodes[1], "/post", "198.51.100.2").await);
    }
    assert_eq!(alone, [vec![200; 20], vec![429; 2]].concat());
    redis.again().await;
    for node in &nodes {
        connected(node, true).await;
    }
    // An empty Redis does not give back what this node counted.
    assert_eq!(ask(&nodes[1], "/post", "198.51.100.2").await, 429);
    Redis::tell(redis.port, &["FLUSHALL"]).await;
    assert_eq!(ask(&nodes[1], "/post", "198.51.100.2").await, 429);
    over.store(true, Relaxed);
    for load in loads {
        let (clients, wrong) = load.await.unwrap();
        assert!(clients > 0 && wrong.is_empty(), "{clients} clients, {wrong:?}");
    }
    // And logins go on, once the breaker is closed.
    let again = async {
        while ask(&nodes[2], "/login", "198.51.100.3").await != 200 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, again).await.expect("nobody ever logs in again");
}

/// Where one more would be one too many, every node asks Redis.
#[tokio::test(flavor = "multi_thread")]
async fn strict_is_exact() {
    let (origin, redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let limits = "[{ id: sale, by: [], requests: 50, period: 1h, consistency: strict, failure_mode: deny, headers: true }]";
    let nodes = [node(&origin, &redis, limits).await, node(&origin, &redis, limits).await, node(&origin, &redis, limits).await];
    let mut asked = tokio::task::JoinSet::new();
    for n in 0..150 {
        let address = nodes[n % 3].address;
        asked.spawn(async move { send(address, "GET", "/", &[], b"").await });
    }
    let mut passed = 0;
    let mut unsure = 0;
    while let Some(answer) = asked.join_next().await {
        let answer = answer.unwrap();
        match answer.status {
            200 => passed += 1,
            429 => assert!(answer.header("retry-after").is_some() && answer.header("ratelimit").unwrap().contains("r=0")),
            // A machine that is busy does not always answer within 5 ms.
            503 => unsure += 1,
            other => panic!("{other}"),
        }
    }
    assert!(passed <= 50 && (passed == 50 || unsure > 0), "{passed} passed, {unsure} could not be told");
}

/// Orders for regions reach every node, also one that was away or cut off.
#[tokio::test(flavor = "multi_thread")]
async fn orders_reach_every_node() {
    let (origin, mut redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let (a, b) = (node(&origin, &redis, "[]").await, node(&origin, &redis, "[]").await);
    let away = async |node: &Portolan, region: &str, wanted: bool| {
        let is = |state: &portolan::state::State| state.memory.region(region).is_away(clock::now()) == wanted;
        node.until(&format!("{region} away: {wanted}"), is).await;
    };
    assert_eq!(a.order("/regions/a/evacuate", r#"{ "for": "45m", "reason": "flood" }"#).await.status, 200);
    away(&b, "a", true).await;
    assert!(b.status().await["regions"][0]["order"]["reason"].as_str() == Some("flood"));
    // One that was not there yet.
    let late = node(&origin, &redis, "[]").await;
    away(&late, "a", true).await;
    // Given while nobody can hear it, and Redis forgets everything.
    redis.kill();
    connected(&a, false).await;
    assert_eq!(late.order("/regions/a/restore", "").await.status, 200);
    assert_eq!(b.order("/regions/b/drain", r#"{ "force": true }"#).await.status, 200);
    redis.again().await;
    for node in [&a, &b, &late] {
        away(node, "a", false).await;
        away(node, "b", true).await;
    }
    // And one that begins only now.
    let last = node(&origin, &redis, "[]").await;
    away(&last, "b", true).await;
    away(&last, "a", false).await;
}

/// While Redis is away two nodes count for themselves; when it is back, empty, each knows what the other counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_redis_forgets_nothing() {
    let (origin, mut redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let (a, b) = (node(&origin, &redis, API).await, node(&origin, &redis, API).await);
    let ip = "198.51.100.1";
    assert_eq!(pass(&a, ip, 40).await, 40);
    assert_eq!(pass(&b, ip, 30).await, 30);
    knows(&a, ip, 30).await;
    knows(&b, ip, 40).await;
    redis.kill();
    for node in [&a, &b] {
        connected(node, false).await;
    }
    assert_eq!(pass(&b, ip, 10).await, 10);
    redis.again().await;
    for node in [&a, &b] {
        connected(node, true).await;
    }
    // What is new is told with the next request.
    assert_eq!(pass(&b, ip, 1).await, 1);
    knows(&a, ip, 41).await;
    knows(&b, ip, 40).await;
    assert_eq!(pass(&a, ip, 30).await, 19);
}

/// Somebody who comes while everybody is busy is told all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_in_a_rush() {
    let (origin, redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let limits = "[{ id: api, requests: 100, period: 1h }, { id: rush, by: [{ header: x-rush }], requests: 1000000, period: 1h, dry_run: true }, { id: few, by: [{ header: x-rush }], requests: 1, period: 1h, dry_run: true }]";
    let a: Arc<Portolan> = node(&origin, &redis, limits).await.into();
    assert_eq!(pass(&a, "198.51.100.1", 50).await, 50);
    let over = Arc::new(AtomicBool::new(false));
    let (theirs, busy) = (over.clone(), a.clone());
    let rush = tokio::spawn(async move {
        let mut n = 0;
        while !theirs.load(Relaxed) {
            n += 1;
            let (ip, key) = (format!("10.1.{}.{}", n / 250 % 250, n % 250), n.to_string());
            busy.get("/", &[("X-Forwarded-For", &ip), ("X-Rush", &key)]).await;
        }
    });
    let b = node(&origin, &redis, limits).await;
    knows(&b, "198.51.100.1", 50).await;
    over.store(true, Relaxed);
    rush.await.unwrap();
    assert_eq!(pass(&b, "198.51.100.1", 60).await, 50);
}

/// What only tries a limit out refuses nobody, and what begins anew does so in Redis too.
#[tokio::test(flavor = "multi_thread")]
async fn strict_limits_tried_out_reset_and_changed() {
    let (origin, mut redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let limits = |period: &str| {
        format!(
            "[{{ id: dry, requests: 2, period: 1h, consistency: strict, failure_mode: deny, dry_run: true }}, {{ id: sale, requests: 3, period: {period}, consistency: strict, mitigation_timeout: 1h }}]"
        )
    };
    let (a, b) = (node(&origin, &redis, &limits("1h")).await, node(&origin, &redis, &limits("1h")).await);
    let ip = "198.51.100.1";
    // On a busy machine Redis may not answer within 5 ms; then what both nodes told each other counts.
    assert_eq!(pass(&a, ip, 4).await, 3);
    b.until("the penalty", |state| !state.memory.known_ledger().unwrap().book.bans(clock::now()).is_empty()).await;
    assert_eq!(pass(&b, ip, 1).await, 0);
    assert_eq!(a.order("/limits/reset", &json!({ "key": ip }).to_string()).await.status, 200);
    b.until("a new beginning", |state| state.memory.known_ledger().unwrap().book.bans(clock::now()).is_empty()).await;
    let forgotten = async {
        while Redis::tell(redis.port, &["KEYS", "test:limit:*"]).await.matches("test:limit").count() > 1 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, forgotten).await.expect("Redis still counts");
    assert_eq!(pass(&b, ip, 4).await, 3, "Redis counts from nothing");
    // Another period is another counter there; what nodes know themselves goes on.
    for node in [&a, &b] {
        node.replace(&yaml(&origin, &redis, &limits("2h")));
        node.reloader.reload("test").await.unwrap();
    }
    assert_eq!(pass(&a, "198.51.100.2", 4).await, 3);
    redis.kill();
    connected(&a, false).await;
    assert_eq!(pass(&a, "198.51.100.3", 4).await, 3, "a limit that is tried out refuses nobody, whatever is away");
}

/// Whatever stands in Redis, nothing breaks and nothing absurd is believed.
#[tokio::test(flavor = "multi_thread")]
async fn nonsense_from_redis() {
    let (origin, redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let a = node(&origin, &redis, API).await;
    let far = u64::MAX;
    for message in [
        "{".to_owned(),
        "[]".to_owned(),
        "null".to_owned(),
        r#"{"from":""}"#.to_owned(),
        format!(r#"{{"from":"{}","hello":true}}"#, "x".repeat(100_000)),
        r#"{"from":"x","counts":{"api":{"width":0,"clients":[["zz",[1]]]}}}"#.to_owned(),
        format!(
            r#"{{"from":"x","known":true,"later":{{"what":1}},"counts":{{"api":{{"width":{far},"clients":[["01",[{far}]]]}},"none":{{"width":1,"clients":[]}}}}}}"#
        ),
        r#"{"from":"x","counts":{"api":{"width":400000,"clients":[["0000000000000001",[4294967295,4294967295]]]}}}"#.to_owned(),
        format!(
            r#"{{"from":"x","bans":[{{"limit":"api","key":"{}\n\u001b[2J","handle":"0000000000000007","left":{far}}}]}}"#,
            "y".repeat(5_000)
        ),
        r#"{"from":"x","resets":["0000000000000001"]}"#.to_owned(),
    ] {
        Redis::tell(redis.port, &["PUBLISH", "test:limits", &message]).await;
    }
    for event in [
        "{",
        r#"{"kind":"purge","what":"everything"}"#,
        r#"{"kind":"region","region":"mars","at":1,"node":"x","order":null}"#,
        r#"{"kind":"region","region":"a","at":18446744073709551615,"node":"x","order":{"region":"a","kind":"drained","from":0,"ramp":18446744073709551615,"reason":"for ever"}}"#,
        r#"{"kind":"region","region":"b","at":5,"node":"x","order":{"region":"b","kind":"evacuated","from":0,"ramp":0,"until":9000000000000000,"reason":"long"}}"#,
    ] {
        Redis::tell(redis.port, &["XADD", "test:orders", "*", "event", event]).await;
    }
    Redis::tell(redis.port, &["XADD", "test:orders", "*", "nothing", "at all"]).await;
    a.until("the last order", |state| state.memory.region("b").is_away(clock::now())).await;
    let status = a.status().await;
    assert!(status["regions"][0]["order"].is_null(), "an order from the future is not carried out: {status:#}");
    let until = status["regions"][1]["order"]["until"].as_u64().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    assert!(until <= now + 72 * 3_600_000, "no evacuation lasts longer than 72 hours");
    assert_eq!(a.admin("GET", "/").await.status, 200);
    let banned = a.admin("GET", "/limits/banned").await.text();
    let banned: serde_json::Value = serde_json::from_str(&banned).unwrap();
    assert!(banned[0]["seconds"].as_u64().unwrap() <= 30 * 86_400, "{banned:.300}");
    assert!(banned[0]["key"].as_str().unwrap().len() <= 1_024 && !banned[0]["key"].as_str().unwrap().contains('\u{1b}'));
    assert_eq!(pass(&a, "198.51.100.1", 101).await, 100);
    // An order given here is later than all of it.
    assert_eq!(a.order("/regions/b/restore", "").await.status, 200);
    assert_eq!(a.order("/regions/a/drain", r#"{ "force": true }"#).await.status, 200);
    let b = node(&origin, &redis, API).await;
    for node in [&a, &b] {
        node.until("the order", |state| state.memory.region("a").is_away(clock::now())).await;
        node.until("the other", |state| !state.memory.region("b").is_away(clock::now())).await;
    }
    assert_eq!(b.order("/regions/a/restore", "").await.status, 200);
    a.until("its end", |state| !state.memory.region("a").is_away(clock::now())).await;
}

/// A connection that is cut is missed, whichever it is.
#[tokio::test(flavor = "multi_thread")]
async fn every_connection_is_watched() {
    let (origin, redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let (a, b) = (node(&origin, &redis, API).await, node(&origin, &redis, API).await);
    for kind in ["normal", "pubsub"] {
        Redis::tell(redis.port, &["CLIENT", "KILL", "TYPE", kind]).await;
        for node in [&a, &b] {
            connected(node, true).await;
        }
        let ip = format!("198.51.100.{}", kind.len());
        assert_eq!(pass(&a, &ip, 20).await, 20);
        // News may be lost in the middle of it; what follows brings the rest.
        let told = async {
            loop {
                pass(&a, &ip, 1).await;
                let live = b.state.live.load_full();
                let ledger = live.snapshot.limits.ledger.as_ref().unwrap();
                let known = live.snapshot.limits.find(&ip, None).into_iter().find_map(|h| ledger.others.as_ref().unwrap().get(h));
                if known.is_some_and(|entry| 100 - entry.count.used(&QUOTA, 1, clock::now()).left > 20) {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, told).await.expect("b stays deaf");
    }
}

/// A longer period counts what was counted under the shorter one, here and elsewhere, and nothing twice.
#[tokio::test(flavor = "multi_thread")]
async fn another_period_on_every_node() {
    let (origin, redis) = (Origin::always(ok("served")).await, Redis::start().await);
    let limits = |period: &str| format!("[{{ id: api, requests: 100, period: {period} }}]");
    let (a, b) = (node(&origin, &redis, &limits("30m")).await, node(&origin, &redis, &limits("30m")).await);
    let ip = "198.51.100.1";
    assert_eq!(pass(&a, ip, 40).await, 40);
    let left = async |node: &Portolan, left: u64| {
        let wait = async {
            while node.explain(json!({ "ip": ip, "url": "/" })).await["limits"][0]["left"].as_u64() != Some(left) {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never {left} left"));
    };
    left(&b, 59).await;
    for node in [&a, &b] {
        node.replace(&yaml(&origin, &redis, &limits("1h")));
        node.reloader.reload("test").await.unwrap();
    }
    assert_eq!(pass(&a, ip, 1).await, 1);
    left(&b, 58).await;
    assert_eq!(pass(&b, ip, 60).await, 59);
}

fn caching(origin: &Origin, redis: &Redis) -> String {
    let yaml = yaml(origin, redis, "[]").replace("failover: [b] }", "failover: [b] }, cache: { enabled: true }");
    format!("{yaml}cache: {{ memory: 4MiB, disk: {{ path: cache, size: 16MiB }} }}\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_reach_every_node() {
    let body = b"HTTP/1.1 200 OK\r\nCache-Control: max-age=600\r\nContent-Length: 1\r\n\r\nx".to_vec();
    let (origin, mut redis) = (Origin::always(Act::Send(body)).await, Redis::start().await);
    let (a, b) = (Portolan::start(&caching(&origin, &redis)).await, Portolan::start(&caching(&origin, &redis)).await);
    for node in [&a, &b] {
        connected(node, true).await;
    }
    let is_hit =
        async |node: &Portolan, path: &str| node.get(path, &[]).await.header("cache-status").unwrap_or("").contains("; hit");
    let warm = async |node: &Portolan, path: &str| {
        node.get(path, &[]).await;
        assert!(is_hit(node, path).await, "{path}");
    };
    for node in [&a, &b] {
        for path in ["/1", "/2", "/3"] {
            warm(node, path).await;
        }
    }
    let purged = a.order("/cache/purge", r#"{ "urls": ["localhost/1"] }"#).await.text();
    let purged: serde_json::Value = serde_json::from_str(&purged).unwrap();
    let nodes = purged["nodes"].as_array().unwrap();
    assert!(nodes.len() == 2 && nodes.iter().all(|node| node["applied"] == true), "{purged}");
    assert!(!is_hit(&b, "/1").await && is_hit(&b, "/2").await);
    // A node that was away hears of it before it answers.
    let state = b.state.clone();
    tokio::task::spawn_blocking(move || state.store.close()).await.unwrap();
    let dir = tempfile::TempDir::new().unwrap();
    for name in ["portolan.yaml", "cache"] {
        std::fs::rename(b.path(name), dir.path().join(name)).unwrap();
    }
    drop(b);
    assert_eq!(a.order("/cache/purge", r#"{ "urls": ["localhost/2"] }"#).await.status, 200);
    // Clocks may be some seconds apart, so what follows is asked for later than that; nothing is here.
    let b = Portolan::in_dir(dir).await;
    assert!(!is_hit(&b, "/2").await, "also in its first moment");
    connected(&b, true).await;
    assert!(is_hit(&b, "/3").await, "what was not purged is still there");
    // While Redis is away a purge holds here, and elsewhere once it is back.
    redis.kill();
    connected(&a, false).await;
    let told: serde_json::Value =
        serde_json::from_str(&a.order("/cache/purge", r#"{ "hosts": ["localhost"] }"#).await.text()).unwrap();
    assert_eq!(told["told_others"], false, "{told}");
    assert!(!is_hit(&a, "/3").await);
    redis.again().await;
    b.until("the purge of the other node", |state| {
        let known = &state.memory.cache.purges;
        known.all().iter().any(|purge| matches!(&purge.what, portolan::cache::purge::What::Host(host) if host == "localhost"))
    })
    .await;
    assert!(!is_hit(&b, "/3").await);
    // Redis forgot what it was told before. A node that is new hears of it all the same.
    let c = Portolan::start(&caching(&origin, &redis)).await;
    c.until("what was purged before that", |state| {
        let known = &state.memory.cache.purges;
        known.all().iter().any(|purge| matches!(&purge.what, portolan::cache::purge::What::Url(url) if url == "localhost/2"))
    })
    .await;
}
