//! A log that dies, is damaged, and is opened again.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use analytics_relay_providers::fuzzing::Input;
use fastrand::Rng;

use crate::queue::spool::{
    cursor::SLOT_BYTES,
    index::Segment,
    log::LogLimits,
    model::{PROVIDERS, Rig, dirs, sealed},
    sim::Fault,
};

/// A small log that is used, crashes, and is damaged. It can always be opened
/// again; nothing is read that was not written; what was promised and not
/// touched by the damage is there.
pub fn recovery(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut log = DamagedLog::new(&mut input);
    while !input.is_empty() {
        log.step(&mut input);
    }
    log.reopen(Death::Process);
}

const WHOLE: Range<usize> = 0..usize::MAX;

#[derive(Clone, Copy)]
enum Death {
    Process,
    Machine,
}

impl Death {
    fn some(input: &mut Input<'_>) -> Self {
        if input.flag() { Self::Process } else { Self::Machine }
    }
}

struct DamagedLog {
    rig: Rig,
    rng: Rng,
}

impl DamagedLog {
    fn new(input: &mut Input<'_>) -> Self {
        let seed = u64::from(input.byte());
        let limits = LogLimits {
            segment_bytes: [300, 1024, 4096][input.below(3)],
            bytes_max: [2048, 8192, 1 << 20][input.below(3)],
        };
        let mut rig = Rig::new(seed, limits);
        // A third of them sealed, a third now so and now so.
        match input.below(3) {
            0 => {}
            1 => rig = rig.keeping(sealed("a,b")),
            _ => {
                rig = rig.keeping(sealed("a,b"));
                rig.switches = Some(&["a,b", "b,a", "none,a,b"]);
            }
        }
        rig.open().expect("an empty disk");
        Self { rig, rng: Rng::with_seed(u64::from(input.byte())) }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(16) {
            0..5 => self.append(input),
            5 | 6 => self.end(input),
            7 => self.rig.write_cursors(),
            8 => {
                self.rig.sync();
                self.rig.sync_cursors();
            }
            9 => self.fail(input, 64),
            10 => {
                let room = input.flag().then(|| 4 * SLOT_BYTES as u64 + 16 * u64::from(input.u16()));
                self.rig.fs.set_room(room);
            }
            11 => self.reopen(Death::Process),
            12 => self.reopen(Death::Machine),
            13 => self.reopen_with_fault(input),
            _ => self.damage(input),
        }
    }

    fn append(&mut self, input: &mut Input<'_>) {
        let events = input.below(5) as u64;
        let (sync, filler) = (input.flag(), input.below(256));
        let attempt = events == 0 || input.flag();
        // The rig keeps account of what is refused.
        let _ = self.rig.append_filled(events, filler, sync, attempt);
    }

    /// A provider is done with some events that are in the log.
    fn end(&mut self, input: &mut Input<'_>) {
        let place = input.below(PROVIDERS.len());
        let start = self.rig.log().index().oldest_seq() + u64::from(input.byte());
        self.rig.end(place, start..start + u64::from(input.byte() % 16), 0);
    }

    fn fail(&mut self, input: &mut Input<'_>, calls_max: u8) {
        let fault = Fault::ALL[input.below(Fault::ALL.len())];
        self.rig.fs.fail_after(u64::from(input.byte() % calls_max), fault);
    }

    fn die(&mut self, death: Death) {
        match death {
            Death::Process => self.rig.crash_process(),
            Death::Machine => self.rig.crash_machine(&mut self.rng),
        }
        self.rig.fs.heal();
    }

    fn reopen(&mut self, death: Death) {
        self.die(death);
        self.open();
    }

    /// Recovery itself is cut short.
    fn reopen_with_fault(&mut self, input: &mut Input<'_>) {
        let death = Death::some(input);
        self.die(death);
        self.fail(input, 96);
        // It may succeed all the same.
        let _ = self.rig.open();
        self.reopen(death);
    }

    fn open(&mut self) {
        if let Some(kids) = self.rig.switches {
            self.rig.keys = sealed(kids[self.rng.usize(..kids.len())]);
        }
        self.rig.open().expect("whatever is damaged, it opens");
        self.read_in_parts();
        self.rig.check_found_again(|_| {});
    }

