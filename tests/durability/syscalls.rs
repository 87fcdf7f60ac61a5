//! The file system's calls, one by one: killed before each of them, failing at
//! each of them, and in the right order. `strace` counts the calls of the one
//! thread that owns the log's files.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use analytics_relay::{proto::v1::Durability, providers::sandbox::Vendor};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    harness::{Client, Relay, Setup, not_run},
    oracle::{Answer, Draft, Oracle},
    relays::{Figures, all, copy_dir, drained, durable, fault, is_long, segments, settle},
};

/// Calls that change what is on disk, or make it last. The names of some differ
/// between machines.
const CALLS: [&str; 7] = ["pwrite64", "fdatasync", "fsync", "ftruncate", "fallocate", "/^rename", "/^unlink"];
/// They take eight to a segment: two are filled, and the first is removed.
const EVENTS: usize = 20;
const FILLER_BYTES: usize = 7000;
/// Relays that are tried at the same time.
const AT_ONCE: usize = 5;
/// How often a point is tried that was not come to.
const TRIES: usize = 4;

/// None also where it may not trace.
pub(crate) fn strace() -> Option<PathBuf> {
    let dirs = env::var_os("PATH")?;
    let path = env::split_paths(&dirs).map(|dir| dir.join("strace")).find(|path| path.is_file())?;
    let tried = std::process::Command::new(&path).args(["-o", "/dev/null", "true"]).output();
    tried.is_ok_and(|tried| tried.status.success()).then_some(path)
}

/// `strace` on the thread that owns the log's files.
struct Tracer(Child);

impl Tracer {
    async fn attach(relay: &Relay, args: &[&str]) -> Self {
        let thread = spool_thread(relay).await;
        let mut command = Command::new(strace().unwrap());
        command.args(["-p", &thread]).args(args).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let attached = timeout(Duration::from_secs(10), lines.next_line()).await.unwrap().unwrap();
        assert!(attached.as_ref().is_some_and(|line| line.contains("attached")), "{attached:?}");
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self(child)
    }

    /// Lets the thread go on by itself.
    async fn detach(mut self) {
        let pid = self.0.id().unwrap().to_string();
        assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        timeout(Duration::from_secs(10), self.0.wait()).await.unwrap().unwrap();
    }
}

/// The id of the thread that owns the log's files.
async fn spool_thread(relay: &Relay) -> String {
    let is_it =
        |task: &PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "spool");
    let start = Instant::now();
    loop {
        let tasks = fs::read_dir(format!("/proc/{}/task", relay.pid())).unwrap();
        if let Some(task) = tasks.map(|task| task.unwrap().path()).find(is_it) {
            return task.file_name().unwrap().to_str().unwrap().to_owned();
        }
        // It takes its name when it first runs.
        assert!(start.elapsed() < Duration::from_secs(10), "no thread of this name: {:#?}", relay.raw_logs());
        sleep(Duration::from_millis(5)).await;
    }
}

/// Events one after another, until one is not answered; two segments fill, the
/// first is removed, and the relay drains. False if it was killed.
async fn work(relay: Relay, oracle: &mut Oracle, figures: &mut Figures) -> bool {
    let mut client = relay.client();
    for turn in 0..EVENTS {
        let mut draft = Draft::track(Durability::Synced);
        (draft.filler, draft.identify) = (FILLER_BYTES, turn % 5 == 4);
        if !matches!(oracle.send(&mut client, draft).await, Answer::Ok(_)) {
            break;
        }
    }
    let removed = "segment removed: every provider has passed it";
    if relay.log_or_end(removed, |_| true).await.is_none() {
        let ended = relay.ended(Instant::now()).await;
        assert_eq!(ended.code, -1, "killed: {:#?}", ended.logs);
        return false;
    }
    let ended = figures.terminate(relay).await;
    assert!([0, -1].contains(&ended.code), "{:#?}", ended.logs);
    ended.code == 0
}

