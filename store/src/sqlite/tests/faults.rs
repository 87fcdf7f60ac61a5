//! Every call that touches the disk fails once: what was acknowledged is there, once, what
//! was asked for again is done, and the file is whole. `strace` lets the calls of one thread
//! fail, of a process of its own.
//!
//! A few points of each call here; with `RELAY_LONG` all of them.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, Stdio},
    time::Instant,
};

use super::*;

/// Where the child finds its store.
const DIR: &str = "STORE_FAULT_DIR";
/// So long a child may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is done to a store, in this order, each until it is done.
#[derive(Debug, Clone)]
enum Task {
    Append(Vec<Event>),
    Seal,
    Tidy,
    Erase(Subject),
    PutApart(&'static str, &'static str),
    Retain(i64),
}

fn script() -> Vec<Task> {
    let mut random = fastrand::Rng::with_seed(6);
    let mut event = |id: usize| {
        let spec = Spec {
            minute: random.i16(0..900),
            when: 0,
            kind: random.u8(..),
            user: random.u8(..),
            device: random.u8(..),
            session: random.u8(..),
            source: random.u8(..2),
            tenant: 0,
            page: random.u8(..),
            property: random.u8(..),
            enriched: random.u8(..),
        };
        spec.event(id)
    };
    let mut batch = |from: usize| Task::Append((from..from + 8).map(&mut event).collect());
    vec![
        batch(0),
        batch(8),
        Task::Seal,
        batch(16),
        Task::PutApart("d1", "u1"),
        batch(24),
        Task::Erase(Subject::User("u2".into())),
        batch(32),
        Task::Tidy,
        Task::Retain(BASE_MS + 30 * MINUTE_MS),
        batch(40),
        Task::Erase(Subject::Anonymous("d2".into())),
    ]
}

async fn does(store: &dyn Store, sqlite: Option<&SqliteStore>, task: &Task) -> Result<(), StoreError> {
    let of = TenantScope::tenant("");
    match task {
        Task::Append(batch) => drop(store.append(batch).await?),
        Task::Erase(who) => drop(store.erase(&of, who).await?),
        Task::PutApart(from, user) => {
            store.link(&of, from, user, false, &Operator::default()).await?;
        }
        Task::Retain(from_ms) => drop(store.retain(&of, *from_ms).await?),
        Task::Seal | Task::Tidy => {
            let Some(sqlite) = sqlite else { return Ok(()) };
            match task {
                Task::Seal => sqlite.seal().await?,
                _ => drop(sqlite.tidy(i64::MAX).await?),
            }
        }
    }
    Ok(())
}

/// What the process does whose calls fail: it opens the store on a thread by that name, and
/// waits for a line before it does and before it goes on.
#[test]
#[ignore = "is run by another test, whose calls fail"]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let wait = || {
        println!("\nwaits");
        std::io::stdout().flush().unwrap();
        std::io::stdin().read_line(&mut String::new()).unwrap();
    };
    let open = move || {
        wait();
        let open = || SqliteStore::open(settings(Path::new(&dir)));
        (0..).find_map(|attempt| match open() {
            Ok(store) => Some(store),
            Err(StoreError::Unavailable(_)) if attempt < 9 => None,
            Err(error) => panic!("{error}"),
        })
    };
    let store = std::thread::Builder::new().name("store-opener".into()).spawn(open).unwrap();
    let store = store.join().unwrap().unwrap();
    assert_eq!(store.set_aside(), None);
    wait();
    runtime().block_on(async {
        for task in script() {
            let mut refused = 0;
            while let Err(error) = does(&store, Some(&store), &task).await {
                assert!(matches!(error, StoreError::Unavailable(_)), "{error} at {task:?}");
                refused += 1;
                assert!(refused < 500, "{error}: it does not go on");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            println!("\ndone {refused}");
        }
        store.close().await;
    });
}

/// A child that waits.
struct Running {
    what: String,
    child: Child,
    input: ChildStdin,
    lines: std::sync::mpsc::Receiver<String>,
    since: Instant,
    errors: PathBuf,
}

impl Running {
    fn start(dir: &Path, what: String) -> Self {
        let errors = dir.join("errors");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sqlite::tests::faults::child", "--ignored", "--nocapture", "--test-threads=1"])
            .env(DIR, dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&errors).unwrap())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.map(|line| sender.send(line)).all(|sent| sent.is_ok())
        });
        let running = Self { what, child, input, lines, since: Instant::now(), errors };
        running.until("waits");
        running
    }

    /// Returns the lines before one.
    fn until(&self, wanted: &str) -> Vec<String> {
        let mut before = Vec::new();
        loop {
            let left = PATIENCE.saturating_sub(self.since.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(line) if line == wanted => return before,
                Ok(line) => before.push(line),
                Err(error) => panic!("{error} before {wanted}: {}", self.errors()),
            }
        }
    }

    fn errors(&self) -> String {
        format!("{}: {}", self.what, fs::read_to_string(&self.errors).unwrap_or_default())
    }

    fn go_on(&mut self) {
        self.input.write_all(b"\n").unwrap();
    }

    fn thread(&self, name: &str) -> Option<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let is_it = |task: &PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|it| it.trim() == name);
        let task = tasks.map(|task| task.unwrap().path()).find(is_it)?;
        Some(task.file_name()?.to_str()?.to_owned())
    }

    /// `strace` on a thread, which is there or comes.
    fn trace(&self, thread: &str, args: &[&str]) -> Child {
        let thread = loop {
            match self.thread(thread) {
                Some(thread) => break thread,
                None => assert!(self.since.elapsed() < PATIENCE, "no thread {thread}"),
            }
        };
        let mut strace = Command::new("strace");
        let mut strace = strace.args(["-p", &thread]).args(args).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut errors = BufReader::new(strace.stderr.take().unwrap());
        errors.read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "{line}");
        std::thread::spawn(move || errors.lines().map_while(Result::ok).for_each(drop));
        strace
    }

    /// How often something was refused, once all is done.
    fn ended(mut self) -> u64 {
        let (mut refused, mut done) = (0, 0);
        while let Ok(line) = self.lines.recv_timeout(PATIENCE.saturating_sub(self.since.elapsed())) {
            if let Some(times) = line.strip_prefix("done ") {
                (refused, done) = (refused + times.parse::<u64>().unwrap(), done + 1);
            }
        }
        let is_in_time = self.since.elapsed() < PATIENCE;
        if !is_in_time {
            self.child.kill().unwrap();
        }
        let status = self.child.wait().unwrap();
        assert!(is_in_time && status.success() && done == script().len(), "{status}: {}", self.errors());
        refused
    }
}

