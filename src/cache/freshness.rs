//! May a response be stored, for how long is it fresh, and for how long may it be served stale (RFC 9111,
//! sections 3 and 4; RFC 5861; RFC 9213).

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, header};

use super::fields::{Directives, FOREVER, age, date_field};
use super::targeted;
use super::vary;

/// A request and its response, as far as storing asks for it.
#[derive(Debug, Clone, Copy)]
pub struct Exchange<'a> {
    /// When the request was sent.
    pub asked: SystemTime,
    /// When the response's header was there.
    pub now: SystemTime,
    /// The request carried `Authorization`.
    pub authorized: bool,
    /// The response's status.
    pub status: u16,
    /// The response's headers.
    pub headers: &'a HeaderMap,
}

/// What the operator wants of a response.
#[derive(Debug, Clone, Copy)]
pub struct Terms<'a> {
    /// Fields that take the place of `Cache-Control`, the most specific first.
    pub targeted: &'a [HeaderName],
    /// A response without explicit freshness may be fresh for a part of its age.
    pub heuristic: bool,
    /// Responses that set cookies are stored, too.
    pub cookies: bool,
    /// How long a response with this status is fresh, whatever the origin says; or only where it says nothing.
    pub edge: Option<Edge>,
    /// `stale-while-revalidate` where the origin says nothing.
    pub while_revalidate: Duration,
    /// `stale-if-error` where the origin says nothing.
    pub if_error: Duration,
}

/// The freshness that a rule gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    /// For how long.
    pub ttl: Duration,
    /// Also where the origin says something.
    pub overrides: bool,
}

/// What made it fresh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A rule of the operator's.
    Rule,
    /// A targeted field.
    Targeted,
    /// `s-maxage`.
    SMaxage,
    /// `max-age`.
    MaxAge,
    /// `Expires`.
    Expires,
    /// A tenth of the time since it was modified.
    Heuristic,
    /// Nothing: it is asked for again each time.
    Nothing,
}

impl Source {
    /// As explanations call it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Rule => "rule",
            Self::Targeted => "targeted field",
            Self::SMaxage => "s-maxage",
            Self::MaxAge => "max-age",
            Self::Expires => "Expires",
            Self::Heuristic => "Last-Modified",
            Self::Nothing => "nothing",
        }
    }
}

/// How a response may be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// When it was made, as far as it tells: `Age` counts from here.
    pub epoch: SystemTime,
    /// Until then it is fresh.
    pub fresh_until: SystemTime,
    /// So long after it may be served while another is fetched.
    pub while_revalidate: Duration,
    /// So long after it may be served where the origin fails.
    pub if_error: Duration,
    /// What made it fresh.
    pub source: Source,
    /// Fields that are not stored.
    pub unstored: Vec<HeaderName>,
}

/// Why a response is not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhyNot {
    /// A status that no cache may keep, or 206: a part, not the whole.
    Status,
    /// `no-store`.
    NoStore,
    /// `private`.
    Private,
    /// The request was authorized, and the response does not say that others may have it.
    Authorization,
    /// It sets a cookie.
    SetCookie,
    /// `Vary: *`.
    VaryAll,
    /// Neither fresh nor with anything to ask for it again.
    NotFresh,
    /// `must-understand`, and this is not understood.
    NotUnderstood,
    /// A rule.
    Rule,
    /// The request's `no-store`.
    Request,
    /// The origin is sick, and what is stored is not.
    Error,
    /// Longer than there is room.
    TooLarge,
}

impl WhyNot {
    /// All, for tables of metrics and the engine.
    pub const ALL: [Self; 12] = [
        Self::Status,
        Self::NoStore,
        Self::Private,
        Self::Authorization,
        Self::SetCookie,
        Self::VaryAll,
        Self::NotFresh,
        Self::NotUnderstood,
        Self::Rule,
        Self::Request,
        Self::Error,
        Self::TooLarge,
    ];

