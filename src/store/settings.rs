//! What the environment says of the store.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use analytics_relay_providers::Secret;
use analytics_relay_store::sqlite;

use crate::{batch_worker::BatchRule, settings::Reader};

const URL: &str = "STORE_URL";
const CONNECTIONS_MAX: &str = "STORE_CONNECTIONS_MAX";
/// What writes, and what looks after the store, while every question has a connection.
const OTHER_CONNECTIONS: usize = 2;
const WANT: &str = "none, sqlite:<file> (a relative one lies in DATA_DIR), or postgres://<user>:<password>@<host>/<database>";
/// What `sqlite:` alone stands for.
const FILE: &str = "store.db";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Where the store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StorePlace {
    /// There is none, and it costs nothing.
    Nowhere,
    /// In one file; a relative one lies in the directory of the relay's files.
    File(PathBuf),
    /// In a PostgreSQL, whose URL holds its password.
    Postgres(Secret),
}

/// How events are kept and asked about.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// Where.
    pub place: StorePlace,
    /// What is older is not shown, and deleted within the hour. None: nothing is.
    pub retention: Option<Duration>,
    /// When a batch goes to the store. What is seen of now is as old as this.
    pub batch: BatchRule,
    /// Most bytes of memory of events that are in no block yet.
    pub hot_bytes_max: usize,
    /// So many of the last events are known by their ids alone, whatever their times.
    pub ids_max: usize,
    /// Questions that are answered at once.
    pub questions_max: usize,
    /// A question that takes longer is given up.
    pub question_timeout: Duration,
    /// Connections to a server.
    pub connections_max: usize,
}

impl StoreSettings {
    pub(crate) fn read(reader: &mut Reader, test_mode: bool) -> Self {
        let days: Option<u32> = reader.number_if_set("RETENTION_DAYS", 1..=36_500);
        let settings = Self {
            place: place(reader, test_mode),
            retention: days.map(|days| DAY * days),
            batch: BatchRule {
                events: reader.number("STORE_BATCH_SIZE", 1..=2000),
                interval: reader.seconds("STORE_FLUSH_INTERVAL_SECONDS", 0.01..=3600.0),
            },
            hot_bytes_max: reader.number("STORE_HOT_MAX_BYTES", 1 << 20..=1 << 36),
            ids_max: reader.number("STORE_IDS_MAX", 1_000..=100_000_000),
            questions_max: reader.number("STORE_QUESTIONS_MAX", 1..=64),
            question_timeout: reader.seconds("STORE_QUESTION_TIMEOUT_SECONDS", 0.1..=600.0),
            connections_max: reader.number(CONNECTIONS_MAX, 3..=1_000),
        };
        let least = settings.questions_max + OTHER_CONNECTIONS;
        if matches!(settings.place, StorePlace::Postgres(_)) && settings.connections_max < least {
            let got = settings.connections_max;
            reader.error(format!(
                "{CONNECTIONS_MAX}: got {got}, want at least {least}: two more than STORE_QUESTIONS_MAX"
            ));
        }
        settings
    }

    /// True if there is a store.
    pub fn is_on(&self) -> bool {
        self.place != StorePlace::Nowhere
    }

    /// The file, if it is one, of a relay that keeps its files there.
    pub(crate) fn file(&self, data_dir: &Path) -> Option<PathBuf> {
        match &self.place {
            StorePlace::File(path) => Some(data_dir.join(path)),
            StorePlace::Nowhere | StorePlace::Postgres(_) => None,
        }
    }

    /// Where it is, without what is nobody's business.
    pub(crate) fn shown(&self) -> String {
        match &self.place {
            StorePlace::Nowhere => "none".to_owned(),
            StorePlace::File(path) => format!("sqlite:{}", path.display()),
            StorePlace::Postgres(url) => shown(url.expose()),
        }
    }

    /// How the embedded store is opened.
    pub(super) fn embedded(&self, file: &Path) -> sqlite::Settings {
        sqlite::Settings {
            hot_bytes_max: self.hot_bytes_max,
            window: self.ids_max,
            readers: self.questions_max,
            deadline: self.question_timeout,
            ..sqlite::Settings::new(file)
        }
    }
}

/// In test mode there is a store unless it is said that there is none.
fn place(reader: &mut Reader, test_mode: bool) -> StorePlace {
    let (text, source) = reader.lookup(URL);
    let text = if text.is_empty() && test_mode { "sqlite:".to_owned() } else { text };
    reader.show(URL, shown(&text), source);
    match parse(&text) {
        Ok(place) => place,
        Err(why) => {
            reader.error(format!("{URL}: got {:?}{why}, want {WANT}", shown(&text)));
            StorePlace::Nowhere
        }
    }
}

