//! What overload, failing disks and odd callers may do to a store, and what not.

use std::{fs, time::Instant as Clock};

use super::*;
use crate::sqlite::hot::Closed;

fn of() -> TenantScope {
    TenantScope::tenant("")
}

pub(super) fn all(tenant: &str) -> Scope {
    Scope { include_bots: true, ..Scope::new(TenantScope::tenant(tenant), i64::MIN..i64::MAX) }
}

/// A page at a time, with more of its JSON.
pub(super) fn page(id: &str, time_ms: i64, more: &str) -> Event {
    let json = format!(r#"{{"id":"{id}","kind":"page","time_ms":{time_ms},"accepted_ms":{time_ms}{more}}}"#);
    Event::from_json(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}"))
}

fn pages(ids: Range<i64>, more: &str) -> Vec<Event> {
    ids.map(|id| page(&id.to_string(), BASE_MS + id, more)).collect()
}

const USER: &str = r#","user_id":"u""#;

/// As if the sealer could not make a block just now.
async fn no_blocks_for_now(store: &SqliteStore) {
    let pause = |writer: &mut Writer| {
        let table = writer.door.read().tables().next().map(|(site, table)| (site, table.clone()));
        let (site, table) = table.expect("something is in memory");
        writer.take_block(&Closed { site, table }, Err(StoreError::Unavailable("not now".into())));
        Ok(())
    };
    store.write(pause).await.unwrap();
}

#[test]
fn what_is_refused_in_overload_costs_no_block_that_is_being_made() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let large = Settings {
            block_rows: 10_000,
            hot_rows_max: 10_000,
            ..Settings::new(dir.path().join("store.db"))
        };
        let store = SqliteStore::open(large.clone()).unwrap();
        for part in 0..6 {
            store.append(&pages(part * 1_000..part * 1_000 + 1_000, USER)).await.unwrap();
        }
        store.close().await;
        let store = SqliteStore::open(Settings { block_rows: 500, hot_rows_max: 500, ..large }).unwrap();
        // A caller who tries again at once, as long as it takes.
        let (start, mut refused) = (Clock::now(), 0);
        let one_more = [page("one more", BASE_MS, USER)];
        while let Err(error) = store.append(&one_more).await {
            assert!(error.to_string().contains("wait to become blocks"), "{error}");
            assert!(start.elapsed() < Duration::from_secs(30), "no block is made in overload");
            refused += 1;
        }
        assert!(refused > 0);
        store.seal().await.unwrap();
        let stats = store.stats().await.unwrap();
        assert_eq!((stats.events, stats.hot_events, stats.sealed), (6_001, 0, stats.blocks));
        store.close().await;
    });
}

#[test]
fn what_is_in_memory_is_not_read_again_for_what_was_refused() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings =
            Settings { block_rows: 1_000, hot_rows_max: 10, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings).unwrap();
        store.append(&pages(0..1, USER)).await.unwrap();
        no_blocks_for_now(&store).await;
        store.append(&pages(1..100, USER)).await.unwrap();
        let tables = || store.shared.door.read().tables().map(|(_, table)| table.clone()).collect::<Vec<_>>();
        let before = tables();
        for _ in 0..3 {
            let error = store.append(&pages(100..101, USER)).await.unwrap_err();
            assert!(error.to_string().contains("100 events"), "{error}");
        }
        assert!(tables().iter().zip(&before).all(|(one, other)| std::sync::Arc::ptr_eq(one, other)));
        store.close().await;
    });
}

#[test]
fn too_many_bytes_in_memory_are_refused_as_too_many_rows_are() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { hot_bytes_max: 100_000, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings).unwrap();
        store.append(&pages(0..1, USER)).await.unwrap();
        no_blocks_for_now(&store).await;
        let pad = "x".repeat(2_000);
        let large =
            |id: i64| page(&id.to_string(), BASE_MS, &format!(r#","properties":{{"p":"{pad}{id}"}}"#));
        let mut refused = None;
        for id in 1..1_000 {
            if let Err(error) = store.append(&[large(id)]).await {
                refused = Some((id, error.to_string()));
                break;
            }
        }
        let (id, why) = refused.expect("memory is bounded in bytes");
        assert!((30..400).contains(&id) && why.contains("bytes wait to become blocks"), "{id}: {why}");
        store.close().await;
    });
}

