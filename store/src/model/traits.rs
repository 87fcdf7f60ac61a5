//! What is known about somebody: of each key the latest value.
//!
//! A value is later than another by (time, event id), so that no order of arrival and no
//! old import changes what is shown. A time in the future counts as five minutes after the
//! event was accepted: a clock in 2030 must not win for ever. `null` takes a key away and
//! is remembered, so that an older value does not bring it back, until something is known
//! that is 90 days newer: an older value that comes later than that does bring it back.
//! Objects and lists are replaced whole. A value that is equal and newer is noted as well,
//! however little newer: else one of a time between would win or not by when it came.

use std::collections::BTreeMap;

use analytics_relay_providers::{Event, EventKind, event::JsonObject, means_nobody};
use serde_json::value::RawValue;

/// Most bytes of somebody's traits as JSON: more keys are refused.
pub const TRAITS_BYTES_MAX: usize = 10 * 1024;
/// So long it is remembered that a key was taken away: after it until the newest that is
/// known, by the times of events, so that it is the same whenever it is looked at.
const TAKEN_AWAY_MS: i64 = 90 * 86_400_000;
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
    matches!(event.kind(), EventKind::Identify) && event.subject().is_some_and(|id| !means_nobody(id))
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
        self.forget_taken_away();
        refused
    }

    fn forget_taken_away(&mut self) {
        let Some(newest_ms) = self.0.values().map(|said| said.time_ms).max() else { return };
        let from_ms = newest_ms.saturating_sub(TAKEN_AWAY_MS);
        self.0.retain(|_, said| said.json != "null" || said.time_ms >= from_ms);
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

    /// True if nothing was said, not even that something is gone.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(|(key, said)| key.len() + said.json.len()).sum()
    }

    /// Takes in what is known of the same person under another id, or in another store.
    pub fn merge(&mut self, other: Self) {
        for (key, said) in other.0 {
            self.say(key, said);
        }
        self.forget_taken_away();
    }

    /// What is known of a user's devices, where it is not known of the user.
    pub fn fill(&mut self, devices: Self) {
        for (key, said) in devices.0 {
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
        Self::read(stored).unwrap_or_default()
    }

    /// As it was stored, if it can be read.
    pub fn read(stored: &str) -> Option<Self> {
        let read: BTreeMap<String, Stored> = serde_json::from_str(stored).ok()?;
        let said =
            |(time_ms, event_id, json): Stored| Said { time_ms, event_id, json: json.get().to_owned() };
        Some(Self(read.into_iter().map(|(key, stored)| (key, said(stored))).collect()))
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
    fn a_value_that_is_said_again_is_newer_than_another_of_between_whichever_came_first() {
        let minute = 60_000;
        let events = [
            identify("a", 0, r#"{"plan":"pro"}"#),
            identify("b", minute, r#"{"plan":"free"}"#),
            identify("c", 2 * minute, r#"{"plan":"pro"}"#),
            identify("d", 3 * minute, r#"{"n":1}"#),
            identify("e", 4 * minute, r#"{"n":2}"#),
            identify("f", 5 * minute, r#"{"n":1}"#),
        ];
        for events in permutations(&events) {
            assert_eq!(told(&events).shown(), r#"{"n":1,"plan":"pro"}"#);
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

    #[test]
    fn what_was_taken_away_is_forgotten_after_ninety_days_of_events() {
        let day = |n: i64| n * 86_400_000;
        let identify = |id: &str, time_ms: i64, traits: &str| {
            let json = format!(
                r#"{{"id":"{id}","kind":"identify","user_id":"u","time_ms":{time_ms},"accepted_ms":{time_ms},"properties":{traits}}}"#
            );
            Event::from_json(json.as_bytes()).unwrap()
        };
        let mut traits =
            told(&[identify("a", day(1), r#"{"plan":null}"#), identify("b", day(91), r#"{"n":1}"#)]);
        traits.tell(&identify("c", day(0), r#"{"plan":"old"}"#));
        assert_eq!(traits.shown(), r#"{"n":1}"#, "exactly 90 days are remembered");
        traits.tell(&identify("d", day(91) + 1, r#"{"n":2}"#));
        assert!(!traits.to_stored().contains("plan"), "{}", traits.to_stored());
        // So it is, whichever of the two came first.
        let other =
            told(&[identify("b", day(91) + 1, r#"{"n":2}"#), identify("a", day(1), r#"{"plan":null}"#)]);
        assert_eq!(other.to_stored().replace("\"b\"", "\"d\""), traits.to_stored());
    }

    #[test]
    fn nobody_has_no_traits() {
        let of = |user: &str| {
            let json = identify("a", 1, "{}").to_json();
            let json = String::from_utf8(json).unwrap().replace("\"u\"", &format!("\"{user}\""));
            tells(&Event::from_json(json.as_bytes()).unwrap())
        };
        assert!(of("u") && !of("null") && !of("0000"));
    }
}
