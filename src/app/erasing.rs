//! Keeps the relay to the list of erased users, and says to commands when it does.

use std::{io, sync::Arc, time::Duration};

use tokio::{task::spawn_blocking, time::sleep};
use tracing::{error, info, warn};

use crate::{delivery::lane::LaneStatus, privacy::suppression::Suppressed, refused::RefusedKeeper};

/// Between two looks at the list.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Looks again and again. While the list cannot be read, what was read last holds, and the
/// relay calls itself degraded.
pub(super) async fn keep_to(
    suppressed: Arc<Suppressed>,
    lanes: Vec<Arc<LaneStatus>>,
    refused: Arc<RefusedKeeper>,
) {
    let (mut told, mut failed, mut judged_before) = (None, false, 0);
    loop {
        let looking = suppressed.clone();
        // A disk that hangs keeps this task, and nobody else.
        let looked = spawn_blocking(move || looking.look()).await.map_err(io::Error::other).flatten();
        suppressed.set_unreadable(looked.is_err());
        match looked {
            Ok(true) => {
                judged_before = refused.begun();
                info!(generation = suppressed.generation(), "the list of erased users has changed");
            }
            Err(error) if !failed => {
                error!(%error, "the list of erased users cannot be read: the last one holds")
            }
            _ => {}
        }
        failed = suppressed.is_unreadable();
        let generation = suppressed.generation();
        let is_kept_to =
            lanes.iter().all(|lane| lane.keeps_to() >= generation) && refused.has_ended(judged_before);
        if told != Some(generation) && is_kept_to {
            let telling = suppressed.clone();
            let done = spawn_blocking(move || telling.tell_in_force(generation)).await;
            match done.map_err(io::Error::other).flatten() {
                Ok(()) => told = Some(generation),
                Err(error) => warn!(%error, "it cannot be told that erased users are left out"),
            }
        }
        sleep(LOOK_INTERVAL).await;
    }
}
