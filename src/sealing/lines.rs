//! Files of lines that are sealed: spill files, dead letters, refused items.
//!
//! The first two lines are the file's [key blocks](super::seal), of 4096 bytes each. Each
//! other line is a JSON object of what may be read, with the [seal](super::seal) of the
//! rest behind it, in base64:
//!
//! ```text
//! {"dead_since_ms":1767225600000,"provider":"segment",…,"sealed":"AQAAAAAAAAAA…"}
//! ```
//!
//! All of the line before `,"sealed"` is authenticated with it, byte for byte. Counters
//! grow from line to line, so lines that somebody has swapped or put there twice are
//! refused; lines that were taken out are not missed.

use std::{
    fs::File,
    io::{self, BufReader, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};

use super::{
    BrokenSeal, FileKey, FileKind, KEY_BLOCK_BYTES, KeyBlocks, Keyring, Locked, Rewrap, RewrapError,
    SEAL_BYTES, Sealer, Sealing,
};
use crate::files;

/// Bytes of the two lines that are the key.
pub(crate) const KEY_LINES_BYTES: usize = 2 * KEY_BLOCK_BYTES;
/// Between what is readable and the seal; the end of the line.
const SEALED: &[u8] = br#","sealed":""#;
const END: &[u8] = b"\"}\n";

/// Bytes of a line, from those of a readable object and of what is hidden.
pub(crate) fn line_bytes(head: usize, secret: usize) -> usize {
    head - 1 + SEALED.len() + (secret + SEAL_BYTES).div_ceil(3) * 4 + END.len()
}

/// Appends a line; `head` is an object with at least one field.
pub(crate) fn seal_line(sealer: &mut Sealer, head: &[u8], secret: &[u8], out: &mut Vec<u8>) {
    let clear = head.strip_suffix(b"}").expect("it is an object");
    let mut sealed = Vec::with_capacity(secret.len() + SEAL_BYTES);
    sealer.seal(clear, secret, |_| false, &mut sealed);
    out.extend_from_slice(clear);
    out.extend_from_slice(SEALED);
    out.extend_from_slice(BASE64_STANDARD.encode(sealed).as_bytes());
    out.extend_from_slice(END);
}

/// What a line is that came out of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sealed {
    /// What was hidden.
    Open(Vec<u8>),
    /// The key is not there.
    Locked,
    Broken,
}

/// A file of lines that is read; sealed or not, as its name says.
#[derive(Debug)]
pub(crate) struct SealedLines {
    pub(crate) lines: BufReader<File>,
    /// The lines before the first one that is read: the file's key, if it is sealed.
    pub(crate) key_lines: Vec<u8>,
    /// None if it is not sealed.
    key: Option<Result<FileKey, Locked>>,
    last: Option<u64>,
}

impl SealedLines {
    pub(crate) fn open(path: &Path, kind: FileKind, sealing: &Sealing) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let (key_lines, key) = match files::is_sealed(path) {
            false => (Vec::new(), None),
            true => match read_blocks(&file)? {
                Some((bytes, blocks)) => (bytes, Some(sealing.open(&blocks, kind))),
                None => (Vec::new(), Some(Err(Locked::Damaged))),
            },
        };
        file.seek(SeekFrom::Start(key_lines.len() as u64))?;
        Ok(Self { lines: BufReader::new(file), key_lines, key, last: None })
    }

    /// Why a sealed line cannot be opened, if it cannot.
    pub(crate) fn locked(&self) -> Option<&Locked> {
        self.key.as_ref()?.as_ref().err()
    }

    /// What a line hides; `None` in a file that is not sealed. In one that is, a line in the
    /// clear is none that was written.
    pub(crate) fn unseal(&mut self, line: &[u8]) -> Option<Sealed> {
        let key = match self.key.as_ref()? {
            Ok(key) => key,
            Err(_) => return Some(Sealed::Locked),
        };
        let mut secret = Vec::new();
        let opened = split(line).and_then(|(clear, seal)| key.open(clear, &seal, &mut secret));
        Some(match opened {
            Ok(counter) if self.last.is_none_or(|last| counter > last) => {
                self.last = Some(counter);
                Sealed::Open(secret)
            }
            Ok(_) | Err(BrokenSeal) => Sealed::Broken,
        })
    }
}

/// What can be read of a line, and its seal.
fn split(line: &[u8]) -> Result<(&[u8], Vec<u8>), BrokenSeal> {
    let at = memchr::memmem::rfind(line, SEALED).ok_or(BrokenSeal)?;
    let seal = line[at + SEALED.len()..].strip_suffix(END).ok_or(BrokenSeal)?;
    Ok((&line[..at], BASE64_STANDARD.decode(seal).map_err(|_| BrokenSeal)?))
}

/// The key of a file of lines, with the bytes that it takes; `None` if it has none.
pub(crate) fn read_blocks(file: &File) -> io::Result<Option<(Vec<u8>, KeyBlocks)>> {
    let mut bytes = vec![0; KEY_LINES_BYTES];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(KeyBlocks::parse(&bytes, 0).map(|blocks| (bytes, blocks)))
}

