//! What travels through the relay: an event, with an id and a time that never
//! change once it was accepted, so that providers can tell a retry from a new
//! event.

use std::{borrow::Cow, cell::RefCell, fmt, mem, net::IpAddr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use serde_json::value::RawValue;
use triomphe::{Arc, HeaderSlice};
use uuid::Uuid;

use crate::{
    Properties,
    json::{Json, Object},
    properties::Shape,
};

/// Most bytes of an event's name.
pub const NAME_BYTES_MAX: usize = 255;
/// Most bytes of a user id or an anonymous id.
pub const ID_BYTES_MAX: usize = 255;
/// Most bytes of a user agent.
pub const USER_AGENT_BYTES_MAX: usize = 1024;

/// Most bytes of an address as text.
const IP_BYTES_MAX: usize = 45;

/// One accepted event. Immutable, and shared: a clone is the same event.
///
/// All of it is one allocation, its texts one behind the other: a relay whose
/// provider is down holds little but events.
#[derive(Clone, PartialEq)]
pub struct Event(Arc<HeaderSlice<Head, str>>);

/// What stands before an event's texts.
#[derive(Clone, PartialEq)]
struct Head {
    time_ms: i64,
    accepted_ms: i64,
    /// Where each text but the last ends, in the order of [`Event::pack`].
    ends: [u16; 6],
    shape: Shape,
}

thread_local! {
    /// Where texts are put together, before it is known how long they are.
    static TEXTS: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What an event is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct EventParts<'a> {
    /// The caller's id, or the one assigned at admission.
    pub id: EventId<'a>,
    /// Track, with a name, or identify.
    pub kind: EventKind<'a>,
    /// The known user; never empty.
    pub user_id: Option<&'a str>,
    /// The device or browser of a user who is not known yet; never empty.
    pub anonymous_id: Option<&'a str>,
    /// When it happened: Unix time in milliseconds.
    pub time_ms: i64,
    /// When the relay accepted it: Unix time in milliseconds.
    pub accepted_ms: i64,
    /// Address of the user's device.
    pub ip: Option<IpAddr>,
    /// The user's User-Agent header; never empty.
    pub user_agent: Option<&'a str>,
    /// A track's properties or an identify's traits.
    pub properties: Properties<'a>,
}

/// What kind of event it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind<'a> {
    /// Something that a user did.
    Track {
        /// What happened: 1 to 255 bytes.
        name: &'a str,
    },
    /// What is known about a user.
    Identify,
}

impl Event {
    /// Bytes of memory that an event takes beside its texts: the head, before it the
    /// count of those who share the event, and what one of them has in hand.
    pub const HEAD_BYTES: usize = mem::size_of::<Head>() + mem::size_of::<usize>() + mem::size_of::<Self>();

    /// Packs the parts together.
    ///
    /// # Panics
    ///
    /// Panics if the texts, without the properties, have over 64 KiB, or if a track
    /// has no name: no front door lets in such an event.
    pub fn pack(parts: &EventParts<'_>) -> Self {
        let name = match parts.kind {
            EventKind::Track { name } => {
                assert!(!name.is_empty(), "a track has a name");
                name
            }
            EventKind::Identify => "",
        };
        let [user_id, anonymous_id, user_agent] =
            [parts.user_id, parts.anonymous_id, parts.user_agent].map(Option::unwrap_or_default);
        let ip = parts.ip.map(|ip| ip.to_string()).unwrap_or_default();
        TEXTS.with_borrow_mut(|texts| {
            texts.clear();
            let ends = [parts.id.as_str(), name, user_id, anonymous_id, user_agent, &ip].map(|text| {
                if !text.is_empty() {
                    texts.push_str(text);
                }
                u16::try_from(texts.len()).expect("an event is small")
            });
            texts.push_str(parts.properties.json());
            let (time_ms, accepted_ms, shape) = (parts.time_ms, parts.accepted_ms, parts.properties.shape());
            Self(Arc::from_header_and_str(Head { time_ms, accepted_ms, ends, shape }, texts))
        })
    }

