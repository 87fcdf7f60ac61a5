//! What batches have of their own: limits, and an answer for each item.

use tonic::Status;

use crate::{
    admission::{Accepted, Denied, RefusalReason, Violation},
    proto::v1::{
        Durability, EventAccepted, EventDeferred, EventRefused, EventViolation, TrackBatchAnswer,
        TrackBatchRequest, TrackBatchResponse, track_batch_answer::Answer,
    },
};

/// Most items of a batch.
const ITEMS_MAX: usize = 1000;

/// Refuses a batch with too many items, as a whole.
pub(super) fn check_size(request: &TrackBatchRequest) -> Result<(), Status> {
    if request.items.len() <= ITEMS_MAX {
        return Ok(());
    }
    let violation = Violation {
        reason: RefusalReason::BatchTooLarge,
        field: "items".into(),
        got: format!("{} items", request.items.len()),
        want: format!("at most {ITEMS_MAX}"),
    };
    Err(Denied::Invalid(vec![violation]).into())
}

/// The answers to a batch's items, in their order.
pub(super) fn batch_response(answers: Vec<Result<Accepted, Denied>>) -> TrackBatchResponse {
    let delays = answers.iter().filter_map(|answer| answer.as_ref().err()?.retry_delay());
    let retry_delay_ms = delays.max().map_or(0, millis);
    let answers = answers.into_iter().map(|answer| TrackBatchAnswer { answer: Some(item_answer(answer)) });
    TrackBatchResponse { answers: answers.collect(), retry_delay_ms }
}

fn item_answer(answer: Result<Accepted, Denied>) -> Answer {
    let denied = match answer {
        Ok(Accepted { event_id, durability }) => {
            return Answer::Accepted(EventAccepted {
                event_id: event_id.to_string(),
                durability: Durability::from(durability).into(),
            });
        }
        Err(denied) => denied,
    };
    match (denied.retry_delay(), denied) {
        (_, Denied::Invalid(violations)) => {
            Answer::Refused(EventRefused { violations: violations.iter().map(event_violation).collect() })
        }
        (delay, denied) => Answer::Deferred(EventDeferred {
            reason: denied.reason().name().to_owned(),
            retry_delay_ms: delay.map_or(0, millis),
        }),
    }
}

fn event_violation(violation: &Violation) -> EventViolation {
    EventViolation {
        reason: violation.reason.name().to_owned(),
        field: violation.field.clone(),
        description: format!("got {}, want {}", violation.got, violation.want),
    }
}

fn millis(delay: std::time::Duration) -> i64 {
    i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use analytics_relay_providers::EventId;

    use super::*;
    use crate::queue;

    #[test]
    fn each_item_has_its_answer_and_the_batch_the_longest_delay() {
        let violation = Violation {
            reason: RefusalReason::IdTooLong,
            field: "user_id".into(),
            got: "300 bytes".into(),
            want: "at most 255 bytes".into(),
        };
        let event_id = EventId::new("order-1").unwrap();
        let response = batch_response(vec![
            Ok(Accepted { event_id, durability: queue::Durability::Synced }),
            Err(Denied::Invalid(vec![violation])),
            Err(Denied::Full { retry_delay: Duration::from_millis(500) }),
            Err(Denied::SpoolFull { retry_delay: Duration::from_secs(5) }),
        ]);
        assert_eq!(response.retry_delay_ms, 5000);
        let answers: Vec<_> = response.answers.into_iter().map(|answer| answer.answer.unwrap()).collect();
        let durability = Durability::Synced.into();
        assert_eq!(answers[0], Answer::Accepted(EventAccepted { event_id: "order-1".into(), durability }));
        let Answer::Refused(refused) = &answers[1] else { panic!("{:?}", answers[1]) };
        assert_eq!(refused.violations[0].reason, "ID_TOO_LONG");
        assert_eq!(refused.violations[0].description, "got 300 bytes, want at most 255 bytes");
        let deferred = |reason: &str, retry_delay_ms| {
            Answer::Deferred(EventDeferred { reason: reason.into(), retry_delay_ms })
        };
        assert_eq!(answers[2..], [deferred("QUEUE_FULL", 500), deferred("SPOOL_FULL", 5000)]);
        assert_eq!(batch_response(Vec::new()), TrackBatchResponse::default());
    }
}
