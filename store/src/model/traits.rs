//! What is known about somebody: of each key the latest value.
//!
//! A value is later than another by (time, event id), so that no order of arrival and no
//! old import changes what is shown. A time in the future counts as five minutes after the
//! event was accepted: a clock in 2030 must not win for ever. `null` takes a key away and
//! is remembered, so that an older value does not bring it back. Objects and lists are
//! replaced whole.

use std::collections::BTreeMap;

use analytics_relay_providers::{Event, EventKind, event::JsonObject};
use serde_json::value::RawValue;

/// Most bytes of somebody's traits as JSON: more keys are refused.
pub const TRAITS_BYTES_MAX: usize = 10 * 1024;
/// So far into the future an event's clock is believed.
const AHEAD_MS: i64 = 5 * 60_000;

/// Of each key, when it was said and what: JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traits(BTreeMap<String, Said>);

/// Ordered by when it was said.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Said {
    time_ms: i64,
    event_id: String,
    json: String,
}

/// Time, event id, value.
type Stored = (i64, String, Box<RawValue>);

/// True if the event says something about its user or device.
pub fn tells(event: &Event) -> bool {
    matches!(event.kind(), EventKind::Identify) && event.subject().is_some()
}

impl Traits {
    /// Takes in what an identify says. Returns how many keys were refused, as it would be
    /// too much.
    pub fn tell(&mut self, event: &Event) -> usize {
        let time_ms = event.time_ms().min(event.accepted_ms().saturating_add(AHEAD_MS));
        let object = JsonObject::from(event.properties());
        let mut refused = 0;
        for (key, value) in object.entries() {
            let said =
                Said { time_ms, event_id: event.id().as_str().to_owned(), json: value.get().to_owned() };
            refused += usize::from(!self.say(key, said));
        }
        refused
    }

    fn say(&mut self, key: String, said: Said) -> bool {
        let known = self.0.get(&key);
        if known.is_some_and(|known| *known >= said) {
            return true;
        }
        let before = known.map_or(0, |known| known.json.len());
        let bytes = self.bytes() + said.json.len() - before + if known.is_none() { key.len() } else { 0 };
        if bytes > TRAITS_BYTES_MAX {
            return false;
        }
        self.0.insert(key, said);
        true
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(|(key, said)| key.len() + said.json.len()).sum()
    }

    /// Takes in what is known of the same person under another id.
    pub fn merge(&mut self, other: Self) {
        for (key, said) in other.0 {
            self.say(key, said);
        }
    }

    /// What is known of a device, where it is not known of its user.
    pub fn fill(&mut self, device: Self) {
        for (key, said) in device.0 {
            if !self.0.contains_key(&key) {
                self.say(key, said);
            }
        }
    }

    /// What is known, as a JSON object.
    pub fn shown(&self) -> String {
        let known = self.0.iter().filter(|(_, said)| said.json != "null");
        let entries: Vec<_> =
            known.map(|(key, said)| format!("{}:{}", serde_json::Value::from(&**key), said.json)).collect();
        format!("{{{}}}", entries.join(","))
    }

    /// As it is stored: a JSON object of key → [time, event id, value].
    pub fn to_stored(&self) -> String {
        let entry = |(key, said): (&String, &Said)| {
            let [key, id] = [&**key, &*said.event_id].map(serde_json::Value::from);
            format!("{key}:[{},{id},{}]", said.time_ms, said.json)
        };
        format!("{{{}}}", self.0.iter().map(entry).collect::<Vec<_>>().join(","))
    }

    /// As it was stored; what cannot be read is none.
    pub fn from_stored(stored: &str) -> Self {
        let read: Result<BTreeMap<String, Stored>, _> = serde_json::from_str(stored);
        let said =
            |(time_ms, event_id, json): Stored| Said { time_ms, event_id, json: json.get().to_owned() };
        Self(read.unwrap_or_default().into_iter().map(|(key, stored)| (key, said(stored))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::sessions::tests::permutations;

    fn identify(id: &str, time_ms: i64, traits: &str) -> Event {
        let json = format!(
            r#"{{"id":"{id}","kind":"identify","user_id":"u","time_ms":{time_ms},"accepted_ms":1000,"properties":{traits}}}"#
        );
        Event::from_json(json.as_bytes()).unwrap()
    }

    fn told(events: &[Event]) -> Traits {
        let mut traits = Traits::default();
        for event in events {
            assert_eq!(traits.tell(event), 0);
        }
        traits
    }

    #[test]
    fn all_permutations_of_six_identifies_tell_the_same() {
        let events = [
            identify("a", 1, r#"{"plan":"free","n":1}"#),
            identify("b", 2, r#"{"plan":"pro"}"#),
            identify("c", 2, r#"{"plan":"team","list":[1,{"x":"é\u0000"}]}"#),
            identify("d", 3, r#"{"n":null}"#),
            identify("e", 2, r#"{"n":2}"#),
            identify("f", 1, r#"{"a\"":true}"#),
        ];
        for events in permutations(&events) {
            let traits = told(&events);
            assert_eq!(traits.shown(), r#"{"a\"":true,"list":[1,{"x":"é\u0000"}],"plan":"team"}"#);
            assert_eq!(Traits::from_stored(&traits.to_stored()), traits);
        }
    }

    #[test]
    fn a_clock_that_is_ahead_does_not_win_for_ever() {
        let ahead = identify("a", 1_900_000_000_000, r#"{"plan":"old"}"#);
        let later = identify("b", 1_000 + AHEAD_MS + 1, r#"{"plan":"new"}"#);
        let mut traits = told(&[ahead]);
        // Accepted later, too.
        let json = String::from_utf8(later.to_json()).unwrap().replace(":1000,", ":2000000,");
        traits.tell(&Event::from_json(json.as_bytes()).unwrap());
        assert_eq!(traits.shown(), r#"{"plan":"new"}"#);
    }

    #[test]
    fn of_too_much_new_keys_are_refused_and_known_ones_are_kept() {
        let mut traits = told(&[identify("a", 1, r#"{"plan":"pro"}"#)]);
        let much = format!(r#"{{"text":"{}"}}"#, "x".repeat(TRAITS_BYTES_MAX));
        assert_eq!(traits.tell(&identify("b", 2, &much)), 1);
        assert_eq!(traits.shown(), r#"{"plan":"pro"}"#);
    }

    #[test]
    fn a_devices_traits_show_where_its_users_say_nothing() {
        let mut user = told(&[identify("a", 1, r#"{"plan":"pro","gone":null}"#)]);
        user.fill(told(&[identify("b", 9, r#"{"plan":"free","gone":1,"seen":true}"#)]));
        assert_eq!(user.shown(), r#"{"plan":"pro","seen":true}"#);
    }
}
