//! Files that are sealed: nobody reads an event in them without the key, nothing that was
//! answered OK is lost by it, and what somebody changes is refused and counted.

use std::{
    collections::HashSet,
    fs,
    ops::Range,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use analytics_relay::providers::sandbox::Vendor;
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    time::{sleep, timeout},
};

use crate::harness::{Ended, Observer, Relay, Setup, bodies, everything_below, post, reqwest_client, taken};

/// What stands in every event, and may stand in no file.
const CANARY: &str = "canary-4711";
const EVENTS: usize = 120;
/// Keys that no relay may have: of one byte each.
const A: &str = "key-a:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
const B: &str = "key-b:AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";

/// Of people, in events: vendors get them, and nobody reads them in the store without the key.
#[tokio::test]
async fn fields_of_the_store_are_sealed_and_put_back_by_whoever_has_the_key() {
    const EMAIL: &str = "Canary.Ann@example.com";
    const PHONE: &str = "+49 canary 4711";
    let mut setup = durable(A).await;
    let file = setup.data.path().join("privacy.toml");
    fs::write(&file, "[providers.store]\nseal = { email = \"index\", phone = \"opaque\" }").unwrap();
    setup.set("PRIVACY_FILE", file.to_str().unwrap()).set("PRIVACY_HASH_KEY", "0123456789abcdef");
    setup.set("STORE_URL", "sqlite:").set("STORE_FLUSH_INTERVAL_SECONDS", "0.05");
    let relay = setup.start().await;
    let event = |n: usize, email: &str| {
        let kind = ["identify", "track"][n % 2];
        json!({ "type": kind, "event": "Ordered", "userId": "u",
                "messageId": format!("sealed-{n}-0123456789"),
                "properties": { "n": n, "buyer": { "E_mail": email, "phone": [PHONE] } },
                "traits": { "email": email, "phone": null }, "context": { "traits": { "email": email } } })
    };
    let body = json!({ "batch": [event(0, EMAIL), event(1, EMAIL), event(2, &EMAIL.to_uppercase())] });
    assert_eq!(post(&relay, "/v1/batch", &body).await, 200);
    relay.metric_is("relay_events_total", &["\"store\"", "\"delivered\""], 3.0).await;
    taken(&setup, Vendor::Segment, 3).await;
    let (code, identity, error) = setup.run(&["identity", "show", "u"]).await;
    assert_eq!(code, 0, "{error}");
    relay.terminate().await;
    let mut on_disk = identity;
    everything_below(setup.data_dir(), &mut on_disk);
    for canary in [EMAIL, PHONE] {
        assert!(bodies(&setup, Vendor::Segment).contains(canary), "a vendor gets {canary}");
        assert!(!on_disk.to_lowercase().contains(&canary.to_lowercase()), "{canary} is on the disk");
    }

    let exported = setup.data.path().join("exported.ndjson");
    let (code, _, error) = setup.run(&["store", "export", "--out", exported.to_str().unwrap()]).await;
    assert_eq!(code, 0, "{error}");
    let sealed = fs::read_to_string(&exported).unwrap();
    assert!(!sealed.to_lowercase().contains("canary"), "{sealed}");
    let emails = |text: &str, field: &str| -> HashSet<String> {
        let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let values = events.map(|event| event["sent_context"]["traits"]["email"][field].clone());
        values.filter_map(|value| value.as_str().map(str::to_owned)).collect()
    };
    assert_eq!((emails(&sealed, "$enc").len(), emails(&sealed, "$eq").len()), (3, 1), "{sealed}");
    let unseal = async |setup: &Setup| {
        let mut command = setup.command();
        command.args(["secrets", "unseal"]).stdin(fs::File::open(&exported).unwrap());
        let output = command.output().await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, opened, error) = unseal(&setup).await;
    assert_eq!((code, &*error), (Some(0), ""));
    assert!(!opened.contains("$enc"), "{opened}");
    assert!(opened.contains(PHONE) && opened.contains(EMAIL), "{opened}");
    assert!(opened.contains(r#""fact":"traits""#), "what is known of somebody too: {opened}");
    let mut equal = setup.command();
    equal.args(["secrets", "equal", "e-mail"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut equal = equal.spawn().unwrap();
    equal.stdin.take().unwrap().write_all(format!(" {EMAIL}\n").as_bytes()).await.unwrap();
    let found = equal.wait_with_output().await.unwrap().stdout;
    let of_email = emails(&sealed, "$eq").into_iter().next().unwrap();
    assert_eq!(String::from_utf8(found).unwrap().trim(), of_email);
    setup.set("RELAY_KEK", B);
    let (code, closed, error) = unseal(&setup).await;
    assert_eq!((code, closed == sealed), (Some(1), true));
    assert!(
        error.contains("values stay sealed") && error.contains("\"key-a\", which is not given"),
        "{error}"
    );

    // Nothing is kept in the clear for want of a key.
    setup.vars.remove("RELAY_KEK");
    let (code, _, error) = setup.run(&["check"]).await;
    assert!(code == 1 && error.contains("providers.store.seal: got no key to seal with"), "{error}");
}

async fn durable(keys: &str) -> Setup {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", "written").set("SPOOL_SEGMENT_BYTES", "65536").set("RELAY_KEK", keys);
    setup
}

fn all(setup: &Setup, fault: Option<&str>) {
    Vendor::ALL
        .into_iter()
        .for_each(|vendor| setup.sandbox.always(vendor, fault.map(|it| it.parse().unwrap())));
}

async fn canaries(relay: &Relay, events: usize) -> Observer {
    let mut observer = Observer::default();
    let mut client = relay.client();
    for event in 0..events {
        assert_eq!(observer.track(&mut client, CANARY, &format!("{CANARY}-{}", event % 7)).await, None);
    }
    observer
}

/// Every file under a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(self::files(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

fn with_ending(setup: &Setup, ending: &str) -> Vec<PathBuf> {
    let mut files = files(setup.data_dir());
    files.retain(|path| path.extension().is_some_and(|it| it == ending));
    files
}

fn check_no_canary(setup: &Setup) {
    let files = files(setup.data_dir());
    assert!(files.len() > 2, "{files:?}");
    for path in files {
        let bytes = fs::read(&path).unwrap();
        assert!(memchr::memmem::find(&bytes, CANARY.as_bytes()).is_none(), "{path:?}");
        assert!(memchr::memmem::find(&bytes, b"AQEBAQEBAQEB").is_none(), "a key is in {path:?}");
    }
}

async fn killed(relay: Relay) {
    relay.signal("KILL");
    assert_eq!(relay.ended(Instant::now()).await.code, -1);
}

/// A log with events that nobody has got, whose relay was killed.
async fn with_backlog(keys: &str) -> (Setup, Observer) {
    let setup = durable(keys).await;
    all(&setup, Some("503"));
    let relay = setup.start().await;
    let observer = canaries(&relay, EVENTS).await;
    killed(relay).await;
    all(&setup, None);
    (setup, observer)
}

async fn delivered(setup: &Setup, events: u64) {
    for vendor in Vendor::ALL {
        taken(setup, vendor, events).await;
    }
}

fn check_exact(ended: &Ended, delivered: u64, dropped: u64) {
    for vendor in Vendor::ALL {
        let balance = ended.balance(vendor);
        assert!(balance.is_exact(), "{vendor:?} {balance:?}");
        assert_eq!((balance.delivered, balance.dropped), (delivered, dropped), "{vendor:?} {balance:?}");
    }
}

async fn run_without_key(setup: &mut Setup, args: &[&str]) -> (i32, String, String) {
    let keys = setup.vars.remove("RELAY_KEK");
    let ran = setup.run(args).await;
    setup.vars.extend(keys.map(|keys| ("RELAY_KEK".to_owned(), keys)));
    ran
}

#[tokio::test]
async fn what_was_answered_ok_survives_sigkill_and_stands_nowhere_on_the_disk() {
    let setup = durable(A).await;
    all(&setup, Some("503"));
    let relay = setup.start().await;
    let mut observer = canaries(&relay, EVENTS).await;
    let batch =
        json!({"context": {"locale": CANARY}, "batch": [{"type": "track", "event": CANARY, CANARY: 1}]});
    let url = format!("http://{}/v1/batch", relay.http_addr.unwrap());
    assert!(reqwest_client().post(url).body(batch.to_string()).send().await.unwrap().status().is_success());
    check_no_canary(&setup);
    killed(relay).await;
    check_no_canary(&setup);
    // Twice, so that there are files of three processes.
    let relay = setup.start().await;
    observer.add(canaries(&relay, EVENTS).await);
    killed(relay).await;
    all(&setup, None);
    let relay = setup.start().await;
    delivered(&setup, 2 * EVENTS as u64).await;
    let logs = relay.raw_logs().join("\n");
    let ended = relay.terminate().await;
    check_exact(&ended, 2 * EVENTS as u64, 0);
    for vendor in Vendor::ALL {
        assert_eq!(observer.check(&setup, vendor).delivered, 2 * EVENTS as u64);
    }
    assert!(!logs.contains("AQEBAQEBAQEB"), "a key is in the logs");
    check_no_canary(&setup);
    let (code, shown, _) = setup.run(&["dead-letters", "refused", "show"]).await;
    assert!(code == 0 && shown.contains(CANARY) && shown.contains("NO_USER"), "{shown}");
}

#[tokio::test]
async fn spilled_events_and_dead_letters_are_sealed_and_read_with_the_key_alone() {
    let mut setup = Setup::new().await;
    setup
        .set("RELAY_KEK", A)
        .set("SEGMENT_MAX_RETRY_ATTEMPTS", "2")
        .set("MIXPANEL_MAX_RETRY_ATTEMPTS", "100");
    setup.set("DRAIN_TIMEOUT_SECONDS", "1");
    setup.sandbox.always(Vendor::Segment, Some("503".parse().unwrap()));
    setup.sandbox.always(Vendor::Mixpanel, Some("503".parse().unwrap()));
    let relay = setup.start().await;
    canaries(&relay, 20).await;
    relay.dead_lettered(Vendor::Segment, 20).await;
    let ended = relay.terminate().await;
    assert_eq!(ended.balance(Vendor::Mixpanel).spilled, 20);
    check_no_canary(&setup);
    assert_eq!(with_ending(&setup, "ndjson").len(), 0, "{:?}", files(setup.data_dir()));

    let (code, listed, _) = run_without_key(&mut setup, &["dead-letters", "list"]).await;
    assert!(code == 0 && listed.contains("retries_exhausted") && listed.contains(" 20 "), "{listed}");
    for command in [
        &["dead-letters", "show"][..],
        &["dead-letters", "export"],
        &["dead-letters", "replay", "--provider", "segment"],
    ] {
        let (code, out, error) = run_without_key(&mut setup, command).await;
        assert_eq!((code, out.contains(CANARY)), (1, false), "{out}");
        assert!(error.contains("\"key-a\", which is not given (given: none)"), "{command:?}: {error}");
    }
    let (_, _, error) = run_without_key(&mut setup, &["serve"]).await;
    assert!(error.contains("spill/mixpanel/") && error.contains("\"key-a\""), "{error}");

    all(&setup, None);
    let (code, shown, _) = setup.run(&["dead-letters", "show"]).await;
    assert_eq!((code, shown.matches(&format!("\"name\":\"{CANARY}\"")).count()), (0, 20));
    let (code, said, error) = setup.run(&["dead-letters", "replay", "--provider", "segment"]).await;
    assert_eq!((code, said.contains("delivered 20")), (0, true), "{said}{error}");
    let relay = setup.start().await;
    taken(&setup, Vendor::Mixpanel, 20).await;
    let balance = relay.terminate().await.balance(Vendor::Mixpanel);
    assert_eq!((balance.reloaded, balance.delivered, balance.dropped), (20, 20, 0));
}

/// Where the frames of a sealed segment are.
fn frames(bytes: &[u8]) -> Vec<Range<usize>> {
    let (mut at, mut frames) = (8192, Vec::new());
    while bytes.get(at..at + 5) == Some(b"\xA7RF\xFE\x02") {
        let payload = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        let end = at + 32 + usize::from(bytes[at + 7]) + payload;
        // Events only.
        if bytes[at + 5] == 1 {
            frames.push(at..end);
        }
        at = end;
    }
    frames
}

fn mend_crc(frame: &mut [u8]) {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame[..12]);
    crc.update(&frame[16..]);
    frame[12..16].copy_from_slice(&crc.finalize().to_le_bytes());
}

/// Somebody who knows the format, and not the key.
#[tokio::test]
async fn flipped_bits_and_swapped_payloads_with_their_checksums_mended_are_refused_and_counted() {
    let (mut setup, _) = with_backlog(A).await;
    let segment = with_ending(&setup, "log").remove(0);
    let mut bytes = fs::read(&segment).unwrap();
    let places = frames(&bytes);
    let payload = |frame: &Range<usize>| frame.start + 32 + usize::from(bytes[frame.start + 7])..frame.end;
    let (one, two) = (payload(&places[3]), payload(&places[4]));
    assert_eq!(one.len(), two.len());
    let kept = bytes[one.clone()].to_vec();
    bytes.copy_within(two.clone(), one.start);
    bytes[two].copy_from_slice(&kept);
    bytes[places[8].end - 20] ^= 4;
    for place in [3, 4, 8] {
        mend_crc(&mut bytes[places[place].clone()]);
    }
    fs::write(&segment, bytes).unwrap();

    let (code, out, _) = run_without_key(&mut setup, &["spool", "verify"]).await;
    assert!(
        code == 0 && out.contains("its seals are not checked: it is sealed with the key \"key-a\""),
        "{out}"
    );
    let (code, out, _) = setup.run(&["spool", "verify"]).await;
    assert!(code == 1 && out.contains("3 frame(s) are not what was sealed"), "{out}");
    let (_, out, error) = setup.run(&["spool", "export"]).await;
    assert_eq!(out.lines().count(), EVENTS - 3, "{error}");

    let relay = setup.start().await;
    delivered(&setup, EVENTS as u64 - 3).await;
    relay.metric_is("relay_spool_damaged_ranges", &[], 3.0).await;
    let broken = relay.metric("relay_events_total", &["mixpanel", "\"seal_broken\""]).await;
    assert_eq!(broken, 3.0);
    check_exact(&relay.terminate().await, EVENTS as u64 - 3, 3);
}

#[tokio::test]
async fn a_relay_without_the_key_does_not_start_and_says_which_or_goes_on_and_counts() {
    let (mut setup, _) = with_backlog(A).await;
    let before = with_ending(&setup, "log").len();
    for keys in [None, Some(B)] {
        setup.vars.remove("RELAY_KEK");
        keys.map(|keys| setup.set("RELAY_KEK", keys).vars.len());
        let (code, _, error) = setup.run(&["serve"]).await;
        assert_eq!(code, 1);
        for part in ["00000000000000000001.log", "\"key-a\"", "RELAY_KEK_FILE", "--quarantine-unreadable"] {
            assert!(error.contains(part), "{part} in {error}");
        }
        assert!(!error.contains("AgIC"), "{error}");
    }
    assert_eq!(with_ending(&setup, "log").len(), before, "nothing was begun or removed");
    let mut command = setup.command();
    command.args(["serve", "--quarantine-unreadable"]);
    let relay = Relay::spawn(command).await;
    for vendor in Vendor::ALL {
        let labels = [vendor.name(), "\"undecryptable\""];
        relay.metric_is("relay_events_total", &labels, EVENTS as f64).await;
    }
    let observer = canaries(&relay, 10).await;
    delivered(&setup, 10).await;
    check_exact(&relay.terminate().await, 10, EVENTS as u64);
    assert_eq!(observer.accepted.len(), 10);
    let aside = with_ending(&setup, "unreadable");
    assert_eq!(aside.len(), before, "{aside:?}");
    // The next start asks for nothing, and who finds the key reads them.
    setup.start().await.terminate().await;
    let found = setup.data.path().join("found/segments");
    fs::create_dir_all(&found).unwrap();
    for path in aside {
        fs::copy(&path, found.join(path.file_stem().unwrap())).unwrap();
    }
    setup.set("RELAY_KEK", A);
    let dir = found.parent().unwrap().display().to_string();
    let (code, out, error) = setup.run(&["spool", "export", "--dir", &dir]).await;
    assert_eq!((code, out.lines().count()), (0, EVENTS), "{error}");
}

#[tokio::test]
async fn a_rotation_that_is_killed_at_any_moment_loses_nothing() {
    let (mut setup, mut observer) = with_backlog(A).await;
    // Some more files.
    all(&setup, Some("503"));
    for _ in 0..4 {
        let relay = setup.start().await;
        observer.add(canaries(&relay, 5).await);
        self::killed(relay).await;
    }
    all(&setup, None);
    let events = EVENTS + 20;
    let exported = async |setup: &Setup| {
        let (code, out, error) = setup.run(&["spool", "export"]).await;
        assert_eq!((code, out.lines().count()), (0, events), "{error}");
    };
    let mut killed = 0;
    for turn in 0..40_u64 {
        // To and fro, so that there is something to do each time.
        let keys = if turn % 2 == 0 { [B, A] } else { [A, B] };
        setup.set("RELAY_KEK", &keys.join(","));
        let mut command = setup.command();
        let mut rewrap = command.args(["secrets", "rewrap"]).stdout(Stdio::null()).spawn().unwrap();
        let ended = timeout(Duration::from_micros(1500 + 150 * turn), rewrap.wait()).await;
        if ended.is_err() {
            killed += 1;
            rewrap.kill().await.unwrap();
        }
        if turn % 5 == 0 {
            exported(&setup).await;
        }
    }
    setup.set("RELAY_KEK", &format!("{B},{A}"));
    assert!(killed > 5, "{killed}");
    exported(&setup).await;
    let (code, out, error) = setup.run(&["secrets", "rewrap"]).await;
    assert_eq!(code, 0, "{out}{error}");
    let (code, again, _) = setup.run(&["secrets", "rewrap"]).await;
    assert!(code == 0 && again.starts_with("0 file(s) are sealed with key-b now"), "{again}");
    setup.set("RELAY_KEK", B);
    let (code, status, _) = setup.run(&["secrets", "status"]).await;
    assert!(code == 0 && status.contains("key-b") && !status.contains("key-a"), "{status}");
    let relay = setup.start().await;
    delivered(&setup, events as u64).await;
    check_exact(&relay.terminate().await, events as u64, 0);
    assert_eq!(observer.check(&setup, Vendor::Segment).copies, events as u64);
}

#[tokio::test]
async fn a_rewrap_beside_a_relay_disturbs_it_in_nothing() {
    let mut setup = durable(A).await;
    all(&setup, Some("503"));
    setup.set("RELAY_KEK", A);
    let relay = setup.start().await;
    canaries(&relay, EVENTS).await;
    setup.set("RELAY_KEK", &format!("{B},{A}"));
    let (code, out, error) = setup.run(&["secrets", "rewrap"]).await;
    assert_eq!(code, 0, "{out}{error}");
    canaries(&relay, EVENTS).await;
    all(&setup, None);
    // What it had no room for in memory it reads, with the key that it has had from the start.
    delivered(&setup, 2 * EVENTS as u64).await;
    check_exact(&relay.terminate().await, 2 * EVENTS as u64, 0);
}

#[tokio::test]
async fn a_log_that_was_not_sealed_is_read_on_and_so_is_one_that_is_not_sealed_any_more() {
    let mut setup = durable(A).await;
    let none_first = format!("none,{A}");
    for keys in [None, Some(A), Some(none_first.as_str())] {
        setup.vars.remove("RELAY_KEK");
        keys.map(|keys| setup.set("RELAY_KEK", keys).vars.len());
        all(&setup, Some("503"));
        let relay = setup.start().await;
        canaries(&relay, 10).await;
        killed(relay).await;
    }
    all(&setup, None);
    let relay = setup.start().await;
    delivered(&setup, 30).await;
    check_exact(&relay.terminate().await, 30, 0);
}

#[tokio::test]
async fn repair_and_explain_do_without_the_key_what_can_be_done() {
    let (mut setup, observer) = with_backlog(A).await;
    let last = with_ending(&setup, "log").pop().unwrap();
    let bytes = fs::read(&last).unwrap();
    let end = frames(&bytes).pop().unwrap().end;
    fs::write(&last, &bytes[..end - 5]).unwrap();
    let (code, out, error) = run_without_key(&mut setup, &["spool", "repair"]).await;
    assert!(code == 0 && out.contains("a torn end of") && out.contains("cut off"), "{out}{error}");
    let (code, out, _) = run_without_key(&mut setup, &["spool", "verify"]).await;
    assert!(code == 0 && out.contains(&format!("{} event(s); clean", EVENTS - 1)), "{out}");
    let (code, out, error) = run_without_key(&mut setup, &["spool", "export"]).await;
    assert!(code == 1 && out.is_empty() && error.contains("\"key-a\""), "{error}");

    let id = observer.accepted.iter().next().unwrap();
    sleep(Duration::from_millis(10)).await;
    for (with_key, explained) in [
        (false, run_without_key(&mut setup, &["explain", id, "--json"]).await),
        (true, setup.run(&["explain", id, "--json"]).await),
    ] {
        let explained: Value = serde_json::from_str(&explained.1).unwrap();
        let providers = explained["accepted"][0]["providers"].as_array().unwrap();
        assert_eq!(providers.len(), 3, "{explained}");
        let attempts: Vec<&Value> =
            providers.iter().flat_map(|it| it["attempts"].as_array().unwrap()).collect();
        for attempt in &attempts {
            assert_eq!(attempt["verdict"], "unavailable", "{explained}");
            assert_eq!(
                attempt.get("detail").is_some(),
                with_key,
                "the provider's words are sealed: {explained}"
            );
        }
    }
}

#[tokio::test]
async fn a_new_key_is_printed_alone_and_can_be_used() {
    let mut setup = durable(A).await;
    let (code, key, error) = setup.run(&["secrets", "new-kek", "--name", "fresh"]).await;
    assert_eq!((code, error.as_str(), key.lines().count()), (0, "", 1));
    let file = setup.data.path().join("keys");
    fs::write(&file, format!("# ours\n{key}\n{A}\n")).unwrap();
    setup.vars.remove("RELAY_KEK");
    setup.set("RELAY_KEK_FILE", file.to_str().unwrap());
    let (code, checked, error) = setup.run(&["check"]).await;
    assert!(
        code == 0 && checked.contains("keys to seal files with: fresh, key-a; new files: fresh"),
        "{error}"
    );
    setup.vars.remove("RELAY_KEK_FILE");
    setup.set("RELAY_KEK_COMMAND", &format!("cat {}", file.display()));
    let relay = setup.start().await;
    let told = relay.log("what is kept on disk is sealed").await;
    assert_eq!((&told["writes_with"], &told["keys"]), (&json!("fresh"), &json!("fresh, key-a")));
    assert!(!relay.raw_logs().join("").contains(key.trim().split_once(':').unwrap().1));
    relay.terminate().await;
    setup.set("RELAY_KEK_COMMAND", "/nowhere/at/all");
    let (code, _, error) = setup.run(&[]).await;
    assert!(code == 1 && error.contains("RELAY_KEK_COMMAND: the command cannot be run"), "{error}");
}
