//! What travels through the relay: an event, with an id and a time that never
//! change once it was accepted, so that providers can tell a retry from a new
//! event.

use std::{borrow::Cow, cell::RefCell, fmt, mem, net::IpAddr, ops::Range};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use serde_json::value::RawValue;
use triomphe::{Arc, HeaderSlice};
use uuid::Uuid;

use crate::{
    NotFor, Properties,
    json::{Json, Object},
    properties::{Limits, PropertyError, Shape, entries},
};

/// Most bytes of an event's name.
pub const NAME_BYTES_MAX: usize = 255;
/// Most bytes of a user id or an anonymous id.
pub const ID_BYTES_MAX: usize = 255;
/// Most bytes of a user agent.
pub const USER_AGENT_BYTES_MAX: usize = 1024;

/// Most bytes of the second id of a group or an alias, of a category, and of the names of
/// a session, a source or a tenant.
pub const OTHER_ID_BYTES_MAX: usize = 255;

/// Before the name of a provider in an audience: the event's user does not consent to it.
const NO_CONSENT: char = '!';

/// Before the reason in an audience for which nobody else gets the event.
const OTHERS: char = '~';

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
    kind: Kind,
    /// Before the properties stands what most events do not have: see [`More`].
    has_more: bool,
}

/// The kinds of events, without what they hold: see [`EventKind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Something that a user did.
    Track,
    /// What is known about a user.
    Identify,
    /// A page of a website was seen.
    Page,
    /// A screen of an app was seen.
    Screen,
    /// A user belongs to a group.
    Group,
    /// A user was known under another id before.
    Alias,
    /// One that this version does not know.
    Unknown,
}

impl Kind {
    /// All, in the order of their indexes.
    pub const ALL: [Self; 7] =
        [Self::Track, Self::Identify, Self::Page, Self::Screen, Self::Group, Self::Alias, Self::Unknown];

    /// The kind's name in files and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Track => "track",
            Self::Identify => "identify",
            Self::Page => "page",
            Self::Screen => "screen",
            Self::Group => "group",
            Self::Alias => "alias",
            Self::Unknown => "unknown",
        }
    }

    /// Its place in [`Kind::ALL`].
    pub fn index(self) -> u8 {
        self as u8
    }

    /// The kind with that index.
    pub fn from_index(index: u8) -> Option<Self> {
        Self::ALL.get(usize::from(index)).copied()
    }
}

/// What most events do not have, so that they do not pay for it: texts one behind the
/// other, and before them how long each is, in hexadecimal digits.
struct More;

impl More {
    const DIGITS: usize = 6;
    const TEXTS: usize = 7;
    /// Most bytes of one of them.
    const TEXT_BYTES_MAX: usize = (1 << (4 * Self::DIGITS)) - 1;

    // The places of the texts.
    /// A group's id, an alias's previous id, or a page's or screen's category; of an
    /// unknown kind its whole JSON.
    const SECOND: usize = 0;
    const SESSION: usize = 1;
    const SOURCE: usize = 2;
    const TENANT: usize = 3;
    const AUDIENCE: usize = 4;
    const CONTEXT: usize = 5;
    const ENRICHED: usize = 6;

    fn write(texts: &mut String, more: &[&str; Self::TEXTS]) {
        for text in more {
            let bytes = text.len();
            assert!(bytes <= Self::TEXT_BYTES_MAX, "an event is small");
            for digit in (0..Self::DIGITS).rev() {
                let digit = u32::try_from(bytes >> (4 * digit) & 15).unwrap_or_default();
                texts.extend(char::from_digit(digit, 16));
            }
        }
        texts.extend(more.iter().copied());
    }

    /// Where a text stands in what begins with the lengths; behind the last one, where
    /// they all end.
    fn place(more: &str, place: usize) -> Range<usize> {
        let length = |place: usize| {
            let digits = more.get(place * Self::DIGITS..(place + 1) * Self::DIGITS);
            digits.and_then(|digits| usize::from_str_radix(digits, 16).ok()).unwrap_or_default()
        };
        let start = Self::TEXTS * Self::DIGITS + (0..place).map(length).sum::<usize>();
        let bytes = if place < Self::TEXTS { length(place) } else { 0 };
        start..start + bytes
    }
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
    /// What it is, and what only such events have.
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
    /// What was done with, or what is known: of an identify and a group the traits.
    pub properties: Properties<'a>,
    /// What most events do not have; nothing if all of it would be empty.
    pub more: Option<Box<MoreParts<'a>>>,
}

