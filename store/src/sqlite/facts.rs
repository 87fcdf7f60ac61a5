//! Who is who, in the tables of a file: facts are noted as events come, and what follows
//! from those that changed is worked out anew by [`Facts::resolve`].

use std::collections::{BTreeMap, BTreeSet, HashMap};

use analytics_relay_providers::Event;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::{
    Decision, Identity, Operator, StoreError, Subject,
    model::{
        Facts, Keys, Known as Told, KnownFact, Owners, Seen,
        identity::{COMPONENT_MAX, DEVICES_OF_A_USER_MAX, Fact, USERS_OF_A_DEVICE_MAX, facts_of_batch},
        traits::{self, Traits},
    },
};

/// Most facts that are remembered to be known.
const KNOWN_MAX: usize = 100_000;

/// Facts that need not be looked up: when they were seen.
#[derive(Debug, Default)]
pub(crate) struct Known {
    times: HashMap<u64, Seen>,
    /// What the running transaction notes, to be known once it is committed.
    noted: Vec<(u64, Seen)>,
}

impl Known {
    fn has(&self, fact: u64, seen: &Seen) -> bool {
        self.times.get(&fact).is_some_and(|known| known.includes(seen))
    }

    pub(crate) fn committed(&mut self) {
        if self.times.len() + self.noted.len() > KNOWN_MAX {
            self.times.clear();
        }
        for (fact, seen) in self.noted.drain(..) {
            self.times.entry(fact).or_insert(seen).add(seen);
        }
    }

    pub(crate) fn rolled_back(&mut self) {
        self.noted.clear();
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Whose facts changed.
#[derive(Debug, Default)]
struct Touched {
    users: BTreeSet<String>,
    devices: BTreeSet<String>,
}

/// What was not noted, as it would have been too much.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) links: u64,
    pub(crate) aliases: u64,
    /// Keys of traits.
    pub(crate) traits: u64,
}

impl Touched {
    /// An id, whatever it is of.
    fn both(id: &str) -> Self {
        Self { users: BTreeSet::from([id.to_owned()]), devices: BTreeSet::from([id.to_owned()]) }
    }
}

impl Refused {
    pub(crate) fn add(&mut self, other: Self) {
        self.links += other.links;
        self.aliases += other.aliases;
        self.traits += other.traits;
    }

    fn count(&mut self, decision: Decision) {
        match decision {
            Decision::TooManyAliases => self.aliases += 1,
            _ => self.links += 1,
        }
    }
}

/// One tenant's facts in a file.
pub(crate) struct FactTables<'a> {
    pub(crate) connection: &'a Connection,
    pub(crate) tenant: i64,
    pub(crate) keys: Keys,
    /// The number of the transaction.
    pub(crate) n: i64,
}

