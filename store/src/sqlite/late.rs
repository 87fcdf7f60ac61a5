//! Events whose ids are remembered no more: were they kept already? A block that has their
//! time is asked. An id that comes again with another time is not found out here.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use analytics_relay_providers::Event;
use rusqlite::{Connection, params};

use super::{
    Counters,
    chunk::{BlockMeta, column},
    codec,
};
use crate::{StoreError, error::at_second_look, model::event::shown};

/// Blocks whose times are kept: a quarter of a megabyte each.
const BLOCKS_MAX: usize = 32;

/// Events of one site that are looked for.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// Ascending, each once.
    times: Vec<i64>,
    /// Their times, and their places in their batch, in which no id is twice.
    by_id: HashMap<String, (i64, usize)>,
}

impl Wanted {
    pub(crate) fn of<'e>(events: impl Iterator<Item = (usize, &'e Event)>) -> Self {
        let by_id: HashMap<_, _> =
            events.map(|(at, event)| (event.id().as_str().to_owned(), (event.time_ms(), at))).collect();
        let mut times: Vec<i64> = by_id.values().map(|(time_ms, _)| *time_ms).collect();
        times.sort_unstable();
        times.dedup();
        Self { times, by_id }
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

/// What is remembered of blocks.
#[derive(Debug, Default)]
pub(crate) struct Late {
    /// The latest time in a block, by site.
    last_ms: HashMap<i64, i64>,
    times: VecDeque<(i64, Arc<Vec<i64>>)>,
}

impl Late {
    /// A block was made.
    pub(crate) fn block_came(&mut self, site: i64, last_ms: i64) {
        if let Some(last) = self.last_ms.get_mut(&site) {
            *last = last_ms.max(*last);
        }
    }

    /// The latest time in a block of a site.
    pub(crate) fn last_ms(&mut self, connection: &Connection, site: i64) -> Result<i64, StoreError> {
        if let Some(last) = self.last_ms.get(&site) {
            return Ok(*last);
        }
        let sql = "SELECT max(last_ms) FROM block WHERE site = ?1";
        let last: Option<i64> = connection.prepare_cached(sql)?.query_row([site], |row| row.get(0))?;
        let last = last.unwrap_or(i64::MIN);
        self.last_ms.insert(site, last);
        Ok(last)
    }

    /// Finds those of events that are in blocks; each block is asked once for all of them.
    pub(crate) fn find(
        &mut self,
        connection: &Connection,
        site: i64,
        wanted: &Wanted,
        counters: &Counters,
        found: &mut Vec<usize>,
    ) -> Result<(), StoreError> {
        let (Some(first), Some(last)) = (wanted.times.first(), wanted.times.last()) else { return Ok(()) };
        let sql = format!(
            "SELECT {} FROM block WHERE site = ?1 AND last_ms >= ?2 AND first_ms <= ?3",
            BlockMeta::COLUMNS
        );
        let mut statement = connection.prepare_cached(&sql)?;
        let mut blocks = statement.query(params![site, first, last])?;
        while let Some(row) = blocks.next()? {
            let meta = BlockMeta::read(row)?;
            let its = wanted.times.partition_point(|time_ms| *time_ms < meta.first_ms);
            if wanted.times.get(its).is_none_or(|time_ms| *time_ms > meta.last_ms) {
                continue;
            }
            match at_second_look(|| self.find_in(connection, (meta.id, meta.rows), wanted, found)) {
                Ok(()) => {}
                // What it had is lost, and this may bring it back.
                Err(StoreError::Damaged(_)) => {
                    counters.lost(&meta);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn find_in(
        &mut self,
        connection: &Connection,
        (block, rows): (i64, usize),
        wanted: &Wanted,
        found: &mut Vec<usize>,
    ) -> Result<(), StoreError> {
        let times = self.times(connection, block, rows)?;
        let rows_at = |time_ms: &i64| {
            let first = times.partition_point(|time| time < time_ms);
            let count = times[first..].iter().take_while(|time| *time == time_ms).count();
            first..first + count
        };
        let mut of_their_times = wanted.times.iter().flat_map(rows_at).peekable();
        if of_their_times.peek().is_none() {
            return Ok(());
        }
        let ids = codec::decode_texts(&column(connection, block, codec::IDS)?, rows)?;
        found.extend(of_their_times.filter_map(|row| wanted.find(times[row], ids.get(row))));
        Ok(())
    }

    fn times(
        &mut self,
        connection: &Connection,
        block: i64,
        rows: usize,
    ) -> Result<Arc<Vec<i64>>, StoreError> {
        let known = self.times.iter().position(|(one, _)| *one == block);
        let one = match known.and_then(|place| self.times.remove(place)) {
            Some(known) => known,
            None => (block, Arc::new(codec::decode_times(&column(connection, block, codec::TIMES)?, rows)?)),
        };
        if self.times.len() == BLOCKS_MAX {
            self.times.pop_front();
        }
        // What was asked last goes last.
        self.times.push_back(one.clone());
        Ok(one.1)
    }
}
