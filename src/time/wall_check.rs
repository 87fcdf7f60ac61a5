//! Whether the wall clock can be believed, so that the age of an event can be judged
//! by it.
//!
//! A machine may start with a clock that is years off and set it later, or set it, or
//! sleep, while the relay runs. If ages were believed then, a whole log would expire
//! at once. So the clock is believed only while it is where it must be: at the start
//! not before the time that the log last saw, and not later than a log may have been
//! left alone; from then on, where the monotonic clock says. And it must show no time
//! before this program was written.
//!
//! A clock that was set comes back at once when it is set back. One that goes on from
//! where it was set is believed after an hour: a relay may have been down for longer
//! than its retention, and a machine may have slept. A person who sees a wrong clock
//! has that time to mend it.

use std::time::Duration;

use tokio::time::Instant;

/// See the module. A pure value that takes both clocks as arguments.
#[derive(Debug, Clone, Default)]
pub(crate) struct WallCheck {
    /// What is known of the wall clock, if anything.
    known: Option<Known>,
    /// From when on it has gone as the monotonic clock does, but from elsewhere.
    doubted: Option<Moment>,
}

/// What time it was.
#[derive(Debug, Clone, Copy)]
enum Known {
    /// When an earlier process wrote the log last, and how long that may be ago.
    LastSeen { wall_ms: i64, left_alone_max: Duration },
    /// At a moment of this process, the last at which the clock was believed.
    At(Moment),
}

/// One moment, by both clocks.
#[derive(Debug, Clone, Copy)]
struct Moment {
    wall_ms: i64,
    at: Instant,
}

impl Moment {
    /// True if both clocks have gone equally far since an earlier moment.
    fn follows(self, earlier: Self) -> bool {
        let elapsed = self.at.saturating_duration_since(earlier.at).as_millis();
        let elapsed_ms = i64::try_from(elapsed).unwrap_or(i64::MAX);
        let by_wall_ms = self.wall_ms.saturating_sub(earlier.wall_ms);
        by_wall_ms.abs_diff(elapsed_ms) <= WallCheck::DIFFERENCE_MAX_MS
    }
}

impl WallCheck {
    /// 2026-01-01T00:00:00Z: a clock that shows less is wrong, as that of a machine
    /// without a battery is before it has asked for the time.
    const EARLIEST_MS: i64 = 1_767_225_600_000;
    /// How far the two clocks may differ.
    const DIFFERENCE_MAX_MS: u64 = 60_000;
    /// How long they have to go together until a clock that was set is believed.
    const BELIEVED_AFTER: Duration = Duration::from_secs(3600);

    /// For a log that was last written at a time, if it ever was, and whose events are
    /// kept so long.
    pub(crate) fn of_log(last_seen_ms: Option<i64>, retention: Duration) -> Self {
        // Within an hour it would be believed in any case.
        let left_alone_max = retention.max(Self::BELIEVED_AFTER);
        let known = last_seen_ms.map(|wall_ms| Known::LastSeen { wall_ms, left_alone_max });
        Self { known, doubted: None }
    }

    /// True if the wall clock, which shows this, can be believed now. To be asked now
    /// and then, all the time.
    pub(crate) fn is_trusted(&mut self, now_ms: i64, now: Instant) -> bool {
        let here = Moment { wall_ms: now_ms, at: now };
        if now_ms < Self::EARLIEST_MS || !self.is_where_it_must_be(here) && !self.is_settled(here) {
            return false;
        }
        (self.known, self.doubted) = (Some(Known::At(here)), None);
        true
    }

    fn is_where_it_must_be(&self, here: Moment) -> bool {
        match self.known {
            None => true,
            Some(Known::At(then)) => here.follows(then),
            Some(Known::LastSeen { wall_ms, left_alone_max }) => {
                let away_ms = here.wall_ms.saturating_sub(wall_ms);
                u64::try_from(away_ms).map_or(away_ms.unsigned_abs() <= Self::DIFFERENCE_MAX_MS, |away_ms| {
                    u128::from(away_ms) <= left_alone_max.as_millis()
                })
            }
        }
    }

