//! Mixpanel: `POST /import`, `POST /engage`, `POST /groups`, and of `POST /track` what makes
//! an alias.
//!
//! Limits enforced: 2000 rows a request, 2 MiB of body uncompressed (the lower of
//! the two documented figures), 1 MB a row, fewer than 255 properties, 255
//! characters a name, 8 KiB and 3 levels a nested value.
//!
//! `/import` answers row by row: the good rows of a 400 with `failed_records` are
//! in. A time up to an hour ahead becomes the time of arrival, so such an event is
//! not recognised when it comes again. The others answer 200 if a single record is
//! good and never say which; that a token is nobody's, or somebody else's, they do
//! not say at all.
//!
//! Documented at docs.mixpanel.com/reference (import events, identities, user
//! profiles) and in Mixpanel's OpenAPI file, as of August 2026.

use hyper::{Method, StatusCode};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::contract::{Coding, Judgement, Request, Terms, depth, text};
use super::record::{Arrival, TakenKind};

const BODY_MAX_BYTES: usize = 2 * 1024 * 1024;
const ROWS_MAX: usize = 2000;
const ROW_MAX_BYTES: usize = 1_000_000;
const NAME_MAX_CHARS: usize = 255;
/// Exclusive, for properties, members of a nested object and items of an array.
const MEMBERS_LIMIT: usize = 255;
const NESTED_MAX_BYTES: usize = 8 * 1024;
const NESTED_MAX_DEPTH: usize = 3;
const PROFILE_MAX_PROPERTIES: usize = 2000;
const YEAR_1971_S: i64 = 365 * 24 * 3600;
const AHEAD_MAX_S: i64 = 3600;

/// What stands for "no id" in one client or another. Compared exactly.
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

const OPERATIONS: [&str; 8] =
    ["$set", "$set_once", "$add", "$union", "$append", "$remove", "$unset", "$delete"];

/// Judges a request to any path.
pub(super) fn judge(request: &Request<'_>, terms: &Terms<'_>) -> Judgement {
    match request.path {
        "/engage" => updates(request, terms, engage_record),
        "/groups" => updates(request, terms, group_record),
        "/track" => track(request, terms),
        _ => import(request, terms),
    }
}

/// The body that goes with a status refusing the whole request.
pub(super) fn refusal(path: &str, status: u16) -> Value {
    let reason = reason(status);
    let error = match status {
        401 => "Invalid credentials".to_owned(),
        413 => format!("request exceeds max limit of {BODY_MAX_BYTES} bytes"),
        429 => "Project exceeded rate limits. Please retry the request with exponential backoff.".to_owned(),
        _ => reason.to_owned(),
    };
    refusal_saying(path, status, &error)
}

fn refusal_saying(path: &str, status: u16, error: &str) -> Value {
    match path {
        "/import" => json!({"code": status, "error": error, "status": reason(status)}),
        _ if matches!(status, 401 | 403) => json!({"error": error, "status": "error"}),
        _ => json!({"error": error, "status": 0}),
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        // Mixpanel's name for it is older than the standard's.
        413 => "Request Entity Too Large",
        _ => {
            StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Error")
        }
    }
}

// ---- /import ----

fn import(request: &Request<'_>, terms: &Terms<'_>) -> Judgement {
    let rows = match import_rows(request, terms) {
        Ok(rows) => rows,
        Err((status, error)) => {
            return Judgement::refuse(status, refusal_saying(request.path, status, &error));
        }
    };

    let mut taken = Vec::with_capacity(rows.len());
    let mut failed = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        match import_row(row.get(), terms) {
            Ok(arrival) => taken.extend(arrival),
            Err(failure) => failed.push(json!({
                "index": index,
                "insert_id": failure.insert_id,
                "field": failure.field,
                "message": failure.message,
            })),
        }
    }

    let rejected = (rows.len() - taken.len()) as u64;
    let (status, body) = if failed.is_empty() {
        (200, json!({"code": 200, "num_records_imported": taken.len(), "status": "OK"}))
    } else {
        let body = json!({
            "code": 400,
            "status": "Bad Request",
            "error": "some data points in the request failed validation",
            "num_records_imported": taken.len(),
            "failed_records": failed,
        });
        (400, body)
    };
    Judgement { status, body, events: rows.len(), taken, rejected }
}

