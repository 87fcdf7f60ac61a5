//! The sandbox over a real socket, by requests written by hand.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;

const TIMEOUT: Duration = Duration::from_secs(5);

/// A request to Segment with one event.
fn segment(id: &str) -> String {
    let body = json!({"sentAt": "2026-01-01T00:00:01Z", "batch": [{
        "type": "track", "event": "Order Placed", "userId": "user-1", "messageId": id,
        "timestamp": "2026-01-01T00:00:00Z",
    }]});
    // sandbox-key:
    request("POST", "/v1/batch", "Authorization: Basic c2FuZGJveC1rZXk6\r\n", &body.to_string())
}

fn request(method: &str, target: &str, headers: &str, body: &str) -> String {
    format!(
        "{method} {target} HTTP/1.1\r\nHost: sandbox\r\n{headers}Content-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// Everything the server sent, and how the connection ended.
async fn exchange(addr: SocketAddr, request: String) -> (String, io::Result<()>) {
    let blocking = move || {
        let mut stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        let end = stream.read_to_end(&mut answer).map(drop);
        Ok((String::from_utf8_lossy(&answer).into_owned(), end))
    };
    match tokio::task::spawn_blocking(blocking).await.unwrap() {
        Ok(exchanged) => exchanged,
        Err(error) => (String::new(), Err(error)),
    }
}

async fn started() -> Sandbox {
    Sandbox::start(Options::default()).await.unwrap()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn end(result: io::Result<()>) -> io::ErrorKind {
    result.unwrap_err().kind()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_taken_once_however_often_it_comes() {
    let sandbox = started().await;
    for _ in 0..3 {
        let (answer, end) = exchange(sandbox.addr(), segment("id-1")).await;
        end.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert_eq!(body(&answer), r#"{"success":true}"#);
    }
    let taken = sandbox.taken(Vendor::Segment);
    assert_eq!(taken.len(), 1);
    assert_eq!((taken[0].id.as_str(), taken[0].copies), ("id-1", 3));
    assert_eq!(taken[0].event["userId"], "user-1");
    let stats = sandbox.stats(Vendor::Segment);
    assert_eq!((stats.requests, stats.taken, stats.duplicates, stats.connections), (3, 1, 2, 3));
    assert_eq!(stats.in_flight_max, 1);
    let seen = &sandbox.requests(Vendor::Segment)[0];
    assert_eq!((seen.status, seen.events, seen.fault.as_deref()), (Some(200), 1, None));
    assert_eq!(seen.body.as_ref().unwrap().len(), seen.body_bytes);
    assert_eq!(sandbox.stats(Vendor::Mixpanel).requests, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_before_takes_nothing_and_one_after_loses_the_answer() {
    let sandbox = started().await;
    for (fault, taken) in [(Fault::ResetBefore, 0), (Fault::ResetAfter, 1)] {
        sandbox.script(Vendor::Segment, [fault]);
        let (answer, result) = exchange(sandbox.addr(), segment("id-1")).await;
        assert_eq!((answer.as_str(), end(result)), ("", io::ErrorKind::ConnectionReset));
        assert_eq!(sandbox.taken(Vendor::Segment).len(), taken);
    }
    assert!(sandbox.requests(Vendor::Segment).iter().all(|seen| seen.status.is_none()));
    let (answer, _) = exchange(sandbox.addr(), segment("id-1")).await;
    assert!(answer.starts_with("HTTP/1.1 200"));
    assert_eq!(sandbox.taken(Vendor::Segment)[0].copies, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_in_the_reply_leaves_half_of_it() {
    let sandbox = started().await;
    sandbox.script(Vendor::Segment, [Fault::ResetMidReply]);
    let (answer, result) = exchange(sandbox.addr(), segment("id-1")).await;
    assert!(answer.contains("content-length: 16\r\n"), "{answer}");
    assert_eq!((body(&answer), end(result)), (r#"{"succes"#, io::ErrorKind::ConnectionReset));
    assert_eq!(sandbox.taken(Vendor::Segment).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drip_takes_its_time_and_arrives() {
    let sandbox = started().await;
    sandbox.script(Vendor::Segment, [Fault::Drip { millis: 10 }]);
    let start = Instant::now();
    let (answer, _) = exchange(sandbox.addr(), segment("id-1")).await;
    assert_eq!(body(&answer), r#"{"success":true}"#);
    assert!(start.elapsed() >= Duration::from_millis(160));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_request_is_seen_and_ends_with_its_client() {
    let sandbox = started().await;
    sandbox.script(Vendor::Segment, [Fault::Stall]);
    let mut client = TcpStream::connect(sandbox.addr()).unwrap();
    client.write_all(segment("id-1").as_bytes()).unwrap();
    while sandbox.requests(Vendor::Segment).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(client);
    let (answer, _) = exchange(sandbox.addr(), segment("id-2")).await;
    assert!(answer.starts_with("HTTP/1.1 200"));
    assert_eq!(sandbox.requests(Vendor::Segment)[0].status, None);
    assert_eq!(sandbox.taken(Vendor::Segment).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn down_is_refused_and_back_is_served_on_the_same_port() {
    let sandbox = started().await;
    let mut open = TcpStream::connect(sandbox.addr()).unwrap();
    open.set_read_timeout(Some(TIMEOUT)).unwrap();
    exchange(sandbox.addr(), segment("id-1")).await.1.unwrap();

    sandbox.go_down().await;
    sandbox.go_down().await;
    let (_, result) = exchange(sandbox.addr(), segment("id-2")).await;
    assert_eq!(end(result), io::ErrorKind::ConnectionRefused);
    assert_eq!(open.read(&mut [0]).unwrap_or(0), 0);

    sandbox.come_back().await.unwrap();
    sandbox.come_back().await.unwrap();
    exchange(sandbox.addr(), segment("id-2")).await.1.unwrap();
    assert_eq!(sandbox.taken(Vendor::Segment).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_it_stops_the_server() {
    let sandbox = started().await;
    let addr = sandbox.addr();
    drop(sandbox);
    let start = Instant::now();
    while TcpStream::connect(addr).is_ok() {
        assert!(start.elapsed() < TIMEOUT);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_speaks_its_vendors_language() {
    let sandbox = started().await;
    let cases = [
        (
            Vendor::Mixpanel,
            "/import",
            "413",
            r#"{"code":413,"error":"request exceeds max limit of 2097152 bytes","status":"Request Entity Too Large"}"#,
        ),
        (Vendor::Mixpanel, "/engage", "403", r#"{"error":"Forbidden","status":"error"}"#),
        (Vendor::Amplitude, "/batch", "413", r#"{"code":413,"error":"Payload too large"}"#),
        (Vendor::Segment, "/v1/batch", "501", r#"{"code":501,"message":"Not Implemented","success":false}"#),
        (Vendor::Segment, "/v1/batch", "400+body=no", "no"),
    ];
    for (vendor, path, fault, want) in cases {
        sandbox.script(vendor, [fault.parse().unwrap()]);
        let (answer, _) = exchange(sandbox.addr(), request("POST", path, "", "[]")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {}", &fault[..3])), "{answer}");
        assert_eq!(body(&answer), want);
    }
    sandbox.always(Vendor::Segment, Some("429+retry-after=soon".parse().unwrap()));
    let (answer, _) = exchange(sandbox.addr(), segment("id-1")).await;
    assert!(answer.contains("\r\nretry-after: soon\r\n"), "{answer}");
    assert!(sandbox.taken(Vendor::Segment).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_answers_take_nothing() {
    let sandbox = started().await;
    let faults = ["junk", "junk-json", "huge-body=300000", "redirect=http://127.0.0.1:1/", "body-limit=10"];
    sandbox.script(Vendor::Segment, faults.map(|fault| fault.parse().unwrap()));
    let mut answers = Vec::new();
    for _ in faults {
        answers.push(exchange(sandbox.addr(), segment("id-1")).await.0);
    }
    assert!(serde_json::from_str::<Value>(body(&answers[0])).is_err());
    assert!(body(&answers[1]).starts_with("[[[["));
    assert!(answers[2].contains("transfer-encoding: chunked\r\n"));
    assert!(body(&answers[2]).len() >= 300_000);
    assert!(
        answers[3].starts_with("HTTP/1.1 307") && answers[3].contains("location: http://127.0.0.1:1/\r\n")
    );
    assert!(answers[4].starts_with("HTTP/1.1 400"));
    assert!(sandbox.taken(Vendor::Segment).is_empty());
    let seen: Vec<_> = sandbox.requests(Vendor::Segment).into_iter().filter_map(|seen| seen.fault).collect();
    assert_eq!(seen, faults);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_path_and_method_are_told_apart() {
    let sandbox = started().await;
    let (answer, _) = exchange(sandbox.addr(), request("POST", "/decide", "", "[]")).await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    for path in ["/import", "/engage", "/groups", "/track", "/batch", "/2/httpapi", "/v1/batch"] {
        let (answer, _) = exchange(sandbox.addr(), request("PUT", path, "", "[]")).await;
        assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("allow: POST\r\n"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_process_controls_it_over_http() {
    let sandbox = started().await;
    let control = async |method: &str, target: &str, text: &str| {
        let (answer, _) = exchange(sandbox.addr(), request(method, target, "", text)).await;
        let status = answer.split(' ').nth(1).unwrap().to_owned();
        (status, serde_json::from_str::<Value>(body(&answer)).unwrap())
    };

    let (status, _) = control("POST", "/_sandbox/script?vendor=segment", "503\nreset-after\n").await;
    assert_eq!(status, "200");
    control("POST", "/_sandbox/always?vendor=segment", "429").await;
    let (answer, _) = exchange(sandbox.addr(), segment("id-1")).await;
    assert!(answer.starts_with("HTTP/1.1 503"));
    exchange(sandbox.addr(), segment("id-1")).await.1.unwrap_err();
    let (answer, _) = exchange(sandbox.addr(), segment("id-1")).await;
    assert!(answer.starts_with("HTTP/1.1 429"));
    control("POST", "/_sandbox/always?vendor=segment", "none").await;
    exchange(sandbox.addr(), segment("id-1")).await.1.unwrap();

    let (_, stats) = control("GET", "/_sandbox/stats", "").await;
    assert_eq!((&stats["segment"]["requests"], &stats["segment"]["taken"]), (&json!(4), &json!(1)));
    let (_, taken) = control("GET", "/_sandbox/taken?vendor=segment", "").await;
    assert_eq!(
        (&taken[0]["id"], &taken[0]["kind"], &taken[0]["copies"]),
        (&json!("id-1"), &json!("track"), &json!(2))
    );
    let (_, requests) = control("GET", "/_sandbox/requests?vendor=segment", "").await;
    assert_eq!(requests.as_array().unwrap().len(), 4);

    control("POST", "/_sandbox/reset", "").await;
    assert!(sandbox.taken(Vendor::Segment).is_empty());
    for (method, target, text, status) in [
        ("POST", "/_sandbox/script?vendor=segment", "sulk", "400"),
        ("POST", "/_sandbox/script?vendor=posthog", "503", "400"),
        ("POST", "/_sandbox/always?vendor=segment", "503\n503", "400"),
        ("GET", "/_sandbox/reset", "", "405"),
        ("GET", "/_sandbox/nothing", "", "404"),
    ] {
        assert_eq!(control(method, target, text).await.0, status, "{target}");
    }
}
