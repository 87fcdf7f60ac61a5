//! One suite, every provider, against the sandbox.
//!
//! To add a provider: add it to `Vendor` in the sandbox and in the registry; the
//! rows below run for all of them, and what differs between vendors is asked of
//! `Expect`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::HashSet,
    env,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use analytics_relay_providers::{
    Event, EventId, EventKind, EventParts, Finding, MoreParts, NotFor, Properties, Provider, Rejection,
    Secret, SendError, Verdict,
    amplitude::Amplitude,
    event::{JsonObject, Kind},
    http::Wire,
    mixpanel::{IdentityMode, Mixpanel},
    properties::Limits,
    registry::{self, ProviderSettings},
    sandbox::{Fault, Options, Sandbox, TakenKind, Vendor},
    segment::Segment,
    view::{GroupType, View, ViewName},
};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use serde_json::{Map, Value, json};

const JSON_BYTES_MAX: usize = Limits::DEFAULT.json_bytes_max;
const KEY: &str = "sandbox-key";

fn settings(sandbox: &Sandbox, vendor: Vendor) -> ProviderSettings {
    ProviderSettings {
        vendor,
        key: Secret::new(KEY),
        base_url: sandbox.url().parse().unwrap(),
        request_timeout: Duration::from_millis(500),
        identity_mode: IdentityMode::Simplified,
        min_id_length: 1,
        view: View::default(),
    }
}

async fn start(vendor: Vendor) -> (Sandbox, Arc<dyn Provider>) {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let provider = registry::build(&settings(&sandbox, vendor)).unwrap();
    (sandbox, provider)
}

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

