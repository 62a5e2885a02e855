//! The process's monotonic clock, as values.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crate::request::Moment;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The process starts with the clock at this, so that what began before it can be told as a moment too.
const HEAD_START: Duration = Duration::from_secs(30 * 86_400);

/// The moment it is.
pub fn now() -> Moment {
    Moment(HEAD_START + START.elapsed())
}
