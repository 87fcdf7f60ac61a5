//! What is counted of an event once it is taken. One that is refused, or that finds no room
//! and is looked at again, is not counted for what was found out about it.

use crate::reasons::Step;

/// Some of the steps, as bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Steps(u8);

impl Steps {
    pub(crate) fn of(steps: &[Step]) -> Self {
        let mut all = Self::default();
        steps.iter().for_each(|step| all.add(*step));
        all
    }

    pub(crate) fn add(&mut self, step: Step) {
        self.0 |= 1 << step as u8;
    }

    pub(crate) fn has(self, step: Step) -> bool {
        self.0 >> step as u8 & 1 == 1
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn each(self) -> impl Iterator<Item = Step> {
        Step::ALL.into_iter().filter(move |step| self.has(*step))
    }
}

/// See the module.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// What failed on it.
    pub(crate) missed: Steps,
    pub(crate) is_machines: bool,
    /// Its user declines to be followed.
    pub(crate) is_declined: bool,
    /// The salt of its day is gone.
    pub(crate) lacks_salt: bool,
    /// So many visitors are known that its session is not.
    pub(crate) lacks_room: bool,
}

impl Tally {
    /// True if there is nothing to be counted, as of most events.
    #[inline]
    pub(crate) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}