    /// As `Cache-Status` and explanations call it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::NoStore => "no-store",
            Self::Private => "private",
            Self::Authorization => "authorization",
            Self::SetCookie => "set-cookie",
            Self::VaryAll => "vary-all",
            Self::NotFresh => "not-fresh",
            Self::NotUnderstood => "must-understand",
            Self::Rule => "rule",
            Self::Request => "request-no-store",
            Self::Error => "error",
            Self::TooLarge => "too-large",
        }
    }

    /// Will the next response to any such request be the same in this? Then it need not wait for another one's.
    pub fn lasts(self) -> bool {
        match self {
            Self::NoStore
            | Self::Private
            | Self::SetCookie
            | Self::VaryAll
            | Self::NotFresh
            | Self::NotUnderstood
            | Self::Rule
            | Self::TooLarge => true,
            // A stranger must not be able to make a page uncacheable for all, nor a bad minute of the origin's.
            Self::Status | Self::Authorization | Self::Request | Self::Error => false,
        }
    }
}

/// Statuses whose responses may be fresh without saying so (RFC 9110, section 15.1).
fn by_default(status: u16) -> bool {
    matches!(status, 200 | 203 | 204 | 300 | 301 | 308 | 404 | 405 | 410 | 414 | 501)
}

/// Statuses that are understood: those of RFC 9110 that a shared cache can keep.
fn understood(status: u16) -> bool {
    matches!(status, 200..=204 | 300..=303 | 307 | 308 | 400..=418 | 421 | 422 | 426 | 428 | 429 | 431 | 451 | 500..=505)
}

/// May it be stored, and how? A pure function of what it is given.
pub fn judge(exchange: Exchange<'_>, terms: Terms<'_>) -> Result<Lease, WhyNot> {
    let Exchange { asked, now, authorized, status, headers } = exchange;
    // 206 is a part (section 3.3), 304 no response of its own (section 4.3.4).
    if status < 200 || matches!(status, 206 | 304 | 416) {
        return Err(WhyNot::Status);
    }
    if headers.contains_key(header::SET_COOKIE) && !terms.cookies {
        return Err(WhyNot::SetCookie);
    }
    // Section 4.1: it matches no request.
    if vary::is_all(headers) {
        return Err(WhyNot::VaryAll);
    }
    let targeted = targeted::directives(headers, terms.targeted);
    let (is_targeted, said) = match targeted {
        Some((_, directives)) => (true, directives),
        None => (false, Directives::of(headers)),
    };
    let rule = terms.edge.filter(|edge| edge.overrides);
    if rule.is_none() {
        // Section 5.2.2.3: who understands the status may pass over `no-store`.
        if said.must_understand && !understood(status) {
            return Err(WhyNot::NotUnderstood);
        }
        if said.no_store && !said.must_understand {
            return Err(WhyNot::NoStore);
        }
        if said.private {
            return Err(WhyNot::Private);
        }
    }
    // Section 3.5; who asked with a password is nobody that a rule speaks for.
    if authorized && !(said.public || said.s_maxage.is_some() || said.must_revalidate) {
        return Err(WhyNot::Authorization);
    }
    let date = date_field(headers, &header::DATE).flatten();
    let modified = date_field(headers, &header::LAST_MODIFIED).flatten();
    let explicit = explicit(&said, is_targeted, headers, date.unwrap_or(now));
    let (lifetime, source) = match (rule, explicit, terms.edge) {
        (Some(edge), ..) => (edge.ttl, Source::Rule),
        (None, Some(found), _) => found,
        (None, None, Some(edge)) => (edge.ttl, Source::Rule),
        // Section 4.2.2: a tenth of the time since it changed, at most a day.
        (None, None, None) => match modified.filter(|_| terms.heuristic && (by_default(status) || said.public)) {
            Some(modified) => {
                let unchanged = date.unwrap_or(now).duration_since(modified).unwrap_or_default();
                ((unchanged / 10).min(Duration::from_secs(86_400)), Source::Heuristic)
            }
            None => (Duration::ZERO, Source::Nothing),
        },
    };
    if source == Source::Rule && lifetime.is_zero() {
        return Err(WhyNot::Rule);
    }
    let no_cache = said.no_cache && rule.is_none();
    let lifetime = if no_cache { Duration::ZERO } else { lifetime };
    // A rule's time begins here; the origin's began when the response was made (section 4.2.3).
    let initial = if source == Source::Rule { Duration::ZERO } else { initial_age(headers, date, asked, now) };
    let epoch = now.checked_sub(initial).unwrap_or(SystemTime::UNIX_EPOCH);
    let fresh_until = epoch.checked_add(lifetime).unwrap_or(now);
    let validator = headers.contains_key(header::ETAG) || modified.is_some();
    let (while_revalidate, if_error) = staleness(&said, no_cache, &terms);
    // What is stale already is of use if it can be asked for again by its name, or be served while it is.
    let explicit = source != Source::Nothing;
    let useful = (validator && (explicit || by_default(status))) || (explicit && !while_revalidate.is_zero());
    if fresh_until <= now && !useful {
        return Err(WhyNot::NotFresh);
    }
    let mut unstored = said.unstored;
    // Without these nobody could tell what is stored from something else.
    const NEEDED: [HeaderName; 4] = [header::VARY, header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::DATE];
    unstored.retain(|name| rule.is_none() && !NEEDED.contains(name));
    Ok(Lease { epoch, fresh_until, while_revalidate, if_error, source, unstored })
}

