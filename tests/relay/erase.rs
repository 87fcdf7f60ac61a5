//! A user is erased: nothing more is taken of them, nothing that is under way is delivered,
//! and no file but the log keeps anything.

use std::time::Duration;

use analytics_relay::proto::v1::{IdentifyUserRequest, TrackEventRequest};
use analytics_relay::providers::sandbox::Vendor;
use serde_json::json;
use tonic::Code;

use crate::{
    harness::{Setup, reqwest_client, taken},
    trouble::health,
};

fn track(user_id: &str, event_id: &str) -> TrackEventRequest {
    TrackEventRequest {
        event_name: if user_id == "other" { "Order Placed" } else { "Erased" }.into(),
        user_id: user_id.into(),
        event_id: event_id.into(),
        ..TrackEventRequest::default()
    }
}

/// The files below a directory that hold a text.
fn holding(setup: &Setup, below: &str, text: &str) -> Vec<String> {
    fn all(dir: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() { all(&path, found) } else { found.push(path) }
        }
    }
    let mut paths = Vec::new();
    all(&setup.data_dir().join(below), &mut paths);
    let holds = |path: &std::path::PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_default();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    };
    paths.into_iter().filter(holds).map(|path| path.display().to_string()).collect()
}

#[tokio::test]
async fn nothing_of_an_erased_user_is_taken_delivered_or_kept() {
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "1");
    setup.set("AMPLITUDE_MAX_RETRY_ATTEMPTS", "100");
    // One vendor refuses the event, one is down, one takes everything.
    setup.sandbox.always(Vendor::Amplitude, Some("503".parse().unwrap()));
    setup.sandbox.always(Vendor::Mixpanel, Some("reject-name=Erased".parse().unwrap()));
    let relay = setup.start().await;
    let mut client = relay.client();
    for n in 0..5 {
        client.track_event(track("erased-canary", &format!("of-erased-{n}"))).await.unwrap();
        client.track_event(track("other", &format!("of-other-{n}"))).await.unwrap();
    }
    // An item that broke a rule is kept as it came.
    let url = format!("http://{}/v1/batch", relay.http_addr.unwrap());
    let bad = json!({"batch": [{"type": "track", "userId": "erased-canary"}]});
    reqwest_client().post(&url).body(bad.to_string()).send().await.unwrap();
    taken(&setup, Vendor::Segment, 10).await;
    assert!(!holding(&setup, "refused", "erased-canary").is_empty());
    while holding(&setup, "dead-letters", "erased-canary").is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let (code, said, error) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert_eq!(code, 0, "{said}{error}");
    assert!(said.contains("in force in the running relay since"), "{said}");
    assert!(said.contains("refused items deleted: 1"), "{said}");
    assert!(said.contains("dead letters deleted: 5"), "{said}");
    assert_eq!(holding(&setup, "", "erased-canary"), Vec::<String>::new());

    // At every door.
    let status = client.track_event(track("erased-canary", "later-1")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(!status.message().contains("canary"), "{status}");
    let of_device = IdentifyUserRequest { user_id: "erased-canary".into(), ..IdentifyUserRequest::default() };
    assert_eq!(client.identify_user(of_device).await.unwrap_err().code(), Code::PermissionDenied);
    let batch = json!({"batch": [
        {"type": "track", "event": "x", "userId": "erased-canary"},
        {"type": "track", "userId": "erased-canary"},
        {"type": "alias", "userId": "another", "previousId": "erased-canary"},
        {"type": "alias", "userId": "", "previousId": "erased-canary"},
    ]});
    let answer = reqwest_client().post(&url).body(batch.to_string()).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let one = format!("http://{}/v1/track", relay.http_addr.unwrap());
    let event = json!({"event": "x", "userId": "erased-canary"}).to_string();
    assert_eq!(reqwest_client().post(one).body(event).send().await.unwrap().status(), 200);
    assert_eq!(holding(&setup, "", "erased-canary"), Vec::<String>::new());

    // Amplitude had five of each: those of the erased user are dropped, the others go on.
    setup.sandbox.always(Vendor::Amplitude, None);
    taken(&setup, Vendor::Amplitude, 5).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Amplitude).dropped, 5);
    assert_eq!(ended.code, 0, "whom somebody had erased is no loss");
    assert_eq!(ended.balance(Vendor::Amplitude).delivered, 5);
    let at_amplitude = setup.sandbox.taken(Vendor::Amplitude);
    assert!(at_amplitude.iter().all(|event| event.id.starts_with("of-other")), "{at_amplitude:?}");

    let (code, said, _) = setup.run(&["suppression", "check", "--user-id", "erased-canary"]).await;
    assert!(code == 0 && said.starts_with("suppressed since"), "{said}");
    assert_eq!(setup.run(&["suppression", "lift", "--user-id", "erased-canary"]).await.0, 0);
    let relay = setup.start().await;
    relay.client().track_event(track("erased-canary", "back-1")).await.unwrap();
    relay.terminate().await;
}

