//! Calls of the gRPC service, from a message's bytes to the queue.

use std::{cell::RefCell, net::Ipv4Addr, sync::Arc};

use analytics_relay_providers::{
    Event, EventKind,
    event::{ID_BYTES_MAX, NAME_BYTES_MAX, USER_AGENT_BYTES_MAX},
    fuzzing::{Input, check_properties, encode_everywhere},
    properties::Limits,
};
use axum::body::{Body, Bytes, to_bytes};
use futures_util::FutureExt;
use prometheus_client::metrics::counter::Counter;
use prost::Message;
use tonic::{Code, Status, codegen::http, service::Routes};
use tonic_types::StatusExt;

use super::{Inside, NOW_MS};
use crate::{
    ingest::{
        budget::ReceiveBudget,
        grpc::{answer::AnswerBody, front_door::FrontDoor, service::AnalyticsService},
    },
    listener::Slot,
    proto::v1::{
        self, EventContext, IdentifyUserRequest, PropertyList, PropertyObject, PropertyValue, TrackBatchItem,
        TrackBatchRequest, TrackBatchResponse, TrackEventRequest, TrackEventResponse, property_value::Value,
        track_batch_answer::Answer, track_batch_item::Item as BatchItem,
    },
    query::Query,
    queue::{
        QueueLimits,
        memory::QueueReceiver,
        spool::frame::{PAYLOAD_BYTES_MAX, find_mark},
    },
};

/// A call of the gRPC service, from its message's bytes to the queue.
pub fn grpc_admission(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let tracks = input.flag();
    let body = match input.below(8) {
        // All of the body, framing included.
        0 => input.rest().to_vec(),
        1 | 2 => framed(input.rest()),
        3 => framed(&nested(usize::from(input.u16()) % 16_384, input.flag())),
        _ if tracks => framed(&made_up_track(&mut input).encode_to_vec()),
        _ => framed(&made_up_identify(&mut input).encode_to_vec()),
    };
    let method = if tracks { "TrackEvent" } else { "IdentifyUser" };
    let (answer, admitted) = Served::with(|served| served.call(method, body));
    assert!(admitted.len() <= 1);
    let admitted = admitted.into_iter().next();
    match answer {
        Ok(answer) => {
            // Both answers have the same fields.
            let answer = TrackEventResponse::decode(answer).expect("it was encoded by us");
            let event = admitted.expect("an accepted event is in the queue");
            assert!(answer.success);
            assert_eq!(answer.event_id, event.id().as_str());
            assert_eq!(answer.durability, i32::from(v1::Durability::Queued));
            assert_eq!(event.is_identify(), !tracks);
            check_event(&event, &Limits::DEFAULT);
        }
        Err(status) => {
            assert_eq!(admitted, None, "a refused event is in the queue");
            check_refusal(&status);
        }
    }
}

/// A batch: each item has its answer, and what was accepted is in the queue.
pub fn grpc_batch(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let items_max = input.below(QUEUE_EVENTS_MAX * 2);
    let mut items = Vec::new();
    while items.len() < items_max && !input.is_empty() {
        let item = match input.below(8) {
            0 => None,
            1 | 2 => Some(BatchItem::Identify(made_up_identify(&mut input))),
            _ => Some(BatchItem::Track(made_up_track(&mut input))),
        };
        items.push(TrackBatchItem { item });
    }
    let item_count = items.len();
    let message = TrackBatchRequest { items }.encode_to_vec();
    let (answer, admitted) = Served::with(|served| served.call("TrackBatch", framed(&message)));
    let answer = match answer {
        Ok(answer) => TrackBatchResponse::decode(answer).expect("it was encoded by us"),
        Err(status) => {
            assert!(admitted.is_empty(), "an event of a refused batch is in the queue");
            return check_refusal(&status);
        }
    };
    assert_eq!(answer.answers.len(), item_count);
    let (mut accepted, mut longest_delay_ms) = (Vec::new(), 0);
    for answer in answer.answers {
        match answer.answer.expect("each item has an answer") {
            Answer::Accepted(event) => {
                assert_eq!(longest_delay_ms, 0, "taken behind one that has to come again");
                accepted.push(event.event_id);
            }
            Answer::Refused(refused) => assert!(!refused.violations.is_empty()),
            Answer::Deferred(deferred) => {
                assert_eq!(deferred.reason, "QUEUE_FULL");
                longest_delay_ms = longest_delay_ms.max(deferred.retry_delay_ms);
            }
        }
    }
    assert_eq!(answer.retry_delay_ms, longest_delay_ms);
    let queued: Vec<_> = admitted.iter().map(|event| event.id().to_string()).collect();
    assert_eq!(queued, accepted, "in the order of the items");
    admitted.iter().for_each(|event| check_event(event, &Limits::DEFAULT));
}

