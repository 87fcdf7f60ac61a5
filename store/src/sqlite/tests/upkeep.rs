//! What is done beside writing and asking.

use std::fs;

use super::*;

fn all(tenant: &str) -> Scope {
    Scope { include_bots: true, ..Scope::new(TenantScope::tenant(tenant), i64::MIN..i64::MAX) }
}

fn event(id: usize, tenant: &str, user: &str, minute: i64) -> Event {
    let time_ms = BASE_MS + minute * MINUTE_MS;
    let json = format!(
        r#"{{"id":"{id}","kind":"page","user_id":"{user}","anonymous_id":"device of {user}","time_ms":{time_ms},"accepted_ms":{time_ms},"tenant":"{tenant}","sent_context":{{"page":{{"path":"/of/{user}"}}}},"properties":{{"n":{id}}}}}"#
    );
    Event::from_json(json.as_bytes()).unwrap()
}

#[test]
fn a_thousand_small_tenants_stay_apart_and_become_few_blocks() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings =
            Settings { block_rows: 200, hot_rows_max: 3_000, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings).unwrap();
        for turn in 0..6 {
            for part in 0..10 {
                let ids = (0..100).map(|n| part * 100 + n);
                let batch: Vec<Event> =
                    ids.map(|tenant| event(turn, &format!("t{tenant}"), "u", turn as i64)).collect();
                store.append(&batch).await.unwrap();
            }
            store.seal().await.unwrap();
        }
        let before = store.stats().await.unwrap();
        assert_eq!((before.blocks, before.hot_events, before.events), (6_000, 0, 6_000));
        assert_eq!(store.tidy(i64::MAX).await.unwrap(), 5_000);
        let after = store.stats().await.unwrap();
        assert_eq!((after.blocks, after.events, after.merged), (1_000, 6_000, 5_000));
        for tenant in ["t0", "t999"] {
            let summary = store.summary(&all(tenant)).await.unwrap();
            assert_eq!((summary.events, summary.visitors.n, summary.sessions.sessions), (6, 1, 1));
        }
        store.close().await;
    });
}

#[test]
fn too_much_in_memory_becomes_blocks_and_the_largest_first() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings =
            Settings { block_rows: 1_000, hot_rows_max: 100, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings).unwrap();
        for id in 0..300 {
            let tenant = if id % 3 == 0 { "small" } else { "large" };
            while store.append(&[event(id, tenant, "u", 0)]).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let stats = store.stats().await.unwrap();
        assert!(stats.hot_events <= 400 && stats.sealed > 0, "{stats:?}");
        assert_eq!(stats.events, 300);
        store.close().await;
    });
}

#[test]
fn of_what_times_events_are_is_known_whether_they_are_in_blocks_or_not() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let times = async || {
            let stats = store.stats().await.unwrap();
            (stats.first_ms, stats.last_ms)
        };
        let at = |minute: i64| Some(BASE_MS + minute * MINUTE_MS);
        assert_eq!(times().await, (None, None));
        store.append(&[event(1, "", "u", 5), event(2, "t", "u", 7)]).await.unwrap();
        assert_eq!(times().await, (at(5), at(7)), "in memory");
        store.seal().await.unwrap();
        assert_eq!(times().await, (at(5), at(7)), "in blocks");
        store.append(&[event(3, "", "u", 6)]).await.unwrap();
        assert_eq!(times().await, (at(5), at(7)));
        store.append(&[event(4, "", "u", 3), event(5, "", "u", 9)]).await.unwrap();
        assert_eq!(times().await, (at(3), at(9)), "in both");
        store.close().await;
    });
}

