//! Keeps what cannot be read: a damaged range is copied here before anything
//! else happens to it. All copies together stay within a number of bytes: the
//! oldest make room, but for the newest, which stays however large it is.
//!
//! `quarantine/<file>-<offset>-<bytes>-<CRC-32>.bin`. The name says what was
//! copied, so the same bytes are copied and counted once, however often they are
//! met, as long as it is kept or this process lives. Where the disk gives nothing
//! back, the copy has zeros.

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
    /// The copies, by their names: of segments the oldest come first. With their
    /// bytes; `None` for what had to make room.
    copies: BTreeMap<String, Option<u64>>,
}

impl Quarantine {
    /// Opens the directory, which is there.
    pub(crate) fn open(fs: &dyn SpoolFs, dir: &Path, bytes_max: u64) -> io::Result<Self> {
        let names = fs.list(dir)?.into_iter().filter(|name| name.ends_with(ENDING));
        let copies = names.map(|name| (bytes_of(&name), name)).map(|(bytes, name)| (name, Some(bytes)));
        Ok(Self { dir: dir.to_owned(), bytes_max, copies: copies.collect() })
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
        if self.copies.contains_key(&name) {
            return Ok(false);
        }
        let path = self.dir.join(&name);
        let new = unfinished(&path);
        let copy = fs.create(&new)?;
        each_part(file, at, bytes, |place, part| copy.write_all_at(part, place))?;
        copy.sync_data()?;
        fs.rename(&new, &path)?;
        fs.sync_dir(&self.dir)?;
        let bytes = bytes_of(&name);
        self.copies.insert(name.clone(), Some(bytes));
        self.make_room(fs, &name);
        Ok(true)
    }

    /// Removes the oldest copies, as far as there are too many.
    fn make_room(&mut self, fs: &dyn SpoolFs, newest: &str) {
        while self.bytes() > self.bytes_max {
            let mut copies = self.copies.iter_mut();
            let oldest = copies.find(|(name, bytes)| bytes.is_some_and(|bytes| bytes > 0) && *name != newest);
            let Some((name, bytes)) = oldest else { return };
            match fs.remove(&self.dir.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    warn!(copy = name, %error, "a copy in quarantine cannot be removed");
                    return;
                }
                Ok(()) | Err(_) => {}
            }
            error!(copy = name, bytes, "quarantine is full: its oldest copy is removed");
            *bytes = None;
        }
    }

    /// Damaged ranges so far.
    pub(crate) fn ranges(&self) -> u64 {
        self.copies.len() as u64
    }

    /// Copies that had to make room since the log was opened.
    pub(crate) fn removed(&self) -> u64 {
        self.copies.values().filter(|bytes| bytes.is_none()).count() as u64
    }

    /// Bytes of the copies that are there.
    pub(crate) fn bytes(&self) -> u64 {
        self.copies.values().flatten().sum()
    }
}

/// The bytes that a copy's name tells; none for a file that is no copy of ours.
fn bytes_of(name: &str) -> u64 {
    let told = name.strip_suffix(ENDING).and_then(|name| name.rsplit('-').nth(1));
    told.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
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
        let names = || -> Vec<String> {
            let files = fs.files(dir).into_iter();
            files.filter_map(|path| Some(path.file_name()?.to_str()?.split('-').next()?.to_owned())).collect()
        };
        for name in ["1.log", "2.log", "3.log"] {
            assert!(keep(&mut quarantine, name, 0, 100));
        }
        assert_eq!((quarantine.bytes(), quarantine.removed()), (300, 0));
        assert!(keep(&mut quarantine, "4.log", 0, 150));
        assert_eq!(names(), ["3.log", "4.log", "note.bin", "segment"]);
        assert_eq!((quarantine.bytes(), quarantine.removed(), quarantine.ranges()), (250, 2, 5));
        assert!(!keep(&mut quarantine, "1.log", 0, 100), "met again, and known");
        assert!(keep(&mut quarantine, "0.log", 0, 900), "the newest stays, whatever its name and size");
        assert_eq!(names(), ["0.log", "note.bin", "segment"]);
        let reopened = Quarantine::open(&fs, dir, 300).unwrap();
        assert_eq!((reopened.bytes(), reopened.removed()), (900, 0));
    }
}
