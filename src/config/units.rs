//! Scalars of the configuration, each parsed once into a type that cannot be wrong.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A scalar written as text: its JSON Schema `format`, and what that means to a reader.
macro_rules! scalar {
    ($type:ident, $format:literal, $example:literal) => {
        impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                $format.into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "format": $format, "examples": [$example] })
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                Cow::<str>::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// Checks `text` against a `format` of the schema; the error says what was expected.
pub fn check_format(format: &str, text: &str) -> Result<(), String> {
    match format {
        "duration" => text.parse::<Span>().map(drop),
        "listen-address" => text.parse::<Address>().map(drop),
        "network" => text.parse::<Network>().map(drop),
        "upstream-url" => text.parse::<UpstreamUrl>().map(drop),
        "host" => text.parse::<HostPattern>().map(drop),
        "path-prefix" => text.parse::<PathPrefix>().map(drop),
        "size" => text.parse::<Size>().map(drop),
        "country" => text.parse::<Country>().map(drop),
        "area" => text.parse::<Area>().map(drop),
        "continent" => text.parse::<Continent>().map(drop),
        "status-class" => text.parse::<StatusClass>().map(drop),
        "cookie-name" => text.parse::<CookieName>().map(drop),
        "header-name" => text.parse::<HeaderName>().map(drop),
        "authority" => text.parse::<Authority>().map(drop),
        "label" => text.parse::<Name>().map(drop),
        "log-format" => text.parse::<LogFormat>().map(drop),
        _ => Ok(()),
    }
}

/// A duration such as `250ms`, `5s`, `1h` or `1m30s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);
scalar!(Span, "duration", "5s");

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "expected a duration such as `250ms`, `5s` or `1h`".to_owned();
        let mut total = Duration::ZERO;
        let mut rest = text;
        if text.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
            let (number, tail) = rest.split_at(digits);
            let unit = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit);
            let number: u64 = number.parse().map_err(|_| wrong())?;
            let milliseconds: u64 = match unit {
                "ms" => 1,
                "s" => 1_000,
                "m" => 60_000,
                "h" => 3_600_000,
                "d" => 86_400_000,
                _ => return Err(wrong()),
            };
            let part = number.checked_mul(milliseconds).ok_or_else(wrong)?;
            total = total.checked_add(Duration::from_millis(part)).ok_or_else(wrong)?;
            rest = tail;
        }
        // Past a century every clock we add it to could overflow.
        if total > Duration::from_secs(100 * 365 * 86_400) {
            return Err("longer than a century".to_owned());
        }
        Ok(Self(total))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        match ms {
            0 => f.write_str("0s"),
            _ if ms.is_multiple_of(3_600_000) => write!(f, "{}h", ms / 3_600_000),
            _ if ms.is_multiple_of(60_000) => write!(f, "{}m", ms / 60_000),
            _ if ms.is_multiple_of(1_000) => write!(f, "{}s", ms / 1_000),
            _ => write!(f, "{ms}ms"),
        }
    }
}

/// A number of bytes, such as `64KiB`; at most 16 EiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);
scalar!(Size, "size", "64KiB");

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "expected a size such as `512B`, `64KiB` or `10GiB`".to_owned();
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?);
        let bits = match unit {
            "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "TiB" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << bits).map(Self).ok_or_else(wrong)
    }
}

/// An address to listen on: an IP address and a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub SocketAddr);
scalar!(Address, "listen-address", "0.0.0.0:80");

impl FromStr for Address {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| "expected an IP address and a port, such as `127.0.0.1:8080` or `[::]:80`".to_owned())
    }
}

/// A network in CIDR notation, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network(pub ipnet::IpNet);
scalar!(Network, "network", "192.0.2.0/24");

impl FromStr for Network {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.parse()
            .or_else(|_| text.parse::<IpAddr>().map(ipnet::IpNet::from))
            .map(|net| Self(net.trunc()))
            .map_err(|_| "expected a network such as `10.0.0.0/8` or `2001:db8::/32`, or one address".to_owned())
    }
}

