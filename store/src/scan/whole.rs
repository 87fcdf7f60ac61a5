//! What is found out about a chunk that never changes, once for all questions that count all
//! of it.
//!
//! Most sessions are of one chunk alone: of these a question needs no more than their sums.
//! The others are put together from their parts as always. Which are alone only who has all
//! the chunks can say.

use std::{collections::BTreeSet, sync::Arc};

use crate::{
    SessionSums,
    model::{SessionKey, SessionPart},
};

/// A part of a session, or all of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) key: u64,
    pub(crate) start_ms: i64,
    pub(crate) end_ms: i64,
    pub(crate) views: u32,
    pub(crate) actions: u32,
    pub(crate) matched: bool,
}

impl Part {
    pub(crate) fn join(&mut self, other: &Self) {
        self.start_ms = self.start_ms.min(other.start_ms);
        self.end_ms = self.end_ms.max(other.end_ms);
        self.views += other.views;
        self.actions += other.actions;
        self.matched |= other.matched;
    }

    /// What the definition of sessions says about it.
    pub(crate) fn session(&self) -> SessionPart<()> {
        SessionPart {
            key: SessionKey(self.key),
            start_ms: self.start_ms,
            end_ms: self.end_ms,
            views: self.views,
            actions: self.actions,
            first: ((), 0),
            entry: None,
            exit: None,
            matched: self.matched,
        }
    }
}

/// What a question that counts all of a chunk needs to know of it, but for whose it is. Of
/// machines there is nothing in it.
#[derive(Debug)]
pub(crate) struct Whole {
    /// Pages and screens that were seen.
    pub(crate) views: u64,
    /// The sessions that no other chunk has anything of.
    pub(crate) lone: SessionSums,
    /// The parts of all others.
    pub(crate) parts: Vec<Part>,
    /// All its sessions.
    pub(crate) sessions: Arc<Fingerprints>,
    /// Those of `parts`.
    pub(crate) shared: Fingerprints,
}

impl Whole {
    /// Of the parts that a chunk has, its views, its sessions, and those of which others have
    /// parts, too.
    pub(crate) fn of(
        parts: &[Part],
        views: u64,
        sessions: Arc<Fingerprints>,
        mut shared: Fingerprints,
    ) -> Self {
        // What is long must be cut, and for that all events of its key are needed.
        shared.add(parts.iter().filter(|part| part.session().is_long()).map(|part| part.key));
        let mut whole = Self { views, lone: SessionSums::default(), parts: Vec::new(), sessions, shared };
        for part in parts {
            if whole.shared.has(part.key) {
                whole.parts.push(*part);
            } else {
                whole.lone.add(&part.session().sums());
            }
        }
        whole.parts.shrink_to_fit();
        whole
    }

    /// True if a session of this key may be among the lone ones.
    pub(crate) fn has_lone(&self, key: u64) -> bool {
        self.sessions.has(key) && !self.shared.has(key)
    }

    /// Bytes of memory that it takes, without `sessions`.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + self.parts.capacity() * size_of::<Part>() + self.shared.bytes()
    }
}

/// Keys of sessions in half of their bytes: what is none of them may pass for one, and not the
/// other way about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Fingerprints(Vec<u32>);

impl Fingerprints {
    /// Those of keys; of what is in no session there is none.
    pub(crate) fn of(keys: impl Iterator<Item = u64>) -> Self {
        let keys = keys.filter(|key| !SessionKey(*key).is_none());
        let mut all: Vec<u32> = keys.map(fingerprint).collect();
        all.sort_unstable();
        all.dedup();
        all.shrink_to_fit();
        Self(all)
    }

    pub(crate) fn has(&self, key: u64) -> bool {
        self.0.binary_search(&fingerprint(key)).is_ok()
    }

    /// Adds those that two have in common.
    pub(crate) fn add_common(&mut self, one: &Self, other: &Self) {
        let (mut ours, mut theirs) = (&one.0[..], &other.0[..]);
        let mut common = Vec::new();
        while let ([our, our_rest @ ..], [their, their_rest @ ..]) = (ours, theirs) {
            if our == their {
                common.push(*our);
            }
            if our <= their {
                ours = our_rest;
            }
            if their <= our {
                theirs = their_rest;
            }
        }
        self.extend(common);
    }

    /// Adds all of another's.
    pub(crate) fn add_all(&mut self, other: &Self) {
        self.extend(other.0.iter().copied());
    }

    fn add(&mut self, keys: impl Iterator<Item = u64>) {
        self.extend(keys.map(fingerprint).collect::<BTreeSet<_>>());
    }

    /// Adds some that are in order.
    fn extend(&mut self, more: impl IntoIterator<Item = u32>) {
        let before = self.0.len();
        self.0.extend(more);
        if self.0.len() > before {
            // It knows two runs in order when it sees them.
            self.0.sort();
            self.0.dedup();
        }
    }

    /// True if all of another's are among these.
    pub(crate) fn includes(&self, other: &Self) -> bool {
        other.0.iter().all(|fingerprint| self.0.binary_search(fingerprint).is_ok())
    }

    /// Bytes of memory that they take.
    pub(crate) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<u32>()
    }
}

/// The lowest bit says what kind of key it is.
fn fingerprint(key: u64) -> u32 {
    (key >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_have_in_common_is_found_and_nothing_is_missed() {
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..200 {
            let mut keys = |n| (0..n).map(|_| random.u64(0..40) << 32 | 2).collect::<Vec<_>>();
            let (one, other, third) = (keys(9), keys(30), keys(4));
            let [a, b, c] = [&one, &other, &third].map(|keys| Fingerprints::of(keys.iter().copied()));
            let mut common = Fingerprints::default();
            common.add_common(&a, &b);
            common.add_common(&b, &a);
            for key in &one {
                assert_eq!(common.has(*key), other.contains(key), "{one:?} {other:?}");
            }
            let mut both = common.clone();
            both.add_all(&c);
            assert!(both.includes(&common) && both.includes(&c), "{one:?} {other:?} {third:?}");
            assert!(!common.includes(&both) || third.iter().all(|key| common.has(*key)));
        }
    }

    /// What has a key of which another part is long is not among the lone ones either.
    #[test]
    fn what_may_have_to_be_cut_is_not_alone() {
        const HOUR_MS: i64 = 3_600_000;
        let part = |key: u64, from: i64, to: i64| Part {
            key: key << 32 | 2,
            start_ms: from * HOUR_MS,
            end_ms: to * HOUR_MS,
            views: 1,
            actions: 0,
            matched: true,
        };
        let parts = [part(1, 0, 1), part(2, 0, 30), part(2, 50, 51), part(3, 5, 6)];
        let sessions = Arc::new(Fingerprints::of(parts.iter().map(|part| part.key)));
        let whole = Whole::of(&parts, 4, sessions, Fingerprints::of([3 << 32 | 2].into_iter()));
        assert_eq!((whole.lone.sessions, whole.parts.len()), (1, 3));
        assert_eq!([1, 2, 3].map(|key| whole.has_lone(key << 32 | 2)), [true, false, false]);
    }
}