fn parse(text: &str) -> Result<StorePlace, &'static str> {
    if matches!(text, "" | "none") {
        return Ok(StorePlace::Nowhere);
    }
    if text.starts_with("postgres://") || text.starts_with("postgresql://") {
        return Ok(StorePlace::Postgres(Secret::new(text)));
    }
    let path = text.strip_prefix("sqlite:").ok_or("")?;
    let path = path.strip_prefix("//").unwrap_or(path);
    match path {
        "" => Ok(StorePlace::File(FILE.into())),
        _ if path.contains('?') => Err(", which has parameters"),
        ":memory:" => Err(", which would be gone with the process"),
        _ if path.ends_with('/') || Path::new(path).file_name().is_none() => Err(", which is a directory"),
        path => Ok(StorePlace::File(path.into())),
    }
}

/// A URL without what is nobody's business: user, password and parameters.
fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return if url.contains('@') { "***".to_owned() } else { url.to_owned() };
    };
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    match rest.rsplit_once('@') {
        Some((_, place)) => format!("{scheme}://***@{place}"),
        None => format!("{scheme}://{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn read(vars: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        let vars = [("ANALYTICS_PROVIDER", "none")].iter().chain(vars).copied();
        Config::from_vars(vars).map_err(|error| error.0)
    }

    #[test]
    fn a_store_is_where_its_url_says_and_nowhere_without_one() {
        let file = |path: &str| StorePlace::File(path.into());
        for (url, want) in [
            ("", StorePlace::Nowhere),
            ("none", StorePlace::Nowhere),
            ("sqlite:", file("store.db")),
            ("sqlite:events.db", file("events.db")),
            ("sqlite:/var/lib/relay/events.db", file("/var/lib/relay/events.db")),
            ("sqlite:///var/lib/relay/events.db", file("/var/lib/relay/events.db")),
        ] {
            let settings = read(&[("STORE_URL", url)]).unwrap().store;
            assert_eq!(settings.place, want, "{url}");
        }
        let settings = read(&[("STORE_URL", "sqlite:events.db")]).unwrap().store;
        assert_eq!(settings.file(Path::new("/data")), Some("/data/events.db".into()));
        let absolute = read(&[("STORE_URL", "sqlite:/events.db")]).unwrap().store;
        assert_eq!(absolute.file(Path::new("/data")), Some("/events.db".into()));
    }

    #[test]
    fn in_test_mode_there_is_one_unless_it_is_said_that_there_is_none() {
        let place = |vars: &[(&str, &str)]| read(vars).unwrap().store.place;
        assert_eq!(place(&[("TEST_MODE", "1")]), StorePlace::File("store.db".into()));
        assert_eq!(place(&[("TEST_MODE", "1"), ("STORE_URL", "none")]), StorePlace::Nowhere);
        assert_eq!(place(&[]), StorePlace::Nowhere);
    }

    #[test]
    fn what_is_no_place_is_told_without_its_password() {
        for url in [
            "sqlite::memory:",
            "sqlite:store.db?mode=ro",
            "sqlite:/var/lib/relay/",
            "sqlite:..",
            "/var/lib/store.db",
            "mysql://user:canary@db.example/x",
            "user:canary@db.example",
            "redis://db.example/?password=canary",
        ] {
            let errors = read(&[("STORE_URL", url)]).unwrap_err();
            assert_eq!(errors.len(), 1, "{errors:?}");
            assert!(
                errors[0].starts_with("STORE_URL: got ") && errors[0].contains("want none"),
                "{errors:?}"
            );
            assert!(!errors[0].contains("canary"), "{errors:?}");
        }
        let config = read(&[("STORE_URL", "postgres://user:canary@db.example/x?sslmode=require")]).unwrap();
        let shown = config.shown.iter().find(|shown| shown.name == "STORE_URL").unwrap();
        assert_eq!(shown.value, "postgres://***@db.example/x");
        assert!(!format!("{config:?}").contains("canary"));
        assert_eq!(config.store.shown(), shown.value);
    }

    #[test]
    fn each_question_and_what_writes_has_a_connection() {
        let server = ("STORE_URL", "postgres://db.example/x");
        let errors = read(&[server, ("STORE_QUESTIONS_MAX", "7")]).unwrap_err();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].contains("STORE_CONNECTIONS_MAX: got 8, want at least 9"), "{errors:?}");
        assert_eq!(read(&[server, ("STORE_CONNECTIONS_MAX", "4")]).unwrap().store.connections_max, 4);
        assert!(read(&[("STORE_URL", "sqlite:"), ("STORE_QUESTIONS_MAX", "7")]).is_ok(), "a file has none");
    }

    /// Their names end as those of settings that each vendor may have of its own.
    #[test]
    fn the_stores_batches_are_its_own() {
        let config = read(&[("BATCH_SIZE", "7"), ("FLUSH_INTERVAL_SECONDS", "30")]).unwrap();
        assert_eq!((config.store.batch.events, config.store.batch.interval), (1000, Duration::from_secs(1)));
        let vars = [("STORE_FLUSH_INTERVAL_SECONDS", "0.5"), ("RETENTION_DAYS", "90")];
        let settings = read(&vars).unwrap().store;
        assert_eq!(
            (settings.batch.interval, settings.retention),
            (Duration::from_millis(500), Some(90 * DAY))
        );
    }
}
