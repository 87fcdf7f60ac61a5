//! Mixpanel: tracks through `/import`, pages and screens as tracks; identifies through
//! `/engage`; groups through `/groups`; and in projects of the original ID merge aliases
//! through `/track`.
//!
//! Limits, as documented in Mixpanel's Ingestion API reference (checked
//! 2026-11-20):
//!
//! | what | limit |
//! |---|---|
//! | events, or profile updates, per request | 2,000 |
//! | body, before compression | 10 MB in the text, 2 MiB in the OpenAPI file: 2,000,000 bytes here |
//! | properties of an event | under 255; nested objects and lists under 255, at most 3 deep, 8 KB |
//! | `$insert_id` | 1 to 36 of `[A-Za-z0-9-]` |
//! | `time` | from 1971 to an hour ahead of Mixpanel's clock; ahead, it becomes the time of arrival |
//! | parallel requests | 10 to 20 |
//!
//! Sent again: 408, 429, 5xx, no answer, and a success that is not Mixpanel's own or
//! counts other than what was sent. Not sent again: a 400 with `failed_records`, which
//! means that **the other rows were taken**.
//!
//! The others answer 1 if **at least one** record was valid, and to a token that is no
//! project's. So `/import` is asked about the token before.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
};

use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use crate::{
    BatchLimits, Endpoint, Event, EventKind, NotFor, Rejection, Secret, SendError, Verdict,
    context::Added,
    event::Kind,
    http::{Encoded, Probe, Reply, Wire, WrongKey, body_for, no_form, null_as_default, object},
    json::{Json, List, Object},
    key_hints::{is_reserved_property, profile_name},
    properties::{Properties, shape_of},
    view::View,
};

mod alias;
mod group;
mod seldom;

/// Without an address Mixpanel would locate the user where the relay stands.
const NO_IP: &str = "0";
const LIMITS: BatchLimits = BatchLimits { events_max: 2000, body_bytes_max: BODY_BYTES_MAX, requests_max: 8 };
const BODY_BYTES_MAX: usize = 2_000_000;
/// Room for 2,000 rows with a reason each: reading less than that would take
/// rows that were ingested for a failure.
const REPLY_BYTES_MAX: usize = 2_000_000;
const PROFILE_UPDATES_MAX: usize = 2000;
const ITEMS_MAX: u16 = 254;
const NESTING_MAX: u8 = 3;
const NESTED_BYTES_MAX: usize = 8 * 1024;
const KEY_BYTES_MAX: u16 = 255;
/// Fields of our own beside the caller's properties, at most.
const OWN_PROPERTIES: u16 = 6;
/// Where properties beyond Mixpanel's number go, as one object.
const SURPLUS: &str = "more_properties";

const IMPORT: Endpoint = Endpoint(0);
const ENGAGE: Endpoint = Endpoint(1);
const IMPORT_PATH: &str = "/import?strict=1";
const ENGAGE_PATH: &str = "/engage?ip=0&verbose=1";

/// Ids that Mixpanel refuses, as `distinct_id` and as `$insert_id`.
const FORBIDDEN_IDS: [&str; 17] = [
    "00000000-0000-0000-0000-000000000000",
    "anon",
    "anonymous",
    "nil",
    "none",
    "null",
    "n/a",
    "na",
    "undefined",
    "unknown",
    "<nil>",
    "0",
    "-1",
    "true",
    "false",
    "[]",
    "{}",
];

/// Event names that do something else than record an event.
const RESERVED_EVENTS: [&str; 3] = ["$identify", "$merge", "$create_alias"];

/// How a project joins what one person did before and after signing in; a
/// setting of the Mixpanel project.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IdentityMode {
    /// Simplified ID Merge, the default of new projects: `$user_id` and
    /// `$device_id` are sent and Mixpanel joins them.
    #[default]
    Simplified,
    /// Original ID Merge and older: only `distinct_id` is sent.
    Original,
}

/// Mixpanel's wire contract.
#[derive(Debug)]
pub struct Mixpanel {
    token: Secret,
    identity: IdentityMode,
    view: View,
}

impl Mixpanel {
    /// `token` is the project token.
    pub fn new(token: Secret, identity: IdentityMode) -> Self {
        Self { token, identity, view: View::default() }
    }

    /// Where pages, screens and groups are to look otherwise.
    #[must_use]
    pub fn with_view(self, view: View) -> Self {
        Self { view, ..self }
    }
}

