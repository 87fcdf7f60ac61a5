//! Reads an event from its bytes straight into a draft: no map, no tree of
//! values, properties become JSON as they are read. It takes what clients write
//! and nothing else; everything that is unusual, and everything that breaks a
//! rule, is left to the generated messages, which know every rule of protobuf
//! and say what is wrong. So this is a short cut and never a second opinion:
//! whatever it returns, the long way would too.

use analytics_relay_providers::{Properties, event::JsonObject, properties::PropertiesWriter};
use bytes::Buf;
use prost::encoding::decode_varint;
use smallvec::SmallVec;

use super::fields::{asked_durability, time_of_event};
use crate::admission::draft::{Draft, DraftKind, More, View};
use crate::ingest::limits::PROPERTIES;

/// Not for this module: take the long way.
struct Unusual;

type Read<T> = Result<T, Unusual>;

/// The draft of a `TrackBatchItem`.
pub(super) fn item(bytes: &[u8]) -> Option<Draft<'_>> {
    let mut fields = Fields(bytes);
    match fields.next().ok()?? {
        _ if !fields.0.is_empty() => None,
        (1, Field::Bytes(bytes)) => track(bytes),
        (2, Field::Bytes(bytes)) => identify(bytes),
        (3, Field::Bytes(bytes)) => view(bytes, DraftKind::Page),
        (4, Field::Bytes(bytes)) => view(bytes, DraftKind::Screen),
        (5, Field::Bytes(bytes)) => group(bytes),
        (6, Field::Bytes(bytes)) => alias(bytes),
        _ => None,
    }
}

/// The draft of a `TrackEventRequest`.
pub(super) fn track(bytes: &[u8]) -> Option<Draft<'_>> {
    let mut event = Event::default();
    let place = |number| match number {
        1 => Some(Place::EventName),
        2 => Some(Place::UserId),
        3 => Some(Place::Properties),
        4 => Some(Place::Seconds),
        5 => Some(Place::EventId),
        6 => Some(Place::AnonymousId),
        7 => Some(Place::Context),
        8 => Some(Place::Millis),
        9 => Some(Place::Durability),
        10 => Some(Place::PropertiesJson),
        _ => None,
    };
    event.read(bytes, place).ok()?;
    event.draft(DraftKind::Track { event_name: event.event_name.into() }).ok()
}

/// The draft of an `IdentifyUserRequest`.
pub(super) fn identify(bytes: &[u8]) -> Option<Draft<'_>> {
    let mut event = Event::default();
    let place = |number| match number {
        1 => Some(Place::UserId),
        2 => Some(Place::Properties),
        3 => Some(Place::EventId),
        4 => Some(Place::AnonymousId),
        5 => Some(Place::Context),
        6 => Some(Place::Millis),
        7 => Some(Place::Durability),
        8 => Some(Place::PropertiesJson),
        _ => None,
    };
    event.read(bytes, place).ok()?;
    event.draft(DraftKind::Identify).ok()
}

/// The draft of a `ViewRequest`, of that kind.
#[cold]
fn view<'a>(bytes: &'a [u8], kind: impl FnOnce(Box<View<'a>>) -> DraftKind<'a>) -> Option<Draft<'a>> {
    let mut event = Event::default();
    let place = |number| match number {
        1 => Some(Place::EventName),
        2 => Some(Place::Second),
        3 => Some(Place::UserId),
        4 => Some(Place::AnonymousId),
        5 => Some(Place::Properties),
        6 => Some(Place::PropertiesJson),
        7 => Some(Place::EventId),
        8 => Some(Place::Context),
        9 => Some(Place::Millis),
        10 => Some(Place::Durability),
        _ => None,
    };
    event.read(bytes, place).ok()?;
    let view = View { name: event.event_name.into(), category: event.second.into() };
    event.draft(kind(Box::new(view))).ok()
}

