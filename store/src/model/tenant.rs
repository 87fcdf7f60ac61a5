//! What is known of a tenant's people, or of some of them: facts, traits, and what was decided.

use std::collections::{BTreeMap, BTreeSet};

use analytics_relay_providers::Event;

use super::{
    FactLimits, Facts, Known, Owners, Seen,
    event::previous_id,
    identity::{Fact, LOG_MAX, Visitor, facts_of_batch},
    traits::{self, Traits},
};
use crate::{By, Decision, Identity, LogEntry, Operator, Subject, Tie};

/// What is known.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tenant {
    pub(crate) facts: Facts,
    pub(crate) traits: BTreeMap<Subject, Traits>,
    /// What was decided, the latest last.
    pub(crate) log: Vec<LogEntry>,
}

/// Of whom an event tells.
pub(crate) fn subject_of(event: &Event) -> Option<Subject> {
    let user = event.user_id().map(|user| Subject::User(user.to_owned()));
    user.or_else(|| event.anonymous_id().map(|device| Subject::Anonymous(device.to_owned())))
}

impl Tenant {
    /// Notes what new events of a batch tell.
    pub(crate) fn note(&mut self, events: &[&Event], limits: &FactLimits) {
        self.note_facts(events, limits);
        for event in events.iter().filter(|event| traits::tells(event)) {
            if let Some(subject) = subject_of(event) {
                self.traits.entry(subject).or_default().tell(event);
            }
        }
    }

    /// Notes what they tell about who is who. One is told of what is refused of it; returns
    /// why, for each.
    pub(crate) fn note_facts(&mut self, events: &[&Event], limits: &FactLimits) -> Vec<Decision> {
        let (mut is_told, mut all_refused) = (false, Vec::new());
        for (fact, seen, event) in facts_of_batch(events.iter().copied()) {
            let (what, from, user) = match fact {
                Fact::User(user) => (None, user, user),
                Fact::Link { device, user } => (Some(Decision::Linked), device, user),
                Fact::Alias { previous, user } => (Some(Decision::Aliased), previous, user),
            };
            let before = if self.facts.knows(fact) { None } else { self.counted_under(from) };
            let noted = self.facts.note_within(fact, seen, limits);
            let decided = what.filter(|_| noted.is_new).map(|what| (what, from.into(), user.into(), before));
            all_refused.extend(noted.refused.iter().map(|(why, ..)| *why));
            let refused = noted.refused.into_iter().next().filter(|_| !is_told);
            is_told |= refused.is_some();
            let refused = refused.map(|(what, from, user)| (what, from, user, None));
            for (what, from, user, before) in decided.into_iter().chain(refused) {
                let (at_ms, by) = (event.accepted_ms(), By::Event(event.id().as_str().to_owned()));
                self.write_log(LogEntry { at_ms, by, what, from, user, before });
            }
        }
        all_refused
    }

    fn counted_under(&self, id: &str) -> Option<String> {
        self.facts.resolve().counted_under(id).map(str::to_owned)
    }

    fn write_log(&mut self, entry: LogEntry) {
        self.log.push(entry);
        let over = self.log.len().saturating_sub(LOG_MAX);
        self.log.drain(..over);
    }

    /// Puts an id and a user apart, or takes that back.
    pub(crate) fn link(&mut self, from: &str, user: &str, joined: bool, by: &Operator) {
        let (link, before) = ((from.to_owned(), user.to_owned()), self.counted_under(from));
        let apart = &mut self.facts.apart;
        let is_news = if joined { apart.remove(&link) } else { apart.insert(link) };
        if is_news {
            let what = if joined { Decision::Rejoined } else { Decision::PutApart };
            let Operator { name, reason, at_ms } = by.clone();
            let (by, from, user) = (By::Operator { name, reason }, from.into(), user.into());
            self.write_log(LogEntry { at_ms, by, what, from, user, before });
        }
    }

    /// Takes in what another store knows. Returns why something was refused.
    pub(crate) fn know(&mut self, what: &Known, limits: &FactLimits) -> Vec<Decision> {
        let (fact, seen) = match what {
            Known::User { user, seen } => (Fact::User(user), *seen),
            Known::Link { anonymous, user, seen } => (Fact::Link { device: anonymous, user }, *seen),
            Known::Alias { previous, user, first_ms } => {
                (Fact::Alias { previous, user }, Seen::at(*first_ms))
            }
            Known::Apart { from, user, by } => {
                self.link(from, user, false, by);
                return Vec::new();
            }
            Known::Traits { who, traits } => {
                self.traits.entry(who.clone()).or_default().merge(traits.clone());
                return Vec::new();
            }
        };
        let refused = self.facts.note_within(fact, seen, limits).refused;
        refused.into_iter().map(|(why, ..)| why).collect()
    }

