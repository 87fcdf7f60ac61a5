//! The sub-commands.

use std::time::Duration;

use analytics_relay::providers::sandbox::Vendor;
use serde_json::Value;

use crate::harness::{KEY, Observer, Setup, lines_on_disk, taken};

/// Leaves 20 dead letters of Mixpanel's, half of them rejected by name, and one event
/// that it took: the others would show a provider in trouble, and no bad events.
async fn with_dead_letters() -> (Setup, Observer) {
    let mut setup = Setup::new().await;
    // All in one batch, however slowly they come.
    setup.set("MAX_RETRY_ATTEMPTS", "1").set("BATCH_SIZE", "11").set("FLUSH_INTERVAL_SECONDS", "60");
    let relay = setup.start().await;
    let mut observer = Observer::default();
    setup.sandbox.always(Vendor::Mixpanel, Some("reject-name=bad".parse().unwrap()));
    for _ in 0..10 {
        observer.track(&mut relay.client(), "bad", "u").await;
    }
    observer.track(&mut relay.client(), "taken", "u").await;
    relay.dead_lettered(Vendor::Mixpanel, 10).await;
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Mixpanel).dead_lettered, 10);
    setup.set("FLUSH_INTERVAL_SECONDS", "0.05");
    let relay = setup.start().await;
    setup.sandbox.always(Vendor::Mixpanel, Some("503".parse().unwrap()));
    for _ in 0..10 {
        observer.track(&mut relay.client(), "good", "u").await;
    }
    relay.dead_lettered(Vendor::Mixpanel, 10).await;
    assert_eq!(relay.terminate().await.balance(Vendor::Mixpanel).dead_lettered, 10);
    setup.sandbox.always(Vendor::Mixpanel, None);
    (setup, observer)
}

#[tokio::test]
async fn dead_letters_are_listed_shown_and_filtered() {
    let (setup, _) = with_dead_letters().await;
    let (code, out, _) = setup.run(&["dead-letters", "list"]).await;
    assert_eq!(code, 0);
    for row in ["mixpanel", "invalid", "retries_exhausted"] {
        assert!(out.contains(row), "{out}");
    }
    let shown =
        |out: &str| -> Vec<Value> { out.lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    for (args, letters) in [
        (&[][..], 20),
        (&["--limit", "3"], 3),
        (&["--reason", "invalid"], 10),
        (&["--provider", "segment"], 0),
        (&["--until", "2020-01-01T00:00:00Z"], 0),
        (&["--since", "2020-01-01T00:00:00Z"], 20),
    ] {
        let (code, out, _) = setup.run(&[&["dead-letters", "show"], args].concat()).await;
        assert_eq!((code, shown(&out).len()), (0, letters), "{args:?}");
    }
    let (_, out, _) = setup.run(&["dead-letters", "show", "--limit", "1"]).await;
    let letter = shown(&out).remove(0);
    assert_eq!((&letter["provider"], &letter["reason"]), (&"mixpanel".into(), &"invalid".into()));
    assert!(letter["detail"].as_str().unwrap().contains("400"), "the provider's own words: {letter}");
    assert_eq!(letter["event"]["name"], "bad");
}

#[tokio::test]
async fn a_replay_that_is_repeated_sends_nothing_twice() {
    let (setup, observer) = with_dead_letters().await;
    let before = setup.sandbox.stats(Vendor::Segment).requests;
    // Half of them still refused, then all taken, then nothing left to send.
    setup.sandbox.always(Vendor::Mixpanel, Some("reject-name=bad".parse().unwrap()));
    let (code, out, _) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("delivered 10") && out.contains("not delivered 10 (invalid)"), "{out}");
    assert_eq!(setup.sandbox.stats(Vendor::Mixpanel).taken, 11);

    setup.sandbox.always(Vendor::Mixpanel, None);
    let (code, out, _) = setup.run(&["dead-letters", "replay", "--reason", "retries_exhausted"]).await;
    assert_eq!((code, out.contains("delivered 0")), (0, true), "{out}");
    let (code, out, _) = setup.run(&["dead-letters", "replay", "--provider", "mixpanel"]).await;
    assert_eq!((code, out.contains("delivered 10")), (0, true), "{out}");
    for _ in 0..2 {
        let requests = setup.sandbox.stats(Vendor::Mixpanel).requests;
        assert_eq!(setup.run(&["dead-letters", "replay"]).await.0, 0);
        assert_eq!(setup.sandbox.stats(Vendor::Mixpanel).requests, requests);
    }
    let taken = setup.sandbox.taken(Vendor::Mixpanel);
    assert_eq!(taken.len(), 21);
    assert!(taken.iter().all(|taken| taken.copies == 1));
    assert!(taken.iter().all(|taken| observer.accepted.contains(&taken.id)));
    assert_eq!(setup.sandbox.stats(Vendor::Segment).requests, before, "only Mixpanel's were sent");
    assert!(lines_on_disk(&setup.data_dir().join("dead-letters/mixpanel")).is_empty(), "replayed files go");
    let (_, out, _) = setup.run(&["dead-letters", "list"]).await;
    assert!(out.contains("no dead letters"), "{out}");
}

