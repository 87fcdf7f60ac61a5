//! What questions cost.

use std::{
    fmt::Debug,
    future::Future,
    time::{Duration, Instant},
};

use analytics_relay_store::{
    Bucket, Field, Filter, Funnel, Order, Scope, Step, Store, StoreError, Subject, TenantScope, Unit,
    sqlite::SqliteStore,
};

use crate::{
    process::{peak_mb, processor},
    source::{DAY_MS, END_MS},
};

/// A question that was asked: medians of five times, and the answer.
pub(crate) struct Asked {
    pub(crate) name: &'static str,
    pub(crate) processor: Duration,
    pub(crate) wall: Duration,
    /// As text, to be compared.
    pub(crate) answer: String,
}

/// The days before the end, of the website that is asked about.
pub(crate) fn days(from: i64, to: i64) -> Scope {
    Scope::new(TenantScope::source("", "site-0"), END_MS - from * DAY_MS..END_MS - to * DAY_MS)
}

/// The last 30 days of one country and one browser.
pub(crate) fn filtered() -> Scope {
    days(30, 0).with(Filter::is(Field::Country, "AA")).with(Filter::is(Field::Browser, "Chrome"))
}

/// Through so many pages, the most frequent ones, within a day.
pub(crate) fn funnel(steps: usize) -> Funnel {
    let step = |n| Step { filters: vec![Filter::is(Field::Page, format!("/page/{n}"))] };
    Funnel {
        steps: (0..steps).map(step).collect(),
        window_ms: DAY_MS,
        order: Order::Ordered,
        unit: Unit::Visitor,
    }
}

async fn measure<T: Debug, F: Future<Output = Result<T, StoreError>>>(
    name: &'static str,
    ask: impl Fn() -> F,
) -> Asked {
    let cold = Instant::now();
    let answer = ask().await.unwrap();
    let cold = cold.elapsed();
    let mut all: Vec<(Duration, Duration)> = Vec::new();
    for _ in 0..5 {
        let (start, before) = (Instant::now(), processor());
        ask().await.unwrap();
        all.push((processor().saturating_sub(before), start.elapsed()));
    }
    all.sort();
    let (processor, wall) = all[2];
    println!(
        "{name:32} {:8.1} ms of processor, {:8.1} ms; first {:8.1} ms; peak {} MB",
        processor.as_secs_f64() * 1e3,
        wall.as_secs_f64() * 1e3,
        cold.as_secs_f64() * 1e3,
        peak_mb()
    );
    Asked { name, processor, wall, answer: format!("{answer:?}") }
}

/// Asks the questions whose names have a part.
pub(crate) async fn ask(store: &SqliteStore, part: &str) -> Vec<Asked> {
    let (week, month, before, all) = (days(7, 0), days(30, 0), days(60, 30), days(90, 0));
    let mut asked = Vec::new();
    macro_rules! measure {
        ($name:literal, $ask:expr) => {
            if $name.contains(part) {
                asked.push(measure($name, || async { $ask.await }).await);
            }
        };
    }
    measure!("by hour, 7 d", store.counts(&week, Bucket::Hour, "Europe/Berlin"));
    measure!("by day, 90 d", store.counts(&all, Bucket::Day, "Europe/Berlin"));
    measure!("uniques, 30 d", store.counts(&month, Bucket::All, "UTC"));
    measure!("names by week, 90 d", store.series_by_name(&all, Bucket::Week, "UTC"));
    measure!("dashboard + previous, 30 d", async {
        Ok((store.summary(&month).await?, store.summary(&before).await?))
    });
    measure!("series by day, 30 d", store.series(&month, Bucket::Day, "Europe/Berlin"));
    measure!("top pages, visitors", store.breakdown(&month, &Field::Page, 10));
    measure!("pages, with stays", store.pages(&month, 10));
    measure!("top sources", store.sessions_by(&month, &Field::Source, 10));
    measure!("top countries", store.breakdown(&month, &Field::Country, 10));
    let filtered = filtered();
    measure!("top pages, 2 filters", store.breakdown(&filtered, &Field::Page, 10));
    measure!("by a property", store.breakdown(&month, &Field::Property("plan".into()), 10));
    measure!("by a property, many values", store.breakdown(&month, &Field::Property("price".into()), 10));
    let (three, five) = (funnel(3), funnel(5));
    measure!("funnel, 3 steps", store.funnel(&month, &three));
    measure!("funnel, 5 steps", store.funnel(&month, &five));
    measure!("realtime", store.realtime(&month, END_MS));
    measure!("new visitors, 30 d", store.new_visitors(&month));
    measure!("recent 100", store.recent(&month, None, 100));
    let who = Subject::User("user-1000".into());
    measure!("recent 100 of a user", store.recent(&all, Some(&who), 100));
    asked
}
