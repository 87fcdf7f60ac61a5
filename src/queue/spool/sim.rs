//! A disk in memory that can lose power, run out of room and fail at the N-th
//! call.
//!
//! What a program sees and what would survive the machine are kept apart:
//! [`Inode::now`] and [`Inode::synced`], [`Dir::now`] and [`Dir::synced`]. A
//! sync carries one over to the other. When the machine dies, each write since
//! the last sync is kept, dropped or torn by itself, and of the changes to a
//! directory the first few are kept.
//!
//! A sync that fails decides then and there what it left on the disk, and
//! forgets the rest: a second sync says that all is well and saves nothing
//! more, as Linux does.

use std::{
    collections::BTreeMap,
    fmt, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use fastrand::Rng;

use super::fs::{SpoolFile, SpoolFs};

/// Bytes of a file that are kept together.
const PAGE_BYTES: usize = 4096;
/// Bytes that a disk writes whole.
const SECTOR_BYTES: usize = 512;

const EIO: i32 = 5;
const EBADF: i32 = 9;
const ENOSPC: i32 = 28;

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It says EIO and does nothing. A sync: see the module.
    Error,
    /// It does what it should and says EIO all the same.
    LateError,
    /// It says that there is no room and does nothing. A sync: see the module.
    Full,
    /// A write takes a part, and there is no room for the next one.
    ShortWrite,
    /// A write leaves a part behind and says EIO.
    TornWrite,
    /// The process is killed before the call: nothing works from here on.
    StopBefore,
    /// The process is killed in the middle of a write.
    StopMiddle,
}

impl Fault {
    pub(crate) const ALL: [Self; 7] = [
        Self::Error,
        Self::LateError,
        Self::Full,
        Self::ShortWrite,
        Self::TornWrite,
        Self::StopBefore,
        Self::StopMiddle,
    ];

    /// True if that call can fail so.
    fn suits(self, call: Call) -> bool {
        match self {
            Self::Error | Self::StopBefore => true,
            Self::LateError => !call.only_looks() && call != Call::Write,
            Self::Full => {
                matches!(
                    call,
                    Call::Create
                        | Call::Write
                        | Call::Allocate
                        | Call::Rename
                        | Call::SyncData
                        | Call::SyncDir
                )
            }
            Self::ShortWrite | Self::TornWrite | Self::StopMiddle => call == Call::Write,
        }
    }

    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(if self == Self::Full { ENOSPC } else { EIO })
    }
}

/// What is asked of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Call {
    CreateDir,
    List,
    Create,
    Open,
    Rename,
    Remove,
    SyncDir,
    Read,
    Write,
    Allocate,
    SetLen,
    Len,
    SyncData,
}

impl Call {
    fn only_looks(self) -> bool {
        matches!(self, Self::List | Self::Open | Self::Read | Self::Len)
    }
}

/// What went wrong on a disk so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mishaps {
    /// Calls that a fault struck.
    pub(crate) faults: u64,
    pub(crate) failed_syncs: u64,
    /// Writes that a fault cut short.
    pub(crate) torn_writes: u64,
    pub(crate) machine_crashes: u64,
    /// Writes, or parts of them, that a machine lost.
    pub(crate) lost_writes: u64,
    /// Changes to directories that a machine lost.
    pub(crate) lost_names: u64,
    /// Writes that the room did not suffice for.
    pub(crate) out_of_room: u64,
    pub(crate) flipped_bits: u64,
}

impl Mishaps {
    pub(crate) fn add(&mut self, other: &Self) {
        self.faults += other.faults;
        self.failed_syncs += other.failed_syncs;
        self.torn_writes += other.torn_writes;
        self.machine_crashes += other.machine_crashes;
        self.lost_writes += other.lost_writes;
        self.lost_names += other.lost_names;
        self.out_of_room += other.out_of_room;
        self.flipped_bits += other.flipped_bits;
    }
}

/// See the module. A clone is the same disk; [`SimFs::fork`] makes another.
#[derive(Clone)]
pub(crate) struct SimFs(Arc<Mutex<Disk>>);

