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

use std::collections::{BTreeMap, BTreeSet};

use analytics_relay_providers::{Event, EventKind, means_nobody};

use crate::{Decision, Tie};

/// How much is noted of who is who, so that what one event changes is bounded. Which facts
/// there is room for is all that depends on what came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FactLimits {
    /// Users whom aliases join: beyond, somebody aliased everybody to one.
    pub users_joined: usize,
    /// Users of a device, the earliest.
    pub users_of_a_device: usize,
    /// Links and aliases that say of a device that it is a user's, over all users whom
    /// aliases join with them.
    pub devices_of_a_user: usize,
}

impl Default for FactLimits {
    fn default() -> Self {
        Self { users_joined: 100, users_of_a_device: 20, devices_of_a_user: 1_000 }
    }
}

/// What became of a fact that was told.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Noted {
    /// Nothing was known of it, and there was room.
    pub is_new: bool,
    /// What there was no room for, and why: the fact itself; or, of an id that turned out to
    /// be a user's, aliases that would join them with too many.
    pub refused: Vec<(Decision, String, String)>,
}

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

/// The facts that a batch tells, in the order in which they came: where there is no room for
/// all, those of one batch are the same as those of many.
pub fn facts_of_batch<'e>(
    events: impl IntoIterator<Item = &'e Event>,
) -> impl Iterator<Item = (Fact<'e>, Seen, &'e Event)> {
    events
        .into_iter()
        .flat_map(|event| facts_of(event).map(move |fact| (fact, Seen::at(event.time_ms()), event)))
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

    /// True if something is known of a fact.
    pub fn knows(&self, fact: Fact<'_>) -> bool {
        match fact {
            Fact::User(user) => self.users.contains_key(user),
            Fact::Link { device, user } => self.links.contains_key(&(device.to_owned(), user.to_owned())),
            Fact::Alias { previous, user } => {
                self.aliases.contains_key(&(previous.to_owned(), user.to_owned()))
            }
        }
    }

    /// Notes a fact of a time, if there is room for it.
    pub fn note_within(&mut self, fact: Fact<'_>, seen: Seen, limits: &FactLimits) -> Noted {
        if self.knows(fact) {
            self.note(fact, seen);
            return Noted::default();
        }
        let refused = match fact {
            Fact::User(user) => return self.note_new_user(user, seen, limits),
            Fact::Alias { previous, user } if self.joins_users(previous) => {
                let decision = (!self.may_join(previous, user, limits)).then_some(Decision::TooManyAliases);
                decision.map(|decision| (decision, previous, user))
            }
            Fact::Link { device, user } | Fact::Alias { previous: device, user } => {
                let decision = self.make_room_for(device, user, seen.first_ms, limits);
                decision.map(|decision| (decision, device, user))
            }
        };
        if let Some((decision, from, user)) = refused {
            return Noted { is_new: false, refused: vec![(decision, from.into(), user.into())] };
        }
        Noted { is_new: self.note(fact, seen), refused: Vec::new() }
    }

    /// Aliases of an id that turns out to be a user's join users from now on: the earliest of
    /// them, as long as there is room.
    fn note_new_user(&mut self, user: &str, seen: Seen, limits: &FactLimits) -> Noted {
        let mut told: Vec<(i64, String)> =
            self.aliases_of(user).map(|(to, first_ms)| (first_ms, to.to_owned())).collect();
        told.sort_unstable();
        self.aliases.retain(|(previous, _), _| previous != user);
        let mut noted = Noted { is_new: self.note(Fact::User(user), seen), refused: Vec::new() };
        for (first_ms, to) in told {
            if self.may_join(user, &to, limits) {
                self.aliases.insert((user.to_owned(), to), first_ms);
            } else {
                noted.refused.push((Decision::TooManyAliases, user.to_owned(), to));
            }
        }
        noted
    }

    fn may_join(&self, one: &str, other: &str, limits: &FactLimits) -> bool {
        let mut joined = self.joined_with(one);
        joined.extend(self.joined_with(other));
        joined.len() <= limits.users_joined && self.devices_of(&joined) <= limits.devices_of_a_user
    }

    /// Makes room for a fact that a device is a user's, for which the latest of the device's
    /// users gives way; or says why there is none.
    fn make_room_for(
        &mut self,
        device: &str,
        user: &str,
        first_ms: i64,
        limits: &FactLimits,
    ) -> Option<Decision> {
        if self.devices_of(&self.joined_with(user)) >= limits.devices_of_a_user {
            return Some(Decision::UserHasTooManyDevices);
        }
        match room_for(user, first_ms, &self.users_of(device, |_| true), limits) {
            Room::There => None,
            Room::None => Some(Decision::DeviceHasTooManyUsers),
            Room::Instead(last) => {
                let gone = (device.to_owned(), last);
                self.links.remove(&gone);
                // What joins users says nothing of the device.
                if !self.joins_users(device) {
                    self.aliases.remove(&gone);
                }
                None
            }
        }
    }

    /// How many facts say of a device that it is one of these users'.
    fn devices_of(&self, users: &BTreeSet<String>) -> usize {
        let links = self.links.keys().filter(|(_, user)| users.contains(user));
        let aliases = self.aliases.keys().filter(|(_, user)| users.contains(user));
        links.count() + aliases.filter(|(previous, _)| !self.joins_users(previous)).count()
    }

    /// All users whom aliases join with one, be it that an operator has taken them back.
    fn joined_with(&self, user: &str) -> BTreeSet<String> {
        let (mut joined, mut open) = (BTreeSet::from([user.to_owned()]), vec![user.to_owned()]);
        while let Some(one) = open.pop() {
            for (previous, user) in self.aliases.keys().filter(|(previous, _)| self.joins_users(previous)) {
                let next = if *previous == one {
                    user
                } else if *user == one {
                    previous
                } else {
                    continue;
                };
                if joined.insert(next.clone()) {
                    open.push(next.clone());
                }
            }
        }
        joined
    }

    fn aliases_of(&self, previous: &str) -> impl Iterator<Item = (&str, i64)> {
        of(&self.aliases, previous).map(|(user, first_ms)| (user, *first_ms))
    }

    /// The users of a device by links and aliases that pass a test, those who used it earlier
    /// first.
    fn users_of(&self, device: &str, passes: impl Fn(&Fact<'_>) -> bool) -> Vec<(i64, String)> {
        let links = of(&self.links, device).map(|(user, seen)| (Fact::Link { device, user }, seen.first_ms));
        let aliases = self.aliases_of(device).filter(|_| !self.joins_users(device));
        let aliases = aliases.map(|(user, first_ms)| (Fact::Alias { previous: device, user }, first_ms));
        let mut users: BTreeMap<&str, i64> = BTreeMap::new();
        for (fact, first_ms) in links.chain(aliases).filter(|(fact, _)| passes(fact)) {
            let (Fact::Link { user, .. } | Fact::Alias { user, .. } | Fact::User(user)) = fact;
            let first = users.entry(user).or_insert(first_ms);
            *first = first_ms.min(*first);
        }
        let mut users: Vec<_> =
            users.into_iter().map(|(user, first_ms)| (first_ms, user.to_owned())).collect();
        users.sort_unstable();
        users
    }

    /// All users of a device, those who used it earlier first.
    pub fn all_users_of(&self, device: &str) -> Vec<(i64, String)> {
        self.users_of(device, |_| true)
    }

    /// Those whom no operator has put apart from it.
    pub fn owners_of(&self, device: &str) -> Vec<(i64, String)> {
        self.users_of(device, |fact| match *fact {
            Fact::Link { device, user } => !self.apart.contains(&(device.to_owned(), user.to_owned())),
            Fact::Alias { previous, user } => self.holds(&(previous.to_owned(), user.to_owned())),
            Fact::User(_) => true,
        })
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

    fn aliases_that_hold(&self) -> impl Iterator<Item = &(String, String)> {
        self.aliases.keys().filter(|alias| self.holds(alias))
    }

    /// Who is who.
    pub fn resolve(&self) -> Owners {
        let roots = self.roots();
        let devices: BTreeSet<&String> =
            self.links.keys().chain(self.aliases.keys()).map(|(device, _)| device).collect();
        let owner = |device: &String| {
            let root = |user: &str| roots.get(user).map_or(user, String::as_str).to_owned();
            let (root, until_ms) = owner_of(&self.owners_of(device), root)?;
            Some((device.clone(), Owner { root, until_ms }))
        };
        Owners { devices: devices.into_iter().filter_map(owner).collect(), roots }
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
        let edges = || self.aliases_that_hold().filter(|(previous, _)| self.joins_users(previous));
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

/// Whether there is room for one more user of a device.
#[derive(Debug, PartialEq, Eq)]
pub enum Room {
    /// There is.
    There,
    /// If this one gives way.
    Instead(String),
    /// There is none.
    None,
}

/// Whether there is room for a user of a device at a time, among those who used it, the
/// earlier first.
pub fn room_for(user: &str, first_ms: i64, users: &[(i64, String)], limits: &FactLimits) -> Room {
    if users.len() < limits.users_of_a_device || users.iter().any(|(_, one)| one == user) {
        return Room::There;
    }
    match users.last() {
        Some((last_ms, last)) if (first_ms, user) < (*last_ms, &**last) => Room::Instead(last.clone()),
        _ => Room::None,
    }
}

/// Whose a device is of those who used it, the earlier first: the root of the first, until
/// one of another root used it.
pub fn owner_of<Root: PartialEq>(
    users: &[(i64, String)],
    root: impl Fn(&str) -> Root,
) -> Option<(Root, i64)> {
    let owner = root(&users.first()?.1);
    let other = users.iter().find(|(_, user)| root(user) != owner);
    let until_ms = other.map_or(i64::MAX, |(first_ms, _)| *first_ms);
    Some((owner, until_ms))
}

/// What is known of pairs that begin with an id.
fn of<'f, V>(pairs: &'f BTreeMap<(String, String), V>, id: &str) -> impl Iterator<Item = (&'f str, &'f V)> {
    let from = pairs.range((id.to_owned(), String::new())..);
    from.take_while(move |((one, _), _)| one == id).map(|((_, user), value)| (&**user, value))
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
        let facts = |event: &Event| facts_of(event).map(move |fact| format!("{fact:?}")).collect::<Vec<_>>();
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
    fn a_batch_tells_its_facts_in_the_order_in_which_they_came() {
        let event = |id: &str, user: &str, time_ms: i64| {
            let json = format!(
                r#"{{"id":"{id}","kind":"page","user_id":"{user}","anonymous_id":"d","time_ms":{time_ms},"accepted_ms":1}}"#
            );
            Event::from_json(json.as_bytes()).unwrap()
        };
        let events = [event("1", "u", 7_200_005), event("2", "a", 5), event("3", "u", 3_600_001)];
        let told: Vec<_> = facts_of_batch(&events)
            .map(|(fact, seen, event)| (fact, seen, event.id().as_str().to_owned()))
            .collect();
        let at = Seen::at;
        let want = [
            (Fact::User("u"), at(7_200_005), "1"),
            (link("d", "u"), at(7_200_005), "1"),
            (Fact::User("a"), at(5), "2"),
            (link("d", "a"), at(5), "2"),
            (Fact::User("u"), at(3_600_001), "3"),
            (link("d", "u"), at(3_600_001), "3"),
        ];
        assert_eq!(told, want.map(|(fact, seen, event)| (fact, seen, event.to_owned())));
        assert_eq!((at(5).last_shown_ms(), at(i64::MIN).first_ms), (5, i64::MIN));
    }

    const FEW: FactLimits = FactLimits { users_joined: 2, users_of_a_device: 2, devices_of_a_user: 2 };

    /// Notes facts, each of its time; what there was no room for.
    fn noted(facts: &mut Facts, told: &[(i64, Fact<'_>)]) -> Vec<(Decision, String, String)> {
        let note =
            |(time_ms, fact): &(i64, Fact<'_>)| facts.note_within(*fact, Seen::at(*time_ms), &FEW).refused;
        told.iter().flat_map(note).collect()
    }

    fn refused(what: Decision, from: &str, user: &str) -> (Decision, String, String) {
        (what, from.to_owned(), user.to_owned())
    }

    #[test]
    fn the_latest_of_a_devices_users_gives_way_to_an_earlier_one() {
        let mut facts = Facts::default();
        let told = [(5, link("d", "a")), (9, alias("d", "b")), (10, link("d", "c")), (7, alias("d", "c"))];
        assert_eq!(noted(&mut facts, &told), [refused(Decision::DeviceHasTooManyUsers, "d", "c")]);
        assert_eq!(facts.all_users_of("d"), [(5, "a".to_owned()), (7, "c".to_owned())]);
        assert!(facts.aliases.contains_key(&("d".into(), "c".into())) && facts.aliases.len() == 1);
        // An alias of a user says nothing of a device of that name, and stays.
        let mut other = Facts::default();
        let told = [(1, Fact::User("d")), (5, link("d", "a")), (9, link("d", "b")), (9, alias("d", "b"))];
        assert!(noted(&mut other, &told).is_empty() && noted(&mut other, &[(7, link("d", "c"))]).is_empty());
        assert_eq!(other.all_users_of("d"), [(5, "a".to_owned()), (7, "c".to_owned())]);
        assert_eq!(other.aliases.len(), 1);
        // Who is among them is no one more.
        assert!(noted(&mut facts, &[(8, link("d", "c")), (3, link("d", "a"))]).is_empty());
    }

    #[test]
    fn devices_are_counted_over_all_who_are_one_whatever_says_whose_they_are() {
        let mut facts = Facts::default();
        let told = [
            (1, Fact::User("old")),
            (2, alias("old", "new")),
            (3, link("d1", "old")),
            (4, alias("d2", "new")),
            (5, link("d3", "old")),
            (6, alias("d4", "new")),
        ];
        let too_many = |device: &str, user: &str| refused(Decision::UserHasTooManyDevices, device, user);
        assert_eq!(noted(&mut facts, &told), [too_many("d3", "old"), too_many("d4", "new")]);
        assert_eq!((facts.links.len(), facts.aliases.len()), (1, 2));
    }

    #[test]
    fn users_whom_aliases_join_are_counted_and_devices_are_none_of_them() {
        let mut facts = Facts::default();
        let users = ["a", "b", "c"].map(|user| (1, Fact::User(user)));
        assert!(noted(&mut facts, &users).is_empty());
        let joined = [(2, alias("d1", "a")), (3, alias("a", "b")), (4, alias("d2", "b"))];
        assert!(noted(&mut facts, &joined).is_empty());
        let too_many = |previous: &str, user: &str| refused(Decision::TooManyAliases, previous, user);
        assert_eq!(noted(&mut facts, &[(5, alias("b", "c")), (6, alias("b", "a"))]), [too_many("b", "c")]);
        // An id that turns out to be a user's is one of them from now on.
        assert_eq!(noted(&mut facts, &[(7, Fact::User("d1"))]), [too_many("d1", "a")]);
        assert_eq!(facts.resolve().counted_under("d1"), None);
        assert_eq!(facts.resolve().counted_under("d2"), Some(facts.resolve().root("b")));
    }

    #[test]
    fn two_users_with_too_many_devices_together_are_not_joined() {
        let mut facts = Facts::default();
        let told = [
            (1, Fact::User("a")),
            (1, link("d1", "a")),
            (1, link("d2", "a")),
            (1, link("d3", "b")),
            (2, alias("a", "b")),
        ];
        assert_eq!(noted(&mut facts, &told), [refused(Decision::TooManyAliases, "a", "b")]);
    }
}
