//! The operator's commands of the store: beside the relay that has it, and without one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::JoinHandle,
    time::sleep,
};

use crate::harness::{Relay, Setup, track};

/// 2026-11-01T00:00:00Z.
const BASE_MS: i64 = 1_793_491_200_000;

/// A relay that has a store and no vendor.
async fn with_store() -> Setup {
    let mut setup = Setup::new().await;
    setup.set("ANALYTICS_PROVIDER", "none").set("STORE_URL", "sqlite:");
    setup.set("STORE_FLUSH_INTERVAL_SECONDS", "0.05");
    setup
}

fn store(setup: &Setup) -> PathBuf {
    setup.data_dir().join("store.db")
}

fn socket(setup: &Setup) -> PathBuf {
    setup.data_dir().join("control.sock")
}

/// Events of a hundred people: devices that log in, identifies, aliases.
fn event(n: usize) -> Value {
    let (user, device) = (format!("user-{}", n % 100), format!("device-{}", n % 150));
    let time_ms = BASE_MS + n as i64 * 1_000;
    let common = json!({"id": format!("e-{n}"), "time_ms": time_ms, "accepted_ms": time_ms});
    let own = match n % 50 {
        0 => {
            json!({"kind": "identify", "user_id": user, "properties": {"plan": format!("p{}", n % 7), "é\u{1}": n}})
        }
        1 => {
            json!({"kind": "alias", "user_id": user, "previous_id": format!("old-{}", n % 100), "properties": {}})
        }
        2..20 => json!({"kind": "page", "anonymous_id": device, "properties": {"path": "/a\nb"}}),
        20..25 => {
            json!({"kind": "track", "name": "login", "user_id": user, "anonymous_id": device, "properties": {}})
        }
        _ => {
            json!({"kind": "track", "name": "click", "user_id": user, "properties": {"n": n, "deep": {"a": [1, "\u{1b}[2J"]}}})
        }
    };
    let mut event = common;
    event.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    event
}

