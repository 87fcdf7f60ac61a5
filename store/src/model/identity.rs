//! Who is who: observations, not merges.
//!
//! Events stay as they were sent. Whose they are is a function of facts that can be noted
//! in any order and any number of times, so that arrival order, replays and the number of
//! relays change nothing, and taking a fact away undoes what it did.
//!
//! | fact | comes from | noted twice |
//! |---|---|---|
//! | a user was seen | each event with a user id | the earliest time stays |
//! | a device was used by a user | each event with both ids | the earliest time stays |
//! | a user had another id before | an alias | it is the same |
//! | a device is not this user's | an operator | it is the same |
//!
//! From these follows, for each user, their *root*: the id under which they count; and for
//! each device its *owner*, whose its events without a user id are, until somebody else
//! used it.

use std::collections::{BTreeMap, BTreeSet};

use analytics_relay_providers::{Event, EventKind};

/// Most ids that aliases join: beyond, somebody aliased everybody to one.
pub const COMPONENT_MAX: usize = 100;
/// Most users of a device that are remembered; which is the only rule but those above and
/// below that depends on what came first.
pub const USERS_OF_A_DEVICE_MAX: usize = 20;
/// Most devices of a user.
pub const DEVICES_OF_A_USER_MAX: usize = 1_000;

/// What is known about who is who, in one tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Users, and the time of their earliest event.
    pub users: BTreeMap<String, i64>,
    /// (device, user), and the time of the earliest event with both.
    pub links: BTreeMap<(String, String), i64>,
    /// (previous id, user id), and the earliest time that this was said.
    pub aliases: BTreeMap<(String, String), i64>,
    /// (device, user) that an operator has put apart.
    pub apart: BTreeSet<(String, String)>,
}

/// One fact that an event tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fact<'a> {
    /// A user was seen.
    User(&'a str),
    /// A device was used by a user.
    Link {
        /// The device.
        device: &'a str,
        /// The user.
        user: &'a str,
    },
    /// A user had another id before.
    Alias {
        /// That id.
        previous: &'a str,
        /// The user.
        user: &'a str,
    },
}

/// The facts that an event tells, all of its own time.
pub fn facts_of(event: &Event) -> impl Iterator<Item = Fact<'_>> {
    let user = event.user_id();
    let link = user.zip(event.anonymous_id()).map(|(user, device)| Fact::Link { device, user });
    let alias = match event.kind() {
        EventKind::Alias { previous_id } => {
            user.filter(|user| *user != previous_id).map(|user| Fact::Alias { previous: previous_id, user })
        }
        _ => None,
    };
    user.map(Fact::User).into_iter().chain(link).chain(alias)
}

impl Facts {
    /// Notes a fact of a time.
    pub fn note(&mut self, fact: Fact<'_>, time_ms: i64) {
        let noted = match fact {
            Fact::User(user) => self.users.entry(user.to_owned()).or_insert(time_ms),
            Fact::Link { device, user } => {
                self.links.entry((device.to_owned(), user.to_owned())).or_insert(time_ms)
            }
            Fact::Alias { previous, user } => {
                self.aliases.entry((previous.to_owned(), user.to_owned())).or_insert(time_ms)
            }
        };
        *noted = time_ms.min(*noted);
    }

    /// An alias of an id that was a user's joins two users; any other says whose a device
    /// was.
    fn joins_users(&self, previous: &str) -> bool {
        self.users.contains_key(previous)
    }

