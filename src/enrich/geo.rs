//! Where an address is: by a database of the operator's, in memory, that may be replaced
//! by a newer one while the relay runs.
//!
//! ```text
//!  geo ─┬─► database: opened, tried, never changed ─► layout: what a record says
//!       │     └─► known: what was found lately, encoded      └─► place: what is kept of it
//!       └─► continents: for databases that do not say
//! ```
//!
//! No address is written down or told here; how much is kept of one is for `address` to say.

use std::{
    fmt, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwapOption;
use thiserror::Error;
use tracing::{info, warn};

use super::Encoded;
use crate::{address::is_public, settings::Reader, telemetry::GeoMetrics, watched::WatchedFile};

mod continents;
mod database;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod known;
mod layout;
mod place;
#[cfg(test)]
pub(crate) mod tests;

use database::Database;
pub use database::Unusable;
pub use place::Place;

/// Largest database: it is in memory, and while it is replaced with its successor.
const BYTES_MAX: u64 = 2 << 30;

/// Where the database is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GeoSettings {
    /// A file in MaxMind's format; nothing is looked up without.
    pub database: Option<PathBuf>,
}

impl GeoSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        let path = PathBuf::from(reader.text("GEO_DATABASE"));
        Self { database: Some(path).filter(|path| !path.as_os_str().is_empty()) }
    }
}

/// Why there is no database to look into.
#[derive(Debug, Error)]
pub enum GeoError {
    /// The file cannot be read.
    #[error("GEO_DATABASE {}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// What it holds cannot be used.
    #[error("GEO_DATABASE {}: cannot be used", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What it holds.
        #[source]
        unusable: Unusable,
    },
}

/// A record of the database that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a record of the geo database cannot be read")]
pub struct BadRecord;

/// Finds out where addresses are.
pub struct Geo {
    /// Nothing if there is none.
    file: Option<Mutex<WatchedFile>>,
    current: ArcSwapOption<Database>,
    metrics: GeoMetrics,
}

impl fmt::Debug for Geo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Geo").field("stamp", &self.stamp()).finish_non_exhaustive()
    }
}

impl Geo {
    /// Reads the database, if there is to be one. Blocks for as long as that takes.
    pub fn new(settings: &GeoSettings) -> Result<Self, GeoError> {
        let metrics = GeoMetrics::default();
        let Some(path) = &settings.database else {
            return Ok(Self { file: None, current: ArcSwapOption::empty(), metrics });
        };
        let mut file = WatchedFile::new(path.clone(), BYTES_MAX);
        let database = open(path, file.read_first())?;
        let file = Some(Mutex::new(file));
        Ok(Self { file, current: ArcSwapOption::from_pointee(database), metrics })
    }

    /// What is counted.
    pub(crate) fn metrics(&self) -> &GeoMetrics {
        &self.metrics
    }

    /// Where an address is; nothing if it is nowhere in particular, or nobody knows, or what
    /// the database says cannot be read, which is counted.
    pub fn find(&self, ip: IpAddr) -> Option<Arc<Encoded<Place>>> {
        self.try_find(ip).ok().flatten()
    }

    /// As [`Self::find`], and tells what cannot be read from what is not there.
    pub fn try_find(&self, ip: IpAddr) -> Result<Option<Arc<Encoded<Place>>>, BadRecord> {
        let database = self.current.load();
        let Some(database) = database.as_deref() else { return Ok(None) };
        // As a database has an address of IPv4.
        let ip = ip.to_canonical();
        if !is_public(ip) {
            return Ok(None);
        }
        database.find(ip).inspect_err(|BadRecord| {
            self.metrics.bad_records.inc();
        })
    }

    /// The country that a proxy of the operator's names, where there is no database that
    /// knows more; nothing if the letters are no country's.
    pub fn country_hint(&self, code: [u8; 2]) -> Option<Arc<Encoded<Place>>> {
        Place::of_country(code).map(|place| Arc::new(Encoded::new(place)))
    }

    /// What is looked into now: `<database type>/<Unix time of its making>`. A place that was
    /// found has its own.
    pub fn stamp(&self) -> Option<String> {
        self.current.load().as_deref().map(|database| database.stamp().to_string())
    }

    /// How old what is looked into is; 0 without a database.
    pub fn age_seconds(&self, now_ms: i64) -> i64 {
        let built = self.current.load().as_deref().map(Database::built);
        built.map_or(0, |built| {
            (now_ms / 1000).saturating_sub(i64::try_from(built).unwrap_or(i64::MAX)).max(0)
        })
    }

    /// True if there is a file that may be replaced.
    pub fn is_on(&self) -> bool {
        self.file.is_some()
    }

    /// Reads the database again if its file is another one now; says if it is used. If it
    /// cannot be, the one before is used on, and that is told once. Blocks.
    pub(crate) fn reload(&self) -> bool {
        let Some(file) = &self.file else { return false };
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(content) = file.read_if_changed() else { return false };
        match open(file.path(), content) {
            Ok(database) => {
                info!(stamp = &**database.stamp(), "geo database replaced");
                self.current.store(Some(Arc::new(database)));
                true
            }
            Err(error) => {
                self.metrics.reload_failed.inc();
                let error = format!("{:#}", anyhow::Error::new(error));
                warn!(error, "the geo database cannot be used, the one before is used on");
                false
            }
        }
    }
}

fn open(path: &Path, content: io::Result<Vec<u8>>) -> Result<Database, GeoError> {
    let path = || path.to_owned();
    let content = content.map_err(|source| GeoError::Read { path: path(), source })?;
    Database::open(content).map_err(|unusable| GeoError::Unusable { path: path(), unusable })
}
