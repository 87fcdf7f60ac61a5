//! Who is who: observations, not merges.
//!
//! Events stay as they were sent. Whose they are is a function of facts that can be noted
//! in any order and any number of times, so that arrival order, replays and the number of
//! relays change nothing, and taking a fact away undoes what it did.
//!
//! | fact | comes from | noted twice |
//! |---|---|---|
//! | a user was seen | each event with a user id | the earliest and the latest time stay |
//! | a device was used by a user | each event with both ids | the earliest and the latest time stay |
//! | a user had another id before | an alias | the earliest time stays |
//! | a device, or an id of before, is not this user's | an operator | it is the same |
//!
//! From these follows, for each user, their *root*: the id under which they count; and for
//! each device its *owner*, whose its events without a user id are, until somebody else
//! used it.
//!
//! Nothing is noted of an id that means nobody: it would make one of all who have none. Nor
//! is anything noted of a device that nobody logged in on. Where ids of visitors change
//! every day it would be a row for each visit, which outlives the events that retention
//! takes away; when such a device was seen is asked of its events.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use analytics_relay_providers::{Event, EventKind, means_nobody};

use crate::Tie;

/// Most ids that aliases join: beyond, somebody aliased everybody to one.
pub const COMPONENT_MAX: usize = 100;
/// Most users of a device that are remembered; which is the only rule but those above and
/// below that depends on what came first.
pub const USERS_OF_A_DEVICE_MAX: usize = 20;
/// Most devices of a user.
pub const DEVICES_OF_A_USER_MAX: usize = 1_000;

/// Most entries of a tenant's [log](crate::LogEntry); the oldest go first.
pub const LOG_MAX: usize = 100_000;
/// To so many milliseconds it is known when somebody was seen last: else each batch would
/// write a row of everybody in it.
const LAST_STEP_MS: i64 = 3_600_000;

/// What is known about who is who, in one tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Users.
    pub users: BTreeMap<String, Seen>,
    /// (device, user): seen together.
    pub links: BTreeMap<(String, String), Seen>,
    /// (previous id, user id), and the earliest time that this was said.
    pub aliases: BTreeMap<(String, String), i64>,
    /// (device or previous id, user) that an operator has put apart.
    pub apart: BTreeSet<(String, String)>,
}

/// When something was seen: Unix milliseconds. Both together are the earliest and the
/// latest, in whatever order they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The time of the earliest event.
    pub first_ms: i64,
    /// The full hour (UTC) in which the latest event was.
    pub last_ms: i64,
}

impl Seen {
    /// By an event of that time.
    pub fn at(time_ms: i64) -> Self {
        Self { first_ms: time_ms, last_ms: time_ms.saturating_sub(time_ms.rem_euclid(LAST_STEP_MS)) }
    }

    /// Takes in another.
    pub fn add(&mut self, other: Self) {
        self.first_ms = self.first_ms.min(other.first_ms);
        self.last_ms = self.last_ms.max(other.last_ms);
    }

    /// True if another says nothing new.
    pub fn includes(&self, other: &Self) -> bool {
        self.first_ms <= other.first_ms && self.last_ms >= other.last_ms
    }

    /// When it was last, which is not before it was first.
    pub fn last_shown_ms(&self) -> i64 {
        self.last_ms.max(self.first_ms)
    }
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
    let user = event.user_id().filter(|id| !means_nobody(id));
    let device = event.anonymous_id().filter(|id| !means_nobody(id));
    let link = user.zip(device).map(|(user, device)| Fact::Link { device, user });
    let alias = match event.kind() {
        EventKind::Alias { previous_id } if !means_nobody(previous_id) => {
            user.filter(|user| *user != previous_id).map(|user| Fact::Alias { previous: previous_id, user })
        }
        _ => None,
    };
    user.map(Fact::User).into_iter().chain(link).chain(alias)
}

/// The facts that a batch tells: each once, in the order of the first event that tells it,
/// which is with it, and with all that the batch says about when.
pub fn facts_of_batch<'e>(events: impl IntoIterator<Item = &'e Event>) -> Vec<(Fact<'e>, Seen, &'e Event)> {
    let (mut places, mut facts) = (HashMap::new(), Vec::new());
    for event in events {
        let seen = Seen::at(event.time_ms());
        for fact in facts_of(event) {
            let place = *places.entry(fact).or_insert(facts.len());
            match facts.get_mut(place) {
                None => facts.push((fact, seen, event)),
                Some((_, known, _)) => known.add(seen),
            }
        }
    }
    facts
}