    /// The parts, as they are in the event.
    pub fn parts(&self) -> EventParts<'_> {
        EventParts {
            id: self.id(),
            kind: self.kind(),
            user_id: self.user_id(),
            anonymous_id: self.anonymous_id(),
            time_ms: self.time_ms(),
            accepted_ms: self.accepted_ms(),
            ip: self.ip().and_then(|ip| ip.parse().ok()),
            user_agent: self.user_agent(),
            properties: self.properties(),
        }
    }

    /// The caller's id, or the one assigned at admission.
    pub fn id(&self) -> EventId<'_> {
        EventId(self.text(0).into())
    }

    /// Track, with a name, or identify.
    pub fn kind(&self) -> EventKind<'_> {
        self.name().map_or(EventKind::Identify, |name| EventKind::Track { name })
    }

    /// When it happened: Unix time in milliseconds.
    pub fn time_ms(&self) -> i64 {
        self.head().time_ms
    }

    /// When the relay accepted it: Unix time in milliseconds.
    pub fn accepted_ms(&self) -> i64 {
        self.head().accepted_ms
    }

    /// The name of a track.
    pub fn name(&self) -> Option<&str> {
        self.given(1)
    }

    /// The known user.
    pub fn user_id(&self) -> Option<&str> {
        self.given(2)
    }

    /// The device or browser of a user who is not known yet.
    pub fn anonymous_id(&self) -> Option<&str> {
        self.given(3)
    }

    /// The user's User-Agent header.
    pub fn user_agent(&self) -> Option<&str> {
        self.given(4)
    }

    /// Address of the user's device.
    pub fn ip(&self) -> Option<&str> {
        self.given(5)
    }

    /// A track's properties or an identify's traits.
    pub fn properties(&self) -> Properties<'_> {
        Properties::checked(&self.texts()[usize::from(self.head().ends[5])..], self.head().shape)
    }

    /// The event as it stands in files.
    pub fn to_json(&self) -> Vec<u8> {
        // Names, numbers and some escapes.
        const ENVELOPE: usize = 160;
        let mut out = Json::with_capacity(ENVELOPE + self.texts().len());
        let mut event = Object::begin(&mut out);
        event.string("id", self.text(0));
        match self.kind() {
            EventKind::Track { name } => {
                event.string("kind", "track");
                event.string("name", name);
            }
            EventKind::Identify => event.string("kind", "identify"),
        }
        event.optional("user_id", self.user_id());
        event.optional("anonymous_id", self.anonymous_id());
        event.integer("time_ms", self.time_ms());
        event.integer("accepted_ms", self.accepted_ms());
        if self.ip().is_some() || self.user_agent().is_some() {
            let mut context = event.object("context");
            context.optional("ip", self.ip());
            context.optional("user_agent", self.user_agent());
            context.end();
        }
        event.raw("properties", self.properties().json());
        event.end();
        out.into_bytes()
    }

    /// Bytes of memory that this event holds, for the limits of queues.
    pub fn memory_bytes(&self) -> usize {
        Self::HEAD_BYTES + self.texts().len()
    }

    /// About how many bytes this event takes in a vendor's body, for
    /// packing; what is packed by it is measured again once it is encoded.
    pub fn wire_bytes_estimate(&self) -> usize {
        // The vendors' own field names, an id and a time, each more than once; ids
        // may be sent twice.
        const ENVELOPE: usize = 420;
        let ends = &self.head().ends;
        ENVELOPE + self.texts().len() + usize::from(ends[4] - ends[1])
    }

    /// Whose event this is, as far as it is known: the key that order is kept
    /// for and that vendors throttle by.
    pub fn subject(&self) -> Option<&str> {
        self.user_id().or_else(|| self.anonymous_id())
    }

    /// True for an identify, whose order per user is kept.
    pub fn is_identify(&self) -> bool {
        let ends = &self.head().ends;
        ends[0] == ends[1]
    }

    fn head(&self) -> &Head {
        &self.0.header
    }

    fn texts(&self) -> &str {
        &self.0.slice
    }

    fn text(&self, place: usize) -> &str {
        let ends = &self.head().ends;
        let start = place.checked_sub(1).map_or(0, |before| ends[before]);
        &self.texts()[start.into()..ends[place].into()]
    }

    fn given(&self, place: usize) -> Option<&str> {
        Some(self.text(place)).filter(|text| !text.is_empty())
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().fmt(f)
    }
}

/// An event as it is read from files. Flat, and borrowing where it can: a relay whose
/// provider was down reads many.
#[derive(Deserialize)]
struct EventJson<'a> {
    #[serde(borrow)]
    id: Text<'a>,
    kind: KindJson,
    #[serde(borrow, default)]
    name: Option<Text<'a>>,
    #[serde(borrow, default)]
    user_id: Option<Text<'a>>,
    #[serde(borrow, default)]
    anonymous_id: Option<Text<'a>>,
    time_ms: i64,
    accepted_ms: i64,
    #[serde(borrow, default)]
    context: ContextJson<'a>,
    properties: Properties<'a>,
}

