//! Segment: `POST /v1/batch`.
//!
//! Limits enforced: 500 KB a request, 32 KB and 100 characters of `messageId` an
//! event, 2500 events.
//!
//! Answers 200 to nearly everything and discards afterwards, without a word, what
//! it cannot use; such events are counted as rejected here. So are all events of a
//! request with a write key that is nobody's.
//!
//! Documented at segment.com/docs/connections/sources/catalog/libraries/server/http-api
//! and on its page of discard reasons, as of November 2025.

use std::collections::HashMap;

use hyper::{Method, StatusCode};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::contract::{Coding, Judgement, Request, Terms, present, text};
use super::record::{Arrival, TakenKind};

const BODY_MAX_BYTES: usize = 500_000;
const EVENT_MAX_BYTES: usize = 32 * 1024;
const EVENTS_MAX: usize = 2500;
const MESSAGE_ID_MAX_CHARS: usize = 100;

/// Judges a request.
pub(super) fn judge(request: &Request<'_>, terms: &Terms<'_>) -> Judgement {
    let items = match batch(request) {
        Ok(items) => items,
        Err((status, error)) => return Judgement::refuse(status, refusal_saying(status, error)),
    };
    let events = items.len();
    if items.iter().any(|item| item.get().len() > EVENT_MAX_BYTES) {
        let body = refusal_saying(400, "an event exceeds 32 KB");
        return Judgement { events, ..Judgement::refuse(400, body) };
    }

    // Beyond the limit, or with a wrong key, the whole batch is accepted, then
    // discarded.
    let taken: Vec<_> = match events {
        0..=EVENTS_MAX if request.has_basic_key(terms.key) => {
            items.iter().filter_map(|item| event(item.get(), terms)).collect()
        }
        _ => Vec::new(),
    };
    let rejected = (events - taken.len()) as u64;
    Judgement { status: 200, body: json!({"success": true}), events, taken, rejected }
}

/// The body that goes with a status refusing the whole request.
pub(super) fn refusal(status: u16) -> Value {
    let status_code = StatusCode::from_u16(status).ok();
    refusal_saying(status, status_code.and_then(|status| status.canonical_reason()).unwrap_or("Error"))
}

fn refusal_saying(status: u16, error: &str) -> Value {
    json!({"success": false, "code": status, "message": error})
}

/// The items, unless the request as a whole is wrong.
fn batch<'a>(request: &Request<'a>) -> Result<Vec<&'a RawValue>, (u16, &'static str)> {
    if request.method != Method::POST {
        return Err((405, "Method Not Allowed"));
    }
    if request.basic_user().is_none_or(|key| key.is_empty()) {
        return Err((400, "writeKey, missing or empty"));
    }
    if !request.is_json() {
        return Err((400, "want Content-Type application/json"));
    }
    if request.content.exceeds(BODY_MAX_BYTES) {
        return Err((400, "the body exceeds 500 KB"));
    }
    if request.content.coding == Coding::Unreadable {
        return Err((400, "want Content-Encoding gzip or none"));
    }
    let body: HashMap<String, &RawValue> =
        serde_json::from_slice(&request.content.bytes).map_err(|_| (400, "malformed JSON"))?;
    let sent_at = body.get("sentAt").and_then(|raw| serde_json::from_str::<String>(raw.get()).ok());
    if !sent_at.is_some_and(|time| is_iso_8601(&time)) {
        return Err((400, "sentAt, want ISO 8601"));
    }
    let items = body.get("batch").and_then(|raw| serde_json::from_str::<Vec<&RawValue>>(raw.get()).ok());
    items.filter(|items| !items.is_empty()).ok_or((400, "batch, want a non-empty array"))
}

