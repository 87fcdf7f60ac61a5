//! Dead letters and a disk that is slow, hangs, fails or is full: every event ends
//! once, and what is counted is what happened.

use std::{sync::mpsc, thread};

use prometheus_client::metrics::counter::Counter;

use super::*;
use crate::{
    delivery::{
        dead_letter::DeadLetterDir,
        lane::letters::{Dead, Unwritten},
        recorder::RelayRecorder,
        spill::SpillDir,
    },
    ledger::Ledger,
    letter_files::LetterWriter,
    queue::Place,
};

/// Longer than a lane that ends waits for its disk.
const TOO_LONG: Duration = Duration::from_secs(2);

/// A lane whose events become dead letters at once, five of them, and a disk that
/// takes its time for these. It is forced to stop meanwhile.
async fn forced_to_stop_in_a_write(disk: Disk) -> (Arc<Kept>, usize) {
    let lane = Running::start(vec![answer(no_quota)]);
    *lane.kept.disk.lock().unwrap() = disk;
    lane.send(&tracks(5)).await;
    sleep(Duration::from_millis(100)).await;
    lane.force().await
}

fn no_quota(batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
    let verdict = Verdict::Rejected { reason: Rejection::QuotaExceeded, detail: "429".into() };
    Ok(vec![verdict; batch.len()])
}

impl Running {
    /// Forces the lane to stop; returns how many events it has left.
    async fn force(self) -> (Arc<Kept>, usize) {
        self.stop.drain();
        self.stop.force();
        drop(self.inbox);
        (self.kept, self.lane.await.unwrap().events.len())
    }
}

impl Kept {
    /// Events that are delivered, counted as dead letters, on disk as such, and lost.
    fn ends(&self) -> [usize; 4] {
        let (delivered, on_disk) = self.counts();
        let lost = self.dropped.lock().unwrap().iter().map(|(_, events)| events).sum();
        [delivered, self.dead_lettered.load(Ordering::SeqCst), on_disk, lost]
    }
}

#[tokio::test(start_paused = true)]
async fn forced_to_stop_a_lane_waits_for_a_slow_write_of_letters() {
    for disk in [Disk::Slow(Duration::from_millis(500)), Disk::Late(Duration::from_millis(500))] {
        let (kept, left) = forced_to_stop_in_a_write(disk).await;
        assert_eq!((kept.ends(), left), ([0, 5, 5, 0], 0), "{disk:?}");
    }
}

/// The disk takes them in the end: they are kept for the next start, and that is what
/// is counted.
#[tokio::test(start_paused = true)]
async fn a_write_that_ends_after_the_lane_has_given_it_up_counts_for_nothing() {
    let start = Instant::now();
    let (kept, left) = forced_to_stop_in_a_write(Disk::Slow(TOO_LONG)).await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    sleep(2 * TOO_LONG).await;
    assert_eq!((kept.ends(), left), ([0, 0, 5, 0], 5));
}

#[tokio::test(start_paused = true)]
async fn a_write_that_has_not_begun_when_it_is_given_up_never_does() {
    let (kept, left) = forced_to_stop_in_a_write(Disk::Late(TOO_LONG)).await;
    sleep(2 * TOO_LONG).await;
    assert_eq!((kept.ends(), left), ([0, 0, 0, 0], 5));
}

