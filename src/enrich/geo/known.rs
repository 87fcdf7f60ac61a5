//! What was found lately, encoded, so that most events of a place only share it.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::{BadRecord, place::Place};
use crate::enrich::Encoded;

/// Places that are kept at most. One has at most some hundred bytes, its names among them,
/// so this is a megabyte or two.
const SLOTS_BITS: u32 = 12;

/// What a record holds.
pub(super) type Answer = Result<Option<Arc<Encoded<Place>>>, BadRecord>;

/// Answers by the places of their records in the database. Each has one slot, which it may
/// have to share: then the one that was asked for last is there. Nobody waits for anybody.
pub(super) struct Known(Box<[ArcSwapOption<Entry>]>);

struct Entry {
    offset: usize,
    answer: Answer,
}

impl Known {
    pub(super) fn new() -> Self {
        Self((0..1 << SLOTS_BITS).map(|_| ArcSwapOption::empty()).collect())
    }

    /// The answer of the record at an offset, found now if it is not known.
    pub(super) fn get_or(&self, offset: usize, find: impl FnOnce() -> Answer) -> Answer {
        let slot = &self.0[slot_of(offset)];
        if let Some(entry) = slot.load().as_ref().filter(|entry| entry.offset == offset) {
            return entry.answer.clone();
        }
        let answer = find();
        slot.store(Some(Arc::new(Entry { offset, answer: answer.clone() })));
        answer
    }
}

/// Spread by the golden ratio: records that stand close together are asked for together.
fn slot_of(offset: usize) -> usize {
    let spread = (offset as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    usize::try_from(spread >> (u64::BITS - SLOTS_BITS)).expect("it has few bits")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn an_answer_is_found_once_until_another_takes_its_slot() {
        let known = Known::new();
        let place = |code: &[u8; 2]| Ok(Place::of_country(*code).map(|place| Arc::new(Encoded::new(place))));
        let never = || panic!("it is known");
        let first = known.get_or(1, || place(b"DE"));
        assert_eq!(known.get_or(1, never), first);
        assert_eq!(known.get_or(2, || Ok(None)), Ok(None));
        assert_eq!(known.get_or(2, never), Ok(None), "that there is none too");
        assert_eq!(known.get_or(3, || Err(BadRecord)), Err(BadRecord));
        assert_eq!(known.get_or(3, never), Err(BadRecord), "and what cannot be read");
        let rival = (4..).find(|offset| slot_of(*offset) == slot_of(1)).unwrap();
        let second = known.get_or(rival, || place(b"FR"));
        assert_eq!(known.get_or(rival, never), second);
        assert_eq!(known.get_or(1, || place(b"DE")), first);
    }

    #[test]
    fn records_that_stand_close_together_share_no_slot() {
        let slots: HashSet<_> = (0..1000).map(|record| slot_of(5000 + 40 * record)).collect();
        assert!(slots.len() > 850, "{}", slots.len());
    }
}
