//! Relays with a store, and the load on it: callers who send some things twice, and somebody
//! who has it tidied.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use analytics_relay::{proto::v1::Durability, providers::sandbox::Vendor};
use fastrand::Rng;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

use crate::{
    harness::{Client, Relay, Setup},
    moments::Threads,
    relays::{durable, fault},
    stored::{Callers, Draft, Went, check_answers, exported},
};

const CALLERS: usize = 16;
/// So many leave whoever tidies the time to come to an end.
const FEW_CALLERS: usize = 2;
/// Most events of one call.
const BATCH_MAX: usize = 12;
const FAULTS: [Option<&str>; 4] = [None, Some("503"), Some("40%503"), Some("stall")];

/// A relay that makes blocks of a megabyte of events, and batches of a few. Of some the store
/// is the only provider; some know few ids by heart, so that they look for others in blocks.
pub(crate) async fn with_store(random: &mut Rng, level: &str) -> Setup {
    let mut setup = durable(level).await;
    setup.set("STORE_URL", "sqlite:").set("STORE_HOT_MAX_BYTES", "1048576");
    setup.set("STORE_BATCH_SIZE", ["1", "20", "200"][random.usize(..3)]);
    setup.set("STORE_FLUSH_INTERVAL_SECONDS", "0.01");
    setup.set("ANALYTICS_PROVIDER", if random.bool() { "segment" } else { "none" });
    if random.bool() {
        setup.set("STORE_IDS_MAX", "1000");
    }
    setup.sandbox.always(Vendor::Segment, FAULTS[random.usize(..FAULTS.len())].and_then(fault));
    setup
}

/// Waits until the store has all that is in the log, and compares it with what the callers
/// know. Returns how many events were only written, and are lost where they may be.
pub(crate) async fn compare(
    setup: &Setup,
    relay: &Relay,
    callers: &mut Callers,
    may_lose_written: bool,
) -> u64 {
    relay.metric_is("relay_spool_backlog_events", &["\"store\""], 0.0).await;
    let events = exported(setup).await;
    let lost = callers.compare(&events, may_lose_written);
    check_answers(relay, &events).await;
    assert_eq!(relay.metric("relay_store_set_aside", &[]).await, 0.0);
    assert_eq!(relay.metric("relay_store_damaged", &[]).await, 0.0);
    lost
}

/// The store's threads, after it was compared.
pub(crate) async fn threads(relay: &Relay) -> Option<Threads> {
    // A moment after the last batch both have nothing to do; on a busy machine a while after.
    for _ in 0..2_000 {
        sleep(Duration::from_millis(5)).await;
        let threads = Threads::at_rest(relay.pid());
        if threads.is_some() {
            return threads;
        }
    }
    None
}

/// Callers who send until the relay is gone: new events, and some that were sent before.
pub(crate) fn load(
    relay: &Relay,
    random: &mut Rng,
    before: &Callers,
    levels: &[Durability],
    by_few: bool,
) -> JoinSet<Callers> {
    let mut callers = JoinSet::new();
    for _ in 0..if by_few { FEW_CALLERS } else { CALLERS } {
        let (client, mut random, levels) = (relay.client(), random.fork(), levels.to_vec());
        let earlier = before.some(&mut random, BATCH_MAX);
        callers.spawn(send_until_gone(client, random, earlier, levels));
    }
    callers
}

async fn send_until_gone(
    mut client: Client,
    mut random: Rng,
    mut earlier: Vec<Draft>,
    levels: Vec<Durability>,
) -> Callers {
    let mut known = Callers::default();
    loop {
        let mut batch = match random.u8(..5) {
            0 => std::mem::take(&mut earlier),
            1 => known.some(&mut random, 3),
            _ => Vec::new(),
        };
        for _ in 0..random.usize(1..=BATCH_MAX) {
            let level = levels[random.usize(..levels.len())];
            batch.push(Draft::new(&mut random, level));
        }
        // A relay that is killed answers nothing, one that lives does.
        match timeout(Duration::from_secs(30), known.send(&mut client, &batch)).await.unwrap() {
            Went::Answered => {}
            Went::Refused => sleep(Duration::from_millis(2)).await,
            Went::Unknown => return known,
        }
    }
}

pub(crate) async fn join(mut callers: JoinSet<Callers>, all: &mut Callers) {
    while let Some(callers) = callers.join_next().await {
        all.add(callers.unwrap());
    }
}

/// What somebody had the store do beside.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Kept {
    /// Blocks that went into others.
    pub(crate) merged: u64,
    /// The relay was gone before it was done.
    pub(crate) tidying: bool,
    pub(crate) vacuuming: bool,
}

/// Somebody who has the store tidied again and again until the relay is gone, and its file
/// written anew in between now and then.
pub(crate) struct Keeper {
    task: JoinHandle<Kept>,
    done: Arc<AtomicU64>,
}

impl Keeper {
    pub(crate) fn start(setup: &Setup, random: &mut Rng) -> Self {
        let (socket, random, done) =
            (setup.data_dir().join("control.sock"), random.fork(), Arc::<AtomicU64>::default());
        Self { task: tokio::spawn(keep(socket, random, done.clone())), done }
    }

    /// Waits until so much was done, but not for long: a machine may be busy.
    pub(crate) async fn has_done(&self, times: u64) {
        let start = Instant::now();
        while self.done.load(Ordering::SeqCst) < times && start.elapsed() < Duration::from_secs(3) {
            sleep(Duration::from_millis(1)).await;
        }
    }

    pub(crate) async fn ended(self) -> Kept {
        self.task.await.unwrap()
    }
}

async fn keep(socket: PathBuf, mut random: Rng, done: Arc<AtomicU64>) -> Kept {
    let mut kept = Kept::default();
    loop {
        match told(&socket, "tidy").await {
            Told::Done(line) => {
                let merged = line.split_once(r#"{"done":{"merged":"#).unwrap().1;
                kept.merged += merged.trim_end_matches('}').parse::<u64>().unwrap();
                done.fetch_add(1, Ordering::SeqCst);
            }
            Told::Cut => return Kept { tidying: true, ..kept },
            Told::Nothing => return kept,
        }
        sleep(Duration::from_millis(random.u64(..10))).await;
        if random.u8(..4) == 0 {
            match told(&socket, "vacuum").await {
                Told::Done(_) => {}
                Told::Cut => return Kept { vacuuming: true, ..kept },
                Told::Nothing => return kept,
            }
        }
    }
}

/// What the relay says of such a call.
enum Told {
    Done(String),
    /// It had begun, and did not come to its end.
    Cut,
    Nothing,
}

async fn told(socket: &Path, what: &str) -> Told {
    let Ok(mut stream) = UnixStream::connect(socket).await else { return Told::Nothing };
    let call = format!("POST /store/{what} HTTP/1.1\r\nhost: relay\r\ncontent-length: 0\r\n\r\n");
    let mut answer = Vec::new();
    // What came before an error stands there.
    if stream.write_all(call.as_bytes()).await.is_ok() {
        let _ = stream.read_to_end(&mut answer).await;
    }
    let answer = String::from_utf8(answer).unwrap();
    assert!(!answer.contains(r#"{"failed""#), "{answer}");
    match answer.lines().find(|line| line.contains(r#"{"done""#)) {
        Some(line) => Told::Done(line.to_owned()),
        None if answer.is_empty() => Told::Nothing,
        None => Told::Cut,
    }
}