/// What most events do not have. Texts are never empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MoreParts<'a> {
    /// The id of the session that it belongs to.
    pub session_id: Option<&'a str>,
    /// The website or app that it comes from, as its key names it.
    pub source: Option<&'a str>,
    /// Whose it is, where a relay has more than one tenant.
    pub tenant: Option<&'a str>,
    /// The providers that get it.
    pub audience: Audience<'a>,
    /// What the caller said about where it happened, as sent: a JSON object.
    pub context: Option<JsonObject<'a>>,
    /// What the relay found out about it at admission: a JSON object.
    pub enriched: Option<JsonObject<'a>>,
}

impl MoreParts<'_> {
    /// Nothing of it.
    pub const EMPTY: Self = Self {
        session_id: None,
        source: None,
        tenant: None,
        audience: Audience::All,
        context: None,
        enriched: None,
    };

    /// For an event, if there is any of it.
    pub fn if_any(self) -> Option<Box<Self>> {
        (self != Self::EMPTY).then(|| Box::new(self))
    }
}

/// Which providers get an event. Names are those of [`Provider::name`](crate::Provider::name).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Audience<'a> {
    /// All.
    #[default]
    All,
    /// These, separated by commas, and no others, also none that is added later.
    Only(Cow<'a, str>),
    /// All but these, separated by commas.
    AllBut(Cow<'a, str>),
}

impl<'a> Audience<'a> {
    /// True if a provider of that name gets the event.
    pub fn includes(&self, provider: &str) -> bool {
        let named = |names: &str| names.split(',').any(|name| name == provider);
        match self {
            Self::All => true,
            Self::Only(names) => named(names),
            Self::AllBut(names) => !named(names),
        }
    }

    /// The same without these providers, which the event's user does not consent to. They
    /// are left out as any others are, which relays of every version understand, and
    /// named once more with a mark.
    pub fn without_consent_to(&self, providers: &[&str]) -> Audience<'static> {
        if providers.is_empty() {
            return self.borrowed().into_owned();
        }
        let marked = |names: Vec<&str>| {
            let marks = providers.iter().map(|provider| format!("{NO_CONSENT}{provider}"));
            names.into_iter().map(str::to_owned).chain(marks).collect::<Vec<_>>().join(",").into()
        };
        match self {
            Self::Only(only) => {
                let mut only = names_in(only);
                only.retain(|name| !providers.contains(name));
                Audience::Only(marked(only))
            }
            Self::All => Audience::AllBut(marked(providers.to_vec())),
            Self::AllBut(others) => {
                let mut others = names_in(others);
                others.extend(providers.iter().filter(|provider| self.includes(provider)));
                Audience::AllBut(marked(others))
            }
        }
    }

    /// Nobody, for that reason.
    pub fn nobody(why: NotFor) -> Audience<'static> {
        Self::only_for(&[], why)
    }

    /// These providers, and no others for that reason.
    pub fn only_for(providers: &[&str], why: NotFor) -> Audience<'static> {
        let mark = format!("{OTHERS}{}", why.name());
        let names = providers.iter().map(|provider| (*provider).to_owned()).chain([mark]);
        Audience::Only(names.collect::<Vec<_>>().join(",").into())
    }

    /// Why a provider does not get the event, if it does not.
    pub fn why_not(&self, provider: &str) -> Option<NotFor> {
        let names = match self {
            Self::All => return None,
            Self::Only(names) | Self::AllBut(names) => names,
        };
        let is_mark = |name: &str| name.strip_prefix(NO_CONSENT) == Some(provider);
        match self.includes(provider) {
            true => None,
            false if names.split(',').any(is_mark) => Some(NotFor::Consent),
            false => {
                let marked = names.split(',').find_map(|name| name.strip_prefix(OTHERS));
                let of_name = |name: &str| NotFor::ALL.into_iter().find(|why| why.name() == name);
                Some(marked.and_then(of_name).unwrap_or(NotFor::Audience))
            }
        }
    }

    /// The audience, for longer than what it stands in.
    pub fn into_owned(self) -> Audience<'static> {
        match self {
            Self::All => Audience::All,
            Self::Only(names) => Audience::Only(names.into_owned().into()),
            Self::AllBut(names) => Audience::AllBut(names.into_owned().into()),
        }
    }

    /// The same, as long as this is there.
    pub fn borrowed(&self) -> Audience<'_> {
        match self {
            Self::All => Audience::All,
            Self::Only(names) => Audience::Only((&**names).into()),
            Self::AllBut(names) => Audience::AllBut((&**names).into()),
        }
    }

    /// As one text; empty for all.
    fn packed(&self) -> Cow<'a, str> {
        match self {
            Self::All => "".into(),
            Self::Only(names) => format!("+{names}").into(),
            Self::AllBut(names) => format!("-{names}").into(),
        }
    }

    fn unpacked(text: &'a str) -> Self {
        match text.split_at_checked(1) {
            Some(("+", names)) => Self::Only(names.into()),
            Some((_, names)) => Self::AllBut(names.into()),
            None => Self::All,
        }
    }
}

