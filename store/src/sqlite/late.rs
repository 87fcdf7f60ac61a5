//! Events whose ids are remembered no more: were they kept already? A block that has their
//! time is asked. An id that comes again with another time is not found out here.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, atomic::Ordering},
};

use analytics_relay_providers::Event;
use rusqlite::{Connection, OptionalExtension, params};

use super::{Counters, codec};
use crate::{StoreError, error::at_second_look, model::event::shown};

/// Blocks whose times are kept: a quarter of a megabyte each.
const BLOCKS_MAX: usize = 16;

/// What is remembered of blocks.
#[derive(Debug, Default)]
pub(crate) struct Late {
    /// The latest time in a block, by site.
    newest_ms: HashMap<i64, Option<i64>>,
    times: VecDeque<(i64, Arc<Vec<i64>>)>,
}

impl Late {
    /// A block was made.
    pub(crate) fn block_came(&mut self, site: i64, last_ms: i64) {
        if let Some(newest) = self.newest_ms.get_mut(&site) {
            *newest = (*newest).max(Some(last_ms));
        }
    }

    /// True if a block has the event.
    pub(crate) fn is_there(
        &mut self,
        connection: &Connection,
        site: i64,
        event: &Event,
        counters: &Counters,
    ) -> Result<bool, StoreError> {
        let time_ms = event.time_ms();
        let newest = match self.newest_ms.get(&site) {
            Some(newest) => *newest,
            None => {
                let sql = "SELECT max(last_ms) FROM block WHERE site = ?1";
                let newest = connection.prepare_cached(sql)?.query_row([site], |row| row.get(0))?;
                self.newest_ms.insert(site, newest);
                newest
            }
        };
        if newest.is_none_or(|newest| newest < time_ms) {
            return Ok(false);
        }
        let sql = "SELECT id, rows FROM block WHERE site = ?1 AND last_ms >= ?2 AND first_ms <= ?2";
        let mut statement = connection.prepare_cached(sql)?;
        let blocks = statement
            .query_map(params![site, time_ms], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as usize)))?;
        for block in blocks.collect::<Result<Vec<_>, _>>()? {
            match at_second_look(|| self.has(connection, block, event)) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                // What it had is lost, and this may bring it back.
                Err(StoreError::Damaged(_)) => {
                    counters.damaged_reads.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn has(
        &mut self,
        connection: &Connection,
        (block, rows): (i64, usize),
        event: &Event,
    ) -> Result<bool, StoreError> {
        let times = self.times(connection, block, rows)?;
        let first = times.partition_point(|time| *time < event.time_ms());
        let behind = times.partition_point(|time| *time <= event.time_ms());
        if first == behind {
            return Ok(false);
        }
        let ids = codec::decode_texts(&column(connection, block, codec::IDS)?, rows)?;
        Ok((first..behind).any(|row| shown(ids.get(row)).as_deref() == Some(event.id().as_str())))
    }

    fn times(
        &mut self,
        connection: &Connection,
        block: i64,
        rows: usize,
    ) -> Result<Arc<Vec<i64>>, StoreError> {
        if let Some((_, times)) = self.times.iter().find(|(one, _)| *one == block) {
            return Ok(times.clone());
        }
        let times = Arc::new(codec::decode_times(&column(connection, block, codec::TIMES)?, rows)?);
        if self.times.len() == BLOCKS_MAX {
            self.times.pop_front();
        }
        self.times.push_back((block, times.clone()));
        Ok(times)
    }
}

fn column(connection: &Connection, block: i64, number: u8) -> Result<Vec<u8>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT data FROM col WHERE k = ?1")?;
    let data = statement.query_row([block << 8 | i64::from(number)], |row| row.get(0)).optional()?;
    data.ok_or_else(|| StoreError::Damaged(format!("block {block} has no column {number}")))
}
