//! Events of one place in the file or in memory, by time, as columns: what a question
//! reads.

use std::{borrow::Cow, cell::OnceCell, ops::Range, rc::Rc, sync::Arc};

use analytics_relay_providers::Event;
use rusqlite::{Connection, OptionalExtension, Row};

use super::{
    codec::{self, KeyColumn},
    hot::HotTable,
    shred::{left_at, put_together},
    table::{Dictionary, PATHS_MAX, TextColumn, has_room, unmark},
};
use crate::{
    Field, StoreError,
    model::{Class, event::shown},
};

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
}

/// A block, or a table that is none yet.
pub(crate) enum Chunk<'c> {
    /// In the file.
    Block {
        connection: &'c Connection,
        meta: &'c BlockMeta,
        directory: Option<Vec<String>>,
        /// What more than one part of a question reads.
        read: Read,
    },
    /// In memory.
    Hot {
        table: &'c HotTable,
        /// Rows by time.
        order: Arc<[u32]>,
    },
}

/// Columns that were decoded.
#[derive(Default)]
pub(crate) struct Read {
    times: OnceCell<Rc<Vec<i64>>>,
    classes: OnceCell<Rc<Classes>>,
    /// Each field once, whatever number of filters and steps ask for it.
    fields: Vec<(Field, Rc<Values>)>,
}

/// Of each row a code, and of each code the class and whether it is a machine's.
pub(crate) struct Classes {
    pub(crate) codes: Vec<u32>,
    pub(crate) classes: Vec<(Class, bool)>,
}

/// The values of a field: of each row a code, and of each code a text.
pub(crate) struct Values {
    pub(crate) column: TextColumn,
    /// Texts are JSON; else they have a mark before them.
    is_json: bool,
}

impl Values {
    /// How many codes there are.
    pub(crate) fn codes(&self) -> usize {
        self.column.texts.len() + 1
    }

    pub(crate) fn get(&self, code: u32) -> Option<Cow<'_, str>> {
        match (code, self.is_json) {
            (0, _) => None,
            (_, true) => shown(self.column.texts.get(code)),
            (_, false) => Some(unmark(self.column.texts.get(code)).2.into()),
        }
    }
}

impl<'c> Chunk<'c> {
    pub(crate) fn block(connection: &'c Connection, meta: &'c BlockMeta) -> Self {
        Self::Block { connection, meta, directory: None, read: Read::default() }
    }

