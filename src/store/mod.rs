//! The store as a part of the relay: what `STORE_URL` names, delivered to as a provider,
//! asked through the trait [`Store`].
//!
//! ```text
//!  batch worker ─► lane ─► provider ──┐
//!                                     ├─► front ─► SQLite │ PostgreSQL
//!  questions ────────────────────────┘     │
//!  upkeep: open, count, erase, retain, tidy ┘
//! ```
//!
//! A store that is down, slow or full costs its own lane and nobody else.
//!
//! | module | what it holds |
//! |---|---|
//! | `settings` | what the environment says |
//! | `front` | opening, what is too old to be seen, times |
//! | `server` | the store in a PostgreSQL |
//! | `provider` | events → the store |
//! | `erasures` | users who are to be deleted |
//! | `upkeep` | what is done beside |
//! | `status` | what is known of it now |

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use analytics_relay_providers::{Provider, Step};
use analytics_relay_store::{Store, sqlite};
use jiff::tz::TimeZone;
use tracing::info;

use crate::{shutdown::Stop, telemetry::StoreMetrics, time::Clock};

pub(crate) mod erasures;
mod error;
mod front;
mod last_seen;
mod provider;
#[cfg(feature = "postgres")]
mod server;
#[cfg(not(feature = "postgres"))]
#[path = "no_server.rs"]
mod server;
pub(crate) mod settings;
pub(crate) mod status;
#[cfg(test)]
#[cfg(feature = "postgres")]
#[allow(dead_code, reason = "shared with the tests of the crate of the store")]
#[path = "../../store/src/postgres/tests/server.rs"]
mod test_server;
mod upkeep;

pub use error::OpenError;
pub(crate) use front::Backend;
use front::Front;
pub(crate) use server::Server;
use settings::{StorePlace, StoreSettings};
use status::{Connections, StoreStatus};
pub(crate) use upkeep::HOT_MS_MAX;

/// A store that is there, open or to be opened.
#[derive(Clone)]
pub(crate) struct OpenStore {
    /// For whoever asks it.
    pub(crate) store: Arc<dyn Store>,
    pub(crate) status: Arc<StoreStatus>,
    front: Arc<Front>,
}

impl std::fmt::Debug for OpenStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenStore").field("place", &self.front.settings().place).finish_non_exhaustive()
    }
}

impl OpenStore {
    /// Opens what the settings name. A store that cannot be opened now is opened later, by its
    /// upkeep; one that cannot be without a person is an error.
    pub(crate) async fn open(
        settings: &StoreSettings,
        data_dir: &Path,
        metrics: StoreMetrics,
        clock: Clock,
    ) -> Result<Self, OpenError> {
        let store = Self::of(Front::new(settings.clone(), data_dir, metrics, clock));
        match store.front.open().await {
            Ok(()) | Err(OpenError::NotNow(_)) => Ok(store),
            Err(error) => Err(error),
        }
    }

    fn of(front: Front) -> Self {
        let front = Arc::new(front);
        Self { store: front.clone(), status: front.status().clone(), front }
    }

    /// What it is, for what is done with it beside questions; nothing before it was opened.
    pub(crate) fn backend(&self) -> Option<Backend> {
        self.front.backend()
    }

    /// Connections to a server; none to a file.
    pub(crate) fn connections(&self) -> Connections {
        self.front.connections()
    }

    /// Has somebody told, once, when what the store says of a tenant counts otherwise than
    /// before.
    pub(crate) fn when_changed(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        self.front.when_changed(tell);
    }

    /// The store as a lane has it.
    pub(crate) fn provider(&self) -> Arc<dyn Provider> {
        let (store, status) = (self.store.clone(), self.status.clone());
        Arc::new(provider::StoreProvider {
            store,
            status,
            duplicates: self.front.metrics().duplicates.clone(),
        })
    }

    /// Looks after it until the relay drains.
    pub(crate) fn keep(
        &self,
        data_dir: &Path,
        clock: Clock,
        zone: TimeZone,
        stop: Stop,
    ) -> impl Future<Output = ()> + use<> {
        let erasures = erasures::Erasures::new(data_dir);
        let last_seen = last_seen::LastSeen::new(data_dir);
        upkeep::Upkeep { store: self.clone(), erasures, last_seen, clock, zone, stop }.run()
    }

    /// Commits what is under way, and ends. Calls that come later fail.
    pub(crate) async fn close(&self) {
        self.front.close().await;
        info!("the store is closed");
    }
}

/// Looks where the store is, without opening it: another process may have it.
pub(crate) async fn look(settings: &StoreSettings, data_dir: &Path) -> Vec<Step> {
    match &settings.place {
        StorePlace::Nowhere => Vec::new(),
        StorePlace::File(path) => vec![look_at_file(&data_dir.join(path))],
        StorePlace::Postgres(url) => {
            let shown = settings.shown();
            vec![match server::look_at(settings, url).await {
                Ok(found) => Step::ok("server", format!("{shown}: {found}")),
                Err(why) => Step::failed("server", format!("{shown}: {why}")),
            }]
        }
    }
}

fn look_at_file(path: &Path) -> Step {
    const FILE: &str = "file";
    let shown = path.display();
    match fs::OpenOptions::new().append(true).open(path) {
        Ok(_) if sqlite::is_in_use(path) => Step::ok(FILE, format!("{shown} is open in another process")),
        Ok(_) => Step::ok(FILE, format!("{shown} can be written")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Step::ok(FILE, format!("{shown} is not there yet: it is made at the start"))
        }
        Err(error) => Step::failed(FILE, format!("{shown}: {error}")),
    }
}

/// Files beside the store that had to be set aside.
pub(crate) fn set_aside(file: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|name| name.to_str())) else {
        return Ok(Vec::new());
    };
    let prefix = format!("{name}-damaged-");
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with(&prefix)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
