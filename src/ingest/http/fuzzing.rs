//! What must hold for any bytes at the HTTP door: the reader of JSON against the general
//! one, and each form from a call's bytes to the queue.

#![allow(missing_docs, clippy::missing_panics_doc, reason = "called by fuzz/ and nobody else")]

use std::{cell::RefCell, convert::Infallible, io::Write, net::Ipv4Addr, path::Path, sync::Arc};

use analytics_relay_providers::fuzzing::Input;
use axum::body::Body;
use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode};
use prometheus_client::metrics::counter::Counter;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use super::{
    door::HttpDoor,
    item::NAMES,
    json::{Items, List, fields, fields_and_items, object, text, without_lone_surrogates},
    scan::Scanner,
};
use crate::{
    fuzzing::{Inside, check_event},
    ingest::{budget::ReceiveBudget, limits::HTTP_PROPERTIES, settings::HttpSettings},
    listener::Slot,
    query::Query,
    queue::{QueueLimits, memory::QueueReceiver},
    refused::RefusedKeeper,
    sealing::Sealing,
    settings::Reader,
};

/// The reader that looks at some fields only finds what the general one finds.
pub fn http_json(bytes: &[u8]) {
    let Ok(json) = std::str::from_utf8(bytes) else { return };
    let mended = without_lone_surrogates(json);
    let json = mended.as_deref().unwrap_or(json);
    assert_eq!(without_lone_surrogates(json), None, "once is enough");
    let read = fields(json, &["a", "event", ""]);
    let general = serde_json::from_str::<Value>(json);
    if let Ok([a, event, empty]) = &read {
        assert!(object(json).is_some());
        let Ok(Value::Object(general)) = &general else {
            // Only numbers beyond f64, and what is too deep, are left to the rules.
            assert!(general.is_err(), "{json}");
            return;
        };
        for (name, found) in [("a", a), ("event", event), ("", empty)] {
            let found = found.map(|value| serde_json::from_str::<Value>(value.get()).unwrap());
            assert_eq!(found.as_ref(), general.get(name), "{name} of {json}");
        }
    } else {
        assert!(!matches!(general, Ok(Value::Object(_))), "{json}");
    }
    if let Ok(general) = &general {
        let value = Scanner::new(json).value().expect("the general reader takes it");
        assert_eq!(text(value).as_deref(), general.as_str());
    }
    let mut scanner = Scanner::new(json);
    let is_value = scanner.value().is_ok() && scanner.end().is_ok();
    assert_eq!(is_value, serde_json::from_str::<IgnoredAny>(json).is_ok(), "{json}");
    if let (Ok((_, Some(list))), Ok(general)) =
        (fields_and_items(json, &["b"], List { name: "a", items_max: 3, names: &["event"] }), &general)
    {
        match (list, &general["a"]) {
            (Items::List(some, count), Value::Array(all)) => {
                assert_eq!((some.len(), count), (all.len().min(3), all.len()));
                for (item, general) in some.iter().zip(all) {
                    assert_eq!(&serde_json::from_str::<Value>(item.raw.get()).unwrap(), general);
                    let event = item.fields.map(|[event]| event.map(|event| event.get()));
                    assert_eq!(event.is_some(), general.is_object());
                    assert_eq!(event.flatten().is_some(), general.get("event").is_some());
                }
            }
            (Items::NoList, other) => assert!(!other.is_array()),
            (list, other) => panic!("{list:?} of {other}"),
        }
    }
}

/// A call of Segment's form, of the ingestion API and of website analytics.
pub fn http_segment(bytes: &[u8]) {
    const PATHS: [&str; 10] = [
        "/v1/track",
        "/v1/identify",
        "/v1/page",
        "/v1/screen",
        "/v1/group",
        "/v1/alias",
        "/v1/batch",
        "/beacon/v1/batch",
        "/v1/pixel/track?data=",
        "/v1/m",
    ];
    let mut input = Input::new(bytes);
    let path = PATHS[input.below(PATHS.len())];
    call(&mut input, path, "batch");
}

pub fn http_ingestion(bytes: &[u8]) {
    const PATHS: [&str; 3] = ["/v1/events/track", "/v1/events/identify", "/v1/events/batch"];
    let mut input = Input::new(bytes);
    let path = PATHS[input.below(PATHS.len())];
    call(&mut input, path, "events");
}

pub fn http_website(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    call(&mut input, "/api/v1/events/track", "events");
}

fn call(input: &mut Input<'_>, path: &str, list: &str) {
    let is_many = list == "events" && path.ends_with("batch") || path.contains("batch");
    let is_zipped = input.below(4) == 0;
    let mut body = match input.below(4) {
        0 => input.rest().to_vec(),
        _ if is_many || path.starts_with("/api") && input.flag() => made_up_batch(input, list),
        _ => made_up_item(input).to_string().into_bytes(),
    };
    if is_zipped {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&body).expect("a vector takes any bytes");
        body = encoder.finish().expect("a vector takes any bytes");
    }
    let is_pixel = path.ends_with('=');
    let request = match is_pixel {
        true => {
            let data = BASE64_STANDARD.encode(&body);
            let data: String = form_urlencoded::byte_serialize(data.as_bytes()).collect();
            Request::get(format!("{path}{data}"))
        }
        false => Request::post(path),
    };
    let Ok(request) = request.body(body) else { return };
    let (status, answer, admitted) = Served::with(|served| served.call(request));
    check(status, &answer, admitted, path);
}

