//! Limits, seen by clients and operators: what is counted, who is refused, for how long, and what survives what.

use serde_json::json;

use crate::challenge::{BROWSER, solve, token};
use crate::harness::*;
use crate::process::Program;

fn yaml(origin: &Origin, limits: &str) -> String {
    format!("regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\n{limits}", origin.url())
}

async fn edge(origin: &Origin, limits: &str) -> Portolan {
    Portolan::start(&yaml(origin, limits)).await
}

fn from(ip: &str) -> (&str, &str) {
    ("X-Forwarded-For", ip)
}

/// The statuses of requests one after the other.
async fn statuses(edge: &Portolan, path: &str, headers: &[(&str, &str)], times: usize) -> Vec<u16> {
    let mut all = Vec::new();
    for _ in 0..times {
        all.push(edge.get(path, headers).await.status);
    }
    all
}

async fn decisions(edge: &Portolan, limit: &str, decision: &str) -> f64 {
    edge.metric(&format!("portolan_limit_decisions_total{{decision=\"{decision}\",limit=\"{limit}\"}}")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_the_contract_has_it() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "limits:
  - id: api
    expression: http.host eq \"api.example.do\"
    by: [ip.src]
    requests: 3
    period: 1h
    action: block
    mitigation_timeout: 0s
",
    )
    .await;
    let api = ("Host", "api.example.do");
    assert_eq!(statuses(&edge, "/", &[api, from("198.51.100.7")], 4).await, [200, 200, 200, 429]);
    let refused = edge.get("/", &[api, from("198.51.100.7")]).await;
    assert_eq!((refused.status, refused.text().as_str()), (429, "Rate limit exceeded"));
    assert_eq!(refused.header("proxy-status"), Some("portolan; error=http_request_denied"));
    // A ninth of the period later than an exact log would say, at most.
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((3_600..=4_000).contains(&wait), "{wait}");
    assert_eq!(refused.header("ratelimit"), None, "only on request");
    // Others, and other hosts, have counters of their own; IPv6 has one for each /64.
    assert_eq!(edge.get("/", &[api, from("198.51.100.8")]).await.status, 200);
    assert_eq!(edge.get("/", &[("Host", "www.example.do"), from("198.51.100.7")]).await.status, 200);
    for n in 1..=3 {
        assert_eq!(edge.get("/", &[api, from(&format!("2001:db8:0:7::{n}"))]).await.status, 200);
    }
    assert_eq!(edge.get("/", &[api, from("2001:db8:0:7:ffff::1")]).await.status, 429);
    assert_eq!(edge.get("/", &[api, from("2001:db8:0:8::1")]).await.status, 200);
    assert_eq!((decisions(&edge, "api", "allowed").await, decisions(&edge, "api", "blocked").await), (8.0, 3.0));
    assert_eq!(origin.count(), 9, "what is refused never arrives");
}

/// Every way to tell clients apart, one at a time and together.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_counted_apart() {
    let origin = Origin::always(ok("served")).await;
    for (by, one, other) in [
        ("ip.src", ("/", from("198.51.100.1")), ("/", from("198.51.100.2"))),
        ("{ header: X-Api-Key }", ("/", ("x-api-key", "one")), ("/", ("x-api-key", "two"))),
        ("{ cookie: session }", ("/", ("cookie", "session=one")), ("/", ("cookie", "session=two"))),
        ("{ query: user }", ("/?user=one", from("198.51.100.1")), ("/?user=two", from("198.51.100.1"))),
        ("country", ("/", from("203.0.113.9")), ("/", from("81.2.69.142"))),
        ("host", ("/", ("Host", "one.example")), ("/", ("Host", "two.example"))),
        ("path", ("/one", from("198.51.100.1")), ("/two", from("198.51.100.1"))),
        ("lower(http.user_agent)", ("/", ("User-Agent", "One")), ("/", ("User-Agent", "Two"))),
        ("http.request.method eq \"GET\" and ip.src eq 198.51.100.1", ("/", from("198.51.100.1")), ("/", from("198.51.100.2"))),
    ] {
        let by = if by.starts_with('{') { by.to_owned() } else { format!("'{by}'") };
        let edge = edge(&origin, &format!("limits: [{{ id: one, by: [{by}], requests: 2, period: 1h }}]\n")).await;
        assert_eq!(statuses(&edge, one.0, &[one.1], 3).await, [200, 200, 429], "{by}");
        assert_eq!(statuses(&edge, other.0, &[other.1], 3).await, [200, 200, 429], "{by}");
        let missing = statuses(&edge, "/", &[("X-Api-Key", ""), ("Cookie", "session="), ("User-Agent", "")], 1).await;
        // What is missing, and what is empty, are counted apart from each other, too.
        if by.contains("header") || by.contains("cookie") {
            assert_eq!(missing, [200], "{by}");
            assert_eq!(statuses(&edge, "/", &[], 3).await, [200, 200, 429], "{by}");
        }
    }
    let together = edge(&origin, "limits: [{ id: two, by: [ip.src, { header: x-key }], requests: 1, period: 1h }]\n").await;
    for (ip, key, status) in
        [("198.51.100.1", "a", 200), ("198.51.100.1", "b", 200), ("198.51.100.2", "a", 200), ("198.51.100.1", "a", 429)]
    {
        assert_eq!(together.get("/", &[from(ip), ("X-Key", key)]).await.status, status, "{ip} {key}");
    }
    let everybody = edge(&origin, "limits: [{ id: all, by: [], requests: 2, period: 1h }]\n").await;
    let mut all = Vec::new();
    for n in 0..3 {
        all.push(everybody.get("/", &[from(&format!("198.51.100.{n}"))]).await.status);
    }
    assert_eq!(all, [200, 200, 429]);
}

