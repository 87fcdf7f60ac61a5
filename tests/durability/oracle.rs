//! What the callers know: each event that was sent, and what was answered.

use std::collections::{BTreeMap, HashMap, HashSet};

use analytics_relay::{
    proto::v1::{
        Durability, IdentifyUserRequest, PropertyValue, TrackEventRequest, property_value::Value as Kind,
    },
    providers::sandbox::{Taken, TakenKind, Vendor},
};
use serde_json::Value;
use tonic::{Code, Status};

use crate::harness::{Client, Setup, lines_on_disk};

/// An event that two of the sandboxed providers refuse, if they are told to.
pub(crate) const REFUSABLE: &str = "Order Lost";

/// What is to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) identify: bool,
    /// None of an event that must be refused.
    pub(crate) name: &'static str,
    pub(crate) user: String,
    pub(crate) level: Durability,
    /// Bytes that make the event larger.
    pub(crate) filler: usize,
}

impl Draft {
    pub(crate) fn track(level: Durability) -> Self {
        Self { identify: false, name: "Order Placed", user: "user-1".to_owned(), level, filler: 0 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// What the relay says the OK means.
    Ok(Durability),
    /// Nobody can know whether it is in the log.
    Unknown(Code),
    /// It must never arrive.
    Refused(Code),
}

#[derive(Debug)]
struct Sent {
    draft: Draft,
    /// A value that no other event has.
    mark: String,
    answer: Answer,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    sent: HashMap<String, Sent>,
}

/// What the oracle found at one provider.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Found {
    /// Distinct events that the provider took.
    pub(crate) delivered: u64,
    /// Times that it took one of them again.
    pub(crate) duplicates: u64,
    pub(crate) dead_lettered: u64,
    /// Distinct events that it took or that became dead letters.
    pub(crate) ended: u64,
    /// Events that were answered with WRITTEN and are gone.
    pub(crate) written_lost: u64,
}

impl Oracle {
    /// Sends one event and notes the answer.
    pub(crate) async fn send(&mut self, client: &mut Client, draft: Draft) -> Answer {
        let (id, mark) = (uuid::Uuid::now_v7().to_string(), format!("{:016x}", fastrand::u64(..)));
        // A profile at Mixpanel has no id: each call has a user of its own.
        let user = if draft.identify { format!("of-{id}") } else { draft.user.clone() };
        let text = |text: String| PropertyValue { value: Some(Kind::StringValue(text)) };
        let properties =
            [("mark".to_owned(), text(mark.clone())), ("filler".to_owned(), text("x".repeat(draft.filler)))]
                .into();
        let (event_id, durability) = (id.clone(), draft.level.into());
        let answered = if draft.identify {
            let request =
                IdentifyUserRequest { user_id: user, properties, event_id, durability, ..Default::default() };
            let answer = client.identify_user(request).await.map(tonic::Response::into_inner);
            answer.map(|answer| (answer.durability(), answer.event_id))
        } else {
            let event_name = draft.name.to_owned();
            let request = TrackEventRequest {
                event_name,
                user_id: user,
                properties,
                event_id,
                durability,
                ..Default::default()
            };
            let answer = client.track_event(request).await.map(tonic::Response::into_inner);
            answer.map(|answer| (answer.durability(), answer.event_id))
        };
        let answer = match answered {
            Ok((level, answered_id)) => {
                assert_eq!(answered_id, id);
                assert!(level >= draft.level, "asked for {:?}, got {level:?}", draft.level);
                Answer::Ok(level)
            }
            Err(status) => refusal(&status),
        };
        self.sent.insert(id, Sent { draft, mark, answer: answer.clone() });
        answer
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.sent.extend(other.sent);
    }

    pub(crate) fn ids(&self) -> Vec<String> {
        self.sent.keys().cloned().collect()
    }

    fn count(&self, is_it: impl Fn(&Answer) -> bool) -> u64 {
        self.sent.values().filter(|sent| is_it(&sent.answer)).count() as u64
    }

    pub(crate) fn oks(&self) -> u64 {
        self.count(|answer| matches!(answer, Answer::Ok(_)))
    }

