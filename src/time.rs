//! The wall clock, passed in so that tests can set it, and whether it can be
//! believed. Waiting is measured by tokio's monotonic clock instead, which tests
//! can pause.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jiff::Timestamp;
use tokio::time::Instant;

/// Tells the time of day.
#[derive(Clone)]
pub(crate) struct Clock(Arc<dyn Fn() -> i64 + Send + Sync>);

impl Clock {
    /// The machine's clock.
    pub(crate) fn system() -> Self {
        Self::from_fn(|| {
            let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
            i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
        })
    }

    /// A clock that says what `now_ms` returns.
    pub(crate) fn from_fn(now_ms: impl Fn() -> i64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(now_ms))
    }

    /// Unix time in milliseconds.
    pub(crate) fn now_ms(&self) -> i64 {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// Tells whether the wall clock can be believed, so that the age of an event can be
/// judged by it: it must have gone as far as the monotonic one since both were last
/// believed, and show no time before this program was written.
///
/// One that was set comes back at once when it is set back. One that stays where it
/// was set, or that went on while a machine was suspended, is believed after as long
/// as it has jumped: a person who sees a wrong clock has that time to mend it.
#[derive(Debug, Clone)]
pub(crate) struct WallCheck {
    /// The last moment at which it was believed.
    agreed: Option<Moment>,
    /// From when on it has gone as the monotonic clock does, but from elsewhere.
    doubted: Option<Moment>,
}

/// One moment, by both clocks.
#[derive(Debug, Clone, Copy)]
struct Moment {
    wall_ms: i64,
    at: Instant,
}

impl Moment {
    /// How far the wall clock has gone more, or less, than the monotonic one since
    /// an earlier moment.
    fn jumped_since(self, earlier: Self) -> Duration {
        let elapsed = self.at.saturating_duration_since(earlier.at).as_millis();
        let elapsed_ms = i64::try_from(elapsed).unwrap_or(i64::MAX);
        let by_wall_ms = self.wall_ms.saturating_sub(earlier.wall_ms);
        Duration::from_millis(by_wall_ms.abs_diff(elapsed_ms))
    }
}

impl WallCheck {
    /// 2026-01-01T00:00:00Z: a clock that shows less is wrong, as that of a machine
    /// without a battery is before it has asked for the time.
    pub(crate) const EARLIEST_MS: i64 = 1_767_225_600_000;
    /// How far the two clocks may differ.
    const DIFFERENCE_MAX: Duration = Duration::from_secs(60);
    /// After how long a clock that was set is believed: as long as it has jumped,
    /// within these bounds.
    const BELIEVED_AFTER: (Duration, Duration) = (Duration::from_secs(600), Duration::from_secs(6 * 3600));

    pub(crate) fn new(now_ms: i64, now: Instant) -> Self {
        let mut check = Self { agreed: None, doubted: None };
        check.is_trusted(now_ms, now);
        check
    }

    /// True if the wall clock, which shows this, can be believed now.
    pub(crate) fn is_trusted(&mut self, now_ms: i64, now: Instant) -> bool {
        let here = Moment { wall_ms: now_ms, at: now };
        if now_ms < Self::EARLIEST_MS {
            return false;
        }
        let jump = self.agreed.map_or(Duration::ZERO, |agreed| here.jumped_since(agreed));
        if jump > Self::DIFFERENCE_MAX && !self.is_settled(here, jump) {
            return false;
        }
        (self.agreed, self.doubted) = (Some(here), None);
        true
    }

    /// True if a clock that has jumped so far has gone on steadily for long enough.
    fn is_settled(&mut self, here: Moment, jump: Duration) -> bool {
        let since = *self.doubted.get_or_insert(here);
        if here.jumped_since(since) > Self::DIFFERENCE_MAX {
            self.doubted = Some(here);
            return false;
        }
        let (least, most) = Self::BELIEVED_AFTER;
        here.at.saturating_duration_since(since.at) >= jump.clamp(least, most)
    }
}

/// A [`Clock`] and its [`WallCheck`], for those who judge together.
#[derive(Debug, Clone)]
pub(crate) struct CheckedClock {
    clock: Clock,
    check: Arc<Mutex<WallCheck>>,
}

impl CheckedClock {
    pub(crate) fn new(clock: Clock) -> Self {
        // Not asked before it is used: a test's clock may have nothing to say yet.
        let check = Arc::new(Mutex::new(WallCheck { agreed: None, doubted: None }));
        Self { clock, check }
    }

    /// Unix time in milliseconds, right or wrong.
    pub(crate) fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }

    /// True if the clock can be believed now.
    pub(crate) fn is_trusted(&self) -> bool {
        let mut check = self.check.lock().unwrap_or_else(PoisonError::into_inner);
        check.is_trusted(self.clock.now_ms(), Instant::now())
    }
}

