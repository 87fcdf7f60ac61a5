//! What a question sees of a server: rows of one moment, which are streamed and become
//! chunks of columns in memory.

use std::{ops::Range, rc::Rc, sync::Arc, time::Duration};

use analytics_relay_providers::Event;
use deadpool_postgres::Transaction;
use futures_util::TryStreamExt as _;
use tokio::runtime::Handle;
use tokio_postgres::{Row, types::ToSql};

use super::{
    rows::{self, column_of},
    time::Ts,
};
use crate::{
    CountPoint, Field, Limits, Scope, Sources, StoreError, TenantScope,
    model::{Buckets, Class, Keys},
    scan::{
        answer::count_points,
        chunk::{Are, Chunk, Classes, KeyColumn, TableChunk, Values, values_at},
        counts::Counts,
        owners::OwnerMap,
        seam::{Fold, Patience, Scan, Seen, Wants, Whose},
        shred::walk,
        table::{Table, TextColumn},
    },
};

/// Rows that are fetched at once, and make a chunk.
const CHUNK_ROWS: i32 = 32_768;
/// Of whole events fewer are.
const EVENT_ROWS: i32 = 4_096;
/// Where the newest suffice fewer still.
const NEWEST_ROWS: i32 = 1_000;
/// Rows that a session has, about. What may be in memory at once depends on it, and no answer.
const ROWS_OF_A_SESSION: usize = 4;

/// One moment of a store, for a question. It is asked in a thread that may wait.
pub(super) struct PgScan<'t> {
    pub(super) handle: Handle,
    pub(super) transaction: &'t Transaction<'t>,
    pub(super) of: TenantScope,
    pub(super) owners: Arc<OwnerMap>,
    pub(super) patience: Patience,
    pub(super) keys: Keys,
    pub(super) secret: [u8; 16],
}

/// A statement that streams rows, and what of each is where.
struct Selected {
    sql: String,
    /// Fields with a column, in the order in which they stand behind the fixed ones.
    columns: Vec<Field>,
    with_event: bool,
}

/// Columns that every statement has: time, whose, session, class, machine, and the event where
/// the columns do not say all.
const FIXED: &str = "time_ms, who, session_key, class, is_bot, is_odd";
const FIXED_COUNT: usize = 7;

fn select(wants: &Wants, newest_first: bool) -> Selected {
    let columns: Vec<Field> =
        wants.fields.iter().filter(|field| column_of(field).is_some()).cloned().collect();
    let is_within = |field: &Field| column_of(field).is_none();
    let with_event = wants.all || !wants.paths.is_empty() || wants.fields.iter().any(is_within);
    let event = if with_event { "event" } else { "CASE WHEN is_odd THEN event END" };
    let named = columns.iter().filter_map(column_of).map(|name| format!(", {name}"));
    let bots = if wants.bots { "" } else { " AND NOT is_bot" };
    let order = if newest_first { " ORDER BY \"timestamp\" DESC" } else { "" };
    let sql = format!(
        "SELECT {FIXED}, {event}{} FROM events WHERE tenant = $1 AND ($2::text[] IS NULL OR website_id = ANY($2))
            AND \"timestamp\" BETWEEN $3 AND $4 AND time_ms >= $5 AND time_ms < $6
            AND ($7::bigint[] IS NULL OR who = ANY($7)) AND ($8::text IS NULL OR anonymous_id = $8 OR is_odd){bots}{order}",
        named.collect::<String>()
    );
    Selected { sql, columns, with_event }
}

/// Whose events: the tenant, and the sources if not all.
pub(super) fn place(of: &TenantScope) -> (String, Option<Vec<String>>) {
    let sources = match &of.sources {
        Sources::All => None,
        Sources::Only(sources) => {
            Some(sources.iter().map(|source| rows::kept(source).into_owned()).collect())
        }
    };
    (rows::kept(&of.tenant).into_owned(), sources)
}

