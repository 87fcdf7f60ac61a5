//! How many bytes callers may make the relay hold before anything is admitted: over
//! all connections, for each peer and for each connection.
//!
//! Counted are messages from their head on, which tells their length, until their
//! events are in the queue, and the windows of HTTP/2, which are what a connection
//! may send that nobody has read yet.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use prometheus_client::metrics::counter::Counter;

use super::limits::BATCH_BYTES_MAX;
use crate::{
    admission::denied::Denied,
    listener::{Peer, Slot},
};

/// Least window of a connection: HTTP/2 begins with one of 64 KiB, and it cannot be
/// made smaller.
const WINDOW_BYTES_MIN: usize = 64 * 1024;
/// Largest one. A stream that is held back must not keep the others from being heard.
const WINDOW_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Part of the windows that are left which a new connection gets.
const WINDOW_SHARE: usize = 16;
/// Parts of all bytes that one peer, and one connection, may use.
const PEER_SHARE: usize = 2;
const CONNECTION_SHARE: usize = 8;
/// What a call costs that waits for its message, or is a stream, whatever it sends.
const CALL_BYTES: usize = 8 * 1024;

/// The budget of all connections, whichever door they came through.
#[derive(Debug)]
pub(crate) struct ReceiveBudget {
    bytes_max: usize,
    peers: Mutex<Peers>,
    /// Bytes of messages.
    messages: AtomicUsize,
    /// Bytes of windows.
    windows: AtomicUsize,
    refused: Counter,
}

impl ReceiveBudget {
    /// `refused` counts messages that found no room.
    pub(crate) fn new(bytes_max: usize, refused: Counter) -> Arc<Self> {
        Arc::new(Self {
            bytes_max,
            peers: Mutex::default(),
            messages: AtomicUsize::new(0),
            windows: AtomicUsize::new(0),
            refused,
        })
    }

    /// Bytes of messages that are being received.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.messages.load(Ordering::Relaxed)
    }

    /// What a new connection from this address may use.
    pub(crate) fn connection(self: &Arc<Self>, address: IpAddr, slot: Slot) -> Arc<Receiving> {
        let peer = Peer::key(address);
        let left = self.bytes_max.saturating_sub(self.windows.load(Ordering::Relaxed));
        let window = (left / WINDOW_SHARE).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
        self.windows.fetch_add(window, Ordering::Relaxed);
        // Everything that is not on this machine may come through one that is.
        let peer_bytes_max = if peer.is_loopback() { self.bytes_max } else { self.bytes_max / PEER_SHARE };
        Arc::new(Receiving {
            all: self.clone(),
            bytes: AtomicUsize::new(0),
            address: address.to_canonical(),
            bytes_max: (self.bytes_max / CONNECTION_SHARE).max(2 * BATCH_BYTES_MAX),
            peer_bytes: self.peers.lock().unwrap_or_else(PoisonError::into_inner).bytes_of(peer),
            peer_bytes_max,
            window,
            slot,
            calls: AtomicU64::new(0),
        })
    }
}

/// Bytes of messages that each peer is sending, for as long as it has connections.
#[derive(Debug, Default)]
struct Peers {
    bytes: HashMap<IpAddr, Weak<AtomicUsize>>,
    /// With so many entries those are removed that nobody has any more.
    swept_at: usize,
}

impl Peers {
    fn bytes_of(&mut self, peer: IpAddr) -> Arc<AtomicUsize> {
        const SWEPT_MIN: usize = 64;
        if self.bytes.len() >= self.swept_at {
            self.bytes.retain(|_, bytes| bytes.strong_count() > 0);
            self.swept_at = (2 * self.bytes.len()).max(SWEPT_MIN);
        }
        let known = self.bytes.get(&peer).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let bytes = Arc::new(AtomicUsize::new(0));
            self.bytes.insert(peer, Arc::downgrade(&bytes));
            bytes
        })
    }
}

/// One connection's part of the budget. Each of its calls holds it, so that it
/// tells whether there are any.
#[derive(Debug)]
pub(crate) struct Receiving {
    all: Arc<ReceiveBudget>,
    /// Where it comes from.
    address: IpAddr,
    bytes: AtomicUsize,
    bytes_max: usize,
    peer_bytes: Arc<AtomicUsize>,
    peer_bytes_max: usize,
    window: usize,
    slot: Slot,
    /// Calls so far.
    calls: AtomicU64,
}

impl Receiving {
    /// Bytes that the connection may have sent and nobody has read.
    pub(super) fn window(&self) -> u32 {
        u32::try_from(self.window).unwrap_or(u32::MAX)
    }