#[test]
fn somebody_who_is_erased_leaves_no_trace_in_the_file() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        let store = SqliteStore::open(Settings { block_rows: 20, ..Settings::new(&path) }).unwrap();
        let users = ["gone-for-good", "somebody-else"];
        let events: Vec<Event> = (0..70).map(|id| event(id, "", users[id % 2], id as i64)).collect();
        for batch in events.chunks(5) {
            store.append(batch).await.unwrap();
        }
        store.seal().await.unwrap();
        store.append(&[event(100, "", users[0], 0), event(101, "", users[1], 0)]).await.unwrap();
        let of = TenantScope::tenant("");
        let traces = |name: &str| {
            let bytes: Vec<u8> = ["", "-wal"]
                .iter()
                .filter_map(|end| fs::read(format!("{}{end}", path.display())).ok())
                .flatten()
                .collect();
            bytes.windows(name.len()).filter(|part| *part == name.as_bytes()).count()
        };
        assert!(traces(users[0]) > 0);
        let deleted = store.erase(&of, &Subject::User(users[0].into())).await.unwrap();
        assert_eq!(deleted.events, 36);
        assert!(deleted.facts >= 2 && deleted.blocks == 4, "{deleted:?}");
        assert_eq!((traces(users[0]), traces(users[1]) > 0), (0, true));
        assert_eq!(store.identity(&of, &Subject::User(users[0].into())).await.unwrap(), None);
        // What comes again does not bring it back.
        let again = store.append(&events[..10]).await.unwrap();
        assert!(again.iter().all(|one| *one == Appended::Duplicate));
        store.close().await;
        let store = SqliteStore::open(Settings::new(&path)).unwrap();
        assert_eq!(store.summary(&all("")).await.unwrap().events, 36);
        store.close().await;
        assert!(check(&path, |_| ()).unwrap().is_whole());
    });
}

#[test]
fn a_copy_and_an_export_are_the_same_store() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let oracle = Oracle::with_keys(store.shared.keys);
        let events: Vec<Event> = (0..90)
            .map(|id| {
                Spec {
                    minute: id as i16 * 7,
                    kind: id as u8,
                    user: id as u8,
                    device: id as u8 / 3,
                    page: id as u8,
                    ..Spec::default()
                }
                .event(id)
            })
            .collect();
        for batch in events.chunks(8) {
            store.append(batch).await.unwrap();
        }
        oracle.append(&events).await.unwrap();
        // Beside the one that writes.
        let copy = dir.path().join("copy.db");
        backup(&path, &copy).unwrap();
        assert!(backup(&path, &copy).unwrap_err().to_string().contains("not there yet"));
        let mut lines = Vec::new();
        let report = export(&path, &Wanted::default(), &mut lines).unwrap();
        assert_eq!((report.events, report.damaged, report.facts > 0), (90, 0, true));
        let part = Wanted { tenant: None, range_ms: BASE_MS..=i64::MAX };
        assert_eq!(export(&path, &part, &mut Vec::new()).unwrap().facts, 0);
        assert_eq!(check(&path, |_| ()).unwrap().events, 90);
        let copied = SqliteStore::open(Settings { path: copy, ..settings(dir.path()) }).unwrap();
        compare(&copied, &oracle, &scopes(0, 600)[1]).await;
        let imported =
            SqliteStore::open(Settings { path: dir.path().join("new.db"), ..settings(dir.path()) }).unwrap();
        lines.extend(b"\n  \nno event\n{\"id\":\"cut");
        let report = imported.import(std::io::Cursor::new(lines.clone())).await.unwrap();
        assert_eq!((report.new, report.duplicates, report.damaged), (90, 0, 2));
        assert!(report.facts > 5, "{report:?}");
        let again = imported.import(std::io::Cursor::new(lines.clone())).await.unwrap();
        assert_eq!((again.new, again.duplicates), (0, 90));
        let oracle = Oracle::with_keys(imported.shared.keys);
        oracle.append(&events).await.unwrap();
        compare(&imported, &oracle, &scopes(0, 600)[1]).await;
        for store in [store, copied, imported] {
            store.vacuum().await.unwrap();
            assert_eq!(store.summary(&all("")).await.unwrap().events, 90);
            store.close().await;
        }
    });
}

#[test]
fn too_many_visitors_are_estimated_and_the_answer_says_so() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::new(dir.path().join("store.db"));
        settings.limits.exact_max = 1_500;
        let store = SqliteStore::open(settings).unwrap();
        for part in 0..5 {
            let batch: Vec<Event> = (0..1_000)
                .map(|n| event(part * 1_000 + n, "", &format!("u{}", part * 1_000 + n), 0))
                .collect();
            store.append(&batch).await.unwrap();
        }
        let visitors = store.summary(&all("")).await.unwrap().visitors;
        assert!(visitors.estimated && visitors.n.abs_diff(5_000) < 150, "{visitors:?}");
        let by_name = store.breakdown(&all(""), &Field::Name, 10).await.unwrap();
        assert!(by_name.rows[0].visitors.estimated, "{by_name:?}");
        store.close().await;
    });
}