#[derive(Clone)]
struct Disk {
    dirs: BTreeMap<PathBuf, Dir>,
    /// Files by their number, which is never used again.
    inodes: Vec<Inode>,
    /// Handles of an earlier boot are void.
    boot: u64,
    calls: u64,
    /// The first call that may fail, and how.
    fault: Option<(u64, Fault)>,
    struck: Option<Call>,
    /// A write was cut short: the next one finds no room.
    short: bool,
    stopped: bool,
    /// Most bytes of all files.
    room: Option<u64>,
    mishaps: Mishaps,
    rng: Rng,
}

#[derive(Clone, Default)]
struct Dir {
    now: BTreeMap<String, usize>,
    synced: BTreeMap<String, usize>,
    /// What leads from `synced` to `now`.
    changes: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Link(String, usize),
    Rename(String, String),
    Remove(String),
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Link(name, inode) => {
                names.insert(name.clone(), *inode);
            }
            Self::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
            Self::Remove(name) => {
                names.remove(name);
            }
        }
    }
}

#[derive(Clone, Default)]
struct Inode {
    now: Content,
    synced: Content,
    /// What leads from `synced` to `now`, unless a sync failed.
    writes: Vec<Unsynced>,
    sync_failed: bool,
}

/// What a file holds, by pages; a page of zeros takes no room, as most of a
/// cursor's file is nothing else.
#[derive(Clone, Default)]
struct Content {
    pages: Vec<Option<Arc<[u8; PAGE_BYTES]>>>,
    length: usize,
}

impl Content {
    fn new(bytes: &[u8]) -> Self {
        let mut content = Self::default();
        content.put(0, bytes);
        content
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (place, part) in parts(at, bytes.len()) {
            let number = place / PAGE_BYTES;
            if self.pages.len() <= number {
                self.pages.resize(number + 1, None);
            }
            let page = self.pages[number].get_or_insert_with(|| Arc::new([0; PAGE_BYTES]));
            let from = place % PAGE_BYTES;
            Arc::make_mut(page)[from..from + part.len()].copy_from_slice(&bytes[part]);
        }
        self.length = self.length.max(at + bytes.len());
    }

    fn set_len(&mut self, length: usize) {
        self.pages.truncate(length.div_ceil(PAGE_BYTES));
        if length < self.length
            && let Some(Some(last)) = self.pages.get_mut(length / PAGE_BYTES)
        {
            Arc::make_mut(last)[length % PAGE_BYTES..].fill(0);
        }
        self.length = length;
    }

    /// Reads at a place; returns the bytes read.
    fn read(&self, buffer: &mut [u8], from: usize) -> usize {
        let read = self.length.saturating_sub(from).min(buffer.len());
        for (place, part) in parts(from, read) {
            match self.pages.get(place / PAGE_BYTES) {
                Some(Some(page)) => {
                    let from = place % PAGE_BYTES;
                    buffer[part.clone()].copy_from_slice(&page[from..from + part.len()]);
                }
                _ => buffer[part].fill(0),
            }
        }
        read
    }

    fn flip(&mut self, bit: usize) {
        let mut byte = [0];
        if self.read(&mut byte, bit / 8) == 1 {
            self.put(bit / 8, &[byte[0] ^ 1 << (bit % 8)]);
        }
    }
}

/// Cuts a range of a file at the borders of pages: the place in the file and the
/// part of the range.
fn parts(at: usize, length: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let place = at + done;
        let end = length.min(done + PAGE_BYTES - place % PAGE_BYTES);
        let part = done..end;
        done = end;
        (!part.is_empty()).then_some((place, part))
    })
}

#[derive(Clone)]
enum Unsynced {
    Write(usize, Vec<u8>),
    Length(usize),
}

impl Unsynced {
    fn apply(&self, content: &mut Content) {
        match self {
            Self::Write(at, bytes) => content.put(*at, bytes),
            Self::Length(length) => content.set_len(*length),
        }
    }