impl Facts {
    /// Notes a fact of a time; true if nothing was known of it.
    pub fn note(&mut self, fact: Fact<'_>, seen: Seen) -> bool {
        match fact {
            Fact::User(user) => add(&mut self.users, user.to_owned(), seen),
            Fact::Link { device, user } => add(&mut self.links, (device.to_owned(), user.to_owned()), seen),
            Fact::Alias { previous, user } => {
                let (mut is_new, alias) = (false, (previous.to_owned(), user.to_owned()));
                let first_ms = self.aliases.entry(alias).or_insert_with(|| {
                    is_new = true;
                    seen.first_ms
                });
                *first_ms = seen.first_ms.min(*first_ms);
                is_new
            }
        }
    }

    /// An alias of an id that was a user's joins two users; any other says whose a device
    /// was.
    fn joins_users(&self, previous: &str) -> bool {
        self.users.contains_key(previous)
    }

    /// True if no operator has taken an alias back, whichever of the two was named first.
    fn holds(&self, alias: &(String, String)) -> bool {
        let (previous, user) = alias;
        self.apart.is_empty()
            || !self.apart.contains(alias) && !self.apart.contains(&(user.clone(), previous.clone()))
    }

    fn aliases_that_hold(&self) -> impl Iterator<Item = (&(String, String), i64)> {
        let aliases = self.aliases.iter().filter(|(alias, _)| self.holds(alias));
        aliases.map(|(alias, first_ms)| (alias, *first_ms))
    }

