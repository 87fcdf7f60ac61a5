use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use analytics_relay_providers::{Event, EventParts, MoreParts, event::Kind};
use proptest::prelude::*;

use super::*;
use crate::{
    delivery::{
        doubt::Doubt,
        test_support::{accepted_at, alias, group, identify, track, track_of},
    },
    reasons::DeadLetterReason,
};

const TRACKS: Flow = Flow { endpoint: Endpoint(0), kind: Kind::Track };
const IDENTIFIES: Flow = Flow { endpoint: Endpoint(1), kind: Kind::Identify };
/// Those that go where tracks go.
const IDENTIFIES_BESIDE: Flow = Flow { endpoint: Endpoint(0), kind: Kind::Identify };
const LIMITS: BatchLimits = BatchLimits { events_max: 4, body_bytes_max: 1_000_000, requests_max: 2 };

fn backlog() -> Backlog {
    Backlog::new(LIMITS)
}

fn push_tracks(backlog: &mut Backlog, names: &[&str]) {
    for name in names {
        backlog.push(track(name), TRACKS, Place::MEMORY);
    }
}

fn names(events: &[Waiting]) -> Vec<&str> {
    events.iter().map(|waiting| waiting.event.name().unwrap_or("identify")).collect()
}

fn take(backlog: &mut Backlog) -> Vec<Waiting> {
    backlog.next_request(|_, _| Some(Allowance::SuspectOrUpTo(usize::MAX))).1
}

fn arrivals(places: std::ops::Range<u64>, flow: Flow) -> Vec<Arrival> {
    places.map(|place| Arrival::new(place, flow)).collect()
}

fn accuse(waiting: &mut Waiting) {
    let of = (DeadLetterReason::Invalid, String::new());
    Doubt::default().accuse(&mut waiting.history_mut().charges, of, false, 1, Instant::now());
    waiting.history_mut().together_max = 1;
}

#[test]
fn a_request_merges_what_waits_up_to_the_number_of_events() {
    let mut backlog = backlog();
    push_tracks(&mut backlog, &["a", "b", "c", "d", "e"]);
    assert_eq!(names(&take(&mut backlog)), ["a", "b", "c", "d"]);
    assert_eq!(names(&take(&mut backlog)), ["e"]);
    assert!(take(&mut backlog).is_empty());
}

#[test]
fn a_request_stays_within_the_bytes_but_never_starves() {
    let bytes = track("a").wire_bytes_estimate();
    let mut backlog = Backlog::new(BatchLimits { body_bytes_max: 2 * bytes, ..LIMITS });
    push_tracks(&mut backlog, &["a", "b", "c"]);
    assert_eq!(names(&take(&mut backlog)), ["a", "b"]);
    let mut tiny = Backlog::new(BatchLimits { body_bytes_max: 1, ..LIMITS });
    push_tracks(&mut tiny, &["a", "b"]);
    assert_eq!(names(&take(&mut tiny)), ["a"]);
}

#[test]
fn tenants_are_never_mixed() {
    let of = |name: &str, tenant: Option<&str>| {
        let more = MoreParts { tenant, ..MoreParts::default() }.if_any();
        Event::pack(&EventParts { more, ..track(name).parts() })
    };
    let mut backlog = backlog();
    for (name, tenant) in [
        ("a", Some("acme")),
        ("b", Some("acme")),
        ("c", Some("globex")),
        ("d", None),
        ("e", None),
        ("f", Some("acme")),
    ] {
        backlog.push(of(name, tenant), TRACKS, Place::MEMORY);
    }
    for wanted in [&["a", "b"][..], &["c"], &["d", "e"], &["f"]] {
        assert_eq!(names(&take(&mut backlog)), wanted);
    }
}

#[test]
fn endpoints_are_never_mixed_and_the_older_goes_first() {
    let mut backlog = backlog();
    backlog.push(identify("u"), IDENTIFIES, Place::MEMORY);
    push_tracks(&mut backlog, &["a"]);
    assert_eq!(backlog.next_request(|_, _| Some(Allowance::UpTo(9))).0, Route::to(IDENTIFIES.endpoint));
    assert_eq!(backlog.next_request(|_, _| Some(Allowance::UpTo(9))).0, Route::to(TRACKS.endpoint));
}

