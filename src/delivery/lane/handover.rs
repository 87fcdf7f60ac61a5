//! Who brings a lane's next event: the queue, or, when something is missing
//! between what it brought, the log. A pure state machine.
//!
//! Every event of the log is either offered to the queue, which brings it in
//! order, or *skipped*, and said to be. So the lane knows of every event, and is
//! *behind* exactly while it knows of one that it has not taken. That is derived and
//! never noted: a note can be forgotten.
//!
//! While the lane reads, what the queue brings is kept, as far as it is without a
//! gap and not too much: where reading comes to the first of it, the queue is
//! followed again.

use std::collections::VecDeque;

/// Events that the queue brought and that are kept while those before them are
/// being read.
const RECENT_MAX: usize = 1024;

/// See the module. `T` is an event.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Handover<T> {
    /// Every event before this was taken.
    next_seq: u64,
    /// No event from here on is known of.
    known_end: u64,
    /// The log is being read from `next_seq` on.
    is_reading: bool,
    /// The newest that the queue brought meanwhile, without a gap.
    recent: VecDeque<(u64, T)>,
}

impl<T> Handover<T> {
    /// For a lane that has taken everything before `next_seq`, of a log that ends
    /// before `log_end`: what is in between the queue never brings.
    pub(super) fn new(next_seq: u64, log_end: u64) -> Self {
        Self { next_seq, known_end: log_end.max(next_seq), is_reading: false, recent: VecDeque::new() }
    }

    /// True if there is something to read.
    pub(super) fn is_behind(&self) -> bool {
        self.next_seq < self.known_end
    }

    /// True once an event is behind the lane.
    pub(super) fn has_taken(&self, seq: u64) -> bool {
        seq < self.next_seq
    }

    /// The queue brings an event. Gives it back if it is the next one and there is
    /// room for it: then it is taken.
    pub(super) fn bring(&mut self, seq: u64, event: T, has_room: bool) -> Option<T> {
        self.known_end = self.known_end.max(seq + 1);
        if self.has_taken(seq) {
            return None;
        }
        if seq == self.next_seq && has_room && !self.is_reading && self.recent.is_empty() {
            self.next_seq += 1;
            return Some(event);
        }
        if self.recent.back().is_some_and(|(last, _)| last + 1 != seq) {
            self.recent.clear();
        }
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((seq, event));
        None
    }

    /// The queue had no room for events up to that one.
    pub(super) fn skip(&mut self, newest_seq: u64) {
        self.known_end = self.known_end.max(newest_seq + 1);
    }

    /// Where reading begins, if there is something to read and it is not being done.
    pub(super) fn begin_read(&mut self) -> Option<u64> {
        let begins = self.is_behind() && !self.is_reading;
        self.is_reading |= begins;
        begins.then_some(self.next_seq)
    }

    /// Reading has failed.
    pub(super) fn read_failed(&mut self) {
        self.is_reading = false;
    }

