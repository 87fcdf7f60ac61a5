//! What callers see.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::{
        Durability, GetEventCountRequest, GetUserCountRequest, HealthCheckRequest, PropertyList,
        PropertyObject, PropertyValue, TrackEventRequest, property_value::Value as Kind,
    },
    providers::sandbox::{TakenKind, Vendor},
};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, net::TcpStream, time::timeout};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::harness::{Observer, Relay, Setup, identify, taken, track};

#[tokio::test]
async fn events_go_in_by_grpc_and_come_out_as_each_vendors_batches() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut client = relay.client();
    let mut request = track("Order Placed", "user-1");
    request.anonymous_id = "device-1".into();
    request.timestamp_ms = 1_767_225_600_123;
    request.properties = properties();
    let answer = client.track_event(request.clone()).await.unwrap().into_inner();
    assert!(answer.success);
    assert_eq!(answer.event_id, request.event_id);
    assert_eq!(answer.durability(), Durability::Queued);

    let traits = [("plan", Some(Kind::StringValue("pro".into()))), ("legacy", None)];
    let answer = client.identify_user(identify("user-1", &traits)).await.unwrap().into_inner();
    assert!(answer.success);
    assert_eq!(answer.event_id.len(), 36, "an id is assigned when the caller gives none");

    for (vendor, events) in [(Vendor::Mixpanel, 3), (Vendor::Amplitude, 2), (Vendor::Segment, 2)] {
        taken(&setup, vendor, events).await;
    }
    let event = |vendor, kind| -> Value {
        setup.sandbox.taken(vendor).into_iter().find(|taken| taken.kind == kind).unwrap().event
    };
    let want = json!({"text": "é\"\u{0}", "whole": 3, "exact": 9_007_199_254_740_993_i64, "yes": true,
        "none": null, "list": [1.5, "x"], "object": {"inner": {"deep": 1}}});

    let mixpanel = event(Vendor::Mixpanel, TakenKind::Track);
    assert_eq!(mixpanel["event"], "Order Placed");
    assert_eq!(mixpanel["properties"]["time"], 1_767_225_600_123_i64);
    assert_eq!(mixpanel["properties"]["$insert_id"], request.event_id);
    for (key, value) in want.as_object().unwrap() {
        assert_eq!(&mixpanel["properties"][key], value, "{key}");
    }
    let profile = event(Vendor::Mixpanel, TakenKind::Identify);
    assert_eq!((&profile["$set"], &profile["$distinct_id"]), (&json!({"plan": "pro"}), &json!("user-1")));

    let amplitude = event(Vendor::Amplitude, TakenKind::Track);
    assert_eq!(amplitude["event_properties"], want);
    assert_eq!(amplitude["time"], 1_767_225_600_123_i64);
    let amplitude = event(Vendor::Amplitude, TakenKind::Identify);
    assert_eq!(amplitude["user_properties"], json!({"$set": {"plan": "pro"}, "$unset": {"legacy": "-"}}));

    let segment = event(Vendor::Segment, TakenKind::Track);
    assert_eq!(segment["properties"], want);
    assert_eq!(segment["timestamp"], "2026-01-01T00:00:00.123Z");
    let segment = event(Vendor::Segment, TakenKind::Identify);
    assert_eq!(segment["traits"], json!({"plan": "pro", "legacy": null}));
    relay.terminate().await;
}

fn value(kind: Kind) -> PropertyValue {
    PropertyValue { value: Some(kind) }
}

