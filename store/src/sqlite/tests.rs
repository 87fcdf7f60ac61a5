//! The store against the oracle, and what becomes of it when things go wrong.

use std::ops::Range;

use analytics_relay_providers::Event;
use proptest::prelude::*;

use super::*;
use crate::{Filter, Is, Order, Sources, Step, Unit, oracle::Oracle};

mod crash;
mod faults;
mod opening;
mod people;
mod questions;
mod strain;
mod upkeep;

/// A Thursday in Berlin's summer, two hours before midnight there.
const BASE_MS: i64 = 1_790_280_000_000;
const MINUTE_MS: i64 = 60_000;

/// An event by small numbers, so that a failing case shrinks to a few.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spec {
    minute: i16,
    kind: u8,
    user: u8,
    device: u8,
    session: u8,
    source: u8,
    tenant: u8,
    page: u8,
    property: u8,
    enriched: u8,
}

impl Spec {
    fn event(&self, id: usize) -> Event {
        let of = |names: &[&str], number: u8| names[usize::from(number) % names.len()].to_owned();
        let kind = of(
            &[
                r#""track","name":"signup""#,
                r#""page""#,
                r#""page","name":"Home""#,
                r#""screen""#,
                r#""identify""#,
                r#""alias","previous_id":"d1""#,
                r#""alias","previous_id":"u2""#,
                r#""track","name":"engagement""#,
                r#""group","group_id":"g""#,
                r#""newer","odd":[1,"}"]"#,
                r#""track","name":"näh\u0000t""#,
            ],
            self.kind,
        );
        let user = of(
            &[
                "",
                r#","user_id":"u1""#,
                r#","user_id":"u2""#,
                r#","user_id":"\"u3\"""#,
                "",
                r#","user_id":"Null""#,
            ],
            self.user,
        );
        let device = of(
            &[
                "",
                r#","anonymous_id":"d1""#,
                r#","anonymous_id":"d2""#,
                r#","anonymous_id":"00010203-0405-0607-0809-0a0b0c0d0e0f""#,
            ],
            self.device,
        );
        // An alias is of somebody.
        let user = if kind.contains("alias") && user.is_empty() { r#","user_id":"u1""#.into() } else { user };
        let session = of(&["", r#","session_id":"s1""#, r#","session_id":"s\u0000""#], self.session);
        let source = of(&["", r#","source":"w1""#, r#","source":"w2""#], self.source);
        let tenant = of(&["", "", "", r#","tenant":"t2""#], self.tenant);
        let properties = of(
            &[
                "{}",
                r#"{"n":1}"#,
                r#"{"n":"1","seconds":7}"#,
                r#"{"n":null,"deep":{"a":[1]}}"#,
                r#"{"seconds":2.5,"time_on_page":3}"#,
                r#"{"time_on_page":40,"n":"\ud83d\ude00\u0000"}"#,
                r#"{"website_id":"w1","n":[1, 2]}"#,
            ],
            self.property,
        );
        let context = of(
            &[
                "",
                r#","sent_context":{"page":{"path":"/a"},"campaign":{"source":"x"}}"#,
                r#","sent_context":{"page":{"path":"/b"}}"#,
            ],
            self.page,
        );
        let enriched = of(
            &[
                "",
                r#","enriched":{"v":1,"geo":{"country":"DE"},"page":{"path":"/a"},"source":"Google"}"#,
                r#","enriched":{"v":1,"geo":{"country":"FR"},"page":{"path":"/c/d"}}"#,
                r#","enriched":{"v":1,"bot":{"name":"x"},"geo":{"country":"DE"}}"#,
            ],
            self.enriched,
        );
        let time_ms = BASE_MS + i64::from(self.minute) * MINUTE_MS;
        let accepted_ms = BASE_MS + 1_000;
        let json = format!(
            r#"{{"id":"id {id}","kind":{kind}{user}{device},"time_ms":{time_ms},"accepted_ms":{accepted_ms}{session}{source}{tenant}{context}{enriched},"properties":{properties}}}"#
        );
        Event::from_json(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}"))
    }
}

fn spec() -> impl Strategy<Value = Spec> {
    // Within a session, a day, and days; often at one time, or where half an hour ends.
    let half_hours = (-4_i16..8, 0..2_i16).prop_map(|(halves, more)| halves * 30 + more);
    let minute = prop_oneof![2 => half_hours, 1 => -20_i16..20, 1 => -60_i16..600, 1 => -3_000_i16..6_000, 1 => Just(0_i16), 1 => Just(1440_i16)];
    let small = || 0..12_u8;
    (minute, 0..11_u8, small(), small(), small(), small(), small(), small(), small(), small()).prop_map(
        |(minute, kind, user, device, session, source, tenant, page, property, enriched)| Spec {
            minute,
            kind,
            user,
            device,
            session,
            source,
            tenant,
            page,
            property,
            enriched,
        },
    )
}

/// What is done to a store.
#[derive(Debug, Clone)]
enum Do {
    /// Events of the pool, by their places.
    Append(Vec<u8>),
    Seal,
    Tidy,
    Reopen,
    Link(u8, u8, bool),
    EraseUser(u8),
    EraseDevice(u8),
    Retain(i16),
}

fn doing(deletes: bool) -> impl Strategy<Value = Do> {
    let append = || prop::collection::vec(any::<u8>(), 0..12).prop_map(Do::Append);
    let rest = prop_oneof![
        Just(Do::Seal),
        Just(Do::Tidy),
        Just(Do::Reopen),
        (0..4_u8, 0..3_u8, any::<bool>()).prop_map(|(from, user, joined)| Do::Link(from, user, joined)),
    ];
    if deletes {
        let delete = prop_oneof![
            (0..3_u8).prop_map(Do::EraseUser),
            (0..3_u8).prop_map(Do::EraseDevice),
            (-60..600_i16).prop_map(Do::Retain),
        ];
        prop_oneof![5 => append(), 3 => rest, 1 => delete].boxed()
    } else {
        prop_oneof![5 => append(), 3 => rest].boxed()
    }
}

const USERS: [&str; 3] = ["u1", "u2", "\"u3\""];
const DEVICES: [&str; 3] = ["d1", "d2", "00010203-0405-0607-0809-0a0b0c0d0e0f"];

pub(crate) fn settings(dir: &Path) -> Settings {
    Settings { block_rows: 6, hot_rows_max: 150, ..Settings::new(dir.join("store.db")) }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Does the same to both.
async fn run(dir: &Path, settings: &Settings, pool: &[Event], all: &[Do]) -> (SqliteStore, Oracle) {
    let mut store = SqliteStore::open(settings.clone()).unwrap();
    assert_eq!(store.set_aside(), None, "{}", dir.display());
    let oracle = Oracle::with_keys(store.shared.keys);
    let of = TenantScope::tenant("");
    for one in all {
        match one {
            Do::Append(places) => {
                let batch: Vec<Event> =
                    places.iter().map(|place| pool[usize::from(*place) % pool.len()].clone()).collect();
                assert_eq!(store.append(&batch).await, oracle.append(&batch).await);
            }
            Do::Seal => store.seal().await.unwrap(),
            Do::Tidy => drop(store.tidy(BASE_MS).await.unwrap()),
            Do::Reopen => {
                store.close().await;
                store = SqliteStore::open(settings.clone()).unwrap();
            }
            Do::Link(from, user, joined) => {
                let ids = [&DEVICES[..], &USERS[1..2]].concat();
                let (from, user) = (ids[usize::from(*from)], USERS[usize::from(*user)]);
                let by = Operator { name: "ann".into(), reason: from.into(), at_ms: 5 };
                store.link(&of, from, user, *joined, &by).await.unwrap();
                oracle.link(&of, from, user, *joined, &by).await.unwrap();
            }
            Do::EraseUser(user) => {
                let who = Subject::User(USERS[usize::from(*user)].into());
                let deleted = store.erase(&of, &who).await.unwrap();
                assert_eq!(deleted.events, oracle.erase(&of, &who).await.unwrap().events);
            }
            Do::EraseDevice(device) => {
                let who = Subject::Anonymous(DEVICES[usize::from(*device)].into());
                let deleted = store.erase(&of, &who).await.unwrap();
                assert_eq!(deleted.events, oracle.erase(&of, &who).await.unwrap().events);
            }
            Do::Retain(minute) => {
                let from_ms = BASE_MS + i64::from(*minute) * MINUTE_MS;
                let deleted = store.retain(&of, from_ms).await.unwrap();
                assert_eq!(deleted.events, oracle.retain(&of, from_ms).await.unwrap().events);
            }
        }
    }
    (store, oracle)
}

fn minutes(range: Range<i64>) -> Range<i64> {
    BASE_MS + range.start * MINUTE_MS..BASE_MS + range.end * MINUTE_MS
}

/// Scopes that see the events from many sides.
fn scopes(from: i64, length: i64) -> Vec<Scope> {
    let range = minutes(from..from + length);
    let all = Scope::new(TenantScope::tenant(""), minutes(-4_000..7_000));
    let some = Scope::new(TenantScope::source("", "w1"), range.clone());
    let sources = Sources::Only(vec!["w2".into(), "".into(), "w2".into(), "none".into()]);
    let not_german = Filter { or_absent: true, ..Filter::is(Field::Country, "DE") }.negate();
    vec![
        Scope { include_bots: true, ..all.clone() },
        all.over(range.clone()),
        all.over(range.clone()).with(Filter::like(Field::Page, "/*")),
        Scope { of: TenantScope { tenant: "".into(), sources }, ..some.clone() }.with(not_german),
        some.with(Filter::is(Field::Property("n".into()), "1")),
        all.clone().with(Filter::present(Field::User)),
        all.clone().with(Filter { is: Is::Containing, ..Filter::is(Field::Name, "n") }),
        Scope::new(TenantScope::tenant("t2"), all.range_ms.clone()),
        Scope::new(TenantScope::tenant("nobody"), all.range_ms),
    ]
}

/// Asks both everything; they say the same.
pub(crate) async fn compare(store: &SqliteStore, oracle: &dyn Store, scope: &Scope) {
    macro_rules! same {
        ($question:ident($($argument:expr),*)) => {
            assert_eq!(
                store.$question($($argument),*).await,
                oracle.$question($($argument),*).await,
                concat!(stringify!($question), " of {:#?}"), scope
            )
        };
    }
    same!(summary(scope));
    for (bucket, zone) in [
        (Bucket::All, "UTC"),
        (Bucket::Hour, "Asia/Kolkata"),
        (Bucket::Day, "Europe/Berlin"),
        (Bucket::Week, "America/New_York"),
        (Bucket::Month, "Pacific/Kiritimati"),
    ] {
        same!(counts(scope, bucket, zone));
        same!(series(scope, bucket, zone));
        same!(series_by_name(scope, bucket, zone));
    }
    let property = Field::Property("n".into());
    for by in [&Field::Name, &Field::Page, &Field::Source, &Field::Country, &Field::User, &property] {
        same!(breakdown(scope, by, 3));
        same!(breakdown(scope, by, 100));
        same!(sessions_by(scope, by, 100));
    }
    same!(pages(scope, 100));
    same!(properties(scope, 2));
    same!(properties(scope, 100));
    same!(as_of(&scope.of));
    same!(new_visitors(scope));
    same!(realtime(scope, BASE_MS + 12 * MINUTE_MS));
    same!(recent(scope, None, 5));
    same!(recent(scope, None, 1_000));
    for id in USERS {
        let who = Subject::User(id.into());
        same!(recent(scope, Some(&who), 3));
        same!(identity(&scope.of, &who));
        same!(identity(&TenantScope::tenant(&scope.of.tenant), &who));
    }
    for id in DEVICES {
        let who = Subject::Anonymous(id.into());
        same!(recent(scope, Some(&who), 3));
        same!(identity(&scope.of, &who));
        same!(identity(&TenantScope::tenant(&scope.of.tenant), &who));
    }
    for order in [Order::Ordered, Order::Strict, Order::Unordered] {
        for unit in [Unit::Visitor, Unit::User, Unit::Session] {
            let steps = vec![
                Step { filters: vec![Filter::is(Field::Name, "pageview")] },
                Step { filters: vec![Filter::like(Field::Page, "/a*")] },
                Step::default(),
            ];
            let funnel = Funnel { steps, window_ms: 90 * MINUTE_MS, order, unit };
            same!(funnel(scope, &funnel));
        }
    }
}

/// Where rules have their edges, in one block, in several, and in memory.
#[test]
fn at_the_edges_of_rules_the_store_answers_as_the_oracle() {
    let event = |minute, user, device| Spec { minute, kind: 1, user, device, ..Spec::default() };
    // A device changes hands at minute 20; a gap of half an hour, and a longer one.
    let specs = [
        event(0, 1, 1),
        event(10, 0, 1),
        event(20, 2, 1),
        event(20, 0, 1),
        event(50, 0, 1),
        event(81, 0, 1),
        event(111, 0, 1),
        // Exactly a day after the first, without a gap; and another device at midnight.
        event(1439, 3, 2),
        event(1440, 0, 1),
        event(120, 0, 3),
    ];
    let pool: Vec<Event> = specs.iter().enumerate().map(|(id, spec)| spec.event(id)).collect();
    let forth: Vec<u8> = (0..10).collect();
    let back: Vec<u8> = forth.iter().rev().copied().collect();
    let runs = [
        vec![Do::Append(forth.clone())],
        vec![Do::Append(forth.clone()), Do::Seal],
        vec![Do::Append(back[..5].to_vec()), Do::Seal, Do::Append(back[3..].to_vec()), Do::Seal],
        back.iter().flat_map(|place| [Do::Append(vec![*place]), Do::Seal]).collect(),
    ];
    for all in runs {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let settings = Settings { block_rows: 20, ..settings(dir.path()) };
            let (store, oracle) = run(dir.path(), &settings, &pool, &all).await;
            for scope in scopes(0, 121) {
                compare(&store, &oracle, &scope).await;
            }
            compare(&store, &oracle, &Scope::new(TenantScope::tenant(""), minutes(20..81))).await;
            store.close().await;
        });
    }
}

fn cases(number: u32) -> ProptestConfig {
    ProptestConfig { cases: number, max_shrink_iters: 600, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(40))]

    /// Duplicates, late and shuffled events, odd texts, time zones, deletions, restarts,
    /// blocks of few rows: all questions, the oracle's answers.
    #[test]
    fn the_store_answers_as_the_oracle(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(doing(true), 1..14),
        from in -100..1_500_i64,
        length in 0..1_500_i64,
    ) {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let pool: Vec<Event> = pool.iter().enumerate().map(|(id, spec)| spec.event(id)).collect();
            let (store, oracle) = run(dir.path(), &settings(dir.path()), &pool, &all).await;
            for scope in scopes(from, length) {
                compare(&store, &oracle, &scope).await;
            }
            people::compare_logs(&store, &oracle).await;
            store.close().await;
        });
    }

    /// An event whose id was forgotten is found in its block or table by time and id.
    #[test]
    fn what_is_older_than_the_window_is_kept_once_too(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(doing(false), 1..14),
    ) {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let pool: Vec<Event> = pool.iter().enumerate().map(|(id, spec)| spec.event(id)).collect();
            let settings = Settings { window: 5, ..settings(dir.path()) };
            let (store, oracle) = run(dir.path(), &settings, &pool, &all).await;
            compare(&store, &oracle, &scopes(0, 10)[0]).await;
            store.close().await;
        });
    }
}
