//! One message of Segment's form, or of the ingestion API's, which has the same fields:
//! JSON → [`Draft`].

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr};

use analytics_relay_providers::{
    Properties,
    event::{Audience, JsonObject, OTHER_ID_BYTES_MAX},
    means_nobody,
};
use jiff::{Timestamp, civil::DateTime, tz::TimeZone};

use super::{
    integrations::{Destinations, Wanted},
    json::{self, fields, is_null, object, scalar, text},
    route::{Form, Kind},
    scan::Raw,
    schema,
};
use crate::{
    admission::{
        denied::{Violation, shown, shown_value},
        draft::{BadProperties, Draft, DraftKind, More, View},
    },
    enrich::{agent::Hints, edge::Edge},
    ingest::limits::{HTTP_EVENT_BYTES_MAX, HTTP_PROPERTIES},
    reasons::RefusalReason,
};

/// How far a caller's clock may be from ours before its times are corrected: what is
/// less is the time that a message takes.
const CLOCK_TOLERANCE_MS: i64 = 60_000;
/// Most names that a context can have.
const KEYS_MAX: usize = HTTP_PROPERTIES.keys_max as usize;
/// A number that is a time is milliseconds from here on, and seconds below.
const MILLIS_FROM: i64 = 100_000_000_000;

/// What holds for all items of a call.
#[derive(Debug)]
pub(super) struct Call<'a> {
    form: Form,
    came: Came<'a>,
    destinations: &'a Destinations,
    // What stands beside the items, read once for all.
    sent_at_ms: Option<i64>,
    wanted: Result<Wanted, Violation>,
    /// The names and values of the context there; nothing if there is none, or no object.
    context: Option<BTreeMap<Cow<'a, str>, Raw<'a>>>,
    has_context: bool,
    place: PlaceOfEvent<'a>,
}

/// What stands beside the items of a batch, for those that do not say it themselves.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Beside<'a> {
    pub(super) context: Option<Raw<'a>>,
    pub(super) integrations: Option<Raw<'a>>,
    pub(super) sent_at: Option<Raw<'a>>,
}

/// Who calls, as the connection and the head of the call show it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller<'a> {
    /// Nothing if it is not known: behind a proxy that nobody has named.
    pub(super) ip: Option<IpAddr>,
    /// The address's country, as a trusted proxy says it.
    pub(super) country_hint: Option<[u8; 2]>,
    pub(super) user_agent: &'a str,
    /// What the browser says of itself, if it is one.
    pub(super) hints: &'a Hints<'a>,
    /// The browser says that its user declines to be followed, or a server that passes it on.
    pub(super) is_declined: bool,
    /// It is the user's own device, and no server of the customer's.
    pub(super) is_direct: bool,
}

/// How a call came.
#[derive(Debug, Clone, Copy)]
pub(super) struct Came<'a> {
    /// By our clock, in Unix milliseconds.
    pub(super) at_ms: i64,
    pub(super) caller: Caller<'a>,
}

impl<'a> Call<'a> {
    pub(super) fn new(
        form: Form,
        came: Came<'a>,
        beside: Beside<'a>,
        destinations: &'a Destinations,
    ) -> Self {
        let given = |value: &Raw<'_>| !is_null(*value);
        let (context, integrations) = (beside.context.filter(given), beside.integrations.filter(given));
        let wanted = match integrations {
            None => Ok(Wanted::default()),
            Some(json) => Wanted::default().and(json.get(), destinations),
        };
        let mut call = Self {
            form,
            came,
            destinations,
            sent_at_ms: beside.sent_at.filter(given).and_then(|value| time_of(value).ok()),
            wanted,
            context: context.and_then(|context| object(context.get())),
            has_context: context.is_some(),
            place: PlaceOfEvent::default(),
        };
        call.place = match context {
            Some(common) => call.place_of(common.get().into()),
            None => call.seen(false),
        };
        call
    }

    /// The same of a text that is one item.
    pub(super) fn read_text<'c>(&'c self, json: &'c str, path: Option<Kind>) -> Result<Draft<'c>, Violation> {
        self.read(&Item::of(json, &NAMES).map_err(|error| malformed(&error))?, path)
    }

