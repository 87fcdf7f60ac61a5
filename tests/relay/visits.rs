//! What the settings of visits and visitors do, through the binary, each beside its default:
//! whose secret makes the ids, when a visit ends, how many are known, where midnight is, and
//! whether who declines is counted.

use std::{
    collections::HashSet,
    time::{SystemTime, UNIX_EPOCH},
};

use analytics_relay::providers::sandbox::{Taken, Vendor};
use serde_json::{Value, json};

use crate::{
    enrichment::{FIREFOX, named, of_page, send},
    harness::{Relay, Setup, taken},
};

const MINUTE_MS: i64 = 60_000;
const HOUR_MS: i64 = 60 * MINUTE_MS;

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// A relay with one setting, or all defaults.
async fn started(setting: Option<(&str, &str)>) -> (Setup, Relay) {
    let mut setup = Setup::new().await;
    if let Some((name, value)) = setting {
        setup.set(name, value);
    }
    let relay = setup.start().await;
    (setup, relay)
}

/// An event of one device, at a time of its own.
fn of_device(name: &str, time_ms: i64) -> Value {
    json!({"event": name, "anonymousId": "device-1", "timestamp": time_ms})
}

/// An event that names nobody.
fn of_nobody(name: &str, time_ms: i64) -> Value {
    json!({"website_id": "site-1", "event_type": name, "timestamp": time_ms})
}

/// What Mixpanel got of an event under a name.
fn got<'a>(events: &'a [Taken], event: &str, name: &str) -> &'a Value {
    named(events, event).event["properties"].get(name).unwrap_or(&Value::Null)
}

/// Whoever reads them at two relays sees one visit, or two.
#[tokio::test]
async fn relays_that_share_a_secret_give_a_visit_the_same_id_and_others_do_not() {
    let (shared, another) = ("canary-secret-of-several", "canary-secret-of-another");
    let start_ms = now_ms() - 5 * MINUTE_MS;
    let mut ids = Vec::new();
    for secret in [Some(shared), Some(shared), Some(another), None, None] {
        let (setup, relay) = started(secret.map(|secret| ("SESSION_SECRET", secret))).await;
        send(of_page(&relay, "/v1/track", FIREFOX), &of_device("Seen", start_ms)).await;
        taken(&setup, Vendor::Mixpanel, 1).await;
        let id = got(&setup.sandbox.taken(Vendor::Mixpanel), "Seen", "$session_id").clone();
        ids.push(id.as_str().unwrap_or_else(|| panic!("it has none: {secret:?}")).to_owned());
        relay.terminate().await;
    }
    assert_eq!(ids[0], ids[1], "of those that share one");
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), 4, "of all others: {ids:?}");
    let start = |id: &String| i64::from_str_radix(&id.replace('-', "")[..12], 16).unwrap();
    assert!(ids.iter().all(|id| start(id) == start_ms), "{start_ms}: {ids:?}");
}

#[tokio::test]
async fn a_visit_ends_after_the_minutes_that_are_set() {
    for (minutes, is_one) in [(None, true), (Some("10"), false)] {
        let (setup, relay) = started(minutes.map(|minutes| ("SESSION_TIMEOUT_MINUTES", minutes))).await;
        let now_ms = now_ms();
        // Three minutes, and twelve, of which none is ten from now.
        for (name, minutes) in [("First", -6), ("Second", -3), ("Third", 9)] {
            let event = of_device(name, now_ms + minutes * MINUTE_MS);
            send(of_page(&relay, "/v1/track", FIREFOX), &event).await;
        }
        taken(&setup, Vendor::Mixpanel, 3).await;
        let events = setup.sandbox.taken(Vendor::Mixpanel);
        let [first, second, third] =
            ["First", "Second", "Third"].map(|name| got(&events, name, "$session_id"));
        assert!(first.is_string() && third.is_string(), "{minutes:?}: {events:?}");
        assert_eq!(first, second, "{minutes:?}");
        assert_eq!(second == third, is_one, "{minutes:?}: {second} {third}");
        relay.terminate().await;
    }
}

