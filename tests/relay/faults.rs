//! The rows of the fault matrix that concern providers. Each asserts that the
//! fault really happened.

use std::{sync::Arc, time::Duration};

use analytics_relay::{
    proto::v1::property_value::Value as Kind,
    providers::sandbox::{Fault, Sandbox, TakenKind, Vendor},
};
use tokio::{
    io::AsyncReadExt,
    net::TcpListener,
    sync::Mutex,
    time::{Instant, sleep, timeout},
};

use crate::harness::{Observer, Relay, Setup, eventually, identify, lines_on_disk, taken};

const EVENTS: usize = 120;

fn fault(text: &str) -> Fault {
    text.parse().unwrap()
}

/// Requests of a vendor that a fault struck.
fn struck(sandbox: &Sandbox, vendor: Vendor) -> usize {
    sandbox.requests(vendor).iter().filter(|seen| seen.fault.is_some()).count()
}

async fn all_taken(setup: &Setup, observer: &Observer) {
    for vendor in Vendor::ALL {
        taken(setup, vendor, observer.accepted.len() as u64).await;
    }
}

/// Faults that pass: everything arrives, once, at every vendor, and the others
/// do not notice.
#[tokio::test]
async fn whatever_passes_costs_attempts_and_no_event() {
    let rows = [
        "500",
        "502",
        "503",
        "504",
        "429",
        "408",
        "429+retry-after=0",
        "429+retry-after=nonsense",
        "junk",
        "junk-json",
        "huge-body=3000000",
        "stall",
        "drip=300",
        "reset-before",
        "reset-after",
        "reset-mid-reply",
    ];
    for vendor in Vendor::ALL {
        let mut setup = Setup::new().await;
        setup.set("REQUEST_TIMEOUT_SECONDS", "0.3").set("MAX_RETRY_ATTEMPTS", "100").set("BATCH_SIZE", "20");
        let relay = setup.start().await;
        let mut client = relay.client();
        let mut observer = Observer::default();
        for row in rows {
            let before = struck(&setup.sandbox, vendor);
            setup.sandbox.script(vendor, [fault(row), fault(row)]);
            observer.tracks(&mut client, 25).await;
            let what = format!("two requests of {} struck by {row}", vendor.name());
            eventually(&what, || struck(&setup.sandbox, vendor) >= before + 2).await;
            all_taken(&setup, &observer).await;
        }
        let ended = relay.terminate().await;
        assert_eq!(ended.code, 0);
        observer.check_balance(&setup, &ended);
        assert!(ended.count("batch send failed, retrying") >= 2 * rows.len(), "{vendor:?}");
        for vendor in Vendor::ALL {
            assert_eq!(ended.balance(vendor).delivered, ended.balance(vendor).accepted);
        }
    }
}

/// It is the same for every event, and none pays for it.
#[tokio::test]
async fn a_redirect_pauses_its_provider_and_is_named() {
    let setup = Setup::new().await;
    setup.sandbox.always(Vendor::Segment, Some(fault("redirect=https://login.example/sso?canary")));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 20).await;
    let paused = relay.log("provider refuses its key or address: it is paused and its events wait").await;
    let error = paused["error"].as_str().unwrap();
    assert!(error.contains("307") && error.contains("https://login.example/sso"), "{error}");
    assert!(!error.contains("canary"), "{error}");
    taken(&setup, Vendor::Mixpanel, 20).await;
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Segment).spilled, 20);
}

#[tokio::test]
async fn a_lost_reply_doubles_requests_and_never_events() {
    let mut setup = Setup::new().await;
    setup.set("MAX_RETRY_ATTEMPTS", "100");
    for vendor in Vendor::ALL {
        // The first reply is lost for certain, half of the others are.
        setup.sandbox.script(vendor, [fault("reset-after")]);
        setup.sandbox.always(vendor, Some(fault("50%reset-after")));
    }
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), EVENTS).await;
    all_taken(&setup, &observer).await;
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, None);
    }
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    for vendor in Vendor::ALL {
        let account = observer.check(&setup, vendor);
        assert_eq!(account.delivered, EVENTS as u64, "{vendor:?}");
        assert!(
            account.copies > EVENTS as u64,
            "{vendor:?}: what was taken without a reply was not sent again"
        );
    }
}