    /// The draft of one item; its kind is `path`'s, or else what its `type` says.
    pub(super) fn read<'c>(&'c self, item: &Item<'c>, path: Option<Kind>) -> Result<Draft<'c>, Violation> {
        let bytes = item.raw.get().len();
        if bytes > HTTP_EVENT_BYTES_MAX {
            return Err(too_large(bytes));
        }
        let [
            of_type,
            event,
            user_id,
            anonymous_id,
            message_id,
            session_id,
            name,
            category,
            group_id,
            previous_id,
            timestamp,
            original_timestamp,
            sent_at,
            properties,
            traits,
            context,
            integrations,
            // Of the call, or looked at before.
            _write_key,
            _schema_version,
        ] = item.fields.ok_or_else(|| malformed(&item.why_no_object()))?;

        let kind = match path {
            Some(kind) => kind,
            None => kind_of(of_type)?,
        };
        let user_id = text_of("userId", user_id)?;
        let anonymous_id = text_of("anonymousId", anonymous_id)?;
        let may_be_nobodys = self.form != Form::Segment || kind == Kind::Alias;
        if means_nobody(&user_id) && means_nobody(&anonymous_id) && !may_be_nobodys {
            return Err(nobody());
        }
        let view =
            || Ok(Box::new(View { name: text_of("name", name)?, category: text_of("category", category)? }));
        let kind = match kind {
            Kind::Track => DraftKind::Track { event_name: text_only("event", event)? },
            Kind::Identify => DraftKind::Identify,
            Kind::Page => DraftKind::Page(view()?),
            Kind::Screen => DraftKind::Screen(view()?),
            Kind::Group => DraftKind::Group { group_id: text_of("groupId", group_id)? },
            Kind::Alias => DraftKind::Alias { previous_id: text_of("previousId", previous_id)? },
        };
        let is_about_somebody = matches!(kind, DraftKind::Identify | DraftKind::Group { .. });
        let properties_sent = properties.filter(|_| !is_about_somebody);
        let properties = match is_about_somebody {
            true => object_of("traits", traits),
            false => object_of("properties", properties),
        };
        let [timestamp, original_timestamp, sent_at] =
            [timestamp, original_timestamp, sent_at].map(|value| value.filter(|value| !is_null(*value)));
        let sent_at_ms = sent_at.map_or(self.sent_at_ms, |value| time_of(value).ok());
        let time = timestamp.map(|value| ("timestamp", value));
        let time_ms = match time.or(original_timestamp.map(|value| ("originalTimestamp", value))) {
            Some((field, value)) => Some((field, self.corrected(read_time(field, value)?, sent_at_ms))),
            None => None,
        };
        let place = self.place(context);
        let user_agent = place.user_agent;
        let more = More {
            session_id: match text_of("sessionId", session_id)? {
                id if !id.is_empty() => id,
                _ if !place.session_id.is_empty() => place.session_id,
                _ => session_in(properties_sent),
            },
            audience: self.audience(integrations)?,
            context: place.context,
            edge: place.edge,
        };
        Ok(Draft {
            kind,
            event_id: text_of("messageId", message_id)?,
            user_id,
            anonymous_id,
            time_ms,
            ip: place.ip,
            user_agent,
            properties,
            more: more.is_any().then(|| Box::new(more)),
            durability: Ok(None),
        })
    }

    /// A time by the caller's clock, as our clock would have shown it, if the two are far
    /// apart.
    fn corrected(&self, time_ms: i64, sent_at_ms: Option<i64>) -> i64 {
        match sent_at_ms.map(|sent_at_ms| self.came.at_ms.saturating_sub(sent_at_ms)) {
            Some(behind_ms) if behind_ms.saturating_abs() > CLOCK_TOLERANCE_MS => {
                time_ms.saturating_add(behind_ms)
            }
            _ => time_ms,
        }
    }