#[test]
fn who_waits_for_blocks_is_told_why_there_are_none() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings::new(dir.path().join("store.db"))).unwrap();
        let mut random = fastrand::Rng::with_seed(6);
        let text: String = std::iter::repeat_with(|| random.alphanumeric()).take(300_000).collect();
        store
            .append(&[page("1", BASE_MS, &format!(r#","user_id":"u","properties":{{"p":"{text}"}}"#))])
            .await
            .unwrap();
        let limit = |pages: u32| {
            let sql = format!("PRAGMA max_page_count={pages}");
            store.write(move |writer| Ok(writer.connection.query_row(&sql, [], |_| Ok(()))?))
        };
        limit(1).await.unwrap();
        for _ in 0..2 {
            let error = store.seal().await.unwrap_err();
            assert!(error.to_string().contains("full"), "{error}");
        }
        limit(1 << 20).await.unwrap();
        store.seal().await.unwrap();
        assert_eq!(store.stats().await.unwrap().hot_events, 0);
        store.close().await;
    });
}

#[test]
fn a_block_that_cannot_be_made_keeps_nobody_waiting() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        store.append(&pages(0..5, USER)).await.unwrap();
        for table in store.shared.door.write().sites.values_mut().flatten() {
            std::sync::Arc::make_mut(table).table.accepted.clear();
        }
        let sealed = tokio::time::timeout(Duration::from_secs(20), store.seal()).await;
        let error = sealed.expect("it does not wait for ever").unwrap_err();
        assert!(error.to_string().contains("panicked"), "{error}");
        // Whatever was wrong with it: it is tried again.
        for table in store.shared.door.write().sites.values_mut().flatten() {
            let table = &mut std::sync::Arc::make_mut(table).table;
            table.accepted = table.times.clone();
        }
        let sealed = tokio::time::timeout(Duration::from_secs(20), store.seal()).await;
        sealed.expect("it does not wait for ever").unwrap();
        assert_eq!(store.stats().await.unwrap().blocks, 1);
        store.close().await;
    });
}

#[test]
fn a_block_that_comes_while_the_file_cannot_be_read_keeps_nobody_waiting() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let events = pages(0..6, USER);
        store.append(&events[..5]).await.unwrap();
        let spoil = |writer: &mut Writer| {
            let before_n = writer.try_again();
            writer.close_where(before_n, |_| true)?;
            writer.connection.execute_batch("ALTER TABLE seen RENAME TO unseen")?;
            writer.doubt();
            Ok(())
        };
        store.write(spoil).await.unwrap();
        // The block comes, and what is in memory cannot be read again.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(store.append(&events[5..]).await.is_err());
        let other = Connection::open(dir.path().join("store.db")).unwrap();
        other.execute_batch("ALTER TABLE unseen RENAME TO seen").unwrap();
        drop(other);
        store.append(&events[5..]).await.unwrap();
        let sealed = tokio::time::timeout(Duration::from_secs(20), store.seal()).await;
        sealed.expect("it does not wait for ever").unwrap();
        assert_eq!(store.stats().await.unwrap().hot_events, 0);
        store.close().await;
    });
}

#[test]
fn blocks_of_few_large_events_are_not_merged_into_one_that_is_larger_than_a_block_may_be() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { block_bytes: 200_000, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings).unwrap();
        let mut random = fastrand::Rng::with_seed(1);
        let mut large = |id: i64, length: usize| {
            let text: String = std::iter::repeat_with(|| random.alphanumeric()).take(length).collect();
            page(
                &id.to_string(),
                BASE_MS + id,
                &format!(r#","user_id":"u","properties":{{"text":"{text}"}}"#),
            )
        };
        for part in 0..20 {
            let batch: Vec<Event> = (0..5).map(|n| large(part * 5 + n, 6_000)).collect();
            store.append(&batch).await.unwrap();
            store.seal().await.unwrap();
        }
        assert!(store.tidy(i64::MAX).await.unwrap() > 0, "what fits is merged");
        let (blocks, largest): (i64, i64) = store
            .write(|writer| {
                let sql = "SELECT (SELECT count(*) FROM block), (SELECT max(length(data)) FROM col)";
                Ok(writer.connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?)
            })
            .await
            .unwrap();
        assert!(
            (3..20).contains(&blocks) && largest < 200_000,
            "{blocks} blocks, a column of {largest} bytes"
        );
        assert_eq!(store.summary(&all("")).await.unwrap().events, 100);
        store.close().await;
    });
}

