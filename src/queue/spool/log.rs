//! The write-ahead log: segments, cursors and quarantine as one value. It knows
//! no threads, no channels and no clock; the thread that owns it is in
//! [`writer`](super::writer).
//!
//! ```text
//! SPOOL_DIR/
//!   spool.lock                        held by the process that writes
//!   segments/00000000000000000001.log named by their first event
//!   segments/….log.unreadable         passed by all, and nobody had the key
//!   cursors/mixpanel.cursor           one for each provider
//!   quarantine/…                      copies of what cannot be read
//! ```
//!
//! What holds after a crash at any call:
//!
//! - A segment and a cursor get their name only when they are complete and
//!   synced, and the directory is synced after. A file that ends in
//!   `.unfinished` was never in use.
//! - Events are numbered without gaps. A segment ends where the next one
//!   begins; frames beyond belong to a group that failed.
//! - A segment is removed only when every cursor on disk has passed it.
//! - Only the newest segment can have a torn end. It is copied to quarantine
//!   before it is cut. Damage anywhere else is found when it is read.
//! - A sealed segment is written by the process that has begun it and by no other: what
//!   comes after a crash goes into a new one, under a new key. A number that is given again
//!   is never sealed under the same.

use std::{collections::BTreeSet, io, ops::Range, path::Path, sync::Arc, time::Instant};

use tracing::{error, info, warn};

use super::{
    cursor::{CursorFile, ENDING as CURSOR_ENDING, EndedAs, FORGET_ENDING},
    error::SpoolError,
    frame::{Kind, SEALED_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentStart},
    fs::{SpoolFile, SpoolFs},
    head::Head,
    index::{Index, Segment, SegmentKey, SegmentKeys},
    layout::{LogDirs, UNFINISHED, unfinished, unreadable},
    quarantine::{DamagedRange, Quarantine},
    scan::{Item, Scanner},
    sealed,
};
use crate::{
    sealing::{FileKind, KEY_BLOCK_BYTES, Locked, Sealer, Sealing},
    telemetry::LogBudget,
};

/// Limits of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes of a segment, reserved when it is made.
    pub segment_bytes: u64,
    /// Most bytes of all segments.
    pub bytes_max: u64,
}

impl LogLimits {
    /// Quarantine may take a tenth of what the segments may, and this much at least.
    const QUARANTINE_BYTES_MIN: u64 = 16 * 1024 * 1024;

    /// Most bytes of all that is in quarantine.
    pub(crate) fn quarantine_bytes_max(self) -> u64 {
        (self.bytes_max / 10).max(Self::QUARANTINE_BYTES_MIN)
    }
}

/// Whether a log is sealed.
#[derive(Debug, Clone, Default)]
pub(crate) struct LogKeys {
    pub(crate) sealing: Sealing,
    /// Segments whose key is not there are passed over, and set aside in the end; else a log
    /// with such is not opened.
    pub(crate) passes_unreadable: bool,
}

/// Why a group of frames is not in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AppendError {
    /// There is no room, and nothing of the group will ever be read.
    Full,
    /// The disk failed. Whether the group is on it is not known.
    Failed,
}

/// The segment that is written to.
#[derive(Debug)]
struct Active {
    file: Box<dyn SpoolFile>,
    used: u64,
    /// Something was written since the last sync.
    unsynced: bool,
    sealer: Option<Sealer>,
}

