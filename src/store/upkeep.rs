//! What is done to the store beside writing and asking: it is opened if it could not be at
//! the start, counted, told who is erased, freed of what is too old, and tidied at night.

use std::time::Duration;

use analytics_relay_store::{StoreError, TenantScope};
use jiff::{Timestamp, ToSpan, civil::time, tz::TimeZone};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{error, info, warn};

use super::{
    Backend, OpenStore,
    erasures::{Erased, ErasureError, Erasures},
};
use crate::{
    shutdown::Stop,
    time::{CheckedClock, Clock},
};

/// Between two looks at who is to be erased.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Between two counts of what is in it, two errors of one sort.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);
const TELL_INTERVAL: Duration = Duration::from_secs(60);
/// Between two looks whether a server is there.
const SERVER_INTERVAL: Duration = Duration::from_secs(2);
/// Between two tries to erase somebody after one that failed: at first, and at most. Each may
/// keep the writer for long.
const ERASE_PAUSE: Duration = Duration::from_secs(1);
const ERASE_PAUSE_MAX: Duration = Duration::from_secs(5 * 60);
/// Between two tries to open it: at first, and at most.
const OPEN_PAUSE: Duration = Duration::from_millis(500);
const OPEN_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Between two looks whether something is too old, or it is night.
const NIGHT_LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// Between two deletions of what is too old.
const RETAIN_INTERVAL_MS: i64 = 60 * 60 * 1000;
/// A start has other things to do.
const FIRST_AFTER_MS: i64 = 10 * 60 * 1000;
/// What came before is to be in blocks, however few it is.
pub(crate) const HOT_MS_MAX: i64 = 24 * 60 * 60 * 1000;
/// Relays do not tidy at the same time.
const NIGHT_SPREAD_MINUTES: i64 = 60;

/// Keeps the store for as long as the relay runs.
pub(super) struct Upkeep {
    pub(super) store: OpenStore,
    pub(super) erasures: Erasures,
    pub(super) clock: Clock,
    pub(super) zone: TimeZone,
    pub(super) stop: Stop,
}

impl Upkeep {
    /// Ends when the relay drains. What is under way then ends by itself, or is done by the
    /// next run.
    pub(super) async fn run(self) {
        tokio::select! {
            () = self.watch() => {}
            () = self.watch_server() => {}
            () = self.tidy_at_night() => {}
            () = self.stop.draining() => {}
        }
    }

    async fn watch(&self) {
        let mut looks = interval(LOOK_INTERVAL);
        let (mut opens_at, mut counts_at, mut tells_at) = (Instant::now(), Instant::now(), Instant::now());
        let mut pause = OPEN_PAUSE;
        let (mut erases_at, mut erase_pause) = (Instant::now(), ERASE_PAUSE);
        if let Err(error) = self.erasures.forget_outcomes() {
            warn!(%error, "what came of earlier erasures cannot be removed");
        }
        loop {
            let now = looks.tick().await;
            if !self.store.status.is_open() {
                (erases_at, erase_pause) = (now, ERASE_PAUSE);
                // One that was lost is looked at beside this.
                if now >= opens_at && self.store.backend().is_none() {
                    self.open().await;
                    opens_at = Instant::now() + pause;
                    pause = (2 * pause).min(OPEN_PAUSE_MAX);
                }
                continue;
            }
            pause = OPEN_PAUSE;
            if now >= counts_at {
                self.count().await;
                counts_at = Instant::now() + COUNT_INTERVAL;
            }
            if now < erases_at {
                continue;
            }
            let erased = self.erasures.work_off(&*self.store.store).await;
            if erased.is_ok() {
                erase_pause = ERASE_PAUSE;
            } else {
                erases_at = Instant::now() + erase_pause;
                erase_pause = (2 * erase_pause).min(ERASE_PAUSE_MAX);
            }
            match erased {
                Ok(erased) if erased == Erased::default() => {}
                Ok(Erased { events, facts }) => {
                    info!(events, facts, "erased users are deleted from the store")
                }
                Err(ErasureError::Store(StoreError::Closed)) => {}
                Err(error) if now >= tells_at => {
                    error!(%error, "erased users cannot be deleted from the store yet: it is tried again");
                    tells_at = now + TELL_INTERVAL;
                }
                Err(_) => {}
            }
        }
    }

