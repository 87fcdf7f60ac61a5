//! Segment: everything through `/v1/batch`.
//!
//! Limits, as documented in Segment's HTTP API reference (checked 2026-11-20):
//!
//! | what | limit |
//! |---|---|
//! | events per request | 2,500 documented, 2,000 here |
//! | body | 500 KB documented, 450,000 bytes here |
//! | one event | 32 KB documented, 30,000 bytes here |
//! | `messageId` | 100 characters; deduplicated across all workspaces |
//! | requests | 1,000 a second advised |
//!
//! Sent again: 408, 410, 429, 460, 5xx, no answer, and an answer that is not
//! `{"success":true}`. **A 200 may hide a loss**: an event that Segment cannot
//! place, and any event under a wrong write key, is answered with a success. So what
//! can be checked is checked before it is sent, and "delivered" means "received"
//! here.

use std::borrow::Cow;

use jiff::Timestamp;
use serde::Deserialize;

use crate::{
    BatchLimits, Event, EventId, EventKind, Rejection, Secret, SendError, Verdict,
    event::Kind,
    http::{Encoded, Probe, Reply, Wire, WrongKey, body_for, no_form, object},
    json::Object,
    properties::entries,
};

const LIMITS: BatchLimits = BatchLimits { events_max: 2000, body_bytes_max: BODY_BYTES_MAX, requests_max: 8 };
const PATH: &str = "/v1/batch";
const BODY_BYTES_MAX: usize = 450_000;
const EVENT_BYTES_MAX: usize = 30_000;
/// A shorter id could be somebody else's: Segment compares ids of all its
/// customers.
const MESSAGE_ID_CHARS_MIN: usize = 16;

/// What events say about where they came through.
const LIBRARY: &str = concat!(r#"{"name":"analytics-relay","version":""#, env!("CARGO_PKG_VERSION"), r#""}"#);

/// Segment's wire contract.
#[derive(Debug)]
pub struct Segment {
    write_key: Secret,
}

impl Segment {
    /// `write_key` is the source's write key.
    pub fn new(write_key: Secret) -> Self {
        Self { write_key }
    }
}

impl Wire for Segment {
    fn name(&self) -> &'static str {
        "segment"
    }

    fn limits(&self) -> BatchLimits {
        LIMITS
    }

    fn encode(&self, batch: &[Event], now_ms: i64) -> Encoded {
        let mut body = body_for(batch);
        let mut rejected = Vec::new();
        let mut request = Object::begin(&mut body);
        // Segment corrects times by the difference of this and its own clock.
        let mut times = Iso8601::default();
        request.string("sentAt", times.text(now_ms));

        let mut items = request.list("batch");
        for (index, event) in batch.iter().enumerate() {
            if event.kind_alone() == Kind::Unknown {
                rejected.push(no_form(index, event));
                continue;
            }
            encode_item(items.object(), event, &mut times);
            let bytes = items.last_bytes();
            if bytes > EVENT_BYTES_MAX {
                items.remove_last();
                let detail = format!("{bytes} bytes, want at most {EVENT_BYTES_MAX}");
                rejected.push((index, Rejection::TooLarge, detail));
            }
        }
        items.end();
        request.end();
        Encoded {
            path: PATH,
            body: body.into_bytes(),
            form: false,
            gzip: false,
            basic_user: Some(self.write_key.clone()),
            body_bytes_max: BODY_BYTES_MAX,
            rejected,
        }
    }

    fn interpret(&self, sent: &[&Event], reply: &Reply) -> Result<Vec<Verdict>, SendError> {
        match reply.status {
            200 => match object(&reply.body) {
                Some(BatchReply { success: true }) => Ok(vec![Verdict::Delivered; sent.len()]),
                _ => Err(reply.unavailable()),
            },
            // Segment's own SDKs send it again.
            410 => Err(reply.unavailable()),
            _ => Err(reply.failure()),
        }
    }

    fn probes(&self, key: &Secret) -> Vec<Probe> {
        let request = Encoded {
            path: PATH,
            body: br#"{"batch":[]}"#.to_vec(),
            basic_user: Some(key.clone()),
            ..Encoded::default()
        };
        let debugger = "Segment answers a wrong key with a success: see in the source's debugger \
            whether events arrive";
        vec![Probe { request, wrong_key: WrongKey::Untold(debugger) }]
    }
}