/// A device is erased as a user is. A user that is called as it is another.
#[tokio::test]
async fn a_device_is_erased_from_every_file_and_a_user_of_the_same_id_is_not() {
    let mut setup = Setup::new().await;
    // One is tried once, and one for longer than the drain.
    setup.set("MIXPANEL_MAX_RETRY_ATTEMPTS", "1").set("SEGMENT_MAX_RETRY_ATTEMPTS", "100");
    setup.set("DRAIN_TIMEOUT_SECONDS", "1");
    setup.sandbox.always(Vendor::Mixpanel, Some("503".parse().unwrap()));
    setup.sandbox.always(Vendor::Segment, Some("503".parse().unwrap()));
    let relay = setup.start().await;
    let mut client = relay.client();
    for n in 0..3 {
        let of_device =
            TrackEventRequest { anonymous_id: "id-canary".into(), ..track("", &format!("of-device-{n}")) };
        client.track_event(of_device).await.unwrap();
        client.track_event(track("id-canary", &format!("of-user-{n}"))).await.unwrap();
    }
    let url = format!("http://{}/v1/batch", relay.http_addr.unwrap());
    let bad = json!({"batch": [
        {"type": "track", "anonymousId": "id-canary", "messageId": "of-device-bad"},
        {"type": "track", "userId": "id-canary", "messageId": "of-user-bad"},
    ]});
    reqwest_client().post(&url).body(bad.to_string()).send().await.unwrap();
    relay.dead_lettered(Vendor::Mixpanel, 6).await;
    taken(&setup, Vendor::Amplitude, 6).await;
    relay.terminate().await;
    let files_with = |text: &str| {
        ["dead-letters", "refused", "spill"].map(|below| !holding(&setup, below, text).is_empty())
    };
    assert_eq!(files_with("of-device-"), [true; 3], "there is something to erase");

    let (code, said, error) = setup.run(&["erase", "--anonymous-id", "id-canary"]).await;
    assert_eq!(code, 0, "{said}{error}");
    for deleted in ["dead letters deleted: 3", "refused items deleted: 1", "spilled events deleted: 3"] {
        assert!(said.contains(deleted), "{deleted}: {said}");
    }
    assert_eq!((files_with("of-device-"), files_with("of-user-")), ([false; 3], [true; 3]));
    let (code, said, _) = setup.run(&["suppression", "check", "--anonymous-id", "id-canary"]).await;
    assert!(code == 0 && said.starts_with("suppressed since"), "{said}");
    assert_eq!(setup.run(&["suppression", "check", "--user-id", "id-canary"]).await.0, 1);
}

