//! A store that moves to another one: `store export | store import` of a relay that was built.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use crate::{Bench, open, questions, remove};

/// Moves it alone, then through a file to see what each half takes, and compares all answers.
pub(crate) async fn run(bench: &Bench) {
    let Some(relay) = std::env::var_os("RELAY_BIN").map(PathBuf::from) else {
        println!("not run: RELAY_BIN names no relay that was built");
        return;
    };
    let store = open(&bench.store());
    let events = store.stats().await.unwrap().events;
    let before = questions::ask(&store, "").await;
    store.close().await;

    let (moved, lines) = (bench.file("-moved.db"), bench.file("-moved.ndjson"));
    remove(&moved);
    let command = |at: &Path, verb: &str| command(bench, &relay, at, verb);
    let start = Instant::now();
    let mut export = command(&bench.store(), "export").stdout(Stdio::piped()).spawn().unwrap();
    let from = export.stdout.take().unwrap();
    let imported = command(&moved, "import").stdin(from).output().unwrap();
    assert!(export.wait().unwrap().success() && imported.status.success(), "{imported:?}");
    say("export | import", events, start);
    std::io::stdout().write_all(&imported.stdout).unwrap();

    let store = open(&moved);
    let stats = store.stats().await.unwrap();
    println!("{:.1} bytes an event where it came to", stats.file_bytes as f64 / stats.events as f64);
    let after = questions::ask(&store, "").await;
    store.close().await;
    assert_eq!(events, stats.events);
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.answer, after.answer, "{}", before.name);
    }
    println!("{} of {} answers are as before", after.len(), before.len());

    remove(&moved);
    let start = Instant::now();
    assert!(command(&bench.store(), "export").arg("--output").arg(&lines).status().unwrap().success());
    say("export", events, start);
    let bytes = std::fs::metadata(&lines).unwrap().len();
    println!("{bytes} bytes, {:.1} an event", bytes as f64 / events as f64);
    let start = Instant::now();
    assert!(command(&moved, "import").arg(&lines).status().unwrap().success());
    say("import", events, start);
    std::fs::remove_file(&lines).unwrap();
    remove(&moved);
    // The folder of what an export did not write is not there.
    let _ = ["-export", "-import"].map(|data| std::fs::remove_dir_all(bench.file(data)));
}

/// A command of the relay on one store, with nothing of what else it may keep.
fn command(bench: &Bench, relay: &Path, at: &Path, verb: &str) -> Command {
    let mut command = Command::new(relay);
    command.env_clear().env("STORE_URL", format!("sqlite:{}", at.display()));
    command.env("DATA_DIR", bench.file(&format!("-{verb}"))).args(["store", verb]);
    command
}

fn say(what: &str, events: u64, start: Instant) {
    let took = start.elapsed();
    println!("{what:16} {events} events in {took:.1?}: {:.0}/s", events as f64 / took.as_secs_f64());
}
