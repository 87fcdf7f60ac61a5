//! Removes what a name that occurs twice in one object makes ambiguous.

use std::{collections::HashSet, fmt};

use serde::{
    Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

/// Valid JSON with each name once in each object, the last one; nothing if it is so
/// already. As deep as the text is, which was checked before.
pub(super) fn removed(json: &str) -> Option<String> {
    let (mut once, mut found) = (String::with_capacity(json.len()), false);
    write(json.trim(), &mut once, &mut found);
    found.then_some(once)
}

fn write(json: &str, once: &mut String, found: &mut bool) {
    match json.as_bytes() {
        [b'{', ..] => {
            let entries = entries(json);
            let mut later = HashSet::new();
            let mut kept: Vec<_> = entries.iter().rev().filter(|(name, _)| later.insert(name)).collect();
            *found |= kept.len() < entries.len();
            kept.reverse();
            let kept = kept.into_iter().map(|(name, value)| (Some(name), *value));
            write_all(['{', '}'], kept, once, found);
        }
        [b'[', ..] => {
            let items: Vec<&RawValue> = serde_json::from_str(json).expect("the text was checked");
            write_all(['[', ']'], items.into_iter().map(|value| (None, value)), once, found);
        }
        _ => once.push_str(json),
    }
}

fn write_all<'a>(
    [open, close]: [char; 2],
    values: impl Iterator<Item = (Option<&'a String>, &'a RawValue)>,
    once: &mut String,
    found: &mut bool,
) {
    once.push(open);
    for (place, (name, value)) in values.enumerate() {
        if place > 0 {
            once.push(',');
        }
        if let Some(name) = name {
            once.push_str(&serde_json::to_string(name).expect("a text becomes JSON"));
            once.push(':');
        }
        write(value.get(), once, found);
    }
    once.push(close);
}

/// The names and values of an object that was checked, values as JSON text.
pub(crate) fn entries(json: &str) -> Vec<(String, &RawValue)> {
    struct Entries;
    impl<'de> Visitor<'de> for Entries {
        type Value = Vec<(String, &'de RawValue)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            std::iter::from_fn(|| map.next_entry().transpose()).collect()
        }
    }
    serde_json::Deserializer::from_str(json).deserialize_map(Entries).expect("the text was checked")
}
