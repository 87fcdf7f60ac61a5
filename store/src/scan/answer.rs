//! Each question, over a snapshot.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use analytics_relay_providers::Event;

use super::{
    chunk::Chunk,
    counts::{Counts, MINUTE_MS, MINUTES, Minutes, Visitors},
    groups::{Group, Groups, Interner, Texts, visitor},
    seam::{Both, Scan, Seen, Wants, Whose},
    select::Rows,
    sums::sessions_and,
    table::TextColumn,
    visits::{Asked, stays, visits},
};
use crate::{
    Breakdown, Bucket, Count, CountPoint, Field, Limits, NamedPoint, NewVisitors, PageRow, Point, Realtime,
    Scope, SessionRow, SessionSums, StoreError, Subject, Summary, ValueRow,
    model::{Buckets, IdSet, Keys, Uniques, event::shown},
};

/// Most rows of an answer.
pub(crate) const ROWS_MAX: usize = 10_000;

pub(crate) fn check_limit(limit: usize) -> Result<(), StoreError> {
    if limit > ROWS_MAX {
        return Err(StoreError::invalid("limit", limit, format!("at most {ROWS_MAX}")));
    }
    Ok(())
}

pub(crate) fn counts(
    snapshot: &mut impl Scan,
    scope: &Scope,
    buckets: &Buckets,
    limits: &Limits,
) -> Result<Vec<CountPoint>, StoreError> {
    let counts = snapshot.scan(&scope.range_ms, || Counts::new(scope, buckets, false, limits))?;
    Ok(count_points(counts, buckets))
}

/// What was counted in each bucket.
pub(crate) fn count_points(counts: Counts<'_>, buckets: &Buckets) -> Vec<CountPoint> {
    let point = |(start_ms, sum): (&i64, super::counts::Sum)| CountPoint {
        start_ms: *start_ms,
        events: sum.events,
        visitors: sum.visitors.count(),
    };
    buckets.starts_ms.iter().zip(counts.sums).map(point).collect()
}

pub(crate) fn series(
    snapshot: &mut impl Scan,
    scope: &Scope,
    buckets: &Buckets,
    limits: &Limits,
) -> Result<Vec<Point>, StoreError> {
    let mut sessions = vec![SessionSums::default(); buckets.len()];
    let asked = Asked { scope, limits, by: None, pages: false };
    // Together, as both read the same columns.
    let counts = || Counts::new(scope, buckets, true, limits);
    let counts = sessions_and(snapshot, asked, buckets, counts, |bucket, sums| sessions[bucket].add(sums))?;
    let damaged_blocks = snapshot.damaged_blocks();
    let point = |((start_ms, sum), sessions): ((&i64, super::counts::Sum), SessionSums)| Point {
        start_ms: *start_ms,
        summary: Summary {
            events: sum.events,
            views: sum.views,
            visitors: sum.visitors.count(),
            sessions,
            damaged_blocks,
        },
    };
    Ok(buckets.starts_ms.iter().zip(counts.sums).zip(sessions).map(point).collect())
}

pub(crate) fn summary(
    snapshot: &mut impl Scan,
    scope: &Scope,
    limits: &Limits,
) -> Result<Summary, StoreError> {
    let buckets = Buckets::new(&scope.range_ms, Bucket::All, "UTC")?;
    let points = series(snapshot, scope, &buckets, limits)?;
    Ok(points.into_iter().next().map(|point| point.summary).unwrap_or_default())
}

pub(crate) fn series_by_name(
    snapshot: &mut impl Scan,
    scope: &Scope,
    buckets: &Buckets,
    limits: &Limits,
) -> Result<Vec<NamedPoint>, StoreError> {
    let new = || Groups::new(scope, &Field::Name, Some(buckets), false, limits);
    let found = snapshot.scan(&scope.range_ms, new)?;
    if found.others.is_some() || found.groups.len() > ROWS_MAX {
        return Err(StoreError::TooExpensive("there are too many names; ask for wider buckets".into()));
    }
    let mut points: Vec<(u32, NamedPoint)> = Vec::with_capacity(found.groups.len());
    for ((number, bucket), group) in &found.groups {
        let point = NamedPoint {
            start_ms: buckets.starts_ms[*bucket as usize],
            name: found.values.texts[*number as usize].as_deref().unwrap_or_default().to_owned(),
            events: group.events,
            visitors: group.visitors.count(),
        };
        points.push((*bucket, point));
    }
    points.sort_unstable_by(|(a, one), (b, other)| (a, &one.name).cmp(&(b, &other.name)));
    Ok(points.into_iter().map(|(_, point)| point).collect())
}

