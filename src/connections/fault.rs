//! What is wrong with what came.

/// Why a connection's next request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Of which kind it is.
    pub kind: Kind,
    /// What exactly, for people; it quotes nothing of what came.
    pub why: &'static str,
}

/// Kinds of faults: each has a status and a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It breaks HTTP's grammar.
    Malformed,
    /// Where it ends could be understood in more than one way.
    Framing,
    /// It is not clear whom it is for.
    Host,
    /// Its first line is too long.
    Target,
    /// Its headers are too many, or too long.
    Headers,
    /// A version of HTTP that is not spoken here.
    Version,
    /// A transfer coding, or a method, that is not known here.
    Unimplemented,
    /// It expects what nobody here does.
    Expectation,
    /// Its head took too long.
    HeaderTimeout,
    /// Its body comes too slowly.
    SlowBody,
    /// Its client takes the answer too slowly.
    SlowReader,
    /// Too many frames of HTTP/2 that ask for nothing.
    Flood,
}

impl Kind {
    /// All, so that each is counted from the beginning.
    pub const ALL: [Self; 12] = [
        Self::Malformed,
        Self::Framing,
        Self::Host,
        Self::Target,
        Self::Headers,
        Self::Version,
        Self::Unimplemented,
        Self::Expectation,
        Self::HeaderTimeout,
        Self::SlowBody,
        Self::SlowReader,
        Self::Flood,
    ];

    /// In metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Framing => "framing",
            Self::Host => "host",
            Self::Target => "target_too_long",
            Self::Headers => "headers_too_large",
            Self::Version => "version",
            Self::Unimplemented => "unimplemented",
            Self::Expectation => "expectation",
            Self::HeaderTimeout => "header_timeout",
            Self::SlowBody => "slow_body",
            Self::SlowReader => "slow_reader",
            Self::Flood => "flood",
        }
    }

    /// The status of its answer (RFC 9110, section 15.5 and 15.6; RFC 6585, section 5).
    pub fn status(self) -> u16 {
        match self {
            Self::Malformed | Self::Framing | Self::Host | Self::Flood => 400,
            Self::HeaderTimeout | Self::SlowBody | Self::SlowReader => 408,
            Self::Target => 414,
            Self::Expectation => 417,
            Self::Headers => 431,
            Self::Unimplemented => 501,
            Self::Version => 505,
        }
    }

    /// With a reason.
    pub(super) fn because(self, why: &'static str) -> Fault {
        Fault { kind: self, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_counted_where_it_stands() {
        for (i, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, i);
        }
    }
}
