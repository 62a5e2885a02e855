//! The page in headless Chromium, by Playwright (tests/page/page.mjs), before the demo.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::*;
use crate::process::Program;

/// Where pictures go; into docs if `PORTOLAN_PICTURES` is set, to renew those of the README.
fn pictures() -> std::path::PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join(if std::env::var_os("PORTOLAN_PICTURES").is_some() { "docs" } else { "target/pictures" });
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_person_does_with_it() {
    let dir = tempfile::TempDir::new().unwrap();
    let mut yaml = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/demo.yaml")).unwrap();
    yaml = yaml
        .replace("../geoip/country.mmdb", &database())
        .replace("127.0.0.1:8080", "127.0.0.1:0")
        .replace("127.0.0.1:9901", "127.0.0.1:0");
    // Two listeners may not share an address.
    yaml = yaml.replacen("address: 127.0.0.1:0\n\nclient", "address: 127.0.0.2:0\n\nclient", 1);
    for port in 9101..=9105 {
        yaml = yaml.replace(&format!("127.0.0.1:{port}"), &refused().to_string());
    }
    std::fs::write(dir.path().join("demo.yaml"), &yaml).unwrap();
    let program = Program::begin(&["demo", "--visitors", "60"], dir, "demo.yaml").await.serving().await;
    let node = Command::new("node")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/page/page.mjs"))
        .args([
            format!("http://{}", program.admin).into(),
            program.dir.path().join("demo.yaml").into_os_string(),
            pictures().into(),
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("node is missing: run `make test-deps`");
    let ended = tokio::task::spawn_blocking(move || node.wait_with_output()).await.unwrap().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
}
