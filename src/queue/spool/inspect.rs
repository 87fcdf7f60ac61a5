//! Reads a log from outside, for the operator's commands: one that a relay is
//! writing, or one that nobody uses. Nothing here writes, but for
//! [`SpoolDir::repair`], and nothing is ever removed, but by [`SpoolDir::forget`].
//!
//! Beside a relay everything may move. Segments may be removed and begun, so
//! what is not there any more is passed over. A cursor or the end of the newest
//! segment may be read in the middle of a write, so what looks damaged there is
//! looked at again.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    cursor::{Cursor, CursorFile, ENDING as CURSOR_ENDING, FORGET_ENDING, Slot, newest, read_slots},
    error::SpoolError,
    frame::{Frame, Kind, SegmentStart},
    fs::{RealFs, SpoolFile, SpoolFs},
    head::Head,
    index::{Index, Segment},
    layout::{LogDirs, UNREADABLE},
    lock::{LOCK, SpoolLock},
    log::{Log, LogKeys, LogLimits, Recovery},
    quarantine::Quarantine,
    scan::{Item, Scanner},
    sealed,
};
use crate::{
    files::Lock,
    sealing::{FileKey, FileKind, KeyBlocks, Locked, Sealing},
};

mod hop;
#[cfg(test)]
mod tests;
mod trace;

use self::hop::Hopper;
pub(crate) use self::trace::Accepted;

/// Ending of what is in quarantine.
const KEPT_ENDING: &str = ".bin";
/// How often, and after which pause, what looks damaged is looked at again.
const LOOKS: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How long a running relay has to answer: it looks each second.
const FORGET_PATIENCE: Duration = Duration::from_secs(15);

/// The directory of a log.
#[derive(Debug, Clone)]
pub(crate) struct SpoolDir {
    dirs: LogDirs,
    /// The keys that there are, of those that it is sealed with.
    sealing: Sealing,
    /// The lock is held by us: no relay is running.
    is_ours: bool,
}

/// A log at a glance.
#[derive(Debug)]
pub(crate) struct Overview {
    pub(crate) in_use: bool,
    pub(crate) segments: Vec<SegmentInfo>,
    /// The number of the next event.
    pub(crate) next_seq: u64,
    pub(crate) cursors: Vec<CursorInfo>,
    pub(crate) quarantine_ranges: u64,
    pub(crate) quarantine_bytes: u64,
}

#[derive(Debug)]
pub(crate) struct SegmentInfo {
    /// Of the newest: how far it is written.
    pub(crate) segment: Segment,
    pub(crate) start: SegmentStart,
    /// The names of the keys that it is sealed with.
    pub(crate) kids: Vec<String>,
}

/// How far a provider has come.
#[derive(Debug)]
pub(crate) struct CursorInfo {
    pub(crate) provider: String,
    /// None if it cannot be read.
    pub(crate) cursor: Option<Cursor>,
    /// Bytes from its lowest event that has not ended.
    pub(crate) pending_bytes: u64,
    /// When the oldest event that has not ended was accepted.
    pub(crate) oldest_accepted_ms: Option<i64>,
}

/// A cursor's file.
#[derive(Debug)]
pub(crate) struct CursorSlots {
    pub(crate) provider: String,
    pub(crate) slots: [Slot; 2],
}

impl CursorSlots {
    /// The cursor, unless neither slot can be read.
    pub(crate) fn cursor(&self) -> Option<&Cursor> {
        newest(&self.slots).map(|(_, _, cursor)| cursor)
    }

    pub(crate) fn is_damaged(&self) -> bool {
        self.slots.contains(&Slot::Damaged) || self.cursor().is_none()
    }
}

