//! SIGTERM loses nothing that was accepted.

use std::{
    env, fs,
    time::{Duration, Instant},
};

use analytics_relay::providers::sandbox::{Fault, Vendor};
use tokio::{io::AsyncWriteExt, process::Command, task::JoinSet, time::sleep};

use crate::harness::{Observer, Relay, Setup, hangups_are_ignored, taken};

/// How often the relay is terminated at a random moment; `make test-sigterm`
/// sets 200.
fn runs() -> usize {
    env::var("RELAY_SIGTERM_RUNS").map_or(12, |runs| runs.parse().unwrap())
}

/// How long a drain may go on past its deadline.
const OVERSHOOT_MAX: Duration = Duration::from_millis(500);
/// The same on a machine that is busy with something else.
const OVERSHOOT_BUSY_MAX: Duration = Duration::from_secs(2);
/// A drain that waits for nothing, as against the 8 s that it may take.
const PROMPT: Duration = Duration::from_secs(5);
/// Runs beyond [`runs`] until everything has happened once.
const MORE_RUNS: usize = 60;

/// A small generator, so that a run can be repeated by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Callers that send until they are refused for good.
fn callers(relay: &Relay, count: usize) -> JoinSet<Observer> {
    let mut callers = JoinSet::new();
    for caller in 0..count {
        let mut client = relay.client();
        callers.spawn(async move {
            let mut observer = Observer::default();
            for turn in 0.. {
                let user = format!("user-{caller}-{}", turn % 5);
                if observer.track(&mut client, "Order Placed", &user).await.is_some() {
                    return observer;
                }
            }
            observer
        });
    }
    callers
}

