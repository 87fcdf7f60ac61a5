//! Turns messages into drafts. The generated messages stop here.
//!
//! Most messages take the short way through [`wire`].

use std::collections::HashMap;

use analytics_relay_providers::{
    Properties,
    event::JsonObject,
    properties::{PropertiesWriter, PropertyError, PropertyFault},
};
use prometheus_client::metrics::counter::Counter;
use prost::{DecodeError, Message};

use super::{
    fields::{asked_durability, time_of_event},
    refusal::said_shortly,
    wire,
};
use crate::{
    admission::{
        denied::Violation,
        draft::{BadProperties, Draft, DraftKind, More, View},
    },
    ingest::limits::PROPERTIES,
    proto::v1::{
        self, AliasRequest, EventContext, GroupRequest, IdentifyUserRequest, PropertyValue, TrackBatchItem,
        TrackEventRequest, ViewRequest, property_value::Value, track_batch_item::Item,
    },
    reasons::RefusalReason,
};

/// The draft of a `TrackEventRequest`. Counts those that take the long way, for which
/// a client that sends something new is the reason, or a field that `wire` lacks.
pub(super) fn read_track<'a>(message: &'a [u8], slowly: &Counter) -> Result<Draft<'a>, DecodeError> {
    match wire::track(message) {
        Some(draft) => Ok(draft),
        None => {
            slowly.inc();
            TrackEventRequest::decode(message).map(track_draft)
        }
    }
}

/// The draft of an `IdentifyUserRequest`.
pub(super) fn read_identify<'a>(message: &'a [u8], slowly: &Counter) -> Result<Draft<'a>, DecodeError> {
    match wire::identify(message) {
        Some(draft) => Ok(draft),
        None => {
            slowly.inc();
            IdentifyUserRequest::decode(message).map(identify_draft)
        }
    }
}

/// The draft of a batch's item.
pub(super) fn read_item<'a>(item: &'a [u8], slowly: &Counter) -> Result<Draft<'a>, Violation> {
    if let Some(draft) = wire::item(item) {
        return Ok(draft);
    }
    slowly.inc();
    match TrackBatchItem::decode(item).map(|item| item.item) {
        Ok(Some(item)) => Ok(item_draft(item)),
        Err(error) => Err(Violation {
            reason: RefusalReason::MessageMalformed,
            field: "item".into(),
            got: format!("bytes that cannot be decoded ({})", said_shortly(error)),
            want: "a protobuf message".into(),
        }),
        Ok(None) => Err(Violation {
            reason: RefusalReason::ItemMissing,
            field: "item".into(),
            got: "nothing that this relay knows".into(),
            want: "track, identify, page, screen, group or alias".into(),
        }),
    }
}

pub(super) fn item_draft(item: Item) -> Draft<'static> {
    match item {
        Item::Track(request) => track_draft(request),
        Item::Identify(request) => identify_draft(request),
        Item::Page(request) => view_draft(DraftKind::Page, request),
        Item::Screen(request) => view_draft(DraftKind::Screen, request),
        Item::Group(request) => group_draft(request),
        Item::Alias(request) => alias_draft(request),
    }
}

pub(super) fn track_draft(request: TrackEventRequest) -> Draft<'static> {
    draft(
        DraftKind::Track { event_name: request.event_name.into() },
        request.event_id,
        [request.user_id, request.anonymous_id],
        time_of_event(request.timestamp_ms, request.timestamp),
        read_properties(&request.properties, &request.properties_json),
        request.context,
        request.durability,
    )
}

pub(super) fn identify_draft(request: IdentifyUserRequest) -> Draft<'static> {
    draft(
        DraftKind::Identify,
        request.event_id,
        [request.user_id, request.anonymous_id],
        time_of_event(request.timestamp_ms, 0),
        read_properties(&request.properties, &request.properties_json),
        request.context,
        request.durability,
    )
}

fn view_draft(
    kind: impl FnOnce(Box<View<'static>>) -> DraftKind<'static>,
    request: ViewRequest,
) -> Draft<'static> {
    draft(
        kind(Box::new(View { name: request.name.into(), category: request.category.into() })),
        request.event_id,
        [request.user_id, request.anonymous_id],
        time_of_event(request.timestamp_ms, 0),
        read_properties(&request.properties, &request.properties_json),
        request.context,
        request.durability,
    )
}