/// Letters that come back with a backup bring nobody back.
#[tokio::test]
async fn a_replay_sends_nothing_of_who_is_erased_and_nothing_at_all_without_the_list() {
    let mut setup = Setup::new().await;
    setup.set("MIXPANEL_MAX_RETRY_ATTEMPTS", "1");
    setup.sandbox.always(Vendor::Mixpanel, Some("503".parse().unwrap()));
    let relay = setup.start().await;
    for n in 0..3 {
        for user in ["erased-canary", "stays"] {
            let id = format!("of-{user}-{n}");
            relay.client().track_event(track(user, &id)).await.unwrap();
        }
    }
    relay.dead_lettered(Vendor::Mixpanel, 6).await;
    relay.terminate().await;
    let letters = holding(&setup, "dead-letters", "erased-canary");
    let backup: Vec<_> = letters.iter().map(|path| (path, std::fs::read(path).unwrap())).collect();
    assert_eq!(setup.run(&["erase", "--user-id", "erased-canary"]).await.0, 0);
    assert_eq!(holding(&setup, "dead-letters", "erased-canary"), Vec::<String>::new());
    backup.iter().for_each(|(path, content)| std::fs::write(path, content).unwrap());
    setup.sandbox.always(Vendor::Mixpanel, None);

    let list = setup.data_dir().join("suppressed.json");
    let whole = std::fs::read(&list).unwrap();
    std::fs::write(&list, "{").unwrap();
    let (code, said, error) = setup.run(&["dead-letters", "replay"]).await;
    assert!(code == 1 && error.contains("suppressed.json"), "{code} {said}{error}");
    assert_eq!(setup.sandbox.stats(Vendor::Mixpanel).taken, 0, "{said}");

    std::fs::write(&list, whole).unwrap();
    let (code, said, error) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!(code, 0, "{said}{error}");
    assert!(said.contains("delivered 3") && said.contains("not sent 3: their users are erased"), "{said}");
    let at_mixpanel = setup.sandbox.taken(Vendor::Mixpanel);
    assert!(
        at_mixpanel.len() == 3 && at_mixpanel.iter().all(|event| event.user == "stays"),
        "{at_mixpanel:?}"
    );
}

/// With the key they are found in files that are sealed; without it they are told of.
#[tokio::test]
async fn what_is_sealed_is_erased_with_the_key_and_told_of_without() {
    let mut setup = Setup::new().await;
    setup.set("RELAY_KEK", "one:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=");
    setup.set("DRAIN_TIMEOUT_SECONDS", "1");
    setup.sandbox.always(Vendor::Segment, Some("503".parse().unwrap()));
    setup.sandbox.always(Vendor::Mixpanel, Some("reject-name=Erased".parse().unwrap()));
    let relay = setup.start().await;
    for n in 0..3 {
        relay.client().track_event(track("erased-canary", &format!("of-erased-{n}"))).await.unwrap();
        relay.client().track_event(track("other", &format!("of-other-{n}"))).await.unwrap();
    }
    relay.terminate().await;

    setup.set("RELAY_KEK", "");
    let (code, said, _) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert!(code == 2 && said.contains("line(s) that cannot be read"), "{code} {said}");
    setup.set("RELAY_KEK", "one:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=");
    let (code, said, error) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert_eq!(code, 0, "{said}{error}");
    assert!(said.contains("dead letters deleted: 3") && said.contains("spilled events deleted: 3"), "{said}");
    setup.sandbox.always(Vendor::Segment, None);
    let relay = setup.start().await;
    taken(&setup, Vendor::Segment, 3).await;
    relay.terminate().await;
    assert!(setup.sandbox.taken(Vendor::Segment).iter().all(|event| event.name == "Order Placed"));
}

/// What stands in the log is not delivered, and what is spilled or dead is deleted while no
/// relay runs.
#[tokio::test]
async fn a_user_who_is_erased_while_the_relay_is_down_stays_erased() {
    for durability in ["memory", "written"] {
        let mut setup = Setup::new().await;
        setup.set("DURABILITY", durability);
        setup.set("DRAIN_TIMEOUT_SECONDS", "1");
        setup.sandbox.always(Vendor::Segment, Some("503".parse().unwrap()));
        let relay = setup.start().await;
        for n in 0..3 {
            relay.client().track_event(track("erased-canary", &format!("of-erased-{n}"))).await.unwrap();
            relay.client().track_event(track("other", &format!("of-other-{n}"))).await.unwrap();
        }
        relay.terminate().await;

        let (code, said, error) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
        assert_eq!(code, 0, "{said}{error}");
        assert!(said.contains("no relay runs on"), "{said}");
        let says = if durability == "memory" {
            "spilled events deleted: 3"
        } else {
            "their bytes go with its retention"
        };
        assert!(said.contains(says), "{said}");
        assert_eq!(holding(&setup, "spill", "erased-canary"), Vec::<String>::new());

        setup.sandbox.always(Vendor::Segment, None);
        let relay = setup.start().await;
        taken(&setup, Vendor::Segment, 3).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let ended = relay.terminate().await;
        let dropped = if durability == "memory" { 0 } else { 3 };
        assert_eq!(ended.balance(Vendor::Segment).dropped, dropped, "{durability}");
        let at_segment = setup.sandbox.taken(Vendor::Segment);
        assert!(at_segment.iter().all(|event| event.id.contains("other") || event.id.len() == 36));
        assert_eq!(at_segment.len(), 3);
    }
}

