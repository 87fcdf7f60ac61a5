//! Starting, killing and draining relays that have a log, and the figures.

use std::{
    env, fs,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use analytics_relay::providers::sandbox::{Fault, Vendor};
use serde_json::Value;
use tokio::time::sleep;

use crate::{
    harness::{Ended, Relay, Setup, not_run},
    oracle::{Found, Oracle},
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Set in a process that [`is_apart`] has started.
const APART: &str = "RELAY_TEST_APART";

/// True in `make test-durability`.
pub(crate) fn is_long() -> bool {
    env::var_os("RELAY_LONG").is_some()
}

/// A number from the environment.
pub(crate) fn number(name: &str, otherwise: u64) -> u64 {
    env::var(name).map_or(otherwise, |number| number.parse().unwrap())
}

/// Runs a test again as the first process of namespaces of its own: what it mounts and
/// starts ends with it, however it ends. True in that process, where the test goes on.
pub(crate) fn is_apart(test: &str) -> bool {
    if env::var_os(APART).is_some() {
        thread::spawn(end_with_parent);
        return true;
    }
    let unshare = |user: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(user).args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command
    };
    let works = |user: &&[&str]| unshare(user).arg("true").output().is_ok_and(|tried| tried.status.success());
    // Somebody else than root is root in a namespace of users.
    let Some(user) = [&[][..], &["--user", "--map-root-user"]].into_iter().find(works) else {
        not_run("unshare, and the right to make namespaces");
        return false;
    };
    let mut child = unshare(user)
        .arg(env::current_exe().unwrap())
        .args([test, "--exact", "--include-ignored", "--nocapture"])
        .env(APART, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ran = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap) {
        ran |= line == "running 1 test";
        println!("{line}");
    }
    assert!(child.wait().unwrap().success() && ran, "{test} failed, or is not called so");
    false
}

/// Nobody writes to standard input; it ends with the process that holds its other end.
fn end_with_parent() {
    io::copy(&mut io::stdin(), &mut io::sink()).unwrap();
    process::exit(1);
}

pub(crate) async fn durable(level: &str) -> Setup {
    let mut setup = Setup::new().await;
    setup.set("DURABILITY", level).set("SPOOL_SEGMENT_BYTES", "65536");
    setup
}

pub(crate) fn fault(text: &str) -> Option<Fault> {
    Some(text.parse().unwrap())
}

pub(crate) fn all(setup: &Setup, fault: Option<&Fault>) {
    Vendor::ALL.into_iter().for_each(|vendor| setup.sandbox.always(vendor, fault.cloned()));
}

/// The segments, the newest last.
pub(crate) fn segments(setup: &Setup) -> Vec<PathBuf> {
    let entries = fs::read_dir(setup.data_dir().join("spool/segments"));
    let mut paths: Vec<_> = entries.into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "log"));
    paths.sort();
    paths
}

/// What a provider's cursor on disk says: events that ended, by how.
pub(crate) fn cursor_totals(setup: &Setup, vendor: Vendor) -> Vec<(String, u64)> {
    const SLOT_BYTES: usize = 262_144;
    let path = setup.data_dir().join("spool/cursors").join(format!("{}.cursor", vendor.name()));
    let Ok(bytes) = fs::read(path) else { return Vec::new() };
    let number = |slot: &[u8], at: usize, bytes: usize| {
        slot[at..at + bytes].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let slots = bytes.chunks(SLOT_BYTES).filter(|slot| slot.starts_with(b"ARCURSR"));
    let Some(slot) = slots.max_by_key(|slot| number(slot, 16, 8)) else { return Vec::new() };
    let payload = &slot[32..][..usize::try_from(number(slot, 24, 4)).unwrap()];
    let saved: Value = serde_json::from_slice(payload).unwrap();
    let totals = saved["totals"].as_object().unwrap().iter();
    totals.map(|(how, count)| (how.clone(), count.as_u64().unwrap())).collect()
}

/// Measured at every start and end.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    /// From the start of the process until it listens.
    starts: Vec<Duration>,
    peak_rss_kb: u64,
}