fn properties() -> HashMap<String, PropertyValue> {
    let deep = PropertyObject { fields: [("deep".into(), value(Kind::IntegerValue(1)))].into() };
    let object = PropertyObject { fields: [("inner".into(), value(Kind::ObjectValue(deep)))].into() };
    let list =
        PropertyList { values: vec![value(Kind::NumberValue(1.5)), value(Kind::StringValue("x".into()))] };
    [
        ("text", value(Kind::StringValue("é\"\u{0}".into()))),
        ("whole", value(Kind::NumberValue(3.0))),
        ("exact", value(Kind::IntegerValue(9_007_199_254_740_993))),
        ("yes", value(Kind::BoolValue(true))),
        ("none", PropertyValue { value: None }),
        ("list", value(Kind::ListValue(list))),
        ("object", value(Kind::ObjectValue(object))),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

fn nested(levels: usize) -> HashMap<String, PropertyValue> {
    let leaf: HashMap<_, _> = [("k".to_owned(), value(Kind::BoolValue(true)))].into();
    (1..levels).fold(leaf, |fields, _| {
        [("k".to_owned(), value(Kind::ObjectValue(PropertyObject { fields })))].into()
    })
}

fn reason(status: &Status) -> (Code, String, String) {
    let details = status.get_error_details();
    let field = details.bad_request().map_or(String::new(), |bad| bad.field_violations[0].field.clone());
    (status.code(), details.error_info().unwrap().reason.clone(), field)
}

#[tokio::test]
async fn a_refusal_names_field_value_rule_and_reason() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut client = relay.client();
    let day_after_tomorrow = jiff::Timestamp::now().as_second() + 2 * 86_400;
    let one = |key: &str, kind| [(key.to_owned(), value(kind))].into();
    type Change = Box<dyn Fn(&mut TrackEventRequest)>;
    let rows: Vec<(Change, &str, &str)> = vec![
        (Box::new(|r| r.event_name.clear()), "EVENT_NAME_EMPTY", "event_name"),
        (Box::new(|r| r.event_name = "é".repeat(128)), "EVENT_NAME_TOO_LONG", "event_name"),
        (Box::new(|r| r.user_id = "x".repeat(256)), "ID_TOO_LONG", "user_id"),
        (Box::new(|r| r.anonymous_id = "x".repeat(256)), "ID_TOO_LONG", "anonymous_id"),
        (Box::new(|r| r.event_id = "é".into()), "EVENT_ID_INVALID", "event_id"),
        (Box::new(|r| r.event_id = "x".repeat(101)), "EVENT_ID_INVALID", "event_id"),
        (Box::new(|r| r.timestamp = 915_148_800), "TIME_OUT_OF_RANGE", "timestamp"),
        (Box::new(move |r| r.timestamp = day_after_tomorrow), "TIME_OUT_OF_RANGE", "timestamp"),
        (Box::new(|r| r.timestamp_ms = 1), "TIME_OUT_OF_RANGE", "timestamp_ms"),
        (
            Box::new(move |r| r.properties = one("x", Kind::StringValue("x".repeat(10_240)))),
            "PROPERTIES_TOO_LARGE",
            "properties",
        ),
        (
            Box::new(|r| {
                r.properties = (0..257).map(|i| (i.to_string(), value(Kind::BoolValue(true)))).collect()
            }),
            "PROPERTIES_TOO_MANY_KEYS",
            "properties",
        ),
        (
            Box::new(|r| r.properties = nested(17)),
            "PROPERTIES_TOO_DEEP",
            "properties.k.k.k.k.k.k.k.k.k.k.k.k.k.k.k.k",
        ),
        (
            Box::new(move |r| r.properties = one("", Kind::BoolValue(true))),
            "PROPERTY_KEY_EMPTY",
            "properties",
        ),
        (
            Box::new(move |r| r.properties = one("n", Kind::NumberValue(f64::NAN))),
            "PROPERTY_NUMBER_NOT_FINITE",
            "properties.n",
        ),
        (
            Box::new(move |r| r.properties = one("n", Kind::NumberValue(f64::INFINITY))),
            "PROPERTY_NUMBER_NOT_FINITE",
            "properties.n",
        ),
    ];
    let refused = rows.len();
    for (change, want_reason, want_field) in rows {
        let mut request = track("Order Placed", "user-1");
        change(&mut request);
        let status = client.track_event(request).await.unwrap_err();
        assert_eq!(
            reason(&status),
            (Code::InvalidArgument, want_reason.into(), want_field.into()),
            "{status:?}"
        );
        assert!(status.message().contains("got ") && status.message().contains("want "), "{status:?}");
    }
    let status = client.identify_user(identify("", &[])).await.unwrap_err();
    assert_eq!(reason(&status), (Code::InvalidArgument, "USER_ID_MISSING".into(), "user_id".into()));

    let at_limit = TrackEventRequest { properties: nested(16), ..track(&"x".repeat(255), &"u".repeat(255)) };
    assert!(client.track_event(at_limit).await.is_ok());
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Mixpanel).accepted, 1, "{refused} were refused");
}

#[tokio::test]
async fn what_is_too_large_or_cannot_be_decoded_is_refused_and_the_connection_lives_on() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut client = relay.client();
    let large = TrackEventRequest { event_name: "x".repeat(70_000), ..track("", "u") };
    assert_eq!(client.track_event(large).await.unwrap_err().code(), Code::OutOfRange);
    // Deeper than the decoder goes.
    let deep = TrackEventRequest { properties: nested(60), ..track("x", "u") };
    let status = client.track_event(deep).await.unwrap_err();
    assert_eq!(reason(&status), (Code::InvalidArgument, "MESSAGE_MALFORMED".into(), String::new()));

    let mut request = tonic::Request::new(track("x", "u"));
    let metadata = "x".repeat(20_000).parse().unwrap();
    request.metadata_mut().insert("x-large", metadata);
    assert!(client.track_event(request).await.is_err());

    assert!(relay.client().track_event(track("x", "u")).await.is_ok());
    let ended = relay.terminate().await;
    assert_eq!((ended.code, ended.balance(Vendor::Segment).accepted), (0, 1));
}