fn names_in(names: &str) -> Vec<&str> {
    names.split(',').filter(|name| !name.is_empty()).collect()
}

/// What kind of event it is. Texts that are given are not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind<'a> {
    /// Something that a user did.
    Track {
        /// What happened: 1 to 255 bytes.
        name: &'a str,
    },
    /// What is known about a user.
    Identify,
    /// A page of a website was seen.
    Page {
        /// Its name.
        name: Option<&'a str>,
        /// What sort of page it is.
        category: Option<&'a str>,
    },
    /// A screen of an app was seen.
    Screen {
        /// Its name.
        name: Option<&'a str>,
        /// What sort of screen it is.
        category: Option<&'a str>,
    },
    /// A user belongs to a group, and what is known about it.
    Group {
        /// Which.
        group_id: &'a str,
    },
    /// A user was known under another id before.
    Alias {
        /// Which.
        previous_id: &'a str,
    },
    /// Of a newer relay's files: kept as it is, for a relay that knows it.
    Unknown {
        /// The kind's name there.
        kind: &'a str,
        /// The whole event, as it stood in the file.
        json: &'a str,
    },
}

impl EventKind<'_> {
    /// The kind's name in files and logs.
    pub fn name(&self) -> &str {
        match self {
            Self::Track { .. } => Kind::Track.name(),
            Self::Identify => Kind::Identify.name(),
            Self::Page { .. } => Kind::Page.name(),
            Self::Screen { .. } => Kind::Screen.name(),
            Self::Group { .. } => Kind::Group.name(),
            Self::Alias { .. } => Kind::Alias.name(),
            Self::Unknown { kind, .. } => kind,
        }
    }
}

/// A JSON object that was checked and is relayed as it is.
#[derive(Debug, Clone)]
pub struct JsonObject<'a> {
    json: Cow<'a, str>,
    /// Known of what was parsed, and not of what stands in an event.
    may_have_red_key: bool,
}

impl PartialEq for JsonObject<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.json == other.json
    }
}

impl<'a> JsonObject<'a> {
    /// Checks an object by a front door's limits; white space around it is left out.
    pub fn parse(json: &'a str, limits: &Limits) -> Result<Self, PropertyError> {
        Properties::parse(json, limits).map(Self::from)
    }

    /// What the relay itself wrote, and does not check.
    pub fn of_relay(json: impl Into<Cow<'a, str>>) -> Self {
        Self { json: json.into(), may_have_red_key: false }
    }

    /// What was checked before.
    fn checked(json: &'a str) -> Self {
        Self { json: json.into(), may_have_red_key: true }
    }

    /// False if no name at any level is one of [`RED_KEYS`](crate::pii::RED_KEYS).
    pub fn may_have_red_key(&self) -> bool {
        self.may_have_red_key
    }

    /// The object's names and values at the top level, values as JSON text.
    pub fn entries(&self) -> Vec<(String, &RawValue)> {
        entries(self.json())
    }

    /// The same object, as long as this one is there.
    pub fn borrowed(&self) -> JsonObject<'_> {
        JsonObject { json: self.json().into(), ..*self }
    }

    /// The object, for longer than what it stands in.
    pub fn into_owned(self) -> JsonObject<'static> {
        JsonObject { json: self.json.into_owned().into(), ..self }
    }

    /// The object as JSON, braces included.
    pub fn json(&self) -> &str {
        &self.json
    }
}

impl<'a> From<Properties<'a>> for JsonObject<'a> {
    fn from(object: Properties<'a>) -> Self {
        let may_have_red_key = object.shape().has_red_key();
        Self { json: object.into_json(), may_have_red_key }
    }
}

impl Event {
    /// Bytes of memory that an event takes beside its texts: the head, before it the
    /// count of those who share the event, and what one of them has in hand.
    pub const HEAD_BYTES: usize = mem::size_of::<Head>() + mem::size_of::<usize>() + mem::size_of::<Self>();

