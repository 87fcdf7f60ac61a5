//! One event that a provider has not got.

use analytics_relay_providers::{Endpoint, Event, event::Kind};

use crate::{
    delivery::{doubt::Charges, routes::Flow},
    queue::Place,
};

/// One event that a provider has not got.
#[derive(Debug, Clone)]
pub(crate) struct Waiting {
    pub(crate) event: Event,
    pub(super) arrival: Arrival,
    /// Where it is kept meanwhile.
    pub(crate) place: Place,
    /// Nothing for nearly all: a lane whose provider hangs holds little else than
    /// events.
    pub(super) history: Option<Box<History>>,
}

/// An event's place in the order of arrival in its lane, and its flow: one number,
/// because every event that waits has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Arrival(u64);

impl Arrival {
    /// The last of all.
    pub(super) const LAST: Self = Self(u64::MAX);

    /// Of the event with that place in the order: of more than will ever come.
    pub(super) fn new(place: u64, flow: Flow) -> Self {
        Self(place << 16 | u64::from(u16::from_le_bytes([flow.endpoint.0, flow.kind.index()])))
    }

    fn flow(self) -> Flow {
        let [endpoint, kind, ..] = self.0.to_le_bytes();
        Flow { endpoint: Endpoint(endpoint), kind: Kind::from_index(kind).unwrap_or(Kind::Unknown) }
    }
}

/// What has happened to an event so far.
#[derive(Debug, Clone)]
pub(crate) struct History {
    /// Attempts that failed.
    pub(crate) attempts: u32,
    /// Most events that it may be sent together with, itself included.
    pub(crate) together_max: usize,
    /// Requests that had delivered something when its delivery cycle began.
    pub(crate) deliveries_before: u64,
    /// What stands against it.
    pub(crate) charges: Charges,
    /// The provider throttles its user.
    pub(super) throttled: bool,
}

impl Default for History {
    fn default() -> Self {
        Self {
            attempts: 0,
            together_max: usize::MAX,
            deliveries_before: 0,
            charges: Charges::default(),
            throttled: false,
        }
    }
}

impl Waiting {
    /// Attempts that failed.
    pub(crate) fn attempts(&self) -> u32 {
        self.history.as_ref().map_or(0, |history| history.attempts)
    }

    /// Most events that it may be sent together with, itself included.
    pub(crate) fn together_max(&self) -> usize {
        self.history.as_ref().map_or(usize::MAX, |history| history.together_max)
    }

    /// What stands against it, if something does.
    pub(crate) fn charges(&self) -> Option<&Charges> {
        self.history.as_ref().map(|history| &history.charges)
    }

    pub(crate) fn history_mut(&mut self) -> &mut History {
        self.history.get_or_insert_default()
    }

    /// True for one that is sent alone, because it may be to blame for a refusal.
    pub(crate) fn is_suspect(&self) -> bool {
        self.charges().is_some_and(|charges| charges.accusations() > 0)
    }

    pub(crate) fn arrival(&self) -> Arrival {
        self.arrival
    }

    pub(crate) fn flow(&self) -> Flow {
        self.arrival.flow()
    }

    /// True for one whose order is kept: see [`Event::order_key`].
    #[inline]
    pub(super) fn is_ordered(&self) -> bool {
        matches!(self.flow().kind, Kind::Identify | Kind::Alias | Kind::Group)
    }

    /// True for one that others of its key must not overtake while it is out.
    pub(super) fn is_before_others(&self) -> bool {
        self.is_ordered() || self.is_throttled()
    }

    /// Whom it may have to wait for, or who for it: a group, else a user.
    pub(super) fn busy_key(&self) -> Option<&str> {
        self.event.order_key().or_else(|| self.event.subject())
    }

    pub(super) fn is_throttled(&self) -> bool {
        self.history.as_ref().is_some_and(|history| history.throttled)
    }

    pub(super) fn throttles_no_more(&mut self) {
        if let Some(history) = &mut self.history {
            history.throttled = false;
        }
    }
}

/// Sorts events by their arrival.
pub(crate) fn in_order(events: &mut [Waiting]) {
    events.sort_unstable_by_key(|waiting| waiting.arrival);
}
