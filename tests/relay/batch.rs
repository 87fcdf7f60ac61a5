//! Batches and streams of batches: an answer for each item, and the same promise.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::{
        AliasRequest, Durability, EventContext, GroupRequest, IdentifyUserRequest, TrackBatchItem,
        TrackBatchRequest, TrackEventRequest, ViewRequest, track_batch_answer::Answer,
        track_batch_item::Item,
    },
    providers::sandbox::{TakenKind, Vendor},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};
use tonic_types::StatusExt;

use crate::harness::{Client, Observer, Relay, Setup, batch, eventually, taken, track, track_item};

const PATIENCE: Duration = Duration::from_secs(30);

fn all(setup: &Setup, fault: Option<&str>) {
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, fault.map(|fault| fault.parse().unwrap()));
    }
}

fn reasons(answers: &[analytics_relay::proto::v1::TrackBatchAnswer]) -> Vec<String> {
    let reason = |answer: &Answer| match answer {
        Answer::Accepted(_) => "accepted".to_owned(),
        Answer::Refused(refused) => refused.violations[0].reason.clone(),
        Answer::Deferred(deferred) => deferred.reason.clone(),
    };
    answers.iter().map(|answer| reason(answer.answer.as_ref().unwrap())).collect()
}

/// Every kind of event: each provider gets those that it has a form for, in that form,
/// and the others are counted there and nowhere lost.
#[tokio::test]
async fn every_kind_of_event_reaches_the_providers_that_have_a_form_for_it() {
    for durability in ["memory", "written"] {
        let mut setup = Setup::new().await;
        setup.set("DURABILITY", durability);
        let relay = setup.start().await;
        let context = EventContext {
            json: br#"{"locale":"de-DE","page":{"url":"https://x.example/pricing"}}"#.into(),
            ..Default::default()
        };
        let view = |id: &str| ViewRequest {
            name: "Pricing".into(),
            category: "Docs".into(),
            user_id: "user-1".into(),
            properties_json: br#"{"url":"https://x.example/pricing"}"#.into(),
            event_id: id.into(),
            context: Some(context.clone()),
            ..Default::default()
        };
        let group = GroupRequest {
            group_id: "acme".into(),
            user_id: "user-1".into(),
            properties_json: br#"{"plan":"pro"}"#.into(),
            event_id: "group-1-of-acme-long".into(),
            ..Default::default()
        };
        let alias = AliasRequest {
            previous_id: "user-0".into(),
            user_id: "user-1".into(),
            event_id: "alias-1-of-user-1-long".into(),
            ..Default::default()
        };
        let items = [
            Item::Page(view("page-1-of-user-1-long")),
            Item::Screen(view("screen-1-of-user-1-long")),
            Item::Group(group.clone()),
            Item::Alias(alias.clone()),
            Item::Group(GroupRequest { group_id: String::new(), ..group }),
            Item::Alias(AliasRequest { previous_id: "user-1".into(), ..alias }),
        ];
        let (ids, request) = batch(items.map(|item| TrackBatchItem { item: Some(item) }));
        let answers = relay.client().track_batch(request).await.unwrap().into_inner().answers;
        let want = ["accepted", "accepted", "accepted", "accepted", "GROUP_ID_MISSING", "ALIAS_OF_ITSELF"];
        assert_eq!(reasons(&answers), want);

        taken(&setup, Vendor::Segment, 4).await;
        for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
            relay.settled(vendor, 4).await;
        }
        let ended = relay.terminate().await;
        assert_eq!(ended.code, 0);
        let segment = setup.sandbox.taken(Vendor::Segment);
        let kinds: HashMap<&str, TakenKind> = segment.iter().map(|taken| (&*taken.id, taken.kind)).collect();
        let wanted = [TakenKind::Page, TakenKind::Screen, TakenKind::Group, TakenKind::Alias];
        for (id, kind) in ids.iter().zip(wanted) {
            assert_eq!(kinds.get(&**id), Some(&kind), "{id}");
        }
        let page = segment.iter().find(|taken| taken.kind == TakenKind::Page).unwrap();
        assert_eq!(
            (&page.event["name"], &page.event["context"]["locale"]),
            (&"Pricing".into(), &"de-DE".into())
        );
        for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
            let mut names: Vec<String> =
                setup.sandbox.taken(vendor).into_iter().map(|taken| taken.name).collect();
            names.sort_unstable();
            assert_eq!(names, ["Loaded a Page", "Loaded a Screen"], "{vendor:?}");
            let balance = ended.balance(vendor);
            assert_eq!((balance.delivered, balance.not_for, balance.dropped), (2, 2, 0), "{balance:?}");
            assert!(balance.is_exact());
        }
        assert_eq!(
            (ended.balance(Vendor::Segment).delivered, ended.balance(Vendor::Segment).not_for),
            (4, 0)
        );
    }
}

