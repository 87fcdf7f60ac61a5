//! Answers where there is more than an answer may take, and where time ends.

use std::collections::BTreeMap;

use super::{
    strain::{all, page},
    *,
};

fn at(path: &str) -> String {
    format!(r#","user_id":"u","sent_context":{{"page":{{"path":"{path}"}}}}"#)
}

fn small(dir: &Path, values_max: usize) -> Settings {
    let mut settings = Settings { block_rows: 200, ..Settings::new(dir.join("store.db")) };
    settings.limits.values_max = values_max;
    settings
}

#[test]
fn of_too_many_values_each_is_a_row_wholly_or_not_at_all_whoever_counts() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(small(dir.path(), 60)).unwrap();
        let mut random = fastrand::Rng::with_seed(1);
        let mut truth = BTreeMap::<String, u64>::new();
        for block in 0..40 {
            let batch: Vec<Event> = (0..200)
                .map(|n| {
                    let path = format!("/{}", random.u32(..100));
                    *truth.entry(path.clone()).or_default() += 1;
                    page(&format!("{block} {n}"), BASE_MS + block * 1_000 + n, &at(&path))
                })
                .collect();
            store.append(&batch).await.unwrap();
        }
        store.seal().await.unwrap();
        for _ in 0..10 {
            let found = store.breakdown(&all(""), &Field::Page, 1_000).await.unwrap();
            assert_eq!(found.rows.len(), 60);
            for row in &found.rows {
                assert_eq!(Some(&row.events), row.value.as_ref().and_then(|path| truth.get(path)), "{row:?}");
            }
            let rest = found.others.map(|others| others.events);
            assert_eq!(rest, Some(8_000 - found.rows.iter().map(|row| row.events).sum::<u64>()));
            let sessions = store.sessions_by(&all(""), &Field::Page, 1_000).await.unwrap();
            let entered: u64 = sessions.rows.iter().map(|row| row.sums.sessions).sum();
            assert_eq!(entered + sessions.others.map_or(0, |others| others.sums.sessions), 1);
        }
        store.close().await;
    });
}

#[test]
fn all_that_is_known_of_a_page_is_in_its_row_or_with_the_others() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(small(dir.path(), 5)).unwrap();
        let seen = |n: i64| {
            let more = format!(r#"{},"properties":{{"time_on_page":{n}}}"#, at(&format!("/{n}")));
            page(&n.to_string(), BASE_MS + n * 1_000, &more)
        };
        // Of the hours before, which are looked at for the sake of their sessions.
        let before = |n: i64| {
            page(
                &format!("before {n}"),
                BASE_MS - 3_600_000 + n,
                &at(&format!("/before/{n}")).replace("\"u\"", "\"v\""),
            )
        };
        store.append(&(1..=20).map(before).collect::<Vec<_>>()).await.unwrap();
        store.append(&(1..=20).map(seen).collect::<Vec<_>>()).await.unwrap();
        let found = store.pages(&all("").over(BASE_MS..i64::MAX), 100).await.unwrap();
        for row in &found.rows {
            let n: u64 =
                row.page.as_ref().and_then(|path| path[1..].parse().ok()).expect("no row is of no page");
            assert_eq!((row.views, row.timed, row.time_ms), (1, 1, n * 1_000), "{row:?}");
            assert_eq!((row.entered.sessions, row.exits), (u64::from(n == 1), u64::from(n == 20)));
        }
        let others = found.others.unwrap();
        assert_eq!((found.rows.len(), others.views, others.timed, others.exits), (5, 15, 15, 1));
        assert_eq!(others.time_ms, (6..=20).sum::<u64>() * 1_000);
        store.close().await;
    });
}

#[test]
fn what_goes_on_is_found_by_one_look_at_what_is_of_the_hour() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings::new(dir.path().join("store.db"))).unwrap();
        let oracle = Oracle::with_keys(store.shared.keys);
        let mut random = fastrand::Rng::with_seed(3);
        let mut event = |id: i64| {
            let before_ms = if id % 2 == 0 { random.i64(0..130) * 30_000 } else { random.i64(0..4_000_000) };
            let more = format!(r#","user_id":"u{}""#, random.u8(..40));
            page(&id.to_string(), BASE_MS - before_ms, &more)
        };
        for batch in 0..4 {
            let events: Vec<Event> = (0..300).map(|n| event(batch * 300 + n)).collect();
            store.append(&events).await.unwrap();
            oracle.append(&events).await.unwrap();
            if batch == 1 {
                store.seal().await.unwrap();
            }
            for now_ms in [BASE_MS, BASE_MS + 1, BASE_MS - 60_000, i64::MAX, i64::MIN] {
                let (found, want) =
                    (store.realtime(&all(""), now_ms).await, oracle.realtime(&all(""), now_ms).await);
                assert_eq!(found, want, "{now_ms}");
            }
        }
        // A table is put in order once, and asked of the range that it has.
        let orders = || store.shared.door.read().tables().map(|(_, table)| table.order()).collect::<Vec<_>>();
        let before = orders();
        store.summary(&all("")).await.unwrap();
        assert!(orders().iter().zip(&before).all(|(one, other)| std::sync::Arc::ptr_eq(one, other)));
        store.close().await;
    });
}

