//! What callers write, where it is dangerous: refused if the operator wants that, counted,
//! and shown without being obeyed.

use analytics_relay::providers::sandbox::Vendor;
use serde_json::{Value, json};
use tonic::Code;
use tonic_types::StatusExt;

use crate::harness::{Relay, Setup, reqwest_client, taken, track};

/// Clears a screen, turns the direction of writing, and begins a line of its own.
const SPEAKING: &str = "\u{1b}[2J\u{9b}31m\u{202e}\u{2066}\r\nx";

async fn post(relay: &Relay, path: &str, body: &Value) -> (u16, Value) {
    let url = format!("http://{}{path}", relay.http_addr.unwrap());
    let answer = reqwest_client().post(url).body(body.to_string()).send().await.unwrap();
    let status = answer.status().as_u16();
    (status, serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap())
}

fn assert_shown(out: &str) {
    let is_obeyed = |c: char| c.is_control() && c != '\n' || ('\u{202a}'..='\u{2069}').contains(&c);
    assert!(!out.is_empty() && !out.chars().any(is_obeyed), "{out:?}");
}

#[tokio::test]
async fn strict_rules_refuse_at_each_door_with_the_field_and_the_character() {
    let mut setup = Setup::new().await;
    setup.set("INPUT_RULES", "strict").set("INPUT_SUSPICIOUS", "count");
    let relay = setup.start().await;

    let refused = relay.client().track_event(track("Order/Placed", "user-1")).await.unwrap_err();
    let details = refused.get_error_details();
    assert_eq!(
        (refused.code(), &*details.error_info().unwrap().reason),
        (Code::InvalidArgument, "INPUT_REFUSED")
    );
    let violation = &details.bad_request().unwrap().field_violations[0];
    assert_eq!(violation.field, "event_name");
    assert!(violation.description.contains("with U+002F as character 6"), "{violation:?}");

    let event = json!({"event":"Order Placed","userId":"user-1","properties":{"note":SPEAKING}});
    let (status, answer) = post(&relay, "/v1/events/track", &event).await;
    assert_eq!((status, &answer["error"]["code"]), (400, &json!("INPUT_REFUSED")), "{answer}");
    assert_eq!(answer["error"]["field"], "properties.note");
    assert_shown(&format!("{}\n", answer["error"]["message"].as_str().unwrap()));

    let batch = json!({"batch":[
        {"type":"track","event":"Good","userId":"user-1","properties":{"q":"1' OR '1'='1","tabs\u{e9}":"a\tb\n"}},
        {"type":"identify","userId":"user\u{200b}-1","traits":{"a":1}},
        {"type":"page","name":"Home","userId":"user-1","context":{"page":{"title":SPEAKING}}},
    ]});
    assert_eq!(post(&relay, "/v1/batch", &batch).await.0, 200);
    taken(&setup, Vendor::Segment, 1).await;
    assert_eq!(relay.metric("relay_refusals_total", &["INPUT_REFUSED"]).await, 4.0);
    assert_eq!(relay.metric("relay_suspicious_total", &["sql"]).await, 1.0);
    assert_eq!(relay.metric("relay_suspicious_total", &["html"]).await, 0.0);

    let (_, shown, _) = setup.run(&["dead-letters", "refused", "show"]).await;
    assert_shown(&shown);
    let kept: Vec<Value> = shown.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let fields: Vec<_> = kept.iter().map(|item| item["field"].as_str().unwrap()).collect();
    assert_eq!(fields, ["userId", "context.page.title"], "{shown}");
    assert_eq!(kept[1]["item"]["context"]["page"]["title"], SPEAKING);
    let (_, listed, _) = setup.run(&["dead-letters", "refused", "list"]).await;
    assert!(listed.contains("INPUT_REFUSED"), "{listed}");
}

#[tokio::test]
async fn what_callers_write_is_relayed_as_it_is_and_shown_without_being_obeyed() {
    let mut setup = Setup::new().await;
    setup.set("MAX_RETRY_ATTEMPTS", "1");
    let relay = setup.start().await;
    setup.sandbox.always(Vendor::Mixpanel, Some("503".parse().unwrap()));
    let event = json!({"event":SPEAKING,"userId":SPEAKING,"messageId":"speaks-0123456789","properties":{SPEAKING:SPEAKING}});
    let (status, answer) = post(&relay, "/v1/events/track", &event).await;
    assert_eq!(status, 202, "{answer}");
    taken(&setup, Vendor::Segment, 1).await;
    assert_eq!(setup.sandbox.taken(Vendor::Segment)[0].event["properties"], json!({SPEAKING:SPEAKING}));
    relay.dead_lettered(Vendor::Mixpanel, 1).await;
    relay.terminate().await;
    for args in [
        &["dead-letters", "list"][..],
        &["dead-letters", "show"],
        &["explain", "speaks-0123456789"],
        &["explain", "--json", "speaks-0123456789"],
    ] {
        let (_, out, error) = setup.run(args).await;
        assert_shown(&format!("{out}{error}"));
        if args == ["dead-letters", "show"] {
            let letter: Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
            assert_eq!(letter["event"]["name"], SPEAKING);
        }
    }
}