    /// What of it a dying machine brings to the disk. Returns true if that is
    /// not all.
    fn apply_perhaps(&self, content: &mut Content, rng: &mut Rng) -> bool {
        let chance = rng.u8(..8);
        match self {
            _ if chance < 3 => self.apply(content),
            _ if chance < 5 => {}
            Self::Length(_) => self.apply(content),
            Self::Write(at, bytes) if chance == 5 => content.put(*at, &bytes[..rng.usize(..=bytes.len())]),
            Self::Write(at, bytes) if chance == 6 => {
                let mut from = 0;
                while from < bytes.len() {
                    let sector_end = (at + from) / SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES;
                    let to = bytes.len().min(sector_end - at);
                    if rng.bool() {
                        content.put(at + from, &bytes[from..to]);
                    }
                    from = to;
                }
            }
            // The room was given, but not what stands in it.
            Self::Write(at, bytes) => content.length = content.length.max(at + bytes.len()),
        }
        chance >= 3 && (chance < 5 || matches!(self, Self::Write(..)))
    }
}

impl Inode {
    fn sync(&mut self) {
        for write in self.writes.drain(..) {
            write.apply(&mut self.synced);
        }
    }

    /// Only what luck allows comes to the disk; returns the writes that suffer.
    fn sync_perhaps(&mut self, rng: &mut Rng) -> u64 {
        let mut lost = 0;
        for write in self.writes.drain(..) {
            lost += u64::from(write.apply_perhaps(&mut self.synced, rng));
        }
        lost
    }
}

impl Disk {
    /// Counts a call. Fails if a fault says so; a fault in the midst of the
    /// call is returned.
    fn begin(&mut self, call: Call) -> io::Result<Option<Fault>> {
        self.calls += 1;
        if self.stopped {
            return Err(Fault::StopBefore.error());
        }
        if call == Call::Write && std::mem::take(&mut self.short) {
            self.mishaps.out_of_room += 1;
            return Err(Fault::Full.error());
        }
        let Some((_, fault)) = self.fault.filter(|(from, fault)| self.calls >= *from && fault.suits(call))
        else {
            return Ok(None);
        };
        self.fault = None;
        self.struck = Some(call);
        self.mishaps.faults += 1;
        self.stopped = matches!(fault, Fault::StopBefore | Fault::StopMiddle);
        match fault {
            Fault::StopBefore => Err(fault.error()),
            Fault::Error | Fault::Full if call != Call::SyncData => Err(fault.error()),
            _ => Ok(Some(fault)),
        }
    }

    fn dir(&mut self, path: &Path) -> io::Result<(&mut Dir, String)> {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        let dir = path.parent().expect("a directory");
        Ok((self.dirs.get_mut(dir).ok_or(io::ErrorKind::NotFound)?, name))
    }

    fn find(&mut self, path: &Path) -> io::Result<usize> {
        let (dir, name) = self.dir(path)?;
        Ok(*dir.now.get(&name).ok_or(io::ErrorKind::NotFound)?)
    }

    fn change(&mut self, path: &Path, change: Change) -> io::Result<()> {
        let (dir, _) = self.dir(path)?;
        change.apply(&mut dir.now);
        dir.changes.push(change);
        Ok(())
    }

    fn write(&mut self, inode: usize, write: Unsynced) {
        let inode = &mut self.inodes[inode];
        write.apply(&mut inode.now);
        inode.writes.push(write);
    }

    /// How far a file may grow.
    fn length_max(&self, inode: usize) -> usize {
        let Some(room) = self.room else { return usize::MAX };
        self.inodes[inode].now.length + usize::try_from(room).expect("fits").saturating_sub(self.used())
    }

    fn used(&self) -> usize {
        let inodes = self.dirs.values().flat_map(|dir| dir.now.values());
        inodes.map(|inode| self.inodes[*inode].now.length).sum()
    }

    fn new_boot(&mut self) {
        self.boot += 1;
        (self.fault, self.short, self.stopped) = (None, false, false);
    }
}

