//! Events of one place, by time, as columns: what a question reads.

use std::{borrow::Cow, ops::Range, rc::Rc, sync::Arc};

use analytics_relay_providers::Event;

use super::{
    shred::left_at,
    table::{Dictionary, PATHS_MAX, Table, TextColumn, has_room, unmark},
    whole::{Part, Whole},
};
use crate::{
    Field, StoreError,
    model::{Class, IdMap, event::shown},
};

/// Events by time, as columns, each of which is read when it is asked for.
pub(crate) trait Chunk {
    /// How many.
    fn rows(&self) -> usize;

    /// True if some are of machines.
    fn has_bots(&self) -> bool;

    /// The first and the last time, where they are known without reading anything.
    fn bounds_ms(&self) -> Option<(i64, i64)>;

    /// Ascending.
    fn times(&self) -> Result<Rc<Vec<i64>>, StoreError>;

    /// Whose each row is; without codes, whose there are.
    fn who(&self, with_codes: bool) -> Result<KeyColumn, StoreError>;

    /// Of each row what its session is found by.
    fn sessions(&self) -> Result<KeyColumn, StoreError>;

    /// What each row is.
    fn classes(&self) -> Result<Rc<Classes>, StoreError>;

    /// The values of a field.
    fn field(&mut self, field: &Field) -> Result<Rc<Values>, StoreError>;

    /// The column of a path, if any row has it.
    fn path(&mut self, path: &str) -> Result<Option<TextColumn>, StoreError>;

    /// The paths that have a column, and whether there may be more that have none.
    fn paths(&mut self) -> Result<(Vec<String>, bool), StoreError>;

    /// What is left of rows without their values.
    fn skeletons(&self) -> Result<TextColumn, StoreError>;

    /// Some of the events.
    fn events(&mut self, rows: &[usize]) -> Result<Vec<Event>, StoreError>;

    /// What was found out about all of it, if it still holds.
    fn whole(&self) -> Option<Arc<Whole>> {
        None
    }

    /// True if what is found out about all of it is remembered.
    fn remembers(&self) -> bool {
        false
    }

    /// Remembers all parts of sessions that it has, without machines, and its views.
    fn remember(&self, _: &[Part], _: u64) {}
}

/// Keys of rows: `codes` are indexes of `keys`.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeyColumn {
    pub(crate) keys: Vec<u64>,
    pub(crate) codes: Vec<u32>,
}

impl KeyColumn {
    /// Each key once, in the order in which they come first.
    pub(crate) fn of(keys: impl Iterator<Item = u64>) -> Self {
        let (mut numbers, mut column) = (IdMap::default(), Self::default());
        for key in keys {
            // Zero is a key here and none in a map.
            let of_map = if key == 0 { u64::MAX } else { key };
            let (code, is_new) = numbers.get_or_insert(of_map, column.keys.len() as u32);
            if is_new {
                column.keys.push(key);
            }
            column.codes.push(code);
        }
        column
    }
}

/// Of each row a code, and of each code the class and whether it is a machine's.
pub(crate) struct Classes {
    pub(crate) codes: Vec<u32>,
    pub(crate) classes: Vec<(Class, bool)>,
}

/// The values of a field: of each row a code, and of each code a text.
pub(crate) struct Values {
    pub(crate) column: TextColumn,
    /// What the texts are.
    pub(crate) are: Are,
}

/// What the texts of values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Are {
    /// JSON.
    Json,
    /// Names with a mark before them.
    Marked,
    /// Themselves.
    Plain,
}

impl Values {
    /// How many codes there are.
    pub(crate) fn codes(&self) -> usize {
        self.column.texts.len() + 1
    }

    pub(crate) fn get(&self, code: u32) -> Option<Cow<'_, str>> {
        let text = self.column.texts.get(code);
        match self.are {
            _ if code == 0 => None,
            Are::Json => shown(text),
            Are::Marked => Some(unmark(text).2.into()),
            Are::Plain => Some(text.into()),
        }
    }
}

