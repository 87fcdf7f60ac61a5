//! What goes through much does so by pieces.

use super::*;

const EVENTS: usize = 9_000;
/// As many as are in memory at once.
const PIECE_MAX: i64 = 4_000;

/// So many events of two users in sessions of ten minutes, on two websites.
async fn with_many_events(served: &Served) -> PostgresStore {
    let store = served.open().await;
    let event = |n: usize| {
        let (user, time_ms) = (n % 3 / 2, BASE_MS + n as i64 * 1000);
        let json = format!(
            r#"{{"id":"e{n}","kind":"page","user_id":"u{user}","session_id":"s{user}-{}","time_ms":{time_ms},"accepted_ms":{time_ms},"properties":{{"website_id":"w{}"}}}}"#,
            n / 600,
            n / 600 % 2
        );
        Event::from_json(json.as_bytes()).unwrap()
    };
    let events: Vec<Event> = (0..EVENTS).map(event).collect();
    for batch in events.chunks(1_000) {
        store.append(batch).await.unwrap();
    }
    let note = "CREATE TABLE noted (n bigint); CREATE TABLE allowed AS SELECT 1000000 AS n;
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO noted SELECT count(*) FROM gone;
            IF (SELECT sum(n) FROM noted) > (SELECT n FROM allowed) THEN RAISE EXCEPTION 'too many'; END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER note AFTER DELETE ON events REFERENCING OLD TABLE AS gone
            FOR EACH STATEMENT EXECUTE FUNCTION note()";
    sql(served, note).await;
    store
}

/// Fails what would delete more than so many in all.
async fn allow(served: &Served, events: usize) {
    sql(served, &format!("UPDATE allowed SET n = {events}")).await;
}

async fn deleted_at_once(store: &PostgresStore) -> i64 {
    number(store, "SELECT max(n) FROM noted").await
}

#[test]
fn somebody_with_many_events_is_erased_by_pieces_and_as_a_whole() {
    with_postgres(async |served| {
        let store = with_many_events(served).await;
        let (of, who) = (TenantScope::tenant(""), Subject::User("u0".into()));
        // What fails at the last leaves all.
        allow(served, 5_000).await;
        assert!(store.erase(&of, &who).await.is_err());
        assert_eq!(store.as_of(&of).await.unwrap().events, EVENTS as u64);
        whole(&store).await;
        allow(served, EVENTS).await;
        // One that cannot be read is theirs by its columns.
        sql(served, "UPDATE events SET event = 'odd' WHERE session_id = 's0-0' AND time_ms % 7000 = 0").await;
        assert_eq!(store.erase(&of, &who).await.unwrap().events, 6_000);
        assert!((1..=PIECE_MAX).contains(&deleted_at_once(&store).await));
        assert_eq!(store.as_of(&of).await.unwrap().events, 3_000);
        let of_nobody = "SELECT count(*) FROM session WHERE session_id LIKE 's0%'";
        assert_eq!(number(&store, of_nobody).await, 0);
        assert_eq!(number(&store, "SELECT sum(events)::bigint FROM session").await, 3_000);
        whole(&store).await;
        store.close().await;
    });
}

#[test]
fn what_is_too_old_is_deleted_by_pieces_that_stay_deleted() {
    with_postgres(async |served| {
        let store = with_many_events(served).await;
        let of = TenantScope::tenant("");
        // In the middle of a session; and the last piece fails at first.
        let from_ms = BASE_MS + 8_700 * 1000;
        allow(served, 8_000).await;
        assert!(store.retain(&of, from_ms).await.is_err());
        assert_eq!(store.as_of(&of).await.unwrap().events, EVENTS as u64 - 8_000);
        whole(&store).await;
        allow(served, EVENTS).await;
        assert_eq!(store.retain(&of, from_ms).await.unwrap().events, 700);
        assert_eq!(store.retain(&of, from_ms).await.unwrap().events, 0);
        assert_eq!(deleted_at_once(&store).await, PIECE_MAX);
        assert_eq!(store.as_of(&of).await.unwrap().events, 300);
        assert_eq!(number(&store, "SELECT sum(events)::bigint FROM session").await, 300);
        whole(&store).await;
        store.close().await;
    });
}

#[test]
fn websites_whose_events_end_with_a_piece_say_when_they_have_some() {
    with_postgres(async |served| {
        let store = served.open().await;
        let event = |website: &str, n: i64| {
            let time_ms = BASE_MS + n * 1000;
            let json = format!(
                r#"{{"id":"{website} {n}","kind":"page","user_id":"u","time_ms":{time_ms},"accepted_ms":{time_ms},"properties":{{"website_id":"{website}"}}}}"#
            );
            Event::from_json(json.as_bytes()).unwrap()
        };
        // What is too old of the first two is as much as a piece each; of one something stays.
        let mut events: Vec<Event> =
            ["w1", "w2"].iter().flat_map(|website| (0..PIECE_MAX).map(|n| event(website, n))).collect();
        events.push(event("w1", PIECE_MAX + 5));
        for batch in events.chunks(2_000) {
            store.append(batch).await.unwrap();
        }
        let of = TenantScope::tenant("");
        let from_ms = BASE_MS + PIECE_MAX * 1000;
        assert_eq!(store.retain(&of, from_ms).await.unwrap().events, 2 * PIECE_MAX as u64);
        whole(&store).await;
        let stats = store.stats().await.unwrap();
        assert_eq!((stats.sites, stats.first_ms), (1, Some(BASE_MS + (PIECE_MAX + 5) * 1000)));
        assert_eq!(number(&store, "SELECT count(*) FROM relay_site").await, 1);
        store.close().await;
    });
}

#[test]
fn facts_are_written_while_others_are_still_to_be_read() {
    with_postgres(async |served| {
        let store = served.open().await;
        // The last of them cannot be read.
        let last = "INSERT INTO relay_link SELECT '', 'd' || i, 'u', i, i FROM generate_series(1, 9000) AS i;
            ALTER TABLE relay_link RENAME TO all_links;
            CREATE VIEW relay_link AS SELECT tenant, device, user_id, 1 / (9000 - first_ms) AS first_ms, last_ms FROM all_links";
        sql(served, last).await;
        let shelf = Shelf::default();
        store.export(&Wanted::default(), shelf.clone()).await.unwrap_err();
        let lines = lock(&shelf.0).iter().filter(|byte| **byte == b'\n').count();
        assert_eq!(lines as i64, 2 * PIECE_MAX);
        store.close().await;
    });
}
