//! The store in a PostgreSQL, as the relay has it: opened by a URL that nobody else is told,
//! looked at within a bound.

use std::{io::Write, sync::Arc, time::Duration};

use analytics_relay_providers::Secret;
use analytics_relay_store::{
    Store, StoreError,
    lines::{ExportReport, Wanted},
    postgres::{self, PostgresStore},
};
use tokio::time::timeout;

use super::{
    error::OpenError,
    settings::StoreSettings,
    status::{Connections, ServerStats},
};

/// So long a server has to say that it is there.
const LOOK_TIME_MAX: Duration = Duration::from_secs(10);

/// See the module. A clone is the same store.
#[derive(Debug, Clone)]
pub(crate) struct Server(PostgresStore);

impl Server {
    /// Connects, and makes the tables or brings them up.
    pub(super) async fn open(settings: &StoreSettings, url: &Secret) -> Result<Self, OpenError> {
        let at = |error: StoreError| format!("{}: {}", settings.shown(), why(error));
        match PostgresStore::open(of(settings, url)).await {
            Ok(store) => Ok(Self(store)),
            Err(error @ StoreError::Unavailable(_)) => Err(OpenError::NotNow(at(error))),
            Err(error) => Err(OpenError::Wrong(at(error))),
        }
    }

    /// For whoever asks it.
    pub(super) fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.0.clone())
    }

    /// Ends what runs. Calls that come later fail.
    pub(super) async fn close(&self) {
        self.0.close().await;
    }

    /// Asks it whether it takes events now.
    pub(super) async fn look(&self) -> Result<(), StoreError> {
        match timeout(LOOK_TIME_MAX, self.0.look()).await {
            Ok(found) => found.map(drop),
            Err(_) => {
                self.0.forget_what_was_read();
                Err(StoreError::Unavailable(format!("it has not answered within {LOOK_TIME_MAX:?}")))
            }
        }
    }

    /// Connections of this relay.
    pub(super) fn connections(&self) -> Connections {
        let postgres::Connections { in_use, idle, waiting } = self.0.connections();
        Connections { in_use, idle, waiting }
    }

    /// What is in it.
    pub(crate) async fn stats(&self) -> Result<ServerStats, StoreError> {
        let stats = self.0.stats().await?;
        Ok(ServerStats {
            events: stats.events,
            sites: stats.sites,
            first_ms: stats.first_ms,
            last_ms: stats.last_ms,
            bytes: stats.bytes,
            partitions: stats.partitions,
            default_events: stats.default_events,
            server_version: stats.server_version,
            timescaledb: stats.timescaledb,
            links_refused: stats.links_refused,
            aliases_refused: stats.aliases_refused,
            traits_refused: stats.traits_refused,
            sources_refused: stats.sources_refused,
            slow: stats.slow,
        })
    }

    /// Makes and drops partitions. Returns how many events were moved into some, and how many
    /// were dropped.
    pub(super) async fn upkeep(
        &self,
        now_ms: i64,
        kept_from_ms: Option<i64>,
    ) -> Result<(u64, u64), StoreError> {
        let done = self.0.upkeep(now_ms, kept_from_ms).await?;
        Ok((done.moved, done.dropped))
    }

    /// The tenants that have events before a time.
    pub(super) async fn tenants_before(&self, time_ms: i64) -> Result<Vec<String>, StoreError> {
        self.0.tenants_before(time_ms).await
    }

    /// Reads all of it. Returns how many events, and what is wrong.
    pub(crate) async fn check(&self) -> Result<(u64, Vec<String>), StoreError> {
        let report = self.0.check().await?;
        Ok((report.events, report.wrong))
    }

    /// Writes what is wanted as lines.
    pub(crate) async fn export(
        &self,
        wanted: &Wanted,
        out: impl Write + Send + 'static,
    ) -> Result<ExportReport, StoreError> {
        self.0.export(wanted, out).await
    }
}

/// Says what is at a URL, without making anything there.
pub(super) async fn look_at(settings: &StoreSettings, url: &Secret) -> Result<String, String> {
    match timeout(LOOK_TIME_MAX, postgres::look(&of(settings, url))).await {
        Ok(found) => found.map_err(why),
        Err(_) => Err(format!("it has not answered within {LOOK_TIME_MAX:?}")),
    }
}

/// Without what goes without saying where it is told.
pub(super) fn why(error: StoreError) -> String {
    match error {
        StoreError::Unavailable(why) | StoreError::Unauthorized(why) | StoreError::Refused(why) => why,
        error => error.to_string(),
    }
}

fn of(settings: &StoreSettings, url: &Secret) -> postgres::Settings {
    postgres::Settings {
        connections_max: settings.connections_max,
        readers: settings.questions_max,
        deadline: settings.question_timeout,
        window: settings.ids_max,
        ..postgres::Settings::new(url.expose())
    }
}
