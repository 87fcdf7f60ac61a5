//! Who is who, in the tables of a server: of what a batch tells, the facts that have to do
//! with it are read, what follows is worked out as everywhere ([`Tenant`]), and what changed
//! is written.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use analytics_relay_providers::{Event, means_nobody};
use deadpool_postgres::Transaction;
use tokio_postgres::{Row, types::ToSql};

use super::{
    Shared,
    rows::{fits_key, kept, properties, told},
    time::Ts,
};
use crate::{
    By, Decision, Identity, LogEntry, Operator, StoreError, Subject,
    model::{
        FactLimits, Keys, Known as Told, KnownFact, Owners, Seen,
        event::previous_id,
        identity::{Fact, LOG_MAX, Visitor, facts_of, facts_of_batch},
        tenant::{Tenant, subject_of},
        traits::{self, Traits},
    },
};

/// Most facts that are remembered to be known.
const KNOWN_MAX: usize = 100_000;

/// Facts that need not be looked up: when they were seen, and of which tenants that holds.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// How often facts of a tenant were taken away when they were noted.
    epochs: HashMap<String, i64>,
    times: HashMap<u64, Seen>,
    /// What the running transaction notes, to be known once it is committed.
    noted: Vec<(u64, Seen)>,
}

impl Known {
    fn has(&self, fact: u64, seen: &Seen) -> bool {
        self.times.get(&fact).is_some_and(|known| known.includes(seen))
    }

