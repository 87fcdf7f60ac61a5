//! Whether the wall clock can be asked how old an event is.
//!
//! A machine may start with a clock that is years off and set it later, or set
//! it, or sleep, while the relay runs. If ages were believed then, the whole log
//! would expire at once. So an age counts only while the wall clock is where it
//! must be: at the start, not before the time that the log last saw and not
//! later than the retention of its events after it; from then on, where the
//! monotonic clock says. A clock that is somewhere else is believed after the
//! two have gone together for an hour: a relay may have been down for longer than
//! its retention, and a machine may have slept.

use std::time::{Duration, Instant};

/// See the module. A pure value that takes both clocks as arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AgeCheck {
    /// What is known of the wall clock; nothing about that of a new log.
    known: Option<Known>,
    /// How long a log may have been left alone.
    left_alone_max: Duration,
    /// Since when the two clocks go together, as far as was looked.
    together_since: Option<(i64, Instant)>,
}

/// What time it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// When an earlier process wrote the log last.
    LastSeen(i64),
    /// At a moment of this process.
    At(i64, Instant),
}

impl AgeCheck {
    /// How far the two clocks may differ.
    const DIFFERENCE_MAX_MS: u64 = 60_000;
    /// How long they have to go together until the wall clock is believed.
    const CONFIRMED_AFTER: Duration = Duration::from_secs(3600);

    /// For a log that was last written at a time, if it ever was, and whose
    /// events are kept so long.
    pub(crate) fn new(last_seen_ms: Option<i64>, retention: Duration) -> Self {
        Self {
            known: last_seen_ms.map(Known::LastSeen),
            // An hour is what confirming would take.
            left_alone_max: retention.max(Self::CONFIRMED_AFTER),
            together_since: None,
        }
    }

    /// True if ages can be judged now. To be asked now and then, all the time.
    pub(crate) fn judges(&mut self, now_ms: i64, now: Instant) -> bool {
        let is_right = match self.known {
            None => true,
            Some(Known::LastSeen(then_ms)) => {
                let away_ms = now_ms.saturating_sub(then_ms);
                u64::try_from(away_ms).map_or(away_ms.unsigned_abs() <= Self::DIFFERENCE_MAX_MS, |away_ms| {
                    u128::from(away_ms) <= self.left_alone_max.as_millis()
                })
            }
            Some(Known::At(then_ms, then)) => Self::go_together((then_ms, then), now_ms, now),
        };
        let since = self.together_since.filter(|since| Self::go_together(*since, now_ms, now));
        let since = since.unwrap_or((now_ms, now));
        self.together_since = Some(since);
        let is_believed = is_right || now.saturating_duration_since(since.1) >= Self::CONFIRMED_AFTER;
        if is_believed {
            self.known = Some(Known::At(now_ms, now));
        }
        is_believed
    }

    fn go_together((then_ms, then): (i64, Instant), now_ms: i64, now: Instant) -> bool {
        let elapsed_ms = i64::try_from(now.saturating_duration_since(then).as_millis()).unwrap_or(i64::MAX);
        now_ms.abs_diff(then_ms.saturating_add(elapsed_ms)) <= Self::DIFFERENCE_MAX_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_767_225_600_000;
    const MINUTE_MS: i64 = 60_000;
    const HOUR_MS: i64 = 60 * MINUTE_MS;
    const DAY_MS: i64 = 24 * HOUR_MS;
    const YEAR_MS: i64 = 365 * DAY_MS;
    const RETENTION: Duration = Duration::from_secs(72 * 3600);

    /// Minutes until ages are judged, of a clock that goes right from `now_ms`.
    fn judged_after_minutes(check: &mut AgeCheck, now_ms: i64, start: Instant) -> i64 {
        (0..).find(|minutes| check.judges(now_ms + minutes * MINUTE_MS, at(start, *minutes))).unwrap()
    }

    fn at(start: Instant, minutes: i64) -> Instant {
        start + Duration::from_secs(60 * u64::try_from(minutes).unwrap())
    }

    #[test]
    fn a_start_is_believed_if_the_clock_is_near_to_what_the_log_last_saw_and_else_after_an_hour() {
        for (away_ms, minutes) in [
            (0, 0),
            (-MINUTE_MS, 0),
            (71 * HOUR_MS, 0),
            (73 * HOUR_MS, 60),
            (4 * DAY_MS, 60),
            (2 * YEAR_MS, 60),
            // It catches up.
            (-2 * MINUTE_MS, 1),
            (-2 * HOUR_MS, 60),
            (-NOW_MS, 60),
            (i64::MIN, 60),
        ] {
            let mut check = AgeCheck::new(Some(NOW_MS), RETENTION);
            let now_ms = NOW_MS.saturating_add(away_ms);
            assert_eq!(judged_after_minutes(&mut check, now_ms, Instant::now()), minutes, "{away_ms}");
        }
        assert!(
            AgeCheck::new(None, RETENTION).judges(-5, Instant::now()),
            "a new log has nothing that is old"
        );
    }

    #[test]
    fn a_clock_that_is_put_right_after_the_start_is_believed_at_once() {
        for wrong_ms in [0, NOW_MS + 2 * YEAR_MS] {
            let (mut check, start) = (AgeCheck::new(Some(NOW_MS), RETENTION), Instant::now());
            for minutes in 0..50 {
                assert!(!check.judges(wrong_ms + minutes * MINUTE_MS, at(start, minutes)));
            }
            assert!(check.judges(NOW_MS + 50 * MINUTE_MS, at(start, 50)), "{wrong_ms}");
        }
    }

    #[test]
    fn a_clock_that_is_set_while_the_relay_runs_is_not_believed_until_it_is_right_or_stays_so() {
        let (mut check, start) = (AgeCheck::new(Some(NOW_MS), RETENTION), Instant::now());
        assert!(check.judges(NOW_MS, start));
        // By less than the retention too: here the monotonic clock knows.
        let set_ms = NOW_MS + 5 * HOUR_MS;
        for minutes in 1..40 {
            assert!(!check.judges(set_ms + minutes * MINUTE_MS, at(start, minutes)), "{minutes}");
        }
        assert!(check.judges(NOW_MS + 40 * MINUTE_MS, at(start, 40)), "right again");
        assert_eq!(judged_after_minutes(&mut check, set_ms + 40 * MINUTE_MS, at(start, 40)), 60);
        assert!(check.judges(set_ms + 101 * MINUTE_MS, at(start, 101)));
    }

    #[test]
    fn a_clock_that_is_set_again_and_again_is_never_believed_and_one_that_drifts_always() {
        let (mut check, start) = (AgeCheck::new(Some(NOW_MS), RETENTION), Instant::now());
        for minutes in 0..500 {
            let set_ms = NOW_MS + YEAR_MS + minutes / 50 * DAY_MS;
            assert!(!check.judges(set_ms + minutes * MINUTE_MS, at(start, minutes)), "{minutes}");
        }
        let mut check = AgeCheck::new(Some(NOW_MS), RETENTION);
        for minutes in 0..500 {
            assert!(check.judges(NOW_MS + minutes * (MINUTE_MS + 1000), at(start, minutes)), "{minutes}");
        }
    }
}
