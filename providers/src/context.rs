//! What a caller said about where an event happened, for vendors that know parts of it
//! under names of their own; and what the relay found out, where the caller said nothing.
//! Nobody pays for it whose event has none.

use std::borrow::Cow;

use reqwest::Url;
use serde_json::value::RawValue;

use crate::{Event, event::OTHER_ID_BYTES_MAX, json::Object, properties::entries};

/// The objects in a context that some vendor takes something out of.
const SECTIONS: [&str; 10] =
    ["page", "campaign", "os", "browser", "device", "app", "screen", "network", "location", "library"];
/// Names in a context, and the relay's names for the same.
type Renamed = &'static [(&'static str, &'static str)];

/// What the relay found out, by the section that it stands in for if the caller's context
/// has none: who says what browser it was says all of it.
const FOUND_OUT: [(&str, &str, Renamed); 4] = [
    ("os", "agent", &[("name", "os"), ("version", "os_version")]),
    ("browser", "agent", &[("name", "browser"), ("version", "browser_version")]),
    ("device", "agent", &[("manufacturer", "brand"), ("model", "model")]),
    ("location", "geo", &[("country", "country"), ("region", "region"), ("city", "city")]),
];
/// Of a campaign's fields so many at most become properties: a vendor limits how many of
/// these an event has, and a project.
const CAMPAIGN_FIELDS_MAX: usize = 16;
const CAMPAIGN_FIELD_BYTES_MAX: usize = 32;

type Fields<'a> = Vec<(String, &'a RawValue)>;

/// What a value must be, so that a vendor takes it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Is {
    /// A text that is not empty.
    Text,
    /// A number.
    Number,
    /// True or false.
    Flag,
}

impl Is {
    fn fits(self, json: &str) -> bool {
        match self {
            Self::Text => json.starts_with('"') && json.len() > r#""""#.len(),
            Self::Number => json.starts_with(|first: char| first.is_ascii_digit() || first == '-'),
            Self::Flag => matches!(json, "true" | "false"),
        }
    }
}

/// A field of a context, as `os.name`, what it must be, and a vendor's name for it.
pub(crate) struct Row(pub(crate) &'static str, pub(crate) Is, pub(crate) &'static str);

/// A context, taken apart as far as a vendor has a use for it. What is not of the type
/// that it should be is as good as absent: a context never costs the event.
#[derive(Debug, Default)]
pub(crate) struct Context<'a> {
    fields: Fields<'a>,
    sections: Vec<(&'static str, Fields<'a>)>,
    found_out: Fields<'a>,
}

impl<'a> Context<'a> {
    /// The event's, empty if it has none.
    pub(crate) fn of(event: &'a Event) -> Self {
        let fields = event.context_json().map(entries).unwrap_or_default();
        let found_out = event.enriched_json().map(entries).unwrap_or_default();
        let mut sections: Vec<_> =
            SECTIONS.into_iter().filter_map(|name| Some((name, object_in(&fields, name)?))).collect();
        for (name, of, names) in FOUND_OUT {
            // By an address a vendor finds the place itself.
            let is_theirs = name == "location" && event.ip().is_some();
            if !is_theirs && !sections.iter().any(|(section, _)| *section == name) {
                sections.extend(object_in(&found_out, of).map(|found| (name, renamed(found, names))));
            }
        }
        if !sections.iter().any(|(section, _)| *section == "campaign") {
            sections.extend(object_in(&found_out, "campaign").map(|found| ("campaign", found)));
        }
        Self { fields, sections, found_out }
    }

    /// What sort of device it was, as the relay found out: `mobile`, `desktop` and so on.
    pub(crate) fn device_class(&self) -> Option<String> {
        let agent = object_in(&self.found_out, "agent")?;
        get(&agent, "device").filter(|json| Is::Text.fits(json)).and_then(unquoted)
    }

    /// The JSON of a field, if it is there and what it should be.
    pub(crate) fn find(&self, path: &str, is: Is) -> Option<&'a str> {
        let value = match path.split_once('.') {
            None => get(&self.fields, path),
            Some((section, name)) => get(self.section(section), name),
        };
        value.filter(|value| is.fits(value))
    }

    /// A field that is a text.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        self.find(path, Is::Text).and_then(unquoted)
    }

    /// The group to which the event belongs, as JSON.
    pub(crate) fn group_id(&self) -> Option<&'a str> {
        let is_short = |id: &String| !id.trim().is_empty() && id.len() <= OTHER_ID_BYTES_MAX;
        self.text("groupId").filter(is_short)?;
        self.find("groupId", Is::Text)
    }

    fn section(&self, name: &str) -> &[(String, &'a RawValue)] {
        self.sections.iter().find(|(section, _)| *section == name).map_or(&[], |(_, fields)| fields)
    }
}

/// The fields of one field, if it is an object.
fn object_in<'a>(fields: &[(String, &'a RawValue)], name: &str) -> Option<Fields<'a>> {
    get(fields, name).filter(|value| value.starts_with('{')).map(entries)
}

