//! Privacy rules over the whole relay: what must not be kept is nowhere, what a provider
//! must not get never leaves, and who does not consent is not sent.

use std::{fs, time::Instant};

use analytics_relay::providers::sandbox::Vendor;
use serde_json::{Value, json};

use crate::{
    addresses::write_database,
    enrichment::{FIREFOX, GOOGLEBOT, in_log},
    harness::{Relay, Setup, assert_is_nowhere, bodies, eventually, everything_below, post, taken},
    secrets::FAULTS,
};

/// What the rules forbid, each under a name of its own, somewhere deep.
const PASSWORD: &str = "canary-password-7f3a9c";
const EMAIL: &str = "canary.Email-7f3a9c@example.com";
const API_KEY: &str = "canary-apikey-7f3a9c";
const ADDRESS: &str = "203.0.113.77";
const STREET: &str = "canary-street-7f3a9c";
const CANARIES: [&str; 5] = [PASSWORD, EMAIL, API_KEY, ADDRESS, STREET];
/// What they do not.
const KEPT: &str = "canary-kept-7f3a9c";

const RULES: &str = r#"
    [global]
    drop = ["street"]
    hash = { email = "hmac" }
    cut = { ip = "/24" }
    [pii]
    mode = "standard"
    [providers.mixpanel]
    deny = ["plan"]
    [providers.amplitude]
    allow = ["note", "phone"]
    hash = { phone = "google" }
"#;

fn setup_with(setup: &mut Setup, rules: &str) {
    let file = setup.data.path().join("privacy.toml");
    fs::write(&file, rules).unwrap();
    setup.set("PRIVACY_FILE", file.to_str().unwrap());
    setup.set("PRIVACY_HASH_KEY", "0123456789abcdef0123456789abcdef");
}

/// One event of each kind that has properties, with all that is forbidden in it.
fn events() -> Vec<Value> {
    let holds = json!({
        "note": KEPT, "plan": "canary-plan-7f3a9c", "Pass-Word": PASSWORD, "phone": "+1 (800) 555-0100",
        "deep": [{ "user": { "E_mail": EMAIL, "STREET": { "name": STREET }, "apiKey": [API_KEY] } }]
    });
    let context = json!({ "ip": ADDRESS, "traits": { "email": EMAIL, "password": PASSWORD }, "note": KEPT });
    let event = |kind: &str, more: Value| {
        let mut event = json!({
            "type": kind, "userId": "user-1", "messageId": format!("privacy-{kind}-0123456789"), "context": context
        });
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        event
    };
    vec![
        event("track", json!({ "event": "Order Placed", "properties": holds })),
        event("identify", json!({ "traits": holds })),
        event("page", json!({ "name": "Home", "properties": holds })),
        // It breaks a rule and is kept to be mended.
        event(
            "track",
            json!({ "event": "", "messageId": "refused-1-0123456789", "properties": holds, "email": EMAIL }),
        ),
        // What breaks it is what holds it.
        event(
            "track",
            json!({ "event": { "password": PASSWORD }, "messageId": "refused-2-0123456789", "groupId": [{ "street": STREET }],
                    "integrations": { "Mixpanel": { "apiKey": API_KEY } } }),
        ),
    ]
}

/// In the log, the dead letters, the spill, the refused items; at the most talkative level.
#[tokio::test]
async fn what_must_not_be_kept_is_nowhere() {
    for durability in ["memory", "written"] {
        let mut setup = Setup::new().await;
        setup_with(&mut setup, RULES);
        setup.set("DURABILITY", durability).set("DRAIN_TIMEOUT_SECONDS", "1").set("MAX_RETRY_ATTEMPTS", "2");
        setup.set("LOG_LEVEL", "trace,h2=trace,hyper=trace,reqwest=trace,rustls=trace,tonic=trace");
        // One takes everything, one makes a dead letter, one is spilled for.
        setup.sandbox.always(Vendor::Mixpanel, Some("reject-name=Order Placed".parse().unwrap()));
        setup.sandbox.always(Vendor::Segment, Some("503".parse().unwrap()));
        let relay = setup.start().await;
        assert_eq!(
            post(
                &relay,
                "/v1/batch",
                &json!({ "batch": events(), "integrations": { "Amplitude": { "email": EMAIL } } })
            )
            .await,
            200
        );
        taken(&setup, Vendor::Amplitude, 3).await;
        one_is_dead_lettered(&setup, &relay).await;
        relay.metric_is("relay_pii_keys_total", &["\"password\""], 3.0).await;
        relay.metric_is("relay_pii_keys_total", &["\"apikey\""], 3.0).await;
        let mut seen = relay.page("/metrics").await.1;
        seen.push_str(&relay.page("/healthz").await.1);
        let ended = relay.terminate().await;
        ended.logs.iter().for_each(|line| seen.push_str(&line.to_string()));
        let in_output = seen.len();
        everything_below(setup.data_dir(), &mut seen);
        assert!(seen[in_output..].contains(KEPT), "there was something to look through");
        for refused in ["refused-1-0123456789", "refused-2-0123456789"] {
            assert!(seen[in_output..].contains(refused), "the refused item is kept");
        }
        for vendor in Vendor::ALL {
            let bodies = bodies(&setup, vendor);
            assert!(bodies.contains(KEPT), "{} was sent something", vendor.name());
            seen.push_str(&bodies);
        }
        assert_is_nowhere(&CANARIES, &seen);
    }
}

