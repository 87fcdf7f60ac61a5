//! Reads events from the log in order, from any number on. Each lane has one.
//! Blocks on the disk.

use std::{io, ops::Range, sync::Arc, thread};

use analytics_relay_providers::Event;

use super::{
    frame::{Frame, Kind},
    fs::{SpoolFile, SpoolFs},
    index::{Index, Segment, SegmentKey},
    layout::LogDirs,
    quarantine::DamagedRange,
    scan::{Item, Scanner},
    sealed,
};
use crate::{queue::Durability, reasons::DropReason};

/// Events that are read before other threads may go first: some tenths of a
/// millisecond.
const EVENTS_AT_A_STRETCH: usize = 100;

/// An event as it stands in the log.
#[derive(Debug, Clone)]
pub(crate) struct LoggedEvent {
    pub(crate) seq: u64,
    pub(crate) event: Event,
}

/// What one read gave.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    pub(crate) events: Vec<LoggedEvent>,
    /// Numbers that the log does not hold any more, or that nobody can read, in order.
    pub(crate) missing: Vec<Missing>,
    pub(crate) damaged: Vec<DamagedRange>,
    /// Where the next read goes on: everything before is in this chunk.
    pub(crate) next_seq: u64,
}

/// Numbers without an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Missing {
    pub(crate) seqs: Range<u64>,
    pub(crate) why: DropReason,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct LogReader {
    fs: Arc<dyn SpoolFs>,
    dirs: LogDirs,
    index: Arc<Index>,
    /// The segment that was read last.
    open: Option<Open>,
    reads_around: bool,
}

#[derive(Debug)]
struct Open {
    first_seq: u64,
    file: Box<dyn SpoolFile>,
    /// Where the frame of `seq`, or one before it, begins.
    at: u64,
    seq: u64,
    /// See [`Index::replaced`].
    replaced: u64,
    key: SegmentKey,
    /// What was opened last.
    secret: Vec<u8>,
}

impl Open {
    /// The event of a frame, or why there is none.
    fn event(key: &SegmentKey, secret: &mut Vec<u8>, frame: &Frame<'_>) -> Result<Event, DropReason> {
        let json = match key {
            SegmentKey::Plain if !frame.is_sealed => frame.payload,
            SegmentKey::Key(key) => {
                sealed::open(frame, key, secret).map_err(|_| DropReason::SealBroken)?;
                secret
            }
            SegmentKey::Plain | SegmentKey::Missing => return Err(DropReason::Undecryptable),
        };
        // Its CRC is right: a relay that knew other events wrote it.
        Event::from_json(json).map_err(|_| DropReason::SpoolDamaged)
    }
}

impl LogReader {
    pub(crate) fn new(fs: Arc<dyn SpoolFs>, dirs: LogDirs, index: Arc<Index>) -> Self {
        Self { fs, dirs, index, open: None, reads_around: false }
    }