/// The fields that have a name here, under that name.
fn renamed<'a>(found: Fields<'a>, names: &[(&str, &str)]) -> Fields<'a> {
    let name_here = |theirs: &str| names.iter().find(|(_, own)| *own == theirs).map(|(name, _)| *name);
    found.into_iter().filter_map(|(name, value)| Some((name_here(&name)?.to_owned(), value))).collect()
}

/// What we add to a caller's properties: names and JSON, each name once, and none that
/// the caller uses.
pub(crate) struct Added<'a> {
    given: Fields<'a>,
    fields: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

impl<'a> Added<'a> {
    /// Nothing yet, beside the properties that are this JSON.
    pub(crate) fn beside(given: &'a str) -> Self {
        Self { given: entries(given), fields: Vec::new() }
    }

    /// A value that is JSON.
    pub(crate) fn json(&mut self, name: impl Into<Cow<'a, str>>, json: impl Into<Cow<'a, str>>) {
        let name = name.into();
        if !self.has(&name) {
            self.fields.push((name, json.into()));
        }
    }

    /// A text.
    pub(crate) fn text(&mut self, name: &'static str, text: &str) {
        self.json(name, quoted(text));
    }

    /// A text, if there is one.
    pub(crate) fn optional(&mut self, name: &'static str, text: Option<&str>) {
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            self.text(name, text);
        }
    }

    /// What a context has of a vendor's names.
    pub(crate) fn rows(&mut self, context: &Context<'a>, rows: &[Row]) {
        for Row(path, is, name) in rows {
            if let Some(json) = context.find(path, *is) {
                self.json(*name, json);
            }
        }
    }

    /// The campaign that led to the event, under the names that a link has them by.
    pub(crate) fn campaign(&mut self, context: &Context<'a>) {
        let fields = context.section("campaign");
        if let Some(name) = get(fields, "name").filter(|name| Is::Text.fits(name)) {
            self.json("utm_campaign", name);
        }
        let is_plain = |name: &str| {
            name.len() <= CAMPAIGN_FIELD_BYTES_MAX
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        let others = fields
            .iter()
            .filter(|(name, value)| name != "name" && is_plain(name) && Is::Text.fits(value.get()));
        for (name, value) in others.take(CAMPAIGN_FIELDS_MAX) {
            self.json(format!("utm_{name}"), value.get());
        }
    }

    /// The text under a name, be it the caller's or ours.
    pub(crate) fn text_of(&self, name: &str) -> Option<String> {
        self.get(name).filter(|json| Is::Text.fits(json)).and_then(unquoted)
    }

    /// True if the caller uses a name, or we do.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// The names that were added.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().map(|(name, _)| &**name)
    }

    /// Writes what was added, without what the caller gave.
    pub(crate) fn write(&self, out: &mut Object<'_>) {
        self.fields.iter().for_each(|(name, json)| out.named_raw(name, json));
    }

    fn get(&self, name: &str) -> Option<&str> {
        let ours = || self.fields.iter().find(|(own, _)| own == name).map(|(_, json)| &**json);
        get(&self.given, name).or_else(ours)
    }
}

fn get<'a>(fields: &[(String, &'a RawValue)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(own, _)| own == name).map(|(_, value)| value.get())
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a text becomes JSON")
}

/// The text of a JSON text.
fn unquoted(json: &str) -> Option<String> {
    serde_json::from_str(json).ok()
}