/// Through whatever a provider may do, with calls that are given up, and after a kill.
#[tokio::test]
async fn what_must_not_be_kept_is_nowhere_whatever_goes_wrong() {
    for durability in ["memory", "written"] {
        let mut setup = Setup::new().await;
        setup_with(&mut setup, RULES);
        setup.set("DURABILITY", durability).set("DRAIN_TIMEOUT_SECONDS", "1").set("MAX_RETRY_ATTEMPTS", "2");
        setup.set("REQUEST_TIMEOUT_SECONDS", "0.3").set("BATCH_SIZE", "2");
        setup.set("LOG_LEVEL", "trace,h2=trace,hyper=trace,reqwest=trace,rustls=trace,tonic=trace");
        let mut seen = String::new();
        for fault in FAULTS {
            for vendor in Vendor::ALL {
                setup.sandbox.always(vendor, (!fault.is_empty()).then(|| fault.parse().unwrap()));
            }
            let requests = || Vendor::ALL.map(|vendor| setup.sandbox.requests(vendor).len());
            let before = requests();
            let relay = setup.start().await;
            assert_eq!(post(&relay, "/v1/batch", &json!({ "batch": events() })).await, 200);
            let each_has_more = || requests().iter().zip(before).all(|(now, before)| *now > before);
            eventually(&format!("each is sent something: {fault}"), each_has_more).await;
            seen.push_str(&relay.page("/metrics").await.1);
            seen.push_str(&relay.page("/healthz").await.1);
            let ended = match fault {
                "stall" => {
                    relay.signal("KILL");
                    relay.ended(Instant::now()).await
                }
                _ => relay.terminate().await,
            };
            ended.logs.iter().for_each(|line| seen.push_str(&line.to_string()));
        }
        let in_output = seen.len();
        everything_below(setup.data_dir(), &mut seen);
        assert!(seen[in_output..].contains(KEPT), "there was something to look through");
        for args in [&["check"][..], &["dead-letters", "list"], &["dead-letters", "show"]] {
            let (code, out, err) = setup.run(args).await;
            assert_eq!(code, 0, "{args:?}: {err}");
            seen.push_str(&out);
            seen.push_str(&err);
        }
        for vendor in Vendor::ALL {
            seen.push_str(&bodies(&setup, vendor));
        }
        assert_is_nowhere(&CANARIES, &seen);
    }
}

/// Sends what is taken until what is refused is a dead letter: that is not the provider's
/// trouble if others get through.
async fn one_is_dead_lettered(setup: &Setup, relay: &Relay) {
    for _ in 0..200 {
        let taken_before = setup.sandbox.stats(Vendor::Mixpanel).taken;
        let good = json!({ "event": "good", "userId": "user-9", "properties": { "plan": "pro" } });
        assert_eq!(post(relay, "/v1/track", &good).await, 200);
        taken(setup, Vendor::Mixpanel, taken_before + 1).await;
        if relay.metric("relay_events_total", &["\"mixpanel\"", "\"dead_lettered\""]).await > 0.0 {
            return;
        }
    }
    panic!("it is refused, and no dead letter");
}

