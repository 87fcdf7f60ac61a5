//! Builds what shapes events before they are kept, reads its files again when they change,
//! and keeps the sessions of visitors from one run to the next.

use std::{convert::Infallible, path::Path, sync::Arc, time::Duration};

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
        settings::{Declined, EnrichSettings},
        visitor::Visitors,
    },
    privacy::{Privacy, secret::DataSecret},
    reasons::Step,
    telemetry::{EnrichMetrics, Telemetry},
    time::Clock,
    watched::Reload,
};

/// What a key of sessions is made for.
const PURPOSE: &str = "sessions";
/// How long a stop waits for the sessions to be written. Without them visits are split.
const SAVE_TIME: Duration = Duration::from_secs(1);
/// Steps that go by who was seen before, and under whose secret.
const BY_THE_PAST: [Step; 2] = [Step::Visitor, Step::Session];

/// See the module.
#[derive(Debug)]
pub(super) struct Edge {
    pub(super) enricher: Option<Arc<Enricher>>,
    /// None where nobody gets an id.
    visitors: Option<Arc<Visitors>>,
    /// None where no event gets a session.
    saved: Option<SavedSessions>,
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
        let makes = |step| config.enrich.steps.contains(&step);
        let now_ms = clock.now_ms();
        let saved = SavedSessions::in_dir(data_dir);
        let visitors = makes(Step::Visitor)
            .then(|| Arc::new(Visitors::open(data_dir, config.enrich.time_zone.clone(), now_ms)));
        if visitors.is_none() {
            Visitors::remove_file(data_dir);
        }
        if !makes(Step::Session) {
            saved.remove();
        }
        if !config.enrich.is_on() {
            return Ok((Self { enricher: None, visitors: None, saved: None }, Vec::new()));
        }
        let session_secret = match &config.enrich.session_secret {
            Some(shared) => SessionSecret::of(shared.expose().as_bytes()),
            None => SessionSecret::of(&secret.key_for(PURPOSE)),
        };
        let sessions = Sessions::new(session_secret, config.enrich.sessions);
        let parts = parts(config, visitors.clone(), sessions)?;
        let geo = parts.geo.clone();
        telemetry.geo(geo.metrics());
        let enricher = Arc::new(Enricher::new(&config.enrich, parts, telemetry.enrichment()));
        let saved = makes(Step::Session).then_some(saved);
        if let Some(saved) = &saved {
            saved.take(enricher.sessions(), now_ms);
        }
        let files: Vec<Arc<dyn Reload>> = vec![enricher.clone()];
        let geo_clock = clock.clone();
        telemetry.gauge("relay_geo_database_age_seconds", move || geo.age_seconds(geo_clock.now_ms()));
        let known = enricher.clone();
        telemetry.gauge("relay_sessions_visitors", move || {
            i64::try_from(known.sessions().visitors()).unwrap_or(i64::MAX)
        });
        Ok((Self { enricher: Some(enricher), visitors, saved }, files))
    }

    /// How events are shaped.
    pub(super) fn shaping(&self, config: &Config, privacy: Option<&Arc<Privacy>>) -> Shaping {
        let (enricher, privacy) = (self.enricher.clone(), privacy.cloned());
        let drops_declined = config.enrich.declined == Declined::Dropped;
        Shaping { enricher, ip_policy: config.ip_policy, drops_declined, privacy }
    }

    /// Turns the salts of visitors with the days, if there are any.
    pub(super) fn keep_salts(&self, clock: &Clock) -> Option<impl Future<Output = Infallible> + use<>> {
        Some(self.visitors.clone()?.keep(clock.clone()))
    }

    /// Writes the sessions of now, if the disk lets it soon.
    pub(super) async fn save(self) {
        let (Some(enricher), Some(saved)) = (self.enricher, self.saved) else { return };
        let saving = spawn_blocking(move || saved.save(enricher.sessions()));
        match timeout(SAVE_TIME, saving).await {
            Ok(Ok(Ok(visitors))) => info!(visitors, "sessions are kept for the next start"),
            Ok(Ok(Err(error))) => warn!(%error, "sessions cannot be kept: visits that go on are split"),
            Ok(Err(error)) => warn!(%error, "a defect: keeping sessions failed"),
            Err(_) => warn!("sessions cannot be kept in time: visits that go on are split"),
        }
    }
}

