//! What stands before a user's other events.

use std::collections::HashMap;

use super::{Waiting, waiting::Arrival};

/// By user. Nothing of users whose events may all go.
#[derive(Debug, Default)]
pub(super) struct BusyUsers(HashMap<String, Busy>);

#[derive(Debug, Default)]
struct Busy {
    /// Events whose order is kept and that are held, accused or out.
    ordered: Vec<Arrival>,
    /// Events that are held because the provider throttles the user.
    throttled: usize,
    /// Events that wait for those.
    blocked: Vec<Waiting>,
}

impl Busy {
    fn blocks(&self, waiting: &Waiting) -> bool {
        self.throttled > 0
            || waiting.is_ordered() && self.ordered.iter().any(|before| *before < waiting.arrival)
    }

    fn is_idle(&self) -> bool {
        self.ordered.is_empty() && self.throttled == 0
    }
}

impl BusyUsers {
    /// True if an event must wait behind another one of its user.
    #[inline]
    pub(super) fn blocks(&self, waiting: &Waiting) -> bool {
        !self.0.is_empty() && self.busy(waiting).is_some_and(|busy| busy.blocks(waiting))
    }

    fn busy(&self, waiting: &Waiting) -> Option<&Busy> {
        waiting.busy_key().and_then(|user| self.0.get(user))
    }

    /// Keeps an event that must wait, until what it waits for has gone.
    pub(super) fn block(&mut self, waiting: Waiting) {
        let busy = self.0.entry(waiting.busy_key().unwrap_or_default().to_owned()).or_default();
        busy.blocked.push(waiting);
    }

    /// An event stands before others of its user from now on, if it is one that does.
    #[inline]
    pub(super) fn mark(&mut self, waiting: &Waiting) {
        if waiting.is_before_others() {
            self.mark_one(waiting);
        }
    }

    fn mark_one(&mut self, waiting: &Waiting) {
        let (is_ordered, throttled) = (waiting.is_ordered(), waiting.is_throttled());
        let Some(user) = waiting.busy_key() else { return };
        let busy = self.0.entry(user.to_owned()).or_default();
        if is_ordered {
            busy.ordered.push(waiting.arrival);
        }
        busy.throttled += usize::from(throttled);
    }

    /// It does not any more. Returns the events that waited for it.
    #[inline]
    #[must_use]
    pub(super) fn unmark(&mut self, waiting: &Waiting) -> Vec<Waiting> {
        if waiting.is_before_others() { self.unmark_one(waiting) } else { Vec::new() }
    }

    fn unmark_one(&mut self, waiting: &Waiting) -> Vec<Waiting> {
        let (is_ordered, throttled) = (waiting.is_ordered(), waiting.is_throttled());
        let user = waiting.busy_key();
        let Some((user, busy)) = user.and_then(|user| Some((user, self.0.get_mut(user)?))) else {
            return Vec::new();
        };
        if is_ordered && let Some(place) = busy.ordered.iter().position(|it| *it == waiting.arrival) {
            busy.ordered.swap_remove(place);
        }
        busy.throttled -= usize::from(throttled);
        let blocked = std::mem::take(&mut busy.blocked);
        let (blocked, freed) = blocked.into_iter().partition(|waiting| busy.blocks(waiting));
        busy.blocked = blocked;
        if busy.is_idle() {
            self.0.remove(user);
        }
        freed
    }

    /// Takes events that wait for others.
    pub(super) fn take_blocked(&mut self, is_taken: impl Fn(&Waiting) -> bool) -> Vec<Waiting> {
        let mut taken = Vec::new();
        for busy in self.0.values_mut() {
            taken.extend(busy.blocked.extract_if(.., |waiting| is_taken(waiting)));
        }
        taken
    }
}