fn group_draft(request: GroupRequest) -> Draft<'static> {
    draft(
        DraftKind::Group { group_id: request.group_id.into() },
        request.event_id,
        [request.user_id, request.anonymous_id],
        time_of_event(request.timestamp_ms, 0),
        read_properties(&request.properties, &request.properties_json),
        request.context,
        request.durability,
    )
}

fn alias_draft(request: AliasRequest) -> Draft<'static> {
    draft(
        DraftKind::Alias { previous_id: request.previous_id.into() },
        request.event_id,
        [request.user_id, String::new()],
        time_of_event(request.timestamp_ms, 0),
        Ok(Properties::empty()),
        request.context,
        request.durability,
    )
}

/// What all requests have.
fn draft(
    kind: DraftKind<'static>,
    event_id: String,
    [user_id, anonymous_id]: [String; 2],
    time_ms: Option<(&'static str, i64)>,
    properties: Result<Properties<'static>, BadProperties>,
    context: Option<EventContext>,
    durability: i32,
) -> Draft<'static> {
    let EventContext { ip, user_agent, json } = context.unwrap_or_default();
    let more = (!json.is_empty()).then(|| {
        let context = parse_properties(&json).map(JsonObject::from);
        More::of_context(context.map_err(|error| BadProperties::Faulty { field: "context.json", error }))
    });
    Draft {
        kind,
        event_id: event_id.into(),
        user_id: user_id.into(),
        anonymous_id: anonymous_id.into(),
        time_ms,
        ip: ip.into(),
        user_agent: user_agent.into(),
        properties,
        more,
        durability: asked_durability(durability),
    }
}

/// The properties, in whichever of the two fields they came.
fn read_properties(
    map: &HashMap<String, PropertyValue>,
    json: &[u8],
) -> Result<Properties<'static>, BadProperties> {
    const MAP: &str = "properties";
    const JSON: &str = "properties_json";
    match (map.is_empty(), json) {
        (_, []) => encode_properties(map).map_err(|error| BadProperties::Faulty { field: MAP, error }),
        (true, json) => parse_properties(json).map_err(|error| BadProperties::Faulty { field: JSON, error }),
        (false, _) => Err(BadProperties::Twice { field: JSON, other: MAP }),
    }
}

fn parse_properties(json: &[u8]) -> Result<Properties<'static>, PropertyError> {
    let text = std::str::from_utf8(json).map_err(|error| PropertyError {
        path: String::new(),
        fault: PropertyFault::NotJson(format!("{error}, want UTF-8")),
    })?;
    Properties::parse(text, &PROPERTIES).map(Properties::into_owned)
}

fn encode_properties(
    properties: &HashMap<String, PropertyValue>,
) -> Result<Properties<'static>, PropertyError> {
    let mut writer = PropertiesWriter::new(&PROPERTIES, 0);
    write_fields(&mut writer, properties)?;
    writer.finish()
}

fn write_fields(
    writer: &mut PropertiesWriter,
    fields: &HashMap<String, PropertyValue>,
) -> Result<(), PropertyError> {
    // In order of the names: a map has none, and the same event sent again
    // should become the same text.
    let mut fields: Vec<_> = fields.iter().collect();
    fields.sort_unstable_by_key(|(key, _)| *key);
    for (key, value) in fields {
        writer.key(key)?;
        write_value(writer, value).map_err(|error| error.under_key(key))?;
    }
    Ok(())
}