#[tokio::test]
async fn each_provider_gets_what_the_rules_leave_for_it() {
    let mut setup = Setup::new().await;
    setup_with(&mut setup, RULES);
    let relay = setup.start().await;
    assert_eq!(post(&relay, "/v1/track", &events()[0]).await, 200);
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 1).await;
    }
    relay.terminate().await;
    let of = |vendor| setup.sandbox.taken(vendor)[0].event.clone();
    let (mixpanel, amplitude, segment) = (of(Vendor::Mixpanel), of(Vendor::Amplitude), of(Vendor::Segment));
    let left = &mixpanel["properties"];
    assert_eq!((&left["note"], left.get("plan")), (&json!(KEPT), None));
    assert_eq!(left["deep"][0]["user"]["E_mail"].as_str().map(str::len), Some(64), "{left}");
    assert_eq!(left["ip"], "203.0.113.0");
    // SHA-256 of +18005550100.
    let phone = "fb4f73a6ec5fdb7077d564cdd22c3554b43ce49168550c3b12c547b78c517b30";
    let left = &amplitude["event_properties"];
    assert_eq!((&left["note"], &left["phone"]), (&json!(KEPT), &json!(phone)));
    assert!(
        left.get("plan").is_none() && left.get("deep").is_none() && amplitude.get("ip").is_none(),
        "{left}"
    );
    assert_eq!(segment["properties"]["phone"], "+1 (800) 555-0100");
    assert_eq!(segment["context"]["traits"].as_object().unwrap().len(), 1);
    assert_eq!(segment["context"]["ip"], "203.0.113.0");
}

/// Who gets it is said when it comes; consent is asked for before `integrations`.
#[tokio::test]
async fn who_does_not_consent_is_not_sent_and_that_is_counted() {
    let mut setup = Setup::new().await;
    let categories = "[consent.categories]\nAdvertising = [\"mixpanel\"]\nAnalytics = [\"amplitude\"]";
    setup_with(&mut setup, categories);
    let relay = setup.start().await;
    let event = |id: &str, context: Value, integrations: Value| {
        json!({ "event": "x", "userId": "u", "messageId": format!("{id}-0123456789abcdef"),
                "context": context, "integrations": integrations })
    };
    let segments = |ads: bool, stats: bool| {
        let preferences = json!({ "Advertising": ads, "Analytics": stats });
        json!({ "consent": { "categoryPreferences": preferences } })
    };
    for event in [
        event("both", segments(true, true), json!({})),
        event("stats", segments(false, true), json!({ "All": true })),
        event("none", json!({ "consent": { "categoryPreferences": {} } }), json!({})),
        event("rudder", json!({ "consentManagement": { "deniedConsentIds": ["Analytics"] } }), json!({})),
        event("unsaid", json!({}), json!({ "Mixpanel": false })),
    ] {
        assert_eq!(post(&relay, "/v1/track", &event).await, 200);
    }
    taken(&setup, Vendor::Segment, 5).await;
    taken(&setup, Vendor::Mixpanel, 2).await;
    taken(&setup, Vendor::Amplitude, 3).await;
    for (vendor, reason, events) in [
        ("mixpanel", "filtered_consent", 2.0),
        ("mixpanel", "audience", 1.0),
        ("amplitude", "filtered_consent", 2.0),
        ("segment", "filtered_consent", 0.0),
    ] {
        let labels =
            [&format!("\"{vendor}\""), "\"not_for\"", &format!("\"{reason}\"")].map(|it: &str| it.to_owned());
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        relay.metric_is("relay_events_total", &labels, events).await;
    }
    let ended = relay.terminate().await;
    assert!(Vendor::ALL.into_iter().all(|vendor| ended.balance(vendor).is_exact()));
    assert_eq!(ended.balance(Vendor::Mixpanel).not_for, 3);
}

