//! Users that are erased: nothing of them is accepted or delivered any more.
//!
//! `DATA_DIR/suppressed.json`, mode 0600: hashes of their ids, from which nobody is found
//! without the relay's secret. Replaced as a whole, so it is never half of one; a file, so
//! that it holds across restarts and asks for no port. **It fails closed**: what cannot be
//! read is an error at the start, and under way what was read last holds.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use analytics_relay_providers::{Event, EventKind};
use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::secret::DataSecret;
use crate::{files, hashing::keyed_hash};

const NAME: &str = "suppressed.json";
const IN_FORCE: &str = "suppressed.in-force";
/// What the key is made for.
const PURPOSE: &str = "suppression";
/// Most ids: some 60 MB of file.
const IDS_MAX: usize = 1_000_000;

/// Which of an event's ids is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IdSort {
    User,
    Anonymous,
}

impl IdSort {
    fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Anonymous => "anonymous",
        }
    }
}

/// Whom an event is of.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ids<'a> {
    pub(crate) user_id: Option<&'a str>,
    pub(crate) anonymous_id: Option<&'a str>,
    /// Of an alias: a user or a device.
    pub(crate) previous_id: Option<&'a str>,
}

impl<'a> Ids<'a> {
    pub(crate) fn of(event: &'a Event) -> Self {
        let previous_id = match event.kind() {
            EventKind::Alias { previous_id } => Some(previous_id),
            _ => None,
        };
        Self { user_id: event.user_id(), anonymous_id: event.anonymous_id(), previous_id }
    }

    /// True if something holds for one of them, as a user or as a device.
    pub(crate) fn any(&self, holds: impl Fn(Option<&str>, Option<&str>) -> bool) -> bool {
        holds(self.user_id, self.anonymous_id)
            || self.previous_id.is_some() && holds(self.previous_id, self.previous_id)
    }
}

/// The file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    /// Grows with each change.
    generation: u64,
    /// Tells under which secret the hashes were made.
    key_check: String,
    /// Hashes, and since when they hold in Unix milliseconds.
    ids: BTreeMap<String, i64>,
}

/// Where a list is, for who changes it.
#[derive(Debug)]
pub(crate) struct SuppressionDir {
    dir: PathBuf,
    key: [u8; 16],
}

impl SuppressionDir {
    pub(crate) fn open(data_dir: &Path, secret: &DataSecret) -> Self {
        Self { dir: data_dir.to_owned(), key: secret.key_for(PURPOSE) }
    }

    /// Adds ids, durably. Returns the generation that has them.
    pub(crate) fn add(&self, ids: &[(IdSort, &str)], now_ms: i64) -> io::Result<u64> {
        self.change(
            |list, hashes| {
                for hash in hashes {
                    list.ids.entry(hash).or_insert(now_ms);
                }
            },
            ids,
        )
    }

    /// Removes ids: their users may come back. Returns the generation without them.
    pub(crate) fn lift(&self, ids: &[(IdSort, &str)]) -> io::Result<u64> {
        self.change(
            |list, hashes| {
                for hash in hashes {
                    list.ids.remove(&hash);
                }
            },
            ids,
        )
    }

    /// The newest generation that every lane of the running relay keeps to.
    pub(crate) fn in_force(&self) -> io::Result<u64> {
        match fs::read_to_string(self.dir.join(IN_FORCE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            text => Ok(text?.trim().parse().unwrap_or(0)),
        }
    }

    /// Since when each id of a user is suppressed.
    pub(crate) fn since_ms(&self, sort: IdSort, id: &str) -> io::Result<Option<i64>> {
        Ok(self.read()?.ids.get(&hex(self.hash(sort, id))).copied())
    }

    /// How many ids there are.
    pub(crate) fn count(&self) -> io::Result<usize> {
        Ok(self.read()?.ids.len())
    }

    fn change(&self, change: impl FnOnce(&mut List, Vec<String>), ids: &[(IdSort, &str)]) -> io::Result<u64> {
        let lock = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.dir.join("suppressed.lock"))?;
        // Held by commands alone, each for one write.
        lock.lock()?;
        let mut list = self.read()?;
        change(&mut list, ids.iter().map(|(sort, id)| hex(self.hash(*sort, id))).collect());
        if list.ids.len() > IDS_MAX {
            return Err(io::Error::other(format!(
                "got {} suppressed ids, want at most {IDS_MAX}",
                list.ids.len()
            )));
        }
        list.generation += 1;
        files::replace(&self.dir.join(NAME), &serde_json::to_vec(&list)?)?;
        Ok(list.generation)
    }

