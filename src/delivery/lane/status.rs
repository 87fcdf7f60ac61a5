//! What others may see of a lane.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, AtomicUsize, Ordering},
};

use crate::delivery::{backlog::Load, gate::ProviderState};

/// What others may see of a lane.
#[derive(Debug)]
pub(crate) struct LaneStatus {
    pub(crate) provider: &'static str,
    events: AtomicUsize,
    bytes: AtomicUsize,
    reloaded: AtomicUsize,
    /// 0 if there is none.
    oldest_accepted_ms: AtomicI64,
    state: AtomicU8,
    /// The last trouble, in our words and the provider's.
    trouble: Mutex<String>,
    dead_letters_fail: AtomicBool,
    full: AtomicBool,
    cannot_read: AtomicBool,
    /// The generation of the list of erased users that nothing in the lane is against.
    keeps_to: AtomicU64,
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
            trouble: Mutex::default(),
            dead_letters_fail: AtomicBool::new(false),
            full: AtomicBool::new(false),
            cannot_read: AtomicBool::new(false),
            keeps_to: AtomicU64::new(0),
        }
    }

    pub(super) fn publish(
        &self,
        load: Load,
        reloaded: usize,
        oldest_accepted_ms: Option<i64>,
        state: ProviderState,
    ) {
        self.events.store(load.events, Ordering::Relaxed);
        self.bytes.store(load.bytes, Ordering::Relaxed);
        self.reloaded.store(reloaded, Ordering::Relaxed);
        self.oldest_accepted_ms.store(oldest_accepted_ms.unwrap_or(0), Ordering::Relaxed);
        self.state.store(state as u8, Ordering::Relaxed);
    }

    pub(super) fn tell_trouble(&self, trouble: &str) {
        let mut told = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if *told != trouble {
            trouble.clone_into(&mut told);
        }
    }

    pub(super) fn set_dead_letters_fail(&self, fail: bool) {
        self.dead_letters_fail.store(fail, Ordering::Relaxed);
    }

    pub(super) fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    pub(super) fn set_cannot_read(&self, cannot_read: bool) {
        self.cannot_read.store(cannot_read, Ordering::Relaxed);
    }

    pub(super) fn set_keeps_to(&self, generation: u64) {
        self.keeps_to.store(generation, Ordering::Release);
    }

    /// The newest list of erased users of whom the lane has nothing.
    pub(crate) fn keeps_to(&self) -> u64 {
        self.keeps_to.load(Ordering::Acquire)
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

    /// When the oldest event that the provider has not got was accepted, in Unix
    /// milliseconds: of those in the lane, and of those in the log that it has to
    /// read yet.
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

    /// What is the matter with the provider, in a few words, if something is.
    pub(crate) fn trouble(&self) -> Option<String> {
        match self.state() {
            ProviderState::Sending => None,
            ProviderState::Suspended => Some("is suspended by an operator".to_owned()),
            ProviderState::Failing | ProviderState::Refusing | ProviderState::Paused => {
                Some(self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone())
            }
        }
    }
}
