//! The process's monotonic clock, as values.

use std::sync::LazyLock;
use std::time::Instant;

use crate::request::Moment;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The moment it is.
pub fn now() -> Moment {
    Moment(START.elapsed())
}
