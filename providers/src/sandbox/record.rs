//! What a vendor remembers: events taken, requests seen, counters.

use std::collections::HashMap;

use serde::Serialize;

const TAKEN_MAX: usize = 2_000_000;
const SEEN_MAX: usize = 200_000;
const BODIES_MAX_BYTES: usize = 256 * 1024 * 1024;

/// One event a vendor took, however often it arrived.
#[derive(Debug, Clone, Serialize)]
pub struct Taken {
    /// `$insert_id`, `insert_id` or `messageId`. Empty for a Mixpanel profile
    /// update, which has none, and for an Amplitude event sent without one.
    pub id: String,
    /// What the event is.
    pub kind: TakenKind,
    /// Whose it is: `distinct_id`; `user_id`, else `device_id`; `userId`, else
    /// `anonymousId`.
    pub user: String,
    /// The event's name; empty for an identify. A group's id, and an alias's previous one.
    pub name: String,
    /// The event as it was received the first time.
    pub event: serde_json::Value,
    /// How many times it arrived and was accepted; 1 is once.
    pub copies: u32,
}

/// What a [`Taken`] event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TakenKind {
    /// Something somebody did.
    Track,
    /// A change to what is known of a user. One record of Mixpanel's `/engage`
    /// is one of these, so an identify that sets and unsets makes two.
    Identify,
    /// A page that was seen.
    Page,
    /// A screen that was seen.
    Screen,
    /// A user's group, and what is known of it. At Amplitude only the latter: that a user
    /// belongs to it is an identify. One record of Mixpanel's `/groups` is one of these.
    Group,
    /// A user's other id.
    Alias,
}

/// One request a vendor saw, whatever came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Seen {
    /// The path, without the query.
    pub path: String,
    /// The status of the answer. None: no answer was begun, because the
    /// connection was cut or the client gave up first.
    pub status: Option<u16>,
    /// Events in the request; 0 if the request could not be read that far.
    pub events: usize,
    /// Size of the body after decompression.
    pub body_bytes: usize,
    /// When the head arrived, since the sandbox started.
    pub at_ms: u64,
    /// The fault in force for this request, as text. For one of
    /// [`Fault::Percent`](super::Fault::Percent) that struck, the fault inside it.
    pub fault: Option<String>,
    /// The body after decompression, if [`Options::keep_bodies`](super::Options::keep_bodies).
    pub body: Option<String>,
}

/// A vendor's counters since the start or the last reset.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stats {
    /// Requests that arrived with their head complete.
    pub requests: u64,
    /// Different events taken.
    pub taken: u64,
    /// Arrivals of an event that had been taken before.
    pub duplicates: u64,
    /// Events refused or discarded one by one. The events of a request refused
    /// as a whole are in none of these counters.
    pub rejected: u64,
    /// The most requests that were in progress at the same time, from their
    /// head to the end of the answer.
    pub in_flight_max: u64,
    /// Connections that carried at least one request for this vendor.
    pub connections: u64,
}

/// One event that passed its vendor's rules.
pub(super) struct Arrival {
    /// What the vendor recognises a repetition by; None if it never does.
    pub(super) dedup_key: Option<String>,
    pub(super) id: String,
    pub(super) kind: TakenKind,
    pub(super) user: String,
    pub(super) name: String,
    /// The event's JSON as received. Kept as text because parsed JSON takes
    /// several times the memory.
    pub(super) event: Box<str>,
}

/// The memory of one vendor.
#[derive(Default)]
pub(super) struct Record {
    taken: Vec<(Arrival, u32)>,
    /// Dedup key to the position in `taken`.
    positions: HashMap<String, usize>,
    seen: Vec<Seen>,
    bodies_bytes: usize,
    stats: Stats,
    /// Counts resets, so that a request begun before one leaves no trace after.
    generation: u32,
}

/// Names a request in the record, to complete it once it has been answered.
#[derive(Clone, Copy)]
pub(super) struct Ticket {
    position: usize,
    generation: u32,
}

impl Record {
    /// Counts a request whose head is in.
    pub(super) fn arrived(&mut self, in_flight: u64, new_connection: bool) {
        self.stats.requests += 1;
        self.stats.connections += u64::from(new_connection);
        self.stats.in_flight_max = self.stats.in_flight_max.max(in_flight);
    }

