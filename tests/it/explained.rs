//! `explain` is the same decision as traffic's: random requests are served, and asked about.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::harness::*;

#[tokio::test(flavor = "multi_thread")]
async fn traffic_goes_where_explain_says() {
    let names = ["us", "eu", "ap"];
    let mut origins = Vec::new();
    let mut regions = String::new();
    for name in names {
        // The last region is dead, so that failover is part of it.
        let url = if name == "ap" {
            format!("http://{}", refused())
        } else {
            let origin = Origin::always(ok(name)).await;
            let url = origin.url();
            origins.push(origin);
            url
        };
        regions.push_str(&format!("  {name}: {{ upstreams: [\"{url}\"] }}\n"));
    }
    let edge = Portolan::start(&format!(
        "regions:
{regions}routes:
  - {{ name: all, steering: {{ countries: {{ GB: eu, JP: [ap, eu], US: us }}, default: us, failover: [us, eu] }} }}
  - {{ name: api, hosts: [api.example.com, \"*.example.com\"], paths: [/api, /api/v2/], steering: {{ default: eu }} }}
  - {{ name: dead, paths: [/dead/], steering: {{ default: ap }} }}
  - {{ name: writes, paths: [/writes], steering: {{ default: us, writes: eu, writes_failover: [us] }} }}
  - {{ name: sticky, paths: [/sticky], steering: {{ policy: weighted, weights: {{ us: 1, eu: 1, ap: 2 }}, sticky: true }} }}
  - {{ name: residents, paths: [/residents], steering: {{ only: [ap, eu], continents: {{ EU: eu, OC: [ap, eu] }} }} }}
  - {{ name: chosen, paths: [/chosen], client_regions: true, steering: {{ default: us, failover: [eu] }} }}
  - {{ name: beta, match: 'http.request.headers[\"portolan-prefer-region\"][0] eq \"mars\" and ip.src.country ne \"GB\"', steering: {{ default: us }} }}
  - {{ name: only, hosts: [only.example.com], steering: {{ countries: {{ GB: [ap, us] }}, default: ap, failover: [eu] }} }}
redirects: [{{ expression: 'http.request.uri.path eq \"/b\"', to: /elsewhere }}]
transforms:
  - {{ expression: 'starts_with(http.request.uri.path, \"/v1/\")', path: {{ expression: 'concat(\"/api/v2/\", substring(http.request.uri.path, 4))' }} }}
waf:
  rules:
    - {{ id: seen, expression: 'http.request.method eq \"OPTIONS\"', action: log }}
    - {{ id: far, expression: 'http.request.method eq \"DELETE\" and ip.src.country in {{\"JP\" \"US\"}}', action: block }}
    - {{ id: shady, expression: cf.threat_score ge 50, action: challenge }}
    - {{ id: late, expression: 'http.request.uri.path eq \"/api/v2/late\" and portolan.route eq \"api\"', action: block, response: {{ status: 451 }} }}
  managed: {{ enabled: true }}
"
    ))
    .await;
    let hosts =
        prop::sample::select(vec!["api.example.com", "x.example.com", "API.Example.com:80", "only.example.com", "other.org"]);
    let paths = prop::sample::select(vec![
        "/",
        "/api",
        "/api/v2/x",
        "/apix",
        "/dead/1",
        "/dead",
        "/a/../b",
        "/%61pi",
        "/writes",
        "/sticky",
        "/residents",
        "/chosen",
        "/v1/late",
        "/v1/x",
        "/api?q=1%27%20or%20%271%27=%271%27--",
    ]);
    let methods = prop::sample::select(vec!["GET", "PUT", "POST", "DELETE", "OPTIONS"]);
    let client = prop_oneof![
        Just("81.2.69.160".to_owned()),
        Just("202.32.115.1".to_owned()),
        Just("8.8.8.8, 10.0.0.1".to_owned()),
        Just("garbage".to_owned()),
        any::<std::net::Ipv4Addr>().prop_map(|ip| ip.to_string()),
        any::<std::net::Ipv6Addr>().prop_map(|ip| ip.to_string()),
    ];
    let prefers = prop::sample::select(vec!["us", "eu", "ap", "mars", "ap, eu"]);
    let requests = (methods, hosts, paths, client, prefers);
    let mut runner = TestRunner::deterministic();
    for _ in 0..300 {
        let (method, host, path, client, prefers) = requests.new_tree(&mut runner).unwrap().current();
        let question = serde_json::json!({
            "ip": "127.0.0.1", "method": method, "url": path, "down": ["ap"],
            "headers": [["Host", host], ["X-Forwarded-For", client], ["Portolan-Prefer-Region", prefers]],
        });
        let asked =
            send(edge.admin, "POST", "/explain", &[("Content-Type", "application/json")], question.to_string().as_bytes()).await;
        let said: serde_json::Value = serde_json::from_str(&asked.text()).unwrap();
        let got = edge
            .request(method, path, &[("Host", host), ("X-Forwarded-For", &client), ("Portolan-Prefer-Region", prefers)], b"")
            .await;
        let case = format!("{method} {host}{path} for {client}: {said:#}\n{}", got.head);
        match said["answer"]["region"].as_str() {
            Some(region) => {
                assert_eq!((got.status, got.text().as_str()), (200, region), "{case}");
                let origin = if region == "us" { &origins[0] } else { &origins[1] };
                let received = origin.received().pop().unwrap();
                assert_eq!(received.one("portolan-country"), said["country"]["code"].as_str(), "{case}");
                assert_eq!(received.one("cf-connecting-ip"), said["client"]["ip"].as_str(), "{case}");
            }
            None => assert_eq!(Some(u64::from(got.status)), said["answer"]["status"].as_u64(), "{case}"),
        }
    }
}
