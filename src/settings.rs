//! Where settings come from: the environment and the file `.env` → typed values.
//! The only reader of the environment.
//!
//! [`SETTINGS`] lists every variable; `.env.example` and a test follow it. A stage
//! takes its own out of the `Reader`, which knows no stage. What stands in the
//! environment wins over the file. Every bad setting is reported, not only the
//! first.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fmt::{self, Display},
    fs, io,
    ops::RangeInclusive,
    path::Path,
    str::FromStr,
    time::Duration,
};

use analytics_relay_providers::{Secret, registry::Vendor};

mod env_file;

use env_file::Assignment;

/// One variable.
#[derive(Debug, Clone, Copy)]
pub struct SettingInfo {
    /// Its name.
    pub name: &'static str,
    /// What holds when it is not set; empty if nothing does.
    pub default: &'static str,
    /// The providers for which it may be set alone, as in `SEGMENT_BATCH_SIZE`.
    pub providers: &'static [Vendor],
}

const fn setting(name: &'static str, default: &'static str) -> SettingInfo {
    SettingInfo { name, default, providers: &[] }
}

const fn per_provider(name: &'static str, default: &'static str) -> SettingInfo {
    SettingInfo { name, default, providers: &Vendor::ALL }
}

/// One that says nothing to Segment, which knows every kind of event.
const fn per_view(name: &'static str, default: &'static str) -> SettingInfo {
    SettingInfo { name, default, providers: &[Vendor::Mixpanel, Vendor::Amplitude] }
}

/// Every variable.
pub const SETTINGS: [SettingInfo; 91] = [
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
    per_view("PAGE_NAME", "Loaded a Page"),
    per_view("SCREEN_NAME", "Loaded a Screen"),
    per_view("GROUP_TYPE", ""),
    setting("GRPC_HOST", "[::]"),
    setting("GRPC_PORT", "50054"),
    setting("GRPC_MAX_CONNECTIONS", "1000"),
    setting("GRPC_MAX_CONNECTIONS_PER_PEER", ""),
    setting("GRPC_RECEIVE_MAX_BYTES", "67108864"),
    setting("GRPC_TLS_CERT_FILE", ""),
    setting("GRPC_TLS_KEY_FILE", ""),
    setting("GRPC_TLS_CLIENT_CA_FILE", ""),
    setting("HTTP_HOST", "[::]"),
    setting("HTTP_PORT", "8080"),
    setting("HTTP_WRITE_KEYS", ""),
    setting("HTTP_MAX_CONNECTIONS", "1000"),
    setting("HTTP_MAX_CONNECTIONS_PER_PEER", ""),
    setting("HTTP_TLS_CERT_FILE", ""),
    setting("HTTP_TLS_KEY_FILE", ""),
    setting("HTTP_TLS_CLIENT_CA_FILE", ""),
    setting("TRUSTED_PROXIES", ""),
    setting("CLIENT_IP_HEADER", ""),
    setting("FORWARDED_HEADER", "x-forwarded-for"),
    setting("COUNTRY_HEADER", ""),
    setting("IP_STORE", "default"),
    setting("GEO_DATABASE", ""),
    setting("ENRICH", "all"),
    setting("BOTS", "mark"),
    setting("RESPECT_GPC", "anonymous"),
    setting("SESSION_TIMEOUT_MINUTES", "30"),
    setting("SESSIONS_MAX", "200000"),
    setting("SESSION_SECRET", ""),
    setting("TIME_ZONE", "UTC"),
    setting("INPUT_RULES", "lenient"),
    setting("INPUT_SUSPICIOUS", "off"),
    setting("URL_QUERY", "allow"),
    setting("CLICK_IDS", "name"),
    setting("SITE_DOMAINS", ""),
    setting("SOURCES_FILE", ""),
    setting("METRICS_HOST", "[::]"),
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
    setting("PRIVACY_FILE", ""),
    setting("PRIVACY_HASH_KEY", ""),
    setting("PII_MODE", "detect"),
    setting("DURABILITY", "memory"),
    setting("SPOOL_DIR", ""),
    per_provider("SPOOL_MAX_BYTES", "10737418240"),
    setting("SPOOL_SEGMENT_BYTES", "67108864"),
    setting("SPOOL_RETENTION_HOURS", "72"),
    setting("SPOOL_WHEN_FULL", "dead_letter_oldest"),
    setting("SPOOL_GROUP_WINDOW_MS", "2"),
    setting("SPOOL_GROUP_BYTES", "1048576"),
    setting("UA_REGEXES", ""),
    setting("UA_DEVICE", "class"),
    setting("BOT_LIST", ""),
    setting("STORE_URL", ""),
    setting("RETENTION_DAYS", ""),
    setting("STORE_BATCH_SIZE", "1000"),
    setting("STORE_FLUSH_INTERVAL_SECONDS", "1"),
    setting("STORE_HOT_MAX_BYTES", "67108864"),
    setting("STORE_IDS_MAX", "1000000"),
    setting("STORE_QUESTIONS_MAX", "2"),
    setting("STORE_QUESTION_TIMEOUT_SECONDS", "5"),
    setting("STORE_CONNECTIONS_MAX", "8"),
    setting("READ_KEYS", ""),
    setting("REDIS_URL", ""),
    setting("RELAY_KEK", ""),
    setting("RELAY_KEK_FILE", ""),
    setting("RELAY_KEK_COMMAND", ""),
];

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