#[tokio::test]
async fn a_replay_to_a_provider_that_is_down_or_refuses_its_key_keeps_the_letters() {
    let (mut setup, _) = with_dead_letters().await;
    for (fault, says) in [("503", "not delivered 20 (retries_exhausted)"), ("401", "refuses its key: 401")] {
        setup.sandbox.always(Vendor::Mixpanel, Some(fault.parse().unwrap()));
        let (code, out, _) = setup.run(&["dead-letters", "replay"]).await;
        assert_eq!((code, out.contains(says)), (1, true), "{fault}: {out}");
        assert_eq!(lines_on_disk(&setup.data_dir().join("dead-letters/mixpanel")).len(), 20);
    }
    setup.set("TEST_MODE", "true");
    let (code, _, err) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!((code, err.contains("TEST_MODE")), (1, true), "{err}");
}

#[tokio::test]
async fn a_replay_leaves_identifies_alone_unless_it_is_asked() {
    let mut setup = Setup::new().await;
    setup.set("MAX_RETRY_ATTEMPTS", "1");
    setup.sandbox.always(Vendor::Segment, Some("503".parse().unwrap()));
    let relay = setup.start().await;
    relay.client().identify_user(crate::harness::identify("ann", &[])).await.unwrap();
    relay.client().track_event(crate::harness::track("x", "ann")).await.unwrap();
    relay.dead_lettered(Vendor::Segment, 2).await;
    relay.terminate().await;
    setup.sandbox.always(Vendor::Segment, None);
    let (code, out, _) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!(
        (code, out.contains("delivered 1") && out.contains("skipped 1 identifies")),
        (0, true),
        "{out}"
    );
    let (code, out, _) = setup.run(&["dead-letters", "replay", "--identifies"]).await;
    assert_eq!((code, out.contains("delivered 1")), (0, true), "{out}");
    assert_eq!(setup.sandbox.stats(Vendor::Segment).taken, 2);
}

#[tokio::test]
async fn a_replay_of_a_provider_without_dead_letters_says_so() {
    let setup = Setup::new().await;
    let (code, _, err) = setup.run(&["dead-letters", "replay", "--provider", "mixpanle"]).await;
    assert_eq!((code, err.contains("mixpanle: there are no dead letters")), (1, true), "{err}");
    let (code, _, err) = setup.run(&["no-such-command"]).await;
    assert_eq!((code, err.contains("no-such-command")), (1, true), "{err}");
}

#[tokio::test]
async fn a_replay_beside_a_running_relay_works() {
    let mut setup = Setup::new().await;
    setup.set("MAX_RETRY_ATTEMPTS", "1");
    setup.sandbox.always(Vendor::Mixpanel, Some("503".parse().unwrap()));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    observer.tracks(&mut relay.client(), 5).await;
    relay.dead_lettered(Vendor::Mixpanel, 5).await;
    setup.sandbox.always(Vendor::Mixpanel, None);
    let (code, out, err) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!((code, out.contains("delivered 5")), (0, true), "{out} {err}");
    // The file that the relay writes to stays, and so does its list.
    setup.sandbox.always(Vendor::Mixpanel, Some("503".parse().unwrap()));
    observer.tracks(&mut relay.client(), 5).await;
    relay.dead_lettered(Vendor::Mixpanel, 10).await;
    taken(&setup, Vendor::Segment, 10).await;
    relay.terminate().await;
    setup.sandbox.always(Vendor::Mixpanel, None);
    assert_eq!(setup.run(&["dead-letters", "replay"]).await.0, 0);
    let account = observer.check(&setup, Vendor::Mixpanel);
    assert_eq!((account.delivered, account.copies), (10, 10));
}

