//! What is remembered of blocks.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::{
    Limits,
    scan::{
        chunk::Chunk,
        seam::{Both, Fold, Scan, Seen, Wants},
    },
};

const HOUR_MS: i64 = 60 * MINUTE_MS;

fn site() -> TenantScope {
    TenantScope::tenant("")
}

/// Asks twice: the second time it is known what the first has found out.
async fn compare_sums(store: &SqliteStore, oracle: &Oracle, seed: u64) {
    let wide = Scope::new(site(), minutes(-4_000..9_000));
    let part = wide.over(minutes(300..3_000));
    for scope in [wide.clone(), part, Scope { include_bots: true, ..wide }] {
        for time in ["first", "second"] {
            let [ours, theirs]: [&dyn Store; 2] = [store, oracle];
            assert_eq!(ours.summary(&scope).await, theirs.summary(&scope).await, "{time} {seed} {scope:#?}");
            let by_day = async |store: &dyn Store| store.series(&scope, Bucket::Day, "Europe/Berlin").await;
            assert_eq!(by_day(ours).await, by_day(theirs).await, "{time} {seed} {scope:#?}");
        }
    }
}

/// A visit that may go on: most are of a few minutes, some of days, some events are machines'.
fn event(random: &mut fastrand::Rng, id: usize) -> Event {
    let session = random.i64(0..60);
    let within = if session % 15 == 0 { 40 * 60 } else { 50 };
    let time_ms = BASE_MS + (session * 97 % 4_000 + random.i64(0..within)) * MINUTE_MS;
    let kind = ["page", "track", "page", "screen", "group"][random.usize(0..5)];
    // Every fourth has none of its own, and goes by gaps.
    let of = if session % 4 == 0 { String::new() } else { format!(r#","session_id":"s{session}""#) };
    let bot = if random.u8(0..30) == 0 { r#","enriched":{"v":1,"agent":{"bot":"declared"}}"# } else { "" };
    let json = format!(
        r#"{{"id":"m{id}","kind":"{kind}","name":"n","group_id":"g","anonymous_id":"d{session}"{of},"time_ms":{time_ms},"accepted_ms":{time_ms}{bot}}}"#
    );
    Event::from_json(json.as_bytes()).unwrap()
}

/// Sessions that were of one block alone go on in others, in memory, late and early; who is
/// erased is in no block any more; blocks become others.
#[test]
fn what_is_remembered_of_blocks_holds_whatever_comes() {
    let mut found = 0;
    for seed in 0..24 {
        // With few at once there are several passes, in which nothing is remembered.
        let limits = Limits { sessions_at_once: if seed % 4 == 3 { 9 } else { 1_000 }, ..Limits::default() };
        found += runtime().block_on(holds_whatever_comes(seed, limits));
    }
    assert!(found > 500, "it was of use: {found}");
}

async fn holds_whatever_comes(seed: u64, limits: Limits) -> usize {
    let mut random = fastrand::Rng::with_seed(seed);
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(Settings { block_rows: 15, limits, ..settings(dir.path()) }).unwrap();
    let oracle = Oracle::with_keys(store.shared.keys);
    let (mut id, mut found) = (0, 0);
    for _ in 0..8 {
        let events: Vec<Event> = (0..random.usize(1..60)).map(|n| event(&mut random, id + n)).collect();
        id += events.len();
        assert_eq!(store.append(&events).await, oracle.append(&events).await);
        match random.u8(0..8) {
            0 => {
                let who = Subject::Anonymous(format!("d{}", random.i64(0..60)));
                store.erase(&site(), &who).await.unwrap();
                oracle.erase(&site(), &who).await.unwrap();
            }
            1 => {
                let from_ms = BASE_MS + random.i64(0..600) * MINUTE_MS;
                store.retain(&site(), from_ms).await.unwrap();
                oracle.retain(&site(), from_ms).await.unwrap();
            }
            2 => drop(store.tidy(i64::MAX).await.unwrap()),
            3..6 => store.seal().await.unwrap(),
            _ => {}
        }
        compare_sums(&store, &oracle, seed).await;
        found += store.shared.memo.found();
    }
    store.close().await;
    found
}

/// Page views of sessions that are of one block each, and of one that goes on.
fn views(block: i64) -> Vec<Event> {
    let view = |n: i64| {
        let session = if n == 0 { -1 } else { block };
        view(&format!("{block} {n}"), session, BASE_MS + block * 1_000_000 + n * 1_000)
    };
    (0..10).map(view).collect()
}

fn view(id: &str, session: i64, time_ms: i64) -> Event {
    let json = format!(
        r#"{{"id":"{id}","kind":"page","user_id":"u","session_id":"s{session}","time_ms":{time_ms},"accepted_ms":{time_ms}}}"#
    );
    Event::from_json(json.as_bytes()).unwrap()
}

/// A store of so many blocks of [`views`].
async fn with_blocks(dir: &Path, blocks: i64) -> SqliteStore {
    let store = SqliteStore::open(Settings { block_rows: 10, ..settings(dir) }).unwrap();
    for block in 0..blocks {
        store.append(&views(block)).await.unwrap();
    }
    store.seal().await.unwrap();
    store
}

/// Rots columns of blocks: how many.
fn rot(dir: &Path, columns: &[u8], of: &str) -> usize {
    let connection = schema::open_writer(&dir.join("store.db")).unwrap();
    let sql = format!("DELETE FROM col WHERE k & 255 = ?1 AND k >> 8 IN (SELECT id FROM block WHERE {of})");
    columns.iter().map(|column| connection.execute(&sql, [column]).unwrap()).sum()
}

#[test]
fn of_what_is_remembered_nothing_is_read_but_who_was_there() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = with_blocks(dir.path(), 8).await;
        let scope = Scope::new(site(), i64::MIN..i64::MAX);
        let found = store.summary(&scope).await.unwrap();
        assert_eq!((found.views, found.sessions.sessions, found.damaged_blocks), (80, 9, 0));
        assert_eq!(rot(dir.path(), &[codec::TIMES, codec::WHAT, codec::SESSIONS], "true"), 24);
        assert_eq!(store.summary(&scope).await.unwrap(), found);
        // Of a part of a block it must be read.
        let part = store.summary(&scope.over(i64::MIN..BASE_MS + 3_000)).await.unwrap();
        assert_eq!((part.views, part.damaged_blocks), (0, 8), "all are as near as a day");
        // What could not be read is in no figure from now on, as it may come again.
        let after = store.summary(&scope).await.unwrap();
        assert_eq!((after.views, after.damaged_blocks), (0, 8));
        store.close().await;
    });
}

