//! How far one provider has come in the log, and how its events ended.
//!
//! `cursors/<provider>.cursor`: two slots of 262,144 bytes, made in advance so
//! that progress can be noted on a full disk. A slot is written whole; the
//! other one is left alone until this one is synced, so that one of the two is
//! always good. The valid slot with the higher generation counts.
//!
//! **Slot**, numbers little-endian:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `ARCURSR` and 0xFE |
//! | 8 | 2 | format version, now 1 |
//! | 10 | 2 | zero |
//! | 12 | 4 | CRC-32 (IEEE) of all other bytes of the slot that are used |
//! | 16 | 8 | generation |
//! | 24 | 4 | bytes of the payload |
//! | 28 | 4 | zero |
//! | 32 | | the payload: a JSON object, [`Saved`] |
//!
//! Losing a cursor costs duplicates, which providers recognise, and no event:
//! the provider then starts at the oldest event in the log.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tracing::error;

use super::{
    error::SpoolError,
    frame::{FORMAT_VERSION, SEQ_MAX, crc_without, u32_at, u64_at},
    fs::{SpoolFile, SpoolFs},
    layout::unfinished,
    quarantine::Quarantine,
    scan::last_not_zero,
};

/// Bytes of a slot.
pub(crate) const SLOT_BYTES: usize = 262_144;
/// Ending of cursor files.
pub(crate) const ENDING: &str = ".cursor";
/// Ending of files that ask a running relay to let go of a cursor.
pub(crate) const FORGET_ENDING: &str = ".forget";
/// After this time a cursor is written even if nothing has ended, so that it
/// says what time it is.
const SEEN_INTERVAL_MS: i64 = 10 * 60 * 1000;
const SLOT_HEADER_BYTES: usize = 32;
const SLOT_MARK: [u8; 8] = *b"ARCURSR\xFE";
const CRC: Range<usize> = 12..16;
/// Bytes of a payload without its ranges, at most.
const FIELDS_BYTES_MAX: usize = 4096;

/// How events ended, as `outcome/reason`. A name, so that a cursor of a relay
/// that knows more reasons can be read.
pub(crate) type EndedAs = Cow<'static, str>;

/// Which events of the log one provider is done with. A pure value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// The first event that this cursor speaks of.
    since: u64,
    /// The lowest event that has not ended.
    lowest: u64,
    /// Ranges above it that have ended, by their first event; to the end,
    /// exclusive. None touches another one.
    ahead: BTreeMap<u64, u64>,
    /// Events in those.
    ahead_events: u64,
    /// Events that have ended, by how.
    totals: BTreeMap<EndedAs, u64>,
    /// When it was last written under a wall clock that could be trusted: Unix
    /// milliseconds.
    seen_ms: Option<i64>,
}

/// A cursor's form in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    provider: String,
    since: u64,
    lowest: u64,
    totals: BTreeMap<EndedAs, u64>,
    /// In turn how many events have not ended and how many have, from `lowest`
    /// on. What does not fit is left out, from the highest, and not counted: at
    /// the next start those go to the provider again.
    ahead: Vec<u64>,
    /// Earlier relays did not write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seen_ms: Option<i64>,
}

impl Cursor {
    /// For a provider that has got nothing before `since`.
    pub(crate) fn new(since: u64) -> Self {
        Self {
            since,
            lowest: since,
            ahead: BTreeMap::new(),
            ahead_events: 0,
            totals: BTreeMap::new(),
            seen_ms: None,
        }
    }

    /// Notes that a range of events has ended. Returns how many of them had
    /// not ended before.
    pub(crate) fn end(&mut self, range: Range<u64>, ended_as: &EndedAs) -> u64 {
        let mut ended = 0;
        for new in self.not_ended(range) {
            ended += new.end - new.start;
            self.insert(new);
        }
        self.ahead_events += ended;
        if ended > 0 {
            let total = self.totals.entry(ended_as.clone()).or_default();
            *total = total.saturating_add(ended);
        }
        if let Some(end) = self.ahead.remove(&self.lowest) {
            self.ahead_events -= end - self.lowest;
            self.lowest = end;
        }
        ended
    }

    /// Adds a range of which nothing has ended, grown together with its
    /// neighbours.
    fn insert(&mut self, range: Range<u64>) {
        let before = self.ahead.range(..range.start).next_back();
        let start = before.filter(|(_, end)| **end == range.start).map_or(range.start, |(first, _)| *first);
        let end = self.ahead.remove(&range.end).unwrap_or(range.end);
        self.ahead.insert(start, end);
    }