    /// Packs the parts together.
    ///
    /// # Panics
    ///
    /// Panics if a text has over 64 KiB, or JSON over 16 MiB, or if what a kind must have
    /// is empty: no front door lets in such an event.
    pub fn pack(parts: &EventParts<'_>) -> Self {
        let (kind, name, second) = unpack_kind(parts.kind);
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
            let has_more = !second.is_empty() || parts.more.is_some();
            if has_more {
                write_more(texts, second, parts.more.as_deref().unwrap_or(&MoreParts::EMPTY));
            }
            texts.push_str(parts.properties.json());
            let (time_ms, accepted_ms, shape) = (parts.time_ms, parts.accepted_ms, parts.properties.shape());
            Self(Arc::from_header_and_str(Head { time_ms, accepted_ms, ends, shape, kind, has_more }, texts))
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
            more: self.more_parts(),
        }
    }

    fn more_parts(&self) -> Option<Box<MoreParts<'_>>> {
        if !self.head().has_more {
            return None;
        }
        let more = MoreParts {
            session_id: self.session_id(),
            source: self.source(),
            tenant: self.tenant(),
            audience: self.audience(),
            context: self.context(),
            enriched: self.enriched(),
        };
        more.if_any()
    }

    /// The caller's id, or the one assigned at admission.
    pub fn id(&self) -> EventId<'_> {
        EventId(self.text(0).into())
    }

    /// Its kind, and what only such events have.
    #[inline]
    pub fn kind(&self) -> EventKind<'_> {
        match self.head().kind {
            Kind::Track => EventKind::Track { name: self.text(1) },
            Kind::Identify => EventKind::Identify,
            _ => self.seldom_kind(),
        }
    }

    #[cold]
    fn seldom_kind(&self) -> EventKind<'_> {
        let second = || self.more(More::SECOND);
        match self.head().kind {
            Kind::Track => EventKind::Track { name: self.text(1) },
            Kind::Identify => EventKind::Identify,
            Kind::Page => EventKind::Page { name: self.given(1), category: second() },
            Kind::Screen => EventKind::Screen { name: self.given(1), category: second() },
            Kind::Group => EventKind::Group { group_id: second().unwrap_or_default() },
            Kind::Alias => EventKind::Alias { previous_id: second().unwrap_or_default() },
            Kind::Unknown => EventKind::Unknown { kind: self.text(1), json: second().unwrap_or_default() },
        }
    }

    /// When it happened: Unix time in milliseconds.
    pub fn time_ms(&self) -> i64 {
        self.head().time_ms
    }

    /// When the relay accepted it: Unix time in milliseconds.
    pub fn accepted_ms(&self) -> i64 {
        self.head().accepted_ms
    }

    /// The name of a track, and of a page or screen that has one.
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

    /// What was done with, or what is known: of an identify and a group the traits.
    #[inline]
    pub fn properties(&self) -> Properties<'_> {
        let more = if self.head().has_more { self.more_bytes() } else { 0 };
        let start = usize::from(self.head().ends[5]) + more;
        Properties::checked(&self.texts()[start..], self.head().shape)
    }

    /// Bytes of what most events do not have.
    #[cold]
    fn more_bytes(&self) -> usize {
        More::place(&self.texts()[usize::from(self.head().ends[5])..], More::TEXTS).start
    }

    /// The id of the session that it belongs to.
    pub fn session_id(&self) -> Option<&str> {
        self.more(More::SESSION)
    }

    /// The website or app that it comes from, as its key names it.
    pub fn source(&self) -> Option<&str> {
        self.more(More::SOURCE)
    }

    /// Whose it is, where a relay has more than one tenant.
    pub fn tenant(&self) -> Option<&str> {
        self.more(More::TENANT)
    }

    /// True if a provider of that name gets it, as far as its caller has a say.
    #[inline]
    pub fn is_for(&self, provider: &str) -> bool {
        !self.head().has_more || self.audience().includes(provider)
    }

    /// Why a provider of that name does not get it, as far as its caller and its user have
    /// a say.
    #[inline]
    pub fn why_not_for(&self, provider: &str) -> Option<NotFor> {
        if self.head().has_more { self.audience().why_not(provider) } else { None }
    }

    /// The providers that get it.
    pub fn audience(&self) -> Audience<'_> {
        Audience::unpacked(self.more(More::AUDIENCE).unwrap_or_default())
    }

    /// What the caller said about where it happened.
    pub fn context(&self) -> Option<JsonObject<'_>> {
        self.more(More::CONTEXT).map(JsonObject::checked)
    }

    /// The text of [`Event::context`].
    pub(crate) fn context_json(&self) -> Option<&str> {
        self.more(More::CONTEXT)
    }

    /// True if it has nothing of what most events do not have: no context, no session.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        !self.head().has_more
    }

    /// The text of [`Event::enriched`].
    pub(crate) fn enriched_json(&self) -> Option<&str> {
        self.more(More::ENRICHED)
    }

    /// What the relay found out about it at admission.
    pub fn enriched(&self) -> Option<JsonObject<'_>> {
        self.more(More::ENRICHED).map(JsonObject::checked)
    }

    /// The event as it stands in files.
    pub fn to_json(&self) -> Vec<u8> {
        // Names, numbers and some escapes.
        const ENVELOPE: usize = 160;
        let kind = self.kind();
        if let EventKind::Unknown { json, .. } = kind {
            return json.as_bytes().to_vec();
        }
        let mut out = Json::with_capacity(ENVELOPE + self.texts().len());
        let mut event = Object::begin(&mut out);
        event.string("id", self.text(0));
        event.string("kind", kind.name());
        event.optional("name", self.name());
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
        if self.head().has_more {
            self.write_more_json(&mut event, kind);
        }
        event.raw("properties", self.properties().json());
        event.end();
        out.into_bytes()
    }

    fn write_more_json(&self, event: &mut Object<'_>, kind: EventKind<'_>) {
        match kind {
            EventKind::Page { category, .. } | EventKind::Screen { category, .. } => {
                event.optional("category", category);
            }
            EventKind::Group { group_id } => event.string("group_id", group_id),
            EventKind::Alias { previous_id } => event.string("previous_id", previous_id),
            EventKind::Track { .. } | EventKind::Identify | EventKind::Unknown { .. } => {}
        }
        event.optional("session_id", self.session_id());
        event.optional("source", self.source());
        event.optional("tenant", self.tenant());
        match self.audience() {
            Audience::All => {}
            Audience::Only(names) => event.string("only", &names),
            Audience::AllBut(names) => event.string("all_but", &names),
        }
        if let Some(context) = self.context() {
            event.raw("sent_context", context.json());
        }
        if let Some(enriched) = self.enriched() {
            event.raw("enriched", enriched.json());
        }
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
    #[inline]
    pub fn subject(&self) -> Option<&str> {
        self.user_id().or_else(|| self.anonymous_id())
    }

    /// Its kind alone, which costs less to ask for.
    #[inline]
    pub fn kind_alone(&self) -> Kind {
        self.head().kind
    }

    /// Whose events of such kinds must reach a provider in their order: the user of an
    /// identify or an alias, the group of a group. Nothing for other events.
    #[inline]
    pub fn order_key(&self) -> Option<&str> {
        match self.head().kind {
            Kind::Track | Kind::Page | Kind::Screen | Kind::Unknown => None,
            Kind::Identify | Kind::Alias => self.subject(),
            Kind::Group => self.more(More::SECOND),
        }
    }

    /// True for an identify.
    pub fn is_identify(&self) -> bool {
        self.head().kind == Kind::Identify
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

    /// One of the texts that most events do not have.
    #[inline]
    fn more(&self, place: usize) -> Option<&str> {
        if self.head().has_more { self.text_of_more(place) } else { None }
    }

    #[cold]
    fn text_of_more(&self, place: usize) -> Option<&str> {
        let more = &self.texts()[usize::from(self.head().ends[5])..];
        more.get(More::place(more, place)).filter(|text| !text.is_empty())
    }
}

/// A kind's tag, name and second text.
fn unpack_kind(kind: EventKind<'_>) -> (Kind, &str, &str) {
    let (tag, name, second) = match kind {
        EventKind::Track { name } => {
            assert!(!name.is_empty(), "a track has a name");
            (Kind::Track, name, "")
        }
        EventKind::Identify => (Kind::Identify, "", ""),
        EventKind::Page { name, category } => {
            (Kind::Page, name.unwrap_or_default(), category.unwrap_or_default())
        }
        EventKind::Screen { name, category } => {
            (Kind::Screen, name.unwrap_or_default(), category.unwrap_or_default())
        }
        EventKind::Group { group_id } => (Kind::Group, "", group_id),
        EventKind::Alias { previous_id } => (Kind::Alias, "", previous_id),
        EventKind::Unknown { kind, json } => (Kind::Unknown, kind, json),
    };
    let has_second = !second.is_empty();
    assert!(has_second || !matches!(tag, Kind::Group | Kind::Alias), "a {tag:?} has a second id");
    (tag, name, second)
}

#[cold]
fn write_more(texts: &mut String, second: &str, more: &MoreParts<'_>) {
    let [session, source, tenant] =
        [more.session_id, more.source, more.tenant].map(Option::unwrap_or_default);
    let audience = more.audience.packed();
    let [context, enriched] =
        [&more.context, &more.enriched].map(|object| object.as_ref().map_or("", JsonObject::json));
    More::write(texts, &[second, session, source, tenant, &audience, context, enriched]);
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().fmt(f)
    }
}