    /// Notes a request whose body is in.
    pub(super) fn see(&mut self, mut seen: Seen) -> Ticket {
        let ticket = Ticket { position: self.seen.len(), generation: self.generation };
        if self.seen.len() < SEEN_MAX {
            let body_bytes = seen.body.as_ref().map_or(0, String::len);
            if self.bodies_bytes + body_bytes > BODIES_MAX_BYTES {
                seen.body = None;
            } else {
                self.bodies_bytes += body_bytes;
            }
            self.seen.push(seen);
        }
        ticket
    }

    /// The request of this ticket is being answered with `status`.
    pub(super) fn answered(&mut self, ticket: Ticket, status: u16) {
        if ticket.generation == self.generation
            && let Some(seen) = self.seen.get_mut(ticket.position)
        {
            seen.status = Some(status);
        }
    }

    /// Takes events, or counts another copy of those known.
    pub(super) fn take(&mut self, arrivals: Vec<Arrival>, rejected: u64) {
        self.stats.rejected += rejected;
        for mut arrival in arrivals {
            let known = arrival.dedup_key.as_ref().and_then(|key| self.positions.get(key));
            if let Some(&position) = known {
                let copies = &mut self.taken[position].1;
                *copies = copies.saturating_add(1);
                self.stats.duplicates += 1;
                continue;
            }
            self.stats.taken += 1;
            if self.taken.len() < TAKEN_MAX {
                if let Some(key) = arrival.dedup_key.take() {
                    self.positions.insert(key, self.taken.len());
                }
                self.taken.push((arrival, 1));
            }
        }
    }

    pub(super) fn taken(&self) -> Vec<Taken> {
        self.taken
            .iter()
            .map(|(arrival, copies)| Taken {
                id: arrival.id.clone(),
                kind: arrival.kind,
                user: arrival.user.clone(),
                name: arrival.name.clone(),
                event: serde_json::from_str(&arrival.event).expect("it was parsed before it was taken"),
                copies: *copies,
            })
            .collect()
    }

    pub(super) fn requests(&self) -> Vec<Seen> {
        self.seen.clone()
    }

    pub(super) fn stats(&self) -> Stats {
        self.stats.clone()
    }

    pub(super) fn reset(&mut self) {
        *self = Self { generation: self.generation.wrapping_add(1), ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(key: Option<&str>) -> Arrival {
        Arrival {
            dedup_key: key.map(str::to_owned),
            id: key.unwrap_or_default().to_owned(),
            kind: TakenKind::Track,
            user: "user-1".to_owned(),
            name: "Order Placed".to_owned(),
            event: r#"{"a":1}"#.into(),
        }
    }

    #[test]
    fn a_repetition_is_a_copy_not_an_event() {
        let mut record = Record::default();
        record.take(vec![arrival(Some("a")), arrival(Some("b")), arrival(Some("a"))], 0);
        record.take(vec![arrival(Some("a"))], 2);
        let copies: Vec<_> = record.taken().into_iter().map(|taken| (taken.id, taken.copies)).collect();
        assert_eq!(copies, [("a".to_owned(), 3), ("b".to_owned(), 1)]);
        let stats = record.stats();
        assert_eq!((stats.taken, stats.duplicates, stats.rejected), (2, 2, 2));
    }

    #[test]
    fn an_event_without_a_key_is_new_every_time() {
        let mut record = Record::default();
        record.take(vec![arrival(None), arrival(None)], 0);
        assert_eq!(record.taken().len(), 2);
    }

    #[test]
    fn a_request_answered_after_a_reset_leaves_the_new_record_alone() {
        let seen = || Seen {
            path: "/batch".to_owned(),
            status: None,
            events: 0,
            body_bytes: 0,
            at_ms: 0,
            fault: None,
            body: None,
        };
        let mut record = Record::default();
        let old = record.see(seen());
        record.reset();
        let new = record.see(seen());
        record.answered(old, 503);
        assert_eq!(record.requests()[0].status, None);
        record.answered(new, 200);
        assert_eq!(record.requests()[0].status, Some(200));
    }
}