#[tokio::test]
async fn when_every_attempt_fails_the_events_become_dead_letters() {
    let mut setup = Setup::new().await;
    setup.set("SEGMENT_MAX_RETRY_ATTEMPTS", "3").set("SEGMENT_BATCH_SIZE", "20");
    setup.set("FLUSH_INTERVAL_SECONDS", "60");
    setup.sandbox.always(Vendor::Segment, Some(fault("503")));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 20).await;
    relay.dead_lettered(Vendor::Segment, 20).await;
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Segment).dead_lettered, 20);
    assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 20);
    let letters = lines_on_disk(&setup.data_dir().join("dead-letters/segment"));
    for letter in &letters {
        assert_eq!((&letter["reason"], &letter["attempts"]), (&"retries_exhausted".into(), &3.into()));
        assert!(letter["detail"].as_str().unwrap().starts_with("503"), "{letter}");
    }
    assert_eq!(setup.sandbox.stats(Vendor::Segment).requests, 3, "three attempts and no more");
}

#[tokio::test]
async fn retry_after_is_honoured_and_the_others_go_on() {
    for row in ["429+retry-after=1", "503+retry-after=1"] {
        let setup = Setup::new().await;
        setup.sandbox.script(Vendor::Mixpanel, [fault(row)]);
        let relay = setup.start().await;
        let mut observer = Observer::default();
        observer.tracks(&mut relay.client(), 5).await;
        taken(&setup, Vendor::Amplitude, 5).await;
        taken(&setup, Vendor::Segment, 5).await;
        taken(&setup, Vendor::Mixpanel, 5).await;
        let seen = setup.sandbox.requests(Vendor::Mixpanel);
        assert!(seen[1].at_ms - seen[0].at_ms >= 990, "{row}: {seen:?}");
        observer.check_balance(&setup, &relay.terminate().await);
    }
}

#[tokio::test]
async fn too_large_is_split_by_bytes_until_it_fits() {
    for vendor in Vendor::ALL {
        let setup = Setup::new().await;
        setup.sandbox.always(vendor, Some(fault("body-limit=3000")));
        let relay = setup.start().await;
        let mut observer = Observer::default();
        observer.tracks(&mut relay.client(), 50).await;
        all_taken(&setup, &observer).await;
        let ended = relay.terminate().await;
        observer.check_balance(&setup, &ended);
        assert!(ended.count("batch send failed, splitting") > 0, "{vendor:?}");
        assert!(setup.sandbox.stats(vendor).requests <= 2 * 50 + 10);
    }
}

#[tokio::test]
async fn one_bad_event_never_costs_the_other_forty_nine() {
    for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
        let mut setup = Setup::new().await;
        setup.set("FLUSH_INTERVAL_SECONDS", "60");
        setup.sandbox.always(vendor, Some(fault("reject-name=poison")));
        let relay = setup.start().await;
        let mut client = relay.client();
        let mut observer = Observer::default();
        observer.tracks(&mut client, 30).await;
        observer.track(&mut client, "poison", "u").await;
        observer.tracks(&mut client, 19).await;
        taken(&setup, vendor, 49).await;
        relay.dead_lettered(vendor, 1).await;
        let ended = relay.terminate().await;
        observer.check_balance(&setup, &ended);
        let balance = ended.balance(vendor);
        assert_eq!((balance.delivered, balance.dead_lettered), (49, 1), "{vendor:?}");
        let account = observer.check(&setup, vendor);
        assert_eq!(account.copies, 49, "{vendor:?}: what a 400 means was misread");
        let requests = setup.sandbox.stats(vendor).requests;
        // Amplitude takes nothing of a request with a bad event. The others go again at
        // once, and show that it is not Amplitude that is in trouble.
        assert_eq!(requests, if vendor == Vendor::Mixpanel { 1 } else { 3 }, "{vendor:?}");
    }
}