/// One limit's refusal is no reason to be refused by another.
#[tokio::test(flavor = "multi_thread")]
async fn limits_in_order_and_what_rules_leave_out() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "limits:
  - { id: wide, requests: 5, period: 1h, headers: true }
  - { id: narrow, expression: 'http.request.uri.path eq \"/login\"', requests: 1, period: 1h, headers: true, response: { status: 420, content_type: application/json, body: '{\"calm\": true}' } }
waf:
  rules:
    - { id: friend, expression: 'http.request.headers[\"x-friend\"][0] eq \"1\"', action: skip, skip: [limits] }
    - { id: gone, expression: 'http.request.uri.path eq \"/gone\"', action: block }
",
    )
    .await;
    let first = edge.get("/login", &[]).await;
    assert_eq!(first.header("ratelimit-policy"), Some("\"wide\";q=5;w=3600, \"narrow\";q=1;w=3600"));
    let state = first.header("ratelimit").unwrap();
    assert!(state.starts_with("\"wide\";r=4;t=") && state.contains(", \"narrow\";r=0;t="), "{state}");
    for _ in 0..10 {
        let refused = edge.get("/login", &[]).await;
        assert_eq!((refused.status, refused.header("content-type")), (420, Some("application/json")));
        assert_eq!(refused.text(), "{\"calm\": true}");
        assert!(refused.header("retry-after").is_some() && refused.header("ratelimit").is_some());
    }
    // The ten took nothing of the wide one; nor does what a rule refuses before.
    assert_eq!(statuses(&edge, "/gone", &[], 3).await, [403, 403, 403]);
    assert_eq!(statuses(&edge, "/", &[], 5).await, [200, 200, 200, 200, 429]);
    assert_eq!(statuses(&edge, "/login", &[("X-Friend", "1")], 3).await, [200, 200, 200]);
}

/// What is counted once there is a response.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_response_says() {
    let origin = Origin::always(status(401, "no")).await;
    let limits = "limits:
  - { id: logins, counting_expression: http.response.code eq 401, requests: 3, period: 1h }
";
    let guessing = edge(&origin, limits).await;
    assert_eq!(statuses(&guessing, "/", &[], 5).await, [401, 401, 401, 429, 429]);
    origin.becomes(ok("yes"));
    assert_eq!(statuses(&guessing, "/", &[from("198.51.100.1")], 5).await, [200; 5], "what succeeds does not count");

    let costly = edge(&origin, "limits: [{ id: points, cost_header: X-Cost, requests: 10, period: 1h }]\n").await;
    assert_eq!(statuses(&costly, "/", &[], 12).await, [200; 12], "without the header nothing counts");
    origin.becomes(Act::Send(b"HTTP/1.1 200 OK\r\nX-Cost: 4\r\nContent-Length: 0\r\n\r\n".to_vec()));
    assert_eq!(statuses(&costly, "/", &[], 5).await, [200, 200, 200, 429, 429]);

    // Counted on arrival, but not all that is limited.
    let posts =
        edge(&origin, "limits: [{ id: posts, counting_expression: http.request.method eq \"POST\", requests: 2, period: 1h }]\n")
            .await;
    assert_eq!(statuses(&posts, "/", &[], 5).await, [200; 5]);
    for expected in [200, 200, 429] {
        assert_eq!(posts.request("POST", "/", &[], b"").await.status, expected);
    }
    assert_eq!(posts.get("/", &[]).await.status, 429, "who posted too much is refused altogether");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_reaches_the_origin() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "limits: [{ id: origin, only_misses: true, requests: 2, period: 1h }]
