//! Why a log cannot be used.

use std::{io, path::Path};

use thiserror::Error;

use super::frame;
use crate::sealing::Locked;

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
    /// Nothing would keep a second relay from writing to it.
    #[error(
        "{dir} cannot be locked, and two relays would destroy one log: put it on a file system with locks \
(flock), such as a local disk or NFS 4, or set DURABILITY=memory"
    )]
    NoLocks {
        /// Where it is.
        dir: String,
        /// What the system says.
        source: io::Error,
    },
    /// It is newer than this program.
    #[error("{path}: got format version {version}, want at most {max}: a newer relay wrote it", max = frame::FORMAT_VERSION)]
    Newer {
        /// Which file.
        path: String,
        /// What it says.
        version: u16,
    },
    /// It is sealed, and the key is not there.
    #[error("{path}: {locked}")]
    Locked {
        /// Which file.
        path: String,
        /// Why it cannot be opened.
        locked: Locked,
    },
}

impl SpoolError {
    pub(super) fn at(path: &Path, source: io::Error) -> Self {
        Self::File { path: path.display().to_string(), source }
    }
}
