//! Keeps what cannot be read: a damaged range is copied here before anything
//! else happens to it, and is never removed by the relay.
//!
//! `quarantine/<file>-<offset>-<bytes>-<CRC-32>.bin`. The name says what was
//! copied, so the same bytes are copied and counted once, however often they are
//! met. Where the disk gives nothing back, the copy has zeros.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

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
    names: BTreeSet<String>,
}

impl Quarantine {
    /// Opens the directory, which is there.
    pub(crate) fn open(fs: &dyn SpoolFs, dir: &Path) -> io::Result<Self> {
        let mut names: BTreeSet<String> = fs.list(dir)?.into_iter().collect();
        names.retain(|name| name.ends_with(ENDING));
        Ok(Self { dir: dir.to_owned(), names })
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
        if self.names.contains(&name) {
            return Ok(false);
        }
        let path = self.dir.join(&name);
        let new = unfinished(&path);
        let copy = fs.create(&new)?;
        each_part(file, at, bytes, |place, part| copy.write_all_at(part, place))?;
        copy.sync_data()?;
        fs.rename(&new, &path)?;
        fs.sync_dir(&self.dir)?;
        self.names.insert(name);
        Ok(true)
    }

    /// Damaged ranges so far.
    pub(crate) fn ranges(&self) -> u64 {
        self.names.len() as u64
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
