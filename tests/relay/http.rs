//! The HTTP door, as SDKs, pages and curl use it.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use analytics_relay::providers::sandbox::{TakenKind, Vendor};
use base64::{Engine, prelude::BASE64_STANDARD};
use flate2::{Compression, write::GzEncoder};
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    harness::{Relay, Setup, reqwest_client, taken},
    tls::{Authority, setup_with},
};

const PATIENCE: Duration = Duration::from_secs(30);

fn call(relay: &Relay, method: Method, path: &str) -> RequestBuilder {
    let addr = relay.http_addr.expect("the door is open");
    reqwest_client().request(method, format!("http://{addr}{path}"))
}

async fn post(relay: &Relay, path: &str, body: impl Into<reqwest::Body>) -> Response {
    call(relay, Method::POST, path).body(body).send().await.unwrap()
}

async fn post_json(relay: &Relay, path: &str, body: &Value) -> (u16, Value) {
    answer(post(relay, path, body.to_string()).await).await
}

async fn answer(response: Response) -> (u16, Value) {
    let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
    (status, serde_json::from_str(&text).unwrap_or_else(|_| text.into()))
}

/// What one connection answers to these bytes, until it closes or is silent.
async fn raw(relay: &Relay, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(relay.http_addr.unwrap()).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let (mut read, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(Ok(count)) = timeout(Duration::from_secs(1), stream.read(&mut buffer)).await {
        if count == 0 {
            break;
        }
        read.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&read).into_owned()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// One event of every kind, each with its own id.
fn every_kind(prefix: &str) -> Vec<Value> {
    let id = |kind: &str| format!("{prefix}-{kind}-0123456789");
    vec![
        json!({"type":"track","event":"Order Placed","userId":"user-1","messageId":id("track"),"properties":{"total":19.5}}),
        json!({"type":"identify","userId":"user-1","messageId":id("identify"),"traits":{"plan":"pro"}}),
        json!({"type":"page","name":"Home","userId":"user-1","messageId":id("page"),"properties":{"url":"https://x.example/"}}),
        json!({"type":"screen","name":"Main","anonymousId":"anon-1","messageId":id("screen")}),
        json!({"type":"group","groupId":"acme","userId":"user-1","messageId":id("group"),"traits":{"plan":"pro"}}),
        json!({"type":"alias","previousId":"user-0","userId":"user-1","messageId":id("alias")}),
    ]
}

/// Each by a call of its own, all in a batch, and a batch in gzip: whatever the door,
/// Segment gets every one of them once.
#[tokio::test]
async fn every_kind_of_event_arrives_once_by_whichever_path() {
    for durability in ["memory", "written"] {
        let mut setup = Setup::new().await;
        setup.set("DURABILITY", durability);
        let relay = setup.start().await;
        for event in every_kind("one") {
            let path = format!("/v1/{}", event["type"].as_str().unwrap());
            assert_eq!(post_json(&relay, &path, &event).await, (200, json!({"success": true})), "{event}");
        }
        for event in every_kind("short") {
            let path = format!("/v1/{}/", &event["type"].as_str().unwrap()[..1]);
            assert_eq!(post_json(&relay, &path, &event).await.0, 200, "{event}");
        }
        let batch = json!({"batch": every_kind("batch"), "sentAt": "2026-01-01T00:00:00Z"});
        assert_eq!(post_json(&relay, "/v1/batch", &batch).await, (200, json!({"success": true})));
        let zipped = gzip(json!({"batch": every_kind("zip")}).to_string().as_bytes());
        let sent = call(&relay, Method::POST, "/v1/import").header("content-encoding", "gzip").body(zipped);
        assert_eq!(sent.send().await.unwrap().status(), 200);
        // Of the paths' letters `a` is alias, `p` page, `s` screen: six of each.
        taken(&setup, Vendor::Segment, 24).await;
        let ended = relay.terminate().await;
        assert_eq!(ended.code, 0);
        let mut segment = setup.sandbox.taken(Vendor::Segment);
        segment.sort_by(|one, other| one.id.cmp(&other.id));
        assert!(segment.iter().all(|taken| taken.copies == 1));
        let of = |id: &str| segment.iter().find(|taken| taken.id == id).unwrap_or_else(|| panic!("{id}"));
        for prefix in ["one", "short", "batch", "zip"] {
            assert_eq!(of(&format!("{prefix}-page-0123456789")).kind, TakenKind::Page);
            assert_eq!(of(&format!("{prefix}-alias-0123456789")).event["previousId"], "user-0");
            assert_eq!(of(&format!("{prefix}-group-0123456789")).event["groupId"], "acme");
            assert_eq!(of(&format!("{prefix}-identify-0123456789")).event["traits"]["plan"], "pro");
            assert_eq!(of(&format!("{prefix}-track-0123456789")).event["properties"]["total"], 19.5);
        }
        assert!(ended.balance(Vendor::Segment).is_exact());
    }
}

/// Segment's rule: what is wrong with one costs no other, and its SDKs do not send it
/// for ever.
#[tokio::test]
async fn a_bad_event_of_a_batch_is_refused_alone() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let events = json!([
        {"type":"track","event":"Good","userId":"u","messageId":"good-1-0123456789"},
        {"type":"track","userId":"u"},
        {"type":"track","event":"No user"},
        {"type":"purchase","userId":"u"},
        {"type":"track","event":["x"],"userId":"u"},
        "no object",
        {"type":"track","event":"x","userId":"u","properties":[1]},
        {"type":"track","event":"x","userId":"u","timestamp":"yesterday"},
        {"type":"track","event":"x","userId":"u","properties":{"x":"x".repeat(40_000)}},
        {"type":"identify","anonymousId":"a","traits":{}},
        {"type":"track","event":"Good","userId":7,"messageId":"good-2-0123456789"},
    ]);
    let (status, said) = post_json(&relay, "/v1/batch", &json!({"batch": events, "answers": 1})).await;
    assert_eq!((status, &said["success"], &said["accepted"]), (200, &true.into(), &2.into()));
    let refused: Vec<(u64, &str, &str)> = said["refused"]
        .as_array()
        .unwrap()
        .iter()
        .map(|refused| {
            let violation = &refused["violations"][0];
            let text = |name: &str| violation[name].as_str().unwrap_or_default();
            (refused["index"].as_u64().unwrap(), text("reason"), text("field"))
        })
        .collect();
    assert_eq!(
        refused,
        [
            (1, "EVENT_NAME_EMPTY", "event"),
            (2, "NO_USER_OR_ANONYMOUS_ID", "userId"),
            (3, "TYPE_UNKNOWN", "type"),
            (4, "FIELD_NOT_TEXT", "event"),
            (5, "MESSAGE_MALFORMED", ""),
            (6, "PROPERTIES_MALFORMED", "properties"),
            (7, "TIME_MALFORMED", "timestamp"),
            (8, "EVENT_TOO_LARGE", ""),
            (9, "USER_ID_MISSING", "userId"),
        ]
    );
    // The same without answers: an SDK sees that it is done with.
    let again = json!({"batch": [{"type":"track","userId":"u"}]});
    assert_eq!(post_json(&relay, "/v1/batch", &again).await, (200, json!({"success": true})));
    taken(&setup, Vendor::Segment, 2).await;
    let segment = setup.sandbox.taken(Vendor::Segment);
    assert_eq!(segment[1].user, "7", "a number is a name too");
    relay.metric_is("relay_refusals_total", &["reason=\"TYPE_UNKNOWN\""], 1.0).await;
}

#[tokio::test]
async fn the_ingestion_api_answers_for_each_event() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let event = json!({"event":"Signed Up","userId":"u","messageId":"ingest-1-0123456789","sessionId":"s-1"});
    let (status, said) = post_json(&relay, "/v1/events/track", &event).await;
    let want = json!({"success":true,"eventId":"ingest-1-0123456789","status":"QUEUED","warnings":[]});
    assert_eq!((status, said), (202, want));
    let (status, said) =
        post_json(&relay, "/v1/events/identify", &json!({"userId":"u","traits":{"a":1}})).await;
    assert_eq!((status, said["eventId"].as_str().unwrap().len()), (202, 36));
    let (status, said) = post_json(&relay, "/v1/events/track", &json!({"event":"","userId":"u"})).await;
    assert_eq!(status, 400);
    let want = json!({"success":false,"error":{"code":"EVENT_NAME_EMPTY","message":"event: got \"\", want 1 to 255 bytes","field":"event"}});
    assert_eq!(said, want);

    let batch = json!({"events":[{"type":"track","event":"a","userId":"u","messageId":"b1-01234567890"},{"type":"page"},{"type":"track"}]});
    let (status, said) = post_json(&relay, "/v1/events/batch", &batch).await;
    assert_eq!(status, 207);
    assert_eq!((&said["accepted"], &said["rejected"], &said["deferred"]), (&2.into(), &1.into(), &0.into()));
    assert_eq!(said["results"][0], json!({"index":0,"status":"accepted","eventId":"b1-01234567890"}));
    assert_eq!(said["results"][2]["status"], "rejected");
    assert_eq!(said["results"][2]["errors"][0]["code"], "EVENT_NAME_EMPTY");
    let good = json!({"events":[{"type":"track","event":"a","userId":"u"}]});
    let (status, said) = post_json(&relay, "/v1/events/batch", &good).await;
    assert_eq!(
        (status, &said["success"], &said["results"][0]["status"]),
        (202, &true.into(), &"accepted".into())
    );
    taken(&setup, Vendor::Segment, 5).await;
}

