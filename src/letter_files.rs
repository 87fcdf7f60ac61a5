//! Files of letters: what could not go where it should, one JSON object a line, to be
//! read and sent again by a person.
//!
//! `<dir>/<time>-<turn>.ndjson`, mode 0600. A file is begun anew at each start and when
//! it has grown; what is written is synced before it counts as written. All files of a
//! directory together stay within a number of bytes.
//!
//! Who writes to a file, or takes letters out of it, locks it meanwhile. A relay does
//! not wait for that lock: it begins another file.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};
use tracing::warn;

use crate::{
    files::{self, Lock, has_no_locks},
    reasons::DropReason,
};

/// Bytes after which a new file is begun.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Ending of files that are not complete.
pub(crate) const UNFINISHED: &str = "unfinished";
/// How long letters are tried to be taken out of a file that is written to, and
/// how often.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_AGAIN: Duration = Duration::from_millis(5);
/// Between two log lines about a disk that takes no letters.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// Letters that are not on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotWritten {
    /// How many of the first are.
    pub(crate) written: usize,
    /// What the others are lost for, if they have to be.
    pub(crate) why: DropReason,
}

impl NotWritten {
    /// None of them is.
    pub(crate) const ANY: Self = Self { written: 0, why: DropReason::DeadLetterFailed };
}

/// Replaces a file by one without some of the letters in its first bytes, or removes
/// it; also beside a relay that writes to it. Returns those letters.
pub(crate) fn delete_from<L: DeserializeOwned>(
    path: &Path,
    seen_bytes: u64,
    mut is_meant: impl FnMut(&L) -> bool,
) -> io::Result<Vec<L>> {
    let _lock = lock_to_replace(path)?;
    let mut deleted = Vec::new();
    let (mut kept, mut read_bytes) = (Vec::new(), 0);
    read_letters(path, |line, letter| {
        read_bytes += line.len() as u64;
        match letter {
            Some(letter) if read_bytes <= seen_bytes && is_meant(&letter) => deleted.push(letter),
            _ => kept.extend_from_slice(line),
        }
    })?;
    if deleted.is_empty() {
        return Ok(deleted);
    }
    // What a deletion that was killed has left.
    let unfinished = path.with_extension(UNFINISHED);
    let _ = fs::remove_file(&unfinished);
    if kept.is_empty() {
        fs::remove_file(path)?;
    } else {
        let copy = files::create_file(&unfinished)?;
        let replaced = (&copy).write_all(&kept).and_then(|()| copy.sync_data());
        let replaced = replaced.and_then(|()| fs::rename(&unfinished, path));
        replaced.inspect_err(|_| {
            let _ = fs::remove_file(&unfinished);
        })?;
    }
    files::sync_dir(path.parent().unwrap_or(Path::new(".")))?;
    Ok(deleted)
}

