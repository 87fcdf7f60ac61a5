//! The batching client against a relay that is there, away, full and killed, over
//! TLS, and against something that is no relay.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use analytics_relay::{
    client::{BatchingClient, ClientIdentity, ClientSettings, ClientTls, Counters, NotQueued},
    proto::v1::{
        EventAccepted, IdentifyUserRequest, TrackBatchAnswer, TrackBatchRequest, TrackBatchResponse,
        TrackEventRequest, track_batch_answer::Answer,
    },
    providers::sandbox::Vendor,
};
use bytes::Bytes;
use h2::server::SendResponse;
use prost::Message;
use tokio::time::{sleep, timeout};
use tonic::codegen::http::{HeaderMap, Response};

use crate::{
    harness::{Relay, Setup, taken},
    tls::{Authority, setup_with},
};

const PATIENCE: Duration = Duration::from_secs(30);

fn client(relay: &Relay, settings: ClientSettings) -> BatchingClient {
    BatchingClient::new(&format!("http://{}", relay.grpc_addr), settings).unwrap()
}

fn order(number: usize) -> TrackEventRequest {
    TrackEventRequest { event_name: format!("{number}"), user_id: "user-1".into(), ..Default::default() }
}

fn check_balance(counters: Counters) {
    let Counters { queued, accepted, refused, abandoned, waiting, .. } = counters;
    assert_eq!(queued, accepted + refused + abandoned + waiting, "{counters:?}");
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn events_travel_in_batches_and_close_sends_the_rest() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let analytics = client(&relay, ClientSettings::default());
    let mut ids = Vec::new();
    for number in 0..1000 {
        ids.push(analytics.track(order(number)).unwrap());
    }
    let traits = br#"{"plan":"pro"}"#.to_vec();
    let identify =
        IdentifyUserRequest { user_id: "user-1".into(), properties_json: traits, ..Default::default() };
    ids.push(analytics.identify(identify).unwrap());
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!(counters, Counters { queued: 1001, accepted: 1001, ..Counters::default() });

    let calls = relay.metric("relay_requests_total", &["TrackBatch", "OK"]).await;
    assert!((10.0..20.0).contains(&calls), "{calls} calls");
    taken(&setup, Vendor::Segment, 1001).await;
    let mut found: Vec<_> = setup.sandbox.taken(Vendor::Segment).into_iter().map(|taken| taken.id).collect();
    found.sort();
    ids.sort();
    assert_eq!(found, ids);
    relay.terminate().await;
}

#[tokio::test]
async fn a_few_events_are_sent_after_the_interval_or_at_a_flush() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let analytics = client(&relay, ClientSettings::default());
    analytics.track(order(0)).unwrap();
    let start = Instant::now();
    while analytics.counters().accepted < 1 {
        assert!(start.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
    let never = Duration::from_secs(3600);
    let patient = client(&relay, ClientSettings { flush_interval: never, ..ClientSettings::default() });
    patient.track(order(1)).unwrap();
    patient.track(order(2)).unwrap();
    assert!(patient.flush(PATIENCE).await, "a flush does not wait for the interval");
    assert_eq!(patient.counters().accepted, 2);
    assert!(patient.flush(PATIENCE).await, "with nothing to send it returns");
    relay.terminate().await;
}

/// The relay is not there yet, then it is, is killed and comes back: a durable
/// relay has everything, once.
#[tokio::test]
async fn a_relay_that_is_away_costs_time_and_no_event() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "synced").set("GRPC_PORT", &free_port().to_string());
    let addr = format!("http://127.0.0.1:{}", setup.vars["GRPC_PORT"]);
    let settings = ClientSettings {
        batch_events_max: 20,
        flush_interval: Duration::from_millis(5),
        call_timeout: Duration::from_secs(2),
        retry_delay_max: Duration::from_millis(200),
        ..ClientSettings::default()
    };
    let analytics = BatchingClient::new(&addr, settings).unwrap();
    for number in 0..500 {
        analytics.track(order(number)).unwrap();
    }
    while analytics.counters().retries == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(analytics.counters().waiting, 500, "nobody is there");
    let relay = setup.start().await;
    while analytics.counters().accepted == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    relay.signal("KILL");
    relay.ended(Instant::now()).await;
    for number in 500..1000 {
        analytics.track(order(number)).unwrap();
    }
    let relay = setup.start().await;
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!((counters.queued, counters.accepted, counters.waiting), (1000, 1000, 0), "{counters:?}");
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 1000).await;
        assert_eq!(setup.sandbox.stats(vendor).taken, 1000, "each once");
    }
    relay.terminate().await;
}