waf: { managed: { enabled: true } }
",
    )
    .await;
    assert_eq!(statuses(&edge, "/?q=1%27%20or%20%271%27=%271", &[], 5).await, [403; 5]);
    assert_eq!(statuses(&edge, "/", &[], 3).await, [200, 200, 429]);
}

#[tokio::test(flavor = "multi_thread")]
async fn trying_a_limit_out() {
    let origin = Origin::always(ok("served")).await;
    let limits = |dry: bool| {
        format!(
            "access_log: {{ path: access.log }}
limits:
  - {{ id: log, action: log, requests: 1, period: 1h }}
  - {{ id: dry, dry_run: {dry}, requests: 1, period: 1h, mitigation_timeout: 1h }}
"
        )
    };
    let edge = edge(&origin, &limits(true)).await;
    assert_eq!(statuses(&edge, "/", &[], 4).await, [200; 4]);
    assert_eq!((decisions(&edge, "log", "logged").await, decisions(&edge, "dry", "logged").await), (3.0, 3.0));
    assert_eq!(edge.admin("GET", "/limits/banned").await.text(), "[]", "nobody is refused");
    // In earnest it begins with the next request; what a dry run would have done is no penalty.
    edge.replace(&yaml(&origin, &limits(false)));
    edge.reloader.reload("test").await.unwrap();
    assert_eq!(statuses(&edge, "/", &[], 2).await, [429, 429]);
    assert_eq!((decisions(&edge, "dry", "blocked").await, decisions(&edge, "dry", "banned").await), (1.0, 1.0));
    edge.state.access_log.close();
    let log = std::fs::read_to_string(edge.path("access.log")).unwrap();
    let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert_eq!(last["limits"], json!([{ "limit": "log", "decision": "logged" }, { "limit": "dry", "decision": "banned" }]));
}

/// Counters are not the configuration's: a reload changes what is allowed, not what was used.
#[tokio::test(flavor = "multi_thread")]
async fn counters_outlive_reloads() {
    let origin = Origin::always(ok("served")).await;
    let limits = |requests: u32, period: &str| format!("limits: [{{ id: api, requests: {requests}, period: {period} }}]\n");
    let edge = edge(&origin, &limits(3, "1h")).await;
    assert_eq!(statuses(&edge, "/", &[], 4).await, [200, 200, 200, 429]);
    for (requests, period, expected) in [(5, "1h", [200, 200, 429]), (6, "2h", [200, 429, 429]), (2, "90m", [429, 429, 429])] {
        edge.replace(&yaml(&origin, &limits(requests, period)));
        edge.reloader.reload("test").await.unwrap();
        assert_eq!(statuses(&edge, "/", &[], 3).await, expected, "{requests} in {period}");
    }
    // The table's size is settled at the start, and a reload says so.
    edge.replace(&yaml(&origin, "limits: { memory: 32MiB, rules: [{ id: api, requests: 1, period: 1h }] }\n"));
    let refused = edge.reloader.reload("test").await.unwrap_err();
    assert!(refused.iter().any(|p| p.to_string().contains("restart needed")), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn explained_without_being_spent() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "limits:
  - { id: api, requests: 3, period: 1m }
  - { id: elsewhere, expression: 'http.host eq \"x\"', requests: 1, period: 1m, action: challenge }
  - { id: keys, by: [{ header: X-Key }], requests: 1, period: 1h }
",
    )
    .await;
    let ask = || {
        edge.explain(
            json!({ "ip": "127.0.0.1", "url": "/", "headers": [["X-Forwarded-For", "198.51.100.7"], ["X-Key", "sesame"]] }),
        )
    };
    for _ in 0..5 {
        let said = ask().await;
        assert_eq!(
            (said["limits"][0]["outcome"].as_str(), said["limits"][0]["left"].as_u64()),
            (Some("passes, then 2 left"), Some(2))
        );
        assert_eq!(said["limits"][0]["key"], "198.51.100.7");
        assert_eq!(said["limits"][1]["outcome"], "does not apply");
        assert!(said["limits"][2]["key"].as_str().unwrap().starts_with('#') && !said.to_string().contains("sesame"), "{said}");
    }
    assert_eq!(edge.get("/", &[from("198.51.100.7"), ("X-Key", "sesame")]).await.status, 200);
    let said = ask().await;
    assert_eq!(said["answer"]["status"], 429);
    assert!(said["limits"][2]["outcome"].as_str().unwrap().starts_with("refused, room again in "));
    assert_eq!(decisions(&edge, "api", "allowed").await, 1.0, "asking is no request");
    let top = edge.admin("GET", "/limits/top?n=5").await.text();
    assert!(!top.contains("sesame"), "{top}");
}

