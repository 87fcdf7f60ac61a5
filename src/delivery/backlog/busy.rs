//! What stands before a user's other events.

use std::collections::{BTreeSet, HashMap};

use super::{Waiting, waiting::Arrival};

/// By user. Nothing of users whose events may all go.
#[derive(Debug, Default)]
pub(super) struct BusyUsers(HashMap<String, Busy>);

#[derive(Debug, Default)]
struct Busy {
    /// Events whose order is kept and that are held, accused or out.
    ordered: BTreeSet<Arrival>,
    /// Events that are held because the provider throttles the user.
    throttled: usize,
    /// Events that wait for those.
    blocked: Vec<Waiting>,
    /// None of them whose order is kept came before this.
    first_blocked: Option<Arrival>,
}

impl Busy {
    fn blocks(&self, waiting: &Waiting) -> bool {
        self.throttled > 0
            || waiting.is_ordered()
                && self.ordered.first().is_some_and(|first| *first < waiting.arrival)
    }

    /// Keeps an event that must wait.
    fn block(&mut self, waiting: Waiting) {
        if waiting.is_ordered() {
            self.first_blocked =
                Some(self.first_blocked.map_or(waiting.arrival, |it| it.min(waiting.arrival)));
        }
        self.blocked.push(waiting);
    }

    /// True if nothing that waits can go now: a user may have tens of thousands of
    /// events, and they are not to be looked through for each that ends.
    fn frees_nothing(&self) -> bool {
        let first = self.ordered.first();
        self.throttled > 0 || first.is_some_and(|first| self.first_blocked.is_some_and(|it| *first < it))
    }

    /// Takes out what waits no more.
    fn free(&mut self) -> Vec<Waiting> {
        let blocked = std::mem::take(&mut self.blocked);
        self.first_blocked = None;
        let mut freed = Vec::new();
        for waiting in blocked {
            if self.blocks(&waiting) {
                self.block(waiting);
            } else {
                freed.push(waiting);
            }
        }
        freed
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
        busy.block(waiting);
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
            busy.ordered.insert(waiting.arrival);
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
        if is_ordered {
            busy.ordered.remove(&waiting.arrival);
        }
        busy.throttled -= usize::from(throttled);
        // Where a throttle ends, events of any kind may wait.
        let is_stuck = busy.blocked.is_empty() || !throttled && busy.frees_nothing();
        let freed = if is_stuck { Vec::new() } else { busy.free() };
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

#[cfg(test)]
mod tests {
    use analytics_relay_providers::{Endpoint, event::Kind};

    use super::*;
    use crate::{
        delivery::{
            routes::Flow,
            test_support::identify,
        },
        queue::Place,
    };

    /// A user with tens of thousands of identifies: what waits is not looked through for
    /// each that ends, but when the first of them can go.
    #[test]
    fn what_waits_is_looked_through_only_when_some_of_it_can_go() {
        let flow = Flow { endpoint: Endpoint(0), kind: Kind::Identify };
        let waiting = |place| Waiting {
            event: identify("ann"),
            arrival: Arrival::new(place, flow),
            place: Place::MEMORY,
            history: None,
        };
        let mut users = BusyUsers::default();
        let out: Vec<Waiting> = (0..3).map(waiting).collect();
        out.iter().for_each(|waiting| users.mark(waiting));
        for place in 3..6 {
            assert!(users.blocks(&waiting(place)));
            users.block(waiting(place));
        }
        for ended in &out[..2] {
            assert!(users.0["ann"].frees_nothing());
            assert!(users.unmark(ended).is_empty());
        }
        let freed = users.unmark(&out[2]);
        assert_eq!(
            freed.iter().map(Waiting::arrival).collect::<Vec<_>>(),
            (3..6).map(|place| Arrival::new(place, flow)).collect::<Vec<_>>()
        );
        assert!(users.0.is_empty(), "nothing is kept of a user whose events may all go");
    }
}