/// Partial failures at random: the account is exact in each vendor's dialect.
#[tokio::test]
async fn partial_failures_are_accounted_for_event_by_event() {
    let setup = Setup::new().await;
    for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
        setup.sandbox.always(vendor, Some(fault("reject-every=5")));
    }
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 200).await;
    for vendor in Vendor::ALL {
        relay.settled(vendor, 200).await;
    }
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    for vendor in [Vendor::Mixpanel, Vendor::Amplitude] {
        let balance = ended.balance(vendor);
        assert!(balance.dead_lettered > 10, "{balance:?}");
        assert_eq!(balance.delivered + balance.dead_lettered, 200, "{balance:?}");
        assert_eq!(observer.check(&setup, vendor).copies, balance.delivered, "{vendor:?}");
    }
}

#[tokio::test]
async fn amplitudes_429_holds_back_only_the_throttled_user() {
    let mut setup = Setup::new().await;
    // Each five events are a batch, however slowly they come.
    setup.set("FLUSH_INTERVAL_SECONDS", "60").set("BATCH_SIZE", "5").set("DRAIN_TIMEOUT_SECONDS", "2");
    setup.sandbox.always(Vendor::Amplitude, Some(fault("throttle-users=slow")));
    let relay = setup.start().await;
    let mut client = relay.client();
    let mut observer = Observer::default();
    for user in ["slow", "a", "slow", "b", "c"] {
        observer.track(&mut client, "x", user).await;
    }
    taken(&setup, Vendor::Amplitude, 3).await;
    let users: Vec<_> = setup.sandbox.taken(Vendor::Amplitude).into_iter().map(|taken| taken.user).collect();
    assert_eq!(users, ["a", "b", "c"]);
    // Another event of that user would only be refused too.
    for user in ["slow", "d", "e", "f", "g"] {
        observer.track(&mut client, "x", user).await;
    }
    taken(&setup, Vendor::Amplitude, 7).await;
    let requests = setup.sandbox.requests(Vendor::Amplitude);
    let refused = requests.iter().filter(|seen| seen.status == Some(429)).count();
    assert_eq!((refused, requests.len()), (1, 3), "the throttled user waits 15 s: {requests:?}");
    setup.sandbox.always(Vendor::Amplitude, None);
    // A drain cuts the waiting short.
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Amplitude).delivered, 10);
}

#[tokio::test]
async fn a_bad_key_pauses_the_provider_and_burns_no_event() {
    for (vendor, row) in [
        (Vendor::Mixpanel, "401"),
        (Vendor::Amplitude, "403"),
        (Vendor::Segment, "401"),
        (Vendor::Segment, "404"),
    ] {
        let mut setup = Setup::new().await;
        // No probe comes due, however long this takes.
        setup.set("INITIAL_RETRY_DELAY_MS", "600000").set("MAX_RETRY_DELAY_MS", "600000");
        setup.sandbox.always(vendor, Some(fault(row)));
        let relay = setup.start().await;
        let mut observer = Observer::default();
        observer.tracks(&mut relay.client(), EVENTS).await;
        for other in Vendor::ALL.into_iter().filter(|other| *other != vendor) {
            taken(&setup, other, EVENTS as u64).await;
        }
        relay.log("provider refuses its key or address: it is paused and its events wait").await;
        assert!(setup.sandbox.stats(vendor).requests <= 8, "{vendor:?}: a paused provider is left alone");
        let ended = relay.terminate().await;
        assert_eq!(ended.code, 0);
        observer.check_balance(&setup, &ended);
        assert_eq!(ended.balance(vendor).spilled, EVENTS as u64, "{vendor:?}");
        assert!(ended.took < Duration::from_secs(5), "nothing is won by waiting: {:?}", ended.took);

        // The key is mended and the relay started again.
        setup.sandbox.always(vendor, None);
        let relay = setup.start().await;
        taken(&setup, vendor, EVENTS as u64).await;
        let ended = relay.terminate().await;
        let balance = ended.balance(vendor);
        assert_eq!((balance.reloaded, balance.delivered), (EVENTS as u64, EVENTS as u64));
        assert!(balance.is_exact());
        assert!(lines_on_disk(&setup.data_dir().join("spill").join(vendor.name())).is_empty());
        observer.check(&setup, vendor);
    }
}

