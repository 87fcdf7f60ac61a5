//! Amplitude: everything through `/batch`, identifies as `$identify` events, groups as two
//! events each.
//!
//! Limits, as documented in Amplitude's Batch Event Upload reference (checked
//! 2026-11-20):
//!
//! | what | limit |
//! |---|---|
//! | events per request | 2,000 documented, 1,000 here |
//! | body | 20 MB documented, 10 MB here |
//! | events per user or device | 1,000 a second over 30 s; above, that id waits 15 s |
//! | length of an id | 5 characters unless `min_id_length` says otherwise |
//! | requests of one user | in order: the lane keeps it for identifies |
//!
//! Sent again: 408, 429, 5xx, no answer, and a success that counts other than what was
//! sent. A 400 that lists events means that **nothing was taken**: the others go again
//! at once. A 429 holds back only the ids that it lists.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    time::Duration,
};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    BatchLimits, Endpoint, Event, EventKind, NotFor, Rejection, Secret, SendError, Verdict,
    event::Kind,
    http::{Encoded, Probe, Reply, Wire, WrongKey, body_for, no_form, null_as_default, object},
    json::{Json, Object},
    properties::Properties,
    view::View,
};

mod group;
mod seldom;

use group::Records;

const LIMITS: BatchLimits = BatchLimits { events_max: 1000, body_bytes_max: BODY_BYTES_MAX, requests_max: 4 };
const PATH: &str = "/batch";
const BODY_BYTES_MAX: usize = 10_000_000;
/// Room for 1,000 users and devices of 255 characters each, and the lists.
const REPLY_BYTES_MAX: usize = 1_000_000;
/// How long a throttled user or device waits, unless the answer says longer.
const THROTTLE_WAIT: Duration = Duration::from_secs(15);

/// Ids that Amplitude refuses.
const FORBIDDEN_IDS: [&str; 13] = [
    "anonymous",
    "nil",
    "none",
    "null",
    "n/a",
    "na",
    "undefined",
    "unknown",
    "00000000-0000-0000-0000-000000000000",
    "{}",
    "lmy47d",
    "0",
    "-1",
];

const IDENTIFY: &str = "$identify";
/// Event types that mean something of their own.
const RESERVED_TYPES: [&str; 3] = [IDENTIFY, "$groupidentify", "revenue_amount"];
const RESERVED_TYPE_PREFIX: &str = "[Amplitude] ";

/// Amplitude's wire contract.
#[derive(Debug)]
pub struct Amplitude {
    api_key: Secret,
    min_id_length: u32,
    view: View,
}

impl Amplitude {
    /// `min_id_length` is the shortest user or device id that the project
    /// takes; Amplitude would silently remove shorter ones.
    pub fn new(api_key: Secret, min_id_length: u32) -> Self {
        Self { api_key, min_id_length, view: View::default() }
    }

    /// Where pages, screens and groups are to look otherwise.
    #[must_use]
    pub fn with_view(self, view: View) -> Self {
        Self { view, ..self }
    }
}