    /// Everything before `next_seq` was read. Returns what the queue has brought
    /// meanwhile, if it goes on there: it is taken too.
    pub(super) fn read(&mut self, next_seq: u64) -> VecDeque<(u64, T)> {
        self.is_reading = false;
        self.next_seq = self.next_seq.max(next_seq);
        self.known_end = self.known_end.max(self.next_seq);
        while self.recent.front().is_some_and(|(seq, _)| *seq < self.next_seq) {
            self.recent.pop_front();
        }
        if self.recent.front().is_none_or(|(seq, _)| *seq != self.next_seq) {
            return VecDeque::new();
        }
        let recent = std::mem::take(&mut self.recent);
        self.next_seq += recent.len() as u64;
        recent
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Events of the log in the model: enough for a gap behind a gap.
    const EVENTS: u64 = 6;
    /// Events that one read gives at most.
    const READ_MAX: u64 = 2;

    /// A log, its queue, and a lane between them.
    #[derive(Debug, Clone, PartialEq, Eq, Hash)]
    struct World {
        /// Events that were written.
        log_end: u64,
        queue: VecDeque<u64>,
        /// What is said to be skipped and was not heard yet.
        unheard: Option<u64>,
        lane: Handover<()>,
        /// Where a read began and what it will give: the log ends where it ended
        /// then.
        reading: Option<(u64, u64)>,
        has_room: bool,
        taken: u64,
        restarts: u32,
    }

    impl World {
        fn new() -> Self {
            Self {
                log_end: 0,
                queue: VecDeque::new(),
                unheard: None,
                lane: Handover::new(0, 0),
                reading: None,
                has_room: true,
                taken: 0,
                restarts: 2,
            }
        }

        fn take(&mut self, seq: u64) {
            assert_eq!(seq, self.taken, "each once and in order");
            self.taken += 1;
        }

        /// Every world that can be next.
        fn next(&self) -> Vec<Self> {
            let mut next = Vec::new();
            let mut then = |step: &dyn Fn(&mut Self)| {
                let mut world = self.clone();
                step(&mut world);
                next.push(world);
            };
            if self.log_end < EVENTS {
                then(&|world| {
                    world.queue.push_back(world.log_end);
                    world.log_end += 1;
                });
                then(&|world| {
                    world.unheard = Some(world.log_end);
                    world.log_end += 1;
                });
            }
            if !self.queue.is_empty() {
                then(&|world| {
                    let seq = world.queue.pop_front().unwrap();
                    if world.lane.bring(seq, (), world.has_room).is_some() {
                        world.take(seq);
                    }
                });
            }
            if self.unheard.is_some() {
                then(&|world| world.lane.skip(world.unheard.take().unwrap()));
            }
            if self.has_room && self.lane.is_behind() && self.reading.is_none() {
                then(&|world| {
                    let from = world.lane.begin_read().unwrap();
                    world.reading = Some((from, (from + READ_MAX).min(world.log_end)));
                });
            }
            if let Some((from, to)) = self.reading {
                then(&|world| {
                    world.reading = None;
                    (from..to).for_each(|seq| world.take(seq));
                    for (seq, ()) in world.lane.read(to) {
                        world.take(seq);
                    }
                });
                then(&|world| {
                    world.reading = None;
                    world.lane.read_failed();
                    // It is not tried for ever in this world.
                    world.restarts = world.restarts.saturating_sub(1);
                });
            }
            then(&|world| world.has_room = !world.has_room);
            if self.restarts > 0 {
                // What was taken and had not ended goes again.
                for lowest in 0..=self.taken {
                    then(&|world| {
                        *world = Self {
                            log_end: world.log_end,
                            lane: Handover::new(lowest, world.log_end),
                            taken: lowest,
                            restarts: world.restarts - 1,
                            ..Self::new()
                        };
                    });
                }
            }
            next
        }

        /// True if nothing is under way any more.
        fn is_quiet(&self) -> bool {
            self.log_end == EVENTS
                && self.queue.is_empty()
                && self.unheard.is_none()
                && self.reading.is_none()
                && self.has_room
                && !self.lane.is_behind()
        }
    }

    /// Every order of writing, skipping, bringing, hearing of it, a slow disk, one
    /// that fails, a lane without room, and a restart: each event is taken once, in
    /// order; a lane that believes that it is not behind has everything; and one that
    /// is behind can go on.
    #[test]
    fn whatever_the_order_every_event_is_taken_once() {
        let (mut seen, mut open) = (HashSet::new(), vec![World::new()]);
        let (mut quiet, mut caught_up_from_recent) = (0, 0);
        while let Some(world) = open.pop() {
            if world.is_quiet() {
                assert_eq!(world.taken, EVENTS, "it believes that it has everything: {world:?}");
                quiet += 1;
            }
            for next in world.next() {
                caught_up_from_recent +=
                    u32::from(world.reading.is_some_and(|(_, to)| next.taken > to && next.reading.is_none()));
                if seen.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        assert!(seen.len() > 10_000 && quiet > 0, "{} worlds, {quiet} of them quiet", seen.len());
        assert!(caught_up_from_recent > 100, "the queue was followed again: {caught_up_from_recent}");
    }

    /// From any world, without luck: once nothing more is written and there is room,
    /// the lane gets everything in a few steps.
    #[test]
    fn a_lane_that_is_behind_comes_to_the_end() {
        let mut lane: Handover<()> = Handover::new(0, 3);
        let mut steps = 0;
        lane.skip(9);
        while let Some(from) = lane.begin_read() {
            lane.read((from + READ_MAX).min(10));
            steps += 1;
        }
        assert_eq!(steps, 5);
        assert!(lane.has_taken(9) && !lane.is_behind());
    }

    #[test]
    fn what_is_kept_while_reading_is_bounded_and_without_a_gap() {
        let mut lane = Handover::new(0, 1);
        assert_eq!(lane.begin_read(), Some(0));
        for seq in 1..3000 {
            assert_eq!(lane.bring(seq, (), true), None);
        }
        assert_eq!(lane.recent.len(), RECENT_MAX);
        lane.bring(5000, (), true);
        assert_eq!(lane.recent.len(), 1, "what is before a gap is of no use");
        assert!(lane.read(1).is_empty() && lane.is_behind());
    }
}