impl Wire for Mixpanel {
    fn name(&self) -> &'static str {
        "mixpanel"
    }

    fn limits(&self) -> BatchLimits {
        LIMITS
    }

    fn reply_bytes_max(&self) -> usize {
        REPLY_BYTES_MAX
    }

    fn endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
        match event.kind_alone() {
            Kind::Identify => Ok(ENGAGE),
            Kind::Track | Kind::Page | Kind::Screen | Kind::Unknown => Ok(IMPORT),
            Kind::Group => self.group_endpoint(event),
            Kind::Alias => self.alias_endpoint(),
        }
    }

    fn encode(&self, batch: &[Event], _now_ms: i64) -> Encoded {
        match batch.first().map(Event::kind_alone) {
            Some(Kind::Identify) => self.encode_engage(batch),
            Some(Kind::Group) => self.encode_groups(batch),
            Some(Kind::Alias) => self.encode_aliases(batch),
            _ => self.encode_import(batch),
        }
    }

    fn interpret(&self, sent: &[&Event], reply: &Reply) -> Result<Vec<Verdict>, SendError> {
        if sent.first().is_some_and(|event| takes_any_token(event)) {
            interpret_engage(sent.len(), reply)
        } else {
            interpret_import(sent.len(), reply)
        }
    }

    fn key_question(&self, batch: &[Event]) -> Option<Encoded> {
        batch.first().filter(|event| takes_any_token(event)).map(|_| empty_import(&self.token))
    }

    fn probes(&self, key: &Secret) -> Vec<Probe> {
        let import = empty_import(key);
        let engage = Encoded { path: ENGAGE_PATH, body: b"[]".to_vec(), ..Encoded::default() };
        let groups = self.view.group_type().map(|_| self.probe_of_groups());
        let aliases = (self.identity == IdentityMode::Original).then(|| self.probe_of_aliases());
        let at_import = WrongKey::Untold("only /import tells: the others take any token");
        let others = [Some(engage), groups, aliases].into_iter().flatten();
        std::iter::once(Probe { request: import, wrong_key: WrongKey::Refused })
            .chain(others.map(|request| Probe { request, wrong_key: at_import }))
            .collect()
    }

    fn interpret_probe(&self, path: &str, reply: &Reply) -> Result<Vec<Verdict>, SendError> {
        if path == IMPORT_PATH { interpret_import(0, reply) } else { interpret_engage(0, reply) }
    }
}

impl Mixpanel {
    fn encode_import(&self, batch: &[Event]) -> Encoded {
        let mut body = body_for(batch);
        let mut rows = List::begin(&mut body);
        let mut rejected = Vec::new();
        for (index, event) in batch.iter().enumerate() {
            match event.kind() {
                EventKind::Track { name } if event.is_plain() => {
                    let ip = event.ip().unwrap_or(NO_IP);
                    self.encode_row(rows.object(), event, &event_name(name), ip, &event.properties(), None);
                }
                _ if self.encode_seldom(&mut rows, event) => {}
                _ => rejected.push(no_form(index, event)),
            }
        }
        rows.end();
        Encoded {
            path: IMPORT_PATH,
            body: body.into_bytes(),
            form: false,
            gzip: true,
            basic_user: Some(self.token.clone()),
            body_bytes_max: BODY_BYTES_MAX,
            rejected,
        }
    }

    /// Writes a row: `name` as Mixpanel takes it, and beside the caller's properties what
    /// was added to them.
    #[inline(always)]
    fn encode_row(
        &self,
        mut row: Object<'_>,
        event: &Event,
        name: &str,
        ip: &str,
        given: &Properties<'_>,
        added: Option<&Added<'_>>,
    ) {
        let user = usable(event.user_id());
        let device = usable(event.anonymous_id());
        let simplified = self.identity == IdentityMode::Simplified;
        // "" says that there is no user; without the field Mixpanel would make
        // one up from the relay's address.
        let distinct_id = match (user, device) {
            (Some(user), _) => Cow::Borrowed(user),
            (None, Some(device)) if simplified => Cow::Owned(format!("$device:{device}")),
            (None, Some(device)) => Cow::Borrowed(device),
            (None, None) => Cow::Borrowed(""),
        };

        row.string("event", name);
        let mut properties = row.object("properties");
        properties.integer("time", time_ms(event));
        properties.string("distinct_id", &distinct_id);
        if simplified {
            properties.optional("$user_id", user);
            properties.optional("$device_id", device);
        }
        properties.string("$insert_id", &insert_id(event));
        properties.string("ip", ip);
        match added {
            None => splice_properties(&mut properties, given, OWN_PROPERTIES, Names::default),
            Some(added) => {
                added.write(&mut properties);
                let own = OWN_PROPERTIES + u16::try_from(added.names().count()).unwrap_or(ITEMS_MAX);
                splice_properties(&mut properties, given, own, || Names::beside(added.names()));
            }
        }
        properties.end();
        row.end();
    }

