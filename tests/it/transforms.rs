//! What is rewritten on the way, in both directions, and who is sent elsewhere.

use crate::harness::*;

#[tokio::test(flavor = "multi_thread")]
async fn both_ways() {
    let origin = Origin::always(Act::Send(
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nServer: secret/1.0\r\nX-Old: 1\r\n\r\nserved".to_vec(),
    ))
    .await;
    let edge = Portolan::start(&format!(
        "regions: {{ eu: {{ upstreams: [\"{}\"] }} }}
routes:
  - {{ name: beta, match: 'http.request.headers[\"x-beta\"][0] eq \"1\"' }}
  - {{ name: api, paths: [/api/], match: 'http.request.method in {{\"GET\" \"POST\"}}' }}
  - {{ name: all }}
redirects:
  - {{ expression: 'http.request.uri.path eq \"/old\"', to: \"https://new.example/\", status: 301 }}
  - expression: 'http.host eq \"www.example.com\"'
    to: {{ expression: 'concat(\"https://example.com\", http.request.uri.path)' }}
    preserve_query: true
transforms:
  - expression: 'starts_with(http.request.uri.path, \"/v1/\")'
    path: {{ expression: 'regex_replace(http.request.uri.path, \"^/v1/\", \"/api/\")' }}
    query: {{ expression: 'remove_query_args(http.request.uri.query, \"utm_source\")' }}
    request:
      set: {{ X-Country: {{ expression: ip.src.country }}, X-Route: {{ expression: portolan.route }}, X-Fixed: \"yes\", X-Ray: {{ expression: cf.ray_id }}, X-None: {{ expression: 'http.request.headers[\"x-absent\"][0]' }} }}
      remove: [X-Debug]
    response: {{ set: {{ X-Api: \"1\" }} }}
  - response:
      set: {{ X-Served-By: {{ expression: 'concat(portolan.region, \"/\", to_string(http.response.code))' }} }}
      remove: [Server]
  - {{ expression: 'http.response.headers[\"x-old\"][0] eq \"1\"', response: {{ remove: [X-Old] }} }}
waf: {{ rules: [{{ id: sees-the-new-path, expression: 'http.request.uri.path eq \"/api/secret\"', action: block }}] }}
",
        origin.url()
    ))
    .await;
    let gb = ("X-Forwarded-For", "81.2.69.160");
    let got = edge.get("/v1/orders?utm_source=x&id=7", &[gb, ("X-Debug", "1"), ("X-None", "forged")]).await;
    assert_eq!((got.status, got.header("x-api"), got.header("x-served-by")), (200, Some("1"), Some("eu/200")));
    assert_eq!((got.header("server"), got.header("x-old")), (None, None));
    let received = origin.received().pop().unwrap();
    assert!(received.head.starts_with("GET /api/orders?id=7 HTTP/1.1"), "{}", received.head);
    assert_eq!(
        (received.one("x-country"), received.one("x-route"), received.one("x-fixed")),
        (Some("GB"), Some("api"), Some("yes"))
    );
    assert_eq!((received.one("x-debug"), received.one("x-none")), (None, None));
    assert_eq!(received.one("x-ray"), received.one("x-request-id"), "a request has one name");
    assert_eq!(edge.get("/v1/secret", &[gb]).await.status, 403, "rules see what transforms made");

    let plain = edge.get("/other?utm_source=x", &[("X-Debug", "1")]).await;
    assert_eq!((plain.header("x-api"), plain.header("x-served-by")), (None, Some("eu/200")));
    let received = origin.received().pop().unwrap();
    assert!(received.head.starts_with("GET /other?utm_source=x HTTP/1.1"));
    assert_eq!((received.one("x-debug"), received.one("x-fixed")), (Some("1"), None));

    let old = edge.get("/old", &[]).await;
    assert_eq!((old.status, old.header("location")), (301, Some("https://new.example/")));
    let www = edge.get("/a/../b?c=d", &[("Host", "www.example.com")]).await;
    assert_eq!((www.status, www.header("location")), (302, Some("https://example.com/b?c=d")));

    let route = async |method: &str, path: &str, header: (&'static str, &'static str)| {
        let question = serde_json::json!({ "ip": "127.0.0.1", "method": method, "url": path, "headers": [header] });
        edge.explain(question).await["route"]["name"].as_str().unwrap().to_owned()
    };
    assert_eq!(route("GET", "/api/x", ("X-Beta", "0")).await, "api");
    assert_eq!(route("GET", "/v1/x", ("X-Beta", "0")).await, "api", "routes see the new path");
    assert_eq!(route("GET", "/api/../api/x", ("X-Beta", "0")).await, "api");
    assert_eq!(route("DELETE", "/api/x", ("X-Beta", "0")).await, "all", "its condition is not met");
    assert_eq!(route("DELETE", "/", ("X-Beta", "1")).await, "beta");
    assert_eq!(route("GET", "/", ("X-Beta", "0")).await, "all");
}

/// What a route rewrites is the origin's to see: rules and limits speak of what the client asked for.
#[tokio::test(flavor = "multi_thread")]
async fn routes_rewrite_and_redirect() {
    let origin = Origin::always(Act::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer: secret\r\n\r\nok".to_vec())).await;
    let edge = Portolan::start(&format!(
        "regions: {{ eu: {{ upstreams: [\"{}\"] }} }}
routes:
  - name: shop
    paths: [/shop]
    rewrite:
      strip_prefix: /shop
      query: {{ expression: 'remove_query_args(http.request.uri.query, \"utm\")' }}
      request: {{ set: {{ X-Route: {{ expression: portolan.route }} }}, remove: [X-Debug] }}
      response: {{ set: {{ X-Frame-Options: DENY }}, remove: [Server] }}
  - {{ name: page, paths: [/page], rewrite: {{ path: {{ expression: 'concat(\"/pages\", http.request.uri.path)' }} }} }}
  - {{ name: moved, paths: [/moved], redirect: {{ to: {{ expression: 'concat(\"https://new.example\", http.request.uri.path)' }}, status: 308, preserve_query: true }} }}
  - {{ name: all }}
waf: {{ rules: [{{ id: by-what-was-asked, expression: 'http.request.uri.path eq \"/shop/secret\"', action: block }}, {{ id: not-by-what-it-becomes, expression: 'http.request.uri.path eq \"/orders\"', action: block }}] }}
",
        origin.url()
    ))
    .await;
    for (path, expected) in [
        ("/shop/orders?utm=x&id=7", "/orders?id=7"),
        ("/shop", "/"),
        ("/shop/", "/"),
        ("/shop/a%2Fb//c", "/a%2Fb//c"),
        ("/shop/%7Eb/./c", "/%7Eb/./c"),
        ("/./shop/a", "/a"),
        ("/shop/../shop/b", "/b"),
        ("/shop//b", "/b"),
        ("/page/1?q", "/pages/page/1?q"),
        ("/else?utm=x", "/else?utm=x"),
    ] {
        let before = origin.count();
        let answer = edge.get(path, &[("X-Debug", "1")]).await;
        assert_eq!(answer.status, 200, "{path}");
        let received = origin.received().swap_remove(before);
        assert_eq!(received.head.split(' ').nth(1), Some(expected), "{path}");
        let shop = path.contains("shop");
        assert_eq!(received.one("x-route"), shop.then_some("shop"), "{path}");
        assert_eq!(received.one("x-debug").is_none(), shop, "{path}");
        assert_eq!(
            (answer.header("x-frame-options"), answer.header("server").is_none()),
            (shop.then_some("DENY"), shop),
            "{path}"
        );
    }
    assert_eq!(edge.get("/shop/secret", &[]).await.status, 403);
    let moved = edge.get("/else", &[]).await;
    assert_eq!(moved.status, 200);
    let moved = edge.get("/moved/x?a=1", &[]).await;
    assert_eq!((moved.status, moved.header("location")), (308, Some("https://new.example/moved/x?a=1")));
}

/// What a route makes of a target is a part of what it is stored under.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_is_of_one_rewriting() {
    let fresh = |body: &str| {
        Act::Send(format!("HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 2\r\n\r\n{body}").into_bytes())
    };
    let origin = Origin::scripted(vec![fresh("gb"), fresh("jp"), fresh("g2")]).await;
    let edge = Portolan::start(&format!(
        "regions: {{ eu: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all, cache: {{ enabled: true }}, rewrite: {{ path: {{ expression: 'concat(\"/\", lower(ip.src.country), http.request.uri.path)' }} }} }}]\n",
        origin.url()
    ))
    .await;
    let (gb, jp) = ([("X-Forwarded-For", "81.2.69.160")], [("X-Forwarded-For", "126.0.0.1")]);
    for (client, body) in [(&gb, "gb"), (&jp, "jp"), (&gb, "gb"), (&jp, "jp")] {
        assert_eq!(edge.get("/page", client).await.text(), body);
    }
    let paths: Vec<String> = origin.received().iter().map(|r| r.head.split(' ').nth(1).unwrap().to_owned()).collect();
    assert_eq!(paths, ["/gb/page", "/jp/page"]);
    // A purge knows it by what clients call it.
    assert_eq!(edge.order("/cache/purge", r#"{ "hosts": ["localhost"] }"#).await.status, 200);
    assert_eq!(edge.get("/page", &gb).await.text(), "g2");
}
