//! Events that one provider will not get, with the reason: to be read, counted
//! and sent again by a person.
//!
//! `DATA_DIR/dead-letters/<provider>/<time>-<turn>.ndjson` (or `.sealed`): one [`DeadLetter`] a line, as
//! [`letter_files`](crate::letter_files) has them.
//!
//! Beside them `replayed.log` lists the ids of events that a replay delivered,
//! so that no replay sends one twice. A file whose events were all replayed is
//! removed.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use analytics_relay_providers::{Event, EventId};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    files::{self, Lock},
    letter_files::{Letter, Line, UNFINISHED, delete_from, read_heads, read_letters, remove_unfinished},
    reasons::DeadLetterReason,
    sealing::{FileKind, Locked, Sealing, lines::first_locked},
    settings::Reader,
};

/// Name of the list of replayed events.
const REPLAYED: &str = "replayed.log";
/// What the keeper of dead letters is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeadLetterSettings {
    /// Most bytes of one provider's dead letters.
    pub bytes_max: u64,
}

impl DeadLetterSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        Self { bytes_max: reader.number("DEAD_LETTERS_MAX_BYTES", 0..=1 << 50) }
    }
}

/// One event that one provider did not get.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct DeadLetter {
    /// When it became one: Unix milliseconds.
    pub(crate) dead_since_ms: i64,
    pub(crate) provider: String,
    pub(crate) reason: DeadLetterReason,
    /// How often it was sent.
    pub(crate) attempts: u32,
    /// The provider's own words, without secrets, or ours.
    pub(crate) detail: String,
    pub(crate) event: Event,
}

/// What of a dead letter can be read without the key that it is sealed with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeadLetterHead {
    pub(crate) dead_since_ms: i64,
    pub(crate) provider: String,
    pub(crate) reason: DeadLetterReason,
    pub(crate) attempts: u32,
    #[serde(with = "id_as_text")]
    pub(crate) event_id: EventId<'static>,
}

/// What is hidden of it. The provider's words may tell of the event.
#[derive(Deserialize)]
struct Secret {
    detail: String,
    event: Event,
}

/// The same, to be written.
#[derive(Serialize)]
struct SecretRef<'a> {
    detail: &'a str,
    event: &'a Event,
}

impl Letter for DeadLetter {
    const KIND: FileKind = FileKind::DeadLetters;
    type Head = DeadLetterHead;

    fn head(&self) -> DeadLetterHead {
        DeadLetterHead {
            dead_since_ms: self.dead_since_ms,
            provider: self.provider.clone(),
            reason: self.reason,
            attempts: self.attempts,
            event_id: self.event.id().into_owned(),
        }
    }

    fn secret(&self) -> Vec<u8> {
        let Self { detail, event, .. } = self;
        serde_json::to_vec(&SecretRef { detail, event }).expect("a letter is JSON")
    }

    fn join(head: DeadLetterHead, secret: &[u8]) -> Option<Self> {
        let Secret { detail, event } = serde_json::from_slice(secret).ok()?;
        let DeadLetterHead { dead_since_ms, provider, reason, attempts, event_id } = head;
        let letter = Self { dead_since_ms, provider, reason, attempts, detail, event };
        (letter.event.id() == event_id).then_some(letter)
    }
}

/// Where one provider's dead letters are.
#[derive(Debug, Clone)]
pub(crate) struct DeadLetterDir(PathBuf);

/// What a file holds.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// Letters that no replay has delivered, in the order of their writing.
    pub(crate) letters: Vec<DeadLetter>,
    /// Those of them that are sealed and whose key is not there: what can be read, and why
    /// no more.
    pub(crate) locked: Vec<DeadLetterHead>,
    pub(crate) why_locked: Option<Locked>,
    /// Those that somebody has changed.
    pub(crate) broken: Vec<DeadLetterHead>,
    /// Lines that cannot be read.
    pub(crate) damaged: usize,
    /// Letters of another provider, in a file that somebody put here.
    pub(crate) foreign: usize,
    /// Bytes of all its whole lines. What is written later stands behind them.
    pub(crate) bytes: u64,
}

