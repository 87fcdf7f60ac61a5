//! The session that an event of a user's own device belongs to, by the rules of
//! [`table`]: fixed here, once, so that every provider and every retry names the same.
//!
//! An id is made of what it names: the session's start and a keyed hash of who it is of.
//! So nothing is stored of it, and relays that share `SESSION_SECRET` and see the same
//! start give the same id. It is a UUIDv7, whose time is the session's start.
//!
//! The table is memory: written when the relay stops and read when it starts. After a kill
//! it begins empty, and a visit that goes on is two.

use std::sync::{Mutex, PoisonError};

use ring::digest::{SHA256, digest};
use uuid::Uuid;

use crate::hashing::keyed_hash;

mod saved;
mod table;

pub(crate) use saved::SavedSessions;
use table::{Found, Rules, Table};

/// Parts of the table that are locked one by one.
const SHARDS: usize = 16;
/// No session is longer, however busy its visitor: a machine that never rests would have
/// one of years.
const LENGTH_MS_MAX: i64 = 24 * 3600 * 1000;

/// What makes ids that nobody else can make.
#[derive(Clone)]
pub(crate) struct SessionSecret([u8; 16]);

impl SessionSecret {
    /// Of a text, of which every byte counts.
    pub(crate) fn of(text: &[u8]) -> Self {
        let hash = digest(&SHA256, text);
        let mut key = [0; 16];
        key.copy_from_slice(&hash.as_ref()[..16]);
        Self(key)
    }

    fn hash(&self, texts: &[&[u8]]) -> u128 {
        keyed_hash(&self.0, texts)
    }
}

/// How sessions are told apart, and how many are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionLimits {
    /// The gap after which another one begins.
    pub(crate) timeout_ms: i64,
    /// Visitors that are known at once.
    pub(crate) sessions_max: usize,
}

/// What became of an event that asked for its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Session {
    /// It belongs to this one.
    Of(Uuid),
    /// It is not of now, or before what is known of its visitor.
    None,
    /// So many visitors are known that none can be added.
    Full,
}

/// The sessions of all visitors that were seen lately.
pub(crate) struct Sessions {
    secret: SessionSecret,
    shards: Vec<Mutex<Table>>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("visitors", &self.visitors()).finish_non_exhaustive()
    }
}

impl Sessions {
    pub(crate) fn new(secret: SessionSecret, limits: SessionLimits) -> Self {
        let rules = Rules { timeout_ms: limits.timeout_ms, length_ms_max: LENGTH_MS_MAX };
        let visitors_max = limits.sessions_max.div_ceil(SHARDS);
        let table = || Mutex::new(Table::new(rules, visitors_max));
        Self { secret, shards: (0..SHARDS).map(|_| table()).collect() }
    }

    /// The session of an event that happened at `time_ms` and came at `now_ms`.
    pub(crate) fn of(&self, visitor: VisitorKey, time_ms: i64, now_ms: i64) -> Session {
        let found = self.shard(visitor).find(visitor.0, time_ms, now_ms);
        match found {
            Found::Of { start_ms } => Session::Of(self.id_of(visitor, start_ms)),
            Found::None => Session::None,
            Found::Full => Session::Full,
        }
    }

    /// True if a session of the visitor goes on at that time.
    pub(crate) fn goes_on(&self, visitor: VisitorKey, time_ms: i64, now_ms: i64) -> bool {
        self.shard(visitor).goes_on(visitor.0, time_ms, now_ms)
    }

    /// Whose sessions an event's are: its device's if it names one, so that a login does
    /// not end a visit.
    pub(crate) fn visitor(&self, tenant: &str, anonymous_id: &str, user_id: &str) -> VisitorKey {
        let (sort, id): (&[u8], _) =
            if anonymous_id.is_empty() { (b"user", user_id) } else { (b"device", anonymous_id) };
        VisitorKey(self.secret.hash(&[tenant.as_bytes(), sort, id.as_bytes()]))
    }

    /// Visitors that are known now.
    pub(crate) fn visitors(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    /// The start in its first 48 bits; all others that a UUIDv7 leaves free come of the
    /// hash.
    fn id_of(&self, VisitorKey(visitor): VisitorKey, start_ms: i64) -> Uuid {
        let hash = self.secret.hash(&[b"session", &visitor.to_le_bytes(), &start_ms.to_le_bytes()]);
        let mut random = [0; 10];
        random.copy_from_slice(&hash.to_le_bytes()[..10]);
        let start_ms = u64::try_from(start_ms).unwrap_or_default();
        uuid::Builder::from_unix_timestamp_millis(start_ms, &random).into_uuid()
    }

    fn shard(&self, VisitorKey(visitor): VisitorKey) -> std::sync::MutexGuard<'_, Table> {
        // The table in it spreads by the lower bits.
        let shard = (visitor >> 124) as usize % SHARDS;
        // A panic costs an event its session; the table is whole at every point.
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who a session is of: a keyed hash, from which nobody is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VisitorKey(u128);

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: i64 = 60_000;
    const T0: i64 = 1_767_225_600_000;
    const LIMITS: SessionLimits = SessionLimits { timeout_ms: 30 * MINUTE, sessions_max: 1000 };

    fn sessions() -> Sessions {
        Sessions::new(SessionSecret::of(b"canary"), LIMITS)
    }

    fn id(sessions: &Sessions, visitor: VisitorKey, at: i64) -> Uuid {
        match sessions.of(visitor, at, at) {
            Session::Of(id) => id,
            other => panic!("{other:?} at {}", at - T0),
        }
    }

    #[test]
    fn an_id_is_a_uuid_of_the_seventh_version_whose_time_is_the_start() {
        let sessions = sessions();
        let visitor = sessions.visitor("", "device-1", "");
        let first = id(&sessions, visitor, T0);
        assert_eq!((first.get_version_num(), first.get_variant()), (7, uuid::Variant::RFC4122));
        let (seconds, nanos) = first.get_timestamp().unwrap().to_unix();
        assert_eq!((seconds * 1000, nanos), (T0.unsigned_abs(), 0));
        assert_eq!(id(&sessions, visitor, T0 + 29 * MINUTE), first);
        assert_ne!(id(&sessions, visitor, T0 + 60 * MINUTE), first);
    }

    #[test]
    fn relays_with_one_secret_agree_and_others_do_not() {
        let [one, two] = [sessions(), sessions()];
        let other = Sessions::new(SessionSecret::of(b"another"), LIMITS);
        let of = |sessions: &Sessions| id(sessions, sessions.visitor("acme", "device-1", "user-1"), T0);
        assert_eq!(of(&one), of(&two));
        assert_ne!(of(&one), of(&other));
    }

    #[test]
    fn a_login_does_not_end_a_visit_and_no_id_passes_for_another() {
        let sessions = sessions();
        let device = sessions.visitor("", "device-1", "");
        assert_eq!(device, sessions.visitor("", "device-1", "user-1"));
        let others = [
            sessions.visitor("", "", "device-1"),
            sessions.visitor("acme", "device-1", ""),
            sessions.visitor("", "device-12", ""),
            sessions.visitor("de", "vice-1", ""),
        ];
        assert!(others.iter().all(|other| *other != device), "{others:?}");
    }
}