/// Serde borrows a text inside of an `Option` only if it has a type of its own.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    fn given(text: &Option<Self>) -> Option<&str> {
        text.as_ref().map(|text| &*text.0)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum KindJson {
    Track,
    Identify,
}

#[derive(Default, Deserialize)]
struct ContextJson<'a> {
    #[serde(default)]
    ip: Option<IpAddr>,
    #[serde(borrow, default)]
    user_agent: Option<Text<'a>>,
}

impl EventJson<'_> {
    /// Bytes of all texts but the properties.
    fn text_bytes(&self) -> usize {
        let given = [&self.name, &self.user_id, &self.anonymous_id, &self.context.user_agent];
        let given: usize = given.into_iter().flatten().map(|text| text.0.len()).sum();
        self.id.0.len() + given + self.context.ip.map_or(0, |_| IP_BYTES_MAX)
    }
}

/// Inside of other JSON: the same bytes as alone.
impl Serialize for Event {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let json: Box<RawValue> = serde_json::from_slice(&self.to_json()).map_err(ser::Error::custom)?;
        json.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = EventJson::deserialize(deserializer)?;
        let bytes = json.text_bytes();
        if bytes > u16::MAX.into() {
            return Err(de::Error::custom(format!("got {bytes} bytes of text, want at most {}", u16::MAX)));
        }
        Ok(Self::pack(&EventParts {
            id: EventId::new(json.id.0).map_err(de::Error::custom)?,
            kind: match json.kind {
                KindJson::Track => {
                    let name = Text::given(&json.name).filter(|name| !name.is_empty());
                    EventKind::Track { name: name.ok_or_else(|| de::Error::missing_field("name"))? }
                }
                KindJson::Identify => EventKind::Identify,
            },
            user_id: Text::given(&json.user_id),
            anonymous_id: Text::given(&json.anonymous_id),
            time_ms: json.time_ms,
            accepted_ms: json.accepted_ms,
            ip: json.context.ip,
            user_agent: Text::given(&json.context.user_agent),
            properties: json.properties,
        }))
    }
}

/// Identifies one event, everywhere and for ever: 1 to 100 printable ASCII
/// characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId<'a>(Cow<'a, str>);

/// An event id that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("want 1 to {max} printable ASCII characters", max = EventId::LEN_MAX)]
pub struct InvalidEventId;

impl<'a> EventId<'a> {
    /// Most characters of an id.
    pub const LEN_MAX: usize = 100;

    /// The relay's namespace for ids that a vendor does not take as they are.
    /// Fixed for ever: a new one would make retries look like new events.
    const NAMESPACE: Uuid = Uuid::from_u128(0x5b2f_7f0e_3c6d_4a53_9d0c_61a7_e4f2_8b19);

    /// Checks a caller's id.
    pub fn new(id: impl Into<Cow<'a, str>>) -> Result<Self, InvalidEventId> {
        let id = id.into();
        // To the end and not only to the first that is not, which is vectorised.
        let printable = id.bytes().fold(true, |all, byte| all & (b' '..=b'~').contains(&byte));
        if id.is_empty() || id.len() > Self::LEN_MAX || !printable {
            return Err(InvalidEventId);
        }
        Ok(Self(id))
    }

    /// A new id for a caller who gave none.
    pub fn assign() -> Self {
        Self(Uuid::now_v7().to_string().into())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id, for longer than what it stands in.
    pub fn into_owned(self) -> EventId<'static> {
        EventId(Cow::Owned(self.0.into_owned()))
    }

    /// A UUID made from this id: the same one each time, and legal at every
    /// vendor.
    pub fn namespaced(&self) -> Uuid {
        Uuid::new_v5(&Self::NAMESPACE, self.0.as_bytes())
    }
}

impl<'a> From<EventId<'a>> for Cow<'a, str> {
    fn from(id: EventId<'a>) -> Self {
        id.0
    }
}

