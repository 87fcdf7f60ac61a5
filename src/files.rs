//! Files that must survive the machine: private, synced, and their directory
//! synced too.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Once,
};

use rustix::io::Errno;
use tracing::warn;

/// Ending of files that hold one JSON value a line; and of those whose lines are sealed,
/// which older relays leave alone.
const PLAIN: &str = "ndjson";
const SEALED: &str = "sealed";

/// Creates a directory, with those above it, for us alone.
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Creates a file, for us alone. It must not exist.
pub(crate) fn create_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).read(true).create_new(true).mode(0o600).open(path)
}

/// Puts a file in the place of another, for us alone, durably: it is whole or not there.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = path.with_extension("unfinished");
    let _ = fs::remove_file(&unfinished);
    let mut file = create_file(&unfinished)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&unfinished, path)?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Makes what was created, renamed or removed in a directory survive, if the file
/// system can; one that cannot is told of once.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    static TOLD: Once = Once::new();
    match File::open(path)?.sync_all() {
        Err(error) if is_unsupported(&error) => {
            TOLD.call_once(|| {
                warn!(
                    dir = %path.display(),
                    %error,
                    "the file system cannot sync a directory: a power cut may take away files that were just \
                made, with the events in them, synced ones too"
                );
            });
            Ok(())
        }
        synced => synced,
    }
}

/// True if that is how a file system says that it has no such call. It is not how
/// a disk fails.
fn is_unsupported(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| [Errno::INVAL, Errno::NOTSUP, Errno::OPNOTSUPP, Errno::NOSYS].contains(&errno))
}

/// What came of asking for a lock.
#[derive(Debug)]
pub(crate) enum Lock {
    /// We have it.
    Ours,
    /// Somebody else has it.
    Theirs,
    /// The file system has no locks: nobody can have it.
    None(io::Error),
}

impl Lock {
    /// From what the system says.
    pub(crate) fn of(tried: Result<(), TryLockError>) -> io::Result<Self> {
        match tried {
            Ok(()) => Ok(Self::Ours),
            Err(TryLockError::WouldBlock) => Ok(Self::Theirs),
            Err(TryLockError::Error(error)) if has_no_locks(&error) => Ok(Self::None(error)),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// True if that is how a file system says that it has no locks: a network one
/// without its lock service, or one in user space.
pub(crate) fn has_no_locks(error: &io::Error) -> bool {
    is_unsupported(error) || Errno::from_io_error(error) == Some(Errno::NOLCK)
}

/// The files of lines in a directory, oldest first; none if there is no such
/// directory.
pub(crate) fn list_lines(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == PLAIN || ending == SEALED) {
            paths.push(path);
        }
    }
    // Names start with a time of fixed width.
    paths.sort();
    Ok(paths)
}

/// True for a file whose lines are sealed. Nothing in it can say so: what callers send stands
/// in files that are not.
pub(crate) fn is_sealed(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == SEALED)
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
pub(crate) fn new_lines(dir: &Path, now_ms: i64, is_sealed: bool) -> PathBuf {
    let name = |turn: u32| dir.join(format!("{now_ms:015}-{turn:04}.{PLAIN}"));
    // Copies are named by what stands before the ending.
    let is_free = |path: &PathBuf| !path.exists() && !path.with_extension(SEALED).exists();
    let path = (0..).map(name).find(is_free).expect("some name is free");
    if is_sealed { path.with_extension(SEALED) } else { path }
}

/// Keeps a second relay away from a data directory, as long as it lives. Where the
/// file system has no locks it cannot, and says so: two relays in one directory
/// would send each other's spilled events, which the providers know again by their
/// ids, and that is no reason not to start.
#[derive(Debug)]
pub(crate) struct DataDirLock(#[expect(dead_code, reason = "held for its lock")] File);

impl DataDirLock {
    /// Creates the directory if need be and locks it.
    pub(crate) fn acquire(data_dir: &Path) -> io::Result<Self> {
        create_dir(data_dir)?;
        let path = data_dir.join("relay.lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
        match Lock::of(file.try_lock())? {
            Lock::Ours => {}
            Lock::Theirs => {
                let message = format!("another relay is using {}", data_dir.display());
                return Err(io::Error::new(io::ErrorKind::WouldBlock, message));
            }
            Lock::None(error) => warn!(
                dir = %data_dir.display(),
                %error,
                "the file system of DATA_DIR has no locks (flock), so nothing keeps a second relay away: \
            give each relay a directory of its own"
            ),
        }
        Ok(Self(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_without_locks_is_told_from_one_that_fails() {
        let tried = |errno: Errno| Lock::of(Err(TryLockError::Error(errno.into())));
        for errno in [Errno::NOLCK, Errno::NOSYS, Errno::OPNOTSUPP, Errno::INVAL] {
            assert!(matches!(tried(errno), Ok(Lock::None(_))), "{errno}");
        }
        for errno in [Errno::IO, Errno::STALE, Errno::BADF, Errno::INTR] {
            assert!(tried(errno).is_err(), "{errno}");
        }
        assert!(matches!(Lock::of(Err(TryLockError::WouldBlock)), Ok(Lock::Theirs)));
    }

    #[test]
    fn only_a_sync_that_is_not_there_is_passed_over() {
        let is_passed_over = |errno: Errno| is_unsupported(&errno.into());
        assert!([Errno::INVAL, Errno::NOTSUP, Errno::NOSYS].into_iter().all(is_passed_over));
        assert!(
            ![Errno::IO, Errno::NOSPC, Errno::DQUOT, Errno::ROFS, Errno::NOENT]
                .into_iter()
                .any(is_passed_over)
        );
        assert!(sync_dir(Path::new("/nowhere")).is_err());
    }
}
