//! Whoever knocks: peers that flood, stall, or hold what others need. Beside each of
//! them a good caller is served, the relay's memory stays bounded, and nothing that
//! was accepted is lost.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::{TrackBatchRequest, property_value::Value as Kind},
    providers::sandbox::Vendor,
};
use prost::Message;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;

use crate::{
    harness::{Observer, Relay, Setup, batch, not_run, reqwest_client, taken, track, track_item},
    raw::{self, RawPeer},
};

const MIB: u64 = 1024 * 1024;

/// Most memory that the relay has had, in bytes.
fn peak_memory(relay: &Relay) -> u64 {
    bytes_in_status(relay, "VmHWM:")
}

/// Pages of files, of which the program itself is one: they are charged to whoever read
/// them first, and a debug build has many.
fn memory_of_files(relay: &Relay) -> u64 {
    bytes_in_status(relay, "RssFile:")
}

fn bytes_in_status(relay: &Relay, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", relay.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// A good caller, which is served whatever else happens.
pub(crate) struct Good {
    pub(crate) relay: Relay,
    observer: Observer,
    peak_before: u64,
}

impl Good {
    pub(crate) async fn beside(relay: Relay) -> Self {
        let mut good = Self { relay, observer: Observer::default(), peak_before: 0 };
        good.calls(20).await;
        good.peak_before = peak_memory(&good.relay);
        good
    }

    pub(crate) async fn calls(&mut self, count: usize) {
        let mut client = self.relay.client();
        let calls = self.observer.tracks(&mut client, count);
        timeout(Duration::from_secs(10), calls).await.expect("a good caller is held up");
    }

    /// Ends the relay: nothing is lost, nothing twice, and it grew by no more.
    pub(crate) async fn end(self, setup: &Setup, what: &str, grown_max: u64) {
        let grown = peak_memory(&self.relay) - self.peak_before;
        println!(
            "{what}: {} calls beside it, memory grew by {:.1} MiB",
            self.observer.accepted.len(),
            grown as f64 / MIB as f64
        );
        assert!(grown <= grown_max, "{what}: {grown} bytes");
        taken(setup, Vendor::Segment, self.observer.accepted.len() as u64).await;
        let ended = self.relay.terminate().await;
        assert_eq!(ended.code, 0, "{what}");
        self.observer.check_balance(setup, &ended);
        for vendor in Vendor::ALL {
            assert_eq!(self.observer.check(setup, vendor).copies, self.observer.accepted.len() as u64);
        }
    }
}

#[tokio::test]
async fn floods_of_frames_hold_up_nobody() {
    const FRAMES: u32 = 20_000;
    type Flood = fn(u32) -> Vec<u8>;
    let rapid_reset: Flood = |at| [raw::headers(2 * at + 1, "TrackEvent"), raw::reset(2 * at + 1)].concat();
    let continuations: Flood = |at| if at == 0 { raw::endless_headers(1) } else { raw::continuation(1) };
    let floods: [(&str, Flood, bool); 6] = [
        ("rapid reset", rapid_reset, true),
        ("rapid reset, unread", rapid_reset, false),
        ("CONTINUATION", continuations, true),
        ("PING", |_| raw::ping(), true),
        ("PING, unread", |_| raw::ping(), false),
        ("SETTINGS, unread", |at| raw::settings(&[(4, 65_535 + at)]), false),
    ];
    let at_both = floods.into_iter().flat_map(|flood| [(flood, false), (flood, true)]);
    for ((what, flood, reads), is_http) in at_both {
        let setup = Setup::new().await;
        let mut good = Good::beside(setup.start().await).await;
        let addr = if is_http { good.relay.http_addr.unwrap() } else { good.relay.grpc_addr };
        let mut peer = RawPeer::connect(addr, &[]).await.unwrap();
        let mut sent = 0;
        while sent < FRAMES {
            let frames: Vec<u8> = (sent..sent + 100).flat_map(flood).collect();
            if !peer.write(&frames).await || reads && !peer.drain() {
                break;
            }
            sent += 100;
            if sent % 2000 == 0 {
                good.calls(2).await;
            }
        }
        good.calls(20).await;
        let door = if is_http { "HTTP" } else { "gRPC" };
        good.end(&setup, &format!("{what} at the {door} door: {sent} frames taken"), 16 * MIB).await;
    }
}

/// Two connections whose calls say that they bring a megabyte, and then do not: what
/// is over the budget is refused by its length, before it is here.
#[tokio::test]
async fn messages_that_are_being_received_have_a_budget() {
    let mut setup = Setup::new().await;
    setup.set("GRPC_RECEIVE_MAX_BYTES", "16777216");
    let mut good = Good::beside(setup.start().await).await;
    let mut peers = Vec::new();
    for _ in 0..2 {
        let mut peer = RawPeer::connect(good.relay.grpc_addr, &[]).await.unwrap();
        for stream in (0..100).map(|at| 2 * at + 1) {
            let begun = [raw::message_head(1024 * 1024), vec![0; 400]].concat();
            let call = [raw::headers(stream, "TrackBatch"), raw::data(stream, &begun)];
            assert!(peer.write(&call.concat()).await);
        }
        good.calls(5).await;
        peers.push(peer);
    }
    // Of each connection two megabytes are taken, which is one call's and not quite two.
    let start = Instant::now();
    while good.relay.metric("relay_refusals_total", &["RECEIVING_TOO_MUCH"]).await < 198.0 {
        assert!(start.elapsed() < Duration::from_secs(10), "messages over the budget are taken");
        sleep(Duration::from_millis(10)).await;
    }
    good.end(&setup, "200 calls with a megabyte each", 12 * MIB).await;
}

/// The right answer is to say so, with when to come back.
#[tokio::test]
async fn metadata_that_is_too_large_is_told_so() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut client = relay.client();
    for (bytes, code) in
        [(7000, None), (9000, Some(Code::ResourceExhausted)), (25_000, Some(Code::ResourceExhausted))]
    {
        let mut request = tonic::Request::new(track("x", "u"));
        request.metadata_mut().insert("x-large", "y".repeat(bytes).parse().unwrap());
        let status = client.track_event(request).await.err();
        assert_eq!(status.as_ref().map(tonic::Status::code), code, "{bytes}: {status:?}");
        if let Some(status) = status {
            assert_eq!(status.get_error_details().error_info().unwrap().reason, "METADATA_TOO_LARGE");
        }
    }
    assert_eq!(relay.terminate().await.code, 0);
}