/// The scheme of an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// HTTP/1.1 in the clear.
    Http,
    /// HTTP/1.1 or HTTP/2 (by ALPN) over verified TLS.
    Https,
    /// HTTP/2 in the clear, by prior knowledge (RFC 9113, section 3.3).
    H2c,
    /// None: files of this machine, under the path in place of a host.
    Files,
}

/// Where an upstream listens: scheme, host and port, or a socket in the file system; nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UpstreamUrl {
    /// The protocol.
    pub scheme: Scheme,
    /// A DNS name, lower case, an IP address without brackets, or the absolute path of a Unix socket.
    pub host: String,
    /// The port; 80 for http and h2c, 443 for https unless given; 0 where it has none.
    pub port: u16,
}
scalar!(UpstreamUrl, "upstream-url", "http://127.0.0.1:9101");

impl UpstreamUrl {
    /// The host as an address, if it is one.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    /// The path of the Unix socket, if it is one.
    pub fn socket(&self) -> Option<&str> {
        self.host.starts_with('/').then_some(self.host.as_str())
    }

    /// Is it a service, whose hosts and ports SRV records tell (RFC 2782: `_service._proto.name`)?
    pub fn is_service(&self) -> bool {
        self.host.starts_with('_')
    }

    /// Does DNS have to be asked where it is?
    pub fn needs_dns(&self) -> bool {
        self.ip().is_none() && self.socket().is_none()
    }
}

impl FromStr for UpstreamUrl {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = "expected `http://host:port`, `https://host:port`, `h2c://host:port` or `unix:/path`";
        if let Some(path) = text.strip_prefix("unix:") {
            // sun_path of sockaddr_un has 108 bytes, the last of which is zero.
            return match path.starts_with('/') && path.len() < 108 && !path.contains('\0') {
                true => Ok(Self { scheme: Scheme::Http, host: path.to_owned(), port: 0 }),
                false => {
                    Err("expected the absolute path of a socket, at most 107 bytes, such as `unix:/run/app.sock`".to_owned())
                }
            };
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| wrong.to_owned())?;
        let (scheme, default_port) = match scheme.to_ascii_lowercase().as_str() {
            "http" => (Scheme::Http, 80),
            "https" => (Scheme::Https, 443),
            "h2c" => (Scheme::H2c, 80),
            other => return Err(format!("{wrong}; the scheme `{other}` is not one of these")),
        };
        // The URL crate knows hosts (IDNA, IPv6 brackets); only special schemes get that treatment.
        let url = url::Url::parse(&format!("http://{rest}")).map_err(|e| format!("{wrong}: {e}"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("an upstream takes no user or password".to_owned());
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(format!("{wrong}: an upstream takes no path"));
        }
        let host = match url.host() {
            Some(url::Host::Domain(name)) => name.to_owned(),
            Some(url::Host::Ipv4(ip)) => ip.to_string(),
            Some(url::Host::Ipv6(ip)) => ip.to_string(),
            None => return Err(wrong.to_owned()),
        };
        // `http` hides its default port, so 80 may have been written after https://.
        let port = match url.port() {
            Some(port) => port,
            None if rest.trim_end_matches('/').ends_with(":80") => 80,
            None => default_port,
        };
        if port == 0 {
            return Err("port 0 cannot be connected to".to_owned());
        }
        Ok(Self { scheme, host, port })
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
            Scheme::H2c => "h2c",
            Scheme::Files => "files",
        };
        let port = self.port;
        if let Some(path) = self.socket() {
            return write!(f, "{}:{path}", if self.scheme == Scheme::Files { "files" } else { "unix" });
        }
        match self.ip() {
            Some(IpAddr::V6(ip)) => write!(f, "{scheme}://[{ip}]:{port}"),
            _ => write!(f, "{scheme}://{}:{port}", self.host),
        }
    }
}

