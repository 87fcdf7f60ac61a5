//! Files that must survive the machine: private, synced, and their directory
//! synced too.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Ending of files that hold one JSON value a line.
const ENDING: &str = "ndjson";

/// Creates a directory, with those above it, for us alone.
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Creates a file, for us alone. It must not exist.
pub(crate) fn create_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).read(true).create_new(true).mode(0o600).open(path)
}

/// Makes what was created, renamed or removed in a directory survive.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The files of lines in a directory, oldest first; none if there is no such
/// directory.
pub(crate) fn list_ndjson(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == ENDING) {
            paths.push(path);
        }
    }
    // Names start with a time of fixed width.
    paths.sort();
    Ok(paths)
}

/// Names of the directories in a directory, sorted; none if it is not there.
pub(crate) fn list_dirs(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort();
    Ok(names)
}

/// A name for a new file: sorts by time and is never used twice by processes
/// that hold the lock of the data directory in turn.
pub(crate) fn new_ndjson(dir: &Path, now_ms: i64) -> PathBuf {
    let name = |turn: u32| dir.join(format!("{now_ms:015}-{turn:04}.{ENDING}"));
    (0..).map(name).find(|path| !path.exists()).expect("some name is free")
}

/// Keeps a second relay away from a data directory, as long as it lives.
#[derive(Debug)]
pub(crate) struct DataDirLock(#[expect(dead_code, reason = "held for its lock")] File);

impl DataDirLock {
    /// Creates the directory if need be and locks it.
    pub(crate) fn acquire(data_dir: &Path) -> io::Result<Self> {
        create_dir(data_dir)?;
        let path = data_dir.join("relay.lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(fs::TryLockError::WouldBlock) => {
                let message = format!("another relay is using {}", data_dir.display());
                Err(io::Error::new(io::ErrorKind::WouldBlock, message))
            }
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}
