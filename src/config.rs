//! The environment → one typed [`Config`]. The only reader of the environment.
//!
//! [`SETTINGS`] lists every variable; `.env.example` and a test follow it. What
//! stands in the environment wins over the file `.env`. Every bad setting is
//! reported, not only the first.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fmt::{self, Display},
    num::NonZeroUsize,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use analytics_relay_providers::{
    Secret,
    mixpanel::IdentityMode,
    registry::{ProviderSettings, Url, Vendor},
};

use crate::{
    queue::{Durability, spool::WhenFull},
    telemetry::{LogFormat, parse_level},
};

/// Bounds of the bytes of a log.
const SPOOL_BYTES_MAX: RangeInclusive<u64> = 131_072..=1 << 50;

/// One variable.
#[derive(Debug, Clone, Copy)]
pub struct SettingInfo {
    /// Its name.
    pub name: &'static str,
    /// What holds when it is not set; empty if nothing does.
    pub default: &'static str,
    /// May be set for one provider, as in `SEGMENT_BATCH_SIZE`.
    pub per_provider: bool,
}

const fn setting(name: &'static str, default: &'static str) -> SettingInfo {
    SettingInfo { name, default, per_provider: false }
}

const fn per_provider(name: &'static str, default: &'static str) -> SettingInfo {
    SettingInfo { name, default, per_provider: true }
}

/// Every variable.
pub const SETTINGS: [SettingInfo; 39] = [
    setting("ANALYTICS_PROVIDER", "mixpanel,amplitude,segment"),
    setting("TEST_MODE", "false"),
    setting("MIXPANEL_API_KEY", ""),
    setting("MIXPANEL_BASE_URL", "us"),
    setting("MIXPANEL_IDENTITY_MODE", "simplified"),
    setting("AMPLITUDE_API_KEY", ""),
    setting("AMPLITUDE_BASE_URL", "us"),
    setting("AMPLITUDE_MIN_ID_LENGTH", "1"),
    setting("SEGMENT_WRITE_KEY", ""),
    setting("SEGMENT_BASE_URL", "us"),
    setting("GRPC_HOST", "0.0.0.0"),
    setting("GRPC_PORT", "50054"),
    setting("GRPC_MAX_CONNECTIONS", "1000"),
    setting("GRPC_TLS_CERT_FILE", ""),
    setting("GRPC_TLS_KEY_FILE", ""),
    setting("GRPC_TLS_CLIENT_CA_FILE", ""),
    setting("METRICS_HOST", "0.0.0.0"),
    setting("METRICS_PORT", "9090"),
    setting("LOG_LEVEL", "info"),
    setting("LOG_FORMAT", ""),
    per_provider("BATCH_SIZE", "50"),
    per_provider("FLUSH_INTERVAL_SECONDS", "10"),
    per_provider("MAX_RETRY_ATTEMPTS", "5"),
    per_provider("INITIAL_RETRY_DELAY_MS", "1000"),
    per_provider("MAX_RETRY_DELAY_MS", "30000"),
    per_provider("REQUEST_TIMEOUT_SECONDS", "10"),
    setting("QUEUE_MAX_EVENTS", "100000"),
    setting("QUEUE_MAX_BYTES", "67108864"),
    setting("DRAIN_TIMEOUT_SECONDS", "8"),
    setting("DATA_DIR", "./data"),
    setting("DEAD_LETTERS_MAX_BYTES", "1073741824"),
    setting("DURABILITY", "memory"),
    setting("SPOOL_DIR", ""),
    per_provider("SPOOL_MAX_BYTES", "10737418240"),
    setting("SPOOL_SEGMENT_BYTES", "67108864"),
    setting("SPOOL_RETENTION_HOURS", "72"),
    setting("SPOOL_WHEN_FULL", "dead_letter_oldest"),
    setting("SPOOL_GROUP_WINDOW_MS", "2"),
    setting("SPOOL_GROUP_BYTES", "1048576"),
];

