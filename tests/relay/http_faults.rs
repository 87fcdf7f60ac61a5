//! Callers of the HTTP door that misbehave: each has its answer or its end, and nobody
//! beside it is held up.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use flate2::{Compression, write::GzEncoder};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    doors::Good,
    harness::{Setup, reqwest_client},
};

const MIB: u64 = 1024 * 1024;
/// Of each sort.
const CALLERS: usize = 100;

/// With time for vendors' answers: what misbehaves may have all of the processor for a
/// moment, and a request that is given up for that arrives twice.
async fn patient() -> Setup {
    let mut setup = Setup::new().await;
    setup.set("REQUEST_TIMEOUT_SECONDS", "30");
    setup
}

/// Both doors answer while others misbehave.
async fn beside_both(good: &mut Good) {
    good.calls(5).await;
    let url = format!("http://{}/v1/schemas", good.relay.http_addr.unwrap());
    let answer = timeout(Duration::from_secs(5), reqwest_client().get(url).send()).await;
    assert_eq!(answer.expect("the HTTP door is held up").unwrap().status(), 200);
}

/// What a call with a body of these bytes is answered, by so many callers at once.
async fn answers_to(good: &Good, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Vec<u16> {
    let url = format!("http://{}{path}", good.relay.http_addr.unwrap());
    let mut calls = JoinSet::new();
    let body = bytes::Bytes::from(body);
    for _ in 0..CALLERS {
        let mut call = reqwest_client().post(&url).body(body.clone());
        for (name, value) in headers {
            call = call.header(*name, *value);
        }
        calls.spawn(async move { call.send().await.expect("an answer").status().as_u16() });
    }
    calls.join_all().await
}

/// Each was refused, or told to come back: what is being received has a budget.
fn none_is_taken(answers: &[u16]) {
    let is_refused = answers.iter().all(|status| matches!(status, 400 | 429)) && answers.contains(&400);
    assert!(is_refused, "{answers:?}");
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A byte now and then keeps no call open beyond its time.
#[tokio::test]
async fn a_body_that_drips_is_given_up_in_its_time() {
    let setup = patient().await;
    let mut good = Good::beside(setup.start().await).await;
    let mut drips = JoinSet::new();
    let (addr, start) = (good.relay.http_addr.unwrap(), Instant::now());
    for _ in 0..CALLERS {
        drips.spawn(async move {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            let head = b"POST /v1/batch HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{";
            stream.write_all(head).await.unwrap();
            let (mut read, mut write) = stream.split();
            let drip = async {
                while write.write_all(b" ").await.is_ok() {
                    sleep(Duration::from_millis(100)).await;
                }
                std::future::pending().await
            };
            let mut answer = [0; 512];
            let read = tokio::select! {
                read = timeout(Duration::from_secs(40), read.read(&mut answer)) => read.expect("it is cut").unwrap(),
                () = drip => 0,
            };
            String::from_utf8_lossy(&answer[..read]).into_owned()
        });
    }
    for _ in 0..10 {
        beside_both(&mut good).await;
        sleep(Duration::from_millis(500)).await;
    }
    let answers = drips.join_all().await;
    let took = start.elapsed();
    assert!(answers.iter().all(|answer| answer.starts_with("HTTP/1.1 408 ")), "{:?}", answers.first());
    assert!((19..30).contains(&took.as_secs()), "{took:?}");
    println!("{CALLERS} bodies that drip were given up after {took:.1?}");
    good.relay.metric_is("relay_requests_total", &["/v1/batch", "\"408\""], CALLERS as f64).await;
    good.end(&setup, "bodies that drip", 16 * MIB).await;
}

/// What inflates to more than it may is cut off while it does.
#[tokio::test]
async fn bombs_of_gzip_take_no_memory() {
    let bomb = gzip(&vec![b' '; 64 << 20]);
    let setup = patient().await;
    let mut good = Good::beside(setup.start().await).await;
    println!("a bomb has {} bytes", bomb.len());
    let answers = answers_to(&good, "/v1/batch", &[("content-encoding", "gzip")], bomb).await;
    none_is_taken(&answers);
    beside_both(&mut good).await;
    good.end(&setup, "bombs of gzip", 96 * MIB).await;
}

#[tokio::test]
async fn json_that_is_deep_is_refused_by_its_place() {
    let setup = patient().await;
    let mut good = Good::beside(setup.start().await).await;
    let deep = "[".repeat(900_000).into_bytes();
    let answers = answers_to(&good, "/v1/batch", &[], deep).await;
    none_is_taken(&answers);
    for (before, after) in [("[", "]"), ("{\"a\":", "}")] {
        let value = format!("{}1{}", before.repeat(2000), after.repeat(2000));
        let event = format!("{{\"event\":\"x\",\"userId\":\"u\",\"properties\":{{\"a\":{value}}}}}");
        let answers = answers_to(&good, "/v1/track", &[], event.into_bytes()).await;
        assert!(answers.iter().all(|status| *status == 400), "{answers:?}");
    }
    beside_both(&mut good).await;
    good.end(&setup, "deep JSON", 96 * MIB).await;
}

/// All of them read their answer, although none of the bodies is wanted.
#[tokio::test]
async fn bodies_of_four_megabytes_are_refused_and_hold_nothing() {
    let setup = patient().await;
    let mut good = Good::beside(setup.start().await).await;
    let answers = answers_to(&good, "/v1/batch", &[], vec![b' '; 4 << 20]).await;
    assert_eq!(answers, [400; CALLERS]);
    let answers = answers_to(&good, "/v1/events/batch", &[], vec![b' '; 4 << 20]).await;
    assert_eq!(answers, [413; CALLERS]);
    beside_both(&mut good).await;
    good.end(&setup, "bodies of 4 MB", 64 * MIB).await;
}

/// What stands beside the items is counted as often as it would be kept.
#[tokio::test]
async fn what_stands_beside_many_bad_items_is_not_multiplied() {
    let setup = patient().await;
    let mut good = Good::beside(setup.start().await).await;
    let beside = "x".repeat(150_000);
    for name in ["sentAt", "context"] {
        let batch = format!("{{\"batch\":[{}1],\"{name}\":\"{beside}\"}}", "1,".repeat(2400));
        let answers =
            answers_to(&good, "/v1/batch", &[("content-encoding", "gzip")], gzip(batch.as_bytes())).await;
        none_is_taken(&answers);
    }
    beside_both(&mut good).await;
    good.end(&setup, "much beside many bad items", 64 * MIB).await;
}

/// Events of very unequal sizes before a queue that is nearly full: who waits for room
/// waits, and the relay does everything else meanwhile.
#[tokio::test]
async fn who_waits_for_room_holds_up_nobody() {
    let mut setup = Setup::new().await;
    setup.set("QUEUE_MAX_BYTES", "65536").set("FLUSH_INTERVAL_SECONDS", "600").set("BATCH_SIZE", "2000");
    let relay = setup.start().await;
    let event = |bytes: usize| {
        format!(
            "{{\"type\":\"track\",\"event\":\"x\",\"userId\":\"u\",\"properties\":{{\"a\":\"{}\"}}}}",
            "x".repeat(bytes)
        )
    };
    let events: Vec<String> = (0..110).map(|at| event(if at % 11 == 0 { 20_000 } else { 10 })).collect();
    let body = format!("{{\"batch\":[{}]}}", events.join(","));
    let url = format!("http://{}/v1/batch", relay.http_addr.unwrap());
    let calls: JoinSet<_> = (0..4)
        .map(|_| {
            let call = reqwest_client().post(&url).body(body.clone());
            async move { call.send().await.unwrap().status().as_u16() }
        })
        .collect();
    let start = Instant::now();
    for _ in 0..20 {
        let asked = Instant::now();
        assert_eq!(relay.page("/healthz").await.0, 200);
        assert!(asked.elapsed() < Duration::from_secs(1), "health is held up: {:?}", asked.elapsed());
        sleep(Duration::from_millis(100)).await;
    }
    let answers = calls.join_all().await;
    assert!(answers.iter().all(|status| matches!(status, 200 | 429)), "{answers:?}");
    assert!(start.elapsed() < Duration::from_secs(12));
    assert_eq!(relay.terminate().await.code, 0);
}

/// Heads without an end, or with too many fields, are cut; their callers alone.
#[tokio::test]
async fn heads_that_do_not_end_are_cut() {
    let setup = patient().await;
    let mut good = Good::beside(setup.start().await).await;
    let addr = good.relay.http_addr.unwrap();
    let field = format!("x-filling: {}\r\n", "y".repeat(1000));
    for head in
        [field.repeat(1000), format!("{}\r\n", "x: y\r\n".repeat(200)), format!("x: {}", "y".repeat(1 << 20))]
    {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let bytes = format!("POST /v1/track HTTP/1.1\r\nhost: x\r\n{head}");
        // It may be cut while it is written.
        let _ = timeout(Duration::from_secs(5), stream.write_all(bytes.as_bytes())).await;
        let mut answer = Vec::new();
        let end = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(end.is_ok(), "it is neither answered nor cut");
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
    beside_both(&mut good).await;
    good.end(&setup, "heads without an end", 16 * MIB).await;
}
