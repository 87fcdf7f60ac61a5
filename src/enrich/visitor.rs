//! Visitors without cookies: an id for whoever names none, made of the address, the browser
//! and the website, and of a salt that lives one local day.
//!
//! Nobody finds the address in it: SipHash-2-4-128 under 16 random bytes that are in memory
//! and in one private file, and in neither when the next day is over: what cannot be written
//! is tried again each minute. So a visitor of
//! yesterday cannot be told from one of today, unless a visit goes on over midnight: then
//! it keeps its id. A salt is made before its day begins, so that no event waits for a
//! file; an event of a day whose salt is gone, or was never there, stays nobody's.

use std::{
    convert::Infallible,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use jiff::{Timestamp, ToSpan, civil::Date, tz::TimeZone};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{MissedTickBehavior, interval},
};
use tracing::warn;
use uuid::Uuid;

use crate::{files, hashing::keyed_hash, time::Clock};

const NAME: &str = "visitor-salts.json";
/// How often it is looked whether a day is over.
const TICK: Duration = Duration::from_secs(60);
/// A file is of three days.
const FILE_BYTES_MAX: usize = 4096;

/// What an id is made of, beside the salt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen<'a> {
    /// Whose the website is; empty where a relay has one tenant.
    pub(crate) tenant: &'a str,
    pub(crate) website: &'a str,
    pub(crate) ip: IpAddr,
    pub(crate) user_agent: &'a str,
    /// The page's registrable domain; empty if it is not known.
    pub(crate) domain: &'a str,
}

/// Makes the ids, and looks after the salts.
#[derive(Debug)]
pub(crate) struct Visitors {
    time_zone: TimeZone,
    path: PathBuf,
    days: ArcSwap<Vec<Day>>,
    /// The file holds other days.
    is_unsaved: AtomicBool,
}

/// A local day and its salt.
#[derive(Clone)]
struct Day {
    date: Date,
    /// From midnight to midnight, in Unix milliseconds.
    start_ms: i64,
    end_ms: i64,
    salt: [u8; 16],
}

/// Never the salt.
impl std::fmt::Debug for Day {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.date)
    }
}

#[derive(Serialize, Deserialize)]
struct SavedDay {
    date: Date,
    /// In hexadecimal digits.
    salt: String,
}

impl Visitors {
    /// Takes up the salts of the last run, as far as their days are not over. A file that
    /// cannot be read costs the visits of the day.
    pub(crate) fn open(data_dir: &Path, time_zone: TimeZone, now_ms: i64) -> Self {
        let (path, days) = (data_dir.join(NAME), ArcSwap::default());
        let visitors = Self { time_zone, path, days, is_unsaved: AtomicBool::new(false) };
        match visitors.read() {
            Ok(days) => visitors.days.store(Arc::new(days)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                warn!(file = %visitors.path.display(), %error, "salts cannot be read, visitors of today are new");
            }
        }
        visitors.turn(now_ms);
        visitors.save();
        visitors
    }