#[test]
fn of_too_many_values_the_rest_is_one_row() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::new(dir.path().join("store.db"));
        settings.limits.values_max = 40;
        let store = SqliteStore::open(settings).unwrap();
        let events: Vec<Event> =
            (0..100).map(|id| event(id, "", &format!("u{id}"), id as i64 * 60)).collect();
        store.append(&events).await.unwrap();
        let pages = store.breakdown(&all(""), &Field::Page, 10).await.unwrap();
        assert_eq!((pages.rows.len(), pages.total), (10, 40));
        assert_eq!(pages.others.map(|row| (row.events, row.visitors.n)), Some((60, 60)));
        let sessions = store.sessions_by(&all(""), &Field::Page, 10).await.unwrap();
        assert_eq!(sessions.others.map(|row| row.sums.sessions), Some(60));
        store.close().await;
    });
}

/// Names that have no column of their own, as callers make too many, and those of which
/// there are too many for an answer.
#[test]
fn all_names_of_properties_are_found_however_many_there_are() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings { block_rows: 1_000, ..Settings::new(dir.path().join("store.db")) };
        settings.limits.values_max = 300;
        let store = SqliteStore::open(settings).unwrap();
        let oracle = Oracle::with_keys(store.shared.keys);
        let events: Vec<Event> = (0..290)
            .map(|id| {
                let json = format!(
                    r#"{{"id":"{id}","kind":"track","name":"n","time_ms":{id},"accepted_ms":1,"properties":{{"of all":1,"gone":null,"é\u001f{id}":{{"a":1}}}}}}"#
                );
                Event::from_json(json.as_bytes()).unwrap()
            })
            .collect();
        store.append(&events).await.unwrap();
        oracle.append(&events).await.unwrap();
        for _ in 0..2 {
            let found = store.properties(&all(""), 1_000).await.unwrap();
            assert_eq!(found, oracle.properties(&all(""), 1_000).await.unwrap());
            assert_eq!((found.total, found.rows[0].events, found.rows[0].last_ms), (291, 290, 289));
            store.seal().await.unwrap();
        }
        let more: Vec<Event> = (0..20)
            .map(|id| {
                let json = format!(
                    r#"{{"id":"m{id}","kind":"track","name":"n","time_ms":5,"accepted_ms":1,"properties":{{"more{id}":1}}}}"#
                );
                Event::from_json(json.as_bytes()).unwrap()
            })
            .collect();
        store.append(&more).await.unwrap();
        let found = store.properties(&all(""), 10).await.unwrap();
        assert_eq!((found.rows.len(), found.total, found.others.map(|others| others.events)), (10, 300, Some(11)));
        store.close().await;
    });
}

#[test]
fn questions_that_ask_for_too_much_say_what_may_be_asked() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        let scope = all("");
        let many =
            scope.clone().with(Filter { values: vec![String::new(); 101], ..Filter::is(Field::Page, "") });
        let error = store.summary(&many).await.unwrap_err().to_string();
        assert!(error.contains("got 101, want at most 100"), "{error}");
        let funnel = |steps: usize, window_ms| Funnel {
            steps: vec![Step::default(); steps],
            window_ms,
            order: Order::Ordered,
            unit: Unit::Visitor,
        };
        for funnel in [funnel(0, 1), funnel(11, 1), funnel(2, -1)] {
            assert!(matches!(store.funnel(&scope, &funnel).await, Err(StoreError::Invalid { .. })));
        }
        assert!(store.breakdown(&scope, &Field::Page, 1_000_000).await.is_err());
        assert!(store.counts(&scope, Bucket::Hour, "UTC").await.is_err());
        assert!(store.counts(&scope, Bucket::All, "Nowhere/At_all").await.is_err());
        #[allow(clippy::reversed_empty_ranges)]
        let backwards = scope.over(5..4);
        assert!(matches!(store.summary(&backwards).await, Err(StoreError::Invalid { .. })));
        store.close().await;
    });
}

/// While it is written to, each answer is of one moment: whole batches.
#[test]
fn questions_see_whole_batches_while_others_are_written_and_sealed() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings =
            Settings { block_rows: 50, hot_rows_max: 200, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings).unwrap();
        let writing = {
            let store = store.clone();
            tokio::spawn(async move {
                for part in 0..150 {
                    let batch: Vec<Event> =
                        (0..10).map(|n| event(part * 10 + n, "", &format!("u{part}"), 0)).collect();
                    while store.append(&batch).await.is_err() {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    if part % 40 == 39 {
                        store.tidy(i64::MAX).await.unwrap();
                    }
                }
            })
        };
        let (mut last, mut seen) = (0, BTreeSet::new());
        while !writing.is_finished() {
            let summary = store.summary(&all("")).await.unwrap();
            assert_eq!(
                (summary.events % 10, summary.visitors.n, summary.damaged_blocks),
                (0, summary.events / 10, 0)
            );
            assert!(summary.events >= last, "nothing that was seen is gone");
            last = summary.events;
            seen.insert(last);
        }
        writing.await.unwrap();
        assert!(seen.len() > 5, "{seen:?}");
        assert_eq!(store.summary(&all("")).await.unwrap().events, 1_500);
        store.close().await;
    });
}

