use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use analytics_relay_providers::Event;
use analytics_relay_store::{
    Appended, AsOf, Breakdown, Bucket, Count, CountPoint, Deleted, Field, Funnel, FunnelAnswer, Identity,
    LogEntry, NamedPoint, NewVisitors, Operator, PageRow, Point, PropertyRow, Realtime, Scope, SessionRow,
    Store, StoreError, Subject, Summary, TenantScope, ValueRow, model::KnownFact, oracle::Oracle,
};
use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::time::{Instant, interval_at, sleep, timeout};

use super::*;
use crate::query::{event_count::NamedCount, report::tests::question, user_count::Users, written::Format};

/// 2026-11-26T10:15:00Z.
const NOW_MS: i64 = 1_795_688_100_000;
/// A day that is over, and one that is not.
const OVER: &str = "event_name=a&from=2026-11-20&to=2026-11-20";
const RUNNING: &str = "event_name=a&from=2026-11-26";

/// What a question, or a batch, finds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mood {
    Answers,
    Fails,
    Hangs,
    Panics,
}

/// A store that counts how often it is asked, and answers with that after a while.
pub(crate) struct Moody {
    takes: Duration,
    asked: AtomicUsize,
    mood: Mutex<Mood>,
    rows: usize,
}

impl Moody {
    pub(crate) fn new(rows: usize) -> Arc<Self> {
        Self::that_takes(Duration::from_secs(1), rows)
    }

    fn that_takes(takes: Duration, rows: usize) -> Arc<Self> {
        Arc::new(Self { takes, asked: AtomicUsize::new(0), mood: Mutex::new(Mood::Answers), rows })
    }

    pub(crate) fn is(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    async fn answer(&self) -> Result<u64, StoreError> {
        let (asked, mood) = (self.asked.fetch_add(1, Ordering::SeqCst) + 1, *self.mood.lock().unwrap());
        sleep(self.takes).await;
        match mood {
            Mood::Answers => Ok(asked as u64),
            Mood::Fails => Err(StoreError::Unavailable("canary".into())),
            Mood::Hangs => std::future::pending().await,
            Mood::Panics => panic!("a defect"),
        }
    }
}

#[async_trait]
impl Store for Moody {
    async fn counts(&self, scope: &Scope, _: Bucket, _: &str) -> Result<Vec<CountPoint>, StoreError> {
        let events = self.answer().await?;
        let visitors = Count { n: events, estimated: false };
        Ok(vec![CountPoint { start_ms: scope.range_ms.start, events, visitors }])
    }

    async fn series_by_name(&self, _: &Scope, _: Bucket, _: &str) -> Result<Vec<NamedPoint>, StoreError> {
        let visitors = Count::default();
        let point = |at| NamedPoint { start_ms: 0, name: format!("{at:0>200}"), events: 1, visitors };
        Ok((0..self.rows).map(point).collect())
    }

    async fn append(&self, batch: &[Event]) -> Result<Vec<Appended>, StoreError> {
        self.answer().await?;
        Ok(vec![Appended::New; batch.len()])
    }

