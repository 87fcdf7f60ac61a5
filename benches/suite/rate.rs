//! Events a second and what each costs, in the part of a run that counts.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// When in a run it is measured: after the warm-up, before the end.
const WINDOW: (Duration, Duration) = (Duration::from_millis(1200), Duration::from_millis(4600));

/// Events a second, and microseconds of CPU for each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    pub(crate) events: f64,
    pub(crate) cpu_micros: f64,
}

/// Events that came through, and the CPU that was used, up to a moment.
pub(crate) struct Usage {
    pub(crate) events: u64,
    pub(crate) cpu: Duration,
}

/// What happens in the part of a run that counts.
pub(crate) async fn window(usage: impl Fn() -> anyhow::Result<Usage>) -> anyhow::Result<Rate> {
    sleep(WINDOW.0).await;
    let (before, from) = (usage()?, Instant::now());
    sleep(WINDOW.1 - WINDOW.0).await;
    let after = usage()?;
    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    let events = (after.events - before.events) as f64;
    let cpu = (after.cpu - before.cpu).as_secs_f64();
    Ok(Rate { events: events / from.elapsed().as_secs_f64(), cpu_micros: cpu / events * 1e6 })
}
