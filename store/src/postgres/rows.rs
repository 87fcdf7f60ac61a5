//! An event as a row of the table `events`.

use std::{borrow::Cow, collections::HashMap, sync::LazyLock};

use analytics_relay_providers::{Event, EventKind};
use uuid::Uuid;

use super::time::Ts;
use crate::{
    Field,
    model::{
        Class, Keys,
        event::{TIME_ON_PAGE, looked_ms, shown, source_of, what},
    },
    scan::shred::walk,
    scope::SEPARATOR,
};

/// Columns of fields beside the name and the user.
pub(super) const COLUMNS: [&str; 19] = [
    "page",
    "host",
    "referrer",
    "source",
    "channel",
    "medium",
    "campaign",
    "term",
    "content",
    "continent",
    "country",
    "region",
    "city",
    "browser",
    "browser_version",
    "os",
    "os_version",
    "device",
    "bot",
];

/// Their fields.
static FIELDS: [Field; COLUMNS.len()] = [
    Field::Page,
    Field::Host,
    Field::Referrer,
    Field::Source,
    Field::Channel,
    Field::Medium,
    Field::Campaign,
    Field::Term,
    Field::Content,
    Field::Continent,
    Field::Country,
    Field::Region,
    Field::City,
    Field::Browser,
    Field::BrowserVersion,
    Field::Os,
    Field::OsVersion,
    Field::Device,
    Field::Bot,
];

/// The column of a field that has one.
pub(super) fn column_of(field: &Field) -> Option<&'static str> {
    match field {
        Field::Name => Some("event_type"),
        Field::User => Some("user_id"),
        _ => FIELDS.iter().position(|one| one == field).map(|place| COLUMNS[place]),
    }
}

/// Where a value stands that is looked for: the field's place, and which of its paths.
static PLACES: LazyLock<HashMap<String, (usize, usize)>> = LazyLock::new(|| {
    let of_field = |(place, field): (usize, &Field)| {
        field.paths().into_iter().enumerate().map(move |(rank, path)| (path, (place, rank)))
    };
    FIELDS.iter().enumerate().flat_map(of_field).collect()
});

/// What fields say, by their places in [`COLUMNS`], and what else is asked of an event's JSON.
#[derive(Debug, Default)]
pub(super) struct Found {
    fields: [Option<String>; COLUMNS.len()],
    time_on_page: Option<f64>,
    user_agent: Option<String>,
    is_bot: bool,
}

/// Reads an event's JSON once.
pub(super) fn find(json: &str) -> Found {
    let mut found = Found::default();
    // Of each field the best path that was found, and which paths were: a name that comes
    // twice counts once.
    let (mut ranks, mut seen) = ([usize::MAX; COLUMNS.len()], [0_u8; COLUMNS.len()]);
    let time_path = format!("properties{SEPARATOR}{TIME_ON_PAGE}");
    let (agent_path, bot_path) = (format!("context{SEPARATOR}user_agent"), format!("enriched{SEPARATOR}bot"));
    let mut has_time = false;
    walk(json, &mut |path, at| {
        let value = &json[at];
        if let Some((place, rank)) = PLACES.get(path).copied() {
            let is_first = seen[place] & (1 << rank) == 0;
            seen[place] |= 1 << rank;
            if is_first
                && rank < ranks[place]
                && let Some(text) = shown(value)
            {
                ranks[place] = rank;
                found.fields[place] = Some(text.into_owned());
            }
        }
        if path == time_path && !has_time {
            has_time = true;
            found.time_on_page = looked_ms(value).map(|ms| ms as f64 / 1_000.0);
        } else if path == agent_path {
            found.user_agent = shown(value).map(Cow::into_owned);
        }
        let of_bot = path.strip_prefix(&*bot_path);
        found.is_bot |= of_bot.is_some_and(|rest| rest.is_empty() || rest.starts_with(SEPARATOR));
    });
    found
}

/// The value of a field of an event that has a column for it.
pub(super) fn value_of(event: &Event, found: &Found, field: &Field) -> Option<String> {
    match field {
        Field::Name => Some(what(event).1.to_owned()),
        Field::User => event.user_id().map(str::to_owned),
        _ => {
            let place = FIELDS.iter().position(|one| one == field)?;
            found.fields[place].clone()
        }
    }
}

