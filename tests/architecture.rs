//! The shape of the source, enforced: who may use what, and how long a file may be.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::{Path, PathBuf};

/// In the order of the journey: a stage may use those before it, never one after it.
const STAGES: [&str; 20] = [
    "config",
    "signing",
    "connections",
    "request",
    "listeners",
    "lists",
    "client",
    "rules",
    "transforms",
    "waf",
    "limits",
    "overload",
    "regions",
    "cache",
    "routes",
    "memory",
    "upstream",
    "respond",
    "snapshot",
    "decide",
];

fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(files.len() > 40, "the sources were not found");
    files
}

/// Lines of code outside tests and comments.
fn code(text: &str) -> Vec<&str> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    code.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("//")).collect()
}

fn folder(name: &str) -> &str {
    name.split(['/', '.']).next().unwrap()
}

#[test]
fn pingora_lives_in_proxy_alone() {
    for (name, text) in sources() {
        let imports = code(&text).iter().any(|l| l.contains("pingora::") || l.contains("pingora_"));
        let filter = name == "cli/run.rs"; // names Pingora's log targets
        assert!(!imports || name.starts_with("proxy/") || filter, "{name} imports pingora");
    }
}

#[test]
fn stages_neither_wait_nor_look() {
    const FORBIDDEN: [&str; 7] =
        ["tokio::", "std::fs", "std::net::Tcp", "SystemTime::now", "Instant::now", "thread::sleep", "async fn"];
    for (name, text) in sources() {
        // Reading the configuration's files is what config/load and the expansion in config/tree are for.
        let reads_files = matches!(name.as_str(), "config/load.rs" | "config/tree.rs");
        if STAGES.contains(&folder(&name)) && !reads_files {
            for line in code(&text) {
                assert!(FORBIDDEN.iter().all(|f| !line.contains(f)), "{name}: {line}");
            }
        }
    }
}

#[test]
fn stages_use_only_what_comes_before_them() {
    for (name, text) in sources() {
        let Some(own) = STAGES.iter().position(|s| *s == folder(&name)) else { continue };
        for line in code(&text) {
            let used = line.split("crate::").skip(1).map(|rest| rest.split([':', ';', '{', '}', ' ', '!']).next().unwrap());
            for other in used.filter(|o| !o.is_empty() && *o != "key_path") {
                let position = STAGES.iter().position(|s| *s == other);
                assert!(position.is_some_and(|p| p <= own), "{name} uses `{other}`: {line}");
            }
        }
    }
}

#[test]
fn files_are_short() {
    for (name, text) in sources() {
        let lines = code(&text).len();
        assert!(lines <= 500, "{name} has {lines} lines of code");
    }
}

#[test]
fn nothing_is_left_for_later() {
    for (name, text) in sources() {
        for mark in ["TODO", "FIXME", "XXX:", "unimplemented!", "todo!"] {
            assert!(!text.contains(mark), "{name} has {mark}");
        }
    }
}
