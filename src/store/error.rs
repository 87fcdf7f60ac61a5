//! Why the store is not open.

use thiserror::Error;

/// Why the store is not open, named for what the relay does about it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OpenError {
    /// It will not be open by itself: the relay does not start.
    #[error("STORE_URL: {0}")]
    Wrong(String),
    /// The disk is full or fails, or the server is not there: the relay starts, what the store
    /// is to get waits, and it is tried again.
    #[error("the store cannot be opened now: {0}")]
    NotNow(String),
}

impl OpenError {
    pub(super) fn why(&self) -> &str {
        let (Self::Wrong(why) | Self::NotNow(why)) = self;
        why
    }
}