/// A text as a server can hold it, from which it can be told what it was: for what is a key.
pub(super) fn kept(text: &str) -> Cow<'_, str> {
    match text.contains(['\0', '\\']) {
        false => text.into(),
        true => text.replace('\\', "\\\\").replace('\0', "\\0").into(),
    }
}

/// What [`kept`] kept.
pub(super) fn told(kept: &str) -> String {
    let (mut text, mut rest) = (String::with_capacity(kept.len()), kept.chars());
    while let Some(one) = rest.next() {
        match one {
            '\\' => text.push(if rest.next() == Some('0') { '\0' } else { '\\' }),
            one => text.push(one),
        }
    }
    text
}

/// The id of an event as a UUID: itself if it is written as one, else the name-based one of
/// it.
pub(super) fn uuid_of(id: &str) -> Uuid {
    match Uuid::try_parse(id) {
        Ok(uuid) if uuid.as_hyphenated().to_string() == id => uuid,
        _ => Uuid::new_v5(&Uuid::NAMESPACE_OID, id.as_bytes()),
    }
}

/// A number for a class, and whether it is a machine's.
pub(super) fn class_number(class: Class) -> i16 {
    Class::ALL.iter().position(|one| *one == class).unwrap_or_default() as i16
}

/// Longest text that is part of a key.
const KEY_BYTES_MAX: usize = 600;

/// False if a text is too long for a part of a key.
pub(super) fn fits_key(text: &str) -> bool {
    kept(text).len() <= KEY_BYTES_MAX
}

/// An event as a row.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) tenant: String,
    pub(super) website_id: String,
    pub(super) timestamp: Ts,
    pub(super) id: Uuid,
    pub(super) time_ms: i64,
    pub(super) created_at: Ts,
    pub(super) event_type: String,
    pub(super) class: i16,
    pub(super) is_bot: bool,
    /// Some text is not what it was, as the server cannot hold it.
    pub(super) is_odd: bool,
    pub(super) who: i64,
    pub(super) session_key: i64,
    /// By their places in [`TEXTS`].
    pub(super) texts: [Option<String>; TEXTS.len()],
    pub(super) time_on_page: Option<f64>,
    /// Of the event's id, for telling that it was there.
    pub(super) h: i64,
}

/// Columns of texts that may be none; `properties` is JSON. Those of fields come last.
pub(super) const TEXTS: [&str; 7 + COLUMNS.len()] = {
    let mut all = [""; 7 + COLUMNS.len()];
    let first = ["user_id", "visitor_id", "anonymous_id", "session_id", "user_agent", "properties", "event"];
    let mut at = 0;
    while at < all.len() {
        all[at] = if at < 7 { first[at] } else { COLUMNS[at - 7] };
        at += 1;
    }
    all
};

fn previous_id_of(event: &Event) -> Option<&str> {
    match event.kind() {
        EventKind::Alias { previous_id } => Some(previous_id),
        _ => None,
    }
}

impl Row {
    /// Of an event; or why it cannot be one.
    pub(super) fn of(event: &Event, keys: Keys) -> Result<Self, String> {
        let json = String::from_utf8(event.to_json()).map_err(|_| "its JSON is no text".to_owned())?;
        let (tenant, source) = (event.tenant().unwrap_or_default(), source_of(event));
        let (class, name) = what(event);
        for (what, text) in [
            ("tenant", Some(tenant)),
            ("website", Some(&*source)),
            ("name", Some(name)),
            ("user id", event.user_id()),
            ("anonymous id", event.anonymous_id()),
            ("session id", event.session_id()),
            ("previous id", previous_id_of(event)),
        ] {
            if text.is_some_and(|text| !fits_key(text)) {
                return Err(format!("its {what} is longer than {KEY_BYTES_MAX} bytes"));
            }
        }
        let mut found = find(&json);
        let mut is_odd = false;
        let event_type = clean(name, &mut is_odd);
        let ids = [
            event.user_id(),
            event.user_id().or(event.anonymous_id()),
            event.anonymous_id(),
            event.session_id(),
            found.user_agent.as_deref(),
        ];
        let mut texts: [Option<String>; TEXTS.len()] = Default::default();
        for (text, id) in texts.iter_mut().zip(ids) {
            *text = id.map(|id| clean(id, &mut is_odd));
        }
        texts[5] = properties(event.properties().json());
        for (text, value) in texts[7..].iter_mut().zip(&mut found.fields) {
            *text = value.take().map(|value| clean(&value, &mut is_odd));
        }
        texts[6] = Some(json);
        Ok(Self {
            tenant: kept(tenant).into_owned(),
            website_id: kept(&source).into_owned(),
            timestamp: Ts::of(event.time_ms()),
            id: uuid_of(event.id().as_str()),
            time_ms: event.time_ms(),
            created_at: Ts::of(event.accepted_ms()),
            event_type,
            class: class_number(class),
            is_bot: found.is_bot,
            is_odd,
            who: keys.who(event) as i64,
            session_key: keys.session(event).0 as i64,
            texts,
            time_on_page: found.time_on_page,
            h: keys.event(tenant, event.id().as_str()) as i64,
        })
    }
}

