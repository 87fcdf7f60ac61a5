//! What came lately, in memory as it is in the table `hot`, and where readers and the
//! writer meet: a reader that takes its snapshot sees each event once, in a table here or
//! in a block, never in both.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use analytics_relay_providers::Event;

use super::table::Table;
use crate::model::{IdSet, event::shown};

/// A table, and where its events are in the file.
#[derive(Debug, Clone)]
pub(crate) struct HotTable {
    /// No other has it, as long as the process lives.
    pub(crate) id: u64,
    pub(crate) table: Table,
    /// Where they are in the table `hot`.
    pub(crate) rows_in_file: Vec<i64>,
    /// The first batch that it has something of.
    pub(crate) first_batch: i64,
    /// It grows no more, and becomes a block.
    pub(crate) is_closed: bool,
}

/// The tables of each site; only the last of one grows, and only until it is closed.
#[derive(Debug, Default)]
pub(crate) struct Hot {
    pub(crate) sites: HashMap<i64, Vec<Arc<HotTable>>>,
}

/// Rows, and bytes of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Size {
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
}

impl Size {
    /// True if it is no more than another.
    pub(crate) fn fits(self, max: Self) -> bool {
        self.rows <= max.rows && self.bytes <= max.bytes
    }
}

impl std::ops::AddAssign for Size {
    fn add_assign(&mut self, other: Self) {
        (self.rows, self.bytes) = (self.rows + other.rows, self.bytes + other.bytes);
    }
}

impl std::ops::SubAssign for Size {
    fn sub_assign(&mut self, other: Self) {
        (self.rows, self.bytes) = (self.rows - other.rows, self.bytes - other.bytes);
    }
}

impl Hot {
    pub(crate) fn size(&self) -> Size {
        let mut size = Size::default();
        self.tables().for_each(|(_, table)| size += table.size());
        size
    }

    pub(crate) fn tables(&self) -> impl Iterator<Item = (i64, &Arc<HotTable>)> {
        self.sites.iter().flat_map(|(site, tables)| tables.iter().map(move |table| (*site, table)))
    }
}

/// A table that is to become a block.
pub(crate) struct Closed {
    pub(crate) site: i64,
    pub(crate) table: Arc<HotTable>,
}

impl Hot {
    /// True if a table is there as it was.
    pub(crate) fn has(&self, closed: &Closed) -> bool {
        let mut tables = self.sites.get(&closed.site).into_iter().flatten();
        tables.any(|table| Arc::ptr_eq(table, &closed.table))
    }

    /// Takes out a table that became a block.
    pub(crate) fn remove(&mut self, closed: &Closed) {
        if let Some(tables) = self.sites.get_mut(&closed.site) {
            tables.retain(|table| !Arc::ptr_eq(table, &closed.table));
            if tables.is_empty() {
                self.sites.remove(&closed.site);
            }
        }
    }
}

impl HotTable {
    pub(crate) fn size(&self) -> Size {
        Size { rows: self.table.rows(), bytes: self.table.bytes() }
    }

    /// True if it has an event, by its time and id.
    pub(crate) fn has(&self, event: &Event) -> bool {
        let times = self.table.times.iter().enumerate();
        let mut of_its_time = times.filter(|(_, time_ms)| **time_ms == event.time_ms());
        of_its_time
            .any(|(row, _)| shown(self.table.ids.get(row as u32 + 1)).as_deref() == Some(event.id().as_str()))
    }
}

/// The one place where what is hot is changed: together with a commit.
#[derive(Debug, Default)]
pub(crate) struct Door(RwLock<Hot>);

impl Door {
    /// For taking a snapshot: as long as this is held nothing is committed.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Hot> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a commit, and what follows from it.
    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Hot> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last events that came, by the keys of their ids.
#[derive(Debug, Default)]
pub(crate) struct Window {
    set: IdSet,
    /// By batches, the oldest first.
    batches: VecDeque<(i64, Vec<u64>)>,
}

impl Window {
    pub(crate) fn contains(&self, id: u64) -> bool {
        self.set.contains(id)
    }