#[tokio::test]
async fn without_a_store_counts_are_unimplemented_and_say_what_serves_them() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut client = relay.client();
    let events = client.get_event_count(GetEventCountRequest::default()).await.unwrap_err();
    let users = client.get_user_count(GetUserCountRequest::default()).await.unwrap_err();
    for status in [events, users] {
        assert_eq!(status.code(), Code::Unimplemented);
        assert!(status.message().contains("STORE_URL"), "{status:?}");
    }
}

async fn health(relay: &Relay) -> String {
    relay.client().health_check(HealthCheckRequest {}).await.unwrap().into_inner().status
}

#[tokio::test]
async fn health_tells_serving_degraded_and_draining_apart() {
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "3").set("REQUEST_TIMEOUT_SECONDS", "30");
    let relay = setup.start().await;
    assert_eq!(health(&relay).await, "SERVING");
    assert_eq!(relay.page("/healthz").await, (200, "SERVING".into()));
    assert_eq!(relay.page("/readyz").await, (200, "SERVING".into()));

    setup.sandbox.always(Vendor::Amplitude, Some("401".parse().unwrap()));
    relay.client().track_event(track("x", "u")).await.unwrap();
    relay.log("provider refuses its key or address: it is paused and its events wait").await;
    // The log comes a moment before the state.
    let start = Instant::now();
    let degraded = loop {
        let status = health(&relay).await;
        if status != "SERVING" {
            break status;
        }
        assert!(start.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert!(degraded.starts_with("DEGRADED: amplitude refuses its key: 401 "), "{degraded}");
    assert_eq!(relay.page("/readyz").await, (200, degraded));

    // Something to drain for as long as the test looks.
    setup.sandbox.always(Vendor::Segment, Some("stall".parse().unwrap()));
    relay.client().track_event(track("x", "u")).await.unwrap();
    let mut standard = tonic_health::pb::health_client::HealthClient::new(relay.channel());
    let service = "analytics.v1.AnalyticsService".to_owned();
    let check = |service: &str| tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
    assert_eq!(standard.check(check(&service)).await.unwrap().into_inner().status, 1);
    relay.signal("TERM");
    relay.log("draining").await;
    assert_eq!(health(&relay).await, "DRAINING");
    assert_eq!(relay.page("/readyz").await, (503, "DRAINING".into()));
    for service in ["", &service] {
        assert_eq!(standard.check(check(service)).await.unwrap().into_inner().status, 2);
    }
    let status = relay.client().track_event(track("x", "u")).await.unwrap_err();
    assert_eq!(reason(&status), (Code::Unavailable, "DRAINING".into(), String::new()));
}

#[tokio::test]
async fn reflection_names_the_services_and_their_messages() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let ask = |message_request| {
        let channel = relay.channel();
        async move {
            let request =
                ServerReflectionRequest { host: String::new(), message_request: Some(message_request) };
            let mut client = ServerReflectionClient::new(channel);
            let mut answers =
                client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
            answers.message().await.unwrap().unwrap().message_response.unwrap()
        }
    };
    let MessageResponse::ListServicesResponse(list) = ask(MessageRequest::ListServices(String::new())).await
    else {
        panic!("not a list");
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["analytics.v1.AnalyticsService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|found| found == name), "{name} in {names:?}");
    }
    let symbol = MessageRequest::FileContainingSymbol("analytics.v1.PropertyValue".into());
    assert!(matches!(ask(symbol).await, MessageResponse::FileDescriptorResponse(_)));
}

/// 40 callers that send 100 events each, however they are answered: OK, or that the
/// queue is full. Returns after how long those that were refused may try again.
async fn flood(relay: &Relay, observer: &mut Observer) -> Vec<Duration> {
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let mut client = relay.client();
        callers.spawn(async move {
            let (mut observer, mut delays) = (Observer::default(), Vec::new());
            for _ in 0..100 {
                let request = track("x", "u");
                let id = request.event_id.clone();
                let Err(status) = client.track_event(request).await else {
                    observer.accepted.insert(id);
                    continue;
                };
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                observer.refused.insert(id);
                delays.push(status.get_error_details().retry_info().unwrap().retry_delay.unwrap());
            }
            (observer, delays)
        });
    }
    let mut delays = Vec::new();
    while let Some(caller) = callers.join_next().await {
        let caller = caller.unwrap();
        observer.add(caller.0);
        delays.extend(caller.1);
    }
    delays
}

