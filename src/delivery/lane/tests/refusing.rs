//! A provider that refuses: bad events are told from a provider in trouble, in
//! simulated time.

use std::sync::atomic::{AtomicBool, AtomicUsize};

use super::*;
use crate::delivery::gate::ProviderState;

/// The provider's answer to a request that it takes nothing of.
fn refuse(detail: &str) -> Result<Vec<Verdict>, SendError> {
    Err(SendError::Refused { detail: detail.to_owned() })
}

fn is_bad(event: &Event) -> bool {
    event.name() == Some("bad")
}

/// Refuses what has a bad event in it.
fn refuse_bad(batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
    if batch.iter().any(is_bad) { refuse("400 no") } else { deliver(batch) }
}

fn bad(count: usize) -> Vec<Event> {
    (0..count).map(|_| track("bad")).collect()
}

/// Of as many users, whom nobody else has.
fn identifies(count: usize) -> Vec<Event> {
    static USERS: AtomicUsize = AtomicUsize::new(0);
    (0..count).map(|_| identify(&format!("user-{}", USERS.fetch_add(1, Ordering::SeqCst)))).collect()
}

/// A switch for a provider's trouble, and a rule that is in force while it is on.
fn trouble(
    rule: impl Fn(&[Event]) -> Result<Vec<Verdict>, SendError> + Send + Sync + 'static,
) -> (Arc<AtomicBool>, Rule) {
    let on = Arc::new(AtomicBool::new(true));
    let is_on = on.clone();
    let rule = move |batch: &[Event]| if is_on.load(Ordering::SeqCst) { rule(batch) } else { deliver(batch) };
    (on, Box::new(rule))
}

/// However the provider words it: nothing becomes a dead letter, it is left alone but
/// for a small probe, and gets everything once when it takes events again.
#[tokio::test(start_paused = true)]
async fn a_provider_that_refuses_everything_costs_no_event() {
    let named = |batch: &[Event]| {
        let verdict = Verdict::Rejected { reason: Rejection::Invalid, detail: "400 nope".into() };
        Ok(vec![verdict; batch.len()])
    };
    let rules: Vec<(ProviderState, Rule)> = vec![
        (ProviderState::Refusing, Box::new(|_| refuse("400 nope"))),
        (ProviderState::Refusing, Box::new(named)),
        (ProviderState::Refusing, Box::new(|_| Err(SendError::TooLarge { detail: "413 nope".into() }))),
        (ProviderState::Paused, Box::new(|_| Err(SendError::Unauthorized { detail: "401 nope".into() }))),
    ];
    for (state, rule) in rules {
        let (on, rule) = trouble(rule);
        let lane = Running::start_by(Vec::new(), rule, true);
        for _ in 0..10 {
            lane.send(&tracks(60)).await;
            sleep(Duration::from_millis(10)).await;
        }
        sleep(Duration::from_secs(600)).await;
        assert_eq!(lane.kept.counts(), (0, 0), "{state:?}");
        assert_eq!(lane.status.state(), state);
        assert!(lane.status.trouble().unwrap().contains("nope"), "{:?}", lane.status.trouble());
        let requests = lane.provider.requests.lock().unwrap().clone();
        assert!(requests.len() < 160, "{state:?}: {} requests in ten minutes", requests.len());
        assert!(requests[20..].iter().all(|(_, ids)| ids.len() == 1), "small probes");
        let probed: HashSet<&String> = requests[20..].iter().flat_map(|(_, ids)| ids).collect();
        assert!(probed.len() > 10, "and not always the same one: {}", probed.len());

        on.store(false, Ordering::SeqCst);
        let (_, kept) = lane.finish().await;
        assert_eq!(kept.counts(), (600, 0), "{state:?}");
        let ids: HashSet<_> = kept.delivered.lock().unwrap().iter().cloned().collect();
        assert_eq!(ids.len(), 600, "each once");
    }
}