    /// The running transaction is over.
    pub(super) fn ended(&mut self, is_committed: bool) {
        if self.times.len() + self.noted.len() > KNOWN_MAX {
            self.times.clear();
        }
        for (fact, seen) in self.noted.drain(..).filter(|_| is_committed) {
            self.times.entry(fact).or_insert(seen).add(seen);
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// What was not noted, as it would have been too much.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) links: u64,
    pub(super) aliases: u64,
    /// Keys of traits.
    pub(super) traits: u64,
}

impl Refused {
    pub(super) fn add(&mut self, other: Self) {
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

/// One tenant's facts on a server.
pub(super) struct FactTables<'a> {
    transaction: &'a Transaction<'a>,
    tenant: String,
    keys: Keys,
    limits: FactLimits,
}

/// All ids that aliases join with some, the devices of those, the users of these devices, and
/// whom aliases join with them: who any of them is does not depend on anything else.
const NEAR: &str = "WITH RECURSIVE asked(id) AS (SELECT unnest($2::text[])),
    joined(id) AS (
        SELECT id FROM asked UNION SELECT n.id FROM joined, LATERAL (
            SELECT user_id AS id FROM relay_alias WHERE tenant = $1 AND previous = joined.id
            UNION ALL SELECT previous FROM relay_alias WHERE tenant = $1 AND user_id = joined.id) AS n),
    devices(id) AS (SELECT id FROM joined UNION
        SELECT device FROM relay_link, joined WHERE tenant = $1 AND user_id = joined.id),
    near(id) AS (
        (SELECT id FROM devices UNION SELECT user_id FROM relay_link, devices WHERE tenant = $1 AND device = devices.id)
        UNION SELECT n.id FROM near, LATERAL (
            SELECT user_id AS id FROM relay_alias WHERE tenant = $1 AND previous = near.id
            UNION ALL SELECT previous FROM relay_alias WHERE tenant = $1 AND user_id = near.id) AS n)
    SELECT 0, user_id, '', first_ms, last_ms FROM user_identities, near WHERE tenant = $1 AND user_id = near.id
    UNION ALL SELECT 1, device, user_id, first_ms, last_ms FROM relay_link, devices WHERE tenant = $1 AND device = devices.id
    UNION ALL SELECT 2, previous, user_id, first_ms, first_ms FROM relay_alias, near WHERE tenant = $1 AND previous = near.id
    UNION ALL SELECT 3, device, user_id, 0, 0 FROM relay_apart, near WHERE tenant = $1 AND device = near.id
    UNION ALL SELECT 3, device, user_id, 0, 0 FROM relay_apart, near WHERE tenant = $1 AND user_id = near.id";

impl<'a> FactTables<'a> {
    pub(super) fn new(transaction: &'a Transaction<'a>, tenant: &str, shared: &Shared) -> Self {
        let tenant = kept(tenant).into_owned();
        Self { transaction, tenant, keys: shared.keys, limits: shared.settings.fact_limits }
    }

    /// The facts that have to do with some ids.
    async fn near(&self, ids: &BTreeSet<&str>) -> Result<Tenant, StoreError> {
        let mut tenant = Tenant::default();
        if ids.is_empty() {
            return Ok(tenant);
        }
        let ids: Vec<String> = ids.iter().map(|id| kept(id).into_owned()).collect();
        let statement = self.transaction.prepare_cached(NEAR).await?;
        let facts = &mut tenant.facts;
        for row in self.transaction.query(&statement, &[&self.tenant, &ids]).await? {
            let (kind, one, other): (i32, String, String) = (row.get(0), told(row.get(1)), told(row.get(2)));
            let seen = Seen { first_ms: row.get(3), last_ms: row.get(4) };
            match kind {
                0 => drop(facts.users.insert(one, seen)),
                1 => drop(facts.links.insert((one, other), seen)),
                2 => drop(facts.aliases.insert((one, other), seen.first_ms)),
                _ => drop(facts.apart.insert((one, other))),
            }
        }
        Ok(tenant)
    }

    /// Traits of somebody, where there are some.
    async fn traits(&self, of: &BTreeSet<Subject>) -> Result<BTreeMap<Subject, Traits>, StoreError> {
        let (are_users, ids) = subjects(of.iter());
        let sql = "SELECT is_user, id, traits FROM relay_traits WHERE tenant = $1
            AND (is_user, id) IN (SELECT * FROM unnest($2::boolean[], $3::text[]))";
        let statement = self.transaction.prepare_cached(sql).await?;
        let rows = self.transaction.query(&statement, &[&self.tenant, &are_users, &ids]).await?;
        let traits = |row: &Row| {
            let id = told(row.get(1));
            let subject = if row.get(0) { Subject::User(id) } else { Subject::Anonymous(id) };
            (subject, Traits::from_stored(row.get(2)))
        };
        Ok(rows.iter().map(traits).collect())
    }

    /// How often facts of the tenant were taken away.
    async fn epoch(&self) -> Result<i64, StoreError> {
        let sql = "INSERT INTO relay_tenant (tenant, epoch, n, gone) VALUES ($1, 0, 0, 0)
            ON CONFLICT (tenant) DO UPDATE SET n = relay_tenant.n RETURNING gone";
        let statement = self.transaction.prepare_cached(sql).await?;
        Ok(self.transaction.query_one(&statement, &[&self.tenant]).await?.get(0))
    }

    /// Notes what new events tell, which are in the order in which they came.
    pub(super) async fn note(&self, events: &[&Event], known: &mut Known) -> Result<Refused, StoreError> {
        let tells = |event: &&Event| facts_of(event).next().is_some() || traits::tells(event);
        if !events.iter().any(tells) {
            return Ok(Refused::default());
        }
        let epoch = self.epoch().await?;
        if known.epochs.insert(self.tenant.clone(), epoch).is_some_and(|before| before != epoch) {
            // Another relay has erased somebody.
            known.times.clear();
        }
        let number = self.keys.event(&self.tenant, "") as i64;
        let is_news = |fact: Fact<'_>, seen: &Seen| !known.has(self.keys.fact(number, fact), seen);
        let (traits, told) = self.note_traits(events).await?;
        let mut refused = Refused { traits, ..Refused::default() };
        let news: Vec<&Event> = events
            .iter()
            .copied()
            .filter(|event| facts_of(event).any(|fact| is_news(fact, &Seen::at(event.time_ms()))))
            .collect();
        let ids: BTreeSet<&str> = news.iter().flat_map(|event| ids_of(event)).collect();
        let near = self.near(&ids).await?;
        let (mut after, mut log, mut noted) = (Vec::new(), Vec::new(), Vec::new());
        let groups = groups(near, &news);
        for (tenant, of_it) in &groups {
            let mut tenant = tenant.clone();
            for at in of_it {
                self.note_event(&mut tenant, news[*at], *at, &mut log, &mut refused);
            }
            let told = facts_of_batch(of_it.iter().map(|at| news[*at]));
            let kept = told.filter(|(fact, ..)| tenant.facts.knows(*fact));
            noted.extend(kept.map(|(fact, seen, _)| (self.keys.fact(number, fact), seen)));
            after.push(tenant);
        }
        log.sort_by_key(|(at, _)| *at);
        // One is told of each batch that was refused: they come in crowds.
        let mut is_told = false;
        log.retain(|(_, entry)| !is_refused(entry.what) || !std::mem::replace(&mut is_told, true));
        let before: Vec<Tenant> = groups.into_iter().map(|(tenant, _)| tenant).collect();
        self.save(&before, &after, log.into_iter().map(|(_, entry)| entry).collect()).await?;
        self.show_traits(&told).await?;
        known.noted.extend(noted);
        Ok(refused)
    }

    fn note_event(
        &self,
        tenant: &mut Tenant,
        event: &Event,
        at: usize,
        log: &mut Vec<(usize, LogEntry)>,
        refused: &mut Refused,
    ) {
        tenant.log.clear();
        for decision in tenant.note_facts(&[event], &self.limits) {
            refused.count(decision);
        }
        log.extend(tenant.log.drain(..).map(|entry| (at, entry)));
    }

    /// Notes what identifies say about somebody. Returns how many keys were refused, and of
    /// whom something is new.
    async fn note_traits(&self, events: &[&Event]) -> Result<(u64, BTreeSet<Subject>), StoreError> {
        let mut all: BTreeMap<Subject, Vec<&Event>> = BTreeMap::new();
        for event in events.iter().filter(|event| traits::tells(event)) {
            if let Some(subject) = subject_of(event) {
                all.entry(subject).or_default().push(event);
            }
        }
        if all.is_empty() {
            return Ok(Default::default());
        }
        let mut known = self.traits(&all.keys().cloned().collect()).await?;
        let (mut refused, mut changed) = (0, BTreeMap::new());
        for (subject, events) in all {
            let before = known.remove(&subject).unwrap_or_default();
            let mut traits = before.clone();
            refused += events.iter().map(|event| traits.tell(event)).sum::<usize>();
            if traits != before {
                changed.insert(subject, traits);
            }
        }
        if refused > 0 {
            tracing::warn!(refused, "traits were not kept: somebody has too many");
        }
        self.save_traits(&changed).await?;
        Ok((refused as u64, changed.into_keys().collect()))
    }

    async fn save_traits(&self, changed: &BTreeMap<Subject, Traits>) -> Result<(), StoreError> {
        if changed.is_empty() {
            return Ok(());
        }
        let (are_users, ids) = subjects(changed.keys());
        let stored: Vec<String> = changed.values().map(Traits::to_stored).collect();
        let sql = "INSERT INTO relay_traits (tenant, is_user, id, traits)
            SELECT $1, * FROM unnest($2::boolean[], $3::text[], $4::text[])
            ON CONFLICT (tenant, is_user, id) DO UPDATE SET traits = excluded.traits";
        let statement = self.transaction.prepare_cached(sql).await?;
        self.transaction.execute(&statement, &[&self.tenant, &are_users, &ids, &stored]).await?;
        Ok(())
    }

    /// Puts traits where people see them, of users whose row is there.
    async fn show_traits(&self, of: &BTreeSet<Subject>) -> Result<(), StoreError> {
        if of.is_empty() {
            return Ok(());
        }
        let mut traits = self.traits(of).await?;
        traits.retain(|subject, _| matches!(subject, Subject::User(_)));
        let (_, ids) = subjects(traits.keys());
        let shown: Vec<Option<String>> = traits.values().map(|traits| properties(&traits.shown())).collect();
        let sql = "UPDATE user_identities AS u SET traits = coalesce(t.traits::jsonb, '{}')
            FROM unnest($2::text[], $3::text[]) AS t(id, traits) WHERE u.tenant = $1 AND u.user_id = t.id";
        let statement = self.transaction.prepare_cached(sql).await?;
        self.transaction.execute(&statement, &[&self.tenant, &ids, &shown]).await?;
        Ok(())
    }

    /// Takes in what another store knows.
    pub(super) async fn know(&self, facts: &[&KnownFact]) -> Result<Refused, StoreError> {
        self.epoch().await?;
        let mut ids = BTreeSet::new();
        let mut told = BTreeSet::new();
        for fact in facts {
            match &fact.what {
                Told::User { user, .. } => drop(ids.insert(&**user)),
                Told::Link { anonymous: from, user, .. }
                | Told::Alias { previous: from, user, .. }
                | Told::Apart { from, user, .. } => ids.extend([&**from, &**user]),
                Told::Traits { who, .. } => drop(told.insert(who.clone())),
            }
        }
        let before = self.near(&ids).await?;
        let mut after = Tenant { traits: self.traits(&told).await?, ..before.clone() };
        let mut by = BTreeMap::new();
        let mut refused = Refused::default();
        for fact in facts {
            if let Told::Apart { from, user, by: operator } = &fact.what {
                by.insert((from.clone(), user.clone()), operator.clone());
            }
            for decision in after.know(&fact.what, &self.limits) {
                refused.count(decision);
            }
        }
        self.save_traits(&after.traits).await?;
        self.save_apart(&before, &after, &by).await?;
        let log = std::mem::take(&mut after.log);
        self.save(&[before], &[after], log).await?;
        self.show_traits(&told).await?;
        Ok(refused)
    }

    /// Puts an id and a user apart, or takes that back.
    pub(super) async fn link(
        &self,
        from: &str,
        user: &str,
        joined: bool,
        by: &Operator,
    ) -> Result<(), StoreError> {
        self.epoch().await?;
        let before = self.near(&BTreeSet::from([from, user])).await?;
        let mut after = before.clone();
        after.link(from, user, joined, by);
        let by = BTreeMap::from([((from.to_owned(), user.to_owned()), by.clone())]);
        self.save_apart(&before, &after, &by).await?;
        let log = std::mem::take(&mut after.log);
        self.save(&[before], &[after], log).await
    }

    async fn save_apart(
        &self,
        before: &Tenant,
        after: &Tenant,
        by: &BTreeMap<(String, String), Operator>,
    ) -> Result<(), StoreError> {
        for (from, user) in before.facts.apart.difference(&after.facts.apart) {
            let sql = "DELETE FROM relay_apart WHERE tenant = $1 AND device = $2 AND user_id = $3";
            self.transaction.execute(sql, &[&self.tenant, &kept(from), &kept(user)]).await?;
        }
        for pair in after.facts.apart.difference(&before.facts.apart) {
            let Operator { name, reason, at_ms } = by.get(pair).cloned().unwrap_or_default();
            let sql = "INSERT INTO relay_apart (tenant, device, user_id, operator, reason, at_ms)
                VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING";
            let parameters: [&(dyn ToSql + Sync); 6] =
                [&self.tenant, &kept(&pair.0), &kept(&pair.1), &kept(&name), &kept(&reason), &at_ms];
            self.transaction.execute(sql, &parameters).await?;
        }
        Ok(())
    }

    /// Writes what changed of facts and of who follows from them.
    async fn save(&self, before: &[Tenant], after: &[Tenant], log: Vec<LogEntry>) -> Result<(), StoreError> {
        let pairs = || before.iter().zip(after);
        self.save_users(pairs()).await?;
        self.save_links(pairs()).await?;
        self.save_aliases(pairs()).await?;
        let mut owned = Vec::new();
        for (before, after) in pairs() {
            let (was, is) = (self.owned(before), self.owned(after));
            owned.extend(
                is.iter()
                    .filter(|(who, owner)| was.get(who) != Some(owner))
                    .map(|(who, owner)| (*who, *owner)),
            );
            let gone = was.keys().filter(|who| !is.contains_key(who));
            owned.extend(gone.map(|who| (*who, (*who, i64::MAX))));
        }
        self.save_owners(owned).await?;
        self.write_log(&log).await
    }

    async fn save_users<'t>(
        &self,
        pairs: impl Iterator<Item = (&'t Tenant, &'t Tenant)>,
    ) -> Result<(), StoreError> {
        let (mut ids, mut first, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for (before, after) in pairs {
            for (user, seen) in &after.facts.users {
                if before.facts.users.get(user) != Some(seen) {
                    ids.push(kept(user));
                    first.push(seen.first_ms);
                    last.push(seen.last_ms);
                }
            }
        }
        if ids.is_empty() {
            return Ok(());
        }
        let [first_seen, last_seen] =
            [&first, &last].map(|times| times.iter().map(|time_ms| Ts::of(*time_ms)).collect::<Vec<_>>());
        let sql = "INSERT INTO user_identities (tenant, user_id, first_ms, last_ms, first_seen, last_seen)
            SELECT $1, * FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::timestamptz[], $6::timestamptz[])
            ON CONFLICT (tenant, user_id) DO UPDATE SET first_ms = excluded.first_ms, last_ms = excluded.last_ms,
                first_seen = excluded.first_seen, last_seen = excluded.last_seen";
        let statement = self.transaction.prepare_cached(sql).await?;
        let parameters: [&(dyn ToSql + Sync); 6] =
            [&self.tenant, &ids, &first, &last, &first_seen, &last_seen];
        self.transaction.execute(&statement, &parameters).await?;
        Ok(())
    }

    async fn save_links<'t>(
        &self,
        pairs: impl Iterator<Item = (&'t Tenant, &'t Tenant)>,
    ) -> Result<(), StoreError> {
        let (mut new, mut gone) = (Vec::new(), Vec::new());
        for (before, after) in pairs {
            let (before, after) = (&before.facts.links, &after.facts.links);
            new.extend(after.iter().filter(|(link, seen)| before.get(link) != Some(seen)));
            gone.extend(before.keys().filter(|link| !after.contains_key(link)));
        }
        if !new.is_empty() {
            let (devices, users) = two(new.iter().map(|(link, _)| *link));
            let first: Vec<i64> = new.iter().map(|(_, seen)| seen.first_ms).collect();
            let last: Vec<i64> = new.iter().map(|(_, seen)| seen.last_ms).collect();
            let sql = "INSERT INTO relay_link (tenant, device, user_id, first_ms, last_ms)
                SELECT $1, * FROM unnest($2::text[], $3::text[], $4::bigint[], $5::bigint[])
                ON CONFLICT (tenant, device, user_id) DO UPDATE SET first_ms = excluded.first_ms, last_ms = excluded.last_ms";
            let statement = self.transaction.prepare_cached(sql).await?;
            let parameters: [&(dyn ToSql + Sync); 5] = [&self.tenant, &devices, &users, &first, &last];
            self.transaction.execute(&statement, &parameters).await?;
        }
        self.take_away("relay_link", "device", &gone).await
    }

    async fn save_aliases<'t>(
        &self,
        pairs: impl Iterator<Item = (&'t Tenant, &'t Tenant)>,
    ) -> Result<(), StoreError> {
        let (mut new, mut gone) = (Vec::new(), Vec::new());
        for (before, after) in pairs {
            let (before, after) = (&before.facts.aliases, &after.facts.aliases);
            new.extend(after.iter().filter(|(alias, first_ms)| before.get(alias) != Some(first_ms)));
            gone.extend(before.keys().filter(|alias| !after.contains_key(alias)));
        }
        if !new.is_empty() {
            let (previous, users) = two(new.iter().map(|(alias, _)| *alias));
            let first: Vec<i64> = new.iter().map(|(_, first_ms)| **first_ms).collect();
            let sql = "INSERT INTO relay_alias (tenant, previous, user_id, first_ms)
                SELECT $1, * FROM unnest($2::text[], $3::text[], $4::bigint[])
                ON CONFLICT (tenant, previous, user_id) DO UPDATE SET first_ms = excluded.first_ms";
            let statement = self.transaction.prepare_cached(sql).await?;
            self.transaction.execute(&statement, &[&self.tenant, &previous, &users, &first]).await?;
        }
        self.take_away("relay_alias", "previous", &gone).await
    }

