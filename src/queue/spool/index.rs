//! Which segments there are and how far they may be read. Written by the thread
//! that owns the files, read by every lane.

use std::{
    collections::{BTreeMap, VecDeque},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::frame::{SEALED_HEADER_BYTES, SEGMENT_HEADER_BYTES, SEQ_MAX};
use crate::sealing::FileKey;

/// Ending of segments.
pub(crate) const ENDING: &str = ".log";

/// One segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) first_seq: u64,
    /// The number after its last event. What stands in the file beyond does
    /// not count: it was written by a group that failed.
    pub(crate) end_seq: u64,
    /// Bytes that may be read.
    pub(crate) used: u64,
    /// Bytes that it takes on disk.
    pub(crate) allocated: u64,
}

impl Segment {
    /// The file's name.
    pub(crate) fn name(self) -> String {
        format!("{:020}{ENDING}", self.first_seq)
    }

    /// The file's place.
    pub(crate) fn path(self, dir: &Path) -> PathBuf {
        dir.join(self.name())
    }

    /// The first number of a segment with that name.
    pub(crate) fn parse_name(name: &str) -> Option<u64> {
        let digits = name.strip_suffix(ENDING)?;
        (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit()))
            .then(|| digits.parse().ok())
            .flatten()
            .filter(|first_seq| *first_seq <= SEQ_MAX)
    }
}

/// How a segment is read. A key that was there once stays, whatever becomes of the file's
/// key blocks meanwhile.
#[derive(Debug, Clone, Default)]
pub(crate) enum SegmentKey {
    /// Nothing is sealed.
    #[default]
    Plain,
    Key(Arc<FileKey>),
    /// It is sealed, and the key is not there.
    Missing,
}

impl SegmentKey {
    /// Where the first frame begins.
    pub(crate) fn frames_at(&self) -> u64 {
        let bytes = if matches!(self, Self::Plain) { SEGMENT_HEADER_BYTES } else { SEALED_HEADER_BYTES };
        bytes as u64
    }
}

/// Keys of segments, by their first numbers; of those that are sealed.
pub(crate) type SegmentKeys = BTreeMap<u64, SegmentKey>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Index(Mutex<State>);

#[derive(Debug)]
struct State {
    /// By their first number.
    segments: VecDeque<Segment>,
    keys: SegmentKeys,
    next_seq: u64,
    /// Segments that were replaced by another one of the same name.
    replaced: u64,
}

impl Index {
    pub(crate) fn new(segments: Vec<Segment>, next_seq: u64) -> Self {
        Self::with_keys(segments, SegmentKeys::new(), next_seq)
    }

    pub(super) fn with_keys(segments: Vec<Segment>, keys: SegmentKeys, next_seq: u64) -> Self {
        Self(Mutex::new(State { segments: segments.into(), keys, next_seq, replaced: 0 }))
    }

    /// How the segment with that first number is read.
    pub(crate) fn key(&self, first_seq: u64) -> SegmentKey {
        self.lock().keys.get(&first_seq).cloned().unwrap_or_default()
    }

    /// The number of the next event: all before it can be read.
    pub(crate) fn next_seq(&self) -> u64 {
        self.lock().next_seq
    }

    /// The oldest event that can be read, or the next one if there is none.
    pub(crate) fn oldest_seq(&self) -> u64 {
        let state = self.lock();
        state.segments.front().map_or(state.next_seq, |segment| segment.first_seq)
    }

    /// The segment that holds an event, or the next one after it.
    pub(crate) fn find(&self, seq: u64) -> Option<Segment> {
        self.find_or_end(seq).ok()
    }

    /// As [`Index::find`], or, if there is none, the number of the next event.
    /// Both at one moment: what is appended later must not count as passed.
    pub(crate) fn find_or_end(&self, seq: u64) -> Result<Segment, u64> {
        let state = self.lock();
        let place = state.segments.partition_point(|segment| segment.end_seq <= seq);
        state.segments.get(place).copied().ok_or(state.next_seq)
    }

    /// Changes when a segment was replaced by another one of its name.
    pub(crate) fn replaced(&self) -> u64 {
        self.lock().replaced
    }

    /// The segment with that first number.
    pub(crate) fn segment(&self, first_seq: u64) -> Option<Segment> {
        self.lock().segments.iter().find(|segment| segment.first_seq == first_seq).copied()
    }

    /// Bytes on disk, and segments.
    pub(crate) fn size(&self) -> (u64, usize) {
        let state = self.lock();
        (state.segments.iter().map(|segment| segment.allocated).sum(), state.segments.len())
    }

    /// Bytes of the events from `seq` on; within a segment by its share of the
    /// events.
    pub(crate) fn bytes_from(&self, seq: u64) -> u64 {
        let share = |segment: &Segment| {
            let events = segment.end_seq.saturating_sub(segment.first_seq);
            let left = segment.end_seq.saturating_sub(seq.max(segment.first_seq));
            u128::from(segment.used) * u128::from(left) / u128::from(events.max(1))
        };
        let bytes: u128 = self.lock().segments.iter().map(share).sum();
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// The oldest segment that is not written to any more.
    pub(super) fn oldest_ended(&self) -> Option<Segment> {
        let state = self.lock();
        state.segments.front().filter(|_| state.segments.len() > 1).copied()
    }

    /// Adds the newest segment. One of the same name, which held no event, is
    /// replaced by it, as the file was.
    pub(super) fn push(&self, segment: Segment, key: SegmentKey) {
        let mut state = self.lock();
        state.keys.insert(segment.first_seq, key);
        if state.segments.back().is_some_and(|newest| newest.first_seq == segment.first_seq) {
            state.segments.pop_back();
            state.replaced += 1;
        }
        state.segments.push_back(segment);
    }

    pub(super) fn remove_oldest(&self) {
        let mut state = self.lock();
        if let Some(oldest) = state.segments.pop_front() {
            state.keys.remove(&oldest.first_seq);
        }
    }

    /// Makes what was appended to the newest segment readable.
    pub(super) fn appended(&self, end_seq: u64, used: u64) {
        let mut state = self.lock();
        state.next_seq = end_seq;
        if let Some(segment) = state.segments.back_mut() {
            (segment.end_seq, segment.used) = (end_seq, used);
            segment.allocated = segment.allocated.max(used);
        }
    }

    /// Notes how many bytes the newest segment takes.
    pub(super) fn allocated(&self, bytes: u64) {
        if let Some(segment) = self.lock().segments.back_mut() {
            segment.allocated = bytes;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
