//! Amplitude: `POST /batch` and `POST /2/httpapi`.
//!
//! Limits enforced: 20 MB and 2000 events a request on `/batch`; on `/2/httpapi`
//! less than 1 MB and less than 2000 events. 40 levels of properties. 5 types of groups
//! and 10 groups an event, and what is known of a group only in a `$groupidentify`.
//! Types that begin with `[Amplitude] ` are its own: of these, those that its SDKs send.
//!
//! All or nothing: a 400 or 429 that lists events has taken none of them, and
//! wants the rest sent again without them.
//!
//! Documented at amplitude.com/docs/apis/analytics (batch event upload, HTTP V2);
//! the length rule for ids is known from Amplitude's SDKs. As of March 2026.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use hyper::{Method, StatusCode};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::contract::{Coding, Judgement, Request, Terms, depth, present, text};
use super::fault::Fault;
use super::record::{Arrival, TakenKind};

const ID_MIN_CHARS: u64 = 5;
const NESTED_MAX_DEPTH: usize = 40;
const YEAR_2000_MS: i64 = 946_684_800_000;

/// What stands for "no id" in one client or another. Compared exactly.
const FORBIDDEN_IDS: [&str; 14] = [
    "",
    "00000000-0000-0000-0000-000000000000",
    "anonymous",
    "nil",
    "none",
    "null",
    "n/a",
    "na",
    "undefined",
    "unknown",
    "{}",
    "lmy47d",
    "0",
    "-1",
];

/// Types of its own that its SDKs send.
const SDK_TYPES: [&str; 2] = ["[Amplitude] Page Viewed", "[Amplitude] Screen Viewed"];
const GROUP_TYPES_MAX: usize = 5;
const GROUPS_MAX: usize = 10;

/// Fields that are texts, if they are there.
const TEXT_FIELDS: [&str; 15] = [
    "user_agent",
    "library",
    "language",
    "os_name",
    "os_version",
    "device_brand",
    "device_manufacturer",
    "device_model",
    "platform",
    "app_version",
    "carrier",
    "country",
    "region",
    "city",
    "dma",
];

const OPERATIONS: [&str; 10] = [
    "$set",
    "$setOnce",
    "$add",
    "$append",
    "$prepend",
    "$preInsert",
    "$postInsert",
    "$remove",
    "$unset",
    "$clearAll",
];

/// Judges a request to either path.
pub(super) fn judge(request: &Request<'_>, terms: &Terms<'_>) -> Judgement {
    let upload = match upload(request, terms) {
        Ok(upload) => upload,
        Err((status, body)) => return Judgement::refuse(status, body),
    };

    let mut taken = Vec::with_capacity(upload.events.len());
    let mut faults = Faults::default();
    let mut held = Held::default();
    for (index, raw) in upload.events.iter().enumerate() {
        let event = match serde_json::from_str(raw.get()) {
            Ok(Value::Object(event)) => event,
            _ => {
                let body = json!({"code": 400, "error": "Invalid event JSON"});
                return Judgement { events: upload.events.len(), ..Judgement::refuse(400, body) };
            }
        };
        let before = faults.len();
        check_event(&event, upload.id_min_chars, |kind, field| faults.add(kind, field, index));
        let arrival = arrival(raw.get(), &event);
        if faults.len() == before && rejects(terms.fault, &arrival) {
            faults.add(Kind::Invalid, "event_properties", index);
        }
        held.consider(terms.fault, &event, index);
        taken.push(arrival);
    }

    let events = taken.len();
    let refuse = |status, body, rejected: usize| Judgement {
        events,
        rejected: rejected as u64,
        ..Judgement::refuse(status, body)
    };
    if faults.len() > 0 {
        return refuse(400, faults.body(), faults.len());
    }
    match terms.fault {
        Some(Fault::ThrottleUsers { .. }) if !held.events.is_empty() => refuse(429, held.throttled(), 0),
        Some(Fault::DailyQuota { .. }) if !held.events.is_empty() => refuse(429, held.over_quota(), 0),
        Some(Fault::SilenceDevices { .. }) if !held.events.is_empty() => {
            refuse(400, held.silenced(), held.events.len())
        }
        _ => {
            let body = json!({
                "code": 200,
                "events_ingested": events,
                "payload_size_bytes": request.content.bytes.len(),
                "server_upload_time": terms.now_ms,
            });
            Judgement { status: 200, body, events, taken, rejected: 0 }
        }
    }
}