#[test]
fn halving_isolates_the_poison_within_2n_minus_1_requests() {
    let mut backlog = Backlog::new(BatchLimits { events_max: 100, ..LIMITS });
    let all: Vec<String> = (0..50).map(|i| if i == 37 { "poison".into() } else { format!("e{i}") }).collect();
    push_tracks(&mut backlog, &all.iter().map(String::as_str).collect::<Vec<_>>());
    let (mut requests, mut delivered, mut poison) = (0, Vec::new(), 0);
    loop {
        let mut taken = backlog.next_request(|_, _| Some(Allowance::UpTo(usize::MAX))).1;
        if taken.is_empty() {
            break;
        }
        requests += 1;
        if !names(&taken).contains(&"poison") {
            delivered.extend(names(&taken).into_iter().map(str::to_owned));
            taken.iter().for_each(|waiting| backlog.settle(waiting));
        } else if taken.len() == 1 {
            poison += 1;
            backlog.settle(&taken[0]);
        } else {
            let half = taken.len().div_ceil(2);
            taken.iter_mut().for_each(|waiting| waiting.history_mut().together_max = half);
            backlog.put_back(taken);
        }
    }
    assert_eq!((delivered.len(), poison, backlog.load().events), (49, 1, 0));
    assert!(requests < 2 * 50, "{requests}");
    assert!(requests <= 16, "one poison of 50 takes log2 rounds, not {requests}");
}

#[tokio::test(start_paused = true)]
async fn a_later_identify_waits_for_an_earlier_one_of_its_user() {
    let mut backlog = backlog();
    let now = Instant::now();
    for user in ["u", "v", "u"] {
        backlog.push(identify(user), IDENTIFIES, Place::MEMORY);
    }
    let (_, mut first) = backlog.next_request(|_, _| Some(Allowance::UpTo(1)));
    assert_eq!(first[0].event.subject(), Some("u"));
    let (_, second) = backlog.next_request(|_, _| Some(Allowance::UpTo(9)));
    assert_eq!(second.len(), 1, "only v may go while u is out");
    assert_eq!(second[0].event.subject(), Some("v"));

    let until = now + Duration::from_secs(5);
    backlog.hold(first.remove(0), until);
    backlog.release(now);
    assert!(take(&mut backlog).is_empty(), "u is held, so the later u waits too");
    assert_eq!(backlog.next_release(), Some(until));
    backlog.release(until);
    let both = take(&mut backlog);
    assert_eq!(both.len(), 2);
    assert!(both[0].arrival < both[1].arrival);
}

/// A group keeps the order of its group, whoever it is that belongs to it, and an alias
/// that of its user.
#[tokio::test(start_paused = true)]
async fn aliases_wait_for_their_user_and_groups_for_their_group() {
    let flow = |kind| Flow { endpoint: Endpoint(0), kind };
    let mut backlog = backlog();
    let out = [(identify("user-1"), Kind::Identify), (group("acme", "user-2"), Kind::Group)];
    for (event, kind) in out {
        backlog.push(event, flow(kind), Place::MEMORY);
    }
    let out = take(&mut backlog);
    assert_eq!(out.len(), 2);
    let later = [
        (alias("user-0", "user-1"), Kind::Alias),
        (group("acme", "user-3"), Kind::Group),
        (group("other", "user-2"), Kind::Group),
        (identify("user-2"), Kind::Identify),
    ];
    let ids: Vec<String> = later.iter().map(|(event, _)| event.id().to_string()).collect();
    for (event, kind) in later {
        backlog.push(event, flow(kind), Place::MEMORY);
    }
    let taken_ids = |events: &[Waiting]| -> Vec<String> {
        events.iter().map(|waiting| waiting.event.id().to_string()).collect()
    };
    assert_eq!(taken_ids(&take(&mut backlog)), ids[2..], "another group, another user");
    backlog.settle(&out[0]);
    assert_eq!(taken_ids(&take(&mut backlog)), ids[..1]);
    backlog.settle(&out[1]);
    assert_eq!(taken_ids(&take(&mut backlog)), ids[1..2]);
}

