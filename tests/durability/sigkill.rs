//! SIGKILL at any moment, under load, while providers fail, and while the relay
//! recovers from the SIGKILL before.

use std::{
    collections::HashSet,
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::Durability,
    providers::sandbox::{Seen, Vendor},
};
use fastrand::Rng;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    harness::{Ended, Relay, Setup},
    oracle::{Answer, Draft, Oracle, REFUSABLE},
    relays::{Figures, cursor_totals, durable, fault, number, segments, settle},
};

const CALLERS: usize = 32;
/// Kills beyond those that were asked for, until everything has happened once.
const MORE_KILLS: u64 = 300;
/// Up, failing, throttling, silent, cutting connections, losing replies,
/// refusing events, down.
const FAULTS: [Option<&str>; 10] = [
    None,
    Some("40%503"),
    Some("30%reset-after"),
    Some("40%429"),
    Some("stall"),
    Some("30%reset-before"),
    Some("reject-name=Order Lost"),
    Some("30%reset-mid-reply"),
    Some("503"),
    Some("delay=30"),
];

/// What happened in all runs.
#[derive(Default)]
struct Tally {
    kills: u64,
    kills_in_recovery: u64,
    oks: u64,
    unknown: u64,
    refused: u64,
    dead_lettered: u64,
    duplicates: u64,
    /// The most that there could have been.
    duplicates_max: u64,
    retries: usize,
    tears_made: usize,
    torn_tails: usize,
    segments_removed: usize,
    figures: Figures,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_answered_ok_is_lost_when_the_relay_is_killed_at_any_moment() {
    let (seed, kills) = (number("RELAY_SEED", 0x5eed), number("RELAY_KILL_RUNS", 10));
    println!("RELAY_SEED={seed} RELAY_KILL_RUNS={kills}; events are counted once for each provider");
    let (mut random, mut tally, start) = (Rng::with_seed(seed), Tally::default(), Instant::now());
    while tally.kills < kills || !tally.has_all() && tally.kills < kills + MORE_KILLS {
        // The last chain is as long as is needed, one for what is missing has its full length.
        let left = kills.checked_sub(tally.kills).filter(|left| *left > 0);
        let turns = random.u64(10..=20).min(left.unwrap_or(u64::MAX));
        chain(&mut random, &mut tally, turns).await;
        println!(
            "{} kills in {:.0} s, {} OK, {} duplicates, 0 lost",
            tally.kills,
            start.elapsed().as_secs_f64(),
            tally.oks,
            tally.duplicates
        );
    }
    println!(
        "{} kills, {} of them during recovery: {} OK, {} unknown, {} refused, 0 lost; at the providers {} \
         duplicates of at most {} explained, {} dead letters, {} retries; {} torn ends of {} made; {} \
         segments removed\n{}",
        tally.kills,
        tally.kills_in_recovery,
        tally.oks,
        tally.unknown,
        tally.refused,
        tally.duplicates,
        tally.duplicates_max,
        tally.dead_lettered,
        tally.retries,
        tally.torn_tails,
        tally.tears_made,
        tally.segments_removed,
        tally.figures.text()
    );
    assert!(tally.has_all(), "a fault did not happen");
    assert_eq!(tally.torn_tails, tally.tears_made, "torn ends that were seen, and that were made");
    let rare = [tally.dead_lettered, tally.refused, tally.segments_removed as u64];
    assert!(kills < 100 || rare.iter().all(|count| *count > 0), "refused, dead letters, removed: {rare:?}");
}

/// Several kills of the same data directory; then all is delivered and compared.
async fn chain(random: &mut Rng, tally: &mut Tally, turns: u64) {
    let mut setup = durable(if random.bool() { "synced" } else { "written" }).await;
    if random.u8(..4) == 0 {
        // Small enough to be full now and then.
        setup.set("SPOOL_MAX_BYTES", "262144");
    }
    let mut oracle = Oracle::default();
    // Events of which a provider may get another copy.
    let mut exposed = [0; 3];
    // A full log may be torn in the same way again, which is kept aside once.
    let mut tears = HashSet::new();
    let first_fault = random.usize(..FAULTS.len());
    let mut turn = 0;
    while turn < turns {
        for (place, vendor) in Vendor::ALL.into_iter().enumerate() {
            let text = FAULTS[(first_fault + turn as usize + 3 * place) % FAULTS.len()];
            // What Segment discards it answers with a success: no relay can know.
            let text = text.filter(|text| vendor != Vendor::Segment || !text.starts_with("reject"));
            setup.sandbox.always(vendor, text.and_then(fault));
        }
        if turn % 4 == 3 {
            let relay = Relay::launch(setup.command());
            sleep(Duration::from_millis(random.u64(..60))).await;
            let ended = tally.figures.kill(relay).await;
            tally.kills_in_recovery += u64::from(ended.count("relay started") == 0);
            turn += 1;
            tally.note(&setup, &ended, &mut exposed);
        }
        if turn < turns {
            let relay = tally.figures.start(&setup).await;
            let callers = callers(&relay, random);
            // Some live to see the log synced and segments removed.
            let longest_ms = if random.u8(..8) == 0 { 2500 } else { 400 };
            sleep(Duration::from_millis(random.u64(5..=longest_ms))).await;
            let ended = tally.figures.kill(relay).await;
            turn += 1;
            oracle.add(join(callers).await);
            tally.note(&setup, &ended, &mut exposed);
            if random.u8(..3) == 0 || turn == 1 {
                tears.extend(tear(&setup, random));
            }
        }
    }

    let found = settle(&setup, &oracle, &mut tally.figures).await;
    for (place, vendor) in Vendor::ALL.into_iter().enumerate() {
        let most = exposed[place] + setup.sandbox.requests(vendor).iter().map(reply_lost).sum::<u64>();
        let duplicates = found[place].duplicates;
        assert!(duplicates <= most, "{vendor:?} has {duplicates} duplicates, {most} are explained");
        tally.duplicates += duplicates;
        tally.duplicates_max += most;
        tally.dead_lettered += found[place].dead_lettered;
    }
    tally.tears_made += tears.len();
    tally.torn_tails += kept_aside(&setup);
    tally.oks += oracle.oks();
    tally.unknown += oracle.unknown();
    tally.refused += oracle.refused();
}

impl Tally {
    /// Whether each kind of fault has happened.
    fn has_all(&self) -> bool {
        self.retries > 0 && self.duplicates > 0 && self.kills_in_recovery > 0 && self.tears_made > 0
    }