/// Everything the relay can be told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen for callers.
    pub grpc: Listen,
    /// Most connections of callers.
    pub grpc_connections_max: usize,
    /// What to serve TLS with; plaintext if nothing.
    pub grpc_tls: Option<TlsFiles>,
    /// Where to listen for scrapes and probes.
    pub metrics: Listen,
    /// Level or directives of the logs.
    pub log_level: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// The named vendors, in the order of their naming.
    pub providers: Vec<ProviderConfig>,
    /// What holds for a provider that is not a named vendor.
    pub delivery: DeliveryConfig,
    /// Most events in the queue, and in each lane.
    pub queue_events_max: usize,
    /// Most memory that events in the queue, and in each lane, may hold.
    pub queue_bytes_max: usize,
    /// From the first signal to the exit.
    pub drain_timeout: Duration,
    /// Where dead letters and spill files are.
    pub data_dir: PathBuf,
    /// Most bytes of one provider's dead letters.
    pub dead_letters_bytes_max: u64,
    /// What an OK means: `Queued` without a log, else what the log promises.
    pub durability: Durability,
    /// Where the log is, if there is one.
    pub spool_dir: PathBuf,
    /// How the log works.
    pub spool: SpoolConfig,
    /// Send nothing, show what would be sent.
    pub test_mode: bool,
    /// Every setting as it was read, secrets masked.
    pub shown: Vec<Shown>,
    /// What looks wrong and is none of ours.
    pub warnings: Vec<String>,
}

/// How the log of a durable relay works.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SpoolConfig {
    /// Most bytes on disk.
    pub bytes_max: u64,
    /// Bytes of one segment.
    pub segment_bytes: u64,
    /// How long an event may wait for a provider before it becomes a dead
    /// letter.
    pub retention: Duration,
    /// What happens when it has used up its bytes.
    pub when_full: WhenFull,
    /// How long a group of events waits for callers that came with the last.
    pub group_window: Duration,
    /// Bytes at which a group waits no more.
    pub group_bytes: usize,
}

/// An address to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// An address, or a name of this machine.
    pub host: String,
    /// 0 means any that is free.
    pub port: u16,
}

/// PEM files, read at the start and again whenever they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The relay's certificate, and those between it and its authority.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The authorities of callers; without it, anyone may call.
    pub client_ca: Option<PathBuf>,
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
    /// A batch leaves with this many events,
    pub batch_size: usize,
    /// or this long after its first one.
    pub flush_interval: Duration,
    /// Most attempts for an event, the first included.
    pub retry_attempts_max: u32,
    /// Longest wait after the first failure; doubles with each further one.
    pub retry_delay_initial: Duration,
    /// Longest wait after any failure.
    pub retry_delay_max: Duration,
    /// Longest time for one request.
    pub request_timeout: Duration,
    /// Most bytes of the provider's share of the log.
    pub spool_bytes_max: u64,
}

/// A setting as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The variable.
    pub name: String,
    /// Its value, masked if it is a secret.
    pub value: String,
    /// Where it came from.
    pub source: Source,
}

/// Where a setting came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The process's environment.
    Environment,
    /// The file `.env`.
    File,
    /// It was not set.
    Default,
}

impl Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Environment => "environment",
            Self::File => ".env",
            Self::Default => "default",
        })
    }
}

/// Every setting that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub Vec<String>);

impl Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bad setting(s):", self.0.len())?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl std::error::Error for ConfigError {}

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

    /// The vendors that `ANALYTICS_PROVIDER` names, for what needs no key.
    pub(crate) fn named_vendors() -> Vec<Vendor> {
        let mut reader = Reader::default();
        reader.take_file(Path::new(".env"));
        reader.take_environment(env::vars_os());
        let names = reader.text("ANALYTICS_PROVIDER").to_ascii_lowercase();
        names.split(',').filter_map(|name| Vendor::from_name(name.trim())).collect()
    }

    /// Reads given variables instead of the environment, and no file.
    pub fn from_vars<K: Into<OsString>, V: Into<OsString>>(
        vars: impl IntoIterator<Item = (K, V)>,
    ) -> Result<Self, ConfigError> {
        let vars = vars.into_iter().map(|(name, value)| (name.into(), value.into()));
        Self::read(vars, Path::new(""))
    }

    fn read(vars: impl Iterator<Item = (OsString, OsString)>, file: &Path) -> Result<Self, ConfigError> {
        let mut reader = Reader::default();
        reader.take_file(file);
        reader.take_environment(vars);
        let config = reader.config();
        if reader.errors.is_empty() {
            return Ok(config);
        }
        // A misspelled name may be why another one is not set.
        reader.errors.extend(config.warnings);
        Err(ConfigError(reader.errors))
    }
}

