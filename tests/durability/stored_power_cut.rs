//! The power fails while the store gets batches, makes blocks and merges them. The store is
//! on a file system in an image, as the log is (see `power_cut`): what neither had synced is
//! gone, and both open by themselves on what is left.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use analytics_relay::proto::v1::Durability;
use fastrand::Rng;
use tokio::time::sleep;

use crate::{
    harness::not_run,
    moments::{Left, Moments},
    power_cut::{copy_image, is_otherwise, make_image, mounted, stop},
    relays::{Figures, is_apart, number},
    stored::{Callers, check_file, file},
    stored_load::{Keeper, compare, join, load, threads, with_store},
    stored_sigkill::settle,
};

const TEST: &str = "stored_power_cut::what_was_answered_ok_is_in_the_store_once_when_the_power_fails";
const IMAGE_BYTES: u64 = 256 << 20;
/// Cuts of one file system, each on the copy of the last.
const CHAIN: u64 = 10;
/// What callers ask for at a cut.
const LEVELS: [&[Durability]; 3] =
    [&[Durability::Written], &[Durability::Synced], &[Durability::Written, Durability::Synced]];
/// Cuts beyond those that were asked for, until everything has happened once.
const MORE_CUTS: u64 = 60;
/// From so many on each kind of moment must have been met, also the rare ones.
const MANY_CUTS: u64 = 50;

#[derive(Default)]
struct Tally {
    cuts: u64,
    /// The store's file or its log were not as they had been written.
    cuts_that_lost: u64,
    oks: u64,
    oks_again: u64,
    written_lost: u64,
    unknown: u64,
    events: u64,
    moments: Moments,
    figures: Figures,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a loop device of the machine's: make test-power-cut"]
async fn what_was_answered_ok_is_in_the_store_once_when_the_power_fails() {
    if !is_apart(TEST) {
        return;
    }
    let (seed, cuts) = (number("RELAY_SEED", 0x5eed), number("RELAY_STORE_POWER_CUTS", 10));
    println!("RELAY_SEED={seed} RELAY_STORE_POWER_CUTS={cuts}");
    let (mut random, mut tally, start) = (Rng::with_seed(seed), Tally::default(), Instant::now());
    while tally.cuts < cuts || !tally.has_all(cuts) && tally.cuts < cuts + MORE_CUTS {
        let left = cuts.checked_sub(tally.cuts).filter(|left| *left > 0);
        if !chain(&mut random, &mut tally, left.map_or(CHAIN, |left| left.min(CHAIN))).await {
            return not_run("mkfs.ext4, and the right to mount a loop device");
        }
        println!("{} cuts in {:.0} s: {}", tally.cuts, start.elapsed().as_secs_f64(), tally.text());
    }
    println!("{}", tally.figures.text());
    assert!(tally.has_all(cuts), "something did not happen");
}

/// Several cuts, after each of which the store opens and is compared. False if this machine
/// cannot do it.
async fn chain(random: &mut Rng, tally: &mut Tally, turns: u64) -> bool {
    let mut setup = with_store(random, "synced").await;
    let images: Vec<PathBuf> =
        (0..=turns).map(|turn| setup.data.path().join(format!("image-{turn}"))).collect();
    if !make_image(&images[0], IMAGE_BYTES) {
        return false;
    }
    let (mut callers, mut mounts) = (Callers::default(), Vec::new());
    for (turn, image) in images.iter().enumerate() {
        let dir = setup.data.path().join(format!("disk-{turn}"));
        let Some(mount) = mounted(image, &dir) else { return false };
        setup.set("DATA_DIR", dir.join("data").to_str().unwrap());
        mounts.clear();
        mounts.push(mount);
        let relay = tally.figures.start(&setup).await;
        tally.written_lost += compare(&setup, &relay, &mut callers, true).await;
        let Some(next) = images.get(turn + 1) else {
            tally.figures.terminate(relay).await;
            break;
        };
        let threads = threads(&relay).await;
        tally.moments.cannot_look |= threads.is_none();
        // Where nobody wants it synced the log may lose what the store has.
        let levels = LEVELS[random.usize(..LEVELS.len())];
        let keeper = random.bool().then(|| Keeper::start(&setup, random));
        let by_few = keeper.is_some() && random.bool();
        let sending = load(&relay, random, &callers, levels, by_few);
        sleep(Duration::from_millis(random.u64(5..1_000))).await;
        if let Some(keeper) = &keeper {
            keeper.has_done(random.u64(..4)).await;
            sleep(Duration::from_millis(random.u64(..100))).await;
        }
        stop(&relay).await;
        tally.moments.look(threads.as_ref());
        tally.moments.left(Left::at(setup.data_dir()));
        copy_image(image, next);
        tally.cuts += 1;
        tally.cuts_that_lost += u64::from(is_otherwise(&setup, next, store_of));
        tally.figures.kill(relay).await;
        join(sending, &mut callers).await;
        if let Some(keeper) = keeper {
            tally.moments.kept(keeper.ended().await);
        }
    }
    settle(&setup, &mut callers, &mut tally.figures).await;
    tally.events += check_file(&file(&setup)).0;
    tally.oks += callers.oks();
    tally.oks_again += callers.oks_again;
    tally.unknown += callers.unknown();
    true
}

fn store_of(data_dir: &Path) -> [Option<Vec<u8>>; 2] {
    ["store.db", "store.db-wal"].map(|name| fs::read(data_dir.join(name)).ok())
}

impl Tally {
    /// Whether each kind of moment was met that so many cuts must meet.
    fn has_all(&self, cuts: u64) -> bool {
        let others = [self.written_lost, self.oks_again];
        let are_all = self.cuts_that_lost > 0 && self.moments.has_all();
        others.iter().all(|count| *count > 0) && (cuts < MANY_CUTS || are_all)
    }

    fn text(&self) -> String {
        format!(
            "{} OK that stand, 0 lost, 0 twice, {} OK again, {} only WRITTEN and lost, {} unknown, {} in the store; \
             {} cuts lost what the store had in memory, {}",
            self.oks,
            self.oks_again,
            self.written_lost,
            self.unknown,
            self.events,
            self.cuts_that_lost,
            self.moments.text()
        )
    }
}