#[tokio::test(start_paused = true)]
async fn trouble_that_begins_in_a_stream_of_good_events_costs_none_of_them() {
    let (on, rule) = trouble(|_| refuse("400 nope"));
    on.store(false, Ordering::SeqCst);
    let lane = Running::start_by(Vec::new(), rule, true);
    for second in 0..300 {
        on.store((60..240).contains(&second), Ordering::SeqCst);
        lane.send(&tracks(4)).await;
        sleep(Duration::from_secs(1)).await;
    }
    let status = lane.status.clone();
    let (_, kept) = lane.finish().await;
    assert_eq!(kept.counts(), (1200, 0));
    assert_eq!(status.state(), ProviderState::Sending);
}

/// The good ones do not wait for the bad ones, which end although the provider names
/// none.
#[tokio::test(start_paused = true)]
async fn bad_events_among_good_ones_become_dead_letters_within_a_minute() {
    let lane = Running::start_by(Vec::new(), Box::new(refuse_bad), true);
    for round in 0..60 {
        let bad = if round < 10 { bad(2) } else { Vec::new() };
        lane.send(&[tracks(20), bad, tracks(20)].concat()).await;
        sleep(Duration::from_secs(1)).await;
        assert_eq!(lane.status.state(), ProviderState::Sending);
        assert!(lane.kept.counts().0 + 80 >= 40 * (round + 1), "round {round}: {:?}", lane.kept.counts());
    }
    assert_eq!(lane.kept.counts(), (2400, 20));
    let (_, kept) = lane.finish().await;
    let dead = kept.dead.lock().unwrap();
    assert!(dead.iter().all(|letter| letter.reason == DeadLetterReason::Invalid && is_bad(&letter.event)));
    assert!(dead.iter().all(|letter| letter.detail == "400 no" && (3..=10).contains(&letter.attempts)));
}

/// Many bad ones before the good ones: a probe finds one of those, and in time all
/// of the bad ones are told.
#[tokio::test(start_paused = true)]
async fn a_burst_of_bad_events_does_not_bar_the_way_of_the_others() {
    let lane = Running::start_by(Vec::new(), Box::new(refuse_bad), true);
    lane.send(&bad(200)).await;
    sleep(Duration::from_secs(20)).await;
    assert_eq!(lane.status.state(), ProviderState::Refusing, "nothing else could be said so far");
    assert_eq!(lane.kept.counts(), (0, 0));
    let start = Instant::now();
    let mut worst = Duration::ZERO;
    for sent in 1..=1200 {
        lane.send(&tracks(1)).await;
        let sent_at = Instant::now();
        while sent % 100 == 0 && lane.kept.counts().0 < sent {
            sleep(Duration::from_millis(100)).await;
        }
        worst = worst.max(sent_at.elapsed());
        sleep(Duration::from_secs(1)).await;
    }
    let (_, kept) = lane.finish().await;
    assert_eq!(kept.counts(), (1200, 200));
    assert!(worst < Duration::from_secs(120), "a good one waited {worst:?}");
    assert!(start.elapsed() < Duration::from_secs(3000), "{:?}", start.elapsed());
}

/// A few, and nothing to compare them with: they end as others do after five
/// attempts, and nobody is called.
#[tokio::test(start_paused = true)]
async fn a_bad_event_that_is_alone_becomes_a_dead_letter_after_its_attempts() {
    let lane = Running::start_by(Vec::new(), Box::new(refuse_bad), true);
    let start = Instant::now();
    lane.send(&bad(2)).await;
    while lane.kept.counts().1 < 2 {
        sleep(Duration::from_millis(100)).await;
        assert_eq!(lane.status.state(), ProviderState::Sending);
        assert!(start.elapsed() < Duration::from_secs(60));
    }
    let (_, kept) = lane.finish().await;
    assert!(kept.dead.lock().unwrap().iter().all(|letter| letter.attempts == 5));
}