impl Wire for Amplitude {
    fn name(&self) -> &'static str {
        "amplitude"
    }

    fn limits(&self) -> BatchLimits {
        LIMITS
    }

    fn reply_bytes_max(&self) -> usize {
        REPLY_BYTES_MAX
    }

    fn endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
        match event.kind_alone() {
            Kind::Group => self.group_endpoint(event),
            Kind::Alias => Err(NotFor::UnsupportedKind),
            Kind::Track | Kind::Identify | Kind::Page | Kind::Screen | Kind::Unknown => Ok(Endpoint::DEFAULT),
        }
    }

    fn encode(&self, batch: &[Event], _now_ms: i64) -> Encoded {
        if batch.first().is_some_and(|event| event.kind_alone() == Kind::Group) {
            return self.encode_groups(batch);
        }
        let mut body = body_for(batch);
        let mut rejected = Vec::new();
        let mut request = self.begin_upload(&mut body, &self.api_key);
        let mut events = request.list("events");
        for (index, event) in batch.iter().enumerate() {
            let kind = event.kind();
            if !matches!(
                kind,
                EventKind::Track { .. }
                    | EventKind::Identify
                    | EventKind::Page { .. }
                    | EventKind::Screen { .. }
            ) {
                rejected.push(no_form(index, event));
                continue;
            }
            let Some(ids) = self.ids(event) else {
                rejected.push(no_usable_id(index));
                continue;
            };
            match kind {
                EventKind::Track { name } if event.is_plain() => {
                    encode_event(events.object(), event, &ids, Some((name, event.properties())));
                }
                EventKind::Identify if event.is_plain() => encode_event(events.object(), event, &ids, None),
                _ => self.encode_seldom(events.object(), event, &ids),
            }
        }
        events.end();
        request.end();
        self.upload(body, rejected)
    }

    fn interpret(&self, sent: &[&Event], reply: &Reply) -> Result<Vec<Verdict>, SendError> {
        let Some(parsed) = object::<BatchReply>(&reply.body) else {
            return Err(reply.failure());
        };
        // A success must be one in both places; what hides behind one, the body says.
        let status = if reply.status == 200 { parsed.code.unwrap_or(200) } else { reply.status };
        let reply = &Reply { status, ..reply.clone() };
        let records = Records::of(sent);
        let parsed = records.placed(parsed);
        match status {
            200 if parsed.code.is_some() => self.interpret_success(sent, &records, &parsed, reply),
            400 | 429 => self.interpret_failure(sent, &parsed, reply),
            _ => Err(reply.failure()),
        }
    }

    fn probes(&self, key: &Secret) -> Vec<Probe> {
        let mut body = Json::default();
        let mut request = self.begin_upload(&mut body, key);
        request.list("events").end();
        request.end();
        let request = Encoded { path: PATH, body: body.into_bytes(), ..Encoded::default() };
        vec![Probe { request, wrong_key: WrongKey::Refused }]
    }
}

/// The ids that Amplitude gets of an event.
struct Ids<'a> {
    user: Option<&'a str>,
    device: Option<Cow<'a, str>>,
}

