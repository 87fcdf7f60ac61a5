//! Sessions of which only sums are asked for: a third of the memory and the time of
//! [`visits`](super::visits).

use std::sync::Arc;

use super::{
    chunk::{Chunk, KeyColumn},
    groups::Interner,
    seam::{Both, Fold, Scan, Seen, Wants},
    select::{Rows, bucket_of_all},
    visits::{Asked, long_visits},
    whole::{Part, Whole},
};
use crate::{
    SessionSums, StoreError,
    model::{
        Buckets, Class, IdSet, SessionKey,
        sessions::{is_near, look},
    },
};

/// Most sessions that are looked for among the lone ones of chunks; where more must be cut, all
/// chunks are read.
const SOUGHT_MAX: usize = 1_000;

/// Calls `take` with the buckets in which sessions start that a question counts, and what they
/// add to sums. Shows the chunks to another fold too, which is returned.
pub(crate) fn sessions_and<F: Fold>(
    snapshot: &mut impl Scan,
    asked: Asked<'_>,
    buckets: &Buckets,
    other: impl Fn() -> F + Sync,
    mut take: impl FnMut(usize, &SessionSums),
) -> Result<F, StoreError> {
    let range = look(&asked.scope.range_ms);
    let passes = snapshot.sessions_max(&range)?.div_ceil(asked.limits.sessions_at_once).max(1) as u64;
    let mut others = None;
    for pass in 0..passes {
        let (pass, is_first) = ((pass, passes), pass == 0);
        // What is remembered is of all sessions at once.
        let mut sought = (passes == 1).then(IdSet::default);
        let new = || Both(Parts::new(asked, buckets, pass, sought.as_ref()), is_first.then(&other));
        let Both(mut parts, its) = snapshot.scan(&range, new)?;
        others = others.or(its);
        let long = loop {
            parts.join();
            let long = parts.long();
            if !parts.has_lone(&long) {
                break long;
            }
            // All of their keys is found again below, and must not be among the lone ones.
            sought = sought.filter(|sought| sought.is_empty() && long.len() <= SOUGHT_MAX).map(|_| long);
            parts = snapshot.scan(&range, || Parts::new(asked, buckets, pass, sought.as_ref()))?;
        };
        parts.lone.iter().for_each(|(bucket, whole)| take(*bucket, &whole.lone));
        let joined =
            parts.drawers.iter().flatten().filter(|part| !long.contains(part.key)).map(Part::session);
        for session in joined.filter(|session| session.counts_in(&asked.scope.range_ms)) {
            buckets.index(session.start_ms).into_iter().for_each(|bucket| take(bucket, &session.sums()));
        }
        drop(parts);
        if !long.is_empty() {
            let (visits, _) = long_visits(snapshot, asked, &mut Interner::default(), &long)?;
            for visit in visits {
                buckets.index(visit.start_ms).into_iter().for_each(|bucket| take(bucket, &visit.sums()));
            }
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
    buckets: &'q Buckets,
    /// Those whose key leaves this remainder.
    pass: (u64, u64),
    /// What is remembered of a chunk is of use unless one of these is among its lone sessions;
    /// without any set nothing is.
    sought: Option<&'q IdSet>,
    drawers: Vec<Vec<Part>>,
    /// Chunks of which all was taken in at once, and the bucket of each.
    lone: Vec<(usize, Arc<Whole>)>,
}

impl<'q> Parts<'q> {
    fn new(asked: Asked<'q>, buckets: &'q Buckets, pass: (u64, u64), sought: Option<&'q IdSet>) -> Self {
        Self { asked, buckets, pass, sought, drawers: vec![Vec::new(); DRAWERS], lone: Vec::new() }
    }

    fn drawer(&mut self, key: u64) -> &mut Vec<Part> {
        &mut self.drawers[(key >> 58) as usize]
    }

    /// True if its parts are of another pass, or of no session.
    fn is_skipped(&self, key: u64) -> bool {
        let (pass, passes) = self.pass;
        key == 0 || (passes > 1 && (key >> 1) % passes != pass)
    }

    /// Takes in all of a chunk at once, if it may be.
    fn take_whole(&mut self, chunk: &dyn Chunk, bucket: usize) -> bool {
        let Some(sought) = self.sought else { return false };
        let Some(whole) = chunk.whole() else { return false };
        if sought.iter().any(|key| whole.has_lone(key)) {
            return false;
        }
        for part in &whole.parts {
            self.drawer(part.key).push(*part);
        }
        self.lone.push((bucket, whole));
        true
    }

    /// True if one of these may be among the lone sessions that were taken in.
    fn has_lone(&self, keys: &IdSet) -> bool {
        self.lone.iter().any(|(_, whole)| keys.iter().any(|key| whole.has_lone(key)))
    }

    /// The keys of what must be cut, for which its events are needed.
    fn long(&self) -> IdSet {
        let mut long = IdSet::default();
        long.extend(
            self.drawers.iter().flatten().filter(|part| part.session().is_long()).map(|part| part.key),
        );
        long
    }

    /// Parts put together where no gap divides them.
    fn join(&mut self) {
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
    }
}

impl Fold for Parts<'_> {
    fn wants(&self) -> Wants {
        self.asked.wants()
    }

    fn take(&mut self, chunk: &mut dyn Chunk, _: &Seen<'_>) -> Result<(), StoreError> {
        let scope = self.asked.scope;
        // Of machines nothing is remembered.
        let of_all =
            bucket_of_all(chunk, scope, self.buckets).filter(|_| !scope.include_bots || !chunk.has_bots());
        if of_all.is_some_and(|bucket| self.take_whole(chunk, bucket)) {
            return Ok(());
        }
        let Some(rows) = Rows::of(chunk, scope, &look(&scope.range_ms))? else {
            return Ok(());
        };
        let sessions = chunk.sessions()?;
        let is_remembered = self.sought.is_some() && of_all.is_some() && chunk.remembers();
        let before: Vec<usize> = self.drawers.iter().map(Vec::len).collect();
        self.take_rows(&rows, &sessions);
        if is_remembered {
            let its = self.drawers.iter().zip(before).flat_map(|(drawer, before)| &drawer[before..]);
            let is_view = |row: &usize| rows.class(*row) == Class::View;
            let views = rows.iter(rows.range.clone()).filter(is_view).count() as u64;
            chunk.remember(&its.copied().collect::<Vec<_>>(), views);
        }
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        self.drawers.iter_mut().zip(other.drawers).for_each(|(ours, theirs)| ours.extend(theirs));
        self.lone.extend(other.lone);
        Ok(())
    }
}

impl Parts<'_> {
    fn take_rows(&mut self, rows: &Rows, sessions: &KeyColumn) {
        const NONE: u32 = u32::MAX;
        const SKIPPED: u32 = u32::MAX - 1;
        let place_of = |key: &u64| if self.is_skipped(*key) { SKIPPED } else { NONE };
        let mut places: Vec<u32> = sessions.keys.iter().map(place_of).collect();
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
    }
}
