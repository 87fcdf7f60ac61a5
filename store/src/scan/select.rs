//! Which rows of a chunk a question is about.

use std::{ops::Range, rc::Rc};

use super::chunk::{Chunk, Classes, Values, rows_in};
use crate::{
    Filter, Scope, StoreError,
    model::{Buckets, Class},
};

/// Rows of a chunk, and what they are.
pub(crate) struct Rows {
    pub(crate) times: Rc<Vec<i64>>,
    /// Those that are in the range.
    pub(crate) range: Range<usize>,
    classes: Rc<Classes>,
    /// Those that count; `None`: all. Rows of machines do not, unless they are asked for.
    counted: Option<Vec<bool>>,
    /// Those that match the filters; `None`: all.
    matching: Option<Vec<bool>>,
}

impl Rows {
    /// The rows of a range, which may be another than the scope's. `None` if there is none.
    pub(crate) fn of(
        chunk: &mut dyn Chunk,
        scope: &Scope,
        range_ms: &Range<i64>,
    ) -> Result<Option<Self>, StoreError> {
        let times = chunk.times()?;
        let range = rows_in(&times, range_ms);
        if range.is_empty() {
            return Ok(None);
        }
        let classes = chunk.classes()?;
        let skips_bots = chunk.has_bots() && !scope.include_bots;
        let is_counted = |code: &u32| !classes.classes[*code as usize].1;
        let counted = skips_bots.then(|| classes.codes.iter().map(is_counted).collect());
        let matching = passing(chunk, &scope.filters)?;
        Ok(Some(Self { times, range, classes, counted, matching }))
    }

    #[inline]
    pub(crate) fn class(&self, row: usize) -> Class {
        self.classes.classes[self.classes.codes[row] as usize].0
    }

    /// True if a row in the range is in figures at all.
    #[inline]
    pub(crate) fn counts(&self, row: usize) -> bool {
        self.counted.as_ref().is_none_or(|counted| counted[row])
    }

    /// True if a row matches the filters.
    #[inline]
    pub(crate) fn matches(&self, row: usize) -> bool {
        self.matching.as_ref().is_none_or(|matching| matching[row])
    }

    /// The buckets that the range has rows of, each with its rows; all are one without.
    pub(crate) fn parts(&self, buckets: Option<&Buckets>) -> Vec<(usize, Range<usize>)> {
        let Some(buckets) = buckets else { return vec![(0, self.range.clone())] };
        let (mut parts, mut start) = (Vec::new(), self.range.start);
        while start < self.range.end {
            let Some(bucket) = buckets.index(self.times[start]) else { break };
            let end_ms = buckets.starts_ms.get(bucket + 1).copied().unwrap_or(i64::MAX);
            let end = start + self.times[start..self.range.end].partition_point(|time| *time < end_ms);
            parts.push((bucket, start..end));
            start = end;
        }
        parts
    }

    /// Those that count and match, of a part of the range.
    pub(crate) fn iter(&self, part: Range<usize>) -> impl Iterator<Item = usize> + '_ {
        part.filter(|row| self.counts(*row) && self.matches(*row))
    }
}

/// The bucket of all of a chunk of which every row counts, but perhaps for machines'.
pub(crate) fn bucket_of_all(chunk: &dyn Chunk, scope: &Scope, buckets: &Buckets) -> Option<usize> {
    let (first_ms, last_ms) = chunk.bounds_ms().filter(|_| scope.filters.is_empty())?;
    let bucket = buckets.index(first_ms)?;
    (buckets.index(last_ms) == Some(bucket)).then_some(bucket)
}

/// The rows that pass all filters; `None`: all. Each filter is asked once for each value
/// that there is, and not for each row.
pub(crate) fn passing(chunk: &mut dyn Chunk, filters: &[Filter]) -> Result<Option<Vec<bool>>, StoreError> {
    let mut rows: Option<Vec<bool>> = None;
    for filter in filters {
        let values = chunk.field(&filter.field)?;
        let passes = passing_values(&values, filter);
        match &mut rows {
            None => rows = Some(values.column.codes.iter().map(|code| passes[*code as usize]).collect()),
            Some(rows) => {
                let codes = values.column.codes.iter();
                rows.iter_mut().zip(codes).for_each(|(row, code)| *row &= passes[*code as usize]);
            }
        }
    }
    Ok(rows)
}

fn passing_values(values: &Values, filter: &Filter) -> Vec<bool> {
    (0..values.codes() as u32).map(|code| filter.passes(values.get(code).as_deref())).collect()
}