/// What the origin says of freshness (section 4.2.1).
fn explicit(said: &Directives, is_targeted: bool, headers: &HeaderMap, made: SystemTime) -> Option<(Duration, Source)> {
    let named = |source| if is_targeted { Source::Targeted } else { source };
    if let Some(seconds) = said.s_maxage {
        return Some((Duration::from_secs(seconds), named(Source::SMaxage)));
    }
    if let Some(seconds) = said.max_age {
        return Some((Duration::from_secs(seconds), named(Source::MaxAge)));
    }
    if is_targeted {
        return None;
    }
    // Section 5.3: against the origin's own clock; what is no date is in the past.
    let expires = date_field(headers, &header::EXPIRES)?;
    let lifetime = expires.and_then(|expires| expires.duration_since(made).ok()).unwrap_or_default();
    Some((lifetime.min(Duration::from_secs(FOREVER)), Source::Expires))
}

/// `corrected_initial_age` (section 4.2.3).
fn initial_age(headers: &HeaderMap, date: Option<SystemTime>, asked: SystemTime, now: SystemTime) -> Duration {
    let apparent = date.and_then(|date| now.duration_since(date).ok()).unwrap_or_default();
    let delay = now.duration_since(asked).unwrap_or_default();
    let said = age(headers).map_or(Duration::ZERO, Duration::from_secs);
    // Dates have whole seconds: what is less than one is no age.
    let apparent = if apparent < Duration::from_secs(1) { Duration::ZERO } else { apparent };
    apparent.max(said.saturating_add(delay))
}

/// For how long it may be served stale: while it is fetched again, and where the origin fails.
fn staleness(said: &Directives, no_cache: bool, terms: &Terms<'_>) -> (Duration, Duration) {
    // Section 4.2.4; a rule that overrides has no say in what is dangerous.
    if no_cache || said.must_revalidate || said.proxy_revalidate {
        return (Duration::ZERO, Duration::ZERO);
    }
    // Section 5.2.2.10: `s-maxage` means `proxy-revalidate`; but who writes it beside `stale-…` means both.
    let otherwise = |default: Duration| if said.s_maxage.is_some() { Duration::ZERO } else { default };
    let of = |seconds: Option<u64>, default| seconds.map_or_else(|| otherwise(default), Duration::from_secs);
    (of(said.stale_while_revalidate, terms.while_revalidate), of(said.stale_if_error, terms.if_error))
}