/// Unix milliseconds as RFC 3339, UTC.
pub(crate) fn rfc_3339(unix_ms: i64) -> String {
    Timestamp::from_millisecond(unix_ms).map_or_else(|_| unix_ms.to_string(), |time| format!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const START_MS: i64 = WallCheck::EARLIEST_MS + 1_000_000;

    /// What a clock is taken for that shows these times, each after so many seconds.
    fn judged(shown: &[(u64, i64)]) -> Vec<bool> {
        let start = Instant::now();
        let mut check = WallCheck::new(START_MS, start);
        let judge = |(seconds, shows_ms): &(u64, i64)| {
            check.is_trusted(*shows_ms, start + Duration::from_secs(*seconds))
        };
        shown.iter().map(judge).collect()
    }

    /// What a clock shows that is so many seconds ahead of the right time.
    fn ahead(seconds: u64, ahead_seconds: i64) -> (u64, i64) {
        (seconds, START_MS + (i64::try_from(seconds).unwrap() + ahead_seconds) * 1000)
    }

    #[test]
    fn a_clock_that_was_set_is_doubted_until_it_is_set_back() {
        let shown = [ahead(60, 0), ahead(120, 59), ahead(180, -3600), ahead(240, 86_400), ahead(300, 0)];
        assert_eq!(judged(&shown), [true, true, false, false, true]);
        assert_eq!(judged(&[(60, i64::MIN), (61, i64::MAX), ahead(62, 0)]), [false, false, true]);
    }

    #[test]
    fn a_clock_that_drifts_is_followed() {
        let drifting: Vec<_> =
            (1..100).map(|hour| ahead(hour * 3600, i64::try_from(hour * 30).unwrap())).collect();
        assert!(judged(&drifting).iter().all(|trusted| *trusted));
    }

    /// A machine was suspended: the wall clock went on, the monotonic one did not.
    #[test]
    fn after_a_suspension_the_clock_is_believed_again_without_a_restart() {
        let asleep = 1800;
        let shown = [10, 60, 1000, 1809, 1811, 5000].map(|seconds| ahead(seconds, asleep));
        assert_eq!(judged(&shown), [false, false, false, false, true, true]);
        // However long it was.
        let shown = [10, 21_600, 21_611].map(|seconds| ahead(seconds, 30 * 86_400));
        assert_eq!(judged(&shown), [false, false, true]);
        // A clock that is set again and again is not.
        let shown =
            [10, 1000, 2000, 3000].map(|seconds| ahead(seconds, i64::try_from(seconds).unwrap() * 10));
        assert_eq!(judged(&shown), [false; 4]);
    }

    #[test]
    fn a_clock_that_shows_a_time_before_the_program_was_written_is_wrong_until_it_does_not() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut check = WallCheck::new(1000, start);
        assert!(!check.is_trusted(61_000, after(60)));
        assert!(check.is_trusted(START_MS, after(61)), "it has asked for the time");
        assert!(!check.is_trusted(1000, after(62)));
        assert!(check.is_trusted(START_MS + 2000, after(63)));
    }
}
