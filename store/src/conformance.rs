//! A store against the oracle: what every backend must answer, whatever was done to it.

use std::{collections::BTreeSet, ops::Range};

use analytics_relay_providers::Event;
use proptest::prelude::*;

use crate::{
    Bucket, Field, Filter, Funnel, Is, Operator, Order, PageRow, Scope, Sources, Step, Store, Subject,
    TenantScope, Unit,
    model::{FactLimits, Keys},
    oracle::Oracle,
};

pub(crate) mod people;

/// A backend that is tested.
pub(crate) trait Backend {
    /// One that is open.
    type Store: Store;

    /// Opens it, or opens it again.
    async fn open(&self) -> Self::Store;

    async fn close(&self, store: &Self::Store);

    /// Its keys: which of two visitors of one moment is first depends on them.
    fn keys(&self, store: &Self::Store) -> Keys;

    /// How much is noted of who is who.
    fn fact_limits(&self) -> FactLimits;

    /// So many events are known again by their ids alone.
    fn window(&self) -> usize;

    /// Brings what came lately to where it stays.
    async fn seal(&self, store: &Self::Store);

    /// Does what is done each night.
    async fn tidy(&self, store: &Self::Store, now_ms: i64);
}

/// A Thursday in Berlin's summer, two hours before midnight there.
pub(crate) const BASE_MS: i64 = 1_790_280_000_000;
pub(crate) const MINUTE_MS: i64 = 60_000;

/// An event by small numbers, so that a failing case shrinks to a few.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spec {
    pub(crate) minute: i16,
    /// See [`Spec::time_ms`].
    pub(crate) when: u8,
    pub(crate) kind: u8,
    pub(crate) user: u8,
    pub(crate) device: u8,
    pub(crate) session: u8,
    pub(crate) source: u8,
    pub(crate) tenant: u8,
    pub(crate) page: u8,
    pub(crate) property: u8,
    pub(crate) enriched: u8,
}

pub(crate) fn one_of(all: &[&str], number: u8) -> String {
    all[usize::from(number) % all.len()].to_owned()
}