impl PgScan<'_> {
    /// Calls `each` with the rows of a range, some at a time, until it wants no more.
    fn stream(
        &self,
        range_ms: &Range<i64>,
        selected: &Selected,
        whose: &Whose,
        at_once: i32,
        mut each: impl FnMut(&[Row]) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        if range_ms.is_empty() {
            return Ok(());
        }
        let (tenant, sources) = place(&self.of);
        let (first, last) = (Ts::of(range_ms.start), Ts::of(range_ms.end));
        let keys = match whose {
            Whose::Key(key) => Some(vec![*key]),
            Whose::User(key) => Some(self.owners.keys_of(self.owners.owner(*key).0)),
            Whose::All | Whose::Device(_) => None,
        };
        let keys: Option<Vec<i64>> = keys.map(|keys| keys.into_iter().map(|key| key as i64).collect());
        let device = match whose {
            // As it stands in the column, where it is not odd.
            Whose::Device(device) => Some(device.replace('\0', "\u{fffd}")),
            _ => None,
        };
        let parameters: [&(dyn ToSql + Sync); 8] =
            [&tenant, &sources, &first, &last, &range_ms.start, &range_ms.end, &keys, &device];
        let portal = self.patience.wait(&self.handle, async {
            let statement = self.transaction.prepare(&selected.sql).await?;
            self.transaction.bind(&statement, &parameters).await
        })?;
        loop {
            self.patience.check()?;
            let rows = self.patience.wait(&self.handle, self.transaction.query_portal(&portal, at_once))?;
            let is_last = rows.len() < at_once as usize;
            if !rows.is_empty() && !each(&rows)? || is_last {
                return Ok(());
            }
        }
    }

    /// Calls `take` with rows as a chunk.
    fn with_chunk<T>(
        &self,
        rows: &[Row],
        selected: &Selected,
        wants: &Wants,
        take: impl FnOnce(&mut dyn Chunk) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if wants.all {
            let mut table = Table::new(self.keys, self.secret);
            for row in rows {
                table.push(&event_of(row.get(FIXED_COUNT - 1))?);
            }
            let order = table.order(&[]).into();
            return take(&mut TableChunk { table: &table, order });
        }
        take(&mut Columns::of(rows, selected, wants, &self.secret)?)
    }

    /// Counts events and visitors of buckets where the server can: there is no filter. What it
    /// sums up is who did how much in a bucket, and when first and last; whose that is says the
    /// moment's owners.
    pub(super) fn counts(
        &self,
        scope: &Scope,
        buckets: &Buckets,
        limits: &Limits,
    ) -> Result<Vec<CountPoint>, StoreError> {
        const CHECKED: usize = 4_096;
        let mut counts = Counts::new(scope, buckets, false, limits);
        if scope.range_ms.is_empty() {
            return Ok(count_points(counts, buckets));
        }
        let bots = if scope.include_bots { "" } else { " AND NOT is_bot" };
        let sql = format!(
            "SELECT width_bucket(time_ms, $7::bigint[]) - 1, who, count(*), min(time_ms), max(time_ms) FROM events
                WHERE tenant = $1 AND ($2::text[] IS NULL OR website_id = ANY($2))
                AND \"timestamp\" BETWEEN $3 AND $4 AND time_ms >= $5 AND time_ms < $6{bots} GROUP BY 1, 2"
        );
        let ((tenant, sources), range_ms) = (place(&self.of), &scope.range_ms);
        let (first, last) = (Ts::of(range_ms.start), Ts::of(range_ms.end));
        let parameters: [&(dyn ToSql + Sync); 7] =
            [&tenant, &sources, &first, &last, &range_ms.start, &range_ms.end, &buckets.starts_ms];
        let seen = Seen { owners: &self.owners };
        // Not some at a time: the server uses several processes only for all at once.
        let rows = self.patience.wait(&self.handle, async {
            let statement = self.transaction.prepare(&sql).await?;
            self.transaction.query_raw(&statement, parameters).await
        })?;
        let mut rows = std::pin::pin!(rows);
        let mut number = 0_usize;
        while let Some(row) = self.patience.wait(&self.handle, rows.as_mut().try_next())? {
            let (bucket, who): (i32, i64) = (row.get(0), row.get(1));
            let [events, first_ms, last_ms] = [2, 3, 4].map(|at| row.get::<_, i64>(at));
            let bucket = usize::try_from(bucket).unwrap_or(usize::MAX);
            counts.add(bucket, events.max(0) as u64, who as u64, (first_ms, last_ms), &seen);
            number += 1;
            if number.is_multiple_of(CHECKED) {
                counts.bound();
                self.patience.check()?;
            }
        }
        counts.bound();
        Ok(count_points(counts, buckets))
    }

    fn sum_of_hours(&self, range_ms: &Range<i64>) -> Result<usize, StoreError> {
        let (tenant, sources) = place(&self.of);
        let (first, last) = (Ts::of(range_ms.start), Ts::of(range_ms.end));
        let sql = "SELECT coalesce(sum(n), 0)::bigint FROM hourly WHERE tenant = $1
            AND ($2::text[] IS NULL OR website_id = ANY($2))
            AND hour BETWEEN date_trunc('hour', $3::timestamptz) AND $4";
        let sum: i64 = self.patience.wait(&self.handle, async {
            let statement = self.transaction.prepare_cached(sql).await?;
            let row = self.transaction.query_one(&statement, &[&tenant, &sources, &first, &last]).await?;
            Ok::<_, StoreError>(row.get(0))
        })?;
        Ok(usize::try_from(sum).unwrap_or_default())
    }
}