    /// Removes the salts of a relay that makes such ids no more.
    pub(crate) fn remove_file(data_dir: &Path) {
        let path = data_dir.join(NAME);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(file = %path.display(), %error, "salts of visitors cannot be removed");
            }
            _ => {}
        }
    }

    /// Turns with the days. Waits for no disk: what hangs there keeps no salt in memory.
    pub(crate) async fn keep(self: Arc<Self>, clock: Clock) -> Infallible {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut saving: Option<JoinHandle<()>> = None;
        loop {
            ticks.tick().await;
            self.turn(clock.now_ms());
            let is_saving = saving.as_ref().is_some_and(|saving| !saving.is_finished());
            if self.is_unsaved.load(Ordering::Relaxed) && !is_saving {
                let visitors = Arc::clone(&self);
                saving = Some(spawn_blocking(move || visitors.save()));
            }
        }
    }

    /// The id of who was seen then, if that day has a salt.
    pub(crate) fn id(&self, seen: &Seen<'_>, time_ms: i64) -> Option<Uuid> {
        let days = self.days.load();
        let day = days.iter().find(|day| (day.start_ms..day.end_ms).contains(&time_ms))?;
        Some(day.id(seen))
    }

    /// The id that who was seen then had on the day before.
    pub(crate) fn id_of_the_day_before(&self, seen: &Seen<'_>, time_ms: i64) -> Option<Uuid> {
        let days = self.days.load();
        let of_then = |day: &&Day| (day.start_ms..day.end_ms).contains(&time_ms);
        let start_ms = days.iter().find(of_then)?.start_ms;
        Some(days.iter().find(|day| day.end_ms == start_ms)?.id(seen))
    }

    /// Forgets the salts of days before yesterday and makes those of today and tomorrow.
    fn turn(&self, now_ms: i64) {
        let Ok(now) = Timestamp::from_millisecond(now_ms) else { return };
        let today = now.to_zoned(self.time_zone.clone()).date();
        let (Ok(yesterday), Ok(tomorrow)) = (today.yesterday(), today.tomorrow()) else { return };
        let known = self.days.load();
        let mut days: Vec<Day> =
            known.iter().filter(|day| (yesterday..=tomorrow).contains(&day.date)).cloned().collect();
        for date in [today, tomorrow] {
            if !days.iter().any(|day| day.date == date) {
                days.extend(new_salt().and_then(|salt| self.day(date, salt)));
            }
        }
        let is_changed =
            days.len() != known.len() || days.iter().zip(known.iter()).any(|(a, b)| a.date != b.date);
        if is_changed {
            self.days.store(Arc::new(days));
            self.is_unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Writes what the file does not hold yet. Blocks.
    fn save(&self) {
        // First: what changes while it is written is written the next time.
        if !self.is_unsaved.swap(false, Ordering::Relaxed) {
            return;
        }
        if let Err(error) = self.write(&self.days.load()) {
            self.is_unsaved.store(true, Ordering::Relaxed);
            warn!(
                file = %self.path.display(), %error,
                "salts cannot be written: those of days that are over stay in the file, and after a restart visitors are new"
            );
        }
    }

    fn day(&self, date: Date, salt: [u8; 16]) -> Option<Day> {
        let midnight =
            |date: Date| Some(date.to_zoned(self.time_zone.clone()).ok()?.timestamp().as_millisecond());
        Some(Day {
            date,
            start_ms: midnight(date)?,
            end_ms: midnight(date.checked_add(1.day()).ok()?)?,
            salt,
        })
    }

    fn read(&self) -> io::Result<Vec<Day>> {
        let bytes = fs::read(&self.path)?;
        if bytes.len() > FILE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("got {} bytes", bytes.len())));
        }
        let saved: Vec<SavedDay> = serde_json::from_slice(&bytes)?;
        let day = |saved: SavedDay| {
            let salt = u128::from_str_radix(&saved.salt, 16).ok()?;
            self.day(saved.date, salt.to_be_bytes())
        };
        Ok(saved.into_iter().filter_map(day).collect())
    }

    fn write(&self, days: &[Day]) -> io::Result<()> {
        let saved =
            |day: &Day| SavedDay { date: day.date, salt: format!("{:032x}", u128::from_be_bytes(day.salt)) };
        let json = serde_json::to_vec(&days.iter().map(saved).collect::<Vec<_>>())?;
        files::replace(&self.path, &json)
    }
}

impl Day {
    fn id(&self, seen: &Seen<'_>) -> Uuid {
        let address = network_of(seen.ip);
        let [tenant, website, user_agent, domain] =
            [seen.tenant, seen.website, seen.user_agent, seen.domain].map(str::as_bytes);
        let texts = [tenant, website, &address, user_agent, domain];
        Uuid::new_v8(keyed_hash(&self.salt, &texts).to_be_bytes())
    }
}

/// An address as far as it is one visitor's: a household has a /64.
fn network_of(ip: IpAddr) -> Vec<u8> {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets()[..8].to_vec(),
    }
}