    fn encode_engage(&self, batch: &[Event]) -> Encoded {
        let mut body = body_for(batch);
        let mut updates = List::begin(&mut body);
        let mut count = 0;
        let mut rejected = Vec::new();
        for (index, event) in batch.iter().enumerate() {
            match usable(event.user_id()) {
                Some(user) => count += self.encode_identify(&mut updates, event, user),
                None => {
                    let detail = "Mixpanel refuses this user id for a profile".to_owned();
                    rejected.push((index, Rejection::UnusableId, detail));
                }
            }
        }
        updates.end();
        updates_request(ENGAGE_PATH, body, count, rejected)
    }

    /// Writes the updates of one identify and returns their number.
    fn encode_identify(&self, updates: &mut List<'_>, event: &Event, user: &str) -> usize {
        let traits = event.properties();
        let shape = traits.shape();
        let entries = if shape.has_null() || shape.has_renamed_trait() || shape.longest_key > KEY_BYTES_MAX {
            rename_traits(traits.entries())
        } else {
            Vec::new()
        };
        let mut count = 1;
        if entries.is_empty() {
            let mut update = self.begin_update(updates.object(), event, user);
            update.raw("$set", traits.json());
            update.end();
        } else {
            count = set_and_unset(updates, &entries, |update| self.begin_update(update, event, user));
        }
        if !event.is_plain() {
            count += self.encode_membership(updates, event, user);
        }
        count
    }

    fn begin_update<'a>(&self, mut update: Object<'a>, event: &Event, user: &str) -> Object<'a> {
        update.string("$token", self.token.expose());
        update.string("$distinct_id", user);
        update.string("$ip", event.ip().unwrap_or(NO_IP));
        update
    }
}

/// Whether an event goes to an endpoint that says nothing of a wrong token.
fn takes_any_token(event: &Event) -> bool {
    matches!(event.kind_alone(), Kind::Identify | Kind::Group | Kind::Alias)
}

/// A name of a caller's, and the JSON that it has.
type Entry<'a> = (String, &'a RawValue);

/// Writes what becomes of a profile's properties and returns the number of updates: one
/// that sets and, of nulls, one that removes. `begin` says whose they are.
fn set_and_unset(
    updates: &mut List<'_>,
    entries: &[Entry<'_>],
    begin: impl Fn(Object<'_>) -> Object<'_>,
) -> usize {
    let (removed, set): (Vec<_>, Vec<_>) = entries.iter().partition(|(_, value)| value.get() == "null");
    if !set.is_empty() {
        let mut update = begin(updates.object());
        let mut object = update.object("$set");
        object.entries(set.iter().map(|(key, value)| (&**key, *value)));
        object.end();
        update.end();
    }
    if !removed.is_empty() {
        let mut update = begin(updates.object());
        let mut names = update.list("$unset");
        removed.iter().for_each(|(key, _)| names.string(key));
        names.end();
        update.end();
    }
    usize::from(!set.is_empty()) + usize::from(!removed.is_empty())
}

/// Profile updates, so many: an event may be more than one, and a full batch of such too
/// many.
fn updates_request(
    path: &'static str,
    body: Json,
    updates: usize,
    rejected: Vec<(usize, Rejection, String)>,
) -> Encoded {
    let body_bytes_max = if updates > PROFILE_UPDATES_MAX { 0 } else { BODY_BYTES_MAX };
    Encoded { path, body: body.into_bytes(), body_bytes_max, rejected, ..Encoded::default() }
}

fn empty_import(token: &Secret) -> Encoded {
    let (body, basic_user) = (b"[]".to_vec(), Some(token.clone()));
    Encoded { path: IMPORT_PATH, body, basic_user, ..Encoded::default() }
}

fn usable(id: Option<&str>) -> Option<&str> {
    id.filter(|id| !FORBIDDEN_IDS.contains(id))
}

fn event_name(name: &str) -> Cow<'_, str> {
    if RESERVED_EVENTS.contains(&name) { format!("event_{name}").into() } else { name.into() }
}

/// A time that is ahead Mixpanel refuses, or replaces by that of arrival, which is
/// another one at each attempt: by it, a retry would not be recognised as one. The
/// time of acceptance stands in, which is fixed.
fn time_ms(event: &Event) -> i64 {
    event.time_ms().min(event.accepted_ms())
}

fn insert_id(event: &Event) -> Cow<'_, str> {
    let id = event.id();
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let legal = id.as_str().len() <= 36 && id.as_str().bytes().all(is_legal);
    if legal && !FORBIDDEN_IDS.contains(&id.as_str()) {
        id.into()
    } else {
        id.namespaced().to_string().into()
    }
}

