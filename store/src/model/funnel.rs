//! How far somebody came through the steps of a funnel: one fold for every backend.

use std::{collections::BTreeMap, ops::Range};

use crate::Order;

/// Most steps of a funnel.
pub const STEPS_MAX: usize = 10;
/// The widest window: 90 days.
pub const WINDOW_MS_MAX: i64 = 90 * 86_400_000;

/// What somebody did: ordered, so that of acts of one time those that are no step come
/// first, and then the steps in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Act {
    /// When: Unix milliseconds.
    pub time_ms: i64,
    /// A bit for each step that it passes.
    pub steps: u16,
}

/// How far one came: the time of each step that was reached.
pub type Walk = Vec<i64>;

/// The longest walk of one, whose acts are in their order. The first step must lie in the
/// range, and all within the window of it. An act is one step of a walk at most.
pub fn walk(acts: &[Act], steps: usize, range_ms: &Range<i64>, window_ms: i64, order: Order) -> Walk {
    match order {
        Order::Ordered | Order::Strict => in_order(acts, steps, range_ms, window_ms, order == Order::Strict),
        Order::Unordered => in_any_order(acts, steps, range_ms, window_ms),
    }
}

/// The times of a walk, without an allocation: there is one for each step of each visitor.
#[derive(Clone, Copy)]
struct Steps {
    times: [i64; STEPS_MAX],
    count: usize,
}

impl Steps {
    const NONE: Self = Self { times: [0; STEPS_MAX], count: 0 };

    fn and(mut self, time_ms: i64) -> Self {
        self.times[self.count] = time_ms;
        self.count += 1;
        self
    }
}

/// Of each step the walk to it that started last is kept: what goes on from an earlier
/// start goes on from a later one.
fn in_order(acts: &[Act], steps: usize, range_ms: &Range<i64>, window_ms: i64, strict: bool) -> Walk {
    let steps = steps.min(STEPS_MAX);
    let (mut walks, mut best) = ([Steps::NONE; STEPS_MAX], Steps::NONE);
    for act in acts {
        for step in (0..steps).rev() {
            let before = match step {
                0 => range_ms.contains(&act.time_ms).then_some(Steps::NONE),
                _ => Some(walks[step - 1])
                    .filter(|walk| walk.count > 0 && act.time_ms.saturating_sub(walk.times[0]) <= window_ms),
            };
            match before.filter(|_| act.steps & 1 << step != 0) {
                Some(before) => {
                    walks[step] = before.and(act.time_ms);
                    if walks[step].count > best.count {
                        best = walks[step];
                    }
                }
                None if strict => walks[step] = Steps::NONE,
                None => {}
            }
        }
        if best.count == steps {
            break;
        }
    }
    best.times[..best.count].to_vec()
}

/// Of each set of steps the walk through them that started last is kept: an act that passes
/// several is the one or the other of them in different walks.
fn in_any_order(acts: &[Act], steps: usize, range_ms: &Range<i64>, window_ms: i64) -> Walk {
    let steps = steps.min(STEPS_MAX);
    // By the set, as bits.
    let mut walks: BTreeMap<u16, Steps> = BTreeMap::new();
    let (mut best, mut next) = (Steps::NONE, Vec::new());
    for act in acts {
        let its = act.steps & ((1 << steps) - 1);
        if its == 0 {
            continue;
        }
        walks.retain(|_, walk| act.time_ms.saturating_sub(walk.times[0]) <= window_ms);
        next.clear();
        let before = walks.iter().map(|(set, walk)| (*set, *walk));
        let begun = range_ms.contains(&act.time_ms).then_some((0, Steps::NONE));
        for (set, walk) in before.chain(begun) {
            let more = (0..steps).map(|step| 1 << step).filter(|bit| its & !set & bit != 0);
            next.extend(more.map(|bit| (set | bit, walk.and(act.time_ms))));
        }
        for (set, walk) in &next {
            let known = walks.entry(*set).or_insert(*walk);
            if walk.times[0] > known.times[0] {
                *known = *walk;
            }
            if walk.count > best.count {
                best = *walk;
            }
        }
        if best.count == steps {
            break;
        }
    }
    best.times[..best.count].to_vec()
}