fn write_events(setup: &Setup, name: &str, numbers: std::ops::Range<usize>) -> String {
    let path = setup.data.path().join(name);
    let lines: String = numbers.map(|n| format!("{}\n", event(n))).collect();
    fs::write(&path, lines).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Runs a command that must succeed; what it printed.
async fn done(setup: &Setup, args: &[&str]) -> String {
    let (code, out, err) = setup.run(args).await;
    assert_eq!(code, 0, "{args:?}\n{out}{err}");
    out
}

async fn json_of(setup: &Setup, args: &[&str]) -> Value {
    serde_json::from_str(&done(setup, args).await).unwrap()
}

async fn stats(setup: &Setup) -> Value {
    json_of(setup, &["store", "stats", "--json"]).await
}

/// The events of an export, without what is known beside.
fn by_id(text: &str) -> BTreeMap<String, Value> {
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter(|line| line["fact"].is_null())
        .map(|line| (line["id"].as_str().unwrap().to_owned(), line))
        .collect()
}

/// Sends events until it is told to stop; how many were answered OK.
fn load(relay: &Relay) -> (Arc<AtomicBool>, JoinHandle<usize>) {
    let (stop, mut client) = (Arc::new(AtomicBool::new(false)), relay.client());
    let stopped = stop.clone();
    let sending = tokio::spawn(async move {
        let mut sent = 0;
        while !stopped.load(Ordering::Relaxed) {
            client.track_event(track("of-load", &format!("load-{sent}"))).await.unwrap();
            sent += 1;
        }
        sent
    });
    (stop, sending)
}

async fn end_load((stop, sending): (Arc<AtomicBool>, JoinHandle<usize>)) -> usize {
    stop.store(true, Ordering::Relaxed);
    sending.await.unwrap()
}

/// Every command once, with what must be true of it whoever has the store.
async fn every_command(setup: &Setup, turn: usize) {
    let file = write_events(setup, &format!("in-{turn}"), turn * 1_000..(turn + 1) * 1_000);
    let imported = json_of(setup, &["store", "import", &file, "--json"]).await;
    assert_eq!((&imported["new"], &imported["duplicates"]), (&json!(1_000), &json!(0)), "{imported}");
    let again = done(setup, &["store", "import", &file]).await;
    assert!(again.contains("1000 line(s): 0 new, 1000 duplicate(s)"), "{again}");

    assert!(stats(setup).await["events"].as_u64().unwrap() >= 1_000);
    let printed = done(setup, &["store", "stats"]).await;
    assert!(printed.contains("websites and apps 1"), "{printed}");
    let times = printed.lines().find(|line| line.starts_with("of times")).unwrap();
    assert!(times.contains("Z to 20") && times.ends_with('Z'), "{times}");
    assert!(done(setup, &["store", "check"]).await.contains("; whole"));
    let checked = json_of(setup, &["store", "check", "--json"]).await;
    assert_eq!(checked["is_whole"], true, "{checked}");
    assert!(done(setup, &["store", "vacuum"]).await.contains("the file has"));
    assert!(done(setup, &["store", "tidy"]).await.starts_with("tidied: "));

    let exported = by_id(&done(setup, &["store", "export"]).await);
    for n in turn * 1_000..(turn + 1) * 1_000 {
        assert_eq!(exported[&format!("e-{n}")], event(n));
    }
    let backup = setup.data.path().join(format!("backup-{turn}"));
    done(setup, &["store", "backup", backup.to_str().unwrap()]).await;
    assert!(done(setup, &["store", "check", backup.to_str().unwrap()]).await.contains("; whole"));

    let user = json_of(setup, &["identity", "show", "user-20", "--json"]).await;
    assert_eq!(user["root"], "user-20");
    assert!(user["devices"].as_array().unwrap().contains(&json!("device-20")), "{user}");
    let split = ["identity", "split", "device-20", "user-20", "--operator", "ada", "--reason", "shared"];
    done(setup, &split).await;
    let apart = json_of(setup, &["identity", "show", "user-20", "--json"]).await;
    assert!(!apart["devices"].as_array().unwrap().contains(&json!("device-20")), "{apart}");
    done(setup, &["identity", "join", "device-20", "user-20"]).await;
    let joined = json_of(setup, &["identity", "show", "device-20", "--anonymous", "--json"]).await;
    assert_eq!(joined["devices"], user["devices"]);
    let log = done(setup, &["identity", "log", "user-20", "--json", "--limit", "2"]).await;
    let log: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((log.len(), &log[0]["what"], &log[1]["what"]), (2, &json!("rejoined"), &json!("put_apart")));
    assert_eq!((&log[1]["operator"], &log[1]["reason"]), (&json!("ada"), &json!("shared")));
    let log = done(setup, &["identity", "log", "device-20", "--anonymous"]).await;
    assert!(log.contains(" put_apart device-20 with user-20, "), "{log}");
    assert!(log.contains(" linked device-20 with user-20, event e-"), "{log}");
    let shown = done(setup, &["identity", "show", "user-0"]).await;
    assert!(shown.contains("counts as   user-0\n") && shown.contains("\"plan\""), "{shown}");
    assert!(shown.contains("first seen  2026-11-01T"), "{shown}");
    let (code, _, err) = setup.run(&["identity", "show", "nobody"]).await;
    assert!(code == 1 && err.contains("nothing is known"), "{err}");
}

#[tokio::test]
async fn every_command_works_beside_a_relay_under_load_and_without_one() {
    let setup = with_store().await;
    every_command(&setup, 0).await;
    let relay = setup.start().await;
    let loading = load(&relay);
    every_command(&setup, 1).await;
    let sent = end_load(loading).await;
    assert!(sent > 0);
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    every_command(&setup, 2).await;
    assert_eq!(stats(&setup).await["events"], 3_000 + sent as u64, "nothing is lost, nothing twice");
}

#[tokio::test]
async fn a_backup_under_load_has_all_that_was_kept_when_it_began_and_can_be_restored() {
    let setup = with_store().await;
    let relay = setup.start().await;
    let loading = load(&relay);
    let file = write_events(&setup, "in", 0..5_000);
    done(&setup, &["store", "import", &file]).await;
    let before = by_id(&done(&setup, &["store", "export"]).await);
    assert!(before.len() > 5_000, "the load is in it too");
    let backup = setup.data.path().join("backup.db");
    let name = backup.to_str().unwrap();
    done(&setup, &["store", "backup", name]).await;
    let (code, _, err) = setup.run(&["store", "backup", name]).await;
    assert!(code == 1 && err.contains("want a file that is not there yet"), "{err}");
    assert_eq!(fs::metadata(&backup).unwrap().permissions().mode() & 0o777, 0o600);
    end_load(loading).await;
    relay.terminate().await;

    for end in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{end}", store(&setup).display()));
    }
    fs::copy(&backup, store(&setup)).unwrap();
    let relay = setup.start().await;
    let restored = by_id(&done(&setup, &["store", "export"]).await);
    assert!(before.iter().all(|(id, event)| restored.get(id) == Some(event)));
    relay.client().track_event(track("u", "after-restore")).await.unwrap();
    relay.terminate().await;
    assert_eq!(stats(&setup).await["events"], restored.len() as u64 + 1);
}