    /// Facts that gave way: whoever remembers that they are known must look again.
    async fn take_away(&self, table: &str, from: &str, gone: &[&(String, String)]) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let (one, other) = two(gone.iter().copied());
        let sql = format!(
            "DELETE FROM {table} WHERE tenant = $1 AND ({from}, user_id) IN (SELECT * FROM unnest($2::text[], $3::text[]))"
        );
        self.transaction.execute(&sql, &[&self.tenant, &one, &other]).await?;
        let sql = "UPDATE relay_tenant SET gone = gone + 1 WHERE tenant = $1";
        self.transaction.execute(sql, &[&self.tenant]).await?;
        Ok(())
    }

    /// Rows of owners are gone, too: whoever has read some must read them all again.
    async fn next_epoch(&self) -> Result<(), StoreError> {
        let sql = "UPDATE relay_tenant SET epoch = epoch + 1, gone = gone + 1 WHERE tenant = $1";
        self.transaction.execute(sql, &[&self.tenant]).await?;
        Ok(())
    }

    /// Whose each user and device is by its key, but for those that are their own.
    fn owned(&self, tenant: &Tenant) -> BTreeMap<u64, (u64, i64)> {
        let Owners { devices, roots } = tenant.facts.resolve();
        let users = roots.iter().map(|(user, root)| (self.keys.user(user), (self.keys.user(root), i64::MAX)));
        let devices = devices.iter().map(|(device, owner)| {
            (self.keys.anonymous(device), (self.keys.user(&owner.root), owner.until_ms))
        });
        users.chain(devices).filter(|(who, (root, _))| who != root).collect()
    }

    async fn save_owners(&self, owned: Vec<(u64, (u64, i64))>) -> Result<(), StoreError> {
        if owned.is_empty() {
            return Ok(());
        }
        let who: Vec<i64> = owned.iter().map(|(who, _)| *who as i64).collect();
        let roots: Vec<i64> = owned.iter().map(|(_, (root, _))| *root as i64).collect();
        let until: Vec<i64> = owned.iter().map(|(_, (_, until_ms))| *until_ms).collect();
        let sql = "WITH t AS (UPDATE relay_tenant SET n = n + 1 WHERE tenant = $1 RETURNING n)
            INSERT INTO relay_owner (tenant, who, root, until_ms, n)
            SELECT $1, o.*, t.n FROM t, unnest($2::bigint[], $3::bigint[], $4::bigint[]) AS o
            ON CONFLICT (tenant, who) DO UPDATE SET root = excluded.root, until_ms = excluded.until_ms, n = excluded.n";
        let statement = self.transaction.prepare_cached(sql).await?;
        self.transaction.execute(&statement, &[&self.tenant, &who, &roots, &until]).await?;
        Ok(())
    }

    async fn write_log(&self, log: &[LogEntry]) -> Result<(), StoreError> {
        if log.is_empty() {
            return Ok(());
        }
        let sql = "SELECT coalesce(max(seq), 0) FROM relay_log WHERE tenant = $1";
        let statement = self.transaction.prepare_cached(sql).await?;
        let mut seq: i64 = self.transaction.query_one(&statement, &[&self.tenant]).await?.get(0);
        let sql = "INSERT INTO relay_log (tenant, seq, at_ms, event, operator, reason, what, origin, user_id, before)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)";
        let statement = self.transaction.prepare_cached(sql).await?;
        for entry in log {
            seq += 1;
            let what = Decision::ALL.iter().position(|one| *one == entry.what).unwrap_or_default() as i16;
            let (event, operator, reason) = match &entry.by {
                By::Event(id) => (Some(kept(id)), None, None),
                By::Operator { name, reason } => (None, Some(kept(name)), Some(kept(reason))),
            };
            let before = entry.before.as_deref().map(kept);
            let (from, user) = (kept(&entry.from), kept(&entry.user));
            let parameters: [&(dyn ToSql + Sync); 10] =
                [&self.tenant, &seq, &entry.at_ms, &event, &operator, &reason, &what, &from, &user, &before];
            self.transaction.execute(&statement, &parameters).await?;
        }
        let sql = "DELETE FROM relay_log WHERE tenant = $1 AND seq <= $2";
        let statement = self.transaction.prepare_cached(sql).await?;
        self.transaction.execute(&statement, &[&self.tenant, &(seq - LOG_MAX as i64)]).await?;
        Ok(())
    }

    /// What is known about somebody, but for when a device was seen that is nobody's.
    pub(super) async fn identity(&self, who: &Subject) -> Result<Option<Identity>, StoreError> {
        let (Subject::User(id) | Subject::Anonymous(id)) = who;
        let mut near = self.near(&BTreeSet::from([&**id])).await?;
        let mut ids = near.ids();
        if let Some(owner) = near.facts.resolve().devices.get(id)
            && matches!(who, Subject::Anonymous(_))
        {
            // Whose it is has other devices.
            near = self.near(&BTreeSet::from([&**id, &*owner.root])).await?;
            ids = near.ids();
        }
        ids.insert(id.clone());
        let of = ids.iter().flat_map(|id| [Subject::User(id.clone()), Subject::Anonymous(id.clone())]);
        near.traits = self.traits(&of.collect()).await?;
        Ok(near.identity(who, None))
    }

    /// What was decided about all ids of somebody, the latest first.
    pub(super) async fn identity_log(
        &self,
        who: &Subject,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let identity = self.identity(who).await?.unwrap_or_default();
        let (Subject::User(id) | Subject::Anonymous(id)) = who;
        let ids: BTreeSet<&str> =
            identity.users.iter().chain(&identity.anonymous).chain([id]).map(String::as_str).collect();
        let ids: Vec<String> = ids.into_iter().map(|id| kept(id).into_owned()).collect();
        let sql = "SELECT at_ms, event, operator, reason, what, origin, user_id, before FROM relay_log
            WHERE tenant = $1 AND (origin = ANY($2) OR user_id = ANY($2)) ORDER BY seq DESC LIMIT $3";
        let rows = self.transaction.query(sql, &[&self.tenant, &ids, &(limit as i64)]).await?;
        rows.iter().map(entry).collect()
    }

    /// Takes away every fact about somebody; whose events are theirs, and how many facts it
    /// was.
    pub(super) async fn forget(&self, who: &Subject) -> Result<(Doomed, u64), StoreError> {
        self.epoch().await?;
        let (Subject::User(id) | Subject::Anonymous(id)) = who;
        let first = self.near(&BTreeSet::from([&**id])).await?;
        // Whoever shared a device with them may now be its owner.
        let all = first.ids();
        let mut before = self.near(&all.iter().map(String::as_str).chain([&**id]).collect()).await?;
        let ids = before.ids().into_iter().chain([id.clone()]);
        let subjects = ids.flat_map(|id| [Subject::User(id.clone()), Subject::Anonymous(id)]).collect();
        before.traits = self.traits(&subjects).await?;
        let owners = before.facts.resolve();
        let mut after = before.clone();
        after.forget(who, &owners);
        let mut forgotten = after.facts_gone(&before);
        let gone: Vec<&Subject> =
            before.traits.keys().filter(|subject| !after.traits.contains_key(subject)).collect();
        forgotten += gone.len() as u64;
        let (are_users, ids) = subjects_of(&gone);
        let sql = "DELETE FROM relay_traits WHERE tenant = $1 AND (is_user, id) IN (SELECT * FROM unnest($2::boolean[], $3::text[]))";
        self.transaction.execute(sql, &[&self.tenant, &are_users, &ids]).await?;
        let users: Vec<_> = before
            .facts
            .users
            .keys()
            .filter(|user| !after.facts.users.contains_key(*user))
            .map(|user| kept(user))
            .collect();
        let sql = "DELETE FROM user_identities WHERE tenant = $1 AND user_id = ANY($2)";
        self.transaction.execute(sql, &[&self.tenant, &users]).await?;
        self.save_apart(&before, &after, &BTreeMap::new()).await?;
        self.forget_in_log(who, &before, &owners).await?;
        self.save(std::slice::from_ref(&before), std::slice::from_ref(&after), Vec::new()).await?;
        self.disown(&before, &after, id).await?;
        self.next_epoch().await?;
        let tenant = before;
        Ok((Doomed { who: who.clone(), tenant, owners }, forgotten))
    }

    /// Nobody's id stays behind, not even as its key.
    async fn disown(&self, before: &Tenant, after: &Tenant, id: &str) -> Result<(), StoreError> {
        let (left, owned) = (after.ids(), self.owned(after));
        let gone = before.ids().into_iter().filter(|id| !left.contains(id)).chain([id.to_owned()]);
        // A device may have the id of a user, who stays; and the other way round.
        let keys = gone.flat_map(|id| [self.keys.user(&id), self.keys.anonymous(&id)]);
        let keys: Vec<i64> = keys.filter(|key| !owned.contains_key(key)).map(|key| key as i64).collect();
        let sql = "DELETE FROM relay_owner WHERE tenant = $1 AND who = ANY($2)";
        self.transaction.execute(sql, &[&self.tenant, &keys]).await?;
        Ok(())
    }

    /// Nobody's id stays behind in what was decided.
    async fn forget_in_log(&self, who: &Subject, tenant: &Tenant, owners: &Owners) -> Result<(), StoreError> {
        if let Subject::Anonymous(device) = who {
            let sql = "DELETE FROM relay_log WHERE tenant = $1 AND origin = $2";
            self.transaction.execute(sql, &[&self.tenant, &kept(device)]).await?;
            return Ok(());
        }
        let (Subject::User(user) | Subject::Anonymous(user)) = who;
        let root = owners.root(user);
        let theirs = tenant.ids().into_iter().chain([user.clone()]).filter(|id| owners.root(id) == root);
        let ids: Vec<String> = theirs.map(|id| kept(&id).into_owned()).collect();
        let sql = "DELETE FROM relay_log WHERE tenant = $1 AND (origin = ANY($2) OR user_id = ANY($2))";
        self.transaction.execute(sql, &[&self.tenant, &ids]).await?;
        let sql = "UPDATE relay_log SET before = NULL WHERE tenant = $1 AND before = ANY($2)";
        self.transaction.execute(sql, &[&self.tenant, &ids]).await?;
        Ok(())
    }
}

