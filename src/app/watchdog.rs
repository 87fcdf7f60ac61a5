//! The thread that ends the process when nothing else does.
//!
//! The drain keeps to its deadline by timers, and these need the runtime: a
//! provider's code that blocks its threads stops them, and every other task. So
//! a thread that needs nothing waits beside it, from the first signal on.

use std::{
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use rustix::process::{Signal, getpid, kill_process};
use tracing::error;

use super::Accounts;
use crate::{
    shutdown::{DrainReport, FirstSignal},
    telemetry::say_on_stderr,
};

/// How long past the drain timeout the process may live.
pub(crate) const OVERTIME_MAX: Duration = Duration::from_secs(2);
/// The end of that time: to say what is known, on a machine that is busy too, and as much
/// to exit.
const LAST_WORDS_TIME: Duration = Duration::from_millis(450);
/// How long lines that were logged have to be written, behind what was said.
const LAST_LINES_TIME: Duration = Duration::from_millis(100);

/// Ends the process, unless it is dropped before.
#[derive(Debug)]
pub(crate) struct Watchdog {
    first: FirstSignal,
    over: Arc<AtomicBool>,
    failed: Arc<AtomicBool>,
}

impl Watchdog {
    /// Watches a relay that starts: nothing was accepted yet, nothing is lost.
    pub(crate) fn over_the_start(first: &FirstSignal, drain_timeout: Duration) -> Self {
        Self::start(first, drain_timeout, |_| {
            let text = "analytics-relay: asked to stop, and the start does not end\n";
            say_on_stderr(text.to_owned(), LAST_WORDS_TIME);
            1
        })
    }

    /// Watches a relay that runs, and whose events these accounts know.
    pub(super) fn over_the_run(first: &FirstSignal, drain_timeout: Duration, accounts: Accounts) -> Self {
        let asked = first.clone();
        Self::start(first, drain_timeout, move |failed| {
            let report = DrainReport { balances: accounts.balances(), took: asked.note().elapsed(), failed };
            let code = report.exit_code();
            // Whoever reads may hang, and so may what formats: not here.
            let (told, is_told) = mpsc::channel::<()>();
            let telling = thread::Builder::new().spawn(move || {
                let _told = told;
                let lost = report.lost();
                error!(lost, "the drain hangs: the process is ended");
                report.log_balances();
                let text =
                    format!("analytics-relay: the drain hangs: the process is ended, lost {lost}\n{report}");
                say_on_stderr(text, LAST_WORDS_TIME);
            });
            if telling.is_ok() {
                let _ = is_told.recv_timeout(LAST_WORDS_TIME);
                thread::sleep(LAST_LINES_TIME);
            }
            code
        })
    }

    /// `last_words` gets whether a stage has failed, gives the exit code, and
    /// takes no longer than its time.
    fn start(
        first: &FirstSignal,
        drain_timeout: Duration,
        last_words: impl FnOnce(bool) -> u8 + Send + 'static,
    ) -> Self {
        let watchdog = Self { first: first.clone(), over: Arc::default(), failed: Arc::default() };
        let (first, over, failed) = (first.clone(), watchdog.over.clone(), watchdog.failed.clone());
        let watching = thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
            let time = drain_timeout + OVERTIME_MAX - 2 * LAST_WORDS_TIME - LAST_LINES_TIME;
            if first.wait(time, || over.load(Ordering::Relaxed)) {
                end_process(last_words(failed.load(Ordering::Relaxed)));
            }
        });
        if let Err(error) = watching {
            error!(%error, "no thread for the watchdog: a drain that hangs has to be killed");
        }
        watchdog
    }

    /// A stage has failed: the process says so when it ends.
    pub(super) fn note_failure(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Watches until the process has ended.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.first.wake();
    }
}

/// Not even what others have hung into the exit of the process holds it up.
fn end_process(code: u8) -> ! {
    let _ = thread::Builder::new().spawn(|| {
        thread::sleep(LAST_WORDS_TIME);
        let _ = kill_process(getpid(), Signal::KILL);
    });
    process::exit(code.into())
}
