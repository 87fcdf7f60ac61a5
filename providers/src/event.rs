//! What travels through the relay: an event, with an id and a time that never
//! change once it was accepted, so that providers can tell a retry from a new
//! event.

use std::{fmt, mem, net::IpAddr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Properties;

/// Most bytes of an event's name.
pub const NAME_BYTES_MAX: usize = 255;
/// Most bytes of a user id or an anonymous id.
pub const ID_BYTES_MAX: usize = 255;
/// Most bytes of a user agent.
pub const USER_AGENT_BYTES_MAX: usize = 1024;

/// One accepted event. Immutable, and shared by all lanes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The caller's id, or the one assigned at admission.
    pub id: EventId,
    /// Track, with a name, or identify.
    #[serde(flatten)]
    pub kind: EventKind,
    /// The known user; never empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<Box<str>>,
    /// The device or browser of a user who is not known yet; never empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anonymous_id: Option<Box<str>>,
    /// When it happened: Unix time in milliseconds.
    pub time_ms: i64,
    /// When the relay accepted it: Unix time in milliseconds.
    pub accepted_ms: i64,
    /// Where it came from.
    #[serde(default, skip_serializing_if = "Context::is_empty")]
    pub context: Context,
    /// A track's properties or an identify's traits.
    pub properties: Properties,
}

/// What kind of event it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EventKind {
    /// Something that a user did.
    Track {
        /// What happened: 1 to 255 bytes.
        name: Box<str>,
    },
    /// What is known about a user.
    Identify,
}

/// Where an event came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// Address of the user's device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// The user's User-Agent header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<Box<str>>,
}

impl Context {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Event {
    /// Bytes of memory that this event holds, for the limits of queues.
    pub fn memory_bytes(&self) -> usize {
        mem::size_of::<Self>()
            + self.id.as_str().len()
            + self.name().map_or(0, str::len)
            + self.text_bytes()
            + self.properties.json().len()
    }

    /// About how many bytes this event takes in a vendor's body, for
    /// packing; what is packed by it is measured again once it is encoded.
    pub fn wire_bytes_estimate(&self) -> usize {
        // The vendors' own field names, an id and a time, each more than once.
        const ENVELOPE: usize = 420;
        ENVELOPE + self.name().map_or(0, str::len) + 2 * self.text_bytes() + self.properties.json().len()
    }

    /// The name of a track.
    pub fn name(&self) -> Option<&str> {
        match &self.kind {
            EventKind::Track { name } => Some(name),
            EventKind::Identify => None,
        }
    }

    /// Whose event this is, as far as it is known: the key that order is kept
    /// for and that vendors throttle by.
    pub fn subject(&self) -> Option<&str> {
        self.user_id.as_deref().or(self.anonymous_id.as_deref())
    }

    /// True for an identify, whose order per user is kept.
    pub fn is_identify(&self) -> bool {
        matches!(self.kind, EventKind::Identify)
    }

    fn text_bytes(&self) -> usize {
        let len = |text: &Option<Box<str>>| text.as_deref().map_or(0, str::len);
        len(&self.user_id) + len(&self.anonymous_id) + len(&self.context.user_agent)
    }
}

/// Identifies one event, everywhere and for ever: 1 to 100 printable ASCII
/// characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct EventId(Box<str>);

/// An event id that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("want 1 to {max} printable ASCII characters", max = EventId::LEN_MAX)]
pub struct InvalidEventId;

impl EventId {
    /// Most characters of an id.
    pub const LEN_MAX: usize = 100;

    /// The relay's namespace for ids that a vendor does not take as they are.
    /// Fixed for ever: a new one would make retries look like new events.
    const NAMESPACE: Uuid = Uuid::from_u128(0x5b2f_7f0e_3c6d_4a53_9d0c_61a7_e4f2_8b19);

    /// Checks a caller's id.
    pub fn new(id: impl Into<Box<str>>) -> Result<Self, InvalidEventId> {
        let id = id.into();
        let printable = id.bytes().all(|byte| (b' '..=b'~').contains(&byte));
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

    /// A UUID made from this id: the same one each time, and legal at every
    /// vendor.
    pub fn namespaced(&self) -> Uuid {
        Uuid::new_v5(&Self::NAMESPACE, self.0.as_bytes())
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for EventId {
    type Error = InvalidEventId;

    fn try_from(id: String) -> Result<Self, InvalidEventId> {
        Self::new(id)
    }
}

/// Events for the tests of mappings.
#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;

    pub(crate) fn track(name: &str, properties: &str) -> Event {
        Event {
            id: EventId::new("id-1").unwrap(),
            kind: EventKind::Track { name: name.into() },
            user_id: Some("user-1".into()),
            anonymous_id: None,
            time_ms: 1_767_225_600_000,
            accepted_ms: 1_767_225_600_456,
            context: Context::default(),
            properties: Properties::parse(properties).unwrap(),
        }
    }

    pub(crate) fn identify(traits: &str) -> Event {
        Event { kind: EventKind::Identify, ..track("", traits) }
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
    fn an_event_survives_its_json_form() {
        let properties = r#"{"n":9007199254740993,"f":0.1,"s":"\u0000"}"#;
        let mut event = tests_support::track("Order \"Placed\"", properties);
        event.context.ip = Some("203.0.113.9".parse().unwrap());
        for event in [event, tests_support::identify("{}")] {
            let json = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event, "{json}");
        }
    }
}