/// Reads settings one by one and keeps what is wrong with them.
#[derive(Default)]
struct Reader {
    vars: BTreeMap<String, (String, Source)>,
    shown: Vec<Shown>,
    errors: Vec<String>,
}

impl Reader {
    fn take_file(&mut self, path: &Path) {
        let lines = match dotenvy::from_path_iter(path) {
            Ok(lines) => lines,
            Err(error) if error.not_found() || path.as_os_str().is_empty() => return,
            Err(error) => return self.errors.push(format!("{}: {error}", path.display())),
        };
        for line in lines {
            match line {
                Ok((name, value)) => {
                    self.vars.insert(name, (value, Source::File));
                }
                // The library's own words would quote the line, a key perhaps.
                Err(_) => {
                    let path = path.display();
                    self.errors.push(format!("{path}: got a line that cannot be read, want NAME=value"));
                }
            }
        }
    }

    fn take_environment(&mut self, vars: impl Iterator<Item = (OsString, OsString)>) {
        for (name, value) in vars {
            // A name that is not UTF-8 is none of ours.
            let Ok(name) = name.into_string() else { continue };
            match value.into_string() {
                Ok(value) => {
                    self.vars.insert(name, (value, Source::Environment));
                }
                Err(_) if is_known(&name) => {
                    self.errors.push(format!("{name}: got bytes that are not UTF-8, want text"));
                }
                Err(_) => {}
            }
        }
    }

    fn config(&mut self) -> Config {
        let test_mode = self.flag("TEST_MODE");
        let grpc = self.listen("GRPC_HOST", "GRPC_PORT");
        let grpc_connections_max = self.number("GRPC_MAX_CONNECTIONS", 1..=100_000);
        let grpc_tls = self.tls();
        let metrics = self.listen("METRICS_HOST", "METRICS_PORT");
        let log_level = self.log_level();
        let log_format = self.log_format();
        let queue_events_max = self.number("QUEUE_MAX_EVENTS", 1..=10_000_000);
        let queue_bytes_max = self.number("QUEUE_MAX_BYTES", 65_536..=1 << 36);
        let drain_timeout = self.seconds("DRAIN_TIMEOUT_SECONDS", 0.1..=3600.0);
        let data_dir = PathBuf::from(self.text("DATA_DIR"));
        let dead_letters_bytes_max = self.number("DEAD_LETTERS_MAX_BYTES", 0..=1 << 50);
        let delivery = self.delivery(None);
        let durability = self.durability();
        let spool_dir = match self.text("SPOOL_DIR").as_str() {
            "" => data_dir.join("spool"),
            dir => PathBuf::from(dir),
        };
        let spool = self.spool(delivery.spool_bytes_max);
        let providers = self.providers(test_mode);
        Config {
            grpc,
            grpc_connections_max,
            grpc_tls,
            metrics,
            log_level,
            log_format,
            providers,
            delivery,
            queue_events_max,
            queue_bytes_max,
            drain_timeout,
            data_dir,
            dead_letters_bytes_max,
            durability,
            spool_dir,
            spool,
            test_mode,
            shown: std::mem::take(&mut self.shown),
            warnings: self.vars.keys().filter_map(|name| misspelling(name)).collect(),
        }
    }

    fn providers(&mut self, test_mode: bool) -> Vec<ProviderConfig> {
        let names = self.text("ANALYTICS_PROVIDER");
        let mut vendors = Vec::new();
        for name in names.split(',').map(str::trim).filter(|name| !matches!(*name, "" | "none")) {
            match Vendor::from_name(&name.to_ascii_lowercase()) {
                Some(vendor) if vendors.contains(&vendor) => {
                    self.wrong("ANALYTICS_PROVIDER", name, "each provider once");
                }
                Some(vendor) => vendors.push(vendor),
                None => {
                    let known = Vendor::ALL.map(Vendor::name).join(", ");
                    self.wrong("ANALYTICS_PROVIDER", name, &format!("none, or some of {known}"));
                }
            }
        }
        vendors.into_iter().map(|vendor| self.provider(vendor, test_mode)).collect()
    }

