//! Which session an event belongs to. A pure value that takes time as an argument.
//!
//! With `t` the event's own time and `gap` the time-out:
//!
//! 1. What came more than `gap` before or after `t` is history, or a clock that is wrong:
//!    it has no session, and nothing is noted.
//! 2. `start <= t <= last + gap`, and less than a day after `start`: the same one.
//! 3. `t` before the start of the one that is known: the one before, if `t` lies in it or
//!    at most `gap` behind it; else none. What is late never moves anything.
//! 4. Else another one begins at `t`.
//! 5. When all room is used, who is new has none. Nobody who is there is pushed out, so a
//!    flood of made-up visitors ends nobody's visit.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    mem,
};

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) timeout_ms: i64,
    pub(super) length_ms_max: i64,
}

/// What an event's session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// The one that began then.
    Of {
        start_ms: i64,
    },
    None,
    Full,
}

/// The last two sessions of a visitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Visits {
    pub(super) start_ms: i64,
    pub(super) last_ms: i64,
    /// Start and end of the one before; it ends before it starts if there was none.
    pub(super) before: (i64, i64),
}

impl Visits {
    const NONE_BEFORE: (i64, i64) = (i64::MAX, i64::MIN);

    fn first(time_ms: i64) -> Self {
        Self { start_ms: time_ms, last_ms: time_ms, before: Self::NONE_BEFORE }
    }

    fn goes_on(&self, rules: Rules, time_ms: i64) -> bool {
        (self.start_ms..=self.last_ms.saturating_add(rules.timeout_ms)).contains(&time_ms)
            && time_ms - self.start_ms < rules.length_ms_max
    }

    fn take(&mut self, rules: Rules, time_ms: i64) -> Found {
        if self.goes_on(rules, time_ms) {
            self.last_ms = self.last_ms.max(time_ms);
            return Found::Of { start_ms: self.start_ms };
        }
        if time_ms < self.start_ms {
            let (start_ms, end_ms) = self.before;
            let is_in_it = (start_ms..=end_ms.saturating_add(rules.timeout_ms)).contains(&time_ms)
                && time_ms - start_ms < rules.length_ms_max;
            return if is_in_it { Found::Of { start_ms } } else { Found::None };
        }
        *self = Self { before: (self.start_ms, self.last_ms), ..Self::first(time_ms) };
        Found::Of { start_ms: time_ms }
    }
}

/// Takes a key for its own hash: it is one already, of a secret that no caller knows.
#[derive(Debug, Default)]
pub(super) struct IsAHash(u64);

impl Hasher for IsAHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }
}

type ByVisitor = HashMap<u128, Visits, BuildHasherDefault<IsAHash>>;

/// What is known of visitors. Who was not seen for one to two time-outs is forgotten, a
/// whole map at a time.
#[derive(Debug)]
pub(super) struct Table {
    rules: Rules,
    visitors_max: usize,
    recent: ByVisitor,
    /// Who was not seen since the maps were swapped.
    older: ByVisitor,
    swapped_ms: i64,
}

impl Table {
    pub(super) fn new(rules: Rules, visitors_max: usize) -> Self {
        Self { rules, visitors_max, recent: ByVisitor::default(), older: ByVisitor::default(), swapped_ms: 0 }
    }

    /// The session of an event of a visitor that happened and came at these times.
    pub(super) fn find(&mut self, visitor: u128, time_ms: i64, now_ms: i64) -> Found {
        if !self.is_of_now(time_ms, now_ms) {
            return Found::None;
        }
        self.forget(now_ms);
        if let Some(visits) = self.recent.get_mut(&visitor) {
            return visits.take(self.rules, time_ms);
        }
        match self.older.remove(&visitor) {
            Some(mut visits) => {
                let found = visits.take(self.rules, time_ms);
                self.recent.insert(visitor, visits);
                found
            }
            None if self.len() >= self.visitors_max => Found::Full,
            None => {
                self.recent.insert(visitor, Visits::first(time_ms));
                Found::Of { start_ms: time_ms }
            }
        }
    }

    /// True if an event of then would belong to a session that began before it.
    pub(super) fn goes_on(&self, visitor: u128, time_ms: i64, now_ms: i64) -> bool {
        let visits = self.recent.get(&visitor).or_else(|| self.older.get(&visitor));
        self.is_of_now(time_ms, now_ms) && visits.is_some_and(|visits| visits.goes_on(self.rules, time_ms))
    }

    pub(super) fn len(&self) -> usize {
        self.recent.len() + self.older.len()
    }

    /// All that is known, to be kept.
    pub(super) fn all(&self) -> impl Iterator<Item = (u128, Visits)> {
        self.recent.iter().chain(&self.older).map(|(visitor, visits)| (*visitor, *visits))
    }

