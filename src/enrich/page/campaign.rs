//! The campaign that led somebody to a page: what the caller says of it, and where that says
//! nothing, what the page's address does.

use std::{borrow::Cow, fmt};

use serde::{
    Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
    ser::{SerializeMap, SerializeSeq},
};
use serde_json::value::RawValue;

use super::parameters::{CLICK_IDS, FIELDS, Known, Parameter, clean, place_of};

/// What is known of a campaign. Each text as it was sent, tidied; at least one is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Campaign<'a> {
    /// Who sent somebody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Cow<'a, str>>,
    /// How.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub medium: Option<Cow<'a, str>>,
    /// `utm_campaign` in links.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Cow<'a, str>>,
    /// What was searched for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub term: Option<Cow<'a, str>>,
    /// Which of several links.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Cow<'a, str>>,
    /// The campaign's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Cow<'a, str>>,
}

impl<'a> Campaign<'a> {
    /// What a caller's object says. A name may be a link's; what is no text and no number is
    /// as good as absent.
    pub(super) fn of_json(json: &'a str) -> Self {
        serde_json::Deserializer::from_str(json).deserialize_map(OfJson).unwrap_or_default()
    }

    /// Takes a parameter's value for what nothing is known of yet.
    pub(super) fn take(&mut self, field: usize, parameter: &Parameter<'a>) {
        let slot = self.slot(field);
        if slot.is_none() {
            *slot = parameter.value();
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// By its place in [`FIELDS`].
    fn slot(&mut self, field: usize) -> &mut Option<Cow<'a, str>> {
        match field {
            0 => &mut self.source,
            1 => &mut self.medium,
            2 => &mut self.name,
            3 => &mut self.term,
            4 => &mut self.content,
            _ => &mut self.id,
        }
    }
}

struct OfJson;

impl<'de> Visitor<'de> for OfJson {
    type Value = Campaign<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut campaign = Campaign::default();
        while let Some((name, value)) = map.next_entry::<Cow<'_, str>, &RawValue>()? {
            let name = match name.get(..4) {
                Some(utm) if utm.eq_ignore_ascii_case("utm_") => &name[4..],
                _ if name.eq_ignore_ascii_case("name") => "campaign",
                _ => &name,
            };
            if let Some(field) = place_of(name, &FIELDS) {
                let slot = campaign.slot(field);
                *slot = slot.take().or_else(|| clean(text(value.get())?));
            }
        }
        Ok(campaign)
    }
}

/// A text, or a number as it stands.
pub(super) fn text(json: &str) -> Option<Cow<'_, str>> {
    match json.as_bytes() {
        // As it stands, if nothing in it is escaped.
        [b'"', inner @ .., b'"'] if !inner.contains(&b'\\') => Some(json[1..json.len() - 1].into()),
        [b'"', ..] => serde_json::from_str(json).ok().map(Cow::Owned),
        [b'-' | b'0'..=b'9', ..] => Some(json.into()),
        _ => None,
    }
}

/// The click ids of an address: which there are and, if that is wanted, what they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Clicks<'a> {
    ids: [Option<Cow<'a, str>>; CLICK_IDS.len()],
    has_values: bool,
}

impl<'a> Clicks<'a> {
    /// None yet. With their values, or by their names alone.
    pub(super) fn new(has_values: bool) -> Self {
        Self { has_values, ..Self::default() }
    }

    /// Of several with one name the first that is not empty.
    pub(super) fn take(&mut self, place: usize, parameter: &Parameter<'a>) {
        let slot = &mut self.ids[place];
        if slot.is_none() {
            *slot = parameter.click_id();
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ids.iter().all(Option::is_none)
    }

    /// True if one of these is there.
    pub(super) fn has(&self, names: &[&str]) -> bool {
        self.names().any(|name| names.contains(&name))
    }

    /// Those that are there.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.each().map(|(name, _)| name)
    }

    fn each(&self) -> impl Iterator<Item = (&'static str, &Cow<'a, str>)> {
        CLICK_IDS.into_iter().zip(&self.ids).filter_map(|(name, id)| Some((name, id.as_ref()?)))
    }
}

impl Serialize for Clicks<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.has_values {
            let mut map = serializer.serialize_map(None)?;
            self.each().try_for_each(|(name, id)| map.serialize_entry(name, id))?;
            return map.end();
        }
        let mut list = serializer.serialize_seq(None)?;
        self.names().try_for_each(|name| list.serialize_element(name))?;
        list.end()
    }
}

/// What a page's address says of where somebody came from.
#[derive(Debug, Default)]
pub(super) struct Found<'a> {
    pub(super) campaign: Campaign<'a>,
    pub(super) clicks: Clicks<'a>,
    /// Of `source` and `ref`, which name a source and are no campaign.
    pub(super) named: [Option<Cow<'a, str>>; 2],
}

impl<'a> Found<'a> {
    pub(super) fn take(&mut self, known: Known, parameter: &Parameter<'a>) {
        match known {
            Known::Utm(Some(field)) => self.campaign.take(field, parameter),
            Known::Utm(None) => {}
            Known::ClickId(place) => self.clicks.take(place, parameter),
            Known::Source | Known::Ref => {
                let slot = &mut self.named[usize::from(known == Known::Ref)];
                *slot = slot.take().or_else(|| parameter.value());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_object_is_read_leniently() {
        let json = r#"{"Name":"May\u0020 sale ","utm_source":"news","source":"late","UTM_CAMPAIGN":"x","medium":"",
            "MEDIUM":"email","term":null,"content":["a"],"id":42,"creative":"c"}"#;
        let campaign = Campaign::of_json(json);
        let want = r#"{"source":"news","medium":"email","name":"May sale","id":"42"}"#;
        assert_eq!(serde_json::to_string(&campaign).unwrap(), want);
        for nothing in ["{}", "[]", "7", "", "{", "null", r#"{"name":"{{campaign.name}}"}"#, r#"{"name":{}}"#]
        {
            assert!(Campaign::of_json(nothing).is_empty(), "{nothing}");
        }
    }

    #[test]
    fn click_ids_are_told_by_name_or_with_their_values() {
        let query = "fbclid=&fbclid=F1&GCLID=a%2Bb&fbclid=F2&wbraid=";
        for (has_values, want) in
            [(false, r#"["gclid","fbclid"]"#), (true, r#"{"gclid":"a+b","fbclid":"F1"}"#)]
        {
            let mut found = Found { clicks: Clicks::new(has_values), ..Found::default() };
            for parameter in super::super::parameters::parameters(query) {
                found.take(parameter.known().unwrap(), &parameter);
            }
            assert_eq!(serde_json::to_string(&found.clicks).unwrap(), want);
            assert!(found.clicks.has(&["fbclid"]) && !found.clicks.has(&["wbraid", "msclkid"]));
        }
    }
}