    pub(crate) fn oks_of(&self, level: Durability) -> u64 {
        self.count(|answer| *answer == Answer::Ok(level))
    }

    pub(crate) fn unknown(&self) -> u64 {
        self.count(|answer| matches!(answer, Answer::Unknown(_)))
    }

    pub(crate) fn refused(&self) -> u64 {
        self.count(|answer| matches!(answer, Answer::Refused(_)))
    }

    /// The codes of the answers that were none or a refusal.
    pub(crate) fn codes(&self) -> BTreeMap<String, u64> {
        let mut codes = BTreeMap::new();
        for sent in self.sent.values() {
            if let Answer::Unknown(code) | Answer::Refused(code) = sent.answer {
                *codes.entry(format!("{code:?}")).or_default() += 1;
            }
        }
        codes
    }

    /// Every event that was answered OK is delivered or a dead letter; nothing
    /// arrived that was not sent, that was refused, or that is not as it was
    /// sent; and nothing stands twice at a provider that recognises copies.
    pub(crate) fn check(&self, setup: &Setup, vendor: Vendor) -> Found {
        let found = self.compare(setup, vendor);
        assert_eq!(found.written_lost, 0, "{vendor:?} lost what had been written");
        found
    }

    /// The same after the machine lost its power: what was only written may be
    /// gone, and is counted.
    pub(crate) fn compare(&self, setup: &Setup, vendor: Vendor) -> Found {
        let mut found = Found::default();
        let mut delivered = HashSet::new();
        for taken in setup.sandbox.taken(vendor) {
            let profile = taken.id.is_empty();
            let id = if profile { taken.user.strip_prefix("of-").unwrap() } else { &taken.id };
            self.check_sent(vendor, id, &taken);
            found.duplicates += u64::from(taken.copies) - 1;
            if !delivered.insert(id.to_owned()) {
                // Providers cannot recognise a copy of what has no id.
                assert!(profile, "{vendor:?} has {id} twice");
                found.duplicates += 1;
            }
        }
        let mut dead = HashSet::new();
        for letter in lines_on_disk(&setup.data_dir().join("dead-letters").join(vendor.name())) {
            let id = letter["event"]["id"].as_str().unwrap().to_owned();
            assert!(self.may_arrive(&id), "{vendor:?}: {id} became a dead letter");
            dead.insert(id);
        }
        for (id, sent) in &self.sent {
            let Answer::Ok(level) = sent.answer else { continue };
            if !delivered.contains(id) && !dead.contains(id) {
                assert_eq!(level, Durability::Written, "{vendor:?} lost {id}: {sent:?}");
                found.written_lost += 1;
            }
        }
        found.delivered = delivered.len() as u64;
        found.dead_lettered = dead.len() as u64;
        found.ended = delivered.union(&dead).count() as u64;
        found
    }

    fn may_arrive(&self, id: &str) -> bool {
        self.sent.get(id).is_some_and(|sent| !matches!(sent.answer, Answer::Refused(_)))
    }

    fn check_sent(&self, vendor: Vendor, id: &str, taken: &Taken) {
        assert!(self.may_arrive(id), "{vendor:?} has what was refused or never sent: {taken:?}");
        let Sent { draft, mark, .. } = &self.sent[id];
        let (name, user) =
            if draft.identify { ("", format!("of-{id}")) } else { (draft.name, draft.user.clone()) };
        assert_eq!(draft.identify, taken.kind == TakenKind::Identify, "{vendor:?} {taken:?}");
        assert_eq!((name, &user), (&*taken.name, &taken.user), "{vendor:?}");
        assert_eq!(find(&taken.event, "mark"), Some(&Value::from(&**mark)), "{vendor:?} {taken:?}");
    }
}

fn refusal(status: &Status) -> Answer {
    match status.code() {
        code @ (Code::InvalidArgument | Code::ResourceExhausted) => Answer::Refused(code),
        code => Answer::Unknown(code),
    }
}

/// The value of this name, wherever it is.
fn find<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let object = value.as_object()?;
    object.get(name).or_else(|| object.values().find_map(|value| find(value, name)))
}