impl fmt::Display for EventId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Events for the tests of mappings.
#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;

    pub(crate) fn parts<'a>(name: &'a str, properties: &'a str) -> EventParts<'a> {
        EventParts {
            id: EventId::new("id-1").unwrap(),
            kind: EventKind::Track { name },
            user_id: Some("user-1"),
            anonymous_id: None,
            time_ms: 1_767_225_600_000,
            accepted_ms: 1_767_225_600_456,
            ip: None,
            user_agent: None,
            properties: Properties::parse(properties).unwrap(),
        }
    }

    pub(crate) fn track(name: &str, properties: &str) -> Event {
        Event::pack(&parts(name, properties))
    }

    pub(crate) fn identify(traits: &str) -> Event {
        Event::pack(&EventParts { kind: EventKind::Identify, ..parts("", traits) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_is_one_to_a_hundred_printable_ascii_characters() {
        for id in ["x", "order 12/€".split('€').next().unwrap(), &"a".repeat(100)] {
            assert!(EventId::new(id).is_ok(), "{id}");
        }
        for id in ["", "tab\t", "é", "\u{7f}", &"a".repeat(101)] {
            assert_eq!(EventId::new(id), Err(InvalidEventId), "{id:?}");
        }
    }

    #[test]
    fn a_namespaced_id_never_changes() {
        let id = EventId::new("order-1").unwrap();
        assert_eq!(id.namespaced(), id.namespaced());
        // Pinned: a release that computes another one would turn every retry
        // across an upgrade into a duplicate.
        assert_eq!(id.namespaced().to_string(), "0f151271-dc28-56ea-b37d-35801c6761f7");
        assert_ne!(id.namespaced(), EventId::new("order-2").unwrap().namespaced());
    }

    #[test]
    fn an_event_of_a_file_that_is_too_large_is_an_error() {
        let event = tests_support::track("x", "{}");
        let json = serde_json::to_string(&event).unwrap();
        let large = json.replace("user-1", &"u".repeat(70_000));
        let error = serde_json::from_str::<Event>(&large).unwrap_err();
        assert!(error.to_string().contains("got 70005 bytes of text, want at most 65535"), "{error}");
    }

    #[test]
    fn a_track_of_a_file_without_a_name_is_an_error() {
        let json = serde_json::to_string(&tests_support::track("x", "{}")).unwrap();
        for (given, instead, want) in [
            (r#","name":"x""#, "", "missing field `name`"),
            (r#""name":"x""#, r#""name":"""#, "missing field `name`"),
            ("track", "unheard-of", "unknown variant `unheard-of`"),
        ] {
            let error = serde_json::from_str::<Event>(&json.replace(given, instead)).unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
        }
    }

    /// What stands in logs, dead letters and spill files of today is read for ever, and
    /// written as it is: another relay, older or newer, may read it.
    #[test]
    fn the_form_of_events_in_files_is_fixed() {
        let full = EventParts {
            id: EventId::new("order \"1\"").unwrap(),
            anonymous_id: Some("device\u{1}\n\u{e9}\u{1f600}"),
            ip: Some("2001:db8::1".parse().unwrap()),
            user_agent: Some("Browser/1.0"),
            ..tests_support::parts("Order\t/", r#"{"n":9007199254740993,"f":1e2,"s":"\u00e9"}"#)
        };
        let one =
            EventParts { user_id: None, ip: Some([10, 0, 0, 1].into()), ..tests_support::parts("x", "{}") };
        for (event, json) in [
            (
                Event::pack(&full),
                r#"{"id":"order \"1\"","kind":"track","name":"Order\t/","user_id":"user-1","anonymous_id":"device\u0001\né😀","time_ms":1767225600000,"accepted_ms":1767225600456,"context":{"ip":"2001:db8::1","user_agent":"Browser/1.0"},"properties":{"n":9007199254740993,"f":1e2,"s":"\u00e9"}}"#,
            ),
            (
                Event::pack(&one),
                r#"{"id":"id-1","kind":"track","name":"x","time_ms":1767225600000,"accepted_ms":1767225600456,"context":{"ip":"10.0.0.1"},"properties":{}}"#,
            ),
            (
                tests_support::identify(r#"{"plan":null}"#),
                r#"{"id":"id-1","kind":"identify","user_id":"user-1","time_ms":1767225600000,"accepted_ms":1767225600456,"properties":{"plan":null}}"#,
            ),
        ] {
            assert_eq!(String::from_utf8(event.to_json()).unwrap(), json);
            assert_eq!(serde_json::to_string(&event).unwrap(), json);
            assert_eq!(serde_json::from_str::<Event>(json).unwrap(), event, "{json}");
        }
    }

    #[test]
    fn an_event_survives_its_json_form() {
        let properties = r#"{"n":9007199254740993,"f":0.1,"s":"\u0000"}"#;
        let mut full = tests_support::parts("Order \"Placed\"", properties);
        full.ip = Some("203.0.113.9".parse().unwrap());
        full.user_agent = Some("Browser \"1.0\"");
        let full = Event::pack(&full);
        for event in [full, tests_support::identify("{}")] {
            let json = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event, "{json}");
            assert_eq!(serde_json::from_reader::<_, Event>(json.as_bytes()).unwrap(), event, "{json}");
            assert_eq!(String::from_utf8(event.to_json()).unwrap(), json);
        }
    }
}
