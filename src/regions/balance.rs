//! Which of a region's usable endpoints takes the request. Pure: what is random comes in as a number.

use smallvec::SmallVec;

use crate::request::unit;

/// Hashing may give an endpoint at most this times its share of the requests at once (bounded load:
/// Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2016).
const BOUND: f64 = 1.25;
/// Of two, one that is this many times as fast is better,
const MUCH_FASTER: u64 = 2;
/// if it is also faster by so many microseconds; less is noise.
const NOISE: u64 = 5_000;

/// How a region balances.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Balance {
    /// Power of two choices: of two at random the better one (Mitzenmacher, 2001).
    LeastRequests,
    /// In turn, by weight.
    RoundRobin,
    /// By a hash of something of the request.
    Hash(Field),
}

/// What a hash is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Field {
    /// The client's address.
    Ip,
    /// A cookie.
    Cookie(String),
    /// A header.
    Header(http::HeaderName),
}

/// An endpoint that could take the request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Member {
    /// The upstream, by position in the region.
    pub upstream: u16,
    /// The endpoint, by position in the upstream; nothing if its name has no address yet.
    pub endpoint: Option<u16>,
    /// Choosing it is a trial.
    pub trial: bool,
    /// Its share, slow start included.
    pub weight: f32,
    /// The part of its share that slow start leaves it.
    pub ramp: f32,
    /// Requests that it is answering.
    pub in_flight: u32,
    /// Its time to first byte in microseconds, if known.
    pub first_byte: Option<u64>,
    /// Stands for it in hashes.
    pub id: u64,
}

/// Members that are equally good by all that matters more.
pub type Members = SmallVec<[Member; 8]>;

impl Balance {
    /// The one that takes the request. `key` is the hash of the request's field; `turn` counts the region's
    /// requests; `schedule` is its round robin. Nothing only if there are no members.
    pub fn pick(&self, members: &[Member], schedule: &[u16], turn: usize, key: Option<u64>, chance: u64) -> Option<Member> {
        if let [only] = members {
            return Some(*only);
        }
        match (self, key) {
            (Self::RoundRobin, _) => in_turn(members, schedule, turn, chance),
            (Self::Hash(_), Some(key)) => by_hash(members, key),
            (Self::LeastRequests, _) | (Self::Hash(_), None) => of_two(members, chance),
        }
    }
}

/// Random by weight, with one member left out.
fn draw(members: &[Member], without: Option<usize>, chance: f32) -> Option<usize> {
    let weight = move |(i, m): (usize, &Member)| if Some(i) == without { 0.0 } else { m.weight };
    let weights = members.iter().enumerate().map(weight);
    let sum: f32 = weights.clone().sum();
    super::draw(weights, sum * chance)
}

fn of_two(members: &[Member], chance: u64) -> Option<Member> {
    let first = draw(members, None, unit(chance))?;
    let second = draw(members, Some(first), unit(chance << 24))?;
    let (first, second) = (members.get(first)?, members.get(second)?);
    Some(*if is_better(second, first) { second } else { first })
}

/// Is `a` better than `b`: fewer requests for its weight, and much faster counts like fewer?
fn is_better(a: &Member, b: &Member) -> bool {
    let load = |m: &Member| m.in_flight as f32 / m.weight.max(f32::MIN_POSITIVE);
    match (a.first_byte, b.first_byte) {
        (Some(x), Some(y)) if x.max(y) >= x.min(y).saturating_mul(MUCH_FASTER) && x.abs_diff(y) >= NOISE => {
            (load(a) + 1.0) * (x as f32) < (load(b) + 1.0) * (y as f32)
        }
        _ => load(a) < load(b),
    }
}

/// The next of the schedule that is a member; what is in slow start lets some of its turns pass.
fn in_turn(members: &[Member], schedule: &[u16], turn: usize, chance: u64) -> Option<Member> {
    let len = schedule.len().max(1);
    let of = |upstream: u16| members.iter().filter(move |m| m.upstream == upstream);
    for step in 0..len {
        let Some(upstream) = schedule.get((turn + step) % len) else { break };
        let count = of(*upstream).count();
        if count == 0 {
            continue;
        }
        // The addresses of one upstream take turns from round to round; those with weights of their own are drawn.
        let first = of(*upstream).next()?;
        let member = match of(*upstream).all(|m| m.weight == first.weight) {
            true => of(*upstream).nth((turn / len) % count)?,
            false => {
                let own: Members = of(*upstream).copied().collect();
                members.iter().find(|m| Some(m.id) == draw(&own, None, unit(chance)).and_then(|i| own.get(i)).map(|m| m.id))?
            }
        };
        let others = members.iter().any(|m| m.upstream != *upstream && m.ramp >= 1.0);
        let skips = others && unit(crate::request::mix(chance)) >= member.ramp;
        if !skips {
            return Some(*member);
        }
    }
    members.iter().max_by(|a, b| a.weight.total_cmp(&b.weight)).copied()
}

/// Weighted rendezvous hashing (Thaler and Ravishankar, 1998): who leaves or comes moves nothing but its own
/// keys, without a table to build. Whoever has more than its bounded share passes the key on to the next.
fn by_hash(members: &[Member], key: u64) -> Option<Member> {
    let weights: f64 = members.iter().map(|m| f64::from(m.weight)).sum();
    let total: u32 = members.iter().map(|m| m.in_flight).sum();
    let has_room = |m: &&Member| {
        let share = f64::from(m.weight) / weights.max(f64::MIN_POSITIVE);
        f64::from(m.in_flight) + 1.0 <= (BOUND * share * (f64::from(total) + 1.0)).ceil()
    };
    let score = |m: &Member| score(key, m.id, m.weight);
    let best = |a: &&Member, b: &&Member| score(a).total_cmp(&score(b));
    members.iter().filter(has_room).max_by(best).or_else(|| members.iter().max_by(best)).copied()
}

