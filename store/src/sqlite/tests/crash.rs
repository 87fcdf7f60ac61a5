//! Kills, cut power, full disks, damage: nothing acknowledged is lost, nothing is there
//! twice, and the store opens by itself.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    process::{Command, Stdio},
};

use super::*;
use crate::Count;

/// Where the child finds its store.
const DIR: &str = "STORE_CRASH_DIR";

fn events(n: usize) -> Vec<Event> {
    various(n, 9)
}

fn all() -> Scope {
    Scope { include_bots: true, ..Scope::new(TenantScope::tenant(""), i64::MIN..i64::MAX) }
}

async fn count(store: &SqliteStore) -> u64 {
    store.counts(&all(), Bucket::All, "UTC").await.unwrap()[0].events
}

async fn oracle_of(store: &SqliteStore, events: &[Event]) -> Oracle {
    let oracle = Oracle::with_keys(store.shared.keys);
    oracle.append(events).await.unwrap();
    oracle
}

async fn exported(path: &Path) -> Vec<Event> {
    let mut lines = Vec::new();
    export(path, &Wanted::default(), &mut lines).unwrap();
    lines
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty() && !line.starts_with(br#"{"v":"#))
        .map(|line| Event::from_json(line).unwrap())
        .collect()
}

/// What a killed process runs: appends, some batches twice, and says what was acknowledged.
#[test]
#[ignore = "is run by another test, to be killed"]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    runtime().block_on(async {
        let store = SqliteStore::open(settings(Path::new(&dir))).unwrap();
        let events = events(4_000);
        let present = count(&store).await as usize;
        // Overlaps with what is there, as a retry does.
        for (turn, batch) in events[present.saturating_sub(20)..].chunks(7).enumerate() {
            for _ in 0..=u8::from(turn % 10 == 0) {
                // The machine may be busy, and blocks be made more slowly than events come.
                while let Err(error) = store.append(batch).await {
                    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            if turn % 90 == 89 {
                store.tidy(i64::MAX).await.unwrap();
            }
            let ids: Vec<_> = batch.iter().map(|event| event.id().as_str().to_owned()).collect();
            println!("\nacknowledged {}", ids.join(","));
            std::io::stdout().flush().unwrap();
        }
        store.close().await;
    });
}

/// `RELAY_STORE_CASES` times as many kills by other numbers of `RELAY_SEED`.
#[test]
fn killed_at_any_moment_it_has_all_that_was_acknowledged_once() {
    let seed: u64 = std::env::var("RELAY_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    println!("RELAY_SEED={seed} RELAY_STORE_CASES={}", times());
    let (mut random, events) = (fastrand::Rng::with_seed(seed), events(4_000));
    for _ in 0..times() {
        killed_eight_times(&events, &mut random);
    }
}

fn killed_eight_times(events: &[Event], random: &mut fastrand::Rng) {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = BTreeSet::new();
    for kill in 0..8 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sqlite::tests::crash::child", "--ignored", "--nocapture", "--test-threads=1"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let take = |line: String, acknowledged: &mut BTreeSet<String>| {
            let ids = line.strip_prefix("acknowledged ").map(str::to_owned);
            let is_one = ids.is_some();
            acknowledged.extend(
                ids.into_iter().flat_map(|ids| ids.split(',').map(str::to_owned).collect::<Vec<_>>()),
            );
            is_one
        };
        let wanted = random.usize(1..60);
        lines.by_ref().filter(|line| take(line.clone(), &mut acknowledged)).take(wanted).for_each(drop);
        std::thread::sleep(Duration::from_micros(random.u64(..3_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        // What it had said before it was killed.
        lines.for_each(|line| {
            take(line, &mut acknowledged);
        });
        runtime().block_on(async {
            let store = SqliteStore::open(settings(dir.path())).unwrap();
            assert_eq!(store.set_aside(), None, "kill {kill}");
            let there = exported(&dir.path().join("store.db")).await;
            let ids: BTreeSet<String> = there.iter().map(|event| event.id().as_str().to_owned()).collect();
            assert_eq!(ids.len(), there.len(), "nothing is there twice");
            assert!(acknowledged.is_subset(&ids), "nothing is lost");
            let known: Vec<Event> =
                events.iter().filter(|event| ids.contains(event.id().as_str())).cloned().collect();
            assert_eq!(known.len(), ids.len());
            let oracle = oracle_of(&store, &known).await;
            compare(&store, &oracle, &scopes(0, 600)[1]).await;
            store.close().await;
        });
    }
    assert!(acknowledged.len() > 100, "the kills came too early to say anything: {}", acknowledged.len());
}

/// A log that was cut anywhere, as by a power cut before it was synced: the batches up to
/// some point, whole, with what they tell.
#[test]
fn a_torn_log_leaves_whole_batches_and_their_facts() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { block_rows: 1_000, hot_rows_max: 4_000, ..settings(dir.path()) };
        let store = SqliteStore::open(settings).unwrap();
        let events = events(60);
        for batch in events.chunks(6) {
            store.append(batch).await.unwrap();
        }
        let (db, wal) = (dir.path().join("store.db"), dir.path().join("store.db-wal"));
        let bytes = fs::metadata(&wal).unwrap().len();
        let mut random = fastrand::Rng::with_seed(5);
        let mut seen = BTreeSet::new();
        for turn in 0..40 {
            let torn = tempfile::tempdir().unwrap();
            fs::copy(&db, torn.path().join("store.db")).unwrap();
            fs::copy(&wal, torn.path().join("store.db-wal")).unwrap();
            let log = fs::File::options().write(true).open(torn.path().join("store.db-wal")).unwrap();
            let cut = random.u64(bytes / 4..=bytes);
            if turn % 2 == 0 {
                log.set_len(cut).unwrap()
            } else {
                log.write_all_at(&[7; 64], cut).unwrap()
            }
            let store = SqliteStore::open(super::settings(torn.path())).unwrap();
            assert_eq!(store.set_aside(), None);
            let there = exported(&torn.path().join("store.db")).await.len();
            assert_eq!(there % 6, 0, "a batch is there as a whole or not");
            seen.insert(there);
            let oracle = oracle_of(&store, &events[..there]).await;
            compare(&store, &oracle, &scopes(0, 600)[1]).await;
            // And it goes on from there.
            store.append(&events).await.unwrap();
            assert_eq!(exported(&torn.path().join("store.db")).await.len(), 60);
            store.close().await;
        }
        assert!(seen.len() > 3, "the cuts fell on one place: {seen:?}");
        store.close().await;
    });
}