/// The rows, unless the request as a whole is wrong.
fn import_rows<'a>(request: &Request<'a>, terms: &Terms<'_>) -> Result<Vec<&'a RawValue>, (u16, String)> {
    let bad = |error: &str| (400, error.to_owned());
    if request.method != Method::POST {
        return Err((405, "Method Not Allowed".to_owned()));
    }
    if !request.has_basic_key(terms.key) {
        return Err((401, "Invalid credentials".to_owned()));
    }
    if request.parameter("strict") != Some("1") {
        return Err(bad("want strict=1 in the query"));
    }
    if !request.is_json() {
        return Err(bad("want Content-Type application/json"));
    }
    if request.content.exceeds(BODY_MAX_BYTES) {
        return Err((413, format!("request exceeds max limit of {BODY_MAX_BYTES} bytes")));
    }
    if request.content.coding == Coding::Unreadable {
        return Err(bad("want Content-Encoding gzip or none"));
    }
    let rows: Vec<&RawValue> =
        serde_json::from_slice(&request.content.bytes).map_err(|_| bad("want a JSON array of events"))?;
    match rows.len() {
        0 => Err(bad("request has no events")),
        1..=ROWS_MAX => Ok(rows),
        rows => Err((400, format!("request has {rows} events, want at most {ROWS_MAX}"))),
    }
}

/// Why a row was refused.
struct Failure {
    insert_id: String,
    field: String,
    message: String,
}

/// The event, or None if the row asks to be ignored.
fn import_row(raw: &str, terms: &Terms<'_>) -> Result<Option<Arrival>, Failure> {
    let row = match serde_json::from_str(raw) {
        Ok(Value::Object(row)) => row,
        _ => {
            let message = "want a JSON object".to_owned();
            return Err(Failure { insert_id: String::new(), field: String::new(), message });
        }
    };
    import_object(raw, &row, terms).map_err(|(field, message)| Failure {
        insert_id: row.get("properties").and_then(|p| p.get("$insert_id")?.as_str()).unwrap_or("").to_owned(),
        field,
        message: message.to_owned(),
    })
}

fn import_object(
    raw: &str,
    row: &Map<String, Value>,
    terms: &Terms<'_>,
) -> Result<Option<Arrival>, (String, &'static str)> {
    let check =
        |good: bool, field: &str, message| if good { Ok(()) } else { Err((field.to_owned(), message)) };

    check(raw.len() < ROW_MAX_BYTES, "", "want less than 1 MB")?;
    let name = text(row, "event");
    check(
        (1..=NAME_MAX_CHARS).contains(&name.chars().count()),
        "event",
        "want a string of 1 to 255 characters",
    )?;
    let Some(Value::Object(properties)) = row.get("properties") else {
        return Err(("properties".to_owned(), "want an object"));
    };

    let time = properties.get("time").and_then(Value::as_i64);
    let time = time.ok_or_else(|| ("properties.time".to_owned(), "want an integer"))?;
    let time = check_time(time, terms.now_ms).map_err(|message| ("properties.time".to_owned(), message))?;

    let distinct_id = properties.get("distinct_id").and_then(Value::as_str);
    let distinct_id = distinct_id.ok_or_else(|| ("properties.distinct_id".to_owned(), "want a string"))?;
    check(!FORBIDDEN_IDS.contains(&distinct_id), "properties.distinct_id", "is not an id")?;

    let insert_id = text(properties, "$insert_id");
    check(is_insert_id(insert_id), "properties.$insert_id", "want 1 to 36 of A-Z, a-z, 0-9 and -")?;
    check(!FORBIDDEN_IDS.contains(&insert_id), "properties.$insert_id", "is not an id")?;

    check_identity(properties, distinct_id)?;
    let own_token = properties.get("token").is_none_or(|token| token.as_str() == Some(terms.key));
    check(own_token, "properties.token", "is another project's")?;

    check(properties.len() < MEMBERS_LIMIT, "properties", "want fewer than 255")?;
    for (property, value) in properties {
        check_property(property, value).map_err(|message| (format!("properties.{property}"), message))?;
    }

    let rejected = terms.fault.is_some_and(|fault| fault.rejects(insert_id, distinct_id, name));
    check(!rejected, "properties", "refused by the sandbox on request")?;

    // Discarded in silence, as the vendor does.
    if properties.get("$ignore").is_some_and(|ignore| *ignore != Value::Bool(false)) {
        return Ok(None);
    }
    Ok(Some(Arrival {
        // NUL separates: a key cannot be made up of the neighbours' ends.
        dedup_key: Some(format!("{name}\0{time}\0{distinct_id}\0{insert_id}")),
        id: insert_id.to_owned(),
        kind: TakenKind::Track,
        user: distinct_id.to_owned(),
        name: name.to_owned(),
        event: raw.into(),
    }))
}