/// This and nothing else is Segment's success.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BatchReply {
    success: bool,
}

fn encode_item(mut item: Object<'_>, event: &Event, times: &mut Iso8601) {
    let kind = event.kind();
    match kind {
        EventKind::Track { name } => {
            item.string("type", "track");
            item.string("event", name);
        }
        EventKind::Page { name, category } | EventKind::Screen { name, category } => {
            item.string("type", kind.name());
            item.optional("name", name);
            item.optional("category", category);
        }
        EventKind::Group { group_id } => {
            item.string("type", "group");
            item.string("groupId", group_id);
        }
        EventKind::Alias { previous_id } => {
            item.string("type", "alias");
            item.string("previousId", previous_id);
        }
        EventKind::Identify => item.string("type", "identify"),
        EventKind::Unknown { kind, .. } => item.string("type", kind),
    }
    item.optional("userId", event.user_id());
    match (event.user_id(), event.anonymous_id()) {
        // Segment drops an event of nobody: an unknown visitor stands in, the
        // same one at each attempt.
        (None, None) => item.string("anonymousId", &event.id().namespaced().to_string()),
        (_, anonymous_id) => item.optional("anonymousId", anonymous_id),
    }
    item.string("messageId", &message_id(event.id()));
    item.string("timestamp", times.text(event.time_ms()));
    encode_context(item.object("context"), event);
    match kind {
        EventKind::Track { .. } | EventKind::Page { .. } | EventKind::Screen { .. } => {
            item.raw("properties", event.properties().json());
        }
        // A null trait means to Segment what it means to us: remove it.
        EventKind::Identify | EventKind::Group { .. } => item.raw("traits", event.properties().json()),
        EventKind::Alias { .. } | EventKind::Unknown { .. } => {}
    }
    item.end();
}

/// As its caller sent it, but for what stands in the event's own fields.
fn encode_context(mut context: Object<'_>, event: &Event) {
    context.optional("ip", event.ip());
    context.optional("userAgent", event.user_agent());
    let sent = event.context_json().map(entries).unwrap_or_default();
    let own = [("ip", event.ip()), ("userAgent", event.user_agent())];
    for (key, value) in &sent {
        if !own.iter().any(|(name, own)| name == key && own.is_some()) {
            context.named_raw(key, value.get());
        }
    }
    let says = |name: &str| sent.iter().any(|(key, _)| key == name);
    if !says("library") {
        context.raw("library", LIBRARY);
    }
    // Found out by the relay; by an address Segment's destinations find the place.
    for (found, value) in event.enriched_json().map(entries).unwrap_or_default() {
        let name = match &*found {
            "campaign" | "page" => &*found,
            "geo" if event.ip().is_none() => "location",
            _ => continue,
        };
        if !says(name) {
            context.named_raw(name, value.get());
        }
    }
    context.end();
}