/// Sixteen is the smallest number: one for each part of the table.
#[tokio::test]
async fn who_is_new_when_all_room_is_used_gets_no_session_and_nobody_loses_theirs() {
    const VISITORS: usize = 40;
    for (max, known_max) in [(None, VISITORS), (Some("16"), 16)] {
        let (setup, relay) = started(max.map(|max| ("SESSIONS_MAX", max))).await;
        let event = |turn: &str, visitor: usize| {
            let (name, device) = (format!("{turn} {visitor}"), format!("device-{visitor}"));
            json!({"type": "track", "event": name, "anonymousId": device})
        };
        for turn in ["First", "Second"] {
            let events: Vec<_> = (0..VISITORS).map(|visitor| event(turn, visitor)).collect();
            send(of_page(&relay, "/v1/batch", FIREFOX), &json!({"batch": events})).await;
        }
        taken(&setup, Vendor::Mixpanel, 2 * VISITORS as u64).await;
        let events = setup.sandbox.taken(Vendor::Mixpanel);
        let sessions = |turn: &str| -> Vec<&Value> {
            (0..VISITORS).map(|visitor| got(&events, &format!("{turn} {visitor}"), "$session_id")).collect()
        };
        let first = sessions("First");
        assert_eq!(first, sessions("Second"), "{max:?}: whoever has one keeps it, and nobody gets one");
        let known = first.iter().filter(|session| session.is_string()).count();
        assert!((1..=known_max).contains(&known), "{max:?}: {known} are known");
        assert!(max.is_some() || known == VISITORS, "{known}: there is room for all");
        relay.metric_is("relay_sessions_visitors", &[], known as f64).await;
        relay.metric_is("relay_sessions_full_total", &[], 2.0 * (VISITORS - known) as f64).await;
        relay.terminate().await;
    }
}

/// A zone whose next midnight is some hours off, and when that is; in UTC that is no
/// midnight.
fn midnight_to_come(now_ms: i64) -> (String, i64) {
    let hours = (6..).find(|hours| (now_ms / HOUR_MS + hours) % 24 != 0).unwrap();
    let midnight_ms = (now_ms / HOUR_MS + hours) * HOUR_MS;
    let zone = match midnight_ms / HOUR_MS % 24 {
        // In these names west is positive.
        hour @ ..=12 => format!("Etc/GMT+{hour}"),
        hour => format!("Etc/GMT-{}", 24 - hour),
    };
    (zone, midnight_ms)
}

/// Who is seen an hour apart, around midnight there, is one visitor by UTC's days.
#[tokio::test]
async fn a_visitor_without_cookies_is_another_after_midnight_of_the_time_zone() {
    let (zone, midnight_ms) = midnight_to_come(now_ms());
    for (zone, is_one) in [(None, true), (Some(&*zone), false)] {
        let (setup, relay) = started(zone.map(|zone| ("TIME_ZONE", zone))).await;
        for (name, minutes) in [("Before", -30), ("After", 30), ("Later", 40)] {
            let event = of_nobody(name, midnight_ms + minutes * MINUTE_MS);
            send(of_page(&relay, "/api/v1/analytics/event", FIREFOX), &event).await;
        }
        taken(&setup, Vendor::Mixpanel, 3).await;
        let events = setup.sandbox.taken(Vendor::Mixpanel);
        let [before, after, later] =
            ["Before", "After", "Later"].map(|name| got(&events, name, "$device_id"));
        assert!(before.is_string() && after.is_string(), "{zone:?}: {events:?}");
        assert_eq!(after, later, "{zone:?}");
        assert_eq!(before == after, is_one, "{zone:?}: {before} {after}");
        relay.terminate().await;
    }
}

#[tokio::test]
async fn who_declines_is_a_visitor_like_others_only_where_that_is_ignored() {
    for (gpc, is_counted) in [(None, false), (Some("ignore"), true)] {
        let (setup, relay) = started(gpc.map(|gpc| ("RESPECT_GPC", gpc))).await;
        let path = "/api/v1/analytics/event";
        let now_ms = now_ms();
        send(of_page(&relay, path, FIREFOX), &of_nobody("Asked", now_ms)).await;
        for (name, header) in [("Declined", "sec-gpc"), ("Not tracked", "dnt")] {
            send(of_page(&relay, path, FIREFOX).header(header, "1"), &of_nobody(name, now_ms)).await;
        }
        taken(&setup, Vendor::Mixpanel, 3).await;
        let events = setup.sandbox.taken(Vendor::Mixpanel);
        for of in ["$device_id", "$session_id"] {
            let usual = got(&events, "Asked", of);
            assert!(usual.is_string(), "{gpc:?} {of}: {events:?}");
            let want = if is_counted { usual } else { &Value::Null };
            for name in ["Declined", "Not tracked"] {
                assert_eq!(got(&events, name, of), want, "{gpc:?} {of} {name}");
            }
        }
        relay.terminate().await;
    }
}