impl FactTables<'_> {
    /// Notes what events tell, which are in the order in which they came.
    pub(crate) fn note(&self, events: &[&Event], known: &mut Known) -> Result<Refused, StoreError> {
        let (mut touched, mut refused) = (Touched::default(), Refused::default());
        for (fact, seen, event) in facts_of_batch(events.iter().copied()) {
            let key = self.fact_key(fact);
            if known.has(key, &seen) {
                continue;
            }
            if let Some(decision) = self.note_one(fact, seen, Some(event), &mut touched)? {
                // One is told of each batch: they come in crowds.
                if refused == Refused::default() {
                    self.log_event(decision, fact, event, None)?;
                }
                refused.count(decision);
            }
            known.noted.push((key, seen));
        }
        refused.traits = self.note_traits(events)?;
        self.resolve(&touched)?;
        Ok(refused)
    }

    /// Takes in what another store knows.
    pub(crate) fn know(&self, facts: &[&KnownFact]) -> Result<Refused, StoreError> {
        let (mut touched, mut refused) = (Touched::default(), Refused::default());
        for fact in facts {
            let (fact, seen) = match &fact.what {
                Told::User { user, seen } => (Fact::User(user), *seen),
                Told::Link { anonymous, user, seen } => (Fact::Link { device: anonymous, user }, *seen),
                Told::Alias { previous, user, first_ms } => {
                    (Fact::Alias { previous, user }, Seen::at(*first_ms))
                }
                Told::Apart { from, user, by } => {
                    self.link(from, user, false, by)?;
                    continue;
                }
                Told::Traits { who, traits } => {
                    let (is_user, id) = match who {
                        Subject::User(id) => (true, id),
                        Subject::Anonymous(id) => (false, id),
                    };
                    let mut known = self.traits(is_user, id)?;
                    known.merge(traits.clone());
                    self.keep_traits(is_user, id, &known)?;
                    continue;
                }
            };
            if let Some(decision) = self.note_one(fact, seen, None, &mut touched)? {
                refused.count(decision);
            }
        }
        self.resolve(&touched)?;
        Ok(refused)
    }

    fn fact_key(&self, fact: Fact<'_>) -> u64 {
        let tenant = self.tenant.to_string();
        match fact {
            Fact::User(user) => self.keys.event(&tenant, &format!("u\0{user}")),
            Fact::Link { device, user } => self.keys.event(&tenant, &format!("l\0{device}\0{user}")),
            Fact::Alias { previous, user } => self.keys.event(&tenant, &format!("a\0{previous}\0{user}")),
        }
    }

    /// Notes a fact, which an event tells if there is one. Returns why it was not.
    fn note_one(
        &self,
        fact: Fact<'_>,
        seen: Seen,
        event: Option<&Event>,
        touched: &mut Touched,
    ) -> Result<Option<Decision>, StoreError> {
        match fact {
            Fact::User(user) => {
                if self.note_user(user, seen)? && self.is_aliased(user)? {
                    touched.users.insert(user.to_owned());
                }
                Ok(None)
            }
            Fact::Link { device, user } => self.note_link(device, user, seen, event, touched),
            Fact::Alias { previous, user } => self.note_alias(previous, user, seen, event, touched),
        }
    }

    /// True if the user was seen earlier than was known.
    fn note_user(&self, user: &str, seen: Seen) -> Result<bool, StoreError> {
        let known = self.user(user)?;
        if known.is_some_and(|known| known.includes(&seen)) {
            return Ok(false);
        }
        let sql =
            "INSERT INTO user(tenant, id, first_ms, last_ms) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE
            SET first_ms = min(first_ms, excluded.first_ms), last_ms = max(last_ms, excluded.last_ms)";
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.execute(params![self.tenant, user, seen.first_ms, seen.last_ms])?;
        Ok(known.is_none_or(|known| seen.first_ms < known.first_ms))
    }

    fn user(&self, user: &str) -> Result<Option<Seen>, StoreError> {
        let sql = "SELECT first_ms, last_ms FROM user WHERE tenant = ?1 AND id = ?2";
        let mut statement = self.connection.prepare_cached(sql)?;
        let seen = |row: &Row<'_>| Ok(Seen { first_ms: row.get(0)?, last_ms: row.get(1)? });
        Ok(statement.query_row(params![self.tenant, user], seen).optional()?)
    }

    fn is_aliased(&self, user: &str) -> Result<bool, StoreError> {
        let sql = "SELECT EXISTS(SELECT 1 FROM alias WHERE tenant = ?1 AND previous = ?2)
            OR EXISTS(SELECT 1 FROM alias WHERE tenant = ?1 AND user = ?2)";
        Ok(self.connection.prepare_cached(sql)?.query_row(params![self.tenant, user], |row| row.get(0))?)
    }

    fn note_link(
        &self,
        device: &str,
        user: &str,
        seen: Seen,
        event: Option<&Event>,
        touched: &mut Touched,
    ) -> Result<Option<Decision>, StoreError> {
        let sql = "SELECT first_ms, last_ms FROM link WHERE tenant = ?1 AND device = ?2 AND user = ?3";
        let known = |row: &Row<'_>| Ok(Seen { first_ms: row.get(0)?, last_ms: row.get(1)? });
        let mut statement = self.connection.prepare_cached(sql)?;
        let known = statement.query_row(params![self.tenant, device, user], known).optional()?;
        if known.is_some_and(|known| known.includes(&seen)) {
            return Ok(None);
        }
        if known.is_none() {
            let users = self.users_of(device)?;
            if let Some(decision) = self.make_room_for(device, user, seen.first_ms, &users)? {
                tracing::debug!(?decision, "a link was not noted");
                return Ok(Some(decision));
            }
            if let Some(event) = event {
                let before = if users.is_empty() && !self.is_aliased(device)? {
                    None
                } else {
                    self.counted_under(device)?
                };
                self.log_event(Decision::Linked, Fact::Link { device, user }, event, before)?;
            }
        }
        let sql = "INSERT INTO link(tenant, device, user, first_ms, last_ms) VALUES (?1, ?2, ?3, ?4, ?5)
            ON CONFLICT DO UPDATE
            SET first_ms = min(first_ms, excluded.first_ms), last_ms = max(last_ms, excluded.last_ms)";
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.execute(params![self.tenant, device, user, seen.first_ms, seen.last_ms])?;
        if known.is_none_or(|known| seen.first_ms < known.first_ms) {
            touched.devices.insert(device.to_owned());
        }
        Ok(None)
    }

    /// The users of a device, those who used it earlier first.
    fn users_of(&self, device: &str) -> Result<Vec<(i64, String)>, StoreError> {
        let sql = "SELECT first_ms, user FROM link WHERE tenant = ?1 AND device = ?2 ORDER BY first_ms, user";
        self.pairs(sql, device)
    }

    /// Makes room for a new link, for which the latest of the device's users gives way; or
    /// says why there is none.
    fn make_room_for(
        &self,
        device: &str,
        user: &str,
        time_ms: i64,
        users: &[(i64, String)],
    ) -> Result<Option<Decision>, StoreError> {
        let devices = "SELECT count(*) FROM link WHERE tenant = ?1 AND user = ?2";
        let mut statement = self.connection.prepare_cached(devices)?;
        let devices: i64 = statement.query_row(params![self.tenant, user], |row| row.get(0))?;
        if devices >= DEVICES_OF_A_USER_MAX as i64 {
            return Ok(Some(Decision::UserHasTooManyDevices));
        }
        match users.last() {
            Some(last) if users.len() >= USERS_OF_A_DEVICE_MAX => {
                if *last < (time_ms, user.to_owned()) {
                    return Ok(Some(Decision::DeviceHasTooManyUsers));
                }
                let sql = "DELETE FROM link WHERE tenant = ?1 AND device = ?2 AND user = ?3";
                self.connection.prepare_cached(sql)?.execute(params![self.tenant, device, last.1])?;
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    fn note_alias(
        &self,
        previous: &str,
        user: &str,
        seen: Seen,
        event: Option<&Event>,
        touched: &mut Touched,
    ) -> Result<Option<Decision>, StoreError> {
        let sql = "SELECT first_ms FROM alias WHERE tenant = ?1 AND previous = ?2 AND user = ?3";
        let mut statement = self.connection.prepare_cached(sql)?;
        let known: Option<i64> =
            statement.query_row(params![self.tenant, previous, user], |row| row.get(0)).optional()?;
        if known.is_some_and(|known| known <= seen.first_ms) {
            return Ok(None);
        }
        if known.is_none() {
            let mut component = self.component(previous)?;
            component.extend(self.component(user)?);
            if component.len() > COMPONENT_MAX {
                tracing::warn!(
                    ids_max = COMPONENT_MAX,
                    "an alias was not noted: it would join too many users"
                );
                return Ok(Some(Decision::TooManyAliases));
            }
            if let Some(event) = event {
                let before = self.counted_under(previous)?;
                self.log_event(Decision::Aliased, Fact::Alias { previous, user }, event, before)?;
            }
        }
        let sql = "INSERT INTO alias(tenant, previous, user, first_ms) VALUES (?1, ?2, ?3, ?4)
            ON CONFLICT DO UPDATE SET first_ms = excluded.first_ms";
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.execute(params![self.tenant, previous, user, seen.first_ms])?;
        touched.users.extend([previous.to_owned(), user.to_owned()]);
        touched.devices.insert(previous.to_owned());
        Ok(None)
    }

    /// Under whom an id counts, if that is another.
    pub(super) fn counted_under(&self, id: &str) -> Result<Option<String>, StoreError> {
        let (facts, ..) = self.gather(&Touched::both(id))?;
        Ok(facts.resolve().counted_under(id).map(str::to_owned))
    }

    /// Notes what identifies say about somebody. Returns how many keys were refused.
    fn note_traits(&self, events: &[&Event]) -> Result<u64, StoreError> {
        let mut all_refused = 0;
        let mut told: BTreeMap<(bool, &str), Vec<&Event>> = BTreeMap::new();
        for event in events.iter().filter(|event| traits::tells(event)) {
            let Some(subject) = event.subject() else { continue };
            told.entry((event.user_id().is_some(), subject)).or_default().push(event);
        }
        for ((is_user, id), events) in told {
            let known = self.traits(is_user, id)?;
            let mut traits = known.clone();
            let refused: usize = events.iter().map(|event| traits.tell(event)).sum();
            if refused > 0 {
                tracing::warn!(refused, "traits were not kept: somebody has too many");
                all_refused += refused as u64;
            }
            if traits != known {
                self.keep_traits(is_user, id, &traits)?;
            }
        }
        Ok(all_refused)
    }

    fn keep_traits(&self, is_user: bool, id: &str, traits: &Traits) -> Result<(), StoreError> {
        let sql = "INSERT INTO traits(tenant, is_user, id, traits) VALUES (?1, ?2, ?3, ?4)
            ON CONFLICT DO UPDATE SET traits = excluded.traits";
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.execute(params![self.tenant, is_user, id, traits.to_stored()])?;
        Ok(())
    }

    fn traits(&self, is_user: bool, id: &str) -> Result<Traits, StoreError> {
        let sql = "SELECT traits FROM traits WHERE tenant = ?1 AND is_user = ?2 AND id = ?3";
        let mut statement = self.connection.prepare_cached(sql)?;
        let stored: Option<String> =
            statement.query_row(params![self.tenant, is_user, id], |row| row.get(0)).optional()?;
        Ok(stored.map(|stored| Traits::from_stored(&stored)).unwrap_or_default())
    }

    /// The rows of a statement that asks for two values of (tenant, id).
    fn pairs<A: rusqlite::types::FromSql, B: rusqlite::types::FromSql>(
        &self,
        sql: &str,
        id: &str,
    ) -> Result<Vec<(A, B)>, StoreError> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let rows = statement.query_map(params![self.tenant, id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// All ids that aliases join with one.
    fn component(&self, id: &str) -> Result<BTreeSet<String>, StoreError> {
        let near = "SELECT user, first_ms FROM alias WHERE tenant = ?1 AND previous = ?2
            UNION ALL SELECT previous, first_ms FROM alias WHERE tenant = ?1 AND user = ?2";
        let (mut component, mut open) = (BTreeSet::from([id.to_owned()]), vec![id.to_owned()]);
        while let Some(id) = open.pop() {
            for (next, _) in self.pairs::<String, i64>(near, &id)? {
                if component.len() <= 2 * COMPONENT_MAX && component.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        Ok(component)
    }

    /// The facts that say who some are, and who those are whom it may change.
    fn gather(&self, touched: &Touched) -> Result<(Facts, BTreeSet<String>, BTreeSet<String>), StoreError> {
        let mut users = BTreeSet::new();
        for user in &touched.users {
            users.extend(self.component(user)?);
        }
        let mut devices = touched.devices.clone();
        let of_user = "SELECT device, first_ms FROM link WHERE tenant = ?1 AND user = ?2
            UNION ALL SELECT previous, first_ms FROM alias WHERE tenant = ?1 AND user = ?2";
        for user in &users {
            devices.extend(self.pairs::<String, i64>(of_user, user)?.into_iter().map(|(device, _)| device));
        }
        let (mut facts, mut all) = (Facts::default(), users.clone());
        for device in &devices {
            let links = "SELECT user, first_ms, last_ms FROM link WHERE tenant = ?1 AND device = ?2";
            let mut statement = self.connection.prepare_cached(links)?;
            let mut rows = statement.query(params![self.tenant, device])?;
            while let Some(row) = rows.next()? {
                let (user, seen): (String, _) =
                    (row.get(0)?, Seen { first_ms: row.get(1)?, last_ms: row.get(2)? });
                facts.note(Fact::Link { device, user: &user }, seen);
                all.extend(self.component(&user)?);
            }
            all.extend(self.component(device)?);
        }
        for id in all.iter().chain(&devices) {
            let apart = "SELECT user, 0 FROM apart WHERE tenant = ?1 AND device = ?2";
            let apart = self.pairs::<String, i64>(apart, id)?.into_iter();
            facts.apart.extend(apart.map(|(user, _)| (id.clone(), user)));
        }
        for id in &all {
            let aliases = "SELECT user, first_ms FROM alias WHERE tenant = ?1 AND previous = ?2";
            for (user, first_ms) in self.pairs::<String, i64>(aliases, id)? {
                facts.note(Fact::Alias { previous: id, user: &user }, Seen::at(first_ms));
            }
            if let Some(seen) = self.user(id)? {
                facts.note(Fact::User(id), seen);
            }
        }
        Ok((facts, users, devices))
    }

    /// Works out anew who those are whose facts changed.
    fn resolve(&self, touched: &Touched) -> Result<(), StoreError> {
        if touched.users.is_empty() && touched.devices.is_empty() {
            return Ok(());
        }
        let (facts, users, devices) = self.gather(touched)?;
        let owners = facts.resolve();
        for user in users {
            self.own(self.keys.user(&user), self.keys.user(owners.root(&user)), i64::MAX)?;
        }
        for device in devices {
            let key = self.keys.anonymous(&device);
            match owners.devices.get(&device) {
                Some(owner) => self.own(key, self.keys.user(&owner.root), owner.until_ms)?,
                None => self.own(key, key, i64::MAX)?,
            }
        }
        Ok(())
    }

    /// Notes whose something is, if that is news.
    fn own(&self, who: u64, root: u64, until_ms: i64) -> Result<(), StoreError> {
        // What was always its own needs no row.
        let sql = if who == root {
            "UPDATE owner SET root = ?3, until_ms = ?4, n = ?5
                WHERE tenant = ?1 AND who = ?2 AND (root <> ?3 OR until_ms <> ?4)"
        } else {
            "INSERT INTO owner(tenant, who, root, until_ms, n) VALUES (?1, ?2, ?3, ?4, ?5)
                ON CONFLICT DO UPDATE SET root = excluded.root, until_ms = excluded.until_ms, n = excluded.n
                WHERE root <> excluded.root OR until_ms <> excluded.until_ms"
        };
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.execute(params![self.tenant, who as i64, root as i64, until_ms, self.n])?;
        Ok(())
    }

    /// Puts an id and a user apart, or takes that back.
    pub(crate) fn link(&self, from: &str, user: &str, joined: bool, by: &Operator) -> Result<(), StoreError> {
        let before = self.counted_under(from)?;
        let changed = if joined {
            let sql = "DELETE FROM apart WHERE tenant = ?1 AND device = ?2 AND user = ?3";
            self.connection.prepare_cached(sql)?.execute(params![self.tenant, from, user])?
        } else {
            let sql = "INSERT OR IGNORE INTO apart(tenant, device, user, operator, reason, at_ms)
                VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
            let mut statement = self.connection.prepare_cached(sql)?;
            statement.execute(params![self.tenant, from, user, by.name, by.reason, by.at_ms])?
        };
        if changed == 0 {
            return Ok(());
        }
        self.log_operator(joined, from, user, by, before)?;
        let mut touched = Touched::both(from);
        touched.users.insert(user.to_owned());
        touched.devices.insert(user.to_owned());
        self.resolve(&touched)
    }

    /// Everybody who is the same as a user, and the devices that are theirs.
    fn person(&self, user: &str) -> Result<(Facts, Owners, BTreeSet<String>, BTreeSet<String>), StoreError> {
        let touched = Touched { users: BTreeSet::from([user.to_owned()]), ..Touched::default() };
        let (facts, users, devices) = self.gather(&touched)?;
        let owners = facts.resolve();
        let root = owners.root(user);
        let users = users.into_iter().filter(|one| owners.root(one) == root).collect();
        let is_theirs = |device: &String| owners.devices.get(device).is_some_and(|owner| owner.root == root);
        let devices = devices.into_iter().filter(is_theirs).collect();
        Ok((facts, owners, users, devices))
    }

    /// What is known about somebody.
    pub(crate) fn identity(&self, who: &Subject) -> Result<Option<Identity>, StoreError> {
        let user = match who {
            Subject::User(user) => user.clone(),
            Subject::Anonymous(device) => {
                let touched = Touched { devices: BTreeSet::from([device.clone()]), ..Touched::default() };
                let (facts, ..) = self.gather(&touched)?;
                match facts.resolve().devices.remove(device) {
                    Some(owner) => owner.root,
                    None => return self.lone_device(device, &facts),
                }
            }
        };
        let (facts, owners, users, anonymous) = self.person(&user)?;
        let is_known = |one: &String| facts.users.contains_key(one) || owners.roots.contains_key(one);
        let users: BTreeSet<String> = users.into_iter().filter(is_known).collect();
        if users.is_empty() && anonymous.is_empty() {
            return Ok(None);
        }
        let (mut traits, mut of_devices) = (Traits::default(), Traits::default());
        for user in &users {
            traits.merge(self.traits(true, user)?);
        }
        for device in &anonymous {
            of_devices.merge(self.traits(false, device)?);
        }
        traits.fill(of_devices);
        let seen = || users.iter().filter_map(|user| facts.users.get(user));
        Ok(Some(Identity {
            root: owners.root(&user).to_owned(),
            first_seen_ms: seen().map(|seen| seen.first_ms).min(),
            last_seen_ms: seen().map(Seen::last_shown_ms).max(),
            ties: facts
                .ties(|from| users.contains(from) || anonymous.contains(from), |user| users.contains(user)),
            users: users.into_iter().collect(),
            anonymous: anonymous.into_iter().collect(),
            traits: traits.shown(),
        }))
    }

    /// A device that is nobody's, if something is known of it but its events.
    fn lone_device(&self, device: &str, facts: &Facts) -> Result<Option<Identity>, StoreError> {
        let traits = self.traits(false, device)?;
        let ties = facts.ties(|from| from == device, |_| false);
        if traits.is_empty() && ties.is_empty() {
            return Ok(None);
        }
        Ok(Some(Identity { traits: traits.shown(), ties, ..Identity::of_device(device) }))
    }

    /// Whose events are somebody's: see [`Whose`].
    pub(crate) fn whose(&self, who: &Subject) -> Result<Whose, StoreError> {
        match who {
            Subject::Anonymous(device) => Ok(Whose { device: Some(device.clone()), ..Whose::default() }),
            Subject::User(user) => {
                let (_, owners, users, devices) = self.person(user)?;
                let until = |device: String| {
                    let until_ms = owners.devices.get(&device).map_or(i64::MIN, |owner| owner.until_ms);
                    (device, until_ms)
                };
                Ok(Whose { device: None, users, devices: devices.into_iter().map(until).collect() })
            }
        }
    }

    /// Deletes every fact about somebody; how many.
    pub(crate) fn forget(&self, who: &Subject, whose: &Whose) -> Result<u64, StoreError> {
        let mut deleted = 0;
        let mut delete = |sql: &str, id: &str| -> Result<(), StoreError> {
            deleted += self.connection.prepare_cached(sql)?.execute(params![self.tenant, id])? as u64;
            Ok(())
        };
        let mut touched = Touched::default();
        match who {
            Subject::Anonymous(device) => {
                delete("DELETE FROM link WHERE tenant = ?1 AND device = ?2", device)?;
                if self.user(device)?.is_none() {
                    delete("DELETE FROM alias WHERE tenant = ?1 AND previous = ?2", device)?;
                }
                delete("DELETE FROM apart WHERE tenant = ?1 AND device = ?2", device)?;
                delete("DELETE FROM traits WHERE tenant = ?1 AND is_user = 0 AND id = ?2", device)?;
                touched.devices.insert(device.clone());
            }
            Subject::User(_) => {
                for user in &whose.users {
                    // Whoever shared a device with them may now be its owner.
                    let devices = "SELECT device, 0 FROM link WHERE tenant = ?1 AND user = ?2
                        UNION SELECT previous, 0 FROM alias WHERE tenant = ?1 AND user = ?2";
                    let devices = self.pairs::<String, i64>(devices, user)?;
                    touched.devices.extend(devices.into_iter().map(|(device, _)| device));
                    touched.users.insert(user.clone());
                    delete("DELETE FROM user WHERE tenant = ?1 AND id = ?2", user)?;
                    delete("DELETE FROM link WHERE tenant = ?1 AND user = ?2", user)?;
                    delete("DELETE FROM alias WHERE tenant = ?1 AND previous = ?2", user)?;
                    delete("DELETE FROM alias WHERE tenant = ?1 AND user = ?2", user)?;
                    delete("DELETE FROM apart WHERE tenant = ?1 AND device = ?2", user)?;
                    delete("DELETE FROM apart WHERE tenant = ?1 AND user = ?2", user)?;
                    delete("DELETE FROM traits WHERE tenant = ?1 AND is_user = 1 AND id = ?2", user)?;
                }
                for device in whose.devices.keys() {
                    delete("DELETE FROM traits WHERE tenant = ?1 AND is_user = 0 AND id = ?2", device)?;
                }
            }
        }
        self.forget_in_log(who, &whose.users)?;
        self.disown(&touched)?;
        self.resolve(&touched)?;
        Ok(deleted)
    }

    /// Nobody's id stays behind, not even as its key.
    fn disown(&self, touched: &Touched) -> Result<(), StoreError> {
        let mut statement =
            self.connection.prepare_cached("DELETE FROM owner WHERE tenant = ?1 AND who = ?2")?;
        let users = touched.users.iter().map(|user| self.keys.user(user));
        let devices = touched.devices.iter().map(|device| self.keys.anonymous(device));
        for who in users.chain(devices) {
            statement.execute(params![self.tenant, who as i64])?;
        }
        Ok(())
    }
}

/// Which events are somebody's.
#[derive(Debug, Clone, Default)]
pub(crate) struct Whose {
    /// All that name this device.
    device: Option<String>,
    /// All under these ids.
    users: BTreeSet<String>,
    /// And those of these devices without a user id, until that time.
    devices: BTreeMap<String, i64>,
}

impl Whose {
    pub(crate) fn includes(&self, event: &Event) -> bool {
        if let Some(device) = &self.device {
            return event.anonymous_id() == Some(device);
        }
        match (event.user_id(), event.anonymous_id()) {
            (Some(user), _) => self.users.contains(user),
            (None, Some(device)) => {
                self.devices.get(device).is_some_and(|until_ms| event.time_ms() < *until_ms)
            }
            (None, None) => false,
        }
    }

    /// Keys by which a block with such events is found; `None`: any block may have them.
    pub(crate) fn keys(&self, keys: Keys) -> Option<BTreeSet<u64>> {
        if self.device.is_some() {
            return None;
        }
        let users = self.users.iter().map(|user| keys.user(user));
        Some(users.chain(self.devices.keys().map(|device| keys.anonymous(device))).collect())
    }
}
