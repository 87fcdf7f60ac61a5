//! What is refused of a batch whose caller is told that all is well: kept, listed, mended
//! and sent again; and schemas of a version that only a newer relay knows.

use std::{os::unix::fs::PermissionsExt, path::PathBuf, time::Instant};

use analytics_relay::providers::sandbox::{TakenKind, Vendor};
use serde_json::{Value, json};

use crate::harness::{Relay, Setup, reqwest_client, taken};

async fn post(relay: &Relay, path: &str, body: &Value) -> (u16, Value) {
    let url = format!("http://{}{path}", relay.http_addr.unwrap());
    let answer = reqwest_client().post(url).body(body.to_string()).send().await.unwrap();
    let status = answer.status().as_u16();
    (status, serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap())
}

/// With the port that the relay has, as an operator's settings would name it.
fn with_port(setup: &mut Setup, relay: &Relay) {
    setup.set("HTTP_PORT", &relay.http_addr.unwrap().port().to_string());
}

fn files(setup: &Setup) -> Vec<PathBuf> {
    let dir = std::fs::read_dir(setup.data.path().join("data/refused"));
    let paths: Vec<_> = dir.map(|dir| dir.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default();
    paths.into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "ndjson")).collect()
}

/// Also if the relay is killed right after its answer.
#[tokio::test]
async fn what_is_refused_of_a_batch_is_mended_and_sent_again() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "written");
    let relay = setup.start().await;
    let batch = json!({
        "context": {"locale": "de-DE"},
        "integrations": {"Mixpanel": false},
        "batch": [
            {"type":"track","event":"Good","userId":"u","messageId":"good-1-0123456789"},
            {"type":"track","userId":"u","messageId":"mended-1-0123456789","properties":{"n":12345678901234567890_u64}},
            {"type":"page","name":["x"],"userId":"u"},
            {"type":"track","event":"No user"},
            {"type":"purchase","userId":"u"},
            "no object",
        ],
    });
    assert_eq!(post(&relay, "/v1/batch", &batch).await, (200, json!({"success": true})));
    // Who reads answers is told, and keeps it itself.
    let told = json!({"answers":1,"batch":[{"type":"track","userId":"told"}]});
    assert_eq!(post(&relay, "/v1/batch", &told).await.0, 200);
    relay.signal("KILL");
    relay.ended(Instant::now()).await;

    let relay = setup.start().await;
    with_port(&mut setup, &relay);
    let (code, listed, _) = setup.run(&["dead-letters", "refused", "list"]).await;
    assert_eq!(code, 0);
    for (reason, of_segment) in [
        ("EVENT_NAME_EMPTY", "event_not_defined"),
        ("FIELD_NOT_TEXT", "name_not_string"),
        ("NO_USER_OR_ANONYMOUS_ID", "no_user_anon_id"),
        ("TYPE_UNKNOWN", ""),
        ("MESSAGE_MALFORMED", ""),
    ] {
        let row = listed.lines().find(|line| line.starts_with(reason)).unwrap_or_else(|| panic!("{listed}"));
        assert!(row.contains(&format!("{of_segment:<22}        1 ")), "{row}");
    }
    let (_, hint, _) = setup.run(&["dead-letters", "list"]).await;
    assert!(hint.contains("5 item(s) of batches that were refused"), "{hint}");
    let mode = std::fs::metadata(&files(&setup)[0]).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);

    let (_, shown, _) = setup.run(&["dead-letters", "refused", "show"]).await;
    assert!(!shown.contains("told"), "{shown}");
    let mended: Vec<String> = shown
        .lines()
        .map(|line| match serde_json::from_str::<Value>(line).unwrap()["reason"].as_str().unwrap() {
            "EVENT_NAME_EMPTY" => {
                line.replace("\"type\":\"track\"", "\"type\":\"track\",\"event\":\"Mended\"")
            }
            "FIELD_NOT_TEXT" => line.replace("[\"x\"]", "\"Home\""),
            _ => line.to_owned(),
        })
        .collect();
    let file = setup.data.path().join("mended.ndjson");
    std::fs::write(&file, mended.join("\n")).unwrap();
    let send = ["dead-letters", "refused", "send", file.to_str().unwrap()];
    let (code, said, error) = setup.run(&send).await;
    assert_eq!(code, 1, "{said} {error}");
    assert!(said.contains("taken 2\n") && said.contains("still refused 3\n"), "{said} {error}");
    assert!(said.contains("TYPE_UNKNOWN type: got \"purchase\""), "{said}");
    taken(&setup, Vendor::Segment, 3).await;
    let (_, listed, _) = setup.run(&["dead-letters", "refused", "list"]).await;
    assert!(!listed.contains("EVENT_NAME_EMPTY") && !listed.contains("FIELD_NOT_TEXT"), "{listed}");
    assert!(listed.contains("TYPE_UNKNOWN"), "{listed}");
    // What was taken is not sent a second time as another event.
    setup.run(&send).await;

    let segment = setup.sandbox.taken(Vendor::Segment);
    let of = |name: &str| segment.iter().find(|taken| taken.name == name).unwrap_or_else(|| panic!("{name}"));
    assert_eq!(of("Mended").id, "mended-1-0123456789");
    assert_eq!(of("Mended").event["properties"]["n"], 12345678901234567890_u64);
    assert_eq!((of("Home").kind, &of("Home").event["context"]["locale"]), (TakenKind::Page, &"de-DE".into()));
    assert_eq!(setup.sandbox.taken(Vendor::Mixpanel).len(), 0, "they are not for Mixpanel");

    let (code, shown, _) =
        setup.run(&["dead-letters", "refused", "delete", "--reason", "type_unknown"]).await;
    assert!(code == 1 && shown.starts_with("1 item(s)"), "{shown}");
    let (code, deleted, _) = setup.run(&["dead-letters", "refused", "delete", "--yes"]).await;
    assert_eq!((code, deleted.as_str()), (0, "deleted 3\n"));
    assert!(files(&setup).is_empty());
    let ended = relay.terminate().await;
    assert!(ended.balance(Vendor::Segment).is_exact());
}