impl Stored {
    /// What can be read of its letters in any case.
    pub(crate) fn into_heads(self) -> impl Iterator<Item = DeadLetterHead> {
        let letters = self.letters.into_iter().map(|letter| letter.head());
        letters.chain(self.locked).chain(self.broken)
    }
}

/// The files that somebody has looked at, and as many of their bytes as there were
/// then. Times do not tell what came later: a write has one for all of its letters,
/// and may be seen in part.
pub(crate) type Seen = BTreeMap<PathBuf, u64>;

/// What a deletion did to one provider's letters.
#[derive(Debug, Default)]
pub(crate) struct Deletion {
    /// Letters that are gone.
    pub(crate) deleted: BTreeMap<DeadLetterReason, u64>,
    /// Files that are as they were, and why.
    pub(crate) failed: Vec<(PathBuf, io::Error)>,
}

impl AsRef<Path> for DeadLetterDir {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl DeadLetterDir {
    pub(crate) fn new(data_dir: &Path, provider: &str) -> Self {
        Self(data_dir.join("dead-letters").join(provider))
    }

    /// The providers that have dead letters under a data directory.
    pub(crate) fn providers(data_dir: &Path) -> io::Result<Vec<String>> {
        files::list_dirs(&data_dir.join("dead-letters"))
    }

    /// The files of letters, oldest first; each small enough to be read whole.
    pub(crate) fn files(&self) -> io::Result<Vec<PathBuf>> {
        files::list_lines(&self.0)
    }

    /// Reads the letters of one file that were not `replayed`. Works beside a
    /// relay that is writing to it.
    pub(crate) fn read(
        path: &Path,
        replayed: &HashSet<EventId<'static>>,
        sealing: &Sealing,
    ) -> io::Result<Stored> {
        let mut stored = Stored::default();
        stored.why_locked = read_letters(path, sealing, |line, letter: Line<DeadLetter>| {
            stored.bytes += line.len() as u64;
            let (is_ours, is_replayed) = match &letter {
                Line::Letter(letter) => {
                    (is_of(path, &letter.provider), replayed.contains(&letter.event.id()))
                }
                Line::Locked(head) | Line::Broken(head) => {
                    (is_of(path, &head.provider), replayed.contains(&head.event_id))
                }
                Line::Damaged => (true, false),
            };
            match letter {
                _ if !is_ours => stored.foreign += 1,
                _ if is_replayed => {}
                Line::Letter(letter) => stored.letters.push(letter),
                Line::Locked(head) => stored.locked.push(head),
                Line::Broken(head) => stored.broken.push(head),
                Line::Damaged => stored.damaged += 1,
            }
        })?;
        Ok(stored)
    }

    /// Why some of its letters cannot be read, and in which file; before anything is done
    /// with the others.
    pub(crate) fn locked(&self, sealing: &Sealing) -> io::Result<Option<(PathBuf, Locked)>> {
        first_locked(self.files()?, FileKind::DeadLetters, sealing)
    }

    /// Takes out the letters that `is_meant`, of those that were `seen` and not
    /// replayed, also beside a relay that is writing. Each file is as it was, or
    /// without them. `log` keeps replays and other deletions away, from before they
    /// were seen.
    pub(crate) fn delete(
        &self,
        log: ReplayedLog,
        seen: &Seen,
        is_meant: impl Fn(&DeadLetterHead) -> bool,
    ) -> io::Result<Deletion> {
        let replayed = self.replayed()?;
        let mut deletion = Deletion::default();
        for path in self.files()? {
            let Some(seen_bytes) = seen.get(&path) else { continue };
            match delete_from::<DeadLetter>(&path, *seen_bytes, |head| {
                is_of(&path, &head.provider) && !replayed.contains(&head.event_id) && is_meant(head)
            }) {
                Ok(deleted) => {
                    for letter in deleted {
                        *deletion.deleted.entry(letter.reason).or_default() += 1;
                    }
                }
                // A relay had begun it, and removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => deletion.failed.push((path, error)),
            }
        }
        self.prune(log)?;
        Ok(deletion)
    }