/// A phase of the child's, by the thread that does it.
const OPENING: &str = "store-opener";
const WRITING: &str = "store-writer";

/// Runs a child whose calls are traced while it opens or writes. Returns how often something
/// was refused.
fn run_traced(dir: &Path, phase: &str, args: &[&str]) -> u64 {
    let mut running = Running::start(dir, format!("{phase} {args:?}"));
    let mut tracer = (phase == OPENING).then(|| running.trace(phase, args));
    running.go_on();
    running.until("waits");
    if phase == WRITING {
        tracer = Some(running.trace(phase, args));
    }
    running.go_on();
    let refused = running.ended();
    // It ends with the thread.
    tracer.unwrap().wait().unwrap();
    refused
}

/// The calls of a phase, and how often each is made.
fn calls(phase: &str) -> BTreeMap<String, usize> {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let filter = "trace=pwrite64,fsync,fdatasync,ftruncate,openat,pread64";
    assert_eq!(run_traced(dir.path(), phase, &["-o", trace.to_str().unwrap(), "-e", filter]), 0);
    let mut counts = BTreeMap::new();
    for line in fs::read_to_string(&trace).unwrap().lines() {
        if let Some((call, _)) = line.split_once('(') {
            *counts.entry(call.trim().to_owned()).or_default() += 1;
        }
    }
    counts
}

/// Fails one call, and looks at what became of it all. True if the call was made.
fn fails_once(phase: &str, call: &str, error: &str, at: usize) -> (bool, u64) {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let (filter, fail) = (format!("trace={call}"), format!("inject={call}:error={error}:when={at}"));
    let refused = run_traced(dir.path(), phase, &["-o", trace.to_str().unwrap(), "-e", &filter, "-e", &fail]);
    let was_hit = fs::read_to_string(&trace).unwrap().contains("(INJECTED)");
    runtime().block_on(async {
        let store = SqliteStore::open(settings(dir.path())).unwrap();
        assert_eq!(store.set_aside(), None, "{call} {error} {at}");
        let oracle = Oracle::with_keys(store.shared.keys);
        for task in script() {
            does(&oracle, None, &task).await.unwrap();
        }
        compare(&store, &oracle, &scopes(0, 600)[0]).await;
        assert_eq!(store.stats().await.unwrap().damaged_batches, 0);
        store.close().await;
        let report = check(&dir.path().join("store.db"), |_| {}).unwrap();
        assert!(report.is_whole(), "{call} {error} {at}: {report:?}");
    });
    (was_hit, refused)
}

/// All of them, or a few that are spread out.
fn points(count: usize) -> Vec<usize> {
    if std::env::var_os("RELAY_LONG").is_some() {
        return (1..=count).collect();
    }
    let mut few = vec![1, 2, count.div_ceil(2), count];
    few.sort_unstable();
    few.dedup();
    few.retain(|at| *at <= count);
    few
}

/// False also where it may not trace.
fn has_strace() -> bool {
    let tried = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    tried.is_ok_and(|tried| tried.status.success())
}

/// As the relay's tests say it.
fn not_run(what: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("not run: {what} ({test})\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    if let Some(list) = std::env::var_os("RELAY_NOT_RUN_LIST") {
        let mut list = OpenOptions::new().create(true).append(true).open(list).unwrap();
        list.write_all(line.as_bytes()).unwrap();
    }
    assert!(!std::env::var("RELAY_REQUIRE").is_ok_and(|required| required == "all"), "{line}");
}

#[test]
fn a_call_to_the_disk_that_fails_loses_nothing_and_the_store_goes_on() {
    if !has_strace() {
        return not_run("strace");
    }
    let (mut tried, mut hit, mut refused) = (0, 0, 0);
    for phase in [OPENING, WRITING] {
        let counts = calls(phase);
        println!("{phase}: {counts:?}");
        // Which of the two it is depends on how SQLite was built.
        let syncs: usize = ["fsync", "fdatasync"].iter().filter_map(|call| counts.get(*call)).sum();
        assert!(counts["pwrite64"] > 5 && syncs > 2, "{counts:?}");
        for (call, count) in counts {
            let errors: &[&str] = match &*call {
                "pread64" => &["EIO"],
                "openat" => &["EMFILE"],
                _ => &["EIO", "ENOSPC"],
            };
            for (error, at) in
                errors.iter().flat_map(|error| points(count).into_iter().map(move |at| (error, at)))
            {
                let (was_hit, times) = fails_once(phase, &call, error, at);
                (tried, hit, refused) = (tried + 1, hit + usize::from(was_hit), refused + times);
            }
        }
    }
    println!("{hit} of {tried} calls failed, {refused} times something was refused: 0 lost, 0 twice");
    // A run may make fewer of these calls than the one that was counted.
    assert!(hit * 10 >= tried * 8 && refused > 3, "{hit} of {tried}, {refused}");
}