impl Figures {
    pub(crate) async fn start(&mut self, setup: &Setup) -> Relay {
        let started = Instant::now();
        let relay = setup.start().await;
        self.starts.push(started.elapsed());
        relay
    }

    pub(crate) async fn kill(&mut self, relay: Relay) -> Ended {
        self.note_memory(relay.pid());
        relay.signal("KILL");
        let ended = relay.ended(Instant::now()).await;
        assert_eq!(ended.code, -1, "killed by a signal: {:#?}", ended.logs);
        ended
    }

    pub(crate) async fn terminate(&mut self, relay: Relay) -> Ended {
        self.note_memory(relay.pid());
        relay.terminate().await
    }

    fn note_memory(&mut self, pid: u32) {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        self.peak_rss_kb = self.peak_rss_kb.max(peak.map_or(0, |peak| peak.trim().parse().unwrap()));
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.starts.extend(other.starts);
        self.peak_rss_kb = self.peak_rss_kb.max(other.peak_rss_kb);
    }

    pub(crate) fn text(&mut self) -> String {
        self.starts.sort();
        let at = |share: f64| self.starts[((self.starts.len() - 1) as f64 * share) as usize].as_millis();
        format!(
            "{} starts, to listening p50 {} ms, p99 {} ms, max {} ms; peak RSS {} MB",
            self.starts.len(),
            at(0.5),
            at(0.99),
            at(1.0),
            self.peak_rss_kb / 1024
        )
    }
}

/// Waits until every provider is done with all that is in the log.
pub(crate) async fn drained(relay: &Relay) {
    let start = Instant::now();
    loop {
        let backlog = relay.metric("relay_spool_backlog_events", &[]).await;
        if backlog == 0.0 {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain for the last {backlog} events");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Every provider is up again: the relay delivers what is left, ends, and says
/// the same as the oracle. Returns what was found at each provider.
pub(crate) async fn settle(setup: &Setup, oracle: &Oracle, figures: &mut Figures) -> [Found; 3] {
    all(setup, None);
    let relay = figures.start(setup).await;
    drained(&relay).await;
    let ended = figures.terminate(relay).await;
    assert_eq!(ended.code, 0, "{:#?}", ended.logs);
    let opened = ended.logs.iter().find(|line| line["message"] == "spool opened").unwrap();
    let in_log = opened["next_seq"].as_u64().unwrap() - 1;
    Vendor::ALL.map(|vendor| {
        let (found, balance) = (oracle.check(setup, vendor), ended.balance(vendor));
        assert!(balance.is_exact(), "{vendor:?} {balance:?}");
        assert_eq!((balance.accepted, balance.dropped, balance.spilled), (0, 0, 0), "{vendor:?} {balance:?}");
        // Over the whole life of the log, each event ended once.
        let totals = cursor_totals(setup, vendor);
        let ended: u64 = totals.iter().map(|(_, events)| events).sum();
        assert_eq!(ended, in_log, "{vendor:?} {totals:?}");
        assert_eq!(found.ended, in_log, "{vendor:?}: what arrived against what is in the log");
        assert!((oracle.oks()..=oracle.oks() + oracle.unknown()).contains(&in_log), "{vendor:?} {in_log}");
        found
    })
}

/// A file system of the test's own, until it is dropped.
pub(crate) struct Mount(PathBuf);

impl Mount {
    /// None if it cannot be mounted.
    pub(crate) fn with(mut command: Command, dir: &Path) -> Option<Self> {
        let mounted = command.output().is_ok_and(|output| output.status.success());
        mounted.then(|| Self(dir.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // A relay that was killed a moment ago may still be closing its files.
        for _ in 0..200 {
            if Command::new("umount").arg(&self.0).output().is_ok_and(|output| output.status.success()) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        println!("{} is still mounted", self.0.display());
    }
}

/// Copies a directory, for a second try from the same state.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