#[test]
fn visitors_are_estimated_where_all_buckets_have_more_than_are_told_apart_and_not_before() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::new(dir.path().join("store.db"));
        settings.limits.exact_max = 4_000;
        let store = SqliteStore::open(settings).unwrap();
        let user = |id: i64, hour: i64| {
            page(&id.to_string(), BASE_MS + hour * 3_600_000, &format!(r#","user_id":"u{id}""#))
        };
        store.append(&(0..3_900).map(|id| user(id, 0)).collect::<Vec<_>>()).await.unwrap();
        let range = BASE_MS..BASE_MS + 48 * 3_600_000;
        let scope = all("").over(range);
        let counts = async || store.counts(&scope, Bucket::Hour, "UTC").await.unwrap();
        let first = counts().await[0].visitors;
        assert_eq!((first.n, first.estimated), (3_900, false), "of 48 hours one has nearly all");
        store.append(&(3_900..4_200).map(|id| user(id, 5)).collect::<Vec<_>>()).await.unwrap();
        let found = counts().await;
        assert!(found[0].visitors.estimated && found[0].visitors.n.abs_diff(3_900) < 120, "{found:?}");
        assert_eq!((found[5].visitors.n, found[5].visitors.estimated), (300, false), "a small one is exact");
        store.close().await;
    });
}

#[test]
fn questions_that_wait_are_few_and_their_time_runs_while_they_wait() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            readers: 1,
            deadline: Duration::from_millis(400),
            ..Settings::new(dir.path().join("store.db"))
        };
        let store = SqliteStore::open(settings).unwrap();
        store.append(&[page("1", BASE_MS, "")]).await.unwrap();
        let turn = store.shared.turns.clone().acquire_owned().await.unwrap();
        let asked: Vec<_> = (0..WAITING_MAX + 10)
            .map(|_| {
                let store = store.clone();
                tokio::spawn(async move { store.summary(&all("")).await })
            })
            .collect();
        let mut why = BTreeMap::<String, usize>::new();
        for one in asked {
            *why.entry(one.await.unwrap().unwrap_err().to_string()).or_default() += 1;
        }
        let count = |text: &str| {
            why.iter().filter(|(why, _)| why.contains(text)).map(|(_, count)| *count).sum::<usize>()
        };
        assert_eq!((count("questions wait"), count("did not come in time")), (10, WAITING_MAX), "{why:?}");
        drop(turn);
        assert_eq!(store.summary(&all("")).await.unwrap().events, 1);
        store.close().await;
    });
}

/// More than are kept apart, so that they are put together on the way.
#[test]
fn owners_are_those_of_the_moment_that_is_asked() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings::new(dir.path().join("store.db"))).unwrap();
        let visitors = async || store.summary(&all("")).await.unwrap().visitors.n;
        let both =
            |n: i64| page(&format!("b {n}"), BASE_MS, &format!(r#","user_id":"u{n}","anonymous_id":"d{n}""#));
        let device =
            |id: &str, n: i64| page(&format!("{id} {n}"), BASE_MS - 5, &format!(r#","anonymous_id":"d{n}""#));
        for turn in 0..5 {
            let ids = turn * 1_000..turn * 1_000 + 1_000;
            let events = ids.clone().map(both).chain(ids.map(|n| device("a", n)));
            store.append(&events.collect::<Vec<_>>()).await.unwrap();
            assert_eq!(visitors().await, (turn as u64 + 1) * 1_000, "a device is its user's");
        }
        let deleted = store.erase(&TenantScope::tenant(""), &Subject::User("u5".into())).await.unwrap();
        assert_eq!((deleted.events, visitors().await), (2, 4_999));
        // It is nobody's now.
        store.append(&[device("later", 5), page("again", BASE_MS, r#","user_id":"u5""#)]).await.unwrap();
        assert_eq!(visitors().await, 5_001);
        store.close().await;
    });
}

#[test]
fn a_file_with_large_lines_is_taken_in_by_parts() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { hot_bytes_max: 1 << 20, ..Settings::new(dir.path().join("store.db")) };
        let store = SqliteStore::open(settings).unwrap();
        let large = "x".repeat(3 << 20);
        let lines: Vec<u8> = (0..9)
            .flat_map(|id| {
                let more = format!(r#","user_id":"u","properties":{{"text":"{large}{id}"}}"#);
                let mut line = page(&id.to_string(), BASE_MS, &more).to_json();
                line.push(b'\n');
                line
            })
            .collect();
        let report = store.import(std::io::Cursor::new(lines)).await.unwrap();
        assert_eq!((report.new, report.damaged), (9, 0));
        let batches: i64 = store
            .write(|writer| {
                Ok(writer.connection.query_row("SELECT max(n) FROM seen", [], |row| row.get(0))?)
            })
            .await
            .unwrap();
        assert_eq!(batches, 3, "three lines are enough for one");
        store.close().await;
    });
}

#[test]
fn names_in_buckets_are_no_more_than_rows_of_an_answer() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings::new(dir.path().join("store.db"))).unwrap();
        let named = |n: i64| {
            let json = format!(
                r#"{{"id":"{n}","kind":"track","name":"n{n}","time_ms":{BASE_MS},"accepted_ms":{BASE_MS}}}"#
            );
            Event::from_json(json.as_bytes()).unwrap()
        };
        store.append(&(0..10_000).map(named).collect::<Vec<_>>()).await.unwrap();
        let scope = all("").over(BASE_MS..BASE_MS + 1);
        assert_eq!(store.series_by_name(&scope, Bucket::All, "UTC").await.unwrap().len(), 10_000);
        store.append(&[named(10_000)]).await.unwrap();
        let found = store.series_by_name(&scope, Bucket::All, "UTC").await;
        assert!(matches!(found, Err(StoreError::TooExpensive(_))), "{:?}", found.map(|rows| rows.len()));
        store.close().await;
    });
}
