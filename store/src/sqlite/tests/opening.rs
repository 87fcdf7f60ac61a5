//! How a file is opened, what of it is believed, and what comes back of what was lost.

use std::{fs, os::unix::fs::FileExt};

use super::{
    strain::{all, page},
    *,
};

const USER: &str = r#","user_id":"u","anonymous_id":"d""#;

fn pages(ids: Range<i64>) -> Vec<Event> {
    ids.map(|id| page(&id.to_string(), BASE_MS + id, USER)).collect()
}

fn of() -> TenantScope {
    TenantScope::tenant("")
}

#[test]
fn who_is_who_that_is_damaged_begins_anew_and_costs_no_event() {
    runtime().block_on(async {
        for table in ["traits", "owner", "link", "identity_log"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("store.db");
            let store = SqliteStore::open(settings(dir.path())).unwrap();
            store.append(&pages(0..20)).await.unwrap();
            store.close().await;
            let root: u64 = {
                let sql = format!("SELECT rootpage FROM sqlite_schema WHERE name = '{table}'");
                let page: i64 =
                    Connection::open(&path).unwrap().query_row(&sql, [], |row| row.get(0)).unwrap();
                page as u64
            };
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[0x55; 8192], (root - 1) * 8192).unwrap();
            let store = SqliteStore::open(settings(dir.path())).unwrap();
            assert_eq!(store.set_aside(), None, "{table}");
            assert_eq!(store.summary(&all("")).await.unwrap().events, 20);
            assert_eq!(store.identity(&of(), &Subject::User("u".into())).await.unwrap(), None);
            store.append(&pages(20..25)).await.unwrap();
            let known = store.identity(&of(), &Subject::User("u".into())).await.unwrap().unwrap();
            assert_eq!(known.anonymous, ["d"]);
            store.vacuum().await.unwrap();
            store.close().await;
            assert!(check(&path, |_| {}).unwrap().is_whole(), "{table}");
        }
    });
}

#[test]
fn what_is_said_of_a_block_is_believed_if_it_is_what_was_written() {
    runtime().block_on(async {
        for change in
            ["rows = 9000000000000000000", "rows = 1", "first_ms = last_ms", "last_ms = first_ms", "bots = 1"]
        {
            let dir = tempfile::tempdir().unwrap();
            let store = SqliteStore::open(settings(dir.path())).unwrap();
            store.append(&pages(0..6)).await.unwrap();
            store.seal().await.unwrap();
            store.append(&pages(10..12)).await.unwrap();
            let sql = format!("UPDATE block SET {change}");
            store.write(move |writer| Ok(writer.connection.execute(&sql, [])?)).await.unwrap();
            // Also one that it seems to have nothing of.
            for scope in [all(""), all("").over(BASE_MS + 10..BASE_MS + 100)] {
                let summary = store.summary(&scope).await.unwrap();
                assert_eq!((summary.events, summary.damaged_blocks), (2, 1), "{change}");
                assert_eq!(store.pages(&scope, 10).await.unwrap().damaged_blocks, 1, "{change}");
            }
            let deleted = store.retain(&of(), BASE_MS + 11).await.unwrap();
            assert_eq!((deleted.events, deleted.damaged_blocks), (1, 1), "{change}");
            store.tidy(i64::MAX).await.unwrap();
            store.close().await;
            assert_eq!(
                check(&dir.path().join("store.db"), |_| {}).unwrap().damaged_blocks.len(),
                1,
                "{change}"
            );
        }
    });
}

#[test]
fn a_file_system_that_cannot_have_a_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = format!("file:{}?vfs=unix-dotfile", dir.path().join("store.db").display());
    let error = schema::open_writer(Path::new(&path)).unwrap_err().to_string();
    assert!(error.contains("the store's journal") && error.contains("want \"wal\""), "{error}");
}

#[test]
fn a_store_on_a_full_disk_opens_and_answers() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        store.append(&pages(0..20)).await.unwrap();
        store.close().await;
        let written = || {
            let connection = schema::open_writer(&path).unwrap();
            connection.total_changes()
                + fs::metadata(path.with_extension("db-wal")).map_or(0, |wal| wal.len())
        };
        assert_eq!(written(), 0, "to open it nothing need be written");
    });
}

#[test]
fn a_lock_that_cannot_be_had_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(settings(dir.path())).unwrap();
    let error = SqliteStore::open(settings(dir.path())).unwrap_err().to_string();
    assert!(error.contains("another process writes to it"), "{error}");
    runtime().block_on(store.close());
    let nowhere = Settings::new(dir.path().join("not/there/store.db"));
    let error = SqliteStore::open(nowhere).unwrap_err().to_string();
    assert!(!error.contains("another process") && error.contains("No such file"), "{error}");
}

