//! Sets of visitors that stay small: exact up to a bound, estimated beyond, and the
//! answer says which.

use crate::Count;

/// Sixteen thousand registers: one standard error is 0.81 %.
const PRECISION: u32 = 14;
const REGISTERS: usize = 1 << PRECISION;

/// A set of keys that are hashes already; zero is not in it. One probe of the memory for
/// most look-ups.
#[derive(Debug, Clone, Default)]
pub struct IdSet {
    /// Zero is free. A power of two, at most half full.
    slots: Vec<u64>,
    len: usize,
}

/// Spreads the bits of a key over a table's index: the lowest bit says what kind it is.
fn place(key: u64, mask: usize) -> usize {
    // 2^64 divided by the golden ratio.
    (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize & mask
}

impl IdSet {
    /// How many are in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if none is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts a key in; true if it was not. Zero never is.
    #[inline]
    pub fn insert(&mut self, key: u64) -> bool {
        if key == 0 {
            return false;
        }
        if self.len * 2 >= self.slots.len() {
            self.grow();
        }
        let mask = self.slots.len() - 1;
        let mut at = place(key, mask);
        loop {
            match self.slots[at] {
                0 => {
                    self.slots[at] = key;
                    self.len += 1;
                    return true;
                }
                there if there == key => return false,
                _ => at = (at + 1) & mask,
            }
        }
    }

    /// True if a key is in it.
    #[inline]
    pub fn contains(&self, key: u64) -> bool {
        if self.slots.is_empty() || key == 0 {
            return false;
        }
        let mask = self.slots.len() - 1;
        let mut at = place(key, mask);
        loop {
            match self.slots[at] {
                0 => return false,
                there if there == key => return true,
                _ => at = (at + 1) & mask,
            }
        }
    }

    /// Takes a key out.
    pub fn remove(&mut self, key: u64) {
        if !self.contains(key) {
            return;
        }
        let mask = self.slots.len() - 1;
        let mut at = place(key, mask);
        while self.slots[at] != key {
            at = (at + 1) & mask;
        }
        self.slots[at] = 0;
        self.len -= 1;
        // What was pushed behind it by it moves up.
        let mut next = (at + 1) & mask;
        while self.slots[next] != 0 {
            let moved = std::mem::take(&mut self.slots[next]);
            self.len -= 1;
            self.insert(moved);
            next = (next + 1) & mask;
        }
    }

    /// All, in no order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.slots.iter().copied().filter(|key| *key != 0)
    }

    #[cold]
    fn grow(&mut self) {
        let slots = vec![0; (self.slots.len() * 2).max(16)];
        let before = std::mem::replace(&mut self.slots, slots);
        self.len = 0;
        for key in before.into_iter().filter(|key| *key != 0) {
            self.insert(key);
        }
    }
}

/// Finds numbers by keys that are hashes already; zero is no key.
#[derive(Debug, Clone, Default)]
pub struct IdMap {
    slots: Vec<(u64, u32)>,
    len: usize,
}

impl IdMap {
    /// How many keys it has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All keys, in no order, and their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.slots.iter().copied().filter(|(key, _)| *key != 0)
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.slots.len() * size_of::<(u64, u32)>()
    }

    /// The number of a key.
    #[inline]
    pub fn get(&self, key: u64) -> Option<u32> {
        if self.slots.is_empty() || key == 0 {
            return None;
        }
        let mask = self.slots.len() - 1;
        let mut at = place(key, mask);
        loop {
            match self.slots[at] {
                (0, _) => return None,
                (there, number) if there == key => return Some(number),
                _ => at = (at + 1) & mask,
            }
        }
    }

    /// The number of a key; `new` if there was none, and then true.
    #[inline]
    pub fn get_or_insert(&mut self, key: u64, new: u32) -> (u32, bool) {
        if self.len * 2 >= self.slots.len() {
            self.grow();
        }
        let mask = self.slots.len() - 1;
        let mut at = place(key, mask);
        loop {
            match self.slots[at] {
                (0, _) => {
                    self.slots[at] = (key, new);
                    self.len += 1;
                    return (new, true);
                }
                (there, number) if there == key => return (number, false),
                _ => at = (at + 1) & mask,
            }
        }
    }

    #[cold]
    fn grow(&mut self) {
        let slots = vec![(0, 0); (self.slots.len() * 2).max(16)];
        let before = std::mem::replace(&mut self.slots, slots);
        self.len = 0;
        for (key, number) in before.into_iter().filter(|(key, _)| *key != 0) {
            self.get_or_insert(key, number);
        }
    }
}

/// How many different keys there are.
#[derive(Debug, Clone)]
pub enum Uniques {
    /// Each is remembered.
    Exact(IdSet),
    /// HyperLogLog: of each register the longest run of zeros.
    Estimated(Box<[u8]>),
}

impl Default for Uniques {
    fn default() -> Self {
        Self::Exact(IdSet::default())
    }
}