#[tokio::test]
async fn an_outage_ends_without_a_storm_and_without_a_loss() {
    let mut setup = Setup::new().await;
    setup
        .set("MAX_RETRY_ATTEMPTS", "100")
        .set("INITIAL_RETRY_DELAY_MS", "50")
        .set("MAX_RETRY_DELAY_MS", "400");
    let relay = setup.start().await;
    let mut client = relay.client();
    let mut observer = Observer::default();
    observer.tracks(&mut client, 10).await;
    all_taken(&setup, &observer).await;
    setup.sandbox.go_down().await;
    observer.tracks(&mut client, 400).await;
    relay.log("batch send failed, retrying").await;
    // The first attempts are meant to come quickly.
    sleep(Duration::from_millis(500)).await;
    let attempts = async || relay.metric("relay_batches_total", &["mixpanel", "unavailable"]).await;
    let (before, start) = (attempts().await, Instant::now());
    sleep(Duration::from_millis(1000)).await;
    let (attempts, seconds) = (attempts().await - before, start.elapsed().as_secs_f64());
    assert!(attempts <= 40.0 * seconds, "{attempts} requests in {seconds} s to a provider that is down");
    assert!(relay.metric("relay_oldest_event_age_seconds", &["mixpanel"]).await >= 1.0);
    let before = setup.sandbox.stats(Vendor::Mixpanel).requests;
    setup.sandbox.come_back().await.unwrap();
    all_taken(&setup, &observer).await;
    let requests = setup.sandbox.stats(Vendor::Mixpanel).requests - before;
    assert!(requests <= 20, "{requests} requests for what was waiting");
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 410);
}

#[tokio::test]
async fn identifies_of_one_user_arrive_in_order_through_failures() {
    let mut setup = Setup::new().await;
    setup.set("MAX_RETRY_ATTEMPTS", "100").set("BATCH_SIZE", "3");
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, Some(fault("40%503")));
    }
    let relay = setup.start().await;
    let mut client = relay.client();
    for turn in 0..40 {
        for user in ["ann", "bob"] {
            let traits = [("turn", Some(Kind::IntegerValue(turn)))];
            client.identify_user(identify(user, &traits)).await.unwrap();
        }
    }
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 80).await;
        for user in ["ann", "bob"] {
            let turns: Vec<_> = setup
                .sandbox
                .taken(vendor)
                .into_iter()
                .filter(|taken| taken.user == user && taken.kind == TakenKind::Identify)
                .map(|taken| {
                    let paths = ["/$set/turn", "/user_properties/$set/turn", "/traits/turn"];
                    paths.iter().find_map(|path| taken.event.pointer(path)?.as_i64()).unwrap()
                })
                .collect();
            assert_eq!(turns, (0..40).collect::<Vec<_>>(), "{vendor:?} {user}");
        }
        assert!(struck(&setup.sandbox, vendor) > 0, "{vendor:?}: no request failed");
    }
    assert_eq!(relay.terminate().await.code, 0);
}

#[tokio::test]
async fn a_host_that_cannot_be_found_is_tried_again() {
    let mut setup = Setup::new().await;
    setup.set("MIXPANEL_BASE_URL", "http://no-such-host.invalid").set("MAX_RETRY_ATTEMPTS", "2");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 10).await;
    relay.log("batch send failed, retrying").await;
    relay.dead_lettered(Vendor::Mixpanel, 10).await;
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 0);
    assert_eq!(ended.balance(Vendor::Segment).delivered, 10);
}

