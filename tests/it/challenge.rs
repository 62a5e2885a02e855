//! Challenges: a browser passes, programs do not, and nothing that was used, forged or borrowed counts.

use std::process::{Command, Stdio};

use crate::harness::*;

const RULES: &str = "waf:
  challenge: { difficulty: 10, clearance: 10m }
  rules:
    - { id: toll, expression: 'http.request.uri.path eq \"/guarded\"', action: challenge }
    - { id: script, expression: 'http.request.uri.path eq \"/script\"', action: js_challenge }
";

pub const BROWSER: [(&str, &str); 2] = [("Accept", "text/html,application/xhtml+xml"), ("User-Agent", "Mozilla/5.0 (X11)")];

async fn edge(origin: &Origin) -> Portolan {
    Portolan::start(&format!("regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\n{RULES}", origin.url()))
        .await
}

/// The token of a challenge page.
pub fn token(page: &str) -> String {
    page.split('"').find(|part| part.split('.').count() == 6 && part.len() > 60).expect("no token").to_owned()
}

pub fn solve(token: &str, bits: u32) -> String {
    let zeros = |n: &u64| {
        let digest = ring::digest::digest(&ring::digest::SHA256, format!("{token}.{n}").as_bytes());
        u32::from_be_bytes(digest.as_ref()[..4].try_into().unwrap()).leading_zeros() >= bits
    };
    (0u64..).find(zeros).unwrap().to_string()
}

