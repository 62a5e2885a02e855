//! Which answers were used: a table of fixed size. When a part of it is full of answers that could still be
//! repeated, no more are accepted there, rather than that one is accepted twice.

use parking_lot::Mutex;

use super::FRESH;

/// Answers in one set.
const WAYS: usize = 8;
/// Sets: 65,536 answers within two minutes, in 1 MiB.
const SETS: usize = 8 << 10;

/// Nonces that were used, each until when that matters.
pub struct Spent(Box<[Mutex<Set>]>);

type Set = [(u64, u64); WAYS];

impl std::fmt::Debug for Spent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Spent")
    }
}

impl Default for Spent {
    fn default() -> Self {
        Self((0..SETS).map(|_| Mutex::default()).collect())
    }
}

impl Spent {
    /// Uses a nonce up. Was it unused?
    pub fn spend(&self, nonce: u64, unix: u64) -> bool {
        let Some(mut set) = self.set(nonce).map(Mutex::lock) else { return false };
        if set.iter().any(|(known, until)| *known == nonce && *until >= unix) {
            return false;
        }
        let free = set.iter_mut().find(|(_, until)| *until < unix);
        free.map(|slot| *slot = (nonce, unix.saturating_add(FRESH.as_secs()))).is_some()
    }

    /// Could it be used?
    pub fn is_unspent(&self, nonce: u64, unix: u64) -> bool {
        self.set(nonce).is_some_and(|set| !set.lock().iter().any(|(known, until)| *known == nonce && *until >= unix))
    }

    fn set(&self, nonce: u64) -> Option<&Mutex<Set>> {
        self.0.get(nonce as usize % SETS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_only() {
        let spent = Spent::default();
        assert!(spent.is_unspent(7, 100) && spent.spend(7, 100));
        assert!(!spent.is_unspent(7, 100) && !spent.spend(7, 220));
        assert!(spent.spend(7, 221), "the token is long stale by now");
        // A set that is full refuses: it forgets nothing that could be repeated.
        for n in 0..WAYS as u64 {
            assert!(spent.spend(1 + n * SETS as u64, 100));
        }
        assert!(!spent.spend(1 + 99 * SETS as u64, 100) && !spent.spend(1, 100));
        assert!(spent.spend(1 + 99 * SETS as u64, 300));
    }
}