    fn provider(&mut self, vendor: Vendor, test_mode: bool) -> ProviderConfig {
        let delivery = self.delivery(Some(vendor));
        let (key, base_url) = match vendor {
            Vendor::Mixpanel => ("MIXPANEL_API_KEY", "MIXPANEL_BASE_URL"),
            Vendor::Amplitude => ("AMPLITUDE_API_KEY", "AMPLITUDE_BASE_URL"),
            Vendor::Segment => ("SEGMENT_WRITE_KEY", "SEGMENT_BASE_URL"),
        };
        let mixpanel = vendor == Vendor::Mixpanel;
        let amplitude = vendor == Vendor::Amplitude;
        let settings = ProviderSettings {
            vendor,
            key: self.key(key, vendor, test_mode),
            base_url: self.base_url(base_url, vendor),
            request_timeout: delivery.request_timeout,
            identity_mode: if mixpanel { self.identity_mode() } else { IdentityMode::default() },
            min_id_length: if amplitude { self.number("AMPLITUDE_MIN_ID_LENGTH", 1..=255) } else { 1 },
        };
        ProviderConfig { settings, delivery }
    }

    /// What holds for all providers, or, where it is set, for one.
    fn delivery(&mut self, vendor: Option<Vendor>) -> DeliveryConfig {
        let prefix = vendor.map(|vendor| format!("{}_", vendor.name().to_ascii_uppercase()));
        let name =
            |setting: &'static str| prefix.as_deref().map_or(setting.into(), |p| format!("{p}{setting}"));
        let delivery = DeliveryConfig {
            batch_size: self
                .number::<NonZeroUsize>(
                    &name("BATCH_SIZE"),
                    NonZeroUsize::MIN..=NonZeroUsize::MIN.saturating_add(1999),
                )
                .get(),
            flush_interval: self.seconds(&name("FLUSH_INTERVAL_SECONDS"), 0.01..=3600.0),
            retry_attempts_max: self.number(&name("MAX_RETRY_ATTEMPTS"), 1..=100),
            retry_delay_initial: self.millis(&name("INITIAL_RETRY_DELAY_MS"), 1..=600_000),
            retry_delay_max: self.millis(&name("MAX_RETRY_DELAY_MS"), 1..=3_600_000),
            request_timeout: self.seconds(&name("REQUEST_TIMEOUT_SECONDS"), 0.01..=600.0),
            spool_bytes_max: self.number(&name("SPOOL_MAX_BYTES"), SPOOL_BYTES_MAX),
        };
        if delivery.retry_delay_initial > delivery.retry_delay_max {
            let (initial, max) = (name("INITIAL_RETRY_DELAY_MS"), name("MAX_RETRY_DELAY_MS"));
            if !self.is_repeated(&initial) || !self.is_repeated(&max) {
                let got = delivery.retry_delay_max.as_millis();
                self.errors.push(format!("{max}: got \"{got}\", want at least {initial}"));
            }
        }
        delivery
    }

    fn durability(&mut self) -> Durability {
        match self.text("DURABILITY").as_str() {
            "memory" => Durability::Queued,
            "written" => Durability::Written,
            "synced" => Durability::Synced,
            other => {
                self.wrong("DURABILITY", other, "memory, written or synced");
                Durability::Queued
            }
        }
    }