#[tokio::test]
async fn the_file_env_is_read_as_it_is_written() {
    let mut setup = Setup::new().await;
    for name in ["SEGMENT_WRITE_KEY", "DATA_DIR", "GRPC_PORT"] {
        setup.vars.remove(name);
    }
    let file = setup.data.path().join(".env");
    let write = |key: &str| {
        let text = format!("\u{feff}# two\r\nSEGMENT_WRITE_KEY={key} # ours\r\nDATA_DIR='data/$HOME'\r\n");
        std::fs::write(&file, text).unwrap();
    };
    write("can${ary}");
    for args in [&["check"][..], &[]] {
        let (code, out, error) = setup.run(args).await;
        assert!(code == 1 && error.contains(".env line 2: SEGMENT_WRITE_KEY: got a $"), "{args:?}: {error}");
        assert!(!format!("{out}{error}").contains("ary"), "no part of a key is told: {error}");
    }
    write(&format!("'{KEY}'"));
    setup.set("GRPC_PORT", "tcp://10.96.0.12:50054");
    let (code, out, error) = setup.run(&["check"]).await;
    assert_eq!(code, 0, "{error}");
    assert!(out.contains("DATA_DIR=data/$HOME") && out.contains("GRPC_PORT=50054"), "{out}");
    assert!(out.contains("warning: GRPC_PORT=tcp://10.96.0.12:50054 is ignored: Kubernetes"), "{out}");
    setup.set("GRPC_PORT", "0");
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 1).await;
    taken(&setup, Vendor::Segment, 1).await;
    relay.terminate().await;
    assert!(setup.data.path().join("data/$HOME/relay.lock").exists());
}

#[tokio::test]
async fn check_shows_settings_masked_and_warns_of_a_misspelling() {
    let mut setup = Setup::new().await;
    setup.set("BACTH_SIZE", "10");
    let (code, out, _) = setup.run(&["check"]).await;
    assert_eq!(code, 0);
    assert!(out.contains("MIXPANEL_API_KEY=***") && !out.contains(KEY), "{out}");
    assert!(out.contains("BACTH_SIZE is none of our settings; did you mean BATCH_SIZE?"), "{out}");
    assert!(out.contains("# environment") && out.contains("# default"), "{out}");
    std::fs::write(setup.data.path().join(".env"), "BATCH_SIZE=7\n").unwrap();
    let (_, out, _) = setup.run(&["check"]).await;
    let line = out.lines().find(|line| line.starts_with("BATCH_SIZE=")).unwrap();
    assert!(line.starts_with("BATCH_SIZE=7") && line.ends_with("# .env"), "{line}");
}

#[tokio::test]
async fn every_bad_setting_is_reported_and_nothing_starts() {
    let mut setup = Setup::new().await;
    setup.set("BATCH_SIZE", "0").set("GRPC_PORT", "many").set("HTTP_WRITE_KEYS", " , ");
    setup.vars.remove("SEGMENT_WRITE_KEY");
    for args in [&[][..], &["serve"], &["check"]] {
        let (code, _, err) = setup.run(args).await;
        assert_eq!(code, 1);
        for wrong in [
            r#"BATCH_SIZE: got "0", want 1 to 2000"#,
            "GRPC_PORT: got \"many\"",
            "HTTP_WRITE_KEYS: got \"a list without a key\"",
            "SEGMENT_WRITE_KEY: got nothing",
        ] {
            assert!(err.contains(wrong), "{wrong} in {err}");
        }
    }
    // As docker --env-file leaves it: Segment would answer it with a success.
    setup.set("SEGMENT_WRITE_KEY", &format!("\"{KEY}\""));
    let (code, _, err) = setup.run(&["serve"]).await;
    let wrong = "SEGMENT_WRITE_KEY: got a key in quotes, which are no part of it (***), want the key alone";
    assert!(code == 1 && err.contains(wrong) && !err.contains(KEY), "{err}");
}

#[tokio::test]
async fn a_second_relay_stays_away_from_a_data_directory_in_use() {
    let setup = Setup::new().await;
    let relay = setup.start().await;
    let (code, out, err) = setup.run(&[]).await;
    assert_eq!(code, 1, "{out}");
    assert!(err.contains("DATA_DIR") && err.contains("another relay is using"), "{err}");
    relay.terminate().await;
    // And the lock goes with its holder.
    setup.start().await.terminate().await;
}