#[tokio::test]
async fn twenty_thousand_events_that_are_exported_and_imported_are_the_same_store() {
    let (from, to) = (with_store().await, with_store().await);
    let relays = (from.start().await, to.start().await);
    let file = write_events(&from, "in", 0..20_000);
    done(&from, &["store", "import", &file]).await;
    // What no event tells goes with them.
    done(&from, &["identity", "split", "device-20", "user-70"]).await;
    let between = from.data.path().join("between");
    let between = between.to_str().unwrap();
    done(&from, &["store", "export", "--output", between]).await;
    assert_eq!(fs::metadata(between).unwrap().permissions().mode() & 0o777, 0o600);
    let (code, _, err) = from.run(&["store", "export", "--output", between]).await;
    assert!(code == 1 && err.contains("there already"), "{err}");
    let imported = json_of(&to, &["store", "import", between, "--json"]).await;
    let facts = fs::read_to_string(between).unwrap().lines().count() - 20_000;
    assert_eq!((&imported["new"], &imported["facts"]), (&json!(20_000), &json!(facts)));
    assert!(facts > 50);
    let there = by_id(&done(&to, &["store", "export"]).await);
    assert_eq!(there, by_id(&fs::read_to_string(between).unwrap()));
    assert_eq!(there.len(), 20_000);
    for (id, flag) in [
        ("user-1", None),
        ("old-1", Some("--anonymous")),
        ("device-20", Some("--anonymous")),
        ("user-50", None),
    ] {
        let args: Vec<&str> = ["identity", "show", id, "--json"].into_iter().chain(flag).collect();
        assert_eq!(json_of(&from, &args).await, json_of(&to, &args).await, "{id}");
    }
    // A part of it.
    let [first, last] = ["2026-11-01T00:01:00Z", "2026-11-01T00:02:00Z"];
    let part = done(&from, &["store", "export", "--tenant", "", "--from", first, "--to", last]).await;
    let ids: BTreeSet<_> = by_id(&part).into_keys().collect();
    assert_eq!(ids, (60..120).map(|n| format!("e-{n}")).collect());
    assert_eq!(done(&from, &["store", "export", "--tenant", "another"]).await, "");
    relays.0.terminate().await;
    relays.1.terminate().await;
}

#[tokio::test]
async fn bad_lines_are_told_by_their_numbers_and_cost_no_other() {
    let setup = with_store().await;
    let file = write_events(&setup, "in", 0..2_500);
    let mut lines: Vec<String> = fs::read_to_string(&file).unwrap().lines().map(str::to_owned).collect();
    lines[9] = "no event".into();
    lines.insert(1_500, String::new());
    lines[1_999] = r#"{"id":"x"}"#.into();
    // The last one was cut.
    let text = lines.join("\n");
    fs::write(&file, &text[..text.len() - 5]).unwrap();
    let relay = setup.start().await;
    for new in [2_497, 0] {
        let (code, out, err) = setup.run(&["store", "import", &file]).await;
        assert_eq!(code, 1, "{out}{err}");
        assert!(out.contains(&format!("2501 line(s): {new} new, {} duplicate(s)", 2_497 - new)), "{out}");
        assert!(out.contains("0 unstorable, 3 unreadable"), "{out}");
        for line in ["line 10: ", "line 2000: ", "line 2501: "] {
            assert!(out.contains(line), "{out}");
        }
    }
    assert_eq!(stats(&setup).await["events"], 2_497);
    relay.terminate().await;
    let (code, _, err) = setup.run(&["store", "import", "/nowhere"]).await;
    assert!(code == 1 && err.contains("/nowhere"), "{err}");
    let (code, _, err) = setup.run(&["store", "import", "/"]).await;
    assert!(code == 1 && err.contains("reading stopped"), "{err}");
}

#[tokio::test]
async fn commands_at_once_wait_for_each_other_or_share_the_relay() {
    let setup = with_store().await;
    let files = [write_events(&setup, "one", 0..3_000), write_events(&setup, "two", 2_000..5_000)];
    let both = async || {
        let import = async |file: &str| setup.run(&["store", "import", file]).await;
        let (one, two) = tokio::join!(import(&files[0]), import(&files[1]));
        assert_eq!((one.0, two.0), (0, 0), "{one:?} {two:?}");
    };
    both().await;
    assert_eq!(stats(&setup).await["events"], 5_000);
    let relay = setup.start().await;
    both().await;
    assert_eq!(stats(&setup).await["events"], 5_000);
    relay.terminate().await;
}