#[tokio::test(start_paused = true)]
async fn a_throttled_users_other_events_wait_with_it_and_nobody_elses() {
    let mut backlog = backlog();
    let now = Instant::now();
    let of = |user: &str| track_of("t", user);
    backlog.push(of("slow"), TRACKS, Place::MEMORY);
    let slow = take(&mut backlog).remove(0);
    let until = now + Duration::from_secs(15);
    backlog.throttle(slow, until);
    for _ in 0..3000 {
        backlog.push(of("slow"), TRACKS, Place::MEMORY);
    }
    backlog.push(of("quick"), TRACKS, Place::MEMORY);
    let taken = take(&mut backlog);
    assert_eq!(taken.len(), 1, "only quick's, however many of slow's wait before it");
    assert_eq!(taken[0].event.subject(), Some("quick"));
    backlog.release(until);
    let released = take(&mut backlog);
    assert_eq!(released.iter().map(|waiting| waiting.arrival).collect::<Vec<_>>(), arrivals(0..4, TRACKS));
}

#[tokio::test(start_paused = true)]
async fn the_oldest_age_is_that_of_the_oldest_that_is_not_out() {
    let mut backlog = backlog();
    for accepted_ms in [10, 20, 30] {
        backlog.push(accepted_at(&identify("a"), accepted_ms), IDENTIFIES, Place::MEMORY);
    }
    let take_one = |backlog: &mut Backlog| backlog.next_request(|_, _| Some(Allowance::UpTo(1))).1.pop();
    let first = take_one(&mut backlog).unwrap();
    assert_eq!(backlog.oldest_accepted_ms(), Some(20), "the first is out");
    assert!(take_one(&mut backlog).is_none(), "both wait for it");
    assert_eq!(backlog.oldest_accepted_ms(), Some(20));
    let until = Instant::now() + Duration::from_secs(1);
    backlog.hold(first, until);
    assert_eq!(backlog.oldest_accepted_ms(), Some(10));
    backlog.release(until);
    assert_eq!(backlog.oldest_accepted_ms(), Some(10));
    let rest = take(&mut backlog);
    assert_eq!((rest.len(), backlog.oldest_accepted_ms()), (3, None));
    rest.iter().for_each(|waiting| backlog.settle(waiting));
    assert_eq!((backlog.oldest_accepted_ms(), backlog.load().events, backlog.load().bytes), (None, 0, 0));

    backlog.push(accepted_at(&track("a"), 40), TRACKS, Place::MEMORY);
    let held = take(&mut backlog).pop().unwrap();
    backlog.hold(held, until);
    assert_eq!(backlog.take_all().len(), 1);
    assert_eq!(backlog.oldest_accepted_ms(), None, "what is taken is out");
}

