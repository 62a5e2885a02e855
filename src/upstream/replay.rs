//! Origin-directed replay: an upstream answers "send this request there instead".
//!
//! The header `fly-replay`, as Fly documents it, and `Portolan-Replay`, which means the same. Understood are
//! `region`, `elsewhere`, `state`, `timeout` and `fallback`. What names machines or applications is refused:
//! here are none.

use std::time::Duration;

use smallvec::SmallVec;

use crate::config::units::Span;
use crate::regions::RegionId;

/// Replays of one request; the next is a loop.
pub const MAX_REPLAYS: usize = 3;
/// A state that is longer is refused; it travels in a header.
const MAX_STATE: usize = 1024;

/// What an upstream asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Replay {
    /// Regions in order; none if any may be.
    pub regions: SmallVec<[RegionId; 4]>,
    /// Not the region that asks.
    pub elsewhere: bool,
    /// Handed to whoever gets the request, as it is.
    pub state: String,
    /// For finding somebody who takes it.
    pub timeout: Option<Duration>,
    /// What if nobody does.
    pub fallback: Option<Fallback>,
}

/// Who gets a request that nobody took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// The upstream that asked, and nobody else.
    ForceSelf,
    /// The upstream that asked, or another of its region.
    PreferSelf,
}

impl Replay {
    /// Reads the header's value; the error says what of it cannot be done. `id` knows regions by name.
    pub fn parse(text: &str, id: impl Fn(&str) -> Option<RegionId>) -> Result<Self, &'static str> {
        let (mut replay, mut any) = (Self::default(), false);
        for field in fields(text) {
            let (key, value) = field.split_once('=').unwrap_or((field, "true"));
            let value = value.trim().trim_matches('"');
            match key.trim().to_ascii_lowercase().as_str() {
                "region" => {
                    for name in value.split(',').map(str::trim).filter(|n| !n.is_empty()) {
                        if name == "any" {
                            any = true;
                            continue;
                        }
                        replay.regions.push(id(name).ok_or("the replay names a region that is not defined")?);
                    }
                }
                "elsewhere" => replay.elsewhere = value == "true",
                "state" if value.len() <= MAX_STATE => replay.state = value.to_owned(),
                "state" => return Err("the replay's state is longer than 1024 bytes"),
                "timeout" => {
                    let span = value.parse::<Span>().map_err(|_| "the replay's timeout is no duration")?;
                    replay.timeout = Some(span.0);
                }
                "fallback" => {
                    replay.fallback = Some(match value {
                        "force_self" => Fallback::ForceSelf,
                        "prefer_self" => Fallback::PreferSelf,
                        _ => return Err("the replay's fallback is neither force_self nor prefer_self"),
                    });
                }
                "instance" | "prefer_instance" | "app" => return Err("the replay names an instance or app, and there are none"),
                // What Fly adds later must not break what is understood.
                _ => {}
            }
        }
        match replay.regions.is_empty() && !replay.elsewhere && !any {
            true => Err("the replay names neither a region nor elsewhere=true"),
            false => Ok(replay),
        }
    }
}

/// Splits at `;` outside quotes.
fn fields(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |c| {
        quoted ^= c == '"';
        c == ';' && !quoted
    })
    .map(str::trim)
    .filter(|field| !field.is_empty())
}

/// `fly-replay-src`: who asked, and when.
pub fn source(instance: &str, region: &str, unix: Duration, state: &str) -> String {
    format!("instance={instance};region={region};t={};state={state}", unix.as_micros())
}

/// Why a replay fell back; the words of Fly's `fly-replay-failed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failed {
    /// Its timeout ran out.
    Timeout,
    /// Everybody was tried.
    RetriesExhausted,
    /// There was nobody to try.
    NoCandidate,
}

impl Failed {
    /// The word.
    pub fn label(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::RetriesExhausted => "retries_exhausted",
            Self::NoCandidate => "no_candidate",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Replay, &'static str> {
        Replay::parse(text, |name| ["us_east", "eu_west"].iter().position(|n| *n == name).map(|i| RegionId(i as u16)))
    }

    #[test]
    fn what_fly_documents() {
        let regions = |list: &[u16]| list.iter().map(|r| RegionId(*r)).collect();
        assert_eq!(parse("region=eu_west"), Ok(Replay { regions: regions(&[1]), ..Replay::default() }));
        assert_eq!(
            parse("region=\"eu_west,us_east\"; state=\"a;b=c\"; timeout=5s;fallback=force_self; later=x"),
            Ok(Replay {
                regions: regions(&[1, 0]),
                elsewhere: false,
                state: "a;b=c".to_owned(),
                timeout: Some(Duration::from_secs(5)),
                fallback: Some(Fallback::ForceSelf),
            })
        );
        let elsewhere = Replay { elsewhere: true, fallback: Some(Fallback::PreferSelf), ..Replay::default() };
        assert_eq!(parse("elsewhere=true;fallback=prefer_self"), Ok(elsewhere));
        for text in
            ["", "state=x", "region=mars", "instance=1;elsewhere=true", "app=x", "region=eu_west;timeout=soon", "elsewhere=false"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse(&format!("elsewhere=true;state={}", "x".repeat(1025))).is_err());
    }

    #[test]
    fn sources_read_as_flys_do() {
        let source = source("us_east-0", "us_east", Duration::from_millis(1_700_000_000_123), "x");
        assert_eq!(source, "instance=us_east-0;region=us_east;t=1700000000123000;state=x");
    }
}