    fn audience(&self, integrations: Option<Raw<'_>>) -> Result<Audience<'static>, Violation> {
        let wanted = self.wanted.as_ref().map_err(Clone::clone)?;
        match integrations.filter(|value| !is_null(*value)) {
            None => Ok(wanted.audience()),
            Some(own) => wanted.clone().and(own.get(), self.destinations).map(|wanted| wanted.audience()),
        }
    }

    /// Where it happened: the item's own context, and of the call's what that lacks.
    fn place<'c>(&'c self, context: Option<Raw<'c>>) -> PlaceOfEvent<'c> {
        let Some(own) = context.filter(|value| !is_null(*value)) else { return self.place.borrowed() };
        match &self.context {
            // Beside each of them what is refused already stays refused, and is not merged.
            Some(common) if common.len() > KEYS_MAX => self.place.borrowed(),
            Some(common) => self.place_of(merged(common, own.get())),
            // What is no object is refused as what it is.
            None if self.has_context => self.place.borrowed(),
            None => self.place_of(own.get().into()),
        }
    }

    fn place_of<'c>(&self, json: Cow<'c, str>) -> PlaceOfEvent<'c>
    where
        'a: 'c,
    {
        let context = match parse("context", &json) {
            Ok(context) => JsonObject::from(context),
            Err(bad) => return PlaceOfEvent { context: Some(Err(bad)), ..PlaceOfEvent::default() },
        };
        // It is a JSON object: nothing of it can be missing but what it does not have.
        let [ip, user_agent, direct, session_id, session_too] =
            fields(&json, &["ip", "userAgent", "direct", "sessionId", "session_id"]).unwrap_or_default();
        let values = [ip, user_agent, session_id, session_too];
        let texts = values.map(|value| value.and_then(scalar).map(Cow::into_owned));
        let [ip, user_agent, session_id, session_too] = texts.map(Option::unwrap_or_default);
        let session_id = if session_id.is_empty() { session_too } else { session_id };
        let seen = self.seen(direct.is_some_and(|direct| direct.get() == "true"));
        // A device cannot be elsewhere by saying so, but it may keep to itself where it is.
        let is_said = match self.came.caller.is_direct {
            true => means_nowhere(&ip),
            false => !ip.is_empty(),
        };
        let (ip, edge) = match is_said {
            true => (ip.into(), Edge { ip_is_connections: false, country_hint: None, ..seen.edge }),
            false => (seen.ip, seen.edge),
        };
        PlaceOfEvent {
            ip,
            edge,
            user_agent: if user_agent.is_empty() { seen.user_agent } else { user_agent.into() },
            session_id: session_id.into(),
            context: Some(Ok(context.into_owned())),
        }
    }

    /// What the call itself shows of the user, if it comes from the user's own device. That
    /// the user declines it shows in any case: nobody says that by accident.
    fn seen(&self, is_direct: bool) -> PlaceOfEvent<'a> {
        let Caller { ip, country_hint, user_agent, hints, is_declined, is_direct: is_device } =
            self.came.caller;
        if !is_device && !is_direct {
            let edge = Edge { is_declined, ..Edge::default() };
            return PlaceOfEvent { edge, ..PlaceOfEvent::default() };
        }
        let (ip, user_agent) = (ip.map(|ip| ip.to_string()).unwrap_or_default().into(), user_agent.into());
        let edge =
            Edge { ip_is_connections: true, country_hint, is_device: true, is_declined, hints: Some(hints) };
        PlaceOfEvent { ip, edge, user_agent, ..PlaceOfEvent::default() }
    }
}

/// One item, as far as [`Call::read`] looks into it.
pub(super) type Item<'a> = json::Item<'a, { NAMES.len() }>;

/// The names of an item's fields, in the order in which [`Call::read`] takes them.
pub(super) const NAMES: [&str; 19] = [
    "type",
    "event",
    "userId",
    "anonymousId",
    "messageId",
    "sessionId",
    "name",
    "category",
    "groupId",
    "previousId",
    "timestamp",
    "originalTimestamp",
    "sentAt",
    "properties",
    "traits",
    "context",
    "integrations",
    "writeKey",
    schema::FIELD,
];