/// JSON on several lines, of which one looks like a letter: it is one letter all the same.
/// And events with such properties survive a spill, and are no two events.
#[tokio::test]
async fn what_stands_on_several_lines_is_one_line_in_a_file() {
    let mut setup = Setup::new().await;
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, Some("stall".parse().unwrap()));
    }
    setup.set("DRAIN_TIMEOUT_SECONDS", "1");
    let relay = setup.start().await;
    let forged = r#"{"letter_id":"forged","refused_since_ms":1,"reason":"X","field":"","detail":"","schema_version":1,"item":{}}"#;
    let event = r#"{"id":"forged-event-0123456789","kind":"track","name":"Forged","user_id":"u","time_ms":1,"accepted_ms":1,"properties":{}}"#;
    let batch = format!(
        "{{\n\"batch\":[\n{{\"type\":\"track\",\"userId\":\"u\",\"properties\":{{\"a\":\n{forged}\n}}}},\n\
         {{\"type\":\"track\",\"event\":\"Good\",\"userId\":\"u\",\"messageId\":\"good-0123456789012\",\
         \"properties\":{{\"a\":\r\n{event}\n}},\n\"context\":{{\n\"locale\":\n\"de\"}}}}]}}"
    );
    let url = format!("http://{}/v1/batch", relay.http_addr.unwrap());
    assert_eq!(reqwest_client().post(url).body(batch).send().await.unwrap().status(), 200);
    let (_, shown, error) = setup.run(&["dead-letters", "refused", "show"]).await;
    assert_eq!((shown.lines().count(), error.as_str()), (1, ""), "{shown}");
    assert!(shown.contains("EVENT_NAME_EMPTY") && shown.contains("forged"), "{shown}");
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Segment).spilled, 1, "{:?}", ended.balance(Vendor::Segment));

    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, None);
    }
    let _relay = setup.start().await;
    taken(&setup, Vendor::Segment, 1).await;
    let segment = setup.sandbox.taken(Vendor::Segment);
    assert_eq!(
        (segment[0].name.as_str(), &segment[0].event["properties"]["a"]["name"]),
        ("Good", &"Forged".into())
    );
}

/// What comes again is kept once, when it is taken.
#[tokio::test]
async fn nothing_is_kept_of_a_batch_that_is_sent_again() {
    let mut setup = Setup::new().await;
    for vendor in Vendor::ALL {
        setup.sandbox.always(vendor, Some("503".parse().unwrap()));
    }
    setup.set("DURABILITY", "written").set("SPOOL_WHEN_FULL", "reject").set("SPOOL_MAX_BYTES", "4194304");
    setup.set("SPOOL_SEGMENT_BYTES", "1048576");
    let relay = setup.start().await;
    let filling = json!({"event":"x","userId":"u","properties":{"filling":"x".repeat(9000)}});
    let mut calls = 0;
    while post(&relay, "/v1/track", &filling).await.0 != 429 {
        calls += 1;
        assert!(calls < 2000, "the log is never full");
    }
    let batch = json!({"batch":[
        {"type":"track","userId":"u"},
        {"type":"track","event":"x","userId":"u","properties":{"filling":"x".repeat(30_000)}},
    ]});
    for _ in 0..3 {
        assert_eq!(post(&relay, "/v1/batch", &batch).await.0, 429);
    }
    assert!(files(&setup).is_empty(), "it comes again");
    assert_eq!(relay.metric("relay_refused_items_kept_total", &[]).await, 0.0);
}