    fn read(&self) -> io::Result<List> {
        let path = self.dir.join(NAME);
        let key_check = hex(keyed_hash(&self.key, &[b"check"]));
        let list: List = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(List { key_check, ..List::default() });
            }
            bytes => serde_json::from_slice(&bytes?).map_err(|error| invalid(&path, &error.to_string()))?,
        };
        if list.key_check != key_check {
            return Err(invalid(&path, "its ids were hashed under another secret than the one beside it"));
        }
        Ok(list)
    }

    fn hash(&self, sort: IdSort, id: &str) -> u128 {
        keyed_hash(&self.key, &[sort.name().as_bytes(), id.as_bytes()])
    }
}

/// Who is suppressed, for those who ask about each event.
#[derive(Debug)]
pub(crate) struct Suppressed {
    dir: SuppressionDir,
    hashes: ArcSwap<HashSet<u128>>,
    /// Most relays never suppress anybody.
    is_any: AtomicBool,
    generation: watch::Sender<u64>,
    /// Inode, length and time of the file that was read.
    seen: ArcSwap<Option<(u64, u64, i64, i64)>>,
    unreadable: AtomicBool,
}

impl Suppressed {
    /// Reads the list. An error must keep the relay from starting.
    pub(crate) fn open(data_dir: &Path, secret: &DataSecret) -> io::Result<Self> {
        let suppressed = Self {
            dir: SuppressionDir::open(data_dir, secret),
            hashes: ArcSwap::default(),
            is_any: AtomicBool::new(false),
            generation: watch::Sender::new(0),
            seen: ArcSwap::default(),
            unreadable: AtomicBool::new(false),
        };
        suppressed.look()?;
        Ok(suppressed)
    }

    /// True if the user of an event is suppressed.
    #[inline]
    pub(crate) fn covers_event(&self, event: &Event) -> bool {
        self.is_any.load(Ordering::Acquire) && self.covers(Ids::of(event))
    }

    /// True if one of these ids is suppressed.
    #[cold]
    pub(crate) fn covers(&self, ids: Ids<'_>) -> bool {
        ids.any(|user_id, anonymous_id| self.has(user_id, anonymous_id))
    }

    fn has(&self, user_id: Option<&str>, anonymous_id: Option<&str>) -> bool {
        let hashes = self.hashes.load();
        !hashes.is_empty()
            && [(IdSort::User, user_id), (IdSort::Anonymous, anonymous_id)]
                .into_iter()
                .any(|(sort, id)| id.is_some_and(|id| hashes.contains(&self.dir.hash(sort, id))))
    }

    /// Grows with each change of the list.
    pub(crate) fn generation(&self) -> u64 {
        *self.generation.borrow()
    }

    /// Tells of each change of the list.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Reads the list again if it was replaced; true if so. After an error what was read
    /// last holds.
    pub(crate) fn look(&self) -> io::Result<bool> {
        let seen = match fs::metadata(self.dir.dir.join(NAME)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            found => found.map(|file| Some((file.ino(), file.size(), file.mtime(), file.mtime_nsec())))?,
        };
        if **self.seen.load() == seen {
            return Ok(false);
        }
        let list = self.dir.read()?;
        let hashes = list.ids.keys().map(|hash| u128::from_str_radix(hash, 16));
        let hashes = hashes.collect::<Result<HashSet<_>, _>>();
        let hashes = hashes.map_err(|error| invalid(&self.dir.dir.join(NAME), &error.to_string()))?;
        self.is_any.store(!hashes.is_empty(), Ordering::Release);
        self.hashes.store(hashes.into());
        self.generation.send_replace(list.generation);
        self.seen.store(seen.into());
        Ok(true)
    }

    /// Notes whether the list could be read the last time.
    pub(crate) fn set_unreadable(&self, unreadable: bool) {
        self.unreadable.store(unreadable, Ordering::Relaxed);
    }