/// The same with files, the relay's own recorder and its balance, in real time: each
/// event is spilled, counted as that, and is in no file of letters.
#[tokio::test]
async fn events_of_a_write_that_is_given_up_stand_in_the_spill_file_alone() {
    let data = tempfile::tempdir().unwrap();
    let letters = DeadLetterDir::new(data.path(), "scripted");
    let spill = SpillDir::open(data.path(), "scripted").unwrap();
    let accepted = Counter::default();
    let ledger = Ledger::new("scripted", accepted.clone(), Counter::default(), |_| Counter::default());
    let writer = LetterWriter::open(&letters, 1 << 20).unwrap();
    let recorder = Arc::new(RelayRecorder::new(ledger.clone(), writer, Clock::system()));
    let provider = Arc::new(Scripted {
        answers: Mutex::default(),
        rule: Box::new(no_quota),
        two_endpoints: false,
        takes: Duration::ZERO,
        requests: Mutex::default(),
    });
    let suspended = watch::Sender::new(false).subscribe();
    let lane = Running::start_recorded(provider, recorder.clone(), Arc::default(), suspended);

    let (held, (release, released)) = (recorder.dead_letters(), mpsc::channel::<()>());
    let (tell, is_held) = mpsc::channel();
    let disk = thread::spawn(move || {
        let _held = held.lock().unwrap();
        tell.send(()).unwrap();
        let _ = released.recv();
    });
    is_held.recv().unwrap();
    accepted.inc_by(5);
    lane.send(&tracks(5)).await;
    // We have it, the lane has it twice, and so has its write.
    while Arc::strong_count(&recorder) < 4 {
        sleep(Duration::from_millis(1)).await;
    }
    lane.stop.force();
    drop(lane.inbox);
    lane.lane.await.unwrap().spill(&spill, &ledger, 1);
    // The disk works again, and what waited for it goes on.
    drop(release);
    disk.join().unwrap();
    while Arc::strong_count(&recorder) > 1 {
        sleep(Duration::from_millis(1)).await;
    }
    let balance = ledger.balance();
    assert_eq!((balance.spilled, balance.dead_lettered, balance.lost()), (5, 0, 0), "{balance}");
    assert_eq!(spill.load(false).unwrap().events.len(), 5);
    assert!(letters.files().unwrap().is_empty());
}

/// What the disk takes before the time is over is written, also what came while it was
/// busy.
#[tokio::test(start_paused = true)]
async fn what_waits_for_the_disk_at_the_end_is_written_yet() {
    let lane = Running::start(vec![answer(no_quota), answer(no_quota)]);
    *lane.kept.disk.lock().unwrap() = Disk::Slow(Duration::from_millis(200));
    lane.send(&tracks(5)).await;
    sleep(Duration::from_millis(100)).await;
    lane.send(&tracks(3)).await;
    sleep(Duration::from_millis(10)).await;
    let (kept, left) = lane.force().await;
    assert_eq!((kept.ends(), left), ([0, 8, 8, 0], 0));
}

/// An identify that a newer one has overtaken must not be sent at the next start,
/// after that.
#[tokio::test(start_paused = true)]
async fn an_identify_that_is_superseded_is_never_left_for_the_next_start() {
    let failed = Disk::Fails(DropReason::DeadLetterFailed);
    let disks = [failed, Disk::Fits(0), Disk::Hangs, Disk::Late(TOO_LONG), Disk::Writes];
    for disk in disks {
        for seconds in [0, 1] {
            let events = [identify("ann"), identify("ann")];
            let hold = Verdict::Hold { after: Duration::from_secs(1), detail: String::new() };
            let verdicts = vec![hold, Verdict::Delivered];
            let lane = Running::start(vec![answer(move |_| Ok(verdicts))]);
            *lane.kept.disk.lock().unwrap() = disk;
            lane.send(&events).await;
            // At once, or when the disk has failed already.
            while lane.kept.counts().0 < 1 {
                sleep(Duration::from_millis(1)).await;
            }
            sleep(Duration::from_secs(seconds)).await;
            let (kept, left) = lane.force().await;
            let [delivered, dead, _, lost] = kept.ends();
            assert_eq!((delivered, dead + lost, left), (1, 1, 0), "{disk:?} {seconds}");
            assert_eq!(dead, usize::from(disk == Disk::Writes));
        }
    }
}

#[test]
fn what_becomes_of_an_event_whose_letter_is_not_written() {
    use DeadLetterReason as Reason;
    let mut backlog = Backlog::new(BatchLimits { events_max: 1, body_bytes_max: 1, requests_max: 1 });
    let (full, failed) = (DropReason::DeadLettersFull, DropReason::DeadLetterFailed);
    for reason in DeadLetterReason::ALL {
        for (place, is_logged) in [(Place::MEMORY, false), (Place::SPILL_FILE, false), (Place::log(7), true)]
        {
            let waiting = backlog.push_out(track("x"), Flow::of(&track("x"), Endpoint::DEFAULT), place);
            let dead = Dead { waiting, reason, detail: String::new() };
            for why in [full, failed] {
                let at_end = if reason == Reason::Superseded { Unwritten::Lost } else { Unwritten::NextRun };
                assert_eq!(dead.unwritten(why, true), at_end, "{dead:?} {why:?}");
                let meanwhile = match reason {
                    Reason::LaneFull => Unwritten::Lost,
                    _ if why == full && !is_logged => Unwritten::Lost,
                    Reason::RetriesExhausted => Unwritten::Waits,
                    Reason::Expired | Reason::SpoolFull => Unwritten::GoesBack,
                    _ => Unwritten::TriedAgain,
                };
                assert_eq!(dead.unwritten(why, false), meanwhile, "{dead:?} {why:?}");
            }
        }
    }
}