async fn answer(edge: &Portolan, token: &str, solution: &str, more: &[(&str, &str)]) -> Response {
    let headers = [&[("Portolan-Challenge", token), ("Portolan-Solution", solution)], more].concat();
    edge.request("POST", "/.portolan/challenge", &headers, b"").await
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_answer_of_ones_own_counts_and_once() {
    let origin = Origin::always(ok("through")).await;
    let edge = edge(&origin).await;
    let page = edge.get("/guarded", &BROWSER).await;
    assert_eq!(
        (page.status, page.header("cache-control"), page.header("cf-mitigated")),
        (403, Some("no-store"), Some("challenge"))
    );
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    let token = token(&page.text());
    let solution = solve(&token, 10);

    // Not by another browser, from another address, forged, or wrong.
    for (token, solution, more, reason) in [
        (token.as_str(), solution.as_str(), vec![("User-Agent", "curl/8")], "forged"),
        (&token, &solution, vec![BROWSER[1], ("X-Forwarded-For", "198.51.100.1")], "forged"),
        (&token.replacen(".10.", ".1.", 1), &solution, vec![BROWSER[1]], "forged"),
        (&token, "1234567890123", vec![BROWSER[1]], "unsolved"),
        (&token, "", vec![BROWSER[1]], "unsolved"),
        (&token, "99999999999999999999999", vec![BROWSER[1]], "unsolved"),
        ("", &solution, vec![BROWSER[1]], "malformed"),
    ] {
        let refused = answer(&edge, token, solution, &more).await;
        assert_eq!(refused.status, 403);
        assert!(refused.text().contains(&format!("\"reason\":\"{reason}\"")), "{reason}: {}", refused.text());
        assert_eq!(refused.header("set-cookie"), None);
    }
    let passed = answer(&edge, &token, &solution, &BROWSER).await;
    assert_eq!(passed.status, 204, "{}", passed.text());
    let cookie = passed.header("set-cookie").unwrap();
    assert!(
        cookie.starts_with("portolan_clearance=") && cookie.contains("HttpOnly; SameSite=Lax") && cookie.contains("Max-Age=600")
    );
    let cookie = cookie.split(';').next().unwrap();
    assert!(answer(&edge, &token, &solution, &BROWSER).await.text().contains("\"reason\":\"spent\""), "not twice");

    let with = |cookie: &str, agent: &'static str, ip: &'static str| {
        let cookie = cookie.to_owned();
        let edge = &edge;
        async move { edge.get("/guarded", &[("Cookie", &cookie), ("User-Agent", agent), ("X-Forwarded-For", ip)]).await.status }
    };
    let me = "127.0.0.1";
    assert_eq!(with(cookie, BROWSER[1].1, me).await, 200);
    assert_eq!(with(cookie, "curl/8", me).await, 403, "another browser's cookie");
    assert_eq!(with(cookie, BROWSER[1].1, "198.51.100.1").await, 403, "another client's cookie");
    assert_eq!(with(&cookie.replace(".2.", ".1."), BROWSER[1].1, me).await, 403, "a forged cookie");
    assert_eq!(edge.get("/script", &[("Cookie", cookie), BROWSER[1]]).await.status, 200, "it counts for every rule");
    assert_eq!(origin.count(), 2);
    assert_eq!(edge.metric("portolan_waf_matches_total{action=\"cleared\",rule=\"toll\"}").await, 1.0);
    // It survives a reload, for it is known by its signature alone.
    edge.replace(&format!("regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: anew }}]\n{RULES}", origin.url()));
    edge.until("the new configuration", |s| s.reload.lock().generation == 2).await;
    assert_eq!(with(cookie, BROWSER[1].1, me).await, 200);
    assert!(answer(&edge, &token, &solution, &BROWSER).await.text().contains("\"reason\":\"spent\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_get_words() {
    let origin = Origin::always(ok("through")).await;
    let edge = edge(&origin).await;
    for (method, headers) in [("GET", vec![("Accept", "*/*")]), ("POST", BROWSER.to_vec()), ("GET", vec![])] {
        let refused = edge.request(method, "/guarded", &headers, b"").await;
        assert_eq!((refused.status, refused.header("content-type")), (403, Some("application/json")));
        let body: serde_json::Value = serde_json::from_str(&refused.text()).unwrap();
        assert_eq!(body["error"], "challenge_required");
        assert_eq!(body["request_id"].as_str(), refused.header("x-request-id"));
    }
    let page = edge.get("/guarded", &[BROWSER[0], BROWSER[1], ("Accept-Language", "ar, en;q=0.5")]).await.text();
    assert!(page.contains("lang=\"ar\"") && page.contains("dir=\"rtl\""));
    assert_eq!(origin.count(), 0);
}

/// Without JavaScript: a wait, unless the rule insists.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits() {
    let origin = Origin::always(ok("through")).await;
    let edge = edge(&origin).await;
    let page = edge.get("/guarded?a=1&b=%20", &BROWSER).await.text();
    let link = page.split("url=").nth(1).unwrap().split('"').next().unwrap().replace("&amp;", "&");
    assert!(link.ends_with("&to=/guarded%3Fa%3D1%26b%3D%2520"), "{link}");
    let early = edge.get(&link, &BROWSER).await;
    assert_eq!((early.status, early.header("location")), (303, Some("/guarded?a=1&b=%20")), "back to a new page");
    assert_eq!(early.header("set-cookie"), None);
    let early = edge.get(&link, &[BROWSER[1]]).await;
    assert!(early.text().contains("\"reason\":\"impatient\""), "{}", early.text());
    assert!(!edge.get("/script", &BROWSER).await.text().contains("http-equiv=\"refresh\""));
    // Six seconds of a test would be six seconds too many: the token is made as old as it has to be.
    let key = edge.state.memory.key.clone();
    let client = portolan::waf::challenge::Client { ip: "127.0.0.1".parse().unwrap(), agent: BROWSER[1].1.as_bytes() };
    let token = portolan::waf::challenge::Token::open(&token(&page), &key, client).unwrap();
    let old =
        portolan::waf::challenge::Token { made: token.made - std::time::Duration::from_secs(6), ..token }.sign(&key, client);
    let back = edge.get(&format!("/.portolan/challenge?t={old}&to=//evil.example/"), &BROWSER).await;
    assert_eq!((back.status, back.header("location")), (303, Some("/")));
    let cookie = back.header("set-cookie").unwrap().split(';').next().unwrap();
    assert_eq!(edge.get("/guarded", &[("Cookie", cookie), BROWSER[1]]).await.status, 200);
    assert_eq!(edge.get("/script", &[("Cookie", cookie), BROWSER[1]]).await.status, 403, "waiting is not computing");
}

/// Another site can neither spoil a visitor's name nor wait in its place, and who is suspect has to compute.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_judged_for_what_others_do() {
    let origin = Origin::always(ok("through")).await;
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }} }}
routes: [{{ name: all }}]
lists:
  odd: {{ ip: [192.0.2.0/24], reputation: 30 }}
  bad: {{ ip: [198.51.100.0/24], reputation: 60 }}
