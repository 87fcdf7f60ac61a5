//! Every question over a list of events in memory, written to be read and not to be fast:
//! it judges the backends.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use analytics_relay_providers::{Event, event::JsonObject};
use async_trait::async_trait;

use crate::{
    Appended, AsOf, Breakdown, Bucket, Count, CountPoint, Deleted, Field, Funnel, FunnelAnswer, Identity,
    LogEntry, NamedPoint, NewVisitors, Operator, PageRow, Point, PropertyRow, Realtime, Scope, SessionRow,
    Store, StoreError, Subject, Summary, TenantScope, Unit, ValueRow,
    model::{
        Act, Buckets, Class, FactLimits, Keys, KnownFact, Owners, SessionPart, Walk,
        event::{ENGAGEMENT_SECONDS, TIME_ON_PAGE, looked_ms, shown, source_of, what},
        funnel,
        identity::Visitor,
        sessions::{SessionEvent, goes_on, look, sessions, times_on_pages},
        tenant::Tenant,
    },
    scope::SEPARATOR,
};

/// A store in memory.
#[derive(Debug)]
pub struct Oracle {
    keys: Keys,
    limits: FactLimits,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    events: Vec<Event>,
    seen: HashSet<(String, String)>,
    tenants: BTreeMap<String, Tenant>,
}

/// An event of a question, with all that is asked of it.
struct Asked<'a> {
    event: &'a Event,
    class: Class,
    name: &'a str,
    visitor: u64,
    matched: bool,
}

impl Oracle {
    /// An empty one. Keys decide which of two visitors of one millisecond is the first.
    pub fn new(secret: [u8; 16]) -> Self {
        Self::with_keys(Keys::new(secret))
    }

    pub(crate) fn with_keys(keys: Keys) -> Self {
        Self { keys, limits: FactLimits::default(), kept: Mutex::default() }
    }

