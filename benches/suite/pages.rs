//! What it costs to find out of which page an event is, and who led there.

use std::{hint::black_box, time::Instant};

use analytics_relay::enrich::page::{PageInput, PageSettings, Pages};

use crate::{
    enrichment::memory_mb,
    report::{Report, median},
};

/// What events say, by what is found: context and properties.
const CASES: [(&str, &str, &str); 5] = [
    (
        "nothing",
        r#"{"ip":"1.2.3.4","library":{"name":"analytics.js","version":"1.0"},"locale":"de-DE"}"#,
        "{}",
    ),
    (
        "page",
        r#"{"library":{"name":"analytics.js"},"page":{"path":"/shoes","referrer":"","search":"","title":"Shoes","url":"https://shop.example/shoes"},"userAgent":"Mozilla/5.0 (X11; Linux x86_64)"}"#,
        "{}",
    ),
    (
        "search",
        r#"{"library":{"name":"analytics.js"},"page":{"path":"/shoes","referrer":"https://www.google.com/","search":"","title":"Shoes","url":"https://shop.example/shoes"},"userAgent":"Mozilla/5.0 (X11; Linux x86_64)"}"#,
        "{}",
    ),
    (
        "campaign",
        r#"{"campaign":{"name":"spring","source":"fb","medium":"cpc"},"page":{"path":"/shoes/","referrer":"https://l.facebook.com/l.php","url":"https://shop.example/shoes/?utm_source=fb&utm_medium=cpc&utm_campaign=spring&token=t&fbclid=F1"}}"#,
        "{}",
    ),
    (
        "unknown",
        r#"{"page":{"path":"/","referrer":"https://blog.partner.example.co.uk/post","url":"https://shop.example/"}}"#,
        "{}",
    ),
];
const EVENTS: u32 = 50_000;
const ROUNDS: usize = 7;

/// From an event's context to the JSON that is kept of it.
pub(crate) fn run(report: &mut Report) -> anyhow::Result<()> {
    let before = memory_mb()?;
    let pages = Pages::new(PageSettings::default())?;
    black_box(pages.find(&PageInput::from_json(Some(CASES[2].1), "{}", false)));
    report.add("enrichment.page.memory", memory_mb()? - before, "MB");
    let mut json = Vec::with_capacity(4096);
    for (name, context, properties) in CASES {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let started = Instant::now();
            for _ in 0..EVENTS {
                let input = PageInput::from_json(Some(black_box(context)), black_box(properties), false);
                json.clear();
                serde_json::to_writer(&mut json, &pages.find(&input))?;
                black_box(&json);
            }
            rounds.push(started.elapsed().as_secs_f64() * 1e9 / f64::from(EVENTS));
        }
        report.add(&format!("enrichment.page.{name}"), median(rounds), "ns/event");
    }
    Ok(())
}
