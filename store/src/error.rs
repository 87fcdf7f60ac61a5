//! Why a store did not do what it was asked, named for the caller's next move.

/// An error of a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The disk is full, busy or failing, or the store is behind: send it again later.
    /// Nothing of the call was kept, or all of it, which sending it again finds out.
    #[error("the store is not available: {0}")]
    Unavailable(String),
    /// The question is malformed or asks for more than may be asked: change it.
    #[error("{field}: got {got}, want {want}")]
    Invalid {
        /// What is wrong in it.
        field: &'static str,
        /// What came.
        got: String,
        /// What is allowed.
        want: String,
    },
    /// The answer would take more memory or time than a question may: ask for less.
    #[error("the question is too expensive: {0}")]
    TooExpensive(String),
    /// What is stored cannot be read: a person is needed.
    #[error("the store is damaged: {0}")]
    Damaged(String),
    /// The server does not let it in, or does not let it do what it must: a person is needed.
    #[error("the store's server refuses: {0}")]
    Unauthorized(String),
    /// The server does not take this, and never will: of a batch some event is the reason.
    #[error("the store does not take it: {0}")]
    Refused(String),
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// A part of a question that breaks a rule.
    pub(crate) fn invalid(field: &'static str, got: impl ToString, want: impl Into<String>) -> Self {
        Self::Invalid { field, got: got.to_string(), want: want.into() }
    }
}

/// Does it once more if it finds damage. SQLite says so too when the disk could not read for
/// a moment; what is damaged is so at the second look.
pub(crate) fn at_second_look<T>(mut look: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
    match look() {
        Err(StoreError::Damaged(_)) => look(),
        found => found,
    }
}
