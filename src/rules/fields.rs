//! The fields: names, types, and from which phase on each is known.

use super::value::Type::{self, Bool, Bytes, Int, Ip};
use super::value::{TEXT_LISTS, TEXT_MAP, TEXTS};

/// When an expression runs. A phase knows what every earlier one knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The request's header is read; no route is chosen yet.
    Request,
    /// Its route is known.
    Routed,
    /// Its body can be asked for.
    Body,
    /// A response's header is there.
    Response,
}

/// What a field costs beyond the request's header, as bits of [`super::Uses`].
pub mod needs {
    /// Nothing.
    pub const NOTHING: u8 = 0;
    /// The request's body.
    pub const BODY: u8 = 1;
    /// What is known of the client's doings.
    pub const STANDING: u8 = 2;
}

macro_rules! fields {
    ($($variant:ident $name:literal $type:expr, $phase:ident, $needs:ident;)*) => {
        /// A field.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Field {
            $(#[doc = $name] $variant,)*
        }
        /// Every field with its name, type, first phase and needs.
        pub const FIELDS: &[(&str, Field, Type, Phase, u8)] =
            &[$(($name, Field::$variant, $type, Phase::$phase, needs::$needs),)*];
    };
}

fields! {
    Cookie "http.cookie" Bytes, Request, NOTHING;
    Host "http.host" Bytes, Request, NOTHING;
    Referer "http.referer" Bytes, Request, NOTHING;
    UserAgent "http.user_agent" Bytes, Request, NOTHING;
    ForwardedFor "http.x_forwarded_for" Bytes, Request, NOTHING;
    Languages "http.request.accepted_languages" TEXTS, Request, NOTHING;
    Cookies "http.request.cookies" TEXT_MAP, Request, NOTHING;
    FullUri "http.request.full_uri" Bytes, Request, NOTHING;
    Headers "http.request.headers" TEXT_MAP, Request, NOTHING;
    HeaderNames "http.request.headers.names" TEXTS, Request, NOTHING;
    HeaderValues "http.request.headers.values" TEXTS, Request, NOTHING;
    HeadersTruncated "http.request.headers.truncated" Bool, Request, NOTHING;
    Method "http.request.method" Bytes, Request, NOTHING;
    Seconds "http.request.timestamp.sec" Int, Request, NOTHING;
    Milliseconds "http.request.timestamp.msec" Int, Request, NOTHING;
    Uri "http.request.uri" Bytes, Request, NOTHING;
    Args "http.request.uri.args" TEXT_MAP, Request, NOTHING;
    ArgNames "http.request.uri.args.names" TEXTS, Request, NOTHING;
    ArgValues "http.request.uri.args.values" TEXTS, Request, NOTHING;
    Path "http.request.uri.path" Bytes, Request, NOTHING;
    Extension "http.request.uri.path.extension" Bytes, Request, NOTHING;
    Query "http.request.uri.query" Bytes, Request, NOTHING;
    Version "http.request.version" Bytes, Request, NOTHING;
    RawFullUri "raw.http.request.full_uri" Bytes, Request, NOTHING;
    RawUri "raw.http.request.uri" Bytes, Request, NOTHING;
    RawArgs "raw.http.request.uri.args" TEXT_MAP, Request, NOTHING;
    RawArgNames "raw.http.request.uri.args.names" TEXTS, Request, NOTHING;
    RawArgValues "raw.http.request.uri.args.values" TEXTS, Request, NOTHING;
    RawPath "raw.http.request.uri.path" Bytes, Request, NOTHING;
    RawExtension "raw.http.request.uri.path.extension" Bytes, Request, NOTHING;
    RawQuery "raw.http.request.uri.query" Bytes, Request, NOTHING;

    Body "http.request.body.raw" Bytes, Body, BODY;
    BodySize "http.request.body.size" Int, Body, BODY;
    BodyTruncated "http.request.body.truncated" Bool, Body, BODY;
    BodyMime "http.request.body.mime" Bytes, Body, BODY;
    Form "http.request.body.form" TEXT_MAP, Body, BODY;
    FormNames "http.request.body.form.names" TEXTS, Body, BODY;
    FormValues "http.request.body.form.values" TEXTS, Body, BODY;
    Multipart "http.request.body.multipart" TEXT_MAP, Body, BODY;
    MultipartNames "http.request.body.multipart.names" TEXT_LISTS, Body, BODY;
    MultipartValues "http.request.body.multipart.values" TEXTS, Body, BODY;
    MultipartTypes "http.request.body.multipart.content_types" TEXT_LISTS, Body, BODY;
    MultipartDispositions "http.request.body.multipart.content_dispositions" TEXT_LISTS, Body, BODY;
    MultipartEncodings "http.request.body.multipart.content_transfer_encodings" TEXT_LISTS, Body, BODY;
    MultipartFiles "http.request.body.multipart.filenames" TEXT_LISTS, Body, BODY;

    Client "ip.src" Ip, Request, NOTHING;
    Asn "ip.src.asnum" Int, Request, NOTHING;
    City "ip.src.city" Bytes, Request, NOTHING;
    Continent "ip.src.continent" Bytes, Request, NOTHING;
    Country "ip.src.country" Bytes, Request, NOTHING;
    EuropeanUnion "ip.src.is_in_european_union" Bool, Request, NOTHING;
    Latitude "ip.src.lat" Bytes, Request, NOTHING;
    Longitude "ip.src.lon" Bytes, Request, NOTHING;
    MetroCode "ip.src.metro_code" Bytes, Request, NOTHING;
    PostalCode "ip.src.postal_code" Bytes, Request, NOTHING;
    Region "ip.src.region" Bytes, Request, NOTHING;
    RegionCode "ip.src.region_code" Bytes, Request, NOTHING;
    Subdivision1 "ip.src.subdivision_1_iso_code" Bytes, Request, NOTHING;
    Subdivision2 "ip.src.subdivision_2_iso_code" Bytes, Request, NOTHING;
    TimeZone "ip.src.timezone.name" Bytes, Request, NOTHING;

    Tls "ssl" Bool, Request, NOTHING;
    ThreatScore "cf.threat_score" Int, Request, STANDING;
    BotScore "cf.bot_management.score" Int, Request, STANDING;
    VerifiedBot "cf.bot_management.verified_bot" Bool, Request, NOTHING;
    StaticResource "cf.bot_management.static_resource" Bool, Request, NOTHING;
    ClientBot "cf.client.bot" Bool, Request, NOTHING;
    BotCategory "cf.verified_bot_category" Bytes, Request, NOTHING;
    RayId "cf.ray_id" Bytes, Request, NOTHING;
    RandomSeed "cf.random_seed" Bytes, Request, NOTHING;

    PortolanRoute "portolan.route" Bytes, Routed, NOTHING;
    PortolanRegion "portolan.region" Bytes, Response, NOTHING;
    Status "http.response.code" Int, Response, NOTHING;
    ResponseHeaders "http.response.headers" TEXT_MAP, Response, NOTHING;
    ResponseHeaderNames "http.response.headers.names" TEXTS, Response, NOTHING;
    ResponseHeaderValues "http.response.headers.values" TEXTS, Response, NOTHING;
    MediaType "http.response.content_type.media_type" Bytes, Response, NOTHING;
}