#[tokio::test]
async fn a_full_queue_drops_and_counts_and_close_has_an_end() {
    let settings = ClientSettings { queue_events_max: 50, ..ClientSettings::default() };
    let analytics = BatchingClient::new(&format!("http://127.0.0.1:{}", free_port()), settings).unwrap();
    let results: Vec<_> = (0..200).map(|number| analytics.track(order(number))).collect();
    assert_eq!(results.iter().filter(|result| **result == Err(NotQueued::Full)).count(), 150);
    sleep(Duration::from_millis(300)).await;
    let start = Instant::now();
    let counters = timeout(PATIENCE, analytics.close(Duration::from_millis(200))).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!((counters.queued, counters.abandoned, counters.dropped), (50, 50, 150), "{counters:?}");
    check_balance(counters);

    let bytes = ClientSettings { queue_bytes_max: 1000, ..ClientSettings::default() };
    let analytics = BatchingClient::new(&format!("http://127.0.0.1:{}", free_port()), bytes).unwrap();
    let wide = TrackEventRequest { properties_json: vec![b' '; 900], ..order(0) };
    analytics.track(wide.clone()).unwrap();
    assert_eq!(analytics.track(wide), Err(NotQueued::Full));
}

/// A full relay makes the client wait and send again, in order.
#[tokio::test]
async fn a_full_relay_is_waited_for() {
    let mut setup = Setup::new().await;
    setup.set("QUEUE_MAX_EVENTS", "10").set("BATCH_SIZE", "5");
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, Some("stall".parse().unwrap()));
    }
    let relay = setup.start().await;
    let analytics = client(&relay, ClientSettings::default());
    for number in 0..300 {
        analytics.track(order(number)).unwrap();
    }
    while analytics.counters().retries == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    assert!(relay.metric("relay_refusals_total", &["QUEUE_FULL"]).await > 0.0);
    Vendor::ALL.into_iter().for_each(|vendor| setup.sandbox.always(vendor, None));
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!((counters.accepted, counters.refused, counters.abandoned), (300, 0, 0), "{counters:?}");
    relay.terminate().await;
}

/// What breaks a rule, or the limit of a message, ends alone.
#[tokio::test]
async fn refused_events_are_counted_and_hold_up_nothing() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let analytics = client(&relay, ClientSettings::default());
    analytics.track(order(0)).unwrap();
    analytics.track(TrackEventRequest::default()).unwrap();
    let huge = TrackEventRequest { properties_json: vec![b' '; 3 << 19], ..order(1) };
    analytics.track(huge).unwrap();
    analytics.track(order(2)).unwrap();
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!((counters.accepted, counters.refused, counters.abandoned), (2, 2, 0), "{counters:?}");
    check_balance(counters);
    relay.terminate().await;
}

/// What a fake answers to a batch: a response, or a status' code and message.
type FakeAnswer = Result<TrackBatchResponse, (u16, &'static str)>;

/// Something that speaks gRPC and answers each batch, and its size, as it is told.
async fn fake(answer: impl Fn(TrackBatchRequest, usize) -> FakeAnswer + Send + Sync + 'static) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, reply))) = connection.accept().await {
                    let (mut body, mut message) = (request.into_body(), Vec::new());
                    let answer = answer.clone();
                    tokio::spawn(async move {
                        while let Some(Ok(part)) = body.data().await {
                            body.flow_control().release_capacity(part.len()).unwrap();
                            message.extend_from_slice(&part);
                        }
                        // Behind a flag and a length.
                        let batch = TrackBatchRequest::decode(&message[5..]).unwrap();
                        reply_with(reply, answer(batch, message.len()));
                    });
                }
            });
        }
    });
    addr
}