/// The answer for many walks.
pub fn count(walks: &[Walk], steps: usize) -> Vec<crate::FunnelStep> {
    (0..steps)
        .map(|step| {
            let reached = walks.iter().filter(|walk| walk.len() > step);
            let mut took: Vec<u64> = match step {
                0 => vec![0; reached.count()],
                _ => reached.map(|walk| walk[step].abs_diff(walk[step - 1])).collect(),
            };
            took.sort_unstable();
            crate::FunnelStep {
                reached: took.len() as u64,
                sum_ms: took.iter().sum(),
                median_ms: took.get(took.len().saturating_sub(1) / 2).copied().unwrap_or_default(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reached(acts: &[(i64, u16)], steps: usize, order: Order) -> Walk {
        let mut acts: Vec<_> =
            acts.iter().map(|(time_ms, steps)| Act { time_ms: *time_ms, steps: *steps }).collect();
        acts.sort_unstable();
        walk(&acts, steps, &(0..100), 10, order)
    }

    const A: u16 = 1;
    const B: u16 = 2;
    const C: u16 = 4;

    #[test]
    fn steps_are_walked_in_their_order_and_in_the_window() {
        use Order::Ordered;
        assert_eq!(reached(&[(1, A), (2, B), (3, C)], 3, Ordered), [1, 2, 3]);
        assert_eq!(reached(&[(1, B), (2, A), (3, C)], 3, Ordered), [2]);
        assert_eq!(
            reached(&[(1, A), (5, B), (12, C)], 3, Ordered),
            [1, 5],
            "the window counts from the first"
        );
        assert_eq!(reached(&[(1, A), (9, A), (12, B), (18, C)], 3, Ordered), [9, 12, 18], "a later start");
        assert_eq!(
            reached(&[(99, A), (105, B)], 2, Ordered),
            [99, 105],
            "later steps may lie behind the range"
        );
        assert!(reached(&[(100, A), (105, B)], 2, Ordered).is_empty());
        assert_eq!(reached(&[(1, A), (2, B), (3, A)], 2, Ordered), [1, 2], "the first that came so far");
    }

    #[test]
    fn one_act_is_one_step() {
        for order in [Order::Ordered, Order::Strict, Order::Unordered] {
            assert_eq!(reached(&[(1, A | B)], 2, order).len(), 1, "{order:?}");
            assert_eq!(reached(&[(1, A | B), (2, A | B)], 2, order).len(), 2, "{order:?}");
        }
    }

    #[test]
    fn strict_lets_nothing_lie_between() {
        assert_eq!(reached(&[(1, A), (2, 0), (3, B)], 2, Order::Strict), [1]);
        assert_eq!(reached(&[(1, A), (2, A), (3, B)], 2, Order::Strict), [2, 3]);
        assert_eq!(reached(&[(1, A), (2, 0), (3, B)], 2, Order::Ordered), [1, 3]);
    }

    #[test]
    fn without_an_order_any_will_do() {
        assert_eq!(reached(&[(1, C), (2, A), (3, B)], 3, Order::Unordered), [1, 2, 3]);
        assert_eq!(reached(&[(1, C), (2, A), (12, B)], 3, Order::Unordered), [1, 2], "the window");
    }

    /// Every act as every one of its steps, or as none.
    fn longest(acts: &[Act], taken: &mut Vec<(i64, usize)>, range_ms: &Range<i64>, window_ms: i64) -> usize {
        let Some((act, rest)) = acts.split_first() else { return taken.len() };
        let mut most = longest(rest, taken, range_ms, window_ms);
        for step in (0..4).filter(|step| act.steps & 1 << step != 0) {
            let start_ms = taken.first().map_or(act.time_ms, |(start_ms, _)| *start_ms);
            let fits = range_ms.contains(&start_ms) && act.time_ms - start_ms <= window_ms;
            if fits && taken.iter().all(|(_, one)| *one != step) {
                taken.push((act.time_ms, step));
                most = most.max(longest(rest, taken, range_ms, window_ms));
                taken.pop();
            }
        }
        most
    }

    #[test]
    fn without_an_order_the_longest_walk_is_found() {
        use Order::Unordered;
        assert_eq!(reached(&[(1, A | B), (2, A)], 2, Unordered), [1, 2], "the first act is the second step");
        let mut random = fastrand::Rng::with_seed(8);
        for _ in 0..3_000 {
            let mut acts: Vec<Act> = (0..random.usize(0..8))
                .map(|_| Act { time_ms: random.i64(0..30), steps: random.u16(0..16) })
                .collect();
            acts.sort_unstable();
            let range = 3..random.i64(4..30);
            let walk = super::walk(&acts, 4, &range, 10, Unordered);
            assert_eq!(walk.len(), longest(&acts, &mut Vec::new(), &range, 10), "{acts:?} {range:?}");
            assert!(walk.is_sorted() && walk.first().is_none_or(|start| range.contains(start)));
            assert!(walk.last().is_none_or(|last| last - walk[0] <= 10), "{walk:?}");
        }
    }

    #[test]
    fn the_ends_of_time_are_times() {
        for order in [Order::Ordered, Order::Strict, Order::Unordered] {
            let acts = [(i64::MIN, A), (0, A), (i64::MAX, B)];
            let acts = acts.map(|(time_ms, steps)| Act { time_ms, steps });
            assert_eq!(walk(&acts, 2, &(i64::MIN..i64::MAX), 10, order), [i64::MIN], "{order:?}");
        }
    }

    #[test]
    fn all_permutations_of_six_acts_give_the_same_walk() {
        let acts = [(1, A), (1, B), (2, 0), (2, B), (3, C), (4, A)];
        for order in [Order::Ordered, Order::Strict, Order::Unordered] {
            let want = reached(&acts, 3, order);
            for acts in crate::model::sessions::tests::permutations(&acts) {
                assert_eq!(reached(&acts, 3, order), want);
            }
        }
    }

    #[test]
    fn the_middle_of_two_is_the_lower() {
        let steps = count(&[vec![0, 5], vec![0, 7], vec![3]], 2);
        assert_eq!(steps.iter().map(|step| step.reached).collect::<Vec<_>>(), [3, 2]);
        assert_eq!((steps[1].sum_ms, steps[1].median_ms), (12, 5));
        assert_eq!(count(&[], 1)[0], crate::FunnelStep::default());
    }
}