/// A host to match: `api.example.com`, `*.example.com` (any depth below it) or `*` (any).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostPattern {
    /// Every host.
    Any,
    /// This name or address, lower case.
    Exact(String),
    /// Every name that ends in a dot and this.
    Below(String),
}
scalar!(HostPattern, "host", "*.example.com");

impl FromStr for HostPattern {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let (below, name) = match text.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, text),
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let address = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(&name);
        let is_name = !name.is_empty()
            && name.len() <= 253
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && name.split('.').all(|l| !l.is_empty() && l.len() <= 63);
        match (below, address.parse::<IpAddr>().is_ok() || is_name) {
            (_, false) => Err("expected a host without a port, such as `api.example.com`, `*.example.com` or `*`".to_owned()),
            (true, true) => Ok(Self::Below(name)),
            (false, true) => Ok(Self::Exact(name)),
        }
    }
}

/// A path prefix: begins with `/`, has no query.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PathPrefix(pub String);
scalar!(PathPrefix, "path-prefix", "/api/");

impl FromStr for PathPrefix {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let ok = text.starts_with('/') && text.bytes().all(|b| b.is_ascii_graphic() && b"?#*".iter().all(|x| *x != b));
        if ok {
            Ok(Self(text.to_owned()))
        } else {
            Err("expected a path prefix such as `/api/`, without wildcards or a query".to_owned())
        }
    }
}

/// A country by its two-letter code of ISO 3166-1, upper case; `XX` is "unknown".
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Country([u8; 2]);
scalar!(Country, "country", "GB");

impl Country {
    /// No country is known.
    pub const UNKNOWN: Self = Self(*b"XX");

    /// From the text of a database: two ASCII letters, any case, otherwise nothing.
    pub fn from_database(text: &str) -> Option<Self> {
        match text.as_bytes() {
            [a, b] if a.is_ascii_alphabetic() && b.is_ascii_alphanumeric() => {
                Some(Self([a.to_ascii_uppercase(), b.to_ascii_uppercase()]))
            }
            _ => None,
        }
    }

    /// The code as text.
    pub fn as_str(&self) -> &str {
        // The bytes are ASCII by construction, so the fallback is never seen.
        std::str::from_utf8(&self.0).unwrap_or("XX")
    }

    /// Is the code assigned in ISO 3166-1 (list of 2024), or `XX`, or `XK` (Kosovo, user-assigned but in every database)?
    pub fn is_assigned(&self) -> bool {
        ASSIGNED.split(' ').any(|code| code.as_bytes() == self.0)
    }
}

impl FromStr for Country {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let country = Self::from_database(text).ok_or("expected a country's two-letter code, such as `GB`")?;
        if country.as_str() != text {
            return Err(format!("country codes are upper case: `{}`", country.as_str()));
        }
        match text {
            "UK" => Err("the United Kingdom's code is `GB`".to_owned()),
            "EU" => Err("`EU` is no country; Europe is `continents: { EU: … }`".to_owned()),
            _ => Ok(country),
        }
    }
}

impl fmt::Debug for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Country {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

/// A country, or one of its subdivisions by the code of ISO 3166-2 (`US-CA`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Area {
    /// The country.
    pub country: Country,
    /// The subdivision within it.
    pub subdivision: Option<Subdivision>,
}
scalar!(Area, "area", "GB");

/// What stands behind the dash of an ISO 3166-2 code: one to three letters or digits, upper case.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subdivision([u8; 3]);

impl Subdivision {
    /// From the text of a database; nothing if it is no such code.
    pub fn from_database(text: &str) -> Option<Self> {
        let ok = (1..=3).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric());
        let mut code = [0; 3];
        code.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from.to_ascii_uppercase());
        ok.then_some(Self(code))
    }

    /// The code as text.
    pub fn as_str(&self) -> &str {
        let len = self.0.iter().position(|b| *b == 0).unwrap_or(self.0.len());
        // ASCII by construction, so neither fallback is ever seen.
        std::str::from_utf8(self.0.get(..len).unwrap_or_default()).unwrap_or_default()
    }
}

