//! SIGKILL at any moment while the store gets batches, makes blocks and merges them: what
//! was answered OK is in it once.

use std::{
    fs,
    time::{Duration, Instant},
};

use analytics_relay::proto::v1::Durability;
use fastrand::Rng;
use tokio::time::sleep;

use crate::{
    harness::{Relay, Setup, not_run},
    moments::{Left, Moments, Threads},
    power_cut::stop,
    relays::{Figures, all, drained, number},
    stored::{Callers, check_file, check_people, exported, file},
    stored_load::{Keeper, compare, join, load, threads, with_store},
};

/// Kills beyond those that were asked for, until everything has happened once.
const MORE_KILLS: u64 = 300;
/// From so many on each kind of moment must have been met, also the rare ones.
const MANY_KILLS: u64 = 100;

/// What happened in all runs; each number of kills is of those in which something was so.
#[derive(Default)]
struct Tally {
    kills: u64,
    in_recovery: u64,
    /// Events that had been answered OK were not in the store.
    under_way: u64,
    oks: u64,
    oks_again: u64,
    unknown: u64,
    events: u64,
    blocks: u64,
    moments: Moments,
    figures: Figures,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_ok_is_in_the_store_once_when_the_relay_is_killed_at_any_moment() {
    let (seed, kills) = (number("RELAY_SEED", 0x5eed), number("RELAY_KILL_RUNS", 10));
    println!("RELAY_SEED={seed} RELAY_KILL_RUNS={kills}");
    let (mut random, mut tally, start) = (Rng::with_seed(seed), Tally::default(), Instant::now());
    while tally.kills < kills || !tally.has_all(kills) && tally.kills < kills + MORE_KILLS {
        let left = kills.checked_sub(tally.kills).filter(|left| *left > 0);
        let turns = random.u64(6..=12).min(left.unwrap_or(u64::MAX));
        chain(&mut random, &mut tally, turns).await;
        println!("{} kills in {:.0} s: {}", tally.kills, start.elapsed().as_secs_f64(), tally.text());
    }
    println!("{}", tally.figures.text());
    if tally.moments.cannot_look {
        not_run("the right to see in which call a thread of another process is");
    }
    assert!(tally.has_all(kills), "something did not happen");
    assert!(kills < MANY_KILLS || tally.moments.has_vacuum(), "no kill fell on a vacuum");
}

/// Several kills of the same data directory; after each all is delivered to the store and
/// compared.
async fn chain(random: &mut Rng, tally: &mut Tally, turns: u64) {
    let (name, level) =
        if random.bool() { ("synced", Durability::Synced) } else { ("written", Durability::Written) };
    let setup = with_store(random, name).await;
    let (mut callers, mut kills) = (Callers::default(), 0);
    while kills < turns {
        if kills % 4 == 3 {
            let relay = Relay::launch(setup.command());
            sleep(Duration::from_millis(random.u64(..60))).await;
            let ended = tally.figures.kill(relay).await;
            tally.in_recovery += u64::from(ended.count("relay started") == 0);
            kills += 1;
            tally.note(&setup, &callers);
            continue;
        }
        let relay = tally.figures.start(&setup).await;
        compare(&setup, &relay, &mut callers, false).await;
        let threads = threads(&relay).await;
        tally.moments.cannot_look |= threads.is_none();
        let keeper = random.bool().then(|| Keeper::start(&setup, random));
        let by_few = keeper.is_some() && random.bool();
        let sending = load(&relay, random, &callers, &[level], by_few);
        wait(random, threads.as_ref()).await;
        if let Some(keeper) = &keeper {
            keeper.has_done(random.u64(..4)).await;
            sleep(Duration::from_millis(random.u64(..100))).await;
        }
        if random.bool() {
            stop(&relay).await;
            tally.moments.look(threads.as_ref());
        }
        tally.figures.kill(relay).await;
        kills += 1;
        join(sending, &mut callers).await;
        if let Some(keeper) = keeper {
            tally.moments.kept(keeper.ended().await);
        }
        tally.note(&setup, &callers);
    }
    settle(&setup, &mut callers, &mut tally.figures).await;
    tally.oks += callers.oks();
    tally.oks_again += callers.oks_again;
    tally.unknown += callers.unknown();
    let (events, blocks) = check_file(&file(&setup));
    tally.events += events;
    tally.blocks += blocks;
}

/// Until the moment of a kill: any, or one at which a block is being made.
async fn wait(random: &mut Rng, threads: Option<&Threads>) {
    let longest_ms = if random.u8(..8) == 0 { 2_000 } else { 400 };
    let until = Instant::now() + Duration::from_millis(random.u64(5..=longest_ms));
    let Some(threads) = threads.filter(|_| random.u8(..3) == 0) else {
        return sleep(until.duration_since(Instant::now())).await;
    };
    while !threads.sealer_works() && Instant::now() < until + Duration::from_secs(1) {
        sleep(Duration::from_micros(500)).await;
    }
    sleep(Duration::from_millis(random.u64(..15))).await;
}

/// Every provider works again: all is delivered, the relay ends, and its file says the same as
/// its callers, about everybody too.
pub(crate) async fn settle(setup: &Setup, callers: &mut Callers, figures: &mut Figures) {
    all(setup, None);
    let relay = figures.start(setup).await;
    drained(&relay).await;
    compare(setup, &relay, callers, false).await;
    let ended = figures.terminate(relay).await;
    assert_eq!(ended.code, 0, "{:#?}", ended.logs);
    let balance = ended.balance_of("store");
    assert!(balance.is_exact(), "{balance:?}");
    assert_eq!((balance.dropped, balance.dead_lettered, balance.spilled), (0, 0, 0), "{balance:?}");
    let events = exported(setup).await;
    callers.compare(&events, false);
    check_people(setup, &events).await;
}

impl Tally {
    /// Whether each kind of moment was met that so many kills must meet.
    fn has_all(&self, kills: u64) -> bool {
        let others = [self.in_recovery, self.under_way, self.blocks, self.oks_again];
        others.iter().all(|count| *count > 0) && (kills < MANY_KILLS || self.moments.has_all())
    }

    /// Takes in what a kill has left, of which a copy is read: nothing may be mended before
    /// the next relay does it.
    fn note(&mut self, setup: &Setup, callers: &Callers) {
        self.kills += 1;
        self.moments.left(Left::at(setup.data_dir()));
        let copy = tempfile::tempdir().unwrap();
        for name in ["store.db", "store.db-wal"] {
            // What was killed early may not have made it.
            let _ = fs::copy(setup.data_dir().join(name), copy.path().join(name));
        }
        if let Ok(1..) = fs::metadata(copy.path().join("store.db")).map(|file| file.len()) {
            let (events, _) = check_file(&copy.path().join("store.db"));
            self.under_way += u64::from(events < callers.oks());
        }
    }

    fn text(&self) -> String {
        format!(
            "{} OK, {} OK again, {} unknown, {} in the store in {} blocks and more, 0 lost, 0 twice; {} kills \
             during recovery, {} with OKs under way, {}",
            self.oks,
            self.oks_again,
            self.unknown,
            self.events,
            self.blocks,
            self.in_recovery,
            self.under_way,
            self.moments.text()
        )
    }
}
