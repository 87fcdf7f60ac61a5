//! Groups: what is known of one, and who belongs to it, are two events to Amplitude.
//!
//! A group is delivered only if both are. The answer counts and names events of
//! Amplitude's: [`Records`] says whose they are.

use super::{Amplitude, BatchReply, IDENTIFY, Ids, encode_traits, no_usable_id, write_head};
use crate::{
    Endpoint, Event, EventKind, NotFor, Rejection,
    http::{Encoded, body_for, no_form},
    json::{List, Object},
};

/// Groups have requests of their own, so that nobody else's answers have to be counted.
pub(super) const GROUPS: Endpoint = Endpoint(1);

/// The second event's part of its id.
const MEMBER: &str = "member";

impl Amplitude {
    #[cold]
    pub(super) fn group_endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
        match self.view.group_type() {
            None => Err(NotFor::NoGroupType),
            Some(_) if records_of(event) == 0 => Err(NotFor::NothingToSet),
            Some(_) => Ok(GROUPS),
        }
    }

    /// The groups of a batch, and what is in the batch without being one for Amplitude.
    #[cold]
    pub(super) fn encode_groups(&self, batch: &[Event]) -> Encoded {
        let mut body = body_for(batch);
        let mut rejected = Vec::new();
        let mut request = self.begin_upload(&mut body, &self.api_key);
        let mut events = request.list("events");
        for (index, event) in batch.iter().enumerate() {
            match self.encode_group(&mut events, event) {
                Ok(()) => {}
                Err(Rejection::UnusableId) => rejected.push(no_usable_id(index)),
                Err(_) => rejected.push(no_form(index, event)),
            }
        }
        events.end();
        request.end();
        self.upload(body, rejected)
    }

    fn encode_group(&self, events: &mut List<'_>, event: &Event) -> Result<(), Rejection> {
        let (EventKind::Group { group_id }, Some(group_type)) = (event.kind(), self.view.group_type()) else {
            return Err(Rejection::UnknownKind);
        };
        let ids = self.ids(event).ok_or(Rejection::UnusableId)?;
        if has_traits(event) {
            let insert_id = event.id();
            let mut object = begin_group(
                events,
                event,
                &ids,
                "$groupidentify",
                insert_id.as_str(),
                [group_type, group_id],
            );
            encode_traits(object.object("group_properties"), &event.properties());
            object.end();
        }
        if has_member(event) {
            let insert_id = event.id().namespaced_as(MEMBER).to_string();
            let mut object = begin_group(events, event, &ids, IDENTIFY, &insert_id, [group_type, group_id]);
            let mut operations = object.object("user_properties");
            let mut set = operations.object("$set");
            set.named_string(group_type, group_id);
            set.end();
            operations.end();
            object.end();
        }
        Ok(())
    }
}

fn begin_group<'a>(
    events: &'a mut List<'_>,
    event: &Event,
    ids: &Ids<'_>,
    event_type: &str,
    insert_id: &str,
    [group_type, group_id]: [&str; 2],
) -> Object<'a> {
    let mut object = events.object();
    object.string("event_type", event_type);
    write_head(&mut object, event, ids, insert_id, event.user_agent());
    let mut groups = object.object("groups");
    groups.named_string(group_type, group_id);
    groups.end();
    object
}

/// Amplitude has no use for a group of which nothing is said.
fn has_traits(event: &Event) -> bool {
    event.properties().shape().top_keys > 0
}

/// Nobody becomes no member: the device that stands in for nobody is new each time.
fn has_member(event: &Event) -> bool {
    event.subject().is_some()
}

fn records_of(event: &Event) -> usize {
    usize::from(has_traits(event)) + usize::from(has_member(event))
}

/// Whose Amplitude's events of a request are.
pub(super) enum Records {
    /// One of each of ours, so many.
    Alike(usize),
    /// Of groups, up to two of each of ours: the place among ours, for each of
    /// Amplitude's.
    Of(Vec<usize>),
}

impl Records {
    /// Of a batch that was sent.
    pub(super) fn of(sent: &[&Event]) -> Self {
        if sent.first().is_some_and(|event| matches!(event.kind(), EventKind::Group { .. })) {
            let places = sent.iter().enumerate();
            Self::Of(places.flat_map(|(place, event)| vec![place; records_of(event)]).collect())
        } else {
            Self::Alike(sent.len())
        }
    }

    /// What an answer says, with our places in the place of Amplitude's. What is behind
    /// the last one nobody sent.
    pub(super) fn placed(&self, mut parsed: BatchReply) -> BatchReply {
        let Self::Of(places) = self else { return parsed };
        let place = |indexes: &mut Vec<usize>| {
            *indexes = indexes.iter().filter_map(|index| places.get(*index).copied()).collect();
        };
        let fields = [
            &mut parsed.events_with_invalid_fields,
            &mut parsed.events_with_missing_fields,
            &mut parsed.events_with_invalid_id_lengths,
        ];
        fields.into_iter().flat_map(|field| field.values_mut()).for_each(place);
        [&mut parsed.silenced_events, &mut parsed.throttled_events].into_iter().for_each(place);
        parsed
    }