    /// Who is who.
    pub fn resolve(&self) -> Owners {
        let roots = self.roots();
        let mut by_device: BTreeMap<&str, BTreeMap<&str, i64>> = BTreeMap::new();
        let links = self.links.iter();
        let devices = self.aliases.iter().filter(|((previous, _), _)| !self.joins_users(previous));
        for ((device, user), time_ms) in links.chain(devices) {
            if self.apart.contains(&(device.clone(), user.clone())) {
                continue;
            }
            let first = by_device.entry(device).or_default().entry(user).or_insert(*time_ms);
            *first = (*first).min(*time_ms);
        }
        let owner = |(device, users): (&str, BTreeMap<&str, i64>)| {
            let mut users: Vec<_> = users.into_iter().map(|(user, first_ms)| (first_ms, user)).collect();
            users.sort_unstable();
            let root = |user: &str| roots.get(user).map_or(user, String::as_str).to_owned();
            let owner = root(users.first()?.1);
            let other = users.iter().find(|(_, user)| root(user) != owner);
            let until_ms = other.map_or(i64::MAX, |(first_ms, _)| *first_ms);
            Some((device.to_owned(), Owner { root: owner, until_ms }))
        };
        Owners { devices: by_device.into_iter().filter_map(owner).collect(), roots }
    }

    /// The root of each user whom an alias joins with another.
    fn roots(&self) -> BTreeMap<String, String> {
        let edges = || self.aliases.keys().filter(|(previous, _)| self.joins_users(previous));
        let mut near: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (previous, user) in edges() {
            near.entry(previous).or_default().insert(user);
            near.entry(user).or_default().insert(previous);
        }
        let previous: BTreeSet<&str> = edges().map(|(previous, _)| &**previous).collect();
        let (mut roots, mut seen) = (BTreeMap::new(), BTreeSet::<&str>::new());
        for start in near.keys() {
            if seen.contains(start) {
                continue;
            }
            let component = reach(start, &near);
            seen.extend(&component);
            let root = self.root_of(&component, &previous);
            roots.extend(component.iter().map(|user| ((*user).to_owned(), root.clone())));
        }
        roots
    }

    /// Of users who are one: the id that is nobody's previous one, else who was seen first.
    fn root_of(&self, component: &BTreeSet<&str>, previous: &BTreeSet<&str>) -> String {
        let mut last = component.iter().filter(|user| !previous.contains(*user));
        let first_ms = |user: &str| self.users.get(user).copied().unwrap_or(i64::MAX);
        let root = match (last.next(), last.next()) {
            (Some(only), None) => Some(only),
            _ => component.iter().min_by(|a, b| (first_ms(a), **a).cmp(&(first_ms(b), **b))),
        };
        (*root.expect("a component has users")).to_owned()
    }
}

fn reach<'a>(start: &'a str, near: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> BTreeSet<&'a str> {
    let (mut component, mut open) = (BTreeSet::from([start]), vec![start]);
    while let Some(user) = open.pop() {
        for next in near.get(user).into_iter().flatten() {
            if component.insert(next) {
                open.push(next);
            }
        }
    }
    component
}

/// Whose a device's events without a user id are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The root of that user.
    pub root: String,
    /// From here on they are nobody's but the device's own: Unix milliseconds.
    pub until_ms: i64,
}

/// Who is who.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owners {
    /// The owners of the devices that have one.
    pub devices: BTreeMap<String, Owner>,
    /// The roots of the users who are joined with others.
    pub roots: BTreeMap<String, String>,
}