#[test]
fn a_vacuum_that_nobody_waits_for_is_given_up_and_costs_nothing() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        let store = SqliteStore::open(Settings { block_rows: 500, ..Settings::new(&path) }).unwrap();
        for part in 0..2 {
            let batch: Vec<Event> =
                (0..1_000).map(|n| event(part * 1_000 + n, "", &format!("u{n}"), n as i64)).collect();
            store.append(&batch).await.unwrap();
        }
        store.seal().await.unwrap();
        store.erase(&TenantScope::tenant(""), &Subject::User("u1".into())).await.unwrap();
        let free_bytes = async || store.stats().await.unwrap().free_bytes;
        let before = free_bytes().await;
        assert!(before > 0);
        // One that waits for its turn is not begun.
        let (begun, has_begun) = oneshot::channel();
        let (go_on, goes_on) = threads::channel::<()>();
        let other = store.clone();
        let busy = tokio::spawn(async move {
            let wait = move |_: &mut Writer| {
                begun.send(()).unwrap();
                goes_on.recv().unwrap();
                Ok(())
            };
            other.write(wait).await
        });
        has_begun.await.unwrap();
        let waits = tokio::time::timeout(Duration::from_millis(20), store.vacuum()).await;
        assert!(waits.is_err());
        go_on.send(()).unwrap();
        busy.await.unwrap().unwrap();
        assert_eq!(free_bytes().await, before);
        // One that runs ends soon, wherever it is; nothing else of the writer's is hit.
        for micros in [0, 200, 1_000, 3_000, 10_000] {
            let _ = tokio::time::timeout(Duration::from_micros(micros), store.vacuum()).await;
            let id = 100_000 + micros as usize;
            assert_eq!(store.append(&[event(id, "", "late", 0)]).await.unwrap(), [Appended::New]);
        }
        store.vacuum().await.unwrap();
        assert_eq!(free_bytes().await, 0);
        store.close().await;
        let report = check(&path, |_| ()).unwrap();
        assert!(report.is_whole());
        assert_eq!(report.events, 2_000 - 2 + 5);
    });
}

#[test]
fn what_is_no_store_is_told_apart_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let wrong = |name: &str| {
        let before = fs::read(path(name)).ok();
        let why = look(&path(name)).unwrap_err().to_string();
        assert_eq!(check(&path(name), |_| ()).unwrap_err().to_string(), why);
        assert_eq!(fs::read(path(name)).ok(), before);
        why
    };
    assert!(wrong("nothing").contains("no such file"));
    fs::write(path("text"), "some text, and more than a page of it".repeat(300)).unwrap();
    assert!(wrong("text").contains("want a store's file"));
    fs::write(path("empty"), "").unwrap();
    assert!(wrong("empty").contains("want a store's file"));
    Connection::open(path("else"))
        .unwrap()
        .execute_batch("CREATE TABLE a(b); PRAGMA user_version=1")
        .unwrap();
    assert!(wrong("else").contains("tables of something else"));
    Connection::open(path("newer")).unwrap().execute_batch("PRAGMA user_version=99").unwrap();
    assert!(wrong("newer").contains("newer relay"));
}

#[test]
fn a_backup_is_its_owners_whole_or_not_there_and_overwrites_nothing() {
    use std::os::unix::fs::PermissionsExt;
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        let store = SqliteStore::open(Settings::new(&path)).unwrap();
        store.append(&[event(1, "", "u", 0)]).await.unwrap();
        let copy = dir.path().join("copy");
        fs::write(unfinished(&copy), "of one that was killed").unwrap();
        let why = backup(&path, &copy).unwrap_err().to_string();
        assert!(why.contains("copy.unfinished") && why.contains("removed"), "{why}");
        assert!(!copy.exists());
        fs::remove_file(unfinished(&copy)).unwrap();
        backup(&path, &copy).unwrap();
        assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!unfinished(&copy).exists());
        assert!(backup(&path, &dir.path().join("no/where")).is_err());
        assert_eq!(check(&copy, |_| ()).unwrap().events, 1);
        store.close().await;
    });
}