/// A disk without room: an error, reads go on, and with room again the retry is taken.
#[test]
fn a_full_disk_refuses_and_what_is_sent_again_is_kept_once() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        // A block that could not be written waits, and its events with it.
        let settings = Settings { block_rows: 60, hot_rows_max: 1_000, ..settings(dir.path()) };
        let store = SqliteStore::open(settings).unwrap();
        let (events, mut kept) = (events(600), 0);
        let limit = |pages: u32| {
            let sql = format!("PRAGMA max_page_count={pages}");
            store.write(move |writer| Ok(writer.connection.query_row(&sql, [], |_| Ok(()))?))
        };
        let mut refused = 0;
        for (turn, batch) in events.chunks(6).enumerate() {
            if turn % 10 == 5 {
                limit(1).await.unwrap();
            }
            for attempt in 0.. {
                assert!(attempt < 100);
                match store.append(batch).await {
                    Ok(appended) => {
                        assert_eq!(
                            appended,
                            vec![Appended::New; 6],
                            "a retry is no duplicate of what failed"
                        );
                        break;
                    }
                    Err(StoreError::Unavailable(why)) => {
                        assert!(why.contains("full"), "{why}");
                        refused += 1;
                        assert_eq!(count(&store).await, kept, "reads go on");
                        limit(1 << 20).await.unwrap();
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            kept += 6;
        }
        assert!(refused > 2);
        assert_eq!(count(&store).await, 600);
        limit(1 << 20).await.unwrap();
        store.seal().await.unwrap();
        assert_eq!(count(&store).await, 600);
        store.close().await;
        assert!(check(&dir.path().join("store.db"), |_| ()).unwrap().is_whole());
    });
}

/// Sealed, so that all is in blocks; and the places of two bytes of one column of each.
async fn in_blocks(dir: &Path) -> (SqliteStore, Vec<Event>) {
    let store = SqliteStore::open(settings(dir)).unwrap();
    let events = events(120);
    for batch in events.chunks(10) {
        store.append(batch).await.unwrap();
    }
    store.seal().await.unwrap();
    (store, events)
}

#[test]
fn a_damaged_block_costs_itself_and_is_counted() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let (store, events) = in_blocks(dir.path()).await;
        let (block, rows): (i64, i64) = store
            .write(|writer| {
                let sql = "SELECT id, rows FROM block ORDER BY id DESC LIMIT 1";
                let block: (i64, i64) =
                    writer.connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
                let damage = "UPDATE col SET data = zeroblob(length(data)) WHERE k >> 8 = ?1";
                writer.connection.execute(damage, [block.0])?;
                Ok(block)
            })
            .await
            .unwrap();
        let summary = store.summary(&all()).await.unwrap();
        assert_eq!((summary.events, summary.damaged_blocks), (120 - rows as u64, 1));
        let breakdown = store.breakdown(&all(), &Field::Name, 100).await.unwrap();
        assert_eq!(breakdown.rows.iter().map(|row| row.events).sum::<u64>(), 120 - rows as u64);
        assert_eq!(breakdown.damaged_blocks, 1);
        assert_eq!(store.recent(&all(), None, 1_000).await.unwrap().len(), 120 - rows as usize);
        assert!(store.stats().await.unwrap().damaged_reads >= 2);
        let report = check(&dir.path().join("store.db"), |_| ()).unwrap();
        assert_eq!((report.damaged_blocks, report.events), (vec![block], 120 - rows as u64));
        // Appending, erasing and tidying go on.
        assert_eq!(store.append(&events[..3]).await.unwrap(), vec![Appended::Duplicate; 3]);
        store.erase(&TenantScope::tenant(""), &Subject::User("u1".into())).await.unwrap();
        store.tidy(i64::MAX).await.unwrap();
        store.close().await;
    });
}

