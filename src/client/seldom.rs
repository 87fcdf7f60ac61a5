//! A warning that could be told for every event is told once in a while.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// The while.
const INTERVAL: Duration = Duration::from_secs(10);

/// Lets one warning of a kind through, and then counts the others for a while.
#[derive(Debug, Default)]
pub(super) struct Seldom(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    told_at: Option<Instant>,
    held_back: u64,
}

impl Seldom {
    /// How many were held back since the last one, if this one may be told.
    pub(super) fn may_tell(&self) -> Option<u64> {
        let now = Instant::now();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.told_at.is_some_and(|at| now.duration_since(at) < INTERVAL) {
            state.held_back += 1;
            return None;
        }
        state.told_at = Some(now);
        Some(std::mem::take(&mut state.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_in_a_while_is_told_and_the_others_are_counted() {
        let seldom = Seldom::default();
        let told: Vec<_> = (0..100).filter_map(|_| seldom.may_tell()).collect();
        assert_eq!(told, [0]);
        tokio::time::advance(INTERVAL).await;
        assert_eq!((seldom.may_tell(), seldom.may_tell()), (Some(99), None));
    }
}
