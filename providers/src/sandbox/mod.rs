//! A local server that speaks the wire contracts of Mixpanel, Amplitude and
//! Segment as strictly as they do, and misbehaves on demand.
//!
//! It judges the relay's mapping, so it shares no code with it: each vendor's
//! file here reads the vendor's rules a second time. What a vendor would refuse
//! is refused, what it would discard in silence is discarded in silence (and
//! counted), and what it would recognise as a repetition is recognised.
//!
//! All three vendors answer on one port, told apart by path:
//!
//! | path | vendor |
//! |---|---|
//! | `/import`, `/engage` | Mixpanel |
//! | `/batch`, `/2/httpapi` | Amplitude |
//! | `/v1/batch` | Segment |
//! | `/_sandbox/...` | none: the controls, for a sandbox in another process |
//!
//! The controls are `GET /_sandbox/stats`, `GET /_sandbox/taken?vendor=V`,
//! `GET /_sandbox/requests?vendor=V`, `POST /_sandbox/script?vendor=V` with one
//! [`Fault`] in text per line, `POST /_sandbox/always?vendor=V` with one fault or
//! `none`, and `POST /_sandbox/reset`.
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! # use analytics_relay_providers::sandbox::{Fault, Options, Sandbox, Vendor};
//! let sandbox = Sandbox::start(Options::default()).await?;
//! sandbox.script(Vendor::Segment, ["503".parse::<Fault>().expect("a fault"), Fault::ResetAfter]);
//! // ... send to sandbox.url() ...
//! assert!(sandbox.taken(Vendor::Segment).iter().all(|event| event.copies == 1));
//! # Ok(())
//! # }
//! ```

mod amplitude;
mod contract;
mod control;
mod fault;
mod line;
mod mixpanel;
mod record;
mod reply;
mod script;
mod segment;
mod serve;
mod service;
mod state;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::TcpListener;

pub use crate::registry::Vendor;
pub use fault::{Fault, ParseFaultError};
pub use record::{Seen, Stats, Taken, TakenKind};
pub use state::Options;

/// A running sandbox. Dropping it stops the server and closes its connections.
///
/// It keeps the first 2,000,000 events and 200,000 requests of each vendor. What
/// comes later is judged and counted, but not kept, and not recognised when it
/// comes again.
pub struct Sandbox {
    addr: SocketAddr,
    state: Arc<state::State>,
    running: Mutex<Option<serve::Running>>,
}

impl Sandbox {
    /// Binds the address and serves on the current tokio runtime.
    ///
    /// # Errors
    ///
    /// The address cannot be bound.
    pub async fn start(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind(options.addr).await?;
        let addr = listener.local_addr()?;
        let state = Arc::new(state::State::new(options));
        let running = serve::serve(listener, Arc::clone(&state));
        Ok(Self { addr, state, running: Mutex::new(Some(running)) })
    }

    /// The address bound.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The base URL for every vendor, as in `http://127.0.0.1:4321`.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Appends to the vendor's script: one fault for each request to come, in
    /// order of arrival. After the script, [`Sandbox::always`] applies.
    pub fn script(&self, vendor: Vendor, faults: impl IntoIterator<Item = Fault>) {
        self.state.desk(vendor).script.append(faults);
    }

    /// What every request gets that the script does not cover; None is normal
    /// behaviour.
    pub fn always(&self, vendor: Vendor, fault: Option<Fault>) {
        self.state.desk(vendor).script.always(fault);
    }

    /// The events taken, in order of first arrival.
    pub fn taken(&self, vendor: Vendor) -> Vec<Taken> {
        self.state.desk(vendor).record.taken()
    }

    /// The requests seen, in the order in which their bodies were complete.
    pub fn requests(&self, vendor: Vendor) -> Vec<Seen> {
        self.state.desk(vendor).record.requests()
    }

    /// The vendor's counters.
    pub fn stats(&self, vendor: Vendor) -> Stats {
        self.state.desk(vendor).record.stats()
    }

    /// Plays a provider that is down: refuses connections and drops the open
    /// ones. What has been recorded stays. Returns when the last one is closed.
    pub async fn go_down(&self) {
        let running = self.running().take();
        if let Some(running) = running {
            running.stop().await;
        }
    }

    /// Ends [`Sandbox::go_down`], on the same port. Does nothing if it is up.
    ///
    /// # Errors
    ///
    /// The port has been taken by somebody else in the meantime.
    pub async fn come_back(&self) -> io::Result<()> {
        if self.running().is_some() {
            return Ok(());
        }
        let listener = TcpListener::bind(self.addr).await?;
        *self.running() = Some(serve::serve(listener, Arc::clone(&self.state)));
        Ok(())
    }

    /// For a command line: serves until the future is dropped.
    pub async fn run_until_stopped(self) {
        std::future::pending().await
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Option<serve::Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sandbox").field("addr", &self.addr).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
