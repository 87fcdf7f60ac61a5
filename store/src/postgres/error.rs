//! What a server's errors are to who called.

use std::{error::Error as _, io};

use deadpool_postgres::{HookError, PoolError, TimeoutType};
use tokio_postgres::{Error, error::SqlState};

use crate::StoreError;

/// What is told where all connections are used.
pub(super) const NONE_FREE: &str = "no connection became free in time";

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        match error.code() {
            Some(code) => of_server(code, &error),
            None if is_refused_by_tls(&error) => Self::Unauthorized(of_chain(&error)),
            None => of_client(of_chain(&error)),
        }
    }
}

impl From<PoolError> for StoreError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => error.into(),
            PoolError::Timeout(TimeoutType::Wait) => Self::Unavailable(NONE_FREE.into()),
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
        "3D000" => StoreError::Unauthorized(format!("want a database that exists: {}", said())),
        code if code.starts_with("28") => {
            let want = "want a role that exists, may log in and is let in by pg_hba.conf";
            StoreError::Unauthorized(format!(
                "the server does not let in the user of the URL, {want} (SQLSTATE {code})"
            ))
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

/// Of what went wrong on this side, by its text, as nothing else tells it: what the settings
/// are the reason of stays so, the rest passes.
fn of_client(text: String) -> StoreError {
    let said = |got: &str, want: &str| StoreError::Unauthorized(format!("{got}, {want}"));
    match &*text {
        "invalid configuration: password missing" => {
            said("got no password", "want one in the URL: the server asks for it")
        }
        "error performing TLS handshake: server does not support TLS" => said(
            "got a server without TLS",
            "want one with it, as sslmode says, or sslmode=prefer or disable in the URL",
        ),
        "error performing TLS handshake: no hostname provided for TLS handshake" => {
            said("got a server without a name", "want the name of its host in the URL, as TLS needs it")
        }
        "authentication error: unsupported authentication method" => said(
            "got a way to log in that is not known",
            "want password, md5 or scram-sha-256 in pg_hba.conf",
        ),
        // As the way to log in that the URL wants: `channel_binding=require`.
        text if text.starts_with("invalid configuration: ") || text.starts_with("authentication error: ") => {
            StoreError::Unauthorized(text.to_owned())
        }
        _ => StoreError::Unavailable(text),
    }
}

fn of_chain(error: &Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