/// A view is a page event, anything else a track; whose browser it is the connection says.
#[tokio::test]
async fn a_website_sends_its_views_in_a_form_of_its_own() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let view = json!({"website_id":"site-1","page":"/pricing/?a=b","title":"Pricing","visitor_id":"v-1","utm_source":"news","ip_address":"8.8.8.8","context":{"ip":"8.8.8.8","userAgent":"x"},"integrations":[],"event_id":"view-1-0123456789"});
    let (status, said) = post_json(&relay, "/api/v1/analytics/event", &view).await;
    let want = json!({"success":true,"event_id":"view-1-0123456789","status":"QUEUED"});
    assert_eq!((status, said), (202, want));
    let many = json!({"events":[
        {"website_id":"site-1","event_type":"signup","properties":{"plan":"pro"}},
        {"website_id":"site-1","event_type":"signup","visitor_id":["x"]},
        {"website_id":"site-1"},
    ]});
    let (status, said) = post_json(&relay, "/api/v1/analytics/event/batch", &many).await;
    assert_eq!(
        (status, &said["success"], &said["accepted"], &said["rejected"]),
        (202, &true.into(), &1.into(), &2.into())
    );
    assert_eq!((&said["errors"][0]["field"], &said["errors"][0]["index"]), (&"visitor_id".into(), &1.into()));
    assert_eq!(
        (&said["errors"][1]["field"], &said["errors"][1]["code"]),
        (&"page".into(), &"INVALID_EVENT".into())
    );
    for body in [view.clone(), json!({"events": [view]})] {
        assert_eq!(post_json(&relay, "/api/v1/events/track", &body).await.0, 202);
    }
    let (status, said) = post_json(&relay, "/api/v1/analytics/event", &json!({"page":"/"})).await;
    let want = json!({"error":"website_id: got \"\", want 1 to 100 bytes","code":"INVALID_EVENT","field":"website_id"});
    assert_eq!((status, said), (400, want));
    let (status, said) = answer(post(&relay, "/api/v1/analytics/event", "[1]").await).await;
    assert_eq!((status, said["error"].as_str().is_some()), (400, true), "{said}");
    taken(&setup, Vendor::Segment, 2).await;
    let segment = setup.sandbox.taken(Vendor::Segment);
    let of = |kind| segment.iter().find(|taken| taken.kind == kind).unwrap();
    let (page, track) = (of(TakenKind::Page), of(TakenKind::Track));
    assert_eq!(page.copies, 3, "each with the id that its caller gave");
    assert_eq!(
        (&page.event["properties"]["path"], &page.event["context"]["campaign"]["source"]),
        (&"/pricing".into(), &"news".into())
    );
    assert_eq!(
        (page.event["context"]["ip"].as_str(), page.event["anonymousId"].as_str()),
        (Some("127.0.0.0"), Some("v-1"))
    );
    assert_eq!((track.name.as_str(), &track.event["properties"]["plan"]), ("signup", &"pro".into()));
}

