//! Where the files of a log are, and the names of those that are not complete.

use std::path::{Path, PathBuf};

/// Ending of files that are not complete.
pub(crate) const UNFINISHED: &str = ".unfinished";

/// What is added to the name of a segment that everybody has passed and nobody could read.
pub(crate) const UNREADABLE: &str = ".unreadable";

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
    with_ending(path, UNFINISHED)
}

/// The name of a segment that is set aside.
pub(crate) fn unreadable(path: &Path) -> PathBuf {
    with_ending(path, UNREADABLE)
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}
