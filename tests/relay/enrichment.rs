//! What the relay finds out about an event, through the binary: a browser's event with a
//! page and a campaign, visits over stops and kills, machines, users who decline.

use std::time::Instant;

use analytics_relay::providers::sandbox::{Taken, Vendor};
use reqwest::RequestBuilder;
use serde_json::{Value, json};

use crate::{
    addresses::write_database,
    harness::{Relay, Setup, reqwest_client, taken},
};

pub(crate) const FIREFOX: &str = "Mozilla/5.0 (X11; Linux x86_64; rv:131.0) Gecko/20100101 Firefox/131.0";
/// What it says of its version, and of the system's, is frozen.
const CHROME: &str =
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36";
pub(crate) const GOOGLEBOT: &str = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)";

/// A call as a page makes it.
pub(crate) fn of_page(relay: &Relay, path: &str, user_agent: &str) -> RequestBuilder {
    let url = format!("http://{}{path}", relay.http_addr.unwrap());
    reqwest_client().post(url).header("origin", "https://shop.example").header("user-agent", user_agent)
}

pub(crate) async fn send(call: RequestBuilder, event: &Value) {
    let answer = call.body(event.to_string()).send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
}

pub(crate) fn named<'a>(taken: &'a [Taken], name: &str) -> &'a Taken {
    taken.iter().find(|event| event.name == name).unwrap_or_else(|| panic!("{name}: {taken:?}"))
}

/// An event of the log, as `spool export` prints it.
pub(crate) async fn in_log(setup: &Setup, id: &str) -> Value {
    let (code, said, error) = setup.run(&["spool", "export"]).await;
    assert_eq!(code, 0, "{error}");
    let lines = said.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut events = lines.map(|line| line.get("event").cloned().unwrap_or(line));
    events.find(|event| event["id"] == id).unwrap_or_else(|| panic!("{id}: {said}"))
}

#[tokio::test]
async fn a_page_is_told_by_whom_and_from_where_it_was_seen() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "written");
    setup.set("GROUP_TYPE", "company");
    let relay = setup.start().await;
    let page = json!({
        "name": "Home", "anonymousId": "device-1", "messageId": "page-1-0123456789",
        "context": {"page": {
            "url": "https://shop.example/cart?utm_source=news&utm_campaign=may&token=canary",
            "referrer": "https://www.google.com/",
        }},
        "properties": {"url": "https://shop.example/cart?utm_source=news&utm_campaign=may&token=canary"},
    });
    send(of_page(&relay, "/v1/page", FIREFOX).header("sec-ch-ua-platform", "\"Linux\""), &page).await;
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 1).await;
    }
    let event = in_log(&setup, "page-1-0123456789").await;
    let enriched = &event["enriched"];
    assert_eq!(enriched["v"], 1);
    assert_eq!(enriched["agent"]["browser"], "Firefox");
    assert_eq!(enriched["agent"]["os"], "Linux");
    assert_eq!(enriched["agent"]["device"], "desktop");
    assert_eq!(enriched["page"]["host"], "shop.example");
    assert_eq!(enriched["page"]["path"], "/cart");
    assert!(!enriched.to_string().contains("canary"), "{enriched}");
    assert_eq!(enriched["campaign"]["source"], "news");
    assert_eq!(enriched["source"], "news");
    assert!(enriched["data"]["uap"].is_string() && enriched["data"]["sources"].is_string(), "{enriched}");
    assert_eq!((enriched.get("bot"), enriched.get("missed")), (None, None));

    let mixpanel = &setup.sandbox.taken(Vendor::Mixpanel)[0].event["properties"];
    assert_eq!((&mixpanel["$browser"], &mixpanel["$os"]), (&json!("Firefox"), &json!("Linux")));
    assert_eq!(mixpanel["utm_source"], "news");
    let amplitude = &setup.sandbox.taken(Vendor::Amplitude)[0].event;
    assert_eq!(amplitude["os_name"], "Linux");
    let started_ms = amplitude["session_id"].as_i64().unwrap();
    assert!(started_ms > 1_700_000_000_000, "the session's start: {started_ms}");
    let segment = &setup.sandbox.taken(Vendor::Segment)[0].event;
    assert_eq!(segment["context"]["campaign"]["source"], "news");
    relay.terminate().await;
}