/// A newer relay was stopped, and this one is started on what it left: what it cannot
/// send is kept as it stands, and found by whoever looks.
#[tokio::test]
async fn events_of_a_kind_that_is_not_known_become_dead_letters_as_they_stand() {
    let setup = Setup::new().await;
    let now_ms = jiff::Timestamp::now().as_millisecond();
    let known = serde_json::json!({"id": "id-1", "kind": "track", "name": "x", "user_id": "u",
        "time_ms": now_ms, "accepted_ms": now_ms, "properties": {}});
    let unknown = format!(
        r#"{{"id":"id-2","kind":"purchase","user_id":"u","time_ms":{now_ms},"accepted_ms":{now_ms},"basket":[1.50],"properties":{{}}}}"#
    );
    for vendor in Vendor::ALL {
        let spill = setup.data_dir().join("spill").join(vendor.name());
        std::fs::create_dir_all(&spill).unwrap();
        std::fs::write(spill.join("000000000000001-0000.ndjson"), format!("{unknown}\n{known}\n")).unwrap();
    }
    let relay = setup.start().await;
    for vendor in Vendor::ALL {
        taken(&setup, vendor, 1).await;
        relay.dead_lettered(vendor, 1).await;
    }
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    let (_, out, _) = setup.run(&["dead-letters", "show", "--reason", "unknown_kind"]).await;
    assert_eq!(out.lines().count(), 3, "{out}");
    assert!(out.lines().all(|line| line.contains(&unknown)), "{out}");
    // A replay by the same relay changes nothing.
    let (code, out, _) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!((code, out.contains("not delivered 1 (unknown_kind)")), (1, true), "{out}");
    assert_eq!(lines_on_disk(&setup.data_dir().join("dead-letters/segment")).len(), 1);
}

#[tokio::test]
async fn a_port_that_is_taken_is_an_error_that_names_the_setting() {
    let mut setup = Setup::new().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    setup.set("GRPC_PORT", &taken.local_addr().unwrap().port().to_string());
    // Something that a start would send.
    let spill = setup.data_dir().join("spill/mixpanel");
    std::fs::create_dir_all(&spill).unwrap();
    let event = serde_json::json!({"id": "id-1", "kind": "track", "name": "x", "user_id": "u",
        "time_ms": 1_767_225_600_000_i64, "accepted_ms": 1_767_225_600_000_i64, "properties": {}});
    std::fs::write(spill.join("000000000000001-0000.ndjson"), format!("{event}\n")).unwrap();
    let (code, _, err) = setup.run(&[]).await;
    assert_eq!(code, 1);
    assert!(err.contains("GRPC_PORT") && err.contains("cannot listen at"), "{err}");
    assert_eq!(err.matches("in use").count(), 1, "the cause once: {err}");
    assert_eq!(setup.sandbox.stats(Vendor::Mixpanel).requests, 0, "a start that fails sends nothing");
    assert_eq!(lines_on_disk(&spill).len(), 1);
}

#[tokio::test]
async fn spilled_events_of_a_provider_that_is_not_named_are_kept_and_told() {
    let mut setup = Setup::new().await;
    setup.set("DRAIN_TIMEOUT_SECONDS", "1");
    setup.sandbox.always(Vendor::Segment, Some("401".parse().unwrap()));
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 3).await;
    assert_eq!(relay.terminate().await.balance(Vendor::Segment).spilled, 3);
    setup.set("ANALYTICS_PROVIDER", "mixpanel");
    let relay = setup.start().await;
    let warning = relay.log("spilled events of a provider that is not named stay on disk").await;
    assert_eq!(warning["provider"], "segment");
    relay.terminate().await;
    assert_eq!(lines_on_disk(&setup.data_dir().join("spill/segment")).len(), 3);
}