impl<'a> Item<'a> {
    /// The write key that it names.
    pub(super) fn write_key(&self) -> Option<Raw<'a>> {
        self.fields.and_then(|[.., write_key, _]| write_key)
    }

    /// The schema version that it names.
    pub(super) fn schema_version(&self) -> Option<Raw<'a>> {
        self.fields.and_then(|[.., schema_version]| schema_version)
    }
}

/// What is known of where an event happened.
#[derive(Debug, Default)]
struct PlaceOfEvent<'a> {
    ip: Cow<'a, str>,
    /// Of that address.
    edge: Edge<'a>,
    user_agent: Cow<'a, str>,
    session_id: Cow<'a, str>,
    context: Option<Result<JsonObject<'a>, BadProperties>>,
}

impl PlaceOfEvent<'_> {
    /// The same, as long as this is there.
    fn borrowed(&self) -> PlaceOfEvent<'_> {
        let context = self.context.as_ref().map(|context| match context {
            Ok(context) => Ok(context.borrowed()),
            Err(bad) => Err(bad.clone()),
        });
        let [ip, user_agent, session_id] =
            [&self.ip, &self.user_agent, &self.session_id].map(|text| Cow::Borrowed(&**text));
        PlaceOfEvent { ip, edge: self.edge, user_agent, session_id, context }
    }
}

impl More<'_> {
    fn is_any(&self) -> bool {
        !self.session_id.is_empty()
            || self.audience != Audience::All
            || self.context.is_some()
            || self.edge != Edge::default()
    }
}

/// The session that an event's properties name, as PostHog's library has it; empty if they name
/// none.
fn session_in(properties: Option<Raw<'_>>) -> Cow<'_, str> {
    let json = properties.map_or("", |json| json.get());
    // In most there is no such name.
    if memchr::memchr(b'$', json.as_bytes()).is_none() {
        return "".into();
    }
    let [id] = fields(json, &["$session_id"]).unwrap_or_default();
    // What is no id is a property like any other.
    id.and_then(scalar).filter(|id| id.len() <= OTHER_ID_BYTES_MAX).unwrap_or_default()
}

/// How a page says that its user's address is not to be taken, as Segment's documentation
/// tells it to.
fn means_nowhere(ip: &str) -> bool {
    ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified())
}

/// The fields of two objects; of those that both have the second's. What is no object, or
/// has too many, stays what it is.
fn merged<'a>(common: &BTreeMap<Cow<'_, str>, Raw<'_>>, own: &'a str) -> Cow<'a, str> {
    let Some(own_fields) = object(own).filter(|own| own.len() <= KEYS_MAX) else { return own.into() };
    let mut all: BTreeMap<&str, Raw<'_>> = common.iter().map(|(name, value)| (&**name, *value)).collect();
    all.extend(own_fields.iter().map(|(name, value)| (&**name, *value)));
    let mut json = String::with_capacity(own.len());
    for (name, value) in all {
        json.push(if json.is_empty() { '{' } else { ',' });
        json.push_str(&serde_json::to_string(name).expect("a text is JSON"));
        json.push(':');
        json.push_str(value.get());
    }
    if json.is_empty() {
        return "{}".into();
    }
    json.push('}');
    json.into()
}

/// The kind that an item names.
fn kind_of(of_type: Option<Raw<'_>>) -> Result<Kind, Violation> {
    let name = text_of("type", of_type)?;
    Kind::named(&name).ok_or_else(|| Violation {
        reason: RefusalReason::KindUnknown,
        field: "type".into(),
        got: if name.is_empty() { "nothing".into() } else { shown(&name) },
        want: "track, identify, page, screen, group or alias".into(),
    })
}

/// A text, or a number as it stands; empty if it is not there.
fn text_of<'a>(field: &str, value: Option<Raw<'a>>) -> Result<Cow<'a, str>, Violation> {
    match value {
        None => Ok("".into()),
        Some(value) => scalar(value).ok_or_else(|| not_text(field, value, "a text or a number")),
    }
}