#[test]
fn a_block_that_grows_is_not_written_anew_each_night() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings::new(dir.path().join("store.db"))).unwrap();
        let (mut merged, mut id) = (0, 0);
        let mut nightly = async |events: i64| {
            store.append(&pages(id..id + events, USER)).await.unwrap();
            id += events;
            let before = store.stats().await.unwrap();
            merged += store.tidy(i64::MAX).await.unwrap();
            (before.free_bytes, store.stats().await.unwrap().blocks)
        };
        nightly(1_000).await;
        let largest = "SELECT min(id) FROM block WHERE rows >= 1000";
        let block = || {
            store.write(|writer| Ok(writer.connection.query_row(largest, [], |row| row.get::<_, i64>(0))?))
        };
        let first = block().await.unwrap();
        for _ in 0..60 {
            nightly(10).await;
        }
        assert_eq!(block().await.unwrap(), first, "600 events more are not worth it yet");
        for _ in 0..60 {
            nightly(10).await;
        }
        assert_ne!(block().await.unwrap(), first, "once they are as many they are");
        let stats = store.stats().await.unwrap();
        assert!(stats.blocks < 12 && stats.events == 2_200, "{stats:?}");
        store.close().await;
    });
}

/// How often a name stands in the file or its log.
fn traces(path: &Path, name: &str) -> usize {
    let bytes = |end: &str| fs::read(format!("{}{end}", path.display())).unwrap_or_default();
    let count = |bytes: Vec<u8>| bytes.windows(name.len()).filter(|part| *part == name.as_bytes()).count();
    count(bytes("")) + count(bytes("-wal"))
}

#[test]
fn somebody_who_is_erased_while_others_read_is_gone_from_the_log_soon() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        let store = SqliteStore::open(Settings::new(&path)).unwrap();
        let gone = "gone-for-good";
        store.append(&pages(0..50, &format!(r#","user_id":"{gone}""#))).await.unwrap();
        let reader = schema::open_reader(&path).unwrap();
        reader.execute_batch("BEGIN").unwrap();
        let _: i64 = reader.query_row("SELECT count(*) FROM hot", [], |row| row.get(0)).unwrap();
        let start = Clock::now();
        let deleted = store.erase(&of(), &Subject::User(gone.into())).await.unwrap();
        assert!(deleted.is_in_log && deleted.events == 50, "{deleted:?}");
        assert!(start.elapsed() < Duration::from_secs(3), "appends do not wait for readers");
        assert!(traces(&path, gone) > 0, "else this says nothing");
        reader.execute_batch("ROLLBACK").unwrap();
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        store.append(&pages(100..101, USER)).await.unwrap();
        assert_eq!(traces(&path, gone), 0);
        let deleted = store.erase(&of(), &Subject::User("u".into())).await.unwrap();
        assert!(!deleted.is_in_log, "{deleted:?}");
        store.close().await;
    });
}

#[test]
fn an_erasure_says_what_it_could_not_reach() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let damage = |sql: &'static str| store.write(move |writer| Ok(writer.connection.execute(sql, [])?));
        store.append(&pages(0..6, USER)).await.unwrap();
        store.seal().await.unwrap();
        store.append(&pages(10..12, USER)).await.unwrap();
        damage("UPDATE col SET data = zeroblob(9) WHERE k & 255 = 1").await.unwrap();
        damage("UPDATE hot SET events = zeroblob(9)").await.unwrap();
        let who = Subject::User("u".into());
        let deleted = store.erase(&of(), &who).await.unwrap();
        assert_eq!((deleted.events, deleted.damaged_blocks, deleted.damaged_batches), (2, 1, 1));
        store.close().await;
        // And one that was damaged before it was opened.
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let deleted = store.erase(&of(), &who).await.unwrap();
        assert_eq!((deleted.damaged_blocks, deleted.damaged_batches), (1, 1));
        let other = store.erase(&TenantScope::tenant("other"), &who).await.unwrap();
        assert_eq!(other, Deleted::default());
        store.close().await;
    });
}

#[test]
fn who_may_see_one_website_deletes_nothing_of_another_and_learns_nothing_of_it() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let oracle = Oracle::with_keys(store.shared.keys);
        let events = ["w1", "w2"]
            .map(|source| page(source, BASE_MS, &format!(r#","user_id":"u","source":"{source}""#)));
        let (one, who) = (TenantScope::source("", "w1"), Subject::User("u".into()));
        for store in [&store as &dyn Store, &oracle] {
            store.append(&events).await.unwrap();
            let by = Operator::default();
            let refused = [
                store.retain(&one, i64::MAX).await.map(drop),
                store.erase(&one, &who).await.map(drop),
                store.link(&one, "d", "u", false, &by).await,
                store.identity(&one, &who).await.map(drop),
                store.identity_log(&one, &who, 10).await.map(drop),
            ];
            assert!(refused.iter().all(|one| matches!(one, Err(StoreError::Invalid { .. }))), "{refused:?}");
            assert_eq!(store.summary(&all("")).await.unwrap().events, 2);
            assert_eq!(store.retain(&of(), i64::MAX).await.unwrap().events, 2);
        }
        store.close().await;
    });
}