fn message_id(id: EventId<'_>) -> Cow<'_, str> {
    if id.as_str().len() < MESSAGE_ID_CHARS_MIN { id.namespaced().to_string().into() } else { id.into() }
}

/// Writes times in the form that Segment reads. Those of a batch are close
/// together, and what they share is kept: finding the date costs more than the
/// rest of an event.
#[derive(Default)]
struct Iso8601 {
    /// The last time, and the second in which it was.
    text: String,
    second: Option<i64>,
}

impl Iso8601 {
    fn text(&mut self, unix_ms: i64) -> &str {
        let second = unix_ms.div_euclid(1000);
        if self.second != Some(second) {
            // A time outside of what can be written was refused at admission.
            let time = Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH);
            self.text = format!("{time:.3}");
            self.second = Some(second);
        }
        self.text.truncate(self.text.len() - "000Z".len());
        let millis = unix_ms.rem_euclid(1000);
        let digit = |power: i64| char::from(b'0' + u8::try_from(millis / power % 10).unwrap_or_default());
        self.text.extend([digit(100), digit(10), digit(1), 'Z']);
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        event::{
            EventParts, JsonObject, MoreParts,
            tests_support::{identify, parts, track},
        },
        properties::Limits,
    };

    fn encode(event: Event) -> Encoded {
        Segment::new(Secret::new("key")).encode(&[event], 1_767_225_601_000)
    }

    fn item(event: Event) -> Value {
        serde_json::from_slice::<Value>(&encode(event).body).unwrap()["batch"][0].clone()
    }

    fn interpret(status: u16, body: &str) -> Result<Vec<Verdict>, SendError> {
        let event = track("x", "{}");
        let reply = Reply { status, body: body.into(), ..Reply::default() };
        Segment::new(Secret::new("key")).interpret(&[&event], &reply)
    }

    #[test]
    fn what_the_relay_found_out_is_added_to_a_context_that_lacks_it() {
        let enriched = r#"{"v":1,"agent":{"os":"iOS"},"geo":{"country":"DE"},"campaign":{"source":"mail"},
            "page":{"url":"https://x.example/"}}"#;
        let context_of = |context: &str, ip: Option<IpAddr>| {
            let mut event = parts("x", "{}");
            event.ip = ip;
            event.more = Some(Box::new(MoreParts {
                context: Some(JsonObject::of_relay(context)),
                enriched: Some(JsonObject::of_relay(enriched)),
                ..MoreParts::default()
            }));
            item(Event::pack(&event))["context"].clone()
        };
        let added = context_of("{}", None);
        assert_eq!(added["location"], json!({"country": "DE"}));
        assert_eq!(added["campaign"], json!({"source": "mail"}));
        assert_eq!(added["page"], json!({"url": "https://x.example/"}));
        assert!(added.get("agent").is_none());
        let own = context_of(r#"{"campaign":null,"page":{"path":"/"}}"#, Some([203, 0, 113, 0].into()));
        assert_eq!((&own["campaign"], &own["page"]), (&Value::Null, &json!({"path": "/"})));
        assert!(own.get("location").is_none(), "they find it by the address");
    }

    #[test]
    fn a_track_is_one_item_of_a_batch() {
        let mut event = parts("Order Placed", r#"{"total":19.5}"#);
        event.id = EventId::new("6f1c2a9e-2b7d-4c55-9a53-0d2f6f0a7b11").unwrap();
        event.ip = Some("2001:db8::1".parse().unwrap());
        let body: Value = serde_json::from_slice(&encode(Event::pack(&event)).body).unwrap();
        let library = json!({"name": "analytics-relay", "version": env!("CARGO_PKG_VERSION")});
        assert_eq!(
            body,
            json!({"sentAt": "2026-01-01T00:00:01.000Z", "batch": [{
                "type": "track", "event": "Order Placed", "userId": "user-1",
                "messageId": "6f1c2a9e-2b7d-4c55-9a53-0d2f6f0a7b11", "timestamp": "2026-01-01T00:00:00.000Z",
                "context": {"ip": "2001:db8::1", "library": library}, "properties": {"total": 19.5}}]})
        );
    }

    #[test]
    fn every_kind_is_an_item_of_its_own_type() {
        let item_of = |kind| {
            item(Event::pack(&EventParts {
                kind,
                anonymous_id: Some("device-1"),
                ..parts("x", r#"{"a":1}"#)
            }))
        };
        let page = EventKind::Page { name: Some("Home"), category: Some("Docs") };
        let rows = [
            (page, json!({"type": "page", "name": "Home", "category": "Docs", "properties": {"a": 1}})),
            (
                EventKind::Screen { name: None, category: None },
                json!({"type": "screen", "properties": {"a": 1}}),
            ),
            (
                EventKind::Group { group_id: "g" },
                json!({"type": "group", "groupId": "g", "traits": {"a": 1}}),
            ),
            (EventKind::Alias { previous_id: "user-0" }, json!({"type": "alias", "previousId": "user-0"})),
        ];
        for (kind, mut want) in rows {
            let mut found = item_of(kind);
            let given = json!({"userId": "user-1", "anonymousId": "device-1"});
            want.as_object_mut().unwrap().extend(given.as_object().unwrap().clone());
            let found = found.as_object_mut().unwrap();
            for common in ["messageId", "timestamp", "context"] {
                assert!(found.remove(common).is_some(), "{common}");
            }
            assert_eq!(Value::Object(found.clone()), want);
        }
        let unknown = EventKind::Unknown { kind: "purchase", json: "{}" };
        let encoded = encode(Event::pack(&EventParts { kind: unknown, ..parts("x", "{}") }));
        assert!(matches!(encoded.rejected[..], [(0, Rejection::UnknownKind, _)]), "{:?}", encoded.rejected);
    }

    #[test]
    fn a_context_is_relayed_as_it_was_sent_but_for_the_events_own_fields() {
        let sent = r#"{"ip":"10.0.0.9","locale":"de","n":9007199254740993,"library":{"name":"web"}}"#;
        let context = |ip: Option<&str>, sent: &str| {
            let more = MoreParts {
                context: Some(JsonObject::parse(sent, &Limits::DEFAULT).unwrap()),
                ..MoreParts::default()
            };
            let ip = ip.map(|ip| ip.parse().unwrap());
            let encoded = encode(Event::pack(&EventParts { ip, more: more.if_any(), ..parts("x", "{}") }));
            let body: Value = serde_json::from_slice(&encoded.body).unwrap();
            body["batch"][0]["context"].clone()
        };
        let all: Value = serde_json::from_str(sent).unwrap();
        assert_eq!(context(None, sent), all);
        let mut own = all;
        own["ip"] = json!("2001:db8::1");
        assert_eq!(context(Some("2001:db8::1"), sent), own);
        assert_eq!(context(None, "{}")["library"]["name"], "analytics-relay");
    }

    #[test]
    fn times_keep_their_milliseconds() {
        let mut times = Iso8601::default();
        for (unix_ms, want) in [
            (1_767_225_600_007, "2026-01-01T00:00:00.007Z"),
            (1_767_225_600_990, "2026-01-01T00:00:00.990Z"),
            (1_767_225_601_000, "2026-01-01T00:00:01.000Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
            (i64::MAX, "1970-01-01T00:00:00.807Z"),
        ] {
            assert_eq!(times.text(unix_ms), want);
        }
    }

    #[test]
    fn an_identify_keeps_its_nulls() {
        let item = item(identify(r#"{"plan":"pro","legacy":null}"#));
        assert_eq!(item["type"], "identify");
        assert_eq!(item["traits"], json!({"plan": "pro", "legacy": null}));
    }

    #[test]
    fn a_short_id_gets_our_namespace() {
        let event = track("x", "{}");
        let want = event.id().namespaced().to_string();
        assert_eq!(item(event)["messageId"], want);
    }

    #[test]
    fn an_event_of_nobody_gets_a_visitor_that_never_changes() {
        let event = Event::pack(&EventParts { user_id: None, ..parts("x", "{}") });
        let want = event.id().namespaced().to_string();
        assert_eq!(item(event)["anonymousId"], want);
    }

    #[test]
    fn an_event_that_is_too_large_is_rejected_here() {
        // Within admission's limits nothing reaches Segment's, so widen one.
        let long = "x".repeat(EVENT_BYTES_MAX);
        let event = Event::pack(&EventParts { anonymous_id: Some(&long), ..parts("x", "{}") });
        let encoded = encode(event);
        assert_eq!(encoded.rejected[0].1, Rejection::TooLarge);
        assert_eq!(serde_json::from_slice::<Value>(&encoded.body).unwrap()["batch"], json!([]));
    }

    #[test]
    fn each_status_is_answered_as_segment_documents_it() {
        assert_eq!(interpret(200, r#"{"success":true}"#), Ok(vec![Verdict::Delivered]));
        for status in [408, 410, 429, 460, 500, 502, 503, 504] {
            assert!(matches!(interpret(status, ""), Err(SendError::Unavailable { .. })), "{status}");
        }
        for status in [401, 402, 403, 511] {
            assert!(matches!(interpret(status, ""), Err(SendError::Unauthorized { .. })), "{status}");
        }
        for status in [307, 404, 405, 501, 505] {
            assert!(matches!(interpret(status, ""), Err(SendError::Misdirected { .. })), "{status}");
        }
        // No answer of Segment's names an event.
        for status in [400, 422] {
            assert!(matches!(interpret(status, "{}"), Err(SendError::Refused { .. })), "{status}");
        }
        assert!(matches!(interpret(413, "{}"), Err(SendError::TooLarge { .. })));
        for junk in ["", "<html>", "{}", r#"{"success":false}"#, "[[[["] {
            assert!(matches!(interpret(200, junk), Err(SendError::Unavailable { .. })), "{junk}");
        }
    }
}