/// The draft of a `GroupRequest`.
#[cold]
fn group(bytes: &[u8]) -> Option<Draft<'_>> {
    let mut event = Event::default();
    let place = |number| match number {
        1 => Some(Place::Second),
        2 => Some(Place::UserId),
        3 => Some(Place::AnonymousId),
        4 => Some(Place::Properties),
        5 => Some(Place::PropertiesJson),
        6 => Some(Place::EventId),
        7 => Some(Place::Context),
        8 => Some(Place::Millis),
        9 => Some(Place::Durability),
        _ => None,
    };
    event.read(bytes, place).ok()?;
    event.draft(DraftKind::Group { group_id: event.second.into() }).ok()
}

/// The draft of an `AliasRequest`.
#[cold]
fn alias(bytes: &[u8]) -> Option<Draft<'_>> {
    let mut event = Event::default();
    let place = |number| match number {
        1 => Some(Place::Second),
        2 => Some(Place::UserId),
        3 => Some(Place::EventId),
        4 => Some(Place::Context),
        5 => Some(Place::Millis),
        6 => Some(Place::Durability),
        _ => None,
    };
    event.read(bytes, place).ok()?;
    event.draft(DraftKind::Alias { previous_id: event.second.into() }).ok()
}

/// What a field of a request is.
enum Place {
    EventName,
    /// A category, a group's id, or an id until now.
    Second,
    UserId,
    EventId,
    AnonymousId,
    Properties,
    PropertiesJson,
    Seconds,
    Millis,
    Context,
    Durability,
}

/// Entries of a map: without an allocation for as many as most events have.
type Entries<'a> = SmallVec<[Entry<'a>; 16]>;

/// The parts of a request, where they stand.
#[derive(Default)]
struct Event<'a> {
    event_name: &'a str,
    second: &'a str,
    user_id: &'a str,
    event_id: &'a str,
    anonymous_id: &'a str,
    properties: Entries<'a>,
    properties_json: &'a [u8],
    seconds: i64,
    millis: i64,
    context: Option<Context<'a>>,
    durability: i32,
}

impl<'a> Event<'a> {
    fn read(&mut self, bytes: &'a [u8], place: impl Fn(u32) -> Option<Place>) -> Read<()> {
        let mut fields = Fields(bytes);
        while let Some((number, field)) = fields.next()? {
            match (place(number).ok_or(Unusual)?, field) {
                (Place::EventName, Field::Bytes(bytes)) => self.event_name = text(bytes)?,
                (Place::Second, Field::Bytes(bytes)) => self.second = text(bytes)?,
                (Place::UserId, Field::Bytes(bytes)) => self.user_id = text(bytes)?,
                (Place::EventId, Field::Bytes(bytes)) => self.event_id = text(bytes)?,
                (Place::AnonymousId, Field::Bytes(bytes)) => self.anonymous_id = text(bytes)?,
                (Place::Properties, Field::Bytes(bytes)) => self.properties.push(Entry::read(bytes)?),
                (Place::PropertiesJson, Field::Bytes(bytes)) => self.properties_json = bytes,
                (Place::Seconds, Field::Varint(number)) => self.seconds = number.cast_signed(),
                (Place::Millis, Field::Varint(number)) => self.millis = number.cast_signed(),
                // Two of them would have to be merged.
                (Place::Context, Field::Bytes(bytes)) if self.context.is_none() => {
                    self.context = Some(context(bytes)?);
                }
                #[expect(clippy::cast_possible_truncation, reason = "as protobuf cuts an enum")]
                (Place::Durability, Field::Varint(number)) => self.durability = number as i32,
                _ => return Err(Unusual),
            }
        }
        Ok(())
    }