/// The time that the event gets. Accepts seconds or milliseconds: what would be too
/// far ahead in seconds is taken for milliseconds, which no time since 1971 is
/// ambiguous about.
fn check_time(time: i64, now_ms: i64) -> Result<i64, &'static str> {
    let latest_s = now_ms / 1000 + AHEAD_MAX_S;
    let time_ms = if time > latest_s { time } else { time.saturating_mul(1000) };
    if time_ms / 1000 < YEAR_1971_S {
        return Err("is before 1971");
    }
    if time_ms / 1000 > latest_s {
        return Err("is more than an hour ahead");
    }
    Ok(time_ms.min(now_ms))
}

fn is_insert_id(id: &str) -> bool {
    (1..=36).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// With simplified id merge, `distinct_id` follows from the two other ids.
fn check_identity(properties: &Map<String, Value>, distinct_id: &str) -> Result<(), (String, &'static str)> {
    for name in ["$user_id", "$device_id"] {
        let id = properties.get(name).map(|id| id.as_str().unwrap_or_default());
        if id.is_some_and(|id| id.is_empty() || FORBIDDEN_IDS.contains(&id)) {
            return Err((format!("properties.{name}"), "want a non-empty string that is an id"));
        }
    }
    let want = match (text(properties, "$user_id"), text(properties, "$device_id")) {
        ("", "") => return Ok(()),
        ("", device) => format!("$device:{device}"),
        (user, _) => user.to_owned(),
    };
    if distinct_id != want {
        return Err(("properties.distinct_id".to_owned(), "does not follow from $user_id or $device_id"));
    }
    Ok(())
}

fn check_property(name: &str, value: &Value) -> Result<(), &'static str> {
    if name.chars().count() > NAME_MAX_CHARS {
        return Err("want a name of at most 255 characters");
    }
    if depth(value) == 0 {
        return Ok(());
    }
    if depth(value) > NESTED_MAX_DEPTH {
        return Err("want at most 3 levels");
    }
    check_members(value)?;
    if value.to_string().len() > NESTED_MAX_BYTES {
        return Err("want at most 8 KiB");
    }
    Ok(())
}

fn check_members(value: &Value) -> Result<(), &'static str> {
    match value {
        Value::Object(members) => {
            if members.len() >= MEMBERS_LIMIT {
                return Err("want fewer than 255 keys");
            }
            if members.keys().any(|name| name.chars().count() > NAME_MAX_CHARS) {
                return Err("want names of at most 255 characters");
            }
            members.values().try_for_each(check_members)
        }
        Value::Array(items) if items.len() >= MEMBERS_LIMIT => Err("want fewer than 255 items"),
        Value::Array(items) => items.iter().try_for_each(check_members),
        _ => Ok(()),
    }
}

// ---- /engage, /groups ----

/// The update, or None if it is another project's.
type Judge = fn(&str, &Terms<'_>) -> Result<Option<Arrival>, &'static str>;

fn updates(request: &Request<'_>, terms: &Terms<'_>, judge: Judge) -> Judgement {
    let records = match update_records(request) {
        Ok(records) => records,
        Err((status, error)) => {
            return Judgement::refuse(status, spoken(request, refusal_saying(request.path, status, error)));
        }
    };
    one_is_enough(request, &records, |raw| judge(raw, terms))
}

/// Takes what is good of some records, and answers whether one was.
fn one_is_enough(
    request: &Request<'_>,
    records: &[&RawValue],
    judge: impl Fn(&str) -> Result<Option<Arrival>, &'static str>,
) -> Judgement {
    let mut taken = Vec::with_capacity(records.len());
    let mut good = 0;
    let mut first_error = None;
    for raw in records {
        match judge(raw.get()) {
            Ok(arrival) => {
                good += 1;
                taken.extend(arrival);
            }
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }

    // One good record hides all the bad ones.
    let body = match first_error {
        Some(error) if good == 0 => json!({"status": 0, "error": error}),
        _ => json!({"status": 1, "error": null}),
    };
    let rejected = (records.len() - taken.len()) as u64;
    Judgement { status: 200, body: spoken(request, body), events: records.len(), taken, rejected }
}

fn update_records<'a>(request: &Request<'a>) -> Result<Vec<&'a RawValue>, (u16, &'static str)> {
    if request.method != Method::POST {
        return Err((405, "Method Not Allowed"));
    }
    if !request.is_json() {
        return Err((400, "want Content-Type application/json"));
    }
    if request.content.exceeds(BODY_MAX_BYTES) {
        return Err((413, "request exceeds max limit"));
    }
    if request.content.coding != Coding::Identity {
        return Err((400, "want no Content-Encoding"));
    }
    let Ok(records) = serde_json::from_slice::<Vec<&RawValue>>(&request.content.bytes) else {
        return Err((200, "want a JSON array of records"));
    };
    match records.len() {
        0 => Err((200, "request has no records")),
        1..=ROWS_MAX => Ok(records),
        _ => Err((413, "request exceeds max limit of 2000 records")),
    }
}