waf:
  challenge: {{ difficulty: 8 }}
  rules:
    - {{ id: points, expression: cf.threat_score gt 90, action: block }}
    - {{ id: toll, expression: 'http.request.uri.path eq \"/guarded\"', action: challenge }}
    - {{ id: quiet, expression: 'http.request.uri.path eq \"/managed\"', action: managed_challenge }}
",
        origin.url()
    ))
    .await;
    for _ in 0..6 {
        let refused = edge.get("/.portolan/challenge?t=x", &[("Sec-Fetch-Site", "cross-site")]).await;
        assert_eq!(refused.status, 403);
        let back = edge.get("/.portolan/challenge?t=x&to=/a", &BROWSER).await;
        assert_eq!((back.status, back.header("location")), (303, Some("/a")), "a browser gets another try");
    }
    assert_eq!(edge.get("/", &[]).await.status, 200);
    // What speaks against a client makes it harder, and then there is no waiting.
    let page = async |path: &'static str, ip: &'static str| {
        let text = edge.get(path, &[BROWSER[0], BROWSER[1], ("X-Forwarded-For", ip)]).await.text();
        let bits: u8 = token(&text).split('.').nth(1).unwrap().parse().unwrap();
        (bits, text.contains("http-equiv=\"refresh\""))
    };
    assert_eq!(page("/guarded", "203.0.113.1").await, (8, true));
    assert_eq!(page("/guarded", "192.0.2.1").await, (8, true));
    assert_eq!(page("/guarded", "198.51.100.1").await, (10, false));
    assert_eq!(page("/managed", "203.0.113.1").await, (6, true));
    assert_eq!(page("/managed", "192.0.2.1").await, (8, false));
    // Whoever solves one is thought better of.
    let me = [BROWSER[0], BROWSER[1], ("X-Forwarded-For", "203.0.113.2")];
    let token = token(&edge.get("/managed", &me).await.text());
    assert_eq!(answer(&edge, &token, &solve(&token, 6), &me).await.status, 204);
}

/// A browser that is told to go there.
struct Browser {
    _child: Helper,
    _profile: tempfile::TempDir,
}

impl Browser {
    fn open(url: &str) -> Self {
        let profile = tempfile::TempDir::new().unwrap();
        let child = Command::new("chromium")
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg(url)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromium is needed: `make test-deps` installs it");
        Self { _child: Helper(child), _profile: profile }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_passes_and_gets_through() {
    let page = "<!doctype html><title>through</title>";
    let reply = format!("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\n\r\n{page}", page.len());
    let origin = Origin::always(Act::Send(reply.into_bytes())).await;
    let edge = edge(&origin).await;
    let _browser = Browser::open(&format!("http://{}/script", edge.address));
    origin.came(1).await;
    let got = origin.received().remove(0);
    assert!(got.head.starts_with("GET /script HTTP/1.1"), "{}", got.head);
    assert!(got.one("cookie").unwrap().contains("portolan_clearance="));
    assert_eq!(
        edge.metric("portolan_waf_matches_total{action=\"js_challenge\",rule=\"script\"}").await,
        1.0,
        "one page was enough"
    );
}
