//! Items of a batch that the relay took from a caller which reads no answers, and that
//! broke a rule, or are of a schema that only a newer relay knows: kept as they came, to
//! be mended by a person and sent again.
//!
//! `DATA_DIR/refused/<time>-<turn>.ndjson` (or `.sealed`), one [`RefusedItem`] a line, as
//! [`letter_files`] has them. Such an item is no event yet, and
//! counts for no provider.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use analytics_relay_providers::EventId;
use prometheus_client::metrics::counter::Counter;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::{
    sync::{self, oneshot},
    task::spawn_blocking,
    time::timeout,
};
use tracing::{error, warn};

use crate::{
    files::{self, Lock},
    letter_files::{self, Letter, LetterWriter, Line},
    privacy::Privacy,
    sealing::{FileKind, Locked, Sealing, lines::first_locked},
    telemetry::OnceInAWhile,
};

/// Most bytes of items that wait for the disk.
const WAITING_BYTES_MAX: usize = 16 * 1024 * 1024;
/// How long a caller waits until its items are on the disk.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two log lines that say the same.
const TELL_INTERVAL: Duration = Duration::from_secs(60);
/// About what an item holds beside its JSON.
const BESIDE_JSON_BYTES: usize = 512;

/// One of them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RefusedItem {
    /// Its own: also the id of the event that it becomes, if it names none itself.
    pub(crate) letter_id: String,
    /// When it came: Unix milliseconds.
    pub(crate) refused_since_ms: i64,
    /// A name of [`RefusalReason`](crate::reasons::RefusalReason).
    pub(crate) reason: String,
    /// What Segment calls it, where it has a word for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) discard_reason: Option<String>,
    /// The field that breaks the rule; empty for the whole.
    pub(crate) field: String,
    /// In words.
    pub(crate) detail: String,
    pub(crate) schema_version: u32,
    /// What stood beside the items of its batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) context: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) integrations: Option<Box<RawValue>>,
    /// When its batch was sent by its caller's clock, if that is a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sent_at_ms: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) seen: Option<Seen>,
    /// As it came, but for line breaks between its tokens.
    pub(crate) item: Box<RawValue>,
}

/// What a call showed of its user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ip: Option<IpAddr>,
    #[serde(default)]
    pub(crate) user_agent: String,
    /// The user declines to be followed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) declined: bool,
}

/// What of it can be read without the key that it is sealed with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RefusedHead {
    pub(crate) letter_id: String,
    pub(crate) refused_since_ms: i64,
    pub(crate) reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) discard_reason: Option<String>,
    pub(crate) schema_version: u32,
}

impl Letter for RefusedItem {
    const KIND: FileKind = FileKind::Refused;
    type Head = RefusedHead;

    fn head(&self) -> RefusedHead {
        RefusedHead {
            letter_id: self.letter_id.clone(),
            refused_since_ms: self.refused_since_ms,
            reason: self.reason.clone(),
            discard_reason: self.discard_reason.clone(),
            schema_version: self.schema_version,
        }
    }

    /// All of it: names of fields are the caller's too.
    fn secret(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("an item is JSON")
    }

    fn join(head: RefusedHead, secret: &[u8]) -> Option<Self> {
        serde_json::from_slice(secret).ok().filter(|item: &Self| item.head() == head)
    }
}

impl RefusedItem {
    /// True if its user declines to be followed.
    pub(crate) fn is_declined(&self) -> bool {
        self.seen.as_ref().is_some_and(|seen| seen.declined)
    }

    /// An id that no other has.
    pub(crate) fn new_id() -> String {
        EventId::assign().as_str().to_owned()
    }

    /// Takes out of it what must not be kept.
    fn clean(&mut self, privacy: &Privacy) {
        if let Some(left) = privacy.item(&self.item) {
            self.item = left;
        }
        if let Some(left) = self.context.as_deref().and_then(|context| privacy.beside_item(context)) {
            self.context = Some(left);
        }
        let integrations = self.integrations.as_deref();
        if let Some(left) = integrations.and_then(|integrations| privacy.integrations(integrations)) {
            self.integrations = Some(left);
        }
        if let Some(seen) = &mut self.seen {
            (seen.ip, seen.user_agent) = privacy.seen(seen.ip, &seen.user_agent);
        }
    }