/// What became a dead letter under other rules is sent by those of today.
#[tokio::test]
async fn a_replay_obeys_the_rules_of_today() {
    let mut setup = Setup::new().await;
    setup_with(&mut setup, "[providers.mixpanel]\ndeny = [\"plan\"]");
    setup.sandbox.always(Vendor::Mixpanel, Some("reject-name=bad".parse().unwrap()));
    let relay = setup.start().await;
    let event = json!({ "event": "bad", "userId": "u", "messageId": "replayed-0123456789", "properties":
        { "plan": "pro", "note": KEPT, "token": API_KEY, "street": STREET, "nested": { "email": EMAIL } } });
    let good = json!({ "event": "good", "userId": "u", "properties": { "plan": "pro" } });
    for event in [&event, &good] {
        assert_eq!(post(&relay, "/v1/track", event).await, 200);
    }
    one_is_dead_lettered(&setup, &relay).await;
    relay.terminate().await;
    setup.sandbox.always(Vendor::Mixpanel, None);
    let rules = "[global]\ndrop = [\"street\"]\n[pii]\nmode = \"standard\"\n\
                 [providers.mixpanel]\ndeny = [\"note\"]\nhash = { email = \"meta\" }";
    setup_with(&mut setup, rules);
    let (code, out, err) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let sent = setup.sandbox.taken(Vendor::Mixpanel);
    let [good, sent] = ["good", "bad"]
        .map(|name| sent.iter().find(|taken| taken.name == name).unwrap().event["properties"].clone());
    assert!(good.get("plan").is_none(), "{good}");
    assert_eq!(sent["plan"], "pro", "what was denied before is not any more");
    assert_eq!(sent["nested"]["email"].as_str().map(str::len), Some(64), "{sent}");
    assert!(["note", "street", "token"].iter().all(|name| sent.get(name).is_none()), "{sent}");
    assert!(!sent.to_string().contains(API_KEY) && !sent.to_string().contains(EMAIL), "{sent}");
    // A bad file sends nothing.
    setup_with(&mut setup, "[providers.mixpannel]\ndeny = [\"email\"]");
    let (code, _, err) = setup.run(&["dead-letters", "replay"]).await;
    assert!(code == 1 && err.contains("line 1: providers.mixpannel"), "{err}");
}

/// A relay whose rules cannot be read would keep what must not be kept.
#[tokio::test]
async fn bad_rules_are_told_at_once_and_nothing_starts() {
    let mut setup = Setup::new().await;
    setup_with(&mut setup, "[global]\ndrop = 1\ncut = { ip = 24.5 }\n");
    for args in [&["check"][..], &[]] {
        let (code, _, err) = setup.run(args).await;
        assert_eq!(code, 1);
        assert!(err.contains("line 2: global.drop: got 1, want a list of names"), "{err}");
        assert!(err.contains("line 3: global.cut.ip: got 24.5"), "{err}");
    }
    setup_with(&mut setup, RULES);
    let (code, out, err) = setup.run(&["check"]).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(
        out.contains("# privacy: before the log: drop street; hash email (hmac); cut ip (/24, IPv6 /48)"),
        "{out}"
    );
    assert!(out.contains("# privacy: amplitude: only note, phone; hash phone (google)"), "{out}");
    assert!(out.contains("PRIVACY_HASH_KEY=***"), "{out}");
}

#[tokio::test]
async fn the_command_shows_what_each_would_get() {
    let mut setup = Setup::new().await;
    setup_with(&mut setup, &format!("{RULES}\n[consent.categories]\nads = [\"segment\"]"));
    // No key is needed to look.
    for key in ["MIXPANEL_API_KEY", "AMPLITUDE_API_KEY", "SEGMENT_WRITE_KEY"] {
        setup.vars.remove(key);
    }
    let file = setup.data.path().join("event.json");
    let mut event = events().swap_remove(0);
    event["context"]["consentManagement"] = json!({ "deniedConsentIds": ["ads"] });
    fs::write(&file, event.to_string()).unwrap();
    let (code, out, err) = setup.run(&["privacy", "test", file.to_str().unwrap()]).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    for line in [
        "log",
        "  dropped  Pass-Word",
        "  dropped  password",
        "  dropped  STREET",
        "  hashed   E_mail",
        "  cut      ip (2 times)",
        "mixpanel",
        "  dropped  plan",
        "amplitude",
        "  hashed   phone",
        "segment",
        "  gets nothing: filtered_consent",
    ] {
        assert!(out.lines().any(|told| told == line), "{line:?} is not in\n{out}");
    }
    assert!(out.contains("  POST /import") && out.contains("\"$insert_id\""), "{out}");
    assert!([PASSWORD, EMAIL, API_KEY, ADDRESS, STREET].iter().all(|canary| !out.contains(canary)), "{out}");
    assert_eq!(setup.sandbox.stats(Vendor::Mixpanel).requests, 0);
    // Our own form, as the log has it, is read as well.
    let logged = out.lines().nth(out.lines().position(|line| line == "mixpanel").unwrap() - 1).unwrap();
    fs::write(&file, logged).unwrap();
    let (code, again, _) = setup.run(&["privacy", "test", file.to_str().unwrap()]).await;
    assert_eq!(code, 0);
    assert!(again.contains("  dropped  plan"), "{again}");
    fs::write(&file, r#"{"type":"track","userId":"u","event":""}"#).unwrap();
    let (code, _, err) = setup.run(&["privacy", "test", file.to_str().unwrap()]).await;
    assert!(code == 1 && err.contains("event_name: got \"\", want 1 to 255 bytes"), "{err}");
}

/// An event of a page, with all that something is found out by.
fn of_a_page(user_agent: &str) -> Value {
    json!({
        "type": "track", "event": "Order Placed", "userId": "user-1", "messageId": "found-1-0123456789",
        "timestamp": "2026-01-31T12:00:00.000Z",
        "context": {
            "ip": "81.2.69.142", "userAgent": user_agent,
            "page": { "url": "https://shop.example/cart?utm_source=news", "referrer": "https://www.google.com/" }
        }
    })
}

/// What `privacy test` prints below a name: what was done, and the JSON at its end.
fn shown<'a>(out: &'a str, name: &str) -> (Vec<&'a str>, Value) {
    let mut lines: Vec<_> = out.lines().skip_while(|line| *line != name).skip(1).collect();
    let end = lines.iter().position(|line| !line.starts_with("  ")).unwrap_or(lines.len());
    lines.truncate(end);
    let json = lines.pop().and_then(|line| serde_json::from_str(line).ok());
    (lines, json.unwrap_or_else(|| panic!("{name}: {out}")))
}