#[tokio::test]
async fn the_sandbox_command_takes_events_and_misbehaves_on_demand() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let mut setup = Setup::new().await;
    let mut command = setup.command();
    command.args(["sandbox", "--listen", "127.0.0.1:0", "--key", "another-key", "--fault", "segment=401"]);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let url = loop {
        let line = lines.next_line().await.unwrap().unwrap();
        if let Some(rest) = line.strip_prefix("MIXPANEL_BASE_URL=") {
            break rest.split(' ').next().unwrap().to_owned();
        }
    };
    for vendor in ["MIXPANEL", "AMPLITUDE", "SEGMENT"] {
        setup.set(&format!("{vendor}_BASE_URL"), &url);
    }
    for key in ["MIXPANEL_API_KEY", "AMPLITUDE_API_KEY", "SEGMENT_WRITE_KEY"] {
        setup.set(key, "another-key");
    }
    let relay = setup.start().await;
    Observer::default().tracks(&mut relay.client(), 3).await;
    relay
        .log_where("provider refuses its key or address: it is paused and its events wait", |l| {
            l["provider"] == "segment"
        })
        .await;
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Mixpanel).delivered, 3);
    assert_eq!(ended.balance(Vendor::Segment).spilled, 3);
    let stats = crate::harness::reqwest_client().get(format!("{url}/_sandbox/stats")).send().await.unwrap();
    let stats: Value = serde_json::from_str(&stats.text().await.unwrap()).unwrap();
    assert_eq!(stats["amplitude"]["taken"], 3, "{stats}");
    let pid = child.id().unwrap();
    std::process::Command::new("sh").args(["-c", &format!("kill -TERM {pid}")]).status().unwrap();
    let status = tokio::time::timeout(Duration::from_secs(10), child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
}

fn letters_in(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn dead_letters_are_deleted_as_they_were_shown_and_no_others() {
    let (mut setup, _) = with_dead_letters().await;
    let dir = setup.data_dir().join("dead-letters/mixpanel");
    let (code, out, err) = setup.run(&["dead-letters", "delete", "--yes"]).await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("want --provider, --reason, --since or --until, or --all"), "{err}");
    let (code, out, _) = setup.run(&["dead-letters", "delete", "--provider", "segment"]).await;
    assert_eq!((code, out.contains("no dead letters in")), (0, true), "{out}");
    let (code, _, err) = setup.run(&["dead-letters", "delete", "--reason", "nonsense"]).await;
    assert_eq!((code, err.contains("retries_exhausted")), (1, true), "{err}");

    let filter = ["dead-letters", "delete", "--reason", "invalid"];
    let (code, out, _) = setup.run(&filter).await;
    assert_eq!((code, out.contains("nothing is deleted")), (1, true), "{out}");
    let shown = lines_on_disk(&dir);
    assert_eq!(shown.len(), 20, "it only shows");
    let shown = shown.iter().filter(|letter| letter["reason"] == "invalid");
    let newest = shown.max_by_key(|letter| letter["dead_since_ms"].as_i64()).unwrap().clone();
    let told: Vec<String> =
        out.split_once("add: ").unwrap().1.split_whitespace().map(str::to_owned).collect();
    assert!(told[0] == "--yes" && told[1] == "--until" && told[2].ends_with('Z'), "{out}");
    assert_eq!(told[3..], ["--letters", "10"], "{out}");
    let told: Vec<&str> = filter.iter().copied().chain(told.iter().map(String::as_str)).collect();
    // Later ones that nobody was shown, in a relay that goes on running.
    setup.set("FLUSH_INTERVAL_SECONDS", "60");
    setup.sandbox.always(Vendor::Mixpanel, Some("reject-name=bad".parse().unwrap()));
    let relay = setup.start().await;
    let mut observer = Observer::default();
    for _ in 0..5 {
        observer.track(&mut relay.client(), "bad", "u").await;
    }
    // One that is taken, in the same batch: the others are to blame, and not Mixpanel.
    for name in ["taken"; 6] {
        observer.track(&mut relay.client(), name, "u").await;
    }
    relay.dead_lettered(Vendor::Mixpanel, 5).await;
    // One of the time of the newest of those that were shown, which comes to the disk
    // after it was looked at.
    let late = dir.join("late.ndjson");
    let text = newest.to_string().replace(newest["event"]["id"].as_str().unwrap(), "one-more");
    std::fs::write(&late, format!("{text}\n")).unwrap();
    let (code, _, err) = setup.run(&told).await;
    assert_eq!((code, err.contains("got 11 letter(s), want --letters 10")), (1, true), "{err}");
    assert_eq!(lines_on_disk(&dir).len(), 26, "nothing is deleted");
    std::fs::remove_file(&late).unwrap();
    let (code, out, err) = setup.run(&told).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("mixpanel     deleted 10 (invalid)"), "{out}");
    let left = lines_on_disk(&dir);
    let count = |reason: &str| left.iter().filter(|letter| letter["reason"] == reason).count();
    assert_eq!((count("invalid"), count("retries_exhausted")), (5, 10));

    // Those in the file that the relay writes to; it goes on with another one.
    let (code, out, _) = setup.run(&["dead-letters", "delete", "--all", "--yes"]).await;
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("deleted 5 (invalid)") && out.contains("deleted 10 (retries_exhausted)"), "{out}");
    assert!(lines_on_disk(&dir).is_empty());
    for name in ["bad"].into_iter().chain(["taken"; 10]) {
        observer.track(&mut relay.client(), name, "u").await;
    }
    relay.dead_lettered(Vendor::Mixpanel, 6).await;
    assert_eq!(lines_on_disk(&dir).len(), 1);
    let ended = relay.terminate().await;
    assert!(ended.balance(Vendor::Mixpanel).is_exact());
}