/// Reads settings one by one, and keeps what is wrong with them and what is to be
/// shown, in the order in which they are asked for.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    vars: BTreeMap<String, (String, Source)>,
    shown: Vec<Shown>,
    errors: Vec<String>,
    warnings: Vec<String>,
}

impl Reader {
    /// A reader of the variables and of the file, if it is there; an empty path is
    /// no file.
    pub(crate) fn new(vars: impl Iterator<Item = (OsString, OsString)>, file: &Path) -> Self {
        let mut reader = Self::default();
        reader.take_file(file);
        reader.take_environment(vars);
        reader
    }

    /// What was read, as it is shown, and what looks wrong and is none of ours; or
    /// everything that is wrong.
    pub(crate) fn finish(mut self) -> Result<(Vec<Shown>, Vec<String>), ConfigError> {
        let vars = self.vars.keys().filter(|name| !self.is_of_service(name));
        let misspelled: Vec<_> = vars.filter_map(|name| misspelling(name)).collect();
        self.warnings.extend(misspelled);
        if self.errors.is_empty() {
            return Ok((self.shown, self.warnings));
        }
        // A misspelled name may be why another one is not set.
        self.errors.extend(self.warnings);
        Err(ConfigError(self.errors))
    }

    fn take_file(&mut self, path: &Path) {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return self.errors.push(format!("{}: cannot be read: {error}", path.display())),
        };
        let path = path.display();
        if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
            return self.errors.push(format!("{path}: got UTF-16, want UTF-8"));
        }
        for Assignment { line, name, value } in env_file::parse(&bytes) {
            match value {
                Ok(value) => {
                    self.vars.insert(name, (value, Source::File));
                }
                Err(problem) if name.is_empty() => self.errors.push(format!("{path} line {line}: {problem}")),
                Err(problem) if is_known(&name) => {
                    self.errors.push(format!("{path} line {line}: {name}: {problem}"));
                }
                // The file may be another program's too, but a misspelling is told.
                Err(_) => {
                    self.vars.insert(name, (String::new(), Source::File));
                }
            }
        }
    }

    fn take_environment(&mut self, vars: impl Iterator<Item = (OsString, OsString)>) {
        for (name, value) in vars {
            // A name that is not UTF-8 is none of ours.
            let Ok(name) = name.into_string() else { continue };
            match value.into_string() {
                Ok(value) if is_known(&name) && is_service_link(&name, &value) => {
                    self.warnings.push(format!(
                        "{name}={value} is ignored: Kubernetes sets it for a Service of that name; set {name} \
in the container's env, or enableServiceLinks: false in the pod's spec"
                    ));
                }
                Ok(value) => {
                    // A key in quotes is an error of its own.
                    if is_known(&name) && !name.ends_with("_KEY") && is_in_quotes(&value) {
                        self.warnings.push(format!(
                            "{name}: its value is in quotes, and they are part of it; docker's --env-file keeps \
quotes as they are: leave them out there"
                        ));
                    }
                    self.vars.insert(name, (value, Source::Environment));
                }
                Err(_) if is_known(&name) => {
                    self.errors.push(format!("{name}: got bytes that are not UTF-8, want text"));
                }
                Err(_) => {}
            }
        }
    }

    /// Whether a variable is one of those that Kubernetes sets for each Service, here
    /// for one that is named as a vendor is.
    fn is_of_service(&self, name: &str) -> bool {
        let ends = ["_SERVICE_", "_PORT"];
        let service = ends.iter().find_map(|end| Some(name.split_once(end)?.0));
        service.is_some_and(|service| self.vars.contains_key(&format!("{service}_SERVICE_HOST")))
    }

    /// Yes or no.
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        match self.text(name).to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => true,
            "false" | "0" | "no" | "off" => false,
            other => {
                self.wrong(name, other, "true or false");
                false
            }
        }
    }

    /// One of some names, by what it stands for; the first if it is none of them. An
    /// empty name stands for nothing that was set.
    pub(crate) fn one_of<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> T {
        let text = self.text(name);
        if let Some((_, value)) = choices.iter().find(|(choice, _)| *choice == text) {
            return *value;
        }
        let names: Vec<_> =
            choices.iter().map(|(choice, _)| *choice).filter(|name| !name.is_empty()).collect();
        let (last, others) = names.split_last().expect("there is a choice");
        self.wrong(name, &text, &format!("{} or {last}", others.join(", ")));
        choices[0].1
    }

    /// A time in seconds.
    pub(crate) fn seconds(&mut self, name: &str, range: RangeInclusive<f64>) -> Duration {
        Duration::from_secs_f64(self.number(name, range))
    }

    /// A time in whole milliseconds.
    pub(crate) fn millis(&mut self, name: &str, range: RangeInclusive<u64>) -> Duration {
        Duration::from_millis(self.number(name, range))
    }

    /// A number that has no default.
    pub(crate) fn number_if_set<T: FromStr + PartialOrd + Display + Copy>(
        &mut self,
        name: &str,
        range: RangeInclusive<T>,
    ) -> Option<T> {
        if self.lookup(name).0.is_empty() {
            self.text(name);
            return None;
        }
        Some(self.number(name, range))
    }

    /// A number, the lowest of the range if it is none of it.
    pub(crate) fn number<T: FromStr + PartialOrd + Display + Copy>(
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

    /// A text as it is; empty if there is none.
    pub(crate) fn text(&mut self, name: &str) -> String {
        let (text, source) = self.lookup(name);
        self.show(name, text.clone(), source);
        text
    }

    /// A text that nobody may see.
    pub(crate) fn secret(&mut self, name: &str) -> String {
        let (text, source) = self.lookup(name);
        let shown = if text.is_empty() { "(not set)" } else { "***" };
        self.show(name, shown.to_owned(), source);
        text
    }

    /// The value of a setting: its own, for a provider's that of all providers,
    /// or the default.
    pub(crate) fn lookup(&self, name: &str) -> (String, Source) {
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
    pub(crate) fn is_repeated(&self, name: &str) -> bool {
        general(name).name != name && self.set(name).is_none()
    }

    /// True if a setting was read and is shown.
    pub(crate) fn has_shown(&self, name: &str) -> bool {
        self.shown.iter().any(|shown| shown.name == name)
    }

    /// Shows a value that [`Reader::lookup`] got, masked if it is a secret.
    pub(crate) fn show(&mut self, name: &str, value: String, source: Source) {
        if !self.is_repeated(name) {
            self.shown.push(Shown { name: name.to_owned(), value, source });
        }
    }

    /// Tells that what came is not what is wanted.
    pub(crate) fn wrong(&mut self, name: &str, got: &str, want: &str) {
        if !self.is_repeated(name) {
            self.errors.push(format!("{name}: got {got:?}, want {want}"));
        }
    }

    /// Tells what is wrong, in the stage's own words: variable, got, want.
    pub(crate) fn error(&mut self, error: String) {
        self.errors.push(error);
    }
}

/// The secret that a file of ours names as `env:NAME` or `file:PATH`, so that it need not
/// stand there itself. No error tells any of it.
pub(crate) fn secret_at(place: &str) -> Result<Secret, String> {
    let (kind, name) = place.split_once(':').unwrap_or_default();
    let read = match kind {
        "env" => env::var(name).map_err(|_| format!("{name} is not set in the environment")),
        "file" => fs::read_to_string(name).map_err(|error| format!("{name} cannot be read: {error}")),
        _ => Err("got what says no place (***), want env:NAME or file:PATH".to_owned()),
    };
    match read?.trim() {
        "" => Err(format!("{name} is empty, want a secret")),
        secret => Ok(Secret::new(secret)),
    }
}

/// The name of a setting of one provider, or of all.
pub(crate) fn name_for(vendor: Option<Vendor>, setting: &str) -> String {
    vendor.map_or(setting.to_owned(), |vendor| format!("{}_{setting}", vendor.name().to_ascii_uppercase()))
}

/// The entry of [`SETTINGS`] for a name, that of all providers for a provider's.
fn general(name: &str) -> &'static SettingInfo {
    let is_for = |info: &&SettingInfo| {
        let prefix = name.strip_suffix(info.name);
        !info.providers.is_empty() && prefix.is_some_and(|prefix| prefix.ends_with('_'))
    };
    let own = SETTINGS.iter().find(|info| info.name == name);
    own.or_else(|| SETTINGS.iter().find(is_for)).expect("every setting that is read is in SETTINGS")
}