/// A text; empty if it is not there.
fn text_only<'a>(field: &str, value: Option<Raw<'a>>) -> Result<Cow<'a, str>, Violation> {
    match value.filter(|value| !is_null(*value)) {
        None => Ok("".into()),
        Some(value) => text(value).ok_or_else(|| not_text(field, value, "a text")),
    }
}

fn not_text(field: &str, value: Raw<'_>, want: &str) -> Violation {
    Violation {
        reason: RefusalReason::FieldNotText,
        field: field.to_owned(),
        got: shown_value(value.get()),
        want: want.to_owned(),
    }
}

/// The object that properties or traits are: none of them if they are not there.
fn object_of<'a>(field: &'static str, value: Option<Raw<'a>>) -> Result<Properties<'a>, BadProperties> {
    match value.filter(|value| !is_null(*value)) {
        None => Ok(Properties::empty()),
        Some(value) => parse(field, value.get()),
    }
}

fn parse<'a>(field: &'static str, json: &'a str) -> Result<Properties<'a>, BadProperties> {
    Properties::parse(json, &HTTP_PROPERTIES).map_err(|error| BadProperties::Faulty { field, error })
}

fn read_time(field: &'static str, value: Raw<'_>) -> Result<i64, Violation> {
    time_of(value).map_err(|got| Violation {
        reason: RefusalReason::TimeMalformed,
        field: field.to_owned(),
        got,
        want: "a time as in 2026-01-31T12:00:00.000Z".into(),
    })
}

/// A time in Unix milliseconds: ISO 8601, without an offset UTC, or a number of seconds
/// or milliseconds. What came, if it is none.
pub(super) fn time_of(value: Raw<'_>) -> Result<i64, String> {
    let json = value.get();
    if let Ok(number) = json.parse::<i64>() {
        let is_seconds = number.unsigned_abs() < MILLIS_FROM.unsigned_abs();
        return Ok(if is_seconds { number.saturating_mul(1000) } else { number });
    }
    // As `time.time()` has it.
    if let Some(seconds) = json.parse::<f64>().ok().filter(|seconds| seconds.is_finite()) {
        let millis = if seconds.abs() < MILLIS_FROM as f64 { seconds * 1000.0 } else { seconds };
        return Ok(millis as i64);
    }
    let text = text(value).ok_or_else(|| shown_value(json))?;
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time.as_millisecond());
    }
    let civil = text.parse::<DateTime>().ok().and_then(|time| time.to_zoned(TimeZone::UTC).ok());
    civil.map(|time| time.timestamp().as_millisecond()).ok_or_else(|| shown(&text))
}

fn too_large(bytes: usize) -> Violation {
    Violation {
        reason: RefusalReason::EventTooLarge,
        field: String::new(),
        got: format!("{bytes} bytes"),
        want: format!("at most {HTTP_EVENT_BYTES_MAX} bytes of JSON"),
    }
}

/// An item that is JSON and not an object.
fn malformed(error: &serde_json::Error) -> Violation {
    Violation {
        reason: RefusalReason::MessageMalformed,
        field: String::new(),
        got: error.to_string().chars().take(100).collect(),
        want: "a JSON object".into(),
    }
}