#[tokio::test]
async fn dead_letters_are_exported_to_be_replayed_another_day() {
    let (setup, _) = with_dead_letters().await;
    let dir = setup.data_dir().join("dead-letters/mixpanel");
    let (code, out, _) = setup.run(&["dead-letters", "export", "--reason", "retries_exhausted"]).await;
    assert_eq!((code, letters_in(&out).len()), (0, 10));
    let file = setup.data.path().join("letters.ndjson");
    let path = file.to_str().unwrap();
    let export = ["dead-letters", "export", "--reason", "retries_exhausted", "--out", path];
    let (code, told, err) = setup.run(&export).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(told, format!("10 dead letter(s) in {path}\n"));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), out, "as on standard output");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let (code, _, err) = setup.run(&export).await;
    assert_eq!((code, err.contains("is there already")), (1, true), "{err}");
    let nowhere = ["dead-letters", "export", "--out", "/no/such/dir/letters"];
    let (code, _, err) = setup.run(&nowhere).await;
    assert_eq!((code, err.contains("/no/such/dir/letters")), (1, true), "{err}");

    assert_eq!(setup.run(&["dead-letters", "delete", "--all", "--yes"]).await.0, 0);
    std::fs::copy(&file, dir.join("back.ndjson")).unwrap();
    // Somebody else's are no letters here.
    std::fs::create_dir_all(setup.data_dir().join("dead-letters/segment")).unwrap();
    std::fs::copy(&file, setup.data_dir().join("dead-letters/segment/back.ndjson")).unwrap();
    let (code, out, err) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("mixpanel     delivered 10") && out.contains("segment      delivered 0"), "{out}");
    assert!(err.contains("10 letter(s) of another provider are passed over"), "{err}");
    assert!(lines_on_disk(&dir).is_empty());
}

#[tokio::test]
async fn a_replay_tells_of_every_letter_that_it_does_not_send() {
    let mut setup = Setup::new().await;
    setup.set("MAX_RETRY_ATTEMPTS", "1").set("BATCH_SIZE", "1").set("ANALYTICS_PROVIDER", "mixpanel");
    setup.sandbox.always(Vendor::Mixpanel, Some("503".parse().unwrap()));
    let mut ids = Vec::new();
    // Each in a file of its own: a copy, then another event, under the same id.
    for user in ["user-1", "user-1", "user-2"] {
        let relay = setup.start().await;
        let mut request = crate::harness::track("Order Placed", user);
        request.event_id = "order-7".to_owned();
        request.timestamp_ms = 0;
        relay.client().track_event(request.clone()).await.unwrap();
        relay.dead_lettered(Vendor::Mixpanel, 1).await;
        relay.terminate().await;
        ids.push(request.event_id);
    }
    setup.sandbox.always(Vendor::Mixpanel, None);
    let (code, out, _) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!(code, 1, "a person has to look: {out}");
    for line in [
        "mixpanel     delivered 1\n",
        "mixpanel     not sent 1: copies of events that were sent\n",
        "mixpanel     not sent 1: other events under an id that was sent",
        ": order-7\n",
    ] {
        assert!(out.contains(line), "{line}: {out}");
    }
    let (code, out, _) = setup.run(&["dead-letters", "replay"]).await;
    assert_eq!((code, out.contains("delivered 0\n")), (0, true), "nothing is left: {out}");
}
