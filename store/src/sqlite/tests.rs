//! The store against the oracle, and what becomes of it when things go wrong.

use std::{collections::BTreeSet, ops::Range};

use analytics_relay_providers::Event;
use proptest::prelude::*;

use super::*;
use crate::{
    Filter, Order, Step, Unit,
    conformance::{
        BASE_MS, Backend, Do, MINUTE_MS, Spec, cases, compare, compare_cut, compare_logs, doing, everybody,
        minutes, runtime, scopes, spec, times, various,
    },
    oracle::Oracle,
};

mod crash;
mod faults;
mod memo;
mod opening;
mod people;
mod questions;
mod strain;
mod upkeep;

pub(crate) fn settings(dir: &Path) -> Settings {
    Settings { block_rows: 6, hot_rows_max: 150, ..Settings::new(dir.join("store.db")) }
}

/// A file, opened as settings say.
struct Embedded(Settings);

impl Backend for Embedded {
    type Store = SqliteStore;

    async fn open(&self) -> SqliteStore {
        let store = SqliteStore::open(self.0.clone()).unwrap();
        assert_eq!(store.set_aside(), None, "{}", self.0.path.display());
        store
    }

    async fn close(&self, store: &SqliteStore) {
        store.close().await;
    }

    fn keys(&self, store: &SqliteStore) -> Keys {
        store.shared.keys
    }

    fn fact_limits(&self) -> FactLimits {
        self.0.fact_limits
    }

    fn window(&self) -> usize {
        self.0.window
    }

    async fn seal(&self, store: &SqliteStore) {
        store.seal().await.unwrap();
    }

    async fn tidy(&self, store: &SqliteStore, now_ms: i64) {
        store.tidy(now_ms).await.unwrap();
    }
}

/// Does the same to a store and to the oracle.
async fn run(settings: &Settings, pool: &[Event], all: &[Do]) -> (SqliteStore, Oracle) {
    crate::conformance::run(&Embedded(settings.clone()), pool, all).await
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
            let (store, oracle) = run(&settings, &pool, &all).await;
            for scope in scopes(0, 121) {
                compare(&store, &oracle, &scope).await;
            }
            compare(&store, &oracle, &Scope::new(TenantScope::tenant(""), minutes(20..81))).await;
            store.close().await;
        });
    }
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
            let (store, oracle) = run(&settings(dir.path()), &pool, &all).await;
            for scope in scopes(from, length) {
                compare(&store, &oracle, &scope).await;
            }
            compare_logs(&store, &oracle).await;
            store.close().await;
        });
    }

    /// Where there is room for few values, whoever counts them.
    #[test]
    fn what_there_is_no_room_for_is_the_rest(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(doing(true), 1..14),
        from in -100..1_500_i64,
    ) {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let pool: Vec<Event> = pool.iter().enumerate().map(|(id, spec)| spec.event(id)).collect();
            let mut settings = settings(dir.path());
            settings.limits.values_max = 2;
            let (store, oracle) = run(&settings, &pool, &all).await;
            for scope in &scopes(from, 200)[..3] {
                compare_cut(&store, &oracle, scope).await;
            }
            store.close().await;
        });
    }

    /// Nor do deletions between make anything known or unknown.
    #[test]
    fn what_is_older_than_the_window_is_deleted_like_the_rest(
        pool in prop::collection::vec(spec(), 1..60),
        all in prop::collection::vec(doing(true), 1..20),
    ) {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let pool: Vec<Event> = pool.iter().enumerate().map(|(id, spec)| spec.event(id)).collect();
            let settings = Settings { window: 3, ..settings(dir.path()) };
            let (store, oracle) = run(&settings, &pool, &all).await;
            for of in ["", "t2"] {
                compare(&store, &oracle, &Scope { of: TenantScope::tenant(of), ..scopes(0, 10)[0].clone() }).await;
            }
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
            let (store, oracle) = run(&settings, &pool, &all).await;
            compare(&store, &oracle, &scopes(0, 10)[0]).await;
            store.close().await;
        });
    }
}
