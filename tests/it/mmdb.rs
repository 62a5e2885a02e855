//! Writes small databases in MaxMind's format (MaxMind DB 2.0), in every layout that is read.

/// A database that has one record, `{ key: code }`, for every IPv4 address.
pub fn flat(key: &str, code: &str) -> Vec<u8> {
    database(&map(&[(key, text(code))]))
}

/// A database that has one record in MaxMind's own layout for every IPv4 address.
pub fn maxmind(outer: &str, code: &str) -> Vec<u8> {
    database(&map(&[(outer, map(&[("iso_code", text(code))]))]))
}

/// A city database that has one record for every IPv4 address.
pub fn city(country: &str, subdivision: &str, latitude: f64, longitude: f64) -> Vec<u8> {
    let subdivision = map(&[("iso_code", text(subdivision))]);
    // An array of one map: an extended type, number 11.
    let subdivisions = [vec![1, 11 - 7], subdivision].concat();
    let location = map(&[("latitude", double(latitude)), ("longitude", double(longitude))]);
    database(&map(&[("country", map(&[("iso_code", text(country))])), ("subdivisions", subdivisions), ("location", location)]))
}

/// A city database with everything that rules may ask, one record for every IPv4 address.
pub fn place() -> Vec<u8> {
    let named = |name: &str| map(&[("en", text(name))]);
    let subdivision = |code: &str, name: &str| map(&[("iso_code", text(code)), ("names", named(name))]);
    let subdivisions = [vec![2, 11 - 7], subdivision("CA", "California"), subdivision("075", "San Francisco")].concat();
    let location = map(&[
        ("latitude", double(37.7749)),
        ("longitude", double(-122.4194)),
        ("metro_code", short(807)),
        ("time_zone", text("America/Los_Angeles")),
    ]);
    database(&map(&[
        ("country", map(&[("iso_code", text("US"))])),
        ("subdivisions", subdivisions),
        ("location", location),
        ("city", map(&[("names", named("San Francisco"))])),
        ("postal", map(&[("code", text("94103"))])),
    ]))
}

/// A database of autonomous systems that knows one for every IPv4 address, in MaxMind's layout or a flat one.
pub fn asn(system: u32, flat: bool) -> Vec<u8> {
    match flat {
        true => database(&map(&[("asn", text(&format!("AS{system}")))])),
        false => database(&map(&[("autonomous_system_number", number(system))])),
    }
}

fn double(value: f64) -> Vec<u8> {
    let mut bytes = vec![0b011_01000];
    bytes.extend(value.to_be_bytes());
    bytes
}

fn database(record: &[u8]) -> Vec<u8> {
    // One node of two 24-bit records; a value of node count + 16 points to the start of the data.
    let mut bytes = vec![0, 0, 17, 0, 0, 17];
    bytes.extend([0; 16]);
    bytes.extend(record);
    bytes.extend(b"\xab\xcd\xefMaxMind.com");
    bytes.extend(map(&[
        ("binary_format_major_version", short(2)),
        ("binary_format_minor_version", short(0)),
        ("build_epoch", long(1_700_000_000)),
        ("database_type", text("Test-Country")),
        ("description", map(&[("en", text("test"))])),
        ("ip_version", short(4)),
        ("languages", vec![0b000_00000, 4]),
        ("node_count", number(1)),
        ("record_size", short(24)),
    ]));
    bytes
}

fn text(value: &str) -> Vec<u8> {
    assert!(value.len() < 29);
    let mut bytes = vec![0b010_00000 | value.len() as u8];
    bytes.extend(value.as_bytes());
    bytes
}

fn number(value: u32) -> Vec<u8> {
    let mut bytes = vec![0b110_00100];
    bytes.extend(value.to_be_bytes());
    bytes
}

fn short(value: u16) -> Vec<u8> {
    let mut bytes = vec![0b101_00010];
    bytes.extend(value.to_be_bytes());
    bytes
}

fn long(value: u64) -> Vec<u8> {
    // An extended type: its number, less seven, stands in a second byte.
    let mut bytes = vec![0b000_01000, 9 - 7];
    bytes.extend(value.to_be_bytes());
    bytes
}

fn map(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = vec![0b111_00000 | entries.len() as u8];
    for (key, value) in entries {
        bytes.extend(text(key));
        bytes.extend(value);
    }
    bytes
}

#[test]
fn every_layout_is_read() {
    use portolan::client::country::CountryDatabase;
    for (bytes, expected) in [
        (flat("country_code", "GB"), Some("GB")),
        (flat("country", "GB"), Some("GB")),
        (maxmind("country", "GB"), Some("GB")),
        (maxmind("registered_country", "GB"), Some("GB")),
        (flat("country_code", "gb"), Some("GB")),
        (flat("asn", "AS1"), None),
        (flat("country_code", "Britain"), None),
    ] {
        let database = CountryDatabase::new("test".into(), bytes).ok();
        let found = database.map(|d| d.lookup("81.2.69.160".parse().unwrap()).0.to_string());
        assert_eq!(found.as_deref(), expected);
    }
}

proptest::proptest! {
    /// No damage makes it panic.
    #[test]
    fn damage_is_an_error_or_an_answer(at in 0usize..400, with: u8, cut in 0usize..400) {
        use portolan::client::country::CountryDatabase;
        for mut bytes in [flat("country", "GB"), maxmind("country", "GB")] {
            let len = bytes.len();
            bytes[at % len] = with;
            bytes.truncate(len - cut % len);
            if let Ok(database) = CountryDatabase::new("test".into(), bytes) {
                for ip in ["81.2.69.160", "2a00::1", "::ffff:1.2.3.4"] {
                    database.lookup(ip.parse().unwrap());
                }
            }
        }
    }
}
