//! Files of letters: what could not go where it should, one JSON object a line, to be
//! read and sent again by a person.
//!
//! `<dir>/<time>-<turn>.ndjson`, mode 0600. A file is begun anew at each start and when
//! it has grown; what is written is synced before it counts as written. All files of a
//! directory together stay within a number of bytes.
//!
//! A file that is [sealed](crate::sealing::lines) ends in `.sealed`: of each letter its
//! [head](Letter::Head) can be read without the key, and so counted and deleted.
//!
//! Who writes to a file, or takes letters out of it, locks it meanwhile. A relay does
//! not wait for that lock: it begins another file.

use std::{
    fs::{self, File},
    io::{self, BufRead, Write},
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
    sealing::{
        FileKind, Locked, Sealer, Sealing,
        lines::{KEY_LINES_BYTES, Sealed, SealedLines, line_bytes, seal_line},
    },
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

/// What stands in a line.
pub(crate) trait Letter: Serialize + DeserializeOwned {
    const KIND: FileKind;
    /// What of it may be read by whoever reads the file.
    type Head: Serialize + DeserializeOwned;

    fn head(&self) -> Self::Head;
    /// The rest.
    fn secret(&self) -> Vec<u8>;
    /// The letter again; `None` if that is no rest of one.
    fn join(head: Self::Head, secret: &[u8]) -> Option<Self>;
}

/// A line of a file.
#[derive(Debug)]
pub(crate) enum Line<L: Letter> {
    Letter(L),
    /// It is sealed, and the key is not there.
    Locked(L::Head),
    /// It is sealed, and is not what was sealed.
    Broken(L::Head),
    /// It is none.
    Damaged,
}

impl<L: Letter> Line<L> {
    /// What needs no key.
    pub(crate) fn into_head(self) -> Option<L::Head> {
        match self {
            Self::Letter(letter) => Some(letter.head()),
            Self::Locked(head) | Self::Broken(head) => Some(head),
            Self::Damaged => None,
        }
    }
}

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
/// it; also beside a relay that writes to it. Returns those letters, as far as they can be
/// read without a key.
pub(crate) fn delete_from<L: Letter>(
    path: &Path,
    seen_bytes: u64,
    mut is_meant: impl FnMut(&L::Head) -> bool,
) -> io::Result<Vec<L::Head>> {
    let (mut deleted, mut read_bytes) = (Vec::new(), 0);
    delete_lines(path, &Sealing::default(), |line, letter: Line<L>| {
        read_bytes += line.len() as u64;
        match letter.into_head() {
            Some(head) if read_bytes <= seen_bytes && is_meant(&head) => {
                deleted.push(head);
                true
            }
            _ => false,
        }
    })?;
    Ok(deleted)
}

/// The same of lines, which are opened as far as there are keys. Returns how many there
/// were to delete.
pub(crate) fn delete_lines<L: Letter>(
    path: &Path,
    sealing: &Sealing,
    mut is_meant: impl FnMut(&[u8], Line<L>) -> bool,
) -> io::Result<usize> {
    let _lock = lock_to_replace(path)?;
    let (mut kept, mut deleted) = (Vec::new(), 0);
    let file = SealedLines::open(path, L::KIND, sealing)?;
    let key_lines = file.key_lines.clone();
    read_lines(file, |line, letter: Line<L>| match is_meant(line, letter) {
        true => deleted += 1,
        false => kept.extend_from_slice(line),
    })?;
    if deleted == 0 {
        return Ok(0);
    }
    // What a deletion that was killed has left.
    let unfinished = path.with_extension(UNFINISHED);
    let _ = fs::remove_file(&unfinished);
    if kept.is_empty() {
        fs::remove_file(path)?;
    } else {
        let mut copy = files::create_file(&unfinished)?;
        let replaced = copy.write_all(&key_lines).and_then(|()| copy.write_all(&kept));
        let replaced = replaced.and_then(|()| copy.sync_data()).and_then(|()| fs::rename(&unfinished, path));
        replaced.inspect_err(|_| {
            let _ = fs::remove_file(&unfinished);
        })?;
    }
    files::sync_dir(path.parent().unwrap_or(Path::new(".")))?;
    Ok(deleted)
}

/// Locks the file that is there now, which nobody then writes to or replaces.
pub(crate) fn lock_to_replace(path: &Path) -> io::Result<File> {
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

/// Passes each line of a file on, and the letter that it is. Says why those lines cannot be
/// opened that are [locked](Line::Locked), if there are any.
pub(crate) fn read_letters<L: Letter>(
    path: &Path,
    sealing: &Sealing,
    each: impl FnMut(&[u8], Line<L>),
) -> io::Result<Option<Locked>> {
    read_lines(SealedLines::open(path, L::KIND, sealing)?, each)
}

/// The same for who needs no more of a letter than its head, and has no key.
pub(crate) fn read_heads<L: Letter>(
    path: &Path,
    mut each: impl FnMut(&[u8], Option<L::Head>),
) -> io::Result<()> {
    read_letters(path, &Sealing::default(), |line, letter: Line<L>| each(line, letter.into_head()))
        .map(|_| ())
}

fn read_lines<L: Letter>(
    mut file: SealedLines,
    mut each: impl FnMut(&[u8], Line<L>),
) -> io::Result<Option<Locked>> {
    let mut line = Vec::new();
    let mut locked = false;
    loop {
        line.clear();
        if file.lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(file.locked().filter(|_| locked).cloned());
        }
        // A relay may be writing the last line just now; it is no letter yet.
        if line.ends_with(b"\n") {
            let letter = letter_of(&mut file, &line);
            locked |= matches!(letter, Line::Locked(_));
            each(&line, letter);
        }
    }
}

fn letter_of<L: Letter>(file: &mut SealedLines, line: &[u8]) -> Line<L> {
    let Some(sealed) = file.unseal(line) else {
        return serde_json::from_slice(line).map_or(Line::Damaged, Line::Letter);
    };
    let head = || serde_json::from_slice::<L::Head>(line).ok();
    match sealed {
        Sealed::Open(secret) => {
            head().and_then(|head| L::join(head, &secret)).map_or(Line::Damaged, Line::Letter)
        }
        Sealed::Locked => head().map_or(Line::Damaged, Line::Locked),
        Sealed::Broken => head().map_or(Line::Damaged, Line::Broken),
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
    kind: FileKind,
    /// In the clear: lines. Else heads and what is to be hidden, in turn.
    bytes: Vec<u8>,
    /// Where each head and each secret ends; empty in the clear.
    cuts: Vec<usize>,
    /// Where each of them ends, as it is written.
    ends: Vec<usize>,
}

impl Lines {
    fn of<L: Letter>(letters: &[L], is_sealed: bool) -> Self {
        let mut lines = Self {
            kind: L::KIND,
            bytes: Vec::with_capacity(letters.len() * 512),
            cuts: Vec::new(),
            ends: Vec::with_capacity(letters.len()),
        };
        let mut end = 0;
        for letter in letters {
            let start = lines.bytes.len();
            if is_sealed {
                lines.push_json(&letter.head());
                let head_end = lines.bytes.len();
                lines.bytes.extend_from_slice(&letter.secret());
                lines.cuts.extend([head_end, lines.bytes.len()]);
                end += line_bytes(head_end - start, lines.bytes.len() - head_end);
            } else {
                lines.push_json(letter);
                lines.bytes.push(b'\n');
                end = lines.bytes.len();
            }
            lines.ends.push(end);
        }
        lines
    }

    fn push_json(&mut self, value: &impl Serialize) {
        let start = self.bytes.len();
        serde_json::to_writer(&mut self.bytes, value).expect("a vector takes any bytes");
        // What is kept as it came may have several lines: between tokens a blank says
        // the same.
        for byte in &mut self.bytes[start..] {
            if matches!(byte, b'\n' | b'\r') {
                *byte = b' ';
            }
        }
    }

    /// Bytes of all of them, as they are written.
    fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or_default()
    }

    /// Appends the first lines, as they are written.
    fn encode(&self, count: usize, sealer: Option<&mut Sealer>, out: &mut Vec<u8>) {
        let Some(sealer) = sealer else { return out.extend_from_slice(&self.bytes[..self.ends[count - 1]]) };
        out.reserve(self.ends[count - 1]);
        let mut start = 0;
        for cuts in self.cuts[..2 * count].chunks_exact(2) {
            let [head_end, end] = [cuts[0], cuts[1]];
            seal_line(sealer, &self.bytes[start..head_end], &self.bytes[head_end..end], out);
            start = end;
        }
    }

    fn are_sealed(&self) -> bool {
        !self.cuts.is_empty()
    }
}

/// The file that is written to.
#[derive(Debug)]
struct Current {
    file: File,
    length: u64,
    /// With it, what stands before the first line and is not written yet.
    sealer: Option<Sealer>,
    key_lines: Vec<u8>,
}

/// Writes the letters of one directory.
#[derive(Debug)]
pub(crate) struct LetterWriter {
    dir: PathBuf,
    sealing: Sealing,
    file: Option<Current>,
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
        for path in files::list_lines(&dir)? {
            bytes += fs::metadata(path)?.len();
        }
        let bytes = Arc::new(AtomicU64::new(bytes));
        let (sealing, path) = (Sealing::default(), PathBuf::new());
        Ok(Self { dir, sealing, file: None, path, bytes, bytes_max, failure_told: None })
    }

    /// Seals what it writes, if that is to be.
    pub(crate) fn sealing(self, sealing: &Sealing) -> Self {
        Self { sealing: sealing.clone(), ..self }
    }

    /// Bytes of all files together.
    pub(crate) fn bytes(&self) -> Arc<AtomicU64> {
        self.bytes.clone()
    }

    /// Writes the first letters, as many as there is room for, and syncs them. On any
    /// other failure none of them is on disk.
    pub(crate) fn write(&mut self, letters: &[impl Letter], now_ms: i64) -> Result<(), NotWritten> {
        let lines = Lines::of(letters, self.sealing.seals());
        let written = self.fitting(&lines);
        if written > 0 {
            self.write_lines(&lines, written, now_ms).map_err(|why| NotWritten { written: 0, why })?;
        }
        if written < letters.len() {
            return Err(NotWritten { written, why: DropReason::DeadLettersFull });
        }
        Ok(())
    }

    /// How many of the first lines there is room for. They may need a new file, with a key.
    fn fitting(&self, lines: &Lines) -> usize {
        let key_bytes = if lines.are_sealed() { KEY_LINES_BYTES as u64 } else { 0 };
        let bytes_max = self.bytes_max.saturating_sub(key_bytes);
        let room = || bytes_max.saturating_sub(self.bytes.load(Ordering::Relaxed));
        if room() < lines.len() as u64 {
            self.measure();
        }
        let room = room();
        lines.ends.partition_point(|end| *end as u64 <= room)
    }

    fn write_lines(&mut self, lines: &Lines, count: usize, now_ms: i64) -> Result<(), DropReason> {
        match self.append(lines, count, now_ms) {
            Ok(written) => {
                self.failure_told = None;
                self.bytes.fetch_add(written, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                let now = Instant::now();
                if self.failure_told.is_none_or(|told| now - told >= TELL_INTERVAL) {
                    self.failure_told = Some(now);
                    warn!(%error, dir = %self.dir.display(), "dead letters cannot be written");
                }
                Err(DropReason::DeadLetterFailed)
            }
        }
    }

    /// Returns the bytes that were written.
    fn append(&mut self, lines: &Lines, count: usize, now_ms: i64) -> io::Result<u64> {
        let mut current = match self.file.take() {
            Some(current) if current.length < FILE_BYTES_MAX && is_still_ours(&current.file)? => current,
            _ => self.begin_file(lines.kind, now_ms)?,
        };
        let mut bytes = std::mem::take(&mut current.key_lines);
        lines.encode(count, current.sealer.as_mut(), &mut bytes);
        let Current { file, length, .. } = &mut current;
        let written = file.write_all(&bytes).and_then(|()| file.sync_data());
        if let Err(error) = written {
            // What is half there must not be read as a letter. The file is left
            // for good: after a failed sync nobody knows what it holds.
            let _ = file.set_len(*length);
            if *length == 0 {
                // A full disk must not fill up with empty files.
                let _ = fs::remove_file(&self.path);
            }
            return Err(error);
        }
        file.unlock().or_else(|error| if has_no_locks(&error) { Ok(()) } else { Err(error) })?;
        *length += bytes.len() as u64;
        self.file = Some(current);
        Ok(bytes.len() as u64)
    }

    fn begin_file(&mut self, kind: FileKind, now_ms: i64) -> io::Result<Current> {
        let (sealer, key_lines) = match self.sealing.begin(kind)? {
            Some((sealer, block)) => (Some(sealer), block.encode_lines()),
            None => (None, Vec::new()),
        };
        loop {
            self.path = files::new_lines(&self.dir, now_ms, sealer.is_some());
            let file = files::create_file(&self.path)?;
            // A replay that came between the two may have removed it as empty.
            if is_still_ours(&file)? {
                files::sync_dir(&self.dir)?;
                return Ok(Current { file, length: 0, sealer, key_lines });
            }
        }
    }

    /// A replay may have removed files since.
    fn measure(&self) {
        let paths = files::list_lines(&self.dir).unwrap_or_default();
        let bytes = paths.iter().filter_map(|path| fs::metadata(path).ok()).map(|data| data.len()).sum();
        self.bytes.store(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::value::RawValue;

    use super::*;
    use crate::sealing::test_keys;

    #[derive(Debug, Clone, Serialize, Deserialize)]
    struct Note {
        id: u32,
        text: Box<RawValue>,
    }

    #[derive(Debug, Serialize, Deserialize)]
    struct NoteHead {
        id: u32,
    }

    impl Letter for Note {
        const KIND: FileKind = FileKind::DeadLetters;
        type Head = NoteHead;

        fn head(&self) -> NoteHead {
            NoteHead { id: self.id }
        }

        fn secret(&self) -> Vec<u8> {
            self.text.get().into()
        }

        fn join(head: NoteHead, secret: &[u8]) -> Option<Self> {
            Some(Self { id: head.id, text: serde_json::from_slice(secret).ok()? })
        }
    }

    fn note(id: u32, json: &str) -> Note {
        Note { id, text: RawValue::from_string(json.to_owned()).unwrap() }
    }

    fn writer(dir: &Path, kids: Option<&str>, bytes_max: u64) -> LetterWriter {
        let sealing = kids.map(test_keys).unwrap_or_default();
        LetterWriter::open(dir, bytes_max).unwrap().sealing(&sealing)
    }

    fn read(dir: &Path, kids: &str) -> Vec<Line<Note>> {
        let mut read = Vec::new();
        for path in files::list_lines(dir).unwrap() {
            read_letters(&path, &test_keys(kids), |_, line| read.push(line)).unwrap();
        }
        read
    }

    fn texts(lines: &[Line<Note>]) -> Vec<String> {
        let text = |line: &Line<Note>| match line {
            Line::Letter(note) => note.text.get().split_whitespace().collect(),
            Line::Locked(head) => format!("locked {}", head.id),
            Line::Broken(head) => format!("broken {}", head.id),
            Line::Damaged => "damaged".to_owned(),
        };
        lines.iter().map(text).collect()
    }

    #[test]
    fn a_letter_of_several_lines_is_one_in_the_file() {
        for kids in [None, Some("a")] {
            let dir = tempfile::tempdir().unwrap();
            let letter = note(1, "{\n\"a\":\r\n[1,\n2]\n}");
            writer(dir.path(), kids, 1 << 20).write(&[letter], 5).unwrap();
            assert_eq!(texts(&read(dir.path(), "a")), [r#"{"a":[1,2]}"#]);
        }
    }

    #[test]
    fn a_failed_write_leaves_no_half_letter() {
        for kids in [None, Some("a")] {
            let dir = tempfile::tempdir().unwrap();
            let mut writer = writer(dir.path(), kids, 1 << 20);
            writer.write(&[note(1, "1")], 5).unwrap();
            // A file that cannot be written to any more.
            let path = files::list_lines(dir.path()).unwrap().remove(0);
            writer.file.as_mut().unwrap().file = File::open(path).unwrap();
            assert_eq!(writer.write(&[note(2, "2")], 5), Err(NotWritten::ANY));
            writer.write(&[note(3, "3")], 5).unwrap();
            assert_eq!(texts(&read(dir.path(), "a")), ["1", "3"]);
        }
    }

    /// A file in the clear, one of an old key and one of a new one; and each start begins
    /// another.
    #[test]
    fn sealed_letters_stand_beside_others_and_their_heads_need_no_key() {
        let dir = tempfile::tempdir().unwrap();
        for (id, kids) in [(1, None), (2, Some("a")), (3, Some("b,a")), (4, Some("b,a")), (5, Some("none,a"))]
        {
            let mut writer = writer(dir.path(), kids, 1 << 20);
            writer.write(&[note(id, "\"canary\"")], i64::from(id)).unwrap();
            writer.write(&[note(10 * id, "\"canary\"")], i64::from(id)).unwrap();
        }
        let paths = files::list_lines(dir.path()).unwrap();
        let endings: Vec<_> = paths.iter().map(|path| path.extension().unwrap().to_str().unwrap()).collect();
        assert_eq!(endings, ["ndjson", "sealed", "sealed", "sealed", "ndjson"]);
        for path in &paths[1..4] {
            let bytes = fs::read(path).unwrap();
            assert!(memchr::memmem::find(&bytes, b"canary").is_none());
            assert!(memchr::memmem::find(&bytes, br#"{"id":"#).is_some());
        }
        assert_eq!(texts(&read(dir.path(), "a,b")), ["\"canary\""; 10]);
        let without_b = texts(&read(dir.path(), "a"));
        assert_eq!(without_b[4..8], ["locked 3", "locked 30", "locked 4", "locked 40"]);
        let mut ids = Vec::new();
        for path in &paths {
            read_heads::<Note>(path, |_, head| ids.extend(head.map(|head| head.id))).unwrap();
        }
        assert_eq!(ids, [1, 10, 2, 20, 3, 30, 4, 40, 5, 50]);
        let locked = read_letters(&paths[2], &test_keys("c"), |_, _: Line<Note>| {}).unwrap();
        assert!(locked.unwrap().to_string().contains("\"b\""));
    }

    #[test]
    fn letters_are_taken_out_of_a_sealed_file_without_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(dir.path(), Some("a"), 1 << 20);
        let notes: Vec<Note> = (1..4).map(|id| note(id, "7")).collect();
        writer.write(&notes, 5).unwrap();
        let path = files::list_lines(dir.path()).unwrap().remove(0);
        let deleted = delete_from::<Note>(&path, u64::MAX, |head| head.id == 2).unwrap();
        assert_eq!(deleted.len(), 1);
        assert_eq!(texts(&read(dir.path(), "a")), ["7", "7"]);
        // The relay begins another file.
        writer.write(&[note(9, "9")], 5).unwrap();
        assert_eq!(texts(&read(dir.path(), "a")), ["7", "7", "9"]);
        assert_eq!(delete_from::<Note>(&path, u64::MAX, |_| true).unwrap().len(), 2);
        assert!(!path.exists());
    }

    #[test]
    fn a_torn_line_is_no_letter_and_what_somebody_changed_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let notes: Vec<Note> = (1..5).map(|id| note(id, "7")).collect();
        writer(dir.path(), Some("a"), 1 << 20).write(&notes, 5).unwrap();
        let path = files::list_lines(dir.path()).unwrap().remove(0);
        let text = String::from_utf8(fs::read(&path).unwrap()).unwrap();
        let changed = text.replace("{\"id\":2,", "{\"id\":6,").replace("{\"id\":3,", "{\"id\";3,");
        fs::write(&path, &changed[..changed.len() - 1]).unwrap();
        assert_eq!(texts(&read(dir.path(), "a")), ["7", "broken 6", "damaged"]);
    }

    #[test]
    fn the_bytes_of_a_directory_are_bounded_with_its_keys() {
        let one = line_bytes(r#"{"id":1}"#.len(), 1) as u64;
        let bytes_max = 2 * KEY_LINES_BYTES as u64 + 3 * one;
        let dir = tempfile::tempdir().unwrap();
        let notes: Vec<Note> = (1..6).map(|id| note(id, "7")).collect();
        let used = || -> u64 {
            files::list_lines(dir.path()).unwrap().iter().map(|path| fs::metadata(path).unwrap().len()).sum()
        };
        for written in [5, 0] {
            let mut writer = writer(dir.path(), Some("a"), bytes_max);
            let result = writer.write(&notes, 5);
            let full = NotWritten { written, why: DropReason::DeadLettersFull };
            assert_eq!(result, if written == 5 { Ok(()) } else { Err(full) });
            assert_eq!(writer.bytes().load(Ordering::Relaxed), used());
            assert!(used() <= bytes_max);
        }
        // Without room for a key nothing is written, and no file is begun.
        let dir = tempfile::tempdir().unwrap();
        let full = NotWritten { written: 0, why: DropReason::DeadLettersFull };
        assert_eq!(writer(dir.path(), Some("a"), 8000).write(&notes, 5), Err(full));
        assert_eq!(files::list_lines(dir.path()).unwrap().len(), 0);
    }
}