/// A session of more than a day, of which other blocks have an hour of their own, days before.
#[test]
fn what_must_be_cut_is_not_counted_among_the_lone_ones_too() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings { block_rows: 10, ..settings(dir.path()) }).unwrap();
        let oracle = Oracle::with_keys(store.shared.keys);
        let append = async |events: &[Event]| {
            assert_eq!(store.append(events).await, oracle.append(events).await);
            store.seal().await.unwrap();
        };
        for day in 0..6 {
            let time_ms = |n: i64| BASE_MS + (day * 48 * 60 + n) * MINUTE_MS;
            let events: Vec<_> = (0..10)
                .map(|n| view(&format!("{day} {n}"), [7, day + 100][n as usize % 2], time_ms(n)))
                .collect();
            append(&events).await;
        }
        compare_sums(&store, &oracle, 0).await;
        let scope = Scope::new(site(), i64::MIN..i64::MAX);
        store.summary(&scope).await.unwrap();
        assert_eq!(store.shared.memo.found(), 6);
        let long: Vec<_> =
            (0..40).map(|n| view(&format!("long {n}"), 7, BASE_MS + 400 * HOUR_MS + n * HOUR_MS)).collect();
        append(&long).await;
        for _ in 0..2 {
            let (ours, theirs) = (store.summary(&scope).await, oracle.summary(&scope).await);
            assert_eq!(ours, theirs);
            assert_eq!(ours.unwrap().sessions.sessions, 6 + 6 + 2);
        }
        store.close().await;
    });
}