impl Amplitude {
    fn begin_upload<'a>(&self, body: &'a mut Json, api_key: &Secret) -> Object<'a> {
        let mut request = Object::begin(body);
        request.string("api_key", api_key.expose());
        let mut options = request.object("options");
        options.integer("min_id_length", i64::from(self.min_id_length));
        options.end();
        request
    }

    fn upload(&self, body: Json, rejected: Vec<(usize, Rejection, String)>) -> Encoded {
        Encoded {
            path: PATH,
            body: body.into_bytes(),
            form: false,
            gzip: false,
            basic_user: None,
            body_bytes_max: BODY_BYTES_MAX,
            rejected,
        }
    }

    /// The ids that can be used; none if ids were given and none is usable.
    fn ids<'a>(&self, event: &'a Event) -> Option<Ids<'a>> {
        let usable =
            |id: &&str| !FORBIDDEN_IDS.contains(id) && id.chars().count() >= self.min_id_length as usize;
        let user = event.user_id().filter(usable);
        let device = event.anonymous_id().filter(usable).map(Cow::Borrowed);
        let given = event.subject().is_some();
        match (user, device) {
            (None, None) if given => None,
            // Amplitude takes no event of nobody: an unknown device stands in,
            // the same one at each attempt.
            (None, None) => {
                Some(Ids { user: None, device: Some(event.id().namespaced().to_string().into()) })
            }
            (user, device) => Some(Ids { user, device }),
        }
    }

    /// A success counts what it took, and may name events that it did not.
    fn interpret_success(
        &self,
        sent: &[&Event],
        records: &Records,
        parsed: &BatchReply,
        reply: &Reply,
    ) -> Result<Vec<Verdict>, SendError> {
        let named = self.named(sent, parsed, reply);
        let named_count = named.iter().flatten().count();
        let may_be = |ingested| records.may_be(ingested, |place| named[place].is_some());
        let is_counted = parsed.events_ingested.is_some_and(may_be);
        let others = match named_count {
            _ if is_counted => Verdict::Delivered,
            0 => return Err(reply.unavailable()),
            // Whether they were taken is not known. Those that were are recognised.
            _ => Verdict::Resend,
        };
        Ok(named.into_iter().map(|verdict| verdict.unwrap_or_else(|| others.clone())).collect())
    }

    /// A 400 or a 429 takes nothing, and says which events are to blame.
    fn interpret_failure(
        &self,
        sent: &[&Event],
        parsed: &BatchReply,
        reply: &Reply,
    ) -> Result<Vec<Verdict>, SendError> {
        let detail = reply.detail();
        match (reply.status, parsed.missing_field.as_deref()) {
            (400, _) if parsed.error.starts_with("Invalid API key") => {
                return Err(SendError::Unauthorized { detail });
            }
            (400, _) if parsed.error.starts_with("Invalid request path") => {
                return Err(SendError::Misdirected { detail });
            }
            (_, Some("api_key")) => return Err(SendError::Unauthorized { detail }),
            (_, Some(_)) => return Err(SendError::Refused { detail }),
            (_, None) => {}
        }
        let named = self.named(sent, parsed, reply);
        if named.iter().all(Option::is_none) {
            return Err(reply.failure());
        }
        Ok(named.into_iter().map(|verdict| verdict.unwrap_or(Verdict::Resend)).collect())
    }

    /// What an answer says of each event; nothing of those that it does not name.
    fn named(&self, sent: &[&Event], parsed: &BatchReply, reply: &Reply) -> Vec<Option<Verdict>> {
        if parsed.names_nobody() {
            return vec![None; sent.len()];
        }
        let detail = reply.detail();
        let rejected = parsed.rejected_indexes();
        let held: HashSet<usize> = parsed.throttled_events.iter().copied().collect();
        let after = reply.retry_after.unwrap_or(THROTTLE_WAIT).max(THROTTLE_WAIT);
        let verdict = |(index, event): (usize, &&Event)| {
            let ids = self.ids(event);
            let user = ids.as_ref().and_then(|ids| ids.user);
            let device = ids.as_ref().and_then(|ids| ids.device.as_deref());
            let listed = |users: &HashMap<String, Value>, devices: &HashMap<String, Value>| {
                user.is_some_and(|id| users.contains_key(id))
                    || device.is_some_and(|id| devices.contains_key(id))
            };
            if listed(&parsed.exceeded_daily_quota_users, &parsed.exceeded_daily_quota_devices) {
                Some(Verdict::Rejected { reason: Rejection::QuotaExceeded, detail: detail.clone() })
            } else if rejected.contains_key(&index)
                || device.is_some_and(|id| parsed.silenced_devices.iter().any(|silenced| silenced == id))
            {
                let why = rejected.get(&index).map_or("silenced", String::as_str);
                let detail = reply.saying(&format!("{why}: {}", parsed.error));
                Some(Verdict::Rejected { reason: Rejection::Invalid, detail })
            } else if held.contains(&index) || listed(&parsed.throttled_users, &parsed.throttled_devices) {
                Some(Verdict::Hold { after, detail: detail.clone() })
            } else {
                None
            }
        };
        sent.iter().enumerate().map(verdict).collect()
    }
}

/// With its name and properties, or as an identify.
fn encode_event(mut object: Object<'_>, event: &Event, ids: &Ids<'_>, track: Option<(&str, Properties<'_>)>) {
    match &track {
        Some((name, _)) => object.string("event_type", &event_type(name)),
        None => object.string("event_type", IDENTIFY),
    }
    write_head(&mut object, event, ids, event.id().as_str(), event.user_agent());
    match track {
        Some((_, properties)) => object.raw("event_properties", properties.json()),
        None => encode_traits(object.object("user_properties"), &event.properties()),
    }
    object.end();
}

/// What every event has behind its type.
#[inline(always)]
fn write_head(
    object: &mut Object<'_>,
    event: &Event,
    ids: &Ids<'_>,
    insert_id: &str,
    user_agent: Option<&str>,
) {
    object.optional("user_id", ids.user);
    object.optional("device_id", ids.device.as_deref());
    object.integer("time", event.time_ms());
    object.string("insert_id", insert_id);
    object.optional("ip", event.ip());
    object.optional("user_agent", user_agent);
    object.string("library", concat!("analytics-relay/", env!("CARGO_PKG_VERSION")));
}

fn no_usable_id(index: usize) -> (usize, Rejection, String) {
    let detail = "Amplitude takes neither the user id nor the anonymous id".to_owned();
    (index, Rejection::UnusableId, detail)
}

fn event_type(name: &str) -> Cow<'_, str> {
    let reserved = RESERVED_TYPES.contains(&name) || name.starts_with(RESERVED_TYPE_PREFIX);
    if reserved { format!("event_{name}").into() } else { name.into() }
}