    /// The parts of a range that have not ended.
    pub(crate) fn not_ended(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut from = range.start.max(self.lowest);
        if let Some((_, end)) = self.ahead.range(..=from).next_back() {
            from = from.max(*end);
        }
        let mut parts = Vec::new();
        for (first, end) in self.ahead.range(from..range.end.max(from)) {
            parts.push(from..*first);
            from = *end;
        }
        parts.push(from..range.end);
        parts.retain(|part| part.start < part.end);
        parts
    }

    /// The first event that this cursor speaks of.
    pub(crate) fn since(&self) -> u64 {
        self.since
    }

    /// The lowest event that has not ended.
    pub(crate) fn lowest(&self) -> u64 {
        self.lowest
    }

    /// True if an event has ended.
    pub(crate) fn has_ended(&self, seq: u64) -> bool {
        seq < self.lowest || self.ahead.range(..=seq).next_back().is_some_and(|(_, end)| seq < *end)
    }

    /// When it was last written under a wall clock that could be trusted.
    pub(crate) fn seen_ms(&self) -> Option<i64> {
        self.seen_ms
    }

    /// Events that have ended, by how.
    pub(crate) fn totals(&self) -> &BTreeMap<EndedAs, u64> {
        &self.totals
    }

    /// Events of a log that ends before `next_seq` which have not ended.
    pub(crate) fn pending(&self, next_seq: u64) -> u64 {
        next_seq.saturating_sub(self.lowest).saturating_sub(self.ahead_events)
    }

    /// The event after the last one that is known to have ended.
    pub(crate) fn end_seq(&self) -> u64 {
        self.ahead.last_key_value().map_or(self.lowest, |(_, end)| *end)
    }

    fn save(&self, provider: &str) -> Saved {
        let mut saved = Saved {
            provider: provider.to_owned(),
            since: self.since,
            lowest: self.lowest,
            totals: self.totals.clone(),
            ahead: Vec::new(),
            seen_ms: self.seen_ms,
        };
        let mut room = SLOT_BYTES - SLOT_HEADER_BYTES - FIELDS_BYTES_MAX;
        let mut at = self.lowest;
        let mut left_out = self.ahead_events;
        for (first, end) in &self.ahead {
            let (gap, length) = (first - at, end - first);
            let bytes = digits(gap) + digits(length) + 2;
            if bytes > room {
                break;
            }
            room -= bytes;
            saved.ahead.extend([gap, length]);
            at = *end;
            left_out -= length;
        }
        // What is left out ends again, so it must not be counted here. How each
        // of those ended is not known any more; most are the commonest.
        while left_out > 0 {
            let Some(most) = saved.totals.values_mut().max() else { break };
            let taken = left_out.min(*most);
            (*most, left_out) = (*most - taken, left_out - taken);
        }
        saved
    }

    /// `None` if it contradicts itself.
    fn restore(saved: Saved) -> Option<Self> {
        let Saved { since, lowest, totals, ahead: runs, seen_ms, .. } = saved;
        let (mut ahead, mut ahead_events, mut at) = (BTreeMap::new(), 0, lowest);
        for run in runs.chunks(2) {
            let [gap, length] = *run else { return None };
            let first = at.checked_add(gap).filter(|_| gap > 0)?;
            at = first.checked_add(length).filter(|end| length > 0 && *end <= SEQ_MAX)?;
            ahead.insert(first, at);
            ahead_events += length;
        }
        let is_sound = since <= lowest && at <= SEQ_MAX;
        is_sound.then_some(Self { since, lowest, ahead, ahead_events, totals, seen_ms })
    }
}

/// Digits of a number.
fn digits(number: u64) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}

/// What a slot holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Slot {
    Cursor {
        generation: u64,
        cursor: Cursor,
    },
    /// Nothing was ever written.
    Empty,
    /// Written by a newer relay, of this format version.
    Newer(u16),
    Damaged,
}

