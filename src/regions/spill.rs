//! Gradual spill: as a region loses upstreams, a part of its requests moves to the next, not all or nothing.
//!
//! Envoy's formula for priority levels (its documentation, "Priority levels"): a region's health is
//! `min(100 %, 1.4 × usable share)`, so that it keeps everything while it has five upstreams of seven. Regions
//! are filled in order until nothing is left. If all together have less than 100 %, each takes its part.
//!
//! | usable upstreams | stays | moves to the next region |
//! |---|---|---|
//! | 100 % | 100 % | 0 % |
//! | 71 % | 100 % (99.4) | 0 % (0.6) |
//! | 50 % | 70 % | 30 % |
//! | 25 % | 35 % | 65 % |

use smallvec::SmallVec;

/// How many times its share of the load an upstream can carry.
pub const OVERPROVISIONING: f32 = 1.4;

/// A region as spilling sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Capacity {
    /// The share of its upstreams that is usable: 0 to 1.
    pub usable: f32,
    /// The part of that which slow start gives it: 0.1 to 1, or 0 if nothing is usable.
    pub ramp: f32,
    /// The share that an operator leaves it: 0 to 1.
    pub granted: f32,
}

/// The part of the requests that each region takes; they sum up to 1, or are all 0 if nothing is usable.
/// The list ends with the region that takes the last of them.
pub fn shares(regions: impl Iterator<Item = Capacity>) -> SmallVec<[f32; 8]> {
    let mut left = 1.0f32;
    let mut shares: SmallVec<[f32; 8]> = SmallVec::new();
    for Capacity { usable, ramp: _, granted } in regions {
        let health = (OVERPROVISIONING * usable).min(1.0) * granted;
        let share = health.min(left);
        left -= share;
        shares.push(share);
        // The rest has nothing to take: usually the first region has it all.
        if left <= 0.0 {
            break;
        }
    }
    let sum: f32 = shares.iter().sum();
    if sum > 0.0 && sum < 1.0 {
        shares.iter_mut().for_each(|share| *share /= sum);
    }
    shares
}

/// The region in whose share `chance` (0 to 1) falls; nothing if nothing is usable.
pub fn draw(shares: &[f32], chance: f32) -> Option<usize> {
    super::draw(shares.iter().copied(), chance)
}

/// May a region that is in slow start take one more request, of `all` that are under way? Slow start is there
/// against a rush, so it bounds requests at once, as HAProxy's does: the region's part of them, times 1.4. One
/// request at a time is no rush.
pub fn takes_one_more(ramp: f32, in_flight: u32, all: u32) -> bool {
    let allowed = (OVERPROVISIONING * ramp * (all as f32 + 1.0)).ceil().max(1.0);
    ramp >= 1.0 || in_flight as f32 + 1.0 <= allowed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(usable: &[f32]) -> Vec<i32> {
        let capacities = usable.iter().map(|usable| Capacity { usable: *usable, ramp: 1.0, granted: 1.0 });
        shares(capacities).iter().map(|s| (s * 100.0).round() as i32).collect()
    }

    #[test]
    fn envoys_table() {
        assert_eq!(of(&[1.0, 1.0]), [100]);
        assert_eq!(of(&[0.72, 1.0]), [100]);
        assert_eq!(of(&[0.71, 1.0]), [99, 1]);
        assert_eq!(of(&[0.5, 1.0]), [70, 30]);
        assert_eq!(of(&[0.25, 1.0]), [35, 65]);
        assert_eq!(of(&[0.0, 1.0]), [0, 100]);
        assert_eq!(of(&[0.25, 0.25, 1.0]), [35, 35, 30]);
        assert_eq!(of(&[0.25, 0.25]), [50, 50], "too little altogether: each takes its part");
        assert_eq!(of(&[0.0, 0.0]), [0, 0]);
    }

    #[test]
    fn an_operator_takes_shares_away() {
        let shares = |granted| shares([granted, 1.0].map(|granted| Capacity { usable: 1.0, ramp: 1.0, granted }).into_iter());
        assert_eq!(*shares(0.25), [0.25, 0.75]);
        assert_eq!(*shares(0.0), [0.0, 1.0]);
    }

    #[test]
    fn slow_start_bounds_a_rush() {
        // A hundred requests that stay, one after the other: how many does a region take that is at a tenth?
        let took = |ramp: f32| (0..100).fold(0, |took, all| took + u32::from(takes_one_more(ramp, took, all)));
        assert_eq!([0.1, 0.5, 0.8, 1.0].map(took), [14, 70, 100, 100]);
        assert!(takes_one_more(0.1, 0, 0), "one at a time is no rush");
    }

    #[test]
    fn draws_follow_the_shares() {
        let shares = [0.35, 0.0, 0.65];
        assert_eq!([0.0, 0.34, 0.36, 0.999, 1.0].map(|c| draw(&shares, c)), [Some(0), Some(0), Some(2), Some(2), Some(2)]);
        assert_eq!(draw(&[0.0, 0.0], 0.5), None);
    }
}