/// Whoever passes a challenge begins anew; the same clearance does not do so twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_challenge_in_place_of_a_refusal() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "limits: [{ id: pages, requests: 2, period: 1h, action: challenge, mitigation_timeout: 1h }]
waf: { challenge: { difficulty: 10 } }
",
    )
    .await;
    assert_eq!(statuses(&edge, "/", &BROWSER, 2).await, [200, 200]);
    let page = edge.get("/", &BROWSER).await;
    assert_eq!((page.status, page.header("cf-mitigated")), (403, Some("challenge")));
    let token = token(&page.text());
    let solution = solve(&token, 10);
    let headers = [&[("Portolan-Challenge", token.as_str()), ("Portolan-Solution", solution.as_str())], &BROWSER[..]].concat();
    let passed = edge.request("POST", "/.portolan/challenge", &headers, b"").await;
    assert_eq!(passed.status, 204, "{}", passed.text());
    let cookie = passed.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    let with = [&BROWSER[..], &[("Cookie", &cookie)]].concat();
    assert_eq!(statuses(&edge, "/", &with, 4).await, [200, 200, 403, 403]);
    assert_eq!(decisions(&edge, "pages", "challenged").await, 3.0);
}

/// Challenges that were collected before are of no use after the first.
#[tokio::test(flavor = "multi_thread")]
async fn challenges_cannot_be_saved_up() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "limits: [{ id: pages, requests: 2, period: 1h, action: challenge }]\nwaf: { challenge: { difficulty: 1 } }\n",
    )
    .await;
    assert_eq!(statuses(&edge, "/", &BROWSER, 2).await, [200, 200]);
    let mut cookies = Vec::new();
    for _ in 0..5 {
        let token = token(&edge.get("/", &BROWSER).await.text());
        // The score of who fails rises, and the work with it.
        let solution = solve(&token, 8);
        let headers =
            [&[("Portolan-Challenge", token.as_str()), ("Portolan-Solution", solution.as_str())], &BROWSER[..]].concat();
        let passed = edge.request("POST", "/.portolan/challenge", &headers, b"").await;
        assert_eq!(passed.status, 204, "{}", passed.text());
        cookies.push(passed.header("set-cookie").unwrap().split(';').next().unwrap().to_owned());
    }
    let mut passed = 0;
    for cookie in &cookies {
        let with = [&BROWSER[..], &[("Cookie", cookie)]].concat();
        passed += statuses(&edge, "/", &with, 4).await.iter().filter(|status| **status == 200).count();
    }
    assert_eq!(passed, 2, "one of them counts, once");
}

/// An offence is told of to the rules that look at the threat score: 15 points, once.
#[tokio::test(flavor = "multi_thread")]
async fn offenders_have_a_worse_name() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "limits: [{ id: api, expression: 'http.request.uri.path eq \"/api\"', requests: 1, period: 1h }]
waf: { rules: [{ id: shady, expression: cf.threat_score gt 14, action: block }, { id: worse, expression: cf.threat_score gt 16, action: block }] }
",
    )
    .await;
    assert_eq!(statuses(&edge, "/", &[], 1).await, [200]);
    assert_eq!(statuses(&edge, "/api", &[], 2).await, [200, 429]);
    assert_eq!(statuses(&edge, "/", &[], 1).await, [403]);
    assert_eq!(edge.metric("portolan_waf_matches_total{action=\"block\",rule=\"worse\"}").await, 0.0);
}