/// Who reads answers learns what was deferred.
#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let mut setup = Setup::new().await;
    setup.set("QUEUE_MAX_EVENTS", "10").set("FLUSH_INTERVAL_SECONDS", "600");
    let relay = setup.start().await;
    let events: Vec<Value> = (0..40)
        .map(|place| json!({"type":"track","event":"x","userId":"u","messageId":format!("full-{place:02}-0123456789")}))
        .collect();
    // However quickly the queue is emptied, some time it is full.
    let mut deferred = None;
    let start = Instant::now();
    while deferred.is_none() && start.elapsed() < PATIENCE {
        let sent = post(&relay, "/v1/events/batch", json!({"events": events}).to_string()).await;
        let (status, said) = answer(sent).await;
        if said["deferred"].as_u64().is_some_and(|count| count > 0) {
            deferred = Some((status, said));
        }
    }
    let (status, said) = deferred.expect("the queue was full once");
    assert!(matches!(status, 207 | 429), "{status}");
    assert!(said["retryAfterMs"].as_u64().unwrap() > 0);
}

/// An SDK reads the status and sends all of it again: what it is told to send again was
/// not taken, also where events have no ids and the batch is larger than the queue.
#[tokio::test]
async fn a_whole_batch_is_taken_or_nothing_of_it() {
    const CALLERS: usize = 16;
    const EVENTS: usize = 40;
    let mut setup = Setup::new().await;
    setup.set("QUEUE_MAX_EVENTS", "10");
    let relay = setup.start().await;
    let batch = json!({"batch": vec![json!({"type":"track","event":"x","userId":"u"}); EVENTS]}).to_string();
    let (mut rounds, start) = (0, Instant::now());
    let mut told_to_wait = 0;
    // Until the queue was full once.
    while told_to_wait == 0 || rounds < 3 {
        assert!(start.elapsed() < PATIENCE, "never full in {rounds} rounds");
        rounds += 1;
        let callers = (0..CALLERS).map(|_| async {
            let mut told_to_wait = 0;
            loop {
                let sent = post(&relay, "/v1/batch", batch.clone()).await;
                if sent.status() == 200 {
                    return told_to_wait;
                }
                assert_eq!(
                    (sent.status().as_u16(), &sent.headers()["retry-after"]),
                    (429, &"1".parse().unwrap())
                );
                assert_eq!(answer(sent).await.1["code"], "rate_limited");
                assert!(start.elapsed() < 2 * PATIENCE);
                told_to_wait += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        told_to_wait += futures_util::future::join_all(callers).await.iter().sum::<u32>();
    }
    let ended = relay.terminate().await;
    let balance = ended.balance(Vendor::Segment);
    // Its lane is as small as the queue: many of them end as dead letters.
    assert_eq!(
        (balance.accepted, balance.is_exact()),
        ((rounds * CALLERS * EVENTS) as u64, true),
        "{balance:?}"
    );
}

/// What is wrong with a call is known before its body is here; its caller, who sends on,
/// reads the answer all the same, and not a broken connection.
#[tokio::test]
async fn who_is_refused_early_reads_why() {
    let mut setup = Setup::new().await;
    setup.set("HTTP_WRITE_KEYS", "wk");
    let relay = setup.start().await;
    for (path, header, status) in [
        ("/v1/batch", "x-api-key: wrong", "401"),
        ("/v1/nothing", "x-api-key: wk", "404"),
        ("/v1/health", "x-api-key: wk", "404"),
        ("/v1/batch", "x-api-key: wk\r\ncontent-type: text/xml", "415"),
        ("/health", "x-api-key: wk", "405"),
    ] {
        let mut stream = TcpStream::connect(relay.http_addr.unwrap()).await.unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 400000\r\n{header}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..40 {
            stream
                .write_all(&[b'x'; 10_000])
                .await
                .unwrap_or_else(|error| panic!("{path} {header}: {error}"));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut answer = [0; 512];
        let read = timeout(PATIENCE, stream.read(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8_lossy(&answer[..read]);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path} {header}: {answer}");
    }
}

#[tokio::test]
async fn every_error_says_what_is_wrong_in_the_words_of_its_form() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let big = format!("{{\"batch\":[{{\"type\":\"track\",\"x\":\"{}\"}}]}}", "x".repeat(1 << 20));
    let beside =
        format!("{{\"context\":{{\"x\":\"{}\"}},\"batch\":[{}1]}}", "x".repeat(20_000), "1,".repeat(500));
    let rows: [(&str, &str, String, u16, &str); 13] = [
        ("POST", "/v1/nothing", String::new(), 404, "not_found"),
        ("GET", "/v1/track", String::new(), 405, "method_not_allowed"),
        ("PUT", "/v1/batch", String::new(), 405, "method_not_allowed"),
        ("POST", "/v1/track", String::new(), 400, "invalid_request"),
        ("POST", "/v1/track", "[1]".into(), 400, "invalid_request"),
        ("POST", "/v1/track", "{\"event\":\"x\"".into(), 400, "invalid_request"),
        ("POST", "/v1/track", "{\"event\":\"x\"}".into(), 400, "invalid_request"),
        ("POST", "/v1/batch", "{}".into(), 400, "invalid_request"),
        ("POST", "/v1/batch", "{\"batch\":[]}".into(), 400, "invalid_request"),
        ("POST", "/v1/batch", "{\"batch\":{}}".into(), 400, "invalid_request"),
        ("POST", "/v1/batch", format!("{{\"batch\":[{}1]}}", "1,".repeat(2500)), 400, "invalid_request"),
        ("POST", "/v1/batch", beside, 400, "invalid_request"),
        ("POST", "/v1/batch", big.clone(), 400, "payload_too_large"),
    ];
    for (method, path, body, status, code) in rows {
        let sent =
            call(&relay, method.parse().unwrap(), path).body(body).header("origin", "https://x.example");
        let sent = sent.send().await.unwrap();
        assert_eq!(sent.headers()["access-control-allow-origin"], "https://x.example", "{path}");
        let (got, said) = answer(sent).await;
        assert_eq!(
            (got, &said["code"], &said["success"]),
            (status, &code.into(), &false.into()),
            "{method} {path} {said}"
        );
        assert!(!said["message"].as_str().unwrap().is_empty());
    }
    let (status, said) = answer(post(&relay, "/v1/events/batch", big).await).await;
    assert_eq!((status, &said["error"]["code"]), (413, &"PAYLOAD_TOO_LARGE".into()));
    let xml = call(&relay, Method::POST, "/v1/events/track").header("content-type", "text/xml").body("<x/>");
    let (status, said) = answer(xml.send().await.unwrap()).await;
    assert_eq!((status, &said["error"]["code"]), (415, &"UNSUPPORTED_MEDIA_TYPE".into()));
    let brotli = call(&relay, Method::POST, "/v1/track").header("content-encoding", "br").body("x");
    assert_eq!(brotli.send().await.unwrap().status(), 415);
}

#[tokio::test]
async fn what_browsers_and_old_sdks_send_is_read() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let event =
        |id: &str| json!({"event":"x","userId":"u","messageId":format!("{id}-0123456789012")}).to_string();
    let types = [
        "application/json; charset=utf-8",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "application/octet-stream",
    ];
    for (place, content_type) in types.iter().enumerate() {
        let sent = call(&relay, Method::POST, "/v1/track").header("content-type", *content_type);
        assert_eq!(
            sent.body(event(&format!("type-{place}"))).send().await.unwrap().status(),
            200,
            "{content_type}"
        );
    }
    assert_eq!(post(&relay, "/v1/track", format!("\u{feff}{}", event("bom"))).await.status(), 200);
    // Compressed, and the header was lost.
    assert_eq!(post(&relay, "/v1/track", gzip(event("sniffed").as_bytes())).await.status(), 200);
    let half = r#"{"event":"half \ud83d","userId":"u","messageId":"half-of-a-pair-0123"}"#;
    assert_eq!(post(&relay, "/v1/track", half).await.status(), 200);
    let twice = r#"{"event":"first","event":"last","userId":"u","messageId":"twice-01234567890"}"#;
    assert_eq!(post(&relay, "/v1/track", twice).await.status(), 200);
    let mut not_utf_8 = event("latin").into_bytes();
    not_utf_8.insert(10, 0xE9);
    assert_eq!(post(&relay, "/v1/track", not_utf_8).await.status(), 400);
    let bomb = gzip(&vec![b' '; 64 << 20]);
    assert!(bomb.len() < 512 * 1024);
    let sent = call(&relay, Method::POST, "/v1/batch").header("content-encoding", "gzip").body(bomb);
    assert_eq!(answer(sent.send().await.unwrap()).await.1["code"], "payload_too_large");
    taken(&setup, Vendor::Segment, 8).await;
    let segment = setup.sandbox.taken(Vendor::Segment);
    let name = |id: &str| segment.iter().find(|taken| taken.id.starts_with(id)).unwrap().name.clone();
    assert_eq!((name("half"), name("twice")), ("half \u{fffd}".into(), "last".into()));
}

#[tokio::test]
async fn only_the_keys_that_are_set_are_taken_wherever_they_stand() {
    let mut setup = Setup::new().await;
    setup.set("HTTP_WRITE_KEYS", "wk-1, wk-2");
    let relay = setup.start().await;
    let event = json!({"event":"x","userId":"u"});
    let basic = |key: &str| format!("Basic {}", BASE64_STANDARD.encode(format!("{key}:")));
    for (header, value, status) in [
        ("authorization", basic("wk-1"), 200),
        ("authorization", basic("wk-2"), 200),
        ("authorization", "Bearer wk-2".into(), 200),
        ("x-api-key", "wk-1".into(), 200),
        ("authorization", basic("wk-3"), 401),
        ("x-other", "wk-1".into(), 401),
    ] {
        let sent = call(&relay, Method::POST, "/v1/track").header(header, value).body(event.to_string());
        let (got, said) = answer(sent.send().await.unwrap()).await;
        assert_eq!(got, status, "{header} {said}");
        assert!(status == 200 || said["code"] == "invalid_write_key");
    }
    let batch = |key: &str| json!({"batch":[{"type":"track","event":"x","userId":"u"}],"writeKey":key});
    assert_eq!(post_json(&relay, "/v1/batch", &batch("wk-1")).await.0, 200);
    assert_eq!(post_json(&relay, "/v1/batch", &batch("wk-9")).await.0, 401);
    assert_eq!(post_json(&relay, "/beacon/v1/batch?writeKey=wk-2", &batch("wk-9")).await.0, 200);
    // Of head and body the head holds.
    let sent = call(&relay, Method::POST, "/v1/batch").header("authorization", basic("wk-9"));
    assert_eq!(sent.body(batch("wk-1").to_string()).send().await.unwrap().status(), 401);
    assert_eq!(call(&relay, Method::GET, "/v1/projects/wk-9/settings").send().await.unwrap().status(), 401);
    taken(&setup, Vendor::Segment, 6).await;
    let logs = relay.raw_logs().join("\n");
    assert!(logs.contains("calls are refused for their write key") && !logs.contains("wk-"), "{logs}");
    assert!(logs.contains("127.0.0.1") && logs.contains("/v1/track"), "{logs}");
}

#[tokio::test]
async fn a_page_may_send_and_reads_what_it_is_told() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let preflight = call(&relay, Method::OPTIONS, "/v1/t")
        .header("origin", "https://shop.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type,x-retry-count");
    let preflight = preflight.send().await.unwrap();
    assert_eq!(preflight.status(), 204);
    for (name, value) in [
        ("access-control-allow-origin", "https://shop.example"),
        ("access-control-allow-credentials", "true"),
        ("access-control-allow-methods", "GET, POST, OPTIONS"),
        ("access-control-allow-headers", "authorization,content-type,x-retry-count"),
        ("access-control-max-age", "900"),
        ("vary", "origin"),
    ] {
        assert_eq!(preflight.headers()[name], value, "{name}");
    }
    let escaped = call(&relay, Method::GET, "/v1/projects/a%20b%2F/settings").send().await.unwrap();
    assert_eq!(answer(escaped).await.1["integrations"]["Segment.io"]["apiKey"], "a b/");
    let settings = call(&relay, Method::GET, "/v1/projects/wk_test/settings").send().await.unwrap();
    assert_eq!(settings.headers()["cache-control"], "public, max-age=120");
    let (status, settings) = answer(settings).await;
    let of_segment = &settings["integrations"]["Segment.io"];
    let host = format!("{}/v1", relay.http_addr.unwrap());
    assert_eq!(
        (status, &of_segment["apiKey"], &of_segment["apiHost"]),
        (200, &"wk_test".into(), &host.into())
    );
    assert_eq!(of_segment["protocol"], "http");

    let data = json!({"event":"Mail Opened","userId":"u","messageId":"pixel-0123456789012"}).to_string();
    let path = format!("/v1/pixel/track?data={}", BASE64_STANDARD.encode(data).replace('+', "%2B"));
    let asked = call(&relay, Method::HEAD, &path).send().await.unwrap();
    assert_eq!(
        (asked.status().as_u16(), &asked.headers()["content-type"]),
        (200, &"image/gif".parse().unwrap())
    );
    for path in [path.as_str(), "/v1/pixel/track", "/v1/pixel/track?data=!!", "/v1/pixel/nothing?data=e30="] {
        let image = call(&relay, Method::GET, path).header("user-agent", "Mail/1").send().await.unwrap();
        assert_eq!(image.status(), 200);
        assert_eq!(image.headers()["content-type"], "image/gif");
        assert!(image.bytes().await.unwrap().starts_with(b"GIF89a"));
    }
    relay.metric_is("relay_requests_total", &["/v1/pixel", "\"400\""], 2.0).await;
    relay.metric_is("relay_requests_total", &["/v1/pixel", "\"404\""], 1.0).await;
    let metrics = post(&relay, "/v1/m", r#"{"series":[]}"#).await;
    assert_eq!(metrics.status(), 200);
    taken(&setup, Vendor::Segment, 1).await;
    let opened = &setup.sandbox.taken(Vendor::Segment)[0];
    assert_eq!(
        (&opened.event["context"]["ip"], &opened.event["context"]["userAgent"]),
        (&"127.0.0.0".into(), &"Mail/1".into())
    );
    for path in ["/health", "/healthz", "/ready", "/readyz"] {
        let (status, said) = answer(call(&relay, Method::GET, path).send().await.unwrap()).await;
        assert_eq!((status, said), (200, "SERVING".into()), "{path}");
    }
}

/// The user's own address only if the user's own device calls, or its caller says so.
#[tokio::test]
async fn where_an_event_happened_and_who_gets_it_is_what_its_context_says() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let now_ms = |behind_ms: i64| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        i64::try_from(now.as_millis()).unwrap() - behind_ms
    };
    let hour = 3_600_000;
    let batch = json!({
        "context": {"library": {"name": "analytics-node"}, "locale": "de-DE"},
        "integrations": {"Mixpanel": false},
        "sentAt": now_ms(hour),
        "batch": [
            {"type":"track","event":"server","userId":"u","messageId":"server-0123456789012","timestamp":now_ms(2 * hour)},
            {"type":"track","event":"own","userId":"u","messageId":"own-0123456789012345","context":{"ip":"203.0.113.9","locale":"fr-FR","userAgent":"Mozilla/5.0"},"integrations":{"Mixpanel":true}},
            {"type":"track","event":"direct","userId":"u","messageId":"direct-0123456789012","context":{"direct":true}},
            {"type":"track","event":"nobody","userId":"u","messageId":"nobody-0123456789012","integrations":{"All":false}},
        ],
    });
    assert_eq!(post_json(&relay, "/v1/batch", &batch).await.0, 200);
    taken(&setup, Vendor::Segment, 3).await;
    taken(&setup, Vendor::Mixpanel, 1).await;
    let ended = relay.terminate().await;
    assert_eq!((ended.balance(Vendor::Segment).not_for, ended.balance(Vendor::Mixpanel).not_for), (1, 3));
    let segment = setup.sandbox.taken(Vendor::Segment);
    let of = |name: &str| segment.iter().find(|taken| taken.name == name).unwrap();
    let (server, own, direct) = (of("server"), of("own"), of("direct"));
    assert_eq!(
        (server.event["context"].get("ip"), &server.event["context"]["locale"]),
        (None, &"de-DE".into())
    );
    assert_eq!(server.event["context"]["library"]["name"], "analytics-node");
    assert_eq!(
        (&own.event["context"]["ip"], &own.event["context"]["locale"]),
        (&"203.0.113.9".into(), &"fr-FR".into())
    );
    assert_eq!(direct.event["context"]["ip"], "127.0.0.0", "cut, as nobody has said it");
    // Its clock is an hour behind: it happened an hour ago, and not two.
    let time: jiff::Timestamp = server.event["timestamp"].as_str().unwrap().parse().unwrap();
    let off_ms = (now_ms(hour) - time.as_millisecond()).abs();
    assert!(off_ms < 60_000, "{off_ms}");
}

/// Also one that is for nobody, and that a later process reads from the log.
#[tokio::test]
async fn who_gets_an_event_is_the_same_after_a_kill() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "written");
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, Some("stall".parse().unwrap()));
    }
    let relay = setup.start().await;
    let event = |id: &str, integrations: Value| json!({"type":"track","event":id,"userId":"u","messageId":format!("{id}-0123456789012"),"integrations":integrations});
    let batch = json!({"batch": [
        event("nobody", json!({"All": false})),
        event("segment", json!({"All": false, "Segment.io": true})),
        event("others", json!({"Segment.io": false})),
        event("all", json!({"All": true})),
    ]});
    assert_eq!(post_json(&relay, "/v1/batch", &batch).await.0, 200);
    relay.signal("KILL");
    relay.ended(Instant::now()).await;
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, None);
    }
    let relay = setup.start().await;
    for vendor in Vendor::ALL {
        relay.settled(vendor, 4).await;
    }
    let names = |vendor| {
        let mut names: Vec<_> = setup.sandbox.taken(vendor).into_iter().map(|taken| taken.name).collect();
        names.sort();
        names
    };
    assert_eq!(names(Vendor::Segment), ["all", "segment"]);
    assert_eq!(names(Vendor::Mixpanel), ["all", "others"]);
    assert_eq!(names(Vendor::Amplitude), ["all", "others"]);
}

