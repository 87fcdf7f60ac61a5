//! A provider that gets of each event what today's rules leave for it.
//!
//! The rules are applied while it is sent to, to a copy: log, spill and dead letters hold
//! the event as it was accepted, and so what waits, or is replayed, obeys the rules that
//! hold then.

use std::sync::Arc;

use analytics_relay_providers::{
    BatchLimits, Endpoint, Event, NotFor, Provider, Rejection, SendError, Step, Verdict,
};
use async_trait::async_trait;
use tokio::task::spawn_blocking;

use super::{
    Privacy,
    apply::changed,
    rewrite::{KeyRules, Notes},
};

/// Batches of more are looked through off the asynchronous threads, as vendors encode
/// them.
const INLINE_BYTES_MAX: usize = 64 * 1024;

/// One that is told no more than it may know.
pub(super) struct Guarded {
    pub(super) inner: Arc<dyn Provider>,
    pub(super) privacy: Arc<Privacy>,
}

impl Guarded {
    fn rules(&self) -> Option<Arc<KeyRules>> {
        self.privacy.rules_of(self.inner.name())
    }
}

#[async_trait]
impl Provider for Guarded {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn limits(&self) -> BatchLimits {
        self.inner.limits()
    }

    /// Of what it will be told: a group of which no trait is left may be nothing to a vendor.
    fn endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
        let left = self.rules().and_then(|rules| left_of(event, &rules));
        self.inner.endpoint(left.as_ref().unwrap_or(event))
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let Some(rules) = self.rules() else { return self.inner.send(batch).await };
        let bytes: usize = batch.iter().map(Event::memory_bytes).sum();
        let left = if bytes <= INLINE_BYTES_MAX {
            left_of_batch(batch, &rules)
        } else {
            let batch = batch.to_vec();
            let looked = spawn_blocking(move || left_of_batch(&batch, &rules)).await;
            looked.map_err(|error| SendError::Unavailable {
                retry_after: None,
                detail: format!("a defect: the privacy rules could not be applied: {error}"),
            })?
        };
        match left {
            None => self.inner.send(batch).await,
            Some(left) => self.send_rest(&left).await,
        }
    }

    async fn probe(&self) -> Vec<Step> {
        self.inner.probe().await
    }
}

impl Guarded {
    /// Rules that came since the events were given to an endpoint may have left nothing of
    /// some.
    async fn send_rest(&self, left: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let is_something = |event: &&Event| self.inner.endpoint(event).is_ok();
        let rest: Vec<Event> = left.iter().filter(is_something).cloned().collect();
        if rest.len() == left.len() {
            return self.inner.send(left).await;
        }
        let mut verdicts =
            if rest.is_empty() { Vec::new() } else { self.inner.send(&rest).await? }.into_iter();
        let detail = "the privacy rules leave nothing of it for this provider";
        let nothing = || Verdict::Rejected { reason: Rejection::Invalid, detail: detail.to_owned() };
        let verdict = |event: &Event| if is_something(&event) { verdicts.next() } else { Some(nothing()) };
        Ok(left.iter().map_while(verdict).collect())
    }
}

/// The events as the rules leave them; nothing if they leave all as they are.
fn left_of_batch(batch: &[Event], rules: &KeyRules) -> Option<Vec<Event>> {
    let first = batch.iter().enumerate().find_map(|(at, event)| Some((at, left_of(event, rules)?)));
    let (at, changed) = first?;
    let mut left = batch[..at].to_vec();
    left.push(changed);
    left.extend(batch[at + 1..].iter().map(|event| left_of(event, rules).unwrap_or_else(|| event.clone())));
    Some(left)
}

fn left_of(event: &Event, rules: &KeyRules) -> Option<Event> {
    changed(&event.parts(), rules, None, &mut Notes::default())
}