    /// Where it comes from.
    pub(super) fn address(&self) -> IpAddr {
        self.address
    }

    /// True if it was taken beyond the number of connections, for a probe.
    pub(super) fn is_spare(&self) -> bool {
        self.slot == Slot::Spare
    }

    /// A call's hold of the connection.
    pub(super) fn begin_call(self: &Arc<Self>) -> Arc<Self> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.clone()
    }

    /// Calls that were begun so far.
    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Holds what a call costs that waits.
    pub(super) fn hold_call(self: &Arc<Self>) -> Result<Held, Denied> {
        self.hold(CALL_BYTES)
    }

    /// Holds so many bytes of a message that is being received, if there is room for
    /// them in all three.
    pub(super) fn hold(self: &Arc<Self>, bytes: usize) -> Result<Held, Denied> {
        self.take(bytes)?;
        Ok(Held { of: self.clone(), bytes })
    }

    fn take(&self, bytes: usize) -> Result<(), Denied> {
        let levels = [
            (&self.bytes, self.bytes_max),
            (&*self.peer_bytes, self.peer_bytes_max),
            (&self.all.messages, self.all.bytes_max),
        ];
        for (place, (used, max)) in levels.iter().enumerate() {
            if used.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > *max {
                for (used, _) in &levels[..=place] {
                    used.fetch_sub(bytes, Ordering::Relaxed);
                }
                self.all.refused.inc();
                return Err(Denied::receiving_too_much());
            }
        }
        Ok(())
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.all.windows.fetch_sub(self.window, Ordering::Relaxed);
    }
}

/// Bytes that are held until this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    of: Arc<Receiving>,
    bytes: usize,
}

impl Held {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Holds so many more, if there is room for them.
    pub(super) fn grow(&mut self, bytes: usize) -> Result<(), Denied> {
        self.of.take(bytes)?;
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for used in [&self.of.bytes, &*self.of.peer_bytes, &self.of.all.messages] {
            used.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    fn connection(budget: &Arc<ReceiveBudget>, ip: &str) -> Arc<Receiving> {
        budget.connection(ip.parse().unwrap(), Slot::Regular)
    }

    #[test]
    fn a_connection_a_peer_and_all_have_their_part_and_get_it_back() {
        let refused = Counter::default();
        let budget = ReceiveBudget::new(64 * MIB, refused.clone());
        let of_peer: Vec<_> = (0..5).map(|_| connection(&budget, "203.0.113.9")).collect();
        let eight: Vec<_> = (0..8).map(|_| of_peer[0].hold(MIB).unwrap()).collect();
        assert!(of_peer[0].hold(1).is_err(), "of a connection");
        let more: Vec<_> = of_peer[1..4].iter().map(|receiving| receiving.hold(8 * MIB).unwrap()).collect();
        assert!(of_peer[4].hold(1).is_err(), "of a peer");
        let others: Vec<_> = (0..4).map(|at| connection(&budget, &format!("198.51.100.{at}"))).collect();
        let others: Vec<_> = others.iter().map(|receiving| receiving.hold(8 * MIB).unwrap()).collect();
        assert!(connection(&budget, "192.0.2.1").hold(1).is_err(), "of all");
        assert_eq!((refused.get(), budget.bytes()), (3, 64 * MIB));
        drop((eight, more, others));
        assert_eq!(budget.bytes(), 0);
        for host in 0..200_u8 {
            connection(&budget, &format!("198.51.100.{host}"));
        }
        let known = budget.peers.lock().unwrap().bytes.len();
        assert!(known < 100, "{known} are remembered of 201 that have gone");
        assert!(of_peer[4].hold(8 * MIB).is_ok());
    }

    /// What callers may send that nobody reads is bounded, however many there are.
    #[test]
    fn windows_become_smaller_as_connections_come() {
        let budget = ReceiveBudget::new(64 * MIB, Counter::default());
        let mut open: Vec<_> = (0..1000).map(|_| connection(&budget, "127.0.0.1")).collect();
        assert_eq!((open[0].window(), open[999].window()), (2 * 1024 * 1024, 64 * 1024));
        let total: usize = open.iter().map(|receiving| receiving.window).sum();
        assert!(total <= 64 * MIB + 1000 * WINDOW_BYTES_MIN, "{total}");
        open.clear();
        assert_eq!(connection(&budget, "127.0.0.1").window(), 2 * 1024 * 1024);
    }
}
