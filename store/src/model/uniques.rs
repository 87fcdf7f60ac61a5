//! Sets of visitors that stay small: exact up to a bound, estimated beyond, and the
//! answer says which.

use crate::Count;

/// Sixteen thousand registers: one standard error is 0.81 %.
const PRECISION: u32 = 14;
const REGISTERS: usize = 1 << PRECISION;

/// So many keys are looked up together.
pub(crate) const TOGETHER: usize = 32;
/// Smaller tables are in the processor's cache as it is: bytes.
const TOUCHED_MIN: usize = 256 << 10;

/// Finds values by keys that are hashes already; zero is no key. One probe of the memory for
/// most look-ups.
#[derive(Debug, Clone)]
pub struct IdMap<V = u32> {
    /// Zero is free. A power of two, at most half full.
    slots: Vec<(u64, V)>,
    len: usize,
}

impl<V> Default for IdMap<V> {
    fn default() -> Self {
        Self { slots: Vec::new(), len: 0 }
    }
}

/// Spreads the bits of a key over a table's index: the lowest bit says what kind it is.
fn place(key: u64, mask: usize) -> usize {
    // 2^64 divided by the golden ratio.
    (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize & mask
}

/// Calls `each` with keys, as many at a time as are looked up together.
fn together(keys: impl IntoIterator<Item = u64>, mut each: impl FnMut(&[u64])) {
    let (mut some, mut n) = ([0; TOGETHER], 0);
    for key in keys {
        some[n] = key;
        n += 1;
        if n == TOGETHER {
            each(&some);
            n = 0;
        }
    }
    each(&some[..n]);
}

impl<V: Copy + Default> IdMap<V> {
    /// How many keys it has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All keys, in no order, and their values.
    pub fn iter(&self) -> impl Iterator<Item = (u64, V)> + '_ {
        self.slots.iter().copied().filter(|(key, _)| *key != 0)
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.slots.len() * size_of::<(u64, V)>()
    }

    /// Where a key is, or would be. There are slots.
    #[inline]
    fn find(&self, key: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = place(key, mask);
        while self.slots[at].0 != key && self.slots[at].0 != 0 {
            at = (at + 1) & mask;
        }
        at
    }

    /// Reads where keys are that are looked up next. A look-up waits for the memory and only
    /// then knows how it goes on; of these reads none waits for another.
    #[inline]
    pub fn touch(&self, keys: &[u64]) {
        if self.bytes() >= TOUCHED_MIN {
            let mask = self.slots.len() - 1;
            let read = keys.iter().fold(0, |all, key| all ^ self.slots[place(*key, mask)].0);
            std::hint::black_box(read);
        }
    }

    /// The value of a key.
    #[inline]
    pub fn get(&self, key: u64) -> Option<V> {
        if self.slots.is_empty() || key == 0 {
            return None;
        }
        let (there, value) = self.slots[self.find(key)];
        (there == key).then_some(value)
    }

    /// The value of a key; `new` if there was none, and then true.
    #[inline]
    pub fn get_or_insert(&mut self, key: u64, new: V) -> (V, bool) {
        if self.len * 2 >= self.slots.len() {
            self.grow();
        }
        let at = self.find(key);
        if self.slots[at].0 == key {
            return (self.slots[at].1, false);
        }
        self.slots[at] = (key, new);
        self.len += 1;
        (new, true)
    }

    /// Gives a key a value.
    pub fn insert(&mut self, key: u64, value: V) {
        if !self.get_or_insert(key, value).1 {
            let at = self.find(key);
            self.slots[at].1 = value;
        }
    }

    /// Takes a key out.
    pub fn remove(&mut self, key: u64) {
        if self.get(key).is_none() {
            return;
        }
        let mask = self.slots.len() - 1;
        let at = self.find(key);
        self.slots[at] = Default::default();
        self.len -= 1;
        // What was pushed behind it by it moves up.
        let mut next = (at + 1) & mask;
        while self.slots[next].0 != 0 {
            let (moved, value) = std::mem::take(&mut self.slots[next]);
            self.len -= 1;
            self.get_or_insert(moved, value);
            next = (next + 1) & mask;
        }
    }

    #[cold]
    fn grow(&mut self) {
        let slots = vec![Default::default(); (self.slots.len() * 2).max(16)];
        let before = std::mem::replace(&mut self.slots, slots);
        self.len = 0;
        for (key, value) in before.into_iter().filter(|(key, _)| *key != 0) {
            self.get_or_insert(key, value);
        }
    }
}

/// A set of keys that are hashes already; zero is not in it.
#[derive(Debug, Clone, Default)]
pub struct IdSet(IdMap<()>);

impl IdSet {
    /// How many are in it.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if none is.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Puts a key in; true if it was not. Zero never is.
    #[inline]
    pub fn insert(&mut self, key: u64) -> bool {
        key != 0 && self.0.get_or_insert(key, ()).1
    }

    /// True if a key is in it.
    #[inline]
    pub fn contains(&self, key: u64) -> bool {
        self.0.get(key).is_some()
    }

    /// Of each of many keys whether it is in it.
    pub fn has(&self, keys: &[u64]) -> Vec<bool> {
        let mut has = Vec::with_capacity(keys.len());
        for some in keys.chunks(TOGETHER) {
            self.0.touch(some);
            has.extend(some.iter().map(|key| self.contains(*key)));
        }
        has
    }

    /// Takes a key out.
    pub fn remove(&mut self, key: u64) {
        self.0.remove(key);
    }

    /// Takes keys out.
    pub fn remove_all(&mut self, keys: &[u64]) {
        for some in keys.chunks(TOGETHER) {
            self.0.touch(some);
            some.iter().for_each(|key| self.remove(*key));
        }
    }

    /// All, in no order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().map(|(key, ())| key)
    }
}

impl Extend<u64> for IdSet {
    fn extend<T: IntoIterator<Item = u64>>(&mut self, keys: T) {
        together(keys, |some| {
            self.0.touch(some);
            for key in some {
                self.insert(*key);
            }
        });
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

    /// Counts keys; more than `exact_max` are estimated.
    pub fn extend(&mut self, keys: impl IntoIterator<Item = u64>, exact_max: usize) {
        together(keys, |some| {
            if let Self::Exact(set) = self {
                set.0.touch(some);
            }
            for key in some {
                self.insert(*key, exact_max);
            }
        });
    }

    /// Counts what another has counted.
    pub fn merge(&mut self, other: &Self, exact_max: usize) {
        match other {
            Self::Exact(set) => self.extend(set.iter(), exact_max),
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
            Self::Exact(set) => set.bytes(),
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