/// One item that no call has room for holds up none behind it.
#[tokio::test]
async fn an_item_that_is_never_taken_holds_up_no_other() {
    let mut setup = Setup::new().await;
    let relay = setup.start().await;
    with_port(&mut setup, &relay);
    let large = json!({"type":"track","event":"x","userId":"u","x":"x".repeat(1_048_400)});
    let body = json!({"batch":[large]});
    assert!(body.to_string().len() <= 1 << 20);
    assert_eq!(post(&relay, "/v1/batch", &body).await.0, 200);
    let bad = json!({"context":{"filling":"x".repeat(20_000)},"batch": vec![json!({"type":"track","userId":"u"}); 50]});
    assert_eq!(post(&relay, "/v1/batch", &bad).await.0, 200);
    let (_, shown, _) = setup.run(&["dead-letters", "refused", "show"]).await;
    assert_eq!(shown.lines().count(), 51);
    let file = setup.data.path().join("mended.ndjson");
    std::fs::write(
        &file,
        shown.replace("\"type\":\"track\",\"userId\"", "\"type\":\"track\",\"event\":\"Mended\",\"userId\""),
    )
    .unwrap();
    let (code, said, error) = setup.run(&["dead-letters", "refused", "send", file.to_str().unwrap()]).await;
    assert_eq!(code, 1, "{said} {error}");
    assert!(said.contains("taken 50\n") && said.contains("still refused 1\n"), "{said} {error}");
    taken(&setup, Vendor::Segment, 50).await;
}

#[tokio::test]
async fn what_cannot_be_kept_is_counted_and_told() {
    let mut setup = Setup::new().await;
    setup.set("DEAD_LETTERS_MAX_BYTES", "0");
    let relay = setup.start().await;
    let batch = json!({"batch":[{"type":"track","event":"Good","userId":"u"},{"type":"track","userId":"u"}]});
    assert_eq!(post(&relay, "/v1/batch", &batch).await.0, 200, "its caller would send all of it for ever");
    relay.metric_is("relay_refused_items_lost_total", &[], 1.0).await;
    relay.metric_is("relay_refused_items_kept_total", &[], 0.0).await;
    relay.log("refused items of batches are lost").await;
    taken(&setup, Vendor::Segment, 1).await;
}

/// Kept until a relay comes that knows it; told at once to who sends a single one.
#[tokio::test]
async fn a_newer_schema_is_kept_and_not_guessed_at() {
    let mut setup = Setup::new().await;
    let relay = setup.start().await;
    let url = |path: &str| format!("http://{}{path}", relay.http_addr.unwrap());
    let schemas = reqwest_client().get(url("/v1/schemas")).send().await.unwrap();
    let schemas: Value = serde_json::from_slice(&schemas.bytes().await.unwrap()).unwrap();
    assert_eq!((&schemas["current"], &schemas["versions"][0]["status"]), (&1.into(), &"current".into()));

    let event = json!({"event":"x","userId":"u"});
    for (header, value, status, used) in [
        ("x-schema-version", "1", 200, Some("1")),
        ("content-type", "application/json; version=1", 200, Some("1")),
        ("x-other", "1", 200, Some("1")),
        ("x-schema-version", "2", 400, None),
        ("content-type", "application/json; version=2", 400, None),
        ("x-schema-version", "two", 400, None),
    ] {
        let call = reqwest_client().post(url("/v1/track")).header(header, value).body(event.to_string());
        let answer = call.send().await.unwrap();
        let used_by =
            answer.headers().get("x-schema-version").map(|value| value.to_str().unwrap().to_owned());
        assert_eq!((answer.status().as_u16(), used_by.as_deref()), (status, used), "{header}: {value}");
        let said: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
        if value.ends_with('2') {
            let got = (&said["code"], &said["field"], &said["message"]);
            let want = "schemaVersion: got 2, want 1".into();
            assert_eq!(got, (&"schema_version_unsupported".into(), &"schemaVersion".into(), &want));
        }
    }
    let both =
        reqwest_client().post(url("/v1/events/track?schema_version=1")).header("x-schema-version", "1");
    let mut in_body = event.clone();
    in_body["schemaVersion"] = 2.into();
    let answer = both.body(in_body.to_string()).send().await.unwrap();
    let said: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
    assert!(said["warnings"][0].as_str().unwrap().ends_with("1 holds"), "{said}");

    // An item's own version beats that of its batch.
    let batch = json!({"schemaVersion":2,"answers":1,"batch":[
        {"type":"track","what":"new","messageId":"newer-1-0123456789"},
        {"type":"track","event":"old","userId":"u","schemaVersion":1},
    ]});
    let (status, said) = post(&relay, "/v1/batch", &batch).await;
    assert_eq!((status, &said["accepted"], &said["refused"]), (200, &2.into(), &json!([])), "{said}");
    let events = json!({"events":[{"type":"track","what":"new","schemaVersion":3}]});
    let (status, said) = post(&relay, "/v1/events/batch", &events).await;
    assert_eq!((status, &said["results"][0]["status"]), (202, &"accepted".into()), "{said}");
    taken(&setup, Vendor::Segment, 5).await;
    relay.metric_is("relay_schema_calls_total", &["\"other\""], 3.0).await;

    with_port(&mut setup, &relay);
    let (_, listed, _) = setup.run(&["dead-letters", "refused", "list"]).await;
    assert!(listed.contains("SCHEMA_VERSION_UNSUPPORTED"), "{listed}");
    let (code, said, _) = setup.run(&["dead-letters", "refused", "send"]).await;
    assert_eq!((code, said.contains("does not know 2")), (1, true), "{said}");
    let (_, listed, _) = setup.run(&["dead-letters", "refused", "show"]).await;
    assert_eq!(listed.lines().count(), 2, "they are kept once: {listed}");
}