async fn join(mut callers: JoinSet<Observer>) -> Observer {
    let mut all = Observer::default();
    while let Some(observer) = callers.join_next().await {
        all.add(observer.unwrap());
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sigterm_at_any_moment_under_load_balances_exactly() {
    let seed = env::var("RELAY_SEED").map_or(0x5eed, |seed| seed.parse().unwrap());
    println!("RELAY_SEED={seed} RELAY_SIGTERM_RUNS={}; events are counted once for each provider", runs());
    let mut random = Random(seed);
    let (mut accepted, mut spilled, mut retried, mut delivered_after) = (0, 0, 0, 0);
    let (mut dead_lettered, mut lost_replies, mut overshoots) = (0, 0, Vec::new());
    for run in 0..runs() + MORE_RUNS {
        let has_all = spilled > 0 && retried > 0 && dead_lettered > 0 && lost_replies > 0;
        if run >= runs() && has_all {
            break;
        }
        let mut setup = Setup::new().await;
        setup.set("DRAIN_TIMEOUT_SECONDS", "1").set("MAX_RETRY_ATTEMPTS", "100");
        setup.set("LOG_LEVEL", "info");
        // Up, half down, down for good, stalled, refusing a key, cutting
        // connections, refusing events, and losing replies.
        let faults: [Option<&str>; 8] = [
            None,
            Some("30%503"),
            Some("503"),
            Some("stall"),
            Some("401"),
            Some("30%reset-before"),
            Some("reject-every=9"),
            Some("30%reset-after"),
        ];
        let mut chosen = Vec::new();
        for vendor in Vendor::ALL {
            let fault = faults[random.below(faults.len() as u64) as usize];
            // What Segment discards it answers with a success: no relay can know.
            let fault = fault.filter(|fault| vendor != Vendor::Segment || !fault.starts_with("reject"));
            chosen.push(fault);
            setup.sandbox.always(vendor, fault.map(|fault| fault.parse::<Fault>().unwrap()));
        }
        // And sometimes nothing listens at all.
        let down = random.below(8) == 0;
        if down {
            setup.sandbox.go_down().await;
        }
        let relay = setup.start().await;
        let callers = callers(&relay, 16);
        sleep(Duration::from_millis(20 + random.below(400))).await;
        let ended = relay.terminate().await;
        let observer = join(callers).await;
        let context = format!("run {run}, {chosen:?}, down: {down}");
        assert_eq!(ended.code, 0, "{context}: {:#?}", ended.logs.last());
        assert!(ended.took <= Duration::from_secs(1) + OVERSHOOT_BUSY_MAX, "{context}: {:?}", ended.took);
        overshoots.push(ended.took.saturating_sub(Duration::from_secs(1)));
        for vendor in Vendor::ALL {
            let (account, balance) = (observer.check(&setup, vendor), ended.balance(vendor));
            assert!(balance.is_exact() && balance.dropped == 0, "{context}: {vendor:?} {balance:?}");
            // An answer may be lost with its connection; an OK is never wrong.
            let known = observer.accepted.len() as u64;
            let most = known + observer.unknown.len() as u64;
            assert!((known..=most).contains(&balance.accepted), "{context}: {vendor:?} {balance:?} {known}");
            // A lost reply leaves a delivery that the relay does not know of.
            let replies_lost = chosen[vendor as usize] == Some("30%reset-after") && !down;
            if replies_lost {
                assert!(balance.delivered <= account.delivered, "{context}: {vendor:?}");
            } else {
                assert_eq!(balance.delivered, account.delivered, "{context}: {vendor:?}");
            }
            assert_eq!(balance.spilled, account.spilled, "{context}: {vendor:?}");
            assert_eq!(balance.dead_lettered, account.dead_lettered, "{context}: {vendor:?}");
            accepted += balance.accepted;
            spilled += balance.spilled;
            dead_lettered += balance.dead_lettered;
            lost_replies += u64::from(replies_lost);
        }
        retried += ended.count("batch send failed, retrying");

        // The next start delivers the rest.
        for vendor in Vendor::ALL {
            setup.sandbox.always(vendor, None);
        }
        if down {
            setup.sandbox.come_back().await.unwrap();
        }
        let relay = setup.start().await;
        for vendor in Vendor::ALL {
            let balance = ended.balance(vendor);
            taken(&setup, vendor, balance.accepted - balance.dead_lettered).await;
        }
        let ended = relay.terminate().await;
        for vendor in Vendor::ALL {
            let account = observer.check(&setup, vendor);
            assert_eq!(account.spilled, 0, "{context}: {vendor:?}");
            if chosen[vendor as usize] != Some("30%reset-after") {
                assert_eq!(account.copies, account.delivered, "{context}: {vendor:?} got one twice");
            }
            delivered_after += ended.balance(vendor).delivered;
        }
    }
    overshoots.sort();
    let (overshoot, most) = (overshoots[overshoots.len() * 9 / 10], overshoots[overshoots.len() - 1]);
    println!(
        "accepted {accepted}, dead-lettered {dead_lettered}, spilled {spilled}, reloaded and delivered \
         {delivered_after}, retries {retried}, providers that lost replies {lost_replies}; past the deadline \
         p90 {overshoot:?}, max {most:?}"
    );
    assert!(overshoot <= OVERSHOOT_MAX, "past the deadline: {overshoots:?}");
    assert!(spilled > 0 && retried > 0 && dead_lettered > 0 && lost_replies > 0, "no fault happened");
    assert_eq!(delivered_after, spilled);
}

#[tokio::test]
async fn a_short_batch_is_flushed_on_sigterm() {
    let mut setup = Setup::new().await;
    setup.set("FLUSH_INTERVAL_SECONDS", "60");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 7).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    assert!(ended.took < PROMPT, "{:?}", ended.took);
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Segment).delivered, 7);
    let messages: Vec<_> = ended.logs.iter().filter_map(|line| line["message"].as_str()).collect();
    let at =
        |message| messages.iter().position(|found| *found == message).unwrap_or_else(|| panic!("{message}"));
    assert!(at("shutdown signal received") < at("draining"));
    assert!(at("draining") < at("flushing batch"));
    assert!(at("flushing batch") < at("final flush completed"));
    assert!(at("final flush completed") < at("balance"));
}

#[tokio::test]
async fn a_backoff_is_cut_short_for_one_prompt_attempt() {
    let mut setup = Setup::new().await;
    setup.set("INITIAL_RETRY_DELAY_MS", "600000").set("MAX_RETRY_DELAY_MS", "3600000");
    setup.sandbox.script(Vendor::Mixpanel, ["503+retry-after=600".parse().unwrap()]);
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 5).await;
    relay.log("batch send failed, retrying").await;
    let ended = relay.terminate().await;
    assert!(ended.took < PROMPT, "{:?}", ended.took);
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 5);
}

