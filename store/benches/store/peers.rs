//! What other engines are compared with: the events as rows, our answers and what they cost.
//! the programs in `peers` read both.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
};

use analytics_relay_providers::{Event, EventKind};
use analytics_relay_store::{Bucket, Field, Store, StoreError, Summary, ValueRow, sqlite::SqliteStore};
use serde_json::{Value, json};

use crate::{
    Bench,
    process::peak_mb,
    questions::{self, days, filtered, funnel},
    source::Source,
};

/// The columns of a row, as `peers/sql.py` has them.
const COLUMNS: usize = 19;

/// Writes the events as CSV and what became of the questions as JSON.
pub(crate) async fn write(bench: &Bench, store: &SqliteStore) {
    let asked = questions::ask(store, "").await;
    let peak_mb = peak_mb();
    let events = store.stats().await.unwrap().events;
    let mut questions = serde_json::Map::new();
    for (name, rows) in answers(store).await.unwrap() {
        let one = asked.iter().find(|one| one.name == name).unwrap();
        let ms = |of: std::time::Duration| of.as_secs_f64() * 1e3;
        let figures = json!({"ms": ms(one.wall), "cpu_ms": ms(one.processor), "rows": rows});
        questions.insert(name.to_owned(), figures);
    }
    let loaded = std::fs::read_to_string(bench.file(".loaded.json")).unwrap();
    let loaded: Value = serde_json::from_str(&loaded).unwrap();
    let answers = json!({"events": events, "loaded": loaded, "ask_peak_mb": peak_mb, "questions": questions});
    std::fs::write(bench.file(".answers.json"), answers.to_string()).unwrap();
    rows(bench, events);
}

/// What other engines are asked too, as rows of numbers and texts.
async fn answers(store: &SqliteStore) -> Result<Vec<(&'static str, Value)>, StoreError> {
    let (week, month, before, all) = (days(7, 0), days(30, 0), days(60, 30), days(90, 0));
    let mut answers = Vec::new();
    for (name, scope, bucket) in [("by hour, 7 d", &week, Bucket::Hour), ("by day, 90 d", &all, Bucket::Day)]
    {
        let points = store.counts(scope, bucket, "Europe/Berlin").await?;
        // SQL has no row for a bucket without events.
        let points = points.iter().filter(|point| point.events > 0);
        answers.push((
            name,
            points.map(|point| json!([point.start_ms, point.events, point.visitors.n])).collect(),
        ));
    }
    let uniques = store.counts(&month, Bucket::All, "UTC").await?;
    answers.push(("uniques, 30 d", uniques.iter().map(|all| json!([all.events, all.visitors.n])).collect()));
    let dashboards = [store.summary(&month).await?, store.summary(&before).await?];
    answers.push(("dashboard + previous, 30 d", dashboards.iter().map(figures).collect()));
    let property = Field::Property("plan".into());
    for (name, scope, by) in [
        ("top pages, visitors", &month, &Field::Page),
        ("top pages, 2 filters", &filtered(), &Field::Page),
        ("by a property", &month, &property),
    ] {
        let values = store.breakdown(scope, by, 10).await?;
        let row = |row: &ValueRow| json!([row.value, row.events, row.visitors.n]);
        answers.push((name, values.rows.iter().map(row).collect()));
    }
    let steps = store.funnel(&month, &funnel(3)).await?.steps;
    let reached: Vec<u64> = steps.iter().map(|step| step.reached).collect();
    answers.push(("funnel, 3 steps", json!([reached])));
    Ok(answers)
}

fn figures(summary: &Summary) -> Value {
    let sessions = &summary.sessions;
    json!([
        summary.events,
        summary.views,
        summary.visitors.n,
        sessions.sessions,
        sessions.with_views,
        sessions.bounces,
        sessions.duration_ms,
        sessions.views
    ])
}

/// Writes as many events as the store has, one a line.
fn rows(bench: &Bench, events: u64) {
    let mut source = Source::new(bench.events());
    let mut to = BufWriter::new(File::create(bench.file(".csv")).unwrap());
    for _ in 0..events {
        let row = row(&source.event()).map(quoted);
        to.write_all(row.join(",").as_bytes()).unwrap();
        to.write_all(b"\n").unwrap();
    }
    to.flush().unwrap();
}

fn row(event: &Event) -> [String; COLUMNS] {
    let enriched: Value =
        event.enriched().and_then(|enriched| serde_json::from_str(enriched.json()).ok()).unwrap_or_default();
    let at = |path: &str| enriched.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
    let name = match event.kind() {
        EventKind::Track { name } => name,
        _ => "pageview",
    };
    let time = jiff::Timestamp::from_millisecond(event.time_ms()).unwrap();
    [
        event.id().as_str().to_owned(),
        text(event.source()),
        name.to_owned(),
        format!("{time:.3}"),
        text(event.user_id()),
        text(event.anonymous_id()),
        text(event.session_id()),
        at("/page/host"),
        at("/page/path"),
        at("/source"),
        at("/channel"),
        at("/geo/country"),
        at("/geo/region"),
        at("/geo/city"),
        at("/agent/browser"),
        at("/agent/browser_version"),
        at("/agent/os"),
        at("/agent/device"),
        event.properties().json().to_owned(),
    ]
}

/// A field of CSV: what is empty is not there.
fn quoted(field: String) -> String {
    if field.contains([',', '"', '\n']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field }
}
