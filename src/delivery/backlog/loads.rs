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
        let place = self.flows.iter().position(|(of, _)| *of == flow).unwrap_or_else(|| {
            self.flows.push((flow, Load::default()));
            self.flows.len() - 1
        });
        for load in [&mut self.all, &mut self.flows[place].1] {
            load.events += 1;
            load.bytes += bytes;
        }
    }

    pub(super) fn remove(&mut self, waiting: &Waiting) {
        let (flow, bytes) = (waiting.flow(), waiting.event.memory_bytes());
        let of_flow = self.flows.iter_mut().find(|(of, _)| *of == flow).map(|(_, load)| load);
        for load in [Some(&mut self.all), of_flow].into_iter().flatten() {
            load.events -= 1;
            load.bytes -= bytes;
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