    /// True while the list cannot be read.
    pub(crate) fn is_unreadable(&self) -> bool {
        self.unreadable.load(Ordering::Relaxed)
    }

    /// Says to commands that every lane keeps to a generation.
    pub(crate) fn tell_in_force(&self, generation: u64) -> io::Result<()> {
        files::replace(&self.dir.dir.join(IN_FORCE), generation.to_string().as_bytes())
    }
}

fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}

fn invalid(path: &Path, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened() -> (tempfile::TempDir, DataSecret, SuppressionDir) {
        let dir = tempfile::tempdir().unwrap();
        let secret = DataSecret::open(dir.path()).unwrap();
        let list = SuppressionDir::open(dir.path(), &secret);
        (dir, secret, list)
    }

    #[test]
    fn who_is_suppressed_is_known_at_once_and_across_starts() {
        let (dir, secret, list) = opened();
        let running = Suppressed::open(dir.path(), &secret).unwrap();
        let ids = |user_id, anonymous_id| Ids { user_id, anonymous_id, previous_id: None };
        assert!(!running.covers(ids(Some("user-1"), Some("device-1"))));
        assert_eq!(list.add(&[(IdSort::User, "user-1"), (IdSort::Anonymous, "device-1")], 5).unwrap(), 1);
        assert!(running.look().unwrap());
        assert!(!running.look().unwrap(), "nothing has changed since");
        for suppressed in [&running, &Suppressed::open(dir.path(), &secret).unwrap()] {
            assert!(
                suppressed.covers(ids(Some("user-1"), None))
                    && suppressed.covers(ids(Some("x"), Some("device-1")))
            );
            assert!(!suppressed.covers(ids(Some("device-1"), Some("user-1"))), "an id of another sort");
            for previous_id in ["user-1", "device-1"] {
                let alias = Ids { previous_id: Some(previous_id), ..ids(Some("x"), None) };
                assert!(suppressed.covers(alias), "an alias would make another of them");
            }
            assert_eq!(suppressed.generation(), 1);
        }
        assert_eq!(list.since_ms(IdSort::User, "user-1").unwrap(), Some(5));
        assert_eq!(list.lift(&[(IdSort::User, "user-1")]).unwrap(), 2);
        running.look().unwrap();
        assert!(!running.covers(ids(Some("user-1"), None)) && running.covers(ids(None, Some("device-1"))));
        let text = fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert!(!text.contains("device-1"), "{text}");
    }

    #[test]
    fn a_list_that_cannot_be_read_is_an_error_and_never_an_empty_one() {
        let (dir, secret, list) = opened();
        list.add(&[(IdSort::User, "user-1")], 5).unwrap();
        let running = Suppressed::open(dir.path(), &secret).unwrap();
        let whole = fs::read_to_string(dir.path().join(NAME)).unwrap();
        for damaged in
            ["", "{", &whole[..whole.len() - 2], &whole.replace("ids", "idz"), &whole.replace(":5", "x")]
        {
            fs::write(dir.path().join(NAME), damaged).unwrap();
            assert!(running.look().is_err(), "{damaged}");
            let user = Ids { user_id: Some("user-1"), ..Ids::default() };
            assert!(running.covers(user), "what was read last holds");
            assert!(Suppressed::open(dir.path(), &secret).is_err(), "{damaged}");
            assert!(list.add(&[(IdSort::User, "user-2")], 6).is_err(), "{damaged}");
        }
        fs::write(dir.path().join(NAME), &whole).unwrap();
        fs::remove_file(dir.path().join("secret")).unwrap();
        let another = DataSecret::open(dir.path()).unwrap();
        let error = Suppressed::open(dir.path(), &another).unwrap_err().to_string();
        assert!(error.contains("another secret"), "{error}");
    }

    #[test]
    fn what_is_in_force_is_told_to_whoever_waits_for_it() {
        let (dir, secret, list) = opened();
        assert_eq!(list.in_force().unwrap(), 0);
        Suppressed::open(dir.path(), &secret).unwrap().tell_in_force(7).unwrap();
        assert_eq!(list.in_force().unwrap(), 7);
    }
}