/// As deep as the writer allows: it refuses before the stack is in danger.
fn write_value(writer: &mut PropertiesWriter, value: &PropertyValue) -> Result<(), PropertyError> {
    match &value.value {
        None => writer.null(),
        Some(Value::StringValue(text)) => writer.string(text),
        Some(Value::NumberValue(number)) => writer.number(*number)?,
        Some(Value::BoolValue(boolean)) => writer.boolean(*boolean),
        Some(Value::IntegerValue(integer)) => writer.integer(*integer),
        Some(Value::ListValue(v1::PropertyList { values })) => {
            writer.begin_list()?;
            for (index, item) in values.iter().enumerate() {
                writer.item();
                write_value(writer, item).map_err(|error| error.under_index(index))?;
            }
            writer.end_list();
        }
        Some(Value::ObjectValue(v1::PropertyObject { fields })) => {
            writer.begin_object()?;
            write_fields(writer, fields)?;
            writer.end_object();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(value: Value) -> PropertyValue {
        PropertyValue { value: Some(value) }
    }

    fn object(
        fields: impl IntoIterator<Item = (&'static str, PropertyValue)>,
    ) -> HashMap<String, PropertyValue> {
        fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    #[test]
    fn properties_become_json_exactly() {
        let list =
            v1::PropertyList { values: vec![value(Value::NumberValue(1.5)), PropertyValue { value: None }] };
        let inner = v1::PropertyObject { fields: object([("x", value(Value::BoolValue(true)))]) };
        let properties = object([
            ("text", value(Value::StringValue("a\"b\u{0}é".into()))),
            ("whole", value(Value::NumberValue(3.0))),
            ("exact", value(Value::IntegerValue(9_007_199_254_740_993))),
            ("list", value(Value::ListValue(list))),
            ("object", value(Value::ObjectValue(inner))),
            ("null", PropertyValue { value: None }),
        ]);
        assert_eq!(
            encode_properties(&properties).unwrap().json(),
            "{\"exact\":9007199254740993,\"list\":[1.5,null],\"null\":null,\"object\":{\"x\":true},\
             \"text\":\"a\\\"b\\u0000é\",\"whole\":3}"
        );
    }

    #[test]
    fn a_refusal_names_the_place() {
        let bad = object([("price", value(Value::NumberValue(f64::NAN)))]);
        let list = v1::PropertyList {
            values: vec![
                PropertyValue { value: None },
                value(Value::ObjectValue(v1::PropertyObject { fields: bad })),
            ],
        };
        let error = encode_properties(&object([("items", value(Value::ListValue(list)))])).unwrap_err();
        assert_eq!(error.path, "items[1].price");
    }

    #[test]
    fn the_time_with_milliseconds_wins() {
        let time = |timestamp, timestamp_ms| {
            track_draft(TrackEventRequest { timestamp, timestamp_ms, ..Default::default() }).time_ms
        };
        assert_eq!(time(0, 0), None);
        assert_eq!(time(5, 0), Some(("timestamp", 5000)));
        assert_eq!(time(5, 7), Some(("timestamp_ms", 7)));
        assert_eq!(time(i64::MAX, 0), Some(("timestamp", i64::MAX)));
    }

    #[test]
    fn properties_come_as_a_map_or_as_json_and_not_as_both() {
        let json = br#" {"total": 19.50, "id": 9007199254740993} "#;
        let read = read_properties(&HashMap::new(), json).unwrap();
        assert_eq!(read.json(), r#"{"total": 19.50, "id": 9007199254740993}"#, "as it is");
        assert_eq!(read_properties(&HashMap::new(), b"").unwrap().json(), "{}");
        let map = object([("a", value(Value::BoolValue(true)))]);
        let twice = BadProperties::Twice { field: "properties_json", other: "properties" };
        assert_eq!(read_properties(&map, b"{}").unwrap_err(), twice);
    }

    #[test]
    fn json_that_is_no_object_is_refused() {
        for json in [&b"[1]"[..], b"{", b"nonsense", b"{} {}", b"{\"a\":NaN}", b"{\"a\":\"\xff\"}", b"\0"] {
            let bad = read_properties(&HashMap::new(), json).unwrap_err();
            assert!(
                matches!(
                    &bad,
                    BadProperties::Faulty { field: "properties_json", error }
                        if matches!(error.fault, PropertyFault::NotJson(_))
                ),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn an_item_that_is_neither_is_refused() {
        let violation = read_item(&[], &Counter::default()).unwrap_err();
        assert_eq!((violation.reason, violation.field.as_str()), (RefusalReason::ItemMissing, "item"));
        let violation = read_item(&[0x0A, 9, 1], &Counter::default()).unwrap_err();
        assert_eq!(violation.reason, RefusalReason::MessageMalformed);
    }
}