#[test]
fn websites_that_anybody_names_are_bounded_and_those_that_keys_name_are_not() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { sites_max: 10, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings.clone()).unwrap();
        let of_site = |id: i64| {
            page(
                &id.to_string(),
                BASE_MS,
                &format!(r#","user_id":"u","properties":{{"website_id":"w{id}"}}"#),
            )
        };
        for part in 0..10 {
            store.append(&(part * 20..part * 20 + 20).map(of_site).collect::<Vec<_>>()).await.unwrap();
        }
        let key = r#","user_id":"u","source":"of a key""#;
        store
            .append(&[
                page("by key", BASE_MS, key),
                page("other tenant", BASE_MS, r#","tenant":"t","properties":{"website_id":"w"}"#),
            ])
            .await
            .unwrap();
        // The ten, those that name none, the key's, the other tenant's.
        let stats = store.stats().await.unwrap();
        assert_eq!((stats.sites, stats.sources_refused), (13, 190), "{stats:?}");
        let events = async |store: &SqliteStore, source: &str| {
            let scope = Scope { of: TenantScope::source("", source), ..all("") };
            store.summary(&scope).await.unwrap().events
        };
        let of = async |store: &SqliteStore| {
            (
                events(store, "w9").await,
                events(store, "w10").await,
                events(store, "").await,
                events(store, "of a key").await,
            )
        };
        assert_eq!(of(&store).await, (1, 0, 190, 1));
        assert_eq!(store.summary(&all("")).await.unwrap().events, 201);
        // What is there is there once, and the bound is the same after a restart.
        store.close().await;
        let store = SqliteStore::open(Settings { window: 1, ..settings }).unwrap();
        assert_eq!(store.append(&[of_site(150), of_site(5)]).await.unwrap(), vec![Appended::Duplicate; 2]);
        store.append(&[of_site(1_000)]).await.unwrap();
        store.seal().await.unwrap();
        assert_eq!(store.append(&[of_site(150), of_site(5)]).await.unwrap(), vec![Appended::Duplicate; 2]);
        assert_eq!(of(&store).await, (1, 0, 191, 1));
        store.close().await;
    });
}

#[test]
fn a_clock_that_is_ahead_does_not_make_everything_be_looked_for_in_blocks() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { block_rows: 50, window: 100, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings).unwrap();
        let ahead = |id: i64, hours: i64| {
            let now_ms = BASE_MS + id * 10;
            let time_ms = now_ms + hours * 3_600_000;
            let json = format!(
                r#"{{"id":"{id}","kind":"page","user_id":"u","time_ms":{time_ms},"accepted_ms":{now_ms}}}"#
            );
            Event::from_json(json.as_bytes()).unwrap()
        };
        let batch = |block: i64| {
            (0..51).map(|n| ahead(block * 51 + n, if n == 0 { 12 } else { 0 })).collect::<Vec<_>>()
        };
        for block in 0..20 {
            store.append(&batch(block)).await.unwrap();
            let sealed = async || store.stats().await.unwrap().blocks == block as u64 + 1;
            while !sealed().await {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        let over = |now_ms: i64| {
            store.write(move |writer| {
                let sql = "SELECT count(*) FROM block WHERE last_ms > ?1";
                Ok(writer.connection.query_row(sql, [now_ms], |row| row.get::<_, i64>(0))?)
            })
        };
        assert_eq!(over(BASE_MS + 20 * 51 * 10).await.unwrap(), 0, "blocks end where they were made");
        assert_eq!(store.stats().await.unwrap().hot_events, 20, "those of the clock that is ahead");
        store.seal().await.unwrap();
        assert_eq!(over(BASE_MS + 20 * 51 * 10).await.unwrap(), 1);
        // What is not remembered any more is found in either.
        assert_eq!(store.append(&batch(3)).await.unwrap(), vec![Appended::Duplicate; 51]);
        assert_eq!(store.summary(&all("")).await.unwrap().events, 20 * 51);
        store.close().await;
    });
}

#[test]
fn a_batch_of_late_events_is_looked_for_once_in_each_block() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { window: 10, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings).unwrap();
        let at_once: Vec<Event> = (0..6_000).map(|id| page(&format!("a {id}"), BASE_MS, USER)).collect();
        store.append(&at_once).await.unwrap();
        store.seal().await.unwrap();
        let start = Clock::now();
        let others: Vec<Event> = (0..1_000).map(|id| page(&format!("b {id}"), BASE_MS, USER)).collect();
        assert_eq!(store.append(&others).await.unwrap(), vec![Appended::New; 1_000]);
        assert_eq!(store.append(&at_once[..1_000]).await.unwrap(), vec![Appended::Duplicate; 1_000]);
        // If the ids were unpacked for each event it would take minutes.
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        store.close().await;
    });
}