    /// Who is who.
    pub fn resolve(&self) -> Owners {
        let roots = self.roots();
        let mut by_device: BTreeMap<&str, BTreeMap<&str, i64>> = BTreeMap::new();
        let links = self.links.iter().filter(|(link, _)| !self.apart.contains(link));
        let links = links.map(|(link, seen)| (link, seen.first_ms));
        let aliases = self.aliases_that_hold().filter(|((previous, _), _)| !self.joins_users(previous));
        for ((device, user), time_ms) in links.chain(aliases) {
            let first = by_device.entry(device).or_default().entry(user).or_insert(time_ms);
            *first = time_ms.min(*first);
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

    /// What says who is whose of some ids, those that an alias or a link comes from and
    /// those that it leads to.
    pub fn ties(&self, from_is: impl Fn(&str) -> bool, user_is: impl Fn(&str) -> bool) -> Vec<Tie> {
        let tie = |(from, user): &(String, String), by_alias: bool, seen: Seen, is_apart: bool| Tie {
            from: from.clone(),
            user: user.clone(),
            by_alias,
            first_ms: seen.first_ms,
            last_ms: seen.last_shown_ms(),
            is_apart,
        };
        let links = self.links.iter().map(|(link, seen)| tie(link, false, *seen, self.apart.contains(link)));
        let aliases = self.aliases.iter().map(|(alias, first_ms)| {
            let seen = Seen { first_ms: *first_ms, last_ms: *first_ms };
            tie(alias, true, seen, !self.holds(alias))
        });
        let mut ties: Vec<Tie> =
            links.chain(aliases).filter(|tie| from_is(&tie.from) || user_is(&tie.user)).collect();
        ties.sort_unstable();
        ties
    }

    /// The root of each user whom an alias joins with another.
    fn roots(&self) -> BTreeMap<String, String> {
        let edges = || {
            let aliases = self.aliases_that_hold().map(|(alias, _)| alias);
            aliases.filter(|(previous, _)| self.joins_users(previous))
        };
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
        let first_ms = |user: &str| self.users.get(user).map_or(i64::MAX, |seen| seen.first_ms);
        let root = match (last.next(), last.next()) {
            (Some(only), None) => Some(only),
            _ => component.iter().min_by(|a, b| (first_ms(a), **a).cmp(&(first_ms(b), **b))),
        };
        (*root.expect("a component has users")).to_owned()
    }
}

/// Notes when something was seen; true if nothing was known of it.
fn add<K: Ord>(all: &mut BTreeMap<K, Seen>, key: K, seen: Seen) -> bool {
    let mut is_new = false;
    let known = all.entry(key).or_insert_with(|| {
        is_new = true;
        seen
    });
    known.add(seen);
    is_new
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
    /// Under whom a device or an id of a user counts, if that is another.
    pub fn counted_under(&self, id: &str) -> Option<&str> {
        let root = self.devices.get(id).map(|owner| &owner.root).or_else(|| self.roots.get(id));
        root.map(String::as_str).filter(|root| *root != id)
    }

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
            all.note(*fact, Seen::at(*time_ms));
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
        facts.note(link("d", "u1"), Seen::at(1));
        facts.note(link("d", "u2"), Seen::at(5));
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

    #[test]
    fn an_alias_that_an_operator_takes_back_joins_nobody() {
        let mut facts = Facts::default();
        for (time_ms, fact) in [
            (1, Fact::User("a")),
            (2, Fact::User("b")),
            (3, Fact::User("c")),
            (4, alias("a", "b")),
            (5, alias("b", "c")),
        ] {
            facts.note(fact, Seen::at(time_ms));
        }
        let roots = |facts: &Facts| ["a", "b", "c"].map(|user| facts.resolve().root(user).to_owned());
        assert_eq!(roots(&facts), ["c", "c", "c"]);
        for apart in [("a", "b"), ("b", "a")] {
            facts.apart = BTreeSet::from([(apart.0.into(), apart.1.into())]);
            assert_eq!(roots(&facts), ["a", "c", "c"], "whichever is named first");
            // What comes again, as in a replay, changes nothing.
            facts.note(alias("a", "b"), Seen::at(4));
            assert_eq!(roots(&facts), ["a", "c", "c"]);
        }
        facts.apart.clear();
        assert_eq!(roots(&facts), ["c", "c", "c"]);
    }

    #[test]
    fn ids_that_mean_nobody_join_nobody() {
        let event = |kind: &str, user: &str, device: &str| {
            let json = format!(
                r#"{{"id":"i","kind":{kind},"user_id":"{user}","anonymous_id":"{device}","time_ms":1,"accepted_ms":1}}"#
            );
            Event::from_json(json.as_bytes()).unwrap()
        };
        let facts = |event: &Event| facts_of(event).map(|fact| format!("{fact:?}")).collect::<Vec<_>>();
        for nobody in [
            "null",
            "Undefined",
            " anonymous ",
            "00000000-0000-0000-0000-000000000000",
            "-",
            "[object Object]",
        ] {
            assert!(facts(&event(r#""page""#, nobody, "d")).is_empty(), "{nobody}");
            assert_eq!(facts(&event(r#""page""#, "u", nobody)).len(), 1, "{nobody}");
            let alias = format!(r#""alias","previous_id":"{nobody}""#);
            assert_eq!(facts(&event(&alias, "u", "d")).len(), 2, "{nobody}");
        }
        assert_eq!(facts(&event(r#""alias","previous_id":"p""#, "u", "d")).len(), 3);
    }

    #[test]
    fn a_batch_tells_each_fact_once_with_all_that_it_says_about_when() {
        let event = |id: &str, user: &str, time_ms: i64| {
            let json = format!(
                r#"{{"id":"{id}","kind":"page","user_id":"{user}","anonymous_id":"d","time_ms":{time_ms},"accepted_ms":1}}"#
            );
            Event::from_json(json.as_bytes()).unwrap()
        };
        let events = [event("1", "u", 7_200_005), event("2", "v", 5), event("3", "u", 3_600_001)];
        let told = facts_of_batch(&events);
        let told: Vec<_> =
            told.iter().map(|(fact, seen, event)| (*fact, *seen, event.id().as_str().to_owned())).collect();
        let (u, v) = (Seen { first_ms: 3_600_001, last_ms: 7_200_000 }, Seen { first_ms: 5, last_ms: 0 });
        let want = [
            (Fact::User("u"), u, "1"),
            (link("d", "u"), u, "1"),
            (Fact::User("v"), v, "2"),
            (link("d", "v"), v, "2"),
        ];
        assert_eq!(told, want.map(|(fact, seen, event)| (fact, seen, event.to_owned())));
        assert_eq!((v.last_shown_ms(), Seen::at(i64::MIN).first_ms), (5, i64::MIN));
    }
}