/// Each header is read, and its word is better than the user agent's.
#[tokio::test]
async fn what_a_browser_says_in_its_hints_wins_over_its_user_agent() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "written");
    let relay = setup.start().await;
    let event = |id: &str| json!({"event": id, "anonymousId": "device-1", "messageId": id});
    let plain = of_page(&relay, "/v1/track", CHROME);
    send(plain, &event("plain-1-0123456789")).await;
    let hints = [
        ("sec-ch-ua", r#""Microsoft Edge";v="133", "Chromium";v="133", "Not A(Brand";v="99""#),
        ("sec-ch-ua-mobile", "?1"),
        ("sec-ch-ua-platform", r#""Android""#),
        ("sec-ch-ua-platform-version", r#""14.0.0""#),
        ("sec-ch-ua-model", r#""Pixel 8""#),
    ];
    let hinted = of_page(&relay, "/v1/track", CHROME);
    let hinted = hints.into_iter().fold(hinted, |call, (name, value)| call.header(name, value));
    send(hinted, &event("hints-1-0123456789")).await;
    taken(&setup, Vendor::Amplitude, 2).await;
    let plain = &in_log(&setup, "plain-1-0123456789").await["enriched"]["agent"];
    let of_agent = json!({"browser": "Chrome", "browser_version": "131", "os": "Linux", "device": "desktop"});
    assert_eq!(*plain, of_agent);
    let hinted = &in_log(&setup, "hints-1-0123456789").await["enriched"]["agent"];
    let of_hints = json!({
        "browser": "Edge", "browser_version": "133", "os": "Android", "os_version": "14", "device": "mobile",
        "model": "Pixel 8",
    });
    assert_eq!(*hinted, of_hints);
    let at_amplitude = setup.sandbox.taken(Vendor::Amplitude);
    assert_eq!(named(&at_amplitude, "hints-1-0123456789").event["os_name"], "Android");
    relay.terminate().await;
}

/// By the whole address, before it is cut or goes; providers that get an address locate by it.
#[tokio::test]
async fn an_event_has_its_place_and_providers_are_told_it_where_they_get_no_address() {
    for (policy, ip) in [("default", Some("81.2.69.0")), ("none", None)] {
        let mut setup = Setup::new().await;
        let database = setup.data.path().join("geo.mmdb");
        write_database(&database, "81.2.69.142/32", &json!({"country": {"iso_code": "DE"}}));
        setup.set("GEO_DATABASE", database.to_str().unwrap()).set("TRUSTED_PROXIES", "127.0.0.1");
        setup.set("IP_STORE", policy).set("DURABILITY", "written");
        let relay = setup.start().await;
        let event = json!({"event": "Seen", "anonymousId": "device-1", "messageId": "place-1-0123456789"});
        let call = of_page(&relay, "/v1/track", FIREFOX).header("x-forwarded-for", "81.2.69.142");
        send(call, &event).await;
        for vendor in Vendor::ALL {
            taken(&setup, vendor, 1).await;
        }
        let event = in_log(&setup, "place-1-0123456789").await;
        assert_eq!(event["enriched"]["geo"]["country"], "DE", "{policy}: {event}");
        assert!(event["enriched"]["data"]["geo"].as_str().unwrap().ends_with("/1748736000"), "{event}");
        assert_eq!(event["context"]["ip"].as_str(), ip, "{policy}: {event}");

        let country = if ip.is_none() { json!("DE") } else { json!(null) };
        for (vendor, at) in [
            (Vendor::Segment, "/context/location/country"),
            (Vendor::Amplitude, "/country"),
            (Vendor::Mixpanel, "/properties/mp_country_code"),
        ] {
            let sent = setup.sandbox.taken(vendor)[0].event.clone();
            assert_eq!(*sent.pointer(at).unwrap_or(&Value::Null), country, "{policy} {vendor:?}: {sent}");
        }
        relay.terminate().await;
    }
}

/// One visit over a stop is one session; over a kill it is two. A server's events have none.
#[tokio::test]
async fn a_visit_goes_on_over_a_stop_and_begins_anew_after_a_kill() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "written");
    let mut relay = setup.start().await;
    let mut sessions = Vec::new();
    for (turn, end) in ["TERM", "KILL", "KEEP"].into_iter().enumerate() {
        let id = format!("visit-{turn}-0123456789");
        let event = json!({"event": "Seen", "anonymousId": "device-1", "messageId": id});
        send(of_page(&relay, "/v1/track", FIREFOX), &event).await;
        let of_server =
            json!({"event": "Job", "anonymousId": "device-1", "messageId": format!("job-{turn}-0123456789")});
        let url = format!("http://{}/v1/track", relay.http_addr.unwrap());
        send(reqwest_client().post(url), &of_server).await;
        taken(&setup, Vendor::Segment, 2 * (turn as u64 + 1)).await;
        sessions.push(in_log(&setup, &id).await["session_id"].clone());
        assert!(in_log(&setup, &format!("job-{turn}-0123456789")).await["session_id"].is_null());
        match end {
            "TERM" => {
                relay.terminate().await;
                assert!(setup.data_dir().join("sessions").exists());
                relay = setup.start().await;
            }
            "KILL" => {
                relay.signal("KILL");
                relay.ended(Instant::now()).await;
                relay = setup.start().await;
            }
            _ => {}
        }
    }
    assert!(sessions[0].is_string(), "{sessions:?}");
    assert_eq!(sessions[0], sessions[1], "over the stop");
    assert_ne!(sessions[1], sessions[2], "over the kill");
    relay.terminate().await;
}

/// As Segment's, RudderStack's and PostHog's libraries name it.
#[tokio::test]
async fn an_event_that_names_its_session_keeps_it() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "written");
    let relay = setup.start().await;
    let event = |turn: usize| {
        let id = format!("named-{turn}-0123456789");
        json!({"event": "Seen", "anonymousId": "device-1", "messageId": id})
    };
    let ways = ["/sessionId", "/context/sessionId", "/context/session_id", "/properties/$session_id"];
    for (turn, way) in ways.into_iter().enumerate() {
        let mut event = event(turn);
        let (above, name) = way.rsplit_once('/').unwrap();
        match above.strip_prefix('/') {
            None => event[name] = json!("s-1"),
            Some(above) => event[above] = json!({name: "s-1"}),
        }
        send(of_page(&relay, "/v1/track", FIREFOX), &event).await;
    }
    taken(&setup, Vendor::Mixpanel, ways.len() as u64).await;
    for (turn, way) in ways.into_iter().enumerate() {
        assert_eq!(in_log(&setup, &format!("named-{turn}-0123456789")).await["session_id"], "s-1", "{way}");
    }
    let at_mixpanel = setup.sandbox.taken(Vendor::Mixpanel);
    assert!(
        at_mixpanel.iter().all(|event| event.event["properties"]["$session_id"] == "s-1"),
        "{at_mixpanel:?}"
    );
    relay.terminate().await;
}