/// A text as a server can hold it and people can read it.
fn clean(text: &str, is_odd: &mut bool) -> String {
    let has_nul = text.contains('\0');
    *is_odd |= has_nul;
    if has_nul { text.replace('\0', "\u{fffd}") } else { text.to_owned() }
}

/// Properties as `jsonb` can hold them, which is for people: without NUL, and none where it
/// cannot at all. What is plain is not looked at closer.
pub(super) fn properties(json: &str) -> Option<String> {
    const DEPTH_MAX: usize = 100;
    const DIGITS_MAX: usize = 100;
    let (mut brackets, mut digits, mut is_plain) = (0, 0, json.len() < 1 << 20);
    for byte in json.bytes() {
        match byte {
            b'0'..=b'9' => digits += 1,
            // Of a number that a server does not know, or of a word.
            b'e' | b'E' if digits > 0 => is_plain = false,
            b'\\' => is_plain = false,
            b'{' | b'[' => brackets += 1,
            _ => {}
        }
        is_plain &= digits < DIGITS_MAX && brackets < DEPTH_MAX;
        if !byte.is_ascii_digit() {
            digits = 0;
        }
    }
    if is_plain {
        return Some(json.to_owned());
    }
    let mut value: serde_json::Value = serde_json::from_str(json).ok()?;
    without_nul(&mut value);
    serde_json::to_string(&value).ok()
}

fn without_nul(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::String(text) if text.contains('\0') => *text = text.replace('\0', "\u{fffd}"),
        serde_json::Value::Array(values) => values.iter_mut().for_each(without_nul),
        serde_json::Value::Object(entries) => {
            entries.values_mut().for_each(without_nul);
            if entries.keys().any(|key| key.contains('\0')) {
                let all = std::mem::take(entries);
                *entries =
                    all.into_iter().map(|(key, value)| (key.replace('\0', "\u{fffd}"), value)).collect();
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_as_they_were_and_no_two_are_one() {
        let all = ["", "a", "a\0b", "a\\0b", "\\", "\\\\", "\0", "é\\\0"];
        for text in all {
            assert_eq!(told(&kept(text)), text);
            assert!(!kept(text).contains('\0'));
        }
        let kept: std::collections::BTreeSet<_> = all.iter().map(|text| kept(text)).collect();
        assert_eq!(kept.len(), all.len());
    }

    #[test]
    fn properties_that_a_server_cannot_hold_are_changed_or_none() {
        assert_eq!(properties(r#"{"a":1}"#).as_deref(), Some(r#"{"a":1}"#));
        assert_eq!(
            properties(r#"{"a\u0000":["\u0000"]}"#).as_deref(),
            Some("{\"a\u{fffd}\":[\"\u{fffd}\"]}")
        );
        assert_eq!(properties(r#"{"a":1e99999}"#), None);
        assert_eq!(properties(r#"{"a":"\ud800"}"#), None);
        assert_eq!(properties(&format!("{{\"a\":{}{}}}", "[".repeat(200), "]".repeat(200))), None);
    }

    #[test]
    fn an_id_that_is_a_uuid_is_itself() {
        let uuid = "0190f0e0-1234-7abc-8def-0123456789ab";
        assert_eq!(uuid_of(uuid).to_string(), uuid);
        assert_ne!(uuid_of(&uuid.to_uppercase()).to_string(), uuid);
        assert_ne!(uuid_of("a"), uuid_of("b"));
    }
}
