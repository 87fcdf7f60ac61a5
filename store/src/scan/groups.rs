//! Events by value, or by name and bucket.

use std::{collections::HashMap, sync::Arc};

use super::{
    chunk::{Chunk, KeyColumn},
    seam::{Fold, Seen, Wants},
    select::Rows,
};
use crate::{
    Field, Limits, Scope, StoreError,
    model::{Buckets, Class, Uniques},
};

/// Most bytes of pairs of rows and visitors that are noted as bits, for a chunk.
const PAIR_BITS_MAX: usize = 1 << 24;
/// From here on a value's visitors are estimated once there are too many in all.
const EXACT_OF_A_VALUE: usize = 4096;

/// Texts by number, bounded. Once there is no room for one there is none for any other: so
/// each has its number from the first time on, or never.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interner {
    numbers: HashMap<Arc<str>, u32>,
    pub(crate) texts: Texts,
    none: Option<u32>,
    bytes: usize,
    pub(crate) is_full: bool,
}

/// Texts, or the lack of one.
pub(crate) type Texts = Vec<Option<Arc<str>>>;

impl Interner {
    /// The number of a text or the lack of one; `None` if there is no room for more.
    pub(crate) fn number(&mut self, text: Option<&str>, limits: &Limits) -> Option<u32> {
        let known = text.map_or(self.none, |text| self.numbers.get(text).copied());
        if known.is_some() {
            return known;
        }
        let bytes = text.map_or(0, str::len);
        self.is_full |= self.texts.len() >= limits.values_max || self.bytes + bytes > limits.value_bytes_max;
        if self.is_full {
            return None;
        }
        let number = self.texts.len() as u32;
        self.bytes += bytes;
        let text: Option<Arc<str>> = text.map(Into::into);
        match &text {
            None => self.none = Some(number),
            Some(text) => drop(self.numbers.insert(text.clone(), number)),
        }
        self.texts.push(text);
        Some(number)
    }

    /// Takes in the texts of another; of each of its numbers the number here, if there is one.
    pub(crate) fn take(&mut self, other: &Self, limits: &Limits) -> Vec<Option<u32>> {
        self.is_full |= other.is_full;
        other.texts.iter().map(|text| self.number(text.as_deref(), limits)).collect()
    }
}

/// What is counted of a value.
#[derive(Debug, Clone, Default)]
pub(crate) struct Group {
    pub(crate) events: u64,
    pub(crate) views: u64,
    pub(crate) last_ms: i64,
    pub(crate) visitors: Uniques,
}

impl Group {
    fn add(&mut self, other: &Self, exact_max: usize) {
        if self.events == 0 {
            self.last_ms = other.last_ms;
        }
        self.events += other.events;
        self.views += other.views;
        self.last_ms = self.last_ms.max(other.last_ms);
        self.visitors.merge(&other.visitors, exact_max);
    }
}

/// Events by value and bucket.
pub(crate) struct Groups<'q> {
    scope: &'q Scope,
    by: &'q Field,
    buckets: Option<&'q Buckets>,
    /// Nothing but views counts.
    only_views: bool,
    limits: &'q Limits,
    pub(crate) values: Interner,
    /// By the number of a value, and the bucket.
    pub(crate) groups: HashMap<(u32, u32), Group>,
    /// What has no number, as there are too many.
    pub(crate) others: Option<Group>,
    exact_max: usize,
    /// Visitors that are remembered, over all groups.
    pairs: usize,
}

impl<'q> Groups<'q> {
    pub(crate) fn new(
        scope: &'q Scope,
        by: &'q Field,
        buckets: Option<&'q Buckets>,
        only_views: bool,
        limits: &'q Limits,
    ) -> Self {
        Self {
            scope,
            by,
            buckets,
            only_views,
            limits,
            values: Interner::default(),
            groups: HashMap::new(),
            others: None,
            exact_max: limits.exact_max,
            pairs: 0,
        }
    }

    fn group(&mut self, number: Option<u32>, bucket: u32) -> &mut Group {
        match number {
            Some(number) => self.groups.entry((number, bucket)).or_default(),
            None => self.others.get_or_insert_default(),
        }
    }

    /// Keeps what is remembered in bounds.
    fn bound(&mut self) -> Result<(), StoreError> {
        let exact = |group: &Group| group.visitors.exact();
        self.pairs = self.groups.values().map(exact).sum();
        if self.pairs > self.limits.exact_max * 2 && self.exact_max > EXACT_OF_A_VALUE {
            self.exact_max = EXACT_OF_A_VALUE;
            let large = self.groups.values_mut().filter(|group| exact(group) > EXACT_OF_A_VALUE);
            large.for_each(|group| group.visitors.estimate());
            self.pairs = self.groups.values().map(exact).sum();
        }
        let bytes: usize = self.groups.values().map(|group| group.visitors.bytes() + 100).sum();
        if bytes > self.limits.group_bytes_max {
            return Err(StoreError::TooExpensive("there are too many values with too many visitors".into()));
        }
        Ok(())
    }
}