fn value_row(value: Option<String>, group: &Group) -> ValueRow {
    ValueRow {
        value,
        events: group.events,
        views: group.views,
        visitors: group.visitors.count(),
        last_ms: group.last_ms,
    }
}

fn value_rows(found: &Groups<'_>) -> Vec<ValueRow> {
    let row = |((number, _), group): (&(u32, u32), &Group)| {
        value_row(found.values.texts[*number as usize].as_deref().map(str::to_owned), group)
    };
    found.groups.iter().map(row).collect()
}

pub(crate) fn breakdown(
    snapshot: &mut impl Scan,
    scope: &Scope,
    by: &Field,
    limit: usize,
    limits: &Limits,
) -> Result<Breakdown<ValueRow>, StoreError> {
    check_limit(limit)?;
    let found = snapshot.scan(&scope.range_ms, || Groups::new(scope, by, None, false, limits))?;
    let mut rows = value_rows(&found);
    rows.sort_unstable_by(|a, b| (b.visitors.n, b.events, &a.value).cmp(&(a.visitors.n, a.events, &b.value)));
    let others = found.others.as_ref().map(|group| value_row(None, group));
    Ok(cut(rows, limit, others, snapshot.damaged_blocks()))
}

pub(crate) fn cut<Row>(
    mut rows: Vec<Row>,
    limit: usize,
    others: Option<Row>,
    damaged_blocks: u64,
) -> Breakdown<Row> {
    let total = rows.len() as u64;
    rows.truncate(limit);
    Breakdown { rows, total, others, damaged_blocks }
}

pub(crate) fn sessions_by(
    snapshot: &mut impl Scan,
    scope: &Scope,
    by: &Field,
    limit: usize,
    limits: &Limits,
) -> Result<Breakdown<SessionRow>, StoreError> {
    check_limit(limit)?;
    let mut all: HashMap<Option<Arc<str>>, (SessionSums, Uniques)> = HashMap::new();
    let mut others: Option<(SessionSums, Uniques)> = None;
    let exact_max = limits.exact_max;
    let asked = Asked { scope, limits, by: Some(by), pages: false };
    visits(snapshot, asked, Interner::default(), |visits, texts| {
        // By number first: a text is looked up once.
        let mut rows: Vec<Option<(SessionSums, Uniques)>> = vec![None; texts.len()];
        for visit in visits {
            let row = match rows.get_mut(visit.first.0 as usize) {
                Some(row) => row.get_or_insert_default(),
                None => others.get_or_insert_default(),
            };
            row.0.add(&visit.sums());
            row.1.insert(visit.first.1, exact_max);
        }
        for (text, row) in texts.iter().zip(rows) {
            let Some((sums, visitors)) = row else { continue };
            let known = all.entry(text.clone()).or_default();
            known.0.add(&sums);
            known.1.merge(&visitors, exact_max);
        }
        let bytes: usize = all.values().map(|(_, visitors)| visitors.bytes() + 100).sum();
        match bytes > limits.group_bytes_max {
            true => Err(StoreError::TooExpensive("there are too many values with too many visitors".into())),
            false => Ok(()),
        }
    })?;
    let row = |(value, (sums, visitors)): (Option<Arc<str>>, (SessionSums, Uniques))| SessionRow {
        value: value.as_deref().map(str::to_owned),
        sums,
        visitors: visitors.count(),
    };
    let mut rows: Vec<_> = all.into_iter().map(row).collect();
    rows.sort_unstable_by(|a, b| {
        (b.visitors.n, b.sums.sessions, &a.value).cmp(&(a.visitors.n, a.sums.sessions, &b.value))
    });
    Ok(cut(rows, limit, others.map(|others| row((None, others))), snapshot.damaged_blocks()))
}