fn event_of(json: Option<&str>) -> Result<Event, StoreError> {
    let event = json.and_then(|json| Event::from_json(json.as_bytes()).ok());
    event.ok_or_else(|| StoreError::Damaged("an event is none".into()))
}

impl Scan for PgScan<'_> {
    fn scan<F: Fold>(&mut self, range_ms: &Range<i64>, new: impl Fn() -> F + Sync) -> Result<F, StoreError> {
        let mut fold = new();
        let wants = fold.wants();
        let selected = select(&wants, false);
        let seen = Seen { owners: &self.owners };
        let at_once = if selected.with_event { EVENT_ROWS } else { CHUNK_ROWS };
        self.stream(range_ms, &selected, &wants.whose, at_once, |rows| {
            self.with_chunk(rows, &selected, &wants, |chunk| fold.take(chunk, &seen))?;
            Ok(true)
        })?;
        Ok(fold)
    }

    fn latest_first(
        &mut self,
        range_ms: &Range<i64>,
        wants: &Wants,
        mut take: impl FnMut(&mut dyn Chunk, i64, &Seen<'_>) -> Result<Option<i64>, StoreError>,
    ) -> Result<(), StoreError> {
        let selected = select(wants, true);
        let seen = Seen { owners: &self.owners };
        self.stream(range_ms, &selected, &wants.whose, NEWEST_ROWS, |rows| {
            let times = || rows.iter().map(|row| row.get::<_, i64>(0));
            let last_ms = times().max().unwrap_or(i64::MIN);
            let wanted = self.with_chunk(rows, &selected, wants, |chunk| take(chunk, last_ms, &seen))?;
            // Those that follow stand behind the last, which may be at an end of time.
            let next_ms = times().next_back().map_or(i64::MIN, |time_ms| Ts::of(time_ms).last_ms());
            Ok(wanted.is_none_or(|wanted| wanted <= next_ms))
        })
    }

    fn sessions_max(&self, range_ms: &Range<i64>) -> Result<usize, StoreError> {
        Ok(self.sum_of_hours(range_ms)? / ROWS_OF_A_SESSION)
    }

    fn rows_max(&self, range_ms: &Range<i64>) -> Result<usize, StoreError> {
        self.sum_of_hours(range_ms)
    }

    fn damaged_blocks(&self) -> u64 {
        0
    }

    fn check(&self) -> Result<(), StoreError> {
        self.patience.check()
    }
}

/// Rows as columns, by time.
struct Columns {
    times: Rc<Vec<i64>>,
    who: KeyColumn,
    sessions: KeyColumn,
    classes: Rc<Classes>,
    has_bots: bool,
    fields: Vec<(Field, Rc<Values>)>,
    paths: Vec<(String, TextColumn)>,
}

impl Columns {
    fn of(rows: &[Row], selected: &Selected, wants: &Wants, secret: &[u8; 16]) -> Result<Self, StoreError> {
        let mut order: Vec<(i64, usize)> =
            rows.iter().enumerate().map(|(at, row)| (row.get::<_, i64>(0), at)).collect();
        order.sort_unstable();
        let sorted = || order.iter().map(|(_, at)| &rows[*at]);
        let class = |row: &Row| u32::from(row.get::<_, i16>(3) as u16) + if row.get(4) { 4 } else { 0 };
        let codes: Vec<u32> = sorted().map(class).collect();
        let all = |is_bot: bool| Class::ALL.map(|class| (class, is_bot));
        let classes = [all(false), all(true)].concat();
        if codes.iter().any(|code| *code as usize >= classes.len()) {
            return Err(StoreError::Damaged("a class is none".into()));
        }
        let mut columns = Self {
            times: Rc::new(order.iter().map(|(time_ms, _)| *time_ms).collect()),
            who: KeyColumn::of(sorted().map(|row| row.get::<_, i64>(1) as u64)),
            sessions: KeyColumn::of(sorted().map(|row| row.get::<_, i64>(2) as u64)),
            has_bots: codes.iter().any(|code| *code >= 4),
            classes: Rc::new(Classes { codes, classes }),
            fields: Vec::new(),
            paths: paths_of(wants).into_iter().map(|path| (path, TextColumn::default())).collect(),
        };
        columns.read_fields(sorted, selected, secret)?;
        if selected.with_event {
            columns.read_paths(sorted, secret);
        }
        Ok(columns)
    }

