//! What batches have of their own: limits, and an answer for each item.

use std::{borrow::Cow, ops::Range, time::Duration};

use bytes::{Buf, Bytes};
use prost::{
    DecodeError,
    encoding::{DecodeContext, WireType, check_wire_type, decode_key, decode_varint, skip_field},
};

use crate::{
    admission::{
        Accepted,
        denied::{Denied, Violation},
    },
    proto::v1::{
        Durability, EventAccepted, EventDeferred, EventRefused, EventViolation, TrackBatchAnswer,
        TrackBatchResponse, track_batch_answer::Answer,
    },
    reasons::RefusalReason,
};

/// Most items of a batch.
const ITEMS_MAX: usize = 1000;

/// The items of a `TrackBatchRequest`, as they stand in its message. They are decoded
/// one by one when they are admitted: a small message can stand for a great many
/// items, or items of many parts, and must not be many times as large in memory.
#[derive(Debug)]
pub(super) struct Items {
    message: Bytes,
    places: Vec<Range<usize>>,
}

impl Items {
    pub(super) fn of(message: Bytes) -> Result<Self, BadBatch> {
        const ITEMS_TAG: u32 = 1;
        let (mut places, mut count, mut rest) = (Vec::new(), 0, &message[..]);
        while rest.has_remaining() {
            let (tag, wire_type) = decode_key(&mut rest)?;
            if tag != ITEMS_TAG {
                skip_field(wire_type, tag, &mut rest, DecodeContext::default())?;
                continue;
            }
            check_wire_type(WireType::LengthDelimited, wire_type)?;
            let length = usize::try_from(decode_varint(&mut rest)?).unwrap_or(usize::MAX);
            let start = message.len() - rest.len();
            rest.split_off(..length).ok_or_else(|| {
                let rest = message.len() - start;
                BadBatch::Malformed(format!("an item of {length} bytes where {rest} are left"))
            })?;
            count += 1;
            if count <= ITEMS_MAX {
                places.push(start..start + length);
            }
        }
        if count <= ITEMS_MAX { Ok(Self { message, places }) } else { Err(BadBatch::TooLarge(count)) }
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Bytes of all of them.
    pub(super) fn bytes(&self) -> usize {
        self.places.iter().map(Range::len).sum()
    }

    /// The bytes of each.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.places.iter().map(|place| &self.message[place.clone()])
    }
}

/// Why nothing of a batch is taken.
#[derive(Debug)]
pub(super) enum BadBatch {
    /// It has so many items.
    TooLarge(usize),
    /// It is no message, because of this.
    Malformed(String),
}

impl From<DecodeError> for BadBatch {
    fn from(error: DecodeError) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// The denial of a batch with so many items.
pub(super) fn too_large(items: usize) -> Denied {
    Denied::Invalid(vec![Violation {
        reason: RefusalReason::BatchTooLarge,
        field: "items".into(),
        got: format!("{items} items"),
        want: format!("at most {ITEMS_MAX}"),
    }])
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
                event_id: Cow::from(event_id).into_owned(),
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

fn millis(delay: Duration) -> i64 {
    i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use analytics_relay_providers::EventId;
    use prost::Message;

    use super::*;
    use crate::{
        proto::v1::{TrackBatchItem, TrackBatchRequest, TrackEventRequest, track_batch_item::Item},
        queue,
    };

    fn split(bytes: &[u8]) -> Result<Items, BadBatch> {
        Items::of(Bytes::copy_from_slice(bytes))
    }

    #[test]
    fn a_batch_is_cut_into_its_items_whatever_else_is_in_it() {
        let item = |name: &str| TrackBatchItem {
            item: Some(Item::Track(TrackEventRequest { event_name: name.into(), ..Default::default() })),
        };
        let items = vec![item("a"), TrackBatchItem { item: None }, item("c")];
        let mut bytes = TrackBatchRequest { items: items.clone() }.encode_to_vec();
        // Fields of a newer client: a number and a text.
        bytes.extend_from_slice(&[0x10, 7, 0x1A, 2, b'x', b'y']);
        let cut = split(&bytes).unwrap();
        let decoded: Vec<_> = cut.iter().map(|item| TrackBatchItem::decode(item).unwrap()).collect();
        assert_eq!(decoded, items);
        assert_eq!(split(&[]).unwrap().len(), 0);
    }

    #[test]
    fn too_many_items_are_counted_and_not_kept() {
        assert_eq!(split(&[0x0A, 0].repeat(ITEMS_MAX)).unwrap().len(), ITEMS_MAX);
        let many = split(&[0x0A, 0].repeat(1 << 19));
        assert!(matches!(many, Err(BadBatch::TooLarge(524_288))), "{many:?}");
    }

    #[test]
    fn what_is_no_message_is_malformed() {
        for bytes in [&[0x0A][..], &[0x0A, 5, 1], &[0xFF; 11], &[0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F], &[0x0F]]
        {
            let items = split(bytes);
            assert!(matches!(items, Err(BadBatch::Malformed(_))), "{bytes:?} {items:?}");
        }
    }

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
