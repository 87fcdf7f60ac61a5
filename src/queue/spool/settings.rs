//! What a log needs to know.

use std::{path::PathBuf, time::Duration};

use super::log::LogLimits;
use crate::queue::{Durability, QueueLimits};

/// What the log needs to know.
#[derive(Debug, Clone)]
pub(crate) struct SpoolSettings {
    pub(crate) dir: PathBuf,
    /// What a caller gets who asks for nothing.
    pub(crate) default_level: Durability,
    pub(crate) limits: LogLimits,
    /// Most bytes of each provider's share, in the order of the providers.
    pub(crate) provider_bytes_max: Vec<u64>,
    pub(crate) when_full: WhenFull,
    /// How long an event waits for a provider.
    pub(crate) retention: Duration,
    /// How long a group waits for callers that came with the last one.
    pub(crate) group_window: Duration,
    /// Bytes at which a group waits no more.
    pub(crate) group_bytes: usize,
    /// What may wait for the writer.
    pub(crate) intake: QueueLimits,
}

/// What happens when the log has used up its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// New events are refused.
    Reject,
    /// The slowest provider's oldest events become its dead letters.
    DeadLetterOldest,
}

impl WhenFull {
    /// Its name among the settings.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Reject => "reject",
            Self::DeadLetterOldest => "dead_letter_oldest",
        }
    }
}