fn track(user: &str, name: &str) -> Event {
    let now_ms = now_ms();
    Event::pack(&EventParts {
        id: EventId::assign(),
        kind: EventKind::Track { name },
        user_id: Some(user),
        anonymous_id: None,
        time_ms: now_ms,
        accepted_ms: now_ms,
        ip: None,
        user_agent: None,
        properties: Properties::parse(r#"{"total":19.5,"gift":false,"list":[1,null]}"#, &Limits::DEFAULT)
            .unwrap(),
        more: None,
    })
}

fn identify(user: &str, traits: &str) -> Event {
    let properties = Properties::parse(traits, &Limits::DEFAULT).unwrap();
    Event::pack(&EventParts { kind: EventKind::Identify, properties, ..track(user, "x").parts() })
}

fn tracks(count: usize) -> Vec<Event> {
    (0..count).map(|i| track(&format!("user-{i}"), "Order Placed")).collect()
}

/// Sends as a lane does: each endpoint's events in a request of their own, and none
/// that is not for the provider.
async fn send_all(provider: &dyn Provider, events: &[Event]) -> Result<Vec<Verdict>, SendError> {
    let mut verdicts = vec![None; events.len()];
    let endpoints: HashSet<_> = events.iter().filter_map(|event| provider.endpoint(event).ok()).collect();
    for endpoint in endpoints {
        let indexes: Vec<_> =
            (0..events.len()).filter(|index| provider.endpoint(&events[*index]) == Ok(endpoint)).collect();
        let batch: Vec<_> = indexes.iter().map(|index| events[*index].clone()).collect();
        for (index, verdict) in indexes.into_iter().zip(provider.send(&batch).await?) {
            verdicts[index] = Some(verdict);
        }
    }
    let is_for = events.iter().map(|event| provider.endpoint(event).is_ok());
    Ok(verdicts.into_iter().zip(is_for).filter(|(_, is_for)| *is_for).map(|(it, _)| it.unwrap()).collect())
}

fn all_delivered(verdicts: &[Verdict]) -> bool {
    verdicts.iter().all(|verdict| *verdict == Verdict::Delivered)
}

#[tokio::test]
async fn tracks_and_identifies_arrive_once_however_often_they_are_sent() {
    for vendor in Vendor::ALL {
        let (sandbox, provider) = start(vendor).await;
        let mut events = tracks(20);
        events.push(identify("user-1", r#"{"plan":"pro"}"#));
        events.push(identify("user-2", r#"{"plan":"pro","legacy":null,"email":"a@b.c"}"#));
        for _ in 0..2 {
            assert!(all_delivered(&send_all(&*provider, &events).await.unwrap()), "{vendor:?}");
        }
        let taken = sandbox.taken(vendor);
        let tracks: Vec<_> = taken.iter().filter(|taken| taken.kind == TakenKind::Track).collect();
        assert_eq!(tracks.len(), 20, "{vendor:?}");
        assert!(tracks.iter().all(|taken| taken.copies == 2 && taken.name == "Order Placed"), "{vendor:?}");
        assert!(taken.iter().any(|taken| taken.kind == TakenKind::Identify), "{vendor:?}");
        assert_eq!(sandbox.stats(vendor).rejected, 0, "{vendor:?}");
    }
}

#[tokio::test]
async fn every_failure_of_a_request_is_named_for_the_next_move() {
    let unavailable = [
        "500",
        "502",
        "503",
        "504",
        "408",
        "429",
        "junk",
        "junk-json",
        "huge-body=3000000",
        "stall",
        "drip=400",
        "reset-before",
        "reset-after",
        "reset-mid-reply",
        "encoded=br",
        "encoded=gzip,gzip",
        // Of the moment, or of something on the way.
        "421",
        "425",
        "460",
        "499",
    ];
    let account = ["401", "402", "403", "407", "451", "511"];
    let address = [
        "404",
        "405",
        "426",
        "431",
        "501",
        "505",
        "301",
        "302",
        "303",
        "308",
        "redirect=http://127.0.0.1:1/",
    ];
    let rows = unavailable
        .map(|fault| (fault, "unavailable"))
        .into_iter()
        .chain(account.map(|fault| (fault, "unauthorized")))
        .chain(address.map(|fault| (fault, "misdirected")))
        .chain([("413", "too large"), ("400", "refused"), ("422", "refused")]);
    for (fault, want) in rows {
        for vendor in Vendor::ALL {
            let (sandbox, provider) = start(vendor).await;
            sandbox.script(vendor, [fault.parse::<Fault>().unwrap()]);
            let error = provider.send(&tracks(3)).await.unwrap_err();
            let got = error.to_string();
            assert!(got.starts_with(want), "{vendor:?} {fault}: {got}");
            assert!(!got.contains(KEY), "{got}");
            assert!(!got.contains(&sandbox.url()), "{got}");
            assert_eq!(
                sandbox.stats(vendor).requests,
                1,
                "{vendor:?} {fault}: nothing is sent again by itself"
            );
            // And the provider works once the fault is over.
            assert!(all_delivered(&provider.send(&tracks(3)).await.unwrap()), "{vendor:?} {fault}");
        }
    }
}

#[tokio::test]
async fn a_provider_that_is_down_is_unavailable() {
    for vendor in Vendor::ALL {
        let (sandbox, provider) = start(vendor).await;
        sandbox.go_down().await;
        let error = provider.send(&tracks(1)).await.unwrap_err();
        assert!(matches!(error, SendError::Unavailable { retry_after: None, .. }), "{vendor:?} {error}");
        sandbox.come_back().await.unwrap();
        assert!(all_delivered(&provider.send(&tracks(1)).await.unwrap()));
    }
}

/// Somebody's error page may be long; its status counts all the same.
#[tokio::test]
async fn a_long_error_page_does_not_hide_its_status() {
    for (code, want) in
        [(404, "misdirected"), (403, "unauthorized"), (413, "too large"), (503, "unavailable")]
    {
        for vendor in Vendor::ALL {
            let (sandbox, provider) = start(vendor).await;
            let body = Some(format!("<html>{}", "x".repeat(3_000_000)));
            sandbox.script(vendor, [Fault::Status { code, retry_after: None, body }]);
            let error = provider.send(&tracks(1)).await.unwrap_err().to_string();
            assert!(
                error.starts_with(want) && error.contains(&code.to_string()),
                "{vendor:?} {code}: {error}"
            );
        }
    }
}

#[tokio::test]
async fn retry_after_is_passed_on() {
    let rows = [
        ("429+retry-after=7", Some(7)),
        ("503+retry-after=7", Some(7)),
        ("429+retry-after=86400", Some(3600)),
        ("429+retry-after=soon", None),
    ];
    for (fault, want) in rows {
        for vendor in Vendor::ALL {
            let (sandbox, provider) = start(vendor).await;
            sandbox.script(vendor, [fault.parse::<Fault>().unwrap()]);
            match provider.send(&tracks(1)).await.unwrap_err() {
                SendError::Unavailable { retry_after, .. } => {
                    assert_eq!(retry_after, want.map(Duration::from_secs), "{vendor:?} {fault}");
                }
                error => panic!("{vendor:?} {fault}: {error}"),
            }
        }
    }
}

#[tokio::test]
async fn a_wrong_key_is_not_the_events_fault_where_the_vendor_tells() {
    for vendor in Vendor::ALL {
        let sandbox = Sandbox::start(Options::default()).await.unwrap();
        let wrong = ProviderSettings { key: Secret::new("canary-key"), ..settings(&sandbox, vendor) };
        let provider = registry::build(&wrong).unwrap();
        for event in [track("u", "x"), identify("u", r#"{"plan":"pro"}"#)] {
            // Mixpanel's /engage says nothing either, so /import is asked before.
            let is_told = vendor != Vendor::Segment;
            let lost = sandbox.stats(vendor).rejected;
            match provider.send(&[event]).await {
                Err(error) => {
                    assert!(is_told && matches!(error, SendError::Unauthorized { .. }), "{vendor:?} {error}");
                    assert!(!error.to_string().contains("canary-key"), "{error}");
                }
                // What nobody can see in the answer: `check --connect`, and a key's form,
                // are there for it.
                Ok(verdicts) => {
                    assert!(!is_told && all_delivered(&verdicts), "{vendor:?} {verdicts:?}");
                    assert_eq!(sandbox.stats(vendor).rejected, lost + 1, "{vendor:?}");
                }
            }
        }
        assert!(sandbox.taken(vendor).is_empty());
    }
}

/// Whichever endpoint hears of it: the other one is not believed any more.
#[tokio::test]
async fn mixpanels_import_is_asked_about_the_token_before_an_identify_and_after_a_refusal() {
    let paths = |sandbox: &Sandbox| -> Vec<String> {
        sandbox.requests(Vendor::Mixpanel).into_iter().map(|seen| seen.path).collect()
    };
    let plan = || [identify("user-1", r#"{"plan":"pro"}"#)];
    let (sandbox, provider) = start(Vendor::Mixpanel).await;
    for _ in 0..2 {
        assert!(all_delivered(&provider.send(&plan()).await.unwrap()));
    }
    assert_eq!(paths(&sandbox), ["/import", "/engage", "/engage"]);

    sandbox.script(Vendor::Mixpanel, ["401", "401"].map(|fault| fault.parse().unwrap()));
    assert!(matches!(provider.send(&tracks(1)).await, Err(SendError::Unauthorized { .. })));
    assert!(matches!(provider.send(&plan()).await, Err(SendError::Unauthorized { .. })));
    assert!(all_delivered(&provider.send(&plan()).await.unwrap()));
    assert_eq!(paths(&sandbox)[3..], ["/import", "/import", "/import", "/engage"]);

    // No answer, and somebody else's, is none: the identify waits, and it is asked again.
    for fault in ["stall", "503", "429", "junk"] {
        let (sandbox, provider) = start(Vendor::Mixpanel).await;
        sandbox.script(Vendor::Mixpanel, [fault.parse().unwrap()]);
        let answer = provider.send(&plan()).await;
        assert!(matches!(answer, Err(SendError::Unavailable { .. })), "{fault}: {answer:?}");
        assert!(all_delivered(&provider.send(&plan()).await.unwrap()));
        assert_eq!(paths(&sandbox), ["/import", "/import", "/engage"], "{fault}");
    }
    // A path that is closed closes the other one not.
    let (sandbox, provider) = start(Vendor::Mixpanel).await;
    sandbox.script(Vendor::Mixpanel, ["404".parse().unwrap()]);
    assert!(all_delivered(&provider.send(&plan()).await.unwrap()));
    assert_eq!(paths(&sandbox), ["/import", "/engage"]);

    // And a track that is taken has told.
    let (sandbox, provider) = start(Vendor::Mixpanel).await;
    assert!(all_delivered(&provider.send(&tracks(1)).await.unwrap()));
    assert!(all_delivered(&provider.send(&plan()).await.unwrap()));
    assert_eq!(paths(&sandbox), ["/import", "/engage"]);
}

/// A proxy, a portal or a maintenance page says OK in many ways.
#[tokio::test]
async fn only_the_vendors_own_success_that_counts_every_event_is_a_delivery() {
    let strangers = [
        "",
        "1",
        "{}",
        "[]",
        "[1]",
        r#"[1,""]"#,
        "[true]",
        "[200,3]",
        r#"[200,"OK",3,[]]"#,
        "\"OK\"",
        "true",
        r#"{"status":"maintenance"}"#,
        r#"{"status":"OK"}"#,
        r#"{"code":200}"#,
        r#"{"code":200,"status":"OK"}"#,
        r#"{"code":200,"status":"OK","num_records_imported":2}"#,
        r#"{"code":200,"status":"OK","num_records_imported":4}"#,
        r#"{"code":200,"status":"Down","num_records_imported":3}"#,
        r#"{"code":503,"status":"OK","num_records_imported":3}"#,
        r#"{"status":"OK","num_records_imported":3}"#,
        r#"{"code":200,"events_ingested":2}"#,
        r#"{"code":200,"events_ingested":"3"}"#,
        r#"{"events_ingested":3}"#,
        r#"{"success":false}"#,
        r#"{"success":"true"}"#,
        r#"{"success":true,"error":"moved"}"#,
        r#"{"status":2,"error":null}"#,
        r#"{"status":1,"error":"moved"}"#,
    ];
    for body in strangers {
        for vendor in Vendor::ALL {
            let identifies = (0..3).map(|i| identify(&format!("user-{i}"), r#"{"plan":"pro"}"#)).collect();
            for events in [tracks(3), identifies] {
                let is_engage = vendor == Vendor::Mixpanel && events[0].is_identify();
                if is_engage && body == "1" {
                    continue;
                }
                let (sandbox, provider) = start(vendor).await;
                assert!(all_delivered(&provider.send(&events).await.unwrap()), "{vendor:?}: its own is");
                let body = (!body.is_empty()).then(|| body.to_owned());
                let says = body.clone().unwrap_or_default();
                let body = body.or(Some(String::new()));
                sandbox.script(vendor, [Fault::Status { code: 200, retry_after: None, body }]);
                match provider.send(&events).await {
                    Err(SendError::Unavailable { detail, .. }) => {
                        assert!(detail.contains(&says), "{vendor:?}: {detail}");
                    }
                    answer => panic!("{vendor:?} {says:?}: {answer:?}"),
                }
                assert!(
                    all_delivered(&provider.send(&events).await.unwrap()),
                    "{vendor:?}: and then it goes"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed_and_named_without_its_query() {
    for vendor in Vendor::ALL {
        let (sandbox, provider) = start(vendor).await;
        let location = "https://user:canary@login.example:8443/sso?back=canary#canary";
        sandbox.script(vendor, [Fault::Redirect { location: location.into() }]);
        let SendError::Misdirected { detail } = provider.send(&tracks(1)).await.unwrap_err() else {
            panic!("{vendor:?}");
        };
        assert!(detail.contains("307") && detail.contains("https://login.example:8443/sso"), "{detail}");
        assert!(!detail.contains("canary"), "{detail}");
        assert_eq!(sandbox.stats(vendor).requests, 1);
    }
}

#[tokio::test]
async fn an_answer_that_something_on_the_way_compressed_is_read() {
    for vendor in Vendor::ALL {
        let (sandbox, provider) = start(vendor).await;
        sandbox.always(vendor, Some(Fault::Encoded { coding: "gzip".into() }));
        assert!(all_delivered(&provider.send(&tracks(3)).await.unwrap()), "{vendor:?}");
        assert!(sandbox.taken(vendor).iter().all(|taken| taken.copies == 1));
    }
}

/// Mixpanel puts the time of arrival in the place of one that is ahead, and knows an
/// event again by its time.
#[tokio::test]
async fn an_event_from_ahead_is_the_same_event_at_each_attempt() {
    for vendor in Vendor::ALL {
        let (sandbox, provider) = start(vendor).await;
        let now_ms = now_ms();
        let minutes = [0, 1, 30, 54, 56, 24 * 60];
        let events: Vec<_> = minutes
            .iter()
            .map(|ahead| {
                let event = track("u", "x");
                Event::pack(&EventParts { time_ms: now_ms + ahead * 60_000, ..event.parts() })
            })
            .collect();
        for _ in 0..3 {
            assert!(all_delivered(&provider.send(&events).await.unwrap()), "{vendor:?}");
            // The vendor's clock goes on.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let copies: Vec<_> = sandbox.taken(vendor).iter().map(|taken| taken.copies).collect();
        assert_eq!(copies, vec![3; minutes.len()], "{vendor:?}");
    }
}

#[tokio::test]
async fn the_largest_request_that_the_limits_allow_is_taken() {
    for vendor in Vendor::ALL {
        let (sandbox, provider) = start(vendor).await;
        let limits = provider.limits();
        let mut bytes = 0;
        let full: Vec<_> = tracks(limits.events_max)
            .into_iter()
            .take_while(|event| {
                bytes += event.wire_bytes_estimate();
                bytes <= limits.body_bytes_max
            })
            .collect();
        assert!(all_delivered(&provider.send(&full).await.unwrap()), "{vendor:?}");
        assert_eq!(sandbox.taken(vendor).len(), full.len());
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_not_even_sent() {
    for vendor in Vendor::ALL {
        let (sandbox, provider) = start(vendor).await;
        let text = "x".repeat(JSON_BYTES_MAX - 100);
        let json = json!({ "text": text }).to_string();
        let properties = Properties::parse(&json, &Limits::DEFAULT).unwrap();
        let large = Event::pack(&EventParts { properties, ..track("u", "x").parts() });
        let count = provider.limits().body_bytes_max / JSON_BYTES_MAX + 20;
        let batch: Vec<_> = std::iter::repeat_n(large, count).collect();
        let error = provider.send(&batch).await.unwrap_err();
        assert!(matches!(error, SendError::TooLarge { .. }), "{vendor:?} {error}");
        assert_eq!(sandbox.stats(vendor).requests, 0);
    }
}

/// What Mixpanel's 400 means is not what Amplitude's means.
#[tokio::test]
async fn a_partial_failure_is_read_as_its_vendor_means_it() {
    for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
        let (sandbox, provider) = start(vendor).await;
        sandbox.always(vendor, Some(Fault::RejectNames { name: "bad".into() }));
        let events: Vec<_> = ["good", "bad", "good"].iter().map(|name| track("u", name)).collect();
        let verdicts = provider.send(&events).await.unwrap();
        assert!(matches!(&verdicts[1], Verdict::Rejected { reason: Rejection::Invalid, .. }), "{vendor:?}");
        let (others, taken) = match vendor {
            // The others were taken: sending them again would double them.
            Vendor::Mixpanel => (Verdict::Delivered, 2),
            // Nothing was taken: not sending them again would lose them.
            _ => (Verdict::Resend, 0),
        };
        assert_eq!((&verdicts[0], &verdicts[2]), (&others, &others), "{vendor:?}");
        assert_eq!(sandbox.taken(vendor).len(), taken, "{vendor:?}");
    }
}

/// The longest answer there is must not be taken for a failure of the whole.
#[tokio::test]
async fn a_full_batch_in_which_every_event_is_refused_is_read_to_its_end() {
    let patient = async |vendor| {
        let sandbox = Sandbox::start(Options::default()).await.unwrap();
        let request_timeout = Duration::from_secs(30);
        let settings = ProviderSettings { request_timeout, ..settings(&sandbox, vendor) };
        (sandbox, registry::build(&settings).unwrap())
    };
    for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
        let (sandbox, provider) = patient(vendor).await;
        sandbox.always(vendor, Some(Fault::RejectEvents { every: 1 }));
        let events = tracks(provider.limits().events_max);
        let verdicts = provider.send(&events).await.unwrap();
        assert_eq!(verdicts.len(), events.len());
        assert!(verdicts.iter().all(|verdict| matches!(verdict, Verdict::Rejected { .. })), "{vendor:?}");
    }
    let (sandbox, provider) = patient(Vendor::Amplitude).await;
    let users: Vec<String> = (0..1000).map(|i| format!("{i}{}", "x".repeat(250))).collect();
    let events: Vec<_> = users.iter().map(|user| track(user, "x")).collect();
    sandbox.always(Vendor::Amplitude, Some(Fault::ThrottleUsers { users }));
    let verdicts = provider.send(&events).await.unwrap();
    assert!(verdicts.iter().all(|verdict| matches!(verdict, Verdict::Hold { .. })));
}

#[tokio::test]
async fn amplitude_holds_back_only_the_users_that_it_throttles() {
    let (sandbox, provider) = start(Vendor::Amplitude).await;
    let events: Vec<_> = ["slow", "quick"].iter().map(|user| track(user, "x")).collect();
    sandbox.script(Vendor::Amplitude, [Fault::ThrottleUsers { users: vec!["slow".into()] }]);
    let verdicts = provider.send(&events).await.unwrap();
    assert!(matches!(&verdicts[0], Verdict::Hold { after, .. } if *after == Duration::from_secs(15)));
    assert_eq!(verdicts[1], Verdict::Resend);

    sandbox.script(Vendor::Amplitude, [Fault::DailyQuota { users: vec!["slow".into()] }]);
    let verdicts = provider.send(&events).await.unwrap();
    assert!(matches!(&verdicts[0], Verdict::Rejected { reason: Rejection::QuotaExceeded, .. }));

    sandbox.script(Vendor::Amplitude, [Fault::SilenceDevices { devices: vec!["dev".into()] }]);
    let silenced = Event::pack(&EventParts { anonymous_id: Some("dev"), ..track("u", "x").parts() });
    let verdicts = provider.send(&[silenced, events[1].clone()]).await.unwrap();
    assert!(matches!(&verdicts[0], Verdict::Rejected { reason: Rejection::Invalid, .. }));
    assert_eq!(verdicts[1], Verdict::Resend);
}

#[tokio::test]
async fn both_identity_modes_of_mixpanel_are_taken() {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let mut users = Vec::new();
    for identity_mode in [IdentityMode::Simplified, IdentityMode::Original] {
        let settings = ProviderSettings { identity_mode, ..settings(&sandbox, Vendor::Mixpanel) };
        let provider = registry::build(&settings).unwrap();
        let anonymous_id = Some("device-1");
        let anonymous = Event::pack(&EventParts { user_id: None, anonymous_id, ..track("", "x").parts() });
        assert!(all_delivered(&provider.send(&[anonymous]).await.unwrap()));
        users.push(sandbox.taken(Vendor::Mixpanel).pop().unwrap().user);
    }
    assert_eq!(users, ["$device:device-1", "device-1"]);
}

// Kinds beside track and identify, and contexts.

const PAGE: EventKind<'_> = EventKind::Page { name: None, category: None };
const HOME: EventKind<'_> = EventKind::Page { name: Some("Home"), category: None };
const GROUP: EventKind<'_> = EventKind::Group { group_id: "g1" };

fn of_kind(kind: EventKind<'_>, properties: Value, context: Value) -> Event {
    let [properties, context] = [properties, context].map(|object| object.to_string());
    let context = (context != "{}").then(|| JsonObject::parse(&context, &Limits::DEFAULT).unwrap());
    let more = MoreParts { context, ..MoreParts::default() };
    let properties = Properties::parse(&properties, &Limits::DEFAULT).unwrap();
    Event::pack(&EventParts { kind, properties, more: more.if_any(), ..track("user-1", "x").parts() })
}

fn viewed(page_name: &str, screen_name: &str, group_type: &str) -> View {
    let [page_name, screen_name] = [page_name, screen_name].map(|text| ViewName::parse(text).unwrap());
    View { page_name, screen_name, group_type: GroupType::parse(group_type).ok() }
}

fn of_companies() -> View {
    viewed("Loaded a Page", "Loaded a Screen", "company")
}

async fn start_with(vendor: Vendor, view: View, identity_mode: IdentityMode) -> (Sandbox, Arc<dyn Provider>) {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let settings = ProviderSettings { view, identity_mode, ..settings(&sandbox, vendor) };
    let provider = registry::build(&settings).unwrap();
    (sandbox, provider)
}

/// What the vendor took of one event that was sent to it twice, as it was received.
async fn taken(vendor: Vendor, view: View, event: &Event) -> Vec<Value> {
    let (sandbox, provider) = start_with(vendor, view, IdentityMode::Original).await;
    for _ in 0..2 {
        let verdicts = send_all(&*provider, std::slice::from_ref(event)).await.unwrap();
        assert_eq!(verdicts, [Verdict::Delivered], "{vendor:?}");
    }
    assert_eq!(sandbox.stats(vendor).rejected, 0, "{vendor:?}");
    let taken = sandbox.taken(vendor);
    // Mixpanel applies an update of a profile as often as it comes.
    let known_again = taken.iter().filter(|taken| taken.copies == 2).count();
    assert!(known_again == taken.len() || known_again == 0 && vendor == Vendor::Mixpanel, "{taken:?}");
    let once = if known_again == 0 { taken.len() / 2 } else { taken.len() };
    taken.into_iter().take(once).map(|taken| taken.event).collect()
}

/// The name and the properties of the track that an event becomes.
async fn seen(vendor: Vendor, view: View, event: &Event) -> (Value, Value) {
    let mut taken = taken(vendor, view, event).await;
    assert_eq!(taken.len(), 1, "{vendor:?}");
    let (name, properties) = match vendor {
        Vendor::Mixpanel => ("event", "properties"),
        Vendor::Amplitude => ("event_type", "event_properties"),
        Vendor::Segment => ("name", "properties"),
    };
    (taken[0][name].take(), taken[0][properties].take())
}

#[tokio::test]
async fn a_page_is_an_event_of_one_name_with_the_page_among_its_properties() {
    let page = of_kind(HOME, json!({"url": "https://x.io/p"}), json!({}));
    for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
        let (name, properties) = seen(vendor, View::default(), &page).await;
        assert_eq!((&name, &properties["name"]), (&json!("Loaded a Page"), &json!("Home")), "{vendor:?}");
        assert_eq!(properties["url"], "https://x.io/p", "{vendor:?}");
        let url = (vendor == Vendor::Mixpanel).then(|| json!("https://x.io/p"));
        assert_eq!(properties.get("$current_url"), url.as_ref(), "{vendor:?}");

        // A caller's own property wins, and a context fills the gaps.
        let page = of_kind(
            EventKind::Page { name: Some("B"), category: Some("Docs") },
            json!({"name": "A"}),
            json!({"page": {"referrer": "https://g.co/s", "name": "never"}}),
        );
        let (_, properties) = seen(vendor, View::default(), &page).await;
        let [name, category, referrer] = ["name", "category", "referrer"].map(|name| &properties[name]);
        assert_eq!((name, category, referrer), (&json!("A"), &json!("Docs"), &json!("https://g.co/s")));
        let domain = (vendor == Vendor::Mixpanel).then(|| json!("g.co"));
        assert_eq!(properties.get("$referring_domain"), domain.as_ref(), "{vendor:?}");
        let taken = &taken(Vendor::Segment, View::default(), &page).await[0];
        assert_eq!((&taken["name"], &taken["properties"]["name"]), (&json!("B"), &json!("A")));
    }
}

#[tokio::test]
async fn a_page_and_a_screen_are_called_as_the_operator_says() {
    let view = || viewed("Viewed {category} {name} Page", "{name}", "");
    let screen = EventKind::Screen { name: Some("[Amplitude] X"), category: None };
    for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
        let name =
            async |kind, properties| seen(vendor, view(), &of_kind(kind, properties, json!({}))).await.0;
        assert_eq!(name(HOME, json!({})).await, "Viewed Home Page", "{vendor:?}");
        assert_eq!(name(PAGE, json!({})).await, "Loaded a Page", "{vendor:?}");
        let both = EventKind::Page { name: Some("Home"), category: Some("Docs") };
        assert_eq!(name(both, json!({})).await, "Viewed Docs Home Page", "{vendor:?}");
        assert_eq!(name(PAGE, json!({"name": "Home"})).await, "Viewed Home Page", "{vendor:?}");
        let want = if vendor == Vendor::Amplitude { "event_[Amplitude] X" } else { "[Amplitude] X" };
        assert_eq!(name(screen, json!({})).await, want, "what a vendor reserves it does not get");
    }
}

#[tokio::test]
async fn a_page_and_a_screen_may_be_called_as_the_vendors_own_sdks_call_them() {
    let view = || viewed("vendor", "vendor", "");
    let page = of_kind(HOME, json!({"url": "https://x.io/p?q=1"}), json!({"page": {"title": "T"}}));
    let (name, found) = seen(Vendor::Amplitude, view(), &page).await;
    assert_eq!(name, "[Amplitude] Page Viewed");
    for (name, want) in [
        ("Domain", "x.io"),
        ("Location", "https://x.io/p?q=1"),
        ("Path", "/p"),
        ("Title", "T"),
        ("URL", "https://x.io/p"),
    ] {
        assert_eq!(found[format!("[Amplitude] Page {name}")], want, "{name}");
    }
    assert!(!found.to_string().contains("Counter") && !found.to_string().contains("View ID"), "{found}");

    let (name, found) = seen(Vendor::Mixpanel, view(), &page).await;
    assert_eq!((&name, &found["current_url_search"]), (&json!("$mp_web_page_view"), &json!("?q=1")));
    assert_eq!(found["name"], "Home");

    let screen = EventKind::Screen { name: Some("Home"), category: None };
    let screen = of_kind(screen, json!({}), json!({}));
    let (name, found) = seen(Vendor::Amplitude, view(), &screen).await;
    assert_eq!(
        (&name, &found["[Amplitude] Screen Name"]),
        (&json!("[Amplitude] Screen Viewed"), &json!("Home"))
    );
    assert_eq!(seen(Vendor::Mixpanel, view(), &screen).await.0, "Loaded a Screen", "it has none of its own");
}

#[tokio::test]
async fn a_context_has_each_vendors_own_names() {
    let context = json!({"app": {"version": "2.1"}, "os": {"name": "iOS"}, "device": {"id": "never"},
        "campaign": {"name": "spring", "source": "mail"}});
    let screen = EventKind::Screen { name: None, category: None };
    for kind in [screen, EventKind::Track { name: "x" }] {
        let event = of_kind(kind, json!({"$os": "own"}), context.clone());
        let (_, found) = seen(Vendor::Mixpanel, View::default(), &event).await;
        assert_eq!((&found["$app_version_string"], &found["$os"]), (&json!("2.1"), &json!("own")));
        assert_eq!((&found["utm_campaign"], &found["utm_source"]), (&json!("spring"), &json!("mail")));
        let found = &taken(Vendor::Amplitude, View::default(), &event).await[0];
        assert_eq!((&found["app_version"], &found["os_name"]), (&json!("2.1"), &json!("iOS")));
        let properties = json!({"$os": "own", "utm_campaign": "spring", "utm_source": "mail"});
        assert_eq!((&found["event_properties"], found.get("user_properties")), (&properties, None));
        assert!(found.get("device_id").is_none(), "a device of the context's would join people");
        let found = &taken(Vendor::Segment, View::default(), &event).await[0];
        assert_eq!(found["context"]["campaign"], context["campaign"]);
    }
    // What an identify says of its user is what the caller said.
    let event = of_kind(EventKind::Identify, json!({"plan": "pro"}), context);
    let found = taken(Vendor::Mixpanel, View::default(), &event).await;
    assert_eq!((found.len(), &found[0]["$set"]), (1, &json!({"plan": "pro"})));
    let found = &taken(Vendor::Amplitude, View::default(), &event).await[0];
    assert_eq!(found["user_properties"], json!({"$set": {"plan": "pro"}}));
    assert_eq!(found["os_name"], "iOS");
}

#[tokio::test]
async fn a_group_is_what_is_known_of_it_and_who_belongs_to_it() {
    let group = of_kind(GROUP, json!({"plan": "pro", "old": null}), json!({}));
    let found = taken(Vendor::Mixpanel, of_companies(), &group).await;
    let record = |operation: &str, operand: Value| json!({"$token": KEY, "$group_key": "company", "$group_id": "g1", operation: operand});
    assert_eq!(found, [record("$set", json!({"plan": "pro"})), record("$unset", json!(["old"]))]);

    let found = taken(Vendor::Amplitude, of_companies(), &group).await;
    let [known, member] = &found[..] else { panic!("{found:?}") };
    assert_eq!(
        (&known["event_type"], &member["event_type"]),
        (&json!("$groupidentify"), &json!("$identify"))
    );
    assert_eq!(known["group_properties"], json!({"$set": {"plan": "pro"}, "$unset": {"old": "-"}}));
    assert_eq!(member["user_properties"], json!({"$set": {"company": "g1"}}));
    assert_eq!((&known["groups"], &member["groups"]), (&json!({"company": "g1"}), &known["groups"]));
    assert_ne!(known["insert_id"], member["insert_id"]);

    let found = &taken(Vendor::Segment, of_companies(), &group).await[0];
    assert_eq!((&found["groupId"], &found["traits"]), (&json!("g1"), &json!({"plan": "pro", "old": null})));
}

#[tokio::test]
async fn what_a_vendor_has_no_form_for_is_not_for_it() {
    let group = of_kind(GROUP, json!({"plan": "pro"}), json!({}));
    let says_nothing = of_kind(GROUP, json!({}), json!({}));
    let alias = of_kind(EventKind::Alias { previous_id: "u0" }, json!({}), json!({}));
    for vendor in Vendor::ALL {
        let why = async |view, event| {
            let (_sandbox, provider) = start_with(vendor, view, IdentityMode::Simplified).await;
            provider.endpoint(event).err()
        };
        let unless_segment = |reason| (vendor != Vendor::Segment).then_some(reason);
        assert_eq!(why(View::default(), &group).await, unless_segment(NotFor::NoGroupType), "{vendor:?}");
        assert_eq!(why(of_companies(), &group).await, None, "{vendor:?}");
        let nothing = (vendor == Vendor::Mixpanel).then_some(NotFor::NothingToSet);
        assert_eq!(why(of_companies(), &says_nothing).await, nothing, "{vendor:?}");
        assert_eq!(why(of_companies(), &alias).await, unless_segment(NotFor::UnsupportedKind), "{vendor:?}");
    }
}

#[tokio::test]
async fn an_event_belongs_to_the_group_of_its_context() {
    let of_group = || json!({"groupId": "g1"});
    let event = of_kind(EventKind::Track { name: "x" }, json!({}), of_group());
    let (_, found) = seen(Vendor::Mixpanel, of_companies(), &event).await;
    assert_eq!(found["company"], json!(["g1"]));
    let found = &taken(Vendor::Amplitude, of_companies(), &event).await[0];
    assert_eq!(found["groups"], json!({"company": "g1"}));
    // Of no type, of none.
    assert_eq!(seen(Vendor::Mixpanel, View::default(), &event).await.1.get("company"), None);
    assert_eq!(taken(Vendor::Amplitude, View::default(), &event).await[0].get("groups"), None);

    let event = of_kind(EventKind::Identify, json!({"plan": "pro"}), of_group());
    let found = taken(Vendor::Mixpanel, of_companies(), &event).await;
    assert_eq!(
        (&found[0]["$set"], &found[1]["$union"]),
        (&json!({"plan": "pro"}), &json!({"company": ["g1"]}))
    );
    let found = &taken(Vendor::Amplitude, of_companies(), &event).await[0];
    assert_eq!(found["user_properties"], json!({"$set": {"plan": "pro", "company": "g1"}}));
    assert_eq!(found["groups"], json!({"company": "g1"}));
}

#[tokio::test]
async fn an_alias_is_one_for_segment_and_for_mixpanels_original_id_merge() {
    let alias = of_kind(EventKind::Alias { previous_id: "u0" }, json!({}), json!({}));
    let found = &taken(Vendor::Mixpanel, View::default(), &alias).await[0];
    let properties = json!({"distinct_id": "u0", "alias": "user-1", "token": KEY});
    assert_eq!(*found, json!({"event": "$create_alias", "properties": properties}));
    let found = &taken(Vendor::Segment, View::default(), &alias).await[0];
    assert_eq!((&found["previousId"], &found["userId"]), (&json!("u0"), &json!("user-1")));
}

/// Delivered only if both of its records are.
#[tokio::test]
async fn a_group_of_which_amplitude_refuses_a_record_is_dead_and_the_others_go_again() {
    let groups = [1, 2].map(|plan| of_kind(GROUP, json!({"plan": plan}), json!({})));
    for (index, dead) in [(0, 0), (1, 0), (2, 1), (3, 1)] {
        let (sandbox, provider) =
            start_with(Vendor::Amplitude, of_companies(), IdentityMode::Simplified).await;
        let body = json!({"code": 400, "error": "bad", "events_with_invalid_fields": {"groups": [index]}});
        let fault = Fault::Status { code: 400, retry_after: None, body: Some(body.to_string()) };
        sandbox.script(Vendor::Amplitude, [fault]);
        let verdicts = provider.send(&groups).await.unwrap();
        assert!(
            matches!(&verdicts[dead], Verdict::Rejected { reason: Rejection::Invalid, .. }),
            "{verdicts:?}"
        );
        assert_eq!(verdicts[1 - dead], Verdict::Resend);
        assert!(sandbox.taken(Vendor::Amplitude).is_empty());
        assert!(all_delivered(&provider.send(&groups[1 - dead..][..1]).await.unwrap()));
        assert_eq!(sandbox.taken(Vendor::Amplitude).len(), 2, "both of its records");
    }
}

/// Mixpanel's other endpoints take any token, so `/import` is asked before.
#[tokio::test]
async fn groups_and_aliases_under_a_wrong_token_are_not_called_delivered() {
    for kind in [GROUP, EventKind::Alias { previous_id: "u0" }] {
        let sandbox = Sandbox::start(Options::default()).await.unwrap();
        let wrong = ProviderSettings {
            key: Secret::new("canary-key"),
            view: of_companies(),
            identity_mode: IdentityMode::Original,
            ..settings(&sandbox, Vendor::Mixpanel)
        };
        let provider = registry::build(&wrong).unwrap();
        let answer = provider.send(&[of_kind(kind, json!({"plan": "pro"}), json!({}))]).await;
        assert!(matches!(answer, Err(SendError::Unauthorized { .. })), "{answer:?}");
        assert!(sandbox.taken(Vendor::Mixpanel).is_empty());
    }
}

#[tokio::test]
async fn a_try_of_the_way_asks_each_endpoint_that_is_used() {
    let paths = async |view, identity_mode| -> Vec<String> {
        let (sandbox, provider) = start_with(Vendor::Mixpanel, view, identity_mode).await;
        let steps = provider.probe().await;
        assert!(steps.iter().all(|step| step.finding == Finding::Ok), "{steps:?}");
        assert!(sandbox.taken(Vendor::Mixpanel).is_empty());
        let mut paths: Vec<_> =
            sandbox.requests(Vendor::Mixpanel).into_iter().map(|seen| seen.path).collect();
        paths.sort();
        paths.dedup();
        paths
    };
    assert_eq!(paths(View::default(), IdentityMode::Simplified).await, ["/engage", "/import"]);
    assert_eq!(
        paths(of_companies(), IdentityMode::Original).await,
        ["/engage", "/groups", "/import", "/track"]
    );
}

// Any event that admission accepts.

fn any_id() -> impl Strategy<Value = Option<String>> {
    prop_oneof![
        2 => Just(None),
        4 => "[a-z0-9-]{1,40}".prop_map(Some),
        1 => "\\PC{1,60}".prop_map(Some),
        1 => Just(Some("x".repeat(255))),
        1 => prop::sample::select(vec![
            "anonymous", "null", "0", "undefined", "lmy47d", "true", "[]", "{}", "n/a",
            "00000000-0000-0000-0000-000000000000",
        ]).prop_map(|id| Some(id.to_owned())),
    ]
}

fn any_name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[A-Za-z ]{1,40}",
        1 => "\\PC{1,60}",
        1 => Just("\u{0}\u{1b}[31m\"\\".to_owned()),
        1 => Just("x".repeat(255)),
        1 => prop::sample::select(vec![
            "$identify", "$groupidentify", "$merge", "$create_alias", "revenue_amount", "[Amplitude] Page Viewed",
        ]).prop_map(str::to_owned),
    ]
}

fn any_key() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => "[a-z_$]{1,10}",
        1 => "\\PC{1,20}",
        1 => (250_usize..400).prop_map(|bytes| "k".repeat(bytes)),
        2 => prop::sample::select(vec![
            "time", "distinct_id", "$insert_id", "$device_id", "$user_id", "ip", "token", "mp_x", "$ignore",
            "bucket", "alias", "$distinct_ids", "email", "$email", "name", "property_time", "more_properties",
        ]).prop_map(str::to_owned),
    ]
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        2 => Just(Value::Null),
        2 => any::<bool>().prop_map(Value::from),
        2 => any::<i64>().prop_map(Value::from),
        2 => prop::num::f64::NORMAL.prop_map(Value::from),
        4 => "\\PC{0,20}".prop_map(Value::from),
        1 => (200_usize..9000).prop_map(|bytes| Value::from("v".repeat(bytes))),
        1 => (250_usize..2000).prop_map(|items| Value::from(vec![1; items])),
        1 => (1_u32..15).prop_map(|levels| (0..levels).fold(json!(1), |inner, _| json!({ "in": inner }))),
    ];
    leaf.prop_recursive(4, 30, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(any_key(), inner, 0..5).prop_map(|fields| json!(fields)),
        ]
    })
}

fn any_properties() -> impl Strategy<Value = Properties<'static>> {
    let some = prop::collection::btree_map(any_key(), any_value(), 0..12);
    let many = (240_usize..=256).prop_map(|keys| (0..keys).map(|i| (format!("k{i}"), json!(i))).collect());
    prop_oneof![9 => some, 1 => many].prop_filter_map("over admission's limits", |fields| {
        let json = Value::Object(fields.into_iter().collect::<Map<_, _>>()).to_string();
        Properties::parse(&json, &Limits::DEFAULT).ok().map(Properties::into_owned)
    })
}

/// A context as SDKs send it, one with anything in its places, or none.
fn any_context() -> impl Strategy<Value = Option<JsonObject<'static>>> {
    let sections = prop::sample::select(vec![
        "page", "campaign", "os", "browser", "device", "app", "screen", "network", "location", "library",
    ]);
    let fields = prop::sample::select(vec![
        "url",
        "path",
        "referrer",
        "title",
        "search",
        "name",
        "version",
        "source",
        "type",
        "id",
        "country",
        "city",
        "latitude",
        "width",
        "wifi",
        "carrier",
        "build",
        "namespace",
        "density",
    ]);
    let value = prop_oneof![
        3 => "\\PC{1,20}".prop_map(Value::from),
        1 => Just(json!("https://user@x.io:1/p?q=1#f")),
        1 => Just(json!("IT")),
        1 => any::<i32>().prop_map(Value::from),
        1 => any_value(),
    ];
    let section = prop::collection::btree_map(fields, value, 0..8).prop_map(|fields| json!(fields));
    let section = prop_oneof![6 => section, 1 => any_value()];
    let top = prop_oneof![Just(json!("g1")), Just(json!("de-DE")), any_value()];
    let tops = prop::sample::select(vec!["groupId", "locale", "userAgent", "ip", "traits"]);
    let context =
        (prop::collection::btree_map(sections, section, 0..6), prop::collection::btree_map(tops, top, 0..4));
    let context = context.prop_filter_map("over admission's limits", |(mut sections, tops)| {
        sections.extend(tops);
        let json = json!(sections).to_string();
        JsonObject::parse(&json, &Limits::DEFAULT).ok().map(JsonObject::into_owned)
    });
    prop_oneof![Just(None), context.prop_map(Some)]
}

fn any_event() -> impl Strategy<Value = Event> {
    let event_id =
        prop_oneof![3 => Just(None), 1 => "[ -~]{1,100}".prop_map(Some), 1 => Just(Some("0".to_owned()))];
    let ip = prop_oneof![Just(None), Just(Some("203.0.113.9")), Just(Some("2001:db8::1"))];
    let user_agent = prop_oneof![Just(None), "\\PC{1,80}".prop_map(Some), Just(Some("u".repeat(1024)))];
    // From the year 2000 to a day ahead.
    let time = prop_oneof![4 => Just(0_i64), 1 => 946_684_800_000_i64 - 1_767_225_600_000..=0, 1 => 0..=86_400_000_i64];
    let kind = prop_oneof![
        4 => Just(Kind::Track),
        2 => Just(Kind::Identify),
        1 => Just(Kind::Page),
        1 => Just(Kind::Screen),
        1 => Just(Kind::Group),
        1 => Just(Kind::Alias)
    ];
    let kind = (kind, any_name(), prop::option::of(any_name()));
    let session_id = prop_oneof![3 => Just(None), 1 => Just(Some("1767225600000")), 1 => Just(Some("s-1"))];
    let inside = (any_properties(), any_context(), session_id);
    (event_id, kind, any_id(), any_id(), ip, user_agent, time, inside).prop_map(
        |(event_id, (kind, name, second), user_id, anonymous_id, ip, user_agent, offset_ms, inside)| {
            let (properties, context, session_id) = inside;
            let now_ms = now_ms();
            let of_a_user = matches!(kind, Kind::Identify | Kind::Alias);
            let user_id = user_id.or_else(|| of_a_user.then(|| "user-1".to_owned()));
            // A page may have a name, or a category, or neither.
            let page = Some(&*name).filter(|_| second.is_none() || name.len() % 2 == 0);
            let kind = match kind {
                Kind::Track | Kind::Unknown => EventKind::Track { name: &name },
                Kind::Identify => EventKind::Identify,
                Kind::Page => EventKind::Page { name: page, category: second.as_deref() },
                Kind::Screen => EventKind::Screen { name: page, category: second.as_deref() },
                Kind::Group => EventKind::Group { group_id: &name },
                // Not of itself.
                Kind::Alias if user_id.as_ref() == Some(&name) => EventKind::Alias { previous_id: "user-0" },
                Kind::Alias => EventKind::Alias { previous_id: &name },
            };
            Event::pack(&EventParts {
                id: event_id.map_or_else(EventId::assign, |id| EventId::new(id).unwrap()),
                kind,
                user_id: user_id.as_deref(),
                anonymous_id: anonymous_id.as_deref(),
                time_ms: (now_ms + offset_ms).max(946_684_800_000),
                accepted_ms: now_ms,
                ip: ip.map(|ip| ip.parse().unwrap()),
                user_agent: user_agent.as_deref(),
                properties,
                more: MoreParts { context, session_id, ..MoreParts::default() }.if_any(),
            })
        },
    )
}

/// Whether a vendor can place an event at all, by its own documentation and
/// independently of the mapping.
fn is_placeable(vendor: Vendor, event: &Event) -> bool {
    const BOTH: [&str; 10] =
        ["anonymous", "nil", "none", "null", "n/a", "na", "undefined", "unknown", "0", "-1"];
    let zero = "00000000-0000-0000-0000-000000000000";
    let only = |extra: &[&str], id: Option<&str>| {
        id.is_some_and(|id| !BOTH.contains(&id) && id != zero && !extra.contains(&id))
    };
    match vendor {
        Vendor::Mixpanel => {
            let usable = |id| only(&["anon", "<nil>", "true", "false", "[]", "{}"], id);
            match event.kind() {
                EventKind::Identify => usable(event.user_id()),
                EventKind::Alias { previous_id } => usable(event.user_id()) && usable(Some(previous_id)),
                _ => true,
            }
        }
        Vendor::Amplitude => {
            let usable = |id| only(&["{}", "lmy47d"], id);
            event.subject().is_none() || usable(event.user_id()) || usable(event.anonymous_id())
        }
        Vendor::Segment => true,
    }
}

/// A retry is recognised as one, and means the same, whenever it is made.
#[test]
fn a_later_attempt_says_the_same_but_for_segments_time_of_sending() {
    const BATCHES: usize = 60;
    let key = || Secret::new(KEY);
    let wires: [&dyn Wire; 5] = [
        &Mixpanel::new(key(), IdentityMode::Simplified),
        &Mixpanel::new(key(), IdentityMode::Original).with_view(of_companies()),
        &Amplitude::new(key(), 1),
        &Amplitude::new(key(), 1).with_view(viewed("vendor", "{name}", "company")),
        &Segment::new(key()),
    ];
    let attempts_ms = [now_ms(), now_ms() + 1, now_ms() + 3_600_000, now_ms() + 72 * 3_600_000];
    let mut runner = TestRunner::new(ProptestConfig::default());
    let strategy = prop::collection::vec(any_event(), 4);
    for _ in 0..BATCHES {
        let events: Vec<_> = strategy.new_tree(&mut runner).unwrap().current();
        for (wire, at_ms) in wires.iter().flat_map(|wire| attempts_ms.map(|at_ms| (wire, at_ms))) {
            let endpoint = events.iter().find_map(|event| wire.endpoint(event).ok());
            let of_endpoint = |event: &&Event| wire.endpoint(event).ok() == endpoint;
            let events: Vec<_> = events.iter().filter(of_endpoint).cloned().collect();
            let said = |at_ms: i64| -> (Value, Vec<usize>) {
                let encoded = wire.encode(&events, at_ms);
                let rejected = encoded.rejected.iter().map(|(index, ..)| *index).collect();
                if encoded.form {
                    return (Value::from(String::from_utf8(encoded.body).unwrap()), rejected);
                }
                let mut body: Value = serde_json::from_slice(&encoded.body).unwrap();
                if let Some(body) = body.as_object_mut() {
                    // Segment takes an event's time plus the difference of this to its
                    // own clock on arrival: only what the way took, at each attempt.
                    let sent_at = body.remove("sentAt");
                    let want = (wire.name() == "segment").then_some(at_ms);
                    assert_eq!(sent_at.map(|at| unix_ms(at.as_str().unwrap())), want);
                }
                (body, rejected)
            };
            assert_eq!(said(at_ms), said(attempts_ms[0]), "{} {events:?}", wire.name());
        }
    }
}

fn unix_ms(text: &str) -> i64 {
    text.parse::<jiff::Timestamp>().unwrap().as_millisecond()
}

#[tokio::test]
async fn any_event_that_admission_accepts_becomes_a_body_that_the_vendor_accepts() {
    const BATCHES: usize = 60;
    const BATCH: usize = 16;
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let seed = env::var("RELAY_SEED").map_or_else(|_| now_ms().unsigned_abs(), |seed| seed.parse().unwrap());
    println!("RELAY_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), random);
    let views = [
        (View::default(), IdentityMode::Simplified),
        (viewed("vendor", "vendor", "company"), IdentityMode::Original),
        (viewed("{name}", "Viewed {category} {name}", "Team Id"), IdentityMode::Simplified),
    ];
    let providers: Vec<_> = Vendor::ALL
        .into_iter()
        .flat_map(|vendor| views.clone().map(|(view, identity_mode)| (vendor, view, identity_mode)))
        .map(|(vendor, view, identity_mode)| {
            let request_timeout = Duration::from_secs(10);
            let settings =
                ProviderSettings { request_timeout, view, identity_mode, ..settings(&sandbox, vendor) };
            (vendor, registry::build(&settings).unwrap())
        })
        .collect();
    let strategy = prop::collection::vec(any_event(), BATCH);
    let mut unplaceable = 0;
    for _ in 0..BATCHES {
        let events: Vec<_> = strategy.new_tree(&mut runner).unwrap().current();
        for (vendor, provider) in &providers {
            let verdicts = send_all(&**provider, &events).await.unwrap();
            let sent = events.iter().filter(|event| provider.endpoint(event).is_ok());
            for (event, verdict) in sent.zip(verdicts) {
                match verdict {
                    Verdict::Delivered => assert!(is_placeable(*vendor, event), "{vendor:?} {event:?}"),
                    Verdict::Rejected { reason: Rejection::UnusableId, .. } => {
                        unplaceable += 1;
                        assert!(!is_placeable(*vendor, event), "{vendor:?} {event:?}");
                    }
                    verdict => panic!("{vendor:?} {verdict:?} {event:?}"),
                }
            }
            // What Segment and Mixpanel's /engage discard they do not say.
            if sandbox.stats(*vendor).rejected > 0 {
                for event in events.iter().filter(|event| provider.endpoint(event).is_ok()) {
                    let before = sandbox.stats(*vendor).rejected;
                    let _ = provider.send(std::slice::from_ref(event)).await;
                    assert_eq!(sandbox.stats(*vendor).rejected, before, "{vendor:?} discarded {event:?}");
                }
            }
        }
    }
    assert!(unplaceable > 0, "the strategy must reach ids that vendors refuse");
}
