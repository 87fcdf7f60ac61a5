//! Who is who, in the tables of a file: facts are noted as events come, and what follows
//! from those that changed is worked out anew by [`Facts::resolve`].

use std::collections::{BTreeMap, BTreeSet, HashMap};

use analytics_relay_providers::Event;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::{
    Decision, Identity, Operator, StoreError, Subject,
    model::{
        FactLimits, Facts, Keys, Known as Told, KnownFact, Owners, Seen,
        event::{previous_id, shown},
        identity::{Fact, Room, facts_of_batch, owner_of, room_for},
        traits::{self, Traits},
    },
    scan::{chunk::Chunk, table::TextColumn},
};

/// Most facts that are remembered to be known.
const KNOWN_MAX: usize = 100_000;

/// Facts that need not be looked up: when they were seen.
#[derive(Debug, Default)]
pub(crate) struct Known {
    times: HashMap<u64, Seen>,
    /// What the running transaction notes, to be known once it is committed.
    noted: HashMap<u64, Seen>,
}

impl Known {
    fn has(&self, fact: u64, seen: &Seen) -> bool {
        let has = |times: &HashMap<u64, Seen>| times.get(&fact).is_some_and(|known| known.includes(seen));
        has(&self.noted) || has(&self.times)
    }

    fn note(&mut self, fact: u64, seen: Seen) {
        self.noted.entry(fact).or_insert(seen).add(seen);
    }

    /// A fact had to give way.
    fn forget(&mut self, fact: u64) {
        self.noted.remove(&fact);
        self.times.remove(&fact);
    }

    pub(crate) fn committed(&mut self) {
        if self.times.len() + self.noted.len() > KNOWN_MAX {
            self.times.clear();
        }
        for (fact, seen) in self.noted.drain() {
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
    pub(crate) limits: FactLimits,
    /// The number of the transaction.
    pub(crate) n: i64,
}

/// What a transaction notes.
struct Noting<'k> {
    known: &'k mut Known,
    touched: Touched,
    refused: Refused,
}

impl<'k> Noting<'k> {
    fn new(known: &'k mut Known) -> Self {
        Self { known, touched: Touched::default(), refused: Refused::default() }
    }
}

impl FactTables<'_> {
    /// Notes what events tell, which are in the order in which they came.
    pub(crate) fn note(&self, events: &[&Event], known: &mut Known) -> Result<Refused, StoreError> {
        let mut noting = Noting::new(known);
        for (fact, seen, event) in facts_of_batch(events.iter().copied()) {
            self.note_one(fact, seen, Some(event), &mut noting)?;
        }
        noting.refused.traits = self.note_traits(events)?;
        self.resolve(&noting.touched)?;
        Ok(noting.refused)
    }

