//! What the log knows of one event, in a single pass over its segments.
//!
//! The attempts for an event stand behind it, perhaps segments later, and say
//! only its number. The threads take the segments in their order, so when the
//! event is found, few segments have been begun without knowing of it: those are
//! read again.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use serde::Deserialize;

use super::{
    super::{command::Attempt, error::SpoolError, frame::Frame, index::Segment, sealed},
    SpoolDir,
    hop::Hopper,
};
use crate::{queue::Durability, sealing::FileKey};

/// One acceptance of an event. A caller that asked again made another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Accepted {
    pub(crate) seq: u64,
    pub(crate) accepted_ms: i64,
    /// The level that was asked for.
    pub(crate) durability: Option<Durability>,
    /// The file's name.
    pub(crate) segment: String,
    /// In the order of their writing.
    pub(crate) attempts: Vec<NotedAttempt>,
}

/// An attempt to deliver the event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NotedAttempt {
    pub(crate) at_ms: i64,
    pub(crate) attempt: Attempt,
}

/// What is read of every attempt; the rest only if it concerns the event.
#[derive(Deserialize)]
struct Concerned {
    events: Vec<(u64, u64)>,
}

struct Search<'a> {
    dir: &'a SpoolDir,
    id: &'a [u8],
    segments: &'a [Segment],
    /// Places of segments that nobody has taken yet start here.
    next: AtomicUsize,
    /// With the place of their segment, in the order in which they were found.
    found: Mutex<Vec<(usize, Accepted)>>,
    found_count: AtomicUsize,
}

/// What the search knows after a segment.
#[derive(Clone)]
struct Passed {
    place: usize,
    /// How many acceptances were known when it was begun.
    known: usize,
    attempts: Vec<(u64, NotedAttempt)>,
}

/// Every acceptance of an event that the log holds, in their order.
pub(super) fn trace(
    dir: &SpoolDir,
    segments: &[Segment],
    id: &str,
    threads: usize,
) -> Result<Vec<Accepted>, SpoolError> {
    let search = Search {
        dir,
        id: id.as_bytes(),
        segments,
        next: AtomicUsize::new(0),
        found: Mutex::default(),
        found_count: AtomicUsize::new(0),
    };
    let mut passed = thread::scope(|scope| {
        let running: Vec<_> =
            (0..threads.clamp(1, segments.len().max(1))).map(|_| scope.spawn(|| search.work())).collect();
        let ended = running.into_iter().map(|thread| thread.join().expect("reading does not panic"));
        ended.collect::<Result<Vec<_>, _>>()
    })?
    .concat();
    passed.sort_by_key(|segment| segment.place);
    let mut window = Vec::new();
    for segment in &mut passed {
        let missed = |(place, _): &(usize, Accepted)| *place < segment.place;
        if search.found().iter().skip(segment.known).any(missed) {
            (*segment, window) = search.read(segment.place, window)?;
        }
    }

    let found = search.found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut found: BTreeMap<u64, Accepted> =
        found.into_iter().map(|(_, accepted)| (accepted.seq, accepted)).collect();
    for (seq, attempt) in passed.into_iter().flat_map(|segment| segment.attempts) {
        if let Some(accepted) = found.get_mut(&seq) {
            accepted.attempts.push(attempt);
        }
    }
    Ok(found.into_values().collect())
}

/// What a frame says of an attempt; the provider's words too, if they are not sealed or
/// there is the key.
fn attempt_of(frame: &Frame<'_>, key: Option<&FileKey>) -> Option<Attempt> {
    if !frame.is_sealed {
        return serde_json::from_slice(frame.payload).ok();
    }
    let mut attempt: Attempt = serde_json::from_slice(sealed::clear(frame.payload)).ok()?;
    let mut words = Vec::new();
    if key.is_some_and(|key| sealed::open(frame, key, &mut words).is_ok()) {
        attempt.detail = String::from_utf8_lossy(&words).into_owned();
    }
    Some(attempt)
}

impl Search<'_> {
    fn work(&self) -> Result<Vec<Passed>, SpoolError> {
        let mut window = Vec::new();
        let mut all = Vec::new();
        loop {
            let place = self.next.fetch_add(1, Ordering::Relaxed);
            if place >= self.segments.len() {
                return Ok(all);
            }
            let (passed, buffer) = self.read(place, window)?;
            all.push(passed);
            window = buffer;
        }
    }

    /// Reads one segment. Gives the buffer back.
    fn read(&self, place: usize, window: Vec<u8>) -> Result<(Passed, Vec<u8>), SpoolError> {
        let segment = self.segments[place];
        let mut seqs = self.found_seqs();
        let mut passed = Passed { place, known: seqs.len(), attempts: Vec::new() };
        let Some(file) = self.dir.open_segment(segment)? else { return Ok((passed, window)) };
        let at = |source| self.dir.at(segment, source);
        let head = self.dir.head(segment, &*file)?;
        let key = self.dir.key(&head).and_then(Result::ok);
        let mut hopper = Hopper::new(&*file, segment, head.frames_at(), window);
        while let Some(hop) = hopper.next().map_err(at)? {
            if hop.is_event() {
                if hop.id() == self.id
                    && (segment.first_seq..segment.end_seq).contains(&hop.seq())
                    && let Some(frame) = hop.checked()
                {
                    let accepted = Accepted {
                        seq: frame.seq,
                        accepted_ms: frame.time_ms,
                        durability: frame.durability,
                        segment: segment.name(),
                        attempts: Vec::new(),
                    };
                    self.add(place, accepted);
                }
                continue;
            }
            if self.found_count.load(Ordering::Acquire) != seqs.len() {
                seqs = self.found_seqs();
            }
            if seqs.is_empty() {
                continue;
            }
            let Ok(Concerned { events }) = serde_json::from_slice(hop.clear()) else { continue };
            let concerned = |seq: &&u64| events.iter().any(|(first, end)| (*first..*end).contains(*seq));
            for seq in seqs.iter().filter(concerned) {
                let Some(frame) = hop.checked() else { break };
                let Some(attempt) = attempt_of(&frame, key.as_ref()) else { break };
                passed.attempts.push((*seq, NotedAttempt { at_ms: frame.time_ms, attempt }));
            }
        }
        Ok((passed, hopper.into_window()))
    }

    /// Adds an acceptance, once.
    fn add(&self, place: usize, accepted: Accepted) {
        let mut found = self.found();
        if found.iter().all(|(_, known)| known.seq != accepted.seq) {
            found.push((place, accepted));
            self.found_count.store(found.len(), Ordering::Release);
        }
    }

    fn found_seqs(&self) -> Vec<u64> {
        self.found().iter().map(|(_, accepted)| accepted.seq).collect()
    }

    fn found(&self) -> MutexGuard<'_, Vec<(usize, Accepted)>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
