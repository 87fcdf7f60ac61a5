//! Sessions of which only sums are asked for: a third of the memory and the time of
//! [`visits`](super::visits).

use super::{
    chunk::Chunk,
    groups::Interner,
    seam::{Both, Fold, Scan, Seen, Wants},
    select::Rows,
    visits::{AT_ONCE_MAX, Asked, long_visits},
};
use crate::{
    SessionSums, StoreError,
    model::{
        Class, IdSet, SessionKey, SessionPart,
        sessions::{is_near, look},
    },
};

/// A part of a session, or all of it.
#[derive(Debug, Clone, Copy)]
struct Part {
    key: u64,
    start_ms: i64,
    end_ms: i64,
    views: u32,
    actions: u32,
    matched: bool,
}

impl Part {
    fn join(&mut self, other: &Self) {
        self.start_ms = self.start_ms.min(other.start_ms);
        self.end_ms = self.end_ms.max(other.end_ms);
        self.views += other.views;
        self.actions += other.actions;
        self.matched |= other.matched;
    }

    /// What the definition of sessions says about it.
    fn session(&self) -> SessionPart<()> {
        SessionPart {
            key: SessionKey(self.key),
            start_ms: self.start_ms,
            end_ms: self.end_ms,
            views: self.views,
            actions: self.actions,
            first: ((), 0),
            entry: None,
            exit: None,
            matched: self.matched,
        }
    }
}

/// Calls `take` with when each session starts that a question counts, and what it adds to
/// sums. Shows the chunks to another fold too, which is returned.
pub(crate) fn sessions_and<F: Fold>(
    snapshot: &mut impl Scan,
    asked: Asked<'_>,
    other: impl Fn() -> F + Sync,
    mut take: impl FnMut(i64, &SessionSums),
) -> Result<F, StoreError> {
    let (range, counted) = (look(&asked.scope.range_ms), &asked.scope.range_ms);
    let passes = snapshot.sessions_max(&range)?.div_ceil(AT_ONCE_MAX).max(1) as u64;
    let mut others = None;
    for pass in 0..passes {
        let is_first = pass == 0;
        let new = || Both(Parts::new(asked, (pass, passes)), is_first.then(&other));
        let Both(parts, its) = snapshot.scan(&range, new)?;
        others = others.or(its);
        let mut long = IdSet::default();
        let joined = parts.joined();
        for part in joined.iter().flatten().filter(|part| part.session().is_long()) {
            long.insert(part.key);
        }
        for part in joined.iter().flatten().filter(|part| !long.contains(part.key)) {
            let session = part.session();
            if session.counts_in(counted) {
                take(session.start_ms, &session.sums());
            }
        }
        drop(joined);
        if !long.is_empty() {
            let (visits, _) = long_visits(snapshot, asked, &mut Interner::default(), &long)?;
            visits.iter().for_each(|visit| take(visit.start_ms, &visit.sums()));
        }
    }
    Ok(others.unwrap_or_else(other))
}

/// Parts are kept apart by the first bits of their keys, so that those that are put
/// together are in the processor's cache together.
const DRAWERS: usize = 64;

/// The parts of sessions that chunks have.
struct Parts<'q> {
    asked: Asked<'q>,
    /// Those whose key leaves this remainder.
    pass: (u64, u64),
    drawers: Vec<Vec<Part>>,
}

impl<'q> Parts<'q> {
    fn new(asked: Asked<'q>, pass: (u64, u64)) -> Self {
        Self { asked, pass, drawers: vec![Vec::new(); DRAWERS] }
    }

    fn drawer(&mut self, key: u64) -> &mut Vec<Part> {
        &mut self.drawers[(key >> 58) as usize]
    }

    /// Parts put together where no gap divides them.
    fn joined(mut self) -> Vec<Vec<Part>> {
        for parts in &mut self.drawers {
            parts.sort_unstable_by_key(|part| (part.key, part.start_ms));
            parts.dedup_by(|part, last| {
                let by_gap = SessionKey(part.key).by_gap();
                let goes_on = part.key == last.key && (!by_gap || is_near(last.end_ms, part.start_ms));
                if goes_on {
                    last.join(part);
                }
                goes_on
            });
        }
        self.drawers
    }
}

impl Fold for Parts<'_> {
    fn wants(&self) -> Wants {
        self.asked.wants()
    }

    fn take(&mut self, chunk: &mut dyn Chunk, _: &Seen<'_>) -> Result<(), StoreError> {
        let Some(rows) = Rows::of(chunk, self.asked.scope, &look(&self.asked.scope.range_ms))? else {
            return Ok(());
        };
        let sessions = chunk.sessions()?;
        const NONE: u32 = u32::MAX;
        const SKIPPED: u32 = u32::MAX - 1;
        let (pass, passes) = self.pass;
        let is_skipped = |key: &u64| *key == 0 || (passes > 1 && (key >> 1) % passes != pass);
        let mut places: Vec<u32> =
            sessions.keys.iter().map(|key| if is_skipped(key) { SKIPPED } else { NONE }).collect();
        for row in rows.range.clone() {
            let code = sessions.codes[row] as usize;
            let place = places[code];
            if place == SKIPPED || !rows.counts(row) {
                continue;
            }
            let (key, time_ms, class) = (sessions.keys[code], rows.times[row], rows.class(row));
            let by_gap = SessionKey(key).by_gap();
            let drawer = self.drawer(key);
            let part = drawer.get_mut(place as usize);
            let part = part.filter(|part| !by_gap || is_near(part.end_ms, time_ms));
            let (views, actions) = (u32::from(class == Class::View), u32::from(class == Class::Action));
            match part {
                Some(part) => {
                    part.end_ms = time_ms;
                    part.views += views;
                    part.actions += actions;
                    part.matched |= rows.matches(row);
                }
                None => {
                    let matched = rows.matches(row);
                    places[code] = drawer.len() as u32;
                    drawer.push(Part { key, start_ms: time_ms, end_ms: time_ms, views, actions, matched });
                }
            }
        }
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        self.drawers.iter_mut().zip(other.drawers).for_each(|(ours, theirs)| ours.extend(theirs));
        Ok(())
    }
}