impl fmt::Debug for Subdivision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Area {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let Some((country, subdivision)) = text.split_once('-') else {
            return Ok(Self { country: text.parse()?, subdivision: None });
        };
        let code = Subdivision::from_database(subdivision).filter(|s| s.as_str() == subdivision);
        let code = code.ok_or("expected a country such as `GB`, or a subdivision such as `US-CA` (ISO 3166-2)")?;
        Ok(Self { country: country.parse()?, subdivision: Some(code) })
    }
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.subdivision {
            Some(subdivision) => write!(f, "{}-{}", self.country, subdivision.as_str()),
            None => write!(f, "{}", self.country),
        }
    }
}

/// A continent, by the two letters that GeoNames and MaxMind use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Continent {
    /// Africa.
    AF,
    /// Antarctica.
    AN,
    /// Asia.
    AS,
    /// Europe.
    EU,
    /// North America, with Central America and the Caribbean.
    NA,
    /// Oceania.
    OC,
    /// South America.
    SA,
}
scalar!(Continent, "continent", "EU");

impl FromStr for Continent {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        use Continent::{AF, AN, AS, EU, NA, OC, SA};
        let all = [AF, AN, AS, EU, NA, OC, SA];
        let found = all.into_iter().find(|c| c.to_string() == text);
        found.ok_or_else(|| "expected a continent: AF, AN, AS, EU, NA, OC or SA".to_owned())
    }
}

impl Continent {
    /// The code as text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AF => "AF",
            Self::AN => "AN",
            Self::AS => "AS",
            Self::EU => "EU",
            Self::NA => "NA",
            Self::OC => "OC",
            Self::SA => "SA",
        }
    }
}

impl fmt::Display for Continent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Statuses by their first digit (`2xx`) or as a range (`200-399`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StatusClass(pub u16, pub u16);
scalar!(StatusClass, "status-class", "2xx");

impl FromStr for StatusClass {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "expected statuses such as `2xx` or `200-399`".to_owned();
        if let Some(digit) = text.strip_suffix("xx") {
            let digit: u16 = digit.parse().ok().filter(|d| (1..=5).contains(d)).ok_or_else(wrong)?;
            return Ok(Self(digit * 100, digit * 100 + 99));
        }
        let (low, high) = text.split_once('-').ok_or_else(wrong)?;
        let number = |text: &str| text.parse().ok().filter(|n| (100..=599).contains(n)).ok_or_else(wrong);
        let (low, high) = (number(low)?, number(high)?);
        if low <= high { Ok(Self(low, high)) } else { Err(wrong()) }
    }
}

/// A cookie's name (RFC 6265: a token).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CookieName(pub String);
scalar!(CookieName, "cookie-name", "session");

impl FromStr for CookieName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        // A header's name is a token too, but its case does not matter.
        match text.len() <= 64 && text.parse::<http::HeaderName>().is_ok() {
            true => Ok(Self(text.to_owned())),
            false => Err("expected a cookie's name, such as `session`".to_owned()),
        }
    }
}

const ASSIGNED: &str = "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ \
CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH \
GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB \
LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM \
PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG \
TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS XK XX YE YT ZA ZM ZW";

/// The name of a header field.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HeaderName(pub http::HeaderName);
scalar!(HeaderName, "header-name", "X-Forwarded-For");

impl FromStr for HeaderName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| "expected a header's name, such as `X-Forwarded-For`".to_owned())
    }
}

/// What goes into `Host`: a name or address, with a port if need be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Authority(pub String);
scalar!(Authority, "authority", "origin.example.com");

impl FromStr for Authority {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<http::uri::Authority>() {
            Ok(a) if !a.as_str().contains('@') => Ok(Self(text.to_owned())),
            _ => Err("expected a host, such as `origin.example.com` or `origin.example.com:8443`".to_owned()),
        }
    }
}