/// Nothing takes it with time, and nobody can tell of whom it is.
#[tokio::test]
async fn what_of_the_log_is_set_aside_is_named() {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "synced").set("DRAIN_TIMEOUT_SECONDS", "1");
    Vendor::ALL.into_iter().for_each(|vendor| setup.sandbox.always(vendor, Some("503".parse().unwrap())));
    let relay = setup.start().await;
    for n in 0..5 {
        relay.client().track_event(track("other", &format!("in-the-log-{n}"))).await.unwrap();
    }
    relay.terminate().await;
    let (code, said, error) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert!(code == 0 && !said.contains("not judged"), "{said}{error}");

    let damaged = holding(&setup, "spool/segments", "in-the-log-2").remove(0);
    let mut bytes = std::fs::read(&damaged).unwrap();
    let at = bytes.windows(12).position(|window| window == b"in-the-log-2").unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(&damaged, bytes).unwrap();
    assert_eq!(setup.run(&["spool", "repair"]).await.0, 0);
    let spool = setup.data_dir().join("spool");
    let copies: Vec<_> = std::fs::read_dir(spool.join("quarantine")).unwrap().collect();
    let copy = copies.first().expect("the damage is kept aside").as_ref().unwrap().path();
    // A copy that had to make room, and one of what has no events.
    for name in ["00000000000000000001.log-1-1-00000000.bin", "mixpanel.cursor-0-512-00000000.bin"] {
        let content = if name.starts_with("mixpanel") { "x" } else { "" };
        std::fs::write(spool.join("quarantine").join(name), content).unwrap();
    }
    let unreadable = spool.join("segments/00000000000000000009.log.unreadable");
    std::fs::write(&unreadable, "x").unwrap();

    let (code, said, error) = setup.run(&["erase", "--user-id", "erased-canary"]).await;
    assert_eq!(code, 2, "{said}{error}");
    let named: Vec<_> = said.lines().filter(|line| line.starts_with("not judged: ")).collect();
    assert_eq!(named.len(), 2, "{said}");
    for path in [&copy, &unreadable] {
        let path = path.display().to_string();
        assert!(named.iter().any(|line| line.contains(&path)), "{path}: {said}");
    }
}

/// A list that cannot be read any more holds on, and it is told that it cannot be changed.
#[tokio::test]
async fn while_the_list_cannot_be_read_the_last_one_holds_and_health_says_so() {
    let setup = Setup::new().await;
    assert_eq!(setup.run(&["erase", "--user-id", "erased-canary"]).await.0, 0);
    let relay = setup.start().await;
    health(&relay, "SERVING", |said| said == "SERVING").await;
    let list = setup.data_dir().join("suppressed.json");
    let whole = std::fs::read(&list).unwrap();
    std::fs::write(&list, "{").unwrap();
    let says = "DEGRADED: the list of erased users cannot be read: the last one holds";
    health(&relay, says, |said| said == says).await;
    relay.log("the list of erased users cannot be read: the last one holds").await;
    let status = relay.client().track_event(track("erased-canary", "later-1")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    std::fs::write(&list, whole).unwrap();
    health(&relay, "SERVING", |said| said == "SERVING").await;
    relay.terminate().await;
}

/// A list that cannot be read must not let anybody through.
#[tokio::test]
async fn a_relay_that_cannot_read_whom_to_leave_out_does_not_start() {
    let setup = Setup::new().await;
    assert_eq!(setup.run(&["erase", "--user-id", "u"]).await.0, 0);
    std::fs::write(setup.data_dir().join("suppressed.json"), "{").unwrap();
    let (code, _, error) = setup.run(&[]).await;
    assert!(code == 1 && error.contains("suppressed.json"), "{error}");
    assert_eq!(setup.run(&["erase"]).await.0, 1);
}