/// Locks the file that is there now, which nobody then writes to or replaces.
fn lock_to_replace(path: &Path) -> io::Result<File> {
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        let file = File::open(path)?;
        match file.try_lock() {
            // Somebody may have replaced it while we waited.
            Ok(()) if file.metadata()?.nlink() > 0 => return Ok(file),
            Ok(()) => {}
            // A relay holds it for one write.
            Err(fs::TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(LOCK_AGAIN),
            Err(fs::TryLockError::WouldBlock) => {
                return Err(io::Error::new(io::ErrorKind::WouldBlock, "it is being written to"));
            }
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Removes copies that were not finished. For who keeps all others away that make such.
pub(crate) fn remove_unfinished(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == UNFINISHED) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Passes each line of a file on, and the letter that it is.
pub(crate) fn read_letters<L: DeserializeOwned>(
    path: &Path,
    mut each: impl FnMut(&[u8], Option<L>),
) -> io::Result<()> {
    let mut lines = BufReader::new(File::open(path)?);
    let mut line = Vec::new();
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        // A relay may be writing the last line just now; it is no letter yet.
        if line.ends_with(b"\n") {
            each(&line, serde_json::from_slice(&line).ok());
        }
    }
}

/// Locks a file to write to it; false if somebody is taking letters out of it, or
/// has done so and replaced it. Where there are no locks nobody takes any out.
fn is_still_ours(file: &File) -> io::Result<bool> {
    match Lock::of(file.try_lock_shared())? {
        Lock::Ours | Lock::None(_) => Ok(file.metadata()?.nlink() > 0),
        Lock::Theirs => Ok(false),
    }
}

/// Letters as they stand in a file.
struct Lines {
    bytes: Vec<u8>,
    /// Where each of them ends.
    ends: Vec<usize>,
}

impl Lines {
    fn of(letters: &[impl Serialize]) -> Self {
        let mut lines =
            Self { bytes: Vec::with_capacity(letters.len() * 512), ends: Vec::with_capacity(letters.len()) };
        for letter in letters {
            let start = lines.bytes.len();
            serde_json::to_writer(&mut lines.bytes, letter).expect("a vector takes any bytes");
            // What is kept as it came may have several lines: between tokens a blank says
            // the same.
            for byte in &mut lines.bytes[start..] {
                if matches!(byte, b'\n' | b'\r') {
                    *byte = b' ';
                }
            }
            lines.bytes.push(b'\n');
            lines.ends.push(lines.bytes.len());
        }
        lines
    }
}

/// Writes the letters of one directory.
#[derive(Debug)]
pub(crate) struct LetterWriter {
    dir: PathBuf,
    /// The file that is written to, and its length.
    file: Option<(File, u64)>,
    /// Its name.
    path: PathBuf,
    /// Bytes of all files together; shared with the metric.
    bytes: Arc<AtomicU64>,
    bytes_max: u64,
    /// When it was last said that they cannot be written.
    failure_told: Option<Instant>,
}

impl LetterWriter {
    /// Creates the directory if need be and measures what is in it.
    pub(crate) fn open(dir: impl AsRef<Path>, bytes_max: u64) -> io::Result<Self> {
        let dir = dir.as_ref().to_owned();
        files::create_dir(&dir)?;
        let mut bytes = 0;
        for path in files::list_ndjson(&dir)? {
            bytes += fs::metadata(path)?.len();
        }
        let bytes = Arc::new(AtomicU64::new(bytes));
        Ok(Self { dir, file: None, path: PathBuf::new(), bytes, bytes_max, failure_told: None })
    }

    /// Bytes of all files together.
    pub(crate) fn bytes(&self) -> Arc<AtomicU64> {
        self.bytes.clone()
    }

    /// Writes the first letters, as many as there is room for, and syncs them. On any
    /// other failure none of them is on disk.
    pub(crate) fn write(&mut self, letters: &[impl Serialize], now_ms: i64) -> Result<(), NotWritten> {
        let lines = Lines::of(letters);
        let written = self.fitting(&lines);
        if written > 0 {
            let first = &lines.bytes[..lines.ends[written - 1]];
            self.write_lines(first, now_ms).map_err(|why| NotWritten { written: 0, why })?;
        }
        if written < letters.len() {
            return Err(NotWritten { written, why: DropReason::DeadLettersFull });
        }
        Ok(())
    }

    /// How many of the first lines there is room for.
    fn fitting(&self, lines: &Lines) -> usize {
        let room = || self.bytes_max.saturating_sub(self.bytes.load(Ordering::Relaxed));
        if room() < lines.bytes.len() as u64 {
            self.measure();
        }
        let room = room();
        lines.ends.partition_point(|end| *end as u64 <= room)
    }

    fn write_lines(&mut self, lines: &[u8], now_ms: i64) -> Result<(), DropReason> {
        if let Err(error) = self.append(lines, now_ms) {
            let now = Instant::now();
            if self.failure_told.is_none_or(|told| now - told >= TELL_INTERVAL) {
                self.failure_told = Some(now);
                warn!(%error, dir = %self.dir.display(), "dead letters cannot be written");
            }
            return Err(DropReason::DeadLetterFailed);
        }
        self.failure_told = None;
        self.bytes.fetch_add(lines.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn append(&mut self, lines: &[u8], now_ms: i64) -> io::Result<()> {
        let (mut file, length) = match self.file.take() {
            Some((file, length)) if length < FILE_BYTES_MAX && is_still_ours(&file)? => (file, length),
            _ => (self.begin_file(now_ms)?, 0),
        };
        let written = file.write_all(lines).and_then(|()| file.sync_data());
        if let Err(error) = written {
            // What is half there must not be read as a letter. The file is left
            // for good: after a failed sync nobody knows what it holds.
            let _ = file.set_len(length);
            if length == 0 {
                // A full disk must not fill up with empty files.
                let _ = fs::remove_file(&self.path);
            }
            return Err(error);
        }
        file.unlock().or_else(|error| if has_no_locks(&error) { Ok(()) } else { Err(error) })?;
        self.file = Some((file, length + lines.len() as u64));
        Ok(())
    }

    fn begin_file(&mut self, now_ms: i64) -> io::Result<File> {
        loop {
            self.path = files::new_ndjson(&self.dir, now_ms);
            let file = files::create_file(&self.path)?;
            // A replay that came between the two may have removed it as empty.
            if is_still_ours(&file)? {
                files::sync_dir(&self.dir)?;
                return Ok(file);
            }
        }
    }

    /// A replay may have removed files since.
    fn measure(&self) {
        let paths = files::list_ndjson(&self.dir).unwrap_or_default();
        let bytes = paths.iter().filter_map(|path| fs::metadata(path).ok()).map(|data| data.len()).sum();
        self.bytes.store(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_of_several_lines_is_one_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let json = "{\n\"a\":\r\n[1,\n2]\n}";
        let letter = serde_json::value::RawValue::from_string(json.to_owned()).unwrap();
        LetterWriter::open(&dir, 1 << 20).unwrap().write(&[letter], 5).unwrap();
        let mut read: Vec<Option<serde_json::Value>> = Vec::new();
        let path = files::list_ndjson(dir.path()).unwrap().remove(0);
        read_letters(&path, |_, letter| read.push(letter)).unwrap();
        assert_eq!(read, [Some(serde_json::json!({"a": [1, 2]}))]);
    }

    #[test]
    fn a_failed_write_leaves_no_half_letter() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LetterWriter::open(&dir, 1 << 20).unwrap();
        writer.write(&["a"], 5).unwrap();
        // A file that cannot be written to any more.
        let path = files::list_ndjson(dir.path()).unwrap().remove(0);
        let length = fs::metadata(&path).unwrap().len();
        writer.file = Some((File::open(path).unwrap(), length));
        assert_eq!(writer.write(&["b"], 5), Err(NotWritten::ANY));
        writer.write(&["c"], 5).unwrap();
        let mut read: Vec<Option<String>> = Vec::new();
        for path in files::list_ndjson(dir.path()).unwrap() {
            read_letters(&path, |_, letter| read.push(letter)).unwrap();
        }
        assert_eq!(read, [Some("a".to_owned()), Some("c".to_owned())]);
    }
}