/// An event as it is read from files. Flat, and borrowing where it can: a relay whose
/// provider was down reads many. What is unheard of is passed over, as a newer relay
/// may have written it.
#[derive(Deserialize)]
struct EventJson<'a> {
    #[serde(borrow)]
    id: Text<'a>,
    #[serde(borrow)]
    kind: Text<'a>,
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
    #[serde(borrow, default)]
    category: Option<Text<'a>>,
    #[serde(borrow, default)]
    group_id: Option<Text<'a>>,
    #[serde(borrow, default)]
    previous_id: Option<Text<'a>>,
    #[serde(borrow, default)]
    session_id: Option<Text<'a>>,
    #[serde(borrow, default)]
    source: Option<Text<'a>>,
    #[serde(borrow, default)]
    tenant: Option<Text<'a>>,
    #[serde(borrow, default)]
    only: Option<Text<'a>>,
    #[serde(borrow, default)]
    all_but: Option<Text<'a>>,
    #[serde(default)]
    sent_context: Option<Properties<'a>>,
    #[serde(default)]
    enriched: Option<Properties<'a>>,
    #[serde(default = "Properties::empty")]
    properties: Properties<'a>,
}

/// Serde borrows a text inside of an `Option` only if it has a type of its own.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    fn given(text: &Option<Self>) -> Option<&str> {
        text.as_ref().map(|text| &*text.0).filter(|text| !text.is_empty())
    }
}