/// The end of a call that was done.
fn done<T>(value: T, fault: Option<Fault>) -> io::Result<T> {
    fault.map_or(Ok(value), |fault| Err(fault.error()))
}

impl SimFs {
    /// An empty disk. `seed` decides where writes tear and what failed syncs
    /// leave.
    pub(crate) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Disk {
            dirs: BTreeMap::new(),
            inodes: Vec::new(),
            boot: 0,
            calls: 0,
            fault: None,
            struck: None,
            short: false,
            stopped: false,
            room: None,
            mishaps: Mishaps::default(),
            rng: Rng::with_seed(seed),
        })))
    }

    /// A copy that goes its own way.
    pub(crate) fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.disk().clone())))
    }

    /// SIGKILL: open files are gone, what was written is not.
    pub(crate) fn crash_process(&self) {
        self.disk().new_boot();
    }

    /// The power fails.
    pub(crate) fn crash_machine(&self, rng: &mut Rng) {
        let disk = &mut *self.disk();
        disk.new_boot();
        disk.mishaps.machine_crashes += 1;
        for inode in &mut disk.inodes {
            disk.mishaps.lost_writes += inode.sync_perhaps(rng);
            inode.now.clone_from(&inode.synced);
            inode.sync_failed = false;
        }
        for dir in disk.dirs.values_mut() {
            let kept = rng.usize(..=dir.changes.len());
            disk.mishaps.lost_names += (dir.changes.len() - kept) as u64;
            dir.changes.drain(..).take(kept).for_each(|change| change.apply(&mut dir.synced));
            dir.now.clone_from(&dir.synced);
        }
    }

    /// All that was written comes to the disk, as after a quiet minute.
    pub(crate) fn settle(&self) {
        let disk = &mut *self.disk();
        disk.inodes.iter_mut().for_each(Inode::sync);
        for dir in disk.dirs.values_mut() {
            dir.changes.drain(..).for_each(|change| change.apply(&mut dir.synced));
        }
    }

    /// Lets the call after `calls` more fail, or the first after it that can
    /// fail so.
    pub(crate) fn fail_after(&self, calls: u64, fault: Fault) {
        let mut disk = self.disk();
        disk.fault = Some((disk.calls + calls + 1, fault));
        disk.struck = None;
    }

    /// The call that the last fault struck, if it has.
    pub(crate) fn struck(&self) -> Option<Call> {
        self.disk().struck
    }

    /// Does something that no fault strikes, not even one that is due.
    pub(crate) fn unharmed<T>(&self, something: impl FnOnce() -> T) -> T {
        let (before, fault, short, stopped, room) = {
            let mut disk = self.disk();
            let short = std::mem::take(&mut disk.short);
            let stopped = std::mem::take(&mut disk.stopped);
            (disk.calls, disk.fault.take(), short, stopped, disk.room.take())
        };
        let value = something();
        let mut disk = self.disk();
        let passed = disk.calls - before;
        disk.fault = fault.map(|(at, fault)| (at + passed, fault));
        (disk.short, disk.stopped, disk.room) = (short, stopped, room);
        value
    }

    /// No fault any more, and all the room there is.
    pub(crate) fn heal(&self) {
        let mut disk = self.disk();
        (disk.fault, disk.short, disk.stopped, disk.room) = (None, false, false, None);
    }

    /// True if a fault has struck since the last one was asked for, or there is
    /// little room.
    pub(crate) fn has_faults(&self) -> bool {
        let disk = self.disk();
        disk.struck.is_some() || disk.room.is_some()
    }

    /// Bytes of all files.
    pub(crate) fn bytes_used(&self) -> u64 {
        self.disk().used() as u64
    }

    /// True if the process is dead.
    pub(crate) fn stopped(&self) -> bool {
        self.disk().stopped
    }

    /// Sets the most bytes of all files together.
    pub(crate) fn set_room(&self, room: Option<u64>) {
        self.disk().room = room;
    }

    /// Calls so far.
    pub(crate) fn calls(&self) -> u64 {
        self.disk().calls
    }

    pub(crate) fn mishaps(&self) -> Mishaps {
        self.disk().mishaps
    }

    /// The files of a directory, sorted; of none if it is not there.
    pub(crate) fn files(&self, dir: &Path) -> Vec<PathBuf> {
        let disk = self.disk();
        let names = disk.dirs.get(dir).into_iter().flat_map(|dir| dir.now.keys());
        names.map(|name| dir.join(name)).collect()
    }

    /// A file's bytes.
    pub(crate) fn bytes(&self, path: &Path) -> Vec<u8> {
        let mut disk = self.disk();
        let inode = disk.find(path).expect("the file is there");
        let content = &disk.inodes[inode].now;
        let mut bytes = vec![0; content.length];
        content.read(&mut bytes, 0);
        bytes
    }

    /// Puts a file there, on the disk for certain.
    pub(crate) fn set_bytes(&self, path: &Path, bytes: &[u8]) {
        let mut disk = self.disk();
        let inode = disk.inodes.len();
        let content = Content::new(bytes);
        disk.inodes.push(Inode { now: content.clone(), synced: content, ..Inode::default() });
        let (dir, name) = disk.dir(path).expect("the directory is there");
        dir.now.insert(name.clone(), inode);
        dir.synced.insert(name, inode);
    }

    /// Damages a bit, in memory and on the disk.
    pub(crate) fn flip_bit(&self, path: &Path, bit: usize) {
        let mut disk = self.disk();
        let inode = disk.find(path).expect("the file is there");
        disk.mishaps.flipped_bits += 1;
        disk.inodes[inode].now.flip(bit);
        disk.inodes[inode].synced.flip(bit);
    }

    /// Cuts a file, in memory and on the disk.
    pub(crate) fn truncate(&self, path: &Path, length: usize) {
        let mut disk = self.disk();
        let inode = disk.find(path).expect("the file is there");
        let Inode { now, synced, .. } = &mut disk.inodes[inode];
        for content in [now, synced] {
            content.set_len(length.min(content.length));
        }
    }

    /// Removes a file for certain.
    pub(crate) fn delete(&self, path: &Path) {
        let mut disk = self.disk();
        let (dir, name) = disk.dir(path).expect("the directory is there");
        dir.now.remove(&name).expect("the file is there");
        dir.synced.remove(&name);
    }

    /// True if a sync of the file failed, so that a later one says nothing
    /// about what was written before.
    pub(crate) fn sync_failed(&self, path: &Path) -> bool {
        let mut disk = self.disk();
        disk.find(path).is_ok_and(|inode| disk.inodes[inode].sync_failed)
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, inode: usize, boot: u64, writable: bool) -> Box<dyn SpoolFile> {
        Box::new(SimFile { fs: self.clone(), inode, boot, writable })
    }

    fn open_as(&self, path: &Path, writable: bool) -> io::Result<Box<dyn SpoolFile>> {
        let mut disk = self.disk();
        disk.begin(Call::Open)?;
        let inode = disk.find(path)?;
        Ok(self.handle(inode, disk.boot, writable))
    }
}

