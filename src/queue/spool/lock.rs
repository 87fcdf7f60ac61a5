//! Keeps a second process away from a log.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    thread,
    time::Duration,
};

use super::{
    error::SpoolError,
    fs::{RealFs, SpoolFs},
};
use crate::files::Lock;

/// Name of the file whose lock says that a relay is writing.
pub(super) const LOCK: &str = "spool.lock";

/// How often a lock that is held is tried again, and after which pause.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Keeps a second process away from a log, as long as it lives.
#[derive(Debug)]
pub(crate) struct SpoolLock(#[expect(dead_code, reason = "held for its lock")] File);

impl SpoolLock {
    /// Creates the directory if need be and locks it.
    pub(crate) fn acquire(dir: &Path) -> Result<Self, SpoolError> {
        RealFs.create_dir(dir).map_err(|source| SpoolError::at(dir, source))?;
        let path = dir.join(LOCK);
        let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = open.map_err(|source| SpoolError::at(&path, source))?;
        // A command that looks whether a relay is running holds it for a moment.
        for attempt in 0.. {
            match Lock::of(file.try_lock()).map_err(|source| SpoolError::at(&path, source))? {
                Lock::Ours => break,
                Lock::Theirs if attempt < LOCK_ATTEMPTS => thread::sleep(LOCK_PAUSE),
                Lock::Theirs => return Err(SpoolError::Busy(dir.display().to_string())),
                // Two that write would destroy each other's events.
                Lock::None(source) => {
                    return Err(SpoolError::NoLocks { dir: dir.display().to_string(), source });
                }
            }
        }
        Ok(Self(file))
    }
}