    fn spool(&mut self, bytes_max: u64) -> SpoolConfig {
        let segment_bytes = self.number("SPOOL_SEGMENT_BYTES", 65_536..=1 << 30);
        let of_vendors =
            Vendor::ALL.map(|vendor| format!("{}_SPOOL_MAX_BYTES", vendor.name().to_ascii_uppercase()));
        for name in ["SPOOL_MAX_BYTES".to_owned()].into_iter().chain(of_vendors) {
            let (text, _) = self.lookup(&name);
            // What is no number is told elsewhere.
            let bytes: Option<u64> = text.replace('_', "").parse().ok();
            if bytes.is_some_and(|bytes| bytes < 2 * segment_bytes) && !self.is_repeated(&name) {
                self.errors.push(format!("{name}: got {text:?}, want at least twice SPOOL_SEGMENT_BYTES"));
            }
        }
        let hours: f64 = self.number("SPOOL_RETENTION_HOURS", 0.0001..=87_600.0);
        let when_full = match self.text("SPOOL_WHEN_FULL").as_str() {
            "reject" => WhenFull::Reject,
            "dead_letter_oldest" => WhenFull::DeadLetterOldest,
            other => {
                self.wrong("SPOOL_WHEN_FULL", other, "reject or dead_letter_oldest");
                WhenFull::DeadLetterOldest
            }
        };
        let window_ms: f64 = self.number("SPOOL_GROUP_WINDOW_MS", 0.0..=100.0);
        SpoolConfig {
            bytes_max,
            segment_bytes,
            retention: Duration::from_secs_f64(hours * 3600.0),
            when_full,
            group_window: Duration::from_secs_f64(window_ms / 1000.0),
            group_bytes: self.number("SPOOL_GROUP_BYTES", 1..=64 << 20),
        }
    }

    fn key(&mut self, name: &str, vendor: Vendor, test_mode: bool) -> Secret {
        let (key, source) = self.lookup(name);
        let value = if key.is_empty() { "(not set)" } else { "***" };
        self.show(name, value.to_owned(), source);
        if key.is_empty() && !test_mode {
            self.errors.push(format!(
                "{name}: got nothing, want the key of {0}, which ANALYTICS_PROVIDER names (or TEST_MODE=true)",
                vendor.name()
            ));
        }
        if !key.chars().all(|c| c.is_ascii_graphic()) {
            self.errors
                .push(format!("{name}: got a key with a space or a special character, want the key alone"));
        }
        Secret::new(key)
    }

    fn base_url(&mut self, name: &str, vendor: Vendor) -> Url {
        let (text, source) = self.lookup(name);
        // A password in it must not be shown.
        let shown = if text.contains(['@', '?', '#']) { "***".to_owned() } else { text.clone() };
        self.show(name, shown.clone(), source);
        let host = vendor.hosts().iter().find(|(region, _)| *region == text);
        let url = host.map_or(text.as_str(), |(_, url)| *url);
        match url.parse() {
            Ok(url) if is_base_url(&url) => url,
            _ => {
                let regions: Vec<_> = vendor.hosts().iter().map(|(region, _)| *region).collect();
                let want =
                    format!("{}, or a URL with http or https and no user or query", regions.join(", "));
                self.wrong(name, &shown, &want);
                let (_, default) = vendor.hosts()[0];
                default.parse().expect("the vendors' own hosts are URLs")
            }
        }
    }

    fn identity_mode(&mut self) -> IdentityMode {
        let name = "MIXPANEL_IDENTITY_MODE";
        match self.text(name).as_str() {
            "simplified" => IdentityMode::Simplified,
            "original" => IdentityMode::Original,
            other => {
                self.wrong(name, other, "simplified or original");
                IdentityMode::default()
            }
        }
    }

    fn log_level(&mut self) -> String {
        let level = self.text("LOG_LEVEL");
        if let Err(want) = parse_level(&level) {
            self.wrong("LOG_LEVEL", &level, &want);
        }
        level
    }

    fn log_format(&mut self) -> LogFormat {
        match self.text("LOG_FORMAT").as_str() {
            "" => LogFormat::for_stdout(),
            "json" => LogFormat::Json,
            "pretty" => LogFormat::Pretty,
            other => {
                self.wrong("LOG_FORMAT", other, "json or pretty");
                LogFormat::Json
            }
        }
    }

    fn listen(&mut self, host: &str, port: &str) -> Listen {
        Listen { host: self.text(host), port: self.number(port, 0..=u16::MAX) }
    }