/// Identifies and tracks go to one endpoint, and only identifies are refused.
#[tokio::test(start_paused = true)]
async fn a_kind_that_is_refused_waits_and_holds_up_no_other() {
    let (on, rule) = trouble(|batch| {
        if batch.iter().any(Event::is_identify) { refuse("400 no profiles") } else { deliver(batch) }
    });
    let lane = Running::start_by(Vec::new(), rule, false);
    let mut sent = 0;
    for round in 0..30 {
        lane.send(&[tracks(5), identifies(5), tracks(5)].concat()).await;
        sent += 10;
        sleep(Duration::from_secs(2)).await;
        if round > 5 {
            assert_eq!(lane.kept.counts(), (sent, 0), "round {round}: tracks go on");
        }
    }
    assert_eq!(lane.status.state(), ProviderState::Refusing);
    assert_eq!(lane.status.trouble().unwrap(), "refuses every identify: 400 no profiles");
    let requests = lane.provider.requests.lock().unwrap().len();
    on.store(false, Ordering::SeqCst);
    let status = lane.status.clone();
    let (provider, kept) = lane.finish().await;
    assert_eq!(kept.counts(), (450, 0));
    assert_eq!(status.state(), ProviderState::Sending);
    let back = provider.requests.lock().unwrap().len() - requests;
    assert!(back < 40, "{back} requests for 150 that had waited");
}

/// As behind a firewall that does not like one event's words and answers as the
/// provider answers a wrong key.
#[tokio::test(start_paused = true)]
async fn one_event_that_a_firewall_refuses_becomes_a_dead_letter_and_the_others_get_through() {
    let rule: Rule = Box::new(|batch| {
        let detail = "403 blocked".to_owned();
        if batch.iter().any(is_bad) { Err(SendError::Unauthorized { detail }) } else { deliver(batch) }
    });
    let lane = Running::start_by(Vec::new(), rule, true);
    let start = Instant::now();
    lane.send(&[tracks(20), bad(1), tracks(29)].concat()).await;
    for _ in 0..60 {
        lane.send(&tracks(1)).await;
        sleep(Duration::from_secs(1)).await;
    }
    let (_, kept) = lane.finish().await;
    assert_eq!(kept.counts(), (109, 1));
    assert!(start.elapsed() < Duration::from_secs(90), "{:?}", start.elapsed());
}

/// A wrong key at one endpoint: the others are tried with one event at a time.
#[tokio::test(start_paused = true)]
async fn a_refused_key_stops_the_whole_account() {
    let (on, rule) = trouble(|_| Err(SendError::Unauthorized { detail: "401 who are you".to_owned() }));
    let lane = Running::start_by(Vec::new(), rule, true);
    lane.send(&tracks(3)).await;
    sleep(Duration::from_secs(1)).await;
    lane.send(&identifies(30)).await;
    sleep(Duration::from_secs(300)).await;
    assert_eq!(lane.kept.counts(), (0, 0));
    assert_eq!(lane.status.state(), ProviderState::Paused);
    assert_eq!(lane.status.trouble().unwrap(), "refuses its key: 401 who are you");
    let requests = lane.provider.requests.lock().unwrap().clone();
    assert!((15..260).contains(&requests.len()), "probed, and each time a little later: {}", requests.len());
    assert!(requests[1..].iter().all(|(_, ids)| ids.len() <= 25), "by small probes");
    on.store(false, Ordering::SeqCst);
    let (_, kept) = lane.finish().await;
    assert_eq!(kept.counts(), (33, 0));
}