/// Scrapes and probes get through, whoever holds the connections of their port.
#[tokio::test]
async fn sockets_that_say_nothing_keep_no_probe_out() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    for bytes in [&b""[..], b"G", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: "] {
        let mut silent = Vec::new();
        for _ in 0..100 {
            let mut stream = TcpStream::connect(relay.metrics_addr).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            silent.push(stream);
        }
        for path in ["healthz", "readyz", "metrics"] {
            let probe = reqwest_client().get(format!("http://{}/{path}", relay.metrics_addr)).send();
            let answer = timeout(Duration::from_secs(1), probe).await.expect("a probe hangs").unwrap();
            assert_eq!(answer.status(), 200, "{path} beside {bytes:?}");
        }
        // They are cut, and hold nothing for ever.
        let start = Instant::now();
        let mut peers: Vec<_> = silent;
        while let Some(mut peer) = peers.pop() {
            let mut byte = [0; 256];
            let cut = async {
                while tokio::io::AsyncReadExt::read(&mut peer, &mut byte).await.is_ok_and(|read| read > 0) {}
            };
            timeout(Duration::from_secs(8), cut).await.expect("a silent connection is kept");
        }
        assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    }
    assert_eq!(relay.terminate().await.code, 0);
}

/// Peers that hold every connection of callers: others are told so and do not hang,
/// and health is still answered.
#[tokio::test]
async fn connections_over_the_number_are_refused_and_health_is_answered() {
    let mut setup = Setup::new().await;
    setup.set("GRPC_MAX_CONNECTIONS", "8");
    let relay = setup.start().await;
    let mut first = relay.client();
    first.track_event(track("x", "u")).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..20 {
        held.push(RawPeer::connect(relay.grpc_addr, &[]).await.unwrap());
    }
    let status = timeout(Duration::from_secs(2), relay.client().track_event(track("x", "u"))).await;
    let status = status.expect("a caller hangs").unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.get_error_details().error_info().unwrap().reason, "NO_CONNECTION_LEFT");
    let check = HealthCheckRequest { service: String::new() };
    let health = timeout(Duration::from_secs(2), HealthClient::new(relay.channel()).check(check)).await;
    assert_eq!(health.expect("a probe hangs").unwrap().into_inner().status(), ServingStatus::Serving);
    let own = timeout(
        Duration::from_secs(2),
        relay.client().health_check(analytics_relay::proto::v1::HealthCheckRequest::default()),
    )
    .await;
    assert_eq!(own.expect("a probe hangs").unwrap().into_inner().status, "SERVING");
    assert!(relay.metric("relay_connections_refused_total", &[]).await >= 12.0);
    first.track_event(track("x", "u")).await.unwrap();
    drop(held);
    let mut observer = Observer::default();
    let start = Instant::now();
    while observer.track(&mut relay.client(), "x", "u").await.is_some() {
        assert!(start.elapsed() < Duration::from_secs(10), "no connection is taken again");
    }
    assert_eq!(relay.terminate().await.code, 0);
}

