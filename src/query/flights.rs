//! Who asks what somebody else is asking already waits for the same answer.
//!
//! A flight belongs to all who wait for it and to no task: each of them drives it, so that it
//! goes on when the first one leaves, and ends with the last.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{
    FutureExt,
    future::{Shared, WeakShared},
};
use tracing::error;

use super::{cache::Known, unanswered::Unanswered};

/// Most questions that are asked, or wait to be, at a time.
pub(super) const FLIGHTS_MAX: usize = 64;

/// The answer, and whether it was known somewhere.
pub(super) type Landed = Result<(Arc<Known>, bool), Unanswered>;
type Flight = Pin<Box<dyn Future<Output = Landed> + Send>>;

#[derive(Default)]
struct UnderWay {
    flights: HashMap<Arc<str>, (u64, WeakShared<Flight>)>,
    begun: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct Flights(Arc<Mutex<UnderWay>>);

impl std::fmt::Debug for Flights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Flights")
    }
}

impl Flights {
    /// The flight of a key: the one that is under way, or a new one.
    pub(super) fn join(
        &self,
        key: &str,
        begin: impl FnOnce() -> Flight,
    ) -> Result<Shared<Flight>, Unanswered> {
        let mut under_way = lock(&self.0);
        if let Some(flight) = under_way.flights.get(key).and_then(|(_, flight)| flight.upgrade()) {
            return Ok(flight);
        }
        if under_way.flights.len() >= FLIGHTS_MAX {
            return Err(Unanswered::TooMany);
        }
        under_way.begun += 1;
        let key: Arc<str> = key.into();
        // In the future: however that ends, it is under way no more.
        let over = Over { of: self.0.clone(), key: key.clone(), number: under_way.begun };
        let flying = AssertUnwindSafe(begin()).catch_unwind();
        let flight = async move {
            let _over = over;
            flying.await.unwrap_or_else(|_| {
                error!("a defect: a question panicked; its callers got INTERNAL");
                Err(Unanswered::Defect)
            })
        };
        let flight = (Box::pin(flight) as Flight).shared();
        let weak = flight.downgrade().expect("it has not ended");
        let number = under_way.begun;
        under_way.flights.insert(key, (number, weak));
        Ok(flight)
    }

    /// From now on nobody joins what is under way.
    pub(super) fn forget(&self) {
        lock(&self.0).flights.clear();
    }
}

/// Takes a flight out of those that are under way.
struct Over {
    of: Arc<Mutex<UnderWay>>,
    key: Arc<str>,
    number: u64,
}

impl Drop for Over {
    fn drop(&mut self) {
        let mut under_way = lock(&self.of);
        // Another may have begun since.
        if under_way.flights.get(&self.key).is_some_and(|(number, _)| *number == self.number) {
            under_way.flights.remove(&self.key);
        }
    }
}

fn lock(under_way: &Mutex<UnderWay>) -> MutexGuard<'_, UnderWay> {
    under_way.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::query::{report::Answer, user_count::Users};

    fn known(users: u64) -> Landed {
        let answer = Answer::UserCount(Users { unique_users: users, estimated: false });
        Ok((Arc::new(Known { answer, as_of_ms: 0 }), false))
    }

    fn after_a_second(begun: &Arc<AtomicUsize>) -> Flight {
        begun.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {
            sleep(Duration::from_secs(1)).await;
            known(7)
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_who_ask_the_same_ask_once() {
        let (flights, begun) = (Flights::default(), Arc::new(AtomicUsize::new(0)));
        let ask = || flights.join("a", || after_a_second(&begun)).unwrap();
        let answers = futures_util::future::join_all((0..100).map(|_| ask())).await;
        assert!(answers.iter().all(|answer| *answer == known(7)));
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        assert_eq!(ask().await, known(7));
        assert_eq!(begun.load(Ordering::SeqCst), 2, "what is over is not joined");
        assert!(lock(&flights.0).flights.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_asked_first_may_leave_and_the_others_get_their_answer() {
        let (flights, begun) = (Flights::default(), Arc::new(AtomicUsize::new(0)));
        let mut first = flights.join("a", || after_a_second(&begun)).unwrap();
        let other = flights.join("a", || after_a_second(&begun)).unwrap();
        let other = tokio::spawn(other);
        assert!(timeout(Duration::from_millis(500), &mut first).await.is_err());
        drop(first);
        assert_eq!(timeout(Duration::from_secs(5), other).await.unwrap().unwrap(), known(7));
        assert_eq!(begun.load(Ordering::SeqCst), 1);
    }

    /// What nobody waits for is done for nobody.
    #[tokio::test(start_paused = true)]
    async fn it_ends_with_the_last_who_waits() {
        struct Gone(Arc<AtomicUsize>);
        impl Drop for Gone {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let (flights, gone) = (Flights::default(), Arc::new(AtomicUsize::new(0)));
        let begin = || -> Flight {
            let gone = Gone(gone.clone());
            Box::pin(async move {
                let _gone = gone;
                pending().await
            })
        };
        let (mut one, mut two) = (flights.join("a", begin).unwrap(), flights.join("a", begin).unwrap());
        for flight in [&mut one, &mut two] {
            assert!(timeout(Duration::from_millis(10), flight).await.is_err());
        }
        drop(one);
        assert_eq!(gone.load(Ordering::SeqCst), 0);
        drop(two);
        assert_eq!(gone.load(Ordering::SeqCst), 1);
        assert!(lock(&flights.0).flights.is_empty(), "the next one begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_is_an_answer_to_all_and_the_next_one_is_asked() {
        let flights = Flights::default();
        let begin = || -> Flight {
            Box::pin(async {
                sleep(Duration::from_secs(1)).await;
                panic!("a defect")
            })
        };
        let both = (flights.join("a", begin).unwrap(), flights.join("a", begin).unwrap());
        let (one, two) = tokio::join!(both.0, both.1);
        assert_eq!((one, two), (Err(Unanswered::Defect), Err(Unanswered::Defect)));
        let next = flights.join("a", || Box::pin(async { known(1) })).unwrap();
        assert_eq!(next.await, known(1));
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_are_under_way_and_what_is_forgotten_is_not_joined() {
        let flights = Flights::default();
        let join = |key: String| flights.join(&key, || Box::pin(pending()));
        let all: Vec<_> = (0..FLIGHTS_MAX).map(|at| join(at.to_string()).unwrap()).collect();
        assert_eq!(join("more".into()).err(), Some(Unanswered::TooMany));
        assert!(join("0".into()).is_ok(), "who joins costs nothing");
        drop(all);
        let old = join("a".into()).unwrap();
        flights.forget();
        let new = flights.join("a", || Box::pin(async { known(2) })).unwrap();
        drop(old);
        assert_eq!(lock(&flights.0).flights.len(), 1, "the old one ends itself and no other");
        assert_eq!(new.await, known(2));
    }
}
