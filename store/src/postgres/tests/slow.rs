//! What takes long of the server is told, and who waits for others is not.

use super::*;
use crate::model;

/// So long is waited for what does not come.
const SOON: Duration = Duration::from_millis(200);

fn views(number: usize) -> Vec<Event> {
    pool_of(&vec![Spec { kind: 1, user: 1, device: 1, ..Spec::default() }; number])
}

fn fact() -> KnownFact {
    let what = model::Known::User { user: "u9".into(), seen: model::Seen::at(1) };
    KnownFact { tenant: String::new(), what }
}

#[test]
fn whatever_is_asked_of_the_server_is_timed() {
    let change = |settings: &mut Settings| settings.slow = Duration::ZERO;
    with_settings(change, async |served| {
        let store = served.open().await;
        let (of, who, by) = (TenantScope::tenant(""), Subject::User("u1".into()), Operator::default());
        macro_rules! is_timed {
            ($asked:expr) => {
                let before = store.shared.slow.count();
                if let Err(error) = $asked.await {
                    panic!("{error}");
                }
                assert!(store.shared.slow.count() > before, "{} is not timed", stringify!($asked));
            };
        }
        is_timed!(store.append(&views(2)));
        is_timed!(store.summary(&all()));
        is_timed!(store.identity(&of, &who));
        is_timed!(store.identity_log(&of, &who, 10));
        is_timed!(store.as_of(&of));
        is_timed!(store.link(&of, "d1", "u1", false, &by));
        is_timed!(store.know(&[fact()]));
        is_timed!(store.look());
        is_timed!(store.stats());
        is_timed!(store.check());
        is_timed!(store.export(&Wanted::default(), Shelf::default()));
        // A day more than has a partition.
        is_timed!(store.upkeep(now_ms() + DAY_MS, None));
        is_timed!(store.retain(&of, BASE_MS));
        is_timed!(store.erase(&of, &who));
        assert_eq!(store.stats().await.unwrap().slow, store.shared.slow.count());
        store.close().await;
    });
}

#[test]
fn half_a_second_of_the_servers_is_long() {
    with_postgres(async |served| {
        let store = served.open().await;
        let sleeps = "CREATE FUNCTION sleeps() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN PERFORM pg_sleep(0.6); RETURN NULL; END $$;
            CREATE TRIGGER sleeps BEFORE INSERT ON events EXECUTE FUNCTION sleeps()";
        sql(served, sleeps).await;
        let before = store.shared.slow.count();
        store.append(&views(1)).await.unwrap();
        assert!(store.stats().await.unwrap().slow > before);
        store.close().await;
    });
}

/// The server is not to blame for a queue.
#[test]
fn who_waits_for_others_is_not_told_to_be_slow() {
    let change = |settings: &mut Settings| {
        (settings.slow, settings.readers, settings.deadline) = (Duration::ZERO, 1, SOON);
    };
    with_settings(change, async |served| {
        let store = served.open().await;
        let (of, who, by) = (TenantScope::tenant(""), Subject::User("u1".into()), Operator::default());
        let (batch, facts, counted) = (views(2), [fact()], store.shared.slow.count());
        let wait = async || {
            macro_rules! waits {
                ($asked:expr) => {
                    let asked = tokio::time::timeout(SOON, $asked).await;
                    assert!(asked.is_err(), "{} waits for nobody", stringify!($asked));
                };
            }
            waits!(store.append(&batch));
            waits!(store.link(&of, "d1", "u1", false, &by));
            waits!(store.know(&facts));
            waits!(store.retain(&of, BASE_MS));
            waits!(store.erase(&of, &who));
        };
        // For a turn.
        let turn = store.shared.turns.clone().acquire_owned().await.unwrap();
        let asked = store.summary(&all()).await;
        assert!(matches!(asked, Err(StoreError::Unavailable(_))), "{asked:?}");
        drop(turn);
        // For this relay's own writer.
        let writing = store.shared.writing.lock().await;
        wait().await;
        drop(writing);
        // For another relay's.
        let mut other = store.connection().await.unwrap();
        let transaction = other.transaction().await.unwrap();
        schema::lock(&transaction).await.unwrap();
        wait().await;
        assert!(tokio::time::timeout(SOON, store.upkeep(now_ms() + DAY_MS, None)).await.is_err());
        assert_eq!(store.shared.slow.count(), counted);
        drop(transaction);
        give_back(Ok(()), other).unwrap();
        store.append(&batch).await.unwrap();
        assert!(store.shared.slow.count() > counted);
        store.close().await;
    });
}
