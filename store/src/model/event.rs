//! What an event is to a question.

use std::hash::Hasher;

use analytics_relay_providers::{Event, EventKind};
use siphasher::sip::SipHasher13;

use super::identity::Fact;

/// The track that says for how long a page was looked at.
pub const ENGAGEMENT: &str = "engagement";
/// The property of [`ENGAGEMENT`] with the seconds.
pub const ENGAGEMENT_SECONDS: &str = "seconds";
/// The property of any event with the same.
pub const TIME_ON_PAGE: &str = "time_on_page";
/// The name under which pages are counted.
pub const PAGEVIEW: &str = "pageview";

/// What an event is to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// A page or a screen was seen.
    View,
    /// Somebody is still there. Prolongs a session, ends no bounce.
    Ping,
    /// Somebody did something.
    Action,
    /// Something became known. Prolongs a session, ends no bounce.
    Silent,
}

impl Class {
    /// All, in the order of their numbers, which stand in files.
    pub const ALL: [Self; 4] = [Self::View, Self::Ping, Self::Action, Self::Silent];
}

/// An event's class, and the name under which it is counted.
pub fn what(event: &Event) -> (Class, &str) {
    match event.kind() {
        EventKind::Track { name: ENGAGEMENT } => (Class::Ping, ENGAGEMENT),
        EventKind::Track { name } => (Class::Action, name),
        EventKind::Page { .. } => (Class::View, PAGEVIEW),
        EventKind::Screen { .. } => (Class::View, "screen"),
        EventKind::Identify => (Class::Silent, "identify"),
        EventKind::Group { .. } => (Class::Silent, "group"),
        EventKind::Alias { .. } => (Class::Silent, "alias"),
        EventKind::Unknown { kind, .. } => (Class::Action, kind),
    }
}

/// The id that somebody had before, of an alias.
pub fn previous_id(event: &Event) -> Option<&str> {
    match event.kind() {
        EventKind::Alias { previous_id } => Some(previous_id),
        _ => None,
    }
}

/// The website or app that an event is of: what its key names, else the property
/// `website_id`, else none.
pub fn source_of(event: &Event) -> String {
    if let Some(source) = event.source() {
        return source.to_owned();
    }
    let properties = event.properties();
    if !properties.json().contains("\"website_id\"") {
        return String::new();
    }
    let object = analytics_relay_providers::event::JsonObject::from(properties);
    let entry = object.entries().into_iter().find(|(name, _)| name == "website_id");
    entry.and_then(|(_, value)| serde_json::from_str(value.get()).ok()).unwrap_or_default()
}

/// Makes keys of ids. They are secret, so that nobody makes two that collide, and those
/// of a device and of a user are never the same.
#[derive(Debug, Clone, Copy)]
pub struct Keys([u8; 16]);

impl Keys {
    /// By that secret.
    pub fn new(secret: [u8; 16]) -> Self {
        Self(secret)
    }

    /// Of a known user: odd.
    pub fn user(self, id: &str) -> u64 {
        self.hash(b'u', &[id]) | 1
    }

    /// Of a device or browser: even.
    pub fn anonymous(self, id: &str) -> u64 {
        self.hash(b'a', &[id]) & !1
    }

    /// Of an event, for telling that it was there.
    pub fn event(self, tenant: &str, id: &str) -> u64 {
        self.hash(b'e', &[tenant, id])
    }

    /// Of a fact about who is who, for telling that it is known.
    pub fn fact(self, tenant: i64, fact: Fact<'_>) -> u64 {
        let (tag, from, user) = match fact {
            Fact::User(user) => (b'U', user, None),
            Fact::Link { device, user } => (b'L', device, Some(user)),
            Fact::Alias { previous, user } => (b'A', previous, Some(user)),
        };
        let mut hasher = self.hasher(tag);
        hasher.write_i64(tenant);
        write_texts(&mut hasher, [from].into_iter().chain(user));
        hasher.finish()
    }

    /// Of an event's visitor before it is looked up who that is: the user, else the device.
    /// Zero for nobody.
    pub fn who(self, event: &Event) -> u64 {
        match (event.user_id(), event.anonymous_id()) {
            (Some(user), _) => self.user(user),
            (None, Some(device)) => self.anonymous(device),
            (None, None) => 0,
        }
    }

    /// Of what its session is found by: see [`SessionKey`].
    pub fn session(self, event: &Event) -> SessionKey {
        let device = event.anonymous_id().or(event.user_id());
        match (event.session_id(), device) {
            (Some(session), device) => {
                SessionKey(self.hash(b's', &[device.unwrap_or_default(), session]) & !1)
            }
            (None, Some(device)) => SessionKey(self.hash(b'g', &[device]) | 1),
            (None, None) => SessionKey::NONE,
        }
    }

