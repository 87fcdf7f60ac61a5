//! What others may see of a lane.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicUsize, Ordering};

use super::ProviderState;

/// What others may see of a lane.
#[derive(Debug)]
pub(crate) struct LaneStatus {
    pub(crate) provider: &'static str,
    pub(super) events: AtomicUsize,
    pub(super) bytes: AtomicUsize,
    pub(super) reloaded: AtomicUsize,
    /// 0 if there is none.
    pub(super) oldest_accepted_ms: AtomicI64,
    pub(super) state: AtomicU8,
    pub(super) dead_letters_fail: AtomicBool,
    pub(super) full: AtomicBool,
    pub(super) cannot_read: AtomicBool,
}

impl LaneStatus {
    pub(crate) fn new(provider: &'static str) -> Self {
        Self {
            provider,
            events: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            reloaded: AtomicUsize::new(0),
            oldest_accepted_ms: AtomicI64::new(0),
            state: AtomicU8::new(0),
            dead_letters_fail: AtomicBool::new(false),
            full: AtomicBool::new(false),
            cannot_read: AtomicBool::new(false),
        }
    }

    /// Events in the lane.
    pub(crate) fn events(&self) -> usize {
        self.events.load(Ordering::Relaxed)
    }

    /// Memory that they hold.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Those of them that are on disk too.
    pub(crate) fn reloaded(&self) -> usize {
        self.reloaded.load(Ordering::Relaxed)
    }

    /// When the oldest of them was accepted, in Unix milliseconds.
    pub(crate) fn oldest_accepted_ms(&self) -> Option<i64> {
        Some(self.oldest_accepted_ms.load(Ordering::Relaxed)).filter(|oldest_ms| *oldest_ms != 0)
    }

    /// True if the last dead letters could not be written.
    pub(crate) fn dead_letters_fail(&self) -> bool {
        self.dead_letters_fail.load(Ordering::Relaxed)
    }

    /// True if the lane has no room for new events.
    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// True while the log cannot be read.
    pub(crate) fn cannot_read(&self) -> bool {
        self.cannot_read.load(Ordering::Relaxed)
    }

    /// How the provider is doing.
    pub(crate) fn state(&self) -> ProviderState {
        ProviderState::from_index(self.state.load(Ordering::Relaxed))
    }
}