impl Uniques {
    /// Counts a key; more than `exact_max` are estimated.
    #[inline]
    pub fn insert(&mut self, key: u64, exact_max: usize) {
        match self {
            Self::Exact(set) => {
                if set.insert(key) && set.len() > exact_max {
                    self.estimate();
                }
            }
            Self::Estimated(registers) => note(registers, key),
        }
    }

    /// Counts what another has counted.
    pub fn merge(&mut self, other: &Self, exact_max: usize) {
        match other {
            Self::Exact(set) => set.iter().for_each(|key| self.insert(key, exact_max)),
            Self::Estimated(theirs) => {
                self.estimate();
                if let Self::Estimated(ours) = self {
                    ours.iter_mut()
                        .zip(theirs.iter())
                        .for_each(|(ours, theirs)| *ours = (*ours).max(*theirs));
                }
            }
        }
    }

    /// From now on.
    pub fn estimate(&mut self) {
        if let Self::Exact(set) = self {
            let mut registers = vec![0; REGISTERS].into_boxed_slice();
            set.iter().for_each(|key| note(&mut registers, key));
            *self = Self::Estimated(registers);
        }
    }

    /// How many keys are remembered.
    pub fn exact(&self) -> usize {
        match self {
            Self::Exact(set) => set.len(),
            Self::Estimated(_) => 0,
        }
    }

    /// True if they are estimated.
    pub fn is_estimated(&self) -> bool {
        matches!(self, Self::Estimated(_))
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Exact(set) => set.slots.len() * 8,
            Self::Estimated(_) => REGISTERS,
        }
    }

    /// How many there are.
    pub fn count(&self) -> Count {
        match self {
            Self::Exact(set) => Count::exact(set.len()),
            Self::Estimated(registers) => Count { n: estimate(registers), estimated: true },
        }
    }
}

fn note(registers: &mut [u8], key: u64) {
    if key == 0 {
        return;
    }
    // Its lowest bit says what kind of key it is, so they are mixed again.
    let mixed = (key ^ key >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let register = (mixed >> (64 - PRECISION)) as usize;
    let run = (mixed << PRECISION | 1 << (PRECISION - 1)).leading_zeros() as u8 + 1;
    registers[register] = registers[register].max(run);
}

/// The improved raw estimator of Ertl, "New cardinality estimation algorithms for
/// HyperLogLog sketches", 2017: without bias from one to any number, and without tables.
fn estimate(registers: &[u8]) -> u64 {
    const RUN_MAX: usize = 64 - PRECISION as usize + 1;
    let m = REGISTERS as f64;
    let mut runs = [0_u32; RUN_MAX + 1];
    registers.iter().for_each(|run| runs[usize::from(*run).min(RUN_MAX)] += 1);
    let inner = runs[1..RUN_MAX]
        .iter()
        .rev()
        .fold(m * tau(1.0 - f64::from(runs[RUN_MAX]) / m), |z, n| 0.5 * (z + f64::from(*n)));
    let z = inner + m * sigma(f64::from(runs[0]) / m);
    (m * m / (2.0 * std::f64::consts::LN_2) / z).round() as u64
}

fn sigma(mut x: f64) -> f64 {
    if x >= 1.0 {
        return f64::INFINITY;
    }
    let (mut y, mut z) = (1.0, x);
    loop {
        x *= x;
        let before = z;
        z += x * y;
        y += y;
        if z <= before {
            return z;
        }
    }
}

fn tau(mut x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return 0.0;
    }
    let (mut y, mut z) = (1.0, 1.0 - x);
    loop {
        x = x.sqrt();
        let before = z;
        y *= 0.5;
        z -= (1.0 - x).powi(2) * y;
        if z >= before {
            return z / 3.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_out_hides_nothing_else() {
        let (mut set, mut sure) = (IdSet::default(), std::collections::BTreeSet::new());
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let key = random.u64(1..200);
            if random.bool() {
                assert_eq!(set.insert(key), sure.insert(key));
            } else {
                set.remove(key);
                sure.remove(&key);
            }
            assert_eq!(set.len(), sure.len());
        }
        let mut all: Vec<u64> = set.iter().collect();
        all.sort_unstable();
        assert_eq!(all, sure.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn beyond_the_bound_a_count_is_estimated_within_three_percent_and_says_so() {
        for n in [2_000, 40_000, 1_000_000] {
            let (mut one, mut two) = (Uniques::default(), Uniques::default());
            let mut random = fastrand::Rng::with_seed(n);
            for i in 0..n {
                let key = random.u64(1..);
                one.insert(key & !1, 1_000);
                if i % 2 == 0 { one.insert(key & !1, 1_000) } else { two.insert(key & !1, 1_000) }
            }
            one.merge(&two, 1_000);
            let count = one.count();
            assert!(count.estimated);
            assert!(count.n.abs_diff(n) * 100 < n * 3, "{n}: {}", count.n);
        }
        let mut few = Uniques::default();
        (0..1_001).for_each(|key| few.insert(key, 1_000));
        assert_eq!(few.count(), Count::exact(1_000), "zero is nobody");
    }
}