    /// True if a clock that is elsewhere has gone on steadily for long enough.
    fn is_settled(&mut self, here: Moment) -> bool {
        let since = *self.doubted.get_or_insert(here);
        if !here.follows(since) {
            self.doubted = Some(here);
            return false;
        }
        here.at.saturating_duration_since(since.at) >= Self::BELIEVED_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEN_MS: i64 = WallCheck::EARLIEST_MS + 100 * DAY_MS;
    const MINUTE_MS: i64 = 60_000;
    const HOUR_MS: i64 = 60 * MINUTE_MS;
    const DAY_MS: i64 = 24 * HOUR_MS;
    const YEAR_MS: i64 = 365 * DAY_MS;
    const RETENTION: Duration = Duration::from_secs(72 * 3600);

    fn of_log() -> (WallCheck, Instant) {
        (WallCheck::of_log(Some(SEEN_MS), RETENTION), Instant::now())
    }

    fn after(start: Instant, minutes: i64) -> Instant {
        start + Duration::from_secs(60 * u64::try_from(minutes).unwrap())
    }

    /// Minutes until a clock is trusted that goes on evenly from `now_ms`.
    fn trusted_after_minutes(check: &mut WallCheck, now_ms: i64, start: Instant) -> i64 {
        let is_trusted =
            |minutes: &i64| check.is_trusted(now_ms + minutes * MINUTE_MS, after(start, *minutes));
        (0..2000).find(is_trusted).unwrap()
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
            (-99 * DAY_MS, 60),
        ] {
            let (mut check, start) = of_log();
            assert_eq!(trusted_after_minutes(&mut check, SEEN_MS + away_ms, start), minutes, "{away_ms}");
        }
    }

    #[test]
    fn a_clock_that_is_put_right_after_the_start_is_believed_at_once() {
        for wrong_ms in [0, SEEN_MS + 2 * YEAR_MS] {
            let (mut check, start) = of_log();
            for minutes in 0..50 {
                assert!(!check.is_trusted(wrong_ms + minutes * MINUTE_MS, after(start, minutes)));
            }
            assert!(check.is_trusted(SEEN_MS + 50 * MINUTE_MS, after(start, 50)), "{wrong_ms}");
        }
    }

    /// By as little as the hours that a machine was suspended: the wall clock went on,
    /// the monotonic one did not.
    #[test]
    fn a_clock_that_is_set_while_the_relay_runs_is_not_believed_until_it_is_right_or_stays_so() {
        for set_ms in [-HOUR_MS, 2 * MINUTE_MS, 5 * HOUR_MS, YEAR_MS, i64::MIN, i64::MAX] {
            let (mut check, start) = of_log();
            assert!(check.is_trusted(SEEN_MS, start));
            let shown_ms = SEEN_MS.saturating_add(set_ms);
            for minutes in 1..40 {
                let shown_ms = shown_ms.saturating_add(minutes * MINUTE_MS);
                assert!(!check.is_trusted(shown_ms, after(start, minutes)), "{set_ms} {minutes}");
            }
            assert!(check.is_trusted(SEEN_MS + 40 * MINUTE_MS, after(start, 40)), "right again");
        }
        let (mut check, start) = of_log();
        assert!(check.is_trusted(SEEN_MS, start));
        let set_ms = SEEN_MS + 5 * HOUR_MS;
        assert_eq!(trusted_after_minutes(&mut check, set_ms, start), 60);
        assert!(check.is_trusted(set_ms + 61 * MINUTE_MS, after(start, 61)));
    }

    #[test]
    fn a_clock_that_is_set_again_and_again_is_never_believed_and_one_that_drifts_always() {
        let (mut check, start) = of_log();
        for minutes in 0..500 {
            let set_ms = SEEN_MS + YEAR_MS + minutes / 50 * DAY_MS;
            assert!(!check.is_trusted(set_ms + minutes * MINUTE_MS, after(start, minutes)), "{minutes}");
        }
        let (mut check, start) = of_log();
        for minutes in 0..500 {
            let drifted_ms = SEEN_MS + minutes * (MINUTE_MS + 1000);
            assert!(check.is_trusted(drifted_ms, after(start, minutes)), "{minutes}");
        }
    }

    #[test]
    fn a_clock_that_shows_a_time_before_the_program_was_written_is_wrong_until_it_does_not() {
        for mut check in [WallCheck::default(), WallCheck::of_log(None, RETENTION), of_log().0] {
            let start = Instant::now();
            for minutes in 0..100 {
                assert!(!check.is_trusted(1000 + minutes * MINUTE_MS, after(start, minutes)));
            }
            assert!(check.is_trusted(SEEN_MS, after(start, 100)), "it has asked for the time");
            assert!(!check.is_trusted(1000, after(start, 101)));
            assert!(check.is_trusted(SEEN_MS + 2 * MINUTE_MS, after(start, 102)));
        }
    }
}