/// Names of all variables, those for one provider included.
pub fn known_names() -> impl Iterator<Item = String> {
    let prefixed = |info: &SettingInfo| {
        let name = info.name;
        info.providers.iter().map(move |vendor| format!("{}_{name}", vendor.name().to_ascii_uppercase()))
    };
    SETTINGS.iter().flat_map(move |info| std::iter::once(info.name.to_owned()).chain(prefixed(info)))
}

fn is_known(name: &str) -> bool {
    known_names().any(|known| known == name)
}

/// Whether a port is what Kubernetes puts into each container for a Service: there
/// is no port of ours that would look like that.
fn is_service_link(name: &str, value: &str) -> bool {
    let has_scheme = ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.trim().starts_with(scheme));
    name.ends_with("_PORT") && has_scheme
}

fn is_in_quotes(value: &str) -> bool {
    let inner = |quote| value.trim().strip_prefix(quote)?.strip_suffix(quote);
    inner('"').or_else(|| inner('\'')).is_some()
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
    fn a_secret_is_read_where_it_is_and_no_error_tells_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), " s3cr3t-key\n").unwrap();
        let place = format!("file:{}", file.path().display());
        assert_eq!(secret_at(&place).unwrap().expose(), "s3cr3t-key");
        fs::write(file.path(), "\n").unwrap();
        for (place, want) in [
            (place.as_str(), "is empty"),
            ("file:/nowhere/at/all", "cannot be read"),
            ("env:RELAY_TEST_NOT_SET", "RELAY_TEST_NOT_SET is not set"),
            ("s3cr3t", "(***)"),
            ("", "want env:NAME or file:PATH"),
        ] {
            let error = secret_at(place).unwrap_err();
            assert!(error.contains(want) && !error.contains("s3cr3t"), "{error}");
        }
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