/// An admitted event obeys every limit and comes back from every file.
pub(crate) fn check_event(event: &Event, limits: &Limits) {
    match event.kind() {
        EventKind::Track { name } => assert!((1..=NAME_BYTES_MAX).contains(&name.len())),
        EventKind::Identify | EventKind::Alias { .. } => assert!(event.user_id().is_some()),
        _ => {}
    }
    for id in [event.user_id(), event.anonymous_id()].into_iter().flatten() {
        assert!((1..=ID_BYTES_MAX).contains(&id.len()));
    }
    let user_agent = event.user_agent();
    assert!(user_agent.is_none_or(|agent| (1..=USER_AGENT_BYTES_MAX).contains(&agent.len())));
    assert!((946_684_800_000..=NOW_MS + 24 * 3600 * 1000).contains(&event.time_ms()));
    assert_eq!(event.accepted_ms(), NOW_MS);
    check_properties(&event.properties(), limits);
    let json = event.to_json();
    assert_eq!(json, serde_json::to_vec(event).expect("an event is JSON"));
    assert!(json.len() <= PAYLOAD_BYTES_MAX / 2, "{} bytes", json.len());
    assert!(!json.contains(&b'\n'), "a line holds it");
    assert_eq!(find_mark(&json, 0), None);
    assert_eq!(&serde_json::from_slice::<Event>(&json).expect("it was written by us"), event);
    encode_everywhere(event);
}

/// A refusal says why, and callers' libraries can take it.
fn check_refusal(status: &Status) {
    const HEADER_BYTES_MAX: usize = 8 * 1024;
    assert!(!status.message().is_empty(), "{status:?}");
    assert!(
        status.message().len() + status.details().len() / 3 * 4 < HEADER_BYTES_MAX,
        "{} and {} bytes",
        status.message().len(),
        status.details().len()
    );
    if status.code() != Code::InvalidArgument {
        // The library's own: a message that is too long, cut or compressed.
        let codes = [Code::OutOfRange, Code::Internal, Code::Unimplemented];
        return assert!(codes.contains(&status.code()), "{status:?}");
    }
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
    assert!(!reason.is_empty() && !violations.is_empty(), "{status:?}");
    for violation in violations {
        assert!(!violation.reason.is_empty() && !violation.description.is_empty(), "{violation:?}");
        assert!(!violation.field.is_empty() || violation.reason == "MESSAGE_MALFORMED", "{violation:?}");
        assert!(!violation.description.contains("got ,"), "{violation:?}");
    }
}

/// Less than a batch may hold.
const QUEUE_EVENTS_MAX: usize = 10;

/// The service, and the queue behind it.
struct Served {
    service: Arc<AnalyticsService>,
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
            Inside::of(QueueLimits { events_max: QUEUE_EVENTS_MAX, bytes_max: 1 << 20 });
        let door = FrontDoor::new(admission, health, Query::of_nothing(), Counter::default());
        let service = AnalyticsService::new(door, Routes::default, telemetry.ingest());
        let budget = ReceiveBudget::new(4 << 20, Counter::default());
        Self { service: Arc::new(service), budget, queue }
    }

    /// The bytes of the answer's message, and what came into the queue.
    fn call(&mut self, method: &str, body: Vec<u8>) -> (Result<Bytes, Status>, Vec<Event>) {
        let request = http::Request::post(format!("/analytics.v1.AnalyticsService/{method}"))
            .header("content-type", "application/grpc")
            .body(Body::from(body))
            .expect("a legal request");
        let receiving = self.budget.connection(Ipv4Addr::LOCALHOST.into(), Slot::Regular);
        let answer =
            self.service.clone().answer(request, receiving).now_or_never().expect("nothing is waited for");
        let status = Status::from_header_map(answer.headers());
        let answer = match status.filter(|status| status.code() != Code::Ok) {
            Some(status) => Err(status),
            None => Ok(read_answer(answer.into_body())),
        };
        let mut admitted = Vec::new();
        self.queue.recv_many(&mut admitted, QUEUE_EVENTS_MAX).now_or_never();
        (answer, admitted.into_iter().map(|queued| queued.event).collect())
    }
}

fn read_answer(body: AnswerBody) -> Bytes {
    let bytes = to_bytes(Body::new(body), 1 << 20)
        .now_or_never()
        .expect("nothing is waited for")
        .expect("an answer has a body");
    bytes.slice(5..)
}

fn framed(message: &[u8]) -> Vec<u8> {
    let mut body = vec![0];
    body.extend_from_slice(&u32::try_from(message.len()).expect("a message is small").to_be_bytes());
    body.extend_from_slice(message);
    body
}