/// One event that something answers as a wrong key is answered, where nothing else of
/// its kind comes along: others show that the key is good, whether they go the same way
/// or another one.
#[tokio::test(start_paused = true)]
async fn one_event_that_looks_like_a_wrong_key_stops_the_others_for_moments() {
    for two_endpoints in [true, false] {
        let rule: Rule = Box::new(|batch| {
            let detail = "403 blocked".to_owned();
            let is_blocked = batch.iter().any(Event::is_identify);
            if is_blocked { Err(SendError::Unauthorized { detail }) } else { deliver(batch) }
        });
        let lane = Running::start_by(Vec::new(), rule, two_endpoints);
        lane.send(&identifies(1)).await;
        sleep(Duration::from_secs(5)).await;
        assert_eq!(lane.status.state(), ProviderState::Paused, "nothing else could be said so far");
        let mut paused = 0;
        for _ in 0..600 {
            lane.send(&tracks(1)).await;
            sleep(Duration::from_secs(1)).await;
            paused += u32::from(lane.status.state() == ProviderState::Paused);
        }
        assert!(paused < 5, "{two_endpoints}: paused for {paused} s");
        let (_, kept) = lane.finish().await;
        assert_eq!(kept.counts(), (600, 1), "{two_endpoints}");
        assert_eq!(kept.dead.lock().unwrap()[0].reason, DeadLetterReason::Invalid);
    }
}

/// A plan without profiles, say: the kind waits, and the others go on.
#[tokio::test(start_paused = true)]
async fn a_kind_that_is_answered_as_a_wrong_key_waits_and_holds_up_no_other() {
    for two_endpoints in [true, false] {
        let (on, rule) = trouble(|batch| {
            let detail = "403 not in your plan".to_owned();
            let is_refused = batch.iter().any(Event::is_identify);
            if is_refused { Err(SendError::Unauthorized { detail }) } else { deliver(batch) }
        });
        let lane = Running::start_by(Vec::new(), rule, two_endpoints);
        let mut sent = 0;
        for round in 0..60 {
            lane.send(&[tracks(5), identifies(2)].concat()).await;
            sent += 5;
            sleep(Duration::from_secs(2)).await;
            if round > 10 {
                assert!(lane.kept.counts().0 + 5 >= sent, "{two_endpoints}: round {round}: tracks go on");
                assert_eq!(lane.status.state(), ProviderState::Refusing);
            }
        }
        assert_eq!(lane.kept.counts().1, 0, "{two_endpoints}: it is no fault of the events");
        on.store(false, Ordering::SeqCst);
        let (_, kept) = lane.finish().await;
        assert_eq!(kept.counts(), (420, 0));
    }
}

/// The provider's two ways of refusing everything: in its answer to a batch, and by
/// naming each event.
fn refusals() -> [Rule; 2] {
    let named = |batch: &[Event]| {
        let verdict = Verdict::Rejected { reason: Rejection::Invalid, detail: "400 nope".into() };
        Ok(vec![verdict; batch.len()])
    };
    [Box::new(|_| refuse("400 nope")), Box::new(named)]
}

/// In the middle of trouble some requests get through: that is no proof against all
/// that were refused before.
#[tokio::test(start_paused = true)]
async fn a_success_now_and_then_in_trouble_costs_no_event() {
    for refusal in refusals() {
        let passes = Arc::new(AtomicBool::new(false));
        let pass = passes.clone();
        let (on, rule) =
            trouble(
                move |batch| {
                    if pass.swap(false, Ordering::SeqCst) { deliver(batch) } else { refusal(batch) }
                },
            );
        let lane = Running::start_by(Vec::new(), rule, true);
        for _ in 0..6 {
            lane.send(&tracks(100)).await;
        }
        for success in 0..10 {
            sleep(Duration::from_secs(120)).await;
            assert_eq!(lane.status.state(), ProviderState::Refusing, "{success}");
            passes.store(true, Ordering::SeqCst);
            lane.send(&tracks(3)).await;
        }
        sleep(Duration::from_secs(600)).await;
        let (delivered, dead) = lane.kept.counts();
        assert!(delivered >= 10 && dead == 0, "{delivered} delivered, {dead} dead");
        on.store(false, Ordering::SeqCst);
        let (_, kept) = lane.finish().await;
        assert_eq!(kept.counts(), (630, 0));
    }
}

