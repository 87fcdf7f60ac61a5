//! What is remembered of blocks, which never change, so that a question need not read again
//! what the one before has found out: see [`whole`](crate::scan::whole).
//!
//! Whether a session is of one block alone depends on the others. Sessions are cut after 24
//! hours, so only what is as near in time can have parts of them: each block is asked once
//! about each of those, by fingerprints of its sessions, and about what is in no block yet by
//! each question.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use rusqlite::Connection;

use super::{
    block::{BlockMeta, column},
    codec,
    hot::HotTable,
    lock,
};
use crate::{
    StoreError,
    model::DAY_MS,
    scan::whole::{Fingerprints, Part, Whole},
};

/// Most bytes that are remembered: of about a thousand blocks.
const BYTES_MAX: usize = 32 << 20;
/// Of a website with more blocks nothing is remembered: there would be no room for it.
const BLOCKS_MAX: usize = 2_048;
/// Of a block that has more than these near it in time nothing is remembered: to ask each about
/// each of the others would take longer than to read them.
const NEAR_MAX: usize = 96;

/// What is remembered of all blocks that were asked.
#[derive(Debug, Default)]
pub(crate) struct Memo(Mutex<Remembered>);

#[derive(Debug, Default)]
struct Remembered {
    blocks: HashMap<i64, Kept>,
    bytes: usize,
    /// Counts scans.
    scans: u64,
    /// Counts how often all of it was forgotten.
    epoch: u64,
}

/// What is remembered of a block.
#[derive(Debug)]
struct Kept {
    sessions: Arc<Fingerprints>,
    found: Option<Arc<Found>>,
    /// By which scan last.
    asked: u64,
}

/// What was found out about a block, and the blocks that were asked for it, in order.
#[derive(Debug)]
struct Found {
    whole: Arc<Whole>,
    others: Vec<i64>,
}

/// What is known of a block among those that are near it.
#[derive(Debug)]
pub(crate) struct Known {
    sessions: Arc<Fingerprints>,
    /// Those of which others may have parts.
    shared: Fingerprints,
    /// The blocks that may.
    others: Vec<i64>,
    /// What was found out before and still holds.
    pub(crate) whole: Option<Arc<Whole>>,
}

impl Memo {
    /// Forgets all of it, also what running questions are about to keep: somebody was erased.
    pub(crate) fn forget(&self) {
        let mut remembered = lock(&self.0);
        let (scans, epoch) = (remembered.scans, remembered.epoch + 1);
        *remembered = Remembered { scans, epoch, ..Remembered::default() };
    }

    /// Of so many blocks something was found out.
    #[cfg(test)]
    pub(crate) fn found(&self) -> usize {
        lock(&self.0).blocks.values().filter(|kept| kept.found.is_some()).count()
    }
}

impl Kept {
    fn bytes(&self) -> usize {
        let found = self.found.as_ref();
        let found = found.map_or(0, |found| found.whole.bytes() + found.others.capacity() * 8);
        size_of::<Self>() + self.sessions.bytes() + found
    }
}

impl Remembered {
    /// Puts in what is remembered of a block; false if there is no room for it. What the last
    /// scans did not ask for gives way; else the next block would push out the one before.
    fn put(&mut self, block: i64, kept: Kept) -> bool {
        let before = self.blocks.get(&block).map_or(0, Kept::bytes);
        let more = kept.bytes();
        let has_room = |bytes: usize| bytes - before + more <= BYTES_MAX;
        if !has_room(self.bytes) {
            let is_old = |(id, kept): &(&i64, &Kept)| **id != block && kept.asked + 1 < self.scans;
            let old = self.blocks.iter().filter(is_old);
            let mut old: Vec<(u64, i64)> = old.map(|(id, kept)| (kept.asked, *id)).collect();
            old.sort_unstable();
            for (_, id) in old {
                self.remove(id);
                if has_room(self.bytes) {
                    break;
                }
            }
        }
        if !has_room(self.bytes) {
            return false;
        }
        self.remove(block);
        self.bytes += more;
        self.blocks.insert(block, kept);
        true
    }

    fn remove(&mut self, block: i64) {
        if let Some(kept) = self.blocks.remove(&block) {
            self.bytes -= kept.bytes();
        }
    }
}

/// The blocks and tables of a website at one moment, each of which may have parts of the
/// others' sessions.
pub(crate) struct Around<'s> {
    memo: &'s Memo,
    blocks: &'s [BlockMeta],
    /// Blocks that could not be read, which are in no figure. One of them may be readable again,
    /// and so is among those that are near others.
    lost: HashSet<i64>,
    /// What is in no block yet, and the sessions of that.
    tables: Vec<(&'s HotTable, OnceLock<Fingerprints>)>,
    /// The number of this scan.
    scan: u64,
    epoch: u64,
    /// What was read could not be kept: else each block would have its neighbours read again.
    reads_no_more: AtomicBool,
}

impl<'s> Around<'s> {
    /// Nothing where there are too many blocks.
    pub(crate) fn new(
        memo: &'s Memo,
        blocks: &'s [BlockMeta],
        lost: HashSet<i64>,
        tables: &'s [Arc<HotTable>],
    ) -> Option<Self> {
        if blocks.len() > BLOCKS_MAX {
            return None;
        }
        let tables = tables.iter().map(|table| (&**table, OnceLock::new())).collect();
        let mut remembered = lock(&memo.0);
        remembered.scans += 1;
        let (scan, epoch) = (remembered.scans, remembered.epoch);
        Some(Self { memo, blocks, lost, tables, scan, epoch, reads_no_more: AtomicBool::new(false) })
    }