    /// Looks whether a server is there, or back: beside all else, so that none of it, however
    /// long it takes, hides that the server is lost.
    async fn watch_server(&self) {
        let mut looks = interval(SERVER_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            if self.store.backend().is_none() {
                continue;
            }
            let was_open = self.store.status.is_open();
            self.store.front.look().await;
            if !was_open && self.store.status.is_open() {
                info!("the store is open now");
            }
        }
    }

    /// Opens it. Why it cannot be is told by who finds out.
    async fn open(&self) {
        if self.store.front.open().await.is_ok() {
            info!("the store is open now");
        }
    }

    async fn count(&self) {
        let status = &self.store.status;
        let counted = match self.store.backend() {
            Some(Backend::Embedded(embedded)) => embedded.stats().await.map(|stats| status.counted(stats)),
            Some(Backend::Server(server)) => {
                server.stats().await.map(|stats| status.counted_in_server(stats))
            }
            None => return,
        };
        match counted {
            Ok(()) | Err(StoreError::Closed) => {}
            Err(error) => warn!(%error, "what is in the store cannot be counted"),
        }
    }

    async fn tidy_at_night(&self) {
        // A clock that was set must not delete what is young.
        let clock = CheckedClock::new(self.clock.clone());
        let spread = spread_minutes();
        let mut due = Due::after_start(clock.now_ms());
        let mut looks = interval(NIGHT_LOOK_INTERVAL);
        loop {
            looks.tick().await;
            let now_ms = clock.now_ms();
            if !clock.is_trusted() || !self.store.status.is_open() {
                continue;
            }
            if now_ms >= due.retain_ms {
                self.keep_partitions(now_ms).await;
                self.retain().await;
                due.retain_ms = now_ms + RETAIN_INTERVAL_MS;
            }
            if now_ms >= due.tidy_ms {
                self.tidy(now_ms).await;
                due.tidy_ms = next_night(now_ms, &self.zone, spread);
            }
        }
    }

    /// Deletes what is too old.
    pub(super) async fn retain(&self) {
        let Some(from_ms) = self.store.front.kept_from_ms() else { return };
        match self.store.store.retain(&TenantScope::tenant(""), from_ms).await {
            Ok(deleted) if deleted.events > 0 => {
                info!(events = deleted.events, "what is older than RETENTION_DAYS is deleted from the store");
            }
            Ok(_) | Err(StoreError::Closed) => {}
            Err(error) => warn!(%error, "what is older than RETENTION_DAYS cannot be deleted from the store"),
        }
    }

    /// In a server each day has a partition, which is made before it comes and dropped with all
    /// that is in it.
    async fn keep_partitions(&self, now_ms: i64) {
        let Some(Backend::Server(server)) = self.store.backend() else { return };
        match server.upkeep(now_ms, self.store.front.kept_from_ms()).await {
            Ok((0, 0)) | Err(StoreError::Closed) => {}
            Ok((moved, dropped)) => {
                info!(events_moved = moved, days_dropped = dropped, "the partitions of the store are kept");
            }
            Err(error) => warn!(%error, "the partitions of the store cannot be kept: it is tried again"),
        }
    }

    async fn tidy(&self, now_ms: i64) {
        let Some(Backend::Embedded(embedded)) = self.store.backend() else { return };
        match embedded.tidy(now_ms - HOT_MS_MAX).await {
            Ok(merged) => info!(merged, "the store is tidied"),
            Err(StoreError::Closed) => {}
            Err(error) => warn!(%error, "the store cannot be tidied: it is tried again the next night"),
        }
    }
}

/// When what is to be done, in Unix milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Due {
    retain_ms: i64,
    tidy_ms: i64,
}

impl Due {
    /// A machine that is off at night has a store all the same.
    fn after_start(now_ms: i64) -> Self {
        Self { retain_ms: now_ms + FIRST_AFTER_MS, tidy_ms: now_ms + FIRST_AFTER_MS }
    }
}

/// How late this relay tidies at night.
fn spread_minutes() -> i64 {
    fastrand::i64(0..NIGHT_SPREAD_MINUTES)
}