impl Spec {
    pub(crate) fn event(&self, id: usize) -> Event {
        let kinds = [
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
        ];
        let kind = one_of(&kinds, self.kind);
        let who = self.who(kind.contains("alias"));
        let session = one_of(&["", r#","session_id":"s1""#, r#","session_id":"s\u0000""#], self.session);
        let source = one_of(&["", r#","source":"w1""#, r#","source":"w2""#], self.source);
        let tenant = one_of(&["", "", "", r#","tenant":"t2""#], self.tenant);
        let (properties, context) = (self.properties(id), self.context());
        let (time_ms, accepted_ms) = (self.time_ms(), BASE_MS + 1_000);
        let json = format!(
            r#"{{"id":"id {id}","kind":{kind}{who},"time_ms":{time_ms},"accepted_ms":{accepted_ms}{session}{source}{tenant}{context},"properties":{properties}}}"#
        );
        Event::from_json(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}"))
    }

    /// Of clocks that are right mostly, or ahead by hours and years, or at an end of time.
    fn time_ms(&self) -> i64 {
        let time_ms = BASE_MS + i64::from(self.minute) * MINUTE_MS;
        match self.when {
            1 => time_ms + 400 * 86_400_000,
            2 => time_ms - 40_000 * 86_400_000,
            // No range has the last instant.
            3 => i64::MAX - 1,
            4 => i64::MIN,
            _ => time_ms,
        }
    }

    fn who(&self, is_alias: bool) -> String {
        let users = [
            "",
            r#","user_id":"u1""#,
            r#","user_id":"u2""#,
            r#","user_id":"\"u3\"""#,
            "",
            r#","user_id":"Null""#,
            r#","user_id":"u\u00004""#,
        ];
        let devices = [
            "",
            r#","anonymous_id":"d1""#,
            r#","anonymous_id":"d2""#,
            r#","anonymous_id":"00010203-0405-0607-0809-0a0b0c0d0e0f""#,
        ];
        let (user, device) = (one_of(&users, self.user), one_of(&devices, self.device));
        // An alias is of somebody.
        let user = if is_alias && user.is_empty() { users[1].to_owned() } else { user };
        user + &device
    }

    fn properties(&self, id: usize) -> String {
        let all = [
            "{}",
            r#"{"n":1}"#,
            r#"{"n":"1","seconds":7}"#,
            r#"{"n":null,"deep":{"a":[1]}}"#,
            r#"{"seconds":2.5,"time_on_page":3}"#,
            r#"{"time_on_page":40,"n":"\ud83d\ude00\u0000"}"#,
            r#"{"website_id":"w1","n":[1, 2]}"#,
            "",
        ];
        match one_of(&all, self.property) {
            // Ids as names: some of these in a block are more than there are columns for.
            none if none.is_empty() => {
                let names = (0..70).map(|n| format!(r#""p{id} {n}":{n}"#));
                format!("{{{},\"n\":\"last\"}}", names.collect::<Vec<_>>().join(","))
            }
            properties => properties,
        }
    }

    fn context(&self) -> String {
        let contexts = [
            "",
            r#","sent_context":{"page":{"path":"/a"},"campaign":{"source":"x"}}"#,
            r#","sent_context":{"page":{"path":"/b"}}"#,
        ];
        let enriched = [
            "",
            r#","enriched":{"v":1,"geo":{"country":"DE"},"page":{"path":"/a"},"source":"Google"}"#,
            r#","enriched":{"v":1,"geo":{"country":"FR"},"page":{"path":"/c/d"}}"#,
            r#","enriched":{"v":1,"bot":{"name":"x"},"geo":{"country":"DE"}}"#,
        ];
        one_of(&contexts, self.page) + &one_of(&enriched, self.enriched)
    }
}

/// So many events of all sorts, the same for a seed.
pub(crate) fn various(number: usize, seed: u64) -> Vec<Event> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut spec = || Spec {
        minute: random.i16(-300..900),
        when: 0,
        kind: random.u8(..11),
        user: random.u8(..),
        device: random.u8(..),
        session: random.u8(..),
        source: random.u8(..),
        tenant: 0,
        page: random.u8(..),
        property: random.u8(..),
        enriched: random.u8(..),
    };
    (0..number).map(|id| spec().event(id)).collect()
}

pub(crate) fn spec() -> impl Strategy<Value = Spec> {
    // Within a session, a day, and days; often at one time, or where half an hour ends.
    let half_hours = (-4_i16..8, 0..2_i16).prop_map(|(halves, more)| halves * 30 + more);
    let minute = prop_oneof![2 => half_hours, 1 => -20_i16..20, 1 => -60_i16..600, 1 => -3_000_i16..6_000, 1 => Just(0_i16), 1 => Just(1440_i16)];
    let small = || 0..12_u8;
    let minute = (minute, prop_oneof![12 => Just(0_u8), 1 => 1..5_u8]);
    (minute, 0..11_u8, small(), 0..14_u8, small(), small(), small(), small(), small(), small()).prop_map(
        |((minute, when), kind, device, user, session, source, tenant, page, property, enriched)| Spec {
            minute,
            when,
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
pub(crate) enum Do {
    /// Events of the pool, by their places.
    Append(Vec<u8>),
    Seal,
    Tidy,
    Reopen,
    Link(u8, u8, bool),
    EraseUser(u8),
    EraseDevice(u8),
    Retain(i16),
    /// The same of the other tenant.
    OfOther(Box<Do>),
}

pub(crate) fn doing(deletes: bool) -> impl Strategy<Value = Do> {
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
        let of_tenant = prop_oneof![
            (0..4_u8, 0..3_u8, any::<bool>()).prop_map(|(from, user, joined)| Do::Link(from, user, joined)),
            delete.clone()
        ];
        let of_other = of_tenant.prop_map(|one| Do::OfOther(Box::new(one)));
        prop_oneof![10 => append(), 6 => rest, 2 => delete, 1 => of_other].boxed()
    } else {
        prop_oneof![5 => append(), 3 => rest].boxed()
    }
}

pub(crate) const USERS: [&str; 3] = ["u1", "u2", "\"u3\""];
pub(crate) const DEVICES: [&str; 3] = ["d1", "d2", "00010203-0405-0607-0809-0a0b0c0d0e0f"];

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Does the same to both.
pub(crate) async fn run<B: Backend>(backend: &B, pool: &[Event], all: &[Do]) -> (B::Store, Oracle) {
    let mut store = backend.open().await;
    let oracle = Oracle::with_keys(backend.keys(&store)).within(backend.fact_limits());
    // What was deleted and is remembered no more would be new to the one and known to the other.
    let (mut appended, mut gone) = (BTreeSet::<usize>::new(), BTreeSet::<usize>::new());
    for one in all {
        match one {
            Do::Append(places) => {
                let places = places.iter().map(|place| usize::from(*place) % pool.len());
                let places: Vec<usize> = places.filter(|place| !gone.contains(place)).collect();
                let batch: Vec<Event> = places.iter().map(|place| pool[*place].clone()).collect();
                assert_eq!(store.append(&batch).await, oracle.append(&batch).await);
                appended.extend(places);
            }
            Do::Seal => backend.seal(&store).await,
            Do::Tidy => backend.tidy(&store, BASE_MS).await,
            Do::Reopen => {
                backend.close(&store).await;
                store = backend.open().await;
            }
            Do::OfOther(one) => change(&store, &oracle, &TenantScope::tenant("t2"), one).await,
            one => change(&store, &oracle, &TenantScope::tenant(""), one).await,
        }
        if backend.window() < pool.len() && !matches!(one, Do::Append(_)) {
            let there = everything(&oracle).await;
            gone.extend(appended.iter().filter(|place| !there.contains(pool[**place].id().as_str())));
        }
    }
    (store, oracle)
}

pub(crate) async fn everything(oracle: &Oracle) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for tenant in ["", "t2"] {
        let mut scope = Scope::new(TenantScope::tenant(tenant), i64::MIN..i64::MAX);
        scope.include_bots = true;
        let events = oracle.recent(&scope, None, 10_000).await.unwrap();
        ids.extend(events.iter().map(|event| event.id().as_str().to_owned()));
    }
    ids
}

/// Changes what is known or kept of a tenant.
pub(crate) async fn change(store: &dyn Store, oracle: &Oracle, of: &TenantScope, one: &Do) {
    match one {
        Do::Link(from, user, joined) => {
            let ids = [&DEVICES[..], &USERS[1..2]].concat();
            let (from, user) = (ids[usize::from(*from)], USERS[usize::from(*user)]);
            let by = Operator { name: "ann".into(), reason: from.into(), at_ms: 5 };
            store.link(of, from, user, *joined, &by).await.unwrap();
            oracle.link(of, from, user, *joined, &by).await.unwrap();
        }
        Do::EraseUser(user) => {
            let who = Subject::User(USERS[usize::from(*user)].into());
            let deleted = store.erase(of, &who).await.unwrap();
            assert_eq!(deleted.events, oracle.erase(of, &who).await.unwrap().events);
        }
        Do::EraseDevice(device) => {
            let who = Subject::Anonymous(DEVICES[usize::from(*device)].into());
            let deleted = store.erase(of, &who).await.unwrap();
            assert_eq!(deleted.events, oracle.erase(of, &who).await.unwrap().events);
        }
        Do::Retain(minute) => {
            let from_ms = BASE_MS + i64::from(*minute) * MINUTE_MS;
            let deleted = store.retain(of, from_ms).await.unwrap();
            assert_eq!(deleted.events, oracle.retain(of, from_ms).await.unwrap().events);
        }
        other => panic!("no change: {other:?}"),
    }
}

pub(crate) fn minutes(range: Range<i64>) -> Range<i64> {
    BASE_MS + range.start * MINUTE_MS..BASE_MS + range.end * MINUTE_MS
}

/// Scopes that see the events from many sides.
pub(crate) fn scopes(from: i64, length: i64) -> Vec<Scope> {
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
        all.over(i64::MIN..i64::MAX),
        Scope::new(TenantScope::tenant("nobody"), all.range_ms),
    ]
}

/// Asks both everything; they say the same.
pub(crate) async fn compare(store: &dyn Store, oracle: &dyn Store, scope: &Scope) {
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
        (Bucket::Minute, "UTC"),
        // Where clocks are set on the third day after.
        (Bucket::Hour, "Pacific/Auckland"),
    ] {
        // The oracle asks all events for each bucket.
        let length_ms = scope.range_ms.end.saturating_sub(scope.range_ms.start);
        if bucket == Bucket::Minute && length_ms > 120 * MINUTE_MS {
            continue;
        }
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

/// Asks one that has room for few values: each row is as the oracle's, and the others are
/// the rest.
pub(crate) async fn compare_cut(store: &dyn Store, oracle: &dyn Store, scope: &Scope) {
    for by in [Field::Name, Field::Page, Field::Property("n".into())] {
        let found = store.breakdown(scope, &by, 1_000).await.unwrap();
        let mut rest = oracle.breakdown(scope, &by, 1_000).await.unwrap().rows;
        for row in &found.rows {
            let place = rest
                .iter()
                .position(|one| one == row)
                .unwrap_or_else(|| panic!("{by:?}: {row:?} of {rest:?}"));
            rest.remove(place);
        }
        let others = found.others.unwrap_or_default();
        let sums = (rest.iter().map(|row| row.events).sum(), rest.iter().map(|row| row.views).sum());
        assert_eq!((others.events, others.views), sums, "{by:?} of {scope:#?}");
    }
    let found = store.pages(scope, 1_000).await.unwrap();
    let want = oracle.pages(scope, 1_000).await.unwrap().rows;
    // But for the stays: pages that are not told apart are one in a session, and which of two
    // views of one moment comes first is told by their pages.
    let sum = |rows: &[PageRow]| {
        let add = |one: (u64, u64, u64), row: &PageRow| {
            (one.0 + row.views, one.1 + row.exits, one.2 + row.entered.sessions)
        };
        rows.iter().fold((0, 0, 0), add)
    };
    let rows: Vec<PageRow> = found.rows.into_iter().chain(found.others).collect();
    assert_eq!(sum(&rows), sum(&want), "pages of {scope:#?}");
}

/// `RELAY_STORE_CASES`: so many times as many cases, as a campaign wants them.
pub(crate) fn times() -> u32 {
    std::env::var("RELAY_STORE_CASES").map_or(1, |times| times.parse().expect("a number of times"))
}

/// So many cases, or [`times`] as many.
pub(crate) fn cases(number: u32) -> ProptestConfig {
    ProptestConfig { cases: number * times(), max_shrink_iters: 2_000, ..ProptestConfig::default() }
}

pub(crate) fn everybody() -> Vec<Subject> {
    let users = USERS.iter().map(|id| Subject::User((*id).into()));
    users.chain(DEVICES.iter().map(|id| Subject::Anonymous((*id).into()))).collect()
}

/// Both have decided the same, in the same order.
pub(crate) async fn compare_logs(store: &dyn Store, oracle: &dyn Store) {
    let of = TenantScope::tenant("");
    for who in everybody() {
        for limit in [2, 1_000] {
            assert_eq!(
                store.identity_log(&of, &who, limit).await,
                oracle.identity_log(&of, &who, limit).await,
                "{who:?}"
            );
        }
    }
}