    /// The fields that have columns, and of rows of which the columns do not say all, what
    /// their events say.
    fn read_fields<'r, I: Iterator<Item = &'r Row>>(
        &mut self,
        sorted: impl Fn() -> I,
        selected: &Selected,
        secret: &[u8; 16],
    ) -> Result<(), StoreError> {
        let mut odd = Vec::new();
        for (at, row) in sorted().enumerate().filter(|(_, row)| row.get(5)) {
            let json: Option<&str> = row.get(FIXED_COUNT - 1);
            odd.push((at, event_of(json)?, rows::find(json.unwrap_or_default())));
        }
        for (place, field) in selected.columns.iter().enumerate() {
            let (mut column, mut next_odd) = (TextColumn::default(), odd.iter().peekable());
            for (at, row) in sorted().enumerate() {
                if let Some((_, event, found)) = next_odd.next_if(|(odd, ..)| *odd == at) {
                    if let Some(value) = rows::value_of(event, found, field) {
                        column.set(at, &value, secret);
                    }
                } else if let Some(text) = row.get::<_, Option<&str>>(FIXED_COUNT + place) {
                    column.set(at, text, secret);
                }
            }
            column.codes.resize(self.times.len(), 0);
            self.fields.push((field.clone(), Rc::new(Values { column, are: Are::Plain })));
        }
        Ok(())
    }

    /// What stands at paths within the events, the first of each.
    fn read_paths<'r, I: Iterator<Item = &'r Row>>(&mut self, sorted: impl Fn() -> I, secret: &[u8; 16]) {
        for (at, row) in sorted().enumerate() {
            let json: &str = row.get::<_, Option<&str>>(FIXED_COUNT - 1).unwrap_or_default();
            walk(json, &mut |path, place| {
                if let Some((_, column)) = self.paths.iter_mut().find(|(one, _)| one == path)
                    && column.codes.len() <= at
                {
                    column.set(at, &json[place], secret);
                }
            });
        }
        for (_, column) in &mut self.paths {
            column.codes.resize(self.times.len(), 0);
        }
    }
}

/// The paths that are read of events: those that are asked for, and those of fields that have
/// no column.
fn paths_of(wants: &Wants) -> Vec<String> {
    let mut paths = wants.paths.clone();
    for field in wants.fields.iter().filter(|field| column_of(field).is_none()) {
        for path in field.paths() {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    paths
}

/// A fold that asks for what it did not say that it wants.
fn not_wanted() -> StoreError {
    StoreError::Damaged("a question reads what it did not say that it wants".into())
}

impl Chunk for Columns {
    fn rows(&self) -> usize {
        self.times.len()
    }

    fn has_bots(&self) -> bool {
        self.has_bots
    }

    fn bounds_ms(&self) -> Option<(i64, i64)> {
        self.times.first().copied().zip(self.times.last().copied())
    }

    fn times(&self) -> Result<Rc<Vec<i64>>, StoreError> {
        Ok(self.times.clone())
    }

    fn who(&self, _: bool) -> Result<KeyColumn, StoreError> {
        Ok(self.who.clone())
    }

    fn sessions(&self) -> Result<KeyColumn, StoreError> {
        Ok(self.sessions.clone())
    }

    fn classes(&self) -> Result<Rc<Classes>, StoreError> {
        Ok(self.classes.clone())
    }

    fn field(&mut self, field: &Field) -> Result<Rc<Values>, StoreError> {
        if let Some((_, values)) = self.fields.iter().find(|(one, _)| one == field) {
            return Ok(values.clone());
        }
        if column_of(field).is_some() {
            return Err(not_wanted());
        }
        let values = Rc::new(values_at(field, self.rows(), |path| self.path(path))?);
        self.fields.push((field.clone(), values.clone()));
        Ok(values)
    }

    fn path(&mut self, path: &str) -> Result<Option<TextColumn>, StoreError> {
        let column = self.paths.iter().find(|(one, _)| one == path).ok_or_else(not_wanted)?;
        Ok(Some(column.1.clone()))
    }

    fn paths(&mut self) -> Result<(Vec<String>, bool), StoreError> {
        Err(not_wanted())
    }

    fn skeletons(&self) -> Result<TextColumn, StoreError> {
        Err(not_wanted())
    }

    fn events(&mut self, _: &[usize]) -> Result<Vec<Event>, StoreError> {
        Err(not_wanted())
    }
}

/// What holds in the transaction of a question: how long each of its statements may take.
pub(super) fn bounds(deadline: Duration) -> String {
    format!("SET LOCAL statement_timeout = {}", deadline.as_millis().max(1))
}