#[tokio::test]
async fn at_the_deadline_the_rest_is_spilled_and_reloaded_at_the_next_start() {
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "1").set("REQUEST_TIMEOUT_SECONDS", "60");
    setup.sandbox.always(Vendor::Segment, Some("stall".parse().unwrap()));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 200).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    assert!(ended.took <= Duration::from_secs(1) + OVERSHOOT_BUSY_MAX, "{:?}", ended.took);
    assert!(ended.took >= Duration::from_millis(800), "it used the time that it has");
    assert_eq!(ended.count("drain deadline: what is left is spilled"), 1);
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Segment).spilled, 200);

    // Still down: what was reloaded is spilled again, once.
    let relay = setup.start().await;
    observer.tracks(&mut relay.client(), 10).await;
    let ended = relay.terminate().await;
    let balance = ended.balance(Vendor::Segment);
    assert_eq!((balance.accepted, balance.reloaded, balance.spilled), (10, 200, 210));
    assert_eq!(observer.check(&setup, Vendor::Segment).spilled, 210);

    setup.sandbox.always(Vendor::Segment, None);
    let relay = setup.start().await;
    taken(&setup, Vendor::Segment, 210).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Segment).delivered, 210);
    let account = observer.check(&setup, Vendor::Segment);
    assert_eq!((account.delivered, account.copies, account.spilled), (210, 210, 0));
}

#[tokio::test]
async fn a_drain_says_every_second_how_far_it_is() {
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "3").set("REQUEST_TIMEOUT_SECONDS", "60");
    setup.sandbox.always(Vendor::Segment, Some("stall".parse().unwrap()));
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 5).await;
    let ended = relay.terminate().await;
    let progress: Vec<_> = ended
        .logs
        .iter()
        .filter(|line| line["message"] == "drain in progress" && line["provider"] == "segment")
        .collect();
    assert!(progress.len() >= 2, "{progress:?}");
    assert!(progress.iter().all(|line| line["events_left"] == 5));
}

#[tokio::test]
async fn a_second_signal_skips_to_the_spill() {
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "20").set("REQUEST_TIMEOUT_SECONDS", "60");
    setup.sandbox.always(Vendor::Mixpanel, Some("stall".parse().unwrap()));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 30).await;
    relay.signal("TERM");
    relay.log("draining").await;
    sleep(Duration::from_millis(300)).await;
    let ended = relay.terminate().await;
    assert!(ended.took < PROMPT, "{:?}", ended.took);
    assert_eq!((ended.code, ended.count("second signal: what is left is spilled")), (0, 1));
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Mixpanel).spilled, 30);
}

#[tokio::test]
async fn every_signal_that_asks_to_stop_drains() {
    for signal in ["INT", "HUP", "QUIT"].into_iter().filter(|name| *name != "HUP" || !hangups_are_ignored()) {
        let mut setup = Setup::new().await;
        setup.set("FLUSH_INTERVAL_SECONDS", "60");
        let relay = setup.start().await;
        let mut observer = Observer::default();
        observer.tracks(&mut relay.client(), 3).await;
        relay.signal(signal);
        let ended = relay.ended(Instant::now()).await;
        assert_eq!(ended.code, 0, "SIG{signal}");
        let told = ended.logs.iter().find(|line| line["message"] == "shutdown signal received").unwrap();
        assert_eq!(told["signal"], format!("SIG{signal}"));
        observer.check_balance(&setup, &ended);
        assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 3);
    }
}

#[tokio::test]
async fn a_second_signal_of_any_kind_skips_to_the_spill() {
    let pairs = if hangups_are_ignored() {
        [("TERM", "QUIT"), ("QUIT", "INT"), ("INT", "TERM")]
    } else {
        [("HUP", "QUIT"), ("QUIT", "INT"), ("INT", "HUP")]
    };
    for (first, second) in pairs {
        let mut setup = Setup::new().await;
        setup.set("DRAIN_TIMEOUT_SECONDS", "20").set("REQUEST_TIMEOUT_SECONDS", "60");
        setup.sandbox.always(Vendor::Mixpanel, Some("stall".parse().unwrap()));
        let relay = setup.start().await;
        let mut observer = Observer::default();
        observer.tracks(&mut relay.client(), 7).await;
        relay.signal(first);
        relay.log("draining").await;
        relay.signal(second);
        let ended = relay.ended(Instant::now()).await;
        assert!(ended.took < Duration::from_secs(4), "{first}, {second}: {:?}", ended.took);
        assert_eq!((ended.code, ended.count("second signal: what is left is spilled")), (0, 1));
        let balance = ended.balance(Vendor::Mixpanel);
        assert!(balance.is_exact() && balance.spilled == 7, "{balance:?}");
        assert_eq!(observer.check(&setup, Vendor::Mixpanel).spilled, 7);
    }
}