    /// Puts back what was kept; what there is no room for is forgotten.
    pub(super) fn restore(&mut self, visitor: u128, visits: Visits, now_ms: i64) {
        if self.len() < self.visitors_max {
            self.swapped_ms = now_ms;
            self.recent.insert(visitor, visits);
        }
    }

    fn is_of_now(&self, time_ms: i64, now_ms: i64) -> bool {
        now_ms.saturating_sub(time_ms).saturating_abs() <= self.rules.timeout_ms
    }

    fn forget(&mut self, now_ms: i64) {
        let since_ms = now_ms.saturating_sub(self.swapped_ms);
        // A clock that was set back must not keep everybody for ever.
        if (0..self.rules.timeout_ms).contains(&since_ms) {
            return;
        }
        self.older = mem::take(&mut self.recent);
        if since_ms >= 2 * self.rules.timeout_ms {
            self.older = ByVisitor::default();
        }
        self.swapped_ms = now_ms;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MINUTE: i64 = 60_000;
    const HOUR: i64 = 60 * MINUTE;
    const T0: i64 = 1_767_225_600_000;
    const RULES: Rules = Rules { timeout_ms: 30 * MINUTE, length_ms_max: 24 * HOUR };

    fn table() -> Table {
        Table::new(RULES, 1000)
    }

    /// When the sessions of events began that came as they happened, after T0.
    fn starts(table: &mut Table, times: &[i64]) -> Vec<Option<i64>> {
        let start = |time: &i64| match table.find(1, T0 + time, T0 + time) {
            Found::Of { start_ms } => Some(start_ms - T0),
            _ => None,
        };
        times.iter().map(start).collect()
    }

    #[test]
    fn a_gap_of_more_than_the_timeout_ends_a_session() {
        let gap = RULES.timeout_ms;
        let found = starts(&mut table(), &[0, gap, 2 * gap, 3 * gap + 1]);
        assert_eq!(found, [Some(0), Some(0), Some(0), Some(3 * gap + 1)]);
    }

    #[test]
    fn a_session_is_cut_after_a_day() {
        let times: Vec<_> = (0..60).map(|turn| turn * 29 * MINUTE).collect();
        let found = starts(&mut table(), &times);
        let second = times.iter().copied().find(|time| *time >= 24 * HOUR).unwrap();
        assert!(
            times
                .iter()
                .zip(&found)
                .all(|(time, start)| *start == Some(if *time < 24 * HOUR { 0 } else { second }))
        );
    }

    #[test]
    fn what_comes_late_belongs_to_the_session_before_and_moves_nothing() {
        let mut table = table();
        assert_eq!(starts(&mut table, &[0, 5 * MINUTE, 40 * MINUTE]), [Some(0), Some(0), Some(40 * MINUTE)]);
        let now = T0 + 50 * MINUTE;
        let mut late = |minute: i64| table.find(1, T0 + minute * MINUTE, now);
        assert_eq!(late(25), Found::Of { start_ms: T0 }, "within the time-out behind its end");
        assert_eq!(late(39), Found::None, "between the two");
        assert_eq!(late(41), Found::Of { start_ms: T0 + 40 * MINUTE });
        assert_eq!(late(10), Found::None, "more than the time-out ago");
        assert_eq!(late(50), Found::Of { start_ms: T0 + 40 * MINUTE });
    }

    #[test]
    fn history_and_wrong_clocks_have_no_session_and_leave_no_trace() {
        let mut table = table();
        for time in [T0 - RULES.timeout_ms - 1, T0 + RULES.timeout_ms + 1, i64::MIN, i64::MAX] {
            assert_eq!(table.find(1, time, T0), Found::None);
        }
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_flood_of_visitors_ends_nobodys_visit() {
        let mut table = Table::new(RULES, 3);
        for visitor in 0..3 {
            assert_eq!(table.find(visitor, T0, T0), Found::Of { start_ms: T0 });
        }
        assert!((3..100_000).all(|visitor| table.find(visitor, T0 + 1, T0 + 1) == Found::Full));
        assert_eq!(table.find(0, T0 + MINUTE, T0 + MINUTE), Found::Of { start_ms: T0 });
        // Who is not seen any more makes room after two time-outs.
        let later = T0 + 61 * MINUTE;
        table.find(0, later - 31 * MINUTE, later - 31 * MINUTE);
        assert_eq!(table.find(99, later, later), Found::Of { start_ms: later });
    }

    #[test]
    fn ten_million_visitors_take_no_more_room_than_is_allowed() {
        let mut table = Table::new(RULES, 12_500);
        for visitor in 0..10_000_000_u128 {
            let now = T0 + visitor as i64;
            table.find(visitor.wrapping_mul(0x9e37_79b9_7f4a_7c15), now, now);
            assert!(table.len() <= 12_500);
        }
        // Of 16 such tables: half of SESSIONS_MAX's 24 MB may stand empty, not more.
        let capacity = table.recent.capacity() + table.older.capacity();
        assert!(capacity <= 2 * 14_336, "room for {capacity}");
        assert_eq!(mem::size_of::<(u128, Visits)>(), 48);
    }

    /// The rules, over a list of all that was seen.
    #[derive(Default)]
    struct Model {
        sessions: Vec<(i64, i64)>,
    }

    impl Model {
        fn find(&mut self, time: i64, now: i64) -> Found {
            if (now - time).abs() > RULES.timeout_ms {
                return Found::None;
            }
            let belongs = |(start, last): (i64, i64)| {
                start <= time && time <= last + RULES.timeout_ms && time - start < RULES.length_ms_max
            };
            let mut of_late = self.sessions.iter_mut().rev().take(2);
            match (of_late.next(), of_late.next()) {
                (Some(newest), _) if belongs(*newest) => {
                    newest.1 = newest.1.max(time);
                    Found::Of { start_ms: newest.0 }
                }
                (Some(newest), before) if time < newest.0 => match before {
                    Some(before) if belongs(*before) => Found::Of { start_ms: before.0 },
                    _ => Found::None,
                },
                _ => {
                    self.sessions.push((time, time));
                    Found::Of { start_ms: time }
                }
            }
        }
    }

    fn permutations(of: &[i64]) -> Vec<Vec<i64>> {
        if of.is_empty() {
            return vec![Vec::new()];
        }
        let each = |place: usize| {
            let mut rest = of.to_vec();
            let first = rest.remove(place);
            permutations(&rest).into_iter().map(move |tail| [vec![first], tail].concat())
        };
        (0..of.len()).flat_map(each).collect()
    }

    /// What the sessions of events are, once each carries its own.
    fn sessions_of(stamped: &[(i64, Option<i64>)]) -> Vec<(i64, i64, i64, usize)> {
        let mut sessions: Vec<(i64, i64, i64, usize)> = Vec::new();
        for (time, start) in stamped {
            let Some(start) = start else { continue };
            match sessions.iter_mut().find(|(id, ..)| id == start) {
                Some((_, first, last, events)) => {
                    (*first, *last, *events) = ((*first).min(*time), (*last).max(*time), *events + 1);
                }
                None => sessions.push((*start, *time, *time, 1)),
            }
        }
        sessions.sort_unstable();
        sessions
    }

    /// Six events, two sessions, in each of the 720 orders in which they can come: the table
    /// does what the rules say, what it said once holds, and from then on no order of
    /// arrival, replay or duplicate changes a session.
    #[test]
    fn every_order_of_six_events_obeys_the_rules_and_what_is_stamped_is_one_result() {
        let times = [0, 4, 9, 41, 45, 52].map(|minute| T0 + minute * MINUTE);
        let now = T0 + 30 * MINUTE;
        let mut in_order = Vec::new();
        for order in permutations(&times) {
            let (mut table, mut model) = (table(), Model::default());
            let stamped: Vec<_> = order
                .iter()
                .map(|time| {
                    let found = table.find(7, *time, now);
                    assert_eq!(found, model.find(*time, now), "{order:?}");
                    let start = match found {
                        Found::Of { start_ms } => Some(start_ms),
                        _ => None,
                    };
                    assert!(start.is_none_or(|start| start <= *time && time - start < 24 * HOUR));
                    (*time, start)
                })
                .collect();
            let sessions = sessions_of(&stamped);
            for again in permutations(&times) {
                let replayed: Vec<_> = again
                    .iter()
                    .flat_map(|time| stamped.iter().filter(move |(stamped, _)| stamped == time))
                    .copied()
                    .collect();
                assert_eq!(sessions_of(&replayed), sessions);
            }
            if order == times {
                in_order = sessions;
            }
        }
        assert_eq!(in_order, [(times[0], times[0], times[2], 3), (times[3], times[3], times[5], 3)]);
    }

    proptest! {
        #[test]
        fn the_table_does_what_the_rules_say(
            steps in prop::collection::vec((0..29 * MINUTE, -30 * MINUTE..=30 * MINUTE), 1..60),
        ) {
            let (mut table, mut model, mut now) = (table(), Model::default(), T0);
            for (passed, off) in steps {
                // After a longer gap a visitor may be forgotten, whom the model never forgets.
                now += passed;
                prop_assert_eq!(table.find(1, now + off, now), model.find(now + off, now));
            }
        }
    }
}
