//! A block of the file: what is known of it without reading it, and its columns.

use std::ops::Range;

use rusqlite::{Connection, OptionalExtension, Row};

use super::codec;
use crate::StoreError;

/// What is known of a block without reading it.
#[derive(Debug, Clone)]
pub(crate) struct BlockMeta {
    pub(crate) id: i64,
    pub(crate) site: i64,
    pub(crate) rows: usize,
    pub(crate) first_ms: i64,
    pub(crate) last_ms: i64,
    pub(crate) bots: usize,
    pub(crate) sessions: usize,
    /// Of memory, that its events take, about.
    pub(crate) bytes: usize,
    /// The numbers are not those that were written: it may be of any time.
    pub(crate) is_damaged: bool,
}

impl BlockMeta {
    /// What [`Self::read`] reads.
    pub(crate) const COLUMNS: &str =
        "block.id, block.site, rows, bytes, first_ms, last_ms, bots, sessions, crc";

    pub(crate) fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let (id, crc): (i64, i64) = (row.get(0)?, row.get(8)?);
        let mut numbers = [0; 7];
        for (number, at) in numbers.iter_mut().zip(1..) {
            *number = row.get(at)?;
        }
        let [site, rows, bytes, first_ms, last_ms, bots, sessions] = numbers;
        if Self::crc(id, numbers) != crc {
            let (rows, bytes, bots, sessions) = Default::default();
            let (first_ms, last_ms) = (i64::MIN, i64::MAX);
            return Ok(Self { id, site, rows, bytes, first_ms, last_ms, bots, sessions, is_damaged: true });
        }
        let [rows, bytes, bots, sessions] = [rows, bytes, bots, sessions].map(|size| size.max(0) as usize);
        Ok(Self { id, site, rows, bytes, first_ms, last_ms, bots, sessions, is_damaged: false })
    }

    /// Of an id, and what stands beside it: site, rows, bytes, times, bots and sessions.
    pub(crate) fn crc(id: i64, numbers: [i64; 7]) -> i64 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&id.to_le_bytes());
        numbers.iter().for_each(|number| hasher.update(&number.to_le_bytes()));
        hasher.finalize().into()
    }

    /// True if it may have events of a range.
    pub(crate) fn overlaps(&self, range_ms: &Range<i64>) -> bool {
        self.first_ms < range_ms.end && self.last_ms >= range_ms.start
    }
}

/// A column of a block.
pub(crate) fn column(connection: &Connection, block: i64, number: u8) -> Result<Vec<u8>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT data FROM col WHERE k = ?1")?;
    let data = statement.query_row([block << 8 | i64::from(number)], |row| row.get(0)).optional()?;
    data.ok_or(StoreError::Damaged(GONE.into()))
}

/// What is said of a block that is not there, which a snapshot of another time may be why.
pub(crate) const GONE: &str = "a column is not there";

impl From<codec::Damaged> for StoreError {
    fn from(damaged: codec::Damaged) -> Self {
        Self::Damaged(damaged.to_string())
    }
}