/// As many as there is room for are written, and those that are lost make nobody wait.
#[tokio::test(start_paused = true)]
async fn letters_are_written_as_far_as_there_is_room() {
    let lane = Running::start_by(Vec::new(), Box::new(no_quota), true);
    *lane.kept.disk.lock().unwrap() = Disk::Fits(3);
    lane.send(&tracks(10)).await;
    sleep(Duration::from_millis(1)).await;
    assert_eq!(lane.kept.ends(), [0, 3, 3, 7]);
    assert_eq!(*lane.kept.dropped.lock().unwrap(), [(DropReason::DeadLettersFull, 7)]);
    assert!(lane.status.dead_letters_fail());
    *lane.kept.disk.lock().unwrap() = Disk::Writes;
    lane.send(&tracks(2)).await;
    sleep(Duration::from_millis(1)).await;
    assert_eq!(lane.kept.ends(), [0, 5, 5, 7]);
    assert!(!lane.status.dead_letters_fail(), "and it is told that it works again");
    lane.finish().await;
}

/// What could not be written and is lost: the failure is to be seen for a while.
#[tokio::test(start_paused = true)]
async fn a_disk_that_has_failed_is_told_of_until_nothing_needs_it() {
    let lane = Running::start_by(Vec::new(), Box::new(no_quota), true);
    *lane.kept.disk.lock().unwrap() = Disk::Fits(0);
    lane.send(&tracks(1)).await;
    sleep(Duration::from_secs(50)).await;
    assert_eq!(lane.kept.ends(), [0, 0, 0, 1]);
    assert!(lane.status.dead_letters_fail());
    sleep(Duration::from_secs(11)).await;
    assert!(!lane.status.dead_letters_fail());
    // What waits for the disk, in the lane or under way to the provider, needs it.
    *lane.kept.disk.lock().unwrap() = Disk::Fails(DropReason::DeadLetterFailed);
    lane.send(&tracks(1)).await;
    for _ in 0..300 {
        sleep(Duration::from_secs(1)).await;
        assert!(lane.status.dead_letters_fail());
    }
    *lane.kept.disk.lock().unwrap() = Disk::Writes;
    sleep(Duration::from_secs(6)).await;
    assert_eq!(lane.kept.ends(), [0, 1, 1, 1]);
    assert!(!lane.status.dead_letters_fail());
    lane.finish().await;
}

/// An event that goes back to the others because its letter could not be written needs
/// the disk also while it is under way, and no more when the provider has taken it.
#[tokio::test(start_paused = true)]
async fn an_event_that_waits_for_the_disk_elsewhere_needs_it_until_it_has_ended() {
    let up = Arc::new(Mutex::new(false));
    let is_up = up.clone();
    let rule = move |batch: &[Event]| match *is_up.lock().unwrap() {
        true => deliver(batch),
        false => Err(SendError::Unavailable { retry_after: None, detail: "503".into() }),
    };
    let slow = Duration::from_secs(100);
    let lane = Running::start_slow(Box::new(rule), slow);
    *lane.kept.disk.lock().unwrap() = Disk::Fails(DropReason::DeadLetterFailed);
    lane.send(&tracks(1)).await;
    while !lane.status.dead_letters_fail() {
        sleep(Duration::from_millis(100)).await;
    }
    let requests = lane.provider.requests.lock().unwrap().len();
    assert_eq!(requests, 5);
    for _ in 0..300 {
        sleep(Duration::from_secs(1)).await;
        assert!(lane.status.dead_letters_fail());
    }
    assert!(lane.provider.requests.lock().unwrap().len() > requests, "it is under way now and then");
    *up.lock().unwrap() = true;
    while lane.kept.counts().0 == 0 {
        sleep(Duration::from_millis(100)).await;
    }
    sleep(Duration::from_secs(60)).await;
    assert!(!lane.status.dead_letters_fail());
    lane.finish().await;
}