    /// Takes in how a run ended.
    fn note(&mut self, setup: &Setup, ended: &Ended, exposed: &mut [u64; 3]) {
        self.kills += 1;
        self.retries += ended.count("batch send failed, retrying");
        self.segments_removed += ended.count("segment removed: every provider has passed it");
        for (vendor, exposed) in Vendor::ALL.into_iter().zip(exposed) {
            // What the provider has and the cursor does not know of.
            let totals = cursor_totals(setup, vendor);
            let delivered = totals.iter().filter(|(how, _)| how == "delivered");
            let known: u64 = delivered.map(|(_, events)| events).sum();
            *exposed += setup.sandbox.stats(vendor).taken.saturating_sub(known);
        }
    }
}

/// Callers that send until the relay is gone.
fn callers(relay: &Relay, random: &mut Rng) -> JoinSet<Oracle> {
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let (mut client, mut random) = (relay.client(), random.fork());
        callers.spawn(async move {
            let mut oracle = Oracle::default();
            loop {
                let draft = draft(caller, &mut random);
                // A relay that is killed answers nothing, one that lives does.
                let answer = timeout(Duration::from_secs(20), oracle.send(&mut client, draft)).await.unwrap();
                match answer {
                    Answer::Ok(_) => {}
                    Answer::Refused(_) => sleep(Duration::from_millis(2)).await,
                    Answer::Unknown(_) => return oracle,
                }
            }
        });
    }
    callers
}

fn draft(caller: usize, random: &mut Rng) -> Draft {
    let level = [Durability::Unspecified, Durability::Written, Durability::Synced][random.usize(..3)];
    let name = match random.u8(..60) {
        // Nothing that is called nothing is accepted.
        0 => "",
        1..=3 => REFUSABLE,
        _ => "Order Placed",
    };
    let identify = random.u8(..6) == 0;
    let user = format!("user-{caller}-{}", random.u8(..5));
    Draft { identify, name, user, level, filler: random.usize(..300) }
}

async fn join(mut callers: JoinSet<Oracle>) -> Oracle {
    let mut all = Oracle::default();
    while let Some(oracle) = callers.join_next().await {
        all.add(oracle.unwrap());
    }
    all
}

/// Events of a request that was not answered, or not to the end.
fn reply_lost(seen: &Seen) -> u64 {
    let lost = seen.status.is_none() || seen.fault.as_ref().is_some_and(|fault| fault.starts_with("reset"));
    if lost { seen.events as u64 } else { 0 }
}

/// Torn ends that the relay has met.
fn kept_aside(setup: &Setup) -> usize {
    let kept = fs::read_dir(setup.data_dir().join("spool/quarantine")).unwrap();
    kept.filter(|kept| kept.as_ref().unwrap().file_name().to_string_lossy().contains(".log-")).count()
}

/// Leaves behind the last frame what a write leaves that is cut short by the
/// machine's end: the first bytes of the next one. SIGKILL does not do that, as
/// a group is written by one call; nobody was answered for such a frame, so
/// nothing may be missing for it. Returns the segment, the place and the bytes, if there
/// was room.
pub(crate) fn tear(setup: &Setup, random: &mut Rng) -> Option<(PathBuf, usize, Vec<u8>)> {
    let path = segments(setup).pop()?;
    let bytes = fs::read(&path).unwrap();
    let (mut at, mut last) = (32, None);
    while let Some(head) = bytes.get(at..at + 32).filter(|head| head.starts_with(&[0xA7, b'R', b'F', 0xFE])) {
        let length = 32 + usize::from(head[7]) + u32::from_le_bytes(head[8..12].try_into().unwrap()) as usize;
        last = Some(at..at + length);
        at += length;
    }
    let last = last.filter(|last| last.end < bytes.len())?;
    let cut = random.usize(1..last.len()).min(bytes.len() - at);
    let mut torn = bytes[last][..cut].to_vec();
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&torn, at as u64).unwrap();
    // Zeros at its end cannot be told from what was there.
    torn.truncate(torn.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
    Some((path, at, torn))
}
