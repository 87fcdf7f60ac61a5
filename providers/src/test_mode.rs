//! Test mode: shows what would be sent, and opens no socket.

use async_trait::async_trait;
use tracing::{debug, info};

use crate::{
    BatchLimits, Endpoint, Event, NotFor, Provider, SendError, Verdict,
    http::{Wire, merge, now_ms, without},
};

/// Stands in for a vendor: maps each batch as the vendor's file does, logs it
/// and calls it delivered.
pub struct TestMode<W> {
    wire: W,
}

impl<W: Wire> TestMode<W> {
    /// `wire` should hold `***` in place of its key: its bodies are logged.
    pub fn new(wire: W) -> Self {
        Self { wire }
    }
}

#[async_trait]
impl<W: Wire> Provider for TestMode<W> {
    fn name(&self) -> &'static str {
        self.wire.name()
    }

    fn limits(&self) -> BatchLimits {
        self.wire.limits()
    }

    fn endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
        self.wire.endpoint(event)
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let encoded = self.wire.encode(batch, now_ms());
        let sent = without(batch, &encoded.rejected).len();
        let provider = self.name();
        info!(provider, event_count = sent, "TEST MODE: would send batch");
        if sent > 0 {
            debug!(
                provider,
                path = encoded.path,
                body_bytes = encoded.body.len(),
                body = %String::from_utf8_lossy(&encoded.body),
                "TEST MODE: body of the batch"
            );
        }
        Ok(merge(batch.len(), vec![Verdict::Delivered; sent], encoded.rejected))
    }
}
