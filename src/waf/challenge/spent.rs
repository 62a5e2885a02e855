//! Which answers were used: a table of fixed size. When a part of it is full of answers that could still be
//! repeated, no more are accepted there, rather than that one is accepted twice.

use parking_lot::Mutex;

use super::FRESH;

/// Answers in one set.
const WAYS: usize = 16;
/// Sets: 131,072 answers within two minutes, in 2 MiB.
const SETS: usize = 8 << 10;

/// Nonces that were used, each until when that matters.
pub struct Spent(Box<[Mutex<Set>]>);

type Set = [(u64, u64); WAYS];

/// How using one up went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spending {
    /// It was not used before.
    Fresh,
    /// It was.
    Before,
    /// There is no room to remember it.
    Full,
}

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
    /// Uses a nonce up, if `commit`; else only looks.
    pub fn spend(&self, nonce: u64, unix: u64, commit: bool) -> Spending {
        let Some(mut set) = self.0.get(nonce as usize % SETS).map(Mutex::lock) else { return Spending::Full };
        if set.iter().any(|(known, until)| *known == nonce && *until >= unix) {
            return Spending::Before;
        }
        match set.iter_mut().find(|(_, until)| *until < unix) {
            Some(free) => {
                if commit {
                    *free = (nonce, unix.saturating_add(FRESH.as_secs()));
                }
                Spending::Fresh
            }
            None => Spending::Full,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_only() {
        let spent = Spent::default();
        assert_eq!(spent.spend(7, 100, false), Spending::Fresh);
        assert_eq!(spent.spend(7, 100, true), Spending::Fresh, "looking uses nothing up");
        assert_eq!([spent.spend(7, 100, true), spent.spend(7, 220, false)], [Spending::Before; 2]);
        assert_eq!(spent.spend(7, 221, true), Spending::Fresh, "the token is long stale by now");
        // A set that is full refuses: it forgets nothing that could be repeated.
        for n in 0..WAYS as u64 {
            assert_eq!(spent.spend(1 + n * SETS as u64, 100, true), Spending::Fresh);
        }
        assert_eq!(spent.spend(1 + 99 * SETS as u64, 100, true), Spending::Full);
        assert_eq!(spent.spend(1, 100, true), Spending::Before);
        assert_eq!(spent.spend(1 + 99 * SETS as u64, 300, true), Spending::Fresh);
    }
}
