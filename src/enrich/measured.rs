//! All steps over an event of a browser's, for the benchmark of what that costs.

use std::{error::Error, path::Path, sync::Arc};

use analytics_relay_providers::EventParts;

use super::{
    agent::Hints,
    edge::Edge,
    enricher::{Enricher, Parts},
    geo::Geo,
    page::Pages,
    senders::Agents,
    session::{SessionSecret, Sessions},
    visitor::Visitors,
};
use crate::{config::Config, telemetry::EnrichMetrics};

/// See the module.
#[derive(Debug)]
pub struct AllSteps(Enricher);

impl AllSteps {
    /// By the data sets of a configuration.
    pub fn open(config: &Config, data_dir: &Path, now_ms: i64) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let time_zone = config.enrich.time_zone.clone();
        let parts = Parts {
            agents: Agents::new(&config.agents)?,
            geo: Arc::new(Geo::new(&config.geo)?),
            pages: Pages::new(config.pages.clone())?,
            visitors: Some(Arc::new(Visitors::open(data_dir, time_zone, now_ms))),
            sessions: Sessions::new(SessionSecret::of(b"measured"), config.enrich.sessions),
        };
        Ok(Self(Enricher::new(&config.enrich, parts, EnrichMetrics::default())))
    }

    /// Bytes of what is found out.
    pub fn enrich(&self, event: &EventParts<'_>, hints: &Hints<'_>) -> usize {
        let edge = Edge { ip_is_connections: true, is_device: true, hints: Some(hints), ..Edge::default() };
        let enriched = self.0.enrich(event, &edge).unwrap_or_default();
        [enriched.json, enriched.session_id, enriched.anonymous_id].iter().flatten().map(String::len).sum()
    }
}