#[tokio::test]
async fn a_relay_that_was_killed_leaves_a_socket_that_is_in_nobodys_way() {
    let setup = with_store().await;
    let relay = setup.start().await;
    let found = fs::metadata(socket(&setup)).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    relay.signal("KILL");
    relay.ended(Instant::now()).await;
    assert!(socket(&setup).exists());
    let file = write_events(&setup, "in", 0..10);
    done(&setup, &["store", "import", &file]).await;
    let relay = setup.start().await;
    assert_eq!(stats(&setup).await["events"], 10);
    assert_eq!(relay.terminate().await.code, 0);
    assert!(!socket(&setup).exists());
}

#[tokio::test]
async fn a_relay_that_hangs_keeps_no_command_for_long() {
    let setup = with_store().await;
    let relay = setup.start().await;
    let file = write_events(&setup, "in", 0..10);
    relay.signal("STOP");
    let started = Instant::now();
    let run = async |args: &[&str]| setup.run(args).await;
    let args = [&["store", "stats"][..], &["store", "import", &file], &["identity", "split", "d", "u"]];
    let (stats, import, split) = tokio::join!(run(args[0]), run(args[1]), run(args[2]));
    for (code, out, err) in [stats, import, split] {
        assert!(code == 1 && err.contains("has not answered for 10 s"), "{out}{err}");
    }
    assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
    // What reads the file needs nobody.
    assert!(done(&setup, &["store", "check"]).await.contains("; whole"));
    relay.signal("CONT");
    assert_eq!(relay.terminate().await.code, 0);
}

/// Who sends lines and does not go on keeps no relay from stopping.
#[tokio::test]
async fn a_relay_stops_in_time_under_an_import_which_can_be_run_again() {
    let setup = with_store().await;
    let relay = setup.start().await;
    let mut import = setup.command();
    import.args(["store", "import"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut import = import.spawn().unwrap();
    let lines: String = (0..2_000).map(|n| format!("{}\n", event(n))).collect();
    let mut stdin = import.stdin.take().unwrap();
    stdin.write_all(lines.as_bytes()).await.unwrap();
    let start = Instant::now();
    while stats(&setup).await["events"] == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing is taken");
        sleep(Duration::from_millis(20)).await;
    }
    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    assert!(ended.took < Duration::from_secs(4), "{:?}", ended.took);
    let output = import.wait_with_output().await.unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && err.contains("run it again"), "{err}");
    drop(stdin);
    let file = write_events(&setup, "in", 0..2_000);
    done(&setup, &["store", "import", &file]).await;
    assert_eq!(stats(&setup).await["events"], 2_000);
}

#[tokio::test]
async fn a_file_that_is_no_store_is_refused_and_left_as_it_is() {
    let mut setup = with_store().await;
    setup.set("STORE_URL", "sqlite:");
    for args in
        [&["store", "stats"][..], &["store", "vacuum"], &["store", "tidy"], &["identity", "split", "d", "u"]]
    {
        let (code, _, err) = setup.run(args).await;
        assert!(code == 1 && err.contains("there is no store in"), "{args:?}: {err}");
    }
    let (_, _, err) = setup.run(&["store", "check"]).await;
    assert!(err.contains("no such file"), "{err}");
    assert!(!setup.data_dir().exists(), "looking makes nothing");
    let wrong = setup.data.path().join("wrong");
    let text = "not a database".repeat(1_000);
    fs::write(&wrong, &text).unwrap();
    let name = wrong.to_str().unwrap().to_owned();
    setup.set("STORE_URL", &format!("sqlite:{name}"));
    for args in [
        &["store", "check"][..],
        &["store", "check", &name],
        &["store", "backup", "copy"],
        &["store", "export"],
        &["store", "import", &name],
        &["store", "vacuum"],
        &["store", "tidy"],
        &["store", "stats"],
        &["identity", "show", "u"],
    ] {
        let (code, out, err) = setup.run(args).await;
        assert!(code == 1 && out.is_empty() && err.contains("want a store's file"), "{args:?}: {out}{err}");
    }
    assert_eq!(fs::read_to_string(&wrong).unwrap(), text);
    setup.set("STORE_URL", "");
    let (code, _, err) = setup.run(&["store", "stats"]).await;
    assert!(code == 1 && err.contains("STORE_URL: got no store"), "{err}");
}

