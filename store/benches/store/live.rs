//! Questions while events come in: a dashboard in a loop, on all cores.

use std::time::Duration;

use analytics_relay_store::{
    Scope, Store, TenantScope,
    sqlite::{Settings, SqliteStore},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::{
    Bench,
    process::processor,
    remove,
    source::{DAY_MS, END_MS, Source},
};

const EVENTS_PER_S: u64 = 2_000;
const BATCH: u64 = 100;
/// What 99 of 100 dashboards are to stay below.
const WANTED: Duration = Duration::from_millis(150);

/// For `STORE_BENCH_SECONDS`, a minute without it. On a copy: the store stays as it was.
pub(crate) async fn run(bench: &Bench) {
    let seconds = std::env::var("STORE_BENCH_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let path = bench.file("-live.db");
    remove(&path);
    std::fs::copy(bench.store(), &path).unwrap();
    // Else the first appends wait for the disk to take the copy.
    std::fs::File::open(&path).unwrap().sync_all().unwrap();
    let store = SqliteStore::open(Settings::new(&path)).unwrap();
    let (start, before) = (Instant::now(), processor());
    let until = start + Duration::from_secs(seconds);
    let appending = tokio::spawn(append(store.clone(), bench.events(), start, until));
    let asked = ask(&store, until).await;
    let appended = appending.await.unwrap();
    let cores = (processor() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    let events = appended.len() as u64 * BATCH;
    println!("{events} events came in within {:.1?}; {cores:.2} cores", start.elapsed());
    let p99 = print("dashboard + previous, 30 d", asked);
    print("append of a batch, from when it was due", appended);
    println!("p99 of the dashboard: {p99:.1?}, wanted: at most {WANTED:.1?}");
    println!("{:?}", store.stats().await.unwrap());
    store.close().await;
    remove(&path);
}

/// Appends at a rate, whatever the store takes for it: how long each batch took from when it
/// was due.
async fn append(store: SqliteStore, events: u64, start: Instant, until: Instant) -> Vec<Duration> {
    // Made up beside, and not between.
    let (made, mut batches) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut source = Source::going_on(events, EVENTS_PER_S);
        while made.blocking_send(source.batches(1, BATCH as usize).remove(0)).is_ok() {}
    });
    let interval = Duration::from_secs(1) * BATCH as u32 / EVENTS_PER_S as u32;
    let (mut due, mut took) = (start, Vec::new());
    while due < until {
        sleep_until(due).await;
        let batch = batches.recv().await.unwrap();
        while store.append(&batch).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        took.push(due.elapsed());
        due += interval;
    }
    took
}

/// One after another, of the days up to the newest event.
async fn ask(store: &SqliteStore, until: Instant) -> Vec<Duration> {
    let of = TenantScope::source("", "site-0");
    let mut took = Vec::new();
    while Instant::now() < until {
        let now_ms = store.as_of(&of).await.unwrap().last_ms.unwrap_or(END_MS);
        let days = |from: i64, to: i64| Scope::new(of.clone(), now_ms - from * DAY_MS..now_ms - to * DAY_MS);
        let start = Instant::now();
        store.summary(&days(30, 0)).await.unwrap();
        store.summary(&days(60, 30)).await.unwrap();
        took.push(start.elapsed());
    }
    took
}

/// Says how long 50, 99 and all of 100 took at most, and gives the second.
fn print(name: &str, mut took: Vec<Duration>) -> Duration {
    took.sort();
    let at = |of_hundred: usize| took[(took.len() * of_hundred / 100).min(took.len() - 1)];
    let (n, p99) = (took.len(), at(99));
    println!("{name:40} {n:6} times: p50 {:.1?}, p99 {p99:.1?}, max {:.1?}", at(50), at(100));
    p99
}
