//! Files of a folder as an upstream; what is compressed on the way to clients.

use std::io::Read;

use tempfile::TempDir;

use crate::harness::*;

fn folder() -> TempDir {
    let dir = TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("root/index.html", "<p>home");
    write("root/sub/index.html", "<p>below");
    write("root/a b.txt", "0123456789");
    write("root/app.js", "console.log('plain')");
    write("root/app.js.br", "as brotli");
    write("root/app.js.gz", "as gzip");
    write("root/.env", "SECRET=1");
    write("root/.git/config", "secret");
    write("root/.well-known/security.txt", "mailto:x");
    write("root/big.json", &format!("[{}1]", "1, ".repeat(50_000)));
    write("secret.txt", "outside");
    dir
}

async fn start(dir: &TempDir, more: &str) -> Portolan {
    let root = dir.path().join("root");
    Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [{{ files: {{ root: {} }} }}] }} }}\nroutes: [{{ name: all{more} }}]\n",
        root.display()
    ))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_served() {
    let dir = folder();
    let edge = start(&dir, "").await;
    for (path, status, body, kind) in [
        ("/", 200, "<p>home", "text/html"),
        ("/sub/", 200, "<p>below", "text/html"),
        ("/a%20b.txt", 200, "0123456789", "text/plain"),
        ("/app.js", 200, "console.log('plain')", "text/javascript"),
        ("/.well-known/security.txt", 200, "mailto:x", "text/plain"),
        ("/nothing", 404, "", ""),
        ("/.env", 404, "", ""),
        ("/%2eenv", 404, "", ""),
        ("/.git/config", 404, "", ""),
        ("/../secret.txt", 404, "", ""),
        ("/sub/../../secret.txt", 404, "", ""),
        ("/%2e%2e/secret.txt", 404, "", ""),
        ("/..%2fsecret.txt", 404, "", ""),
        ("/sub/..%5c..%5csecret.txt", 404, "", ""),
        ("//../secret.txt", 404, "", ""),
        ("/sub%2Findex.html", 404, "", ""),
        ("/%00", 404, "", ""),
    ] {
        let answer = edge.get(path, &[]).await;
        let kind_is = answer.header("content-type").unwrap_or_default().starts_with(kind);
        assert_eq!((answer.status, answer.text().as_str(), kind_is), (status, body, true), "{path}: {}", answer.head);
        assert!(answer.complete);
    }
    assert_eq!(edge.get("/sub", &[]).await.header("location"), Some("./sub/"));
    let answer = edge.request("POST", "/", &[], b"x").await;
    assert_eq!((answer.status, answer.header("allow")), (405, Some("GET,HEAD")), "{}", answer.head);
    let head = edge.request("HEAD", "/a%20b.txt", &[], b"").await;
    assert_eq!((head.status, head.header("content-length")), (200, Some("10")));
    assert_eq!(head.region(), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_has_is_not_sent_again() {
    let dir = folder();
    let edge = start(&dir, "").await;
    let first = edge.get("/a%20b.txt", &[]).await;
    let (tag, date) = (first.header("etag").unwrap(), first.header("last-modified").unwrap());
    for (headers, status, body) in [
        (vec![("If-None-Match", tag)], 304, ""),
        (vec![("If-Modified-Since", date)], 304, ""),
        (vec![("If-None-Match", "\"other\""), ("If-Modified-Since", date)], 200, "0123456789"),
        (vec![("If-Match", "\"other\"")], 412, ""),
        (vec![("Range", "bytes=2-4")], 206, "234"),
        (vec![("Range", "bytes=-3")], 206, "789"),
        (vec![("Range", "bytes=20-")], 416, ""),
        (vec![("Range", "bytes=2-4"), ("If-Range", tag)], 206, "234"),
        (vec![("Range", "bytes=2-4"), ("If-Range", date)], 206, "234"),
        (vec![("Range", "bytes=2-4"), ("If-Range", "\"other\"")], 200, "0123456789"),
        (vec![("Range", "bytes=2-4"), ("If-Range", "Sat, 28 Nov 1998 00:00:00 GMT")], 200, "0123456789"),
    ] {
        let answer = edge.get("/a%20b.txt", &headers).await;
        assert_eq!((answer.status, answer.text().as_str()), (status, body), "{headers:?}: {}", answer.head);
    }
    // What stands beside it, ready.
    for (accept, coding, body) in
        [("gzip, br", Some("br"), "as brotli"), ("gzip", Some("gzip"), "as gzip"), ("zstd", None, "console.log('plain')")]
    {
        let answer = edge.get("/app.js", &[("Accept-Encoding", accept)]).await;
        assert_eq!((answer.header("content-encoding"), answer.text().as_str()), (coding, body), "{accept}");
        assert!(answer.header("vary").is_some_and(|vary| vary.eq_ignore_ascii_case("accept-encoding")), "{}", answer.head);
        assert!(answer.header("content-type").unwrap().starts_with("text/javascript"));
    }
}

/// A folder is an upstream like any other: it stands in for one that fails, is cached, and reloads.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_stands_in_for_a_region() {
    let dir = folder();
    let root = dir.path().join("root");
    let yaml = format!(
        "regions:\n  a: {{ upstreams: [\"http://{}\"] }}\n  sorry: {{ upstreams: [{{ files: {{ root: {}, index: false }} }}] }}\nroutes: [{{ name: all, steering: {{ default: a, failover: [sorry] }}, cache: {{ enabled: true }} }}]\n",
        refused(),
        root.display()
    );
    let edge = Portolan::start(&yaml).await;
    let answer = edge.get("/a%20b.txt", &[]).await;
    assert_eq!((answer.status, answer.region(), answer.text().as_str()), (200, "sorry", "0123456789"));
    assert_eq!(edge.get("/", &[]).await.status, 404, "no index");
    let status = edge.status().await.to_string();
    assert!(status.contains("files:/"), "{status}");
    // Named relative to the configuration, and not there.
    let bad = yaml.replace(&root.display().to_string(), "nowhere");
    edge.replace(&bad);
    edge.until("the folder is missed", |state| !state.reload.lock().successful).await;
    let problems = edge.state.reload.lock().problems.clone();
    assert!(format!("{problems:?}").contains("the folder `"), "{problems:?}");
    assert_eq!(edge.get("/a%20b.txt", &[]).await.status, 200);
}

fn unpacked(coding: &str, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match coding {
        "gzip" => drop(flate2::read::GzDecoder::new(body).read_to_end(&mut out).unwrap()),
        "br" => drop(brotli::Decompressor::new(body, 4096).read_to_end(&mut out).unwrap()),
        "zstd" => out = zstd::decode_all(body).unwrap(),
        other => panic!("{other}"),
    }
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_can_read_is_compressed() {
    let dir = folder();
    let edge = start(&dir, ", compression: { enabled: true }").await;
    let plain = edge.get("/big.json", &[]).await;
    let vary = plain.header("vary").unwrap().to_ascii_lowercase();
    assert_eq!((plain.header("content-encoding"), vary.as_str()), (None, "accept-encoding"), "{}", plain.head);
    for (accept, coding) in [("zstd, br, gzip", "zstd"), ("gzip, br", "br"), ("gzip", "gzip"), ("br;q=0.1, gzip", "gzip")] {
        let answer = edge.get("/big.json", &[("Accept-Encoding", accept)]).await;
        assert_eq!((answer.header("content-encoding"), answer.complete), (Some(coding), true), "{}", answer.head);
        assert!(answer.body.len() < plain.body.len() / 10);
        assert_eq!(unpacked(coding, &answer.body), plain.body, "{accept}");
        assert!(answer.header("etag").unwrap().starts_with("W/"), "it is not the same byte for byte");
        assert_eq!((answer.header("accept-ranges"), answer.header("content-length")), (None, None), "{}", answer.head);
    }
    for (path, headers) in [("/a%20b.txt", vec![]), ("/big.json", vec![("Range", "bytes=0-5000")]), ("/app.js", vec![])] {
        let answer = edge.get(path, &[&headers[..], &[("Accept-Encoding", "zstd")]].concat()).await;
        assert_eq!(answer.header("content-encoding"), None, "{path}: {}", answer.head);
        assert!(answer.complete);
    }
    // What comes compressed stays so.
    assert_eq!(edge.get("/app.js", &[("Accept-Encoding", "gzip, zstd")]).await.text(), "as gzip");
    let head = edge.request("HEAD", "/big.json", &[("Accept-Encoding", "gzip")], b"").await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    // What with, from which length on, and what.
    let edge = start(&dir, ", compression: { enabled: true, codings: [gzip], min_length: 10B, types: [text/plain] }").await;
    for (path, coding) in [("/a%20b.txt", Some("gzip")), ("/big.json", None)] {
        let answer = edge.get(path, &[("Accept-Encoding", "zstd, br, gzip")]).await;
        assert_eq!(answer.header("content-encoding"), coding, "{path}: {}", answer.head);
    }
    // Off unless it is turned on.
    let edge = start(&dir, "").await;
    assert_eq!(edge.get("/big.json", &[("Accept-Encoding", "gzip")]).await.header("content-encoding"), None);
}

/// The store has one object for all, and clients get what they can read.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_is_compressed_as_well() {
    let body = "word ".repeat(2_000);
    let answer = format!(
        "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nETag: \"v\"\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        body.len()
    );
    let origin = Origin::scripted(vec![Act::Send(answer.into_bytes())]).await;
    let edge = Portolan::start(&format!(
        "regions: {{ a: {{ upstreams: [\"{}\"] }} }}\nroutes: [{{ name: all, cache: {{ enabled: true }}, compression: {{ enabled: true }} }}]\n",
        origin.url()
    ))
    .await;
    for (accept, coding) in [("gzip", Some("gzip")), ("identity", None), ("br", Some("br")), ("gzip", Some("gzip"))] {
        let answer = edge.get("/", &[("Accept-Encoding", accept)]).await;
        assert_eq!(answer.header("content-encoding"), coding, "{}", answer.head);
        let read = coding.map_or(answer.body.clone(), |coding| unpacked(coding, &answer.body));
        assert_eq!(String::from_utf8(read).unwrap(), body);
    }
    let known = edge.get("/", &[("Accept-Encoding", "gzip"), ("If-None-Match", "W/\"v\"")]).await;
    assert_eq!(known.status, 304);
    assert_eq!(origin.count(), 1);
}