/// A request whose property is that many lists or objects deep.
fn nested(levels: usize, objects: bool) -> Vec<u8> {
    // From the inside out and back to front, so that lengths are known.
    let mut backwards = Vec::new();
    let wrap = |backwards: &mut Vec<u8>, tag: u8, from: usize| {
        let mut length = backwards.len() - from;
        let mut varint = Vec::new();
        loop {
            let more = length > 0x7f;
            varint.push((length & 0x7f) as u8 | if more { 0x80 } else { 0 });
            length >>= 7;
            if !more {
                break;
            }
        }
        backwards.extend(varint.iter().rev());
        backwards.push(tag);
    };
    let name = |backwards: &mut Vec<u8>| backwards.extend_from_slice(&[b'k', 1, 0x0A]);
    for _ in 0..levels {
        if objects {
            wrap(&mut backwards, 0x12, 0);
            name(&mut backwards);
            wrap(&mut backwards, 0x0A, 0);
            wrap(&mut backwards, 0x32, 0);
        } else {
            wrap(&mut backwards, 0x0A, 0);
            wrap(&mut backwards, 0x2A, 0);
        }
    }
    wrap(&mut backwards, 0x12, 0);
    name(&mut backwards);
    // Properties are field 3 of a track and field 2 of an identify.
    let entry = backwards.clone();
    wrap(&mut backwards, 0x1A, 0);
    let track_bytes = backwards.len();
    backwards.extend_from_slice(&entry);
    wrap(&mut backwards, 0x12, track_bytes);
    backwards.reverse();
    backwards
}

fn made_up_track(input: &mut Input<'_>) -> TrackEventRequest {
    TrackEventRequest {
        event_name: made_up_text(input),
        user_id: made_up_text(input),
        anonymous_id: made_up_text(input),
        event_id: made_up_text(input),
        timestamp: made_up_time(input) / 1000,
        timestamp_ms: made_up_time(input),
        durability: i32::from(input.byte() % 8),
        context: made_up_context(input),
        properties_json: made_up_json(input),
        properties: made_up_fields(input, 0),
    }
}

fn made_up_identify(input: &mut Input<'_>) -> IdentifyUserRequest {
    IdentifyUserRequest {
        user_id: made_up_text(input),
        anonymous_id: made_up_text(input),
        event_id: made_up_text(input),
        timestamp_ms: made_up_time(input),
        durability: i32::from(input.byte() % 8),
        context: made_up_context(input),
        properties_json: made_up_json(input),
        properties: made_up_fields(input, 0),
    }
}

/// Mostly none: it excludes the other properties.
fn made_up_json(input: &mut Input<'_>) -> Vec<u8> {
    match input.below(8) {
        0 => {
            let bytes = input.below(256);
            input.take(bytes).to_vec()
        }
        1 => br#" {"a": [1.50, {"b": null}], "": 1e999, "a": "twice"}"#.to_vec(),
        2 => br#"{"total":19.5,"id":9007199254740993}"#.to_vec(),
        _ => Vec::new(),
    }
}

fn made_up_context(input: &mut Input<'_>) -> Option<EventContext> {
    let ip = match input.below(6) {
        0 => return None,
        1 => "203.0.113.9".to_owned(),
        2 => "2001:db8::1".to_owned(),
        3 => made_up_text(input),
        _ => String::new(),
    };
    Some(EventContext { ip, user_agent: made_up_text(input), json: made_up_json(input) })
}

fn made_up_time(input: &mut Input<'_>) -> i64 {
    match input.below(6) {
        0 => input.u64().cast_signed(),
        1 => NOW_MS + i64::from(input.u16()) * 4096,
        2 => 946_684_800_000 - i64::from(input.u16()) + i64::from(input.u16()),
        _ => 0,
    }
}

/// Short, or as long as the limits, or longer.
fn made_up_text(input: &mut Input<'_>) -> String {
    match input.below(8) {
        0 => String::new(),
        1 => {
            let pattern = input.text();
            let times = 1 + input.below(64);
            pattern.repeat(times)
        }
        2 => char::from(input.byte()).to_string().repeat(usize::from(input.u16()) % 1100),
        3 => "time".to_owned(),
        _ => input.text(),
    }
}

fn made_up_fields(input: &mut Input<'_>, depth: usize) -> std::collections::HashMap<String, PropertyValue> {
    let count = match input.below(8) {
        0 => usize::from(input.u16()) % 300,
        count => count - 1,
    };
    let field = |input: &mut Input<'_>, index: usize| {
        let key = if input.flag() { format!("{index}") } else { made_up_text(input) };
        (key, made_up_value(input, depth + 1))
    };
    (0..count).map_while(|index| (!input.is_empty()).then(|| field(input, index))).collect()
}

fn made_up_value(input: &mut Input<'_>, depth: usize) -> PropertyValue {
    // Deeper than what is allowed, and than what can be decoded.
    const DEPTH_MAX: usize = 120;
    let value = match input.below(9) {
        0 => None,
        1 => Some(Value::StringValue(made_up_text(input))),
        2 => Some(Value::NumberValue(f64::from_bits(input.u64()))),
        3 => Some(Value::NumberValue(f64::from(input.byte()) / 4.0)),
        4 => Some(Value::BoolValue(input.flag())),
        5 => Some(Value::IntegerValue(input.u64().cast_signed())),
        _ if depth >= DEPTH_MAX || input.is_empty() => None,
        6 | 7 => {
            let items = input.below(12);
            let item = |input: &mut Input<'_>| made_up_value(input, depth + 1);
            Some(Value::ListValue(PropertyList { values: (0..items).map(|_| item(input)).collect() }))
        }
        _ => Some(Value::ObjectValue(PropertyObject { fields: made_up_fields(input, depth) })),
    };
    PropertyValue { value }
}