impl Active {
    /// Cuts off what stands behind the last group, and syncs: even if it cannot
    /// be cut, for what was written without a sync has no other chance.
    fn end(&self) -> io::Result<()> {
        let cut = self.file.set_len(self.used);
        self.file.sync_data().and(cut)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Log {
    fs: Arc<dyn SpoolFs>,
    dirs: LogDirs,
    limits: LogLimits,
    sealing: Sealing,
    index: Arc<Index>,
    active: Option<Active>,
    cursors: Vec<CursorFile>,
    quarantine: Quarantine,
    /// Damaged ranges that could not be copied yet: their segments stay.
    unkept: BTreeSet<DamagedRange>,
    /// Calls in a row that failed.
    failures: u32,
    /// See [`Log::last_seen_ms`].
    last_seen_ms: Option<i64>,
    cursor_lines: LogBudget,
}

/// What opening a log found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Recovery {
    /// Bytes of a torn end that were cut off.
    pub(crate) torn_bytes: u64,
    /// Damaged ranges that were met now for the first time.
    pub(crate) damaged: u64,
    /// Providers whose cursor was not there or could not be read.
    pub(crate) new_cursors: Vec<String>,
}

impl Log {
    /// Opens the log of a directory, or makes one. Repairs what a crash left:
    /// reads the newest segment, the headers of the others and the cursors,
    /// however much is in the log. Can itself be cut short anywhere.
    pub(crate) fn open(
        fs: Arc<dyn SpoolFs>,
        dirs: &LogDirs,
        limits: LogLimits,
        keys: &LogKeys,
        providers: &[&str],
        now_ms: i64,
    ) -> Result<(Self, Recovery), SpoolError> {
        let (mut log, recovery) = Self::recover(fs, dirs, limits, keys, providers)?;
        if log.active.is_none() && log.has_room_at_start() {
            match log.begin_segment(now_ms) {
                Ok(()) => {}
                // What is in the log is delivered, which makes room.
                Err(error) if is_full(&error) => warn!(%error, "no segment can be begun yet"),
                Err(source) => return Err(SpoolError::at(&log.dirs.segments, source)),
            }
        }
        Ok((log, recovery))
    }

    /// As [`Log::open`], but for a segment to write to, if the newest one is none: for who
    /// repairs a log and appends nothing.
    pub(crate) fn recover(
        fs: Arc<dyn SpoolFs>,
        dirs: &LogDirs,
        limits: LogLimits,
        keys: &LogKeys,
        providers: &[&str],
    ) -> Result<(Self, Recovery), SpoolError> {
        let mut recovery = Recovery::default();
        prepare_dirs(&*fs, dirs)?;
        let in_segments = |source| SpoolError::at(&dirs.segments, source);
        let mut quarantine = Quarantine::open(&*fs, &dirs.quarantine, limits.quarantine_bytes_max())
            .map_err(|source| SpoolError::at(&dirs.quarantine, source))?;

        let known = quarantine.ranges();
        let mut segments = list_segments(&*fs, &dirs.segments).map_err(in_segments)?;
        let segment_keys = read_heads(&*fs, dirs, &segments, keys, &mut quarantine)?;
        let (mut active, mut newest_ms) = (None, None);
        if let Some(newest) = segments.last_mut() {
            let key = segment_keys.get(&newest.first_seq).cloned().unwrap_or_default();
            // Nobody goes on under a key that another process has used.
            let goes_on = matches!(key, SegmentKey::Plain) && !keys.sealing.seals();
            let frames_at = key.frames_at();
            let repaired =
                repair_newest(&*fs, dirs, newest, frames_at, goes_on, &mut quarantine, &mut recovery);
            (active, newest_ms) = repaired.map_err(in_segments)?;
        }
        let next_seq = segments.last().map_or(1, |segment| segment.end_seq);
        let oldest_seq = segments.first().map_or(next_seq, |segment| segment.first_seq);

        let mut cursors = Vec::new();
        for provider in cursor_names(&*fs, dirs, providers)? {
            let opened = CursorFile::open(&*fs, &dirs.cursors, &provider, oldest_seq, &mut quarantine)?;
            let (cursor, is_new) = opened;
            if is_new {
                recovery.new_cursors.push(provider);
            }
            cursors.push(cursor);
        }
        recovery.damaged = quarantine.ranges() - known;
        // A number is never used twice, even if the end of the log was lost.
        let next_seq = cursors.iter().map(|file| file.cursor.end_seq()).fold(next_seq, u64::max);
        let last_seen_ms = cursors.iter().filter_map(|file| file.cursor.seen_ms()).max().or(newest_ms);

        let index = Arc::new(Index::with_keys(segments, segment_keys, next_seq));
        let (fs, dirs) = (fs.clone(), dirs.clone());
        let unkept = BTreeSet::new();
        let log = Self {
            fs,
            dirs,
            limits,
            sealing: keys.sealing.clone(),
            index,
            active,
            cursors,
            quarantine,
            unkept,
            failures: 0,
            last_seen_ms,
            cursor_lines: LogBudget::default(),
        };
        Ok((log, recovery))
    }

    /// Each start of a sealed log begins a segment: many must not make it larger than it may
    /// be. What is delivered makes room, and then the first event begins one.
    fn has_room_at_start(&self) -> bool {
        let (bytes, segments) = self.index.size();
        segments == 0 || bytes + self.limits.segment_bytes <= self.limits.bytes_max
    }