impl fmt::Debug for SimFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimFs")
    }
}

impl SpoolFs for SimFs {
    /// Survives at once: what is in directories is what is tested.
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        let fault = disk.begin(Call::CreateDir)?;
        for dir in path.ancestors() {
            disk.dirs.entry(dir.to_owned()).or_default();
        }
        done((), fault)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut disk = self.disk();
        disk.begin(Call::List)?;
        let dir = disk.dirs.get(dir).ok_or(io::ErrorKind::NotFound)?;
        Ok(dir.now.keys().cloned().collect())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>> {
        let mut disk = self.disk();
        let fault = disk.begin(Call::Create)?;
        let inode = if let Ok(inode) = disk.find(path) {
            disk.write(inode, Unsynced::Length(0));
            inode
        } else {
            let inode = disk.inodes.len();
            let (_, name) = disk.dir(path)?;
            disk.inodes.push(Inode::default());
            disk.change(path, Change::Link(name, inode))?;
            inode
        };
        done(self.handle(inode, disk.boot, true), fault)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>> {
        self.open_as(path, true)
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>> {
        self.open_as(path, false)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        assert_eq!(from.parent(), to.parent(), "a rename stays in its directory");
        let mut disk = self.disk();
        let fault = disk.begin(Call::Rename)?;
        disk.find(from)?;
        let (old, new) = (disk.dir(from)?.1, disk.dir(to)?.1);
        disk.change(from, Change::Rename(old, new))?;
        done((), fault)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        let fault = disk.begin(Call::Remove)?;
        disk.find(path)?;
        let (_, name) = disk.dir(path)?;
        disk.change(path, Change::Remove(name))?;
        done((), fault)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        let fault = disk.begin(Call::SyncDir)?;
        let dir = disk.dirs.get_mut(dir).ok_or(io::ErrorKind::NotFound)?;
        dir.changes.drain(..).for_each(|change| change.apply(&mut dir.synced));
        done((), fault)
    }
}

struct SimFile {
    fs: SimFs,
    inode: usize,
    boot: u64,
    writable: bool,
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimFile({})", self.inode)
    }
}

impl SimFile {
    fn disk(&self, call: Call) -> io::Result<MutexGuard<'_, Disk>> {
        let disk = self.fs.disk();
        let allowed = self.boot == disk.boot && (self.writable || call.only_looks());
        if allowed { Ok(disk) } else { Err(io::Error::from_raw_os_error(EBADF)) }
    }
}