#[tokio::test]
async fn a_command_that_means_another_store_than_the_relays_is_refused() {
    let mut setup = with_store().await;
    let relay = setup.start().await;
    let file = write_events(&setup, "in", 0..10);
    setup.set("STORE_URL", "sqlite:other.db");
    let (code, _, err) = setup.run(&["store", "import", &file]).await;
    assert!(code == 1 && err.contains("STORE_URL names another"), "{err}");
    setup.set("STORE_URL", "sqlite:");
    assert_eq!(stats(&setup).await["events"], 0);
    let printed = done(&setup, &["store", "stats"]).await;
    assert!(printed.contains("of times          none, as there are no events\n"), "{printed}");
    relay.terminate().await;
}

#[tokio::test]
async fn without_a_store_or_a_socket_commands_say_why_and_the_relay_runs() {
    let mut setup = with_store().await;
    setup.set("ANALYTICS_PROVIDER", "mixpanel").set("STORE_URL", "");
    let relay = setup.start().await;
    assert!(!socket(&setup).exists());
    setup.set("STORE_URL", "sqlite:");
    let file = write_events(&setup, "in", 0..10);
    let (code, _, err) = setup.run(&["store", "import", &file]).await;
    assert!(code == 1 && err.contains("a relay without a store"), "{err}");
    relay.terminate().await;

    let long = setup.data.path().join("x".repeat(110));
    setup.set("DATA_DIR", long.to_str().unwrap());
    let relay = setup.start().await;
    let why = relay.log_where("relay started", |_| true).await;
    assert!(why.is_object());
    let warned = |line: &Value| line["message"].as_str().unwrap_or_default().contains("too long");
    assert!(relay.logs().iter().any(warned));
    let (code, _, err) = setup.run(&["store", "import", &file]).await;
    assert!(code == 1 && err.contains("too long"), "{err}");
    assert_eq!(relay.terminate().await.code, 0);
    done(&setup, &["store", "import", &file]).await;
}

#[tokio::test]
async fn what_is_imported_brings_no_erased_user_back() {
    let setup = with_store().await;
    let file = write_events(&setup, "in", 0..1_000);
    let fact = r#"{"v":1,"fact":"user","user":"user-30","first_ms":1,"last_ms":1}"#;
    fs::write(&file, format!("{}{fact}\n", fs::read_to_string(&file).unwrap())).unwrap();
    done(&setup, &["erase", "--user-id", "user-30"]).await;
    let taken = json_of(&setup, &["store", "import", &file, "--json"]).await;
    let relay = setup.start().await;
    let beside = json_of(&setup, &["store", "import", &file, "--json"]).await;
    let theirs = (0..1_000).filter(|n| event(*n)["user_id"] == "user-30").count();
    for imported in [&taken, &beside] {
        assert_eq!((&imported["suppressed"], &imported["facts"]), (&json!(theirs + 1), &json!(0)));
    }
    assert_eq!(taken["new"], 1_000 - theirs);
    assert!(!done(&setup, &["store", "export"]).await.contains("user-30"));
    relay.terminate().await;
}

/// Whoever speaks HTTP badly over the socket gets an error, and nobody else waits.
#[tokio::test]
async fn odd_calls_over_the_socket_are_refused_in_time() {
    let setup = with_store().await;
    let relay = setup.start().await;
    let ask = async |call: &str| {
        let mut stream = UnixStream::connect(socket(&setup)).await.unwrap();
        // It may be answered before all of it is read.
        let _ = stream.write_all(call.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    };
    let post = |at: &str, body: &str| {
        format!("POST {at} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let get = |at: &str| format!("GET {at} HTTP/1.1\r\nhost: x\r\n\r\n");
    for (call, want) in [
        (get("/"), "404"),
        (get("/store/vacuum"), "405"),
        (get("/identity"), "400"),
        (get("/identity?user=a&device=b"), "400"),
        (get("/identity?user=%00%ff"), "404"),
        (post("/identity/split", "{"), "400"),
        (post("/identity/split", r#"{"device":"","user":"u"}"#), "400"),
        (post("/identity/split", &"x".repeat(5 << 20)), "400"),
        ("no http\r\n\r\n".to_owned(), "400"),
        (format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(64 * 1024)), "431"),
    ] {
        let answer = ask(&call).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {want}")), "{want}: {answer}");
    }
    // More than may ask at once, who say nothing: they are closed for those who do.
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(UnixStream::connect(socket(&setup)).await.unwrap());
    }
    assert_eq!(stats(&setup).await["events"], 0);
    let imported = ask(&post("/store/import", &format!("{}\n\n", event(1)))).await;
    assert!(imported.contains(r#"{"done":{"lines":2,"new":1"#), "{imported}");
    let ended = relay.terminate().await;
    assert!(ended.code == 0 && ended.took < Duration::from_secs(4), "{:?}", ended.took);
}
