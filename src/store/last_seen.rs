//! What time it was when the clock could be believed last, over restarts. Events say it less
//! well: their times are their senders'.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::files;

/// The file: Unix milliseconds, as text.
#[derive(Debug, Clone)]
pub(super) struct LastSeen(PathBuf);

impl LastSeen {
    pub(super) fn new(data_dir: &Path) -> Self {
        Self(data_dir.join("store.seen"))
    }

    /// What was noted last, if anything that can be read.
    pub(super) fn read(&self) -> Option<i64> {
        fs::read_to_string(&self.0).ok()?.trim().parse().ok()
    }

    /// Notes a time that can be believed.
    pub(super) fn note(&self, now_ms: i64) -> io::Result<()> {
        files::replace(&self.0, now_ms.to_string().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_last_is_read_and_what_is_no_time_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let seen = LastSeen::new(dir.path());
        assert_eq!(seen.read(), None);
        seen.note(5).unwrap();
        seen.note(7).unwrap();
        assert_eq!(LastSeen::new(dir.path()).read(), Some(7));
        fs::write(dir.path().join("store.seen"), "soon").unwrap();
        assert_eq!(seen.read(), None);
    }
}
