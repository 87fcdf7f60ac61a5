//! All that the relay can be told, put together: each stage's settings, as the
//! stage itself reads them.
//!
//! The stages know [`settings`](crate::settings), not this; only `app` and `cli` do.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use analytics_relay_providers::registry::{ProviderSettings, Vendor};

mod vendors;

pub use crate::{
    address::IpPolicy,
    admin::AdminSettings,
    admission::input::InputSettings,
    batch_worker::BatchRule,
    delivery::{dead_letter::DeadLetterSettings, retry::RetryRule},
    enrich::{
        geo::GeoSettings,
        page::{PageSettings, UrlQuery},
        senders::AgentSettings,
        settings::EnrichSettings,
    },
    ingest::{
        client_address::{ClientAddressSettings, ForwardedHeader},
        settings::{GrpcSettings, HttpSettings},
        tls::TlsFiles,
    },
    listener::Listen,
    privacy::{PiiMode, PrivacySettings},
    query::settings::QuerySettings,
    queue::{
        QueueLimits,
        spool::{log::LogLimits, settings::SpoolConfig},
    },
    sealing::settings::{NoKeys, SealingSettings},
    settings::{ConfigError, SETTINGS, SettingInfo, Shown, Source, known_names},
    shutdown::StopSettings,
    store::settings::{StorePlace, StoreSettings},
    telemetry::LogSettings,
};
use crate::{
    queue::spool,
    reasons::STORE,
    settings::{Reader, name_for},
};

/// Everything the relay can be told.
#[derive(Debug, Clone)]
pub struct Config {
    /// How callers are served over gRPC.
    pub grpc: GrpcSettings,
    /// How callers are served over HTTP.
    pub http: HttpSettings,
    /// How much of users' addresses is kept.
    pub ip_policy: IpPolicy,
    /// Where it is looked up where addresses are.
    pub geo: GeoSettings,
    /// What else is found out about events, and what becomes of machines'.
    pub enrich: EnrichSettings,
    /// How browsers, systems, devices and bots are told.
    pub agents: AgentSettings,
    /// How scrapes and probes are served.
    pub metrics: AdminSettings,
    /// What is asked of callers' texts.
    pub input: InputSettings,
    /// The logs.
    pub logs: LogSettings,
    /// The named vendors, in the order of their naming.
    pub providers: Vec<ProviderConfig>,
    /// What holds for a provider that is not a named vendor.
    pub delivery: DeliveryConfig,
    /// Most that is in the queue, and in each lane.
    pub queue: QueueLimits,
    /// How the relay stops.
    pub stop: StopSettings,
    /// Where dead letters and spill files are; in test mode below `DATA_DIR`.
    pub data_dir: PathBuf,
    /// The dead letters.
    pub dead_letters: DeadLetterSettings,
    /// What of an event is kept, and who gets what of it.
    pub privacy: PrivacySettings,
    /// What is kept of pages, and who led there.
    pub pages: PageSettings,
    /// The log, and what an OK means.
    pub spool: SpoolConfig,
    /// Where events are kept and asked about, if they are.
    pub store: StoreSettings,
    /// How answers of the store are kept.
    pub query: QuerySettings,
    /// Whether what is kept on disk is sealed.
    pub sealing: SealingSettings,
    /// Send nothing, show what would be sent.
    pub test_mode: bool,
    /// Every setting as it was read, secrets masked.
    pub shown: Vec<Shown>,
    /// What looks wrong and is none of ours.
    pub warnings: Vec<String>,
}

/// One named vendor.
#[derive(Debug, Clone)]
pub struct ProviderConfig {
    /// How to build it.
    pub settings: ProviderSettings,
    /// How to deliver to it.
    pub delivery: DeliveryConfig,
}

/// How events go to one provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeliveryConfig {
    /// When a batch leaves.
    pub batch: BatchRule,
    /// When and how often an event is sent again.
    pub retry: RetryRule,
    /// Longest time for one request.
    pub request_timeout: Duration,
    /// Most bytes of the provider's share of the log.
    pub spool_bytes_max: u64,
}