/// Tracks and identifies in one batch; a bad item refuses itself alone, and
/// says why as a unary call would.
#[tokio::test]
async fn a_batch_has_an_answer_for_each_item() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let identify = IdentifyUserRequest {
        user_id: "user-1".into(),
        event_id: "identify-1-of-user-1".into(),
        properties_json: br#"{"plan": "pro", "seats": 9007199254740993}"#.into(),
        ..Default::default()
    };
    let too_long = TrackEventRequest { user_id: "u".repeat(256), ..track("x", "") };
    let bad_json =
        TrackEventRequest { properties_json: b"[1]".into(), properties: [].into(), ..track("x", "u") };
    let (ids, request) = batch([
        track_item("Order Placed", "user-1"),
        TrackBatchItem { item: Some(Item::Track(too_long)) },
        TrackBatchItem { item: Some(Item::Identify(identify)) },
        TrackBatchItem { item: None },
        TrackBatchItem { item: Some(Item::Track(bad_json)) },
        track_item("Order Paid", "user-1"),
    ]);
    let response = relay.client().track_batch(request).await.unwrap().into_inner();
    assert_eq!(
        reasons(&response.answers),
        ["accepted", "ID_TOO_LONG", "accepted", "ITEM_MISSING", "PROPERTIES_MALFORMED", "accepted"]
    );
    assert_eq!(response.retry_delay_ms, 0, "nothing is to be sent again");
    let Some(Answer::Refused(refused)) = &response.answers[1].answer else { panic!("{response:?}") };
    let violation = &refused.violations[0];
    assert_eq!(violation.field, "user_id");
    assert_eq!(violation.description, "got 256 bytes, want at most 255 bytes");
    let Some(Answer::Accepted(accepted)) = &response.answers[0].answer else { panic!("{response:?}") };
    assert_eq!(accepted.durability(), Durability::Queued);
    observer.batch(&ids, &response);

    // The JSON went through as it was.
    eventually("the identify", || setup.sandbox.stats(Vendor::Segment).taken >= 3).await;
    let identified = setup
        .sandbox
        .taken(Vendor::Segment)
        .into_iter()
        .find(|taken| taken.id == "identify-1-of-user-1")
        .unwrap();
    let text = serde_json::to_string(&identified.event).unwrap();
    assert!(text.contains("9007199254740993"), "{text}");
    assert!((relay.metric("relay_refusals_total", &["ID_TOO_LONG"]).await - 1.0).abs() < 0.5);
    assert!((relay.metric("relay_requests_total", &["TrackBatch", "OK"]).await - 1.0).abs() < 0.5);
    let ended = relay.terminate().await;
    // Mixpanel's profile updates carry no id.
    observer.check(&setup, Vendor::Segment);
    for vendor in Vendor::ALL {
        let balance = ended.balance(vendor);
        assert!(balance.is_exact() && balance.accepted == 3, "{balance:?}");
    }
}