fn reply_with(mut reply: SendResponse<Bytes>, answer: FakeAnswer) {
    let head = Response::builder().header("content-type", "application/grpc").body(()).unwrap();
    let mut body = reply.send_response(head, false).unwrap();
    let mut trailers = HeaderMap::new();
    let (code, said) = answer.as_ref().err().copied().unwrap_or((0, ""));
    trailers.insert("grpc-status", code.into());
    trailers.insert("grpc-message", said.parse().unwrap());
    if let Ok(response) = answer {
        let message = response.encode_to_vec();
        let mut framed = vec![0];
        framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
        framed.extend_from_slice(&message);
        body.send_data(framed.into(), false).unwrap();
    }
    body.send_trailers(trailers).unwrap();
}

fn accepted(batch: &TrackBatchRequest) -> TrackBatchResponse {
    let accepted = TrackBatchAnswer { answer: Some(Answer::Accepted(EventAccepted::default())) };
    TrackBatchResponse { answers: vec![accepted; batch.items.len()], retry_delay_ms: 0 }
}

/// Answers of a newer relay, or of something that is none: the events are kept, and
/// sent again with a growing delay, not in a loop.
#[tokio::test]
async fn answers_that_nobody_knows_are_waited_out() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let addr = fake(move |batch, _| {
        let call = counted.fetch_add(1, Ordering::SeqCst);
        let unset = vec![TrackBatchAnswer::default(); batch.items.len()];
        Ok(if call < 3 { TrackBatchResponse { answers: unset, retry_delay_ms: 0 } } else { accepted(&batch) })
    })
    .await;
    let analytics = BatchingClient::new(&format!("http://{addr}"), ClientSettings::default()).unwrap();
    for number in 0..10 {
        analytics.track(order(number)).unwrap();
    }
    let start = Instant::now();
    assert!(!analytics.flush(Duration::from_millis(50)).await, "a flush has an end");
    while calls.load(Ordering::SeqCst) < 2 {
        assert!(start.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(analytics.counters().waiting, 10);
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!((counters.accepted, counters.retries), (10, 3), "{counters:?}");
    // Of three delays a flush may cut one short and the end another.
    assert!(start.elapsed() >= Duration::from_millis(100), "{:?}", start.elapsed());
    assert_eq!(calls.load(Ordering::SeqCst), 4);
}

/// A proxy that takes fewer bytes than the relay: what is too large for it is split,
/// and one event that is too large by itself ends alone.
#[tokio::test]
async fn what_is_too_large_for_a_proxy_is_split() {
    const BYTES_MAX: usize = 4000;
    let refused = Arc::new(AtomicUsize::new(0));
    for (code, said) in
        [(8, "grpc: received message larger than max (5000 vs. 4000)"), (2, "request entity too large")]
    {
        let counted = refused.clone();
        let addr = fake(move |batch, bytes| {
            if bytes > BYTES_MAX {
                counted.fetch_add(1, Ordering::SeqCst);
                return Err((code, said));
            }
            Ok(accepted(&batch))
        })
        .await;
        let analytics = BatchingClient::new(&format!("http://{addr}"), ClientSettings::default()).unwrap();
        for number in 0..200 {
            let bytes = if number == 100 { 2 * BYTES_MAX } else { 100 };
            analytics
                .track(TrackEventRequest { properties_json: vec![b' '; bytes], ..order(number) })
                .unwrap();
        }
        let start = Instant::now();
        let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
        assert_eq!((counters.accepted, counters.refused, counters.abandoned), (199, 1, 0), "{counters:?}");
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        let refused = refused.swap(0, Ordering::SeqCst);
        assert!((2..40).contains(&refused), "{refused} calls were too large");
    }
}

/// A connection that was made and on which nothing ever comes is left for another.
#[tokio::test]
async fn a_connection_that_hangs_is_left() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let relay_addr = relay.grpc_addr;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (_hangs, _) = listener.accept().await.unwrap();
        loop {
            let (mut caller, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut relay = tokio::net::TcpStream::connect(relay_addr).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut caller, &mut relay).await;
            });
        }
    });
    let settings = ClientSettings { call_timeout: Duration::from_millis(300), ..ClientSettings::default() };
    let analytics = BatchingClient::new(&format!("http://{addr}"), settings).unwrap();
    analytics.track(order(0)).unwrap();
    // Longer than it takes, and shorter than until a keep-alive would be missed.
    assert!(analytics.flush(Duration::from_secs(15)).await, "{:?}", analytics.counters());
    relay.terminate().await;
}