/// Else each would be asked about each of the others.
#[test]
fn where_very_many_are_near_nothing_is_remembered() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(Settings { block_rows: 2, ..settings(dir.path()) }).unwrap();
        let scope = Scope::new(site(), i64::MIN..i64::MAX);
        for (range, blocks) in [(0..97, 97), (97..98, 0)] {
            for block in range {
                let two =
                    [0, 1].map(|n| view(&format!("{block} {n}"), block, BASE_MS + block * MINUTE_MS + n));
                store.append(&two).await.unwrap();
            }
            store.seal().await.unwrap();
            store.shared.memo.forget();
            let found = store.summary(&scope).await.unwrap();
            assert_eq!(found.views, found.sessions.sessions * 2);
            assert_eq!(store.shared.memo.found(), blocks);
        }
        store.close().await;
    });
}

/// Forgets everything while it is shown a chunk, and then has something to remember.
struct Forgets(Arc<Memo>);

impl Fold for Forgets {
    fn wants(&self) -> Wants {
        Wants::default()
    }

    fn take(&mut self, chunk: &mut dyn Chunk, _: &Seen<'_>) -> Result<(), StoreError> {
        if chunk.remembers() {
            self.0.forget();
            chunk.remember(&[], 0);
        }
        Ok(())
    }

    fn merge(&mut self, _: Self) -> Result<(), StoreError> {
        Ok(())
    }
}

#[test]
fn what_is_forgotten_is_not_brought_back_by_a_question_that_runs() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = with_blocks(dir.path(), 3).await;
        store.summary(&Scope::new(site(), i64::MIN..i64::MAX)).await.unwrap();
        assert_eq!(store.shared.memo.found(), 3);
        let memo = store.shared.memo.clone();
        let scan = move |snapshot: &mut Snapshot<'_>, _: &Shared| {
            snapshot.scan(&(i64::MIN..i64::MAX), || Forgets(memo.clone())).map(|_| ())
        };
        store.ask(&site(), scan).await.unwrap();
        assert_eq!(store.shared.memo.found(), 0);
        store.close().await;
    });
}

/// Counts rows.
#[derive(Default)]
struct Rows(usize);

impl Fold for Rows {
    fn wants(&self) -> Wants {
        Wants::default()
    }

    fn take(&mut self, chunk: &mut dyn Chunk, _: &Seen<'_>) -> Result<(), StoreError> {
        self.0 += chunk.rows();
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        self.0 += other.0;
        Ok(())
    }
}

/// Cannot read a chunk at some of its looks, which are counted.
#[derive(Clone)]
struct Fails(Arc<AtomicUsize>, fn(usize) -> bool);

impl Fold for Fails {
    fn wants(&self) -> Wants {
        Wants::default()
    }

    fn take(&mut self, _: &mut dyn Chunk, _: &Seen<'_>) -> Result<(), StoreError> {
        match self.1(self.0.fetch_add(1, Ordering::Relaxed)) {
            true => Err(StoreError::Damaged("for a moment".into())),
            false => Ok(()),
        }
    }

    fn merge(&mut self, _: Self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Of two folds one may have taken it in when the other could not read it.
#[test]
fn what_can_be_read_at_a_second_look_is_taken_in_once() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = with_blocks(dir.path(), 3).await;
        let scanned = async |fails: fn(usize) -> bool| {
            let looks = Arc::new(AtomicUsize::new(0));
            let its = Fails(looks.clone(), fails);
            let scan = move |snapshot: &mut Snapshot<'_>, _: &Shared| {
                let new = || Both(Rows::default(), Some(its.clone()));
                let rows = snapshot.scan(&(i64::MIN..i64::MAX), new).map(|Both(rows, _)| rows.0);
                Ok((rows, snapshot.damaged_blocks()))
            };
            let (rows, damaged) = store.ask(&site(), scan).await.unwrap();
            (rows, damaged, looks.load(Ordering::Relaxed))
        };
        assert_eq!(scanned(|_| false).await, (Ok(30), 0, 3));
        assert_eq!(scanned(|look| look == 1).await, (Ok(30), 0, 3 + 1 + 3), "it is begun anew");
        let (rows, _, looks) = scanned(|look| look % 4 == 1).await;
        assert!(matches!(rows, Err(StoreError::Unavailable(_))), "not for ever: {rows:?}, {looks}");
        store.close().await;
    });
}
