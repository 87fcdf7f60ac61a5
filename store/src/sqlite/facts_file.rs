//! What an export says about who is who.

use rusqlite::{Connection, Row};

use crate::{
    Operator, StoreError, Subject,
    model::{Known, KnownFact, Seen, traits::Traits},
};

/// Of each fact the tenant's name, and then what [`Known`] has of it.
const USERS: &str = "SELECT name, user.id, first_ms, last_ms
    FROM user JOIN tenant ON tenant.id = user.tenant WHERE ?1 IS NULL OR name = ?1";
const LINKS: &str = "SELECT name, device, user, first_ms, last_ms
    FROM link JOIN tenant ON tenant.id = link.tenant WHERE ?1 IS NULL OR name = ?1";
const ALIASES: &str = "SELECT name, previous, user, first_ms
    FROM alias JOIN tenant ON tenant.id = alias.tenant WHERE ?1 IS NULL OR name = ?1";
const APART: &str = "SELECT name, device, user, operator, reason, at_ms
    FROM apart JOIN tenant ON tenant.id = apart.tenant WHERE ?1 IS NULL OR name = ?1";
const TRAITS: &str = "SELECT name, is_user, traits.id, traits
    FROM traits JOIN tenant ON tenant.id = traits.tenant WHERE ?1 IS NULL OR name = ?1";

/// Reads what a row says, from its second value on.
type Read = fn(&Row<'_>) -> rusqlite::Result<Known>;

/// Calls `each` with every fact of a tenant, or of all.
pub(crate) fn each_fact(
    connection: &Connection,
    tenant: Option<&str>,
    mut each: impl FnMut(&KnownFact) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let read: [(&str, Read); 5] =
        [(USERS, user), (LINKS, link), (ALIASES, alias), (APART, apart), (TRAITS, traits)];
    for (sql, known) in read {
        let mut statement = connection.prepare(sql)?;
        let mut rows = statement.query([tenant])?;
        while let Some(row) = rows.next()? {
            each(&KnownFact { tenant: row.get(0)?, what: known(row)? })?;
        }
    }
    Ok(())
}

fn user(row: &Row<'_>) -> rusqlite::Result<Known> {
    Ok(Known::User { user: row.get(1)?, seen: seen(row, 2)? })
}

fn link(row: &Row<'_>) -> rusqlite::Result<Known> {
    Ok(Known::Link { anonymous: row.get(1)?, user: row.get(2)?, seen: seen(row, 3)? })
}

fn alias(row: &Row<'_>) -> rusqlite::Result<Known> {
    Ok(Known::Alias { previous: row.get(1)?, user: row.get(2)?, first_ms: row.get(3)? })
}

fn apart(row: &Row<'_>) -> rusqlite::Result<Known> {
    let by = Operator { name: row.get(3)?, reason: row.get(4)?, at_ms: row.get(5)? };
    Ok(Known::Apart { from: row.get(1)?, user: row.get(2)?, by })
}

fn traits(row: &Row<'_>) -> rusqlite::Result<Known> {
    let (is_user, id, stored): (bool, String, String) = (row.get(1)?, row.get(2)?, row.get(3)?);
    let who = if is_user { Subject::User(id) } else { Subject::Anonymous(id) };
    Ok(Known::Traits { who, traits: Traits::from_stored(&stored) })
}

fn seen(row: &Row<'_>, at: usize) -> rusqlite::Result<Seen> {
    Ok(Seen { first_ms: row.get(at)?, last_ms: row.get(at + 1)? })
}