/// A TLS server with a certificate that must not be believed, which keeps every
/// byte that a client sends it once the handshake is done.
struct TlsTrap {
    port: u16,
    /// Handshakes that were begun.
    begun: Arc<Mutex<usize>>,
    plaintext: Arc<Mutex<Vec<u8>>>,
}

impl TlsTrap {
    async fn start(name: &str, expired: bool) -> (Self, String) {
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        if expired {
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
            params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        }
        let pair = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&pair).unwrap();
        let config = tokio_rustls::rustls::ServerConfig::builder_with_provider(Arc::new(
            tokio_rustls::rustls::crypto::ring::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], pair.serialize_der().try_into().unwrap())
        .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let trap = Self { port, begun: Arc::default(), plaintext: Arc::default() };
        let (begun, plaintext) = (trap.begun.clone(), trap.plaintext.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                *begun.lock().await += 1;
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    let mut bytes = Vec::new();
                    let _ = stream.read_to_end(&mut bytes).await;
                    plaintext.lock().await.extend(bytes);
                }
            }
        });
        (trap, certificate.pem())
    }
}

#[tokio::test]
async fn a_certificate_that_is_wrong_gets_no_byte() {
    // Unknown authority; known but expired; known but for another host.
    for (name, expired, trusted) in
        [("localhost", false, false), ("localhost", true, true), ("other.example", false, true)]
    {
        let mut setup = Setup::new().await;
        let (trap, pem) = TlsTrap::start(name, expired).await;
        let authorities = setup.data.path().join("authorities.pem");
        std::fs::write(&authorities, pem).unwrap();
        if trusted {
            setup.set("SSL_CERT_FILE", authorities.to_str().unwrap());
        }
        setup
            .set("MIXPANEL_BASE_URL", &format!("https://localhost:{}", trap.port))
            .set("MAX_RETRY_ATTEMPTS", "3");
        let relay = setup.start().await;
        let mut observer = Observer::default();
        observer.tracks(&mut relay.client(), 5).await;
        let retry = relay.log("batch send failed, retrying").await;
        assert!(retry["error"].as_str().unwrap().contains("certificate"), "{retry}");
        relay.dead_lettered(Vendor::Mixpanel, 5).await;
        let ended = relay.terminate().await;
        observer.check_balance(&setup, &ended);
        assert_eq!(ended.balance(Vendor::Mixpanel).dead_lettered, 5, "{name} {expired} {trusted}");
        assert!(*trap.begun.lock().await >= 3, "it was tried");
        assert!(trap.plaintext.lock().await.is_empty(), "plaintext reached a stranger");
    }
}

/// A disk that takes no dead letters: the loss is counted, named and told by
/// the exit code.
#[tokio::test]
async fn dead_letters_that_do_not_fit_are_counted_as_dropped() {
    let mut setup = Setup::new().await;
    setup.set("DEAD_LETTERS_MAX_BYTES", "2000").set("BATCH_SIZE", "2");
    setup.sandbox.always(Vendor::Mixpanel, Some(fault("reject-name=bad")));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    for _ in 0..30 {
        observer.track(&mut relay.client(), "good", "u").await;
        observer.track(&mut relay.client(), "bad", "u").await;
    }
    taken(&setup, Vendor::Segment, 60).await;
    relay.log("events lost: they could not become dead letters").await;
    relay.settled(Vendor::Mixpanel, 60).await;
    let ended = relay.terminate().await;
    let balance = ended.balance(Vendor::Mixpanel);
    assert!(balance.is_exact() && balance.dropped > 0 && balance.dead_lettered > 0, "{balance:?}");
    assert_eq!(balance.dropped + balance.dead_lettered, 30, "{balance:?}");
    assert_eq!(ended.code, 2);
    let last = ended.logs.iter().find(|line| line["message"] == "drained, with losses").unwrap();
    assert_eq!(last["lost"], balance.dropped);
}