#[derive(Default, Deserialize)]
struct ContextJson<'a> {
    #[serde(default)]
    ip: Option<IpAddr>,
    #[serde(borrow, default)]
    user_agent: Option<Text<'a>>,
}

impl EventJson<'_> {
    /// The event; of a kind that is not known it keeps its whole JSON, which this is.
    fn event<E: de::Error>(self, json: &str) -> Result<Event, E> {
        let bytes = self.text_bytes();
        if bytes > u16::MAX.into() || json.len() > More::TEXT_BYTES_MAX {
            return Err(E::custom(format!(
                "got {bytes} bytes of text and {} of JSON, want at most {} and {}",
                json.len(),
                u16::MAX,
                More::TEXT_BYTES_MAX
            )));
        }
        let audience = match (&self.only, &self.all_but) {
            // Of no name too: it is for nobody, and must not become one for all.
            (Some(names), _) => Audience::Only((&*names.0).into()),
            (None, Some(names)) => Audience::AllBut((&*names.0).into()),
            (None, None) => Audience::All,
        };
        Ok(Event::pack(&EventParts {
            id: EventId::new(&*self.id.0).map_err(E::custom)?,
            kind: self.kind(json)?,
            user_id: Text::given(&self.user_id),
            anonymous_id: Text::given(&self.anonymous_id),
            time_ms: self.time_ms,
            accepted_ms: self.accepted_ms,
            ip: self.context.ip,
            user_agent: Text::given(&self.context.user_agent),
            properties: self.properties.borrowed(),
            more: MoreParts {
                session_id: Text::given(&self.session_id),
                source: Text::given(&self.source),
                tenant: Text::given(&self.tenant),
                audience,
                context: self.sent_context.as_ref().map(|context| context.borrowed().into()),
                enriched: self.enriched.as_ref().map(|enriched| enriched.borrowed().into()),
            }
            .if_any(),
        }))
    }

    fn kind<'a, E: de::Error>(&'a self, json: &'a str) -> Result<EventKind<'a>, E> {
        fn must<'a, E: de::Error>(text: &'a Option<Text<'_>>, field: &'static str) -> Result<&'a str, E> {
            Text::given(text).ok_or_else(|| E::missing_field(field))
        }
        let (name, category) = (Text::given(&self.name), Text::given(&self.category));
        Ok(match &*self.kind.0 {
            "track" => EventKind::Track { name: must(&self.name, "name")? },
            "identify" => EventKind::Identify,
            "page" => EventKind::Page { name, category },
            "screen" => EventKind::Screen { name, category },
            "group" => EventKind::Group { group_id: must(&self.group_id, "group_id")? },
            "alias" => EventKind::Alias { previous_id: must(&self.previous_id, "previous_id")? },
            kind => EventKind::Unknown { kind, json },
        })
    }

    /// Bytes of all texts that stand before the JSON.
    fn text_bytes(&self) -> usize {
        let given = [&self.name, &self.user_id, &self.anonymous_id, &self.context.user_agent];
        let given: usize = given.into_iter().flatten().map(|text| text.0.len()).sum();
        self.id.0.len() + self.kind.0.len() + given + self.context.ip.map_or(0, |_| IP_BYTES_MAX)
    }
}