/// The name of a region or route: it is a metric label, a header value and a command-line argument.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Name(pub String);
scalar!(Name, "label", "eu_west");

impl FromStr for Name {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let ok = (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
        if ok { Ok(Self(text.to_owned())) } else { Err("expected a name of 1 to 64 letters, digits, `_`, `-` or `.`".to_owned()) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a line of the access log looks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// An object with everything that is known.
    #[default]
    Json,
    /// A text.
    Text(Vec<super::access_log::Piece>),
}
scalar!(LogFormat, "log-format", "combined");

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct Secret(String);

impl Secret {
    /// The text itself, to be compared and nothing else.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [("250ms", 250), ("5s", 5_000), ("1h", 3_600_000), ("1m30s", 90_000), ("0s", 0), ("2d", 172_800_000)] {
            assert_eq!(text.parse::<Span>().map(|s| s.0.as_millis()), Ok(ms), "{text}");
        }
        for text in ["", "5", "s", "5 s", "-5s", "1.5s", "5x", "99999999999999999999s", "18446744073709551615d", "9999999d"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    #[test]
    fn upstream_urls() {
        for (text, shown) in [
            ("http://127.0.0.1:9101", "http://127.0.0.1:9101"),
            ("https://Origin.Example.com", "https://origin.example.com:443"),
            ("https://origin.example.com:80", "https://origin.example.com:80"),
            ("h2c://[::1]:50051/", "h2c://[::1]:50051"),
            ("unix:/run/app.sock", "unix:/run/app.sock"),
            ("http://_api._tcp.example.com", "http://_api._tcp.example.com:80"),
        ] {
            assert_eq!(text.parse::<UpstreamUrl>().map(|u| u.to_string()), Ok(shown.to_owned()), "{text}");
        }
        for text in [
            "127.0.0.1:80",
            "unix:app.sock",
            "unix:",
            "ftp://a",
            "http://",
            "http://a/b",
            "http://u:p@a",
            "http://a:0",
            "http://a?b",
            "http://a:99999",
        ] {
            assert!(text.parse::<UpstreamUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn countries() {
        assert_eq!("GB".parse::<Country>().map(|c| c.is_assigned()), Ok(true));
        assert_eq!("ZZ".parse::<Country>().map(|c| c.is_assigned()), Ok(false));
        for text in ["gb", "UK", "EU", "GBR", "", "G", "G!", "é"] {
            assert!(text.parse::<Country>().is_err(), "{text}");
        }
    }

    #[test]
    fn areas_and_statuses() {
        for text in ["GB", "US-CA", "GB-ENG", "FR-2A"] {
            assert_eq!(text.parse::<Area>().map(|a| a.to_string()), Ok(text.to_owned()));
        }
        for text in ["US-", "US-ca", "us-CA", "US-CALI", "US-C A", "UK-ENG", "-CA"] {
            assert!(text.parse::<Area>().is_err(), "{text}");
        }
        assert_eq!("2xx".parse(), Ok(StatusClass(200, 299)));
        assert_eq!("200-399".parse(), Ok(StatusClass(200, 399)));
        for text in ["", "xx", "6xx", "399-200", "200", "2x", "99-200"] {
            assert!(text.parse::<StatusClass>().is_err(), "{text}");
        }
    }

    #[test]
    fn hosts_and_paths() {
        assert_eq!("*.Example.com".parse(), Ok(HostPattern::Below("example.com".into())));
        assert_eq!("a.example.com.".parse(), Ok(HostPattern::Exact("a.example.com".into())));
        for text in ["", "a:80", "*a.com", "a..b", "a b", "*.", "http://a"] {
            assert!(text.parse::<HostPattern>().is_err(), "{text}");
        }
        for text in ["", "api", "/a?b", "/a*", "/a b"] {
            assert!(text.parse::<PathPrefix>().is_err(), "{text}");
        }
    }
}
