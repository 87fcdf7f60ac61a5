//! Groups: what is known of one is a profile at `/groups`. Mixpanel knows who belongs to
//! it by a property of each event, and by one of the user's profile.

use super::{Entry, Mixpanel, Names, set_and_unset, updates_request};
use crate::{
    Endpoint, Event, EventKind, NotFor,
    context::{Added, Context},
    http::{Encoded, body_for, no_form},
    json::{List, Object},
};

const GROUPS: Endpoint = Endpoint(2);
const GROUPS_PATH: &str = "/groups?ip=0&verbose=1";

impl Mixpanel {
    #[cold]
    pub(super) fn group_endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
        let says_nothing = event.properties().shape().top_keys == 0;
        match self.view.group_type() {
            None => Err(NotFor::NoGroupType),
            // A profile has a property at least.
            Some(_) if says_nothing => Err(NotFor::NothingToSet),
            Some(_) => Ok(GROUPS),
        }
    }

    /// The groups of a batch, and what is in the batch without being one for Mixpanel.
    #[cold]
    pub(super) fn encode_groups(&self, batch: &[Event]) -> Encoded {
        let mut body = body_for(batch);
        let mut updates = List::begin(&mut body);
        let mut count = 0;
        let mut rejected = Vec::new();
        for (index, event) in batch.iter().enumerate() {
            match (event.kind(), self.view.group_type()) {
                (EventKind::Group { group_id }, Some(group_type)) => {
                    count += self.encode_group(&mut updates, event, [group_type, group_id]);
                }
                _ => rejected.push(no_form(index, event)),
            }
        }
        updates.end();
        updates_request(GROUPS_PATH, body, count, rejected)
    }

    /// Writes the updates of one group and returns their number.
    fn encode_group(&self, updates: &mut List<'_>, event: &Event, group: [&str; 2]) -> usize {
        let traits = event.properties();
        let mut names = Names::default();
        let entries: Vec<Entry<'_>> =
            traits.entries().into_iter().map(|(key, value)| (names.unique(key), value)).collect();
        set_and_unset(updates, &entries, |update| self.begin_group(update, group))
    }

    fn begin_group<'a>(&self, mut update: Object<'a>, [group_type, group_id]: [&str; 2]) -> Object<'a> {
        update.string("$token", self.token.expose());
        update.string("$group_key", group_type);
        update.string("$group_id", group_id);
        update
    }

    /// Writes that an identify's user belongs to its context's group, beside the groups
    /// that they belong to already, and returns the number of updates.
    #[cold]
    pub(super) fn encode_membership(&self, updates: &mut List<'_>, event: &Event, user: &str) -> usize {
        let context = Context::of(event);
        let traits = event.properties();
        let given = Added::beside(traits.json());
        let group = self.view.group_type().zip(context.group_id());
        let Some((group_type, id)) = group.filter(|(group_type, _)| !given.has(group_type)) else { return 0 };
        let mut update = self.begin_update(updates.object(), event, user);
        let mut union = update.object("$union");
        union.named_raw(group_type, &format!("[{id}]"));
        union.end();
        update.end();
        1
    }

    /// A request without a group.
    pub(super) fn probe_of_groups(&self) -> Encoded {
        Encoded { path: GROUPS_PATH, body: b"[]".to_vec(), ..Encoded::default() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        EventParts, MoreParts, Secret,
        event::{JsonObject, tests_support::parts},
        http::Wire,
        mixpanel::IdentityMode,
        properties::Limits,
        view::{GroupType, View},
    };

    fn wire() -> Mixpanel {
        let group_type = Some(GroupType::parse("company").unwrap());
        let view = View { group_type, ..View::default() };
        Mixpanel::new(Secret::new("token"), IdentityMode::Simplified).with_view(view)
    }

    fn group(traits: &str) -> Event {
        Event::pack(&EventParts { kind: EventKind::Group { group_id: "g1" }, ..parts("x", traits) })
    }

    fn updates(event: Event) -> Value {
        let encoded = wire().encode(&[event], 0);
        assert!(encoded.rejected.is_empty() && encoded.body_bytes_max > 0);
        serde_json::from_slice(&encoded.body).unwrap()
    }

    #[test]
    fn a_group_is_set_and_unset_in_two_updates() {
        assert_eq!(
            updates(group(r#"{"plan":"pro","old":null,"name":"ACME"}"#)),
            json!([
                {"$token": "token", "$group_key": "company", "$group_id": "g1",
                 "$set": {"plan": "pro", "name": "ACME"}},
                {"$token": "token", "$group_key": "company", "$group_id": "g1", "$unset": ["old"]},
            ])
        );
        assert_eq!(updates(group(r#"{"old":null}"#)).as_array().unwrap().len(), 1);
        assert_eq!(wire().endpoint(&group("{}")), Err(NotFor::NothingToSet));
        let long = format!(r#"{{"{}":1}}"#, "k".repeat(300));
        assert!(updates(group(&long))[0]["$set"].as_object().unwrap().keys().all(|key| key.len() == 255));
    }

    #[test]
    fn without_a_type_there_are_no_groups() {
        let without = Mixpanel::new(Secret::new("token"), IdentityMode::Simplified);
        assert_eq!(without.endpoint(&group(r#"{"a":1}"#)), Err(NotFor::NoGroupType));
        assert_eq!(without.encode(&[group(r#"{"a":1}"#)], 0).rejected.len(), 1);
    }

    #[test]
    fn an_identify_with_a_group_adds_it_to_those_of_its_user() {
        let identify = |traits: &str, context: &str| {
            let context = JsonObject::parse(context, &Limits::DEFAULT).unwrap();
            let more = MoreParts { context: Some(context), ..MoreParts::default() };
            let event = EventParts { kind: EventKind::Identify, more: more.if_any(), ..parts("x", traits) };
            updates(Event::pack(&event))
        };
        assert_eq!(
            identify(r#"{"plan":"pro"}"#, r#"{"groupId":"g1","locale":"de"}"#),
            json!([
                {"$token": "token", "$distinct_id": "user-1", "$ip": "0", "$set": {"plan": "pro"}},
                {"$token": "token", "$distinct_id": "user-1", "$ip": "0", "$union": {"company": ["g1"]}},
            ])
        );
        for (traits, context) in
            [(r#"{"company":"own"}"#, r#"{"groupId":"g1"}"#), (r#"{"plan":"pro"}"#, r#"{"locale":"de"}"#)]
        {
            assert_eq!(identify(traits, context).as_array().unwrap().len(), 1);
        }
    }

    #[test]
    fn a_batch_of_more_updates_than_mixpanel_takes_goes_in_halves() {
        let batch = vec![group(r#"{"a":1,"b":null}"#); 1001];
        assert_eq!(wire().encode(&batch, 0).body_bytes_max, 0);
        assert!(wire().encode(&batch[..1000], 0).body_bytes_max > 0);
    }
}
