//! Answers that are kept for a while, in the process: bounded in count and bytes, those that
//! were not asked for the longest go first.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use tokio::time::Instant;

use super::report::Answer;

/// Most answers.
const ENTRIES_MAX: usize = 1_000;
/// Most memory of them.
const BYTES_MAX: usize = 16 << 20;
/// One that takes more is not kept: it would push out all others.
const ENTRY_BYTES_MAX: usize = BYTES_MAX / 4;
/// What an entry takes beside its answer and key, which stands there twice.
const ENTRY_BYTES: usize = 256;

/// An answer, and when the store was asked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) answer: Answer,
    /// Unix milliseconds.
    pub(crate) as_of_ms: i64,
}

#[derive(Debug)]
struct Entry {
    known: Arc<Known>,
    until: Instant,
    bytes: usize,
    /// Its place in the order of use.
    used: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<Arc<str>, Entry>,
    by_use: BTreeMap<u64, Arc<str>>,
    uses: u64,
    bytes: usize,
}

impl Cache {
    /// An answer that is still true.
    pub(super) fn get(&mut self, key: &str, now: Instant) -> Option<Arc<Known>> {
        let entry = self.entries.get_mut(key)?;
        if entry.until <= now {
            self.remove(key);
            return None;
        }
        self.uses += 1;
        let name = self.by_use.remove(&entry.used).expect("each entry has its place");
        entry.used = self.uses;
        self.by_use.insert(self.uses, name);
        Some(entry.known.clone())
    }

    /// Keeps an answer, if there is room for one of its size.
    pub(super) fn put(&mut self, key: &str, known: Arc<Known>, until: Instant) {
        self.remove(key);
        let bytes = known.answer.bytes() + 2 * key.len() + ENTRY_BYTES;
        if bytes > ENTRY_BYTES_MAX {
            return;
        }
        while self.entries.len() >= ENTRIES_MAX || self.bytes + bytes > BYTES_MAX {
            let Some((_, oldest)) = self.by_use.first_key_value() else { break };
            let oldest = oldest.clone();
            self.remove(&oldest);
        }
        self.uses += 1;
        self.bytes += bytes;
        let name: Arc<str> = key.into();
        self.by_use.insert(self.uses, name.clone());
        self.entries.insert(name, Entry { known, until, bytes, used: self.uses });
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Memory that the answers take.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn remove(&mut self, key: &str) {
        let Some(entry) = self.entries.remove(key) else { return };
        self.bytes -= entry.bytes;
        self.by_use.remove(&entry.used);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::query::event_count::NamedCount;

    fn known(name_bytes: usize) -> Arc<Known> {
        let count = NamedCount { name: "n".repeat(name_bytes), start_ms: 0, events: 1 };
        Arc::new(Known { answer: Answer::EventCount(vec![count]), as_of_ms: 7 })
    }

    fn check(cache: &Cache) {
        assert_eq!(cache.entries.len(), cache.by_use.len());
        assert_eq!(cache.bytes, cache.entries.values().map(|entry| entry.bytes).sum::<usize>());
        assert!(cache.bytes <= BYTES_MAX && cache.entries.len() <= ENTRIES_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_known_until_its_time_is_over() {
        let mut cache = Cache::default();
        let now = Instant::now();
        let second = Duration::from_secs(1);
        cache.put("a", known(1), now + second);
        assert!(cache.get("a", now + second / 2).is_some() && cache.get("b", now).is_none());
        assert!(cache.get("a", now + second).is_none());
        assert_eq!((cache.bytes(), cache.entries.len()), (0, 0), "and takes no room then");
        cache.put("a", known(1), now + second);
        cache.put("a", known(5), now + second);
        check(&cache);
        cache.clear();
        assert!(cache.get("a", now).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn whatever_is_asked_it_takes_no_more_than_it_may() {
        let mut cache = Cache::default();
        let (now, until) = (Instant::now(), Instant::now() + Duration::from_secs(60));
        cache.put("often", known(1), until);
        for at in 0..3 * ENTRIES_MAX {
            cache.put(&format!("{at}"), known(1), until);
            check(&cache);
            assert!(cache.get("often", now).is_some(), "what is asked for stays");
        }
        assert_eq!(cache.entries.len(), ENTRIES_MAX);
        for at in 0..40 {
            cache.put(&format!("large {at}"), known(1 << 20), until);
            check(&cache);
        }
        cache.put("too large", known(ENTRY_BYTES_MAX), until);
        assert!(cache.get("too large", now).is_none() && cache.get("large 39", now).is_some());
    }
}