    /// Whether so many may have been taken, if some of ours were named: all of
    /// Amplitude's, or all but one or more of each that was named.
    pub(super) fn may_be(&self, ingested: usize, is_named: impl Fn(usize) -> bool) -> bool {
        match self {
            Self::Alike(sent) => {
                ingested == *sent || ingested == *sent - (0..*sent).filter(|place| is_named(*place)).count()
            }
            Self::Of(places) => {
                let mut named: Vec<_> = places.iter().filter(|place| is_named(**place)).collect();
                let all = named.len();
                named.dedup();
                let fewer = places.len() - all..=places.len() - named.len();
                ingested == places.len() || fewer.contains(&ingested)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        EventParts, Secret, SendError, Verdict,
        event::tests_support::parts,
        http::{Reply, Wire},
        view::{GroupType, View},
    };

    fn wire() -> Amplitude {
        let group_type = Some(GroupType::parse("company").unwrap());
        Amplitude::new(Secret::new("key"), 1).with_view(View { group_type, ..View::default() })
    }

    fn group(user_id: Option<&str>, traits: &str) -> Event {
        let kind = EventKind::Group { group_id: "g1" };
        Event::pack(&EventParts { kind, user_id, ..parts("x", traits) })
    }

    fn events(event: Event) -> Vec<Value> {
        let encoded = wire().encode(&[event], 0);
        assert!(encoded.rejected.is_empty());
        let mut body: Value = serde_json::from_slice(&encoded.body).unwrap();
        body["events"].as_array_mut().unwrap().drain(..).collect()
    }

    fn interpret(sent: &[Event], status: u16, body: &Value) -> Result<Vec<Verdict>, SendError> {
        let reply = Reply { status, body: body.to_string(), ..Reply::default() };
        wire().interpret(&sent.iter().collect::<Vec<_>>(), &reply)
    }

    fn kinds(verdicts: &[Verdict]) -> String {
        let letter = |verdict: &Verdict| match verdict {
            Verdict::Delivered => 'd',
            Verdict::Rejected { .. } => 'x',
            Verdict::Resend => 'r',
            Verdict::Hold { .. } => 'h',
        };
        verdicts.iter().map(letter).collect()
    }

    #[test]
    fn a_group_is_what_is_known_of_it_and_who_belongs_to_it() {
        let found = events(group(Some("user-1"), r#"{"plan":"pro","old":null}"#));
        let [known, member] = &found[..] else { panic!("{found:?}") };
        assert_eq!((&known["event_type"], &known["insert_id"]), (&json!("$groupidentify"), &json!("id-1")));
        assert_eq!(known["groups"], json!({"company": "g1"}));
        assert_eq!(known["group_properties"], json!({"$set": {"plan": "pro"}, "$unset": {"old": "-"}}));
        assert_eq!(known.get("user_properties"), None);
        assert_eq!((&member["event_type"], &member["user_id"]), (&json!("$identify"), &json!("user-1")));
        assert_eq!(member["groups"], json!({"company": "g1"}));
        assert_eq!(member["user_properties"], json!({"$set": {"company": "g1"}}));
        // Pinned: another one would turn every retry across an upgrade into a duplicate.
        assert_eq!(member["insert_id"], "6ed27759-dddb-5f3d-94c2-eafd4750f734");
        assert_eq!((&member["time"], &known["time"]), (&json!(1_767_225_600_000_i64), &member["time"]));
    }

    #[test]
    fn a_group_of_which_or_by_whom_nothing_is_said_is_one_event_or_none() {
        let types = |user, traits| -> Vec<Value> {
            events(group(user, traits)).iter().map(|event| event["event_type"].clone()).collect()
        };
        assert_eq!(types(Some("user-1"), "{}"), ["$identify"]);
        assert_eq!(types(None, r#"{"plan":"pro"}"#), ["$groupidentify"]);
        assert_eq!(wire().endpoint(&group(None, "{}")), Err(NotFor::NothingToSet));
        let without = Amplitude::new(Secret::new("key"), 1);
        assert_eq!(without.endpoint(&group(Some("user-1"), "{}")), Err(NotFor::NoGroupType));
        assert_eq!(without.encode(&[group(Some("user-1"), "{}")], 0).rejected.len(), 1);
    }

    #[test]
    fn an_index_names_the_group_that_has_it_among_its_events() {
        let sent =
            [group(Some("u"), r#"{"a":1}"#), group(None, r#"{"a":1}"#), group(Some("u"), r#"{"a":1}"#)];
        for (index, want) in [(0, "xrr"), (1, "xrr"), (2, "rxr"), (3, "rrx"), (4, "rrx"), (5, "")] {
            let body = json!({"code": 400, "error": "e", "events_with_invalid_fields": {"groups": [index]}});
            let got = interpret(&sent, 400, &body);
            assert_eq!(got.map_or(String::new(), |verdicts| kinds(&verdicts)), want, "{index}");
        }
        let held = json!({"code": 429, "error": "e", "throttled_events": [3]});
        assert_eq!(kinds(&interpret(&sent, 429, &held).unwrap()), "rrh");
    }

    #[test]
    fn groups_are_delivered_if_all_their_events_are_counted() {
        let sent = [group(Some("u"), r#"{"a":1}"#), group(Some("v"), r#"{"a":1}"#)];
        for (ingested, silenced, want) in [
            (4, json!([]), "dd"),
            (2, json!([]), ""),
            (3, json!([]), ""),
            (3, json!([1]), "xd"),
            (2, json!([0, 1]), "xd"),
            (1, json!([1]), "xr"),
        ] {
            let body = json!({"code": 200, "events_ingested": ingested, "silenced_events": silenced});
            let got = interpret(&sent, 200, &body);
            assert_eq!(got.map_or(String::new(), |verdicts| kinds(&verdicts)), want, "{body}");
        }
    }
}