/// The event, or None if the vendor would discard it.
fn event(raw: &str, terms: &Terms<'_>) -> Option<Arrival> {
    let Ok(Value::Object(item)) = serde_json::from_str(raw) else { return None };
    let kind = match text(&item, "type") {
        "track" => TakenKind::Track,
        "identify" => TakenKind::Identify,
        "page" => TakenKind::Page,
        "screen" => TakenKind::Screen,
        "group" => TakenKind::Group,
        "alias" => TakenKind::Alias,
        _ => return None,
    };
    let id = text(&item, "messageId");
    let user = user(&item)?;
    // What names it, what it must have, and where the rest of it is.
    let (name, must, payload) = match kind {
        TakenKind::Track => (text(&item, "event"), Some("event"), "properties"),
        TakenKind::Identify => ("", None, "traits"),
        TakenKind::Page | TakenKind::Screen => (text(&item, "name"), None, "properties"),
        TakenKind::Group => (text(&item, "groupId"), Some("groupId"), "traits"),
        TakenKind::Alias => (text(&item, "previousId"), Some("previousId"), "traits"),
    };
    let strings = ["event", "name", "category", "groupId", "previousId"]
        .iter()
        .all(|field| present(&item, field).is_none_or(Value::is_string));
    let usable = (1..=MESSAGE_ID_MAX_CHARS).contains(&id.chars().count())
        && is_iso_8601(text(&item, "timestamp"))
        && strings
        && must.is_none_or(|field| !text(&item, field).is_empty())
        && (kind != TakenKind::Alias || !text(&item, "userId").is_empty())
        && [payload, "context", "integrations"]
            .iter()
            .all(|part| item.get(*part).is_none_or(Value::is_object));
    let rejected = terms.fault.is_some_and(|fault| fault.rejects(id, user, name));
    (usable && !rejected).then(|| Arrival {
        dedup_key: Some(id.to_owned()),
        id: id.to_owned(),
        kind,
        user: user.to_owned(),
        name: name.to_owned(),
        event: raw.into(),
    })
}

/// `userId`, else `anonymousId`. One that is present must be a string.
fn user(item: &Map<String, Value>) -> Option<&str> {
    let strings =
        ["userId", "anonymousId"].iter().all(|name| present(item, name).is_none_or(Value::is_string));
    let user = [text(item, "userId"), text(item, "anonymousId")].into_iter().find(|id| !id.is_empty());
    user.filter(|_| strings)
}