/// Writes the caller's properties beside ours, as they are if Mixpanel's
/// narrower rules allow it. `own` is the number of ours.
#[inline]
fn splice_properties(out: &mut Object<'_>, properties: &Properties, own: u16, names: impl Fn() -> Names) {
    let shape = properties.shape();
    let fits = !shape.has_reserved_key()
        && shape.top_keys <= ITEMS_MAX.saturating_sub(own)
        && shape.depth <= NESTING_MAX + 1
        && shape.widest <= ITEMS_MAX
        && shape.longest_key <= KEY_BYTES_MAX
        && (shape.depth == 1 || properties.json().len() <= NESTED_BYTES_MAX);
    if fits {
        out.splice(properties.json());
    } else {
        write_fitted(out, properties, own, names());
    }
}

/// Writes properties that break one of Mixpanel's rules so that none is lost:
/// a reserved or overlong name is changed, a value that is too deep, too wide
/// or too large becomes its JSON text, and what is beyond the number of
/// properties goes into one object.
fn write_fitted(out: &mut Object<'_>, properties: &Properties, own: u16, mut names: Names) {
    let mut entries = properties.entries();
    for (key, _) in &mut entries {
        *key = names.fit(key);
    }
    let room = usize::from(ITEMS_MAX.saturating_sub(own).max(1));
    let surplus = if entries.len() > room { entries.split_off(room - 1) } else { Vec::new() };
    for (key, value) in &entries {
        write_value(out, key, value, NESTING_MAX);
    }
    if !surplus.is_empty() {
        let mut json = Json::default();
        let mut object = Object::begin(&mut json);
        for (key, value) in &surplus {
            write_value(&mut object, key, value, NESTING_MAX - 1);
        }
        object.end();
        let json = String::from_utf8(json.into_bytes()).expect("only UTF-8 was written");
        let name = names.fit(SURPLUS);
        if json.len() <= NESTED_BYTES_MAX {
            out.named_raw(&name, &json)
        } else {
            out.named_string(&name, &json)
        }
    }
}

fn write_value(out: &mut Object<'_>, key: &str, value: &RawValue, nesting_max: u8) {
    let nested = value.get().starts_with(['{', '[']);
    let shape = if nested { shape_of(value) } else { Default::default() };
    // The shape counts the object that the value stands in as a level.
    let fits = shape.depth <= nesting_max + 1
        && shape.widest <= ITEMS_MAX
        && shape.longest_key <= KEY_BYTES_MAX
        && (!nested || value.get().len() <= NESTED_BYTES_MAX);
    if fits { out.named_raw(key, value.get()) } else { out.named_string(key, value.get()) }
}

/// Names in use.
#[derive(Default)]
struct Names(HashSet<String>);

impl Names {
    /// Some are ours.
    fn beside<'a>(ours: impl Iterator<Item = &'a str>) -> Self {
        Self(ours.map(str::to_owned).collect())
    }

    /// A name for a property: the name itself, or one like it that Mixpanel
    /// takes and that is not in use.
    fn fit(&mut self, name: &str) -> String {
        if is_reserved_property(name.as_bytes()) {
            self.unique(format!("property_{name}"))
        } else {
            self.unique(name.to_owned())
        }
    }

    fn unique(&mut self, mut name: String) -> String {
        cut(&mut name, KEY_BYTES_MAX.into());
        while !self.0.insert(name.clone()) {
            cut(&mut name, usize::from(KEY_BYTES_MAX) - 1);
            // In front, so that names cut alike do not meet again.
            name.insert(0, '_');
        }
        name
    }
}