    /// Ids of the events that a replay delivered.
    pub(crate) fn replayed(&self) -> io::Result<HashSet<EventId<'static>>> {
        let file = match File::open(self.0.join(REPLAYED)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(HashSet::new()),
            file => file?,
        };
        let lines = BufReader::new(file).lines();
        lines.filter_map(|line| line.map(|line| EventId::new(line).ok()).transpose()).collect()
    }

    /// Opens the list of replayed events for us alone.
    pub(crate) fn open_replayed(&self) -> io::Result<ReplayedLog> {
        let path = self.0.join(REPLAYED);
        let busy = || io::Error::new(io::ErrorKind::WouldBlock, "another replay is running");
        let file = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path)?;
        match Lock::of(file.try_lock())? {
            // Another replay that has just ended may have replaced it.
            Lock::Ours if file.metadata()?.nlink() == 0 => return Err(busy()),
            Lock::Ours => {}
            Lock::Theirs => return Err(busy()),
            Lock::None(error) => {
                warn!(%error, "the file system has no locks (flock): see that no second replay is running");
            }
        }
        // What a deletion that was killed has left.
        remove_unfinished(&self.0)?;
        files::sync_dir(&self.0)?;
        Ok(ReplayedLog(file))
    }

    /// True if a replay is running.
    pub(crate) fn is_being_replayed(&self) -> io::Result<bool> {
        match File::open(self.0.join(REPLAYED)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            opened => Ok(matches!(Lock::of(opened?.try_lock_shared())?, Lock::Theirs)),
        }
    }

    /// Removes files whose letters were all replayed and that no relay writes
    /// to, and forgets replayed events that no file holds any more. Ends the
    /// replay that `log` belongs to.
    pub(crate) fn prune(&self, log: ReplayedLog) -> io::Result<()> {
        let replayed = self.replayed()?;
        let mut kept = HashSet::new();
        for path in self.files()? {
            // First the lock: nobody may write after it was read.
            let file = File::open(&path)?;
            let unused = file.try_lock().is_ok();
            let mut open = 0;
            let mut ids = HashSet::new();
            read_heads::<DeadLetter>(&path, |_, head| match head {
                Some(head) if is_of(&path, &head.provider) && replayed.contains(&head.event_id) => {
                    ids.insert(head.event_id);
                }
                _ => open += 1,
            })?;
            if open == 0 && unused {
                fs::remove_file(&path)?;
            } else {
                kept.extend(ids);
            }
        }
        if kept.is_empty() || kept.len() < replayed.len() {
            self.rewrite_replayed(&kept)?;
        }
        files::sync_dir(&self.0)?;
        // Until here no other replay could begin.
        drop(log);
        Ok(())
    }

    /// Replaces the list, whole or not at all.
    fn rewrite_replayed(&self, ids: &HashSet<EventId<'static>>) -> io::Result<()> {
        let path = self.0.join(REPLAYED);
        if ids.is_empty() {
            return fs::remove_file(path);
        }
        let unfinished = path.with_extension(UNFINISHED);
        let _ = fs::remove_file(&unfinished);
        let mut list = ReplayedLog(files::create_file(&unfinished)?);
        list.append(ids)?;
        fs::rename(unfinished, path)
    }
}

/// An event's id as it stands in heads.
pub(super) mod id_as_text {
    use analytics_relay_providers::EventId;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(in super::super) fn serialize<S: Serializer>(id: &EventId<'_>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(id.as_str())
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<EventId<'static>, D::Error> {
        EventId::new(String::deserialize(from)?).map_err(D::Error::custom)
    }
}

/// True if a provider's letter belongs into the directory of a file.
fn is_of(path: &Path, provider: &str) -> bool {
    path.parent().and_then(Path::file_name).is_some_and(|dir| dir == provider)
}

/// The list of events that a replay delivered.
#[derive(Debug)]
pub(crate) struct ReplayedLog(File);