    /// Reads events from number `seq` on: up to the end of the log or of a
    /// segment, at most `events_max`, and about `bytes_max` bytes of frames.
    pub(crate) fn read(&mut self, seq: u64, events_max: usize, bytes_max: u64) -> io::Result<Chunk> {
        let mut chunk = Chunk { next_seq: seq, ..Chunk::default() };
        let segment = match self.index.find_or_end(seq) {
            Ok(segment) => segment,
            Err(next_seq) => {
                // Nothing stands there; numbers before the next one are gone.
                chunk.pass_to(next_seq.max(seq));
                return Ok(chunk);
            }
        };
        chunk.pass_to(segment.first_seq);
        let reads_around = self.reads_around;
        let Open { file, at, seq: open_seq, key, secret, .. } = self.open(segment, seq)?;
        let scanner = Scanner::new(&**file, *at, segment.used);
        let mut scanner = if reads_around { scanner.reading_around() } else { scanner };
        let start = *at;
        let end = loop {
            // Else the scheduler lets a reader that has begun go on for milliseconds
            // where there are few cores, and callers wait for it.
            if chunk.events.len() % EVENTS_AT_A_STRETCH == EVENTS_AT_A_STRETCH - 1 {
                thread::yield_now();
            }
            match scanner.next()? {
                Item::Frame { at, .. } if chunk.events.len() >= events_max || at - start >= bytes_max => {
                    break at;
                }
                Item::Frame { at, frame } if frame.kind == Kind::Event => {
                    if frame.seq < chunk.next_seq || frame.seq >= segment.end_seq {
                        continue;
                    }
                    chunk.pass_to(frame.seq);
                    match Open::event(key, secret, &frame) {
                        Ok(event) => {
                            chunk.events.push(LoggedEvent { seq: frame.seq, event });
                            chunk.next_seq += 1;
                        }
                        Err(why) => {
                            // One without a key is kept as a whole.
                            if !matches!(key, SegmentKey::Missing) {
                                let bytes = frame.len() as u64;
                                chunk.damaged.push(DamagedRange { segment: segment.first_seq, at, bytes });
                            }
                            chunk.lose(frame.seq + 1, why);
                        }
                    }
                }
                Item::Frame { .. } => {}
                Item::Damage { at, bytes } => {
                    chunk.damaged.push(DamagedRange { segment: segment.first_seq, at, bytes });
                }
                Item::End { at } => {
                    // The rest of the segment's numbers are nowhere.
                    chunk.pass_to(segment.end_seq);
                    break at;
                }
            }
        };
        (*at, *open_seq) = (end, chunk.next_seq);
        Ok(chunk)
    }

    /// What the disk does not give back is an error, or, to go on at last,
    /// damage.
    pub(crate) fn read_around(&mut self, reads_around: bool) {
        self.reads_around = reads_around;
    }

    /// Lets go of the file that was read last.
    pub(crate) fn close(&mut self) {
        self.open = None;
    }

    /// The segment's file, at the place of `seq` if that is known.
    fn open(&mut self, segment: Segment, seq: u64) -> io::Result<&mut Open> {
        let replaced = self.index.replaced();
        let goes_on =
            |open: &Open| open.first_seq == segment.first_seq && open.seq <= seq && open.replaced == replaced;
        if !self.open.as_ref().is_some_and(goes_on) {
            let file = self.fs.open_to_read(&segment.path(&self.dirs.segments))?;
            let (first_seq, key) = (segment.first_seq, self.index.key(segment.first_seq));
            let (at, secret) = (key.frames_at(), Vec::new());
            self.open = Some(Open { first_seq, file, at, seq: first_seq, replaced, key, secret });
        }
        Ok(self.open.as_mut().expect("just opened"))
    }
}

impl Chunk {
    /// Notes that the numbers up to `seq` are not in the log.
    fn pass_to(&mut self, seq: u64) {
        self.lose(seq, DropReason::SpoolDamaged);
    }

    /// Notes that the numbers up to `seq` cannot be read, and why.
    fn lose(&mut self, seq: u64, why: DropReason) {
        if seq <= self.next_seq {
            return;
        }
        match self.missing.last_mut() {
            Some(last) if last.why == why && last.seqs.end == self.next_seq => last.seqs.end = seq,
            _ => self.missing.push(Missing { seqs: self.next_seq..seq, why }),
        }
        self.next_seq = seq;
    }

    /// The numbers of events that cannot be read, by the reasons.
    pub(crate) fn take_missing(&mut self) -> Vec<(DropReason, Vec<Range<u64>>)> {
        let mut by_reason: Vec<(DropReason, Vec<Range<u64>>)> = Vec::new();
        for Missing { seqs, why } in std::mem::take(&mut self.missing) {
            match by_reason.iter_mut().find(|(reason, _)| *reason == why) {
                Some((_, ranges)) => ranges.push(seqs),
                None => by_reason.push((why, vec![seqs])),
            }
        }
        by_reason
    }
}

/// The level that was asked for, for `explain`.
pub(crate) fn level_name(durability: Option<Durability>) -> &'static str {
    durability.map_or("unknown", Durability::name)
}