/// Cuts a text to at most `bytes_max` bytes, between two characters.
fn cut(text: &mut String, bytes_max: usize) {
    while text.len() > bytes_max {
        text.pop();
    }
}

/// Gives common traits Mixpanel's names, unless the caller uses that name too,
/// and cuts names that are too long.
fn rename_traits(entries: Vec<Entry<'_>>) -> Vec<Entry<'_>> {
    let given: HashSet<String> = entries.iter().map(|(key, _)| key.clone()).collect();
    let mut names = Names::default();
    let mut rename = |key: String| match profile_name(key.as_bytes()) {
        Some(name) if !given.contains(name) => names.unique(name.to_owned()),
        _ => names.unique(key),
    };
    entries.into_iter().map(|(key, value)| (rename(key), value)).collect()
}

#[derive(Deserialize)]
struct ImportReply {
    #[serde(default)]
    code: Value,
    /// Text in the documentation, a number in the tests of one of Mixpanel's SDKs.
    #[serde(default)]
    status: Value,
    #[serde(default)]
    num_records_imported: Value,
    #[serde(default, deserialize_with = "null_as_default")]
    failed_records: Vec<FailedRecord>,
}

impl ImportReply {
    fn is_success(&self) -> bool {
        let is_ok = match &self.status {
            Value::String(status) => status.eq_ignore_ascii_case("ok"),
            status => *status == 1 || *status == 200,
        };
        self.code == 200 && is_ok
    }
}

#[derive(Deserialize)]
struct FailedRecord {
    index: usize,
    #[serde(default, deserialize_with = "null_as_default")]
    field: String,
    #[serde(default, deserialize_with = "null_as_default")]
    message: String,
}

fn interpret_import(sent: usize, reply: &Reply) -> Result<Vec<Verdict>, SendError> {
    if !matches!(reply.status, 200 | 400) {
        return Err(reply.failure());
    }
    let Some(parsed) = object::<ImportReply>(&reply.body) else {
        return Err(reply.failure());
    };
    let mut rejected: HashMap<usize, String> = HashMap::new();
    for record in parsed.failed_records.iter().filter(|record| record.index < sent) {
        rejected
            .entry(record.index)
            .or_insert_with(|| reply.saying(&format!("{}: {}", record.field, record.message)));
    }
    let is_counted = parsed.num_records_imported == sent - rejected.len();
    let others = match reply.status {
        200 if parsed.is_success() && is_counted => Verdict::Delivered,
        // Also after a 400: all rows but the listed ones were taken.
        400 if !rejected.is_empty() && is_counted => Verdict::Delivered,
        // Whether they were is not known. Those that were are recognised.
        _ if !rejected.is_empty() => Verdict::Resend,
        _ => return Err(reply.failure()),
    };
    let verdict = |index| match rejected.remove(&index) {
        Some(detail) => Verdict::Rejected { reason: Rejection::Invalid, detail },
        None => others.clone(),
    };
    Ok((0..sent).map(verdict).collect())
}

#[derive(Deserialize)]
struct EngageReply {
    status: u8,
    #[serde(default, deserialize_with = "null_as_default")]
    error: String,
}

/// 1 says that at least one record was valid, and 0 that none was. Which, and whether
/// the token is that of a project, `/engage` does not say.
fn interpret_engage(sent: usize, reply: &Reply) -> Result<Vec<Verdict>, SendError> {
    if reply.status != 200 {
        return Err(reply.failure());
    }
    let said = match reply.body.trim() {
        "1" => Some((1, String::new())),
        "0" => Some((0, String::new())),
        body => object(body).map(|EngageReply { status, error }| (status, error)),
    };
    match said {
        Some((1, error)) if error.is_empty() => Ok(vec![Verdict::Delivered; sent]),
        Some((0, _)) => Err(SendError::Refused { detail: reply.detail() }),
        _ => Err(reply.unavailable()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::event::{
        EventParts,
        tests_support::{identify, parts, track},
    };

    fn mixpanel(identity: IdentityMode) -> Mixpanel {
        Mixpanel::new(Secret::new("token"), identity)
    }

    fn encoded(event: Event) -> Value {
        let encoded = mixpanel(IdentityMode::Simplified).encode(&[event], 0);
        serde_json::from_slice(&encoded.body).unwrap()
    }

    fn properties(event: Event) -> Value {
        encoded(event)[0]["properties"].clone()
    }

    fn reply(status: u16, body: Value) -> Reply {
        Reply { status, body: body.to_string(), ..Reply::default() }
    }

    #[test]
    fn a_track_is_one_row_of_import() {
        let mut event = parts("Order Placed", r#"{"total":19.5,"gift":false,"sku":"SKU-1"}"#);
        event.anonymous_id = Some("device-1");
        event.ip = Some("203.0.113.9".parse().unwrap());
        assert_eq!(
            encoded(Event::pack(&event)),
            json!([{"event": "Order Placed", "properties": {
                "time": 1_767_225_600_000_i64, "distinct_id": "user-1", "$user_id": "user-1",
                "$device_id": "device-1", "$insert_id": "id-1", "ip": "203.0.113.9",
                "total": 19.5, "gift": false, "sku": "SKU-1"}}])
        );
    }

    #[test]
    fn identity_follows_the_projects_mode() {
        let cases = [
            (Some("user"), Some("device"), "user", "user"),
            (Some("user"), None, "user", "user"),
            (None, Some("device"), "$device:device", "device"),
            (None, None, "", ""),
            (Some("null"), Some("device"), "$device:device", "device"),
            (Some("undefined"), Some("anonymous"), "", ""),
        ];
        for (user, device, simplified, original) in cases {
            let event =
                || Event::pack(&EventParts { user_id: user, anonymous_id: device, ..parts("x", "{}") });
            for (mode, want) in [(IdentityMode::Simplified, simplified), (IdentityMode::Original, original)] {
                let body = mixpanel(mode).encode(&[event()], 0).body;
                let row: Value = serde_json::from_slice(&body).unwrap();
                assert_eq!(row[0]["properties"]["distinct_id"], want, "{user:?} {device:?} {mode:?}");
                assert_eq!(
                    row[0]["properties"].get("$user_id").is_some(),
                    want == "user" && mode == IdentityMode::Simplified
                );
            }
        }
    }

    #[test]
    fn ids_that_mixpanel_refuses_become_a_uuid_that_never_changes() {
        for id in ["order/1", "0", "null", &"x".repeat(37)] {
            let id = crate::EventId::new(id).unwrap();
            let event = Event::pack(&EventParts { id, ..parts("x", "{}") });
            let want = event.id().namespaced().to_string();
            assert_eq!(properties(event)["$insert_id"], want);
        }
    }

    #[test]
    fn a_time_that_is_ahead_becomes_the_time_of_acceptance() {
        let accepted_ms = track("x", "{}").accepted_ms();
        for (ahead_ms, want) in
            [(-1, accepted_ms - 1), (0, accepted_ms), (1, accepted_ms), (i64::MAX / 2, accepted_ms)]
        {
            let event = Event::pack(&EventParts { time_ms: accepted_ms + ahead_ms, ..parts("x", "{}") });
            assert_eq!(properties(event)["time"], want);
        }
    }

    #[test]
    fn no_property_of_the_caller_replaces_one_of_ours_or_is_lost() {
        let event = track("x", r#"{"time":1,"$insert_id":"z","mp_x":2,"property_time":3,"plain":4}"#);
        let properties = properties(event);
        assert_eq!(properties["time"], 1_767_225_600_000_i64);
        assert_eq!(properties["$insert_id"], "id-1");
        assert_eq!(properties["property_time"], 1);
        assert_eq!(properties["_property_time"], 3);
        assert_eq!(properties["property_$insert_id"], "z");
        assert_eq!(properties["property_mp_x"], 2);
        assert_eq!(properties["plain"], 4);
    }

    #[test]
    fn what_is_too_deep_or_too_wide_becomes_its_json_text() {
        let deep = r#"{"a":{"b":{"c":{"d":1}}}}"#;
        let wide = format!("[{}]", vec!["1"; 255].join(","));
        let event = track("x", &format!(r#"{{"deep":{deep},"wide":{wide},"fits":{{"a":{{"b":{{}}}}}}}}"#));
        let properties = properties(event);
        assert_eq!(properties["deep"], deep);
        assert_eq!(properties["wide"], wide);
        assert_eq!(properties["fits"], json!({"a": {"b": {}}}));
    }

    #[test]
    fn properties_beyond_mixpanels_number_go_into_one_object() {
        let fields: Vec<_> = (0..256).map(|i| format!(r#""k{i}":{i}"#)).collect();
        let properties = properties(track("x", &format!("{{{}}}", fields.join(","))));
        assert!(properties.as_object().unwrap().len() <= usize::from(ITEMS_MAX));
        let surplus = properties[SURPLUS].as_object().unwrap();
        let top = properties.as_object().unwrap().keys().filter(|key| key.starts_with('k')).count();
        assert_eq!(top + surplus.len(), 256);
    }

    #[test]
    fn an_identify_sets_and_unsets_in_two_updates() {
        let event = identify(r#"{"plan":"pro","legacy":null,"email":"a@example.com"}"#);
        assert_eq!(
            encoded(event),
            json!([
                {"$token": "token", "$distinct_id": "user-1", "$ip": "0",
                 "$set": {"plan": "pro", "$email": "a@example.com"}},
                {"$token": "token", "$distinct_id": "user-1", "$ip": "0", "$unset": ["legacy"]},
            ])
        );
        let only_unset = encoded(identify(r#"{"legacy":null}"#));
        assert_eq!(only_unset.as_array().unwrap().len(), 1);
    }

    #[test]
    fn after_a_400_the_rows_that_are_not_listed_were_taken() {
        let failed = json!([
            {"index": 1, "insert_id": "x", "field": "properties.time", "message": "bad"},
            {"index": 1, "insert_id": "x", "field": "event", "message": "bad"},
            {"index": 99, "$insert_id": "y"},
        ]);
        // Unless the number of those that were taken is another one.
        for (status, imported, others) in [
            (400, json!(2), Verdict::Delivered),
            (200, json!(2), Verdict::Delivered),
            (400, json!(1), Verdict::Resend),
            (400, json!("2"), Verdict::Resend),
            (400, Value::Null, Verdict::Resend),
            (200, json!(3), Verdict::Resend),
        ] {
            let body = json!({"code": status, "status": "OK", "num_records_imported": imported,
                "failed_records": failed});
            let verdicts = interpret_import(3, &reply(status, body)).unwrap();
            assert_eq!((&verdicts[0], &verdicts[2]), (&others, &others), "{status} {imported}");
            assert!(
                matches!(&verdicts[1], Verdict::Rejected { detail, .. } if detail.contains("properties.time"))
            );
        }
    }

    #[test]
    fn an_answer_that_names_no_row_is_a_failure_of_the_whole() {
        let refused = interpret_import(3, &reply(400, json!({"error": "bad JSON"})));
        assert!(matches!(refused, Err(SendError::Refused { .. })));
        let junk = Reply { status: 200, body: "<html>".into(), ..Reply::default() };
        assert!(matches!(interpret_import(3, &junk), Err(SendError::Unavailable { .. })));
        assert!(matches!(interpret_engage(3, &junk), Err(SendError::Unavailable { .. })));
    }

    #[test]
    fn the_status_of_a_success_may_be_a_number() {
        for (status, is_success) in [
            (json!("OK"), true),
            (json!("Ok"), true),
            (json!(1), true),
            (json!(200), true),
            (json!(0), false),
            (json!("OKAY"), false),
            (Value::Null, false),
        ] {
            let body = json!({"code": 200, "status": status, "num_records_imported": 1,
                "failed_records": null});
            assert_eq!(interpret_import(1, &reply(200, body)).is_ok(), is_success, "{status}");
        }
    }

    #[test]
    fn engage_says_in_the_body_whether_it_took_anything() {
        for good in [json!(1), json!({"status": 1, "error": null}), json!({"status": 1})] {
            assert_eq!(interpret_engage(2, &reply(200, good)), Ok(vec![Verdict::Delivered; 2]));
        }
        for bad in [json!(0), json!({"status": 0, "error": "nothing valid"})] {
            assert!(matches!(interpret_engage(2, &reply(200, bad)), Err(SendError::Refused { .. })));
        }
        for strange in [json!(2), json!({"status": 2}), json!({"status": 1, "error": "moved"}), json!({})] {
            assert!(matches!(interpret_engage(2, &reply(200, strange)), Err(SendError::Unavailable { .. })));
        }
    }
}