fn new_salt() -> Option<[u8; 16]> {
    let mut salt = [0; 16];
    let made = SystemRandom::new().fill(&mut salt);
    made.inspect_err(|_| warn!("no randomness: visitors of the day have no id")).ok().map(|()| salt)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3_600_000;
    /// 2026-03-29T00:30 in Berlin, whose clocks go forward that night.
    const T0: i64 = 1_774_740_600_000;

    fn seen(ip: &str) -> Seen<'_> {
        Seen {
            tenant: "",
            website: "site-1",
            ip: ip.parse().unwrap(),
            user_agent: "Browser/1.0",
            domain: "x.example",
        }
    }

    fn visitors(dir: &Path, now_ms: i64) -> Visitors {
        Visitors::open(dir, TimeZone::get("Europe/Berlin").unwrap(), now_ms)
    }

    #[test]
    fn an_id_holds_for_a_local_day_and_for_what_it_is_made_of() {
        let dir = tempfile::tempdir().unwrap();
        let visitors = visitors(dir.path(), T0);
        let id = visitors.id(&seen("203.0.113.9"), T0).unwrap();
        assert_eq!(id.get_version_num(), 8);
        // The day has 23 hours, the first half of one is over.
        assert_eq!(visitors.id(&seen("203.0.113.9"), T0 + 22 * HOUR), Some(id));
        let tomorrow = visitors.id(&seen("203.0.113.9"), T0 + 23 * HOUR).unwrap();
        assert_ne!(tomorrow, id);
        assert_eq!(visitors.id_of_the_day_before(&seen("203.0.113.9"), T0 + 23 * HOUR), Some(id));
        assert_eq!(visitors.id(&seen("::ffff:203.0.113.9"), T0), Some(id), "the same address");
        for other in [
            Seen { website: "site-2", ..seen("203.0.113.9") },
            Seen { user_agent: "Browser/1.1", ..seen("203.0.113.9") },
            Seen { domain: "", ..seen("203.0.113.9") },
            Seen { tenant: "acme", ..seen("203.0.113.9") },
            Seen { tenant: "site-1", website: "", ..seen("203.0.113.9") },
            Seen { website: "site-1B", user_agent: "rowser/1.0", ..seen("203.0.113.9") },
            seen("203.0.113.10"),
        ] {
            assert_ne!(visitors.id(&other, T0), Some(id), "{other:?}");
        }
        let household = visitors.id(&seen("2001:db8:1:2::1"), T0);
        assert_eq!(visitors.id(&seen("2001:db8:1:2:ffff::9"), T0), household);
        assert_ne!(visitors.id(&seen("2001:db8:1:3::1"), T0), household);
    }

    #[test]
    fn a_salt_survives_a_restart_and_no_second_night() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let id = visitors(dir.path(), T0).id(&seen("203.0.113.9"), T0).unwrap();
        let first = fs::read_to_string(&path).unwrap();
        let salt_of = |json: &str| json.split('"').nth(7).unwrap().to_owned();
        let salt = salt_of(&first);
        let again = visitors(dir.path(), T0 + 30 * HOUR);
        assert_eq!(again.id(&seen("203.0.113.9"), T0), Some(id), "of yesterday");
        let before = again.id(&seen("203.0.113.9"), T0 + 30 * HOUR);
        again.turn(T0 + 54 * HOUR);
        again.save();
        assert_eq!(again.id(&seen("203.0.113.9"), T0), None, "forgotten");
        assert_eq!(again.id(&seen("203.0.113.9"), T0 + 30 * HOUR), before);
        let kept = fs::read_to_string(&path).unwrap();
        assert!(first.contains(&salt) && !kept.contains(&salt), "{salt}");
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!format!("{again:?}").contains(&salt_of(&kept)));
    }

    #[test]
    fn a_file_that_is_damaged_costs_the_day_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "[", "[{\"date\":\"2026-03-29\",\"salt\":\"zz\"}]", &"x".repeat(5000)] {
            fs::write(dir.path().join(NAME), text).unwrap();
            assert!(visitors(dir.path(), T0).id(&seen("203.0.113.9"), T0).is_some(), "{text}");
        }
    }

    /// A promise about what is on disk is kept as soon as the disk lets it.
    #[test]
    fn a_salt_that_could_not_be_removed_from_the_file_is_removed_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let visitors = visitors(dir.path(), T0);
        let of_first_day = fs::read(&path).unwrap();
        // No file takes the place of a folder.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        visitors.turn(T0 + 54 * HOUR);
        visitors.save();
        assert_eq!(visitors.id(&seen("203.0.113.9"), T0), None, "it is out of memory all the same");
        fs::remove_dir(&path).unwrap();
        fs::write(&path, &of_first_day).unwrap();
        visitors.turn(T0 + 54 * HOUR);
        visitors.save();
        let kept = fs::read_to_string(&path).unwrap();
        assert!(!kept.contains("2026-03-29") && kept.contains("2026-03-31"), "{kept}");
    }

    #[tokio::test(start_paused = true)]
    async fn salts_turn_with_the_days_while_the_relay_runs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let visitors = Arc::new(visitors(dir.path(), T0));
        let started = tokio::time::Instant::now();
        let clock = Clock::from_fn(move || T0 + i64::try_from(started.elapsed().as_millis()).unwrap());
        let keeping = tokio::spawn(visitors.clone().keep(clock));
        let hours = |hours: u64| tokio::time::sleep(Duration::from_secs(hours * 3600));
        hours(30).await;
        assert!(visitors.id(&seen("203.0.113.9"), T0).is_some(), "for visits over midnight");
        hours(18).await;
        assert_eq!(visitors.id(&seen("203.0.113.9"), T0), None);
        assert!(visitors.id(&seen("203.0.113.9"), T0 + 48 * HOUR).is_some());
        // Written by a thread of its own, when it comes to it.
        while fs::read_to_string(&path).unwrap().contains("2026-03-29") {
            tokio::time::sleep(TICK).await;
        }
        keeping.abort();
    }

    #[test]
    fn the_file_of_a_relay_that_makes_no_ids_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        visitors(dir.path(), T0);
        Visitors::remove_file(dir.path());
        assert!(!dir.path().join(NAME).exists());
        Visitors::remove_file(dir.path());
    }

    #[test]
    fn a_clock_that_jumps_makes_no_day_twice() {
        let dir = tempfile::tempdir().unwrap();
        let visitors = visitors(dir.path(), T0);
        let id = visitors.id(&seen("203.0.113.9"), T0);
        for now in [T0 + HOUR, T0 - HOUR, T0 + 24 * HOUR, T0] {
            visitors.turn(now);
            assert_eq!(visitors.id(&seen("203.0.113.9"), T0), id);
        }
    }
}