/// 10,000 callers at once, at each door: as many as the setting says are served, the rest
/// are refused.
#[tokio::test]
async fn ten_thousand_connections_leave_room_for_those_that_are_in() {
    for setting in ["GRPC_MAX_CONNECTIONS", "HTTP_MAX_CONNECTIONS"] {
        ten_thousand_connections(setting).await;
    }
}

async fn ten_thousand_connections(setting: &str) {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let wanted = 10_000.min(hard.saturating_sub(500));
    if wanted < 10_000 {
        not_run(&format!("10,000 connections: the limit of open files is {hard}; with {wanted}"));
    }
    let admitted = wanted / 2;
    let mut setup = Setup::new().await;
    setup.set(setting, &admitted.to_string());
    let relay = setup.start().await;
    let addr = if setting.starts_with("HTTP") { relay.http_addr.unwrap() } else { relay.grpc_addr };
    let mut client = relay.client();
    let mut observer = Observer::default();
    observer.tracks(&mut client, 5).await;
    let before = peak_memory(&relay);
    let mut connections = Vec::new();
    for at in 0..wanted {
        connections.push(RawPeer::connect(addr, &[]).await);
        if at % 1000 == 0 {
            observer.tracks(&mut client, 5).await;
        }
    }
    observer.tracks(&mut client, 20).await;
    let start = Instant::now();
    while relay.metric("relay_connections_refused_total", &[]).await < (wanted - admitted) as f64 {
        assert!(start.elapsed() < Duration::from_secs(20), "not all were looked at");
        sleep(Duration::from_millis(50)).await;
    }
    let open = relay.metric("relay_connections", &[]).await;
    assert!(open >= admitted as f64 && open <= (admitted + 32) as f64, "{open}");
    let grown = peak_memory(&relay) - before;
    println!("{wanted} connections to {addr}, {open} of them open: {} bytes each", grown / admitted);
    assert!(grown / admitted < 40 * 1024, "{grown}");
    drop(connections);
    taken(&setup, Vendor::Segment, observer.accepted.len() as u64).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    observer.check_balance(&setup, &ended);
}

/// A caller that sends batches on a stream and reads no answer.
#[tokio::test]
async fn who_does_not_read_its_answers_is_held_back_alone() {
    let setup = Setup::new().await;
    let mut good = Good::beside(setup.start().await).await;
    // It takes not a byte of any stream.
    let mut peer = RawPeer::connect(good.relay.grpc_addr, &[(4, 0)]).await.unwrap();
    // What breaks a rule has a long answer and is none of the observer's events.
    let (_, request) = batch((0..400).map(|_| track_item("", "u")));
    let message = request.encode_to_vec();
    let message = [raw::message_head(message.len()), message].concat();
    for stream in (0..50).map(|at| 2 * at + 1) {
        assert!(peer.write(&raw::headers(stream, "TrackStream")).await);
    }
    let mut taken_bytes = 0;
    'held: for _ in 0..200 {
        for stream in (0..50).map(|at| 2 * at + 1) {
            for piece in message.chunks(16 * 1024) {
                peer.drain();
                if timeout(Duration::from_millis(300), peer.write(&raw::data(stream, piece))).await
                    != Ok(true)
                {
                    break 'held;
                }
                taken_bytes += piece.len();
            }
        }
        good.calls(1).await;
    }
    println!("{taken_bytes} bytes were taken of it");
    // Windows are never made larger for it: it breaks HTTP/2's rules at their end.
    assert!(taken_bytes < 64 * 1024 * 1024);
    good.calls(20).await;
    let start = Instant::now();
    good.end(&setup, "a caller that reads nothing", 48 * MIB).await;
    assert!(start.elapsed() < Duration::from_secs(8), "the drain is held: {:?}", start.elapsed());
}