/// Whose events are to go.
pub(super) struct Doomed {
    who: Subject,
    tenant: Tenant,
    owners: Owners,
}

impl Doomed {
    pub(super) fn includes(&self, event: &Event) -> bool {
        self.tenant.owns(&self.who, &self.owners, event)
    }

    /// Keys of whose events there may be such, and the device that they name if it is one.
    pub(super) fn found_by(&self, keys: Keys) -> (Vec<i64>, Option<&str>) {
        match &self.who {
            Subject::Anonymous(device) => (vec![keys.anonymous(device) as i64], Some(device)),
            Subject::User(user) => {
                let root = self.owners.root(user);
                let ids = self.tenant.ids().into_iter().chain([user.clone()]);
                let mut found = Vec::new();
                for id in ids {
                    if self.owners.root(&id) == root {
                        found.push(keys.user(&id) as i64);
                    }
                    let owner = self.owners.visitor(None, Some(&id), i64::MIN);
                    if owner == Some(Visitor::User(root)) {
                        found.push(keys.anonymous(&id) as i64);
                    }
                }
                (found, None)
            }
        }
    }
}

fn is_refused(what: Decision) -> bool {
    matches!(
        what,
        Decision::DeviceHasTooManyUsers | Decision::UserHasTooManyDevices | Decision::TooManyAliases
    )
}