/// Some nodes of the provider are broken: an event that one of them refuses is taken
/// by another. Until the first of those gets through, a few may look like bad ones.
#[tokio::test(start_paused = true)]
async fn a_provider_of_which_some_nodes_refuse_everything_costs_hardly_an_event() {
    let mut all_dead = 0;
    for seed in 0..16 {
        let broken = 1 + seed as u32 % 2;
        fastrand::seed(seed);
        let [in_all, named] = refusals();
        let refusal = if seed % 4 < 2 { in_all } else { named };
        let rng = Mutex::new(fastrand::Rng::with_seed(seed));
        let (on, rule) =
            trouble(
                move |batch| {
                    if rng.lock().unwrap().u32(0..3) < broken { refusal(batch) } else { deliver(batch) }
                },
            );
        let lane = Running::start_by(Vec::new(), rule, true);
        for _ in 0..600 {
            lane.send(&tracks(10)).await;
            sleep(Duration::from_secs(1)).await;
        }
        on.store(false, Ordering::SeqCst);
        let (_, kept) = lane.finish().await;
        let (delivered, dead) = kept.counts();
        assert!(delivered + dead == 6000 && dead <= 2, "seed {seed}: {delivered} delivered, {dead} dead");
        all_dead += dead;
    }
    assert!(all_dead <= 5, "{all_dead} of 96,000");
}

/// In memory a kind that is refused gets half of the lane; the other kind does not find
/// it full.
#[tokio::test(start_paused = true)]
async fn a_kind_that_is_refused_fills_its_share_of_the_lane_only() {
    let (_on, rule) = trouble(|batch| {
        if batch.iter().any(Event::is_identify) { refuse("400 no profiles") } else { deliver(batch) }
    });
    let lane = Running::start_by(Vec::new(), rule, false);
    for _ in 0..60 {
        lane.send(&[identifies(20), tracks(20)].concat()).await;
        sleep(Duration::from_secs(5)).await;
    }
    assert_eq!(lane.kept.delivered.lock().unwrap().len(), 1200);
    let dead = lane.kept.dead.lock().unwrap();
    assert_eq!(dead.len(), 700, "all but a half of the lane's thousand");
    assert!(
        dead.iter().all(|letter| letter.event.is_identify() && letter.reason == DeadLetterReason::LaneFull)
    );
}

/// What is refused when the relay stops is left for its next start, and not tried to
/// the last one.
#[tokio::test(start_paused = true)]
async fn a_drain_burns_nothing_that_is_refused() {
    for already in [true, false] {
        let (on, rule) = trouble(|_| refuse("400 nope"));
        on.store(already, Ordering::SeqCst);
        let lane = Running::start_by(Vec::new(), rule, true);
        if already {
            lane.send(&tracks(100)).await;
            sleep(Duration::from_secs(60)).await;
        }
        on.store(true, Ordering::SeqCst);
        let before = lane.provider.requests.lock().unwrap().len();
        lane.stop.drain();
        lane.send(&tracks(100)).await;
        drop(lane.inbox);
        let leftover = lane.lane.await.unwrap();
        assert_eq!(leftover.events.len(), if already { 200 } else { 100 });
        assert_eq!(lane.kept.counts(), (0, 0));
        let requests = lane.provider.requests.lock().unwrap().len() - before;
        assert!(requests < 30, "{requests} requests in a drain");
    }
}