    /// Takes in what another store knows.
    pub(crate) fn know(&self, facts: &[&KnownFact], known: &mut Known) -> Result<Refused, StoreError> {
        let mut noting = Noting::new(known);
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
            self.note_one(fact, seen, None, &mut noting)?;
        }
        self.resolve(&noting.touched)?;
        Ok(noting.refused)
    }

    fn fact_key(&self, fact: Fact<'_>) -> u64 {
        self.keys.fact(self.tenant, fact)
    }

    /// Notes a fact, which an event tells if there is one.
    fn note_one(
        &self,
        fact: Fact<'_>,
        seen: Seen,
        event: Option<&Event>,
        noting: &mut Noting<'_>,
    ) -> Result<(), StoreError> {
        let key = self.fact_key(fact);
        if noting.known.has(key, &seen) {
            return Ok(());
        }
        let refused = match fact {
            Fact::User(user) => {
                self.note_user(user, seen, event, noting)?;
                None
            }
            Fact::Link { device, user } => self.note_link(device, user, seen, event, noting)?,
            Fact::Alias { previous, user } => self.note_alias(previous, user, seen, event, noting)?,
        };
        match refused {
            Some(decision) => self.refuse(decision, fact, event, noting),
            None => {
                noting.known.note(key, seen);
                Ok(())
            }
        }
    }

    /// Counts what is not noted. One is told of each batch: they come in crowds.
    fn refuse(
        &self,
        decision: Decision,
        fact: Fact<'_>,
        event: Option<&Event>,
        noting: &mut Noting<'_>,
    ) -> Result<(), StoreError> {
        if let Some(event) = event
            && noting.refused == Refused::default()
        {
            tracing::debug!(?decision, "what an event tells about who is who was not noted: it is too much");
            self.log_event(decision, fact, event, None)?;
        }
        noting.refused.count(decision);
        Ok(())
    }

    fn note_user(
        &self,
        user: &str,
        seen: Seen,
        event: Option<&Event>,
        noting: &mut Noting<'_>,
    ) -> Result<(), StoreError> {
        let known = self.user(user)?;
        if known.is_some_and(|known| known.includes(&seen)) {
            return Ok(());
        }
        let sql =
            "INSERT INTO user(tenant, id, first_ms, last_ms) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE
            SET first_ms = min(first_ms, excluded.first_ms), last_ms = max(last_ms, excluded.last_ms)";
        let mut statement = self.connection.prepare_cached(sql)?;
        if known.is_some() {
            statement.execute(params![self.tenant, user, seen.first_ms, seen.last_ms])?;
        } else {
            let aliases = self.aliases_of(user)?;
            statement.execute(params![self.tenant, user, seen.first_ms, seen.last_ms])?;
            if !aliases.is_empty() {
                self.join_again(user, aliases, event, noting)?;
            }
        }
        if known.is_none_or(|known| seen.first_ms < known.first_ms) && self.is_aliased(user)? {
            noting.touched.users.insert(user.to_owned());
        }
        Ok(())
    }

    /// Aliases of an id that turned out to be a user's join users from now on: the earliest
    /// of them, as long as there is room.
    fn join_again(
        &self,
        previous: &str,
        aliases: Vec<(i64, String)>,
        event: Option<&Event>,
        noting: &mut Noting<'_>,
    ) -> Result<(), StoreError> {
        noting.touched.devices.insert(previous.to_owned());
        let sql = "DELETE FROM alias WHERE tenant = ?1 AND previous = ?2";
        self.connection.prepare_cached(sql)?.execute(params![self.tenant, previous])?;
        for (first_ms, user) in aliases {
            let alias = Fact::Alias { previous, user: &user };
            if self.may_join(previous, &user)? {
                self.write_alias(previous, &user, first_ms)?;
            } else {
                noting.known.forget(self.fact_key(alias));
                self.refuse(Decision::TooManyAliases, alias, event, noting)?;
            }
        }
        Ok(())
    }

    fn user(&self, user: &str) -> Result<Option<Seen>, StoreError> {
        let sql = "SELECT first_ms, last_ms FROM user WHERE tenant = ?1 AND id = ?2";
        let mut statement = self.connection.prepare_cached(sql)?;
        let seen = |row: &Row<'_>| Ok(Seen { first_ms: row.get(0)?, last_ms: row.get(1)? });
        Ok(statement.query_row(params![self.tenant, user], seen).optional()?)
    }

    /// To whom an id is aliased, those to whom it was earlier first.
    fn aliases_of(&self, previous: &str) -> Result<Vec<(i64, String)>, StoreError> {
        let sql =
            "SELECT first_ms, user FROM alias WHERE tenant = ?1 AND previous = ?2 ORDER BY first_ms, user";
        self.pairs(sql, previous)
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
        noting: &mut Noting<'_>,
    ) -> Result<Option<Decision>, StoreError> {
        let sql = "SELECT first_ms, last_ms FROM link WHERE tenant = ?1 AND device = ?2 AND user = ?3";
        let known = |row: &Row<'_>| Ok(Seen { first_ms: row.get(0)?, last_ms: row.get(1)? });
        let mut statement = self.connection.prepare_cached(sql)?;
        let known = statement.query_row(params![self.tenant, device, user], known).optional()?;
        if known.is_some_and(|known| known.includes(&seen)) {
            return Ok(None);
        }
        if known.is_none()
            && let Some(decision) =
                self.make_room(Fact::Link { device, user }, Decision::Linked, seen.first_ms, event, noting)?
        {
            return Ok(Some(decision));
        }
        let sql = "INSERT INTO link(tenant, device, user, first_ms, last_ms) VALUES (?1, ?2, ?3, ?4, ?5)
            ON CONFLICT DO UPDATE
            SET first_ms = min(first_ms, excluded.first_ms), last_ms = max(last_ms, excluded.last_ms)";
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.execute(params![self.tenant, device, user, seen.first_ms, seen.last_ms])?;
        if known.is_none_or(|known| seen.first_ms < known.first_ms) {
            noting.touched.devices.insert(device.to_owned());
        }
        Ok(None)
    }

    /// Makes room for a new fact that says of a device that it is a user's, for which the
    /// latest of the device's users gives way, and tells what is decided; or says why there
    /// is none.
    fn make_room(
        &self,
        fact: Fact<'_>,
        decision: Decision,
        first_ms: i64,
        event: Option<&Event>,
        noting: &mut Noting<'_>,
    ) -> Result<Option<Decision>, StoreError> {
        let (Fact::Link { device, user } | Fact::Alias { previous: device, user }) = fact else {
            return Ok(None);
        };
        if self.devices_count(&self.component(user)?)? >= self.limits.devices_of_a_user {
            return Ok(Some(Decision::UserHasTooManyDevices));
        }
        let facts = self.facts_of_device(device)?;
        let last = match room_for(user, first_ms, &facts.all_users_of(device), &self.limits) {
            Room::There => None,
            Room::Instead(last) => Some(last),
            Room::None => return Ok(Some(Decision::DeviceHasTooManyUsers)),
        };
        if let Some(event) = event {
            self.log_event(decision, fact, event, self.counted_under_by(device, &facts)?)?;
        }
        if let Some(last) = last {
            let sql = "DELETE FROM link WHERE tenant = ?1 AND device = ?2 AND user = ?3";
            self.connection.prepare_cached(sql)?.execute(params![self.tenant, device, last])?;
            noting.known.forget(self.fact_key(Fact::Link { device, user: &last }));
            // What joins users says nothing of the device.
            if !facts.users.contains_key(device) {
                let sql = "DELETE FROM alias WHERE tenant = ?1 AND previous = ?2 AND user = ?3";
                self.connection.prepare_cached(sql)?.execute(params![self.tenant, device, last])?;
                noting.known.forget(self.fact_key(Fact::Alias { previous: device, user: &last }));
            }
        }
        Ok(None)
    }

    fn note_alias(
        &self,
        previous: &str,
        user: &str,
        seen: Seen,
        event: Option<&Event>,
        noting: &mut Noting<'_>,
    ) -> Result<Option<Decision>, StoreError> {
        let sql = "SELECT first_ms FROM alias WHERE tenant = ?1 AND previous = ?2 AND user = ?3";
        let mut statement = self.connection.prepare_cached(sql)?;
        let known: Option<i64> =
            statement.query_row(params![self.tenant, previous, user], |row| row.get(0)).optional()?;
        if known.is_some_and(|known| known <= seen.first_ms) {
            return Ok(None);
        }
        let alias = Fact::Alias { previous, user };
        if self.user(previous)?.is_none() {
            if known.is_none()
                && let Some(decision) =
                    self.make_room(alias, Decision::Aliased, seen.first_ms, event, noting)?
            {
                return Ok(Some(decision));
            }
            noting.touched.devices.insert(previous.to_owned());
        } else if known.is_none() {
            if !self.may_join(previous, user)? {
                return Ok(Some(Decision::TooManyAliases));
            }
            if let Some(event) = event {
                self.log_event(Decision::Aliased, alias, event, self.counted_under(previous)?)?;
            }
            noting.touched.users.extend([previous.to_owned(), user.to_owned()]);
        }
        self.write_alias(previous, user, seen.first_ms)?;
        Ok(None)
    }

    fn write_alias(&self, previous: &str, user: &str, first_ms: i64) -> Result<(), StoreError> {
        let sql = "INSERT INTO alias(tenant, previous, user, first_ms) VALUES (?1, ?2, ?3, ?4)
            ON CONFLICT DO UPDATE SET first_ms = excluded.first_ms";
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.execute(params![self.tenant, previous, user, first_ms])?;
        Ok(())
    }

    fn may_join(&self, one: &str, other: &str) -> Result<bool, StoreError> {
        let mut joined = self.component(one)?;
        joined.extend(self.component(other)?);
        Ok(joined.len() <= self.limits.users_joined
            && self.devices_count(&joined)? <= self.limits.devices_of_a_user)
    }

    /// How many facts say of a device that it is one of these users'.
    fn devices_count(&self, users: &BTreeSet<String>) -> Result<usize, StoreError> {
        let sql = "SELECT (SELECT count(*) FROM link WHERE tenant = ?1 AND user = ?2)
            + (SELECT count(*) FROM alias WHERE tenant = ?1 AND user = ?2 AND NOT EXISTS
                (SELECT 1 FROM user AS one WHERE one.tenant = ?1 AND one.id = previous))";
        let mut statement = self.connection.prepare_cached(sql)?;
        let mut count = 0;
        for user in users {
            count += statement.query_row(params![self.tenant, user], |row| row.get::<_, i64>(0))?;
        }
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Under whom an id counts, if that is another.
    pub(super) fn counted_under(&self, id: &str) -> Result<Option<String>, StoreError> {
        self.counted_under_by(id, &self.facts_of_device(id)?)
    }

    /// The same, by what is known of it as a device.
    fn counted_under_by(&self, id: &str, facts: &Facts) -> Result<Option<String>, StoreError> {
        let root = match facts.owners_of(id).first() {
            Some((_, user)) => self.root(user)?,
            None => self.root(id)?,
        };
        Ok(Some(root).filter(|root| root != id))
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

    /// All users whom aliases join with one, be it that an operator has taken them back.
    fn component(&self, user: &str) -> Result<BTreeSet<String>, StoreError> {
        let near = "SELECT user, 0 FROM alias WHERE tenant = ?1 AND previous = ?2
                AND EXISTS (SELECT 1 FROM user AS one WHERE one.tenant = ?1 AND one.id = ?2)
            UNION ALL SELECT previous, 0 FROM alias WHERE tenant = ?1 AND user = ?2
                AND EXISTS (SELECT 1 FROM user AS one WHERE one.tenant = ?1 AND one.id = previous)";
        let (mut component, mut open) = (BTreeSet::from([user.to_owned()]), vec![user.to_owned()]);
        while let Some(id) = open.pop() {
            for (next, _) in self.pairs::<String, i64>(near, &id)? {
                if component.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        Ok(component)
    }

    /// What says which of some users are one.
    fn facts_of_users(&self, users: &BTreeSet<String>) -> Result<Facts, StoreError> {
        let mut facts = Facts::default();
        for user in users {
            if let Some(seen) = self.user(user)? {
                facts.note(Fact::User(user), seen);
                self.add_aliases_of(user, &mut facts)?;
            }
            self.add_apart(user, &mut facts)?;
        }
        Ok(facts)
    }

    /// What says whose a device is.
    fn facts_of_device(&self, device: &str) -> Result<Facts, StoreError> {
        let mut facts = Facts::default();
        self.add_links(
            device,
            "SELECT ?2, user, first_ms, last_ms FROM link WHERE tenant = ?1 AND device = ?2",
            &mut facts,
        )?;
        self.add_aliases_of(device, &mut facts)?;
        if facts.links.is_empty() && facts.aliases.is_empty() {
            return Ok(facts);
        }
        self.add_apart(device, &mut facts)?;
        if !facts.aliases.is_empty() {
            if let Some(seen) = self.user(device)? {
                facts.note(Fact::User(device), seen);
            }
            for (_, user) in facts.aliases.clone().into_keys() {
                self.add_apart(&user, &mut facts)?;
            }
        }
        Ok(facts)
    }

    fn add_links(&self, id: &str, sql: &str, facts: &mut Facts) -> Result<(), StoreError> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let mut rows = statement.query(params![self.tenant, id])?;
        while let Some(row) = rows.next()? {
            let (device, user): (String, String) = (row.get(0)?, row.get(1)?);
            let seen = Seen { first_ms: row.get(2)?, last_ms: row.get(3)? };
            facts.note(Fact::Link { device: &device, user: &user }, seen);
        }
        Ok(())
    }

    fn add_aliases_of(&self, previous: &str, facts: &mut Facts) -> Result<(), StoreError> {
        for (first_ms, user) in self.aliases_of(previous)? {
            facts.note(Fact::Alias { previous, user: &user }, Seen::at(first_ms));
        }
        Ok(())
    }

    fn add_apart(&self, from: &str, facts: &mut Facts) -> Result<(), StoreError> {
        let apart = "SELECT user, 0 FROM apart WHERE tenant = ?1 AND device = ?2";
        let apart = self.pairs::<String, i64>(apart, from)?.into_iter();
        facts.apart.extend(apart.map(|(user, _)| (from.to_owned(), user)));
        Ok(())
    }

    /// The root of a user.
    fn root(&self, user: &str) -> Result<String, StoreError> {
        if !self.is_aliased(user)? {
            return Ok(user.to_owned());
        }
        Ok(self.facts_of_users(&self.component(user)?)?.resolve().root(user).to_owned())
    }

    /// The devices that are a user's by a link or an alias.
    fn devices_of(&self, user: &str) -> Result<Vec<String>, StoreError> {
        let sql = "SELECT device, 0 FROM link WHERE tenant = ?1 AND user = ?2
            UNION SELECT previous, 0 FROM alias WHERE tenant = ?1 AND user = ?2";
        Ok(self.pairs::<String, i64>(sql, user)?.into_iter().map(|(device, _)| device).collect())
    }

    /// Works out anew who those are whose facts changed, and whose the devices of those are
    /// who count under another id now.
    fn resolve(&self, touched: &Touched) -> Result<(), StoreError> {
        let (mut devices, mut resolved) = (touched.devices.clone(), BTreeSet::new());
        for user in &touched.users {
            if resolved.contains(user) {
                continue;
            }
            let component = self.component(user)?;
            let owners = self.facts_of_users(&component)?.resolve();
            for one in &component {
                let (key, root) = (self.keys.user(one), self.keys.user(owners.root(one)));
                if self.root_key(key)? != root {
                    self.own(key, root, i64::MAX)?;
                    devices.extend(self.devices_of(one)?);
                }
            }
            resolved.extend(component);
        }
        let mut roots = HashMap::new();
        devices.iter().try_for_each(|device| self.resolve_device(device, &mut roots))
    }

    /// Works out whose a device is, by the roots of its users, which are known.
    fn resolve_device(&self, device: &str, roots: &mut HashMap<String, u64>) -> Result<(), StoreError> {
        let (key, users) = (self.keys.anonymous(device), self.facts_of_device(device)?.owners_of(device));
        for (_, user) in &users {
            if !roots.contains_key(user) {
                roots.insert(user.clone(), self.root_key(self.keys.user(user))?);
            }
        }
        match owner_of(&users, |user| roots.get(user).copied()) {
            Some((Some(root), until_ms)) => self.own(key, root, until_ms),
            _ => self.own(key, key, i64::MAX),
        }
    }

    /// The key of a user's root, as it was worked out last.
    fn root_key(&self, user: u64) -> Result<u64, StoreError> {
        let sql = "SELECT root FROM owner WHERE tenant = ?1 AND who = ?2";
        let mut statement = self.connection.prepare_cached(sql)?;
        let root = statement.query_row(params![self.tenant, user as i64], |row| row.get::<_, i64>(0));
        Ok(root.optional()?.map_or(user, |root| root as u64))
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

    /// Everybody who is the same as a user, and the devices that are theirs, until when.
    fn person(&self, user: &str) -> Result<Person, StoreError> {
        let component = self.component(user)?;
        let facts = self.facts_of_users(&component)?;
        let owners = facts.resolve();
        let root = owners.root(user);
        let users: BTreeSet<String> = component.into_iter().filter(|one| owners.root(one) == root).collect();
        let mut devices = BTreeMap::new();
        for user in &users {
            for device in self.devices_of(user)? {
                let used = self.facts_of_device(&device)?.owners_of(&device);
                if let Some((true, until_ms)) = owner_of(&used, |user| users.contains(user)) {
                    devices.insert(device, until_ms);
                }
            }
        }
        Ok(Person { root: root.to_owned(), users, devices, facts, owners })
    }

    /// Adds to the facts of somebody what ties their ids to each other and to others.
    fn add_ties(&self, person: &mut Person) -> Result<(), StoreError> {
        let facts = &mut person.facts;
        for user in &person.users {
            let links = "SELECT device, ?2, first_ms, last_ms FROM link WHERE tenant = ?1 AND user = ?2";
            self.add_links(user, links, facts)?;
            let aliases = "SELECT first_ms, previous FROM alias WHERE tenant = ?1 AND user = ?2";
            for (first_ms, previous) in self.pairs::<i64, String>(aliases, user)? {
                facts.note(Fact::Alias { previous: &previous, user }, Seen::at(first_ms));
            }
            self.add_aliases_of(user, facts)?;
        }
        for device in person.devices.keys().chain(&person.users) {
            let of_device = self.facts_of_device(device)?;
            facts.links.extend(of_device.links);
            facts.aliases.extend(of_device.aliases);
        }
        let ends = facts.links.keys().chain(facts.aliases.keys());
        let ids: BTreeSet<String> = ends.flat_map(|(from, user)| [from.clone(), user.clone()]).collect();
        ids.iter().try_for_each(|id| self.add_apart(id, facts))
    }

    /// What is known about somebody.
    pub(crate) fn identity(&self, who: &Subject) -> Result<Option<Identity>, StoreError> {
        let user = match who {
            Subject::User(user) => user.clone(),
            Subject::Anonymous(device) => {
                let facts = self.facts_of_device(device)?;
                match facts.owners_of(device).into_iter().next() {
                    Some((_, owner)) => owner,
                    None => return self.lone_device(device, &facts),
                }
            }
        };
        let mut person = self.person(&user)?;
        self.add_ties(&mut person)?;
        let Person { root, users, devices, facts, owners } = person;
        let anonymous: BTreeSet<String> = devices.into_keys().collect();
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
            root,
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
            Subject::Anonymous(device) => {
                let previous = BTreeSet::from([device.clone()]);
                let previous = if self.user(device)?.is_none() { previous } else { BTreeSet::new() };
                Ok(Whose { device: Some(device.clone()), previous, ..Whose::default() })
            }
            Subject::User(user) => {
                let Person { users, devices, .. } = self.person(user)?;
                Ok(Whose { device: None, previous: users.clone(), users, devices })
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
                // If it is a user's id too, what kept that apart from others is gone.
                touched.users.insert(device.clone());
            }
            Subject::User(_) => {
                for user in &whose.users {
                    // Whoever shared a device with them may now be its owner.
                    touched.devices.extend(self.devices_of(user)?);
                    // An alias may say whose a device of that name was.
                    touched.devices.insert(user.clone());
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

/// Everybody who is the same.
struct Person {
    root: String,
    users: BTreeSet<String>,
    /// Their devices, and until when they are theirs.
    devices: BTreeMap<String, i64>,
    facts: Facts,
    owners: Owners,
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
    /// And aliases that name one of these as the id of before, whoever said so.
    previous: BTreeSet<String>,
}

impl Whose {
    pub(crate) fn includes(&self, event: &Event) -> bool {
        if previous_id(event).is_some_and(|previous| self.previous.contains(previous)) {
            return true;
        }
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

    /// The keys of those whose events are found by them.
    pub(crate) fn keys(&self, keys: Keys) -> BTreeSet<u64> {
        let users = self.users.iter().map(|user| keys.user(user));
        users.chain(self.devices.keys().map(|device| keys.anonymous(device))).collect()
    }

    /// True if a chunk may have such events; their keys are known.
    pub(crate) fn may_be_in(&self, chunk: &mut dyn Chunk, keys: &BTreeSet<u64>) -> Result<bool, StoreError> {
        if !keys.is_empty() && chunk.who(false)?.keys.iter().any(|key| keys.contains(key)) {
            return Ok(true);
        }
        if let Some(device) = &self.device
            && has_text(chunk, "anonymous_id", |id| id == device)?
        {
            return Ok(true);
        }
        Ok(!self.previous.is_empty() && has_text(chunk, "previous_id", |id| self.previous.contains(id))?)
    }
}

/// True if a text at a path of a chunk passes a test.
fn has_text(chunk: &mut dyn Chunk, path: &str, passes: impl Fn(&str) -> bool) -> Result<bool, StoreError> {
    let Some(TextColumn { texts, .. }) = chunk.path(path)? else { return Ok(false) };
    Ok((1..=texts.len() as u32).any(|code| shown(texts.get(code)).is_some_and(|text| passes(&text))))
}