/// The id under which somebody counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Visitor<'a> {
    /// A user's root.
    User(&'a str),
    /// A device.
    Device(&'a str),
}

impl Owners {
    /// The root of a user.
    pub fn root<'a>(&'a self, user: &'a str) -> &'a str {
        self.roots.get(user).map_or(user, String::as_str)
    }

    /// Whose an event is.
    pub fn visitor<'a>(
        &'a self,
        user: Option<&'a str>,
        device: Option<&'a str>,
        time_ms: i64,
    ) -> Option<Visitor<'a>> {
        match (user, device) {
            (Some(user), _) => Some(Visitor::User(self.root(user))),
            (None, Some(device)) => match self.devices.get(device) {
                Some(owner) if time_ms < owner.until_ms => Some(Visitor::User(&owner.root)),
                _ => Some(Visitor::Device(device)),
            },
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::sessions::tests::permutations;

    fn link<'a>(device: &'a str, user: &'a str) -> Fact<'a> {
        Fact::Link { device, user }
    }

    fn alias<'a>(previous: &'a str, user: &'a str) -> Fact<'a> {
        Fact::Alias { previous, user }
    }

    fn resolved(facts: &[(i64, Fact<'_>)]) -> Owners {
        let mut all = Facts::default();
        for (time_ms, fact) in facts {
            all.note(*fact, *time_ms);
        }
        all.resolve()
    }

    fn owner(root: &str, until_ms: i64) -> Option<Owner> {
        Some(Owner { root: root.into(), until_ms })
    }

    #[test]
    fn a_shared_device_is_its_first_users_until_the_second_logs_in() {
        let owners = resolved(&[(5, link("d", "u1")), (9, link("d", "u2")), (12, link("d", "u1"))]);
        assert_eq!(owners.devices.get("d").cloned(), owner("u1", 9));
        assert_eq!(owners.visitor(None, Some("d"), 1), Some(Visitor::User("u1")), "before the login too");
        assert_eq!(owners.visitor(None, Some("d"), 9), Some(Visitor::Device("d")));
        assert_eq!(owners.visitor(Some("u2"), Some("d"), 3), Some(Visitor::User("u2")));
    }

    #[test]
    fn a_late_event_makes_the_owner_that_it_would_have_made_in_time() {
        let owners = resolved(&[(5, link("d", "u1")), (9, link("d", "u2")), (2, link("d", "u2"))]);
        assert_eq!(owners.devices.get("d").cloned(), owner("u2", 5));
    }

    #[test]
    fn an_alias_of_no_user_says_whose_a_device_was() {
        let facts = [(3, alias("d", "u")), (3, Fact::User("u"))];
        assert_eq!(resolved(&facts).devices.get("d").cloned(), owner("u", i64::MAX));
        let seen = [&facts[..], &[(8, Fact::User("d"))]].concat();
        assert!(resolved(&seen).devices.is_empty());
        assert_eq!(resolved(&seen).root("d"), "u", "now two users are one");
    }

    #[test]
    fn a_circle_of_aliases_has_the_root_that_was_seen_first() {
        let owners = resolved(&[
            (4, Fact::User("b")),
            (5, Fact::User("a")),
            (6, alias("a", "b")),
            (7, alias("b", "a")),
        ]);
        assert_eq!((owners.root("a"), owners.root("b")), ("b", "b"));
    }

    #[test]
    fn what_an_operator_puts_apart_is_apart() {
        let mut facts = Facts::default();
        facts.note(link("d", "u1"), 1);
        facts.note(link("d", "u2"), 5);
        facts.apart.insert(("d".into(), "u1".into()));
        assert_eq!(facts.resolve().devices.get("d").cloned(), owner("u2", i64::MAX));
        facts.apart.clear();
        assert_eq!(facts.resolve().devices.get("d").cloned(), owner("u1", 5), "and can be undone");
    }

    #[test]
    fn two_users_who_are_one_do_not_share_a_device() {
        let facts =
            [(1, Fact::User("old")), (1, link("d", "old")), (4, link("d", "new")), (6, alias("old", "new"))];
        assert_eq!(resolved(&facts).devices.get("d").cloned(), owner("new", i64::MAX));
    }

    #[test]
    fn all_permutations_of_six_facts_give_the_same_owners() {
        let facts = [
            (1, Fact::User("a")),
            (2, link("d", "b")),
            (3, alias("a", "b")),
            (4, link("d", "c")),
            (5, alias("e", "c")),
            (2, alias("c", "f")),
        ];
        let want = resolved(&facts);
        for facts in permutations(&facts) {
            assert_eq!(resolved(&facts), want);
            let twice: Vec<_> = facts.iter().chain(&facts[..3]).copied().collect();
            assert_eq!(resolved(&twice), want);
        }
    }
}
