//! What the store costs: `cargo bench -p analytics-relay-store -- [million events] [what]`.
//!
//! The data are made up, the same each time: 90 days of 10 websites, of which the first has
//! half of everything and is the one that is asked about; 2,000 pages and 40 countries by
//! Zipf's law, sessions of 1 to 20 views, 5 % custom events, 8 properties. Times are of this
//! process's processor as `/proc` tells them, and of the wall; run it pinned to one core
//! (`taskset -c 0`) for the figures of one.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)]

use std::{
    future::Future,
    time::{Duration, Instant},
};

use analytics_relay_providers::Event;
use analytics_relay_store::{
    Bucket, Field, Filter, Funnel, Order, Scope, Step, Store, Subject, TenantScope, Unit,
    sqlite::{Settings, SqliteStore},
};

const DAY_MS: i64 = 86_400_000;
const START_MS: i64 = 1_780_000_000_000;
const DAYS: i64 = 90;

/// Makes up events in the order of their times.
struct Source {
    random: fastrand::Rng,
    pages: Vec<f64>,
    countries: Vec<f64>,
    /// Sessions that go on: when, and what of them is left.
    open: std::collections::BinaryHeap<std::cmp::Reverse<(i64, u64, Visit)>>,
    n: u64,
    next_visit_ms: f64,
    visit_gap_ms: f64,
    visits: u64,
    visitors: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
struct Visit {
    site: u8,
    left: u8,
    visitor: u64,
    session: u64,
    agent: u8,
    country: u8,
    source: u8,
}

fn zipf(n: usize) -> Vec<f64> {
    let mut sum = 0.0;
    let mut all: Vec<f64> = (1..=n)
        .map(|k| {
            sum += 1.0 / k as f64;
            sum
        })
        .collect();
    all.iter_mut().for_each(|one| *one /= sum);
    all
}

impl Source {
    fn new(events: u64) -> Self {
        let visits = events as f64 / 5.2;
        Self {
            random: fastrand::Rng::with_seed(14),
            pages: zipf(2_000),
            countries: zipf(40),
            open: Default::default(),
            n: 0,
            next_visit_ms: START_MS as f64,
            visit_gap_ms: (DAYS * DAY_MS) as f64 / visits,
            visits: 0,
            visitors: (events / 12).max(1),
        }
    }

    fn event(&mut self) -> Event {
        loop {
            let next = self.open.peek().map(|next| next.0.0);
            if next.is_some_and(|next| (next as f64) < self.next_visit_ms) {
                let std::cmp::Reverse((time_ms, order, mut visit)) = self.open.pop().unwrap();
                let event = self.make(time_ms, visit);
                visit.left -= 1;
                if visit.left > 0 {
                    let later = time_ms + self.random.i64(2_000..240_000);
                    self.open.push(std::cmp::Reverse((later, order, visit)));
                }
                return event;
            }
            self.visits += 1;
            let visitor = self.random.u64(0..self.visitors);
            let visit = Visit {
                site: if self.random.bool() { 0 } else { self.random.u8(1..10) },
                left: if self.random.f64() < 0.4 { 1 } else { self.random.u8(2..15) },
                visitor,
                session: self.random.u64(..),
                agent: (visitor % 17) as u8,
                country: self.rank(false) as u8,
                source: self.random.u8(0..12),
            };
            let at = self.next_visit_ms as i64;
            self.open.push(std::cmp::Reverse((at, self.visits, visit)));
            self.next_visit_ms += self.visit_gap_ms * 2.0 * self.random.f64();
        }
    }

    fn rank(&mut self, page: bool) -> usize {
        let at = self.random.f64();
        (if page { &self.pages } else { &self.countries }).partition_point(|one| *one < at)
    }

