//! What health checks say of an endpoint. The checks themselves are run by `tasks::probe`.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::time::Duration;

use parking_lot::Mutex;

use crate::request::Moment;

/// What health checks say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing yet. It is used: failover must not need a health check.
    Unknown,
    /// Use it.
    Up,
    /// Do not.
    Down,
}

/// The outcome of the last check, for people.
#[derive(Debug, Clone)]
pub struct Last {
    /// It was good.
    pub good: bool,
    /// In words.
    pub text: String,
    /// How long it took.
    pub took: Duration,
}

/// What health checks say of one endpoint.
#[derive(Debug, Default)]
pub struct Active {
    /// The digest of the check; 0 without one.
    check: AtomicU64,
    /// 0 unknown, 1 up, 2 down.
    verdict: AtomicU32,
    /// Answers in a row that speak against the verdict.
    against: AtomicU32,
    /// A check is under way.
    pub asking: AtomicBool,
    /// When the next one is due, in milliseconds; 0 before the first.
    due: AtomicU64,
    /// The outcome of the last check.
    pub last: Mutex<Option<Last>>,
}

impl Active {
    /// From now on it is checked like this (0: not at all). What another check said is forgotten.
    pub fn switch(&self, check: u64) {
        if self.check.swap(check, Relaxed) != check {
            self.verdict.store(0, Relaxed);
            self.against.store(0, Relaxed);
            self.due.store(0, Relaxed);
            *self.last.lock() = None;
        }
    }

    /// When the next check is due.
    pub fn due(&self) -> Moment {
        Moment(Duration::from_millis(self.due.load(Relaxed)))
    }

    /// The next check is due then.
    pub fn set_due(&self, due: Moment) {
        self.due.store(due.millis(), Relaxed);
    }

    /// Is it checked by this very check?
    pub fn is(&self, check: u64) -> bool {
        self.check.load(Relaxed) == check
    }

    /// Is it checked?
    pub fn is_on(&self) -> bool {
        self.check.load(Relaxed) != 0
    }

    /// What checks say.
    pub fn verdict(&self) -> Verdict {
        match self.verdict.load(Relaxed) {
            0 => Verdict::Unknown,
            1 => Verdict::Up,
            _ => Verdict::Down,
        }
    }

    /// Is a change of the verdict in the air? Then it pays to ask more often.
    pub fn in_doubt(&self) -> bool {
        self.verdict() == Verdict::Unknown || self.against.load(Relaxed) > 0
    }

    /// Takes an answer and returns the verdict. `fall` bad ones in a row take it down, `rise` good ones in a
    /// row bring it up; the very first good one needs no second.
    pub fn record(&self, good: bool, fall: u32, rise: u32) -> Verdict {
        let (against, verdict) = match (self.verdict(), good) {
            (Verdict::Up, true) | (Verdict::Down, false) => (0, None),
            (Verdict::Unknown, true) => (0, Some(1)),
            (Verdict::Unknown | Verdict::Up, false) => (fall, Some(2)),
            (Verdict::Down, true) => (rise, Some(1)),
        };
        let count = if against == 0 { 0 } else { self.against.load(Relaxed) + 1 };
        match verdict.filter(|_| count >= against) {
            Some(verdict) => {
                self.verdict.store(verdict, Relaxed);
                self.against.store(0, Relaxed);
            }
            None => self.against.store(count, Relaxed),
        }
        self.verdict()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fall_and_rise() {
        let active = Active::default();
        let mut say = |good| active.record(good, 3, 2);
        use Verdict::{Down, Unknown, Up};
        let answers = [false, false, true, false, false, true, false, false, false, true, false, true, true];
        let verdicts = answers.map(&mut say);
        assert_eq!(verdicts, [Unknown, Unknown, Up, Up, Up, Up, Up, Up, Down, Down, Down, Down, Up]);
    }

    #[test]
    fn another_check_starts_anew() {
        let active = Active::default();
        active.switch(7);
        active.record(true, 3, 2);
        active.switch(7);
        assert_eq!((active.verdict(), active.in_doubt()), (Verdict::Up, false));
        active.switch(8);
        assert_eq!((active.verdict(), active.in_doubt()), (Verdict::Unknown, true));
    }
}
