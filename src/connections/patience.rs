//! How long to wait for the other end, by how much it has moved.

use std::time::Duration;

/// What a connection begins with: a slow start is no attack.
const FIRST: Duration = Duration::from_secs(20);
/// As much as can be saved up: a pause in the middle of something long is none either.
const MOST: Duration = Duration::from_secs(60);

/// Time that is spent by waiting and earned by bytes, at a rate (bytes per second): whoever sends or takes one byte now
/// and then earns less than it spends.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    left: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { left: FIRST }
    }
}

impl Patience {
    /// How long to wait from now on.
    pub fn left(self) -> Duration {
        self.left
    }

    /// So long was waited, and so many bytes moved then.
    pub fn moved(&mut self, waited: Duration, bytes: usize, rate: u32) {
        let earned = Duration::from_micros((bytes as u64).saturating_mul(1_000_000) / u64::from(rate.max(1)));
        self.left = self.left.saturating_sub(waited).saturating_add(earned).min(MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drips_run_out_and_pauses_do_not() {
        let second = Duration::from_secs(1);
        let mut drip = Patience::default();
        let drops = (0..100).take_while(|_| {
            drip.moved(second, 1, 240);
            drip.left() > second
        });
        assert_eq!(drops.count(), 19);
        let mut steady = Patience::default();
        for _ in 0..1_000 {
            steady.moved(second, 241, 240);
        }
        assert!(steady.left() > FIRST);
        let mut upload = Patience::default();
        upload.moved(Duration::ZERO, 1 << 30, 240);
        assert_eq!(upload.left(), MOST, "a pause of a minute is fine after a gigabyte, more is not");
        upload.moved(MOST, 0, 240);
        assert!(upload.left().is_zero());
    }
}
