//! What a server's errors are to who called.

use std::{error::Error as _, io};

use deadpool_postgres::{HookError, PoolError, TimeoutType};
use tokio_postgres::{Error, error::SqlState};

use crate::StoreError;

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        match error.code() {
            Some(code) => of_server(code, &error),
            None if is_refused_by_tls(&error) => Self::Unauthorized(of_chain(&error)),
            None => Self::Unavailable(of_chain(&error)),
        }
    }
}

impl From<PoolError> for StoreError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => error.into(),
            PoolError::Timeout(TimeoutType::Wait) => {
                Self::Unavailable("no connection became free in time".into())
            }
            PoolError::Timeout(_) => Self::Unavailable("the server did not answer in time".into()),
            PoolError::Closed => Self::Closed,
            error => Self::Unavailable(error.to_string()),
        }
    }
}

/// By the class of the code. Of data that were not taken nothing is told but the code: the
/// server's text has them.
fn of_server(code: &SqlState, error: &Error) -> StoreError {
    let said = || {
        let message = error.as_db_error().map_or("", |error| error.message());
        format!("{message} (SQLSTATE {})", code.code())
    };
    match code.code() {
        "25006" => StoreError::Unavailable("it only reads for now (SQLSTATE 25006)".into()),
        code if matches!(code.get(..2), Some("22" | "23" | "54")) => {
            StoreError::Refused(format!("SQLSTATE {code}"))
        }
        // The server's own words for these name the user, who is nobody's business.
        "28P01" => StoreError::Unauthorized("the user or the password is wrong (SQLSTATE 28P01)".into()),
        code if code.starts_with("28") => {
            StoreError::Unauthorized(format!("the user may not connect: see pg_hba.conf (SQLSTATE {code})"))
        }
        "53300" => StoreError::Unavailable("too many connections (SQLSTATE 53300)".into()),
        code if matches!(code.get(..2), Some("42" | "3D" | "3F")) => StoreError::Unauthorized(said()),
        code if code.starts_with("XX") => StoreError::Damaged(said()),
        _ => StoreError::Unavailable(said()),
    }
}

/// True if the same may succeed at once: somebody else was in the way.
pub(super) fn is_conflict(error: &StoreError) -> bool {
    matches!(error, StoreError::Unavailable(why) if why.ends_with("40001)") || why.ends_with("40P01)"))
}

/// A certificate that is not trusted stays so.
fn is_refused_by_tls(error: &Error) -> bool {
    let mut source = error.source();
    while let Some(one) = source {
        if let Some(io) = one.downcast_ref::<io::Error>() {
            return io.kind() == io::ErrorKind::InvalidData;
        }
        source = one.source();
    }
    false
}

fn of_chain(error: &Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