    fn hash(self, tag: u8, texts: &[&str]) -> u64 {
        let mut hasher = self.hasher(tag);
        write_texts(&mut hasher, texts.iter().copied());
        // Zero says that there is none, 1 is no device's.
        hasher.finish().max(2)
    }

    fn hasher(self, tag: u8) -> SipHasher13 {
        let mut hasher = SipHasher13::new_with_key(&self.0);
        hasher.write_u8(tag);
        hasher
    }
}

fn write_texts<'t>(hasher: &mut SipHasher13, texts: impl Iterator<Item = &'t str>) {
    for text in texts {
        hasher.write(text.as_bytes());
        // No text has such a byte: where one ends is in the hash.
        hasher.write_u8(0xFF);
    }
}

/// By what the events of a session are found: those of one session id of one device, or,
/// where they have none, those of a device, which gaps of half an hour divide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey(pub u64);

impl SessionKey {
    /// Of an event without a session: nobody is named in it.
    pub const NONE: Self = Self(0);

    /// True if gaps divide what has this key.
    pub fn by_gap(self) -> bool {
        self.0 & 1 == 1
    }

    /// True if there is none.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }
}

/// The text of a JSON value: a string's own, anything else as it is written; `null` is the
/// lack of one.
pub fn shown(json: &str) -> Option<std::borrow::Cow<'_, str>> {
    match json.strip_prefix('"').and_then(|json| json.strip_suffix('"')) {
        _ if json == "null" => None,
        Some(plain) if !plain.contains('\\') => Some(plain.into()),
        // One that no text can hold, as half of a surrogate pair, stands for itself.
        Some(_) => Some(serde_json::from_str::<String>(json).map_or_else(|_| json.into(), Into::into)),
        None => Some(json.into()),
    }
}

/// For how long a page was looked at, from the JSON value of [`ENGAGEMENT_SECONDS`] or
/// [`TIME_ON_PAGE`]: milliseconds, a day at most.
pub fn looked_ms(seconds: &str) -> Option<u64> {
    let seconds: f64 = seconds.parse().ok()?;
    (0.0..=86_400.0).contains(&seconds).then(|| (seconds * 1_000.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_shown_as_its_text() {
        for (json, want) in [
            (r#""é""#, Some("é")),
            (r#""a\u0000\"""#, Some("a\0\"")),
            (r#""\ud800""#, Some(r#""\ud800""#)),
            ("1e2", Some("1e2")),
            ("[1,\"\"]", Some("[1,\"\"]")),
            ("\"\"", Some("")),
            ("null", None),
        ] {
            assert_eq!(shown(json).as_deref(), want, "{json}");
        }
        assert_eq!(["1.5", "-1", "1e9", "x", "\"3\""].map(looked_ms), [Some(1500), None, None, None, None]);
    }

    #[test]
    fn keys_tell_devices_from_users_and_sessions_of_two_devices_apart() {
        let keys = Keys::new([7; 16]);
        assert_eq!((keys.user("x") & 1, keys.anonymous("x") & 1), (1, 0));
        assert_ne!(keys.user("x"), Keys::new([8; 16]).user("x"));
        assert_ne!(keys.event("a", "bc"), keys.event("ab", "c"));
        let link = |device, user| keys.fact(1, Fact::Link { device, user });
        assert_ne!(link("a\0b", "c"), link("a", "b\0c"));
        assert_ne!(link("a", "b"), keys.fact(2, Fact::Link { device: "a", user: "b" }));
        assert_ne!(link("a", "b"), keys.fact(1, Fact::Alias { previous: "a", user: "b" }));
        let event = |json: &str| {
            let json = format!(r#"{{"id":"i","kind":"page","time_ms":1,"accepted_ms":1,{json}}}"#);
            Event::from_json(json.as_bytes()).unwrap()
        };
        let session = |json: &str| keys.session(&event(json));
        let [one, two, none, nobody, login] = [
            r#""anonymous_id":"a","session_id":"1""#,
            r#""anonymous_id":"b","session_id":"1""#,
            r#""anonymous_id":"a""#,
            r#""properties":{}"#,
            r#""anonymous_id":"a","session_id":"1","user_id":"u""#,
        ]
        .map(session);
        assert!(one != two && one == login && !one.by_gap() && none.by_gap() && nobody.is_none());
    }

    #[test]
    fn the_source_is_the_keys_or_the_website() {
        let source = |json: &str| {
            let json = format!(r#"{{"id":"i","kind":"page","time_ms":1,"accepted_ms":1,{json}}}"#);
            source_of(&Event::from_json(json.as_bytes()).unwrap())
        };
        assert_eq!(source(r#""source":"web","properties":{"website_id":"w"}"#), "web");
        assert_eq!(source(r#""properties":{"x":{"website_id":"no"},"website_id":"w"}"#), "w");
        assert_eq!(source(r#""properties":{"website_id":7}"#), "");
    }
}
