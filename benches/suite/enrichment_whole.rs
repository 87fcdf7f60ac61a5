//! What all steps together cost an event of a browser's: a page, its user agent and hints,
//! an address, a referrer, a session.

use std::{hint::black_box, time::Instant};

use analytics_relay::{
    config::Config,
    enrich::{agent::Hints, measured::AllSteps},
    providers::{
        EventId, EventKind, EventParts, MoreParts, Properties, event::JsonObject, properties::Limits,
    },
};

use crate::{
    enrichment::USER_AGENTS,
    enrichment_geo::{CITIES, address, write_cities},
    report::{Report, median},
};

const NOW_MS: i64 = 1_767_225_600_000;
const EVENTS: usize = 20_000;
const ROUNDS: usize = 9;
/// Devices that are seen in turn, and so the sessions and addresses that are known.
const DEVICES: usize = 1_000;
/// As analytics.js sends it.
const CONTEXT: &str = r#"{"page":{"path":"/shoes","referrer":"https://www.google.com/","search":"?utm_source=news&utm_medium=email","title":"Shoes","url":"https://shop.example/shoes?utm_source=news&utm_medium=email"},"userAgent":"Mozilla/5.0 (X11; Linux x86_64)","locale":"de-DE","library":{"name":"analytics.js","version":"next-1.70.0"},"timezone":"Europe/Berlin"}"#;
const PROPERTIES: &str = r#"{"path":"/shoes","referrer":"https://www.google.com/","search":"?utm_source=news&utm_medium=email","title":"Shoes","url":"https://shop.example/shoes?utm_source=news&utm_medium=email"}"#;

pub(crate) fn run(report: &mut Report) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let database = dir.path().join("cities.mmdb");
    write_cities(&database)?;
    let database = database.to_string_lossy();
    let steps = |steps| {
        let config =
            Config::from_vars([("TEST_MODE", "1"), ("GEO_DATABASE", &*database), ("ENRICH", steps)])?;
        AllSteps::open(&config, dir.path(), NOW_MS).map_err(anyhow::Error::from_boxed)
    };
    let known = |at: usize| USER_AGENTS[at % 5].to_owned();
    let fresh = |at: usize| format!("{} {at}", USER_AGENTS[at % 5]);
    for step in ["geo", "page", "page,source", "session", "visitor", "agent", "bot"] {
        each(report, &format!("all_steps.{step}_alone"), &steps(step)?, DEVICES, true, known)?;
    }
    let all = steps("all")?;
    each(report, "all_steps_hit", &all, DEVICES, true, known)?;
    each(report, "all_steps_hit_cookieless", &all, DEVICES, false, known)?;
    each(report, "all_steps_miss", &all, CITIES as usize, true, fresh)
}

/// The time of one, in the middle of some rounds.
#[expect(clippy::cast_precision_loss, reason = "figures for a person")]
fn each(
    report: &mut Report,
    name: &str,
    steps: &AllSteps,
    devices: usize,
    is_named: bool,
    user_agent: impl Fn(usize) -> String,
) -> anyhow::Result<()> {
    let hints = Hints::read(|name| match name {
        "sec-ch-ua" => Some(r#""Google Chrome";v="131", "Chromium";v="131", "Not_A Brand";v="24""#),
        "sec-ch-ua-mobile" => Some("?0"),
        "sec-ch-ua-platform" => Some("\"Windows\""),
        _ => None,
    });
    let ids: Vec<_> = (0..devices).map(|device| format!("0f1e2d3c-0000-4000-8000-{device:012}")).collect();
    let mut times = Vec::new();
    for round in 0..=ROUNDS {
        let agents: Vec<_> = (round * EVENTS..(round + 1) * EVENTS).map(&user_agent).collect();
        let events = agents.iter().enumerate().map(|(at, agent)| {
            let device = (round * EVENTS + at) % devices;
            event(is_named.then_some(&*ids[device]), device, agent)
        });
        let events = events.collect::<anyhow::Result<Vec<_>>>()?;
        let started = Instant::now();
        for event in &events {
            black_box(steps.enrich(black_box(event), &hints));
        }
        // In the first they become known.
        if round > 0 {
            times.push(started.elapsed().as_secs_f64() * 1e6 / EVENTS as f64);
        }
    }
    report.add(name, median(times), "us");
    Ok(())
}

fn event<'a>(id: Option<&'a str>, device: usize, agent: &'a str) -> anyhow::Result<EventParts<'a>> {
    let context = Some(JsonObject::parse(CONTEXT, &Limits::NONE)?);
    Ok(EventParts {
        id: EventId::new("0f1e2d3c-0000-4000-8000-000000000000")?,
        kind: EventKind::Page { name: Some("Shoes"), category: None },
        user_id: None,
        anonymous_id: id,
        time_ms: NOW_MS,
        accepted_ms: NOW_MS,
        ip: Some(address(u32::try_from(device)?)),
        user_agent: Some(agent),
        properties: Properties::parse(PROPERTIES, &Limits::DEFAULT)?,
        more: MoreParts { context, ..MoreParts::default() }.if_any(),
    })
}
