//! Pages and screens at vendors that know only tracks: as an event with a name that is
//! the same for all of them, because a vendor limits how many names there are, and what
//! page or screen it was as properties.

use crate::{
    Event, EventKind,
    json::{Json, Object},
    properties::{Limits, Properties},
};

/// Segment's own names for both at such vendors.
const PAGE: &str = "Loaded a Page";
const SCREEN: &str = "Loaded a Screen";

/// The name and the properties of an event that a vendor takes as a track, if it can be
/// one. A caller's own property wins over what we would add under its name.
pub(crate) fn as_track(event: &Event) -> Option<(&str, Properties<'_>)> {
    match event.kind() {
        EventKind::Track { name } => Some((name, event.properties())),
        EventKind::Page { name, category } => Some((PAGE, with(event, name, category))),
        EventKind::Screen { name, category } => Some((SCREEN, with(event, name, category))),
        EventKind::Identify
        | EventKind::Group { .. }
        | EventKind::Alias { .. }
        | EventKind::Unknown { .. } => None,
    }
}

fn with<'a>(event: &'a Event, name: Option<&str>, category: Option<&str>) -> Properties<'a> {
    let properties = event.properties();
    let given = properties.entries();
    let is_missing = |key: &str| !given.iter().any(|(own, _)| own == key);
    let ours = [("name", name), ("category", category)];
    let ours = ours.map(|(key, value)| (key, value.filter(|_| is_missing(key))));
    if ours.iter().all(|(_, value)| value.is_none()) {
        return properties;
    }
    let mut json = Json::default();
    let mut object = Object::begin(&mut json);
    for (key, value) in ours {
        object.optional(key, value);
    }
    object.splice(properties.json());
    object.end();
    let json = String::from_utf8(json.into_bytes()).expect("only UTF-8 was written");
    let all = Properties::parse(&json, &Limits::NONE).expect("both parts are JSON");
    all.into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EventParts, event::tests_support::parts};

    #[test]
    fn a_page_is_an_event_with_its_name_among_its_properties() {
        let page = |name, category| EventKind::Page { name, category };
        let screen = |name, category| EventKind::Screen { name, category };
        for (kind, given, name, want) in [
            (page(Some("Home"), None), r#"{"url":"/"}"#, PAGE, r#"{"name":"Home","url":"/"}"#),
            (page(Some("B"), Some("Docs")), r#"{"name":"A"}"#, PAGE, r#"{"category":"Docs","name":"A"}"#),
            (page(None, None), "{}", PAGE, "{}"),
            (screen(Some("\"é"), None), " { } ", SCREEN, r#"{"name":"\"é"}"#),
            (EventKind::Track { name: "x" }, r#"{"a":1}"#, "x", r#"{"a":1}"#),
        ] {
            let event = Event::pack(&EventParts { kind, ..parts("x", given) });
            let (as_name, properties) = as_track(&event).unwrap();
            assert_eq!((as_name, properties.json()), (name, want));
        }
        for kind in [EventKind::Identify, EventKind::Group { group_id: "g" }] {
            assert!(as_track(&Event::pack(&EventParts { kind, ..parts("x", "{}") })).is_none());
        }
    }
}