fn beside(identify: bool) -> Flow {
    if identify { IDENTIFIES_BESIDE } else { TRACKS }
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_is_kept_apart_holds_up_no_other_and_keeps_its_place() {
    let mut backlog = backlog();
    let apart = IDENTIFIES_BESIDE.apart();
    let only = |wanted: Route| move |route, _| (route == wanted).then_some(Allowance::UpTo(9));
    backlog.push(identify("u"), IDENTIFIES_BESIDE, Place::MEMORY);
    push_tracks(&mut backlog, &["a"]);
    let held = backlog.next_request(|_, _| Some(Allowance::UpTo(1))).1.remove(0);
    backlog.hold(held, Instant::now());
    backlog.keep_apart(IDENTIFIES_BESIDE);
    backlog.push(identify("v"), IDENTIFIES_BESIDE, Place::MEMORY);
    push_tracks(&mut backlog, &["b"]);
    assert!(backlog.uses(apart));
    assert_eq!(names(&backlog.next_request(only(Route::to(TRACKS.endpoint))).1), ["a", "b"]);
    backlog.release(Instant::now());
    push_tracks(&mut backlog, &["c"]);
    let probe = backlog.next_request(|_, _| Some(Allowance::OneAt(0.99)));
    assert_eq!((probe.0, probe.1[0].event.subject()), (apart, Some("v")), "not always the first");
    backlog.put_back(probe.1);
    backlog.bring_back(IDENTIFIES_BESIDE);
    assert!(!backlog.uses(apart));
    let all = backlog.next_request(only(Route::to(TRACKS.endpoint))).1;
    assert_eq!(names(&all), ["identify", "identify", "c"]);
    assert!(all.is_sorted_by_key(|waiting| waiting.arrival));
}

#[test]
fn a_probe_takes_the_first_identify_of_its_user() {
    let mut backlog = backlog();
    for user in ["u", "v", "u"] {
        backlog.push(identify(user), IDENTIFIES_BESIDE, Place::MEMORY);
    }
    let probe = backlog.next_request(|_, _| Some(Allowance::OneAt(0.9))).1.remove(0);
    assert_eq!((probe.arrival, probe.event.subject()), (Arrival::new(0, IDENTIFIES_BESIDE), Some("u")));
    let probe = backlog.next_request(|_, _| Some(Allowance::OneAt(0.9))).1.remove(0);
    assert_eq!(probe.event.subject(), Some("v"), "the second u waits for the first");
}

/// Nor does it stand before them, or is it lost when nothing else is left.
#[tokio::test(start_paused = true)]
async fn a_suspect_goes_alone_and_when_it_may() {
    let mut backlog = backlog();
    push_tracks(&mut backlog, &["bad"]);
    let mut bad = take(&mut backlog).remove(0);
    push_tracks(&mut backlog, &["a", "b"]);
    accuse(&mut bad);
    let now = Instant::now();
    backlog.hold(bad, now);
    backlog.release(now);
    let others = |_, has_ready: bool| {
        assert!(has_ready);
        Some(Allowance::UpTo(1))
    };
    assert_eq!(names(&backlog.next_request(others).1), ["a"]);
    assert_eq!(names(&backlog.next_request(|_, _| Some(Allowance::OneAt(0.0))).1), ["b"]);
    assert_eq!((backlog.ready_events(|_| true), backlog.is_idle()), (0, false));
    push_tracks(&mut backlog, &["c"]);
    assert_eq!(names(&take(&mut backlog)), ["bad"]);
    assert_eq!(names(&take(&mut backlog)), ["c"]);
}

#[tokio::test(start_paused = true)]
async fn a_later_identify_waits_for_an_accused_one_and_it_for_an_earlier_one() {
    let mut backlog = backlog();
    let now = Instant::now();
    for _ in 0..2 {
        backlog.push(identify("u"), IDENTIFIES, Place::MEMORY);
    }
    let mut both = take(&mut backlog);
    accuse(&mut both[1]);
    backlog.hold(both.remove(1), now);
    backlog.put_back(both);
    backlog.release(now);
    backlog.push(identify("u"), IDENTIFIES, Place::MEMORY);
    let first = take(&mut backlog);
    assert_eq!(first[0].arrival, Arrival::new(0, IDENTIFIES), "the accused one would overtake it");
    assert!(take(&mut backlog).is_empty(), "the third one would overtake that");
    backlog.settle(&first[0]);
    let second = take(&mut backlog);
    assert_eq!(second[0].arrival, Arrival::new(1, IDENTIFIES));
    backlog.settle(&second[0]);
    assert_eq!(take(&mut backlog)[0].arrival, Arrival::new(2, IDENTIFIES));
}

#[derive(Debug, Clone)]
enum Step {
    Push { user: u8, identify: bool },
    Take { events_max: usize, suspect: bool },
    Settle,
    PutBack { halve: bool },
    Hold { seconds: u64 },
    Accuse { seconds: u64 },
    Wait { seconds: u64 },
    TakeOne { share: f64 },
    KeepApart { identify: bool },
    BringBack { identify: bool },
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u8..4, any::<bool>()).prop_map(|(user, identify)| Step::Push { user, identify }),
        3 => (1_usize..6, any::<bool>())
            .prop_map(|(events_max, suspect)| Step::Take { events_max, suspect }),
        2 => Just(Step::Settle),
        1 => any::<bool>().prop_map(|halve| Step::PutBack { halve }),
        1 => (0_u64..20).prop_map(|seconds| Step::Hold { seconds }),
        1 => (0_u64..10).prop_map(|seconds| Step::Accuse { seconds }),
        2 => (0_u64..20).prop_map(|seconds| Step::Wait { seconds }),
        1 => (0.0..1.0).prop_map(|share| Step::TakeOne { share }),
        1 => any::<bool>().prop_map(|identify| Step::KeepApart { identify }),
        1 => any::<bool>().prop_map(|identify| Step::BringBack { identify }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever happens to requests: nothing is lost or doubled, limits
    /// hold, and identifies of one user end in the order in which they came.
    #[test]
    fn nothing_is_lost_doubled_or_overtaken(steps in prop::collection::vec(any_step(), 1..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let mut now = runtime.block_on(async { Instant::now() });
        let mut backlog = backlog();
        let mut out: VecDeque<Vec<Waiting>> = VecDeque::new();
        let mut pushed = 0_u64;
        let mut ended: Vec<Waiting> = Vec::new();
        let mut finish = |backlog: &mut Backlog, events: Vec<Waiting>| {
            for waiting in events {
                backlog.settle(&waiting);
                ended.push(waiting);
            }
        };
        for step in steps {
            match step {
                Step::Push { user, identify: true } => {
                    // Users of an odd number go where tracks go.
                    let flow = if user % 2 == 0 { IDENTIFIES } else { IDENTIFIES_BESIDE };
                    backlog.push(identify(&user.to_string()), flow, Place::MEMORY);
                    pushed += 1;
                }
                Step::Push { user, .. } => {
                    backlog.push(track_of("t", &user.to_string()), TRACKS, Place::MEMORY);
                    pushed += 1;
                }
                Step::Take { events_max, suspect } => {
                    let allowance = match suspect {
                        true => Allowance::SuspectOrUpTo(events_max),
                        false => Allowance::UpTo(events_max),
                    };
                    let taken = backlog.next_request(|_, _| Some(allowance)).1;
                    prop_assert!(taken.len() <= events_max.min(LIMITS.events_max));
                    prop_assert!(taken.iter().all(|waiting| taken.len() <= waiting.together_max()));
                    if !taken.is_empty() {
                        out.push_back(taken);
                    }
                }
                Step::Settle => {
                    if let Some(taken) = out.pop_back() {
                        finish(&mut backlog, taken);
                    }
                }
                Step::PutBack { halve } => {
                    if let Some(mut taken) = out.pop_front() {
                        let half = taken.len().div_ceil(2);
                        if halve {
                            taken.iter_mut().for_each(|waiting| waiting.history_mut().together_max = half);
                        }
                        backlog.put_back(taken);
                    }
                }
                Step::Hold { seconds } => {
                    if let Some(taken) = out.pop_front() {
                        for (index, waiting) in taken.into_iter().enumerate() {
                            // As a provider may: some again at once, others
                            // each at a time of its own.
                            let seconds = (seconds * (index as u64 + 7)) % 20;
                            if seconds < 3 {
                                backlog.put_back(vec![waiting]);
                            } else if seconds < 8 {
                                backlog.throttle(waiting, now + Duration::from_secs(seconds));
                            } else {
                                backlog.hold(waiting, now + Duration::from_secs(seconds));
                            }
                        }
                    }
                }
                Step::Accuse { seconds } => {
                    for mut waiting in out.pop_front().into_iter().flatten() {
                        accuse(&mut waiting);
                        backlog.hold(waiting, now + Duration::from_secs(seconds));
                    }
                }
                Step::TakeOne { share } => {
                    let taken = backlog.next_request(|_, _| Some(Allowance::OneAt(share))).1;
                    prop_assert!(taken.len() <= 1);
                    if !taken.is_empty() {
                        out.push_back(taken);
                    }
                }
                // Both kinds share an endpoint.
                Step::KeepApart { identify } => backlog.keep_apart(beside(identify)),
                Step::BringBack { identify } => backlog.bring_back(beside(identify)),
                Step::Wait { seconds } => {
                    now += Duration::from_secs(seconds);
                    backlog.release(now);
                }
            }
        }
        while let Some(taken) = out.pop_front() {
            finish(&mut backlog, taken);
        }
        backlog.release_all();
        loop {
            let taken = take(&mut backlog);
            if taken.is_empty() {
                break;
            }
            finish(&mut backlog, taken);
        }
        prop_assert!(backlog.is_idle());
        prop_assert_eq!((backlog.load(), backlog.flows().count()), (Load::default(), 0));
        prop_assert_eq!(backlog.oldest_accepted_ms(), None);
        let seqs: BTreeSet<Arrival> = ended.iter().map(|waiting| waiting.arrival).collect();
        prop_assert_eq!(seqs.len() as u64, pushed);
        prop_assert_eq!(ended.len() as u64, pushed);
        let mut last: HashMap<&str, Arrival> = HashMap::new();
        for waiting in &ended {
            if let Some(user) = waiting.event.order_key() {
                let before = last.insert(user, waiting.arrival);
                prop_assert!(before.is_none_or(|before| before < waiting.arrival), "user {user} was overtaken");
            }
        }
    }
}