/// The ids that an event tells something of.
fn ids_of(event: &Event) -> impl Iterator<Item = &str> {
    let ids = event.user_id().into_iter().chain(event.anonymous_id()).chain(previous_id(event));
    ids.filter(|id| !means_nobody(id))
}

fn subjects<'s>(all: impl Iterator<Item = &'s Subject>) -> (Vec<bool>, Vec<String>) {
    all.map(|subject| match subject {
        Subject::User(id) => (true, kept(id).into_owned()),
        Subject::Anonymous(id) => (false, kept(id).into_owned()),
    })
    .unzip()
}

fn subjects_of(all: &[&Subject]) -> (Vec<bool>, Vec<String>) {
    subjects(all.iter().copied())
}

fn two<'p>(pairs: impl Iterator<Item = &'p (String, String)>) -> (Vec<String>, Vec<String>) {
    pairs.map(|(one, other)| (kept(one).into_owned(), kept(other).into_owned())).unzip()
}

/// Facts and events put together that have an id in common, by way of whatever others: what
/// one event of a batch changes is then looked for among few.
fn groups(near: Tenant, events: &[&Event]) -> Vec<(Tenant, Vec<usize>)> {
    let mut sets = Sets::default();
    let facts = &near.facts;
    for (one, other) in facts.links.keys().chain(facts.aliases.keys()).chain(&facts.apart) {
        sets.join(one, other);
    }
    for event in events {
        let mut ids = ids_of(event);
        if let Some(first) = ids.next() {
            sets.join(first, first);
            ids.for_each(|id| sets.join(first, id));
        }
    }
    let mut groups: BTreeMap<usize, (Tenant, Vec<usize>)> = BTreeMap::new();
    for (at, event) in events.iter().enumerate() {
        if let Some(id) = ids_of(event).next() {
            groups.entry(sets.of(id)).or_default().1.push(at);
        }
    }
    let crate::model::Facts { users, links, aliases, apart } = near.facts;
    let mut group = |id: &str| sets.of(id);
    for (user, seen) in users {
        let number = group(&user);
        groups.entry(number).or_default().0.facts.users.insert(user, seen);
    }
    for (link, seen) in links {
        groups.entry(group(&link.0)).or_default().0.facts.links.insert(link, seen);
    }
    for (alias, first_ms) in aliases {
        groups.entry(group(&alias.0)).or_default().0.facts.aliases.insert(alias, first_ms);
    }
    for pair in apart {
        groups.entry(group(&pair.0)).or_default().0.facts.apart.insert(pair);
    }
    groups.into_values().collect()
}

