//! A disk that is really full: the log on a small file system in memory.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use analytics_relay::{proto::v1::Durability, providers::sandbox::Vendor};
use analytics_relay_store::sqlite;
use tokio::time::sleep;
use tonic::Code;

use crate::{
    harness::{Observer, eventually, not_run, taken},
    oracle::{Answer, Draft, Oracle},
    relays::{Figures, Mount, all, durable, fault, is_apart, is_long, settle},
};

fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    while file.write_all(&[7; 4096]).is_ok() {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_and_is_used_again_without_a_restart() {
    if !is_apart("disk_full::a_full_disk_refuses_and_is_used_again_without_a_restart") {
        return;
    }
    let (mut took, rounds) = (Vec::new(), if is_long() { 20 } else { 1 });
    let (mut oks, mut refused, mut figures) = (0, 0, Figures::default());
    for _ in 0..rounds {
        let mut setup = durable("synced").await;
        let dir = setup.data.path().join("disk");
        fs::create_dir(&dir).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=2M,mode=700", "tmpfs"]).arg(&dir);
        let Some(_mounted) = Mount::with(mount, &dir) else {
            return not_run("a file system in memory: the right to mount one");
        };
        setup.set("DATA_DIR", dir.join("data").to_str().unwrap());
        // One provider keeps the log from being shortened.
        setup.sandbox.always(Vendor::Amplitude, fault("503"));
        let relay = figures.start(&setup).await;
        let (mut client, mut oracle) = (relay.client(), Oracle::default());
        let draft = || Draft { filler: 3000, ..Draft::track(Durability::Synced) };
        for _ in 0..10 {
            assert!(matches!(oracle.send(&mut client, draft()).await, Answer::Ok(_)));
        }
        let filler = dir.join("filler");
        fill(&filler);
        let refusal = loop {
            match oracle.send(&mut client, draft()).await {
                Answer::Ok(_) => assert!(oracle.oks() < 2000, "never full"),
                other => break other,
            }
        };
        assert_eq!(refusal, Answer::Refused(Code::ResourceExhausted));
        for _ in 0..20 {
            assert!(!matches!(oracle.send(&mut client, draft()).await, Answer::Unknown(_)));
        }
        assert_eq!(relay.page("/readyz").await.0, 200);
        // Delivery goes on, and its progress is kept.
        let arrived = || setup.sandbox.stats(Vendor::Segment).taken;
        eventually("delivery on a full disk", || arrived() >= oracle.oks()).await;

        // A start on the full disk works too.
        figures.kill(relay).await;
        let relay = figures.start(&setup).await;
        let mut client = relay.client();
        assert!(!matches!(oracle.send(&mut client, draft()).await, Answer::Unknown(_)));
        fs::remove_file(&filler).unwrap();
        let start = Instant::now();
        while !matches!(oracle.send(&mut client, draft()).await, Answer::Ok(_)) {
            assert!(start.elapsed() < Duration::from_secs(10), "it does not take events again");
            sleep(Duration::from_millis(2)).await;
        }
        took.push(start.elapsed());

        // Full once more: room that the log gives back itself is used as well.
        fill(&filler);
        while matches!(oracle.send(&mut client, draft()).await, Answer::Ok(_)) {}
        all(&setup, None);
        let start = Instant::now();
        while !matches!(oracle.send(&mut client, draft()).await, Answer::Ok(_)) {
            assert!(start.elapsed() < Duration::from_secs(20), "it does not use the room of what it removed");
            sleep(Duration::from_millis(10)).await;
        }
        figures.kill(relay).await;
        settle(&setup, &oracle, &mut figures).await;
        oks += oracle.oks();
        refused += oracle.refused();
    }
    took.sort();
    println!(
        "full disk: {rounds} runs, {oks} OK, {refused} refused, 0 lost; taken again after p50 {:?}, max {:?}\n{}",
        took[took.len() / 2],
        took[took.len() - 1],
        figures.text()
    );
}

/// The store's disk is another one than the log's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_of_the_store_is_nobody_elses_trouble_and_heals() {
    if !is_apart("disk_full::a_full_disk_of_the_store_is_nobody_elses_trouble_and_heals") {
        return;
    }
    let mut setup = durable("written").await;
    let dir = setup.data.path().join("disk");
    fs::create_dir(&dir).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=4M,mode=700", "tmpfs"]).arg(&dir);
    let Some(_mounted) = Mount::with(mount, &dir) else {
        return not_run("a file system in memory: the right to mount one");
    };
    let (file, filler) = (dir.join("store.db"), dir.join("filler"));
    setup.set("STORE_URL", &format!("sqlite:{}", file.display())).set("ANALYTICS_PROVIDER", "segment");
    setup.set("STORE_FLUSH_INTERVAL_SECONDS", "0.02");
    let (mut observer, mut figures) = (Observer::default(), Figures::default());
    let relay = figures.start(&setup).await;
    observer.tracks(&mut relay.client(), 50).await;
    relay.metric_is("relay_spool_backlog_events", &["\"store\""], 0.0).await;

    // In the middle of a run: nobody is refused, and the vendor gets everything.
    fill(&filler);
    observer.tracks(&mut relay.client(), 300).await;
    taken(&setup, Vendor::Segment, 350).await;
    relay.metric_is("relay_provider_state", &["\"store\"", "\"failing\""], 1.0).await;
    let health = relay.page("/healthz").await.1;
    assert!(health.contains("store does not take events: the store is not available"), "{health}");
    assert_eq!(relay.page("/readyz").await.0, 200);
    fs::remove_file(&filler).unwrap();
    relay.metric_is("relay_spool_backlog_events", &["\"store\""], 0.0).await;
    relay.metric_is("relay_provider_state", &["\"store\"", "\"sending\""], 1.0).await;

    // And at a start, after a kill in the middle of it.
    fill(&filler);
    observer.tracks(&mut relay.client(), 50).await;
    figures.kill(relay).await;
    let relay = figures.start(&setup).await;
    observer.tracks(&mut relay.client(), 50).await;
    taken(&setup, Vendor::Segment, 450).await;
    fs::remove_file(&filler).unwrap();
    relay.metric_is("relay_spool_backlog_events", &["\"store\""], 0.0).await;
    let ended = figures.terminate(relay).await;
    assert_eq!(ended.code, 0, "{:#?}", ended.logs);

    let mut out = Vec::new();
    let sqlite::ExportReport { events, damaged, .. } =
        sqlite::export(&file, &sqlite::Wanted::default(), &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    let id = |line: &str| {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        event["id"].as_str().unwrap().to_owned()
    };
    // Behind the events stands what is known about who is who.
    let ids: HashSet<String> = text.lines().take(450).map(id).collect();
    assert_eq!((events, damaged), (450, 0));
    assert_eq!(ids, observer.accepted, "each once");
}