    fn tls(&mut self) -> Option<TlsFiles> {
        let mut file =
            |name| Some(PathBuf::from(self.text(name))).filter(|path| !path.as_os_str().is_empty());
        let [cert, key, client_ca] =
            ["GRPC_TLS_CERT_FILE", "GRPC_TLS_KEY_FILE", "GRPC_TLS_CLIENT_CA_FILE"].map(&mut file);
        match (cert, key) {
            (Some(cert), Some(key)) => return Some(TlsFiles { cert, key, client_ca }),
            // What was meant to be closed must not be open.
            (None, None) if client_ca.is_none() => {}
            (None, _) => self.wrong("GRPC_TLS_CERT_FILE", "", "a file, as other GRPC_TLS settings are set"),
            (_, None) => self.wrong("GRPC_TLS_KEY_FILE", "", "a file, as GRPC_TLS_CERT_FILE is set"),
        }
        None
    }

    fn flag(&mut self, name: &str) -> bool {
        match self.text(name).to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => true,
            "false" | "0" | "no" | "off" => false,
            other => {
                self.wrong(name, other, "true or false");
                false
            }
        }
    }

    fn seconds(&mut self, name: &str, range: RangeInclusive<f64>) -> Duration {
        Duration::from_secs_f64(self.number(name, range))
    }

    fn millis(&mut self, name: &str, range: RangeInclusive<u64>) -> Duration {
        Duration::from_millis(self.number(name, range))
    }

    fn number<T: FromStr + PartialOrd + Display + Copy>(
        &mut self,
        name: &str,
        range: RangeInclusive<T>,
    ) -> T {
        let text = self.text(name);
        match text.replace('_', "").parse() {
            Ok(number) if range.contains(&number) => number,
            _ => {
                self.wrong(name, &text, &format!("{} to {}", range.start(), range.end()));
                *range.start()
            }
        }
    }

    fn text(&mut self, name: &str) -> String {
        let (text, source) = self.lookup(name);
        self.show(name, text.clone(), source);
        text
    }

    /// The value of a setting: its own, for a provider's that of all providers,
    /// or the default.
    fn lookup(&self, name: &str) -> (String, Source) {
        let general = general(name);
        let (text, source) =
            self.set(name).or_else(|| self.set(general.name)).unwrap_or((general.default, Source::Default));
        (text.to_owned(), source)
    }

    /// A variable that is set to something.
    fn set(&self, name: &str) -> Option<(&str, Source)> {
        let (text, source) = self.vars.get(name)?;
        Some((text.trim(), *source)).filter(|(text, _)| !text.is_empty())
    }

    /// True for a provider's setting that only repeats that of all providers,
    /// which is shown, and found wrong, once.
    fn is_repeated(&self, name: &str) -> bool {
        general(name).name != name && self.set(name).is_none()
    }

    fn show(&mut self, name: &str, value: String, source: Source) {
        if !self.is_repeated(name) {
            self.shown.push(Shown { name: name.to_owned(), value, source });
        }
    }

    fn wrong(&mut self, name: &str, got: &str, want: &str) {
        if !self.is_repeated(name) {
            self.errors.push(format!("{name}: got {got:?}, want {want}"));
        }
    }
}

/// The entry of [`SETTINGS`] for a name, that of all providers for a provider's.
fn general(name: &str) -> &'static SettingInfo {
    let is_for = |info: &&SettingInfo| {
        let prefix = name.strip_suffix(info.name);
        info.name == name || info.per_provider && prefix.is_some_and(|prefix| prefix.ends_with('_'))
    };
    SETTINGS.iter().find(is_for).expect("every setting that is read is in SETTINGS")
}

/// Scheme, host, port and path, and nothing that could be a secret.
fn is_base_url(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none()
}

/// Names of all variables, those for one provider included.
pub fn known_names() -> impl Iterator<Item = String> {
    let prefixed = |info: &SettingInfo| {
        let name = info.name;
        let vendors = if info.per_provider { &Vendor::ALL[..] } else { &[] };
        vendors.iter().map(move |vendor| format!("{}_{name}", vendor.name().to_ascii_uppercase()))
    };
    SETTINGS.iter().flat_map(move |info| std::iter::once(info.name.to_owned()).chain(prefixed(info)))
}

fn is_known(name: &str) -> bool {
    known_names().any(|known| known == name)
}