/// HTTP/1.1 as it may be and as it may not be spoken; HTTP/2 on the same port.
#[tokio::test]
async fn the_protocol_is_served_as_it_is_written() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let body = r#"{"event":"x","userId":"u"}"#;
    let head = |more: &str| format!("POST /v1/track HTTP/1.1\r\nHost: x\r\n{more}\r\n");
    let one = format!("{}{body}", head(&format!("Content-Length: {}\r\n", body.len())));
    let pipelined = raw(&relay, [one.as_str(); 3].concat().as_bytes()).await;
    assert_eq!(pipelined.matches("HTTP/1.1 200 OK").count(), 3, "{pipelined}");
    let chunked = format!(
        "{}5\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n",
        head("Transfer-Encoding: chunked\r\n"),
        &body[..5],
        body.len() - 5,
        &body[5..]
    );
    assert!(raw(&relay, chunked.as_bytes()).await.starts_with("HTTP/1.1 200"), "chunked");
    let expecting = head(&format!("Expect: 100-continue\r\nContent-Length: {}\r\n", body.len()));
    assert!(raw(&relay, expecting.as_bytes()).await.starts_with("HTTP/1.1 100 Continue"));
    let too_large = head("Expect: 100-continue\r\nContent-Length: 4000000\r\n");
    let told = raw(&relay, too_large.as_bytes()).await;
    assert!(told.starts_with("HTTP/1.1 400") && told.contains("payload_too_large"), "{told}");
    for bad in
        ["Content-Length: x\r\n", "Content-Length: 1\r\nContent-Length: 2\r\n", "Content-Length: -1\r\n"]
    {
        assert!(raw(&relay, head(bad).as_bytes()).await.starts_with("HTTP/1.1 400"), "{bad}");
    }
    let four_megabytes = post(&relay, "/v1/batch", vec![b' '; 4 << 20]).await;
    assert_eq!(answer(four_megabytes).await.1["code"], "payload_too_large", "read, and not cut off");
    let h2 = reqwest::Client::builder().http2_prior_knowledge().no_proxy().build().unwrap();
    let url = format!("http://{}/v1/track", relay.http_addr.unwrap());
    let sent = h2.post(url).body(body).send().await.unwrap();
    assert_eq!((sent.status().as_u16(), sent.version()), (200, reqwest::Version::HTTP_2));
    taken(&setup, Vendor::Segment, 5).await;
}

