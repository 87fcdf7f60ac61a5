//! One connection, as the requests on it know it.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::registry::Vendor;

/// What a connection's requests know of it.
#[derive(Default)]
pub(super) struct Line {
    reset: AtomicBool,
    /// A bit for each vendor that has had a request on it.
    vendors: AtomicU8,
}

impl Line {
    /// Has the connection end in a TCP RST instead of a FIN.
    pub(super) fn reset(&self) {
        self.reset.store(true, Ordering::Relaxed);
    }

    /// Whether it is to end so.
    pub(super) fn is_reset(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }

    /// Whether the vendor has not had a request on this connection before.
    pub(super) fn is_new_to(&self, vendor: Vendor) -> bool {
        let bit = 1 << vendor as u8;
        self.vendors.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }
}
