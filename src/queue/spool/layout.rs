//! Where the files of a log are, and the names of those that are not complete.

use std::path::{Path, PathBuf};

/// Ending of files that are not complete.
pub(crate) const UNFINISHED: &str = ".unfinished";

/// The directories of a log.
#[derive(Debug, Clone)]
pub(crate) struct LogDirs {
    pub(crate) root: PathBuf,
    pub(crate) segments: PathBuf,
    pub(crate) cursors: PathBuf,
    pub(crate) quarantine: PathBuf,
}

impl LogDirs {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            segments: root.join("segments"),
            cursors: root.join("cursors"),
            quarantine: root.join("quarantine"),
        }
    }
}

/// The name under which a file is made before it is complete.
pub(crate) fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    PathBuf::from(name)
}
