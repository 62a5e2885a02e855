//! Lists from files: read in others' forms, followed when they change, kept when they break.

use crate::harness::*;
use crate::mmdb;

const RULES: &str = "lists:
  drop: { ip: { file: drop.txt } }
  firehol: { ip: { file: firehol.netset }, reputation: 40 }
  crawlers: { ip: { file: crawlers.json }, verified_bot: Search Engine Crawler }
  embargo: { country: [JP] }
  partners: { host: [partner.example, \"*.partner.example\"] }
waf:
  rules:
    - { id: dropped, expression: ip.src in $drop, action: block }
    - { id: shady, expression: cf.threat_score ge 40, action: block, response: { status: 451 } }
    - { id: bot, expression: 'cf.client.bot and cf.verified_bot_category eq \"Search Engine Crawler\"', action: block, response: { status: 420 } }
    - { id: embargo, expression: ip.src.country in $embargo, action: block, response: { status: 452 } }
    - { id: host, expression: http.host in $partners, action: block, response: { status: 453 } }
";

async fn edge(origin: &Origin) -> Portolan {
    let dir = tempfile::TempDir::new().unwrap();
    std::fs::write(dir.path().join("drop.txt"), "; Spamhaus DROP List\n192.0.2.0/24 ; SBL1\n").unwrap();
    std::fs::write(dir.path().join("firehol.netset"), "#\n# firehol\n#\n198.51.100.0/24\n198.51.100.9,10,known\n").unwrap();
    let google = r#"{"prefixes": [{"ipv4Prefix": "203.0.113.0/27"}, {"ipv6Prefix": "2001:db8:1::/64"}]}"#;
    std::fs::write(dir.path().join("crawlers.json"), google).unwrap();
    let yaml = format!("regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all }}]\n{RULES}", origin.url());
    std::fs::write(dir.path().join("portolan.yaml"), whole(&yaml)).unwrap();
    Portolan::in_dir(dir).await
}

async fn status(edge: &Portolan, ip: &str) -> u16 {
    edge.get("/", &[("X-Forwarded-For", ip)]).await.status
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(&origin).await;
    for (ip, expected) in [
        ("192.0.2.200", 403),
        ("::ffff:192.0.2.200", 403),
        ("198.51.100.1", 451),
        ("203.0.113.5", 420),
        ("2001:db8:1::9", 420),
        ("203.0.113.77", 200),
        ("202.32.115.1", 452),
        ("10.0.0.1", 200),
    ] {
        assert_eq!(status(&edge, ip).await, expected, "{ip}");
    }
    for (host, expected) in [("partner.example", 453), ("A.Partner.Example:80", 453), ("notpartner.example", 200)] {
        // Each from another address: who is blocked again and again has a threat score of its own.
        let ip = format!("10.1.0.{}", host.len());
        assert_eq!(edge.get("/", &[("Host", host), ("X-Forwarded-For", &ip)]).await.status, expected, "{host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_followed_and_a_broken_one_is_not() {
    let origin = Origin::always(ok("served")).await;
    let edge = edge(&origin).await;
    // Each time other addresses of the same networks: who is blocked again and again has a threat score of its own.
    let mut last = 100;
    let mut both = async || {
        last += 1;
        [status(&edge, &format!("192.0.2.{last}")).await, status(&edge, &format!("203.0.113.{last}")).await]
    };
    assert_eq!(both().await, [403, 200]);
    replace(&edge.path("drop.txt"), "203.0.113.0/24\n");
    edge.until("the new list", |s| s.reload.lock().generation == 2).await;
    assert_eq!(both().await, [200, 403]);
    for broken in ["<html>502 Bad Gateway</html>\n", "", "# only comments\n"] {
        let before = edge.state.reload.lock().generation;
        replace(&edge.path("drop.txt"), broken);
        edge.until("it is told", |s| {
            let reload = s.reload.lock();
            reload.generation > before && reload.problems.iter().any(|p| p.key == "lists.drop.ip.file")
        })
        .await;
        let reload = edge.state.reload.lock().clone();
        assert!(reload.successful, "the rest of the configuration is in force: {:?}", reload.problems);
        let message = &reload.problems.iter().find(|p| p.key == "lists.drop.ip.file").unwrap().message;
        assert!(message.contains("its last 1 entries stay in force"), "{message}");
        assert_eq!(both().await, [200, 403], "{broken}");
    }
    // And the one after that counts again.
    let before = edge.state.reload.lock().generation;
    replace(&edge.path("drop.txt"), "192.0.2.0/24\n");
    edge.until("it is whole again", |s| s.reload.lock().generation > before && s.reload.lock().problems.is_empty()).await;
    assert_eq!(both().await, [403, 200]);
}

/// What databases know of a place, and lists of AS numbers.
#[tokio::test(flavor = "multi_thread")]
async fn places_and_systems() {
    let origin = Origin::always(ok("served")).await;
    let dir = tempfile::TempDir::new().unwrap();
    std::fs::write(dir.path().join("city.mmdb"), mmdb::place()).unwrap();
    std::fs::write(dir.path().join("hosting.txt"), "# hosting\nAS64496\n64511 example\n").unwrap();
    let yaml = format!(
        "client: {{ trusted_proxies: [127.0.0.0/8], city_database: city.mmdb, asn_database: asn.mmdb }}
regions: {{ a: {{ upstreams: [\"{}\"] }} }}
routes: [{{ name: all }}]
lists: {{ hosting: {{ asn: {{ file: hosting.txt }} }} }}
waf:
  rules:
    - id: place
      expression: >-
        ip.src.city eq \"San Francisco\" and ip.src.region eq \"California\" and ip.src.region_code eq \"CA\" and
        ip.src.subdivision_1_iso_code eq \"US-CA\" and ip.src.subdivision_2_iso_code eq \"075\" and ip.src.postal_code eq \"94103\" and
        ip.src.metro_code eq \"807\" and ip.src.timezone.name eq \"America/Los_Angeles\" and ip.src.lat eq \"37.77490\" and
        ip.src.lon eq \"-122.41940\" and ip.src.continent eq \"NA\" and not ip.src.is_in_european_union and ip.geoip.country eq \"US\"
      action: log
    - {{ id: hosting, expression: ip.src.asnum in $hosting, action: log }}
    - {{ id: number, expression: ip.src.asnum eq 64500, action: log }}
",
        origin.url()
    );
    std::fs::write(dir.path().join("portolan.yaml"), whole(&yaml)).unwrap();
    std::fs::write(dir.path().join("asn.mmdb"), mmdb::asn(64511, false)).unwrap();
    let edge = Portolan::in_dir(dir).await;
    let matched = async |rule: &str| edge.metric(&format!("portolan_waf_matches_total{{action=\"log\",rule=\"{rule}\"}}")).await;
    edge.get("/", &[("X-Forwarded-For", "8.8.8.8")]).await;
    assert_eq!([matched("place").await, matched("hosting").await, matched("number").await], [1.0, 1.0, 0.0]);
    edge.get("/", &[("X-Forwarded-For", "10.0.0.1")]).await;
    assert_eq!([matched("place").await, matched("hosting").await], [1.0, 1.0], "a private address is nowhere");
    // The database is replaced by one of another layout.
    std::fs::write(edge.path("asn.mmdb"), mmdb::asn(64500, true)).unwrap();
    edge.until("the new database", |s| s.reload.lock().generation == 2).await;
    edge.get("/", &[("X-Forwarded-For", "8.8.8.8")]).await;
    assert_eq!([matched("hosting").await, matched("number").await], [1.0, 1.0]);
}

/// One file may serve two lists, and an entry with an end is gone when it comes.
#[tokio::test(flavor = "multi_thread")]
async fn shared_files_and_entries_that_expire() {
    let origin = Origin::always(ok("served")).await;
    let dir = tempfile::TempDir::new().unwrap();
    let soon = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 6;
    std::fs::write(dir.path().join("bad.csv"), format!("192.0.2.0/24,60,scanner,{soon}\n198.51.100.0/24\n")).unwrap();
    let yaml = format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }} }}
routes: [{{ name: all }}]
lists:
  bad: {{ ip: {{ file: bad.csv }} }}
  shady: {{ ip: {{ file: bad.csv }}, reputation: 20 }}
waf:
  rules:
    - {{ id: bad, expression: ip.src in $bad and http.request.uri.path eq \"/bad\", action: block }}
    - {{ id: shady, expression: cf.threat_score ge 60 and http.request.uri.path eq \"/shady\", action: block }}
",
        origin.url()
    );
    std::fs::write(dir.path().join("portolan.yaml"), whole(&yaml)).unwrap();
    let edge = Portolan::in_dir(dir).await;
    let both = async |ip: &'static str| {
        [edge.get("/bad", &[("X-Forwarded-For", ip)]).await.status, edge.get("/shady", &[("X-Forwarded-For", ip)]).await.status]
    };
    assert_eq!([both("192.0.2.1").await, both("198.51.100.1").await], [[403, 403], [403, 200]]);
    edge.until("the entry's end", |s| s.reload.lock().generation == 2).await;
    assert_eq!([both("192.0.2.2").await, both("198.51.100.2").await], [[200, 200], [403, 200]]);
    replace(&edge.path("bad.csv"), "");
    edge.until("it is told", |s| s.reload.lock().problems.len() == 2).await;
    assert_eq!(both("198.51.100.3").await, [403, 200], "both keep what they had");
}
