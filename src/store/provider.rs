//! The store as a provider: it is delivered to as any vendor is.

use std::{sync::Arc, time::Duration};

use analytics_relay_providers::{BatchLimits, Event, Provider, Rejection, SendError, Step, Verdict};
use analytics_relay_store::{Appended, Store, StoreError};
use async_trait::async_trait;
use prometheus_client::metrics::counter::Counter;
use tokio::time::timeout;

use super::status::StoreStatus;
use crate::reasons::STORE;

/// Larger batches are cheaper, up to about here. One at a time: there is one writer, and
/// identifies stay in order.
const LIMITS: BatchLimits = BatchLimits { events_max: 2_000, body_bytes_max: 8 << 20, requests_max: 1 };
/// A disk that hangs, or an upkeep that takes long. What was sent may be kept all the same:
/// it is known again when it comes again.
const APPEND_TIME_MAX: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct StoreProvider {
    pub(super) store: Arc<dyn Store>,
    pub(super) status: Arc<StoreStatus>,
    pub(super) duplicates: Counter,
}

#[async_trait]
impl Provider for StoreProvider {
    fn name(&self) -> &'static str {
        STORE
    }

    fn limits(&self) -> BatchLimits {
        LIMITS
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let appended = timeout(APPEND_TIME_MAX, self.store.append(batch)).await.unwrap_or_else(|_| {
            Err(StoreError::Unavailable(format!("it has not answered within {APPEND_TIME_MAX:?}")))
        });
        let appended = appended.map_err(send_error)?;
        let duplicates = appended.iter().filter(|appended| **appended == Appended::Duplicate).count();
        self.duplicates.inc_by(duplicates as u64);
        if let Some(newest_ms) = batch.iter().map(Event::accepted_ms).max() {
            self.status.keeps(newest_ms);
        }
        Ok(appended.into_iter().map(verdict).collect())
    }

    async fn probe(&self) -> Vec<Step> {
        vec![Step::unknown("store", "it is looked at without being opened")]
    }
}

fn verdict(appended: Appended) -> Verdict {
    match appended {
        Appended::New | Appended::Duplicate => Verdict::Delivered,
        Appended::Unstorable(detail) => Verdict::Rejected { reason: Rejection::Invalid, detail },
    }
}

/// Trouble with the store is no event's fault, unless it says so.
fn send_error(error: StoreError) -> SendError {
    let detail = error.to_string();
    match error {
        StoreError::Unavailable(_) | StoreError::Closed => {
            SendError::Unavailable { retry_after: None, detail }
        }
        StoreError::Unauthorized(_) => SendError::Unauthorized { detail },
        StoreError::Invalid { .. } | StoreError::Refused(_) => SendError::Refused { detail },
        StoreError::TooExpensive(_) => SendError::TooLarge { detail },
        // Whoever opens it next sets it aside; until then events wait, and none is to blame.
        StoreError::Damaged(_) => SendError::Misdirected { detail },
    }
}

#[cfg(test)]
mod tests {
    use analytics_relay_store::oracle::Oracle;
    use tokio::time::Instant;

    use super::*;
    use crate::{
        delivery::test_support::{accepted_at, track},
        query::tests::{Mood, Moody},
    };

    fn provider(store: Arc<dyn Store>) -> StoreProvider {
        StoreProvider { store, status: Arc::default(), duplicates: Counter::default() }
    }

    #[tokio::test]
    async fn what_is_there_already_is_delivered_and_counted() {
        let provider = provider(Arc::new(Oracle::new([7; 16])));
        let batch = [accepted_at(&track("a"), 5_000), accepted_at(&track("b"), 9_000)];
        assert_eq!(provider.send(&batch).await.unwrap(), [Verdict::Delivered, Verdict::Delivered]);
        assert_eq!(provider.duplicates.get(), 0);
        assert_eq!(provider.send(&batch[1..]).await.unwrap(), [Verdict::Delivered]);
        assert_eq!(provider.duplicates.get(), 1);
        assert_eq!(provider.status.lag_ms(true, None, 10_000), 1_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_hangs_is_waited_for_a_minute_and_is_sent_the_batch_again() {
        let (store, batch) = (Moody::new(0), [track("a")]);
        let provider = provider(store.clone());
        store.is(Mood::Hangs);
        let begun = Instant::now();
        let sent = timeout(2 * APPEND_TIME_MAX, provider.send(&batch)).await;
        let error = sent.expect("it is waited for without a bound").unwrap_err();
        assert!(matches!(&error, SendError::Unavailable { retry_after: None, .. }), "{error:?}");
        assert_eq!(begun.elapsed(), Duration::from_secs(60));
        store.is(Mood::Answers);
        assert_eq!(provider.send(&batch).await.unwrap(), [Verdict::Delivered]);
    }

    #[test]
    fn trouble_of_the_store_costs_no_event() {
        let unavailable = |error| matches!(send_error(error), SendError::Unavailable { .. });
        assert!(unavailable(StoreError::Unavailable("database or disk is full".into())));
        assert!(unavailable(StoreError::Closed));
        let damaged = send_error(StoreError::Damaged("malformed".into()));
        assert!(matches!(damaged, SendError::Misdirected { .. }), "it waits for a person: {damaged:?}");
        let invalid = StoreError::Invalid { field: "event", got: "x".into(), want: "y".into() };
        assert!(matches!(send_error(invalid), SendError::Refused { .. }), "the culprit is looked for");
        let refused = send_error(StoreError::Refused("SQLSTATE 22P05".into()));
        assert!(matches!(refused, SendError::Refused { .. }), "so it is of a server's: {refused:?}");
        let unauthorized = send_error(StoreError::Unauthorized("a wrong password".into()));
        assert!(matches!(unauthorized, SendError::Unauthorized { .. }), "a person is: {unauthorized:?}");
    }

    #[test]
    fn what_cannot_be_kept_is_rejected_with_its_reason() {
        let verdict = verdict(Appended::Unstorable("NUL in a text".into()));
        assert_eq!(verdict, Verdict::Rejected { reason: Rejection::Invalid, detail: "NUL in a text".into() });
    }
}