/// Ids that are in one set with others.
#[derive(Debug, Default)]
struct Sets {
    numbers: HashMap<String, usize>,
    parents: Vec<usize>,
}

impl Sets {
    fn of(&mut self, id: &str) -> usize {
        let next = self.parents.len();
        let number = match self.numbers.get(id) {
            Some(number) => *number,
            None => {
                self.numbers.insert(id.to_owned(), next);
                self.parents.push(next);
                next
            }
        };
        self.root(number)
    }

    fn root(&mut self, mut number: usize) -> usize {
        while self.parents[number] != number {
            self.parents[number] = self.parents[self.parents[number]];
            number = self.parents[number];
        }
        number
    }

    fn join(&mut self, one: &str, other: &str) {
        let (one, other) = (self.of(one), self.of(other));
        self.parents[one] = other;
    }
}

fn entry(row: &Row) -> Result<LogEntry, StoreError> {
    let text_at = |at: usize| row.get::<_, Option<&str>>(at).map(told).unwrap_or_default();
    let by = match row.get::<_, Option<&str>>(1) {
        Some(id) => By::Event(told(id)),
        None => By::Operator { name: text_at(2), reason: text_at(3) },
    };
    let what = usize::try_from(row.get::<_, i16>(4)).ok().and_then(|what| Decision::ALL.get(what));
    let what = *what.ok_or_else(|| StoreError::Damaged("a decision is none".into()))?;
    let before = row.get::<_, Option<&str>>(7).map(told);
    Ok(LogEntry { at_ms: row.get(0), by, what, from: text_at(5), user: text_at(6), before })
}