/// The host of an address, if it is one.
pub(crate) fn host_of(address: &str) -> Option<String> {
    Url::parse(address).ok()?.host_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        EventParts, MoreParts,
        event::{JsonObject, tests_support::parts},
        json::Json,
        properties::Limits,
    };

    fn event(context: &str) -> Event {
        let context = JsonObject::parse(context, &Limits::DEFAULT).unwrap();
        let more = MoreParts { context: Some(context), ..MoreParts::default() };
        Event::pack(&EventParts { more: more.if_any(), ..parts("x", "{}") })
    }

    fn added(context: &str, given: &str, rows: &[Row]) -> String {
        let event = event(context);
        let context = Context::of(&event);
        let mut added = Added::beside(given);
        added.rows(&context, rows);
        added.campaign(&context);
        let mut json = Json::default();
        let mut object = Object::begin(&mut json);
        added.write(&mut object);
        object.end();
        String::from_utf8(json.into_bytes()).unwrap()
    }

    #[test]
    fn what_is_of_another_type_is_as_good_as_absent() {
        let rows = || {
            [
                Row("os.name", Is::Text, "os"),
                Row("screen.width", Is::Number, "width"),
                Row("network.wifi", Is::Flag, "wifi"),
                Row("locale", Is::Text, "locale"),
            ]
        };
        let good = r#"{"os":{"name":"é\n"},"screen":{"width":-1.5},"network":{"wifi":false},"locale":"de"}"#;
        assert_eq!(added(good, "{}", &rows()), r#"{"os":"é\n","width":-1.5,"wifi":false,"locale":"de"}"#);
        for other in [
            "{}",
            r#"{"os":"x","screen":[],"network":null,"locale":{}}"#,
            r#"{"os":{"name":""},"screen":{"width":"1"},"network":{"wifi":1},"locale":1}"#,
            r#"{"os":{"name":null},"screen":{"width":true},"network":{"wifi":"true"},"locale":""}"#,
        ] {
            assert_eq!(added(other, "{}", &rows()), "{}", "{other}");
        }
    }

    #[test]
    fn a_callers_own_property_wins_whatever_it_is() {
        let rows = [Row("os.name", Is::Text, "os"), Row("os.version", Is::Text, "version")];
        let context = r#"{"os":{"name":"a","version":"1"}}"#;
        assert_eq!(added(context, r#"{"os":null}"#, &rows), r#"{"version":"1"}"#);
    }

    #[test]
    fn a_campaign_has_the_names_of_a_link() {
        let context =
            r#"{"campaign":{"source":"s","campaign":"no","name":"n","odd name":"x","id":7,"term":""}}"#;
        assert_eq!(added(context, "{}", &[]), r#"{"utm_campaign":"n","utm_source":"s"}"#);
        let many: Vec<_> = (0..200).map(|i| format!(r#""x{i}":"v""#)).collect();
        let many = added(&format!(r#"{{"campaign":{{{}}}}}"#, many.join(",")), "{}", &[]);
        assert_eq!(many.matches("utm_").count(), CAMPAIGN_FIELDS_MAX);
    }

    #[test]
    fn what_the_relay_found_out_stands_in_for_what_the_caller_did_not_say() {
        let enriched = r#"{"v":1,"agent":{"browser":"Firefox","os":"Linux","os_version":"6","device":"desktop"},
            "geo":{"country":"DE","region":"DE-BE","city":"Berlin"},"campaign":{"source":"mail"}}"#;
        let rows = || {
            [
                Row("os.name", Is::Text, "os"),
                Row("os.version", Is::Text, "version"),
                Row("browser.name", Is::Text, "browser"),
                Row("location.country", Is::Text, "country"),
                Row("location.region", Is::Text, "region"),
            ]
        };
        let added = |context: &str, ip: Option<&str>| {
            let context = JsonObject::parse(context, &Limits::DEFAULT).unwrap();
            let enriched = Some(JsonObject::of_relay(enriched));
            let more = MoreParts { context: Some(context), enriched, ..MoreParts::default() };
            let ip = ip.map(|ip| ip.parse().unwrap());
            let event = Event::pack(&EventParts { more: more.if_any(), ip, ..parts("x", "{}") });
            let context = Context::of(&event);
            let mut added = Added::beside("{}");
            added.rows(&context, &rows());
            added.campaign(&context);
            assert_eq!(context.device_class().as_deref(), Some("desktop"));
            let mut json = Json::default();
            let mut object = Object::begin(&mut json);
            added.write(&mut object);
            object.end();
            String::from_utf8(json.into_bytes()).unwrap()
        };
        let place = r#","country":"DE","region":"DE-BE""#;
        let of_agent = r#""os":"Linux","version":"6","browser":"Firefox""#;
        let campaign = r#","utm_source":"mail""#;
        assert_eq!(added("{}", None), format!("{{{of_agent}{place}{campaign}}}"));
        assert_eq!(added("{}", Some("203.0.113.0")), format!("{{{of_agent}{campaign}}}"), "by its address");
        // Their own system of another version would be nobody's.
        let own = r#"{"os":{"name":"Own"},"campaign":{"name":"n"},"location":{"country":"FR"}}"#;
        let want = r#"{"os":"Own","browser":"Firefox","country":"FR","utm_campaign":"n"}"#;
        assert_eq!(added(own, None), want);
    }

    #[test]
    fn a_group_id_is_a_text_that_is_no_longer_than_an_id() {
        let long = format!(r#"{{"groupId":"{}"}}"#, "g".repeat(OTHER_ID_BYTES_MAX + 1));
        for (context, want) in [
            (r#"{"groupId":"g\"1"}"#, Some(r#""g\"1""#)),
            (r#"{"groupId":" "}"#, None),
            (r#"{"groupId":7}"#, None),
            ("{}", None),
            (&long, None),
        ] {
            assert_eq!(Context::of(&event(context)).group_id(), want);
        }
    }

    #[test]
    fn a_host_is_that_of_an_address_and_of_nothing_else() {
        for (address, want) in [
            ("https://g.co/s", Some("g.co")),
            ("http://user:pass@X.example:8080?q#f", Some("x.example")),
            ("/path", None),
            ("mailto:a@b.c", None),
            ("", None),
        ] {
            assert_eq!(host_of(address).as_deref(), want, "{address}");
        }
    }
}