/// What is answered holds for what is in the queue.
fn check(status: StatusCode, answer: &Bytes, admitted: usize, path: &str) {
    if path.ends_with('=') {
        assert_eq!(status, StatusCode::OK, "an image in any case");
        return;
    }
    let answer: Value = serde_json::from_slice(answer).expect("an answer is JSON");
    let number = |name: &str| answer[name].as_u64().map(|number| number as usize);
    match status.as_u16() {
        200 => assert_eq!(number("accepted").unwrap_or(admitted), admitted, "{answer}"),
        202 | 207 => {
            let accepted = number("accepted").unwrap_or(1);
            assert_eq!(accepted, admitted, "{answer}");
            if let Some(results) = answer["results"].as_array() {
                let ended = accepted + number("rejected").unwrap() + number("deferred").unwrap();
                assert_eq!(results.len(), ended, "{answer}");
            }
        }
        400 | 413 => {
            assert_eq!(admitted, 0, "a refused call has put events into the queue: {answer}");
            let error = if answer["error"].is_object() { &answer["error"] } else { &answer };
            assert!(error["code"].as_str().is_some_and(|code| !code.is_empty()), "{answer}");
        }
        other => panic!("{other}: {answer}"),
    }
}

/// A batch of items that are nearly right.
fn made_up_batch(input: &mut Input<'_>, list: &str) -> Vec<u8> {
    let items: Vec<Value> = (0..input.below(6)).map(|_| made_up_item(input)).collect();
    let mut batch = json!({ list: items });
    if input.flag() {
        batch["answers"] = 1.into();
    }
    for name in ["context", "integrations", "sentAt", "schemaVersion"] {
        if input.below(4) == 0 {
            batch[name] = made_up_value(input, 0);
        }
    }
    batch.to_string().into_bytes()
}

fn made_up_item(input: &mut Input<'_>) -> Value {
    const OF_WEBSITES: [&str; 4] = ["website_id", "event_type", "page", "visitor_id"];
    let names = [&NAMES[..], &OF_WEBSITES].concat();
    const KINDS: [&str; 7] = ["track", "identify", "page", "screen", "group", "alias", "other"];
    let mut item = json!({"type": KINDS[input.below(KINDS.len())], "userId": "u", "event": "e", "groupId": "g", "previousId": "p", "website_id": "w", "page": "/"});
    for _ in 0..input.below(6) {
        let name = names[input.below(names.len())];
        item[name] = made_up_value(input, 0);
    }
    item
}

fn made_up_value(input: &mut Input<'_>, depth: usize) -> Value {
    match input.below(if depth > 3 { 6 } else { 8 }) {
        0 => Value::Null,
        1 => input.flag().into(),
        2 => input.u64().into(),
        3 => f64::from_bits(input.u64()).into(),
        4 => input.text().into(),
        5 => ["2026-01-01T00:00:00Z", "1.2.3.4", "null", "track", "All"][input.below(5)].into(),
        6 => (0..input.below(4)).map(|_| made_up_value(input, depth + 1)).collect(),
        _ => {
            let mut object = json!({});
            for _ in 0..input.below(4) {
                let name = if input.flag() {
                    input.text()
                } else {
                    ["ip", "page", "All", "userAgent"][input.below(4)].into()
                };
                object[name] = made_up_value(input, depth + 1);
            }
            object
        }
    }
}

/// A door before a queue in memory.
struct Served {
    runtime: Runtime,
    door: HttpDoor,
    budget: Arc<ReceiveBudget>,
    queue: QueueReceiver,
}

impl Served {
    fn with<R>(run: impl FnOnce(&mut Self) -> R) -> R {
        thread_local! {
            static SERVED: RefCell<Option<Served>> = const { RefCell::new(None) };
        }
        SERVED.with(|served| run(served.borrow_mut().get_or_insert_with(Self::new)))
    }

    fn new() -> Self {
        let Inside { mut telemetry, admission, health, queue } =
            Inside::of(QueueLimits { events_max: 10_000, bytes_max: 1 << 26 });
        // Without a byte on the disk.
        let kept = RefusedKeeper::new(
            Path::new("/nonexistent"),
            0,
            None,
            &Sealing::default(),
            Counter::default(),
            Counter::default(),
        );
        let providers = vec!["mixpanel", "amplitude", "segment"];
        let settings = HttpSettings::read(&mut Reader::default(), false);
        let door = HttpDoor::new(
            admission,
            health,
            &settings,
            providers,
            kept,
            Query::of_nothing(),
            telemetry.ingest(),
        );
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { runtime, door, budget: ReceiveBudget::new(16 << 20, Counter::default()), queue }
    }

    /// The answer, and how many events came into the queue.
    fn call(&mut self, request: Request<Vec<u8>>) -> (StatusCode, Bytes, usize) {
        let receiving = self.budget.connection(Ipv4Addr::LOCALHOST.into(), Slot::Regular);
        let request = request.map(|body| Body::new(Full::<Bytes>::from(body)));
        let answered = self.runtime.block_on(async {
            let reply = self.door.answer(request, receiving, false).await;
            let (head, body) = reply.into_parts();
            let body: Result<_, Infallible> = body.collect().await;
            (head.status, body.unwrap_or_else(|never| match never {}).to_bytes())
        });
        let mut admitted = Vec::new();
        // Not only what is ready at once: an empty queue is not waited for.
        let received = futures_util::FutureExt::now_or_never(self.queue.recv_many(&mut admitted, 10_000));
        let count = received.unwrap_or(0);
        admitted.iter().for_each(|queued| check_event(&queued.event, &HTTP_PROPERTIES));
        (answered.0, answered.1, count)
    }
}