/// What marked names say of each row.
pub(crate) fn classes_of(what: TextColumn) -> Classes {
    let TextColumn { codes, texts } = what;
    let class = |code| {
        let (class, is_bot, _) = unmark(texts.get(code));
        (class, is_bot)
    };
    let classes = (0..=texts.len() as u32).map(class).collect();
    Classes { codes, classes }
}

/// The values of a field, from the columns of its paths: those of the first that has one.
pub(crate) fn values_at(
    field: &Field,
    rows: usize,
    mut path: impl FnMut(&str) -> Result<Option<TextColumn>, StoreError>,
) -> Result<Values, StoreError> {
    let mut all: Option<Values> = None;
    for at in field.paths() {
        let Some(column) = path(&at)? else { continue };
        let values = Values { column, are: Are::Json };
        all = Some(match all {
            None => values,
            Some(before) => else_of(before, &values),
        });
    }
    let none = || TextColumn { codes: vec![0; rows], texts: Dictionary::default() };
    Ok(all.unwrap_or_else(|| Values { column: none(), are: Are::Json }))
}

/// The values of a path that has no column, as there are too many: what was left of them in
/// the skeletons.
pub(crate) fn left(skeletons: &TextColumn, path: &str) -> TextColumn {
    let mut texts = Dictionary::default();
    let code = |code: u32| left_at(skeletons.texts.get(code), path).map_or(0, |value| texts.add(value));
    let renumbered: Vec<u32> = (0..=skeletons.texts.len() as u32).map(code).collect();
    let codes = skeletons.codes.iter().map(|code| renumbered[*code as usize]).collect();
    TextColumn { codes, texts }
}

/// A table in memory.
pub(crate) struct TableChunk<'t> {
    pub(crate) table: &'t Table,
    /// Rows by time.
    pub(crate) order: Arc<[u32]>,
}

impl Chunk for TableChunk<'_> {
    fn rows(&self) -> usize {
        self.table.rows()
    }

    fn has_bots(&self) -> bool {
        self.table.bots > 0
    }

    fn bounds_ms(&self) -> Option<(i64, i64)> {
        None
    }

    fn times(&self) -> Result<Rc<Vec<i64>>, StoreError> {
        Ok(Rc::new(self.order.iter().map(|row| self.table.times[*row as usize]).collect()))
    }

    fn who(&self, _: bool) -> Result<KeyColumn, StoreError> {
        Ok(KeyColumn::of(self.order.iter().map(|row| self.table.who[*row as usize])))
    }

    fn sessions(&self) -> Result<KeyColumn, StoreError> {
        Ok(KeyColumn::of(self.order.iter().map(|row| self.table.sessions[*row as usize])))
    }

    fn classes(&self) -> Result<Rc<Classes>, StoreError> {
        Ok(Rc::new(classes_of(ordered(&self.table.what, &self.order))))
    }

    fn field(&mut self, field: &Field) -> Result<Rc<Values>, StoreError> {
        if *field == Field::Name {
            let column = ordered(&self.table.what, &self.order);
            return Ok(Rc::new(Values { column, are: Are::Marked }));
        }
        Ok(Rc::new(values_at(field, self.rows(), |path| self.path(path))?))
    }

    fn path(&mut self, path: &str) -> Result<Option<TextColumn>, StoreError> {
        if let Some(column) = self.table.path(path) {
            return Ok(Some(ordered(column, &self.order)));
        }
        if has_room(path, self.table.paths.len()) {
            return Ok(None);
        }
        Ok(Some(left(&self.skeletons()?, path)))
    }

    fn paths(&mut self) -> Result<(Vec<String>, bool), StoreError> {
        let paths: Vec<String> = self.table.paths.iter().map(|column| column.path.to_string()).collect();
        let has_more = paths.len() >= PATHS_MAX;
        Ok((paths, has_more))
    }

    fn skeletons(&self) -> Result<TextColumn, StoreError> {
        Ok(ordered(&self.table.skeletons, &self.order))
    }

    fn events(&mut self, rows: &[usize]) -> Result<Vec<Event>, StoreError> {
        let event = |row: &usize| self.table.event(self.order[*row] as usize);
        let events: Option<_> = rows.iter().map(event).collect();
        events.ok_or_else(|| StoreError::Damaged("an event is none".into()))
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
