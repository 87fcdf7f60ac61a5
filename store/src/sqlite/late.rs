//! Events whose ids are remembered no more: were they kept already? A block that has their
//! time is asked. An id that comes again with another time is not found out here.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use rusqlite::{Connection, params};

use super::{
    Counters,
    block::{BlockMeta, column},
    codec,
    sought::Sought,
};
use crate::{StoreError, error::at_second_look};

/// Blocks whose times are kept: a quarter of a megabyte each.
const BLOCKS_MAX: usize = 32;

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
        sought: &Sought,
        counters: &Counters,
        found: &mut Vec<usize>,
    ) -> Result<(), StoreError> {
        let (Some(first), Some(last)) = (sought.times().first(), sought.times().last()) else {
            return Ok(());
        };
        let sql = format!(
            "SELECT {} FROM block WHERE site = ?1 AND last_ms >= ?2 AND first_ms <= ?3",
            BlockMeta::COLUMNS
        );
        let mut statement = connection.prepare_cached(&sql)?;
        let mut blocks = statement.query(params![site, first, last])?;
        while let Some(row) = blocks.next()? {
            let meta = BlockMeta::read(row)?;
            let its = sought.times().partition_point(|time_ms| *time_ms < meta.first_ms);
            if sought.times().get(its).is_none_or(|time_ms| *time_ms > meta.last_ms) {
                continue;
            }
            match at_second_look(|| self.find_in(connection, (meta.id, meta.rows), sought, found)) {
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
        sought: &Sought,
        found: &mut Vec<usize>,
    ) -> Result<(), StoreError> {
        let times = self.times(connection, block, rows)?;
        let rows_at = |time_ms: &i64| {
            let first = times.partition_point(|time| time < time_ms);
            let count = times[first..].iter().take_while(|time| *time == time_ms).count();
            first..first + count
        };
        let mut of_their_times = sought.times().iter().flat_map(rows_at).peekable();
        if of_their_times.peek().is_none() {
            return Ok(());
        }
        let ids = codec::decode_texts(&column(connection, block, codec::IDS)?, rows)?;
        found.extend(of_their_times.filter_map(|row| sought.find(times[row], ids.get(row))));
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