#[tokio::test]
async fn a_batch_beyond_the_limits_is_refused_as_a_whole() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut client = relay.client();
    let (_, many) = batch((0..1001).map(|_| track_item("x", "u")));
    let status = client.track_batch(many).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(status.message(), "items: got 1001 items, want at most 1000");
    assert_eq!(status.get_error_details().error_info().unwrap().reason, "BATCH_TOO_LARGE");

    let wide = TrackEventRequest { properties_json: vec![b' '; 1 << 20], ..track("x", "u") };
    let (_, wide) = batch([TrackBatchItem { item: Some(Item::Track(wide)) }]);
    assert_eq!(client.track_batch(wide).await.unwrap_err().code(), Code::OutOfRange);

    assert!(client.track_batch(TrackBatchRequest::default()).await.unwrap().into_inner().answers.is_empty());
    let mut observer = Observer::default();
    let (ids, most) = batch((0..1000).map(|_| track_item("x", "u")));
    observer.batch(&ids, &client.track_batch(most).await.unwrap().into_inner());
    assert_eq!(observer.accepted.len(), 1000);
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
}

/// From the first item that there is no room for, none is taken: what is sent
/// again as it was answered arrives in its order.
#[tokio::test]
async fn what_a_full_queue_defers_is_a_tail_and_can_be_sent_again() {
    let mut setup = Setup::new().await;
    setup.set("QUEUE_MAX_EVENTS", "20").set("BATCH_SIZE", "5");
    all(&setup, Some("stall"));
    let relay = setup.start().await;
    let mut client = relay.client();
    let mut observer = Observer::default();
    let mut items: Vec<_> = (0..300).map(|index| track_item(&format!("{index}"), "user-1")).collect();
    let (mut deferrals, start) = (0, Instant::now());
    while !items.is_empty() {
        let (ids, request) = batch(items.clone());
        let response = client.track_batch(request).await.unwrap().into_inner();
        observer.batch(&ids, &response);
        let reasons = reasons(&response.answers);
        let taken = reasons.iter().take_while(|reason| *reason == "accepted").count();
        assert!(reasons[taken..].iter().all(|reason| reason == "QUEUE_FULL"), "{reasons:?}");
        assert_eq!(response.retry_delay_ms > 0, taken < items.len());
        items.drain(..taken);
        if !items.is_empty() {
            deferrals += 1;
            all(&setup, None);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(start.elapsed() < PATIENCE, "{} are left", items.len());
    }
    assert!(deferrals > 0, "the queue was never full");
    assert_eq!((observer.accepted.len(), observer.refused.len()), (300, 0));
    let ended = relay.terminate().await;
    observer.check(&setup, Vendor::Segment);
    assert!(ended.balance(Vendor::Segment).is_exact());
}

/// A stream to a relay; batches in, answers out.
struct Streamed {
    batches: mpsc::Sender<TrackBatchRequest>,
    answers: Streaming<analytics_relay::proto::v1::TrackBatchResponse>,
}

impl Streamed {
    async fn open(relay: &Relay) -> Self {
        let (batches, requests) = mpsc::channel(4);
        let answers = relay.client().track_stream(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Self { batches, answers }
    }
}

#[tokio::test]
async fn a_stream_answers_in_order_and_ends_with_its_caller() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let Streamed { batches, mut answers } = Streamed::open(&relay).await;
    let sent: Vec<_> = (1..30).map(|size| batch((0..size).map(|_| track_item("x", "u")))).collect();
    let requests: Vec<_> = sent.iter().map(|(_, request)| request.clone()).collect();
    tokio::spawn(async move {
        for request in requests {
            batches.send(request).await.unwrap();
        }
    });
    for (ids, _) in &sent {
        let response = timeout(PATIENCE, answers.message()).await.unwrap().unwrap().unwrap();
        observer.batch(ids, &response);
    }
    assert_eq!(timeout(PATIENCE, answers.message()).await.unwrap().unwrap(), None, "ended with OK");
    assert_eq!(observer.accepted.len(), (1..30).sum::<usize>());
    let streams = relay.metric("relay_requests_total", &["TrackStream", "\"OK\""]).await;
    assert!((streams - 1.0).abs() < 0.5, "{streams} streams");
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
}

/// What came before a batch that breaks a limit is answered, what came behind
/// it is not taken.
#[tokio::test]
async fn a_batch_beyond_the_limits_ends_its_stream_and_no_other() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let (ids, good) = batch([track_item("x", "u")]);
    for (bad, code) in [
        (batch((0..1001).map(|_| track_item("x", "u"))).1, Code::InvalidArgument),
        (batch((0..800).map(|_| track_item(&"x".repeat(2000), "u"))).1, Code::OutOfRange),
    ] {
        let Streamed { batches, mut answers } = Streamed::open(&relay).await;
        for request in [good.clone(), bad, batch([track_item("behind", "u")]).1] {
            batches.send(request).await.unwrap();
        }
        let response = timeout(PATIENCE, answers.message()).await.unwrap().unwrap().unwrap();
        observer.batch(&ids, &response);
        let status = timeout(PATIENCE, answers.message()).await.unwrap().unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
    }
    for code in ["INVALID_ARGUMENT", "OUT_OF_RANGE"] {
        let streams = relay.metric("relay_requests_total", &["TrackStream", code]).await;
        assert!((streams - 1.0).abs() < 0.5, "{streams} streams ended with {code}");
    }
    assert!(relay.metric("relay_refusals_total", &["BATCH_TOO_LARGE"]).await > 0.5);
    taken(&setup, Vendor::Segment, 1).await;
    let ended = relay.terminate().await;
    // The same event twice, and nothing else.
    observer.check(&setup, Vendor::Segment);
    assert_eq!(ended.balance(Vendor::Segment).accepted, 2);
}