#[test]
fn a_damaged_batch_that_is_no_block_yet_costs_itself() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { block_rows: 1_000, hot_rows_max: 4_000, ..settings(dir.path()) };
        let store = SqliteStore::open(settings.clone()).unwrap();
        let events = events(40);
        store.append(&events[..20]).await.unwrap();
        store.append(&events[20..]).await.unwrap();
        let damage = "UPDATE hot SET events = zeroblob(30) WHERE n = (SELECT min(n) FROM hot)";
        store.write(|writer| Ok(writer.connection.execute(damage, [])?)).await.unwrap();
        store.close().await;
        let store = SqliteStore::open(settings).unwrap();
        assert_eq!(store.set_aside(), None);
        assert_eq!(count(&store).await, 20);
        assert_eq!(store.stats().await.unwrap().damaged_batches, 6, "two of each of its sites");
        store.close().await;
        assert_eq!(check(&dir.path().join("store.db"), |_| ()).unwrap().damaged_batches.len(), 6);
    });
}

/// Whatever is written over a file: it opens, or what was there is set aside, and it works.
#[test]
fn a_damaged_file_is_set_aside_and_never_a_loop_of_crashes() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let (store, events) = in_blocks(dir.path()).await;
        store.close().await;
        let whole = fs::read(dir.path().join("store.db")).unwrap();
        let mut random = fastrand::Rng::with_seed(2);
        let mut aside = 0;
        for turn in 0..25 {
            let damaged = tempfile::tempdir().unwrap();
            let path = damaged.path().join("store.db");
            let mut bytes = whole.clone();
            match turn {
                0 => bytes.fill(0x55),
                1 => bytes.truncate(10_000),
                2 => bytes = b"not a store".to_vec(),
                _ => {
                    for _ in 0..random.usize(1..200) {
                        let at = random.usize(..bytes.len() - 64);
                        random.fill(&mut bytes[at..at + 64]);
                    }
                }
            }
            fs::write(&path, &bytes).unwrap();
            let store = SqliteStore::open(super::settings(damaged.path())).unwrap();
            if let Some(moved) = store.set_aside() {
                assert_eq!(fs::read(moved).unwrap().len(), bytes.len(), "what was there is kept");
                aside += 1;
                store.append(&events).await.unwrap();
                assert_eq!(count(&store).await, 120);
            }
            // Else it may be damaged where only a question finds it: then an error, no panic.
            drop(store.summary(&all()).await);
            drop(store.pages(&all(), 10).await);
            drop(store.append(&events).await);
            store.close().await;
        }
        assert!(aside >= 3, "{aside}");
    });
}

#[test]
fn a_newer_relays_file_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.db");
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch("PRAGMA user_version=99; CREATE TABLE x(y);").unwrap();
    let error = SqliteStore::open(settings(dir.path())).unwrap_err();
    assert!(error.to_string().contains("got 99, want at most 2"), "{error}");
    assert!(path.exists());
}

#[test]
fn two_processes_do_not_write_to_one_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(settings(dir.path())).unwrap();
    let error = SqliteStore::open(settings(dir.path())).unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    runtime().block_on(store.close());
    SqliteStore::open(settings(dir.path())).unwrap();
}

#[test]
fn what_is_asked_of_a_closed_store_is_an_error() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        store.close().await;
        assert_eq!(store.append(&events(1)).await, Err(StoreError::Closed));
        assert_eq!(store.summary(&all()).await, Err(StoreError::Closed));
    });
}

/// The connection that is closed last cuts the log: also one that was asking meanwhile.
#[test]
fn who_asks_while_it_is_closed_leaves_no_log() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        store.append(&events(3)).await.unwrap();
        let (begins, begun) = oneshot::channel();
        let asks = store.clone();
        let asking = tokio::spawn(async move {
            let ask = move |_: &Shared, _: &mut Readers| {
                begins.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(300));
                Ok(())
            };
            asks.read(None, ask).await
        });
        begun.await.unwrap();
        assert!(dir.path().join("store.db-wal").exists());
        store.close().await;
        asking.await.unwrap().unwrap();
        assert!(!dir.path().join("store.db-wal").exists(), "it was not closed");
    });
}

#[test]
fn a_write_that_panics_costs_itself() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        store.append(&events(10)).await.unwrap();
        let panicked: Result<(), _> = store
            .write(|writer| {
                writer.connection.execute_batch("BEGIN; DELETE FROM hot").unwrap();
                panic!("on purpose");
            })
            .await;
        assert!(matches!(panicked, Err(StoreError::Unavailable(_))));
        assert_eq!(store.append(&events(11)).await.unwrap().last(), Some(&Appended::New));
        assert_eq!(count(&store).await, 11);
        assert_eq!(store.summary(&all()).await.unwrap().visitors, {
            let oracle = oracle_of(&store, &events(11)).await;
            oracle.summary(&all()).await.unwrap().visitors
        });
        assert_ne!(store.summary(&all()).await.unwrap().visitors, Count::exact(0));
        store.close().await;
    });
}