    /// What readers see of the log.
    pub(crate) fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// The number of the next event.
    pub(crate) fn next_seq(&self) -> u64 {
        self.index.next_seq()
    }

    /// What time it was when the log was last written, before it was opened: by a
    /// wall clock that could be trusted, as far as that is known. `None` for a log
    /// that was just made.
    pub(crate) fn last_seen_ms(&self) -> Option<i64> {
        self.last_seen_ms
    }

    /// Notes what time it is, by a wall clock that can be trusted.
    pub(crate) fn saw(&mut self, now_ms: i64) {
        self.cursors.iter_mut().for_each(|cursor| cursor.saw(now_ms));
    }

    /// Appends a group of complete frames of `events` events, the first of them
    /// with the number [`Log::next_seq`]; synced, if `sync` says so. All of it
    /// is in the log when this returns, or none.
    pub(crate) fn append(
        &mut self,
        group: &[u8],
        events: u64,
        sync: bool,
        now_ms: i64,
    ) -> Result<(), AppendError> {
        let (header_bytes, bytes_max) = match self.sealing.seals() {
            true => (SEALED_HEADER_BYTES, sealed::bytes_max(group)),
            false => (SEGMENT_HEADER_BYTES, group.len()),
        };
        let room = self.limits.segment_bytes.max((header_bytes + bytes_max) as u64);
        let fits = |active: &Active| active.used + bytes_max as u64 <= room;
        if !self.active.as_ref().is_some_and(fits) {
            self.roll(room, now_ms)?;
        }
        let active = self.active.as_mut().expect("a segment was just begun");
        let mut sealed = Vec::new();
        let group = match &mut active.sealer {
            None => group,
            Some(sealer) => {
                sealed::seal_group(sealer, group, &mut sealed);
                &sealed
            }
        };
        let before = active.used;
        if let Err(error) = active.file.write_all_at(group, before) {
            return Err(self.take_back(&error, "write"));
        }
        if sync && let Err(error) = active.file.sync_data() {
            // What a failed sync left is not known and a second one would not
            // tell: the file is left for good.
            let failed = self.take_back(&error, "sync");
            self.active = None;
            return Err(failed);
        }
        active.used += group.len() as u64;
        active.unsynced = !sync;
        let used = active.used;
        self.index.appended(self.index.next_seq() + events, used);
        self.failures = 0;
        Ok(())
    }

    /// Cuts off what a failed group left, so that nobody reads it.
    fn take_back(&mut self, error: &io::Error, call: &'static str) -> AppendError {
        let Some(active) = &self.active else { return AppendError::Failed };
        let cut = active.end();
        let full = is_full(error);
        if full && cut.is_ok() {
            self.index.allocated(active.used);
            return AppendError::Full;
        }
        error!(%error, call, "the spool cannot be written: a new segment is begun");
        self.failures += 1;
        self.active = None;
        AppendError::Failed
    }

    /// Ends the segment that is written to and begins the next one.
    fn roll(&mut self, room: u64, now_ms: i64) -> Result<(), AppendError> {
        let (bytes, _) = self.index.size();
        let freed = self.active.as_ref().map_or(0, |active| {
            let allocated = active.file.len().unwrap_or(active.used);
            allocated.saturating_sub(active.used)
        });
        if bytes - freed.min(bytes) + room > self.limits.bytes_max {
            return Err(AppendError::Full);
        }
        if let Some(active) = self.active.take() {
            // What was reserved and not used goes back.
            match active.end() {
                Ok(()) => self.index.allocated(active.used),
                Err(error) => error!(%error, "a segment could not be synced at its end"),
            }
        }
        self.begin_segment(now_ms).map_err(|error| {
            if is_full(&error) {
                return AppendError::Full;
            }
            error!(%error, "no new segment can be begun");
            self.failures += 1;
            AppendError::Failed
        })
    }