/// Nothing is sent to a provider that a person has stopped; it waits, and is left for
/// the next start.
#[tokio::test(start_paused = true)]
async fn a_suspended_provider_gets_nothing_until_it_is_resumed() {
    for resumed in [true, false] {
        let (switch, suspended) = watch::channel(true);
        let lane = Running::start_suspended(suspended);
        lane.send(&tracks(60)).await;
        sleep(Duration::from_secs(3600)).await;
        assert_eq!(lane.provider.requests.lock().unwrap().len(), 0);
        assert_eq!(lane.status.state(), ProviderState::Suspended);
        if resumed {
            switch.send(false).unwrap();
            let (_, kept) = lane.finish().await;
            assert_eq!(kept.counts(), (60, 0));
            continue;
        }
        lane.stop.drain();
        drop(lane.inbox);
        assert_eq!(lane.lane.await.unwrap().events.len(), 60);
        assert_eq!(lane.provider.requests.lock().unwrap().len(), 0);
    }
}

/// The disk of one lane's dead letters hangs, or is full: the lane sends on, and
/// takes in what comes.
#[tokio::test(start_paused = true)]
async fn a_lane_does_not_wait_for_the_disk_of_its_dead_letters() {
    for disk in [Disk::Hangs, Disk::Fails(DropReason::DeadLetterFailed)] {
        let lane = Running::start_by(Vec::new(), Box::new(refuse_bad), true);
        *lane.kept.disk.lock().unwrap() = disk;
        lane.send(&[bad(1), tracks(9)].concat()).await;
        let start = Instant::now();
        for round in 1..=200 {
            lane.send(&tracks(10)).await;
            sleep(Duration::from_millis(100)).await;
            assert!(lane.kept.counts().0 >= 10 * (round - 1), "{disk:?}: round {round}");
        }
        assert!(start.elapsed() < Duration::from_secs(21), "{disk:?}: {:?}", start.elapsed());
        assert_eq!(lane.kept.counts(), (2009, 0));
        assert_eq!((lane.status.events(), lane.status.dead_letters_fail()), (1, disk != Disk::Hangs));
        lane.stop.drain();
        sleep(Duration::from_secs(8)).await;
        lane.stop.force();
        drop(lane.inbox);
        assert_eq!(lane.lane.await.unwrap().events.len(), 1, "it is spilled");
    }
}

/// A full lane whose letters' disk hangs has a bound; beyond it events are lost and
/// counted, and nobody waits.
#[tokio::test(start_paused = true)]
async fn what_a_full_lane_and_its_disk_have_no_room_for_is_counted() {
    let lane = Running::start_by(Vec::new(), Box::new(|_| refuse("400 nope")), true);
    *lane.kept.disk.lock().unwrap() = Disk::Hangs;
    for _ in 0..240 {
        lane.send(&tracks(50)).await;
        sleep(Duration::from_millis(10)).await;
    }
    let dropped = lane.kept.dropped.lock().unwrap().clone();
    assert!(dropped.iter().all(|(reason, _)| *reason == DropReason::DeadLettersStalled));
    assert_eq!(dropped.iter().map(|(_, events)| events).sum::<usize>(), 1000);
    assert_eq!(lane.status.events(), 11_000);
    lane.stop.force();
    drop(lane.inbox);
    assert_eq!(lane.lane.await.unwrap().events.len(), 11_000);
}

/// It names the first of each request and spares the others: so it refuses everything.
#[tokio::test(start_paused = true)]
async fn a_provider_that_names_one_event_of_each_request_costs_none() {
    let (is_trouble, rule) = trouble(|batch: &[Event]| {
        let mut verdicts = vec![Verdict::Resend; batch.len()];
        verdicts[0] = Verdict::Rejected { reason: Rejection::Invalid, detail: "400 no".into() };
        Ok(verdicts)
    });
    let lane = Running::start_by(Vec::new(), rule, true);
    lane.send(&tracks(60)).await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!((lane.kept.counts(), lane.status.state()), ((0, 0), ProviderState::Refusing));
    let requests = lane.provider.requests.lock().unwrap().len();
    // Each is named once, and from then on the provider is probed.
    assert!(requests < 250, "{requests} requests in ten minutes");
    is_trouble.store(false, Ordering::SeqCst);
    let (_, kept) = lane.finish().await;
    assert_eq!(kept.counts(), (60, 0));
}