    fn draft(&mut self, kind: DraftKind<'a>) -> Read<Draft<'a>> {
        let Context { ip, user_agent, json } = self.context.take().unwrap_or_default();
        let properties = match (self.properties.is_empty(), self.properties_json) {
            (_, []) => {
                // Names and values, quotes, colons and commas; numbers may take more.
                let bytes =
                    self.properties.iter().map(|entry| entry.name.len() + entry.value.len() + 8).sum();
                let mut writer = PropertiesWriter::new(&PROPERTIES, bytes);
                write_entries(&mut writer, &mut self.properties)?;
                writer.finish().map_err(|_| Unusual)?
            }
            (true, json) => Properties::parse(text(json)?, &PROPERTIES).map_err(|_| Unusual)?,
            (false, _) => return Err(Unusual),
        };
        Ok(Draft {
            kind,
            event_id: self.event_id.into(),
            user_id: self.user_id.into(),
            anonymous_id: self.anonymous_id.into(),
            time_ms: time_of_event(self.millis, self.seconds),
            ip: ip.into(),
            user_agent: user_agent.into(),
            properties: Ok(properties),
            more: json,
            durability: asked_durability(self.durability),
        })
    }
}

/// What an `EventContext` holds.
#[derive(Default)]
struct Context<'a> {
    ip: &'a str,
    user_agent: &'a str,
    json: Option<Box<More<'a>>>,
}

fn context(bytes: &[u8]) -> Read<Context<'_>> {
    let (mut fields, mut context) = (Fields(bytes), Context::default());
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(bytes)) => context.ip = text(bytes)?,
            (2, Field::Bytes(bytes)) => context.user_agent = text(bytes)?,
            // An empty one is none.
            (3, Field::Bytes(bytes @ [_, ..])) => {
                let json = JsonObject::parse(text(bytes)?, &PROPERTIES).map_err(|_| Unusual)?;
                context.json = Some(More::of_context(Ok(json)));
            }
            _ => return Err(Unusual),
        }
    }
    Ok(context)
}

/// One of a map's entries. That names and texts are UTF-8 is checked when all are
/// written.
struct Entry<'a> {
    /// The name's first eight bytes as a number, which sorts like the name and is
    /// quicker to compare.
    prefix: u64,
    name: &'a [u8],
    /// The bytes of the `PropertyValue`.
    value: &'a [u8],
}

impl<'a> Entry<'a> {
    fn read(bytes: &'a [u8]) -> Read<Self> {
        let (name, behind) = first_bytes(1, bytes)?;
        // No value is an empty one.
        let (value, end) = if behind.is_empty() { (behind, behind) } else { first_bytes(2, behind)? };
        if !end.is_empty() {
            return Err(Unusual);
        }
        let from_name = &bytes[bytes.len() - behind.len() - name.len()..];
        Ok(Self { prefix: prefix(from_name, name.len()), name, value })
    }

    fn sorts_by(&self) -> (u64, &'a [u8]) {
        (self.prefix, self.name)
    }
}

/// The first `length` bytes, eight at most, and zeros behind them.
fn prefix(bytes: &[u8], length: usize) -> u64 {
    let first = bytes.first_chunk().copied().unwrap_or_else(|| {
        let mut first = [0; 8];
        first[..bytes.len()].copy_from_slice(bytes);
        first
    });
    // Of eight or more there is nothing to be taken away.
    let behind = u64::MAX.checked_shr(8 * u32::try_from(length).unwrap_or(u32::MAX).min(8)).unwrap_or(0);
    u64::from_be_bytes(first) & !behind
}