/// The answer in full, or `1` or `0` for a client that did not ask for it.
fn spoken(request: &Request<'_>, verbose: Value) -> Value {
    match request.parameter("verbose") {
        Some("1" | "2") => verbose,
        _ => verbose["status"].clone(),
    }
}

fn check(good: bool, error: &'static str) -> Result<(), &'static str> {
    if good { Ok(()) } else { Err(error) }
}

/// A record with its operation.
fn update_record(raw: &str) -> Result<Map<String, Value>, &'static str> {
    check(raw.len() <= ROW_MAX_BYTES, "want at most 1 MB")?;
    let Ok(Value::Object(record)) = serde_json::from_str(raw) else {
        return Err("want a JSON object");
    };
    check(!text(&record, "$token").is_empty(), "$token, missing or empty")?;
    let mut operations = OPERATIONS.iter().filter_map(|name| Some((*name, record.get(*name)?)));
    let (Some((operation, operand)), None) = (operations.next(), operations.next()) else {
        return Err("want exactly one operation");
    };
    check_operation(operation, operand)?;
    Ok(record)
}

fn engage_record(raw: &str, terms: &Terms<'_>) -> Result<Option<Arrival>, &'static str> {
    let record = update_record(raw)?;
    let token = text(&record, "$token");
    let distinct_id = text(&record, "$distinct_id");
    check(!distinct_id.is_empty(), "$distinct_id, missing or empty")?;
    check(!FORBIDDEN_IDS.contains(&distinct_id), "$distinct_id, is not an id")?;

    let rejected = terms.fault.is_some_and(|fault| fault.rejects("", distinct_id, ""));
    check(!rejected, "refused by the sandbox on request")?;
    // Lost without a word, unless there is such a project.
    Ok((token == terms.key).then(|| Arrival {
        // The vendor applies a profile update as often as it comes.
        dedup_key: None,
        id: String::new(),
        kind: TakenKind::Identify,
        user: distinct_id.to_owned(),
        name: String::new(),
        event: raw.into(),
    }))
}

fn group_record(raw: &str, terms: &Terms<'_>) -> Result<Option<Arrival>, &'static str> {
    let record = update_record(raw)?;
    let (key, id) = (text(&record, "$group_key"), text(&record, "$group_id"));
    let is_key = (1..=NAME_MAX_CHARS).contains(&key.chars().count()) && !key.starts_with('$');
    check(is_key, "$group_key, want 1 to 255 characters that do not begin with $")?;
    check(!id.is_empty(), "$group_id, missing or empty")?;
    // A group has no id among the users', and no place on the map.
    check(record.get("$distinct_id").is_none(), "$distinct_id, is a user's")?;
    let is_empty = |operand: &Value| operand.as_object().is_some_and(Map::is_empty);
    check(!record.get("$set").is_some_and(is_empty), "$set, want a property")?;
    let rejected = terms.fault.is_some_and(|fault| fault.rejects("", "", id));
    check(!rejected, "refused by the sandbox on request")?;
    Ok((text(&record, "$token") == terms.key).then(|| Arrival {
        dedup_key: None,
        id: String::new(),
        kind: TakenKind::Group,
        user: String::new(),
        name: id.to_owned(),
        event: raw.into(),
    }))
}

// ---- /track ----

fn track(request: &Request<'_>, terms: &Terms<'_>) -> Judgement {
    let refuse = |status, error| {
        Judgement::refuse(status, spoken(request, refusal_saying(request.path, status, error)))
    };
    if request.method != Method::POST {
        return refuse(405, "Method Not Allowed");
    }
    if !request.is_form() || request.content.coding != Coding::Identity {
        return refuse(400, "want a form, and no Content-Encoding");
    }
    if request.content.exceeds(BODY_MAX_BYTES) {
        return refuse(413, "request exceeds max limit");
    }
    let data = request.content.bytes.strip_prefix(b"data=").and_then(percent_decoded);
    let Some(rows) = data.as_deref().and_then(|data| serde_json::from_str::<Vec<&RawValue>>(data).ok())
    else {
        return refuse(200, "data, want a JSON array of events");
    };
    match rows.len() {
        0 => refuse(200, "request has no events"),
        1..=ROWS_MAX => one_is_enough(request, &rows, |raw| alias_row(raw, terms)),
        _ => refuse(413, "request exceeds max limit of 2000 events"),
    }
}

/// The alias, or None if it is another project's.
fn alias_row(raw: &str, terms: &Terms<'_>) -> Result<Option<Arrival>, &'static str> {
    let Ok(Value::Object(row)) = serde_json::from_str(raw) else {
        return Err("want a JSON object");
    };
    check(
        text(&row, "event") == "$create_alias",
        "event, want $create_alias: the sandbox takes nothing else",
    )?;
    let Some(Value::Object(properties)) = row.get("properties") else {
        return Err("properties, want an object");
    };
    let token = text(properties, "token");
    check(!token.is_empty(), "token, missing or empty")?;
    let [previous_id, user_id] = ["distinct_id", "alias"].map(|name| text(properties, name));
    for id in [previous_id, user_id] {
        check(!id.is_empty() && !FORBIDDEN_IDS.contains(&id), "distinct_id and alias, want ids")?;
    }
    check(previous_id != user_id, "alias, want another id")?;
    let rejected = terms.fault.is_some_and(|fault| fault.rejects("", user_id, previous_id));
    check(!rejected, "refused by the sandbox on request")?;
    Ok((token == terms.key).then(|| Arrival {
        // The same one again changes nothing.
        dedup_key: Some(format!("$create_alias\0{previous_id}\0{user_id}")),
        id: String::new(),
        kind: TakenKind::Alias,
        user: user_id.to_owned(),
        name: previous_id.to_owned(),
        event: raw.into(),
    }))
}

/// The value of a form's field, if it is the only one.
fn percent_decoded(value: &[u8]) -> Option<String> {
    let mut decoded = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digits = [*bytes.next()?, *bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' => b' ',
            b'&' | b'=' => return None,
            byte => *byte,
        });
    }
    String::from_utf8(decoded).ok()
}

fn check_operation(operation: &str, operand: &Value) -> Result<(), &'static str> {
    match (operation, operand) {
        ("$delete", _) => Ok(()),
        ("$unset", Value::Array(names)) if names.iter().all(Value::is_string) => Ok(()),
        ("$unset", _) => Err("$unset, want an array of strings"),
        ("$union", Value::Object(properties)) if !properties.values().all(Value::is_array) => {
            Err("$union, want arrays")
        }
        (_, Value::Object(properties)) => {
            if properties.len() > PROFILE_MAX_PROPERTIES {
                return Err("want at most 2000 properties");
            }
            if properties.keys().any(|name| name.chars().count() > NAME_MAX_CHARS) {
                return Err("want names of at most 255 characters");
            }
            // The vendor would store the null; a relay that means "remove" has a bug.
            if properties.values().any(Value::is_null) {
                return Err("want no null: $unset removes");
            }
            Ok(())
        }
        _ => Err("want an object"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::contract::testing::{KEY, NOW_MS, Sample};
    use super::*;

    fn event(id: &str) -> Value {
        json!({"event": "Order Placed", "properties": {
            "time": NOW_MS, "distinct_id": "user-1", "$user_id": "user-1", "$device_id": "device-1",
            "$insert_id": id, "ip": "0", "total": 19.5, "items": [{"sku": "a"}],
        }})
    }

    /// The event with one property replaced, or removed if null.
    fn with(property: &str, value: Value) -> Value {
        let mut event = event("id-1");
        let properties = event["properties"].as_object_mut().unwrap();
        match value {
            Value::Null => properties.remove(property),
            value => properties.insert(property.to_owned(), value),
        };
        event
    }

    fn import(rows: Value) -> Sample {
        Sample::new("/import?strict=1", rows)
    }

    fn engage(records: Value) -> Sample {
        Sample::new("/engage?verbose=1", records)
    }

    fn status(sample: Sample) -> u16 {
        let judgement = sample.judge(judge);
        assert!(judgement.status == 200 || judgement.taken.is_empty());
        judgement.status
    }

    #[test]
    fn good_events_are_taken_plain_and_gzipped() {
        for sample in
            [import(json!([event("a"), event("b")])), import(json!([event("a"), event("b")])).gzip()]
        {
            let judgement = sample.judge(judge);
            assert_eq!(judgement.status, 200, "{}", judgement.body);
            assert_eq!(judgement.body["num_records_imported"], 2);
            assert_eq!((judgement.taken.len(), judgement.events, judgement.rejected), (2, 2, 0));
            assert_eq!(judgement.taken[0].id, "a");
        }
    }

    #[test]
    fn a_wrong_request_is_refused_whole() {
        let good = || json!([event("a")]);
        let mut wrong_method = import(good());
        wrong_method.method = Method::PUT;
        assert_eq!(status(wrong_method), 405);
        assert_eq!(status(import(good()).header("authorization", "Basic bm9wZTo=")), 401);
        assert_eq!(status(Sample::new("/import", good())), 400);
        assert_eq!(status(Sample::new("/import?strict=0", good())), 400);
        assert_eq!(status(import(good()).header("content-type", "text/plain")), 400);
        assert_eq!(status(import(good()).header("content-encoding", "br")), 400);
        assert_eq!(status(import(json!([]))), 400);
        assert_eq!(status(import(json!({"event": 1}))), 400);
        assert_eq!(status(import(Value::from_iter((0..2001).map(|i| event(&i.to_string()))))), 400);
        let large = json!(["a".repeat(BODY_MAX_BYTES)]);
        assert_eq!(status(import(large.clone())), 413);
        assert_eq!(status(import(large).gzip()), 413);
    }

    #[test]
    fn bad_rows_are_listed_and_the_good_ones_taken() {
        let deep = json!({"a": {"b": {"c": {"d": 1}}}});
        let rows = [
            (json!("text"), ""),
            (json!({"event": "", "properties": {}}), "event"),
            (json!({"event": "a".repeat(256), "properties": {}}), "event"),
            (json!({"event": "a"}), "properties"),
            (with("time", json!("2026-01-01T00:00:00Z")), "properties.time"),
            (with("time", json!(1.5)), "properties.time"),
            (with("time", json!(31_535_999)), "properties.time"),
            (with("time", json!(NOW_MS + 3_601_000)), "properties.time"),
            (with("time", json!(i64::MAX)), "properties.time"),
            (with("time", Value::Null), "properties.time"),
            (with("distinct_id", Value::Null), "properties.distinct_id"),
            (with("distinct_id", json!(7)), "properties.distinct_id"),
            (with("distinct_id", json!("undefined")), "properties.distinct_id"),
            (with("distinct_id", json!("someone-else")), "properties.distinct_id"),
            (with("$user_id", Value::Null), "properties.distinct_id"),
            (with("$device_id", json!(7)), "properties.$device_id"),
            (with("$insert_id", Value::Null), "properties.$insert_id"),
            (with("$insert_id", json!("a b")), "properties.$insert_id"),
            (with("$insert_id", json!("a".repeat(37))), "properties.$insert_id"),
            (with("$insert_id", json!("null")), "properties.$insert_id"),
            (with("token", json!("another")), "properties.token"),
            (with("list", json!(vec![1; 255])), "properties.list"),
            (with("deep", deep), "properties.deep"),
            (with("big", json!(["a".repeat(8 * 1024)])), "properties.big"),
            (with(&"n".repeat(256), json!(1)), &format!("properties.{}", "n".repeat(256))),
        ];
        for (row, field) in &rows {
            let judgement = import(json!([event("good-1"), row, event("good-2")])).judge(judge);
            assert_eq!(judgement.status, 400, "{row}");
            assert_eq!(judgement.body["num_records_imported"], 2);
            let failed = judgement.body["failed_records"].as_array().unwrap();
            assert_eq!(failed.len(), 1);
            assert_eq!((&failed[0]["index"], &failed[0]["field"]), (&json!(1), &json!(field)), "{row}");
            assert_eq!((judgement.taken.len(), judgement.rejected), (2, 1));
        }
    }

    #[test]
    fn what_the_rules_allow_is_taken() {
        let mut anonymous = with("$user_id", Value::Null);
        anonymous["properties"]["distinct_id"] = json!("$device:device-1");
        let mut nobody = with("$user_id", Value::Null);
        nobody["properties"].as_object_mut().unwrap().remove("$device_id");
        nobody["properties"]["distinct_id"] = json!("");
        let allowed = [
            anonymous,
            nobody,
            with("time", json!(31_536_000)),
            with("time", json!(31_536_000_000_i64)),
            with("time", json!(NOW_MS / 1000)),
            with("time", json!(NOW_MS + 3_600_000)),
            with("token", json!(KEY)),
            with("long", json!("a".repeat(10_000))),
            with("nested", json!({"a": {"b": {"c": null}}})),
        ];
        for row in allowed {
            let judgement = import(json!([row])).judge(judge);
            assert_eq!(judgement.status, 200, "{row}: {}", judgement.body);
        }
    }

    #[test]
    fn properties_are_counted() {
        let mut event = event("a");
        let properties = event["properties"].as_object_mut().unwrap();
        for i in properties.len()..254 {
            properties.insert(format!("p{i}"), json!(i));
        }
        assert_eq!(status(import(json!([event]))), 200);
        event["properties"]["one_more"] = json!(1);
        assert_eq!(status(import(json!([event]))), 400);
    }

    #[test]
    fn a_row_too_deep_for_the_parser_is_a_bad_row() {
        let deep = format!("[{},{}{}]", event("good"), "[".repeat(100_000), "]".repeat(100_000));
        let judgement = Sample::new("/import?strict=1", deep).judge(judge);
        assert_eq!((judgement.status, judgement.taken.len()), (400, 1));
    }

    #[test]
    fn an_ignored_event_is_lost_without_a_word() {
        let judgement = import(json!([with("$ignore", json!(true))])).judge(judge);
        assert_eq!((judgement.status, judgement.taken.len(), judgement.rejected), (200, 0, 1));
    }

    #[test]
    fn reject_every_strikes_the_same_events_in_any_order() {
        let events: Vec<_> = (0..100).map(|i| event(&format!("id-{i}"))).collect();
        let failed = |rows: Vec<Value>| -> std::collections::BTreeSet<String> {
            let judgement = import(rows.into()).fault("reject-every=5").judge(judge);
            let failed = judgement.body["failed_records"].as_array().unwrap();
            assert_eq!(judgement.taken.len() + failed.len(), 100);
            failed.iter().map(|record| record["insert_id"].to_string()).collect()
        };
        let forth = failed(events.clone());
        assert!((5..40).contains(&forth.len()), "{}", forth.len());
        assert_eq!(forth, failed(events.into_iter().rev().collect()));
    }

    #[test]
    fn reject_name_strikes_that_name_only() {
        let sample = import(json!([event("a"), {"event": "bad", "properties": event("b")["properties"]}]));
        let judgement = sample.fault("reject-name=bad").judge(judge);
        assert_eq!((judgement.status, judgement.taken.len()), (400, 1));
        assert_eq!(judgement.body["failed_records"][0]["index"], 1);
    }

    #[test]
    fn one_good_profile_update_hides_the_bad_ones() {
        let good = json!({"$token": KEY, "$distinct_id": "user-1", "$set": {"plan": "pro"}});
        let bad = [
            json!({"$distinct_id": "user-1", "$set": {}}),
            json!({"$token": KEY, "$set": {}}),
            json!({"$token": KEY, "$distinct_id": "", "$set": {}}),
            json!({"$token": KEY, "$distinct_id": "null", "$set": {}}),
            json!({"$token": KEY, "$distinct_id": "user-1"}),
            json!({"$token": KEY, "$distinct_id": "user-1", "$set": {}, "$unset": []}),
            json!({"$token": KEY, "$distinct_id": "user-1", "$set": {"plan": null}}),
            json!({"$token": KEY, "$distinct_id": "user-1", "$set": ["plan"]}),
            json!({"$token": KEY, "$distinct_id": "user-1", "$unset": {"plan": "-"}}),
            json!({"$token": KEY, "$distinct_id": "user-1", "$unset": [1]}),
            json!(1),
        ];
        for bad in bad {
            let judgement = engage(json!([bad])).judge(judge);
            assert_eq!((judgement.status, &judgement.body["status"]), (200, &json!(0)), "{bad}");
            assert!(judgement.body["error"].is_string());
            let judgement = engage(json!([bad, good])).judge(judge);
            assert_eq!((judgement.status, &judgement.body), (200, &json!({"status": 1, "error": null})));
            assert_eq!((judgement.taken.len(), judgement.rejected), (1, 1));
        }
    }

    #[test]
    fn engage_is_terse_unless_asked_and_reads_no_gzip() {
        let good = json!([{"$token": KEY, "$distinct_id": "user-1", "$unset": ["plan"]}]);
        assert_eq!(Sample::new("/engage", good.clone()).judge(judge).body, json!(1));
        assert_eq!(Sample::new("/engage", "[1]").judge(judge).body, json!(0));
        assert_eq!(engage(good.clone()).gzip().judge(judge).status, 400);
        let stranger = json!([{"$token": "another", "$distinct_id": "user-1", "$unset": ["plan"]}, good[0]]);
        let judgement = engage(stranger).judge(judge);
        assert_eq!((judgement.status, &judgement.body["status"]), (200, &json!(1)));
        assert_eq!((judgement.taken.len(), judgement.rejected), (1, 1));
    }

    #[test]
    fn a_groups_update_has_a_key_an_id_and_something_to_do() {
        let groups = |records: Value| Sample::new("/groups?verbose=1", records).judge(judge);
        let good =
            json!({"$token": KEY, "$group_key": "company", "$group_id": "g1", "$set": {"plan": "pro"}});
        let with = |name: &str, value: Value| {
            let mut record = good.clone();
            record[name] = value;
            record
        };
        let bad = [
            with("$token", json!("")),
            with("$group_key", Value::Null),
            with("$group_key", json!("$set")),
            with("$group_id", json!("")),
            with("$group_id", json!(7)),
            with("$distinct_id", json!("user-1")),
            with("$set", json!({})),
            with("$set", json!({"plan": null})),
            with("$unset", json!(["old"])),
        ];
        for bad in bad {
            let judgement = groups(json!([bad]));
            assert_eq!((judgement.status, &judgement.body["status"]), (200, &json!(0)), "{bad}");
        }
        let judgement = groups(json!([good, with("$token", json!("another"))]));
        assert_eq!((&judgement.body["status"], judgement.taken.len(), judgement.rejected), (&json!(1), 1, 1));
        assert_eq!((judgement.taken[0].kind, &*judgement.taken[0].name), (TakenKind::Group, "g1"));
        let union = json!({"$token": KEY, "$distinct_id": "user-1", "$union": {"company": "g1"}});
        assert_eq!(engage(json!([union])).judge(judge).body["status"], 0);
    }

    #[test]
    fn an_alias_is_a_form_with_two_ids() {
        let form = "application/x-www-form-urlencoded";
        let track =
            |body: &str| Sample::new("/track?verbose=1", body).header("content-type", form).judge(judge);
        let row = |previous: &str, user: &str, token: &str| {
            let properties = json!({"distinct_id": previous, "alias": user, "token": token});
            format!("data={}", json!([{"event": "$create_alias", "properties": properties}]))
                .replace('"', "%22")
        };
        let judgement = track(&row("u+0", "u1", KEY));
        assert_eq!((&judgement.body, judgement.taken.len()), (&json!({"status": 1, "error": null}), 1));
        let taken = &judgement.taken[0];
        assert_eq!((taken.kind, &*taken.user, &*taken.name), (TakenKind::Alias, "u1", "u 0"));
        for bad in [
            row("", "u1", KEY),
            row("null", "u1", KEY),
            row("u1", "u1", KEY),
            row("u0", "u1", ""),
            row("u0", "u1", KEY).replace("$create_alias", "x"),
            row("u0", "u1", KEY).replace("data=", "date="),
            "data=%5B%5D".to_owned(),
            "data=%".to_owned(),
            format!("{}&ip=1", row("u0", "u1", KEY)),
        ] {
            assert_eq!(track(&bad).body["status"], 0, "{bad}");
        }
        let lost = track(&row("u0", "u1", "another"));
        assert_eq!((&lost.body["status"], lost.taken.len(), lost.rejected), (&json!(1), 0, 1));
        assert_eq!(Sample::new("/track", "data=[]").judge(judge).status, 400);
    }

    #[test]
    fn a_time_that_is_ahead_becomes_the_time_of_arrival() {
        let dedup_key = |time: i64| {
            let mut judgement = import(json!([with("time", json!(time))])).judge(judge);
            judgement.taken.remove(0).dedup_key
        };
        assert_eq!(dedup_key(NOW_MS + 3_000_000), dedup_key(NOW_MS));
        assert_eq!(dedup_key(NOW_MS / 1000), dedup_key(NOW_MS));
        assert_ne!(dedup_key(NOW_MS - 1), dedup_key(NOW_MS));
    }
}
