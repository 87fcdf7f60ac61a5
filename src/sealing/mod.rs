//! Files that nobody reads without the key: AES-256-GCM under the log, spill files, dead
//! letters and refused items.
//!
//! ```text
//! key-encrypting keys (KEK), each with a name: environment, file or command
//!   └ wraps ─► a data key (DEK) for each file that is opened for writing, in its key blocks
//!                └ HKDF(DEK, sort of file) ─► the key that seals its frames or lines
//! ```
//!
//! - **The nonce is a counter that never repeats under a key.** It stands in what it seals.
//!   Whoever opens a file to write makes a new DEK, and nobody writes on in a file that
//!   another process has begun; so it holds too when a torn end is cut and its numbers are
//!   given again.
//! - **What a scan, a cursor, a repair and `explain` need stays readable**: sequence
//!   numbers, times, event ids, providers, reasons. It is authenticated with what is
//!   sealed, so nobody moves a payload to another number. Checksums cover what is on the
//!   disk, so damage is told from a seal that is broken, with no key.
//! - **A file has its key twice**, in two blocks of 4096 bytes at its start, each by itself
//!   enough. So a disk that loses a block costs what it did before, and `rewrap` writes one
//!   after the other in place: it can be killed at any moment, beside a running relay.
//! - **A missing key is no damage.** A relay that lacks it does not start, and nothing is
//!   removed for it.
//!
//! Single values of what stays readable, as fields of the store, are sealed by [`values`].
//!
//! Tenants have room: their key will be the salt of the derivation, under another
//! [scheme](seal::SCHEME).

use std::{io, sync::Arc};

use thiserror::Error;

pub(crate) mod keyring;
pub(crate) mod lines;
pub(crate) mod seal;
pub(crate) mod settings;
pub(crate) mod values;

pub(crate) use self::{
    keyring::{Kek, Keyring, Locked},
    seal::{BrokenSeal, FileKey, FileKind, KEY_BLOCK_BYTES, KeyBlock, KeyBlocks, SEAL_BYTES, Sealer},
};

/// What became of a file whose key was to be sealed anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rewrap {
    NotSealed,
    /// It was already.
    UpToDate,
    Rewrapped,
}

impl Rewrap {
    pub(crate) fn of(writes: &[(u64, Vec<u8>)]) -> Self {
        if writes.is_empty() { Self::UpToDate } else { Self::Rewrapped }
    }
}

/// Why it was not. The file is as it was, or one of its two blocks is new.
#[derive(Debug, Error)]
pub(crate) enum RewrapError {
    #[error(transparent)]
    Locked(#[from] Locked),
    #[error(transparent)]
    File(#[from] io::Error),
}

/// Whether files are sealed, and by which keys: what each stage that keeps files is given.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sealing(Option<Arc<Keyring>>);

impl Sealing {
    pub(crate) fn new(keyring: Option<Keyring>) -> Self {
        Self(keyring.map(Arc::new))
    }

    /// True if what is written from now on is sealed.
    pub(crate) fn seals(&self) -> bool {
        self.0.as_ref().is_some_and(|keyring| keyring.writer().is_some())
    }

    /// What a new file needs: its sealer, and the key for its blocks. None if it is not
    /// to be sealed.
    pub(crate) fn begin(&self, kind: FileKind) -> io::Result<Option<(Sealer, KeyBlock)>> {
        match self.0.as_ref().and_then(|keyring| keyring.writer()) {
            Some(kek) => Sealer::begin(kek, kind).map(Some),
            None => Ok(None),
        }
    }

    /// The key of a file that was sealed before.
    pub(crate) fn open(&self, blocks: &KeyBlocks, kind: FileKind) -> Result<FileKey, Locked> {
        blocks.open(self.0.as_deref(), kind)
    }

    /// The keys themselves.
    pub(crate) fn keyring(&self) -> Option<&Keyring> {
        self.0.as_deref()
    }
}

/// Keys by their names, each of one byte: the first of its name.
#[cfg(any(test, fuzzing))]
pub(crate) fn test_keys(kids: &str) -> Sealing {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let entry = |kid: &str| match kid {
        "none" => kid.to_owned(),
        kid => format!("{kid}:{}", BASE64_STANDARD.encode([kid.as_bytes()[0]; 32])),
    };
    let text = kids.split(',').map(entry).collect::<Vec<_>>().join(",");
    Sealing::new(Some(Keyring::parse(&text).expect("they are well formed")))
}