/// A flood at a relay with a tiny queue: what does not fit is refused at once,
/// with a delay, and what was answered OK is all there.
#[tokio::test]
async fn a_full_queue_refuses_at_once_and_loses_nothing() {
    let mut setup = Setup::new().await;
    setup.set("QUEUE_MAX_EVENTS", "5").set("BATCH_SIZE", "1").set("DRAIN_TIMEOUT_SECONDS", "2");
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, Some("stall".parse().unwrap()));
    }
    let relay = setup.start().await;
    let (mut observer, mut delays, start) = (Observer::default(), Vec::new(), Instant::now());
    while delays.is_empty() {
        assert!(start.elapsed() < Duration::from_secs(30), "the queue was never full");
        delays = flood(&relay, &mut observer).await;
    }
    assert!(delays.iter().all(|delay| *delay > Duration::ZERO), "{delays:?}");
    let refusals = relay.metric("relay_refusals_total", &["QUEUE_FULL"]).await;
    assert_eq!((refusals, delays.len()), (delays.len() as f64, observer.refused.len()));

    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    observer.check_balance(&setup, &ended);
    assert!(ended.balance(Vendor::Mixpanel).dead_lettered > 0, "a full lane writes dead letters");
}

#[tokio::test]
async fn bytes_that_are_no_http2_harm_nobody() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    for nonsense in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".as_slice(),
        &[0; 4096],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff",
    ] {
        let mut stream = TcpStream::connect(relay.grpc_addr).await.unwrap();
        let _ = stream.write_all(nonsense).await;
        let mut answer = Vec::new();
        let _ = timeout(Duration::from_secs(2), stream.read_to_end(&mut answer)).await;
    }
    assert!(relay.client().track_event(track("x", "u")).await.is_ok());
    assert_eq!(relay.metric("relay_handler_panics_total", &[]).await, 0.0);
}

#[tokio::test]
async fn every_metric_is_there_and_an_event_name_is_no_label() {
    let mut setup = Setup::new().await;
    // A relay without a log shows none of the log's, and one without a store none of its.
    setup.set("DURABILITY", "synced");
    setup.set("STORE_URL", "sqlite:");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    for name in ["canary-name-1", "canary-name-2"] {
        observer.track(&mut relay.client(), name, "canary-user").await;
    }
    observer.track(&mut relay.client(), "", "u").await;
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 2).await;
    }
    // A request that fails once, so that there is a retry to count.
    setup.sandbox.script(Vendor::Mixpanel, ["503".parse().unwrap()]);
    observer.track(&mut relay.client(), "x", "u").await;
    taken(&setup, Vendor::Mixpanel, 3).await;
    taken(&setup, Vendor::Segment, 3).await;
    // And a question.
    let asked = GetUserCountRequest { start_time: 1_767_225_600, end_time: 1_767_229_200 };
    assert_eq!(relay.client().get_user_count(asked).await.unwrap().into_inner().unique_users, 0);
    let (status, page) = relay.page("/metrics").await;
    assert_eq!(status, 200);
    for info in analytics_relay::telemetry::METRICS {
        let name = info.name;
        let present = page.lines().any(|line| line.starts_with(name) && !line.starts_with('#'));
        assert!(present, "{name} is missing");
    }
    assert!(!page.contains("canary"), "{page}");
    assert_eq!(relay.metric("relay_events_accepted_total", &[]).await, 3.0);
    assert_eq!(relay.metric("relay_refusals_total", &["EVENT_NAME_EMPTY"]).await, 1.0);
    assert_eq!(relay.metric("relay_requests_total", &["TrackEvent", "INVALID_ARGUMENT"]).await, 1.0);
    assert_eq!(relay.metric("relay_retries_total", &["mixpanel"]).await, 1.0);
    assert_eq!(relay.metric("relay_attempts_total", &["mixpanel"]).await, 4.0);
    assert_eq!(relay.metric("relay_events_total", &["segment", "\"delivered\""]).await, 3.0);
    assert_eq!(relay.metric("relay_accept_duration_seconds_count", &["TrackEvent"]).await, 4.0);
    assert_eq!(relay.metric("relay_delivery_duration_seconds_count", &["segment"]).await, 3.0);
    assert_eq!(relay.metric("relay_events_at_risk", &["segment"]).await, 0.0);
}
