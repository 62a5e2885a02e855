//! Who is asking, what the origin is told, and what nobody can forge.

use crate::harness::*;

fn routes(origin: &Origin) -> String {
    format!("regions: {{ us_east: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\n", origin.url())
}

#[tokio::test(flavor = "multi_thread")]
async fn country_steers() {
    let regions = ["us_east", "eu_west", "ap_northeast", "ap_southeast", "sa_east"];
    let mut origins = Vec::new();
    let mut yaml = String::from("regions:\n");
    for region in regions {
        let origin = Origin::always(ok(region)).await;
        yaml.push_str(&format!("  {region}: {{ upstreams: [\"{}\"] }}\n", origin.url()));
        origins.push(origin);
    }
    yaml.push_str(
        "routes:
  - steering:
      countries: { US: us_east, CA: us_east, GB: eu_west, FR: eu_west, DE: eu_west, JP: ap_northeast, CN: ap_northeast, AU: ap_southeast, BR: sa_east }
      default: us_east
",
    );
    let edge = Portolan::start(&yaml).await;
    for (ip, country, region) in [
        ("8.8.8.8", "US", "us_east"),
        ("81.2.69.160", "GB", "eu_west"),
        ("::ffff:81.2.69.160", "GB", "eu_west"),
        ("::ffff:24.48.0.1", "CA", "us_east"),
        ("91.0.0.1", "DE", "eu_west"),
        ("2001:4860:4860::8888", "US", "us_east"),
        ("202.32.115.1", "JP", "ap_northeast"),
        ("139.130.4.5", "AU", "ap_southeast"),
        ("200.160.2.3", "BR", "sa_east"),
        ("10.1.2.3", "XX", "us_east"),
        ("192.168.0.1", "XX", "us_east"),
        ("fd00::1", "XX", "us_east"),
        ("41.0.0.1", "ZA", "us_east"),
    ] {
        let answer = edge.get("/", &[("X-Forwarded-For", ip)]).await;
        let origin = regions.iter().position(|r| *r == answer.text()).map(|i| &origins[i]).unwrap();
        let told = origin.received().last().unwrap().one("portolan-country").unwrap().to_owned();
        assert_eq!((told.as_str(), answer.region()), (country, region), "{ip}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_forges_nothing() {
    let origin = Origin::always(ok("")).await;
    let yaml = format!("client: {{ country_database: {} }}\n{}", database(), routes(&origin));
    let edge = Portolan::start(&yaml).await;
    let forged = [
        ("X-Forwarded-For", "8.8.8.8"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "bank.example"),
        ("X-Forwarded-Port", "443"),
        ("Forwarded", "for=8.8.8.8"),
        ("X-Real-IP", "8.8.8.8"),
        ("True-Client-IP", "8.8.8.8"),
        ("CF-Connecting-IP", "8.8.8.8"),
        ("CF-IPCountry", "US"),
        ("Portolan-Country", "US"),
        ("Portolan-Region", "mars"),
        ("X-Request-Id", "mine"),
        ("X_Forwarded_For", "8.8.8.8"),
        ("X-Forwarded_For", "8.8.8.8"),
        ("portolan_country", "US"),
        ("X-Forwarded-For", "9.9.9.9"),
        ("X-Custom", "kept"),
    ];
    edge.get("/", &forged).await;
    let received = origin.received().remove(0);
    for (name, value) in [
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-host", "localhost"),
        ("cf-connecting-ip", "127.0.0.1"),
        ("cf-ipcountry", "XX"),
        ("portolan-country", "XX"),
        ("portolan-region", "us_east"),
        ("x-custom", "kept"),
        ("host", "localhost"),
    ] {
        assert_eq!(received.one(name), Some(value), "{name}");
    }
    for name in
        ["x-forwarded-port", "forwarded", "x-real-ip", "true-client-ip", "x_forwarded_for", "x-forwarded_for", "portolan_country"]
    {
        assert_eq!(received.all(name), Vec::<&str>::new(), "{name}");
    }
    assert_eq!(received.one("x-request-id").unwrap().len(), 32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_proxy_is_believed_and_continued() {
    let origin = Origin::always(ok("")).await;
    let edge = Portolan::start(&routes(&origin)).await;
    let said = [
        ("X-Forwarded-For", "6.6.6.6, 81.2.69.160"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "shop.example"),
        ("X-Request-Id", "abc-123"),
        ("Portolan-Country", "US"),
        ("CF-IPCountry", "US"),
    ];
    let answer = edge.get("/", &said).await;
    let received = origin.received().remove(0);
    for (name, value) in [
        ("x-forwarded-for", "6.6.6.6, 81.2.69.160, 127.0.0.1"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "shop.example"),
        ("x-request-id", "abc-123"),
        ("cf-connecting-ip", "81.2.69.160"),
        ("cf-ipcountry", "GB"),
        ("portolan-country", "GB"),
    ] {
        assert_eq!(received.one(name), Some(value), "{name}");
    }
    assert_eq!(answer.header("x-request-id"), Some("abc-123"));
    // Garbage never wins: the last trusted hop is the client.
    edge.get("/", &[("X-Forwarded-For", "8.8.8.8, ' or 1=1")]).await;
    assert_eq!(origin.received()[1].one("cf-connecting-ip"), Some("127.0.0.1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_header_may_carry_the_address() {
    let origin = Origin::always(ok("")).await;
    let with = |trusted: &str| {
        format!(
            "client: {{ trusted_proxies: [{trusted}], ip_header: X-Edge-Client, country_database: {} }}\n{}",
            database(),
            routes(&origin)
        )
    };
    let edge = Portolan::start(&with("127.0.0.1")).await;
    edge.get("/", &[("X-Edge-Client", "81.2.69.160"), ("X-Forwarded-For", "8.8.8.8")]).await;
    assert_eq!(origin.received()[0].one("cf-connecting-ip"), Some("81.2.69.160"));
    let edge = Portolan::start(&with("192.0.2.1")).await;
    edge.get("/", &[("X-Edge-Client", "81.2.69.160")]).await;
    let received = origin.received().remove(1);
    assert_eq!((received.one("cf-connecting-ip"), received.one("x-edge-client")), (Some("127.0.0.1"), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_by_host_and_path() {
    let (api, rest) = (Origin::always(ok("api")).await, Origin::always(ok("rest")).await);
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }}, b: {{ upstreams: [\"{}\"] }} }}
routes:
  - {{ name: rest, hosts: [\"*.example.com\"], steering: {{ default: b }} }}
  - {{ name: api, hosts: [api.example.com], paths: [/v1], steering: {{ default: a }}, region_header: false }}
",
        api.url(),
        rest.url()
    ))
    .await;
    for (host, path, expected) in [
        ("api.example.com", "/v1/x", "api"),
        ("API.example.com:8080", "/v1", "api"),
        ("api.example.com", "/v10", "rest"),
        ("www.example.com", "/v1", "rest"),
    ] {
        assert_eq!(edge.get(path, &[("Host", host)]).await.text(), expected, "{host}{path}");
    }
    let none = edge.get("/", &[("Host", "example.org")]).await;
    assert_eq!((none.status, none.text().as_str()), (404, "No such route\n"));
    assert_eq!(edge.metric("portolan_requests_total{code=\"404\",method=\"GET\",route=\"_none\"}").await, 1.0);
    assert_eq!(edge.metric("portolan_requests_total{code=\"200\",method=\"GET\",route=\"api\"}").await, 2.0);
    assert_eq!(edge.get("/v1", &[("Host", "api.example.com")]).await.header("portolan-region"), None, "switched off");
    assert_eq!(edge.get("/", &[("Host", "www.example.com")]).await.region(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_may_have_a_host_of_its_own() {
    let origin = Origin::always(ok("")).await;
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [{{ url: \"{}\", host: origin.example.com }}] }} }}\nroutes: [{{}}]\n",
        origin.url()
    ))
    .await;
    edge.get("/", &[("Host", "www.example.com")]).await;
    let received = origin.received().remove(0);
    assert_eq!((received.one("host"), received.one("x-forwarded-host")), (Some("origin.example.com"), Some("www.example.com")));
}

#[tokio::test(flavor = "multi_thread")]
async fn hop_by_hop_headers_stop_here() {
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: X-Secret-Hop, keep-alive\r\nX-Secret-Hop: 1\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\nX-End: 1\r\n\r\n";
    let origin = Origin::always(Act::Send(answer.to_vec())).await;
    let edge = Portolan::start(&routes(&origin)).await;
    let answer = edge.get("/", &[("TE", "trailers"), ("Keep-Alive", "5")]).await;
    for name in ["x-secret-hop", "keep-alive", "proxy-authenticate"] {
        assert_eq!(answer.header(name), None, "{name}");
    }
    assert_eq!(answer.header("x-end"), Some("1"));
    assert_eq!(origin.received()[0].one("keep-alive"), None);
}
