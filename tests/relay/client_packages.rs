//! The own tests of the client packages, in their languages, against this relay:
//! `python3 -m unittest` in `examples/python`, `npm test` in `examples/node`. What they
//! leave out is not run here either, and said.

use std::{path::Path, process::Output, time::Duration};

use tokio::{process::Command, time::timeout};

use crate::{
    foreign_clients::program,
    harness::{Setup, not_run},
};

const PATIENCE: Duration = Duration::from_secs(600);
/// How a run ends that lacks what it needs.
const LACKS: i32 = 77;

#[tokio::test]
async fn the_python_package_passes_its_tests() {
    let tests = program("PYTHON", "python3", &["-m", "unittest", "discover", "-v", "-s", "tests"]);
    let Some(printed) = run("examples/python", tests).await else { return };
    let ran =
        printed.lines().find_map(|line| line.strip_prefix("Ran ")?.split(' ').next()?.parse::<u32>().ok());
    assert!(ran.is_some_and(|ran| ran > 0), "no test was run: {printed}");
    let skipped = printed
        .lines()
        .filter_map(|line| Some(line.split_once(" ... skipped ")?.1.trim_matches(['\'', '"'])));
    tell_skipped("Python", skipped);
}

#[tokio::test]
async fn the_node_package_passes_its_tests() {
    let tests = program("NODE", "node", &["tests/run.js", "--test-reporter=tap"]);
    let Some(printed) = run("examples/node", tests).await else { return };
    let ran = printed.lines().find_map(|line| line.strip_prefix("# pass ")?.parse::<u32>().ok());
    assert!(ran.is_some_and(|ran| ran > 0), "no test was run: {printed}");
    tell_skipped("Node", printed.lines().filter_map(|line| Some(line.split_once(" # SKIP")?.1.trim())));
}

fn folder(package: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(package)
}

/// Runs a package's tests; None if they lack what they need. Fails if one of them does.
async fn run(package: &str, mut command: Command) -> Option<String> {
    let folder = folder(package);
    if !folder.join("tests").is_dir() {
        not_run(&format!("{package}/tests"));
        return None;
    }
    command.current_dir(folder).env("RELAY_BIN", Setup::binary()).env("PYTHONDONTWRITEBYTECODE", "1");
    let output = timeout(PATIENCE, command.kill_on_drop(true).output()).await;
    let Ok(Output { status, stdout, stderr }) = output.expect("the tests come to an end") else {
        not_run(&format!("{:?}", command.as_std().get_program()));
        return None;
    };
    let printed = String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned();
    if status.code() == Some(LACKS) {
        let why = printed.lines().find_map(|line| line.trim_start_matches("# ").strip_prefix("not run: "));
        not_run(&format!("the tests of {package}: {}", why.unwrap_or("they do not say why")));
        return None;
    }
    assert!(status.success(), "{status}: {printed}");
    Some(printed)
}

/// Says what single tests lacked, each thing once.
fn tell_skipped<'a>(language: &str, reasons: impl Iterator<Item = &'a str>) {
    let mut reasons: Vec<_> = reasons.map(|reason| reason.trim_start_matches("not run: ")).collect();
    reasons.sort_unstable();
    reasons.dedup();
    if !reasons.is_empty() {
        not_run(&format!("some tests of the {language} package: {}", reasons.join("; ")));
    }
}
