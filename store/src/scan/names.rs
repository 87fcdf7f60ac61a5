//! The names that properties have.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    answer::{check_limit, cut},
    chunk::Chunk,
    groups::Interner,
    seam::{Fold, Scan, Seen, Wants},
    select::Rows,
    shred::each_left,
    table::TextColumn,
};
use crate::{Breakdown, Limits, PropertyRow, Scope, StoreError, scope::SEPARATOR};

/// Before the names of properties in a path.
const PREFIX: &str = "properties";

/// How often each name stands in events.
struct Names<'q> {
    scope: &'q Scope,
    limits: &'q Limits,
    names: Interner,
    /// By the number of a name.
    found: Vec<Found>,
    /// What has no number, as there are too many: each name of each event.
    others: Option<Found>,
}

/// Events, and the time of the last one.
#[derive(Debug, Clone, Copy)]
struct Found {
    events: u64,
    last_ms: i64,
}

impl Found {
    const NONE: Self = Self { events: 0, last_ms: i64::MIN };

    fn add(&mut self, other: Self) {
        self.events += other.events;
        self.last_ms = self.last_ms.max(other.last_ms);
    }
}

/// Answers which there are.
pub(crate) fn properties(
    snapshot: &mut impl Scan,
    scope: &Scope,
    limit: usize,
    limits: &Limits,
) -> Result<Breakdown<PropertyRow>, StoreError> {
    check_limit(limit)?;
    let new = || Names { scope, limits, names: Interner::default(), found: Vec::new(), others: None };
    let Names { names, found, others, .. } = snapshot.scan(&scope.range_ms, new)?;
    let row = |name: Option<Arc<str>>, Found { events, last_ms }: Found| PropertyRow {
        name: name.map(|name| name.to_string()),
        events,
        last_ms,
    };
    let mut rows: Vec<_> = names.texts.into_iter().zip(found).map(|(name, found)| row(name, found)).collect();
    rows.sort_unstable_by(|a, b| (b.events, &a.name).cmp(&(a.events, &b.name)));
    Ok(cut(rows, limit, others.map(|found| row(None, found)), snapshot.damaged_blocks()))
}

impl Fold for Names<'_> {
    fn wants(&self) -> Wants {
        Wants { all: true, ..Wants::of(self.scope) }
    }

    fn take(&mut self, chunk: &mut dyn Chunk, _: &Seen<'_>) -> Result<(), StoreError> {
        let Some(rows) = Rows::of(chunk, self.scope, &self.scope.range_ms)? else { return Ok(()) };
        let (paths, has_more) = chunk.paths()?;
        // All is read before anything is counted: a column may be damaged.
        let mut all = Vec::with_capacity(paths.len());
        for path in &paths {
            let Some(name) = name_of(path) else { continue };
            let Some(column) = chunk.path(path)? else { continue };
            all.push((name.to_owned(), count(&rows, &column)));
        }
        if has_more {
            let with_column: HashSet<&str> = all.iter().map(|(name, _)| &**name).collect();
            let left = count_left(&rows, &chunk.skeletons()?, &with_column);
            all.extend(left);
        }
        all.retain(|(_, found)| found.events > 0);
        all.into_iter().for_each(|(name, found)| self.note(&name, found));
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        for (name, found) in other.names.texts.iter().zip(other.found) {
            self.note(name.as_deref().unwrap_or_default(), found);
        }
        if let Some(others) = other.others {
            self.others.get_or_insert(Found::NONE).add(others);
        }
        Ok(())
    }

    fn is_cut(&self) -> bool {
        self.names.is_full
    }
}

impl Names<'_> {
    fn note(&mut self, name: &str, found: Found) {
        let Some(number) = self.names.number(Some(name), self.limits) else {
            return self.others.get_or_insert(Found::NONE).add(found);
        };
        self.found.resize(self.names.texts.len(), Found::NONE);
        self.found[number as usize].add(found);
    }
}

/// The rows that have a value.
fn count(rows: &Rows, column: &TextColumn) -> Found {
    let has: Vec<bool> =
        (0..=column.texts.len() as u32).map(|code| code != 0 && column.texts.get(code) != "null").collect();
    let mut found = Found::NONE;
    for row in rows.iter(rows.range.clone()).filter(|row| has[column.codes[*row] as usize]) {
        // Rows stand by time.
        found = Found { events: found.events + 1, last_ms: rows.times[row] };
    }
    found
}

/// The same for names that have no column, as there are too many: they are in skeletons.
fn count_left(rows: &Rows, skeletons: &TextColumn, with_column: &HashSet<&str>) -> Vec<(String, Found)> {
    let (mut numbers, mut all) = (HashMap::<String, usize>::new(), Vec::new());
    let mut names_in = |code: u32| {
        let mut names = Vec::new();
        each_left(skeletons.texts.get(code), &mut |path, value| {
            let Some(name) = name_of(path).filter(|name| value != "null" && !with_column.contains(name))
            else {
                return;
            };
            let number = *numbers.entry(name.to_owned()).or_insert_with(|| {
                all.push((name.to_owned(), Found::NONE));
                all.len() - 1
            });
            if !names.contains(&number) {
                names.push(number);
            }
        });
        names
    };
    let of_each: Vec<Vec<usize>> = (0..=skeletons.texts.len() as u32).map(&mut names_in).collect();
    for row in rows.iter(rows.range.clone()) {
        for number in &of_each[skeletons.codes[row] as usize] {
            all[*number].1.add(Found { events: 1, last_ms: rows.times[row] });
        }
    }
    all
}

/// The name of the property whose path it is.
fn name_of(path: &str) -> Option<&str> {
    path.strip_prefix(PREFIX)?.strip_prefix(SEPARATOR)
}
