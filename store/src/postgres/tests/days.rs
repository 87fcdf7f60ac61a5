//! Partitions, while others read them, and what goes with them.

use super::*;

/// A page view of somebody in a session, so many milliseconds from the begin of today.
fn view_at(id: &str, session: &str, from_today_ms: i64) -> Event {
    let time_ms = now_ms().div_euclid(DAY_MS) * DAY_MS + from_today_ms;
    let json = format!(
        r#"{{"id":"{id}","kind":"page","anonymous_id":"d","session_id":"{session}","time_ms":{time_ms},"accepted_ms":{time_ms}}}"#
    );
    Event::from_json(json.as_bytes()).unwrap()
}

#[test]
fn a_session_over_midnight_goes_with_the_last_of_its_days() {
    with_postgres(async |served| {
        let store = served.open().await;
        let over_midnight = [view_at("a", "old", -1000), view_at("b", "old", 1000)];
        let kept = [view_at("c", "kept", DAY_MS - 1000), view_at("d", "kept", DAY_MS + 1000)];
        store.append(&over_midnight).await.unwrap();
        store.append(&kept).await.unwrap();
        let tomorrow_ms = (now_ms().div_euclid(DAY_MS) + 1) * DAY_MS;
        let upkept = store.upkeep(now_ms(), Some(tomorrow_ms)).await.unwrap();
        assert_eq!(upkept.dropped, 2, "both days at once");
        assert_eq!(number(&store, "SELECT count(*) FROM events").await, 1);
        assert_eq!(number(&store, "SELECT count(*) FROM session").await, 1);
        assert_eq!(number(&store, "SELECT count(*) FROM session WHERE session_id = 'kept'").await, 1);
        store.close().await;
    });
}

#[test]
fn a_batch_does_not_wait_for_the_partition_of_its_day_while_somebody_reads_all_there_is() {
    with_postgres(async |served| {
        let store = served.open().await;
        // As pg_dump does.
        let mut reader = store.connection().await.unwrap();
        let reading = reader.transaction().await.unwrap();
        reading.batch_execute("SELECT count(*) FROM events_default").await.unwrap();
        let event = |n: usize| view_at(&n.to_string(), "s", -40 * DAY_MS + n as i64);
        let batch: Vec<Event> = (0..ROWS_OF_A_DAY).map(event).collect();
        let appended = tokio::time::timeout(Duration::from_secs(15), store.append(&batch)).await;
        let appended = appended.expect("it does not wait for the reader").unwrap();
        assert!(appended.iter().all(|one| *one == Appended::New));
        assert!(lock(&store.shared.days_rest_until).is_some(), "the partition could not be made");
        drop(reading);
        give_back(Ok(()), reader).unwrap();
        assert_eq!(store.stats().await.unwrap().default_events, ROWS_OF_A_DAY as u64);

        // When it can be made again it is, with what waited beside it.
        *lock(&store.shared.days_rest_until) = None;
        let later: Vec<Event> = (ROWS_OF_A_DAY..2 * ROWS_OF_A_DAY).map(event).collect();
        store.append(&later).await.unwrap();
        let stats = store.stats().await.unwrap();
        assert_eq!((stats.events, stats.default_events), (2 * ROWS_OF_A_DAY as u64, 0));
        whole(&store).await;
        store.close().await;
    });
}

#[test]
fn a_start_does_not_wait_for_partitions_while_somebody_reads_all_there_is() {
    with_postgres(async |served| {
        let store = served.open().await;
        let today = now_ms().div_euclid(DAY_MS);
        let name = schema::partition(today);
        sql(served, &format!("ALTER TABLE events DETACH PARTITION {name}; DROP TABLE {name}")).await;
        // As pg_dump does.
        let mut reader = store.connection().await.unwrap();
        let reading = reader.transaction().await.unwrap();
        reading.batch_execute("SELECT count(*) FROM events").await.unwrap();
        let opened = tokio::time::timeout(Duration::from_secs(15), served.open()).await;
        let opened = opened.expect("it does not wait for the reader");
        let batch: Vec<Event> = (0..ROWS_OF_A_DAY).map(|n| view_at(&n.to_string(), "s", n as i64)).collect();
        let appended = tokio::time::timeout(Duration::from_secs(15), opened.append(&batch)).await;
        appended.expect("neither does a batch").unwrap();
        drop(reading);
        give_back(Ok(()), reader).unwrap();
        let default_events = async || opened.stats().await.unwrap().default_events;
        assert_eq!(default_events().await, ROWS_OF_A_DAY as u64);
        let upkept = opened.upkeep(now_ms(), None).await.unwrap();
        assert_eq!((upkept.made, upkept.moved, default_events().await), (1, ROWS_OF_A_DAY as u64, 0));
        whole(&opened).await;
        opened.close().await;
        store.close().await;
    });
}
