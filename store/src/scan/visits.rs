//! Sessions, put together from what blocks have of them.

use std::{rc::Rc, sync::Arc};

use super::{
    chunk::{Chunk, KeyColumn, Values},
    groups::{Interner, Texts, visitor},
    seam::{Fold, Scan, Seen, Wants},
    select::Rows,
};
use crate::{
    Field, Limits, Scope, StoreError,
    model::{
        Class, IdSet, SessionKey, SessionPart,
        event::{ENGAGEMENT_SECONDS, TIME_ON_PAGE, looked_ms},
        sessions::{SessionEvent, goes_on, is_near, join_parts, look, sessions, times_on_pages},
    },
    scope::SEPARATOR,
};

/// Stands for what is not asked for, and for no place.
const NO_VALUE: u32 = u32::MAX;
/// From here on numbers are of values for which there was no room: bits of their hashes, as
/// they must still be told apart within a session.
const HASHED: u32 = 1 << 31;
/// Events of sessions that are looked at at once.
const EVENTS_MAX: usize = 1_200_000;

/// What is asked about sessions.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'q> {
    pub(crate) scope: &'q Scope,
    pub(crate) limits: &'q Limits,
    /// The value of the first event, and its visitor.
    pub(crate) by: Option<&'q Field>,
    /// The pages of entry and exit.
    pub(crate) pages: bool,
}

impl Asked<'_> {
    pub(crate) fn wants(&self) -> Wants {
        let mut wants = Wants { sessions: true, ..Wants::of(self.scope) };
        if let Some(by) = self.by {
            wants = wants.who().field(by);
        }
        if self.pages { wants.field(&Field::Page) } else { wants }
    }
}

/// Sessions, whose values are numbers that are ordered as their texts are.
pub(crate) type Visit = SessionPart<u32>;

/// Calls `take` with the sessions that a question counts, some at a time, and the texts of
/// their values. What has a number in `known` has one here too; returned are all that have.
pub(crate) fn visits(
    snapshot: &mut impl Scan,
    asked: Asked<'_>,
    mut known: Interner,
    mut take: impl FnMut(&[Visit], &Texts) -> Result<(), StoreError>,
) -> Result<Interner, StoreError> {
    let range = look(&asked.scope.range_ms);
    let passes = snapshot.sessions_max(&range)?.div_ceil(asked.limits.sessions_at_once).max(1) as u64;
    for pass in 0..passes {
        let new = || Parts { asked, pass: (pass, passes), values: known.clone(), parts: Vec::new() };
        let Parts { mut parts, values, .. } = snapshot.scan(&range, new)?;
        known = values;
        let (texts, ranks) = ranked(&known);
        parts.iter_mut().for_each(|part| renumber(part, &ranks));
        let mut found = join_parts(parts);
        let long = long_keys(&found);
        found.retain(|visit| !long.contains(visit.key.0) && visit.counts_in(&asked.scope.range_ms));
        take(&found, &texts)?;
        drop(found);
        if !long.is_empty() {
            let (found, texts) = long_visits(snapshot, asked, &mut known, &long)?;
            take(&found, &texts)?;
        }
    }
    Ok(known)
}

/// The sessions of keys that must be cut, for which their events are needed; and the texts
/// of their values.
pub(crate) fn long_visits(
    snapshot: &mut impl Scan,
    asked: Asked<'_>,
    known: &mut Interner,
    keys: &IdSet,
) -> Result<(Vec<Visit>, Texts), StoreError> {
    let new = || Events::new(asked, known, Wanted::Keys(keys));
    let events = snapshot.scan(&look(&asked.scope.range_ms), new)?;
    let (events, texts, values) = events.ranked();
    *known = values;
    let mut found = sessions(events.into_iter().map(|(event, _)| event).collect());
    found.retain(|visit| visit.counts_in(&asked.scope.range_ms));
    Ok((found, texts))
}

