//! Connections: where to, how they are secured, and that none of them waits without a bound.

use std::{str::FromStr, time::Duration};

use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime, Timeouts};
use tokio::time::timeout;
use tokio_postgres::{Config, config::SslMode};

use super::{
    Settings, timescale,
    tls::{MakeTls, Trust},
};
use crate::StoreError;

/// So long a connection may take to be made, with all that belongs to it.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// So long is waited for one that is free.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// So long the other side may keep silent before it is asked whether it is there, and how
/// long it may take to say so.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// What holds in each session: a relay that is gone holds no lock for long, on either side;
/// who waited for a lock sees what was committed meanwhile; and what is acknowledged is on the
/// disk; whatever else the server is told.
pub(super) const SESSION: &str = "SET statement_timeout = '60s'; SET lock_timeout = '20s';
    SET idle_in_transaction_session_timeout = '60s'; SET tcp_keepalives_idle = 30;
    SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3; SET tcp_user_timeout = '30s';
    SET default_transaction_isolation = 'read committed'; SET client_min_messages = warning;
    SET TimeZone = 'UTC'; SET standard_conforming_strings = on; SET jit = off;
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";

/// From PostgreSQL 14 on, where its system has it, a server that is busy with a long statement
/// notices, too, that who asked is gone.
const NOTICE: &str = "SELECT set_config(name, '10s', false) FROM pg_settings
    WHERE name = 'client_connection_check_interval'";

/// Where to, and how it is secured, as a URL says it.
#[derive(Debug)]
struct Target {
    config: Config,
    trust: Trust,
}

/// Reads a URL: what tokio-postgres knows, and of libpq's names also `sslmode=verify-full`,
/// `sslmode=verify-ca` (which is taken for the former) and `sslrootcert`.
fn target(url: &str) -> Result<Target, StoreError> {
    let wrong = |why: String| StoreError::Refused(format!("the URL of the store: {why}"));
    let (place, query) = url.split_once('?').unwrap_or((url, ""));
    let (mut rest, mut mode, mut root) = (Vec::new(), None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("sslmode", value)) => mode = Some(value),
            Some(("sslrootcert", value)) => root = Some(value.replace("%2F", "/").replace("%2f", "/")),
            _ => rest.push(pair),
        }
    }
    let plain = if rest.is_empty() { place.to_owned() } else { format!("{place}?{}", rest.join("&")) };
    // The error names no part of the URL but the name of a parameter.
    let mut config = Config::from_str(&plain).map_err(|error| wrong(error.to_string()))?;
    let (mode, is_verified) = match mode {
        None | Some("prefer" | "allow") => (SslMode::Prefer, false),
        Some("disable") => (SslMode::Disable, false),
        // As libpq has it: with a root that is named, the certificate must be of it.
        Some("require") => (SslMode::Require, root.is_some()),
        Some("verify-full" | "verify-ca") => (SslMode::Require, true),
        Some(_) => {
            return Err(wrong("sslmode must be disable, prefer, require or verify-full".into()));
        }
    };
    config
        .ssl_mode(mode)
        .application_name("analytics-relay")
        .connect_timeout(CONNECT_TIME_MAX)
        .tcp_user_timeout(SILENCE_MAX)
        .keepalives(true)
        .keepalives_idle(SILENCE_MAX)
        .keepalives_interval(SILENCE_MAX / 3)
        .keepalives_retries(3);
    let trust = match (is_verified, root) {
        (false, _) => Trust::Anybody,
        (true, None) => Trust::System,
        (true, Some(file)) => Trust::Root(file.into()),
    };
    Ok(Target { config, trust })
}

/// The connections, none of which is made yet.
pub(super) fn pool(settings: &Settings) -> Result<Pool, StoreError> {
    let Target { config, trust } = target(&settings.url)?;
    let manager_config = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let manager = Manager::from_config(config, MakeTls::new(&trust)?, manager_config);
    let timeouts =
        Timeouts { wait: Some(WAIT_MAX), create: Some(CONNECT_TIME_MAX), recycle: Some(CONNECT_TIME_MAX) };
    let prepare = Hook::async_fn(|client, _| {
        Box::pin(async move {
            let prepared = async {
                let done = client.batch_execute(SESSION).await.map_err(HookError::Backend);
                // What no session depends on.
                let _ = client.batch_execute(NOTICE).await;
                let _ = client.batch_execute(timescale::SESSION).await;
                done
            };
            let late = |_| HookError::message("the server did not answer in time");
            timeout(CONNECT_TIME_MAX, prepared).await.map_err(late)?
        })
    });
    Pool::builder(manager)
        .max_size(settings.connections_max.max(settings.readers + 2))
        .runtime(Runtime::Tokio1)
        .timeouts(timeouts)
        .post_create(prepare)
        .build()
        .map_err(|error| StoreError::Refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_how_a_connection_is_secured() {
        for (url, mode, trust) in [
            ("postgres://u:p@h/d", SslMode::Prefer, Trust::Anybody),
            ("postgres://u:p@h/d?sslmode=disable", SslMode::Disable, Trust::Anybody),
            ("postgresql://h/d?connect_timeout=3&sslmode=require", SslMode::Require, Trust::Anybody),
            (
                "postgres://h/d?sslmode=require&sslrootcert=%2Fa.pem",
                SslMode::Require,
                Trust::Root("/a.pem".into()),
            ),
            ("postgres://h/d?sslmode=verify-full", SslMode::Require, Trust::System),
        ] {
            let target = target(url).unwrap();
            assert_eq!((target.config.get_ssl_mode(), &target.trust), (mode, &trust), "{url}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_url_is_told_without_its_password() {
        for url in ["postgres://u:secret@h/d?sslmode=perhaps", "postgres://u:secret@h:port/d", "nonsense"] {
            let error = target(url).unwrap_err();
            assert!(matches!(error, StoreError::Refused(_)), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }
}
