//! How the relay is told to stop, and what it says when it has.

use std::{fmt, io, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::{ledger::Balance, settings::Reader};

/// What stopping is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopSettings {
    /// From the first signal to the exit.
    pub drain_timeout: Duration,
}

impl StopSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        Self { drain_timeout: reader.seconds("DRAIN_TIMEOUT_SECONDS", 0.1..=3600.0) }
    }
}

/// Tells every stage to stop: first to drain, later, perhaps, at once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    draining: CancellationToken,
    forced: CancellationToken,
}

impl Stop {
    /// Nothing new comes in; what is here is delivered.
    pub(crate) fn drain(&self) {
        self.draining.cancel();
    }

    /// What is not delivered yet is put away.
    pub(crate) fn force(&self) {
        self.forced.cancel();
    }

    /// Waits for [`Stop::drain`].
    pub(crate) async fn draining(&self) {
        self.draining.cancelled().await;
    }

    /// Waits for [`Stop::force`].
    pub(crate) async fn forced(&self) {
        self.forced.cancelled().await;
    }

    /// True from [`Stop::drain`] on.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// True from [`Stop::force`] on.
    pub(crate) fn is_forced(&self) -> bool {
        self.forced.is_cancelled()
    }

    /// One that stops with this one, and can be stopped alone.
    pub(crate) fn child(&self) -> Self {
        Self { draining: self.draining.child_token(), forced: self.forced.child_token() }
    }

    /// For the stage that drains first.
    pub(crate) fn drain_token(&self) -> CancellationToken {
        self.draining.clone()
    }
}

/// SIGTERM and SIGINT, one message each. The first means drain, the second
/// means now.
pub fn signals() -> io::Result<mpsc::Receiver<()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            info!(signal = name, "shutdown signal received");
            if sender.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// What the relay says when it has stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrainReport {
    /// One for each provider.
    pub balances: Vec<Balance>,
    /// From the signal to the end.
    pub took: Duration,
    /// A stage ended by itself: a defect, and the reason for stopping.
    pub failed: bool,
}

impl DrainReport {
    /// Copies of events, one for each provider, that are gone.
    pub fn lost(&self) -> u64 {
        self.balances.iter().map(Balance::lost).sum()
    }

    /// 0 if nothing was lost and nothing failed.
    pub fn exit_code(&self) -> u8 {
        match (self.lost(), self.failed) {
            (0, false) => 0,
            (0, true) => 1,
            _ => 2,
        }
    }

    /// Writes the balance to the logs.
    pub(crate) fn log(&self) {
        for balance in &self.balances {
            info!(
                provider = balance.provider,
                accepted = balance.accepted,
                reloaded = balance.reloaded,
                delivered = balance.delivered,
                dead_lettered = balance.dead_lettered,
                spilled = balance.spilled,
                dropped = balance.dropped,
                in_flight = balance.in_flight(),
                "balance"
            );
        }
        let (lost, took_ms) = (self.lost(), u64::try_from(self.took.as_millis()).unwrap_or(u64::MAX));
        if lost > 0 {
            error!(lost, took_ms, "drained, with losses");
        } else {
            info!(lost, took_ms, "drained");
        }
    }
}

impl fmt::Display for DrainReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for balance in &self.balances {
            writeln!(f, "{:<10} {balance}", balance.provider)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(delivered: u64, failed: bool) -> DrainReport {
        let balance = Balance { provider: "mixpanel", accepted: 10, delivered, ..Balance::default() };
        DrainReport { balances: vec![balance], took: Duration::ZERO, failed }
    }

    #[test]
    fn the_exit_code_tells_a_loss_from_a_failure() {
        assert_eq!(report(10, false).exit_code(), 0);
        assert_eq!(report(10, true).exit_code(), 1);
        assert_eq!((report(7, false).lost(), report(7, false).exit_code()), (3, 2));
    }
}
