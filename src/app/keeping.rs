//! Opens the store, if the settings name one, and closes it.

use tokio::time::{Instant, timeout_at};
use tracing::{error, warn};

use super::CLOSE_MIN;
use crate::{
    config::Config,
    store::{OpenError, OpenStore},
    telemetry::Telemetry,
    time::Clock,
};

/// Nothing, at no cost, where none is named.
pub(super) async fn open(
    config: &Config,
    telemetry: &mut Telemetry,
    clock: &Clock,
) -> Result<Option<OpenStore>, OpenError> {
    if !config.store.is_on() {
        return Ok(None);
    }
    if config.sealing.is_on() {
        warn!(
            "what is kept on disk is sealed, but of the store only what PRIVACY_FILE seals: keep that on an \
encrypted disk"
        );
    }
    let store = OpenStore::open(&config.store, &config.data_dir, telemetry.store(), clock.clone()).await?;
    Ok(Some(store))
}

/// What was committed is there, whether this ends in time or not.
pub(super) async fn close(store: Option<OpenStore>, deadline: Instant) {
    let Some(store) = store else { return };
    if timeout_at(deadline.max(Instant::now() + CLOSE_MIN), store.close()).await.is_err() {
        error!("the store could not be closed in time: it looks through its log at the next start");
    }
}
