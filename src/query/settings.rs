//! What answering reads from the environment.

use std::time::Duration;

use analytics_relay_providers::Secret;

use crate::settings::Reader;

/// How questions are answered.
#[derive(Debug, Clone)]
pub struct QuerySettings {
    /// Where relays share answers, if they do.
    pub(crate) redis_url: Option<Secret>,
    /// Most questions that the store is asked at a time; each may take a core.
    pub(crate) at_once_max: usize,
    /// Longest time for an answer, waiting included.
    pub(crate) deadline: Duration,
}

impl QuerySettings {
    /// With as many questions at once, and as long a time of one, as the store has.
    pub(crate) fn read(reader: &mut Reader, at_once_max: usize, deadline: Duration) -> Self {
        Self { redis_url: redis_url(reader), at_once_max, deadline }
    }
}

#[cfg(any(test, fuzzing))]
impl Default for QuerySettings {
    fn default() -> Self {
        Self { redis_url: None, at_once_max: 2, deadline: Duration::from_secs(5) }
    }
}

fn redis_url(reader: &mut Reader) -> Option<Secret> {
    let text = reader.secret("REDIS_URL");
    if text.is_empty() {
        return None;
    }
    if let Err(want) = check_redis_url(&text) {
        // It may have a password in it.
        reader.error(format!("REDIS_URL: got ***, want {want}"));
    }
    Some(Secret::new(text))
}

#[cfg(feature = "redis")]
fn check_redis_url(text: &str) -> Result<(), &'static str> {
    let has_scheme = ["redis://", "rediss://"].iter().any(|scheme| text.starts_with(scheme));
    if has_scheme && redis::Client::open(text).is_ok() {
        return Ok(());
    }
    Err("redis://[user:password@]host[:port][/database], or rediss:// for TLS")
}

#[cfg(not(feature = "redis"))]
fn check_redis_url(_text: &str) -> Result<(), &'static str> {
    Err("nothing: this binary was built without the feature redis")
}

#[cfg(all(test, feature = "redis"))]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<QuerySettings, Vec<String>> {
        let vars: Vec<_> = vars.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let mut reader = Reader::new(vars.into_iter(), Path::new(""));
        let settings = QuerySettings::read(&mut reader, 2, Duration::from_secs(5));
        reader.finish().map(|_| settings).map_err(|error| error.0)
    }

    #[test]
    fn an_address_of_redis_is_one_and_its_password_is_never_told() {
        for url in ["canary", "http://canary@h:1", "redis://u:canary@h:port", "redis://", "unix:///canary"] {
            let errors = read(&[("REDIS_URL", url)]).unwrap_err();
            assert!(errors.len() == 1 && !errors[0].contains("canary"), "{url} {errors:?}");
        }
        for url in ["redis://localhost", "redis://u:canary@h:6380/2", "rediss://h"] {
            let settings = read(&[("REDIS_URL", url)]).unwrap();
            assert!(settings.redis_url.is_some() && !format!("{settings:?}").contains("canary"));
        }
    }
}