/// The bytes of a slot.
fn encode_slot(saved: &Saved, generation: u64) -> Vec<u8> {
    let mut slot = vec![0; SLOT_HEADER_BYTES];
    slot[..8].copy_from_slice(&SLOT_MARK);
    slot[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    slot[16..24].copy_from_slice(&generation.to_le_bytes());
    serde_json::to_writer(&mut slot, saved).expect("a vector takes any bytes");
    let payload_bytes = u32::try_from(slot.len() - SLOT_HEADER_BYTES).expect("a slot is small");
    slot[24..28].copy_from_slice(&payload_bytes.to_le_bytes());
    let crc = crc_without(&slot, CRC);
    slot[CRC].copy_from_slice(&crc.to_le_bytes());
    slot
}

/// Reads one slot.
pub(crate) fn decode_slot(bytes: &[u8]) -> Slot {
    let Some(header) = bytes.get(..SLOT_HEADER_BYTES) else { return Slot::Damaged };
    if header.iter().all(|byte| *byte == 0) && last_not_zero(bytes).is_none() {
        return Slot::Empty;
    }
    let used = (u32_at(header, 24) as usize).checked_add(SLOT_HEADER_BYTES);
    let Some(used) = used.and_then(|used| bytes.get(..used)) else { return Slot::Damaged };
    if header[..8] != SLOT_MARK || crc_without(used, CRC) != u32_at(header, CRC.start) {
        return Slot::Damaged;
    }
    match u16::from_le_bytes([header[8], header[9]]) {
        FORMAT_VERSION => serde_json::from_slice(&used[SLOT_HEADER_BYTES..])
            .ok()
            .and_then(Cursor::restore)
            .map_or(Slot::Damaged, |cursor| Slot::Cursor { generation: u64_at(header, 16), cursor }),
        newer => Slot::Newer(newer),
    }
}

/// The two slots of a file, and which of them counts.
pub(crate) fn read_slots(file: &dyn SpoolFile) -> io::Result<[Slot; 2]> {
    let mut bytes = vec![0; 2 * SLOT_BYTES];
    let read = file.read_full_at(&mut bytes, 0)?;
    bytes.truncate(read);
    let second = bytes.get(SLOT_BYTES..).unwrap_or_default();
    Ok([decode_slot(&bytes[..read.min(SLOT_BYTES)]), decode_slot(second)])
}

/// The cursor that counts, the place of its slot and its generation.
pub(crate) fn newest(slots: &[Slot; 2]) -> Option<(usize, u64, &Cursor)> {
    let cursors = slots.iter().enumerate().filter_map(|(place, slot)| match slot {
        Slot::Cursor { generation, cursor } => Some((place, *generation, cursor)),
        Slot::Empty | Slot::Newer(_) | Slot::Damaged => None,
    });
    cursors.max_by_key(|(_, generation, _)| *generation)
}

/// A cursor and the file that it survives in.
#[derive(Debug)]
pub(crate) struct CursorFile {
    pub(crate) provider: String,
    pub(crate) cursor: Cursor,
    /// Shared with whoever syncs it.
    file: Arc<dyn SpoolFile>,
    generation: u64,
    /// The slot that is written next.
    slot: usize,
    /// `lowest` of each slot as it is on disk for certain.
    synced: [u64; 2],
    /// `cursor` differs from what was written last.
    changed: bool,
    /// What was written last is not synced.
    unsynced: bool,
    /// `lowest` of the slot that is being synced: until that is over neither slot
    /// is written.
    syncing: Option<u64>,
    /// Its file is gone: it holds nothing back any more.
    forgotten: bool,
}

impl CursorFile {
    /// Where the cursor of a provider is.
    pub(crate) fn path(dir: &Path, provider: &str) -> PathBuf {
        dir.join(format!("{provider}{ENDING}"))
    }

    /// Opens a provider's cursor. One that is not there, or cannot be read,
    /// begins at `oldest_seq`; the second value is true then.
    pub(crate) fn open(
        fs: &dyn SpoolFs,
        dir: &Path,
        provider: &str,
        oldest_seq: u64,
        quarantine: &mut Quarantine,
    ) -> Result<(Self, bool), SpoolError> {
        let path = Self::path(dir, provider);
        let at = |source| SpoolError::at(&path, source);
        let known = fs.list(dir).map_err(at)?.contains(&format!("{provider}{ENDING}"));
        if !known {
            return Ok((Self::create(fs, dir, provider, oldest_seq).map_err(at)?, true));
        }
        let file = fs.open(&path).map_err(at)?;
        let slots = read_slots(&*file).map_err(at)?;
        if let Some(version) = slots.iter().find_map(|slot| match slot {
            Slot::Newer(version) => Some(*version),
            _ => None,
        }) {
            return Err(SpoolError::Newer { path: path.display().to_string(), version });
        }
        let damaged = slots.contains(&Slot::Damaged);
        if damaged {
            let name = format!("{provider}{ENDING}");
            let length = file.len().map_err(at)?;
            // Without a copy it goes on too: there may be no room for one.
            if let Err(error) = quarantine.keep(fs, &*file, &name, 0, length) {
                error!(provider, %error, "a damaged cursor could not be kept aside");
            }
        }
        let Some((place, generation, cursor)) = newest(&slots) else {
            return Ok((Self::create(fs, dir, provider, oldest_seq).map_err(at)?, true));
        };
        // What was found may be in the machine's memory only; the other slot
        // is not touched before it is on disk. It is written again as it is: if
        // an earlier process failed to sync it, a sync alone would say nothing.
        let slot_at = (place * SLOT_BYTES) as u64;
        let mut slot = vec![0; SLOT_BYTES];
        let read = file.read_full_at(&mut slot, slot_at).map_err(at)?;
        file.write_all_at(&slot[..read], slot_at).map_err(at)?;
        file.sync_data().map_err(at)?;
        let cursor = cursor.clone();
        let lowest = |slot: &Slot| if let Slot::Cursor { cursor, .. } = slot { cursor.lowest } else { 0 };
        let synced = [lowest(&slots[0]), lowest(&slots[1])];
        let file = Self {
            provider: provider.to_owned(),
            cursor,
            file: file.into(),
            generation,
            slot: 1 - place,
            synced,
            changed: damaged,
            unsynced: false,
            syncing: None,
            forgotten: false,
        };
        Ok((file, false))
    }

    fn create(fs: &dyn SpoolFs, dir: &Path, provider: &str, since: u64) -> io::Result<Self> {
        let path = Self::path(dir, provider);
        let new = unfinished(&path);
        let file = fs.create(&new)?;
        file.allocate(2 * SLOT_BYTES as u64)?;
        let cursor = Cursor::new(since);
        file.write_all_at(&encode_slot(&cursor.save(provider), 1), 0)?;
        file.sync_data()?;
        fs.rename(&new, &path)?;
        fs.sync_dir(dir)?;
        Ok(Self {
            provider: provider.to_owned(),
            cursor,
            file: file.into(),
            generation: 1,
            slot: 1,
            synced: [since; 2],
            changed: false,
            unsynced: false,
            syncing: None,
            forgotten: false,
        })
    }

    /// Notes that a range of events has ended; see [`Cursor::end`].
    pub(crate) fn end(&mut self, range: Range<u64>, ended_as: &EndedAs) -> u64 {
        let ended = self.cursor.end(range, ended_as);
        self.changed |= ended > 0;
        ended
    }

    /// Notes what time it is, by a wall clock that can be trusted.
    pub(crate) fn saw(&mut self, now_ms: i64) {
        // Also one that was seen under a clock that ran ahead.
        let is_due = |seen_ms: i64| now_ms.abs_diff(seen_ms) > SEEN_INTERVAL_MS.unsigned_abs();
        self.changed |= self.cursor.seen_ms.is_none_or(is_due) && !self.forgotten;
        if self.changed {
            self.cursor.seen_ms = Some(now_ms);
        }
    }

    /// Writes the cursor if it has changed: it then survives the process.
    pub(crate) fn write(&mut self) -> io::Result<()> {
        if self.changed && self.syncing.is_none() && !self.forgotten {
            self.write_slot()?;
        }
        Ok(())
    }

    fn write_slot(&mut self) -> io::Result<()> {
        let bytes = encode_slot(&self.cursor.save(&self.provider), self.generation.saturating_add(1));
        // Before the attempt: a slot that is half written is written again, and not
        // under the same number.
        self.generation = self.generation.saturating_add(1);
        self.changed = true;
        self.file.write_all_at(&bytes, (self.slot * SLOT_BYTES) as u64)?;
        (self.changed, self.unsynced) = (false, true);
        Ok(())
    }

    /// Makes the cursor survive the machine. Twice after each change, so that
    /// what may be removed stands in both slots.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        match self.begin_sync()? {
            Some(file) => self.end_sync(file.sync_data()),
            None => Ok(()),
        }
    }

    /// Writes what is to survive the machine, and gives the file that has to be
    /// synced for it, if there is something to sync and nobody is about it.
    pub(crate) fn begin_sync(&mut self) -> io::Result<Option<Arc<dyn SpoolFile>>> {
        if self.syncing.is_some() || self.forgotten {
            return Ok(None);
        }
        if self.changed || self.safe_lowest() < self.cursor.lowest {
            self.write_slot()?;
        }
        if !self.unsynced {
            return Ok(None);
        }
        self.syncing = Some(self.cursor.lowest);
        Ok(Some(self.file.clone()))
    }

    /// Notes what came of the sync that [`CursorFile::begin_sync`] asked for.
    pub(crate) fn end_sync(&mut self, synced: io::Result<()>) -> io::Result<()> {
        let Some(lowest) = self.syncing.take() else { return Ok(()) };
        // After a failure nobody knows what is on disk, and a second sync
        // would say nothing about it: the slot is written again.
        synced.inspect_err(|_| self.changed = true)?;
        self.synced[self.slot] = lowest;
        self.slot = 1 - self.slot;
        self.unsynced = false;
        Ok(())
    }

    /// Removes the file: the provider has no place in the log any more.
    pub(crate) fn forget(&mut self, fs: &dyn SpoolFs, dir: &Path) -> io::Result<()> {
        match fs.remove(&Self::path(dir, &self.provider)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        self.forgotten = true;
        fs.sync_dir(dir)
    }

    /// True once its file is gone.
    pub(crate) fn is_forgotten(&self) -> bool {
        self.forgotten
    }

    /// Every event below this has ended, whichever slot is read after a crash;
    /// nothing is left of one that is forgotten.
    pub(crate) fn safe_lowest(&self) -> u64 {
        if self.forgotten { u64::MAX } else { self.synced[0].min(self.synced[1]) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const KINDS: [&str; 3] = ["delivered", "dead_lettered/invalid", "dropped/spool_damaged"];

    fn cursor(lowest: u64, ahead: &[(u64, u64)]) -> Cursor {
        let mut cursor = Cursor::new(1);
        cursor.end(1..lowest, &"delivered".into());
        for (first, end) in ahead {
            cursor.end(*first..*end, &"delivered".into());
        }
        cursor
    }

    #[test]
    fn a_slot_comes_back_and_every_flipped_bit_is_noticed() {
        let cursor = cursor(5, &[(7, 9), (12, 13)]);
        let bytes = encode_slot(&cursor.save("mixpanel"), 3);
        assert_eq!(decode_slot(&bytes), Slot::Cursor { generation: 3, cursor });
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_slot(&flipped), Slot::Damaged, "bit {bit}");
        }
        for cut in 0..bytes.len() {
            assert_eq!(decode_slot(&bytes[..cut]), Slot::Damaged, "cut at {cut}");
        }
        assert_eq!(decode_slot(&[0; SLOT_BYTES]), Slot::Empty);
    }

    #[test]
    fn more_ranges_than_fit_are_cut_from_the_highest_and_never_counted_twice() {
        let ranges: Vec<_> = (0..100_000_u64).map(|i| (10 + 2 * i, 11 + 2 * i)).collect();
        let many = cursor(5, &ranges);
        let bytes = encode_slot(&many.save("mixpanel"), 1);
        assert!(bytes.len() <= SLOT_BYTES, "{}", bytes.len());
        let Slot::Cursor { cursor, .. } = decode_slot(&bytes) else { panic!("readable") };
        assert!(cursor.has_ended(10 + 2 * 50_000), "fifty thousand fit");
        assert!(!cursor.has_ended(10 + 2 * 99_999));
        let ended: u64 = cursor.totals().values().sum();
        assert_eq!(ended + cursor.pending(300_000), 300_000 - 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Against a map of what ended first: whatever ranges end in whatever
        /// order, overlapping too, each event counts once, as it ended first.
        #[test]
        fn each_event_ends_once(ranges in prop::collection::vec((1_u64..60, 0_u64..9, 0_usize..3), 0..40)) {
            let mut cursor = Cursor::new(1);
            let mut model: HashMap<u64, &str> = HashMap::new();
            for (start, length, kind) in ranges {
                let ended = cursor.end(start..start + length, &KINDS[kind].into());
                let mut new = 0;
                for seq in start..start + length {
                    model.entry(seq).or_insert_with(|| { new += 1; KINDS[kind] });
                }
                prop_assert_eq!(ended, new);
                let lowest = (1..).find(|seq| !model.contains_key(seq)).unwrap();
                prop_assert_eq!(cursor.lowest(), lowest);
                let saved = decode_slot(&encode_slot(&cursor.save("p"), 1));
                prop_assert_eq!(saved, Slot::Cursor { generation: 1, cursor: cursor.clone() });
            }
            for seq in 1..80 {
                prop_assert_eq!(cursor.has_ended(seq), model.contains_key(&seq));
            }
            let not_ended: Vec<u64> = cursor.not_ended(1..80).into_iter().flatten().collect();
            prop_assert_eq!(not_ended, (1..80).filter(|seq| !model.contains_key(seq)).collect::<Vec<_>>());
            for kind in KINDS {
                let count = model.values().filter(|ended_as| **ended_as == kind).count() as u64;
                prop_assert_eq!(cursor.totals().get(kind).copied().unwrap_or(0), count);
            }
            prop_assert_eq!(cursor.pending(80), 79 - model.len() as u64);
        }
    }
}