/// The next time that it is three o'clock and so many minutes.
fn next_night(now_ms: i64, zone: &TimeZone, spread_minutes: i64) -> i64 {
    let next = || {
        let now = Timestamp::from_millisecond(now_ms).ok()?.to_zoned(zone.clone());
        let tonight = now.date().to_datetime(time(3, 0, 0, 0)).checked_add(spread_minutes.minutes()).ok()?;
        let nights = [tonight, tonight.checked_add(1.day()).ok()?];
        let mut nights = nights.into_iter().filter_map(|night| night.to_zoned(zone.clone()).ok());
        nights.find(|night| *night > now).map(|night| night.timestamp().as_millisecond())
    };
    next().unwrap_or_else(|| now_ms.saturating_add(HOT_MS_MAX))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::store::front::tests::{DAY_MS, event_at, front};

    #[test]
    fn a_relay_tidies_within_an_hour_after_three() {
        for _ in 0..100 {
            let spread = spread_minutes();
            assert!((0..NIGHT_SPREAD_MINUTES).contains(&spread), "{spread}");
            let next_ms = next_night(0, &TimeZone::UTC, spread);
            assert_eq!(next_ms, (180 + spread) * 60_000);
        }
    }

    #[test]
    fn nights_follow_the_zones_clock() {
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        let at = |text: &str| text.parse::<Timestamp>().unwrap().as_millisecond();
        for (now, zone, want) in [
            ("2026-01-10T01:59:00Z", &TimeZone::UTC, "2026-01-10T03:20:00Z"),
            ("2026-01-10T03:20:00Z", &TimeZone::UTC, "2026-01-11T03:20:00Z"),
            ("2026-01-10T01:59:00Z", &berlin, "2026-01-10T02:20:00Z"),
            // The clock goes forward at two.
            ("2026-03-28T12:00:00Z", &berlin, "2026-03-29T01:20:00Z"),
        ] {
            assert_eq!(next_night(at(now), zone, 20), at(want), "{now}");
        }
        assert!(next_night(i64::MAX, &berlin, 20) >= i64::MAX - HOT_MS_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn it_goes_on_behind_its_first_tidying() {
        let dir = tempfile::tempdir().unwrap();
        let (front, now) = front(dir.path(), &[("RETENTION_DAYS", "30")]);
        let store = OpenStore::of(front);
        store.front.open().await.unwrap();
        let (start_ms, since) = (now.load(Ordering::Relaxed), Instant::now());
        let batch = [event_at("a", start_ms - 31 * DAY_MS), event_at("a", start_ms - 2 * DAY_MS)];
        store.store.append(&batch).await.unwrap();
        let upkeep = Upkeep {
            store: store.clone(),
            erasures: Erasures::new(dir.path()),
            clock: Clock::from_fn(move || start_ms + since.elapsed().as_millis() as i64),
            zone: TimeZone::UTC,
            stop: Stop::default(),
        };
        let status = store.status.clone();
        let tidied = async {
            let is_tidied = || (status.stats().events, status.stats().blocks) == (1, 1);
            while !is_tidied() {
                tokio::time::sleep(NIGHT_LOOK_INTERVAL).await;
            }
            tokio::time::sleep(2 * NIGHT_LOOK_INTERVAL).await;
        };
        tokio::select! {
            () = upkeep.run() => panic!("it ended"),
            tidied = tokio::time::timeout(Duration::from_secs(86_400), tidied) => tidied.expect("it is tidied"),
        }
        assert!(since.elapsed() >= Duration::from_millis(FIRST_AFTER_MS as u64));
        store.close().await;
    }

    #[tokio::test]
    async fn what_is_too_old_is_not_only_hidden() {
        let dir = tempfile::tempdir().unwrap();
        let (front, now) = front(dir.path(), &[("RETENTION_DAYS", "30")]);
        let store = OpenStore::of(front);
        store.front.open().await.unwrap();
        let now_ms = now.load(Ordering::Relaxed);
        let batch = [event_at("a", now_ms - 31 * DAY_MS), event_at("a", now_ms)];
        store.store.append(&batch).await.unwrap();
        let upkeep = Upkeep {
            store: store.clone(),
            erasures: Erasures::new(dir.path()),
            clock: Clock::system(),
            zone: TimeZone::UTC,
            stop: Stop::default(),
        };
        upkeep.retain().await;
        upkeep.count().await;
        assert_eq!(store.status.stats().events, 1);
        upkeep.tidy(now_ms + 2 * DAY_MS).await;
        upkeep.count().await;
        let stats = store.status.stats();
        assert_eq!((stats.events, stats.hot_events, stats.blocks), (1, 0, 1), "it is in a block");
        store.close().await;
    }
}
