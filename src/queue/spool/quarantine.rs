//! Keeps what cannot be read: a damaged range is copied here before anything
//! else happens to it. All copies together stay within a number of bytes: the
//! oldest make room, but for the newest, which stays however large it is.
//!
//! `quarantine/<file>-<offset>-<bytes>-<CRC-32>.bin`. The name says what was
//! copied, so the same bytes are copied and counted once, however often they are
//! met. What had to make room is empty and keeps its name: else each start, which
//! meets the damage again, would copy it once more for another to make room. Where the
//! disk gives nothing back, the copy has zeros.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use tracing::{error, warn};

use super::{
    fs::{SpoolFile, SpoolFs},
    layout::unfinished,
};

/// Bytes that are copied at once.
const COPY_BYTES: usize = 256 * 1024;
const ENDING: &str = ".bin";

/// A range of a segment that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DamagedRange {
    /// First number of the segment.
    pub(crate) segment: u64,
    pub(crate) at: u64,
    pub(crate) bytes: u64,
}

/// The directory of damaged ranges.
#[derive(Debug)]
pub(crate) struct Quarantine {
    dir: PathBuf,
    bytes_max: u64,
    /// The copies, the oldest first, with their bytes; none of what had to make room.
    copies: BTreeMap<Name, u64>,
    /// Copies that had to make room since the log was opened.
    removed: u64,
}

/// A copy's name, in the order of what was copied: segments are numbered with leading
/// zeros, offsets are not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    file: String,
    at: u64,
    name: String,
}

impl Name {
    /// None for a file that is no copy of ours.
    fn parse(name: String) -> Option<Self> {
        let mut parts = name.strip_suffix(ENDING)?.rsplitn(4, '-').skip(1);
        let (bytes, at, file) = (parts.next()?, parts.next()?, parts.next()?);
        bytes.parse::<u64>().ok()?;
        Some(Self { file: file.to_owned(), at: at.parse().ok()?, name })
    }
}

impl Quarantine {
    /// Opens the directory, which is there.
    pub(crate) fn open(fs: &dyn SpoolFs, dir: &Path, bytes_max: u64) -> io::Result<Self> {
        let mut copies = BTreeMap::new();
        for name in fs.list(dir)?.into_iter().filter_map(Name::parse) {
            let bytes = fs.open_to_read(&dir.join(&name.name))?.len()?;
            copies.insert(name, bytes);
        }
        let mut quarantine = Self { dir: dir.to_owned(), bytes_max, copies, removed: 0 };
        // There may be less room than in an earlier run.
        let newest = quarantine.copies.iter().rfind(|(_, bytes)| **bytes > 0);
        if let Some(newest) = newest.map(|(name, _)| name.clone()) {
            quarantine.make_room(fs, &newest);
        }
        Ok(quarantine)
    }

    /// Copies a range of a file, durably. Returns false if it was there.
    pub(crate) fn keep(
        &mut self,
        fs: &dyn SpoolFs,
        file: &dyn SpoolFile,
        file_name: &str,
        at: u64,
        bytes: u64,
    ) -> io::Result<bool> {
        let mut crc = crc32fast::Hasher::new();
        each_part(file, at, bytes, |_, part| {
            crc.update(part);
            Ok(())
        })?;
        let name = format!("{file_name}-{at}-{bytes}-{:08x}{ENDING}", crc.finalize());
        let name = Name { file: file_name.to_owned(), at, name };
        if self.copies.contains_key(&name) {
            return Ok(false);
        }
        let path = self.dir.join(&name.name);
        let new = unfinished(&path);
        let copy = fs.create(&new)?;
        each_part(file, at, bytes, |place, part| copy.write_all_at(part, place))?;
        copy.sync_data()?;
        let bytes = copy.len()?;
        fs.rename(&new, &path)?;
        fs.sync_dir(&self.dir)?;
        self.copies.insert(name.clone(), bytes);
        self.make_room(fs, &name);
        Ok(true)
    }