/// Calls `take` with how long each session stayed on each of its pages; of a page that has
/// no number, `None`. What has one in `known` has one here too.
pub(crate) fn stays(
    snapshot: &mut impl Scan,
    scope: &Scope,
    limits: &Limits,
    mut known: Interner,
    mut take: impl FnMut(Option<&Option<Arc<str>>>, u64),
) -> Result<(), StoreError> {
    let range = look(&scope.range_ms);
    let rows = snapshot.rows_max(&range)?;
    let passes = rows.div_ceil(EVENTS_MAX).max(1) as u64;
    let asked = Asked { scope, limits, by: None, pages: true };
    for pass in 0..passes {
        let new = || Events::new(asked, &known, Wanted::Pass(pass, passes));
        let (mut events, texts, values) = snapshot.scan(&range, new)?.ranked();
        known = values;
        events.sort_unstable();
        let mut rest = &events[..];
        while let Some((first, _)) = rest.first() {
            let mut session = SessionPart::of(first);
            let more = rest[1..].iter().take_while(|(event, _)| {
                let is_of_it = goes_on(&session, event);
                if is_of_it {
                    session.join(SessionPart::of(event));
                }
                is_of_it
            });
            let count = 1 + more.count();
            if session.counts_in(&scope.range_ms) {
                for (page, ms) in times_on_pages(&rest[..count]) {
                    take(texts.get(page as usize), ms);
                }
            }
            rest = &rest[count..];
        }
    }
    Ok(())
}

fn long_keys(visits: &[Visit]) -> IdSet {
    let mut keys = IdSet::default();
    for visit in visits.iter().filter(|visit| visit.is_long()) {
        keys.insert(visit.key.0);
    }
    keys
}

/// Texts in their order, and of each number its place there.
fn ranked(values: &Interner) -> (Texts, Vec<u32>) {
    let mut order: Vec<u32> = (0..values.texts.len() as u32).collect();
    order.sort_unstable_by(|a, b| values.texts[*a as usize].cmp(&values.texts[*b as usize]));
    let mut ranks = vec![0; order.len()];
    (0..).zip(&order).for_each(|(rank, number)| ranks[*number as usize] = rank);
    (order.iter().map(|number| values.texts[*number as usize].clone()).collect(), ranks)
}

/// Gives a part other numbers: those of values for which there was no room stay.
fn renumber(part: &mut Visit, numbers: &[u32]) {
    let renumber = |number: &mut u32| *number = renumbered(*number, numbers);
    renumber(&mut part.first.0);
    part.entry.iter_mut().for_each(|(_, page)| renumber(page));
    part.exit.iter_mut().for_each(|(_, page)| renumber(page));
}

fn renumbered(number: u32, numbers: &[u32]) -> u32 {
    numbers.get(number as usize).copied().unwrap_or(number)
}

/// The number of a text, whether there is room for it or not.
fn number_of(values: &mut Interner, text: Option<&str>, limits: &Limits) -> u32 {
    values.number(text, limits).unwrap_or_else(|| HASHED | hash(text) >> 1)
}

fn hash(text: Option<&str>) -> u32 {
    crc32fast::hash(text.unwrap_or_default().as_bytes())
}

/// Of each number of another's texts the number here.
fn merged(values: &mut Interner, other: &Interner, limits: &Limits) -> Vec<u32> {
    let numbers = values.take(other, limits);
    let texts = numbers.into_iter().zip(&other.texts);
    texts.map(|(number, text)| number.unwrap_or_else(|| HASHED | hash(text.as_deref()) >> 1)).collect()
}

/// Of each code of a chunk's values the number of its text.
fn numbers(values: &mut Interner, of_chunk: &Option<Rc<Values>>, limits: &Limits) -> Vec<u32> {
    let Some(of_chunk) = of_chunk else { return Vec::new() };
    let codes = &of_chunk.column.codes;
    let mut is_there = vec![false; of_chunk.codes()];
    codes.iter().for_each(|code| is_there[*code as usize] = true);
    let number = |(code, is_there): (u32, bool)| match is_there {
        true => number_of(values, of_chunk.get(code).as_deref(), limits),
        false => NO_VALUE,
    };
    (0..).zip(is_there).map(number).collect()
}

/// The parts of sessions that chunks have.
struct Parts<'q> {
    asked: Asked<'q>,
    /// Those whose key leaves this remainder.
    pass: (u64, u64),
    values: Interner,
    parts: Vec<Visit>,
}

/// What a chunk has, decoded.
struct Columns {
    rows: Rows,
    sessions: KeyColumn,
    who: KeyColumn,
    visitors: Vec<(u64, i64)>,
    by: Option<Rc<Values>>,
    pages: Option<Rc<Values>>,
}

