//! The queue in memory, bounded in events and in bytes. Full means refused at
//! once: it never waits and never grows.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::mpsc;

use super::{QueueLimits, Queued, Refused, Room};

/// Makes a queue.
pub(crate) fn bounded(limits: QueueLimits) -> (QueueSender, QueueReceiver) {
    let (sender, receiver) = mpsc::channel(limits.events_max);
    let (bytes, room) = (Arc::new(AtomicUsize::new(0)), Arc::new(Room::default()));
    let entrance = QueueSender { sender, bytes: bytes.clone(), room: room.clone(), limits };
    (entrance, QueueReceiver { receiver, bytes, room })
}

/// The queue's entrance.
#[derive(Debug, Clone)]
pub(crate) struct QueueSender {
    sender: mpsc::Sender<Queued>,
    bytes: Arc<AtomicUsize>,
    /// Told when events leave.
    room: Arc<Room>,
    limits: QueueLimits,
}

impl QueueSender {
    /// Puts an event in, or refuses it at once. Returns the events in the queue.
    pub(crate) fn offer(&self, event: Queued) -> Result<usize, Refused> {
        let event_bytes = event.event.memory_bytes();
        let before = self.bytes.fetch_add(event_bytes, Ordering::Relaxed);
        let offered = if before + event_bytes > self.limits.bytes_max {
            Err(if self.sender.is_closed() { Refused::Closed } else { Refused::Full })
        } else {
            self.sender.try_send(event).map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => Refused::Full,
                mpsc::error::TrySendError::Closed(_) => Refused::Closed,
            })
        };
        match offered {
            Ok(()) => Ok(self.events()),
            Err(refused) => {
                self.bytes.fetch_sub(event_bytes, Ordering::Relaxed);
                Err(refused)
            }
        }
    }

    /// See [`Queue::has_room_for`](super::Queue::has_room_for).
    pub(crate) fn has_room_for(&self, events: usize, bytes: usize) -> bool {
        !self.limits.is_full_for((self.events(), self.bytes()), (events, bytes))
    }

    /// Told when events leave.
    pub(crate) fn room(&self) -> &Room {
        &self.room
    }

    /// See [`Queue::room_for`](super::Queue::room_for). Does not wait for a queue
    /// that is closed.
    pub(crate) async fn room_for(&self, events: usize, bytes: usize) {
        let is_full = || !self.has_room_for(events, bytes);
        self.room.wait_while(|| is_full() && !self.sender.is_closed()).await;
    }

    /// Events in the queue.
    pub(crate) fn events(&self) -> usize {
        self.sender.max_capacity() - self.sender.capacity()
    }

    /// Bytes of memory that they hold.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How much the queue holds at most.
    pub(crate) fn limits(&self) -> QueueLimits {
        self.limits
    }
}

/// The queue's exit; held by the batch worker.
#[derive(Debug)]
pub(crate) struct QueueReceiver {
    receiver: mpsc::Receiver<Queued>,
    bytes: Arc<AtomicUsize>,
    room: Arc<Room>,
}

impl QueueReceiver {
    /// Waits for events and appends at most `events_max` of them. Returns their
    /// number; 0 when the queue is closed and empty. Losing the future loses no
    /// event.
    pub(crate) async fn recv_many(&mut self, events: &mut Vec<Queued>, events_max: usize) -> usize {
        let start = events.len();
        let received = self.receiver.recv_many(events, events_max).await;
        let freed = events[start..].iter().map(|queued| queued.event.memory_bytes()).sum();
        self.bytes.fetch_sub(freed, Ordering::Relaxed);
        self.room.changed();
        received
    }

    /// Closes the entrance: what is in the queue stays and can be received.
    pub(crate) fn close(&mut self) {
        self.receiver.close();
        self.room.changed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::test_support::queued;

    fn queue(events_max: usize, bytes_max: usize) -> (QueueSender, QueueReceiver) {
        bounded(QueueLimits { events_max, bytes_max })
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_takes_again_when_there_is_room() {
        let (sender, mut receiver) = queue(2, usize::MAX);
        assert_eq!(sender.offer(queued("a")), Ok(1));
        assert_eq!(sender.offer(queued("b")), Ok(2));
        assert_eq!(sender.offer(queued("c")), Err(Refused::Full));
        assert_eq!(receiver.recv_many(&mut Vec::new(), 1).await, 1);
        assert_eq!(sender.offer(queued("d")), Ok(2));
    }

    #[tokio::test]
    async fn bytes_are_a_limit_of_their_own_and_are_given_back() {
        let event = queued("a");
        let (sender, mut receiver) = queue(100, 2 * event.event.memory_bytes());
        sender.offer(event.clone()).unwrap();
        sender.offer(event.clone()).unwrap();
        assert_eq!(sender.offer(event.clone()), Err(Refused::Full));
        assert_eq!(sender.bytes(), 2 * event.event.memory_bytes());
        receiver.recv_many(&mut Vec::new(), 10).await;
        assert_eq!(sender.bytes(), 0);
        assert_eq!(sender.offer(event), Ok(1));
    }

    #[tokio::test]
    async fn who_waits_for_room_goes_on_when_there_is_some_or_never_will_be() {
        let event_bytes = queued("a").event.memory_bytes();
        // Full by events, then by bytes.
        for (events_max, bytes_max) in [(6, usize::MAX), (usize::MAX >> 4, 6 * event_bytes)] {
            let (sender, mut receiver) = queue(events_max, bytes_max);
            for _ in 0..4 {
                sender.room_for(100, 100 * event_bytes).await;
                sender.offer(queued("a")).unwrap();
            }
            let waiting = |events| {
                let sender = sender.clone();
                tokio::spawn(async move { sender.room_for(events, events * event_bytes).await })
            };
            sender.room_for(2, 2 * event_bytes).await;
            sender.offer(queued("a")).unwrap();
            let [two, three] = [waiting(2), waiting(3)];
            tokio::task::yield_now().await;
            assert!(!two.is_finished() && !three.is_finished());
            receiver.recv_many(&mut Vec::new(), 1).await;
            two.await.unwrap();
            assert!(!three.is_finished());
            receiver.close();
            three.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_closed_queue_refuses_and_keeps_what_it_holds() {
        let (sender, mut receiver) = queue(10, usize::MAX);
        sender.offer(queued("a")).unwrap();
        receiver.close();
        assert_eq!(sender.offer(queued("b")), Err(Refused::Closed));
        let mut events = Vec::new();
        assert_eq!(receiver.recv_many(&mut events, 10).await, 1);
        assert_eq!(receiver.recv_many(&mut events, 10).await, 0);
    }
}