/// False if an id of a fact is one with which no event is kept either.
pub(super) fn is_keepable(fact: &KnownFact) -> bool {
    let ids = match &fact.what {
        Told::User { user, .. } => [user, user],
        Told::Link { anonymous: from, user, .. }
        | Told::Alias { previous: from, user, .. }
        | Told::Apart { from, user, .. } => [from, user],
        Told::Traits { who: Subject::User(id) | Subject::Anonymous(id), .. } => [id, id],
    };
    ids.into_iter().chain([&fact.tenant]).all(|text| fits_key(text))
}

/// How a row tells a fact.
pub(super) type Read = fn(&Row) -> Told;

/// Where every fact stands: columns and table, and how a row tells it.
pub(super) const EVERYWHERE: [(&str, Read); 5] = [
    ("tenant, user_id, first_ms, last_ms FROM user_identities", |row| Told::User {
        user: text(row, 1),
        seen: seen(row, 2),
    }),
    ("tenant, device, user_id, first_ms, last_ms FROM relay_link", |row| Told::Link {
        anonymous: text(row, 1),
        user: text(row, 2),
        seen: seen(row, 3),
    }),
    ("tenant, previous, user_id, first_ms FROM relay_alias", |row| Told::Alias {
        previous: text(row, 1),
        user: text(row, 2),
        first_ms: row.get(3),
    }),
    ("tenant, device, user_id, operator, reason, at_ms FROM relay_apart", |row| Told::Apart {
        from: text(row, 1),
        user: text(row, 2),
        by: Operator { name: text(row, 3), reason: text(row, 4), at_ms: row.get(5) },
    }),
    ("tenant, is_user, id, traits FROM relay_traits", |row| {
        let id = text(row, 2);
        let who = if row.get(1) { Subject::User(id) } else { Subject::Anonymous(id) };
        Told::Traits { who, traits: Traits::from_stored(row.get(3)) }
    }),
];

/// The fact that a row tells.
pub(super) fn fact_of(row: &Row, read: Read) -> KnownFact {
    KnownFact { tenant: text(row, 0), what: read(row) }
}

fn text(row: &Row, at: usize) -> String {
    told(row.get(at))
}

fn seen(row: &Row, at: usize) -> Seen {
    Seen { first_ms: row.get(at), last_ms: row.get(at + 1) }
}