impl Columns {
    fn of(chunk: &mut dyn Chunk, seen: &Seen<'_>, asked: &Asked<'_>) -> Result<Option<Self>, StoreError> {
        let Some(rows) = Rows::of(chunk, asked.scope, &look(&asked.scope.range_ms))? else { return Ok(None) };
        let sessions = chunk.sessions()?;
        let by = asked.by.map(|by| chunk.field(by)).transpose()?;
        let pages = asked.pages.then(|| chunk.field(&Field::Page)).transpose()?;
        let who = if asked.by.is_some() { chunk.who(true)? } else { Default::default() };
        let visitors = seen.visitors(&who);
        Ok(Some(Self { rows, sessions, who, visitors, by, pages }))
    }

    fn event(&self, row: usize, by: &[u32], pages: &[u32]) -> SessionEvent<u32> {
        let number = |values: &Option<Rc<Values>>, numbers: &[u32]| match values {
            Some(values) => numbers[values.column.codes[row] as usize],
            None => 0,
        };
        let time_ms = self.rows.times[row];
        SessionEvent {
            key: SessionKey(self.sessions.keys[self.sessions.codes[row] as usize]),
            time_ms,
            value: number(&self.by, by),
            visitor: match self.who.codes.get(row) {
                Some(code) => visitor(&self.who, &self.visitors, *code as usize, time_ms),
                None => 0,
            },
            page: number(&self.pages, pages),
            class: self.rows.class(row),
            matched: self.rows.matches(row),
        }
    }
}

impl Fold for Parts<'_> {
    fn wants(&self) -> Wants {
        self.asked.wants()
    }

    fn take(&mut self, chunk: &mut dyn Chunk, seen: &Seen<'_>) -> Result<(), StoreError> {
        let Some(columns) = Columns::of(chunk, seen, &self.asked)? else { return Ok(()) };
        let by = numbers(&mut self.values, &columns.by, self.asked.limits);
        let pages = numbers(&mut self.values, &columns.pages, self.asked.limits);
        // Where the last part of each key is; those of other passes have none.
        const SKIPPED: u32 = u32::MAX - 1;
        let (pass, passes) = self.pass;
        let is_skipped = |key: &u64| *key == 0 || (passes > 1 && (key >> 1) % passes != pass);
        let mut last: Vec<u32> = columns
            .sessions
            .keys
            .iter()
            .map(|key| if is_skipped(key) { SKIPPED } else { NO_VALUE })
            .collect();
        for row in columns.rows.range.clone() {
            let place = &mut last[columns.sessions.codes[row] as usize];
            if *place == SKIPPED || !columns.rows.counts(row) {
                continue;
            }
            let time_ms = columns.rows.times[row];
            let part = self.parts.get_mut(*place as usize);
            let part = part.filter(|part| !part.key.by_gap() || is_near(part.end_ms, time_ms));
            if part.is_none() {
                *place = self.parts.len() as u32;
                self.parts.push(SessionPart::of(&columns.event(row, &by, &pages)));
                continue;
            }
            self.join(*place as usize, &columns.event(row, &by, &pages));
        }
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        let numbers = merged(&mut self.values, &other.values, self.asked.limits);
        let parts = other.parts.into_iter().map(|mut part| {
            renumber(&mut part, &numbers);
            part
        });
        self.parts.extend(parts);
        Ok(())
    }

    fn is_cut(&self) -> bool {
        self.values.is_full
    }
}

impl Parts<'_> {
    /// Joins an event that is not earlier to a part. Numbers of values are not in the order
    /// of their texts yet.
    fn join(&mut self, place: usize, event: &SessionEvent<u32>) {
        let text = |number: u32| self.values.texts.get(number as usize);
        let part = &mut self.parts[place];
        if event.time_ms == part.start_ms
            && (text(event.value), event.visitor) < (text(part.first.0), part.first.1)
        {
            part.first = (event.value, event.visitor);
        }
        part.end_ms = event.time_ms;
        part.views += u32::from(event.class == Class::View);
        part.actions += u32::from(event.class == Class::Action);
        part.matched |= event.matched;
        if event.class == Class::View {
            let view = (event.time_ms, event.page);
            let ordered = |view: &(i64, u32)| (view.0, text(view.1).cloned());
            if part.entry.is_none_or(|entry| entry.0 == view.0 && ordered(&view) < ordered(&entry)) {
                part.entry = Some(view);
            }
            if part.exit.is_none_or(|exit| exit.0 < view.0 || ordered(&view) > ordered(&exit)) {
                part.exit = Some(view);
            }
        }
    }
}

