//! All that the spool asks of a file system. The seam at which tests lose
//! power, run out of space and get errors at the N-th call.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use crate::files;

/// A file system.
pub(crate) trait SpoolFs: fmt::Debug + Send + Sync {
    /// Creates a directory for us alone, with those above it; it may exist.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Names of the files in a directory, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Creates a file for us alone. An old one of that name is emptied.
    fn create(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>>;
    /// Opens a file to read and write.
    fn open(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>>;
    /// Opens a file to read.
    fn open_to_read(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>>;
    /// Gives a file another name; one that has it already is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes what was created, renamed or removed in a directory survive.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// An open file.
pub(crate) trait SpoolFile: fmt::Debug + Send + Sync {
    /// Reads at a place; fewer bytes than asked for, and none at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes at a place; perhaps fewer bytes than given.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Reserves room so that writing up to `length` needs no more.
    fn allocate(&self, length: u64) -> io::Result<()>;
    /// Cuts the file.
    fn set_len(&self, length: u64) -> io::Result<()>;
    /// Bytes of the file.
    fn len(&self) -> io::Result<u64>;
    /// Makes what was written survive.
    fn sync_data(&self) -> io::Result<()>;
}

impl dyn SpoolFile + '_ {
    /// Writes all bytes, or fails.
    pub(crate) fn write_all_at(&self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.write_at(bytes, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    bytes = &bytes[written..];
                    offset += written as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads as `read_full_at`, but what the disk does not give back becomes
    /// zeros. Also returns where the last of it ends.
    pub(crate) fn read_around(&self, buffer: &mut [u8], offset: u64) -> io::Result<(usize, Option<u64>)> {
        const BLOCK_BYTES: usize = 4096;
        if let Ok(read) = self.read_full_at(buffer, offset) {
            return Ok((read, None));
        }
        let length = self.len()?.saturating_sub(offset);
        let length = buffer.len().min(usize::try_from(length).unwrap_or(usize::MAX));
        let mut unreadable_until = None;
        for (number, block) in buffer[..length].chunks_mut(BLOCK_BYTES).enumerate() {
            let at = offset + (number * BLOCK_BYTES) as u64;
            if self.read_full_at(block, at).is_err() {
                block.fill(0);
                unreadable_until = Some(at + block.len() as u64);
            }
        }
        Ok((length, unreadable_until))
    }

    /// Reads until the buffer is full or the file ends; returns the bytes read.
    pub(crate) fn read_full_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }
}

/// The machine's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RealFs;

impl SpoolFs for RealFs {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let is_new = |dir: &&Path| !dir.as_os_str().is_empty() && !dir.exists();
        let new: Vec<&Path> = path.ancestors().take_while(is_new).collect();
        files::create_dir(path)?;
        // What is new must be known in the directory above it.
        for dir in new {
            let above = dir.parent().filter(|above| !above.as_os_str().is_empty());
            files::sync_dir(above.unwrap_or(Path::new(".")))?;
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.extend(entry.file_name().into_string());
            }
        }
        names.sort();
        Ok(names)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        Ok(Box::new(options.open(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>> {
        Ok(Box::new(OpenOptions::new().read(true).write(true).open(path)?))
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>> {
        Ok(Box::new(File::open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let file = File::open(path).ok();
        fs::remove_file(path)?;
        file.into_iter().for_each(free);
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        files::sync_dir(dir)
    }
}

/// Lets go of a file that has no name any more. To free a segment's blocks takes
/// tens of milliseconds, which callers would wait for with the log's thread.
///
/// One at a time, so that a log which lets go of many does not hold their room, and
/// descriptors, for long.
fn free(file: File) {
    const LARGE_BYTES: u64 = 1024 * 1024;
    static IS_FREEING: AtomicBool = AtomicBool::new(false);
    let is_large = file.metadata().is_ok_and(|file| file.len() >= LARGE_BYTES);
    if !is_large || IS_FREEING.swap(true, Ordering::AcqRel) {
        return;
    }
    let freeing = move || {
        drop(file);
        IS_FREEING.store(false, Ordering::Release);
    };
    if thread::Builder::new().name("spool-free".to_owned()).spawn(freeing).is_err() {
        // Without a thread it has been freed here.
        IS_FREEING.store(false, Ordering::Release);
    }
}

impl SpoolFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        loop {
            match fallocate(self, FallocateFlags::empty(), 0, length) {
                // A file system that cannot reserve: writing may run out of
                // space, which is dealt with.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return File::set_len(self, length),
                Err(Errno::INTR) => {}
                reserved => return Ok(reserved?),
            }
        }
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        File::set_len(self, length)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }
}