    /// What is known of a block; `None` where nothing can be said about it.
    pub(crate) fn known(&self, connection: &Connection, meta: &BlockMeta) -> Option<Known> {
        if meta.is_damaged || self.lost.contains(&meta.id) {
            return None;
        }
        let near = self.near(meta)?;
        let (sessions, found) = self.sessions(connection, meta)?;
        let others = found.as_ref().map_or(&[][..], |found| &found.others);
        let new = near.iter().filter(|one| others.binary_search(&one.id).is_err());
        let (mut shared, mut has_new) = (Fingerprints::default(), false);
        for one in new {
            shared.add_common(&sessions, &self.sessions(connection, one)?.0);
            has_new = true;
        }
        let near_ms = near_ms(meta);
        for (table, theirs) in self.tables.iter().filter(|(table, _)| table.table.overlaps(&near_ms)) {
            let theirs = theirs.get_or_init(|| Fingerprints::of(table.table.sessions.iter().copied()));
            shared.add_common(&sessions, theirs);
        }
        let mut others: Vec<i64> = near.iter().map(|one| one.id).collect();
        others.sort_unstable();
        let Some(found) = found else { return Some(Known { sessions, shared, others, whole: None }) };
        if found.whole.shared.includes(&shared) {
            let whole = found.whole.clone();
            if has_new {
                self.keep(meta, &sessions, Some(Found { whole: whole.clone(), others: others.clone() }));
            }
            return Some(Known { sessions, shared, others, whole: Some(whole) });
        }
        // Of the blocks that were asked before nobody needs to ask again.
        shared.add_all(&found.whole.shared);
        Some(Known { sessions, shared, others, whole: None })
    }

    /// Remembers the parts of sessions that a block has, and its views.
    pub(crate) fn remember(&self, meta: &BlockMeta, known: &Known, parts: &[Part], views: u64) -> Arc<Whole> {
        let whole = Arc::new(Whole::of(parts, views, known.sessions.clone(), known.shared.clone()));
        self.keep(meta, &known.sessions, Some(Found { whole: whole.clone(), others: known.others.clone() }));
        whole
    }

    /// The blocks that may have parts of a block's sessions; `None` if they are too many.
    fn near(&self, meta: &BlockMeta) -> Option<Vec<&'s BlockMeta>> {
        let near_ms = near_ms(meta);
        let is_near = |one: &&BlockMeta| one.id != meta.id && one.overlaps(&near_ms);
        let near: Vec<_> = self.blocks.iter().filter(is_near).take(NEAR_MAX + 1).collect();
        (near.len() <= NEAR_MAX).then_some(near)
    }

    /// The sessions of a block, and what was found out about it.
    fn sessions(
        &self,
        connection: &Connection,
        meta: &BlockMeta,
    ) -> Option<(Arc<Fingerprints>, Option<Arc<Found>>)> {
        if let Some(kept) = lock(&self.memo.0).blocks.get_mut(&meta.id) {
            kept.asked = kept.asked.max(self.scan);
            return Some((kept.sessions.clone(), kept.found.clone()));
        }
        if self.reads_no_more.load(Ordering::Relaxed) {
            return None;
        }
        let read = || {
            let column = column(connection, meta.id, codec::SESSIONS)?;
            Ok::<_, StoreError>(codec::decode_keys(&column, meta.rows, false)?.keys)
        };
        let sessions = Arc::new(Fingerprints::of(read().ok()?.into_iter()));
        if !self.keep(meta, &sessions, None) {
            self.reads_no_more.store(true, Ordering::Relaxed);
        }
        Some((sessions, None))
    }

    /// Keeps what is known of a block; false if that cannot be.
    fn keep(&self, meta: &BlockMeta, sessions: &Arc<Fingerprints>, found: Option<Found>) -> bool {
        let mut remembered = lock(&self.memo.0);
        if remembered.epoch != self.epoch {
            return false;
        }
        // Another thread may have found out more meanwhile.
        let before = remembered.blocks.get(&meta.id);
        if found.is_none() && before.is_some() {
            return true;
        }
        let asked = before.map_or(self.scan, |before| before.asked.max(self.scan));
        let kept = Kept { sessions: sessions.clone(), found: found.map(Arc::new), asked };
        remembered.put(meta.id, kept)
    }
}

/// So near in time may be what has parts of a block's sessions.
fn near_ms(meta: &BlockMeta) -> Range<i64> {
    meta.first_ms.saturating_sub(DAY_MS)..meta.last_ms.saturating_add(DAY_MS + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fifth of all that there is room for.
    fn kept(asked: u64) -> Kept {
        let whole = Arc::new(Whole::of(&[], 0, Arc::default(), Fingerprints::default()));
        let found = Found { whole, others: Vec::with_capacity(BYTES_MAX / 5 / 8) };
        Kept { sessions: Arc::default(), found: Some(Arc::new(found)), asked }
    }

    #[test]
    fn what_was_not_asked_for_lately_makes_room_the_oldest_first() {
        let mut remembered = Remembered { scans: 10, ..Remembered::default() };
        let ids = |remembered: &Remembered| {
            let mut ids: Vec<i64> = remembered.blocks.keys().copied().collect();
            ids.sort_unstable();
            ids
        };
        for block in 1..5 {
            assert!(remembered.put(block, kept(block as u64)));
        }
        assert!(remembered.put(5, kept(10)));
        assert_eq!(ids(&remembered), [2, 3, 4, 5]);
        assert!(remembered.put(5, kept(10)), "in its own place it has room");
        remembered.blocks.values_mut().for_each(|kept| kept.asked = 9);
        assert!(!remembered.put(6, kept(10)), "all others were asked for just now");
        assert_eq!(ids(&remembered), [2, 3, 4, 5]);
        (2..6).for_each(|block| remembered.remove(block));
        assert_eq!(remembered.bytes, 0);
    }
}