/// The first of some files whose key is not there, and why.
pub(crate) fn first_locked(
    paths: Vec<PathBuf>,
    kind: FileKind,
    sealing: &Sealing,
) -> io::Result<Option<(PathBuf, Locked)>> {
    for path in paths.into_iter().filter(|path| files::is_sealed(path)) {
        let blocks = match File::open(&path).and_then(|file| read_blocks(&file)) {
            // Somebody has taken all letters out of it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            read => read?,
        };
        match blocks.map(|(_, blocks)| sealing.open(&blocks, kind)) {
            // What is damaged is told line by line.
            None | Some(Ok(_) | Err(Locked::Damaged | Locked::NoRandom(_))) => {}
            Some(Err(locked)) => return Ok(Some((path, locked))),
        }
    }
    Ok(None)
}

/// Seals the key of a file with the first key of the ring, in its place. It can be killed
/// anywhere; a relay may write to the file meanwhile, but nobody may replace it.
pub(crate) fn rewrap(file: &File, kind: FileKind, keyring: &Keyring) -> Result<Rewrap, RewrapError> {
    let Some((_, blocks)) = read_blocks(file)? else { return Ok(Rewrap::NotSealed) };
    let writes = blocks.rewrap(keyring, kind, 0)?;
    for (at, bytes) in &writes {
        file.write_all_at(bytes, *at)?;
        file.sync_data()?;
    }
    Ok(Rewrap::of(&writes))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::BufRead};

    use super::*;
    use crate::sealing::test_keys;

    const HEADS: [&[u8]; 3] = [br#"{"id":1}"#, br#"{"id":2}"#, br#"{"id":"\",\"sealed\":\""}"#];

    fn written(dir: &Path) -> (std::path::PathBuf, Vec<Vec<u8>>) {
        let (mut sealer, block) = test_keys("a").begin(FileKind::Spill).unwrap().unwrap();
        let mut lines = vec![block.encode_lines()];
        for (at, head) in HEADS.iter().enumerate() {
            let (mut line, secret) = (Vec::new(), vec![b'x'; at]);
            seal_line(&mut sealer, head, &secret, &mut line);
            assert_eq!(line.len(), line_bytes(head.len(), secret.len()));
            serde_json::from_slice::<serde_json::Value>(&line).expect("each line is JSON");
            lines.push(line);
        }
        let path = dir.join("f.sealed");
        fs::write(&path, lines.concat()).unwrap();
        (path, lines)
    }

    fn read(path: &Path, kids: &str) -> Vec<Option<Sealed>> {
        let mut file = SealedLines::open(path, FileKind::Spill, &test_keys(kids)).unwrap();
        let mut read = Vec::new();
        let mut line = Vec::new();
        while file.lines.read_until(b'\n', &mut line).unwrap() > 0 {
            read.push(file.unseal(&line));
            line.clear();
        }
        read
    }

    fn open(length: usize) -> Option<Sealed> {
        Some(Sealed::Open(vec![b'x'; length]))
    }

    #[test]
    fn lines_come_back_in_their_order_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (path, lines) = written(dir.path());
        assert_eq!(read(&path, "a"), [open(0), open(1), open(2)]);
        assert_eq!(read(&path, "b"), [Some(Sealed::Locked), Some(Sealed::Locked), Some(Sealed::Locked)]);
        let [key, one, two, three] = &lines[..] else { panic!() };
        let with = |lines: &[&Vec<u8>]| {
            let path = dir.path().join("changed.sealed");
            fs::write(&path, lines.iter().flat_map(|line| line.iter()).copied().collect::<Vec<u8>>())
                .unwrap();
            read(&path, "a")
        };
        assert_eq!(with(&[key, one, three]), [open(0), open(2)], "one was taken out");
        assert_eq!(with(&[key, two, one, three]), [open(1), Some(Sealed::Broken), open(2)]);
        assert_eq!(with(&[key, one, one, two]), [open(0), Some(Sealed::Broken), open(1)]);
        let plain = b"{\"id\":3}\n".to_vec();
        assert_eq!(with(&[key, &plain, two]), [Some(Sealed::Broken), open(1)], "nobody wrote that");
        assert_eq!(with(&[&plain, two]), [Some(Sealed::Locked), Some(Sealed::Locked)]);
        // What callers send may look like a key, or like a seal.
        let clear = dir.path().join("clear.ndjson");
        fs::write(&clear, lines.concat()).unwrap();
        assert_eq!(read(&clear, "a"), [None, None, None, None, None]);
        for bit in 0..(two.len() - 1) * 8 {
            let mut flipped = two.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let read = with(&[key, one, &flipped, three]);
            assert!((read.len() == 4 || read[1] == Some(Sealed::Broken)), "bit {bit}: {read:?}");
            assert_eq!((read.first(), read.last()), (Some(&open(0)), Some(&open(2))), "bit {bit}");
        }
    }

    #[test]
    fn a_rewrap_changes_the_key_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (path, lines) = written(dir.path());
        let both = test_keys("b,a");
        let rewrap = || {
            let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
            rewrap(&file, FileKind::Spill, both.keyring().unwrap())
        };
        assert_eq!(rewrap().unwrap(), Rewrap::Rewrapped);
        assert_eq!(rewrap().unwrap(), Rewrap::UpToDate);
        assert_eq!(fs::read(&path).unwrap()[KEY_LINES_BYTES..], lines[1..].concat());
        assert_eq!(read(&path, "b"), [open(0), open(1), open(2)]);
        assert_eq!(read(&path, "a"), [Some(Sealed::Locked), Some(Sealed::Locked), Some(Sealed::Locked)]);
        fs::write(&path, "{}\n").unwrap();
        assert_eq!(rewrap().unwrap(), Rewrap::NotSealed);
    }
}