    async fn summary(&self, _: &Scope) -> Result<Summary, StoreError> {
        unimplemented!()
    }
    async fn series(&self, _: &Scope, _: Bucket, _: &str) -> Result<Vec<Point>, StoreError> {
        unimplemented!()
    }
    async fn breakdown(&self, _: &Scope, _: &Field, _: usize) -> Result<Breakdown<ValueRow>, StoreError> {
        unimplemented!()
    }
    async fn sessions_by(&self, _: &Scope, _: &Field, _: usize) -> Result<Breakdown<SessionRow>, StoreError> {
        unimplemented!()
    }
    async fn pages(&self, _: &Scope, _: usize) -> Result<Breakdown<PageRow>, StoreError> {
        unimplemented!()
    }
    async fn funnel(&self, _: &Scope, _: &Funnel) -> Result<FunnelAnswer, StoreError> {
        unimplemented!()
    }
    async fn realtime(&self, _: &Scope, _: i64) -> Result<Realtime, StoreError> {
        unimplemented!()
    }
    async fn new_visitors(&self, _: &Scope) -> Result<NewVisitors, StoreError> {
        unimplemented!()
    }
    async fn recent(&self, _: &Scope, _: Option<&Subject>, _: usize) -> Result<Vec<Event>, StoreError> {
        unimplemented!()
    }
    async fn identity(&self, _: &TenantScope, _: &Subject) -> Result<Option<Identity>, StoreError> {
        unimplemented!()
    }
    async fn as_of(&self, _: &TenantScope) -> Result<AsOf, StoreError> {
        unimplemented!()
    }
    async fn properties(&self, _: &Scope, _: usize) -> Result<Breakdown<PropertyRow>, StoreError> {
        unimplemented!()
    }
    async fn identity_log(
        &self,
        _: &TenantScope,
        _: &Subject,
        _: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        unimplemented!()
    }
    async fn know(&self, _: &[KnownFact]) -> Result<u64, StoreError> {
        unimplemented!()
    }
    async fn link(&self, _: &TenantScope, _: &str, _: &str, _: bool, _: &Operator) -> Result<(), StoreError> {
        unimplemented!()
    }
    async fn erase(&self, _: &TenantScope, _: &Subject) -> Result<Deleted, StoreError> {
        unimplemented!()
    }
    async fn retain(&self, _: &TenantScope, _: i64) -> Result<Deleted, StoreError> {
        unimplemented!()
    }
}

const AT_ONCE_MAX: usize = 2;
const DEADLINE: Duration = Duration::from_secs(5);

/// A query whose clock goes as the paused one does.
fn query_over(store: Arc<dyn Store>) -> Arc<Query> {
    query_within(store, AT_ONCE_MAX, DEADLINE)
}

fn query_within(store: Arc<dyn Store>, at_once_max: usize, deadline: Duration) -> Arc<Query> {
    let begun = Instant::now();
    let clock = Clock::from_fn(move || NOW_MS + i64::try_from(begun.elapsed().as_millis()).unwrap());
    let settings = QuerySettings { at_once_max, deadline, ..QuerySettings::default() };
    Arc::new(Query::new(Some(store), &settings, clock, QueryMetrics::default()))
}

/// What it says, and whether that was known.
async fn ask(query: &Arc<Query>, of: &str) -> Result<(u64, bool), Unanswered> {
    let (known, cached) = query.answer(&question(of)).await?;
    match &known.answer {
        Answer::EventCount(counts) => Ok((counts[0].events, cached)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn without_a_store_a_question_is_told_how_to_get_one() {
    let unanswered = Query::of_nothing().answer(&question("")).await.unwrap_err();
    assert_eq!(unanswered, Unanswered::NoStore);
    assert!(unanswered.message().contains("STORE_URL"), "{}", unanswered.message());
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_is_asked_again_by_the_next_and_tells_nobody_its_inside() {
    let store = Moody::new(0);
    let query = query_over(store.clone());
    store.is(Mood::Fails);
    let failed = ask(&query, OVER).await.unwrap_err();
    assert_eq!(failed, Unanswered::Unavailable("canary".into()));
    assert!(!failed.message().contains("canary"));
    store.is(Mood::Panics);
    assert_eq!(ask(&query, OVER).await, Err(Unanswered::Defect));
    store.is(Mood::Answers);
    assert_eq!(ask(&query, OVER).await, Ok((3, false)));
    assert_eq!(ask(&query, OVER).await, Ok((3, true)));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_is_left_after_five_seconds_and_keeps_no_turn() {
    let store = Moody::new(0);
    let query = query_over(store.clone());
    store.is(Mood::Hangs);
    let begun = Instant::now();
    let (one, two, three) =
        tokio::join!(ask(&query, "event_name=b"), ask(&query, OVER), ask(&query, RUNNING));
    assert_eq!((one, two), (Err(Unanswered::Late), Err(Unanswered::Late)));
    assert_eq!(three, Err(Unanswered::TooMany), "it never had its turn");
    assert_eq!((begun.elapsed(), store.asked()), (DEADLINE, 2));
    store.is(Mood::Answers);
    assert_eq!(ask(&query, OVER).await, Ok((3, false)));
}

#[tokio::test(start_paused = true)]
async fn as_many_are_asked_at_once_and_for_as_long_as_the_stores_settings_say() {
    let vars = [
        ("ANALYTICS_PROVIDER", "none"),
        ("STORE_QUESTIONS_MAX", "3"),
        ("STORE_QUESTION_TIMEOUT_SECONDS", "20"),
    ];
    let settings = crate::config::Config::from_vars(vars).unwrap().query;
    let store = Moody::new(0);
    store.is(Mood::Hangs);
    let query = query_within(store.clone(), settings.at_once_max, settings.deadline);
    let asked = |at: usize| {
        let query = query.clone();
        async move { ask(&query, &format!("event_name={at}")).await }
    };
    let begun = Instant::now();
    let answers = join_all((0..4).map(asked)).await;
    assert_eq!(begun.elapsed(), Duration::from_secs(20));
    let late = answers.iter().filter(|answer| **answer == Err(Unanswered::Late)).count();
    assert_eq!((late, store.asked()), (3, 3), "{answers:?}");
}

#[tokio::test(start_paused = true)]
async fn more_questions_than_can_wait_are_refused_at_once() {
    let store = Moody::new(0);
    store.is(Mood::Hangs);
    let query = query_over(store.clone());
    let asked = |at: usize| {
        let query = query.clone();
        async move { ask(&query, &format!("event_name={at}")).await }
    };
    let begun = Instant::now();
    let all = join_all((0..flights::FLIGHTS_MAX + 10).map(asked)).await;
    let refused = all.iter().filter(|answer| **answer == Err(Unanswered::TooMany)).count();
    assert_eq!(refused, all.len() - AT_ONCE_MAX, "ten at once, the others when they had waited");
    assert_eq!((begun.elapsed(), store.asked()), (DEADLINE, AT_ONCE_MAX));
    let waiting: Vec<_> = (0..flights::FLIGHTS_MAX).map(|at| tokio::spawn(asked(at))).collect();
    sleep(Duration::from_millis(10)).await;
    let begun = Instant::now();
    assert_eq!(asked(1000).await, Err(Unanswered::TooMany));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn a_hundred_who_ask_the_same_ask_the_store_once() {
    let store = Moody::new(0);
    let query = query_over(store.clone());
    let answers = join_all((0..100).map(|_| ask(&query, OVER))).await;
    assert!(answers.iter().all(|answer| *answer == Ok((1, false))), "{answers:?}");
    assert_eq!(store.asked(), 1);
    assert_eq!((query.metrics.misses.get(), query.metrics.joined.get()), (1, 99));
}

#[tokio::test(start_paused = true)]
async fn who_leaves_takes_nothing_from_the_others_and_the_last_one_the_work() {
    let store = Moody::new(0);
    let query = query_over(store.clone());
    let other = {
        let mut first = Box::pin(ask(&query, OVER));
        assert!(timeout(Duration::from_millis(100), &mut first).await.is_err());
        let other = tokio::spawn({
            let query = query.clone();
            async move { ask(&query, OVER).await }
        });
        sleep(Duration::from_millis(100)).await;
        other
    };
    assert_eq!(other.await.unwrap(), Ok((1, false)));
    // One that nobody waits for any more gives its turn back at once.
    store.is(Mood::Hangs);
    for name in ["b", "c", "d"] {
        let alone = query.clone();
        let asked = async move { ask(&alone, &format!("event_name={name}")).await };
        assert!(timeout(Duration::from_millis(100), asked).await.is_err());
    }
    assert_eq!(query.turns.available_permits(), AT_ONCE_MAX);
}

#[tokio::test(start_paused = true)]
async fn what_is_over_is_known_for_minutes_and_what_runs_for_seconds() {
    let store = Moody::new(0);
    let query = query_over(store.clone());
    // It ended four minutes ago: what is late may still come.
    let just_over = "event_name=a&from=2026-11-26T00:00:00Z&to=2026-11-26T10:11:00Z";
    for (of, seconds) in [(just_over, 10), (RUNNING, 10), (OVER, 300)] {
        let (first, _) = ask(&query, of).await.unwrap();
        sleep(Duration::from_secs(seconds) - Duration::from_millis(1)).await;
        assert_eq!(ask(&query, of).await, Ok((first, true)), "{of}");
        sleep(Duration::from_millis(1)).await;
        assert_eq!(ask(&query, of).await, Ok((first + 1, false)), "{of}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_deleted_is_in_no_answer_from_then_on() {
    let store = Moody::new(0);
    let query = query_over(store.clone());
    assert_eq!(ask(&query, OVER).await, Ok((1, false)));
    query.forget("");
    assert_eq!(ask(&query, OVER).await, Ok((2, false)));
    // What is being asked when something is deleted is neither joined nor kept.
    let under_way = tokio::spawn({
        let query = query.clone();
        async move { ask(&query, RUNNING).await }
    });
    sleep(Duration::from_millis(500)).await;
    query.forget("");
    let after = ask(&query, RUNNING);
    assert_eq!(after.await, Ok((4, false)));
    assert_eq!(under_way.await.unwrap(), Ok((3, false)));
    assert_eq!(ask(&query, RUNNING).await, Ok((4, true)));
}

/// Of ten who look at a dashboard of five figures, four of which are of days that are over,
/// and whose pages ask every half a minute.
#[tokio::test(start_paused = true)]
async fn dashboards_find_four_answers_of_five_known() {
    const FIGURES: [&str; 5] = [
        "from=2026-11-25&to=2026-11-25&event_name=a&group_by=hour",
        "from=2026-11-19&to=2026-11-25&event_name=a",
        "from=2026-11-12&to=2026-11-18&event_name=a",
        "from=2026-08-31&to=2026-11-22&event_name=a&group_by=week",
        "days=1&event_name=a&group_by=hour",
    ];
    let mut rates = Vec::new();
    for viewers in [1, 3, 10] {
        let query = query_over(Moody::that_takes(Duration::from_millis(100), 0));
        let look = |viewer: u64| {
            let query = query.clone();
            async move {
                let first = Instant::now() + Duration::from_millis(30_000 * viewer / viewers);
                let mut looks = interval_at(first, Duration::from_secs(30));
                for _ in 0..120 {
                    looks.tick().await;
                    let answers = join_all(FIGURES.map(|figure| ask(&query, figure))).await;
                    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
                }
            }
        };
        join_all((0..viewers).map(look)).await;
        let [hits, misses, joined] =
            [&query.metrics.hits, &query.metrics.misses, &query.metrics.joined].map(|counter| counter.get());
        assert_eq!(hits + misses + joined, viewers * 120 * 5);
        let rate = hits as f64 / (hits + misses + joined) as f64;
        println!(
            "{viewers} dashboards: {:.1} % of {} answers were known",
            rate * 100.0,
            hits + misses + joined
        );
        rates.push(rate);
    }
    // Of one alone what runs is never known: it looks after half a minute again.
    assert!(rates[0] > 0.7 && rates[1] > 0.8 && rates[2] > 0.8, "{rates:?}");
}

#[tokio::test]
async fn an_answer_that_is_too_large_says_what_to_ask_instead() {
    let query = query_over(Moody::new(20_000));
    let Err(Unanswered::TooExpensive(why)) = query.answer(&question("group_by=hour")).await.map(drop) else {
        panic!("it was answered")
    };
    assert!(why.starts_with("got 20000 rows of 4560000 bytes by hour, want at most 2000000 bytes"), "{why}");
    assert!(query_over(Moody::new(8_000)).answer(&question("")).await.is_ok());
}

/// An event, so many minutes after the midnight with which 2026-11-21 begins, a Saturday.
fn event(id: usize, minutes: i64, rest: &str) -> Event {
    let time_ms = 1_795_392_000_000 - 2 * 86_400_000 + 60_000 * minutes;
    let json = format!(
        r#"{{"id":"{id:08}-0000-4000-8000-000000000000","time_ms":{time_ms},"accepted_ms":{time_ms},"properties":{{}},{rest}}}"#
    );
    Event::from_json(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}"))
}

async fn some_events() -> Arc<Query> {
    let oracle = Oracle::new([7; 16]);
    let day = 24 * 60;
    let events = [
        event(0, 0, r#""kind":"track","name":"a","user_id":"u1""#),
        event(1, 59, r#""kind":"track","name":"a","user_id":"u2""#),
        event(2, 60, r#""kind":"track","name":"=b","user_id":"u1""#),
        event(3, 60, r#""kind":"track","name":"a","anonymous_id":"d1""#),
        event(4, 60, r#""kind":"track","name":"a","user_id":"bot","enriched":{"v":1,"bot":{"name":"x"}}"#),
        event(5, day, r#""kind":"track","name":"a","user_id":"u3""#),
        event(6, 7 * day - 1, r#""kind":"alias","user_id":"u1","previous_id":"u3""#),
        event(7, 7 * day, r#""kind":"track","name":"a","user_id":"u4""#),
    ];
    oracle.append(&events).await.unwrap();
    query_over(Arc::new(oracle))
}

async fn counts(query: &Arc<Query>, of: &str) -> Vec<(String, i64, u64)> {
    let (known, _) = query.answer(&question(of)).await.unwrap();
    let Answer::EventCount(counts) = &known.answer else { panic!("{known:?}") };
    let first = 1_795_392_000_000 - 2 * 86_400_000;
    let row = |count: &NamedCount| (count.name.clone(), (count.start_ms - first) / 3_600_000, count.events);
    counts.iter().map(row).collect()
}

#[tokio::test]
async fn events_are_counted_by_name_and_bucket() {
    let query = some_events().await;
    let row = |name: &str, hour, events| (name.to_owned(), hour, events);
    assert_eq!(
        counts(&query, "from=2026-11-21&to=2026-11-21&group_by=hour").await,
        [row("a", 0, 2), row("=b", 1, 1), row("a", 1, 1)]
    );
    assert_eq!(
        counts(&query, "from=2026-11-21&to=2026-11-22&event_name=a").await,
        [row("a", 0, 3), row("a", 24, 1)]
    );
    let with_bots = "from=2026-11-21&to=2026-11-21&event_name=a&include_bots=true";
    assert_eq!(counts(&query, with_bots).await, [row("a", 0, 4)]);
    // 2026-11-23 is a Monday, and the week before began on the 16th.
    let weeks = counts(&query, "from=2026-11-21&to=2026-11-28&group_by=week").await;
    assert_eq!(weeks, [row("=b", -120, 1), row("a", -120, 4), row("a", 48, 1), row("alias", 48, 1)]);
    assert_eq!(counts(&query, "from=2026-11-21&to=2026-11-28&event_name=none").await, []);
    // Of an hour that is one in Kolkata.
    let kolkata = "from=2026-11-21T00:00:00Z&to=2026-11-21T01:00:00Z&timezone=Asia/Kolkata&group_by=hour";
    let (known, _) = query.answer(&question(kolkata)).await.unwrap();
    let written = question(kolkata).write(&known.answer, &question(kolkata).meta(0, true), Format::Csv);
    let text = String::from_utf8(written.body).unwrap();
    assert_eq!(
        text,
        "event_name,timestamp,count\r\na,2026-11-21T05:00:00+05:30,1\r\na,2026-11-21T06:00:00+05:30,1\r\n"
    );
}

#[tokio::test]
async fn every_hour_of_ninety_days_can_be_asked_for() {
    let query = some_events().await;
    let all = counts(&query, "from=2026-08-28T00:30:00Z&to=2026-11-26T00:30:00Z&group_by=hour").await;
    assert_eq!(all.iter().map(|(_, _, events)| events).sum::<u64>(), 5);
    let of_one =
        "from=2026-08-28T00:30:00%2B02:00&to=2026-11-25&group_by=hour&timezone=Europe/Berlin&event_name=a";
    assert!(query.answer(&question(of_one)).await.is_ok());
}

async fn users(query: &Arc<Query>, of: &str) -> Users {
    let asked = Question::of_query(TenantScope::tenant(""), ReportName::UserCount, of, NOW_MS);
    let (known, _) = query.answer(&asked.unwrap().0).await.unwrap();
    match &known.answer {
        Answer::UserCount(users) => *users,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_user_is_an_id_that_an_event_names_and_those_of_an_alias_are_one() {
    let query = some_events().await;
    let n = |unique_users| Users { unique_users, estimated: false };
    assert_eq!(users(&query, "from=2026-11-21&to=2026-11-21").await, n(2), "no device, no machine");
    assert_eq!(users(&query, "from=2026-11-21&to=2026-11-22").await, n(2), "u3 is u1");
    assert_eq!(users(&query, "from=2026-11-21&to=2026-11-28").await, n(3));
    assert_eq!(users(&query, "from=2026-11-21&to=2026-11-21&include_bots=true").await, n(3));
    assert_eq!(users(&query, "from=2026-01-01&to=2026-01-02").await, n(0));
}

#[test]
fn an_answer_in_json_says_what_was_asked() {
    let of = "event_name=a&from=2026-11-20&to=2026-11-21&timezone=Europe/Berlin";
    let count = NamedCount { name: "a".into(), start_ms: 1_795_388_400_000, events: 7 };
    let meta = question(of).meta(NOW_MS, true);
    let written = question(of).write(&Answer::EventCount(vec![count]), &meta, Format::Json);
    let json: serde_json::Value = serde_json::from_slice(&written.body).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "event_name": "a",
            "group_by": "day",
            "total": 7,
            "counts": [{"event_name": "a", "timestamp": "2026-11-23T00:00:00+01:00", "count": 7}],
            "meta": {
                "from": "2026-11-20T00:00:00+01:00",
                "to": "2026-11-22T00:00:00+01:00",
                "timezone": "Europe/Berlin",
                "include_bots": false,
                "as_of": "2026-11-26T10:15:00.000Z",
                "cached": true,
            }
        })
    );
}