    #[cfg(test)]
    pub(crate) fn within(self, limits: FactLimits) -> Self {
        Self { limits, ..self }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The events of a scope in a range, in any order, those that do not match its filters
    /// too.
    fn asked<T>(
        &self,
        scope: &Scope,
        range_ms: &Range<i64>,
        answer: impl FnOnce(Vec<Asked<'_>>) -> T,
    ) -> Result<T, StoreError> {
        scope.check()?;
        let kept = self.kept();
        let tenant = kept.tenants.get(&scope.of.tenant).cloned().unwrap_or_default();
        let owners = tenant.facts.resolve();
        let events = kept.events.iter().filter(|event| {
            event.tenant().unwrap_or_default() == scope.of.tenant
                && scope.of.includes(&source_of(event))
                && range_ms.contains(&event.time_ms())
                && (scope.include_bots || !is_bot(event))
        });
        let asked = events.map(|event| {
            let (class, name) = what(event);
            let matched =
                scope.filters.iter().all(|filter| filter.passes(value(event, &filter.field).as_deref()));
            Asked { event, class, name, visitor: self.visitor(event, &owners), matched }
        });
        Ok(answer(asked.collect()))
    }

    /// Those that match.
    fn matching<T>(&self, scope: &Scope, answer: impl FnOnce(Vec<Asked<'_>>) -> T) -> Result<T, StoreError> {
        self.asked(scope, &scope.range_ms, |mut asked| {
            asked.retain(|asked| asked.matched);
            answer(asked)
        })
    }

    fn visitor(&self, event: &Event, owners: &Owners) -> u64 {
        match owners.visitor(event.user_id(), event.anonymous_id(), event.time_ms()) {
            Some(Visitor::User(root)) => self.keys.user(root),
            Some(Visitor::Device(device)) => self.keys.anonymous(device),
            None => 0,
        }
    }

    fn session_event(&self, asked: &Asked<'_>, by: &Field) -> SessionEvent<Option<String>> {
        SessionEvent {
            key: self.keys.session(asked.event),
            time_ms: asked.event.time_ms(),
            value: value(asked.event, by),
            visitor: asked.visitor,
            page: value(asked.event, &Field::Page),
            class: asked.class,
            matched: asked.matched,
        }
    }

    /// The sessions that a question counts.
    fn sessions(&self, scope: &Scope, by: &Field) -> Result<Vec<SessionPart<Option<String>>>, StoreError> {
        self.asked(scope, &look(&scope.range_ms), |asked| {
            let events = asked.iter().map(|asked| self.session_event(asked, by)).collect();
            let mut found = sessions(events);
            found.retain(|session| session.counts_in(&scope.range_ms));
            found
        })
    }

    /// How long pages were looked at: a row for each session and page.
    fn times(&self, scope: &Scope) -> Result<Vec<(Option<String>, u64)>, StoreError> {
        self.asked(scope, &look(&scope.range_ms), |asked| {
            let events = asked.iter().map(|asked| (self.session_event(asked, &Field::Page), looked(asked)));
            let mut events: Vec<_> = events.filter(|(event, _)| !event.key.is_none()).collect();
            events.sort_unstable();
            let mut all: Vec<(SessionPart<_>, Vec<_>)> = Vec::new();
            for (event, looked) in events {
                match all.last_mut() {
                    Some((session, of_it)) if goes_on(session, &event) => {
                        session.join(SessionPart::of(&event));
                        of_it.push((event, looked));
                    }
                    _ => all.push((SessionPart::of(&event), vec![(event, looked)])),
                }
            }
            let counted = all.iter().filter(|(session, _)| session.counts_in(&scope.range_ms));
            counted.flat_map(|(_, events)| times_on_pages(events)).collect()
        })
    }

    fn summary_of(&self, scope: &Scope) -> Result<Summary, StoreError> {
        let mut summary = self.matching(scope, |asked| Summary {
            events: asked.len() as u64,
            views: asked.iter().filter(|asked| asked.class == Class::View).count() as u64,
            visitors: different(&asked),
            ..Summary::default()
        })?;
        for session in self.sessions(scope, &Field::Page)? {
            summary.sessions.add(&session.sums());
        }
        Ok(summary)
    }

    fn breakdown_of(&self, scope: &Scope, by: &Field) -> Result<Vec<ValueRow>, StoreError> {
        self.matching(scope, |asked| {
            let mut by_value: BTreeMap<Option<String>, Vec<Asked<'_>>> = BTreeMap::new();
            for asked in asked {
                by_value.entry(value(asked.event, by)).or_default().push(asked);
            }
            by_value.into_iter().map(|(value, asked)| value_row(value, &asked)).collect()
        })
    }
}

fn value_row(value: Option<String>, asked: &[Asked<'_>]) -> ValueRow {
    ValueRow {
        value,
        events: asked.len() as u64,
        views: asked.iter().filter(|asked| asked.class == Class::View).count() as u64,
        visitors: different(asked),
        last_ms: asked.iter().map(|asked| asked.event.time_ms()).max().unwrap_or_default(),
    }
}

fn different(asked: &[Asked<'_>]) -> Count {
    let visitors: BTreeSet<u64> = asked.iter().map(|asked| asked.visitor).filter(|one| *one != 0).collect();
    Count::exact(visitors.len())
}

fn looked(asked: &Asked<'_>) -> Option<u64> {
    let of = |name: &str| json_at(asked.event, &format!("properties{SEPARATOR}{name}"));
    let seconds = (asked.class == Class::Ping).then(|| of(ENGAGEMENT_SECONDS)).flatten();
    seconds.or_else(|| of(TIME_ON_PAGE)).and_then(|json| looked_ms(&json))
}

fn is_bot(event: &Event) -> bool {
    event.enriched().is_some_and(|enriched| entry(enriched.json(), "bot").is_some())
}

/// What a field of an event says.
pub(crate) fn value(event: &Event, field: &Field) -> Option<String> {
    match field {
        Field::Name => Some(what(event).1.to_owned()),
        Field::User => event.user_id().map(str::to_owned),
        _ => field.paths().iter().find_map(|path| {
            let json = json_at(event, path)?;
            shown(&json).map(|text| text.into_owned())
        }),
    }
}

/// The JSON text at a path of an event.
fn json_at(event: &Event, path: &str) -> Option<String> {
    let (root, rest) = path.split_once(SEPARATOR)?;
    let object = match root {
        "properties" => event.properties().into(),
        "enriched" => event.enriched()?,
        _ => event.context()?,
    };
    if root == "properties" {
        // Whatever is in it, it is one name.
        return entry(object.json(), rest);
    }
    let mut json = object.json().to_owned();
    for name in rest.split(SEPARATOR) {
        json = entry(&json, name)?;
    }
    Some(json)
}

fn entry(json: &str, name: &str) -> Option<String> {
    let limits = &analytics_relay_providers::properties::Limits::NONE;
    let object = JsonObject::parse(json, limits).ok()?;
    object.entries().into_iter().find(|(key, _)| key == name).map(|(_, value)| value.get().to_owned())
}

fn cut<Row>(mut rows: Vec<Row>, limit: usize) -> Breakdown<Row> {
    let total = rows.len() as u64;
    rows.truncate(limit);
    Breakdown { rows, total, others: None, damaged_blocks: 0 }
}

#[async_trait]
impl Store for Oracle {
    async fn append(&self, batch: &[Event]) -> Result<Vec<Appended>, StoreError> {
        let mut kept = self.kept();
        let kept = &mut *kept;
        let (mut verdicts, mut new) = (Vec::new(), BTreeMap::<String, Vec<&Event>>::new());
        for event in batch {
            let tenant = event.tenant().unwrap_or_default().to_owned();
            let is_new = kept.seen.insert((tenant.clone(), event.id().as_str().to_owned()));
            verdicts.push(if is_new { Appended::New } else { Appended::Duplicate });
            if is_new {
                new.entry(tenant).or_default().push(event);
                kept.events.push(event.clone());
            }
        }
        for (tenant, events) in new {
            kept.tenants.entry(tenant).or_default().note(&events, &self.limits);
        }
        Ok(verdicts)
    }

    async fn as_of(&self, of: &TenantScope) -> Result<AsOf, StoreError> {
        let kept = self.kept();
        let is_its = |event: &&Event| {
            event.tenant().unwrap_or_default() == of.tenant && of.includes(&source_of(event))
        };
        let times = || kept.events.iter().filter(is_its).map(Event::time_ms);
        Ok(AsOf { events: times().count() as u64, last_ms: times().max() })
    }

    async fn counts(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<CountPoint>, StoreError> {
        let points = self.series(scope, bucket, zone).await?.into_iter();
        let count = |Point { start_ms, summary }| CountPoint {
            start_ms,
            events: summary.events,
            visitors: summary.visitors,
        };
        Ok(points.map(count).collect())
    }

    async fn summary(&self, scope: &Scope) -> Result<Summary, StoreError> {
        self.summary_of(scope)
    }

    async fn series(&self, scope: &Scope, bucket: Bucket, zone: &str) -> Result<Vec<Point>, StoreError> {
        let buckets = Buckets::new(&scope.range_ms, bucket, zone)?;
        let sessions = self.sessions(scope, &Field::Page)?;
        let point = |(index, start_ms): (usize, &i64)| {
            let end_ms = buckets.starts_ms.get(index + 1).copied().unwrap_or(scope.range_ms.end);
            let range_ms = (*start_ms).max(scope.range_ms.start)..end_ms;
            let mut summary = self.summary_of(&scope.over(range_ms.clone()))?;
            // Of one look, so that they add up.
            summary.sessions = Default::default();
            let inside = sessions.iter().filter(|session| range_ms.contains(&session.start_ms));
            inside.for_each(|session| summary.sessions.add(&session.sums()));
            Ok(Point { start_ms: *start_ms, summary })
        };
        buckets.starts_ms.iter().enumerate().map(point).collect()
    }

    async fn series_by_name(
        &self,
        scope: &Scope,
        bucket: Bucket,
        zone: &str,
    ) -> Result<Vec<NamedPoint>, StoreError> {
        let buckets = Buckets::new(&scope.range_ms, bucket, zone)?;
        self.matching(scope, |asked| {
            let mut all: BTreeMap<(usize, String), Vec<Asked<'_>>> = BTreeMap::new();
            for asked in asked {
                let Some(index) = buckets.index(asked.event.time_ms()) else { continue };
                all.entry((index, asked.name.to_owned())).or_default().push(asked);
            }
            let point = |((index, name), asked): ((usize, String), Vec<Asked<'_>>)| NamedPoint {
                start_ms: buckets.starts_ms[index],
                name,
                events: asked.len() as u64,
                visitors: different(&asked),
            };
            all.into_iter().map(point).collect()
        })
    }

    async fn breakdown(
        &self,
        scope: &Scope,
        by: &Field,
        limit: usize,
    ) -> Result<Breakdown<ValueRow>, StoreError> {
        let mut rows = self.breakdown_of(scope, by)?;
        rows.sort_by(|a, b| (b.visitors.n, b.events, &a.value).cmp(&(a.visitors.n, a.events, &b.value)));
        Ok(cut(rows, limit))
    }

    async fn properties(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PropertyRow>, StoreError> {
        let rows = self.matching(scope, |asked| {
            let mut rows: BTreeMap<String, PropertyRow> = BTreeMap::new();
            for Asked { event, .. } in &asked {
                let names: BTreeSet<String> = JsonObject::from(event.properties())
                    .entries()
                    .into_iter()
                    .map(|(name, _)| name)
                    .collect();
                for name in names {
                    if value(event, &Field::Property(name.clone())).is_some() {
                        let row = rows.entry(name.clone()).or_insert_with(|| PropertyRow {
                            name: Some(name),
                            events: 0,
                            last_ms: i64::MIN,
                        });
                        row.events += 1;
                        row.last_ms = row.last_ms.max(event.time_ms());
                    }
                }
            }
            rows.into_values().collect::<Vec<_>>()
        });
        let mut rows = rows?;
        rows.sort_by(|a, b| (b.events, &a.name).cmp(&(a.events, &b.name)));
        Ok(cut(rows, limit))
    }

    async fn sessions_by(
        &self,
        scope: &Scope,
        by: &Field,
        limit: usize,
    ) -> Result<Breakdown<SessionRow>, StoreError> {
        let mut all: BTreeMap<Option<String>, (SessionRow, BTreeSet<u64>)> = BTreeMap::new();
        for session in self.sessions(scope, by)? {
            let (row, visitors) = all.entry(session.first.0.clone()).or_default();
            row.sums.add(&session.sums());
            if session.first.1 != 0 {
                visitors.insert(session.first.1);
            }
        }
        let row = |(value, (row, visitors)): (Option<String>, (SessionRow, BTreeSet<u64>))| SessionRow {
            value,
            visitors: Count::exact(visitors.len()),
            ..row
        };
        let mut rows: Vec<_> = all.into_iter().map(row).collect();
        rows.sort_by(|a, b| {
            (b.visitors.n, b.sums.sessions, &a.value).cmp(&(a.visitors.n, a.sums.sessions, &b.value))
        });
        Ok(cut(rows, limit))
    }

    async fn pages(&self, scope: &Scope, limit: usize) -> Result<Breakdown<PageRow>, StoreError> {
        let mut all: BTreeMap<Option<String>, PageRow> = BTreeMap::new();
        let views = self.matching(scope, |mut asked| {
            asked.retain(|asked| asked.class == Class::View);
            let mut by_page: BTreeMap<Option<String>, Vec<Asked<'_>>> = BTreeMap::new();
            for asked in asked {
                by_page.entry(value(asked.event, &Field::Page)).or_default().push(asked);
            }
            by_page
                .into_iter()
                .map(|(page, asked)| (page, asked.len() as u64, different(&asked)))
                .collect::<Vec<_>>()
        })?;
        for (page, views, visitors) in views {
            let row = all.entry(page).or_default();
            (row.views, row.visitors) = (views, visitors);
        }
        for session in self.sessions(scope, &Field::Page)? {
            if let Some((_, page)) = &session.entry {
                all.entry(page.clone()).or_default().entered.add(&session.sums());
            }
            if let Some((_, page)) = &session.exit {
                all.entry(page.clone()).or_default().exits += 1;
            }
        }
        for (page, ms) in self.times(scope)? {
            let row = all.entry(page).or_default();
            (row.time_ms, row.timed) = (row.time_ms + ms, row.timed + 1);
        }
        let mut rows: Vec<_> = all.into_iter().map(|(page, row)| PageRow { page, ..row }).collect();
        rows.sort_by(|a, b| (b.visitors.n, b.views, &a.page).cmp(&(a.visitors.n, a.views, &b.page)));
        Ok(cut(rows, limit))
    }

    async fn funnel(&self, scope: &Scope, funnel: &Funnel) -> Result<FunnelAnswer, StoreError> {
        let range =
            scope.range_ms.start..scope.range_ms.end.saturating_add(funnel.window_ms).saturating_add(1);
        let count = funnel.steps.len();
        let walks = self.asked(scope, &range, |asked| {
            let mut acts: BTreeMap<u64, Vec<Act>> = BTreeMap::new();
            for asked in asked {
                let passes = |step: &crate::Step| {
                    let mut filters = step.filters.iter();
                    asked.matched
                        && filters.all(|filter| filter.passes(value(asked.event, &filter.field).as_deref()))
                };
                let bits = funnel.steps.iter().enumerate().filter(|(_, step)| passes(step));
                let steps = bits.fold(0, |bits, (index, _)| bits | 1 << index);
                let unit = match funnel.unit {
                    Unit::Visitor => asked.visitor,
                    Unit::User => asked.event.user_id().map_or(0, |_| asked.visitor),
                    Unit::Session => match self.keys.session(asked.event) {
                        key if key.by_gap() => 0,
                        key => key.0,
                    },
                };
                let tells = steps != 0 || matches!(asked.class, Class::View | Class::Action);
                if unit != 0 && tells {
                    acts.entry(unit).or_default().push(Act { time_ms: asked.event.time_ms(), steps });
                }
            }
            let walk = |mut acts: Vec<Act>| -> Walk {
                acts.sort_unstable();
                funnel::walk(&acts, count, &scope.range_ms, funnel.window_ms, funnel.order)
            };
            acts.into_values().map(walk).collect::<Vec<_>>()
        })?;
        Ok(FunnelAnswer { steps: funnel::count(&walks, count), damaged_blocks: 0 })
    }

    async fn realtime(&self, scope: &Scope, now_ms: i64) -> Result<Realtime, StoreError> {
        let minutes = |n: i64| scope.over(now_ms.saturating_sub(n * 60_000)..now_ms);
        let mut pages = self.breakdown_of(&minutes(5), &Field::Page)?;
        pages.retain(|row| row.views > 0);
        pages.sort_by(|a, b| (b.views, &a.value).cmp(&(a.views, &b.value)));
        pages.truncate(10);
        let minute =
            |n: i64| scope.over(now_ms.saturating_sub((n + 1) * 60_000)..now_ms.saturating_sub(n * 60_000));
        let each = (0..30).rev().map(|n| Ok(self.summary_of(&minute(n))?.views));
        Ok(Realtime {
            current: self.summary_of(&minutes(5))?.visitors.n,
            active: self.summary_of(&minutes(30))?.visitors.n,
            views_5m: self.summary_of(&minutes(5))?.views,
            views_1h: self.summary_of(&minutes(60))?.views,
            minutes: each.collect::<Result<_, StoreError>>()?,
            pages,
        })
    }

    async fn new_visitors(&self, scope: &Scope) -> Result<NewVisitors, StoreError> {
        let inside =
            self.matching(scope, |asked| asked.iter().map(|asked| asked.visitor).collect::<BTreeSet<_>>())?;
        let before = Scope { filters: Vec::new(), ..scope.over(i64::MIN..scope.range_ms.start) };
        let before =
            self.matching(&before, |asked| asked.iter().map(|asked| asked.visitor).collect::<BTreeSet<_>>())?;
        let inside: Vec<_> = inside.into_iter().filter(|visitor| *visitor != 0).collect();
        let returning = inside.iter().filter(|visitor| before.contains(visitor)).count();
        Ok(NewVisitors { new: Count::exact(inside.len() - returning), returning: Count::exact(returning) })
    }

    async fn recent(
        &self,
        scope: &Scope,
        who: Option<&Subject>,
        limit: usize,
    ) -> Result<Vec<Event>, StoreError> {
        let owners = self.kept().tenants.get(&scope.of.tenant).map(|tenant| tenant.facts.resolve());
        let owners = owners.unwrap_or_default();
        self.matching(scope, |asked| {
            let is_theirs = |asked: &&Asked<'_>| match who {
                None => true,
                Some(Subject::User(user)) => asked.visitor == self.keys.user(owners.root(user)),
                Some(Subject::Anonymous(device)) => asked.event.anonymous_id() == Some(device),
            };
            let mut events: Vec<Event> =
                asked.iter().filter(is_theirs).map(|asked| asked.event.clone()).collect();
            events.sort_by(|a, b| (b.time_ms(), b.id()).cmp(&(a.time_ms(), a.id())));
            events.truncate(limit);
            events
        })
    }

    async fn identity(&self, of: &TenantScope, who: &Subject) -> Result<Option<Identity>, StoreError> {
        let tenant = of.whole()?;
        let kept = self.kept();
        Ok(kept.tenants.get(tenant).and_then(|tenant| tenant.identity(who, times(who, of, &kept.events))))
    }

    async fn identity_log(
        &self,
        of: &TenantScope,
        who: &Subject,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let tenant = of.whole()?;
        let kept = self.kept();
        let Some(tenant) = kept.tenants.get(tenant) else { return Ok(Vec::new()) };
        let identity = tenant.identity(who, times(who, of, &kept.events)).unwrap_or_default();
        let (Subject::User(id) | Subject::Anonymous(id)) = who;
        let ids: BTreeSet<&String> = identity.users.iter().chain(&identity.anonymous).chain([id]).collect();
        let names = |entry: &&LogEntry| ids.contains(&entry.from) || ids.contains(&entry.user);
        Ok(tenant.log.iter().rev().filter(names).take(limit).cloned().collect())
    }

    async fn link(
        &self,
        of: &TenantScope,
        from: &str,
        user: &str,
        joined: bool,
        by: &Operator,
    ) -> Result<(), StoreError> {
        let tenant = of.whole()?;
        let mut kept = self.kept();
        kept.tenants.entry(tenant.to_owned()).or_default().link(from, user, joined, by);
        Ok(())
    }

    async fn know(&self, facts: &[KnownFact]) -> Result<u64, StoreError> {
        let mut kept = self.kept();
        for KnownFact { tenant, what } in facts {
            kept.tenants.entry(tenant.clone()).or_default().know(what, &self.limits);
        }
        Ok(0)
    }

    async fn erase(&self, of: &TenantScope, who: &Subject) -> Result<Deleted, StoreError> {
        of.whole()?;
        let mut kept = self.kept();
        let kept = &mut *kept;
        let tenant = kept.tenants.entry(of.tenant.clone()).or_default();
        let owners = tenant.facts.resolve();
        let before = kept.events.len();
        kept.events.retain(|event| {
            event.tenant().unwrap_or_default() != of.tenant || !tenant.owns(who, &owners, event)
        });
        tenant.forget(who, &owners);
        Ok(Deleted { events: (before - kept.events.len()) as u64, ..Deleted::default() })
    }

    async fn retain(&self, of: &TenantScope, from_ms: i64) -> Result<Deleted, StoreError> {
        of.whole()?;
        let mut kept = self.kept();
        let before = kept.events.len();
        kept.events
            .retain(|event| event.tenant().unwrap_or_default() != of.tenant || event.time_ms() >= from_ms);
        Ok(Deleted { events: (before - kept.events.len()) as u64, ..Deleted::default() })
    }
}

/// When a device was seen that nobody is logged in on.
fn times(who: &Subject, of: &TenantScope, events: &[Event]) -> Option<(i64, i64)> {
    let Subject::Anonymous(device) = who else { return None };
    let is_its = |event: &&Event| {
        (event.user_id(), event.anonymous_id()) == (None, Some(device))
            && event.tenant().unwrap_or_default() == of.tenant
            && of.includes(&source_of(event))
    };
    let times = || events.iter().filter(is_its).map(Event::time_ms);
    times().min().zip(times().max())
}
