//! How often the same line is written.

use std::time::{Duration, Instant};

/// Lines of one kind that are written in a second.
const LINES_A_SECOND: u32 = 10;

/// Lets ten lines of one kind through in a second, which begins with the first
/// of them, and adds up the others for one line that stands for them. Who owns it
/// asks for that line when [`LogBudget::due_at`] comes, and at its end.
#[derive(Debug, Default)]
pub(crate) struct LogBudget {
    /// When the second ends.
    second_ends: Option<Instant>,
    /// Lines that were written in it.
    written: u32,
    held: HeldBack,
    due_at: Option<Instant>,
}

/// Lines that were not written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct HeldBack {
    /// How many.
    pub(crate) lines: u64,
    /// Events that they were about.
    pub(crate) events: u64,
}

impl LogBudget {
    /// True if a line about so many events is written; else it is added up.
    pub(crate) fn takes(&mut self, events: usize, now: Instant) -> bool {
        if self.second_ends.is_none_or(|end| end <= now) {
            self.second_ends = Some(now + Duration::from_secs(1));
            self.written = 0;
        }
        if self.written < LINES_A_SECOND {
            self.written += 1;
            return true;
        }
        self.held.lines += 1;
        self.held.events += events as u64;
        self.due_at = self.due_at.or(self.second_ends);
        false
    }

    /// When the line that stands for the others is due.
    pub(crate) fn due_at(&self) -> Option<Instant> {
        self.due_at
    }

    /// What a line has to stand for, if it is due.
    pub(crate) fn due(&mut self, now: Instant) -> Option<HeldBack> {
        self.due_at.filter(|due_at| *due_at <= now)?;
        self.rest()
    }

    /// What a line has to stand for, due or not: for the end.
    pub(crate) fn rest(&mut self) -> Option<HeldBack> {
        self.due_at.take()?;
        Some(std::mem::take(&mut self.held))
    }
}

/// Lets one line through in a while, with the number of all that it stands for.
#[derive(Debug)]
pub(crate) struct OnceInAWhile {
    interval: Duration,
    written: Option<Instant>,
    /// Since then.
    count: u64,
}

impl OnceInAWhile {
    pub(crate) fn every(interval: Duration) -> Self {
        Self { interval, written: None, count: 0 }
    }

    /// Adds so many; how many a line stands for that is to be written now, if one is.
    pub(crate) fn takes(&mut self, count: u64, now: Instant) -> Option<u64> {
        self.count += count;
        if self.written.is_some_and(|written| now.duration_since(written) < self.interval) {
            return None;
        }
        self.written = Some(now);
        Some(std::mem::take(&mut self.count))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_eleventh_line_of_a_second_waits_for_its_end() {
        let (mut budget, start) = (LogBudget::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert!((0..10).all(|ms| budget.takes(50, at(ms))));
        assert_eq!((budget.due_at(), budget.due(at(999))), (None, None));
        assert!(!budget.takes(50, at(500)) && !budget.takes(7, at(999)));
        assert_eq!((budget.due_at(), budget.due(at(999))), (Some(at(1000)), None));
        assert_eq!(budget.due(at(1000)), Some(HeldBack { lines: 2, events: 57 }));
        assert_eq!((budget.due(at(1000)), budget.rest()), (None, None));
        assert!(budget.takes(50, at(1000)), "a new second");
    }

    #[test]
    fn what_is_held_back_at_the_end_is_told_before_its_time() {
        let (mut budget, now) = (LogBudget::default(), Instant::now());
        assert_eq!((0..15).filter(|_| budget.takes(2, now)).count(), 10);
        assert_eq!(budget.rest(), Some(HeldBack { lines: 5, events: 10 }));
        assert_eq!(budget.rest(), None);
    }

    #[test]
    fn a_line_in_a_while_stands_for_all_since_the_last() {
        let (mut once, start) = (OnceInAWhile::every(Duration::from_secs(60)), Instant::now());
        let mut takes = |count, seconds| once.takes(count, start + Duration::from_secs(seconds));
        assert_eq!([takes(1, 0), takes(2, 1), takes(3, 59)], [Some(1), None, None]);
        assert_eq!([takes(4, 60), takes(5, 61), takes(6, 200)], [Some(9), None, Some(11)]);
    }

    proptest! {
        /// However lines come, and however late somebody asks: all are written or
        /// stood for, and no span of a second touches more than two seconds' lines.
        #[test]
        fn every_line_is_written_or_stood_for(
            lines in prop::collection::vec((0_u64..40, 0_usize..60, any::<bool>()), 1..300)
        ) {
            let (mut budget, start) = (LogBudget::default(), Instant::now());
            let (mut now, mut came, mut told) = (start, (0, 0), (0, 0));
            let mut written_at = Vec::new();
            for (gap_ms, events, asks) in lines {
                now += Duration::from_millis(gap_ms);
                came = (came.0 + 1, came.1 + events as u64);
                if budget.takes(events, now) {
                    told = (told.0 + 1, told.1 + events as u64);
                    written_at.push(now);
                }
                if let Some(held) = asks.then(|| budget.due(now)).flatten() {
                    told = (told.0 + held.lines, told.1 + held.events);
                }
            }
            let rest = budget.rest().unwrap_or_default();
            prop_assert_eq!(came, (told.0 + rest.lines, told.1 + rest.events));
            for at in &written_at {
                let span = *at..*at + Duration::from_secs(1);
                let lines = written_at.iter().filter(|other| span.contains(*other)).count();
                prop_assert!(lines <= 2 * LINES_A_SECOND as usize);
            }
        }
    }
}