/// A warning if a variable looks like one of ours and is none.
fn misspelling(name: &str) -> Option<String> {
    /// Letters that may differ.
    const DISTANCE_MAX: usize = 2;
    if is_known(name) {
        return None;
    }
    let upper = name.to_ascii_uppercase();
    let ours = Vendor::ALL
        .iter()
        .any(|vendor| upper.starts_with(&format!("{}_", vendor.name().to_ascii_uppercase())));
    // A short name is near to many, and to compare all would be most of a start.
    let may_be_near = |known: &String| ours || known.len().abs_diff(upper.len()) <= DISTANCE_MAX;
    let distance = |known: String| (strsim::damerau_levenshtein(&known, &upper), known);
    let near = known_names().filter(may_be_near).map(distance).min().filter(|_| ours || name.len() >= 8)?;
    (ours || near.0 <= DISTANCE_MAX)
        .then(|| format!("{name} is none of our settings; did you mean {}?", near.1))
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
        assert_eq!(config.grpc, Listen { host: "0.0.0.0".into(), port: 50054 });
        assert_eq!(config.providers.len(), 3);
        assert_eq!(config.delivery.batch_size, 50);
        assert_eq!(config.delivery.flush_interval, Duration::from_secs(10));
        assert_eq!(config.drain_timeout, Duration::from_secs(8));
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
        let attempts: Vec<_> = config.providers.iter().map(|p| p.delivery.retry_attempts_max).collect();
        assert_eq!(attempts, [7, 7, 2]);
        assert_eq!(config.providers[2].delivery.flush_interval, Duration::from_millis(250));
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

    #[test]
    fn a_misspelling_is_noticed_and_other_variables_are_not() {
        for (name, want) in [
            ("BACTH_SIZE", "BATCH_SIZE"),
            ("MIXPANEL_TOKEN", "MIXPANEL_"),
            ("grpc_prot", "GRPC_PORT"),
            ("SEGMENT_API_KEY", "SEGMENT_WRITE_KEY"),
        ] {
            let warning = misspelling(name).unwrap_or_else(|| panic!("{name}"));
            assert!(warning.contains(want) || name == "SEGMENT_API_KEY", "{warning}");
        }
        for name in ["PATH", "HOME", "CARGO_HOME", "BATCH_SIZE", "SEGMENT_BATCH_SIZE", "HOSTNAME", "LOGNAME"]
        {
            assert_eq!(misspelling(name), None);
        }
    }

    #[test]
    fn the_file_is_read_and_the_environment_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".env");
        std::fs::write(&path, "TEST_MODE=true\nBATCH_SIZE=10\nGRPC_PORT=1\n").unwrap();
        let environment = [("GRPC_PORT".into(), "2".into())];
        let config = Config::read(environment.into_iter(), &path).unwrap();
        assert_eq!((config.delivery.batch_size, config.grpc.port), (10, 2));
        let source = |name: &str| config.shown.iter().find(|shown| shown.name == name).unwrap().source;
        assert_eq!((source("BATCH_SIZE"), source("GRPC_PORT")), (Source::File, Source::Environment));
        std::fs::write(&path, "TEST_MODE=1\nwhat canary\nBATCH_SIZE=0\n").unwrap();
        let error = Config::read(std::iter::empty(), &path).unwrap_err().to_string();
        assert!(error.contains("cannot be read") && !error.contains("canary"), "{error}");
        assert!(error.contains("BATCH_SIZE") && !error.contains("MIXPANEL_API_KEY"), "{error}");
    }

    #[test]
    fn the_example_file_lists_every_setting_with_its_default() {
        let example = include_str!("../.env.example");
        for info in SETTINGS {
            let line = format!("{}={}", info.name, info.default);
            let found = example.lines().any(|found| found.trim_start_matches("# ") == line);
            assert!(found, "{line} is not in .env.example");
        }
        for line in example.lines().filter_map(|line| line.trim_start_matches("# ").split_once('=')) {
            let (name, _) = line;
            if name.chars().all(|c| c.is_ascii_uppercase() || c == '_') {
                assert!(is_known(name), "{name} in .env.example is no setting");
            }
        }
    }
}