impl SpoolFile for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut disk = self.disk(Call::Read)?;
        disk.begin(Call::Read)?;
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        Ok(disk.inodes[self.inode].now.read(buffer, from))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let disk = &mut *self.disk(Call::Write)?;
        let fault = disk.begin(Call::Write)?;
        let at = usize::try_from(offset).expect("fits");
        let mut length = bytes.len();
        match fault {
            Some(Fault::ShortWrite) => {
                length = disk.rng.usize(1.min(length)..=length);
                disk.short = true;
            }
            Some(Fault::TornWrite | Fault::StopMiddle) => length = disk.rng.usize(..=length),
            _ => {}
        }
        disk.mishaps.torn_writes += u64::from(length < bytes.len());
        let room = disk.length_max(self.inode).saturating_sub(at);
        if room < length {
            length = room;
            disk.mishaps.out_of_room += 1;
        }
        if length > 0 {
            disk.write(self.inode, Unsynced::Write(at, bytes[..length].to_vec()));
        }
        match fault {
            Some(fault) if fault != Fault::ShortWrite => Err(fault.error()),
            _ if length == 0 && !bytes.is_empty() => Err(Fault::Full.error()),
            _ => Ok(length),
        }
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        let disk = &mut *self.disk(Call::Allocate)?;
        let fault = disk.begin(Call::Allocate)?;
        let length = usize::try_from(length).expect("fits");
        if length > disk.inodes[self.inode].now.length {
            if length > disk.length_max(self.inode) {
                disk.mishaps.out_of_room += 1;
                return Err(Fault::Full.error());
            }
            disk.write(self.inode, Unsynced::Length(length));
        }
        done((), fault)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let disk = &mut *self.disk(Call::SetLen)?;
        let fault = disk.begin(Call::SetLen)?;
        disk.write(self.inode, Unsynced::Length(usize::try_from(length).expect("fits")));
        done((), fault)
    }

    fn len(&self) -> io::Result<u64> {
        let mut disk = self.disk(Call::Len)?;
        disk.begin(Call::Len)?;
        Ok(disk.inodes[self.inode].now.length as u64)
    }

    fn sync_data(&self) -> io::Result<()> {
        let disk = &mut *self.disk(Call::SyncData)?;
        let fault = disk.begin(Call::SyncData)?;
        let inode = &mut disk.inodes[self.inode];
        if let Some(fault @ (Fault::Error | Fault::Full)) = fault {
            disk.mishaps.failed_syncs += 1;
            inode.sync_failed = true;
            inode.sync_perhaps(&mut disk.rng);
            return Err(fault.error());
        }
        inode.sync();
        done((), fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> (SimFs, PathBuf, Box<dyn SpoolFile>) {
        let (fs, dir) = (SimFs::new(1), PathBuf::from("/d"));
        fs.create_dir(&dir).unwrap();
        let path = dir.join("f");
        let file = fs.create(&path).unwrap();
        (fs, path, file)
    }

    #[test]
    fn a_process_that_dies_loses_its_handles_and_nothing_else() {
        let (fs, path, file) = disk();
        file.write_all_at(b"abc", 0).unwrap();
        fs.crash_process();
        assert_eq!(file.len().unwrap_err().raw_os_error(), Some(EBADF));
        assert_eq!(fs.bytes(&path), b"abc");
    }

    #[test]
    fn a_machine_that_dies_keeps_what_was_synced_and_any_part_of_the_rest() {
        let (mut kept, mut dropped, mut torn, mut nameless) = (0, 0, 0, 0);
        for seed in 0..200 {
            let (fs, path, file) = disk();
            file.write_all_at(b"abc", 0).unwrap();
            file.sync_data().unwrap();
            let mut rng = Rng::with_seed(seed);
            if seed % 2 == 0 {
                fs.sync_dir(Path::new("/d")).unwrap();
                file.write_all_at(b"defgh", 3).unwrap();
            }
            fs.crash_machine(&mut rng);
            if seed % 2 == 1 {
                nameless += u64::from(fs.files(Path::new("/d")).is_empty());
                continue;
            }
            let bytes = fs.bytes(&path);
            assert_eq!(bytes[..3], *b"abc");
            match &bytes[3..] {
                b"defgh" => kept += 1,
                b"" => dropped += 1,
                _ => torn += 1,
            }
        }
        assert!(kept > 0 && dropped > 0 && torn > 0 && nameless > 0 && nameless < 100);
    }

    #[test]
    fn a_second_sync_saves_nothing_that_the_first_one_failed_to() {
        let lost = (0..50).filter(|seed| {
            let (fs, path, file) = disk();
            fs.sync_dir(Path::new("/d")).unwrap();
            fs.disk().rng = Rng::with_seed(*seed);
            file.write_all_at(b"abc", 0).unwrap();
            fs.fail_after(0, Fault::Error);
            file.sync_data().unwrap_err();
            assert_eq!(fs.struck(), Some(Call::SyncData));
            assert_eq!(fs.bytes(&path), b"abc", "it is seen all the same");
            file.sync_data().unwrap();
            file.write_all_at(b"x", 3).unwrap();
            file.sync_data().unwrap();
            fs.crash_machine(&mut Rng::with_seed(*seed));
            assert_eq!(fs.bytes(&path)[3], b'x', "what is written later is saved");
            fs.bytes(&path)[..3] != *b"abc"
        });
        assert!((10..50).contains(&lost.count()));
    }

    #[test]
    fn a_write_can_be_short_and_the_next_one_finds_no_room() {
        let (fs, path, file) = disk();
        fs.fail_after(0, Fault::ShortWrite);
        let error = file.write_all_at(&[7; 100], 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!((1..100).contains(&fs.bytes(&path).len()));
        fs.set_room(Some(150));
        assert!(file.write_all_at(&[7; 151], 0).is_err());
        assert_eq!(fs.bytes(&path).len(), 150);
        file.set_len(0).unwrap();
        file.allocate(150).unwrap();
        assert_eq!(file.allocate(151).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn after_a_stop_nothing_works_until_the_next_boot() {
        let (fs, path, file) = disk();
        fs.fail_after(1, Fault::StopBefore);
        file.write_all_at(b"abc", 0).unwrap();
        assert!(file.sync_data().is_err() && file.len().is_err() && fs.open(&path).is_err());
        fs.crash_process();
        assert_eq!(fs.open(&path).unwrap().len().unwrap(), 3);
    }
}