impl ReplayedLog {
    /// Adds events, durably.
    pub(crate) fn append<'a>(&mut self, ids: impl IntoIterator<Item = &'a EventId<'a>>) -> io::Result<()> {
        let lines: String = ids.into_iter().flat_map(|id| [id.as_str(), "\n"]).collect();
        let length = self.0.metadata()?.len();
        self.0.write_all(lines.as_bytes()).and_then(|()| self.0.sync_data()).inspect_err(|_| {
            // Half an id would run into the next one.
            let _ = self.0.set_len(length);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    use crate::{
        delivery::test_support::track,
        letter_files::{LetterWriter, NotWritten},
        reasons::DropReason,
    };

    fn letter(name: &str) -> DeadLetter {
        DeadLetter {
            dead_since_ms: 1,
            provider: "mixpanel".into(),
            reason: DeadLetterReason::Invalid,
            attempts: 1,
            detail: "400 no".into(),
            event: track(name),
        }
    }

    fn json(letter: &DeadLetter) -> Vec<u8> {
        [&serde_json::to_vec(letter).unwrap()[..], b"\n"].concat()
    }

    fn read(dir: &DeadLetterDir) -> Stored {
        let replayed = dir.replayed().unwrap();
        let mut all = Stored::default();
        for path in dir.files().unwrap() {
            let stored = DeadLetterDir::read(&path, &replayed, &Sealing::default()).unwrap();
            all.letters.extend(stored.letters);
            all.damaged += stored.damaged;
        }
        all
    }

    fn dir() -> (tempfile::TempDir, DeadLetterDir) {
        let data = tempfile::tempdir().unwrap();
        let dir = DeadLetterDir::new(data.path(), "mixpanel");
        (data, dir)
    }

    #[test]
    fn letters_are_read_as_they_were_written() {
        let (data, dir) = dir();
        let letters = [letter("a"), letter("b")];
        let mut writer = LetterWriter::open(&dir, 1 << 20).unwrap();
        writer.write(&letters[..1], 5).unwrap();
        writer.write(&letters[1..], 6).unwrap();
        assert_eq!(read(&dir).letters, letters);
        assert_eq!(DeadLetterDir::providers(data.path()).unwrap(), ["mixpanel"]);
        let reopened = LetterWriter::open(&dir, 1 << 20).unwrap();
        assert_eq!(reopened.bytes().load(Ordering::Relaxed), writer.bytes().load(Ordering::Relaxed));
    }

    #[test]
    fn bytes_are_bounded_and_what_does_not_fit_is_not_written() {
        let (_data, dir) = dir();
        let mut writer = LetterWriter::open(&dir, 700).unwrap();
        writer.write(&[letter("a")], 5).unwrap();
        let full = NotWritten { written: 0, why: DropReason::DeadLettersFull };
        assert_eq!(writer.write(&[letter(&"b".repeat(1000)), letter("c")], 5), Err(full));
        assert_eq!(read(&dir).letters.len(), 1);
    }

    #[test]
    fn the_first_letters_are_written_that_there_is_room_for() {
        let (_data, dir) = dir();
        let letters: Vec<DeadLetter> = (0..9).map(|n| letter(&n.to_string())).collect();
        let each = json(&letters[0]).len() as u64;
        let full = |written| Err(NotWritten { written, why: DropReason::DeadLettersFull });
        for room in 0..=9 {
            let mut writer = LetterWriter::open(&dir, each * 10 - 1).unwrap();
            let before = 9 - room;
            writer.write(&letters[..before], 5).unwrap();
            let expected = if room == 9 { Ok(()) } else { full(room) };
            assert_eq!(writer.write(&letters, 5), expected, "room for {room}");
            assert_eq!(read(&dir).letters, [&letters[..before], &letters[..room]].concat());
            assert_eq!(writer.write(&letters, 5), full(0));
            assert_eq!(writer.bytes().load(Ordering::Relaxed), 9 * each);
            // What makes room is noticed.
            delete(&dir, |_| true).unwrap();
            assert_eq!(writer.write(&letters[..2], 5), Ok(()));
            delete(&dir, |_| true).unwrap();
        }
    }

    #[test]
    fn a_replayed_letter_is_never_read_again_and_its_file_goes() {
        let (_data, dir) = dir();
        let letters = [letter("a"), letter("b")];
        let mut writer = LetterWriter::open(&dir, 1 << 20).unwrap();
        writer.write(&letters, 5).unwrap();
        let mut log = dir.open_replayed().unwrap();
        log.append([&letters[0].event.id()]).unwrap();
        assert_eq!(read(&dir).letters, letters[1..]);
        dir.prune(log).unwrap();
        assert_eq!(read(&dir).letters, letters[1..], "a file with an open letter stays");

        let mut log = dir.open_replayed().unwrap();
        log.append([&letters[1].event.id()]).unwrap();
        dir.prune(log).unwrap();
        assert!(dir.files().unwrap().is_empty(), "a relay that has written to it begins another one");
        assert!(dir.replayed().unwrap().is_empty(), "the list goes with the last file");
        writer.write(&letters[..1], 6).unwrap();
        assert_eq!(read(&dir).letters, letters[..1]);
    }

    /// Deletes of all that is there.
    fn delete(dir: &DeadLetterDir, is_meant: impl Fn(&DeadLetterHead) -> bool) -> io::Result<Deletion> {
        dir.delete(dir.open_replayed().unwrap(), &seen(dir), is_meant)
    }

    fn seen(dir: &DeadLetterDir) -> Seen {
        let replayed = dir.replayed().unwrap();
        let bytes = |path: &PathBuf| DeadLetterDir::read(path, &replayed, &Sealing::default()).unwrap().bytes;
        dir.files().unwrap().into_iter().map(|path| (path.clone(), bytes(&path))).collect()
    }

    /// Letters of one time, of which the last ones are not there yet when they are
    /// looked at.
    #[test]
    fn what_is_written_behind_the_letters_that_were_seen_is_not_deleted() {
        let (_data, dir) = dir();
        let letters = ["a", "b", "c", "d"].map(letter);
        let mut writer = LetterWriter::open(&dir, 1 << 20).unwrap();
        writer.write(&letters[..2], 5).unwrap();
        let path = dir.files().unwrap().remove(0);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        // A write that is under way.
        let third = json(&letters[2]);
        file.write_all(&third[..20]).unwrap();
        let log = dir.open_replayed().unwrap();
        let seen = seen(&dir);
        file.write_all(&third[20..]).unwrap();
        LetterWriter::open(&dir, 1 << 20).unwrap().write(&letters[3..], 5).unwrap();
        let deletion = dir.delete(log, &seen, |_| true).unwrap();
        assert_eq!(deletion.deleted, BTreeMap::from([(DeadLetterReason::Invalid, 2)]));
        assert_eq!(read(&dir).letters, letters[2..]);
    }

    fn of(reason: DeadLetterReason) -> DeadLetter {
        DeadLetter { reason, ..letter("x") }
    }

    #[test]
    fn letters_are_deleted_beside_the_relay_that_writes_them_and_no_others() {
        let (_data, dir) = dir();
        let invalid = [of(DeadLetterReason::Invalid), of(DeadLetterReason::Invalid)];
        let expired = [of(DeadLetterReason::Expired), of(DeadLetterReason::Expired)];
        let mut writer = LetterWriter::open(&dir, 1 << 20).unwrap();
        writer.write(&[invalid[0].clone(), expired[0].clone()], 5).unwrap();
        let path = dir.files().unwrap().remove(0);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"garbage\n").unwrap();
        let is_invalid = |head: &DeadLetterHead| head.reason == DeadLetterReason::Invalid;
        let deletion = delete(&dir, is_invalid).unwrap();
        assert_eq!(deletion.deleted, BTreeMap::from([(DeadLetterReason::Invalid, 1)]));
        assert!(deletion.failed.is_empty());
        let stored = read(&dir);
        assert_eq!((stored.letters, stored.damaged), (expired[..1].to_vec(), 1), "what cannot be read stays");
        // The relay does not write to the file that was replaced.
        writer.write(&[invalid[1].clone(), expired[1].clone()], 6).unwrap();
        assert_eq!(read(&dir).letters, [expired[0].clone(), invalid[1].clone(), expired[1].clone()]);

        // A write that is under way is waited for, and one that comes meanwhile goes elsewhere.
        let newest = File::open(dir.files().unwrap().pop().unwrap()).unwrap();
        newest.lock().unwrap();
        writer.write(&invalid[..1], 7).unwrap();
        assert_eq!(dir.files().unwrap().len(), 3);
        newest.unlock().unwrap();
        let deletion = delete(&dir, |_| true).unwrap();
        assert_eq!(deletion.deleted.values().sum::<u64>(), 4);
        assert_eq!(dir.files().unwrap(), [path], "but for what cannot be read");
        let measured = LetterWriter::open(&dir, 1 << 20).unwrap().bytes();
        assert_eq!(measured.load(Ordering::Relaxed), 8);
    }

    #[test]
    fn a_file_that_somebody_put_there_is_read_as_far_as_it_is_the_providers() {
        let (_data, dir) = dir();
        let ours = letter("a");
        let theirs = DeadLetter { provider: "segment".into(), ..letter("b") };
        LetterWriter::open(&dir, 1 << 20).unwrap().write(&[ours.clone(), theirs], 5).unwrap();
        let path = dir.files().unwrap().remove(0);
        let stored = DeadLetterDir::read(&path, &HashSet::new(), &Sealing::default()).unwrap();
        assert_eq!((stored.letters, stored.damaged, stored.foreign), (vec![ours], 0, 1));
        let deletion = delete(&dir, |_| true).unwrap();
        assert_eq!(deletion.deleted.values().sum::<u64>(), 1);
        assert_eq!(
            DeadLetterDir::read(&path, &HashSet::new(), &Sealing::default()).unwrap().foreign,
            1,
            "it is not ours to delete"
        );
    }

    #[test]
    fn two_replays_at_a_time_are_refused() {
        let (_data, dir) = dir();
        LetterWriter::open(&dir, 1).unwrap();
        let _first = dir.open_replayed().unwrap();
        assert_eq!(dir.open_replayed().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_torn_last_line_is_no_letter_and_no_damage() {
        let (_data, dir) = dir();
        let mut writer = LetterWriter::open(&dir, 1 << 20).unwrap();
        writer.write(&[letter("a")], 5).unwrap();
        let path = dir.files().unwrap().remove(0);
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(b"garbage\n{\"dead_since_ms\":1,\"prov").unwrap();
        let stored = read(&dir);
        assert_eq!((stored.letters.len(), stored.damaged), (1, 1));
    }

    /// What a person does who has not the key, and what takes it.
    #[test]
    fn sealed_letters_are_counted_and_deleted_without_the_key_and_read_with_it() {
        let (_data, dir) = dir();
        let keys = crate::sealing::test_keys("a");
        let letters = [letter("canary"), letter("b"), letter("c")];
        let mut writer = LetterWriter::open(&dir, 1 << 20).unwrap().sealing(&keys);
        writer.write(&letters, 5).unwrap();
        let path = dir.files().unwrap().remove(0);
        assert_eq!(path.extension().unwrap(), "sealed");
        let bytes = fs::read(&path).unwrap();
        for hidden in [&b"canary"[..], b"400 no"] {
            assert!(memchr::memmem::find(&bytes, hidden).is_none());
        }
        let read = |sealing: &Sealing| DeadLetterDir::read(&path, &dir.replayed().unwrap(), sealing).unwrap();
        assert_eq!(read(&keys).letters, letters);
        let locked = read(&Sealing::default());
        assert_eq!(locked.locked, letters.clone().map(|letter| letter.head()));
        assert!(locked.why_locked.unwrap().to_string().contains("\"a\""));
        assert!(dir.locked(&keys).unwrap().is_none());
        assert_eq!(dir.locked(&Sealing::default()).unwrap().unwrap().0, path);

        let mut log = dir.open_replayed().unwrap();
        log.append([&letters[0].event.id()]).unwrap();
        dir.prune(log).unwrap();
        assert_eq!(read(&keys).letters, letters[1..], "what was replayed is known by its id");
        let id = letters[1].event.id().into_owned();
        let deletion = delete(&dir, |head| head.event_id == id).unwrap();
        assert_eq!(deletion.deleted.values().sum::<u64>(), 1);
        assert_eq!(read(&keys).letters, letters[2..]);
        delete(&dir, |_| true).unwrap();
    }
}