    fn begin_segment(&mut self, now_ms: i64) -> io::Result<()> {
        let first_seq = self.index.next_seq();
        let begun = self.sealing.begin(FileKind::Segment)?;
        let mut header =
            SegmentHeader { first_seq, created_ms: now_ms, is_sealed: begun.is_some() }.encode().to_vec();
        let (sealer, key) = match begun {
            None => (None, SegmentKey::Plain),
            Some((sealer, block)) => {
                header.extend(block.encode(KEY_BLOCK_BYTES - SEGMENT_HEADER_BYTES));
                header.extend(block.encode(KEY_BLOCK_BYTES));
                let key = SegmentKey::Key(sealer.key());
                (Some(sealer), key)
            }
        };
        let used = header.len() as u64;
        let allocated = self.limits.segment_bytes.max(used);
        let segment = Segment { first_seq, end_seq: first_seq, used, allocated };
        let path = segment.path(&self.dirs.segments);
        let new = unfinished(&path);
        let file = self.fs.create(&new)?;
        let made = (|| {
            file.allocate(allocated)?;
            file.write_all_at(&header, 0)?;
            file.sync_data()?;
            self.fs.rename(&new, &path)?;
            self.fs.sync_dir(&self.dirs.segments)
        })();
        if let Err(error) = made {
            // An empty segment under its name is no harm: the next try
            // replaces it. What was reserved is given back.
            let _ = file.set_len(used);
            let _ = self.fs.remove(&new);
            return Err(error);
        }
        self.index.push(segment, key);
        self.active = Some(Active { file, used, unsynced: false, sealer });
        Ok(())
    }

    /// Syncs what was written without a sync. Returns false if it cannot be.
    pub(crate) fn sync(&mut self) -> bool {
        let Some(active) = self.active.as_mut().filter(|active| active.unsynced) else { return true };
        match active.file.sync_data() {
            Ok(()) => active.unsynced = false,
            Err(error) => {
                // It was promised to survive the process only, which it does.
                error!(%error, "the spool cannot be synced: a new segment is begun");
                self.failures += 1;
                self.active = None;
            }
        }
        self.active.is_some()
    }

    /// After failures, tries whether a segment can be begun. Nobody may be
    /// asking for it: callers go elsewhere while the relay is not ready.
    pub(crate) fn try_again(&mut self, now_ms: i64) {
        if self.is_broken() && self.active.is_none() && self.begin_segment(now_ms).is_ok() {
            self.failures = 0;
        }
    }

    /// True after two failures in a row: no event can be accepted.
    pub(crate) fn is_broken(&self) -> bool {
        self.failures >= 2
    }

    /// True if the segment that is written to is half full and may have no
    /// successor.
    pub(crate) fn is_nearly_full(&self) -> bool {
        let (bytes, segments) = self.index.size();
        let half = self.active.as_ref().is_none_or(|active| active.used > self.limits.segment_bytes / 2);
        segments > 1 && half && bytes + self.limits.segment_bytes > self.limits.bytes_max
    }

    /// True if there is room for one more segment at most.
    pub(crate) fn is_short_of_room(&self) -> bool {
        let (bytes, segments) = self.index.size();
        segments > 1 && bytes + 2 * self.limits.segment_bytes > self.limits.bytes_max
    }

    /// Removes the oldest segment, unless a cursor before a place holds it; those
    /// from there on let go of it. Returns whether room was made, and how many
    /// events each of them gave up.
    pub(crate) fn make_room(&mut self, from: usize, ended_as: &EndedAs) -> (bool, Vec<(usize, u64)>) {
        let Some(segment) = self.index.oldest_ended() else { return (false, Vec::new()) };
        let holds = |file: &CursorFile| !file.is_forgotten() && file.cursor.lowest() < segment.end_seq;
        if self.cursors.iter().take(from).any(holds) {
            return (false, Vec::new());
        }
        let holders: Vec<usize> = (from..self.cursors.len()).filter(|at| holds(&self.cursors[*at])).collect();
        let given_up = holders.into_iter().map(|place| {
            let lowest = self.cursors[place].cursor.lowest();
            (place, self.end(place, lowest..segment.end_seq, ended_as))
        });
        let given_up = given_up.collect();
        // Once for each slot.
        self.sync_cursors();
        self.sync_cursors();
        (self.index.oldest_seq() > segment.first_seq, given_up)
    }

    /// Lets a cursor go, with everything that has not ended at it.
    pub(crate) fn forget(&mut self, place: usize) -> io::Result<()> {
        self.cursors[place].forget(&*self.fs, &self.dirs.cursors)
    }