fn nobody() -> Violation {
    Violation {
        reason: RefusalReason::NoUser,
        field: "userId".into(),
        got: "neither a userId nor an anonymousId of somebody".into(),
        want: "one of the two".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use serde_json::value::RawValue;

    use super::*;

    const NOW_MS: i64 = 1_767_225_600_000;
    const SERVER: Caller<'static> = Caller {
        ip: Some(IpAddr::V4(Ipv4Addr::new(81, 2, 69, 142))),
        country_hint: Some(*b"GB"),
        user_agent: "",
        hints: &Hints::NONE,
        is_declined: false,
        is_direct: false,
    };

    fn read_at(json: &str, sent_at: &str) -> Result<i64, String> {
        let sent_at: Box<RawValue> = serde_json::from_str(sent_at).unwrap();
        let beside = Beside { sent_at: Some((&*sent_at).into()), ..Beside::default() };
        let (destinations, caller) = (Destinations::default(), SERVER);
        let call = Call::new(Form::Segment, Came { at_ms: NOW_MS, caller }, beside, &destinations);
        let json = format!(r#"{{"event":"x","userId":"u","timestamp":{json}}}"#);
        let draft = call.read_text(&json, Some(Kind::Track));
        draft.map(|draft| draft.time_ms.unwrap().1).map_err(|violation| violation.reason.name().to_owned())
    }

    #[test]
    fn a_time_is_read_as_sdks_write_it() {
        for (json, time_ms) in [
            (r#""2026-01-01T00:00:00.000Z""#, NOW_MS),
            (r#""2026-01-01T01:00:00+01:00""#, NOW_MS),
            (r#""2026-01-01T00:00:00.000001+00:00""#, NOW_MS),
            (r#""2026-01-01T00:00:00""#, NOW_MS),
            (r#""2026-01-01 00:00:00""#, NOW_MS),
            ("1767225600000", NOW_MS),
            ("1767225600", NOW_MS),
            ("1767225600.25", NOW_MS + 250),
        ] {
            assert_eq!(read_at(json, "null"), Ok(time_ms), "{json}");
        }
        let original = r#"null,"originalTimestamp":1767225600000,"sentAt":null"#;
        let behind = (NOW_MS - 3_600_000).to_string();
        assert_eq!(read_at(original, &behind), Ok(NOW_MS + 3_600_000), "null hides nothing");
        for json in [r#""yesterday""#, "true", "{}", "1e999", r#""""#] {
            assert_eq!(read_at(json, "null"), Err("TIME_MALFORMED".to_owned()), "{json}");
        }
    }

    #[test]
    fn a_time_is_corrected_only_by_clocks_that_are_far_apart() {
        let hour_ms = 3_600_000;
        assert_eq!(read_at("1767225500000", "1767225550000"), Ok(NOW_MS - 100_000), "as it is");
        assert_eq!(read_at("1767225600000", &(NOW_MS - hour_ms).to_string()), Ok(NOW_MS + hour_ms));
        assert_eq!(read_at("1767225600000", &(NOW_MS + hour_ms).to_string()), Ok(NOW_MS - hour_ms));
        assert_eq!(read_at("1767225600000", r#""nonsense""#), Ok(NOW_MS));
    }

    /// Of what stands beside the events each takes what it does not say itself.
    #[test]
    fn an_event_has_the_context_beside_it_and_its_own_wins() {
        let read = |own: &str| {
            let common: Box<RawValue> =
                serde_json::from_str(r#"{"ip":"203.0.113.1","locale":"de","sessionId":7}"#).unwrap();
            let beside = Beside { context: Some((&*common).into()), ..Beside::default() };
            let (destinations, caller) = (Destinations::default(), SERVER);
            let call = Call::new(Form::Segment, Came { at_ms: NOW_MS, caller }, beside, &destinations);
            let json = format!(r#"{{"event":"x","userId":"u","context":{own}}}"#);
            let draft = call.read_text(&json, Some(Kind::Track)).unwrap();
            let more = draft.more.unwrap();
            let context = more.context.unwrap().map(|context| context.json().to_owned());
            (draft.ip.into_owned(), more.session_id.into_owned(), context.ok())
        };
        let common = r#"{"ip":"203.0.113.1","locale":"de","sessionId":7}"#;
        assert_eq!(read("null"), ("203.0.113.1".into(), "7".into(), Some(common.into())));
        let merged = r#"{"ip":"203.0.113.9","locale":"de","sessionId":7}"#;
        assert_eq!(read(r#"{"ip":"203.0.113.9"}"#), ("203.0.113.9".into(), "7".into(), Some(merged.into())));
        assert_eq!(read("[1]").2, None, "it is no object");
    }

    #[test]
    fn a_session_is_called_what_its_event_calls_it_wherever_it_does() {
        let read = |fields: &str| {
            let (destinations, came) = (Destinations::default(), Came { at_ms: NOW_MS, caller: SERVER });
            let call = Call::new(Form::Segment, came, Beside::default(), &destinations);
            let json = format!(r#"{{"event":"x","userId":"u",{fields}}}"#);
            let draft = call.read_text(&json, Some(Kind::Track)).unwrap();
            draft.more.map_or(String::new(), |more| more.session_id.into_owned())
        };
        let all = r#""context":{"sessionId":1767225600,"session_id":"c"},"properties":{"$session_id":"p"}"#;
        let too_long = format!(r#""properties":{{"$session_id":"{}"}}"#, "p".repeat(OTHER_ID_BYTES_MAX + 1));
        for (fields, want) in [
            (&*format!(r#""sessionId":"own",{all}"#), "own"),
            (&*format!(r#""sessionId":"",{all}"#), "1767225600"),
            (r#""context":{"session_id":"c"},"properties":{"$session_id":"p"}"#, "c"),
            (r#""context":{"session_id":1767225600}"#, "1767225600"),
            (r#""properties":{"price":"$5","$session_id":"p"}"#, "p"),
            (r#""context":{},"properties":{"$session_id":7}"#, "7"),
            (r#""properties":{"$session_id":{"id":"p"}}"#, ""),
            (r#""properties":{"session_id":"p","deep":{"$session_id":"p"}}"#, ""),
            (&*too_long, ""),
        ] {
            assert_eq!(read(fields), want, "{fields}");
        }
    }

    /// Whoever sends it, and whatever its context says.
    #[test]
    fn a_call_whose_user_declines_is_of_events_whose_user_declines() {
        let declines = |is_direct, context: &str| {
            let caller = Caller { is_direct, is_declined: true, ..SERVER };
            let destinations = Destinations::default();
            let came = Came { at_ms: NOW_MS, caller };
            let call = Call::new(Form::Segment, came, Beside::default(), &destinations);
            let json = format!(r#"{{"event":"x","userId":"u","context":{context}}}"#);
            let draft = call.read_text(&json, Some(Kind::Track)).unwrap();
            draft.more.is_some_and(|more| more.edge.is_declined)
        };
        for context in ["null", "{}", r#"{"direct":true}"#, r#"{"direct":false,"ip":"1.2.3.4"}"#] {
            assert!(declines(true, context) && declines(false, context), "{context}");
        }
    }

    #[test]
    fn whose_address_it_is_the_connection_says_of_a_device_and_the_caller_of_a_server() {
        const SEEN: &str = "81.2.69.142";
        let read = |is_direct, context: &str| {
            let came = Came { at_ms: NOW_MS, caller: Caller { is_direct, ..SERVER } };
            let destinations = Destinations::default();
            let call = Call::new(Form::Segment, came, Beside::default(), &destinations);
            let json = format!(r#"{{"event":"x","userId":"u","context":{context}}}"#);
            let draft = call.read_text(&json, Some(Kind::Track)).unwrap();
            let edge = draft.more.map_or(Edge::default(), |more| more.edge);
            (draft.ip.into_owned(), edge.ip_is_connections, edge.country_hint, edge.is_device)
        };
        let seen = (SEEN.to_owned(), true, Some(*b"GB"), true);
        let said = |ip: &str| (ip.to_owned(), false, None, false);
        let told = |ip: &str| (ip.to_owned(), false, None, true);
        for (is_direct, context, want) in [
            (false, "null", said("")),
            (false, "{}", said("")),
            (false, r#"{"ip":"1.2.3.4"}"#, said("1.2.3.4")),
            (false, r#"{"direct":true}"#, seen.clone()),
            (false, r#"{"direct":true,"ip":"1.2.3.4"}"#, told("1.2.3.4")),
            (true, "null", seen.clone()),
            (true, "{}", seen.clone()),
            (true, r#"{"ip":"1.2.3.4"}"#, seen.clone()),
            (true, r#"{"ip":["1.2.3.4"]}"#, seen.clone()),
            (true, "[1]", seen.clone()),
            (true, r#"{"ip":"0.0.0.0"}"#, told("0.0.0.0")),
            (true, r#"{"ip":"::"}"#, told("::")),
        ] {
            // What is no object is refused, and nothing of it looked at.
            let want = if context == "[1]" { said("") } else { want };
            assert_eq!(read(is_direct, context), want, "{is_direct} {context}");
        }
    }
}