/// The body that goes with a status refusing the whole request.
pub(super) fn refusal(status: u16) -> Value {
    let reason =
        StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Error");
    match status {
        400 => json!({"code": 400, "error": "Invalid JSON request body"}),
        413 => json!({"code": 413, "error": "Payload too large"}),
        429 => Held::default().throttled(),
        _ => json!({"code": status, "error": reason}),
    }
}

/// The request once its envelope is right.
struct Upload<'a> {
    events: Vec<&'a RawValue>,
    id_min_chars: u64,
}

fn upload<'a>(request: &Request<'a>, terms: &Terms<'_>) -> Result<Upload<'a>, (u16, Value)> {
    let bad = |error: &str| (400, json!({"code": 400, "error": error}));
    let missing = |field: &str| {
        let error = "Request missing required field";
        (400, json!({"code": 400, "error": error, "missing_field": field}))
    };
    let (body_max_bytes, events_max) = match request.path {
        "/2/httpapi" => (999_999, 1999),
        _ => (20_000_000, 2000),
    };

    if request.method != Method::POST {
        return Err((405, refusal(405)));
    }
    if request.content.exceeds(body_max_bytes) {
        return Err((413, refusal(413)));
    }
    if !request.is_json() || request.content.coding == Coding::Unreadable {
        return Err((400, refusal(400)));
    }
    let body: HashMap<String, &RawValue> =
        serde_json::from_slice(&request.content.bytes).map_err(|_| (400, refusal(400)))?;
    let member = |name: &str| body.get(name).map(|raw| raw.get()).filter(|raw| *raw != "null");

    let api_key = member("api_key").ok_or_else(|| missing("api_key"))?;
    let api_key: String = serde_json::from_str(api_key).map_err(|_| bad("Invalid API key: not a string"))?;
    if api_key != terms.key {
        // The vendor does repeat the key: whoever logs this answer has logged a key.
        return Err(bad(&format!("Invalid API key: {api_key}")));
    }
    let id_min_chars = match member("options") {
        None => ID_MIN_CHARS,
        Some(options) => {
            let options: Value = serde_json::from_str(options).unwrap_or_default();
            let length = options.get("min_id_length").map_or(Some(ID_MIN_CHARS), Value::as_u64);
            length
                .filter(|length| options.is_object() && *length > 0)
                .ok_or_else(|| bad("Invalid options"))?
        }
    };
    let events = member("events").ok_or_else(|| missing("events"))?;
    let events: Vec<&RawValue> = serde_json::from_str(events).map_err(|_| (400, refusal(400)))?;
    match events.len() {
        0 => Err(missing("events")),
        len if len > events_max => Err((413, refusal(413))),
        _ => Ok(Upload { events, id_min_chars }),
    }
}

/// What an event can be blamed for.
#[derive(Clone, Copy)]
enum Kind {
    Invalid,
    Missing,
    IdLength,
}