/// What was found out stands in what each gets, and rules that name it are obeyed: all is as
/// a relay does it that is sent the same.
#[tokio::test]
async fn the_command_finds_out_what_a_running_relay_does() {
    let mut setup = Setup::new().await;
    let database = setup.data.path().join("geo.mmdb");
    let berlin = json!({ "country": { "iso_code": "DE" }, "city": { "names": { "en": "Berlin" } } });
    write_database(&database, "81.2.69.142/32", &berlin);
    setup_with(
        &mut setup,
        "[providers.mixpanel]\ndeny = [\"geo\"]\n[providers.segment]\nhash = { city = \"hmac\" }",
    );
    // The place is found by the whole address, and told where no address is.
    setup.set("GEO_DATABASE", database.to_str().unwrap()).set("IP_STORE", "none");
    setup.set("DURABILITY", "written");
    let file = setup.data.path().join("event.json");
    fs::write(&file, of_a_page(FIREFOX).to_string()).unwrap();
    let (code, out, err) = setup.run(&["privacy", "test", file.to_str().unwrap()]).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let relay = setup.start().await;
    assert_eq!(post(&relay, "/v1/track", &of_a_page(FIREFOX)).await, 200);
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 1).await;
    }

    let (_, log) = shown(&out, "log");
    let enriched = &log["enriched"];
    assert_eq!(
        (&enriched["geo"]["city"], &enriched["agent"]["browser"]),
        (&json!("Berlin"), &json!("Firefox"))
    );
    assert_eq!((&enriched["page"]["host"], &enriched["source"]), (&json!("shop.example"), &json!("news")));
    assert_eq!(*enriched, in_log(&setup, "found-1-0123456789").await["enriched"]);
    for (vendor, done, at, city, bytes) in [
        (Vendor::Mixpanel, "  dropped  geo", "/0", "/properties/$city", None),
        (Vendor::Amplitude, "", "/events/0", "/city", Some("Berlin".len())),
        (Vendor::Segment, "  hashed   city", "/batch/0", "/context/location/city", Some(64)),
    ] {
        let (lines, body) = shown(&out, vendor.name());
        let sent = &setup.sandbox.taken(vendor)[0].event;
        assert_eq!(body.pointer(at), Some(sent), "{vendor:?}");
        assert!(lines.iter().any(|line| line.starts_with(done)), "{vendor:?}: {lines:?}");
        let city = sent.pointer(city).and_then(Value::as_str).map(str::len);
        assert_eq!(city, bytes, "{vendor:?}: {sent}");
    }
    relay.terminate().await;
}

