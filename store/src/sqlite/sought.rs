//! Events that are looked for, in tables and in blocks: were they kept already?

use std::collections::HashMap;

use analytics_relay_providers::Event;

use crate::model::event::shown;

/// Events of one site that are looked for.
#[derive(Debug, Default)]
pub(crate) struct Sought {
    /// Ascending, each once.
    times: Vec<i64>,
    /// Their times, and their places in their batch, in which no id is twice.
    by_id: HashMap<String, (i64, usize)>,
}

impl Sought {
    pub(crate) fn of<'e>(events: impl Iterator<Item = (usize, &'e Event)>) -> Self {
        let by_id: HashMap<_, _> =
            events.map(|(at, event)| (event.id().as_str().to_owned(), (event.time_ms(), at))).collect();
        let mut times: Vec<i64> = by_id.values().map(|(time_ms, _)| *time_ms).collect();
        times.sort_unstable();
        times.dedup();
        Self { times, by_id }
    }

    /// Ascending, each once.
    pub(crate) fn times(&self) -> &[i64] {
        &self.times
    }

    pub(crate) fn has_time(&self, time_ms: i64) -> bool {
        self.times.binary_search(&time_ms).is_ok()
    }

    /// The place of the event that has a time, and an id as JSON.
    pub(crate) fn find(&self, time_ms: i64, id: &str) -> Option<usize> {
        let (of_it, at) = self.by_id.get(&*shown(id)?)?;
        (*of_it == time_ms).then_some(*at)
    }
}