pub(crate) fn pages(
    snapshot: &mut impl Scan,
    scope: &Scope,
    limit: usize,
    limits: &Limits,
) -> Result<Breakdown<PageRow>, StoreError> {
    check_limit(limit)?;
    let found = snapshot.scan(&scope.range_ms, || Groups::new(scope, &Field::Page, None, true, limits))?;
    let mut all: HashMap<Option<Arc<str>>, PageRow> = HashMap::new();
    for ((number, _), group) in &found.groups {
        let row = all.entry(found.values.texts[*number as usize].clone()).or_default();
        (row.views, row.visitors) = (group.views, group.visitors.count());
    }
    let others = found.others.as_ref();
    let mut others = others.map(|group| PageRow {
        views: group.views,
        visitors: group.visitors.count(),
        ..PageRow::default()
    });
    // What is known of a page is in its row wholly, or with the others wholly.
    let known = found.values.clone();
    drop(found);
    let asked = Asked { scope, limits, by: None, pages: true };
    let known = visits(snapshot, asked, known, |visits, texts| {
        add_visits(visits, texts, &mut all, &mut others);
        Ok(())
    })?;
    stays(snapshot, scope, limits, known, |page, ms| {
        let row = match page {
            Some(page) => all.entry(page.clone()).or_default(),
            None => others.get_or_insert_default(),
        };
        (row.time_ms, row.timed) = (row.time_ms + ms, row.timed + 1);
    })?;
    let row = |(page, row): (Option<Arc<str>>, PageRow)| PageRow {
        page: page.as_deref().map(str::to_owned),
        ..row
    };
    let mut rows: Vec<_> = all.into_iter().map(row).collect();
    rows.sort_unstable_by(|a, b| (b.visitors.n, b.views, &a.page).cmp(&(a.visitors.n, a.views, &b.page)));
    Ok(cut(rows, limit, others, snapshot.damaged_blocks()))
}

fn add_visits(
    visits: &[super::visits::Visit],
    texts: &Texts,
    all: &mut HashMap<Option<Arc<str>>, PageRow>,
    others: &mut Option<PageRow>,
) {
    let mut by_page: BTreeMap<u32, (SessionSums, u64)> = BTreeMap::new();
    for visit in visits {
        if let Some((_, page)) = visit.entry {
            by_page.entry(page).or_default().0.add(&visit.sums());
        }
        if let Some((_, page)) = visit.exit {
            by_page.entry(page).or_default().1 += 1;
        }
    }
    for (page, (entered, exits)) in by_page {
        let row = match texts.get(page as usize) {
            Some(page) => all.entry(page.clone()).or_default(),
            None => others.get_or_insert_default(),
        };
        row.entered.add(&entered);
        row.exits += exits;
    }
}

pub(crate) fn realtime(
    snapshot: &mut impl Scan,
    scope: &Scope,
    now_ms: i64,
    limits: &Limits,
) -> Result<Realtime, StoreError> {
    let minutes = |n: i64| scope.over(now_ms.saturating_sub(n * MINUTE_MS)..now_ms);
    let (hour, last) = (minutes(MINUTES as i64), minutes(5));
    let new = || {
        let pages = Groups::new(&last, &Field::Page, None, false, limits);
        Both(Minutes::new(&hour, limits.exact_max), Some(pages))
    };
    let Both(found, pages) = snapshot.scan(&hour.range_ms, new)?;
    let mut pages = pages.as_ref().map(value_rows).unwrap_or_default();
    pages.retain(|row| row.views > 0);
    pages.sort_unstable_by(|a, b| (b.views, &a.value).cmp(&(a.views, &b.value)));
    pages.truncate(10);
    Ok(Realtime {
        current: found.current.count().n,
        active: found.active.count().n,
        views_5m: found.views[..5].iter().sum(),
        views_1h: found.views.iter().sum(),
        minutes: found.views[..30].iter().rev().copied().collect(),
        pages,
    })
}

