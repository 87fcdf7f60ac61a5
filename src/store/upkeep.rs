//! What is done to the store beside writing and asking: it is opened if it could not be at
//! the start, counted, told who is erased, freed of what is too old, and tidied at night.

use std::time::Duration;

use analytics_relay_store::{StoreError, TenantScope};
use jiff::{Timestamp, ToSpan, civil::time, tz::TimeZone};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{error, info, warn};

use super::{
    Backend, OpenStore, Server,
    erasures::{Erased, ErasureError, Erasures},
    last_seen::LastSeen,
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
const ERASE_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Between two tries to open it: at first, and at most.
const OPEN_PAUSE: Duration = Duration::from_millis(500);
const OPEN_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Between two looks whether something is too old, or it is night.
const NIGHT_LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// Between two deletions of what is too old; it is of whole days.
const RETAIN_INTERVAL: Duration = Duration::from_secs(60 * 60);
const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// From a start to the first of all that.
const FIRST_AFTER: Duration = Duration::from_secs(10 * 60);
/// What came before is to be in blocks, however few it is.
pub(crate) const HOT_MS_MAX: i64 = DAY_MS;
/// Relays do not tidy at the same time.
const NIGHT_SPREAD_MINUTES: i64 = 60;

/// Keeps the store for as long as the relay runs.
pub(super) struct Upkeep {
    pub(super) store: OpenStore,
    pub(super) erasures: Erasures,
    pub(super) last_seen: LastSeen,
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
        let spread = spread_minutes();
        // A start has other things to do. What is due again soon goes by no clock that may be set.
        let (first, mut retains_at) = (Instant::now() + FIRST_AFTER, Instant::now() + FIRST_AFTER);
        let (mut clock, mut is_doubted, mut night_ms) = (None, false, None);
        let mut looks = interval(NIGHT_LOOK_INTERVAL);
        loop {
            looks.tick().await;
            if !self.store.status.is_open() {
                continue;
            }
            if clock.is_none() {
                clock = self.checked_clock().await;
            }
            let Some(clock) = &clock else { continue };
            let (now_ms, now, trusted_ms) = (clock.now_ms(), Instant::now(), clock.trusted_ms());
            let was_doubted = std::mem::replace(&mut is_doubted, trusted_ms.is_none());
            if is_doubted && !was_doubted {
                warn!(
                    "the clock was set, or the store was left alone for over a day: nothing is deleted from it \
                    by its age until the clock has gone on for an hour"
                );
            }
            // A clock that was set must not delete what is young.
            if let Some(trusted_ms) = trusted_ms.filter(|_| now >= retains_at) {
                self.keep(trusted_ms).await;
                retains_at = Instant::now() + RETAIN_INTERVAL;
            }
            let next_ms = next_night(now_ms, &self.zone, spread);
            // A machine that is off at night has a store all the same.
            if night_ms.map_or(now >= first, |night_ms| now_ms >= night_ms) {
                self.tidy(now_ms).await;
                night_ms = Some(next_ms);
            }
            // A clock that was ahead put it off.
            night_ms = night_ms.map(|night_ms| night_ms.min(next_ms));
        }
    }

    /// The clock, which must go on from where it could be believed last; where that was never
    /// noted, from when the newest event was.
    async fn checked_clock(&self) -> Option<CheckedClock> {
        let of = |last_ms| CheckedClock::of_last_seen(self.clock.clone(), last_ms);
        if let Some(last_ms) = self.last_seen.read() {
            return Some(of(Some(last_ms)));
        }
        match self.store.store.as_of(&TenantScope::tenant("")).await {
            Ok(as_of) => Some(of(as_of.last_ms)),
            Err(StoreError::Closed) => None,
            Err(error) => {
                warn!(%error, "up to when the store has events cannot be found out: it is tried again");
                None
            }
        }
    }

    /// Does what is due each hour, by a time that is believed.
    async fn keep(&self, now_ms: i64) {
        if let Err(error) = self.last_seen.note(now_ms) {
            warn!(%error, "what time it is cannot be noted for the next start");
        }
        // All of it by that time: the clock may be set meanwhile.
        let kept_from_ms = self.store.front.kept_from_ms(now_ms);
        self.keep_partitions(now_ms, kept_from_ms).await;
        if let Some(from_ms) = kept_from_ms {
            self.retain(from_ms).await;
        }
    }

    /// Deletes what is too old, by whole days: else a block of each website would be written
    /// anew each hour. What is too old within a day is hidden already.
    async fn retain(&self, from_ms: i64) {
        let Some(backend) = self.store.backend() else { return };
        let from_ms = from_ms.div_euclid(DAY_MS) * DAY_MS;
        let (tenants, mut failed) = match backend.tenants_before(from_ms).await {
            Ok(tenants) => (tenants, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let mut events = 0;
        for tenant in tenants {
            match self.store.store.retain(&TenantScope::tenant(tenant), from_ms).await {
                Ok(deleted) => events += deleted.events,
                // It holds up no other.
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if events > 0 {
            info!(events, "what is older than RETENTION_DAYS is deleted from the store");
        }
        match failed {
            None | Some(StoreError::Closed) => {}
            Some(error) => {
                warn!(%error, "what is older than RETENTION_DAYS cannot be deleted from the store");
            }
        }
    }

    /// In a server each day has a partition, which is made before it comes and dropped with all
    /// that is in it.
    async fn keep_partitions(&self, now_ms: i64, kept_from_ms: Option<i64>) {
        let Some(Backend::Server(server)) = self.store.backend() else { return };
        match self.keep_days(&server, now_ms, kept_from_ms).await {
            Ok((0, 0)) | Err(StoreError::Closed) => {}
            Ok((moved, dropped)) => {
                info!(events_moved = moved, days_dropped = dropped, "the partitions of the store are kept");
            }
            Err(error) => warn!(%error, "the partitions of the store cannot be kept: it is tried again"),
        }
    }

    /// Returns how many events were moved, and how many days were dropped. Whose some were is
    /// told, as [`Store::retain`](analytics_relay_store::Store::retain) has nothing left of them.
    async fn keep_days(
        &self,
        server: &Server,
        now_ms: i64,
        kept_from_ms: Option<i64>,
    ) -> Result<(u64, u64), StoreError> {
        let concerned = server.tenants_before(kept_from_ms.unwrap_or(i64::MIN)).await?;
        let done = server.upkeep(now_ms, kept_from_ms).await;
        // What failed may have been done in part.
        if !matches!(done, Ok((_, 0))) {
            concerned.iter().for_each(|tenant| self.store.front.has_changed(tenant));
        }
        done
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
    use std::{path::Path, sync::atomic::Ordering};

    use analytics_relay_providers::{Event, EventParts, MoreParts};

    use super::*;
    use crate::store::front::tests::{event_at, front};
    #[cfg(feature = "postgres")]
    use crate::store::test_server;

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

    /// Of one whose name a server keeps otherwise.
    fn of_another_tenant(event: &Event) -> Event {
        let more = MoreParts { tenant: Some("a\\b"), ..MoreParts::default() }.if_any();
        Event::pack(&EventParts { more, ..event.parts() })
    }

    fn upkeep_of(store: &OpenStore, dir: &Path, clock: Clock) -> Upkeep {
        Upkeep {
            store: store.clone(),
            erasures: Erasures::new(dir),
            last_seen: LastSeen::new(dir),
            clock,
            zone: TimeZone::UTC,
            stop: Stop::default(),
        }
    }

    /// A store with an event of 31 days ago and one of two, where 30 are kept; and what keeps
    /// it, by a clock that is off by so much after so long.
    async fn kept(dir: &Path, off: impl Fn(Duration) -> i64 + Send + Sync + 'static) -> (OpenStore, Upkeep) {
        let (front, now) = front(dir, &[("RETENTION_DAYS", "30")]);
        let store = OpenStore::of(front);
        store.front.open().await.unwrap();
        let (start_ms, since) = (now.load(Ordering::Relaxed), Instant::now());
        let batch = [event_at("a", start_ms - 31 * DAY_MS), event_at("a", start_ms - 2 * DAY_MS)];
        store.store.append(&batch).await.unwrap();
        let shown = move || {
            let elapsed = since.elapsed();
            now.store(start_ms + elapsed.as_millis() as i64 + off(elapsed), Ordering::Relaxed);
            now.load(Ordering::Relaxed)
        };
        let upkeep = upkeep_of(&store, dir, Clock::from_fn(shown));
        (store, upkeep)
    }

    /// When what is too old is gone and the rest is tidied. The clock that is handed in runs as
    /// fast as it can, the store as fast as its disk.
    async fn tidied(store: &OpenStore) -> Duration {
        let (since, real, status) = (Instant::now(), std::time::Instant::now(), &store.status);
        while (status.stats().events, status.stats().blocks) != (1, 1) {
            tokio::time::sleep(NIGHT_LOOK_INTERVAL).await;
            assert!(real.elapsed() < Duration::from_secs(60), "{:?}", status.stats());
        }
        let after = since.elapsed();
        // What comes behind it is seen to go on, too.
        tokio::time::sleep(2 * NIGHT_LOOK_INTERVAL).await;
        after
    }

    #[tokio::test(start_paused = true)]
    async fn it_goes_on_behind_its_first_tidying() {
        let dir = tempfile::tempdir().unwrap();
        // Its newest event is two days old: the clock is believed after an hour.
        let (store, upkeep) = kept(dir.path(), |_| 0).await;
        let after = tokio::select! {
            () = upkeep.run() => panic!("it ended"),
            after = tidied(&store) => after,
        };
        assert!(after >= Duration::from_secs(3_600), "{after:?}");
        assert!(LastSeen::new(dir.path()).read().is_some(), "the next start knows the time");
        store.close().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_years_ahead_for_a_while_deletes_nothing_and_puts_nothing_off() {
        let dir = tempfile::tempdir().unwrap();
        let while_ahead = Duration::from_secs(50 * 60);
        let ahead = move |elapsed| if elapsed < while_ahead { 365 * DAY_MS } else { 0 };
        let (store, upkeep) = kept(dir.path(), ahead).await;
        // What comes meanwhile is of that time, too: it is no reason to believe it.
        let start_ms = upkeep.clock.now_ms() - 365 * DAY_MS;
        upkeep.last_seen.note(start_ms - 3_600_000).unwrap();
        let newest = event_at("a", start_ms + 365 * DAY_MS);
        store.store.append(&[newest]).await.unwrap();
        tokio::select! {
            () = upkeep.run() => panic!("it ended"),
            () = async {
                tokio::time::sleep(while_ahead).await;
                assert_eq!(store.status.stats().events, 3, "what is young is kept");
                let real = std::time::Instant::now();
                while store.status.stats().events != 2 {
                    tokio::time::sleep(NIGHT_LOOK_INTERVAL).await;
                    assert!(real.elapsed() < Duration::from_secs(60), "what is too old is deleted afterwards");
                }
            } => {}
        }
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
        // A file that is imported may have others'.
        store.store.append(&batch.map(|event| of_another_tenant(&event))).await.unwrap();
        let upkeep = upkeep_of(&store, dir.path(), Clock::system());
        upkeep.keep(now_ms).await;
        upkeep.count().await;
        assert_eq!(store.status.stats().events, 2);
        upkeep.tidy(now_ms + 2 * DAY_MS).await;
        upkeep.count().await;
        let stats = store.status.stats();
        assert_eq!((stats.events, stats.hot_events, stats.blocks), (2, 0, 2), "they are in blocks");
        upkeep.keep(now_ms + 32 * DAY_MS).await;
        upkeep.count().await;
        assert_eq!(store.status.stats().events, 0);
        store.close().await;
    }

    #[cfg(feature = "postgres")]
    #[tokio::test]
    async fn a_day_in_a_server_has_its_partition_before_it_comes_until_it_is_too_old() {
        let Some(server) = test_server::Server::start() else {
            return test_server::not_run("the store in PostgreSQL: initdb, postgres");
        };
        let (dir, url) = (tempfile::tempdir().unwrap(), server.database_url("postgres"));
        let (front, _) = front(dir.path(), &[("RETENTION_DAYS", "30"), ("STORE_URL", &url)]);
        let store = OpenStore::of(front);
        store.front.open().await.unwrap();
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        store.when_changed(move |tenant| drop(tell.send(tenant.to_owned())));
        let now_ms = Clock::system().now_ms();
        // One day has none: what is of it is deleted by itself.
        let of_no_partition = of_another_tenant(&event_at("a", now_ms - 5 * DAY_MS));
        store.store.append(&[event_at("a", now_ms), of_no_partition]).await.unwrap();
        let upkeep = upkeep_of(&store, dir.path(), Clock::system());
        let counted = async || match store.backend() {
            Some(Backend::Server(server)) => {
                let stats = server.stats().await.unwrap();
                (stats.partitions, stats.events)
            }
            other => panic!("{other:?}"),
        };
        let (days, _) = counted().await;
        assert!(days > 1, "the days to come have theirs");
        upkeep.keep(now_ms + 20 * DAY_MS).await;
        assert_eq!(counted().await, (2 * days, 2), "others come");
        assert!(told.is_empty(), "nothing counts otherwise");
        upkeep.keep(now_ms + 70 * DAY_MS).await;
        assert_eq!(counted().await, (days, 0), "and all that were there are gone");
        let mut told: Vec<String> = std::iter::from_fn(|| told.try_recv().ok()).collect();
        told.sort();
        told.dedup();
        assert_eq!(told, ["", "a\\b"], "what was known of them is forgotten");
        store.close().await;
    }
}