/// What every byte of a segment says.
#[derive(Debug)]
pub(crate) struct SegmentReport {
    pub(crate) segment: Segment,
    pub(crate) start: SegmentStart,
    pub(crate) seals: Seals,
    pub(crate) events: u64,
    pub(crate) attempts: u64,
    /// Frames of a group that failed, whose numbers were given away again.
    pub(crate) void: u64,
    /// Bytes that cannot be read, or are not what was sealed.
    pub(crate) damaged: Vec<Range<u64>>,
    /// Numbers of events that are not there.
    pub(crate) missing: Vec<Range<u64>>,
    /// Bytes behind the last frame of a log that nobody writes.
    pub(crate) torn: Option<Range<u64>>,
    /// The number after its last event.
    pub(crate) end_seq: u64,
}

impl SegmentReport {
    pub(crate) fn is_clean(&self) -> bool {
        !matches!(self.start, SegmentStart::Newer(_))
            && self.damaged.is_empty()
            && self.missing.is_empty()
            && self.torn.is_none()
    }

    /// Of a segment of which nothing but the head was read.
    fn of(segment: Segment, head: &Head, seals: Seals) -> Self {
        let mut damaged: Vec<Range<u64>> =
            head.damaged_blocks().into_iter().map(|(at, bytes)| at..at + bytes).collect();
        // One without a byte was never begun.
        if head.start == SegmentStart::Damaged && segment.used > 0 {
            damaged.insert(0, 0..head.header_bytes as u64);
        }
        Self {
            segment,
            start: head.start,
            seals,
            events: 0,
            attempts: 0,
            void: 0,
            damaged,
            missing: Vec::new(),
            torn: None,
            end_seq: segment.first_seq,
        }
    }

    fn note_missing(&mut self, until: u64) {
        if until > self.end_seq {
            self.missing.push(self.end_seq..until);
            self.end_seq = until;
        }
    }
}

/// What the seals of a segment say.
#[derive(Debug)]
pub(crate) enum Seals {
    /// It is not sealed.
    None,
    /// There is no key: its frames were checked as far as one can without.
    Unchecked(Locked),
    /// So many frames have a seal that is broken.
    Checked { broken: u64 },
}

/// What was found while events were read.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PassedOver {
    pub(crate) damaged_ranges: u64,
    /// Events whose seal is broken.
    pub(crate) broken_seals: u64,
}

/// What became of the wish to have a provider forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forgotten {
    Done,
    /// A relay is running, and delivers to it.
    Refused,
    /// A relay is running, and does not answer.
    NoAnswer,
}

/// What a repair did.
#[derive(Debug, Default)]
pub(crate) struct Repair {
    /// What opening the log did; `None` beside a relay.
    pub(crate) recovery: Option<Recovery>,
    /// Providers whose cursor had a slot that could not be read, and whether
    /// both can be now.
    pub(crate) cursors: Vec<(String, bool)>,
    /// Segments that were read.
    pub(crate) segments: u64,
    pub(crate) kept: Vec<Kept>,
}

/// A damaged range in quarantine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) segment: String,
    pub(crate) at: u64,
    pub(crate) bytes: u64,
    /// False if it was there.
    pub(crate) new: bool,
}

impl SpoolDir {
    /// `None` if there is no log.
    pub(crate) fn open(dir: &Path) -> Option<Self> {
        let dirs = LogDirs::new(dir);
        dirs.segments.is_dir().then_some(Self { dirs, sealing: Sealing::default(), is_ours: false })
    }

    /// With keys, for what is sealed.
    pub(crate) fn with_keys(self, sealing: Sealing) -> Self {
        Self { sealing, ..self }
    }