/// Half a body holds nobody else up, and nothing of it is taken; when the relay stops,
/// it does not wait for it.
#[tokio::test]
async fn half_a_body_holds_up_nobody_and_not_the_stop() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let mut half = Vec::new();
    for _ in 0..50 {
        let mut stream = TcpStream::connect(relay.http_addr.unwrap()).await.unwrap();
        stream
            .write_all(b"POST /v1/batch HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{\"batch\":")
            .await
            .unwrap();
        half.push(stream);
    }
    let event = json!({"event":"x","userId":"u"});
    assert_eq!(post_json(&relay, "/v1/track", &event).await.0, 200);
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    assert!(ended.took < Duration::from_secs(4), "{:?}", ended.took);
    assert_eq!(ended.balance(Vendor::Segment).delivered, 1);
}

/// While it drains: the connection is there, and says that it is over.
#[tokio::test]
async fn a_relay_that_stops_says_so_and_when_to_come_back() {
    let setup = Setup::new().await;
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, Some("stall".parse().unwrap()));
    }
    let relay = setup.start().await;
    let event = json!({"event":"x","userId":"u"}).to_string();
    assert_eq!(post(&relay, "/v1/track", event.clone()).await.status(), 200);
    relay.signal("TERM");
    relay.log("draining").await;
    let refused = post(&relay, "/v1/track", event.clone()).await;
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (503, "1"));
    assert_eq!(answer(refused).await.1["code"], "unavailable");
    let (status, said) = answer(post(&relay, "/v1/events/track", event).await).await;
    assert_eq!((status, &said["error"]["code"]), (503, &"DRAINING".into()));
    let (status, said) = answer(call(&relay, Method::GET, "/ready").send().await.unwrap()).await;
    assert_eq!((status, said), (503, "DRAINING".into()));
    let ended = relay.ended(Instant::now()).await;
    let balance = ended.balance(Vendor::Segment);
    assert!(balance.is_exact() && balance.accepted == 1, "{balance:?}");
}