/// Operators only, never beside plain names: Amplitude takes one or the other.
fn encode_traits(mut object: Object<'_>, traits: &Properties) {
    if !traits.shape().has_null() {
        object.raw("$set", traits.json());
        return object.end();
    }
    encode_operations(object, traits, None);
}

/// What is known of a user or a group, and beside it a name and JSON of ours.
#[cold]
fn encode_operations(mut object: Object<'_>, traits: &Properties, ours: Option<(&str, &str)>) {
    let entries = traits.entries();
    let (removed, set): (Vec<_>, Vec<_>) = entries.iter().partition(|(_, value)| value.get() == "null");
    if !set.is_empty() || ours.is_some() || removed.is_empty() {
        let mut operation = object.object("$set");
        operation.entries(set.iter().map(|(key, value)| (&**key, *value)));
        if let Some((name, json)) = ours {
            operation.named_raw(name, json);
        }
        operation.end();
    }
    if !removed.is_empty() {
        let mut operation = object.object("$unset");
        for (key, _) in removed {
            // The value is ignored; Amplitude's own SDKs send a dash.
            operation.named_string(key, "-");
        }
        operation.end();
    }
    object.end();
}

#[derive(Deserialize)]
struct BatchReply {
    code: Option<u16>,
    events_ingested: Option<usize>,
    #[serde(default, deserialize_with = "null_as_default")]
    error: String,
    missing_field: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    events_with_invalid_fields: HashMap<String, Vec<usize>>,
    #[serde(default, deserialize_with = "null_as_default")]
    events_with_missing_fields: HashMap<String, Vec<usize>>,
    #[serde(default, deserialize_with = "null_as_default")]
    events_with_invalid_id_lengths: HashMap<String, Vec<usize>>,
    #[serde(default, deserialize_with = "null_as_default")]
    silenced_events: Vec<usize>,
    #[serde(default, deserialize_with = "null_as_default")]
    silenced_devices: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    throttled_events: Vec<usize>,
    #[serde(default, deserialize_with = "null_as_default")]
    throttled_users: HashMap<String, Value>,
    #[serde(default, deserialize_with = "null_as_default")]
    throttled_devices: HashMap<String, Value>,
    #[serde(default, deserialize_with = "null_as_default")]
    exceeded_daily_quota_users: HashMap<String, Value>,
    #[serde(default, deserialize_with = "null_as_default")]
    exceeded_daily_quota_devices: HashMap<String, Value>,
}

impl BatchReply {
    /// True if every list is empty, as in a success: then no event is looked up.
    fn names_nobody(&self) -> bool {
        let fields = [
            &self.events_with_invalid_fields,
            &self.events_with_missing_fields,
            &self.events_with_invalid_id_lengths,
        ];
        let ids = [
            &self.throttled_users,
            &self.throttled_devices,
            &self.exceeded_daily_quota_users,
            &self.exceeded_daily_quota_devices,
        ];
        fields.iter().all(|map| map.is_empty())
            && ids.iter().all(|map| map.is_empty())
            && self.silenced_events.is_empty()
            && self.silenced_devices.is_empty()
            && self.throttled_events.is_empty()
    }

