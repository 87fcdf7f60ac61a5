//! The thread itself, on a disk in memory whose segments fail and whose cursors'
//! syncs take as long as a test wants.

use std::{
    path::Path,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64},
        mpsc::{self, Sender},
    },
    thread::JoinHandle,
};

use futures_util::future::join_all;
use prometheus_client::metrics::counter::Counter;
use tokio::time::{sleep, timeout};

use super::{
    super::{
        entrance::Spool,
        fs::{SpoolFile, SpoolFs},
        index::Index,
        layout::LogDirs,
        log::{LogKeys, LogLimits},
        reports::LaneReports,
        sim::SimFs,
    },
    *,
};
use crate::{
    delivery::test_support::track,
    queue::{
        QueueLimits, Row, Taken,
        memory::{self, QueueReceiver},
    },
};

const SEGMENT_BYTES: u64 = 4096;
/// Nothing here takes that long.
const BOUND: Duration = Duration::from_secs(20);

/// What a test does to the disk.
#[derive(Debug, Default)]
struct Switches {
    segments_fail: AtomicBool,
    /// While it is set no sync of a cursor ends.
    cursors_hang: Mutex<bool>,
    /// While it is set no write to a segment ends.
    segments_hang: Mutex<bool>,
    changed: Condvar,
    /// Syncs of cursors that were begun.
    cursor_syncs: AtomicU64,
}

impl Switches {
    fn hang_segments(&self, hang: bool) {
        *self.segments_hang.lock().unwrap() = hang;
        self.changed.notify_all();
    }

    fn wait_for_segments(&self) {
        let hang = self.segments_hang.lock().unwrap();
        drop(self.changed.wait_while(hang, |hang| *hang).unwrap());
    }

    fn hang_cursors(&self, hang: bool) {
        *self.cursors_hang.lock().unwrap() = hang;
        self.changed.notify_all();
    }

    fn wait_for_cursors(&self) {
        self.cursor_syncs.fetch_add(1, Ordering::SeqCst);
        let hang = self.cursors_hang.lock().unwrap();
        drop(self.changed.wait_while(hang, |hang| *hang).unwrap());
    }

    fn fails(&self, is_segment: bool) -> io::Result<()> {
        let fails = is_segment && self.segments_fail.load(Ordering::SeqCst);
        if fails { Err(io::Error::other("the test's")) } else { Ok(()) }
    }
}

#[derive(Debug, Clone)]
struct TestFs(SimFs, Arc<Switches>);

#[derive(Debug)]
struct TestFile {
    file: Box<dyn SpoolFile>,
    switches: Arc<Switches>,
    is_segment: bool,
    is_cursor: bool,
}

fn is_in(path: &Path, dir: &str) -> bool {
    path.parent().is_some_and(|parent| parent.ends_with(dir))
}

impl TestFs {
    fn file(&self, path: &Path, file: io::Result<Box<dyn SpoolFile>>) -> io::Result<Box<dyn SpoolFile>> {
        let (is_segment, is_cursor) = (is_in(path, "segments"), is_in(path, "cursors"));
        Ok(Box::new(TestFile { file: file?, switches: self.1.clone(), is_segment, is_cursor }))
    }
}