/// Figures of a value in a part of a chunk, its code being the place.
#[derive(Debug, Clone, Copy, Default)]
struct Local {
    events: u64,
    views: u64,
    last_ms: i64,
}

/// Notes which pairs were there, as bits if there can be few.
struct Pairs {
    bits: Vec<u64>,
    visitors: usize,
}

impl Pairs {
    fn new(values: usize, visitors: usize) -> Self {
        let bits = values.saturating_mul(visitors);
        let words = if bits <= PAIR_BITS_MAX { bits.div_ceil(64) } else { 0 };
        Self { bits: vec![0; words], visitors }
    }

    /// True if a pair may be new.
    #[inline]
    fn is_new(&mut self, value: usize, visitor: usize) -> bool {
        let at = value * self.visitors + visitor;
        match self.bits.get_mut(at / 64) {
            None => true,
            Some(word) => {
                let bit = 1 << (at % 64);
                let is_new = *word & bit == 0;
                *word |= bit;
                is_new
            }
        }
    }
}

impl Fold for Groups<'_> {
    fn wants(&self) -> Wants {
        Wants::of(self.scope).who().field(self.by)
    }

    fn take(&mut self, chunk: &mut dyn Chunk, seen: &Seen<'_>) -> Result<(), StoreError> {
        let Some(rows) = Rows::of(chunk, self.scope, &self.scope.range_ms)? else { return Ok(()) };
        let values = chunk.field(self.by)?;
        let who = chunk.who(true)?;
        let visitors = seen.visitors(&who);
        for (bucket, part) in rows.parts(self.buckets) {
            let bucket = bucket as u32;
            let mut locals = vec![Local::default(); values.codes()];
            let mut pairs = Pairs::new(values.codes(), visitors.len());
            let mut found: Vec<(u32, u64)> = Vec::new();
            for row in rows.iter(part) {
                let is_view = rows.class(row) == Class::View;
                if self.only_views && !is_view {
                    continue;
                }
                let code = values.column.codes[row];
                let local = &mut locals[code as usize];
                local.events += 1;
                local.views += u64::from(is_view);
                local.last_ms = rows.times[row];
                let whose = who.codes[row] as usize;
                if visitors[whose].1 != i64::MAX || pairs.is_new(code as usize, whose) {
                    found.push((code, visitor(&who, &visitors, whose, rows.times[row])));
                }
            }
            self.take_locals(&locals, found, bucket, |code| values.get(code));
        }
        self.bound()
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        let exact_max = self.exact_max.min(other.exact_max);
        self.exact_max = exact_max;
        let numbers = self.values.take(&other.values, self.limits);
        for ((number, bucket), group) in &other.groups {
            self.group(numbers[*number as usize], *bucket).add(group, exact_max);
        }
        if let Some(others) = other.others {
            self.others.get_or_insert_default().add(&others, exact_max);
        }
        self.bound()
    }

    fn is_cut(&self) -> bool {
        self.values.is_full
    }
}

impl Groups<'_> {
    fn take_locals<'v>(
        &mut self,
        locals: &[Local],
        mut found: Vec<(u32, u64)>,
        bucket: u32,
        value: impl Fn(u32) -> Option<std::borrow::Cow<'v, str>>,
    ) {
        // All of one value together: its set is looked up once.
        found.sort_unstable_by_key(|(code, _)| *code);
        let mut found = &found[..];
        let exact_max = self.exact_max;
        for (code, local) in (0..).zip(locals).filter(|(_, local)| local.events > 0) {
            let theirs = found.partition_point(|(one, _)| *one <= code);
            let number = self.values.number(value(code).as_deref(), self.limits);
            let group = self.group(number, bucket);
            group.last_ms = if group.events == 0 { local.last_ms } else { group.last_ms.max(local.last_ms) };
            group.events += local.events;
            group.views += local.views;
            for (_, visitor) in &found[..theirs] {
                group.visitors.insert(*visitor, exact_max);
            }
            found = &found[theirs..];
        }
    }
}

/// Whose a row is.
#[inline]
pub(crate) fn visitor(who: &KeyColumn, visitors: &[(u64, i64)], code: usize, time_ms: i64) -> u64 {
    let (root, until_ms) = visitors[code];
    if time_ms < until_ms { root } else { who.keys[code] }
}