#[tokio::test]
async fn visitors_without_an_id_get_one_of_the_day_unless_they_decline() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "written");
    let relay = setup.start().await;
    let view = |id: &str| json!({"website_id": "site-1", "page": "/", "event_id": id});
    let path = "/api/v1/analytics/event";
    send(of_page(&relay, path, FIREFOX), &view("view-1-0123456789")).await;
    send(of_page(&relay, path, FIREFOX), &view("view-2-0123456789")).await;
    send(of_page(&relay, path, &FIREFOX.replace("131", "132")), &view("view-3-0123456789")).await;
    send(of_page(&relay, path, FIREFOX).header("sec-gpc", "1"), &view("view-4-0123456789")).await;
    taken(&setup, Vendor::Segment, 4).await;
    let mut events = Vec::new();
    for turn in 1..=4 {
        events.push(in_log(&setup, &format!("view-{turn}-0123456789")).await);
    }
    let ids: Vec<_> = events.iter().map(|event| &event["anonymous_id"]).collect();
    assert!(ids[0].is_string() && ids[0] == ids[1] && ids[1] != ids[2], "{ids:?}");
    assert!(ids[3].is_null() && events[3]["session_id"].is_null(), "who declines: {}", events[3]);
    assert_eq!(events[0]["enriched"]["visitor"], "day");
    assert_eq!(events[0]["session_id"], events[1]["session_id"]);
    relay.metric_is("relay_declined_events_total", &[], 1.0).await;
    relay.terminate().await;
}