impl SpoolFs for TestFs {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.0.create_dir(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.0.list(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>> {
        self.1.fails(is_in(path, "segments"))?;
        self.file(path, self.0.create(path))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>> {
        self.file(path, self.0.open(path))
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Box<dyn SpoolFile>> {
        self.0.open_to_read(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.sync_dir(dir)
    }
}

impl SpoolFile for TestFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.switches.fails(self.is_segment)?;
        if self.is_segment {
            self.switches.wait_for_segments();
        }
        self.file.write_at(bytes, offset)
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        self.file.allocate(length)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.is_cursor {
            self.switches.wait_for_cursors();
        }
        self.file.sync_data()
    }
}

/// A log of two named providers, `a` and `b`, and its thread.
struct Running {
    fs: SimFs,
    switches: Arc<Switches>,
    spool: Spool,
    commands: Sender<Command>,
    thread: JoinHandle<()>,
    queue: QueueReceiver,
    queue_in: QueueSender,
    ledgers: Vec<Ledger>,
    index: Arc<Index>,
}

fn dirs() -> LogDirs {
    LogDirs::new(Path::new("/spool"))
}

impl Running {
    fn start(segments: u64, when_full: WhenFull) -> Self {
        Self::start_on(&SimFs::new(0), segments, when_full, &["a", "b"])
    }

    fn start_on(disk: &SimFs, segments: u64, when_full: WhenFull, providers: &[&'static str]) -> Self {
        let switches = Arc::new(Switches::default());
        let fs = TestFs(disk.clone(), switches.clone());
        let limits = LogLimits { segment_bytes: SEGMENT_BYTES, bytes_max: segments * SEGMENT_BYTES };
        fs.create_dir(&dirs().root).unwrap();
        let (log, _) = Log::open(Arc::new(fs), &dirs(), limits, &LogKeys::default(), providers, 1).unwrap();
        let settings = SpoolSettings {
            dir: dirs().root,
            default_level: Durability::Synced,
            keys: LogKeys::default(),
            limits,
            provider_bytes_max: vec![u64::MAX; providers.len()],
            when_full,
            retention: Duration::from_secs(3600),
            group_window: Duration::ZERO,
            group_bytes: 1 << 20,
            intake: QueueLimits { events_max: 1000, bytes_max: 1 << 20 },
        };
        let status = Arc::new(SharedStatus::new(&log, &settings));
        let (commands, received) = mpsc::channel();
        let spool = Spool::new(commands.clone(), &settings, status.clone());
        let (queue_in, queue) = memory::bounded(QueueLimits { events_max: 1, bytes_max: 1 << 20 });
        let ledger = |name: &&'static str| {
            Ledger::new(name, Counter::default(), Counter::default(), |_| Counter::default())
        };
        let ledgers: Vec<Ledger> = providers.iter().map(ledger).collect();
        let (metrics, clock) = (SpoolMetrics::default(), Clock::system());
        let index = log.index().clone();
        let writer = Writer::new(log, settings, queue_in.clone(), ledgers.clone(), status, metrics, clock);
        let thread = thread::spawn(move || writer.run(&received));
        Self { fs: disk.clone(), switches, spool, commands, thread, queue, queue_in, ledgers, index }
    }

    async fn append(&self, wanted: Durability) -> Result<Durability, Refused> {
        self.spool.append(track("x"), wanted, None)?.durable().await
    }

    /// Ends every event so far at a provider.
    fn end_all(&self, place: usize) {
        let reports = LaneReports::new("unused".to_owned(), place, self.commands.clone());
        let all = 1..self.index.next_seq();
        reports.ended_ranges(Outcome::Delivered, Vec::from([all]));
    }

    async fn close(self) -> Vec<u64> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command::Close(answer)).unwrap();
        let left = answered.await.unwrap();
        self.thread.join().unwrap();
        left
    }
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let waits = async {
        while !is_so() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(BOUND, waits).await.unwrap_or_else(|_| panic!("in vain: {what}"));
}

#[tokio::test]
async fn a_full_log_refuses_every_level_and_takes_events_again_when_old_ones_have_ended() {
    let running = Running::start(3, WhenFull::Reject);
    let mut taken = 0;
    let refused = loop {
        match running.append(Durability::Written).await {
            Ok(level) => assert_eq!(level, Durability::Written),
            Err(refused) => break refused,
        }
        taken += 1;
        assert!(taken < 1000, "it is never full");
    };
    assert_eq!(refused, Refused::SpoolFull);
    until("it says so", || running.spool.status().state() == "full").await;
    for wanted in [Durability::Queued, Durability::Written, Durability::Synced] {
        assert_eq!(running.append(wanted).await, Err(Refused::SpoolFull), "{wanted}");
    }
    assert_eq!(running.spool.intake_events(), 0, "what is refused is not held");
    running.end_all(0);
    running.end_all(1);
    let waits = async { while running.append(Durability::Synced).await.is_err() {} };
    timeout(BOUND, waits).await.expect("it takes events again");
    until("it says so", || running.spool.status().state() == "writing").await;
    running.close().await;
}

#[tokio::test]
async fn a_disk_that_fails_refuses_a_row_from_the_first_on_and_the_relay_is_told() {
    let running = Running::start(100, WhenFull::Reject);
    running.append(Durability::Synced).await.unwrap();
    running.switches.segments_fail.store(true, Ordering::SeqCst);
    let mut row = Row::default();
    let put = |row: &mut Row, wanted| running.spool.append(track("x"), wanted, Some(row)).unwrap();
    let row: Vec<Taken> = [Durability::Written, Durability::Synced, Durability::Queued]
        .map(|wanted| put(&mut row, wanted))
        .into();
    let answers = join_all(row.into_iter().map(Taken::durable)).await;
    assert_eq!(answers, [Err(Refused::SpoolFailed); 3]);
    // A first failure may be one file's; a second one is the disk's.
    assert_eq!(running.append(Durability::Synced).await, Err(Refused::SpoolFailed));
    until("it is broken", || *running.spool.status().broken.borrow()).await;
    assert_eq!(running.append(Durability::Queued).await, Err(Refused::SpoolFull), "answered at once");
    running.switches.segments_fail.store(false, Ordering::SeqCst);
    until("it has mended itself, though nobody asks", || !*running.spool.status().broken.borrow()).await;
    running.append(Durability::Synced).await.unwrap();
    assert_eq!(running.close().await, [2, 2]);
}

#[tokio::test]
async fn what_was_answered_queued_stays_in_memory_when_the_disk_fails_and_is_counted_if_it_cannot() {
    let mut running = Running::start(100, WhenFull::Reject);
    running.switches.segments_fail.store(true, Ordering::SeqCst);
    assert_eq!(running.append(Durability::Queued).await, Ok(Durability::Queued));
    let mut queued = Vec::new();
    timeout(BOUND, running.queue.recv_many(&mut queued, 10)).await.unwrap();
    assert_eq!(queued[0].place, Place::MEMORY);
    assert!(running.ledgers.iter().all(|ledger| ledger.balance().dropped == 0));

    // Now there is no room in memory either.
    running.queue_in.offer(Queued { event: track("first"), place: Place::MEMORY }).unwrap();
    // The state is told a moment later.
    let waits = async { while running.append(Durability::Queued).await.is_err() {} };
    timeout(BOUND, waits).await.expect("it is answered before the writer sees it");
    until("the loss is counted", || running.ledgers.iter().all(|ledger| ledger.balance().dropped == 1)).await;
    assert_eq!(running.spool.intake_events(), 0);
    running.close().await;
}

#[tokio::test]
async fn once_the_intake_is_closed_callers_are_refused_and_what_was_answered_is_taken() {
    let running = Running::start(100, WhenFull::Reject);
    let (answer, answered) = oneshot::channel();
    running.commands.send(Command::CloseIntake(answer)).unwrap();
    answered.await.unwrap();
    assert_eq!(running.append(Durability::Synced).await, Err(Refused::Closed));
    assert_eq!(running.append(Durability::Queued).await, Ok(Durability::Queued));
    assert_eq!(running.close().await, [1, 1]);
}

#[tokio::test]
async fn a_provider_that_is_not_named_never_makes_the_relay_refuse_an_event() {
    for when_full in [WhenFull::Reject, WhenFull::DeadLetterOldest] {
        let disk = SimFs::new(0);
        let running = Running::start_on(&disk, 4, when_full, &["a", "gone"]);
        let first = 10;
        for _ in 0..first {
            running.append(Durability::Synced).await.unwrap();
        }
        running.end_all(0);
        assert_eq!(running.close().await, [0, first]);

        let running = Running::start_on(&disk, 4, when_full, &["a"]);
        let status = running.spool.status().clone();
        assert_eq!(status.unnamed()[0].provider, "gone");
        let mut more = 0;
        let append = async |more: &mut u64| {
            let taken = running.append(Durability::Written).await;
            taken.unwrap_or_else(|refused| panic!("{refused:?} after {more}"));
            *more += 1;
            running.end_all(0);
        };
        while running.index.size().1 < 3 {
            append(&mut more).await;
        }
        let surplus = status.unnamed()[0].surplus();
        until("it is asked to let go while there is room", || *surplus.borrow() > 0).await;
        // Some ten times what the log holds. Nobody looks after the one that is gone.
        while more < 400 {
            append(&mut more).await;
        }
        let left = running.close().await;
        assert!(left[1] > 0 && left[1] < 100, "{left:?}");
        let (log, _) =
            Log::open(Arc::new(disk.clone()), &dirs(), LIMITS_ANY, &LogKeys::default(), &["a"], 1).unwrap();
        let totals = log.cursors()[1].cursor.totals();
        assert_eq!(totals.get("dropped/spool_full"), Some(&(first + more - left[1])), "{totals:?}");
    }
}

const LIMITS_ANY: LogLimits = LogLimits { segment_bytes: SEGMENT_BYTES, bytes_max: 1 << 20 };

#[tokio::test]
async fn a_named_provider_that_holds_the_oldest_events_is_never_let_go_of() {
    let disk = SimFs::new(0);
    let running = Running::start_on(&disk, 3, WhenFull::Reject, &["a", "gone"]);
    running.append(Durability::Synced).await.unwrap();
    running.close().await;
    let running = Running::start_on(&disk, 3, WhenFull::Reject, &["a"]);
    let mut taken = 1;
    while running.append(Durability::Written).await.is_ok() {
        taken += 1;
        assert!(taken < 1000, "it is never full");
    }
    assert_eq!(running.close().await, [taken, taken], "both have all of it");
}

#[tokio::test]
async fn a_running_relay_forgets_a_provider_that_is_not_named_and_no_other() {
    let disk = SimFs::new(0);
    Running::start_on(&disk, 100, WhenFull::Reject, &["a", "gone"]).close().await;
    let running = Running::start_on(&disk, 100, WhenFull::Reject, &["a"]);
    for _ in 0..5 {
        running.append(Durability::Synced).await.unwrap();
    }
    let ask = |provider: &str| dirs().cursors.join(format!("{provider}.forget"));
    let names = |disk: &SimFs| disk.list(&dirs().cursors).unwrap();
    for provider in ["a", "gone"] {
        disk.set_bytes(&ask(provider), b"");
    }
    until("both are answered", || names(&disk) == ["a.cursor"]).await;
    let status = running.spool.status().clone();
    until("it shows", || status.unnamed()[0].is_forgotten()).await;
    running.append(Durability::Synced).await.unwrap();
    running.end_all(0);
    assert_eq!(running.close().await[0], 0);
    assert_eq!(names(&disk), ["a.cursor"], "nothing brings it back");
    let segments = disk.list(&dirs().segments).unwrap();
    assert_eq!(segments.len(), 1, "it holds nothing back: {segments:?}");
}

#[tokio::test]
async fn callers_do_not_wait_for_the_syncs_of_cursors() {
    let running = Running::start(100, WhenFull::Reject);
    running.append(Durability::Synced).await.unwrap();
    running.switches.hang_cursors(true);
    let begun = running.switches.cursor_syncs.load(Ordering::SeqCst);
    running.end_all(0);
    until("a cursor is being synced", || running.switches.cursor_syncs.load(Ordering::SeqCst) > begun).await;
    for _ in 0..20 {
        let answered = timeout(BOUND, running.append(Durability::Synced)).await;
        assert_eq!(answered.expect("it does not wait"), Ok(Durability::Synced));
    }
    running.switches.hang_cursors(false);
    running.end_all(0);
    assert_eq!(running.close().await, [0, 21]);
}

/// Nor does who asks for a provider to be forgotten hold them up.
#[tokio::test]
async fn callers_do_not_wait_for_a_cursor_that_is_to_be_forgotten() {
    let disk = SimFs::new(0);
    let running = Running::start_on(&disk, 100, WhenFull::Reject, &["a", "gone"]);
    running.append(Durability::Synced).await.unwrap();
    running.close().await;
    let running = Running::start_on(&disk, 100, WhenFull::Reject, &["a"]);
    running.switches.hang_cursors(true);
    let begun = running.switches.cursor_syncs.load(Ordering::SeqCst);
    running.append(Durability::Synced).await.unwrap();
    running.end_all(0);
    until("a cursor is being synced", || running.switches.cursor_syncs.load(Ordering::SeqCst) > begun).await;
    disk.set_bytes(&dirs().cursors.join("gone.forget"), b"");
    sleep(2 * SYNC_INTERVAL).await;
    let answered = timeout(BOUND, running.append(Durability::Synced)).await;
    assert_eq!(answered.expect("it does not wait"), Ok(Durability::Synced));
    let status = running.spool.status().clone();
    assert!(!status.unnamed()[0].is_forgotten());
    running.switches.hang_cursors(false);
    until("it is forgotten", || status.unnamed()[0].is_forgotten()).await;
    running.close().await;
}

/// A log that is full, whose cursors' disk hangs: room may be there in time, but callers
/// do not wait for it without a bound.
#[tokio::test]
async fn callers_of_a_full_log_wait_for_a_cursor_for_a_moment_only() {
    let running = Running::start(3, WhenFull::Reject);
    running.switches.hang_cursors(true);
    let begun = running.switches.cursor_syncs.load(Ordering::SeqCst);
    running.append(Durability::Synced).await.unwrap();
    running.end_all(0);
    until("a cursor is being synced", || running.switches.cursor_syncs.load(Ordering::SeqCst) > begun).await;
    let filled = async { while running.append(Durability::Written).await.is_ok() {} };
    timeout(BOUND, filled).await.expect("it does not wait");
    running.switches.hang_cursors(false);
    running.end_all(0);
    running.end_all(1);
    running.close().await;
}

/// What was answered, and stands before a disk that hangs, is known of.
#[tokio::test]
async fn what_was_answered_before_it_was_written_is_counted_until_it_is() {
    let running = Running::start(100, WhenFull::Reject);
    running.append(Durability::Synced).await.unwrap();
    running.switches.hang_segments(true);
    for _ in 0..3 {
        assert_eq!(running.append(Durability::Queued).await, Ok(Durability::Queued));
    }
    let status = running.spool.status().clone();
    assert_eq!(status.answered(), 3);
    let waits = running.append(Durability::Synced);
    assert!(timeout(Duration::from_millis(100), waits).await.is_err(), "it does hang");
    assert_eq!(status.answered(), 3, "that one was promised nothing");
    running.switches.hang_segments(false);
    until("they are taken", || status.answered() == 0 && running.index.next_seq() >= 5).await;
    running.close().await;
}

#[tokio::test]
async fn a_provider_that_has_used_up_half_of_its_share_is_told_and_untold() {
    let running = Running::start(8, WhenFull::DeadLetterOldest);
    let status = running.spool.status().clone();
    let is_filling = |place: usize| status.cursors[place].is_filling.load(Ordering::Relaxed);
    let mut taken = 0;
    while status.cursors[0].share() < 0.45 {
        running.append(Durability::Synced).await.unwrap();
        taken += 1;
        running.end_all(1);
        until("it is published", || status.cursors[0].pending.load(Ordering::Relaxed) == taken).await;
    }
    assert!(!is_filling(0) && taken > 10, "{taken}");
    while status.cursors[0].share() < 0.55 {
        running.append(Durability::Synced).await.unwrap();
        taken += 1;
        running.end_all(1);
        until("it is published", || status.cursors[0].pending.load(Ordering::Relaxed) == taken).await;
    }
    assert!(is_filling(0) && !is_filling(1));
    running.end_all(0);
    until("it has caught up", || !is_filling(0)).await;
    assert!(running.fs.calls() > 0);
    running.close().await;
}