fn is_iso_8601(text: &str) -> bool {
    // The parser also reads a space between date and time, and an annotation behind.
    text.contains('T') && !text.contains('[') && text.parse::<jiff::Timestamp>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::contract::testing::Sample;
    use super::*;

    fn event(id: &str) -> Value {
        json!({
            "type": "track", "event": "Order Placed", "userId": "user-1", "anonymousId": "device-1",
            "messageId": id, "timestamp": "2026-01-01T00:00:00.000Z", "properties": {"total": 19.5},
            "context": {"ip": "203.0.113.9"},
        })
    }

    fn with(field: &str, value: Value) -> Value {
        let mut event = event("id-1");
        event[field] = value;
        event
    }

    fn without(fields: &[&str]) -> Value {
        let mut event = event("id-1");
        event.as_object_mut().unwrap().retain(|name, _| !fields.contains(&name.as_str()));
        event
    }

    fn batch(items: Value) -> Sample {
        Sample::new("/v1/batch", json!({"sentAt": "2026-01-01T00:00:01.000Z", "batch": items}))
    }

    #[test]
    fn good_events_are_taken_plain_and_gzipped() {
        let identify = json!({
            "type": "identify", "userId": "user-1", "messageId": "b", "timestamp": "2026-01-01T01:00:00+01:00",
            "traits": {"plan": "pro", "old": null},
        });
        let items = json!([event("a"), identify, without(&["userId"])]);
        for sample in [batch(items.clone()), batch(items).gzip()] {
            let judgement = sample.judge(judge);
            assert_eq!((judgement.status, &judgement.body), (200, &json!({"success": true})));
            let users: Vec<_> = judgement.taken.iter().map(|taken| taken.user.as_str()).collect();
            assert_eq!(users, ["user-1", "user-1", "device-1"]);
            assert_eq!(judgement.taken[1].kind, TakenKind::Identify);
            assert_eq!(judgement.rejected, 0);
        }
    }

    #[test]
    fn a_wrong_request_is_refused_whole() {
        let body = |body: Value| Sample::new("/v1/batch", body);
        let sent_at = "2026-01-01T00:00:01Z";
        let wrong = [
            // No user name.
            (batch(json!([event("a")])).header("authorization", "Basic Og=="), 400),
            (batch(json!([event("a")])).header("authorization", "Bearer token"), 400),
            (batch(json!([event("a")])).header("content-type", "text/plain"), 400),
            (batch(json!([event("a")])).header("content-encoding", "br"), 400),
            (body(json!({"batch": [event("a")]})), 400),
            (body(json!({"sentAt": "yesterday", "batch": [event("a")]})), 400),
            (body(json!({"sentAt": sent_at})), 400),
            (body(json!({"sentAt": sent_at, "batch": []})), 400),
            (body(json!({"sentAt": sent_at, "batch": {}})), 400),
            (body(json!([])), 400),
            (Sample::new("/v1/batch", "{"), 400),
            (batch(json!([event("a"), with("properties", json!({"a": "a".repeat(32 * 1024)}))])), 400),
            (
                batch(Value::from_iter(
                    (0..20).map(|_| with("properties", json!({"a": "a".repeat(30_000)}))),
                )),
                400,
            ),
        ];
        for (sample, status) in wrong {
            let judgement = sample.judge(judge);
            assert_eq!((judgement.status, judgement.taken.len(), judgement.rejected), (status, 0, 0));
            assert_eq!(judgement.body["success"], false);
        }
    }

    #[test]
    fn an_unusable_event_is_lost_behind_a_success() {
        let unusable = [
            json!("text"),
            with("type", json!("purchase")),
            with("type", json!("group")),
            with("type", json!("alias")),
            with("name", json!(7)),
            without(&["type"]),
            with("messageId", json!("")),
            with("messageId", json!("a".repeat(101))),
            without(&["messageId"]),
            without(&["userId", "anonymousId"]),
            with("userId", json!(7)),
            with("event", json!("")),
            with("event", json!(7)),
            with("properties", json!([])),
            with("context", Value::Null),
            with("timestamp", json!(1_767_225_600_000_i64)),
            with("timestamp", json!("2026-01-01")),
            without(&["timestamp"]),
        ];
        for item in unusable {
            let judgement = batch(json!([event("a"), item])).judge(judge);
            assert_eq!((judgement.status, &judgement.body), (200, &json!({"success": true})));
            assert_eq!((judgement.taken.len(), judgement.rejected), (1, 1), "{item}");
        }
    }

    #[test]
    fn every_kind_is_taken_with_what_it_must_have() {
        let mut group = with("type", json!("group"));
        group["groupId"] = json!("group-1");
        let mut alias = with("type", json!("alias"));
        alias["previousId"] = json!("user-0");
        let mut page = with("type", json!("page"));
        page["name"] = json!("Home");
        let items = json!([event("a"), page, with("type", json!("screen")), group, alias]);
        let judgement = batch(items).judge(judge);
        let taken: Vec<_> = judgement.taken.iter().map(|taken| (taken.kind, &*taken.name)).collect();
        let want = [
            (TakenKind::Track, "Order Placed"),
            (TakenKind::Page, "Home"),
            (TakenKind::Screen, ""),
            (TakenKind::Group, "group-1"),
            (TakenKind::Alias, "user-0"),
        ];
        assert_eq!((&taken[..], judgement.rejected), (&want[..], 0));
    }

    #[test]
    fn a_batch_with_too_many_events_is_lost_behind_a_success() {
        let mut tiny = without(&["anonymousId", "properties", "context"]);
        tiny["event"] = json!("a");
        let judgement = batch(Value::from_iter(vec![tiny.clone(); 2501])).judge(judge);
        assert_eq!((judgement.status, judgement.taken.len(), judgement.rejected), (200, 0, 2501));
        assert_eq!(batch(Value::from_iter(vec![tiny; 2500])).judge(judge).taken.len(), 2500);
    }

    #[test]
    fn all_events_under_a_wrong_key_are_lost_behind_a_success() {
        let judgement = batch(json!([event("a")])).header("authorization", "Basic bm9wZTo=").judge(judge);
        assert_eq!((judgement.status, &judgement.body), (200, &json!({"success": true})));
        assert_eq!((judgement.taken.len(), judgement.rejected), (0, 1));
    }

    #[test]
    fn rejections_on_request_are_silent() {
        let judgement =
            batch(json!([event("a"), with("event", json!("bad"))])).fault("reject-name=bad").judge(judge);
        assert_eq!((judgement.status, judgement.taken.len(), judgement.rejected), (200, 1, 1));
    }
}