    /// Providers whose cursors somebody asks to let go of.
    pub(crate) fn asked_to_forget(&self) -> io::Result<Vec<String>> {
        let names = self.fs.list(&self.dirs.cursors)?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(FORGET_ENDING)).map(str::to_owned).collect())
    }

    /// Answers that: whoever asks looks whether the cursor is there still.
    pub(crate) fn answer_forget(&self, provider: &str) -> io::Result<()> {
        self.fs.remove(&self.dirs.cursors.join(format!("{provider}{FORGET_ENDING}")))
    }

    /// The cursors, of providers that are not named too.
    pub(crate) fn cursors(&self) -> &[CursorFile] {
        &self.cursors
    }

    /// Damaged ranges so far.
    pub(crate) fn damaged_ranges(&self) -> u64 {
        self.quarantine.ranges() + self.unkept.len() as u64
    }

    /// What is kept of them.
    pub(crate) fn quarantine_status(&self) -> &Quarantine {
        &self.quarantine
    }

    /// Notes that events ended at a provider, by its place in
    /// [`Log::cursors`]. Returns how many had not ended before.
    pub(crate) fn end(&mut self, cursor: usize, range: Range<u64>, ended_as: &EndedAs) -> u64 {
        self.cursors[cursor].end(range, ended_as)
    }

    /// Writes the cursors that have changed.
    pub(crate) fn write_cursors(&mut self) {
        for cursor in &mut self.cursors {
            if let Err(error) = cursor.write() {
                // Tried again each time, many times a second.
                if self.cursor_lines.takes(0, Instant::now()) {
                    warn!(provider = cursor.provider, %error, "cursor cannot be written");
                }
            }
        }
        if let Some(held) = self.cursor_lines.due(Instant::now()) {
            warn!(lines = held.lines, "cursor cannot be written");
        }
    }

    /// Syncs the cursors, and then removes the segments that all of them have
    /// passed.
    pub(crate) fn sync_cursors(&mut self) {
        for cursor in &mut self.cursors {
            if let Err(error) = cursor.sync() {
                warn!(provider = cursor.provider, %error, "cursor cannot be synced");
            }
        }
        self.remove_passed();
    }

    /// Writes the cursors, and gives the files that somebody else is to sync, by
    /// the places of their cursors. Until [`Log::end_cursor_sync`] is told what
    /// came of it those cursors are not written.
    pub(crate) fn begin_cursor_syncs(&mut self) -> Vec<(usize, Arc<dyn SpoolFile>)> {
        let mut files = Vec::new();
        for (place, cursor) in self.cursors.iter_mut().enumerate() {
            match cursor.begin_sync() {
                Ok(file) => files.extend(file.map(|file| (place, file))),
                Err(error) => warn!(provider = cursor.provider, %error, "cursor cannot be written"),
            }
        }
        files
    }

    /// Notes what came of a cursor's sync.
    pub(crate) fn end_cursor_sync(&mut self, place: usize, synced: io::Result<()>) {
        let cursor = &mut self.cursors[place];
        if let Err(error) = cursor.end_sync(synced) {
            warn!(provider = cursor.provider, %error, "cursor cannot be synced");
        }
    }

    /// Removes the segments that all cursors on disk have passed.
    pub(crate) fn remove_passed(&mut self) {
        self.keep_damaged();
        let Some(passed) = self.cursors.iter().map(CursorFile::safe_lowest).min() else { return };
        while let Some(segment) = self.index.oldest_ended().filter(|segment| segment.end_seq <= passed) {
            if self.unkept.iter().any(|range| range.segment == segment.first_seq) {
                return;
            }
            let path = segment.path(&self.dirs.segments);
            // Somebody may find the key yet.
            let is_readable = !matches!(self.index.key(segment.first_seq), SegmentKey::Missing);
            let gone = match is_readable {
                true => self.fs.remove(&path),
                false => self.fs.rename(&path, &unreadable(&path)),
            };
            match gone {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    warn!(segment = %path.display(), %error, "segment cannot be removed");
                    return;
                }
                Ok(()) | Err(_) => self.index.remove_oldest(),
            }
            match is_readable {
                true => info!(segment = segment.name(), "segment removed: every provider has passed it"),
                false => error!(segment = segment.name(), "segment set aside: nobody could read it"),
            }
            // If that fails it may be back after a crash, and is removed again.
            if let Err(error) = self.fs.sync_dir(&self.dirs.segments) {
                warn!(segment = %path.display(), %error, "the removal of a segment cannot be synced");
                return;
            }
        }
    }

    /// Keeps a copy of a range that a reader found damaged. Returns true if it
    /// was not known.
    pub(crate) fn quarantine(&mut self, segment: u64, at: u64, bytes: u64) -> bool {
        let known = self.damaged_ranges();
        self.unkept.insert(DamagedRange { segment, at, bytes });
        self.keep_damaged();
        self.damaged_ranges() > known
    }

    /// Copies the damaged ranges that are not copied yet.
    fn keep_damaged(&mut self) {
        for range in std::mem::take(&mut self.unkept) {
            let Some(segment) = self.index.segment(range.segment) else { continue };
            let (name, DamagedRange { at, bytes, .. }) = (segment.name(), range);
            let file = self.fs.open_to_read(&segment.path(&self.dirs.segments));
            let kept = file.and_then(|file| self.quarantine.keep(&*self.fs, &*file, &name, at, bytes));
            if let Err(error) = kept {
                warn!(segment = name, at, bytes, %error, "a damaged range cannot be kept aside yet");
                self.unkept.insert(range);
            }
        }
    }
}

