//! Why two ids are one: what was decided, in the order in which it was.

use std::collections::BTreeSet;

use analytics_relay_providers::Event;
use rusqlite::{Row, params};

use super::facts::FactTables;
use crate::{
    By, Decision, LogEntry, Operator, StoreError, Subject,
    model::identity::{Fact, LOG_MAX},
};

impl FactTables<'_> {
    /// Notes what an event decided.
    pub(super) fn log_event(
        &self,
        what: Decision,
        fact: Fact<'_>,
        event: &Event,
        before: Option<String>,
    ) -> Result<(), StoreError> {
        let (from, user) = match fact {
            Fact::User(user) => (user, user),
            Fact::Link { device, user } => (device, user),
            Fact::Alias { previous, user } => (previous, user),
        };
        let (at_ms, by) = (event.accepted_ms(), By::Event(event.id().as_str().to_owned()));
        self.log(&LogEntry { at_ms, by, what, from: from.into(), user: user.into(), before })
    }

    /// Notes what an operator decided.
    pub(super) fn log_operator(
        &self,
        joined: bool,
        from: &str,
        user: &str,
        by: &Operator,
        before: Option<String>,
    ) -> Result<(), StoreError> {
        let what = if joined { Decision::Rejoined } else { Decision::PutApart };
        let Operator { name, reason, at_ms } = by.clone();
        let by = By::Operator { name, reason };
        self.log(&LogEntry { at_ms, by, what, from: from.into(), user: user.into(), before })
    }

    fn log(&self, entry: &LogEntry) -> Result<(), StoreError> {
        let LogEntry { at_ms, by, what, from, user, before } = entry;
        let what = Decision::ALL.iter().position(|one| one == what).unwrap_or_default() as i64;
        let (event, operator, reason) = match by {
            By::Event(id) => (Some(id), None, None),
            By::Operator { name, reason } => (None, Some(name), Some(reason)),
        };
        let last = "SELECT ifnull(max(seq), 0) FROM identity_log WHERE tenant = ?1";
        let mut statement = self.connection.prepare_cached(last)?;
        let seq: i64 = statement.query_row([self.tenant], |row| row.get::<_, i64>(0))? + 1;
        let sql = "INSERT INTO identity_log(tenant, seq, at_ms, event, operator, reason, what, origin, user, before)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.execute(params![
            self.tenant,
            seq,
            at_ms,
            event,
            operator,
            reason,
            what,
            from,
            user,
            before
        ])?;
        let sql = "DELETE FROM identity_log WHERE tenant = ?1 AND seq <= ?2";
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.execute(params![self.tenant, seq - LOG_MAX as i64])?;
        Ok(())
    }

    /// What was decided about all ids of somebody, the latest first.
    pub(crate) fn identity_log(&self, who: &Subject, limit: usize) -> Result<Vec<LogEntry>, StoreError> {
        let identity = self.identity(who)?.unwrap_or_default();
        let (Subject::User(id) | Subject::Anonymous(id)) = who;
        let ids: BTreeSet<&str> =
            identity.users.iter().chain(&identity.anonymous).chain([id]).map(String::as_str).collect();
        let sql = "SELECT at_ms, event, operator, reason, what, origin, user, before FROM identity_log
            WHERE tenant = ?1 ORDER BY seq DESC";
        let mut statement = self.connection.prepare_cached(sql)?;
        let (mut rows, mut entries) = (statement.query([self.tenant])?, Vec::new());
        while let Some(row) = rows.next()? {
            let is_theirs = |at| Ok::<_, rusqlite::Error>(ids.contains(row.get_ref(at)?.as_str()?));
            if entries.len() == limit {
                break;
            }
            if is_theirs(5)? || is_theirs(6)? {
                entries.push(entry(row)?);
            }
        }
        Ok(entries)
    }

    /// Nobody's id stays behind in what was decided.
    pub(super) fn forget_in_log(&self, who: &Subject, users: &BTreeSet<String>) -> Result<(), StoreError> {
        let run = |sql: &str, id: &str| -> Result<(), StoreError> {
            self.connection.prepare_cached(sql)?.execute(params![self.tenant, id])?;
            Ok(())
        };
        if let Subject::Anonymous(device) = who {
            return run("DELETE FROM identity_log WHERE tenant = ?1 AND origin = ?2", device);
        }
        for user in users {
            run("DELETE FROM identity_log WHERE tenant = ?1 AND (origin = ?2 OR user = ?2)", user)?;
            run("UPDATE identity_log SET before = NULL WHERE tenant = ?1 AND before = ?2", user)?;
        }
        Ok(())
    }
}

fn entry(row: &Row<'_>) -> Result<LogEntry, StoreError> {
    let by = match row.get(1)? {
        Some(id) => By::Event(id),
        None => By::Operator { name: row.get(2)?, reason: row.get(3)? },
    };
    let what = usize::try_from(row.get::<_, i64>(4)?).ok().and_then(|what| Decision::ALL.get(what));
    let what = *what.ok_or_else(|| StoreError::Damaged("a decision is none".into()))?;
    Ok(LogEntry { at_ms: row.get(0)?, by, what, from: row.get(5)?, user: row.get(6)?, before: row.get(7)? })
}
