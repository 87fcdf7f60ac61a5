//! The power fails: what the kernel had in memory only is gone.
//!
//! The log is on a file system in an image file. Only what was synced gets into
//! the image: the kernel writes by itself what is half a minute old, and a turn ends
//! before that. The relay is stopped between two calls, the image is copied, and the
//! next relay starts on the copy, whose journal is replayed at the mount: all that
//! stood in memory is missing there.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use analytics_relay::{proto::v1::Durability, providers::sandbox::Vendor};
use fastrand::Rng;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    harness::{Relay, Setup, not_run},
    oracle::{Answer, Draft, Oracle},
    relays::{Figures, Mount, all, drained, durable, fault, is_apart, number},
};

const TEST: &str = "power_cut::nothing_that_was_synced_is_lost_when_the_power_fails";
const IMAGE_BYTES: u64 = 24 << 20;
/// Cuts of one file system, each on the copy of the last.
const CHAIN: u64 = 10;
/// Cuts beyond those that were asked for, until an event was lost that was only written.
const MORE_CUTS: u64 = 40;
/// And as many who are content with written.
const SYNCED_CALLERS: u64 = 4;
const FAULTS: [Option<&str>; 4] = [None, Some("503"), Some("40%503"), Some("30%reset-after")];

pub(crate) fn mounted(image: &Path, dir: &Path) -> Option<Mount> {
    fs::create_dir_all(dir).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-o", "loop,commit=300"]).arg(image).arg(dir);
    Mount::with(mount, dir)
}

pub(crate) fn make_image(path: &Path, bytes: u64) -> bool {
    fs::File::create(path).unwrap().set_len(bytes).unwrap();
    let paths = format!("{}:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default());
    let mut make = Command::new("mkfs.ext4");
    make.args(["-q", "-F"]).arg(path).env("PATH", paths);
    make.output().is_ok_and(|output| output.status.success())
}

/// Takes what stands in an image now, as a machine that has lost its power would find it.
pub(crate) fn copy_image(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("--sparse=always").args([from, to]).status();
    assert!(copied.unwrap().success());
}

#[derive(Default)]
struct Tally {
    cuts: u64,
    cuts_that_lost: u64,
    synced: u64,
    written: u64,
    /// By provider: one event can be lost at each.
    written_lost: u64,
    duplicates: u64,
    figures: Figures,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a loop device of the machine's: make test-power-cut"]
async fn nothing_that_was_synced_is_lost_when_the_power_fails() {
    if !is_apart(TEST) {
        return;
    }
    let (seed, cuts) = (number("RELAY_SEED", 0x5eed), number("RELAY_POWER_CUTS", 10));
    println!("RELAY_SEED={seed} RELAY_POWER_CUTS={cuts}; events are counted once for each provider");
    let (mut random, mut tally, start) = (Rng::with_seed(seed), Tally::default(), Instant::now());
    while tally.cuts < cuts || tally.written_lost == 0 && tally.cuts < cuts + MORE_CUTS {
        let left = cuts.checked_sub(tally.cuts).filter(|left| *left > 0);
        if !chain(&mut random, &mut tally, left.map_or(CHAIN, |left| left.min(CHAIN))).await {
            return not_run("mkfs.ext4, and the right to mount a loop device");
        }
        println!("{} cuts in {:.0} s, 0 synced events lost", tally.cuts, start.elapsed().as_secs_f64());
    }
    println!(
        "{} power cuts, {} of them lost what was in memory: {} SYNCED, 0 lost; {} WRITTEN, {} lost; {} duplicates\n{}",
        tally.cuts,
        tally.cuts_that_lost,
        tally.synced,
        tally.written,
        tally.written_lost,
        tally.duplicates,
        tally.figures.text()
    );
    assert!(tally.synced > 0 && tally.written_lost > 0, "no cut lost an event: nothing was tried");
}

/// Several cuts, then all is delivered and compared. False if this machine
/// cannot do it.
async fn chain(random: &mut Rng, tally: &mut Tally, turns: u64) -> bool {
    let mut setup = durable("synced").await;
    let images: Vec<PathBuf> =
        (0..=turns).map(|turn| setup.data.path().join(format!("image-{turn}"))).collect();
    if !make_image(&images[0], IMAGE_BYTES) {
        return false;
    }
    let mut oracle = Oracle::default();
    let mut mounts = Vec::new();
    for turn in 0..=turns {
        let image = &images[turn as usize];
        let dir = setup.data.path().join(format!("disk-{turn}"));
        let Some(mount) = mounted(image, &dir) else { return false };
        setup.set("DATA_DIR", dir.join("data").to_str().unwrap());
        mounts.clear();
        mounts.push(mount);
        if turn == turns {
            break;
        }
        // At every other cut there are events that nobody has and nothing has synced.
        let unsynced = turn % 2 == 0;
        for vendor in Vendor::ALL {
            let text = if unsynced { Some("503") } else { FAULTS[random.usize(..FAULTS.len())] };
            setup.sandbox.always(vendor, text.and_then(fault));
        }
        let relay = tally.figures.start(&setup).await;
        let oks = Arc::new(Oks::default());
        let synced = random.u64(1..=100);
        let callers = callers(&relay, random, &oks, if unsynced { synced } else { u64::MAX });
        oks.reached(&oks.synced, synced).await;
        if unsynced {
            oks.reached(&oks.synced_callers_ended, SYNCED_CALLERS).await;
            let written = oks.written.load(Ordering::SeqCst);
            oks.reached(&oks.written, written + random.u64(4..=40)).await;
        }
        stop(&relay).await;
        let next = &images[turn as usize + 1];
        copy_image(image, next);
        let lost = differs(&setup, next);
        tally.cuts += 1;
        tally.cuts_that_lost += u64::from(lost);
        tally.figures.kill(relay).await;
        oracle.add(join(callers).await);
    }
    all(&setup, None);
    let relay = tally.figures.start(&setup).await;
    drained(&relay).await;
    let ended = tally.figures.terminate(relay).await;
    assert_eq!(ended.code, 0, "{:#?}", ended.logs);
    for vendor in Vendor::ALL {
        let (found, balance) = (oracle.compare(&setup, vendor), ended.balance(vendor));
        assert!(balance.is_exact() && balance.dropped == 0, "{vendor:?} {balance:?}");
        tally.written_lost += found.written_lost;
        tally.duplicates += found.duplicates;
    }
    tally.synced += oracle.oks_of(Durability::Synced);
    tally.written += oracle.oks_of(Durability::Written);
    true
}

/// Stops the relay; returns when none of its threads is in a call.
pub(crate) async fn stop(relay: &Relay) {
    relay.signal("STOP");
    let start = Instant::now();
    let stopped = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
    };
    while !fs::read_dir(format!("/proc/{}/task", relay.pid())).unwrap().all(|task| stopped(task.unwrap())) {
        assert!(start.elapsed() < Duration::from_secs(10), "the relay does not stop");
        sleep(Duration::from_millis(1)).await;
    }
}

/// True if the segments of the copy are not what the relay had written.
fn differs(setup: &Setup, copy: &Path) -> bool {
    let read = |root: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let entries = fs::read_dir(root.join("spool/segments")).into_iter().flatten();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.iter().map(|path| (path.file_name().unwrap().into(), fs::read(path).unwrap())).collect()
    };
    is_otherwise(setup, copy, read)
}