/// What was found out once holds, and what the settings say holds for the command as well.
#[tokio::test]
async fn the_command_finds_out_no_more_than_the_settings_say_and_nothing_twice() {
    let mut setup = Setup::new().await;
    let file = setup.data.path().join("event.json");
    let path = file.to_str().unwrap().to_owned();
    fs::write(&file, of_a_page(GOOGLEBOT).to_string()).unwrap();
    let (_, out, _) = setup.run(&["privacy", "test", &path]).await;
    let (_, log) = shown(&out, "log");
    assert_eq!(log["enriched"]["bot"]["name"], "Googlebot", "{out}");
    shown(&out, "segment");
    setup.set("BOTS", "drop");
    let (_, out, _) = setup.run(&["privacy", "test", &path]).await;
    assert_eq!(out.matches("  gets nothing: bot\n").count(), Vendor::ALL.len() + 1, "and the store: {out}");
    setup.set("BOTS", "mark").set("ENRICH", "page");
    let (_, out, _) = setup.run(&["privacy", "test", &path]).await;
    let enriched = &shown(&out, "log").1["enriched"];
    assert!(enriched["page"].is_object() && enriched.get("bot").is_none(), "{out}");
    assert!(out.starts_with("log\n"), "nothing is left out: {out}");
    // An event of the log is what it is, whatever would be found out about it now.
    setup.set("ENRICH", "all");
    fs::write(&file, log.to_string().replace("Googlebot", "Oldbot")).unwrap();
    let (_, out, _) = setup.run(&["privacy", "test", &path]).await;
    assert_eq!(shown(&out, "log").1["enriched"]["bot"]["name"], "Oldbot", "{out}");
    assert!(out.starts_with("log\n"), "{out}");
    // A browser's event has a session at a relay, which may have begun long ago.
    let mut of_device = of_a_page(FIREFOX);
    of_device["context"]["library"] = json!({ "name": "analytics.js" });
    // What is of now.
    of_device["timestamp"] = json!(null);
    fs::write(&file, of_device.to_string()).unwrap();
    let (_, out, _) = setup.run(&["privacy", "test", &path]).await;
    assert!(shown(&out, "log").1.get("session_id").is_none() && !out.contains("$session_id"), "{out}");
    assert!(out.starts_with("# what goes by who was seen before is not shown: visitor, session\n"), "{out}");
    // What a relay would not start with, the command does not guess without.
    setup.set("GEO_DATABASE", &path);
    let (code, _, err) = setup.run(&["privacy", "test", &path]).await;
    assert!(code == 1 && err.contains("GEO_DATABASE"), "{code} {err}");
}

/// A provider that a program adds to the relay is no slip, and no command can know it.
#[tokio::test]
async fn commands_show_addresses_as_they_are_kept_obey_no_text_and_take_providers_they_do_not_know() {
    let mut setup = Setup::new().await;
    setup_with(&mut setup, "[providers.warehouse]\ndeny = [\"plan\"]");
    setup.set("IP_STORE", "truncate");
    let file = setup.data.path().join("event.json");
    let event = json!({ "type": "track", "event": "x", "userId": "u", "properties": { "note": "to the left \u{202e}" },
                        "context": { "ip": ADDRESS } });
    fs::write(&file, event.to_string()).unwrap();
    let (code, out, err) = setup.run(&["privacy", "test", file.to_str().unwrap()]).await;
    assert_eq!(code, 0, "{err}");
    assert!(!out.contains(ADDRESS) && out.contains("203.0.113.0"), "{out}");
    assert!(!out.contains('\u{202e}') && out.contains("to the left \\u202e"), "{out}");
    assert!(
        out.starts_with("# what goes by who was seen before is not shown: visitor, session\nlog\n"),
        "{out}"
    );
    let warning = "warning: PRIVACY_FILE: line 1: providers.warehouse: \"warehouse\" is not known here";
    assert!(err.starts_with(warning), "{err}");
    let (code, _, err) = setup.run(&["dead-letters", "replay"]).await;
    assert!(code == 0 && err.starts_with(warning), "{code} {err}");
    let (code, out, _) = setup.run(&["check"]).await;
    assert!(code == 0 && out.contains(warning), "{code} {out}");
    let (code, _, err) = setup.run(&[]).await;
    assert!(code == 1 && err.contains("line 1: providers.warehouse: got"), "{code} {err}");
}

#[tokio::test]
async fn a_red_name_is_counted_by_default_and_kept() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let event =
        json!({ "event": "x", "userId": "u", "properties": { "a": { "Access": { "TOKEN": KEPT } } } });
    assert_eq!(post(&relay, "/v1/track", &event).await, 200);
    taken(&setup, Vendor::Segment, 1).await;
    relay.metric_is("relay_pii_keys_total", &["\"token\""], 1.0).await;
    relay.metric_is("relay_pii_keys_total", &[], 1.0).await;
    assert_eq!(setup.sandbox.taken(Vendor::Segment)[0].event["properties"]["a"]["Access"]["TOKEN"], KEPT);
    relay.terminate().await;
}