#[test]
fn a_lock_that_is_let_go_of_in_a_moment_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(SqliteStore::open(settings(dir.path())).unwrap().close());
    let held = fs::File::open(dir.path().join("store.db-lock")).unwrap();
    held.lock().unwrap();
    let holder = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(held);
    });
    let opened = SqliteStore::open(settings(dir.path())).unwrap();
    holder.join().unwrap();
    runtime().block_on(opened.close());
}

#[test]
fn errors_that_are_none_of_the_file_do_not_set_it_aside() {
    for error in [rusqlite::Error::InvalidQuery, rusqlite::Error::InvalidParameterName("x".into())] {
        assert!(matches!(StoreError::from(error), StoreError::Unavailable(_)));
    }
    let connection = Connection::open_in_memory().unwrap();
    let wrong = connection.query_row("SELECT 'text'", [], |row| row.get::<_, i64>(0)).unwrap_err();
    assert!(matches!(StoreError::from(wrong), StoreError::Damaged(_)));
}

#[test]
fn what_a_damaged_batch_had_may_come_again_and_the_rest_of_it_not_twice() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let of_site = |id: i64, site: &str| {
            page(&id.to_string(), BASE_MS, &format!(r#","user_id":"u","source":"{site}""#))
        };
        let batch = [of_site(1, "w1"), of_site(2, "w2")];
        store.append(&batch).await.unwrap();
        store.append(&[of_site(3, "w1")]).await.unwrap();
        let damage = "UPDATE hot SET events = zeroblob(9) WHERE id = (SELECT min(id) FROM hot)";
        store.write(|writer| Ok(writer.connection.execute(damage, [])?)).await.unwrap();
        store.close().await;
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let mut again = store.append(&batch).await.unwrap();
        again.extend(store.append(&[of_site(3, "w1")]).await.unwrap());
        assert_eq!(again.iter().filter(|one| **one == Appended::New).count(), 1, "{again:?}");
        assert_eq!(store.append(&batch).await.unwrap(), vec![Appended::Duplicate; 2]);
        assert_eq!(store.summary(&all("")).await.unwrap().events, 3);
        store.close().await;
    });
}

#[test]
fn what_a_damaged_block_had_may_come_again() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        store.append(&pages(0..6)).await.unwrap();
        store.seal().await.unwrap();
        store.append(&pages(10..16)).await.unwrap();
        store.seal().await.unwrap();
        store.append(&pages(3..4).into_iter().chain(pages(20..22)).collect::<Vec<_>>()).await.unwrap();
        let damage = "UPDATE col SET data = zeroblob(9) WHERE k >> 8 = (SELECT min(id) FROM block)";
        store.write(|writer| Ok(writer.connection.execute(damage, [])?)).await.unwrap();
        // Nobody knows yet.
        assert_eq!(store.append(&pages(0..1)).await.unwrap(), [Appended::Duplicate]);
        assert_eq!(store.summary(&all("")).await.unwrap().damaged_blocks, 1);
        let again: Vec<Event> = pages(0..6).into_iter().chain(pages(10..16)).chain(pages(20..22)).collect();
        let want = [vec![Appended::New; 6], vec![Appended::Duplicate; 8]].concat();
        assert_eq!(store.append(&again).await.unwrap(), want);
        assert_eq!(store.append(&again).await.unwrap(), vec![Appended::Duplicate; 14]);
        assert_eq!(store.summary(&all("")).await.unwrap().events, 14);
        store.close().await;
    });
}

#[test]
fn an_event_at_which_a_bug_panics_costs_its_batch_and_not_the_store() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        store.append(&pages(0..3)).await.unwrap();
        let bad = [page(crate::scan::table::PANICS, BASE_MS, USER)];
        assert!(matches!(store.append(&bad).await, Err(StoreError::Unavailable(_))));
        assert_eq!(store.append(&bad).await.unwrap(), [Appended::Duplicate], "sent again it is no trap");
        store.append(&pages(3..5)).await.unwrap();
        store.close().await;
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let stats = store.stats().await.unwrap();
        assert_eq!((stats.events, stats.damaged_batches), (5, 1));
        assert_eq!(store.append(&bad).await.unwrap(), [Appended::Duplicate]);
        store.close().await;
    });
}
