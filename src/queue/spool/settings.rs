//! What the log is told.

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use analytics_relay_providers::registry::Vendor;

use super::log::{LogKeys, LogLimits};
use crate::{
    queue::{Durability, QueueLimits},
    settings::{Reader, name_for},
};

/// Bounds of the bytes of a log.
const BYTES_MAX: RangeInclusive<u64> = 131_072..=1 << 50;
const BYTES_MAX_SETTING: &str = "SPOOL_MAX_BYTES";

/// How the log of a durable relay works.
#[derive(Debug, Clone, PartialEq)]
pub struct SpoolConfig {
    /// What an OK means: `Queued` without a log, else what the log promises.
    pub durability: Durability,
    /// Where the log is, if there is one.
    pub dir: PathBuf,
    /// How large it and its files may be.
    pub limits: LogLimits,
    /// How long an event may wait for a provider before it becomes a dead
    /// letter.
    pub retention: Duration,
    /// What happens when it has used up its bytes.
    pub when_full: WhenFull,
    /// How long a group of events waits for callers that came with the last.
    pub group_window: Duration,
    /// Bytes at which a group waits no more.
    pub group_bytes: usize,
}

/// What the log needs to know.
#[derive(Debug, Clone)]
pub(crate) struct SpoolSettings {
    pub(crate) dir: PathBuf,
    /// What a caller gets who asks for nothing.
    pub(crate) default_level: Durability,
    pub(crate) limits: LogLimits,
    /// Whether it is sealed.
    pub(crate) keys: LogKeys,
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

impl SpoolConfig {
    /// Reads it; without a directory of its own it is in `data_dir`, and
    /// `bytes_max` was read as what holds for all providers.
    pub(crate) fn read(reader: &mut Reader, data_dir: &Path, bytes_max: u64) -> Self {
        let durability = Durability::read(reader);
        let dir = match reader.text("SPOOL_DIR").as_str() {
            "" => data_dir.join("spool"),
            dir => PathBuf::from(dir),
        };
        let segment_bytes = reader.number("SPOOL_SEGMENT_BYTES", 65_536..=1 << 30);
        check_shares(reader, segment_bytes);
        let hours: f64 = reader.number("SPOOL_RETENTION_HOURS", 0.0001..=87_600.0);
        let when_full = WhenFull::read(reader);
        let window_ms: f64 = reader.number("SPOOL_GROUP_WINDOW_MS", 0.0..=100.0);
        Self {
            durability,
            dir,
            limits: LogLimits { segment_bytes, bytes_max },
            retention: Duration::from_secs_f64(hours * 3600.0),
            when_full,
            group_window: Duration::from_secs_f64(window_ms / 1000.0),
            group_bytes: reader.number("SPOOL_GROUP_BYTES", 1..=64 << 20),
        }
    }
}

impl WhenFull {
    /// Its name among the settings.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Reject => "reject",
            Self::DeadLetterOldest => "dead_letter_oldest",
        }
    }

    fn read(reader: &mut Reader) -> Self {
        let choices = [Self::Reject, Self::DeadLetterOldest].map(|choice| (choice.name(), choice));
        reader.one_of("SPOOL_WHEN_FULL", &choices)
    }
}

/// Reads the most bytes of a provider's share of the log, or of all.
pub(crate) fn read_share(reader: &mut Reader, vendor: Option<Vendor>) -> u64 {
    reader.number(&name_for(vendor, BYTES_MAX_SETTING), BYTES_MAX)
}

/// A share must have room for a segment that is full and one that is written to.
fn check_shares(reader: &mut Reader, segment_bytes: u64) {
    for vendor in [None].into_iter().chain(Vendor::ALL.map(Some)) {
        let name = name_for(vendor, BYTES_MAX_SETTING);
        let (text, _) = reader.lookup(&name);
        // What is no number is told elsewhere.
        let bytes: Option<u64> = text.replace('_', "").parse().ok();
        if bytes.is_some_and(|bytes| bytes < 2 * segment_bytes) {
            reader.wrong(&name, &text, "at least twice SPOOL_SEGMENT_BYTES");
        }
    }
}