    /// Parts of the log are what they are in the whole.
    fn read_in_parts(&mut self) {
        let all = self.rig.read_all();
        let (oldest, next) = (self.rig.log().index().oldest_seq(), self.rig.log().next_seq());
        if self.rng.bool() {
            let (events_max, bytes_max) = (1 + self.rng.usize(..3), 1 + self.rng.u64(..600));
            let parts = self.rig.read_from(oldest, events_max, bytes_max);
            // Behind the last event nothing is looked for.
            let same = parts.events == all.events && parts.damaged.is_subset(&all.damaged);
            assert!(same, "{parts:?}, not {all:?}");
        } else {
            let middle = self.rng.u64(oldest..=next);
            let rest = self.rig.read_from(middle, usize::MAX, u64::MAX);
            assert!(
                rest.events.iter().eq(all.events.range(middle..)),
                "{rest:?} from {middle} on, not {all:?}"
            );
        }
    }

    /// The process or the machine dies, and then a file is damaged.
    fn damage(&mut self, input: &mut Input<'_>) {
        let next_seq = self.rig.log().next_seq();
        let death = Death::some(input);
        self.die(death);
        self.rig.fs.settle();
        let dirs = dirs();
        let files: Vec<PathBuf> = [dirs.segments, dirs.cursors, dirs.quarantine]
            .iter()
            .flat_map(|dir| self.rig.fs.files(dir))
            .collect();
        if let Some(path) = files.get(input.below(files.len().clamp(1, 256))) {
            self.damage_file(path, &files, next_seq, input);
        }
        self.open();
    }

    fn damage_file(&mut self, path: &Path, files: &[PathBuf], next_seq: u64, input: &mut Input<'_>) {
        let before = self.rig.fs.bytes(path);
        let mut after = before.clone();
        let at = usize::from(input.u16()) % (before.len() + 1);
        let touched = match input.below(8) {
            0 if at < after.len() => {
                after[at] ^= 1 << input.below(8);
                at..at + 1
            }
            1 | 2 => {
                let end = (at + usize::from(input.byte())).min(after.len());
                let (byte, random) = (input.byte(), input.flag());
                after[at..end].fill_with(|| if random { self.rng.u8(..) } else { byte });
                at..end
            }
            3 => {
                after.truncate(at);
                at..usize::MAX
            }
            4 => {
                let bytes = input.below(256);
                after.extend_from_slice(input.take(bytes));
                before.len()..after.len()
            }
            5 => {
                // A write that went astray.
                let other = self.rig.fs.bytes(&files[input.below(files.len().min(256))]);
                let from = usize::from(input.u16()) % (other.len() + 1);
                let bytes = (other.len() - from).min(after.len() - at).min(usize::from(input.u16()));
                after[at..at + bytes].copy_from_slice(&other[from..from + bytes]);
                // Whole frames in the wrong place hide those that are right.
                WHOLE
            }
            6 => {
                self.rig.touch(path, &WHOLE);
                return self.rig.fs.delete(path);
            }
            _ => return self.add_foreign_file(next_seq, input),
        };
        self.rig.touch(path, &touched);
        self.rig.fs.set_bytes(path, &after);
    }

    /// A file that no relay made, or one that came from somewhere else.
    fn add_foreign_file(&mut self, next_seq: u64, input: &mut Input<'_>) {
        let dirs = dirs();
        let dir = [&dirs.segments, &dirs.cursors, &dirs.quarantine][input.below(3)];
        let first_seq = next_seq + u64::from(input.byte());
        let segment = Segment { first_seq, end_seq: 0, used: 0, allocated: 0 };
        let name = match input.below(8) {
            0 | 1 => segment.name(),
            2 => "x.log".to_owned(),
            3 => format!("{}.unfinished", segment.name()),
            4 => "c.cursor".to_owned(),
            5 => ".cursor".to_owned(),
            6 => "99999999999999999999.log".to_owned(),
            _ => "note.bin".to_owned(),
        };
        let path = dir.join(name);
        if !self.rig.fs.files(dir).contains(&path) {
            let bytes = input.below(256);
            self.rig.fs.set_bytes(&path, input.take(bytes));
        }
    }
}
