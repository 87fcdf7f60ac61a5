//! Who is who after whatever happened, where each id may be that of a user, of a device, and
//! the one that somebody had before.

use analytics_relay_providers::Event;
use proptest::prelude::*;

use super::{BASE_MS, Backend};
use crate::{Identity, Operator, Scope, Store, Subject, TenantScope, model::FactLimits, oracle::Oracle};

const IDS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const HOUR_MS: i64 = 3_600_000;
/// So little that it is often too much.
pub(crate) const FEW: FactLimits = FactLimits { users_joined: 3, users_of_a_device: 2, devices_of_a_user: 3 };

/// What happens to them.
#[derive(Debug, Clone)]
pub(crate) enum Happens {
    /// A device was seen, with a user or with none, at an hour.
    Seen(u8, u8, i64),
    Alias(u8, u8, i64),
    Link(u8, u8, bool),
    Erase(u8, bool),
    Reopen,
}

pub(crate) fn happens() -> impl Strategy<Value = Happens> {
    let id = || 0..IDS.len() as u8;
    prop_oneof![
        // One more: none.
        12 => (0..IDS.len() as u8 + 1, id(), 0..6_i64).prop_map(|(user, device, hour)| Happens::Seen(user, device, hour)),
        8 => (id(), id(), 0..6_i64).prop_map(|(from, user, hour)| Happens::Alias(from, user, hour)),
        1 => (id(), id(), any::<bool>()).prop_map(|(from, user, joined)| Happens::Link(from, user, joined)),
        2 => (id(), any::<bool>()).prop_map(|(who, is_user)| Happens::Erase(who, is_user)),
        1 => Just(Happens::Reopen),
    ]
}

/// What was wrong once, and is rarely met by chance.
pub(crate) fn odd_cases() -> Vec<Vec<Happens>> {
    use Happens::*;
    vec![
        // A device is no user's any more who is erased, and is theirs when they come again.
        vec![Link(3, 0, false), Erase(0, true), Seen(0, 3, 1), Seen(1, 3, 2), Seen(6, 3, 0), Seen(6, 3, 4)],
        // An alias says whose a device was that has the name of a user who is erased.
        vec![Alias(3, 0, 0), Erase(3, true), Seen(0, 0, 0), Seen(6, 3, 0)],
        vec![Link(5, 0, false), Seen(0, 5, 0), Seen(6, 5, 0), Erase(5, true)],
        // A user has the name of a device that is erased.
        vec![Alias(1, 4, 0), Alias(4, 0, 0), Erase(4, false)],
    ]
}

fn of() -> TenantScope {
    TenantScope::tenant("")
}

fn subject(id: u8, is_user: bool) -> Subject {
    let id = IDS[usize::from(id)].to_owned();
    if is_user { Subject::User(id) } else { Subject::Anonymous(id) }
}

impl Happens {
    /// What of it is an event.
    fn event(&self, number: usize) -> Option<Event> {
        let id = |id: &u8| IDS[usize::from(*id)];
        let (what, hour) = match self {
            Self::Seen(user, device, hour) => {
                let user = IDS.get(usize::from(*user)).map(|user| format!(r#""user_id":"{user}","#));
                let user = user.unwrap_or_default();
                (format!(r#""kind":"page",{user}"anonymous_id":"{}""#, id(device)), hour)
            }
            Self::Alias(from, user, hour) => {
                let (from, user) = (id(from), id(user));
                (format!(r#""kind":"alias","previous_id":"{from}","user_id":"{user}""#), hour)
            }
            _ => return None,
        };
        let time_ms = BASE_MS + hour * HOUR_MS + 5;
        let json = format!(r#"{{"id":"{number}",{what},"time_ms":{time_ms},"accepted_ms":{time_ms}}}"#);
        Some(Event::from_json(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}")))
    }
}

/// A store to which events come in batches of a size, and one that judges it.
struct Judged<'b, B: Backend> {
    backend: &'b B,
    store: B::Store,
    oracle: Oracle,
    batch: Vec<Event>,
}

impl<B: Backend> Judged<'_, B> {
    async fn append(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        assert_eq!(self.store.append(&batch).await, self.oracle.append(&batch).await);
    }

    async fn change(&mut self, one: &Happens) {
        match one {
            Happens::Link(from, user, joined) => {
                let (from, user) = (IDS[usize::from(*from)], IDS[usize::from(*user)]);
                let by = Operator { name: "ann".into(), reason: "a shared desk".into(), at_ms: 5 };
                for store in [&self.store as &dyn Store, &self.oracle] {
                    store.link(&of(), from, user, *joined, &by).await.unwrap();
                }
            }
            Happens::Erase(who, is_user) => {
                let who = subject(*who, *is_user);
                let deleted = self.store.erase(&of(), &who).await.unwrap();
                assert_eq!(deleted.events, self.oracle.erase(&of(), &who).await.unwrap().events, "{who:?}");
            }
            Happens::Reopen => {
                self.backend.close(&self.store).await;
                self.store = self.backend.open().await;
            }
            Happens::Seen(..) | Happens::Alias(..) => unreachable!("an event"),
        }
    }

    /// What is known of everybody.
    async fn check(&self) -> Vec<Option<Identity>> {
        let scope = Scope { include_bots: true, ..Scope::new(of(), i64::MIN..i64::MAX) };
        let mut all = Vec::new();
        for who in (0..IDS.len() as u8).flat_map(|id| [subject(id, true), subject(id, false)]) {
            let known = self.store.identity(&of(), &who).await.unwrap();
            assert_eq!(known, self.oracle.identity(&of(), &who).await.unwrap(), "{who:?}");
            let log = self.store.identity_log(&of(), &who, 1_000).await;
            assert_eq!(log, self.oracle.identity_log(&of(), &who, 1_000).await, "{who:?}");
            let events = self.store.recent(&scope, Some(&who), 1_000).await;
            assert_eq!(events, self.oracle.recent(&scope, Some(&who), 1_000).await, "{who:?}");
            all.push(known);
        }
        assert_eq!(self.store.summary(&scope).await, self.oracle.summary(&scope).await);
        all
    }
}

/// What a store knows of everybody after all that happened, its events in batches of a size;
/// the oracle knows the same. The store is open still.
pub(crate) async fn known_after<B: Backend>(
    backend: &B,
    batch_max: usize,
    all: &[Happens],
) -> (B::Store, Vec<Option<Identity>>) {
    let store = backend.open().await;
    let oracle = Oracle::with_keys(backend.keys(&store)).within(backend.fact_limits());
    let mut judged = Judged { backend, store, oracle, batch: Vec::new() };
    for (number, one) in all.iter().enumerate() {
        match one.event(number) {
            Some(event) => judged.batch.push(event),
            None => {
                judged.append().await;
                judged.change(one).await;
            }
        }
        if judged.batch.len() >= batch_max {
            judged.append().await;
        }
    }
    judged.append().await;
    let known = judged.check().await;
    (judged.store, known)
}