/// An event, and for how long it says that its page was looked at: milliseconds.
type Looked = (SessionEvent<u32>, Option<u64>);

/// A column that says so: of each code the time, and of each row a code.
type Told = Option<(Vec<Option<u64>>, Vec<u32>)>;

/// Which events of sessions are wanted.
#[derive(Clone, Copy)]
enum Wanted<'q> {
    Keys(&'q IdSet),
    Pass(u64, u64),
}

/// The events of sessions.
struct Events<'q> {
    asked: Asked<'q>,
    wanted: Wanted<'q>,
    values: Interner,
    events: Vec<Looked>,
}

impl<'q> Events<'q> {
    fn new(asked: Asked<'q>, known: &Interner, wanted: Wanted<'q>) -> Self {
        Self { asked, wanted, values: known.clone(), events: Vec::new() }
    }

    /// The events, whose values are numbers that are ordered as their texts are; the texts,
    /// and what has numbers.
    fn ranked(self) -> (Vec<Looked>, Texts, Interner) {
        let (texts, ranks) = ranked(&self.values);
        let mut events = self.events;
        for (event, _) in &mut events {
            event.value = renumbered(event.value, &ranks);
            event.page = renumbered(event.page, &ranks);
        }
        (events, texts, self.values)
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.events.len() > 2 * EVENTS_MAX {
            return Err(StoreError::TooExpensive("sessions have too many events".into()));
        }
        Ok(())
    }
}

impl Fold for Events<'_> {
    fn wants(&self) -> Wants {
        let told = [ENGAGEMENT_SECONDS, TIME_ON_PAGE].map(|name| format!("properties{SEPARATOR}{name}"));
        Wants { paths: told.into(), ..self.asked.wants() }
    }

    fn take(&mut self, chunk: &mut dyn Chunk, seen: &Seen<'_>) -> Result<(), StoreError> {
        let Some(columns) = Columns::of(chunk, seen, &self.asked)? else { return Ok(()) };
        let property = |name| format!("properties{SEPARATOR}{name}");
        let told = [chunk.path(&property(ENGAGEMENT_SECONDS))?, chunk.path(&property(TIME_ON_PAGE))?];
        let [seconds, time_on_page] = told.map(|column| {
            column.map(|column| {
                let looked = (0..=column.texts.len() as u32).map(|code| looked_ms(column.texts.get(code)));
                (looked.collect::<Vec<_>>(), column.codes)
            })
        });
        let at = |told: &Told, row: usize| {
            let (looked, codes) = told.as_ref()?;
            let code = *codes.get(row)?;
            (code != 0).then(|| looked[code as usize])
        };
        let by = numbers(&mut self.values, &columns.by, self.asked.limits);
        let pages = numbers(&mut self.values, &columns.pages, self.asked.limits);
        for row in columns.rows.range.clone().filter(|row| columns.rows.counts(*row)) {
            let key = columns.sessions.keys[columns.sessions.codes[row] as usize];
            let is_wanted = match self.wanted {
                Wanted::Keys(keys) => keys.contains(key),
                Wanted::Pass(pass, passes) => key != 0 && (passes == 1 || (key >> 1) % passes == pass),
            };
            if is_wanted {
                let is_ping = columns.rows.class(row) == Class::Ping;
                let seconds = if is_ping { at(&seconds, row) } else { None };
                let looked = seconds.or_else(|| at(&time_on_page, row)).flatten();
                self.events.push((columns.event(row, &by, &pages), looked));
            }
        }
        self.check()
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        let numbers = merged(&mut self.values, &other.values, self.asked.limits);
        self.events.extend(other.events.into_iter().map(|(event, looked)| {
            let (value, page) = (renumbered(event.value, &numbers), renumbered(event.page, &numbers));
            (SessionEvent { value, page, ..event }, looked)
        }));
        self.check()
    }

    fn is_cut(&self) -> bool {
        self.values.is_full
    }
}
