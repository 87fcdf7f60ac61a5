//! Events of a flow that the provider does not take now, and of which a lane holds
//! enough: they stay in the log until it can take them in, so that the others are read
//! on. A pure state machine.
//!
//! From the first one that is left aside, every later one of the flow is, until all
//! are read again: so they come in their order.

use std::{collections::VecDeque, ops::Range};

/// The numbers of such events, in order. See the module.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct Aside(VecDeque<u64>);

impl Aside {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The first one, where reading begins.
    pub(super) fn first(&self) -> Option<u64> {
        self.0.front().copied()
    }

    /// Leaves one aside that comes after all others.
    pub(super) fn leave(&mut self, seq: u64) {
        self.0.push_back(seq);
    }

    /// True if an event is one of them.
    pub(super) fn has(&self, seq: u64) -> bool {
        self.0.binary_search(&seq).is_ok()
    }

    /// Everything before `next_seq` was read, and taken in as far as it is one of them.
    pub(super) fn read(&mut self, next_seq: u64) {
        self.0.drain(..self.before(next_seq));
    }

    /// Those in a range.
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        self.0.range(self.before(range.start)..self.before(range.end)).copied()
    }

    /// How many are before that one.
    fn before(&self, seq: u64) -> usize {
        self.0.partition_point(|other| *other < seq)
    }
}
