//! A developer's desk: no key, no socket, every byte to be seen.

use std::collections::BTreeMap;

use analytics_relay::providers::sandbox::Vendor;
use serde_json::Value;

use crate::harness::{Observer, Setup};

#[tokio::test]
async fn test_mode_shows_each_vendors_body_and_opens_no_socket() {
    let mut setup = Setup::new().await;
    setup.set("TEST_MODE", "true").set("LOG_LEVEL", "debug").set("FLUSH_INTERVAL_SECONDS", "60");
    // Only the addresses to listen at stay; the base URLs stay too, to see that
    // nobody connects to them.
    for key in ["MIXPANEL_API_KEY", "AMPLITUDE_API_KEY", "SEGMENT_WRITE_KEY"] {
        setup.vars.remove(key);
    }
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 2).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    let mut bodies: BTreeMap<String, Value> = BTreeMap::new();
    for line in &ended.logs {
        if line["message"] == "TEST MODE: body of the batch" {
            let body = serde_json::from_str(line["body"].as_str().unwrap()).unwrap();
            bodies.insert(line["provider"].as_str().unwrap().to_owned(), body);
        }
    }
    assert_eq!(bodies["mixpanel"].as_array().unwrap().len(), 2);
    assert_eq!(bodies["amplitude"]["events"].as_array().unwrap().len(), 2);
    assert_eq!(bodies["amplitude"]["api_key"], "***");
    assert_eq!(bodies["segment"]["batch"].as_array().unwrap().len(), 2);
    for vendor in Vendor::ALL {
        let would_send = ended.logs.iter().find(|line| {
            line["message"] == "TEST MODE: would send batch" && line["provider"] == vendor.name()
        });
        assert_eq!(would_send.unwrap()["event_count"], 2);
        let balance = ended.balance(vendor);
        assert_eq!((balance.accepted, balance.delivered, balance.is_exact()), (2, 2, true));
        assert_eq!(setup.sandbox.stats(vendor).connections, 0);
    }
}

/// Holds with a key in the environment too, and below debug no body is shown.
#[tokio::test]
async fn test_mode_masks_a_key_that_is_set() {
    for (level, bodies) in [("debug", 3), ("info", 0)] {
        let mut setup = Setup::new().await;
        setup.set("TEST_MODE", "true").set("LOG_LEVEL", level).set("AMPLITUDE_API_KEY", "canary-key");
        let relay = setup.start().await;
        Observer::default().tracks(&mut relay.client(), 1).await;
        relay.log("TEST MODE: would send batch").await;
        let ended = relay.terminate().await;
        assert_eq!(ended.count("TEST MODE: body of the batch"), bodies);
        assert!(ended.logs.iter().all(|line| !line.to_string().contains("canary-key")));
    }
}

#[tokio::test]
async fn each_event_is_logged_with_the_size_of_the_queue_at_debug() {
    let mut setup = Setup::new().await;
    setup.set("TEST_MODE", "true").set("LOG_LEVEL", "debug").set("FLUSH_INTERVAL_SECONDS", "60");
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 1).await;
    let queued = relay.log("event queued").await;
    assert!(queued["queue_size"].as_u64().is_some_and(|size| size <= 1), "{queued}");
    assert_eq!(queued["level"], "DEBUG");
    relay.terminate().await;
}

/// Test mode calls everything delivered, so what waits for a provider on disk
/// is none of its business.
#[tokio::test]
async fn test_mode_leaves_real_events_on_disk_alone() {
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "1");
    setup.sandbox.always(Vendor::Segment, Some("401".parse().unwrap()));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 5).await;
    assert_eq!(relay.terminate().await.balance(Vendor::Segment).spilled, 5);
    setup.sandbox.always(Vendor::Segment, None);

    setup.set("TEST_MODE", "true");
    let ended = setup.start().await.terminate().await;
    assert_eq!(ended.balance(Vendor::Segment).reloaded, 0);

    setup.set("TEST_MODE", "false");
    let relay = setup.start().await;
    crate::harness::taken(&setup, Vendor::Segment, 5).await;
    assert_eq!(relay.terminate().await.balance(Vendor::Segment).reloaded, 5);
    observer.check(&setup, Vendor::Segment);
}

/// Commands look where a relay with the same settings keeps its files.
#[tokio::test]
async fn what_test_mode_keeps_is_found_by_the_commands_of_test_mode() {
    let mut setup = Setup::new().await;
    setup.set("TEST_MODE", "true");
    let relay = setup.start().await;
    let url = format!("http://{}/v1/batch", relay.http_addr.unwrap());
    let batch = r#"{"batch":[{"type":"track","userId":"u"}]}"#;
    let answer = crate::harness::reqwest_client().post(url).body(batch).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    relay.terminate().await;

    let list = ["dead-letters", "refused", "list"];
    assert!(setup.run(&list).await.1.contains("EVENT_NAME_EMPTY"));
    let (_, hint, _) = setup.run(&["dead-letters", "list"]).await;
    assert!(hint.contains("1 item(s) of batches that were refused"), "{hint}");
    setup.set("TEST_MODE", "false");
    let (_, elsewhere, _) = setup.run(&list).await;
    assert!(elsewhere.contains("no refused items; of test mode: "), "{elsewhere}");
}

/// What the README asks a minute after `make run`, which listens to other machines too.
#[tokio::test]
async fn wherever_it_listens_test_mode_says_what_it_counted_and_nothing_else_does_without_a_key() {
    let mut setup = Setup::new().await;
    setup.set("HTTP_HOST", "0.0.0.0").set("STORE_FLUSH_INTERVAL_SECONDS", "0.05");
    setup.set("TEST_MODE", "true");
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 3).await;
    relay.metric_is("relay_events_total", &["\"store\"", "\"delivered\""], 3.0).await;
    let question = "/api/v1/events/count?days=1&group_by=hour";
    let (status, said) = relay.get(question).await;
    assert_eq!((status, &said["total"]), (200, &3.into()), "{said}");
    relay.terminate().await;

    setup.set("TEST_MODE", "false").set("STORE_URL", "sqlite:");
    let relay = setup.start().await;
    let (status, said) = relay.get(question).await;
    assert!(status == 401 && said["total"].is_null(), "{status} {said}");
    relay.terminate().await;
}