    /// About what it holds, with what stood beside it.
    pub(crate) fn memory_bytes(&self) -> usize {
        let beside = [&self.context, &self.integrations];
        let beside: usize = beside.into_iter().flatten().map(|json| json.get().len()).sum();
        BESIDE_JSON_BYTES + self.item.get().len() + beside
    }
}

/// Where they are.
#[derive(Debug, Clone)]
pub(crate) struct RefusedDir(PathBuf);

/// What a file holds.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    pub(crate) items: Vec<RefusedItem>,
    /// Those of them that are sealed and whose key is not there: what can be read, and why
    /// no more.
    pub(crate) locked: Vec<RefusedHead>,
    pub(crate) why_locked: Option<Locked>,
    /// Those that somebody has changed.
    pub(crate) broken: Vec<RefusedHead>,
    /// Lines that cannot be read.
    pub(crate) damaged: usize,
}

impl Stored {
    /// What can be read of its items in any case.
    pub(crate) fn into_heads(self) -> impl Iterator<Item = RefusedHead> {
        let items = self.items.into_iter().map(|item| item.head());
        items.chain(self.locked).chain(self.broken)
    }
}

impl RefusedDir {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self(data_dir.join("refused"))
    }

    /// Their files, oldest first; each small enough to be read whole.
    pub(crate) fn files(&self) -> io::Result<Vec<PathBuf>> {
        files::list_lines(&self.0)
    }

    /// Keeps every other command away that takes items out, as long as this is held, and
    /// removes what one that was killed has left.
    pub(crate) fn lock(&self) -> io::Result<Option<File>> {
        if !self.0.exists() {
            return Ok(None);
        }
        let path = self.0.join("commands.lock");
        let file = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        if let Lock::Theirs = Lock::of(file.try_lock())? {
            let busy = "another command is at work on the refused items";
            return Err(io::Error::new(io::ErrorKind::WouldBlock, busy));
        }
        letter_files::remove_unfinished(&self.0)?;
        Ok(Some(file))
    }

    /// Reads a file, also beside a relay that is writing to it. It may be gone.
    pub(crate) fn read(path: &Path, sealing: &Sealing) -> io::Result<Stored> {
        let mut stored = Stored::default();
        let read = letter_files::read_letters(path, sealing, |_, item| match item {
            Line::Letter(item) => stored.items.push(item),
            Line::Locked(head) => stored.locked.push(head),
            Line::Broken(head) => stored.broken.push(head),
            Line::Damaged => stored.damaged += 1,
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Stored::default()),
            read => read.map(|why_locked| Stored { why_locked, ..stored }),
        }
    }

    /// Why some of them cannot be read, and in which file.
    pub(crate) fn locked(&self, sealing: &Sealing) -> io::Result<Option<(PathBuf, Locked)>> {
        first_locked(self.files()?, FileKind::Refused, sealing)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> io::Result<usize> {
        let count = |path: &PathBuf| Ok(Self::read(path, &Sealing::default())?.into_heads().count());
        self.files()?.iter().map(count).sum()
    }

    /// Takes those out that have these ids, also beside a relay that is writing. Each
    /// file is as it was, or without them. Returns how many there were.
    pub(crate) fn delete(&self, ids: &HashSet<String>) -> io::Result<usize> {
        let mut deleted = 0;
        for path in self.files()? {
            let is_meant = |head: &RefusedHead| ids.contains(&head.letter_id);
            match letter_files::delete_from::<RefusedItem>(&path, u64::MAX, is_meant) {
                Ok(taken) => deleted += taken.len(),
                // A relay had begun it, and removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(deleted)
    }
}

/// Writes what callers wait for, in groups, each synced once. Bounded in bytes on disk
/// and in memory, and in time; what there is no room for is lost, counted and told.
#[derive(Debug)]
pub(crate) struct RefusedKeeper {
    dir: RefusedDir,
    bytes_max: u64,
    sealing: Sealing,
    /// Opened for the first item.
    writer: Mutex<Option<LetterWriter>>,
    waiting: Mutex<Vec<Waiting>>,
    waiting_bytes: AtomicUsize,
    /// Groups of items that were looked at, and those of which nothing is to be written any
    /// more.
    begun: AtomicU64,
    ended: AtomicU64,
    /// Who has it writes for all.
    turn: sync::Mutex<()>,
    /// What must not be kept of an event must not be kept of these.
    privacy: Option<Arc<Privacy>>,
    kept: Told,
    lost: Told,
}

/// Items of one call, and who wants to know whether all of them are on the disk.
#[derive(Debug)]
struct Waiting {
    items: Vec<RefusedItem>,
    bytes: usize,
    answer: oneshot::Sender<bool>,
    _group: Group,
}

/// Items that were looked at and are not on the disk yet. Counted until it goes.
#[derive(Debug)]
struct Group(Arc<RefusedKeeper>);

impl Group {
    fn of(keeper: &Arc<RefusedKeeper>) -> Self {
        keeper.begun.fetch_add(1, Ordering::AcqRel);
        Self(keeper.clone())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::AcqRel);
    }
}

impl RefusedKeeper {
    pub(crate) fn new(
        data_dir: &Path,
        bytes_max: u64,
        privacy: Option<Arc<Privacy>>,
        sealing: &Sealing,
        kept: Counter,
        lost: Counter,
    ) -> Arc<Self> {
        Arc::new(Self {
            dir: RefusedDir::new(data_dir),
            bytes_max,
            sealing: sealing.clone(),
            writer: Mutex::default(),
            waiting: Mutex::default(),
            waiting_bytes: AtomicUsize::new(0),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            turn: sync::Mutex::default(),
            privacy,
            kept: Told::new(kept),
            lost: Told::new(lost),
        })
    }

    /// Keeps items, but for those of erased users, and waits until they are on the disk, but
    /// not for long. Nothing of them is given up if the future is dropped. False if they are
    /// lost, or may be.
    pub(crate) async fn keep(
        self: &Arc<Self>,
        mut items: Vec<RefusedItem>,
        now_ms: i64,
        is_erased: impl Fn(&RefusedItem) -> bool,
    ) -> bool {
        let group = Group::of(self);
        items.retain(|item| !is_erased(item));
        if items.is_empty() {
            return true;
        }
        if let Some(privacy) = &self.privacy {
            items.iter_mut().for_each(|item| item.clean(privacy));
        }
        let bytes: usize = items.iter().map(RefusedItem::memory_bytes).sum();
        if self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > WAITING_BYTES_MAX {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.lose(items.len());
            return false;
        }
        let (answer, answered) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(Waiting {
            items,
            bytes,
            answer,
            _group: group,
        });
        let keeper = self.clone();
        tokio::spawn(async move {
            let _turn = keeper.turn.lock().await;
            let writer = keeper.clone();
            // It may be that another has written ours with its own.
            spawn_blocking(move || writer.write_waiting(now_ms)).await
        });
        matches!(timeout(PATIENCE, answered).await, Ok(Ok(true)))
    }

    /// How many groups were begun.
    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// True if as many have ended: then none that was looked at before is still to come.
    pub(crate) fn has_ended(&self, groups: u64) -> bool {
        self.ended.load(Ordering::Acquire) >= groups
    }

    fn write_waiting(&self, now_ms: i64) {
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        let (mut items, mut answers) = (Vec::new(), Vec::new());
        for group in waiting {
            items.extend(group.items);
            answers.push((items.len(), group.bytes, group.answer, group._group));
        }
        let written = if items.is_empty() { 0 } else { self.write(&items, now_ms) };
        if let Some(items) = self.kept.count(written) {
            let see = "analytics-relay dead-letters refused list";
            warn!(items, see, "refused items of batches are kept, whose callers believe them to be taken");
        }
        self.lose(items.len() - written);
        for (end, bytes, answer, _group) in answers {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            // Nobody listens who has gone.
            let _ = answer.send(end <= written);
        }
    }

    /// How many of the first are on the disk now.
    fn write(&self, items: &[RefusedItem], now_ms: i64) -> usize {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if writer.is_none() {
            match LetterWriter::open(&self.dir.0, self.bytes_max) {
                Ok(opened) => *writer = Some(opened.sealing(&self.sealing)),
                Err(error) => warn!(%error, dir = %self.dir.0.display(), "refused items cannot be written"),
            }
        }
        let Some(writer) = writer.as_mut() else { return 0 };
        writer.write(items, now_ms).map_or_else(|not_written| not_written.written, |()| items.len())
    }

    fn lose(&self, items: usize) {
        if let Some(items) = self.lost.count(items) {
            let why = "they have used up DEAD_LETTERS_MAX_BYTES, or the disk is too slow or fails";
            error!(items, why, "refused items of batches are lost");
        }
    }
}

/// What is counted, and told once in a while.
#[derive(Debug)]
struct Told {
    items: Counter,
    lines: Mutex<OnceInAWhile>,
}

impl Told {
    fn new(items: Counter) -> Self {
        Self { items, lines: Mutex::new(OnceInAWhile::every(TELL_INTERVAL)) }
    }

    /// How many there are to be told of, if it is time to.
    fn count(&self, items: usize) -> Option<u64> {
        if items == 0 {
            return None;
        }
        self.items.inc_by(items as u64);
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).takes(items as u64, Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::to_raw_value;

    use super::*;
    use crate::reasons::RefusalReason;

    fn item(name: &str) -> RefusedItem {
        RefusedItem {
            letter_id: RefusedItem::new_id(),
            refused_since_ms: 5,
            reason: RefusalReason::EventNameEmpty.name().to_owned(),
            discard_reason: None,
            field: "event".into(),
            detail: String::new(),
            schema_version: 1,
            context: None,
            integrations: None,
            sent_at_ms: None,
            seen: None,
            item: to_raw_value(name).unwrap(),
        }
    }

    fn keeper(dir: &Path, bytes_max: u64) -> (Arc<RefusedKeeper>, Counter, Counter) {
        let (kept, lost) = (Counter::default(), Counter::default());
        let keeper =
            RefusedKeeper::new(dir, bytes_max, None, &Sealing::default(), kept.clone(), lost.clone());
        (keeper, kept, lost)
    }

    fn stored(dir: &Path) -> Vec<String> {
        let files = RefusedDir::new(dir).files().unwrap();
        let items = files.iter().flat_map(|path| RefusedDir::read(path, &Sealing::default()).unwrap().items);
        items.map(|item| item.item.get().to_owned()).collect()
    }

    #[tokio::test]
    async fn what_is_kept_is_there_when_its_caller_is_answered_and_is_taken_out_by_its_ids() {
        let dir = tempfile::tempdir().unwrap();
        let (keeper, kept, lost) = keeper(dir.path(), 1 << 20);
        let (one, two) = (item("one"), item("two"));
        let ids = HashSet::from([one.letter_id.clone()]);
        assert!(keeper.keep(vec![one], 5, |_| false).await);
        assert_eq!(stored(dir.path()), [r#""one""#]);
        assert!(keeper.keep(vec![two, item("three")], 6, |_| false).await);
        assert_eq!((kept.get(), lost.get()), (3, 0));
        assert_eq!(RefusedDir::new(dir.path()).delete(&ids).unwrap(), 1);
        assert_eq!(stored(dir.path()), [r#""two""#, r#""three""#]);
    }

    /// Each learns what became of its own, however many are written together.
    #[tokio::test]
    async fn what_there_is_no_room_for_is_lost_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let line = serde_json::to_vec(&item("x")).unwrap().len() as u64 + 1;
        let (keeper, kept, lost) = keeper(dir.path(), 5 * line);
        let calls = (0..8).map(|_| keeper.keep(vec![item("x")], 5, |_| false));
        let answers = futures_util::future::join_all(calls).await;
        assert_eq!(answers.iter().filter(|kept| **kept).count(), 5, "{answers:?}");
        assert_eq!((kept.get(), lost.get(), stored(dir.path()).len()), (5, 3, 5));
        let large = item(&"x".repeat(WAITING_BYTES_MAX));
        assert!(!keeper.keep(vec![large], 5, |_| false).await);
        assert_eq!((lost.get(), keeper.waiting_bytes.load(Ordering::Relaxed)), (4, 0));
    }
}