/// In the order of the names, as the long way does.
fn write_entries(writer: &mut PropertiesWriter, entries: &mut [Entry<'_>]) -> Read<()> {
    entries.sort_unstable_by(|one, other| one.sorts_by().cmp(&other.sorts_by()));
    // Of two entries with one name the last would count.
    if entries.windows(2).any(|pair| pair[0].sorts_by() == pair[1].sorts_by()) {
        return Err(Unusual);
    }
    for Entry { name, value, .. } in entries.iter() {
        writer.key(name).map_err(|_| Unusual)?;
        write_value(writer, value)?;
    }
    Ok(())
}

/// As deep as the writer allows.
fn write_value(writer: &mut PropertiesWriter, bytes: &[u8]) -> Read<()> {
    let mut fields = Fields(bytes);
    let Some(field) = fields.next()? else {
        writer.null();
        return Ok(());
    };
    // Of two values the last would count, and two objects would be merged.
    if !fields.0.is_empty() {
        return Err(Unusual);
    }
    match field {
        (1, Field::Bytes(bytes)) => writer.string(bytes),
        (2, Field::Fixed64(bits)) => writer.number(f64::from_bits(bits)).map_err(|_| Unusual)?,
        (3, Field::Varint(number)) => writer.boolean(number != 0),
        (4, Field::Varint(number)) => writer.integer(number.cast_signed()),
        (5, Field::Bytes(bytes)) => {
            writer.begin_list().map_err(|_| Unusual)?;
            let mut items = Fields(bytes);
            while let Some((number, field)) = items.next()? {
                let (1, Field::Bytes(item)) = (number, field) else { return Err(Unusual) };
                writer.item();
                write_value(writer, item)?;
            }
            writer.end_list();
        }
        (6, Field::Bytes(bytes)) => {
            writer.begin_object().map_err(|_| Unusual)?;
            let (mut fields, mut entries) = (Fields(bytes), Entries::new());
            while let Some((number, field)) = fields.next()? {
                let (1, Field::Bytes(bytes)) = (number, field) else { return Err(Unusual) };
                entries.push(Entry::read(bytes)?);
            }
            write_entries(writer, &mut entries)?;
            writer.end_object();
        }
        _ => return Err(Unusual),
    }
    Ok(())
}

fn text(bytes: &[u8]) -> Read<&str> {
    std::str::from_utf8(bytes).map_err(|_| Unusual)
}

/// What a field holds.
enum Field<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message, one after the other. What is seldom has a function of
/// its own, so that the rest stays in registers.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The next field's number and what it holds; nothing at the end.
    #[inline(always)]
    fn next(&mut self) -> Read<Option<(u32, Field<'a>)>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = u32::try_from(self.varint()?).map_err(|_| Unusual)?;
        let field = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => Field::Fixed64(self.0.try_get_u64_le().map_err(|_| Unusual)?),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| Unusual)?;
                Field::Bytes(self.0.split_off(..length).ok_or(Unusual)?)
            }
            _ => return Err(Unusual),
        };
        Ok(Some((key >> 3, field)))
    }

    #[inline(always)]
    fn varint(&mut self) -> Read<u64> {
        let (number, rest) = match self.0 {
            // Most keys and lengths.
            [byte @ ..0x80, rest @ ..] => (u64::from(*byte), rest),
            _ => long_varint(self.0)?,
        };
        self.0 = rest;
        Ok(number)
    }
}

/// A number of more than one byte, and what is behind it.
#[inline(never)]
fn long_varint(mut bytes: &[u8]) -> Read<(u64, &[u8])> {
    let number = decode_varint(&mut bytes).map_err(|_| Unusual)?;
    Ok((number, bytes))
}

/// The bytes of the first field, which must be this one, below 16, and what is
/// behind it.
#[inline(always)]
fn first_bytes(number: u8, bytes: &[u8]) -> Read<(&[u8], &[u8])> {
    match bytes {
        [key, length @ ..0x80, rest @ ..] if *key == number << 3 | 2 => {
            rest.split_at_checked(usize::from(*length)).ok_or(Unusual)
        }
        _ => first_long_bytes(number, bytes),
    }
}