impl Config {
    /// Reads the environment and, if it is there, the file `.env` in the
    /// current directory.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::read(env::vars_os(), Path::new(".env"))
    }

    /// As [`Config::from_env`], for what needs no provider and so no key.
    pub fn for_reading() -> Result<Self, ConfigError> {
        let no_provider = (OsString::from("ANALYTICS_PROVIDER"), OsString::from("none"));
        Self::read(env::vars_os().chain([no_provider]), Path::new(".env"))
    }

    /// As [`Config::from_env`], for what only shows what would be sent.
    pub fn for_showing() -> Result<Self, ConfigError> {
        let shows = (OsString::from("TEST_MODE"), OsString::from("true"));
        Self::read(env::vars_os().chain([shows]), Path::new(".env"))
    }

    /// The vendors that `ANALYTICS_PROVIDER` names, for what needs no key.
    pub(crate) fn named_vendors() -> Vec<Vendor> {
        vendors::named(&mut Reader::new(env::vars_os(), Path::new(".env")))
    }

    /// Reads given variables instead of the environment, and no file.
    pub fn from_vars<K: Into<OsString>, V: Into<OsString>>(
        vars: impl IntoIterator<Item = (K, V)>,
    ) -> Result<Self, ConfigError> {
        let vars = vars.into_iter().map(|(name, value)| (name.into(), value.into()));
        Self::read(vars, Path::new(""))
    }

    fn read(vars: impl Iterator<Item = (OsString, OsString)>, file: &Path) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(vars, file);
        let config = Self::assemble(&mut reader);
        let (shown, warnings) = reader.finish()?;
        Ok(Self { shown, warnings, ..config })
    }

    /// Lets each stage read its own, in the order in which `check` shows them.
    fn assemble(reader: &mut Reader) -> Self {
        let test_mode = reader.flag("TEST_MODE");
        let grpc = GrpcSettings::read(reader);
        let http = HttpSettings::read(reader, test_mode);
        let ip_policy = IpPolicy::read(reader);
        let geo = GeoSettings::read(reader);
        let enrich = EnrichSettings::read(reader);
        let input = InputSettings::read(reader);
        let agents = AgentSettings::read(reader);
        let metrics = AdminSettings::read(reader);
        let logs = LogSettings::read(reader);
        let queue = QueueLimits::read(reader);
        let stop = StopSettings::read(reader);
        let base_dir = PathBuf::from(reader.text("DATA_DIR"));
        let dead_letters = DeadLetterSettings::read(reader);
        let privacy = PrivacySettings::read(reader);
        let pages = PageSettings::read(reader);
        let delivery = DeliveryConfig::read(reader, None);
        let mut spool = SpoolConfig::read(reader, &base_dir, delivery.spool_bytes_max);
        let data_dir = own_dir(base_dir, test_mode);
        spool.dir = own_dir(spool.dir, test_mode);
        let store = StoreSettings::read(reader, test_mode);
        let query = QuerySettings::read(reader, store.questions_max, store.question_timeout);
        let sealing = SealingSettings::read(reader);
        let providers = providers(reader, test_mode);
        Self {
            grpc,
            http,
            ip_policy,
            geo,
            enrich,
            input,
            agents,
            metrics,
            logs,
            providers,
            delivery,
            queue,
            stop,
            data_dir,
            dead_letters,
            privacy,
            pages,
            spool,
            store,
            query,
            sealing,
            test_mode,
            shown: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

impl Config {
    /// The names of all providers that the settings name, in the order of their lanes.
    pub(crate) fn provider_names(&self) -> impl Iterator<Item = &'static str> {
        let vendors = self.providers.iter().map(|vendor| vendor.settings.vendor.name());
        vendors.chain(self.store.is_on().then_some(STORE))
    }

    /// How events go to the store: in batches of its own, and else as to all.
    pub(crate) fn store_delivery(&self) -> DeliveryConfig {
        DeliveryConfig { batch: self.store.batch, ..self.delivery }
    }
}

impl DeliveryConfig {
    /// What holds for all providers, or, where it is set, for one.
    fn read(reader: &mut Reader, vendor: Option<Vendor>) -> Self {
        Self {
            batch: BatchRule::read(reader, vendor),
            retry: RetryRule::read(reader, vendor),
            request_timeout: reader.seconds(&name_for(vendor, "REQUEST_TIMEOUT_SECONDS"), 0.01..=600.0),
            spool_bytes_max: spool::settings::read_share(reader, vendor),
        }
    }
}

/// Below a directory, where a relay in test mode keeps its files.
pub(crate) const TEST_MODE_DIR: &str = "test-mode";

/// Where a relay keeps its files. Test mode calls everything delivered, so it must not
/// touch events that wait for a provider.
fn own_dir(dir: PathBuf, test_mode: bool) -> PathBuf {
    if test_mode { dir.join(TEST_MODE_DIR) } else { dir }
}

fn providers(reader: &mut Reader, test_mode: bool) -> Vec<ProviderConfig> {
    let vendors = vendors::named(reader);
    let provider = |vendor| {
        let delivery = DeliveryConfig::read(reader, Some(vendor));
        let settings = vendors::settings(reader, vendor, delivery.request_timeout, test_mode);
        ProviderConfig { settings, delivery }
    };
    vendors.into_iter().map(provider).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::from_vars(vars.iter().copied())
    }

    fn errors(vars: &[(&str, &str)]) -> Vec<String> {
        read(vars).unwrap_err().0
    }

    #[test]
    fn test_mode_needs_nothing_and_has_the_documented_defaults() {
        let config = read(&[("TEST_MODE", "true")]).unwrap();
        assert_eq!(config.grpc.listen, Listen { host: "[::]".into(), port: 50054 });
        assert_eq!(config.providers.len(), 3);
        assert_eq!(config.delivery.batch.events, 50);
        assert_eq!(config.delivery.batch.interval, Duration::from_secs(10));
        assert_eq!(config.stop.drain_timeout, Duration::from_secs(8));
    }

    #[test]
    fn a_provider_without_its_key_is_named_with_the_variable() {
        let errors = errors(&[("ANALYTICS_PROVIDER", "segment")]);
        assert_eq!(errors.len(), 1);
        assert!(errors[0].starts_with("SEGMENT_WRITE_KEY: got nothing"), "{}", errors[0]);
    }

    #[test]
    fn every_bad_setting_is_reported_with_what_came_and_what_is_wanted() {
        let errors = errors(&[
            ("TEST_MODE", "maybe"),
            ("ANALYTICS_PROVIDER", "none"),
            ("BATCH_SIZE", "0"),
            ("FLUSH_INTERVAL_SECONDS", "NaN"),
            ("GRPC_PORT", "65536"),
            ("LOG_LEVEL", "loud"),
            ("LOG_FORMAT", "xml"),
            ("MAX_RETRY_DELAY_MS", "10"),
        ]);
        let names: Vec<_> = errors.iter().map(|error| error.split(':').next().unwrap()).collect();
        for name in [
            "TEST_MODE",
            "BATCH_SIZE",
            "FLUSH_INTERVAL_SECONDS",
            "GRPC_PORT",
            "LOG_LEVEL",
            "LOG_FORMAT",
            "MAX_RETRY_DELAY_MS",
        ] {
            assert!(names.contains(&name), "{name} in {names:?}");
        }
        assert!(errors.contains(&"BATCH_SIZE: got \"0\", want 1 to 2000".to_owned()), "{errors:?}");
        let repeated = super::tests::errors(&[("TEST_MODE", "1"), ("BATCH_SIZE", "0"), ("BACTH_SIZE", "1")]);
        assert_eq!(
            repeated.len(),
            2,
            "once, not once for each provider, and what looks misspelled: {repeated:?}"
        );
    }

    #[test]
    fn a_delay_of_one_provider_is_checked_against_the_limit_of_all() {
        let bad = errors(&[("TEST_MODE", "1"), ("SEGMENT_INITIAL_RETRY_DELAY_MS", "60000")]);
        assert_eq!(
            bad,
            ["SEGMENT_MAX_RETRY_DELAY_MS: got \"30000\", want at least SEGMENT_INITIAL_RETRY_DELAY_MS"]
        );
    }

    #[test]
    fn one_provider_can_differ() {
        let config = read(&[
            ("TEST_MODE", "1"),
            ("MAX_RETRY_ATTEMPTS", "7"),
            ("SEGMENT_MAX_RETRY_ATTEMPTS", "2"),
            ("SEGMENT_FLUSH_INTERVAL_SECONDS", "0.25"),
            ("AMPLITUDE_BASE_URL", "eu"),
            ("MIXPANEL_BASE_URL", "http://localhost:8080"),
        ])
        .unwrap();
        let attempts: Vec<_> = config.providers.iter().map(|p| p.delivery.retry.attempts_max).collect();
        assert_eq!(attempts, [7, 7, 2]);
        assert_eq!(config.providers[2].delivery.batch.interval, Duration::from_millis(250));
        assert_eq!(config.providers[1].settings.base_url.as_str(), "https://api.eu.amplitude.com/");
        assert_eq!(config.providers[0].settings.base_url.as_str(), "http://localhost:8080/");
    }

    #[test]
    fn a_password_in_a_url_is_refused_and_not_shown() {
        for url in
            ["https://user:canary@proxy.example", "https://canary@x.example", "https://x.example/?k=canary"]
        {
            let bad = errors(&[("TEST_MODE", "1"), ("MIXPANEL_BASE_URL", url)]);
            assert!(bad[0].starts_with("MIXPANEL_BASE_URL: got") && !bad[0].contains("canary"), "{bad:?}");
        }
    }

    #[test]
    fn a_key_is_never_shown() {
        let config = read(&[("ANALYTICS_PROVIDER", "mixpanel"), ("MIXPANEL_API_KEY", "canary")]).unwrap();
        assert!(!format!("{config:?}").contains("canary"));
        let bad = errors(&[("ANALYTICS_PROVIDER", "mixpanel"), ("MIXPANEL_API_KEY", "canary key")]);
        assert!(!bad.join("").contains("canary"));
    }

    /// Segment answers a wrong key with a success: all events would be lost behind it.
    #[test]
    fn what_cannot_be_a_key_is_an_error_that_does_not_tell_it() {
        for (key, says) in [
            ("\"canary\"", "in quotes"),
            ("'canary'", "in quotes"),
            ("${canary}", "variable"),
            ("<canary>", "placeholder"),
            ("canary key", "blank"),
        ] {
            for name in ["MIXPANEL_API_KEY", "AMPLITUDE_API_KEY", "SEGMENT_WRITE_KEY"] {
                let vendor = name.split('_').next().unwrap();
                let bad = errors(&[("ANALYTICS_PROVIDER", vendor), (name, key)]);
                assert_eq!(bad.len(), 1, "{bad:?}");
                assert!(bad[0].starts_with(&format!("{name}: got ")) && bad[0].contains(says), "{bad:?}");
                assert!(bad[0].contains("want the key alone") && !bad[0].contains("canary"), "{bad:?}");
            }
        }
    }

    #[test]
    fn a_value_in_quotes_is_taken_as_it_is_with_a_warning() {
        let quoted =
            [("TEST_MODE", "1"), ("DATA_DIR", "\"/data\""), ("SPOOL_DIR", "'/s'"), ("HOME", "\"x\"")];
        let config = read(&quoted).unwrap();
        assert_eq!(config.data_dir, Path::new("\"/data\"/test-mode"));
        assert_eq!(config.warnings.len(), 2, "{:?}", config.warnings);
        assert!(config.warnings[0].starts_with("DATA_DIR: its value is in quotes"), "{:?}", config.warnings);
        // What is an error says what may be behind it.
        let bad = errors(&[("TEST_MODE", "1"), ("BATCH_SIZE", "\"50\"")]);
        assert!(bad.iter().any(|error| error.contains("docker's --env-file")), "{bad:?}");
        assert_eq!(read(&[("TEST_MODE", "1"), ("DATA_DIR", "/a \"b\" c")]).unwrap().warnings, [""; 0]);
    }

    #[test]
    fn the_file_is_read_and_the_environment_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".env");
        std::fs::write(&path, "TEST_MODE=true\nBATCH_SIZE=10\nGRPC_PORT=1\n").unwrap();
        let environment = [("GRPC_PORT".into(), "2".into())];
        let config = Config::read(environment.into_iter(), &path).unwrap();
        assert_eq!((config.delivery.batch.events, config.grpc.listen.port), (10, 2));
        let source = |name: &str| config.shown.iter().find(|shown| shown.name == name).unwrap().source;
        assert_eq!((source("BATCH_SIZE"), source("GRPC_PORT")), (Source::File, Source::Environment));
        let error = |text: &[u8]| {
            std::fs::write(&path, text).unwrap();
            Config::read(std::iter::empty(), &path).unwrap_err().to_string()
        };
        let bad =
            error(b"TEST_MODE=1\nwhat canary\nBATCH_SIZE=0\nSEGMENT_WRITE_KEY=can$ary\nOTHER=$canary\n");
        assert!(bad.contains(".env line 2: got no NAME=value") && bad.contains("BATCH_SIZE: got"), "{bad}");
        assert!(bad.contains(".env line 4: SEGMENT_WRITE_KEY: got a $"), "{bad}");
        assert!(bad.starts_with("3 bad") && !bad.contains("can"), "no other program's line is told: {bad}");
        assert!(error(b"\xff\xfeT\0").contains("got UTF-16, want UTF-8"));
        std::fs::write(&path, "\u{feff}TEST_MODE=1\nDATA_DIR='/data/$x'\nOTHER=$HOME\n").unwrap();
        let config = Config::read(std::iter::empty(), &path).unwrap();
        assert_eq!((config.data_dir.to_str(), config.warnings.len()), (Some("/data/$x/test-mode"), 0));
    }

    #[test]
    fn what_kubernetes_sets_for_a_service_of_our_name_is_told_and_not_used() {
        let config = read(&[
            ("TEST_MODE", "1"),
            ("GRPC_PORT", "tcp://10.96.0.12:50054"),
            ("GRPC_SERVICE_HOST", "10.96.0.12"),
            ("GRPC_SERVICE_PORT", "50054"),
            ("GRPC_PORT_50054_TCP_ADDR", "10.96.0.12"),
            ("METRICS_PORT", "tcp://[fd00::7]:9090"),
            ("SEGMENT_SERVICE_HOST", "10.96.0.13"),
            ("SEGMENT_SERVICE_PORT", "80"),
            ("SEGMENT_PORT", "tcp://10.96.0.13:80"),
            ("SEGMENT_PORT_80_TCP", "tcp://10.96.0.13:80"),
        ])
        .unwrap();
        assert_eq!((config.grpc.listen.port, config.metrics.listen.port), (50054, 9090));
        let [grpc, metrics] = &config.warnings[..] else { panic!("{:?}", config.warnings) };
        assert!(grpc.starts_with("GRPC_PORT=tcp://10.96.0.12:50054 is ignored: Kubernetes"), "{grpc}");
        assert!(metrics.contains("METRICS_PORT in the container's env, or enableServiceLinks"), "{metrics}");
        let bad = errors(&[("TEST_MODE", "1"), ("GRPC_PORT", "http://relay:1")]);
        assert_eq!(bad, ["GRPC_PORT: got \"http://relay:1\", want 0 to 65535"]);
    }

    #[test]
    fn quotes_that_came_with_the_environment_are_told() {
        let config = read(&[("TEST_MODE", "1"), ("DATA_DIR", "'/data'"), ("OTHER", "\"x\"")]).unwrap();
        let [warning] = &config.warnings[..] else { panic!("{:?}", config.warnings) };
        assert!(warning.starts_with("DATA_DIR: its value is in quotes"), "{warning}");
        let bad = errors(&[("TEST_MODE", "1"), ("BATCH_SIZE", "\"50\"")]);
        assert!(bad.len() == 2 && bad[1].contains("docker's --env-file keeps quotes"), "{bad:?}");
    }
}