/// Slow-loris answers hold a bounded number of connections.
#[tokio::test]
async fn a_provider_that_drips_holds_few_connections() {
    let mut setup = Setup::new().await;
    setup.set("REQUEST_TIMEOUT_SECONDS", "0.5").set("BATCH_SIZE", "5").set("DRAIN_TIMEOUT_SECONDS", "1");
    setup.sandbox.always(Vendor::Mixpanel, Some(fault("drip=2000")));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 400).await;
    eventually("requests that are cut", || setup.sandbox.stats(Vendor::Mixpanel).requests >= 3).await;
    assert!(setup.sandbox.stats(Vendor::Mixpanel).in_flight_max <= 8 + 1);
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    // Each was taken, and the relay was never told so.
    observer.check(&setup, Vendor::Mixpanel);
}

/// A disk that takes no dead letter for a while: the events stay until it does.
#[tokio::test]
async fn dead_letters_that_cannot_be_written_wait() {
    let mut setup = Setup::new().await;
    setup.set("BATCH_SIZE", "11").set("FLUSH_INTERVAL_SECONDS", "60");
    setup.sandbox.always(Vendor::Mixpanel, Some(fault("reject-name=bad")));
    let relay = setup.start().await;
    let letters = setup.data_dir().join("dead-letters/mixpanel");
    std::fs::remove_dir(&letters).unwrap();
    std::fs::write(&letters, "in the way").unwrap();
    let mut observer = Observer::default();
    for name in ["good"].into_iter().chain(["bad"; 10]) {
        observer.track(&mut relay.client(), name, "u").await;
    }
    relay.log("dead letters cannot be written").await;
    relay.metric_is("relay_in_flight_events", &["mixpanel"], 10.0).await;
    std::fs::remove_file(&letters).unwrap();
    std::fs::create_dir(&letters).unwrap();
    relay.dead_lettered(Vendor::Mixpanel, 10).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    observer.check_balance(&setup, &ended);
}

/// More callers than file descriptors: those over the number are refused, those that
/// are in are served, and what they sent is delivered.
#[tokio::test]
async fn callers_cannot_use_up_the_file_descriptors() {
    let mut setup = Setup::new().await;
    // All in one batch, with those that are taken beside those that are refused.
    setup.set("GRPC_MAX_CONNECTIONS", "10000").set("BATCH_SIZE", "51").set("FLUSH_INTERVAL_SECONDS", "60");
    let mut command = setup.command_of("/bin/sh");
    command.args(["-c", "ulimit -n 64; exec \"$0\""]).arg(Setup::binary());
    let relay = Relay::spawn(command).await;
    relay.log("the limit of open files leaves room for fewer connections").await;
    let mut client = relay.client();
    let mut observer = Observer::default();
    observer.tracks(&mut client, 1).await;
    let mut flood = Vec::new();
    for _ in 0..100 {
        let connecting = tokio::net::TcpStream::connect(relay.grpc_addr);
        flood.extend(timeout(Duration::from_millis(200), connecting).await);
    }
    assert!(flood.len() > 16, "{} connections are no flood", flood.len());
    setup.sandbox.always(Vendor::Mixpanel, Some(fault("reject-every=2")));
    observer.tracks(&mut client, 50).await;
    // And a quarter more for probes. (Those that say nothing are cut after a while.)
    let served = relay.metric("relay_connections", &[]).await;
    assert!(served > 1.0 && served <= 20.0, "{served} are served");
    for vendor in Vendor::ALL {
        relay.settled(vendor, 51).await;
    }
    drop(flood);
    let start = Instant::now();
    loop {
        let mut fresh = relay.client();
        let served = timeout(Duration::from_millis(500), observer.track(&mut fresh, "x", "u")).await;
        if matches!(served, Ok(None)) {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no new connection is served");
    }
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    for vendor in Vendor::ALL {
        observer.check(&setup, vendor);
        assert_eq!(ended.balance(vendor).dropped, 0);
    }
}