    /// What is known about somebody; of a device that is nobody's when it was seen is asked of
    /// its events.
    pub(crate) fn identity(&self, who: &Subject, seen: Option<(i64, i64)>) -> Option<Identity> {
        let owners = self.facts.resolve();
        let root = match who {
            Subject::User(user) => owners.root(user).to_owned(),
            Subject::Anonymous(device) => match owners.devices.get(device) {
                Some(owner) => owner.root.clone(),
                None => return self.lone_device(device, seen),
            },
        };
        let theirs = |user: &&String| owners.root(user) == root;
        let aliases = owners.roots.keys();
        let users: BTreeSet<String> =
            self.facts.users.keys().chain(aliases).filter(theirs).cloned().collect();
        let owned = owners.devices.iter().filter(|(_, owner)| owner.root == root);
        let anonymous: BTreeSet<String> = owned.map(|(device, _)| device.clone()).collect();
        if users.is_empty() && anonymous.is_empty() {
            return None;
        }
        let (mut traits, mut devices) = (Traits::default(), Traits::default());
        let of = |subject: Subject| self.traits.get(&subject).cloned().unwrap_or_default();
        users.iter().for_each(|user| traits.merge(of(Subject::User(user.clone()))));
        anonymous.iter().for_each(|device| devices.merge(of(Subject::Anonymous(device.clone()))));
        traits.fill(devices);
        let seen = || users.iter().filter_map(|user| self.facts.users.get(user));
        Some(Identity {
            root,
            traits: traits.shown(),
            first_seen_ms: seen().map(|seen| seen.first_ms).min(),
            last_seen_ms: seen().map(Seen::last_shown_ms).max(),
            ties: self.ties(&users, &anonymous),
            users: users.into_iter().collect(),
            anonymous: anonymous.into_iter().collect(),
        })
    }

    /// A device that is nobody's: what it says itself, and when its events were.
    fn lone_device(&self, device: &str, seen: Option<(i64, i64)>) -> Option<Identity> {
        let ties = self.ties(&BTreeSet::new(), &BTreeSet::from([device.to_owned()]));
        let traits = self.traits.get(&Subject::Anonymous(device.to_owned())).filter(|one| !one.is_empty());
        if seen.is_none() && ties.is_empty() && traits.is_none() {
            return None;
        }
        let (first_seen_ms, last_seen_ms) = seen.unzip();
        let traits = traits.cloned().unwrap_or_default().shown();
        Some(Identity { traits, first_seen_ms, last_seen_ms, ties, ..Identity::of_device(device) })
    }

    fn ties(&self, users: &BTreeSet<String>, devices: &BTreeSet<String>) -> Vec<Tie> {
        self.facts.ties(|from| users.contains(from) || devices.contains(from), |user| users.contains(user))
    }

    /// Takes away every fact about somebody.
    pub(crate) fn forget(&mut self, who: &Subject, owners: &Owners) {
        let facts = &mut self.facts;
        match who {
            Subject::Anonymous(device) => {
                facts.links.retain(|(one, _), _| one != device);
                if !facts.users.contains_key(device) {
                    facts.aliases.retain(|(previous, _), _| previous != device);
                }
                facts.apart.retain(|(one, _)| one != device);
                self.traits.remove(who);
                self.log.retain(|entry| entry.from != *device);
            }
            Subject::User(user) => {
                let root = owners.root(user);
                let is_theirs = |user: &String| owners.root(user) == root;
                facts.users.retain(|user, _| !is_theirs(user));
                facts.links.retain(|(_, user), _| !is_theirs(user));
                facts.aliases.retain(|(previous, user), _| !is_theirs(previous) && !is_theirs(user));
                facts.apart.retain(|(from, user)| !is_theirs(from) && !is_theirs(user));
                self.log.retain(|entry| !is_theirs(&entry.from) && !is_theirs(&entry.user));
                for entry in &mut self.log {
                    entry.before.take_if(|before| is_theirs(before));
                }
                self.traits.retain(|subject, _| match subject {
                    Subject::User(user) => !is_theirs(user),
                    Subject::Anonymous(device) => {
                        owners.devices.get(device).is_none_or(|owner| owner.root != root)
                    }
                });
            }
        }
    }

    /// True if an event goes with somebody who is erased: who is who as it was before.
    pub(crate) fn owns(&self, who: &Subject, owners: &Owners, event: &Event) -> bool {
        match who {
            Subject::Anonymous(device) => {
                let is_before = previous_id(event) == Some(device);
                event.anonymous_id() == Some(device) || is_before && !self.facts.users.contains_key(device)
            }
            Subject::User(user) => {
                let root = owners.root(user);
                let visitor = owners.visitor(event.user_id(), event.anonymous_id(), event.time_ms());
                let is_before = previous_id(event).is_some_and(|id| owners.root(id) == root);
                visitor == Some(Visitor::User(root)) || is_before
            }
        }
    }
}

#[cfg(feature = "postgres")]
impl Tenant {
    /// All ids of which something is known.
    pub(crate) fn ids(&self) -> BTreeSet<String> {
        let Facts { users, links, aliases, apart } = &self.facts;
        let pairs = links.keys().chain(aliases.keys()).chain(apart);
        users.keys().chain(pairs.flat_map(|(one, other)| [one, other])).cloned().collect()
    }

    /// How many facts there were before that are not here.
    pub(crate) fn facts_gone(&self, before: &Self) -> u64 {
        let (is, was) = (&self.facts, &before.facts);
        let gone = was.users.keys().filter(|user| !is.users.contains_key(*user)).count()
            + was.links.keys().filter(|link| !is.links.contains_key(*link)).count()
            + was.aliases.keys().filter(|alias| !is.aliases.contains_key(*alias)).count()
            + was.apart.difference(&is.apart).count();
        gone as u64
    }
}