/// Reports every rule the event breaks.
fn check_event(event: &Map<String, Value>, id_min_chars: u64, mut blame: impl FnMut(Kind, &'static str)) {
    let name = match present(event, "event_type") {
        None => {
            blame(Kind::Missing, "event_type");
            ""
        }
        Some(name) => {
            let name = name.as_str().unwrap_or_default();
            let of_its_own = name.starts_with("[Amplitude] ") && !SDK_TYPES.contains(&name);
            let reserved = name == "revenue_amount" || of_its_own;
            if name.is_empty() || reserved {
                blame(Kind::Invalid, "event_type");
            }
            name
        }
    };

    check_ids(event, id_min_chars, &mut blame);
    check_fields(event, &mut blame);
    check_groups(event, name, &mut blame);
    match present(event, "user_properties") {
        Some(Value::Object(properties)) if !are_user_properties(properties) => {
            blame(Kind::Invalid, "user_properties")
        }
        None if name == "$identify" => blame(Kind::Missing, "user_properties"),
        _ => {}
    }
}

fn check_ids(event: &Map<String, Value>, id_min_chars: u64, blame: &mut impl FnMut(Kind, &'static str)) {
    let mut usable = false;
    let mut short = None;
    for field in ["user_id", "device_id"] {
        match present(event, field).map(|id| id.as_str().unwrap_or_default()) {
            None => {}
            // "" stands here for what is not a string, too.
            Some(id) if FORBIDDEN_IDS.contains(&id) => {
                blame(Kind::Invalid, field);
                usable = true;
            }
            // A short id is removed without a word, as long as the other one remains.
            Some(id) if (id.chars().count() as u64) < id_min_chars => short = short.or(Some(field)),
            Some(_) => usable = true,
        }
    }
    match short {
        _ if usable => {}
        Some(field) => blame(Kind::IdLength, field),
        None => blame(Kind::Missing, "user_id"),
    }
}

fn check_fields(event: &Map<String, Value>, blame: &mut impl FnMut(Kind, &'static str)) {
    match present(event, "time") {
        // The vendor would put its own time: an event that lost its time on the way.
        None => blame(Kind::Missing, "time"),
        Some(time) if time.as_i64().is_some_and(|time| time >= YEAR_2000_MS) => {}
        Some(_) => blame(Kind::Invalid, "time"),
    }
    if present(event, "insert_id").is_some_and(|id| id.as_str().is_none_or(str::is_empty)) {
        blame(Kind::Invalid, "insert_id");
    }
    for field in ["event_id", "session_id"] {
        if present(event, field).is_some_and(|number| !number.is_i64()) {
            blame(Kind::Invalid, field);
        }
    }
    // "$remote" would make every event come from the relay.
    if present(event, "ip").is_some_and(|ip| ip.as_str().is_none_or(|ip| ip.is_empty() || ip == "$remote")) {
        blame(Kind::Invalid, "ip");
    }
    for field in TEXT_FIELDS {
        if present(event, field).is_some_and(|text| text.as_str().is_none_or(str::is_empty)) {
            blame(Kind::Invalid, field);
        }
    }
    for field in ["location_lat", "location_lng"] {
        if present(event, field).is_some_and(|number| !number.is_number()) {
            blame(Kind::Invalid, field);
        }
    }
    for field in ["event_properties", "user_properties"] {
        let usable = |value: &Value| value.is_object() && depth(value) <= NESTED_MAX_DEPTH;
        if present(event, field).is_some_and(|value| !usable(value)) {
            blame(Kind::Invalid, field);
        }
    }
}

/// Which groups, and what is known of one.
fn check_groups(event: &Map<String, Value>, name: &str, blame: &mut impl FnMut(Kind, &'static str)) {
    let is_id = |id: &Value| id.as_str().is_some_and(|id| !id.is_empty());
    let ids = |ids: &Value| match ids {
        Value::Array(ids) if ids.iter().all(is_id) => ids.len(),
        id => usize::from(is_id(id)),
    };
    match present(event, "groups") {
        Some(Value::Object(groups)) => {
            let counts: Vec<_> = groups.values().map(ids).collect();
            let is_right = !counts.contains(&0) && counts.iter().sum::<usize>() <= GROUPS_MAX;
            if !is_right || counts.is_empty() || counts.len() > GROUP_TYPES_MAX {
                blame(Kind::Invalid, "groups");
            }
        }
        Some(_) => blame(Kind::Invalid, "groups"),
        None if name == "$groupidentify" => blame(Kind::Missing, "groups"),
        None => {}
    }
    let is_right = |known: &Map<String, Value>| !known.is_empty() && are_user_properties(known);
    match present(event, "group_properties") {
        // Elsewhere the vendor ignores it: what was said of the group would be lost.
        Some(Value::Object(known)) if name == "$groupidentify" && is_right(known) => {}
        Some(_) => blame(Kind::Invalid, "group_properties"),
        None if name == "$groupidentify" => blame(Kind::Missing, "group_properties"),
        None => {}
    }
}

/// Either all operations or all plain properties.
fn are_user_properties(properties: &Map<String, Value>) -> bool {
    let operations = properties.keys().filter(|name| name.starts_with('$')).count();
    let consistent = operations == 0 || operations == properties.len();
    consistent
        && properties.iter().filter(|(name, _)| name.starts_with('$')).all(|(name, operand)| {
            match name.as_str() {
                "$clearAll" => true,
                // Values are ignored.
                "$unset" => operand.is_object(),
                name => {
                    let operand = operand.as_object();
                    OPERATIONS.contains(&name)
                        && operand.is_some_and(|values| !values.values().any(Value::is_null))
                }
            }
        })
}

fn arrival(raw: &str, event: &Map<String, Value>) -> Arrival {
    let (name, id) = (text(event, "event_type"), text(event, "insert_id"));
    let group = || event.get("groups")?.as_object()?.values().next()?.as_str();
    let (kind, name) = match name {
        "$identify" => (TakenKind::Identify, ""),
        "$groupidentify" => (TakenKind::Group, group().unwrap_or_default()),
        name => (TakenKind::Track, name),
    };
    Arrival {
        dedup_key: (!id.is_empty()).then(|| id.to_owned()),
        id: id.to_owned(),
        kind,
        user: present(event, "user_id")
            .map_or(text(event, "device_id"), |_| text(event, "user_id"))
            .to_owned(),
        name: name.to_owned(),
        event: raw.into(),
    }
}

fn rejects(fault: Option<&Fault>, arrival: &Arrival) -> bool {
    fault.is_some_and(|fault| fault.rejects(&arrival.id, &arrival.user, &arrival.name))
}

/// The broken rules: field to the indexes of events, by kind.
#[derive(Default)]
struct Faults {
    invalid: BTreeMap<&'static str, Vec<usize>>,
    missing: BTreeMap<&'static str, Vec<usize>>,
    id_length: BTreeMap<&'static str, Vec<usize>>,
    events: BTreeSet<usize>,
}

impl Faults {
    fn add(&mut self, kind: Kind, field: &'static str, index: usize) {
        let fields = match kind {
            Kind::Invalid => &mut self.invalid,
            Kind::Missing => &mut self.missing,
            Kind::IdLength => &mut self.id_length,
        };
        let indexes = fields.entry(field).or_default();
        if indexes.last() != Some(&index) {
            indexes.push(index);
        }
        self.events.insert(index);
    }

    /// Events at fault.
    fn len(&self) -> usize {
        self.events.len()
    }

    fn body(&self) -> Value {
        json!({
            "code": 400,
            "error": "Request has invalid or missing fields on some events",
            "missing_field": null,
            "events_with_invalid_fields": self.invalid,
            "events_with_missing_fields": self.missing,
            "events_with_invalid_id_lengths": self.id_length,
            "silenced_events": [],
            "silenced_devices": [],
            "throttled_events": [],
        })
    }
}

/// The events, users and devices a fault holds back.
#[derive(Default)]
struct Held {
    events: Vec<usize>,
    users: BTreeMap<String, u32>,
    devices: BTreeMap<String, u32>,
}

impl Held {
    fn consider(&mut self, fault: Option<&Fault>, event: &Map<String, Value>, index: usize) {
        let (users, devices): (&[String], &[String]) = match fault {
            Some(Fault::ThrottleUsers { users } | Fault::DailyQuota { users }) => (users, users),
            Some(Fault::SilenceDevices { devices }) => (&[], devices),
            _ => return,
        };
        let (user, device) = (text(event, "user_id"), text(event, "device_id"));
        let mut hit = false;
        for (id, ids, counts) in [(user, users, &mut self.users), (device, devices, &mut self.devices)] {
            if ids.iter().any(|held| held == id) {
                *counts.entry(id.to_owned()).or_default() += 1;
                hit = true;
            }
        }
        if hit {
            self.events.push(index);
        }
    }

    fn throttled(&self) -> Value {
        let rate = |ids: &BTreeMap<String, u32>| -> Map<String, Value> {
            ids.iter().map(|(id, count)| (id.clone(), json!(1000 + count))).collect()
        };
        json!({
            "code": 429,
            "error": "Too many requests for some devices and users",
            "eps_threshold": 1000,
            "throttled_users": rate(&self.users),
            "throttled_devices": rate(&self.devices),
            "exceeded_daily_quota_users": {},
            "exceeded_daily_quota_devices": {},
            "throttled_events": self.events,
        })
    }

    /// Without indexes: who is over the quota is known by name only.
    fn over_quota(&self) -> Value {
        json!({
            "code": 429,
            "error": "Too many requests for some devices and users",
            "eps_threshold": 1000,
            "throttled_users": {},
            "throttled_devices": {},
            "exceeded_daily_quota_users": self.users,
            "exceeded_daily_quota_devices": self.devices,
            "throttled_events": [],
        })
    }

    fn silenced(&self) -> Value {
        json!({
            "code": 400,
            "error": "Events from silenced devices",
            "missing_field": null,
            "events_with_invalid_fields": {},
            "events_with_missing_fields": {},
            "silenced_events": self.events,
            "silenced_devices": self.devices.keys().collect::<Vec<_>>(),
            "throttled_events": [],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::contract::testing::{KEY, NOW_MS, Sample};
    use super::*;

    fn event(id: &str) -> Value {
        json!({
            "event_type": "Order Placed", "user_id": "user-1", "device_id": "device-1", "time": NOW_MS,
            "insert_id": id, "session_id": -1, "ip": "203.0.113.9", "event_properties": {"total": 19.5},
        })
    }

    /// The event with one field replaced; null stays null.
    fn with(field: &str, value: Value) -> Value {
        let mut event = event("id-1");
        event[field] = value;
        event
    }

    fn identify(user_properties: Value) -> Value {
        let mut event = with("user_properties", user_properties);
        event["event_type"] = json!("$identify");
        event
    }

    fn group(group_properties: Value) -> Value {
        let mut event = with("group_properties", group_properties);
        event["event_type"] = json!("$groupidentify");
        event["groups"] = json!({"company": "g1"});
        event
    }

    fn batch(events: Value) -> Sample {
        Sample::new("/batch", json!({"api_key": KEY, "options": {"min_id_length": 1}, "events": events}))
    }

    fn nested(levels: usize) -> Value {
        (1..levels).fold(json!({}), |inner, _| json!({"a": inner}))
    }

    #[test]
    fn good_events_are_taken_plain_and_gzipped() {
        for sample in [batch(json!([event("a"), event("b")])), batch(json!([event("a"), event("b")])).gzip()]
        {
            let judgement = sample.judge(judge);
            assert_eq!(judgement.status, 200, "{}", judgement.body);
            assert_eq!(
                (&judgement.body["code"], &judgement.body["events_ingested"]),
                (&json!(200), &json!(2))
            );
            assert_eq!((judgement.taken.len(), judgement.events), (2, 2));
        }
    }

    #[test]
    fn a_wrong_envelope_is_refused_whole() {
        let body = |body: Value| Sample::new("/batch", body).judge(judge);
        assert_eq!(body(json!({"events": [event("a")]})).body["missing_field"], "api_key");
        assert_eq!(body(json!({"api_key": KEY})).body["missing_field"], "events");
        assert_eq!(body(json!({"api_key": KEY, "events": []})).body["missing_field"], "events");
        let judgement = body(json!({"api_key": "another", "events": [event("a")]}));
        assert_eq!((judgement.status, &judgement.body["error"]), (400, &json!("Invalid API key: another")));
        for wrong in [
            body(json!([])),
            body(json!({"api_key": KEY, "events": {}})),
            body(json!({"api_key": KEY, "events": [1]})),
            body(json!({"api_key": KEY, "events": [event("a")], "options": {"min_id_length": "1"}})),
            batch(json!([event("a")])).header("content-type", "text/plain").judge(judge),
            batch(json!([event("a")])).header("content-encoding", "gzip").judge(judge),
        ] {
            assert_eq!((wrong.status, wrong.taken.len()), (400, 0));
        }
    }

    #[test]
    fn each_path_has_its_limits() {
        let events = |path: &str, count: usize| {
            let events = vec![json!({"event_type": "a", "user_id": "user-1", "time": NOW_MS}); count];
            Sample::new(path, json!({"api_key": KEY, "events": events})).judge(judge).status
        };
        assert_eq!((events("/batch", 2000), events("/batch", 2001)), (200, 413));
        assert_eq!((events("/2/httpapi", 1999), events("/2/httpapi", 2000)), (200, 413));
        let large = |path: &str, bytes: usize| {
            let event = with("event_properties", json!({"a": "a".repeat(bytes)}));
            Sample::new(path, json!({"api_key": KEY, "events": [event]})).judge(judge).status
        };
        assert_eq!((large("/batch", 1_000_000), large("/2/httpapi", 1_000_000)), (200, 413));
        assert_eq!(large("/batch", 20_000_000), 413);
    }

    #[test]
    fn a_bad_event_is_listed_and_nothing_is_taken() {
        let invalid = [
            (with("event_type", json!("")), "event_type"),
            (with("event_type", json!("revenue_amount")), "event_type"),
            (with("event_type", json!("[Amplitude] Page")), "event_type"),
            (with("user_id", json!("unknown")), "user_id"),
            (with("user_id", json!("")), "user_id"),
            (with("user_id", json!(7)), "user_id"),
            (with("device_id", json!("lmy47d")), "device_id"),
            (with("time", json!("2026-01-01T00:00:00Z")), "time"),
            (with("time", json!(NOW_MS / 1000)), "time"),
            (with("time", json!(1.5)), "time"),
            (with("insert_id", json!(7)), "insert_id"),
            (with("event_id", json!("6f1c2a9e")), "event_id"),
            (with("session_id", json!("-1")), "session_id"),
            (with("ip", json!("$remote")), "ip"),
            (with("event_properties", json!([])), "event_properties"),
            (with("event_properties", nested(41)), "event_properties"),
            (with("user_properties", json!(1)), "user_properties"),
            (with("os_name", json!(7)), "os_name"),
            (with("language", json!("")), "language"),
            (with("location_lat", json!("45.1")), "location_lat"),
            (with("groups", json!([])), "groups"),
            (with("groups", json!({})), "groups"),
            (with("groups", json!({"company": ""})), "groups"),
            (with("groups", json!({"company": ["a", 1]})), "groups"),
            (with("groups", json!({"company": vec!["a"; 11]})), "groups"),
            (with("groups", json!({"a": "1", "b": "1", "c": "1", "d": "1", "e": "1", "f": "1"})), "groups"),
            (with("group_properties", json!({"$set": {"a": 1}})), "group_properties"),
            (group(json!({"$set": {"a": null}})), "group_properties"),
            (group(json!({})), "group_properties"),
            (identify(json!({"$set": {"a": 1}, "b": 2})), "user_properties"),
            (identify(json!({"$set": {"a": null}})), "user_properties"),
            (identify(json!({"$unset": ["a"]})), "user_properties"),
            (identify(json!({"$sets": {"a": 1}})), "user_properties"),
        ];
        for (bad, field) in invalid {
            let judgement = batch(json!([event("a"), bad, event("b"), bad])).judge(judge);
            assert_eq!(judgement.status, 400, "{bad}");
            assert_eq!(judgement.body["events_with_invalid_fields"], json!({field: [1, 3]}), "{bad}");
            assert_eq!((judgement.taken.len(), judgement.rejected, judgement.events), (0, 2, 4));
        }
        let mut nobody = with("user_id", Value::Null);
        nobody["device_id"] = Value::Null;
        let mut of_no_group = group(json!({"$set": {"a": 1}}));
        of_no_group["groups"] = Value::Null;
        let missing = [
            (with("event_type", Value::Null), "event_type"),
            (with("time", Value::Null), "time"),
            (nobody, "user_id"),
            (identify(Value::Null), "user_properties"),
            (group(Value::Null), "group_properties"),
            (of_no_group, "groups"),
        ];
        for (bad, field) in missing {
            let judgement = batch(json!([bad])).judge(judge);
            assert_eq!(judgement.body["events_with_missing_fields"], json!({field: [0]}), "{bad}");
        }
    }

    #[test]
    fn what_the_rules_allow_is_taken() {
        let allowed = [
            with("user_id", Value::Null),
            with("device_id", Value::Null),
            with("event_properties", nested(40)),
            with("event_id", json!(7)),
            with("event_type", json!("[Amplitude] Page Viewed")),
            with("groups", json!({"company": "g1", "team": ["t1", "t2"]})),
            with("location_lng", json!(7)),
            group(json!({"$set": {"a": 1}, "$unset": {"b": "-"}})),
            identify(json!({"$set": {"a": 1}, "$unset": {"b": "-"}})),
            identify(json!({"a": 1, "b": null})),
        ];
        for event in allowed {
            let judgement = batch(json!([event])).judge(judge);
            assert_eq!(judgement.status, 200, "{event}: {}", judgement.body);
        }
        let judgement = batch(json!([group(json!({"$set": {"a": 1}}))])).judge(judge);
        assert_eq!((judgement.taken[0].kind, judgement.taken[0].name.as_str()), (TakenKind::Group, "g1"));
        let judgement = batch(json!([identify(json!({"$clearAll": "-"}))])).judge(judge);
        assert_eq!((judgement.taken[0].kind, judgement.taken[0].name.as_str()), (TakenKind::Identify, ""));
    }

    #[test]
    fn a_short_id_counts_as_absent() {
        let send =
            |event: Value| Sample::new("/batch", json!({"api_key": KEY, "events": [event]})).judge(judge);
        assert_eq!(send(with("user_id", json!("abcd"))).status, 200);
        let mut short = with("user_id", json!("abcd"));
        short["device_id"] = Value::Null;
        assert_eq!(send(short.clone()).body["events_with_invalid_id_lengths"], json!({"user_id": [0]}));
        assert_eq!(batch(json!([short])).judge(judge).status, 200);
    }

    #[test]
    fn a_throttled_user_holds_up_the_request() {
        let mut other = event("b");
        other["user_id"] = json!("user-2");
        let judgement = batch(json!([other, event("a")])).fault("throttle-users=user-1").judge(judge);
        assert_eq!((judgement.status, judgement.taken.len(), judgement.rejected), (429, 0, 0));
        assert_eq!(judgement.body["throttled_events"], json!([1]));
        assert_eq!(judgement.body["throttled_users"], json!({"user-1": 1001}));
        assert_eq!(batch(json!([other])).fault("throttle-users=user-1").judge(judge).status, 200);

        let judgement = batch(json!([other, event("a")])).fault("daily-quota=user-1").judge(judge);
        assert_eq!((judgement.status, &judgement.body["throttled_events"]), (429, &json!([])));
        assert_eq!(judgement.body["exceeded_daily_quota_users"], json!({"user-1": 1}));

        other["device_id"] = json!("device-2");
        let judgement = batch(json!([event("a"), other])).fault("silence-devices=device-2").judge(judge);
        assert_eq!((judgement.status, &judgement.body["silenced_events"]), (400, &json!([1])));
        assert_eq!(judgement.body["silenced_devices"], json!(["device-2"]));
    }

    #[test]
    fn resending_the_rest_after_reject_every_succeeds() {
        let mut events: Vec<_> = (0..100).map(|i| event(&format!("id-{i}"))).collect();
        let judgement = batch(events.clone().into()).fault("reject-every=5").judge(judge);
        assert_eq!((judgement.status, judgement.taken.len()), (400, 0));
        let listed = &judgement.body["events_with_invalid_fields"]["event_properties"];
        let listed: Vec<_> =
            listed.as_array().unwrap().iter().map(|index| index.as_u64().unwrap() as usize).collect();
        for index in listed.iter().rev() {
            events.remove(*index);
        }
        let judgement = batch(events.into()).fault("reject-every=5").judge(judge);
        assert_eq!((judgement.status, judgement.taken.len()), (200, 100 - listed.len()));
    }
}