    /// Events that will never be taken, each with one of the fields to blame.
    fn rejected_indexes(&self) -> HashMap<usize, String> {
        let mut rejected: HashMap<usize, String> = HashMap::new();
        let maps = [
            ("invalid", &self.events_with_invalid_fields),
            ("missing", &self.events_with_missing_fields),
            ("id length", &self.events_with_invalid_id_lengths),
        ];
        for (what, map) in maps {
            for (field, indexes) in map {
                for &index in indexes {
                    // The first is enough, and a hostile list stays cheap.
                    rejected
                        .entry(index)
                        .or_insert_with(|| format!("{what} {}", field.chars().take(64).collect::<String>()));
                }
            }
        }
        for &index in &self.silenced_events {
            rejected.entry(index).or_insert_with(|| "silenced".to_owned());
        }
        rejected
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::event::{
        EventParts,
        tests_support::{identify, parts, track},
    };

    fn amplitude() -> Amplitude {
        Amplitude::new(Secret::new("key"), 1)
    }

    fn encode(events: Vec<Event>) -> Encoded {
        amplitude().encode(&events, 0)
    }

    fn body(event: Event) -> Value {
        serde_json::from_slice(&encode(vec![event]).body).unwrap()
    }

    fn interpret(sent: &[Event], status: u16, body: &Value) -> Result<Vec<Verdict>, SendError> {
        let reply = Reply { status, body: body.to_string(), ..Reply::default() };
        amplitude().interpret(&sent.iter().collect::<Vec<_>>(), &reply)
    }

    fn of_user(user: &str) -> Event {
        Event::pack(&EventParts { user_id: Some(user), ..parts("x", "{}") })
    }

    fn kinds(verdicts: &[Verdict]) -> String {
        let letter = |verdict: &Verdict| match verdict {
            Verdict::Delivered => 'd',
            Verdict::Rejected { reason: Rejection::QuotaExceeded, .. } => 'q',
            Verdict::Rejected { .. } => 'x',
            Verdict::Resend => 'r',
            Verdict::Hold { .. } => 'h',
        };
        verdicts.iter().map(letter).collect()
    }

    #[test]
    fn a_track_is_one_event_of_a_batch() {
        let mut event = parts("Order Placed", r#"{"total":19.5}"#);
        event.anonymous_id = Some("device-1");
        event.user_agent = Some("Browser/1.0");
        assert_eq!(
            body(Event::pack(&event)),
            json!({"api_key": "key", "options": {"min_id_length": 1}, "events": [{
                "event_type": "Order Placed", "user_id": "user-1", "device_id": "device-1",
                "time": 1_767_225_600_000_i64, "insert_id": "id-1", "user_agent": "Browser/1.0",
                "library": concat!("analytics-relay/", env!("CARGO_PKG_VERSION")),
                "event_properties": {"total": 19.5}}]})
        );
    }

    #[test]
    fn an_identify_sets_and_unsets_by_operators() {
        let event = |traits| body(identify(traits))["events"][0].clone();
        assert_eq!(event(r#"{"plan":"pro"}"#)["user_properties"], json!({"$set": {"plan": "pro"}}));
        assert_eq!(event(r#"{"plan":"pro"}"#)["event_type"], "$identify");
        assert_eq!(
            event(r#"{"plan":"pro","legacy":null}"#)["user_properties"],
            json!({"$set": {"plan": "pro"}, "$unset": {"legacy": "-"}})
        );
        assert_eq!(event(r#"{"legacy":null}"#)["user_properties"], json!({"$unset": {"legacy": "-"}}));
    }

    #[test]
    fn reserved_event_types_are_relayed_under_another_name() {
        for name in ["$identify", "[Amplitude] Page Viewed", "revenue_amount"] {
            assert_eq!(body(track(name, "{}"))["events"][0]["event_type"], format!("event_{name}"));
        }
    }

    #[test]
    fn an_event_of_nobody_gets_a_device_that_never_changes() {
        let event = Event::pack(&EventParts { user_id: None, ..parts("x", "{}") });
        let device = event.id().namespaced().to_string();
        assert_eq!(body(event)["events"][0]["device_id"], device);
    }

    #[test]
    fn an_event_whose_ids_amplitude_refuses_is_rejected_here() {
        let encoded = encode(vec![of_user("undefined"), of_user("real")]);
        assert_eq!(encoded.rejected.iter().map(|(index, ..)| *index).collect::<Vec<_>>(), [0]);
        let body: Value = serde_json::from_slice(&encoded.body).unwrap();
        assert_eq!(body["events"].as_array().unwrap().len(), 1);

        let undefined = of_user("undefined");
        let with_device = EventParts { anonymous_id: Some("device-1"), ..undefined.parts() };
        let event = &self::body(Event::pack(&with_device))["events"][0];
        assert_eq!((event.get("user_id"), &event["device_id"]), (None, &json!("device-1")));
    }

    #[test]
    fn after_a_400_the_listed_are_dropped_and_the_rest_goes_again() {
        let sent: Vec<_> = (0..6).map(|i| of_user(&format!("user-{i}"))).collect();
        let body = json!({"code": 400, "error": "Request missing required field", "missing_field": null,
            "events_with_invalid_fields": {"time": [0]}, "events_with_missing_fields": {"event_type": [1, 99]},
            "events_with_invalid_id_lengths": {"user_id": [2]}, "silenced_events": [3], "throttled_events": [4]});
        assert_eq!(kinds(&interpret(&sent, 400, &body).unwrap()), "xxxxhr");
    }

    #[test]
    fn a_success_may_name_events_that_it_did_not_take() {
        let sent: Vec<_> = (0..4).map(|i| of_user(&format!("user-{i}"))).collect();
        for (ingested, silenced, want) in [
            (4, json!([]), Some("dddd")),
            (4, json!([1]), Some("dxdd")),
            (3, json!([1, 1, 99]), Some("dxdd")),
            (0, json!([0, 1, 2, 3]), Some("xxxx")),
            (2, json!([1]), Some("rxrr")),
            (5, json!([]), None),
            (3, json!([]), None),
            (3, json!([99]), None),
            (4, Value::Null, Some("dddd")),
        ] {
            let body = json!({"code": 200, "events_ingested": ingested, "silenced_events": silenced});
            let got = interpret(&sent, 200, &body);
            assert_eq!(got.as_deref().ok().map(kinds).as_deref(), want, "{body}");
        }
    }

    #[test]
    fn a_429_holds_back_only_the_ids_that_it_lists() {
        let mut sent: Vec<_> = ["slow", "quota", "fine", "by-index"].map(of_user).into();
        let other = of_user("other");
        sent.push(Event::pack(&EventParts { anonymous_id: Some("slow-device"), ..other.parts() }));
        let body = json!({"code": 429, "error": "Too many requests", "eps_threshold": 30,
            "throttled_users": {"slow": 31}, "throttled_devices": {"slow-device": 40},
            "exceeded_daily_quota_users": {"quota": 500_001}, "throttled_events": [3]});
        assert_eq!(kinds(&interpret(&sent, 429, &body).unwrap()), "hqrhh");
    }

    #[test]
    fn a_429_that_lists_nobody_is_for_everyone() {
        let body = json!({"code": 429, "error": "Too many requests", "throttled_users": {}});
        let answer = interpret(&[of_user("a")], 429, &body);
        assert!(matches!(answer, Err(SendError::Unavailable { .. })));
    }

    #[test]
    fn a_key_that_is_refused_is_not_the_events_fault() {
        for (status, body) in [
            (400, json!({"code": 400, "error": "Invalid API key: ***"})),
            (
                400,
                json!({"code": 400, "error": "Request missing required field", "missing_field": "api_key"}),
            ),
            (403, json!({"code": 403, "error": "Forbidden"})),
        ] {
            let answer = interpret(&[of_user("a")], status, &body);
            assert!(matches!(answer, Err(SendError::Unauthorized { .. })), "{body}");
        }
    }

    #[test]
    fn only_a_clear_yes_is_a_delivery() {
        let sent = [of_user("a")];
        assert_eq!(kinds(&interpret(&sent, 200, &json!({"code": 200, "events_ingested": 1})).unwrap()), "d");
        for (status, body) in
            [(200, json!({})), (200, json!("ok")), (200, json!({"code": 503})), (503, json!({}))]
        {
            let answer = interpret(&sent, status, &body);
            assert!(matches!(answer, Err(SendError::Unavailable { .. })), "{status} {body}");
        }
        let refused = interpret(&sent, 400, &json!({"code": 400, "error": "Invalid JSON request body"}));
        assert!(matches!(refused, Err(SendError::Refused { .. })));
    }
}