/// True for the errors of a disk without room.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Makes the directories, and removes what was never in use.
fn prepare_dirs(fs: &dyn SpoolFs, dirs: &LogDirs) -> Result<(), SpoolError> {
    for dir in [&dirs.segments, &dirs.cursors, &dirs.quarantine] {
        fs.create_dir(dir).map_err(|source| SpoolError::at(dir, source))?;
        remove_unfinished(fs, dir).map_err(|source| SpoolError::at(dir, source))?;
        // What is found may have its name in the machine's memory only.
        fs.sync_dir(dir).map_err(|source| SpoolError::at(dir, source))?;
    }
    fs.sync_dir(&dirs.root).map_err(|source| SpoolError::at(&dirs.root, source))
}

fn remove_unfinished(fs: &dyn SpoolFs, dir: &Path) -> io::Result<()> {
    for name in fs.list(dir)? {
        if name.ends_with(UNFINISHED) {
            fs.remove(&dir.join(name))?;
        }
    }
    Ok(())
}

/// The segments by their names; how far the newest goes is not known yet.
pub(crate) fn list_segments(fs: &dyn SpoolFs, dir: &Path) -> io::Result<Vec<Segment>> {
    let mut segments: Vec<Segment> = Vec::new();
    for first_seq in fs.list(dir)?.iter().filter_map(|name| Segment::parse_name(name)) {
        let mut segment = Segment { first_seq, end_seq: first_seq, used: 0, allocated: 0 };
        segment.used = fs.open_to_read(&segment.path(dir))?.len()?;
        segment.allocated = segment.used;
        if let Some(before) = segments.last_mut() {
            before.end_seq = first_seq;
        }
        segments.push(segment);
    }
    Ok(segments)
}

/// Refuses what a newer relay has written and what there is no key for, and counts headers
/// that cannot be read: the file's name and its frames say the same. Gives the keys of those
/// that are sealed.
fn read_heads(
    fs: &dyn SpoolFs,
    dirs: &LogDirs,
    segments: &[Segment],
    keys: &LogKeys,
    quarantine: &mut Quarantine,
) -> Result<SegmentKeys, SpoolError> {
    let mut segment_keys = SegmentKeys::new();
    for segment in segments {
        let path = segment.path(&dirs.segments);
        let at = |source| SpoolError::at(&path, source);
        let file = fs.open_to_read(&path).map_err(at)?;
        let head = Head::read(&*file, segment.first_seq).map_err(at)?;
        let name = segment.name();
        let mut keep = |at, bytes| {
            if let Err(error) = quarantine.keep(fs, &*file, &name, at, bytes) {
                warn!(segment = name, %error, "a damaged header cannot be kept aside");
            }
        };
        match head.start {
            SegmentStart::Header(_) => {}
            SegmentStart::Newer(version) => {
                return Err(SpoolError::Newer { path: path.display().to_string(), version });
            }
            SegmentStart::Damaged => {
                error!(segment = name, "the header of a segment is damaged; its events are read");
                keep(0, head.header_bytes as u64);
            }
        }
        for (at, bytes) in head.damaged_blocks() {
            error!(segment = name, at, "a key block of a segment is damaged");
            keep(at, bytes);
        }
        let Some(blocks) = &head.blocks else { continue };
        let key = match keys.sealing.open(blocks, FileKind::Segment) {
            Ok(key) => SegmentKey::Key(Arc::new(key)),
            Err(locked) if keys.passes_unreadable || locked == Locked::Damaged => {
                error!(segment = name, %locked, "a segment cannot be read: its events are lost");
                SegmentKey::Missing
            }
            Err(locked) => return Err(SpoolError::Locked { path: path.display().to_string(), locked }),
        };
        segment_keys.insert(segment.first_seq, key);
    }
    Ok(segment_keys)
}