    pub(crate) fn len(&self) -> usize {
        self.set.len()
    }

    pub(crate) fn add(&mut self, n: i64, ids: Vec<u64>) {
        ids.iter().for_each(|id| {
            self.set.insert(*id);
        });
        self.batches.push_back((n, ids));
    }

    /// The first batch that is remembered.
    pub(crate) fn first_batch(&self) -> Option<i64> {
        self.batches.front().map(|(n, _)| *n)
    }

    /// The last batch that is to be forgotten so that no more than so many ids with these
    /// are remembered.
    pub(crate) fn outlived_by(&self, more: usize, ids_max: usize) -> Option<i64> {
        let mut left = self.len() + more;
        let mut last = None;
        for (n, ids) in &self.batches {
            if left <= ids_max {
                break;
            }
            left -= ids.len();
            last = Some(*n);
        }
        last
    }

    /// Forgets batches up to one.
    pub(crate) fn forget(&mut self, up_to: i64) {
        while self.batches.front().is_some_and(|(n, _)| *n <= up_to) {
            let (_, ids) = self.batches.pop_front().expect("there is a first one");
            ids.into_iter().for_each(|id| self.set.remove(id));
        }
    }
}

/// Version of the form in which batches are in `hot`.
const VERSION: u8 = 1;

/// Events as they are in `hot`: version, CRC-32 of the rest, and, by LZ4 with its length
/// before it, of each event its length (u32, little endian) and its JSON.
pub(crate) fn encode<'a>(events: impl Iterator<Item = &'a Event>) -> Vec<u8> {
    let mut plain = Vec::new();
    for event in events {
        let json = event.to_json();
        plain.extend((json.len() as u32).to_le_bytes());
        plain.extend(json);
    }
    let packed = lz4_flex::block::compress_prepend_size(&plain);
    let mut bytes = Vec::with_capacity(packed.len() + 5);
    bytes.push(VERSION);
    bytes.extend(crc32fast::hash(&packed).to_le_bytes());
    bytes.extend(packed);
    bytes
}

/// The events; `None` if the bytes are damaged.
pub(crate) fn decode(bytes: &[u8]) -> Option<Vec<Event>> {
    let (VERSION, rest) = bytes.split_first().map(|(version, rest)| (*version, rest))? else { return None };
    let (crc, packed) = rest.split_first_chunk()?;
    if crc32fast::hash(packed) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (size, _) = packed.split_first_chunk()?;
    if u32::from_le_bytes(*size) as usize / 255 > packed.len() {
        return None;
    }
    let plain = lz4_flex::block::decompress_size_prepended(packed).ok()?;
    let (mut rest, mut events) = (&plain[..], Vec::new());
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk()?;
        let (json, behind) = behind.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        events.push(Event::from_json(json).ok()?);
        rest = behind;
    }
    Some(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_comes_back_and_damage_is_noticed() {
        let json = br#"{"id":"1","kind":"track","name":"a","user_id":"u","time_ms":1,"accepted_ms":2,"properties":{}}"#;
        let events = vec![Event::from_json(json).unwrap(); 3];
        let bytes = encode(events.iter());
        assert_eq!(decode(&bytes), Some(events));
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 4;
            assert_eq!(decode(&bytes), None, "byte {at}");
            assert_eq!(decode(&bytes[..at]), None);
        }
    }

    #[test]
    fn a_window_forgets_whole_batches_and_the_oldest_first() {
        let mut window = Window::default();
        (0..5_u64).for_each(|n| window.add(n as i64, vec![n * 2 + 1, n * 2 + 2]));
        assert_eq!(window.outlived_by(0, 10), None);
        assert_eq!(window.outlived_by(1, 10), Some(0));
        assert_eq!(window.outlived_by(3, 10), Some(1));
        window.forget(1);
        assert_eq!((window.len(), window.contains(4), window.contains(5)), (6, false, true));
    }
}