impl Event {
    /// Reads an event as it stands in files. The limits of front doors are not held
    /// against it: what was accepted once is no damage. White space around it is none
    /// of its own.
    pub fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        let text = std::str::from_utf8(json).map_err(de::Error::custom)?;
        serde_json::from_str::<EventJson<'_>>(text)?.event(text.trim())
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
        let json = Box::<RawValue>::deserialize(deserializer)?;
        let event: EventJson<'_> = serde_json::from_str(json.get()).map_err(de::Error::custom)?;
        event.event(json.get())
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

    /// The same for a second record that a vendor gets of the event.
    pub(crate) fn namespaced_as(&self, record: &str) -> Uuid {
        Uuid::new_v5(&Self::NAMESPACE, format!("{}:{record}", self.0).as_bytes())
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
            properties: Properties::parse(properties, &Limits::DEFAULT).unwrap(),
            more: None,
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
        assert!(error.to_string().contains("got 70010 bytes of text"), "{error}");
    }

    #[test]
    fn a_track_of_a_file_without_a_name_is_an_error() {
        let json = serde_json::to_string(&tests_support::track("x", "{}")).unwrap();
        for (given, instead, want) in [
            (r#","name":"x""#, "", "missing field `name`"),
            (r#""name":"x""#, r#""name":"""#, "missing field `name`"),
            ("track", "group", "missing field `group_id`"),
            ("track", "alias", "missing field `previous_id`"),
        ] {
            let error = serde_json::from_str::<Event>(&json.replace(given, instead)).unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
        }
    }

    /// A relay that is older than what wrote the file keeps every byte of it.
    #[test]
    fn a_kind_that_is_not_known_is_kept_as_it_is() {
        let json = r#"{ "id":"id-1", "kind":"purchase","user_id":"u","time_ms":1,"accepted_ms":2,
            "basket":[{"sku":"é\u0000"}], "properties":{"a":1e2} }"#;
        let event = Event::from_json(json.as_bytes()).unwrap();
        assert_eq!(event.kind(), EventKind::Unknown { kind: "purchase", json });
        assert_eq!((event.kind_alone(), event.user_id(), event.time_ms()), (Kind::Unknown, Some("u"), 1));
        assert_eq!(event.to_json(), json.as_bytes());
        assert_eq!(Event::pack(&event.parts()), event);
        // In a dead letter, too, whatever is around it.
        let letter = format!(r#"{{"event": {json} ,"more":1}}"#);
        let read: std::collections::HashMap<String, serde_json::Value> =
            serde_json::from_str(&letter).unwrap();
        assert_eq!(serde_json::from_value::<Event>(read["event"].clone()).unwrap().id(), event.id());
        assert!(Event::from_json(br#"{"id":"x","kind":"purchase"}"#).is_err(), "without its times");
    }

    /// Every field, for every kind: one that is left out is told from one that is empty.
    #[test]
    fn what_only_some_events_have_survives_files_and_costs_the_others_nothing() {
        let context = r#"{"page":{"url":"https://x.example/é"},"n":9007199254740993}"#;
        let full = MoreParts {
            session_id: Some("session-1"),
            source: Some("web"),
            tenant: Some("acme"),
            audience: Audience::Only("segment,amplitude".into()),
            context: Some(JsonObject::parse(context, &Limits::DEFAULT).unwrap()),
            enriched: Some(JsonObject::parse(r#"{"v":1}"#, &Limits::DEFAULT).unwrap()),
        };
        let mores = [
            full.clone(),
            MoreParts { audience: Audience::AllBut("mixpanel".into()), ..MoreParts::default() },
            MoreParts { audience: Audience::Only("".into()), ..MoreParts::default() },
            MoreParts { context: full.context.clone(), ..MoreParts::default() },
            MoreParts::default(),
        ];
        let (name, category) = (Some("Home"), Some("Docs"));
        let kinds = [
            EventKind::Track { name: "x" },
            EventKind::Identify,
            EventKind::Page { name, category },
            EventKind::Page { name: None, category: None },
            EventKind::Screen { name, category: None },
            EventKind::Screen { name: None, category },
            EventKind::Group { group_id: "group-1" },
            EventKind::Alias { previous_id: "user-0" },
        ];
        for (kind, more) in kinds.into_iter().flat_map(|kind| mores.iter().map(move |more| (kind, more))) {
            let more = more.clone().if_any();
            let parts = EventParts { kind, more, ..tests_support::parts("x", r#"{"a":1}"#) };
            let event = Event::pack(&parts);
            assert_eq!(event.parts(), parts);
            assert_eq!(event.properties().json(), r#"{"a":1}"#);
            let json = event.to_json();
            assert_eq!(Event::from_json(&json).unwrap(), event, "{}", String::from_utf8_lossy(&json));
            assert_eq!(serde_json::from_slice::<Event>(&json).unwrap(), event);
        }
        assert_eq!(mem::size_of::<Head>(), 40, "what every event takes");
        let plain = tests_support::track("x", "{}");
        assert_eq!(plain.memory_bytes(), Event::HEAD_BYTES + "id-1xuser-1{}".len());
    }

    #[test]
    fn an_audience_names_who_gets_an_event() {
        let all_but = Audience::AllBut("mixpanel,segment".into());
        let only = Audience::Only("mixpanel".into());
        for (provider, [all, but, only_]) in [
            ("mixpanel", [true, false, true]),
            ("amplitude", [true, true, false]),
            ("mix", [true, true, false]),
        ] {
            assert_eq!(Audience::All.includes(provider), all);
            assert_eq!(all_but.includes(provider), but, "{provider}");
            assert_eq!(only.includes(provider), only_, "{provider}");
        }
    }

    /// Whoever reads it as of old leaves the provider out, too.
    #[test]
    fn who_is_left_out_for_want_of_consent_is_told_from_others() {
        let audiences = [
            (Audience::All, [None, Some(NotFor::Consent), Some(NotFor::Consent), None]),
            (
                Audience::AllBut("mixpanel,store".into()),
                [None, Some(NotFor::Consent), Some(NotFor::Consent), Some(NotFor::Audience)],
            ),
            (
                Audience::Only("segment,amplitude".into()),
                [None, Some(NotFor::Consent), Some(NotFor::Consent), Some(NotFor::Audience)],
            ),
            (
                Audience::Only("".into()),
                [
                    Some(NotFor::Audience),
                    Some(NotFor::Consent),
                    Some(NotFor::Consent),
                    Some(NotFor::Audience),
                ],
            ),
        ];
        for (audience, want) in audiences {
            let refused = audience.without_consent_to(&["mixpanel", "amplitude"]);
            let more = MoreParts { audience: refused.clone(), ..MoreParts::default() };
            let event = Event::pack(&EventParts { more: more.if_any(), ..tests_support::parts("x", "{}") });
            let event = Event::from_json(&event.to_json()).unwrap();
            let providers = ["segment", "mixpanel", "amplitude", "store"];
            assert_eq!(providers.map(|provider| event.why_not_for(provider)), want, "{refused:?}");
            assert_eq!(providers.map(|provider| event.is_for(provider)), want.map(|why| why.is_none()));
            assert_eq!(audience.without_consent_to(&[]), audience);
        }
    }

    #[test]
    fn whom_a_machine_sent_it_for_is_told() {
        let dropped = Audience::nobody(NotFor::Bot);
        let kept_out = Audience::only_for(&["store"], NotFor::Bot).without_consent_to(&["segment"]);
        let declined = Audience::nobody(NotFor::Declined);
        for (audience, want) in [
            (dropped, [Some(NotFor::Bot), Some(NotFor::Bot), Some(NotFor::Bot)]),
            (kept_out, [Some(NotFor::Bot), Some(NotFor::Consent), None]),
            (declined, [Some(NotFor::Declined), Some(NotFor::Declined), Some(NotFor::Declined)]),
        ] {
            let more = MoreParts { audience, ..MoreParts::default() };
            let event = Event::pack(&EventParts { more: more.if_any(), ..tests_support::parts("x", "{}") });
            let event = Event::from_json(&event.to_json()).unwrap();
            assert_eq!(["mixpanel", "segment", "store"].map(|provider| event.why_not_for(provider)), want);
        }
    }

    /// A tightened limit must not turn what was accepted into damage.
    #[test]
    fn limits_are_not_held_against_what_is_read_back() {
        let deep = format!("{}1{}", r#"{"a":"#.repeat(40), "}".repeat(40));
        let wide =
            format!("{{{}}}", (0..3000).map(|i| format!(r#""k{i}":{i}"#)).collect::<Vec<_>>().join(","));
        for properties in [deep, wide, format!(r#"{{"text":"{}"}}"#, "x".repeat(100_000))] {
            assert!(Properties::parse(&properties, &Limits::DEFAULT).is_err());
            let json = format!(
                r#"{{"id":"i","kind":"identify","time_ms":1,"accepted_ms":1,"properties":{properties}}}"#
            );
            let event = Event::from_json(json.as_bytes()).unwrap();
            assert_eq!(event.properties().json(), properties);
            assert_eq!(event.to_json(), json.as_bytes());
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
