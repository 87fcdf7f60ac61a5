//! What came lately, in memory as it is in the table `hot`, and where readers and the
//! writer meet: a reader that takes its snapshot sees each event once, in a table here or
//! in a block, never in both.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use analytics_relay_providers::Event;

use super::sought::Sought;
use crate::{StoreError, model::IdSet, scan::table::Table};

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
    /// What it has is of clocks that are ahead.
    pub(crate) is_ahead: bool,
    /// It grows no more, and becomes a block.
    pub(crate) is_closed: bool,
    /// Its rows by time, once a question needs them; and how they stood before it grew.
    order: OnceLock<Arc<[u32]>>,
    order_before: Arc<[u32]>,
}

/// From so far behind the time at which it was accepted on an event is kept apart: in the
/// block of the others it would make that cover the time to come, and everything that comes
/// then would be looked for in it.
const AHEAD_MS: i64 = 5 * 60_000;

/// True if an event is of a clock that is ahead.
pub(crate) fn is_ahead(event: &Event) -> bool {
    event.time_ms() > event.accepted_ms().saturating_add(AHEAD_MS)
}

/// The tables of each site. Two of one grow, each until it is closed: the last of those that
/// are of clocks that are ahead, and of the others.
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

    pub(crate) fn tables(&self) -> impl Iterator<Item = (i64, &Arc<HotTable>)> + Clone {
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

    /// The table of a site that grows, or was the last to grow.
    pub(crate) fn last(&self, site: i64, is_ahead: bool) -> Option<&Arc<HotTable>> {
        self.sites.get(&site)?.iter().rfind(|table| table.is_ahead == is_ahead)
    }

    pub(crate) fn last_mut(&mut self, site: i64, is_ahead: bool) -> Option<&mut Arc<HotTable>> {
        self.sites.get_mut(&site)?.iter_mut().rfind(|table| table.is_ahead == is_ahead)
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
    /// An empty one.
    pub(crate) fn new(id: u64, table: Table, first_batch: i64, is_ahead: bool) -> Self {
        Self {
            id,
            table,
            rows_in_file: Vec::new(),
            first_batch,
            is_ahead,
            is_closed: false,
            order: OnceLock::new(),
            order_before: Arc::default(),
        }
    }

    /// Another table in the place of this one's.
    pub(crate) fn with(&self, id: u64, table: Table) -> Self {
        let rows_in_file = self.rows_in_file.clone();
        Self {
            rows_in_file,
            is_closed: self.is_closed,
            ..Self::new(id, table, self.first_batch, self.is_ahead)
        }
    }

    /// Adds events, which stand in a row of the table `hot`.
    pub(crate) fn add<'a>(&mut self, row_in_file: i64, events: impl Iterator<Item = &'a Event>) {
        self.rows_in_file.push(row_in_file);
        events.for_each(|event| self.table.push(event));
        if let Some(order) = self.order.take() {
            self.order_before = order;
        }
    }

    /// Its rows by time, those of one time by id.
    pub(crate) fn order(&self) -> Arc<[u32]> {
        self.order.get_or_init(|| self.table.order(&self.order_before).into()).clone()
    }

    pub(crate) fn size(&self) -> Size {
        Size { rows: self.table.rows(), bytes: self.table.bytes() }
    }

    /// Finds those of events that it has.
    pub(crate) fn find(&self, sought: &Sought, found: &mut Vec<usize>) {
        let of_their_times = (1..).zip(&self.table.times).filter(|(_, time_ms)| sought.has_time(**time_ms));
        found.extend(
            of_their_times.filter_map(|(row, time_ms)| sought.find(*time_ms, self.table.ids.get(row))),
        );
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
    /// Those of ids that are remembered.
    pub(crate) fn knows(&self, ids: &[u64]) -> Vec<bool> {
        self.set.has(ids)
    }

    pub(crate) fn len(&self) -> usize {
        self.set.len()
    }

    pub(crate) fn add(&mut self, n: i64, ids: Vec<u64>) {
        self.set.extend(ids.iter().copied());
        self.batches.push_back((n, ids));
    }

    /// Forgets what a batch had, but for some.
    pub(crate) fn retain_of(&mut self, n: i64, keep: &IdSet) {
        for (_, ids) in self.batches.iter_mut().filter(|(one, _)| *one == n) {
            let lost = ids.extract_if(.., |id| !keep.contains(*id));
            lost.for_each(|id| self.set.remove(id));
        }
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
            self.set.remove_all(&ids);
        }
    }
}

/// Version of the form in which batches are in `hot`.
const VERSION: u8 = 1;
/// Most bytes of a batch's events of one site: so no text of a table ever ends behind what
/// four bytes can say.
const BATCH_BYTES_MAX: usize = 256 << 20;

/// Events as they are in `hot`: version, CRC-32 of the rest, and, by LZ4 with its length
/// before it, of each event its length (u32, little endian) and its JSON.
pub(crate) fn encode<'a>(events: impl Iterator<Item = &'a Event>) -> Result<Vec<u8>, StoreError> {
    let mut plain = Vec::new();
    for event in events {
        let json = event.to_json();
        plain.extend((json.len() as u32).to_le_bytes());
        plain.extend(json);
        if plain.len() > BATCH_BYTES_MAX {
            let want = format!("at most {BATCH_BYTES_MAX} bytes");
            return Err(StoreError::invalid("batch", format!("{} bytes", plain.len()), want));
        }
    }
    let packed = lz4_flex::block::compress_prepend_size(&plain);
    let mut bytes = Vec::with_capacity(packed.len() + 5);
    bytes.push(VERSION);
    bytes.extend(crc32fast::hash(&packed).to_le_bytes());
    bytes.extend(packed);
    Ok(bytes)
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
        let bytes = encode(events.iter()).unwrap();
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
        assert_eq!((window.len(), window.knows(&[4, 5])), (6, vec![false, true]));
    }
}
