//! Looks at a server: whether it is there, takes events, and how many connections it has of us.

use std::sync::atomic::Ordering;

use deadpool_postgres::Object;

use super::{PostgresStore, Settings, connect, error::NONE_FREE, give_back};
use crate::StoreError;

/// Connections of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Connections {
    /// Used just now.
    pub in_use: usize,
    /// Free.
    pub idle: usize,
    /// Calls that wait for one.
    pub waiting: usize,
}

impl PostgresStore {
    /// Asks whether it takes events now, and what it is.
    pub async fn look(&self) -> Result<String, StoreError> {
        let found = async {
            let connection = self.connection().await?;
            let _asked = self.shared.slow.watch("look");
            let found = look_through(&connection).await;
            give_back(found, connection)
        };
        let found = found.await;
        if matches!(&found, Err(StoreError::Unavailable(why)) if why != NONE_FREE) {
            self.forget_what_was_read();
        }
        found
    }

    /// Forgets what it was told: who answers next may be another server, that lost the last
    /// commits.
    pub fn forget_what_was_read(&self) {
        self.shared.owners.clear();
        // Whoever writes just now may have it until then.
        self.shared.is_known_old.store(true, Ordering::Relaxed);
    }

    /// Connections of this process, counted without asking the server.
    pub fn connections(&self) -> Connections {
        let status = self.shared.pool.status();
        Connections {
            in_use: status.size.saturating_sub(status.available),
            idle: status.available,
            waiting: status.waiting,
        }
    }
}

/// Says what is at a URL, and makes nothing there.
pub async fn look(settings: &Settings) -> Result<String, StoreError> {
    look_through(&connect::pool(settings)?.get().await?).await
}

async fn look_through(client: &Object) -> Result<String, StoreError> {
    let sql = "SELECT current_setting('server_version'), current_setting('transaction_read_only')";
    let row = client.query_one(sql, &[]).await?;
    let (version, read_only): (String, String) = (row.try_get(0)?, row.try_get(1)?);
    if read_only == "on" {
        return Err(StoreError::Unavailable("it only reads for now".into()));
    }
    Ok(format!("PostgreSQL {version}"))
}
