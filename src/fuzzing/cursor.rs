//! A provider's cursor, its slot and its file.

use std::path::Path;

use analytics_relay_providers::fuzzing::Input;
use fastrand::Rng;

use crate::queue::spool::{
    cursor::{Cursor, CursorFile, SLOT_BYTES, Slot, decode_slot},
    frame::SEQ_MAX,
    fs::SpoolFs,
    layout::LogDirs,
    quarantine::Quarantine,
    sim::SimFs,
};

/// No cursor is written so often, and none counts so many events.
const COUNT_MAX: u64 = 1 << 60;

/// A cursor's slot, and its life after it was read.
pub fn cursor(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let steps_bytes = input.below(128);
    let mode = input.below(3);
    let mut steps = Input::new(input.take(steps_bytes));
    let slot = match mode {
        0 => input.rest().to_vec(),
        1 => {
            let (generation, version) = (input.u64(), 1 + u16::from(input.byte() == 0xFF));
            sealed_slot(generation, version, input.rest())
        }
        _ => sealed_slot(input.u64(), 1, made_up_cursor(&mut input).as_bytes()),
    };
    let Slot::Cursor { generation, cursor } = decode_slot(&slot) else { return };
    assert_eq!(decode_slot(&slot), Slot::Cursor { generation, cursor: cursor.clone() });
    if generation >= COUNT_MAX || counted_events(&cursor) >= u128::from(COUNT_MAX) {
        return;
    }
    let mut cursor = cursor;
    check_cursor(&cursor);
    let mut file = slot.clone();
    file.resize(2 * SLOT_BYTES, 0);
    let mut on_disk = DiskCursor::new(&file);
    assert_eq!(on_disk.file.cursor, cursor);
    while !steps.is_empty() {
        let near = cursor.since() + (cursor.end_seq() - cursor.since()) / 2;
        let start = match steps.below(3) {
            0 => cursor.lowest(),
            1 => cursor.end_seq(),
            _ => near,
        };
        let start = (start + u64::from(steps.byte())).saturating_sub(64).min(SEQ_MAX);
        let range = start..(start + u64::from(steps.byte())).min(SEQ_MAX);
        let ended_as = ["delivered", "dead_lettered/invalid", "dropped/spool_damaged"][steps.below(3)].into();

        let before: u128 = counted_events(&cursor);
        let ended = cursor.end(range.clone(), &ended_as);
        assert_eq!(counted_events(&cursor), before + u128::from(ended));
        assert!(ended <= range.end - range.start);
        assert!(range.clone().all(|seq| cursor.has_ended(seq)));
        assert_eq!(cursor.end(range.clone(), &ended_as), 0, "an event ends once");
        check_cursor(&cursor);
        assert_eq!(on_disk.file.end(range, &ended_as), ended);
        on_disk.step(steps.below(8));
    }
    on_disk.file.sync().expect("the disk is well");
    on_disk.step(7);
    assert_eq!(on_disk.file.cursor, cursor);
}

fn check_cursor(cursor: &Cursor) {
    assert!(cursor.since() <= cursor.lowest() && cursor.lowest() <= cursor.end_seq());
    assert!(!cursor.has_ended(cursor.lowest()), "the lowest has not ended");
    assert!(!cursor.has_ended(cursor.end_seq()));
    assert!(cursor.lowest() == 0 || cursor.has_ended(cursor.lowest() - 1));
    assert!(cursor.pending(cursor.end_seq()) <= cursor.end_seq() - cursor.lowest());
    assert_eq!(cursor.pending(cursor.end_seq() + 5), cursor.pending(cursor.end_seq()) + 5);
}

fn counted_events(cursor: &Cursor) -> u128 {
    cursor.totals().values().map(|events| u128::from(*events)).sum()
}

fn sealed_slot(generation: u64, version: u16, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(SLOT_BYTES - 32)];
    let mut slot = b"ARCURSR\xFE".to_vec();
    slot.extend_from_slice(&version.to_le_bytes());
    slot.extend_from_slice(&[0; 6]);
    slot.extend_from_slice(&generation.to_le_bytes());
    slot.extend_from_slice(&u32::try_from(payload.len()).expect("a slot is small").to_le_bytes());
    slot.extend_from_slice(&[0; 4]);
    slot.extend_from_slice(payload);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&slot[..12]);
    crc.update(&slot[16..]);
    slot[12..16].copy_from_slice(&crc.finalize().to_le_bytes());
    slot
}

fn made_up_cursor(input: &mut Input<'_>) -> String {
    let since = if input.flag() { input.u64() % (SEQ_MAX + 2) } else { u64::from(input.byte()) };
    let lowest = (since + u64::from(input.byte())).saturating_sub(u64::from(input.flag()));
    let runs: Vec<u8> = (0..input.below(32)).map(|_| input.byte() % 16).collect();
    let ahead: u64 = runs.iter().skip(1).step_by(2).map(|run| u64::from(*run)).sum();
    let delivered = lowest.saturating_sub(since) + ahead;
    format!(
        r#"{{"provider":"p","since":{since},"lowest":{lowest},"totals":{{"delivered":{delivered}}},"ahead":{runs:?}}}"#
    )
}

/// A cursor in its file on a disk.
struct DiskCursor {
    fs: SimFs,
    dirs: LogDirs,
    file: CursorFile,
}

impl DiskCursor {
    fn new(bytes: &[u8]) -> Self {
        let fs = SimFs::new(0);
        let dirs = LogDirs::new(Path::new("/spool"));
        for dir in [&dirs.cursors, &dirs.quarantine] {
            fs.create_dir(dir).expect("the disk is well");
        }
        fs.set_bytes(&CursorFile::path(&dirs.cursors, "p"), bytes);
        let file = Self::open(&fs, &dirs);
        Self { fs, dirs, file }
    }

    fn open(fs: &SimFs, dirs: &LogDirs) -> CursorFile {
        let mut quarantine = Quarantine::open(fs, &dirs.quarantine, u64::MAX).expect("the disk is well");
        let opened = CursorFile::open(fs, &dirs.cursors, "p", 0, &mut quarantine);
        let (file, is_new) = opened.expect("the cursor can be read");
        assert!(!is_new, "a slot is good at any time");
        file
    }

    /// Writes, syncs or dies. What is written survives the process, what is
    /// synced survives the machine, and what may be removed stays removed.
    fn step(&mut self, step: usize) {
        let before = self.file.cursor.clone();
        let safe = self.file.safe_lowest();
        match step {
            0..3 => self.file.write().expect("the disk is well"),
            3 => self.file.sync().expect("the disk is well"),
            4 => {
                self.file.write().expect("the disk is well");
                self.fs.crash_process();
                self.file = Self::open(&self.fs, &self.dirs);
                assert_eq!(self.file.cursor, before);
            }
            // The power fails after a sync: nothing is lost.
            7 => {
                self.file.sync().expect("the disk is well");
                self.fs.crash_machine(&mut Rng::with_seed(safe));
                self.file = Self::open(&self.fs, &self.dirs);
                assert_eq!(self.file.cursor, before);
                assert!(self.file.cursor.lowest() >= safe);
            }
            _ => {}
        }
    }
}
