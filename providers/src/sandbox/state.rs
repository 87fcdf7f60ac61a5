//! What the sandbox's connections share: one desk a vendor.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fault::Fault;
use super::record::Record;
use super::script::Script;
use crate::registry::Vendor;

/// How to start a [`Sandbox`](super::Sandbox).
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen; port 0 takes any free one.
    pub addr: SocketAddr,
    /// The one key all three vendors accept. Any other gets what the vendor makes of a
    /// wrong key, which at Segment and at Mixpanel's `/engage` is a success.
    pub key: String,
    /// Keep the text of requests in [`Seen::body`](super::Seen::body), up to 256 MiB a vendor.
    pub keep_bodies: bool,
    /// Seeds the dice of [`Fault::Percent`], so that a run can be repeated.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            key: "sandbox-key".to_owned(),
            keep_bodies: true,
            seed: 0x5EED_CAFE,
        }
    }
}

/// Shared by all connections, and by the [`Sandbox`](super::Sandbox) itself.
pub(super) struct State {
    pub(super) options: Options,
    started: Instant,
    desks: [Mutex<Desk>; 3],
}

/// A vendor's plan and its memory.
pub(super) struct Desk {
    pub(super) script: Script,
    pub(super) record: Record,
    in_flight: u64,
}

impl State {
    pub(super) fn new(options: Options) -> Self {
        let desks = Vendor::ALL.map(|vendor| {
            let script = Script::new(options.seed.wrapping_add(vendor as u64));
            Mutex::new(Desk { script, record: Record::default(), in_flight: 0 })
        });
        Self { options, started: Instant::now(), desks }
    }

    /// The vendor's desk, locked: hold it for no longer than a statement.
    pub(super) fn desk(&self, vendor: Vendor) -> MutexGuard<'_, Desk> {
        self.desks[vendor as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// A request's head is in: counts it and draws its fault. Faults are dealt
    /// here rather than when the body is complete, so that concurrent requests
    /// cannot overtake each other in the script.
    pub(super) fn arrive(
        self: &Arc<Self>,
        vendor: Vendor,
        new_connection: bool,
    ) -> (Option<Fault>, InFlight) {
        let mut desk = self.desk(vendor);
        desk.in_flight += 1;
        let in_flight = desk.in_flight;
        desk.record.arrived(in_flight, new_connection);
        let fault = desk.script.next();
        drop(desk);
        (fault, InFlight { state: Arc::clone(self), vendor })
    }

    /// Back to the state after the start, except for requests in progress.
    pub(super) fn reset(&self) {
        for vendor in Vendor::ALL {
            let mut desk = self.desk(vendor);
            desk.script = Script::new(self.options.seed.wrapping_add(vendor as u64));
            desk.record.reset();
        }
    }
}

/// A request in progress: lives until its answer has been sent or dropped.
pub(super) struct InFlight {
    state: Arc<State>,
    vendor: Vendor,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.state.desk(self.vendor).in_flight -= 1;
    }
}