/// SIGTERM while batches are on their way in: each is answered, or was not
/// taken.
#[tokio::test]
async fn a_draining_relay_answers_what_it_took_of_a_stream() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let Streamed { batches, mut answers } = Streamed::open(&relay).await;
    let (told, mut sent) = mpsc::unbounded_channel();
    let caller = tokio::spawn(async move {
        loop {
            let (ids, request) = batch((0..50).map(|_| track_item("x", "u")));
            told.send(ids).unwrap();
            if batches.send(request).await.is_err() {
                return;
            }
        }
    });
    let started = Instant::now();
    let mut is_told = false;
    let status = loop {
        match timeout(PATIENCE, answers.message()).await.unwrap() {
            Ok(Some(response)) => observer.batch(&sent.recv().await.unwrap(), &response),
            Ok(None) => panic!("ended without a word"),
            Err(status) => break status,
        }
        if !is_told && observer.accepted.len() >= 2000 {
            relay.signal("TERM");
            is_told = true;
        }
    };
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.get_error_details().error_info().unwrap().reason, "DRAINING");
    caller.abort();
    let ended = relay.ended(started).await;
    assert_eq!(ended.code, 0);
    for vendor in Vendor::ALL {
        // Nothing that was not answered has arrived: it is neither accepted nor unknown.
        observer.check(&setup, vendor);
        let balance = ended.balance(vendor);
        assert!(balance.is_exact() && balance.accepted == observer.accepted.len() as u64, "{balance:?}");
    }
}

/// A batch that is answered SYNCED survives SIGKILL.
#[tokio::test]
async fn a_synced_batch_survives_sigkill() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "synced");
    all(&setup, Some("503"));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    let Streamed { batches, mut answers } = Streamed::open(&relay).await;
    for _ in 0..20 {
        let (ids, request) = batch((0..50).map(|_| track_item("x", "u")));
        batches.send(request).await.unwrap();
        let response = timeout(PATIENCE, answers.message()).await.unwrap().unwrap().unwrap();
        let synced =
            |answer: &Answer| matches!(answer, Answer::Accepted(a) if a.durability() == Durability::Synced);
        assert!(response.answers.iter().all(|answer| synced(answer.answer.as_ref().unwrap())));
        observer.batch(&ids, &response);
    }
    relay.signal("KILL");
    relay.ended(Instant::now()).await;
    all(&setup, None);
    let relay = setup.start().await;
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 1000).await;
    }
    let ended = relay.terminate().await;
    for vendor in Vendor::ALL {
        assert_eq!(observer.check(&setup, vendor).delivered, 1000);
        assert!(ended.balance(vendor).is_exact());
    }
}