/// Whoever passes it on, and however often it is sent.
#[tokio::test]
async fn who_declines_is_kept_from_vendors_also_when_what_was_refused_is_sent_again() {
    let mut setup = Setup::new().await;
    let relay = setup.start().await;
    let nameless = json!({"type": "track", "anonymousId": "a", "messageId": "declined-1-0123456789"});
    let batch = json!({"batch": [nameless]});
    send(of_page(&relay, "/v1/batch", FIREFOX).header("sec-gpc", "1"), &batch).await;
    let (_, shown, _) = setup.run(&["dead-letters", "refused", "show"]).await;
    assert!(shown.contains(r#""declined":true"#), "{shown}");
    relay.terminate().await;

    setup.set("RESPECT_GPC", "drop");
    let relay = setup.start().await;
    setup.set("HTTP_PORT", &relay.http_addr.unwrap().port().to_string());
    let mended = setup.data.path().join("mended.ndjson");
    let named = shown.replace(r#""type":"track""#, r#""type":"track","event":"Mended""#);
    std::fs::write(&mended, named).unwrap();
    let (code, said, error) = setup.run(&["dead-letters", "refused", "send", mended.to_str().unwrap()]).await;
    assert_eq!((code, said.as_str()), (0, "taken 1\n"), "{error}");
    let url = format!("http://{}/v1/track", relay.http_addr.unwrap());
    let direct = json!({"event": "Direct", "anonymousId": "a", "context": {"direct": true}});
    send(reqwest_client().post(url).header("user-agent", FIREFOX).header("sec-gpc", "1"), &direct).await;
    send(of_page(&relay, "/v1/batch", FIREFOX).header("dnt", "1"), &batch).await;
    let (_, listed, _) = setup.run(&["dead-letters", "refused", "list"]).await;
    assert!(listed.starts_with("no refused items"), "{listed}");
    let ended = relay.terminate().await;
    for vendor in Vendor::ALL {
        let balance = ended.balance(vendor);
        assert_eq!((balance.delivered, balance.not_for), (0, 2), "{}", vendor.name());
    }
}

#[tokio::test]
async fn machines_are_marked_and_dropped_or_kept_from_vendors_only_if_they_are_to_be() {
    for (bots, delivered, not_for) in [("mark", 2, 0), ("drop", 1, 1), ("keep_out_of_providers", 1, 1)] {
        let mut setup = Setup::new().await;
        setup.set("BOTS", bots);
        let relay = setup.start().await;
        for (name, user_agent) in [("By a person", FIREFOX), ("By a machine", GOOGLEBOT)] {
            let event = json!({"event": name, "anonymousId": "a"});
            send(of_page(&relay, "/v1/track", user_agent), &event).await;
        }
        let ended = relay.terminate().await;
        let balance = ended.balance(Vendor::Segment);
        assert_eq!((balance.delivered, balance.not_for), (delivered, not_for), "{bots}");
        named(&setup.sandbox.taken(Vendor::Segment), "By a person");
    }
}

/// What a user asks for is done whatever an operator wants to know.
#[tokio::test]
async fn who_declines_is_dropped_where_nothing_is_found_out() {
    let mut setup = Setup::new().await;
    setup.set("ENRICH", "none").set("RESPECT_GPC", "drop");
    let relay = setup.start().await;
    let event = |name: &str| json!({"event": name, "anonymousId": "a"});
    send(of_page(&relay, "/v1/track", FIREFOX), &event("By a person")).await;
    send(of_page(&relay, "/v1/track", FIREFOX).header("sec-gpc", "1"), &event("Declined")).await;
    relay.metric_is("relay_declined_events_total", &[], 1.0).await;
    let balance = relay.terminate().await.balance(Vendor::Segment);
    assert_eq!((balance.delivered, balance.not_for), (1, 1));
    named(&setup.sandbox.taken(Vendor::Segment), "By a person");
}

/// Nothing is asked of the caller and nothing changes where nobody wants it, and what was
/// kept of visitors while somebody did is gone.
#[tokio::test]
async fn switched_off_an_event_is_what_its_caller_sent() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "written");
    setup.start().await.terminate().await;
    let kept = ["visitor-salts.json", "sessions"].map(|name| setup.data_dir().join(name));
    assert!(kept.iter().all(|file| file.exists()));
    setup.set("ENRICH", "none");
    let relay = setup.start().await;
    assert!(!kept.iter().any(|file| file.exists()));
    let event = json!({
        "event": "Seen", "anonymousId": "device-1", "messageId": "plain-1-0123456789",
        "context": {"page": {"url": "https://shop.example/?utm_source=news"}},
    });
    send(of_page(&relay, "/v1/track", FIREFOX), &event).await;
    taken(&setup, Vendor::Segment, 1).await;
    let event = in_log(&setup, "plain-1-0123456789").await;
    assert!(event.get("enriched").is_none() && event.get("session_id").is_none(), "{event}");
    relay.terminate().await;
}
