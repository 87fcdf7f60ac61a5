//! Which fault the next request gets.

use std::collections::VecDeque;

use super::fault::Fault;

/// A queue of faults, and what applies when it is empty.
pub(super) struct Script {
    queue: VecDeque<Fault>,
    always: Option<Fault>,
    dice: Dice,
}

impl Script {
    pub(super) fn new(seed: u64) -> Self {
        Self { queue: VecDeque::new(), always: None, dice: Dice::new(seed) }
    }

    pub(super) fn append(&mut self, faults: impl IntoIterator<Item = Fault>) {
        self.queue.extend(faults);
    }

    pub(super) fn always(&mut self, fault: Option<Fault>) {
        self.always = fault;
    }

    /// The fault for the next request, with [`Fault::Percent`] already decided.
    pub(super) fn next(&mut self) -> Option<Fault> {
        let mut fault = self.queue.pop_front().or_else(|| self.always.clone())?;
        while let Fault::Percent { percent, fault: inner } = fault {
            if self.dice.roll() >= percent {
                return None;
            }
            fault = *inner;
        }
        Some(fault)
    }
}

/// xorshift64*: the same seed gives the same run.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        // Spreads neighbouring seeds, and keeps zero out: xorshift never leaves it.
        Self(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// 0 to 99.
    fn roll(&mut self) -> u8 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        // The high bits: the low ones of xorshift* are weak.
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % 100) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_comes_first_then_always() {
        let mut script = Script::new(1);
        script.always(Some(Fault::Stall));
        script.append([Fault::Junk, Fault::ResetAfter]);
        let dealt: Vec<_> = (0..4).map(|_| script.next()).collect();
        assert_eq!(
            dealt,
            [Some(Fault::Junk), Some(Fault::ResetAfter), Some(Fault::Stall), Some(Fault::Stall)]
        );
        script.always(None);
        assert_eq!(script.next(), None);
    }

    #[test]
    fn percent_strikes_about_as_often_as_it_says_and_repeats_with_its_seed() {
        let run = |seed| {
            let mut script = Script::new(seed);
            script.always(Some(Fault::Percent { percent: 30, fault: Box::new(Fault::Junk) }));
            (0..10_000).map(|_| script.next().is_some()).collect::<Vec<_>>()
        };
        let struck = run(7).into_iter().filter(|hit| *hit).count();
        assert!((2_700..3_300).contains(&struck), "{struck} of 10000");
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn percent_0_never_strikes_and_100_always_does() {
        let mut script = Script::new(0);
        for (percent, fault) in [(0, None), (100, Some(Fault::Junk))] {
            script.always(Some(Fault::Percent { percent, fault: Box::new(Fault::Junk) }));
            assert!((0..1_000).all(|_| script.next() == fault));
        }
    }
}
