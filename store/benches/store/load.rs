//! What appending costs.

use std::time::{Duration, Instant};

use analytics_relay_store::{
    Store,
    sqlite::{Settings, SqliteStore},
};
use serde_json::{Value, json};

use crate::{
    Bench,
    process::{peak_mb, processor},
    source::Source,
};

/// Events that are made up at once, outside of what is measured.
const AT_ONCE: usize = 20_000;

/// Makes the store: four events of five in batches of 1,000, the others of 100. What it cost
/// is written beside it.
pub(crate) async fn all(bench: &Bench) {
    let store = SqliteStore::open(Settings::new(bench.store())).unwrap();
    let mut source = Source::new(bench.events());
    let mut appended = Vec::new();
    for (batch, of_ten) in [(1_000, 8), (100, 2)] {
        appended.push(load(&store, &mut source, bench.events() * of_ten / 10, batch).await);
    }
    let peak_mb = peak_mb();
    println!("peak while loading: {peak_mb} MB");
    let events = store.stats().await.unwrap().events;
    store.close().await;
    let bytes = std::fs::metadata(bench.store()).unwrap().len() as f64 / events as f64;
    println!("{bytes:.1} bytes an event");
    let loaded = json!({"append": appended, "load_peak_mb": peak_mb, "bytes_an_event": bytes});
    std::fs::write(bench.file(".loaded.json"), loaded.to_string()).unwrap();
}

async fn load(store: &SqliteStore, source: &mut Source, events: u64, batch: usize) -> Value {
    let (mut processor_in, mut wall, mut slowest) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let mut done = 0;
    while done < events {
        let batches = source.batches(AT_ONCE / batch, batch);
        let (before, start) = (processor(), Instant::now());
        for batch in &batches {
            let one = Instant::now();
            while store.append(batch).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            slowest = slowest.max(one.elapsed());
        }
        wall += start.elapsed();
        processor_in += processor() - before;
        done += AT_ONCE as u64;
    }
    let (before, start) = (processor(), Instant::now());
    while store.stats().await.unwrap().hot_events > 200_000 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    wall += start.elapsed();
    processor_in += processor() - before;
    let (rate, us) = (done as f64 / wall.as_secs_f64(), processor_in.as_secs_f64() * 1e6 / done as f64);
    println!(
        "append {batch:5} a batch: {rate:8.0} events/s, {us:5.2} µs of processor an event, slowest batch {slowest:.1?}"
    );
    json!({"batch": batch, "events_per_s": rate, "us": us})
}
