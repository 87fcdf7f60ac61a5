//! Where an event of a lane goes. What may be taken or refused on its own is a flow;
//! what shares a route shares requests, a queue and a gate.

use analytics_relay_providers::{Endpoint, Event, event::Kind};

/// The events of a kind that go to an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Flow {
    pub(crate) endpoint: Endpoint,
    pub(crate) kind: Kind,
}

impl Flow {
    /// Of an event that goes to that endpoint.
    pub(crate) fn of(event: &Event, endpoint: Endpoint) -> Self {
        Self { endpoint, kind: event.kind_alone() }
    }

    /// The way that a flow goes which is kept apart.
    pub(crate) fn apart(self) -> Route {
        Route { endpoint: self.endpoint, apart: Some(self.kind) }
    }
}

/// One of the ways of a lane's events to their provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Route {
    pub(crate) endpoint: Endpoint,
    /// A kind that the provider refuses is kept apart from what it takes.
    pub(crate) apart: Option<Kind>,
}

impl Route {
    /// Of all kinds that are not kept apart.
    pub(crate) fn to(endpoint: Endpoint) -> Self {
        Self { endpoint, apart: None }
    }

    /// The flow that is kept apart on this route.
    pub(crate) fn flow_apart(self) -> Option<Flow> {
        self.apart.map(|kind| Flow { endpoint: self.endpoint, kind })
    }
}
