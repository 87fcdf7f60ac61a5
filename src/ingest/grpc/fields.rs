//! What a request's fields mean, whichever way they are read.

use crate::{proto::v1::Durability, queue};

/// The time that a request gives, and the field in which it does.
pub(super) fn time_of_event(millis: i64, seconds: i64) -> Option<(&'static str, i64)> {
    match (millis, seconds) {
        (0, 0) => None,
        (0, seconds) => Some(("timestamp", seconds.saturating_mul(1000))),
        (millis, _) => Some(("timestamp_ms", millis)),
    }
}

/// The level that a request names: none, one, or a number that means nothing.
pub(super) fn asked_durability(number: i32) -> Result<Option<queue::Durability>, i32> {
    match Durability::try_from(number) {
        Ok(Durability::Unspecified) => Ok(None),
        Ok(Durability::Queued) => Ok(Some(queue::Durability::Queued)),
        Ok(Durability::Written) => Ok(Some(queue::Durability::Written)),
        Ok(Durability::Synced) => Ok(Some(queue::Durability::Synced)),
        Err(_) => Err(number),
    }
}
