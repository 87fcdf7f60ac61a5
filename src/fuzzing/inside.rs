//! What is behind a door.

use std::sync::Arc;

use super::NOW_MS;
use crate::{
    admission::Admission,
    health::Health,
    queue::{
        Queue, QueueLimits,
        memory::{self, QueueReceiver},
    },
    shutdown::Stop,
    telemetry::Telemetry,
    time::Clock,
};

/// Admission, and a queue that the target empties.
pub(crate) struct Inside {
    pub(crate) telemetry: Telemetry,
    pub(crate) admission: Arc<Admission>,
    pub(crate) health: Arc<Health>,
    pub(crate) queue: QueueReceiver,
}

impl Inside {
    pub(crate) fn of(limits: QueueLimits) -> Self {
        let mut telemetry = Telemetry::new(NOW_MS);
        let (sender, queue) = memory::bounded(limits);
        let health = Arc::new(Health::new(Stop::default(), sender.clone(), Vec::new(), None));
        let accepted = telemetry.accepted();
        let clock = Clock::from_fn(|| NOW_MS);
        let admission = Admission::new(Queue::Memory(sender, accepted), clock, telemetry.admission());
        Self { telemetry, admission: Arc::new(admission), health, queue }
    }
}