/// True if something reads otherwise in the copy of an image than as the relay has it.
pub(crate) fn is_otherwise<T: PartialEq>(setup: &Setup, copy: &Path, read: impl Fn(&Path) -> T) -> bool {
    let looked_at = setup.data.path().join("looked-at");
    let again = setup.data.path().join("looked-at-image");
    copy_image(copy, &again);
    let _mount = mounted(&again, &looked_at).unwrap();
    read(setup.data_dir()) != read(&looked_at.join("data"))
}

/// What was answered so far.
#[derive(Default)]
struct Oks {
    synced: AtomicU64,
    written: AtomicU64,
    synced_callers_ended: AtomicU64,
}

impl Oks {
    /// Waits until one of the counts is so high.
    async fn reached(&self, count: &AtomicU64, wanted: u64) {
        let start = Instant::now();
        while count.load(Ordering::SeqCst) < wanted {
            assert!(start.elapsed() < Duration::from_secs(30), "{wanted} events are not answered");
            sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Callers of both levels until the relay is gone; those who want their events
/// synced stop after so many, so that nothing syncs the last of the others.
fn callers(relay: &Relay, random: &mut Rng, oks: &Arc<Oks>, synced_max: u64) -> JoinSet<Oracle> {
    let mut callers = JoinSet::new();
    for caller in 0..2 * SYNCED_CALLERS {
        let (mut client, mut random, oks) = (relay.client(), random.fork(), oks.clone());
        let wants_sync = caller % 2 == 0;
        let level = if wants_sync { Durability::Synced } else { Durability::Written };
        callers.spawn(async move {
            let mut oracle = Oracle::default();
            while !wants_sync || oks.synced.load(Ordering::SeqCst) < synced_max {
                let draft = Draft {
                    identify: random.u8(..6) == 0,
                    filler: random.usize(..300),
                    ..Draft::track(level)
                };
                let answer = timeout(Duration::from_secs(30), oracle.send(&mut client, draft)).await.unwrap();
                if !matches!(answer, Answer::Ok(_)) {
                    break;
                }
                (if wants_sync { &oks.synced } else { &oks.written }).fetch_add(1, Ordering::SeqCst);
            }
            if wants_sync {
                oks.synced_callers_ended.fetch_add(1, Ordering::SeqCst);
            }
            oracle
        });
    }
    callers
}

async fn join(mut callers: JoinSet<Oracle>) -> Oracle {
    let mut all = Oracle::default();
    while let Some(oracle) = callers.join_next().await {
        all.add(oracle.unwrap());
    }
    all
}
