//! The wall clock, passed in so that tests can set it. Waiting is measured by
//! tokio's monotonic clock instead, which tests can pause.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jiff::Timestamp;
use tokio::time::Instant;

mod wall_check;

pub(crate) use wall_check::WallCheck;

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

/// A [`Clock`] and its [`WallCheck`], for those who judge together.
#[derive(Debug, Clone)]
pub(crate) struct CheckedClock {
    clock: Clock,
    check: Arc<Mutex<WallCheck>>,
}

impl CheckedClock {
    pub(crate) fn new(clock: Clock) -> Self {
        Self { clock, check: Arc::default() }
    }

    /// The same, of which it is known what time it was when it could be believed last, if it ever
    /// could. A clock that shows another day is to be believed only when it has gone on.
    pub(crate) fn of_last_seen(clock: Clock, last_ms: Option<i64>) -> Self {
        const LEFT_ALONE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
        Self { clock, check: Arc::new(Mutex::new(WallCheck::of_log(last_ms, LEFT_ALONE_MAX))) }
    }

    /// Unix time in milliseconds, right or wrong.
    pub(crate) fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }

    /// True if the clock can be believed now.
    pub(crate) fn is_trusted(&self) -> bool {
        self.trusted_ms().is_some()
    }

    /// What it shows, if it can be believed now: Unix milliseconds.
    pub(crate) fn trusted_ms(&self) -> Option<i64> {
        let mut check = self.check.lock().unwrap_or_else(PoisonError::into_inner);
        let now_ms = self.clock.now_ms();
        check.is_trusted(now_ms, Instant::now()).then_some(now_ms)
    }
}

/// Unix milliseconds as RFC 3339, UTC.
pub(crate) fn rfc_3339(unix_ms: i64) -> String {
    Timestamp::from_millisecond(unix_ms).map_or_else(|_| unix_ms.to_string(), |time| format!("{time:.3}"))
}
