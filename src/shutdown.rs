//! How the relay is told to stop, and what it says when it has.

use std::{
    fmt, fs,
    future::pending,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
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

/// Tells every stage to stop: first to refuse, then to drain, later, perhaps, at once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    refusing: CancellationToken,
    draining: CancellationToken,
    forced: CancellationToken,
}

impl Stop {
    /// Callers are refused, and whoever asks is told so.
    pub(crate) fn refuse(&self) {
        self.refusing.cancel();
    }

    /// Nothing new comes in; what is here is delivered.
    pub(crate) fn drain(&self) {
        self.refuse();
        self.draining.cancel();
    }

    /// What is not delivered yet is put away.
    pub(crate) fn force(&self) {
        self.forced.cancel();
    }

    /// Waits for [`Stop::refuse`].
    pub(crate) async fn refusing(&self) {
        self.refusing.cancelled().await;
    }

    /// True from [`Stop::refuse`] on.
    pub(crate) fn is_refusing(&self) -> bool {
        self.refusing.is_cancelled()
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
        Self {
            refusing: self.refusing.child_token(),
            draining: self.draining.child_token(),
            forced: self.forced.child_token(),
        }
    }

    /// For the stage that drains first.
    pub(crate) fn drain_token(&self) -> CancellationToken {
        self.draining.clone()
    }
}

/// Signals that ask the relay to stop. The first means drain, the second means
/// now.
#[derive(Debug)]
pub struct Signals {
    each: mpsc::Receiver<()>,
    first: FirstSignal,
}

impl Signals {
    /// Waits for the next one; None if there will be none.
    pub async fn recv(&mut self) -> Option<()> {
        self.each.recv().await
    }

    pub(crate) fn first(&self) -> &FirstSignal {
        &self.first
    }
}

/// For a program that tells the relay by itself when to stop.
impl From<mpsc::Receiver<()>> for Signals {
    fn from(each: mpsc::Receiver<()>) -> Self {
        Self { each, first: FirstSignal::default() }
    }
}

/// SIGTERM, SIGINT, SIGHUP and SIGQUIT of this process. A SIGHUP that is ignored
/// already, as under `nohup`, stays ignored; what a shell ignores for everything that
/// it starts in the background does not.
///
/// A thread of its own waits for them, so that they are noticed even if every
/// thread of the runtime hangs.
pub fn signals() -> io::Result<Signals> {
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let mut kinds = {
        let _context = runtime.enter();
        (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            if is_ignored(SignalKind::hangup()) { None } else { Some(signal(SignalKind::hangup())?) },
            signal(SignalKind::quit())?,
        )
    };
    // Of more than two nobody learns more.
    let (sender, each) = mpsc::channel(2);
    let first = FirstSignal::default();
    let noting = first.clone();
    let waiting = async move {
        while !sender.is_closed() {
            let name = tokio::select! {
                _ = kinds.0.recv() => "SIGTERM",
                _ = kinds.1.recv() => "SIGINT",
                () = come(&mut kinds.2) => "SIGHUP",
                _ = kinds.3.recv() => "SIGQUIT",
            };
            noting.note();
            info!(signal = name, "shutdown signal received");
            let _ = sender.try_send(());
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(move || runtime.block_on(waiting))?;
    Ok(Signals { each, first })
}

/// Waits for a signal, for ever if it is ignored.
async fn come(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => pending().await,
    }
}

/// Whether a signal was ignored when this process began, as far as the system
/// says it: Linux does.
fn is_ignored(kind: SignalKind) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    is_in_mask(&status, kind.as_raw_value())
}

/// Whether a signal is in the mask `SigIgn`, whose lowest bit is signal 1.
fn is_in_mask(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (signal - 1)) != 0
}

/// When the relay was first asked to stop. Of threads and locks only, so that it
/// works when nothing else does.
#[derive(Debug, Clone, Default)]
pub(crate) struct FirstSignal(Arc<First>);

#[derive(Debug, Default)]
struct First {
    at: Mutex<Option<Instant>>,
    changed: Condvar,
}

impl FirstSignal {
    /// Notes that the relay is asked to stop; returns when it first was.
    pub(crate) fn note(&self) -> Instant {
        let at = *self.lock().get_or_insert_with(Instant::now);
        self.0.changed.notify_all();
        at
    }

    /// Looks anew at what threads wait for in [`FirstSignal::wait`].
    pub(crate) fn wake(&self) {
        // A waiting thread looks or sleeps, and is not in between.
        let at = self.lock();
        self.0.changed.notify_all();
        drop(at);
    }

    /// Blocks this thread until a time after the first signal; returns false if
    /// `is_over` before.
    pub(crate) fn wait(&self, after: Duration, is_over: impl Fn() -> bool) -> bool {
        let mut at = self.lock();
        loop {
            if is_over() {
                return false;
            }
            let left = at.map(|at| (at + after).saturating_duration_since(Instant::now()));
            let changed = &self.0.changed;
            at = match left {
                Some(Duration::ZERO) => return true,
                Some(left) => changed.wait_timeout(at, left).unwrap_or_else(PoisonError::into_inner).0,
                None => changed.wait(at).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.at.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

    /// Writes the balances and what they come to to the logs.
    pub(crate) fn log(&self) {
        self.log_balances();
        let (lost, took_ms) = (self.lost(), u64::try_from(self.took.as_millis()).unwrap_or(u64::MAX));
        if lost > 0 {
            error!(lost, took_ms, "drained, with losses");
        } else {
            info!(lost, took_ms, "drained");
        }
    }

    pub(crate) fn log_balances(&self) {
        for balance in &self.balances {
            info!(
                provider = balance.provider,
                accepted = balance.accepted,
                reloaded = balance.reloaded,
                delivered = balance.delivered,
                dead_lettered = balance.dead_lettered,
                spilled = balance.spilled,
                dropped = balance.dropped,
                not_for = balance.not_for,
                in_flight = balance.in_flight(),
                "balance"
            );
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
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn report(delivered: u64, failed: bool) -> DrainReport {
        let balance = Balance { provider: "mixpanel", accepted: 10, delivered, ..Balance::default() };
        DrainReport { balances: vec![balance], took: Duration::ZERO, failed }
    }

    #[test]
    fn a_thread_waits_from_the_first_signal_on_unless_it_is_over() {
        let (first, time) = (FirstSignal::default(), Duration::from_millis(50));
        let at = first.note();
        assert_eq!(first.note(), at, "a second one changes nothing");
        assert!(first.wait(time, || false) && at.elapsed() >= time);

        let never = FirstSignal::default();
        let over = Arc::new(AtomicBool::default());
        let (waiting, told) = (never.clone(), over.clone());
        let thread = thread::spawn(move || waiting.wait(Duration::ZERO, || told.load(Ordering::Relaxed)));
        over.store(true, Ordering::Relaxed);
        never.wake();
        assert!(!thread.join().unwrap());
    }

    #[test]
    fn an_ignored_signal_is_known_by_its_bit() {
        let status = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        let ignored: Vec<_> = (1..=64).filter(|signal| is_in_mask(status, *signal)).collect();
        assert_eq!(ignored, [1, 13]);
        assert!(!is_in_mask("", 1) && !is_in_mask("SigIgn:\tnonsense", 1));
    }

    #[test]
    fn the_exit_code_tells_a_loss_from_a_failure() {
        assert_eq!(report(10, false).exit_code(), 0);
        assert_eq!(report(10, true).exit_code(), 1);
        assert_eq!((report(7, false).lost(), report(7, false).exit_code()), (3, 2));
    }
}