/// A group of processes with a limit of memory, in whichever form the machine has.
struct MemoryCap(PathBuf);

impl MemoryCap {
    /// Nothing if it cannot be made here.
    fn new(bytes: u64) -> Option<Self> {
        let name = format!("relay-test-{}", std::process::id());
        for (parent, limit) in
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        {
            let group = Self(PathBuf::from(parent).join(&name));
            if fs::create_dir(&group.0).is_ok() && fs::write(group.0.join(limit), bytes.to_string()).is_ok() {
                return Some(group);
            }
        }
        None
    }

    /// How often it killed a process.
    fn kills(&self) -> u64 {
        let texts = ["memory.oom_control", "memory.events"].map(|file| fs::read_to_string(self.0.join(file)));
        let counts = texts.iter().flatten().flat_map(|text| text.lines());
        counts.filter_map(|line| line.strip_prefix("oom_kill ")?.parse::<u64>().ok()).sum()
    }

    fn peak(&self) -> u64 {
        let texts =
            ["memory.max_usage_in_bytes", "memory.peak"].map(|file| fs::read_to_string(self.0.join(file)));
        texts.iter().flatten().find_map(|text| text.trim().parse().ok()).unwrap_or(0)
    }
}

impl Drop for MemoryCap {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// 128 MB, and events of the largest size for three providers of which none is there:
/// lanes let go of what they have no room for, and the kernel kills nobody.
#[tokio::test]
async fn in_128_megabytes_the_largest_events_get_nobody_killed() {
    const CAP: u64 = 128_000_000;
    let Some(cap) = MemoryCap::new(CAP) else {
        return not_run("a cgroup of 128 MB: no cgroup of memory can be made here");
    };
    let mut setup = Setup::new().await;
    // As docs/operations.md sizes it.
    setup.set("QUEUE_MAX_BYTES", "4194304").set("GRPC_RECEIVE_MAX_BYTES", "8388608");
    setup.set("DEAD_LETTERS_MAX_BYTES", "8000000").set("DRAIN_TIMEOUT_SECONDS", "3");
    setup.sandbox.go_down().await;
    let mut command = tokio::process::Command::new("sh");
    command
        .args(["-c", "echo $$ >\"$1/cgroup.procs\" && exec \"$0\""])
        .arg(Setup::binary())
        .arg(&cap.0)
        .env_clear()
        .envs(&setup.vars)
        .current_dir(setup.data.path())
        .kill_on_drop(true);
    let relay = Relay::spawn(command).await;
    let mut largest = track("Order Placed", "user-1");
    largest.properties.clear();
    for at in 0..10 {
        let text = Kind::StringValue("x".repeat(1000));
        largest
            .properties
            .insert(format!("text_{at}"), analytics_relay::proto::v1::PropertyValue { value: Some(text) });
    }
    let request = || {
        let items = (0..90).map(|_| {
            let event = analytics_relay::proto::v1::TrackEventRequest {
                event_id: uuid::Uuid::now_v7().to_string(),
                ..largest.clone()
            };
            let item = analytics_relay::proto::v1::track_batch_item::Item::Track(event);
            analytics_relay::proto::v1::TrackBatchItem { item: Some(item) }
        });
        TrackBatchRequest { items: items.collect() }
    };
    let mut callers = JoinSet::new();
    for _ in 0..16 {
        let (mut client, request) = (relay.client(), request());
        callers.spawn(async move {
            let (mut accepted, mut deferred) = (0_u64, 0_u64);
            for _ in 0..12 {
                let Ok(answer) = client.track_batch(request.clone()).await else {
                    deferred += 90;
                    continue;
                };
                for answer in answer.into_inner().answers {
                    match answer.answer.unwrap() {
                        analytics_relay::proto::v1::track_batch_answer::Answer::Accepted(_) => accepted += 1,
                        _ => deferred += 1,
                    }
                }
            }
            (accepted, deferred)
        });
    }
    let (mut accepted, mut deferred) = (0, 0);
    while let Some(counts) = callers.join_next().await {
        let counts = counts.unwrap();
        accepted += counts.0;
        deferred += counts.1;
    }
    let (memory, kills) = (peak_memory(&relay) - memory_of_files(&relay), cap.kills());
    println!(
        "accepted {accepted}, deferred {deferred}, of 17,280; the relay's peak {memory} bytes, the group's {}, {kills} kills",
        cap.peak()
    );
    assert_eq!(kills, 0);
    assert!(memory < CAP);
    let ended = relay.terminate().await;
    assert!(matches!(ended.code, 0 | 2), "it ends by itself: {}", ended.code);
    assert_eq!(ended.balance(Vendor::Segment).accepted, accepted);
    assert!(Vendor::ALL.iter().all(|vendor| ended.balance(*vendor).is_exact()));
}

/// gzip is taken, also where it does not pay, in calls and in streams.
#[tokio::test]
async fn compressed_events_are_taken() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut peer = RawPeer::connect(relay.grpc_addr, &[]).await.unwrap();
    let (ids, batched) = batch((0..40).map(|_| track_item("x", "user-1")));
    let alone = track("x", "user-1");
    for (stream, method, message) in [
        (1, "TrackEvent", alone.encode_to_vec()),
        (3, "TrackBatch", batched.encode_to_vec()),
        (5, "TrackStream", batch((0..2).map(|_| track_item("x", "user-1"))).1.encode_to_vec()),
    ] {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        std::io::Write::write_all(&mut encoder, &message).unwrap();
        let message = encoder.finish().unwrap();
        let mut head = raw::message_head(message.len());
        head[0] = 1;
        let call = [raw::headers_of_gzip(stream, method), raw::last_data(stream, &[head, message].concat())];
        assert!(peer.write(&call.concat()).await);
    }
    let events = ids.len() as u64 + 3;
    taken(&setup, Vendor::Segment, events).await;
    let ended = relay.terminate().await;
    assert_eq!((ended.code, ended.balance(Vendor::Segment).accepted), (0, events));
}