#[tokio::test]
async fn events_travel_over_tls_to_a_relay_that_is_believed() {
    let (authority, callers) = (Authority::new(), Authority::new());
    let mut setup = setup_with(&authority).await;
    let callers_file = setup.data.path().join("callers.pem");
    std::fs::write(&callers_file, callers.pem()).unwrap();
    setup.set("GRPC_TLS_CLIENT_CA_FILE", callers_file.to_str().unwrap());
    let relay = setup.start().await;
    let addr = format!("https://{}", relay.grpc_addr);
    let caller = callers.issue("caller");
    let identity = ClientIdentity { cert_pem: caller.cert.into_bytes(), key_pem: caller.key.into_bytes() };
    let tls = |ca: &Authority| ClientTls {
        ca_pem: Some(ca.pem().into_bytes()),
        identity: Some(identity.clone()),
        domain: Some("localhost".to_owned()),
    };
    let settings = |tls| ClientSettings { tls, ..ClientSettings::default() };
    let analytics = BatchingClient::new(&addr, settings(tls(&authority))).unwrap();
    for number in 0..150 {
        analytics.track(order(number)).unwrap();
    }
    let counters = timeout(PATIENCE, analytics.close(PATIENCE)).await.unwrap();
    assert_eq!((counters.accepted, counters.retries), (150, 0), "{counters:?}");
    taken(&setup, Vendor::Segment, 150).await;

    // Nobody who is not believed gets events, and no caller without a certificate gets in.
    let stranger = settings(tls(&Authority::new()));
    let nameless = settings(ClientTls { identity: None, ..tls(&authority) });
    for settings in [stranger, nameless] {
        let analytics = BatchingClient::new(&addr, settings).unwrap();
        analytics.track(order(0)).unwrap();
        while analytics.counters().retries == 0 {
            sleep(Duration::from_millis(5)).await;
        }
        let counters = timeout(PATIENCE, analytics.close(Duration::from_millis(100))).await.unwrap();
        assert_eq!((counters.accepted, counters.abandoned), (0, 1), "{counters:?}");
    }
    relay.terminate().await;
}

#[tokio::test]
async fn an_address_that_can_never_work_is_an_error_and_not_a_silence() {
    for addr in ["relay:50054", "ftp://relay:50054", "http://relay:50054/api"] {
        let error = BatchingClient::new(addr, ClientSettings::default()).unwrap_err().to_string();
        assert!(error.starts_with("the relay's address: got"), "{addr}: {error}");
    }
}

/// A program that ends without closing its client ends at once, and the client says
/// what is lost.
#[test]
fn a_program_that_ends_is_not_kept() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let analytics = runtime.block_on(async {
        let addr = format!("http://127.0.0.1:{}", free_port());
        let analytics = BatchingClient::new(&addr, ClientSettings::default()).unwrap();
        for number in 0..10 {
            analytics.track(order(number)).unwrap();
        }
        analytics
    });
    let start = Instant::now();
    drop(runtime);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let counters = analytics.counters();
    assert_eq!((counters.queued, counters.abandoned, counters.waiting), (10, 10, 0), "{counters:?}");
    assert_eq!(analytics.track(order(11)), Err(NotQueued::Closed));
}