/// How often each call is made, by the thread that makes most of them.
fn counts(trace: &str) -> BTreeMap<String, usize> {
    let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
    for line in trace.lines().filter(|line| !line.contains("resumed>")) {
        let (thread, call) = line.split_once(' ').filter(|(pid, _)| is_number(pid)).unwrap_or(("", line));
        let Some((call, _)) = call.trim_start().split_once('(') else { continue };
        *counts.entry((call.to_owned(), thread.to_owned())).or_default() += 1;
    }
    let mut most = BTreeMap::new();
    for ((call, _), count) in counts {
        let known: &mut usize = most.entry(call).or_default();
        *known = count.max(*known);
    }
    most
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn count_of(counts: &BTreeMap<String, usize>, call: &str) -> usize {
    let matches = |name: &str| call.strip_prefix("/^").map_or(name == call, |start| name.starts_with(start));
    counts.iter().filter(|(name, _)| matches(name)).map(|(_, count)| count).sum()
}

/// All of them, or a few that are spread out.
fn points(count: usize) -> Vec<usize> {
    if is_long() {
        return (1..=count).collect();
    }
    let mut few = vec![1.min(count), count / 3];
    few.retain(|point| *point > 0);
    few.dedup();
    few
}

/// Tries every point, several at once. Returns what they return.
async fn each<P, T, F>(points: Vec<P>, attempt: impl Fn(P) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let (mut running, mut results) = (JoinSet::new(), Vec::new());
    for point in points {
        if running.len() == AT_ONCE {
            results.push(running.join_next().await.unwrap().unwrap());
        }
        running.spawn(attempt(point));
    }
    while let Some(result) = running.join_next().await {
        results.push(result.unwrap());
    }
    results
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_the_relay_is_killed_before_any_of_its_storage_calls() {
    if strace().is_none() {
        return not_run("strace");
    }
    let setup = durable("synced").await;
    let relay = setup.start().await;
    let trace = setup.data.path().join("trace");
    let calls = format!("trace={}", CALLS.join(","));
    let tracer = Tracer::attach(&relay, &["-o", trace.to_str().unwrap(), "-e", &calls]).await;
    let mut oracle = Oracle::default();
    assert!(work(relay, &mut oracle, &mut Figures::default()).await);
    drop(tracer);
    assert_eq!(oracle.oks(), EVENTS as u64);
    let counts = counts(&fs::read_to_string(&trace).unwrap());
    println!("storage calls of {EVENTS} events: {counts:?}");
    assert!(counts["fallocate"] >= 2 && count_of(&counts, "/^unlink") >= 1, "{counts:?}");

    let all_points: Vec<_> = CALLS
        .into_iter()
        .flat_map(|call| points(count_of(&counts, call)).into_iter().map(move |at| (call, at)))
        .collect();
    let tried = all_points.len();
    let results = each(all_points, |(call, at)| async move {
        // A run may make fewer of these calls than the one that was counted.
        for _ in 1..TRIES {
            let point = killed_before(call, at).await;
            if point.killed {
                return point;
            }
        }
        killed_before(call, at).await
    })
    .await;
    report("killed before a storage call", tried, results);
}

/// What came of one point at which the relay is killed.
struct Point {
    call: &'static str,
    /// False if the run made fewer of these calls.
    killed: bool,
    oks: u64,
    duplicates: u64,
    figures: Figures,
}

async fn killed_before(call: &'static str, at: usize) -> Point {
    let (setup, mut oracle, mut figures) = (durable("synced").await, Oracle::default(), Figures::default());
    let relay = figures.start(&setup).await;
    let (trace, kill) = (format!("trace={call}"), format!("inject={call}:signal=SIGKILL:when={at}"));
    let _tracer = Tracer::attach(&relay, &["-o", "/dev/null", "-e", &trace, "-e", &kill]).await;
    let killed = !work(relay, &mut oracle, &mut figures).await;
    let found = settle(&setup, &oracle, &mut figures).await;
    let duplicates = found.iter().map(|found| found.duplicates).sum();
    Point { call, killed, oks: oracle.oks(), duplicates, figures }
}

/// Prints what was covered, and fails if it was less than wanted.
fn report(what: &str, tried: usize, results: Vec<Point>) {
    let (mut covered, mut beyond, mut figures) = (BTreeMap::new(), BTreeMap::new(), Figures::default());
    let (mut oks, mut duplicates) = (0, 0);
    for point in results {
        *if point.killed { &mut covered } else { &mut beyond }.entry(point.call).or_insert(0) += 1;
        oks += point.oks;
        duplicates += point.duplicates;
        figures.add(point.figures);
    }
    let killed: i32 = covered.values().sum();
    println!(
        "{what}: {killed} of {tried} points {covered:?}, runs that made fewer calls {beyond:?}; {oks} OK, 0 lost, \
         {duplicates} duplicates\n{}",
        figures.text()
    );
    // Cursors are written less often if several reports come together: the last of
    // these calls, which only the long form tries, may never be made again.
    if is_long() {
        beyond.remove("pwrite64");
    }
    assert!(beyond.is_empty() && killed as usize * 10 >= tried * 9, "{killed} of {tried}, not {beyond:?}");
}

/// A log with all that recovery can meet: several segments, a torn end, a file
/// that was not finished, and a provider without a cursor.
async fn left_by_a_crash(oracle: &mut Oracle) -> Setup {
    let setup = durable("synced").await;
    all(&setup, fault("503").as_ref());
    let relay = setup.start().await;
    let mut client = relay.client();
    for _ in 0..EVENTS {
        let draft = Draft { filler: FILLER_BYTES, ..Draft::track(Durability::Synced) };
        assert!(matches!(oracle.send(&mut client, draft).await, Answer::Ok(_)));
    }
    Figures::default().kill(relay).await;
    assert!(crate::sigkill::tear(&setup, &mut fastrand::Rng::with_seed(7)).is_some());
    let spool = setup.data_dir().join("spool");
    fs::write(spool.join("segments/00000000000000009999.log.unfinished"), "half").unwrap();
    fs::remove_file(spool.join("cursors/segment.cursor")).unwrap();
    setup
}

/// The same state for another relay, with providers that have got nothing.
async fn copy_of(data: &Path) -> Setup {
    let setup = durable("synced").await;
    copy_dir(data, setup.data_dir());
    setup
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recovery_can_be_killed_before_any_of_its_storage_calls_too() {
    if strace().is_none() {
        return not_run("strace");
    }
    let mut oracle = Oracle::default();
    let crashed = left_by_a_crash(&mut oracle).await;
    let traced = |setup: &Setup, args: &[&str]| {
        let mut command = setup.command_of(strace().unwrap());
        // The relay stays our child. (`--seccomp-bpf` would be faster, and
        // injects at the first call only.)
        command.args(["-D", "-f", "-qq"]).args(args).arg(Setup::binary());
        command
    };
    let mut calls = CALLS.to_vec();
    calls.push("/^mkdir");
    let calls: &[&'static str] = calls.leak();
    let setup = copy_of(crashed.data_dir()).await;
    let trace = setup.data.path().join("trace");
    let filter = format!("trace={}", calls.join(","));
    all(&setup, fault("stall").as_ref());
    let relay = Relay::spawn(traced(&setup, &["-o", trace.to_str().unwrap(), "-e", &filter])).await;
    Figures::default().kill(relay).await;
    let counts = counts(&fs::read_to_string(&trace).unwrap());
    println!("storage calls of a recovery: {counts:?}");
    assert!(counts["fdatasync"] >= 3 && counts["fsync"] >= 3 && count_of(&counts, "/^unlink") >= 1);

    let all_points: Vec<_> = calls
        .iter()
        .flat_map(|call| points(count_of(&counts, call)).into_iter().map(move |at| (*call, at)))
        .collect();
    let (tried, oracle, data) =
        (all_points.len(), std::sync::Arc::new(oracle), crashed.data_dir().to_owned());
    let results = each(all_points, |(call, at)| {
        let (oracle, data) = (oracle.clone(), data.clone());
        let kill = format!("inject={call}:signal=SIGKILL:when={at}");
        async move {
            let (setup, mut figures) = (copy_of(&data).await, Figures::default());
            // Nothing ends before the relay is killed.
            all(&setup, fault("stall").as_ref());
            let filter = format!("trace={call}");
            let relay = Relay::launch(traced(&setup, &["-o", "/dev/null", "-e", &filter, "-e", &kill]));
            let started = relay.log_or_end("relay started", |_| true).await.is_some();
            let ended = if started { figures.kill(relay).await } else { relay.ended(Instant::now()).await };
            assert_eq!(ended.code, -1, "{call} {at}: {:#?}", ended.logs);
            let found = settle(&setup, &oracle, &mut figures).await;
            let duplicates = found.iter().map(|found| found.duplicates).sum();
            Point { call, killed: !started, oks: oracle.oks(), duplicates, figures }
        }
    })
    .await;
    report("killed before a storage call of recovery", tried, results);
}

/// What an error costs.
#[derive(Debug, Default)]
struct Cost {
    refused: BTreeMap<String, u64>,
    /// From the first event that was not taken to the next that was.
    recovered: Option<Duration>,
}

async fn synced(oracle: &mut Oracle, client: &mut Client) -> bool {
    let draft = Draft { filler: FILLER_BYTES, ..Draft::track(Durability::Synced) };
    matches!(oracle.send(client, draft).await, Answer::Ok(_))
}

/// One call fails once. Every OK is true, and the relay goes on by itself.
async fn failing_once(call: &'static str, error: &'static str, at: usize) -> (Cost, Figures) {
    let (setup, mut oracle, mut figures) = (durable("synced").await, Oracle::default(), Figures::default());
    let relay = figures.start(&setup).await;
    let (trace, fail) = (format!("trace={call}"), format!("inject={call}:error={error}:when={at}"));
    let log = setup.data.path().join("trace");
    let tracer = Tracer::attach(&relay, &["-o", log.to_str().unwrap(), "-e", &trace, "-e", &fail]).await;
    let has_failed = || fs::read_to_string(&log).is_ok_and(|log| log.contains("(INJECTED)"));
    let (mut client, mut cost, mut since) = (relay.client(), Cost::default(), None);
    let mut sent = 0;
    while sent < EVENTS || since.is_some() || !has_failed() {
        sent += 1;
        assert!(sent < 2000, "{call} {error} {at}: it does not go on: {:#?}", relay.logs().last());
        if synced(&mut oracle, &mut client).await {
            cost.recovered = since.take().map(|since: Instant| since.elapsed()).or(cost.recovered);
        } else {
            since.get_or_insert_with(Instant::now);
            sleep(Duration::from_millis(10)).await;
        }
    }
    // Delivery goes on.
    let arrived = || Vendor::ALL.map(|vendor| setup.sandbox.stats(vendor).taken).into_iter().min().unwrap();
    crate::harness::eventually("delivery", || arrived() >= oracle.oks()).await;
    if matches!(call, "/^unlink" | "ftruncate") {
        relay.log("segment removed: every provider has passed it").await;
    }
    drop(tracer);
    cost.refused = oracle.codes();
    figures.kill(relay).await;
    settle(&setup, &oracle, &mut figures).await;
    (cost, figures)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_call_that_fails_makes_no_ok_false_and_the_relay_goes_on() {
    if strace().is_none() {
        return not_run("strace");
    }
    let kinds: [(&str, &str, usize); 10] = [
        ("fdatasync", "EIO", 28),
        ("fsync", "EIO", 4),
        ("pwrite64", "EIO", 60),
        ("pwrite64", "ENOSPC", 60),
        ("fallocate", "ENOSPC", 2),
        ("fallocate", "EIO", 2),
        ("ftruncate", "EIO", 2),
        ("/^rename", "EIO", 2),
        ("openat", "ENOSPC", 4),
        ("/^unlink", "EIO", 1),
    ];
    let points = kinds.into_iter().flat_map(|(call, error, most)| {
        let at = if is_long() { 1..=most } else { most.div_ceil(2)..=most.div_ceil(2) };
        at.map(move |at| (call, error, at))
    });
    let results = each(points.collect(), |(call, error, mut at)| async move {
        let mut found = failing_once(call, error, at).await;
        // Some of these calls are made for what no event waits for: then it is the next.
        let last = if is_long() { at } else { at + TRIES };
        while must_fail_events(call) && found.0.refused.is_empty() && at < last {
            at += 1;
            found = failing_once(call, error, at).await;
        }
        ((call, error), found.0, found.1)
    })
    .await;
    let mut all_figures = Figures::default();
    let mut costs: BTreeMap<(&str, &str), Vec<Cost>> = BTreeMap::new();
    for (kind, cost, figures) in results {
        costs.entry(kind).or_default().push(cost);
        all_figures.add(figures);
    }
    for ((call, error), costs) in costs {
        let hit = costs.iter().filter(|cost| !cost.refused.is_empty()).count();
        let slowest = costs.iter().filter_map(|cost| cost.recovered).max().unwrap_or_default();
        let codes: BTreeSet<&str> =
            costs.iter().flat_map(|cost| cost.refused.keys().map(|code| &**code)).collect();
        println!(
            "{call} {error}: {} points, {hit} of them failed an event: {codes:?}; 0 lost; taken again after \
             {slowest:?} at most",
            costs.len()
        );
        let wanted = if error == "ENOSPC" { "ResourceExhausted" } else { "Unavailable" };
        assert!(codes.iter().all(|code| *code == wanted), "{call} {error}: {codes:?}");
        assert!(hit > 0 || !must_fail_events(call), "{call} {error} failed no event");
    }
    println!("{}", all_figures.text());
}

/// Without these calls there is no OK.
fn must_fail_events(call: &str) -> bool {
    matches!(call, "fdatasync" | "fallocate")
}

/// A disk that fails for longer: nothing is accepted, readiness says so,
/// delivery goes on, and the relay takes events again when the disk does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_goes_on_failing_stops_acceptance_and_nothing_else() {
    if strace().is_none() {
        return not_run("strace");
    }
    for (call, error, ready) in [("fdatasync", "EIO", 503), ("fallocate", "ENOSPC", 200)] {
        let (setup, mut oracle, mut figures) =
            (durable("synced").await, Oracle::default(), Figures::default());
        all(&setup, fault("503").as_ref());
        let relay = figures.start(&setup).await;
        let mut client = relay.client();
        for _ in 0..5 {
            assert!(synced(&mut oracle, &mut client).await);
        }
        let (trace, fail) = (format!("trace={call}"), format!("inject={call}:error={error}:when=1+"));
        let tracer = Tracer::attach(&relay, &["-o", "/dev/null", "-e", &trace, "-e", &fail]).await;
        let start = Instant::now();
        let state = async || relay.page("/readyz").await.0;
        while synced(&mut oracle, &mut client).await || state().await != ready {
            assert!(start.elapsed() < Duration::from_secs(10), "{call} {error}: accepted or ready");
            sleep(Duration::from_millis(20)).await;
        }
        all(&setup, None);
        let oks = oracle.oks();
        let arrived =
            || Vendor::ALL.map(|vendor| setup.sandbox.stats(vendor).taken).into_iter().min().unwrap();
        crate::harness::eventually("delivery", || arrived() >= oks).await;
        tracer.detach().await;
        let detached = Instant::now();
        while !synced(&mut oracle, &mut client).await {
            assert!(detached.elapsed() < Duration::from_secs(10), "{call} {error}: it does not go on");
            sleep(Duration::from_millis(5)).await;
        }
        let took = detached.elapsed();
        while state().await != 200 {
            assert!(detached.elapsed() < Duration::from_secs(10), "{call} {error}: not ready again");
            sleep(Duration::from_millis(20)).await;
        }
        println!("{call} {error} until the disk works: {:?}, taken again after {took:?}", oracle.codes());
        figures.kill(relay).await;
        settle(&setup, &oracle, &mut figures).await;
    }
}

/// The kernel cuts a write short at a limit of the file's size, and fails the
/// rest of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_is_cut_short_is_taken_back() {
    let (setup, mut oracle, mut figures) = (durable("synced").await, Oracle::default(), Figures::default());
    let mut command = setup.command_of("/bin/sh");
    // At the limit a process is sent a signal, which nobody here wants.
    command.args(["-c", "trap '' XFSZ; exec \"$0\""]).arg(Setup::binary());
    let relay = Relay::spawn(command).await;
    let mut client = relay.client();
    for _ in 0..2 {
        assert!(synced(&mut oracle, &mut client).await);
    }
    let limit = |bytes: &str| {
        let args = ["--pid", &relay.pid().to_string(), &format!("--fsize={bytes}:unlimited")];
        std::process::Command::new("prlimit").args(args).status().is_ok_and(|status| status.success())
    };
    if !limit("17000") {
        return not_run("prlimit");
    }
    assert!(!synced(&mut oracle, &mut client).await, "the third event ends behind the limit");
    let segment = &segments(&setup)[0];
    assert!(fs::metadata(segment).unwrap().len() < 17_000, "what was written of it is cut off");
    assert!(!synced(&mut oracle, &mut client).await);
    assert!(limit("unlimited"));
    let start = Instant::now();
    while !synced(&mut oracle, &mut client).await {
        assert!(start.elapsed() < Duration::from_secs(10), "it does not go on");
        sleep(Duration::from_millis(5)).await;
    }
    println!("a write cut short: {:?}, taken again after {:?}", oracle.codes(), start.elapsed());
    figures.kill(relay).await;
    settle(&setup, &oracle, &mut figures).await;
}

/// Each OK leaves the process after a sync that began after its event was
/// written. (P8)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_synced_ok_is_written_to_the_caller_after_its_sync() {
    if strace().is_none() {
        return not_run("strace");
    }
    let setup = durable("synced").await;
    let trace = setup.data.path().join("trace");
    let mut command = setup.command_of(strace().unwrap());
    command.args(["-D", "-f", "-qq", "-y", "--seccomp-bpf", "-s", "1000000", "-o", trace.to_str().unwrap()]);
    command.args(["-e", "trace=pwrite64,fdatasync,write,writev,sendto,sendmsg"]).arg(Setup::binary());
    let relay = Relay::spawn(command).await;
    let mut callers = JoinSet::new();
    for _ in 0..4 {
        let mut client = relay.client();
        callers.spawn(async move {
            let mut oracle = Oracle::default();
            for _ in 0..if is_long() { 300 } else { 40 } {
                let answer = oracle.send(&mut client, Draft::track(Durability::Synced)).await;
                assert!(matches!(answer, Answer::Ok(_)));
            }
            oracle
        });
    }
    let mut oracle = Oracle::default();
    while let Some(sent) = callers.join_next().await {
        oracle.add(sent.unwrap());
    }
    drained(&relay).await;
    assert_eq!(relay.terminate().await.code, 0);
    let trace = fs::read_to_string(&trace).unwrap();
    let lines: Vec<&str> = trace.lines().collect();
    let (mut syncs, mut checked) = (0, 0);
    // Places of the events in the trace: written, and their sync begun and done.
    let mut written: Vec<(usize, &str)> = Vec::new();
    let mut done: BTreeMap<String, usize> = BTreeMap::new();
    let ids = oracle.ids();
    for (at, line) in lines.iter().enumerate() {
        if line.contains("pwrite64(") && line.contains("/segments/") {
            written.extend(ids.iter().filter(|id| line.contains(&***id)).map(|id| (at, &**id)));
        } else if line.contains("fdatasync") && line.ends_with("= 0") {
            // The only thread that syncs is the one that wrote before.
            let thread = line.split(' ').next().unwrap();
            let same = |(before, _): &(usize, &str)| lines[*before].split(' ').next() == Some(thread);
            let is_segment = line.contains("/segments/") || line.contains("resumed");
            if is_segment && !written.is_empty() && written.iter().all(same) {
                syncs += 1;
                for (_, id) in written.drain(..) {
                    done.insert(id.to_owned(), at);
                }
            }
        // Not what goes to providers, which has the properties too.
        } else if line.contains("<socket:") || line.contains("<TCP") {
            for id in ids.iter().filter(|id| line.contains(&***id) && !line.contains("filler")) {
                let synced = done.get(id);
                assert!(
                    synced.is_some_and(|synced| *synced < at),
                    "{id} was answered before its sync: {line}"
                );
                checked += 1;
            }
        }
    }
    println!("{} OK, {syncs} syncs of events, {checked} answers found in the trace, all after", ids.len());
    assert_eq!(done.len(), ids.len());
    assert_eq!(checked, ids.len());
    for vendor in Vendor::ALL {
        oracle.check(&setup, vendor);
    }
}