/// What was refused in trouble is held against no event: it has its attempts yet when the
/// provider comes back by way of another failure.
#[tokio::test(start_paused = true)]
async fn one_failure_after_trouble_ends_no_event() {
    let answers = Arc::new(AtomicUsize::new(400));
    let says = answers.clone();
    let rule: Rule = Box::new(move |batch| match says.load(Ordering::SeqCst) {
        400 => refuse("400 no"),
        503 => Err(SendError::Unavailable { retry_after: None, detail: "503".into() }),
        _ => deliver(batch),
    });
    let lane = Running::start_by(Vec::new(), rule, true);
    lane.send(&tracks(5)).await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!((lane.kept.counts(), lane.status.state()), ((0, 0), ProviderState::Refusing));
    let before = lane.provider.requests.lock().unwrap().len();
    answers.store(503, Ordering::SeqCst);
    while lane.provider.requests.lock().unwrap().len() < before + 3 {
        sleep(Duration::from_secs(1)).await;
    }
    answers.store(200, Ordering::SeqCst);
    let (_, kept) = lane.finish().await;
    assert_eq!(kept.counts(), (5, 0));
}

/// One bad identify and no other beside it: tracks go on as fast as before.
#[tokio::test(start_paused = true)]
async fn a_lone_bad_event_of_its_kind_holds_up_no_other_kind() {
    let rule: Rule =
        Box::new(
            |batch| {
                if batch.iter().any(Event::is_identify) { refuse("400 no") } else { deliver(batch) }
            },
        );
    let suspended = watch::Sender::new(false).subscribe();
    let lane = Running::start_with(Vec::new(), rule, false, Duration::from_secs(1), suspended);
    lane.send(&[identify("ann")]).await;
    sleep(Duration::from_secs(3)).await;
    // More than one request at a time takes.
    for _ in 0..1500 {
        lane.send(&tracks(15)).await;
        sleep(Duration::from_millis(100)).await;
    }
    let (_, kept) = lane.finish().await;
    let dead = kept.dead.lock().unwrap();
    assert!(dead.iter().all(|letter| letter.event.is_identify()), "{} are dead", dead.len());
    assert_eq!(kept.delivered.lock().unwrap().len(), 22_500);
}

/// Requests are under way when a key is revoked, and one of them succeeds late: that
/// shows nothing of other routes, and the lane holds what it can.
#[tokio::test(start_paused = true)]
async fn a_late_success_of_its_own_route_halves_no_lane() {
    let first = AtomicBool::new(true);
    let rule: Rule = Box::new(move |batch| {
        if first.swap(false, Ordering::SeqCst) {
            deliver(batch)
        } else {
            Err(SendError::Unauthorized { detail: "401".into() })
        }
    });
    let kept = Arc::new(Kept::default());
    let status = Arc::new(LaneStatus::new("scripted"));
    let (inbox, lane) = lane_to(Arc::new(FirstIsLate { rule }), kept.clone(), status, Stop::default());
    let lane = tokio::spawn(lane.run());
    let queued = |event: Event| Queued { event, place: Place::MEMORY };
    inbox.send(tracks(20).into_iter().map(queued).collect()).await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(kept.counts(), (10, 0), "the late one");
    for _ in 0..18 {
        inbox.send(tracks(50).into_iter().map(queued).collect()).await;
        sleep(Duration::from_secs(1)).await;
    }
    sleep(Duration::from_secs(10)).await;
    assert_eq!(kept.counts(), (10, 0), "910 in a lane for 1,000");
    lane.abort();
}

/// Its first answer comes after others that were asked for later.
struct FirstIsLate {
    rule: Rule,
}

#[async_trait]
impl Provider for FirstIsLate {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits { events_max: 10, body_bytes_max: 1 << 20, requests_max: 2 }
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let answer = (self.rule)(batch);
        if answer.is_ok() {
            sleep(Duration::from_secs(2)).await;
        }
        answer
    }
}
