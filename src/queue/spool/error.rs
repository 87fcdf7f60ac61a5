//! Why a log cannot be used.

use std::{io, path::Path};

use thiserror::Error;

use super::frame;

/// Why a log cannot be used.
#[derive(Debug, Error)]
pub enum SpoolError {
    /// The file system says no.
    #[error("{path} cannot be used")]
    File {
        /// Which file or directory.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// Another process has it.
    #[error("another relay is using the spool {0}")]
    Busy(String),
    /// It is newer than this program.
    #[error("{path}: got format version {version}, want at most {max}: a newer relay wrote it", max = frame::FORMAT_VERSION)]
    Newer {
        /// Which file.
        path: String,
        /// What it says.
        version: u16,
    },
}

impl SpoolError {
    pub(super) fn at(path: &Path, source: io::Error) -> Self {
        Self::File { path: path.display().to_string(), source }
    }
}