/// A log that is full now and then, and levels that are answered at different
/// times: what is deferred is a tail all the same.
#[tokio::test]
async fn what_a_full_log_defers_is_a_tail_too() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "synced").set("ANALYTICS_PROVIDER", "segment");
    setup.set("SPOOL_SEGMENT_BYTES", "65536").set("SEGMENT_SPOOL_MAX_BYTES", "200000");
    setup.set("SPOOL_WHEN_FULL", "reject");
    let relay = setup.start().await;
    let (seen, mut callers) = (Arc::new(Seen::default()), tokio::task::JoinSet::new());
    for _ in 0..4 {
        callers.spawn(send_until_all_was_seen(relay.client(), seen.clone()));
    }
    // Down until the log is full, up until it has room, again and again: it comes to its end
    // within a batch now and then.
    let start = Instant::now();
    while !seen.is_all() {
        let Counts { whole, none, .. } = seen.counts();
        all(&setup, Some("503"));
        eventually("a batch that is deferred", || seen.counts().none > none || seen.is_all()).await;
        all(&setup, None);
        eventually("a batch that is taken", || seen.counts().whole > whole || seen.is_all()).await;
        assert!(start.elapsed() < 2 * PATIENCE, "{:?}", seen.counts());
    }
    let mut observer = Observer::default();
    while let Some(caller) = callers.join_next().await {
        observer.add(caller.unwrap());
    }
    println!("{:?}, {} items deferred", seen.counts(), observer.refused.len());
    let ended = relay.terminate().await;
    observer.check(&setup, Vendor::Segment);
    assert!(ended.balance(Vendor::Segment).is_exact());
}

/// How batches were answered.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    whole: u64,
    /// Deferred from some item on.
    in_part: u64,
    /// Deferred from the first item on.
    none: u64,
}

#[derive(Default)]
struct Seen(Mutex<Counts>);

impl Seen {
    fn counts(&self) -> Counts {
        *self.0.lock().unwrap()
    }

    fn is_all(&self) -> bool {
        let Counts { whole, in_part, none } = self.counts();
        whole >= 20 && in_part >= 3 && none > 0
    }
}

/// Batches of all levels; what a full log leaves out of each is its tail.
async fn send_until_all_was_seen(mut client: Client, seen: Arc<Seen>) -> Observer {
    let mut observer = Observer::default();
    while !seen.is_all() {
        let levels = [Durability::Synced, Durability::Queued, Durability::Written];
        let item = |index: usize| {
            let durability = levels[index % 3].into();
            let track = TrackEventRequest { durability, ..track("x", "u") };
            TrackBatchItem { item: Some(Item::Track(track)) }
        };
        let (ids, request) = batch((0..90).map(item));
        let response = client.track_batch(request).await.unwrap().into_inner();
        observer.batch(&ids, &response);
        let reasons = reasons(&response.answers);
        let taken = reasons.iter().take_while(|reason| *reason == "accepted").count();
        assert!(reasons[taken..].iter().all(|reason| reason == "SPOOL_FULL"), "{reasons:?}");
        let is_none = taken == 0;
        {
            let mut counts = seen.0.lock().unwrap();
            let count = match taken {
                90 => &mut counts.whole,
                0 => &mut counts.none,
                _ => &mut counts.in_part,
            };
            *count += 1;
        }
        if is_none {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    observer
}