/// What a caller's network does to its context costs no event.
#[tokio::test]
async fn context_and_ids_that_are_not_as_they_should_be_cost_no_event() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut client = relay.client();
    for (ip, user) in
        [("1.2.3.4, 10.0.0.1", "user-1"), ("unknown", "None"), ("[2001:db8::1]:443", "[object Object]")]
    {
        let mut request = track("x", user);
        let user_agent = "é".repeat(600);
        request.context =
            Some(analytics_relay::proto::v1::EventContext { ip: ip.into(), user_agent, json: Vec::new() });
        request.anonymous_id = "device-7".into();
        client.track_event(request).await.unwrap();
    }
    let mut twice = track("x", "user-1");
    twice.properties.clear();
    twice.properties_json = br#"{"a":1,"a":2}"#.to_vec();
    client.track_event(twice).await.unwrap();
    taken(&setup, Vendor::Segment, 4).await;
    let events: Vec<_> = setup.sandbox.taken(Vendor::Segment).into_iter().map(|taken| taken.event).collect();
    let ips: Vec<_> =
        events.iter().map(|event| event["context"]["ip"].as_str().unwrap_or("").to_owned()).collect();
    assert_eq!(ips[..3], ["1.2.3.4", "", "2001:db8::1"]);
    assert_eq!((events[1]["userId"].is_null(), events[2]["userId"].is_null()), (true, true));
    assert_eq!(events[3]["properties"]["a"], 2);
    for (reason, count) in [
        ("ip_found", 2.0),
        ("ip_left_out", 1.0),
        ("user_agent_cut", 3.0),
        ("user_id_left_out", 2.0),
        ("property_twice", 1.0),
    ] {
        assert_eq!(relay.metric("relay_events_mended_total", &[reason]).await, count, "{reason}");
    }
    assert_eq!(relay.terminate().await.code, 0);
}