    fn make(&mut self, time_ms: i64, visit: Visit) -> Event {
        self.n += 1;
        let is_custom = self.random.f64() < 0.05;
        let page = self.rank(true);
        let kind = if is_custom {
            let names = ["signup", "add_to_cart", "checkout", "download", "share"];
            format!(r#""track","name":"{}""#, names[self.random.usize(..5)])
        } else {
            r#""page""#.to_owned()
        };
        let accepted_ms = time_ms + self.random.i64(5..900);
        let (high, low) = (self.random.u64(..), self.random.u64(..));
        let id = format!(
            "{:08x}-{:04x}-7{:03x}-8{:03x}-{:012x}",
            time_ms >> 16,
            time_ms & 0xFFFF,
            high & 0xFFF,
            low & 0xFFF,
            low >> 16
        );
        let mix = |n: u64| (n ^ 0x5bd1_e995).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let uuid = |n: u64| {
            format!(
                "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
                mix(n) >> 32,
                mix(n) & 0xFFFF,
                mix(n + 1) & 0xFFF,
                mix(n + 2) & 0xFFF,
                mix(n + 3) >> 16
            )
        };
        let (visitor, session) = (uuid(visit.visitor), uuid(visit.session));
        let user = if visit.visitor.is_multiple_of(10) {
            format!(r#","user_id":"user-{}""#, visit.visitor)
        } else {
            String::new()
        };
        let browser = ["Chrome", "Safari", "Firefox", "Edge"][usize::from(visit.agent % 4)];
        let (os, device) =
            [("Windows", "desktop"), ("iOS", "mobile"), ("Android", "mobile"), ("Mac OS X", "desktop")]
                [usize::from(visit.agent / 4 % 4)];
        let country = usize::from(visit.country);
        let code =
            format!("{}{}", char::from(b'A' + (country / 26) as u8), char::from(b'A' + (country % 26) as u8));
        let source = match visit.source {
            0..5 => String::new(),
            n => format!(r#","source":"source-{n}","channel":"Referral""#),
        };
        let properties = format!(
            r#"{{"plan":"{}","price":{},"currency":"EUR","items":{},"logged_in":{},"variant":"{}","query":"term {}","scroll":{}}}"#,
            ["free", "pro", "team"][self.random.usize(..3)],
            self.random.u32(100..9_999),
            self.random.u8(1..9),
            visit.visitor.is_multiple_of(10),
            ["a", "b"][self.random.usize(..2)],
            self.random.u16(..500),
            self.random.u8(..100),
        );
        let json = format!(
            r#"{{"id":"{id}","kind":{kind}{user},"anonymous_id":"{visitor}","time_ms":{time_ms},"accepted_ms":{accepted_ms},"session_id":"{session}","source":"site-{}","enriched":{{"v":1,"data":{{"uap":"2026-03","geo":"1788000000"}},"agent":{{"browser":"{browser}","browser_version":"{}","os":"{os}","device":"{device}"}},"geo":{{"continent":"EU","country":"{code}","region":"{code}-1","city":"City {country}"}},"page":{{"host":"www.example.com","path":"/page/{page}"}}{source}}},"properties":{properties}}}"#,
            visit.site,
            120 + visit.agent % 12
        );
        Event::from_json(json.as_bytes()).unwrap()
    }
}

/// Processor time of this process's threads.
fn processor() -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let of_one = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or_default()
    };
    Duration::from_nanos(threads.map(|thread| of_one(thread.unwrap().path())).sum())
}

fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

async fn load(store: &SqliteStore, source: &mut Source, events: u64, batch: usize) {
    let (mut processor_in, mut wall, mut slowest) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let mut done = 0;
    while done < events {
        // Made up outside of what is measured.
        let batches: Vec<Vec<Event>> =
            (0..20_000 / batch).map(|_| (0..batch).map(|_| source.event()).collect()).collect();
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
        done += 20_000;
    }
    let (before, start) = (processor(), Instant::now());
    while store.stats().await.unwrap().hot_events > 200_000 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    wall += start.elapsed();
    processor_in += processor() - before;
    println!(
        "append {batch:5} a batch: {:8.0} events/s, {:5.2} µs of processor an event, slowest batch {slowest:.1?}",
        done as f64 / wall.as_secs_f64(),
        processor_in.as_secs_f64() * 1e6 / done as f64,
    );
}

async fn measure<T, F: Future<Output = Result<T, analytics_relay_store::StoreError>>>(
    name: &str,
    ask: impl Fn() -> F,
) {
    let cold = Instant::now();
    ask().await.unwrap();
    let cold = cold.elapsed();
    let mut all: Vec<(Duration, Duration)> = Vec::new();
    for _ in 0..5 {
        let (start, before) = (Instant::now(), processor());
        ask().await.unwrap();
        all.push((processor().saturating_sub(before), start.elapsed()));
    }
    all.sort();
    println!(
        "{name:32} {:8.1} ms of processor, {:8.1} ms; first {:8.1} ms; peak {} MB",
        all[2].0.as_secs_f64() * 1e3,
        all[2].1.as_secs_f64() * 1e3,
        cold.as_secs_f64() * 1e3,
        status("VmHWM") / 1024
    );
}

async fn ask(store: &SqliteStore, filter: &str) {
    let end = START_MS + DAYS * DAY_MS;
    let days = |from: i64, to: i64| {
        Scope::new(TenantScope::source("", "site-0"), end - from * DAY_MS..end - to * DAY_MS)
    };
    let (week, month, before, all) = (days(7, 0), days(30, 0), days(60, 30), days(90, 0));
    macro_rules! measure {
        ($name:literal, $ask:expr) => {
            if $name.contains(filter) {
                measure($name, || async { $ask.await }).await;
            }
        };
    }
    measure!("by hour, 7 d", store.counts(&week, Bucket::Hour, "Europe/Berlin"));
    measure!("by day, 90 d", store.counts(&all, Bucket::Day, "Europe/Berlin"));
    measure!("uniques, 30 d", store.counts(&month, Bucket::All, "UTC"));
    measure!("names by week, 90 d", store.series_by_name(&all, Bucket::Week, "UTC"));
    measure!("dashboard + previous, 30 d", async {
        store.summary(&month).await?;
        store.summary(&before).await
    });
    measure!("series by day, 30 d", store.series(&month, Bucket::Day, "Europe/Berlin"));
    measure!("top pages, visitors", store.breakdown(&month, &Field::Page, 10));
    measure!("pages, with stays", store.pages(&month, 10));
    measure!("top sources", store.sessions_by(&month, &Field::Source, 10));
    measure!("top countries", store.breakdown(&month, &Field::Country, 10));
    let filtered =
        month.clone().with(Filter::is(Field::Country, "AA")).with(Filter::is(Field::Browser, "Chrome"));
    measure!("top pages, 2 filters", store.breakdown(&filtered, &Field::Page, 10));
    measure!("by a property", store.breakdown(&month, &Field::Property("plan".into()), 10));
    measure!("by a property, many values", store.breakdown(&month, &Field::Property("price".into()), 10));
    let step = |path: &str| Step { filters: vec![Filter::is(Field::Page, path)] };
    let funnel = |steps: &[&str]| Funnel {
        steps: steps.iter().map(|path| step(path)).collect(),
        window_ms: DAY_MS,
        order: Order::Ordered,
        unit: Unit::Visitor,
    };
    measure!("funnel, 3 steps", store.funnel(&month, &funnel(&["/page/0", "/page/1", "/page/2"])));
    measure!(
        "funnel, 5 steps",
        store.funnel(&month, &funnel(&["/page/0", "/page/1", "/page/2", "/page/3", "/page/4"]))
    );
    measure!("realtime", store.realtime(&month, end));
    measure!("new visitors, 30 d", store.new_visitors(&month));
    measure!("recent 100", store.recent(&month, None, 100));
    let who = Subject::User("user-1000".into());
    measure!("recent 100 of a user", store.recent(&all, Some(&who), 100));
    if "erase a user".contains(filter) {
        let start = Instant::now();
        let deleted =
            store.erase(&TenantScope::tenant(""), &Subject::User("user-2000".into())).await.unwrap();
        println!("erase a user: {deleted:?} in {:.1?}", start.elapsed());
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let millions: f64 = arguments.first().and_then(|millions| millions.parse().ok()).unwrap_or(1.0);
    let filter = arguments.get(1).cloned().unwrap_or_default();
    let events = (millions * 1e6) as u64;
    let dir = std::env::var_os("STORE_BENCH_DIR").map_or_else(std::env::temp_dir, Into::into);
    let path = dir.join(format!("store-bench-{millions}.db"));
    if !path.exists() {
        let store = SqliteStore::open(Settings::new(&path)).unwrap();
        let mut source = Source::new(events);
        load(&store, &mut source, events * 8 / 10, 1_000).await;
        load(&store, &mut source, events * 2 / 10, 100).await;
        println!("peak while loading: {} MB", status("VmHWM") / 1024);
        store.close().await;
        let used = std::fs::metadata(&path).unwrap().len();
        println!("{:.1} bytes an event", used as f64 / events as f64);
    }
    let start = Instant::now();
    let readers = std::env::var("STORE_BENCH_READERS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let store = SqliteStore::open(Settings { readers, ..Settings::new(&path) }).unwrap();
    println!("opened in {:.1?}: {:?}", start.elapsed(), store.stats().await.unwrap());
    ask(&store, &filter).await;
    store.close().await;
}