/// Old names of the same (Cloudflare keeps them too).
const ALIASES: [(&str, Field); 6] = [
    ("ip.geoip.asnum", Field::Asn),
    ("ip.geoip.continent", Field::Continent),
    ("ip.geoip.country", Field::Country),
    ("ip.geoip.is_in_european_union", Field::EuropeanUnion),
    ("ip.geoip.subdivision_1_iso_code", Field::Subdivision1),
    ("ip.geoip.subdivision_2_iso_code", Field::Subdivision2),
];

/// Fields of Cloudflare's that mean nothing here, by how they begin.
const ELSEWHERE: [&str; 14] = [
    "cf.api_gateway.",
    "cf.bot_management.",
    "cf.edge.",
    "cf.hostname.",
    "cf.llm.",
    "cf.response.",
    "cf.schema_validation.",
    "cf.timings.",
    "cf.tls_",
    "cf.waf.",
    "cf.worker.",
    "http.request.jwt.",
    "raw.http.response.",
    "tcp.",
];

/// What is known of a field by its name.
pub fn find(name: &str) -> Option<(Field, Type, Phase, u8)> {
    let aliased = ALIASES.iter().find(|(alias, _)| *alias == name).map(|(_, field)| *field);
    FIELDS
        .iter()
        .find(|(known, field, ..)| *known == name || aliased == Some(*field))
        .map(|(_, field, of, phase, needs)| (*field, *of, *phase, *needs))
}

/// Is it a field of Cloudflare's that this version does not have?
pub fn is_elsewhere(name: &str) -> bool {
    ELSEWHERE.iter().any(|prefix| name.starts_with(prefix))
}

/// Names of all fields, for "did you mean".
pub fn names() -> impl Iterator<Item = &'static str> {
    FIELDS.iter().map(|(name, ..)| *name)
}

impl Field {
    /// Is it text that stands in the request as it is, or is kept?
    pub fn is_plain(self) -> bool {
        use Field::{Country, Host, Method, Path, Query, RawPath, Referer, UserAgent, Version};
        matches!(self, Path | Host | UserAgent | Method | Query | Referer | Country | Version | RawPath)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        FIELDS.iter().find(|(_, field, ..)| *field == self).map_or("", |(name, ..)| name)
    }
}
