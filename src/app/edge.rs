//! Builds what shapes events before they are kept, reads its files again when they change,
//! and keeps the sessions of visitors from one run to the next.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{task::spawn_blocking, time::timeout};
use tracing::{info, warn};

use super::StartError;
use crate::{
    admission::shaping::Shaping,
    config::Config,
    enrich::{
        enricher::{Enricher, Parts},
        geo::Geo,
        page::Pages,
        senders::Agents,
        session::{SavedSessions, SessionSecret, Sessions},
        visitor::Visitors,
    },
    privacy::{Privacy, secret::DataSecret},
    telemetry::Telemetry,
    time::Clock,
    watched::Reload,
};

/// What a key of sessions is made for.
const PURPOSE: &str = "sessions";
/// How long a stop waits for the sessions to be written. Without them visits are split.
const SAVE_TIME: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(super) struct Edge {
    pub(super) enricher: Option<Arc<Enricher>>,
    saved: SavedSessions,
}

impl Edge {
    /// Reads all data sets. Blocks for as long as that takes.
    pub(super) fn open(
        config: &Config,
        data_dir: &Path,
        secret: &DataSecret,
        telemetry: &mut Telemetry,
        clock: &Clock,
    ) -> Result<(Self, Vec<Arc<dyn Reload>>), StartError> {
        let saved = SavedSessions::in_dir(data_dir);
        if !config.enrich.is_on() {
            return Ok((Self { enricher: None, saved }, Vec::new()));
        }
        let geo = Arc::new(Geo::new(&config.geo)?);
        telemetry.geo(geo.metrics());
        let session_secret = match &config.enrich.session_secret {
            Some(shared) => SessionSecret::of(shared.expose().as_bytes()),
            None => SessionSecret::of(&secret.key_for(PURPOSE)),
        };
        let now_ms = clock.now_ms();
        let parts = Parts {
            agents: Agents::new(&config.agents)?,
            geo: geo.clone(),
            pages: Pages::new(config.pages.clone())?,
            visitors: Visitors::open(data_dir, config.enrich.time_zone.clone(), now_ms),
            sessions: Sessions::new(session_secret, config.enrich.sessions),
            clock: clock.clone(),
        };
        let enricher = Arc::new(Enricher::new(&config.enrich, parts, telemetry.enrichment()));
        saved.take(enricher.sessions(), now_ms);
        let files: Vec<Arc<dyn Reload>> = vec![enricher.clone()];
        if geo.is_on() {
            let clock = clock.clone();
            telemetry.gauge("relay_geo_database_age_seconds", move || geo.age_seconds(clock.now_ms()));
        }
        let visitors = enricher.clone();
        telemetry.gauge("relay_sessions_visitors", move || {
            i64::try_from(visitors.sessions().visitors()).unwrap_or(i64::MAX)
        });
        Ok((Self { enricher: Some(enricher), saved }, files))
    }

    /// How events are shaped.
    pub(super) fn shaping(&self, config: &Config, privacy: Option<&Arc<Privacy>>) -> Shaping {
        let (enricher, privacy) = (self.enricher.clone(), privacy.cloned());
        Shaping { enricher, ip_policy: config.ip_policy, privacy }
    }

    /// Writes the sessions of now, if the disk lets it soon.
    pub(super) async fn save(self) {
        let Some(enricher) = self.enricher else { return };
        let saving = spawn_blocking(move || self.saved.save(enricher.sessions()));
        match timeout(SAVE_TIME, saving).await {
            Ok(Ok(Ok(visitors))) => info!(visitors, "sessions are kept for the next start"),
            Ok(Ok(Err(error))) => warn!(%error, "sessions cannot be kept: visits that go on are split"),
            Ok(Err(error)) => warn!(%error, "a defect: keeping sessions failed"),
            Err(_) => warn!("sessions cannot be kept in time: visits that go on are split"),
        }
    }
}