/// Finds the end of the newest segment, and cuts off what stands torn behind
/// it. What is found then is on disk for certain. A segment whose end cannot be
/// cut, because there is no room for a copy or the disk does not give all of it
/// back, is not written to any more; nor is one unless it `goes_on`. Also says when the
/// newest frame was written.
fn repair_newest(
    fs: &dyn SpoolFs,
    dirs: &LogDirs,
    segment: &mut Segment,
    frames_at: u64,
    goes_on: bool,
    quarantine: &mut Quarantine,
    recovery: &mut Recovery,
) -> io::Result<(Option<Active>, Option<i64>)> {
    let path = segment.path(&dirs.segments);
    let file = fs.open(&path)?;
    let length = file.len()?;
    let mut end_seq = segment.first_seq;
    let mut newest_ms = None;
    let mut used = length.min(frames_at);
    let mut torn = 0;
    let mut scanner = Scanner::new(&*file, used, length).reading_around();
    loop {
        match scanner.next()? {
            Item::Frame { at, frame } => {
                used = at + frame.len() as u64;
                // An attempt has the number of the next event: those before it
                // were there, even if they cannot be read.
                end_seq = end_seq.max(frame.seq + u64::from(frame.kind == Kind::Event));
                newest_ms = Some(frame.time_ms);
                torn = 0;
            }
            // Damage, if a frame follows; the torn end otherwise.
            Item::Damage { at, bytes } => torn = at + bytes - used,
            Item::End { .. } => break,
        }
    }
    let met_unreadable = scanner.met_unreadable();
    let kept =
        if torn > 0 { quarantine.keep(fs, &*file, &segment.name(), used, torn).map(|_| ()) } else { Ok(()) };
    if met_unreadable || kept.is_err() {
        error!(
            segment = segment.name(),
            ?kept,
            "the newest segment is left as it is, and a new one is begun"
        );
        file.sync_data()?;
        // The next segment must not take its name, and so its place: what cannot
        // be read counts as one event at least.
        let end_seq = end_seq.max(segment.first_seq + 1);
        *segment = Segment { end_seq, used, allocated: length, ..*segment };
        return Ok((None, newest_ms));
    }
    if torn > 0 {
        warn!(
            segment = segment.name(),
            at = used,
            bytes = torn,
            "torn end of the spool cut off and kept aside"
        );
        recovery.torn_bytes = torn;
        file.set_len(used)?;
    }
    if !goes_on {
        // What was reserved and not used goes back.
        if length > used {
            file.set_len(used)?;
        }
        file.sync_data()?;
        *segment = Segment { end_seq, used, allocated: used, ..*segment };
        return Ok((None, newest_ms));
    }
    if torn > 0 {
        // Without the room writing may fail later, which is dealt with.
        let _ = file.allocate(length);
    }
    if used < SEGMENT_HEADER_BYTES as u64 {
        let header = SegmentHeader { first_seq: segment.first_seq, created_ms: 0, is_sealed: false };
        file.write_all_at(&header.encode(), 0)?;
        used = SEGMENT_HEADER_BYTES as u64;
    }
    file.sync_data()?;
    *segment = Segment { end_seq, used, allocated: file.len()?, ..*segment };
    Ok((Some(Active { file, used, unsynced: false, sealer: None }), newest_ms))
}

/// The providers that are named and those that have a cursor, in that order.
fn cursor_names(fs: &dyn SpoolFs, dirs: &LogDirs, providers: &[&str]) -> Result<Vec<String>, SpoolError> {
    let mut names: Vec<String> = providers.iter().map(|name| (*name).to_owned()).collect();
    let files = fs.list(&dirs.cursors).map_err(|source| SpoolError::at(&dirs.cursors, source))?;
    for name in files.iter().filter_map(|name| name.strip_suffix(CURSOR_ENDING)) {
        // A name that is hidden, or none, is no provider's.
        if !name.is_empty() && !name.starts_with('.') && !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}
