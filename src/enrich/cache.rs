//! What was found, by what it was found in: two generations, so that what is asked for
//! again stays and a flood of what never comes again costs time and no memory.

use std::{
    collections::HashMap,
    hash::Hasher,
    mem,
    sync::{Mutex, PoisonError},
};

use siphasher::sip128::{Hasher128, SipHasher13};

/// Locks, so that cores do not wait for each other.
const SHARDS: usize = 16;
/// What an entry takes beside its value: its key, its place, its share of the free ones.
const ENTRY_BYTES: usize = 64;

/// Most that each of the two generations holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CacheLimits {
    pub(crate) entries_max: usize,
    pub(crate) bytes_max: usize,
}

/// What something was found in: a hash that nobody outside can foresee, and so long that
/// no two are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key(u128);

/// Values that cost more to find than to keep. A lock is held for a look or a move.
#[derive(Debug)]
pub(crate) struct Cache<V> {
    secret: u128,
    shards: [Mutex<Shard<V>>; SHARDS],
    /// Of one shard.
    limits: CacheLimits,
}

/// Values, and what each takes.
type Generation<V> = HashMap<Key, (V, usize)>;

#[derive(Debug)]
struct Shard<V> {
    young: Generation<V>,
    young_bytes: usize,
    old: Generation<V>,
}

impl<V: Clone> Cache<V> {
    /// An empty one; `secret` is random.
    pub(crate) fn new(limits: CacheLimits, secret: u128) -> Self {
        let limits =
            CacheLimits { entries_max: limits.entries_max / SHARDS, bytes_max: limits.bytes_max / SHARDS };
        let shard = || Mutex::new(Shard { young: HashMap::new(), young_bytes: 0, old: HashMap::new() });
        Self { secret, shards: std::array::from_fn(|_| shard()), limits }
    }

    /// The key of some parts, in their order; none is not empty.
    pub(crate) fn key<'a>(&self, parts: impl IntoIterator<Item = Option<&'a str>>) -> Key {
        let mut hasher = SipHasher13::new_with_key(&self.secret.to_le_bytes());
        for part in parts {
            hasher.write_u64(part.map_or(u64::MAX, |part| part.len() as u64));
            hasher.write(part.unwrap_or_default().as_bytes());
        }
        Key(hasher.finish128().as_u128())
    }

    /// The value of a key, made if it is not here; `bytes` is what one takes. It is made
    /// outside of any lock, by two at once if they come at once.
    pub(crate) fn get_or_make(&self, key: Key, make: impl FnOnce() -> V, bytes: impl Fn(&V) -> usize) -> V {
        // What is forgotten is freed after the lock.
        if let Some((found, _forgotten)) = self.change(key, |shard| shard.get(key, self.limits)) {
            return found;
        }
        let made = make();
        let bytes = bytes(&made) + ENTRY_BYTES;
        let _forgotten = self.change(key, |shard| shard.put(key, (made.clone(), bytes), self.limits));
        made
    }

    fn change<T>(&self, key: Key, change: impl FnOnce(&mut Shard<V>) -> T) -> T {
        let shard = &self.shards[key.0 as usize % SHARDS];
        // Nothing panics in between; and if it did, an entry more or less is no harm.
        change(&mut shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Entries and bytes of the younger generation, and entries of the older one.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn size(&self) -> (usize, usize, usize) {
        let shards = self.shards.iter().map(|shard| shard.lock().expect("nothing panics in between"));
        shards.fold((0, 0, 0), |(young, bytes, old), shard| {
            (young + shard.young.len(), bytes + shard.young_bytes, old + shard.old.len())
        })
    }
}

impl<V: Clone> Shard<V> {
    /// One that is asked for is young again.
    fn get(&mut self, key: Key, limits: CacheLimits) -> Option<(V, Generation<V>)> {
        if let Some((found, _)) = self.young.get(&key) {
            return Some((found.clone(), Generation::new()));
        }
        let entry = self.old.remove(&key)?;
        Some((entry.0.clone(), self.put(key, entry, limits)))
    }

    /// Keeps an entry and returns the generation for which there is no room any more.
    fn put(&mut self, key: Key, entry: (V, usize), limits: CacheLimits) -> Generation<V> {
        let bytes = entry.1;
        if bytes > limits.bytes_max {
            return Generation::new();
        }
        let is_full = self.young.len() >= limits.entries_max || self.young_bytes + bytes > limits.bytes_max;
        let mut forgotten = Generation::new();
        if is_full {
            forgotten = mem::replace(&mut self.old, mem::take(&mut self.young));
            self.young_bytes = 0;
        }
        let replaced = self.young.insert(key, entry).map_or(0, |(_, bytes)| bytes);
        self.young_bytes = self.young_bytes + bytes - replaced;
        forgotten
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const LIMITS: CacheLimits = CacheLimits { entries_max: 160, bytes_max: 160 * 100 };

    fn cache() -> Cache<String> {
        Cache::new(LIMITS, 7)
    }

    fn find(cache: &Cache<String>, text: &str, made: &Cell<usize>) -> String {
        let make = || {
            made.set(made.get() + 1);
            text.to_uppercase()
        };
        cache.get_or_make(cache.key([Some(text)]), make, String::len)
    }

    #[test]
    fn what_was_made_is_found_and_not_made_again() {
        let (cache, made) = (cache(), Cell::new(0));
        assert_eq!((find(&cache, "a", &made), find(&cache, "a", &made)), ("A".into(), "A".into()));
        assert_eq!(find(&cache, "b", &made), "B");
        assert_eq!(made.get(), 2);
    }

    #[test]
    fn parts_are_told_apart_and_none_is_not_empty() {
        let cache = cache();
        let keys = [
            cache.key([Some("ab"), Some("c")]),
            cache.key([Some("a"), Some("bc")]),
            cache.key([Some("abc"), None]),
            cache.key([Some("abc"), Some("")]),
            cache.key([Some("abc")]),
        ];
        for (at, key) in keys.iter().enumerate() {
            assert!(!keys[at + 1..].contains(key), "{at}");
        }
        assert_ne!(
            Cache::<()>::new(LIMITS, 8).key([Some("a")]),
            cache.key([Some("a")]),
            "the secret is used"
        );
    }

    #[test]
    fn a_flood_takes_no_more_than_the_limits_and_what_is_asked_for_stays() {
        let (cache, made) = (cache(), Cell::new(0));
        find(&cache, "asked for", &made);
        for number in 0..10_000 {
            find(&cache, &format!("once {number}"), &made);
            find(&cache, "asked for", &made);
            let (young, bytes, old) = cache.size();
            assert!(young <= LIMITS.entries_max && old <= LIMITS.entries_max, "{young} {old}");
            assert!(bytes <= LIMITS.bytes_max, "{bytes}");
        }
        assert_eq!(made.get(), 10_001, "the one was made once");
    }

    #[test]
    fn bytes_are_limited_too_and_what_is_too_large_is_not_kept() {
        let (cache, made) = (cache(), Cell::new(0));
        for number in 0..1_000 {
            find(&cache, &format!("{number} {}", "x".repeat(500)), &made);
            assert!(cache.size().1 <= LIMITS.bytes_max);
        }
        let (young, _, _) = cache.size();
        assert!(young <= SHARDS, "one of them is as much as fits into a shard: {young}");
        let large = "y".repeat(1_000);
        let before = made.get();
        assert_eq!((find(&cache, &large, &made).len(), find(&cache, &large, &made).len()), (1_000, 1_000));
        assert_eq!(made.get(), before + 2);
    }
}