/// The rendezvous score of `id` for `key`: the greatest wins, each as often as its weight says.
pub fn score(key: u64, id: u64, weight: f32) -> f64 {
    let hash = crate::request::mix(key ^ id.rotate_left(32));
    // In (0, 1]: the logarithm of zero would beat everybody.
    let uniform = ((hash >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
    -f64::from(weight) / uniform.ln().min(-f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(weights: &[f32]) -> Members {
        let member = |(i, weight): (usize, &f32)| Member {
            upstream: i as u16,
            endpoint: Some(0),
            trial: false,
            weight: *weight,
            ramp: weight.min(1.0),
            in_flight: 0,
            first_byte: None,
            id: crate::request::mix(i as u64 + 1),
        };
        weights.iter().enumerate().map(member).collect()
    }

    /// How often each is picked in `n` requests.
    fn counts(balance: &Balance, members: &[Member], schedule: &[u16], n: usize, key: impl Fn(u64) -> Option<u64>) -> Vec<usize> {
        let mut counts = vec![0; members.len()];
        let mut random = fastrand::Rng::with_seed(7);
        for turn in 0..n {
            let chance = random.u64(..);
            let picked = balance.pick(members, schedule, turn, key(chance), chance).unwrap();
            counts[usize::from(picked.upstream)] += 1;
        }
        counts
    }

    fn near(counts: &[usize], shares: &[f64]) {
        let n: usize = counts.iter().sum();
        for (count, share) in counts.iter().zip(shares) {
            let got = *count as f64 / n as f64;
            assert!((got - share).abs() < 0.03, "{counts:?} is not {shares:?}");
        }
    }

    #[test]
    fn every_way_keeps_the_weights() {
        let three = members(&[1.0, 2.0, 1.0]);
        let schedule = [1, 0, 1, 2];
        near(&counts(&Balance::LeastRequests, &three, &schedule, 10_000, |_| None), &[0.25, 0.5, 0.25]);
        near(&counts(&Balance::RoundRobin, &three, &schedule, 10_000, |_| None), &[0.25, 0.5, 0.25]);
        near(&counts(&Balance::Hash(Field::Ip), &three, &schedule, 10_000, Some), &[0.25, 0.5, 0.25]);
        let two = members(&[1.0, 3.0]);
        near(&counts(&Balance::LeastRequests, &two, &[], 10_000, |_| None), &[0.25, 0.75]);
    }

    #[test]
    fn slow_start_lets_turns_pass() {
        let two = members(&[0.1, 1.0]);
        near(&counts(&Balance::RoundRobin, &two, &[0, 1], 10_000, |_| None), &[0.05, 0.95]);
        near(&counts(&Balance::LeastRequests, &two, &[], 10_000, |_| None), &[0.09, 0.91]);
    }

    #[test]
    fn of_two_the_less_busy_or_much_faster_one() {
        let mut two = members(&[1.0, 1.0]);
        two[0].in_flight = 3;
        assert_eq!(counts(&Balance::LeastRequests, &two, &[], 100, |_| None), [0, 100]);
        two[0].in_flight = 0;
        (two[0].first_byte, two[1].first_byte) = (Some(10_000), Some(19_000));
        near(&counts(&Balance::LeastRequests, &two, &[], 10_000, |_| None), &[0.5, 0.5]);
        two[1].first_byte = Some(20_000);
        assert_eq!(counts(&Balance::LeastRequests, &two, &[], 100, |_| None), [100, 0]);
        (two[0].first_byte, two[1].first_byte) = (Some(500), Some(5_000));
        near(&counts(&Balance::LeastRequests, &two, &[], 10_000, |_| None), &[0.5, 0.5]);
        (two[0].first_byte, two[1].first_byte) = (Some(10_000), Some(20_000));
        two[0].in_flight = 9;
        assert_eq!(counts(&Balance::LeastRequests, &two, &[], 100, |_| None), [0, 100], "but not if it is swamped");
    }

    #[test]
    fn who_leaves_moves_only_its_own_keys() {
        let all = members(&[1.0, 1.0, 2.0, 1.0]);
        let less: Members = all.iter().filter(|m| m.upstream != 2).copied().collect();
        let pick = |members: &[Member], key| Balance::Hash(Field::Ip).pick(members, &[], 0, Some(key), 0).unwrap().upstream;
        let mut moved = 0;
        for key in (0..10_000).map(crate::request::mix) {
            let (before, after) = (pick(&all, key), pick(&less, key));
            assert!(before == 2 || before == after);
            moved += usize::from(before != after);
        }
        assert!((3_700..4_300).contains(&moved), "{moved}");
    }

    #[test]
    fn a_hot_key_does_not_swamp_one_endpoint() {
        let mut three = members(&[1.0, 1.0, 1.0]);
        for _ in 0..300 {
            let picked = Balance::Hash(Field::Ip).pick(&three, &[], 0, Some(42), 0).unwrap();
            three[usize::from(picked.upstream)].in_flight += 1;
        }
        assert!(three.iter().all(|m| m.in_flight <= 126), "{three:?}");
    }
}