/// Penalties: listed, ended by hand, and not ended by a restart.
#[tokio::test(flavor = "multi_thread")]
async fn penalties_survive_a_restart() {
    let origin = Origin::always(ok("served")).await;
    let state = tempfile::TempDir::new().unwrap();
    let limits = format!(
        "state_dir: {}
limits: {{ memory: 1MiB, rules: [{{ id: api, requests: 2, period: 1m, mitigation_timeout: 1d }}, {{ id: keys, by: [{{ header: x-key }}, path], requests: 1000, period: 1h }}] }}
",
        state.path().join("portolan").display()
    );
    let mut program = Program::run(&yaml(&origin, &limits)).await;
    let get = async |program: &Program, ip: &str| send(program.address, "GET", "/", &[from(ip), ("X-Key", "sesame")], b"").await;
    for ip in ["198.51.100.1", "198.51.100.2", "2001:db8::1"] {
        for status in [200, 200, 429, 429] {
            assert_eq!(get(&program, ip).await.status, status);
        }
    }
    let banned = get(&program, "198.51.100.1").await;
    let wait: u64 = banned.header("retry-after").unwrap().parse().unwrap();
    assert!((86_300..=86_400).contains(&wait), "{wait}");
    let say = |program: &Program, arguments: &[&str]| {
        let output = program.command(arguments, None);
        (
            output.status.code().unwrap(),
            String::from_utf8(if output.status.success() { output.stdout } else { output.stderr }).unwrap(),
        )
    };
    let (code, list) = say(&program, &["limits", "banned"]);
    assert!(code == 0 && list.lines().count() == 3 && list.contains("198.51.100.1") && list.contains("2001:db8::/64"), "{list}");
    let (_, top) = say(&program, &["limits", "top", "-n", "2"]);
    assert!(top.lines().count() == 2 && top.contains("2 of 2, refused for another"), "{top}");
    let (_, top) = say(&program, &["limits", "top", "--limit", "keys", "--json"]);
    let top: serde_json::Value = serde_json::from_str(&top).unwrap();
    assert_eq!((top[0]["used"].as_u64(), top[0]["most"].as_u64()), (Some(6), Some(1_000)));
    // By name, by network, by hash.
    assert_eq!(say(&program, &["limits", "unban", "198.51.100.2"]), (0, "198.51.100.2 begins anew (1 counter)\n".to_owned()));
    assert_eq!(get(&program, "198.51.100.2").await.status, 200);
    let handle = top[0]["handle"].as_str().unwrap();
    assert_eq!(say(&program, &["limits", "reset", handle, "--limit", "keys"]).0, 0);
    let (code, said) = say(&program, &["limits", "unban", "203.0.113.77"]);
    assert!(code == 1 && said.contains("nothing is counted of `203.0.113.77`"), "{said}");
    let (code, said) = say(&program, &["limits", "reset", "198.51.100.1", "--limit", "none"]);
    assert!(code == 1 && said.contains("defined: api, keys"), "{said}");

    program.signal("TERM");
    assert!(program.ended().await.success());
    let mut program = Program::run(&yaml(&origin, &limits)).await;
    program.said("penalties of limits go on after the restart").await;
    assert_eq!([get(&program, "198.51.100.1").await.status, get(&program, "2001:db8::2").await.status], [429, 429]);
    assert_eq!(get(&program, "198.51.100.2").await.status, 200);
    assert_eq!(say(&program, &["limits", "unban", "2001:db8::/64"]).0, 0);
    assert_eq!(get(&program, "2001:db8::2").await.status, 200);
    // A crash in place of an orderly end: what was written then counts.
    let file = state.path().join("portolan/bans.json");
    let wait = async {
        while std::fs::read_to_string(&file).unwrap().contains("2001:db8::") {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it is never written");
    program.signal("KILL");
    program.ended().await;
    let mut program = Program::run(&yaml(&origin, &limits)).await;
    assert_eq!([get(&program, "198.51.100.1").await.status, get(&program, "2001:db8::2").await.status], [429, 200]);
    program.signal("TERM");
    assert!(program.ended().await.success());
    std::fs::write(&file, "nonsense").unwrap();
    let mut program = Program::run(&yaml(&origin, &limits)).await;
    program.said("penalties cannot be read and are forgotten").await;
    assert_eq!(get(&program, "198.51.100.1").await.status, 200);
}

/// Nothing that a client sends costs more than its entry.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_is_not_read_of_who_is_refused() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(
        &origin,
        "limits: [{ id: api, requests: 1, period: 1h }]
waf: { managed: { enabled: true } }
",
    )
    .await;
    assert_eq!(edge.request("POST", "/", &[], b"a=b").await.status, 200, "asked twice, counted once");
    assert_eq!(decisions(&edge, "api", "allowed").await, 1.0);
    // The body never comes, and is not waited for.
    let answer = edge.request("POST", "/", &[("Content-Length", "1000"), ("Expect", "100-continue")], b"").await;
    assert_eq!(answer.status, 429);
}