#[inline(never)]
fn first_long_bytes(number: u8, bytes: &[u8]) -> Read<(&[u8], &[u8])> {
    let mut fields = Fields(bytes);
    match fields.next()? {
        Some((found, Field::Bytes(bytes))) if found == u32::from(number) => Ok((bytes, fields.0)),
        _ => Err(Unusual),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{
        collection::{hash_map, vec},
        prelude::*,
    };
    use prost::Message;
    use prost_types::{FieldDescriptorProto, FileDescriptorSet, field_descriptor_proto::Type};

    use super::*;
    use crate::{
        ingest::grpc::draft::{identify_draft, item_draft, track_draft},
        proto::v1::{
            EventContext, IdentifyUserRequest, PropertyList, PropertyObject, PropertyValue, TrackBatchItem,
            TrackEventRequest, property_value::Value, track_batch_item::Item,
        },
    };

    fn value() -> impl Strategy<Value = PropertyValue> {
        let leaf = prop_oneof![
            Just(None),
            ".{0,12}".prop_map(|text| Some(Value::StringValue(text))),
            any::<f64>().prop_map(|number| Some(Value::NumberValue(number))),
            any::<i32>().prop_map(|number| Some(Value::NumberValue(f64::from(number)))),
            any::<bool>().prop_map(|boolean| Some(Value::BoolValue(boolean))),
            any::<i64>().prop_map(|integer| Some(Value::IntegerValue(integer))),
        ];
        leaf.prop_map(|value| PropertyValue { value }).prop_recursive(20, 64, 5, |inner| {
            let list = vec(inner.clone(), 0..5).prop_map(|values| Value::ListValue(PropertyList { values }));
            let object = hash_map(".{0,4}", inner, 0..5)
                .prop_map(|fields| Value::ObjectValue(PropertyObject { fields }));
            prop_oneof![list, object].prop_map(|value| PropertyValue { value: Some(value) })
        })
    }

    prop_compose! {
        fn any_track()(
            texts in prop::array::uniform6(".{0,20}"),
            properties in hash_map(".{0,6}", value(), 0..6),
            json in prop_oneof![4 => Just(String::new()), 1 => Just(r#"{"a":[1.50]}"#.to_owned()), 1 => ".{0,8}"],
            (timestamp, timestamp_ms, durability) in (prop_oneof![Just(0), any::<i64>()], any::<i64>(), any::<i32>()),
            context_json in prop_oneof![
                2 => Just(None),
                1 => Just(Some(String::new())),
                1 => Just(Some(r#"{"page":{"url":"/é"},"n":1.50}"#.to_owned())),
                1 => ".{0,8}".prop_map(Some)
            ],
        ) -> TrackEventRequest {
            let [event_name, user_id, event_id, anonymous_id, ip, user_agent] = texts;
            TrackEventRequest {
                event_name, user_id, event_id, anonymous_id, timestamp, timestamp_ms, durability,
                properties: if json.is_empty() { properties } else { [].into() },
                properties_json: json.into_bytes(),
                context: context_json.map(|json| EventContext { ip, user_agent, json: json.into_bytes() }),
            }
        }
    }

    fn check(short: Option<Draft>, long: Option<Draft>) -> bool {
        let Some(short) = short else { return false };
        let long = long.expect("what is read here is a message");
        assert_eq!(format!("{short:?}"), format!("{long:?}"));
        true
    }

    fn check_track(bytes: &[u8]) -> bool {
        check(track(bytes), TrackEventRequest::decode(bytes).ok().map(track_draft))
    }

    proptest! {
        /// The short way and the long way agree, on what clients write and on
        /// what nobody writes.
        #[test]
        fn what_it_returns_the_long_way_would_too(
            message in any_track(),
            other in any_track(),
            flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let whole = message.encode_to_vec();
            // The long way is for what is refused, and for damage.
            let draft = track_draft(message.clone());
            let is_refused = draft.properties.is_err() || draft.more.is_some_and(|more| more.context.is_some_and(|context| context.is_err()));
            prop_assert_eq!(check_track(&whole), !is_refused);
            // Two messages in one: to be merged field by field.
            check_track(&[whole.clone(), other.encode_to_vec()].concat());
            let mut damaged = whole;
            for (place, byte) in flips.iter().filter(|_| !message.encode_to_vec().is_empty()) {
                let place = place.index(damaged.len());
                damaged[place] = *byte;
            }
            check_track(&damaged);

            let TrackEventRequest { user_id, event_id, anonymous_id, properties, .. } = message.clone();
            let TrackEventRequest { context, timestamp_ms, durability, properties_json, .. } = message;
            let request = IdentifyUserRequest {
                user_id, event_id, anonymous_id, properties, context, timestamp_ms, durability, properties_json,
            };
            let bytes = request.encode_to_vec();
            prop_assert_eq!(check(identify(&bytes), Some(identify_draft(request))), !is_refused);
        }
    }

    /// The bytes of a field of this type with a value that is not its default, as the
    /// descriptor of the proto file has it.
    fn sample(field: &FieldDescriptorProto) -> Vec<u8> {
        let number = u32::try_from(field.number()).unwrap();
        let mut bytes = Vec::new();
        let is_json = matches!(field.name(), "properties_json" | "json");
        let text = if is_json { "{\"a\":1}" } else { "1" };
        match field.r#type() {
            Type::String => prost::encoding::string::encode(number, &text.to_owned(), &mut bytes),
            Type::Bytes => prost::encoding::bytes::encode(number, &text.as_bytes().to_vec(), &mut bytes),
            Type::Int64 => prost::encoding::int64::encode(number, &1, &mut bytes),
            Type::Enum => prost::encoding::int32::encode(number, &1, &mut bytes),
            Type::Double => prost::encoding::double::encode(number, &1.5, &mut bytes),
            Type::Bool => prost::encoding::bool::encode(number, &true, &mut bytes),
            Type::Message => {
                let inner = match field.type_name() {
                    ".analytics.v1.EventContext" => {
                        EventContext { ip: "1".into(), ..Default::default() }.encode_to_vec()
                    }
                    ".analytics.v1.PropertyList" => vec![0x0A, 0],
                    ".analytics.v1.PropertyObject" => Vec::new(),
                    // An entry of a map, with the name "a".
                    name if name.ends_with("Entry") => vec![0x0A, 1, b'a'],
                    name => panic!("a message that this test does not know: {name}"),
                };
                prost::encoding::bytes::encode(number, &inner, &mut bytes);
            }
            other => panic!("a type that this test does not know: {other:?}"),
        }
        bytes
    }

    /// A field that is added to the proto file and forgotten here would send every
    /// event that has it the long way, unseen.
    #[test]
    fn every_field_of_the_proto_file_is_read_here() {
        /// Those that are left to the long way, because hardly anybody sends them.
        const SLOW: [&str; 0] = [];
        let set = FileDescriptorSet::decode(crate::proto::v1::DESCRIPTOR_SET).unwrap();
        let messages: Vec<_> = set.file.iter().flat_map(|file| &file.message_type).collect();
        let fields = |name: &str| &messages.iter().find(|message| message.name() == name).unwrap().field;
        let track_of = |bytes: &[u8]| track(bytes).map(|draft| format!("{draft:?}"));
        let identify_of = |bytes: &[u8]| identify(bytes).map(|draft| format!("{draft:?}"));
        let property =
            |bytes: &[u8]| [&[0x0A, 1, b'a', 0x12, u8::try_from(bytes.len()).unwrap()], bytes].concat();
        let in_track = |number: u8, bytes: &[u8]| {
            [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()], bytes].concat()
        };
        let mut checked = 0;
        let mut check = |name: &str, read: &dyn Fn(&[u8]) -> Option<String>| {
            for field in fields(name) {
                let what = format!("{name}.{}", field.name());
                let draft = read(&sample(field));
                assert_eq!(draft.is_none(), SLOW.contains(&&*what), "{what}");
                assert!(draft.is_none() || draft != read(&[]), "{what} is read and means nothing");
                checked += 1;
            }
        };
        check("TrackEventRequest", &track_of);
        check("IdentifyUserRequest", &identify_of);
        check("EventContext", &|bytes| track_of(&in_track(7, bytes)));
        check("PropertyValue", &|bytes| track_of(&in_track(3, &property(bytes))));
        for (number, name) in
            [(3, "ViewRequest"), (4, "ViewRequest"), (5, "GroupRequest"), (6, "AliasRequest")]
        {
            check(name, &|bytes| {
                let bytes = in_track(number, bytes);
                let draft = item(&bytes).map(|draft| format!("{draft:?}"));
                let long = TrackBatchItem::decode(&*bytes).unwrap().item.map(item_draft);
                assert_eq!(draft, long.map(|draft| format!("{draft:?}")), "{name}");
                draft
            });
        }
        assert!(checked >= 62, "{checked}");
        for field in fields("TrackBatchItem") {
            assert!(item(&[u8::try_from(field.number() << 3 | 2).unwrap(), 0]).is_some(), "{}", field.name());
        }
    }

    /// A request's map entry: a name, and a whole number.
    fn number_entry(name: &str, number: i64) -> Vec<u8> {
        let value = PropertyValue { value: Some(Value::IntegerValue(number)) };
        let properties = [(name.to_owned(), value)].into();
        TrackEventRequest { properties, ..Default::default() }.encode_to_vec()
    }

    fn properties_of(entries: &[(&str, i64)]) -> Option<String> {
        let mut bytes = TrackEventRequest { event_name: "x".into(), ..Default::default() }.encode_to_vec();
        bytes.extend(entries.iter().flat_map(|(name, number)| number_entry(name, *number)));
        Some(track(&bytes)?.properties.unwrap().json().to_owned())
    }

    #[test]
    fn names_that_begin_alike_are_in_order_and_none_is_taken_twice() {
        let long = "n".repeat(200);
        let entries =
            [("item_name_b", 1), ("item_name", 2), (&*long, 3), ("b\0", 4), ("item_name_a", 5), ("b", 6)];
        let want =
            format!(r#"{{"b":6,"b\u0000":4,"item_name":2,"item_name_a":5,"item_name_b":1,"{long}":3}}"#);
        assert_eq!(properties_of(&entries), Some(want));
        // Of these the last would count, and the bytes behind their names differ.
        for name in ["b", "item_name", &long] {
            assert_eq!(properties_of(&[(name, 1), (name, 1 << 40)]), None, "{name}");
        }
    }

    /// The short way is the way of an ordinary event.
    #[test]
    fn it_takes_what_clients_write() {
        let text = |text: &str| PropertyValue { value: Some(Value::StringValue(text.into())) };
        let list =
            Value::ListValue(PropertyList { values: vec![text("book"), PropertyValue { value: None }] });
        let city = PropertyObject { fields: [("city".to_owned(), text("Turin"))].into() };
        let properties = [
            ("total", Value::NumberValue(19.5)),
            ("gift", Value::BoolValue(false)),
            ("count", Value::IntegerValue(-3)),
            ("items", list),
            ("shipping", Value::ObjectValue(city)),
        ]
        .map(|(key, value)| (key.to_owned(), PropertyValue { value: Some(value) }));
        let message = TrackEventRequest {
            event_name: "Order Placed".into(),
            user_id: "user-1".into(),
            event_id: "order-1".into(),
            timestamp_ms: 1_767_225_600_000,
            context: Some(EventContext {
                ip: "203.0.113.9".into(),
                user_agent: "curl".into(),
                json: br#"{"locale":"de"}"#.into(),
            }),
            properties: properties.into(),
            ..Default::default()
        };
        assert!(check_track(&message.encode_to_vec()));
        let json = TrackEventRequest {
            properties: [].into(),
            properties_json: br#"{"total": 19.50}"#.to_vec(),
            ..message.clone()
        };
        assert!(check_track(&json.encode_to_vec()));
        let in_batch = TrackBatchItem { item: Some(Item::Track(message)) }.encode_to_vec();
        assert!(item(&in_batch).is_some());
        assert!(item(&[]).is_none());
    }
}