    /// Empties the oldest copies, as far as there are too many.
    fn make_room(&mut self, fs: &dyn SpoolFs, newest: &Name) {
        while self.bytes() > self.bytes_max {
            let mut copies = self.copies.iter_mut();
            let oldest = copies.find(|(name, bytes)| **bytes > 0 && *name != newest);
            let Some((Name { name, .. }, bytes)) = oldest else { return };
            let emptied = fs.open(&self.dir.join(name)).and_then(|copy| copy.set_len(0));
            match emptied {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    warn!(copy = name, %error, "a copy in quarantine cannot be emptied");
                    return;
                }
                Ok(()) | Err(_) => {}
            }
            error!(copy = name, bytes, "quarantine is full: its oldest copy is emptied");
            *bytes = 0;
            self.removed += 1;
        }
    }

    /// Damaged ranges so far.
    pub(crate) fn ranges(&self) -> u64 {
        self.copies.len() as u64
    }

    /// Copies that had to make room since the log was opened.
    pub(crate) fn removed(&self) -> u64 {
        self.removed
    }

    /// Bytes of the copies that are there.
    pub(crate) fn bytes(&self) -> u64 {
        self.copies.values().sum()
    }
}

/// Passes a range of a file on, part by part, with each part's place in it.
fn each_part(
    file: &dyn SpoolFile,
    at: u64,
    bytes: u64,
    mut action: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES.min(usize::try_from(bytes).unwrap_or(COPY_BYTES))];
    let mut done = 0;
    while done < bytes {
        let length = buffer.len().min(usize::try_from(bytes - done).unwrap_or(COPY_BYTES));
        let (read, _) = file.read_around(&mut buffer[..length], at + done)?;
        if read == 0 {
            break;
        }
        action(done, &buffer[..read])?;
        done += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::sim::SimFs, *};

    #[test]
    fn the_oldest_copies_make_room_and_are_counted_and_never_copied_again() {
        let (fs, dir) = (SimFs::new(0), Path::new("/quarantine"));
        fs.create_dir(dir).unwrap();
        let file = fs.create(Path::new("/quarantine/segment")).unwrap();
        file.write_all_at(&[7; 1000], 0).unwrap();
        fs.set_bytes(&dir.join("note.bin"), b"not ours");
        let mut quarantine = Quarantine::open(&fs, dir, 300).unwrap();
        let keep = |quarantine: &mut Quarantine, name, at, bytes| {
            quarantine.keep(&fs, &*file, name, at, bytes).unwrap()
        };
        let full = |quarantine: &Quarantine| -> Vec<String> {
            let copies = quarantine.copies.iter().filter(|(_, bytes)| **bytes > 0);
            copies.map(|(name, _)| format!("{} {}", name.file, name.at)).collect()
        };
        for name in ["1.log", "2.log", "3.log"] {
            assert!(keep(&mut quarantine, name, 0, 100));
        }
        assert_eq!((quarantine.bytes(), quarantine.removed()), (300, 0));
        assert!(keep(&mut quarantine, "4.log", 0, 150));
        assert_eq!(full(&quarantine), ["3.log 0", "4.log 0"]);
        assert_eq!((quarantine.bytes(), quarantine.removed(), quarantine.ranges()), (250, 2, 4));
        assert!(!keep(&mut quarantine, "1.log", 0, 100), "met again, and known");
        assert!(keep(&mut quarantine, "0.log", 0, 900), "the newest stays, whatever its name and size");
        assert_eq!(full(&quarantine), ["0.log 0"]);
        let mut reopened = Quarantine::open(&fs, dir, 300).unwrap();
        assert_eq!((reopened.bytes(), reopened.ranges(), reopened.removed()), (900, 5, 0));
        for name in ["1.log", "2.log", "3.log"] {
            assert!(!keep(&mut reopened, name, 0, 100), "nor is it copied at each start");
        }
        assert!(keep(&mut reopened, "5.log", 90, 200) && keep(&mut reopened, "5.log", 100, 200));
        assert_eq!(full(&reopened), ["5.log 100"], "by numbers, not by letters");
        assert_eq!(fs.files(dir).len(), 9, "what is not ours stays");
        let smaller = Quarantine::open(&fs, dir, 10).unwrap();
        assert_eq!((smaller.bytes(), smaller.removed()), (200, 0), "one stays");
    }
}