/// What an enricher works with. Reads all data sets.
fn parts(config: &Config, visitors: Option<Arc<Visitors>>, sessions: Sessions) -> Result<Parts, StartError> {
    let geo = Arc::new(Geo::new(&config.geo)?);
    let (agents, pages) = (Agents::new(&config.agents)?, Pages::new(config.pages.clone())?);
    Ok(Parts { agents, geo, pages, visitors, sessions })
}

/// How a relay of these settings shapes an event before the rules of privacy, for a person who
/// asks; and the steps of it that are left out, because what they find is not in the event.
/// Reads all data sets, and no file of the relay's own.
pub(crate) fn for_showing(config: &Config) -> Result<(Shaping, Vec<Step>), StartError> {
    let (left_out, steps) = config.enrich.steps.iter().copied().partition(|step| BY_THE_PAST.contains(step));
    let settings = EnrichSettings { steps, ..config.enrich.clone() };
    let mut shaping = Shaping { ip_policy: config.ip_policy, ..Shaping::default() };
    if settings.is_on() {
        let nobodys = Sessions::new(SessionSecret::of(&[]), settings.sessions);
        let parts = parts(config, None, nobodys)?;
        shaping.enricher = Some(Arc::new(Enricher::new(&settings, parts, EnrichMetrics::default())));
    }
    Ok((shaping, left_out))
}

#[cfg(test)]
mod tests {
    use analytics_relay_providers::EventParts;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        sync::mpsc,
    };

    use super::*;
    use crate::{app::App, delivery::test_support::track, enrich::edge::Edge as Door};

    /// What a page on the metrics port says.
    async fn page(app: &App, path: &str) -> String {
        let mut stream = TcpStream::connect(app.metrics_addr()).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// An operator learns it from health and metrics, and the events from themselves.
    #[tokio::test]
    async fn steps_that_are_switched_off_and_events_that_lack_them_are_told() {
        let data = tempfile::tempdir().unwrap();
        let config = Config::from_vars([
            ("ANALYTICS_PROVIDER", "none"),
            ("STORE_URL", "sqlite:"),
            ("GRPC_HOST", "127.0.0.1"),
            ("GRPC_PORT", "0"),
            ("HTTP_PORT", "off"),
            ("METRICS_HOST", "127.0.0.1"),
            ("METRICS_PORT", "0"),
            ("DATA_DIR", data.path().to_str().unwrap()),
        ])
        .unwrap();
        let app = App::start(&config).await.unwrap();
        let health = page(&app, "/healthz").await;
        assert!(health.ends_with("\r\n\r\nSERVING"), "{health}");

        let enricher = app.edge.enricher.as_ref().unwrap();
        enricher.sabotage(&[Step::Agent, Step::Bot]);
        let event = track("x");
        let seen = EventParts { user_agent: Some("Firefox"), ..event.parts() };
        for _ in 0..10 {
            enricher.count(enricher.enrich(&seen, &Door::default()).unwrap().tally);
        }
        let health = page(&app, "/healthz").await;
        let says = "\r\n\r\nDEGRADED: enrichment is switched off after panics: agent, bot";
        assert!(health.ends_with(says), "{health}");
        let metrics = page(&app, "/metrics").await;
        for (step, missed) in [("agent", 10), ("bot", 10), ("geo", 0)] {
            let line = format!("relay_enrich_missed_total{{step=\"{step}\"}} {missed}\n");
            assert!(metrics.contains(&line), "{line}: {metrics}");
        }

        let (signal, signals) = mpsc::channel(1);
        signal.send(()).await.unwrap();
        assert_eq!(app.run_until(signals).await.exit_code(), 0);
    }
}
