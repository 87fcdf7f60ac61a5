//! A block of the file, as a question reads it.

use std::{cell::OnceCell, rc::Rc, sync::Arc};

use analytics_relay_providers::Event;
use rusqlite::Connection;

use super::{
    block::{BlockMeta, column},
    codec,
    memo::{Around, Known},
};
use crate::{
    Field, StoreError,
    scan::{
        chunk::{Are, Chunk, Classes, KeyColumn, Values, classes_of, left, values_at},
        shred::put_together,
        table::{PATHS_MAX, TextColumn, has_room},
        whole::{Part, Whole},
    },
};

/// A block, of which columns are decoded as they are asked for.
pub(crate) struct Block<'c> {
    connection: &'c Connection,
    meta: &'c BlockMeta,
    /// What is beside it, where something is remembered.
    around: Option<&'c Around<'c>>,
    known: OnceCell<Option<Known>>,
    /// What this question has found out about it.
    whole: OnceCell<Arc<Whole>>,
    directory: Option<Vec<String>>,
    /// What more than one part of a question reads.
    read: Read,
}

/// Columns that were decoded.
#[derive(Default)]
struct Read {
    times: OnceCell<Rc<Vec<i64>>>,
    classes: OnceCell<Rc<Classes>>,
    /// Each field once, whatever number of filters and steps ask for it.
    fields: Vec<(Field, Rc<Values>)>,
}

impl<'c> Block<'c> {
    pub(crate) fn new(connection: &'c Connection, meta: &'c BlockMeta) -> Self {
        let (known, whole) = Default::default();
        Self { connection, meta, around: None, known, whole, directory: None, read: Read::default() }
    }

    /// One of which something may be remembered.
    pub(crate) fn among(self, around: Option<&'c Around<'c>>) -> Self {
        Self { around, ..self }
    }

    /// What is known of it among those that are near it.
    fn known(&self) -> Option<&Known> {
        self.known.get_or_init(|| self.around?.known(self.connection, self.meta)).as_ref()
    }

    /// All its events.
    pub(crate) fn all_events(&mut self) -> Result<Vec<Event>, StoreError> {
        let rows: Vec<usize> = (0..self.meta.rows).collect();
        self.events(&rows)
    }

    fn what(&self) -> Result<TextColumn, StoreError> {
        Ok(codec::decode_texts(&self.read(codec::WHAT)?, self.meta.rows)?)
    }

    fn directory(&mut self) -> Result<&[String], StoreError> {
        if self.directory.is_none() {
            self.directory = Some(codec::decode_directory(&self.read(codec::DIRECTORY)?)?);
        }
        Ok(self.directory.as_deref().unwrap_or_default())
    }

    fn values(&self, place: usize) -> Result<TextColumn, StoreError> {
        let number = u8::try_from(place + usize::from(codec::VALUES));
        let number = number.map_err(|_| codec::Damaged("it names too many columns"))?;
        Ok(codec::decode_texts(&self.read(number)?, self.meta.rows)?)
    }

    /// The ids of rows, as JSON.
    fn ids(&self) -> Result<TextColumn, StoreError> {
        Ok(codec::decode_texts(&self.read(codec::IDS)?, self.meta.rows)?)
    }

    fn read(&self, number: u8) -> Result<Vec<u8>, StoreError> {
        if self.meta.is_damaged {
            return Err(codec::Damaged("what is known of it is not what was written").into());
        }
        column(self.connection, self.meta.id, number)
    }

    fn decode_field(&mut self, field: &Field) -> Result<Values, StoreError> {
        if *field == Field::Name {
            return Ok(Values { column: self.what()?, are: Are::Marked });
        }
        values_at(field, self.meta.rows, |path| self.path(path))
    }
}

impl Chunk for Block<'_> {
    fn rows(&self) -> usize {
        self.meta.rows
    }

    fn has_bots(&self) -> bool {
        self.meta.bots > 0
    }

    fn bounds_ms(&self) -> Option<(i64, i64)> {
        Some((self.meta.first_ms, self.meta.last_ms))
    }

    fn times(&self) -> Result<Rc<Vec<i64>>, StoreError> {
        if let Some(times) = self.read.times.get() {
            return Ok(times.clone());
        }
        let times = codec::decode_times(&self.read(codec::TIMES)?, self.meta.rows)?;
        Ok(self.read.times.get_or_init(|| Rc::new(times)).clone())
    }

    fn who(&self, with_codes: bool) -> Result<KeyColumn, StoreError> {
        Ok(codec::decode_keys(&self.read(codec::WHO)?, self.meta.rows, with_codes)?)
    }

    fn sessions(&self) -> Result<KeyColumn, StoreError> {
        Ok(codec::decode_keys(&self.read(codec::SESSIONS)?, self.meta.rows, true)?)
    }

    fn classes(&self) -> Result<Rc<Classes>, StoreError> {
        if let Some(classes) = self.read.classes.get() {
            return Ok(classes.clone());
        }
        let classes = Rc::new(classes_of(self.what()?));
        Ok(self.read.classes.get_or_init(|| classes).clone())
    }

    fn field(&mut self, field: &Field) -> Result<Rc<Values>, StoreError> {
        if let Some((_, values)) = self.read.fields.iter().find(|(one, _)| one == field) {
            return Ok(values.clone());
        }
        let values = Rc::new(self.decode_field(field)?);
        self.read.fields.push((field.clone(), values.clone()));
        Ok(values)
    }

    fn path(&mut self, path: &str) -> Result<Option<TextColumn>, StoreError> {
        let directory = self.directory()?;
        let (place, columns) = (directory.iter().position(|one| one == path), directory.len());
        match place {
            Some(place) => Ok(Some(self.values(place)?)),
            None if has_room(path, columns) => Ok(None),
            None => Ok(Some(left(&self.skeletons()?, path))),
        }
    }

    fn paths(&mut self) -> Result<(Vec<String>, bool), StoreError> {
        let paths = self.directory()?.to_vec();
        let has_more = paths.len() >= PATHS_MAX;
        Ok((paths, has_more))
    }

    fn skeletons(&self) -> Result<TextColumn, StoreError> {
        Ok(codec::decode_texts(&self.read(codec::SKELETONS)?, self.meta.rows)?)
    }

    fn events(&mut self, rows: &[usize]) -> Result<Vec<Event>, StoreError> {
        let (times, ids, skeletons) = (self.times()?, self.ids()?, self.skeletons()?);
        let delays = codec::decode_delays(&self.read(codec::ACCEPTED)?, self.meta.rows)?;
        let paths = self.directory()?.to_vec();
        let columns = (0..paths.len()).map(|place| self.values(place)).collect::<Result<Vec<_>, _>>()?;
        let event = |row: &usize| {
            let row = *row;
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
        rows.iter().map(event).collect::<Option<_>>().ok_or_else(|| codec::Damaged("an event is none").into())
    }

    fn whole(&self) -> Option<Arc<Whole>> {
        self.whole.get().cloned().or_else(|| self.known()?.whole.clone())
    }

    fn remembers(&self) -> bool {
        self.known().is_some()
    }

    fn remember(&self, parts: &[Part], views: u64) {
        if let (Some(around), Some(known)) = (self.around, self.known()) {
            self.whole.get_or_init(|| around.remember(self.meta, known, parts, views));
        }
    }
}