/// A start waits for a file that never ends, as on a disk that hangs.
#[tokio::test]
async fn a_start_that_hangs_is_ended_two_seconds_after_the_deadline() {
    let mut setup = Setup::new().await;
    let pipe = setup.data.path().join("tls.crt");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    setup.set("DRAIN_TIMEOUT_SECONDS", "1").set("GRPC_TLS_CERT_FILE", pipe.to_str().unwrap());
    setup.set("GRPC_TLS_KEY_FILE", pipe.to_str().unwrap());
    let relay = Relay::launch(setup.command());
    relay.log("configuration").await;
    relay.signal("TERM");
    let ended = relay.ended(Instant::now()).await;
    assert_eq!(ended.code, 1, "nothing was taken, nothing is lost");
    let (min, max) = (Duration::from_secs(1), Duration::from_millis(3_500));
    assert!(ended.took >= min && ended.took <= max, "{:?}", ended.took);
    assert_eq!(ended.count("shutdown signal received"), 1);
}

#[tokio::test]
async fn under_nohup_a_hangup_is_ignored() {
    let setup = Setup::new().await;
    let mut nohup = Command::new("/bin/sh");
    nohup.args(["-c", "trap '' HUP; exec \"$0\""]).arg(Setup::binary());
    nohup.env_clear().envs(&setup.vars).current_dir(setup.data.path()).kill_on_drop(true);
    let relay = Relay::spawn(nohup).await;
    relay.signal("HUP");
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 3).await;
    let ended = relay.terminate().await;
    assert_eq!((ended.code, ended.count("shutdown signal received")), (0, 1));
    observer.check_balance(&setup, &ended);
}

/// The first bytes of a call whose message never comes to its end: HTTP/2's
/// preface, empty settings, the head, and two of ten bytes.
fn half_a_call() -> Vec<u8> {
    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
    }
    let headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/analytics.v1.AnalyticsService/TrackEvent"),
        (":authority", "relay"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let mut head = Vec::new();
    for (name, value) in headers {
        // A literal without indexing. (RFC 7541, section 6.2.2)
        head.extend([0, u8::try_from(name.len()).unwrap()]);
        head.extend(name.bytes());
        head.push(u8::try_from(value.len()).unwrap());
        head.extend(value.bytes());
    }
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
        frame(1, 4, 1, &head),
        frame(0, 0, 1, &[0, 0, 0, 0, 10, 10, 8]),
    ]
    .concat()
}

/// A caller that watches health keeps a stream open for ever, and one that has
/// sent half of a message holds another.
#[tokio::test]
async fn a_caller_that_holds_its_stream_open_does_not_hold_up_the_drain() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut watcher = HealthClient::new(relay.channel());
    let request = HealthCheckRequest { service: String::new() };
    let mut stream = watcher.watch(request).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().status, 1);
    let mut half = tokio::net::TcpStream::connect(relay.grpc_addr).await.unwrap();
    half.write_all(&half_a_call()).await.unwrap();
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 20).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    assert!(ended.took < PROMPT, "{:?}", ended.took);
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 20);
    assert_eq!(stream.message().await.unwrap().unwrap().status, 2, "the watcher was told");
}

#[tokio::test]
async fn what_cannot_be_spilled_is_counted_exactly_and_told_by_the_exit_code() {
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "1").set("REQUEST_TIMEOUT_SECONDS", "60");
    setup.sandbox.always(Vendor::Amplitude, Some("stall".parse().unwrap()));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 42).await;
    let spill = setup.data_dir().join("spill/amplitude");
    fs::remove_dir(&spill).unwrap();
    fs::write(&spill, "in the way").unwrap();
    let ended = relay.terminate().await;
    let balance = ended.balance(Vendor::Amplitude);
    assert_eq!((ended.code, balance.dropped, balance.spilled), (2, 42, 0));
    assert!(balance.is_exact());
    let last = ended.logs.iter().find(|line| line["message"] == "drained, with losses").unwrap();
    assert_eq!(last["lost"], 42);
    for vendor in [Vendor::Mixpanel, Vendor::Segment] {
        assert_eq!(ended.balance(vendor).delivered, 42);
        observer.check(&setup, vendor);
    }
}