    /// True if a process holds the log's lock.
    pub(crate) fn is_in_use(&self) -> Result<bool, SpoolError> {
        if self.is_ours {
            return Ok(false);
        }
        let path = self.dirs.root.join(LOCK);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file.map_err(|source| SpoolError::at(&path, source))?,
        };
        // Shared, so that two who ask do not take each other for a relay, and
        // for no longer than this: a relay that starts must get it.
        let lock = Lock::of(file.try_lock_shared()).map_err(|source| SpoolError::at(&path, source))?;
        // Without locks no relay uses it.
        Ok(matches!(lock, Lock::Theirs))
    }

    /// The log at a glance. Reads the newest segment, and of the others their
    /// headers and where a provider's oldest event is.
    pub(crate) fn overview(&self) -> Result<Overview, SpoolError> {
        let in_use = self.is_in_use()?;
        // Before the segments: what a cursor knows is in the log by then.
        let cursors = self.cursors()?;
        let mut segments = self.segments()?;
        while let Some(newest) = segments.last_mut()
            && !self.find_end(newest)?
        {
            segments = self.segments()?;
        }
        let next_seq = cursors
            .iter()
            .filter_map(|file| Some(file.cursor()?.end_seq()))
            .fold(segments.last().map_or(1, |segment| segment.end_seq), u64::max);
        let index = Index::new(segments.clone(), next_seq);
        let cursors = cursors.into_iter().map(|file| {
            let Some(cursor) = file.cursor().cloned() else {
                let provider = file.provider;
                return Ok(CursorInfo { provider, cursor: None, pending_bytes: 0, oldest_accepted_ms: None });
            };
            let is_pending = cursor.pending(next_seq) > 0;
            Ok(CursorInfo {
                provider: file.provider,
                pending_bytes: if is_pending { index.bytes_from(cursor.lowest()) } else { 0 },
                oldest_accepted_ms: if is_pending { self.oldest_pending(&segments, &cursor)? } else { None },
                cursor: Some(cursor),
            })
        });
        let cursors = cursors.collect::<Result<_, SpoolError>>()?;
        let (quarantine_ranges, quarantine_bytes) = self.quarantine_size()?;
        let starts = segments.iter().map(|segment| {
            let Some(file) = self.open_segment(*segment)? else { return Ok(None) };
            let Head { start, blocks, .. } = self.head(*segment, &*file)?;
            let kids = blocks.iter().flat_map(KeyBlocks::kids).map(str::to_owned).collect();
            Ok(Some(SegmentInfo { segment: *segment, start, kids }))
        });
        let starts = starts.collect::<Result<Vec<_>, SpoolError>>()?;
        let segments = starts.into_iter().flatten().collect();
        Ok(Overview { in_use, segments, next_seq, cursors, quarantine_ranges, quarantine_bytes })
    }

    /// The segments by their names and lengths; how far the newest goes is not
    /// known yet.
    pub(crate) fn segments(&self) -> Result<Vec<Segment>, SpoolError> {
        let names = self.list(&self.dirs.segments)?;
        let mut segments: Vec<Segment> = Vec::new();
        for first_seq in names.iter().filter_map(|name| Segment::parse_name(name)) {
            if let Some(before) = segments.last_mut() {
                before.end_seq = first_seq;
            }
            let mut segment = Segment { first_seq, end_seq: u64::MAX, used: 0, allocated: 0 };
            if let Some(file) = self.open_segment(segment)? {
                segment.used = file.len().map_err(|source| self.at(segment, source))?;
                segment.allocated = segment.used;
                segments.push(segment);
            }
        }
        Ok(segments)
    }

    /// The cursors, by their providers.
    pub(crate) fn cursors(&self) -> Result<Vec<CursorSlots>, SpoolError> {
        let mut cursors = Vec::new();
        for name in self.list(&self.dirs.cursors)? {
            let Some(provider) = name.strip_suffix(CURSOR_ENDING) else { continue };
            let path = CursorFile::path(&self.dirs.cursors, provider);
            let at = |source| SpoolError::at(&path, source);
            let file = RealFs.open_to_read(&path).map_err(at)?;
            let mut slots = read_slots(&*file).map_err(at)?;
            for _ in 1..LOOKS {
                if !slots.contains(&Slot::Damaged) || !self.is_in_use()? {
                    break;
                }
                thread::sleep(LOOK_AGAIN);
                slots = read_slots(&*file).map_err(at)?;
            }
            cursors.push(CursorSlots { provider: provider.to_owned(), slots });
        }
        Ok(cursors)
    }

    /// Reads all of a segment; `None` if it was removed meanwhile. `progress`
    /// is told how many bytes of it were read so far.
    pub(crate) fn verify(
        &self,
        segment: Segment,
        mut progress: impl FnMut(u64),
    ) -> Result<Option<SegmentReport>, SpoolError> {
        let Some(file) = self.open_segment(segment)? else { return Ok(None) };
        let head = self.head(segment, &*file)?;
        let (key, seals) = match self.key(&head) {
            None => (None, Seals::None),
            Some(Ok(key)) => (Some(key), Seals::Checked { broken: 0 }),
            Some(Err(locked)) => (None, Seals::Unchecked(locked)),
        };
        let mut report = SegmentReport::of(segment, &head, seals);
        if matches!(head.start, SegmentStart::Newer(_)) {
            return Ok(Some(report));
        }
        let mut secret = Vec::new();
        self.read(segment, head.frames_at(), &*file, |step| {
            match step {
                Step::Frame { at, frame } => {
                    progress(at);
                    if let (Some(key), Seals::Checked { broken }) = (&key, &mut report.seals)
                        && sealed::open(&frame, key, &mut secret).is_err()
                    {
                        *broken += 1;
                        report.damaged.push(at..at + frame.len() as u64);
                    }
                    match frame.kind {
                        Kind::Attempt => report.attempts += 1,
                        Kind::Event if frame.seq >= segment.end_seq => report.void += 1,
                        Kind::Event => {
                            report.events += 1;
                            report.note_missing(frame.seq);
                            report.end_seq = report.end_seq.max(frame.seq.saturating_add(1));
                        }
                    }
                }
                Step::Damage(bytes) => report.damaged.push(bytes),
                Step::Torn(bytes) => report.torn = Some(bytes),
            }
            Ok::<_, SpoolError>(true)
        })?;
        if !is_newest(segment) {
            report.note_missing(segment.end_seq);
        }
        Ok(Some(report))
    }

    /// Passes each event from number `since` on to `each`, until that says
    /// false.
    pub(crate) fn events<E: From<SpoolError>>(
        &self,
        since: u64,
        mut each: impl FnMut(Frame<'_>) -> Result<bool, E>,
    ) -> Result<PassedOver, E> {
        let mut passed_over = PassedOver::default();
        let (mut goes_on, mut secret) = (true, Vec::new());
        for segment in self.segments()?.into_iter().filter(|segment| segment.end_seq > since) {
            let Some(file) = self.open_segment(segment)?.filter(|_| goes_on) else { continue };
            let head = self.refuse_newer(segment, &*file)?;
            let key = match self.key(&head) {
                None => None,
                Some(Ok(key)) => Some(key),
                // Nobody reads it any more.
                Some(Err(Locked::Damaged)) => None,
                Some(Err(locked)) => return Err(self.locked(segment, locked).into()),
            };
            self.read(segment, head.frames_at(), &*file, |step| {
                match step {
                    Step::Frame { frame, .. } => {
                        let is_in = (segment.first_seq.max(since)..segment.end_seq).contains(&frame.seq);
                        if frame.kind != Kind::Event || !is_in {
                            return Ok::<_, E>(true);
                        }
                        if head.blocks.is_none() && !frame.is_sealed {
                            goes_on = each(frame)?;
                        } else if key
                            .as_ref()
                            .is_some_and(|key| sealed::open(&frame, key, &mut secret).is_ok())
                        {
                            goes_on = each(Frame { payload: &secret, is_sealed: false, ..frame })?;
                        } else {
                            passed_over.broken_seals += 1;
                        }
                    }
                    Step::Damage(_) => passed_over.damaged_ranges += 1,
                    Step::Torn(_) => {}
                }
                Ok::<_, E>(goes_on)
            })?;
        }
        Ok(passed_over)
    }

    /// Every acceptance of an event, in their order, with the attempts to
    /// deliver it.
    pub(crate) fn trace(&self, id: &str) -> Result<Vec<Accepted>, SpoolError> {
        let segments = self.segments()?;
        for segment in &segments {
            if let Some(file) = self.open_segment(*segment)? {
                self.refuse_newer(*segment, &*file)?;
            }
        }
        let threads = thread::available_parallelism().map_or(1, usize::from);
        trace::trace(self, &segments, id, threads)
    }

    /// Removes the cursor of a provider, so that nothing in the log is for it any
    /// more. A relay that is running is asked to do it, which it does within
    /// seconds, but for a provider that it delivers to.
    pub(crate) fn forget(&self, provider: &str) -> Result<Forgotten, SpoolError> {
        let dir = &self.dirs.cursors;
        let at = |source| SpoolError::at(dir, source);
        let cursor = CursorFile::path(dir, provider);
        let lock = match SpoolLock::acquire(&self.dirs.root) {
            Ok(lock) => lock,
            Err(SpoolError::Busy(_)) => return self.ask_to_forget(provider),
            Err(error) => return Err(error),
        };
        RealFs.remove(&cursor).map_err(at)?;
        RealFs.sync_dir(dir).map_err(at)?;
        drop(lock);
        Ok(Forgotten::Done)
    }

    fn ask_to_forget(&self, provider: &str) -> Result<Forgotten, SpoolError> {
        let at = |source| SpoolError::at(&self.dirs.cursors, source);
        let request = self.dirs.cursors.join(format!("{provider}{FORGET_ENDING}"));
        RealFs.create(&request).map_err(at)?;
        let asked = Instant::now();
        while request.exists() && asked.elapsed() < FORGET_PATIENCE {
            thread::sleep(LOOK_AGAIN);
        }
        // Nobody may find it later and act on it.
        match RealFs.remove(&request) {
            Ok(()) => Ok(Forgotten::NoAnswer),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(error)),
            Err(_) if CursorFile::path(&self.dirs.cursors, provider).exists() => Ok(Forgotten::Refused),
            Err(_) => Ok(Forgotten::Done),
        }
    }

    /// Copies every damaged range to quarantine. If no relay is running, the
    /// log is opened first as a relay would, which cuts off a torn end and
    /// writes cursors anew; else the newest segment is left to the relay.
    pub(crate) fn repair(&self, limits: LogLimits) -> Result<Repair, SpoolError> {
        let mut repair = Repair::default();
        let lock = match SpoolLock::acquire(&self.dirs.root) {
            Ok(lock) => Some(lock),
            Err(SpoolError::Busy(_)) => None,
            Err(error) => return Err(error),
        };
        let dir = Self { is_ours: lock.is_some(), ..self.clone() };
        if dir.is_ours {
            dir.recover(limits, &mut repair)?;
        }
        dir.keep_damaged(limits, &mut repair)?;
        drop(lock);
        Ok(repair)
    }

    /// Opens the log as a relay does.
    fn recover(&self, limits: LogLimits, repair: &mut Repair) -> Result<(), SpoolError> {
        let mut damaged = self.cursors()?;
        damaged.retain(CursorSlots::is_damaged);
        // What is sealed is mended as far as one can without the key, and nothing is appended.
        let keys = LogKeys { sealing: Sealing::default(), passes_unreadable: true };
        let (mut log, recovery) = Log::recover(Arc::new(RealFs), &self.dirs, limits, &keys, &[])?;
        log.write_cursors();
        drop(log);
        for CursorSlots { provider, .. } in damaged {
            // It must survive the machine before it is told.
            let path = CursorFile::path(&self.dirs.cursors, &provider);
            let at = |source| SpoolError::at(&path, source);
            let file = RealFs.open(&path).map_err(at)?;
            file.sync_data().map_err(at)?;
            let is_whole = !read_slots(&*file).map_err(at)?.contains(&Slot::Damaged);
            repair.cursors.push((provider, is_whole));
        }
        repair.recovery = Some(recovery);
        Ok(())
    }

    fn keep_damaged(&self, limits: LogLimits, repair: &mut Repair) -> Result<(), SpoolError> {
        let in_quarantine = |source| SpoolError::at(&self.dirs.quarantine, source);
        RealFs.create_dir(&self.dirs.quarantine).map_err(in_quarantine)?;
        let bytes_max = limits.quarantine_bytes_max();
        let opened = Quarantine::open(&RealFs, &self.dirs.quarantine, bytes_max);
        let mut quarantine = opened.map_err(in_quarantine)?;
        for segment in self.segments()?.into_iter().filter(|segment| self.is_ours || !is_newest(*segment)) {
            let Some(file) = self.open_segment(segment)? else { continue };
            self.refuse_newer(segment, &*file)?;
            let Some(report) = self.verify(segment, |_| {})? else { continue };
            repair.segments += 1;
            for range in report.damaged {
                let (segment, at, bytes) = (segment.name(), range.start, range.end - range.start);
                let new = quarantine.keep(&RealFs, &*file, &segment, at, bytes).map_err(in_quarantine)?;
                repair.kept.push(Kept { segment, at, bytes, new });
            }
        }
        Ok(())
    }

    /// Finds how far the newest segment is written; false if it was removed
    /// meanwhile.
    fn find_end(&self, newest: &mut Segment) -> Result<bool, SpoolError> {
        let Some(file) = self.open_segment(*newest)? else { return Ok(false) };
        let frames_at = self.head(*newest, &*file)?.frames_at();
        let (mut end_seq, mut used) = (newest.first_seq, newest.used.min(frames_at));
        self.read(*newest, frames_at, &*file, |step| {
            if let Step::Frame { at, frame } = step {
                used = at + frame.len() as u64;
                if frame.kind == Kind::Event {
                    end_seq = end_seq.max(frame.seq.saturating_add(1));
                }
            }
            Ok::<_, SpoolError>(true)
        })?;
        (newest.end_seq, newest.used) = (end_seq, used);
        Ok(true)
    }

    /// When the oldest event was accepted that has not ended at a provider.
    fn oldest_pending(&self, segments: &[Segment], cursor: &Cursor) -> Result<Option<i64>, SpoolError> {
        let mut window = Vec::new();
        for segment in segments.iter().filter(|segment| segment.end_seq > cursor.lowest()) {
            let Some(file) = self.open_segment(*segment)? else { continue };
            let frames_at = self.head(*segment, &*file)?.frames_at();
            let mut hopper = Hopper::new(&*file, *segment, frames_at, window);
            while let Some(hop) = hopper.next().map_err(|source| self.at(*segment, source))? {
                let is_in = hop.seq() < segment.end_seq;
                if hop.is_event()
                    && is_in
                    && !cursor.has_ended(hop.seq())
                    && let Some(frame) = hop.checked()
                {
                    return Ok(Some(frame.time_ms));
                }
            }
            window = hopper.into_window();
        }
        Ok(None)
    }

    /// Damaged ranges in quarantine, and their bytes.
    fn quarantine_size(&self) -> Result<(u64, u64), SpoolError> {
        let (mut ranges, mut bytes) = (0, 0);
        for name in self.list(&self.dirs.quarantine)?.iter().filter(|name| name.ends_with(KEPT_ENDING)) {
            let path = self.dirs.quarantine.join(name);
            ranges += 1;
            bytes += fs::metadata(&path).map_err(|source| SpoolError::at(&path, source))?.len();
        }
        Ok((ranges, bytes))
    }

    /// Files that hold events, or a part of one, and go with no retention: copies of damaged
    /// ranges, and segments that nobody could read.
    pub(crate) fn set_aside(&self) -> Result<Vec<PathBuf>, SpoolError> {
        let mut paths = Vec::new();
        for name in self.list(&self.dirs.quarantine)? {
            let path = self.dirs.quarantine.join(&name);
            // Cursors have no events, and a copy that had to make room is empty.
            let of = name.split('-').next().and_then(Segment::parse_name);
            if of.is_some() && name.ends_with(KEPT_ENDING) {
                let bytes = fs::metadata(&path).map_err(|source| SpoolError::at(&path, source))?.len();
                paths.extend((bytes > 0).then_some(path));
            }
        }
        let segments = self.list(&self.dirs.segments)?.into_iter();
        let unreadable = segments.filter(|name| name.ends_with(UNREADABLE));
        paths.extend(unreadable.map(|name| self.dirs.segments.join(name)));
        paths.sort();
        Ok(paths)
    }

    /// Passes what a segment holds on to `each`, until that says false.
    fn read<E: From<SpoolError>>(
        &self,
        segment: Segment,
        frames_at: u64,
        file: &dyn SpoolFile,
        mut each: impl FnMut(Step<'_>) -> Result<bool, E>,
    ) -> Result<(), E> {
        let err = |source| self.at(segment, source);
        let scan_from = |at| Scanner::new(file, at, segment.used).reading_around();
        let mut scanner = scan_from(frames_at);
        let mut looks = 1;
        loop {
            let goes_on = match scanner.next().map_err(err)? {
                Item::End { .. } => return Ok(()),
                Item::Frame { at, frame } => {
                    looks = 1;
                    each(Step::Frame { at, frame })?
                }
                Item::Damage { at, bytes } if is_newest(segment) => {
                    let in_use = self.is_in_use()?;
                    if in_use && looks < LOOKS {
                        looks += 1;
                        thread::sleep(LOOK_AGAIN);
                        scanner = scan_from(at);
                        continue;
                    }
                    let range = at..at + bytes;
                    let is_last = matches!(scan_from(range.end).next().map_err(err)?, Item::End { .. });
                    match (is_last, in_use) {
                        (false, _) => each(Step::Damage(range))?,
                        (true, false) => each(Step::Torn(range))?,
                        // It is being written.
                        (true, true) => return Ok(()),
                    }
                }
                Item::Damage { at, bytes } => each(Step::Damage(at..at + bytes))?,
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// What stands before a segment's frames.
    fn head(&self, segment: Segment, file: &dyn SpoolFile) -> Result<Head, SpoolError> {
        Head::read(file, segment.first_seq).map_err(|source| self.at(segment, source))
    }

    /// The key of a segment, if it is sealed.
    fn key(&self, head: &Head) -> Option<Result<FileKey, Locked>> {
        head.blocks.as_ref().map(|blocks| self.sealing.open(blocks, FileKind::Segment))
    }

    fn refuse_newer(&self, segment: Segment, file: &dyn SpoolFile) -> Result<Head, SpoolError> {
        let head = self.head(segment, file)?;
        match head.start {
            SegmentStart::Newer(version) => {
                Err(SpoolError::Newer { path: self.segment_path(segment).display().to_string(), version })
            }
            SegmentStart::Header(_) | SegmentStart::Damaged => Ok(head),
        }
    }

    fn locked(&self, segment: Segment, locked: Locked) -> SpoolError {
        SpoolError::Locked { path: self.segment_path(segment).display().to_string(), locked }
    }

    /// `None` if it was removed meanwhile.
    fn open_segment(&self, segment: Segment) -> Result<Option<Box<dyn SpoolFile>>, SpoolError> {
        match RealFs.open_to_read(&self.segment_path(segment)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            file => Ok(Some(file.map_err(|source| self.at(segment, source))?)),
        }
    }

    fn segment_path(&self, segment: Segment) -> PathBuf {
        segment.path(&self.dirs.segments)
    }

    fn at(&self, segment: Segment, source: io::Error) -> SpoolError {
        SpoolError::at(&self.segment_path(segment), source)
    }

    /// Names of the files in a directory; none if it is not there.
    fn list(&self, dir: &Path) -> Result<Vec<String>, SpoolError> {
        match RealFs.list(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            names => names.map_err(|source| SpoolError::at(dir, source)),
        }
    }
}

/// What a segment holds at some place.
enum Step<'a> {
    Frame {
        at: u64,
        frame: Frame<'a>,
    },
    /// Bytes that are no frame.
    Damage(Range<u64>),
    /// Such bytes at the end of a log that nobody writes.
    Torn(Range<u64>),
}

/// True for the segment of which it is not known how far it goes.
fn is_newest(segment: Segment) -> bool {
    segment.end_seq == u64::MAX
}
