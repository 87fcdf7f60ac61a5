//! How much is in memory, of each flow and in all.

use super::Waiting;
use crate::delivery::routes::Flow;

/// Events, and the memory that they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Load {
    pub(crate) events: usize,
    pub(crate) bytes: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Loads {
    /// A few.
    flows: Vec<(Flow, Load)>,
    pub(super) all: Load,
}

impl Loads {
    pub(super) fn add(&mut self, waiting: &Waiting) {
        let (flow, bytes) = (waiting.flow(), waiting.event.memory_bytes());
        self.all.events += 1;
        self.all.bytes += bytes;
        match self.flows.iter_mut().find(|(of, _)| *of == flow) {
            Some((_, load)) => (load.events, load.bytes) = (load.events + 1, load.bytes + bytes),
            None => self.flows.push((flow, Load { events: 1, bytes })),
        }
    }

    pub(super) fn remove(&mut self, waiting: &Waiting) {
        let (flow, bytes) = (waiting.flow(), waiting.event.memory_bytes());
        self.all.events -= 1;
        self.all.bytes -= bytes;
        if let Some((_, load)) = self.flows.iter_mut().find(|(of, _)| *of == flow) {
            (load.events, load.bytes) = (load.events - 1, load.bytes - bytes);
        }
    }

    pub(super) fn of(&self, flow: Flow) -> Load {
        self.flows.iter().find(|(of, _)| *of == flow).map(|(_, load)| *load).unwrap_or_default()
    }

    /// The flows of which there is something.
    pub(super) fn flows(&self) -> impl Iterator<Item = Flow> {
        self.flows.iter().filter(|(_, load)| load.events > 0).map(|(flow, _)| *flow)
    }
}