#[tokio::test]
async fn both_protocols_are_served_over_tls() {
    let authority = Authority::new();
    let mut setup = setup_with(&authority).await;
    for file in ["CERT_FILE", "KEY_FILE"] {
        let path = setup.vars[&format!("GRPC_TLS_{file}")].clone();
        setup.set(&format!("HTTP_TLS_{file}"), &path);
    }
    let relay = setup.start().await;
    let url = format!("https://localhost:{}/v1/track", relay.http_addr.unwrap().port());
    let trusted = reqwest::Certificate::from_pem(authority.pem().as_bytes()).unwrap();
    drop(reqwest_client());
    let event = json!({"event":"x","userId":"u"}).to_string();
    for (is_old, version) in [(true, reqwest::Version::HTTP_11), (false, reqwest::Version::HTTP_2)] {
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([trusted.clone()]);
        let client = if is_old { client.http1_only() } else { client };
        let sent = client.build().unwrap().post(&url).body(event.clone()).send().await.unwrap();
        assert_eq!((sent.status().as_u16(), sent.version()), (200, version));
    }
    let plain = url.replace("https", "http");
    assert!(reqwest_client().post(plain).body(event).send().await.is_err(), "TLS and nothing else");
    taken(&setup, Vendor::Segment, 2).await;
}
