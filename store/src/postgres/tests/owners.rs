//! Tenants with many devices.

use super::*;

const OWNERS: u64 = 200_000;

/// So many owners, fifty of a change.
async fn many_owners(served: &Served) {
    sql(
        served,
        &format!(
            "INSERT INTO relay_tenant (tenant, epoch, n, gone) VALUES ('', 3, {OWNERS} / 50 + 1, 3);
            INSERT INTO relay_owner (tenant, who, root, until_ms, n)
                SELECT '', i, 1000000 + i / 7, i, i / 50 + 1 FROM generate_series(1, {OWNERS}) AS i"
        ),
    )
    .await;
}

/// Reads owners without any patience.
async fn read_a_piece(store: &PostgresStore) -> Result<Arc<OwnerMap>, StoreError> {
    let mut connection = store.connection().await.unwrap();
    let (_waiting, gone) = waiting();
    let patience = Patience::new(Instant::now(), gone);
    let read = store.shared.begin(&mut connection, "", &patience).await.map(|(_, owners)| owners);
    give_back(read, connection)
}

#[test]
fn owners_that_are_too_many_for_one_question_are_read_by_several() {
    with_postgres(async |served| {
        let store = served.open().await;
        many_owners(served).await;
        let (mut refused, mut far) = (0, -1);
        let owners = loop {
            match read_a_piece(&store).await {
                Ok(owners) => break owners,
                Err(StoreError::Unavailable(why)) => assert!(why.contains("ask again"), "{why}"),
                Err(error) => panic!("{error}"),
            }
            let known = store.shared.owners.last("");
            assert!(known.n > far && known.n < known.read_of, "each goes on where the last one stopped");
            (far, refused) = (known.n, refused + 1);
            if refused == 3 {
                // One that was read already is another's now.
                let change = "UPDATE relay_tenant SET n = n + 1;
                    UPDATE relay_owner SET root = 5, n = (SELECT n FROM relay_tenant) WHERE who = 70";
                sql(served, change).await;
            }
        };
        assert!((10..30).contains(&refused), "{refused}");
        for who in 1..=OWNERS {
            let root = if who == 70 { 5 } else { 1_000_000 + who / 7 };
            assert_eq!(owners.owner(who), (root, who as i64));
        }
        assert_eq!(read_a_piece(&store).await.unwrap().n, owners.n, "nothing is read twice");

        // Of another epoch nothing is known.
        sql(served, "UPDATE relay_tenant SET epoch = epoch + 1; DELETE FROM relay_owner WHERE who > 9").await;
        let owners = read_a_piece(&store).await.unwrap();
        assert_eq!([9, 10].map(|who| owners.owner(who).0), [1_000_001, 10]);
        store.close().await;
    });
}

#[test]
fn a_link_that_gives_way_leaves_what_was_read_of_owners() {
    let change = |settings: &mut Settings| settings.fact_limits.users_of_a_device = 1;
    with_settings(change, async |served| {
        let store = served.open().await;
        let keys = store.shared.keys;
        let mut epochs = BTreeSet::new();
        // Each was there earlier than the last one, who gives way, and comes again.
        for (number, user) in ["c", "b", "a", "c"].into_iter().enumerate() {
            let time_ms = BASE_MS - number as i64 * MINUTE_MS;
            let json = format!(
                r#"{{"id":"{number}","kind":"page","user_id":"{user}","anonymous_id":"d","time_ms":{time_ms},"accepted_ms":{time_ms}}}"#
            );
            store.append(&[Event::from_json(json.as_bytes()).unwrap()]).await.unwrap();
            let owners = read_a_piece(&store).await.unwrap();
            assert_eq!(owners.owner(keys.anonymous("d")).0, keys.user(user));
            epochs.insert(owners.epoch);
        }
        assert_eq!(epochs.len(), 1, "they are not read from the beginning again");
        store.close().await;
    });
}

#[test]
fn a_question_that_takes_too_long_leaves_what_was_read_of_owners() {
    with_postgres(async |served| {
        let store = served.open().await;
        many_owners(served).await;
        assert!(read_a_piece(&store).await.is_err());
        let far = store.shared.owners.last("").n;
        assert!(far > 0);
        let other = TenantScope::tenant("t2");
        let asked = store.ask("slow", &other, |scan, _| {
            let slow = "SET LOCAL statement_timeout = '20ms'; SELECT pg_sleep(10)";
            Ok(scan.handle.block_on(scan.transaction.batch_execute(slow))?)
        });
        let error = asked.await.unwrap_err();
        assert!(matches!(error, StoreError::TooExpensive(_)), "{error}");
        assert_eq!(store.shared.owners.last("").n, far);
        store.close().await;
    });
}