pub(crate) fn new_visitors(
    snapshot: &mut impl Scan,
    scope: &Scope,
    limits: &Limits,
) -> Result<NewVisitors, StoreError> {
    let found_max = limits.visitors_max;
    let new = || Visitors { scope, among: None, found: IdSet::default(), found_max };
    let inside = snapshot.scan(&scope.range_ms, new)?.found;
    // Whoever was there was there, whatever they did.
    let before = Scope { filters: Vec::new(), ..scope.over(i64::MIN..scope.range_ms.start) };
    let new = || Visitors { scope: &before, among: Some(&inside), found: IdSet::default(), found_max };
    let returning = snapshot.scan(&before.range_ms, new)?.found.len();
    Ok(NewVisitors { new: Count::exact(inside.len() - returning), returning: Count::exact(returning) })
}

/// A row that may be among the newest: its time and id, the chunk and its place there.
type Candidate = (i64, String, usize, usize);

pub(crate) fn recent(
    snapshot: &mut impl Scan,
    scope: &Scope,
    who: Option<&Subject>,
    limit: usize,
    keys: Keys,
) -> Result<Vec<Event>, StoreError> {
    check_limit(limit)?;
    let mut newest: Vec<(Candidate, Event)> = Vec::new();
    let mut number = 0;
    let mut wants = Wants { all: true, ..Wants::of(scope).who() };
    wants.whose = match who {
        None => Whose::All,
        Some(Subject::User(user)) => Whose::User(keys.user(user)),
        Some(Subject::Anonymous(device)) => Whose::Device(device.clone()),
    };
    snapshot.latest_first(&scope.range_ms, &wants, |chunk, last_ms, seen| {
        number += 1;
        let worst = newest.get(limit.saturating_sub(1)).map(|((time_ms, ..), _)| *time_ms);
        if limit == 0 {
            return Ok(Some(i64::MAX));
        }
        if worst.is_some_and(|worst| worst > last_ms) {
            return Ok(worst);
        }
        let Some(rows) = Rows::of(chunk, scope, &scope.range_ms)? else { return Ok(worst) };
        let theirs = theirs(chunk, &rows, who, seen, keys)?;
        let mut found: Vec<usize> = rows.iter(rows.range.clone()).filter(|row| theirs[*row]).collect();
        // Rows stand by time and by the JSON of their ids, which is not the order of these.
        let start = found.len().saturating_sub(limit);
        let first_ms = found.get(start).map(|row| rows.times[*row]);
        found.retain(|row| {
            Some(rows.times[*row]) >= first_ms && worst.is_none_or(|worst| rows.times[*row] >= worst)
        });
        if found.is_empty() {
            return Ok(worst);
        }
        let events = chunk.events(&found)?;
        for (row, event) in found.into_iter().zip(events) {
            newest.push(((event.time_ms(), event.id().as_str().to_owned(), number, row), event));
        }
        newest.sort_unstable_by(|(a, _), (b, _)| (b.0, &b.1).cmp(&(a.0, &a.1)));
        newest.truncate(limit);
        Ok(newest.get(limit.saturating_sub(1)).map(|((time_ms, ..), _)| *time_ms))
    })?;
    Ok(newest.into_iter().map(|(_, event)| event).collect())
}

/// The rows that are somebody's.
fn theirs(
    chunk: &mut dyn Chunk,
    rows: &Rows,
    who: Option<&Subject>,
    seen: &Seen<'_>,
    keys: Keys,
) -> Result<Vec<bool>, StoreError> {
    match who {
        None => Ok(vec![true; rows.times.len()]),
        Some(Subject::User(user)) => {
            let (root, _) = seen.owners.owner(keys.user(user));
            let whose = chunk.who(true)?;
            let visitors = seen.visitors(&whose);
            let is_theirs = |(row, code): (usize, &u32)| {
                visitor(&whose, &visitors, *code as usize, rows.times[row]) == root
            };
            Ok(whose.codes.iter().enumerate().map(is_theirs).collect())
        }
        Some(Subject::Anonymous(device)) => {
            let Some(TextColumn { codes, texts }) = chunk.path("anonymous_id")? else {
                return Ok(vec![false; rows.times.len()]);
            };
            let is_it = |code| shown(texts.get(code)).as_deref() == Some(device);
            let is_it: Vec<bool> = (0..=texts.len() as u32).map(|code| code != 0 && is_it(code)).collect();
            Ok(codes.iter().map(|code| is_it[*code as usize]).collect())
        }
    }
}