    pub(crate) fn hot(table: &'c Arc<HotTable>) -> Self {
        Self::Hot { table, order: table.order() }
    }

    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Block { meta, .. } => meta.rows,
            Self::Hot { table, .. } => table.table.rows(),
        }
    }

    pub(crate) fn has_bots(&self) -> bool {
        match self {
            Self::Block { meta, .. } => meta.bots > 0,
            Self::Hot { table, .. } => table.table.bots > 0,
        }
    }

    /// The first and the last time, of a block that was not looked into.
    pub(crate) fn bounds_ms(&self) -> Option<(i64, i64)> {
        match self {
            Self::Block { meta, .. } => Some((meta.first_ms, meta.last_ms)),
            Self::Hot { .. } => None,
        }
    }

    pub(crate) fn times(&self) -> Result<Rc<Vec<i64>>, StoreError> {
        match self {
            Self::Block { meta, read, .. } => {
                if let Some(times) = read.times.get() {
                    return Ok(times.clone());
                }
                let times = codec::decode_times(&self.read(codec::TIMES)?, meta.rows)?;
                Ok(read.times.get_or_init(|| Rc::new(times)).clone())
            }
            Self::Hot { table, order } => {
                Ok(Rc::new(order.iter().map(|row| table.table.times[*row as usize]).collect()))
            }
        }
    }

    /// Whose each row is; without codes, whose there are.
    pub(crate) fn who(&self, with_codes: bool) -> Result<KeyColumn, StoreError> {
        match self {
            Self::Block { meta, .. } => {
                Ok(codec::decode_keys(&self.read(codec::WHO)?, meta.rows, with_codes)?)
            }
            Self::Hot { table, order } => {
                Ok(KeyColumn::of(order.iter().map(|row| table.table.who[*row as usize])))
            }
        }
    }

    pub(crate) fn sessions(&self) -> Result<KeyColumn, StoreError> {
        match self {
            Self::Block { meta, .. } => {
                Ok(codec::decode_keys(&self.read(codec::SESSIONS)?, meta.rows, true)?)
            }
            Self::Hot { table, order } => {
                Ok(KeyColumn::of(order.iter().map(|row| table.table.sessions[*row as usize])))
            }
        }
    }

    pub(crate) fn classes(&self) -> Result<Rc<Classes>, StoreError> {
        if let Self::Block { read, .. } = self
            && let Some(classes) = read.classes.get()
        {
            return Ok(classes.clone());
        }
        let TextColumn { codes, texts } = self.what()?;
        let class = |code| {
            let (class, is_bot, _) = unmark(texts.get(code));
            (class, is_bot)
        };
        let classes = (0..=texts.len() as u32).map(class).collect();
        let classes = Rc::new(Classes { codes, classes });
        match self {
            Self::Block { read, .. } => Ok(read.classes.get_or_init(|| classes).clone()),
            Self::Hot { .. } => Ok(classes),
        }
    }

    fn what(&self) -> Result<TextColumn, StoreError> {
        match self {
            Self::Block { meta, .. } => Ok(codec::decode_texts(&self.read(codec::WHAT)?, meta.rows)?),
            Self::Hot { table, order } => Ok(ordered(&table.table.what, order)),
        }
    }

    /// The values of a field.
    pub(crate) fn field(&mut self, field: &Field) -> Result<Rc<Values>, StoreError> {
        if let Self::Block { read, .. } = self
            && let Some((_, values)) = read.fields.iter().find(|(one, _)| one == field)
        {
            return Ok(values.clone());
        }
        let values = Rc::new(self.decode_field(field)?);
        if let Self::Block { read, .. } = self {
            read.fields.push((field.clone(), values.clone()));
        }
        Ok(values)
    }

    fn decode_field(&mut self, field: &Field) -> Result<Values, StoreError> {
        if *field == Field::Name {
            return Ok(Values { column: self.what()?, is_json: false });
        }
        let mut all: Option<Values> = None;
        for path in field.paths() {
            let Some(column) = self.path(&path)? else { continue };
            let values = Values { column, is_json: true };
            all = Some(match all {
                None => values,
                Some(before) => else_of(before, &values),
            });
        }
        let none = || TextColumn { codes: vec![0; self.rows()], texts: Dictionary::default() };
        Ok(all.unwrap_or_else(|| Values { column: none(), is_json: true }))
    }

    /// The column of a path, if any row has it.
    pub(crate) fn path(&mut self, path: &str) -> Result<Option<TextColumn>, StoreError> {
        let place = match self {
            Self::Block { .. } => self.directory()?.iter().position(|one| one == path),
            Self::Hot { table, order } => {
                if let Some(column) = table.table.path(path) {
                    return Ok(Some(ordered(column, order)));
                }
                None
            }
        };
        let columns = match self {
            Self::Block { directory, .. } => directory.as_ref().map_or(0, Vec::len),
            Self::Hot { table, .. } => table.table.paths.len(),
        };
        match place {
            Some(place) => Ok(Some(self.values(place)?)),
            None if has_room(path, columns) => Ok(None),
            None => self.left(path).map(Some),
        }
    }

    /// The paths that have a column, and whether there may be more that have none.
    pub(crate) fn paths(&mut self) -> Result<(Vec<String>, bool), StoreError> {
        let paths: Vec<String> = match self {
            Self::Block { .. } => self.directory()?.to_vec(),
            Self::Hot { table, .. } => {
                table.table.paths.iter().map(|column| column.path.to_string()).collect()
            }
        };
        let has_more = paths.len() >= PATHS_MAX;
        Ok((paths, has_more))
    }

    fn directory(&mut self) -> Result<&[String], StoreError> {
        let read = match self {
            Self::Block { directory: None, .. } => {
                Some(codec::decode_directory(&self.read(codec::DIRECTORY)?)?)
            }
            _ => None,
        };
        match self {
            Self::Block { directory, .. } => {
                if let Some(read) = read {
                    *directory = Some(read);
                }
                Ok(directory.as_deref().unwrap_or_default())
            }
            Self::Hot { .. } => Ok(&[]),
        }
    }

    fn values(&self, place: usize) -> Result<TextColumn, StoreError> {
        let number = u8::try_from(place + usize::from(codec::VALUES));
        let number = number.map_err(|_| codec::Damaged("it names too many columns"))?;
        Ok(codec::decode_texts(&self.read(number)?, self.rows())?)
    }

    /// The values of a path that has no column, as there are too many: what was left of
    /// them in the skeletons.
    fn left(&self, path: &str) -> Result<TextColumn, StoreError> {
        let skeletons = self.skeletons()?;
        let mut texts = Dictionary::default();
        let code = |code: u32| left_at(skeletons.texts.get(code), path).map_or(0, |value| texts.add(value));
        let renumbered: Vec<u32> = (0..=skeletons.texts.len() as u32).map(code).collect();
        let codes = skeletons.codes.iter().map(|code| renumbered[*code as usize]).collect();
        Ok(TextColumn { codes, texts })
    }

    /// What is left of rows without their values.
    pub(crate) fn skeletons(&self) -> Result<TextColumn, StoreError> {
        match self {
            Self::Block { meta, .. } => Ok(codec::decode_texts(&self.read(codec::SKELETONS)?, meta.rows)?),
            Self::Hot { table, order } => Ok(ordered(&table.table.skeletons, order)),
        }
    }

    /// The ids of rows, as JSON.
    pub(crate) fn ids(&self) -> Result<TextColumn, StoreError> {
        match self {
            Self::Block { meta, .. } => Ok(codec::decode_texts(&self.read(codec::IDS)?, meta.rows)?),
            Self::Hot { table, order } => {
                let mut texts = Dictionary::default();
                let codes = order.iter().map(|row| texts.add(table.table.ids.get(row + 1))).collect();
                Ok(TextColumn { codes, texts })
            }
        }
    }

    /// Some of the events.
    pub(crate) fn events(&mut self, rows: impl Iterator<Item = usize>) -> Result<Vec<Event>, StoreError> {
        if let Self::Hot { table, order } = self {
            let event = |row: usize| table.table.event(order[row] as usize);
            return rows
                .map(event)
                .collect::<Option<_>>()
                .ok_or_else(|| codec::Damaged("an event is none").into());
        }
        let (times, ids, skeletons) = (self.times()?, self.ids()?, self.skeletons()?);
        let delays = codec::decode_delays(&self.read(codec::ACCEPTED)?, self.rows())?;
        let paths = self.directory()?.to_vec();
        let columns = (0..paths.len()).map(|place| self.values(place)).collect::<Result<Vec<_>, _>>()?;
        let event = |row: usize| {
            let json = put_together(skeletons.get(row), |path, json| {
                match path {
                    "time_ms" => json.push_str(&times[row].to_string()),
                    "accepted_ms" => json.push_str(&times[row].wrapping_add(delays[row]).to_string()),
                    "id" => json.push_str(ids.get(row)),
                    path => json.push_str(columns[paths.iter().position(|one| one == path)?].get(row)),
                }
                Some(())
            })?;
            Event::from_json(json.as_bytes()).ok()
        };
        rows.map(event).collect::<Option<_>>().ok_or_else(|| codec::Damaged("an event is none").into())
    }

    fn read(&self, number: u8) -> Result<Vec<u8>, StoreError> {
        match self {
            Self::Block { meta: BlockMeta { is_damaged: true, .. }, .. } => {
                Err(codec::Damaged("what is known of it is not what was written").into())
            }
            Self::Block { connection, meta, .. } => column(connection, meta.id, number),
            Self::Hot { .. } => Ok(Vec::new()),
        }
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

fn ordered(column: &TextColumn, order: &[u32]) -> TextColumn {
    let code = |row: &u32| column.codes.get(*row as usize).copied().unwrap_or_default();
    TextColumn { codes: order.iter().map(code).collect(), texts: column.texts.clone() }
}

/// The values of one, and where that has none those of another.
fn else_of(mut one: Values, other: &Values) -> Values {
    let has: Vec<bool> = (0..one.codes() as u32).map(|code| one.get(code).is_some()).collect();
    let texts = &mut one.column.texts;
    let added: Vec<u32> = std::iter::once(0)
        .chain((1..other.codes() as u32).map(|code| texts.add(other.column.texts.get(code))))
        .collect();
    for (code, other) in one.column.codes.iter_mut().zip(&other.column.codes) {
        if !has[*code as usize] {
            *code = added[*other as usize];
        }
    }
    one
}

/// The rows of ascending times that are in a range.
pub(crate) fn rows_in(times: &[i64], range_ms: &Range<i64>) -> Range<usize> {
    let start = times.partition_point(|time| *time < range_ms.start);
    let end = times.partition_point(|time| *time < range_ms.end);
    start..end.max(start)
}
